//! Two listeners on one port: who gets what is new, and what becomes of what waits when the older one closes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::net::SocketAddr;
use std::time::Duration;

use harness::netns::root_or_skip;
use net::{ConnectOptions, DatagramOptions, ListenOptions, Netns, ProxyUdpSocket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn namespace() -> Netns {
    let netns = Netns::new_empty().unwrap();
    let up = netns.run(|| std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status());
    assert!(up.unwrap().unwrap().success());
    netns
}

fn listen(netns: &Netns) -> TcpListener {
    let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
    net::listen(netns, SocketAddr::from(([0_u16; 8], 15008)), &options).unwrap()
}

async fn dial(netns: &Netns, v6: bool) -> TcpStream {
    let to: SocketAddr = if v6 { "[::1]:15008" } else { "127.0.0.1:15008" }.parse().unwrap();
    let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
    net::connect(netns, &options, to, PATIENCE).await.unwrap()
}

/// Waits until so many listen. A process that another test just forked has a closed listener open until it runs its program.
async fn listening(netns: &Netns, count: usize) {
    let sockets = || std::fs::read_to_string("/proc/thread-self/net/tcp6").unwrap();
    let is_one = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
    let wait = async {
        while netns.run(sockets).unwrap().lines().filter(is_one).count() != count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("a listener stays");
}

#[tokio::test]
async fn the_newest_listener_gets_all_that_is_new() {
    if !root_or_skip("listeners that share a port") {
        return;
    }
    let netns = namespace();
    let old = listen(&netns);
    let _first = dial(&netns, false).await;
    timeout(PATIENCE, old.accept()).await.unwrap().unwrap();
    let new = listen(&netns);
    let mut held = Vec::new();
    for index in 0..64 {
        held.push(dial(&netns, index % 2 == 0).await);
        held.push(timeout(PATIENCE, new.accept()).await.expect("the older one got it").unwrap().0);
    }
    // The only one that is left gets them, and so does its successor.
    drop(old);
    listening(&netns, 1).await;
    held.push(dial(&netns, true).await);
    held.push(timeout(PATIENCE, new.accept()).await.unwrap().unwrap().0);
    let next = listen(&netns);
    held.push(dial(&netns, false).await);
    held.push(timeout(PATIENCE, next.accept()).await.unwrap().unwrap().0);
    drop(next);
    listening(&netns, 1).await;
    held.push(dial(&netns, false).await);
    held.push(timeout(PATIENCE, new.accept()).await.unwrap().unwrap().0);
}

#[tokio::test]
async fn what_waits_for_a_listener_that_closes_moves_to_the_other() {
    if !root_or_skip("queues that move") {
        return;
    }
    for moves in [false, true] {
        let netns = namespace();
        if moves {
            net::move_queues(&netns).unwrap();
            net::move_queues(&netns).unwrap();
        }
        let old = listen(&netns);
        let mut waiting = dial(&netns, false).await;
        waiting.write_all(b"hello").await.unwrap();
        let new = listen(&netns);
        drop(old);
        let accepted = timeout(Duration::from_secs(2), new.accept()).await;
        assert_eq!(accepted.is_ok(), moves, "without the setting it is reset: the test would prove nothing");
        if let Ok(accepted) = accepted {
            let mut said = [0; 5];
            let (mut stream, _) = accepted.unwrap();
            timeout(PATIENCE, stream.read_exact(&mut said)).await.unwrap().unwrap();
            assert_eq!(&said, b"hello");
        } else {
            assert!(waiting.read_u8().await.is_err());
        }
    }
}

#[tokio::test]
async fn datagrams_go_to_the_newest_socket_too() {
    if !root_or_skip("sockets that share a port") {
        return;
    }
    let netns = namespace();
    let bind = || {
        let options = DatagramOptions { reuse_port: true, ..DatagramOptions::default() };
        ProxyUdpSocket::bind(&netns, SocketAddr::from(([0_u16; 8], 15053)), &options).unwrap()
    };
    let _old = bind();
    let new = bind();
    let client = netns.run(|| std::net::UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    client.set_nonblocking(true).unwrap();
    let client = UdpSocket::from_std(client).unwrap();
    let mut buffer = [0; 16];
    for _ in 0..32 {
        client.send_to(b"query", "127.0.0.1:15053").await.unwrap();
        let datagram = timeout(PATIENCE, new.recv(&mut buffer)).await.expect("the older one got it").unwrap();
        assert_eq!(datagram.len, 5);
    }
}
