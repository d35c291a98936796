//! Flags and environment.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::pod::Places;

/// The node agent of a Culvert mesh: puts the pods of this node into the mesh when they start and while they run, keeps the
/// CNI plugin in place, and hands the pods to ztunnel.
///
/// It runs on the node's network with its process ids (hostNetwork, hostPID), and needs NET_ADMIN, SYS_ADMIN, SYS_PTRACE and
/// DAC_OVERRIDE.
#[derive(Parser, Debug, Clone)]
#[command(name = "culvert-node", version)]
pub struct Flags {
    /// The name of this node (`spec.nodeName` of its pods)
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// How to reach the API server, instead of as a pod of the cluster
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The namespace that the mesh itself runs in
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME", default_value = "culvert-system")]
    pub namespace: String,
    /// Namespaces whose pods are never in the mesh, and start also while this agent is away
    #[arg(
        long,
        env = "CULVERT_EXCLUDE_NAMESPACES",
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "kube-system,culvert-system"
    )]
    pub exclude_namespaces: Vec<String>,
    /// Where the node's container runtime looks for plugins
    #[arg(long, env = "CULVERT_CNI_BIN_DIR", value_name = "DIR", default_value = "/host/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Where it looks for their configuration
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR", default_value = "/host/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// The plugin that is put there; by default the file culvert-cni beside this program
    #[arg(long, env = "CULVERT_PLUGIN_BINARY", value_name = "FILE")]
    pub plugin_binary: Option<PathBuf>,
    /// Where the plugin reaches this agent; the same path on the node and in here
    #[arg(
        long,
        env = "CULVERT_PLUGIN_SOCKET",
        value_name = "PATH",
        default_value = "/var/run/culvert-cni/plugin.sock"
    )]
    pub plugin_socket: PathBuf,
    /// Where ztunnel reaches this agent
    #[arg(
        long,
        env = "CULVERT_ZDS_SOCKET",
        value_name = "PATH",
        default_value = "/var/run/ztunnel/ztunnel.sock"
    )]
    pub zds_socket: PathBuf,
    /// Directory of what the next process has to know of this one: which pods are captured. It outlives the node's restart
    #[arg(long, env = "CULVERT_STATE_DIR", value_name = "DIR", default_value = "/var/lib/culvert")]
    pub state_dir: PathBuf,
    /// Directories in which ztunnel keeps keys and configuration on this node: `cleanup` deletes what is in them
    #[arg(long, env = "CULVERT_ZTUNNEL_DIRS", value_name = "DIR", value_delimiter = ',')]
    pub ztunnel_dirs: Vec<PathBuf>,
    /// How pods' traffic is redirected: auto, nftables, iptables-nft, iptables-legacy or ebpf
    #[arg(long, env = "CULVERT_CAPTURE", default_value = "auto", value_name = "BACKEND")]
    pub capture: String,
    /// Prepare pods for connections that no proxy carries (`nodeLocal: kernel`), where they are captured by ebpf: a ztunnel with the
    /// same flag writes which may pass
    #[arg(long, env = "CULVERT_KERNEL_VERDICTS")]
    pub kernel_verdicts: bool,
    /// The kubelet's control group (v2), where it is not that of the process `kubelet`
    #[arg(long, env = "CULVERT_KUBELET_CGROUP", value_name = "PATH")]
    pub kubelet_cgroup: Option<String>,
    /// Taints of this node that are removed once pods can be put into the mesh
    #[arg(
        long,
        env = "CULVERT_REMOVE_TAINTS",
        value_name = "KEY",
        value_delimiter = ',',
        default_value = "culvert.dev/agent-not-ready"
    )]
    pub remove_taints: Vec<String>,
    /// Put the taint culvert.dev/agent-not-ready on this node at the start, until pods can be put into the mesh
    #[arg(long, env = "CULVERT_TAINT_AT_START")]
    pub taint_at_start: bool,
    /// On a graceful stop, do what `cleanup` does. Without it all stays as it is, and pods that start wait for the next agent
    #[arg(long)]
    pub cleanup: bool,
    /// The DaemonSet of --namespace that this agent is of: if that is deleted, a graceful stop does what `cleanup` does,
    /// since no agent comes after this one
    #[arg(long, env = "CULVERT_DAEMON_SET", value_name = "NAME")]
    pub daemon_set: Option<String>,
    /// What else can be done.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What all of the project's binaries understand.
    #[command(flatten)]
    pub shared: process::settings::RawSettings,
}

/// What else can be done.
#[derive(Subcommand, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Take everything off this node: the plugin, the redirection of all pods, the exemption of probes, the record. No agent
    /// may be running. The pods are outside the mesh from then on
    Cleanup,
}

impl Flags {
    /// Where the plugin is that is installed.
    ///
    /// # Errors
    /// Where this program is can't be found out.
    pub fn plugin_source(&self) -> std::io::Result<PathBuf> {
        match &self.plugin_binary {
            Some(path) => Ok(path.clone()),
            None => Ok(std::env::current_exe()?.with_file_name(crate::chain::PLUGIN)),
        }
    }

    /// Where the admin pages are that change something.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.plugin_socket.with_file_name("admin.sock")
    }

    /// Whose pods are never in the mesh.
    #[must_use]
    pub fn places(&self) -> Places {
        Places { system: self.namespace.clone(), excluded: self.exclude_namespaces.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_sound() {
        use clap::CommandFactory;
        Flags::command().debug_assert();
        let flags =
            Flags::parse_from(["culvert-node", "--node", "n", "--exclude-namespaces", "a,b", "cleanup"]);
        assert_eq!(flags.exclude_namespaces, ["a", "b"]);
        assert_eq!(flags.command, Some(Command::Cleanup));
        assert!(flags.plugin_source().unwrap().ends_with("culvert-cni"));
    }
}
