//! Which of the mesh's node proxies are alive: for the count of those that enforce a policy, and for the gate that a new
//! root waits at.
//!
//! A node proxy is a pod of a trusted account that is not finished. It is taken for dead, which is said with the reason and
//! never in silence, when its node is not there, not ready, or does not renew its Lease: DaemonSets' pods stay in the API
//! server for as long as their node does, whether there is a machine behind it or not.
//!
//! Leases change every few seconds for each node, so they are not watched. They are looked at for those nodes only that
//! somebody doubts ([`Ztunnels::look`]). Clocks need not agree: a Lease that was seen unchanged for its duration is over.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use config::json::Decoded;
use config::tree::{Node, Value};
use futures_util::{StreamExt, stream};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::Api;
use tokio::time::Instant;

use crate::pods::PodTable;
use crate::source::chain;

/// Where nodes' Leases are.
const LEASES: &str = "kube-node-lease";
/// For how long a node's Lease holds: what Kubernetes' own control plane waits, too.
const HOLDS: Duration = Duration::from_secs(40);
/// How often a Lease is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// Leases that are looked at in one go; the others are taken to hold until it is their turn.
const MOST_LEASES: usize = 100;
/// Leases that are asked for at a time.
const AT_A_TIME: usize = 8;
/// A pod may be heard of before its node.
const NODE_LATENESS: Duration = Duration::from_secs(60);

/// Whether a node proxy is alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It runs.
    Running,
    /// None of its containers has run yet.
    Starting,
    /// Nobody can be behind it, and why.
    Dead(&'static str),
}

/// A node proxy, or one of a waypoint, by its pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ztunnel {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its pod.
    pub pod: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// The Gateway that it is a waypoint of, `NAMESPACE/NAME`; `None` for a node proxy.
    pub gateway: Option<Arc<str>>,
    /// The revision that its pod is labelled with; `None` where it has no such label.
    pub revision: Option<Arc<str>>,
    /// What it says of the roots that it trusts, as the annotation has it.
    pub roots: Option<Arc<str>>,
    /// Whether it is alive.
    pub life: Life,
}

impl Ztunnel {
    /// As it calls itself on its stream: `POD.NAMESPACE`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.pod, self.namespace)
    }
}

/// The nodes, and whether each is ready. Cloning shares it. The registry fills it as events come.
#[derive(Clone, Debug, Default)]
pub struct Nodes(Arc<RwLock<HashMap<Arc<str>, bool>>>);

impl Nodes {
    /// A node is this now.
    pub fn set(&self, name: &Arc<str>, decoded: &Decoded) {
        let ready = is_ready(decoded);
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), ready);
    }

    /// A node is gone.
    pub fn remove(&self, name: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Whether a node is ready; `None` when there is none of this name.
    #[must_use]
    pub fn is_ready(&self, name: &str) -> Option<bool> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }
}

fn is_ready(decoded: &Decoded) -> bool {
    let conditions = decoded.node.get("status").and_then(|s| s.get("conditions"));
    let Some(Value::Sequence(conditions)) = conditions.map(|c| &c.value) else { return false };
    let is = |c: &Node<'_>, field: &str, text: &str| c.get(field).and_then(Node::as_str) == Some(text);
    conditions.iter().any(|c| is(c, "type", "Ready") && is(c, "status", "True"))
}

/// A Lease as it was looked at last.
#[derive(Debug)]
struct Looked {
    renewed: Option<Timestamp>,
    at: Instant,
    /// For how long it was seen unchanged.
    unchanged: Duration,
}

/// The node proxies. Cloning shares what is known of them.
#[derive(Clone)]
pub struct Ztunnels {
    pods: PodTable,
    nodes: Nodes,
    leases: Arc<Mutex<HashMap<Arc<str>, Looked>>>,
    client: Option<Client>,
}

impl std::fmt::Debug for Ztunnels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ztunnels").finish_non_exhaustive()
    }
}

impl Ztunnels {
    /// Those of the accounts that `pods` follows ([`PodTable::follow`]). Without a client no Lease is looked at.
    #[must_use]
    pub fn new(pods: PodTable, nodes: Nodes, client: Option<Client>) -> Self {
        Self { pods, nodes, leases: Arc::default(), client }
    }

    /// All node proxies, the dead ones too, by name; `None` while they are not known, as after a start.
    #[must_use]
    pub fn list(&self) -> Option<Vec<Ztunnel>> {
        Some(self.with_life(self.pods.proxies()?))
    }

