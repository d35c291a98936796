//! Connections between two pods of a node that no proxy carries, where ztunnel's verdicts allow it.
//!
//! ```text
//!   connect(service or pod) --> [connect: an offer, and a verdict in force] --> endpoint, socket's mark 0x53a --> past capture
//!   out of the pod --> node's end --> [from_pod: the pair's device? verdict? lease?] --> the other pod's device, with a mark
//!   [arriving: nothing of the pair without that mark] --> [sockets: verdict in force] --> the application
//! ```
//!
//! Maps and links of a node are below one directory, so that they outlive every process of ours:
//!
//! ```text
//! ROOT/verdicts-INODE OF THE NODE'S NAMESPACE/control, verdicts, neighbours       maps that the pods' capture programs share
//!                                            /offers, connections, open, ended, tallies, asked
//!                                            /link-connect4, ..., link-device-N   links
//! ```
//!
//! Invariants:
//! * nothing of a pair passes but within the lease, which its owner renews, and by a verdict of a generation that is in force;
//! * an entry of a pair is taken out when no socket of it is left: until then it drops what is not allowed;
//! * two processes may both hold a value: the last that attached is the owner, and the other's renewals do nothing. Of those that
//!   take what another process attached ([`Verdicts::take`]) there is one at a time.

mod device;
mod ending;
mod ends;
mod links;
mod node;
mod offers;
mod removal;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, Queue};
use net::sock_diag::{self, DestroyError, Destroyer};
use net::{MARK_MASK, Netns};
use nix::fcntl::Flock;

pub use device::{Qualified, Why};
pub use ending::{Ended, EndedPairs, Ending};
pub use node::Node;
pub use offers::Offer;

use crate::layout::{
    Address, Asked, Control, Dialled, MARK_DIRECT, MARK_GRANTED, MARK_REPLY, MARK_ZTUNNEL, Neighbours,
    OFFER_ENDPOINTS, OfferEntry, PairKey, Record, SIDE_SOURCE, TALLIES, VerdictEntry,
};
use crate::pins::is_at_rest;
use crate::{Error, Pins};

/// How often sockets are looked for and ended before what is left is reported.
const END_ATTEMPTS: usize = 3;

/// Who may connect to what.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Pair {
    /// The address of the client's pod.
    pub source: IpAddr,
    /// Where the server listens: an address of its pod, of the same family.
    pub destination: SocketAddr,
}

/// What was decided of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// `None`: revoked, and its packets are dropped.
    pub generation: Option<NonZeroU64>,
    /// What its writer knows it by.
    pub id: u64,
    /// The node's end of the client's device.
    pub source_device: u32,
    /// The node's end of the server's.
    pub destination_device: u32,
}

/// Which end of a connection it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// The client's socket.
    Source,
    /// The one that was accepted.
    Destination,
}

/// One end of a connection that nobody carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Carried {
    /// The verdict's.
    pub id: u64,
    /// The socket's cookie, which no other socket has until the machine starts anew.
    pub socket: u64,
    /// Which end.
    pub side: Side,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The client's address.
    pub source: SocketAddr,
    /// The server's.
    pub destination: SocketAddr,
    /// What the client asked for, if that was something else; known at the client's end.
    pub dialled: Option<SocketAddr>,
    /// Whether it came about. A client's end is known from its first packet on.
    pub established: bool,
    /// When it began, since the machine did (`CLOCK_MONOTONIC`).
    pub opened: Duration,
    /// When it ended.
    pub closed: Option<Duration>,
    /// Bytes that this end sent and the other acknowledged; 0 before it has ended.
    pub sent: u64,
    /// Bytes that this end received; 0 before it has ended.
    pub received: u64,
}

/// The ends that are noted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listing {
    /// Those that live.
    pub open: Vec<Carried>,
    /// Those that are over and were not given out by [`Verdicts::closed`], since too many ended at once. Each is listed once.
    pub closed: Vec<Carried>,
}

/// What the programs count.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Tally {
    /// Connections let past capture.
    Granted,
    /// Connections that ztunnel got though there was an offer: no verdict in force, no lease, too many, or another source.
    Declined,
    /// Packets from another device than the pair's. Dropped.
    Spoofed,
    /// Packets of a pair whose verdict is revoked or old. Dropped.
    Stale,
    /// Packets after the end of the lease. Dropped.
    Lapsed,
    /// Packets in pieces or with options, between two pods that have a verdict, and those with a further tag of a VLAN. Dropped.
    Unreadable,
    /// Ends of connections that there was no room to note.
    Unrecorded,
}

