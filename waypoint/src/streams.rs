//! Connections that carry no HTTP, or of which nobody looks for it: decided once, by what they show, and passed on as bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use model::http::{
    BackendRef, HttpService, Protocol, Route, RouteAction, RouteKind, RouteMatch, RouteTable, SelectedStream,
    Stream,
};
use process::metrics::tcp::FailureFlag;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::deciding::Deciding;
use crate::detect::{self, Hello};
use crate::filters::authorize;
use crate::http::decide::{Call, Connection, Decided, Endpoints, Flag, Outcome, Picked, Record};
use crate::http::head::RequestHead;
use crate::listen::Front;
use crate::relay::{Broken, relay};
use crate::rules::{Rules, ServiceRules};
use crate::telemetry::{Carried, Counted};
use crate::upstream::pool::{Opened, PoolError, open};

/// To connect to an endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Where nothing says how long a connection may be.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);
/// Endpoints that one connection tries.
const ATTEMPTS: usize = 3;

/// Why a connection goes nowhere.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Denied(String),
    #[error("{0}")]
    Limited(String),
    #[error(
        "the service has {0}, which bytes would pass by: if the port carries no HTTP, declare its protocol (appProtocol: tcp)"
    )]
    Undeclared(&'static str),
    #[error(
        "the service that its route leads to has {0}, which bytes would pass by: lead there by a route of requests"
    )]
    PassedBy(&'static str),
    #[error("nothing here has this address any more")]
    NotServed,
    #[error("no route takes it")]
    NoRoute,
    #[error("its route leads nowhere")]
    NoBackend,
    #[error("no endpoint takes it: {1}")]
    NoEndpoint(Flag, String),
}

/// Carries a tunnel's bytes to an endpoint and back, until both sides have ended. `input` are those that were read already.
pub async fn carry(
    front: &Front,
    mut tunnel: hbone::Tunnel,
    mut input: BytesMut,
    mut connection: Connection,
) {
    let mut record = Record::begun(tokio::time::Instant::now());
    let changed = front.deciding.changes();
    let hello = if asks_for_tls(front, &connection) {
        detect::hello(&mut tunnel, &mut input, front.detect_timeout).await
    } else {
        Hello { tls: matches!(&*input, [0x16, 0x03, ..]), server_name: None }
    };
    connection.server_name = hello.server_name.as_deref().map(Arc::from);
    let mut decided = Decided { port: connection.destination.port(), ..Decided::default() };
    let chosen = choose(front, &connection, hello.server_name.as_deref(), hello.tls, &mut decided);
    let endpoint = match chosen {
        Ok(endpoints) => connect(&*endpoints, &connection).await,
        Err(refused) => Err(refused),
    };
    let mesh = front.deciding.rules().mesh.clone();
    let telemetry = front.deciding.telemetry();
    match endpoint {
        Ok((server, picked)) => {
            record.target = Some(picked.target.clone());
            let carried =
                Carried { mesh: &mesh, connection: &connection, decided: &decided, record: &record };
            let mut tunnel = telemetry.connection_opened(&carried, (tunnel, input.len()));
            let circuit = picked.target.circuit.as_ref();
            let longest = circuit.and_then(|circuit| circuit.settings().max_connection_duration);
            let idle = circuit.and_then(|circuit| circuit.settings().idle_timeout).or(front.idle_timeout);
            let limits = (longest.unwrap_or(FOREVER), idle.filter(|idle| !idle.is_zero()));
            let sides = (&mut tunnel, server, input);
            let ended = pass(front, &connection, &decided, sides, limits, changed).await;
            drop(picked);
            (record.flag, record.detail) = ended;
            (record.received, record.sent) = tunnel.bytes();
            // The tunnels are reset by being dropped, unless they ended in order.
            drop(tunnel);
            let carried =
                Carried { mesh: &mesh, connection: &connection, decided: &decided, record: &record };
            telemetry.connection_ended(&carried);
        }
        Err(refused) => {
            tracing::info!(
                client = %connection.client,
                destination = %connection.destination,
                reason = %refused,
                "refused a connection"
            );
            let (failure, flag, detail) = refused.told();
            (record.flag, record.detail) = (flag, detail);
            if let Refused::NoEndpoint(Flag::UpstreamConnectionFailure, why) = refused {
                record.unconnected = Some(why.into());
            }
            let carried =
                Carried { mesh: &mesh, connection: &connection, decided: &decided, record: &record };
            telemetry.connection_failed(&carried, failure);
            tunnel.reset(hbone::ErrorCode::CONNECT_ERROR);
        }
    }
}

