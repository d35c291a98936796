//! The settings below `/proc/sys/net` of a namespace, also for a container whose `/proc/sys` is read-only.
//!
//! Container runtimes make it so for all but privileged containers, by a flag of the mount. A procfs that is made anew and
//! mounted nowhere has no such flag, and takes what may be changed by the capabilities alone (`CAP_SYS_ADMIN` for itself,
//! `CAP_NET_ADMIN` over the namespace for the settings). No other mount is touched by it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::mounts;
use crate::netns::Netns;

/// The procfs of this process's own, once it was needed.
static OWN: OnceLock<OwnedFd> = OnceLock::new();

/// Reads a setting, such as `ipv4/fwmark_reflect`, of `netns`, without its newline.
///
/// # Errors
/// There is none of that name, or the namespace can't be entered.
pub fn read(netns: &Netns, name: &str) -> io::Result<String> {
    let text = netns.run(|| fs::read_to_string(format!("/proc/sys/net/{name}")))??;
    Ok(text.trim_end().to_owned())
}

/// Changes a setting of `netns`.
///
/// # Errors
/// There is none of that name, the value is refused, or a capability is missing. A kernel before 5.2 can't do it where
/// `/proc/sys` is read-only (`ENOSYS`).
pub fn write(netns: &Netns, name: &str, value: &str) -> io::Result<()> {
    let line = format!("{value}\n");
    netns.run(|| match fs::write(format!("/proc/sys/net/{name}"), &line) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => write_past_the_mount(name, &line),
        written => written,
    })?
}

/// In the namespace of the thread.
fn write_past_the_mount(name: &str, line: &str) -> io::Result<()> {
    let own = match OWN.get() {
        Some(own) => own,
        None => {
            let made = mounts::detached(c"proc")?;
            OWN.get_or_init(|| made)
        }
    };
    let path = format!("sys/net/{name}");
    let file = openat(own.as_fd(), path.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    File::from(file).write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    const NAME: &str = "ipv4/fwmark_reflect";

    /// In a thread whose `/proc/sys` is read-only, as a container's.
    #[test]
    fn a_setting_is_changed_where_the_mount_is_read_only() {
        let outcome = std::thread::spawn(|| {
            let Ok(netns) = Netns::new_empty() else { return };
            if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                return;
            }
            let none: Option<&Path> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let sys = Path::new("/proc/sys");
            mount(Some(sys), sys, none, MsFlags::MS_BIND, none).unwrap();
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(none, sys, none, read_only, none).unwrap();
            let refused = fs::write(format!("/proc/sys/net/{NAME}"), "1\n").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);

            let here = read(&Netns::current().unwrap(), NAME).unwrap();
            for value in ["1", "0"] {
                write(&netns, NAME, value).unwrap();
                assert_eq!(read(&netns, NAME).unwrap(), value);
            }
            assert_eq!(read(&Netns::current().unwrap(), NAME).unwrap(), here, "it is another namespace's");
            assert!(write(&netns, "ipv4/there_is_none", "1").is_err());
        });
        outcome.join().unwrap();
    }
}
