//! Writing the mesh's settings.

use model::http::Normalization;
use model::{OutboundMode, Settings};

use crate::wire::culvert as wire;

/// Writes the settings of the mesh.
#[must_use]
pub fn encode_settings(settings: &Settings) -> wire::MeshSettings {
    use wire::mesh_settings::{OutboundMode as Wire, PathNormalization as Path};
    let outbound = match settings.outbound {
        OutboundMode::AllowAny => Wire::AllowAny,
        OutboundMode::RegistryOnly => Wire::RegistryOnly,
    };
    let path = match settings.path_normalization {
        Normalization::Base => Path::Base,
        Normalization::None => Path::None,
        Normalization::MergeSlashes => Path::MergeSlashes,
        Normalization::DecodeAndMergeSlashes => Path::DecodeAndMergeSlashes,
    };
    wire::MeshSettings {
        trust_domain: settings.trust_domains.own.to_string(),
        trust_domain_aliases: settings.trust_domains.aliases.iter().map(ToString::to_string).collect(),
        root_namespace: settings.root_namespace.to_string(),
        cluster_domain: settings.cluster_domain.to_string(),
        outbound: outbound.into(),
        mesh_id: settings.mesh_id.as_deref().unwrap_or_default().to_owned(),
        path_normalization: path.into(),
    }
}
