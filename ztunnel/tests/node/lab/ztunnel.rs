//! A running `ztunnel`, and what can be learnt of it from outside.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use harness::netns::{Host, Process};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use super::{PATIENCE, eventually, traffic};

/// How much of its log is shown when a test fails.
const SHOWN: usize = 60;

/// How one is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Further arguments.
    pub arguments: Vec<String>,
    /// What starts it: a program and its arguments, before those of ztunnel.
    pub wrapper: Vec<String>,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
}

impl Options {
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    pub fn wrapper(mut self, words: &[&str]) -> Self {
        self.wrapper = words.iter().map(|&w| w.to_owned()).collect();
        self
    }

    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A `ztunnel` of a node. Dropping it kills it.
pub struct Ztunnel {
    process: Process,
    host: Host,
    output: PathBuf,
}

impl Ztunnel {
    pub fn spawn(host: &Host, dir: &Path, options: &Options) -> Self {
        let keys = dir.join(format!("keys-{}", host.name));
        fs::create_dir_all(&keys).unwrap();
        fs::set_permissions(&keys, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let flags = [
            ("--config-dir", dir.join("manifests")),
            ("--ca-dir", dir.join("ca")),
            ("--key-dir", keys),
            ("--state-dir", dir.join("state")),
        ];
        Self::start(host, &dir.join(format!("ztunnel-{}.log", host.name)), &flags, options)
    }

    /// One with `flags` alone, which prints to `output`.
    pub fn start(host: &Host, output: &Path, flags: &[(&str, PathBuf)], options: &Options) -> Self {
        let output = output.to_owned();
        let file = File::options().create(true).append(true).open(&output).unwrap();
        let mut words = options.wrapper.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_ztunnel")]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["--node", &host.name, "--dns-upstream", "127.0.0.1:5399"]);
        for (flag, path) in flags {
            command.arg(flag).arg(path);
        }
        command.args(&options.arguments);
        for variable in ["RUST_LOG", "RUST_BACKTRACE"] {
            command.env_remove(variable);
        }
        command.envs(options.environment.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let process = host.spawn(&mut command).unwrap();
        Self { process, host: host.clone(), output }
    }

    /// Waits until it is ready.
    pub async fn ready(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.get(15021, "/healthz/ready").await.is_err() {
            let ended = self.process.child().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "not ready ({ended:?}):\n{}", self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.child().try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it has not ended:\n{}", self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn is_alive(&mut self) -> bool {
        self.process.child().try_wait().unwrap().is_none()
    }

    /// All that it and its predecessors printed.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Waits until the log has a line with all of these.
    pub async fn says(&self, words: &[&str]) {
        let has = async || self.log().lines().any(|line| words.iter().all(|word| line.contains(word)));
        eventually(&format!("the log has a line with {words:?}:\n{}", self.log()), has).await;
    }

    /// A page of one of its ports. An answer that is not 200 is an error with the page.
    pub async fn get(&self, port: u16, path: &str) -> io::Result<String> {
        self.request(port, &format!("GET {path}")).await
    }

    /// A request to one of its ports, by method and path.
    pub async fn request(&self, port: u16, line: &str) -> io::Result<String> {
        let exchange = async {
            let mut stream = traffic::dial(&self.host, SocketAddr::from(([127, 0, 0, 1], port))).await?;
            // The older version has no chunks to put together.
            let request = format!("{line} HTTP/1.0\r\nhost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            io::Result::Ok(answer)
        };
        let answer: String = timeout(PATIENCE, exchange).await.map_err(io::Error::other)??;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        if head.starts_with("HTTP/1.0 200") { Ok(body.to_owned()) } else { Err(io::Error::other(answer)) }
    }

    pub async fn config_dump(&self) -> Value {
        let page = self.get(15000, "/config_dump").await;
        serde_json::from_str(&page.unwrap_or_else(|e| panic!("{e}\n{}", self.log()))).unwrap()
    }

    pub async fn connections(&self) -> Value {
        serde_json::from_str(&self.get(15000, "/connections").await.unwrap()).unwrap()
    }

    /// The last connection that ended or was refused and that `wanted` holds for. Waits until there is one.
    pub async fn last(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        let find = async || {
            let connections = self.connections().await;
            found = connections["ended"].as_array().unwrap().iter().rev().find(|c| wanted(c)).cloned();
            found.is_some()
        };
        eventually("such a connection has ended", find).await;
        found.unwrap()
    }

    /// How many snapshots of the configuration were put in force.
    pub async fn generation(&self) -> u64 {
        self.metric("culvert_mesh_generation").await as u64
    }

    /// The sum of a metric's series; zero if there is none.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.get(15020, "/metrics").await.unwrap_or_else(|e| panic!("{e}\n{}", self.log()));
        let of = |line: &str| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) {
                return None;
            }
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        };
        page.lines().filter_map(of).sum()
    }

    /// What `/config_dump` says of a pod's capture.
    pub async fn capture(&self, pod: &str) -> Value {
        let dump = self.config_dump().await;
        let found = dump["pods"].as_array().unwrap().iter().find(|p| p["name"] == pod).cloned();
        found.unwrap_or(Value::Null)
    }

    /// Resident memory, kB.
    pub fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Ztunnel {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let skip = log.lines().count().saturating_sub(SHOWN);
            println!("---- ztunnel of node {}", self.host.name);
            log.lines().skip(skip).for_each(|line| println!("{line}"));
        }
    }
}
