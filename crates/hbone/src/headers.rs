//! What travels beside a CONNECT request and its response: who the source is (`baggage`, W3C Baggage), for whom
//! the tunnel is (`forwarded`, RFC 7239), the trace (`traceparent`, W3C Trace Context) and the network that the
//! request came from.
//!
//! These headers describe, they never decide: identity comes from the certificate alone. So a header that can't be
//! read counts as absent (as both W3C documents ask for), and never refuses a tunnel.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use model::{Str, WorkloadKind, canonical_ip};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
const ISTIO_SOURCE: HeaderName = HeaderName::from_static("x-istio-source");

/// The longest value that is looked into; the same limit as W3C Baggage section 3.3.2.
const LONGEST: usize = 8192;

/// The headers of a request or response, as they came or are to go. Values are shared buffers: a proxy encodes a
/// workload's baggage once and sends it with each of its tunnels.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct TunnelHeaders {
    /// `baggage`: see [`Baggage`].
    pub baggage: Option<HeaderValue>,
    /// `forwarded`: see [`Forwarded`].
    pub forwarded: Option<HeaderValue>,
    /// `traceparent`, passed on as it is.
    pub traceparent: Option<HeaderValue>,
    /// `x-forwarded-network`: the network of the request's origin, on the inner request of a tunnel in a tunnel.
    pub origin_network: Option<HeaderValue>,
    /// `x-istio-source`: `waypoint`, `gateway` or `sidecar`, from Envoys to east-west gateways.
    pub istio_source: Option<HeaderValue>,
}

impl TunnelHeaders {
    /// Takes the tunnel's headers out of a message's.
    pub(crate) fn take(map: &mut HeaderMap) -> Self {
        Self {
            baggage: take_list(map),
            forwarded: map.remove(header::FORWARDED),
            traceparent: map.remove(TRACEPARENT),
            origin_network: map.remove(FORWARDED_NETWORK),
            istio_source: map.remove(ISTIO_SOURCE),
        }
    }

    pub(crate) fn put(&self, map: &mut HeaderMap) {
        let values = [
            (BAGGAGE, &self.baggage),
            (header::FORWARDED, &self.forwarded),
            (TRACEPARENT, &self.traceparent),
            (FORWARDED_NETWORK, &self.origin_network),
            (ISTIO_SOURCE, &self.istio_source),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                map.insert(name, value.clone());
            }
        }
    }

    /// What `baggage` says, if it is there and can be read.
    #[must_use]
    pub fn parse_baggage(&self) -> Option<Baggage> {
        Baggage::parse(text(self.baggage.as_ref())?)
    }

    /// What `forwarded` says, if it is there and can be read.
    #[must_use]
    pub fn parse_forwarded(&self) -> Option<Forwarded> {
        Forwarded::parse(text(self.forwarded.as_ref())?)
    }

    /// The network of `x-forwarded-network`.
    #[must_use]
    pub fn parse_origin_network(&self) -> Option<Str> {
        text(self.origin_network.as_ref()).filter(|name| !name.is_empty()).map(Str::from)
    }
}

fn text(value: Option<&HeaderValue>) -> Option<&str> {
    value?.to_str().ok()
}

/// Baggage may come in several header fields; together they are one list (W3C Baggage section 3.2).
fn take_list(map: &mut HeaderMap) -> Option<HeaderValue> {
    let mut values = map.get_all(BAGGAGE).iter();
    let first = values.next()?;
    let joined = if values.next().is_none() {
        first.clone()
    } else {
        let all: Vec<&[u8]> = map.get_all(BAGGAGE).iter().map(HeaderValue::as_bytes).collect();
        HeaderValue::from_bytes(&all.join(&b','))
            .ok()
            .filter(|v| v.len() <= LONGEST)
            .unwrap_or_else(|| first.clone())
    };
    map.remove(BAGGAGE);
    Some(joined)
}

