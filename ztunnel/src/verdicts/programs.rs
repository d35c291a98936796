//! The kernel's side: the programs and maps of [`ebpf::verdicts`].

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ebpf::Pins;
use ebpf::verdicts::{Carried, EndedPairs, Offer, Qualified, Side as Seen, Verdicts};
use net::sock_diag;
use net::{MARK_MASK, Netns, NetnsId, ZTUNNEL_MARK};

use super::kernel::{Ending, Kernel, Listing, Pair, Passed, Side};
use super::{Attach, Later, Make};

/// Where the machine's cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How soon it is asked again whether it is this process's turn, and whether the node agent has prepared a pod.
const TURN_AGAIN: Duration = Duration::from_secs(1);

/// Attaches the programs of this node, in the bpf file system that capture uses.
pub fn programs() -> Attach {
    let attach: Make = |_| {
        let pins = Pins::open(ebpf::bpf_file_system()).map_err(|e| e.to_string())?;
        let verdicts = Verdicts::attach(&pins, Path::new(CGROUPS)).map_err(|e| e.to_string())?;
        Ok(Box::new(Programs { verdicts, qualified: Mutex::default() }))
    };
    Attach { attach, is_left: || Pins::of_others(ebpf::bpf_file_system()).verdicts().exists() }
}

/// Takes the programs that the node agent has attached, once no other ztunnel of the node has them.
pub fn of_agent() -> Attach {
    let attach: Make = |pods| {
        let pins = Pins::of_others(ebpf::bpf_file_system());
        let later = |why: String| Later { why, after: TURN_AGAIN, is_turn: true, is_taken: false };
        match Verdicts::take(&pins, pods) {
            Ok(Some(verdicts)) => Ok(Box::new(Programs { verdicts, qualified: Mutex::default() })),
            Ok(None) => {
                let why = format!(
                    "of {} pods the node agent has prepared none: it needs --kernel-verdicts and capture by ebpf, and this \
                     process the node's {}",
                    pods.len(),
                    ebpf::bpf_file_system().display()
                );
                // Who has it is found by the pods.
                Err(Later { is_taken: pods.is_empty(), ..later(why) })
            }
            Err(error) if error.is_taken() => Err(Later { is_taken: true, ..later(error.to_string()) }),
            Err(error) => Err(error.to_string().into()),
        }
    };
    // What is there is found by the pods.
    Attach { attach, is_left: || true }
}

struct Programs {
    verdicts: Verdicts,
    /// The pods that have joined.
    qualified: Mutex<HashMap<NetnsId, Qualified>>,
}

impl From<Pair> for ebpf::verdicts::Pair {
    fn from(pair: Pair) -> Self {
        Self { source: pair.source, destination: pair.to }
    }
}

impl From<ebpf::verdicts::Pair> for Pair {
    fn from(pair: ebpf::verdicts::Pair) -> Self {
        Self { source: pair.source, to: pair.destination }
    }
}

/// As it is told here: from the client's side.
fn passed(carried: &Carried) -> Passed {
    let (side, sent, received) = match carried.side {
        Seen::Source => (Side::Source(carried.dialled), carried.sent, carried.received),
        Seen::Destination => (Side::Destination, carried.received, carried.sent),
    };
    Passed {
        socket: carried.socket,
        side,
        pair: Pair { source: carried.source.ip(), to: carried.destination },
        source_port: carried.source.port(),
        established: carried.established,
        opened: carried.opened,
        closed: carried.closed,
        sent,
        received,
    }
}

/// Only the process that attached last may write what all verdicts hang on.
fn owned(outcome: Result<bool, ebpf::Error>) -> io::Result<()> {
    if outcome.map_err(io::Error::other)? {
        return Ok(());
    }
    Err(io::Error::other("another process has taken over the node's verdicts"))
}

impl Programs {
    fn of(&self, netns: &Netns) -> io::Result<Qualified> {
        let qualified = self.qualified.lock().unwrap_or_else(PoisonError::into_inner);
        qualified.get(&netns.id()).cloned().ok_or_else(|| io::Error::other("the pod has not joined"))
    }
}

/// What a socket is found by: the client's end, and the server's, and which of them it is.
type Ends = (SocketAddr, SocketAddr, bool);

impl Programs {
    /// Reads what open connections have carried off their sockets; the programs know at the end only. They are in the namespaces
    /// with these cookies: for each that is asked, the kernel walks all sockets of the machine.
    fn count(&self, open: &mut [Passed], cookies: &HashSet<u64>) -> io::Result<()> {
        let pods: Vec<Netns> = {
            let qualified = self.qualified.lock().unwrap_or_else(PoisonError::into_inner);
            let with_some = qualified.values().filter(|pod| cookies.contains(&pod.cookie));
            with_some.map(|pod| pod.netns.clone()).collect()
        };
        let mut counts: HashMap<Ends, (u64, u64)> = HashMap::new();
        for netns in pods {
            for (socket, sent, received) in sock_diag::carried(&netns)? {
                // A client's SYN counts as a byte that was acknowledged.
                counts.insert((socket.local, socket.peer, true), (sent.saturating_sub(1), received));
                // ztunnel's own socket has the same ends, in the place of the client's.
                if socket.mark.unwrap_or(0) & MARK_MASK != ZTUNNEL_MARK {
                    counts.insert((socket.peer, socket.local, false), (received, sent));
                }
            }
        }
        for passed in open {
            let client = SocketAddr::new(passed.pair.source, passed.source_port);
            let is_client = matches!(passed.side, Side::Source(_));
            if let Some(count) = counts.get(&(client, passed.pair.to, is_client)) {
                (passed.sent, passed.received) = *count;
            }
        }
        Ok(())
    }
}

