//! The commands against a real API server: etcd and kube-apiserver on loopback, without nodes. What takes nodes is in
//! the scenarios of `tests/kube`, which also builds these programs; where they are not, the test says that it is skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]
#![allow(clippy::disallowed_types, reason = "plays a proxy, on threads of its own")]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "cluster/definitions.rs"]
mod definitions;

/// An API server with nothing behind it.
struct Server {
    directory: TempDir,
    bin: PathBuf,
    processes: Vec<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Server {
    fn start() -> Option<Self> {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube/bin");
        let bin = std::env::var_os("KUBE_BIN").map_or(built, PathBuf::from);
        let needed = ["etcd", "kube-apiserver", "kubectl", "helm"];
        if let Some(missing) = needed.iter().find(|name| !bin.join(name).is_file()) {
            eprintln!("skipped: there is no {} (`make e2e` builds it)", bin.join(missing).display());
            return None;
        }
        let mut server = Self { directory: tempfile::tempdir().unwrap(), bin, processes: Vec::new() };
        let (clients, peers, secure) = (harness::port::free(), harness::port::free(), harness::port::free());
        let clients = format!("http://127.0.0.1:{clients}");
        let peers = format!("http://127.0.0.1:{peers}");
        let etcd = [
            format!("--data-dir={}", server.path("etcd")),
            format!("--listen-client-urls={clients}"),
            format!("--advertise-client-urls={clients}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=default={peers}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        server.spawn("etcd", &etcd);
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(server.path("sa.pub"), key.public_key_pem()).unwrap();
        fs::write(server.path("sa.key"), key.serialize_pem()).unwrap();
        fs::write(server.path("tokens"), "secret,admin,1,system:masters\n").unwrap();
        let apiserver = [
            format!("--etcd-servers={clients}"),
            format!("--secure-port={secure}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--cert-dir={}", server.path("certificates")),
            format!("--service-account-key-file={}", server.path("sa.pub")),
            format!("--service-account-signing-key-file={}", server.path("sa.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--token-auth-file={}", server.path("tokens")),
            "--authorization-mode=RBAC".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        ];
        server.spawn("kube-apiserver", &apiserver);
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster":
                {"server": format!("https://127.0.0.1:{secure}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "test", "user": {"token": "secret"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(server.path("kubeconfig"), kubeconfig.to_string()).unwrap();
        for _ in 0..600 {
            if server.kubectl(&["get", "--raw", "/readyz"]).status.success() {
                return Some(server);
            }
            sleep(Duration::from_millis(100));
        }
        panic!(
            "the API server is not ready: {}",
            fs::read_to_string(server.path("kube-apiserver.log")).unwrap()
        );
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn spawn(&mut self, program: &str, arguments: &[String]) {
        let log = fs::File::create(self.path(&format!("{program}.log"))).unwrap();
        let mut command = Command::new(self.bin.join(program));
        command.args(arguments).stdout(Stdio::null()).stderr(log).current_dir(self.directory.path());
        self.processes.push(command.spawn().unwrap());
    }

    fn kubectl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.bin.join("kubectl"));
        command.args(arguments).env("KUBECONFIG", self.path("kubeconfig")).output().unwrap()
    }

    /// Applies an object, on which the server's own kinds of check are strict.
    fn apply(&self, object: &Value) -> Result<(), String> {
        let file = self.path("object.json");
        fs::write(&file, object.to_string()).unwrap();
        let output = self.kubectl(&["apply", "--server-side", "-f", &file]);
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Sets the status of an object of the mesh.
    fn status(&self, object: &str, status: &Value) {
        let patch = json!({"status": status}).to_string();
        let arguments =
            ["-n", "culvert-system", "patch", object, "--subresource=status", "--type=merge", "-p", &patch];
        let output = self.kubectl(&arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The exit code and all that was said.
    fn culvert(&self, arguments: &[&str]) -> (i32, String) {
        self.culvert_in(&[], arguments)
    }

    /// The same with more variables in its environment.
    fn culvert_in(&self, variables: &[(&str, &str)], arguments: &[&str]) -> (i32, String) {
        let path = format!("{}:{}", self.bin.display(), std::env::var("PATH").unwrap_or_default());
        let output = Command::new(env!("CARGO_BIN_EXE_culvert"))
            .args(arguments)
            .env("KUBECONFIG", self.path("kubeconfig"))
            .env("HOME", self.directory.path())
            .env("PATH", path)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap(), text)
    }

    /// The same, with a look at both.
    fn expect(&self, code: i32, words: &[&str], arguments: &[&str]) -> String {
        let (found, text) = self.culvert(arguments);
        assert_eq!(found, code, "{arguments:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
        text
    }
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
           "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

fn pod(namespace: &str, name: &str, labels: &Value, annotations: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": name, "namespace": namespace, "labels": labels, "annotations": annotations},
           "spec": {"automountServiceAccountToken": false, "containers": [{"name": "main", "image": "main"}]}})
}

/// One server for all of it: starting one costs seconds.
#[test]
fn the_commands_work_on_a_real_api_server() {
    let Some(server) = Server::start() else { return };
    before_an_installation(&server);
    through_proxies(&server);
    as_whom_kubectl_would(&server);
    installing(&server);
    pods_in_trouble(&server);
    the_node_agent_is_held_to_its_node(&server);
    definitions::are_held_to_their_rules(&server);
    definitions::of_other_versions_are_left_alone(&server);
    looking_at_the_cluster(&server);
    waiting_until_it_works(&server);
    changes_that_break(&server);
    tags(&server);
    removing(&server);
}

fn before_an_installation(server: &Server) {
    server.expect(0, &["culvert", "control plane: none"], &["version"]);
    server.expect(1, &["no culvertd in namespace culvert-system", "culvert install"], &["status"]);
    server.expect(0, &["note"], &["doctor"]);
    server.expect(2, &["no culvertd is ready"], &["proxy-status"]);
    server.expect(2, &["no ztunnel is ready"], &["ztunnel-config", "workload"]);
    server.expect(2, &["no release", "culvert install"], &["upgrade"]);
    server.expect(2, &["there is no nosuch", "--write-chart"], &["install", "--helm", "nosuch"]);
    server.expect(2, &["additional properties"], &["install", "--set", "nosuch=1", "--skip-crds"]);
    server.expect(2, &["context: nosuch", "get-contexts"], &["status", "--context", "nosuch"]);
    // A mesh of one revision that has another name than the default's.
    let metadata =
        |name: &str| json!({"name": name, "namespace": "culvert-system", "labels": {"app": "culvertd"}});
    server
        .apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "culvert-system"}}))
        .unwrap();
    for (name, data) in [("culvert-1-2", json!({"mesh": "trustDomian: a.test"})), ("culvert-0", json!({}))] {
        let settings =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(name), "data": data});
        server.apply(&settings).unwrap();
    }
    server.expect(1, &["culvert-system/culvert-1-2", "did you mean trustDomain?"], &["analyze"]);
    let delete = ["-n", "culvert-system", "delete", "configmap", "culvert-1-2", "culvert-0"];
    assert!(server.kubectl(&delete).status.success());
}

/// A proxy that knows CONNECT, and who may use it: where it is, and the heads of what it was asked.
fn connect_proxy() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, asked) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<String>>>::default());
    let heads = asked.clone();
    spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && client.read(&mut byte).is_ok_and(|read| read > 0) {
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            heads.lock().unwrap().push(head.clone());
            // "me:p@ss"
            if !head.contains("\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n") {
                client.write_all(b"HTTP/1.1 407 Who are you\r\n\r\n").unwrap();
                continue;
            }
            let mut server = TcpStream::connect(head.split(' ').nth(1).unwrap()).unwrap();
            client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            spawn(move || std::io::copy(&mut from, &mut to));
            spawn(move || std::io::copy(&mut server, &mut client));
        }
    });
    (port, asked)
}

