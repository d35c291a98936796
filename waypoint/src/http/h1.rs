//! Heads of HTTP/1.1, read strictly (RFC 9112): what two implementations could read in two ways is refused, never
//! guessed at. Lines end with CR LF; nothing stands between a name and its colon; no line goes on in the next one.
//!
//! A [`HeadParser`] goes on where it stopped when more bytes come, so that a head that trickles in costs no more than
//! one that comes at once.

use std::ops::Range;

use model::http::is_authority;

use crate::http::head::{
    Fields, Known, MAX_FIELDS, MAX_HEAD, RequestHead, ResponseHead, Span, Version, is_field_name,
    is_field_value,
};

/// Why a message is not taken. Each has one status, and Envoy's flag `DPE` where a peer broke the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// What the protocol does not allow.
    #[error("{0}")]
    Malformed(&'static str),
    /// A head beyond [`MAX_HEAD`] or [`MAX_FIELDS`].
    #[error("the head is larger than {MAX_HEAD} bytes or has more than {MAX_FIELDS} fields")]
    HeadTooLarge,
    /// A transfer coding other than `chunked`.
    #[error("a transfer coding other than chunked")]
    UnknownCoding,
    /// HTTP/1.0, which has neither persistent connections nor chunks.
    #[error("HTTP/1.0")]
    OldVersion,
    /// Another version.
    #[error("a version other than HTTP/1.1")]
    OtherVersion,
}

impl Refusal {
    /// The status that a client is answered with.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::HeadTooLarge => 431,
            Self::UnknownCoding => 501,
            Self::OldVersion => 426,
            Self::OtherVersion => 505,
        }
    }
}

/// How the end of a body is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Framing {
    /// There is no body.
    #[default]
    None,
    /// It has this length, which is not 0.
    Length(u64),
    /// Each chunk says its length.
    Chunked,
    /// It ends with the connection; responses only.
    UntilClose,
}

/// Empty lines before a request that are passed over (RFC 9112 section 2.2 asks for one at least).
const EMPTY_LINES: u8 = 4;
/// The longest method.
const MAX_METHOD: usize = 32;

/// Where the reading of a head has come to.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadParser {
    /// Where the line begins that is not whole yet.
    line: usize,
    /// How far was searched for its end.
    searched: usize,
    empty_lines: u8,
    has_start: bool,
}

/// What a line of a head is given to.
type OnStart<'a> = &'a mut dyn FnMut(&[u8], usize) -> Result<(), Refusal>;

impl HeadParser {
    /// Reads a request's head from the beginning of `input`, of which more may have come since the last call. Returns
    /// its length and the framing of its body, or `None` if it is not whole yet.
    ///
    /// # Errors
    /// See [`Refusal`]. The connection can't be used after that.
    pub fn request(
        &mut self,
        input: &[u8],
        head: &mut RequestHead,
    ) -> Result<Option<(usize, Framing)>, Refusal> {
        let RequestHead { fields, method, authority, target, .. } = head;
        let mut spans = (*method, *authority, *target);
        let end = self.lines(input, fields, &mut |line, at| {
            let parts = request_line(line)?;
            let span = |range: &Range<usize>| Span::new(at + range.start, at + range.end);
            spans = (
                span(&parts.method),
                parts.authority.as_ref().map_or(Span::default(), span),
                span(&parts.target),
            );
            Ok(())
        })?;
        (*method, *authority, *target) = spans;
        let Some(end) = end else { return Ok(None) };
        head.fields.set_text(input.get(..end).unwrap_or_default());
        head.version = Version::Http1;
        if head.target().is_empty() {
            head.set_target("*");
        }
        finish_request(head).map(|framing| Some((end, framing)))
    }

    /// Reads a response's head; like [`HeadParser::request`]. `to_head` says that the request was a HEAD, so that
    /// there is no body whatever the fields say.
    ///
    /// # Errors
    /// See [`Refusal`]; whoever asked is answered with 502.
    pub fn response(
        &mut self,
        input: &[u8],
        head: &mut ResponseHead,
        to_head: bool,
    ) -> Result<Option<(usize, Framing)>, Refusal> {
        let mut status = head.status;
        let end = self.lines(input, &mut head.fields, &mut |line, _| {
            status = status_line(line)?;
            Ok(())
        })?;
        head.status = status;
        let Some(end) = end else { return Ok(None) };
        head.fields.set_text(input.get(..end).unwrap_or_default());
        let framing = body_framing(&head.fields)?;
        let has_none = to_head || matches!(head.status, 100..=199 | 204 | 304);
        let framing = match framing {
            _ if has_none => Framing::None,
            None => Framing::UntilClose,
            Some(framing) => framing,
        };
        Ok(Some((end, framing)))
    }

