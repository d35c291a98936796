//! Everything that there is to send, and the log of its changes.
//!
//! * A [`Log`] holds each name once, at the position of its last change; the older entries of a name are gone. So
//!   its size is that of the resources, plus a limited number of names that were removed, and a client's state is a
//!   position in it: what it lacks is what stands behind that position.
//! * Positions are generations: one counter over all types, which grows with each change. A set that changes
//!   nothing is no change.
//! * There is one log for each type and audience. What is withheld from an audience was never there for it, or is
//!   removed; what changes for the other audience only does not appear. Equal bodies are encoded and held once.
//! * Nobody's names are copied: a client that follows single names is listed under each of them.
//!
//! No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use bytes::Bytes;
use prost::Message;
use proto::wire::discovery;
use proto::{Extensions, Features};

use crate::inventory::{NameKey, Version};

/// A point in the history of a [`Store`], over all types: the number of changes until then.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who follows single names; given by the owner of the sessions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientId(pub u64);

/// A resource as the control plane has it.
#[derive(Clone, Debug)]
pub struct Resource {
    /// Its type.
    pub type_url: &'static str,
    /// Its primary name.
    pub name: Arc<str>,
    /// Other names by which it may be asked for.
    pub aliases: Vec<Arc<str>>,
    /// What a client must be interested in to get it; `None` goes to everyone.
    pub scope: Option<Arc<str>>,
    /// The encoded message for peers that know Istio's fields only; `None` withholds it from them.
    pub plain: Option<Bytes>,
    /// The encoded message for our own proxies; `None` withholds it from them.
    pub culvert: Option<Bytes>,
    /// What one of ours must know to get that. One that does not gets `plain`.
    pub needs: Features,
}

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// A resource is new, or has other content.
    Set(Resource),
    /// A resource is gone.
    Remove {
        /// Its type.
        type_url: &'static str,
        /// Its primary name.
        name: Arc<str>,
    },
}

/// A hash of what a client sees of a resource, the same in every process: a client that comes back to another
/// replica, or to this one after a restart, is sent nothing again.
fn version(aliases: &[Arc<str>], body: &[u8]) -> Version {
    let mut context = digest::Context::new(&digest::SHA256);
    for alias in aliases {
        context.update(&(alias.len() as u64).to_le_bytes());
        context.update(alias.as_bytes());
    }
    context.update(&u64::MAX.to_le_bytes());
    context.update(body);
    let mut version = [0; 10];
    version.iter_mut().zip(context.finish().as_ref()).for_each(|(v, d)| *v = *d);
    Version(version)
}

/// What a resource is at present.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) version: Version,
    /// The whole `Resource` message.
    pub(crate) encoded: Bytes,
    aliases: Arc<[Arc<str>]>,
    /// For those who don't know all that this needs.
    lesser: Option<Arc<Lesser>>,
}

/// What those get who are too old for a resource.
#[derive(Debug)]
struct Lesser {
    needs: Features,
    /// `None` withholds it.
    live: Option<Live>,
}

impl Live {
    /// What one gets who knows these features.
    fn known_by(&self, features: Features) -> Option<&Self> {
        match &self.lesser {
            Some(lesser) if !lesser.needs.lacking(features).is_empty() => lesser.live.as_ref(),
            _ => Some(self),
        }
    }

    /// What tells it from another of the same name.
    fn identity(&self) -> (Version, Option<(Features, Option<Version>)>) {
        let lesser = self.lesser.as_ref().map(|l| (l.needs, l.live.as_ref().map(|live| live.version)));
        (self.version, lesser)
    }

    /// The other names by which it may be asked for.
    pub(crate) fn aliases(&self) -> impl Iterator<Item = &Arc<str>> {
        self.aliases.iter()
    }
}

/// The last change of a name.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Arc<str>,
    pub(crate) key: NameKey,
    scope: Option<Arc<str>>,
    /// It had another scope once: a client that is not interested now may hold it.
    moved: bool,
    /// `None`: it was removed.
    pub(crate) live: Option<Live>,
}

/// What a client sees of an entry.
pub(crate) enum View<'a> {
    /// It is there.
    There(&'a Live),
    /// It is gone, and the client may hold it.
    Gone,
    /// It never was there for the client.
    Never,
}

