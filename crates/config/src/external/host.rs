//! The names and addresses of external hosts.

use std::net::IpAddr;

use model::canonical_ip;

use crate::fields::Cursor;

/// Whether `text` is a host name that can be looked up: labels of letters, digits, `-` and `_`, of which the last
/// is not a number (that would be an address).
#[must_use]
pub fn is_host(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= 253 && text.split('.').all(label) && !last.bytes().all(|b| b.is_ascii_digit())
}

/// Whether `text` is a host name or `*.` and one.
#[must_use]
pub fn is_host_pattern(text: &str) -> bool {
    is_host(text.strip_prefix("*.").unwrap_or(text))
}

/// Where an endpoint is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// At an address.
    Ip(IpAddr),
    /// At the addresses of a name, in lower case.
    Name(String),
}

/// Reads the address of an endpoint.
pub fn read_address(mut cursor: Cursor<'_, '_>) -> Option<Address> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(Address::Ip(canonical_ip(ip)));
    }
    if text.starts_with("unix:") {
        cursor
            .invalid("a Unix socket can be reached from its own pod only", "give an IP address or host name");
        return None;
    }
    if is_host(text) {
        return Some(Address::Name(text.trim_end_matches('.').to_ascii_lowercase()));
    }
    cursor.invalid(format_args!("{text:?} is neither an IP address nor a host name"), "");
    None
}
