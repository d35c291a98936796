//! Every program on single packets (`BPF_PROG_TEST_RUN`): what it decides, and what it makes of them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use aya::maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, SkLookup, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use ebpf::layout::{
    self, Address, Connection, Control, Neighbours, PairKey, PortSets, Range, Settings, VerdictEntry,
};
use harness::netns::{root_or_skip, skip_without_ebpf};
use net::Netns;

static CAPTURE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture.bpf.o"));
static VERDICTS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/verdicts.bpf.o"));

/// `TC_ACT_UNSPEC`: the next program decides.
const PASS: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
/// `struct __sk_buff`: its size, and where the mark is.
const SKB: usize = 192;
const MARK: usize = 8;

/// Programs that are attached to nothing, with maps of their own.
struct Bench {
    loaded: Ebpf,
    /// With the same verdicts.
    on_node: Ebpf,
    directory: PathBuf,
    netns: Netns,
}

impl Bench {
    /// None where the kernel can't, which is said.
    fn new(test: &str) -> Option<Self> {
        if !root_or_skip(test) {
            return None;
        }
        let pins = match ebpf::Pins::open(ebpf::bpf_file_system()) {
            Ok(pins) => pins,
            Err(error) => {
                skip_without_ebpf(test, &error);
                return None;
            }
        };
        let directory = pins.root().join(format!("test-{}-{}", std::process::id(), test.replace(' ', "-")));
        std::fs::create_dir_all(&directory).unwrap();
        let loaded = EbpfLoader::new().default_map_pin_directory(&directory).load(CAPTURE).unwrap();
        let on_node = EbpfLoader::new().default_map_pin_directory(&directory).load(VERDICTS).unwrap();
        let mut bench = Self { loaded, on_node, directory, netns: Netns::new_empty().unwrap() };
        let program: &mut SchedClassifier =
            bench.on_node.program_mut("from_pod").unwrap().try_into().unwrap();
        program.load().unwrap();
        bench.set(layout::CAPTURING | layout::WITH_DNS, |_| {});
        let mut own: HashMap<_, Address, u32> =
            HashMap::try_from(bench.loaded.map_mut("own").unwrap()).unwrap();
        for ip in ["10.0.0.1", "fd00::1"] {
            own.insert(Address::new(ip.parse().unwrap()), 1, 0).unwrap();
        }
        for name in ["arriving", "leaving", "inside"] {
            let program: &mut SchedClassifier = bench.loaded.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        let program: &mut SkLookup = bench.loaded.program_mut("sockets").unwrap().try_into().unwrap();
        program.load().unwrap();
        Some(bench)
    }

    fn set(&mut self, flags: u32, ports: impl FnOnce(&mut PortSets)) {
        self.set_until(flags, 0, ports);
    }

    /// With the end of a change, by the kernel's clock.
    fn set_until(&mut self, flags: u32, changing_until: u64, ports: impl FnOnce(&mut PortSets)) {
        let mut sets = PortSets::empty();
        ports(&mut sets);
        let mut map: HashMap<_, u32, PortSets> =
            HashMap::try_from(self.loaded.map_mut("ports").unwrap()).unwrap();
        map.insert(0, *sets, 0).unwrap();
        let settings = Settings {
            flags,
            outbound: 15001,
            plaintext: 15006,
            hbone: 15008,
            dns: 15053,
            changing_until,
            ..Settings::default()
        };
        let mut map: HashMap<_, u32, Settings> =
            HashMap::try_from(self.loaded.map_mut("settings").unwrap()).unwrap();
        map.insert(0, settings, 0).unwrap();
    }

    /// The verdict, the mark afterwards, and the packet afterwards.
    fn run(&self, name: &str, mark: u32, packet: &[u8]) -> (u32, u32, Vec<u8>) {
        let loaded = if name == "from_pod" { &self.on_node } else { &self.loaded };
        let program: &SchedClassifier = loaded.program(name).unwrap().try_into().unwrap();
        let (mut context, mut after) = ([0; SKB], [0; SKB]);
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        let mut out = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let result = self.netns.run(|| program.test_run(options)).unwrap().unwrap();
        out.truncate(result.data_size_out.try_into().unwrap());
        (result.return_value, u32::from_ne_bytes(after[MARK..MARK + 4].try_into().unwrap()), out)
    }

    /// What the choice of a socket says of TCP from outside: the kernel takes no interface here.
    fn choose(&self, from: &str, to: &str) -> u32 {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        // `struct bpf_sk_lookup`: cookie, family, protocol, remote address of either family, its port and two bytes, local
        // address of either family, port, interface.
        let mut context = [0_u8; 72];
        let family = if to.is_ipv4() { 2_u32 } else { 10 };
        context[8..12].copy_from_slice(&family.to_ne_bytes());
        context[12..16].copy_from_slice(&6_u32.to_ne_bytes());
        let mut put = |v4: usize, v6: usize, ip: IpAddr| match ip {
            IpAddr::V4(ip) => context[v4..v4 + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => context[v6..v6 + 16].copy_from_slice(&ip.octets()),
        };
        put(16, 20, from.ip());
        put(40, 44, to.ip());
        context[36..38].copy_from_slice(&from.port().to_be_bytes());
        context[60..64].copy_from_slice(&u32::from(to.port()).to_ne_bytes());
        let program: &SkLookup = self.loaded.program("sockets").unwrap().try_into().unwrap();
        let fd = program.fd().unwrap().as_fd().as_raw_fd();
        self.netns.run(|| run_context(fd, &mut context)).unwrap().unwrap()
    }

    fn counted(&self, counter: u32) -> u64 {
        let map: PerCpuArray<_, u64> = PerCpuArray::try_from(self.loaded.map("counters").unwrap()).unwrap();
        map.get(&counter, 0).unwrap().iter().sum()
    }

    /// What holds for all verdicts: the oldest generation in force, and whether there is a lease.
    fn lease(&mut self, oldest: u64, leased: bool) {
        let mut map: Array<_, Control> = Array::try_from(self.on_node.map_mut("control").unwrap()).unwrap();
        map.set(0, Control { until: if leased { u64::MAX } else { 1 }, oldest, owner: 1 }, 0).unwrap();
    }

    /// A verdict for a client and a server; the device that packets come from here is 1, and the choice of sockets knows none.
    fn allow(&mut self, client: &str, server: &str, verdict: VerdictEntry) {
        let (client, server): (SocketAddr, SocketAddr) = (client.parse().unwrap(), server.parse().unwrap());
        let source = Address::new(client.ip()).octets;
        let destination = Address::new(server.ip()).octets;
        let key = PairKey { source, destination, port: server.port(), unused: 0 };
        let mut map: HashMap<_, PairKey, VerdictEntry> =
            HashMap::try_from(self.on_node.map_mut("verdicts").unwrap()).unwrap();
        map.insert(key, verdict, 0).unwrap();
        let mut map: HashMap<_, Neighbours, u32> =
            HashMap::try_from(self.on_node.map_mut("neighbours").unwrap()).unwrap();
        map.insert(Neighbours { source, destination }, 1, 0).unwrap();
    }

    fn tallied(&self, tally: u32) -> u64 {
        let map: PerCpuArray<_, u64> = PerCpuArray::try_from(self.on_node.map("tallies").unwrap()).unwrap();
        map.get(&tally, 0).unwrap().iter().sum()
    }

    fn delivered(&self) -> Vec<Connection> {
        let map: HashMap<&MapData, Connection, u32> =
            HashMap::try_from(self.loaded.map("delivered").unwrap()).unwrap();
        map.keys().flatten().collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// `BPF_PROG_TEST_RUN` of a program that has a context and no packet, which aya has not.
#[allow(unsafe_code, reason = "no safe wrapper of bpf(2) exists")]
fn run_context(fd: i32, context: &mut [u8]) -> io::Result<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        program: u32,
        returned: u32,
        sizes: [u32; 2],
        data: [u64; 2],
        repeat: u32,
        duration: u32,
        context_size: u32,
        context_size_out: u32,
        context: u64,
        context_out: u64,
        flags: [u32; 4],
    }
    let mut attributes = Attributes {
        program: fd.cast_unsigned(),
        context_size: u32::try_from(context.len()).unwrap(),
        context: context.as_mut_ptr().expose_provenance() as u64,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads and writes the union, whose size is said, and reads the context,
    // whose provenance is exposed above and which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 10, &raw mut attributes, size_of::<Attributes>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes.returned) }
}

/// What is between the addresses and TCP.
#[derive(Clone, Copy, Default)]
struct Extra<'a> {
    /// IPv4: options, in fours. IPv6: kinds and bytes of extension headers.
    options: &'a [u8],
    extensions: &'a [(u8, &'a [u8])],
}

