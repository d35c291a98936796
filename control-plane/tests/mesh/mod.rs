//! What the control plane's tests share: objects as events, a root of their own, and servers under it.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use config::json::ObjectSeed;
use config::resource::Kind;
use control_plane::registry::{OTHERS, Registry, Settings};
use control_plane::source::{Change, Event};
use identity::{CertificateAuthority, Clock, ServingKey, TrustBundle, Validity, certificates_to_pem};
use model::{TrustDomain, TrustDomains};
use rustls_pki_types::CertificateDer;
use serde::de::DeserializeSeed;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

/// A root, and a serving certificate under it for `localhost` and 127.0.0.1.
pub struct Root {
    pub pem: String,
    pub roots: Vec<CertificateDer<'static>>,
    pub serving: ServingKey,
    authority: CertificateAuthority,
}

impl Root {
    pub fn new() -> Self {
        // Another test may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let now = Clock::system().now();
        let domain = TrustDomain::cluster_local();
        let made = CertificateAuthority::make_root(&domain, Validity::of_roots(), now).unwrap();
        let bundle = TrustBundle::new(&made.chain, TrustDomains::only(domain)).unwrap();
        let authority = CertificateAuthority::new(&made.chain, &made.key, &bundle, now).unwrap();
        let pem = certificates_to_pem(&made.chain);
        let serving = serving(&authority, &["localhost".to_owned(), "127.0.0.1".to_owned()]);
        Self { pem, roots: made.chain, serving, authority }
    }

    /// A certificate for another name.
    pub fn serving_as(&self, name: &str) -> ServingKey {
        serving(&self.authority, &[name.to_owned()])
    }

    pub fn server_config(&self, alpn: &[&[u8]]) -> Arc<rustls::ServerConfig> {
        self.serving.server_config(alpn, &Clock::system()).unwrap()
    }

    pub fn client_config(&self) -> Arc<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(self.roots.iter().cloned());
        Arc::new(rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
    }
}

fn serving(authority: &CertificateAuthority, names: &[String]) -> ServingKey {
    let (issued, _) = authority.issue_server(names, Validity::of_workloads(), Clock::system().now()).unwrap();
    let serving = ServingKey::default();
    serving.set(issued).unwrap();
    serving
}

pub fn event(kind: Kind, change: Change) -> Event {
    Event { kind, at: Instant::now(), change }
}

pub fn set(kind: Kind, object: &Value) -> Event {
    let decoded = ObjectSeed { kind, unknown: &|_, _| () }.deserialize(object).unwrap();
    event(kind, Change::Set(Box::new(decoded)))
}

pub fn gone(kind: Kind, namespace: &str, name: &str) -> Event {
    event(kind, Change::Gone { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// A registry, and the count of lists that it asked for.
pub fn registry() -> (Registry, watch::Receiver<u64>) {
    registry_that(|_| ())
}

/// The same, with other settings.
pub fn registry_that(change: impl FnOnce(&mut Settings)) -> (Registry, watch::Receiver<u64>) {
    let mut settings = Settings {
        options: config::compile::Options {
            root_namespace: "culvert-system".into(),
            origin: config::compile::Origin::Cluster,
            ..config::compile::Options::default()
        },
        settings: ("culvert-system".to_owned(), "culvert".to_owned()),
        revision: "default".to_owned(),
        own_namespaces: ["culvert-system", "proxies"].map(str::to_owned).into(),
        settings_optional: true,
    };
    change(&mut settings);
    let (relist, relists) = watch::channel(0);
    (Registry::new(settings, relist, Box::new(|| ())), relists)
}

/// Lists of namespaces and of the settings, complete.
pub fn first_lists(registry: &mut Registry, namespaces: &[(&str, Value)], mesh: Option<&str>) {
    registry.take(event(Kind::ConfigMap, Change::Listing));
    if let Some(mesh) = mesh {
        registry.take(set(Kind::ConfigMap, &settings(mesh, "1")));
    }
    registry.take(event(Kind::ConfigMap, Change::Listed));
    registry.take(event(Kind::Namespace, Change::Listing));
    for (name, labels) in namespaces {
        registry.take(set(Kind::Namespace, &namespace(name, labels, "1")));
    }
    registry.take(event(Kind::Namespace, Change::Listed));
    assert!(registry.commit(Instant::now()).is_none(), "nothing is given out before all lists are there");
}

/// Lists of all other kinds, complete, with these objects.
pub fn other_lists(registry: &mut Registry, objects: Vec<Event>) {
    let mut by_kind: BTreeMap<Kind, Vec<Event>> = BTreeMap::new();
    for event in objects {
        by_kind.entry(event.kind).or_default().push(event);
    }
    for kind in OTHERS {
        registry.take(event(kind, Change::Listing));
        by_kind.remove(&kind).into_iter().flatten().for_each(|event| registry.take(event));
        registry.take(event(kind, Change::Listed));
    }
}

pub fn settings(mesh: &str, version: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "culvert", "namespace": "culvert-system", "resourceVersion": version },
        "data": { "mesh": mesh },
    })
}

pub fn namespace(name: &str, labels: &Value, version: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": name, "labels": labels, "resourceVersion": version },
    })
}

pub fn pod(namespace: &str, name: &str, ip: &str, version: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("uid-{name}"), "resourceVersion": version,
            "labels": { "app": "web" },
            "annotations": { "ambient.istio.io/redirection": "enabled" },
        },
        "spec": {
            "nodeName": "node1", "serviceAccountName": "web",
            "containers": [{ "name": "web", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        },
    })
}

pub fn service(namespace: &str, name: &str, ip: &str) -> Value {
    json!({
        "metadata": { "name": name, "namespace": namespace, "resourceVersion": "1" },
        "spec": {
            "clusterIP": ip, "clusterIPs": [ip], "selector": { "app": "web" },
            "ports": [{ "name": "http", "port": 80, "targetPort": "http" }],
        },
    })
}

pub fn policy(namespace: &str, name: &str, spec: &Value, generation: i64) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("uid-{name}"), "generation": generation,
            "resourceVersion": format!("{generation}"),
        },
        "spec": spec,
    })
}
