//! What a waypoint would do with a request, or with a connection that shows none: the policies' decision, the route, and
//! the endpoints that it goes on to. All of it is what the evaluator and the tables return.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, bail};
use clap::Args;
use model::http::{
    BackendRef, Claims, Forward, HttpPort, HttpService, Protocol, Request, RouteAction, SelectedStream,
    SourceFacts, Stream, normalize,
};
use model::{Connection, Mesh, RequestDecision, Service, SpiffeId, Str, Workload};
use serde_json::Value;

use super::{Source, Verdict, decide};
use crate::files::Compiled;

/// The request that is asked about.
#[derive(Args, Debug, Default)]
pub struct RequestArgs {
    /// The request's method, where a waypoint decides
    #[arg(long, default_value = "GET")]
    method: String,
    /// Its path, with a query if there is one
    #[arg(long, default_value = "/")]
    path: String,
    /// Its host; without it that of the service
    #[arg(long)]
    host: Option<String>,
    /// A header of it, "NAME: VALUE"; may be given more than once
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Its token, a JWT: taken for valid, its signature is not checked here
    #[arg(long, conflicts_with = "claims")]
    token: Option<String>,
    /// The claims of its token, as JSON
    #[arg(long, value_name = "JSON")]
    claims: Option<String>,
    /// The server name of the connection's TLS handshake
    #[arg(long, value_name = "NAME")]
    sni: Option<String>,
    /// It is a connection that is not HTTP
    #[arg(long, conflicts_with_all = ["method", "path", "host", "header", "token", "claims"])]
    tcp: bool,
}

/// Where something goes that a waypoint lets pass.
pub(super) struct Passed {
    /// What the waypoint says.
    pub hop: Verdict,
    /// What the nodes of the endpoints say.
    pub next: Vec<Verdict>,
}

/// Decides at the waypoint of `service`, and at the nodes of what it leads to.
pub(super) fn pass(
    args: &RequestArgs,
    compiled: &Compiled,
    source: &Source,
    service: &Service,
    number: u16,
    http: &HttpService,
) -> Result<Passed> {
    let mesh = &compiled.mesh;
    let port = http.port(number).with_context(|| format!("the waypoint knows no port {number}"))?;
    let vip = service.vips.first().map_or(Ipv4Addr::UNSPECIFIED.into(), |vip| vip.range.addr());
    let to = SocketAddr::new(vip, number);
    let connection = Connection::new(source.identity.clone(), source.ip, to);
    let facts = Facts::of(mesh, source);
    let mut hop = Verdict {
        workload: format!("waypoint {}", http.waypoint),
        address: to.to_string(),
        carried: "hbone",
        ..Verdict::default()
    };
    let is_http = match port.protocol {
        Protocol::Http | Protocol::Http2 if args.tcp => bail!("port {number} is for HTTP"),
        Protocol::Http | Protocol::Http2 => true,
        Protocol::Detect => !args.tcp,
        Protocol::Tcp | Protocol::Tls => false,
    };
    let chosen = if is_http {
        request(args, mesh, service, port, http, &connection, &facts, &mut hop)?
    } else {
        let decision = mesh.authorize_at_waypoint(http, &connection, None);
        explain(&decision, "connection", &mut hop);
        if hop.allowed { stream(args, port, http, vip, &facts, &mut hop) } else { None }
    };
    let next = chosen.map(|forward| endpoints(compiled, http, &forward)).unwrap_or_default();
    Ok(Passed { hop, next })
}

/// What is known of the client.
struct Facts {
    namespace: Option<Str>,
    labels: Vec<(Str, Str)>,
}

impl Facts {
    fn of(mesh: &Mesh, source: &Source) -> Self {
        let workload = mesh.workload_at(&model::NetworkAddress::new("".into(), source.ip));
        let labels = workload.map(|w| w.labels.to_vec()).unwrap_or_default();
        Self { namespace: source.identity.as_ref().map(|i| i.namespace().clone()), labels }
    }

    fn view(&self) -> SourceFacts<'_> {
        SourceFacts { namespace: self.namespace.as_deref(), labels: &self.labels }
    }
}

