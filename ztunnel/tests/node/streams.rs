//! What two applications do to a connection comes out the same at the other end, in a tunnel and without.

use std::io;
use std::net::SocketAddr;

use harness::netns::{Host, root_or_skip};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::lab::manifests::node_local;
use crate::lab::traffic::{dial, serve_with};
use crate::lab::{Mesh, PATIENCE};

const HALF_CLOSE: u16 = 9001;
const RESET: u16 = 9002;
const BULK: u16 = 9003;
/// Bytes each way.
const LARGE: usize = 200 << 20;

/// Client and server: in a tunnel across nodes and on one node, in plaintext into and out of the mesh, and joined within
/// a node, which has to be set first.
fn pairs(mesh: &Mesh) -> [(&Host, &Host); 5] {
    [("client", "web"), ("client", "near"), ("old", "web"), ("client", "old"), ("client", "near")]
        .map(|(from, to)| (mesh.pod(from), mesh.pod(to)))
}

/// Sets that connections within the node are joined, before the last of the pairs.
async fn prepare(mesh: &Mesh, pair: usize) {
    if pair == 4 {
        mesh.apply("mesh", &node_local("direct")).await;
    }
}

/// Waits until a connection was joined within the node: that the last pair was what it is to be.
async fn was_joined(mesh: &Mesh) {
    mesh.ztunnel("a").last(|c| c["carrier"] == "node-local").await;
}

async fn mesh() -> Mesh {
    Mesh::start(&[("a", &["client", "near"]), ("b", &["web", "outside/old"])]).await
}

async fn soon<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, what).await?
}

#[tokio::test]
async fn either_side_may_finish_first() {
    if !root_or_skip("half-close") {
        return;
    }
    let mesh = mesh().await;
    for (pair, (from, to)) in pairs(&mesh).into_iter().enumerate() {
        prepare(&mesh, pair).await;
        let (got, mut heard) = mpsc::unbounded_channel();
        // Finishes first, and listens on; or hears the end, and answers it.
        let server = serve_with(to, HALF_CLOSE, move |mut stream: TcpStream, _| {
            let got = got.clone();
            async move {
                let first = stream.read_u8().await? == b's';
                if first {
                    stream.write_all(b"last words").await?;
                    stream.shutdown().await?;
                }
                let mut rest = String::new();
                stream.read_to_string(&mut rest).await?;
                let _ = got.send(rest);
                if !first {
                    stream.write_all(b"last words").await?;
                }
                Ok(())
            }
        });
        let target = SocketAddr::new(to.ipv4.into(), HALF_CLOSE);
        for first in ["server", "client"] {
            let mut stream = dial(from, target).await.unwrap();
            let mut words = String::new();
            let talk = async {
                stream.write_all(&first.as_bytes()[..1]).await?;
                if first == "server" {
                    stream.read_to_string(&mut words).await?;
                    stream.write_all(b"still here").await?;
                    stream.shutdown().await
                } else {
                    stream.write_all(b"still here").await?;
                    stream.shutdown().await?;
                    stream.read_to_string(&mut words).await.map(drop)
                }
            };
            soon(talk).await.unwrap_or_else(|e| panic!("{} to {}, {first} first: {e}", from.name, to.name));
            assert_eq!(words, "last words", "{} to {}, {first} first", from.name, to.name);
            let heard = timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
            assert_eq!(heard, "still here", "{} to {}, {first} first", from.name, to.name);
        }
        server.close().await;
    }
    was_joined(&mesh).await;
}

#[tokio::test]
async fn a_reset_of_one_side_resets_the_other() {
    if !root_or_skip("resets") {
        return;
    }
    let mesh = mesh().await;
    for (pair, (from, to)) in pairs(&mesh).into_iter().enumerate() {
        prepare(&mesh, pair).await;
        let (end, mut ended) = mpsc::unbounded_channel();
        let server = serve_with(to, RESET, move |mut stream: TcpStream, _| {
            let end = end.clone();
            async move {
                if stream.read_u8().await? == b's' {
                    net::reset(stream);
                } else {
                    stream.write_all(b"!").await?;
                    let _ = end.send(stream.read_u8().await.map_err(|e| e.kind()));
                }
                Ok(())
            }
        });
        let target = SocketAddr::new(to.ipv4.into(), RESET);

        let mut stream = dial(from, target).await.unwrap();
        stream.write_all(b"s").await.unwrap();
        let error = soon(stream.read_u8()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{} to {}", from.name, to.name);

        let mut stream = dial(from, target).await.unwrap();
        stream.write_all(b"c").await.unwrap();
        soon(stream.read_u8()).await.unwrap();
        net::reset(stream);
        let error = timeout(PATIENCE, ended.recv()).await.unwrap().unwrap();
        assert_eq!(error, Err(io::ErrorKind::ConnectionReset), "{} to {}", from.name, to.name);
        server.close().await;
    }
    was_joined(&mesh).await;
}

/// A stream that does not repeat itself at any power of two: what is lost, doubled or out of order shows.
fn pattern() -> Vec<u8> {
    const PRIME: usize = 1_048_573;
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..=PRIME / 4).flat_map(|_| next()).collect();
    bytes.truncate(PRIME);
    bytes
}

async fn send(mut to: impl tokio::io::AsyncWrite + Unpin) -> io::Result<()> {
    let pattern = pattern();
    let mut left = LARGE;
    while left > 0 {
        let part = left.min(pattern.len());
        to.write_all(&pattern[..part]).await?;
        left -= part;
    }
    to.shutdown().await
}

/// Reads to the end; how much it was, and that all of it was right.
async fn receive(mut from: impl tokio::io::AsyncRead + Unpin) -> io::Result<usize> {
    let pattern = pattern();
    let mut buffer = vec![0; 256 << 10];
    let mut sum = 0;
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(sum);
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let expected = &pattern[sum % pattern.len()..];
            let part = rest.len().min(expected.len());
            if rest[..part] != expected[..part] {
                return Err(io::Error::other(format!("wrong bytes after {sum}")));
            }
            rest = &rest[part..];
            sum += part;
        }
    }
}

#[tokio::test]
async fn hundreds_of_megabytes_arrive_as_they_were_sent() {
    if !root_or_skip("a large transfer") {
        return;
    }
    let mesh = mesh().await;
    for pair in [0, 2, 4] {
        prepare(&mesh, pair).await;
        let (from, to) = pairs(&mesh)[pair];
        let (got, mut heard) = mpsc::unbounded_channel();
        let server = serve_with(to, BULK, move |mut stream: TcpStream, _| {
            let got = got.clone();
            async move {
                let (read, write) = stream.split();
                let both = tokio::try_join!(receive(read), send(write));
                let _ = got.send(both.map(|(sum, ())| sum));
                Ok(())
            }
        });
        let mut stream = dial(from, SocketAddr::new(to.ipv4.into(), BULK)).await.unwrap();
        let (read, write) = stream.split();
        let (sum, ()) = tokio::try_join!(receive(read), send(write)).unwrap();
        assert_eq!(sum, LARGE);
        assert_eq!(heard.recv().await.unwrap().unwrap(), LARGE);
        server.close().await;
    }
    was_joined(&mesh).await;
    for node in ["a", "b"] {
        let kb = mesh.ztunnel(node).resident_kb();
        assert!(kb < 200_000, "{kb} kB are resident on {node}");
    }
}
