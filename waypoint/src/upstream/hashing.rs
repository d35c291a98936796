//! What of a request is hashed, where a destination sends the same key to the same endpoint.

use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use balance::requests::hash;
use model::http::HashKey;

use crate::http::decide::{Call, Connection};
use crate::http::head::{RequestHead, is_field_value};

/// The key of a request, and a cookie that makes the next one have it too.
#[derive(Debug, Default)]
pub(crate) struct Key {
    pub(crate) hash: Option<u64>,
    pub(crate) cookie: Option<Box<str>>,
}

/// What `key` is of a request.
pub(crate) fn of(key: &HashKey, call: &Call<'_>) -> Key {
    let plain = |value: Option<u64>| Key { hash: value, cookie: None };
    match key {
        HashKey::Header(name) => plain(call.request.fields.joined(name.as_bytes()).map(|value| hash(&value))),
        HashKey::Query(name) => plain(query(call.request, name)),
        HashKey::SourceIp => plain(Some(match call.connection.client.ip().to_canonical() {
            IpAddr::V4(ip) => hash(&ip.octets()),
            IpAddr::V6(ip) => hash(&ip.octets()),
        })),
        HashKey::Cookie { name, path, ttl } => match cookie(call.request, name) {
            Some(value) => plain(Some(hash(value))),
            None => ttl.map_or_else(Key::default, |ttl| given(name, path.as_deref(), ttl, call.connection)),
        },
    }
}

fn query(request: &RequestHead, name: &str) -> Option<u64> {
    let mut pairs = request.query().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| hash(value.as_bytes()))
}

/// The value of a cookie (RFC 6265 section 5.4), without the quotes that it may have. An empty one is like none.
fn cookie<'a>(request: &'a RequestHead, name: &str) -> Option<&'a [u8]> {
    let pairs = request.fields.values(b"cookie").flat_map(|value| value.split(|byte| *byte == b';'));
    let mut named = pairs.filter_map(|pair| {
        let pair = pair.trim_ascii();
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let (key, value) = (pair.get(..at)?, pair.get(at + 1..)?);
        let unquoted = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value);
        (key == name.as_bytes() && !unquoted.is_empty()).then_some(unquoted)
    });
    named.next()
}

/// A cookie for a client that has none. All requests of one connection get the same, so that those which are under way at
/// the same time go to the same endpoint.
fn given(name: &str, path: Option<&str>, ttl: Duration, connection: &Connection) -> Key {
    let mut facts = format!("{} {}", connection.client, connection.destination).into_bytes();
    if let Some(identity) = &connection.identity {
        facts.extend_from_slice(identity.to_string().as_bytes());
    }
    let value = format!("{:016x}", hash(&facts));
    let mut cookie = format!("{name}=\"{value}\"");
    if !ttl.is_zero() {
        // A String takes all that is written to it.
        let _ = write!(cookie, "; Max-Age={}", ttl.as_secs().max(1));
    }
    if let Some(path) = path {
        cookie.push_str("; Path=");
        cookie.push_str(path);
    }
    cookie.push_str("; HttpOnly");
    let cookie = is_field_value(cookie.as_bytes()).then(|| cookie.into());
    Key { hash: Some(hash(value.as_bytes())), cookie }
}
