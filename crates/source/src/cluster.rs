//! What a mode comes to: its configuration that is followed, and its certificates.

use std::sync::Arc;
use std::time::Duration;

use ::xds::client::{Client, Event, NodeInfo, Observer, Settings};
use anyhow::Context as _;
use identity::{
    CaClient, CaClientSettings, CaDirectory, CertificateSettings, Certificates, Clock, Issuer, KeyStore,
    LocalIssuer, LocalIssuerSettings, Validity,
};
use model::TrustDomains;
use model::http::WaypointKey;
use process::metrics::{Counter, Description, Family, Handle, Kind, Registry};
use proto::Elided;

use crate::{
    ClusterMode, FileMode, NODE_TYPES, Place, RawSettings, State, Tls, WAYPOINT_TYPES, Xds, XdsStatus,
};

impl FileMode {
    /// The CA of the directory, and the certificates that it issues; what --key-dir kept, while the CA is away.
    ///
    /// # Errors
    /// The directory holds no CA that can be used, and none can be made.
    pub fn tls(&self, flags: &RawSettings, state: &State) -> anyhow::Result<Tls> {
        let domains = state.mesh().settings().trust_domains.clone();
        let (clock, store) = (Clock::system(), key_store(flags)?);
        let lifetime = Duration::from_secs(flags.certificate_ttl);
        let validity = Validity { lifetime, ..Validity::of_workloads() };
        let settings = LocalIssuerSettings { validity, ..LocalIssuerSettings::default() };
        let directory = CaDirectory::named(&self.ca_dir);
        let issuer = LocalIssuer::start_kept(directory, store.clone(), domains, settings, clock.clone())
            .with_context(|| format!("certificate authority {}", self.ca_dir.display()))?;
        let bundle = issuer.bundle().clone();
        Ok(certificates(issuer, bundle, store, clock))
    }
}

impl ClusterMode {
    /// Certificates of the CA of the cluster; what --key-dir kept, while it is away.
    ///
    /// # Errors
    /// The roots can't be used.
    pub fn tls(&self, flags: &RawSettings) -> anyhow::Result<Tls> {
        let (clock, store) = (Clock::system(), key_store(flags)?);
        let (token, id) = (self.token_file.clone(), self.cluster.to_string());
        let settings = CaClientSettings {
            lifetime: Duration::from_secs(flags.certificate_ttl),
            ..CaClientSettings::new(self.authorities.clone(), token, id)
        };
        let domains = TrustDomains::only(self.trust_domain.clone());
        let issuer = CaClient::start(settings, &self.root_file, store.clone(), domains, clock.clone())
            .context("the client of the certificate authority")?;
        let bundle = issuer.bundle().clone();
        Ok(certificates(issuer, bundle, store, clock))
    }

    /// The mesh's settings where the control plane does not tell them.
    #[must_use]
    pub fn defaults(&self) -> model::Settings {
        let trust_domains = TrustDomains::only(self.trust_domain.clone());
        model::Settings { trust_domains, ..model::Settings::default() }
    }

    /// The control plane as the source of configuration, for a proxy on `node`: that of the node, or `gateway` as a
    /// waypoint. What an earlier process kept in the state directory comes first.
    ///
    /// # Errors
    /// The state directory or the roots can't be used.
    pub fn source(
        &self,
        flags: &RawSettings,
        node: &str,
        gateway: Option<&WaypointKey>,
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
            ip: self.instance_ip,
            name: self.pod_name.clone(),
            namespace: self.pod_namespace.clone(),
            node_name: node.to_owned(),
            cluster_id: self.cluster.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let (types, node) = match gateway {
            Some(gateway) => (WAYPOINT_TYPES.to_vec(), info.waypoint(&gateway.to_string())),
            None => (NODE_TYPES.to_vec(), info.node()),
        };
        let settings = Settings {
            addresses: self.control_planes.iter().map(ToString::to_string).collect(),
            root_file: Some(self.root_file.clone()),
            token_file: Some(self.token_file.clone()),
            cluster_id: self.cluster.to_string(),
            node,
            types: types.clone(),
            state_dir: place.as_ref().map(|place| place.path().to_owned()),
            ..Settings::default()
        };
        let (client, updates) = Client::new(settings, Arc::new(XdsMetrics::new(registry)))
            .context("the client of the control plane")?;
        let link = client.link();
        tokio::spawn(client.run());
        let elided = Elided { trust_domain: self.trust_domain.clone(), cluster: self.cluster.clone() };
        Ok(Xds::new(updates, &types, place, link, state.clone(), self.defaults(), elided))
    }
}

fn key_store(flags: &RawSettings) -> anyhow::Result<Option<KeyStore>> {
    flags.key_dir.as_deref().map(KeyStore::open).transpose().context("--key-dir")
}

fn certificates(
    issuer: impl Issuer,
    bundle: identity::TrustBundle,
    store: Option<KeyStore>,
    clock: Clock,
) -> Tls {
    // With its own random seed: a process has the same number in the containers of all nodes.
    let settings = CertificateSettings::default();
    Tls::new(Arc::new(Certificates::new(Arc::new(issuer), bundle, settings, store, clock)))
}

impl XdsStatus {
    /// Registers the metrics of the control plane's configuration.
    pub fn register(self: &Arc<Self>, registry: &Registry) {
        let number = |name, help, kind, read: fn(&Self) -> u64| {
            let status = self.clone();
            registry
                .collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&status)));
        };
        number("culvert_xds_connected", "Whether a control plane is connected", Kind::Gauge, |s| {
            s.is_connected().into()
        });
        number(
            "culvert_xds_kept_state",
            "Whether this proxy works by the configuration that an earlier process kept",
            Kind::Gauge,
            |s| s.runs_from_kept_state().into(),
        );
        number(
            "culvert_xds_updates",
            "Updates of the control plane put in force",
            Kind::Counter,
            Self::updates,
        );
        number("culvert_xds_resources", "Resources in them", Kind::Counter, Self::resources);
        number(
            "culvert_xds_resources_refused",
            "Resources that could not be read; the last good version stays in force",
            Kind::Counter,
            Self::rejected,
        );
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
