//! The programs and maps of one pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapInfo, MapType, PerCpuArray};
use aya::programs::{SchedClassifier, SkLookup};
use aya::util::nr_cpus;
use ipnet::IpNet;
use net::Netns;
use nix::time::{ClockId, clock_gettime};

use crate::layout::{
    Address, CAPTURING, COUNTERS, Connection, Control, DELIVERED_EACH, DELIVERED_LEAST, DELIVERED_LIMIT,
    ENTRIES_LIMIT, INTERFACE_EXCLUDED, Interface, LISTENERS, Neighbours, ONLY_OUTBOUND_RANGES, PORT_WORDS,
    PairKey, PortSets, RANGE_EXCLUDED, RANGE_INCLUDED, RANGE_V6, RANGES_LIMIT, Range, Settings, VerdictEntry,
};
use crate::pins::{is_note, is_over};
use crate::sys::{self, AttachType};
use crate::{Error, Pins, objects, verdicts};

/// The link of the choice of sockets.
pub(crate) const SOCKETS: &str = "link-sockets";
/// The loopback device is the first of every namespace (kernel `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// Of settings whose programs are still being attached: whoever ends before that leaves others.
const NOT_ATTACHED: [u8; 8] = [0; 8];
/// Before the number of a generation of maps. The first has no directory of its own.
const GENERATION: &str = "maps-";
/// The maps as the programs declare them.
const MAPS: [Shape; 5] = [
    Shape("settings", MapType::Hash, 4, size_of::<Settings>(), 1),
    Shape("ports", MapType::Hash, 4, size_of::<PortSets>(), 2),
    Shape("ranges", MapType::LpmTrie, 4 + size_of::<Range>(), 4, RANGES_LIMIT),
    Shape("listeners", MapType::SockMap, 4, 4, LISTENERS),
    Shape("counters", MapType::PerCpuArray, 4, 8, COUNTERS),
];
/// Those that have room for what is in them, and no more: the kernel keeps 16 bytes for each entry that there may be (110 of the
/// first), and most pods have a device, an address or two, and no refused connection. Where one gets too small, a new generation takes
/// its place.
const LISTS: [Shape; 4] = [
    Shape("delivered", MapType::LruHash, size_of::<Connection>(), 4, DELIVERED_LIMIT),
    Shape("interfaces", MapType::Hash, size_of::<Interface>(), 4, ENTRIES_LIMIT),
    Shape("own", MapType::Hash, size_of::<Address>(), 4, ENTRIES_LIMIT),
    Shape("refused", MapType::Hash, size_of::<Connection>(), 4, ENTRIES_LIMIT),
];
/// What one of them has room for at least.
const ENTRIES_LEAST: u32 = 64;
/// Those that are the node's, where it has verdicts; a pod's own have no entry, and room for one.
const SHARED: [Shape; 3] = [
    Shape("control", MapType::Array, 4, size_of::<Control>(), 1),
    Shape("verdicts", MapType::Hash, size_of::<PairKey>(), size_of::<VerdictEntry>(), 1),
    Shape("neighbours", MapType::Hash, size_of::<Neighbours>(), 4, 1),
];

/// A map: its name, kind, sizes of keys and values, and entries at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape(
    pub(crate) &'static str,
    pub(crate) MapType,
    pub(crate) usize,
    pub(crate) usize,
    pub(crate) u32,
);

impl Shape {
    /// Whether a map of that name is pinned below `directory`, and is like this.
    fn is_in(&self, directory: &Path) -> bool {
        self.holds(directory, |info| info.max_entries() == self.4)
    }

    /// Whether one is pinned there that programs can use as this, however many entries it has room for.
    fn is_usable_in(&self, directory: &Path) -> bool {
        self.holds(directory, |_| true)
    }

