//! Why traffic can't be captured, in words that name the package, capability or kernel feature to add.

use std::io;
use std::time::Duration;

use crate::rules::LIST_LIMIT;

/// What this machine or process lacks.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// A program isn't installed.
    #[error("{tool} is not installed; install the package {package}")]
    Tool {
        /// The program.
        tool: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A privilege is missing.
    #[error("{capability} is missing, which {purpose} needs; run as root, or add the capability")]
    Capability {
        /// Its name.
        capability: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// The rules were refused in an empty namespace: the kernel lacks a feature, as a rule a module.
    #[error("the rules don't load here, the kernel may lack a module: {0}")]
    Kernel(#[source] Box<Error>),
    /// The process's privileges can't be read.
    #[error("cannot read /proc/thread-self/status: {0}")]
    Unknown(#[source] io::Error),
}

/// Why capture could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A list of the rules is too long.
    #[error("the rules have a list of {0} entries; {LIST_LIMIT} are allowed")]
    TooManyEntries(usize),
    /// A namespace can't be entered or made.
    #[error("cannot enter network namespace {netns}: {source}")]
    Enter {
        /// Which.
        netns: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program can't be started.
    #[error("cannot run {tool}: {source}")]
    Start {
        /// The program.
        tool: String,
        /// The kernel's answer; not found when it was removed since the probe.
        #[source]
        source: io::Error,
    },
    /// A program refused what it was given.
    #[error("{command} failed in {netns} ({status}): {said}")]
    Refused {
        /// The program and its arguments.
        command: String,
        /// Where.
        netns: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it printed on standard error, shortened.
        said: String,
    },
    /// A program did not end and was killed.
    #[error("{command} did not end within {limit:?} in {netns} and was killed")]
    TimedOut {
        /// The program and its arguments.
        command: String,
        /// Where.
        netns: String,
        /// How long it was given.
        limit: Duration,
    },
    /// A back-end that was in use before does not work here any more.
    #[error("{backend} is not available here: {missing}{}", of_chart(*backend))]
    Unavailable {
        /// Which.
        backend: crate::Backend,
        /// What it lacks.
        #[source]
        missing: Box<Missing>,
    },
    /// The eBPF programs can't be changed or read.
    #[error(transparent)]
    Ebpf(#[from] ebpf::Error),
    /// The kernel refused a policy rule, a route, or another request of ours.
    #[error("cannot {action} in {netns}: {source}")]
    Netlink {
        /// What was attempted.
        action: &'static str,
        /// Where.
        netns: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// What else may be the cause in a cluster, where pods that were captured have to be let go of.
fn of_chart(backend: crate::Backend) -> &'static str {
    match backend {
        crate::Backend::Ebpf => {
            "; in a cluster, the chart's node.bpfDir must say where nodes have their bpf file system as long as pods are \
             captured by ebpf"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backend;

    #[test]
    fn what_ebpf_lacks_in_a_cluster_names_the_chart_s_value() {
        let said = |backend| {
            let missing = Box::new(Missing::Capability { capability: "CAP_BPF", purpose: "it" });
            Error::Unavailable { backend, missing }.to_string()
        };
        assert!(said(Backend::Ebpf).contains("node.bpfDir"));
        assert!(!said(Backend::Nftables).contains("node.bpfDir"));
    }
}
