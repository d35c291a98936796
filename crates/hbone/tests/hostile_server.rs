//! What the pool does with servers that break the protocol, stall, or flood; and random frames for both sides.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::time::Duration;

use hbone::{ConnectError, Connector, OpenError, Pool, PoolSettings, ServerSettings};
use proptest::prelude::*;
use support::handed::{handed, next_request, ok, request_of};
use support::raw::*;
use support::{echo, hostile_over, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, sleep, timeout};

/// Opens a tunnel and plays the server; what came of the request.
async fn against(server: impl AsyncFnOnce(Raw)) -> Result<hbone::Opened<()>, OpenError<std::io::Error>> {
    let (pool, mut take) = handed();
    let request = request();
    let client = pool.open(&(), &request);
    let server = async {
        let raw = take.recv().await.unwrap();
        server(raw).await;
    };
    let (result, ()) =
        timeout(Duration::from_secs(600), async { tokio::join!(client, server) }).await.expect("it hangs");
    result
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_none_is_an_error_with_the_reason() {
    let no_status = frame(HEADERS, END_HEADERS, 1, &block(&[(":status", "2000")]));
    for bytes in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0xff; 200], &[0; 9], b"", &no_status] {
        let error = against(async |mut raw| {
            raw.io.write_all(bytes).await.unwrap();
            if bytes.len() < 10 {
                drop(raw);
            } else {
                raw.goaway().await;
            }
        })
        .await
        .unwrap_err();
        assert!(matches!(error, OpenError::Lost(_)), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let (pool, mut take) = handed();
    let start = Instant::now();
    let error = pool.open(&(), &request()).await.unwrap_err();
    assert!(matches!(error, OpenError::ResponseTimeout), "{error}");
    assert_eq!(start.elapsed().as_secs(), 15);
    // The next request goes over another connection.
    let answering = async {
        let _silent = take.recv().await.unwrap();
        let mut raw = take.recv().await.unwrap();
        let stream = request_of(&mut raw).await;
        raw.io.write_all(&ok(stream)).await.unwrap();
        raw
    };
    let request = request();
    let (opened, _raw) = tokio::join!(pool.open(&(), &request), answering);
    opened.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_informational_response_is_not_the_answer() {
    let opened = against(async |mut raw| {
        let stream = request_of(&mut raw).await;
        let informational = block(&[(":status", "103")]);
        raw.send(HEADERS, END_HEADERS, stream, &informational).await;
        raw.io.write_all(&ok(stream)).await.unwrap();
        raw.send(DATA, END_STREAM, stream, b"hi").await;
        sleep(Duration::from_secs(1)).await;
    })
    .await
    .unwrap();
    let (mut read, _write) = tokio::io::split(opened.tunnel);
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"hi");
}

#[tokio::test(start_paused = true)]
async fn answers_that_break_the_protocol_fail_the_request_only() {
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("no status", block(&[("a", "b")])),
        ("too large", block(&[(":status", "200"), ("a", &"x".repeat(30_000))])),
        ("connection header", block(&[(":status", "200"), ("connection", "x")])),
    ];
    for (name, fields) in bad {
        let (pool, mut take) = handed();
        let first = request();
        let client = pool.open(&(), &first);
        let server = async {
            let mut raw = take.recv().await.unwrap();
            let stream = request_of(&mut raw).await;
            raw.send(HEADERS, END_HEADERS, stream, &fields).await;
            let reset = timeout(Duration::from_secs(60), raw.next_answer()).await.expect(name).unwrap();
            assert_eq!((reset.kind, reset.stream), (RST_STREAM, stream), "{name}: {reset:?}");
            raw
        };
        let (result, mut raw) = tokio::join!(client, server);
        assert!(matches!(result, Err(OpenError::Lost(_))), "{name}: {result:?}");
        // The next request goes over the same connection.
        let server = async {
            let stream = next_request(&mut raw).await;
            raw.io.write_all(&ok(stream)).await.unwrap();
        };
        let both = async { tokio::join!(pool.open(&(), &first), server) };
        let (result, ()) = timeout(Duration::from_secs(60), both).await.expect(name);
        result.unwrap();
        assert_eq!(pool.counters().connections.get(), 1, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_refused_again_and_again_is_an_error_after_three_tries() {
    let (pool, mut take) = handed();
    let request = request();
    let server = async {
        let mut raw = take.recv().await.unwrap();
        let mut stream = request_of(&mut raw).await;
        for tried in 1..=3 {
            raw.send(RST_STREAM, 0, stream, &7u32.to_be_bytes()).await;
            if tried < 3 {
                stream = next_request(&mut raw).await;
            }
        }
        raw
    };
    let (result, _raw) = tokio::join!(pool.open(&(), &request), server);
    assert!(matches!(result, Err(OpenError::Lost(_))), "{result:?}");
    assert_eq!(pool.counters().retried.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_died_unseen_is_replaced() {
    let (pool, mut take) = handed();
    let request = request();
    let first = async {
        let mut raw = take.recv().await.unwrap();
        let stream = request_of(&mut raw).await;
        raw.io.write_all(&ok(stream)).await.unwrap();
        raw
    };
    let (opened, mut raw) = tokio::join!(pool.open(&(), &request), first);
    drop(opened.unwrap());
    // The second request gets no answer but the connection's end.
    let second = async {
        next_request(&mut raw).await;
        drop(raw);
        let mut raw = take.recv().await.unwrap();
        let stream = request_of(&mut raw).await;
        raw.io.write_all(&ok(stream)).await.unwrap();
        raw
    };
    let (opened, _raw) = tokio::join!(pool.open(&(), &request), second);
    opened.unwrap();
    assert_eq!((pool.counters().retried.get(), pool.counters().connections.get()), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_away_at_once_each_time_is_an_error() {
    let (pool, mut take) = handed();
    tokio::spawn(async move {
        while let Some(mut raw) = take.recv().await {
            tokio::spawn(async move {
                request_of(&mut raw).await;
                raw.send(GOAWAY, 0, 0, &[0; 8]).await;
            });
        }
    });
    let error = pool.open(&(), &request()).await.unwrap_err();
    assert!(matches!(error, OpenError::Lost(_)), "{error}");
    assert_eq!(pool.counters().retried.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn floods_from_a_server_end_its_connection() {
    for (name, bytes) in [
        ("PING", frame(PING, 0, 0, &[0; 8])),
        ("SETTINGS", frame(SETTINGS, 0, 0, &[])),
        ("unknown", frame(0x42, 0, 0, &[0; 8])),
        ("PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x82, 0x84, 0x86])),
        ("WINDOW_UPDATE", frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
    ] {
        let error = against(async |raw| {
            let (mut read, mut write) = tokio::io::split(raw.io);
            tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
            write.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
            sleep(Duration::from_millis(1)).await;
            let many = bytes.repeat(1000);
            for _ in 0..1000 {
                if write.write_all(&many).await.is_err() {
                    return;
                }
            }
            panic!("{name}: the client took it all");
        })
        .await
        .unwrap_err();
        assert!(matches!(error, OpenError::Lost(_)), "{name}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connector_that_panics_is_an_error_in_the_end() {
    struct Panics;
    impl Connector for Panics {
        type Key = u8;
        type Io = DuplexStream;
        type Peer = ();
        type Error = std::io::Error;
        async fn connect(&self, _: &u8) -> std::io::Result<(DuplexStream, ())> {
            sleep(Duration::from_millis(100)).await;
            panic!("a bug of the connector")
        }
    }
    let pool = Pool::new(Panics, PoolSettings::default());
    let error = pool.open(&1, &request()).await.unwrap_err();
    assert!(matches!(&error, OpenError::Connect(_) | OpenError::QueueTimeout), "{error}");
    if let OpenError::Connect(reason) = &error {
        assert!(!matches!(**reason, ConnectError::TooManyConnections(_)), "{error}");
    }
    assert!(pool.snapshot().is_empty());
    sleep(Duration::from_secs(1)).await;
    assert_eq!(pool.counters().connecting_now.get(), 0);
}

/// A frame that may make sense, and one that hardly does.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let plausible = prop_oneof![
        Just(frame(HEADERS, END_HEADERS, 1, &connect("10.0.0.1:80"))),
        Just(frame(HEADERS, END_HEADERS, 3, &connect("b:1"))),
        Just(frame(HEADERS, END_HEADERS | END_STREAM, 5, &connect("c:2"))),
        Just(frame(HEADERS, END_HEADERS, 1, &[0x88])),
        Just(frame(HEADERS, END_HEADERS | END_STREAM, 1, &[])),
        Just(frame(SETTINGS, ACK, 0, &[])),
        Just(frame(PING, ACK, 0, &[0; 8])),
        Just(frame(GOAWAY, 0, 0, &[0; 8])),
        (0u32..8, 0usize..2000).prop_map(|(stream, n)| frame(DATA, 0, stream, &vec![1; n])),
        (0u32..8).prop_map(|stream| frame(DATA, END_STREAM, stream, b"end")),
        (0u32..8, 0u32..15).prop_map(|(stream, code)| frame(RST_STREAM, 0, stream, &code.to_be_bytes())),
        (0u32..8, any::<u32>()).prop_map(|(stream, n)| frame(WINDOW_UPDATE, 0, stream, &n.to_be_bytes())),
        (0u8..8, any::<u32>()).prop_map(|(id, value)| {
            let mut setting = vec![0, id];
            setting.extend(value.to_be_bytes());
            frame(SETTINGS, 0, 0, &setting)
        }),
        (0u32..8, 0u32..8).prop_map(|(a, b)| {
            let mut payload = b.to_be_bytes().to_vec();
            payload.push(0x82);
            frame(PUSH_PROMISE, END_HEADERS, a, &payload)
        }),
    ];
    let random = (0u8..12, any::<u8>(), 0u32..10, proptest::collection::vec(any::<u8>(), 0..100))
        .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload));
    let noise = proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![6 => plausible, 3 => random, 1 => noise]
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_frames_bring_a_server_down(frames in proptest::collection::vec(any_frame(), 0..40), preface in prop::bool::weighted(0.95)) {
        runtime().block_on(async {
            let (mut raw, served) = hostile_over(1 << 20, ServerSettings::default(), echo());
            if preface {
                raw.begin().await;
            }
            for bytes in frames {
                if raw.io.write_all(&bytes).await.is_err() {
                    break;
                }
                sleep(Duration::from_millis(1)).await;
            }
            raw.io.shutdown().await.unwrap();
            // It ends, and by itself: a panic would be an error of the join.
            timeout(Duration::from_secs(1000), served.task).await.expect("it hangs").expect("it panicked");
            let counters = &served.counters;
            sleep(Duration::from_secs(1)).await;
            prop_assert_eq!((counters.connections_now.get(), counters.streams_now.get()), (0, 0));
            Ok(())
        })?;
    }

    #[test]
    fn no_frames_bring_a_client_down(frames in proptest::collection::vec(any_frame(), 0..40)) {
        runtime().block_on(async {
            let (pool, mut take) = handed();
            let client = {
                let pool = pool.clone();
                tokio::spawn(async move {
                    if let Ok(mut opened) = pool.open(&(), &request()).await {
                        let _ = opened.tunnel.write_all(&[1; 100_000]).await;
                        let _ = opened.tunnel.read_to_end(&mut Vec::new()).await;
                    }
                })
            };
            tokio::spawn(async move {
                while let Some(mut raw) = take.recv().await {
                    raw.send(SETTINGS, 0, 0, &[]).await;
                    for bytes in &frames {
                        if raw.io.write_all(bytes).await.is_err() {
                            break;
                        }
                        sleep(Duration::from_millis(1)).await;
                    }
                    let _ = raw.io.shutdown().await;
                }
            });
            timeout(Duration::from_secs(1000), client).await.expect("it hangs").expect("it panicked");
            sleep(Duration::from_secs(120)).await;
            let counters = pool.counters();
            prop_assert_eq!((counters.streams_now.get(), counters.connecting_now.get()), (0, 0));
            Ok(())
        })?;
    }
}