    fn holds(&self, directory: &Path, more: impl FnOnce(&MapInfo) -> bool) -> bool {
        let Self(name, kind, key, value, _) = self;
        MapInfo::from_pin(directory.join(name)).is_ok_and(|info| {
            info.map_type().is_ok_and(|found| found == *kind)
                && (info.key_size() as usize, info.value_size() as usize) == (*key, *value)
                && more(&info)
        })
    }

    /// Whether one is there that is not like this.
    pub(crate) fn is_other(&self, directory: &Path) -> bool {
        directory.join(self.0).exists() && !self.is_in(directory)
    }
}

/// What the maps of a pod say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contents {
    /// The half and the build are not looked at.
    pub settings: Settings,
    /// The sets of ports.
    pub ports: Box<PortSets>,
    /// Destinations that are left alone.
    pub excluded: Vec<IpNet>,
    /// Destinations that are captured.
    pub included: Vec<IpNet>,
    /// Interfaces by their numbers, with what is said of them; also those of which nothing is said.
    pub interfaces: BTreeMap<u32, u32>,
    /// The pod's own addresses.
    pub own: BTreeSet<IpAddr>,
    /// Connections that are answered with resets.
    pub refused: BTreeSet<(std::net::SocketAddr, std::net::SocketAddr)>,
}

/// How a pod differs from what it should be.
pub type Drift = Vec<String>;

/// A pod's programs and maps.
#[derive(Debug)]
pub struct Pod {
    directory: PathBuf,
    /// Where its maps are: the newest generation.
    maps: PathBuf,
    /// Where the node's verdicts are, if it has any.
    verdicts: PathBuf,
}

impl Address {
    /// IPv4 in its mapped form.
    #[must_use]
    pub fn new(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        Self { octets }
    }
}

impl Connection {
    /// The connection between an address of the pod and another one.
    #[must_use]
    pub fn new(local: std::net::SocketAddr, peer: std::net::SocketAddr) -> Self {
        Self {
            local: Address::new(local.ip()).octets,
            peer: Address::new(peer.ip()).octets,
            local_port: local.port(),
            peer_port: peer.port(),
        }
    }
}

impl Contents {
    /// What [`LISTS`] must have room for, in their order.
    fn room(&self) -> [u32; LISTS.len()] {
        // Interfaces are in both halves, for a moment those of before and of now.
        let [interfaces, own, refused] =
            [2 * self.interfaces.len(), self.own.len(), self.refused.len()].map(|entries| {
                let entries = u32::try_from(entries).unwrap_or(ENTRIES_LIMIT).min(ENTRIES_LIMIT);
                entries.next_power_of_two().max(ENTRIES_LEAST)
            });
        [in_delivery(), interfaces, own, refused]
    }

    /// The same, by which nothing is captured.
    fn at_rest(&self) -> Self {
        Self { settings: Settings { flags: 0, ..self.settings }, ..self.clone() }
    }
}

/// The longest that a pod may be between what it was and what it is to be. Who changes it needs some milliseconds, and as a rule
/// ends it.
const CHANGE: Duration = Duration::from_secs(3);

/// When a change that begins now ends at the latest, as the programs' clock has it.
fn change_limit() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from((now + CHANGE).as_nanos()).unwrap_or(u64::MAX)
}

/// How many connections may be on their way to the application: the same number of each processor that this machine may have, as
/// the kernel would make it.
fn in_delivery() -> u32 {
    let processors = nr_cpus().ok().and_then(|count| u32::try_from(count).ok()).unwrap_or(1).max(1);
    processors * (DELIVERED_LIMIT / processors).clamp(DELIVERED_LEAST, DELIVERED_EACH)
}

impl PortSets {
    /// No port in any set.
    #[must_use]
    pub fn empty() -> Box<Self> {
        let none = [0; PORT_WORDS];
        Box::new(Self {
            inbound_excluded: none,
            inbound_included: none,
            outbound_excluded: none,
            outbound_included: none,
        })
    }
}

/// What tells these programs from others.
#[must_use]
pub fn build() -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    objects::CAPTURE.hash(&mut hasher);
    hasher.finish().to_le_bytes()
}

