//! What the programs and user space share. This file is the one definition: the build makes the programs' header of it, and
//! both compilers check the sizes.
//!
//! Addresses are 16 bytes, IPv4 in its mapped form; ports are in host order unless a field says otherwise.

/// ztunnel's own packets and sockets.
pub const MARK_ZTUNNEL: u32 = 0x539;
/// Packets from outside the pod, the sockets that they make, and connections that were alive at enrolment: they use the pod's
/// own routes. It differs from ztunnel's mark in the last bits, so that one rule matches both, and the next two.
pub const MARK_DIRECT: u32 = 0x538;
/// Connections that a verdict lets by without a proxy: the client's socket, and the packets that the node lets through to the
/// server. Such a packet has it when it reaches the server's device, and only the node's programs can see to that: marks
/// don't cross a pair of devices otherwise.
pub const MARK_GRANTED: u32 = 0x53a;
/// The same of packets that go back to the client.
pub const MARK_ANSWERED: u32 = 0x53b;
/// What matches the four of them.
pub const MARK_DIRECT_MASK: u32 = 0xffc;
/// The application's side of a connection that ztunnel delivers: back to ztunnel by the loopback device.
pub const MARK_REPLY: u32 = 0x111;
/// The bits of the mark that are ours.
pub const MARK_MASK: u32 = 0xfff;

/// Something is captured; without it all passes but what is in the map of refused connections.
pub const CAPTURING: u32 = 0x1;
/// DNS goes to the proxy.
pub const WITH_DNS: u32 = 0x2;
/// Incoming connections are left alone.
pub const BYPASS_INBOUND: u32 = 0x4;
/// Only the listed incoming ports are captured.
pub const ONLY_INBOUND_PORTS: u32 = 0x8;
/// Only the listed destinations are captured.
pub const ONLY_OUTBOUND_RANGES: u32 = 0x10;
/// The two sources of probes are exempt.
pub const WITH_PROBES: u32 = 0x20;
/// Some connections are to be reset.
pub const WITH_REFUSED: u32 = 0x40;

/// The listener for outgoing connections, by its place in the map of listeners.
pub const LISTENER_OUTBOUND: u32 = 0;
/// For incoming ones without a tunnel.
pub const LISTENER_PLAINTEXT: u32 = 1;
/// For tunnels.
pub const LISTENER_HBONE: u32 = 2;
/// For DNS over TCP.
pub const LISTENER_DNS_TCP: u32 = 3;
/// For DNS over UDP.
pub const LISTENER_DNS_UDP: u32 = 4;
/// How many there are.
pub const LISTENERS: u32 = 5;

/// Of an interface: traffic is left alone.
pub const INTERFACE_EXCLUDED: u32 = 0x1;
/// Of an interface: what comes in is the pod's outgoing traffic.
pub const INTERFACE_VIRTUAL: u32 = 0x2;

/// Destinations that are left alone: the last bit of the key's first byte. The half is the bit before, and the family the one
/// before that: `::/0` is no network of IPv4's mapped addresses.
pub const RANGE_EXCLUDED: u32 = 0;
/// Destinations that are captured.
pub const RANGE_INCLUDED: u32 = 1;
/// The destinations are those of IPv6.
pub const RANGE_V6: u32 = 4;

/// Incoming connections given to ztunnel.
pub const COUNT_INBOUND: u32 = 0;
/// Outgoing connections given to ztunnel.
pub const COUNT_OUTBOUND: u32 = 1;
/// DNS queries over UDP given to ztunnel.
pub const COUNT_DNS: u32 = 2;
/// Incoming connections that should have been captured and were about to reach another socket. Refused.
pub const COUNT_ESCAPED_INBOUND: u32 = 3;
/// Outgoing connections that should have been captured and were about to leave. Refused.
pub const COUNT_ESCAPED_OUTBOUND: u32 = 4;
/// Refused since no ztunnel listens.
pub const COUNT_NO_LISTENER: u32 = 5;
/// Packets whose headers could not be followed, and where verdicts are in use, those with a further tag of a VLAN. Dropped.
pub const COUNT_UNREADABLE: u32 = 6;
/// Packets of ztunnel's connections to the pod that were about to leave. Dropped.
pub const COUNT_ASTRAY: u32 = 7;
/// Packets of connections that are no longer allowed. Answered with resets.
pub const COUNT_REFUSED: u32 = 8;
/// Packets of no connection that is known, which were about to leave. Dropped.
pub const COUNT_UNKNOWN: u32 = 9;
/// Packets from outside for the proxy of DNS, which is the pod's. Dropped.
pub const COUNT_DNS_OUTSIDE: u32 = 10;
/// Packets of ztunnel to the pod that could not be noted or changed. Dropped.
pub const COUNT_UNDELIVERED: u32 = 11;
/// Connections from outside to an address that is not the pod's, on ports or devices that are left alone. Dropped.
pub const COUNT_NOT_THE_PODS: u32 = 12;
/// Incoming connections that a verdict let by without a proxy.
pub const COUNT_GRANTED: u32 = 13;
/// Packets between two pods that have a verdict, which the node's programs did not let through. Dropped.
pub const COUNT_UNPROVEN: u32 = 14;
/// First packets that met another socket than the settings said which a program had just read: they were being changed. Dropped,
/// and judged anew when they are sent again.
pub const COUNT_UNDECIDED: u32 = 15;
/// How many counters there are.
pub const COUNTERS: u32 = 16;

