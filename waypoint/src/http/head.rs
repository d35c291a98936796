//! The head of a request or response, in one buffer.
//!
//! The text of a head that came by HTTP/1 is copied once, as it is; fields are ranges of it. An edit appends to the
//! text and marks what it replaces as removed. So the order and the case of what is passed on stay, nothing is
//! allocated once a [`Fields`] has its size, and a head can be used again for the next message.

use std::borrow::Cow;

use bytes::{BufMut, BytesMut};

/// The longest head, in bytes; a longer one is answered with 431. Envoy's default.
pub const MAX_HEAD: usize = 60 * 1024;
/// The most fields of a head; more are answered with 431. Envoy's default.
pub const MAX_FIELDS: usize = 100;

/// A range of a head's text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Span {
    start: u32,
    length: u32,
}

impl Span {
    /// Offsets are below [`MAX_HEAD`] and what edits add, far from the limit of `u32`.
    pub(crate) fn new(start: usize, end: usize) -> Self {
        let start32 = u32::try_from(start).unwrap_or(u32::MAX);
        Self { start: start32, length: u32::try_from(end.saturating_sub(start)).unwrap_or(0) }
    }

    fn of(self, text: &[u8]) -> &[u8] {
        let start = self.start as usize;
        text.get(start..start + self.length as usize).unwrap_or_default()
    }
}

/// The fields that the engine itself looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Known {
    /// Any that has no meaning to the engine.
    Other,
    /// `host`
    Host,
    /// `content-length`
    ContentLength,
    /// `transfer-encoding`
    TransferEncoding,
    /// `connection`
    Connection,
    /// `keep-alive`
    KeepAlive,
    /// `proxy-connection`
    ProxyConnection,
    /// `upgrade`
    Upgrade,
    /// `http2-settings`
    Http2Settings,
    /// `te`
    Te,
    /// `trailer`
    Trailer,
    /// `expect`
    Expect,
    /// `x-forwarded-for`
    ForwardedFor,
    /// `x-forwarded-proto`
    ForwardedProto,
    /// `x-forwarded-client-cert`
    ForwardedClientCert,
    /// `x-request-id`
    RequestId,
}

impl Known {
    /// What the field `name`, in any case, is.
    #[must_use]
    pub fn of(name: &[u8]) -> Self {
        const LONGEST: usize = 23;
        let mut lower = [0; LONGEST];
        let Some(lower) = lower.get_mut(..name.len()) else { return Self::Other };
        lower.copy_from_slice(name);
        lower.make_ascii_lowercase();
        match &*lower {
            b"host" => Self::Host,
            b"content-length" => Self::ContentLength,
            b"transfer-encoding" => Self::TransferEncoding,
            b"connection" => Self::Connection,
            b"keep-alive" => Self::KeepAlive,
            b"proxy-connection" => Self::ProxyConnection,
            b"upgrade" => Self::Upgrade,
            b"http2-settings" => Self::Http2Settings,
            b"te" => Self::Te,
            b"trailer" => Self::Trailer,
            b"expect" => Self::Expect,
            b"x-forwarded-for" => Self::ForwardedFor,
            b"x-forwarded-proto" => Self::ForwardedProto,
            b"x-forwarded-client-cert" => Self::ForwardedClientCert,
            b"x-request-id" => Self::RequestId,
            _ => Self::Other,
        }
    }

    /// Whether the field concerns one connection only (RFC 9110 section 7.6.1), and is never passed on as it came.
    #[must_use]
    pub fn is_hop_by_hop(self) -> bool {
        matches!(
            self,
            Self::Connection
                | Self::KeepAlive
                | Self::ProxyConnection
                | Self::TransferEncoding
                | Self::Upgrade
                | Self::Http2Settings
                | Self::Te
                | Self::Trailer
        )
    }

