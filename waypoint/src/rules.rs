//! A snapshot of the mesh with all that is made of it once, so that a request costs look-ups.
//!
//! Invariants:
//! * a request is decided by one snapshot, whole;
//! * what did not change from one snapshot to the next is shared, and not made anew.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;

use hashbrown::HashSet;
use model::http::{HttpPort, HttpService, LedTo, Protocol, WaypointKey};
use model::{
    CowMap, Destination, GatewayTarget, Mesh, OriginalDst, Policy, PolicyKey, ServiceKey, SpiffeId, Str,
    Workload,
};

use crate::filters::authorize::Policies;
use crate::filters::route::PortRules;
use crate::telemetry::Named;

/// See the module.
#[derive(Debug, Default)]
pub struct Rules {
    /// The mesh.
    pub mesh: Arc<Mesh>,
    own: Option<WaypointKey>,
    services: CowMap<ServiceKey, Arc<ServiceRules>>,
    asking: Asking,
    /// How many services are bound to each waypoint.
    waypoints: CowMap<WaypointKey, u32>,
    told: Named,
}

/// The services that ask a policy. Kept in parts, so that one more of ten thousand costs a few of them.
#[derive(Clone, Debug, Default)]
struct Asking(CowMap<(PolicyKey, u8), Arc<[ServiceKey]>>);

impl Asking {
    const PARTS: u8 = 64;

    fn part(service: &ServiceKey) -> u8 {
        let mut hasher = DefaultHasher::new();
        service.hash(&mut hasher);
        u8::try_from(hasher.finish() % u64::from(Self::PARTS)).unwrap_or(0)
    }

    /// Who asks `policy`.
    fn of(&self, policy: &PolicyKey) -> impl Iterator<Item = &ServiceKey> {
        (0..Self::PARTS).filter_map(|part| self.0.get(&(policy.clone(), part))).flat_map(|list| list.iter())
    }

    /// Follows what a service asks: what it asked, and what it asks now.
    fn follow(&mut self, service: &ServiceKey, then: Option<&HttpService>, now: Option<&HttpService>) {
        let asked = |http: Option<&HttpService>| -> HashSet<PolicyKey> {
            let keys = http.into_iter().flat_map(|h| {
                let led_to = h.led_to.iter().flat_map(|led| led.selected.iter().flatten());
                h.policies.iter().chain(h.selected.iter().flatten()).chain(led_to)
            });
            keys.cloned().collect()
        };
        let (then, now) = (asked(then), asked(now));
        then.difference(&now).for_each(|policy| self.set(policy, service, false));
        now.difference(&then).for_each(|policy| self.set(policy, service, true));
    }

    fn set(&mut self, policy: &PolicyKey, service: &ServiceKey, asks: bool) {
        let slot = (policy.clone(), Self::part(service));
        let mut list: Vec<ServiceKey> = self.0.get(&slot).map(|list| list.to_vec()).unwrap_or_default();
        match list.binary_search(service) {
            Ok(at) if !asks => {
                list.remove(at);
            }
            Err(at) if asks => list.insert(at, service.clone()),
            Ok(_) | Err(_) => return,
        }
        if list.is_empty() {
            self.0.remove(&slot);
        } else {
            self.0.insert(slot, list.into());
        }
    }
}

/// What is done for a service that is bound to this waypoint.
#[derive(Debug)]
pub struct ServiceRules {
    /// What was asked for.
    pub http: Arc<HttpService>,
    /// The policies for what reaches it.
    pub policies: Policies,
    ports: Box<[PortRules]>,
    /// What the workloads behind other services ask that its routes lead to, and that no waypoint may stand before.
    led_to: Box<[Arc<ServiceRules>]>,
}

/// What an address is that a client wants to reach through this waypoint.
#[derive(Clone, Debug)]
pub enum Served {
    /// A service that is bound to it.
    Service(Arc<ServiceRules>),
    /// A workload that is.
    Workload(Arc<Workload>),
}

