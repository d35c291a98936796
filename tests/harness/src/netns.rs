//! A network of namespaces: nodes on a common link, pods on each node's bridge, IPv4 and IPv6, and processes
//! inside them.
//!
//! ```text
//!   pod a/web        pod a/db             pod b/web
//!     eth0             eth0                 eth0
//!      |                |                    |
//!   [p0  bridge cni0   p1]  node a        [p0 bridge cni0]  node b
//!            eth0                              eth0
//!             |                                 |
//!          [ n0            bridge br0           n1 ]   link
//! ```
//!
//! Nothing touches the machine's own namespace: the whole network is one island, so labs of several processes
//! may use the same addresses at the same time. Names start with a prefix of the process; dropping the [`Lab`]
//! kills what was started in it and deletes the namespaces, and a later lab sweeps up what a killed process
//! left behind.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use net::Netns;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Where `ip netns` keeps the names.
const RUN_NETNS: &str = "/run/netns";
/// Where `ztunnel` pins what it has in namespaces, by their number.
const PINS: &str = "/sys/fs/bpf/culvert";
/// Prefix of labs that are swept up when their process is gone.
const OWN_PREFIX: &str = "cvlab-";
/// Nodes and pods a node at most, by the addressing.
const LIMIT: usize = 200;

static LABS: AtomicUsize = AtomicUsize::new(0);

/// Whether the process may make namespaces. If not, says on standard error that `test` is skipped, and why.
#[must_use]
pub fn root_or_skip(test: &str) -> bool {
    match Netns::new_empty() {
        Ok(_) => true,
        Err(error) => {
            // Past the capture of the test runner, which hides what passing tests print.
            let _ = writeln!(io::stderr(), "skipped: {test}: needs root for network namespaces: {error}");
            false
        }
    }
}

/// Says on standard error that `test` is skipped, since eBPF is `missing`.
///
/// # Panics
/// `CI_REQUIRE_EBPF=1`, and the kernel has what the programs need.
pub fn skip_without_ebpf(test: &str, missing: &dyn std::fmt::Display) {
    let asked = std::env::var("CI_REQUIRE_EBPF").is_ok_and(|value| value == "1");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let types = Path::new("/sys/kernel/btf/vmlinux").exists();
    assert!(
        !asked || !has_ebpf(&release, types),
        "{test}: CI_REQUIRE_EBPF=1, and there is no eBPF: {missing}"
    );
    let _ = writeln!(io::stderr(), "skipped: {test}: {missing}");
}

/// Whether a kernel of this release, with type information or without, has what the programs need.
fn has_ebpf(release: &str, types: bool) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    types && (numbers.next(), numbers.next()) >= (Some(6), Some(6))
}

/// What a lab is to consist of.
#[derive(Clone, Debug)]
pub struct Builder {
    prefix: String,
    nodes: Vec<(String, Vec<String>)>,
    ipv6: bool,
}

impl Builder {
    /// Uses `prefix` instead of one made of the process id. Such a lab is never swept up: for one that is to
    /// outlive its process ([`Lab::keep`]). A prefix is at most 20 characters.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// Adds a node with pods.
    #[must_use]
    pub fn node(mut self, name: &str, pods: &[&str]) -> Self {
        self.nodes.push((name.to_owned(), pods.iter().map(|pod| (*pod).to_owned()).collect()));
        self
    }

    /// Leaves IPv6 off in every namespace (`disable_ipv6`).
    #[must_use]
    pub fn without_ipv6(mut self) -> Self {
        self.ipv6 = false;
        self
    }

    /// Makes the namespaces, devices, addresses and routes.
    ///
    /// # Errors
    /// What `ip` said; all that was made until then is deleted.
    pub fn build(self) -> io::Result<Lab> {
        if self.nodes.len() > LIMIT || self.nodes.iter().any(|(_, pods)| pods.len() > LIMIT) {
            return Err(io::Error::other(format!("a lab has at most {LIMIT} nodes with {LIMIT} pods each")));
        }
        sweep();
        let mut lab = Lab { names: Vec::new(), link: None, nodes: Vec::new(), keep: false };
        lab.make(&self)?;
        Ok(lab)
    }
}

