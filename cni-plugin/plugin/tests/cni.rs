//! The plugin as a container runtime calls it: variables, standard input, and an agent that the tests play.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// What the agent was asked, path and body.
type Asked = Arc<Mutex<Vec<(String, Value)>>>;

struct World {
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("plugin.sock")
    }

    /// An agent that answers everything so.
    fn agent(&self, answer: impl Fn(&str) -> String + Send + 'static) -> Asked {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let asked = Asked::default();
        let noted = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some((path, body)) = request(&mut stream) else { continue };
                let text = answer(&path);
                noted.lock().unwrap().push((path, body));
                let _ = stream.write_all(text.as_bytes());
            }
        });
        asked
    }

    fn network(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "pods", "type": "culvert-cni",
            "agentSocket": self.socket(),
            "excludeNamespaces": ["kube-system"],
            "prevResult": {
                "cniVersion": version,
                "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/x" }],
                "ips": [{ "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 0, "version": "4" },
                        { "address": "fd00::3/64", "interface": 0, "version": "6" }],
                "routes": [{ "dst": "0.0.0.0/0" }],
                "dns": { "nameservers": ["10.96.0.10"] },
            },
        })
    }
}

/// Reads a whole request, as HTTP has it.
fn request(stream: &mut UnixStream) -> Option<(String, Value)> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let len = stream.read(&mut piece).ok().filter(|len| *len > 0)?;
        bytes.extend(&piece[..len]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")).unwrap();
        if body.len() == length.parse::<usize>().unwrap() {
            assert!(head.contains("\r\nHost: ") && head.starts_with("POST /"), "{head}");
            return Some((head.split(' ').nth(1)?.to_owned(), serde_json::from_str(body).unwrap()));
        }
    }
}

fn http(status: &str, body: &Value) -> String {
    let body = body.to_string();
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn ok(_: &str) -> String {
    http("200 OK", &json!({ "enrolled": true }))
}

#[derive(Debug)]
struct Outcome {
    succeeded: bool,
    output: String,
}

impl Outcome {
    fn json(&self) -> Value {
        serde_json::from_str(&self.output).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code and the message of an error.
    fn error(&self) -> (u64, String) {
        assert!(!self.succeeded, "{self:?}");
        let error = self.json();
        assert!(error["cniVersion"].is_string(), "{error}");
        let text = format!("{} {}", error["msg"].as_str().unwrap(), error["details"].as_str().unwrap_or(""));
        (error["code"].as_u64().unwrap(), text)
    }
}

fn call(command: &str, input: &[u8]) -> Outcome {
    call_as(command, input, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1")
}

fn call_as(command: &str, input: &[u8], arguments: &str) -> Outcome {
    let mut child = Command::new(env!("CARGO_BIN_EXE_culvert-cni"))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "sandbox-1")
        .env("CNI_NETNS", "/run/netns/x")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // A plugin that needs no input may have ended.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    Outcome { succeeded: output.status.success(), output: String::from_utf8(output.stdout).unwrap() }
}

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[test]
fn add_tells_the_agent_and_passes_the_result_on_in_every_version() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let world = World::new();
        let asked = world.agent(ok);
        let mut network = world.network(version);
        if version.starts_with('1') {
            for ip in network["prevResult"]["ips"].as_array_mut().unwrap() {
                ip.as_object_mut().unwrap().remove("version");
            }
        }
        let outcome = call("ADD", &text(&network));
        assert!(outcome.succeeded, "{outcome:?}");
        assert_eq!(outcome.json(), network["prevResult"], "{version}: unchanged");
        let asked = asked.lock().unwrap();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].0, "/cmdadd");
        assert_eq!(
            asked[0].1,
            json!({
                "Netns": "/run/netns/x", "PodName": "web-0", "PodNamespace": "shop", "PodUID": "u-1",
                "ContainerID": "sandbox-1", "IfName": "eth0",
                "IPs": [
                    { "Interface": 0, "Address": { "IP": "10.1.2.3", "Mask": "////AA==" } },
                    { "Interface": 0, "Address": { "IP": "fd00::3", "Mask": "//////////8AAAAAAAAAAA==" } },
                ],
            })
        );
    }
}

