//! `culvert doctor`: what in a cluster is in the mesh's way, or will be: before an installation, and when something does
//! not work.

mod authority;
mod capture;
mod network_policy;
mod platform;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::admin;
use crate::cluster::{Cluster, ClusterArgs, MeshSettings, Objects, PodName};
use crate::health::{self, Check, State};
use crate::status::MODE;
use crate::table::{Output, Table, print, printable};
use crate::tag;

/// Certificates are checked by both ends' clocks; this much apart is no trouble.
const SKEW: Duration = Duration::from_secs(60);
/// The kubelet renews its lease every ten seconds, by its own clock.
const LEASE_PERIOD: Duration = Duration::from_secs(10);
/// nftables sets of addresses, cgroup v2 sockets and SO_REUSEPORT migration are there from this kernel on.
const OLDEST_KERNEL: (u32, u32) = (5, 10);
/// Node agents are asked, one after the other, for so many nodes.
const NODES_ASKED: usize = 50;

/// Looks for what is in the mesh's way: nodes, clocks, certificates, NetworkPolicies, other meshes; the exit code is 1
/// where something is
#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Ok,
    Note,
    Problem,
}

#[derive(Clone, Debug, Serialize)]
struct Finding {
    topic: &'static str,
    grade: Grade,
    detail: String,
    remedy: String,
}