impl Tally {
    /// All, in the order of the map.
    pub const ALL: [Self; TALLIES as usize] = [
        Self::Granted,
        Self::Declined,
        Self::Spoofed,
        Self::Stale,
        Self::Lapsed,
        Self::Unreadable,
        Self::Unrecorded,
    ];

    /// As a label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Declined => "declined",
            Self::Spoofed => "spoofed",
            Self::Stale => "stale",
            Self::Lapsed => "lapsed",
            Self::Unreadable => "unreadable",
            Self::Unrecorded => "unrecorded",
        }
    }
}

/// The verdicts and how many there are between two addresses, which belong together.
#[derive(Debug)]
struct Written {
    verdicts: HashMap<MapData, PairKey, VerdictEntry>,
    neighbours: HashMap<MapData, Neighbours, u32>,
}

/// A node's verdicts, with the programs that go by them.
pub struct Verdicts {
    pins: Pins,
    directory: PathBuf,
    /// Absent where another process has attached the programs.
    from_pod: Option<OwnedFd>,
    /// What tells these maps from others of their names.
    number: u32,
    /// Where another process has attached the programs: nobody else writes meanwhile.
    _alone: Option<Flock<File>>,
    owner: u64,
    control: Mutex<Array<MapData, Control>>,
    written: Mutex<Written>,
    offers: Mutex<HashMap<MapData, Dialled, OfferEntry>>,
    connections: Mutex<HashMap<MapData, u64, Record>>,
    /// How many of them live.
    open: Mutex<Array<MapData, u64>>,
    ended: Mutex<Queue<MapData, Record>>,
    tallies: PerCpuArray<MapData, u64>,
}

impl Verdicts {
    /// Loads the programs, puts them in the place of those that are there, and becomes the owner. `cgroups` is where the
    /// machine's cgroups are, `/sys/fs/cgroup`. What is there of verdicts stays as it is, and so does the lease.
    ///
    /// # Errors
    /// The kernel refuses the programs, or the root of the machine's cgroups (version 2) is not to be found.
    pub fn attach(pins: &Pins, cgroups: &Path) -> Result<Self, Error> {
        let directory = pins.verdicts();
        let _held = pins.hold()?;
        let from_pod = node::attach(&directory, cgroups)?;
        Self::open(pins, directory, Some(from_pod), None)
    }

    /// Becomes the owner of what another process attached for its node ([`Node`]), which has noted one of `pods`; `None` where
    /// nobody has. What is there of verdicts stays as it is, and so does the lease.
    ///
    /// # Errors
    /// Another one has taken it and has not ended yet ([`Error::is_taken`]), or the maps are of another build's programs.
    pub fn take(pins: &Pins, pods: &[Netns]) -> Result<Option<Self>, Error> {
        let Some(directory) = node::directory(pins.root(), pods)? else { return Ok(None) };
        let alone = node::alone(&directory)?;
        Self::open(pins, directory, None, Some(alone)).map(Some)
    }

    fn open(
        pins: &Pins,
        directory: PathBuf,
        from_pod: Option<OwnedFd>,
        alone: Option<Flock<File>>,
    ) -> Result<Self, Error> {
        let owner = RandomState::new().hash_one(std::process::id()) | 1;
        let found = Self {
            // If the maps change meanwhile, no pod qualifies.
            number: node::number(&directory)?,
            control: Mutex::new(map(&directory, "control")?),
            written: Mutex::new(Written {
                verdicts: map(&directory, "verdicts")?,
                neighbours: map(&directory, "neighbours")?,
            }),
            offers: Mutex::new(map(&directory, "offers")?),
            connections: Mutex::new(map(&directory, "connections")?),
            open: Mutex::new(map(&directory, "open")?),
            ended: Mutex::new(map(&directory, "ended")?),
            tallies: map(&directory, "tallies")?,
            pins: pins.clone(),
            directory,
            from_pod,
            _alone: alone,
            owner,
        };
        if let Some(alone) = &found._alone {
            // Before anything is written: whoever made the directory anew may have given these maps to another process.
            node::is_of(alone, &found.directory)?;
        }
        held(&found.written).count_neighbours()?;
        let mut control = held(&found.control);
        let current = control.get(&0, 0).map_err(Error::map("read", "control"))?;
        control.set(0, Control { owner, ..current }, 0).map_err(Error::map("write", "control"))?;
        drop(control);
        Ok(found)
    }