/// Decides over a request; gives where it goes on to, if it does.
#[expect(clippy::too_many_arguments, reason = "all that a decision is made of")]
fn request(
    args: &RequestArgs,
    mesh: &Mesh,
    service: &Service,
    port: &HttpPort,
    http: &HttpService,
    connection: &Connection,
    facts: &Facts,
    hop: &mut Verdict,
) -> Result<Option<Forward>> {
    let (raw, query) = args.path.split_once('?').unwrap_or((&args.path, ""));
    let path = normalize(raw, mesh.settings().path_normalization)
        .with_context(|| format!("the waypoint answers 400: {raw:?} has no safe reading"))?;
    let headers = headers(&args.header)?;
    let fields: Vec<(&str, &str)> = headers.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let claims = claims(args)?;
    let authority = args.host.as_deref().unwrap_or(&service.hostname);
    let request = Request {
        query,
        claims: claims.as_ref(),
        sni: args.sni.as_deref(),
        remote_ip: connection.source_ip(),
        ..Request::new(&args.method, authority, &path, &fields)
    };
    let shown = format!("{} {authority}{path}", args.method);
    if let Some(refusal) = authenticate(mesh, http, claims.as_ref()) {
        hop.reason = format!("{shown}: {refusal}");
        return Ok(None);
    }
    explain(&mesh.authorize_at_waypoint(http, connection, Some(&request)), &shown, hop);
    if !hop.allowed {
        return Ok(None);
    }
    if port.routes.entries().is_empty() {
        hop.route = Some("no routes: to the service itself".to_owned());
        return Ok(Some(itself(http, port)));
    }
    let selected = port.routes.select(&request, &facts.view());
    let Some(selected) = selected.filter(|selected| !selected.route.is_for_the_rest()) else {
        (hop.allowed, hop.route) = (false, Some("no route takes it: 404".to_owned()));
        return Ok(None);
    };
    let route = format!("{} ({})", selected.route.id, selected.matched);
    let (allowed, text, forward) = match &selected.route.action {
        RouteAction::Redirect(redirect) => (true, format!("{route} redirects: {}", redirect.status), None),
        RouteAction::Respond(respond) => {
            (respond.status < 400, format!("{route} answers {}", respond.status), None)
        }
        RouteAction::Forward(forward) => (true, route, Some(forward.clone())),
    };
    (hop.allowed, hop.route) = (allowed, Some(text));
    Ok(forward)
}

/// Chooses the route of a connection; gives where it goes on to, if it does.
fn stream(
    args: &RequestArgs,
    port: &HttpPort,
    http: &HttpService,
    destination: IpAddr,
    facts: &Facts,
    hop: &mut Verdict,
) -> Option<Forward> {
    let tls = args.sni.is_some() || port.protocol == Protocol::Tls;
    let stream = Stream { sni: args.sni.as_deref(), tls, destination };
    match port.streams.select(&stream, &facts.view()) {
        SelectedStream::Itself => {
            hop.route = Some("no routes: to the service itself".to_owned());
            Some(itself(http, port))
        }
        SelectedStream::Route { route, matched, .. } => {
            hop.route = Some(format!("{} ({matched})", route.id));
            Some(route.to.clone())
        }
        SelectedStream::Nothing => {
            (hop.allowed, hop.route) = (false, Some("no route takes it: closed".to_owned()));
            None
        }
    }
}

/// The service itself, as a route to it would have it.
fn itself(http: &HttpService, port: &HttpPort) -> Forward {
    Forward::new(vec![model::http::Backend {
        to: BackendRef::Service { service: http.service.clone(), port: port.number, subset: None },
        weight: 1,
        request_headers: model::http::HeaderEdits::default(),
        response_headers: model::http::HeaderEdits::default(),
    }])
}

/// Puts a decision into words.
fn explain(decision: &RequestDecision, shown: &str, hop: &mut Verdict) {
    hop.allowed = decision.outcome.is_ok();
    hop.policy = match &decision.outcome {
        Ok(model::Allow::Matched(rule)) => Some(rule.policy.to_string()),
        Ok(model::Allow::NoAllowPolicies) => None,
        Err(deny) => deny.policy().map(ToString::to_string),
    };
    let outcome = decision.outcome.as_ref().map_or_else(ToString::to_string, ToString::to_string);
    hop.reason = format!("{shown}: {outcome}");
    for (policy, provider) in &decision.ask {
        hop.reason += &format!("; policy {policy}: {provider} has to agree, too");
    }
    hop.dry_run = super::trials(&decision.dry_run);
}

/// What a waypoint answers to a token that no RequestAuthentication takes, as far as its issuer tells.
fn authenticate(mesh: &Mesh, http: &HttpService, claims: Option<&Claims>) -> Option<String> {
    let claims = claims?;
    let issuer = claims.payload().get("iss").and_then(Value::as_str).unwrap_or_default();
    let rules = http.authentication.iter().filter_map(|key| mesh.authentication(key)).flat_map(|a| &a.rules);
    let takes = |rule: &std::sync::Arc<model::http::TokenRule>| {
        rule.issuer.as_ref().is_none_or(|wanted| **wanted == *issuer)
    };
    let mut rules = rules.peekable();
    (rules.peek().is_some() && !rules.any(takes))
        .then(|| format!("refused with 401: no RequestAuthentication takes tokens of the issuer {issuer:?}"))
}