    /// Whether the field is the engine's to write: it says whose message this is, or where it ends.
    #[must_use]
    pub fn is_engines(self) -> bool {
        self.is_hop_by_hop() || matches!(self, Self::Host | Self::ContentLength | Self::Expect)
    }
}

#[derive(Clone, Copy, Debug)]
struct Field {
    /// Empty: the field was removed.
    name: Span,
    value: Span,
    known: Known,
}

/// Whether an application may take one name for the other.
pub(crate) fn reads_as(name: &[u8], other: &[u8]) -> bool {
    let read = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == other.len() && name.iter().map(read).eq(other.iter().map(read))
}

/// The fields of a head, in order.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    text: Vec<u8>,
    list: Vec<Field>,
}

impl Fields {
    /// Empties it; the buffers stay.
    pub fn clear(&mut self) {
        self.text.clear();
        self.list.clear();
    }

    /// What it holds of memory for text.
    pub(crate) fn capacity(&self) -> usize {
        self.text.capacity()
    }

    /// How many there are, removed ones included: what the limit counts.
    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    /// The bytes of all that was received and added.
    #[must_use]
    pub fn size(&self) -> usize {
        self.text.len()
    }

    /// Adds a field whose name and value are ranges of a text that [`Fields::set_text`] will give.
    pub(crate) fn push_span(&mut self, name: Span, value: Span, known: Known) {
        self.list.push(Field { name, value, known });
    }

    /// Gives the text that the ranges so far are of.
    pub(crate) fn set_text(&mut self, text: &[u8]) {
        self.text.clear();
        self.text.extend_from_slice(text);
    }

    pub(crate) fn text(&self, span: Span) -> &[u8] {
        span.of(&self.text)
    }

    /// Whether it is the head of an HTTP/1.0 response.
    pub(crate) fn is_old(&self) -> bool {
        self.text.starts_with(b"HTTP/1.0")
    }

    /// Where the first value of a known field is.
    pub(crate) fn span_of(&self, known: Known) -> Span {
        self.list.iter().find(|f| f.known == known).map_or(Span::default(), |f| f.value)
    }

    /// Appends `bytes` to the text.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Span {
        let start = self.text.len();
        self.text.extend_from_slice(bytes);
        Span::new(start, self.text.len())
    }

    /// All fields, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.iter_known().map(|(_, name, value)| (name, value))
    }

    /// All fields, with what they are.
    pub fn iter_known(&self) -> impl Iterator<Item = (Known, &[u8], &[u8])> {
        let present = self.list.iter().filter(|f| f.name.length > 0);
        present.map(|f| (f.known, f.name.of(&self.text), f.value.of(&self.text)))
    }

    /// The values of a field that the engine knows.
    pub fn known(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.iter_known().filter(move |(k, _, _)| *k == known).map(|(_, _, value)| value)
    }

    /// The values of the field `name`, in any case.
    pub fn values<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The value of the field `name`, in any case; several joined by commas (RFC 9110 section 5.3).
    #[must_use]
    pub fn joined(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        let mut values = self.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value);
        let first = values.next()?;
        Some(values.fold(Cow::Borrowed(first), |mut joined, next| {
            let all = joined.to_mut();
            all.push(b',');
            all.extend_from_slice(next);
            joined
        }))
    }

    /// Whether there is a field that the engine knows.
    #[must_use]
    pub fn has(&self, known: Known) -> bool {
        self.list.iter().any(|f| f.known == known && f.name.length > 0)
    }

    /// Adds a field after all others. The caller vouches that name and value are valid: see
    /// [`is_field_name`] and [`is_field_value`].
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let name_span = self.append(name);
        let value = self.append(value);
        self.list.push(Field { name: name_span, value, known: Known::of(name) });
    }

    /// Puts `value` in the place of all values of the field.
    pub fn set(&mut self, name: &[u8], value: &[u8]) {
        self.remove(name);
        self.push(name, value);
    }

    /// Removes all fields `name`, in any case.
    pub fn remove(&mut self, name: &[u8]) {
        let text = &self.text;
        for field in &mut self.list {
            if field.name.of(text).eq_ignore_ascii_case(name) {
                field.name = Span::default();
            }
        }
    }

    /// Removes all fields that an application may take for `name`, which is ours to say: CGI and its heirs tell `-` and `_` apart
    /// no more than the case of letters (RFC 3875 section 4.1.18).
    pub fn remove_all_like(&mut self, name: &[u8]) {
        self.remove_named(|other| reads_as(other, name));
    }

    /// Removes all fields that `is` says so of.
    pub fn remove_known(&mut self, is: impl Fn(Known) -> bool) {
        for field in &mut self.list {
            if field.known != Known::Other && is(field.known) {
                field.name = Span::default();
            }
        }
    }

    /// Removes all fields for whose name `is` holds.
    pub(crate) fn remove_named(&mut self, is: impl Fn(&[u8]) -> bool) {
        let text = &self.text;
        for field in &mut self.list {
            if field.name.length > 0 && is(field.name.of(text)) {
                field.name = Span::default();
            }
        }
    }

    /// Writes the fields as lines of HTTP/1, without the empty one at their end.
    pub fn write(&self, out: &mut BytesMut) {
        out.reserve(self.text.len() + 4 * self.list.len());
        for (name, value) in self.iter() {
            write_line(out, name, value);
        }
    }

    /// The members of the lists in the values of a known field (RFC 9110 section 5.6.1).
    pub fn members(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        let parts = self.known(known).flat_map(|value| value.split(|b| *b == b','));
        parts.map(<[u8]>::trim_ascii).filter(|part| !part.is_empty())
    }
}

