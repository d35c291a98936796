//! When a request is sent again, and when not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Outcome, Protocol, Record, Retries, Timeouts};

use crate::lab::{self, Client, Proxy, get, in_turn, server, target};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn retries(attempts: u32) -> Retries {
    Retries {
        attempts,
        connect_failure: true,
        reset: true,
        gateway_errors: true,
        backoff: Some(Duration::from_millis(1)),
        ..Retries::default()
    }
}

async fn through(endpoints: Arc<lab::InTurn>, retries: Option<Retries>) -> Proxy {
    let how = Forwarding { retries, ..Forwarding::default() };
    Proxy::start(how, endpoints, Settings::default()).await
}

fn flags(record: &Record) -> String {
    format!("{}{}", if record.retries_exhausted { "URX," } else { "" }, record.flag)
}

async fn refusing() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn another_endpoint_takes_what_one_refuses() {
    let endpoints =
        in_turn(vec![target(refusing().await, Protocol::Http1), target(lab::echo().await, Protocol::Http1)]);
    let proxy = through(Arc::clone(&endpoints), Some(retries(1))).await;
    let response = proxy.connect().await.ask(get("/")).await;
    assert_eq!(response.status(), 200);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.tries, flags(record).as_str()), (2, "-"));
    // Told of before the record is written.
    assert_eq!(*endpoints.ended.lock().unwrap(), [Some(Outcome::Failed), Some(Outcome::Status(200))]);
}

#[tokio::test]
async fn what_no_endpoint_takes_is_answered_with_503_and_its_flags() {
    for (attempts, expected, tries) in [(0, "UF", 1), (2, "URX,UF", 3)] {
        let endpoints = in_turn(vec![target(refusing().await, Protocol::Http1)]);
        let proxy = through(endpoints, Some(retries(attempts))).await;
        assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
        let record = &proxy.wait_records(1).await[0];
        assert_eq!((flags(record).as_str(), record.tries), (expected, tries));
    }
    let proxy = through(in_turn(vec![]), None).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
    assert_eq!(flags(&proxy.wait_records(1).await[0]), "UH");
}

/// A server whose connections do in turn what `acts` say after the request's head: end, or answer.
async fn acting(acts: &'static [&'static str]) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&asked);
    let address = server(move |_, mut client: Client| {
        let asked = Arc::clone(&counting);
        async move {
            while client.message().await.is_some() {
                let act = acts.get(asked.fetch_add(1, Ordering::SeqCst)).copied().unwrap_or(OK);
                client.send(act).await;
                if act.is_empty() {
                    return;
                }
            }
        }
    })
    .await;
    (address, asked)
}

async fn asked_of(acts: &'static [&'static str], retries: Option<Retries>, request: &str) -> (u16, usize) {
    let (address, asked) = acting(acts).await;
    let proxy = through(in_turn(vec![target(address, Protocol::Http1)]), retries).await;
    let status = proxy.connect().await.ask(request).await.status();
    (status, asked.load(Ordering::SeqCst))
}

const UNAVAILABLE: &str = "HTTP/1.1 503 x\r\nContent-Length: 1\r\n\r\nx";
const NOT_FOUND: &str = "HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n";

#[tokio::test]
async fn resets_and_statuses_are_tried_again_as_the_route_says() {
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab";
    assert_eq!(asked_of(&["", ""], Some(retries(2)), &get("/")).await, (200, 3));
    assert_eq!(asked_of(&["", ""], Some(retries(1)), &get("/")).await, (503, 2));
    assert_eq!(asked_of(&[""], None, &get("/")).await, (503, 1));
    assert_eq!(asked_of(&[UNAVAILABLE], Some(retries(1)), post).await, (200, 2));
    assert_eq!(asked_of(&[UNAVAILABLE], None, post).await, (503, 1));
    assert_eq!(asked_of(&[NOT_FOUND], Some(retries(1)), post).await, (404, 1));
    let on_404 = Retries { statuses: vec![404], ..retries(1) };
    assert_eq!(asked_of(&[NOT_FOUND], Some(on_404), post).await, (200, 2));
}

#[tokio::test]
async fn a_body_is_sent_again_whole_and_one_that_is_too_large_is_not() {
    let (address, asked) = acting(&[UNAVAILABLE, UNAVAILABLE]).await;
    let echo = lab::echo().await;
    let endpoints = in_turn(vec![target(address, Protocol::Http1), target(echo, Protocol::Http1)]);
    let proxy = through(endpoints, Some(retries(1))).await;
    let body = "x".repeat(60_000);
    let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let response = proxy.connect().await.ask(request).await;
    assert!(String::from_utf8(response.body).unwrap().ends_with(&body));
    let body = "x".repeat(100_000);
    let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    assert_eq!(proxy.connect().await.ask(request).await.status(), 503);
    assert_eq!(proxy.worker.stats.retries_without_body.get(), 1);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn nothing_is_tried_again_once_the_response_has_begun() {
    let proxy_and = |acts| async move {
        let (address, asked) = acting(acts).await;
        (through(in_turn(vec![target(address, Protocol::Http1)]), Some(retries(3))).await, asked)
    };
    let address = server(|_, mut client: Client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort").await;
    })
    .await;
    let proxy = through(in_turn(vec![target(address, Protocol::Http1)]), Some(retries(3))).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    assert_eq!(client.message().await, None);
    assert_eq!(proxy.wait_records(1).await[0].tries, 1);
    let (proxy, asked) = proxy_and(&[OK]).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 200);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

