//! What a handshake costs each side, and of what that is made:
//! `cargo run --profile dist -p identity --example handshake_cost [rounds]`.
//!
//! All on one thread, in memory, by the thread's processor time:
//! * the pieces of cryptography alone, and how often each side needs them: what a handshake must cost;
//! * `rustls` with the configurations of this crate, with and without the hybrid key exchange, with and without
//!   verifying chains and signatures;
//! * [`connect_corked`] and [`accept`], as ztunnel calls them: with what they use in the caches, and where other data was
//!   there since, as in a process that has rested.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::VecDeque;
use std::hint::black_box;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, KeyPair, UnparsedPublicKey,
};
use aws_lc_rs::{agreement, digest, hkdf, kem, rand, signature};
use identity::{
    CaDirectory, CertificateSettings, Certificates, Clock, HandshakeLimits, Issued, Issuer, LocalIssuer,
    LocalIssuerSettings, Validity, accept, connect_corked,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use nix::time::{ClockId, clock_gettime};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs as provider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConnection};
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use webpki::{EndEntityCert, KeyUsage};

fn main() {
    let rounds = std::env::args().nth(1).map_or(1000, |text| text.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let setup = runtime.block_on(Setup::new());
    println!("{rounds} rounds, microseconds of processor time");
    pieces(rounds);
    for (name, groups, verifies) in [
        ("rustls, hybrid, verified", true, true),
        ("rustls, hybrid, not verified", true, false),
        ("rustls, X25519, verified", false, true),
        ("rustls, X25519, not verified", false, false),
    ] {
        let (client, server) = with_rustls(&setup, rounds, groups, verifies);
        println!("{name}: client {client:.0}, server {server:.0}");
    }
    for _ in 0..3 {
        let (client, server) = runtime.block_on(ours(&setup, rounds, 0));
        println!("connect and accept: client {client:.0}, server {server:.0}");
        for megabytes in [1, 64] {
            let (client, server) = runtime.block_on(ours(&setup, rounds / 5, megabytes));
            println!("the same after {megabytes} MB of other data: client {client:.0}, server {server:.0}");
        }
    }
}

/// The processor time of this thread.
fn used() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

fn micros(used: Duration, rounds: u32) -> f64 {
    used.as_secs_f64() * 1e6 / f64::from(rounds)
}

fn each(name: &str, rounds: u32, times: (u32, u32), sum: &mut (f64, f64), mut act: impl FnMut()) {
    act();
    let begin = used();
    (0..rounds).for_each(|_| act());
    let cost = micros(used().saturating_sub(begin), rounds);
    let (client, server) = times;
    sum.0 += cost * f64::from(client);
    sum.1 += cost * f64::from(server);
    println!("{name}: {cost:.1}; client {client} times, server {server}");
}

/// The cryptography alone.
fn pieces(rounds: u32) {
    let random = SystemRandom::new();
    let sum = &mut (0.0, 0.0);
    let pkcs8 = signature::EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    let key = signature::EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref()).unwrap();
    let message = [7; 114];
    let signed = key.sign(&random, &message).unwrap();
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref().to_vec());
    each("sign (P-256)", rounds, (1, 1), sum, || _ = black_box(key.sign(&random, &message).unwrap()));
    each("verify (P-256): chain, handshake", rounds, (2, 2), sum, || {
        public.verify(&message, signed.as_ref()).unwrap();
    });
    let mine = agreement::PrivateKey::generate(&agreement::X25519).unwrap();
    each("X25519: make a key", rounds, (1, 1), sum, || {
        let made = agreement::PrivateKey::generate(&agreement::X25519).unwrap();
        black_box(made.compute_public_key().unwrap());
    });
    let theirs = mine.compute_public_key().unwrap();
    let theirs = agreement::UnparsedPublicKey::new(&agreement::X25519, theirs.as_ref().to_vec());
    each("X25519: agree", rounds, (1, 1), sum, || {
        let agreed = agreement::agree(&mine, &theirs, (), |secret| {
            black_box(secret.len());
            Ok(())
        });
        agreed.unwrap();
    });
    let decapsulation = kem::DecapsulationKey::generate(&kem::ML_KEM_768).unwrap();
    each("ML-KEM-768: make a key", rounds, (1, 0), sum, || {
        let made = kem::DecapsulationKey::generate(&kem::ML_KEM_768).unwrap();
        black_box(made.encapsulation_key().unwrap().key_bytes().unwrap().as_ref().len());
    });
    let share = decapsulation.encapsulation_key().unwrap().key_bytes().unwrap().as_ref().to_vec();
    let encapsulate = || kem::EncapsulationKey::new(&kem::ML_KEM_768, &share).unwrap().encapsulate().unwrap();
    each("ML-KEM-768: encapsulate", rounds, (0, 1), sum, || _ = black_box(encapsulate()));
    let (ciphertext, _) = encapsulate();
    each("ML-KEM-768: decapsulate", rounds, (1, 0), sum, || {
        black_box(decapsulation.decapsulate(ciphertext.as_ref().into()).unwrap());
    });
    each("random: 32 bytes", rounds, (3, 2), sum, || rand::fill(black_box(&mut [0; 32])).unwrap());
    let bytes = vec![7; 4096];
    each("SHA-384 of 4 KiB", rounds, (1, 1), sum, || _ = black_box(digest::digest(&digest::SHA384, &bytes)));
    let secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, &[7; 48]);
    each("HKDF-SHA384: expand", rounds, (18, 18), sum, || {
        secret.expand(&[&message[..40]], hkdf::HKDF_SHA384).unwrap().fill(black_box(&mut [0; 48])).unwrap();
    });
    println!("sum: client {:.0}, server {:.0}", sum.0, sum.1);
}

