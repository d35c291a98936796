//! DNS messages as bytes (RFC 1035, section 4).
//!
//! What is forwarded passes through unchanged, whatever is in it, so it is never decoded and encoded again: this
//! reads just what the proxy has to know (the question, EDNS, the times to live and where they stand) and patches
//! identifiers, times to live and the letter case of the question in place. Every read is checked; what does not
//! fit is an error, never a panic.

use std::ops::Range;

/// The length of a header.
const HEADER: usize = 12;

/// Flag bits of a header's third and fourth byte.
pub(super) mod flag {
    /// It is a response.
    pub(crate) const QR: u16 = 0x8000;
    /// The operation.
    pub(crate) const OPCODE: u16 = 0x7800;
    /// It comes from whoever decides about the name.
    pub(crate) const AA: u16 = 0x0400;
    /// It was cut off.
    pub(crate) const TC: u16 = 0x0200;
    /// Recursion is desired.
    pub(crate) const RD: u16 = 0x0100;
    /// Recursion is available.
    pub(crate) const RA: u16 = 0x0080;
    /// The data is authentic; in a query: say whether it is.
    pub(crate) const AD: u16 = 0x0020;
    /// Do not check it.
    pub(crate) const CD: u16 = 0x0010;
    /// The response code.
    pub(crate) const RCODE: u16 = 0x000f;
}

/// Response codes.
pub(super) mod rcode {
    pub(crate) const NO_ERROR: u16 = 0;
    pub(crate) const FORMAT_ERROR: u16 = 1;
    pub(crate) const SERVER_FAILURE: u16 = 2;
    pub(crate) const NAME_ERROR: u16 = 3;
    pub(crate) const NOT_IMPLEMENTED: u16 = 4;
    pub(crate) const REFUSED: u16 = 5;
}

/// Record types that the proxy treats in a way of their own.
pub(super) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const SRV: u16 = 33;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const IXFR: u16 = 251;
    pub(crate) const AXFR: u16 = 252;
    pub(crate) const ANY: u16 = 255;
}

/// The class of the Internet.
pub(super) const CLASS_IN: u16 = 1;

/// The size that every resolver takes over UDP (RFC 1035, section 4.2.1).
const PLAIN_UDP_SIZE: u16 = 512;

/// EDNS option code of client subnets (RFC 7871).
const OPTION_CLIENT_SUBNET: u16 = 8;

/// What is wrong with a message that should be a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rejection {
    /// It gets no answer: it is too short for one, or is itself a response.
    Drop,
    /// It is answered with this code.
    Answer(u16),
}

/// EDNS of a query (RFC 6891).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Edns {
    /// How large a response over UDP may be.
    pub(super) udp_size: u16,
    /// The version, 0.
    pub(super) version: u8,
    /// Whether DNSSEC records are wanted (DO).
    pub(super) dnssec_ok: bool,
    /// Where the options stand.
    options: Range<usize>,
}

/// A query with one question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Query {
    bytes: Vec<u8>,
    /// The length of the question's name.
    name_len: usize,
    edns: Option<Edns>,
    /// Whether it is a question with or without EDNS, and nothing else: no records, no flags that nobody defined, no
    /// bytes after its end.
    plain: bool,
}

/// Reads forward.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    /// Passes over a name, which may end in a pointer where `compressed`; returns its length as it stands here.
    fn name(&mut self, compressed: bool) -> Option<usize> {
        let start = self.at;
        loop {
            let len = self.u8()?;
            match len & 0xc0 {
                0 if len == 0 => break,
                0 => {
                    self.take(usize::from(len))?;
                }
                0xc0 if compressed => {
                    self.u8()?;
                    break;
                }
                _ => return None,
            }
            if self.at - start > 254 {
                return None; // RFC 1035, section 3.1: 255 bytes with the root label, which is still to come
            }
        }
        Some(self.at - start)
    }
}

/// A record as it stands in a message.
struct Record {
    kind: u16,
    class: u16,
    /// Where its time to live stands.
    ttl_at: usize,
    ttl: u32,
    data: Range<usize>,
}

