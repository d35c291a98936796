//! The real programs: culvertd, and ztunnels beside the simulated ones; and what the kernel says they use.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::api;
use crate::objects::node_name;

/// For a process to end by itself.
const END: Duration = Duration::from_secs(30);
/// For a page to be answered.
const PAGE: Duration = Duration::from_secs(10);

/// A process, ended when this is dropped.
#[derive(Debug)]
struct Program {
    child: Child,
}

/// What a process has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Processor time, in seconds.
    pub cpu: f64,
    /// Resident memory, in MiB.
    pub rss: f64,
    /// The most that it was, since the last [`Culvertd::forget_peak`].
    pub peak: f64,
}

impl Program {
    fn start(program: &Path, log: &Path, arguments: &[(&str, String)]) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        for (flag, value) in arguments {
            command.arg(flag).arg(value);
        }
        let child = command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child })
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or_default())
    }

    fn usage(&self) -> Result<Usage> {
        let read = |name: &str| {
            fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).context("the process is gone")
        };
        let stat = read("stat")?;
        // The name before may have blanks; utime and stime are fields 14 and 15.
        let fields: Vec<&str> = stat.rsplit_once(") ").context("/proc/PID/stat")?.1.split(' ').collect();
        let field = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).context("/proc/PID/stat");
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no clock ticks")? as f64;
        let status = read("status")?;
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).context("/proc/PID/status")
        };
        Ok(Usage {
            cpu: (field(11)? + field(12)?) / ticks,
            rss: kib("VmRSS:")? / 1024.0,
            peak: kib("VmHWM:")? / 1024.0,
        })
    }

    fn end(&mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGTERM)?;
        let deadline = Instant::now() + END;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("the process {} did not end in {} s", self.child.id(), END.as_secs());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports that were free a moment ago.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// A page; the status must be 200.
async fn get(port: u16, path: &str) -> Result<String> {
    let talk = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        anyhow::Ok(text)
    };
    let text = timeout(PAGE, talk).await.with_context(|| format!("{path}: no answer in time"))??;
    ensure!(text.starts_with("HTTP/1.1 200"), "{path}: {}", text.lines().next().unwrap_or_default());
    Ok(text)
}

/// The sum of a metric's series.
fn metric(page: &str, name: &str) -> f64 {
    let lines = page.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// The control plane.
#[derive(Debug)]
pub struct Culvertd {
    program: Program,
    path: PathBuf,
    dir: PathBuf,
    arguments: Vec<(&'static str, String)>,
    ready: u16,
    metrics: u16,
    /// Where it serves proxies.
    pub port: u16,
}

impl Culvertd {
    /// Starts it at an API server, with its files in a folder.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(path: &Path, dir: &Path, api: SocketAddr) -> Result<Self> {
        let kubeconfig = dir.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: bench\ncontexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\n\
             clusters: [{{name: bench, cluster: {{server: \"http://{api}\"}}}}]\nusers: [{{name: bench, user: {{}}}}]\n"
        );
        fs::write(&kubeconfig, text)?;
        let [port, webhook, admin, metrics, ready] = free_ports()?;
        let arguments = vec![
            ("--kubeconfig", kubeconfig.to_string_lossy().into_owned()),
            ("--namespace", "culvert-system".to_owned()),
            // What its certificate is for: proxies connect to loopback.
            ("--service", "localhost".to_owned()),
            ("--grpc-address", loopback(port)),
            ("--webhook-address", loopback(webhook)),
            ("--admin-address", loopback(admin)),
            ("--metrics-address", loopback(metrics)),
            ("--readiness-address", loopback(ready)),
            ("--log", "warn".to_owned()),
        ];
        let program = Program::start(path, &dir.join("culvertd.log"), &arguments)?;
        Ok(Self { program, path: path.to_owned(), dir: dir.to_owned(), arguments, ready, metrics, port })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// It is not in time, or has ended.
    pub async fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while get(self.ready, "/healthz/ready").await.is_err() {
            if let Some(status) = self.program.child.try_wait()? {
                bail!("culvertd has ended ({status}); {}", self.last_words());
            }
            ensure!(Instant::now() < deadline, "culvertd is not ready in time; {}", self.last_words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("culvertd.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(5)..).unwrap_or_default();
        format!("it said last:\n{}", last.join("\n"))
    }

    /// Ends it in good order, and starts it anew with the same ports.
    ///
    /// # Errors
    /// It does not end, or can't be started.
    pub fn restart(&mut self) -> Result<()> {
        self.program.end()?;
        self.program = Program::start(&self.path, &self.dir.join("culvertd.log"), &self.arguments)?;
        Ok(())
    }

    /// What it uses.
    ///
    /// # Errors
    /// It is gone.
    pub fn usage(&self) -> Result<Usage> {
        self.program.usage().with_context(|| self.last_words())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.program.child.id()
    }

    /// What one of its metrics says.
    ///
    /// # Errors
    /// It can't be asked.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        Ok(metric(&get(self.metrics, "/metrics").await?, name))
    }

    /// From now on, the peak is that of what comes.
    ///
    /// # Errors
    /// The process is gone.
    pub fn forget_peak(&self) -> Result<()> {
        // proc_pid_clear_refs(5): 5 resets the peak.
        Ok(fs::write(format!("/proc/{}/clear_refs", self.id()), "5")?)
    }
}

/// A real ztunnel.
#[derive(Debug)]
pub struct Ztunnel {
    program: Program,
    metrics: u16,
}

impl Ztunnel {
    /// Starts the proxy of a node that no simulated one stands for.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(path: &Path, dir: &Path, number: u32, control_plane: u16, root: &str) -> Result<Self> {
        let dir = dir.join(format!("ztunnel-{number}"));
        fs::create_dir_all(&dir)?;
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let pod = format!("ztunnel-real-{number}");
        fs::write(file("token"), api::token(&pod))?;
        fs::write(file("root.pem"), root)?;
        let [admin, metrics, ready] = free_ports()?;
        let arguments = [
            ("--xds-address", format!("https://localhost:{control_plane}")),
            ("--token-file", file("token")),
            ("--root-file", file("root.pem")),
            ("--zds-socket", file("zds.sock")),
            ("--state-dir", file("state")),
            ("--node", node_name(number)),
            ("--pod-name", pod),
            ("--pod-namespace", "culvert-system".to_owned()),
            ("--instance-ip", "127.0.0.1".to_owned()),
            ("--admin-address", loopback(admin)),
            ("--metrics-address", loopback(metrics)),
            ("--readiness-address", loopback(ready)),
            ("--log", "warn".to_owned()),
        ];
        Ok(Self { program: Program::start(path, &dir.join("log"), &arguments)?, metrics })
    }

    /// What it uses.
    ///
    /// # Errors
    /// It is gone.
    pub fn usage(&self) -> Result<Usage> {
        self.program.usage()
    }

    /// Bytes of the messages that it got.
    ///
    /// # Errors
    /// It can't be asked.
    pub async fn got(&self) -> Result<f64> {
        Ok(metric(&get(self.metrics, "/metrics").await?, "istio_xds_message_bytes"))
    }
}
