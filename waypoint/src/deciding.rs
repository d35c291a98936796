//! What is decided for a request: the fixed order of the filters, over one snapshot of the mesh.

mod admission;

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use model::http::{BackendRef, RouteAction, SourceFacts, WaypointKey};
use model::{Mesh, NetworkAddress, SpiffeId, Str, Workload};
use tokio::sync::watch;

use crate::deciding::admission::{Admission, Asked, Beyond, with_edits};
use crate::filters::cors::Crossing;
use crate::filters::jwt::{Outcome, Patience, put_back};
use crate::filters::rate_limit::Checked;
use crate::filters::route::RouteRules;
use crate::filters::{Refusal, answer, authorize, cors, fault, path, redirect, respond, rewrite, view};
use crate::guards::Guards;
use crate::http::decide::{
    Connection, Decide, Decided, Decision, Endpoints, Facts, Flag, Forwarding, Mirror, More, Record,
};
use crate::http::head::{Fields, RequestHead};
use crate::rules::{Rules, ServiceRules};
use crate::telemetry::Telemetry;
use crate::upstream::{Backend, Clusters, NoCluster};

/// Decides over requests. Clones share the snapshot.
#[derive(Clone)]
pub struct Deciding(Arc<Inner>);

struct Inner {
    rules: ArcSwap<Rules>,
    /// Told of every snapshot.
    changed: watch::Sender<()>,
    own: WaypointKey,
    network: Str,
    clusters: Clusters,
    telemetry: Arc<Telemetry>,
    guards: Arc<Guards>,
    /// How requests to workloads are sent on.
    plain: Arc<Forwarding>,
}

impl Deciding {
    /// For the waypoint `own`, on `network`. Knows nothing yet.
    #[must_use]
    pub fn new(
        own: WaypointKey,
        network: Str,
        clusters: Clusters,
        telemetry: Arc<Telemetry>,
        guards: Arc<Guards>,
    ) -> Self {
        let (rules, plain) = (ArcSwap::default(), Arc::new(Forwarding::default()));
        let changed = watch::Sender::new(());
        Self(Arc::new(Inner { rules, changed, own, network, clusters, telemetry, guards, plain }))
    }

    /// Puts a snapshot in force, whole. There is one caller, the source of configuration.
    pub fn update(&self, mesh: Arc<Mesh>) {
        let next = Rules::new(mesh, &self.0.own, &self.0.rules.load());
        self.0.clusters.prepare(&next.mesh);
        self.0.guards.follow(&next.mesh);
        self.0.telemetry.in_force(next.told());
        self.0.rules.store(Arc::new(next));
        self.0.changed.send_replace(());
    }

    /// Says when another snapshot is in force.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// The snapshot.
    #[must_use]
    pub fn rules(&self) -> Guard<Arc<Rules>> {
        self.0.rules.load()
    }

    /// The waypoint that this is.
    #[must_use]
    pub fn own(&self) -> &WaypointKey {
        &self.0.own
    }

    /// What is told of requests and connections.
    #[must_use]
    pub fn telemetry(&self) -> &Telemetry {
        &self.0.telemetry
    }

    /// The network that this waypoint is on.
    #[must_use]
    pub fn network(&self) -> &Str {
        &self.0.network
    }

    /// What decides beside the policies.
    #[must_use]
    pub fn guards(&self) -> &Guards {
        &self.0.guards
    }

    /// The back ends' endpoints.
    #[must_use]
    pub fn clusters(&self) -> &Clusters {
        &self.0.clusters
    }

    /// The identity that the waypoint has: that of the service account with the Gateway's name. `None` where its names make
    /// none.
    #[must_use]
    pub fn identity(&self, mesh: &Mesh) -> Option<SpiffeId> {
        crate::start::identity(mesh, &self.0.own)
    }

    /// What is done for where a connection goes.
    fn find(&self, rules: &Rules, to: SocketAddr) -> Option<Arc<ServiceRules>> {
        rules.service_at(&self.0.network, to).cloned()
    }

