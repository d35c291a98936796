//! The encrypted stream: every byte, in order, whatever the sizes; its ends; its peers of other make.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use identity::{ExpectedPeers, HandshakeLimits, TlsError, TlsStream, accept, connect, connect_corked};
use mesh::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio::net::{TcpListener, TcpStream};

async fn over<A, B>(mesh: &Mesh, a: A, b: B) -> (TlsStream<A>, TlsStream<B>)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (web, db, limits) = (id("shop/sa/web"), id("shop/sa/db"), HandshakeLimits::default());
    let (a, b) = tokio::join!(
        connect(a, &mesh.certificates, &web, db.clone().into(), limits),
        accept(b, &mesh.certificates, &db, limits)
    );
    (a.unwrap(), b.unwrap())
}

async fn pair(mesh: &Mesh) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let (a, b) = duplex(256 * 1024);
    over(mesh, a, b).await
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, (server, _)) = tokio::try_join!(client, listener.accept()).unwrap();
    (client, server)
}

/// Bytes that tell when one is missing, doubled or swapped.
fn pattern(from: u64, length: usize) -> Vec<u8> {
    (from..from + length as u64).map(|n| (n ^ (n >> 8) ^ (n >> 17)) as u8).collect()
}

/// A cheap generator: the same seed, the same sizes.
struct Sizes(u64);

impl Sizes {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below
    }
}

async fn send_pattern(mut io: impl AsyncWrite + Unpin, total: u64, seed: u64) {
    let mut sizes = Sizes(seed);
    let mut sent = 0;
    while sent < total {
        let limit = [1, 10, 300, 5000, 70_000][sizes.next(5)];
        let length = (1 + sizes.next(limit)).min((total - sent) as usize);
        let data = pattern(sent, length);
        if sizes.next(4) == 0 {
            let cut = sizes.next(length + 1);
            let slices = [IoSlice::new(&data[..cut]), IoSlice::new(&[]), IoSlice::new(&data[cut..])];
            let count = std::future::poll_fn(|cx| Pin::new(&mut io).poll_write_vectored(cx, &slices)).await;
            sent += count.unwrap() as u64;
        } else {
            io.write_all(&data).await.unwrap();
            sent += length as u64;
        }
        if sizes.next(3) == 0 {
            io.flush().await.unwrap();
        }
    }
    io.shutdown().await.unwrap();
}

