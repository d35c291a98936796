//! What clients and servers send as HTTP.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use waypoint::http::body::{BodyReader, Part};
use waypoint::http::decide::{Connection, Decide, Decided, Decision, Flag, Response};
use waypoint::http::h1::{Framing, HeadParser, Refusal};
use waypoint::http::head::{Fields, RequestHead, ResponseHead};
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};

use crate::seeds_of;

fn lines(fields: &Fields) -> Vec<(Vec<u8>, Vec<u8>)> {
    fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

type Read<H> = Result<Option<(H, usize, Framing)>, Refusal>;

/// Reads a request of which first `cut` bytes come.
fn read_request(bytes: &[u8], cut: usize) -> Read<RequestHead> {
    let (mut parser, mut head) = (HeadParser::default(), RequestHead::default());
    for part in [&bytes[..cut], bytes] {
        if let Some((length, framing)) = parser.request(part, &mut head)? {
            return Ok(Some((head, length, framing)));
        }
    }
    Ok(None)
}

/// Any bytes are a request that reads back as it is written, the beginning of one, or refused; however they come.
pub(crate) fn request(bytes: &[u8]) {
    let whole = read_request(bytes, 0);
    let cut = read_request(bytes, bytes.len() / 2);
    match (whole, cut) {
        (Ok(Some((head, length, framing))), Ok(Some((again, length_again, framing_again)))) => {
            assert_eq!((length, framing), (length_again, framing_again));
            assert_eq!(lines(&head.fields), lines(&again.fields));
            let mut out = BytesMut::new();
            head.write(&mut out);
            out.extend_from_slice(b"\r\n");
            let written = read_request(&out, 0).expect("what we write is good").expect("and whole").0;
            assert_eq!(
                (head.method(), head.target(), head.authority()),
                (written.method(), written.target(), written.authority())
            );
            assert_eq!(lines(&head.fields), lines(&written.fields));
        }
        (Ok(None), Ok(None)) => {}
        (Err(refusal), Err(again)) => assert_eq!(refusal, again),
        (whole, cut) => panic!("{whole:?} at once, {cut:?} in two pieces"),
    }
}

pub(crate) fn requests() -> Vec<Vec<u8>> {
    seeds_of(&[
        "GET /a?b=c HTTP/1.1\r\nHost: a.example:80\r\nAccept: */*\r\n\r\n",
        "POST http://b/x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nCookie: a=b\r\n\r\nabc",
        "PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: upgrade, x\r\nUpgrade: websocket\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    ])
}

/// Any bytes are a response, the beginning of one, or refused.
pub(crate) fn response(bytes: &[u8]) {
    let read = |cut: usize| -> Read<ResponseHead> {
        let (mut parser, mut head) = (HeadParser::default(), ResponseHead::default());
        for part in [&bytes[..cut], bytes] {
            if let Some((length, framing)) = parser.response(part, &mut head, false)? {
                return Ok(Some((head, length, framing)));
            }
        }
        Ok(None)
    };
    let told = |read: Read<ResponseHead>| {
        read.map(|r| r.map(|(head, length, framing)| (head.status, lines(&head.fields), length, framing)))
    };
    assert_eq!(told(read(0)), told(read(bytes.len() / 2)));
}

pub(crate) fn responses() -> Vec<Vec<u8>> {
    seeds_of(&[
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nServer: x\r\n\r\nabc",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.0 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ])
}

/// Any bytes are chunks, the beginning of such, or refused; however they come.
pub(crate) fn chunks(bytes: &[u8]) {
    let read = |cut: usize| {
        let (mut reader, mut trailers) = (BodyReader::new(Framing::Chunked), Fields::default());
        let (mut input, mut data, mut left) = (BytesMut::new(), Vec::new(), usize::MAX);
        for part in [&bytes[..cut], &bytes[cut..]] {
            input.extend_from_slice(part);
            loop {
                match reader.next(&mut input, &mut trailers) {
                    Ok(Part::Data(part)) => data.extend_from_slice(&part),
                    Ok(Part::More) => break,
                    Ok(Part::End) => {
                        left = input.len();
                        break;
                    }
                    Err(refusal) => return (data, Err(refusal)),
                }
            }
        }
        (data, Ok((left, lines(&trailers))))
    };
    let (whole, cut) = (read(0), read(bytes.len() / 2));
    assert_eq!(whole.0, cut.0);
    assert_eq!(whole.1.is_ok(), cut.1.is_ok());
}

pub(crate) fn bodies() -> Vec<Vec<u8>> {
    seeds_of(&["3\r\nabc\r\n0\r\n\r\n", "a;x=y\r\n0123456789\r\n0\r\nX-Trailer: v\r\n\r\n", "0\r\n\r\nGET "])
}

/// Answers everything.
struct Answers;

impl Decide for Answers {
    fn decide(&self, _: &mut RequestHead, _: &Connection, _: &mut Decided) -> Decision {
        let body = bytes::Bytes::from_static(b"ok");
        Decision::Respond(Arc::new(Response { status: 200, fields: Box::default(), body, flag: Flag::None }))
    }
}

/// Whatever a client sends, its connection ends, and what it is sent is HTTP.
pub(crate) fn connection(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let (mut client, server) = duplex(1 << 20);
        let address = "127.0.0.1:80".parse().expect("an address");
        let facts = Connection {
            client: address,
            destination: address,
            identity: None,
            server_name: None,
            secure: false,
            said: None,
        };
        let worker =
            Worker::new(Arc::new(Answers), Settings::default(), tokio_util::sync::CancellationToken::new());
        let served = tokio::spawn(serve(worker, Io::Layered(Box::new(server)), facts));
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        let is_http = answer.is_empty() || answer.starts_with(b"HTTP/1.1 ") || bytes.starts_with(b"PRI");
        assert!(is_http, "{:?}", String::from_utf8_lossy(&answer));
        drop(client);
        let served = tokio::time::timeout(Duration::from_secs(100_000), served).await;
        served.expect("it ends").expect("without a panic");
    });
}

pub(crate) fn conversations() -> Vec<Vec<u8>> {
    let mut seeds = requests();
    seeds.push(requests().concat());
    let mut h2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    h2.extend(b"\0\0\x03\x01\x05\0\0\0\x01\x82\x86\x84");
    seeds.push(h2);
    seeds
}
