//! Pages of other origins (Fetch standard, section 3.2).

use std::sync::Arc;

use bytes::Bytes;
use model::http::Cors;

use super::Refusal;
use crate::http::decide::{Edit, Flag, Response, Value};
use crate::http::head::{RequestHead, is_field_value};

/// What is done with a request of a page.
pub enum Crossing {
    /// It goes on, as if nothing were said of origins.
    Pass,
    /// It goes on, and these fields of the response let the page read it.
    Allow(Vec<Edit>),
    /// It asks what it may, and is answered here.
    Answer(Refusal),
}

/// Looks for a page's origin.
#[must_use]
pub fn apply(cors: &Cors, request: &RequestHead) -> Crossing {
    let Some(origin) = request.fields.values(b"origin").next().and_then(|o| std::str::from_utf8(o).ok())
    else {
        return Crossing::Pass;
    };
    let matched = cors.origins.iter().any(|allowed| allowed.matches(origin));
    let asks = request.method() == "OPTIONS"
        && request.fields.values(b"access-control-request-method").next().is_some();
    match (asks, matched) {
        (false, false) => Crossing::Pass,
        (true, false) if cors.forward_unmatched => Crossing::Pass,
        (true, false) => Crossing::Answer(preflight(Vec::new())),
        (true, true) => Crossing::Answer(preflight(permissions(cors, origin, request))),
        (false, true) => Crossing::Allow(granted(cors, origin)),
    }
}

fn preflight(fields: Vec<(Box<str>, Box<str>)>) -> Refusal {
    Arc::new(Response { status: 200, fields: fields.into(), body: Bytes::new(), flag: Flag::None })
}

/// What a page may, once it asks.
fn permissions(cors: &Cors, origin: &str, request: &RequestHead) -> Vec<(Box<str>, Box<str>)> {
    let mut fields: Vec<(Box<str>, Box<str>)> = Vec::new();
    let mut add = |name: &str, value: &str| {
        if !value.is_empty() && is_field_value(value.as_bytes()) {
            fields.push((name.into(), value.into()));
        }
    };
    add("access-control-allow-origin", origin);
    if cors.credentials {
        add("access-control-allow-credentials", "true");
    }
    let asked = |name: &'static [u8]| {
        let value = request.fields.joined(name);
        value.and_then(|value| String::from_utf8(value.into_owned()).ok()).unwrap_or_default()
    };
    // An asterisk means nothing to a page that sends cookies: what it asked for is said instead.
    let listed = |list: &[model::Str], asked: String| {
        if list.iter().any(|one| **one == *"*") && cors.credentials { asked } else { joined(list) }
    };
    add("access-control-allow-methods", &listed(&cors.methods, asked(b"access-control-request-method")));
    add("access-control-allow-headers", &listed(&cors.headers, asked(b"access-control-request-headers")));
    if let Some(age) = cors.max_age {
        add("access-control-max-age", &age.as_secs().to_string());
    }
    add("vary", "Origin");
    fields
}

/// The fields by which a page may read the response.
fn granted(cors: &Cors, origin: &str) -> Vec<Edit> {
    let set = |name: &str, value: &str| Edit::Set(name.into(), Value::Plain(value.as_bytes().into()));
    let mut edits = vec![set("access-control-allow-origin", origin)];
    if cors.credentials {
        edits.push(set("access-control-allow-credentials", "true"));
    }
    // With credentials an asterisk would be the name of a field, which the Gateway API forbids.
    let names = cors.expose.iter().map(|name| &**name).filter(|name| !(cors.credentials && *name == "*"));
    let exposed = names.collect::<Vec<_>>().join(",");
    if !exposed.is_empty() && is_field_value(exposed.as_bytes()) {
        edits.push(set("access-control-expose-headers", &exposed));
    }
    edits.push(Edit::Add("vary".into(), Value::Plain(b"Origin".as_slice().into())));
    edits
}

fn joined(list: &[model::Str]) -> String {
    list.iter().map(|one| &**one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_asterisk_is_not_exposed_to_pages_with_credentials() {
        let exposed = |credentials| {
            let cors = Cors {
                origins: Box::default(),
                methods: Box::default(),
                headers: Box::default(),
                expose: ["*".into(), "x-a".into()].into(),
                max_age: None,
                credentials,
                forward_unmatched: false,
            };
            let edits = granted(&cors, "https://a.example");
            edits.into_iter().find_map(|edit| match edit {
                Edit::Set(name, Value::Plain(value)) if &*name == "access-control-expose-headers" => {
                    Some(String::from_utf8_lossy(&value).into_owned())
                }
                _ => None,
            })
        };
        assert_eq!((exposed(false).as_deref(), exposed(true).as_deref()), (Some("*,x-a"), Some("x-a")));
    }
}