/// As kubectl takes the way through them.
fn through_proxies(server: &Server) {
    let (port, asked) = connect_proxy();
    let kubeconfig: Value =
        serde_json::from_str(&fs::read_to_string(server.path("kubeconfig")).unwrap()).unwrap();
    let through = |proxy: &str| {
        let mut changed = kubeconfig.clone();
        changed["clusters"][0]["cluster"]["proxy-url"] = proxy.into();
        fs::write(server.path("proxied"), changed.to_string()).unwrap();
        server.culvert(&["version", "--kubeconfig", &server.path("proxied")])
    };
    let (code, text) = through(&format!("http://me:p%40ss@127.0.0.1:{port}"));
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("control plane: none"), "{text}");
    let target = kubeconfig["clusters"][0]["cluster"]["server"].as_str().unwrap().replace("https://", "");
    let first = asked.lock().unwrap()[0].clone();
    assert!(first.starts_with(&format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n")), "{first}");
    for (proxy, words) in [
        (format!("http://127.0.0.1:{port}"), "407 Who are you"),
        ("socks5://127.0.0.1:1".to_owned(), "only http:// proxies are"),
    ] {
        let (code, text) = through(&proxy);
        assert!(code == 2 && text.contains(words), "{proxy}: {text}");
    }
    // This machine is reached directly, whatever proxy there is for others.
    let nowhere = format!("http://127.0.0.1:{}", harness::port::free());
    for variable in ["HTTPS_PROXY", "https_proxy"] {
        let (code, text) = server.culvert_in(&[(variable, &nowhere)], &["version"]);
        assert_eq!(code, 0, "{variable}: {text}");
    }
}

/// kubectl's flags and files, for the commands and for the Helm that they run.
fn as_whom_kubectl_would(server: &Server) {
    let known: Value = serde_json::from_str(&fs::read_to_string(server.path("kubeconfig")).unwrap()).unwrap();
    let url = known["clusters"][0]["cluster"]["server"].as_str().unwrap();
    let more = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "",
        "clusters": [{"name": "nowhere", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "nobody", "user": {"token": "wrong"}}],
        "contexts": [{"name": "broken", "context": {"cluster": "nowhere", "user": "nobody"}}],
    });
    fs::write(server.path("more"), more.to_string()).unwrap();
    fs::write(server.path("nothing"), "").unwrap();
    let list = ["missing", "more", "kubeconfig"].map(|name| server.path(name)).join(":");
    let authority = server.path("certificates/apiserver.crt");
    let nothing = server.path("nothing");
    let alone = ["--kubeconfig", &nothing, "-s", url, "--token", "secret"];
    let known_by = ["--certificate-authority", &authority];
    // It takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let masters = ["--as", "me", "--as-uid", "7", "--as-group", "system:masters", "--as-group", "other"];
    let cases: &[(i32, &str, &[&str])] = &[
        // Which files: one that is missing is left out, and an empty current-context does not count.
        (0, "control plane: none", &["version"]),
        (2, "127.0.0.1:1", &["status", "--context", "broken"]),
        (1, "no culvertd", &["status", "--context", "broken", "--cluster", "test", "--user", "test"]),
        (2, "credentials are not valid", &["status", "--user", "nobody"]),
        (2, "there is no user nosuch", &["status", "--user", "nosuch"]),
        (1, "no culvertd", &["status", "--user", "nobody", "--token", "secret"]),
        (2, "credentials are not valid", &["status", "--token", "wrong"]),
        (2, "no answer within 1s", &["status", "-s", &silent, "--request-timeout", "1"]),
        // As whom.
        (2, "User \"me\" cannot", &["status", "--as", "me"]),
        (1, "no culvertd", &[&["status"][..], &masters].concat()),
        (1, "no culvertd", &[&masters[..], &["status"]].concat()),
        // Helm asks the same server as the same user.
        (2, "User \"me\" cannot", &["upgrade", "--as", "me"]),
        (2, "culvert install", &["upgrade", "--as", "me", "--as-group", "system:masters"]),
        (2, "no release", &["upgrade", "--context", "broken", "--cluster", "test", "--user", "test"]),
        (2, "no release", &["upgrade", "--user", "nobody", "--token", "secret"]),
        (2, "Helm, which applies the chart", &["upgrade", "--as", "me", "--as-uid", "7"]),
        (2, "no release", &[&["upgrade", "--insecure-skip-tls-verify"][..], &alone].concat()),
        (2, "no release", &[&["upgrade"][..], &known_by, &alone].concat()),
        // Without any context.
        (1, "no culvertd", &[&["status", "--insecure-skip-tls-verify"][..], &alone].concat()),
        (1, "no culvertd", &[&["status"][..], &known_by, &alone].concat()),
        (1, "no culvertd", &[&["status", "--tls-server-name", "kubernetes"][..], &known_by, &alone].concat()),
        (2, "can't be asked", &[&["status", "--tls-server-name", "other"][..], &known_by, &alone].concat()),
        (2, "can't be asked", &[&["status"][..], &alone].concat()),
        (2, "which cluster?", &["status", "--kubeconfig", &nothing]),
    ];
    for (code, words, arguments) in cases {
        let (found, text) = server.culvert_in(&[("KUBECONFIG", &list)], arguments);
        assert!(found == *code && text.contains(words), "{arguments:?}: {found}, {text}");
    }
    // `--token` of what-if is the request's, in whatever place.
    let asked = ["--source", "a/a", "--destination", "a/b", "--port", "1"];
    for (token, words) in [("secret", "a/a"), ("wrong", "credentials are not valid")] {
        for line in [vec!["what-if", "--api-token", token], vec!["--token", token, "what-if"]] {
            let (_, text) = server.culvert(&[&line[..], &asked].concat());
            assert!(text.contains(words), "{line:?}: {text}");
        }
    }
}

