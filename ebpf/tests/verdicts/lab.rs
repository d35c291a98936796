//! Two pods of a node that may be ends of connections, and others.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;

use ebpf::layout::{self, PortSets, Settings};
use ebpf::verdicts::{self, Carried, Offer, Pair, Qualified, Side, Tally, Verdicts};
use ebpf::{Contents, Pins, Pod};
use harness::netns::{Host, Lab, root_or_skip, skip_without_ebpf};
use net::Netns;
use nix::sys::socket::{getsockopt, sockopt};

pub const PORT: u16 = 8080;
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// Longer than the kernel takes for anything here, and than it waits before it sends again.
pub const WAIT: Duration = Duration::from_secs(2);
pub const LEASE: Duration = Duration::from_secs(600);

/// Two nodes: `client`, `server` and `evil` on one, `far` on the other. The first two are captured and qualify.
pub struct Mesh {
    pub lab: Lab,
    pub pins: Pins,
    pub verdicts: Verdicts,
    pub client: Qualified,
    pub server: Qualified,
}

pub fn pins(test: &str, lab: &Lab) -> Option<Pins> {
    match Pins::open(ebpf::bpf_file_system()) {
        Ok(pins) => {
            let pins = pins.of_node(&lab.node("a").host.netns);
            // What a node left whose namespace had the same number.
            ebpf::verdicts::remove(&pins).unwrap();
            Some(pins)
        }
        Err(error) => {
            skip_without_ebpf(test, &error);
            None
        }
    }
}

pub fn lab(test: &str) -> Option<Lab> {
    let pods = ["client", "server", "evil"];
    root_or_skip(test).then(|| Lab::builder().node("a", &pods).node("b", &["far"]).build().unwrap())
}

/// Captures a pod, whose ztunnel isn't there: what is captured is refused.
pub fn capture(pins: &Pins, host: &Host) {
    // As capture has it: sockets and resets have the marks of what they answer.
    for name in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
        net::sysctl::write(&host.netns, name, "1").unwrap();
    }
    let contents = contents(host);
    Pod::install(pins, &host.netns, &contents).unwrap();
    assert!(!Pod::install(pins, &host.netns, &contents).unwrap(), "it is as it should be");
}

pub fn contents(host: &Host) -> Contents {
    let settings =
        Settings { flags: layout::CAPTURING, outbound: 15001, plaintext: 15006, ..Settings::default() };
    Contents {
        settings,
        ports: PortSets::empty(),
        excluded: Vec::new(),
        included: Vec::new(),
        interfaces: BTreeMap::from([(interface(host), 0)]),
        own: BTreeSet::from([host.ipv4.into(), host.ipv6.into()]),
        refused: BTreeSet::new(),
    }
}

pub fn interface(host: &Host) -> u32 {
    let shown = host.shell("ip -o link show eth0").unwrap();
    shown.split(':').next().unwrap().trim().parse().unwrap()
}

pub fn service(v6: bool) -> SocketAddr {
    if v6 { "[fd96::9]:80" } else { "10.96.0.9:80" }.parse().unwrap()
}

pub fn generation(number: u64) -> NonZeroU64 {
    NonZeroU64::new(number).unwrap()
}

impl Mesh {
    pub fn new(test: &str) -> Option<Self> {
        let lab = lab(test)?;
        let pins = pins(test, &lab)?;
        let verdicts = Verdicts::attach(&pins, Path::new(CGROUPS)).unwrap();
        for name in ["client", "server"] {
            capture(&pins, lab.pod(name));
        }
        let node = &lab.node("a").host.netns;
        let client = verdicts.qualify(node, &lab.pod("client").netns).unwrap();
        let server = verdicts.qualify(node, &lab.pod("server").netns).unwrap();
        Some(Self { lab, pins, verdicts, client, server })
    }

    pub fn pair(&self, v6: bool) -> Pair {
        let source = self.lab.pod("client").ip(v6);
        Pair { source, destination: (self.lab.pod("server").ip(v6), PORT).into() }
    }

    pub fn allow(&self, v6: bool, number: u64) {
        self.verdicts
            .allow(&self.client, &self.server, self.pair(v6), generation(number), 7000 + u64::from(v6))
            .unwrap();
    }

    /// Lets the client connect to the server, by the service's address too.
    pub fn open(&self, v6: bool) {
        let pair = self.pair(v6);
        let offer = Offer { source: pair.source, endpoints: vec![(pair.destination, 1)], bind: false };
        self.allow(v6, 1);
        for dialled in [service(v6), pair.destination] {
            self.verdicts.offer(&self.client, dialled, &offer).unwrap();
        }
        assert!(self.verdicts.renew(LEASE).unwrap());
    }

    pub fn listen(&self, v6: bool) -> TcpListener {
        listen(&self.lab.pod("server").netns, self.pair(v6).destination)
    }

    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        dial(&self.lab.pod("client").netns, to)
    }

    pub fn tally(&self, wanted: Tally) -> u64 {
        self.verdicts.tallies().unwrap().into_iter().find(|(tally, _)| *tally == wanted).unwrap().1
    }

    pub fn unproven(&self, pod: &str) -> u64 {
        let pod = Pod::find(&self.pins, &self.lab.pod(pod).netns).unwrap();
        pod.counters().unwrap()[layout::COUNT_UNPROVEN as usize]
    }

    /// Ends of connections that are over, once there are so many.
    pub fn closed(&self, count: usize) -> Vec<Carried> {
        let mut closed = Vec::new();
        for _ in 0..100 {
            closed.extend(self.verdicts.closed(100).unwrap());
            if closed.len() >= count {
                break;
            }
            std::thread::sleep(WAIT / 100);
        }
        assert_eq!(closed.len(), count, "{closed:?}");
        closed.sort_by_key(|end| end.side == Side::Destination);
        closed
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let _ = verdicts::remove(&self.pins);
        for pod in ["client", "server", "evil"] {
            let _ = ebpf::remove(&self.pins, &self.lab.pod(pod).netns);
        }
    }
}

pub fn listen(netns: &Netns, at: SocketAddr) -> TcpListener {
    let listener = netns.run(|| TcpListener::bind(at)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

pub fn dial(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    let stream = netns.run(|| TcpStream::connect_timeout(&to, WAIT)).unwrap()?;
    stream.set_read_timeout(Some(WAIT)).unwrap();
    Ok(stream)
}

/// What was accepted, as soon as there is something.
pub fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    for _ in 0..100 {
        if let Ok((stream, peer)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(WAIT)).unwrap();
            return Some((stream, peer));
        }
        std::thread::sleep(WAIT / 200);
    }
    None
}

pub fn mark(stream: &TcpStream) -> u32 {
    getsockopt(stream, sockopt::Mark).unwrap() & layout::MARK_MASK
}

/// Whether what one end sends gets to the other.
pub fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    let mut byte = [0];
    from.write_all(&[1]).is_ok() && to.read_exact(&mut byte).is_ok()
}
