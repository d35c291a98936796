//! The eBPF back-end: no netfilter, no connection tracking, no address rewritten.
//!
//! ```text
//!   in   -- SYN by a device --> [arriving: mark 0x538] --> [sockets: the listener on 15006, 15008] --> ztunnel
//!   out  -- route by table 15391 or 15392: every address is local --> lo --> [inside] --> [sockets: 15001] --> ztunnel
//!   ztunnel, with the client's address and mark 0x539 --> lo --> [inside: mark 0x111] --> application
//!   application's reply, mark 0x111 from its first packet on --> table 15390: everything is local --> ztunnel
//!   whatever leaves by a device without a mark of ours --> [leaving: refuse]
//! ```
//!
//! Which socket a connection meets is chosen where the kernel has read its headers (`sk_lookup`), so that IP options, extension
//! headers and SYN cookies make no difference. A connection keeps the route that it had when it was made: those alive at
//! enrolment are given the mark that the pod's own routes are for, from outside, by an iterator over the sockets.
//!
//! Programs and maps are pinned; rules and routes are the kernel's own. Nothing of ours has to run.

mod ends;
mod network;
mod routes;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ebpf::layout;
use ebpf::{Contents, Pins, Pod};
use ipnet::IpNet;
use net::sock_diag::{self, TcpState};
use net::{MARK_MASK, Netns, ZTUNNEL_MARK, sysctl};

use crate::backend::{Backend, Capture, Drift, Installed, check};
use crate::error::{Error, Missing};
use crate::live;
use crate::probe::privileges;
use crate::routing::{self, Ipv6};
use crate::rules::{Include, PortRange, Rules};
use crate::tool::Tools;
use ends::{Ends, Wanted};
use network::Network;

/// So often what lives is marked, when a pod comes or leaves, while connections are being made, and so long is waited between:
/// together longer than an answer takes within a region, or a packet waits for a busy processor.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);
/// What has to be on, and is put back when the pod leaves: sockets take the mark of the packet that makes them; answers without
/// a socket take that of what they answer; the mark counts when it is asked whether a source is to be believed.
const SWITCHES: [&str; 4] =
    ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "ipv4/conf/all/src_valid_mark"];

/// Capture by eBPF.
#[derive(Debug)]
pub struct Programs {
    pins: Pins,
    version: String,
    /// Where another process writes verdicts.
    ends: OnceLock<Ends>,
    /// What `ends` is to be, while it could not be made.
    wanted: Mutex<Option<Wanted>>,
}

impl Programs {
    /// Installs the programs in an empty namespace, to see that they work here.
    ///
    /// # Errors
    /// What is missing.
    pub fn probe(tools: &Tools) -> Result<Self, Missing> {
        privileges()?;
        Self::with(Pins::open(tools.bpf_file_system()).map_err(missing)?)
    }

    /// What the programs are called, if the kernel takes them: nothing of it stays, and the node's bpf file system, which they
    /// would be kept in, is not looked at.
    ///
    /// # Errors
    /// What is missing.
    pub fn work_here() -> Result<String, Missing> {
        privileges()?;
        Self::with(Pins::to_try().map_err(missing)?).map(|found| found.version)
    }

    fn with(pins: Pins) -> Result<Self, Missing> {
        let build = u64::from_be_bytes(ebpf::build());
        let version = format!("programs {build:016x}");
        let found = Self { pins, version, ends: OnceLock::new(), wanted: Mutex::default() };
        let made = Netns::new_empty()
            .map_err(|source| Error::Enter { netns: "an empty namespace".to_owned(), source })
            .and_then(|netns| {
                routing::loopback_up(&netns)?;
                ebpf::mark(&netns, &[])?;
                let outcome = found.install(&netns, &Rules::default());
                found.remove(&netns)?;
                outcome
            });
        made.map(|_| found).map_err(|error| Missing::Kernel(Box::new(error)))
    }
}

/// Removes what [`Capture::prepare_verdicts`] of an earlier process has left on the node that this thread is in. Whether there was
/// anything. No pair may be in use.
///
/// # Errors
/// It stays: what it would let by has no lease.
pub fn remove_verdicts() -> Result<bool, Error> {
    Ok(ebpf::verdicts::remove(&Pins::of_others(ebpf::bpf_file_system()))?)
}