/// Destinations at most, of both lists and families.
pub const RANGES_LIMIT: u32 = 4096;
/// Interfaces, own addresses, and refused connections at most.
pub const ENTRIES_LIMIT: u32 = 2048;
/// Connections on their way from ztunnel to the application at most. A processor mostly has one at a time: it goes from the device
/// to the choice of a socket without a break, unless a queue of netfilter's in the pod, or of the device's, holds it up.
pub const DELIVERED_LIMIT: u32 = 1024;
/// Of those, so many of each processor at most, whose entries the others' don't displace.
pub const DELIVERED_EACH: u32 = 64;
/// And at least.
pub const DELIVERED_LEAST: u32 = 8;
/// Connections that can be marked in one go.
pub const MARKS_LIMIT: u32 = 1_048_576;
/// 32-bit words of a set of ports.
pub const PORT_WORDS: usize = 2048;

/// What is captured, but for the lists.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// See above.
    pub flags: u32,
    /// Which of the two halves of the lists is in force: 0 or 1.
    pub half: u32,
    /// Which programs wrote it.
    pub build: [u8; 8],
    /// Until then (`CLOCK_MONOTONIC`, nanoseconds) the pod comes or leaves: its routes and the marks of its connections are being
    /// changed. New connections are let out, and are captured where its routes lead to ztunnel already, or still. Of others what has
    /// no mark yet waits. 0 or in the past as a rule: it ends by itself, also where who began it has.
    pub changing_until: u64,
    /// Where outgoing connections go.
    pub outbound: u16,
    /// Where incoming ones go.
    pub plaintext: u16,
    /// Where tunnels arrive.
    pub hbone: u16,
    /// Where DNS goes.
    pub dns: u16,
    /// A source of probes, IPv4.
    pub probe4: [u8; 16],
    /// A source of probes, IPv6.
    pub probe6: [u8; 16],
}
const _: () = assert!(size_of::<Settings>() == 64);

/// Sets of ports, a bit for each.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortSets {
    /// Incoming, left alone.
    pub inbound_excluded: [u32; PORT_WORDS],
    /// Incoming, captured.
    pub inbound_included: [u32; PORT_WORDS],
    /// Destinations, left alone.
    pub outbound_excluded: [u32; PORT_WORDS],
    /// Destinations, captured whatever the address.
    pub outbound_included: [u32; PORT_WORDS],
}
const _: () = assert!(size_of::<PortSets>() == 32768);

/// A key of the trie of destinations; its prefix counts the first byte.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// Which list, half and family.
    pub list: u8,
    /// The network.
    pub network: [u8; 16],
}
const _: () = assert!(size_of::<Range>() == 17);

/// An interface in one of the halves.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct Interface {
    /// The half.
    pub half: u32,
    /// Its number.
    pub index: u32,
}
const _: () = assert!(size_of::<Interface>() == 8);

/// An address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Address {
    /// Its bytes.
    pub octets: [u8; 16],
}
const _: () = assert!(size_of::<Address>() == 16);

/// A connection, seen from the pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Connection {
    /// The pod's address.
    pub local: [u8; 16],
    /// The other end's.
    pub peer: [u8; 16],
    /// The pod's port.
    pub local_port: u16,
    /// The other end's.
    pub peer_port: u16,
}
const _: () = assert!(size_of::<Connection>() == 36);

/// Verdicts at most, and pairs of addresses that have some.
pub const VERDICTS_LIMIT: u32 = 32768;
/// Addresses that pods may connect to without a proxy at most.
pub const OFFERS_LIMIT: u32 = 16384;
/// Endpoints of one of them.
pub const OFFER_ENDPOINTS: usize = 8;
/// Ends of connections without a proxy that are known at most.
pub const CONNECTIONS_LIMIT: u32 = 131_072;
/// With so many ends, further connections go to ztunnel: less than the limit, as many may be about to begin.
pub const CONNECTIONS_ENOUGH: u32 = 120_000;
/// Connections that have ended and wait for being read at most; more stay among the others.
pub const ENDED_LIMIT: u32 = 8192;

/// Of an offer: the socket is bound to the source, since the pod has several addresses.
pub const OFFER_BINDS: u32 = 0x1;

