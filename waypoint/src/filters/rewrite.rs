//! What a request becomes before it is sent on: its path, its host, its fields.

use model::http::{HeaderEdit, HeaderEdits, HostRewrite, PathRewrite, RouteMatch};

use super::{Refusal, answer, path};
use crate::http::decide::{Decided, Edit, Edits, Flag, Original, Value};
use crate::http::head::RequestHead;

/// What a path becomes.
#[must_use]
pub fn rewritten(rewrite: &PathRewrite, matched: Option<&RouteMatch>, path: &str) -> String {
    // Without a match of the path, what matched is the root (Gateway API, HTTPPathModifier); where characters are replaced
    // that is the slash, as in Envoy.
    let root = usize::from(matches!(rewrite, PathRewrite::Prefix(_)));
    let length = matched.and_then(|m| m.path.as_ref()).map_or(root, |p| p.matched_len(path));
    let rest = path.get(length..).unwrap_or_default();
    match rewrite {
        PathRewrite::Full(full) => full.to_string(),
        PathRewrite::Prefix(prefix) => {
            let joined = format!("{prefix}{rest}");
            if joined.is_empty() { "/".to_owned() } else { joined }
        }
        PathRewrite::Segments(prefix) => {
            let prefix = prefix.trim_end_matches('/');
            // What matched ends before a slash, or with the path.
            let slash =
                if rest.starts_with('/') || (rest.is_empty() && !prefix.is_empty()) { "" } else { "/" };
            format!("{prefix}{slash}{rest}")
        }
        PathRewrite::Regex(substitution) => substitution.apply(path),
    }
}

/// Rewrites the path.
///
/// # Errors
/// 500 where that comes to no path.
pub fn path(
    rewrite: &PathRewrite,
    matched: Option<&RouteMatch>,
    request: &mut RequestHead,
    decided: &mut Decided,
) -> Result<(), Refusal> {
    let path = rewritten(rewrite, matched, request.path());
    if !path.starts_with('/') || path.bytes().any(|b| b <= b' ' || b >= 0x7f || b == b'#') {
        tracing::debug!(path, "a rewritten path is none");
        return Err(answer(500, "rewrite_without_a_valid_path", Flag::None));
    }
    keep(request, decided);
    let target = path::with_query(path, request.query());
    request.set_target(&target);
    Ok(())
}

/// Rewrites the host, to that of the back end where it is to be that.
pub fn host(rewrite: &HostRewrite, backend: Option<&str>, request: &mut RequestHead, decided: &mut Decided) {
    let host = match rewrite {
        HostRewrite::To(host) => Some(&**host),
        HostRewrite::Backend => backend,
    };
    if let Some(host) = host {
        keep(request, decided);
        request.set_authority(host);
    }
}

/// Remembers what the request asked for.
fn keep(request: &RequestHead, decided: &mut Decided) {
    if decided.original.is_none() {
        let (authority, target) = (request.authority().into(), request.target().into());
        decided.original = Some(Box::new(Original { authority, target }));
    }
}

/// Changes of fields, ready to be made.
#[must_use]
pub fn edits(edits: &HeaderEdits) -> Edits {
    let value = |value: &http::HeaderValue| Value::of(value.as_bytes());
    let one = |edit: &HeaderEdit| match edit {
        HeaderEdit::Remove(name) => Edit::Remove(name.as_str().into()),
        HeaderEdit::Set(name, v) => Edit::Set(name.as_str().into(), value(v)),
        HeaderEdit::Add(name, v) => Edit::Add(name.as_str().into(), value(v)),
    };
    Edits(edits.0.iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use model::http::PathMatch;

    use super::*;

    #[test]
    fn a_prefix_is_replaced_as_the_specification_has_it() {
        // The table of HTTPPathModifier, and what follows from it.
        for (path, matched, to, wanted) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo//bar", "/foo", "/xyz", "/xyz//bar"),
            ("/foo", "/", "/xyz", "/xyz/foo"),
            ("/", "/", "/", "/"),
        ] {
            let matched = RouteMatch { path: Some(PathMatch::segments(matched)), ..RouteMatch::default() };
            let got = rewritten(&PathRewrite::Segments(to.into()), Some(&matched), path);
            assert_eq!(got, wanted, "{path} of {matched:?} by {to:?}");
        }
    }

    #[test]
    fn characters_are_replaced_as_envoy_replaces_them() {
        let prefix = |text: &str| Some(PathMatch::Prefix(text.into()));
        for (path, matched, to, wanted) in [
            ("/api/a", prefix("/api/"), "/", "/a"),
            ("/api/a", prefix("/api"), "/", "//a"),
            ("/api", prefix("/api"), "/v2", "/v2"),
            ("/a/b", Some(PathMatch::Exact("/a/b".into())), "/c", "/c"),
            // What asks nothing of the path has matched the root.
            ("/a", None, "/", "/a"),
            ("/a", None, "/v2/", "/v2/a"),
            ("/", None, "/v2", "/v2"),
        ] {
            let when = RouteMatch { path: matched, ..RouteMatch::default() };
            let got = rewritten(&PathRewrite::Prefix(to.into()), Some(&when), path);
            assert_eq!(got, wanted, "{path} of {when:?} by {to:?}");
        }
    }
}
