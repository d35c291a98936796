//! Real handshakes: between two of ours, and with stock rustls peers that present what they should not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::time::Duration;

use identity::{
    ExpectedPeers, HandshakeError, HandshakeLimits, NotTls, PeerError, TlsStream, accept, connect,
};
use mesh::*;
use model::SpiffeId;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::{CipherSuite, NamedGroup};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

const PIPE: usize = 64 * 1024;

fn limits() -> HandshakeLimits {
    HandshakeLimits::default()
}

async fn pair(
    mesh: &Mesh,
    client: &SpiffeId,
    server: &SpiffeId,
    expected: ExpectedPeers,
) -> (Result<TlsStream<DuplexStream>, HandshakeError>, Result<TlsStream<DuplexStream>, HandshakeError>) {
    let (a, b) = duplex(PIPE);
    tokio::join!(
        connect(a, &mesh.certificates, client, expected, limits()),
        accept(b, &mesh.certificates, server, limits())
    )
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is() {
    let mesh = Mesh::start();
    let (client, server) = (id("shop/sa/cart"), id("shop/sa/db"));
    let (c, s) = pair(&mesh, &client, &server, server.clone().into()).await;
    let (mut c, mut s) = (c.unwrap(), s.unwrap());
    assert_eq!((&c.peer().id, &s.peer().id), (&server, &client));
    for peer in [c.peer(), s.peer()] {
        assert_eq!(peer.group, NamedGroup::X25519MLKEM768);
        assert_eq!(peer.suite, CipherSuite::TLS13_AES_256_GCM_SHA384);
        assert_eq!(peer.root, mesh.issuer.status().signer.unwrap().root);
        mesh.certificates.bundle().still_trusts(peer).unwrap();
    }
    c.write_all(b"ping").await.unwrap();
    c.flush().await.unwrap();
    let mut got = [0; 4];
    s.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"ping");
}

#[tokio::test]
async fn a_server_that_is_another_workload_is_refused_before_it_learns_who_asks() {
    let mesh = Mesh::start();
    let (a, b) = duplex(PIPE);
    let expected: ExpectedPeers = [id("shop/sa/db"), id("shop/sa/db2")].into_iter().collect();
    let leaf = sign(&leaf_params("spiffe://cluster.local/ns/evil/sa/db"), &mesh.stolen_ca().1);
    let server = stock_server(&leaf, &[b"h2"]);
    let cart = id("shop/sa/cart");
    let (client, server) =
        tokio::join!(connect(a, &mesh.certificates, &cart, expected, limits()), server.accept(b));
    let error = client.unwrap_err();
    assert!(
        matches!(&error, HandshakeError::Peer(PeerError::UnexpectedPeer { id, .. })
        if id.namespace().as_ref() == "evil"),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "the peer is spiffe://cluster.local/ns/evil/sa/db, expected one of \
         spiffe://cluster.local/ns/shop/sa/db, spiffe://cluster.local/ns/shop/sa/db2"
    );
    assert!(server.unwrap_err().to_string().contains("AccessDenied"));
}

