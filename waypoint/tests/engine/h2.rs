//! HTTP/2 on either side: gRPC's ways of streaming, resets, limits.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use tokio::net::{TcpListener, TcpStream};
use waypoint::http::Settings;
use waypoint::http::decide::{Endpoints, Forwarding, Outcome, Protocol, Retries, Timeouts};

use crate::lab::{self, Proxy, in_turn, target};

pub async fn client(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send
}

fn grpc(address: SocketAddr) -> Request<()> {
    let request = Request::post(format!("http://{address}/pkg.Service/Method"));
    request.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap()
}

pub async fn data(recv: &mut RecvStream) -> Bytes {
    let data = tokio::time::timeout(lab::LONG, recv.data()).await.unwrap().unwrap().unwrap();
    recv.flow_control().release_capacity(data.len()).unwrap();
    data
}

/// A server that sends each message back as it comes, and ends with trailers; `/refused` it refuses the first time,
/// and the trailers of `/unavailable` say so.
pub async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut refused = false;
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let path = request.uri().path().to_owned();
                if path == "/refused" && !std::mem::replace(&mut refused, true) {
                    respond.send_reset(Reason::REFUSED_STREAM);
                    continue;
                }
                if path == "/hints" {
                    let hints = Response::builder().status(103).header("link", "</a.css>").body(()).unwrap();
                    respond.send_informational(hints).unwrap();
                }
                if path == "/silent" {
                    tokio::spawn(async move {
                        std::future::pending::<()>().await;
                        drop(respond);
                    });
                    continue;
                }
                if path == "/trailers-only" {
                    let response = Response::builder().header("grpc-status", "5").body(()).unwrap();
                    respond.send_response(response, true).unwrap();
                    continue;
                }
                tokio::spawn(async move {
                    let status = if path == "/unavailable" { "14" } else { "0" };
                    let te = request.headers().get("te").cloned();
                    let mut body = request.into_body();
                    let response = Response::builder().header("x-path", path);
                    let response = response.header("x-te", te.unwrap_or_else(|| "-".parse().unwrap()));
                    let mut send = respond.send_response(response.body(()).unwrap(), false).unwrap();
                    while let Some(Ok(data)) = body.data().await {
                        body.flow_control().release_capacity(data.len()).unwrap();
                        let mut data = data;
                        while !data.is_empty() {
                            send.reserve_capacity(data.len());
                            let Some(Ok(room)) = poll_fn(|cx| send.poll_capacity(cx)).await else { return };
                            send.send_data(data.split_to(room.min(data.len())), false).unwrap();
                        }
                    }
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", status.parse().unwrap());
                    let _ = send.send_trailers(trailers);
                });
            }
        }
    });
    address
}

async fn proxy(how: Forwarding) -> Proxy {
    let endpoints = in_turn(vec![target(echo().await, Protocol::Http2)]);
    Proxy::start(how, endpoints, Settings::default()).await
}

#[tokio::test]
async fn both_sides_stream_at_the_same_time_and_trailers_arrive() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(grpc(proxy.address), false).unwrap();
    let response = tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap();
    assert_eq!(response.headers()["x-te"], "trailers");
    let mut recv = response.into_body();
    for message in ["one", "two", "three"] {
        body.send_data(message.into(), false).unwrap();
        assert_eq!(data(&mut recv).await, message);
    }
    body.send_data(Bytes::new(), true).unwrap();
    assert!(recv.data().await.is_none());
    assert_eq!(recv.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.grpc_status, record.received, record.sent), (Some(0), 11, 11));
}

#[tokio::test]
async fn informational_responses_are_passed_on() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let request = Request::post(format!("http://{}/hints", proxy.address)).body(()).unwrap();
    let (mut response, mut body) = send.send_request(request, false).unwrap();
    let hints = tokio::time::timeout(lab::LONG, poll_fn(|cx| response.poll_informational(cx)));
    let hints = hints.await.unwrap().expect("a word before the response").unwrap();
    assert_eq!((hints.status().as_u16(), &hints.headers()["link"]), (103, &"</a.css>".parse().unwrap()));
    body.send_data(Bytes::new(), true).unwrap();
    assert_eq!(tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap().status(), 200);
}