impl Finding {
    fn new(topic: &'static str, grade: Grade, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { topic, grade, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Runs the command.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.cluster)?;
    let mut found = Vec::new();
    let server = cluster.server_time()?;
    found.extend(clocks(&cluster, server)?);
    let machines = cluster.list("/api/v1/nodes")?;
    found.extend(nodes(&machines));
    found.extend(back_ends(&cluster)?);
    found.extend(installation(health::look(&cluster)?));
    found.extend(authority::findings(&cluster, server)?);
    let namespaces = cluster.list("/api/v1/namespaces")?;
    let pods = cluster.list("/api/v1/pods")?;
    found.extend(capture::findings(&cluster, &namespaces, &pods, server)?);
    found.extend(capture::unselected(&MeshSettings::all(&cluster)?, &namespaces, &pods));
    found.extend(policies(&cluster, &namespaces, &pods)?);
    found.extend(orphans(&cluster)?);
    found.extend(others(&cluster, &namespaces)?);
    found.extend(primary_plugin(&cluster)?);
    found.extend(platform::findings(&cluster, &machines)?);
    if let Some(document) = args.output.document(&found)? {
        print(&document)?;
    } else {
        let mut table = Table::new(&["TOPIC", "", "FINDING"]);
        for f in &found {
            let mark = ["ok", "note", "PROBLEM"].get(f.grade as usize).copied().unwrap_or_default();
            table.row([f.topic.to_owned(), mark.to_owned(), f.detail.clone()]);
        }
        let mut text = table.to_string();
        for f in found.iter().filter(|f| f.grade != Grade::Ok && !f.remedy.is_empty()) {
            text.push_str(&format!("{}: {}\n", f.topic, printable(&f.remedy)));
        }
        print(&text)?;
    }
    let worst = found.iter().map(|f| f.grade).max().unwrap_or(Grade::Ok);
    Ok(if worst == Grade::Problem { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The parts of the mesh; that there is none yet is no trouble.
fn installation(checks: Vec<Check>) -> Vec<Finding> {
    let none = checks.len() == 1;
    let finding = |check: Check| {
        let grade = match check.state {
            State::Ready => Grade::Ok,
            _ if none => Grade::Note,
            State::Waiting | State::Failed => Grade::Problem,
        };
        Finding::new("installation", grade, format!("{}: {}", check.what, check.detail), check.remedy)
    };
    checks.into_iter().map(finding).collect()
}

fn text<'v>(object: &'v Value, path: &str) -> &'v str {
    object.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// This machine's clock and the nodes' beside the API server's.
fn clocks(cluster: &Cluster, server: SystemTime) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    let here = apart(SystemTime::now(), server);
    if here > SKEW {
        found.push(Finding::new(
            "clock",
            Grade::Note,
            format!("this machine's clock and the API server's are {} s apart", here.as_secs()),
            "synchronise this machine's clock: times that commands show are wrong by that much",
        ));
    }
    let mut checked = 0;
    for lease in cluster.list("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")? {
        let Some(renewed) = time_of(text(&lease, "/spec/renewTime")) else { continue };
        checked += 1;
        // A lease can be old because the node is away; one from the future says that its clock is ahead.
        if let Ok(ahead) = renewed.duration_since(server)
            && ahead > SKEW + LEASE_PERIOD
        {
            found.push(Finding::new(
                "clock",
                Grade::Problem,
                format!(
                    "the clock of node {} is {} s ahead of the API server's",
                    name(&lease),
                    ahead.as_secs()
                ),
                "synchronise the clocks: certificates are not valid yet, or no longer, by one that is wrong",
            ));
        }
    }
    if found.is_empty() {
        found.push(Finding::new(
            "clock",
            Grade::Ok,
            format!("{checked} nodes are not ahead of the API server"),
            "",
        ));
    }
    Ok(found)
}

fn apart(a: SystemTime, b: SystemTime) -> Duration {
    a.duration_since(b).or_else(|_| b.duration_since(a)).unwrap_or_default()
}

/// A time of Kubernetes: RFC 3339, in UTC.
fn time_of(text: &str) -> Option<SystemTime> {
    let time: k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime =
        serde_json::from_value(Value::from(text)).ok()?;
    let seconds = u64::try_from(time.0.as_second()).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Kernels and systems of the nodes.
fn nodes(nodes: &[Value]) -> Vec<Finding> {
    let mut found = Vec::new();
    for node in nodes {
        let kernel = text(node, "/status/nodeInfo/kernelVersion");
        if text(node, "/status/nodeInfo/operatingSystem") == "windows" {
            let remedy = "its pods stay outside the mesh";
            found.push(Finding::new("node", Grade::Note, format!("{} runs Windows", name(node)), remedy));
            continue;
        }
        if version(kernel).is_some_and(|v| v < OLDEST_KERNEL) {
            found.push(Finding::new(
                "node",
                Grade::Problem,
                format!("{} has kernel {kernel}", name(node)),
                format!("the mesh needs Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            ));
        }
    }
    if nodes.is_empty() {
        found.push(Finding::new("node", Grade::Note, "there are no nodes", "pods run once there are"));
    } else if found.is_empty() {
        let kernels: BTreeSet<_> = nodes.iter().map(|n| text(n, "/status/nodeInfo/kernelVersion")).collect();
        let kernels = kernels.into_iter().collect::<Vec<_>>().join(", ");
        found.push(Finding::new("node", Grade::Ok, format!("{} nodes, kernels {kernels}", nodes.len()), ""));
    }
    found
}

/// What the nodes have for capture, by their agents, which have tried it.
fn back_ends(cluster: &Cluster) -> Result<Vec<Finding>> {
    let agents = cluster.pods("culvert-node")?;
    let ask = |pod: &PodName| {
        let answer = cluster.pod_json(pod, admin::ADMIN.port(), "/capture");
        (pod.node.clone(), answer.ok().flatten().filter(|answer| !answer.is_null()))
    };
    let answers: Vec<_> = agents.iter().filter(|pod| pod.ready).take(NODES_ASKED).map(ask).collect();
    Ok(vec![tried(&answers, agents.len())])
}

/// The answers of nodes' agents, of so many, in a sentence.
fn tried(answers: &[(String, Option<Value>)], agents: usize) -> Finding {
    let known: Vec<_> = answers.iter().filter_map(|(node, answer)| Some((node, answer.as_ref()?))).collect();
    if known.is_empty() {
        let why = if agents == 0 {
            "no node agent is there yet to try what its node has for capture"
        } else {
            "no node agent says what its node has for capture"
        };
        return Finding::new("capture", Grade::Ok, why, "");
    }
    let mut chosen: BTreeMap<&str, usize> = BTreeMap::new();
    // By back-end: the nodes on which it works, and on which it doesn't, with the reason.
    let mut works: BTreeMap<&str, usize> = BTreeMap::new();
    let mut lacks: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for (node, answer) in &known {
        *chosen.entry(text(answer, "/chosen")).or_default() += 1;
        for means in answer.pointer("/tried").and_then(Value::as_array).into_iter().flatten() {
            let backend = text(means, "/backend");
            if means.pointer("/works").and_then(Value::as_bool) == Some(true) {
                *works.entry(backend).or_default() += 1;
            } else {
                lacks.entry((backend, text(means, "/what"))).or_default().push(node);
            }
        }
    }
    let counted = |counts: &BTreeMap<&str, usize>| {
        let all = counts.iter().map(|(backend, nodes)| format!("{backend} on {nodes}"));
        all.collect::<Vec<_>>().join(", ")
    };
    let mut detail = format!(
        "of {} nodes that were asked, in use: {}; tried, and works: {}",
        known.len(),
        counted(&chosen),
        counted(&works)
    );
    for ((backend, why), nodes) in lacks {
        detail.push_str(&format!("; {backend} does not on {}: {why}", nodes.join(", ")));
    }
    Finding::new("capture", Grade::Ok, detail, "")
}

fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut parts = kernel.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn policies(cluster: &Cluster, namespaces: &[Value], pods: &[Value]) -> Result<Vec<Finding>> {
    let all = cluster.list("/apis/networking.k8s.io/v1/networkpolicies")?;
    let meshed = meshed(namespaces, pods);
    let mut found: Vec<_> =
        network_policy::findings(&all, &|namespace| meshed.contains(namespace), &addresses(pods))
            .into_iter()
            .map(|f| {
                Finding::new("networkpolicy", Grade::Problem, format!("{}: {}", f.policy, f.what), f.remedy)
            })
            .collect();
    if found.is_empty() {
        found.push(Finding::new(
            "networkpolicy",
            Grade::Ok,
            format!("{} policies, none in the way", all.len()),
            "",
        ));
    }
    Ok(found)
}

/// The addresses of pods, but for those that are the nodes'.
fn addresses(pods: &[Value]) -> Vec<IpAddr> {
    let own =
        pods.iter().filter(|pod| pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) != Some(true));
    own.filter_map(|pod| text(pod, "/status/podIP").parse().ok()).collect()
}

/// The namespaces that are in the mesh, or some of whose pods are.
fn meshed<'v>(namespaces: &'v [Value], pods: &'v [Value]) -> BTreeSet<&'v str> {
    let label = |object: &Value| {
        let labels = object.pointer("/metadata/labels");
        labels.and_then(|l| l.get(MODE)).and_then(Value::as_str) == Some("ambient")
    };
    let whole = namespaces.iter().filter(|n| label(n)).map(name);
    let in_part = pods.iter().filter(|pod| label(pod)).map(|pod| text(pod, "/metadata/namespace"));
    whole.chain(in_part).collect()
}

/// Objects for a revision that no control plane is, which nobody enforces.
fn orphans(cluster: &Cluster) -> Result<Vec<Finding>> {
    let revisions = tag::revisions(cluster)?;
    let known =
        |revision: &str| revisions.iter().any(|(name, tags)| name == revision || tags.contains(revision));
    let mut found = Vec::new();
    if revisions.is_empty() {
        return Ok(found);
    }
    for object in Objects::labelled(cluster, tag::REVISION)? {
        if !known(&object.label) {
            let names: Vec<_> = revisions.keys().map(String::as_str).collect();
            found.push(Finding::new(
                "revisions",
                Grade::Problem,
                format!(
                    "{} is for revision {}, which no control plane is: it has no effect",
                    object.origin, object.label
                ),
                format!("remove its label {}, or name one of: {}", tag::REVISION, names.join(", ")),
            ));
        }
    }
    Ok(found)
}

/// The node agents of other meshes that capture the same pods.
///
/// # Errors
/// The API server can't be asked.
pub fn rivals(cluster: &Cluster) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for set in cluster.list("/apis/apps/v1/daemonsets")? {
        let (namespace, name) = (text(&set, "/metadata/namespace").to_owned(), name(&set));
        if namespace != cluster.system && ["istio-cni-node", "ztunnel"].contains(&name) {
            found.push(format!("DaemonSet {name} in namespace {namespace}"));
        }
    }
    Ok(found)
}

/// Other meshes that capture the same pods.
fn others(cluster: &Cluster, namespaces: &[Value]) -> Result<Vec<Finding>> {
    let remedy = "two node agents would both capture pods with the label istio.io/dataplane-mode: remove one";
    let finding =
        |rival: String| Finding::new("other meshes", Grade::Problem, format!("there is a {rival}"), remedy);
    let mut found: Vec<_> = rivals(cluster)?.into_iter().map(finding).collect();
    for namespace in namespaces {
        let label = |key: &str| {
            namespace.pointer("/metadata/labels").and_then(|l| l.get(key)).and_then(Value::as_str)
        };
        if label("istio-injection") == Some("enabled") && label(MODE) == Some("ambient") {
            found.push(Finding::new(
                "other meshes",
                Grade::Note,
                format!("namespace {} asks for sidecars and for this mesh", name(namespace)),
                "pods with a sidecar are left alone: remove the label istio-injection and restart them",
            ));
        }
    }
    Ok(found)
}

/// Primary CNI plugins whose settings drive the mesh's plugin out of the nodes' chains.
fn primary_plugin(cluster: &Cluster) -> Result<Vec<Finding>> {
    let path = "/api/v1/namespaces/kube-system/configmaps/cilium-config";
    Ok(cluster.find(path)?.as_ref().and_then(cilium).into_iter().collect())
}

/// Cilium removes other CNI configurations unless it is told not to: also where it says nothing of it, which older ones
/// don't.
fn cilium(config: &Value) -> Option<Finding> {
    let exclusive = text(config, "/data/cni-exclusive");
    (exclusive != "false").then(|| {
        Finding::new(
            "cni chain",
            Grade::Problem,
            "Cilium moves the CNI configurations of others away (cni-exclusive in ConfigMap kube-system/cilium-config)",
            "set cni.exclusive=false in Cilium's Helm values: pods would start without the mesh's plugin",
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kernels_are_compared_by_their_numbers() {
        assert_eq!(version("6.18.0-generic"), Some((6, 18)));
        assert_eq!(version("4.9-rc1"), Some((4, 9)));
        assert_eq!(version("x"), None);
        let node = |kernel: &str| json!({"metadata": {"name": "a"}, "status": {"nodeInfo": {"kernelVersion": kernel}}});
        let grade = |kernel: &str| nodes(&[node(kernel)])[0].grade;
        assert_eq!((grade("5.4.0"), grade("5.10.1"), grade("10.0")), (Grade::Problem, Grade::Ok, Grade::Ok));
    }

    #[test]
    fn what_nodes_have_for_capture_is_what_their_agents_tried() {
        let answer = |works: bool, what: &str| {
            let ebpf = json!({"backend": "ebpf", "works": works, "what": what});
            let nft = json!({"backend": "nftables", "works": true, "what": "nft 1.1"});
            Some(json!({"chosen": "nftables", "reason": "", "tried": [nft, ebpf]}))
        };
        let answers = [
            ("a".to_owned(), answer(true, "programs 1")),
            ("b".to_owned(), answer(false, "no BTF")),
            ("c".to_owned(), answer(false, "no BTF")),
            ("silent".to_owned(), None),
        ];
        let said = tried(&answers, 4).detail;
        assert!(said.starts_with("of 3 nodes that were asked, in use: nftables on 3;"), "{said}");
        assert!(said.contains("works: ebpf on 1, nftables on 3; ebpf does not on b, c: no BTF"), "{said}");
        assert!(tried(&[], 0).detail.contains("there yet"));
        assert!(tried(&[("silent".to_owned(), None)], 1).detail.contains("no node agent says"));
    }

    #[test]
    fn a_namespace_of_which_one_pod_asks_is_in_the_mesh_too() {
        let object = |namespace: &str, name: &str, mode: &str| json!({"metadata": {"namespace": namespace, "name": name, "labels": {MODE: mode}}});
        let namespaces =
            [object("", "shop", "ambient"), object("", "other", "none"), object("", "third", "none")];
        let pods = [object("other", "a", "ambient"), object("third", "b", "none")];
        assert_eq!(meshed(&namespaces, &pods), BTreeSet::from(["other", "shop"]));
    }

    #[test]
    fn a_cilium_that_wants_the_chain_for_itself_is_named() {
        let grade = |data: Value| cilium(&json!({ "data": data })).map(|f| f.grade);
        assert_eq!(grade(json!({ "cni-exclusive": "true" })), Some(Grade::Problem));
        assert_eq!(grade(json!({})), Some(Grade::Problem), "that is its default");
        assert_eq!(grade(json!({ "cni-exclusive": "false" })), None);
    }

    #[test]
    fn the_times_of_kubernetes_are_read() {
        let time = time_of("1970-01-02T00:00:01.123456Z").unwrap();
        assert_eq!(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 86_401);
        assert!(time_of("").is_none());
    }
}
