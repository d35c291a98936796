//! Running programs, and ending exactly those that were started.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::Lab;
use crate::report::Clock;

/// For Go's programs, of which a cluster consists: they look for garbage when their heap is five times what is in use, not twice, or
/// takes so much. It saves processor time, which scenarios wait for, at the price of memory.
pub const WITH_FEW_COLLECTIONS: [(&str, &str); 2] = [("GOGC", "400"), ("GOMEMLIMIT", "500MiB")];

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// It can't be started, or fails: with the command and what it said.
pub fn output(program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<String> {
    finish(Command::new(program.as_ref()).args(arguments))
}

/// As [`output`], for a command that is made elsewhere.
///
/// # Errors
/// As there.
pub fn finish(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {text}; is it installed? (.ci/packages e2e)"))?;
    judged(&text, &output)
}

/// As [`finish`], and gives it `input`.
///
/// # Errors
/// As there.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let text = shown(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {text}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // It may end without having read everything; then its status says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    judged(&text, &child.wait_with_output().with_context(|| format!("waiting for {text}"))?)
}

fn judged(text: &str, output: &std::process::Output) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = if said.trim().is_empty() { String::from_utf8_lossy(&output.stdout) } else { said };
    Err(anyhow!("{text}: {}: {}", output.status, said.trim()))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let mut text = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = text.char_indices().nth(300) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// A command inside a network namespace.
#[must_use]
pub fn in_netns(netns: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{netns}")).arg(program);
    command
}

/// A long-running process of the cluster: recorded as `run/pids/NAME`, so that another call can end it.
#[derive(Clone, Debug)]
pub struct Recorded {
    name: String,
    record: PathBuf,
}

impl Recorded {
    /// That of this name, whether or not it runs.
    #[must_use]
    pub fn named(lab: &Lab, name: &str) -> Self {
        Self { name: name.to_owned(), record: lab.run("pids").join(name) }
    }

    /// All that are recorded.
    #[must_use]
    pub fn all(lab: &Lab) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(lab.run("pids")) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.iter().map(|name| Self::named(lab, name)).collect()
    }

    /// Starts it in a session of its own, with what it says in `log/NAME.log`, and records it.
    ///
    /// # Errors
    /// It can't be started or recorded.
    pub fn start(lab: &Lab, name: &str, command: &Command) -> Result<Self> {
        let this = Self::named(lab, name);
        if this.pid().is_some() {
            bail!("{name} runs already");
        }
        let path = lab.log(&format!("{name}.log"));
        lab.write(&path, "")?;
        let log = File::options().append(true).open(&path).with_context(|| format!("{}", path.display()))?;
        // `setsid` becomes the program, with the same process id.
        let mut detached = Command::new("setsid");
        detached.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            if let Some(value) = value {
                detached.env(key, value);
            }
        }
        let child = detached
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}: {}", shown(command)))?;
        let started = start_time(child.id())
            .with_context(|| format!("{name} ended at once: see {}", path.display()))?;
        lab.write(&this.record, &format!("{} {started}\n", child.id()))?;
        Ok(this)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, if it still runs: not that of another which came to have the same number.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(&self.record).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let pid: u32 = pid.parse().ok()?;
        (start_time(pid)? == started).then_some(pid)
    }

    /// Sends a signal, if it runs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        kill(pid_of(pid)?, signal).with_context(|| format!("sending {signal} to {} ({pid})", self.name))
    }

    /// Kills it, waits until it is gone, and forgets it.
    ///
    /// # Errors
    /// It does not go.
    pub fn end(&self) -> Result<()> {
        let clock = Clock::start();
        while self.pid().is_some() {
            self.signal(Signal::SIGKILL)?;
            if clock.elapsed() > Duration::from_secs(20) {
                bail!("{} does not end", self.name);
            }
            thread::sleep(Duration::from_millis(20));
        }
        match fs::remove_file(&self.record) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// A process id in nix's type.
///
/// # Errors
/// It is none.
pub fn pid_of(pid: u32) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(pid).context("a process id")?))
}

/// When a process began, in ticks since the machine's start; none if it is gone, or a zombie.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (state, started) = state_and_start(&stat)?;
    (state != "Z" && state != "X").then(|| started.to_owned())
}

/// Fields 3 and 22 of `/proc/PID/stat` (proc_pid_stat(5)). The second, the name, may hold anything.
fn state_and_start(stat: &str) -> Option<(&str, &str)> {
    let (_, after) = stat.rsplit_once(") ")?;
    let mut fields = after.split(' ');
    let state = fields.next()?;
    Some((state, fields.nth(18)?))
}

/// The processor time of a process so far.
#[must_use]
pub fn processor_time(pid: u32) -> Option<Duration> {
    // proc_pid_stat(5): fields 14 and 15, in hundredths of a second.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = stat.rsplit_once(") ")?.1.split(' ').skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(Duration::from_millis(10 * ticks))
}

/// The children of a process.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|c| c.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// The name of a process's program, as the kernel has it.
#[must_use]
pub fn program(pid: u32) -> Option<String> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()?.file_name().map(|n| n.to_string_lossy().into_owned())
}

/// Deletes a directory with all that is in it, if it is there.
///
/// # Errors
/// With the path.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("deleting {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_whatever_its_name() {
        let rest: Vec<String> = (4..=30).map(|n| n.to_string()).collect();
        let stat = format!("7 (a) S 9 (b)) S {}", rest.join(" "));
        assert_eq!(state_and_start(&stat), Some(("S", "22")));
        assert_eq!(state_and_start("7 (a"), None);
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn only_the_recorded_process_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let lab = Lab { workspace: directory.path().into(), root: directory.path().into(), number: 1 };
        let sleeper = Recorded::start(&lab, "sleeper", Command::new("sleep").arg("1000")).unwrap();
        let pid = sleeper.pid().unwrap();
        assert!(Recorded::start(&lab, "sleeper", &Command::new("true")).is_err(), "it runs already");
        // The same number with another start is another process.
        fs::write(lab.run("pids").join("other"), format!("{pid} 1\n")).unwrap();
        let other = Recorded::named(&lab, "other");
        assert_eq!(other.pid(), None);
        other.end().unwrap();
        assert_eq!(sleeper.pid(), Some(pid));
        assert_eq!(Recorded::all(&lab).iter().map(Recorded::name).collect::<Vec<_>>(), ["sleeper"]);
        sleeper.end().unwrap();
        assert_eq!(sleeper.pid(), None);
        assert!(Recorded::all(&lab).is_empty());
    }

    #[test]
    fn a_failure_says_what_was_run_and_what_it_said() {
        let error = output("sh", &["-c", "echo why >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.starts_with("sh -c echo why") && error.ends_with(": why"), "{error}");
        assert_eq!(feed(&mut Command::new("cat"), "text").unwrap(), "text");
    }
}
