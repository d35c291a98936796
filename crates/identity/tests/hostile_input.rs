//! Whatever comes in: no panic, an end in time, a reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::sync::LazyLock;
use std::time::Duration;

use identity::{
    CaDirectory, CertificateAuthority, ExpectedPeers, HandshakeLimits, TrustBundle, Validity, accept, connect,
};
use mesh::*;
use proptest::prelude::*;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::Runtime;

struct Ready {
    runtime: Runtime,
    mesh: Mesh,
    ca: rcgen::Issuer<'static, rcgen::KeyPair>,
    hello: Vec<u8>,
}

static READY: LazyLock<Ready> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mesh, hello) = runtime.block_on(async {
        let mesh = Mesh::start();
        let (a, mut b) = duplex(64 * 1024);
        let web = id("shop/sa/web");
        let connecting = connect(a, &mesh.certificates, &web, ExpectedPeers::AnyOfMesh, limits());
        let first = async {
            let mut hello = vec![0; 16 * 1024];
            let count = b.read(&mut hello).await.unwrap();
            hello.truncate(count);
            drop(b);
            hello
        };
        let (_, hello) = tokio::join!(connecting, first);
        (mesh, hello)
    });
    let ca = mesh.stolen_ca().1;
    // A static is never dropped; what was loaded stays in force without its files.
    std::fs::remove_dir_all(mesh.dir.path()).unwrap();
    Ready { runtime, mesh, ca, hello }
});

fn limits() -> HandshakeLimits {
    HandshakeLimits { time: Duration::from_millis(300) }
}

/// What both sides make of `bytes`, after which the peer hangs up.
fn feed(bytes: &[u8]) {
    let Ready { runtime, mesh, .. } = &*READY;
    runtime.block_on(async {
        let (web, size) = (id("shop/sa/web"), bytes.len() + 1);
        let (mut a, b) = duplex(size.max(64 * 1024));
        a.write_all(bytes).await.unwrap();
        a.shutdown().await.unwrap();
        let (_drain, mut answers) = tokio::join!(accept(b, &mesh.certificates, &web, limits()), async { a });
        let mut sink = Vec::new();
        let _ = tokio::time::timeout(Duration::from_millis(50), answers.read_to_end(&mut sink)).await;

        let (mut a, b) = duplex(size.max(64 * 1024));
        a.write_all(bytes).await.unwrap();
        a.shutdown().await.unwrap();
        let connected = connect(b, &mesh.certificates, &web, ExpectedPeers::AnyOfMesh, limits()).await;
        connected.expect_err("nobody has the server's key");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_end_a_handshake(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        feed(&bytes);
    }

    #[test]
    fn bytes_that_look_like_records_end_a_handshake(
        records in proptest::collection::vec(
            (prop_oneof![20_u8..=24, any::<u8>()], proptest::collection::vec(any::<u8>(), 0..600), any::<bool>()),
            1..8,
        ),
    ) {
        let mut bytes = Vec::new();
        for (kind, body, lies) in records {
            let length = u16::try_from(body.len()).unwrap() + u16::from(lies);
            bytes.extend([kind, 3, 3]);
            bytes.extend(length.to_be_bytes());
            bytes.extend(body);
        }
        feed(&bytes);
    }

    #[test]
    fn a_client_hello_that_was_changed_ends_a_handshake(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<proptest::sample::Index>(),
        append in proptest::collection::vec(any::<u8>(), 0..100),
        whole in any::<bool>(),
    ) {
        let mut hello = READY.hello.clone();
        for (at, byte) in changes {
            let at = at.index(hello.len());
            hello[at] = byte;
        }
        if !whole {
            hello.truncate(cut.index(hello.len()) + 1);
        }
        hello.extend(append);
        feed(&hello);
    }

    #[test]
    fn certificates_and_keys_that_were_changed_are_refused_or_good(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        which in 0_usize..4,
    ) {
        let now = UnixTime::now();
        let made = CertificateAuthority::make_root(&domain(), Validity::of_roots(), now).unwrap();
        let bundle = TrustBundle::new(&made.chain, domains()).unwrap();
        let authority = CertificateAuthority::new(&made.chain, &made.key, &bundle, now).unwrap();
        let spoil = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for (at, byte) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes
        };
        match which {
            0 => {
                let chain = [CertificateDer::from(spoil(&made.chain[0]))];
                let _ = TrustBundle::new(&chain, domains());
                let _ = CertificateAuthority::new(&chain, &made.key, &bundle, now);
            }
            1 => {
                if let Ok(key) = spoil(made.key.secret_der()).try_into() {
                    let _ = CertificateAuthority::new(&made.chain, &key, &bundle, now);
                }
            }
            2 => {
                let request = leaf_params("spiffe://cluster.local/ns/a/sa/a")
                    .serialize_request(&rcgen::KeyPair::generate().unwrap())
                    .unwrap();
                let spoiled = spoil(request.der());
                let _ = authority.sign_request(&spoiled, &id("a/sa/a"), Validity::of_workloads(), now);
            }
            _ => {
                let dir = memory_dir();
                let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
                ca.make_if_missing(&domain(), Validity::of_roots(), now).unwrap();
                for file in ["ca.pem", "roots.pem"] {
                    let good = std::fs::read(ca.path().join(file)).unwrap();
                    std::fs::write(ca.path().join(file), spoil(&good)).unwrap();
                    let _ = ca.load(&domains(), now);
                    std::fs::write(ca.path().join(file), good).unwrap();
                }
                ca.load(&domains(), now).unwrap();
            }
        }
    }
}

/// A server that holds a proper key and presents a leaf that was changed after it was signed, or signed with any
/// bytes as its name: the verifier sees all of it.
#[test]
fn leaves_with_any_bytes_in_them_are_judged_without_a_panic() {
    let Ready { runtime, mesh, ca, .. } = &*READY;
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 150, ..ProptestConfig::default() });
    let strategy = (
        "[ -~]{0,80}",
        "(spiffe|https)?(://)?[a-z./:%@?#-]{0,60}",
        proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        0_usize..4,
    );
    let outcome = runner.run(&strategy, |(text, uri, changes, copies)| {
        let mut params = leaf_params("spiffe://cluster.local/ns/a/sa/a");
        params.subject_alt_names.clear();
        for name in [text.as_str(), uri.as_str()].iter().cycle().take(copies) {
            params.subject_alt_names.push(rcgen::SanType::URI((*name).try_into().unwrap()));
        }
        let mut leaf = sign(&params, ca);
        let mut der = leaf.chain[0].to_vec();
        for (at, byte) in changes {
            let at = at.index(der.len());
            der[at] = byte;
        }
        leaf.chain = vec![der.into()];
        runtime.block_on(async {
            // A stock server checks its own certificate; what it can't load can't be presented.
            let builder = rustls::ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_no_client_auth();
            let Ok(mut config) = builder.with_single_cert(leaf.chain.clone(), leaf.key.clone_key()) else {
                return;
            };
            config.alpn_protocols = vec![b"h2".to_vec()];
            let server = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
            let (a, b) = duplex(64 * 1024);
            let web = id("shop/sa/web");
            let connecting = connect(a, &mesh.certificates, &web, ExpectedPeers::AnyOfMesh, limits());
            let (connected, _) = tokio::join!(connecting, server.accept(b));
            if let Ok(stream) = connected {
                assert_eq!(stream.peer().id.trust_domain(), &domain());
            }
        });
        Ok(())
    });
    outcome.unwrap();
}
