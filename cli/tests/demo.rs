//! The whole demo, as `make demo` runs it: it is the test of the mesh from outside. Needs root, and the packages of
//! `.ci/packages.txt`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn culvert() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_culvert"))
}

/// Whether this machine can run it; says why not.
fn possible() -> bool {
    let reason = if !nix::unistd::geteuid().is_root() {
        "needs root"
    } else if ["ztunnel", "waypoint"].iter().any(|p| !culvert().with_file_name(p).is_file()) {
        "needs ztunnel and waypoint beside culvert: `make test` builds them"
    } else {
        return true;
    };
    eprintln!("skipped: {reason}");
    false
}

fn name(suffix: &str) -> String {
    format!("cvd{}-{suffix}", std::process::id())
}

/// All that a demo of this name could leave on the machine.
fn left(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["/run/netns", "/etc/netns", "/run"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file.starts_with(name) {
                found.push(format!("{dir}/{file}"));
            }
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(mounts.lines().filter(|l| l.contains(name)).map(str::to_owned));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        // This test's own children are `culvert`, which may name it too: they have ended by now.
        if line.contains(&format!("/run/{name}/")) {
            found.push(line.replace('\0', " "));
        }
    }
    found
}

#[test]
fn every_claim_of_every_step_holds_and_nothing_is_left() {
    if !possible() {
        return;
    }
    let name = name("all");
    let output = Command::new(culvert()).args(["demo", "--json", "--name", &name]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let document: Value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}\n{}", String::from_utf8_lossy(&output.stderr)));
    let steps = document["steps"].as_array().unwrap();
    let failed: Vec<_> =
        steps.iter().flat_map(|s| s["claims"].as_array().unwrap()).filter(|c| c["holds"] != true).collect();
    let errors: Vec<_> = steps.iter().filter_map(|s| s.get("error")).collect();
    assert!(failed.is_empty() && errors.is_empty(), "{failed:#?}\n{errors:#?}");
    assert_eq!(steps.len(), 7);
    assert!(
        steps.iter().all(|s| s["claims"].as_array().unwrap().len() >= 2),
        "a step without claims proves nothing"
    );
    assert_eq!((output.status.code(), &document["ok"]), (Some(0), &true.into()));
    assert_eq!(left(&name), Vec::<String>::new());
}

#[test]
fn an_interrupted_demo_ends_clean_and_soon() {
    if !possible() {
        return;
    }
    let name = name("int");
    let child = Command::new(culvert())
        .args(["demo", "--name", &name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = child;
    // In the middle of the first steps: programs and capture run.
    let log = Path::new("/run").join(&name).join("ztunnel-node-2.log");
    for _ in 0..200 {
        if log.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(log.exists(), "the demo did not start");
    std::thread::sleep(Duration::from_millis(700));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let status = (0..400)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            child.try_wait().unwrap()
        })
        .expect("it ends within 20 s");
    assert_eq!(status.code(), Some(130));
    assert_eq!(left(&name), Vec::<String>::new());
}

/// Answers as a ready ztunnel would, and does nothing.
const IDLE_ZTUNNEL: &str = r#"#!/usr/bin/env python3
import http.server, socketserver, threading
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"open":[],"ended":[]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): pass
for port in (15000, 15020):
    threading.Thread(target=Server(("127.0.0.1", port), Page).serve_forever, daemon=True).start()
Server(("127.0.0.1", 15021), Page).serve_forever()
"#;

#[test]
fn claims_that_do_not_hold_are_said_and_fail_the_demo() {
    use std::os::unix::fs::PermissionsExt;
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ztunnel = dir.path().join("ztunnel");
    fs::write(&ztunnel, IDLE_ZTUNNEL).unwrap();
    fs::set_permissions(&ztunnel, fs::Permissions::from_mode(0o755)).unwrap();
    let name = name("none");
    let output = Command::new(culvert())
        .args(["demo", "--name", &name, "--only", "3", "--ztunnel"])
        .arg(&ztunnel)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("NOT SO: without a policy, batch may call web"), "{text}");
    assert!(text.contains("claims did not hold"), "{text}");
    assert_eq!(left(&name), Vec::<String>::new());
}

#[test]
fn what_is_kept_is_cleared_on_request() {
    if !possible() {
        return;
    }
    let name = name("keep");
    let run = |arguments: &[&str]| Command::new(culvert()).arg("demo").args(arguments).output().unwrap();
    let kept = run(&["--keep", "--only", "3", "--name", &name]);
    assert_eq!(kept.status.code(), Some(0), "{}", String::from_utf8_lossy(&kept.stdout));
    let frontend = format!("{name}-frontend");
    let curl = |netns: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns, "curl", "-sS", "-m", "5", "http://web/"]);
        command.output().unwrap().status.success()
    };
    assert!(curl(&frontend), "it is up");
    assert!(!curl(&format!("{name}-batch")), "and its policy is in force");
    let again = run(&["--name", &name]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--clean"), "{again:?}");
    assert_eq!(run(&["--clean", "--name", &name]).status.code(), Some(0));
    assert_eq!(left(&name), Vec::<String>::new());
}
