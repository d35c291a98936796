//! What the leader has written, and what it has to write next: decided without I/O.
//!
//! An object is looked at when it, or how proxies stand with it, has changed; all are when something changes that is said
//! of all, such as a proxy that comes or goes. Where nothing changes nothing is looked at, whatever the number of objects.
//!
//! Who changed last comes first: what waits is in the order in which it began to wait, and a part of each round
//! ([`FOR_OTHERS`]) is for what only says the same in other words, or is looked at because another leads now. So neither
//! keeps the other waiting for ever. A policy that is enforced does not lose that for a proxy that connects anew; one that
//! is away, or behind, for [`FRESH`] counts, and of a new version at once.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use config::resource::Kind;
use tokio::time::Instant;

use super::conditions::{self, Condition, ENFORCED, Setting, Tally};
use super::followers::{Followed, Followers, Table, resource_of};
use super::peers::{Peers, Stand};
use super::proxies::Proxies;
use super::{FRESH, is_policy};
use crate::alive::{Life, Ztunnel};
use crate::push::Exceptions;
use crate::registry::{ObjectName, ObjectState, ObjectVersion};

/// How many objects are written in a round.
pub const WRITES: usize = 40;
/// How many of these are for what is said in other words.
const FOR_OTHERS: usize = 8;
/// How many objects are looked at in a round.
const LOOKS: usize = 2000;
/// How far apart all are looked at.
const ALL: Duration = Duration::from_secs(5);
/// How long other words of the same wait, when nothing is pending; and when something is.
const LEISURE: Duration = Duration::from_secs(30);
const PROGRESS: Duration = Duration::from_secs(2);
/// How long one that could not be written is left alone.
const AFTER_ERROR: Duration = Duration::from_secs(30);
/// How many are named who are not counted.
const MOST_APART: usize = 5;

/// All that is known in a round.
pub struct World<'a> {
    /// The policies and the other objects.
    pub followers: &'a Followers,
    /// This control plane's proxies.
    pub proxies: &'a Proxies,
    /// The other control planes.
    pub peers: &'a Peers,
    /// The policies about which one of them says something new.
    pub told: Vec<String>,
    /// All node proxies; `None` while they are not known.
    pub ztunnels: Option<&'a [Ztunnel]>,
    /// All pods of waypoints; `None` while they are not known.
    pub waypoints: Option<&'a [Ztunnel]>,
    /// What proxies of another make are told otherwise.
    pub exceptions: &'a Exceptions,
}

/// What objects are judged by.
struct Look<'a> {
    world: &'a World<'a>,
    table: &'a Table,
    now: Instant,
}

/// An object that is to be written.
#[derive(Clone, Debug)]
pub struct Due {
    /// Which.
    pub name: ObjectName,
    /// Of what.
    pub state: ObjectState,
    /// What.
    pub conditions: Vec<Condition>,
}

/// What was written last of an object.
#[derive(Debug)]
struct Written {
    version: ObjectVersion,
    conditions: Vec<Condition>,
    at: Instant,
}

/// Why an object is looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Rank {
    Changed,
    Other,
}

/// What is to be done with an object.
#[derive(Debug)]
enum Verdict {
    /// Nothing, until something changes.
    Settled,
    /// Nothing yet.
    Open,
    /// To be looked at then.
    Later(Instant),
    /// To be written.
    Due(Box<Due>),
    /// To be written, when there is room: it says the same as before.
    Reworded(Box<Due>),
}

/// What is the same for all policies that the same control planes read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Class {
    /// Proxies that are alive and connected to none.
    absent: Tally,
    setting: Setting,
}

/// What is the same for all policies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Outline {
    counts: Vec<(usize, usize)>,
    silent: usize,
    /// Of policies that all revisions read.
    unlabelled: Class,
    /// Of policies that a label gives to this one.
    labelled: Class,
    /// Pods of waypoints that are alive and connected to none, by their Gateway.
    absent_waypoints: BTreeMap<Arc<str>, Tally>,
    /// Whether this revision writes what has no label.
    owns: bool,
}

impl Outline {
    fn class(&self, labelled: bool) -> &Class {
        if labelled { &self.labelled } else { &self.unlabelled }
    }
}

/// Objects in the order in which they began to wait.
type Queue = BTreeSet<(Instant, ObjectName)>;

/// See the module's documentation.
pub struct Ledger {
    revision: Arc<str>,
    written: HashMap<ObjectName, Written>,
    changed: Queue,
    others: Queue,
    places: HashMap<ObjectName, (Rank, Instant)>,
    /// Objects that are to be looked at then.
    later: Queue,
    /// The last change that was taken from the followers.
    number: u64,
    outline: Outline,
    /// All policies are to be looked at, since that changed.
    all: bool,
    all_at: Option<Instant>,
    /// Policies that not all proxies enforced in the last round.
    excepted: BTreeMap<ObjectName, Tally>,
    /// Since when a proxy is connected to none.
    absent: HashMap<Arc<str>, Instant>,
    began: Instant,
    looks: u64,
}

