//! A pod's programs from installation to removal: pinned, replaced in place, found again; and marks on live connections.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test, which waits for the kernel alone"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapInfo};
use aya::programs::links::{FdLink, PinnedLink};
use ebpf::layout::{self, PortSets, Settings};
use ebpf::{Contents, Pins, Pod};
use harness::netns::{Lab, root_or_skip, skip_without_ebpf};

fn pins(test: &str) -> Option<Pins> {
    if !root_or_skip(test) {
        return None;
    }
    match Pins::open(ebpf::bpf_file_system()) {
        Ok(pins) => Some(pins),
        Err(error) => {
            skip_without_ebpf(test, &error);
            None
        }
    }
}

/// The numbers of a link and of its program.
fn numbers(link: &Path) -> (u32, u32) {
    let info = FdLink::from(PinnedLink::from_pin(link).unwrap()).info().unwrap();
    (info.id(), info.program_id())
}

#[test]
fn programs_are_replaced_in_place() {
    let Some(pins) = pins("programs are replaced in place") else { return };
    let lab = Lab::builder().node("a", &["web"]).build().unwrap();
    let netns = &lab.pod("web").netns;
    let mut contents = Contents {
        settings: Settings { flags: layout::CAPTURING, outbound: 15001, ..Settings::default() },
        ports: PortSets::empty(),
        excluded: vec!["10.9.0.0/16".parse().unwrap(), "fd09::/32".parse().unwrap()],
        included: Vec::new(),
        interfaces: BTreeMap::from([(interface(&lab), 0)]),
        own: BTreeSet::from([lab.pod("web").ipv4.into()]),
        refused: BTreeSet::new(),
    };
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    assert!(!Pod::install(&pins, netns, &contents).unwrap(), "nothing changed");
    let directory = pins.of(netns);
    let links = || {
        let entries = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
        let links = entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("link-"));
        links.map(|path| (path.clone(), numbers(&path))).collect::<BTreeMap<_, _>>()
    };
    let first = links();
    assert_eq!(first.len(), 4, "{first:?}");

    // Other lists are written, and no program is touched.
    contents.excluded.pop();
    contents.settings.flags |= layout::ONLY_OUTBOUND_RANGES;
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    assert_eq!(links(), first);

    // As if others had written it: the same links, other programs, the same maps.
    let map = Map::from_map_data(MapData::from_pin(directory.join("settings")).unwrap()).unwrap();
    let mut settings: HashMap<_, u32, Settings> = HashMap::try_from(map).unwrap();
    let current = settings.get(&0, 0).unwrap();
    settings.insert(0, Settings { build: [7; 8], ..current }, 0).unwrap();
    let pod = Pod::find(&pins, netns).unwrap();
    assert_eq!(pod.drift(netns, &contents).unwrap(), ["these programs; others are there"]);
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    for (path, (link, program)) in links() {
        assert_eq!(link, first[&path].0, "{}", path.display());
        assert_ne!(program, first[&path].1, "{}", path.display());
    }
    assert!(pod.drift(netns, &contents).unwrap().is_empty());
    assert!(ebpf::remove(&pins, netns).unwrap());
    assert!(!ebpf::remove(&pins, netns).unwrap());
}

/// As older programs leave it that declared a map otherwise.
fn of_another_size(maps: &Path) {
    fs::remove_file(maps.join("settings")).unwrap();
    MapData::from_pin(maps.join("own")).unwrap().pin(maps.join("settings")).unwrap();
}

#[test]
fn maps_of_another_size_are_replaced() {
    let Some(pins) = pins("maps of another size are replaced") else { return };
    let lab = Lab::builder().node("a", &["web"]).build().unwrap();
    let netns = &lab.pod("web").netns;
    let contents = Contents {
        settings: Settings { flags: layout::CAPTURING, outbound: 15001, ..Settings::default() },
        ports: PortSets::empty(),
        excluded: vec!["::/0".parse().unwrap()],
        included: vec!["10.9.0.0/16".parse().unwrap()],
        interfaces: BTreeMap::from([(interface(&lab), 0)]),
        own: BTreeSet::from([lab.pod("web").ipv4.into()]),
        refused: BTreeSet::new(),
    };
    ebpf::remember(&pins, netns, 3).unwrap();
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    let directory = pins.of(netns);
    let link = directory.join("link-sockets");
    let mut before = numbers(&link);
    let mut maps = directory.clone();
    for generation in 1..=2 {
        of_another_size(&maps);
        let pod = Pod::find(&pins, netns).unwrap();
        assert_eq!(pod.drift(netns, &contents).unwrap(), ["the maps of these programs; others are there"]);
        assert!(Pod::install(&pins, netns, &contents).unwrap());
        assert!(!Pod::install(&pins, netns, &contents).unwrap(), "nothing changed");
        let after = numbers(&link);
        assert_eq!(after.0, before.0, "the same link");
        assert_ne!(after.1, before.1, "another program");
        maps = directory.join(format!("maps-{generation}"));
        assert!(maps.join("settings").exists());
        // Four links, the note, and one generation of maps.
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 6);
        assert!(Pod::find(&pins, netns).unwrap().drift(netns, &contents).unwrap().is_empty());
        before = after;
    }
    of_another_size(&maps);
    assert!(ebpf::remove(&pins, netns).unwrap());
    assert_eq!(ebpf::remembered(&pins, netns), 3);
    ebpf::forget(&pins, netns).unwrap();
}