const SYN: u8 = 2;
const ACK: u8 = 16;

fn packet(protocol: u8, from: &str, to: &str, extra: Extra<'_>, payload: &[u8]) -> Vec<u8> {
    let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let mut transport = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    transport.extend(payload);
    let mut bytes = [[2; 6], [4; 6]].concat();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = 20 + extra.options.len();
            bytes.extend([8, 0, 0x40 | u8::try_from(header / 4).unwrap(), 0]);
            bytes.extend(u16::try_from(header + transport.len()).unwrap().to_be_bytes());
            bytes.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
            bytes.extend([from.octets(), to.octets()].concat());
            bytes.extend(extra.options);
            let sum = !ones(&bytes[14..]);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut headers = Vec::new();
            let mut next: Vec<u8> = extra.extensions.iter().map(|(kind, _)| *kind).collect();
            next.push(protocol);
            for ((_, header), next) in extra.extensions.iter().zip(&next[1..]) {
                headers.push(*next);
                headers.extend(*header);
            }
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(u16::try_from(headers.len() + transport.len()).unwrap().to_be_bytes());
            bytes.extend([next[0], 64]);
            bytes.extend([from.octets(), to.octets()].concat());
            bytes.extend(headers);
        }
        _ => panic!("two families"),
    }
    bytes.extend(transport);
    bytes
}

