//! What the encrypted stream costs, beside tokio-rustls and plaintext, on this machine:
//! `cargo run --release -p identity --example tls_stream [plain|tokiorustls|ours|handshakes]`.
//!
//! First over loopback TCP, sender and receiver each on a thread of its own: throughput, and CPU of both together.
//! Then without a transport, on one thread: what sealing and opening alone cost, of this crate's stream, of
//! tokio-rustls (both less the copies of the pipe that stands for the transport), and of rustls' unbuffered API
//! (which needs no pipe).
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use identity::{
    CaDirectory, CertificateSettings, Certificates, Clock, ExpectedPeers, HandshakeLimits, LocalIssuer,
    LocalIssuerSettings, Validity, accept, connect,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rustls::unbuffered::{ConnectionState, EncodeError};
use rustls_pki_types::{ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

const BYTES: u64 = 4 << 30;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let setup = runtime.block_on(Setup::new());
    let only = std::env::args().nth(1);
    let wanted = |kind: Kind| only.as_ref().is_none_or(|only| format!("{kind:?}").eq_ignore_ascii_case(only));
    println!("loopback TCP, {} GiB, CPU of both ends together", BYTES >> 30);
    for chunk in [16 * 1024, 64 * 1024] {
        for kind in [Kind::Plain, Kind::TokioRustls, Kind::Ours].into_iter().filter(|kind| wanted(*kind)) {
            let best = (0..3).map(|_| over_tcp(&setup, kind, chunk)).min_by(|a, b| a.cpu.total_cmp(&b.cpu));
            let best = best.unwrap();
            println!(
                "{kind:?}, {} KiB at once: {:.2} GB/s, {:.3} CPU s/GB",
                chunk / 1024,
                best.rate,
                best.cpu
            );
        }
    }
    if only.as_deref().is_some_and(|only| only != "handshakes") {
        return;
    }
    if only.is_some() {
        println!("a handshake: {:.0} CPU µs, both ends together", handshakes(&setup));
        return;
    }
    println!("no transport, one thread");
    let pipe = in_memory(&setup, Kind::Plain);
    for (name, cost) in [
        ("this crate", in_memory(&setup, Kind::Ours) - pipe),
        ("tokio-rustls", in_memory(&setup, Kind::TokioRustls) - pipe),
        ("rustls unbuffered", unbuffered(&setup)),
    ] {
        println!("{name}: {cost:.3} CPU s/GB to seal and open");
    }
    println!("a handshake: {:.0} CPU µs, both ends together", handshakes(&setup));
}

/// CPU microseconds of a handshake in which both sides are authenticated.
fn handshakes(setup: &Setup) -> f64 {
    const HANDSHAKES: u32 = 3000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let begin = cpu_seconds();
        for _ in 0..HANDSHAKES {
            let (a, b) = tokio::io::duplex(64 * 1024);
            let limits = HandshakeLimits::default();
            let (client, server) = tokio::join!(
                connect(a, &setup.certificates, &setup.id, setup.id.clone().into(), limits),
                accept(b, &setup.certificates, &setup.id, limits)
            );
            client.unwrap();
            server.unwrap();
        }
        (cpu_seconds() - begin) * 1e6 / f64::from(HANDSHAKES)
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    TokioRustls,
    Ours,
}

struct Setup {
    _dir: tempfile::TempDir,
    certificates: Certificates,
    id: SpiffeId,
    acceptor: tokio_rustls::TlsAcceptor,
    connector: tokio_rustls::TlsConnector,
}

impl Setup {
    async fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
        let domain = TrustDomain::cluster_local();
        ca.make_if_missing(&domain, Validity::of_roots(), UnixTime::now()).unwrap();
        let domains = TrustDomains::only(domain);
        let issuer =
            LocalIssuer::start(ca, domains, LocalIssuerSettings::default(), Clock::system()).unwrap();
        let bundle = issuer.bundle().clone();
        let settings = CertificateSettings::default();
        let certificates =
            Certificates::new(Arc::new(issuer), bundle.clone(), settings, None, Clock::system());
        let id: SpiffeId = "spiffe://cluster.local/ns/bench/sa/bench".parse().unwrap();
        certificates.get(&id).await.unwrap();
        // The stock library with the same cipher and no client certificate: the handshake is not measured.
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["bench.example".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        server.send_tls13_tickets = 0;
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        Self { _dir: dir, certificates, id, acceptor, connector }
    }
}

struct Cost {
    rate: f64,
    cpu: f64,
}

fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(microseconds.unsigned_abs()).as_secs_f64()
}

fn over_tcp(setup: &Setup, kind: Kind, chunk: usize) -> Cost {
    let build = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            build().block_on(async {
                let (io, _) = TcpListener::from_std(listener).unwrap().accept().await.unwrap();
                match kind {
                    Kind::Plain => receive(io, chunk).await,
                    Kind::TokioRustls => receive(setup.acceptor.accept(io).await.unwrap(), chunk).await,
                    Kind::Ours => {
                        let limits = HandshakeLimits::default();
                        receive(accept(io, &setup.certificates, &setup.id, limits).await.unwrap(), chunk)
                            .await
                    }
                }
            })
        });
        build().block_on(async {
            let io = TcpStream::connect(address).await.unwrap();
            match kind {
                Kind::Plain => send(io, chunk).await,
                Kind::TokioRustls => {
                    let name = ServerName::try_from("bench.example").unwrap();
                    send(setup.connector.connect(name, io).await.unwrap(), chunk).await;
                }
                Kind::Ours => {
                    let (limits, anyone) = (HandshakeLimits::default(), ExpectedPeers::AnyOfMesh);
                    send(connect(io, &setup.certificates, &setup.id, anyone, limits).await.unwrap(), chunk)
                        .await;
                }
            }
        });
        receiver.join().unwrap()
    })
}

