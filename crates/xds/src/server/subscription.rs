//! What one client follows of one type, what it was sent, and what it answered.
//!
//! Of one that follows everything no names are kept, only positions in the log:
//!
//! ```text
//!   start       the end of the log when it came
//!   cursor      sets up to here were sent
//!   removals    removals up to here were sent; they may wait for the types behind this one
//!   acked       it answered for everything up to here
//! ```
//!
//! At most one response is under way. Each scan goes to the end of the log or to the size limit; `acked` moves only
//! by responses that went to the end, since what changes during a scan moves behind where the scan is.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::{Extensions, Features};

use super::response::Parts;
use super::store::{Entry, Generation, Interest, Live, Log, Topic, View};
use crate::inventory::{Inventory, NameKey, Version};

/// A resource that a client refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejected {
    /// Its primary name.
    pub name: Arc<str>,
    /// When what was refused was made.
    pub generation: Generation,
    /// What the client said.
    pub reason: Arc<str>,
}

/// A refusal as a client sends it.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusal {
    pub(super) message: Arc<str>,
    /// Names and reasons; an empty list refuses the whole response.
    pub(super) named: Vec<(Arc<str>, Arc<str>)>,
    /// The client says that it refused others, too.
    pub(super) others: bool,
}

/// What a client says that it holds.
pub(super) enum Held<'a> {
    /// Versions by name.
    Named(BTreeMap<String, String>),
    /// The same, by hashes.
    Hashed(Inventory<'a>),
}

/// A name that a client holds, and that is not there.
#[derive(Debug)]
enum Stale {
    Named(String),
    Hashed(NameKey),
}

/// The removals that this client needs are forgotten: it has to begin anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Behind;

/// A response that was not answered yet.
#[derive(Debug)]
struct InFlight {
    nonce: u64,
    /// What the client has reached when it answers; `None` when more follows.
    settles: Option<u64>,
    since: Duration,
    /// What is in it, up to a limit, for a refusal that names nothing.
    contents: Vec<(Arc<str>, u64)>,
    /// Whether there was more than the limit.
    cut: bool,
}

/// A name that a client asked for.
#[derive(Debug, Default)]
struct Asked {
    /// The primary names that it was sent for it, and at which positions.
    sent: BTreeMap<Arc<str>, u64>,
    /// It was asked for just now: an answer is owed, whatever the client has.
    fresh: bool,
}

/// What a subscription is looked at with.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) topic: &'a Topic,
    pub(super) audience: Extensions,
    pub(super) interest: Option<&'a Interest>,
    /// What the client knows, if it is one of ours.
    pub(super) features: Features,
    /// The end of the store.
    pub(super) generation: u64,
    /// Changes up to here are to be sent.
    pub(super) published: u64,
    /// Removals up to here may be sent.
    pub(super) removals: u64,
    /// How long a response may be.
    pub(super) response_bytes: usize,
    /// How many names of a response are remembered until it is answered, and how many refusals.
    pub(super) remembered: usize,
}

impl<'a> Context<'a> {
    fn log(&self) -> &'a Log {
        self.topic.log(self.audience)
    }

    fn view(&self, entry: &'a Entry) -> View<'a> {
        entry.view(self.interest, self.features)
    }

    fn there(&self, name: &str) -> Option<(u64, &'a Entry, &'a Live)> {
        let (position, entry) = self.log().get(name)?;
        match self.view(entry) {
            View::There(live) => Some((position, entry, live)),
            View::Gone | View::Never => None,
        }
    }
}

/// A response that is being put together.
struct Draft {
    parts: Parts,
    contents: Vec<(Arc<str>, u64)>,
    cut: bool,
    remembered: usize,
    /// The positions and removals that are in it already; only kept where names and scan may meet.
    seen: Option<(HashSet<u64>, HashSet<String>)>,
}

impl Draft {
    fn set(&mut self, position: u64, entry: &Entry, live: &Live) {
        if self.seen.as_mut().is_some_and(|(seen, _)| !seen.insert(position)) {
            return;
        }
        self.parts.set(&live.encoded);
        if self.contents.len() < self.remembered {
            self.contents.push((Arc::clone(&entry.name), position));
        } else {
            self.cut = true;
        }
    }