fn tcp(from: &str, to: &str, flags: u8, extra: Extra<'_>) -> Vec<u8> {
    // Sequence numbers, length of the header and flags, window, checksum, urgent pointer, and options.
    let mut rest = [7_u32.to_be_bytes(), 9_u32.to_be_bytes()].concat();
    rest.extend([0x60, flags, 1, 0, 0, 0, 0, 0, 2, 4, 5, 180]);
    packet(6, from, to, extra, &rest)
}

/// The sum of 16-bit words in ones' complement.
fn ones(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// Where the network's header ends in a packet of ours without options.
fn transport(packet: &[u8]) -> usize {
    if packet[12] == 8 { 14 + usize::from(packet[14] & 15) * 4 } else { 54 }
}

/// The TCP checksum is right, and so is IPv4's.
fn check_sums(packet: &[u8]) {
    let at = transport(packet);
    let addresses = if packet[12] == 8 { &packet[26..34] } else { &packet[22..54] };
    let length = u16::try_from(packet.len() - at).unwrap();
    let pseudo = [addresses, &[0, 6], &length.to_be_bytes(), &packet[at..]].concat();
    assert_eq!(ones(&pseudo), 0xffff, "the checksum of TCP");
    if packet[12] == 8 {
        assert_eq!(ones(&packet[14..at]), 0xffff, "the checksum of IPv4");
    }
}

const PAIRS: [(&str, &str); 2] =
    [("10.0.0.1:4000", "198.51.100.1:80"), ("[fd00::1]:4000", "[2001:db8::1]:80")];
/// Four options that do nothing.
const NOPS: &[u8] = &[1, 1, 1, 1];
/// The rest of an extension header after the next one's kind: no more length, padding.
const PADDING: &[u8] = &[0, 1, 4, 0, 0, 0, 0];

#[test]
fn what_leaves_without_a_mark_is_refused() {
    let Some(bench) = Bench::new("what leaves without a mark is refused") else { return };
    let padded = Extra { options: NOPS, extensions: &[(0, PADDING), (60, PADDING)] };
    for extra in [Extra::default(), padded] {
        for (from, to) in PAIRS {
            let syn = tcp(from, to, SYN, extra);
            let data = tcp(from, to, ACK, extra);
            let answer = tcp(from, to, SYN | ACK, extra);
            for mark in [layout::MARK_ZTUNNEL, 0x7000 | layout::MARK_ZTUNNEL] {
                assert_eq!(bench.run("leaving", mark, &syn).0, PASS, "{mark:#x}");
            }
            // Connections from outside and those alive at enrolment go on; none begins with their mark.
            for mark in [layout::MARK_DIRECT, 0x7000 | layout::MARK_DIRECT] {
                for packet in [&data, &answer] {
                    assert_eq!(bench.run("leaving", mark, packet).0, PASS, "{mark:#x}");
                }
                let before = bench.counted(layout::COUNT_ESCAPED_OUTBOUND);
                assert_eq!(bench.run("leaving", mark, &syn).0, REDIRECT, "{mark:#x}");
                assert_eq!(bench.counted(layout::COUNT_ESCAPED_OUTBOUND), before + 1);
            }
            let before = bench.counted(layout::COUNT_ESCAPED_OUTBOUND);
            let (verdict, _, reset) = bench.run("leaving", 0, &syn);
            assert_eq!(verdict, REDIRECT, "{to}");
            assert_eq!(bench.counted(layout::COUNT_ESCAPED_OUTBOUND), before + 1);
            // From whom it was sent to, with what a reset acknowledges; the options stay.
            assert_eq!((&reset[..6], &reset[6..12]), (&[4; 6][..], &[2; 6][..]));
            let at = syn.len() - 24;
            assert_eq!(reset.len(), at + 20);
            assert_eq!(
                (&reset[at..at + 2], &reset[at + 2..at + 4]),
                (&syn[at + 2..at + 4], &syn[at..at + 2])
            );
            assert_eq!(reset[at + 4..at + 14], [0, 0, 0, 0, 0, 0, 0, 8, 0x50, 0x14]);
            if extra.extensions.is_empty() {
                check_sums(&reset);
            }
            // Of a connection that nobody knows, or an application's reply to ztunnel.
            assert_eq!(bench.run("leaving", 0, &data).0, DROP);
            assert_eq!(bench.run("leaving", layout::MARK_REPLY, &data).0, DROP);
        }
    }
}

#[test]
fn what_cannot_be_read_does_not_leave() {
    let Some(bench) = Bench::new("what cannot be read does not leave") else { return };
    let many = [(60, PADDING); 9];
    let later = Extra { extensions: &[(44, &[0, 0, 8, 0, 0, 0, 1])], ..Extra::default() };
    let (from, to) = PAIRS[1];
    let mut cut = tcp(from, to, SYN, Extra::default());
    cut.truncate(60);
    let mut piece = tcp(PAIRS[0].0, PAIRS[0].1, SYN, Extra::default());
    piece[20..22].copy_from_slice(&[0, 100]);
    let long = tcp(from, to, SYN, Extra { extensions: &many, ..Extra::default() });
    for packet in [cut, piece, long, tcp(from, to, SYN, later)] {
        assert_eq!(bench.run("leaving", 0, &packet).0, DROP);
        assert_eq!(bench.run("leaving", layout::MARK_ZTUNNEL, &packet).0, PASS);
    }
    assert_eq!(bench.counted(layout::COUNT_UNREADABLE), 4);
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6]);
    arp.resize(60, 0);
    assert_eq!(bench.run("leaving", 0, &arp).0, PASS);
}