fn installing(server: &Server) {
    let labels = json!({"app": "ztunnel"});
    let rival = json!({"apiVersion": "apps/v1", "kind": "DaemonSet",
                       "metadata": {"name": "ztunnel", "namespace": "kube-system"},
                       "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
                                "spec": {"containers": [{"name": "main", "image": "main"}]}}}});
    server.apply(&rival).unwrap();
    let dry = server.expect(0, &["would apply sidecars", "kind: DaemonSet"], &["install", "--dry-run"]);
    assert!(!dry.contains("applied"), "{dry}");
    // Nobody answers the webhook here.
    let arguments = ["install", "--set", "webhook.enabled=false,clusterId=here", "--timeout", "3s"];
    let words = [
        "DaemonSet ztunnel in namespace kube-system",
        "applied 16 custom resource definitions",
        "waiting",
        "the mesh is not ready",
        "--timeout",
    ];
    server.expect(1, &words, &arguments);
    let label = "jsonpath={.metadata.labels.pod-security\\.kubernetes\\.io/enforce}";
    let output = server.kubectl(&["get", "namespace", "culvert-system", "-o", label]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "privileged");
    server.expect(2, &["culvert upgrade"], &["install"]);
    let upgraded =
        server.expect(1, &["applied release"], &["upgrade", "--timeout", "1s", "--set", "log.filter=debug"]);
    assert!(!upgraded.contains("custom resource definitions\n"), "{upgraded}");
    let output = server.kubectl(&["-n", "culvert-system", "get", "deployment", "culvertd", "-o", "json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("--cluster-id=here") && text.contains("debug"), "values were forgotten: {text}");
}

/// Pods that don't start say why, and what to do.
fn pods_in_trouble(server: &Server) {
    server.apply(&pod("culvert-system", "trouble", &json!({"app": "culvertd"}), &json!({}))).unwrap();
    let of = |reason: &str| {
        json!({"phase": "Pending", "conditions": [{"type": "Ready", "status": "False"}],
               "containerStatuses": [{"name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 1,
                                      "state": {"waiting": {"reason": reason, "message": "because"}}}]})
    };
    server.status("pod/trouble", &of("ImagePullBackOff"));
    server.expect(1, &["pod trouble", "ImagePullBackOff: because", "image.pullSecrets"], &["status"]);
    server.status("pod/trouble", &of("CrashLoopBackOff"));
    server.expect(1, &["kubectl logs -n culvert-system trouble --previous"], &["status"]);
    let unscheduled =
        json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "no room"}]});
    server.status("pod/trouble", &unscheduled);
    server.expect(1, &["no room", "nodeSelector"], &["verify-install", "--timeout", "0s"]);
    let delete = ["-n", "culvert-system", "delete", "pod", "trouble", "--force", "--grace-period=0"];
    assert!(server.kubectl(&delete).status.success());
}

