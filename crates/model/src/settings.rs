//! Settings of the whole mesh.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

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
    /// How connections are carried whose two ends are on one node.
    pub node_local: NodeLocalModes,
    /// The least version of TLS with servers outside of the mesh, where a waypoint begins it. Tunnels have 1.3 always.
    pub tls_minimum: TlsVersion,
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
            node_local: NodeLocalModes::default(),
            tls_minimum: TlsVersion::default(),
        }
    }
}

/// `nodeLocal`: how connections are carried whose two ends are on one node. Identities and policies hold in any case.
/// In order of strictness: between two that want different ones, the first of them holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum NodeLocal {
    /// In a tunnel, as between nodes.
    #[default]
    Encrypted,
    /// As they are: the node's proxy knows both ends.
    Direct,
    /// As they are and, once the node's proxy has decided on a pair, past it: the kernel keeps to its verdict. Where that
    /// can't be, as with `Direct`.
    Kernel,
}

impl NodeLocal {
    /// The value as it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Direct => "direct",
            Self::Kernel => "kernel",
        }
    }
}

impl FromStr for NodeLocal {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Encrypted, Self::Direct, Self::Kernel].into_iter().find(|mode| mode.as_str() == text).ok_or(())
    }
}

/// What the mesh, and namespaces of their own, say of connections whose two ends are on one node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeLocalModes {
    /// For namespaces that say nothing.
    pub mesh: NodeLocal,
    /// By namespace.
    pub namespaces: Arc<BTreeMap<Str, NodeLocal>>,
}

impl NodeLocalModes {
    /// What holds for the workloads of `namespace`.
    #[must_use]
    pub fn of(&self, namespace: &str) -> NodeLocal {
        self.namespaces.get(namespace).copied().unwrap_or(self.mesh)
    }

    /// What holds for connections from one namespace to another: nothing is left unencrypted that one of the two wants
    /// to be encrypted.
    #[must_use]
    pub fn between(&self, source: &str, destination: &str) -> NodeLocal {
        self.of(source).min(self.of(destination))
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

/// A version of TLS (`meshConfig.tlsDefaults.minProtocolVersion`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum TlsVersion {
    /// RFC 5246.
    #[default]
    V1_2,
    /// RFC 8446.
    V1_3,
}

#[cfg(test)]
mod tests {
    use super::NodeLocal::{Direct, Encrypted, Kernel};
    use super::*;

    #[test]
    fn a_connection_is_direct_only_where_both_namespaces_want_it() {
        let with = |mesh, of: &[(&str, NodeLocal)]| {
            let namespaces = of.iter().map(|(name, mode)| ((*name).into(), *mode)).collect();
            NodeLocalModes { mesh, namespaces: Arc::new(namespaces) }
        };
        assert_eq!(NodeLocalModes::default().between("a", "b"), Encrypted);
        let mesh = with(Direct, &[("bank", Encrypted)]);
        assert_eq!(mesh.between("a", "b"), Direct);
        for (source, destination) in [("a", "bank"), ("bank", "a"), ("bank", "bank")] {
            assert_eq!(mesh.between(source, destination), Encrypted);
        }
        let some = with(Encrypted, &[("shop", Direct), ("tools", Direct)]);
        assert_eq!((some.between("shop", "tools"), some.between("shop", "shop")), (Direct, Direct));
        assert_eq!((some.between("shop", "a"), some.between("a", "shop")), (Encrypted, Encrypted));
        // Past the proxy only what both want so.
        let mixed = with(Kernel, &[("shop", Direct), ("bank", Encrypted)]);
        assert_eq!(mixed.between("a", "b"), Kernel);
        assert_eq!((mixed.between("a", "shop"), mixed.between("shop", "a")), (Direct, Direct));
        assert_eq!((mixed.between("a", "bank"), mixed.between("bank", "shop")), (Encrypted, Encrypted));
    }
}
