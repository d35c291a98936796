//! What is taken out of heads, and put in, before anybody decides by them or gets them.

use std::net::IpAddr;

use base64::Engine as _;

use crate::http::decide::Connection;
use crate::http::h1::Refusal;
use crate::http::head::{Fields, Known, RequestHead, ResponseHead, Version};
use crate::http::worker::{ForwardedFor, Settings, Underscores, Worker};

/// What a request's connection fields said, which are gone from its head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hop {
    /// The connection ends after this request.
    pub close: bool,
    /// The client takes trailers.
    pub trailers: bool,
    /// The protocol that the client wants to go on with.
    pub upgrade: Option<Box<[u8]>>,
    /// The client waits for a word before it sends the body.
    pub expects_continue: bool,
}

/// Fields that a `Connection` must not name: others rely on them (RFC 9110 section 7.6.1).
fn may_be_named(name: &[u8]) -> bool {
    !matches!(
        Known::of(name),
        Known::Host
            | Known::ContentLength
            | Known::ForwardedFor
            | Known::ForwardedProto
            | Known::ForwardedClientCert
            | Known::RequestId
            | Known::Expect
    ) && !name.starts_with(b":")
        && !name.eq_ignore_ascii_case(b"x-forwarded-host")
        && !name.eq_ignore_ascii_case(b"authorization")
}

/// Takes out what concerns this connection only, and what a client must not say.
///
/// # Errors
/// What can't be passed on as it was meant.
pub(crate) fn request(
    head: &mut RequestHead,
    connection: &Connection,
    worker: &Worker,
) -> Result<Hop, Refusal> {
    let mut hop = Hop::default();
    let fields = &mut head.fields;
    if fields.has(Known::Expect) {
        hop.expects_continue = fields.known(Known::Expect).all(|v| v.eq_ignore_ascii_case(b"100-continue"));
        if !hop.expects_continue {
            return Err(Refusal::Malformed("an expectation other than 100-continue"));
        }
        fields.remove_known(|known| known == Known::Expect);
    }
    let (mut upgrade, mut named) = (false, Vec::new());
    for member in fields.members(Known::Connection) {
        if member.eq_ignore_ascii_case(b"close") {
            hop.close = true;
        } else if member.eq_ignore_ascii_case(b"upgrade") {
            upgrade = true;
        } else if !may_be_named(member) {
            return Err(Refusal::Malformed("a Connection that names a field of the message"));
        } else if Known::of(member) == Known::Other {
            named.push(member.to_ascii_lowercase());
        }
    }
    if upgrade && (head.version == Version::Http1 || head.extended) {
        hop.upgrade =
            fields.members(Known::Upgrade).find(|protocol| may_be_switched_to(protocol)).map(Box::from);
    }
    hop.trailers = fields.members(Known::Te).any(|te| te.eq_ignore_ascii_case(b"trailers"));
    fields.remove_known(|known| known.is_hop_by_hop() || known == Known::ContentLength);
    remove_named(fields, &named);
    if hop.trailers {
        fields.push(b"te", b"trailers");
    }
    if head.extended {
        // HTTP/2 has none of it (RFC 8441 section 5); servers of HTTP/1.1 ask for it.
        fields.set(b"sec-websocket-key", &websocket_key(worker.random(), worker.random()));
    }
    underscores(fields, worker.settings.underscores)?;
    forwarded(head, connection, &worker.settings);
    if !head.fields.has(Known::RequestId) {
        head.fields.push(b"x-request-id", &request_id(worker.random(), worker.random()));
    }
    Ok(hop)
}

/// Whether what follows a switch to `protocol` is nothing that is decided here: requests would pass unseen, as HTTP/2 (whose
/// RFC 9113 has taken the switch out) or behind TLS.
fn may_be_switched_to(protocol: &[u8]) -> bool {
    let name = protocol.split(|b| *b == b'/').next().unwrap_or_default().trim_ascii();
    let hidden: [&[u8]; 5] = [b"", b"h2c", b"h2", b"http", b"tls"];
    !hidden.iter().any(|hidden| name.eq_ignore_ascii_case(hidden))
}

fn remove_named(fields: &mut Fields, named: &[Vec<u8>]) {
    if !named.is_empty() {
        fields.remove_named(|name| named.iter().any(|n| n.eq_ignore_ascii_case(name)));
    }
}

