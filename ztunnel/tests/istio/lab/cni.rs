//! Istio's node agent (`install-cni`) and the plugin that it installs, on a node of the lab.
//!
//! The agent is made to find what it would in its container: a root of its own with the node's directories below `/host`,
//! a service account, and as process 1 one of the node's network. What it writes is in the lab's directory.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::netns::{Host, Process};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::kubernetes::{Kubernetes, logged};

/// Makes a root ($1) of the machine's, of the lab's directory of the node ($2) and of Istio's programs ($3), and runs the
/// agent in it.
const CONTAINER: &str = r#"
set -e
root=$1 node=$2 programs=$3
shift 3
mount --make-rprivate /
mkdir -p $root
mount -t tmpfs none $root
for name in bin sbin lib lib64 usr etc dev sys tmp; do
    if [ -L /$name ]; then cp -a /$name $root/$name
    elif [ -d /$name ]; then mkdir $root/$name; mount --rbind /$name $root/$name; fi
done
secrets=$root/var/run/secrets/kubernetes.io/serviceaccount
mkdir -p $secrets $root/proc $root/run $root/opt/cni/bin $root/host/proc $root/host/run/netns $root/host/opt/cni/bin $root/host/etc/cni/net.d
cp $node/token $secrets/token
touch $root/install-cni $root/opt/cni/bin/istio-cni
mount --bind $programs/install-cni $root/install-cni
mount --bind $programs/istio-cni $root/opt/cni/bin/istio-cni
mount -t proc proc $root/proc
mount -t proc proc $root/host/proc
mount --rbind /run/netns $root/host/run/netns
mount --bind $node/bin $root/host/opt/cni/bin
mount --bind $node/net.d $root/host/etc/cni/net.d
# Whose user's connections are to be let through as probes.
cp /bin/sleep $root/kubelet
$root/kubelet infinity &
exec chroot $root /install-cni "$@"
"#;

/// The values of Istio's chart.
const SELECTORS: &str = r#"
- podSelector: { matchLabels: { istio.io/dataplane-mode: ambient } }
- podSelector:
    matchExpressions: [{ key: istio.io/dataplane-mode, operator: NotIn, values: [none] }]
  namespaceSelector: { matchLabels: { istio.io/dataplane-mode: ambient } }
"#;

/// The node agent of a node. Dropping it kills it.
pub struct NodeAgent {
    process: Process,
    host: Host,
    dir: PathBuf,
}

impl NodeAgent {
    /// Starts it on `host`; its files are in `dir`, its log beside. It listens for a ztunnel at `zds`.
    pub fn start(
        kubernetes: &Kubernetes,
        host: &Host,
        dir: &Path,
        zds: &Path,
        programs: &Path,
        nft: bool,
    ) -> Self {
        for name in ["bin", "net.d", "run"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        fs::write(dir.join("token"), "admintoken").unwrap();
        let primary = json!({ "cniVersion": "1.0.0", "name": "pods", "plugins": [{ "type": "bridge" }] });
        fs::write(dir.join("net.d/10-pods.conflist"), primary.to_string()).unwrap();
        let mut agent = Command::new("unshare");
        agent
            .args(["--mount", "--pid", "--fork", "--kill-child", "bash", "-c", CONTAINER, "bash"])
            .arg(dir.join("root"))
            .arg(dir);
        agent.arg(programs).args(["--log_output_level", "default:info,cni-agent:debug"]);
        agent.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        agent.env("KUBECONFIG", kubernetes.kubeconfig()).env("CNI_AGENT_RUN_DIR", dir.join("run"));
        agent
            .env("ZTUNNEL_UDS_ADDRESS", zds)
            .env("NODE_NAME", &host.name)
            .env("AMBIENT_ENABLEMENT_SELECTOR", SELECTORS);
        agent.env("KUBERNETES_SERVICE_HOST", kubernetes.address().to_string()).envs([
            ("KUBERNETES_SERVICE_PORT", "6443"),
            ("KUBERNETES_NODE_NAME", host.name.as_str()),
            ("SKIP_TLS_VERIFY", "true"),
            ("POD_NAME", "istio-cni"),
            ("POD_NAMESPACE", "istio-system"),
            ("SYSTEM_NAMESPACE", "istio-system"),
            ("EXCLUDE_NAMESPACES", "kube-system,istio-system"),
            ("AMBIENT_ENABLED", "true"),
            ("AMBIENT_DNS_CAPTURE", "true"),
            ("AMBIENT_IPV6", "true"),
            ("CHAINED_CNI_PLUGIN", "true"),
            ("REPAIR_ENABLED", "false"),
            ("NATIVE_NFTABLES", if nft { "true" } else { "false" }),
        ]);
        let process = logged(host, &mut agent, &dir.with_extension("log"));
        let agent = Self { process, host: host.clone(), dir: dir.to_owned() };
        kubernetes.until("the node agent", |_| {
            agent.host.shell("curl -fsS -m 5 http://127.0.0.1:8000/readyz").is_ok()
                && agent.chained().is_some()
        });
        agent
    }

    /// The configuration of the plugin in the chain, once it is there.
    fn chained(&self) -> Option<Value> {
        let list = fs::read(self.dir.join("net.d/10-pods.conflist")).unwrap();
        let list: Value = serde_json::from_slice(&list).ok()?;
        let mut plugin = list["plugins"].as_array()?.iter().find(|p| p["type"] == "istio-cni")?.clone();
        plugin["name"] = list["name"].clone();
        plugin["cniVersion"] = list["cniVersion"].clone();
        Some(plugin)
    }

    /// Has the plugin add a pod of the namespace `shop`, as a container runtime does. Its complaint, if it has one.
    pub fn add(&self, pod: &Host) -> Result<(), String> {
        let mut configuration = self.chained().unwrap();
        configuration["prevResult"] = json!({
            "cniVersion": configuration["cniVersion"], "interfaces": [{ "name": "eth0", "sandbox": "x" }],
            "ips": [{ "interface": 0, "address": format!("{}/24", pod.ipv4) },
                    { "interface": 0, "address": format!("{}/64", pod.ipv6) }],
        });
        let mut plugin = Command::new(self.dir.join("bin/istio-cni"));
        plugin.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs([
            ("CNI_COMMAND", "ADD".to_owned()),
            ("CNI_CONTAINERID", format!("container-{}", pod.name)),
            ("CNI_NETNS", format!("/run/netns/{}", pod.namespace)),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", self.dir.join("bin").display().to_string()),
            ("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={}", pod.name)),
        ]);
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.host.netns.run(|| plugin.spawn()).unwrap().unwrap();
        child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(()) } else { Err(text(&output.stdout) + &text(&output.stderr)) }
    }

    /// Kills it, so that it takes nothing back.
    pub fn kill(mut self) {
        self.process.signal(Signal::SIGKILL).unwrap();
        let _ = self.process.wait(super::PATIENCE);
    }
}