    fn remove(&mut self, name: &str) {
        if self.seen.as_mut().is_none_or(|(_, seen)| seen.insert(name.to_owned())) {
            self.parts.remove(name);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) type_url: Arc<str>,
    /// The place in the order of types; none for a type that is not in it.
    pub(super) order: Option<usize>,
    pub(super) wildcard: bool,
    names: BTreeMap<Arc<str>, Asked>,
    /// Names that have to be looked at.
    due: BTreeSet<Arc<str>>,
    start: u64,
    cursor: u64,
    removals: u64,
    /// The cursor after the last scan that went to the end.
    scanned: u64,
    /// Positions before `start` that the client lacks, when it came with a state.
    backlog: VecDeque<u64>,
    /// Names that the client came with and that are not there.
    stale: VecDeque<Stale>,
    /// An answer is owed even if it is empty.
    greet: bool,
    /// The first state was sent to its end.
    whole: bool,
    in_flight: Option<InFlight>,
    acked: u64,
    rejected: BTreeMap<Arc<str>, Rejected>,
    /// More was refused than is remembered, of what was made until then.
    blurred: Option<Generation>,
    last_nack: Option<Arc<str>>,
    /// Entries of the log that were looked at, ever: the work that changes cost.
    pub(super) visited: u64,
}

impl Subscription {
    pub(super) fn new(type_url: Arc<str>, order: Option<usize>) -> Self {
        Self {
            type_url,
            order,
            wildcard: false,
            names: BTreeMap::new(),
            due: BTreeSet::new(),
            start: 0,
            cursor: 0,
            removals: 0,
            scanned: 0,
            backlog: VecDeque::new(),
            stale: VecDeque::new(),
            greet: true,
            whole: false,
            in_flight: None,
            acked: 0,
            rejected: BTreeMap::new(),
            blurred: None,
            last_nack: None,
            visited: 0,
        }
    }

    /// Follow everything, from nothing.
    pub(super) fn follow_all(&mut self, generation: u64) {
        self.wildcard = true;
        self.start = generation;
        self.cursor = 0;
        self.removals = generation;
        self.whole = false;
        self.scanned = 0;
    }

    /// Follow only names from now on.
    pub(super) fn follow_names(&mut self) {
        self.wildcard = false;
        self.backlog.clear();
        self.stale.clear();
        self.due.extend(self.names.keys().cloned());
    }

    /// Follow a name, too. Returns whether it is new.
    pub(super) fn follow(&mut self, name: &Arc<str>) -> bool {
        self.due.insert(Arc::clone(name));
        let new = !self.names.contains_key(name);
        let asked = self.names.entry(Arc::clone(name)).or_default();
        asked.fresh = true;
        asked.sent.clear();
        new
    }

    /// Leave a name. Returns whether it was followed.
    pub(super) fn leave(&mut self, name: &str) -> bool {
        self.due.remove(name);
        self.names.remove(name).is_some()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.keys()
    }

    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// A name that is followed changed.
    pub(super) fn changed(&mut self, name: &Arc<str>) {
        // Who follows everything finds it in the log.
        if !self.wildcard && self.names.contains_key(name) {
            self.due.insert(Arc::clone(name));
        }
    }

    /// The client came with a state: what it has at the same version is not sent, and what is gone is removed.
    pub(super) fn resume(&mut self, context: &Context<'_>, held: Held<'_>) {
        match held {
            Held::Named(held) if held.is_empty() => {}
            Held::Named(mut held) if self.wildcard => {
                self.compare(context, |entry| Version::parse(&held.remove(entry.name.as_ref())?));
                self.stale = held.into_keys().map(Stale::Named).collect();
            }
            Held::Named(held) => self.resume_names(context, held),
            Held::Hashed(mut held) if self.wildcard => {
                self.compare(context, |entry| held.take(entry.key));
                self.stale = held.rest().map(Stale::Hashed).collect();
            }
            // Our own follow everything; one that does not is sent what it asks for.
            Held::Hashed(_) => {}
        }
    }

