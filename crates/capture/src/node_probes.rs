//! The node's side of kubelet's probes: their source is rewritten to an address that pods' rules let through
//! ([`Rules::probes`](crate::Rules::probes)), so that a probe is answered whatever the pod's policies say.
//!
//! Exempt is a new TCP connection of the kubelet, to an address and port of a pod that it has a probe for; not every
//! process of the node, and not every port. Whose a connection is the kernel says: by the cgroup of the process that
//! made the socket where nodes have cgroup v2, else by its user, which is less: then every process of that user in the
//! node's own network namespace is exempt towards those ports.
//!
//! One table, `inet culvert-node`, loaded and replaced in one transaction. Probes are marked on their connection, in a
//! bit that is cleared for everyone else who connects to such a port.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use net::Netns;

use crate::error::{Error, Missing};
use crate::nft::SYN;
use crate::rules::ProbeSources;
use crate::tool::{Tools, refused, run, run_any};

const TABLE: &str = "inet culvert-node";
/// The bit of the connection's mark. Below those that Calico (0xffff0000) and kube-proxy use, beside AWS's (0x80).
const BIT: u32 = 0x800;
/// Targets at most: pods of a node times ports. Every entry costs some bytes of the kernel's.
const TARGETS_LIMIT: usize = 16_384;

/// Whose connections are probes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Prober {
    /// Those of processes in this cgroup (v2), or one below it: its path below the root, without the first slash.
    Cgroup(String),
    /// Those of this user's processes in the node's network namespace.
    User(u32),
}

/// Rewrites the source of probes.
#[derive(Clone, Debug)]
pub struct NodeProbes {
    nft: PathBuf,
}

impl NodeProbes {
    /// Finds `nft`.
    ///
    /// # Errors
    /// It isn't installed.
    pub fn find(tools: &Tools) -> Result<Self, Missing> {
        Ok(Self { nft: tools.find(&["nft"], "nftables")? })
    }

    /// Exempts connections of `prober` to `targets`, and of nobody and to nothing else. Returns the rules as the kernel
    /// lists them, for [`NodeProbes::listing`] to be compared with. `netns` is the node's.
    ///
    /// # Errors
    /// There are too many targets, the cgroup isn't there, or the kernel refuses; then all is as before.
    pub fn install(
        &self,
        netns: &Netns,
        prober: &Prober,
        sources: ProbeSources,
        targets: &[SocketAddr],
    ) -> Result<String, Error> {
        if targets.len() > TARGETS_LIMIT {
            return Err(Error::TooManyEntries(targets.len()));
        }
        run(netns, &self.nft, &["-f", "-"], &ruleset(prober, sources, targets))?;
        self.listing(netns)
    }

    /// The rules as the kernel lists them; empty when there are none.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn listing(&self, netns: &Netns) -> Result<String, Error> {
        let arguments = ["-s", "-nn", "list", "table", "inet", "culvert-node"];
        let output = run_any(netns, &self.nft, &arguments, "")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let absent = String::from_utf8_lossy(&output.stderr).contains("No such file or directory");
        if absent { Ok(String::new()) } else { Err(refused(netns, &self.nft, &arguments, &output)) }
    }

    /// Removes the rules. Whether there were any.
    ///
    /// # Errors
    /// They can't be removed.
    pub fn remove(&self, netns: &Netns) -> Result<bool, Error> {
        let there = !self.listing(netns)?.is_empty();
        if there {
            run(netns, &self.nft, &["-f", "-"], &format!("delete table {TABLE}\n"))?;
        }
        Ok(there)
    }
}

fn ruleset(prober: &Prober, sources: ProbeSources, targets: &[SocketAddr]) -> String {
    let whose = match prober {
        Prober::Cgroup(path) => {
            let path = quotable(path);
            format!("socket cgroupv2 level {} \"{path}\"", path.split('/').count())
        }
        Prober::User(user) => format!("meta skuid {user}"),
    };
    let mut text = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let mut targets = targets.to_vec();
    targets.sort_unstable();
    targets.dedup();
    for (name, kind, v4) in [("targets4", "ipv4_addr", true), ("targets6", "ipv6_addr", false)] {
        let elements = targets.iter().filter(|target| target.is_ipv4() == v4);
        let elements: Vec<_> = elements.map(|t| format!("{} . {}", t.ip(), t.port())).collect();
        // Writing to a string can't fail.
        let _ = writeln!(text, "  set {name} {{\n    type {kind} . inet_service");
        if !elements.is_empty() {
            let _ = writeln!(text, "    elements = {{ {} }}", elements.join(", "));
        }
        text.push_str("  }\n");
    }
    let ProbeSources { ipv4, ipv6 } = sources;
    let marked = format!("ct mark & {BIT:#010x} == {BIT:#010x} fib saddr type local");
    let _ = write!(
        text,
        "  chain probes {{\n    ct mark set ct mark & {keep:#010x}\n    {whose} ct mark set ct mark | {BIT:#010x}\n  }}\n\
           chain mark_probes {{\n    type filter hook output priority 0; policy accept;\n    \
             {SYN} ip daddr . tcp dport @targets4 jump probes\n    \
             {SYN} ip6 daddr . tcp dport @targets6 jump probes\n  }}\n\
           chain rewrite_probes {{\n    type nat hook postrouting priority 99; policy accept;\n    \
             {marked} ip daddr . tcp dport @targets4 snat ip to {ipv4}\n    \
             {marked} ip6 daddr . tcp dport @targets6 snat ip6 to {ipv6}\n  }}\n}}\n",
        keep = !BIT,
    );
    text
}

/// A path that ends no string of nft's language. Cgroups are named by programs; none has a reason for such names.
fn quotable(path: &str) -> String {
    path.trim_matches('/').chars().filter(|c| !c.is_control() && *c != '"').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_is_the_depth_of_the_cgroup() {
        let sources = ProbeSources::default();
        let of = |path: &str| ruleset(&Prober::Cgroup(path.to_owned()), sources, &[]);
        assert!(of("/system.slice/kubelet.service").contains("level 2 \"system.slice/kubelet.service\""));
        assert!(of("kubelet").contains("level 1 \"kubelet\""));
        assert!(of("a\"b\n").contains("level 1 \"ab\""));
        assert!(!of("kubelet").contains("elements"), "an empty set has none");
    }
}
