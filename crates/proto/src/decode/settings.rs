//! Reading the mesh's settings.

use std::sync::Arc;

use model::http::Normalization;
use model::{NodeLocal, NodeLocalModes, OutboundMode, Settings, TlsVersion, TrustDomain, TrustDomains};

use super::{DecodeError, Decoder, Fault, Problem, each};
use crate::names::MESH_SETTINGS_NAME;
use crate::wire::culvert as wire;

impl Decoder {
    /// Reads the settings of the mesh.
    ///
    /// # Errors
    /// A field has no meaning in the model; the error names it.
    pub fn settings(&mut self, settings: &wire::MeshSettings) -> Result<Settings, DecodeError> {
        self.read_settings(settings).map_err(|fault| fault.of("mesh settings", MESH_SETTINGS_NAME))
    }

    fn read_settings(&mut self, s: &wire::MeshSettings) -> Result<Settings, Fault> {
        use wire::mesh_settings::{OutboundMode as Wire, PathNormalization as Path, TlsVersion as Tls};
        let defaults = Settings::default();
        let mut domain = |name: &str| {
            TrustDomain::new(self.text(name)).map_err(|invalid| Fault::new("trust_domain", invalid))
        };
        let own =
            if s.trust_domain.is_empty() { defaults.trust_domains.own } else { domain(&s.trust_domain)? };
        let aliases = each(&s.trust_domain_aliases, "trust_domain_aliases", |name| domain(name))?;
        let text = |text: &str, default| if text.is_empty() { default } else { text.into() };
        Ok(Settings {
            trust_domains: TrustDomains { own, aliases: aliases.into() },
            root_namespace: text(&s.root_namespace, defaults.root_namespace),
            cluster_domain: text(&s.cluster_domain, defaults.cluster_domain),
            mesh_id: (!s.mesh_id.is_empty()).then(|| s.mesh_id.as_str().into()),
            // What is not known could be stricter than passing through.
            outbound: match Wire::try_from(s.outbound) {
                Ok(Wire::AllowAny) => OutboundMode::AllowAny,
                Ok(Wire::RegistryOnly) => OutboundMode::RegistryOnly,
                Err(_) => return Err(Fault::new("outbound", Problem::Enum(s.outbound))),
            },
            path_normalization: match Path::try_from(s.path_normalization) {
                Ok(Path::Base) => Normalization::Base,
                Ok(Path::None) => Normalization::None,
                Ok(Path::MergeSlashes) => Normalization::MergeSlashes,
                Ok(Path::DecodeAndMergeSlashes) => Normalization::DecodeAndMergeSlashes,
                Err(_) => return Err(Fault::new("path_normalization", Problem::Enum(s.path_normalization))),
            },
            node_local: NodeLocalModes {
                mesh: node_local(s.node_local),
                namespaces: Arc::new(
                    s.node_local_namespaces
                        .iter()
                        .map(|(name, mode)| (self.text(name), node_local(*mode)))
                        .collect(),
                ),
            },
            tls_minimum: match Tls::try_from(s.tls_minimum) {
                Ok(Tls::Tls12) => TlsVersion::V1_2,
                Ok(Tls::Tls13) => TlsVersion::V1_3,
                Err(_) => return Err(Fault::new("tls_minimum", Problem::Enum(s.tls_minimum))),
            },
        })
    }
}

/// What is not known is encrypted: that is the strictest there can be.
fn node_local(mode: i32) -> NodeLocal {
    use wire::mesh_settings::NodeLocal as Wire;
    match Wire::try_from(mode) {
        Ok(Wire::Direct) => NodeLocal::Direct,
        Ok(Wire::Kernel) => NodeLocal::Kernel,
        Ok(Wire::Encrypted) | Err(_) => NodeLocal::Encrypted,
    }
}
