//! The exemption of the kubelet's probes: who the kubelet is on this node, and the node's rules kept in step with the pods.
//!
//! With cgroup v2, where the kubelet has a control group of its own, its connections are told by that. Else, and that is
//! less, by its user: then any process of that user in the node's network namespace reaches the ports that enrolled pods
//! have probes on. Which of the two is in force is said at the start, in the log and on the page `/pods`.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use capture::{NodeProbes, ProbeSources, Prober};
use net::Netns;
use tokio::time::{Duration, Instant};

use crate::netns::pod_of;

/// Between looks at rules that should be as they were.
const VERIFY: Duration = Duration::from_secs(30);

/// Finds the kubelet among the processes of the node.
#[derive(Clone, Debug)]
pub struct Finder {
    /// `/proc` of the node.
    pub proc: PathBuf,
    /// Where its control groups (v2) are.
    pub cgroups: PathBuf,
    /// The kubelet's control group, where it is not to be looked for.
    pub given: Option<String>,
}

impl Finder {
    /// Whose connections are probes now, and what the group's directory is: another one of the same name is another group.
    fn find(&self) -> (Prober, u64) {
        let group = self.given.clone().or_else(|| self.kubelets_group());
        let found = group.and_then(|group| {
            let path = group.trim_matches('/').to_owned();
            let directory = fs::metadata(self.cgroups.join(&path)).ok().filter(fs::Metadata::is_dir)?;
            let is_v2 = self.cgroups.join("cgroup.controllers").exists();
            (is_v2 && !path.is_empty()).then(|| (Prober::Cgroup(path), directory.ino()))
        });
        found.unwrap_or((Prober::User(0), 0))
    }

    /// The control group of the process `kubelet`, if it has one of its own below the root.
    fn kubelets_group(&self) -> Option<String> {
        let processes = fs::read_dir(&self.proc).ok()?.flatten();
        // Any process may call itself so. A pod's is not the kubelet, and neither is one of another user.
        let kubelets_group = |path: &Path| {
            let read = |file| fs::read_to_string(path.join(file)).ok();
            (read("comm")?.trim() == "kubelet" && is_roots(&read("status")?)).then_some(())?;
            read("cgroup").filter(|cgroup| pod_of(cgroup).is_none())
        };
        let group = processes.map(|entry| entry.path()).find_map(|path| kubelets_group(&path))?;
        group_of(&group)
    }
}

/// Whether a process with this `/proc/PID/status` is root's, in all of its user ids.
fn is_roots(status: &str) -> bool {
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    users.is_some_and(|users| users.split_whitespace().all(|user| user == "0"))
}

/// The path of the v2 line; `None` for the root. Seen from within a group it starts with as many `..` as that is deep.
fn group_of(cgroup: &str) -> Option<String> {
    let mut path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?.trim_matches('/');
    while let Some(rest) = path.strip_prefix("../") {
        path = rest;
    }
    (!path.is_empty() && path != "..").then(|| path.to_owned())
}

/// The exemption in force.
#[derive(Debug)]
struct Installed {
    prober: Prober,
    group: u64,
    targets: Vec<SocketAddr>,
    listing: String,
    verify_at: Instant,
}

/// The exemption of the kubelet's probes on this node.
#[derive(Clone, Debug)]
pub struct KubeletProbes {
    nat: NodeProbes,
    netns: Netns,
    finder: Finder,
    state: Arc<Mutex<Option<Installed>>>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl KubeletProbes {
    /// For the node whose network namespace is `netns`. Nothing is changed yet.
    #[must_use]
    pub fn new(nat: NodeProbes, netns: Netns, finder: Finder) -> Self {
        Self { nat, netns, finder, state: Arc::default(), trouble: Arc::default() }
    }

    /// Whose probes are exempt, in words.
    #[must_use]
    pub fn describe(&self) -> String {
        if let Some(trouble) = self.trouble() {
            return format!("not in force: {trouble}");
        }
        match self.state.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|s| s.prober.clone()) {
            Some(Prober::Cgroup(path)) => format!("of the control group {path}"),
            Some(Prober::User(user)) => {
                format!(
                    "of all processes of user {user} in the node's network (the kubelet has no cgroup v2 of its own)"
                )
            }
            None => "not in force yet".to_owned(),
        }
    }

    /// Why the exemption is not in force, if it should be.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Exempts probes of these ports of pods and no others.
    pub async fn sync(&self, mut targets: Vec<SocketAddr>) {
        targets.sort_unstable();
        targets.dedup();
        let this = self.clone();
        let synced = tokio::task::spawn_blocking(move || this.sync_now(targets));
        let outcome = synced.await.map_err(|error| error.to_string()).flatten();
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let new = outcome.err();
        if new != *trouble {
            match &new {
                Some(error) => tracing::error!(error, "the kubelet's probes are not exempt; trying again"),
                None => tracing::info!("the kubelet's probes are exempt again"),
            }
        }
        *trouble = new;
    }

