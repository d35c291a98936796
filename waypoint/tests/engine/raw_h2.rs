//! Frames of HTTP/2 as no library writes them (RFC 9113 section 4.1; RFC 7541 section 6.2.2 for the heads).

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::lab::{LONG, Proxy};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A string without Huffman's code, after its length.
fn string(out: &mut Vec<u8>, text: &[u8]) {
    let mut rest = text.len();
    if rest < 127 {
        out.push(u8::try_from(rest).unwrap());
    } else {
        out.push(127);
        rest -= 127;
        while rest >= 128 {
            out.push(u8::try_from(rest % 128).unwrap() | 128);
            rest /= 128;
        }
        out.push(u8::try_from(rest).unwrap());
    }
    out.extend_from_slice(text);
}

/// Fields, each in full and never indexed.
pub fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0);
        string(&mut out, name);
        string(&mut out, value);
    }
    out
}

/// The fields of a good request, and more.
pub fn request(method: &str, path: &str, more: &[(&[u8], &[u8])]) -> Vec<u8> {
    let good: [(&[u8], &[u8]); 4] = [
        (b":method", method.as_bytes()),
        (b":scheme", b"http"),
        (b":authority", b"a"),
        (b":path", path.as_bytes()),
    ];
    block(&[&good[..], more].concat())
}

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With a response that was whole.
    Answered,
    Reset(u32),
    /// The connection did, with or without a word.
    Away,
}

/// A client.
pub struct Raw {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Raw {
    /// Says what a client has to say first, with these settings.
    pub async fn connect(proxy: &Proxy, settings: &[(u16, u32)]) -> Self {
        let stream = TcpStream::connect(proxy.address).await.unwrap();
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        let mut raw = Self { stream, input: Vec::new() };
        raw.send(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &frame(SETTINGS, 0, 0, &payload)[..]].concat()).await;
        raw
    }

    /// Sends; false if the other side takes no more, for good or for as long as a test may wait.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        matches!(tokio::time::timeout(LONG, self.stream.write_all(bytes)).await, Ok(Ok(())))
    }

    /// What can be sent before the other side takes no more.
    pub async fn send_until_full(&mut self, bytes: &[u8], most: usize) -> usize {
        let (mut sent, patience) = (0, std::time::Duration::from_secs(1));
        while sent < most {
            match tokio::time::timeout(patience, self.stream.write_all(bytes)).await {
                Ok(Ok(())) => sent += bytes.len(),
                Ok(Err(_)) | Err(_) => break,
            }
        }
        sent
    }

    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.input.get(..9) {
                let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                if self.input.len() >= 9 + length {
                    let all: Vec<u8> = self.input.drain(..9 + length).collect();
                    let stream = u32::from_be_bytes(all[5..9].try_into().unwrap());
                    return Some(Frame { kind: all[3], flags: all[4], stream, payload: all[9..].to_vec() });
                }
            }
            let read = tokio::time::timeout(LONG, self.stream.read_buf(&mut self.input)).await;
            if !matches!(read.expect("in time"), Ok(count) if count > 0) {
                return None;
            }
        }
    }

    /// Reads until a stream ends; lets the server send as much as it likes.
    pub async fn end_of(&mut self, stream: u32) -> End {
        while let Some(frame) = self.next().await {
            match frame.kind {
                RST_STREAM if frame.stream == stream => {
                    return End::Reset(u32::from_be_bytes(frame.payload[..4].try_into().unwrap()));
                }
                GOAWAY => return End::Away,
                SETTINGS if frame.flags & ACK == 0 => {
                    self.send(&self::frame(SETTINGS, ACK, 0, &[])).await;
                }
                DATA | HEADERS if frame.stream == stream && frame.flags & END_STREAM != 0 => {
                    return End::Answered;
                }
                _ => {}
            }
        }
        End::Away
    }

    /// Sends one request without a body, and waits for its end.
    pub async fn ask(&mut self, stream: u32, fields: &[u8]) -> End {
        self.send(&frame(HEADERS, END_HEADERS | END_STREAM, stream, fields)).await;
        self.end_of(stream).await
    }
}
