//! Secured HBONE connections of peers, and how many of them there may be.
//!
//! Each costs a descriptor, TLS and HTTP/2 state, for as long as its peer likes. So there are only so many, for a pod
//! and for all, and one source has a share of a pod's. When there is no more room, the oldest without a tunnel makes some
//! (its peer is told with GOAWAY, and connects anew when it needs to); if there is none, a new one is refused.
//!
//! The peers of a pod that leaves the mesh are told in the same way.
//!
//! Invariants:
//! * a source has closed, for its own sake, no connection of one that has fewer;
//! * connections that leave count until they are gone, whatever they leave for: there are never more than a limit and an eighth of it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hbone::Control;
use tokio::time::Instant;

/// One whose connections are counted together: an IPv4 address, or a /64 of IPv6, whose addresses a single host may use
/// as it likes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Source(IpAddr);

impl Source {
    /// Who has `ip`.
    pub fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) => {
                let [a, b, c, d, ..] = ip.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
            ip @ IpAddr::V4(_) => ip,
        })
    }
}

/// How many connections there may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Most {
    /// Of one source to one pod.
    pub per_source: usize,
    /// To one pod.
    pub per_pod: usize,
    /// To all pods.
    pub all: usize,
}

/// Why a connection was refused: those that there are have tunnels, or are of others that have fewer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoRoom {
    /// Its source has its share.
    #[error(
        "this address has {0} HBONE connections to the pod, the limit, and none may be closed for this one"
    )]
    Source(usize),
    /// The pod has as many as it may.
    #[error("the pod has {0} HBONE connections, the limit, and none may be closed for this one")]
    Pod(usize),
    /// There are as many as there may be.
    #[error(
        "there are {0} HBONE connections to this node's pods, the limit, and none may be closed for this one"
    )]
    All(usize),
}

/// The connections, and whose they are.
#[derive(Debug)]
pub struct Peers {
    most: Most,
    guests: Mutex<Guests>,
    /// Connections closed so that others have room, and connections refused.
    closed: AtomicU64,
    refused: AtomicU64,
    started: Instant,
}

/// A pod, by the number of its network namespace: no other has it as long as the pod has connections, which hold it.
type Pod = u64;

type Key = (Pod, Source);

#[derive(Debug, Default)]
struct Guests {
    of: HashMap<Key, Vec<Arc<Guest>>>,
    per_pod: HashMap<Pod, Count>,
    all: Count,
}

/// Connections that are open, and those of them that were told to leave.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    open: usize,
    leaving: usize,
}

#[derive(Debug)]
struct Guest {
    key: Key,
    control: Control,
    tunnels: AtomicUsize,
    /// Since when there are no tunnels, in milliseconds.
    idle_since: AtomicU64,
    /// Changed only under the lock.
    leaving: AtomicBool,
}

/// A connection's place, given back when dropped.
#[derive(Debug)]
pub struct Seat {
    peers: Arc<Peers>,
    guest: Arc<Guest>,
}

/// A tunnel of a connection, until dropped.
#[derive(Debug)]
pub struct Busy(Arc<Seat>);

