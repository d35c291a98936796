//! The TCP connections of a namespace, and an end to one of them (sock_diag(7), kernel
//! include/uapi/linux/inet_diag.h).
//!
//! Connections that were alive when a pod was enrolled pass ztunnel by; this is how they are counted, listed,
//! and cut when a policy comes to apply to them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::sys::socket::SockProtocol;

use crate::netlink::{Message, Netlink, attributes, u32_at};
use crate::netns::Netns;
use crate::original_dst::canonical;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Size of `inet_diag_msg`, after which attributes follow.
const DIAG_MESSAGE: usize = 72;
const INET_DIAG_MARK: u16 = 15;
/// The attribute with `tcp_info`, which a request asks for by its bit.
const INET_DIAG_INFO: u16 = 2;
/// Where `tcp_info` has what was acknowledged and what was received, as it is since Linux 4.1.
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;
/// No cookie: any socket with these addresses.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// The state of a TCP socket (kernel include/net/tcp_states.h), without those that no process cares for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum TcpState {
    /// Data flows both ways.
    Established = 1,
    /// Dialled, not yet answered.
    SynSent = 2,
    /// Answered, not yet confirmed.
    SynReceived = 3,
    /// We have finished sending.
    FinWait1 = 4,
    /// We have finished sending, and the peer knows.
    FinWait2 = 5,
    /// The peer has finished sending.
    CloseWait = 8,
    /// Both have finished, our end is yet to be acknowledged.
    LastAck = 9,
    /// Waits for connections.
    Listen = 10,
    /// Both have finished at once.
    Closing = 11,
}

const CONNECTED: [TcpState; 8] = [
    TcpState::Established,
    TcpState::SynSent,
    TcpState::SynReceived,
    TcpState::FinWait1,
    TcpState::FinWait2,
    TcpState::CloseWait,
    TcpState::LastAck,
    TcpState::Closing,
];

/// A TCP connection, seen from one end. A connection within a namespace has two of these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connection {
    /// This end; never IPv4-mapped.
    pub local: SocketAddr,
    /// The other end; never IPv4-mapped.
    pub peer: SocketAddr,
    /// Its state.
    pub state: TcpState,
    /// The socket's inode, as in `/proc/PID/fd`; 0 when no process holds it.
    pub inode: u32,
    /// The user that made the socket.
    pub uid: u32,
    /// Bytes received and not yet read by the application.
    pub receive_queue: u32,
    /// Bytes sent and not yet acknowledged.
    pub send_queue: u32,
    /// `SO_MARK`; `None` when it is 0 or we may not see it (`CAP_NET_ADMIN`).
    pub mark: Option<u32>,
    key: Key,
}

/// What the kernel finds the socket by: its family and its `inet_diag_sockid`, cookie included.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Key {
    family: u8,
    id: [u8; 48],
}

/// The TCP connections of `netns`, both families, in no particular order. One between two sockets of the same
/// namespace is listed twice, from either end.
///
/// # Errors
/// The namespace can't be entered, or the kernel lacks `CONFIG_INET_TCP_DIAG` (`ENOENT`).
pub fn connections(netns: &Netns) -> io::Result<Vec<Connection>> {
    sockets(netns, &CONNECTED)
}

/// The addresses that TCP listeners of `netns` are bound to, both families.
///
/// # Errors
/// As [`connections`].
pub fn listeners(netns: &Netns) -> io::Result<Vec<SocketAddr>> {
    Ok(sockets(netns, &[TcpState::Listen])?.into_iter().map(|socket| socket.local).collect())
}

/// The same with how many bytes of each the other end has acknowledged, and how many came from it.
///
/// # Errors
/// As [`connections`].
pub fn carried(netns: &Netns) -> io::Result<Vec<(Connection, u64, u64)>> {
    let mut found = Vec::new();
    dump(netns, &CONNECTED, 1 << (INET_DIAG_INFO - 1), |payload| {
        let of = |connection: Connection| {
            let info = attributes(payload.get(DIAG_MESSAGE..)?).find(|(kind, _)| *kind == INET_DIAG_INFO)?.1;
            let (acked, received) = (u64_at(info, BYTES_ACKED)?, u64_at(info, BYTES_RECEIVED)?);
            let (sent, received) = connection.state.without_controls(acked, received);
            Some((connection, sent, received))
        };
        found.extend(parse(payload, &CONNECTED).and_then(of));
    })?;
    Ok(found)
}

impl TcpState {
    /// What of the bytes that the kernel counts is not the FIN: it counts it as one, either way.
    fn without_controls(self, acked: u64, received: u64) -> (u64, u64) {
        let fin_acked = self == Self::FinWait2;
        let fin_received = matches!(self, Self::CloseWait | Self::LastAck | Self::Closing);
        (acked.saturating_sub(u64::from(fin_acked)), received.saturating_sub(u64::from(fin_received)))
    }
}

fn sockets(netns: &Netns, listed: &[TcpState]) -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    dump(netns, listed, 0, |payload| found.extend(parse(payload, listed)))?;
    Ok(found)
}

