//! Inside a node: process 1 of its namespaces, which makes it look like a machine of its own and keeps containerd,
//! kube-proxy and the kubelet running, as an init system would.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::{WaitStatus, waitpid};
use serde_json::json;

use crate::lab::{CLUSTER_CIDR, DNS_IP, Lab, Node};
use crate::process::{WITH_FEW_COLLECTIONS, output};
use crate::report::{say, wait_for};

/// What Kubernetes and the mesh keep on a node's disk: private to the node, and still there after a reboot.
pub const DISK: [&str; 8] = [
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/lib/cni",
    "/var/lib/culvert",
    "/var/log/pods",
    "/var/log/containers",
    "/etc/cni",
    "/opt/cni",
];

/// The daemons, in the order of their start.
pub const DAEMONS: [&str; 3] = ["containerd", "kube-proxy", "kubelet"];

/// The plugins that the node's network is made of, of Debian's containernetworking-plugins.
const CNI_PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
const CNI_PLUGINS_FROM: &str = "/usr/lib/cni";
const CGROUPS: &str = "/sys/fs/cgroup";

/// Becomes the node: returns only on an error.
///
/// # Errors
/// A mount, a cgroup or a daemon can't be made.
pub fn run(lab: &Lab, node: &Node) -> Result<()> {
    if std::process::id() != 1 {
        bail!("this is for process 1 of a node's namespaces; `kube-tests cluster up` starts it there");
    }
    fs::write("/proc/sys/kernel/hostname", node.name).context("setting the host name")?;
    mounts(lab, node)?;
    let cgroups = Cgroups::make(lab, node)?;
    cgroups.join("init", 0)?;
    settings()?;
    network(node)?;
    configure(lab, node)?;
    let mut supervisor = Supervisor { lab, node, cgroups, running: BTreeMap::new() };
    supervisor.start("containerd")?;
    wait_for("containerd", Duration::from_secs(30), || {
        supervisor.reap_ended()?;
        Ok(output("ctr", &["-n", "k8s.io", "version"]).map_err(|e| e.to_string()))
    })?;
    import(&lab.images())?;
    supervisor.start("kube-proxy")?;
    supervisor.start("kubelet")?;
    supervisor.forever()
}

fn mounts(lab: &Lab, node: &Node) -> Result<()> {
    let tree = MsFlags::MS_REC;
    attach(None, "/", None, tree | MsFlags::MS_PRIVATE)?;
    // Else the machine's named namespaces would live as long as this node.
    match umount2("/run/netns", MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error).context("unmounting /run/netns"),
    }
    // A view of /sys of this network namespace, with the machine's cgroups put back.
    let aside = lab.run(node.name).join("cgroup");
    fs::create_dir_all(&aside)?;
    attach(Some(CGROUPS), &aside, None, MsFlags::MS_BIND | tree)?;
    umount2("/sys", MntFlags::MNT_DETACH).context("unmounting /sys")?;
    attach(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty())?;
    attach(aside.to_str(), CGROUPS, None, MsFlags::MS_BIND | tree)?;
    umount2(&aside, MntFlags::MNT_DETACH).context("unmounting the cgroups")?;
    // As systemd does on every node. The node's own: what is pinned there ends with the node's power.
    let bpf = Path::new("/sys/fs/bpf");
    if bpf.exists() {
        attach(Some("bpf"), bpf, Some("bpf"), MsFlags::empty())?;
    }
    attach(Some("proc"), "/proc", Some("proc"), MsFlags::empty())?;
    // From here on, mounts reach the containers that ask for it.
    attach(None, "/", None, tree | MsFlags::MS_SHARED)?;
    attach(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty())?;
    for directory in ["/run/netns", "/run/lock"] {
        fs::create_dir_all(directory)?;
    }
    for directory in DISK {
        let own = lab.disk(node).join(directory.trim_start_matches('/'));
        fs::create_dir_all(&own)?;
        attach(own.to_str(), directory, None, MsFlags::MS_BIND)?;
    }
    Ok(())
}

