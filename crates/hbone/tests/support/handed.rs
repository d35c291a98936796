//! A pool whose servers are played by hand.

use std::sync::Mutex;

use hbone::{Connector, Pool, PoolSettings};
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio::sync::mpsc;

use super::raw::*;

/// Hands the server's ends of its connections out.
pub struct Handed(Mutex<mpsc::UnboundedSender<Raw>>);

impl Connector for Handed {
    type Key = ();
    type Io = DuplexStream;
    type Peer = ();
    type Error = std::io::Error;

    async fn connect(&self, (): &()) -> std::io::Result<(DuplexStream, ())> {
        let (client, server) = tokio::io::duplex(1 << 20);
        self.0.lock().unwrap().send(Raw { io: server }).map_err(std::io::Error::other)?;
        Ok((client, ()))
    }
}

pub fn handed() -> (Pool<Handed>, mpsc::UnboundedReceiver<Raw>) {
    let (give, take) = mpsc::unbounded_channel();
    let settings = PoolSettings { spread: 1, ..PoolSettings::default() };
    (Pool::new(Handed(Mutex::new(give)), settings), take)
}

/// A response without data, status 200.
pub fn ok(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &[0x88])
}

/// Reads up to the request's headers and returns its stream.
pub async fn request_of(raw: &mut Raw) -> u32 {
    let mut preface = [0; 24];
    raw.io.read_exact(&mut preface).await.unwrap();
    assert_eq!(preface, PREFACE);
    raw.send(SETTINGS, 0, 0, &[]).await;
    next_request(raw).await
}

pub async fn next_request(raw: &mut Raw) -> u32 {
    loop {
        let frame = raw.next_answer().await.expect("the client hung up");
        if frame.kind == HEADERS {
            return frame.stream;
        }
    }
}