/// A running lab. Dropping it ends it.
#[derive(Debug)]
pub struct Lab {
    /// Namespaces made so far, to be deleted.
    names: Vec<String>,
    link: Option<Host>,
    nodes: Vec<Node>,
    keep: bool,
}

/// A node: its own namespace, and its pods.
#[derive(Debug)]
pub struct Node {
    /// The node's namespace. Its device `eth0` is on the link, `cni0` is the pods' bridge.
    pub host: Host,
    /// Its pods.
    pub pods: Vec<Host>,
}

/// A namespace with addresses: a node or a pod.
#[derive(Clone, Debug)]
pub struct Host {
    /// The name that the builder was given.
    pub name: String,
    /// The namespace's name for `ip netns exec`.
    pub namespace: String,
    /// The namespace.
    pub netns: Netns,
    /// The address of its `eth0`.
    pub ipv4: Ipv4Addr,
    /// The address of its `eth0`.
    pub ipv6: Ipv6Addr,
}

impl Lab {
    /// Starts the description of a lab.
    #[must_use]
    pub fn builder() -> Builder {
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{OWN_PREFIX}{}-{number}", std::process::id());
        Builder { prefix, nodes: Vec::new(), ipv6: true }
    }

    /// The nodes, in the order of the builder.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of that name.
    ///
    /// # Panics
    /// There is none: the test and its lab disagree.
    #[must_use]
    #[allow(clippy::panic, reason = "a mistake in a test")]
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.host.name == name);
        found.unwrap_or_else(|| panic!("the lab has no node {name}"))
    }

    /// The pod of that name on any node.
    ///
    /// # Panics
    /// There is none: the test and its lab disagree.
    #[must_use]
    #[allow(clippy::panic, reason = "a mistake in a test")]
    pub fn pod(&self, name: &str) -> &Host {
        let found = self.nodes.iter().flat_map(|node| &node.pods).find(|pod| pod.name == name);
        found.unwrap_or_else(|| panic!("the lab has no pod {name}"))
    }

    /// The namespace of the link that joins the nodes: a capture of its bridge `br0` sees all that passes
    /// between them.
    #[must_use]
    pub fn link(&self) -> Option<&Host> {
        self.link.as_ref()
    }

    /// Leaves the namespaces in place when the lab is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    fn make(&mut self, plan: &Builder) -> io::Result<()> {
        let link = self.add("link", &plan.prefix, "link", (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED))?;
        in_namespace(&link, plan.ipv6, "link add br0 type bridge\nlink set br0 up\n")?;
        self.link = Some(link.clone());
        for (index, (name, pods)) in plan.nodes.iter().enumerate() {
            let addresses = (node_ipv4(index), node_ipv6(index));
            let host = self.add(name, &plan.prefix, &format!("n{index}"), addresses)?;
            let mut batch = format!(
                "link add eth0 type veth peer name n{index} netns {link}\n\
                 addr add {v4}/24 dev eth0\nlink set eth0 up\n\
                 link add cni0 type bridge\naddr add {gateway}/24 dev cni0\nlink set cni0 up\n",
                link = link.namespace,
                v4 = host.ipv4,
                gateway = pod_ipv4(index, None),
            );
            if plan.ipv6 {
                batch += &format!(
                    "addr add {}/64 dev eth0 nodad\naddr add {}/64 dev cni0 nodad\n",
                    host.ipv6,
                    pod_ipv6(index, None)
                );
            }
            in_namespace(&host, plan.ipv6, &batch)?;
            in_namespace(&link, plan.ipv6, &format!("link set n{index} master br0 up\n"))?;
            sysctl(&host.netns, "net/ipv4/ip_forward", "1")?;
            if plan.ipv6 {
                sysctl(&host.netns, "net/ipv6/conf/all/forwarding", "1")?;
            }
            self.nodes.push(Node { host, pods: Vec::new() });
            for (number, pod) in pods.iter().enumerate() {
                self.add_pod(plan, index, number, pod)?;
            }
        }
        self.add_routes(plan)
    }

    fn add_pod(&mut self, plan: &Builder, node: usize, number: usize, name: &str) -> io::Result<()> {
        let addresses = (pod_ipv4(node, Some(number)), pod_ipv6(node, Some(number)));
        let pod = self.add(name, &plan.prefix, &format!("n{node}p{number}"), addresses)?;
        let Some(Node { host, pods }) = self.nodes.get_mut(node) else {
            return Err(io::Error::other("no such node"));
        };
        let batch = format!(
            "link add p{number} type veth peer name eth0 netns {}\nlink set p{number} master cni0 up\n",
            pod.namespace
        );
        in_namespace(host, plan.ipv6, &batch)?;
        let mut batch = format!(
            "addr add {}/24 dev eth0\nlink set eth0 up\nroute add default via {}\n",
            pod.ipv4,
            pod_ipv4(node, None)
        );
        if plan.ipv6 {
            batch += &format!(
                "addr add {}/64 dev eth0 nodad\nroute add ::/0 via {}\n",
                pod.ipv6,
                pod_ipv6(node, None)
            );
        }
        in_namespace(&pod, plan.ipv6, &batch)?;
        pods.push(pod);
        Ok(())
    }

    /// From every node to the pods of every other one.
    fn add_routes(&self, plan: &Builder) -> io::Result<()> {
        for (from, node) in self.nodes.iter().enumerate() {
            let mut batch = String::new();
            for to in (0..self.nodes.len()).filter(|to| *to != from) {
                batch += &format!("route add {}/24 via {}\n", pod_network_v4(to), node_ipv4(to));
                if plan.ipv6 {
                    batch += &format!("route add {}/64 via {}\n", pod_network_v6(to), node_ipv6(to));
                }
            }
            ip_batch(&node.host.netns, &batch)?;
        }
        Ok(())
    }

    /// Makes a namespace, remembered for deletion.
    fn add(
        &mut self,
        name: &str,
        prefix: &str,
        suffix: &str,
        (ipv4, ipv6): (Ipv4Addr, Ipv6Addr),
    ) -> io::Result<Host> {
        let namespace = format!("{prefix}-{suffix}");
        run(Command::new("ip").args(["netns", "add", &namespace]))?;
        self.names.push(namespace.clone());
        let netns = Netns::open(Path::new(RUN_NETNS).join(&namespace)).map_err(io::Error::other)?;
        Ok(Host { name: name.to_owned(), namespace, netns, ipv4, ipv6 })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.keep {
            for name in &self.names {
                delete(name);
            }
        }
    }
}