impl Rules {
    /// What is made of `mesh`, for the waypoint `own`; what is the same as `before` is kept. Costs what has changed between the two:
    /// services, and those that ask a policy that has.
    #[must_use]
    pub fn new(mesh: Arc<Mesh>, own: &WaypointKey, before: &Self) -> Self {
        let changed = mesh.http_services_since(&before.mesh);
        let mut waypoints = before.waypoints.clone();
        for key in &changed {
            if let Some(now) = mesh.http_service(key)
                && let Some(count) = waypoints.entry_or_default(&now.waypoint)
            {
                *count += 1;
            }
            if let Some(then) = before.mesh.http_service(key)
                && let Some(count) = waypoints.get_mut(&then.waypoint)
            {
                *count -= 1;
            }
        }
        let is_ours = |http: &&Arc<HttpService>| http.waypoint == *own;
        let (mut asking, mut told) = (before.asking.clone(), before.told.clone());
        for key in &changed {
            let [then, now] = [&before.mesh, &mesh].map(|mesh| mesh.http_service(key).filter(is_ours));
            asking.follow(key, then.map(|http| &**http), now.map(|http| &**http));
            told.follow(then.map(|http| &*http.telemetry), now.map(|http| &*http.telemetry));
        }
        let edited = mesh.http_policies_since(&before.mesh);
        // Each once: all of them are new in the first snapshot, and so are all policies.
        let concerned: HashSet<&ServiceKey> =
            changed.iter().chain(edited.iter().flat_map(|key| asking.of(key))).collect();
        let mut services = before.services.clone();
        for key in concerned {
            let Some(http) = mesh.http_service(key).filter(|http| http.waypoint == *own) else {
                services.remove(key);
                continue;
            };
            let (old, policies) = (services.get(key), policies(&mesh, http));
            if !old.is_some_and(|old| Arc::ptr_eq(&old.http, http) && old.policies == policies) {
                let rules = Arc::new(ServiceRules::new(&mesh, http, policies, old));
                services.insert(key.clone(), rules);
            }
        }
        Self { mesh, own: Some(own.clone()), services, asking, waypoints, told }
    }

    /// What the telemetry of services names.
    #[must_use]
    pub fn told(&self) -> &Named {
        &self.told
    }

    /// Whether an identity is that of a waypoint that something is bound to.
    #[must_use]
    pub fn is_waypoint(&self, id: &SpiffeId) -> bool {
        let key = WaypointKey { namespace: id.namespace().clone(), name: id.service_account().clone() };
        self.mesh.settings().trust_domains.includes(id.trust_domain())
            && self.waypoints.get(&key).is_some_and(|bound| *bound > 0)
    }