fn read_record(reader: &mut Reader<'_>) -> Option<Record> {
    reader.name(true)?;
    let (kind, class) = (reader.u16()?, reader.u16()?);
    let ttl_at = reader.at;
    let ttl = reader.u32()?;
    let len = usize::from(reader.u16()?);
    let start = reader.at;
    reader.take(len)?;
    Some(Record { kind, class, ttl_at, ttl, data: start..start + len })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let read = || Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    read().unwrap_or(0)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

impl Query {
    /// Reads a query.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Rejection> {
        if bytes.len() < HEADER || u16_at(bytes, 2) & flag::QR != 0 {
            return Err(Rejection::Drop);
        }
        if u16_at(bytes, 2) & flag::OPCODE != 0 {
            return Err(Rejection::Answer(rcode::NOT_IMPLEMENTED));
        }
        if u16_at(bytes, 4) != 1 {
            return Err(Rejection::Answer(rcode::FORMAT_ERROR));
        }
        let read = || {
            let mut reader = Reader { bytes, at: HEADER };
            let name_len = reader.name(false)?;
            reader.take(4)?;
            for _ in 0..u32::from(u16_at(bytes, 6)) + u32::from(u16_at(bytes, 8)) {
                read_record(&mut reader)?;
            }
            let (mut edns, mut plain) = (None, u16_at(bytes, 6) == 0 && u16_at(bytes, 8) == 0);
            for _ in 0..u16_at(bytes, 10) {
                let of_root = bytes.get(reader.at) == Some(&0);
                let record = read_record(&mut reader)?;
                // RFC 6891, section 6.1.2 and 6.1.3: OPT is the root's; without an extended code, and of its flags
                // only DO is defined.
                plain &= record.kind == kind::OPT && of_root && record.ttl & 0xff00_7fff == 0;
                if record.kind == kind::OPT {
                    if edns.is_some() {
                        return None; // RFC 6891, section 6.1.1
                    }
                    edns = Some(Edns {
                        udp_size: record.class.max(PLAIN_UDP_SIZE),
                        version: record.ttl.to_be_bytes().get(1).copied()?,
                        dnssec_ok: record.ttl & 0x8000 != 0,
                        options: record.data,
                    });
                }
            }
            plain &= reader.at == bytes.len() && u16_at(bytes, 2) & !(flag::RD | flag::AD | flag::CD) == 0;
            Some((name_len, edns, plain))
        };
        let (name_len, edns, plain) = read().ok_or(Rejection::Answer(rcode::FORMAT_ERROR))?;
        Ok(Self { bytes: bytes.to_vec(), name_len, edns, plain })
    }

    pub(super) fn id(&self) -> u16 {
        u16_at(&self.bytes, 0)
    }

    pub(super) fn flags(&self) -> u16 {
        u16_at(&self.bytes, 2)
    }

    /// Name, type and class of the question.
    pub(super) fn question(&self) -> &[u8] {
        self.bytes.get(HEADER..HEADER + self.name_len + 4).unwrap_or_default()
    }

    /// The question's name, with its length bytes.
    pub(super) fn raw_name(&self) -> &[u8] {
        self.bytes.get(HEADER..HEADER + self.name_len).unwrap_or_default()
    }

    pub(super) fn kind(&self) -> u16 {
        u16_at(&self.bytes, HEADER + self.name_len)
    }

    pub(super) fn class(&self) -> u16 {
        u16_at(&self.bytes, HEADER + self.name_len + 2)
    }

    pub(super) fn edns(&self) -> Option<&Edns> {
        self.edns.as_ref()
    }

    /// The largest response that the client takes over UDP.
    pub(super) fn udp_size(&self) -> usize {
        usize::from(self.edns.as_ref().map_or(PLAIN_UDP_SIZE, |edns| edns.udp_size))
    }

    /// The name in lower case with dots between its labels and none at the end; `None` for the root, and for names
    /// with characters that no host has.
    pub(super) fn host_name(&self) -> Option<String> {
        let mut name = String::with_capacity(self.name_len);
        let mut left = self.raw_name();
        while let Some((len, rest)) = left.split_first() {
            if *len == 0 {
                break;
            }
            let (label, rest) = rest.split_at_checked(usize::from(*len))?;
            if !name.is_empty() {
                name.push('.');
            }
            for byte in label {
                match byte {
                    b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'A'..=b'Z' => {
                        name.push(char::from(byte.to_ascii_lowercase()));
                    }
                    _ => return None,
                }
            }
            left = rest;
        }
        (!name.is_empty()).then_some(name)
    }

    /// What tells this query from others in a cache: everything that an answer may depend on. `None` when it holds
    /// an EDNS option that makes the answer this client's own, such as a cookie (RFC 7873), and when it holds anything
    /// beside a question and EDNS: a server may refuse it for that, which says nothing of the question.
    pub(super) fn cache_key(&self, upstreams: u32) -> Option<Box<[u8]>> {
        if !self.plain {
            return None;
        }
        let mut key = Vec::with_capacity(self.name_len + 16);
        key.extend_from_slice(&upstreams.to_be_bytes());
        key.extend_from_slice(&(self.flags() & (flag::RD | flag::AD | flag::CD)).to_be_bytes());
        key.extend(self.raw_name().iter().map(u8::to_ascii_lowercase));
        key.extend_from_slice(self.question().get(self.name_len..)?);
        if let Some(edns) = &self.edns {
            let options = self.bytes.get(edns.options.clone())?;
            let mut reader = Reader { bytes: options, at: 0 };
            while reader.at < options.len() {
                let code = reader.u16()?;
                let len = reader.u16()?;
                reader.take(usize::from(len))?;
                if code != OPTION_CLIENT_SUBNET {
                    return None;
                }
            }
            key.push(u8::from(edns.dnssec_ok));
            key.push(edns.version);
            key.extend_from_slice(options);
        }
        Some(key.into())
    }

    /// The query with another identifier.
    pub(super) fn with_id(&self, id: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        put(&mut bytes, 0, &id.to_be_bytes());
        bytes
    }

    /// A response without records: an error, or one that says that it was cut off.
    pub(super) fn bare_response(&self, flags: u16) -> Vec<u8> {
        Builder::new(self, flags, usize::MAX).finish(0)
    }
}

