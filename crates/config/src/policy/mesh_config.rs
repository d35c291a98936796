//! The settings of the mesh: Istio's MeshConfig.
//!
//! It is read from where Istio keeps it, the key `mesh` of the ConfigMap `istio` in the system namespace, so that
//! a dump of a cluster works as it is, and from an object of its own for files that people write:
//!
//! ```yaml
//! apiVersion: mesh.istio.io/v1alpha1
//! kind: MeshConfig
//! metadata: {name: mesh}
//! spec: {trustDomain: example.org}
//! ```
//!
//! The cluster's domain, which Istio takes as a flag of its programs, is the ConfigMap's key `clusterDomain`, or
//! the field `clusterDomain` of the object. The field `nodeLocal` is of this mesh alone.

use std::time::Duration;

use model::http::{Normalization, Percent, Retry};
use model::telemetry::LogFormat;
use model::{NodeLocal, NodeLocalModes, OutboundMode, Settings, Str, TlsVersion, TrustDomain, TrustDomains};

use super::discovery::{self, NamespaceSelector};
use super::embedded;
use super::node_local;
use super::providers::{self, Providers};
use super::{telemetry, telling};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Field, Fields, Schema, enforced, nested, not_applicable, refused, silent};
use crate::metadata::{METADATA, Metadata, is_label, is_subdomain};
use crate::resource::{Kind, KindSpec, Resource};
use crate::routes::virtual_service;
use crate::tree::Value;

/// The name of the ConfigMap.
pub const CONFIG_MAP: &str = "istio";

/// The kind of the ConfigMap that holds the settings.
pub static CONFIG_MAP_KIND: KindSpec = KindSpec {
    kind: Kind::ConfigMap,
    group: "",
    versions: &["v1"],
    name: "ConfigMap",
    namespaced: true,
    schema: &CONFIG_MAP_SCHEMA,
    parse: parse_config_map,
};

static CONFIG_MAP_SCHEMA: Schema = Schema {
    name: "ConfigMap",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        enforced("data"),
        silent("binaryData", "the settings are text"),
        silent("immutable", "it is the API server's"),
    ],
};

/// The kind of the object of its own.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::MeshConfig,
    group: "mesh.istio.io",
    versions: &["v1alpha1"],
    name: "MeshConfig",
    namespaced: false,
    schema: &SCHEMA,
    parse: parse_object,
};

static SCHEMA: Schema = Schema {
    name: "MeshConfig",
    fields: &[enforced("apiVersion"), enforced("kind"), nested("metadata", &METADATA), nested("spec", &SPEC)],
};

const ENVOY: &str = "it configures Envoy";
const EXPORT: &str = "the node proxy serves every service to every namespace";
const INGRESS: &str = "Ingress objects are not served";
const ONE_SOURCE: &str = "the configuration comes from where this process was told to read it";
const TLS: &str = "the tunnel is always TLS 1.3";
const TRAFFIC: &str = "what holds for all hosts is said by a DestinationRule of the root namespace";

static SPEC: Schema = Schema {
    name: "MeshConfig.spec",
    fields: &[
        enforced("trustDomain"),
        enforced("trustDomainAliases"),
        enforced("rootNamespace"),
        nested("outboundTrafficPolicy", &OUTBOUND),
        enforced("clusterDomain"),
        enforced("nodeLocal"),
        nested("discoverySelectors", &discovery::SELECTOR),
        enforced("accessLogEncoding"),
        enforced("accessLogFile"),
        enforced("accessLogFormat"),
        not_applicable("ca", "certificates come from the mesh's own CA"),
        refused(
            "caCertificates",
            "further roots of trust are not read from the mesh's settings",
            "give the roots to the CA",
        ),
        not_applicable("certificates", "upstream has removed it"),
        not_applicable("configSources", ONE_SOURCE),
        not_applicable("connectTimeout", "the node proxy has a limit of its own"),
        enforced("defaultConfig"),
        not_applicable("defaultDestinationRuleExportTo", EXPORT),
        nested("defaultHttpRetryPolicy", &virtual_service::RETRIES),
        nested("defaultProviders", &providers::DEFAULTS),
        not_applicable("defaultServiceExportTo", EXPORT),
        not_applicable("defaultTrafficPolicy", TRAFFIC),
        not_applicable("defaultVirtualServiceExportTo", EXPORT),
        silent("disableEnvoyListenerLog", ENVOY),
        not_applicable("dnsRefreshRate", "names are resolved again when their answers expire"),
        not_applicable("enableAutoMtls", "the node proxy always uses mTLS between workloads of the mesh"),
        silent("enableEnvoyAccessLogService", ENVOY),
        silent("enablePrometheusMerge", "there is no sidecar to merge with"),
        silent("enableTracing", ENVOY),
        nested("extensionProviders", &providers::PROVIDER),
        silent("h2UpgradePolicy", ENVOY),
        not_applicable("hboneIdleTimeout", "it configures Envoy's tunnels"),
        silent("inboundClusterStatName", ENVOY),
        silent("inboundTrafficPolicy", "connections are always delivered to the address that was dialled"),
        not_applicable("ingressClass", INGRESS),
        not_applicable("ingressControllerMode", INGRESS),
        not_applicable("ingressSelector", INGRESS),
        not_applicable("ingressService", INGRESS),
        not_applicable("localityLbSetting", TRAFFIC),
        not_applicable("meshMTLS", TLS),
        silent("outboundClusterStatName", ENVOY),
        nested("pathNormalization", &PATHS),
        not_applicable("protocolDetectionTimeout", "waypoints have a setting of their own: --detect-timeout"),
        silent("proxyHttpPort", ENVOY),
        silent("proxyInboundListenPort", ENVOY),
        silent("proxyListenPort", ENVOY),
        refused(
            "serviceEntryVisibility",
            "every ServiceEntry is visible to the whole mesh in this version",
            "remove it, and restrict who may write ServiceEntries",
        ),
        not_applicable("serviceScopeConfigs", "there is one cluster"),
        not_applicable("serviceSettings", "there is one cluster"),
        not_applicable("tcpKeepalive", "the node proxy has settings of its own"),
        not_applicable("thriftConfig", "upstream has removed it"),
        nested("tlsDefaults", &TLS_DEFAULTS),
        not_applicable("verifyCertificateAtClient", TLS),
    ],
};

