//! What a server does with peers that break the protocol, stall, or flood. In each case the connection ends with a
//! reason or the stream with an answer, nothing panics, and no memory piles up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hbone::{Closed, Flood, Incoming, ServerSettings, StatusCode, TunnelHeaders};
use support::raw::*;
use support::{Handler, echo, hostile, hostile_over};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

/// The error codes of RFC 9113 section 7 that are asked for here.
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Keeps requests without answering them.
fn hold() -> (Handler, Arc<AtomicUsize>) {
    let held = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&most);
    let handler = move |incoming: Incoming| {
        let now = held.fetch_add(1, Ordering::SeqCst) + 1;
        most.fetch_max(now, Ordering::SeqCst);
        let held = Arc::clone(&held);
        tokio::spawn(async move {
            sleep(Duration::from_secs(5)).await;
            held.fetch_sub(1, Ordering::SeqCst);
            incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, &TunnelHeaders::default());
        });
    };
    (Arc::new(handler), seen)
}

#[tokio::test(start_paused = true)]
async fn what_is_not_http2_is_closed_with_the_reason() {
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0; 100],
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    ] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        raw.io.write_all(bytes).await.unwrap();
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::NotHttp2(_)), "{closed:?}");
        assert_eq!(served.counters.handshakes_failed.get(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_closed_after_ten_seconds() {
    for part in [0, 1, 23] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        let start = Instant::now();
        raw.io.write_all(&PREFACE[..part]).await.unwrap();
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::HandshakeTimeout), "{closed:?}");
        assert_eq!(start.elapsed().as_secs(), 10);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_at_once_is_no_failure_of_ours() {
    let (raw, served) = hostile(ServerSettings::default(), echo());
    drop(raw);
    let closed = served.task.await.unwrap();
    assert!(matches!(closed, Closed::NotHttp2(_) | Closed::Io(_)), "{closed:?}");
}

#[tokio::test(start_paused = true)]
async fn requests_that_are_none_get_400_and_leave_the_others_alone() {
    let (mut raw, served) = hostile(ServerSettings::default(), echo());
    raw.begin().await;
    let bad = [
        block(&[(":method", "GET"), (":scheme", "http"), (":authority", "a:80"), (":path", "/")]),
        block(&[(":method", "CONNECT")]),
        connect("10.0.0.1"),
        connect("host"),
        connect("10.0.0.1:0"),
        connect("10.0.0.1:65536"),
        connect("user@10.0.0.1:80"),
        connect("1.2.3:80"),
    ];
    let mut stream = 1;
    for request in &bad {
        raw.send(HEADERS, END_HEADERS, stream, request).await;
        let answer = raw.next_answer().await.unwrap();
        assert!(Raw::is_status(&answer, 400), "stream {stream}: {answer:?}");
        assert_eq!((answer.stream, answer.flags & END_STREAM), (stream, END_STREAM));
        // Nothing more is read of it: NO_ERROR.
        let reset = raw.next_answer().await.unwrap();
        assert_eq!((reset.kind, reset.stream, reset.code()), (RST_STREAM, stream, 0));
        stream += 2;
    }
    assert_eq!(served.counters.bad_requests.get(), bad.len() as u64);
    assert_echo(&mut raw, stream).await;
}

/// Opens an echoing tunnel and sends something through it.
async fn assert_echo(raw: &mut Raw, stream: u32) {
    raw.connect(stream, "10.0.0.1:80").await;
    let answer = raw.next_answer().await.unwrap();
    assert!(Raw::is_status(&answer, 200), "{answer:?}");
    raw.send(DATA, END_STREAM, stream, b"hello").await;
    let answer = raw.next_answer().await.unwrap();
    assert_eq!((answer.kind, answer.stream, &answer.payload[..]), (DATA, stream, &b"hello"[..]));
}

#[tokio::test(start_paused = true)]
async fn malformed_requests_are_reset_and_leave_the_others_alone() {
    let (mut raw, _served) = hostile(ServerSettings::default(), echo());
    raw.begin().await;
    let malformed: &[&[(&str, &str)]] = &[
        &[(":method", "CONNECT"), (":authority", "a b:80")],
        &[(":method", "CONNECT"), (":authority", "a:80"), (":path", "/")],
        &[(":method", "CONNECT"), (":authority", "a:80"), (":scheme", "http")],
        &[(":authority", "a:80")],
        &[(":method", "CONNECT"), (":authority", "a:80"), (":status", "200")],
        &[(":method", "CONNECT"), (":method", "CONNECT"), (":authority", "a:80")],
        &[(":method", "CONNECT"), ("x", "1"), (":authority", "a:80")],
        &[(":method", "CONNECT"), (":authority", "a:80"), ("connection", "close")],
        &[
            (":method", "CONNECT"),
            (":authority", "a:80"),
            (":protocol", "websocket"),
            (":path", "/"),
            (":scheme", "https"),
        ],
        &[(":method", "CONNECT"), (":authority", "")],
    ];
    let mut stream = 1;
    for fields in malformed {
        raw.send(HEADERS, END_HEADERS, stream, &block(fields)).await;
        let answer = raw.next_answer().await.unwrap();
        assert_eq!((answer.kind, answer.stream), (RST_STREAM, stream), "{fields:?}: {answer:?}");
        assert_eq!(answer.code(), PROTOCOL_ERROR, "{fields:?}");
        stream += 2;
    }
    assert_echo(&mut raw, stream).await;
}

#[tokio::test(start_paused = true)]
async fn frames_that_break_the_protocol_end_the_connection_with_its_error() {
    let open = frame(HEADERS, END_HEADERS, 1, &connect("10.0.0.1:80"));
    let after_open = |more: Vec<u8>| [open.clone(), more].concat();
    let cases: Vec<(&str, Vec<u8>, u32)> = vec![
        ("DATA on stream 0", frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        ("DATA on an idle stream", frame(DATA, 0, 5, b"x"), PROTOCOL_ERROR),
        ("HEADERS on stream 0", frame(HEADERS, END_HEADERS, 0, &connect("a:1")), PROTOCOL_ERROR),
        ("HEADERS on a server's stream", frame(HEADERS, END_HEADERS, 2, &connect("a:1")), PROTOCOL_ERROR),
        (
            "a stream id that goes back",
            after_open(
                [
                    frame(HEADERS, END_HEADERS, 9, &connect("a:1")),
                    frame(HEADERS, END_HEADERS, 7, &connect("a:1")),
                ]
                .concat(),
            ),
            PROTOCOL_ERROR,
        ),
        ("RST_STREAM on an idle stream", frame(RST_STREAM, 0, 3, &[0; 4]), PROTOCOL_ERROR),
        ("RST_STREAM of a wrong size", after_open(frame(RST_STREAM, 0, 1, &[0; 3])), PROTOCOL_ERROR),
        ("WINDOW_UPDATE on an idle stream", frame(WINDOW_UPDATE, 0, 3, &[0, 0, 0, 1]), PROTOCOL_ERROR),
        ("WINDOW_UPDATE of zero", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), PROTOCOL_ERROR),
        (
            "a connection window past 2^31",
            frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]),
            FLOW_CONTROL_ERROR,
        ),
        ("a frame larger than announced", frame(DATA, 0, 1, &[0; 65_537]), FRAME_SIZE_ERROR),
        ("SETTINGS of a wrong size", frame(SETTINGS, 0, 0, &[0; 5]), PROTOCOL_ERROR),
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[]), PROTOCOL_ERROR),
        ("a frame size setting out of range", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]), PROTOCOL_ERROR),
        (
            "a window setting out of range",
            frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff]),
            PROTOCOL_ERROR,
        ),
        ("PING of a wrong size", frame(PING, 0, 0, &[0; 7]), PROTOCOL_ERROR),
        (
            "PUSH_PROMISE of a client",
            after_open(frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])),
            PROTOCOL_ERROR,
        ),
        ("CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1, &[]), PROTOCOL_ERROR),
        (
            "another frame inside a header block",
            [frame(HEADERS, 0, 1, &[]), frame(PING, 0, 0, &[0; 8])].concat(),
            PROTOCOL_ERROR,
        ),
        ("a header block that can't be decoded", frame(HEADERS, END_HEADERS, 1, &[0xff; 20]), PROTOCOL_ERROR),
        (
            "a header name in capitals",
            frame(HEADERS, END_HEADERS, 1, &block(&[("Upper", "1")])),
            PROTOCOL_ERROR,
        ),
        ("padding longer than the frame", after_open(frame(DATA, 8, 1, &[200, 0, 0])), PROTOCOL_ERROR),
    ];
    for (name, bytes, code) in cases {
        let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), echo());
        raw.begin().await;
        raw.io.write_all(&bytes).await.unwrap();
        let goaway = raw.goaway().await.unwrap_or_else(|| panic!("{name}: no GOAWAY"));
        let expected = [code, FRAME_SIZE_ERROR, COMPRESSION_ERROR];
        assert!(expected.contains(&goaway.code()), "{name}: code {}", goaway.code());
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::Protocol(_)), "{name}: {closed:?}");
        assert_eq!(served.counters.protocol_errors.get(), 1, "{name}");
        assert_eq!(served.counters.connections_now.get(), 0, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn unknown_frames_and_settings_are_passed_over() {
    let (mut raw, _served) = hostile(ServerSettings::default(), echo());
    raw.begin().await;
    raw.send(0x99, 0xff, 1, b"whatever").await;
    raw.send(SETTINGS, 0, 0, &[0xab, 0xcd, 0, 0, 0, 1]).await;
    raw.send(PRIORITY, 0, 7, &[0, 0, 0, 3, 10]).await;
    assert_echo(&mut raw, 1).await;
}

#[tokio::test(start_paused = true)]
async fn an_oversized_header_list_is_answered_with_431() {
    let (mut raw, _served) = hostile(ServerSettings::default(), echo());
    raw.begin().await;
    let value = "x".repeat(20_000);
    let fields = block(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("baggage", &value)]);
    let (first, rest) = fields.split_at(10_000);
    raw.send(HEADERS, 0, 1, first).await;
    raw.send(CONTINUATION, END_HEADERS, 1, rest).await;
    let answer = raw.next_answer().await.unwrap();
    assert!(Raw::is_status(&answer, 431), "{answer:?}");
    let reset = raw.next_answer().await.unwrap();
    assert_eq!((reset.kind, reset.code()), (RST_STREAM, PROTOCOL_ERROR));
    assert_echo(&mut raw, 3).await;
}

