//! What a lab has made, on record under `/run/NAME`, so that it can be cleared by another process than the one
//! that made it: after `--keep`, and after a SIGKILL.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::netns;

/// A process by id and start time: ids are used again, the pair is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Started {
    pid: u32,
    ticks: u64,
}

impl Started {
    fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, ticks: start_ticks(pid)? })
    }

    fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold spaces and brackets.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    owner: Option<Started>,
    kept: bool,
    namespaces: Vec<String>,
    processes: Vec<Started>,
}

/// The record of a lab that this process owns.
#[derive(Debug)]
pub struct State {
    file: PathBuf,
    record: Record,
}

/// The folder of a lab's files.
pub fn directory(name: &str) -> PathBuf {
    Path::new("/run").join(name)
}

fn record_file(name: &str) -> PathBuf {
    directory(name).join("state.json")
}

impl State {
    /// Makes the lab's folder, a tmpfs: keys of its CA are in it. What a lab of the same name left behind whose owner is gone is cleared first,
    /// unless it was kept on purpose.
    pub(super) fn claim(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 40 || !name.chars().all(plain) {
            bail!("{name:?} can't name a lab: up to 40 of the characters a-z, 0-9 and '-'");
        }
        let dir = directory(name);
        if dir.exists() {
            let Some(old) = read(name) else {
                bail!("{} exists and is not a lab's; give another name with --name", dir.display());
            };
            if old.owner.is_some_and(Started::lives) {
                bail!("a lab named {name} runs already; wait for it, or give another name with --name");
            }
            if old.kept {
                bail!("a lab named {name} is up (--keep); `culvert demo --clean` clears it");
            }
            clear(name);
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}: the lab needs root (sudo)", dir.display()))?;
        mount(
            Some("culvert"),
            &dir,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=0700,size=1g"),
        )
        .inspect_err(|_| drop(fs::remove_dir(&dir)))
        .with_context(|| format!("cannot mount a tmpfs on {}", dir.display()))?;
        let record = Record { owner: Started::of(std::process::id()), ..Record::default() };
        let state = Self { file: record_file(name), record };
        state.write()?;
        Ok(state)
    }

    pub(super) fn record_namespaces(&mut self, namespaces: Vec<String>) -> Result<()> {
        self.record.namespaces = namespaces;
        self.write()
    }

    pub(super) fn record_process(&mut self, pid: u32) -> Result<()> {
        self.record.processes.extend(Started::of(pid));
        self.write()
    }

    pub(super) fn record_kept(&mut self) -> Result<()> {
        self.record.kept = true;
        self.record.owner = None;
        self.write()
    }

    #[cfg(test)]
    pub(super) fn record_owner_gone(&mut self) -> Result<()> {
        self.record.owner = None;
        self.write()
    }

    fn write(&self) -> Result<()> {
        let next = self.file.with_extension("next");
        fs::write(&next, serde_json::to_vec_pretty(&self.record)?)
            .and_then(|()| fs::rename(&next, &self.file))
            .with_context(|| format!("cannot write {}", self.file.display()))
    }
}

fn read(name: &str) -> Option<Record> {
    serde_json::from_slice(&fs::read(record_file(name)).ok()?).ok()
}

/// Whether there is anything of a lab of this name.
pub fn exists(name: &str) -> bool {
    read(name).is_some()
}

/// Ends the processes on record that still live, unmounts, deletes the namespaces and the files. Returns what it
/// could not do.
pub fn clear(name: &str) -> Vec<String> {
    let Some(record) = read(name) else { return Vec::new() };
    let mut left = Vec::new();
    end(&record.processes);
    for namespace in &record.namespaces {
        remove_namespace(namespace, &mut left);
    }
    for mount in mounts_under(&directory(name)) {
        if let Err(e) = umount2(&mount, MntFlags::MNT_DETACH) {
            left.push(format!("mount {}: {e}", mount.display()));
        }
    }
    // Its files are in the tmpfs; what is left is the mount point.
    if let Err(e) = fs::remove_dir_all(directory(name)) {
        left.push(format!("{}: {e}", directory(name).display()));
    }
    left
}

fn end(processes: &[Started]) {
    let signal = |signal| {
        for process in processes.iter().filter(|p| p.lives()) {
            let _ = kill(Pid::from_raw(process.pid.cast_signed()), signal);
        }
    };
    signal(Signal::SIGTERM);
    let until = Instant::now() + Duration::from_secs(3);
    while processes.iter().any(|p| p.lives()) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(Signal::SIGKILL);
}

fn remove_namespace(namespace: &str, left: &mut Vec<String>) {
    let file = netns::path_of(namespace);
    // Not a mount any more is fine: a build that failed midway.
    let _ = umount2(&file, MntFlags::MNT_DETACH);
    for result in [fs::remove_file(&file), fs::remove_dir_all(etc(namespace))] {
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => left.push(format!("{namespace}: {e}")),
            _ => {}
        }
    }
    // `ip` makes the parent when it is the first to need it; it goes when nobody else does.
    let _ = fs::remove_dir("/etc/netns");
}

/// Files here replace those of `/etc` for programs that `ip netns exec` starts.
pub(super) fn etc(namespace: &str) -> PathBuf {
    Path::new("/etc/netns").join(namespace)
}

/// The deepest first.
fn mounts_under(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(dir))
        .collect();
    found.sort();
    found.reverse();
    found
}