/// A response under construction, which never gets longer than its limit.
pub(super) struct Builder<'a> {
    query: &'a Query,
    bytes: Vec<u8>,
    limit: usize,
    flags: u16,
    answers: u16,
    additionals: u16,
}

/// The length of an EDNS record without options.
const OPT_SIZE: usize = 11;

/// The question's name, which always stands at the same place (RFC 1035, section 4.1.4).
const QUESTION_NAME: &[u8] = &[0xc0, HEADER as u8];

impl<'a> Builder<'a> {
    /// Starts a response to `query` with these flags beside the usual ones, of at most `limit` bytes.
    pub(super) fn new(query: &'a Query, flags: u16, limit: usize) -> Self {
        let mut bytes = bare_header(&query.bytes, 0);
        bytes.extend_from_slice(query.question());
        Self { query, bytes, limit, flags, answers: 0, additionals: 0 }
    }

    /// Appends an answer for the name that was asked for; without room, says that the response is cut off.
    pub(super) fn answer(&mut self, kind: u16, ttl: u32, data: &[u8]) {
        if self.flags & flag::TC == 0 && self.append(QUESTION_NAME, kind, ttl, data) {
            self.answers += 1;
        } else {
            self.flags |= flag::TC;
        }
    }

    /// Appends a record that may help, if there is room. Answers must come first.
    pub(super) fn additional(&mut self, name: &[u8], kind: u16, ttl: u32, data: &[u8]) {
        if self.flags & flag::TC == 0 && self.append(name, kind, ttl, data) {
            self.additionals += 1;
        }
    }

    fn append(&mut self, name: &[u8], kind: u16, ttl: u32, data: &[u8]) -> bool {
        let reserved = if self.query.edns.is_some() { OPT_SIZE } else { 0 };
        let fits = self.bytes.len() + name.len() + 10 + data.len() + reserved <= self.limit;
        let Some(len) = u16::try_from(data.len()).ok().filter(|_| fits) else { return false };
        self.bytes.extend_from_slice(name);
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&CLASS_IN.to_be_bytes());
        self.bytes.extend_from_slice(&ttl.to_be_bytes());
        self.bytes.extend_from_slice(&len.to_be_bytes());
        self.bytes.extend_from_slice(data);
        true
    }

    /// The response. `extended_code` is the part of the response code that EDNS carries.
    pub(super) fn finish(self, extended_code: u8) -> Vec<u8> {
        let Self { query, mut bytes, flags, answers, mut additionals, .. } = self;
        if let Some(edns) = &query.edns {
            // RFC 6891, section 6.1.1: a response to EDNS has EDNS.
            let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
            bytes.push(0);
            bytes.extend_from_slice(&kind::OPT.to_be_bytes());
            bytes.extend_from_slice(&OWN_UDP_SIZE.to_be_bytes());
            bytes.extend_from_slice(&[extended_code, 0, dnssec_ok, 0, 0, 0]);
            additionals += 1;
        }
        let flags = u16_at(&bytes, 2) | flags;
        put(&mut bytes, 2, &flags.to_be_bytes());
        for (at, count) in [(4, 1), (6, answers), (10, additionals)] {
            put(&mut bytes, at, &count.to_be_bytes());
        }
        bytes
    }
}

