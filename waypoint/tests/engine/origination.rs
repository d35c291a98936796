//! TLS that is begun by the waypoint, as DestinationRules say, with servers that show certificates of a real authority.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use model::http::{TlsOrigination, TrafficPolicy};
use model::{Change, Settings, Str, TlsVersion};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use rustls::ServerConfig;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::clusters::{World, round_robin};
use crate::lab::{Proxy, get};
use crate::peers::Nginx;

/// Whose certificates clients trust, and certificates of it, as files.
struct Authority {
    directory: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.crt"), issuer.pem()).unwrap();
        Self { directory, issuer }
    }

    fn path(&self, name: &str) -> Option<Str> {
        Some(self.directory.path().join(name).to_str().unwrap().into())
    }

    fn issue(&self, names: Vec<SanType>) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A server with a certificate of these names, which says what it was asked for, by whom.
    async fn server(&self, names: Vec<SanType>, mutual: bool) -> SocketAddr {
        let (certificate, key) = self.issue(names);
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let builder = match mutual {
            true => builder.unwrap().with_client_cert_verifier(verifier.build().unwrap()),
            false => builder.unwrap().with_no_client_auth(),
        };
        serving(builder.with_single_cert(vec![certificate.der().clone()], key).unwrap()).await
    }
}

/// A server that says what it was asked for, and whether by somebody with a certificate.
async fn serving(mut config: ServerConfig) -> SocketAddr {
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let facts = stream.get_ref().1;
            let sni = facts.server_name().unwrap_or("-").to_owned();
            let alpn = String::from_utf8_lossy(facts.alpn_protocol().unwrap_or(b"-")).into_owned();
            let body = format!("{sni} {alpn} {}", facts.peer_certificates().is_some());
            let mut request = [0; 1024];
            if stream.read(&mut request).await.is_ok() {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = stream.write_all((head + &body).as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        }
    });
    address
}

/// A certificate that has signed itself, one of a CA as `openssl req -x509` makes them; and a server that shows it.
async fn self_signed(name: &str, change: impl FnOnce(&mut CertificateParams)) -> (String, SocketAddr) {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let chain = vec![certificate.der().clone()];
    let config = builder.unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap();
    (certificate.pem(), serving(config).await)
}

#[tokio::test]
async fn a_servers_own_certificate_may_be_written_and_why_another_is_refused_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let written = directory.path().join("server.crt");
    let (pem, address) = self_signed("cart.test", |_| {}).await;
    let (other, _) = self_signed("cart.test", |_| {}).await;
    let (misnamed, elsewhere) = self_signed("other.test", |_| {}).await;
    let (expired, past) = self_signed("cart.test", |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2020, 2, 1));
    })
    .await;
    let (unready, future) = self_signed("cart.test", |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2090, 1, 1), date_time_ymd(2090, 2, 1));
    })
    .await;
    let (of_clients, misused) = self_signed("cart.test", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    })
    .await;
    for (pem, address, refusal) in [
        (&pem, address, None),
        (&(other.clone() + &pem), address, None),
        (&other, address, Some("invalid peer certificate")),
        (&misnamed, elsewhere, Some("other.test")),
        (&expired, past, Some("Expired")),
        (&unready, future, Some("NotValidYet")),
        (&of_clients, misused, Some("InvalidPurpose")),
    ] {
        std::fs::write(&written, pem).unwrap();
        let files = Some((None, None, Some(Str::from(written.to_str().unwrap()))));
        let tls = TlsOrigination { files, ..TlsOrigination::default() };
        let world = World::new(&[address], TrafficPolicy { tls: Some(Box::new(tls)), ..round_robin() });
        let proxy = world.proxy().await;
        let status = proxy.connect().await.ask(get("/")).await.status();
        assert_eq!(status, if refusal.is_some() { 503 } else { 200 }, "{refusal:?}");
        let records = proxy.wait_records(1).await;
        let said = records[0].unconnected.as_deref();
        assert_eq!(said.is_some(), refusal.is_some(), "{said:?}");
        assert!(said.unwrap_or_default().contains(refusal.unwrap_or_default()), "{said:?}, not {refusal:?}");
    }
}

