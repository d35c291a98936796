//! The end of a node's verdicts, while the process goes on that attached them.

use std::fs::{self, File};
use std::os::fd::AsFd;

use aya::maps::{Array, MapData};
use nix::fcntl::{Flock, FlockArg};

use super::links::AT_ROOT;
use super::{Verdicts, held, map};
use crate::layout::Control;
use crate::{Error, sys};

impl Verdicts {
    /// Takes all of it away: programs, and maps. What pods' programs share stays for these, and they look at it no more. Not while
    /// there is a pair, while somebody installs, or where another process has taken over. Whether it was done. What another process
    /// attached ([`Verdicts::take`]) is for that one to take away: of it only the lease ends.
    ///
    /// # Errors
    /// It can't be read, or removed.
    pub fn remove(&self) -> Result<bool, Error> {
        if self.from_pod.is_none() {
            self.stop()?;
            return Ok(true);
        }
        let root = File::open(self.pins.root()).map_err(Error::io("lock", self.pins.root().display()))?;
        // Whoever attaches, or captures a pod, has it shared: they come before, and are seen, or find nothing.
        let Ok(_alone) = Flock::lock(root, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
        if !self.directory.exists() {
            return Ok(true);
        }
        // By its name: another build may have made its own.
        let mut control: Array<MapData, Control> = map(&self.directory, "control")?;
        let current = control.get(&0, 0).map_err(Error::map("read", "control"))?;
        if current.owner != self.owner || held(&self.written).verdicts.keys().next().is_some() {
            return Ok(false);
        }
        control.set(0, Control::default(), 0).map_err(Error::map("write", "control"))?;
        self.detach();
        fs::remove_dir_all(&self.directory).map_err(Error::io("remove", self.directory.display()))?;
        Ok(true)
    }

    /// Links without a name are detached too, but in the kernel's own time. What grants goes first.
    fn detach(&self) {
        let at_root = AT_ROOT.iter().rev().map(|(name, _)| self.directory.join(format!("link-{name}")));
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let of_devices = entries.map(|entry| entry.path()).filter(|path| super::links::is_of_device(path));
        for path in at_root.chain(of_devices) {
            if let Ok(link) = sys::open(&path)
                && let Err(error) = sys::link_detach(link.as_fd())
            {
                tracing::debug!(link = %path.display(), %error, "a program is detached when its name is gone");
            }
        }
    }
}