impl Peers {
    /// None yet.
    pub fn new(most: Most) -> Self {
        Self {
            most,
            guests: Mutex::default(),
            closed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    /// A place for a connection from `ip` to the pod of this number, which `control` ends.
    ///
    /// # Errors
    /// See [`NoRoom`].
    pub fn admit(self: &Arc<Self>, pod: Pod, ip: IpAddr, control: Control) -> Result<Seat, NoRoom> {
        let guest = Arc::new(Guest {
            key: (pod, Source::of(ip)),
            control,
            tunnels: AtomicUsize::new(0),
            idle_since: AtomicU64::new(self.now()),
            leaving: AtomicBool::new(false),
        });
        let mut guests = self.guests();
        if let Err(error) = self.make_room(&mut guests, &guest.key) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(error);
        }
        guests.enter(guest.clone());
        drop(guests);
        Ok(Seat { peers: self.clone(), guest })
    }

    /// Tells the peers of a pod that it leaves: they open no more tunnels on their connections, which end when they have none.
    pub fn leave(&self, pod: Pod) {
        let mut guests = self.guests();
        for guest in guests.of_all(pod) {
            if !guest.leaving.load(Ordering::Relaxed) {
                guests.leaves(&guest);
                guest.control.retire();
            }
        }
    }

    /// Ends the connections of a pod, with their tunnels.
    pub fn abort(&self, pod: Pod) {
        self.guests().of_all(pod).iter().for_each(|guest| guest.control.abort());
    }

    /// How many connections a pod has.
    pub fn of(&self, pod: Pod) -> usize {
        self.guests().of_pod(pod).open
    }

    /// Connections that were closed, without tunnels, so that others have room.
    pub fn closed(&self) -> u64 {
        self.closed.load(Ordering::Relaxed)
    }

    /// Connections that were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// How many there may be at most.
    pub fn limit(&self) -> usize {
        self.most.all
    }

    /// Closes a connection for each limit that is reached.
    fn make_room(&self, guests: &mut Guests, key: &Key) -> Result<(), NoRoom> {
        let Most { per_source, per_pod, all } = self.most;
        let own = guests.of_source(key);
        self.make_room_for(guests, own, per_source, |other, _| other == key)
            .ok_or(NoRoom::Source(per_source))?;
        self.make_room_for(guests, guests.of_pod(key.0), per_pod, |(pod, _), count| {
            *pod == key.0 && count >= own.open
        })
        .ok_or(NoRoom::Pod(per_pod))?;
        self.make_room_for(guests, guests.all, all, |_, count| count >= own.open).ok_or(NoRoom::All(all))
    }

    /// Nothing if it can't be done.
    fn make_room_for(
        &self,
        guests: &mut Guests,
        count: Count,
        limit: usize,
        of: impl Fn(&Key, usize) -> bool,
    ) -> Option<()> {
        if count.open >= limit + (limit / 8).max(1) {
            return None;
        }
        if count.open - count.leaving >= limit {
            let guest = guests.oldest_idle(of)?;
            guests.leaves(&guest);
            guest.control.retire();
            self.closed.fetch_add(1, Ordering::Relaxed);
        }
        Some(())
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Guest {
    /// Since when it could be closed, if it can.
    fn idle_since(&self) -> Option<u64> {
        let idle = self.tunnels.load(Ordering::Relaxed) == 0 && !self.leaving.load(Ordering::Relaxed);
        idle.then(|| self.idle_since.load(Ordering::Relaxed))
    }
}

impl Guests {
    fn of_source(&self, key: &Key) -> Count {
        let list = self.of.get(key).map_or(&[][..], Vec::as_slice);
        let leaving = list.iter().filter(|guest| guest.leaving.load(Ordering::Relaxed)).count();
        Count { open: list.len(), leaving }
    }

    fn of_pod(&self, pod: Pod) -> Count {
        self.per_pod.get(&pod).copied().unwrap_or_default()
    }

    fn of_all(&self, pod: Pod) -> Vec<Arc<Guest>> {
        self.of.iter().filter(|((of, _), _)| *of == pod).flat_map(|(_, list)| list).cloned().collect()
    }

    /// The oldest idle connection of the source that has the most to one pod, of those that have an idle one.
    fn oldest_idle(&self, of: impl Fn(&Key, usize) -> bool) -> Option<Arc<Guest>> {
        let mut lists: Vec<_> =
            self.of.iter().filter(|(key, list)| of(key, list.len())).map(|(_, list)| list).collect();
        lists.sort_unstable_by_key(|list| std::cmp::Reverse(list.len()));
        lists.into_iter().find_map(|list| {
            let idle = list.iter().filter_map(|guest| Some((guest.idle_since()?, guest)));
            idle.min_by_key(|(since, _)| *since).map(|(_, guest)| guest.clone())
        })
    }

    fn enter(&mut self, guest: Arc<Guest>) {
        self.per_pod.entry(guest.key.0).or_default().open += 1;
        self.all.open += 1;
        self.of.entry(guest.key).or_default().push(guest);
    }

    fn leaves(&mut self, guest: &Guest) {
        guest.leaving.store(true, Ordering::Relaxed);
        self.all.leaving += 1;
        if let Some(count) = self.per_pod.get_mut(&guest.key.0) {
            count.leaving += 1;
        }
    }

    fn gone(&mut self, guest: &Arc<Guest>) {
        let leaving = usize::from(guest.leaving.load(Ordering::Relaxed));
        self.all.open -= 1;
        self.all.leaving -= leaving;
        if let Some(list) = self.of.get_mut(&guest.key) {
            list.retain(|other| !Arc::ptr_eq(guest, other));
            if list.is_empty() {
                self.of.remove(&guest.key);
            }
        }
        if let Some(count) = self.per_pod.get_mut(&guest.key.0) {
            count.open -= 1;
            count.leaving -= leaving;
            if count.open == 0 {
                self.per_pod.remove(&guest.key.0);
            }
        }
    }
}

impl Seat {
    /// Counts a tunnel.
    pub fn busy(self: &Arc<Self>) -> Busy {
        self.guest.tunnels.fetch_add(1, Ordering::Relaxed);
        Busy(self.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Seat { guest, peers } = &*self.0;
        guest.idle_since.store(peers.now(), Ordering::Relaxed);
        guest.tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.peers.guests().gone(&self.guest);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    const WEB: Pod = 1;
    const DB: Pod = 2;
    const MQ: Pod = 3;
    const MOST: Most = Most { per_source: 3, per_pod: 5, all: 7 };

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    /// A pod, a source, and connections of it.
    struct World(Arc<Peers>);

    impl World {
        async fn admit(&self, pod: u64, source: u8) -> Result<Arc<Seat>, NoRoom> {
            advance(Duration::from_millis(10)).await;
            self.0.admit(pod, ip(source), Control::default()).map(Arc::new)
        }

        fn is_leaving(seat: &Seat) -> bool {
            seat.guest.leaving.load(Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_idle_connection_of_a_source_makes_room_for_its_next() {
        let world = World(Arc::new(Peers::new(MOST)));
        let other = world.admit(WEB, 9).await.unwrap();
        let first = world.admit(WEB, 1).await.unwrap();
        let tunnel = first.busy();
        let second = world.admit(WEB, 1).await.unwrap();
        drop(second.busy());
        let third = world.admit(WEB, 1).await.unwrap();
        advance(Duration::from_secs(1)).await;
        drop(second.busy());
        let _fourth = world.admit(WEB, 1).await.unwrap();
        let leaving = [&first, &second, &third, &other].map(|seat| World::is_leaving(seat));
        assert_eq!(
            leaving,
            [false, false, true, false],
            "first is busy, second was used later, other is another's"
        );
        // One may be on its way out of three.
        assert_eq!(world.admit(WEB, 1).await.err(), Some(NoRoom::Source(3)));
        drop(third);
        let fifth = world.admit(WEB, 1).await.unwrap();
        assert!(World::is_leaving(&second));
        drop((second, tunnel));
        let busy = [first.busy(), fifth.busy(), _fourth.busy()];
        assert_eq!(world.admit(WEB, 1).await.err(), Some(NoRoom::Source(3)));
        assert_eq!((world.0.closed(), world.0.refused()), (2, 2));
        // To another pod, and from another source, there is room.
        world.admit(DB, 1).await.unwrap();
        world.admit(WEB, 2).await.unwrap();
        drop((busy, first, fifth, _fourth, other));
        let guests = world.0.guests();
        assert!(guests.of.is_empty() && guests.per_pod.is_empty(), "{guests:?}");
        assert_eq!((guests.all.open, guests.all.leaving), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pods_and_the_processs_limits_cost_whoever_has_the_most() {
        let world = World(Arc::new(Peers::new(MOST)));
        let mut seats = Vec::new();
        for source in [1, 2, 2, 2, 3] {
            seats.push(world.admit(WEB, source).await.unwrap());
        }
        seats.push(world.admit(WEB, 4).await.unwrap());
        let leaving = |seats: &[Arc<Seat>]| seats.iter().map(|s| World::is_leaving(s)).collect::<Vec<_>>();
        assert_eq!(leaving(&seats), [false, true, false, false, false, false]);
        drop(seats.remove(1));
        for pod in [DB, MQ] {
            seats.push(world.admit(pod, 1).await.unwrap());
        }
        seats.push(world.admit(DB, 5).await.unwrap());
        assert_eq!(leaving(&seats)[..3], [false, true, false]);
        drop(seats.remove(1));
        // While all are in use, nobody is cut.
        let busy: Vec<_> = seats.iter().map(Seat::busy).collect();
        assert_eq!(world.admit(MQ, 7).await.err(), Some(NoRoom::All(7)));
        assert!(!leaving(&seats).contains(&true));
        drop(busy);
        world.admit(MQ, 7).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_much_closes_nothing_of_who_has_little() {
        let world = World(Arc::new(Peers::new(Most { per_source: 5, ..MOST })));
        let small = world.admit(WEB, 1).await.unwrap();
        let large: Vec<_> = [world.admit(WEB, 2).await, world.admit(WEB, 2).await]
            .into_iter()
            .chain([world.admit(WEB, 2).await, world.admit(WEB, 2).await])
            .collect::<Result<_, _>>()
            .unwrap();
        let busy: Vec<_> = large.iter().map(Seat::busy).collect();
        assert_eq!(world.admit(WEB, 2).await.err(), Some(NoRoom::Pod(5)));
        assert!(!World::is_leaving(&small));
        drop(busy);
        let _next = world.admit(WEB, 2).await.unwrap();
        assert!(!World::is_leaving(&small));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_leaves_counts_its_connections_until_they_are_gone() {
        let world = World(Arc::new(Peers::new(MOST)));
        let seats = [world.admit(WEB, 1).await.unwrap(), world.admit(WEB, 2).await.unwrap()];
        let other = world.admit(DB, 1).await.unwrap();
        let tunnel = seats[0].busy();
        world.0.leave(WEB);
        world.0.leave(WEB);
        assert!(seats.iter().all(|seat| World::is_leaving(seat)) && !World::is_leaving(&other));
        assert_eq!((world.0.of(WEB), world.0.of(DB), world.0.closed()), (2, 1, 0));
        drop((tunnel, seats));
        assert_eq!((world.0.of(WEB), world.0.of(DB)), (0, 1));
        let guests = world.0.guests();
        assert_eq!((guests.all.open, guests.all.leaving), (1, 0));
    }

    #[test]
    fn a_host_is_one_source_however_many_addresses_it_uses() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("fd00:1:2:3::1"), of("fd00:1:2:3:ffff::2"));
        assert_ne!(of("fd00:1:2:3::1"), of("fd00:1:2:4::1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    }
}
