//! The nftables back-end: one table, `inet culvert`, loaded and replaced in one transaction.

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Mutex;

use ipnet::IpNet;
use net::{MARK_MASK, Netns, ZTUNNEL_MARK};

use crate::backend::{Backend, Capture, Drift, Installed, check, compare};
use crate::error::{Error, Missing};
use crate::probe::{privileges, trial};
use crate::routing::{self, REPLY_MARK};
use crate::rules::{Guard, InterfaceName, Matcher, Plan, PortRange, Rules, Step, Tuple, Verdict};
use crate::timeouts;
use crate::tool::{Tools, refused, run, run_any};

const TABLE: &str = "inet culvert";
/// New connections: of the four flags, SYN alone.
pub(crate) const SYN: &str = "tcp flags & (fin | syn | rst | ack) == syn";
/// Listings of rules that were asked for last.
const REMEMBERED: usize = 32;

/// Capture by nftables.
#[derive(Debug)]
pub struct Nftables {
    nft: PathBuf,
    version: String,
    /// Whether this kernel and this nft know whose socket a packet is for.
    by_socket: bool,
    /// How the kernel lists the table of given rules, to compare with.
    listings: Mutex<VecDeque<(Rules, Vec<String>)>>,
}

impl Nftables {
    /// Finds `nft` and loads the rules into an empty namespace, to see that they work here.
    ///
    /// # Errors
    /// What is missing.
    pub fn probe(tools: &Tools) -> Result<Self, Missing> {
        let nft = tools.find(&["nft"], "nftables")?;
        privileges()?;
        let mut found = Self { nft, version: String::new(), by_socket: true, listings: Mutex::default() };
        found.by_socket = trial(|netns| found.install(netns, &Rules::default())).is_ok();
        trial(|netns| {
            found.version = found.run(netns, &["--version"], "")?.trim().to_owned();
            found.install(netns, &Rules::default())
        })?;
        Ok(found)
    }

    fn run(&self, netns: &Netns, arguments: &[&str], input: &str) -> Result<String, Error> {
        run(netns, &self.nft, arguments, input)
    }