/// Removes all that belongs to a pod but what was noted of it. Whether there was anything.
///
/// # Errors
/// It can't be removed.
pub fn remove(pins: &Pins, netns: &Netns) -> Result<bool, Error> {
    let directory = pins.of(netns);
    if !directory.exists() {
        return Ok(false);
    }
    // What is half removed looks like what a namespace that is gone has left: nobody is to sweep it meanwhile.
    let _held = pins.hold()?;
    // All programs at once let everything pass, where the maps are those that we know.
    if let Some(pod) = Pod::find(pins, netns).filter(Pod::fits) {
        let mut settings: HashMap<MapData, u32, Settings> = pod.map("settings")?;
        settings.insert(0, Settings::default(), 0).map_err(Error::map("write", "settings"))?;
    }
    if !directory.exists() {
        return Ok(false);
    }
    let mut found = false;
    for path in entries(&directory)?.iter().filter(|path| !is_note(path)) {
        found = true;
        // A link without a name is detached too, but in the kernel's own time.
        if is_link(path)
            && let Ok(link) = sys::open(path)
            && let Err(error) = sys::link_detach(link.as_fd())
        {
            tracing::debug!(link = %path.display(), %error, "a program is detached when its name is gone");
        }
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.map_err(Error::io("remove", path.display()))?;
    }
    match fs::remove_dir(&directory) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(Error::io("remove", directory.display())(error))
        }
        _ => Ok(found),
    }
}

/// Whether a pod is captured, or was and lacks some of what that takes: its guard lets nothing out that should be captured.
#[must_use]
pub fn is_guarded(pins: &Pins, netns: &Netns) -> bool {
    let directory = pins.of(netns);
    let is_linked = entries(&directory).is_ok_and(|entries| entries.iter().any(|path| is_link(path)));
    if !is_linked || is_over(&directory) == Some(true) {
        return false;
    }
    let settings: Result<HashMap<MapData, u32, Settings>, _> =
        Pod::at(directory, pins.verdicts()).map("settings");
    let current = settings.and_then(|map| map.get(&0, 0).map_err(Error::map("read", "settings")));
    current.is_ok_and(|current| current.flags & CAPTURING != 0)
}

impl Pod {
    /// The pod's programs if they are there.
    #[must_use]
    pub fn find(pins: &Pins, netns: &Netns) -> Option<Self> {
        let directory = pins.of(netns);
        (is_over(&directory) == Some(false)).then(|| Self::at(directory, pins.verdicts()))
    }

    fn at(directory: PathBuf, verdicts: PathBuf) -> Self {
        let generation = newest(&directory);
        let maps = if generation == 0 {
            directory.clone()
        } else {
            directory.join(format!("{GENERATION}{generation}"))
        };
        Self { directory, maps, verdicts }
    }

    /// Whether its maps are as the programs declare them: whoever opens a map by its name is given it as it is. Those of the node
    /// have to be the node's, where those are so too; another build's are none.
    fn fits(&self) -> bool {
        MAPS.iter().all(|shape| shape.is_in(&self.maps))
            && LISTS.iter().all(|shape| shape.is_usable_in(&self.maps))
            && SHARED.iter().all(|shape| {
                if shape.is_usable_in(&self.verdicts) {
                    is_same_map(shape.0, &self.maps, &self.verdicts)
                } else {
                    // What is left of verdicts that were removed lets nothing by.
                    shape.is_usable_in(&self.maps)
                }
            })
    }

    /// Whether they have room for `contents`, too.
    fn fits_with(&self, contents: &Contents) -> bool {
        let mut lists = LISTS.iter().zip(contents.room());
        self.fits() && lists.all(|(shape, room)| shape.holds(&self.maps, |info| info.max_entries() >= room))
    }

    /// Whether it is captured by these programs, with the verdicts of `directory`.
    pub(crate) fn shares(&self, directory: &Path) -> bool {
        SHARED.iter().all(|shape| is_same_map(shape.0, &self.maps, directory))
            && matches!(self.read(), Ok(Some((settings, _)))
                if settings.build == build() && settings.flags & CAPTURING != 0)
    }