/// A server that answers one request on each connection, reads another, and ends.
async fn once_each() -> std::net::SocketAddr {
    server(|_, mut client: Client| async move {
        client.message().await;
        client.send(OK).await;
        client.message().await;
    })
    .await
}

#[tokio::test]
async fn a_connection_that_ends_as_it_is_used_again_costs_no_request_that_may_be_repeated() {
    let proxy = through(in_turn(vec![target(once_each().await, Protocol::Http1)]), None).await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        assert_eq!(client.ask(get("/")).await.status(), 200);
    }
    let records = proxy.wait_records(3).await;
    assert!(records.iter().all(|r| r.tries == 1 && r.flag.to_string() == "-"), "{records:?}");
    // Whether a POST was acted on nobody knows.
    let response = client.ask("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(response.status(), 503);
    assert_eq!(flags(&proxy.wait_records(4).await[3]), "UC");
}

#[tokio::test]
async fn the_free_try_after_a_dead_connection_has_no_pause() {
    // What a request without a route gets, but for the pause, which would be seen.
    let default = Retries {
        attempts: 2,
        connect_failure: true,
        refused_stream: true,
        backoff: Some(Duration::MAX),
        ..Retries::default()
    };
    let proxy = through(in_turn(vec![target(once_each().await, Protocol::Http1)]), Some(default)).await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        let response = tokio::time::timeout(Duration::from_secs(5), client.ask(get("/"))).await;
        assert_eq!(response.expect("a pause").status(), 200);
    }
    let records = proxy.wait_records(3).await;
    assert!(records.iter().all(|r| r.tries == 1 && r.flag.to_string() == "-"), "{records:?}");
}

#[tokio::test]
async fn an_idle_connection_that_has_ended_is_not_used() {
    let address = server(|_, mut client: Client| async move {
        client.message().await;
        client.send(OK).await;
    })
    .await;
    let proxy = through(in_turn(vec![target(address, Protocol::Http1)]), None).await;
    let mut client = proxy.connect().await;
    for count in 1..4 {
        // Not idempotent: were it sent on the old connection, it would fail.
        let response = client.ask("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(response.status(), 200);
        lab::until(|| (proxy.records().len() == count).then_some(())).await;
        // For the server's FIN to arrive.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn each_try_has_its_time_and_all_of_them_have_theirs() {
    let silent = server(|_, mut client: Client| async move {
        client.rest().await;
    })
    .await;
    let timeouts = Timeouts { per_try: Some(Duration::from_millis(30)), ..Timeouts::default() };
    let how = Forwarding { timeouts, retries: Some(retries(1)), ..Forwarding::default() };
    let endpoints =
        in_turn(vec![target(silent, Protocol::Http1), target(lab::echo().await, Protocol::Http1)]);
    let proxy = Proxy::start(how, endpoints, Settings::default()).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 200);
    let how = Forwarding { timeouts, retries: Some(retries(1)), ..Forwarding::default() };
    let endpoints = in_turn(vec![target(silent, Protocol::Http1)]);
    let proxy = Proxy::start(how, endpoints, Settings::default()).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 504);
    assert_eq!(flags(&proxy.wait_records(1).await[0]), "URX,UT");
    let timeouts = Timeouts { request: Some(Duration::from_millis(80)), ..timeouts };
    let how = Forwarding { timeouts, retries: Some(retries(1000)), ..Forwarding::default() };
    let proxy = Proxy::start(how, in_turn(vec![target(silent, Protocol::Http1)]), Settings::default()).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 504);
    assert_eq!(flags(&proxy.wait_records(1).await[0]), "UT");
}

#[tokio::test]
async fn connections_to_an_endpoint_are_limited() {
    let silent = server(|_, mut client: Client| async move {
        client.rest().await;
    })
    .await;
    let mut settings = Settings::default();
    settings.pool.max_connections = 1;
    let proxy =
        Proxy::start(Forwarding::default(), in_turn(vec![target(silent, Protocol::Http1)]), settings).await;
    let mut first = proxy.connect().await;
    first.send(get("/")).await;
    lab::until(|| (proxy.worker.stats.upstream_connections_now.get() == 1).then_some(())).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
    assert_eq!(flags(&proxy.wait_records(1).await[0]), "UO");
    drop(first);
    lab::until(|| (proxy.worker.stats.upstream_connections_now.get() == 0).then_some(())).await;
}
