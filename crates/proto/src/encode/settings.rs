//! Writing the mesh's settings.

use model::http::Normalization;
use model::{NodeLocal, OutboundMode, Settings, TlsVersion};

use crate::wire::culvert as wire;

/// Writes the settings of the mesh.
#[must_use]
pub fn encode_settings(settings: &Settings) -> wire::MeshSettings {
    use wire::mesh_settings::{
        NodeLocal as Local, OutboundMode as Wire, PathNormalization as Path, TlsVersion as Tls,
    };
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
    let tls = match settings.tls_minimum {
        TlsVersion::V1_2 => Tls::Tls12,
        TlsVersion::V1_3 => Tls::Tls13,
    };
    let local = |mode: NodeLocal| match mode {
        NodeLocal::Encrypted => Local::Encrypted.into(),
        NodeLocal::Direct => Local::Direct.into(),
        NodeLocal::Kernel => Local::Kernel.into(),
    };
    let namespaces = settings.node_local.namespaces.iter();
    wire::MeshSettings {
        trust_domain: settings.trust_domains.own.to_string(),
        trust_domain_aliases: settings.trust_domains.aliases.iter().map(ToString::to_string).collect(),
        root_namespace: settings.root_namespace.to_string(),
        cluster_domain: settings.cluster_domain.to_string(),
        outbound: outbound.into(),
        mesh_id: settings.mesh_id.as_deref().unwrap_or_default().to_owned(),
        path_normalization: path.into(),
        node_local: local(settings.node_local.mesh),
        node_local_namespaces: namespaces.map(|(name, mode)| (name.to_string(), local(*mode))).collect(),
        tls_minimum: tls.into(),
    }
}
