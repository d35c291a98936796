//! Two nodes and their pods on one machine: network namespaces on a veth pair, with real programs in them. The
//! demo and the benchmark stand on it.
//!
//! ```text
//!   pod ── veth ── bridge │ node-1 │ uplink ════ uplink │ node-2 │ bridge ── veth ── pod
//! ```
//!
//! Invariants:
//! * everything carries the lab's name: namespaces `NAME-node-1`, `NAME-POD`, files under `/run/NAME`;
//! * what was made is written down before it is used ([`state`]), so that another run can clear it up after this
//!   one was killed;
//! * [`Lab::clear`] runs on drop, unless the lab is to be kept; it ends only processes that the lab started.

mod command;
pub mod manifests;
mod process;
pub mod state;
mod topology;
pub mod wire;
mod ztunnel;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub use command::{Interrupted, Ran, Stop, missing_programs, stop_on_signals};
pub use process::Process;
pub use ztunnel::{Options as ZtunnelOptions, Ztunnel};

use crate::netns;

/// How long a ztunnel has to become ready.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a pod's program has until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Which of the two nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeId {
    /// `node-1`.
    One,
    /// `node-2`.
    Two,
}

impl NodeId {
    /// Both.
    pub const ALL: [Self; 2] = [Self::One, Self::Two];

    /// 1 or 2.
    pub fn number(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The Node's name in the manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "node-1",
            Self::Two => "node-2",
        }
    }

    /// Its address on the link between the nodes.
    pub fn uplink_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 77, self.number())
    }

    /// The same in IPv6.
    pub fn uplink_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, u16::from(self.number()))
    }

    /// The gateway of its pods is number 1 of its range.
    fn pod_v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number(), host)
    }

    fn pod_v6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(self.number()), 0, 0, 0, u16::from(host))
    }
}

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// Its name, at most 10 letters: interfaces are named after it.
    pub name: &'static str,
    /// Its namespace in Kubernetes' sense.
    pub namespace: &'static str,
    /// Where it runs. Its service account is named like itself.
    pub node: NodeId,
}