async fn receive_pattern(mut io: impl AsyncRead + Unpin, total: u64, seed: u64) {
    let mut sizes = Sizes(seed);
    let mut got = 0;
    loop {
        let limit = [1, 100, 5000, 100_000][sizes.next(4)];
        let mut buffer = vec![0; 1 + sizes.next(limit)];
        let count = io.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        assert_eq!(buffer[..count], pattern(got, count), "at {got}");
        got += count as u64;
    }
    assert_eq!(got, total);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_bytes_arrive_in_order_both_ways_at_once() {
    const TOTAL: u64 = 20_000_000;
    let mesh = Mesh::start();
    let (a, b) = tcp().await;
    let (a, b) = over(&mesh, a, b).await;
    let ((ar, aw), (br, bw)) = (tokio::io::split(a), tokio::io::split(b));
    let tasks = [
        tokio::spawn(send_pattern(aw, TOTAL, 1)),
        tokio::spawn(send_pattern(bw, TOTAL, 2)),
        tokio::spawn(receive_pattern(ar, TOTAL, 3)),
        tokio::spawn(receive_pattern(br, TOTAL, 4)),
    ];
    for task in tasks {
        task.await.unwrap();
    }
}

/// A transport that takes and gives a few bytes at a time, and now and then none.
struct Grudging<IO> {
    io: IO,
    sizes: Sizes,
}

impl<IO> Grudging<IO> {
    fn refuses(&mut self, cx: &mut Context<'_>) -> bool {
        let refuses = self.sizes.next(3) == 0;
        if refuses {
            cx.waker().wake_by_ref();
        }
        refuses
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Grudging<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.refuses(cx) {
            return Poll::Pending;
        }
        let limit = 1 + self.sizes.next(3000);
        let mut part = vec![0; limit.min(out.remaining())];
        let mut part = ReadBuf::new(&mut part);
        let result = Pin::new(&mut self.io).poll_read(cx, &mut part);
        out.put_slice(part.filled());
        result
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Grudging<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.refuses(cx) {
            return Poll::Pending;
        }
        let count = (1 + self.sizes.next(3000)).min(data.len());
        Pin::new(&mut self.io).poll_write(cx, &data[..count])
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn a_transport_that_takes_and_gives_little_loses_nothing() {
    const TOTAL: u64 = 1_000_000;
    let mesh = Mesh::start();
    let (a, b) = duplex(10_000);
    let grudging = |io, seed| Grudging { io, sizes: Sizes(seed) };
    let (a, b) = over(&mesh, grudging(a, 5), grudging(b, 6)).await;
    tokio::join!(send_pattern(a, TOTAL, 7), receive_pattern(b, TOTAL, 8));
}

#[tokio::test]
async fn a_write_that_is_dropped_half_way_is_counted_right() {
    let mesh = Mesh::start();
    let (a, b) = duplex(4096);
    let (mut a, b) = over(&mesh, a, b).await;
    let total = 2_000_000;
    let reader = tokio::spawn(receive_pattern(b, total, 9));
    let mut sent = 0_u64;
    let mut cancelled = 0;
    while sent < total {
        let data = pattern(sent, 50_000.min((total - sent) as usize));
        tokio::select! {
            biased;
            count = a.write(&data) => sent += count.unwrap() as u64,
            () = tokio::task::yield_now() => cancelled += 1,
        }
        if cancelled % 3 == 0 {
            tokio::select! {
                biased;
                done = a.flush() => done.unwrap(),
                () = tokio::task::yield_now() => {}
            }
        }
    }
    assert!(cancelled > 10, "{cancelled}");
    a.shutdown().await.unwrap();
    reader.await.unwrap();
}

#[tokio::test]
async fn nothing_is_sure_to_be_sent_before_a_flush_and_all_after() {
    let mesh = Mesh::start();
    let (mut a, mut b) = pair(&mesh).await;
    for text in ["a", "b", "c"] {
        a.write_all(text.as_bytes()).await.unwrap();
    }
    let mut got = [0; 16];
    let early = tokio::time::timeout(Duration::from_millis(50), b.read(&mut got)).await;
    assert!(early.is_err(), "three small writes wait for each other");
    a.flush().await.unwrap();
    assert_eq!(b.read(&mut got).await.unwrap(), 3, "and share a record");
}

#[tokio::test]
async fn either_side_may_finish_first_and_the_other_goes_on() {
    let mesh = Mesh::start();
    let (mut a, mut b) = pair(&mesh).await;
    a.write_all(b"request").await.unwrap();
    a.shutdown().await.unwrap();
    let mut got = Vec::new();
    b.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"request");
    assert_eq!(b.read(&mut [0]).await.unwrap(), 0, "the end stays the end");
    b.write_all(b"answer").await.unwrap();
    b.shutdown().await.unwrap();
    got.clear();
    a.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"answer");
    assert_eq!(a.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    a.shutdown().await.unwrap();
}

fn tls_error(error: &io::Error) -> &TlsError {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

#[tokio::test]
async fn an_end_without_close_notify_is_an_error_after_all_data() {
    let mesh = Mesh::start();
    let (mut a, mut b) = pair(&mesh).await;
    a.write_all(b"half a mess").await.unwrap();
    a.flush().await.unwrap();
    drop(a);
    let mut got = Vec::new();
    let error = b.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((got.as_slice(), error.kind()), (&b"half a mess"[..], io::ErrorKind::UnexpectedEof));
    assert!(matches!(tls_error(&error), TlsError::Truncated));
    assert!(b.read(&mut [0]).await.is_err(), "the error stays");
}

/// Changes what is written.
type Spoil = fn(&mut Vec<u8>);

/// Lets the handshake through, then changes what passes.
struct Tapped {
    io: DuplexStream,
    spoil: std::sync::Arc<std::sync::Mutex<Option<Spoil>>>,
}

impl AsyncRead for Tapped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, out)
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let spoil = *self.spoil.lock().unwrap();
        let Some(spoil) = spoil else { return Pin::new(&mut self.io).poll_write(cx, data) };
        let mut changed = data.to_vec();
        spoil(&mut changed);
        // The pipe is larger than anything written here.
        assert!(
            matches!(Pin::new(&mut self.io).poll_write(cx, &changed), Poll::Ready(Ok(n)) if n == changed.len())
        );
        Poll::Ready(Ok(data.len()))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn a_record_that_was_tampered_with_ends_the_connection_and_the_peer_is_told() {
    let mesh = Mesh::start();
    let cases: [(Spoil, &str); 7] = [
        (|record| *record.last_mut().unwrap() ^= 1, "a record failed"),
        (|record| record[5] ^= 0x80, "a record failed"),
        (|record| record[0] = 20, "an unprotected record"),
        (|record| record[0] = 22, "an unprotected record"),
        (|record| record[3..5].copy_from_slice(&[0xff, 0xff]), "longer than TLS allows"),
        (
            |record| {
                record.truncate(9);
                record[3..5].copy_from_slice(&[0, 4]);
            },
            "a record failed",
        ),
        (|record| record.extend(record.clone()), "a record failed"),
    ];
    for (spoil, says) in cases {
        let (a, b) = duplex(64 * 1024);
        let tap = std::sync::Arc::new(std::sync::Mutex::new(None));
        let (mut a, mut b) = over(&mesh, Tapped { io: a, spoil: tap.clone() }, b).await;
        *tap.lock().unwrap() = Some(spoil);
        a.write_all(b"message").await.unwrap();
        a.flush().await.unwrap();
        let mut got = Vec::new();
        let error = b.read_to_end(&mut got).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert!(got.is_empty() || got == b"message", "{got:?}");
        assert_eq!(b.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let told = a.read(&mut [0]).await.unwrap_err();
        assert!(matches!(tls_error(&told), TlsError::Alert(_)), "{told}");
    }
}

#[tokio::test]
async fn a_stock_server_is_understood() {
    const TOTAL: u64 = 3_000_000;
    let mesh = Mesh::start();
    // With tickets, as most servers give them, unasked.
    let leaf = sign(&leaf_params("spiffe://cluster.local/ns/shop/sa/db"), &mesh.stolen_ca().1);
    let server = stock_server(&leaf, &[b"h2"]);
    let (a, b) = tcp().await;
    let (web, limits) = (id("shop/sa/web"), HandshakeLimits::default());
    let connecting = connect(a, &mesh.certificates, &web, ExpectedPeers::AnyOfMesh, limits);
    let (a, b) = tokio::join!(connecting, server.accept(b));
    both_ways(a.unwrap(), b.unwrap(), TOTAL).await;
}

#[tokio::test]
async fn a_stock_client_is_understood() {
    const TOTAL: u64 = 3_000_000;
    let mesh = Mesh::start();
    let leaf = sign(&leaf_params("spiffe://cluster.local/ns/shop/sa/web"), &mesh.stolen_ca().1);
    let (a, b) = tcp().await;
    let (db, limits) = (id("shop/sa/db"), HandshakeLimits::default());
    let connector = stock_client(Some(&leaf), &[b"h2"]);
    let (a, b) = tokio::join!(connector.connect(any_name(), a), accept(b, &mesh.certificates, &db, limits));
    both_ways(a.unwrap(), b.unwrap(), TOTAL).await;
}

async fn both_ways<A, B>(a: A, b: B, total: u64)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let ((ar, aw), (br, bw)) = (tokio::io::split(a), tokio::io::split(b));
    tokio::join!(
        send_pattern(aw, total, 11),
        send_pattern(bw, total, 12),
        receive_pattern(ar, total, 13),
        receive_pattern(br, total, 14)
    );
}

#[tokio::test]
async fn a_peer_may_change_its_keys_at_any_time() {
    let mesh = Mesh::start();
    let leaf = sign(&leaf_params("spiffe://cluster.local/ns/shop/sa/web"), &mesh.stolen_ca().1);
    let (a, b) = duplex(256 * 1024);
    let (db, limits) = (id("shop/sa/db"), HandshakeLimits::default());
    let connector = stock_client(Some(&leaf), &[b"h2"]);
    let (a, b) = tokio::join!(connector.connect(any_name(), a), accept(b, &mesh.certificates, &db, limits));
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    let mut got = [0; 5];
    for _ in 0..50 {
        // rustls asks for new keys of ours too.
        a.get_mut().1.refresh_traffic_keys().unwrap();
        a.write_all(b"there").await.unwrap();
        a.flush().await.unwrap();
        b.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"there");
        b.write_all(b"again").await.unwrap();
        b.flush().await.unwrap();
        a.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"again");
    }
    // But not without end while it sends nothing.
    for _ in 0..40 {
        a.get_mut().1.refresh_traffic_keys().unwrap();
        a.flush().await.unwrap();
    }
    let error = b.read(&mut got).await.unwrap_err();
    assert!(error.to_string().contains("too many key updates"), "{error}");
}

