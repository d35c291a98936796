//! How the proxies that are connected to this control plane stand with policies.
//!
//! Nearly always all of them enforce nearly all policies. So they are ordered by how far they have answered, and what they
//! refused is kept by what it is about: a policy that all enforce costs the same for any number of proxies, and those that
//! some do not are found without a look at the others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use config::resource::Kind;
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Extensions, HTTP_POLICY_TYPE_URL, HTTP_SERVICE_TYPE_URL,
};
use xds::server::{ClientStatus, Generation, Server};

use super::conditions::Tally;
use super::followers::{Followed, Table, object_of_resource, resource_of};
use super::{FRESH, is_policy};
use crate::registry::ObjectName;
use crate::serve::waypoint_of;

/// A proxy that says what it enforces.
struct Client {
    name: Arc<str>,
    /// Up to where it has answered for policies and workloads, which list the policies that select them.
    acked: Option<Generation>,
    /// It came only now.
    fresh: bool,
}

/// A waypoint's proxy. There are few, so each is looked at.
struct WaypointProxy {
    name: Arc<str>,
    /// Its Gateway.
    gateway: Arc<str>,
    /// Up to where it has answered for policies, and for services, which list them.
    acked: Option<Generation>,
    fresh: bool,
    /// Policies that it refused, by the resources' names, and why.
    refused: HashMap<Arc<str>, Arc<str>>,
    /// It refused more than is remembered, of what was made until then.
    blurred: Option<Generation>,
}

impl WaypointProxy {
    fn of(name: Arc<str>, gateway: &str, status: &ClientStatus) -> Self {
        let acked = |url| of_type(status, url).map(|t| t.acked);
        let both = acked(HTTP_POLICY_TYPE_URL).zip(acked(HTTP_SERVICE_TYPE_URL));
        let policies = of_type(status, HTTP_POLICY_TYPE_URL);
        let rejected = policies.into_iter().flat_map(|t| &t.rejected);
        Self {
            name,
            gateway: gateway.into(),
            acked: both.map(|(policies, services)| policies.min(services)),
            fresh: is_fresh(status),
            refused: rejected.map(|r| (r.name.clone(), r.reason.clone())).collect(),
            blurred: policies.and_then(|t| t.blurred),
        }
    }

    /// Adds how it stands with a policy to a tally.
    fn count(&self, resource: &str, generation: Generation, tally: &mut Tally) {
        if let Some(reason) = self.refused.get(&*format!("{}/{resource}", self.gateway)) {
            tally.refuse(&self.name, reason);
        } else if self.acked.is_none_or(|acked| acked < generation) {
            tally.wait_for(&self.name, self.fresh);
        } else if self.blurred.is_some_and(|until| generation <= until) {
            tally.refuse(&self.name, &"it refused more than is remembered, and this may be among it".into());
        } else {
            tally.enforcing += 1;
        }
    }
}

fn is_fresh(status: &ClientStatus) -> bool {
    status.connected.elapsed().is_ok_and(|time: Duration| time < FRESH)
}

/// The proxies of one control plane, at one time.
pub struct Proxies {
    /// Those of nodes that say what they enforce; who is behind comes first.
    ours: Vec<Client>,
    waypoints: Vec<WaypointProxy>,
    /// All that are connected, by name.
    names: Arc<[Arc<str>]>,
    others: usize,
    /// Policies' resources that were refused, by whom (as in `ours`) and why.
    refused: HashMap<Arc<str>, BTreeMap<usize, Arc<str>>>,
    /// Who refused more than is remembered, of what was made until then.
    blurred: BTreeMap<usize, Generation>,
    /// Who refused a workload, by its namespace, and why.
    workloads: HashMap<Box<str>, BTreeMap<usize, Arc<str>>>,
    /// Who refused more workloads than are remembered.
    workloads_blurred: BTreeSet<usize>,
}

