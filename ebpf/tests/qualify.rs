//! Which pods can do without a proxy, and that those which can't are captured all the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use aya::EbpfLoader;
use aya::maps::MapData;
use aya::programs::SchedClassifier;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use ebpf::layout::{self, PortSets, Settings};
use ebpf::verdicts::{self, Qualified, Verdicts, Why};
use ebpf::{Contents, Pins, Pod};
use harness::netns::{Lab, root_or_skip, skip_without_ebpf};

static CAPTURE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture.bpf.o"));

/// A node with one pod, whose end there is `p0`.
struct Node {
    lab: Lab,
    pins: Pins,
}

impl Node {
    fn new(test: &str) -> Option<Self> {
        if !root_or_skip(test) {
            return None;
        }
        let lab = Lab::builder().node("a", &["web"]).build().unwrap();
        match Pins::open(ebpf::bpf_file_system()) {
            Ok(pins) => Some(Self { pins: pins.of_node(&lab.node("a").host.netns), lab }),
            Err(error) => {
                skip_without_ebpf(test, &error);
                None
            }
        }
    }

    fn verdicts(&self) -> Verdicts {
        Verdicts::attach(&self.pins, Path::new("/sys/fs/cgroup")).unwrap()
    }

    /// Whether anything was changed.
    fn capture(&self) -> bool {
        let pod = self.lab.pod("web");
        let shown = pod.shell("ip -o link show eth0").unwrap();
        let interface = shown.split(':').next().unwrap().trim().parse().unwrap();
        let contents = Contents {
            settings: Settings { flags: layout::CAPTURING, outbound: 15001, ..Settings::default() },
            ports: PortSets::empty(),
            excluded: Vec::new(),
            included: Vec::new(),
            interfaces: BTreeMap::from([(interface, 0)]),
            own: BTreeSet::from([pod.ipv4.into()]),
            refused: BTreeSet::new(),
        };
        Pod::install(&self.pins, &pod.netns, &contents).unwrap()
    }

    fn ask(&self, verdicts: &Verdicts) -> Result<Qualified, Why> {
        verdicts.qualify(&self.lab.node("a").host.netns, &self.lab.pod("web").netns)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = verdicts::remove(&self.pins);
        let _ = ebpf::remove(&self.pins, &self.lab.pod("web").netns);
    }
}

/// What goes straight into a pod's device passes by them.
#[test]
fn what_is_on_the_way_out_of_the_nodes_end_is_not_passed_by() {
    let Some(node) = Node::new("what is on the way out of the node's end is not passed by") else { return };
    let verdicts = node.verdicts();
    assert!(node.capture());
    node.ask(&verdicts).unwrap();
    let host = &node.lab.node("a").host;
    for (place, kind, more) in [
        ("root", "tbf", "rate 1gbit burst 64k latency 50ms"),
        ("root", "pfifo", ""),
        ("clsact", "clsact", ""),
    ] {
        let kind_of = if place == "root" { kind } else { "" };
        host.shell(&format!("tc qdisc add dev p0 {place} {kind_of} {more}")).unwrap();
        let why = node.ask(&verdicts).unwrap_err();
        match &why {
            Why::Queue(found) => assert_eq!((found.as_str(), place), (kind, "root"), "{why}"),
            Why::OthersPrograms => assert_eq!(place, "clsact", "{why}"),
            _ => panic!("{why}"),
        }
        host.shell(&format!("tc qdisc del dev p0 {place}")).unwrap();
        node.ask(&verdicts).unwrap();
    }
    let directory = node.pins.of(&node.lab.pod("web").netns);
    let mut loaded = EbpfLoader::new().default_map_pin_directory(directory).load(CAPTURE).unwrap();
    let program: &mut SchedClassifier = loaded.program_mut("leaving").unwrap().try_into().unwrap();
    program.load().unwrap();
    let options = TcAttachOptions::TcxOrder(aya::programs::LinkOrder::default());
    let attached = host.netns.run(|| program.attach_with_options("p0", TcAttachType::Egress, options));
    let attached = attached.unwrap().unwrap();
    assert!(matches!(node.ask(&verdicts), Err(Why::OthersPrograms)));
    program.detach(attached).unwrap();
    node.ask(&verdicts).unwrap();
}

/// As older programs leave it that declared the maps otherwise.
fn of_another_size(maps: &Path, other: &Path) {
    for name in ["verdicts", "control"] {
        fs::remove_file(maps.join(name)).unwrap();
        MapData::from_pin(other).unwrap().pin(maps.join(name)).unwrap();
    }
}

/// The directory of an older build stays until somebody has verdicts again; pods are captured without them.
#[test]
fn verdicts_of_another_build_do_not_hinder_capture() {
    let Some(node) = Node::new("verdicts of another build do not hinder capture") else { return };
    let (directory, pod) = (node.pins.verdicts(), node.pins.of(&node.lab.pod("web").netns));
    for is_captured in [false, true] {
        let verdicts = node.verdicts();
        let other = directory.join("connections");
        if is_captured {
            assert!(!node.capture());
            node.ask(&verdicts).unwrap();
            let maps = fs::read_dir(&pod).unwrap().map(|entry| entry.unwrap().path());
            let newest = maps.filter(|path| path.is_dir()).max().unwrap_or_else(|| pod.clone());
            of_another_size(&newest, &other);
        }
        of_another_size(&directory, &other);
        assert!(node.capture(), "{is_captured}");
        assert!(!node.capture(), "it is as it should be");
        assert!(matches!(node.ask(&verdicts), Err(Why::NotCaptured)));
        drop(verdicts);
        let verdicts = node.verdicts();
        assert!(node.capture());
        node.ask(&verdicts).unwrap();
    }
}