/// What is wrong, how the certificate is spoiled, the reason that must come out, the alert that the peer must see.
type Case = (&'static str, fn(&mut CertificateParams), &'static str, &'static str);

const GOOD: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn bad_leaves() -> Vec<Case> {
    fn ago(s: u64) -> time::OffsetDateTime {
        time::OffsetDateTime::now_utc() - Duration::from_secs(s)
    }
    fn ahead(s: u64) -> time::OffsetDateTime {
        time::OffsetDateTime::now_utc() + Duration::from_secs(s)
    }
    fn uris(p: &mut CertificateParams, list: &[&str]) {
        p.subject_alt_names = list.iter().map(|u| SanType::URI((*u).try_into().unwrap())).collect();
    }
    vec![
        (
            "expired",
            |p| (p.not_before, p.not_after) = (ago(7200), ago(3600)),
            "expired",
            "CertificateExpired",
        ),
        (
            "early",
            |p| (p.not_before, p.not_after) = (ahead(3600), ahead(7200)),
            "not_yet_valid",
            "CertificateExpired",
        ),
        ("no SAN", |p| p.subject_alt_names.clear(), "no_spiffe_id", "CertificateUnknown"),
        (
            "only a DNS name",
            |p| p.subject_alt_names = vec![SanType::DnsName("cart.shop".try_into().unwrap())],
            "no_spiffe_id",
            "CertificateUnknown",
        ),
        ("two URIs", |p| uris(p, &[GOOD, "https://a.example/"]), "several_uris", "CertificateUnknown"),
        ("the same URI twice", |p| uris(p, &[GOOD, GOOD]), "several_uris", "CertificateUnknown"),
        (
            "no SPIFFE URI",
            |p| uris(p, &["https://cluster.local/ns/shop/sa/cart"]),
            "invalid_spiffe_id",
            "CertificateUnknown",
        ),
        (
            "another path",
            |p| uris(p, &["spiffe://cluster.local/workload/cart"]),
            "invalid_spiffe_id",
            "CertificateUnknown",
        ),
        (
            "a dot segment",
            |p| uris(p, &["spiffe://cluster.local/ns/../sa/cart"]),
            "invalid_spiffe_id",
            "CertificateUnknown",
        ),
        (
            "another trust domain",
            |p| uris(p, &["spiffe://other.example/ns/shop/sa/cart"]),
            "wrong_trust_domain",
            "AccessDenied",
        ),
        (
            "a code signer",
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            "wrong_use",
            "UnsupportedCertificate",
        ),
        (
            "a CA",
            |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
            "wrong_use",
            "UnsupportedCertificate",
        ),
    ]
}

#[tokio::test]
async fn a_client_with_an_unfit_certificate_is_refused_with_the_reason() {
    let mesh = Mesh::start();
    let (_, ca) = mesh.stolen_ca();
    for (what, spoil, reason, alert) in bad_leaves() {
        let mut params = leaf_params(GOOD);
        spoil(&mut params);
        refuses_client(&mesh, what, Some(&sign(&params, &ca)), reason, alert).await;
    }
    refuses_client(&mesh, "no certificate", None, "no_certificate", "CertificateRequired").await;

    let foreign = Issuer::new(ca_params("someone else"), KeyPair::generate().unwrap());
    let leaf = sign(&leaf_params(GOOD), &foreign);
    refuses_client(&mesh, "foreign CA", Some(&leaf), "foreign_ca", "UnknownCA").await;

    // A CA that only has the name of ours.
    let mut impostor = ca_params("");
    impostor.distinguished_name = own_name(&mesh);
    let impostor = Issuer::new(impostor, KeyPair::generate().unwrap());
    let leaf = sign(&leaf_params(GOOD), &impostor);
    refuses_client(&mesh, "a CA with our name", Some(&leaf), "foreign_ca", "UnknownCA").await;

    let mut leaf = sign(&leaf_params(GOOD), &ca);
    leaf.chain = std::iter::repeat_n(leaf.chain[0].clone(), 20).collect();
    refuses_client(&mesh, "a long chain", Some(&leaf), "bad_chain", "CertificateUnknown").await;
}

fn own_name(mesh: &Mesh) -> rcgen::DistinguishedName {
    let subject = mesh.issuer.status().signer.unwrap().subject;
    let mut name = rcgen::DistinguishedName::new();
    for part in subject.split(", ") {
        match part.split_once('=').unwrap() {
            ("O", value) => name.push(rcgen::DnType::OrganizationName, value),
            ("CN", value) => name.push(rcgen::DnType::CommonName, value),
            other => panic!("{other:?}"),
        }
    }
    name
}

async fn refuses_client(mesh: &Mesh, what: &str, leaf: Option<&Leaf>, reason: &str, alert: &str) {
    let (a, b) = duplex(PIPE);
    let server = id("shop/sa/db");
    let client = async {
        // In TLS 1.3 the client may be through before the server judges it: it learns by reading.
        let mut stream = match stock_client(leaf, &[b"h2"]).connect(any_name(), a).await {
            Ok(stream) => stream,
            Err(error) => return error.to_string(),
        };
        stream.read(&mut [0]).await.expect_err(what).to_string()
    };
    let (seen, served) = tokio::join!(client, accept(b, &mesh.certificates, &server, limits()));
    let error = served.expect_err(what);
    assert_eq!(error.reason(), reason, "{what}: {error}");
    assert!(seen.contains(alert), "{what}: the client saw {seen:?}");
}

#[tokio::test]
async fn a_server_with_an_unfit_certificate_is_refused_with_the_reason() {
    let mesh = Mesh::start();
    let (_, ca) = mesh.stolen_ca();
    let client = id("shop/sa/web");
    for (what, spoil, reason, alert) in bad_leaves() {
        let mut params = leaf_params(GOOD);
        spoil(&mut params);
        let server = stock_server(&sign(&params, &ca), &[b"h2"]);
        let (a, b) = duplex(PIPE);
        let (connected, seen) = tokio::join!(
            connect(a, &mesh.certificates, &client, ExpectedPeers::AnyOfMesh, limits()),
            server.accept(b)
        );
        let error = connected.expect_err(what);
        assert_eq!(error.reason(), reason, "{what}: {error}");
        let seen = seen.expect_err(what).to_string();
        assert!(seen.contains(alert), "{what}: the server saw {seen:?}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_agree_on_h2_is_refused() {
    let mesh = Mesh::start();
    let leaf = sign(&leaf_params(GOOD), &mesh.stolen_ca().1);
    let server = id("shop/sa/db");
    for alpn in [&[][..], &[&b"http/1.1"[..]], &[b"h3", b"h2c"]] {
        let (a, b) = duplex(PIPE);
        let client = async {
            match stock_client(Some(&leaf), alpn).connect(any_name(), a).await {
                Ok(mut stream) => stream.read(&mut [0]).await.unwrap_err().to_string(),
                Err(error) => error.to_string(),
            }
        };
        let (seen, served) = tokio::join!(client, accept(b, &mesh.certificates, &server, limits()));
        let error = served.unwrap_err();
        assert!(matches!(error, HandshakeError::NoAlpn), "{alpn:?}: {error}");
        assert!(seen.contains("NoApplicationProtocol"), "{alpn:?}: {seen}");
    }
}

#[tokio::test]
async fn a_server_that_does_not_agree_on_h2_is_refused() {
    let mesh = Mesh::start();
    let leaf = sign(&leaf_params(GOOD), &mesh.stolen_ca().1);
    for alpn in [&[][..], &[&b"http/1.1"[..]]] {
        let (a, b) = duplex(PIPE);
        let server = stock_server(&leaf, alpn);
        let web = id("shop/sa/web");
        let (connected, _) =
            tokio::join!(connect(a, &mesh.certificates, &web, ExpectedPeers::AnyOfMesh, limits()), async {
                if let Ok(mut stream) = server.accept(b).await {
                    let _ = stream.read(&mut [0]).await;
                }
            });
        let error = connected.unwrap_err();
        assert!(matches!(error, HandshakeError::NoAlpn), "{alpn:?}: {error}");
    }
}

#[tokio::test]
async fn what_is_not_tls_is_named() {
    let mesh = Mesh::start();
    let server = id("shop/sa/db");
    let cases: [(&[u8], NotTls); 5] = [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NotTls::Http2),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", NotTls::Http1),
        (b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n", NotTls::Http1),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00", NotTls::Unknown),
        (b"SSH-2.0-OpenSSH_9.2\r\n", NotTls::Unknown),
    ];
    for (bytes, expected) in cases {
        let (mut a, b) = duplex(PIPE);
        a.write_all(bytes).await.unwrap();
        let error = accept(b, &mesh.certificates, &server, limits()).await.unwrap_err();
        assert!(matches!(&error, HandshakeError::NotTls(what) if *what == expected), "{error}");
        let mut answer = Vec::new();
        a.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer.first(), Some(&21), "an alert for {bytes:?}");
    }
}

#[tokio::test]
async fn a_client_of_an_older_tls_is_refused() {
    let mesh = Mesh::start();
    // A ClientHello of TLS 1.2: version, random, no session, two suites, no compression, no extensions.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let (mut a, b) = duplex(PIPE);
    a.write_all(&record).await.unwrap();
    let error = accept(b, &mesh.certificates, &id("shop/sa/db"), limits()).await.unwrap_err();
    assert_eq!(error.reason(), "protocol", "{error}");
    let mut answer = Vec::new();
    a.read_to_end(&mut answer).await.unwrap();
    assert_eq!((answer[0], answer[5]), (21, 2), "a fatal alert");
}

#[tokio::test(start_paused = true)]
async fn a_silent_or_dribbling_peer_is_given_up_in_time() {
    let mesh = Mesh::start();
    let server = id("shop/sa/db");
    mesh.certificates.get(&server).await.unwrap();
    let (_silent, b) = duplex(PIPE);
    let begin = tokio::time::Instant::now();
    let error = accept(b, &mesh.certificates, &server, limits()).await.unwrap_err();
    assert!(matches!(error, HandshakeError::TimedOut(_)), "{error}");
    assert_eq!(begin.elapsed().as_secs(), 10);

    let (mut dribbling, b) = duplex(PIPE);
    let dribble = tokio::spawn(async move {
        for byte in [22, 3, 1, 2, 0].into_iter().chain(std::iter::repeat(1)) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if dribbling.write_all(&[byte]).await.is_err() {
                return;
            }
        }
    });
    let begin = tokio::time::Instant::now();
    let error = accept(b, &mesh.certificates, &server, limits()).await.unwrap_err();
    assert!(matches!(error, HandshakeError::TimedOut(_)), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(12));
    dribble.await.unwrap();
}