struct Setup {
    _dir: tempfile::TempDir,
    certificates: Certificates,
    id: SpiffeId,
    /// A certificate as ztunnel has them.
    issued: Issued,
    anchors: Vec<TrustAnchor<'static>>,
}

impl Setup {
    async fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
        let domain = TrustDomain::cluster_local();
        ca.make_if_missing(&domain, Validity::of_roots(), UnixTime::now()).unwrap();
        let (domains, clock) = (TrustDomains::only(domain), Clock::system());
        let issuer = LocalIssuer::start(ca, domains, LocalIssuerSettings::default(), clock.clone()).unwrap();
        let bundle = issuer.bundle().clone();
        let id: SpiffeId = "spiffe://cluster.local/ns/bench/sa/bench".parse().unwrap();
        let issued = issuer.issue(&id).await.unwrap();
        println!(
            "a chain of {} certificates, {} bytes",
            issued.chain.len(),
            issued.chain.iter().map(|der| der.len()).sum::<usize>()
        );
        let settings = CertificateSettings::default();
        let certificates = Certificates::new(Arc::new(issuer), bundle.clone(), settings, None, clock);
        certificates.get(&id).await.unwrap();
        let anchor = |root: &identity::Root| webpki::anchor_from_trusted_cert(&root.der).unwrap().to_owned();
        let anchors = bundle.snapshot().roots().iter().map(anchor).collect();
        Self { _dir: dir, certificates, id, issued, anchors }
    }
}

/// Verifies a chain and a signature, or nothing.
#[derive(Debug)]
struct Verifier(Option<Vec<TrustAnchor<'static>>>);

impl Verifier {
    fn judge(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime, usage: KeyUsage) {
        let Some(anchors) = &self.0 else { return };
        let algorithms = provider::default_provider().signature_verification_algorithms;
        let leaf = EndEntityCert::try_from(leaf).unwrap();
        leaf.verify_for_usage(algorithms.all, anchors, rest, now, usage, None, None).unwrap();
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.0.is_none() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = provider::default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, &algorithms)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(leaf, rest, now, KeyUsage::server_auth());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        panic!("TLS 1.2")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(leaf, rest, now, KeyUsage::client_auth());
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        panic!("TLS 1.2")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What `crates/identity/src/tls.rs` makes, once for all rounds.
fn configs(setup: &Setup, hybrid: bool, verifies: bool) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let group: &'static dyn SupportedKxGroup =
        if hybrid { provider::kx_group::X25519MLKEM768 } else { provider::kx_group::X25519 };
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![provider::cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![group],
        ..provider::default_provider()
    });
    let verifier = Arc::new(Verifier(verifies.then(|| setup.anchors.clone())));
    let Issued { chain, key } = &setup.issued;
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(chain.clone(), key.clone_key())
        .unwrap();
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.send_tls13_tickets = 0;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .unwrap();
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.enable_sni = false;
    client.resumption = Resumption::disabled();
    (Arc::new(client), Arc::new(server))
}

