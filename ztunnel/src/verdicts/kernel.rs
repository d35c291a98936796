//! What the kernel is asked to do, and what it tells: a trait, so that what is written can be tested without one.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::time::Duration;

use net::{Netns, NetnsId};

/// Pairs that a way leads to, at most.
pub const ENDPOINTS: usize = ebpf::layout::OFFER_ENDPOINTS;

/// What a verdict is about. The evaluator knows no more of a connection than this and who the source is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Pair {
    /// The source's address.
    pub source: IpAddr,
    /// The destination's own address and port.
    pub to: SocketAddr,
}

/// A pair that is to end, with its source's namespace and its destination's; `None` is one that is gone.
#[derive(Clone, Copy, Debug)]
pub struct Ending<'n> {
    /// Which.
    pub pair: Pair,
    /// Where its sockets are.
    pub netns: [Option<&'n Netns>; 2],
}

/// What leads to pairs: an address that a pod dials, the destination's own or a service's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Way {
    /// The pod's namespace.
    pub netns: NetnsId,
    /// What is dialled.
    pub dialled: SocketAddr,
}

/// Whose socket a connection was counted by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// The client's; what it dialled, if that was not the destination's own address.
    Source(Option<SocketAddr>),
    /// The server's.
    Destination,
}

/// A connection that went past this process, as one of its ends counted it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Passed {
    /// Tells the socket from all others.
    pub socket: u64,
    /// Whose it is.
    pub side: Side,
    /// What it was allowed by.
    pub pair: Pair,
    /// The client's port.
    pub source_port: u16,
    /// Whether it came about: a client's end is there from its first packet on.
    pub established: bool,
    /// When it was made, by the clock that does not jump (`CLOCK_MONOTONIC`).
    pub opened: Duration,
    /// When it ended, by the same clock; `None` while it is open.
    pub closed: Option<Duration>,
    /// Bytes from the client.
    pub sent: u64,
    /// Bytes from the server.
    pub received: u64,
}

/// The sockets of connections that pass: the open ones, and those that ended and were not told by [`Kernel::ended`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listing {
    /// The open ones.
    pub open: Vec<Passed>,
    /// The others.
    pub ended: Vec<Passed>,
}

/// The kernel's side of verdicts. Nothing that is written holds for longer than the lease, or once it is older than what was
/// committed.
pub trait Kernel: Send + Sync {
    /// Prepares the pod in `netns`. May be asked again. Whether it may be the source of a pair: not where some of its traffic is
    /// left alone by capture, which could meet the pair's own.
    ///
    /// # Errors
    /// In words: what of it does not qualify, or that the kernel refuses.
    fn join(&self, netns: &Netns) -> Result<bool, String>;

    /// The pod is no end of such connections any more. None of its pairs is left.
    fn leave(&self, netns: &Netns);

    /// Lets connections of the pair pass, between two pods that have joined.
    ///
    /// # Errors
    /// The kernel refuses.
    fn allow(&self, ends: (&Netns, &Netns), pair: &Pair, generation: NonZeroU64) -> io::Result<()>;

    /// Lets no packet of the pair pass, also of connections that are open.
    ///
    /// # Errors
    /// The kernel refuses.
    fn revoke(&self, pair: &Pair) -> io::Result<()>;

    /// Revokes pairs, none of them twice, destroys their sockets in both namespaces, and forgets those of which none is left. Says
    /// of each whether it did, in their order; an error where the kernel refuses. `between` is called time and again.
    fn end(&self, over: &[Ending<'_>], between: &mut dyn FnMut()) -> Vec<io::Result<bool>>;

    /// Leads what the pod dials to where one of the pairs goes, past capture; to each as often as its weight says. They are of
    /// one source, and at most [`ENDPOINTS`].
    ///
    /// # Errors
    /// The kernel refuses.
    fn lead(&self, netns: &Netns, dialled: SocketAddr, to: &[(Pair, u32)]) -> io::Result<()>;

    /// Leaves what the pod dials to capture. Connections that are open stay.
    ///
    /// # Errors
    /// The kernel refuses.
    fn withdraw(&self, netns: &Netns, dialled: SocketAddr) -> io::Result<()>;

    /// Ends all verdicts of an earlier generation.
    ///
    /// # Errors
    /// The kernel refuses.
    fn commit(&self, generation: NonZeroU64) -> io::Result<()>;

    /// All verdicts hold for so long from now.
    ///
    /// # Errors
    /// The kernel refuses.
    fn renew(&self, lease: Duration) -> io::Result<()>;

    /// None holds any more.
    ///
    /// # Errors
    /// The kernel refuses.
    fn stop(&self) -> io::Result<()>;

    /// Takes away what all of this is done by, where nobody has a use for it: neither a pair is left nor another process goes by it.
    /// Whether it was done; nothing else is asked of it then.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove(&self) -> io::Result<bool>;

    /// Takes back all that another process has left: no way leads past capture, no packet passes. Returns its pairs.
    ///
    /// # Errors
    /// The kernel refuses.
    fn inherit(&self) -> io::Result<Vec<Pair>>;

    /// So many of the connections that ended, or all if there are fewer.
    ///
    /// # Errors
    /// The kernel refuses.
    fn ended(&self, limit: usize) -> io::Result<Vec<Passed>>;

    /// All connections.
    ///
    /// # Errors
    /// They can't be listed.
    fn listing(&self) -> io::Result<Listing>;

    /// What the programs count, by its name.
    fn tallies(&self) -> Vec<(&'static str, u64)>;
}
