//! Where the network namespace of a pod is, and whether it is the pod's.
//!
//! A pod that runs already is found by its processes: their control groups carry its uid. None of what is found is
//! believed: a process of the pod may have gone to another namespace, a path may lead elsewhere since, a number may have
//! been used again. A namespace is a pod's when it has the pod's address.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use net::Netns;
use net::netns::OpenError;
use nix::ifaddrs::getifaddrs;

/// Processes of one pod that are looked at. One is enough but for a pod whose processes go to other namespaces.
const PROCESSES_OF_A_POD: usize = 256;
/// A control group file has a line for each hierarchy.
const CGROUP_LIMIT: usize = 64 << 10;

/// Why a pod's namespace is not known.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// It can't be opened.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// It can't be entered.
    #[error("{netns} can't be entered: {source}")]
    Enter {
        /// Which.
        netns: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It is another's.
    #[error("{netns} has none of the pod's addresses {addresses}: it is another's, or the pod has ended")]
    NotThePods {
        /// Which.
        netns: String,
        /// The pod's addresses.
        addresses: String,
    },
    /// No address of the pod is known.
    #[error("none of the pod's addresses is known, so that it can't be told whether {0} is the pod's")]
    NoAddress(String),
    /// It is the node's.
    #[error("{0} is the node's own network namespace: to capture its traffic would be to cut the node off")]
    Nodes(String),
    /// No process of the pod was found.
    #[error(
        "none of the node's processes belongs to the pod (culvert-node needs hostPID), or none of its namespaces has \
         the pod's addresses {0}"
    )]
    NotFound(String),
}

/// Opens the namespace that the container runtime named. Its path is the node's; where this process has other mounts,
/// the node's first process has the node's.
///
/// # Errors
/// It isn't there, or is no network namespace.
pub fn open(path: &Path) -> Result<Netns, OpenError> {
    match Netns::open(path) {
        Err(OpenError::Vanished { .. } | OpenError::NotANamespace { .. }) => {
            let on_node = Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path));
            // The error of the path that was given says more.
            Netns::open(&on_node).or_else(|_| Netns::open(path))
        }
        outcome => outcome,
    }
}

/// Whether an address tells one namespace from another: all have a loopback, and what is local to a link may be the same
/// on each.
#[must_use]
pub fn tells(address: &IpAddr) -> bool {
    let is_of_link = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(is_of_link || address.is_loopback() || address.is_unspecified())
}

/// Checks that `netns` is that of a pod with these addresses: it has one of them.
///
/// # Errors
/// It isn't, or can't be looked at.
pub fn check(netns: &Netns, addresses: &[IpAddr]) -> Result<(), NetnsError> {
    let own = [Netns::current(), Netns::of_process(1)];
    if own.iter().flatten().any(|own| own.same(netns)) {
        return Err(NetnsError::Nodes(netns.to_string()));
    }
    if !addresses.iter().any(tells) {
        return Err(NetnsError::NoAddress(netns.to_string()));
    }
    let there = addresses_in(netns)?;
    if addresses.iter().any(|address| there.contains(address)) {
        return Ok(());
    }
    Err(NetnsError::NotThePods { netns: netns.to_string(), addresses: list(addresses) })
}

/// The addresses of the devices in `netns` that tell it from another.
///
/// # Errors
/// It can't be entered.
pub fn addresses_in(netns: &Netns) -> Result<Vec<IpAddr>, NetnsError> {
    let failed = |source| NetnsError::Enter { netns: netns.to_string(), source };
    let found = netns.run(|| getifaddrs().map(Iterator::collect::<Vec<_>>)).map_err(failed)?;
    let found = found.map_err(|error| failed(error.into()))?;
    let ip = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    };
    Ok(found.into_iter().filter_map(|device| device.address.and_then(ip)).filter(tells).collect())
}

fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The processes of this node by pod, as they were when they were looked at.
#[derive(Debug, Default)]
pub struct Processes {
    proc: PathBuf,
    /// The oldest first: that of the pod's sandbox is.
    by_pod: HashMap<String, Vec<u32>>,
}

impl Processes {
    /// Looks at all of them. `proc` is `/proc` of the node.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn scan(proc: &Path) -> io::Result<Self> {
        let mut found: HashMap<String, Vec<(u64, u32)>> = HashMap::new();
        for entry in fs::read_dir(proc)?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Those that end meanwhile are no loss.
            let Ok(text) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
            let Some(uid) = text.get(..text.len().min(CGROUP_LIMIT)).and_then(pod_of) else { continue };
            let started = fs::read_to_string(entry.path().join("stat")).ok().and_then(|s| start_time(&s));
            found.entry(uid).or_default().push((started.unwrap_or(u64::MAX), pid));
        }
        let ordered = |(uid, mut processes): (String, Vec<(u64, u32)>)| {
            processes.sort_unstable();
            processes.truncate(PROCESSES_OF_A_POD);
            (uid, processes.into_iter().map(|(_, pid)| pid).collect())
        };
        Ok(Self { proc: proc.to_owned(), by_pod: found.into_iter().map(ordered).collect() })
    }

    /// The namespace of a pod with these addresses.
    ///
    /// # Errors
    /// None of the pod's processes is in a namespace with one of these.
    pub fn netns_of(&self, uid: &str, addresses: &[IpAddr]) -> Result<Netns, NetnsError> {
        let not_found = || NetnsError::NotFound(list(addresses));
        if addresses.is_empty() {
            return Err(not_found());
        }
        let mut seen = Vec::new();
        for pid in self.by_pod.get(uid).into_iter().flatten() {
            let Ok(netns) = Netns::open(self.proc.join(format!("{pid}/ns/net"))) else { continue };
            if seen.contains(&netns.id()) {
                continue;
            }
            seen.push(netns.id());
            if check(&netns, addresses).is_ok() {
                return Ok(netns);
            }
        }
        Err(not_found())
    }
}