impl Host {
    /// Its address of the family of `like`.
    #[must_use]
    pub fn ip(&self, v6: bool) -> IpAddr {
        if v6 { self.ipv6.into() } else { self.ipv4.into() }
    }

    /// Starts a program in the namespace. It and what it starts are killed when the [`Process`] is dropped.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Process> {
        // A group of its own, so that its children can be ended with it.
        command.process_group(0);
        let child = self.netns.run(|| command.spawn())?.map_err(|error| explain(command, &error))?;
        Ok(Process { child })
    }

    /// Runs a program in the namespace to its end, and returns what it printed.
    ///
    /// # Errors
    /// It can't be started.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.netns.run(|| command.spawn())?.map_err(|error| explain(command, &error))?;
        child.wait_with_output()
    }

    /// Runs a shell command in the namespace to its end, and returns what it printed on standard output.
    ///
    /// # Errors
    /// It can't be started, or fails; the error holds what it printed on standard error.
    pub fn shell(&self, line: &str) -> io::Result<String> {
        let output = self.output(Command::new("sh").args(["-c", line]))?;
        succeeded(line, &output)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A running program. Dropping it kills it with all of its process group.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Its process id, which is that of its group too.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The process, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal to the program and all of its group.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let group = i32::try_from(self.child.id()).map_err(io::Error::other)?;
        killpg(Pid::from_raw(group), signal).map_err(io::Error::from)
    }

    /// Waits for its end, `limit` at most.
    ///
    /// # Errors
    /// The time was up ([`io::ErrorKind::TimedOut`]); it still runs.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let step = Duration::from_millis(5);
        let mut waited = Duration::ZERO;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if waited >= limit {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(step);
            waited += step;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group may outlive its leader, so this is tried even when the leader has ended.
        let _ = self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn node_ipv4(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(172, 18, 0, byte(node + 1))
}

fn node_ipv6(node: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, word(node + 1))
}