    /// Whether some of what the pod sends is not captured, or if that can't be told.
    pub(crate) fn exempts(&self) -> bool {
        let Ok(Some((settings, contents))) = self.read() else { return true };
        settings.flags & ONLY_OUTBOUND_RANGES != 0
            || !contents.excluded.is_empty()
            || contents.ports.outbound_excluded.iter().any(|word| *word != 0)
            || contents.interfaces.values().any(|kind| kind & INTERFACE_EXCLUDED != 0)
    }

    /// With new maps if those that are there don't fit. Programs that use the old ones go on until they are replaced.
    fn with_maps_that_fit(self, contents: &Contents) -> Result<Self, Error> {
        if self.fits_with(contents)
            || MAPS.iter().chain(&LISTS).chain(&SHARED).all(|shape| !self.maps.join(shape.0).exists())
        {
            return Ok(self);
        }
        let maps = self.directory.join(format!("{GENERATION}{}", newest(&self.directory) + 1));
        fs::create_dir(&maps).map_err(Error::io("make", maps.display()))?;
        Ok(Self { maps, ..self })
    }

    /// The maps of older generations.
    fn older(&self) -> Result<Vec<PathBuf>, Error> {
        let mut older = entries(&self.directory)?;
        older.retain(|path| {
            self.maps != self.directory && *path != self.maps && !is_link(path) && !is_note(path)
        });
        Ok(older)
    }

    /// Makes the pod's maps say `contents`, and attaches the programs to its interfaces. Whether anything was changed. With a
    /// [`Settings::changing_until`] that is not 0 a change begins now, which [`Self::settle`] is to end.
    ///
    /// # Errors
    /// What could not be done. What was done of it captures or refuses.
    pub fn install(pins: &Pins, netns: &Netns, contents: &Contents) -> Result<bool, Error> {
        if let Some(pod) = Self::find(pins, netns)
            && pod.drift(netns, contents)?.is_empty()
        {
            return Ok(false);
        }
        let _held = pins.hold()?;
        let directory = pins.of(netns);
        if is_over(&directory) == Some(true) {
            remove(pins, netns)?;
        }
        fs::create_dir_all(&directory).map_err(Error::io("make", directory.display()))?;
        let pod = Self::at(directory, pins.verdicts());
        let before = pod.maps.clone();
        let pod = pod.with_maps_that_fit(contents)?;
        let older = pod.older()?;
        let attached = older.is_empty()
            && pod.fits_with(contents)
            && pod.detached(netns, contents).is_empty()
            && pod.has_our_programs();
        if attached {
            pod.write(contents, build())?;
        } else {
            let mut loaded = pod.load(contents)?;
            // Its programs still drop what the old verdicts let by; these don't know of it.
            if !is_same_map("verdicts", &before, &pod.maps)
                && let Err(error) = verdicts::end_strays_of(netns, &pod.maps)
            {
                tracing::warn!(%netns, %error, "connections by verdicts that are gone may go on");
            }
            // Maps may be new and empty where programs of older ones capture: links say whether any do.
            let is_new =
                matches!(pod.read(), Ok(None)) && !entries(&pod.directory)?.iter().any(|path| is_link(path));
            // The maps first: programs with empty ones drop. In a pod that was not captured so far, nothing is until all programs
            // are there, which takes a while, and then everything at once: half of them refuse what the others would have taken.
            // What is captured already is never at rest.
            if is_new {
                pod.write(&contents.at_rest(), NOT_ATTACHED)?;
            } else {
                pod.write(contents, NOT_ATTACHED)?;
            }
            let attached = pod.attach(&mut loaded, netns, contents.interfaces.keys().copied());
            if is_new {
                // Also where some are missing: what can't be captured is refused.
                pod.write(contents, NOT_ATTACHED)?;
            }
            attached?;
            for path in older {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(Error::io("remove", path.display()))?;
            }
            pod.sign()?;
        }
        Ok(true)
    }