/// Who is at an end of a tunnel, by what it says of itself; for telemetry only.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster: Option<Str>,
    /// `k8s.namespace.name`
    pub namespace: Option<Str>,
    /// `k8s.<kind>.name`: the workload, by kind and name.
    pub workload: Option<(WorkloadKind, Str)>,
    /// `service.name`: the canonical service.
    pub service_name: Option<Str>,
    /// `service.version`: its revision.
    pub service_version: Option<Str>,
    /// `cloud.region`
    pub region: Option<Str>,
    /// `cloud.availability_zone`
    pub zone: Option<Str>,
}

impl Baggage {
    /// Reads a list `key=value;property,…`. Keys that mean nothing here are passed over, of a key that comes twice
    /// the last one counts. `None` if the text is longer than 8192 bytes or holds nothing of use.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > LONGEST {
            return None;
        }
        let mut found = Self::default();
        for member in text.split(',') {
            let pair = member.split(';').next().unwrap_or_default();
            let Some((key, value)) = pair.split_once('=') else { continue };
            let Some(value) = percent_decode(value.trim()) else { continue };
            if value.is_empty() {
                continue;
            }
            found.set(key.trim(), value);
        }
        (found != Self::default()).then_some(found)
    }

    fn set(&mut self, key: &str, value: Str) {
        match key {
            "k8s.cluster.name" => self.cluster = Some(value),
            "k8s.namespace.name" => self.namespace = Some(value),
            "k8s.deployment.name" => self.workload = Some((WorkloadKind::Deployment, value)),
            "k8s.pod.name" => self.workload = Some((WorkloadKind::Pod, value)),
            "k8s.job.name" => self.workload = Some((WorkloadKind::Job, value)),
            "k8s.cronjob.name" => self.workload = Some((WorkloadKind::CronJob, value)),
            "service.name" => self.service_name = Some(value),
            "service.version" => self.service_version = Some(value),
            "cloud.region" => self.region = Some(value),
            "cloud.availability_zone" => self.zone = Some(value),
            _ => {}
        }
    }

    /// The header's value; `None` if there is nothing to say or it is longer than a header may be.
    #[must_use]
    pub fn encode(&self) -> Option<HeaderValue> {
        let workload_key = match self.workload.as_ref().map(|(kind, _)| *kind) {
            Some(WorkloadKind::Deployment) => "k8s.deployment.name",
            Some(WorkloadKind::Job) => "k8s.job.name",
            Some(WorkloadKind::CronJob) => "k8s.cronjob.name",
            Some(WorkloadKind::Pod) | None => "k8s.pod.name",
        };
        let members = [
            ("k8s.cluster.name", self.cluster.as_ref()),
            ("k8s.namespace.name", self.namespace.as_ref()),
            (workload_key, self.workload.as_ref().map(|(_, name)| name)),
            ("service.name", self.service_name.as_ref()),
            ("service.version", self.service_version.as_ref()),
            ("cloud.region", self.region.as_ref()),
            ("cloud.availability_zone", self.zone.as_ref()),
        ];
        let mut out = String::with_capacity(256);
        for (key, value) in members {
            let Some(value) = value.filter(|value| !value.is_empty()) else { continue };
            if !out.is_empty() {
                out.push(',');
            }
            out.push_str(key);
            out.push('=');
            percent_encode(value, &mut out);
        }
        if out.is_empty() || out.len() > LONGEST { None } else { HeaderValue::from_str(&out).ok() }
    }
}

/// For whom a tunnel is opened (RFC 7239).
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Forwarded {
    /// `for`: the client's address, if it is a whole one.
    pub client: Option<SocketAddr>,
    /// `host`: the service that the client dialled.
    pub host: Option<Str>,
}