/// Passes bytes both ways until both sides have ended, the connection is as long or as idle as it may be, or a policy ends it.
async fn pass(
    front: &Front,
    connection: &Connection,
    decided: &Decided,
    (tunnel, server, input): (&mut Counted<hbone::Tunnel>, Opened, BytesMut),
    (longest, idle): (Duration, Option<Duration>),
    mut changed: tokio::sync::watch::Receiver<()>,
) -> (Flag, &'static str) {
    let denied = async {
        loop {
            // An error is the end of the program.
            if changed.changed().await.is_err() {
                return std::future::pending().await;
            }
            if let Err(refused) = still_permitted(front, connection, decided) {
                return refused;
            }
        }
    };
    let broken = tokio::select! {
        copied = timeout(longest, copy(tunnel, server, input, idle)) => match copied {
            Ok(Ok(())) => return (Flag::None, ""),
            Ok(Err(Broken::Idle(_))) => {
                front.idle_connections.inc();
                tracing::debug!(client = %connection.client, "nothing passed on a connection for too long");
                return (Flag::StreamIdleTimeout, "idle_timeout");
            }
            Ok(Err(Broken::Io(error))) => error,
            Err(_) => {
                tracing::debug!(client = %connection.client, "a connection was as long as it may be");
                return (Flag::Decided("DT"), "max_connection_duration");
            }
        },
        refused = denied => {
            tracing::info!(client = %connection.client, reason = %refused, "cut a connection");
            return (Flag::None, "cut_by_policy");
        }
    };
    tracing::debug!(client = %connection.client, error = %broken, "a connection broke");
    if tunnel.has_failed() {
        (Flag::DownstreamConnectionTermination, "downstream_remote_disconnect")
    } else {
        (Flag::UpstreamConnectionTermination, "upstream_reset")
    }
}

impl Refused {
    /// What metrics, lines and records say of it.
    fn told(&self) -> (FailureFlag, Flag, &'static str) {
        let (deny, connect) = (FailureFlag::Deny, FailureFlag::Connect);
        match self {
            Self::Denied(_) => (deny, Flag::None, "rbac_access_denied"),
            Self::Limited(_) => (deny, Flag::Decided("RL"), "request_rate_limited"),
            Self::Undeclared(_) | Self::PassedBy(_) => (deny, Flag::None, "undeclared_protocol"),
            Self::NotServed => (connect, Flag::NoRoute, "not_bound"),
            Self::NoRoute => (connect, Flag::NoRoute, "route_not_found"),
            Self::NoBackend => (connect, Flag::Decided("NC"), "backend_not_found"),
            Self::NoEndpoint(Flag::UpstreamConnectionFailure, _) => {
                (connect, Flag::UpstreamConnectionFailure, "upstream_connection_failure")
            }
            Self::NoEndpoint(flag, _) => (connect, *flag, "no_healthy_upstream"),
        }
    }
}

/// Whether a route of the connection's port asks for what a TLS handshake says.
fn asks_for_tls(front: &Front, connection: &Connection) -> bool {
    let (rules, to) = (front.deciding.rules(), connection.destination);
    let service = rules.service_at(front.deciding.network(), to);
    let port = service.and_then(|service| service.port(to.port()));
    port.is_some_and(|port| port.port.streams.asks_for_tls())
}

/// Whether a connection that was let in would be now.
fn still_permitted(front: &Front, connection: &Connection, decided: &Decided) -> Result<(), Refused> {
    let (deciding, rules) = (&front.deciding, front.deciding.rules());
    match rules.service_at(deciding.network(), connection.destination) {
        Some(service) => {
            declared(&service.http, connection.destination.port())?;
            permit(&service.policies, connection).1?;
            let Some(led) = &decided.led_to else { return Ok(()) };
            permit_beyond(&rules, service, led, connection).map(|_| ())
        }
        None => {
            let workload = deciding.workload(&rules, connection.destination).ok_or(Refused::NotServed)?;
            permit(&authorize::of_workload(&rules.mesh, &workload), connection).1
        }
    }
}

