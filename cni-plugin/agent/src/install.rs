//! The plugin on the node: its binary and its place in the CNI configuration, put there and kept there.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use process::readiness::Condition;
use tokio::sync::Notify;

use crate::chain::{Chain, ChainError, PLUGIN, may_write};
use crate::metrics::Metrics;
use crate::record::replace;

/// Between looks when nothing is heard of a change, milliseconds: not every file system tells of changes.
const POLL_MS: u16 = 2000;

/// When the plugin is taken away: how long others that call it are waited for, and how often they are looked at.
const LOOK: std::time::Duration = std::time::Duration::from_millis(250);
const LOOKS: u32 = 20;

/// What of a file tells that it is another: its number, size and time of change.
type Stamp = (u64, u64, i64, i64);

/// The plugin's binary.
#[derive(Debug)]
struct Binary {
    source: PathBuf,
    target: PathBuf,
    /// The target as it was when it was found to be the source.
    same: Option<Stamp>,
}

impl Binary {
    /// Copies the source into place if what is there is something else. Whether it did.
    fn sync(&mut self) -> io::Result<bool> {
        let stamp = stamp(&self.target);
        if stamp.is_some() && stamp == self.same {
            return Ok(false);
        }
        let wanted = fs::read(&self.source)?;
        let is_executable =
            fs::metadata(&self.target).is_ok_and(|there| there.permissions().mode() & 0o555 == 0o555);
        let changed = !(is_executable && fs::read(&self.target).is_ok_and(|there| there == wanted));
        if changed {
            replace(&self.target, &wanted, 0o755)?;
        }
        self.same = self::stamp(&self.target);
        Ok(changed)
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let there = fs::metadata(path).ok()?;
    Some((there.ino(), there.len(), there.ctime(), there.ctime_nsec()))
}

/// What keeps the plugin in place.
#[derive(Debug)]
pub struct Installation {
    binary: Binary,
    chain: Chain,
    directory: PathBuf,
    metrics: Metrics,
    /// What was said last of what is in place and not as it should be.
    warnings: Vec<String>,
}

/// Why the plugin is not in place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The binary.
    #[error("plugin {to}: {source}{}", may_write(.source))]
    Binary {
        /// Where to.
        to: PathBuf,
        /// The file system's answer.
        #[source]
        source: io::Error,
    },
    /// The configuration.
    #[error("{0}")]
    Chain(#[from] ChainError),
}

impl Installation {
    /// Of the plugin at `source`, into the directories of binaries and of configurations.
    #[must_use]
    pub fn new(
        source: &Path,
        binaries: &Path,
        configurations: &Path,
        chain: Chain,
        metrics: Metrics,
    ) -> Self {
        let binary = Binary { source: source.to_owned(), target: binaries.join(PLUGIN), same: None };
        Self { binary, chain, directory: configurations.to_owned(), metrics, warnings: Vec::new() }
    }

    /// Sees to it that the plugin is in place: first the binary, then what names it.
    ///
    /// # Errors
    /// It isn't: why.
    pub fn sync(&mut self) -> Result<(), InstallError> {
        let copied = self.binary.sync().map_err(|source| {
            self.metrics.install("COPY_BINARIES_FAILURE");
            InstallError::Binary { to: self.binary.target.clone(), source }
        })?;
        let synced = self.chain.sync().inspect_err(|_| self.metrics.install("CREATE_CNI_CONFIG_FAILURE"))?;
        self.metrics.cni_warnings(synced.warnings.len());
        if synced.warnings != self.warnings {
            for warning in &synced.warnings {
                tracing::error!(warning, behind = %synced.primary.display(), "the CNI plugin is in place, but");
            }
            self.warnings = synced.warnings;
        }
        if copied || synced.changed {
            self.metrics.install("SUCCESS");
            tracing::info!(
                binary_changed = copied, configuration = %synced.ours.display(), primary = %synced.primary.display(),
                "the CNI plugin is in place"
            );
        }
        Ok(())
    }

    /// Keeps it in place, until the future is dropped.
    pub async fn keep(mut self, condition: Condition) {
        let changed = Arc::new(Notify::new());
        watch(self.directory.clone(), changed.clone());
        let mut trouble: Option<String> = None;
        loop {
            let work = tokio::task::spawn_blocking(move || {
                let outcome = self.sync().map_err(|error| error.to_string());
                (self, outcome)
            });
            // A panic in there is a bug; without the plugin in place nothing new is protected, and readiness says so.
            let Ok((back, outcome)) = work.await else { return };
            self = back;
            let new = outcome.err();
            match &new {
                None => condition.holds(),
                Some(error) => {
                    if new != trouble {
                        tracing::error!(error, "the CNI plugin is not in place; trying again");
                    }
                    condition.fails(error.clone());
                }
            }
            trouble = new;
            changed.notified().await;
        }
    }

