//! The directory of manifests that the lab's ztunnels read: what a user would give to Kubernetes, and on each Pod
//! one annotation that says where its network namespace is.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Lab, NodeId, Pod};

/// The namespace whose pods are in the mesh.
pub const ENROLLED: &str = "shop";
/// One whose pods are too, and whose connections are not encrypted where they stay on a node.
pub const DIRECT: &str = "direct";
/// One more, whose connections pass by the kernel's verdicts where they stay on a node.
pub const KERNEL: &str = "kernel";
/// The one whose pods are not.
pub const OUTSIDE: &str = "outside";

/// The pod, Service and Gateway that a waypoint runs as. It takes tunnels itself, so nothing captures its traffic.
pub const WAYPOINT: &str = "waypoint";

/// A Service in the namespace [`ENROLLED`], backed by the pod of the same name.
pub struct ServicePlan {
    /// The name of the Service and of its pod.
    pub name: &'static str,
    /// The number of its ClusterIPs: `10.96.0.N` and `fd00:10:96::N`; `None` for a headless one.
    pub number: Option<u8>,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The Service's port.
    pub port: u16,
    /// The pod's port.
    pub target: u16,
}

/// The manifests' directory.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Writes the whole directory.
    pub fn write(lab: &Lab, services: &[ServicePlan]) -> Result<Self> {
        let dir = lab.dir().join("manifests");
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let manifests = Self { dir };
        let local = |name: &str, mode: &str| {
            namespace(name, true) + &format!("  annotations:\n    culvert.dev/node-local: {mode}\n")
        };
        let namespaces = [
            namespace(ENROLLED, true),
            local(DIRECT, "direct"),
            local(KERNEL, "kernel"),
            namespace(OUTSIDE, false),
        ];
        manifests.put("namespaces", &namespaces.join("---\n"))?;
        manifests.put("nodes", &NodeId::ALL.map(node).join("---\n"))?;
        for pod in lab.pods() {
            manifests.put(&format!("pod-{}", pod.plan.name), &pod_manifest(pod))?;
        }
        for plan in services {
            manifests.put(&format!("service-{}", plan.name), &service(plan))?;
        }
        Ok(manifests)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts a file into the directory in one step, as `kubectl apply` would: readers see the old or the new one.
    pub fn put(&self, name: &str, text: &str) -> Result<()> {
        let file = self.dir.join(format!("{name}.yaml"));
        // Outside the directory, so that the half-written one is never seen.
        let next = self.dir.with_extension(name);
        fs::write(&next, text)
            .and_then(|()| fs::rename(&next, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

fn namespace(name: &str, enrolled: bool) -> String {
    let label = if enrolled { "\n  labels:\n    istio.io/dataplane-mode: ambient" } else { "" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}{label}\n")
}

fn node(node: NodeId) -> String {
    format!(
        "apiVersion: v1
kind: Node
metadata:
  name: {name}
  labels:
    topology.kubernetes.io/region: home
    topology.kubernetes.io/zone: zone-{number}
status:
  addresses:
  - type: InternalIP
    address: {v4}
  - type: InternalIP
    address: {v6}
",
        name = node.name(),
        number = node.number(),
        v4 = node.uplink_v4(),
        v6 = node.uplink_v6(),
    )
}

fn pod_manifest(pod: &Pod) -> String {
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata:
  name: {name}
  namespace: {namespace}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  uid: pod-{name}
  labels:
    app: {name}{more}
  annotations:
    culvert.dev/netns: {netns}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - name: main
    image: {name}
status:
  phase: Running
  podIP: {v4}
  podIPs:
  - ip: {v4}
  - ip: {v6}
  conditions:
  - type: Ready
    status: \"True\"
",
        name = pod.plan.name,
        more = if pod.plan.name == WAYPOINT {
            "\n    istio.io/dataplane-mode: none\n    gateway.networking.k8s.io/gateway-name: waypoint"
        } else {
            ""
        },
        namespace = pod.plan.namespace,
        netns = pod.netns_path().display(),
        node = pod.plan.node.name(),
        v4 = pod.v4,
        v6 = pod.v6,
    )
}

fn service(plan: &ServicePlan) -> String {
    let ServicePlan { name, number, protocol, port, target } = plan;
    let addresses = match number {
        Some(n) => {
            let [v4, v6] = service_ips(*n);
            format!("  clusterIP: {v4}\n  clusterIPs:\n  - {v4}\n  - {v6}\n")
        }
        None => "  clusterIP: None\n".to_owned(),
    };
    format!(
        "apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: shop
spec:
{addresses}  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector:
    app: {name}
  ports:
  - name: main
    protocol: {protocol}
    port: {port}
    targetPort: {target}
"
    )
}

/// The addresses of the Service with this number.
pub fn service_ips(number: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, number).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(number)).into(),
    ]
}
