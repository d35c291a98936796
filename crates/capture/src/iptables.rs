//! The iptables back-ends: the same rules for IPv4 and IPv6, in chains of our own in four tables.
//!
//! Each table is replaced in one step by `iptables-restore --noflush`. There is no step over all of them, so
//! the guard in `filter` goes in first and comes out last. Until the others are there too, it lets connections wait.
//! Our chains are the first of their hooks; a rule that someone puts before them is drift.

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Mutex;

use ipnet::IpNet;
use net::{MARK_MASK, Netns, ZTUNNEL_MARK};

use crate::backend::{Backend, Capture, Drift, Installed, check, compare};
use crate::error::{Error, Missing};
use crate::nf_tables::{self, Chain};
use crate::probe::{privileges, trial};
use crate::routing::{self, REPLY_MARK};
use crate::rules::{Guard, InterfaceName, Matcher, Plan, Rules, Step, Tuple, Verdict};
use crate::timeouts;
use crate::tool::{Tools, run};

/// New connections: of the four flags, SYN alone.
const SYN: &str = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN";
const NOT_SYN: &str = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN";
/// Our chains start with it.
const OURS: &str = "CULVERT_";
/// Prefix of an empty chain that says: the built-in chain behind the prefix wasn't there before us, and goes
/// with us. Only iptables-nft has chains that come and go.
const MADE_BY_US: &str = "CULVERT_MADE_";
/// The tables in the order of installation; their built-in chains and our chains behind them.
const TABLES: [(&str, &[(&str, &str)]); 4] = [
    ("filter", &[("INPUT", "CULVERT_INPUT"), ("FORWARD", "CULVERT_FORWARD"), ("OUTPUT", "CULVERT_OUTPUT")]),
    ("raw", &[("PREROUTING", "CULVERT_PRERT"), ("OUTPUT", "CULVERT_OUTPUT")]),
    (
        "mangle",
        &[
            ("PREROUTING", "CULVERT_PRERT"),
            ("INPUT", "CULVERT_INPUT"),
            ("OUTPUT", "CULVERT_OUTPUT"),
            ("POSTROUTING", "CULVERT_POSTRT"),
        ],
    ),
    ("nat", &[("PREROUTING", "CULVERT_PRERT"), ("OUTPUT", "CULVERT_OUTPUT")]),
];
/// Seconds to wait for the lock that all iptables-legacy programs of the machine share.
const RESTORE: [&str; 3] = ["--noflush", "-w", "10"];
const REMEMBERED: usize = 32;

/// Capture by iptables, of either flavour.
#[derive(Debug)]
pub struct Iptables {
    backend: Backend,
    version: String,
    /// Whether this kernel knows whose socket a packet is for (`xt_socket`).
    by_socket: bool,
    ipv4: Programs,
    /// `None` when the kernel has no IPv6.
    ipv6: Option<Programs>,
    /// How iptables-save shows given rules, to compare with; IPv4 and IPv6.
    listings: Mutex<VecDeque<(Rules, Vec<Vec<String>>)>>,
}

#[derive(Clone, Debug)]
struct Programs {
    v6: bool,
    save: PathBuf,
    restore: PathBuf,
}

impl Iptables {
    /// Finds the programs of iptables-nft and loads the rules into an empty namespace, to see that they work.
    ///
    /// # Errors
    /// What is missing.
    pub fn probe_nft(tools: &Tools) -> Result<Self, Missing> {
        Self::probe(tools, Backend::IptablesNft, "nft")
    }

    /// Finds the programs of iptables-legacy and loads the rules into an empty namespace, to see that they work.
    ///
    /// # Errors
    /// What is missing.
    pub fn probe_legacy(tools: &Tools) -> Result<Self, Missing> {
        Self::probe(tools, Backend::IptablesLegacy, "legacy")
    }

