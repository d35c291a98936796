//! The cluster's pods as the CA has to know them: what runs where, under which account.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use config::json::Decoded;
use config::tree::Node;
use tokio::time::Instant;

use crate::alive::{Life, Ztunnel};
use crate::ca::{Account, PodFacts, Pods, TRUSTED_ROOTS};

type Name = (Arc<str>, Arc<str>);

/// Node, namespace and service account.
type Place = (Arc<str>, Arc<str>, Arc<str>);

/// The label of pods of Gateways, and its value for waypoints (facts 4.9).
const MANAGED: &str = "gateway.istio.io/managed";
const WAYPOINTS: &str = "istio.io-mesh-controller";
/// The label that says of which Gateway.
const GATEWAY: &str = "gateway.networking.k8s.io/gateway-name";

/// A pod that says which roots it trusts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reporter {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub pod: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// What it says, as the annotation has it.
    pub roots: Arc<str>,
}

/// A pod.
#[derive(Clone, PartialEq, Eq)]
struct Pod {
    uid: Arc<str>,
    /// Empty before it is scheduled.
    node: Arc<str>,
    account: Arc<str>,
    finished: bool,
    /// None of its containers has run yet.
    starting: bool,
    /// What its proxy says of the roots that it trusts, as the annotation has it.
    roots: Option<Arc<str>>,
    /// The Gateway that it is labelled as a waypoint of.
    waypoint: Option<Arc<str>>,
    revision: Option<Arc<str>>,
    /// When it was first heard of.
    since: Instant,
}

impl Pod {
    /// Whether its node may have the identity of its account.
    fn is_counted(&self) -> bool {
        !self.finished && !self.node.is_empty() && !self.account.is_empty()
    }
}

#[derive(Default)]
struct Table {
    ready: bool,
    namespaces: HashSet<Arc<str>>,
    pods: HashMap<Name, Pod>,
    /// How many pods that are not over run on a node under an account, by node, namespace and account.
    running: HashMap<Place, u32>,
    names: HashSet<Arc<str>>,
    /// How many names were left when they were swept last.
    kept_names: usize,
    /// The accounts of the proxies of nodes, and their pods.
    accounts: Vec<Account>,
    proxies: HashSet<Name>,
    /// The pods of waypoints.
    waypoints: HashSet<Name>,
}

/// All pods. Cloning shares it. The registry fills it as events come, before they are compiled: a pod's certificate is
/// asked for in its first moments.
#[derive(Clone, Default)]
pub struct PodTable(Arc<RwLock<Table>>);

impl std::fmt::Debug for PodTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodTable").finish_non_exhaustive()
    }
}

impl PodTable {
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on everything is known.
    pub fn set_ready(&self) {
        self.write().ready = true;
    }

    /// A namespace is there, or not any more.
    pub fn set_namespace(&self, name: &Arc<str>, is_there: bool) {
        let mut table = self.write();
        if is_there {
            table.namespaces.insert(name.clone());
        } else {
            table.namespaces.remove(name);
        }
    }

    /// A pod is this now.
    pub fn set(&self, namespace: &Arc<str>, name: &Arc<str>, decoded: &Decoded) {
        let text = |section: &str, field: &str| {
            let found = decoded.node.get(section).and_then(|s| s.get(field));
            found.and_then(Node::as_str).unwrap_or_default()
        };
        // The server fills it in, but for the mirrors of a kubelet's own pods, which a kubelet may make in any namespace:
        // they have no account, and must not give their node that of the namespace.
        let account = text("spec", "serviceAccountName");
        let phase = text("status", "phase");
        let mut table = self.write();
        let mut pod = Pod {
            uid: decoded.bookkeeping.uid.as_str().into(),
            node: table.name(text("spec", "nodeName")),
            account: table.name(account),
            finished: matches!(phase, "Succeeded" | "Failed"),
            starting: matches!(phase, "Pending" | ""),
            roots: annotation(decoded, TRUSTED_ROOTS).map(Arc::from),
            waypoint: None,
            revision: None,
            since: Instant::now(),
        };
        let key = (namespace.clone(), name.clone());
        if decoded.label(MANAGED) == Some(WAYPOINTS) {
            pod.waypoint = Some(decoded.label(GATEWAY).unwrap_or_default().into());
            pod.revision = decoded.label("istio.io/rev").map(Arc::from);
            table.waypoints.insert(key.clone());
        } else {
            table.waypoints.remove(&key);
        }
        if table.is_proxy(namespace, account) {
            pod.revision = decoded.label("istio.io/rev").map(Arc::from);
            table.proxies.insert(key.clone());
        } else {
            table.proxies.remove(&key);
        }
        pod.since = table.pods.get(&key).filter(|old| old.uid == pod.uid).map_or(pod.since, |old| old.since);
        let old = table.pods.insert(key, pod.clone());
        if let Some(old) = old {
            table.leave(namespace, &old);
        }
        table.enter(namespace, &pod);
        table.sweep();
    }

