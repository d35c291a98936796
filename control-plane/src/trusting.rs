//! Who must know of a new root before it signs, and what each has said of the roots that it trusts:
//!
//! * the proxies of nodes, by their pods, those that are dead with their node left out, by name and with the reason;
//! * waypoints, and the replicas of the control plane, of all revisions: whoever has said it once counts for as long as
//!   its pod lives. Of pods in other namespaces that is so for waypoints only;
//! * the webhooks' configurations of all revisions: through them the API server judges the control plane's certificates.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use identity::{RootId, certificates_from_pem};
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::Client;
use kube::api::{Api, ListParams, ObjectMeta};
use tokio::sync::watch;

use crate::alive::{Life, Nodes, Ztunnels};
use crate::ca::{Fleet, Proxy, TRUSTED_ROOTS, trusted_roots};
use crate::pods::PodTable;
use crate::source::chain;

/// How often the webhooks' configurations are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// See the module.
pub struct Trusting {
    /// The pods.
    pub pods: PodTable,
    /// The nodes.
    pub nodes: Nodes,
    /// The proxies of nodes; nobody else's, since it has doubts of its own.
    pub ztunnels: Ztunnels,
    /// The namespaces of the mesh's own pods.
    pub namespaces: BTreeSet<String>,
    /// This revision's webhook configurations, with the roots that they were last seen with; `None` where there are none.
    pub webhook: Arc<dyn Fn() -> Option<Proxy> + Send + Sync>,
    /// Those of other revisions.
    pub others: Bundles,
}

impl Fleet for Trusting {
    fn proxies(&self) -> Option<Vec<Proxy>> {
        let ztunnels = self.ztunnels.list()?.into_iter().filter(|z| z.life == Life::Running);
        let mut all: Vec<Proxy> = ztunnels
            .map(|z| proxy(format!("{}/{} (node {})", z.namespace, z.pod, z.node), z.roots.as_deref()))
            .collect();
        let reporters = self.pods.reporters(&self.namespaces).into_iter();
        let live = reporters.filter(|reporter| self.nodes.is_ready(&reporter.node) != Some(false));
        all.extend(live.map(|r| proxy(format!("{}/{}", r.namespace, r.pod), Some(&r.roots))));
        all.extend((self.webhook)());
        all.extend(self.others.list()?);
        Some(all)
    }

    fn dead(&self) -> Vec<String> {
        let all = self.ztunnels.list().unwrap_or_default().into_iter();
        all.filter_map(|z| match z.life {
            Life::Dead(reason) => Some(format!("{}/{} ({reason}: {})", z.namespace, z.pod, z.node)),
            Life::Starting | Life::Running => None,
        })
        .collect()
    }

    fn doubt<'a>(&'a self, laggards: &'a [String]) -> BoxFuture<'a, ()> {
        let known = self.ztunnels.list().unwrap_or_default().into_iter();
        let named = |pod: &str| laggards.iter().any(|name| name.starts_with(pod));
        let nodes: HashSet<Arc<str>> =
            known.filter(|z| named(&format!("{}/{} ", z.namespace, z.pod))).map(|z| z.node).collect();
        Box::pin(self.ztunnels.look(nodes))
    }
}

fn proxy(name: String, roots: Option<&str>) -> Proxy {
    let said: BTreeMap<String, String> =
        roots.map(|roots| (TRUSTED_ROOTS.to_owned(), roots.to_owned())).into_iter().collect();
    Proxy { name, trusts: trusted_roots(&said) }
}

/// The webhook configurations of other revisions in the same namespace, with the roots in their `caBundle`. Clones
/// share it.
#[derive(Clone, Debug, Default)]
pub struct Bundles(Arc<Mutex<Option<Vec<Proxy>>>>);