fn attach(source: Option<&str>, target: impl AsRef<Path>, kind: Option<&str>, flags: MsFlags) -> Result<()> {
    let target = target.as_ref();
    mount(source, target, kind, flags, None::<&str>)
        .with_context(|| format!("mounting {} on {}", source.unwrap_or("(flags)"), target.display()))
}

/// The node's part of each cgroup tree: many of version 1, or the one of version 2.
struct Cgroups {
    own: Vec<PathBuf>,
}

impl Cgroups {
    fn make(lab: &Lab, node: &Node) -> Result<Self> {
        let root = Path::new(CGROUPS);
        let mut own = Vec::new();
        for tree in cgroup_trees() {
            let group = tree.join(lab.cgroup(node));
            fs::create_dir_all(&group).with_context(|| format!("making {}", group.display()))?;
            if tree == root || tree.ends_with("unified") {
                delegate(&tree);
            }
            if tree == root {
                delegate(&group);
            }
            inherit_cpuset(&group);
            own.push(group);
        }
        if own.is_empty() {
            bail!("no cgroups below {CGROUPS}");
        }
        Ok(Self { own })
    }

    /// Puts a process (0: this one) into a group of its own, as a service's is.
    fn join(&self, service: &str, pid: u32) -> Result<()> {
        for group in &self.own {
            let system = group.join("system");
            let leaf = system.join(service);
            fs::create_dir_all(&leaf).with_context(|| format!("making {}", leaf.display()))?;
            inherit_cpuset(&system);
            inherit_cpuset(&leaf);
            fs::write(leaf.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("moving {service} to {}", leaf.display()))?;
        }
        Ok(())
    }
}

/// The root of each cgroup tree that the kubelet uses, and of systemd's and the unified one beside them.
#[must_use]
pub fn cgroup_trees() -> Vec<PathBuf> {
    let root = Path::new(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let names =
        ["blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "pids"];
    names
        .iter()
        .chain(&["systemd", "unified"])
        .map(|name| root.join(name))
        .filter(|tree| tree.join("cgroup.procs").exists())
        .collect()
}

/// Lets a group's children have its controllers (cgroup v2). What is not to be had stays off.
fn delegate(group: &Path) {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// A new cpuset (v1) has no processors, and no process can join it, until it is given its parent's.
fn inherit_cpuset(group: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Some(value) = group.parent().and_then(|p| fs::read_to_string(p.join(file)).ok())
            && fs::read_to_string(group.join(file)).is_ok_and(|own| own.trim().is_empty())
        {
            let _ = fs::write(group.join(file), value.trim());
        }
    }
}

fn settings() -> Result<()> {
    for (file, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ] {
        fs::write(Path::new("/proc/sys").join(file), value).with_context(|| format!("setting {file}"))?;
    }
    // A pod's answer to a pod of the same node passes the bridge only: it must see the service's NAT there.
    for file in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        let bridge = Path::new("/proc/sys/net/bridge").join(file);
        if bridge.exists() {
            fs::write(bridge, "1").with_context(|| format!("setting {file}"))?;
        }
    }
    Ok(())
}

/// The primary CNI's plugins and configuration, unless the disk has them already.
fn network(node: &Node) -> Result<()> {
    let bin = Path::new("/opt/cni/bin");
    fs::create_dir_all(bin)?;
    for plugin in CNI_PLUGINS {
        let from = Path::new(CNI_PLUGINS_FROM).join(plugin);
        if !bin.join(plugin).exists() {
            fs::copy(&from, bin.join(plugin)).with_context(|| {
                format!("copying {} (package containernetworking-plugins)", from.display())
            })?;
        }
    }
    let configuration = json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "mtu": 1500,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": node.pod_cidr}], [{"subnet": node.pod_cidr6}]],
                      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::create_dir_all("/etc/cni/net.d")?;
    let path = "/etc/cni/net.d/10-bridge.conflist";
    if !Path::new(path).exists() {
        fs::write(path, format!("{configuration:#}\n")).with_context(|| path.to_owned())?;
    }
    Ok(())
}

fn configure(lab: &Lab, node: &Node) -> Result<()> {
    let own = lab.run(node.name);
    let write = |file: &str, text: &str| lab.write(&own.join(file), text);
    write("resolv.conf", &format!("nameserver {DNS_IP}\n"))?;
    write("containerd.toml", CONTAINERD)?;
    let pki = |file: String| lab.pki(&file).display().to_string();
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "failSwapOn": false,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", lab.cgroup(node)),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki("ca.crt".into())},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki(format!("{}.crt", node.name)),
        "tlsPrivateKeyFile": pki(format!("{}.key", node.name)),
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": own.join("resolv.conf").display().to_string(),
        // The machine's disk and memory are not the node's own.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%",
                         "memory.available": "100Mi"},
        "enforceNodeAllocatable": ["pods"],
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "10s",
        "shutdownGracePeriod": "0s",
    });
    write("kubelet.json", &format!("{kubelet:#}"))?;
    let proxy = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": CLUSTER_CIDR,
        "hostnameOverride": node.name,
        "clientConnection": {"kubeconfig": pki("proxy.kubeconfig".into())},
        // The machine's limits are not to be changed.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    });
    write("kube-proxy.json", &format!("{proxy:#}"))
}

