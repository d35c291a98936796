//! What every back-end does.

use std::fmt;
use std::str::FromStr;

use net::Netns;

use crate::error::Error;
use crate::routing::Ipv6;
use crate::rules::{LIST_LIMIT, Rules};

/// The kinds of back-end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Backend {
    /// `nft`.
    Nftables,
    /// `iptables-nft`: iptables' language over the kernel's nftables.
    IptablesNft,
    /// `iptables-legacy`: the kernel's older tables.
    IptablesLegacy,
    /// eBPF programs, without netfilter.
    Ebpf,
}

impl Backend {
    /// All, the preferred one first.
    pub const ALL: [Self; 4] = [Self::Nftables, Self::IptablesNft, Self::IptablesLegacy, Self::Ebpf];

    /// As it is written in settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Ebpf => "ebpf",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No back-end has that name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no capture back-end; there are nftables, iptables-nft, iptables-legacy and ebpf")]
pub struct UnknownBackend(String);

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|known| known.as_str() == name)
            .ok_or_else(|| UnknownBackend(name.to_owned()))
    }
}

/// What [`Capture::install`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Installed {
    /// Whether anything had to be changed.
    pub changed: bool,
    /// Whether IPv6 is captured too.
    pub ipv6: Ipv6,
}

/// How a namespace differs from what was installed. Rules of others don't count.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Drift {
    /// What should be there and isn't.
    pub missing: Vec<String>,
    /// What is among our rules and shouldn't be.
    pub unexpected: Vec<String>,
}

impl Drift {
    /// Whether all is as it should be.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty()
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("no drift");
        }
        let lists = [("missing", &self.missing), ("unexpected", &self.unexpected)];
        let lists = lists.iter().filter(|(_, lines)| !lines.is_empty());
        let lists: Vec<_> = lists.map(|(what, lines)| format!("{what}: {}", lines.join("; "))).collect();
        f.write_str(&lists.join(". "))
    }
}

/// Redirection of a pod's traffic to the ztunnel that listens in its namespace.
///
/// All methods block for some milliseconds, while programs run; call them where that is allowed.
pub trait Capture: Send + Sync + fmt::Debug {
    /// Which kind it is.
    fn backend(&self) -> Backend;

    /// What the program calls itself.
    fn version(&self) -> &str;

    /// Whether connections to the ports of ztunnel reach a socket of ztunnel's or nobody. Where the kernel can't
    /// tell sockets apart, a process of the pod that binds such a port while no ztunnel runs gets them.
    fn guards_ports(&self) -> bool;

    /// Captures the traffic of the pod in `netns`. From then on new connections reach ztunnel or are refused,
    /// whether ztunnel runs or not; connections that are alive go on as they are. Other rules are replaced
    /// without a moment in which traffic passes; the same rules again change nothing.
    ///
    /// # Errors
    /// What could not be done. What was done of it may remain: it refuses traffic rather than passing it.
    fn install(&self, netns: &Netns, rules: &Rules) -> Result<Installed, Error>;

    /// How `netns` differs from what [`Capture::install`] with `rules` made of it.
    ///
    /// # Errors
    /// It can't be found out.
    fn verify(&self, netns: &Netns, rules: &Rules) -> Result<Drift, Error>;

    /// Removes what [`Capture::install`] did, and nothing else. Whether there was anything.
    ///
    /// # Errors
    /// What could not be done.
    fn remove(&self, netns: &Netns) -> Result<bool, Error>;

    /// Removes what is kept outside of namespaces for pods whose namespace is gone, and says of how many: programs, also those of
    /// pods that ended before this back-end took their place. What is in a namespace goes with it.
    fn sweep(&self) -> usize {
        crate::ebpf::sweep_left()
    }

    /// From now on, pods that are captured are prepared for connections that no proxy carries, by verdicts that a ztunnel writes, as
    /// far as the kernel can keep to these for them. What is captured already has to be installed again. Whether this back-end does
    /// that; the thread has to be in the node's network namespace.
    ///
    /// # Errors
    /// The kernel refuses. Pods are captured as ever, and [`Capture::sweep`] tries again.
    fn prepare_verdicts(&self) -> Result<bool, Error> {
        Ok(false)
    }

    /// Whether a pod may be an end of such connections, or why not. `None` where nothing was prepared for it.
    fn verdict_end(&self, _netns: &Netns) -> Option<Result<(), String>> {
        None
    }

    /// Whether devices that come later are captured only after another [`Capture::install`]: [`net::netlink::Devices`] tells
    /// of them.
    fn is_by_device(&self) -> bool {
        false
    }
}

/// Refuses rules that no pod can need.
pub(crate) fn check(rules: &Rules) -> Result<(), Error> {
    match rules.longest_list() {
        longest if longest > LIST_LIMIT => Err(Error::TooManyEntries(longest)),
        _ => Ok(()),
    }
}

/// Compares listings. Lines in another order are drift too: the first rule that matches decides.
pub(crate) fn compare(expected: &[String], actual: &[String]) -> Drift {
    if expected == actual {
        return Drift::default();
    }
    let without = |lines: &[String], others: &[String]| {
        let mut others: Vec<_> = others.iter().collect();
        let mut left = Vec::new();
        for line in lines {
            match others.iter().position(|other| *other == line) {
                Some(at) => drop(others.swap_remove(at)),
                None => left.push(line.clone()),
            }
        }
        left
    };
    let mut drift = Drift { missing: without(expected, actual), unexpected: without(actual, expected) };
    if drift.is_none() {
        drift.unexpected.push("another order of the rules".to_owned());
    }
    drift
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn drift_is_what_differs() {
        assert!(compare(&lines("a b"), &lines("a b")).is_none());
        let drift = compare(&lines("a b b"), &lines("a b c"));
        assert_eq!(drift, Drift { missing: lines("b"), unexpected: lines("c") });
        assert_eq!(drift.to_string(), "missing: b. unexpected: c");
        assert!(!compare(&lines("a b"), &lines("b a")).is_none());
    }

    #[test]
    fn names_are_read_back() {
        for backend in Backend::ALL {
            assert_eq!(backend.as_str().parse(), Ok(backend));
        }
        assert!("iptables".parse::<Backend>().is_err());
    }
}
