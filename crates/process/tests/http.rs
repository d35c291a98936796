//! The admin, readiness and metrics ports, with real sockets, friendly and hostile clients.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use process::admin;
use process::http::{Limits, Response, Routes, StatusCode, listen, serve};
use process::logs::{LogSettings, LogWriter, Logs};
use process::metrics::Registry;
use process::readiness::Readiness;
use process::shutdown::{Phase, Shutdown};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

const SOON: Duration = Duration::from_secs(10);

async fn start(routes: Routes, limits: Limits) -> SocketAddr {
    let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, routes, limits));
    address
}

async fn send(address: SocketAddr, request: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream
}

/// Everything until the server closes; a reset counts as an end.
async fn read_all(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    match timeout(SOON, stream.read_to_end(&mut all)).await.expect("the server does not close") {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("{e}"),
    }
    all
}

/// The status, head and body of one request.
async fn fetch(address: SocketAddr, method: &str, path: &str, head: &str) -> (u16, String, Vec<u8>) {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n");
    let all = read_all(send(address, request.as_bytes()).await).await;
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| {
        panic!("no response to {method} {path}: {:?}", String::from_utf8_lossy(&all));
    });
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), all[end + 4..].to_vec())
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let (status, _, body) = fetch(address, "GET", path, "").await;
    (status, String::from_utf8(body).unwrap())
}

fn hello() -> Routes {
    Routes::new("test")
        .get("/hello", "greets", |_| async { Response::text(StatusCode::OK, "hello\n") })
        .post("/echo", "echoes", |r| async move { Response::text(StatusCode::OK, r.body().clone()) })
        .get("/panic", "panics", |_| async { panic!("a handler's bug") })
        .get("/never", "hangs", |_| std::future::pending())
        .get("/query", "shows", |r| async move {
            Response::text(StatusCode::OK, format!("{:?} {:?}", r.query("a"), r.query("b")))
        })
}

fn test_logs() -> (Logs, impl tracing::Subscriber + Send + Sync) {
    let writer = LogWriter::start_on(io::sink(), 1 << 20, |_| String::new()).unwrap();
    Logs::on_writer(&LogSettings::default(), writer).unwrap()
}

#[tokio::test]
async fn requests_reach_their_route() {
    let address =
        start(hello(), Limits { handler_time: Duration::from_millis(300), ..Limits::default() }).await;
    assert_eq!(get(address, "/hello").await, (200, "hello\n".into()));
    assert_eq!(get(address, "/hello?x=y").await, (200, "hello\n".into()));
    assert_eq!(get(address, "/query?a=1%2C2+3&b").await, (200, "Some(\"1,2 3\") Some(\"\")".into()));
    assert_eq!(get(address, "/nothing").await.0, 404);
    assert_eq!(get(address, "/hello/").await.0, 404);
    assert_eq!(get(address, "/echo").await, (405, "use POST here\n".into()));
    let (status, _, body) = fetch(address, "POST", "/hello", "Content-Length: 0\r\n").await;
    assert_eq!((status, body.as_slice()), (405, "use GET here\n".as_bytes()));
    assert_eq!(get(address, "/panic").await.0, 500);
    assert_eq!(get(address, "/never").await.0, 503);
    let (status, head, body) = fetch(address, "HEAD", "/hello", "").await;
    assert!(status == 200 && head.contains("content-length: 6") && body.is_empty(), "{head}");
    let (_, index) = get(address, "/").await;
    for path in ["/hello", "/echo", "/panic", "/never", "/query"] {
        assert!(index.contains(path), "{index}");
    }
}