#[tokio::test]
async fn a_peer_that_goes_away_is_told_from_one_that_refuses() {
    let mesh = Mesh::start();
    let (a, b) = duplex(PIPE);
    drop(a);
    let error = accept(b, &mesh.certificates, &id("shop/sa/db"), limits()).await.unwrap_err();
    assert!(matches!(error, HandshakeError::Closed), "{error}");

    let (mut a, b) = duplex(PIPE);
    // A fatal alert, certificate_expired, in place of a ServerHello.
    a.write_all(&[21, 3, 3, 0, 2, 2, 45]).await.unwrap();
    let error = connect(b, &mesh.certificates, &id("shop/sa/db"), ExpectedPeers::AnyOfMesh, limits())
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "refused_by_peer", "{error}");
    assert!(error.to_string().contains("CertificateExpired"), "{error}");
}

#[tokio::test]
async fn the_client_hello_names_no_server_and_offers_only_h2() {
    let mesh = Mesh::start();
    let (a, mut b) = duplex(PIPE);
    let client = id("shop/sa/web");
    let connecting = connect(a, &mesh.certificates, &client, ExpectedPeers::AnyOfMesh, limits());
    let hello = async {
        let mut acceptor = rustls::server::Acceptor::default();
        let mut bytes = vec![0; PIPE];
        loop {
            let count = b.read(&mut bytes).await.unwrap();
            acceptor.read_tls(&mut &bytes[..count]).unwrap();
            if let Some(accepted) = acceptor.accept().unwrap() {
                let hello = accepted.client_hello();
                let alpn: Vec<_> = hello.alpn().unwrap().map(<[u8]>::to_vec).collect();
                let groups = hello.named_groups().unwrap().to_vec();
                drop(b);
                return (hello.server_name().map(str::to_owned), alpn, groups);
            }
        }
    };
    let (_, (name, alpn, groups)) = tokio::join!(connecting, hello);
    assert_eq!((name, alpn), (None, vec![b"h2".to_vec()]));
    assert_eq!(groups[0], NamedGroup::X25519MLKEM768);
}

