//! Redirection of a pod's traffic to ztunnel.
//!
//! ztunnel listens inside the pod's network namespace; capture adds rules there. Three back-ends write the
//! same rules down in different languages, behind one trait, [`Capture`]; a fourth does the same by eBPF, without netfilter.
//!
//! ```text
//!                      pod's network namespace
//!   in   -- SYN --> [mangle] [nat: redirect to 15006] [guard: refuse what wasn't] --> ztunnel
//!   out  -- SYN --> [nat: redirect to 15001]          [guard: refuse what wasn't] --> ztunnel
//!   ztunnel, with the client's address and mark 0x539 --> application
//!   application's reply, mark 0x111 restored --> table 100: everything is local --> ztunnel
//! ```
//!
//! Invariants:
//! * only the first packet of a TCP connection is looked at: what lives at enrolment goes on;
//! * a new connection is redirected, exempt by the rules, or refused with a reset: a dead ztunnel, a failed
//!   redirection and a half-done installation all refuse;
//! * traffic that stays on the pod's loopback device is left alone;
//! * what was added is removed to the last line, and nothing else is touched.
//!
//! ztunnel's packets are known by their mark. A process in the pod with `CAP_NET_ADMIN` or `CAP_NET_RAW` can
//! set that mark and go past its own pod's outgoing capture, as in every mesh that captures inside the pod;
//! marks don't leave a namespace, so nobody goes past another's incoming capture.
#![forbid(unsafe_code)]

mod backend;
mod ebpf;
mod error;
mod iptables;
mod live;
mod nf_tables;
mod nft;
mod node_probes;
mod probe;
mod replace;
mod routing;
mod rules;
mod select;
mod timeouts;
mod tool;

pub use backend::{Backend, Capture, Drift, Installed, UnknownBackend};
pub use ebpf::{Counter, Programs, counters, remove_verdicts};
pub use error::{Error, Missing};
pub use iptables::Iptables;
pub use live::{Cut, Direction, LiveConnection, cut, live_connections, refuse};
pub use nft::Nftables;
pub use node_probes::{NodeProbes, Prober};
pub use replace::replace;
pub use routing::Ipv6;
pub use rules::{Include, InterfaceName, LIST_LIMIT, PortRange, Ports, ProbeSources, Rules, Tuple};
pub use select::{NoBackend, Selected, probe, select, survey};
pub use tool::Tools;
