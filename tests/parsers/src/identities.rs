//! SPIFFE IDs, certificates, keys and TLS.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use identity::{
    CaDirectory, CertificateAuthority, CertificateSettings, Certificates, Clock, ExpectedPeers,
    HandshakeLimits, LocalIssuer, LocalIssuerSettings, MadeCa, TrustBundle, Validity, accept, connect,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::Runtime;

use crate::{seeds_of, text};

fn domains() -> TrustDomains {
    TrustDomains::only(TrustDomain::cluster_local())
}

fn id(text: &str) -> SpiffeId {
    text.parse().expect("it is one")
}

/// Any text is an identity, or a trust domain, that reads back as it is written, or neither.
pub(crate) fn spiffe_id(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    if let Ok(domain) = text.parse::<TrustDomain>() {
        assert_eq!(domain.to_string().parse(), Ok(domain));
    }
}

pub(crate) fn spiffe_ids() -> Vec<Vec<u8>> {
    seeds_of(&[
        "spiffe://cluster.local/ns/shop/sa/cart",
        "spiffe://td-1.example/ns/a/sa/b-c",
        "cluster.local",
    ])
}

/// A directory in memory that goes away with the value.
fn directory() -> TempDir {
    tempfile::Builder::new().prefix("culvert-parsers-").tempdir_in("/dev/shm").expect("a directory in memory")
}

struct Ready {
    runtime: Runtime,
    root: MadeCa,
    bundle: Arc<TrustBundle>,
    authority: CertificateAuthority,
    certificates: Certificates,
    /// A client's first record and a server's answer to it.
    flights: [Vec<u8>; 2],
}

static READY: LazyLock<Ready> = LazyLock::new(|| {
    let now = UnixTime::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let root = CertificateAuthority::make_root(&TrustDomain::cluster_local(), Validity::of_roots(), now);
    let root = root.expect("a root");
    let bundle = Arc::new(TrustBundle::new(&root.chain, domains()).expect("a bundle"));
    let authority = CertificateAuthority::new(&root.chain, &root.key, &bundle, now).expect("an authority");
    let (certificates, flights) = runtime.block_on(async {
        let dir = directory();
        let ca = CaDirectory::open_or_make(&dir.path().join("ca")).expect("a CA");
        ca.make_if_missing(&TrustDomain::cluster_local(), Validity::of_roots(), now).expect("a root");
        let settings = LocalIssuerSettings::default();
        let issuer = LocalIssuer::start(ca, domains(), settings, Clock::system()).expect("an issuer");
        let bundle = issuer.bundle().clone();
        let certificates = Certificates::new(
            Arc::new(issuer),
            bundle,
            CertificateSettings::default(),
            None,
            Clock::system(),
        );
        let flights = flights(&certificates).await;
        (certificates, flights)
    });
    Ready { runtime, root, bundle, authority, certificates, flights }
});