/// What the agent's account may do of what its role can't tell apart.
fn the_node_agent_is_held_to_its_node(server: &Server) {
    server
        .apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
                       "spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}))
        .unwrap();
    for (name, node) in [("here", "n1"), ("there", "n2")] {
        let mut pod = pod("default", name, &json!({}), &json!({"kept": "a"}));
        pod["spec"]["nodeName"] = node.into();
        server.apply(&pod).unwrap();
    }
    let patch = |object: &str, change: Value| {
        let extra = "authentication.kubernetes.io/node-name=n1";
        let user = "system:serviceaccount:culvert-system:culvert-node";
        let change = change.to_string();
        let output = server.kubectl(&[
            "--as",
            user,
            "--as-user-extra",
            extra,
            "patch",
            object,
            "--type=merge",
            "-p",
            &change,
        ]);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let annotation = |key: &str, value: Value| json!({"metadata": {"annotations": {key: value}}});
    let redirection = annotation("ambient.istio.io/redirection", "enabled".into());
    let taint = |key: &str| {
        json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"},
                                                        {"key": key, "effect": "NoSchedule"}]}})
    };
    let allowed = [
        ("pod/here", redirection.clone()),
        ("pod/here", annotation("ambient.istio.io/redirection", Value::Null)),
        ("node/n1", taint("culvert.dev/agent-not-ready")),
        ("node/n1", json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}})),
    ];
    for (object, change) in allowed {
        let (fine, said) = patch(object, change.clone());
        assert!(fine, "{object} {change}: {said}");
    }
    let refused = [
        ("pod/there", redirection, "its own node"),
        ("pod/here", annotation("kept", "b".into()), "nothing else"),
        ("pod/here", annotation("kept", Value::Null), "nothing else"),
        ("pod/here", annotation("new", "b".into()), "nothing else"),
        ("pod/here", json!({"metadata": {"labels": {"a": "b"}}}), "nothing else"),
        ("pod/here", json!({"spec": {"activeDeadlineSeconds": 1}}), "nothing else"),
        ("node/n1", json!({"spec": {"unschedulable": true}}), "nothing else"),
        ("node/n1", json!({"metadata": {"labels": {"a": "b"}}}), "nothing else"),
        ("node/n1", taint("mine"), "nothing else"),
    ];
    for (object, change, words) in refused {
        let (fine, said) = patch(object, change.clone());
        assert!(!fine && said.contains(words), "{object} {change}: {said}");
    }
}