impl Bundles {
    /// All; `None` before they were listed.
    #[must_use]
    pub fn list(&self) -> Option<Vec<Proxy>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lists them now and then while this control plane leads; `own` is the name of its own, and `namespace` where its
    /// Service is. Needs the permission to `list` both kinds. Runs until the process ends.
    pub async fn follow(
        self,
        client: Client,
        namespace: String,
        own: String,
        mut leads: watch::Receiver<bool>,
    ) {
        let mut told = String::new();
        loop {
            if leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            match look(&client, &namespace, &own).await {
                Ok(found) => {
                    *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
                    told.clear();
                }
                Err(error) if error != told => {
                    tracing::warn!(
                        "an exchange of the root waits: the webhooks' configurations can't be listed: {error}"
                    );
                    told = error;
                }
                Err(_) => {}
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn look(client: &Client, namespace: &str, own: &str) -> Result<Vec<Proxy>, String> {
    let params = ListParams::default().labels("app=culvertd");
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let mut found = Vec::new();
    for configuration in validating.list(&params).await.map_err(|e| chain(&e))? {
        let webhooks = configuration.webhooks.iter().flatten().map(|webhook| &webhook.client_config);
        found.extend(of("ValidatingWebhookConfiguration", &configuration.metadata, webhooks, namespace));
    }
    for configuration in mutating.list(&params).await.map_err(|e| chain(&e))? {
        let webhooks = configuration.webhooks.iter().flatten().map(|webhook| &webhook.client_config);
        found.extend(of("MutatingWebhookConfiguration", &configuration.metadata, webhooks, namespace));
    }
    found.retain(|proxy| proxy.name.split_once(' ').is_some_and(|(_, name)| name != own));
    Ok(found)
}

/// A configuration and the roots that all of its webhooks in this namespace are judged by; `None` without such webhooks.
fn of<'a>(
    kind: &str,
    metadata: &ObjectMeta,
    webhooks: impl Iterator<Item = &'a WebhookClientConfig>,
    namespace: &str,
) -> Option<Proxy> {
    let ours = webhooks.filter(|client| client.service.as_ref().is_some_and(|s| s.namespace == namespace));
    let roots = ours.map(|client| bundled(client.ca_bundle.as_ref().map_or(&[][..], |bundle| &bundle.0)));
    let all = roots.reduce(|all, one| all.into_iter().filter(|root| one.contains(root)).collect())?;
    Some(Proxy { name: format!("{kind} {}", metadata.name.as_deref().unwrap_or_default()), trusts: all })
}

fn bundled(pem: &[u8]) -> Vec<RootId> {
    let roots = certificates_from_pem("caBundle", pem).unwrap_or_default();
    roots.iter().filter_map(RootId::of_certificate).collect()
}

#[cfg(test)]
mod tests {
    use config::json::{Decoded, ObjectSeed};
    use config::resource::Kind;
    use identity::{CertificateAuthority, Clock, Validity, certificates_to_pem};
    use k8s_openapi::ByteString;
    use k8s_openapi::api::admissionregistration::v1::ServiceReference;
    use model::TrustDomain;
    use serde::de::DeserializeSeed;
    use serde_json::{Value, json};

    use super::*;
    use crate::ca::Account;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn decode(kind: Kind, object: &Value) -> Decoded {
        let seed = ObjectSeed { kind, unknown: &|_, _| () };
        seed.deserialize(&mut serde_json::Deserializer::from_str(&object.to_string())).unwrap()
    }

    struct Mesh {
        pods: PodTable,
        nodes: Nodes,
        trusting: Trusting,
    }

    impl Mesh {
        fn new() -> Self {
            let (pods, nodes) = (PodTable::default(), Nodes::default());
            pods.follow(vec![Account { namespace: "mesh".to_owned(), name: "ztunnel".to_owned() }]);
            let trusting = Trusting {
                ztunnels: Ztunnels::new(pods.clone(), nodes.clone(), None),
                pods: pods.clone(),
                nodes: nodes.clone(),
                namespaces: BTreeSet::from(["mesh".to_owned()]),
                webhook: Arc::new(|| None),
                others: Bundles(Arc::new(Mutex::new(Some(Vec::new())))),
            };
            Self { pods, nodes, trusting }
        }

        fn pod(
            &self,
            (namespace, name): (&str, &str),
            account: &str,
            node: &str,
            said: bool,
            waypoint: bool,
        ) {
            let annotations = if said { json!({ TRUSTED_ROOTS: A }) } else { json!({}) };
            let labels = if waypoint {
                json!({ "gateway.istio.io/managed": "istio.io-mesh-controller" })
            } else {
                json!({})
            };
            let object = json!({
                "metadata": { "name": name, "uid": name, "annotations": annotations, "labels": labels },
                "spec": { "nodeName": node, "serviceAccountName": account }, "status": { "phase": "Running" },
            });
            self.pods.set(&namespace.into(), &name.into(), &decode(Kind::Pod, &object));
        }

        fn node(&self, name: &str, ready: &str) {
            let conditions = json!([{ "type": "Ready", "status": ready }]);
            let object = json!({ "metadata": { "name": name }, "status": { "conditions": conditions } });
            self.nodes.set(&name.into(), &decode(Kind::Node, &object));
        }

        fn names(&self) -> Vec<(String, usize)> {
            let all = self.trusting.proxies().unwrap();
            all.into_iter().map(|proxy| (proxy.name, proxy.trusts.len())).collect()
        }
    }

    #[tokio::test]
    async fn live_proxies_count_and_dead_ones_are_named() {
        let mesh = Mesh::new();
        assert_eq!(mesh.trusting.proxies(), None, "nothing is known yet");
        mesh.node("n1", "True");
        mesh.node("n2", "Unknown");
        mesh.pod(("mesh", "z1"), "ztunnel", "n1", true, false);
        mesh.pod(("mesh", "z2"), "ztunnel", "n2", false, false);
        mesh.pod(("mesh", "z3"), "ztunnel", "n1", false, false);
        mesh.pods.set_ready();
        let of = |name: &str, roots| (name.to_owned(), roots);
        assert_eq!(mesh.names(), [of("mesh/z1 (node n1)", 1), of("mesh/z3 (node n1)", 0)]);
        assert_eq!(mesh.trusting.dead(), ["mesh/z2 (its node is not ready: n2)"]);
        mesh.node("n2", "True");
        assert_eq!(mesh.names()[1], of("mesh/z2 (node n2)", 0), "it is back");
        assert_eq!(mesh.trusting.dead(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn replicas_and_waypoints_count_when_they_have_said_something_and_nobody_else_does() {
        let mesh = Mesh::new();
        mesh.node("n1", "True");
        mesh.node("n2", "False");
        mesh.pod(("mesh", "culvertd-1"), "culvertd", "n1", true, false);
        mesh.pod(("mesh", "culvertd-2"), "culvertd", "n2", true, false);
        mesh.pod(("mesh", "other"), "other", "n1", false, false);
        mesh.pod(("shop", "waypoint-1"), "waypoint", "n1", true, true);
        mesh.pod(("shop", "waypoint-2"), "waypoint", "n1", false, true);
        // Whoever may write pods in his namespace holds no rotation.
        mesh.pod(("shop", "cart"), "cart", "n1", true, false);
        mesh.pods.set_ready();
        let names: Vec<String> = mesh.names().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["mesh/culvertd-1", "shop/waypoint-1"]);
        use crate::ca::Pods;
        assert!(mesh.pods.is_waypoint("shop", "waypoint-2") && !mesh.pods.is_waypoint("shop", "cart"));
        // Before the webhooks were listed, it is not known who all is.
        *mesh.trusting.others.0.lock().unwrap() = None;
        assert_eq!(mesh.trusting.proxies(), None);
    }

    #[test]
    fn a_root_is_known_to_a_configuration_when_all_its_webhooks_have_it() {
        let made = || {
            let now = Clock::system().now();
            CertificateAuthority::make_root(&TrustDomain::cluster_local(), Validity::of_roots(), now)
                .unwrap()
                .chain
        };
        let (a, b) = (made(), made());
        let id = |root: &[_]| RootId::of_certificate(&root[0]).unwrap();
        let client = |namespace: &str, pem: String| WebhookClientConfig {
            ca_bundle: Some(ByteString(pem.into_bytes())),
            service: Some(ServiceReference {
                namespace: namespace.to_owned(),
                ..ServiceReference::default()
            }),
            url: None,
        };
        let both = certificates_to_pem(a.iter().chain(&b));
        let metadata = ObjectMeta { name: Some("next".to_owned()), ..ObjectMeta::default() };
        let look = |clients: &[WebhookClientConfig]| of("Kind", &metadata, clients.iter(), "mesh");
        let found = look(&[client("mesh", both.clone()), client("elsewhere", String::new())]).unwrap();
        assert_eq!((&*found.name, found.trusts), ("Kind next", vec![id(&a), id(&b)]));
        let found = look(&[client("mesh", both), client("mesh", certificates_to_pem(&a))]).unwrap();
        assert_eq!(found.trusts, [id(&a)]);
        assert_eq!(look(&[client("mesh", String::new())]).unwrap().trusts, []);
        assert_eq!(look(&[client("elsewhere", String::new())]), None);
    }
}
