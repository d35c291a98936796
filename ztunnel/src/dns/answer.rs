//! Answers to names that the mesh knows.

use std::net::IpAddr;

use super::registry::Target;
use super::wire::{Builder, Query, flag, kind};

/// How long clients keep an answer, in seconds (as Istio's).
const TTL: u32 = 30;

/// The extended response code of an unknown EDNS version, BADVERS, less its low four bits (RFC 6891, section 9).
const BAD_VERSION: u8 = 1;

/// Addresses of the kind that was asked for; none of that kind makes an answer without data (RFC 2308, section
/// 2.2), which says that the name exists. What goes beyond `limit` bytes is cut off, and the answer says so.
pub(super) fn with_addresses(query: &Query, addresses: &[IpAddr], limit: usize) -> Vec<u8> {
    let (v4, v6) = match query.kind() {
        kind::A => (true, false),
        kind::AAAA => (false, true),
        _ => (true, true), // ANY (RFC 8482 allows less, and asks for nothing more)
    };
    build(query, limit, |builder| {
        for ip in addresses.iter().filter(|ip| if ip.is_ipv4() { v4 } else { v6 }) {
            let (kind, data) = address(*ip);
            builder.answer(kind, TTL, &data);
        }
    })
}

/// Services and their ports; the addresses of the targets go with them where there is room.
pub(super) fn with_targets(query: &Query, targets: &[Target], limit: usize) -> Vec<u8> {
    build(query, limit, |builder| {
        let named = targets.iter().filter_map(|target| Some((target, name(&target.host)?)));
        let named: Vec<(&Target, Vec<u8>)> = named.collect();
        for (target, host) in &named {
            // RFC 2782: priority, weight, port, target, which is not compressed.
            let mut data = vec![0, 0, 0, 100];
            data.extend_from_slice(&target.port.to_be_bytes());
            data.extend_from_slice(host);
            builder.answer(kind::SRV, TTL, &data);
        }
        for (target, host) in &named {
            for ip in &target.addresses {
                let (kind, data) = address(*ip);
                builder.additional(host, kind, TTL, &data);
            }
        }
    })
}

fn build(query: &Query, limit: usize, fill: impl FnOnce(&mut Builder<'_>)) -> Vec<u8> {
    let mut builder = Builder::new(query, flag::AA, limit);
    if query.edns().is_some_and(|edns| edns.version != 0) {
        return builder.finish(BAD_VERSION);
    }
    fill(&mut builder);
    builder.finish(0)
}

fn address(ip: IpAddr) -> (u16, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (kind::A, ip.octets().to_vec()),
        IpAddr::V6(ip) => (kind::AAAA, ip.octets().to_vec()),
    }
}

/// A host name in the form of messages; `None` when it does not fit (RFC 1035, section 3.1).
fn name(host: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(host.len() + 2);
    for label in host.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len))?;
        bytes.push(len);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    (bytes.len() <= 255).then_some(bytes)
}