    /// Whether connections between `pod` and others can do without a proxy; its device gets the program then. May be asked again.
    /// Where another process attached the programs, that is what it has noted.
    ///
    /// # Errors
    /// Why not.
    pub fn qualify(&self, node: &Netns, pod: &Netns) -> Result<Qualified, Why> {
        let Some(from_pod) = &self.from_pod else { return node::noted(&self.directory, self.number, pod) };
        let qualified = device::qualify(&self.pins, &self.directory, from_pod, node, pod)?;
        self.end_strays(pod)?;
        Ok(qualified)
    }

    /// Takes the program off a pod's device. All its pairs are to be ended before.
    ///
    /// # Errors
    /// It can't be taken off.
    pub fn release(&self, qualified: &Qualified) -> Result<(), Error> {
        if self.from_pod.is_none() {
            return Ok(());
        }
        device::release(&self.directory, qualified.device)
    }

    /// Lets `pair` connect, by a verdict of `generation`, for as long as it is in force. A verdict that is there is replaced.
    ///
    /// # Errors
    /// There are too many ([`Error::is_full`]), another process has taken over, or they can't be written.
    pub fn allow(
        &self,
        source: &Qualified,
        destination: &Qualified,
        pair: Pair,
        generation: NonZeroU64,
        id: u64,
    ) -> Result<(), Error> {
        let entry = VerdictEntry {
            generation: generation.get(),
            id,
            source_device: source.device,
            destination_device: destination.device,
            inside: destination.inside,
            unused: 0,
            destination_netns: destination.cookie,
        };
        self.owned("verdicts")?;
        held(&self.written).put(pair, entry)
    }

    /// Drops all packets of a pair from now on, whoever sends them. Whether there is such a pair.
    ///
    /// # Errors
    /// It can't be written.
    pub fn revoke(&self, pair: Pair) -> Result<bool, Error> {
        let mut written = held(&self.written);
        let Some(entry) = written.get(pair)? else { return Ok(false) };
        written.put(pair, VerdictEntry { generation: 0, ..entry })?;
        Ok(true)
    }

    /// Takes a pair out. Sockets of it that live would go on by the node's own ways: [`Verdicts::end`] sees that there are none.
    ///
    /// # Errors
    /// It can't be written.
    pub fn forget(&self, pair: Pair) -> Result<bool, Error> {
        held(&self.written).remove(pair)
    }

    /// The pairs that there are.
    ///
    /// # Errors
    /// They can't be read.
    pub fn pairs(&self) -> Result<Vec<(Pair, Verdict)>, Error> {
        let written = held(&self.written);
        let all: Result<Vec<_>, MapError> = written.verdicts.iter().collect();
        let all = all.map_err(Error::map("read", "verdicts"))?;
        Ok(all.into_iter().map(|(key, entry)| (Pair::from(key), Verdict::from(entry))).collect())
    }

    /// Lets the pod connect to `dialled` past capture, whenever the verdict for the endpoint is in force. Also a pod's own address
    /// needs an offer.
    ///
    /// # Errors
    /// There are too many ([`Error::is_full`]), no endpoint, too many of them or one without a weight, another process has taken over,
    /// or it can't be written.
    pub fn offer(&self, source: &Qualified, dialled: SocketAddr, offer: &Offer) -> Result<(), Error> {
        let entry = OfferEntry::new(offer).ok_or_else(|| {
            let why = format!("1 to {OFFER_ENDPOINTS} endpoints are possible, which have weights");
            Error::io("offer", dialled)(std::io::Error::other(why))
        })?;
        self.owned("offers")?;
        let key = Dialled::new(source.cookie, dialled);
        held(&self.offers).insert(key, entry, 0).map_err(Error::map("write", "offers"))
    }

