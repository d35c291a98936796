//! Requests, and connections of bytes, as a waypoint's `/requests` lists them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use super::WhyArgs;
use crate::admin::Address;
use crate::connections::Filter;
use crate::table::{print, printable};

/// Which requests. Any of these asks waypoints, not ztunnels.
#[derive(Args, Clone, Debug, Default)]
pub struct RequestFilter {
    /// Of what passed a waypoint: this one, by its Gateway or a pod; without a name the one of this machine, or all of the
    /// cluster
    #[arg(long, value_name = "[NAMESPACE/]NAME", num_args = 0..=1, default_missing_value = "")]
    waypoint: Option<String>,
    /// The request with this `x-request-id`
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Requests for this path, with or without a query; `/a*` is what begins with it
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Requests with this method
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Requests that were answered so; 4xx and 5xx are all of them
    #[arg(long, value_name = "STATUS", value_parser = status)]
    status: Option<String>,
}

/// Reads a status, or a class of them; 0 is of a request that got no answer.
fn status(text: &str) -> Result<String, &'static str> {
    let first = text.bytes().next().is_some_and(|b| (b'1'..=b'5').contains(&b));
    let rest = text.get(1..).unwrap_or_default();
    let is =
        text == "0" || first && (rest == "xx" || rest.len() == 2 && rest.bytes().all(|b| b.is_ascii_digit()));
    if is { Ok(text.to_owned()) } else { Err("write a status such as 503, or a class of them such as 5xx") }
}

impl RequestFilter {
    /// Whether waypoints are to be asked, and which one, if it is said.
    pub fn waypoints(&self) -> Option<Option<&str>> {
        let of_requests = [&self.request_id, &self.path, &self.method, &self.status];
        match &self.waypoint {
            Some(name) => Some(Some(name.as_str()).filter(|name| !name.is_empty())),
            None => of_requests.iter().any(|part| part.is_some()).then_some(None),
        }
    }

    fn matches(&self, request: &Request) -> bool {
        let path = |wanted: &String| {
            let path = request.path.as_deref().unwrap_or_default();
            match wanted.strip_suffix('*') {
                Some(begin) => path.starts_with(begin),
                None => path == wanted || path.split('?').next() == Some(wanted),
            }
        };
        let status = |wanted: &String| {
            let status = request.status.map(|status| status.to_string()).unwrap_or_default();
            match wanted.strip_suffix("xx") {
                Some(class) => status.len() == 3 && status.starts_with(class),
                None => status == *wanted,
            }
        };
        self.request_id.as_ref().is_none_or(|id| request.request_id.as_ref() == Some(id))
            && self.path.as_ref().is_none_or(path)
            && self.method.as_ref().is_none_or(|method| request.method.as_ref() == Some(method))
            && self.status.as_ref().is_none_or(status)
    }
}

/// A request, or a connection. What is absent is not known.
#[derive(Clone, Debug, Deserialize)]
struct Request {
    id: u64,
    kind: String,
    at_ms: u64,
    #[serde(default)]
    duration_ms: f64,
    request_id: Option<String>,
    trace: Option<String>,
    method: Option<String>,
    authority: Option<String>,
    path: Option<String>,
    #[serde(default)]
    protocol: String,
    server_name: Option<String>,
    source: SocketAddr,
    source_workload: Option<String>,
    source_identity: Option<String>,
    destination: SocketAddr,
    destination_service: Option<String>,
    status: Option<u16>,
    #[serde(default)]
    flags: String,
    #[serde(default)]
    details: String,
    token: Option<Value>,
    #[serde(default)]
    decision: String,
    #[serde(default)]
    asked: Vec<Asked>,
    #[serde(default)]
    dry_run: Vec<String>,
    route: Option<String>,
    #[serde(rename = "match")]
    matched: Option<String>,
    backend: Option<String>,
    endpoint: Option<SocketAddr>,
    endpoint_workload: Option<String>,
    hop: Option<String>,
    upstream_error: Option<String>,
    #[serde(default)]
    attempts: u32,
    #[serde(default)]
    bytes_received: u64,
    #[serde(default)]
    bytes_sent: u64,
    /// Who lists it, where several were asked.
    #[serde(skip)]
    by: String,
    /// All of it, as it came.
    #[serde(skip)]
    json: Value,
}

#[derive(Clone, Debug, Deserialize)]
struct Asked {
    policy: String,
    provider: String,
    /// Of an older waypoint there is none.
    answer: Option<String>,
}