impl Forwarded {
    /// Reads the first element of the list, the one that the first proxy wrote. `None` if it says neither `for`
    /// nor `host`, or the text is longer than 8192 bytes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > LONGEST {
            return None;
        }
        let mut found = Self::default();
        let mut rest = text;
        loop {
            let (name, value, after) = parameter(rest)?;
            if name.eq_ignore_ascii_case("for") {
                found.client = value.parse().ok().map(canonical_addr);
            } else if name.eq_ignore_ascii_case("host") && !value.is_empty() {
                found.host = Some(Str::from(&*value));
            }
            match after.strip_prefix(';') {
                Some(more) => rest = more,
                None if after.is_empty() || after.starts_with(',') => break,
                None => return None,
            }
        }
        (found != Self::default()).then_some(found)
    }

    /// The header's value; `None` if there is nothing to say or the host holds what a header may not.
    #[must_use]
    pub fn encode(&self) -> Option<HeaderValue> {
        thread_local! {
            static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
        }
        TEXT.with_borrow_mut(|out| {
            out.clear();
            self.write(out);
            let is_sendable = !out.is_empty() && out.len() <= LONGEST;
            let value = if is_sendable { HeaderValue::from_str(out).ok() } else { None };
            if out.capacity() > LONGEST {
                *out = String::new();
            }
            value
        })
    }

    fn write(&self, out: &mut String) {
        // Writing to a String does not fail.
        if let Some(client) = self.client {
            let _ = write!(out, "for=\"{client}\"");
        }
        if let Some(host) = &self.host {
            let separator = if out.is_empty() { "" } else { ";" };
            if host.bytes().all(is_token) {
                let _ = write!(out, "{separator}host={host}");
            } else if !host.contains(['"', '\\']) {
                let _ = write!(out, "{separator}host=\"{host}\"");
            }
        }
    }
}

fn canonical_addr(addr: SocketAddr) -> SocketAddr {
    let ip: IpAddr = canonical_ip(addr.ip());
    SocketAddr::new(ip, addr.port())
}

/// One `name=value` or `name="value"` at the start of `text`, and what follows it without leading blanks.
fn parameter(text: &str) -> Option<(&str, Cow<'_, str>, &str)> {
    let (name, rest) = text.trim_start().split_once('=')?;
    if name.is_empty() || !name.bytes().all(is_token) {
        return None;
    }
    if let Some(quoted) = rest.strip_prefix('"') {
        let (value, after) = quoted_string(quoted)?;
        return Some((name, value, after.trim_start()));
    }
    // Istio's proxies leave an address unquoted; RFC 7239 section 4 wants quotes around its colons.
    let end = rest.find([';', ',', ' ', '\t']).unwrap_or(rest.len());
    let (value, after) = rest.split_at(end);
    Some((name, value.into(), after.trim_start()))
}

/// What is before the quote that ends it, and what follows that.
fn quoted_string(quoted: &str) -> Option<(Cow<'_, str>, &str)> {
    let end = quoted.find(['"', '\\'])?;
    let (plain, rest) = quoted.split_at(end);
    if let Some(after) = rest.strip_prefix('"') {
        return Some((plain.into(), after));
    }
    let mut value = plain.to_owned();
    let mut characters = rest.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value.into(), rest.get(at + 1..)?)),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// W3C Baggage section 3.3.1.3: what is no `baggage-octet`, and the percent sign, is encoded.