    /// A pod is gone.
    pub fn remove(&self, namespace: &Arc<str>, name: &Arc<str>) {
        let mut table = self.write();
        let key = (namespace.clone(), name.clone());
        table.proxies.remove(&key);
        table.waypoints.remove(&key);
        if let Some(old) = table.pods.remove(&key) {
            table.leave(namespace, &old);
        }
    }

    /// Tells which accounts' pods are the proxies of nodes.
    pub fn follow(&self, accounts: Vec<Account>) {
        let mut table = self.write();
        table.accounts = accounts;
        let of = |(key, pod): (&Name, &Pod)| table.is_proxy(&key.0, &pod.account).then(|| key.clone());
        table.proxies = table.pods.iter().filter_map(of).collect();
    }

    /// The proxies of nodes, as far as their pods tell, and when each was first heard of; `None` while they are not
    /// known. Costs nothing for other pods.
    #[must_use]
    pub fn proxies(&self) -> Option<Vec<(Ztunnel, Instant)>> {
        let table = self.read();
        if !table.ready {
            return None;
        }
        Some(table.proxies.iter().filter_map(|key| table.proxy(key)).collect())
    }

    /// The pods of waypoints, in the same way: each with its Gateway.
    #[must_use]
    pub fn waypoints(&self) -> Option<Vec<(Ztunnel, Instant)>> {
        let table = self.read();
        table.ready.then(|| table.waypoints.iter().filter_map(|key| table.proxy(key)).collect())
    }

    /// Pods that are no node proxies, are not over, and say which roots they trust: those of these namespaces, and
    /// waypoints. Looks at all pods.
    #[must_use]
    pub fn reporters(&self, namespaces: &BTreeSet<String>) -> Vec<Reporter> {
        let table = self.read();
        let reporter = |(key, pod): (&Name, &Pod)| {
            let roots = pod.roots.clone()?;
            let counts = pod.waypoint.is_some() || namespaces.contains(&*key.0);
            (counts && !pod.finished && !pod.node.is_empty() && !table.proxies.contains(key)).then(|| {
                Reporter { namespace: key.0.clone(), pod: key.1.clone(), node: pod.node.clone(), roots }
            })
        };
        let mut found: Vec<Reporter> = table.pods.iter().filter_map(reporter).collect();
        found.sort_by(|a, b| (&a.namespace, &a.pod).cmp(&(&b.namespace, &b.pod)));
        found
    }

    /// How many pods there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read().pods.len()
    }

    /// Whether there is no pod.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn annotation<'d>(decoded: &'d Decoded, key: &str) -> Option<&'d str> {
    decoded.node.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

impl Table {
    fn proxy(&self, key: &Name) -> Option<(Ztunnel, Instant)> {
        let pod = self.pods.get(key).filter(|pod| !pod.finished && !pod.node.is_empty())?;
        let ztunnel = Ztunnel {
            namespace: key.0.clone(),
            pod: key.1.clone(),
            node: pod.node.clone(),
            gateway: pod.waypoint.as_ref().map(|name| format!("{}/{name}", key.0).into()),
            revision: pod.revision.clone(),
            roots: pod.roots.clone(),
            life: if pod.starting { Life::Starting } else { Life::Running },
        };
        Some((ztunnel, pod.since))
    }

    fn is_proxy(&self, namespace: &str, account: &str) -> bool {
        self.accounts.iter().any(|a| a.namespace == namespace && a.name == account)
    }

    fn name(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.names.get(text) {
            return known.clone();
        }
        let name: Arc<str> = text.into();
        self.names.insert(name.clone());
        name
    }

    /// Forgets names that nothing has any more, now and then.
    fn sweep(&mut self) {
        // Also pods that are over have names: what is left must double before it is worth another look.
        if self.names.len() > 4096 + 2 * self.kept_names {
            self.names.retain(|name| Arc::strong_count(name) > 1);
            self.kept_names = self.names.len();
        }
    }

    fn enter(&mut self, namespace: &Arc<str>, pod: &Pod) {
        if pod.is_counted() {
            let key = (pod.node.clone(), namespace.clone(), pod.account.clone());
            *self.running.entry(key).or_default() += 1;
        }
    }