fn underscores(fields: &mut Fields, rule: Underscores) -> Result<(), Refusal> {
    match rule {
        Underscores::Allow => {}
        Underscores::Drop => fields.remove_named(|name| name.contains(&b'_')),
        Underscores::Reject if fields.iter().any(|(name, _)| name.contains(&b'_')) => {
            return Err(Refusal::Malformed("a field with an underscore in its name"));
        }
        Underscores::Reject => {}
    }
    Ok(())
}

/// Says the client's identity, and is ours alone to say: in trailers, too.
pub(crate) const CLIENT_CERT: &[u8] = b"x-forwarded-client-cert";

/// Who the client is, for the application.
fn forwarded(head: &mut RequestHead, connection: &Connection, settings: &Settings) {
    let scheme = head.scheme();
    let fields = &mut head.fields;
    fields.remove_all_like(CLIENT_CERT);
    if settings.forward_client_cert
        && let Some(identity) = &connection.identity
    {
        let value = format!("URI={identity}");
        fields.push(b"x-forwarded-client-cert", value.as_bytes());
    }
    let client = |ip: IpAddr| ip.to_string().into_bytes();
    match settings.forwarded_for {
        ForwardedFor::Keep => {}
        ForwardedFor::Append => {
            let mut value =
                fields.joined(b"x-forwarded-for").map(std::borrow::Cow::into_owned).unwrap_or_default();
            if !value.is_empty() {
                value.push(b',');
            }
            value.extend_from_slice(&client(connection.client.ip()));
            fields.set(b"x-forwarded-for", &value);
        }
        ForwardedFor::Replace => {
            // What says the same in other words is no more the client's to say.
            for name in [&b"x-forwarded-for"[..], b"forwarded", b"x-real-ip"] {
                fields.remove_all_like(name);
            }
            fields.push(b"x-forwarded-for", &client(connection.client.ip()));
        }
    }
    if !fields.has(Known::ForwardedProto) {
        fields.push(b"x-forwarded-proto", scheme.as_bytes());
    }
}

/// What a client of WebSocket makes up (RFC 6455 section 4.1).
fn websocket_key(high: u64, low: u64) -> Vec<u8> {
    let random = (u128::from(high) << 64) | u128::from(low);
    base64::engine::general_purpose::STANDARD.encode(random.to_be_bytes()).into_bytes()
}

/// A random UUID (RFC 9562 section 5.4).
fn request_id(high: u64, low: u64) -> [u8; 36] {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let high = (high & !0xf000) | 0x4000;
    let low = (low & !(3 << 62)) | (2 << 62);
    let mut bits = (u128::from(high) << 64) | u128::from(low);
    let mut text = [b'-'; 36];
    for (place, digit) in text.iter_mut().enumerate().rev() {
        if !matches!(place, 8 | 13 | 18 | 23) {
            *digit = DIGITS.get((bits & 15) as usize).copied().unwrap_or_default();
            bits >>= 4;
        }
    }
    text
}

/// Takes out of a response what concerns the endpoint's connection only; says whether that ends after it.
pub(crate) fn response(head: &mut ResponseHead, keep_length: bool) -> bool {
    let fields = &mut head.fields;
    let mut close = fields.is_old();
    let mut named = Vec::new();
    for member in fields.members(Known::Connection) {
        if member.eq_ignore_ascii_case(b"close") {
            close = true;
        } else if member.eq_ignore_ascii_case(b"keep-alive") {
            close = false;
        } else if Known::of(member) == Known::Other {
            named.push(member.to_ascii_lowercase());
        }
    }
    fields.remove_known(|k| (k.is_hop_by_hop()) || (k == Known::ContentLength && !keep_length));
    remove_named(fields, &named);
    close
}

#[cfg(test)]
mod tests {
    use super::{may_be_switched_to, request_id};

    #[test]
    fn nobody_switches_to_what_carries_requests() {
        for protocol in ["websocket", "WebSocket", "connect-udp", "tls-like/1"] {
            assert!(may_be_switched_to(protocol.as_bytes()), "{protocol}");
        }
        for protocol in ["", "h2c", "H2C", "h2", "HTTP/2.0", "http/3", "TLS/1.2", "tls", "h2c/1"] {
            assert!(!may_be_switched_to(protocol.as_bytes()), "{protocol}");
        }
    }

    #[test]
    fn a_request_id_is_a_uuid_of_version_4() {
        let text = request_id(u64::MAX, 0);
        assert_eq!(std::str::from_utf8(&text).unwrap(), "ffffffff-ffff-4fff-8000-000000000000");
    }
}