    /// Takes an offer back; connections are not touched. Whether there was one.
    ///
    /// # Errors
    /// It can't be written.
    pub fn withdraw(&self, netns_cookie: u64, dialled: SocketAddr) -> Result<bool, Error> {
        removed(held(&self.offers).remove(&Dialled::new(netns_cookie, dialled)), "offers")
    }

    /// The offers that there are: cookies of namespaces, what they may dial, and where that leads.
    ///
    /// # Errors
    /// They can't be read.
    pub fn offers(&self) -> Result<Vec<(u64, SocketAddr, Offer)>, Error> {
        let offers = held(&self.offers);
        let all: Result<Vec<_>, MapError> = offers.iter().collect();
        let all = all.map_err(Error::map("read", "offers"))?;
        let read = |(key, entry): (Dialled, OfferEntry)| {
            (key.netns, socket_address(key.address, key.port), entry.read())
        };
        Ok(all.into_iter().map(read).collect())
    }

    /// Verdicts of older generations are no longer in force. Whether we are the owner; otherwise nothing was done.
    ///
    /// # Errors
    /// It can't be written.
    pub fn commit(&self, oldest: NonZeroU64) -> Result<bool, Error> {
        self.set(|control| Control { oldest: oldest.get(), ..control })
    }

    /// Lets verdicts be in force for so long from now. Whether we are the owner; otherwise nothing was done.
    ///
    /// # Errors
    /// It can't be written.
    pub fn renew(&self, lease: Duration) -> Result<bool, Error> {
        let now = now().map_err(Error::io("read", "the clock"))?;
        let until = u64::try_from(now.saturating_add(lease).as_nanos()).unwrap_or(u64::MAX);
        self.set(|control| Control { until, ..control })
    }

    /// Ends the lease now. Whether we are the owner; otherwise nothing was done.
    ///
    /// # Errors
    /// It can't be written.
    pub fn stop(&self) -> Result<bool, Error> {
        self.set(|control| Control { until: 0, ..control })
    }

    fn set(&self, change: impl FnOnce(Control) -> Control) -> Result<bool, Error> {
        let mut control = held(&self.control);
        let current = control.get(&0, 0).map_err(Error::map("read", "control"))?;
        if current.owner != self.owner {
            return Ok(false);
        }
        control.set(0, change(current), 0).map_err(Error::map("write", "control"))?;
        Ok(true)
    }

    /// What lets something pass is the owner's to write. To take it back is anybody's.
    fn owned(&self, map: &'static str) -> Result<(), Error> {
        let current = held(&self.control).get(&0, 0).map_err(Error::map("read", "control"))?;
        if current.owner == self.owner {
            return Ok(());
        }
        Err(Error::io("write", map)(std::io::Error::other(
            "another process has taken over the node's verdicts",
        )))
    }

    /// What the programs counted.
    ///
    /// # Errors
    /// It can't be read.
    pub fn tallies(&self) -> Result<[(Tally, u64); TALLIES as usize], Error> {
        let mut tallies = Tally::ALL.map(|tally| (tally, 0));
        for (index, (_, sum)) in (0_u32..).zip(tallies.iter_mut()) {
            let values = self.tallies.get(&index, 0).map_err(Error::map("read", "tallies"))?;
            *sum = values.iter().sum();
        }
        Ok(tallies)
    }

    /// Ends sockets that were let past capture by a pair which isn't there any more: of another build's maps, say.
    fn end_strays(&self, pod: &Netns) -> Result<usize, Error> {
        end_strays(pod, &held(&self.written).verdicts)
    }
}

/// The same, by the verdicts whose map is pinned below `directory`.
pub(crate) fn end_strays_of(pod: &Netns, directory: &Path) -> Result<usize, Error> {
    end_strays(pod, &map(directory, "verdicts")?)
}