    fn probe(tools: &Tools, backend: Backend, flavour: &str) -> Result<Self, Missing> {
        let find = |v6| -> Result<Programs, Missing> {
            let family = if v6 { "ip6tables" } else { "iptables" };
            // Where a distribution has one flavour only, its programs have the plain names; the version says
            // which it is, see below.
            let program = |what| {
                let names = [format!("{family}-{flavour}-{what}"), format!("{family}-{what}")];
                tools.find(&names.each_ref().map(String::as_str), "iptables")
            };
            Ok(Programs { v6, save: program("save")?, restore: program("restore")? })
        };
        let ipv4 = find(false)?;
        let ipv6 = if routing::kernel_has_ipv6() { Some(find(true)?) } else { None };
        privileges()?;
        let (version, listings) = (String::new(), Mutex::default());
        let mut found = Self { backend, version, by_socket: true, ipv4, ipv6, listings };
        found.by_socket = trial(|netns| found.install(netns, &Rules::default())).is_ok();
        let mut is_flavour = false;
        trial(|netns| {
            found.version = run(netns, &found.ipv4.restore, &["--version"], "")?.trim().to_owned();
            is_flavour = found.version.contains("nf_tables") == (backend == Backend::IptablesNft);
            found.install(netns, &Rules::default())
        })?;
        if is_flavour {
            Ok(found)
        } else {
            Err(Missing::Tool { tool: format!("iptables-{flavour}-restore"), package: "iptables" })
        }
    }

    fn plan(&self, rules: &Rules) -> Plan {
        let mut plan = Plan::new(rules);
        if !self.by_socket {
            plan.targets.clear();
        }
        plan
    }

    fn families(&self) -> impl Iterator<Item = &Programs> {
        std::iter::once(&self.ipv4).chain(&self.ipv6)
    }

    /// How the rules look when they are installed, for each family: found by installing them in an empty
    /// namespace, since the form differs between versions.
    fn expected(&self, rules: &Rules) -> Result<Vec<Vec<String>>, Error> {
        if let Ok(listings) = self.listings.lock()
            && let Some((_, listing)) = listings.iter().find(|(known, _)| known == rules)
        {
            return Ok(listing.clone());
        }
        let netns = Netns::new_empty()
            .map_err(|source| Error::Enter { netns: "an empty namespace".to_owned(), source })?;
        let plan = self.plan(rules);
        let mut found = Vec::new();
        for programs in self.families() {
            programs.load(&netns, self.backend, &plan, &Saved::default())?;
            found.push(programs.saved(&netns)?.ours());
        }
        if let Ok(mut listings) = self.listings.lock() {
            listings.truncate(REMEMBERED - 1);
            listings.push_front((rules.clone(), found.clone()));
        }
        Ok(found)
    }
}

impl Capture for Iptables {
    fn backend(&self) -> Backend {
        self.backend
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn guards_ports(&self) -> bool {
        self.by_socket
    }

    fn install(&self, netns: &Netns, rules: &Rules) -> Result<Installed, Error> {
        check(rules)?;
        let plan = self.plan(rules);
        // Routes first, for the replies of what is captured next; without them too, so that nothing passes.
        let routing = routing::install(netns);
        let mut changed = false;
        for (number, programs) in self.families().enumerate() {
            let saved = programs.saved(netns)?;
            let ours = saved.ours();
            if ours.is_empty() || self.expected(rules)?.get(number) != Some(&ours) {
                programs.load(netns, self.backend, &plan, &saved)?;
                changed = true;
            }
        }
        let raised = timeouts::raise(netns);
        let (routed, ipv6) = routing?;
        Ok(Installed { changed: changed || routed || raised, ipv6 })
    }

    fn verify(&self, netns: &Netns, rules: &Rules) -> Result<Drift, Error> {
        check(rules)?;
        let mut drift = Drift::default();
        let expected = self.expected(rules)?;
        for (programs, expected) in self.families().zip(&expected) {
            let family = if programs.v6 { "ipv6" } else { "ipv4" };
            let found = compare(expected, &programs.saved(netns)?.ours());
            let named = |lines: Vec<String>| lines.into_iter().map(move |line| format!("{family} {line}"));
            drift.missing.extend(named(found.missing));
            drift.unexpected.extend(named(found.unexpected));
        }
        drift.missing.extend(routing::missing(netns)?);
        drift.missing.extend(timeouts::missing(netns));
        Ok(drift)
    }

    fn remove(&self, netns: &Netns) -> Result<bool, Error> {
        let mut changed = false;
        for programs in self.families() {
            let saved = programs.saved(netns)?;
            if saved.ours().is_empty() {
                continue;
            }
            changed = true;
            run(netns, &programs.restore, &RESTORE, &removal(&saved))?;
            if self.backend == Backend::IptablesNft {
                programs.remove_made(netns, &saved)?;
            }
        }
        if changed {
            timeouts::put_back(netns);
        }
        Ok(routing::remove(netns)? || changed)
    }
}

impl Programs {
    fn saved(&self, netns: &Netns) -> Result<Saved, Error> {
        run(netns, &self.save, &[], "").map(|text| Saved::parse(&text))
    }