    /// What is done for a service.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<ServiceRules>> {
        self.services.get(key)
    }

    /// Whether policies, tokens or limits hold for what reaches a service, beside the policies of its workloads.
    #[must_use]
    pub fn is_guarded(&self, key: &ServiceKey) -> bool {
        self.services.get(key).is_some_and(|rules| {
            let http = &rules.http;
            !(http.policies.is_empty() && http.authentication.is_empty() && http.rate_limits.is_empty())
        })
    }

    /// What is to be asked where a route of `called` leads to another service that is bound here: `None` if that is not
    /// guarded by anything.
    ///
    /// Its policies are asked whole, also those that `called` has too: one ALLOW policy of a list that matches is enough, so
    /// what another list said proves nothing, and neither do the request and its claims as they were before. Only tokens
    /// that were taken (and perhaps removed) already are not looked for again, and no rate limit is taken from twice.
    #[must_use]
    pub fn beyond(&self, called: &HttpService, to: &ServiceKey) -> Option<Arc<ServiceRules>> {
        let other = self.services.get(to).filter(|_| *to != called.service)?;
        let http = &other.http;
        if other.policies.is_empty() && http.authentication.is_empty() && http.rate_limits.is_empty() {
            return None;
        }
        let is_new = |key: &PolicyKey, before: &[PolicyKey]| !before.contains(key);
        if http.authentication.iter().all(|key| is_new(key, &called.authentication))
            && http.rate_limits.iter().all(|key| is_new(key, &called.rate_limits))
        {
            return Some(Arc::clone(other));
        }
        let more = |of: &[PolicyKey], before: &[PolicyKey]| -> Box<[PolicyKey]> {
            of.iter().filter(|key| is_new(key, before)).cloned().collect()
        };
        let http = HttpService {
            authentication: more(&http.authentication, &called.authentication),
            rate_limits: more(&http.rate_limits, &called.rate_limits),
            ..HttpService::clone(http)
        };
        let policies = other.policies.clone();
        Some(Arc::new(ServiceRules {
            http: Arc::new(http),
            policies,
            ports: Box::default(),
            led_to: Box::default(),
        }))
    }

    /// Whether what a token says that was taken for `called` counts for the policies of the service `to`, too: all who could
    /// have said so are believed there. Otherwise whoever may write a service could make up principals for the policies of
    /// another that its routes lead to.
    #[must_use]
    pub fn believes(&self, to: &ServiceKey, called: &HttpService) -> bool {
        let root = &self.mesh.settings().root_namespace;
        let there = self.services.get(to);
        called.authentication.iter().all(|key| {
            key.namespace == to.namespace
                || key.namespace == *root
                || there.is_some_and(|there| there.http.authentication.contains(key))
        })
    }

    /// All services that something is done for.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceRules>> {
        self.services.values()
    }

    /// Whether `target` is this waypoint: its Service has its name.
    #[must_use]
    pub fn is_own(&self, target: &GatewayTarget) -> bool {
        let Some(own) = &self.own else { return false };
        match target {
            GatewayTarget::Service(key) => {
                let domain = &self.mesh.settings().cluster_domain;
                let rest = key.hostname.strip_prefix(&*own.name).and_then(|r| r.strip_prefix('.'));
                let rest = rest.and_then(|r| r.strip_prefix(&*own.namespace));
                key.namespace == own.namespace
                    && rest.and_then(|r| r.strip_prefix(".svc.")).is_some_and(|rest| *rest == **domain)
            }
            GatewayTarget::Address(address) => self
                .mesh
                .service_at(address)
                .is_some_and(|s| s.namespace == own.namespace && s.name == own.name),
        }
    }

    /// What is done for the service that has the address `to`. An address of a workload is the workload's, as it is for the node that
    /// sent the client here, also where it lies in the range of a ServiceEntry.
    #[must_use]
    pub fn service_at(&self, network: &Str, to: SocketAddr) -> Option<&Arc<ServiceRules>> {
        match self.mesh.destination(network, OriginalDst::new(to)) {
            Destination::Service(service) => self.services.get(&service.key()),
            Destination::Workload(_) | Destination::Unknown => None,
        }
    }
}

/// The policies of the service, and the sets of its workloads.
fn policies(mesh: &Mesh, http: &HttpService) -> Policies {
    let sets = http.selected.iter().map(|set| held(mesh, set));
    Policies(std::iter::once(held(mesh, &http.policies)).chain(sets).collect())
}

fn held(mesh: &Mesh, keys: &[PolicyKey]) -> Vec<Result<Arc<Policy>, PolicyKey>> {
    keys.iter().map(|key| mesh.http_policy(key).cloned().ok_or_else(|| key.clone())).collect()
}

impl ServiceRules {
    fn new(mesh: &Mesh, http: &Arc<HttpService>, policies: Policies, before: Option<&Arc<Self>>) -> Self {
        let led_to = http.led_to.iter().map(|led| Arc::new(Self::of_workloads(mesh, http, led)));
        let led_to = led_to.collect();
        let port = |port: &HttpPort| {
            let before = before.and_then(|before| before.port(port.number));
            PortRules::new(&http.service, port, before)
        };
        Self { http: http.clone(), policies, ports: http.ports.iter().map(port).collect(), led_to }
    }

    /// What is asked where a route of `called` leads to a service that no waypoint stands before: the policies of the
    /// workloads behind that.
    fn of_workloads(mesh: &Mesh, called: &HttpService, led: &LedTo) -> Self {
        let http = HttpService {
            service: led.service.clone(),
            waypoint: called.waypoint.clone(),
            ports: Box::default(),
            policies: Box::default(),
            selected: led.selected.clone(),
            led_to: Box::default(),
            authentication: Box::default(),
            rate_limits: Box::default(),
            telemetry: Arc::clone(&called.telemetry),
        };
        let policies = Policies(led.selected.iter().map(|set| held(mesh, set)).collect());
        Self { http: Arc::new(http), policies, ports: Box::default(), led_to: Box::default() }
    }

