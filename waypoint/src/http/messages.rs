//! What the engine knows of gRPC: it counts the messages in a body as it passes (each has five bytes before it: a flag and
//! its length), and reads and writes a call's status.

use crate::http::head::Fields;

/// How far it has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Messages {
    /// Messages that have begun.
    count: u64,
    /// Bytes of the prefix that were seen.
    prefix: u8,
    /// The length, as far as it was seen.
    length: u32,
    /// Bytes of the message that are to come.
    left: u64,
}

impl Messages {
    /// Looks at the next bytes.
    pub(crate) fn pass(&mut self, mut data: &[u8]) {
        while let Some(first) = data.first() {
            if self.left > 0 {
                let part = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= part as u64;
                data = data.get(part..).unwrap_or_default();
                continue;
            }
            // The first of the five says whether it is compressed.
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(*first);
            }
            self.prefix += 1;
            data = data.get(1..).unwrap_or_default();
            if self.prefix == 5 {
                self.count += 1;
                self.left = u64::from(self.length);
                (self.prefix, self.length) = (0, 0);
            }
        }
    }

    /// How many there were.
    pub(crate) fn count(self) -> u64 {
        self.count
    }
}

/// Puts the status that goes with an answer of our own. What the fields say already stands: a call has one status.
pub(crate) fn put_status(fields: &mut Fields, status: u16, message: &[u8]) {
    let code = grpc_status(fields).unwrap_or_else(|| grpc_of(status)).to_string();
    fields.set(b"grpc-status", code.as_bytes());
    if fields.values(b"grpc-message").next().is_none() {
        fields.push(b"grpc-message", &percent_encoded(message));
    }
}

/// The status of a call, where the fields have one.
pub(crate) fn grpc_status(fields: &Fields) -> Option<u8> {
    let value = fields.values(b"grpc-status").next()?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// A text as `grpc-message` has it, the first KiB of it.
fn percent_encoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len().min(1024));
    for byte in text.iter().take(1024) {
        if matches!(byte, b' '..=b'~') && *byte != b'%' {
            out.push(*byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    out
}

/// The code of gRPC that goes with a status of HTTP (as Envoy maps it).
fn grpc_of(status: u16) -> u8 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// The status of HTTP that goes with a code of gRPC (as Envoy maps it).
pub(crate) fn http_of(code: u8) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::{Messages, put_status};
    use crate::http::head::Fields;

    #[test]
    fn a_call_has_one_status() {
        for (said, status, expected) in [(None, 403, "7"), (Some("14"), 200, "14"), (Some("x"), 503, "14")] {
            let mut fields = Fields::default();
            if let Some(said) = said {
                fields.push(b"grpc-status", said.as_bytes());
            }
            put_status(&mut fields, status, b"100%");
            let all: Vec<_> = fields.values(b"grpc-status").collect();
            assert_eq!(all, [expected.as_bytes()]);
            assert_eq!(fields.joined(b"grpc-message").as_deref(), Some(&b"100%25"[..]));
        }
        let mut fields = Fields::default();
        fields.push(b"grpc-message", b"theirs");
        put_status(&mut fields, 403, b"ours");
        assert_eq!(fields.joined(b"grpc-message").as_deref(), Some(&b"theirs"[..]));
    }

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut body = Vec::new();
        for length in [0_u32, 1, 300, 0, 70_000] {
            body.push(0);
            body.extend_from_slice(&length.to_be_bytes());
            body.extend(std::iter::repeat_n(1, length as usize));
        }
        for size in [1, 2, 3, 5, 7, 1000, body.len()] {
            let mut messages = Messages::default();
            body.chunks(size).for_each(|part| messages.pass(part));
            assert_eq!(messages.count(), 5, "in parts of {size}");
        }
    }
}