    fn load(&self, netns: &Netns, backend: Backend, plan: &Plan, saved: &Saved) -> Result<(), Error> {
        let mut made = saved.made_by_us();
        if backend == Backend::IptablesNft {
            let there = nf_tables::chains(netns, self.v6).map_err(|source| listing_failed(netns, source))?;
            let builtin =
                TABLES.iter().flat_map(|(table, hooks)| hooks.iter().map(|(hook, _)| (*table, *hook)));
            let new = builtin.map(|(table, hook)| Chain { table: table.to_owned(), name: hook.to_owned() });
            made.extend(new.filter(|chain| !there.contains(chain)));
        }
        let loaded = run(netns, &self.restore, &RESTORE, &installation(plan, self.v6, saved, &made));
        if loaded.is_err() && is_enrolment(saved) {
            // What was loaded of it is a guard that waits for the rest: it is to refuse, and queries too. If not even the guard is
            // there, this fails.
            let _ = run(netns, &self.restore, &RESTORE, &final_guard(plan, self.v6));
        }
        loaded.map(drop)
    }

    /// Deletes the built-in chains that came with us, and tables that are empty then, unless someone else uses
    /// them by now.
    fn remove_made(&self, netns: &Netns, before: &Saved) -> Result<(), Error> {
        let after = self.saved(netns)?;
        let unused = |chain: &Chain| {
            let rule = format!("-A {} ", chain.name);
            let table = after.table(&chain.table);
            !table.is_some_and(|table| table.rules.iter().any(|other| other.starts_with(&rule)))
        };
        let there = nf_tables::chains(netns, self.v6).map_err(|source| listing_failed(netns, source))?;
        let mut made = before.made_by_us();
        made.retain(|chain| there.contains(chain) && unused(chain));
        let mut tables: Vec<_> = made.iter().map(|chain| chain.table.clone()).collect();
        tables.dedup();
        tables.retain(|table| there.iter().all(|chain| chain.table != *table || made.contains(chain)));
        nf_tables::delete(netns, self.v6, &made, &tables).map_err(|source| Error::Netlink {
            action: "delete empty iptables chains",
            netns: netns.to_string(),
            source,
        })
    }
}

fn listing_failed(netns: &Netns, source: std::io::Error) -> Error {
    Error::Netlink { action: "list the chains of iptables", netns: netns.to_string(), source }
}

/// What iptables-save printed.
#[derive(Clone, Debug, Default)]
struct Saved {
    tables: Vec<Table>,
}

#[derive(Clone, Debug)]
struct Table {
    name: String,
    /// `INPUT ACCEPT`, `CULVERT_INPUT -`: name and policy.
    chains: Vec<String>,
    /// `-A INPUT ...`, in order.
    rules: Vec<String>,
}

impl Saved {
    fn parse(text: &str) -> Self {
        let mut tables: Vec<Table> = Vec::new();
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('*') {
                tables.push(Table { name: name.to_owned(), chains: Vec::new(), rules: Vec::new() });
            } else if let Some(table) = tables.last_mut() {
                if let Some(chain) = line.strip_prefix(':') {
                    // Without its counters.
                    let chain = chain.split(" [").next().unwrap_or_default();
                    table.chains.push(chain.to_owned());
                } else if line.starts_with("-A ") {
                    table.rules.push(line.to_owned());
                }
            }
        }
        Self { tables }
    }

    fn table(&self, name: &str) -> Option<&Table> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// The built-in chains that weren't there before us.
    fn made_by_us(&self) -> Vec<Chain> {
        let of_table = |table: &Table| {
            let names = table.chains.iter().filter_map(|chain| chain.split(' ').next());
            let hooks = names.filter_map(|name| name.strip_prefix(MADE_BY_US));
            hooks.map(|hook| Chain { table: table.name.clone(), name: hook.to_owned() }).collect::<Vec<_>>()
        };
        self.tables.iter().flat_map(of_table).collect()
    }