fn with_rustls(setup: &Setup, rounds: u32, hybrid: bool, verifies: bool) -> (f64, f64) {
    let (client_config, server_config) = configs(setup, hybrid, verifies);
    let (mut clients, mut servers) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..rounds {
        let begin = used();
        let name = ServerName::try_from("10.0.0.1").unwrap();
        let mut client = ClientConnection::new(client_config.clone(), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        let at_server = used();
        let mut server = ServerConnection::new(server_config.clone()).unwrap();
        server.read_tls(&mut &hello[..]).unwrap();
        server.process_new_packets().unwrap();
        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).unwrap();
        }
        let at_client = used();
        client.read_tls(&mut &flight[..]).unwrap();
        client.process_new_packets().unwrap();
        let mut last = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut last).unwrap();
        }
        let at_server_again = used();
        let mut rest = &last[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets().unwrap();
        }
        let end = used();
        assert!(!client.is_handshaking() && !server.is_handshaking());
        clients += (at_server - begin) + (at_server_again - at_client);
        servers += (at_client - at_server) + (end - at_server_again);
    }
    (micros(clients, rounds), micros(servers, rounds))
}

/// Two ends of a pipe that is never full.
#[derive(Clone, Default)]
struct Pipe {
    incoming: Arc<Mutex<VecDeque<u8>>>,
    outgoing: Arc<Mutex<VecDeque<u8>>>,
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut incoming = self.incoming.lock().unwrap();
        if incoming.is_empty() {
            // Whoever calls this polls both ends in turn.
            return Poll::Pending;
        }
        let bytes = incoming.make_contiguous();
        let count = bytes.len().min(out.remaining());
        out.put_slice(&bytes[..count]);
        incoming.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.outgoing.lock().unwrap().extend(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Polls once, and adds what it took; what came of it, if it is over.
fn poll<F: Future>(future: &mut Pin<Box<F>>, spent: &mut Duration) -> Option<F::Output> {
    let begin = used();
    let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    *spent += used().saturating_sub(begin);
    match polled {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Puts other data in the place of what the caches hold.
fn displace(other: &mut [u64]) {
    for line in other.iter_mut().step_by(8) {
        *line = black_box(line.wrapping_add(1));
    }
}

async fn ours(setup: &Setup, rounds: u32, megabytes: usize) -> (f64, f64) {
    let mut other = vec![0_u64; megabytes << 17];
    let (mut clients, mut servers) = (Duration::ZERO, Duration::ZERO);
    let limits = HandshakeLimits::default();
    for _ in 0..rounds {
        let near = Pipe::default();
        let far = Pipe { incoming: near.outgoing.clone(), outgoing: near.incoming.clone() };
        let (certificates, id) = (&setup.certificates, &setup.id);
        let mut client = Box::pin(connect_corked(near, certificates, id, id.clone().into(), limits));
        let mut server = Box::pin(accept(far, certificates, id, limits));
        displace(&mut other);
        assert!(poll(&mut client, &mut clients).is_none(), "it has sent its hello");
        displace(&mut other);
        assert!(poll(&mut server, &mut servers).is_none(), "it has answered");
        displace(&mut other);
        let mut client = poll(&mut client, &mut clients).expect("it has verified the server").unwrap();
        // What is left to send goes with the first bytes.
        let begin = used();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut client).poll_write(&mut cx, &[7; 100]).is_ready());
        assert!(Pin::new(&mut client).poll_flush(&mut cx).is_ready());
        clients += used().saturating_sub(begin);
        displace(&mut other);
        poll(&mut server, &mut servers).expect("it has verified the client").unwrap();
    }
    (micros(clients, rounds), micros(servers, rounds))
}
