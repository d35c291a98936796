//! What a try may take and hold: what is sent again and what is not, times, and bytes in memory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Measured, Outcome, Protocol, Retries, Timeouts};
use waypoint::http::held::HeldLimits;

use crate::lab::{self, Client, Proxy, get, in_turn, server, target};
use crate::raw_h2::{DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, SETTINGS, frame};

const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";

/// What a request without a route of its own gets.
fn by_default() -> Retries {
    Retries {
        attempts: 2,
        connect_failure: true,
        refused_stream: true,
        backoff: Some(Duration::from_millis(1)),
        ..Retries::default()
    }
}

async fn through(targets: Vec<SocketAddr>, protocol: Protocol, how: Forwarding) -> Proxy {
    let targets = targets.into_iter().map(|address| target(address, protocol)).collect();
    Proxy::start(how, in_turn(targets), Settings::default()).await
}

/// A server of HTTP/2 that says `answer` to each request.
async fn saying(answer: Vec<u8>) -> (SocketAddr, Arc<AtomicUsize>) {
    saying_in_turn(vec![answer]).await
}

/// A server of HTTP/2 that says one of `answers` after the other to the requests of each connection, the last to all that
/// come then; or ends the connection, where that is nothing.
async fn saying_in_turn(answers: Vec<Vec<u8>>) -> (SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&asked);
    let address = server(move |_, mut client: Client| {
        let (answers, asked) = (answers.clone(), Arc::clone(&counting));
        async move {
            let mut answers = answers.iter().peekable();
            client.exactly(24).await;
            client.send(frame(SETTINGS, 0, 0, &[])).await;
            while let Some(head) = client.exactly(9).await {
                let length = usize::from(head[1]) << 8 | usize::from(head[2]);
                client.exactly(length).await;
                if head[3] == HEADERS {
                    asked.fetch_add(1, Ordering::SeqCst);
                    let Some(answer) = answers.peek().copied().filter(|answer| !answer.is_empty()) else {
                        return;
                    };
                    client.send(answer).await;
                    if answers.len() > 1 {
                        answers.next();
                    }
                }
            }
        }
    })
    .await;
    (address, asked)
}

fn ok() -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x88])
}

#[tokio::test]
async fn a_request_that_a_server_may_have_seen_is_not_sent_again_for_a_goaway() {
    let goaway =
        |last: u32, code: u32| frame(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat());
    let how = || Forwarding { retries: Some(by_default()), ..Forwarding::default() };
    for (answer, status, what) in [
        (goaway(0, 0), 200, "counted out in good order"),
        // We end the connection: a frame of data belongs to a stream.
        (frame(DATA, 0, 0, b"x"), 503, "a fault of the server's"),
        (goaway(0, 2), 503, "a server with a fault"),
    ] {
        let ((first, asked), (second, again)) = (saying(answer).await, saying(ok()).await);
        let proxy = through(vec![first, second], Protocol::Http2, how()).await;
        assert_eq!(proxy.connect().await.ask(POST).await.status(), status, "{what}");
        assert_eq!(asked.load(Ordering::SeqCst), 1, "{what}");
        assert_eq!(again.load(Ordering::SeqCst), usize::from(status == 200), "{what}");
    }
}