/// Removes what is left of pods that are gone, where other back-ends capture. Of how many.
pub(crate) fn sweep_left() -> usize {
    Pins::of_others(ebpf::bpf_file_system()).sweep().unwrap_or(0)
}

fn missing(error: ebpf::Error) -> Missing {
    Missing::Kernel(Box::new(error.into()))
}

/// The counters of the pod in `netns`; none if it is not captured by eBPF. Whoever captured it: the programs of all processes of
/// this machine are below one directory.
///
/// # Errors
/// They can't be read: we may not, or `/sys/fs/bpf` is not the node's.
pub fn counters(netns: &Netns) -> Result<Vec<(Counter, u64)>, Error> {
    let pins = Pins::of_others(ebpf::bpf_file_system());
    let Some(pod) = Pod::find(&pins, netns) else { return Ok(Vec::new()) };
    Ok(Counter::ALL.into_iter().zip(pod.counters()?).collect())
}

/// What the programs count, for each pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Counter {
    /// Incoming connections given to ztunnel.
    Inbound,
    /// Outgoing connections given to ztunnel.
    Outbound,
    /// DNS queries over UDP given to ztunnel.
    Dns,
    /// Incoming connections that should have been captured and were about to reach another socket. They were refused; it should
    /// be zero.
    EscapedInbound,
    /// Outgoing connections that should have been captured and were about to leave. They were refused; it should be zero.
    EscapedOutbound,
    /// Refused: no ztunnel listens.
    NoListener,
    /// Dropped: the headers of a packet that was about to leave could not be followed.
    Unreadable,
    /// Dropped: packets of ztunnel's connections to the pod that were about to leave.
    Astray,
    /// Packets of connections that are no longer allowed, answered with resets.
    Refused,
    /// Dropped: packets of no connection that is known, which were about to leave.
    Unknown,
    /// Dropped: packets from outside for the proxy of DNS.
    DnsOutside,
    /// Dropped: packets of ztunnel to the pod that could not be noted or changed.
    Undelivered,
    /// Dropped: connections from outside to an address that is not the pod's, past what is captured.
    NotThePods,
    /// Incoming connections that a verdict let by without a proxy.
    Granted,
    /// Dropped: packets between two pods that have a verdict, which the node did not let through.
    Unproven,
    /// Dropped: first packets that came while what is captured was being changed. They are sent again.
    Undecided,
}

impl Counter {
    /// All, in the order of the map.
    pub const ALL: [Self; layout::COUNTERS as usize] = [
        Self::Inbound,
        Self::Outbound,
        Self::Dns,
        Self::EscapedInbound,
        Self::EscapedOutbound,
        Self::NoListener,
        Self::Unreadable,
        Self::Astray,
        Self::Refused,
        Self::Unknown,
        Self::DnsOutside,
        Self::Undelivered,
        Self::NotThePods,
        Self::Granted,
        Self::Unproven,
        Self::Undecided,
    ];

    /// As a label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "captured_inbound",
            Self::Outbound => "captured_outbound",
            Self::Dns => "captured_dns",
            Self::EscapedInbound => "escaped_inbound",
            Self::EscapedOutbound => "escaped_outbound",
            Self::NoListener => "no_listener",
            Self::Unreadable => "unreadable",
            Self::Astray => "astray",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
            Self::DnsOutside => "dns_outside",
            Self::Undelivered => "undelivered",
            Self::NotThePods => "not_the_pods",
            Self::Granted => "granted_inbound",
            Self::Unproven => "unproven",
            Self::Undecided => "undecided",
        }
    }
}

