//! Connections that carry no HTTP, or of which nobody looks for it: decided once, by what they show, and passed on as bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use model::http::{BackendRef, HttpService, Protocol, SelectedStream, Stream};
use process::metrics::tcp::FailureFlag;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::detect::{self, Hello};
use crate::filters::authorize;
use crate::http::decide::{Call, Connection, Endpoints, Outcome, Picked};
use crate::http::head::RequestHead;
use crate::listen::Front;
use crate::rules::Rules;
use crate::telemetry::Counted;
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
    #[error(
        "the service has {0}, which bytes would pass by: if the port carries no HTTP, declare its protocol (appProtocol: tcp)"
    )]
    Undeclared(&'static str),
    #[error("nothing here has this address any more")]
    NotServed,
    #[error("no route takes it")]
    NoRoute,
    #[error("its route leads nowhere")]
    NoBackend,
    #[error("no endpoint takes it: {0}")]
    NoEndpoint(String),
}

/// Carries a tunnel's bytes to an endpoint and back, until both sides have ended. `input` are those that were read already.
pub async fn carry(
    front: &Front,
    mut tunnel: hbone::Tunnel,
    mut input: BytesMut,
    mut connection: Connection,
) {
    let mut changed = front.deciding.changes();
    let hello = if asks_for_tls(front, &connection) {
        detect::hello(&mut tunnel, &mut input, front.detect_timeout).await
    } else {
        Hello { tls: matches!(&*input, [0x16, 0x03, ..]), server_name: None }
    };
    connection.server_name = hello.server_name.as_deref().map(Arc::from);
    let endpoint = match choose(front, &connection, hello.server_name.as_deref(), hello.tls) {
        Ok(endpoints) => connect(&*endpoints, &connection).await,
        Err(refused) => Err(refused),
    };
    match endpoint {
        Ok((server, picked)) => {
            let circuit = picked.target.circuit.as_ref();
            let longest = circuit.and_then(|circuit| circuit.settings().max_connection_duration);
            let mesh = front.deciding.rules().mesh.clone();
            let about = picked.target.about.as_deref();
            let telemetry = front.deciding.telemetry();
            let tunnel = telemetry.connection_opened(&mesh, &connection, about, (tunnel, input.len()));
            let copied = timeout(longest.unwrap_or(FOREVER), copy(tunnel, server, input));
            let denied = async {
                loop {
                    // An error is the end of the program.
                    if changed.changed().await.is_err() {
                        return std::future::pending().await;
                    }
                    if let Err(refused) = still_permitted(front, &connection) {
                        return refused;
                    }
                }
            };
            tokio::select! {
                copied = copied => match copied {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::debug!(client = %connection.client, %error, "a connection broke");
                    }
                    Err(_) => {
                        tracing::debug!(client = %connection.client, "a connection was as long as it may be");
                    }
                },
                // Its tunnels are reset by being dropped.
                refused = denied => {
                    tracing::info!(client = %connection.client, reason = %refused, "cut a connection");
                }
            }
            drop(picked);
        }
        Err(refused) => {
            tracing::info!(
                client = %connection.client,
                destination = %connection.destination,
                reason = %refused,
                "refused a connection"
            );
            failed(front, &connection, &refused);
            tunnel.reset(hbone::ErrorCode::CONNECT_ERROR);
        }
    }
}

/// Counts a connection that goes nowhere.
fn failed(front: &Front, connection: &Connection, refused: &Refused) {
    let flag = match refused {
        Refused::Denied(_) | Refused::Undeclared(_) => FailureFlag::Deny,
        Refused::NotServed | Refused::NoRoute | Refused::NoBackend | Refused::NoEndpoint(_) => {
            FailureFlag::Connect
        }
    };
    let (deciding, rules) = (&front.deciding, front.deciding.rules());
    let service = rules.service_at(deciding.network(), connection.destination);
    let service = service.map(|service| &service.http.service);
    deciding.telemetry().connection_failed(&rules.mesh, connection, service, flag);
}

/// Whether a route of the connection's port asks for what a TLS handshake says.
fn asks_for_tls(front: &Front, connection: &Connection) -> bool {
    let (rules, to) = (front.deciding.rules(), connection.destination);
    let service = rules.service_at(front.deciding.network(), to);
    let port = service.and_then(|service| service.port(to.port()));
    port.is_some_and(|port| port.port.streams.asks_for_tls())
}

/// Whether a connection that was let in would be now.
fn still_permitted(front: &Front, connection: &Connection) -> Result<(), Refused> {
    let (deciding, rules) = (&front.deciding, front.deciding.rules());
    match rules.service_at(deciding.network(), connection.destination) {
        Some(service) => {
            declared(&service.http, connection.destination.port())?;
            permit(&service.policies, connection)
        }
        None => {
            let workload = deciding.workload(&rules, connection.destination).ok_or(Refused::NotServed)?;
            permit(&authorize::of_workload(&rules.mesh, &workload), connection)
        }
    }
}