/// The endpoints of the connection's route, if policy lets it in.
fn choose(
    front: &Front,
    connection: &Connection,
    sni: Option<&str>,
    tls: bool,
    decided: &mut Decided,
) -> Result<Arc<dyn Endpoints>, Refused> {
    let (deciding, rules) = (&front.deciding, front.deciding.rules());
    let to = connection.destination;
    let Some(service) = rules.service_at(deciding.network(), to) else {
        let workload = deciding.workload(&rules, to).ok_or(Refused::NotServed)?;
        let (verdict, permitted) = permit(&authorize::of_workload(&rules.mesh, &workload), connection);
        decided.verdict = verdict;
        permitted?;
        return Ok(deciding.clusters().original(&rules.mesh, connection));
    };
    decided.service = Some(service.http.clone());
    declared(&service.http, to.port())?;
    let (verdict, permitted) = permit(&service.policies, connection);
    decided.verdict = verdict;
    permitted?;
    let limits = &deciding.guards().limits;
    limits.admit(&rules.mesh, &service.http, connection).map_err(Refused::Limited)?;
    let port = service.port(to.port()).ok_or(Refused::NotServed)?;
    let client = deciding.client(&rules, connection);
    let source = crate::deciding::source(connection, client.as_deref());
    let stream = Stream { sni, tls, destination: to.ip() };
    let itself = BackendRef::Service { service: service.http.service.clone(), port: to.port(), subset: None };
    let backend = match port.port.streams.select(&stream, &source) {
        SelectedStream::Itself => &itself,
        SelectedStream::Route { route, .. } => {
            decided.stream = Some(route.clone());
            &route.to.choose(crate::deciding::random()).ok_or(Refused::NoBackend)?.to
        }
        SelectedStream::Nothing => return Err(Refused::NoRoute),
    };
    decided.led_to = Some(backend.clone());
    if let Some((other, there)) = permit_beyond(&rules, service, backend, connection)? {
        limits.admit(&rules.mesh, &other.http, &there).map_err(Refused::Limited)?;
    }
    endpoints(front, &rules, backend, connection)
}

/// A route of `called` gets nobody past what guards another service that it leads to: whether a connection may go there. What
/// is returned is the other, with the limits that the connection is still to be taken from, and the connection as that sees it.
fn permit_beyond(
    rules: &Rules,
    called: &ServiceRules,
    to: &BackendRef,
    connection: &Connection,
) -> Result<Option<(Arc<ServiceRules>, Connection)>, Refused> {
    let Some((other, there)) = Deciding::beyond(rules, called, to, connection) else { return Ok(None) };
    // Of tokens and limits that both have, bytes were not asked at the one that was called either.
    if let Some(whole) = rules.service(&other.http.service)
        && !matches!(whole.protocol(there.destination.port()), Some(Protocol::Tcp | Protocol::Tls))
    {
        without_requests(&whole.http)?;
    }
    permit(&other.policies, &there).1?;
    Ok(Some((other, there)))
}

fn endpoints(
    front: &Front,
    rules: &Rules,
    backend: &BackendRef,
    connection: &Connection,
) -> Result<Arc<dyn Endpoints>, Refused> {
    front.deciding.endpoints(rules, backend, connection).map_err(|_| Refused::NoBackend)
}

/// Bytes reach a port of which nothing is said only where there is nothing that looks at requests: what is not read as HTTP
/// here may be HTTP to the server all the same, as that of a client that waits until nobody looks any more.
fn declared(service: &HttpService, port: u16) -> Result<(), Refused> {
    let Some(port) = service.port(port).filter(|port| port.protocol == Protocol::Detect) else {
        return Ok(());
    };
    let passed_by = [
        (leads_to_itself(&port.routes), "routes of requests"),
        (service.authentication.is_empty(), "request authentication"),
        (service.rate_limits.is_empty(), "rate limits"),
    ];
    let passed_by = passed_by.iter().find(|(has_none, _)| !has_none);
    passed_by.map_or(Ok(()), |(_, what)| Err(Refused::Undeclared(what)))
}

