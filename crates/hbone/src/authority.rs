//! The `:authority` of a CONNECT request: the tunnel's destination (RFC 9113 section 8.5, RFC 3986 section 3.2).

use std::fmt;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

use model::{Str, canonical_ip};

/// The longest host name that DNS knows (RFC 1035 section 2.3.4).
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

/// Why a text is no destination of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthority {
    /// The request had no `:authority`, or an empty one.
    #[error("the request names no destination: :authority must be ip:port or host:port")]
    Missing,
    /// There is a host, but no port.
    #[error("{0:?} has no port: :authority must be ip:port or host:port")]
    NoPort(String),
    /// The port is not a number from 1 to 65535.
    #[error("{0:?} has no valid port: expected a number from 1 to 65535")]
    Port(String),
    /// The host is neither an IP address nor a DNS name.
    #[error("{0:?} has no valid host: expected an IPv4 address, an IPv6 address in brackets, or a DNS name")]
    Host(String),
}

/// Where a tunnel leads: a pod, a virtual address of a service, or a service by name.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address, never an IPv4-mapped one.
    Ip(IpAddr),
    /// A DNS name in lower case, without a final dot.
    Name(Str),
}

/// A tunnel's destination: host and port.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Authority {
    host: Host,
    port: NonZeroU16,
}

impl Authority {
    /// The destination `name`:`port`.
    ///
    /// # Errors
    /// `name` is not a DNS name.
    pub fn from_name(name: &str, port: NonZeroU16) -> Result<Self, InvalidAuthority> {
        Ok(Self { host: parse_name(name).ok_or_else(|| InvalidAuthority::Host(shown(name)))?, port })
    }

    /// The destination `addr`; `None` if its port is zero.
    #[must_use]
    pub fn from_addr(addr: SocketAddr) -> Option<Self> {
        Some(Self { host: Host::Ip(canonical_ip(addr.ip())), port: NonZeroU16::new(addr.port())? })
    }

    /// Who the tunnel leads to.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The destination's port, never zero.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.get()
    }

    /// The destination's address, if it is one and not a name.
    #[must_use]
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port.get())),
            Host::Name(_) => None,
        }
    }

    /// What a request names the destination by; `None` if it can't be written so.
    pub(crate) fn to_uri(&self) -> Option<http::Uri> {
        // A longest name, a colon and a port. The URI has a copy of its own in any case.
        let mut text = [0; LONGEST_NAME + 6];
        let mut rest = &mut text[..];
        write!(rest, "{self}").ok()?;
        let unused = rest.len();
        text.get(..text.len() - unused)?.try_into().ok()
    }

    /// Reads `ip:port`, `[ipv6]:port` or `host:port`. User information and IPv6 zones are refused: a tunnel has
    /// no use for them, and two spellings of one destination would let a policy see another than the dialled one.
    ///
    /// # Errors
    /// Which part of the text is wrong.
    pub fn parse(text: &str) -> Result<Self, InvalidAuthority> {
        if text.is_empty() {
            return Err(InvalidAuthority::Missing);
        }
        let (host, port) = split(text)?;
        let port = parse_port(port).ok_or_else(|| InvalidAuthority::Port(shown(text)))?;
        let host = match host {
            Part::Bracketed(host) => {
                host.parse::<Ipv6Addr>().ok().map(|ip| Host::Ip(canonical_ip(ip.into())))
            }
            Part::Plain(host) => match host.parse::<Ipv4Addr>() {
                Ok(ip) => Some(Host::Ip(ip.into())),
                Err(_) => parse_name(host),
            },
        };
        Ok(Self { host: host.ok_or_else(|| InvalidAuthority::Host(shown(text)))?, port })
    }
}