    /// Has all that the client lacks sent, as far as it is there: what `held` has no version of, or another.
    fn compare(&mut self, context: &Context<'_>, mut held: impl FnMut(&Entry) -> Option<Version>) {
        for (position, entry) in context.log().after(0) {
            self.visited += 1;
            if let View::There(live) = context.view(entry)
                && held(entry) != Some(live.version)
            {
                self.backlog.push_back(position);
            }
        }
        self.cursor = context.generation;
    }

    fn resume_names(&mut self, context: &Context<'_>, mut held: BTreeMap<String, String>) {
        let same = |version: &str, live: &Live| Version::parse(version) == Some(live.version);
        for (name, asked) in &mut self.names {
            for primary in context.topic.resolve(name) {
                let Some((position, _, live)) = context.there(primary) else { continue };
                if held.get(primary.as_ref()).is_some_and(|v| same(v, live)) {
                    asked.sent.insert(Arc::clone(primary), position);
                    asked.fresh = false;
                }
            }
        }
        held.retain(|name, _| context.there(name).is_none() && !self.names.contains_key(name.as_str()));
        self.stale = held.into_keys().map(Stale::Named).collect();
    }

    /// The nonce of the response under way.
    pub(super) fn awaited(&self) -> Option<u64> {
        self.in_flight.as_ref().map(|f| f.nonce)
    }

    /// When the response under way was sent.
    pub(super) fn waiting_since(&self) -> Option<Duration> {
        self.in_flight.as_ref().map(|f| f.since)
    }

    /// The client answered the response under way. One that refuses is sent nothing again until it changes.
    pub(super) fn settle(&mut self, context: &Context<'_>, refusal: Option<Refusal>) {
        let Some(flight) = self.in_flight.take() else { return };
        self.answered_for(context.log(), flight.settles);
        let acked = self.acked;
        let Some(refusal) = refusal else { return };
        self.last_nack = Some(Arc::clone(&refusal.message));
        let whole = refusal.named.is_empty();
        if refusal.others || (whole && flight.cut) {
            self.blurred = Some(Generation(context.generation));
        }
        let named: Vec<_> = if whole {
            flight.contents.into_iter().map(|(n, p)| (n, p, Arc::clone(&refusal.message))).collect()
        } else {
            let sent: BTreeMap<_, _> = flight.contents.into_iter().collect();
            let named = refusal.named.into_iter();
            named
                .map(|(n, why)| (sent.get(&n).copied().unwrap_or(acked), n, why))
                .map(|(p, n, w)| (n, p, w))
                .collect()
        };
        for (name, position, reason) in named {
            if self.rejected.len() >= context.remembered && !self.rejected.contains_key(&name) {
                self.blurred = Some(Generation(context.generation));
                break;
            }
            let rejected = Rejected { name: Arc::clone(&name), generation: Generation(position), reason };
            self.rejected.insert(name, rejected);
        }
    }

    fn answered_for(&mut self, log: &Log, position: Option<u64>) {
        let Some(position) = position else { return };
        self.acked = position;
        self.rejected.retain(|name, rejected| {
            let now = log.get(name).map_or(0, |(position, _)| position);
            // Not changed since, or not answered for yet.
            (now > 0 && now <= rejected.generation.0) || now > position
        });
    }

    /// Whether types behind this one may go: all that there is of this one was sent, also what was not published
    /// yet, since theirs may be.
    pub(super) fn lets_go(&self, log: &Log) -> bool {
        !self.wildcard || (self.whole && self.cursor >= log.head())
    }

    /// Up to where types before this one may remove: what changed until then was sent. During a scan nobody knows,
    /// since what changes again moves behind it.
    pub(super) fn lets_remove(&self) -> u64 {
        match (self.wildcard, self.whole) {
            (false, _) if self.due.is_empty() => u64::MAX,
            (true, true) => self.scanned,
            _ => 0,
        }
    }

    fn has_work(&self, context: &Context<'_>) -> bool {
        let behind = || {
            !self.whole
                || self.cursor < context.published
                || self.removals < context.removals.min(context.published)
        };
        self.greet
            || !self.due.is_empty()
            || !self.backlog.is_empty()
            || (!self.stale.is_empty() && self.may_drop_stale(context))
            || (self.wildcard && behind())
    }