/// Whether the routes of a port say no more than that requests go to the service, as where there are none.
fn leads_to_itself(routes: &RouteTable) -> bool {
    let is_plain = |(when, route): &(RouteMatch, Arc<Route>)| {
        *when == RouteMatch::default()
            && route.id.kind == RouteKind::Default
            && matches!(route.action, RouteAction::Forward(_))
    };
    routes.entries().iter().all(is_plain)
}

/// The same for a service of requests that a route of connections leads to.
fn without_requests(service: &HttpService) -> Result<(), Refused> {
    match (service.authentication.is_empty(), service.rate_limits.is_empty()) {
        (false, _) => Err(Refused::PassedBy("request authentication")),
        (true, false) => Err(Refused::PassedBy("rate limits")),
        (true, true) => Ok(()),
    }
}

/// Policies over a connection that shows no request: what asks for one denies. The first part is what they said.
fn permit(
    policies: &authorize::Policies,
    connection: &Connection,
) -> (Option<Arc<model::RequestDecision>>, Result<(), Refused>) {
    if policies.is_empty() {
        return (None, Ok(()));
    }
    let decision = policies.decide(&authorize::subject(connection), None);
    // Nobody can be asked about a connection.
    let permitted = match (&decision.outcome, decision.ask.first()) {
        (Ok(_), None) => Ok(()),
        (Ok(_), Some((policy, provider))) => {
            Err(Refused::Denied(format!("policy {policy} asks {provider}, which is told of requests only")))
        }
        (Err(deny), _) => Err(Refused::Denied(deny.to_string())),
    };
    (Some(Arc::new(decision)), permitted)
}

async fn connect(endpoints: &dyn Endpoints, connection: &Connection) -> Result<(Opened, Picked), Refused> {
    let request = RequestHead::default();
    let (mut tried, mut last) = (Vec::new(), None);
    for _ in 0..ATTEMPTS {
        let call = Call { request: &request, connection, tried: &tried, elsewhere: false };
        let picked = match endpoints.pick(&call) {
            Ok(picked) => picked,
            Err(none) => {
                let never = (none.flag, none.detail.to_owned());
                let (flag, why) = last.map_or(never, |why| (Flag::UpstreamConnectionFailure, why));
                return Err(Refused::NoEndpoint(flag, why));
            }
        };
        match open(&picked.target, CONNECT_TIMEOUT).await {
            Ok(opened) => {
                picked.report(Outcome::Status(200));
                return Ok((opened, picked));
            }
            Err(error) => {
                match error {
                    PoolError::Timeout(_) => picked.report(Outcome::TimedOut),
                    PoolError::Connect(_) => picked.report(Outcome::Failed),
                    // No fault of the endpoint's.
                    _ => {}
                }
                last = Some(error.to_string());
            }
        }
        tried.push(picked.target.clone());
    }
    Err(Refused::NoEndpoint(Flag::UpstreamConnectionFailure, last.unwrap_or_default()))
}