enum Part<'a> {
    Bracketed(&'a str),
    Plain(&'a str),
}

fn split(text: &str) -> Result<(Part<'_>, &str), InvalidAuthority> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(|| InvalidAuthority::Host(shown(text)))?;
        return match rest.strip_prefix(':') {
            Some(port) => Ok((Part::Bracketed(host), port)),
            None if rest.is_empty() => Err(InvalidAuthority::NoPort(shown(text))),
            None => Err(InvalidAuthority::Host(shown(text))),
        };
    }
    match text.rsplit_once(':') {
        Some((host, port)) => Ok((Part::Plain(host), port)),
        None => Err(InvalidAuthority::NoPort(shown(text))),
    }
}

/// Digits only: `u16::from_str` would also take a plus sign.
fn parse_port(text: &str) -> Option<NonZeroU16> {
    if text.len() > 5 || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Letters, digits, `-` and `_` in labels of 1 to 63 bytes. A name whose last label is a number is refused, so that
/// no resolver can take what looks like a name for an address (`127.1`, `0x7f.1`).
fn parse_name(text: &str) -> Option<Host> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label_ok = |label: &str| {
        (1..=LONGEST_LABEL).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let last = name.rsplit('.').next()?;
    let number = last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x") || last.starts_with("0X");
    if name.len() > LONGEST_NAME || number || !name.split('.').all(label_ok) {
        return None;
    }
    Some(Host::Name(name.to_ascii_lowercase().into()))
}

/// What an error shows of a peer's text: enough to find it, not enough to fill a log.
fn shown(text: &str) -> String {
    text.chars().take(128).collect()
}

impl FromStr for Authority {
    type Err = InvalidAuthority;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V4(ip)) => ip.fmt(f),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn destinations_read_back_as_they_are_written() {
        for (text, normal) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[2001:db8::1]:65535", "[2001:db8::1]:65535"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("cart.shop.svc.cluster.local:8080", "cart.shop.svc.cluster.local:8080"),
            ("Cart.Shop.:1", "cart.shop:1"),
            ("a_b-c:00080", "a_b-c:80"),
        ] {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), normal, "{text}");
        }
    }

    #[test]
    fn what_is_no_destination_is_refused_by_part() {
        use InvalidAuthority as E;
        let long = format!("{}:1", "a".repeat(64));
        for (text, expected) in [
            ("", E::Missing),
            ("10.0.0.1", E::NoPort("10.0.0.1".into())),
            ("[::1]", E::NoPort("[::1]".into())),
            ("host", E::NoPort("host".into())),
            ("host:", E::Port("host:".into())),
            ("host:0", E::Port("host:0".into())),
            ("host:65536", E::Port("host:65536".into())),
            ("host:+80", E::Port("host:+80".into())),
            ("host:http", E::Port("host:http".into())),
            ("::1:80", E::Host("::1:80".into())),
            ("[::1:80", E::Host("[::1:80".into())),
            ("[::1]x:80", E::Host("[::1]x:80".into())),
            ("[fe80::1%eth0]:80", E::Host("[fe80::1%eth0]:80".into())),
            ("[10.0.0.1]:80", E::Host("[10.0.0.1]:80".into())),
            ("user@host:80", E::Host("user@host:80".into())),
            ("127.1:80", E::Host("127.1:80".into())),
            ("10.0.0.256:80", E::Host("10.0.0.256:80".into())),
            ("a.0x7f:80", E::Host("a.0x7f:80".into())),
            ("a..b:80", E::Host("a..b:80".into())),
            (":80", E::Host(":80".into())),
            ("a b:80", E::Host("a b:80".into())),
            ("http://a:80", E::Host("http://a:80".into())),
            (&long, E::Host(long.clone())),
        ] {
            assert_eq!(text.parse::<Authority>().unwrap_err(), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_to_a_fixed_point_or_an_error(text in "\\PC{0,80}") {
            if let Ok(authority) = Authority::parse(&text) {
                prop_assert_eq!(Authority::parse(&authority.to_string()), Ok(authority));
            }
        }

        #[test]
        fn any_address_reads_back(ip: IpAddr, port in 1u16..) {
            let authority = Authority::from_addr(SocketAddr::new(ip, port)).unwrap();
            prop_assert_eq!(Authority::parse(&authority.to_string()), Ok(authority));
        }
    }
}
