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
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use ebpf::layout::{self, PortSets, Settings};
use ebpf::{Contents, Pins, Pod};
use harness::netns::{Lab, root_or_skip};

fn pins(test: &str) -> Option<Pins> {
    if !root_or_skip(test) {
        return None;
    }
    match Pins::open(ebpf::bpf_file_system()) {
        Ok(pins) => Some(pins),
        Err(error) => {
            let _ = writeln!(io::stderr(), "skipped: {test}: {error}");
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
        let entries = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
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
        let _ = writeln!(io::stderr(), "skipped: live connections are marked: {error}");
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
