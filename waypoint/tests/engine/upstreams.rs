//! Servers that fail at each stage of an exchange: what the client is told, and what the log says.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, Request, Response};
use tokio::net::{TcpListener, TcpStream};
use waypoint::http::Settings;
use waypoint::http::decide::{Forwarding, Protocol};

use crate::lab::{self, Client, Proxy, get, in_turn, target};

/// A server that sends this after a request's head and ends, with a reset if that is said.
async fn sends(bytes: &'static str, reset: bool) -> std::net::SocketAddr {
    lab::server(move |_, mut client: Client| async move {
        client.head().await;
        client.send(bytes).await;
        if reset {
            // What was sent goes out before the reset does, as far as loopback is concerned.
            client.stream.set_zero_linger().unwrap();
        }
    })
    .await
}

#[tokio::test]
async fn a_server_of_http1_that_ends_is_told_apart_by_its_stage() {
    // What it sends, the status that the client gets, whether the response is whole, the flag.
    for (bytes, status, whole, flag) in [
        ("", 503, true, "UC"),
        ("HTTP/1.1 200", 503, true, "UC"),
        ("HTTP/1.1 200 OK\r\nContent-Le", 503, true, "UC"),
        ("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 503, true, "UC"),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2", 503, true, "UC"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", 200, false, "UC"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n", 200, false, "UPE"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 200, false, "UPE"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, true, "-"),
        ("HTTP/1.1 204 No Content\r\n\r\n", 204, true, "-"),
        ("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", 502, true, "UPE"),
    ] {
        for reset in [false, true] {
            let proxy = Proxy::to(sends(bytes, reset).await).await;
            let mut client = proxy.connect().await;
            client.send(get("/")).await;
            let answer = client.answer().await;
            let record = proxy.wait_records(1).await[0].clone();
            // A reset may overtake what was sent before it.
            let early = reset && record.status == 503;
            assert!(early || record.status == status, "{bytes:?} {reset}: {record:?}");
            // What was cut off never looks whole, whether its head was sent on already or not.
            assert_eq!(
                answer.map(|answer| answer.status()),
                (early || whole).then_some(record.status),
                "{bytes:?}"
            );
            assert!(reset || record.flag.to_string() == flag, "{bytes:?}: {record:?}");
            // The server's end is not the proxy's.
            assert_ne!(proxy.connect().await.ask(get("/direct")).await.status(), 503);
        }
    }
}

/// What a server of HTTP/2 does with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    Reset(Reason),
    HeadThenReset,
    BodyThenReset,
    BodyThenGone,
    Gone,
    /// GOAWAY, and the stream is answered all the same.
    AwayAndAnswer,
    Answer,
    Hints,
    Trailers,
}

async fn act(act: Act, respond: &mut h2::server::SendResponse<Bytes>) -> bool {
    let head = || Response::builder().status(200).body(()).unwrap();
    match act {
        Act::Reset(reason) => respond.send_reset(reason),
        Act::HeadThenReset | Act::BodyThenReset | Act::BodyThenGone => {
            let mut body = respond.send_response(head(), false).unwrap();
            if act != Act::HeadThenReset {
                body.send_data("half".into(), false).unwrap();
            }
            // The frames are to be on their way before the end is.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            if act == Act::BodyThenGone {
                return false;
            }
            body.send_reset(Reason::INTERNAL_ERROR);
        }
        Act::Gone => return false,
        Act::Answer | Act::AwayAndAnswer => {
            respond.send_response(head(), false).unwrap().send_data("whole".into(), true).unwrap();
        }
        Act::Hints => {
            let hints = Response::builder().status(103).header("link", "x").body(()).unwrap();
            respond.send_informational(hints).unwrap();
            respond.send_response(head(), false).unwrap().send_data("whole".into(), true).unwrap();
        }
        Act::Trailers => {
            let mut body = respond.send_response(head(), false).unwrap();
            body.send_data("whole".into(), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "1".parse().unwrap());
            body.send_trailers(trailers).unwrap();
        }
    }
    true
}

/// A server that does one thing with the first request, and answers the others.
async fn h2_server(first: Act) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let what = if count.fetch_add(1, Ordering::SeqCst) == 0 { first } else { Act::Answer };
                    if what == Act::AwayAndAnswer {
                        connection.graceful_shutdown();
                    }
                    let done = act(what, &mut respond);
                    tokio::pin!(done);
                    let goes_on = tokio::select! {
                        goes_on = &mut done => goes_on,
                        // Its frames are written while it waits.
                        _ = connection.accept() => return,
                    };
                    if !goes_on {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_server_of_http2_that_ends_is_told_apart_by_its_stage() {
    for (first, status, whole, flag) in [
        (Act::Reset(Reason::INTERNAL_ERROR), 503, true, "UR"),
        (Act::Reset(Reason::REFUSED_STREAM), 503, true, "UR"),
        (Act::Reset(Reason::ENHANCE_YOUR_CALM), 503, true, "UR"),
        (Act::Gone, 503, true, "UC"),
        (Act::HeadThenReset, 200, false, "UR"),
        (Act::BodyThenReset, 200, false, "UR"),
        (Act::BodyThenGone, 200, false, "UC"),
        (Act::AwayAndAnswer, 200, true, "-"),
        (Act::Hints, 200, true, "-"),
        (Act::Trailers, 200, true, "-"),
    ] {
        let endpoints = in_turn(vec![target(h2_server(first).await, Protocol::Http2)]);
        let proxy = Proxy::start(Forwarding::default(), endpoints, Settings::default()).await;
        // To a client of HTTP/1.1 ...
        let mut client = proxy.connect().await;
        client.send(get("/")).await;
        let answer = client.answer().await;
        assert_eq!(answer.map(|answer| answer.status()), whole.then_some(status), "{first:?}");
        let record = proxy.wait_records(1).await[0].clone();
        assert_eq!((record.status, &*record.flag.to_string()), (status, flag), "{first:?}: {record:?}");
        // ... and after it the server is asked again, over a connection that works.
        assert_eq!(proxy.connect().await.ask(get("/")).await.body, b"whole", "after {first:?}");
    }
}

#[tokio::test]
async fn what_is_cut_off_is_cut_off_for_a_client_of_http2_too() {
    let upstream = sends("HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc", false).await;
    let proxy = Proxy::to(upstream).await;
    let stream = TcpStream::connect(proxy.address).await.unwrap();
    let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(format!("http://{}/", proxy.address)).body(()).unwrap();
    let response = send.send_request(request, true).unwrap().0;
    let whole = async {
        let mut body = response.await?.into_body();
        while let Some(part) = body.data().await {
            part?;
        }
        Ok::<_, h2::Error>(())
    };
    let end = tokio::time::timeout(lab::LONG, whole).await.expect("in time");
    assert!(matches!(&end, Err(error) if error.is_reset()), "{end:?}");
}