/// Reads and drops what the server says, so that it can go on.
fn drain_replies(
    raw: Raw,
) -> (tokio::io::WriteHalf<tokio::io::DuplexStream>, tokio::task::JoinHandle<Vec<u8>>) {
    let (mut read, write) = tokio::io::split(raw.io);
    let task = tokio::spawn(async move {
        let mut last = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n) = read.read(&mut buffer).await {
            if n == 0 {
                break;
            }
            last.extend_from_slice(&buffer[..n]);
            let keep = last.len().saturating_sub(64);
            last.drain(..keep);
        }
        last
    });
    (write, task)
}

#[tokio::test(start_paused = true)]
async fn floods_of_frames_end_the_connection() {
    let ping = frame(PING, 0, 0, &[0; 8]);
    let settings = frame(SETTINGS, 0, 0, &[]);
    let priority = frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 10]);
    let unknown = frame(0x42, 0, 0, &[0; 20]);
    let update = frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
    let reset = frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]);
    for (name, bytes, flood) in [
        ("PING", ping, Flood::Control),
        ("SETTINGS", settings, Flood::Control),
        ("PRIORITY", priority, Flood::Control),
        ("unknown", unknown, Flood::Control),
        ("WINDOW_UPDATE", update, Flood::WindowUpdates),
        ("RST_STREAM", reset, Flood::Resets),
    ] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        raw.begin().await;
        raw.connect(1, "10.0.0.1:80").await;
        let (mut write, replies) = drain_replies(raw);
        let many = bytes.repeat(100);
        let mut sent = 0;
        while sent < 1_000_000 && write.write_all(&many).await.is_ok() {
            sent += 100;
        }
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::Flood(found) if found == flood), "{name}: {closed:?} after {sent}");
        assert_eq!(served.counters.floods.get(), 1);
        // The last frame is GOAWAY, with the code that says why.
        let last = replies.await.unwrap();
        assert!(last.ends_with(&ENHANCE_YOUR_CALM.to_be_bytes()), "{name}: {last:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn empty_and_tiny_data_frames_are_bounded() {
    for (name, payload) in [("empty", &b""[..]), ("padding only", &[0xff; 0])] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        raw.begin().await;
        raw.connect(1, "10.0.0.1:80").await;
        let (mut write, _replies) = drain_replies(raw);
        let many = frame(DATA, 0, 1, payload).repeat(100);
        let mut sent = 0;
        while sent < 100_000 && write.write_all(&many).await.is_ok() {
            sent += 100;
        }
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::Protocol(_)), "{name}: {closed:?} after {sent}");
    }
}