impl Ledger {
    /// Of a control plane of this revision.
    #[must_use]
    pub fn new(revision: &str) -> Self {
        Self {
            revision: revision.into(),
            written: HashMap::new(),
            changed: Queue::new(),
            others: Queue::new(),
            places: HashMap::new(),
            later: Queue::new(),
            number: 0,
            outline: Outline::default(),
            all: false,
            all_at: None,
            excepted: BTreeMap::new(),
            absent: HashMap::new(),
            began: Instant::now(),
            looks: 0,
        }
    }

    /// Begins anew: another may have written meanwhile.
    pub fn begin(&mut self) {
        *self = Self { looks: self.looks, ..Self::new(&self.revision.clone()) };
    }

    /// How many objects wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.places.len()
    }

    /// How many objects were looked at so far.
    #[must_use]
    pub fn looks(&self) -> u64 {
        self.looks
    }

    /// Whether something may change without being told.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let quiet = self.places.is_empty() && !self.all;
        quiet && self.excepted.is_empty() && self.absent.is_empty() && self.outline.silent == 0
    }

    /// When something that is put off is to be looked at.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.later.first().map(|(at, _)| *at)
    }

    /// The nodes of those of these proxies that are connected to none.
    pub fn doubted(&self, proxies: &[Ztunnel]) -> HashSet<Arc<str>> {
        let absent = proxies.iter().filter(|z| self.absent.contains_key(&*z.name()));
        absent.map(|z| z.node.clone()).collect()
    }

    /// What is to be written now.
    pub fn due(&mut self, world: &World<'_>) -> Vec<Due> {
        let now = Instant::now();
        let table = world.followers.lock();
        self.gather(world, &table, now);
        let mut due = Vec::new();
        let for_others = self.others.len().min(FOR_OTHERS);
        let look = Look { world, table: &table, now };
        self.go_through(Rank::Changed, WRITES - for_others, &look, &mut due);
        self.go_through(Rank::Other, WRITES, &look, &mut due);
        due
    }

    /// What was written, or why not.
    pub fn wrote(&mut self, due: Due, outcome: Result<(), ()>) {
        let now = Instant::now();
        let Due { name, state, conditions } = due;
        match outcome {
            Ok(()) => {
                self.written.insert(name, Written { version: state.version, conditions, at: now });
            }
            Err(()) => {
                self.later.insert((now + AFTER_ERROR, name));
            }
        }
    }

    /// Puts in the queue what has to be looked at.
    fn gather(&mut self, world: &World<'_>, table: &Table, now: Instant) {
        if self.number == 0 || !table.reaches(self.number) {
            // Nothing is known of what was there before.
            table.names().for_each(|name| self.enqueue(name, Rank::Other, now));
        } else {
            for (name, _) in table.between(self.number, table.last()) {
                self.enqueue(name, Rank::Changed, now);
            }
        }
        self.number = table.last();
        let excepted = world.proxies.exceptions(table);
        let before = std::mem::take(&mut self.excepted);
        let changed = excepted.iter().filter(|(name, tally)| before.get(*name) != Some(tally));
        changed.for_each(|(name, _)| self.enqueue(name, Rank::Changed, now));
        before
            .keys()
            .filter(|n| !excepted.contains_key(*n))
            .for_each(|n| self.enqueue(n, Rank::Changed, now));
        self.excepted = excepted;
        let told = world.told.iter().filter_map(|label| name_of(label)).filter(|n| table.get(n).is_some());
        told.for_each(|name| self.enqueue(&name, Rank::Changed, now));
        while let Some((_, name)) = self.later.first().filter(|(at, _)| *at <= now).cloned() {
            self.later.pop_first();
            self.enqueue(&name, Rank::Other, now);
        }
        self.note_absent(world, now);
        let outline = self.outline(world);
        if outline != self.outline {
            (self.outline, self.all) = (outline, true);
        }
        if self.all && self.all_at.is_none_or(|at| at.elapsed() >= ALL) {
            table.names().filter(|n| is_policy(n.kind)).for_each(|n| self.enqueue(n, Rank::Other, now));
            (self.all, self.all_at) = (false, Some(now));
        }
    }

    fn enqueue(&mut self, name: &ObjectName, rank: Rank, since: Instant) {
        let place = self.places.get(name).copied();
        if place.is_some_and(|(old, _)| old <= rank) {
            return;
        }
        if let Some((old, since)) = place {
            self.queue(old).remove(&(since, name.clone()));
        }
        self.queue(rank).insert((since, name.clone()));
        self.places.insert(name.clone(), (rank, since));
    }

    fn queue(&mut self, rank: Rank) -> &mut Queue {
        match rank {
            Rank::Changed => &mut self.changed,
            Rank::Other => &mut self.others,
        }
    }

    fn note_absent(&mut self, world: &World<'_>, now: Instant) {
        let (Some(ztunnels), Some(waypoints)) = (world.ztunnels, world.waypoints) else { return };
        let before = std::mem::take(&mut self.absent);
        for ztunnel in ztunnels.iter().chain(waypoints).filter(|z| z.life == Life::Running) {
            let name: Arc<str> = ztunnel.name().into();
            if !is_connected(world, &name) {
                let since = before.get(&name).copied().unwrap_or(now);
                self.absent.insert(name, since);
            }
        }
    }

    /// What is the same for all policies now.
    fn outline(&self, world: &World<'_>) -> Outline {
        let peers = world.peers.all();
        let mut revisions: BTreeSet<&str> = peers.iter().map(|peer| &*peer.place.revision).collect();
        revisions.insert(&self.revision);
        let owner = if revisions.contains("default") { "default" } else { revisions.first().unwrap_or(&"") };
        let mut counts = vec![(world.proxies.ours(), world.proxies.others())];
        counts.extend(peers.iter().map(super::peers::Peer::counts));
        let silent = peers.iter().filter(|peer| !peer.has_said()).count();
        let apart = apart(world);
        let class = |labelled: bool| {
            let of = match (revisions.len(), labelled) {
                (1, _) => String::new(),
                (_, true) => format!(" of the revision {}", self.revision),
                _ => {
                    format!(" of the revisions {}", revisions.iter().copied().collect::<Vec<_>>().join(", "))
                }
            };
            Class { absent: self.absent(world, labelled), setting: Setting { of, apart: apart.clone() } }
        };
        Outline {
            counts,
            silent: silent + usize::from(!world.peers.are_known()),
            unlabelled: class(false),
            labelled: class(true),
            absent_waypoints: self.absent_waypoints(world),
            // Who does not know of others could spoil what they write.
            owns: *self.revision == *owner && (world.peers.are_known() || owner == "default"),
        }
    }

    /// Those that are alive and connected to none, of all revisions or of this one.
    fn absent(&self, world: &World<'_>, labelled: bool) -> Tally {
        let mut tally = Tally::default();
        for ztunnel in world.ztunnels.unwrap_or_default() {
            let own = ztunnel.revision.as_ref().is_none_or(|revision| *revision == self.revision);
            let name = ztunnel.name();
            if let Some(since) = self.absent.get(&*name).filter(|_| own || !labelled) {
                tally.wait_for(&format!("{name} (not connected)").into(), since.elapsed() < FRESH);
            }
        }
        tally
    }

    /// Pods of waypoints that are alive and connected to none.
    fn absent_waypoints(&self, world: &World<'_>) -> BTreeMap<Arc<str>, Tally> {
        let mut absent: BTreeMap<Arc<str>, Tally> = BTreeMap::new();
        for waypoint in world.waypoints.unwrap_or_default() {
            let name = waypoint.name();
            if let (Some(since), Some(gateway)) = (self.absent.get(&*name), &waypoint.gateway) {
                let tally = absent.entry(gateway.clone()).or_default();
                tally.wait_for(&format!("{name} (not connected)").into(), since.elapsed() < FRESH);
            }
        }
        absent
    }

    /// Looks at what waits under a rank, until so many are due.
    fn go_through(&mut self, rank: Rank, most: usize, look: &Look<'_>, due: &mut Vec<Due>) {
        let (mut again, mut reworded) = (Vec::new(), 0);
        for _ in 0..LOOKS {
            if due.len() >= most {
                break;
            }
            let Some((since, name)) = self.queue(rank).pop_first() else { break };
            self.places.remove(&name);
            self.looks += 1;
            match self.judge(&name, look.world, look.table) {
                Verdict::Settled => {}
                Verdict::Open => again.push((name, look.now)),
                Verdict::Later(at) => {
                    self.later.insert((at, name));
                }
                Verdict::Due(wanted) => due.push(*wanted),
                Verdict::Reworded(_) if reworded >= FOR_OTHERS => again.push((name, since)),
                Verdict::Reworded(wanted) => {
                    reworded += 1;
                    due.push(*wanted);
                }
            }
        }
        again.iter().for_each(|(name, since)| self.enqueue(name, rank, *since));
    }

    fn judge(&mut self, name: &ObjectName, world: &World<'_>, table: &Table) -> Verdict {
        let Some(followed) = table.get(name) else {
            self.written.remove(name);
            return Verdict::Settled;
        };
        let state = &followed.state;
        if !state.version.labelled && !self.outline.owns {
            // Another revision writes it.
            self.written.remove(name);
            return Verdict::Settled;
        }
        let written = self.written.get(name).filter(|written| written.version == state.version);
        let (conditions, pending) = if is_policy(name.kind) {
            let (tally, unclear) = self.tally(name, followed, world, table);
            if unclear {
                return Verdict::Open;
            }
            let class = self.outline.class(state.version.labelled);
            let exception = world.exceptions.of(&resource_of(name));
            let conditions = conditions::of_policy(state, &tally, exception.as_deref(), &class.setting);
            if self.is_put_off(&tally, written) {
                return Verdict::Open;
            }
            (conditions, !tally.is_settled())
        } else {
            (conditions::of_other(name.kind, state), false)
        };
        let wanted = Box::new(Due { name: name.clone(), state: state.clone(), conditions });
        let Some(written) = written else { return Verdict::Due(wanted) };
        if written.conditions == wanted.conditions {
            return Verdict::Settled;
        }
        if !conditions::same_but_for_messages(&written.conditions, &wanted.conditions) {
            return Verdict::Due(wanted);
        }
        let pause = if pending { PROGRESS } else { LEISURE };
        if written.at.elapsed() < pause {
            Verdict::Later(written.at + pause)
        } else {
            Verdict::Reworded(wanted)
        }
    }

    /// Whether what is pending is so only because proxies come and go.
    fn is_put_off(&self, tally: &Tally, written: Option<&Written>) -> bool {
        let only_fresh = tally.pending > 0 && tally.pending == tally.fresh && tally.rejected == 0;
        only_fresh
            && match written {
                Some(written) => {
                    written.conditions.iter().any(|c| c.kind == ENFORCED && c.holds == Some(true))
                }
                // It has only begun to lead, and proxies come from another control plane.
                None => self.began.elapsed() < FRESH,
            }
    }

    /// How the proxies of all control planes that read a policy stand with it; and whether that is not clear yet and soon
    /// will be.
    fn tally(
        &self,
        name: &ObjectName,
        followed: &Followed,
        world: &World<'_>,
        table: &Table,
    ) -> (Tally, bool) {
        let version = &followed.state.version;
        let mut tally = world.proxies.tally(name, followed, table);
        let label = name.to_string();
        let new = followed.since.elapsed() < FRESH;
        let mut fresh = 0;
        for peer in world.peers.all() {
            let same = peer.place.revision == self.revision;
            if version.labelled && !same {
                continue;
            }
            match peer.stand(&label, version) {
                Stand::Proxies(other) => tally.add(&other),
                // Another revision may read other namespaces.
                Stand::Other { knows: false } if !same && !new => {}
                stand => {
                    tally.unasked += 1;
                    fresh += usize::from(if stand == Stand::Silent { peer.is_fresh() } else { new });
                }
            }
        }
        if !world.peers.are_known() {
            tally.unasked += 1;
            fresh += usize::from(self.began.elapsed() < FRESH);
        }
        if tally.unasked == 0 && table.is_at_nodes(name) {
            tally.add(&self.outline.class(version.labelled).absent);
        }
        if tally.unasked == 0 {
            let gateways = table.waypoints_of(name);
            let absent = gateways.iter().filter_map(|gateway| self.outline.absent_waypoints.get(gateway));
            absent.for_each(|absent| tally.add(absent));
        }
        let unclear = tally.unasked > 0 && tally.unasked == fresh;
        (tally, unclear)
    }
}

