//! Programs of others on both sides.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;

use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Protocol};

use crate::lab::{self, Proxy, in_turn, target};

/// A free port of loopback.
pub fn free_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], harness::port::free()))
}

/// nginx with one server.
pub struct Nginx {
    pub address: SocketAddr,
    child: Child,
    _directory: TempDir,
}

impl Nginx {
    pub async fn start(server: &str) -> Self {
        Self::listening("", server).await
    }

    /// The same with TLS; `server` has its certificate.
    pub async fn start_tls(server: &str) -> Self {
        Self::listening(" ssl", server).await
    }

    async fn listening(how: &str, server: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let address = free_port();
        let text = format!(
            "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log;
             events {{ worker_connections 512; }}
             http {{ access_log off; client_body_temp_path {path}/b; proxy_temp_path {path}/p; fastcgi_temp_path {path}/f;
             uwsgi_temp_path {path}/u; scgi_temp_path {path}/s; keepalive_requests 1000000; client_max_body_size 0;
             server {{ listen {address}{how}; root {path}; {server} }} }}"
        );
        std::fs::write(directory.path().join("nginx.conf"), text).unwrap();
        std::fs::write(directory.path().join("large"), vec![b'x'; 8 << 20]).unwrap();
        let child = Command::new("/usr/sbin/nginx")
            .arg("-c")
            .arg(directory.path().join("nginx.conf"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let nginx = Self { address, child, _directory: directory };
        for _ in 0..2000 {
            if TcpStream::connect(address).await.is_ok() {
                return nginx;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nginx does not listen");
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end; what it wrote.
pub async fn run(program: &str, args: &[&str]) -> String {
    let out = tokio::process::Command::new(program).args(args).kill_on_drop(true).output();
    let out = tokio::time::timeout(lab::LONG, out).await.expect("in time").unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[tokio::test]
async fn curl_speaks_to_nginx_by_either_protocol() {
    let nginx = Nginx::start("location / { return 200 \"$request_method $http_x_test\"; }").await;
    let proxy = Proxy::to(nginx.address).await;
    let url = format!("http://{}/x", proxy.address);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let body = run("curl", &["-sS", version, "-H", "X-Test: y", &url]).await;
        assert_eq!(body, "GET y");
        let head = run("curl", &["-sS", "-I", version, &url]).await;
        assert!(head.contains("200") && head.to_lowercase().contains("content-length: 5"), "{head}");
    }
    let several = run("curl", &["-sS", &url, &url, &url]).await;
    assert_eq!(several, "GET GET GET ");
}

#[tokio::test]
async fn a_large_body_arrives_whole_in_either_direction() {
    let nginx = Nginx::start("location /up { proxy_pass http://127.0.0.1:$server_port/echo; } location /echo { return 200 \"$content_length\"; }").await;
    let proxy = Proxy::to(nginx.address).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("large");
    std::fs::write(&file, vec![b'z'; 5 << 20]).unwrap();
    let data = format!("@{}", file.display());
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let out = directory.path().join("out");
        run(
            "curl",
            &["-sS", version, "-o", out.to_str().unwrap(), &format!("http://{}/large", proxy.address)],
        )
        .await;
        assert_eq!(std::fs::metadata(&out).unwrap().len(), 8 << 20);
        let url = format!("http://{}/up", proxy.address);
        assert_eq!(run("curl", &["-sS", version, "--data-binary", &data, &url]).await, "5242880");
    }
}

#[tokio::test]
async fn h2load_loses_no_request() {
    let nginx = Nginx::start("location / { return 200 \"hello\"; }").await;
    let proxy = Proxy::to(nginx.address).await;
    let url = format!("http://{}/", proxy.address);
    for more in [&["-m", "10"][..], &["--h1"]] {
        let args = [&["-n", "2000", "-c", "4"], more, &[url.as_str()]].concat();
        let out = run("h2load", &args).await;
        assert!(out.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"), "{out}");
    }
}

#[tokio::test]
async fn requests_go_on_by_http2_and_arrive() {
    let nginx = Nginx::start("location / { return 200 \"$server_protocol $http_x_test\"; }").await;
    let endpoints = in_turn(vec![target(nginx.address, Protocol::Http1)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
    // A proxy before the proxy: HTTP/2 between them.
    let endpoints = in_turn(vec![target(proxy.address, Protocol::Http2)]);
    let front = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let url = format!("http://{}/", front.address);
        assert_eq!(run("curl", &["-sS", version, "-H", "X-Test: y", &url]).await, "HTTP/1.1 y");
    }
    let url = format!("http://{}/", front.address);
    let out = run("h2load", &["-n", "2000", "-c", "4", "-m", "10", &url]).await;
    assert!(out.contains("2000 succeeded, 0 failed"), "{out}");
}