/// Of a Service and a Pod, as their author writes them, and of a Service that there is not yet.
fn what_the_server_gave(server: &Server) {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
               "spec": spec})
    };
    let service = |name: &str| {
        object(
            "Service",
            name,
            json!({"selector": {"app": "given"}, "ports": [{"name": "http", "port": 80}]}),
        )
    };
    let pod = object("Pod", "given", json!({"nodeName": "n1", "containers": [{"name": "a", "image": "a"}]}));
    let running = json!({"phase": "Running", "podIP": "10.0.9.9", "podIPs": [{"ip": "10.0.9.9"}],
                         "conditions": [{"type": "Ready", "status": "True"}]});
    server.apply(&service("given")).unwrap();
    server.apply(&pod).unwrap();
    let patch = json!({"status": running}).to_string();
    let patched = server.kubectl(&[
        "patch",
        "-n",
        "shop",
        "pod/given",
        "--subresource=status",
        "--type=merge",
        "-p",
        &patch,
    ]);
    assert!(patched.status.success(), "{}", String::from_utf8_lossy(&patched.stderr));
    let file = server.path("given.yaml");
    let all = [service("given"), service("later"), pod].map(|object| object.to_string()).join("\n---\n");
    fs::write(&file, all).unwrap();
    // An error of the cluster's own policy is all that there is.
    let text = server.expect(1, &["1 files", "2 errors"], &["analyze", &file, "--with-cluster"]);
    assert!(!text.contains("service-without-address"), "{text}");
    let asked = ["what-if", &file, "--with-cluster", "--source", "shop/given", "--destination"];
    for destination in ["shop/given", "given.shop.svc.cluster.local"] {
        server.expect(0, &["10.0.9.9"], &[&asked[..], &[destination, "--port", "80"]].concat());
    }
    for gone in ["service/given", "pod/given"] {
        let arguments = ["delete", "-n", "shop", gone, "--grace-period=0", "--force"];
        assert!(server.kubectl(&arguments).status.success(), "{gone}");
    }
}