#[tokio::test(start_paused = true)]
async fn rapid_resets_end_the_connection_and_never_pile_up_in_the_handler() {
    let (handler, most) = hold();
    let settings = ServerSettings { max_streams: 50, ..ServerSettings::default() };
    // One at a time, so that each request reaches the handler before it is reset.
    let (mut raw, served) = hostile(settings, handler);
    raw.begin().await;
    let (mut write, replies) = drain_replies(raw);
    for stream in (1..200_001).step_by(2) {
        let mut pair = frame(HEADERS, END_HEADERS, stream, &connect("10.0.0.1:80"));
        pair.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        let half = pair.len() - 13;
        if write.write_all(&pair[..half]).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
        if write.write_all(&pair[half..]).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
        if stream % 200 == 1 {
            sleep(Duration::from_millis(100)).await;
        }
    }
    let closed = served.task.await.unwrap();
    assert!(matches!(closed, Closed::Flood(Flood::EarlyResets)), "{closed:?}");
    assert!(replies.await.unwrap().ends_with(&ENHANCE_YOUR_CALM.to_be_bytes()));
    assert!(most.load(Ordering::SeqCst) <= 50);
    assert!(served.counters.over_limit.get() > 0);
}

#[tokio::test(start_paused = true)]
async fn rapid_resets_in_one_batch_end_the_connection() {
    let (handler, most) = hold();
    let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), handler);
    raw.begin().await;
    let mut batch = Vec::new();
    for stream in (1..20_001).step_by(2) {
        batch.extend(frame(HEADERS, END_HEADERS, stream, &connect("10.0.0.1:80")));
        batch.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
    }
    let _ = raw.io.write_all(&batch).await;
    let goaway = raw.goaway().await.unwrap();
    assert_eq!(goaway.code(), ENHANCE_YOUR_CALM);
    assert!(matches!(served.task.await.unwrap(), Closed::Protocol(_)));
    assert!(most.load(Ordering::SeqCst) <= 1024);
}