#[test]
fn while_the_agent_is_away_pods_wait_but_for_those_of_excluded_namespaces() {
    let world = World::new();
    let network = text(&world.network("1.0.0"));
    let started = std::thread::spawn({
        let network = network.clone();
        move || call("ADD", &network)
    });
    let system = call_as("ADD", &network, "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns");
    assert!(system.succeeded, "{system:?}");
    assert_eq!(system.json()["ips"][0]["address"], "10.1.2.3/24");
    let other = call_as("ADD", &network, "IgnoreUnknown=1");
    assert!(other.succeeded, "no pod of Kubernetes: {other:?}");
    let (code, message) = started.join().unwrap().error();
    assert_eq!(code, 11);
    for part in ["shop/web-0 waits", "culvert-node", "plugin.sock", "excludeNamespaces"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn an_agent_that_comes_late_or_dies_in_between_is_found() {
    let world = World::new();
    let network = text(&world.network("1.0.0"));
    let socket = world.socket();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        // The first one breaks off in the middle; the next one is there a little later.
        let listener = UnixListener::bind(&socket).unwrap();
        drop(listener.accept().unwrap());
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let listener = UnixListener::bind(&socket).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        request(&mut stream).unwrap();
        stream.write_all(ok("").as_bytes()).unwrap();
    });
    assert!(call("ADD", &network).succeeded);
    late.join().unwrap();
}

#[test]
fn what_the_agent_refuses_is_passed_on_in_its_words() {
    let world = World::new();
    let _asked = world.agent(|path| match path {
        "/cmdadd" => http("503 x", &json!({ "code": 11, "msg": "pod shop/web-0 waits: no ztunnel" })),
        "/cmdcheck" => http("503 x", &json!({ "code": 7, "msg": "annotation x" })),
        "/status" => http("503 x", &json!({ "code": 50, "msg": "not ready" })),
        _ => "HTTP/1.1 500 x\r\n\r\nbroken".to_owned(),
    });
    let network = text(&world.network("1.1.0"));
    assert_eq!(call("ADD", &network).error(), (11, "pod shop/web-0 waits: no ztunnel ".to_owned()));
    assert_eq!(call("CHECK", &network).error().0, 7);
    assert_eq!(call("STATUS", &network).error(), (50, "not ready ".to_owned()));
    let del = call("DEL", &network);
    assert!(del.succeeded && del.output.is_empty(), "DEL never fails: {del:?}");
}

#[test]
fn check_del_gc_and_status_say_nothing_when_all_is_well() {
    let world = World::new();
    let asked = world.agent(ok);
    let mut network = world.network("1.1.0");
    network["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "eth0" }]);
    for command in ["CHECK", "DEL", "GC", "STATUS"] {
        let outcome = call(command, &text(&network));
        assert!(outcome.succeeded && outcome.output.is_empty(), "{command}: {outcome:?}");
    }
    let asked = asked.lock().unwrap();
    let paths: Vec<&str> = asked.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["/cmdcheck", "/cmddel", "/cmdgc", "/status"]);
    assert_eq!(asked[0].1["IPs"][0]["Address"]["IP"], "10.1.2.3");
    assert_eq!(asked[1].1["ContainerID"], "sandbox-1");
    assert_eq!(asked[2].1, json!({ "ValidAttachments": [{ "containerID": "a", "ifname": "eth0" }] }));
}

#[test]
fn without_an_agent_del_and_gc_succeed_and_status_says_so_until_there_was_one() {
    let world = World::new();
    let mut network = world.network("1.1.0");
    network["cni.dev/valid-attachments"] = json!([]);
    for command in ["DEL", "GC"] {
        assert!(call(command, &text(&network)).succeeded, "{command}");
    }
    for broken in [&b""[..], b"{", b"[]", b"{\"cniVersion\":\"9.9.9\"}"] {
        let outcome = call("DEL", broken);
        assert!(outcome.succeeded && outcome.output.is_empty(), "{outcome:?}");
    }
    assert_eq!(call("STATUS", &text(&network)).error().0, 50);
    // A stale socket: nobody listens there any more.
    drop(UnixListener::bind(world.socket()).unwrap());
    assert!(call("DEL", &text(&network)).succeeded);
    // The agent is away for a while: that makes no node unready.
    assert!(call("STATUS", &text(&network)).succeeded);
}