#[tokio::test]
async fn tls_is_begun_and_the_servers_name_is_what_it_should_be() {
    let authority = Authority::new();
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let uri = SanType::URI("spiffe://outside/server".try_into().unwrap());
    let address = authority.server(vec![dns("cart.test"), dns("other.test"), uri], false).await;
    let files = Some((None, None, authority.path("ca.crt")));
    let plain = TlsOrigination { files, ..TlsOrigination::default() };
    let names = |list: &[&str]| list.iter().map(|name| Str::from(*name)).collect::<Box<[Str]>>();
    let cases = [
        (plain.clone(), Some("cart.test http/1.1 false")),
        (
            TlsOrigination { sni: Some("other.test".into()), ..plain.clone() },
            Some("other.test http/1.1 false"),
        ),
        (TlsOrigination { sni: Some("wrong.test".into()), ..plain.clone() }, None),
        (
            TlsOrigination { subject_alt_names: names(&["x.test", "other.test"]), ..plain.clone() },
            Some("cart.test http/1.1 false"),
        ),
        (
            TlsOrigination { subject_alt_names: names(&["spiffe://outside/server"]), ..plain.clone() },
            Some("cart.test http/1.1 false"),
        ),
        (
            TlsOrigination {
                subject_alt_names: names(&["spiffe://outside/serve", "x.test"]),
                ..plain.clone()
            },
            None,
        ),
        // Nobody of the system's roots has signed it.
        (TlsOrigination::default(), None),
        (
            TlsOrigination { insecure_skip_verify: true, ..TlsOrigination::default() },
            Some("cart.test http/1.1 false"),
        ),
        (TlsOrigination { credential: Some("../ca".into()), ..TlsOrigination::default() }, None),
        (
            TlsOrigination { credential: Some("kubernetes://nothing".into()), ..TlsOrigination::default() },
            None,
        ),
    ];
    for (tls, expected) in cases {
        let policy = TrafficPolicy { tls: Some(Box::new(tls.clone())), ..round_robin() };
        let world = World::new(&[address], policy);
        let message = world.proxy().await.connect().await.ask(get("/")).await;
        let status = if expected.is_some() { 200 } else { 503 };
        assert_eq!(message.status(), status, "{tls:?}");
        if let Some(expected) = expected {
            assert_eq!(String::from_utf8(message.body).unwrap(), expected, "{tls:?}");
        }
    }
}

#[tokio::test]
async fn a_certificate_of_our_own_is_shown_and_read_again_when_it_changes() {
    let authority = Authority::new();
    let address = authority.server(vec![SanType::DnsName("cart.test".try_into().unwrap())], true).await;
    let files = (authority.path("tls.crt"), authority.path("tls.key"), authority.path("ca.crt"));
    let tls = TlsOrigination { files: Some(files), ..TlsOrigination::default() };
    let world = World::new(&[address], TrafficPolicy { tls: Some(Box::new(tls)), ..round_robin() });
    let proxy = world.proxy().await;
    // Not there yet: refused, not without.
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
    let (certificate, key) = authority.issue(vec![]);
    std::fs::write(authority.directory.path().join("tls.crt"), certificate.pem()).unwrap();
    std::fs::write(authority.directory.path().join("tls.key"), key.serialize_pem()).unwrap();
    let message = proxy.connect().await.ask(get("/")).await;
    assert_eq!(String::from_utf8(message.body).unwrap(), "cart.test http/1.1 true");
}