#[tokio::test]
async fn the_peer_s_refusal_of_our_certificate_shows_on_the_first_read() {
    let mesh = Mesh::start();
    let other = Mesh::start();
    let (a, b) = duplex(64 * 1024);
    let (web, db, limits) = (id("shop/sa/web"), id("shop/sa/db"), HandshakeLimits::default());
    // The client trusts the server's root, the server not the client's.
    let both: Vec<_> = [&mesh, &other]
        .iter()
        .flat_map(|m| {
            m.certificates.bundle().snapshot().roots().iter().map(|r| r.der.clone()).collect::<Vec<_>>()
        })
        .collect();
    mesh.certificates.bundle().set_roots(&both).unwrap();
    let (client, server) = tokio::join!(
        connect(a, &mesh.certificates, &web, db.clone().into(), limits),
        accept(b, &other.certificates, &db, limits)
    );
    assert_eq!(server.unwrap_err().reason(), "foreign_ca");
    let error = client.unwrap().read(&mut [0]).await.unwrap_err();
    assert!(error.to_string().contains("UnknownCA"), "{error}");
}

#[tokio::test]
async fn futures_that_hold_a_handshake_or_a_stream_stay_small() {
    let mesh = Mesh::start();
    let (a, b) = duplex(64);
    let (web, limits) = (id("shop/sa/web"), HandshakeLimits::default());
    let connecting = connect(a, &mesh.certificates, &web, web.clone().into(), limits);
    let accepting = accept(b, &mesh.certificates, &web, limits);
    let sizes = (size_of_val(&connecting), size_of_val(&accepting));
    assert!(sizes.0 < 600 && sizes.1 < 600, "{sizes:?}");
    assert_eq!(size_of::<TlsStream<DuplexStream>>(), size_of::<DuplexStream>() + size_of::<usize>());
}

