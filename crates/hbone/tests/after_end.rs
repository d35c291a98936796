//! What becomes of a tunnel whose peer finishes sending and then resets it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hbone::{
    AppIo, ErrorCode, Outcome, PumpLimits, ServerSettings, Side, Traffic, TunnelError, TunnelHeaders, pump,
};
use support::raw::*;
use support::{Handler, Served};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

const CANCEL: u32 = 8;
/// What the peer sends: more than sockets hold, less than a window.
const LENGTH: usize = 3_500_000;

/// A peer with one tunnel to an application, and how the tunnel ends.
async fn tunnel_to<A: AppIo + 'static>(app: A) -> (Raw, Served, mpsc::UnboundedReceiver<Outcome>) {
    let (tell, outcome) = mpsc::unbounded_channel();
    let given = Mutex::new(Some(app));
    let handler: Handler = Arc::new(move |incoming| {
        let app = given.lock().unwrap().take().unwrap();
        let tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
        let tell = tell.clone();
        tokio::spawn(async move {
            let _ = tell.send(pump(tunnel, app, &Traffic::default(), PumpLimits::default()).await);
        });
    });
    let (mut raw, served) = support::hostile(ServerSettings::default(), handler);
    raw.begin().await;
    raw.connect(1, "10.0.0.1:80").await;
    let answer = raw.next_answer().await.unwrap();
    assert!(Raw::is_status(&answer, 200), "{answer:?}");
    (raw, served, outcome)
}

fn byte(at: usize) -> u8 {
    (at.wrapping_mul(31) >> 7) as u8
}

/// All data, its end, and at once the reset.
async fn send_all_and_reset(raw: &mut Raw, code: u32) {
    let data: Vec<u8> = (0..LENGTH).map(byte).collect();
    let pieces: Vec<_> = data.chunks(16_384).collect();
    for (at, piece) in pieces.iter().enumerate() {
        let last = at + 1 == pieces.len();
        raw.send(DATA, if last { END_STREAM } else { 0 }, 1, piece).await;
    }
    raw.send(RST_STREAM, 0, 1, &code.to_be_bytes()).await;
}

/// Reads slowly to the end, or to the error.
async fn read_slowly(io: &mut (impl tokio::io::AsyncRead + Unpin)) -> (Vec<u8>, io::Result<()>) {
    let mut got = Vec::new();
    let mut block = vec![0; 50_000];
    loop {
        sleep(Duration::from_millis(10)).await;
        match io.read(&mut block).await {
            Ok(0) => return (got, Ok(())),
            Ok(n) => got.extend_from_slice(&block[..n]),
            Err(error) => return (got, Err(error)),
        }
    }
}

fn assert_complete(got: &[u8], what: &str) {
    assert_eq!(got.len(), LENGTH, "{what}");
    assert!(got.iter().enumerate().all(|(at, got)| *got == byte(at)), "{what}");
}

/// A pipe whose reset is seen.
struct App(DuplexStream, mpsc::UnboundedSender<()>);

impl AppIo for App {
    fn abort(&mut self) {
        let _ = self.1.send(());
    }
}

impl tokio::io::AsyncRead for App {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for App {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_all_that_came_before_the_reset() {
    for (code, orderly, speaks) in [(0, true, false), (0, true, true), (CANCEL, false, false)] {
        let what = format!("code {code}, the application speaks: {speaks}");
        let (near, mut far) = tokio::io::duplex(8 * 1024);
        let (aborted, mut was_aborted) = mpsc::unbounded_channel();
        let (mut raw, served, mut outcome) = tunnel_to(App(near, aborted)).await;
        send_all_and_reset(&mut raw, code).await;
        if speaks {
            // Nobody will read it; that must not cost what was sent to the application.
            far.write_all(&[7; 4000]).await.unwrap();
        }
        let (got, end) = timeout(Duration::from_secs(600), read_slowly(&mut far)).await.expect(&what);
        assert_complete(&got, &what);
        assert!(end.is_ok(), "{what}: {end:?}");
        let outcome = timeout(Duration::from_secs(5), outcome.recv()).await.expect(&what).unwrap();
        if orderly {
            assert!(matches!(outcome, Outcome::Finished(Side::Tunnel)), "{what}: {outcome}");
        } else {
            let reset = TunnelError::Reset(ErrorCode::CANCEL);
            assert!(matches!(&outcome, Outcome::Tunnel(error) if *error == reset), "{what}: {outcome}");
        }
        assert_eq!(was_aborted.recv().await.is_some(), !orderly, "{what}");
        // The other tunnels of the connection go on.
        assert!(!served.task.is_finished());
    }
}

#[tokio::test]
async fn a_slow_reader_behind_a_socket_gets_all_that_came_before_the_reset() {
    for (code, speaks) in [(0, false), (0, true), (CANCEL, false), (CANCEL, true)] {
        let what = format!("code {code}, the application speaks: {speaks}");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let near = listener.accept().await.unwrap().0;
        let (mut raw, _served, mut outcome) = tunnel_to(near).await;
        send_all_and_reset(&mut raw, code).await;
        if speaks {
            far.write_all(&[7; 4000]).await.unwrap();
        }
        let (got, _) = timeout(Duration::from_secs(30), read_slowly(&mut far)).await.expect(&what);
        assert_complete(&got, &what);
        let outcome = timeout(Duration::from_secs(5), outcome.recv()).await.expect(&what).unwrap();
        assert_eq!(outcome.is_finished(), code == 0, "{what}: {outcome}");
    }
}

#[tokio::test]
async fn an_application_that_dies_does_not_keep_a_tunnel_that_is_gone() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let near = listener.accept().await.unwrap().0;
    let (mut raw, _served, mut outcome) = tunnel_to(near).await;
    // Little enough for the sockets' buffers, and never read.
    for _ in 0..21 {
        raw.send(DATA, 0, 1, &[1; 16_384]).await;
    }
    raw.send(DATA, END_STREAM, 1, b"end").await;
    raw.send(RST_STREAM, 0, 1, &0u32.to_be_bytes()).await;
    sleep(Duration::from_millis(100)).await;
    far.set_zero_linger().unwrap();
    drop(far);
    timeout(Duration::from_secs(5), outcome.recv()).await.expect("it waits for ever").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reset_without_an_end_is_still_one() {
    let (near, mut far) = tokio::io::duplex(8 * 1024);
    let (aborted, mut was_aborted) = mpsc::unbounded_channel();
    let (mut raw, _served, mut outcome) = tunnel_to(App(near, aborted)).await;
    raw.send(DATA, 0, 1, &[1; 16_384]).await;
    raw.send(RST_STREAM, 0, 1, &0u32.to_be_bytes()).await;
    let outcome = timeout(Duration::from_secs(5), outcome.recv()).await.unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Tunnel(_)), "{outcome}");
    assert!(was_aborted.recv().await.is_some());
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).await.unwrap();
}