#[test]
fn what_is_exempt_leaves() {
    let Some(mut bench) = Bench::new("what is exempt leaves") else { return };
    let (from, to) = PAIRS[0];
    let syn = tcp(from, to, SYN, Extra::default());
    bench.set(layout::CAPTURING, |ports| ports.outbound_excluded[80 >> 5] |= 1 << (80 & 31));
    assert_eq!(bench.run("leaving", 0, &syn).0, PASS);
    assert_eq!(bench.run("leaving", 0, &tcp(from, "198.51.100.1:81", SYN, Extra::default())).0, REDIRECT);
    bench.set(layout::CAPTURING | layout::ONLY_OUTBOUND_RANGES, |_| {});
    assert_eq!(bench.run("leaving", 0, &syn).0, PASS);
    bench.set(layout::CAPTURING | layout::ONLY_OUTBOUND_RANGES, |ports| {
        ports.outbound_included[80 >> 5] |= 1 << (80 & 31);
    });
    assert_eq!(bench.run("leaving", 0, &syn).0, REDIRECT);
    // What is exempt may leave with the mark of what came from outside too.
    assert_eq!(bench.run("leaving", layout::MARK_DIRECT, &syn).0, REDIRECT);
    bench.set(layout::CAPTURING, |ports| ports.outbound_excluded[80 >> 5] |= 1 << (80 & 31));
    assert_eq!(bench.run("leaving", layout::MARK_DIRECT, &syn).0, PASS);
    // A pod that leaves: all but what belongs to ztunnel's connections.
    bench.set(0, |_| {});
    assert_eq!(bench.run("leaving", layout::MARK_DIRECT, &syn).0, PASS);
    assert_eq!(bench.run("leaving", 0, &syn).0, PASS);
    assert_eq!(bench.run("leaving", layout::MARK_REPLY, &syn).0, DROP);
}

/// IPv4 is kept in its mapped form, which networks of IPv6 may cover.
#[test]
fn a_network_is_of_one_family() {
    let Some(mut bench) = Bench::new("a network is of one family") else { return };
    for (network, matches) in [
        ("::/0", [false, true]),
        ("::/64", [false, false]),
        ("::ffff:0:0/96", [false, false]),
        ("0.0.0.0/0", [true, false]),
        ("198.51.100.0/24", [true, false]),
        ("2001:db8::/32", [false, true]),
    ] {
        for (list, flags, matching, other) in [
            (layout::RANGE_EXCLUDED, 0, PASS, REDIRECT),
            (layout::RANGE_INCLUDED, layout::ONLY_OUTBOUND_RANGES, REDIRECT, PASS),
        ] {
            bench.set(layout::CAPTURING | flags, |_| {});
            let key = Range::key(list, 0, network.parse().unwrap());
            let mut ranges: LpmTrie<_, Range, u32> =
                LpmTrie::try_from(bench.loaded.map_mut("ranges").unwrap()).unwrap();
            ranges.insert(&key, 1, 0).unwrap();
            for ((from, to), matches) in PAIRS.into_iter().zip(matches) {
                let verdict = bench.run("leaving", 0, &tcp(from, to, SYN, Extra::default())).0;
                assert_eq!(verdict, if matches { matching } else { other }, "{network} {to} {list}");
            }
            let mut ranges: LpmTrie<_, Range, u32> =
                LpmTrie::try_from(bench.loaded.map_mut("ranges").unwrap()).unwrap();
            ranges.remove(&key).unwrap();
        }
    }
}

