//! Manifests as users write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use harness::netns::Host;

/// Several documents in one file.
pub fn join(documents: impl IntoIterator<Item = String>) -> String {
    documents.into_iter().collect::<Vec<_>>().join("---\n")
}

pub fn namespace(name: &str, enrolled: bool) -> String {
    let label = if enrolled { "\n  labels: {istio.io/dataplane-mode: ambient}" } else { "" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}{label}\n")
}

/// Each node is a zone of its own.
pub fn node(host: &Host) -> String {
    let Host { name, ipv4, ipv6, .. } = host;
    format!(
        "apiVersion: v1
kind: Node
metadata:
  name: {name}
  labels: {{topology.kubernetes.io/region: home, topology.kubernetes.io/zone: zone-{name}}}
status:
  addresses:
  - {{type: InternalIP, address: {ipv4}}}
  - {{type: InternalIP, address: \"{ipv6}\"}}
"
    )
}

/// A Pod with its ServiceAccount, to be changed and written.
#[derive(Clone, Debug)]
pub struct PodManifest {
    pub name: String,
    pub namespace: String,
    pub node: String,
    /// Named like the pod, without a number at its end.
    pub app: String,
    pub service_account: String,
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
    pub ready: bool,
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
}

impl PodManifest {
    pub fn new(host: &Host, namespace: &str, node: &str) -> Self {
        let app = host.name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-');
        Self {
            name: host.name.clone(),
            namespace: namespace.to_owned(),
            node: node.to_owned(),
            app: app.to_owned(),
            service_account: host.name.clone(),
            netns: PathBuf::from("/run/netns").join(&host.namespace),
            addresses: vec![host.ipv4.into(), host.ipv6.into()],
            ready: true,
            labels: Vec::new(),
            annotations: Vec::new(),
        }
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn ready(mut self, ready: bool) -> Self {
        self.ready = ready;
        self
    }
}

impl fmt::Display for PodManifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, namespace, node, app, service_account, netns, .. } = self;
        write!(
            f,
            "apiVersion: v1
kind: ServiceAccount
metadata: {{name: {service_account}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  uid: pod-{name}
  labels:
    app: {app}
"
        )?;
        for (key, value) in &self.labels {
            writeln!(f, "    {key}: \"{value}\"")?;
        }
        writeln!(f, "  annotations:\n    culvert.dev/netns: {}", netns.display())?;
        for (key, value) in &self.annotations {
            writeln!(f, "    {key}: \"{value}\"")?;
        }
        write!(
            f,
            "spec:
  nodeName: {node}
  serviceAccountName: {service_account}
  containers: [{{name: main, image: {app}}}]
status:
  phase: Running
  conditions: [{{type: Ready, status: \"{ready}\"}}]
  podIPs:
",
            ready = if self.ready { "True" } else { "False" }
        )?;
        self.addresses.iter().try_for_each(|ip| writeln!(f, "  - ip: \"{ip}\""))
    }
}

/// A Service of the namespace `shop` for the pods of the app of its name.
#[derive(Clone, Debug)]
pub struct ServiceManifest {
    pub name: String,
    /// Its ClusterIPs are [`vips`] of it; `None` for a headless one.
    pub number: Option<u8>,
    pub ports: Vec<(u16, u16)>,
    /// Further lines of its spec.
    pub spec: Vec<String>,
}

impl ServiceManifest {
    pub fn new(name: &str, number: impl Into<Option<u8>>, port: u16, target: u16) -> Self {
        Self { name: name.to_owned(), number: number.into(), ports: vec![(port, target)], spec: Vec::new() }
    }

    pub fn spec(mut self, line: &str) -> Self {
        self.spec.push(line.to_owned());
        self
    }
}

impl fmt::Display for ServiceManifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, .. } = self;
        writeln!(f, "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:")?;
        match self.number {
            Some(number) => {
                let [v4, v6] = vips(number);
                writeln!(f, "  clusterIP: {v4}\n  clusterIPs: [{v4}, \"{v6}\"]")?;
            }
            None => writeln!(f, "  clusterIP: None")?,
        }
        writeln!(f, "  ipFamilies: [IPv4, IPv6]\n  selector: {{app: {name}}}")?;
        self.spec.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        writeln!(f, "  ports:")?;
        let mut ports = self.ports.iter();
        ports.try_for_each(|(port, target)| {
            writeln!(f, "  - {{name: p{port}, port: {port}, targetPort: {target}}}")
        })
    }
}

/// The addresses of the Service with this number.
pub fn vips(number: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, number).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
    ]
}

/// A PeerAuthentication of the namespace `shop`, or of the pods of one app.
pub fn mtls(mode: &str, app: Option<&str>) -> String {
    let selector = app.map(|a| format!("  selector: {{matchLabels: {{app: {a}}}}}\n")).unwrap_or_default();
    let name = app.unwrap_or("default");
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: shop}}\nspec:\n{selector}  mtls: {{mode: {mode}}}\n"
    )
}

/// An AuthorizationPolicy for the pods of one app, with one rule.
pub fn policy(name: &str, action: &str, app: &str, rule: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: shop}}\nspec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  \
         action: {action}\n  rules:\n  - {rule}\n"
    )
}

/// The mesh's settings with this for connections that stay on a node.
pub fn node_local(mode: &str) -> String {
    format!(
        "apiVersion: mesh.istio.io/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {{nodeLocal: {mode}}}\n"
    )
}

/// The mesh's settings with this treatment of addresses that nothing is known of.
pub fn outbound(mode: &str) -> String {
    format!(
        "apiVersion: mesh.istio.io/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec:\n  \
         outboundTrafficPolicy: {{mode: {mode}}}\n"
    )
}