#[tokio::test(start_paused = true)]
async fn streams_beyond_the_limit_are_refused_and_may_be_tried_again() {
    let settings = ServerSettings { max_streams: 20, ..ServerSettings::default() };
    let (handler, most) = hold();
    let (mut raw, served) = hostile_over(1 << 20, settings, handler);
    raw.begin().await;
    for stream in (1..201).step_by(2) {
        raw.connect(stream, "10.0.0.1:80").await;
    }
    for _ in 0..80 {
        let answer = raw.next_answer().await.unwrap();
        assert_eq!((answer.kind, answer.code()), (RST_STREAM, REFUSED_STREAM), "{answer:?}");
        assert!(answer.stream > 40);
    }
    let (mut answers, mut resets) = (0, 0);
    while answers + resets < 40 {
        let answer = raw.next_answer().await.unwrap();
        if answer.kind == RST_STREAM {
            resets += 1;
        } else {
            assert!(Raw::is_status(&answer, 503), "{answer:?}");
            answers += 1;
        }
    }
    assert_eq!((answers, resets), (20, 20));
    assert_eq!(most.load(Ordering::SeqCst), 20);
    assert_eq!(served.counters.streams_now.get(), 0);
    // A client that goes on like this is cut off.
    for stream in (201..8_001).step_by(2) {
        raw.connect(stream, "10.0.0.1:80").await;
    }
    assert_eq!(raw.goaway().await.unwrap().code(), ENHANCE_YOUR_CALM);
    assert!(matches!(served.task.await.unwrap(), Closed::Flood(Flood::Errors)));
}