/// When a process started, in ticks (proc_pid_stat(5), field 22). Its name, field 2, may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The uid of the pod that a process with this `/proc/PID/cgroup` belongs to. Forms that are in use, with the pod's uid
/// as it is or with `_` for `-`:
///
/// ```text
/// .../kubepods/burstable/podUID/CONTAINER                                              cgroupfs
/// .../kubepods-burstable.slice/kubepods-burstable-podUID.slice/cri-containerd-X.scope  systemd
/// .../kubepods-besteffort-podUID.slice:cri-containerd:CONTAINER                        containerd, mixed up
/// ```
#[must_use]
pub fn pod_of(cgroup: &str) -> Option<String> {
    // The line is `ID:CONTROLLERS:PATH`, and a path may have colons.
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut segments = paths.flat_map(|path| path.split(['/', ':']));
    // The outermost: what is below it a container may have made itself.
    segments.find_map(pod_of_segment)
}

fn pod_of_segment(segment: &str) -> Option<String> {
    let segment = segment.strip_suffix(".slice").unwrap_or(segment);
    let at = if segment.starts_with("pod") { 0 } else { segment.rfind("-pod")? + 1 };
    let uid = segment.get(at + 3..)?.replace('_', "-");
    is_uid(&uid).then_some(uid)
}

/// A UUID; a static pod's is a hash without dashes.
fn is_uid(uid: &str) -> bool {
    let hex = |part: &str| part.bytes().all(|b| b.is_ascii_hexdigit());
    let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
    uid.split('-').all(hex) && (lengths == [8, 4, 4, 4, 12] || lengths == [32])
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

    #[test]
    fn control_groups_carry_the_uid_in_many_forms() {
        let underscored = UID.replace('-', "_");
        for cgroup in [
            format!("0::/kubepods/burstable/pod{UID}/0123abcd"),
            format!("0::/kubepods/pod{UID}/0123abcd\n"),
            format!("12:memory:/node1/kubepods/besteffort/pod{UID}/0123abcd\n1:name=systemd:/\n0::/"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-01.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{underscored}.slice/crio-01.scope/container"),
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{underscored}.slice/cri-containerd-01.scope"
            ),
            format!(
                "3:cpu:/system.slice/containerd.service/kubepods-besteffort-pod{underscored}.slice:cri-containerd:01"
            ),
            format!("0::/../../kubepods-pod{underscored}.slice/cri-containerd-01.scope"),
        ] {
            assert_eq!(pod_of(&cgroup).as_deref(), Some(UID), "{cgroup}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(pod_of(&format!("0::/kubepods/pod{hash}/x")).as_deref(), Some(hash), "a static pod");
    }

    #[test]
    fn what_only_looks_like_a_pod_is_none() {
        for cgroup in [
            "",
            "0::/",
            "0::/system.slice/podman.service",
            "0::/user.slice/podsomething/x",
            "0::/kubepods/burstable/pod0a1b2c3d/x",
            "0::/kubepods/podzzzzzzzz-1111-2222-3333-444455556666/x",
            "nonsense",
            "::::",
        ] {
            assert_eq!(pod_of(cgroup), None, "{cgroup}");
        }
        // What a container makes below its own group does not make it another pod.
        let inner = "11111111-1111-1111-1111-111111111111";
        let nested = format!("0::/kubepods/pod{UID}/01/kubepods/pod{inner}/02");
        assert_eq!(pod_of(&nested).as_deref(), Some(UID));
    }

    proptest::proptest! {
        #[test]
        fn nothing_but_a_uid_is_found(text in "(0::|12:cpu:|:){0,2}[/:a-f0-9_.\\-pods\n]{0,120}") {
            if let Some(uid) = pod_of(&text) {
                assert!(is_uid(&uid) && text.replace('_', "-").contains(&uid), "{uid}");
            }
        }
    }

    #[test]
    fn start_times_are_found_behind_strange_names() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1";
        assert_eq!(start_time(stat), Some(987_654));
        assert_eq!(start_time("42 (a"), None);
    }

    #[test]
    fn processes_without_pods_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for (pid, cgroup, started) in [
            ("7", format!("0::/kubepods/pod{UID}/b"), 20),
            ("30", format!("0::/kubepods/pod{UID}/a"), 10),
            ("8", "0::/system.slice/x".to_owned(), 5),
            ("self", format!("0::/kubepods/pod{UID}/a"), 1),
        ] {
            let path = dir.path().join(pid);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("cgroup"), cgroup).unwrap();
            fs::write(
                path.join("stat"),
                format!("{pid} (x) S 1 1 1 0 -1 0 1 0 0 0 0 0 0 0 20 0 1 0 {started} 1"),
            )
            .unwrap();
        }
        let found = Processes::scan(dir.path()).unwrap();
        assert_eq!(found.by_pod, HashMap::from([(UID.to_owned(), vec![30, 7])]));
        let error = found.netns_of(UID, &["10.0.0.1".parse().unwrap()]).unwrap_err();
        assert!(error.to_string().contains("hostPID"), "{error}");
    }
}