impl Proxies {
    /// Those of a server.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        let mut ours: Vec<(Client, ClientStatus)> = Vec::new();
        let mut waypoints = Vec::new();
        let mut names: Vec<Arc<str>> = Vec::new();
        for status in server.clients() {
            let name: Arc<str> = proxy_name(&status).into();
            names.push(name.clone());
            if let Some(gateway) = waypoint_of(&status.caller) {
                waypoints.push(WaypointProxy::of(name, gateway, &status));
            } else if status.audience == Extensions::Culvert {
                let acked = |url| of_type(&status, url).map(|t| t.acked);
                let both = acked(AUTHORIZATION_TYPE_URL).zip(acked(ADDRESS_TYPE_URL));
                let fresh = is_fresh(&status);
                ours.push((Client { name, acked: both.map(|(p, w)| p.min(w)), fresh }, status));
            }
        }
        let others = names.len() - ours.len() - waypoints.len();
        names.sort_unstable();
        ours.sort_by(|(a, _), (b, _)| (a.acked, &a.name).cmp(&(b.acked, &b.name)));
        let mut all = Self {
            ours: Vec::with_capacity(ours.len()),
            waypoints,
            names: names.into(),
            others,
            refused: HashMap::new(),
            blurred: BTreeMap::new(),
            workloads: HashMap::new(),
            workloads_blurred: BTreeSet::new(),
        };
        for (index, (client, status)) in ours.into_iter().enumerate() {
            all.ours.push(client);
            all.note_refusals(index, &status);
        }
        all
    }

    fn note_refusals(&mut self, client: usize, status: &ClientStatus) {
        if let Some(policies) = of_type(status, AUTHORIZATION_TYPE_URL) {
            for rejected in &policies.rejected {
                let by = self.refused.entry(rejected.name.clone()).or_default();
                by.insert(client, rejected.reason.clone());
            }
            self.blurred.extend(policies.blurred.map(|until| (client, until)));
        }
        let Some(workloads) = of_type(status, ADDRESS_TYPE_URL) else { return };
        for rejected in &workloads.rejected {
            // A workload's name is `CLUSTER/GROUP/KIND/NAMESPACE/NAME…`; a service's has two parts, and lists no policies.
            let Some(namespace) = rejected.name.split('/').nth(3) else { continue };
            let reason: Arc<str> =
                format!("it refused the workload {}: {}", rejected.name, rejected.reason).into();
            self.workloads.entry(namespace.into()).or_default().entry(client).or_insert(reason);
        }
        if workloads.blurred.is_some() {
            self.workloads_blurred.insert(client);
        }
    }

    /// Proxies of these names that have answered up to there.
    #[cfg(test)]
    pub(super) fn made(clients: &[(&str, u64)]) -> Self {
        let mut names: Vec<Arc<str>> = clients.iter().map(|(name, _)| Arc::from(*name)).collect();
        names.sort_unstable();
        let client = |(name, acked): &(&str, u64)| Client {
            name: Arc::from(*name),
            acked: Some(Generation(*acked)),
            fresh: false,
        };
        let mut ours: Vec<Client> = clients.iter().map(client).collect();
        ours.sort_by_key(|client| client.acked);
        Self {
            ours,
            waypoints: Vec::new(),
            names: names.into(),
            others: 0,
            refused: HashMap::new(),
            blurred: BTreeMap::new(),
            workloads: HashMap::new(),
            workloads_blurred: BTreeSet::new(),
        }
    }

    /// How many of nodes say what they enforce.
    #[must_use]
    pub fn ours(&self) -> usize {
        self.ours.len()
    }

    /// How many are of another make.
    #[must_use]
    pub fn others(&self) -> usize {
        self.others
    }

    /// The names of all, in order.
    #[must_use]
    pub fn names(&self) -> &Arc<[Arc<str>]> {
        &self.names
    }

    /// How they stand with a policy: those of nodes that have it, and those of the waypoints that are to enforce it.
    pub(super) fn tally(&self, policy: &ObjectName, followed: &Followed, table: &Table) -> Tally {
        let at_nodes = table.is_at_nodes(policy);
        let mut tally = if at_nodes { self.of_nodes(policy, followed, table) } else { Tally::default() };
        let gateways = table.waypoints_of(policy);
        let resource = resource_of(policy);
        for waypoint in self.waypoints.iter().filter(|w| gateways.contains(&w.gateway)) {
            waypoint.count(&resource, followed.generation, &mut tally);
        }
        tally
    }

    fn of_nodes(&self, policy: &ObjectName, followed: &Followed, table: &Table) -> Tally {
        let mut tally = Tally { others: self.others, ..Tally::default() };
        let generation = followed.generation;
        let behind = self.ours.partition_point(|client| client.acked.is_none_or(|acked| acked < generation));
        let refusing = self.refusing(policy, followed, table, behind);
        for (index, client) in self.ours.iter().enumerate().take(behind) {
            if !refusing.contains_key(&index) {
                tally.wait_for(&client.name, client.fresh);
            }
        }
        for (index, reason) in &refusing {
            if let Some(client) = self.ours.get(*index) {
                tally.refuse(&client.name, reason);
            }
        }
        tally.enforcing = self.ours.len() - tally.pending - tally.rejected;
        tally
    }

    fn refuse_workloads(&self) -> bool {
        !self.workloads.is_empty() || !self.workloads_blurred.is_empty()
    }

    /// Who can't enforce a policy, and why.
    fn refusing(
        &self,
        policy: &ObjectName,
        followed: &Followed,
        table: &Table,
        behind: usize,
    ) -> BTreeMap<usize, Arc<str>> {
        let mut refusing = BTreeMap::new();
        if !self.blurred.is_empty() {
            let reason: Arc<str> = "it refused more than is remembered, and this may be among it".into();
            let unclear = self
                .blurred
                .iter()
                .filter(|(index, until)| **index >= behind && followed.generation <= **until);
            refusing.extend(unclear.map(|(index, _)| (*index, reason.clone())));
        }
        if self.refuse_workloads() && attaches(policy, followed) {
            let reason: Arc<str> = "it refused more workloads than are remembered".into();
            refusing.extend(self.workloads_blurred.iter().map(|index| (*index, reason.clone())));
            // The root namespace's are for the workloads of all.
            let all = *policy.namespace == *table.root_namespace();
            let there =
                self.workloads.iter().filter(|(namespace, _)| all || ***namespace == *policy.namespace);
            refusing.extend(there.flat_map(|(_, by)| by).map(|(index, why)| (*index, why.clone())));
        }
        if !self.refused.is_empty()
            && let Some(by) = self.refused.get(&*resource_of(policy))
        {
            refusing.extend(by.iter().map(|(index, why)| (*index, why.clone())));
        }
        refusing
    }

    /// The policies that not all of them enforce, and those that waypoints do, and how they stand with them.
    pub(super) fn exceptions(&self, table: &Table) -> BTreeMap<ObjectName, Tally> {
        let mut names: BTreeSet<ObjectName> = BTreeSet::new();
        if let Some(last) = self.ours.first() {
            names.extend(table.newer(last.acked).cloned());
        }
        names.extend(self.refused.keys().filter_map(|name| object_of_resource(name)));
        if !self.blurred.is_empty() || self.refuse_workloads() {
            names.extend(table.names().filter(|name| is_policy(name.kind)).cloned());
        }
        // Of these it is not said by how many node proxies there are.
        let at_waypoints: BTreeSet<ObjectName> = table.at_waypoints().cloned().collect();
        names.extend(at_waypoints.iter().cloned());
        let tally = |name: ObjectName| {
            let tally = self.tally(&name, table.get(&name)?, table);
            let is_said = tally.pending + tally.rejected > 0 || at_waypoints.contains(&name);
            is_said.then_some((name, tally))
        };
        names.into_iter().filter_map(tally).collect()
    }
}