    fn sync_now(&self, targets: Vec<SocketAddr>) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (prober, group) = match (self.finder.find(), &*state) {
            // The kubelet starts anew, as a rule. Others don't get its exemption meanwhile.
            ((Prober::User(_), _), Some(Installed { prober: known @ Prober::Cgroup(_), group, .. })) => {
                (known.clone(), *group)
            }
            (found, _) => found,
        };
        let now = Instant::now();
        if let Some(installed) = state.as_mut()
            && (&installed.prober, installed.group, &installed.targets) == (&prober, group, &targets)
        {
            if installed.verify_at > now {
                return Ok(());
            }
            let listing = self.nat.listing(&self.netns).map_err(|error| error.to_string())?;
            if listing == installed.listing {
                installed.verify_at = now + VERIFY;
                return Ok(());
            }
            tracing::warn!("somebody changed the exemption of probes; it is restored");
        }
        let whose = match &prober {
            Prober::Cgroup(path) => format!("control group {path}"),
            Prober::User(user) => format!("user {user}"),
        };
        if state.as_ref().is_none_or(|old| old.prober != prober) {
            match &prober {
                Prober::Cgroup(_) => tracing::info!(whose, "the kubelet's probes are exempt"),
                Prober::User(_) => tracing::warn!(
                    whose,
                    "the kubelet has no cgroup v2 of its own here: all of this user's processes on the node are exempt \
                     towards ports with probes (--kubelet-cgroup names its group)"
                ),
            }
        }
        let installed = self.nat.install(&self.netns, &prober, ProbeSources::default(), &targets);
        let listing = installed.map_err(|error| error.to_string())?;
        *state = Some(Installed { prober, group, targets, listing, verify_at: now + VERIFY });
        Ok(())
    }

    /// Removes the exemption.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn remove(&self) -> Result<bool, capture::Error> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.nat.remove(&self.netns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_v2_line() {
        assert_eq!(
            group_of("12:cpu:/x\n0::/system.slice/kubelet.service\n").as_deref(),
            Some("system.slice/kubelet.service")
        );
        assert_eq!(
            group_of("0::/../../system.slice/kubelet.service").as_deref(),
            Some("system.slice/kubelet.service")
        );
        for none in ["0::/", "0::/..", "12:cpu:/x", "", "0::/../.."] {
            assert_eq!(group_of(none), None, "{none:?}");
        }
    }

    #[test]
    fn who_only_calls_itself_kubelet_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (dir.path().join("proc"), dir.path().join("cgroup"));
        let pods = "kubepods/burstable/pod0a1b2c3d-1111-2222-3333-444455556666/c";
        fs::create_dir_all(cgroups.join("system.slice/kubelet.service")).unwrap();
        fs::create_dir_all(cgroups.join("user.slice")).unwrap();
        fs::create_dir_all(cgroups.join(pods)).unwrap();
        fs::write(cgroups.join("cgroup.controllers"), "").unwrap();
        let process = |pid: u32, user: u32, group: &str| {
            let path = proc.join(pid.to_string());
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("comm"), "kubelet\n").unwrap();
            fs::write(path.join("status"), format!("Uid:\t{user}\t{user}\t{user}\t{user}\n")).unwrap();
            fs::write(path.join("cgroup"), format!("0::/{group}\n")).unwrap();
        };
        process(3, 0, pods);
        process(4, 1000, "user.slice");
        let finder = Finder { proc: proc.clone(), cgroups: cgroups.clone(), given: None };
        assert_eq!(finder.find().0, Prober::User(0));
        process(5, 0, "system.slice/kubelet.service");
        assert_eq!(finder.find().0, Prober::Cgroup("system.slice/kubelet.service".to_owned()));
    }

    #[test]
    fn without_a_group_of_its_own_it_is_the_user() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (dir.path().join("proc"), dir.path().join("cgroup"));
        fs::create_dir_all(proc.join("7")).unwrap();
        fs::create_dir_all(cgroups.join("system.slice/kubelet.service")).unwrap();
        fs::write(proc.join("7/comm"), "kubelet\n").unwrap();
        fs::write(proc.join("7/status"), "Name:\tkubelet\nUid:\t0\t0\t0\t0\n").unwrap();
        fs::write(proc.join("7/cgroup"), "0::/system.slice/kubelet.service\n").unwrap();
        let finder = Finder { proc: proc.clone(), cgroups: cgroups.clone(), given: None };
        assert_eq!(finder.find().0, Prober::User(0), "these are no v2 groups");
        fs::write(cgroups.join("cgroup.controllers"), "").unwrap();
        let (prober, group) = finder.find();
        assert_eq!(prober, Prober::Cgroup("system.slice/kubelet.service".to_owned()));
        assert_eq!(group, fs::metadata(cgroups.join("system.slice/kubelet.service")).unwrap().ino());
        fs::write(proc.join("7/cgroup"), "0::/\n").unwrap();
        assert_eq!(finder.find().0, Prober::User(0), "the root is everybody");
        let given = Finder { given: Some("/system.slice/kubelet.service".to_owned()), ..finder };
        assert!(matches!(given.find().0, Prober::Cgroup(_)));
    }
}