#[test]
fn queries_leave_by_the_proxy_alone() {
    let Some(bench) = Bench::new("queries leave by the proxy alone") else { return };
    let query = |to: &str| packet(17, "10.0.0.1:4000", to, Extra::default(), &[0, 12, 0, 0, 1, 2, 3, 4]);
    assert_eq!(bench.run("leaving", 0, &query("198.51.100.1:53")).0, DROP);
    assert_eq!(bench.run("leaving", layout::MARK_ZTUNNEL, &query("198.51.100.1:53")).0, PASS);
    assert_eq!(bench.run("leaving", 0, &query("198.51.100.1:54")).0, PASS);
    // The proxy's port is none of the world's.
    let stranger = packet(17, "198.51.100.1:9", "10.0.0.1:15053", Extra::default(), &[0, 8, 0, 0]);
    assert_eq!(bench.run("arriving", 0, &stranger).0, DROP);
    // An answer comes from the port that was asked, with a checksum that is right.
    let mut answer =
        packet(17, "198.51.100.1:15053", "10.0.0.1:4000", Extra::default(), &[0, 12, 0, 0, 1, 2, 3, 4]);
    let pseudo = [&answer[26..34], &[0, 17, 0, 12], &answer[34..]].concat();
    let sum = !ones(&pseudo);
    answer[40..42].copy_from_slice(&sum.to_be_bytes());
    let (verdict, _, seen) = bench.run("inside", layout::MARK_ZTUNNEL, &answer);
    assert_eq!((verdict, &seen[34..36]), (PASS, &53_u16.to_be_bytes()[..]));
    assert_eq!(ones(&[&seen[26..34], &[0, 17, 0, 12], &seen[34..]].concat()), 0xffff);
    // Nobody answers: an error of ICMP that quotes the query.
    let (verdict, _, error) = bench.run("inside", 0, &query("198.51.100.1:53"));
    assert_eq!((verdict, error.len(), error[23], error[34], error[35]), (PASS, 14 + 28 + 28, 1, 3, 3));
    assert_eq!((ones(&error[14..34]), ones(&error[34..])), (0xffff, 0xffff));
    assert_eq!(error[42 + 20..], query("198.51.100.1:53")[34..42]);
}

#[test]
fn while_a_pod_is_enrolled_queries_and_connections_leave_until_that_is_over() {
    let Some(mut bench) = Bench::new("while a pod is enrolled") else { return };
    let query = packet(17, "10.0.0.1:4000", "198.51.100.1:53", Extra::default(), &[0, 12, 0, 0, 1, 2, 3, 4]);
    let syn = tcp("10.0.0.1:4000", "198.51.100.1:80", SYN, Extra::default());
    let far = u64::MAX;
    // 1 ns after the machine's start: long over.
    for (until, verdicts) in [(0, [DROP, REDIRECT]), (far, [PASS, PASS]), (1, [DROP, REDIRECT])] {
        bench.set_until(layout::CAPTURING | layout::WITH_DNS, until, |_| {});
        assert_eq!([&query, &syn].map(|packet| bench.run("leaving", 0, packet).0), verdicts, "{until}");
    }
}

#[test]
fn what_arrives_is_marked() {
    let Some(bench) = Bench::new("what arrives is marked") else { return };
    for (to, from) in PAIRS {
        for flags in [SYN, ACK] {
            // Whatever the mark was, and the bits of others stay.
            for mark in [0, layout::MARK_ZTUNNEL, 0x7000 | layout::MARK_REPLY] {
                let (verdict, after, _) =
                    bench.run("arriving", mark, &tcp(from, to, flags, Extra::default()));
                assert_eq!((verdict, after), (PASS, mark & !layout::MARK_MASK | layout::MARK_DIRECT));
            }
        }
    }
}