#[tokio::test]
async fn the_end_of_a_corked_handshake_goes_with_the_first_bytes() {
    let mesh = Mesh::start();
    let (web, db, limits) = (id("shop/sa/web"), id("shop/sa/db"), HandshakeLimits::default());
    let (a, b) = duplex(256 * 1024);
    let (certificates, own) = (mesh.certificates.clone(), db.clone());
    let server = tokio::spawn(async move { accept(b, &certificates, &own, limits).await });
    let mut client = connect_corked(a, &mesh.certificates, &web, db.into(), limits).await.unwrap();
    client.write_all(b"first").await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!server.is_finished(), "nothing was flushed");
    client.flush().await.unwrap();
    let mut server = server.await.unwrap().unwrap();
    let mut got = [0; 5];
    // All of it is there already: the server has read it behind the handshake.
    let read = std::future::poll_fn(|cx| {
        let mut buffer = ReadBuf::new(&mut got);
        Pin::new(&mut server).poll_read(cx, &mut buffer)
    });
    tokio::time::timeout(Duration::ZERO, read).await.unwrap().unwrap();
    assert_eq!(&got, b"first");
    server.write_all(b"second").await.unwrap();
    server.shutdown().await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"second");
}

#[tokio::test]
async fn the_end_of_a_corked_handshake_goes_also_with_nothing() {
    let mesh = Mesh::start();
    let (web, db, limits) = (id("shop/sa/web"), id("shop/sa/db"), HandshakeLimits::default());
    for flushed in [true, false] {
        let (a, b) = duplex(256 * 1024);
        let (certificates, own) = (mesh.certificates.clone(), db.clone());
        let server = tokio::spawn(async move { accept(b, &certificates, &own, limits).await });
        let connected = connect_corked(a, &mesh.certificates, &web, db.clone().into(), limits).await;
        let mut client = connected.unwrap();
        if flushed {
            client.flush().await.unwrap();
        } else {
            client.shutdown().await.unwrap();
        }
        let mut server = server.await.unwrap().unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0, "a good end");
    }
}