/// Without CAP_SYS_RESOURCE, the score of the kernel's memory killer can't be lowered.
const CONTAINERD: &str = r#"version = 2
oom_score = 0
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "local/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#;

fn import(images: &Path) -> Result<()> {
    let entries = fs::read_dir(images).with_context(|| format!("reading {}", images.display()))?;
    let mut archives: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    archives.retain(|a| a.extension().is_some_and(|e| e == "tar"));
    archives.sort();
    for archive in archives {
        output("ctr", &["-n", "k8s.io", "images", "import", &archive.display().to_string()])?;
    }
    Ok(())
}

struct Supervisor<'a> {
    lab: &'a Lab,
    node: &'a Node,
    cgroups: Cgroups,
    running: BTreeMap<i32, &'static str>,
}

impl Supervisor<'_> {
    fn start(&mut self, daemon: &'static str) -> Result<()> {
        let mut command = self.command(daemon);
        let path = self.lab.log(&format!("{}-{daemon}.log", self.node.name));
        let log = File::options().create(true).append(true).open(&path)?;
        let child = command
            .envs(WITH_FEW_COLLECTIONS)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {daemon}"))?;
        self.cgroups.join(daemon, child.id())?;
        self.running.insert(i32::try_from(child.id())?, daemon);
        say(&format!("started {daemon}, process {}", child.id()));
        Ok(())
    }

    fn command(&self, daemon: &str) -> Command {
        let file = |name: &str| self.lab.run(self.node.name).join(name);
        match daemon {
            "containerd" => {
                let mut command = Command::new("containerd");
                command.arg("--config").arg(file("containerd.toml"));
                command
            }
            "kube-proxy" => {
                let mut command = Command::new(self.lab.bin("kube-proxy"));
                command.arg("--config").arg(file("kube-proxy.json"));
                command
            }
            _ => {
                let mut command = Command::new(self.lab.bin("kubelet"));
                command.arg("--config").arg(file("kubelet.json"));
                command.arg("--kubeconfig").arg(self.lab.pki(&format!("{}.kubeconfig", self.node.name)));
                let addresses = format!("{},{}", self.node.ip, self.node.ip6);
                command.args(["--hostname-override", self.node.name, "--node-ip", &addresses]);
                command
            }
        }
    }

    /// A daemon that ended before the node is up ends the node.
    fn reap_ended(&self) -> Result<()> {
        for pid in self.running.keys() {
            if !Path::new(&format!("/proc/{pid}/fd/0")).exists() {
                bail!("a daemon has ended: see {}", self.lab.log("").display());
            }
        }
        Ok(())
    }

    /// Buries what dies, and starts the daemons again.
    fn forever(&mut self) -> Result<()> {
        loop {
            let pid = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return Err(error).context("waiting for daemons"),
            };
            if let Some(daemon) = self.running.remove(&pid.as_raw()) {
                say(&format!("{daemon} has ended"));
                // As an init system's RestartSec.
                thread::sleep(Duration::from_secs(1));
                self.start(daemon)?;
            }
        }
    }
}