    /// Our chains and their rules, and the places of the jumps to them.
    fn ours(&self) -> Vec<String> {
        let mut ours = Vec::new();
        for (name, hooks) in TABLES {
            let Some(table) = self.table(name) else { continue };
            let mut chains: Vec<_> = table
                .chains
                .iter()
                .filter(|chain| chain.starts_with(OURS) && !chain.starts_with(MADE_BY_US))
                .map(|chain| format!("{name} :{chain}"))
                .collect();
            chains.sort();
            ours.extend(chains);
            let rules = table.rules.iter().filter(|rule| rule.starts_with(&format!("-A {OURS}")));
            ours.extend(rules.map(|rule| format!("{name} {rule}")));
            for (hook, chain) in hooks {
                let places = table.jumps(hook, chain);
                ours.extend(places.map(|place| format!("{name} {hook} rule {} -j {chain}", place + 1)));
            }
        }
        ours
    }
}

impl Table {
    /// Places among the rules of `hook` that jump to `chain`, from 0.
    fn jumps(&self, hook: &str, chain: &str) -> impl Iterator<Item = usize> {
        let (hook, jump) = (format!("-A {hook} "), format!("-A {hook} -j {chain}"));
        let of_hook = self.rules.iter().filter(move |rule| rule.starts_with(&hook));
        of_hook.enumerate().filter(move |(_, rule)| **rule == jump).map(|(place, _)| place)
    }
}

/// Whether nothing was captured so far.
fn is_enrolment(saved: &Saved) -> bool {
    !saved.ours().iter().any(|rule| rule.contains("REDIRECT"))
}

/// Input for iptables-restore that has the guard refuse.
fn final_guard(plan: &Plan, v6: bool) -> String {
    let [(name, hooks), ..] = TABLES;
    let mut text = format!("*{name}\n");
    for (_, chain) in hooks {
        // Writing to a string can't fail.
        let _ = writeln!(text, ":{chain} - [0:0]");
        fill(&mut text, chain, rules(plan, v6, name, chain, Guard::Final));
    }
    text.push_str("COMMIT\n");
    text
}

/// Input for iptables-restore that brings our chains in, whatever of them is there.
fn installation(plan: &Plan, v6: bool, saved: &Saved, made: &[Chain]) -> String {
    let mut text = String::new();
    let enrols = is_enrolment(saved);
    let guard = if enrols { Guard::OfEnrolment } else { Guard::Final };
    for (name, hooks) in TABLES {
        let table = saved.table(name);
        // Writing to a string can't fail.
        let _ = writeln!(text, "*{name}");
        for chain in made.iter().filter(|chain| chain.table == name) {
            let _ = writeln!(text, ":{MADE_BY_US}{} - [0:0]", chain.name);
        }
        for (hook, chain) in hooks {
            // Declaring a chain empties it.
            let _ = writeln!(text, ":{chain} - [0:0]");
            let places: Vec<_> = table.map(|table| table.jumps(hook, chain).collect()).unwrap_or_default();
            if places != [0] {
                for _ in places {
                    let _ = writeln!(text, "-D {hook} -j {chain}");
                }
                let _ = writeln!(text, "-I {hook} 1 -j {chain}");
            }
            fill(&mut text, chain, rules(plan, v6, name, chain, guard));
        }
        text.push_str("COMMIT\n");
    }
    if enrols {
        text.push_str(&final_guard(plan, v6));
    }
    text
}

fn fill(text: &mut String, chain: &str, rules: Vec<String>) {
    for rule in rules {
        let _ = writeln!(text, "-A {chain} {rule}");
    }
}