/// Decides by the scope of a resource whether a client gets it. Called while the store is locked: it must be quick,
/// and ask nothing of the server.
pub type Interest = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Entry {
    pub(crate) fn view(&self, interest: Option<&Interest>, features: Features) -> View<'_> {
        let wanted = match (&self.scope, interest) {
            (Some(scope), Some(interest)) => interest(scope),
            _ => true,
        };
        match &self.live {
            Some(live) if wanted => live.known_by(features).map_or(View::Gone, View::There),
            None if wanted => View::Gone,
            _ if self.moved => View::Gone,
            _ => View::Never,
        }
    }
}

/// The resources of one type as one audience sees them, each at the position of its last change.
#[derive(Debug, Default)]
pub(crate) struct Log {
    entries: BTreeMap<u64, Entry>,
    positions: HashMap<NameKey, u64>,
    /// The positions of what was removed.
    gone: BTreeSet<u64>,
    /// Removals up to here are forgotten.
    horizon: u64,
    head: u64,
}

impl Log {
    /// The position of the last change.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    /// Who follows from before this position may lack removals.
    pub(crate) fn horizon(&self) -> u64 {
        self.horizon
    }

    /// The changes behind a position, oldest first.
    pub(crate) fn after(&self, position: u64) -> impl Iterator<Item = (u64, &Entry)> {
        self.entries.range(position.saturating_add(1)..).map(|(p, e)| (*p, e))
    }

    /// What has not changed since it changed at this position.
    pub(crate) fn at(&self, position: u64) -> Option<&Entry> {
        self.entries.get(&position)
    }

    /// A name's last change and where it stands.
    pub(crate) fn get(&self, name: &str) -> Option<(u64, &Entry)> {
        self.find(NameKey::of(name))
    }

    /// The same, by the name's hash.
    pub(crate) fn find(&self, name: NameKey) -> Option<(u64, &Entry)> {
        let position = *self.positions.get(&name)?;
        Some((position, self.entries.get(&position)?))
    }

    /// Whether putting this would change anything.
    fn differs(&self, name: NameKey, live: Option<&Live>, scope: Option<&Arc<str>>) -> bool {
        match self.find(name) {
            None => live.is_some(),
            Some((_, entry)) => {
                let held = entry.live.as_ref().map(Live::identity);
                held != live.map(Live::identity) || (live.is_some() && entry.scope.as_ref() != scope)
            }
        }
    }

    fn put(
        &mut self,
        position: u64,
        (name, key): (&Arc<str>, NameKey),
        live: Option<Live>,
        scope: Option<Arc<str>>,
        keep: usize,
    ) {
        let old = self.positions.insert(key, position);
        let old = old.and_then(|p| {
            self.gone.remove(&p);
            self.entries.remove(&p)
        });
        let removed = live.is_none();
        let (scope, moved) = match old {
            // Those who had it must hear of its end.
            Some(old) if removed => (old.scope, old.moved),
            Some(old) => {
                let moved = old.moved || old.scope != scope;
                (scope, moved)
            }
            None => (scope, false),
        };
        self.entries.insert(position, Entry { name: Arc::clone(name), key, scope, moved, live });
        self.head = position;
        if removed {
            self.gone.insert(position);
        }
        while self.gone.len() > keep {
            let Some(oldest) = self.gone.pop_first() else { break };
            self.horizon = oldest;
            if let Some(entry) = self.entries.remove(&oldest) {
                self.positions.remove(&entry.key);
            }
        }
    }

    fn aliases(&self, name: NameKey) -> Option<Arc<[Arc<str>]>> {
        self.find(name).and_then(|(_, e)| e.live.as_ref()).map(|l| Arc::clone(&l.aliases))
    }

    fn len(&self) -> usize {
        self.entries.len() - self.gone.len()
    }
}

/// All of one type.
#[derive(Debug)]
pub(crate) struct Topic {
    type_url: &'static str,
    plain: Log,
    culvert: Log,
    /// From an alias to the primary names.
    aliases: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// What resources need that not all of our proxies know.
    needs: BTreeMap<Arc<str>, Features>,
    /// From a name, of any kind, to those who follow just it.
    watchers: HashMap<Arc<str>, BTreeSet<ClientId>>,
}

impl Topic {
    pub(crate) fn new(type_url: &'static str) -> Self {
        Self {
            type_url,
            plain: Log::default(),
            culvert: Log::default(),
            aliases: HashMap::new(),
            needs: BTreeMap::new(),
            watchers: HashMap::new(),
        }
    }