impl model::http::Headers for Fields {
    fn field(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.joined(name.as_bytes())
    }
}

/// Writes a field's line of HTTP/1.
pub(crate) fn write_line(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.put_slice(name);
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

/// The protocol that a message came by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Version {
    /// HTTP/1.1
    #[default]
    Http1,
    /// HTTP/2
    Http2,
}

/// The head of a request. `Host` is not among the fields: it is the authority.
#[derive(Clone, Debug, Default)]
pub struct RequestHead {
    /// The fields.
    pub fields: Fields,
    /// The protocol it came by.
    pub version: Version,
    /// Whether the client speaks TLS to us, so that the scheme is `https`.
    pub secure: bool,
    /// Whether it came as HTTP/2's request for a switch of protocols (RFC 8441), and is in the form of HTTP/1.1's.
    pub(crate) extended: bool,
    pub(crate) method: Span,
    pub(crate) authority: Span,
    pub(crate) target: Span,
}

impl RequestHead {
    /// Empties it; the buffers stay.
    pub fn clear(&mut self) {
        self.fields.clear();
        self.extended = false;
        self.method = Span::default();
        self.authority = Span::default();
        self.target = Span::default();
    }

    /// Whether nothing was read into it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fields.count() == 0 && self.fields.size() == 0
    }

    /// The method, as it was sent.
    #[must_use]
    pub fn method(&self) -> &str {
        as_text(self.fields.text(self.method))
    }

    /// `:authority` or `Host`.
    #[must_use]
    pub fn authority(&self) -> &str {
        as_text(self.fields.text(self.authority))
    }

    /// The path and the query, as they are to be sent.
    #[must_use]
    pub fn target(&self) -> &str {
        as_text(self.fields.text(self.target))
    }

    /// The path without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.target().split_once('?').map_or(self.target(), |(path, _)| path)
    }

    /// The query, without the question mark; empty without one.
    #[must_use]
    pub fn query(&self) -> &str {
        self.target().split_once('?').map_or("", |(_, query)| query)
    }

    /// Whether it asks about the server as a whole, not about anything on it (`OPTIONS *`, RFC 9110 section 9.3.7).
    #[must_use]
    pub fn is_server_wide(&self) -> bool {
        self.target() == "*"
    }

    /// `http` or `https`.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    /// Replaces the path and the query. The caller vouches that there is nothing in it that a target may not have.
    pub fn set_target(&mut self, target: &str) {
        self.target = self.fields.append(target.as_bytes());
    }

    /// Replaces the authority.
    pub fn set_authority(&mut self, authority: &str) {
        self.authority = self.fields.append(authority.as_bytes());
    }

    /// Replaces the method.
    pub fn set_method(&mut self, method: &str) {
        self.method = self.fields.append(method.as_bytes());
    }

    /// Whether doing it twice is as doing it once (RFC 9110 section 9.2.2).
    #[must_use]
    pub fn is_idempotent(&self) -> bool {
        matches!(self.method(), "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
    }

    /// Whether it is gRPC, by its content type.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        let is = |value: &[u8]| {
            value
                .strip_prefix(b"application/grpc")
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
        };
        self.fields.values(b"content-type").next().is_some_and(is)
    }

    /// Writes it as HTTP/1.1, without the fields that say how the body is framed and the empty line at its end.
    pub fn write(&self, out: &mut BytesMut) {
        let authority = self.fields.text(self.authority);
        out.reserve(self.fields.size() + 64);
        out.put_slice(self.fields.text(self.method));
        out.put_slice(b" ");
        out.put_slice(self.fields.text(self.target));
        out.put_slice(b" HTTP/1.1\r\n");
        write_line(out, b"host", authority);
        self.fields.write(out);
    }
}

