//! The certificate authority of the mesh: it gives workloads their identities, keeps its root, exchanges it in stages,
//! and tells everybody whom to trust.
//!
//! ```text
//!   token ─▶ authenticate ─▶ authorize ─▶ CSR ─▶ sign ─▶ chain, and all roots        service.rs
//!            TokenReview      Pods                ▲
//!                                                 │
//!   Secret culvert-ca-secret ◀──── keeper.rs ──▶ current.rs ──▶ serving.rs     15012, 15017
//!   Secret cacerts ───────────────▶  │  ▲           └────────▶ distribute.rs  ConfigMaps, ClusterTrustBundle
//!                                    ▼  │
//!                             rotation.rs (pure) ◀── Fleet: who is live, and what it has said to trust
//!                                                          ▲
//!   proxy ── TrustedRoots in a request ──── reports.rs ── annotation culvert.dev/trusted-roots of its pod
//! ```
//!
//! What the rest of the control plane does for it:
//! * [`Pods`]: which pods there are; [`Fleet`]: which proxies are live and what their pods' annotation says
//!   ([`trusted_roots`]), the webhooks' `caBundle` as one more; the namespaces of our discovery; who leads;
//! * [`Ca::service`] goes onto the gRPC server of 15012, behind [`Ca::server_config`]; [`Ca::run`] runs beside it;
//! * it is ready when [`Ca::wait_ready`] returns.
//!
//! Invariants: who signs is trusted; nobody gets an identity that does not run where he is; a private key is in memory
//! and in the Secret, nowhere else; no token is in a log.

mod authenticate;
mod authorize;
mod current;
mod distribute;
mod keeper;
mod limits;
mod metrics;
pub mod record;
mod reports;
pub mod rotation;
mod service;
mod serving;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use identity::{Clock, ServingKey, Validity};
use kube::Client;
use model::TrustDomains;
use process::metrics::Registry;
use proto::wire::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use tokio::sync::watch;

pub use authenticate::{
    AUDIENCE, AuthenticationError, Authenticator, BoundPod, Caller, KubeReviewer, Reviewer,
};
pub use authorize::{Account, Denied, PodFacts, Pods, Rules, decide};
pub use current::{CaStatus, Current, InForce};
pub use distribute::{CONFIG_MAP, Namespaces, OWN_CONFIG_MAP, TRUST_BUNDLE};
pub use keeper::{ABANDON, ACCEPT, Fleet, GIVEN_SECRET, Keeper, KeeperSettings, ROTATE, SECRET, STATUS};
pub use metrics::CaCounters;
pub use reports::{KubeRecorder, Recorder, TRUSTED_ROOTS, trusted_roots};
pub use rotation::Proxy;
pub use service::{CaService, ServiceSettings};
pub use serving::service_names;

/// How the CA is run.
#[derive(Clone, Debug)]
pub struct CaSettings {
    /// Where its Secrets are.
    pub namespace: String,
    /// The cluster that tokens are of (`--cluster-id`).
    pub cluster_id: String,
    /// The accounts of the proxies of nodes.
    pub trusted: Vec<Account>,
    /// How long a certificate is valid when nothing is asked for.
    pub default_lifetime: Duration,
    /// The longest that is given.
    pub max_lifetime: Duration,
    /// This control plane's own pod.
    pub pod: String,
    /// The namespaces of the mesh's own pods, which get [`OWN_CONFIG_MAP`].
    pub own_namespaces: BTreeSet<String>,
    /// The names in the control plane's own certificate ([`service_names`]).
    pub serving_names: Vec<String>,
}

impl CaSettings {
    /// The usual: 24 hours, the proxy of nodes is `NAMESPACE/ztunnel`, the Service is `culvertd`.
    #[must_use]
    pub fn new(namespace: &str, cluster_id: &str) -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            namespace: namespace.to_owned(),
            cluster_id: cluster_id.to_owned(),
            trusted: vec![Account { namespace: namespace.to_owned(), name: "ztunnel".to_owned() }],
            default_lifetime: day,
            max_lifetime: day,
            pod: "culvertd".to_owned(),
            own_namespaces: BTreeSet::from([namespace.to_owned()]),
            serving_names: service_names("culvertd", namespace, "cluster.local"),
        }
    }
}

