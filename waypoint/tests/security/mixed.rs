//! What has to do with each other only when a request asks for several things at a time.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use waypoint::http::Settings;

use crate::lab::{LONG, Lab, VIP, checks, custom, echo, external, free, limits, mesh_config};

/// Reads until it is enough; what came.
async fn until(stream: &mut TcpStream, is_enough: impl Fn(&str) -> bool) -> String {
    let mut all = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&all).into_owned();
        if is_enough(&text) {
            return text;
        }
        let read = tokio::time::timeout(LONG, stream.read_buf(&mut all)).await.expect("in time");
        assert!(read.unwrap() > 0, "it has ended after {text:?}");
    }
}

/// A server that tells of requests that end in `end`, and answers each of them.
async fn keeping(end: &'static str, answer: &'static str) -> (SocketAddr, UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (got, kept)) = (listener.local_addr().unwrap(), unbounded_channel());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let got = got.clone();
            tokio::spawn(async move {
                let mut all = Vec::new();
                while stream.read_buf(&mut all).await.unwrap_or(0) > 0 {
                    if all.ends_with(end.as_bytes()) {
                        let _ = got.send(String::from_utf8_lossy(&std::mem::take(&mut all)).into_owned());
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            });
        }
    });
    (address, kept)
}

fn routes(entries: &str) -> String {
    let head =
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: shop, namespace: shop}\n";
    format!("\n---\n{head}spec:\n  hosts: [shop.example]\n  http:\n{entries}")
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_body_that_is_waited_for_and_shown_is_whole_for_the_service_and_for_a_copy() {
    let Some(checks) = checks().await else { return };
    let (end, providers) = (
        "0\r\n\r\n",
        "
  - name: web
    envoyExtAuthzHttp:
      service: authz-http.example
      port: 80
      includeRequestHeadersInCheck: [x-ask]
      includeRequestBodyInCheck: {maxRequestBytes: 16}
      headersToUpstreamOnAllow: [x-told]
",
    );
    let (shop, mut got) = keeping(end, OK).await;
    let (copies, mut copied) = keeping(end, OK).await;
    let others = [("authz-http", "240.240.0.3", checks.http), ("copies", "240.240.0.9", copies)];
    let others =
        others.map(|(name, vip, to)| external(name, vip, "http", to).replace("use-waypoint", "none"));
    let route = "  - mirror: {host: copies.example}\n    route: [{destination: {host: shop.example}}]\n";
    let parts = [external("shop", VIP, "http", shop), others.concat(), routes(route), mesh_config(providers)];
    let lab = Lab::new(&[parts.concat(), custom("web")].concat(), Settings::default()).await;
    let head =
        "POST /ask HTTP/1.1\r\nHost: shop.example\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n";
    let mut client = TcpStream::connect(lab.address).await.unwrap();
    for _ in 0..2 {
        client.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
        let word = until(&mut client, |text| text.ends_with("\r\n\r\n")).await;
        assert_eq!(word, "HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"2\r\nab\r\n").await.unwrap();
        client.write_all(b"1\r\nc\r\n0\r\n\r\n").await.unwrap();
        let answer = until(&mut client, |text| text.ends_with("ok")).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("100 Continue"), "{answer}");
        for (requests, is_copy) in [(&mut got, false), (&mut copied, true)] {
            let request = tokio::time::timeout(LONG, requests.recv()).await.unwrap().unwrap();
            let request = request.to_lowercase();
            assert!(is_copy || request.contains("body=\"abc\""), "{request}");
            assert!(!request.contains("expect:"), "{request}");
            let (_, body) = request.split_once("\r\n\r\n").unwrap();
            let data: String = body.lines().skip(1).step_by(2).collect();
            assert_eq!(data, "abc", "{request}");
        }
    }
    // Refused when it was seen: nobody gets it, and the next request is the next one.
    client.write_all(format!("{head}x-ask: 403\r\n\r\n1\r\na\r\n0\r\n\r\n").as_bytes()).await.unwrap();
    until(&mut client, |text| text.ends_with("not you")).await;
    client
        .write_all(
            b"POST /other HTTP/1.1\r\nHost: shop.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        )
        .await
        .unwrap();
    until(&mut client, |text| text.ends_with("ok")).await;
    for requests in [&mut got, &mut copied] {
        let request = tokio::time::timeout(LONG, requests.recv()).await.unwrap().unwrap();
        assert!(request.starts_with("POST /other "), "{request}");
    }
}

#[tokio::test]
async fn a_switch_of_protocols_is_limited_as_any_request() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
    let (shop, _got) = keeping("\r\n\r\n", switch).await;
    let spec = "  limits: [{name: all, match: {paths: [/ws*]}, by: [{type: Path}], local: {requests: 1, per: 1h}}]\n";
    let parts = [external("shop", VIP, "http", shop), limits(spec)].concat();
    let lab = Lab::new(&parts, Settings::default()).await;
    let ask = b"GET /ws HTTP/1.1\r\nHost: shop.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let mut first = TcpStream::connect(lab.address).await.unwrap();
    first.write_all(ask).await.unwrap();
    until(&mut first, |text| text.starts_with("HTTP/1.1 101 ") && text.ends_with("hello")).await;
    let mut second = TcpStream::connect(lab.address).await.unwrap();
    // What comes behind one that is refused is no part of what it asked for.
    second.write_all(&[&ask[..], ask].concat()).await.unwrap();
    let answers = until(&mut second, |text| text.matches("local_rate_limited").count() == 2).await;
    assert!(
        answers.matches("HTTP/1.1 429 ").count() == 2 && !answers.contains("connection: close"),
        "{answers}"
    );
}