#[test]
fn what_ztunnel_delivers_is_known_once() {
    let Some(bench) = Bench::new("what ztunnel delivers is known once") else { return };
    for (pod, client) in [("10.0.0.1:80", "198.51.100.1:4000"), ("[fd00::1]:80", "[2001:db8::1]:4000")] {
        // As a stranger's it is captured, and refused since nobody listens.
        assert_eq!(bench.choose(client, pod), SK_DROP);
        let (verdict, mark, _) =
            bench.run("inside", layout::MARK_ZTUNNEL, &tcp(client, pod, SYN, Extra::default()));
        assert_eq!((verdict, mark), (PASS, layout::MARK_REPLY));
        assert_eq!(bench.delivered(), [Connection::new(pod.parse().unwrap(), client.parse().unwrap())]);
        assert_eq!(bench.choose(client, pod), SK_PASS);
        assert_eq!(bench.choose(client, pod), SK_DROP);
        // The same addresses and ports from outside are the client's.
        bench.run("inside", layout::MARK_ZTUNNEL, &tcp(client, pod, SYN, Extra::default()));
        bench.run("arriving", 0, &tcp(client, pod, SYN, Extra::default()));
        assert_eq!(bench.choose(client, pod), SK_DROP);
    }
    // However many never came to the choice of a socket, the last one is known.
    for port in 10_000..10_000 + 2 * layout::DELIVERED_LIMIT {
        let client = format!("198.51.100.1:{port}");
        let syn = tcp(&client, "10.0.0.1:80", SYN, Extra::default());
        assert_eq!(bench.run("inside", layout::MARK_ZTUNNEL, &syn).0, PASS);
        if port % 100 == 0 {
            assert_eq!(bench.choose(&client, "10.0.0.1:80"), SK_PASS);
        }
    }
}

#[test]
fn without_a_ztunnel_the_pod_is_refused() {
    let Some(mut bench) = Bench::new("without a ztunnel the pod is refused") else { return };
    for (from, to) in PAIRS {
        let (verdict, _, reset) = bench.run("inside", 0, &tcp(from, to, SYN, Extra::default()));
        assert_eq!((verdict, reset.len()), (PASS, transport(&reset) + 20));
        check_sums(&reset);
        let own: SocketAddr = from.parse().unwrap();
        let own = SocketAddr::new(own.ip(), 80).to_string();
        assert_eq!(bench.choose(from, &own), SK_PASS, "to itself");
        assert_eq!(bench.choose(to, &own), SK_DROP, "from outside");
    }
    assert_eq!(bench.counted(layout::COUNT_NO_LISTENER), 2);
    // ztunnel's own ports are nobody else's, from anywhere.
    for from in ["10.0.0.1:9", "198.51.100.1:9"] {
        for port in [15001, 15006, 15008, 15053] {
            assert_eq!(bench.choose(from, &format!("10.0.0.1:{port}")), SK_DROP, "{port}");
        }
    }
    bench.set(layout::CAPTURING | layout::BYPASS_INBOUND, |_| {});
    assert_eq!(bench.choose("198.51.100.1:9", "10.0.0.1:80"), SK_PASS);
    assert_eq!(bench.choose("198.51.100.1:9", "10.0.0.9:80"), SK_DROP, "for somebody else");
    bench.set(0, |_| {});
    assert_eq!(bench.choose("198.51.100.1:9", "10.0.0.1:15006"), SK_PASS);
}

/// Of the device that packets come from here.
const HERE: VerdictEntry = VerdictEntry {
    generation: 5,
    id: 0,
    source_device: 1,
    destination_device: 1,
    inside: 0,
    unused: 0,
    destination_netns: 0,
};

/// A packet in pieces: the first and a later one, or with the extension header for it.
fn pieces(from: &str, to: &str) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    if from.starts_with('[') {
        for bytes in [[0, 0, 1, 0, 0, 0, 1], [0, 0, 9, 0, 0, 0, 1]] {
            pieces.push(tcp(from, to, SYN, Extra { extensions: &[(44, &bytes)], ..Extra::default() }));
        }
    } else {
        for offset in [[0x20, 0], [0x20, 1], [0, 1]] {
            let mut piece = tcp(from, to, SYN, Extra::default());
            piece[20..22].copy_from_slice(&offset);
            pieces.push(piece);
        }
        // A first piece that ends before the ports are all there.
        let mut piece = tcp(from, to, SYN, Extra::default());
        piece.truncate(14 + 20 + 8);
        pieces.push(piece);
    }
    pieces
}