fn headers(given: &[String]) -> Result<Vec<(String, String)>> {
    let one = |text: &String| {
        let (name, value) = text.split_once(':').with_context(|| format!("{text:?} is not NAME: VALUE"))?;
        Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    given.iter().map(one).collect()
}

fn claims(args: &RequestArgs) -> Result<Option<Claims>> {
    let payload = match (&args.claims, &args.token) {
        (Some(text), _) => text.clone().into_bytes(),
        (None, Some(token)) => {
            let payload = token.split('.').nth(1).context("the token is no JWT")?;
            base64_url(payload).context("the token is no JWT: its payload is no Base64")?
        }
        (None, None) => return Ok(None),
    };
    let payload: Value = serde_json::from_slice(&payload).context("the claims are no JSON")?;
    let Value::Object(payload) = payload else { bail!("the claims are no JSON object") };
    Ok(Some(Claims::new(payload)))
}

/// Base64 with the alphabet of URLs, without padding (RFC 7515 section 2).
fn base64_url(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut held) = (0_u32, 0_u32);
    for letter in text.trim_end_matches('=').bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push(u8::try_from((bits >> held) & 0xff).ok()?);
            bits &= (1 << held) - 1;
        }
    }
    Some(out)
}

/// What the nodes of the endpoints say to the waypoint.
fn endpoints(compiled: &Compiled, http: &HttpService, forward: &Forward) -> Vec<Verdict> {
    let mesh = &compiled.mesh;
    let all: u64 = forward.backends().iter().map(|b| u64::from(b.weight)).sum();
    if all == 0 {
        let reason = "the route has no back end with a weight: 500".to_owned();
        return vec![Verdict {
            workload: "(none)".to_owned(),
            carried: "nothing",
            reason,
            ..Verdict::default()
        }];
    }
    let waypoint = waypoint(mesh, http);
    let mut verdicts = Vec::new();
    for backend in forward.backends().iter().filter(|b| b.weight > 0) {
        let share = format!("{} of {all}", backend.weight);
        let nothing = |reason: String| Verdict {
            workload: "(none)".to_owned(),
            carried: "nothing",
            route: Some(share.clone()),
            reason,
            ..Verdict::default()
        };
        let (service, port, subset) = match &backend.to {
            BackendRef::Service { service, port, subset } => (service, *port, subset),
            BackendRef::Original => {
                verdicts
                    .push(Verdict { allowed: true, ..nothing("the address that was dialled".to_owned()) });
                continue;
            }
            BackendRef::Unresolved { reason } => {
                verdicts.push(nothing(format!("500: {reason}")));
                continue;
            }
        };
        let set = mesh.endpoints(service).cloned().unwrap_or_default();
        let found = set.as_slice().iter().filter(|e| of_subset(mesh, service, subset.as_ref(), &e.workload));
        let found = found.filter_map(|e| Some((&e.workload, set.target_port(e, port)?)));
        let before = verdicts.len();
        let begins_tls =
            mesh.traffic(service).is_some_and(|t| t.policy(port, subset.as_deref()).tls.is_some());
        verdicts.extend(found.map(|(workload, target)| {
            let decided = decide(compiled, &waypoint, workload, target);
            // The waypoint's own, as a DestinationRule says.
            let carried = if begins_tls && decided.carried == "plaintext" { "tls" } else { decided.carried };
            Verdict { route: Some(format!("{service}:{port}, {share}")), carried, ..decided }
        }));
        if verdicts.len() == before {
            let subset = subset.as_ref().map(|s| format!(" in subset {s}")).unwrap_or_default();
            verdicts.push(nothing(format!("503: {service}:{port} has no endpoint{subset}")));
        }
    }
    verdicts
}

/// Whether a workload is of a subset of a service.
fn of_subset(mesh: &Mesh, service: &model::ServiceKey, subset: Option<&Str>, workload: &Workload) -> bool {
    let Some(name) = subset else { return true };
    let traffic = mesh.traffic(service);
    let subset = traffic.and_then(|t| t.subsets.iter().find(|s| s.name == *name));
    subset.is_some_and(|s| s.labels.iter().all(|label| workload.labels.contains(label)))
}

/// The waypoint, as nodes see it.
fn waypoint(mesh: &Mesh, http: &HttpService) -> Source {
    let (namespace, name) = (&http.waypoint.namespace, &http.waypoint.name);
    let domain = mesh.settings().trust_domains.own.clone();
    let identity = SpiffeId::new(domain, namespace.clone(), name.clone()).ok();
    let of = |w: &&std::sync::Arc<Workload>| w.identity().ok() == identity && identity.is_some();
    let ip = mesh.workloads().filter(of).filter_map(|w| w.addresses.first().copied()).min();
    let ip = ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    Source { shown: format!("waypoint {}", http.waypoint), identity, ip, in_mesh: true }
}
