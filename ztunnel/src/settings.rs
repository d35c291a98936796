//! Flags and environment, and what the data plane's limits are.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::proxy::handshakes::Places;

/// The node proxy of a Culvert mesh: captures the traffic of this node's pods, gives it their identity, carries
/// it over HBONE and enforces L4 policy.
///
/// In file mode (`--config-dir`) it needs no Kubernetes: manifests come from a directory, which is watched, and
/// pods name their network namespace in the annotation `culvert.dev/netns`.
#[derive(Parser, Debug, Clone)]
#[command(name = "ztunnel", version)]
pub struct Flags {
    /// Directory of manifests (Kubernetes and istio.io YAML); watched for changes
    #[arg(long, env = "CULVERT_CONFIG_DIR", value_name = "DIR")]
    pub config_dir: PathBuf,
    /// The node whose pods this process serves (`spec.nodeName`)
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// Directory of the CA: roots.pem, ca.pem, ca.key; made on first use, best on a tmpfs
    #[arg(long, env = "CULVERT_CA_DIR", value_name = "DIR")]
    pub ca_dir: PathBuf,
    /// Lifetime of workload certificates, in seconds; they are renewed at half of it
    #[arg(long, env = "CULVERT_CERTIFICATE_TTL", default_value_t = 86_400, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(10..=31_536_000))]
    pub certificate_ttl: u64,
    /// Directory on a tmpfs that only root can enter: keeps certificates over a restart
    #[arg(long, env = "CULVERT_KEY_DIR", value_name = "DIR")]
    pub key_dir: Option<PathBuf>,
    /// Directory of what the next process has to know of this one: which pods are captured. Best on a file system that
    /// is empty after a restart of the machine
    #[arg(long, env = "CULVERT_STATE_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub state_dir: PathBuf,
    /// How pods' traffic is redirected: auto, nftables, iptables-nft or iptables-legacy
    #[arg(long, env = "CULVERT_CAPTURE", default_value = "auto", value_name = "BACKEND")]
    pub capture: String,
    /// On a graceful stop, remove the redirection from the pods: they are then outside the mesh. Without it the
    /// redirection stays, and the pods' traffic is refused until a ztunnel is back
    #[arg(long)]
    pub cleanup: bool,
    /// Resolvers for names outside the mesh, instead of those of --resolv-conf
    #[arg(long, env = "CULVERT_DNS_UPSTREAM", value_name = "ADDR:PORT", value_delimiter = ',')]
    pub dns_upstream: Vec<SocketAddr>,
    /// Where the resolvers for names outside the mesh are listed
    #[arg(long, env = "CULVERT_RESOLV_CONF", value_name = "FILE", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// What all of the project's binaries understand.
    #[command(flatten)]
    pub shared: process::settings::RawSettings,
}

/// Limits and times of the data plane.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For a TCP connect and, after it, for a TLS handshake (facts: `CONNECTION_TIMEOUT`).
    pub connect_timeout: Duration,
    /// Endpoints that one connection tries.
    pub attempts: usize,
    /// Inbound TLS handshakes that are under way at once, all pods together.
    pub handshakes: Places,
    /// Open connections of one pod, both directions together.
    pub connections_per_pod: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            attempts: 3,
            handshakes: Places {
                all: 1024,
                per_source: 128,
                // A gateway that begins anew reaches all pods of a node at once.
                waiting_per_source: 1024,
                patience: Duration::from_secs(10),
            },
            connections_per_pod: 100_000,
        }
    }
}