/// Whether workloads list a policy that is for them. That of an identity's mode is in each of them.
fn attaches(policy: &ObjectName, followed: &Followed) -> bool {
    policy.kind == Kind::PeerAuthentication || followed.state.version.selects
}

fn of_type<'s>(status: &'s ClientStatus, type_url: &str) -> Option<&'s xds::server::TypeStatus> {
    status.types.iter().find(|t| &*t.type_url == type_url && t.wildcard)
}

/// The pod and namespace of a proxy.
#[must_use]
pub fn proxy_name(client: &ClientStatus) -> String {
    // `ztunnel~IP~POD.NAMESPACE~DOMAIN`; whatever else somebody calls itself is cut.
    let id = &client.node.id;
    id.split('~').nth(2).filter(|name| !name.is_empty()).unwrap_or(id).chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use model::{Action, Change, Policy, PolicyKey, Scope};

    use super::*;
    use crate::push::Enforcers;
    use crate::registry::{ObjectState, ObjectVersion, Report, Standing};
    use crate::status::Followers;

    fn waypoint(name: &str, gateway: &str, acked: u64, refused: &[&str]) -> WaypointProxy {
        WaypointProxy {
            name: name.into(),
            gateway: gateway.into(),
            acked: Some(Generation(acked)),
            fresh: false,
            refused: refused.iter().map(|name| (Arc::from(*name), Arc::from("no"))).collect(),
            blurred: None,
        }
    }

    #[test]
    fn what_only_requests_can_be_held_against_is_counted_at_the_waypoints_that_are_to_enforce_it() {
        let enforcers = Enforcers::default();
        enforcers.change(&"shop/p".into(), &"shop/w".into(), true);
        let followers = Followers::default().enforced_by(&enforcers);
        let name = ObjectName { kind: Kind::AuthorizationPolicy, namespace: "shop".into(), name: "p".into() };
        let version = ObjectVersion { uid: "u".into(), generation: 1, labelled: false, selects: false };
        let state = ObjectState { version, findings: Vec::new(), standing: Standing::default() };
        let policy = Arc::new(Policy {
            key: PolicyKey { namespace: "shop".into(), name: "p".into() },
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            rules: Box::default(),
            dry_run: false,
        });
        let report = Report { name: name.clone(), state: Some(state) };
        followers.take(vec![report], &[Change::SetHttpPolicy(policy.clone())], Generation(10));
        let mut proxies = Proxies::made(&[("z.mesh", 3)]);
        proxies.waypoints = vec![
            waypoint("w-1", "shop/w", 10, &[]),
            waypoint("w-2", "shop/w", 9, &[]),
            waypoint("w-3", "shop/w", 10, &["shop/w/shop/p"]),
            waypoint("x-1", "shop/x", 10, &[]),
        ];
        let tally = |proxies: &Proxies| {
            let table = followers.lock();
            let tally = proxies.tally(&name, table.get(&name).unwrap(), &table);
            (tally.enforcing, tally.pending, tally.rejected)
        };
        assert_eq!(tally(&proxies), (1, 1, 1), "neither the node proxy nor the other waypoint counts");
        let table = followers.lock();
        assert!(proxies.exceptions(&table).contains_key(&name), "others are told how many there are");
        drop(table);

        // Its part for connections goes to nodes, too.
        followers.take(Vec::new(), &[Change::SetPolicy(policy)], Generation(11));
        assert_eq!(tally(&proxies), (0, 3, 1));
    }
}