/// Input for iptables-restore that takes our chains out, the guard last.
fn removal(saved: &Saved) -> String {
    let mut text = String::new();
    for (name, hooks) in TABLES.into_iter().rev() {
        let Some(table) = saved.table(name) else { continue };
        let _ = writeln!(text, "*{name}");
        for (hook, chain) in hooks {
            for _ in table.jumps(hook, chain) {
                let _ = writeln!(text, "-D {hook} -j {chain}");
            }
        }
        let names = table.chains.iter().filter_map(|chain| chain.split(' ').next());
        let ours: Vec<_> = names.filter(|chain| chain.starts_with(OURS)).collect();
        for chain in &ours {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        for chain in &ours {
            let _ = writeln!(text, "-X {chain}");
        }
        text.push_str("COMMIT\n");
    }
    text
}

/// The rules of one of our chains.
fn rules(plan: &Plan, v6: bool, table: &str, chain: &str, guard: Guard) -> Vec<String> {
    let ports = plan.ports;
    let to = |port: u16| format!("REDIRECT --to-ports {port}");
    let (refuse, refuse_query) = match guard {
        Guard::OfEnrolment => ("DROP", "RETURN"),
        Guard::Final => ("REJECT --reject-with tcp-reset", "REJECT"),
    };
    match (table, chain) {
        ("filter", "CULVERT_INPUT") => guard_input(plan, v6, refuse),
        ("filter", "CULVERT_FORWARD") => {
            let mut lines = vec!["! -p tcp -j RETURN".to_owned(), format!("{NOT_SYN} -j RETURN")];
            lines.extend(steps(&plan.forwarded, Way::Through, v6, refuse));
            lines
        }
        ("filter", _) => {
            let query = format!("-m conntrack --ctstate NEW -j {refuse_query}");
            let dns = (query.as_str(), format!("-j {refuse}"));
            let mut lines = refused(plan, Way::Out, v6);
            lines.extend(outbound(plan, v6, refuse, &dns));
            lines
        }
        ("nat", "CULVERT_PRERT") => {
            let mut lines: Vec<_> = plan
                .virtual_interfaces
                .iter()
                .map(|interface| format!("-i {} {SYN} -j {}", interface.as_str(), to(ports.outbound)))
                .collect();
            lines.extend(["! -p tcp -j RETURN".to_owned(), format!("{NOT_SYN} -j RETURN")]);
            lines.extend(steps(&plan.inbound, Way::In, v6, &to(ports.inbound_plaintext)));
            lines
        }
        ("nat", _) => {
            let dns = format!("-j {}", to(ports.dns));
            outbound(plan, v6, &to(ports.outbound), &(&dns, dns.clone()))
        }
        // The proxy's own queries in a zone of their own: an application's earlier query from the same port
        // has left an entry that would send them back to the proxy.
        ("raw", "CULVERT_PRERT") if plan.dns => {
            vec![format!("-p udp -m udp --sport 53 {} -j CT --zone 1", marked("! "))]
        }
        ("raw", _) if plan.dns => vec![format!("-p udp -m udp --dport 53 {} -j CT --zone 1", marked(""))],
        ("mangle", "CULVERT_PRERT") => {
            vec![format!("-i lo {} -j CONNMARK --set-xmark {REPLY_MARK:#x}/{MARK_MASK:#x}", marked(""))]
        }
        // Gives a packet the mark of the socket that it is for, which the guard looks at next. A connection of before that
        // lingers (TIME_WAIT), or one that is being made, has none to restore and keeps ours: the kernel knows what to do
        // with a SYN for it; refused, its client could not use a port again for a minute.
        ("mangle", "CULVERT_INPUT") => {
            let mark = |port| {
                let socket = format!("{SYN} --dport {port} -m socket --nowildcard");
                let ours = format!("{socket} -j MARK --set-xmark {ZTUNNEL_MARK:#x}/{MARK_MASK:#x}");
                [ours, format!("{socket} --restore-skmark")]
            };
            plan.targets.iter().flat_map(mark).collect()
        }
        // Should the policy route be gone, an application's replies to ztunnel would leave for the client.
        ("mangle", "CULVERT_POSTRT") => {
            vec![format!("! -o lo -m mark --mark {REPLY_MARK:#x}/{MARK_MASK:#x} -j DROP")]
        }
        ("mangle", _) => vec![format!(
            "{} -m connmark --mark {REPLY_MARK:#x}/{MARK_MASK:#x} -j MARK --set-xmark {REPLY_MARK:#x}/{MARK_MASK:#x}",
            marked("! ")
        )],
        _ => Vec::new(),
    }
}

fn guard_input(plan: &Plan, v6: bool, refuse: &str) -> Vec<String> {
    let ports = plan.ports;
    let mut lines = refused(plan, Way::In, v6);
    lines.push(format!("{NOT_SYN} -j RETURN"));
    if plan.dns {
        // The proxy answers the pod, not the world.
        lines.push(format!("! -i lo -p udp -m udp --dport {} -j DROP", ports.dns));
    }
    lines.push("! -p tcp -j RETURN".to_owned());
    // Any process of the pod may bind these ports while no ztunnel has them.
    for port in &plan.targets {
        lines.push(format!("-p tcp -m tcp --dport {port} {} -j {refuse}", marked("! ")));
    }
    for interface in &plan.virtual_interfaces {
        lines.push(format!("-i {} -p tcp -m tcp --dport {} -j RETURN", interface.as_str(), ports.outbound));
    }
    lines.push(format!("-p tcp -m tcp --dport {} -j RETURN", ports.inbound_plaintext));
    lines.extend(steps(&plan.inbound, Way::In, v6, refuse));
    lines
}

/// A chain for outgoing packets; `dns` is what happens to queries over UDP and over TCP.
fn outbound(plan: &Plan, v6: bool, capture: &str, dns: &(&str, String)) -> Vec<String> {
    let mut lines = vec![format!("{NOT_SYN} -j RETURN")];
    lines.extend(steps(&plan.outbound_always, Way::Out, v6, capture));
    if plan.dns {
        lines.push(format!("-p udp -m udp --dport 53 {}", dns.0));
        lines.push(format!("-p tcp -m tcp --dport 53 {}", dns.1));
    }
    lines.push("! -p tcp -j RETURN".to_owned());
    lines.extend(steps(&plan.outbound, Way::Out, v6, capture));
    lines
}

/// Resets for the connections that are no longer allowed, but not for resets: ours pass this way too.
fn refused(plan: &Plan, way: Way, v6: bool) -> Vec<String> {
    let line = |tuple: &Tuple| {
        let (source, destination) =
            if way == Way::In { (tuple.peer, tuple.local) } else { (tuple.local, tuple.peer) };
        format!(
            "-s {} -d {} -p tcp -m tcp --sport {} --dport {} --tcp-flags RST NONE -j REJECT --reject-with tcp-reset",
            source.ip(),
            destination.ip(),
            source.port(),
            destination.port()
        )
    };
    plan.refused.iter().filter(|tuple| tuple.local.is_ipv6() == v6).map(line).collect()
}

/// Which way a chain's packets go, which decides what "interface" means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
    Through,
}

