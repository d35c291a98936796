//! What decisions read of a request.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use serde_json::{Map, Value};

/// A request, as decisions see it. Nothing in it is owned.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The method, in the case that it was sent in (RFC 9110 section 9.1).
    pub method: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `:authority` or `Host`, with a port if one was sent.
    pub authority: &'a str,
    /// The path as it was normalised, without a query; starts with `/`, or is `*`.
    pub path: &'a str,
    /// The query, without the question mark; empty if there is none.
    pub query: &'a str,
    /// The fields of the head.
    pub headers: &'a dyn Headers,
    /// What a verified token says, if there was one.
    pub claims: Option<&'a Claims>,
    /// The server name that the client named in its TLS handshake.
    pub sni: Option<&'a str>,
    /// The client's address, where trusted proxies before us named one; else the peer's.
    pub remote_ip: IpAddr,
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.method, self.authority, self.path)
    }
}

impl<'a> Request<'a> {
    /// A request of which only this much is known, as [`crate::Connection`]-only callers and tests need it.
    #[must_use]
    pub fn new(method: &'a str, authority: &'a str, path: &'a str, headers: &'a dyn Headers) -> Self {
        let remote_ip = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        Self {
            method,
            scheme: "http",
            authority,
            path,
            query: "",
            headers,
            claims: None,
            sni: None,
            remote_ip,
        }
    }

    /// The values of the query parameter `name`, percent-decoded, in order.
    pub fn query_values(&self, name: &'a str) -> impl Iterator<Item = Cow<'a, [u8]>> {
        self.query.split('&').filter_map(move |pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (*decode(key) == *name.as_bytes()).then(|| decode(value))
        })
    }
}

/// Percent-decoding of a query's part; what is no valid escape stays. A `+` stays too: only forms mean a space.
fn decode(text: &str) -> Cow<'_, [u8]> {
    if !text.contains('%') {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = match after {
            [high, low, ..] if *first == b'%' => hex(*high).zip(hex(*low)).map(|(h, l)| h << 4 | l),
            _ => None,
        };
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    Cow::Owned(out)
}

/// The value of a hexadecimal digit.
pub(super) fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

/// The fields of a head.
pub trait Headers {
    /// The value of the field `name`, which is in lower case. Where the field is there more than once, the values
    /// joined by commas (RFC 9110 section 5.3).
    fn field(&self, name: &str) -> Option<Cow<'_, [u8]>>;
}

/// A list of names in lower case and values: for tests, and for what is asked of a configuration (`what-if`).
impl Headers for [(&str, &str)] {
    fn field(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let mut values = self.iter().filter(|(n, _)| *n == name).map(|(_, v)| v.as_bytes());
        let first = values.next()?;
        Some(values.fold(Cow::Borrowed(first), |mut joined, next| {
            let all = joined.to_mut();
            all.push(b',');
            all.extend_from_slice(next);
            joined
        }))
    }
}

impl Headers for Vec<(&str, &str)> {
    fn field(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        self.as_slice().field(name)
    }
}

/// What a verified JWT says (RFC 7519).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Claims {
    /// `iss/sub`, the request's principal; `None` without either.
    principal: Option<Box<str>>,
    payload: Map<String, Value>,
    /// Claims, beside those of [`SPACE_DELIMITED`], whose text is a list.
    delimited: Box<[Box<str>]>,
}

/// Claims whose text is a list, separated by spaces (RFC 8693 section 4.2; `permission` by Envoy).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

impl Claims {
    /// The claims of a payload whose signature was checked.
    #[must_use]
    pub fn new(payload: Map<String, Value>) -> Self {
        let text = |name: &str| payload.get(name).and_then(Value::as_str);
        let principal = text("iss").zip(text("sub")).map(|(iss, sub)| format!("{iss}/{sub}").into());
        Self { principal, payload, delimited: Box::default() }
    }

    /// The same, with more claims whose text is a list (RequestAuthentication `spaceDelimitedClaims`).
    #[must_use]
    pub fn with_delimited(self, names: &[Box<str>]) -> Self {
        Self { delimited: names.into(), ..self }
    }

    /// `iss/sub`.
    #[must_use]
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// The payload.
    #[must_use]
    pub fn payload(&self) -> &Map<String, Value> {
        &self.payload
    }

    /// The claim at `path`, key by key.
    #[must_use]
    pub fn at<S: AsRef<str>>(&self, path: &[S]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        let start = self.payload.get(first.as_ref())?;
        rest.iter().try_fold(start, |value, key| value.get(key.as_ref()))
    }

    /// Whether a value of the claim at `path` is one that `holds`: its text, or one of a list of texts.
    #[must_use]
    pub fn any<S: AsRef<str>>(&self, path: &[S], holds: impl Fn(&str) -> bool) -> bool {
        let is_list = |name: &str| {
            SPACE_DELIMITED.contains(&name) || self.delimited.iter().any(|other| **other == *name)
        };
        match (self.at(path), path) {
            (Some(Value::String(text)), [name]) if is_list(name.as_ref()) => text.split(' ').any(holds),
            (Some(Value::String(text)), _) => holds(text),
            (Some(Value::Array(list)), _) => list.iter().filter_map(Value::as_str).any(holds),
            _ => false,
        }
    }
}