/// The endpoints of the connection's route, if policy lets it in.
fn choose(
    front: &Front,
    connection: &Connection,
    sni: Option<&str>,
    tls: bool,
) -> Result<Arc<dyn Endpoints>, Refused> {
    let (deciding, rules) = (&front.deciding, front.deciding.rules());
    let to = connection.destination;
    let Some(service) = rules.service_at(deciding.network(), to) else {
        let workload = deciding.workload(&rules, to).ok_or(Refused::NotServed)?;
        permit(&authorize::of_workload(&rules.mesh, &workload), connection)?;
        return Ok(deciding.clusters().original(&rules.mesh, connection));
    };
    declared(&service.http, to.port())?;
    permit(&service.policies, connection)?;
    let limits = &deciding.guards().limits;
    limits.admit(&rules.mesh, &service.http, connection).map_err(Refused::Denied)?;
    let port = service.port(to.port()).ok_or(Refused::NotServed)?;
    let client = deciding.client(&rules, connection);
    let source = crate::deciding::source(connection, client.as_deref());
    let stream = Stream { sni, tls, destination: to.ip() };
    let itself = BackendRef::Service { service: service.http.service.clone(), port: to.port(), subset: None };
    let backend = match port.port.streams.select(&stream, &source) {
        SelectedStream::Itself => &itself,
        SelectedStream::Route { route, .. } => {
            &route.to.choose(crate::deciding::random()).ok_or(Refused::NoBackend)?.to
        }
        SelectedStream::Nothing => return Err(Refused::NoRoute),
    };
    endpoints(front, &rules, backend, connection)
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
        (port.routes.entries().is_empty(), "routes of requests"),
        (service.authentication.is_empty(), "request authentication"),
        (service.rate_limits.is_empty(), "rate limits"),
    ];
    let passed_by = passed_by.iter().find(|(has_none, _)| !has_none);
    passed_by.map_or(Ok(()), |(_, what)| Err(Refused::Undeclared(what)))
}

/// Policies over a connection that shows no request: what asks for one denies.
fn permit(policies: &authorize::Policies, connection: &Connection) -> Result<(), Refused> {
    if policies.is_empty() {
        return Ok(());
    }
    let decision = policies.decide(&authorize::subject(connection), None);
    // Nobody can be asked about a connection.
    match (&decision.outcome, decision.ask.first()) {
        (Ok(_), None) => Ok(()),
        (Ok(_), Some((policy, provider))) => {
            Err(Refused::Denied(format!("policy {policy} asks {provider}, which is told of requests only")))
        }
        (Err(deny), _) => Err(Refused::Denied(deny.to_string())),
    }
}

async fn connect(endpoints: &dyn Endpoints, connection: &Connection) -> Result<(Opened, Picked), Refused> {
    let request = RequestHead::default();
    let (mut tried, mut last) = (Vec::new(), None);
    for _ in 0..ATTEMPTS {
        let call = Call { request: &request, connection, tried: &tried, elsewhere: false };
        let picked = match endpoints.pick(&call) {
            Ok(picked) => picked,
            Err(none) => {
                return Err(Refused::NoEndpoint(last.unwrap_or_else(|| none.detail.to_owned())));
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
    Err(Refused::NoEndpoint(last.unwrap_or_default()))
}

/// Copies both ways until both have ended.
async fn copy(
    mut tunnel: Counted<hbone::Tunnel>,
    mut server: Opened,
    input: BytesMut,
) -> std::io::Result<()> {
    server.io.write_all(&input).await?;
    drop(input);
    let copied = tokio::io::copy_bidirectional(&mut tunnel, &mut server.io);
    copied.await.map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use model::http::{HttpPort, Route, RouteAction, RouteMatch, RouteTable, WaypointKey};
    use model::{PolicyKey, ServiceKey};

    use super::*;

    fn service(protocol: Protocol) -> HttpService {
        let port = HttpPort { number: 80, protocol, routes: Arc::default(), streams: Arc::default() };
        HttpService {
            service: ServiceKey { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() },
            waypoint: WaypointKey { namespace: "shop".into(), name: "waypoint".into() },
            ports: [port].into(),
            policies: Box::default(),
            selected: Box::default(),
            authentication: Box::default(),
            rate_limits: Box::default(),
            telemetry: Arc::default(),
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
            let mut with_routes = service(protocol);
            let route = Arc::new(Route::new(RouteAction::default()));
            let routes = RouteTable::new(vec![(RouteMatch::default(), route)]);
            with_routes.ports[0].routes = Arc::new(routes);
            assert_eq!(declared(&with_routes, 80).is_ok(), is_told, "{protocol:?}");
        }
    }
}