    /// The links that should be there and aren't, or lead elsewhere.
    fn detached(&self, netns: &Netns, contents: &Contents) -> Vec<String> {
        let mut detached = Vec::new();
        for (name, kind, target) in links(netns, contents.interfaces.keys().copied()) {
            let attached = sys::open(&self.directory.join(&name))
                .and_then(|link| sys::link_info(link.as_fd()))
                .is_ok_and(|info| info.target == target && info.attach_type == kind as u32);
            if !attached {
                detached.push(format!("the program of {name}"));
            }
        }
        detached
    }

    fn has_our_programs(&self) -> bool {
        matches!(self.read(), Ok(Some((settings, _))) if settings.build == build())
    }

    /// How the pod differs from `contents`.
    ///
    /// # Errors
    /// It can't be read.
    pub fn drift(&self, netns: &Netns, contents: &Contents) -> Result<Drift, Error> {
        let mut drift = Vec::new();
        if !self.fits_with(contents) || !self.older()?.is_empty() {
            drift.push("the maps of these programs; others are there".to_owned());
            return Ok(drift);
        }
        match self.read()? {
            None => drift.push("the settings".to_owned()),
            Some((settings, found)) => {
                if settings.build != build() {
                    drift.push("these programs; others are there".to_owned());
                }
                if found != *contents {
                    drift.push("these lists; others are there".to_owned());
                }
            }
        }
        drift.extend(self.detached(netns, contents));
        Ok(drift)
    }

    /// The counters, summed over the processors.
    ///
    /// # Errors
    /// They can't be read.
    pub fn counters(&self) -> Result<[u64; COUNTERS as usize], Error> {
        let map: PerCpuArray<MapData, u64> = self.map("counters")?;
        let mut sums = [0; COUNTERS as usize];
        for (index, sum) in (0_u32..).zip(sums.iter_mut()) {
            let values = map.get(&index, 0).map_err(Error::map("read", "counters"))?;
            *sum = values.iter().sum();
        }
        Ok(sums)
    }

    fn load(&self, contents: &Contents) -> Result<Ebpf, Error> {
        let mut loader = crate::loader();
        let loader = loader.get_or_insert_with(crate::without_types);
        loader.default_map_pin_directory(&self.maps);
        for (Shape(name, ..), room) in LISTS.iter().zip(contents.room()) {
            loader.map_max_entries(name, room);
        }
        for shape in SHARED {
            let Shape(name, _, _, _, entries) = shape;
            let is_nodes = shape.is_usable_in(&self.verdicts);
            let (nodes, ours) = (self.verdicts.join(name), self.maps.join(name));
            if is_nodes && !ours.exists() {
                let map = MapData::from_pin(&nodes).map_err(Error::map("open", name))?;
                sys::pin(map.fd().as_fd(), &ours).map_err(Error::io("pin", ours.display()))?;
            }
            // One that is pinned is taken as it is.
            loader.map_max_entries(name, entries);
        }
        loader.load(objects::CAPTURE).map_err(|error| Error::Load(Box::new(error)))
    }