#[tokio::test]
async fn a_server_without_tls_1_3_is_reached_by_1_2_unless_the_mesh_asks_for_more() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue(vec![SanType::DnsName("cart.test".try_into().unwrap())]);
    std::fs::write(authority.directory.path().join("server.crt"), certificate.pem()).unwrap();
    std::fs::write(authority.directory.path().join("server.key"), key.serialize_pem()).unwrap();
    let path = authority.directory.path().display();
    let nginx = |versions: &str| {
        format!(
            "ssl_certificate {path}/server.crt; ssl_certificate_key {path}/server.key; ssl_protocols {versions};
             location / {{ return 200 $ssl_protocol; }}"
        )
    };
    let files = Some((None, None, authority.path("ca.crt")));
    let tls = TlsOrigination { files, ..TlsOrigination::default() };
    let minimum = |tls_minimum| Change::SetSettings(Settings { tls_minimum, ..Settings::default() }.into());
    for (versions, by_default, with_1_3) in [
        ("TLSv1.2", Some("TLSv1.2"), None),
        ("TLSv1.2 TLSv1.3", Some("TLSv1.3"), Some("TLSv1.3")),
        ("TLSv1.1", None, None),
    ] {
        let nginx = Nginx::start_tls(&nginx(versions)).await;
        let policy = TrafficPolicy { tls: Some(Box::new(tls.clone())), ..round_robin() };
        let mut world = World::new(&[nginx.address], policy);
        let settings = [TlsVersion::V1_2, TlsVersion::V1_3, TlsVersion::V1_2];
        for (settings, expected) in settings.into_iter().zip([by_default, with_1_3, by_default]) {
            world.apply(minimum(settings));
            // Of its own: what is open stays.
            let message = world.proxy().await.connect().await.ask(get("/")).await;
            let said = (message.status() == 200).then(|| String::from_utf8(message.body).unwrap());
            assert_eq!(said.as_deref(), expected, "{versions} {settings:?}");
        }
    }
}

async fn ask(proxy: Proxy) -> u16 {
    proxy.connect().await.ask(get("/")).await.status()
}

#[tokio::test]
async fn only_regular_files_of_a_sane_size_are_read() {
    let authority = Authority::new();
    let address = authority.server(vec![SanType::DnsName("cart.test".try_into().unwrap())], false).await;
    let [good, pipe, long, roots] =
        ["ca.crt", "pipe", "long", "roots"].map(|name| authority.directory.path().join(name));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::write(&long, "#\n".repeat(1 << 19) + &authority.issuer.pem()).unwrap();
    let world = |name: &str| {
        let files = Some((None, None, authority.path(name)));
        let tls = TlsOrigination { files, ..TlsOrigination::default() };
        World::new(&[address], TrafficPolicy { tls: Some(Box::new(tls)), ..round_robin() })
    };
    for bad in ["pipe", "long"] {
        let world = world(bad);
        let all = [world.proxy().await, world.proxy().await, world.proxy().await];
        for asked in all.map(|proxy| tokio::spawn(ask(proxy))) {
            assert_eq!(asked.await.unwrap(), 503, "{bad}");
        }
    }
    std::fs::copy(&good, &roots).unwrap();
    let world = world("roots");
    assert_eq!(ask(world.proxy().await).await, 200);
    // By when files are looked at again, it is another: the last that was read is in force.
    std::fs::rename(&pipe, &roots).unwrap();
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(11)).await;
    tokio::time::resume();
    assert_eq!(ask(world.proxy().await).await, 200);
}

#[test]
fn others_go_on_while_one_waits_for_files() {
    // What reads files has one thread.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).build().unwrap().block_on(async {
        let authority = Authority::new();
        let address = authority.server(vec![SanType::DnsName("cart.test".try_into().unwrap())], false).await;
        let files = Some((None, None, authority.path("ca.crt")));
        let tls = TlsOrigination { files, ..TlsOrigination::default() };
        let world = World::new(&[address], TrafficPolicy { tls: Some(Box::new(tls)), ..round_robin() });
        assert_eq!(ask(world.proxy().await).await, 200);
        // A disk that does not answer.
        let (answers, waits) = std::sync::mpsc::channel::<()>();
        let disk = tokio::task::spawn_blocking(move || waits.recv());
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(11)).await;
        tokio::time::resume();
        let first = tokio::spawn(ask(world.proxy().await));
        tokio::time::sleep(Duration::from_millis(100)).await;
        for _ in 0..3 {
            assert_eq!(ask(world.proxy().await).await, 200);
        }
        assert!(!first.is_finished(), "it looks at the files");
        drop(answers);
        assert_eq!(first.await.unwrap(), 200);
        assert!(disk.await.unwrap().is_err());
    });
}