fn end_strays(pod: &Netns, verdicts: &HashMap<MapData, PairKey, VerdictEntry>) -> Result<usize, Error> {
    let is_known = |source: IpAddr, destination| {
        let key = PairKey::from(Pair { source, destination });
        !matches!(verdicts.get(&key, 0), Err(MapError::KeyNotFound))
    };
    destroy(pod, |socket| {
        socket.mark.unwrap_or(0) & MARK_MASK == MARK_GRANTED
            && !is_known(socket.local.ip(), socket.peer)
            && !is_known(socket.peer.ip(), socket.local)
    })
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verdicts").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Takes all of a node's verdicts away: programs, and maps that no pod uses. All pairs are to be ended before. Whether there was
/// anything.
///
/// # Errors
/// It can't be removed.
pub fn remove(pins: &Pins) -> Result<bool, Error> {
    let directory = pins.verdicts();
    // What still uses them goes by this.
    if let Ok(mut control) = map::<Array<MapData, Control>>(&directory, "control")
        && let Ok(current) = control.get(&0, 0)
    {
        let over = Control { until: 0, ..current };
        control.set(0, over, 0).map_err(Error::map("write", "control"))?;
    }
    match fs::remove_dir_all(&directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", directory.display())(error)),
    }
}

/// Whether verdicts are of no use any more: nobody renews their lease, no device has their program, and nothing was made of them
/// for a while.
pub(crate) fn is_over(directory: &Path) -> bool {
    let leased = map::<Array<MapData, Control>>(directory, "control")
        .is_ok_and(|control| control.get(&0, 0).is_ok_and(|control| is_ahead(control.until)));
    !leased && !links::has_devices(directory) && is_at_rest(directory) == Some(true)
}

fn is_ahead(until: u64) -> bool {
    now().is_ok_and(|now| now < Duration::from_nanos(until))
}

impl Written {
    fn get(&self, pair: Pair) -> Result<Option<VerdictEntry>, Error> {
        match self.verdicts.get(&PairKey::from(pair), 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(Error::map("read", "verdicts")(error)),
        }
    }

    fn put(&mut self, pair: Pair, entry: VerdictEntry) -> Result<(), Error> {
        let is_new = self.get(pair)?.is_none();
        // Before the verdict: whoever it lets by is already looked at.
        if is_new {
            self.add(pair, 1)?;
        }
        let put = self.verdicts.insert(PairKey::from(pair), entry, 0);
        if put.is_err() && is_new {
            self.add(pair, -1)?;
        }
        put.map_err(Error::map("write", "verdicts"))
    }

    fn remove(&mut self, pair: Pair) -> Result<bool, Error> {
        let found = removed(self.verdicts.remove(&PairKey::from(pair)), "verdicts")?;
        if found {
            self.add(pair, -1)?;
        }
        Ok(found)
    }

    fn add(&mut self, pair: Pair, by: i32) -> Result<(), Error> {
        let key = Neighbours::from(PairKey::from(pair));
        let count = match self.neighbours.get(&key, 0) {
            Ok(count) => count,
            Err(MapError::KeyNotFound) => 0,
            Err(error) => return Err(Error::map("read", "neighbours")(error)),
        };
        match count.saturating_add_signed(by) {
            0 => removed(self.neighbours.remove(&key), "neighbours").map(drop),
            count => self.neighbours.insert(key, count, 0).map_err(Error::map("write", "neighbours")),
        }
    }

    /// Makes the counts right, whatever a process that ended left.
    fn count_neighbours(&mut self) -> Result<(), Error> {
        let mut counts: BTreeMap<[[u8; 16]; 2], u32> = BTreeMap::new();
        for key in self.verdicts.keys() {
            let key = key.map_err(Error::map("read", "verdicts"))?;
            *counts.entry([key.source, key.destination]).or_default() += 1;
        }
        for ([source, destination], count) in &counts {
            let key = Neighbours { source: *source, destination: *destination };
            self.neighbours.insert(key, count, 0).map_err(Error::map("write", "neighbours"))?;
        }
        let known: Vec<Neighbours> = self.neighbours.keys().flatten().collect();
        for key in known {
            if !counts.contains_key(&[key.source, key.destination]) {
                removed(self.neighbours.remove(&key), "neighbours")?;
            }
        }
        Ok(())
    }
}

/// Ends the sockets of a namespace that `wanted` says. How many it found.
fn destroy(netns: &Netns, mut wanted: impl FnMut(&sock_diag::Connection) -> bool) -> Result<usize, Error> {
    let mut all = sock_diag::connections(netns).map_err(Error::io("list the connections of", netns))?;
    all.retain(|socket| wanted(socket));
    if all.is_empty() {
        return Ok(0);
    }
    let failed = |error| Error::io("end a connection of", netns)(error);
    let mut destroyer = Destroyer::open(netns).map_err(failed)?;
    for socket in &all {
        match destroyer.destroy(socket) {
            Ok(()) | Err(DestroyError::Gone) => {}
            Err(error) => return Err(failed(std::io::Error::other(error))),
        }
    }
    Ok(all.len())
}

/// Whether a socket belongs to a pair. ztunnel's connections, and those alive at enrolment, have the same addresses, and marks of
/// their own.
fn of_pair(socket: &sock_diag::Connection, side: Side, pair: Pair) -> bool {
    let mark = socket.mark.unwrap_or(0) & MARK_MASK;
    match side {
        Side::Source => {
            mark == MARK_GRANTED && socket.local.ip() == pair.source && socket.peer == pair.destination
        }
        // A listener that has a mark gives it to what it accepts.
        Side::Destination => {
            ![MARK_ZTUNNEL, MARK_REPLY, MARK_DIRECT].contains(&mark)
                && socket.peer.ip() == pair.source
                && socket.local == pair.destination
        }
    }
}

fn map<M: TryFrom<Map, Error = MapError>>(directory: &Path, name: &'static str) -> Result<M, Error> {
    let data = MapData::from_pin(directory.join(name)).map_err(Error::map("open", name))?;
    let map = Map::from_map_data(data).map_err(Error::map("open", name))?;
    M::try_from(map).map_err(Error::map("open", name))
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether something was taken out.
fn removed(outcome: Result<(), MapError>, name: &'static str) -> Result<bool, Error> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(Error::map("write", name)(error)),
    }
}

fn is_absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound | MapError::ElementNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// `CLOCK_MONOTONIC`, which the programs go by.
fn now() -> std::io::Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

fn socket_address(octets: [u8; 16], port: u16) -> SocketAddr {
    (IpAddr::from(octets).to_canonical(), port).into()
}

impl From<Pair> for PairKey {
    fn from(Pair { source, destination }: Pair) -> Self {
        Self {
            source: Address::new(source).octets,
            destination: Address::new(destination.ip()).octets,
            port: destination.port(),
            unused: 0,
        }
    }
}

impl From<PairKey> for Pair {
    fn from(key: PairKey) -> Self {
        let source = IpAddr::from(key.source).to_canonical();
        Self { source, destination: socket_address(key.destination, key.port) }
    }
}

impl From<PairKey> for Neighbours {
    fn from(key: PairKey) -> Self {
        Self { source: key.source, destination: key.destination }
    }
}

impl From<VerdictEntry> for Verdict {
    fn from(entry: VerdictEntry) -> Self {
        Self {
            generation: NonZeroU64::new(entry.generation),
            id: entry.id,
            source_device: entry.source_device,
            destination_device: entry.destination_device,
        }
    }
}

impl From<Record> for Carried {
    fn from(record: Record) -> Self {
        Self {
            id: record.id,
            socket: record.socket,
            side: if u32::from(record.side) == SIDE_SOURCE { Side::Source } else { Side::Destination },
            netns: record.netns,
            source: socket_address(record.source, record.source_port),
            destination: socket_address(record.destination, record.destination_port),
            dialled: (record.asked_port != 0).then(|| socket_address(record.asked, record.asked_port)),
            established: record.established != 0,
            opened: Duration::from_nanos(record.opened),
            closed: (record.closed != 0).then(|| Duration::from_nanos(record.closed)),
            sent: record.sent,
            received: record.received,
        }
    }
}

impl Dialled {
    fn new(netns: u64, dialled: SocketAddr) -> Self {
        Self { netns, address: Address::new(dialled.ip()).octets, port: dialled.port(), unused: [0; 3] }
    }
}

/// What the kernel may take and give as bytes.
#[expect(unsafe_code, reason = "the trait is how aya is told that")]
mod plain {
    use super::{Asked, Control, Dialled, Neighbours, OfferEntry, PairKey, Record, VerdictEntry};

    // SAFETY: integers and arrays of integers in C's layout without padding (the sizes are asserted in `layout`): every
    // pattern of bits is a value, and there is none that is not initialised.
    unsafe impl aya::Pod for Control {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PairKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for VerdictEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Neighbours {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Dialled {}
    // SAFETY: as above.
    unsafe impl aya::Pod for OfferEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Asked {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Record {}
}