    pub(crate) fn log(&self, audience: Extensions) -> &Log {
        match audience {
            Extensions::None => &self.plain,
            Extensions::Culvert => &self.culvert,
        }
    }

    /// The resources that one who knows these features is too old for, and what it lacks.
    pub(crate) fn too_new_for(&self, features: Features) -> impl Iterator<Item = (&Arc<str>, Features)> {
        let lacking = self.needs.iter().map(move |(name, needs)| (name, needs.lacking(features)));
        lacking.filter(|(_, lacking)| !lacking.is_empty())
    }

    /// The primary names that a name stands for, whether they are there or not.
    pub(crate) fn resolve<'a>(&'a self, asked: &'a Arc<str>) -> impl Iterator<Item = &'a Arc<str>> {
        std::iter::once(asked)
            .chain(self.aliases.get(asked).into_iter().flatten().filter(move |n| *n != asked))
    }

    /// Puts one name's content into both logs. `None` when nothing changes; else who follows it by which name.
    fn put(&mut self, position: u64, resource: &Resource, keep: usize) -> Option<Vec<(ClientId, Arc<str>)>> {
        let [plain, culvert] =
            [&resource.plain, &resource.culvert].map(|b| b.as_ref().map(|b| version(&resource.aliases, b)));
        let name = &resource.name;
        let key = NameKey::of(name);
        let scope = resource.scope.as_ref();
        let lesser = culvert.filter(|_| !resource.needs.is_empty());
        let bare =
            |version: Version| Live { version, encoded: Bytes::new(), aliases: Arc::default(), lesser: None };
        let with_lesser = |live: Live, plain: Option<Live>| match lesser {
            Some(_) => Live { lesser: Some(Arc::new(Lesser { needs: resource.needs, live: plain })), ..live },
            None => live,
        };
        let seen = culvert.map(|version| with_lesser(bare(version), plain.map(bare)));
        let plain_differs = self.plain.differs(key, plain.map(bare).as_ref(), scope);
        let culvert_differs = self.culvert.differs(key, seen.as_ref(), scope);
        if !plain_differs && !culvert_differs {
            return None;
        }
        let old = self.plain.aliases(key).or_else(|| self.culvert.aliases(key)).unwrap_or_default();
        let there = plain.is_some() || culvert.is_some();
        let new: Arc<[Arc<str>]> = if there { resource.aliases.as_slice().into() } else { Arc::default() };
        let encoded = |version: Option<Version>, body: &Option<Bytes>| {
            let (version, body) = (version?, body.as_ref()?);
            let encoded = encode(resource, version, body);
            Some(Live { version, encoded, aliases: Arc::clone(&new), lesser: None })
        };
        let first = encoded(plain, &resource.plain);
        let second = if plain == culvert { first.clone() } else { encoded(culvert, &resource.culvert) };
        let second = second.map(|live| with_lesser(live, first.clone()));
        if lesser.is_some() {
            self.needs.insert(Arc::clone(name), resource.needs);
        } else {
            self.needs.remove(name);
        }
        if plain_differs {
            self.plain.put(position, (name, key), first, resource.scope.clone(), keep);
        }
        if culvert_differs {
            self.culvert.put(position, (name, key), second, resource.scope.clone(), keep);
        }
        if old != new {
            self.index(name, &old, &new);
        }
        Some(self.followers(name, &old, &new))
    }

    fn index(&mut self, name: &Arc<str>, old: &[Arc<str>], new: &[Arc<str>]) {
        for alias in old {
            if let Some(names) = self.aliases.get_mut(alias) {
                names.remove(name);
                if names.is_empty() {
                    self.aliases.remove(alias);
                }
            }
        }
        for alias in new {
            self.aliases.entry(Arc::clone(alias)).or_default().insert(Arc::clone(name));
        }
    }

    fn followers(&self, name: &Arc<str>, old: &[Arc<str>], new: &[Arc<str>]) -> Vec<(ClientId, Arc<str>)> {
        if self.watchers.is_empty() {
            return Vec::new();
        }
        let names: BTreeSet<&Arc<str>> = std::iter::once(name).chain(old).chain(new).collect();
        let mut followers = Vec::new();
        for name in names {
            let ids = self.watchers.get(name).into_iter().flatten();
            followers.extend(ids.map(|id| (*id, Arc::clone(name))));
        }
        followers
    }
}