    /// All waypoints' pods, in the same way.
    #[must_use]
    pub fn waypoints(&self) -> Option<Vec<Ztunnel>> {
        Some(self.with_life(self.pods.waypoints()?))
    }

    fn with_life(&self, all: Vec<(Ztunnel, Instant)>) -> Vec<Ztunnel> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<Ztunnel> = all
            .into_iter()
            .map(|(mut ztunnel, since)| {
                match self.nodes.is_ready(&ztunnel.node) {
                    None if since.elapsed() >= NODE_LATENESS => {
                        ztunnel.life = Life::Dead("its node is gone");
                    }
                    Some(false) => ztunnel.life = Life::Dead("its node is not ready"),
                    _ if leases.get(&ztunnel.node).is_some_and(|l| l.unchanged >= HOLDS) => {
                        ztunnel.life = Life::Dead("its node's lease is over");
                    }
                    _ => {}
                }
                ztunnel
            })
            .collect();
        list.sort_by(|a, b| (&a.namespace, &a.pod).cmp(&(&b.namespace, &b.pod)));
        list
    }

    /// Looks at the Leases of nodes whose proxies do not say what they should, and of those that are over: to be called
    /// every few seconds. A Lease that can't be read is taken to hold.
    pub async fn look(&self, doubted: HashSet<Arc<str>>) {
        let Some(client) = &self.client else { return };
        let asked: Vec<Arc<str>> = {
            let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
            leases.retain(|node, _| self.nodes.is_ready(node).is_some());
            let over = leases.iter().filter(|(_, looked)| looked.unchanged >= HOLDS);
            let asked: HashSet<Arc<str>> = doubted.into_iter().chain(over.map(|(n, _)| n.clone())).collect();
            // Somebody else may doubt others.
            leases.retain(|node, looked| asked.contains(node) || looked.at.elapsed() < HOLDS);
            let mut due: Vec<_> = asked
                .into_iter()
                .map(|node| (leases.get(&node).map(|looked| looked.at), node))
                .filter(|(at, _)| at.is_none_or(|at| at.elapsed() >= LOOK))
                .collect();
            due.sort();
            due.into_iter().take(MOST_LEASES).map(|(_, node)| node).collect()
        };
        let api: Api<Lease> = Api::namespaced(client.clone(), LEASES);
        let answers = stream::iter(asked.into_iter().map(|node| {
            let api = &api;
            async move { (api.get_opt(&node).await, node) }
        }));
        let mut answers = answers.buffer_unordered(AT_A_TIME);
        while let Some((answer, node)) = answers.next().await {
            match answer {
                Ok(lease) => {
                    let renewed = lease.and_then(|l| l.spec).and_then(|s| s.renew_time).map(|time| time.0);
                    self.looked(node, renewed);
                }
                Err(error) => {
                    tracing::debug!(node = &*node, error = chain(&error), "a node's lease can't be read");
                }
            }
        }
    }

    fn looked(&self, node: Arc<str>, renewed: Option<Timestamp>) {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let at = Instant::now();
        let unchanged = leases.get(&node).filter(|last| last.renewed == renewed).map(|last| {
            // While nobody looked, as when the API server was away, the node may have been unable to renew it.
            last.unchanged + last.at.elapsed().min(2 * LOOK)
        });
        leases.insert(node, Looked { renewed, at, unchanged: unchanged.unwrap_or_default() });
    }
}

#[cfg(test)]
mod tests {
    use config::json::ObjectSeed;
    use config::resource::Kind;
    use serde::de::DeserializeSeed;
    use serde_json::{Value, json};

    use super::*;
    use crate::ca::Account;

    fn decode(kind: Kind, object: &Value) -> Decoded {
        let seed = ObjectSeed { kind, unknown: &|_, _| () };
        seed.deserialize(&mut serde_json::Deserializer::from_str(&object.to_string())).unwrap()
    }

    fn node(ready: &str) -> Decoded {
        let conditions = json!([
            { "type": "MemoryPressure", "status": "False" },
            { "type": "Ready", "status": ready, "lastHeartbeatTime": "2026-11-21T10:00:00Z" },
        ]);
        decode(Kind::Node, &json!({ "metadata": { "name": "n" }, "status": { "conditions": conditions } }))
    }