/// A server of HTTP/1.1 that switches to `websocket`, or what else the path asks for, and sends back what comes.
async fn switching() -> SocketAddr {
    lab::server(|_, mut client: lab::Client| async move {
        while let Some(head) = client.head().await {
            let answer = match head.split(' ').nth(1).unwrap() {
                "/no" => "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
                "/away" => "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone",
                _ => {
                    let head = head.to_lowercase();
                    assert!(head.starts_with("get /chat?a http/1.1\r\nhost: a\r\n"), "{head}");
                    assert!(head.contains("upgrade: websocket\r\n") && head.contains("connection: upgrade\r\n"));
                    let key = head.split("sec-websocket-key: ").nth(1).unwrap().lines().next().unwrap();
                    assert!(key.len() == 24 && !key.contains("theirs"), "{head}");
                    assert!(!head.contains("transfer-encoding") && !head.contains("content-length"), "{head}");
                    client.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\nSec-WebSocket-Protocol: chat\r\n\r\nhello").await;
                    let all = client.rest().await;
                    client.send([b"got ", &all[..]].concat()).await;
                    return;
                }
            };
            client.send(answer).await;
        }
    })
    .await
}

/// A request for a switch on a stream.
pub fn switch_to(protocol: &str, path: &str) -> Request<()> {
    let uri = http::Uri::builder().scheme("http").authority("a").path_and_query(path).build().unwrap();
    let request = Request::builder().method("CONNECT").uri(uri);
    let request = request.header("sec-websocket-version", "13").header("sec-websocket-key", "theirs");
    request.extension(h2::ext::Protocol::from(protocol)).body(()).unwrap()
}

#[tokio::test]
async fn a_websocket_on_a_stream_carries_bytes_both_ways_and_ends_on_each_side_alone() {
    let proxy = Proxy::to(switching().await).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let mut plain = send.clone();
    let (response, mut body) = send.send_request(switch_to("websocket", "/chat?a"), false).unwrap();
    body.send_data("early ".into(), false).unwrap();
    let response = tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap();
    let fields = response.headers();
    assert_eq!(
        (response.status().as_u16(), &fields["sec-websocket-protocol"]),
        (200, &"chat".parse().unwrap())
    );
    for gone in ["connection", "upgrade", "sec-websocket-accept", "content-length"] {
        assert!(!fields.contains_key(gone), "{fields:?}");
    }
    let mut recv = response.into_body();
    assert_eq!(data(&mut recv).await, "hello");
    body.send_data("late".into(), true).unwrap();
    let (mut all, whole) = (Vec::new(), b"got early late");
    while !recv.is_end_stream() {
        let data = tokio::time::timeout(lab::LONG, recv.data()).await.unwrap();
        all.extend_from_slice(&data.transpose().unwrap().unwrap_or_default());
    }
    assert_eq!(all, whole);
    assert_eq!(proxy.wait_records(1).await[0].status, 101);
    // What is no switch is told from one.
    for (protocol, path, status) in [
        ("websocket", "/no", 501),
        ("websocket", "/away", 404),
        ("connect-udp", "/chat?a", 405),
        ("websocket", "/direct", 418),
        ("websocket", "/nothing", 501),
    ] {
        plain = plain.ready().await.unwrap();
        let (response, _body) = plain.send_request(switch_to(protocol, path), false).unwrap();
        let response = tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap();
        assert_eq!(response.status().as_u16(), status, "{protocol} {path}");
    }
}