    fn may_drop_stale(&self, context: &Context<'_>) -> bool {
        context.removals >= self.start
    }

    /// The next response under this nonce, if there is anything to send and none is under way; and whether more
    /// follows.
    pub(super) fn next(
        &mut self,
        context: &Context<'_>,
        now: Duration,
        nonce: u64,
    ) -> Result<Option<(Parts, bool)>, Behind> {
        if self.in_flight.is_some() || !self.has_work(context) {
            return Ok(None);
        }
        if self.wildcard && self.removals < context.log().horizon() {
            if self.cursor > 0 {
                return Err(Behind);
            }
            // It was sent nothing yet.
            self.follow_all(context.generation);
        }
        let mut draft = Draft {
            parts: Parts::new(context.audience, context.response_bytes),
            contents: Vec::new(),
            cut: false,
            remembered: context.remembered,
            seen: (!self.due.is_empty()).then(Default::default),
        };
        let finished = self.put_stale(context, &mut draft)
            && self.put_due(context, &mut draft)
            && self.put_backlog(context, &mut draft)
            && self.put_changes(context, &mut draft);
        self.whole |= finished;
        let reached = if self.wildcard { self.cursor.min(self.removals) } else { context.generation };
        let settles = (finished && self.stale.is_empty()).then_some(reached);
        if draft.parts.is_empty() && !self.greet {
            self.answered_for(context.log(), settles);
            return Ok(None);
        }
        self.greet = false;
        let Draft { parts, contents, cut, .. } = draft;
        self.in_flight = Some(InFlight { nonce, settles, since: now, contents, cut });
        Ok(Some((parts, !finished)))
    }

    fn put_stale(&mut self, context: &Context<'_>, draft: &mut Draft) -> bool {
        if !self.may_drop_stale(context) {
            return true;
        }
        while let Some(stale) = self.stale.front() {
            let hash;
            let (name, found) = match stale {
                Stale::Named(name) => (name, context.log().get(name)),
                Stale::Hashed(key) => {
                    hash = key.to_string();
                    (&hash, context.log().find(*key))
                }
            };
            if draft.parts.full(name.len()) {
                return false;
            }
            // What came back since, or came and went, is in the log behind the cursors.
            let later = found.is_some_and(|(position, _)| position > self.removals);
            let there = found.is_some_and(|(_, entry)| matches!(context.view(entry), View::There(_)));
            if !there && !later {
                draft.remove(name);
            }
            self.stale.pop_front();
        }
        true
    }

    fn put_due(&mut self, context: &Context<'_>, draft: &mut Draft) -> bool {
        while let Some(name) = self.due.first().cloned() {
            let found: Vec<_> = context.topic.resolve(&name).filter_map(|n| context.there(n)).collect();
            let size = found.iter().map(|(_, _, live)| live.encoded.len()).sum();
            if draft.parts.full(size) {
                return false;
            }
            self.due.remove(&name);
            let Some(asked) = self.names.get_mut(&name) else { continue };
            let before = std::mem::take(&mut asked.sent);
            let fresh = std::mem::take(&mut asked.fresh);
            for (position, entry, live) in &found {
                asked.sent.insert(Arc::clone(&entry.name), *position);
                if before.get(&entry.name) != Some(position) {
                    draft.set(*position, entry, live);
                }
            }
            let lost: Vec<_> = before.into_keys().filter(|n| !asked.sent.contains_key(n)).collect();
            if found.is_empty() && (fresh || !lost.is_empty()) {
                draft.remove(&name);
            }
            for name in lost.iter().filter(|name| !self.still_wanted(context, name)) {
                draft.remove(name);
            }
        }
        true
    }

    /// Whether a resource that a name does not stand for any more is there, and followed by another.
    fn still_wanted(&self, context: &Context<'_>, primary: &str) -> bool {
        let Some((_, entry, live)) = context.there(primary) else { return false };
        let mut names = std::iter::once(&entry.name).chain(live.aliases());
        self.wildcard || names.any(|name| self.names.contains_key(name))
    }