#[test]
fn a_verdict_lets_packets_through_both_ways() {
    let Some(mut bench) = Bench::new("a verdict lets packets through both ways") else { return };
    for (client, server) in PAIRS {
        let there = tcp(client, server, SYN, Extra::default());
        let back = tcp(server, client, SYN | ACK, Extra::default());
        for packet in [&there, &back] {
            assert_eq!(bench.run("from_pod", 0x539, packet).0, PASS, "none of ours");
        }
        bench.lease(5, true);
        bench.allow(client, server, HERE);
        let (verdict, mark, after) = bench.run("from_pod", 0xabcd, &there);
        assert_eq!((verdict, mark, after), (REDIRECT, layout::MARK_GRANTED, there.clone()));
        let (verdict, mark, _) = bench.run("from_pod", 0, &back);
        assert_eq!((verdict, mark), (REDIRECT, layout::MARK_ANSWERED));
        // The other way round it is another pair, and so is another port.
        let asked =
            tcp(&server.replace(":80", ":4000"), &client.replace(":4000", ":80"), SYN, Extra::default());
        assert_eq!(bench.run("from_pod", 0, &asked).0, PASS);
        let another = tcp(client, &server.replace(":80", ":81"), SYN, Extra::default());
        assert_eq!(bench.run("from_pod", 0, &another).0, PASS);
        // The server's port has no say where the client's is the same number.
        let query = packet(17, client, server, Extra::default(), &[0, 12, 0, 0, 1, 2, 3, 4]);
        assert_eq!(bench.run("from_pod", 0, &query).0, PASS);
        for (changed, tally) in [
            (VerdictEntry { generation: 0, ..HERE }, layout::TALLY_STALE),
            (VerdictEntry { generation: 4, ..HERE }, layout::TALLY_STALE),
            (VerdictEntry { source_device: 2, destination_device: 2, ..HERE }, layout::TALLY_SPOOFED),
        ] {
            bench.allow(client, server, changed);
            let before = bench.tallied(tally);
            for packet in [&there, &back] {
                assert_eq!(bench.run("from_pod", layout::MARK_GRANTED, packet).0, DROP, "{changed:?}");
            }
            assert_eq!(bench.tallied(tally), before + 2);
        }
        // Each end from its own device alone.
        bench.allow(client, server, VerdictEntry { destination_device: 2, ..HERE });
        assert_eq!((bench.run("from_pod", 0, &there).0, bench.run("from_pod", 0, &back).0), (REDIRECT, DROP));
        bench.allow(client, server, HERE);
        bench.lease(5, false);
        assert_eq!((bench.run("from_pod", 0, &there).0, bench.run("from_pod", 0, &back).0), (DROP, DROP));
        assert_eq!(bench.run("from_pod", 0, &another).0, PASS);
    }
    assert_eq!(bench.tallied(layout::TALLY_LAPSED), 4);
}

#[test]
fn what_is_not_plain_does_not_pass_between_the_two() {
    let Some(mut bench) = Bench::new("what is not plain does not pass between the two") else { return };
    bench.lease(5, true);
    for (client, server) in PAIRS {
        let padded = Extra { options: NOPS, extensions: &[(60, PADDING)] };
        // Whichever port: a later piece has none.
        let mut odd = pieces(client, &server.replace(":80", ":81"));
        odd.push(tcp(client, server, ACK, padded));
        odd.extend(pieces(server, client));
        for packet in &odd {
            assert_eq!(bench.run("from_pod", 0, packet).0, PASS, "{packet:x?}");
            assert_eq!(bench.run("arriving", 0, packet).0, PASS, "{packet:x?}");
        }
        bench.allow(client, server, HERE);
        for packet in &odd {
            let before = (bench.tallied(layout::TALLY_UNREADABLE), bench.counted(layout::COUNT_UNPROVEN));
            assert_eq!(bench.run("from_pod", 0, packet).0, DROP, "{packet:x?}");
            for mark in [0, layout::MARK_GRANTED, layout::MARK_ANSWERED] {
                assert_eq!(bench.run("arriving", mark, packet).0, DROP, "{packet:x?}");
            }
            let after = (bench.tallied(layout::TALLY_UNREADABLE), bench.counted(layout::COUNT_UNPROVEN));
            assert_eq!(after, (before.0 + 1, before.1 + 3));
        }
    }
}

/// The kernel takes one tag off before the programs run, and others of priority alone after them: here is what is left in between.
#[test]
fn what_is_tagged_twice_does_not_pass() {
    let Some(mut bench) = Bench::new("what is tagged twice does not pass") else { return };
    let mut tagged = Vec::new();
    for (from, to) in PAIRS {
        for kind in [[0x81, 0], [0x88, 0xa8]] {
            let mut frame = tcp(from, to, SYN, Extra::default());
            frame.splice(12..12, [kind[0], kind[1], 0, 0]);
            tagged.push(frame);
        }
    }
    let run = |bench: &Bench, name, mark| {
        tagged.iter().map(|frame| bench.run(name, mark, frame).0).collect::<Vec<_>>()
    };
    for name in ["from_pod", "arriving", "leaving"] {
        assert_eq!(run(&bench, name, 0), [PASS; 4], "{name}: no verdicts are in use");
    }
    bench.lease(5, true);
    for name in ["from_pod", "arriving", "leaving"] {
        assert_eq!(run(&bench, name, 0), [DROP; 4], "{name}");
        assert_eq!(run(&bench, name, layout::MARK_GRANTED), [DROP; 4], "{name}");
    }
    assert_eq!(run(&bench, "leaving", layout::MARK_ZTUNNEL), [PASS; 4]);
    assert_eq!(bench.tallied(layout::TALLY_UNREADABLE), 8);
    assert_eq!(bench.counted(layout::COUNT_UNREADABLE), 16);
    bench.set(0, |_| {});
    assert_eq!((run(&bench, "arriving", 0), run(&bench, "leaving", 0)), (vec![PASS; 4], vec![PASS; 4]));
}