#[tokio::test]
async fn a_page_is_told_what_it_may_ask_whatever_is_made_to_fail() {
    let entry = "  - fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    corsPolicy: {allowOrigins: [{exact: 'https://a.example'}], allowMethods: [PUT], allowHeaders: [x-a]}
    timeout: 1ms
    retries: {attempts: 3, retryOn: 5xx}
    route: [{destination: {host: shop.example}}]
";
    let parts = [external("shop", VIP, "http", echo().await), routes(entry)].concat();
    let lab = Lab::new(&parts, Settings::default()).await;
    let asks = [("origin", "https://a.example"), ("access-control-request-method", "PUT")];
    let (status, head, _) = lab.ask("OPTIONS", "/", &asks, "").await;
    assert_eq!(status, 200);
    assert!(
        head.contains("access-control-allow-methods: put")
            && head.contains("access-control-allow-headers: x-a")
    );
    let (status, head, _) = lab.ask("PUT", "/", &asks[..1], "body").await;
    assert!(status == 418 && head.contains("access-control-allow-origin: https://a.example"), "{head}");
    // One that is told nothing is as any other request.
    let (status, head, _) = lab.ask("OPTIONS", "/", &[("origin", "https://b.example"), asks[1]], "").await;
    assert!(status == 418 && !head.contains("access-control"), "{head}");
}

#[tokio::test]
async fn a_call_may_ask_for_more_time_than_its_route_has_and_gets_the_routes() {
    let (shop, mut got) = keeping("\r\n\r\n", "").await;
    let entry = "  - timeout: 100ms\n    route: [{destination: {host: shop.example}}]\n";
    let parts = [external("shop", VIP, "http", shop), routes(entry)].concat();
    let lab = Lab::new(&parts, Settings::default()).await;
    let fields = [("content-type", "application/grpc"), ("grpc-timeout", "1H"), ("te", "trailers")];
    let (status, head, body) = lab.ask("POST", "/pkg.Service/Method", &fields, "").await;
    assert!(status == 200 && head.contains("grpc-status: 14") && body.is_empty(), "{head}");
    assert!(got.recv().await.unwrap().contains("grpc-timeout: 1H"), "the server knows its own");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_whoever_answers() {
    let policy = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: DENY
  rules: [{to: [{operation: {paths: [/admin*]}}]}]
";
    let entries = "  - match: [{uri: {prefix: /moved}}]
    redirect: {uri: /new}
  - match: [{uri: {prefix: /says}}]
    directResponse: {status: 418, body: {string: says}}
  - route: [{destination: {host: shop.example}}]
";
    let lab = Lab::with(free(), free(), &[policy, &routes(entries)].concat()).await;
    let mut client = TcpStream::connect(lab.address).await.unwrap();
    let paths =
        [("/admin", "403"), ("/ok", "200"), ("/moved", "301"), ("/says", "418"), ("/no-such\\..", "200")];
    let (mut all, mut wanted) = (String::new(), Vec::new());
    for n in 0..40 {
        let (path, status) = paths[n % paths.len()];
        // One of three has no body, one has its length, and one comes in chunks where the server reads those.
        let body = match n % 3 {
            1 => "Content-Length: 36\r\n\r\nGET /hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
            2 if status != "200" => {
                "Transfer-Encoding: chunked\r\n\r\n4;x=y\r\n\r\n\r\n\r\n0\r\nx-late: 1\r\n\r\n"
            }
            _ => "\r\n",
        };
        all.push_str(&format!("POST {path} HTTP/1.1\r\nHost: shop.example\r\nx-number: {n}\r\n{body}"));
        wanted.push(status);
    }
    // An old one is refused, and nothing is behind it.
    all.push_str("GET /ok HTTP/1.0\r\nHost: shop.example\r\nConnection: keep-alive\r\n\r\n");
    all.push_str("GET /behind HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    wanted.push("426");
    client.write_all(all.as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    tokio::time::timeout(LONG, client.read_to_end(&mut answers)).await.unwrap().unwrap();
    let answers = String::from_utf8_lossy(&answers);
    let got: Vec<_> = answers.split("HTTP/1.1 ").filter_map(|part| part.get(..3)).collect();
    // What the service sends back has a first line that ends so, too.
    let got: Vec<_> = got.into_iter().filter(|status| status.parse::<u16>().is_ok()).collect();
    assert_eq!(got, wanted, "{answers}");
    assert!(!answers.contains("/behind"), "{answers}");
}
