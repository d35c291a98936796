//! The values of policies: text patterns, address ranges, ports, service accounts.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use model::{IpMatch, ServiceAccountMatch, Str, StringMatch, TrustDomains, canonical_ip};

use crate::fields::{Cursor, Fields};

/// Reads the list `name` of a mapping, each item by `read`. An empty list is refused: upstream takes it as if the
/// field were not there, so a list that a template left empty would match everything.
pub fn read_list<'n, T>(
    fields: &mut Fields<'_, 'n>,
    name: &'static str,
    mut read: impl FnMut(Cursor<'_, 'n>) -> Option<T>,
) -> Box<[T]> {
    let Some(mut cursor) = fields.take(name) else { return Box::default() };
    if cursor.node().value == crate::tree::Value::Sequence(Vec::new()) {
        cursor.invalid("is an empty list, which would not restrict anything", "remove the field or fill it");
        return Box::default();
    }
    let mut list = Vec::new();
    cursor.each(|item| list.extend(read(item)));
    list.into()
}

/// A pattern: a text, with `*` at its start or its end, or `*` alone. Anywhere else the asterisk would be a
/// character like any other, in Istio too, so that the pattern would never match: refused, because a rule that
/// never matches is, in a DENY policy, a hole.
pub fn text(mut cursor: Cursor<'_, '_>) -> Option<StringMatch> {
    let node = cursor.node();
    let Some(pattern) = node.as_str() else {
        cursor.string();
        return None;
    };
    match pattern.matches('*').count() {
        _ if pattern.is_empty() => {
            cursor.invalid("is empty, and matches nothing", "remove it or write the value");
            None
        }
        0 => Some(StringMatch::Exact(cursor.context().pool.string(pattern))),
        1 if pattern.starts_with('*') || pattern.ends_with('*') => Some(StringMatch::parse(pattern)),
        _ => {
            cursor.invalid(
                format_args!("in {pattern:?} an asterisk stands where it stands for itself"),
                "a pattern has one asterisk, at its start or its end",
            );
            None
        }
    }
}

/// A pattern for principals. The scheme is not part of a principal; whoever writes it means the same.
pub fn principal(cursor: Cursor<'_, '_>) -> Option<StringMatch> {
    const SCHEME: &str = "spiffe://";
    Some(match text(cursor)? {
        StringMatch::Exact(t) if t.starts_with(SCHEME) => {
            StringMatch::Exact(t.trim_start_matches(SCHEME).into())
        }
        StringMatch::Prefix(t) if t.starts_with(SCHEME) => match t.trim_start_matches(SCHEME) {
            "" => StringMatch::Presence,
            rest => StringMatch::Prefix(rest.into()),
        },
        other => other,
    })
}

/// An address or a range. IPv4-mapped IPv6 is read as the IPv4 that it stands for, as connections are.
pub fn range(mut cursor: Cursor<'_, '_>) -> Option<IpMatch> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let found = parse_range(text);
    if found.is_none() {
        cursor.invalid(
            format_args!("{text:?} is neither an IP address nor a range"),
            "write an address such as 10.1.2.3 or fd00::1, or a range such as 10.1.0.0/16",
        );
    }
    found.map(IpMatch)
}

/// The range that `text` writes: an address, or an address and a prefix length.
#[must_use]
pub fn parse_range(text: &str) -> Option<IpNet> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(canonical_ip(ip).into());
    }
    let range: IpNet = text.parse().ok()?;
    let IpNet::V6(v6) = range else { return Some(range.trunc()) };
    match v6.addr().to_ipv4_mapped() {
        Some(v4) if v6.prefix_len() >= 96 => {
            Some(IpNet::V4(Ipv4Net::new(v4, v6.prefix_len() - 96).ok()?.trunc()))
        }
        _ => Some(range.trunc()),
    }
}

/// A port, written as a string.
pub fn port(mut cursor: Cursor<'_, '_>) -> Option<u16> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    // Not `parse` alone: it takes a sign.
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let port = text.parse().ok().filter(|p| digits && *p > 0);
    if port.is_none() {
        cursor.invalid(format_args!("{text:?} is not a port"), "write a number from 1 to 65535");
    }
    port
}

