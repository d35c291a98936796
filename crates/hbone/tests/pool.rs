//! The pool against this crate's server, over in-memory streams.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::time::Duration;

use hbone::{ConnectError, OpenError, Pool, PoolSettings, StatusCode, TunnelHeaders};
use support::{Net, check_echo, echo, pool, request};
use tokio::time::{Instant, sleep};

#[tokio::test(start_paused = true)]
async fn tunnels_of_a_key_share_a_connection_and_keys_do_not() {
    let pool = pool(Net::new(echo()));
    for (key, length) in [(1, 0), (1, 1), (2, 100_000), (1, 9_000_000)] {
        let opened = pool.open(&key, &request()).await.unwrap();
        assert_eq!(opened.peer, key);
        check_echo(opened.tunnel, &vec![7; length]).await;
    }
    assert_eq!(pool.connector().made(), 2);
    assert_eq!(pool.counters().reused.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn concurrent_first_requests_share_one_handshake() {
    let mut net = Net::new(echo());
    net.delay = Duration::from_millis(50);
    let pool = Pool::new(net, PoolSettings { spread: 1, ..PoolSettings::default() });
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let opened = pool.open(&1, &request()).await.unwrap();
                check_echo(opened.tunnel, b"hello").await;
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(pool.connector().made(), 1);
}