/// The CA of this replica; clones share it.
#[derive(Clone, Debug)]
pub struct Ca {
    settings: Arc<CaSettings>,
    current: Current,
    serving: ServingKey,
    counters: Arc<CaCounters>,
}

impl Ca {
    /// Nothing is in force yet.
    #[must_use]
    pub fn new(settings: CaSettings, domains: TrustDomains, clock: Clock, registry: &Registry) -> Self {
        let current = Current::new(domains, clock);
        let counters = Arc::default();
        metrics::register(registry, &counters, &current);
        Self { settings: Arc::new(settings), current, serving: ServingKey::default(), counters }
    }

    /// What is in force, its changes and its status. The roots for `caBundle` are in [`InForce::roots_pem`].
    #[must_use]
    pub fn current(&self) -> &Current {
        &self.current
    }

    /// The gRPC service, with the API server reviewing tokens and keeping reports.
    #[must_use]
    pub fn service(&self, client: Client, pods: Arc<dyn Pods>) -> IstioCertificateServiceServer<CaService> {
        let reviewer = KubeReviewer::new(client.clone());
        self.service_with(reviewer, pods, Arc::new(KubeRecorder::new(client)))
    }

    /// As [`Ca::service`], with another reviewer and recorder.
    #[must_use]
    pub fn service_with(
        &self,
        reviewer: impl Reviewer,
        pods: Arc<dyn Pods>,
        recorder: Arc<dyn Recorder>,
    ) -> IstioCertificateServiceServer<CaService> {
        let settings = ServiceSettings {
            cluster_id: self.settings.cluster_id.clone(),
            trusted: self.settings.trusted.clone(),
            default_lifetime: self.settings.default_lifetime,
            max_lifetime: self.settings.max_lifetime,
        };
        let authenticator = Authenticator::new(reviewer, self.current.clock().clone());
        let service = CaService::new(
            settings,
            self.current.clone(),
            authenticator,
            pods,
            recorder,
            self.counters.clone(),
        );
        IstioCertificateServiceServer::new(service).max_decoding_message_size(service::MAX_MESSAGE)
    }

    /// TLS for a server of this control plane, with its own certificate as it is renewed. ADS and the CA speak `h2`,
    /// webhooks `http/1.1` too. Handshakes fail until [`Ca::wait_ready`] has returned.
    ///
    /// # Errors
    /// The library does not know the protocol version, which does not happen.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<Arc<rustls::ServerConfig>, rustls::Error> {
        self.serving.server_config(alpn, self.current.clock())
    }

    /// Waits until there is an authority and a serving certificate.
    pub async fn wait_ready(&self) {
        let mut changes = self.current.subscribe();
        while self.current.get().is_none() {
            if changes.changed().await.is_err() {
                return;
            }
        }
        while !self.serving.is_set() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Keeps the root, the serving certificate, and what is told to the cluster. Runs until the process ends.
    pub async fn run(
        self,
        client: Client,
        fleet: Arc<dyn Fleet>,
        namespaces: Namespaces,
        leads: watch::Receiver<bool>,
    ) {
        let settings = KeeperSettings::new(self.settings.namespace.clone(), self.settings.max_lifetime);
        let keeper = Keeper::new(client.clone(), settings, self.current.clone(), fleet, leads.clone());
        let names = self.settings.serving_names.clone();
        let serving = serving::keep_serving(
            self.current.clone(),
            self.serving.clone(),
            names,
            Validity::of_workloads(),
        );
        let (namespace, pod) = (self.settings.namespace.clone(), self.settings.pod.clone());
        let trusts = reports::report_own(client.clone(), self.current.clone(), namespace, pod);
        let own = self.settings.own_namespaces.clone();
        let told = distribute::distribute(client, self.current, own, namespaces, leads);
        tokio::join!(keeper.run(), serving, trusts, told);
    }
}