    fn leave(&mut self, namespace: &Arc<str>, pod: &Pod) {
        if !pod.is_counted() {
            return;
        }
        let key = (pod.node.clone(), namespace.clone(), pod.account.clone());
        if let Some(count) = self.running.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.running.remove(&key);
            }
        }
    }
}

impl Pods for PodTable {
    fn is_ready(&self) -> bool {
        self.read().ready
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts> {
        let table = self.read();
        let pod = table.pods.get(&(namespace.into(), name.into()))?;
        Some(PodFacts {
            uid: pod.uid.to_string(),
            node: (!pod.node.is_empty()).then(|| pod.node.to_string()),
            service_account: pod.account.to_string(),
            finished: pod.finished,
        })
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        self.read().namespaces.contains(namespace)
    }

    fn is_waypoint(&self, namespace: &str, name: &str) -> bool {
        self.read().pods.get(&(namespace.into(), name.into())).is_some_and(|pod| pod.waypoint.is_some())
    }

    fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let key = (node.into(), namespace.into(), service_account.into());
        self.read().running.contains_key(&key)
    }
}

#[cfg(test)]
mod tests {
    use config::json::ObjectSeed;
    use config::resource::Kind;
    use serde::de::DeserializeSeed;

    use super::*;

    fn pod(uid: &str, node: &str, account: &str, phase: &str) -> Decoded {
        let text = format!(
            r#"{{"metadata": {{"name": "a", "uid": "{uid}"}}, "spec": {{"nodeName": "{node}",
                "serviceAccountName": "{account}"}}, "status": {{"phase": "{phase}"}}}}"#
        );
        let seed = ObjectSeed { kind: Kind::Pod, unknown: &|_, _| () };
        seed.deserialize(&mut serde_json::Deserializer::from_str(&text)).unwrap()
    }

    #[test]
    fn an_account_runs_where_a_pod_of_it_is_that_is_not_over() {
        let table = PodTable::default();
        let (ns, a, b): (Arc<str>, Arc<str>, Arc<str>) = ("shop".into(), "a".into(), "b".into());
        table.set(&ns, &a, &pod("1", "n1", "web", "Pending"));
        table.set(&ns, &b, &pod("2", "n1", "web", "Running"));
        assert!(table.runs_on("n1", "shop", "web") && !table.runs_on("n2", "shop", "web"));
        table.set(&ns, &a, &pod("1", "n1", "web", "Succeeded"));
        assert!(table.runs_on("n1", "shop", "web"));
        assert!(table.pod("shop", "a").unwrap().finished);
        table.remove(&ns, &b);
        assert!(!table.runs_on("n1", "shop", "web"));
        assert_eq!(table.pod("shop", "b"), None);
        table.set(&ns, &b, &pod("3", "", "", "Pending"));
        let facts = table.pod("shop", "b").unwrap();
        assert_eq!((facts.node, &*facts.service_account), (None, ""));
        assert!(table.read().running.is_empty());
    }

    #[test]
    fn names_are_swept_when_it_is_worth_it() {
        let table = PodTable::default();
        let ns: Arc<str> = "jobs".into();
        for index in 0..20_000 {
            let name: Arc<str> = format!("p{index}").into();
            table.set(&ns, &name, &pod("1", "n1", &format!("account-{index}"), "Succeeded"));
        }
        // Each is still known by a pod that is over: sweeping finds nothing, and is tried ever more seldom.
        let kept = table.read().kept_names;
        assert!((4096..=20_001).contains(&kept), "{kept}");
        assert!(table.read().names.len() <= 4096 + 2 * kept);
        for index in 0..20_000 {
            table.remove(&ns, &format!("p{index}").into());
        }
        for index in 0..60_000 {
            table.set(&ns, &"one".into(), &pod("1", "n1", &format!("other-{index}"), "Running"));
        }
        assert!(table.read().names.len() < 25_000, "{}", table.read().names.len());
    }

    #[test]
    fn a_mirror_pod_gives_its_node_no_identity() {
        let table = PodTable::default();
        let (ns, a): (Arc<str>, Arc<str>) = ("shop".into(), "a-n1".into());
        table.set(&ns, &a, &pod("1", "n1", "", "Running"));
        assert!(!table.runs_on("n1", "shop", "default") && !table.runs_on("n1", "shop", ""));
        table.remove(&ns, &a);
        assert!(table.read().running.is_empty());
    }
}
