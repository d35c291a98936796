//! Istio's own clients at the program on a real API server: its delta ADS client and its client of the CA, built from the Go
//! module `istio.io/istio` by `make interop`. Without them, or without the API server, the test says so and passes, unless
//! `CULVERT_REQUIRE_ISTIO` is set.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]
#![allow(clippy::print_stderr, reason = "says that it was skipped")]

mod apiserver;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use apiserver::{Cluster, Plane, Process, apply_crds, fill, pod, policy, set_address};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

fn client() -> Option<PathBuf> {
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/interop/istio/client");
    if client.exists() {
        return Some(client);
    }
    let missing = format!("there is no {} (make interop builds it)", client.display());
    assert!(std::env::var_os("CULVERT_REQUIRE_ISTIO").is_none(), "{missing}");
    eprintln!("skipped: {missing}");
    None
}

/// Istio's clients with the token of a pod of a ztunnel.
struct Clients<'a> {
    program: PathBuf,
    cluster: &'a Cluster,
    plane: &'a Plane,
}

impl Clients<'_> {
    fn command(&self) -> Command {
        let token = ["create", "token", "ztunnel", "-n", "culvert-system", "--audience", "istio-ca"];
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", "ztunnel-a"];
        let token = self.cluster.kubectl(&[&token[..], &bound[..]].concat(), "").unwrap();
        std::fs::write(self.cluster.at("token"), token.trim()).unwrap();
        let root =
            self.cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert", "-o", "json"], "");
        let root: Value = serde_json::from_str(&root.unwrap()).unwrap();
        std::fs::write(self.cluster.at("root.pem"), root["data"]["root-cert.pem"].as_str().unwrap()).unwrap();
        let mut command = Command::new(&self.program);
        command.arg("-address").arg(self.plane.grpc.to_string()).args(["-name", "localhost"]);
        command.arg("-root").arg(self.cluster.at("root.pem")).arg("-token").arg(self.cluster.at("token"));
        command.args([
            "-pod",
            "ztunnel-a",
            "-namespace",
            "culvert-system",
            "-node",
            "node1",
            "-ip",
            "10.0.0.9",
        ]);
        command
    }

    /// Has an identity certified: the token's own, or another.
    fn sign(&self, identity: Option<&str>) -> Result<Value, String> {
        let output = self.command().arg("sign").args(identity).output().unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        // Its log is there too.
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(serde_json::from_str(text.lines().find(|line| line.starts_with('{')).unwrap()).unwrap())
    }

    fn watch(&self, refuse: &str) -> Watch {
        let mut command = self.command();
        command.args(["-refuse", refuse, "watch"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let log = std::fs::File::create(self.cluster.at("client.log")).unwrap();
        let mut process = command.stderr(log).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok).filter(|line| line.starts_with('{')) {
                let _ = sender.send(serde_json::from_str(&line).unwrap());
            }
        });
        Watch { _process: Process(process), events }
    }
}

/// The events of a client that follows the control plane.
struct Watch {
    _process: Process,
    events: Receiver<Value>,
}

impl Watch {
    /// All events until the first that this holds for, which is the last of them.
    fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut seen = Vec::new();
        loop {
            let event = self.events.recv_timeout(SOON);
            seen.push(event.unwrap_or_else(|error| panic!("{what}: {error} after {seen:#?}")));
            if holds(&seen[seen.len() - 1]) {
                return seen;
            }
        }
    }

    /// The next version of a resource.
    fn next(&self, name: &str) -> Value {
        let seen = self.until(name, |event| event["event"] == "add" && event["name"] == name);
        seen[seen.len() - 1]["object"].clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istios_clients_follow_what_changes() {
    let Some(program) = client() else { return };
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    let plane = Plane::start(&cluster, "culvertd-a");
    let root = || cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok();
    cluster.until("the root in every namespace", root);
    let clients = Clients { program, cluster: &cluster, plane: &plane };

    let watch = clients.watch("");
    let workload = watch.next("Kubernetes//Pod/shop/a")["workload"].clone();
    for (field, meant) in [
        ("uid", json!("Kubernetes//Pod/shop/a")),
        ("serviceAccount", json!("web")),
        ("trustDomain", json!("cluster.local")),
        ("tunnelProtocol", json!("HBONE")),
        ("node", json!("node1")),
        // 10.1.0.1 in base 64.
        ("addresses", json!(["CgEAAQ=="])),
        ("authorizationPolicies", Value::Null),
    ] {
        assert_eq!(workload[field], meant, "{field} of {workload:#}");
    }

    cluster.apply(&policy("ALLOW"));
    let authorization = watch.next("shop/p");
    assert_eq!(
        (&authorization["scope"], &authorization["action"]),
        (&json!("WORKLOAD_SELECTOR"), &Value::Null)
    );
    // The names of Go's side of facts 4.7: groups of rules of matches.
    let matches = json!([{ "namespaces": [{ "exact": "shop" }] }]);
    assert_eq!(authorization["groups"], json!([{ "rules": [{ "matches": matches }] }]));
    let attached = watch.next("Kubernetes//Pod/shop/a");
    assert_eq!(attached["workload"]["authorizationPolicies"], json!(["shop/p"]));
    let says = |kind: &str, reason: &str, text: &str| {
        let found = cluster.condition("authorizationpolicy", "p", kind);
        found.is_some_and(|(_, r, message)| r == reason && message.contains(text))
    };
    cluster.until("it is counted apart", || says("Enforced", "NoProxies", "1 proxies of another make"));
    cluster.until("Accepted", || says("ZtunnelAccepted", "Accepted", ""));

    cluster.kubectl(&["delete", "authorizationpolicy", "-n", "shop", "p"], "").unwrap();
    let detached = watch.next("Kubernetes//Pod/shop/a");
    assert_eq!(detached["workload"]["authorizationPolicies"], Value::Null);
    watch.until("its removal", |event| event["event"] == "delete" && event["name"] == "shop/p");

    // One that refuses is told of the others still, and goes on.
    let refusing = clients.watch("Kubernetes//Pod/shop/a");
    refusing.next("Kubernetes//Pod/shop/a");
    cluster.apply(&pod("shop", "b", "web"));
    set_address(&cluster, "b", "10.1.0.2");
    for watch in [&refusing, &watch] {
        watch.until("another pod", |event| {
            event["name"] == "Kubernetes//Pod/shop/b"
                && event["object"]["workload"]["addresses"] == json!(["CgEAAg=="])
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istios_clients_are_certified() {
    let Some(program) = client() else { return };
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    let plane = Plane::start(&cluster, "culvertd-a");
    let root = || cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok();
    cluster.until("the root in every namespace", root);
    let clients = Clients { program, cluster: &cluster, plane: &plane };
    let own = clients.sign(None).unwrap();
    assert_eq!(own["identities"], json!(["spiffe://cluster.local/ns/culvert-system/sa/ztunnel"]));
    // A leaf and the root, for the hour that was asked for.
    assert_eq!(own["certificates"], 2);
    assert!(own["seconds"].as_u64().is_some_and(|seconds| seconds <= 3600));
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(clients.sign(Some(web)).unwrap()["identities"], json!([web]));
    let refusal = clients.sign(Some("spiffe://cluster.local/ns/shop/sa/nobody")).unwrap_err();
    assert!(
        refusal.contains("PermissionDenied") && refusal.contains("no pod runs on that node"),
        "{refusal}"
    );
}
