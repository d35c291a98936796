//! What is spoken on a connection of which nothing is said, by its first bytes.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};

/// What the first bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spoken {
    /// HTTP/1 or HTTP/2.
    Http,
    /// A TLS handshake.
    Tls,
    /// Something else; or nothing yet: then the server may be the one who speaks first.
    Other,
}

/// How HTTP/2 begins (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// As many empty lines before a request are passed over, as servers do (RFC 9112 section 2.2).
const EMPTY_LINES: usize = 4;
/// The first line of a request may be long; one that is longer is for the parser to judge.
const LONGEST_LINE: usize = 16 * 1024;

/// Reads until it is clear what is spoken, for at most `limit`. Gives what was read, which belongs before what is still to be
/// read; `None` if the client has ended the connection, or it failed, without a byte.
pub async fn first_bytes<T: net::Io>(mut io: T, limit: Duration) -> Option<(Spoken, BytesMut, T)> {
    let mut input = BytesMut::new();
    let deadline = Instant::now() + limit;
    loop {
        match timeout_at(deadline, io.read_buf(&mut input)).await {
            // A client that has nothing to say may still want to hear. One that has begun what may become a request is not
            // let past those that look at requests for being slow.
            Err(_) => {
                let spoken = if matches!(&*input, [] | [0x16]) { Spoken::Other } else { Spoken::Http };
                return Some((spoken, input, io));
            }
            Ok(Err(_)) => return None,
            Ok(Ok(0)) => return (!input.is_empty()).then_some((Spoken::Other, input, io)),
            Ok(Ok(_)) => {
                if let Some(spoken) = spoken(&input) {
                    return Some((spoken, input, io));
                }
            }
        }
    }
}

/// What a connection shows of a TLS handshake.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// Whether it begins with one.
    pub tls: bool,
    /// The server that the handshake names, in lower case.
    pub server_name: Option<Box<str>>,
}

/// As much of a handshake's first message is read: post-quantum shares and many extensions fit in a few KiB.
const LONGEST_HELLO: usize = 64 * 1024;

/// Reads the first message of a TLS handshake, for at most `limit`; `input` is what was read already, to which what is read
/// is added. What is no handshake, or doesn't come in time, is told as it stands.
pub async fn hello<T: net::Io>(io: &mut T, input: &mut BytesMut, limit: Duration) -> Hello {
    let deadline = Instant::now() + limit;
    let mut reader = HelloReader::default();
    loop {
        if let Some(hello) = reader.read(input) {
            return hello;
        }
        match timeout_at(deadline, io.read_buf(input)).await {
            Ok(Ok(count)) if count > 0 && input.len() < LONGEST_HELLO => {}
            _ => return Hello { tls: input.first() == Some(&0x16), server_name: None },
        }
    }
}

/// Reads a handshake as it comes, each byte once.
#[derive(Default)]
struct HelloReader {
    acceptor: rustls::server::Acceptor,
    read: usize,
}

impl HelloReader {
    /// What `input`, of which more has come, shows; `None` if more is needed.
    fn read(&mut self, input: &[u8]) -> Option<Hello> {
        match input {
            [] | [0x16] => return None,
            [0x16, 0x03, ..] => {}
            _ => return Some(Hello::default()),
        }
        let mut rest = input.get(self.read..).unwrap_or_default();
        // It takes as much at a time as it has room for.
        while let Ok(1..) = self.acceptor.read_tls(&mut rest) {
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
                    return Some(Hello { tls: true, server_name: name.map(Into::into) });
                }
                Ok(None) => {}
                // It looks like a handshake and is none that could be read: its server will judge it.
                Err(_) => return Some(Hello { tls: true, server_name: None }),
            }
        }
        self.read = input.len() - rest.len();
        None
    }
}

/// What `input` is the beginning of; `None` if more is needed.
#[must_use]
pub fn spoken(input: &[u8]) -> Option<Spoken> {
    match input {
        [] => return None,
        // A record of a handshake (RFC 8446 section 5.1).
        [0x16] => return None,
        [0x16, 0x03, ..] => return Some(Spoken::Tls),
        _ => {}
    }
    let preface = input.len().min(PREFACE.len());
    if input.get(..preface) == PREFACE.get(..preface) {
        return (preface == PREFACE.len()).then_some(Spoken::Http);
    }
    let mut line = input;
    for _ in 0..EMPTY_LINES {
        line = line.strip_prefix(b"\r\n").or_else(|| line.strip_prefix(b"\n")).unwrap_or(line);
    }
    // A method is a token, which servers take whatever it is; and then comes a target.
    let method = line.iter().take_while(|b| is_token(**b)).count();
    match line.get(method..) {
        Some([]) => (line.len() > LONGEST_LINE).then_some(Spoken::Http),
        Some([b'\r']) if method == 0 => None,
        Some([b' ' | b'\t', ..]) if method > 0 => by_line(line),
        _ => Some(Spoken::Other),
    }
}