impl Capture for Programs {
    fn backend(&self) -> Backend {
        Backend::Ebpf
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn guards_ports(&self) -> bool {
        true
    }

    fn install(&self, netns: &Netns, rules: &Rules) -> Result<Installed, Error> {
        check(rules)?;
        let network = Network::read(netns)?;
        let contents = contents(rules, &network);
        let routes = routes::wanted(rules, &network);
        let guarded = ebpf::is_guarded(&self.pins, netns);
        let drift = match Pod::find(&self.pins, netns) {
            Some(pod) => pod.drift(netns, &contents)?,
            None => vec!["all".to_owned()],
        };
        let switched = switched_off(netns)?;
        let routed = routes.drift(netns)?;
        if drift.is_empty() && switched.is_empty() && routed.is_none() {
            self.follow(netns);
            return Ok(Installed { changed: false, ipv6: network.ipv6 });
        }
        self.remember_switches(netns)?;
        switch_on(netns, &switched)?;
        // What lives keeps its routes. Marked before the guard looks for marks, and again when nothing new needs them.
        match (rules.leaving, routes::captures(netns)?) {
            (true, true) => {
                self.leave(netns, &routes)?;
                Pod::install(&self.pins, netns, &contents)?;
            }
            // One whose routes someone took away stays guarded.
            (false, false) if !guarded => self.enrol(netns, contents, &routes)?,
            _ => {
                Pod::install(&self.pins, netns, &contents)?;
                apply(&routes, netns)?;
            }
        }
        self.follow(netns);
        Ok(Installed { changed: true, ipv6: network.ipv6 })
    }

    fn verify(&self, netns: &Netns, rules: &Rules) -> Result<Drift, Error> {
        check(rules)?;
        let network = Network::read(netns)?;
        let mut drift = routes::wanted(rules, &network).drift(netns)?;
        match Pod::find(&self.pins, netns) {
            Some(pod) => drift.missing.extend(pod.drift(netns, &contents(rules, &network))?),
            None => drift.missing.push("the programs".to_owned()),
        }
        drift
            .missing
            .extend(switched_off(netns)?.into_iter().map(|name| format!("1 in /proc/sys/net/{name}")));
        self.follow(netns);
        Ok(drift)
    }

    fn remove(&self, netns: &Netns) -> Result<bool, Error> {
        if let Some(ends) = self.ends.get() {
            ends.leave(netns);
        }
        let routed = routes::remove(netns)?;
        let before = self.switches_before(netns);
        let programs = ebpf::remove(&self.pins, netns)?;
        for name in before {
            sysctl::write(netns, name, "0").map_err(|source| Error::Netlink {
                action: "put a setting back",
                netns: netns.to_string(),
                source,
            })?;
        }
        // Not before: who tries again is to know them.
        ebpf::forget(&self.pins, netns)?;
        Ok(routed || programs)
    }

    fn sweep(&self) -> usize {
        match self.ends.get() {
            Some(ends) => ends.sweep(),
            None => self.attach_wanted(),
        }
        let swept = if self.ends.get().is_some() { self.pins.sweep_others() } else { self.pins.sweep() };
        swept.unwrap_or(0)
    }

    fn prepare_verdicts(&self) -> Result<bool, Error> {
        if self.ends.get().is_none() {
            let failed = |error| Error::Enter {
                netns: "the node's own namespace".to_owned(),
                source: std::io::Error::other(error),
            };
            let node = Netns::current().map_err(failed)?;
            let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            *wanted = Some(Wanted::new(node.clone()));
            // Only while `wanted` is held.
            let _ = self.ends.set(Ends::attach(&self.pins, node)?);
            *wanted = None;
        }
        Ok(true)
    }

    fn verdict_end(&self, netns: &Netns) -> Option<Result<(), String>> {
        self.ends.get()?.is_fit(netns)
    }

    fn is_by_device(&self) -> bool {
        true
    }
}

impl Programs {
    /// Tries again what could not be prepared.
    fn attach_wanted(&self) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ends) = wanted.as_mut().and_then(|wanted| wanted.sweep(&self.pins)) {
            let _ = self.ends.set(ends);
            *wanted = None;
        }
    }

    /// Captures what is new of a pod that was not captured. What lives keeps its routes by a mark: also what was made after the
    /// marks were set and before the routes were there, of which nothing reaches a listener meanwhile.
    fn enrol(&self, netns: &Netns, mut contents: Contents, routes: &routes::Wanted) -> Result<(), Error> {
        mark(netns, false)?;
        contents.settings.changing_until = 1;
        let outcome = Pod::install(&self.pins, netns, &contents)
            .map_err(Error::from)
            .and_then(|_| self.redirect(netns, routes));
        // Also where it failed: what should be captured and is not is refused from here on.
        let settled = Pod::find(&self.pins, netns).map_or(Ok(()), |pod| pod.settle());
        outcome.and(settled.map_err(Error::from))
    }

    /// Gives a pod that is being changed the routes to ztunnel, and what was made meanwhile its mark.
    fn redirect(&self, netns: &Netns, routes: &routes::Wanted) -> Result<(), Error> {
        apply(routes, netns)?;
        mark_made(netns, false)
    }

    /// Gives a pod its own routes back for what is new. What ztunnel carries keeps its own by a mark: also what was made after the
    /// marks were set and before the routes went, of which the guard, which still stands, has let nothing out meanwhile.
    fn leave(&self, netns: &Netns, routes: &routes::Wanted) -> Result<(), Error> {
        mark(netns, true)?;
        if let Some(pod) = Pod::find(&self.pins, netns) {
            pod.let_out()?;
        }
        routes.apply(netns)?;
        mark_made(netns, true)
    }

    /// Looks whether the pod may be an end of connections that no proxy carries.
    fn follow(&self, netns: &Netns) {
        if let Some(ends) = self.ends.get() {
            ends.follow(netns);
        }
    }

    /// Notes, once, which switches are off, beside the pins: a process that removes the capture may be another one.
    fn remember_switches(&self, netns: &Netns) -> Result<(), Error> {
        let off = switched_off(netns)?;
        let bits = SWITCHES.iter().enumerate().filter(|(_, name)| off.contains(name));
        let bits = bits.fold(0, |bits, (index, _)| bits | 1 << index);
        Ok(ebpf::remember(&self.pins, netns, bits)?)
    }

    /// Those that were off.
    fn switches_before(&self, netns: &Netns) -> Vec<&'static str> {
        let bits = ebpf::remembered(&self.pins, netns);
        SWITCHES
            .into_iter()
            .enumerate()
            .filter(|(index, _)| bits & 1 << index != 0)
            .map(|(_, name)| name)
            .collect()
    }
}