    fn attach(
        &self,
        loaded: &mut Ebpf,
        netns: &Netns,
        interfaces: impl Iterator<Item = u32>,
    ) -> Result<(), Error> {
        let wanted = links(netns, interfaces);
        for (name, kind, target) in &wanted {
            let program = program(loaded, name)?;
            let path = self.directory.join(name);
            // A link that has lost its interface, or had another one of that number, is of no use.
            if let Ok(link) = sys::open(&path) {
                let info = sys::link_info(link.as_fd()).map_err(Error::io("look at", path.display()))?;
                if info.target == *target {
                    sys::link_update(link.as_fd(), program)
                        .map_err(Error::io("replace the program of", path.display()))?;
                    continue;
                }
                fs::remove_file(&path).map_err(Error::io("remove", path.display()))?;
            }
            let link = netns
                .run(|| {
                    let target =
                        if *kind == AttachType::SkLookup { sys::descriptor(netns.as_fd()) } else { *target };
                    sys::link_create(program, target, *kind)
                })
                .and_then(|made| made)
                .map_err(Error::io("attach", format!("{name} in {netns}")))?;
            sys::pin(link.as_fd(), &path).map_err(Error::io("pin", path.display()))?;
        }
        // Those of interfaces that are gone, or that are no longer ours.
        let names: BTreeSet<_> = wanted.into_iter().map(|(name, ..)| name).collect();
        for path in entries(&self.directory)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if is_link(&path) && !names.contains(&name) {
                fs::remove_file(&path).map_err(Error::io("remove", path.display()))?;
            }
        }
        Ok(())
    }

    fn map<M: TryFrom<Map, Error = aya::maps::MapError>>(&self, name: &'static str) -> Result<M, Error> {
        let data = MapData::from_pin(self.maps.join(name)).map_err(Error::map("open", name))?;
        let map = Map::from_map_data(data).map_err(Error::map("open", name))?;
        M::try_from(map).map_err(Error::map("open", name))
    }

    /// Lets the pod's new connections out, until [`Self::settle`] or the next [`Self::install`], and for [`CHANGE`] at most: its
    /// routes may be taken away without one being refused. Of connections that have no mark nothing but their first packet gets out.
    ///
    /// # Errors
    /// It can't be written.
    pub fn let_out(&self) -> Result<(), Error> {
        self.change(|current| Settings { changing_until: change_limit(), ..current })
    }

    /// The routes are what they are to be, and what lives has its mark: the end of the change.
    ///
    /// # Errors
    /// It can't be written.
    pub fn settle(&self) -> Result<(), Error> {
        self.change(|current| Settings { changing_until: 0, ..current })
    }

    /// Says that the programs of all links are these.
    fn sign(&self) -> Result<(), Error> {
        self.change(|current| Settings { build: build(), ..current })
    }

    fn change(&self, change: impl FnOnce(Settings) -> Settings) -> Result<(), Error> {
        let mut settings: HashMap<MapData, u32, Settings> = self.map("settings")?;
        let current = settings.get(&0, 0).map_err(Error::map("read", "settings"))?;
        settings.insert(0, change(current), 0).map_err(Error::map("write", "settings"))
    }

    fn write(&self, contents: &Contents, build: [u8; 8]) -> Result<(), Error> {
        let mut settings: HashMap<MapData, u32, Settings> = self.map("settings")?;
        let half = settings.get(&0, 0).map_or(0, |current| 1 - current.half.min(1));
        self.write_lists(contents, half)?;
        let mut own: HashMap<MapData, Address, u32> = self.map("own")?;
        let wanted: BTreeMap<_, _> = contents.own.iter().map(|ip| (Address::new(*ip).octets, 1)).collect();
        replace(
            &mut own,
            "own",
            |key| wanted.contains_key(&key.octets),
            |map| wanted.keys().try_for_each(|octets| map.insert(Address { octets: *octets }, 1, 0)),
        )?;
        let mut refused: HashMap<MapData, Connection, u32> = self.map("refused")?;
        let wanted: Vec<_> =
            contents.refused.iter().map(|(local, peer)| Connection::new(*local, *peer)).collect();
        replace(
            &mut refused,
            "refused",
            |key| wanted.contains(key),
            |map| wanted.iter().try_for_each(|key| map.insert(key, 1, 0)),
        )?;
        let changing_until = if contents.settings.changing_until == 0 { 0 } else { change_limit() };
        let value = Settings { half, build, changing_until, ..contents.settings };
        settings.insert(0, value, 0).map_err(Error::map("write", "settings"))
    }

    /// Writes the lists into the half that is not in force.
    fn write_lists(&self, contents: &Contents, half: u32) -> Result<(), Error> {
        let mut ports: HashMap<MapData, u32, PortSets> = self.map("ports")?;
        ports.insert(half, *contents.ports, 0).map_err(Error::map("write", "ports"))?;
        let mut interfaces: HashMap<MapData, Interface, u32> = self.map("interfaces")?;
        replace(
            &mut interfaces,
            "interfaces",
            |key| key.half != half,
            |map| {
                let entries = contents.interfaces.iter();
                entries
                    .into_iter()
                    .try_for_each(|(index, kind)| map.insert(Interface { half, index: *index }, kind, 0))
            },
        )?;
        let mut ranges: LpmTrie<MapData, Range, u32> = self.map("ranges")?;
        let old: Vec<_> = ranges.keys().flatten().filter(|key| key.data().is_of(half)).collect();
        for key in old {
            ranges.remove(&key).map_err(Error::map("write", "ranges"))?;
        }
        for (list, networks) in [(RANGE_EXCLUDED, &contents.excluded), (RANGE_INCLUDED, &contents.included)] {
            for network in networks {
                let key = Range::key(list, half, *network);
                ranges.insert(&key, 1, 0).map_err(Error::map("write", "ranges"))?;
            }
        }
        Ok(())
    }

    /// The settings and what is in force; `None` if nothing was written yet.
    fn read(&self) -> Result<Option<(Settings, Contents)>, Error> {
        let settings: HashMap<MapData, u32, Settings> = self.map("settings")?;
        let Ok(current) = settings.get(&0, 0) else { return Ok(None) };
        let half = current.half;
        let ports: HashMap<MapData, u32, PortSets> = self.map("ports")?;
        let Ok(ports) = ports.get(&half, 0) else { return Ok(None) };
        let interfaces: HashMap<MapData, Interface, u32> = self.map("interfaces")?;
        let interfaces = interfaces.iter().flatten().filter(|(key, _)| key.half == half);
        let ranges: LpmTrie<MapData, Range, u32> = self.map("ranges")?;
        let (mut excluded, mut included) = (Vec::new(), Vec::new());
        for key in ranges.keys().flatten().filter(|key| key.data().is_of(half)) {
            let list =
                if u32::from(key.data().list & 1) == RANGE_EXCLUDED { &mut excluded } else { &mut included };
            list.extend(network_of(&key));
        }
        excluded.sort();
        included.sort();
        let own: HashMap<MapData, Address, u32> = self.map("own")?;
        let refused: HashMap<MapData, Connection, u32> = self.map("refused")?;
        let contents = Contents {
            settings: Settings { half: 0, build: [0; 8], ..current },
            ports: Box::new(ports),
            excluded,
            included,
            interfaces: interfaces.map(|(key, kind)| (key.index, kind)).collect(),
            own: own.keys().flatten().map(|key| ip(key.octets)).collect(),
            refused: refused.keys().flatten().map(|key| ends(&key)).collect(),
        };
        Ok(Some((current, contents)))
    }
}