    /// The table as the kernel has it, empty when there is none.
    fn listing(&self, netns: &Netns) -> Result<Vec<String>, Error> {
        let arguments = ["-s", "-nn", "list", "table", "inet", "culvert"];
        let output = run_any(netns, &self.nft, &arguments, "")?;
        if !output.status.success() {
            let absent = String::from_utf8_lossy(&output.stderr).contains("No such file or directory");
            return if absent { Ok(Vec::new()) } else { Err(refused(netns, &self.nft, &arguments, &output)) };
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
    }

    /// How the kernel lists `rules`: found by loading them into an empty namespace, since the form differs
    /// between versions of nft.
    fn expected(&self, rules: &Rules) -> Result<Vec<String>, Error> {
        if let Ok(listings) = self.listings.lock()
            && let Some((_, listing)) = listings.iter().find(|(known, _)| known == rules)
        {
            return Ok(listing.clone());
        }
        let netns = Netns::new_empty()
            .map_err(|source| Error::Enter { netns: "an empty namespace".to_owned(), source })?;
        self.load(&netns, rules, Guard::Final)?;
        let listing = self.listing(&netns)?;
        if let Ok(mut listings) = self.listings.lock() {
            listings.truncate(REMEMBERED - 1);
            listings.push_front((rules.clone(), listing.clone()));
        }
        Ok(listing)
    }

    fn load(&self, netns: &Netns, rules: &Rules, guard: Guard) -> Result<(), Error> {
        self.run(netns, &["-f", "-"], &ruleset(&Plan::new(rules), self.by_socket, guard)).map(drop)
    }
}

impl Capture for Nftables {
    fn backend(&self) -> Backend {
        Backend::Nftables
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn guards_ports(&self) -> bool {
        self.by_socket
    }

    fn install(&self, netns: &Netns, rules: &Rules) -> Result<Installed, Error> {
        check(rules)?;
        // Routes first, for the replies of what is captured next; without them too, so that nothing passes.
        let routing = routing::install(netns);
        let listing = self.listing(netns)?;
        let loaded = listing.is_empty() || listing != self.expected(rules)?;
        // The kernel calls the chains one after the other: a packet that is under way may meet the guard alone.
        if loaded && !rules.leaving && !listing.iter().any(|line| line.contains("redirect to")) {
            self.load(netns, rules, Guard::OfEnrolment)?;
        }
        if loaded {
            self.load(netns, rules, Guard::Final)?;
        }
        let raised = timeouts::raise(netns);
        let (routed, ipv6) = routing?;
        Ok(Installed { changed: routed || loaded || raised, ipv6 })
    }

    fn verify(&self, netns: &Netns, rules: &Rules) -> Result<Drift, Error> {
        check(rules)?;
        let mut drift = compare(&self.expected(rules)?, &self.listing(netns)?);
        drift.missing.extend(routing::missing(netns)?);
        drift.missing.extend(timeouts::missing(netns));
        Ok(drift)
    }

    fn remove(&self, netns: &Netns) -> Result<bool, Error> {
        let loaded = !self.listing(netns)?.is_empty();
        if loaded {
            self.run(netns, &["-f", "-"], &format!("delete table {TABLE}\n"))?;
            timeouts::put_back(netns);
        }
        Ok(routing::remove(netns)? || loaded)
    }
}

/// Which way a chain's packets go, which decides what "interface" means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
    Through,
}

/// The whole table. Declared, deleted and declared again in one transaction: replaced if it was there.
///
/// Priorities are numbers because nft 1.0.6 refuses the name `dstnat` in an output hook. The guard comes after
/// the filters of others: their `accept` doesn't end our chains.
fn ruleset(plan: &Plan, by_socket: bool, guard: Guard) -> String {
    let mut text = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let ports = plan.ports;
    let to = |port: u16| format!("meta l4proto tcp redirect to :{port}");
    let (refuse, refuse_query) = match guard {
        Guard::OfEnrolment => ("drop", "accept"),
        Guard::Final => ("reject with tcp reset", "reject"),
    };
    let refuse_all = format!("meta l4proto tcp {refuse}");
    if !plan.inbound.is_empty() {
        chain(
            &mut text,
            "inbound_redirect",
            None,
            steps(&plan.inbound, Way::In, &to(ports.inbound_plaintext)),
        );
        chain(&mut text, "inbound_refuse", None, steps(&plan.inbound, Way::In, &refuse_all));
    }
    chain(&mut text, "forwarded_refuse", None, steps(&plan.forwarded, Way::Through, &refuse_all));
    for (name, verdict, dns) in [
        ("outbound_redirect", to(ports.outbound), format!("redirect to :{}", ports.dns)),
        ("outbound_refuse", refuse_all, refuse.to_owned()),
    ] {
        let mut lines = steps(&plan.outbound_always, Way::Out, &verdict);
        if plan.dns {
            lines.push(format!("tcp dport 53 {dns}"));
        }
        lines.extend(steps(&plan.outbound, Way::Out, &verdict));
        chain(&mut text, name, None, lines);
    }
    if plan.dns {
        for (name, verdict) in
            [("dns_redirect", format!("redirect to :{}", ports.dns)), ("dns_refuse", refuse_query.to_owned())]
        {
            let mut lines = steps(&plan.outbound_always, Way::Out, &verdict);
            lines.push(format!("udp dport 53 {verdict}"));
            chain(&mut text, name, None, lines);
        }
    }
    base_chains(&mut text, plan, by_socket);
    text.push_str("}\n");
    text
}

fn base_chains(text: &mut String, plan: &Plan, by_socket: bool) {
    let ports = plan.ports;
    let virtual_interfaces = interfaces("iifname", &plan.virtual_interfaces);
    let (mut raw_in, mut raw_out) = (Vec::new(), Vec::new());
    let (mut nat_in, mut nat_out) = (Vec::new(), vec![format!("{SYN} jump outbound_redirect")]);
    let (mut guard_in, mut guard_out) = (Vec::new(), vec![format!("{SYN} jump outbound_refuse")]);
    let refused =
        |way| plan.refused.iter().map(move |tuple| format!("{} reject with tcp reset", between(tuple, way)));
    guard_in.splice(0..0, refused(Way::In));
    guard_out.splice(0..0, refused(Way::Out));
    if by_socket && !plan.targets.is_empty() {
        // Any process of the pod may bind these ports while no ztunnel has them.
        let targets = set(plan.targets.iter().map(u16::to_string));
        let ours = format!("socket mark & {MARK_MASK:#010x} == {ZTUNNEL_MARK:#010x}");
        let others = format!("socket mark & {MARK_MASK:#010x} != {ZTUNNEL_MARK:#010x}");
        guard_in.push(format!("tcp dport {targets} {SYN} {ours} accept"));
        guard_in.push(format!("tcp dport {targets} {SYN} {others} reject with tcp reset"));
        // A connection of before that lingers (TIME_WAIT), or one that is being made, is no socket that has a mark. The
        // kernel knows what to do with a SYN for it; refused, its client could not use a port again for a minute.
        guard_in.push(format!("tcp dport {targets} {SYN} socket transparent {{ 0, 1 }} accept"));
        guard_in.push(format!("tcp dport {targets} {SYN} reject with tcp reset"));
    }
    if plan.dns {
        // The proxy's own queries in a zone of their own: an application's earlier query from the same port
        // has left an entry that would send them back to the proxy.
        raw_out.push(format!("udp dport 53 {} ct zone set 1", marked("==")));
        raw_in.push(format!("udp sport 53 {} ct zone set 1", marked("!=")));
        nat_out.push("udp dport 53 jump dns_redirect".to_owned());
        guard_out.push("udp dport 53 ct state new jump dns_refuse".to_owned());
        // The proxy answers the pod, not the world.
        guard_in.push(format!("iifname != \"lo\" udp dport {} drop", ports.dns));
    }
    if let Some(interfaces) = &virtual_interfaces {
        nat_in.push(format!("{interfaces} {SYN} redirect to :{}", ports.outbound));
        guard_in.push(format!("{interfaces} tcp dport {} accept", ports.outbound));
    }
    if !plan.inbound.is_empty() {
        nat_in.push(format!("{SYN} jump inbound_redirect"));
        guard_in.push(format!("tcp dport {} accept", ports.inbound_plaintext));
        guard_in.push(format!("{SYN} jump inbound_refuse"));
    }
    let keep = !MARK_MASK;
    let set = format!("& {keep:#010x} | {REPLY_MARK:#010x}");
    let remember = format!("iifname \"lo\" {} ct mark set ct mark {set}", marked("=="));
    let restore = format!(
        "ct mark & {MARK_MASK:#010x} == {REPLY_MARK:#010x} {} meta mark set meta mark {set}",
        marked("!=")
    );
    // Should the policy route be gone, an application's replies to ztunnel would leave for the client.
    let astray = format!("oifname != \"lo\" meta mark & {MARK_MASK:#010x} == {REPLY_MARK:#010x} drop");
    for (name, kind, hook, priority, lines) in [
        ("raw_prerouting", "filter", "prerouting", -300, raw_in),
        ("raw_output", "filter", "output", -300, raw_out),
        ("mangle_prerouting", "filter", "prerouting", -150, vec![remember]),
        ("mangle_output", "route", "output", -150, vec![restore]),
        ("nat_prerouting", "nat", "prerouting", -100, nat_in),
        ("nat_output", "nat", "output", -100, nat_out),
        ("guard_input", "filter", "input", 10, guard_in),
        ("guard_forward", "filter", "forward", 10, vec![format!("{SYN} jump forwarded_refuse")]),
        ("guard_output", "filter", "output", 10, guard_out),
        ("guard_postrouting", "filter", "postrouting", 10, vec![astray]),
    ] {
        if !lines.is_empty() {
            let base = format!("type {kind} hook {hook} priority {priority}; policy accept;");
            chain(text, name, Some(&base), lines);
        }
    }
}

fn chain(text: &mut String, name: &str, base: Option<&str>, lines: Vec<String>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "  chain {name} {{");
    for line in base.map(str::to_owned).into_iter().chain(lines) {
        let _ = writeln!(text, "    {line}");
    }
    let _ = writeln!(text, "  }}");
}

