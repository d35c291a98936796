//! A connection's first words: what is asked goes with the client's preface, and the answer with the server's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use hbone::{Connector, Control, Pool, PoolSettings, ServerCounters, ServerSettings, serve};
use support::raw::*;
use support::{echo, request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};

type Writes = Arc<Mutex<Vec<Vec<u8>>>>;

/// Remembers each write.
struct Noted {
    io: DuplexStream,
    writes: Writes,
}

impl AsyncRead for Noted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Noted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write(cx, data))?;
        self.writes.lock().unwrap().push(data[..count].to_vec());
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Connects to a server that sends back what comes.
#[derive(Default)]
struct Echo {
    of_client: Writes,
    of_server: Writes,
}

impl Connector for Echo {
    type Key = ();
    type Io = Noted;
    type Peer = ();
    type Error = io::Error;

    async fn connect(&self, (): &()) -> io::Result<(Noted, ())> {
        let (client, server) = tokio::io::duplex(1 << 20);
        let server = Noted { io: server, writes: self.of_server.clone() };
        let of_client = self.of_client.clone();
        tokio::spawn(async move {
            // In a tunnel they come with the end of TLS's handshake.
            while of_client.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
            let (settings, counters, echo) =
                (ServerSettings::default(), Arc::<ServerCounters>::default(), echo());
            serve(server, &settings, &Control::default(), &counters, |incoming| echo(incoming)).await
        });
        Ok((Noted { io: client, writes: self.of_client.clone() }, ()))
    }
}

/// The types of the frames of a write, and how long the payloads of its DATA are.
fn frames(mut write: &[u8]) -> (Vec<u8>, usize) {
    let (mut kinds, mut data) = (Vec::new(), 0);
    while !write.is_empty() {
        let length = usize::from(write[1]) << 8 | usize::from(write[2]);
        kinds.push(write[3]);
        data += if write[3] == DATA { length } else { 0 };
        write = &write[9 + length..];
    }
    (kinds, data)
}

#[tokio::test]
async fn a_first_request_and_its_answer_are_one_write_each() {
    let net = Echo::default();
    let (of_client, of_server) = (net.of_client.clone(), net.of_server.clone());
    let pool = Pool::new(net, PoolSettings { spread: 1, ..PoolSettings::default() });
    let (mut app, mut side) = tokio::io::duplex(4096);
    side.write_all(b"what the application says first").await.unwrap();
    // In a task, as all that opens tunnels: what the runtime itself runs has its turn after all tasks.
    let opening = tokio::spawn(async move {
        let opened = pool.open_early(&(), &request(), &mut app, &mut BytesMut::new()).await;
        (opened.unwrap().tunnel, pool)
    });
    let (mut tunnel, _pool) = opening.await.unwrap();
    let mut back = [0; 31];
    tunnel.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"what the application says first");
    let first = of_client.lock().unwrap()[0].clone();
    assert_eq!(first[..24], *PREFACE);
    let (kinds, data) = frames(&first[24..]);
    assert!(kinds.starts_with(&[SETTINGS]) && kinds.contains(&HEADERS), "{kinds:?}");
    assert_eq!(data, 31, "{kinds:?}");
    let (kinds, _) = frames(&of_server.lock().unwrap()[0]);
    assert!(kinds.starts_with(&[SETTINGS]) && kinds.contains(&HEADERS), "{kinds:?}");
}

#[tokio::test(start_paused = true)]
async fn settings_do_not_wait_for_an_answer_that_takes_its_time() {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let held = Arc::new(Mutex::new(Vec::new()));
    let holding = held.clone();
    tokio::spawn(async move {
        let counters = Arc::<ServerCounters>::default();
        let handler = |incoming| holding.lock().unwrap().push(incoming);
        serve(server, &ServerSettings::default(), &Control::default(), &counters, handler).await
    });
    let fields = block(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80")]);
    let words = [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS, 1, &fields)].concat();
    client.write_all(&words).await.unwrap();
    let mut kinds = Vec::new();
    while !(kinds.contains(&SETTINGS) && kinds.len() > 1) {
        let mut head = [0; 9];
        let read = tokio::time::timeout(std::time::Duration::from_secs(1), client.read_exact(&mut head));
        read.await.expect("it says something").unwrap();
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        client.read_exact(&mut vec![0; length]).await.unwrap();
        kinds.push(head[3]);
    }
    assert!(!kinds.contains(&HEADERS));
    assert_eq!(held.lock().unwrap().len(), 1);
}