#[test]
fn what_the_node_did_not_let_through_does_not_arrive() {
    let Some(mut bench) = Bench::new("what the node did not let through does not arrive") else { return };
    for (server, client) in
        PAIRS.map(|(own, other)| (own.replace(":4000", ":80"), other.replace(":80", ":4000")))
    {
        let (server, client) = (server.as_str(), client.as_str());
        let packets = [SYN, ACK].map(|flags| tcp(client, server, flags, Extra::default()));
        let mut reply = tcp(server, client, ACK, Extra::default());
        assert_eq!(bench.run("arriving", 0, &reply).0, PASS);
        assert_eq!(bench.choose(client, server), SK_DROP, "ztunnel's");
        bench.lease(5, true);
        for generation in [5, 4, 0] {
            bench.allow(client, server, VerdictEntry { generation, ..HERE });
            for packet in packets.iter().chain([&reply]) {
                let before = bench.counted(layout::COUNT_UNPROVEN);
                for mark in [0, layout::MARK_ZTUNNEL, layout::MARK_DIRECT, layout::MARK_REPLY] {
                    assert_eq!(bench.run("arriving", mark, packet).0, DROP, "{generation}");
                }
                assert_eq!(bench.counted(layout::COUNT_UNPROVEN), before + 4);
            }
            assert_eq!(bench.choose(client, server), if generation == 5 { SK_PASS } else { SK_DROP });
        }
        bench.allow(client, server, HERE);
        for packet in &packets {
            let (verdict, mark, _) = bench.run("arriving", layout::MARK_GRANTED, packet);
            assert_eq!((verdict, mark), (PASS, layout::MARK_GRANTED));
        }
        let (verdict, mark, _) = bench.run("arriving", layout::MARK_ANSWERED, &reply);
        assert_eq!((verdict, mark), (PASS, layout::MARK_DIRECT));
        // Another device, no lease, and ztunnel's own ports.
        bench.allow(client, server, VerdictEntry { inside: 2, ..HERE });
        assert_eq!(bench.choose(client, server), SK_DROP);
        bench.allow(client, server, HERE);
        bench.lease(5, false);
        assert_eq!(bench.choose(client, server), SK_DROP);
        bench.lease(5, true);
        let own = server.replace(":80", ":15008");
        bench.allow(client, &own, HERE);
        assert_eq!(bench.choose(client, &own), SK_DROP);
        // From whom there is no verdict, as ever.
        reply = tcp(&client.replace(":4000", ":4001"), &server.replace(":80", ":81"), ACK, Extra::default());
        assert_eq!(bench.run("arriving", 0, &reply).0, PASS);
        bench.lease(0, true);
    }
    assert_eq!(bench.counted(layout::COUNT_GRANTED), 0, "no device of that number");
}

#[test]
fn what_leaves_by_a_verdict_has_one() {
    let Some(mut bench) = Bench::new("what leaves by a verdict has one") else { return };
    for (client, server) in PAIRS {
        let [syn, data] = [SYN, ACK].map(|flags| tcp(client, server, flags, Extra::default()));
        let leaving = |bench: &Bench| bench.run("leaving", layout::MARK_GRANTED, &syn).0;
        assert_eq!(leaving(&bench), REDIRECT);
        assert_eq!(bench.run("leaving", layout::MARK_GRANTED, &data).0, PASS);
        bench.allow(client, server, HERE);
        assert_eq!(leaving(&bench), REDIRECT, "without a lease");
        bench.lease(5, true);
        assert_eq!(leaving(&bench), PASS);
        assert_eq!(bench.run("leaving", layout::MARK_DIRECT, &syn).0, REDIRECT);
        assert_eq!(bench.run("leaving", layout::MARK_ANSWERED, &syn).0, REDIRECT);
        assert_eq!(bench.run("leaving", 0, &syn).0, REDIRECT);
        bench.lease(6, true);
        assert_eq!(leaving(&bench), REDIRECT, "of an old generation");
        bench.lease(5, false);
        assert_eq!(leaving(&bench), REDIRECT, "without a lease");
    }
}
