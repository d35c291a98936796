//! Fetching issuers' keys: from nginx over TLS, and from servers that are slow, huge or elsewhere.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use model::TlsVersion;
use rustls::RootCertStore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use waypoint::providers::fetch::{Fetch, FetchError, Network};

use crate::lab::free;

const SOON: Duration = Duration::from_secs(30);

struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn keys_are_fetched_over_tls_from_whom_the_system_trusts() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(at("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(at("keys.json"), r#"{"keys":[]}"#).unwrap();
    let (secure, old, plain) = (free(), free(), free());
    let config = format!(
        "daemon off; master_process off; pid {}; error_log {} crit; events {{}}
         http {{ access_log off; client_body_temp_path {t}; proxy_temp_path {t}; fastcgi_temp_path {t};
           uwsgi_temp_path {t}; scgi_temp_path {t};
           server {{ listen {secure} ssl; ssl_protocols TLSv1.2 TLSv1.3; ssl_certificate {}; ssl_certificate_key {};
             root {}; location /moved {{ return 302 https://localhost/elsewhere; }} }}
           server {{ listen {old} ssl; ssl_protocols TLSv1.2; ssl_certificate {}; ssl_certificate_key {}; root {}; }}
           server {{ listen {plain}; root {}; }} }}",
        at("pid"),
        at("log"),
        at("cert.pem"),
        at("key.pem"),
        folder.path().display(),
        at("cert.pem"),
        at("key.pem"),
        folder.path().display(),
        folder.path().display(),
        t = at("tmp"),
    );
    std::fs::write(at("nginx.conf"), config).unwrap();
    let nginx = Command::new("nginx")
        .args(["-c", &at("nginx.conf"), "-p", &folder.path().display().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(nginx) = nginx else {
        assert!(std::env::var_os("CI_REQUIRE_INTEROP").is_none(), "there is no nginx");
        eprintln!("skipped: there is no nginx");
        return;
    };
    let _nginx = Nginx(nginx);
    for address in [secure, old, plain] {
        until_it_listens(address).await;
    }
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let network = Network::trusting(roots, None).unwrap();
    let url = |path: &str| format!("https://localhost:{}{path}", secure.port());
    assert_eq!(&*network.fetch(&url("/keys.json"), SOON).await.unwrap(), br#"{"keys":[]}"#);
    assert_eq!(&*network.fetch(&format!("http://{plain}/keys.json"), SOON).await.unwrap(), br#"{"keys":[]}"#);
    let status = |result| match result {
        Err(FetchError::Status(status)) => status.as_u16(),
        other => panic!("{other:?}"),
    };
    assert_eq!(status(network.fetch(&url("/none"), SOON).await), 404);
    assert_eq!(status(network.fetch(&url("/moved"), SOON).await), 302, "it is not followed");
    // An issuer that speaks no TLS 1.3: by 1.2, unless the mesh asks for more.
    let of_old = format!("https://localhost:{}/keys.json", old.port());
    assert_eq!(&*network.fetch(&of_old, SOON).await.unwrap(), br#"{"keys":[]}"#);
    network.require(TlsVersion::V1_3);
    assert!(matches!(network.fetch(&of_old, SOON).await, Err(FetchError::Connect(..))));
    assert_eq!(&*network.fetch(&url("/keys.json"), SOON).await.unwrap(), br#"{"keys":[]}"#);
    // Another name, and another authority.
    let other = format!("https://127.0.0.1:{}/keys.json", secure.port());
    assert!(matches!(network.fetch(&other, SOON).await, Err(FetchError::Connect(..))));
    let nobody = Network::trusting(RootCertStore::empty(), None).unwrap();
    assert!(matches!(nobody.fetch(&url("/keys.json"), SOON).await, Err(FetchError::Connect(..))));
}

async fn until_it_listens(address: SocketAddr) {
    let begin = tokio::time::Instant::now();
    while TcpStream::connect(address).await.is_err() {
        assert!(begin.elapsed() < SOON, "nginx does not listen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server that sends this, and then keeps the connection open.
async fn sends(text: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let text = text.clone();
            tokio::spawn(async move {
                let _ = stream.write_all(&text).await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn what_is_slow_huge_or_no_http_is_given_up() {
    let network = Network::trusting(RootCertStore::empty(), None).unwrap();
    let short = Duration::from_millis(200);
    let fetch = |address: SocketAddr, limit| network.fetch(&format!("http://{address}/"), limit);
    let silent = sends(Vec::new()).await;
    assert!(matches!(fetch(silent, short).await, Err(FetchError::Timeout(_))));
    let half = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc".to_vec()).await;
    assert!(matches!(fetch(half, short).await, Err(FetchError::Timeout(_))));
    let mut huge = b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n".to_vec();
    huge.resize(2_000_100, b'a');
    assert!(matches!(fetch(sends(huge).await, SOON).await, Err(FetchError::Body(_))));
    let noise = sends(b"\x16\x03\x01garbage\r\n\r\n".to_vec()).await;
    assert!(matches!(fetch(noise, SOON).await, Err(FetchError::Http(_))));
    for url in ["ftp://a/", "https://", "no url", "file:///etc/passwd"] {
        assert!(matches!(network.fetch(url, SOON).await, Err(FetchError::Url(_))), "{url}");
    }
}