fn limits() -> HandshakeLimits {
    HandshakeLimits { time: Duration::from_millis(300) }
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

async fn flights(certificates: &Certificates) -> [Vec<u8>; 2] {
    let web = id(WEB);
    let (client, mut wire) = duplex(64 << 10);
    let connecting = connect(client, certificates, &web, ExpectedPeers::AnyOfMesh, limits());
    let first = async {
        let mut hello = vec![0; 16 << 10];
        let count = wire.read(&mut hello).await.expect("a hello");
        hello.truncate(count);
        drop(wire);
        hello
    };
    let (_, hello) = tokio::join!(connecting, first);
    let (server, mut wire) = duplex(64 << 10);
    let answer = async {
        wire.write_all(&hello).await.expect("room for a hello");
        let mut flight = vec![0; 16 << 10];
        let count = wire.read(&mut flight).await.expect("an answer");
        flight.truncate(count);
        drop(wire);
        flight
    };
    let (_, flight) = tokio::join!(accept(server, certificates, &web, limits()), answer);
    [hello, flight]
}

/// Any bytes from a client are an error for the server: nobody here has a client's key.
pub(crate) fn tls_server(bytes: &[u8]) {
    let Ready { runtime, certificates, .. } = &*READY;
    runtime.block_on(async {
        let (mut peer, side) = duplex(bytes.len().max(64 << 10));
        let _ = peer.write_all(bytes).await;
        let _ = peer.shutdown().await;
        assert!(accept(side, certificates, &id(WEB), limits()).await.is_err(), "nobody has a client's key");
    });
}

pub(crate) fn client_hellos() -> Vec<Vec<u8>> {
    vec![READY.flights[0].clone()]
}

/// Any bytes from a server are an error for the client.
pub(crate) fn tls_client(bytes: &[u8]) {
    let Ready { runtime, certificates, .. } = &*READY;
    runtime.block_on(async {
        let (mut peer, side) = duplex(bytes.len().max(64 << 10));
        let _ = peer.write_all(bytes).await;
        let _ = peer.shutdown().await;
        let connected = connect(side, certificates, &id(WEB), ExpectedPeers::AnyOfMesh, limits()).await;
        assert!(connected.is_err(), "nobody has the server's key");
    });
}

pub(crate) fn server_flights() -> Vec<Vec<u8>> {
    vec![READY.flights[1].clone()]
}

/// Any bytes are certificates and keys of an authority, or refused with a reason; what is taken can be loaded.
pub(crate) fn ca_pem(bytes: &[u8]) {
    let dir = directory();
    let now = UnixTime::now();
    let ca = CaDirectory::open_or_make(&dir.path().join("ca")).expect("a directory");
    let domain = TrustDomain::cluster_local();
    if ca.install_given(bytes, bytes, bytes, &domain, now).is_ok() {
        ca.load(&domains(), now).expect("what was taken is good");
    }
}

pub(crate) fn ca_pems() -> Vec<Vec<u8>> {
    let dir = directory();
    let ca = CaDirectory::open_or_make(&dir.path().join("ca")).expect("a directory");
    ca.make_if_missing(&TrustDomain::cluster_local(), Validity::of_roots(), UnixTime::now()).expect("a root");
    let file = std::fs::read_dir(ca.path()).expect("files").filter_map(Result::ok);
    let pem = file.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "pem"));
    pem.map(|path| std::fs::read(path).expect("it can be read")).collect()
}

/// Any bytes are a root, a signing certificate or a key, or refused.
pub(crate) fn certificate(bytes: &[u8]) {
    let Ready { root, bundle, .. } = &*READY;
    let chain = [CertificateDer::from(bytes.to_vec())];
    if let Ok(taken) = TrustBundle::new(&chain, domains()) {
        assert_eq!(taken.snapshot().roots().len(), 1);
    }
    let _ = CertificateAuthority::new(&chain, &root.key, bundle, UnixTime::now());
    let key = PrivatePkcs8KeyDer::from(bytes.to_vec()).into();
    let _ = CertificateAuthority::new(&root.chain, &key, bundle, UnixTime::now());
}

pub(crate) fn certificates() -> Vec<Vec<u8>> {
    let root = &READY.root;
    vec![root.chain[0].to_vec(), root.key.secret_der().to_vec()]
}

/// Any bytes are a signing request, of which only the key counts, or refused.
pub(crate) fn signing_request(bytes: &[u8]) {
    let Ready { authority, .. } = &*READY;
    if let Ok(chain) = authority.sign_request(bytes, &id(WEB), Validity::of_workloads(), UnixTime::now()) {
        let leaf = chain.first().expect("a certificate");
        assert!(leaf.windows(WEB.len()).any(|part| part == WEB.as_bytes()), "it is not of the workload");
    }
}

/// A request for an ECDSA key (P-256), made once; a request holds nothing secret and does not expire.
pub(crate) fn signing_requests() -> Vec<Vec<u8>> {
    vec![include_bytes!("request.der").to_vec()]
}
