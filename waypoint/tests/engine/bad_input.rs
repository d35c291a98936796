//! What is no HTTP, too large or too slow.

use std::time::Duration;

use waypoint::http::Settings;

use crate::lab::{self, Client, Proxy, get, in_turn, target};

fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.extend_from_slice(c.to_string().as_bytes());
            continue;
        }
        out.push(match chars.next().unwrap() {
            'r' => b'\r',
            'n' => b'\n',
            't' => b'\t',
            '0' => 0,
            '\\' => b'\\',
            'x' => u8::from_str_radix(&chars.by_ref().take(2).collect::<String>(), 16).unwrap(),
            other => panic!("an unknown escape {other}"),
        });
    }
    out
}

pub fn corpus() -> Vec<(u16, Vec<u8>, &'static str)> {
    let lines =
        include_str!("../cases/requests.txt").lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let (status, text) = line.split_once(" | ").unwrap();
            (status.parse().unwrap(), unescape(text), line)
        })
        .collect()
}

#[tokio::test]
async fn each_request_of_the_corpus_gets_its_answer_and_no_second_one_is_smuggled() {
    let proxy = Proxy::to(lab::echo().await).await;
    for (status, request, line) in corpus() {
        let mut client = proxy.connect().await;
        client.send(&request).await;
        let head = client.head().await.unwrap_or_else(|| panic!("no response to {line}"));
        let response = client.body(head, request.starts_with(b"HEAD ")).await.unwrap();
        assert_eq!(response.status(), status, "{line}");
        if status == 200 {
            // The connection is where it should be: the next request is the next one.
            let next = client.ask(get("/next")).await;
            assert!(next.body.starts_with(b"GET /next HTTP/1.1\r\n"), "{line}: {next:?}");
        } else {
            assert_eq!(response.field("connection"), Some("close"), "{line}");
            assert_eq!(client.rest().await, b"", "{line}");
        }
    }
}

#[tokio::test]
async fn heads_beyond_the_limits_are_answered_with_431() {
    let proxy = Proxy::to(lab::echo().await).await;
    let many: String = (0..120).map(|i| format!("x{i}: y\r\n")).collect();
    let large = format!("x: {}\r\n", "y".repeat(61 * 1024));
    for fields in [many, large] {
        let mut client = proxy.connect().await;
        let response = client.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).await;
        assert_eq!(response.status(), 431);
    }
}

async fn impatient() -> Proxy {
    let settings = Settings { head_timeout: Duration::from_millis(100), ..Settings::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, waypoint::http::decide::Protocol::Http1)]);
    Proxy::start(waypoint::http::decide::Forwarding::default(), endpoints, settings).await
}

#[tokio::test]
async fn a_head_that_trickles_in_is_given_up() {
    let proxy = impatient().await;
    let mut client = proxy.connect().await;
    // One that was served before, and one that was not.
    client.ask(get("/")).await;
    client.send("GET / HTTP/1.1\r\nHo").await;
    assert_eq!(client.message().await.unwrap().status(), 408);
    assert_eq!(proxy.worker.stats.heads_timed_out.get(), 1);
    let mut client = proxy.connect().await;
    client.send("PRI * HT").await;
    assert_eq!(client.rest().await, b"");
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed() {
    let settings = Settings { max_connections: 1, ..Settings::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, waypoint::http::decide::Protocol::Http1)]);
    let proxy = Proxy::start(waypoint::http::decide::Forwarding::default(), endpoints, settings).await;
    let mut first = proxy.connect().await;
    first.ask(get("/")).await;
    let mut second = proxy.connect().await;
    assert_eq!(second.rest().await, b"");
    assert_eq!(proxy.worker.stats.connections_refused.get(), 1);
    drop(first);
    lab::until(|| (proxy.worker.stats.connections_now.get() == 0).then_some(())).await;
}

/// An upstream's response that is no HTTP.
async fn answered_with(bytes: &'static str) -> (u16, Proxy) {
    let address = lab::server(move |_, mut client: Client| async move {
        client.head().await;
        client.send(bytes).await;
        client.rest().await;
    })
    .await;
    let proxy = Proxy::to(address).await;
    let status = proxy.connect().await.ask(get("/")).await.status();
    (status, proxy)
}

#[tokio::test]
async fn an_upstream_that_says_two_things_at_once_gets_502() {
    for bytes in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 1\n\nx",
        "hello\r\n\r\n",
    ] {
        let (status, proxy) = answered_with(bytes).await;
        assert_eq!(status, 502, "{bytes:?}");
        assert_eq!(proxy.records()[0].flag.to_string(), "UPE");
    }
}

#[tokio::test]
async fn many_words_before_a_response_are_too_many() {
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        client.send("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n".repeat(1000)).await;
        client.rest().await;
    })
    .await;
    let answer = async |address| {
        let mut client = Proxy::to(address).await.connect().await;
        client.send(get("/")).await;
        client.answer().await.unwrap().status()
    };
    assert_eq!(answer(address).await, 502);
    // However slowly they come.
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        for _ in 0..20 {
            client.send("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n").await;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        client.send("HTTP/1.1 204 x\r\n\r\n").await;
        client.rest().await;
    })
    .await;
    assert_eq!(answer(address).await, 502);
}

#[tokio::test]
async fn idle_connections_hold_no_buffers() {
    let proxy = Proxy::to(lab::echo().await).await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = proxy.connect().await;
        client.ask(get("/")).await;
        clients.push(client);
    }
    // All of them went through few.
    assert!(proxy.worker.free_buffers() <= 4);
}