    fn pod(node: &str, account: &str, phase: &str) -> Decoded {
        let metadata = json!({
            "name": "p", "uid": "u", "labels": { "istio.io/rev": "next" },
            "annotations": { "culvert.dev/trusted-roots": "aa" },
        });
        let spec = json!({ "nodeName": node, "serviceAccountName": account });
        decode(Kind::Pod, &json!({ "metadata": metadata, "spec": spec, "status": { "phase": phase } }))
    }

    struct Mesh {
        pods: PodTable,
        nodes: Nodes,
        ztunnels: Ztunnels,
    }

    fn mesh() -> Mesh {
        let (pods, nodes) = (PodTable::default(), Nodes::default());
        pods.follow(vec![Account { namespace: "mesh".to_owned(), name: "ztunnel".to_owned() }]);
        let ztunnels = Ztunnels::new(pods.clone(), nodes.clone(), None);
        Mesh { pods, nodes, ztunnels }
    }

    impl Mesh {
        fn pod(&self, name: &str, decoded: &Decoded) {
            self.pods.set(&"mesh".into(), &name.into(), decoded);
        }

        fn lives(&self) -> Vec<(String, Life)> {
            self.ztunnels.list().unwrap().iter().map(|z| (z.name(), z.life)).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_is_dead_with_its_node_and_only_trusted_accounts_count() {
        let mesh = mesh();
        assert_eq!(mesh.ztunnels.list(), None, "nothing is known yet");
        for name in ["n1", "n2", "n3"] {
            mesh.nodes.set(&name.into(), &node(if name == "n2" { "Unknown" } else { "True" }));
        }
        mesh.pod("a", &pod("n1", "ztunnel", "Running"));
        mesh.pod("b", &pod("n2", "ztunnel", "Running"));
        mesh.pod("c", &pod("n3", "ztunnel", "Pending"));
        mesh.pod("d", &pod("n1", "ztunnel", "Failed"));
        mesh.pod("e", &pod("n1", "web", "Running"));
        mesh.pod("f", &pod("", "ztunnel", "Pending"));
        mesh.pod("g", &pod("n9", "ztunnel", "Running"));
        mesh.pods.set_ready();
        let of = |name: &str, life| (format!("{name}.mesh"), life);
        let mut wanted = vec![
            of("a", Life::Running),
            of("b", Life::Dead("its node is not ready")),
            of("c", Life::Starting),
            of("g", Life::Running),
        ];
        assert_eq!(mesh.lives(), wanted, "a node may be heard of later than its pods");
        tokio::time::advance(NODE_LATENESS).await;
        wanted[3].1 = Life::Dead("its node is gone");
        assert_eq!(mesh.lives(), wanted);
        let first = mesh.ztunnels.list().unwrap().remove(0);
        assert_eq!((first.revision.as_deref(), first.roots.as_deref()), (Some("next"), Some("aa")));

        mesh.nodes.set(&"n2".into(), &node("True"));
        mesh.pods.remove(&"mesh".into(), &"a".into());
        mesh.pod("c", &pod("n3", "web", "Running"));
        mesh.nodes.remove("n2");
        wanted = vec![of("b", Life::Dead("its node is gone")), wanted[3].clone()];
        assert_eq!(mesh.lives(), wanted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_over_when_it_was_seen_unchanged_for_so_long() {
        let mesh = mesh();
        mesh.nodes.set(&"n1".into(), &node("True"));
        mesh.pod("a", &pod("n1", "ztunnel", "Running"));
        mesh.pods.set_ready();
        let life = || mesh.lives()[0].1;
        let look = |second: i64| mesh.ztunnels.looked("n1".into(), Timestamp::from_second(second).ok());
        look(1);
        for _ in 0..4 {
            assert_eq!(life(), Life::Running);
            tokio::time::advance(LOOK).await;
            look(1);
        }
        assert_eq!(life(), Life::Dead("its node's lease is over"));
        look(2);
        assert_eq!(life(), Life::Running, "it was renewed");
        // Nobody looked for long: that says little.
        tokio::time::advance(HOLDS * 3).await;
        look(2);
        assert_eq!(life(), Life::Running);
    }

    #[tokio::test]
    async fn accounts_may_be_named_after_their_pods_are_known() {
        let mesh = mesh();
        mesh.pod("a", &pod("n1", "other", "Running"));
        mesh.pods.set_ready();
        assert_eq!(mesh.lives(), []);
        mesh.pods.follow(vec![Account { namespace: "mesh".to_owned(), name: "other".to_owned() }]);
        assert_eq!(mesh.lives().len(), 1);
    }
}
