//! What a cluster adds to the proxy: the control plane as the source of configuration, its CA, and the node agent.

use std::sync::Arc;
use std::time::Duration;

use ::xds::client::{Client, Event, NodeInfo, Observer, Settings};
use anyhow::Context as _;
use identity::{CaClient, CaClientSettings, CertificateSettings, Certificates, Clock, KeyStore};
use model::TrustDomains;
use process::metrics::{Counter, Description, Family, Handle, Kind, Registry};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Elided, MESH_SETTINGS_TYPE_URL};
use serde_json::{Value, json};

use crate::settings::{ClusterMode, Flags};
use crate::source::{Place, Xds, XdsStatus};
use crate::state::State;
use crate::tls::Tls;
use crate::zds::ZdsStatus;

/// What is known of the control plane and the node agent, for metrics and the admin page.
#[derive(Clone)]
pub struct ClusterStatus {
    /// The control plane.
    pub xds: Arc<XdsStatus>,
    /// The node agent.
    pub zds: Arc<ZdsStatus>,
}

/// The control plane as the source of configuration. What an earlier process kept in the state directory comes first.
///
/// # Errors
/// The state directory or the roots can't be used.
pub fn source(
    flags: &Flags,
    cluster: &ClusterMode,
    state: &Arc<State>,
    registry: &Registry,
) -> anyhow::Result<Xds> {
    let place = Place::take(&flags.state_dir).with_context(|| {
        format!("state directory {} (--state-dir names another)", flags.state_dir.display())
    })?;
    if place.is_none() {
        tracing::warn!(
            directory = %flags.state_dir.display(),
            "other processes have all places of the state directory: the configuration is not kept"
        );
    }
    let info = NodeInfo {
        ip: cluster.instance_ip,
        name: cluster.pod_name.clone(),
        namespace: cluster.pod_namespace.clone(),
        node_name: cluster.here.node.to_string(),
        cluster_id: cluster.here.cluster.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let settings = Settings {
        addresses: cluster.control_planes.iter().map(ToString::to_string).collect(),
        root_file: Some(cluster.root_file.clone()),
        token_file: Some(cluster.token_file.clone()),
        cluster_id: cluster.here.cluster.to_string(),
        node: info.node(),
        // Settings, and policies, before the workloads: by these alone nothing is decided.
        types: vec![MESH_SETTINGS_TYPE_URL, AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL],
        state_dir: place.as_ref().map(|place| place.path().to_owned()),
        ..Settings::default()
    };
    let (client, updates) = Client::new(settings, Arc::new(XdsMetrics::new(registry)))
        .context("the client of the control plane")?;
    let link = client.link();
    tokio::spawn(client.run());
    let elided = Elided { trust_domain: cluster.trust_domain.clone(), cluster: cluster.here.cluster.clone() };
    Ok(Xds::new(updates, place, link, state.clone(), defaults(cluster), elided))
}

/// The mesh's settings where the control plane does not tell them.
pub fn defaults(cluster: &ClusterMode) -> model::Settings {
    let trust_domains = TrustDomains::only(cluster.trust_domain.clone());
    model::Settings { trust_domains, ..model::Settings::default() }
}

/// Certificates of the CA of the cluster; what --key-dir kept, while it is away.
///
/// # Errors
/// The roots can't be used.
pub fn tls(flags: &Flags, cluster: &ClusterMode) -> anyhow::Result<Tls> {
    let clock = Clock::system();
    let store = flags.key_dir.as_deref().map(KeyStore::open).transpose().context("--key-dir")?;
    let (token, id) = (cluster.token_file.clone(), cluster.here.cluster.to_string());
    let settings = CaClientSettings {
        lifetime: Duration::from_secs(flags.certificate_ttl),
        ..CaClientSettings::new(cluster.authorities.clone(), token, id)
    };
    let domains = TrustDomains::only(cluster.trust_domain.clone());
    let issuer = CaClient::start(settings, &cluster.root_file, store.clone(), domains, clock.clone())
        .context("the client of the certificate authority")?;
    let bundle = issuer.bundle().clone();
    let settings = CertificateSettings::default();
    Ok(Tls::new(Arc::new(Certificates::new(Arc::new(issuer), bundle, settings, store, clock))))
}

impl ClusterStatus {
    /// Registers the metrics of a cluster.
    pub fn register(&self, registry: &Registry) {
        let number = |name, help, kind, read: fn(&Self) -> u64| {
            let status = self.clone();
            registry
                .collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&status)));
        };
        number("culvert_xds_connected", "Whether a control plane is connected", Kind::Gauge, |s| {
            s.xds.is_connected().into()
        });
        number(
            "culvert_xds_kept_state",
            "Whether this node works by the configuration that an earlier process kept",
            Kind::Gauge,
            |s| s.xds.runs_from_kept_state().into(),
        );
        number("culvert_xds_updates", "Updates of the control plane put in force", Kind::Counter, |s| {
            s.xds.updates()
        });
        number("culvert_xds_resources", "Resources in them", Kind::Counter, |s| s.xds.resources());
        number(
            "culvert_xds_resources_refused",
            "Resources that could not be read; the last good version stays in force",
            Kind::Counter,
            |s| s.xds.rejected(),
        );
        number("culvert_zds_connected", "Whether the node agent is connected", Kind::Gauge, |s| {
            s.zds.is_connected().into()
        });
        number("culvert_zds_connections", "Connections made to the node agent", Kind::Counter, |s| {
            s.zds.connections()
        });
        number("culvert_zds_messages", "Messages of the node agent", Kind::Counter, |s| s.zds.messages());
        number(
            "culvert_zds_messages_refused",
            "Messages of the node agent that were answered with an error",
            Kind::Counter,
            |s| s.zds.refused(),
        );
        number("culvert_zds_pods", "Pods that the node agent has told of", Kind::Gauge, |s| {
            s.zds.pods() as u64
        });
    }

    /// As JSON, for `/config_dump`.
    pub fn dump(&self) -> Value {
        let zds = &self.zds;
        json!({
            "controlPlane": self.xds.dump(),
            "nodeAgent": {
                "connected": zds.is_connected(),
                "connections": zds.connections(),
                "messages": zds.messages(),
                "refused": zds.refused(),
                "pods": zds.pods(),
            },
        })
    }
}

