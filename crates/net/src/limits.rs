//! What the kernel lets this process have: descriptors and memory.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What [`raise_fd_limit`] found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FdLimit {
    /// The soft limit that the process started with.
    pub before: u64,
    /// The soft limit now: as many descriptors may be open.
    pub now: u64,
}

/// Raises the soft limit of open descriptors as far as is allowed: to the hard limit, and with
/// `CAP_SYS_RESOURCE` beyond it to `at_least`. A proxied connection takes two descriptors and, in bulk, two
/// or four more for pipes.
///
/// # Errors
/// The limit can't be read or set. That it stays below `at_least` is no error; compare [`FdLimit::now`].
pub fn raise_fd_limit(at_least: u64) -> io::Result<FdLimit> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let goal = hard.max(at_least);
    if goal > hard && setrlimit(Resource::RLIMIT_NOFILE, goal, goal).is_ok() {
        return Ok(FdLimit { before: soft, now: goal });
    }
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(FdLimit { before: soft, now: hard })
}

/// How many descriptors this process may have open now.
///
/// # Errors
/// The limit can't be read.
pub fn descriptors() -> io::Result<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(soft)
}

/// The memory that this process may use, in bytes: the machine's, or less if a control group says so. `None` if nothing
/// tells.
#[must_use]
pub fn memory() -> Option<u64> {
    let text = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = text(Path::new("/proc/meminfo")).as_deref().and_then(machine_memory);
    let groups = text(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let limits = group_limits(&groups).into_iter().filter_map(|path| text(&path)?.trim().parse().ok());
    machine.into_iter().chain(limits).min()
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn machine_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The files that may hold a limit for a process with these `/proc/self/cgroup`: those of its groups and of all groups
/// above them (cgroups(7)). A group outside of our cgroup namespace has none here; then the root's, which is the
/// container's own, is found all the same.
fn group_limits(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let group = Path::new(path.trim_start_matches('/'));
        files.extend(group.ancestors().map(|ancestor| Path::new(root).join(ancestor).join(file)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_least_of_what_the_machine_and_the_groups_have() {
        let meminfo = "MemFree:  1 kB\nMemTotal:       16384 kB\nMemAvailable: 5 kB\n";
        assert_eq!(machine_memory(meminfo), Some(16 << 20));
        assert_eq!(machine_memory("MemTotal: many"), None);
        let paths = |groups| {
            let paths = group_limits(groups);
            paths.iter().map(|path| path.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            paths("0::/kubepods/pod1\n"),
            [
                "/sys/fs/cgroup/kubepods/pod1/memory.max",
                "/sys/fs/cgroup/kubepods/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            paths("3:cpu:/a\n2:memory,hugetlb:/\nwhat is this"),
            ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(memory().unwrap() > 1 << 20);
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let limit = raise_fd_limit(0).unwrap();
        assert_eq!(limit.now, hard);
        assert_eq!(descriptors().unwrap(), hard);
    }
}