fn is_connected(world: &World<'_>, name: &Arc<str>) -> bool {
    let has = |names: &[Arc<str>]| names.binary_search(name).is_ok();
    has(world.proxies.names()) || world.peers.all().iter().any(|peer| has(peer.names()))
}

/// The policy of a label, as the display of its name.
fn name_of(label: &str) -> Option<ObjectName> {
    let (kind, rest) = label.split_once('/')?;
    let (namespace, name) = rest.split_once('/')?;
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    let kind = kinds.into_iter().find(|k| k.name() == kind)?;
    Some(ObjectName { kind, namespace: namespace.into(), name: name.into() })
}

/// Who is dead, and connected to none.
fn apart(world: &World<'_>) -> String {
    let dead = world.ztunnels.unwrap_or_default().iter().filter_map(|z| match z.life {
        Life::Dead(why) => Some((z, why)),
        _ => None,
    });
    let gone: Vec<_> = dead.filter(|(z, _)| !is_connected(world, &z.name().into())).collect();
    if gone.is_empty() {
        return String::new();
    }
    let named = gone.iter().take(MOST_APART).map(|(z, why)| format!("{} on {} ({why})", z.name(), z.node));
    let named = named.collect::<Vec<_>>().join(", ");
    let more = gone.len().saturating_sub(MOST_APART);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("not counted: {named}{more}")
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