#[tokio::test]
async fn bad_requests_are_refused_and_the_next_one_served() {
    let address = start(hello(), Limits { head_time: Duration::from_millis(500), ..Limits::default() }).await;
    let long_path = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(100_000));
    let big_header = format!("GET /hello HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let many_headers = format!("GET /hello HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(1000));
    let cases: &[(&[u8], &str)] = &[
        (b"\r\n\r\n\r\n", ""),
        (b"nonsense\r\n\r\n", "400"),
        (b"GET /hello HTTP/9.9\r\n\r\n", "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"),
        (b"GET /hello HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"),
        (b"GET /hello HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n", "400"),
        (long_path.as_bytes(), "4"),
        (big_header.as_bytes(), "431"),
        (many_headers.as_bytes(), "431"),
    ];
    for (request, status) in cases {
        let start = Instant::now();
        let answer = read_all(send(address, request).await).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let shown: String = String::from_utf8_lossy(request).chars().take(60).collect();
        if !answer.is_empty() {
            // A reset may overtake the answer where not all of the request was read.
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{shown:?}: {answer}");
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{shown:?}");
        assert_eq!(get(address, "/hello").await.0, 200, "after {shown:?}");
    }
}

#[tokio::test]
async fn a_body_may_not_be_large_or_late() {
    let limits = Limits { body_bytes: 1000, body_time: Duration::from_millis(300), ..Limits::default() };
    let address = start(hello(), limits).await;
    let (status, ..) = fetch(address, "POST", "/echo", "Content-Length: 2000\r\n\r\n").await;
    assert!(status == 413 || status == 408, "{status}");
    let body = "a".repeat(2000);
    let request = format!(
        "POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n{body}\r\n0\r\n\r\n"
    );
    let answer = read_all(send(address, request.as_bytes()).await).await;
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 413"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    let start = Instant::now();
    let (status, ..) = fetch(address, "POST", "/echo", "Content-Length: 10\r\n\r\nfive!").await;
    assert_eq!(status, 408);
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn slow_heads_are_cut_off() {
    let address = start(hello(), Limits { head_time: Duration::from_millis(300), ..Limits::default() }).await;
    let start = Instant::now();
    read_all(send(address, b"").await).await;
    read_all(send(address, b"GET /hel").await).await;
    let mut stream = send(address, b"GET /hello HTTP/1.1\r\n").await;
    // A header now and then does not win time.
    while timeout(Duration::from_millis(50), stream.read_u8()).await.is_err() {
        let _ = stream.write_all(b"X: y\r\n").await;
        assert!(start.elapsed() < SOON);
    }
    // Neither does keeping a connection that was used.
    read_all(send(address, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").await).await;
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn whoever_sits_on_connections_does_not_lock_others_out() {
    let address = start(hello(), Limits { connections: 8, ..Limits::default() }).await;
    let mut sitting = Vec::new();
    for _ in 0..50 {
        sitting.push(send(address, b"GET /hello HTTP/1.1\r\nX:").await);
    }
    let start = Instant::now();
    assert_eq!(get(address, "/hello").await.0, 200);
    assert!(start.elapsed() < Duration::from_secs(2));
    // The oldest ones were closed.
    let first = sitting.remove(0);
    assert!(read_all(first).await.is_empty());
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_cut_off() {
    let routes = Routes::new("test").get("/large", "", |_| async {
        Response::stream("text/plain", |out| {
            for _ in 0..10_000 {
                out.write_all(&[b'x'; 10_000])?;
            }
            Ok(())
        })
    });
    let limits = Limits { stall_time: Duration::from_millis(300), ..Limits::default() };
    let address = start(routes, limits).await;
    let request = b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let stalled = send(address, request).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let got = read_all(stalled).await.len();
    assert!(got < 100_000_000, "{got}");
    // One that reads gets all of it.
    let (status, head, body) = fetch(address, "GET", "/large", "").await;
    assert!(status == 200 && head.contains("transfer-encoding: chunked"), "{head}");
    assert_eq!(body.iter().filter(|b| **b == b'x').count(), 100_000_000);
}

#[tokio::test]
async fn a_stream_that_fails_is_no_whole_response() {
    let routes = Routes::new("test").get("/broken", "", |_| async {
        Response::stream("text/plain", |out| {
            out.write_all(b"some")?;
            Err(io::Error::other("the source is gone"))
        })
    });
    let address = start(routes, Limits::default()).await;
    let request = b"GET /broken HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = read_all(send(address, request).await).await;
    assert!(!answer.ends_with(b"0\r\n\r\n"), "{:?}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn the_admin_port_answers_no_page_of_a_browser() {
    let (logs, _subscriber) = test_logs();
    let shutdown = Shutdown::new(SOON);
    let address = start(admin::routes("culvert", &logs, &shutdown), admin::limits()).await;
    for (host, status) in [
        ("localhost:15000", "200"),
        ("127.0.0.1:15000", "200"),
        ("[::1]:15000", "200"),
        ("LOCALHOST", "200"),
        ("evil.example", "403"),
        ("localhost.evil.example", "403"),
        ("", "403"),
    ] {
        let request = format!("GET /logging HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = read_all(send(address, request.as_bytes()).await).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {answer}");
    }
    let answer = read_all(send(address, b"GET /logging HTTP/1.0\r\n\r\n").await).await;
    assert!(answer.starts_with(b"HTTP/1.0 403"));
}

/// What a page in an operator's browser can make it send: such a request has the right `Host`, and its effect does not
/// need the answer.
#[tokio::test]
async fn no_page_can_end_the_process_or_silence_its_log() {
    let (logs, subscriber) = test_logs();
    let _default = tracing::subscriber::set_default(subscriber);
    let shutdown = Shutdown::new(SOON);
    let address = start(admin::routes("culvert", &logs, &shutdown), admin::limits()).await;
    let send = async |path: &str, head: &str| {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:15000\r\nConnection: close\r\nContent-Length: 0\r\n{head}\r\n"
        );
        String::from_utf8(read_all(send(address, request.as_bytes()).await).await).unwrap()
    };
    for (head, says) in [
        ("Origin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\n", "Origin"),
        ("Origin: http://evil.example\r\n", "Origin"),
        ("Origin: null\r\n", "Origin"),
        ("Origin: http://127.0.0.1:3000\r\n", "Origin"),
        ("Origin: https://127.0.0.1:15000\r\n", "Origin"),
        ("Origin: http://127.0.0.1:15000.evil.example\r\n", "Origin"),
        ("Origin: http://127.0.0.1:15000\r\nOrigin: http://evil.example\r\n", "Origin"),
        ("Origin: \r\n", "Origin"),
        ("Origin: \u{e9}\r\n", "Origin"),
        ("Sec-Fetch-Site: cross-site\r\n", "Sec-Fetch-Site"),
        ("Sec-Fetch-Site: same-site\r\n", "Sec-Fetch-Site"),
        ("Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n", "Sec-Fetch-Site"),
    ] {
        for path in ["/logging?level=off", "/quitquitquit"] {
            let answer = send(path, head).await;
            assert!(answer.starts_with("HTTP/1.1 403") && answer.contains(says), "{path} {head:?}: {answer}");
        }
    }
    assert_eq!((logs.level(), shutdown.phase()), ("info".into(), Phase::Running));
    // An image or a link has no Origin, and a body is not needed for a minute's profile.
    let (status, ..) = fetch(address, "GET", "/logging", "Sec-Fetch-Site: cross-site\r\n").await;
    assert_eq!(status, 403);

    // The port's own pages, an address typed in, and what is no browser.
    for head in [
        "",
        "Sec-Fetch-Site: none\r\n",
        "Origin: http://127.0.0.1:15000\r\n",
        "Origin: http://127.0.0.1:15000\r\nSec-Fetch-Site: same-origin\r\n",
    ] {
        let answer = send("/logging?level=warn", head).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{head:?}: {answer}");
    }
    assert_eq!(logs.level(), "warn");
}

#[tokio::test]
async fn the_level_is_shown_and_set() {
    let (logs, subscriber) = test_logs();
    let _default = tracing::subscriber::set_default(subscriber);
    let address = start(admin::routes("culvert", &logs, &Shutdown::new(SOON)), admin::limits()).await;
    assert_eq!(get(address, "/logging").await, (200, "info\n".into()));
    assert_eq!(get(address, "/logging?level=debug").await, (200, "info\n".into()), "GET changes nothing");
    let post = async |query: &str| {
        let (status, _, body) =
            fetch(address, "POST", &format!("/logging{query}"), "Content-Length: 0\r\n").await;
        (status, String::from_utf8(body).unwrap())
    };
    assert_eq!(post("?level=ztunnel::dns:debug").await, (200, "info,ztunnel::dns=debug\n".into()));
    assert_eq!(post("?level=warn").await, (200, "ztunnel::dns=debug,warn\n".into()));
    for wrong in ["", "?level=", "?level=loud", "?level=%00", "?level=a%0ab:debug"] {
        assert_eq!(post(wrong).await.0, 400, "{wrong}");
    }
    assert_eq!(logs.level(), "ztunnel::dns=debug,warn");
}

#[tokio::test]
async fn what_only_shows_changes_and_ends_nothing() {
    let (logs, _subscriber) = test_logs();
    let address = start(admin::shown("culvert", &logs), admin::limits()).await;
    assert_eq!(get(address, "/logging").await, (200, "info\n".into()));
    for path in ["/logging?level=off", "/quitquitquit", "/debug/pprof/heap", "/debug/pprof/profile"] {
        let (status, ..) = fetch(address, "POST", path, "Content-Length: 0\r\n").await;
        assert!([404, 405].contains(&status), "{path}: {status}");
    }
    assert_eq!((get(address, "/debug/pprof/heap").await.0, logs.level()), (404, "info".into()));
}

#[tokio::test]
async fn quitquitquit_drains() {
    let (logs, _subscriber) = test_logs();
    let shutdown = Shutdown::new(SOON);
    let address = start(admin::routes("culvert", &logs, &shutdown), admin::limits()).await;
    assert_eq!(get(address, "/quitquitquit").await.0, 405);
    assert_eq!(shutdown.phase(), Phase::Running);
    assert_eq!(fetch(address, "POST", "/quitquitquit", "Content-Length: 0\r\n").await.0, 200);
    assert!(matches!(shutdown.phase(), Phase::Draining { .. }));
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let (readiness, shutdown) = (Readiness::default(), Shutdown::new(SOON));
    let (config, ca) = (readiness.condition("configuration"), readiness.condition("certificates"));
    let address = start(readiness.routes(&shutdown), Limits::default()).await;
    let ready = async || get(address, "/healthz/ready").await;
    assert_eq!(ready().await, (503, "certificates: not yet\nconfiguration: not yet\n".into()));
    config.holds();
    ca.fails("the CA at 10.0.0.1 does not answer");
    assert_eq!(ready().await, (503, "certificates: the CA at 10.0.0.1 does not answer\n".into()));
    ca.holds();
    assert_eq!(ready().await, (200, "ready\n".into()));
    assert!(readiness.is_ready());
    shutdown.drain();
    assert_eq!(ready().await, (503, "running: the process is ending\n".into()));
}

#[tokio::test]
async fn metrics_come_in_the_form_that_is_asked_for() {
    let registry = Registry::new();
    registry.counter("culvert_things", "Things").add(4);
    let address = start(admin::metrics_routes(&registry), Limits::default()).await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, head, body) = fetch(address, "GET", path, "").await;
        let body = String::from_utf8(body).unwrap();
        assert!(status == 200 && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        assert!(body.contains("\nculvert_things_total 4\n") && !body.contains("# EOF"), "{body}");
        let accept = "Accept: application/openmetrics-text;version=1.0.0\r\n";
        let (_, head, body) = fetch(address, "GET", path, accept).await;
        let body = String::from_utf8(body).unwrap();
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
        assert!(body.contains("\nculvert_things_total 4\n") && body.ends_with("# EOF\n"), "{body}");
    }
}

#[tokio::test]
async fn the_heap_page_reports_what_the_kernel_knows() {
    let (logs, _subscriber) = test_logs();
    let address = start(admin::routes("culvert", &logs, &Shutdown::new(SOON)), admin::limits()).await;
    let (status, body) = get(address, "/debug/pprof/heap").await;
    let page: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 200);
    assert!(page["resident_bytes"].as_u64().unwrap() > 1_000_000, "{body}");
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let first = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = first.local_addr().unwrap();
    let error = listen(address).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}