static TLS_DEFAULTS: Schema = Schema {
    name: "MeshConfig.spec.tlsDefaults",
    fields: &[
        enforced("minProtocolVersion"),
        not_applicable("cipherSuites", SUITES),
        not_applicable("ecdhCurves", SUITES),
    ],
};
const SUITES: &str = "TLS has the suites and groups that are thought safe today, and no others";

static PATHS: Schema =
    Schema { name: "MeshConfig.spec.pathNormalization", fields: &[enforced("normalization")] };

static OUTBOUND: Schema = Schema { name: "MeshConfig.spec.outboundTrafficPolicy", fields: OUTBOUND_FIELDS };

static OUTBOUND_FIELDS: &[Field] = &[enforced("mode"), not_applicable("tls", ENVOY)];

/// What is set of the settings.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MeshConfig {
    trust_domain: Option<TrustDomain>,
    aliases: Vec<TrustDomain>,
    root_namespace: Option<Str>,
    cluster_domain: Option<Str>,
    outbound: Option<OutboundMode>,
    discovery: Vec<NamespaceSelector>,
    mesh_id: Option<Str>,
    path_normalization: Option<Normalization>,
    node_local: Option<NodeLocal>,
    tls_minimum: Option<TlsVersion>,
    providers: Providers,
    log: LogSettings,
    /// How many requests are traced where nobody says it.
    sampling: Option<Percent>,
    /// When requests are tried again where their route says nothing of it, and how long a try may take.
    retries: Option<(Retry, Option<Duration>)>,
}

/// What is set of waypoints' access logs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct LogSettings {
    file: Option<Str>,
    json: bool,
    format: Option<LogFormat>,
}

impl MeshConfig {
    /// Which namespaces are read; all where it is empty.
    #[must_use]
    pub fn discovery(&self) -> &[NamespaceSelector] {
        &self.discovery
    }

    /// Whether what is told of requests is the same as with `other`.
    #[must_use]
    pub(super) fn tells_like(&self, other: &Self) -> bool {
        self.log == other.log && self.providers == other.providers && self.sampling == other.sampling
    }

    /// Where requests are logged if no Telemetry, and no default provider, says anything of logs.
    #[must_use]
    pub(super) fn log_file(&self) -> Option<Str> {
        self.log.file.clone()
    }

    /// What lines look like where a provider does not say it.
    #[must_use]
    pub(super) fn log_format(&self) -> LogFormat {
        self.log.format.clone().unwrap_or_else(|| telling::istio_format(self.log.json))
    }

    /// When requests are tried again where their route says nothing of it, and how long a try may take.
    #[must_use]
    pub fn retries(&self) -> Option<&(Retry, Option<Duration>)> {
        self.retries.as_ref()
    }

    /// How many requests are traced where no Telemetry says it.
    #[must_use]
    pub(super) fn sampling(&self) -> Percent {
        self.sampling.unwrap_or(Percent::of(1, 100))
    }

    /// What decides over requests, and takes traces, metrics and logs of them.
    #[must_use]
    pub fn providers(&self) -> &Providers {
        &self.providers
    }

