//! Running nft and the iptables programs inside a namespace: bounded in time, with what they said.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use net::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Missing};

/// iptables waits for its lock inside of this.
const LIMIT: Duration = Duration::from_secs(20);
/// What is kept of a program's complaint, bytes.
const SAID_LIMIT: usize = 2000;

/// Where programs are looked for.
#[derive(Clone, Debug)]
pub struct Tools {
    directories: Vec<PathBuf>,
    bpf_file_system: PathBuf,
}

impl Default for Tools {
    /// The directories of `PATH`, then those of system programs, which `PATH` lacks for many users.
    fn default() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut directories: Vec<_> = std::env::split_paths(&path).collect();
        directories.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        Self { directories, bpf_file_system: ebpf::bpf_file_system().to_owned() }
    }
}

impl Tools {
    /// Only these directories, in the form of `PATH`.
    #[must_use]
    pub fn in_path(path: &OsString) -> Self {
        Self { directories: std::env::split_paths(path).collect(), ..Self::default() }
    }

    /// Keeps eBPF programs in the bpf file system at `path`, instead of `/sys/fs/bpf`.
    #[must_use]
    pub fn with_bpf_file_system(self, path: &Path) -> Self {
        Self { bpf_file_system: path.to_owned(), ..self }
    }

    pub(crate) fn bpf_file_system(&self) -> &Path {
        &self.bpf_file_system
    }

    /// The first of `names` that is installed.
    pub(crate) fn find(&self, names: &[&str], package: &'static str) -> Result<PathBuf, Missing> {
        let found = names.iter().find_map(|name| {
            let candidates = self.directories.iter().map(|directory| directory.join(name));
            candidates.into_iter().find(|path| path.is_file())
        });
        found.ok_or_else(|| Missing::Tool { tool: names.join(" or "), package })
    }
}

/// Runs `program` in `netns` with `input`, and returns what it printed.
pub(crate) fn run(netns: &Netns, program: &Path, arguments: &[&str], input: &str) -> Result<String, Error> {
    let output = run_any(netns, program, arguments, input)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(refused(netns, program, arguments, &output))
}

/// The error of a program that failed.
pub(crate) fn refused(netns: &Netns, program: &Path, arguments: &[&str], output: &Output) -> Error {
    let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let end = (0..=SAID_LIMIT).rev().find(|at| said.is_char_boundary(*at)).unwrap_or_default();
    said.truncate(end);
    Error::Refused {
        command: describe(program, arguments),
        netns: netns.to_string(),
        status: output.status,
        said,
    }
}

/// Runs `program` in `netns` with `input`, however it ends.
pub(crate) fn run_any(
    netns: &Netns,
    program: &Path,
    arguments: &[&str],
    input: &str,
) -> Result<Output, Error> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Messages are compared and shown: in one language.
    command.env("LC_ALL", "C");
    let child = netns
        .run(|| command.spawn())
        .map_err(|source| Error::Enter { netns: netns.to_string(), source })?
        .map_err(|source| Error::Start { tool: program.display().to_string(), source })?;
    let (output, killed) = finish(child, input)
        .map_err(|source| Error::Start { tool: program.display().to_string(), source })?;
    if killed {
        let command = describe(program, arguments);
        return Err(Error::TimedOut { command, netns: netns.to_string(), limit: LIMIT });
    }
    Ok(output)
}

fn describe(program: &Path, arguments: &[&str]) -> String {
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
    std::iter::once(&*name).chain(arguments.iter().copied()).collect::<Vec<_>>().join(" ")
}

/// Feeds and drains the program; whether it had to be killed.
fn finish(mut child: Child, input: &str) -> io::Result<(Output, bool)> {
    let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let (ended, watch) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // The program isn't reaped before `ended` is dropped, so the id can't be another's.
        let killer = scope.spawn(move || {
            let late = watch.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
            late && kill(pid, Signal::SIGKILL).is_ok()
        });
        scope.spawn(move || {
            // A program that ends early says why on standard error.
            let _ = stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        });
        let errors = scope.spawn(move || drain(stderr.as_mut()));
        let printed = drain(stdout.as_mut());
        let said = errors.join().unwrap_or_default();
        drop(ended);
        let killed = killer.join().unwrap_or(false);
        let status = child.wait()?;
        Ok((Output { status, stdout: printed, stderr: said }, killed))
    })
}

fn drain(pipe: Option<&mut impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = pipe.map(|pipe| pipe.read_to_end(&mut bytes));
    bytes
}