    fn admitted(
        &self,
        rules: &Arc<Rules>,
        service: &Arc<ServiceRules>,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Result<Decision, Refusal> {
        path::apply(request, rules.mesh.settings().path_normalization)?;
        let admission = Admission::new(self, rules, service);
        Ok(admission.run(request, connection, decided, Patience::Left))
    }

    /// A request to a workload's own address: its policies hold, and it goes there.
    fn to_workload(
        &self,
        rules: &Rules,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Result<Decision, Refusal> {
        let not_bound = || answer(404, "not_bound", Flag::NoRoute);
        let workload = self.workload(rules, connection.destination).ok_or_else(not_bound)?;
        path::apply(request, rules.mesh.settings().path_normalization)?;
        authorize::apply(&authorize::of_workload(&rules.mesh, &workload), request, connection, decided)?;
        // Whoever a CUSTOM policy names is asked for services only.
        if decided.verdict.as_ref().is_some_and(|verdict| !verdict.ask.is_empty()) {
            return Err(authorize::denied());
        }
        Ok(Decision::Forward {
            how: self.0.plain.clone(),
            endpoints: self.0.clusters.original(&rules.mesh, connection),
            more: None,
        })
    }

    /// The workload that a connection comes from.
    pub(crate) fn client(&self, rules: &Rules, connection: &Connection) -> Option<Arc<Workload>> {
        let address = NetworkAddress::new(self.0.network.clone(), connection.client.ip());
        rules.mesh.workload_at(&address).cloned()
    }

    /// The workload of ours that has an address. None where a service that it is behind has policies, tokens or limits of its
    /// own: those are known for the service's address, and must not be passed by at another.
    pub(crate) fn workload(&self, rules: &Rules, to: SocketAddr) -> Option<Arc<Workload>> {
        let address = NetworkAddress::new(self.0.network.clone(), to.ip());
        let workload = rules.mesh.workload_at(&address)?;
        let guarded = || workload.services.iter().any(|member| rules.is_guarded(&member.service));
        (rules.is_own(&workload.waypoint.as_ref()?.target) && !guarded()).then(|| workload.clone())
    }

    /// From the route on: the request may go to the service.
    fn routed(
        &self,
        rules: &Arc<Rules>,
        service: &Arc<ServiceRules>,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Result<Decision, Refusal> {
        let no_route = || answer(404, "route_not_found", Flag::NoRoute);
        let port = service.port(decided.port).ok_or_else(no_route)?;
        let client = self.client(rules, connection);
        let source = source(connection, client.as_deref());
        let seen = view(request, connection, decided.claims.as_deref());
        let found = port.find(&seen, &source).ok_or_else(no_route)?;
        let (route, matched) = (found.rules, found.matched);
        if route.route.as_ref().is_some_and(|route| route.is_for_the_rest()) {
            return Err(no_route());
        }
        decided.route.clone_from(&route.route);
        decided.matched = found.position;
        let Some(of) = &route.route else {
            return self.forwarded((rules, service), route, None, request, connection, decided);
        };
        let mut edits = Vec::new();
        if let Some(cors) = &of.cors {
            match cors::apply(cors, request) {
                Crossing::Pass => {}
                Crossing::Allow(allowed) => edits = allowed,
                Crossing::Answer(answer) => return Err(answer),
            }
        }
        let delay = fault::delay(&of.fault, random());
        decided.delayed = delay.is_some();
        let own = fault::abort(&of.fault, random())
            .or_else(|| own_answer(route, matched, (request, connection), decided));
        let decision = match own {
            Some(answer) => Ok(Decision::Respond(answer)),
            None => self.forwarded((rules, service), route, matched, request, connection, decided),
        };
        // The page that asks may read the answer, whoever it is of.
        let decision = with_edits(decision.unwrap_or_else(Decision::Respond), edits);
        let Some(delay) = delay else { return Ok(decision) };
        Ok(Decision::Later(Box::pin(async move {
            tokio::time::sleep(delay).await;
            already(decision)
        })))
    }

    /// Chooses the back end, makes the request what it gets, and finds its endpoints.
    fn forwarded(
        &self,
        (rules, service): (&Arc<Rules>, &Arc<ServiceRules>),
        route: &RouteRules,
        matched: Option<&model::http::RouteMatch>,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Result<Decision, Refusal> {
        let mut more = More::default();
        let no_backend = || answer(500, "no_backend", Flag::NoRoute);
        let chosen = choose(route).ok_or_else(no_backend)?;
        let backend = route.backends.get(chosen).ok_or_else(no_backend)?;
        decided.backend = Some(chosen);
        let endpoints = self.endpoints(rules, &backend.to, connection)?;
        let asked = Asked::before_route(request, connection, decided);
        let of = route.route.as_ref();
        let edits = !(route.request_edits.0.is_empty() && backend.request_edits.0.is_empty());
        // Whoever is asked besides the policies may have changed it, too.
        let changes = edits
            || of.is_some_and(|of| of.path.is_some() || of.host.is_some())
            || asked.is_some()
            || decided.limited;
        let before = (edits && !service.http.authentication.is_empty()).then(|| request.fields.clone());
        let way = Way { called: service, to: &backend.to, changes, before: before.as_ref() };
        route.request_edits.apply_to_request(request, connection, decided);
        backend.request_edits.apply_to_request(request, connection, decided);
        if let Some(of) = of {
            if let Some(to) = of.path.as_ref().filter(|_| !request.is_server_wide()) {
                rewrite::path(to, matched, request, decided)?;
                // What comes after compares it, and the back end reads it, as any other.
                path::apply(request, rules.mesh.settings().path_normalization)?;
            }
            if let Some(to) = &of.host {
                let name = match &backend.to {
                    BackendRef::Service { service, .. } => Some(&*service.hostname),
                    BackendRef::Original | BackendRef::Unresolved { .. } => None,
                };
                rewrite::host(to, name, request, decided);
            }
            // What guards the back end may change what it gets, which is not for those who get copies.
            let apart = !of.mirrors.is_empty() && Other::of(rules, way, connection).is_some();
            for mirror in of.mirrors.iter().filter(|mirror| mirror.share.takes(random())) {
                let way = Way { to: &mirror.to, ..way };
                let Some(own) = self.copied(rules, way, asked.as_ref(), request, connection, decided) else {
                    self.0.guards.copies_refused.inc();
                    continue;
                };
                // What becomes of copies touches nobody, also where there is nobody to copy to.
                if let Ok(endpoints) = self.endpoints(rules, &mirror.to, connection) {
                    let own = own.or_else(|| apart.then(|| Box::new(request.clone())));
                    more.mirrors.push(Mirror { endpoints, request: own });
                }
            }
        }
        let has_more = !more.mirrors.is_empty() || !more.response_edits.0.is_empty();
        let decision = Decision::Forward {
            how: backend.forwarding.clone(),
            endpoints,
            more: has_more.then(|| Box::new(more)),
        };
        Ok(self.guarded(rules, way, (decision, asked), request, connection, decided))
    }

    /// Asks what guards the back end, where that is another service than the one that was called: a route gets nobody past
    /// it. The request is as the other gets it.
    fn guarded(
        &self,
        rules: &Arc<Rules>,
        way: Way<'_>,
        (decision, asked): (Decision, Option<Asked>),
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Decision {
        let Some(other) = Other::of(rules, way, connection) else { return decision };
        way.put_back(rules, request);
        let to = Beyond { decision, to: other.address, believes: other.believes, asked };
        let admission = Admission::new(self, rules, &other.rules).beyond(to);
        admission.run(request, connection, decided, Patience::Left)
    }

    /// What a connection that shows no request has to be asked, where a route of `called` leads it to another service; and
    /// the connection as that sees it.
    pub(crate) fn beyond(
        rules: &Rules,
        called: &ServiceRules,
        to: &BackendRef,
        connection: &Connection,
    ) -> Option<(Arc<ServiceRules>, Connection)> {
        let other = Other::of(rules, Way { called, to, changes: true, before: None }, connection)?;
        Some((other.rules, Connection { destination: other.address, ..connection.clone() }))
    }

    /// What a copy is of, for a service that its own guards let it in at: its token, policies and limits, as of any request
    /// that is led there. `None` where it may not go, or where somebody would have to be waited for first: an authorizer, a
    /// rate-limit service, or an issuer. What it is of is the request itself, unless tokens of the
    /// service make it another.
    fn copied(
        &self,
        rules: &Arc<Rules>,
        way: Way<'_>,
        asked: Option<&Asked>,
        request: &RequestHead,
        connection: &Connection,
        decided: &Decided,
    ) -> Option<Option<Box<RequestHead>>> {
        let Some(other) = Other::of(rules, way, connection) else { return Some(None) };
        let (guards, http) = (&self.0.guards, &other.rules.http);
        let mut claims = decided.claims.clone().filter(|_| other.believes);
        let mut own = way.before.map(|_| Box::new(request.clone()));
        own.iter_mut().for_each(|copy| way.put_back(rules, copy));
        if !http.authentication.is_empty() {
            let mut copy = own.unwrap_or_else(|| Box::new(request.clone()));
            match guards.authenticator.authenticate(&rules.mesh, http, &mut copy, Patience::Spent) {
                Outcome::Passed(None) => {}
                Outcome::Passed(found) => claims = found,
                Outcome::Refused(..) | Outcome::Wait(_) => return None,
            }
            own = Some(copy);
        }
        let shown = own.as_deref().unwrap_or(request);
        let there = Connection { destination: other.address, ..connection.clone() };
        let mut seen = Decided { claims, ..Decided::default() };
        authorize::apply(&other.rules.policies, shown, &there, &mut seen).ok()?;
        let ask = seen.verdict.iter().flat_map(|verdict| &verdict.ask);
        let agreed = |provider: &Str| asked.is_some_and(|a| a.agreed(rules, provider, shown, &there));
        if !ask.map(|(_, provider)| provider).all(agreed) {
            return None;
        }
        let claims = seen.claims.as_deref();
        match guards.limits.check(&rules.mesh, &self.0.clusters, http, shown, connection, claims) {
            Checked::Passed(_) => Some(own),
            Checked::Refused(..) | Checked::Ask(_) => None,
        }
    }

    /// The endpoints of a back end.
    pub(crate) fn endpoints(
        &self,
        rules: &Rules,
        to: &BackendRef,
        connection: &Connection,
    ) -> Result<Arc<dyn Endpoints>, Refusal> {
        let missing = |status, reason: &dyn std::fmt::Display| {
            tracing::debug!(%reason, "a back end is not there");
            answer(status, "backend_not_found", Flag::Decided("NC"))
        };
        match to {
            BackendRef::Service { service, port, subset } => {
                let backend = Backend { service: service.clone(), port: *port, subset: subset.clone() };
                // A subset that no rule has is what only a VirtualService can name: 503, as Istio answers.
                let status =
                    |error: &NoCluster| if matches!(error, NoCluster::Subset(..)) { 503 } else { 500 };
                let endpoints = self.0.clusters.endpoints(&rules.mesh, &backend);
                endpoints.map_err(|error| missing(status(&error), &error))
            }
            BackendRef::Original => Ok(self.0.clusters.original(&rules.mesh, connection)),
            BackendRef::Unresolved { reason } => Err(missing(500, reason)),
        }
    }
}

/// A back end of a route, and how the request came to it.
#[derive(Clone, Copy)]
struct Way<'a> {
    /// The service that was called, whose route it is.
    called: &'a ServiceRules,
    to: &'a BackendRef,
    /// Whether the route may have changed the request since the called service's policies were asked.
    changes: bool,
    /// The fields as they were before the route changed them, where tokens may have a say in them.
    before: Option<&'a Fields>,
}

impl Way<'_> {
    /// Puts back what tokens said that the service and the called one both look at: they are not looked at again there, and
    /// the route has no say in it.
    fn put_back(self, rules: &Rules, request: &mut RequestHead) {
        let (Some(before), BackendRef::Service { service, .. }) = (self.before, self.to) else { return };
        let Some(other) = rules.service(service) else { return };
        let shared = self.called.http.authentication.iter();
        let shared = shared.filter(|key| other.http.authentication.contains(key));
        put_back(&rules.mesh, shared, before, &mut request.fields);
    }
}

/// A service that a route of another leads to, and that is guarded.
struct Other {
    address: SocketAddr,
    /// What is to be asked.
    rules: Arc<ServiceRules>,
    /// Whether it believes what tokens say that were taken for the one that was called.
    believes: bool,
}

impl Other {
    /// `None` where there is nothing to be asked: the back end is the service itself, or no service, or nothing guards it; or no
    /// waypoint stands before it, and the policies of its workloads have been asked about just this already.
    fn of(rules: &Rules, way: Way<'_>, connection: &Connection) -> Option<Self> {
        let (called, BackendRef::Service { service, port, .. }) = (way.called, way.to) else { return None };
        if *service == called.http.service {
            return None;
        }
        let believes = rules.believes(service, &called.http);
        let beyond = if rules.service(service).is_some() {
            rules.beyond(&called.http, service)?
        } else {
            let is_new = way.changes || !believes || *port != connection.destination.port();
            Arc::clone(called.led_to(service).filter(|_| is_new)?)
        };
        let vip = rules.mesh.service(service).and_then(|s| s.vips.first()).map(|vip| vip.range.addr());
        let address = SocketAddr::new(vip.unwrap_or(connection.destination.ip()), *port);
        Some(Self { address, rules: beyond, believes })
    }
}

/// What routes ask of the client. Labels are those of the workload that has its address, if that is who it has proved to be.
pub(crate) fn source<'a>(connection: &'a Connection, client: Option<&'a Workload>) -> SourceFacts<'a> {
    let identity = connection.identity.as_deref();
    let is_client = |w: &&Workload| identity.is_some_and(|id| w.identity().as_ref() == Ok(id));
    SourceFacts {
        namespace: identity.map(|id| &**id.namespace()),
        labels: client.filter(is_client).map(|w| &*w.labels).unwrap_or_default(),
    }
}

/// A number that nobody can foresee well enough to steer a choice by.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    thread_local! {
        static SEED: (RandomState, std::cell::Cell<u64>) = (RandomState::new(), std::cell::Cell::new(0));
    }
    SEED.with(|(state, count)| {
        count.set(count.get().wrapping_add(1));
        state.hash_one(count.get())
    })
}

/// The answer of a route that leads nowhere.
fn own_answer(
    route: &RouteRules,
    matched: Option<&model::http::RouteMatch>,
    (request, connection): (&RequestHead, &Connection),
    decided: &Decided,
) -> Option<Refusal> {
    let answer = match &route.route.as_ref()?.action {
        RouteAction::Redirect(to) => redirect::response(to, matched, request),
        RouteAction::Respond(_) => route.respond.clone()?,
        RouteAction::Forward(_) => return None,
    };
    let facts = Facts { request, connection, decided, record: None };
    Some(respond::changed(answer, &route.answer_edits, &facts))
}

/// The rest of a decision that is made already.
fn already(decision: Decision) -> crate::http::decide::Then {
    Box::new(move |_, _, _| decision)
}

/// The place of the back end that takes a request, by weight.
fn choose(route: &RouteRules) -> Option<usize> {
    match route.route.as_ref().map(|route| &route.action) {
        None => Some(0),
        Some(RouteAction::Forward(forward)) => {
            let chosen = forward.choose(random())?;
            forward.backends().iter().position(|backend| std::ptr::eq(backend, chosen))
        }
        Some(RouteAction::Redirect(_) | RouteAction::Respond(_)) => None,
    }
}

impl Decide for Deciding {
    fn decide(&self, request: &mut RequestHead, connection: &Connection, decided: &mut Decided) -> Decision {
        let rules = self.0.rules.load_full();
        let Some(service) = self.find(&rules, connection.destination) else {
            let decision = self.to_workload(&rules, request, connection, decided);
            return decision.unwrap_or_else(Decision::Respond);
        };
        decided.service = Some(service.http.clone());
        decided.port = connection.destination.port();
        self.0.telemetry.request_started(request, decided);
        self.admitted(&rules, &service, request, connection, decided).unwrap_or_else(Decision::Respond)
    }

    fn ended(
        &self,
        request: &RequestHead,
        response: &Fields,
        connection: &Connection,
        decided: &Decided,
        record: &Record,
    ) {
        let rules = self.0.rules.load();
        self.0.telemetry.request_ended(&rules.mesh, (request, response), connection, decided, record);
    }

    fn refused(&self, connection: &Connection, status: u16, why: &dyn std::fmt::Display) {
        tracing::debug!(%why, client = %connection.client, "a request could not be read");
        let rules = self.0.rules.load();
        let service = self.find(&rules, connection.destination).map(|service| service.http.clone());
        self.0.telemetry.request_refused(&rules.mesh, service, connection, status);
    }
}