/// Copies both ways until both have ended.
async fn copy(
    tunnel: &mut Counted<hbone::Tunnel>,
    mut server: Opened,
    input: BytesMut,
    idle: Option<Duration>,
) -> Result<(), Broken> {
    let begin = async {
        server.io.write_all(&input).await?;
        server.io.flush().await
    };
    match idle {
        Some(idle) => timeout(idle, begin).await.map_err(|_| Broken::Idle(idle))??,
        None => begin.await?,
    }
    drop(input);
    relay(tunnel, &mut server.io, idle).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use model::http::{HttpPort, RouteId, WaypointKey};
    use model::{Change, Policy, PolicyKey, ServiceKey};

    use super::*;

    fn service(protocol: Protocol) -> HttpService {
        let port = HttpPort { number: 80, protocol, routes: Arc::default(), streams: Arc::default() };
        HttpService {
            service: ServiceKey { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() },
            waypoint: WaypointKey { namespace: "shop".into(), name: "waypoint".into() },
            ports: [port].into(),
            policies: Box::default(),
            selected: Box::default(),
            led_to: Box::default(),
            authentication: Box::default(),
            rate_limits: Box::default(),
            telemetry: Arc::default(),
        }
    }

    /// A service of the port 8080, and what a connection to another may do by a route to it.
    fn led(protocol: Protocol, change: impl Fn(&mut HttpService), policies: Vec<Policy>) -> bool {
        let named = |name: &str| ServiceKey { namespace: "shop".into(), hostname: name.into() };
        let mut called = HttpService { service: named("called"), ..service(Protocol::Tcp) };
        let mut other = HttpService { service: named("other"), ..service(protocol) };
        other.ports[0].number = 8080;
        change(&mut called);
        change(&mut other);
        let changes = [called, other].map(|http| Change::SetHttpService(Arc::new(http)));
        let policies = policies.into_iter().map(|policy| Change::SetHttpPolicy(Arc::new(policy)));
        let mesh = Arc::new(model::Mesh::default().apply(changes.into_iter().chain(policies)));
        let own = service(protocol).waypoint;
        let rules = Rules::new(mesh, &own, &Rules::default());
        let called = rules.service(&named("called")).unwrap();
        let connection = Connection {
            client: "10.0.0.5:40000".parse().unwrap(),
            destination: "10.1.0.1:80".parse().unwrap(),
            identity: None,
            server_name: None,
            secure: false,
            said: None,
        };
        assert!(permit(&called.policies, &connection).1.is_ok());
        let to = BackendRef::Service { service: named("other"), port: 8080, subset: None };
        permit_beyond(&rules, called, &to, &connection).is_ok()
    }

    #[test]
    fn bytes_pass_nothing_by_that_both_have_where_a_route_leads_to_another_service() {
        let key = || PolicyKey { namespace: "shop".into(), name: "both".into() };
        let keys = || Box::from([key()]);
        for (protocol, may) in [(Protocol::Http, false), (Protocol::Tcp, true)] {
            assert!(led(protocol, |_| {}, Vec::new()));
            assert_eq!(led(protocol, |http| http.authentication = keys(), Vec::new()), may, "{protocol:?}");
            assert_eq!(led(protocol, |http| http.rate_limits = keys(), Vec::new()), may, "{protocol:?}");
        }
        let deny = |port| {
            let to = model::Match { destination_ports: [port].into(), ..model::Match::default() };
            let clause = model::Clause { matches: [to].into() };
            let rules = [model::Rule { clauses: [clause].into() }].into();
            let scope = model::Scope::WorkloadSelector;
            Policy { key: key(), scope, action: model::Action::Deny, rules, dry_run: false }
        };
        for (port, may) in [(8080, false), (81, true)] {
            let is_let = led(Protocol::Tcp, |http| http.policies = keys(), vec![deny(port)]);
            assert_eq!(is_let, may, "{port}");
        }
    }

    #[test]
    fn bytes_pass_nothing_by_that_looks_at_requests() {
        for protocol in [Protocol::Detect, Protocol::Tcp, Protocol::Tls] {
            let is_told = protocol != Protocol::Detect;
            assert!(declared(&service(protocol), 80).is_ok());
            let key = || Box::from([PolicyKey { namespace: "shop".into(), name: "x".into() }]);
            let with_tokens = HttpService { authentication: key(), ..service(protocol) };
            assert_eq!(declared(&with_tokens, 80).is_ok(), is_told, "{protocol:?}");
            let with_limits = HttpService { rate_limits: key(), ..service(protocol) };
            match declared(&with_limits, 80) {
                Ok(()) => assert!(is_told, "{protocol:?}"),
                Err(refused) => {
                    assert!(!is_told, "{protocol:?}");
                    assert!(refused.to_string().contains("appProtocol: tcp"), "{refused}");
                }
            }
            for (kind, may) in [(RouteKind::HttpRoute, is_told), (RouteKind::Default, true)] {
                let mut with_routes = service(protocol);
                let id = RouteId { kind, ..RouteId::default() };
                let route = Arc::new(Route { id, ..Route::new(RouteAction::default()) });
                let routes = RouteTable::new(vec![(RouteMatch::default(), route)]);
                with_routes.ports[0].routes = Arc::new(routes);
                assert_eq!(declared(&with_routes, 80).is_ok(), may, "{protocol:?}");
            }
        }
    }
}