fn encode(resource: &Resource, version: Version, body: &Bytes) -> Bytes {
    let message = discovery::Resource {
        version: version.to_string(),
        resource: Some(prost_types::Any { type_url: resource.type_url.to_owned(), value: body.to_vec() }),
        name: resource.name.as_ref().to_owned(),
        aliases: resource.aliases.iter().map(|a| a.as_ref().to_owned()).collect(),
    };
    message.encode_to_vec().into()
}

/// A client that follows a name which changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Follower {
    /// Who.
    pub client: ClientId,
    /// The type.
    pub type_url: &'static str,
    /// The name as the client asked for it.
    pub name: Arc<str>,
}

/// All resources of all types.
#[derive(Debug)]
pub struct Store {
    topics: Vec<Topic>,
    generation: Generation,
    published: Generation,
    tombstones: usize,
}

impl Store {
    /// A store without resources. `types` is the order in which changes of the same time are sent; types that are
    /// not in it come after them. At most `tombstones` removals are remembered for each type and audience.
    #[must_use]
    pub fn new(types: &[&'static str], tombstones: usize) -> Self {
        let topics = types.iter().map(|t| Topic::new(t)).collect();
        Self { topics, generation: Generation(0), published: Generation(0), tombstones }
    }

    /// The number of changes so far.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The number of changes that clients are to hear of.
    #[must_use]
    pub fn published(&self) -> Generation {
        self.published
    }

    /// Lets clients hear of all changes so far.
    pub fn publish(&mut self) {
        self.published = self.generation;
    }

    /// Makes one change, and says who must hear of it because it follows the name; those who follow everything
    /// find it by [`publish`](Self::publish).
    pub fn change(&mut self, change: &Change) -> Vec<Follower> {
        let gone;
        let resource = match change {
            Change::Set(resource) => resource,
            Change::Remove { type_url, name } => {
                let name = Arc::clone(name);
                gone = Resource {
                    type_url,
                    name,
                    aliases: Vec::new(),
                    scope: None,
                    plain: None,
                    culvert: None,
                    needs: Features::NONE,
                };
                &gone
            }
        };
        let type_url = resource.type_url;
        let position = self.generation.0 + 1;
        let tombstones = self.tombstones;
        let Some(followers) = self.topic_mut(type_url).put(position, resource, tombstones) else {
            return Vec::new();
        };
        self.generation = Generation(position);
        followers.into_iter().map(|(client, name)| Follower { client, type_url, name }).collect()
    }

    /// The names of one type that are there for any audience.
    #[must_use]
    pub fn names(&self, type_url: &str) -> BTreeSet<Arc<str>> {
        let Some((_, topic)) = self.topic(type_url) else { return BTreeSet::new() };
        let entries = topic.plain.entries.values().chain(topic.culvert.entries.values());
        entries.filter(|e| e.live.is_some()).map(|e| Arc::clone(&e.name)).collect()
    }

    /// How many resources of a type an audience sees.
    #[must_use]
    pub fn len(&self, type_url: &str, audience: Extensions) -> usize {
        self.topic(type_url).map_or(0, |(_, t)| t.log(audience).len())
    }

    /// From now on [`change`](Self::change) names the client when something changes that has this name or alias.
    pub fn watch(&mut self, client: ClientId, type_url: &str, name: &Arc<str>) {
        if let Some(topic) = self.topics.iter_mut().find(|t| t.type_url == type_url) {
            topic.watchers.entry(Arc::clone(name)).or_default().insert(client);
        }
    }

    /// Ends [`watch`](Self::watch).
    pub fn unwatch(&mut self, client: ClientId, type_url: &str, name: &str) {
        let Some(topic) = self.topics.iter_mut().find(|t| t.type_url == type_url) else { return };
        if let Some(ids) = topic.watchers.get_mut(name) {
            ids.remove(&client);
            if ids.is_empty() {
                topic.watchers.remove(name);
            }
        }
    }

    /// A type and its place in the order.
    pub(crate) fn topic(&self, type_url: &str) -> Option<(usize, &Topic)> {
        self.topics.iter().enumerate().find(|(_, t)| t.type_url == type_url)
    }

    fn topic_mut(&mut self, type_url: &'static str) -> &mut Topic {
        let place = self.topics.iter().position(|t| t.type_url == type_url).unwrap_or_else(|| {
            self.topics.push(Topic::new(type_url));
            self.topics.len() - 1
        });
        #[allow(clippy::indexing_slicing, reason = "found or pushed above")]
        &mut self.topics[place]
    }
}