/// Takes out what is not to stay, and puts in what is wanted.
fn replace<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    stays: impl Fn(&K) -> bool,
    insert: impl FnOnce(&mut HashMap<MapData, K, V>) -> Result<(), aya::maps::MapError>,
) -> Result<(), Error> {
    let old: Vec<K> = map.keys().flatten().filter(|key| !stays(key)).collect();
    for key in old {
        map.remove(&key).map_err(Error::map("write", name))?;
    }
    insert(map).map_err(Error::map("write", name))
}

/// The pod's links: names, kinds, and interfaces or the namespace's number.
fn links(netns: &Netns, interfaces: impl Iterator<Item = u32>) -> Vec<(String, AttachType, u32)> {
    let inode = u32::try_from(netns.id().inode()).unwrap_or(0);
    let mut all = vec![
        (SOCKETS.to_owned(), AttachType::SkLookup, inode),
        (format!("link-inside-{LOOPBACK}"), AttachType::TcxIngress, LOOPBACK),
    ];
    for index in interfaces.filter(|index| *index != LOOPBACK) {
        all.push((format!("link-arriving-{index}"), AttachType::TcxIngress, index));
        all.push((format!("link-leaving-{index}"), AttachType::TcxEgress, index));
    }
    // The choice of sockets last: what it needs is there by then.
    all.rotate_left(1);
    all
}

