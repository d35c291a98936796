//! Flags and environment.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

/// The control plane of a Culvert mesh: reads the cluster, tells the node proxies what to enforce, signs their
/// certificates, and reviews what users write.
#[derive(Parser, Debug, Clone)]
#[command(name = "culvertd", version)]
pub struct Flags {
    /// The cluster's kubeconfig; in a cluster the pod's own account is used
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of this control plane, which is the root namespace unless the mesh's settings name another
    #[arg(long, env = "POD_NAMESPACE", default_value = "culvert-system", value_name = "NAME")]
    pub namespace: String,
    /// The name of this process among the control planes of the mesh
    #[arg(long, env = "POD_NAME", default_value = "culvertd", value_name = "NAME")]
    pub pod_name: String,
    /// The Service by which this control plane is reached
    #[arg(long, env = "CULVERT_SERVICE", default_value = "culvertd", value_name = "NAME")]
    pub service: String,
    /// The name of the cluster
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes", value_name = "NAME")]
    pub cluster_id: String,
    /// The network that the cluster's pods are on
    #[arg(long, env = "NETWORK", default_value = "", value_name = "NAME")]
    pub network: String,
    /// The revision of this control plane: objects labelled with another one (istio.io/rev) are not read
    #[arg(long, env = "REVISION", default_value = "default", value_name = "NAME")]
    pub revision: String,
    /// The ConfigMap of this namespace whose key mesh has the mesh's settings (MeshConfig)
    #[arg(long, env = "MESH_CONFIG_MAP", default_value = "culvert", value_name = "NAME")]
    pub mesh_config_map: String,
    /// Serve by the defaults where this ConfigMap is missing at the start; without this the mesh waits for it
    #[arg(long, env = "MESH_CONFIG_OPTIONAL")]
    pub mesh_config_optional: bool,
    /// The ValidatingWebhookConfiguration and MutatingWebhookConfiguration that are kept: their CA bundle, and the
    /// revisions whose objects they are for
    #[arg(long, env = "WEBHOOKS", default_value = "culvert", value_name = "NAME")]
    pub webhooks: String,
    /// The accounts of node proxies: they may ask for their node's identities, and for the mesh's configuration. By
    /// default ztunnel of this namespace
    #[arg(long, env = "CA_TRUSTED_NODE_ACCOUNTS", value_name = "NAMESPACE/NAME", value_delimiter = ',')]
    pub trusted_node_accounts: Vec<String>,
    /// Where xDS and the CA are served, over TLS
    #[arg(long, env = "GRPC_ADDR", default_value = "[::]:15012", value_name = "ADDR:PORT")]
    pub grpc_address: SocketAddr,
    /// Where the webhook is served, over TLS
    #[arg(long, env = "WEBHOOK_ADDR", default_value = "[::]:15017", value_name = "ADDR:PORT")]
    pub webhook_address: SocketAddr,
    /// How long the API server may say nothing, to a request or in a watch, before it is asked again, in seconds. It says
    /// something every minute or so, also where nothing happens
    #[arg(long, env = "API_SERVER_SILENCE", default_value_t = 120, value_name = "SECONDS")]
    pub api_server_silence: u64,
    /// The image of waypoints; without it Gateways are not deployed
    #[arg(long, env = "WAYPOINT_IMAGE", value_name = "IMAGE")]
    pub waypoint_image: Option<String>,
    /// When the kubelet pulls it: Always, IfNotPresent or Never
    #[arg(long, env = "WAYPOINT_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_name = "POLICY")]
    pub waypoint_image_pull_policy: String,
    /// What waypoints log
    #[arg(long, env = "WAYPOINT_LOG", default_value = "info", value_name = "FILTER")]
    pub waypoint_log: String,
    /// The form of what they log: text or json
    #[arg(long, env = "WAYPOINT_LOG_FORMAT", default_value = "json", value_name = "FORM")]
    pub waypoint_log_format: String,
    /// CPU and memory of waypoints, as a container's resources (JSON)
    #[arg(long, env = "WAYPOINT_RESOURCES", default_value = "{}", value_name = "JSON")]
    pub waypoint_resources: String,
    /// What is to be otherwise of what waypoints are made of: a mapping (JSON) with the keys deployment, service,
    /// serviceAccount, horizontalPodAutoscaler and podDisruptionBudget, each a strategic merge patch
    #[arg(long, env = "WAYPOINT_OVERRIDES", default_value = "{}", value_name = "JSON")]
    pub waypoint_overrides: String,
    /// What all of the project's binaries understand.
    #[command(flatten)]
    pub shared: process::settings::RawSettings,
}
