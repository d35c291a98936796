//! Programs that go on until the lab ends them.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

/// How long a program has after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(3);

/// A program in a namespace. `ip netns exec` replaces itself by it, so the pid is the program's own.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    released: bool,
}

impl Process {
    /// Starts `argv` in the namespace `netns`, its output going to the end of `log`.
    pub fn start(netns: &str, argv: &[&str], log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let name = argv.first().copied().unwrap_or_default().to_owned();
        let output = File::options().create(true).append(true).open(log);
        let output = output.with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new("ip")
            .args(["netns", "exec", netns])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C on the terminal is the lab's to handle; its programs end after their connections.
            .process_group(0)
            .spawn()
            .context("cannot run ip (Debian: apt-get install iproute2)")?;
        Ok(Self { child, name, released: false })
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Lets it live on when this value goes.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Ends it without a word.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end, and ends it when it does not.
    pub fn terminate(&mut self) {
        if self.ended().is_some() {
            return;
        }
        let _ = kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM);
        let until = Instant::now() + PATIENCE;
        while self.ended().is_none() {
            if Instant::now() > until {
                let _ = self.kill();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.released {
            self.terminate();
        }
    }
}
