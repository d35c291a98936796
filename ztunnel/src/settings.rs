//! Flags and environment, and what the data plane's limits are.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use clap::Parser;
use source::Mode;

use crate::proxy::handshakes::Places;
use crate::proxy::peers::Most;
use crate::proxy::pod::RoomLimits;

/// The node proxy of a Culvert mesh: captures the traffic of this node's pods, gives it their identity, carries
/// it over HBONE and enforces L4 policy.
///
/// In a cluster (`--xds-address`) the configuration comes from a control plane, certificates from its CA, and pods from
/// the node agent, which redirects their traffic.
///
/// In file mode (`--config-dir`) it needs no Kubernetes: manifests come from a directory, which is watched, and
/// pods name their network namespace in the annotation `culvert.dev/netns`.
#[derive(Parser, Debug, Clone)]
#[command(name = "ztunnel", version)]
pub struct Flags {
    /// Where configuration and certificates come from.
    #[command(flatten)]
    pub source: source::RawSettings,
    /// In a cluster: where the node agent listens
    #[arg(long, env = "INPOD_UDS", value_name = "SOCKET", default_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds_socket: PathBuf,
    /// In a cluster: let connections of pods whose namespaces say `nodeLocal: kernel` pass by verdicts in the kernel, where the node
    /// agent has the same flag and captures by ebpf. Needs the node's /sys/fs/bpf
    #[arg(long, env = "CULVERT_KERNEL_VERDICTS")]
    pub kernel_verdicts: bool,
    /// The node whose pods this process serves (`spec.nodeName`)
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// File mode: how pods' traffic is redirected: auto, nftables, iptables-nft or iptables-legacy
    #[arg(long, env = "CULVERT_CAPTURE", default_value = "auto", value_name = "BACKEND")]
    pub capture: String,
    /// File mode: on a graceful stop, remove the redirection from the pods: they are then outside the mesh. Without it the
    /// redirection stays, and the pods' traffic is refused until a ztunnel is back
    #[arg(long)]
    pub cleanup: bool,
    /// Resolvers for names outside the mesh, instead of those of --resolv-conf
    #[arg(long, env = "CULVERT_DNS_UPSTREAM", value_name = "ADDR:PORT", value_delimiter = ',')]
    pub dns_upstream: Vec<SocketAddr>,
    /// Where the resolvers for names outside the mesh are listed
    #[arg(long, env = "CULVERT_RESOLV_CONF", value_name = "FILE", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// MiB that all tunnels together may hold of data that was received and not taken by its reader; beyond it, those
    /// are cut that hold much for long. By default a quarter of what the machine or the container has, 64 to 1024
    #[arg(long, env = "CULVERT_TUNNEL_MEMORY", value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub tunnel_memory: Option<u32>,
    /// Pace what is sent between nodes where the system's congestion control does (BBR). Without it tunnels use CUBIC
    /// there: inside a data centre a timer for each segment costs a third of the throughput. For links that lose packets
    #[arg(long, env = "CULVERT_PACE_TUNNELS")]
    pub pace_tunnels: bool,
    /// To whom what an application says first is sent right behind the CONNECT, without a wait for the answer: a round trip
    /// less where clients speak first. Some Envoys refuse such a CONNECT (`reject_early_connect_data`)
    #[arg(long, env = "CULVERT_EARLY_DATA", value_enum, default_value = "always", value_name = "PEERS")]
    pub early_data: EarlyData,
    /// What all of the project's binaries understand.
    #[command(flatten)]
    pub shared: process::settings::RawSettings,
}

/// Peers that are sent data ahead of their answer to a CONNECT.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EarlyData {
    /// All
    #[default]
    Always,
    /// Those that are the destination itself, and no waypoints
    Workloads,
    /// None
    Never,
}

impl EarlyData {
    /// Whether a peer, which may be a `waypoint`, is sent some.
    pub fn to(self, waypoint: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Workloads => !waypoint,
            Self::Never => false,
        }
    }
}