#[tokio::test(start_paused = true)]
async fn stream_errors_end_the_connection_only_when_they_come_in_masses() {
    let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), echo());
    raw.begin().await;
    let malformed = block(&[(":method", "CONNECT"), (":authority", "a b:80")]);
    let mut stream = 1;
    // More in all than `h2` would take in a connection's life, a few each second.
    for _ in 0..1500 {
        raw.send(HEADERS, END_HEADERS, stream, &malformed).await;
        assert_eq!(raw.next_answer().await.unwrap().kind, RST_STREAM);
        stream += 2;
        sleep(Duration::from_millis(100)).await;
    }
    assert_echo(&mut raw, stream).await;
    for _ in 0..3000 {
        stream += 2;
        raw.send(HEADERS, END_HEADERS, stream, &malformed).await;
    }
    assert_eq!(raw.goaway().await.unwrap().code(), ENHANCE_YOUR_CALM);
    assert!(matches!(served.task.await.unwrap(), Closed::Flood(Flood::Errors)));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stalls_inside_a_frame_is_found_dead() {
    let headers = frame(HEADERS, END_HEADERS, 1, &connect("10.0.0.1:80"));
    let endless = [frame(HEADERS, 0, 1, &[]), vec![0; 4]].concat();
    for bytes in [&headers[..20], &endless, &headers[..9]] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        raw.begin().await;
        raw.io.write_all(bytes).await.unwrap();
        let start = Instant::now();
        let closed = served.task.await.unwrap();
        assert!(matches!(closed, Closed::PingTimeout), "{closed:?}");
        assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_byte_a_minute_does_not_keep_a_connection() {
    let (mut raw, served) = hostile(ServerSettings::default(), echo());
    raw.begin().await;
    let headers = frame(HEADERS, END_HEADERS, 1, &connect(&format!("{}:80", "a.".repeat(80))));
    let start = Instant::now();
    for byte in headers {
        if raw.io.write_all(&[byte]).await.is_err() {
            break;
        }
        sleep(Duration::from_secs(10)).await;
    }
    assert!(matches!(served.task.await.unwrap(), Closed::PingTimeout));
    assert!(start.elapsed() < Duration::from_secs(180), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_ended_in_good_order() {
    let settings = ServerSettings { idle_timeout: Duration::from_secs(60), ..ServerSettings::default() };
    let (mut raw, served) = hostile(settings, echo());
    raw.begin().await;
    assert_echo(&mut raw, 1).await;
    let start = Instant::now();
    let goaway = raw.next_answer().await;
    while let Some(frame) = raw.next_answer().await {
        assert_eq!((frame.kind, frame.code()), (GOAWAY, 0));
    }
    assert!(goaway.is_some());
    assert!((59..=92).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(matches!(served.task.await.unwrap(), Closed::Finished));
    assert_eq!(served.counters.idle_closed.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_races_with_the_end_of_an_idle_connection_may_finish() {
    let settings = ServerSettings { idle_timeout: Duration::from_secs(60), ..ServerSettings::default() };
    let (mut raw, served) = hostile(settings, echo());
    raw.begin().await;
    let goaway = raw.next_answer().await.unwrap();
    assert_eq!((goaway.kind, goaway.code()), (GOAWAY, 0));
    // Sent before the client saw the GOAWAY: the server's end answers the PING after it.
    raw.connect(1, "10.0.0.1:80").await;
    let mut got = Vec::new();
    let mut step = async |raw: &mut Raw, data: &[u8], flags| {
        raw.send(DATA, flags, 1, data).await;
        got.clear();
        while got.len() < data.len() {
            let answer = timeout(Duration::from_secs(40), raw.next_answer()).await.unwrap().unwrap();
            match answer.kind {
                DATA => got.extend(answer.payload),
                HEADERS => assert!(Raw::is_status(&answer, 200), "{answer:?}"),
                // No stream after this one.
                GOAWAY => assert_eq!((answer.code(), answer.payload[3]), (0, 1), "{answer:?}"),
                _ => panic!("{answer:?}"),
            }
        }
        assert_eq!(got, data);
    };
    step(&mut raw, b"begun", 0).await;
    for _ in 0..30 {
        // The pings that ask whether the client is there must be answered meanwhile.
        let quiet = timeout(Duration::from_secs(20), raw.next_answer()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        step(&mut raw, b"still there", 0).await;
    }
    step(&mut raw, b"the end", END_STREAM).await;
    let start = Instant::now();
    assert!(raw.goaway().await.is_none_or(|frame| frame.code() == 0));
    assert!(start.elapsed() <= Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(matches!(served.task.await.unwrap(), Closed::Finished));
}

#[tokio::test(start_paused = true)]
async fn a_retired_connection_is_ended_as_soon_as_it_has_no_streams() {
    // Also one whose client has not said anything yet: its first request may be on its way.
    let (mut raw, served) = hostile(ServerSettings::default(), echo());
    served.control.retire();
    sleep(Duration::from_secs(1)).await;
    raw.begin().await;
    raw.connect(1, "10.0.0.1:80").await;
    loop {
        let answer = raw.next_answer().await.unwrap();
        if Raw::is_status(&answer, 200) {
            break;
        }
        assert_eq!((answer.kind, answer.code()), (GOAWAY, 0));
    }
    for busy in [false, true] {
        let (mut raw, served) = hostile(ServerSettings::default(), echo());
        raw.begin().await;
        raw.send(PING, 0, 0, &[3; 8]).await;
        while raw.next().await.unwrap().kind != PING {}
        if busy {
            raw.connect(1, "10.0.0.1:80").await;
            assert!(Raw::is_status(&raw.next_answer().await.unwrap(), 200));
        }
        let start = Instant::now();
        served.control.retire();
        assert_eq!(raw.next_answer().await.map(|frame| (frame.kind, frame.code())), Some((GOAWAY, 0)));
        if busy {
            let answers = timeout(Duration::from_secs(20), async {
                while let Some(frame) = raw.next_answer().await {
                    assert_eq!((frame.kind, frame.code()), (GOAWAY, 0));
                }
            });
            assert!(answers.await.is_err(), "it ended with a stream");
            raw.send(DATA, END_STREAM, 1, b"bye").await;
        }
        while raw.next_answer().await.is_some() {}
        assert!(matches!(served.task.await.unwrap(), Closed::Finished));
        assert!(start.elapsed() < Duration::from_secs(if busy { 26 } else { 1 }), "{:?}", start.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_whose_client_never_acknowledges_the_end_is_closed() {
    let settings = ServerSettings { idle_timeout: Duration::from_secs(60), ..ServerSettings::default() };
    let (mut raw, served) = hostile(settings, echo());
    raw.begin().await;
    assert_eq!(raw.next_answer().await.unwrap().kind, GOAWAY);
    let start = Instant::now();
    assert_eq!(raw.goaway().await.map(|frame| frame.code()), Some(0));
    assert!(start.elapsed() <= Duration::from_secs(7), "{:?}", start.elapsed());
    assert!(matches!(served.task.await.unwrap(), Closed::Finished));
}

#[tokio::test(start_paused = true)]
async fn a_drain_cuts_short_what_an_idle_connection_waits_for() {
    let settings = ServerSettings { idle_timeout: Duration::from_secs(60), ..ServerSettings::default() };
    let (mut raw, served) = hostile(settings, echo());
    raw.begin().await;
    assert_eq!(raw.next_answer().await.unwrap().kind, GOAWAY);
    raw.connect(1, "10.0.0.1:80").await;
    let _ = timeout(Duration::from_secs(20), async { while raw.next_answer().await.is_some() {} }).await;
    assert!(!served.task.is_finished());
    let start = Instant::now();
    served.control.drain(Duration::from_secs(8));
    while raw.next_answer().await.is_some() {}
    assert!((8..=10).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(matches!(served.task.await.unwrap(), Closed::DrainDeadline));
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_holds_back_the_sender() {
    // The application sends as fast as it is let; the peer never opens the window beyond the first 65,535 bytes.
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&taken);
    let handler = support::to_app(move |mut app| {
        let counter = Arc::clone(&counter);
        async move {
            let block = vec![1; 8192];
            while app.write_all(&block).await.is_ok() {
                counter.fetch_add(block.len(), Ordering::SeqCst);
            }
        }
    });
    let (mut raw, _served) = hostile(ServerSettings::default(), handler);
    raw.begin().await;
    raw.connect(1, "10.0.0.1:80").await;
    sleep(Duration::from_secs(10)).await;
    let taken = taken.load(Ordering::SeqCst);
    assert!((65_535..400_000).contains(&taken), "{taken}");
}