#[tokio::test]
async fn a_connection_of_http2_that_was_used_before_is_no_reason_to_send_anything_again() {
    let goaway =
        |last: u32, code: u32| frame(GOAWAY, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat());
    let none = Retries { attempts: 0, ..by_default() };
    let [get, put] =
        ["GET", "PUT"].map(|method| format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"));
    for (answer, what) in [(goaway(0, 2), "a server with a fault"), (Vec::new(), "a connection that ends")] {
        for (request, retries) in [(&get, None), (&put, Some(none.clone())), (&put, Some(by_default()))] {
            // All requests of the client go by one connection.
            let (address, asked) = saying_in_turn(vec![ok(), answer.clone()]).await;
            let endpoints = in_turn(vec![target(address, Protocol::Http2)]);
            let how = Forwarding { retries, ..Forwarding::default() };
            let proxy = Proxy::start(how, Arc::clone(&endpoints) as _, Settings::default()).await;
            let mut client = proxy.connect().await;
            assert_eq!(client.ask(&**request).await.status(), 200);
            assert_eq!(client.ask(&**request).await.status(), 503, "{what}");
            assert_eq!(asked.load(Ordering::SeqCst), 2, "{what}: {request}");
            proxy.wait_records(2).await;
            // It counts against the endpoint.
            let ended = endpoints.ended.lock().unwrap().clone();
            assert_eq!(ended, [Some(Outcome::Status(200)), Some(Outcome::Failed)], "{what}: {request}");
        }
    }
    // What it has said not to have looked at goes elsewhere.
    let (address, asked) = saying_in_turn(vec![ok(), goaway(1, 0)]).await;
    let proxy = through(
        vec![address],
        Protocol::Http2,
        Forwarding { retries: Some(by_default()), ..Forwarding::default() },
    )
    .await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        assert_eq!(client.ask(&*put).await.status(), 200);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn an_answer_that_says_it_is_too_much_is_tried_again_only_where_that_is_said() {
    let limited = "HTTP/1.1 503 x\r\nX-Envoy-RateLimited: true\r\nContent-Length: 0\r\n\r\n";
    for (rate_limited, status) in [(false, 503), (true, 200)] {
        let address = server(move |_, mut client: Client| async move {
            client.message().await;
            client.send(limited).await;
            client.rest().await;
        })
        .await;
        let retries = Retries { server_errors: true, gateway_errors: true, rate_limited, ..by_default() };
        let how = Forwarding { retries: Some(retries), ..Forwarding::default() };
        let proxy = through(vec![address, lab::echo().await], Protocol::Http1, how).await;
        assert_eq!(proxy.connect().await.ask(get("/")).await.status(), status);
    }
}

#[tokio::test]
async fn another_try_goes_to_another_host_unless_any_will_do() {
    let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (same_hosts, status) in [(false, 200), (true, 503)] {
        let how =
            Forwarding { retries: Some(Retries { same_hosts, ..by_default() }), ..Forwarding::default() };
        // The lab's endpoints take their turn by what was tried.
        let proxy = through(vec![refusing, lab::echo().await], Protocol::Http1, how).await;
        assert_eq!(proxy.connect().await.ask(get("/")).await.status(), status);
    }
}

fn within(request: Option<u64>, per_try: Option<u64>, measured: Measured) -> Forwarding {
    let time = |millis: Option<u64>| millis.map(Duration::from_millis);
    let timeouts =
        Timeouts { request: time(request), per_try: time(per_try), measured, ..Timeouts::default() };
    Forwarding { timeouts, ..Forwarding::default() }
}

#[tokio::test]
async fn a_trys_time_is_to_the_last_byte_or_to_the_head() {
    let slow = server(|_, mut client: Client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        client.send("cd").await;
        client.rest().await;
    })
    .await;
    for (measured, whole) in [(Measured::Whole, false), (Measured::Response, true)] {
        let proxy = through(vec![slow], Protocol::Http1, within(None, Some(200), measured)).await;
        let mut client = proxy.connect().await;
        client.send(get("/")).await;
        assert_eq!(client.message().await.is_some(), whole, "{measured:?}");
        let expected = if whole { "-" } else { "UT" };
        assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), expected);
    }
}

#[tokio::test]
async fn a_routes_time_begins_with_the_request_or_when_that_is_whole() {
    for (measured, status) in [(Measured::Whole, 504), (Measured::Response, 200)] {
        let echo = lab::echo().await;
        let proxy = through(vec![echo], Protocol::Http1, within(Some(200), Some(200), measured)).await;
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        // It may have been answered already.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut client.stream, b"ab").await;
        assert_eq!(client.message().await.unwrap().status(), status, "{measured:?}");
    }
    let silent = server(|_, mut client: Client| async move { drop(client.rest().await) }).await;
    let proxy = through(vec![silent], Protocol::Http1, within(Some(50), None, Measured::Response)).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 504, "it does begin");
}

#[tokio::test]
async fn what_has_switched_is_under_no_limit_of_its_route() {
    let address = server(|_, mut client: Client| async move {
        client.head().await;
        client
            .send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            .await;
        let all = client.rest().await;
        client.send(all).await;
    })
    .await;
    for measured in [Measured::Whole, Measured::Response] {
        let proxy = through(vec![address], Protocol::Http1, within(Some(300), Some(300), measured)).await;
        let mut client = proxy.connect().await;
        client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
        assert!(client.head().await.unwrap().starts_with("HTTP/1.1 101 "));
        tokio::time::sleep(Duration::from_millis(700)).await;
        client.send("still here").await;
        tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await.unwrap();
        assert_eq!(client.rest().await, b"still here", "{measured:?}");
    }
}

