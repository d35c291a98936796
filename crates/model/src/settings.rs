//! Settings of the whole mesh.

use crate::http::Normalization;
use crate::{Str, TrustDomain, TrustDomains};

/// What the mesh is set to (`meshConfig`), as far as the decisions of this crate depend on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The trust domain and its aliases.
    pub trust_domains: TrustDomains,
    /// The namespace whose policies hold for the whole mesh.
    pub root_namespace: Str,
    /// The domain of cluster-local service names, `cluster.local` as a rule.
    pub cluster_domain: Str,
    /// What happens to connections to addresses that nothing is known of.
    pub outbound: OutboundMode,
    /// The name of the mesh among others (`defaultConfig.meshId`), where it has one; see [`Settings::mesh_id`].
    pub mesh_id: Option<Str>,
    /// How far waypoints normalise the paths of requests before they compare them.
    pub path_normalization: Normalization,
}

impl Settings {
    /// The name of the mesh, as it is shown and measured; that of the trust domain where it has none of its own.
    #[must_use]
    pub fn mesh_id(&self) -> &str {
        self.mesh_id.as_deref().unwrap_or_else(|| self.trust_domains.own.as_str())
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domains: TrustDomains::only(TrustDomain::cluster_local()),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
            outbound: OutboundMode::AllowAny,
            mesh_id: None,
            path_normalization: Normalization::default(),
        }
    }
}

/// `meshConfig.outboundTrafficPolicy.mode`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum OutboundMode {
    /// `ALLOW_ANY`: connections to unknown addresses pass through untouched.
    #[default]
    AllowAny,
    /// `REGISTRY_ONLY`: they are refused.
    RegistryOnly,
}