/// A pod that is up: a network namespace with addresses of both families.
#[derive(Clone, Debug)]
pub struct Pod {
    /// What it was made of.
    pub plan: PodPlan,
    /// Its network namespace's name.
    pub netns: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Pod {
    /// The file of its network namespace.
    pub fn netns_path(&self) -> PathBuf {
        netns::path_of(&self.netns)
    }

    /// Its addresses.
    pub fn ips(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// The lab. See the module.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: PathBuf,
    stop: Stop,
    state: state::State,
    pods: Vec<Pod>,
    processes: Vec<Process>,
    ztunnels: Vec<Ztunnel>,
    keep: bool,
}

impl Lab {
    /// Builds nodes and pods. Fails when a lab of that name is up.
    pub fn build(name: &str, plans: &[PodPlan], stop: &Stop) -> Result<Self> {
        let state = state::State::claim(name)?;
        let mut lab = Self {
            name: name.to_owned(),
            dir: state::directory(name),
            stop: stop.clone(),
            state,
            pods: Vec::new(),
            processes: Vec::new(),
            ztunnels: Vec::new(),
            keep: false,
        };
        let mut next = [10_u8, 10];
        for plan in plans {
            let host = next.get_mut(usize::from(plan.node.number()) - 1).context("a third node")?;
            lab.pods.push(Pod {
                plan: plan.clone(),
                netns: format!("{name}-{}", plan.name),
                v4: plan.node.pod_v4(*host),
                v6: plan.node.pod_v6(*host),
            });
            *host += 1;
        }
        lab.state.record_namespaces(lab.namespaces())?;
        topology::build(&lab)?;
        Ok(lab)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder of its files: root's alone, in memory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The flag that ends all waiting.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// The name of a node's network namespace.
    pub fn node_netns(&self, node: NodeId) -> String {
        format!("{}-{}", self.name, node.name())
    }

    /// The pods.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// A pod by name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|p| p.plan.name == name).with_context(|| format!("the lab has no pod {name}"))
    }

    fn namespaces(&self) -> Vec<String> {
        let nodes = NodeId::ALL.map(|n| self.node_netns(n));
        nodes.into_iter().chain(self.pods.iter().map(|p| p.netns.clone())).collect()
    }

    /// Starts a program in a pod or node; its output goes to a file in the lab's folder.
    pub fn spawn(&mut self, netns: &str, label: &str, argv: &[&str]) -> Result<()> {
        let process = Process::start(netns, argv, &self.dir.join(format!("{label}.log")))?;
        self.state.record_process(process.pid())?;
        self.processes.push(process);
        Ok(())
    }

    /// Waits until something listens on the TCP port in a pod. Seen in the kernel's table rather than by a
    /// connect, which capture would redirect.
    pub fn wait_listening(&self, pod: &str, port: u16) -> Result<()> {
        let path = self.pod(pod)?.netns_path();
        let listens = || {
            netns::run_in(Some(&path), || {
                ["tcp", "tcp6"].iter().any(|table| {
                    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                    has_listener(&text.unwrap_or_default(), port)
                })
            })
        };
        if self.stop.wait_until(START_LIMIT, || Ok(listens()?))? {
            return Ok(());
        }
        let log = self.dir.join(format!("{pod}.log"));
        bail!("nothing listens on port {port} in {pod} after {START_LIMIT:?}; see {}", log.display())
    }

    /// Runs a program in a pod and waits for its end. A program that fails is no error: the caller looks.
    pub fn run(&self, pod: &str, argv: &[&str]) -> Result<Ran> {
        let pod = self.pod(pod)?;
        command::run(Some(&pod.netns), pod.plan.name, argv, &self.stop)
    }

    /// The same in the namespace of a node.
    pub fn run_on(&self, node: NodeId, argv: &[&str]) -> Result<Ran> {
        command::run(Some(&self.node_netns(node)), node.name(), argv, &self.stop)
    }

    /// Starts the node's ztunnel and waits until it is ready.
    pub fn start_ztunnel(&mut self, node: NodeId, options: &ZtunnelOptions) -> Result<()> {
        self.start_ztunnel_within(node, options, READY_LIMIT)
    }

    /// The same with another time limit.
    pub fn start_ztunnel_within(
        &mut self,
        node: NodeId,
        options: &ZtunnelOptions,
        limit: Duration,
    ) -> Result<()> {
        self.ztunnels.retain(|z| z.node() != node);
        let started = Ztunnel::start(self, node, options)?;
        self.state.record_process(started.pid())?;
        self.ztunnels.push(started);
        self.ztunnel_mut(node)?.wait_ready(limit)
    }

    /// A node's ztunnel.
    pub fn ztunnel(&self, node: NodeId) -> Result<&Ztunnel> {
        self.ztunnels
            .iter()
            .find(|z| z.node() == node)
            .with_context(|| format!("no ztunnel on {}", node.name()))
    }

    /// The same, to end it.
    pub fn ztunnel_mut(&mut self, node: NodeId) -> Result<&mut Ztunnel> {
        let found = self.ztunnels.iter_mut().find(|z| z.node() == node);
        found.with_context(|| format!("no ztunnel on {}", node.name()))
    }

    /// Leaves all of it up when this value goes.
    pub fn keep(&mut self) -> Result<()> {
        self.keep = true;
        self.state.record_kept()?;
        for process in &mut self.processes {
            process.release();
        }
        for ztunnel in &mut self.ztunnels {
            ztunnel.release();
        }
        Ok(())
    }

    /// Ends the processes, deletes the namespaces, mounts and files; returns what could not be cleared.
    pub fn clear(&mut self) -> Vec<String> {
        for ztunnel in &mut self.ztunnels {
            ztunnel.terminate();
        }
        for process in &mut self.processes {
            process.terminate();
        }
        self.ztunnels.clear();
        self.processes.clear();
        state::clear(&self.name)
    }
}

/// State 0A of the kernel's table is LISTEN; the local address ends with the port in hexadecimal.
fn has_listener(table: &str, port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().unwrap_or_default();
        local.ends_with(&wanted) && fields.nth(1) == Some("0A")
    })
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.keep {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests;