/// A label and its value.
type Label = [(&'static str, Arc<str>); 1];

/// The metrics of the client's connection, with the names of Istio's ztunnel (facts 4.12).
struct XdsMetrics {
    terminations: Arc<Family<Label, Counter>>,
    messages: Arc<Family<Label, Counter>>,
    bytes: Arc<Family<Label, Counter>>,
    state_lost: Handle<(), Counter>,
}

impl XdsMetrics {
    fn new(registry: &Registry) -> Self {
        Self {
            terminations: registry.counters(
                "istio_xds_connection_terminations",
                "Connections to control planes that ended or were not made",
            ),
            messages: registry.counters("istio_xds_message", "Messages of control planes"),
            bytes: registry.counters("istio_xds_message_bytes", "Bytes of the messages of control planes"),
            state_lost: registry.counter(
                "culvert_xds_state_lost",
                "Times that the last good configuration could not be kept, or not be read",
            ),
        }
    }
}

impl Observer for XdsMetrics {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Terminated(why) => self.terminations.with(&[("reason", why.as_str().into())]).inc(),
            Event::Message { type_url, bytes } => {
                let url = [("url", type_url.into())];
                self.messages.with(&url).inc();
                self.bytes.with(&url).add(bytes as u64);
            }
            Event::StateLost(why) => {
                tracing::error!(why, "the last good configuration is not kept, or was not read");
                self.state_lost.inc();
            }
            // Counted where they are read.
            Event::Connected(_) | Event::Rejected { .. } => {}
        }
    }
}