    /// The same, of the service `to`; `None` where its workloads have no policies.
    #[must_use]
    pub fn led_to(&self, to: &ServiceKey) -> Option<&Arc<Self>> {
        self.led_to.iter().find(|led| led.http.service == *to)
    }

    /// The rules of the port `number`.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&PortRules> {
        self.ports.iter().find(|rules| rules.port.number == number)
    }

    /// What is spoken at the port `number`; `None` if there is no such port.
    #[must_use]
    pub fn protocol(&self, number: u16) -> Option<Protocol> {
        self.port(number).map(|rules| rules.port.protocol)
    }
}

#[cfg(test)]
mod tests {
    use model::Change;

    use super::*;

    fn key(namespace: &str, name: &str) -> PolicyKey {
        PolicyKey { namespace: namespace.into(), name: name.into() }
    }

    fn named(namespace: &str) -> ServiceKey {
        ServiceKey { namespace: namespace.into(), hostname: format!("a.{namespace}.test").as_str().into() }
    }

    fn own() -> WaypointKey {
        WaypointKey { namespace: "shop".into(), name: "waypoint".into() }
    }

    fn service(namespace: &str, authentication: &[PolicyKey], policies: &[PolicyKey]) -> Arc<HttpService> {
        Arc::new(HttpService {
            service: named(namespace),
            waypoint: own(),
            ports: Box::default(),
            policies: policies.into(),
            selected: Box::default(),
            led_to: Box::default(),
            authentication: authentication.into(),
            rate_limits: Box::default(),
            telemetry: Arc::default(),
        })
    }

    fn rules(services: &[&Arc<HttpService>]) -> Rules {
        let changes = services.iter().map(|service| Change::SetHttpService(Arc::clone(service)));
        Rules::new(Arc::new(Mesh::default().apply(changes)), &own(), &Rules::default())
    }

    #[test]
    fn what_a_token_says_counts_for_those_who_believe_its_issuer() {
        let mine = [key("evil", "mine")];
        for (asked, there, believed) in [
            (&mine[..], &[][..], false),
            (&mine, &mine, true),
            (&[key("b", "x")], &[], true),
            (&[key("istio-system", "x")], &[], true),
            // Any of them may have taken it.
            (&[key("b", "x"), key("evil", "mine")], &[], false),
        ] {
            let (called, other) = (service("evil", asked, &[]), service("b", there, &[]));
            let rules = rules(&[&called, &other]);
            assert_eq!(rules.believes(&named("b"), &called), believed, "{asked:?} {there:?}");
        }
    }

    #[test]
    fn another_service_is_asked_whatever_the_called_one_was_asked_for() {
        let (both, theirs) = (key("shop", "gateway"), key("b", "theirs"));
        let (tokens, limits) = (key("shop", "tokens"), key("shop", "limits"));
        let called = HttpService {
            rate_limits: [limits.clone()].into(),
            ..HttpService::clone(&service("a", std::slice::from_ref(&tokens), std::slice::from_ref(&both)))
        };
        let called = Arc::new(called);
        let other = service("b", &[], &[both.clone(), theirs.clone()]);
        let alike = service("c", &[], std::slice::from_ref(&both));
        let selecting = HttpService {
            selected: [[both.clone()].into()].into(),
            ..HttpService::clone(&service("d", &[], &[]))
        };
        let twice = HttpService {
            rate_limits: [limits, key("e", "limits")].into(),
            ..HttpService::clone(&service("e", &[tokens, key("e", "tokens")], std::slice::from_ref(&both)))
        };
        let (selecting, twice) = (Arc::new(selecting), Arc::new(twice));
        let plain = service("plain", &[], &[]);
        let rules = rules(&[&called, &other, &alike, &selecting, &twice, &plain]);
        let asked = |to| rules.beyond(&called, &named(to)).map(|rules| rules.policies.clone());
        let unknown = |keys: &[&PolicyKey]| keys.iter().map(|key| Err((*key).clone())).collect::<Vec<_>>();
        // One that is listed and not known refuses.
        assert_eq!(asked("b"), Some(Policies(vec![unknown(&[&both, &theirs])])));
        assert_eq!(asked("c"), Some(Policies(vec![unknown(&[&both])])));
        assert_eq!(asked("d"), Some(Policies(vec![Vec::new(), unknown(&[&both])])), "its workloads' too");
        assert_eq!(asked("e"), Some(Policies(vec![unknown(&[&both])])));
        // A token that was taken may be gone by now, and nobody is charged twice.
        let twice = rules.beyond(&called, &named("e")).map(|rules| Arc::clone(&rules.http));
        let twice = twice.map(|http| (http.authentication.to_vec(), http.rate_limits.to_vec()));
        assert_eq!(twice, Some((vec![key("e", "tokens")], vec![key("e", "limits")])));
        for nothing in ["a", "plain", "unbound"] {
            assert!(rules.beyond(&called, &named(nothing)).is_none(), "{nothing}");
        }
    }