    fn put_backlog(&mut self, context: &Context<'_>, draft: &mut Draft) -> bool {
        while let Some(position) = self.backlog.front() {
            self.visited += 1;
            // What changed since is behind the cursor.
            if let Some(entry) = context.log().at(*position)
                && let View::There(live) = context.view(entry)
            {
                if draft.parts.full(live.encoded.len()) {
                    return false;
                }
                draft.set(*position, entry, live);
            }
            self.backlog.pop_front();
        }
        true
    }

    fn put_changes(&mut self, context: &Context<'_>, draft: &mut Draft) -> bool {
        if !self.wildcard {
            return true;
        }
        // The first removal that has to wait.
        let mut waits = u64::MAX;
        for (position, entry) in context.log().after(self.cursor.min(self.removals)) {
            self.visited += 1;
            let live = match context.view(entry) {
                View::There(live) if position > self.cursor => Some(live),
                View::Gone if position > self.removals && position <= context.removals => None,
                View::Gone if position > self.removals => {
                    waits = waits.min(position);
                    continue;
                }
                _ => continue,
            };
            if draft.parts.full(live.map_or(entry.name.len(), |live| live.encoded.len())) {
                // All before this one is in it.
                self.reach(position - 1, waits);
                return false;
            }
            match live {
                Some(live) => draft.set(position, entry, live),
                None => draft.remove(&entry.name),
            }
        }
        self.reach(context.generation, waits);
        self.scanned = self.cursor;
        true
    }

    fn reach(&mut self, position: u64, waits: u64) {
        self.cursor = self.cursor.max(position);
        self.removals = self.removals.max(position.min(waits - 1));
    }

    /// The generation that the client has answered for. One that has all there is of its type is as far as the
    /// store.
    pub(super) fn acked(&self, context: &Context<'_>) -> u64 {
        let position = self.cursor.min(self.removals);
        let current = !self.wildcard || position >= context.log().head();
        let idle = self.whole && self.due.is_empty() && self.stale.is_empty() && self.in_flight.is_none();
        if idle && current { context.generation } else { self.acked }
    }

    /// What is known of the client's state.
    pub(super) fn status(&self, context: &Context<'_>) -> TypeStatus {
        let position = self.cursor.min(self.removals);
        let acked = self.acked(context);
        let mut rejected: Vec<_> = self.rejected.values().cloned().collect();
        let mut blurred = self.blurred;
        if context.audience == Extensions::Culvert {
            // It says that it enforces what it was sent, and that was not this.
            for (name, lacking) in context.topic.too_new_for(context.features) {
                if rejected.len() >= context.remembered {
                    blurred = Some(Generation(context.generation));
                    break;
                }
                let at = context.log().get(name).map_or(0, |(position, _)| position);
                let reason =
                    format!("it is too old for this ({lacking}), and has what it can enforce instead");
                let of =
                    Rejected { name: Arc::clone(name), generation: Generation(at), reason: reason.into() };
                rejected.push(of);
            }
        }
        TypeStatus {
            type_url: Arc::clone(&self.type_url),
            wildcard: self.wildcard,
            names: self.names.len(),
            sent: Generation(if self.wildcard { position.max(acked) } else { acked }),
            acked: Generation(acked),
            rejected,
            blurred,
            last_nack: self.last_nack.clone(),
        }
    }
}

/// What a client has of one type.
#[derive(Clone, Debug)]
pub struct TypeStatus {
    /// The type.
    pub type_url: Arc<str>,
    /// Whether it follows everything.
    pub wildcard: bool,
    /// How many single names it follows.
    pub names: usize,
    /// What it was sent.
    pub sent: Generation,
    /// What it answered for. Apart from `rejected`, all that was made until then is in its hands.
    pub acked: Generation,
    /// What it refused and still refuses, and what it is too old for, at most [`Limits::rejections`](super::session::Limits::rejections).
    pub rejected: Vec<Rejected>,
    /// It refused more than is kept in `rejected`, of what was made until then: nothing is known of that.
    pub blurred: Option<Generation>,
    /// Its last refusal.
    pub last_nack: Option<Arc<str>>,
}