fn pod_network_v4(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, byte(node + 1), 0)
}

fn pod_network_v6(node: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd24, 0x4400, 0, word(node + 1), 0, 0, 0, 0)
}

/// The pod's address; without a pod, the gateway's.
fn pod_ipv4(node: usize, pod: Option<usize>) -> Ipv4Addr {
    let [a, b, c, _] = pod_network_v4(node).octets();
    Ipv4Addr::new(a, b, c, byte(pod.map_or(1, |pod| pod + 10)))
}

fn pod_ipv6(node: usize, pod: Option<usize>) -> Ipv6Addr {
    let host = u128::from(word(pod.map_or(1, |pod| pod + 10)));
    Ipv6Addr::from_bits(pod_network_v6(node).to_bits() | host)
}

/// Indices stay below [`LIMIT`].
fn byte(index: usize) -> u8 {
    u8::try_from(index).unwrap_or(u8::MAX)
}

fn word(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// The loopback device, IPv6 on or off, then `batch`.
fn in_namespace(host: &Host, ipv6: bool, batch: &str) -> io::Result<()> {
    for device in ["all", "default"] {
        // Without duplicate address detection addresses can be used at once.
        let settings = [("accept_dad", "0"), ("disable_ipv6", if ipv6 { "0" } else { "1" })];
        for (setting, value) in settings {
            sysctl(&host.netns, &format!("net/ipv6/conf/{device}/{setting}"), value)?;
        }
    }
    ip_batch(&host.netns, &format!("link set lo up\n{batch}"))
}

fn sysctl(netns: &Netns, name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys").join(name);
    let written = netns.run(|| fs::write(&path, value))?;
    written.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// Runs lines of `ip` in a namespace with one process.
fn ip_batch(netns: &Netns, lines: &str) -> io::Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = netns.run(|| command.spawn())?.map_err(|error| explain(&command, &error))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes())?;
    }
    succeeded(lines, &child.wait_with_output()?)
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command.output().map_err(|error| explain(command, &error))?;
    succeeded(&format!("{command:?}"), &output)
}

fn succeeded(what: &str, output: &Output) -> io::Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{what}: {}: {}", output.status, said.trim())))
}

fn explain(command: &Command, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", command.get_program().display()))
}

/// Deletes a namespace, and what eBPF pinned for it, as a pod's and as a node's: that outlives a killed process, as it should.
fn delete(namespace: &str) {
    // First, while nobody else can get its number.
    if let Ok(file) = fs::metadata(Path::new(RUN_NETNS).join(namespace)) {
        let number = file.ino();
        for pinned in [number.to_string(), format!("verdicts-{number}")] {
            let _ = fs::remove_dir_all(Path::new(PINS).join(pinned));
        }
    }
    // Nothing can be done about a failure, and a later lab tries again.
    let _ = Command::new("ip").args(["netns", "delete", namespace]).stderr(Stdio::null()).status();
}

/// Deletes the namespaces of labs whose process has ended without dropping them.
fn sweep() {
    let Ok(entries) = fs::read_dir(RUN_NETNS) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let owner = name.strip_prefix(OWN_PREFIX).and_then(|rest| rest.split('-').next());
        let Some(Ok(owner)) = owner.map(str::parse::<u32>) else { continue };
        if !Path::new("/proc").join(owner.to_string()).exists() {
            delete(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::has_ebpf;

    #[test]
    fn kernels_that_have_ebpf_are_known() {
        for release in ["6.6.0-1-amd64", "6.18.44", "7.0-rc1\n", "10.2"] {
            assert!(has_ebpf(release, true) && !has_ebpf(release, false), "{release}");
        }
        for release in ["6.5.13", "5.10.0-30", "6", "", "unknown"] {
            assert!(!has_ebpf(release, true), "{release}");
        }
    }
}