    #[test]
    fn a_change_costs_its_own_service_however_many_there_are() {
        let asked = key("shop", "asked");
        let policies = |n: usize| if n == 7 { std::slice::from_ref(&asked) } else { &[] };
        let all: Vec<_> = (0..10_000).map(|n| service(&format!("n{n}"), &[], policies(n))).collect();
        let before = rules(&all.iter().collect::<Vec<_>>());
        assert_eq!(before.services().count(), all.len());
        let after = |change| {
            let mesh = Arc::new(before.mesh.apply([change]));
            let touched = mesh.http_services_since(&before.mesh).len();
            let next = Rules::new(mesh, &own(), &before);
            let is_new = |rules: &&Arc<ServiceRules>| {
                !before.service(&rules.http.service).is_some_and(|old| Arc::ptr_eq(old, rules))
            };
            let made: Vec<_> =
                next.services().filter(is_new).map(|rules| rules.http.service.clone()).collect();
            (touched, made, next)
        };
        let (touched, made, _) = after(Change::SetHttpService(service("n5", &[key("a", "b")], &[])));
        assert_eq!((touched, made), (1, vec![named("n5")]));
        let (touched, made, next) = after(Change::RemoveHttpService(named("n5")));
        assert_eq!((touched, made.len(), next.services().count()), (1, 0, all.len() - 1));
        let policy = Policy {
            key: asked.clone(),
            scope: model::Scope::WorkloadSelector,
            action: model::Action::Deny,
            rules: Box::default(),
            dry_run: false,
        };
        let (touched, made, next) = after(Change::SetHttpPolicy(Arc::new(policy)));
        assert_eq!((touched, made), (0, vec![named("n7")]));
        let asked = next.service(&named("n7")).map(|rules| rules.policies.clone());
        assert!(asked.is_some_and(|asked| asked.0[0][0].is_ok()), "the policy is known now");
        // As many are looked at for a policy as ask it, whatever else there is.
        let policy = key("shop", "asked");
        let asking = |rules: &Rules| rules.asking.of(&policy).cloned().collect::<Vec<_>>();
        assert_eq!(asking(&before), [named("n7")]);
        let (.., next) = after(Change::SetHttpService(service("n5", &[], std::slice::from_ref(&policy))));
        assert_eq!(asking(&next).len(), 2);
        let (.., next) = after(Change::SetHttpService(service("n7", &[], &[])));
        assert_eq!((asking(&next), next.asking.0.len()), (vec![], 0));
        let (.., next) = after(Change::RemoveHttpService(named("n7")));
        assert!(asking(&next).is_empty());
        // Also what the workloads ask that its routes lead to.
        let led = LedTo { service: named("n6"), selected: [[policy.clone()].into()].into() };
        let leading = HttpService { led_to: [led].into(), ..HttpService::clone(&service("n5", &[], &[])) };
        let (.., next) = after(Change::SetHttpService(Arc::new(leading)));
        assert_eq!(asking(&next).len(), 2);
    }

    #[test]
    fn waypoints_are_known_by_their_identity() {
        let rules = rules(&[&service("a", &[], &[])]);
        for (id, is) in [
            ("spiffe://cluster.local/ns/shop/sa/waypoint", true),
            ("spiffe://cluster.local/ns/shop/sa/other", false),
            ("spiffe://elsewhere/ns/shop/sa/waypoint", false),
        ] {
            assert_eq!(id.parse().map(|id| rules.is_waypoint(&id)), Ok(is), "{id}");
        }
    }
}
