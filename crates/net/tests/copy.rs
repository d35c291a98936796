//! Two connections joined: all bytes, ends and resets pass, and nothing piles up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use net::{ByteCounts, ConnectOptions, End, ListenOptions, Netns, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it took too long")
}

async fn connected() -> (TcpStream, TcpStream) {
    let netns = Netns::current().unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = net::listen(&netns, address, &ListenOptions::default()).unwrap();
    let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
    let to = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(net::connect(&netns, &options, to, PATIENCE), listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// A client and a server, with a copy between them.
struct Joined {
    client: TcpStream,
    server: TcpStream,
    counts: Arc<ByteCounts>,
    copying: JoinHandle<End>,
}

async fn joined() -> Joined {
    let (client, from_client) = connected().await;
    let (to_server, server) = connected().await;
    let counts = Arc::new(ByteCounts::default());
    let counting = counts.clone();
    let copying = tokio::spawn(async move { net::copy(from_client, to_server, &counting).await });
    Joined { client, server, counts, copying }
}

/// Bytes that repeat late (xorshift64).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let bytes = self.0.to_ne_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// Sends `total` bytes in pieces of changing size, with pauses, and then ends.
async fn send(mut to: impl tokio::io::AsyncWrite + Unpin, seed: u64, total: usize) {
    let (mut noise, mut sizes) = (Noise(seed), Noise(seed + 1));
    let mut left = total;
    let mut buffer = vec![0; 300_000];
    while left > 0 {
        let mut size = [0; 8];
        sizes.fill(&mut size);
        let size = usize::try_from(u64::from_ne_bytes(size) % 300_000).unwrap() / 8 * 8;
        // Small ones, large ones, and now and then a pause that lets everything drain.
        let size = if size % 3 == 0 { size % 800 / 8 * 8 + 8 } else { size + 8 }.min(buffer.len()).min(left);
        noise.fill(&mut buffer[..size]);
        to.write_all(&buffer[..size]).await.unwrap();
        left -= size;
        if size % 11 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    to.shutdown().await.unwrap();
}

/// Reads to the end; it has to be what [`send`] sent.
async fn receive(mut from: impl tokio::io::AsyncRead + Unpin, seed: u64, total: usize) {
    let mut noise = Noise(seed);
    let mut received = Vec::with_capacity(total);
    from.read_to_end(&mut received).await.unwrap();
    assert_eq!(received.len(), total);
    let mut expected = vec![0; total];
    noise.fill(&mut expected);
    assert!(received == expected, "the bytes differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_passes_both_ways_at_once() {
    const UP: usize = 48 << 20;
    const DOWN: usize = 24 << 20;
    let Joined { mut client, mut server, counts, copying } = joined().await;
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    in_time(async {
        tokio::join!(
            send(client_write, 1, UP),
            receive(server_read, 1, UP),
            send(server_write, 2, DOWN),
            receive(client_read, 2, DOWN),
        )
    })
    .await;
    let end = in_time(copying).await.unwrap();
    assert!(matches!(end, End::Finished(_)), "{end:?}");
    assert_eq!(counts.to_server.load(Ordering::Relaxed), UP as u64);
    assert_eq!(counts.to_client.load(Ordering::Relaxed), DOWN as u64);
}

#[tokio::test]
async fn a_half_closed_connection_goes_on_the_other_way() {
    let Joined { mut client, mut server, counts, copying } = joined().await;
    client.write_all(b"the whole question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    in_time(server.read_to_string(&mut question)).await.unwrap();
    assert_eq!(question, "the whole question");
    assert_eq!(counts.to_server.load(Ordering::Relaxed), 18);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let answer = tokio::spawn(async move {
        send(&mut server, 3, 5 << 20).await;
        server
    });
    in_time(receive(&mut client, 3, 5 << 20)).await;
    drop(answer.await.unwrap());
    assert!(matches!(in_time(copying).await.unwrap(), End::Finished(Side::Client)));
}

#[tokio::test]
async fn the_server_may_speak_and_end_first() {
    let Joined { mut client, mut server, copying, .. } = joined().await;
    server.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    in_time(client.read_exact(&mut greeting)).await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(in_time(client.read(&mut greeting)).await.unwrap(), 0);
    client.write_all(b"bye").await.unwrap();
    drop(client);
    let mut rest = String::new();
    in_time(server.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "bye");
    assert!(matches!(in_time(copying).await.unwrap(), End::Finished(Side::Server)));
}

async fn assert_reset(stream: &mut TcpStream) {
    let mut buffer = [0; 64];
    let read = in_time(stream.read(&mut buffer)).await;
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_of_either_side_resets_the_other() {
    for side in [Side::Client, Side::Server] {
        let Joined { mut client, mut server, copying, .. } = joined().await;
        client.write_all(b"hello").await.unwrap();
        in_time(server.read_exact(&mut [0; 5])).await.unwrap();
        let mut other = match side {
            Side::Client => {
                net::reset(client);
                server
            }
            Side::Server => {
                net::reset(server);
                client
            }
        };
        assert_reset(&mut other).await;
        let end = in_time(copying).await.unwrap();
        assert!(matches!(end, End::Reset(by) if by == side), "{side}: {end:?}");
    }
}

#[tokio::test]
async fn a_reset_is_seen_after_that_side_has_finished() {
    for side in [Side::Client, Side::Server] {
        let Joined { client, server, copying, .. } = joined().await;
        let (mut first, mut other) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        first.shutdown().await.unwrap();
        assert_eq!(in_time(other.read(&mut [0; 1])).await.unwrap(), 0);
        // Both sides idle, nothing to read from `first` any more.
        tokio::time::sleep(Duration::from_millis(20)).await;
        net::reset(first);
        let end = in_time(copying).await.unwrap();
        assert!(matches!(end, End::Reset(by) if by == side), "{side}: {end:?}");
        let written = in_time(async {
            loop {
                if let Err(error) = other.write_all(b"x").await {
                    break error;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        assert!(matches!(written.await.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe));
    }
}

#[tokio::test]
async fn a_cut_copy_resets_both() {
    let Joined { mut client, mut server, copying, .. } = joined().await;
    client.write_all(b"half of somethi").await.unwrap();
    in_time(server.read_exact(&mut [0; 15])).await.unwrap();
    copying.abort();
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
}

#[tokio::test]
async fn a_slow_reader_slows_the_writer_and_fills_no_memory() {
    let Joined { mut client, mut server, counts, copying } = joined().await;
    let buffer = vec![7; 1 << 20];
    let mut written = 0;
    // Until nothing moves for a while.
    while let Ok(result) = tokio::time::timeout(Duration::from_millis(300), client.write(&buffer)).await {
        written += result.unwrap();
        assert!(written < 64 << 20, "{written} bytes went nowhere");
    }
    let passed = usize::try_from(counts.to_server.load(Ordering::Relaxed)).unwrap();
    // What the copy holds, on top of the kernel's buffers at its two ends.
    assert!(passed <= written);
    client.shutdown().await.unwrap();
    let mut received = Vec::new();
    in_time(server.read_to_end(&mut received)).await.unwrap();
    assert_eq!(received.len(), written);
    assert!(received.iter().all(|byte| *byte == 7));
    drop(server);
    assert!(matches!(in_time(copying).await.unwrap(), End::Finished(Side::Client)));
}

#[tokio::test]
async fn the_future_is_small() {
    let (client, from_client) = connected().await;
    let counts = ByteCounts::default();
    let size = std::mem::size_of_val(&net::copy(client, from_client, &counts));
    assert!(size <= 640, "{size} bytes for every connection that passes");
}
