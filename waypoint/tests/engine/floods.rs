//! Clients of HTTP/2 that cost more than they pay: what they can make the proxy do has a limit, and others are served.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Protocol};

use crate::lab::{self, Client, Proxy, get, in_turn, target, until};
use crate::raw_h2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, End, GOAWAY, HEADERS, PING, RST_STREAM, Raw, SETTINGS,
    WINDOW_UPDATE, block, frame, request,
};

/// Whoever comes next is served, and nothing is left of the one before.
async fn others_are_served(proxy: &Proxy) {
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 200);
    until(|| (proxy.worker.stats.requests_now.get() == 0).then_some(())).await;
}

/// A server that never answers what is not `/`, and counts.
async fn mute() -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&asked);
    let address = lab::server(move |_, mut client: Client| {
        let asked = Arc::clone(&counting);
        async move {
            while let Some(head) = client.head().await {
                asked.fetch_add(1, Ordering::SeqCst);
                if head.starts_with("GET / ") {
                    client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
                }
            }
        }
    })
    .await;
    (address, asked)
}

#[tokio::test]
async fn streams_that_are_opened_and_reset_are_counted() {
    let (address, asked) = mute().await;
    let proxy = Proxy::to(address).await;
    let mut client = Raw::connect(&proxy, &[]).await;
    let fields = request("GET", "/x", &[]);
    let mut sent = 0;
    for stream in (0..50_000).map(|n| 2 * n + 1) {
        let head = frame(HEADERS, END_HEADERS | END_STREAM, stream, &fields);
        let reset = frame(RST_STREAM, 0, stream, &8u32.to_be_bytes());
        if !client.send(&[head, reset].concat()).await {
            break;
        }
        sent += 1;
    }
    assert!(sent < 50_000, "it was let do so");
    assert!(asked.load(Ordering::SeqCst) < 10_000, "and the server paid for it");
    others_are_served(&proxy).await;
}

#[tokio::test]
async fn a_head_that_goes_on_and_on_is_ended() {
    let proxy = Proxy::to(lab::echo().await).await;
    for part in [&[][..], &block(&[(b"x-more", &[b'y'; 1000])])] {
        let mut client = Raw::connect(&proxy, &[]).await;
        client.send(&frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[]))).await;
        let sent = client.send_until_full(&frame(CONTINUATION, 0, 1, part), 64 << 20).await;
        assert!(sent < 32 << 20, "{sent} bytes were taken");
        assert_ne!(client.end_of(1).await, End::Answered);
    }
    assert_eq!(proxy.worker.stats.requests.get(), 0);
    others_are_served(&proxy).await;
}

#[tokio::test]
async fn a_head_that_does_not_end_is_not_waited_for() {
    let settings = Settings { head_timeout: Duration::from_millis(200), ..Settings::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, Protocol::Http1)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, settings).await;
    let open = frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[]));
    for (part, given_up) in [(&open[..], 1), (&open[..12], 2)] {
        let mut client = Raw::connect(&proxy, &[]).await;
        client.send(part).await;
        // Nothing is said in between: that would be no HTTP/2.
        while client.next().await.is_some() {}
        assert_eq!(proxy.worker.stats.heads_timed_out.get(), given_up);
    }
    others_are_served(&proxy).await;
}

#[tokio::test]
async fn few_bytes_that_stand_for_many_are_refused() {
    let proxy = Proxy::to(lab::echo().await).await;
    // A field of 4,000 bytes, put in the table once and named 10,000 times: 40 MB of a head of 14 kB.
    let mut fields = request("GET", "/bomb", &[]);
    fields.push(0x40);
    fields.extend_from_slice(b"\x01x\x7f\xa1\x1e");
    fields.resize(fields.len() + 127 + 0x21 + 0x1e * 128, b'y');
    fields.resize(fields.len() + 10_000, 0x80 | 62);
    let mut client = Raw::connect(&proxy, &[]).await;
    client.ask(1, &fields).await;
    assert!(proxy.records().iter().all(|record| record.target.is_none()), "it was passed on");
    // A field beyond what a head may have, and too many of them.
    let many: Vec<(&[u8], &[u8])> = vec![(b"x", b"y"); 101];
    let large: Vec<(&[u8], &[u8])> = vec![(b"x", &[b'y'; 15_000]); 5];
    for fields in [request("GET", "/", &many), request("GET", "/", &large)] {
        let mut client = Raw::connect(&proxy, &[]).await;
        let parts: Vec<&[u8]> = fields.chunks(16_000).collect();
        client
            .send(&frame(HEADERS, END_STREAM | if parts.len() == 1 { END_HEADERS } else { 0 }, 1, parts[0]))
            .await;
        for (at, part) in parts.iter().enumerate().skip(1) {
            let last = if at + 1 == parts.len() { END_HEADERS } else { 0 };
            client.send(&frame(CONTINUATION, last, 1, part)).await;
        }
        client.end_of(1).await;
    }
    assert!(proxy.records().is_empty(), "{:?}", proxy.records());
    others_are_served(&proxy).await;
}