/// The same where the loopback device of a new pod may still be down.
fn apply(routes: &routes::Wanted, netns: &Netns) -> Result<(), Error> {
    match routes.apply(netns) {
        Err(Error::Netlink { source, .. }) if source.raw_os_error() == Some(nix::libc::ENETDOWN) => {
            routing::loopback_up(netns)?;
            routes.apply(netns)
        }
        applied => applied,
    }
}

/// [`mark`] after a change of routes, as soon as what was being made by the old ones is there; what is begun meanwhile goes by the
/// new ones. Until it has its mark the guard drops what a connection says, which is sent again.
fn mark_made(netns: &Netns, carried: bool) -> Result<(), Error> {
    let mut begun = being_made(netns)?;
    for _ in 0..LOOKS {
        mark(netns, carried)?;
        if begun.is_empty() {
            return Ok(());
        }
        std::thread::sleep(BETWEEN_LOOKS);
        // Looked at before they are marked: one that is made in between has its mark by the next look.
        let now = being_made(netns)?;
        begun.retain(|connection| now.contains(connection));
    }
    mark(netns, carried)
}

/// The connections without a mark of ours that are not there yet: such a socket is marked when it is.
fn being_made(netns: &Netns) -> Result<HashSet<(SocketAddr, SocketAddr)>, Error> {
    let failed = |source| Error::Netlink { action: "list the connections", netns: netns.to_string(), source };
    let all = sock_diag::connections(netns).map_err(failed)?;
    let is_being_made =
        |socket: &&sock_diag::Connection| matches!(socket.state, TcpState::SynSent | TcpState::SynReceived);
    let open = all.iter().filter(|socket| !is_ours(socket)).filter(is_being_made);
    Ok(open.map(|socket| (socket.local, socket.peer)).collect())
}

/// Whether it has a mark of ours already. Applications may have given it one of their own.
fn is_ours(socket: &sock_diag::Connection) -> bool {
    socket.mark.unwrap_or(0) & MARK_MASK & layout::MARK_DIRECT_MASK == layout::MARK_DIRECT
}

/// Which of the switches there are, and are off.
fn switched_off(netns: &Netns) -> Result<Vec<&'static str>, Error> {
    // One that can't be read is of a kernel without it.
    let off = |name: &&str| sysctl::read(netns, name).is_ok_and(|value| value == "0");
    netns
        .run(|| SWITCHES.into_iter().filter(off).collect())
        .map_err(|source| Error::Enter { netns: netns.to_string(), source })
}