fn looking_at_the_cluster(server: &Server) {
    let words = ["unknown-field", "did you mean principals?", "AuthorizationPolicy shop/typo"];
    server.expect(1, &words, &["analyze"]);
    server.expect(0, &[], &["analyze", "-n", "default"]);
    server.expect(
        2,
        &["no namespace nosuch", "there are culvert-system, default"],
        &["analyze", "-n", "nosuch"],
    );
    let check = ["authn", "tls-check", "-n"];
    for nosuch in ["nosuch", "pods/log"] {
        let said = format!("no namespace {nosuch} ");
        server.expect(2, &[&said, "kubectl get namespaces"], &[&check[..], &[nosuch]].concat());
    }
    for there in ["shop", "unknown"] {
        server.expect(2, &["no ztunnel"], &[&check[..], &[there]].concat());
    }
    // The file takes the place of the cluster's object.
    let file = server.path("fixed.yaml");
    let fixed = json!({"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/a"]}}]}]});
    fs::write(&file, policy("typo", &fixed).to_string()).unwrap();
    server.expect(0, &["1 files"], &["analyze", &file, "--with-cluster"]);
    what_the_server_gave(server);
    let closed = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                        "metadata": {"name": "web", "namespace": "shop"},
                        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}});
    server.apply(&closed).unwrap();
    server.expect(1, &["shop/web", "15008"], &["doctor"]);
    pods_that_are_not_captured(server);
    let (_, text) = server.culvert(&["status", "-o", "json"]);
    let status: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["namespaces"]["shop"]["wanted"], 0);
    assert_eq!(status["ready"], false);
    let pod = |name: &str, manager: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "a", "image": "a"}]},
               "metadata": {"name": name, "namespace": "shop", "labels": {
                   "gateway.networking.k8s.io/gateway-name": name, "app.kubernetes.io/managed-by": manager}}})
    };
    server.apply(&pod("a-waypoint", "culvertd")).unwrap();
    server.apply(&pod("a-gateway", "istiod")).unwrap();
    let out = server.path("report");
    server.expect(0, &["no keys"], &["bug-report", "--out", &out]);
    let analysis = fs::read_to_string(Path::new(&out).join("analyze.json")).unwrap();
    assert!(analysis.contains("unknown-field"), "{analysis}");
    // No node runs it, and its log is empty; but it was asked for, and those that others deployed are not.
    assert!(Path::new(&out).join("shop/a-waypoint/log").exists());
    assert!(!Path::new(&out).join("shop/a-gateway").exists());
    server.expect(2, &["cannot make"], &["bug-report", "--out", &out]);
}

/// `doctor` says what the node agent said, in the form in which agents say it, and not what the kubelet said later.
fn pods_that_are_not_captured(server: &Server) {
    for name in ["late", "stuck"] {
        let mut object = pod("other", name, &json!({"istio.io/dataplane-mode": "ambient"}), &json!({}));
        object["spec"]["nodeName"] = "n1".into();
        server
            .apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}}))
            .unwrap();
        server.apply(&object).unwrap();
    }
    let set = |name: &str, status: &Value| {
        let (patch, object) = (json!({"status": status}).to_string(), format!("pod/{name}"));
        let arguments =
            ["-n", "other", "patch", &object, "--subresource=status", "--type=merge", "-p", &patch];
        assert!(server.kubectl(&arguments).status.success());
    };
    set("late", &json!({"phase": "Running", "startTime": "2020-01-01T00:00:00Z"}));
    let of = |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "namespace": "other", "name": name});
    let agents = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "late.1", "namespace": "other"},
        "regarding": of("late"), "reason": "EnrolmentFailed", "type": "Warning", "action": "Enrol",
        "note": "redirection: no nft", "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "culvert-node", "reportingInstance": "n1",
    });
    let kubelets = |name: &str, pod: &str, reason: &str, message: &str| {
        json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": "other"},
               "involvedObject": of(pod), "reason": reason, "message": message, "type": "Normal",
               "lastTimestamp": "2026-01-01T00:00:09Z", "source": {"component": "kubelet"}})
    };
    let refused =
        "plugin type=\"culvert-cni\" failed (add): pod other/stuck waits for the Culvert node agent";
    server.apply(&agents).unwrap();
    server.apply(&kubelets("late.2", "late", "Started", "Started container main")).unwrap();
    server.apply(&kubelets("stuck.1", "stuck", "FailedCreatePodSandBox", refused)).unwrap();
    let said = ["other/late is not captured: redirection: no nft", "other/stuck waits: plugin type="];
    let text = server.expect(1, &said, &["doctor"]);
    assert!(!text.contains("Started container"), "{text}");
    for name in ["late", "stuck"] {
        assert!(
            server
                .kubectl(&["-n", "other", "delete", "pod", name, "--force", "--grace-period=0"])
                .status
                .success()
        );
    }
}

