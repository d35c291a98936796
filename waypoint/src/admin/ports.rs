//! What is done with the requests to a service's ports, for `/config_dump`: by route, in the order in which they are tried.

use std::time::Duration;

use model::http::{
    Abort, Backend, BackendRef, Forward, HttpPort, PathRewrite, Percent, Protocol, RetryOn, Route,
    RouteAction,
};
use serde_json::{Map, Value, json};

/// A port.
pub(super) fn port(port: &HttpPort) -> Value {
    // A port of bytes has those that its host's VirtualServices say of requests, and no use for them.
    let is_bytes = matches!(port.protocol, Protocol::Tcp | Protocol::Tls);
    let routes = port.routes.entries().iter().filter(|_| !is_bytes);
    let streams = port.streams.entries().iter();
    json!({
        "port": port.number,
        "protocol": match port.protocol {
            Protocol::Detect => "detect",
            Protocol::Http => "HTTP",
            Protocol::Http2 => "HTTP2",
            Protocol::Tcp => "TCP",
            Protocol::Tls => "TLS",
        },
        "routes": routes.map(|(when, route)| of_requests(&when.to_string(), route)).collect::<Vec<_>>(),
        "streams": streams
            .map(|(when, route)| json!({
                "route": route.id.to_string(),
                "match": when.to_string(),
                "backends": backends(&route.to),
            }))
            .collect::<Vec<_>>(),
    })
}

fn of_requests(when: &str, route: &Route) -> Value {
    let mut all = Map::new();
    all.insert("route".to_owned(), route.id.to_string().into());
    all.insert("match".to_owned(), when.into());
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            all.insert(name.to_owned(), value);
        }
    };
    match &route.action {
        RouteAction::Forward(forward) => add("backends", Some(backends(forward))),
        RouteAction::Redirect(to) => add(
            "redirect",
            Some(present(json!({
                "status": to.status,
                "scheme": to.scheme.as_deref(),
                "host": to.host.as_deref(),
                "port": to.port,
                "path": to.path.as_ref().map(rewrite),
            }))),
        ),
        RouteAction::Respond(answer) => {
            add("respond", Some(json!({ "status": answer.status, "bytes": answer.body.len() })));
        }
    }
    add("path", route.path.as_ref().map(|path| rewrite(path).into()));
    add(
        "host",
        route.host.as_ref().map(|host| match host {
            model::http::HostRewrite::To(name) => name.to_string().into(),
            model::http::HostRewrite::Backend => "that of the back end".into(),
        }),
    );
    let edits = route.request_headers.0.len() + route.response_headers.0.len();
    add("headerEdits", (edits > 0).then(|| edits.into()));
    add("timeout", route.timeouts.request.map(seconds));
    add("perTryTimeout", route.timeouts.per_try.map(seconds));
    add(
        "retries",
        route.retry.as_ref().map(|retry| {
            let words: Vec<&str> = RetryOn::words()
                .filter(|word| RetryOn::parse(word).is_some_and(|on| retry.on.has(on)))
                .collect();
            json!({ "attempts": retry.attempts, "on": words, "statuses": retry.statuses })
        }),
    );
    add(
        "delay",
        route.fault.delay.map(|(delay, share)| json!({ "time": seconds(delay), "percent": percent(share) })),
    );
    add(
        "abort",
        route.fault.abort.map(|(abort, share)| match abort {
            Abort::Http(status) => json!({ "status": status, "percent": percent(share) }),
            Abort::Grpc(status) => json!({ "grpcStatus": status, "percent": percent(share) }),
        }),
    );
    let mirrors = route.mirrors.iter();
    let mirrors: Vec<Value> = mirrors
        .map(|mirror| json!({ "to": backend(&mirror.to), "percent": percent(mirror.share) }))
        .collect();
    add("mirrors", (!mirrors.is_empty()).then(|| mirrors.into()));
    add("cors", route.cors.is_some().then_some(Value::Bool(true)));
    all.into()
}

/// An object without what it does not have.
fn present(value: Value) -> Value {
    match value {
        Value::Object(all) => {
            all.into_iter().filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>().into()
        }
        value => value,
    }
}

fn seconds(time: Duration) -> Value {
    format!("{}s", time.as_secs_f64()).into()
}

fn percent(share: Percent) -> f64 {
    f64::from(share.millionths()) / 10_000.0
}

fn rewrite(path: &PathRewrite) -> String {
    match path {
        PathRewrite::Full(text) => format!("all of it by {text}"),
        PathRewrite::Segments(text) | PathRewrite::Prefix(text) => format!("what matched by {text}"),
        PathRewrite::Regex(regex) => format!("~{} by {}", regex.pattern(), regex.replacement()),
    }
}

fn backends(forward: &Forward) -> Value {
    let one = |backend_: &Backend| json!({ "to": backend(&backend_.to), "weight": backend_.weight });
    forward.backends().iter().map(one).collect::<Vec<_>>().into()
}

fn backend(to: &BackendRef) -> String {
    match to {
        BackendRef::Service { service, port, subset: None } => format!("{service}:{port}"),
        BackendRef::Service { service, port, subset: Some(subset) } => {
            format!("{service}:{port} subset {subset}")
        }
        BackendRef::Original => "the address that was dialled".to_owned(),
        BackendRef::Unresolved { reason } => format!("none: {reason}"),
    }
}
