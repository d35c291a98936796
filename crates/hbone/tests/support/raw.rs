//! Frames by hand: what a hostile or broken peer sends.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// One frame's bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block of literals without indexing (RFC 7541 section 6.2.2), no Huffman coding.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        string(&mut bytes, name);
        string(&mut bytes, value);
    }
    bytes
}

/// RFC 7541 section 5.1 and 5.2.
fn string(bytes: &mut Vec<u8>, text: &str) {
    if text.len() < 127 {
        bytes.push(text.len() as u8);
    } else {
        bytes.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            bytes.push((rest % 128 + 128) as u8);
            rest /= 128;
        }
        bytes.push(rest as u8);
    }
    bytes.extend(text.as_bytes());
}

/// The header block of a CONNECT request.
pub fn connect(authority: &str) -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", authority)])
}

/// A frame that was received.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The error code of a RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// A connection whose frames are made by hand.
pub struct Raw {
    pub io: DuplexStream,
}

impl Raw {
    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        // A peer that has hung up is what some tests wait for.
        let _ = self.io.write_all(&frame(kind, flags, stream, payload)).await;
    }

    /// Begins as a client. Without a dynamic table, so that [`Raw::is_status`] knows what responses look like.
    pub async fn begin(&mut self) {
        self.io.write_all(PREFACE).await.unwrap();
        self.send(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0]).await;
    }

    /// Sends a CONNECT request.
    pub async fn connect(&mut self, stream: u32, authority: &str) {
        self.send(HEADERS, END_HEADERS, stream, &connect(authority)).await;
    }

    /// The next frame; `None` when the peer has hung up.
    pub async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.io.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    /// The next frame that says something about streams or the connection's end.
    pub async fn next_answer(&mut self) -> Option<Frame> {
        loop {
            let frame = self.next().await?;
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]).await,
                PING if frame.flags & ACK == 0 => self.send(PING, ACK, 0, &frame.payload).await,
                SETTINGS | PING | WINDOW_UPDATE => {}
                _ => return Some(frame),
            }
        }
    }

    /// The GOAWAY that ends the connection; `None` if it ends without one.
    pub async fn goaway(&mut self) -> Option<Frame> {
        let mut last = None;
        let all = async {
            while let Some(frame) = self.next().await {
                if frame.kind == GOAWAY {
                    last = Some(frame);
                }
            }
        };
        timeout(Duration::from_secs(300), all).await.expect("the connection never ended");
        last
    }

    /// Whether `frame` is a response with this status.
    pub fn is_status(frame: &Frame, status: u16) -> bool {
        // Statuses of the static table are one byte (RFC 7541 appendix A), others are written as a literal in Huffman
        // code (appendix B).
        let expected: &[u8] = match status {
            200 => &[0x88],
            400 => &[0x8c],
            401 => &[0x08, 0x82, 0x68, 0x01],
            431 => &[0x08, 0x83, 0x69, 0x90, 0xff],
            503 => &[0x08, 0x83, 0x6c, 0x0c, 0xff],
            other => panic!("status {other} has no bytes here"),
        };
        // A change of the table's size may come first (RFC 7541 section 6.3).
        let block = frame.payload.strip_prefix(&[0x20]).unwrap_or(&frame.payload);
        frame.kind == HEADERS && block.starts_with(expected)
    }
}
