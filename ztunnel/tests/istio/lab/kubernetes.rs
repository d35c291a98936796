//! etcd and an API server in a node's namespace; no kubelet, no controllers: objects are what the test says.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::netns::{Host, Process};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::PATIENCE;

const ETCD: &str = "http://127.0.0.1:2379";
const PEER: &str = "http://127.0.0.1:2380";

pub struct Kubernetes {
    host: Host,
    dir: PathBuf,
    programs: PathBuf,
    _api: Process,
    _etcd: Process,
}

impl Kubernetes {
    pub const PROGRAMS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

    /// Starts them on `host`, with their files in `dir`.
    pub fn start(host: &Host, dir: &Path, programs: &Path) -> Self {
        let mut etcd = Command::new(programs.join("etcd"));
        etcd.arg("--data-dir").arg(dir.join("etcd")).args(["--log-level", "error", "--name", "one"]);
        etcd.args(["--unsafe-no-fsync", "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        etcd.args(["--listen-peer-urls", PEER, "--initial-advertise-peer-urls", PEER]);
        etcd.args(["--initial-cluster", &format!("one={PEER}")]);
        let etcd = logged(host, &mut etcd, &dir.join("etcd.log"));
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(dir.join("sa.key"), key.serialize_pem()).unwrap();
        std::fs::write(dir.join("sa.pub"), key.public_key_pem()).unwrap();
        std::fs::write(dir.join("tokens.csv"), "admintoken,admin,1,system:masters\n").unwrap();
        let mut api = Command::new(programs.join("kube-apiserver"));
        let file = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
        api.args([
            file("cert-dir", "certs"),
            file("service-account-key-file", "sa.pub"),
            file("service-account-signing-key-file", "sa.key"),
            file("token-auth-file", "tokens.csv"),
            format!("--etcd-servers={ETCD}"),
            format!("--advertise-address={}", host.ipv4),
        ]);
        api.args([
            "--bind-address=0.0.0.0",
            "--endpoint-reconciler-type=none",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--api-audiences=https://kubernetes.default.svc,istio-ca",
            "--service-cluster-ip-range=10.96.0.0/16,fd10:96::/108",
            "--authorization-mode=RBAC",
            // There are no controllers that make accounts and their tokens.
            "--disable-admission-plugins=ServiceAccount",
        ]);
        let api = logged(host, &mut api, &dir.join("apiserver.log"));
        let config = kubeconfig(host.ipv4, "admintoken");
        std::fs::write(dir.join("kubeconfig"), config.to_string()).unwrap();
        let (dir, programs) = (dir.to_owned(), programs.to_owned());
        let kubernetes = Self { host: host.clone(), dir, programs, _api: api, _etcd: etcd };
        kubernetes.until("the API server", |k| k.kubectl(&["get", "--raw", "/readyz"], "").is_ok());
        kubernetes
    }

    /// The administrator's.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    pub fn address(&self) -> Ipv4Addr {
        self.host.ipv4
    }

    /// What it printed, or its complaints.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut kubectl = Command::new(self.programs.join("kubectl"));
        kubectl.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments).arg("--request-timeout=20s");
        kubectl.env("HOME", &self.dir);
        kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.host.netns.run(|| kubectl.spawn()).unwrap().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Applies objects.
    pub fn apply(&self, objects: &[Value]) {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        let applied = self.kubectl(&["apply", "--server-side", "-f", "-"], &list.to_string());
        applied.unwrap_or_else(|error| panic!("{error}\n{list:#}"));
    }

    /// Writes the status of an object, which says its kind, namespace and name.
    pub fn set_status(&self, object: &Value, status: &Value) {
        let metadata = &object["metadata"];
        let [kind, namespace, name] = [&object["kind"], &metadata["namespace"], &metadata["name"]]
            .map(|text| text.as_str().unwrap_or("default"));
        let patch = json!({ "status": status }).to_string();
        let arguments = [
            "patch",
            kind,
            "-n",
            namespace,
            name,
            "--subresource",
            "status",
            "--type",
            "merge",
            "-p",
            &patch,
        ];
        self.kubectl(&arguments, "").unwrap();
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.kubectl(&["delete", kind, "-n", namespace, name, "--grace-period=0", "--force"], "").unwrap();
    }

    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let text = self.kubectl(&["get", kind, "-n", namespace, name, "-o", "json"], "").ok()?;
        Some(serde_json::from_str(&text).unwrap())
    }

    /// A token for the CA and the control plane, bound to a pod.
    pub fn token(&self, namespace: &str, account: &str, pod: &str) -> String {
        let token = ["create", "token", account, "-n", namespace, "--audience", "istio-ca"];
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod];
        self.kubectl(&[&token[..], &bound[..]].concat(), "").unwrap().trim().to_owned()
    }

    /// Waits until something holds.
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !holds(self) {
            if since.elapsed() > PATIENCE {
                last_lines(&self.dir);
                panic!("waited in vain for {what}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Who `token` says one is, at this API server.
pub fn kubeconfig(address: Ipv4Addr, token: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{ "name": "c", "cluster": {
            "server": format!("https://{address}:6443"), "insecure-skip-tls-verify": true,
        } }],
        "users": [{ "name": "u", "user": { "token": token } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
    })
}

/// Starts a program that prints to a file.
pub fn logged(host: &Host, command: &mut Command, log: &Path) -> Process {
    let log = File::options().create(true).append(true).open(log).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    host.spawn(command).unwrap()
}

/// What the programs that log into `dir` said last.
pub fn last_lines(dir: &Path) {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    logs.retain(|path| path.extension().is_some_and(|e| e == "log"));
    logs.sort();
    for log in logs {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        println!("---- {}\n{}", log.display(), lines.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
}
