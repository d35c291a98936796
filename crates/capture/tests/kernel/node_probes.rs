//! The kubelet's probes reach the application of a pod that refuses everything else; nobody else's connections do.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use capture::{Backend, NodeProbes, ProbeSources, Prober, Rules, Tools, probe};
use harness::netns::{Host, Lab, root_or_skip};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const NOBODY: u32 = 65534;

/// A node with a pod whose traffic is captured, where no ztunnel is: what is not exempt is refused.
struct Fixture {
    lab: Lab,
    applications: Vec<harness::netns::Process>,
    probes: NodeProbes,
}

impl Fixture {
    fn new() -> Self {
        let lab = Lab::builder().node("a", &["web", "other"]).build().unwrap();
        let web = lab.pod("web").clone();
        let capture = probe(Backend::Nftables, &Tools::default()).unwrap();
        let rules = Rules { probes: Some(ProbeSources::default()), ..Rules::default() };
        capture.install(&web.netns, &rules).unwrap();
        let applications = [8080, 9090].map(|port| {
            let listen = format!("TCP6-LISTEN:{port},fork,reuseaddr,ipv6only=0");
            web.spawn(Command::new("socat").args([&listen, "SYSTEM:echo $SOCAT_PEERADDR"])).unwrap()
        });
        let fixture = Self {
            lab,
            applications: applications.into(),
            probes: NodeProbes::find(&Tools::default()).unwrap(),
        };
        // From inside nothing is captured: the applications are up when this works.
        for port in [8080, 9090] {
            let up = || reach(&web, SocketAddr::new("127.0.0.1".parse().unwrap(), port), |_| ()).is_some();
            assert!((0..200).any(|_| up() || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                false
            }));
        }
        fixture
    }

    fn node(&self) -> &Host {
        &self.lab.node("a").host
    }

    fn target(&self, v6: bool, port: u16) -> SocketAddr {
        SocketAddr::new(self.lab.pod("web").ip(v6), port)
    }

    fn install(&self, prober: &Prober) {
        let targets = [self.target(false, 8080), self.target(true, 8080)];
        let listing =
            self.probes.install(&self.node().netns, prober, ProbeSources::default(), &targets).unwrap();
        assert_eq!(self.probes.listing(&self.node().netns).unwrap(), listing);
    }

    fn end(mut self) {
        self.applications.clear();
        assert!(self.probes.remove(&self.node().netns).unwrap());
        assert!(!self.probes.remove(&self.node().netns).unwrap(), "nothing is left");
        assert_eq!(self.node().shell("nft list ruleset").unwrap(), "");
    }
}

/// Whom the application saw; `None` when the connection was refused.
fn reach(from: &Host, to: SocketAddr, with: impl FnOnce(&mut Command)) -> Option<String> {
    let mut command = Command::new("socat");
    command.args(["-u", &format!("TCP:{to},connect-timeout=5"), "-"]);
    with(&mut command);
    let output = from.output(&mut command).unwrap();
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn probes_are_told_by_their_user() {
    if !root_or_skip("probes are told by their user") {
        return;
    }
    let fixture = Fixture::new();
    for v6 in [false, true] {
        assert_eq!(reach(fixture.node(), fixture.target(v6, 8080), |_| ()), None, "captured before");
    }
    fixture.install(&Prober::User(0));
    let ProbeSources { ipv4, ipv6 } = ProbeSources::default();
    for (v6, source) in [(false, IpAddr::from(ipv4)), (true, IpAddr::from(ipv6))] {
        let seen = reach(fixture.node(), fixture.target(v6, 8080), |_| ()).expect("the probe passes");
        let seen: IpAddr = seen.trim_matches(['[', ']']).parse().unwrap();
        assert_eq!(seen.to_canonical(), source);
        assert_eq!(reach(fixture.node(), fixture.target(v6, 9090), |_| ()), None, "no probe of that port");
        let stranger = |command: &mut Command| {
            command.uid(NOBODY);
        };
        assert_eq!(reach(fixture.node(), fixture.target(v6, 8080), stranger), None, "another user");
        let other = fixture.lab.pod("other");
        assert_eq!(reach(other, fixture.target(v6, 8080), |_| ()), None, "another pod's root");
    }
    // Everything is replaced: the port is no target any more.
    fixture.probes.install(&fixture.node().netns, &Prober::User(0), ProbeSources::default(), &[]).unwrap();
    assert_eq!(reach(fixture.node(), fixture.target(false, 8080), |_| ()), None);
    fixture.end();
}

#[test]
fn probes_are_told_by_their_control_group() {
    if !root_or_skip("probes are told by their control group") {
        return;
    }
    // nft looks for groups in one place; on a thread with mounts of its own that can be had on any machine.
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&Path> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("none"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none).unwrap();
        let group = format!("culvert-test-{}/kubelet.service", std::process::id());
        let directory = Path::new("/sys/fs/cgroup").join(&group);
        fs::create_dir_all(&directory).unwrap();
        let fixture = Fixture::new();
        fixture.install(&Prober::Cgroup(group));
        let procs = directory.join("cgroup.procs");
        for v6 in [false, true] {
            let enter = procs.clone();
            let in_group = |command: &mut Command| {
                // The shell goes into the group and becomes the program.
                let line = format!("echo $$ > {} && exec \"$@\"", enter.display());
                let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
                let mut shell = Command::new("sh");
                shell.args(["-c", &line, "sh", "socat"]).args(arguments);
                *command = shell;
            };
            assert!(reach(fixture.node(), fixture.target(v6, 8080), in_group).is_some(), "the kubelet's");
            assert_eq!(reach(fixture.node(), fixture.target(v6, 8080), |_| ()), None, "another of root's");
        }
        fixture.end();
        let missing = Prober::Cgroup("culvert-test-none/x".to_owned());
        let lab = Lab::builder().node("a", &[]).build().unwrap();
        let probes = NodeProbes::find(&Tools::default()).unwrap();
        let error = probes.install(&lab.node("a").host.netns, &missing, ProbeSources::default(), &[]);
        assert!(error.unwrap_err().to_string().contains("No such file"), "a group that is not there");
        fs::remove_dir(&directory).unwrap();
        fs::remove_dir(directory.parent().unwrap()).unwrap();
    });
    thread.join().unwrap();
}