/// The messages of all sockets in one of the states, with the `further` attributes.
fn dump(netns: &Netns, listed: &[TcpState], further: u8, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut netlink = Netlink::open(netns, SockProtocol::NetlinkSockDiag)?;
    let states = listed.iter().fold(0, |states, state| states | 1_u32 << (*state as u8));
    for family in [libc::AF_INET, libc::AF_INET6] {
        let request = diag_request(SOCK_DIAG_BY_FAMILY, (low_byte(family), further), states, &[0; 48]);
        netlink.dump(request, |_, payload| each(payload))?;
    }
    Ok(())
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Why a connection could not be cut.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// It has ended meanwhile.
    #[error("the connection has already ended")]
    Gone,
    /// The kernel was built without `CONFIG_INET_DIAG_DESTROY`.
    #[error("this kernel can't destroy connections (CONFIG_INET_DIAG_DESTROY)")]
    Unsupported,
    /// `EPERM` without `CAP_NET_ADMIN`, or another failure.
    #[error("cannot destroy the connection: {0}")]
    Io(#[source] io::Error),
}

/// Ends `connection` in `netns`: the application gets `ECONNABORTED`, the peer a reset. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// It is gone, the kernel can't, or we may not.
pub fn destroy(netns: &Netns, connection: &Connection) -> Result<(), DestroyError> {
    Destroyer::open(netns).map_err(DestroyError::Io)?.destroy(connection)
}

/// Ends all connections in `netns`, also those that no process holds any more. Returns how many. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// As [`connections`]; the kernel can't, or we may not.
pub fn destroy_all(netns: &Netns) -> Result<usize, DestroyError> {
    let there = connections(netns).map_err(DestroyError::Io)?;
    let mut destroyer = Destroyer::open(netns).map_err(DestroyError::Io)?;
    let mut destroyed = 0;
    for connection in &there {
        match destroyer.destroy(connection) {
            Ok(()) => destroyed += 1,
            Err(DestroyError::Gone) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(destroyed)
}

/// Ends connections of a namespace, which it enters but once.
pub struct Destroyer(Netlink);

impl Destroyer {
    /// For those of `netns`.
    ///
    /// # Errors
    /// The namespace can't be entered.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        Netlink::open(netns, SockProtocol::NetlinkSockDiag).map(Self)
    }

    /// See [`destroy`].
    ///
    /// # Errors
    /// The same.
    pub fn destroy(&mut self, connection: &Connection) -> Result<(), DestroyError> {
        let Key { family, id } = &connection.key;
        self.request(*family, id)
    }

    fn request(&mut self, family: u8, id: &[u8; 48]) -> Result<(), DestroyError> {
        let request = diag_request(SOCK_DESTROY, (family, 0), u32::MAX, id);
        self.0.acknowledged(request).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => DestroyError::Gone,
            Some(libc::EOPNOTSUPP | libc::EINVAL) => DestroyError::Unsupported,
            _ => DestroyError::Io(error),
        })
    }
}

/// Whether [`destroy`] works here: asks for the end of a connection that can't exist.
///
/// # Errors
/// [`DestroyError::Unsupported`], or [`DestroyError::Io`] when we may not.
pub fn probe_destroy(netns: &Netns) -> Result<(), DestroyError> {
    // Port 0 at both ends.
    let mut id = [0; 48];
    if let Some(cookie) = id.get_mut(40..48) {
        cookie.copy_from_slice(&NO_COOKIE);
    }
    match Destroyer::open(netns).map_err(DestroyError::Io)?.request(low_byte(libc::AF_INET), &id) {
        Ok(()) | Err(DestroyError::Gone) => Ok(()),
        Err(error) => Err(error),
    }
}

/// An `inet_diag_req_v2`.
fn diag_request(kind: u16, (family, further): (u8, u8), states: u32, id: &[u8; 48]) -> Message {
    let mut body = vec![family, low_byte(libc::IPPROTO_TCP), further, 0];
    body.extend(states.to_ne_bytes());
    body.extend(id);
    Message::new(kind, 0).body(&body)
}

/// An `inet_diag_msg`.
fn parse(payload: &[u8], listed: &[TcpState]) -> Option<Connection> {
    let (family, state) = (*payload.first()?, *payload.get(1)?);
    let id: [u8; 48] = payload.get(4..52)?.try_into().ok()?;
    let address = |port: usize, ip: usize| {
        let port = u16::from_be_bytes(id.get(port..port + 2)?.try_into().ok()?);
        let ip: IpAddr = if i32::from(family) == libc::AF_INET {
            Ipv4Addr::from(<[u8; 4]>::try_from(id.get(ip..ip + 4)?).ok()?).into()
        } else {
            Ipv6Addr::from(<[u8; 16]>::try_from(id.get(ip..ip + 16)?).ok()?).into()
        };
        Some(canonical(SocketAddr::new(ip, port)))
    };
    let attributes = attributes(payload.get(DIAG_MESSAGE..)?);
    let mark = attributes.filter(|(kind, _)| *kind == INET_DIAG_MARK).find_map(|(_, value)| u32_at(value, 0));
    Some(Connection {
        local: address(0, 4)?,
        peer: address(2, 20)?,
        state: *listed.iter().find(|listed| **listed as u8 == state)?,
        receive_queue: u32_at(payload, 56)?,
        send_queue: u32_at(payload, 60)?,
        uid: u32_at(payload, 64)?,
        inode: u32_at(payload, 68)?,
        mark: mark.filter(|mark| *mark != 0),
        key: Key { family, id },
    })
}

/// The constants of libc are wider than their fields in messages.
fn low_byte(constant: libc::c_int) -> u8 {
    u8::try_from(constant).unwrap_or_default()
}