async fn send(mut io: impl AsyncWrite + Unpin, chunk: usize) {
    let data = vec![0x5a; chunk];
    let mut left = BYTES;
    while left > 0 {
        io.write_all(&data).await.unwrap();
        left -= chunk as u64;
    }
    io.shutdown().await.unwrap();
}

async fn receive(mut io: impl AsyncRead + Unpin, chunk: usize) -> Cost {
    let mut buffer = vec![0; chunk];
    io.read_exact(&mut buffer).await.unwrap();
    let (cpu, begin) = (cpu_seconds(), tokio::time::Instant::now());
    let mut got = 0_u64;
    loop {
        match io.read(&mut buffer).await.unwrap() {
            0 => break,
            count => got += count as u64,
        }
    }
    let gigabytes = got as f64 / 1e9;
    Cost { rate: gigabytes / begin.elapsed().as_secs_f64(), cpu: (cpu_seconds() - cpu) / gigabytes }
}

/// Two ends of a pipe that is never full; nothing waits.
#[derive(Clone, Default)]
struct Pipe {
    incoming: Arc<Mutex<VecDeque<u8>>>,
    outgoing: Arc<Mutex<VecDeque<u8>>>,
}

impl Pipe {
    fn other_end(&self) -> Self {
        Self { incoming: self.outgoing.clone(), outgoing: self.incoming.clone() }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut incoming = self.incoming.lock().unwrap();
        if incoming.is_empty() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let count = incoming.as_slices().0.len().min(out.remaining());
        out.put_slice(&incoming.as_slices().0[..count]);
        incoming.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.outgoing.lock().unwrap().extend(data);
        Poll::Ready(Ok(data.len()))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut outgoing = self.outgoing.lock().unwrap();
        data.iter().for_each(|slice| outgoing.extend(slice.iter()));
        Poll::Ready(Ok(data.iter().map(|slice| slice.len()).sum()))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

const BLOCK: usize = 64 * 1024;
const ROUNDS: usize = 16 * 1024;

fn in_memory(setup: &Setup, kind: Kind) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let pipe = Pipe::default();
        let (a, b) = (pipe.clone(), pipe.other_end());
        if kind == Kind::Plain {
            exchange(a, b).await
        } else if kind == Kind::Ours {
            let limits = HandshakeLimits::default();
            let (client, server) = tokio::join!(
                connect(a, &setup.certificates, &setup.id, ExpectedPeers::AnyOfMesh, limits),
                accept(b, &setup.certificates, &setup.id, limits)
            );
            exchange(client.unwrap(), server.unwrap()).await
        } else {
            let name = ServerName::try_from("bench.example").unwrap();
            let (client, server) = tokio::join!(setup.connector.connect(name, a), setup.acceptor.accept(b));
            exchange(client.unwrap(), server.unwrap()).await
        }
    })
}

async fn exchange(mut client: impl AsyncWrite + Unpin, mut server: impl AsyncRead + Unpin) -> f64 {
    let data = vec![0x5a; BLOCK];
    let mut got = vec![0; BLOCK];
    let begin = cpu_seconds();
    for _ in 0..ROUNDS {
        client.write_all(&data).await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut got).await.unwrap();
    }
    (cpu_seconds() - begin) / ((BLOCK * ROUNDS) as f64 / 1e9)
}

fn unbuffered(setup: &Setup) -> f64 {
    let name = ServerName::try_from("bench.example").unwrap();
    let mut client =
        rustls::client::UnbufferedClientConnection::new(setup.connector.config().clone(), name).unwrap();
    let mut server =
        rustls::server::UnbufferedServerConnection::new(setup.acceptor.config().clone()).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    macro_rules! step {
        ($side:expr, $incoming:expr, $outgoing:expr) => {{
            let status = $side.process_tls_records(&mut $incoming);
            let discard = status.discard;
            let done = match status.state.unwrap() {
                ConnectionState::EncodeTlsData(mut data) => {
                    let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) else { panic!() };
                    let start = $outgoing.len();
                    $outgoing.resize(start + size.required_size, 0);
                    data.encode(&mut $outgoing[start..]).unwrap();
                    false
                }
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    false
                }
                ConnectionState::WriteTraffic(_) => true,
                _ => true,
            };
            $incoming.drain(..discard);
            done
        }};
    }
    for _ in 0..20 {
        while !step!(client, to_client, to_server) {}
        while !step!(server, to_server, to_client) {}
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    let data = vec![0x5a; BLOCK];
    let mut got = vec![0; BLOCK];
    let mut wire = vec![0; 2 * BLOCK];
    let begin = cpu_seconds();
    for _ in 0..ROUNDS {
        let ConnectionState::WriteTraffic(mut traffic) = client.process_tls_records(&mut []).state.unwrap()
        else {
            panic!()
        };
        let mut sealed = 0;
        for part in data.chunks(16 * 1024) {
            sealed += traffic.encrypt(part, &mut wire[sealed..]).unwrap();
        }
        let (mut from, mut at) = (0, 0);
        while at < BLOCK {
            let status = server.process_tls_records(&mut wire[from..sealed]);
            let mut discard = status.discard;
            if let ConnectionState::ReadTraffic(mut traffic) = status.state.unwrap() {
                while let Some(record) = traffic.next_record() {
                    let record = record.unwrap();
                    got[at..at + record.payload.len()].copy_from_slice(record.payload);
                    at += record.payload.len();
                    discard += record.discard;
                }
            }
            from += discard;
        }
    }
    (cpu_seconds() - begin) / ((BLOCK * ROUNDS) as f64 / 1e9)
}