/// The program of a link, loaded if it isn't.
fn program<'a>(loaded: &'a mut Ebpf, link: &str) -> Result<BorrowedFd<'a>, Error> {
    let name = ["sockets", "inside", "arriving", "leaving"];
    let name = name.into_iter().find(|name| link.contains(name)).unwrap_or("sockets");
    let absent = || Error::program(name)(aya::programs::ProgramError::UnexpectedProgramType);
    let found = loaded.program_mut(name).ok_or_else(absent)?;
    let fd = if name == "sockets" {
        let program: &mut SkLookup = found.try_into().map_err(Error::program(name))?;
        if program.fd().is_err() {
            crate::load(name, || program.load())?;
        }
        program.fd()
    } else {
        let program: &mut SchedClassifier = found.try_into().map_err(Error::program(name))?;
        if program.fd().is_err() {
            crate::load(name, || program.load())?;
        }
        program.fd()
    };
    Ok(fd.map_err(Error::program(name))?.as_fd())
}

/// Whether the programs of the pod whose directory this is have the verdicts of another directory.
pub(crate) fn shares(pod: &Path, verdicts: &Path) -> bool {
    let pod = Pod::at(pod.to_owned(), verdicts.to_owned());
    SHARED.iter().any(|shape| is_same_map(shape.0, &pod.maps, verdicts))
}

fn is_same_map(name: &str, one: &Path, other: &Path) -> bool {
    let id = |directory: &Path| MapInfo::from_pin(directory.join(name)).ok().map(|info| info.id());
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// The number of the newest generation of maps.
fn newest(directory: &Path) -> u32 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let numbers =
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(GENERATION)?.parse().ok());
    numbers.max().unwrap_or(0)
}

pub(crate) fn is_link(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link-"))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(directory).map_err(Error::io("list", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

impl Range {
    /// The key of a network in one of the lists, of one of the halves.
    #[must_use]
    pub fn key(list: u32, half: u32, network: IpNet) -> Key<Self> {
        let (more, family) = if network.addr().is_ipv4() { (96, 0) } else { (0, RANGE_V6) };
        let list = u8::try_from(list | half << 1 | family).unwrap_or(0);
        let network_octets = Address::new(network.network()).octets;
        Key::new(8 + more + u32::from(network.prefix_len()), Self { list, network: network_octets })
    }

    fn is_of(self, half: u32) -> bool {
        u32::from(self.list >> 1 & 1) == half
    }

    fn is_v6(self) -> bool {
        u32::from(self.list) & RANGE_V6 != 0
    }
}

fn network_of(key: &Key<Range>) -> Option<IpNet> {
    let (bits, range) = (u8::try_from(key.prefix_len().checked_sub(8)?).ok()?, key.data());
    let (ip, bits) =
        if range.is_v6() { (range.network.into(), bits) } else { (ip(range.network), bits.checked_sub(96)?) };
    IpNet::new(ip, bits).ok()
}

fn ip(octets: [u8; 16]) -> IpAddr {
    IpAddr::from(octets).to_canonical()
}

fn ends(connection: &Connection) -> (std::net::SocketAddr, std::net::SocketAddr) {
    let Connection { local, peer, local_port, peer_port } = *connection;
    ((ip(local), local_port).into(), (ip(peer), peer_port).into())
}

/// What the kernel may take and give as bytes.
#[expect(unsafe_code, reason = "the trait is how aya is told that")]
mod plain {
    use super::{Address, Connection, Interface, PortSets, Range, Settings};

    // SAFETY: integers and arrays of integers in C's layout without padding (the sizes are asserted in `layout`): every
    // pattern of bits is a value, and there is none that is not initialised.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PortSets {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Range {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Interface {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Connection {}
}