fn steps(steps: &[Step], way: Way, v6: bool, capture: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for (matcher, verdict) in steps {
        let verdict = match verdict {
            Verdict::Pass => "RETURN",
            Verdict::Capture => capture,
        };
        lines.extend(matches(matcher, way, v6).into_iter().map(|matched| format!("{matched}-j {verdict}")));
    }
    lines
}

/// What `matcher` is in iptables' language: one rule or several, each ending in a space unless it is empty.
fn matches(matcher: &Matcher, way: Way, v6: bool) -> Vec<String> {
    let of_family = |is_v4: bool| is_v4 != v6;
    let rules: Vec<String> = match matcher {
        Matcher::Any => vec!["-p tcp".to_owned()],
        Matcher::Loopback => match way {
            Way::In => vec!["-i lo".to_owned()],
            Way::Out => vec!["-o lo".to_owned()],
            Way::Through => Vec::new(),
        },
        Matcher::LoopbackAddress => vec![if v6 { "-d ::1/128" } else { "-d 127.0.0.0/8" }.to_owned()],
        Matcher::FromZtunnel => vec![marked("")],
        Matcher::Interfaces(names) => {
            let each =
                |option: &'static str| move |name: &InterfaceName| format!("{option} {}", name.as_str());
            let came = names.iter().filter(|_| way != Way::Out).map(each("-i"));
            let goes = names.iter().filter(|_| way != Way::In).map(each("-o"));
            came.chain(goes).collect()
        }
        Matcher::Ports(ranges) => ranges
            .iter()
            .map(|range| format!("-p tcp -m tcp --dport {}:{}", range.first(), range.last()))
            .collect(),
        Matcher::Source(ip) if of_family(ip.is_ipv4()) => vec![format!("-s {ip}")],
        Matcher::Source(_) => Vec::new(),
        Matcher::Destination(ranges) => ranges
            .iter()
            .filter(|range| of_family(matches!(range, IpNet::V4(_))))
            .map(|range| format!("-p tcp -d {range}"))
            .collect(),
    };
    rules.into_iter().map(|rule| rule + " ").collect()
}

fn marked(not: &str) -> String {
    format!("-m mark {not}--mark {ZTUNNEL_MARK:#x}/{MARK_MASK:#x}")
}
