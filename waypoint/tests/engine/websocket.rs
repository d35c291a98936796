//! WebSocket to servers of HTTP/2 (RFC 8441), from clients of either version.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Protocol};

use crate::h2::{client, data, switch_to};
use crate::lab::{self, Proxy, in_turn, target};

/// The example of RFC 6455 section 1.3.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A server of HTTP/2 that says, or does not, that it takes WebSocket.
async fn server(offers: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut builder = h2::server::Builder::new();
            if offers {
                builder.enable_connect_protocol();
            }
            let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
            tokio::spawn(async move {
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(answer(request, respond));
                }
            });
        }
    });
    address
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let (head, mut body) = request.into_parts();
    let protocol = head.extensions.get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str);
    let said = format!("{} {} {}", head.method, head.uri, protocol.unwrap_or("-"));
    for gone in ["connection", "upgrade"] {
        assert!(protocol.is_none() || !head.headers.contains_key(gone), "{:?}", head.headers);
    }
    let response = Response::builder().header("x-said", said);
    let refuses = head.uri.path() == "/no";
    if protocol.is_none() || refuses {
        let response = response.status(if refuses { 404 } else { 200 });
        let mut send = respond.send_response(response.body(()).unwrap(), false).unwrap();
        send.send_data("plain".into(), true).unwrap();
        return;
    }
    assert_eq!(head.headers["sec-websocket-version"], "13");
    assert_eq!(head.headers["sec-websocket-key"].len(), 24, "a proxy needs it for a server of HTTP/1.1");
    let response = response.header("sec-websocket-protocol", "chat").body(()).unwrap();
    let mut send = respond.send_response(response, false).unwrap();
    if head.uri.path() == "/reset" {
        send.send_data("hello".into(), true).unwrap();
        assert_eq!(data(&mut body).await, "first");
        send.send_reset(Reason::CANCEL);
        return;
    }
    send.send_data("hello".into(), false).unwrap();
    let mut all = b"got ".to_vec();
    while let Some(Ok(data)) = body.data().await {
        all.extend_from_slice(&data);
    }
    send.send_data(all.into(), true).unwrap();
}

async fn proxy(offers: bool) -> Proxy {
    let endpoints = in_turn(vec![target(server(offers).await, Protocol::Http2)]);
    Proxy::start(Forwarding::default(), endpoints, Settings::default()).await
}

fn upgrade(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    )
}

#[tokio::test]
async fn a_client_of_http1_gets_to_a_server_of_http2() {
    let proxy = proxy(true).await;
    let mut client = proxy.connect().await;
    // What is no switch is an answer as any other, and the connection goes on.
    let no = client.ask(upgrade("/no")).await;
    assert_eq!((no.status(), &no.body[..]), (404, &b"plain"[..]), "{no:?}");
    client.send(upgrade("/chat?a")).await;
    let head = client.head().await.unwrap();
    let switched = lab::Message { head, body: Vec::new() };
    let fields = ["connection", "upgrade", "sec-websocket-accept", "sec-websocket-protocol", "x-said"]
        .map(|name| switched.field(name).unwrap_or_default().to_lowercase());
    let accept = ACCEPT.to_lowercase();
    assert_eq!(switched.status(), 101);
    assert_eq!(fields, ["upgrade", "websocket", &accept, "chat", "connect http://a/chat?a websocket"]);
    assert_eq!(client.exactly(5).await.unwrap(), b"hello");
    client.send("early ").await;
    client.send("late").await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.rest().await, b"got early late");
    let records = proxy.wait_records(2).await;
    assert_eq!((records[0].status, records[1].status), (404, 101));
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
}

#[tokio::test]
async fn a_client_of_http2_gets_to_a_server_of_http2() {
    let proxy = proxy(true).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, _body) = send.send_request(switch_to("websocket", "/no"), false).unwrap();
    assert_eq!(tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap().status(), 404);
    let mut send = send.ready().await.unwrap();
    let (response, mut body) = send.send_request(switch_to("websocket", "/chat?a"), false).unwrap();
    let response = tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap();
    let fields = response.headers();
    assert_eq!(response.status(), 200);
    assert_eq!(fields["x-said"], "CONNECT http://a/chat?a websocket");
    assert_eq!(fields["sec-websocket-protocol"], "chat");
    assert!(!fields.contains_key("sec-websocket-accept"));
    let mut recv = response.into_body();
    assert_eq!(data(&mut recv).await, "hello");
    body.send_data("all".into(), true).unwrap();
    assert_eq!(data(&mut recv).await, "got all");
    assert!(recv.data().await.is_none());
    assert_eq!(proxy.wait_records(2).await[1].status, 101);
}

#[tokio::test]
async fn a_server_that_does_not_offer_it_is_not_asked() {
    let proxy = proxy(false).await;
    let plain = proxy.connect().await.ask(upgrade("/chat?a")).await;
    assert_eq!((plain.status(), plain.field("x-said")), (200, Some("GET http://a/chat?a -")));
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, _body) = send.send_request(switch_to("websocket", "/chat?a"), false).unwrap();
    assert_eq!(tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap().status(), 501);
}

#[tokio::test]
async fn a_server_that_ends_before_it_says_what_it_takes_has_failed() {
    // Its first connection ends before its first frame.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.readable().await.unwrap();
        }
    });
    let endpoints = in_turn(vec![target(address, Protocol::Http2)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, _body) = send.send_request(switch_to("websocket", "/chat"), false).unwrap();
    assert_eq!(tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap().status(), 503);
    assert_eq!(proxy.connect().await.ask(upgrade("/chat")).await.status(), 503);
    let flags: Vec<_> = proxy.wait_records(2).await.iter().map(|record| record.flag.to_string()).collect();
    assert_eq!(flags, ["UF", "UF"]);
}

#[tokio::test]
async fn other_protocols_are_not_asked_for() {
    let proxy = proxy(true).await;
    let other = upgrade("/").replace("WebSocket\r\nSec", "other\r\nSec");
    let plain = proxy.connect().await.ask(other).await;
    assert_eq!((plain.status(), plain.field("x-said")), (200, Some("GET http://a/ -")));
    // Nor is there room for a body before the switch.
    let post = upgrade("/").replace("GET", "POST").replace("Host: a", "Host: a\r\nContent-Length: 1");
    let plain = proxy.connect().await.ask(format!("{post}x")).await;
    assert_eq!((plain.status(), plain.field("x-said")), (200, Some("POST http://a/ -")));
}

#[tokio::test]
async fn a_client_that_ends_its_half_and_then_resets_is_gone() {
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let silent = lab::server(move |_, mut client: lab::Client| {
        let ended = ended.clone();
        async move {
            client.head().await;
            client.send("HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
            client.rest().await;
            let _ = ended.send(());
            std::future::pending::<()>().await;
        }
    })
    .await;
    let proxy = Proxy::to(silent).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(switch_to("websocket", "/"), false).unwrap();
    assert_eq!(tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap().status(), 200);
    body.send_data("last".into(), true).unwrap();
    tokio::time::timeout(lab::LONG, end.recv()).await.unwrap().unwrap();
    body.send_reset(Reason::CANCEL);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.flag.to_string().as_str(), record.received), ("DC", 4));
}

#[tokio::test]
async fn a_server_that_ends_its_half_and_then_resets_is_gone() {
    let proxy = proxy(true).await;
    let mut client = proxy.connect().await;
    client.send(upgrade("/reset")).await;
    client.head().await.unwrap();
    assert_eq!(client.exactly(5).await.unwrap(), b"hello");
    client.send("first").await;
    assert_eq!(client.rest().await, b"");
    assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), "UR");
}