    /// The settings; what is not set is as in `default`.
    #[must_use]
    pub fn settings(&self, default: &Settings) -> Settings {
        let own = self.trust_domain.as_ref().unwrap_or(&default.trust_domains.own).clone();
        let aliases = self.aliases.iter().filter(|a| **a != own).cloned().collect();
        Settings {
            trust_domains: TrustDomains { own, aliases },
            root_namespace: self.root_namespace.as_ref().unwrap_or(&default.root_namespace).clone(),
            cluster_domain: self.cluster_domain.as_ref().unwrap_or(&default.cluster_domain).clone(),
            outbound: self.outbound.unwrap_or(default.outbound),
            mesh_id: self.mesh_id.as_ref().or(default.mesh_id.as_ref()).cloned(),
            path_normalization: self.path_normalization.unwrap_or(default.path_normalization),
            node_local: NodeLocalModes {
                mesh: self.node_local.unwrap_or(default.node_local.mesh),
                namespaces: default.node_local.namespaces.clone(),
            },
            tls_minimum: self.tls_minimum.unwrap_or(default.tls_minimum),
        }
    }
}

fn parse_object(fields: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    let mut config = MeshConfig::default();
    read(fields.required("spec")?.fields()?, &mut config);
    Some(Resource::MeshConfig(Box::new(config)))
}

fn parse_config_map(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let data = fields.take("data");
    if metadata.name != CONFIG_MAP {
        // What a revision of Istio reads has another name. It is not read, only known of.
        let revision = metadata.name.strip_prefix(CONFIG_MAP).is_some_and(|rest| rest.starts_with('-'));
        let mut has_settings = false;
        if let (Some(data), true) = (data, revision) {
            data.entries(|key, _| has_settings |= key == "mesh");
        }
        return Some(Resource::ConfigMap(has_settings.then(Box::default)));
    }
    let mut found = false;
    let mut config = MeshConfig::default();
    if let Some(data) = data {
        data.entries(|key, cursor| match key {
            "mesh" => {
                found = true;
                embedded::read(cursor, &SPEC, |spec| read(spec, &mut config));
            }
            "clusterDomain" => config.cluster_domain = read_cluster_domain(cursor),
            "meshNetworks" => {
                let mut cursor = cursor;
                // Charts write it empty.
                let empty = |t: &str| matches!(t.trim(), "" | "{}" | "networks: {}");
                if !cursor.node().as_str().is_some_and(empty) {
                    let message = "data.meshNetworks has no effect: there is one network";
                    cursor.report(Code::FieldNotApplicable, message, "");
                }
            }
            _ => {}
        });
    }
    Some(Resource::ConfigMap(found.then(|| Box::new(config))))
}

fn read(mut spec: Fields<'_, '_>, config: &mut MeshConfig) {
    config.trust_domain = spec.take("trustDomain").and_then(read_trust_domain);
    spec.each("trustDomainAliases", |alias| config.aliases.extend(read_trust_domain(alias)));
    config.root_namespace = spec.take("rootNamespace").and_then(|mut cursor| {
        let text = cursor.node().as_str();
        if text.is_some_and(|t| !is_label(t)) {
            cursor.invalid("is not the name of a namespace", "");
        }
        cursor.string().map(Str::from)
    });
    spec.each("discoverySelectors", |item| config.discovery.extend(discovery::read(item)));
    if let Some(cursor) = spec.take("clusterDomain") {
        config.cluster_domain = read_cluster_domain(cursor);
    }
    config.node_local = spec.take("nodeLocal").and_then(node_local::field);
    config.providers = providers::read(&mut spec);
    config.log = read_log(&mut spec);
    config.retries = spec.object("defaultHttpRetryPolicy").map(|mut f| virtual_service::read_retries(&mut f));
    if let Some(cursor) = spec.take("defaultConfig") {
        // The rest of it configures Envoy. Of either of its spellings; upstream's parser takes both.
        cursor.entries(|name, cursor| match name {
            "meshId" | "mesh_id" => config.mesh_id = read_mesh_id(cursor).or(config.mesh_id.take()),
            "tracing" if cursor.node().value != Value::Null => config.sampling = read_sampling(cursor),
            _ => {}
        });
    }
    if let Some(mut paths) = spec.object("pathNormalization") {
        config.path_normalization = paths.take("normalization").and_then(read_normalization);
    }
    if let Some(mut tls) = spec.object("tlsDefaults") {
        config.tls_minimum = tls.take("minProtocolVersion").and_then(read_tls_version);
    }
    // Not as if it were absent: that is ALLOW_ANY.
    spec.refuse_null("outboundTrafficPolicy");
    if let Some(mut outbound) = spec.object("outboundTrafficPolicy") {
        // The default of the field, which protobuf gives an empty message, is not the default of the mesh.
        config.outbound = outbound.required("mode").and_then(read_outbound);
    }
}

