//! Redirects.

use std::sync::Arc;

use bytes::Bytes;
use model::http::{Redirect, RouteMatch};

use super::{Refusal, answer, path, rewrite};
use crate::http::decide::{Flag, Response};
use crate::http::head::RequestHead;

/// The answer that sends a client elsewhere. What the redirect does not say stays as the request had it.
#[must_use]
pub fn response(redirect: &Redirect, matched: Option<&RouteMatch>, request: &RequestHead) -> Refusal {
    let scheme = redirect.scheme.as_deref().unwrap_or_else(|| request.scheme());
    let (host, port) = split_port(request.authority());
    let host = redirect.host.as_deref().unwrap_or(host);
    let implied = if scheme == "https" { 443 } else { 80 };
    let port = match redirect.port {
        Some(0) => None,
        Some(port) => Some(port),
        // A port that is the old scheme's own says nothing of the new one.
        None => port.and_then(|port| port.parse().ok()),
    };
    let port = port.filter(|port| *port != implied).map(|port| format!(":{port}")).unwrap_or_default();
    // What is meant for the whole of a server has no path that an address could have.
    let (path, whole) =
        if request.is_server_wide() { ("/", "/") } else { (request.path(), request.target()) };
    let target = match &redirect.path {
        Some(rewriting) => match rewrite::rewritten(rewriting, matched, path) {
            // A query of its own takes the place of the request's, as in Envoy.
            target if target.contains('?') => target,
            path => path::with_query(path, request.query()),
        },
        None => whole.to_owned(),
    };
    let location = format!("{scheme}://{host}{port}{target}");
    if !crate::http::head::is_field_value(location.as_bytes()) {
        return answer(500, "redirect_without_a_valid_location", Flag::None);
    }
    let fields = [(Box::from("location"), location.into_boxed_str())].into();
    Arc::new(Response { status: redirect.status, fields, body: Bytes::new(), flag: Flag::None })
}

/// An authority's host and port, also where the host is an IPv6 address in brackets.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') && !port.is_empty() => (host, Some(port)),
        _ => (authority, None),
    }
}