/// The head of a response.
#[derive(Clone, Debug, Default)]
pub struct ResponseHead {
    /// The fields.
    pub fields: Fields,
    /// The status code, 100 to 999.
    pub status: u16,
}

impl ResponseHead {
    /// Empties it; the buffers stay.
    pub fn clear(&mut self) {
        self.fields.clear();
        self.status = 0;
    }

    /// Writes it as HTTP/1.1, without the fields that say how the body is framed and the empty line at its end.
    pub fn write(&self, out: &mut BytesMut) {
        write_status(out, self.status);
        self.fields.write(out);
    }
}

/// Writes a status line with the reason that goes with the code.
fn write_status(out: &mut BytesMut, status: u16) {
    if status == 200 {
        out.put_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    let code = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    out.put_slice(b"HTTP/1.1 ");
    out.put_slice(code.as_str().as_bytes());
    out.put_slice(b" ");
    out.put_slice(code.canonical_reason().unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
}

/// What was checked to be visible ASCII, as text.
fn as_text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Whether all bytes may be in a field's name (RFC 9110 section 5.6.2), and there are some.
#[must_use]
pub fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| is_token(*b))
}

/// Whether a field's value has nothing that ends it or is a control (RFC 9110 section 5.5).
#[must_use]
pub fn is_field_value(value: &[u8]) -> bool {
    // Without a branch for each byte, so that it is done several at a time.
    value.iter().fold(true, |good, b| good & ((*b >= b' ' && *b != 0x7f) | (*b == b'\t')))
}

const fn is_token(byte: u8) -> bool {
    const TABLE: [bool; 256] = {
        let mut table = [false; 256];
        let mut byte = 0;
        while byte < 256 {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::indexing_slicing,
                reason = "constant, in bounds"
            )]
            {
                let b = byte as u8;
                table[byte] = b.is_ascii_alphanumeric()
                    || matches!(
                        b,
                        b'!' | b'#'
                            | b'$'
                            | b'%'
                            | b'&'
                            | b'\''
                            | b'*'
                            | b'+'
                            | b'-'
                            | b'.'
                            | b'^'
                            | b'_'
                            | b'`'
                            | b'|'
                            | b'~'
                    );
            }
            byte += 1;
        }
        table
    };
    #[allow(clippy::indexing_slicing, reason = "as many as there are bytes")]
    TABLE[byte as usize]
}