fn read_log(spec: &mut Fields<'_, '_>) -> LogSettings {
    let file = spec.take("accessLogFile").filter(|cursor| cursor.node().as_str() != Some(""));
    let file = file.and_then(providers::log_path);
    let mut json = false;
    if let Some(mut cursor) = spec.take("accessLogEncoding") {
        match cursor.node().as_str() {
            Some("JSON") => json = true,
            Some("TEXT") | None => {}
            Some(_) => cursor.invalid("is none of the values", "write TEXT or JSON"),
        }
        cursor.string();
    }
    let format = spec.take("accessLogFormat").filter(|cursor| cursor.node().as_str() != Some(""));
    let format = format.and_then(|cursor| providers::log_format(cursor, json));
    LogSettings { file, json, format }
}

fn read_trust_domain(mut cursor: Cursor<'_, '_>) -> Option<TrustDomain> {
    let text = cursor.node().as_str();
    if let Some(Err(e)) = text.map(str::parse::<TrustDomain>) {
        cursor.invalid(e, "");
        return None;
    }
    cursor.string()?.parse().ok()
}

/// The share of requests that is traced. Upstream takes 0, and what is more than all, for what is not set.
fn read_sampling(cursor: Cursor<'_, '_>) -> Option<Percent> {
    let mut sampling = None;
    cursor.entries(|name, mut cursor| {
        if name != "sampling" || cursor.node().value == Value::Null {
            return;
        }
        if telemetry::number(cursor.node()) > 100.0 {
            let message = "is more than 100 percent, and counts as not set: 1 percent";
            cursor.report(Code::WithoutEffect, message, "write a share from 0 to 100");
            return;
        }
        sampling = telemetry::percentage(cursor).filter(|share| share.millionths() > 0);
    });
    sampling
}

fn read_mesh_id(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let text = cursor.node().as_str();
    if text.is_some_and(|t| t.len() > 253 || t.chars().any(|c| c.is_control() || c.is_whitespace())) {
        cursor.invalid("is no name for a mesh", "such as mesh-1");
        return None;
    }
    cursor.string().filter(|t| !t.is_empty()).map(Str::from)
}

fn read_cluster_domain(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    if cursor.node().as_str().is_some_and(|t| !is_subdomain(t)) {
        cursor.invalid("is not a DNS name such as cluster.local", "");
        return None;
    }
    cursor.string().map(Str::from)
}

fn read_normalization(mut cursor: Cursor<'_, '_>) -> Option<Normalization> {
    let node = cursor.node();
    match node.as_str() {
        Some("DEFAULT" | "BASE") => Some(Normalization::Base),
        Some("NONE") => Some(Normalization::None),
        Some("MERGE_SLASHES") => Some(Normalization::MergeSlashes),
        Some("DECODE_AND_MERGE_SLASHES") => Some(Normalization::DecodeAndMergeSlashes),
        Some(other) => {
            let how = "write NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES";
            cursor.invalid(format_args!("{other:?} is no normalization of paths"), how);
            None
        }
        None => {
            cursor.string();
            None
        }
    }
}

fn read_tls_version(mut cursor: Cursor<'_, '_>) -> Option<TlsVersion> {
    let node = cursor.node();
    match node.as_str() {
        Some("TLS_AUTO" | "TLSV1_2") => Some(TlsVersion::V1_2),
        Some("TLSV1_3") => Some(TlsVersion::V1_3),
        Some(other) => {
            let how = "write TLS_AUTO, TLSV1_2 or TLSV1_3";
            cursor.invalid(format_args!("{other:?} is no version of TLS that is spoken"), how);
            None
        }
        None => {
            cursor.string();
            None
        }
    }
}

fn read_outbound(mut cursor: Cursor<'_, '_>) -> Option<OutboundMode> {
    let node = cursor.node();
    match node.as_str() {
        Some("ALLOW_ANY") => Some(OutboundMode::AllowAny),
        Some("REGISTRY_ONLY") => Some(OutboundMode::RegistryOnly),
        Some("ALLOW_ANY_DYNAMIC_DNS") => {
            cursor.report(
                Code::FieldRefused,
                "ALLOW_ANY_DYNAMIC_DNS is for sidecars, which see requests",
                "write ALLOW_ANY, or REGISTRY_ONLY and ServiceEntries",
            );
            None
        }
        Some(other) => {
            cursor.invalid(format_args!("{other:?} is no mode"), "write ALLOW_ANY or REGISTRY_ONLY");
            None
        }
        None => {
            cursor.string();
            None
        }
    }
}
