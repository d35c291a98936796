//! The exemption of the kubelet's probes: who the kubelet is on this node, and the node's rules kept in step with the pods.
//!
//! With cgroup v2, where the kubelet has a control group of its own, its connections are told by that. Else, and that is
//! less, by its user: then any process of that user in the node's network namespace reaches the ports that enrolled pods
//! have probes on. Which of the two is in force is said at the start, in the log and on the page `/pods`.
//!
//! Invariant: where groups can tell, nobody gets the exemption in the kubelet's place. Until the kubelet, or the group that
//! is given, is there, nobody is exempt; and nobody probes.

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

/// What the process of the kubelet is called: by itself, and in distributions that have all in one.
const NAMES: [&str; 5] = ["kubelet", "k3s-server", "k3s-agent", "k3s", "kubelite"];

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

/// Whose connections are probes.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Found {
    prober: Prober,
    /// The inode of the group's directory: another one of the same name is another group.
    group: u64,
}

impl Finder {
    /// Whose connections are probes now. `kubelet` is its directory in `/proc` when it was found last, which is looked at
    /// first.
    ///
    /// # Errors
    /// There is nobody yet whose they could be: why.
    fn find(&self, kubelet: &mut Option<PathBuf>) -> Result<Found, String> {
        let is_v2 = self.cgroups.join("cgroup.controllers").exists();
        let everybody = Found { prober: Prober::User(0), group: 0 };
        let path = match &self.given {
            Some(_) if !is_v2 => {
                let path = self.cgroups.display();
                return Err(format!("--kubelet-cgroup names a group of cgroup v2, which {path} is not"));
            }
            Some(given) => given.trim_matches('/').to_owned(),
            // The older groups tell nothing.
            None if !is_v2 => return Ok(everybody),
            None => match self.kubelets_group(kubelet)? {
                Some(path) => path,
                None => return Ok(everybody),
            },
        };
        let directory = self.cgroups.join(&path);
        match fs::metadata(&directory) {
            Ok(there) if there.is_dir() && !path.is_empty() => {
                Ok(Found { prober: Prober::Cgroup(path), group: there.ino() })
            }
            _ => Err(format!("the kubelet's control group {} is not there", directory.display())),
        }
    }

    /// The control group of the kubelet; `None` if that is the root, where everybody may be.
    fn kubelets_group(&self, known: &mut Option<PathBuf>) -> Result<Option<String>, String> {
        // Any process may call itself so. A pod's is not the kubelet, and neither is one of another user.
        let kubelets_group = |path: &Path| {
            let read = |file| fs::read_to_string(path.join(file)).ok();
            (NAMES.contains(&read("comm")?.trim()) && is_roots(&read("status")?)).then_some(())?;
            read("cgroup").filter(|cgroup| pod_of(cgroup).is_none())
        };
        if let Some(group) = known.as_deref().and_then(kubelets_group) {
            return Ok(group_of(&group));
        }
        let processes =
            fs::read_dir(&self.proc).map_err(|error| format!("{}: {error}", self.proc.display()))?;
        let mut paths = processes.flatten().map(|entry| entry.path());
        let found = paths.find_map(|path| kubelets_group(&path).map(|group| (path, group)));
        let (path, group) = found.ok_or_else(|| {
            "there is no process of root called kubelet; if it is called otherwise, name its group \
             (--kubelet-cgroup)"
                .to_owned()
        })?;
        *known = Some(path);
        Ok(group_of(&group))
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
    found: Found,
    targets: Vec<SocketAddr>,
    listing: String,
    verify_at: Instant,
}

#[derive(Debug, Default)]
struct State {
    installed: Option<Installed>,
    /// Whether what an earlier process may have left is taken away.
    is_clear: bool,
    kubelet: Option<PathBuf>,
}

/// The exemption of the kubelet's probes on this node.
#[derive(Clone, Debug)]
pub struct KubeletProbes {
    nat: NodeProbes,
    netns: Netns,
    finder: Finder,
    state: Arc<Mutex<State>>,
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
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.installed.as_ref().map(|installed| &installed.found.prober) {
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
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { installed: state, is_clear, kubelet } = &mut *guard;
        let found = match (self.finder.find(kubelet), &*state) {
            (Ok(found), _) => found,
            // The kubelet starts anew, as a rule. Others don't get its exemption meanwhile.
            (Err(_), Some(installed)) => installed.found.clone(),
            (Err(why), None) => {
                if !*is_clear {
                    self.nat.remove(&self.netns).map_err(|error| error.to_string())?;
                    *is_clear = true;
                }
                return Err(why);
            }
        };
        let now = Instant::now();
        if let Some(installed) = state.as_mut()
            && (&installed.found, &installed.targets) == (&found, &targets)
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
        let prober = &found.prober;
        let whose = match prober {
            Prober::Cgroup(path) => format!("control group {path}"),
            Prober::User(user) => format!("user {user}"),
        };
        if state.as_ref().is_none_or(|old| old.found.prober != *prober) {
            match prober {
                Prober::Cgroup(_) => tracing::info!(whose, "the kubelet's probes are exempt"),
                Prober::User(_) => tracing::warn!(
                    whose,
                    "the kubelet has no cgroup v2 of its own here: all of this user's processes on the node are exempt \
                     towards ports with probes (--kubelet-cgroup names its group)"
                ),
            }
        }
        let installed = self.nat.install(&self.netns, prober, ProbeSources::default(), &targets);
        let listing = installed.map_err(|error| error.to_string())?;
        *state = Some(Installed { found, targets, listing, verify_at: now + VERIFY });
        Ok(())
    }