/// The size of a query over UDP that the proxy says it takes; the value that never fragments (DNS flag day 2020).
pub(super) const OWN_UDP_SIZE: u16 = 1232;

fn bare_header(query: &[u8], flags: u16) -> Vec<u8> {
    let kept = u16_at(query, 2) & (flag::OPCODE | flag::RD | flag::CD);
    let mut response = vec![0; HEADER];
    put(&mut response, 0, query.get(..2).unwrap_or_default());
    put(&mut response, 2, &(flag::QR | flag::RA | kept | flags).to_be_bytes());
    response
}

/// The answer to a message that is no query to be answered otherwise: its header alone, with an error.
pub(super) fn rejection(query: &[u8], code: u16) -> Vec<u8> {
    bare_header(query, code)
}

/// What a response holds that the proxy has to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Response {
    /// The header's flags.
    pub(super) flags: u16,
    /// How long it holds, in seconds; `None` when it must not be kept.
    pub(super) ttl: Option<u32>,
    /// Where the times to live stand.
    pub(super) ttls_at: Vec<u16>,
}

impl Response {
    /// Reads a response; `None` when it is none, or its parts do not fit together.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = u16_at(bytes, 2);
        if bytes.len() < HEADER || flags & flag::QR == 0 {
            return None;
        }
        let mut reader = Reader { bytes, at: HEADER };
        for _ in 0..u16_at(bytes, 4) {
            reader.name(true)?;
            reader.take(4)?;
        }
        let (mut ttls_at, mut least, mut negative) = (Vec::new(), None::<u32>, None::<u32>);
        for section in [6, 8, 10] {
            for _ in 0..u16_at(bytes, section) {
                let record = read_record(&mut reader)?;
                if record.kind == kind::OPT {
                    continue; // its "time to live" is flags
                }
                // RFC 2181, section 8: a time with the highest bit set is zero.
                let ttl = if record.ttl > i32::MAX as u32 { 0 } else { record.ttl };
                ttls_at.push(u16::try_from(record.ttl_at).ok()?);
                least = Some(least.map_or(ttl, |l| l.min(ttl)));
                if record.kind == kind::SOA && section == 8 {
                    // RFC 2308, section 5: the least of the record's own time and its MINIMUM, the last field.
                    let minimum = record.data.end.checked_sub(4).filter(|at| *at >= record.data.start)?;
                    let minimum = Reader { bytes, at: minimum }.u32()?;
                    negative = Some(ttl.min(minimum));
                }
            }
        }
        let code = flags & flag::RCODE;
        let ttl = match code {
            _ if flags & flag::TC != 0 => None,
            rcode::NO_ERROR if u16_at(bytes, 6) > 0 => least,
            rcode::NO_ERROR | rcode::NAME_ERROR => negative,
            _ => None,
        };
        Some(Self { flags, ttl, ttls_at })
    }
}

/// Whether `response` answers `query`, which was sent with the identifier `id`: a response with that identifier and
/// the same question in any letter case. An error may come without the question.
pub(super) fn answers(response: &[u8], query: &Query, id: u16) -> bool {
    let flags = u16_at(response, 2);
    if response.len() < HEADER
        || u16_at(response, 0) != id
        || flags & flag::QR == 0
        || flags & flag::OPCODE != 0
    {
        return false;
    }
    match u16_at(response, 4) {
        0 => flags & flag::RCODE != rcode::NO_ERROR && flags & flag::RCODE != rcode::NAME_ERROR,
        1 => {
            let question = query.question();
            let (name, rest) = question.split_at(query.name_len.min(question.len()));
            let asked = response.get(HEADER..HEADER + question.len());
            asked.is_some_and(|asked| {
                let (asked_name, asked_rest) = asked.split_at(name.len());
                asked_name.eq_ignore_ascii_case(name) && asked_rest == rest
            })
        }
        _ => false,
    }
}

/// Makes `response` the client's: its identifier and the letter case of its question.
pub(super) fn readdress(response: &mut [u8], query: &Query) {
    put(response, 0, &query.id().to_be_bytes());
    if u16_at(response, 4) == 1 {
        put(response, HEADER, query.question());
    }
}

/// Sets each of the times to live that stand at `ttls_at` to what `change` makes of it.
pub(super) fn change_ttls(response: &mut [u8], ttls_at: &[u16], change: impl Fn(u32) -> u32) {
    for at in ttls_at {
        let at = usize::from(*at);
        if let Some(ttl) = (Reader { bytes: response, at }).u32() {
            put(response, at, &change(ttl).to_be_bytes());
        }
    }
}