impl Kernel for Programs {
    fn join(&self, netns: &Netns) -> Result<bool, String> {
        let node = Netns::current().map_err(|e| e.to_string())?;
        let found = self.verdicts.qualify(&node, netns).map_err(|why| why.to_string())?;
        let may_begin = !found.exempts;
        let device = |pod: &Qualified| (pod.device, pod.inside);
        let now = device(&found);
        let before = self.qualified.lock().unwrap_or_else(PoisonError::into_inner).insert(netns.id(), found);
        if before.is_some_and(|before| device(&before) != now) {
            return Err("its device is another one now: its verdicts are written anew".into());
        }
        Ok(may_begin)
    }

    fn leave(&self, netns: &Netns) {
        let gone = self.qualified.lock().unwrap_or_else(PoisonError::into_inner).remove(&netns.id());
        if let Some(gone) = gone
            && let Err(error) = self.verdicts.release(&gone)
        {
            tracing::debug!(%netns, %error, "the program of the pod's device goes with the device");
        }
    }

    fn allow(
        &self,
        (source, destination): (&Netns, &Netns),
        pair: &Pair,
        generation: NonZeroU64,
    ) -> io::Result<()> {
        let (source, destination) = (self.of(source)?, self.of(destination)?);
        self.verdicts.allow(&source, &destination, (*pair).into(), generation, 0).map_err(io::Error::other)
    }

    fn revoke(&self, pair: &Pair) -> io::Result<()> {
        self.verdicts.revoke((*pair).into()).map(drop).map_err(io::Error::other)
    }

    fn end(&self, over: &[Ending<'_>], between: &mut dyn FnMut()) -> Vec<io::Result<bool>> {
        let over = over.iter().map(|ending| {
            let [source, destination] = ending.netns;
            ebpf::verdicts::Ending { pair: ending.pair.into(), source, destination }
        });
        let over: Vec<_> = over.collect();
        let EndedPairs { pairs, looks } = self.verdicts.end_all(&over, between);
        tracing::debug!(pairs = over.len(), looks, "looked for the sockets of pairs that are to end");
        pairs.into_iter().map(|ended| Ok(ended.map_err(io::Error::other)?.left == 0)).collect()
    }

    fn lead(&self, netns: &Netns, dialled: SocketAddr, to: &[(Pair, u32)]) -> io::Result<()> {
        let Some((Pair { source, .. }, _)) = to.first() else { return Ok(()) };
        let endpoints = to.iter().map(|(pair, weight)| (pair.to, *weight)).collect();
        let offer = Offer { source: *source, endpoints, bind: false };
        self.verdicts.offer(&self.of(netns)?, dialled, &offer).map_err(io::Error::other)
    }

    fn withdraw(&self, netns: &Netns, dialled: SocketAddr) -> io::Result<()> {
        self.verdicts.withdraw(self.of(netns)?.cookie, dialled).map(drop).map_err(io::Error::other)
    }

    fn commit(&self, generation: NonZeroU64) -> io::Result<()> {
        owned(self.verdicts.commit(generation))
    }

    fn renew(&self, lease: Duration) -> io::Result<()> {
        owned(self.verdicts.renew(lease))
    }

    fn stop(&self) -> io::Result<()> {
        owned(self.verdicts.stop())
    }

    fn remove(&self) -> io::Result<bool> {
        self.verdicts.remove().map_err(io::Error::other)
    }

    fn inherit(&self) -> io::Result<Vec<Pair>> {
        for (cookie, dialled, _) in self.verdicts.offers().map_err(io::Error::other)? {
            self.verdicts.withdraw(cookie, dialled).map_err(io::Error::other)?;
        }
        let pairs = self.verdicts.pairs().map_err(io::Error::other)?;
        for (pair, _) in &pairs {
            self.verdicts.revoke(*pair).map_err(io::Error::other)?;
        }
        Ok(pairs.into_iter().map(|(pair, _)| pair.into()).collect())
    }

    fn ended(&self, limit: usize) -> io::Result<Vec<Passed>> {
        Ok(self.verdicts.closed(limit).map_err(io::Error::other)?.iter().map(passed).collect())
    }

    fn listing(&self) -> io::Result<Listing> {
        let found = self.verdicts.connections().map_err(io::Error::other)?;
        let all = |list: &[Carried]| list.iter().map(passed).collect();
        let mut listing = Listing { open: all(&found.open), ended: all(&found.closed) };
        if !listing.open.is_empty() {
            let cookies = found.open.iter().map(|end| end.netns).collect();
            self.count(&mut listing.open, &cookies)?;
        }
        Ok(listing)
    }

    fn tallies(&self) -> Vec<(&'static str, u64)> {
        let tallies = self.verdicts.tallies().ok();
        tallies.into_iter().flatten().map(|(tally, number)| (tally.as_str(), number)).collect()
    }
}