    /// Removes the exemption.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn remove(&self) -> Result<bool, capture::Error> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).installed = None;
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

    /// A node with control groups of version 2, where processes may be put.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(files.0.path().join("proc")).unwrap();
            files.group("");
            fs::write(files.0.path().join("cgroup/cgroup.controllers"), "").unwrap();
            files
        }

        fn group(&self, path: &str) {
            fs::create_dir_all(self.0.path().join("cgroup").join(path)).unwrap();
        }

        fn process(&self, pid: u32, name: &str, user: u32, group: &str) {
            let path = self.0.path().join("proc").join(pid.to_string());
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("comm"), format!("{name}\n")).unwrap();
            fs::write(path.join("status"), format!("Uid:\t{user}\t{user}\t{user}\t{user}\n")).unwrap();
            fs::write(path.join("cgroup"), format!("0::/{group}\n")).unwrap();
        }

        fn end(&self, pid: u32) {
            fs::remove_dir_all(self.0.path().join("proc").join(pid.to_string())).unwrap();
        }

        fn finder(&self, given: Option<&str>) -> Finder {
            let path = self.0.path();
            Finder { proc: path.join("proc"), cgroups: path.join("cgroup"), given: given.map(str::to_owned) }
        }
    }

    fn found(finder: &Finder) -> Result<Prober, String> {
        finder.find(&mut None).map(|found| found.prober)
    }

    const GROUP: &str = "system.slice/kubelet.service";

    #[test]
    fn who_only_calls_itself_kubelet_is_not() {
        let files = Files::new();
        let pods = "kubepods/burstable/pod0a1b2c3d-1111-2222-3333-444455556666/c";
        for group in [GROUP, "user.slice", pods] {
            files.group(group);
        }
        files.process(3, "kubelet", 0, pods);
        files.process(4, "kubelet", 1000, "user.slice");
        files.process(5, "kubelets", 0, "user.slice");
        let finder = files.finder(None);
        assert!(found(&finder).unwrap_err().contains("--kubelet-cgroup"));
        files.process(6, "kubelet", 0, GROUP);
        let mut known = None;
        assert_eq!(finder.find(&mut known).unwrap().prober, Prober::Cgroup(GROUP.to_owned()));
        assert_eq!(known, Some(files.0.path().join("proc/6")));
        // What it was is looked at again: its number may be another's by now.
        files.process(6, "sleep", 0, "user.slice");
        assert!(finder.find(&mut known).is_err());
        files.end(6);
        files.process(7, "k3s-agent", 0, GROUP);
        assert_eq!(finder.find(&mut known).unwrap().prober, Prober::Cgroup(GROUP.to_owned()));
    }

    #[test]
    fn without_a_group_of_its_own_it_is_the_user() {
        let files = Files::new();
        files.process(7, "kubelet", 0, "");
        assert_eq!(found(&files.finder(None)), Ok(Prober::User(0)), "the root is everybody");
        files.process(7, "kubelet", 0, GROUP);
        assert!(found(&files.finder(None)).unwrap_err().contains("is not there"));
        files.group(GROUP);
        let group = files.finder(None).find(&mut None).unwrap().group;
        assert_eq!(group, fs::metadata(files.0.path().join("cgroup").join(GROUP)).unwrap().ino());
        fs::remove_file(files.0.path().join("cgroup/cgroup.controllers")).unwrap();
        assert_eq!(found(&files.finder(None)), Ok(Prober::User(0)), "these are no v2 groups");
        assert!(found(&files.finder(Some(GROUP))).unwrap_err().contains("cgroup v2"), "that was asked for");
    }

    #[test]
    fn a_given_group_is_waited_for_and_nobody_gets_its_place() {
        let files = Files::new();
        files.process(7, "kubelet", 0, "");
        let finder = files.finder(Some("/kubelet.slice/"));
        assert!(found(&finder).unwrap_err().contains("kubelet.slice is not there"));
        files.group("kubelet.slice");
        assert_eq!(found(&finder), Ok(Prober::Cgroup("kubelet.slice".to_owned())));
        assert!(found(&files.finder(Some("/"))).is_err(), "the root is everybody");
    }

    #[tokio::test]
    async fn nobody_is_exempt_before_the_kubelet_is_there() {
        if !harness::netns::root_or_skip("nobody is exempt before the kubelet is there") {
            return;
        }
        let files = Files::new();
        let lab = harness::netns::Lab::builder().node("a", &["web"]).build().unwrap();
        let netns = lab.node("a").host.netns.clone();
        let nat = NodeProbes::find(&capture::Tools::default()).unwrap();
        let target: SocketAddr = "10.0.0.1:80".parse().unwrap();
        // As an earlier agent left it.
        nat.install(&netns, &Prober::User(0), ProbeSources::default(), &[target]).unwrap();
        let probes = KubeletProbes::new(nat.clone(), netns.clone(), files.finder(None));
        probes.sync(vec![target]).await;
        assert_eq!(nat.listing(&netns).unwrap(), "");
        assert!(probes.describe().contains("no process of root called kubelet"), "{}", probes.describe());
        files.process(7, "kubelet", 0, "");
        probes.sync(vec![target]).await;
        assert!(nat.listing(&netns).unwrap().contains("10.0.0.1"));
        assert_eq!(probes.trouble(), None);
        // It starts anew: what is in force stays so, and follows the pods.
        files.end(7);
        probes.sync(Vec::new()).await;
        assert!(!nat.listing(&netns).unwrap().contains("10.0.0.1"));
        assert_eq!(probes.trouble(), None);
    }
}
