//! The parts of AuthorizationPolicies that only requests show.

use model::http::{Attribute, AttributeMatch, HttpMatch, PathPattern, Template};
use model::{Str, StringMatch};

use super::pattern::{self, read_list};
use crate::fields::{Cursor, Fields};
use crate::headers::is_of_connection;

/// What is read of a part: `None` where it asks nothing of requests.
pub(super) type Read = Option<Box<HttpMatch>>;

/// Reads what a source asks of requests.
pub(super) fn source(fields: &mut Fields<'_, '_>, beyond: &mut Vec<String>) -> Read {
    let mut m = HttpMatch::default();
    let mut list = Lists { fields, beyond };
    m.request_principals = list.read("requestPrincipals", pattern::text);
    m.not_request_principals = list.read("notRequestPrincipals", pattern::text);
    m.remote_ips = list.read("remoteIpBlocks", pattern::range);
    m.not_remote_ips = list.read("notRemoteIpBlocks", pattern::range);
    some(m)
}

/// Reads what an operation asks of requests.
pub(super) fn operation(fields: &mut Fields<'_, '_>, beyond: &mut Vec<String>) -> Read {
    let mut m = HttpMatch::default();
    let mut list = Lists { fields, beyond };
    m.methods = list.read("methods", pattern::text);
    m.not_methods = list.read("notMethods", pattern::text);
    m.paths = list.read("paths", path);
    m.not_paths = list.read("notPaths", path);
    m.hosts = list.read("hosts", pattern::text);
    m.not_hosts = list.read("notHosts", pattern::text);
    some(m)
}

fn some(m: HttpMatch) -> Read {
    (m != HttpMatch::default()).then(|| Box::new(m))
}

struct Lists<'l, 'f, 'n> {
    fields: &'l mut Fields<'f, 'n>,
    beyond: &'l mut Vec<String>,
}

impl<'n> Lists<'_, '_, 'n> {
    /// Reads a list that connections can't be matched by, and notes its name.
    fn read<T>(&mut self, name: &'static str, read: impl FnMut(Cursor<'_, 'n>) -> Option<T>) -> Box<[T]> {
        let list = read_list(self.fields, name, read);
        if !list.is_empty() && !self.beyond.iter().any(|b| b == name) {
            self.beyond.push(name.to_owned());
        }
        list
    }
}

fn path(mut cursor: Cursor<'_, '_>) -> Option<PathPattern> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    match Template::parse(text) {
        Ok(Some(template)) => Some(PathPattern::Template(template)),
        Ok(None) => pattern::text(cursor).map(PathPattern::Text),
        Err(error) => {
            cursor.invalid(format_args!("{text:?}: {error}"), "");
            None
        }
    }
}

/// What a condition is of.
pub(super) enum Key {
    RemoteIp,
    RequestPrincipal,
    Attribute(Attribute),
    /// Upstream's key for what an Envoy filter says; nothing here can tell it.
    Filter,
}

/// The keys of conditions that upstream knows and that need requests, or more of a connection than L4 has.
pub(super) fn key(name: &str) -> Option<Key> {
    let indexed = |prefix: &str| {
        let rest = name.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?;
        (!rest.is_empty()).then_some(rest)
    };
    let claim =
        |path: &[&str]| Key::Attribute(Attribute::Claim(path.iter().map(|p| Str::from(*p)).collect()));
    Some(match name {
        "remote.ip" => Key::RemoteIp,
        "connection.sni" => Key::Attribute(Attribute::Sni),
        "request.auth.principal" => Key::RequestPrincipal,
        "request.auth.audiences" => claim(&["aud"]),
        "request.auth.presenter" => claim(&["azp"]),
        _ => {
            if let Some(header) = indexed("request.headers") {
                Key::Attribute(Attribute::Header(header.to_ascii_lowercase().as_str().into()))
            } else if let Some(path) = indexed("request.auth.claims") {
                claim(&path.split("][").collect::<Vec<_>>())
            } else if name.strip_prefix("experimental.envoy.filters.").is_some_and(|rest| !rest.is_empty()) {
                Key::Filter
            } else {
                return None;
            }
        }
    })
}

/// Refuses a condition on a header that no policy is shown: it would never hold, which in a DENY policy is a hole.
pub(super) fn check_shown(key: &Key, cursor: &mut Cursor<'_, '_>) {
    let Key::Attribute(Attribute::Header(name)) = key else { return };
    let is_hidden = is_of_connection(name) || (name.starts_with(':') && !Attribute::is_of_head(name));
    if is_hidden {
        cursor.invalid(
            format_args!("the header {name} is the connection's own, and no policy is shown it"),
            "match by another header",
        );
    }
}

/// Reads a condition; `None` for one that nothing can tell.
pub(super) fn condition(key: Key, when: &mut Fields<'_, '_>) -> Read {
    let mut m = HttpMatch::default();
    match key {
        Key::RemoteIp => {
            m.remote_ips = read_list(when, "values", pattern::range);
            m.not_remote_ips = read_list(when, "notValues", pattern::range);
        }
        Key::RequestPrincipal => {
            m.request_principals = read_list(when, "values", text);
            m.not_request_principals = read_list(when, "notValues", text);
        }
        Key::Attribute(attribute) => {
            let values = read_list(when, "values", text);
            let not_values = read_list(when, "notValues", text);
            m.attribute = Some(AttributeMatch { attribute, values, not_values });
        }
        Key::Filter => {
            read_list(when, "values", text);
            read_list(when, "notValues", text);
            return None;
        }
    }
    Some(Box::new(m))
}

/// A pattern in which an asterisk in the middle stands for itself: values of headers and claims may well have one.
fn text(cursor: Cursor<'_, '_>) -> Option<StringMatch> {
    super::selector::non_empty(cursor).map(StringMatch::parse)
}