fn waiting_until_it_works(server: &Server) {
    server.status(
        "deployment/culvertd",
        &json!({"observedGeneration": 99, "replicas": 2, "readyReplicas": 2,
                                                 "updatedReplicas": 2, "availableReplicas": 2}),
    );
    for set in ["daemonset/culvert-node", "daemonset/ztunnel"] {
        server.status(set, &json!({"observedGeneration": 99, "currentNumberScheduled": 1, "numberMisscheduled": 0,
                                   "desiredNumberScheduled": 1, "numberReady": 1, "updatedNumberScheduled": 1}));
    }
    server.expect(1, &["no ConfigMap culvert-ca-root-cert yet"], &["verify-install", "--timeout", "1s"]);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.not_after = rcgen::date_time_ymd(2000, 1, 1);
    parameters.not_before = rcgen::date_time_ymd(1999, 1, 1);
    let root = parameters.self_signed(&key).unwrap().pem();
    server
        .apply(&json!({"apiVersion": "v1", "kind": "ConfigMap",
                         "metadata": {"name": "culvert-ca-root-cert", "namespace": "culvert-system"},
                         "data": {"root-cert.pem": root}}))
        .unwrap();
    server.expect(0, &["the mesh is ready"], &["verify-install", "--timeout", "10s"]);
    server.expect(1, &["has expired"], &["doctor"]);
}

