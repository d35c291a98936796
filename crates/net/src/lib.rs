//! Sockets, network namespaces, original destinations and the copy loop: all that talks to the kernel's
//! network stack, behind safe functions with typed errors.
//!
//! * [`netns`]: opening a namespace and stepping into it;
//! * [`listen`], [`connect`], [`ProxyUdpSocket`]: sockets inside a pod, made from outside;
//! * [`original_dst`], [`Conntrack`]: where a redirected connection or datagram was meant to go;
//! * [`AcceptLoop`]: accepting when descriptors run out;
//! * [`copy()`]: two connections joined; [`Scratch`]: buffers that idle connections don't hold;
//! * [`sock_diag`]: the connections of a namespace, and an end to them; [`netlink`] is what it asks with;
//! * [`seqpacket`]: packets with descriptors between processes of one node;
//! * [`sysctl`]: settings of a namespace, also from inside a container; [`mounts`]: file systems that are mounted nowhere;
//! * [`limits`]: the limits of descriptors and memory; [`ThreadClock`]: what a thread uses of a processor.

mod accept;
mod code;
mod conntrack;
pub mod copy;
mod handover;
mod io;
pub mod limits;
pub mod mounts;
pub mod netlink;
pub mod netns;
mod original_dst;
mod own_address;
mod pipe;
mod scratch;
pub mod seqpacket;
pub mod sock_diag;
mod socket;
mod stock;
pub mod sysctl;
mod thread_clock;
mod udp;

pub use accept::{AcceptLoop, AcceptStats, Reach};
pub use code::{release_code_at_rest, release_free};
pub use conntrack::Conntrack;
pub use copy::{ByteCounts, End, Side, copy};
pub use handover::move_queues;
pub use io::Io;
pub use netns::{Netns, NetnsId};
pub use original_dst::{canonical, original_dst};
pub use own_address::{has_address, is_cut_off};
pub use pipe::{PipeCounts, pipes};
pub use scratch::{SCRATCH_SIZE, Scratch};
pub use socket::{
    ConnectOptions, Keepalive, ListenOptions, MARK_MASK, Purpose, SocketError, Step, ZTUNNEL_MARK, connect,
    listen, reset, unacknowledged,
};
pub use stock::sockets_in_stock;
pub use thread_clock::ThreadClock;
pub use udp::{Datagram, DatagramOptions, ProxyUdpSocket};