    /// Reads the fields of a chunked body's end; returns where they end.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn trailers(&mut self, input: &[u8], fields: &mut Fields) -> Result<Option<usize>, Refusal> {
        self.has_start = true;
        let end = self.lines(input, fields, &mut |_, _| Ok(()))?;
        if let Some(end) = end {
            fields.set_text(input.get(..end).unwrap_or_default());
        }
        Ok(end)
    }

    /// Takes whole lines up to the empty one; returns where that ends.
    fn lines(
        &mut self,
        input: &[u8],
        fields: &mut Fields,
        start: OnStart<'_>,
    ) -> Result<Option<usize>, Refusal> {
        loop {
            let rest = input.get(self.searched..).unwrap_or_default();
            let Some(found) = memchr::memchr(b'\n', rest) else {
                self.searched = input.len();
                return if input.len() > MAX_HEAD { Err(Refusal::HeadTooLarge) } else { Ok(None) };
            };
            let end = self.searched + found + 1;
            if end > MAX_HEAD {
                return Err(Refusal::HeadTooLarge);
            }
            let line = input.get(self.line..end).unwrap_or_default();
            let Some(line) = line.strip_suffix(b"\r\n") else {
                return Err(Refusal::Malformed("a line that does not end with CR LF"));
            };
            let at = self.line;
            (self.line, self.searched) = (end, end);
            match (line.is_empty(), self.has_start) {
                (true, true) => return Ok(Some(end)),
                (true, false) => {
                    self.empty_lines += 1;
                    if self.empty_lines > EMPTY_LINES {
                        return Err(Refusal::Malformed("empty lines before the request"));
                    }
                }
                (false, false) => {
                    start(line, at)?;
                    self.has_start = true;
                }
                (false, true) => field_line(line, at, fields)?,
            }
        }
    }
}

/// `name: value`
fn field_line(line: &[u8], at: usize, fields: &mut Fields) -> Result<(), Refusal> {
    if fields.count() >= MAX_FIELDS {
        return Err(Refusal::HeadTooLarge);
    }
    let Some(colon) = memchr::memchr(b':', line) else {
        return Err(Refusal::Malformed("a field without a colon"));
    };
    let (name, value) = line.split_at(colon);
    let value = value.get(1..).unwrap_or_default();
    // A line that goes on in the next one (obs-fold) begins with white space, which no name has.
    if !is_field_name(name) {
        return Err(Refusal::Malformed("a field name with a character that it may not have"));
    }
    if !is_field_value(value) {
        return Err(Refusal::Malformed("a field value with a control character"));
    }
    let start = at + colon + 1 + (value.len() - trim_start(value).len());
    let length = trim(value).len();
    fields.push_span(Span::new(at, at + colon), Span::new(start, start + length), Known::of(name));
    Ok(())
}

/// Without leading white space (RFC 9110 section 5.6.3: blanks and tabs only).
fn trim_start(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    value
}

fn trim(value: &[u8]) -> &[u8] {
    let mut value = trim_start(value);
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

struct RequestLine {
    method: Range<usize>,
    /// Of a target in absolute form.
    authority: Option<Range<usize>>,
    /// Empty for what is meant as the asterisk, and not written so.
    target: Range<usize>,
}

/// `method SP target SP HTTP/1.1`
fn request_line(line: &[u8]) -> Result<RequestLine, Refusal> {
    let bad = Refusal::Malformed("a request line that is none");
    let first = memchr::memchr(b' ', line).ok_or(bad)?;
    let last = memchr::memrchr(b' ', line).ok_or(bad)?;
    let (method, version) = (line.get(..first).ok_or(bad)?, line.get(last + 1..).ok_or(bad)?);
    let target = line.get(first + 1..last).ok_or(bad)?;
    if !is_field_name(method) || method.len() > MAX_METHOD {
        return Err(Refusal::Malformed("a method that is none"));
    }
    check_version(version)?;
    check_target(target)?;
    let whole = first + 1..last;
    if target.starts_with(b"/") || (target == b"*" && method == b"OPTIONS") {
        return Ok(RequestLine { method: 0..first, authority: None, target: whole });
    }
    if method == b"CONNECT" {
        return Ok(RequestLine { method: 0..first, authority: Some(whole.clone()), target: whole });
    }
    let scheme = scheme_length(target).ok_or(Refusal::Malformed("a target in none of the four forms"))?;
    let rest = target.get(scheme..).unwrap_or_default();
    let length = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
    let start = first + 1 + scheme;
    // `http://host` without a path is passed on as `/`: the last of the scheme's slashes, which stands for it only where
    // there is nothing else; a query without a path has no such place. With OPTIONS it is the asterisk (RFC 9112 section 3.2.4).
    let path = match rest.get(length) {
        Some(b'/') => start + length..last,
        Some(_) => return Err(Refusal::Malformed("a target with a query and no path")),
        None if method == b"OPTIONS" => start..start,
        None => start - 1..start,
    };
    Ok(RequestLine { method: 0..first, authority: Some(start..start + length), target: path })
}

/// The length of `http://` or `https://` at the beginning.
fn scheme_length(target: &[u8]) -> Option<usize> {
    [&b"http://"[..], b"https://"].into_iter().find_map(|scheme| {
        target.get(..scheme.len()).is_some_and(|t| t.eq_ignore_ascii_case(scheme)).then_some(scheme.len())
    })
}

fn check_version(version: &[u8]) -> Result<(), Refusal> {
    match version {
        b"HTTP/1.1" => Ok(()),
        b"HTTP/1.0" => Err(Refusal::OldVersion),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            Err(Refusal::OtherVersion)
        }
        _ => Err(Refusal::Malformed("a version that is none")),
    }
}