#[tokio::test]
async fn no_ticket_is_given() {
    let mesh = Mesh::start();
    let leaf = sign(&leaf_params(GOOD), &mesh.stolen_ca().1);
    let (a, b) = duplex(PIPE);
    let server = id("shop/sa/db");
    let served = async {
        let mut stream = accept(b, &mesh.certificates, &server, limits()).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        stream.shutdown().await.unwrap();
        stream
    };
    let client = async {
        let mut stream = stock_client(Some(&leaf), &[b"h2"]).connect(any_name(), a).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
        stream.get_ref().1.tls13_tickets_received()
    };
    assert_eq!(tokio::join!(served, client).1, 0);
}

#[tokio::test]
async fn many_handshakes_at_once_for_one_identity_share_one_certificate() {
    let mesh = Mesh::start();
    let (client, server) = (id("shop/sa/web"), id("shop/sa/db"));
    let all = (0..40).map(|_| pair(&mesh, &client, &server, server.clone().into()));
    for (c, s) in futures_join(all).await {
        c.unwrap();
        s.unwrap();
    }
    assert_eq!(mesh.certificates.counts().issued_total, 2);
}

async fn futures_join<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut results = Vec::new();
    let mut running: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        running.retain_mut(|future| match future.as_mut().poll(cx) {
            std::task::Poll::Ready(result) => {
                results.push(result);
                false
            }
            std::task::Poll::Pending => true,
        });
        if running.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    results
}

/// What OpenSSL's client says of a connection of this version, and what comes of it here.
async fn of_openssl(mesh: &Mesh, version: &str) -> (String, Result<(), HandshakeError>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut client = tokio::process::Command::new("openssl");
    client.args(["s_client", "-connect", &address, version, "-alpn", "h2", "-brief"]);
    let client = client.stdin(std::process::Stdio::null()).output();
    let server = id("shop/sa/db");
    let accepted = async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, &mesh.certificates, &server, limits()).await.map(drop)
    };
    let (out, accepted) = tokio::join!(client, accepted);
    (String::from_utf8_lossy(&out.unwrap().stderr).into_owned(), accepted)
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let mesh = Mesh::start();
    let (said, accepted) = of_openssl(&mesh, "-tls1_2").await;
    assert!(said.contains("alert protocol version"), "{said}");
    assert!(matches!(accepted, Err(HandshakeError::Tls(_))), "{accepted:?}");
    // By 1.3 it comes as far as to be asked who it is.
    let (said, accepted) = of_openssl(&mesh, "-tls1_3").await;
    assert!(!said.contains("alert protocol version"), "{said}");
    assert!(accepted.is_err(), "it has no certificate");
}
