//! A running `waypoint` in its pod, as the Gateway of the pod's name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use harness::netns::{Host, Process};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use super::{Mesh, PATIENCE, eventually, traffic};

/// A `waypoint`. Dropping it kills it.
pub struct Waypoint {
    process: Process,
    host: Host,
    output: PathBuf,
}

/// The program, which `make test` builds beside `ztunnel`. Says so where it is missing.
pub fn program() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_BIN_EXE_ztunnel")).with_file_name("waypoint");
    if !program.is_file() {
        println!("skipped: {} is not built (`make test` builds it)", program.display());
        return None;
    }
    Some(program)
}

/// A Gateway of the namespace `shop`, with a Service of its name.
pub fn gateway(name: &str, number: u8) -> String {
    let [v4, v6] = super::manifests::vips(number);
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: shop}}
spec:
  gatewayClassName: culvert-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  clusterIP: {v4}
  clusterIPs: [{v4}, \"{v6}\"]
  ipFamilies: [IPv4, IPv6]
  selector: {{app: {name}}}
  ports: [{{name: hbone, port: 15008, targetPort: 15008}}]
"
    )
}

impl Mesh {
    /// Makes the pod `name` a waypoint's: it takes tunnels itself.
    pub fn put_waypoint(&self, name: &str, number: u8) {
        let pod = self.manifest(name);
        let pod = pod
            .label("istio.io/dataplane-mode", "none")
            .label("gateway.networking.k8s.io/gateway-name", name);
        self.put(&format!("pod-{name}"), &pod.to_string());
        self.put(&format!("gateway-{name}"), &gateway(name, number));
    }

    /// Starts the waypoint of the pod `name` and waits until it is ready.
    pub async fn run_waypoint(&self, program: &Path, name: &str, arguments: &[&str]) -> Waypoint {
        let (host, output) = (self.pod(name).clone(), self.dir().join(format!("waypoint-{name}.log")));
        let file = File::options().create(true).append(true).open(&output).unwrap();
        let mut command = Command::new(program);
        command.args(["--gateway", &format!("shop/{name}")]);
        for (flag, path) in [("--config-dir", self.manifests()), ("--ca-dir", self.dir().join("ca"))] {
            command.arg(flag).arg(path);
        }
        command.args(arguments);
        for variable in ["RUST_LOG", "RUST_BACKTRACE"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let process = host.spawn(&mut command).unwrap();
        let mut waypoint = Waypoint { process, host, output };
        waypoint.ready().await;
        waypoint
    }
}

impl Waypoint {
    async fn ready(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.get(15021, "/healthz/ready").await.is_none() {
            let ended = self.process.child().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "not ready ({ended:?}):\n{}", self.log());
            sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// A page of one of its ports, if the answer is 200.
    pub async fn get(&self, port: u16, path: &str) -> Option<String> {
        let to = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = traffic::dial(&self.host, to).await.ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n");
        traffic::exchange(&mut stream, &request).await.ok().filter(|a| a.starts_with("HTTP/1.0 200"))
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        let mut ended = async || {
            status = self.process.child().try_wait().unwrap();
            status.is_some()
        };
        eventually("the waypoint has ended", async || ended().await).await;
        status.unwrap()
    }

    /// Resident memory, kB.
    pub fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }
}

impl Drop for Waypoint {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("---- waypoint\n{}", self.log());
        }
    }
}