/// Refuses what no target has, a fragment, and an escaped NUL. The rest is for the normalisation to say.
pub(crate) fn check_target(target: &[u8]) -> Result<(), Refusal> {
    let visible = target.iter().fold(true, |good, b| good & (*b > b' ') & (*b < 0x7f) & (*b != b'#'));
    if target.is_empty() || !visible {
        return Err(Refusal::Malformed("a target with a character that it may not have"));
    }
    let mut rest = target;
    while let Some(at) = memchr::memchr(b'%', rest) {
        rest = rest.get(at + 1..).unwrap_or_default();
        if rest.starts_with(b"00") {
            return Err(Refusal::Malformed("a target with an escaped NUL"));
        }
    }
    Ok(())
}

/// Takes the authority out of the fields, and reads how the body is framed.
fn finish_request(head: &mut RequestHead) -> Result<Framing, Refusal> {
    check_host(&head.fields)?;
    if head.authority == Span::default() {
        // Nothing was removed yet, so a span of the text is found where the field has it.
        head.authority = head.fields.span_of(Known::Host);
    } else if !is_authority(head.authority().as_bytes()) {
        return Err(Refusal::Malformed("a target whose authority is none"));
    }
    head.fields.remove_known(|known| known == Known::Host);
    Ok(body_framing(&head.fields)?.unwrap_or(Framing::None))
}

fn check_host(fields: &Fields) -> Result<(), Refusal> {
    let mut hosts = fields.known(Known::Host);
    match (hosts.next(), hosts.next()) {
        (None, _) => Err(Refusal::Malformed("no Host")),
        (_, Some(_)) => Err(Refusal::Malformed("more than one Host")),
        (Some(host), None) if is_authority(host) => Ok(()),
        (Some(_), None) => Err(Refusal::Malformed("a Host that is no authority")),
    }
}

/// What the fields say of the body; `None` if nothing (RFC 9112 section 6.3).
fn body_framing(fields: &Fields) -> Result<Option<Framing>, Refusal> {
    let (mut length, mut chunked) = (None, false);
    for (known, _, value) in fields.iter_known() {
        match known {
            Known::ContentLength if length.is_some() => {
                return Err(Refusal::Malformed("more than one Content-Length"));
            }
            Known::ContentLength => length = Some(parse_length(value)?),
            Known::TransferEncoding if chunked => {
                return Err(Refusal::Malformed("more than one Transfer-Encoding"));
            }
            Known::TransferEncoding if value.eq_ignore_ascii_case(b"chunked") => chunked = true,
            Known::TransferEncoding => return Err(Refusal::UnknownCoding),
            _ => {}
        }
    }
    match (length, chunked) {
        (Some(_), true) => Err(Refusal::Malformed("both Content-Length and Transfer-Encoding")),
        (Some(0), false) => Ok(Some(Framing::None)),
        (Some(length), false) => Ok(Some(Framing::Length(length))),
        (None, true) => Ok(Some(Framing::Chunked)),
        (None, false) => Ok(None),
    }
}

/// Digits only: no sign, no list, no blank within.
pub(crate) fn parse_length(value: &[u8]) -> Result<u64, Refusal> {
    let bad = Refusal::Malformed("a Content-Length that is no number");
    if value.is_empty() || value.len() > 19 {
        return Err(bad);
    }
    value.iter().try_fold(0u64, |number, digit| match digit {
        b'0'..=b'9' => Ok(number * 10 + u64::from(digit - b'0')),
        _ => Err(bad),
    })
}

/// `HTTP/1.1 SP 200 SP reason`; servers of HTTP/1.0 are understood.
fn status_line(line: &[u8]) -> Result<u16, Refusal> {
    let bad = Refusal::Malformed("a status line that is none");
    if !line.starts_with(b"HTTP/1.1 ") && !line.starts_with(b"HTTP/1.0 ") {
        return Err(bad);
    }
    let [a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', reason @ ..] = line.get(9..).unwrap_or_default()
    else {
        return Err(bad);
    };
    if !is_field_value(reason) || !matches!(reason.first(), None | Some(b' ')) {
        return Err(bad);
    }
    Ok(u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0'))
}
