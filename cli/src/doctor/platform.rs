//! Where distributions of Kubernetes have their CNI plugins and the configuration of these, when that is elsewhere than usual. In
//! the wrong directory of configuration the mesh's plugin is never called, and the runtime does not find what is in the wrong one
//! of plugins, so that no pod starts.

use anyhow::Result;
use serde_json::Value;

use super::{Finding, Grade, text};
use crate::cluster::Cluster;

const TOPIC: &str = "cni directories";

/// What tells that a node is of a distribution.
enum Sign {
    Label(&'static str),
    /// In the kubelet's version.
    Version(&'static str),
}

/// A distribution: where it has what, the usual place in newer ones first.
struct Platform {
    name: &'static str,
    sign: Sign,
    plugins: &'static [&'static str],
    configuration: &'static [&'static str],
    /// Further values that it needs.
    more: &'static str,
}

const PLATFORMS: [Platform; 3] = [
    Platform {
        name: "GKE",
        sign: Sign::Label("cloud.google.com/gke-nodepool"),
        plugins: &["/home/kubernetes/bin"],
        configuration: &["/etc/cni/net.d"],
        more: ",resourceQuota.enabled=true",
    },
    Platform {
        name: "k3s",
        sign: Sign::Version("+k3s"),
        // The last is where its nodes are containers (k3d).
        plugins: &["/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/data/current/bin", "/bin"],
        configuration: &["/var/lib/rancher/k3s/agent/etc/cni/net.d"],
        more: "",
    },
    Platform {
        name: "MicroK8s",
        sign: Sign::Label("microk8s.io/cluster"),
        plugins: &["/var/snap/microk8s/current/opt/cni/bin"],
        configuration: &["/var/snap/microk8s/current/args/cni-network"],
        more: "",
    },
];

impl Platform {
    fn has(&self, node: &Value) -> bool {
        match self.sign {
            Sign::Label(label) => {
                node.pointer("/metadata/labels").is_some_and(|all| all.get(label).is_some())
            }
            Sign::Version(part) => text(node, "/status/nodeInfo/kubeletVersion").contains(part),
        }
    }
}

/// What is to be said of the nodes' directories.
///
/// # Errors
/// The API server can't be asked.
pub(super) fn findings(cluster: &Cluster, nodes: &[Value]) -> Result<Vec<Finding>> {
    let path = format!("/apis/apps/v1/namespaces/{}/daemonsets/culvert-node", cluster.system);
    let agents = cluster.find(&path)?;
    let found = PLATFORMS.iter().filter(|platform| nodes.iter().any(|node| platform.has(node)));
    Ok(found.map(|platform| look(platform, agents.as_ref())).collect())
}

fn look(platform: &Platform, agents: Option<&Value>) -> Finding {
    let Platform { name, plugins, configuration, more, .. } = platform;
    let first = |paths: &[&'static str]| paths.first().copied().unwrap_or_default();
    let values =
        format!("--set node.cniBinDir={},node.cniConfDir={}{more}", first(plugins), first(configuration));
    let older = plugins.get(1..).filter(|others| !others.is_empty());
    let older = older.map_or(String::new(), |others| format!(", in others {}", others.join(" or ")));
    let Some(agents) = agents else {
        let detail = format!("there are nodes of {name}, whose directories are not the usual ones");
        return Finding::new(TOPIC, Grade::Note, detail, format!("install with {values}{older}"));
    };
    let volumes = agents.pointer("/spec/template/spec/volumes").and_then(Value::as_array);
    let of = |volume: &str| {
        let mut all = volumes.into_iter().flatten().filter(|v| text(v, "/name") == volume);
        all.next().map(|v| text(v, "/hostPath/path").trim_end_matches('/')).unwrap_or_default()
    };
    let (bin, conf) = (of("cni-bin"), of("cni-conf"));
    if plugins.contains(&bin) && configuration.contains(&conf) {
        return Finding::new(TOPIC, Grade::Ok, format!("those of {name}"), "");
    }
    let detail =
        format!("the node agent uses {bin} and {conf}, and there are nodes of {name}, which has others");
    let remedy =
        format!("culvert upgrade {values}{older}: the directory in which the node's other plugins are");
    Finding::new(TOPIC, Grade::Problem, detail, remedy)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn agents(bin: &str, conf: &str) -> Value {
        let volume = |name: &str, path: &str| json!({"name": name, "hostPath": {"path": path}});
        json!({"spec": {"template": {"spec": {"volumes": [
            {"name": "tmp", "emptyDir": {}}, volume("cni-bin", bin), volume("cni-conf", conf),
        ]}}}})
    }

    fn platform(node: &Value) -> Option<&'static Platform> {
        PLATFORMS.iter().find(|platform| platform.has(node))
    }

    #[test]
    fn distributions_with_directories_of_their_own_are_told_by_their_nodes() {
        let node = |labels: Value, version: &str| json!({"metadata": {"labels": labels}, "status": {"nodeInfo": {"kubeletVersion": version}}});
        let name = |node: &Value| platform(node).map(|platform| platform.name);
        assert_eq!(name(&node(json!({"cloud.google.com/gke-nodepool": "a"}), "v1.33.1-gke.1")), Some("GKE"));
        assert_eq!(name(&node(json!({}), "v1.33.1+k3s1")), Some("k3s"));
        assert_eq!(name(&node(json!({"microk8s.io/cluster": "true"}), "v1.33.1")), Some("MicroK8s"));
        assert_eq!(name(&node(json!({}), "v1.33.1+rke2r1")), None);
        assert_eq!(name(&json!({})), None);
    }

    #[test]
    fn the_wrong_directories_are_said_with_the_right_ones() {
        let k3s = &PLATFORMS[1];
        let conf = "/var/lib/rancher/k3s/agent/etc/cni/net.d";
        let before = look(k3s, None);
        assert_eq!(before.grade, Grade::Note);
        assert!(before.remedy.contains(&format!("node.cniConfDir={conf}")), "{before:?}");
        for bin in ["/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/data/current/bin/", "/bin"] {
            assert_eq!(look(k3s, Some(&agents(bin, conf))).grade, Grade::Ok, "{bin}");
        }
        for (bin, conf) in [("/opt/cni/bin", conf), ("/bin", "/etc/cni/net.d")] {
            let found = look(k3s, Some(&agents(bin, conf)));
            assert_eq!(found.grade, Grade::Problem);
            assert!(
                found.detail.contains(bin) && found.remedy.contains("culvert upgrade --set"),
                "{found:?}"
            );
        }
    }
}