#[test]
fn version_answers_in_the_version_of_the_question() {
    for (input, version) in [(&b"{\"cniVersion\":\"0.4.0\"}"[..], "0.4.0"), (b"", "1.1.0")] {
        let outcome = call("VERSION", input);
        assert!(outcome.succeeded);
        assert_eq!(
            outcome.json(),
            json!({ "cniVersion": version, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] })
        );
    }
}

#[test]
fn bad_input_has_its_code() {
    let world = World::new();
    let _asked = world.agent(ok);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut network = world.network("1.0.0");
        change(&mut network);
        text(&network)
    };
    let without =
        |name: &'static str| move |network: &mut Value| drop(network.as_object_mut().unwrap().remove(name));
    let large = vec![b' '; (4 << 20) + 1];
    for (command, input, code, said) in [
        ("ADD", with(&without("prevResult")), 7, "prevResult is missing"),
        ("CHECK", with(&without("prevResult")), 7, "prevResult is missing"),
        ("GC", with(&without("none")), 7, "valid-attachments"),
        ("ADD", with(&without("cniVersion")), 1, "0.3.1"),
        ("ADD", with(&|n| n["cniVersion"] = "0.2.0".into()), 1, "0.2.0"),
        ("ADD", with(&|n| n["cniVersion"] = "2.0.0".into()), 1, "2.0.0"),
        ("ADD", with(&|n| n["prevResult"] = "x".into()), 7, "no JSON object"),
        ("ADD", with(&|n| n["prevResult"]["ips"][0]["address"] = "x".into()), 7, "address"),
        ("ADD", with(&|n| n["prevResult"]["cniVersion"] = "0.2.0".into()), 1, "0.2.0"),
        ("ADD", with(&|n| n["agentSocket"] = "relative".into()), 7, "agentSocket"),
        ("ADD", with(&|n| n["excludeNamespaces"] = "a".into()), 7, "excludeNamespaces"),
        ("ADD", b"{".to_vec(), 6, "not JSON"),
        ("ADD", b"[]".to_vec(), 6, "no JSON object"),
        ("ADD", Vec::new(), 6, "not JSON"),
        ("ADD", large, 6, "more than"),
        ("RUN", with(&|_| ()), 4, "RUN"),
    ] {
        let (found, message) = call(command, &input).error();
        assert_eq!(found, code, "{command}: {message}");
        assert!(message.contains(said), "{command}: {message}");
    }
    let outcome = Command::new(env!("CARGO_BIN_EXE_culvert-cni")).env_clear().output().unwrap();
    assert!(!outcome.status.success() && String::from_utf8_lossy(&outcome.stdout).contains("CNI_COMMAND"));
}

#[test]
fn an_agent_that_answers_nonsense_or_nothing_ends_the_wait() {
    for nonsense in ["", "SSH-2.0-x\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}"] {
        let world = World::new();
        let _asked = world.agent(move |_| nonsense.to_owned());
        let (code, _) = call("CHECK", &text(&world.network("1.1.0"))).error();
        assert_eq!(code, 11, "{nonsense:?}");
    }
    // One that takes connections and never answers; one that does not even take them.
    let world = World::new();
    let _listener = UnixListener::bind(world.socket()).unwrap();
    let network = text(&world.network("1.1.0"));
    #[allow(clippy::disallowed_types, reason = "a process is waited for, in real time")]
    let started = std::time::Instant::now();
    assert!(call("DEL", &network).succeeded);
    let waited = started.elapsed();
    assert!((Duration::from_secs(4)..Duration::from_secs(9)).contains(&waited), "{waited:?}");
    assert!(Path::new(&world.socket()).exists());
}