/// What an upgrade would break is found before anything is changed, and what somebody broke is said.
fn changes_that_break(server: &Server) {
    let upgrade = |set: &'static str| ["upgrade", "--timeout", "1s", "--set", set];
    server.expect(2, &["nothing was changed", "meshConfig", "nope"], &upgrade("meshConfig.nope=1"));
    server.expect(2, &["nothing was changed", "log"], &upgrade("log.filter=loud"));
    let captured = json!({"ambient.istio.io/redirection": "enabled"});
    server.apply(&pod("shop", "kept", &json!({}), &captured)).unwrap();
    let gone = ["nothing was changed", "DaemonSet culvert-node would go", "shop/kept"];
    server.expect(2, &gone, &upgrade("node.enabled=false"));

    let kubectl = |arguments: &[&str]| {
        let output = server.kubectl(&[&["-n", "culvert-system"][..], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let edit = |mesh: &str| {
        let patch = json!({"data": {"mesh": mesh}}).to_string();
        kubectl(&["patch", "configmap", "culvert", "--type=merge", "-p", &patch]);
    };
    edit("outboundTrafficPolicy: {mode: SOMETIMES}");
    let text = server.expect(1, &["ConfigMap culvert-system/culvert: error", "SOMETIMES"], &["analyze"]);
    assert!(!text.contains("istio-system"), "{text}");
    server.expect(1, &["SOMETIMES"], &["analyze", "-n", "culvert-system"]);
    server.expect(1, &["mesh settings, ConfigMap culvert", "SOMETIMES"], &["status"]);
    edit("discoverySelectors: [{matchLabels: {mesh: \"yes\"}}]");
    server.expect(1, &["1 pods of namespace shop are captured", "discoverySelectors"], &["doctor"]);
    // Helm 4 would change the half, and then refuse.
    server.expect(2, &["nothing was changed", "edited by kubectl-patch"], &upgrade("log.filter=warn"));
    server.expect(
        0,
        &["applied release"],
        &[&upgrade("log.filter=warn")[..], &["--force-conflicts"]].concat(),
    );
    kubectl(&["delete", "configmap", "culvert"]);
    server.expect(1, &["mesh settings, ConfigMap culvert", "not there", "makes it anew"], &["status"]);
    server.expect(0, &["applied release"], &upgrade("log.filter=info"));
    server.expect(0, &["mesh settings, ConfigMap culvert   ready"], &["status"]);
    let delete = ["-n", "shop", "delete", "pod", "kept", "--force", "--grace-period=0"];
    assert!(server.kubectl(&delete).status.success());
}

fn tags(server: &Server) {
    server.expect(2, &["is not installed", "default"], &["tag", "set", "stable", "--revision", "next"]);
    server.expect(2, &["is no name for a tag"], &["tag", "set", "default", "--revision", "default"]);
    server.expect(0, &["points at revision default"], &["tag", "set", "stable", "--revision", "default"]);
    server.expect(0, &["points at"], &["tag", "set", "prod", "--revision", "default"]);
    // A second revision beside the first, without anything of nodes.
    let next = ["--set", "revision=next,node.enabled=false,ztunnel.enabled=false,webhook.enabled=false"];
    let mut arguments = vec!["install", "--release", "next", "--timeout", "1s"];
    arguments.extend(next);
    server.expect(1, &["applied release next"], &arguments);
    server.expect(
        2,
        &["points at revision default", "--overwrite"],
        &["tag", "set", "stable", "--revision", "next"],
    );
    server.expect(0, &[], &["tag", "set", "stable", "--revision", "next", "--overwrite"]);
    server.expect(0, &["prod     default\n", "stable   next\n"], &["tag", "list"]);
    // An upgrade of the release keeps them.
    server.expect(1, &["applied release"], &["upgrade", "--timeout", "1s"]);
    server.expect(0, &["prod     default\n"], &["tag", "list"]);
    let labelled = |revision: &str| {
        let mut policy = policy("orphan", &json!({}));
        policy["metadata"]["labels"] = json!({"istio.io/rev": revision});
        server.apply(&policy).unwrap();
    };
    labelled("prod");
    let left_out = |label: &str| format!("left out: 1 objects of other revisions ({label})");
    assert!(!server.culvert(&["analyze"]).1.contains("left out"), "the tag is its own");
    server.expect(1, &[&left_out("prod")], &["analyze", "--revision", "next"]);
    server.expect(2, &["there is no revision nosuch"], &["analyze", "--revision", "nosuch"]);
    let text = server.culvert(&["doctor"]).1;
    assert!(!text.contains("shop/orphan"), "{text}");
    labelled("old");
    server.expect(1, &[&left_out("old")], &["analyze"]);
    server.expect(1, &["AuthorizationPolicy shop/orphan", "old"], &["doctor"]);
    server.expect(0, &["removed"], &["tag", "remove", "stable"]);
    server.expect(2, &["there is no tag"], &["tag", "remove", "stable"]);
    server.expect(0, &["removed release next"], &["uninstall", "--release", "next"]);
    let labels = json!({"app": "culvertd", "istio.io/rev": "default", "app.kubernetes.io/version": "9.9"});
    server.apply(&pod("culvert-system", "culvertd-1", &labels, &json!({}))).unwrap();
    server.expect(0, &["control plane: 1 of 9.9"], &["version"]);
}

fn removing(server: &Server) {
    let captured = json!({"ambient.istio.io/redirection": "enabled"});
    server.apply(&pod("shop", "web", &json!({}), &captured)).unwrap();
    server.expect(2, &["shop", "shop/web", "--remove-labels"], &["uninstall"]);
    let own = json!({"istio.io/dataplane-mode": "ambient"});
    server.apply(&pod("shop", "own", &own, &captured)).unwrap();
    // Nothing is taken out where a pod would stay.
    let refused = server.expect(2, &["label of their own", "shop/own"], &["uninstall", "--remove-labels"]);
    assert!(!refused.contains("took namespace"), "{refused}");
    let delete = ["-n", "shop", "delete", "pod", "own", "--force", "--grace-period=0"];
    assert!(server.kubectl(&delete).status.success());
    server.expect(
        2,
        &["took namespace shop out", "shop/web"],
        &["uninstall", "--remove-labels", "--timeout", "1s"],
    );
    assert!(
        server
            .kubectl(&["-n", "shop", "annotate", "pod", "web", "ambient.istio.io/redirection-"])
            .status
            .success()
    );
    let text =
        server.expect(0, &["removed release culvert"], &["uninstall", "--delete-crds", "--timeout", "30s"]);
    assert!(
        text.contains("removed authorizationpolicies") && !text.contains("removed telemetries"),
        "{text}"
    );
    server.expect(1, &["no culvertd in namespace"], &["status"]);
}