#[tokio::test]
async fn what_a_client_makes_us_hold_is_limited() {
    // It reads nothing, so that all waits here.
    let deaf = server(|_, client: Client| async move {
        tokio::time::sleep(lab::LONG).await;
        drop(client);
    })
    .await;
    for (client, cut) in [(70 << 10, true), (100 << 20, false)] {
        let settings = Settings {
            held: HeldLimits { all: 100 << 20, client },
            stream_idle_timeout: Duration::from_secs(4),
            ..Settings::default()
        };
        let endpoints = in_turn(vec![target(deaf, Protocol::Http1)]);
        let proxy = Proxy::start(Forwarding::default(), endpoints, settings).await;
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n").await;
        let body = vec![0; 1 << 20];
        let mut sent = 0;
        while sent < 64 << 20 {
            let write = tokio::io::AsyncWriteExt::write(&mut client.stream, &body);
            match tokio::time::timeout(Duration::from_secs(1), write).await {
                Ok(Ok(count)) => sent += count,
                Ok(Err(_)) | Err(_) => break,
            }
        }
        let held = Arc::clone(&proxy.worker.held);
        if cut {
            let record = &proxy.wait_records(1).await[0];
            assert_eq!((record.status, record.flag.to_string().as_str()), (503, "OM"));
            assert_eq!(held.cut.get(), 1);
            lab::until(|| (held.bytes() == 0).then_some(())).await;
            assert_eq!(proxy.connect().await.ask(get("/direct")).await.status(), 418, "room again");
        } else {
            assert!(sent < 64 << 20, "the client is held up");
            assert!(held.bytes() > 64 << 10, "{}", held.bytes());
            drop(client);
            lab::until(|| (held.bytes() == 0).then_some(())).await;
        }
    }
}

#[tokio::test]
async fn first_requests_share_a_connection_of_http2() {
    let address = crate::h2::echo().await;
    let proxy = through(vec![address], Protocol::Http2, Forwarding::default()).await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = proxy.connect().await;
        clients.push(async move { client.ask(get("/trailers-only")).await.status() });
    }
    let all: Vec<_> = clients.into_iter().map(tokio::spawn).collect();
    for one in all {
        assert_eq!(one.await.unwrap(), 200);
    }
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
}

#[tokio::test]
async fn connections_of_bytes_are_limited_by_their_destination() {
    let address = lab::echo().await;
    let pool = model::http::ConnectionPool { max_connections: Some(1), ..Default::default() };
    let circuit = waypoint::upstream::circuit::Circuit::new(&pool, None);
    let mut to = (*target(address, Protocol::Http1)).clone();
    to.circuit = Some(Arc::clone(&circuit));
    let open = || waypoint::upstream::pool::open(&to, lab::LONG);
    let first = open().await.unwrap();
    assert!(matches!(open().await, Err(waypoint::upstream::pool::PoolError::Overflow(1))));
    assert_eq!(circuit.counts().connections_refused, 1);
    drop(first);
    assert!(open().await.is_ok());
}

/// A server that takes no body.
pub async fn takes_nothing() -> SocketAddr {
    server(|_, mut client: Client| async move {
        let _ = client.head().await;
        std::future::pending::<()>().await;
    })
    .await
}

/// As much as is taken; none is for a second then.
pub async fn fill(client: &mut (impl tokio::io::AsyncWrite + Unpin)) {
    let data = [b'x'; 64 * 1024];
    while let Ok(sent) = tokio::time::timeout(Duration::from_secs(1), client.write_all(&data)).await {
        sent.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_nobody_takes_its_body_is_noticed() {
    let proxy = through(vec![takes_nothing().await], Protocol::Http1, Forwarding::default()).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n";
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(head.as_bytes()).await.unwrap();
    fill(&mut client).await;
    assert!(proxy.records().is_empty());
    // As when the program is killed: behind what nobody takes, an end in good order does not arrive.
    client.set_zero_linger().unwrap();
    drop(client);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.status, &*record.flag.to_string()), (0, "DC"));

    // A stream of HTTP/2 on a connection that stays.
    let client = TcpStream::connect(proxy.address).await.unwrap();
    let (sender, connection) = h2::client::handshake(client).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = http::Request::post("http://a/").body(()).unwrap();
    let (_response, mut body) = sender.ready().await.unwrap().send_request(request, false).unwrap();
    loop {
        body.reserve_capacity(16 * 1024);
        let room = std::future::poll_fn(|cx| body.poll_capacity(cx));
        let Ok(room) = tokio::time::timeout(Duration::from_secs(1), room).await else { break };
        body.send_data(vec![b'x'; room.unwrap().unwrap()].into(), false).unwrap();
    }
    assert_eq!(proxy.records().len(), 1);
    body.send_reset(h2::Reason::CANCEL);
    let record = &proxy.wait_records(2).await[1];
    assert_eq!((record.status, &*record.flag.to_string()), (0, "DC"));
    driver.abort();
}