/// Most pods have a device and two addresses: the kernel keeps memory for each entry that there may be.
#[test]
fn lists_of_a_pod_have_room_for_what_is_in_them() {
    let Some(pins) = pins("lists of a pod have room for what is in them") else { return };
    let lab = Lab::builder().node("a", &["web"]).build().unwrap();
    let netns = &lab.pod("web").netns;
    let mut contents = Contents {
        settings: Settings { flags: layout::CAPTURING, outbound: 15001, ..Settings::default() },
        ports: PortSets::empty(),
        excluded: Vec::new(),
        included: Vec::new(),
        interfaces: BTreeMap::from([(interface(&lab), 0)]),
        own: BTreeSet::from([lab.pod("web").ipv4.into()]),
        refused: BTreeSet::new(),
    };
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    let directory = pins.of(netns);
    let room = |maps: &Path| {
        ["interfaces", "own", "refused"].map(|map| MapInfo::from_pin(maps.join(map)).unwrap().max_entries())
    };
    assert_eq!(room(&directory), [64; 3]);
    // As many of each processor, since each has its own: the kernel has rounded nothing.
    let delivered = MapInfo::from_pin(directory.join("delivered")).unwrap();
    let processors = u32::try_from(aya::util::nr_cpus().unwrap()).unwrap();
    assert_eq!(delivered.max_entries(), processors * (1024 / processors).clamp(8, 64));
    assert!(delivered.max_entries() <= 1024 || processors > 128);
    assert_eq!(delivered.map_flags() & 2, 2, "BPF_F_NO_COMMON_LRU");
    let link = numbers(&directory.join("link-sockets")).0;

    let peer = |port: u16| -> (SocketAddr, SocketAddr) {
        (SocketAddr::from((lab.pod("web").ipv4, 8080)), SocketAddr::from(([10, 9, 0, 1], port)))
    };
    contents.refused = (1..=64).map(peer).collect();
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    assert_eq!(room(&directory), [64; 3], "they have room for these");
    contents.refused = (1..=300).map(peer).collect();
    contents.own.extend((0..=255).map(|n| IpAddr::from([10, 8, 0, n])));
    let pod = Pod::find(&pins, netns).unwrap();
    assert_eq!(pod.drift(netns, &contents).unwrap(), ["the maps of these programs; others are there"]);
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    let newer = directory.join("maps-1");
    assert_eq!(room(&newer), [64, 512, 512]);
    assert_eq!(numbers(&directory.join("link-sockets")).0, link, "the same link");
    assert!(Pod::find(&pins, netns).unwrap().drift(netns, &contents).unwrap().is_empty());

    // Larger ones stay: each change of them loads the programs again.
    contents.refused.clear();
    contents.own.retain(|ip| *ip == lab.pod("web").ipv4);
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    assert_eq!(room(&newer), [64, 512, 512]);
    // Past what there may be at most, it says so.
    contents.refused = (1..=u16::try_from(layout::ENTRIES_LIMIT).unwrap() + 1).map(peer).collect();
    assert!(Pod::install(&pins, netns, &contents).unwrap_err().is_full());
    assert!(ebpf::remove(&pins, netns).unwrap());
}