fn percent_encode(value: &str, out: &mut String) {
    for byte in value.bytes() {
        let plain =
            matches!(byte, 0x21 | 0x23..=0x24 | 0x26..=0x2B | 0x2D..=0x3A | 0x3C..=0x5B | 0x5D..=0x7E);
        if plain {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

fn percent_decode(text: &str) -> Option<Str> {
    if !text.contains('%') {
        return Some(text.into());
    }
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok().map(Str::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ISTIO: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,\
                         service.name=cart,service.version=v1,cloud.region=r1,cloud.availability_zone=z1";

    fn cart() -> Baggage {
        Baggage {
            cluster: Some("Kubernetes".into()),
            namespace: Some("shop".into()),
            workload: Some((WorkloadKind::Deployment, "cart".into())),
            service_name: Some("cart".into()),
            service_version: Some("v1".into()),
            region: Some("r1".into()),
            zone: Some("z1".into()),
        }
    }

    #[test]
    fn baggage_is_written_and_read_as_istio_does() {
        assert_eq!(cart().encode().unwrap().to_str().unwrap(), ISTIO);
        assert_eq!(Baggage::parse(ISTIO), Some(cart()));
    }

    #[test]
    fn odd_baggage_is_read_as_far_as_it_goes() {
        let odd = "  k8s.cluster.name = a%20b ;prop=1 , unknown=1,,=,service.name=%zz,k8s.job.name=j";
        let read = Baggage::parse(odd).unwrap();
        assert_eq!(read.cluster.as_deref(), Some("a b"));
        assert_eq!(read.workload, Some((WorkloadKind::Job, "j".into())));
        assert_eq!(read.service_name, None);
        assert_eq!(Baggage::parse("unknown=1"), None);
        assert_eq!(Baggage::parse(&format!("service.name={}", "x".repeat(LONGEST))), None);
    }

    #[test]
    fn several_baggage_fields_are_one_list() {
        let mut map = HeaderMap::new();
        map.append("baggage", HeaderValue::from_static("service.name=a"));
        map.append("baggage", HeaderValue::from_static("cloud.region=b"));
        let headers = TunnelHeaders::take(&mut map);
        let read = headers.parse_baggage().unwrap();
        assert_eq!((read.service_name.as_deref(), read.region.as_deref()), (Some("a"), Some("b")));
        assert!(map.is_empty());
    }

    #[test]
    fn forwarded_is_read_quoted_and_bare() {
        let expected =
            Forwarded { client: Some("10.0.0.1:1234".parse().unwrap()), host: Some("a.b:80".into()) };
        for text in [
            "for=\"10.0.0.1:1234\";host=\"a.b:80\"",
            "for=10.0.0.1:1234;host=a.b:80",
            "For=\"10.0.0.1:1234\"; Host=\"a.b:80\" , for=1.1.1.1:1",
            "by=x;for=\"[::ffff:10.0.0.1]:1234\";host=a.b:80;proto=https",
        ] {
            assert_eq!(Forwarded::parse(text), Some(expected.clone()), "{text}");
        }
        for text in ["", "for", "for=\"10.0.0.1:1", "by=x", "for=unknown", "f or=1.1.1.1:1", "host=a x"] {
            assert_eq!(Forwarded::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_host_that_needs_it_is_quoted() {
        let forwarded = Forwarded { client: None, host: Some("a:80".into()) };
        assert_eq!(forwarded.encode().unwrap(), "host=\"a:80\"");
        let hostile = Forwarded { client: None, host: Some("a\";for=\"b".into()) };
        assert_eq!(hostile.encode(), None);
    }

    proptest! {
        #[test]
        fn any_name_survives_baggage(name in "\\PC{1,40}", kind in 0..4u8) {
            let kind = match kind {
                0 => WorkloadKind::Pod,
                1 => WorkloadKind::Deployment,
                2 => WorkloadKind::Job,
                _ => WorkloadKind::CronJob,
            };
            let baggage = Baggage { workload: Some((kind, name.as_str().into())), ..Baggage::default() };
            let value = baggage.encode().unwrap();
            prop_assert_eq!(Baggage::parse(value.to_str().unwrap()), Some(baggage));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "[\\PC\"\\\\;,=%]{0,200}") {
            let _ = Baggage::parse(&text);
            let _ = Forwarded::parse(&text);
        }

        #[test]
        fn any_client_survives_forwarded(client: SocketAddr) {
            let forwarded = Forwarded { client: Some(canonical_addr(client)), host: None };
            let value = forwarded.encode().unwrap();
            prop_assert_eq!(Forwarded::parse(value.to_str().unwrap()), Some(forwarded));
        }
    }
}