#[tokio::test]
async fn a_websocket_ends_when_its_stream_is_reset_and_is_not_for_servers_of_http2() {
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let server = lab::server(move |_, mut client: lab::Client| {
        let ended = ended.clone();
        async move {
            client.head().await;
            client.send("HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
            client.rest().await;
            let _ = ended.send(());
        }
    })
    .await;
    let to_h1 = Proxy::to(server).await;
    let mut send = client(to_h1.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(switch_to("websocket", "/"), false).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    body.send_reset(Reason::CANCEL);
    tokio::time::timeout(lab::LONG, end.recv()).await.unwrap().unwrap();
    assert_eq!(to_h1.wait_records(1).await[0].flag.to_string(), "DC");

    let to_h2 = proxy(Forwarding::default()).await;
    let mut send = client(to_h2.address).await.ready().await.unwrap();
    let (response, _body) = send.send_request(switch_to("websocket", "/"), false).unwrap();
    assert_eq!(response.await.unwrap().status(), 501);
}

#[tokio::test]
async fn what_is_asked_of_the_server_as_a_whole_is_asked_so() {
    let whole = || http::Uri::builder().scheme("http").authority("a").path_and_query("*").build().unwrap();
    let ask = async |proxy: &Proxy| {
        let mut send = client(proxy.address).await.ready().await.unwrap();
        let request = Request::options(whole()).body(()).unwrap();
        let (response, _) = send.send_request(request, true).unwrap();
        tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap()
    };
    assert_eq!(ask(&proxy(Forwarding::default()).await).await.headers()["x-path"], "*");
    let mut answer = ask(&Proxy::to(lab::echo().await).await).await.into_body();
    assert!(data(&mut answer).await.starts_with(b"OPTIONS * HTTP/1.1\r\nhost: a\r\n"));
}

#[tokio::test]
async fn a_response_that_is_all_trailers_stays_one() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let request = Request::post(format!("http://{}/trailers-only", proxy.address)).body(()).unwrap();
    let (response, _) = send.send_request(request, true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "5");
    assert!(response.body().is_end_stream());
    assert_eq!(proxy.wait_records(1).await[0].grpc_status, Some(5));
}

#[tokio::test]
async fn how_a_call_went_its_trailers_tell_of_its_endpoint() {
    let endpoints = in_turn(vec![target(echo().await, Protocol::Http2)]);
    let shared: Arc<dyn Endpoints> = endpoints.clone();
    let proxy = Proxy::start(Forwarding::default(), shared, Settings::default()).await;
    for path in ["/pkg.Service/Method", "/unavailable"] {
        let mut send = client(proxy.address).await.ready().await.unwrap();
        let request = Request::post(format!("http://{}{path}", proxy.address));
        let request = request.header("content-type", "application/grpc").body(()).unwrap();
        let (response, mut body) = send.send_request(request, false).unwrap();
        body.send_data("message".into(), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        let mut recv = response.into_body();
        assert_eq!(data(&mut recv).await, "message");
        assert!(recv.data().await.is_none());
    }
    let ended = lab::until(|| {
        let ended = endpoints.ended.lock().unwrap();
        (ended.len() == 2).then(|| ended.clone())
    });
    assert_eq!(ended.await, [200, 503].map(|status| Some(Outcome::Status(status))));
}

#[tokio::test]
async fn a_call_that_its_route_ends_in_the_middle_says_nothing_against_its_endpoint() {
    let endpoints = in_turn(vec![target(echo().await, Protocol::Http2)]);
    let shared: Arc<dyn Endpoints> = endpoints.clone();
    let timeouts = Timeouts { request: Some(Duration::from_millis(300)), ..Timeouts::default() };
    let proxy =
        Proxy::start(Forwarding { timeouts, ..Forwarding::default() }, shared, Settings::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let request = Request::post(format!("http://{}/pkg.Service/Watch", proxy.address));
    let request = request.header("content-type", "application/grpc").body(()).unwrap();
    let (response, mut body) = send.send_request(request, false).unwrap();
    body.send_data("message".into(), false).unwrap();
    let mut recv = response.await.unwrap().into_body();
    assert_eq!(data(&mut recv).await, "message");
    let ended = lab::until(|| endpoints.ended.lock().unwrap().first().copied());
    assert_eq!(ended.await, Some(Outcome::Status(200)));
    assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), "UT");
}

#[tokio::test]
async fn a_call_takes_no_longer_than_its_client_says() {
    let minute = Timeouts { request: Some(Duration::from_mins(1)), ..Timeouts::default() };
    for timeouts in [Timeouts::default(), minute] {
        let proxy = proxy(Forwarding { timeouts, ..Forwarding::default() }).await;
        let mut send = client(proxy.address).await.ready().await.unwrap();
        let request = Request::post(format!("http://{}/silent", proxy.address));
        let request = request.header("content-type", "application/grpc").header("grpc-timeout", "100m");
        let (response, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
        let response = tokio::time::timeout(lab::LONG, response).await.unwrap().unwrap();
        // DEADLINE_EXCEEDED, which is not worth another try.
        assert_eq!(
            (response.status().as_u16(), &response.headers()["grpc-status"]),
            (200, &"4".parse().unwrap())
        );
        let record = &proxy.wait_records(1).await[0];
        assert_eq!((record.flag.to_string().as_str(), record.detail), ("UT", "grpc_timeout"));
    }
}

#[tokio::test]
async fn what_is_answered_here_is_grpc_for_grpc() {
    let endpoints = in_turn(vec![]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, _) = send.send_request(grpc(proxy.address), true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["grpc-status"]),
        (200, &"14".parse().unwrap())
    );
    assert_eq!(response.headers()["grpc-message"], "no_healthy_upstream");
    assert_eq!(proxy.wait_records(1).await[0].grpc_status, Some(14));
}

#[tokio::test]
async fn a_refused_stream_is_tried_again() {
    let retries = Retries { attempts: 1, refused_stream: true, ..Retries::default() };
    let proxy = proxy(Forwarding { retries: Some(retries), ..Forwarding::default() }).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let request = Request::post(format!("http://{}/refused", proxy.address)).body(()).unwrap();
    let (response, mut body) = send.send_request(request, false).unwrap();
    body.send_data("hello".into(), true).unwrap();
    let mut recv = response.await.unwrap().into_body();
    assert_eq!(data(&mut recv).await, "hello");
    assert_eq!(proxy.worker.stats.retries.get(), 1);
}

#[tokio::test]
async fn a_stream_that_the_client_resets_ends_upstream_too() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(grpc(proxy.address), false).unwrap();
    response.await.unwrap();
    body.send_reset(Reason::CANCEL);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!(record.flag.to_string(), "DC");
    // Other streams of the same connections go on.
    let (response, mut body) = send.send_request(grpc(proxy.address), false).unwrap();
    let mut recv = response.await.unwrap().into_body();
    body.send_data("still".into(), true).unwrap();
    assert_eq!(data(&mut recv).await, "still");
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
}