/// Whether a token may have it (RFC 9110 section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Many protocols have words in capitals (`EHLO mail`, `USER name`): the version at the end of the line tells.
fn by_line(input: &[u8]) -> Option<Spoken> {
    let end = memchr::memchr(b'\n', input);
    let line = input.get(..end.unwrap_or(input.len())).unwrap_or_default();
    if line.iter().any(|b| b.is_ascii_control() && !matches!(b, b'\t' | b'\r')) {
        return Some(Spoken::Other);
    }
    if end.is_none() {
        return (line.len() > LONGEST_LINE).then_some(Spoken::Http);
    }
    let line = line.trim_ascii_end();
    let is_http = line.rsplit(u8::is_ascii_whitespace).next().is_some_and(|last| last.starts_with(b"HTTP/"));
    Some(if is_http { Spoken::Http } else { Spoken::Other })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn protocols_are_told_by_their_first_bytes_however_they_are_cut() {
        for (input, expected) in [
            (&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], Spoken::Http),
            (b"PROPFIND /x HTTP/1.1\r\n", Spoken::Http),
            (b"OPTIONS * HTTP/1.1\r\n", Spoken::Http),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Spoken::Http),
            (b"\x16\x03\x01\x02\x00\x01", Spoken::Tls),
            (b"EHLO mail.example.com\r\n", Spoken::Other),
            (b"USER anonymous\r\n", Spoken::Other),
            (b"*1\r\n$4\r\nPING\r\n", Spoken::Other),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Spoken::Other),
            (b"get / HTTP/1.1\r\n", Spoken::Http),
            (b"x!y 1 HTTP/1.1\n", Spoken::Http),
            (b"GET\t/\tHTTP/1.1\r\n", Spoken::Http),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ / HTTP/1.1\r\n", Spoken::Http),
            (b"\r\nGET / HTTP/1.1\r\n", Spoken::Http),
            (b"\r\n\r\n\n\r\nGET / HTTP/1.1\r\n", Spoken::Http),
            (b"\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n", Spoken::Other),
            (b"\r\nhello\r\n", Spoken::Other),
            (b"get key\r\n", Spoken::Other),
            (b"A \x00\x00\x01", Spoken::Other),
        ] {
            assert_eq!(spoken(input), Some(expected), "{input:?}");
            let first = (1..=input.len()).find_map(|end| spoken(&input[..end]));
            assert_eq!(first, Some(expected), "{input:?} byte by byte");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_server_name_of_a_handshake_is_read_however_it_is_cut() {
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let mut bytes = Vec::new();
        let name = "Shop.Example.com".try_into().unwrap();
        let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
        client.write_tls(&mut bytes).unwrap();
        for part in [1, 7, bytes.len()] {
            let (mut client, mut server) = tokio::io::duplex(16);
            let sent: Vec<Vec<u8>> = bytes.chunks(part).map(<[u8]>::to_vec).collect();
            let sending = tokio::spawn(async move {
                for part in sent {
                    client.write_all(&part).await.unwrap();
                }
                client
            });
            let mut input = BytesMut::new();
            let found = hello(&mut server, &mut input, Duration::from_secs(1)).await;
            assert_eq!(found, Hello { tls: true, server_name: Some("shop.example.com".into()) });
            assert_eq!(&*input, &*bytes);
            drop(sending.await);
        }
        let read = |input: &[u8]| HelloReader::default().read(input);
        assert_eq!(read(b"GET / HTTP/1.1"), Some(Hello::default()));
        // A message of another kind.
        let other = b"\x16\x03\x01\x00\x04\x02\x00\x00\x00";
        assert_eq!(read(other), Some(Hello { tls: true, server_name: None }));
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_not_waited_for_longer_than_the_limit() {
        let limit = Duration::from_secs(1);
        let (mut client, server) = tokio::io::duplex(64);
        let started = Instant::now();
        let (spoken, input, server) = first_bytes(server, limit).await.unwrap();
        assert_eq!((spoken, input.len(), started.elapsed()), (Spoken::Other, 0, limit));
        client.write_all(b"GET / HT").await.unwrap();
        let (spoken, input, mut server) = first_bytes(server, limit).await.unwrap();
        assert_eq!((spoken, &*input), (Spoken::Http, &b"GET / HT"[..]));
        for (begun, expected) in [("\r\n", Spoken::Http), ("GE", Spoken::Http), ("\x16", Spoken::Other)] {
            client.write_all(begun.as_bytes()).await.unwrap();
            let (spoken, _, rest) = first_bytes(server, limit).await.unwrap();
            assert_eq!(spoken, expected, "{begun:?}");
            server = rest;
        }
        drop(client);
        assert!(first_bytes(server, limit).await.is_none());
    }
}