fn switch_on(netns: &Netns, switches: &[&'static str]) -> Result<(), Error> {
    switches.iter().try_for_each(|name| sysctl::write(netns, name, "1")).map_err(|source| Error::Netlink {
        action: "change a setting of /proc/sys/net",
        netns: netns.to_string(),
        source,
    })
}

/// Marks what must keep its routes: at enrolment the connections that go past ztunnel; when the pod leaves, or netfilter no
/// longer marks their packets, the application's ends of those that ztunnel carries.
pub(crate) fn mark(netns: &Netns, carried: bool) -> Result<(), Error> {
    let failed = |source| Error::Netlink { action: "list the connections", netns: netns.to_string(), source };
    let (all, ends) = live::with_ends(netns).map_err(failed)?;
    let wanted: Vec<_> = all
        .iter()
        .filter(|socket| {
            let internal = ends.contains(&(socket.peer, socket.local));
            !is_ours(socket)
                && internal == carried
                && !matches!(socket.state, TcpState::SynSent | TcpState::Listen)
        })
        .map(|socket| {
            let mark = if carried { layout::MARK_REPLY } else { layout::MARK_DIRECT };
            (socket.local, socket.peer, mark)
        })
        .collect();
    Ok(ebpf::mark(netns, &wanted)?)
}

/// The maps of a pod with `rules`.
fn contents(rules: &Rules, network: &Network) -> Contents {
    let mut settings = layout::Settings::default();
    let mut ports = layout::PortSets::empty();
    let mut interfaces: BTreeMap<u32, u32> = network.interfaces.values().map(|index| (*index, 0)).collect();
    let (mut excluded, mut included) = (Vec::new(), Vec::new());
    if !rules.leaving {
        let dns = rules.dns && !rules.exclude_outbound_ports.iter().any(|range| range.contains(53));
        let flags = [
            (layout::CAPTURING, true),
            (layout::WITH_DNS, dns),
            (layout::BYPASS_INBOUND, rules.bypass_inbound),
            (layout::ONLY_INBOUND_PORTS, rules.include_inbound_ports != Include::All),
            (layout::ONLY_OUTBOUND_RANGES, rules.include_outbound_ranges != Include::All),
            (layout::WITH_PROBES, rules.probes.is_some()),
        ];
        settings.flags = flags.into_iter().filter(|(_, set)| *set).fold(0, |flags, (flag, _)| flags | flag);
        settings.outbound = rules.ports.outbound;
        settings.plaintext = rules.ports.inbound_plaintext;
        settings.hbone = rules.ports.inbound_hbone;
        settings.dns = rules.ports.dns;
        if let Some(probes) = rules.probes {
            settings.probe4 = layout::Address::new(probes.ipv4.into()).octets;
            settings.probe6 = layout::Address::new(probes.ipv6.into()).octets;
        }
        fill(&mut ports.inbound_excluded, &rules.exclude_inbound_ports);
        if let Include::Only(list) = &rules.include_inbound_ports {
            fill(&mut ports.inbound_included, list);
        }
        fill(&mut ports.outbound_excluded, &rules.exclude_outbound_ports);
        fill(&mut ports.outbound_included, &rules.include_outbound_ports);
        excluded = IpNet::aggregate(&rules.exclude_outbound_ranges);
        if let Include::Only(list) = &rules.include_outbound_ranges {
            included = IpNet::aggregate(list);
        }
        for (names, kind) in [
            (&rules.exclude_interfaces, layout::INTERFACE_EXCLUDED),
            (&rules.virtual_interfaces, layout::INTERFACE_VIRTUAL),
        ] {
            for index in names.iter().filter_map(|name| network.interfaces.get(name.as_str())) {
                *interfaces.entry(*index).or_default() |= kind;
            }
        }
    }
    if !rules.refused.is_empty() {
        settings.flags |= layout::WITH_REFUSED;
    }
    excluded.sort();
    included.sort();
    let own = network.addresses.iter().map(|address| address.ip).collect();
    let refused = rules.refused.iter().map(|tuple| (tuple.local, tuple.peer)).collect();
    Contents { settings, ports, excluded, included, interfaces, own, refused }
}

fn fill(set: &mut [u32; layout::PORT_WORDS], ranges: &[PortRange]) {
    for port in ranges.iter().flat_map(|range| range.first()..=range.last()) {
        if let Some(word) = set.get_mut(usize::from(port >> 5)) {
            *word |= 1 << (port & 31);
        }
    }
}

const _: () = assert!(layout::MARK_ZTUNNEL == ZTUNNEL_MARK && layout::MARK_MASK == MARK_MASK);
const _: () = assert!(layout::MARK_REPLY == routing::REPLY_MARK);

/// Whether IPv6 is spoken, by what the namespace says.
fn ipv6(netns: &Netns) -> Ipv6 {
    routing::ipv6(netns)
}