#[tokio::test]
async fn a_large_body_passes_windows_of_both_sides() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(grpc(proxy.address), false).unwrap();
    let size = 3 << 20;
    tokio::spawn(async move {
        let mut left = Bytes::from(vec![b'x'; size]);
        while !left.is_empty() {
            body.reserve_capacity(left.len());
            let room = poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
            body.send_data(left.split_to(room.min(left.len())), false).unwrap();
        }
        body.send_data(Bytes::new(), true).unwrap();
    });
    let mut recv = response.await.unwrap().into_body();
    let mut got = 0;
    while got < size {
        got += data(&mut recv).await.len();
    }
    assert_eq!(got, size);
    assert!(recv.data().await.is_none());
}

#[tokio::test]
async fn cookies_become_one_field_for_a_server_of_http1() {
    let proxy = Proxy::to(lab::echo().await).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let request =
        Request::get(format!("http://{}/", proxy.address)).header("cookie", "a=1").header("cookie", "b=2");
    let (response, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
    let mut recv = response.await.unwrap().into_body();
    let text = String::from_utf8(data(&mut recv).await.to_vec()).unwrap();
    assert!(text.contains("cookie: a=1; b=2\r\n"), "{text}");
}

#[tokio::test]
async fn a_connection_with_requests_under_way_is_drained_in_order() {
    let proxy = proxy(Forwarding::default()).await;
    let mut send = client(proxy.address).await.ready().await.unwrap();
    let (response, mut body) = send.send_request(grpc(proxy.address), false).unwrap();
    let mut recv = response.await.unwrap().into_body();
    proxy.worker.drain.cancel();
    body.send_data("after".into(), true).unwrap();
    assert_eq!(data(&mut recv).await, "after");
    assert_eq!(recv.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    lab::until(|| (proxy.worker.stats.connections_now.get() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_server_that_goes_away_is_connected_to_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            respond.send_response(Response::new(()), true).unwrap();
            // One request, and goodbye.
            connection.graceful_shutdown();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                respond.send_reset(Reason::REFUSED_STREAM);
            }
        }
    });
    let endpoints = in_turn(vec![target(address, Protocol::Http2)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
    let mut client = proxy.connect().await;
    for count in 1..4 {
        assert_eq!(client.ask(lab::get("/")).await.status(), 200);
        lab::until(|| (proxy.worker.stats.upstream_connections_now.get() == 0).then_some(())).await;
        assert_eq!(proxy.worker.stats.upstream_connections.get(), count);
    }
}

#[tokio::test]
async fn an_answer_before_the_requests_end_arrives_whole() {
    let early = lab::server(|_, mut client: lab::Client| async move {
        client.head().await;
        client.send("HTTP/1.1 413 x\r\nContent-Length: 5\r\n\r\nearly").await;
        client.rest().await;
    })
    .await;
    let proxy = Proxy::to(early).await;
    // Of the server, and of our own; the request's body never ends.
    for (path, status, body) in [("/", 413, "early"), ("/direct", 418, "direct")] {
        let mut send = client(proxy.address).await.ready().await.unwrap();
        let request = Request::post(format!("http://{}{path}", proxy.address)).body(()).unwrap();
        let (response, mut upload) = send.send_request(request, false).unwrap();
        upload.send_data("more to come".into(), false).unwrap();
        let response = tokio::time::timeout(lab::LONG, response).await.unwrap().expect("the response");
        assert_eq!(response.status(), status);
        let mut recv = response.into_body();
        assert_eq!(data(&mut recv).await, body);
        assert!(!matches!(recv.data().await, Some(Ok(_))));
        // And then the server says that it wants no more.
        assert_eq!(poll_fn(|cx| upload.poll_reset(cx)).await.unwrap(), Reason::NO_ERROR);
    }
}