fn steps(steps: &[Step], way: Way, capture: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for (matcher, verdict) in steps {
        let verdict = match verdict {
            Verdict::Pass => "return",
            Verdict::Capture => capture,
        };
        lines.extend(matches(matcher, way).into_iter().map(|matched| format!("{matched}{verdict}")));
    }
    lines
}

/// What `matcher` is in nft's language: one rule or several, each ending in a space unless it is empty.
fn matches(matcher: &Matcher, way: Way) -> Vec<String> {
    let rules: Vec<String> = match matcher {
        Matcher::Any => return vec![String::new()],
        Matcher::Loopback => match way {
            Way::In => vec!["iifname \"lo\"".to_owned()],
            Way::Out => vec!["oifname \"lo\"".to_owned()],
            Way::Through => Vec::new(),
        },
        Matcher::LoopbackAddress => vec!["ip daddr 127.0.0.0/8".to_owned(), "ip6 daddr ::1".to_owned()],
        Matcher::FromZtunnel => vec![marked("==")],
        Matcher::Interfaces(names) => {
            let came = (way != Way::Out).then(|| interfaces("iifname", names)).flatten();
            let goes = (way != Way::In).then(|| interfaces("oifname", names)).flatten();
            came.into_iter().chain(goes).collect()
        }
        Matcher::Ports(ranges) => vec![format!("tcp dport {}", set(ranges.iter().map(PortRange::to_string)))],
        Matcher::Source(ip) => vec![format!("{} saddr {ip}", if ip.is_ipv4() { "ip" } else { "ip6" })],
        Matcher::Destination(ranges) => ["ip", "ip6"]
            .into_iter()
            .filter_map(|family| {
                let ranges = ranges.iter().filter(|range| matches!(range, IpNet::V4(_)) == (family == "ip"));
                let ranges: Vec<_> = ranges.map(IpNet::to_string).collect();
                (!ranges.is_empty()).then(|| format!("{family} daddr {}", set(ranges.into_iter())))
            })
            .collect(),
    };
    rules.into_iter().map(|rule| rule + " ").collect()
}

/// The packets of one connection but resets: ours pass this way too.
fn between(tuple: &Tuple, way: Way) -> String {
    let (source, destination) =
        if way == Way::In { (tuple.peer, tuple.local) } else { (tuple.local, tuple.peer) };
    let family = if source.is_ipv4() { "ip" } else { "ip6" };
    format!(
        "{family} saddr {} {family} daddr {} tcp sport {} tcp dport {} tcp flags & rst == 0x0",
        source.ip(),
        destination.ip(),
        source.port(),
        destination.port()
    )
}

fn marked(relation: &str) -> String {
    format!("meta mark & {MARK_MASK:#010x} {relation} {ZTUNNEL_MARK:#010x}")
}

fn interfaces(which: &str, names: &[InterfaceName]) -> Option<String> {
    let quoted = names.iter().map(|name| format!("\"{}\"", name.as_str()));
    (!names.is_empty()).then(|| format!("{which} {}", set(quoted)))
}

fn set(elements: impl Iterator<Item = String>) -> String {
    format!("{{ {} }}", elements.collect::<Vec<_>>().join(", "))
}
