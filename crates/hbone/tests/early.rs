//! When a request that got no answer is sent again, and when not: what was sent behind it may have arrived, and must not
//! arrive twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

mod support;

use std::time::Duration;

use bytes::BytesMut;
use hbone::OpenError;
use support::handed::{handed, ok};
use support::raw::*;
use support::request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// What becomes of a request, with all that was sent behind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Answered,
    /// Reset with this code.
    Reset(u32),
    /// The peer goes away, and says that it has not looked at it.
    LeftOut,
    /// The peer goes away and hangs up, and says that it has looked at it.
    Taken,
    /// The connection breaks.
    Broken,
    Status(u16),
}

/// A server that deals `fates` to the requests that come, on whatever connection, once `data` bytes have come behind each;
/// the data that came behind them.
async fn play(
    mut connections: mpsc::UnboundedReceiver<Raw>,
    fates: &[Fate],
    lengths: &[usize],
) -> Vec<Vec<u8>> {
    let (mut seen, mut open) = (Vec::new(), Vec::new());
    while seen.len() < fates.len() {
        let mut raw = connections.recv().await.expect("a connection for the next request");
        let mut preface = [0; 24];
        raw.io.read_exact(&mut preface).await.unwrap();
        raw.send(SETTINGS, 0, 0, &[]).await;
        let mut last = 0;
        while seen.len() < fates.len() {
            let (fate, length) = (fates[seen.len()], lengths[seen.len()]);
            let Some((stream, data)) = request_with(&mut raw, length).await else { break };
            seen.push(data);
            match fate {
                Fate::Answered => raw.io.write_all(&ok(stream)).await.unwrap(),
                Fate::Reset(code) => raw.send(RST_STREAM, 0, stream, &code.to_be_bytes()).await,
                Fate::Status(status) => {
                    let fields = block(&[(":status", &status.to_string())]);
                    raw.send(HEADERS, END_HEADERS | END_STREAM, stream, &fields).await;
                }
                Fate::LeftOut | Fate::Taken => {
                    let processed: u32 = if fate == Fate::Taken { stream } else { last };
                    let goaway = [processed.to_be_bytes(), 0u32.to_be_bytes()].concat();
                    raw.send(GOAWAY, 0, 0, &goaway).await;
                }
                Fate::Broken => {}
            }
            last = stream;
            if matches!(fate, Fate::LeftOut | Fate::Taken | Fate::Broken) {
                break;
            }
        }
        // A connection whose peer goes away in good order stays until its streams have ended.
        if fates[seen.len() - 1] == Fate::LeftOut {
            open.push(raw);
        }
    }
    // What comes now would be one too many.
    let more = timeout(Duration::from_secs(60), connections.recv()).await;
    assert!(!matches!(more, Ok(Some(_))), "another connection was made");
    seen
}

/// The next request's stream and what comes behind it, once that is `length` bytes; nothing when the peer hung up.
async fn request_with(raw: &mut Raw, length: usize) -> Option<(u32, Vec<u8>)> {
    let mut request = None;
    let mut data = Vec::new();
    while request.is_none() || data.len() < length {
        let frame = raw.next_answer().await?;
        match frame.kind {
            HEADERS => request = Some(frame.stream),
            DATA if Some(frame.stream) == request => data.extend(frame.payload),
            _ => {}
        }
    }
    Some((request?, data))
}

/// Opens a tunnel, if `reused`, and then another with `data` ahead, to which the server does what `fates` say. The outcome,
/// and what the server got behind the requests of the second one.
async fn outcome(reused: bool, data: &str, fates: &[Fate]) -> (Result<(), String>, Vec<Vec<u8>>) {
    let (pool, connections) = handed();
    let first = if reused { &[Fate::Answered][..] } else { &[] };
    let fates = [first, fates].concat();
    let lengths: Vec<usize> =
        (0..fates.len()).map(|n| if n < first.len() { 0 } else { data.len() }).collect();
    let client = async {
        let request = request();
        let first = if reused { Some(pool.open(&(), &request).await.unwrap()) } else { None };
        let (mut app, mut side) = tokio::io::duplex(1024);
        app.write_all(data.as_bytes()).await.unwrap();
        let mut early = BytesMut::new();
        let opened = pool.open_early(&(), &request, &mut side, &mut early).await;
        assert_eq!(&*early, data.as_bytes(), "what was sent is told");
        let opened = match opened {
            Ok(opened) => Ok(Some(opened)),
            Err(OpenError::Lost(error)) => Err(error.to_string()),
            Err(OpenError::Refused(status)) => Err(status.as_u16().to_string()),
            Err(other) => panic!("{other}"),
        };
        (opened.map(drop), first)
    };
    let both = async { tokio::join!(client, play(connections, &fates, &lengths)) };
    let ((opened, first_tunnel), mut seen) =
        timeout(Duration::from_secs(600), both).await.expect("a request was not sent again, or hangs");
    drop(first_tunnel);
    (opened, seen.split_off(first.len()))
}

/// A fate is dealt once, and whoever asks again is answered.
async fn once(reused: bool, data: &str, fate: Fate, asks_again: bool) {
    let fates = if asks_again { &[fate, Fate::Answered][..] } else { &[fate] };
    let (opened, seen) = outcome(reused, data, fates).await;
    let what = format!("{fate:?}, reused: {reused}, data: {data:?}");
    assert_eq!(opened.is_ok(), asks_again, "{what}: {opened:?}");
    assert_eq!(seen, vec![data.as_bytes().to_vec(); fates.len()], "{what}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_was_not_looked_at_is_sent_again_with_all_that_was_behind_it() {
    for data in ["", "ahead of the answer"] {
        for reused in [false, true] {
            once(reused, data, Fate::Reset(REFUSED_STREAM), true).await;
            once(reused, data, Fate::LeftOut, true).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_may_have_been_looked_at_is_not_sent_again() {
    for data in ["", "ahead of the answer"] {
        for reused in [false, true] {
            for fate in [Fate::Reset(CANCEL), Fate::Status(503), Fate::Status(401)] {
                once(reused, data, fate, false).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_is_replaced_only_if_it_was_an_old_one_and_nothing_was_sent_behind_the_request() {
    for fate in [Fate::Broken, Fate::Taken] {
        once(true, "", fate, true).await;
        once(true, "ahead of the answer", fate, false).await;
        once(false, "", fate, false).await;
        once(false, "ahead of the answer", fate, false).await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_never_looks_is_asked_three_times() {
    let fates = [Fate::Reset(REFUSED_STREAM); 3];
    let (opened, seen) = outcome(true, "data", &fates).await;
    assert!(opened.unwrap_err().contains("REFUSED_STREAM"));
    assert_eq!(seen, vec![b"data".to_vec(); 3]);
}