#[tokio::test]
async fn frames_that_want_an_answer_are_not_collected() {
    let proxy = Proxy::to(lab::echo().await).await;
    for asks in [frame(PING, 0, 0, &[0; 8]), frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9])] {
        // Nothing is read of what it answers.
        let mut client = Raw::connect(&proxy, &[]).await;
        let sent = client.send_until_full(&asks.repeat(1000), 256 << 20).await;
        assert!(sent < 128 << 20, "{sent} bytes of questions were taken");
    }
    // A window beyond its limit, an empty increment, and settings that are none.
    for (bad, stream) in [
        (frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes()), 0),
        (frame(WINDOW_UPDATE, 0, 0, &[0; 4]), 0),
        (frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff]), 0),
        (frame(SETTINGS, 0, 0, &[0; 5]), 0),
        (frame(DATA, 0, 1, b"of no stream"), 1),
        (frame(HEADERS, END_HEADERS, 2, &request("GET", "/", &[])), 2),
    ] {
        let mut client = Raw::connect(&proxy, &[]).await;
        client.send(&bad).await;
        assert_eq!(client.end_of(stream).await, End::Away);
    }
    others_are_served(&proxy).await;
}

/// Sends without end, and says how much.
async fn endless(sent: Arc<AtomicUsize>) -> std::net::SocketAddr {
    lab::server(move |_, mut client: Client| {
        let sent = Arc::clone(&sent);
        async move {
            let Some(head) = client.head().await else { return };
            if head.starts_with("GET / ") {
                return client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            }
            client.send("HTTP/1.1 200 OK\r\n\r\n").await;
            let block = [b'x'; 16 * 1024];
            while tokio::io::AsyncWriteExt::write_all(&mut client.stream, &block).await.is_ok() {
                sent.fetch_add(block.len(), Ordering::SeqCst);
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_client_that_stops_reading_holds_up_its_servers_and_is_given_up() {
    let sent = Arc::new(AtomicUsize::new(0));
    let endpoints = in_turn(vec![target(endless(Arc::clone(&sent)).await, Protocol::Http1)]);
    let settings = Settings { stream_idle_timeout: Duration::from_millis(500), ..Settings::default() };
    let proxy = Proxy::start(Forwarding::default(), endpoints, settings).await;
    // The largest window on each stream; the connection has its 64 KiB.
    let mut client = Raw::connect(&proxy, &[(4, 0x7fff_ffff)]).await;
    for stream in [1, 3, 5, 7] {
        client
            .send(&frame(HEADERS, END_HEADERS | END_STREAM, stream, &request("GET", "/endless", &[])))
            .await;
    }
    let records = proxy.wait_records(4).await;
    assert!(records.iter().all(|record| record.flag.to_string() == "SI"), "{records:?}");
    // Each way has its buffers, of the kernel and of ours.
    assert!(sent.load(Ordering::SeqCst) < 64 << 20, "{} bytes wait for nobody", sent.load(Ordering::SeqCst));
    others_are_served(&proxy).await;
}

#[tokio::test]
async fn an_idle_client_that_answers_no_ping_keeps_no_place() {
    let short = Duration::from_millis(300);
    let settings = Settings { idle_timeout: short, head_timeout: short, ..Settings::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, Protocol::Http1)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, settings).await;
    let mut client = Raw::connect(&proxy, &[]).await;
    // It is asked whether anything is under way, and says nothing.
    let mut asked = false;
    while let Some(frame) = client.next().await {
        asked |= frame.kind == GOAWAY;
    }
    assert!(asked && proxy.worker.stats.idle_closed.get() == 1);
}

#[tokio::test]
async fn an_answer_of_our_own_that_is_not_taken_is_given_up() {
    let settings = Settings { stream_idle_timeout: Duration::from_millis(500), ..Settings::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, Protocol::Http1)]);
    let proxy = Proxy::start(Forwarding::default(), endpoints, settings).await;
    // No window at all.
    let mut client = Raw::connect(&proxy, &[(4, 0)]).await;
    client.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &request("GET", "/direct", &[]))).await;
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.status, &*record.flag.to_string()), (418, "SI"));
    // HTTP/1.1: requests whose answers nobody reads.
    let mut client = proxy.connect().await;
    let many = get("/direct").repeat(20_000);
    let write = tokio::io::AsyncWriteExt::write_all(&mut client.stream, many.as_bytes());
    let _ = tokio::time::timeout(Duration::from_secs(2), write).await;
    until(|| (proxy.worker.stats.connections_now.get() == 1).then_some(())).await;
    others_are_served(&proxy).await;
}
