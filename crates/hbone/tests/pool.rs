//! The pool against this crate's server, over in-memory streams.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use hbone::{
    Closed, ConnectError, OpenError, Opened, Pool, PoolSettings, ServerSettings, StatusCode, TunnelError,
    TunnelHeaders,
};
use support::{Handler, Net, SILENT, check_echo, echo, pool, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

fn one_link() -> PoolSettings {
    PoolSettings { spread: 1, ..PoolSettings::default() }
}

async fn open(pool: &Pool<Net>, key: u32) -> Opened<u32> {
    pool.open(&key, &request()).await.unwrap()
}

/// Lets all tasks come to rest.
async fn settle() {
    sleep(Duration::from_millis(10)).await;
}

#[tokio::test(start_paused = true)]
async fn tunnels_of_a_key_share_a_connection_and_keys_do_not() {
    let pool = pool(Net::new(echo()));
    for (key, length) in [(1, 0), (1, 1), (2, 100_000), (1, 9_000_000)] {
        let opened = open(&pool, key).await;
        assert_eq!(opened.peer, key);
        check_echo(opened.tunnel, &vec![7; length]).await;
    }
    assert_eq!(pool.connector().made(), 2);
    let counters = pool.counters();
    assert_eq!((counters.connections.get(), counters.streams.get(), counters.reused.get()), (2, 4, 2));
    assert_eq!((counters.connections_now.get(), counters.streams_now.get()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn concurrent_first_requests_share_one_handshake() {
    let mut net = Net::new(echo());
    net.delay = Duration::from_millis(50);
    let pool = Pool::new(net, one_link());
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { check_echo(open(&pool, 1).await.tunnel, b"hello").await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(pool.connector().made(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_gives_up_does_not_end_the_others_handshake() {
    let mut net = Net::new(echo());
    net.delay = Duration::from_secs(2);
    let pool = Pool::new(net, one_link());
    let request = request();
    let first = timeout(Duration::from_secs(1), pool.open(&1, &request));
    let second = async {
        sleep(Duration::from_millis(500)).await;
        open(&pool, 1).await
    };
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_err());
    check_echo(second.tunnel, b"hello").await;
    assert_eq!(pool.connector().made(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_blocks_nobody_else_and_not_for_ever() {
    let pool = pool(Net::new(echo()));
    let start = Instant::now();
    let silent: Vec<_> = (0..20)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.open(&SILENT, &request()).await })
        })
        .collect();
    settle().await;
    check_echo(open(&pool, 1).await.tunnel, b"hello").await;
    assert!(start.elapsed() < Duration::from_secs(1));
    for task in silent {
        let error = task.await.unwrap().unwrap_err();
        let OpenError::Connect(reason) = &error else { panic!("{error}") };
        assert!(matches!(**reason, ConnectError::Timeout(_)), "{error}");
    }
    assert_eq!(start.elapsed().as_secs(), 10);
    assert_eq!(pool.counters().connects_timed_out.get(), 1);
    assert_eq!(pool.snapshot().len(), 1, "nothing is left of the silent peer");
}

#[tokio::test(start_paused = true)]
async fn a_refused_connection_is_told_to_all_who_wait_and_tried_again_for_the_next() {
    let mut net = Net::new(echo());
    net.delay = Duration::from_millis(20);
    let pool = pool(net);
    let (a, request) = (pool.clone(), request());
    let (first, second) = tokio::join!(a.open(&666, &request), pool.open(&666, &request));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        let OpenError::Connect(reason) = error else { panic!("{error}") };
        assert!(
            matches!(&*reason, ConnectError::Connector(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
        );
    }
    assert_eq!(pool.counters().connects_failed.get(), 1);
    pool.open(&666, &request).await.unwrap_err();
    assert_eq!(pool.counters().connects_failed.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_reached_its_limit_is_used_again_when_streams_end() {
    let mut net = Net::new(echo());
    net.settings.max_streams = 3;
    let pool = Pool::new(net, PoolSettings { spread: 1, max_streams: 3, ..PoolSettings::default() });
    for _ in 0..10 {
        let mut open_now = Vec::new();
        for _ in 0..3 {
            open_now.push(open(&pool, 1).await);
        }
        for opened in open_now {
            check_echo(opened.tunnel, b"hello").await;
        }
        settle().await;
    }
    assert_eq!(pool.connector().made(), 1);
    // Full, so a fourth goes to another connection.
    let all = [open(&pool, 1).await, open(&pool, 1).await, open(&pool, 1).await, open(&pool, 1).await];
    assert_eq!(pool.connector().made(), 2);
    drop(all);
}

#[tokio::test(start_paused = true)]
async fn a_peers_own_lower_limit_is_kept() {
    let mut net = Net::new(echo());
    net.settings.max_streams = 4;
    let pool = Pool::new(net, one_link());
    // The first tells the limit.
    let mut all = vec![open(&pool, 1).await];
    settle().await;
    for _ in 0..11 {
        all.push(open(&pool, 1).await);
    }
    assert_eq!(pool.connector().made(), 3);
    assert_eq!(pool.counters().retried.get(), 0);
    for opened in all {
        check_echo(opened.tunnel, b"hello").await;
    }
}

#[tokio::test(start_paused = true)]
async fn streams_that_were_refused_in_the_first_rush_are_opened_elsewhere() {
    let mut net = Net::new(echo());
    // All requests are sent before the server tells its limit.
    net.server_delay = Duration::from_millis(5);
    net.settings.max_streams = 4;
    let pool = Pool::new(net, one_link());
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let opened = open(&pool, 1).await;
                sleep(Duration::from_secs(1)).await;
                check_echo(opened.tunnel, b"hello").await;
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(pool.counters().retried.get() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_busy_peer_gets_more_connections() {
    let pool = Pool::new(Net::new(echo()), PoolSettings { spread: 3, ..PoolSettings::default() });
    let mut all = Vec::new();
    for _ in 0..30 {
        all.push(open(&pool, 1).await);
        settle().await;
    }
    assert_eq!((pool.connector().made(), pool.counters().spread.get()), (3, 2));
    let streams: Vec<_> = pool.snapshot().iter().map(|connection| connection.streams).collect();
    assert_eq!(streams, [10, 10, 10]);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_carries_much_is_not_shared_while_another_may_be_had() {
    let pool = Pool::new(Net::new(echo()), PoolSettings { spread: 2, ..PoolSettings::default() });
    let bulk = open(&pool, 1).await;
    let (mut read, mut write) = tokio::io::split(bulk.tunnel);
    tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    let block = vec![0; 1 << 20];
    for _ in 0..10 {
        write.write_all(&block).await.unwrap();
        sleep(Duration::from_millis(20)).await;
    }
    let second = open(&pool, 1).await;
    settle().await;
    let third = open(&pool, 1).await;
    assert_eq!(pool.connector().made(), 2);
    let mut streams: Vec<_> = pool.snapshot().iter().map(|connection| connection.streams).collect();
    streams.sort_unstable();
    assert_eq!(streams, [1, 2], "the third went to the new connection");
    drop((second, third));
}

#[tokio::test(start_paused = true)]
async fn refusals_keep_their_status() {
    for status in [400, 401, 503, 418] {
        let status = StatusCode::from_u16(status).unwrap();
        let handler: Handler = Arc::new(move |incoming| incoming.refuse(status, &TunnelHeaders::default()));
        let pool = pool(Net::new(handler));
        let error = pool.open(&1, &request()).await.unwrap_err();
        assert!(matches!(error, OpenError::Refused(got) if got == status), "{error}");
        assert_eq!((pool.counters().refused.get(), pool.counters().streams_now.get()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn headers_travel_both_ways() {
    let handler: Handler = Arc::new(|incoming| {
        assert_eq!(incoming.authority.to_string(), "[2001:db8::1]:443");
        assert_eq!(incoming.headers.parse_baggage().unwrap().service_name.as_deref(), Some("a b"));
        assert_eq!(incoming.headers.parse_forwarded().unwrap().host.as_deref(), Some("svc"));
        assert_eq!(incoming.headers.parse_origin_network().as_deref(), Some("east"));
        assert_eq!(incoming.headers.traceparent.as_ref().unwrap(), "00-1-2-00");
        assert_eq!(incoming.headers.istio_source.as_ref().unwrap(), "waypoint");
        let baggage = hbone::HeaderValue::from_static("service.name=b");
        let tunnel = incoming.accept(&TunnelHeaders { baggage: Some(baggage), ..TunnelHeaders::default() });
        drop(tunnel);
    });
    let mut request = request();
    request.authority = "[2001:db8::1]:443".parse().unwrap();
    let value = |text: &'static str| Some(hbone::HeaderValue::from_static(text));
    request.headers = TunnelHeaders {
        baggage: value("service.name=a%20b"),
        forwarded: value("for=\"1.2.3.4:5\";host=svc"),
        traceparent: value("00-1-2-00"),
        origin_network: value("east"),
        istio_source: value("waypoint"),
    };
    let opened = pool(Net::new(handler)).open(&1, &request).await.unwrap();
    assert_eq!(opened.headers.parse_baggage().unwrap().service_name.as_deref(), Some("b"));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_is_given_up_and_the_server_told() {
    let told = Arc::new(AtomicUsize::new(0));
    let tell = Arc::clone(&told);
    let handler: Handler = Arc::new(move |mut incoming| {
        let tell = Arc::clone(&tell);
        tokio::spawn(async move {
            let reason = incoming.given_up().await;
            assert!(matches!(reason, TunnelError::Reset(_)), "{reason}");
            tell.fetch_add(1, Ordering::SeqCst);
        });
    });
    let pool = pool(Net::new(handler));
    let start = Instant::now();
    let error = pool.open(&1, &request()).await.unwrap_err();
    assert!(matches!(error, OpenError::ResponseTimeout), "{error}");
    assert_eq!(start.elapsed().as_secs(), 15);
    settle().await;
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(pool.connector().server.early_resets.get(), 1);
    assert_eq!(pool.counters().streams_now.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_unused_connection_is_released_and_a_used_one_is_not() {
    let pool = pool(Net::new(echo()));
    let mut opened = open(&pool, 1).await;
    check_echo(open(&pool, 2).await.tunnel, b"hello").await;
    sleep(Duration::from_secs(299)).await;
    assert_eq!(pool.snapshot().len(), 2);
    sleep(Duration::from_secs(20)).await;
    assert_eq!(pool.snapshot().len(), 1);
    assert_eq!(pool.counters().idle_closed.get(), 1);
    assert_eq!(pool.counters().connections_now.get(), 1);
    assert!(matches!(pool.connector().ended.lock().unwrap()[..], [Closed::Finished]));
    // An idle tunnel stays for hours.
    sleep(Duration::from_secs(5 * 3600)).await;
    opened.tunnel.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    opened.tunnel.read_exact(&mut back).await.unwrap();
    check_echo(open(&pool, 2).await.tunnel, b"hello").await;
    assert_eq!(pool.connector().made(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_drained_server_finishes_its_tunnels_and_gets_no_new_ones() {
    let pool = Pool::new(Net::new(echo()), one_link());
    let old = open(&pool, 1).await;
    settle().await;
    pool.connector().controls.lock().unwrap()[0].drain(Duration::from_secs(30));
    settle().await;
    for _ in 0..3 {
        check_echo(open(&pool, 1).await.tunnel, b"new").await;
    }
    assert_eq!(pool.connector().made(), 2);
    assert_eq!(pool.counters().going_away.get(), 1);
    check_echo(old.tunnel, &vec![3; 1_000_000]).await;
    settle().await;
    assert!(matches!(pool.connector().ended.lock().unwrap()[..], [Closed::Finished]));
}

#[tokio::test(start_paused = true)]
async fn requests_that_race_with_a_drain_are_opened_elsewhere() {
    let pool = Pool::new(Net::new(echo()), one_link());
    check_echo(open(&pool, 1).await.tunnel, b"first").await;
    // The requests are on their way while the server begins to drain.
    let controls = pool.connector().controls.lock().unwrap().clone();
    controls[0].drain(Duration::from_secs(30));
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { check_echo(open(&pool, 1).await.tunnel, b"race").await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_drains_deadline_resets_what_is_left() {
    let pool = pool(Net::new(echo()));
    let mut old = open(&pool, 1).await;
    settle().await;
    let start = Instant::now();
    pool.connector().controls.lock().unwrap()[0].drain(Duration::from_secs(30));
    let error = old.tunnel.read_u8().await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 30, "{error}");
    settle().await;
    assert!(matches!(pool.connector().ended.lock().unwrap()[..], [Closed::DrainDeadline]));
}

#[tokio::test(start_paused = true)]
async fn an_aborted_connection_ends_its_tunnels_at_once() {
    let pool = pool(Net::new(echo()));
    let mut old = open(&pool, 1).await;
    settle().await;
    let start = Instant::now();
    pool.connector().controls.lock().unwrap()[0].abort();
    old.tunnel.read_u8().await.unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(5));
    check_echo(open(&pool, 1).await.tunnel, b"hello").await;
    assert!(matches!(pool.connector().ended.lock().unwrap()[..], [Closed::Aborted]));
}

#[tokio::test(start_paused = true)]
async fn a_retired_key_finishes_its_tunnels_on_the_old_connection() {
    let pool = Pool::new(Net::new(echo()), one_link());
    let old = open(&pool, 1).await;
    let other = open(&pool, 2).await;
    assert_eq!(pool.retire(|key| *key == 1), 1);
    assert_eq!(pool.retire(|key| *key == 1), 0);
    let new = open(&pool, 1).await;
    assert_eq!(pool.connector().made(), 3);
    let retired: Vec<_> = pool.snapshot().iter().filter(|c| c.retired).map(|c| (c.key, c.streams)).collect();
    assert_eq!(retired, [(1, 1)]);
    for opened in [old, other, new] {
        check_echo(opened.tunnel, b"hello").await;
    }
    settle().await;
    assert_eq!(pool.snapshot().len(), 2, "the retired connection has ended with its last tunnel");
    assert!(matches!(pool.connector().ended.lock().unwrap()[..], [Closed::Finished]));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_was_being_made_when_its_key_was_retired_is_not_used() {
    let mut net = Net::new(echo());
    net.delay = Duration::from_secs(1);
    let pool = Pool::new(net, one_link());
    let start = Instant::now();
    let opening = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, 1).await })
    };
    sleep(Duration::from_millis(600)).await;
    pool.retire(|_| true);
    let opened = opening.await.unwrap();
    assert_eq!(start.elapsed().as_millis() / 100, 16, "it took a second attempt");
    check_echo(opened.tunnel, b"hello").await;
    assert_eq!(pool.connector().made(), 1);
    assert_eq!(pool.counters().connecting_now.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_aborted_key_loses_its_tunnels_retired_connections_included() {
    let pool = Pool::new(Net::new(echo()), one_link());
    let mut old = open(&pool, 1).await;
    pool.retire(|_| true);
    let mut new = open(&pool, 1).await;
    let mut other = open(&pool, 2).await;
    assert_eq!(pool.abort(|key| *key == 1), 2);
    old.tunnel.read_u8().await.unwrap_err();
    new.tunnel.read_u8().await.unwrap_err();
    other.tunnel.write_all(b"x").await.unwrap();
    assert_eq!(other.tunnel.read_u8().await.unwrap(), b'x');
    settle().await;
    assert_eq!(pool.snapshot().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn idle_connections_make_room_at_the_limit_and_busy_ones_do_not() {
    let pool = Pool::new(Net::new(echo()), PoolSettings { max_connections: 2, ..one_link() });
    let first = open(&pool, 1).await;
    check_echo(open(&pool, 2).await.tunnel, b"hello").await;
    settle().await;
    let third = open(&pool, 3).await;
    settle().await;
    assert_eq!(pool.counters().evicted.get(), 1);
    let error = pool.open(&4, &request()).await.unwrap_err();
    let OpenError::Connect(reason) = &error else { panic!("{error}") };
    assert!(matches!(**reason, ConnectError::TooManyConnections(2)), "{error}");
    assert_eq!(pool.counters().overloaded.get(), 1);
    for opened in [first, third] {
        check_echo(opened.tunnel, b"hello").await;
    }
    settle().await;
    check_echo(open(&pool, 4).await.tunnel, b"hello").await;
    assert_eq!(pool.snapshot().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn callers_of_one_key_are_limited() {
    let pool = Pool::new(Net::new(echo()), PoolSettings { max_waiting: 5, ..one_link() });
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.open(&SILENT, &request()).await })
        })
        .collect();
    settle().await;
    assert_eq!(pool.counters().waiting_now.get(), 5);
    let error = pool.open(&SILENT, &request()).await.unwrap_err();
    assert!(matches!(error, OpenError::Overloaded(5)), "{error}");
    check_echo(open(&pool, 1).await.tunnel, b"others are not concerned").await;
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    settle().await;
    assert_eq!(pool.counters().waiting_now.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn early_data_arrives_with_the_request_and_comes_back_when_it_is_refused() {
    let pool = Pool::new(Net::new(echo()), one_link());
    let (mut app, mut proxy) = tokio::io::duplex(1024);
    app.write_all(b"early").await.unwrap();
    let mut early = BytesMut::new();
    let mut opened = pool.open_early(&1, &request(), &mut proxy, &mut early).await.unwrap();
    let mut back = [0; 5];
    opened.tunnel.read_exact(&mut back).await.unwrap();
    assert_eq!((&back, &*early), (b"early", &b"early"[..]));

    let handler: Handler = Arc::new(|incoming| {
        tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, &TunnelHeaders::default());
        });
    });
    let refusing = Pool::new(Net::new(handler), one_link());
    app.write_all(b" and more").await.unwrap();
    let mut early = BytesMut::from("again");
    let error = refusing.open_early(&1, &request(), &mut proxy, &mut early).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused(_)));
    assert_eq!(&*early, b"again and more");
    // The next endpoint gets it all.
    let mut opened = pool.open_early(&1, &request(), &mut proxy, &mut early).await.unwrap();
    let mut back = [0; 14];
    opened.tunnel.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"again and more");
}

#[tokio::test]
async fn an_application_that_fails_before_the_answer_is_not_one_that_has_finished() {
    let (come, mut asked) = tokio::sync::mpsc::unbounded_channel();
    // Answers once its application has failed, and takes what there is.
    let handler: Handler = Arc::new(move |incoming| come.send(incoming).unwrap());
    let pool = Pool::new(Net::new(handler), one_link());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut app = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut proxy, _) = listener.accept().await.unwrap();
    app.write_all(b"half of it").await.unwrap();
    let mut early = BytesMut::new();
    let request = request();
    let opening = pool.open_early(&1, &request, &mut proxy, &mut early);
    let failing = async {
        let incoming = asked.recv().await.unwrap();
        net::reset(app);
        incoming
    };
    let (opened, incoming) = tokio::join!(opening, failing);
    assert!(matches!(opened, Err(OpenError::App(_))), "{opened:?}");
    assert_eq!(&*early, b"half of it");
    let mut tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
    tunnel.read_to_end(&mut Vec::new()).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn early_data_is_bounded() {
    let handler: Handler = Arc::new(|incoming| {
        tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            drop(incoming);
        });
    });
    let pool = Pool::new(Net::new(handler), one_link());
    let (mut app, mut proxy) = tokio::io::duplex(1024);
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    tokio::spawn(async move {
        while app.write_all(&[1; 1000]).await.is_ok() {
            count.fetch_add(1000, Ordering::SeqCst);
        }
    });
    let mut early = BytesMut::new();
    let error = pool.open_early(&1, &request(), &mut proxy, &mut early).await.unwrap_err();
    assert!(matches!(error, OpenError::Lost(_)), "{error}");
    assert_eq!(early.len(), 64 * 1024);
    assert!(sent.load(Ordering::SeqCst) < 70_000);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_falls_silent_is_found_dead() {
    // From some moment on, what is between the two keeps the connections open and passes nothing on.
    let (mut near, far) = tokio::io::duplex(64 * 1024);
    let (client, mut server) = tokio::io::duplex(64 * 1024);
    let stall = Arc::new(tokio::sync::Notify::new());
    let stalled = Arc::clone(&stall);
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut server) => {}
            () = stalled.notified() => std::future::pending().await,
        }
    });
    struct Given(std::sync::Mutex<Vec<tokio::io::DuplexStream>>);
    impl hbone::Connector for Given {
        type Key = ();
        type Io = tokio::io::DuplexStream;
        type Peer = ();
        type Error = std::io::Error;
        async fn connect(&self, (): &()) -> std::io::Result<(tokio::io::DuplexStream, ())> {
            let io = self.0.lock().unwrap().pop();
            io.map(|io| (io, ())).ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into())
        }
    }
    tokio::spawn(async move {
        let handler = echo();
        hbone::serve(far, &ServerSettings::default(), &hbone::Control::default(), &Arc::default(), |i| {
            handler(i);
        })
        .await
    });
    let pool = Pool::new(Given(std::sync::Mutex::new(vec![client])), one_link());
    let mut opened = pool.open(&(), &request()).await.unwrap();
    opened.tunnel.write_all(b"x").await.unwrap();
    assert_eq!(opened.tunnel.read_u8().await.unwrap(), b'x');
    sleep(Duration::from_secs(120)).await;
    assert_eq!(pool.snapshot().len(), 1, "pings were answered");
    let start = Instant::now();
    stall.notify_one();
    let error = opened.tunnel.read_u8().await.unwrap_err();
    assert!(start.elapsed() <= Duration::from_secs(31), "{error} after {:?}", start.elapsed());
    assert!(matches!(pool.open(&(), &request()).await.unwrap_err(), OpenError::Connect(_)));
}