    /// Takes the plugin away: first what names it, then the binary.
    ///
    /// # Errors
    /// It is still there: why.
    pub fn remove(&self) -> Result<(), InstallError> {
        self.chain.remove()?;
        // Whoever calls it by himself hears of it by the change of our file. Without the binary his pods would not start.
        let mut is_called = self.chain.is_called()?;
        for _ in 0..LOOKS {
            if !is_called {
                break;
            }
            std::thread::sleep(LOOK);
            is_called = self.chain.is_called()?;
        }
        if is_called {
            tracing::error!(
                "another primary (Multus?) goes on naming our plugin or its file, and the plugin is taken away now: where it \
                 names the plugin, no pod of this node starts until that primary is started anew"
            );
        }
        match fs::remove_file(&self.binary.target) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(InstallError::Binary { to: self.binary.target.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// Notifies of changes in `directory`, and every now and then without. The thread ends with the process.
fn watch(directory: PathBuf, changed: Arc<Notify>) {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ONLYDIR;
    let spawned = std::thread::Builder::new().name("cni-watch".into()).spawn(move || {
        let mut watched: Option<Inotify> = None;
        loop {
            if watched.is_none() {
                let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok();
                watched = inotify.filter(|inotify| inotify.add_watch(&directory, flags).is_ok());
            }
            match &watched {
                Some(inotify) => {
                    let mut waiting = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                    let heard = poll(&mut waiting, PollTimeout::from(POLL_MS)).unwrap_or(0) > 0;
                    // Which file it was makes no difference. After the directory itself was replaced nothing is heard.
                    if heard && inotify.read_events().is_err() || !directory.is_dir() {
                        watched = None;
                    }
                }
                None => std::thread::sleep(std::time::Duration::from_millis(u64::from(POLL_MS))),
            }
            changed.notify_one();
        }
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "changes of the CNI configuration are not watched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use process::metrics::Registry;
    use process::readiness::Readiness;
    use std::time::Duration;

    fn files() -> (tempfile::TempDir, Installation) {
        let dir = tempfile::tempdir().unwrap();
        let (bin, conf) = (dir.path().join("bin"), dir.path().join("conf"));
        fs::create_dir(&bin).unwrap();
        fs::create_dir(&conf).unwrap();
        fs::write(dir.path().join("plugin"), "binary").unwrap();
        let chain = Chain::new(&conf, Path::new("/x.sock"), &[]);
        let metrics = Metrics::new(&Registry::new());
        let installation = Installation::new(&dir.path().join("plugin"), &bin, &conf, chain, metrics);
        (dir, installation)
    }

    const PRIMARY: &str = r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"b"}]}"#;

    #[test]
    fn the_binary_is_replaced_only_when_it_differs() {
        let (dir, mut installation) = files();
        fs::write(dir.path().join("conf/10-a.conflist"), PRIMARY).unwrap();
        installation.sync().unwrap();
        let target = dir.path().join("bin/culvert-cni");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        let inode = fs::metadata(&target).unwrap().ino();
        installation.sync().unwrap();
        assert_eq!(fs::metadata(&target).unwrap().ino(), inode);
        fs::write(&target, "another").unwrap();
        installation.sync().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "binary");
        fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        installation.sync().unwrap();
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        installation.remove().unwrap();
        assert!(!target.exists() && !dir.path().join("conf/02-culvert.conflist").exists());
        installation.remove().unwrap();
    }

    #[test]
    fn a_directory_that_can_not_be_written_is_said_with_what_to_do() {
        let io = |error: nix::errno::Errno| io::Error::from_raw_os_error(error as i32);
        for error in [nix::errno::Errno::EROFS, nix::errno::Errno::EACCES] {
            let of_binary = InstallError::Binary { to: "/opt/cni/bin/x".into(), source: io(error) };
            let of_chain = ChainError::Io { path: "/etc/cni/net.d/x".into(), source: io(error) };
            for (text, path) in [(of_binary.to_string(), "/opt/cni"), (of_chain.to_string(), "/etc/cni")] {
                assert!(text.contains(path) && text.contains("node.cniBinDir"), "{text}");
            }
        }
        let full = ChainError::Io { path: "/a".into(), source: io(nix::errno::Errno::ENOSPC) };
        assert!(!full.to_string().contains("node."), "{full}");
    }

    #[tokio::test]
    async fn it_stays_in_place_while_others_rewrite_theirs() {
        let (dir, installation) = files();
        let readiness = Readiness::default();
        tokio::spawn(installation.keep(readiness.condition("plugin")));
        let until = async |what: &str, done: &dyn Fn() -> bool| {
            for _ in 0..500 {
                if done() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("{what}: {:?}", readiness.unmet());
        };
        let unmet = || readiness.unmet().iter().any(|(_, why)| why.contains("no configuration of a primary"));
        until("it says what is missing", &unmet).await;
        fs::write(dir.path().join("conf/10-a.conflist"), PRIMARY).unwrap();
        until("ready", &|| readiness.is_ready()).await;
        let ours = dir.path().join("conf/02-culvert.conflist");
        let has = |text: &str| fs::read_to_string(&ours).is_ok_and(|content| content.contains(text));
        assert!(has("culvert-cni"));
        fs::remove_file(&ours).unwrap();
        until("it is back", &|| has("culvert-cni")).await;
        fs::write(dir.path().join("conf/10-a.conflist"), PRIMARY.replace("\"b\"", "\"c\"")).unwrap();
        until("it follows", &|| has("\"c\"")).await;
        fs::write(dir.path().join("conf/10-a.conflist"), "{").unwrap();
        until("it says what is wrong", &|| !readiness.is_ready()).await;
        assert!(has("\"c\""), "the last good one stays");
    }
}