/// A service account: `name`, in the namespace of the policy, or `namespace/name`.
pub fn service_account(mut cursor: Cursor<'_, '_>, own_namespace: &Str) -> Option<ServiceAccountMatch> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let (namespace, name) = text.split_once('/').map_or((&**own_namespace, text), |(ns, name)| (ns, name));
    if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
        cursor.invalid(
            format_args!("{text:?} is not a service account"),
            "write NAME or NAMESPACE/NAME, without wildcards",
        );
        return None;
    }
    let pool = &mut cursor.context().pool;
    Some(ServiceAccountMatch { namespace: pool.string(namespace), name: pool.string(name) })
}

/// `cluster.local` in a principal stands for the mesh's own trust domain, whatever its name (Istio, "Trust Domain
/// Migration").
const OWN: &str = "cluster.local";

/// The trust domains that the mesh takes for one, its own first.
fn names(domains: &TrustDomains) -> impl Iterator<Item = &str> {
    std::iter::once(&domains.own).chain(domains.aliases.iter()).map(model::TrustDomain::as_str)
}

fn is_ours(domain: &str, domains: &TrustDomains) -> bool {
    domain == OWN || names(domains).any(|d| d == domain)
}

/// Principals of the mesh's own trust domain, or of an alias of it, stand for the same account in each of them.
/// Those of other domains, and patterns that say nothing of the domain, stay as they are.
#[must_use]
pub fn expand_principals(list: &[StringMatch], domains: &TrustDomains) -> Box<[StringMatch]> {
    let mut expanded = Vec::with_capacity(list.len());
    for pattern in list {
        let each = |rest: &str, make: fn(Str) -> StringMatch| {
            names(domains).map(|d| make(format!("{d}/{rest}").into())).collect::<Vec<_>>()
        };
        match pattern {
            StringMatch::Exact(t) => match t.split_once('/') {
                Some((domain, rest)) if is_ours(domain, domains) => {
                    expanded.extend(each(rest, StringMatch::Exact));
                }
                _ => expanded.push(pattern.clone()),
            },
            StringMatch::Prefix(t) => match t.split_once('/') {
                Some((domain, rest)) if is_ours(domain, domains) => {
                    expanded.extend(each(rest, StringMatch::Prefix));
                }
                _ => expanded.push(pattern.clone()),
            },
            StringMatch::Suffix(t) => {
                expanded.push(pattern.clone());
                // Only of a whole principal (`*end-of-domain/ns/…/sa/…`) is the first part a domain's.
                let whole = t.matches('/').count() == 4;
                if let Some((end, rest)) = t.split_once('/').filter(|(end, _)| whole && !end.is_empty())
                    && names(domains).any(|d| d.ends_with(end))
                {
                    let others = names(domains).filter(|d| !d.ends_with(end));
                    expanded.extend(others.map(|d| StringMatch::Exact(format!("{d}/{rest}").into())));
                }
            }
            StringMatch::Presence => expanded.push(StringMatch::Presence),
        }
    }
    without_repetitions(expanded)
}

/// The same for patterns of trust domains.
#[must_use]
pub fn expand_domains(list: &[StringMatch], domains: &TrustDomains) -> Box<[StringMatch]> {
    let mut expanded = Vec::with_capacity(list.len());
    for pattern in list {
        let own = match pattern {
            StringMatch::Exact(domain) => is_ours(domain, domains),
            other => names(domains).any(|d| other.matches(d)),
        };
        if !(own && matches!(pattern, StringMatch::Exact(_))) {
            expanded.push(pattern.clone());
        }
        if own {
            let missing =
                names(domains).filter(|d| matches!(pattern, StringMatch::Exact(_)) || !pattern.matches(d));
            expanded.extend(missing.map(|d| StringMatch::Exact(d.into())));
        }
    }
    without_repetitions(expanded)
}

fn without_repetitions(mut list: Vec<StringMatch>) -> Box<[StringMatch]> {
    let mut seen = HashSet::with_capacity(list.len());
    list.retain(|pattern| seen.insert(pattern.clone()));
    list.into()
}
