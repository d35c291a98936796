//! Copies of requests: all of the body, and nothing that who asks would feel.

use std::net::SocketAddr;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Protocol, Retries};

use crate::lab::{self, Client, Message, Proxy, in_turn, target, until};

/// A server that says how many bytes each body has.
async fn counting() -> SocketAddr {
    lab::server(|_, mut client: Client| async move {
        while let Some(request) = client.message().await {
            let size = request.body.len().to_string();
            client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{size}", size.len())).await;
        }
    })
    .await
}

/// A server that keeps what it gets, with the number of the connection.
async fn keeping() -> (SocketAddr, UnboundedReceiver<(usize, Option<Message>)>) {
    let (got, copies) = unbounded_channel();
    let address = lab::server(move |number, mut client: Client| {
        let got = got.clone();
        async move {
            loop {
                let request = client.message().await;
                let ended = request.is_none();
                let _ = got.send((number, request));
                if ended {
                    return;
                }
                client
                    .send("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
                    .await;
            }
        }
    })
    .await;
    (address, copies)
}

async fn next(copies: &mut UnboundedReceiver<(usize, Option<Message>)>) -> (usize, Option<Message>) {
    tokio::time::timeout(lab::LONG, copies.recv()).await.unwrap().unwrap()
}

async fn to(mirror: SocketAddr, how: Forwarding, settings: Settings) -> Proxy {
    let endpoints = in_turn(vec![target(counting().await, Protocol::Http1)]);
    Proxy::start_mirrored(mirror, how, endpoints, settings).await
}

async fn none_is_left(proxy: &Proxy) {
    until(|| (proxy.worker.stats.mirrors_now.get() == 0).then_some(())).await;
    assert_eq!(proxy.worker.held.bytes_of_copies(), 0);
}

/// Bytes of which each place is told from the next.
fn body(size: usize) -> Vec<u8> {
    (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[tokio::test]
async fn a_copy_has_all_of_the_body_however_large_and_its_answer_is_nobodys() {
    let (mirror, mut copies) = keeping().await;
    let retries = Retries { attempts: 2, reset: true, ..Retries::default() };
    for how in [Forwarding::default(), Forwarding { retries: Some(retries), ..Forwarding::default() }] {
        let proxy = to(mirror, how, Settings::default()).await;
        let mut client = proxy.connect().await;
        let mut connections = Vec::new();
        for size in [0, 4, 64 * 1024, 64 * 1024 + 1, 3 << 20] {
            let body = body(size);
            let head = format!("POST /{size} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
            let answer = client.ask([head.as_bytes(), &body].concat()).await;
            assert_eq!(answer.body, size.to_string().into_bytes());
            let (connection, copy) = next(&mut copies).await;
            let copy = copy.unwrap();
            assert!(copy.head.starts_with(&format!("POST /{size} HTTP/1.1\r\n")), "{}", copy.head);
            assert!(copy.body == body, "{size}: {} bytes", copy.body.len());
            none_is_left(&proxy).await;
            connections.push(connection);
        }
        assert!(connections.iter().all(|number| *number == connections[0]), "one is enough: {connections:?}");
        let stats = &proxy.worker.stats;
        assert_eq!((stats.mirrored.get(), stats.mirrors_cut.get(), stats.mirrors_failed.get()), (5, 0, 0));
        drop((client, proxy));
        while copies.try_recv().is_ok() {}
    }
}

#[tokio::test]
async fn a_copy_in_chunks_comes_as_the_request_comes() {
    let (got, mut copies) = unbounded_channel();
    let mirror = lab::server(move |_, mut client: Client| {
        let got = got.clone();
        async move {
            let head = client.head().await.unwrap();
            assert!(head.contains("transfer-encoding: chunked"), "{head}");
            let _ = got.send(client.exactly(8).await.unwrap());
            let _ = got.send(client.exactly(13).await.unwrap());
        }
    })
    .await;
    let proxy = to(mirror, Forwarding::default(), Settings::default()).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    assert_eq!(copies.recv().await.unwrap(), b"3\r\none\r\n");
    client.send("3\r\ntwo\r\n0\r\n\r\n").await;
    assert_eq!(copies.recv().await.unwrap(), b"3\r\ntwo\r\n0\r\n\r\n");
    assert_eq!(client.message().await.unwrap().body, b"6");
}

#[tokio::test]
async fn a_copy_of_what_the_client_does_not_end_is_seen_as_such() {
    let (mirror, mut copies) = keeping().await;
    let proxy = to(mirror, Forwarding::default(), Settings::default()).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf").await;
    until(|| (proxy.worker.stats.mirrors_now.get() == 1).then_some(())).await;
    drop(client);
    assert_eq!(next(&mut copies).await.1, None);
    none_is_left(&proxy).await;
    assert_eq!(proxy.worker.stats.mirrors_failed.get(), 0, "it is no fault of its own");
}

#[tokio::test]
async fn who_is_too_slow_for_a_copy_gets_no_more_of_it_and_nobody_waits() {
    let silent = lab::server(|_, client: Client| async move {
        tokio::time::sleep(lab::LONG).await;
        drop(client);
    })
    .await;
    let settings = Settings { mirror_limit: 100_000, ..Settings::default() };
    let proxy = to(silent, Forwarding::default(), settings).await;
    let mut client = proxy.connect().await;
    // More than the kernel takes for it.
    let (size, part) = (64 << 20, body(1 << 20));
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n")).await;
    for _ in 0..size / part.len() {
        client.send(&part).await;
    }
    assert_eq!(client.message().await.unwrap().body, size.to_string().into_bytes());
    none_is_left(&proxy).await;
    assert_eq!(proxy.worker.stats.mirrors_cut.get(), 1);
}

#[tokio::test]
async fn a_copy_is_one_however_often_the_request_is_sent() {
    let (mirror, mut copies) = keeping().await;
    let failing = lab::server(|_, mut client: Client| async move {
        client.message().await;
        client.send("HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n").await;
    })
    .await;
    let retries = Retries { attempts: 3, server_errors: true, ..Retries::default() };
    let how = Forwarding { retries: Some(retries), ..Forwarding::default() };
    let targets = [failing, failing, counting().await].map(|address| target(address, Protocol::Http1));
    let proxy = Proxy::start_mirrored(mirror, how, in_turn(targets.into()), Settings::default()).await;
    let mut client = proxy.connect().await;
    let answer = client.ask("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody").await;
    assert_eq!((answer.status(), &*answer.body), (200, &b"4"[..]));
    assert_eq!(next(&mut copies).await.1.unwrap().body, b"body");
    none_is_left(&proxy).await;
    assert_eq!(proxy.worker.stats.mirrored.get(), 1);
}

#[tokio::test]
async fn a_copy_that_nobody_answers_or_takes_touches_nobody() {
    let ended = lab::server(|_, mut client: Client| async move {
        client.head().await;
    })
    .await;
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    for mirror in [ended, nobody] {
        let proxy = to(mirror, Forwarding::default(), Settings::default()).await;
        let mut client = proxy.connect().await;
        let size = 1 << 20;
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n");
        let answer = client.ask([head.as_bytes(), &body(size)].concat()).await;
        assert_eq!(answer.body, size.to_string().into_bytes());
        none_is_left(&proxy).await;
        assert_eq!(proxy.worker.stats.mirrors_failed.get(), 1);
    }
    // As many as may be are under way.
    let settings = Settings { max_mirrors: 0, ..Settings::default() };
    let proxy = to(ended, Forwarding::default(), settings).await;
    assert_eq!(proxy.connect().await.ask(lab::get("/")).await.status(), 200);
    assert_eq!((proxy.worker.stats.mirrored.get(), proxy.worker.stats.mirrors_dropped.get()), (0, 1));
}
