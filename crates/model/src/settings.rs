//! Settings of the whole mesh.

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
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domains: TrustDomains::only(TrustDomain::cluster_local()),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
            outbound: OutboundMode::AllowAny,
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
