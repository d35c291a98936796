//! Idle connections hold nothing. Alone in its process: it counts the process's descriptors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::net::Ipv4Addr;
use std::time::Duration;

use net::{ByteCounts, ConnectOptions, ListenOptions, Netns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PATIENCE: Duration = Duration::from_secs(20);

async fn connected(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let netns = Netns::current().unwrap();
    let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
    let to = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(net::connect(&netns, &options, to, PATIENCE), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_idle_connection_holds_neither_buffer_nor_pipe() {
    const CONNECTIONS: usize = 200;
    let netns = Netns::current().unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = net::listen(&netns, address, &ListenOptions::default()).unwrap();
    let before = descriptors();
    let mut ends = Vec::new();
    let mut after_first = 0;
    let data = vec![1; 4 << 20];
    let mut received = vec![0; data.len()];
    for _ in 0..CONNECTIONS {
        let (mut client, from_client) = connected(&listener).await;
        let (to_server, mut server) = connected(&listener).await;
        tokio::spawn(async move { net::copy(from_client, to_server, &ByteCounts::default()).await });
        // In bulk, so that pipes are used, and small, so that buffers are.
        let (sent, read) = tokio::join!(client.write_all(&data), server.read_exact(&mut received));
        sent.unwrap();
        read.unwrap();
        server.write_all(b"small").await.unwrap();
        client.read_exact(&mut received[..5]).await.unwrap();
        ends.push((client, server));
        if ends.len() == 20 {
            after_first = resident_kb();
        }
    }
    let held = descriptors() - before - 4 * CONNECTIONS;
    assert!(held <= 2 * 4, "{held} descriptors of pipes for idle connections");
    let each = (resident_kb() - after_first) / (CONNECTIONS - 20);
    println!("{each} KB for an idle connection and its ends");
    assert!(each < 8, "{each} KB for each idle connection");
}