impl Request {
    fn is_of(&self, filter: &Filter) -> bool {
        let host = self.destination_service.as_ref().and_then(|s| s.split_once('/')).map(|s| s.1.to_owned());
        filter.is_source(&[Some(self.source)], &[&self.source_workload, &self.source_identity])
            && filter.is_destination(
                &[Some(self.destination), self.endpoint],
                &[&self.destination_service, &host, &self.authority, &self.endpoint_workload],
            )
    }
}

/// Shows the newest requests that are meant.
pub fn run(args: &WhyArgs, who: Option<&str>) -> Result<ExitCode> {
    let mut known = 0;
    let mut found = Vec::new();
    let addresses = args.target.waypoints(who)?;
    for address in &addresses {
        let all = fetch(address, addresses.len() > 1)?;
        known += all.len();
        let meant = |request: &Request| {
            args.id.is_none_or(|id| request.id == id)
                && args.request.matches(request)
                && request.is_of(&args.filter)
        };
        found.extend(all.into_iter().filter(meant));
    }
    // Numbers are each waypoint's own; between them the time orders.
    found.sort_by_key(|request| (request.at_ms, request.id));
    found.reverse();
    found.truncate(args.last);
    if found.is_empty() {
        bail!(
            "none of the {known} requests and connections that the waypoint remembers is meant. It keeps the last few hundred, \
             those that failed for longer; a request that never reached it is known to the client's ztunnel: `culvert why \
             --source WHO --destination WHERE`"
        );
    }
    let list: Vec<_> = found.iter().map(|request| &request.json).collect();
    match args.output.document(&list)? {
        Some(document) => print(&document)?,
        None => print(&found.iter().map(explain).collect::<Vec<_>>().join("\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn fetch(address: &Address, several: bool) -> Result<Vec<Request>> {
    let mut page = address.json("/requests")?;
    let Some(Value::Array(items)) = page.get_mut("requests").map(Value::take) else {
        bail!("the page /requests of {address} is no waypoint's");
    };
    let mut all = Vec::new();
    for mut item in items {
        let mut request = Request::deserialize(&item)
            .with_context(|| format!("{address} lists a request that this culvert can't read"))?;
        if several {
            request.by = address.to_string();
            if let Some(map) = item.as_object_mut() {
                map.insert("waypoint".to_owned(), request.by.clone().into());
            }
        }
        request.json = item;
        all.push(request);
    }
    Ok(all)
}

fn explain(r: &Request) -> String {
    let mut text = String::new();
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(r.at_ms);
    let age = SystemTime::now().duration_since(at).unwrap_or_default().as_secs_f64();
    let by = if r.by.is_empty() { String::new() } else { format!(" of {}", r.by) };
    let outcome = match (r.status, r.flags.as_str()) {
        (Some(0), flags) => format!("no answer ({flags})"),
        (Some(status), "-") => status.to_string(),
        (Some(status), flags) => format!("{status} ({flags})"),
        (None, "-") if r.decision.starts_with("denied") => "refused".to_owned(),
        (None, "-") => "ended".to_owned(),
        (None, flags) => format!("failed ({flags})"),
    };
    let _ = writeln!(text, "{outcome}: {} {}{by}, {}, {age:.1} s ago", r.kind, r.id, r.details);
    if let (Some(method), Some(path)) = (&r.method, &r.path) {
        let authority = r.authority.as_deref().unwrap_or_default();
        let id = r.request_id.as_ref().map(|id| format!(", request ID {id}")).unwrap_or_default();
        let _ = writeln!(text, "  what  {method} {authority}{path} {}{id}", r.protocol);
    }
    if let Some(name) = &r.server_name {
        let _ = writeln!(text, "  what  TLS to {name}");
    }
    let identity = r.source_identity.as_deref().unwrap_or("no identity");
    let workload = r.source_workload.as_deref().unwrap_or("(unknown workload)");
    let _ = writeln!(text, "  from  {workload} {}, {identity}", r.source);
    let service = r.destination_service.as_ref().map(|s| format!(" (service {s})")).unwrap_or_default();
    let _ = writeln!(text, "  to    {}{service}", r.destination);
    if let Some(token) = &r.token {
        let claim =
            |key: &str| token.get(key).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
        let (iss, sub) = (claim("iss").unwrap_or_default(), claim("sub").unwrap_or_default());
        let _ = writeln!(text, "  token {iss}/{sub}");
    }
    let _ = writeln!(text, "  why   {}", r.decision);
    for asked in &r.asked {
        let answer = asked.answer.as_ref().map(|answer| format!(": {answer}")).unwrap_or_default();
        let _ = writeln!(text, "  ask   {}, by policy {}{answer}", asked.provider, asked.policy);
    }
    for dry in &r.dry_run {
        let _ = writeln!(text, "  dry   {dry}");
    }
    match (&r.route, &r.matched) {
        (Some(route), Some(matched)) => {
            let _ = writeln!(text, "  route {route}: {matched}");
        }
        (Some(route), None) => {
            let _ = writeln!(text, "  route {route}");
        }
        (None, _) if r.backend.is_some() => {
            let _ = writeln!(text, "  route none: to the service itself");
        }
        (None, _) => {}
    }
    if let Some(backend) = &r.backend {
        let _ = writeln!(text, "  goes  to {backend}");
    }
    if let (Some(endpoint), Some(hop)) = (&r.endpoint, &r.hop) {
        let workload = r.endpoint_workload.as_deref().unwrap_or("(unknown workload)");
        let tries = if r.attempts > 1 { format!(", after {} attempts", r.attempts) } else { String::new() };
        let why = r.upstream_error.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let _ = writeln!(text, "  hop   {workload} {endpoint} over {hop}{tries}{why}");
    }
    if let Some(trace) = &r.trace {
        let _ = writeln!(text, "  trace {trace}");
    }
    let (received, sent, time) = (r.bytes_received, r.bytes_sent, r.duration_ms);
    let _ = writeln!(text, "  bytes {received} received, {sent} sent, in {time:.1} ms");
    printable(&text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request() -> Request {
        Request::deserialize(json!({
            "id": 7, "kind": "request", "at_ms": 1, "duration_ms": 2.5, "request_id": "r-1", "method": "GET",
            "authority": "cart.shop", "path": "/items?id=7", "protocol": "HTTP/2",
            "source": "10.0.0.5:40000", "source_identity": "spiffe://cluster.local/ns/shop/sa/web",
            "destination": "10.1.0.1:80", "destination_service": "shop/cart.shop.svc.cluster.local",
            "status": 503, "flags": "UF,URX", "details": "upstream_connection_failure",
            "decision": "allowed by policy shop/cart rule 0 clause 1.0",
            "asked": [{ "policy": "shop/opa", "provider": "opa", "answer": "allowed" }], "route": "HTTPRoute shop/r rule 1",
            "match": "path /items/*", "backend": "shop/cart.shop.svc.cluster.local:80",
            "endpoint": "10.0.0.9:8080", "hop": "HBONE", "upstream_error": "connecting failed: refused", "attempts": 3
        }))
        .unwrap()
    }

    #[test]
    fn a_request_is_found_by_what_it_was() {
        let is = |filter: RequestFilter| filter.matches(&request());
        let some = |text: &str| Some(text.to_owned());
        assert!(is(RequestFilter { path: some("/items"), ..RequestFilter::default() }));
        assert!(is(RequestFilter { path: some("/it*"), ..RequestFilter::default() }));
        assert!(!is(RequestFilter { path: some("/it"), ..RequestFilter::default() }));
        assert!(is(RequestFilter { status: some("5xx"), method: some("GET"), ..RequestFilter::default() }));
        assert!(!is(RequestFilter { status: some("4xx"), ..RequestFilter::default() }));
        assert!(!is(RequestFilter { request_id: some("r-2"), ..RequestFilter::default() }));
        assert_eq!(RequestFilter::default().waypoints(), None, "a ztunnel is asked");
        assert_eq!(RequestFilter { waypoint: some(""), ..RequestFilter::default() }.waypoints(), Some(None));
    }

    #[test]
    fn a_status_is_one_or_a_class_of_them() {
        assert!(["200", "503", "4xx", "0"].iter().all(|text| status(text).is_ok()));
        assert!(
            ["", "banana", "700", "2x", "20", "2000", "xxx", "5\u{e9}"]
                .iter()
                .all(|text| status(text).is_err())
        );
    }

    #[test]
    fn policy_route_and_hop_are_named() {
        let text = explain(&request());
        for part in [
            "503 (UF,URX): request 7, upstream_connection_failure",
            "GET cart.shop/items?id=7 HTTP/2, request ID r-1",
            "allowed by policy shop/cart rule 0 clause 1.0",
            "HTTPRoute shop/r rule 1: path /items/*",
            "10.0.0.9:8080 over HBONE, after 3 attempts: connecting failed: refused",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