/// Tells others to end, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Who connects all the while is refused or not heard, and never gets to the application.
#[test]
fn capture_stays_in_force_while_maps_are_replaced() {
    let Some(pins) = pins("capture stays in force while maps are replaced") else { return };
    let lab = Lab::builder().node("a", &["web", "client"]).build().unwrap();
    let netns = &lab.pod("web").netns;
    let to = SocketAddr::from((lab.pod("web").ipv4, 8080));
    let application = netns.run(|| TcpListener::bind(to)).unwrap().unwrap();
    application.set_nonblocking(true).unwrap();
    let limit = Duration::from_millis(100);
    let client = &lab.pod("client").netns;
    client.run(|| TcpStream::connect_timeout(&to, 50 * limit)).unwrap().unwrap();
    application.accept().unwrap();

    let contents = Contents {
        settings: Settings { flags: layout::CAPTURING, plaintext: 15006, ..Settings::default() },
        ports: PortSets::empty(),
        // Many, so that writing them takes a while.
        excluded: (0..1000_u16).map(|n| format!("10.9.{}.{}/32", n >> 8, n & 255).parse().unwrap()).collect(),
        included: Vec::new(),
        interfaces: BTreeMap::from([(interface(&lab), 0)]),
        own: BTreeSet::from([lab.pod("web").ipv4.into()]),
        refused: BTreeSet::new(),
    };
    // As capture has it: resets leave.
    net::sysctl::write(netns, "ipv4/fwmark_reflect", "1").unwrap();
    assert!(Pod::install(&pins, netns, &contents).unwrap());
    let (is_over, attempts) = (AtomicBool::new(false), AtomicUsize::new(0));
    let connect = || {
        while !is_over.load(Ordering::Relaxed) {
            let outcome = TcpStream::connect_timeout(&to, limit);
            attempts.fetch_add(1, Ordering::Relaxed);
            assert!(outcome.is_err(), "connected to the application past capture");
        }
    };
    std::thread::scope(|scope| {
        let _end = End(&is_over);
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| client.run(connect).unwrap())).collect();
        for generation in 0..4 {
            let directory = pins.of(netns);
            of_another_size(&match generation {
                0 => directory,
                newest => directory.join(format!("maps-{newest}")),
            });
            let before = attempts.load(Ordering::Relaxed);
            assert!(Pod::install(&pins, netns, &contents).unwrap());
            let is_idle = || {
                attempts.load(Ordering::Relaxed) == before
                    && !clients.iter().any(std::thread::ScopedJoinHandle::is_finished)
            };
            while is_idle() {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(application.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(ebpf::remove(&pins, netns).unwrap());
}

fn interface(lab: &Lab) -> u32 {
    let shown = lab.pod("web").shell("ip -o link show eth0").unwrap();
    shown.split(':').next().unwrap().trim().parse().unwrap()
}

#[test]
fn live_connections_are_marked() {
    if !root_or_skip("live connections are marked") {
        return;
    }
    let lab = Lab::builder().node("a", &["web"]).build().unwrap();
    let netns = &lab.pod("web").netns;
    if let Err(error) = ebpf::mark(netns, &[]) {
        skip_without_ebpf("live connections are marked", &error);
        return;
    }
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (_listener, one, other) = netns
            .run(|| {
                let listener = TcpListener::bind(address).unwrap();
                let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (one, other) = (connect(), connect());
                (listener, one, other)
            })
            .unwrap();
        let ends = |stream: &TcpStream| -> (SocketAddr, SocketAddr) {
            (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
        };
        let mark = |stream: &TcpStream| {
            nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::Mark).unwrap()
        };
        nix::sys::socket::setsockopt(&one, nix::sys::socket::sockopt::Mark, &0x7123).unwrap();
        let (local, peer) = ends(&one);
        ebpf::mark(netns, &[(local, peer, layout::MARK_DIRECT)]).unwrap();
        assert_eq!((mark(&one), mark(&other)), (0x7000 | layout::MARK_DIRECT, 0), "{address}");
        // The list is another one each time.
        let (local, peer) = ends(&other);
        nix::sys::socket::setsockopt(&one, nix::sys::socket::sockopt::Mark, &0).unwrap();
        ebpf::mark(netns, &[(local, peer, layout::MARK_REPLY)]).unwrap();
        assert_eq!((mark(&one), mark(&other)), (0, layout::MARK_REPLY), "{address}");
    }
}

#[test]
fn what_was_noted_is_of_one_namespace() {
    let Some(pins) = pins("what was noted is of one namespace") else { return };
    let netns = net::Netns::new_empty().unwrap();
    let directory = pins.of(&netns);
    // Of one that had the same number before; the machine's own has this cookie.
    fs::create_dir_all(directory.join("before-1-5")).unwrap();
    assert_eq!(ebpf::remembered(&pins, &netns), 0);
    for bits in [2, 4] {
        ebpf::remember(&pins, &netns, bits).unwrap();
        assert_eq!(ebpf::remembered(&pins, &netns), 2);
    }
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    // It stays until what it is for was done.
    assert!(!ebpf::remove(&pins, &netns).unwrap());
    assert_eq!(ebpf::remembered(&pins, &netns), 2);
    ebpf::forget(&pins, &netns).unwrap();
    assert!(!directory.exists());
}

#[test]
fn what_was_left_half_made_is_removed() {
    let Some(pins) = pins("what was left half-made is removed") else { return };
    let directory = pins.root().join(format!("test-half-made-{}", std::process::id()));
    fs::create_dir_all(directory.join("before-1-5")).unwrap();
    Pins::open(ebpf::bpf_file_system()).unwrap();
    assert!(directory.exists(), "somebody may be at it");
    let hour = std::time::Duration::from_secs(3600);
    let then = std::time::SystemTime::now() - hour;
    fs::File::open(&directory).unwrap().set_modified(then).unwrap();
    Pins::open(ebpf::bpf_file_system()).unwrap();
    assert!(!directory.exists());
}