/// The end of a connection that asked for it.
pub const SIDE_SOURCE: u32 = 0;
/// The one that was asked.
pub const SIDE_DESTINATION: u32 = 1;

/// Connections let by without a proxy.
pub const TALLY_GRANTED: u32 = 0;
/// Connections that ztunnel got though there was an offer: no verdict in force, no lease, too many, or another source.
pub const TALLY_DECLINED: u32 = 1;
/// Packets from another device than the pair's. Dropped.
pub const TALLY_SPOOFED: u32 = 2;
/// Packets of a pair whose verdict is revoked, or of an old generation. Dropped.
pub const TALLY_STALE: u32 = 3;
/// Packets after the end of the lease. Dropped.
pub const TALLY_LAPSED: u32 = 4;
/// Packets between two pods that have a verdict, whose headers are not plain. Dropped.
pub const TALLY_UNREADABLE: u32 = 5;
/// Connections that there was no room to note.
pub const TALLY_UNRECORDED: u32 = 6;
/// How many of these counters there are.
pub const TALLIES: u32 = 7;

/// What holds for all verdicts.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Control {
    /// The end of the lease: `CLOCK_MONOTONIC`, ns.
    pub until: u64,
    /// The oldest generation whose verdicts are in force.
    pub oldest: u64,
    /// Who writes the verdicts; 0 if nobody ever did.
    pub owner: u64,
}
const _: () = assert!(size_of::<Control>() == 24);

/// Who may connect to what without a proxy.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PairKey {
    /// The address of the client's pod.
    pub source: [u8; 16],
    /// The address of the server's.
    pub destination: [u8; 16],
    /// The server's port.
    pub port: u16,
    /// Zero.
    pub unused: u16,
}
const _: () = assert!(size_of::<PairKey>() == 36);

/// A verdict: it is in force from its generation on, within the lease.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VerdictEntry {
    /// 0: revoked, and every packet is dropped.
    pub generation: u64,
    /// What its writer knows it by.
    pub id: u64,
    /// The node's end of the client's device.
    pub source_device: u32,
    /// The node's end of the server's.
    pub destination_device: u32,
    /// The server's own end.
    pub inside: u32,
    /// Zero.
    pub unused: u32,
    /// The cookie of the server's network namespace.
    pub destination_netns: u64,
}
const _: () = assert!(size_of::<VerdictEntry>() == 40);

/// Two addresses between which there is a verdict for some port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Neighbours {
    /// The client's.
    pub source: [u8; 16],
    /// The server's.
    pub destination: [u8; 16],
}
const _: () = assert!(size_of::<Neighbours>() == 32);

/// What a pod may ask for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Dialled {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// A service's address, or a pod's.
    pub address: [u8; 16],
    /// Its port.
    pub port: u16,
    /// Zero.
    pub unused: [u16; 3],
}
const _: () = assert!(size_of::<Dialled>() == 32);

/// Where it leads.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OfferEntry {
    /// The pod's address.
    pub source: [u8; 16],
    /// How many endpoints there are.
    pub count: u32,
    /// See above.
    pub flags: u32,
    /// Their addresses.
    pub addresses: [[u8; 16]; OFFER_ENDPOINTS],
    /// Their ports.
    pub ports: [u16; OFFER_ENDPOINTS],
    /// The sum of the weights of each and those before it: it is taken as often as its own weight says.
    pub sums: [u32; OFFER_ENDPOINTS],
}
const _: () = assert!(size_of::<OfferEntry>() == 200);

/// What a socket was asked to connect to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asked {
    /// The address.
    pub address: [u8; 16],
    /// The port.
    pub port: u16,
    /// Zero.
    pub unused: u16,
}
const _: () = assert!(size_of::<Asked>() == 20);

/// One end of a connection without a proxy. Times are of `CLOCK_MONOTONIC`, ns.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Record {
    /// The verdict's.
    pub id: u64,
    /// The socket's cookie.
    pub socket: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// When it began.
    pub opened: u64,
    /// When it ended; 0 if it lives.
    pub closed: u64,
    /// Bytes sent and acknowledged, once it has ended.
    pub sent: u64,
    /// Bytes received, once it has ended.
    pub received: u64,
    /// What the kernel took for bytes sent when it was made.
    pub before: u64,
    /// The bytes received when our end was finished.
    pub half: u64,
    /// The client's address.
    pub source: [u8; 16],
    /// The server's.
    pub destination: [u8; 16],
    /// What the client asked for, if it was something else.
    pub asked: [u8; 16],
    /// The client's port.
    pub source_port: u16,
    /// The server's.
    pub destination_port: u16,
    /// With the address.
    pub asked_port: u16,
    /// Which end it is.
    pub side: u8,
    /// Whether it came about.
    pub established: u8,
}
const _: () = assert!(size_of::<Record>() == 128);