impl Flags {
    /// What is served, and by whose word.
    ///
    /// # Errors
    /// What is missing, or contradicts another.
    pub fn mode(&self) -> anyhow::Result<Mode> {
        let mode = Mode::of(&self.source)?;
        if matches!(mode, Mode::Cluster(_)) {
            for (flag, is_set, instead) in [
                ("--cleanup", self.cleanup, "the node agent removes the redirection"),
                ("--capture (or CULVERT_CAPTURE)", self.capture != "auto", "the node agent redirects"),
            ] {
                ensure!(!is_set, "{flag} is set beside --xds-address, and belongs to file mode: {instead}");
            }
        } else {
            ensure!(
                !self.kernel_verdicts,
                "--kernel-verdicts is for a cluster: in file mode nodeLocal: kernel needs --capture ebpf alone"
            );
        }
        Ok(mode)
    }
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
    /// Secured HBONE connections that peers opened.
    pub peers: Most,
    /// HBONE connections to peers.
    pub pooled: usize,
    /// Connections that are carried.
    pub room: RoomLimits,
    /// What tunnels may hold.
    pub memory: hbone::Memory,
    /// Whether what is sent between nodes is paced, see [`Flags::pace_tunnels`].
    pub pace_tunnels: bool,
    /// Who is sent data ahead of an answer, see [`Flags::early_data`].
    pub early_data: EarlyData,
}

impl Limits {
    /// For a process that may have so many descriptors open. A half is for the connections that are carried, a fifth for
    /// HBONE connections of peers, an eighth for those to peers, and the rest for listeners, handshakes, DNS and pipes.
    /// Very few are not worth dividing: the kernel's limit comes first then.
    pub fn for_descriptors(descriptors: u64) -> Self {
        let all = usize::try_from(descriptors).unwrap_or(usize::MAX).min(1 << 24);
        let part = |share: usize, least: usize, most: usize| (all / share).clamp(least, most);
        Self {
            connect_timeout: Duration::from_secs(10),
            attempts: 3,
            handshakes: Places {
                all: 1024,
                per_source: 128,
                // A gateway that begins anew reaches all pods of a node at once.
                waiting_per_source: 1024,
                waiting: part(16, 64, 8192),
                patience: Duration::from_secs(10),
            },
            peers: Most { per_source: 1024, per_pod: part(12, 128, 32_768), all: part(6, 256, 262_144) },
            pooled: part(8, 128, 16_384),
            room: RoomLimits { per_pod: part(8, 256, 100_000), descriptors: part(2, 512, 1 << 23) },
            memory: hbone::Memory::of_process(),
            pace_tunnels: false,
            early_data: EarlyData::default(),
        }
    }

    /// For this process, with the usual limit of descriptors if the kernel doesn't tell.
    pub fn of_process(flags: &Flags) -> Self {
        let limits = Self::for_descriptors(net::limits::descriptors().unwrap_or(1024));
        let bytes = flags.tunnel_memory.and_then(|mib| usize::try_from(u64::from(mib) << 20).ok());
        let memory = bytes.map_or(limits.memory, hbone::Memory::with_limit);
        Self { memory, pace_tunnels: flags.pace_tunnels, early_data: flags.early_data, ..limits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_node_agent_does_is_not_asked_of_ztunnel() {
        let pod = "--pod-name zt-1 --pod-namespace culvert-system --instance-ip 10.0.0.1";
        for (arguments, words) in
            [("--cleanup", ["--cleanup", "node agent"]), ("--capture nftables", ["--capture", "node agent"])]
        {
            let arguments = format!("ztunnel --node n1 --xds-address a {pod} {arguments}");
            let error = Flags::try_parse_from(arguments.split(' ')).unwrap().mode().unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{arguments}: {error}");
        }
    }

    #[test]
    fn connections_leave_descriptors_for_all_else() {
        for descriptors in [4096, 20_000, 65_536, 1_048_576] {
            let limits = Limits::for_descriptors(descriptors);
            let peers = limits.peers.all + limits.peers.all / 8;
            let handshakes = limits.handshakes.all.min(256) + limits.handshakes.waiting;
            let all = limits.room.descriptors + peers + limits.pooled + handshakes;
            assert!(all as u64 <= descriptors * 15 / 16, "{all} of {descriptors}");
            // One pod may have much, and not all.
            assert!(limits.room.per_pod * 2 <= limits.room.descriptors / 2);
            assert!(limits.peers.per_pod <= limits.peers.all / 2);
        }
        let limits = Limits::for_descriptors(1_048_576);
        assert_eq!((limits.room.per_pod, limits.peers.per_source), (100_000, 1024));
    }
}
