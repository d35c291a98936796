//! TCP sockets made in a pod's namespace from outside it.
//!
//! Only `socket(2)` runs inside the namespace; options, `bind`, `listen` and `connect` act on the socket and
//! so on its namespace. What the kernel hands down from a listener to the connections it accepts is set on
//! the listener once (mark, transparency, `TCP_NODELAY`, keep-alive, user timeout: `sk_clone_lock` in the
//! kernel's net/core/sock.c), so that an accepted connection costs no option call at all.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::netns::Netns;
use crate::original_dst::canonical;

/// The mark of packets that come from ztunnel (mask [`MARK_MASK`]): capture leaves them alone.
pub const ZTUNNEL_MARK: u32 = 0x539;

/// The bits of a packet's mark that belong to the mesh.
pub const MARK_MASK: u32 = 0xfff;

/// When to probe a silent peer, and when to give it up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keepalive {
    /// Silence before the first probe. Whole seconds count.
    pub time: Duration,
    /// Between probes. Whole seconds count.
    pub interval: Duration,
    /// Unanswered probes after which the connection is dead.
    pub retries: u32,
}

impl Default for Keepalive {
    /// 180 s, 180 s, 9: as Istio's ztunnel, so that middle boxes see what they are used to.
    fn default() -> Self {
        Self { time: Duration::from_secs(180), interval: Duration::from_secs(180), retries: 9 }
    }
}

/// How a listener is made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListenOptions {
    /// Connections that may wait for `accept`. The kernel caps it at the namespace's `net.core.somaxconn`.
    pub backlog: u32,
    /// Accept for addresses that aren't the namespace's own (`IP_TRANSPARENT`; needs `CAP_NET_ADMIN`).
    pub transparent: bool,
    /// The mark of what the listener and its connections send (`SO_MARK`; needs `CAP_NET_ADMIN`).
    pub mark: Option<u32>,
    /// Let another listener with the same option share the port: a successor process during an upgrade. It gets all
    /// new connections from then on.
    pub reuse_port: bool,
    /// For `[::]`: leave IPv4 alone. Otherwise the listener serves both families, IPv4 in mapped form.
    pub only_v6: bool,
    /// `TCP_NODELAY` for accepted connections.
    pub nodelay: bool,
    /// Keep-alive for accepted connections.
    pub keepalive: Option<Keepalive>,
    /// Accepted connections don't pace what they send, whatever the system's congestion control does.
    pub unpaced: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            backlog: 4096,
            transparent: false,
            mark: None,
            reuse_port: false,
            only_v6: false,
            nodelay: true,
            keepalive: Some(Keepalive::default()),
            unpaced: false,
        }
    }
}

/// How an outgoing connection is made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectOptions {
    /// The address to come from. It need not be the namespace's own (`IP_TRANSPARENT`; needs
    /// `CAP_NET_ADMIN`). With port 0 the kernel picks the port at `connect`, when it knows the whole tuple,
    /// so that ports don't run out (`IP_BIND_ADDRESS_NO_PORT`). Another port may be shared by connections to several
    /// destinations.
    pub source: Option<SocketAddr>,
    /// The mark of what is sent (`SO_MARK`; needs `CAP_NET_ADMIN`).
    pub mark: Option<u32>,
    /// `TCP_NODELAY`.
    pub nodelay: bool,
    /// Keep-alive probes.
    pub keepalive: Option<Keepalive>,
    /// Don't pace what is sent, whatever the system's congestion control does.
    pub unpaced: bool,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            source: None,
            mark: Some(ZTUNNEL_MARK),
            nodelay: true,
            keepalive: Some(Keepalive::default()),
            unpaced: false,
        }
    }
}

/// What a socket was to be for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Accepting connections.
    Listen,
    /// Connecting.
    Connect,
    /// Datagrams.
    Datagrams,
}

/// Where making a socket failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Entering the namespace: `EPERM` without `CAP_SYS_ADMIN`.
    Enter,
    /// `socket(2)`: `EMFILE` when descriptors have run out, `EAFNOSUPPORT` when the kernel lacks the family.
    Socket,
    /// Setting the named option: `EPERM` without `CAP_NET_ADMIN`.
    Option(&'static str),
    /// `bind(2)`: `EADDRINUSE` when the port is taken, `EADDRNOTAVAIL` when the address isn't there.
    Bind,
    /// `listen(2)`.
    Listen,
    /// The connection itself: refused, unreachable, reset, or the time was up ([`io::ErrorKind::TimedOut`]).
    Connect,
    /// Registering with the runtime.
    Register,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enter => f.write_str("entering the namespace"),
            Self::Socket => f.write_str("making the socket"),
            Self::Option(name) => write!(f, "setting {name}"),
            Self::Bind => f.write_str("binding"),
            Self::Listen => f.write_str("listening"),
            Self::Connect => f.write_str("connecting"),
            Self::Register => f.write_str("registering with the runtime"),
        }
    }
}

/// Why a socket could not be made or connected.
#[derive(Debug, thiserror::Error)]
#[error("{} {address} in {netns}: {step}: {source}", match purpose {
    Purpose::Listen => "cannot listen on",
    Purpose::Connect => "cannot connect to",
    Purpose::Datagrams => "cannot receive datagrams on",
})]
pub struct SocketError {
    /// What the socket was to be for.
    pub purpose: Purpose,
    /// The address to listen on, or to connect to.
    pub address: SocketAddr,
    /// Where.
    pub netns: Netns,
    /// What failed.
    pub step: Step,
    /// How.
    #[source]
    pub source: io::Error,
}

impl SocketError {
    /// What kind of failure it was; [`io::ErrorKind::TimedOut`] also when our own time limit ended it.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

type Failure = (Step, io::Error);

/// Tags an `io::Result` with the step that it belongs to.
pub(crate) trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|error| (step, error.into()))
    }
}

/// A listener on `address` in `netns`. `[::]` serves both families unless the options say otherwise; where
/// the kernel has no IPv6 at all, `[::]` becomes `0.0.0.0`. Must be called in a tokio runtime.
///
/// # Errors
/// Which step failed, and how.
pub fn listen(
    netns: &Netns,
    address: SocketAddr,
    options: &ListenOptions,
) -> Result<TcpListener, SocketError> {
    let attempt = || {
        let (socket, address) = new_bound(netns, address, Type::STREAM, |socket, address| {
            socket.set_reuse_address(true).at(Step::Option("SO_REUSEADDR"))?;
            if options.reuse_port {
                socket.set_reuse_port(true).at(Step::Option("SO_REUSEPORT"))?;
            }
            if address.is_ipv6() {
                socket.set_only_v6(options.only_v6).at(Step::Option("IPV6_V6ONLY"))?;
            }
            if options.transparent {
                set_transparent(socket, address)?;
            }
            if options.unpaced {
                send_unpaced(socket);
            }
            set_common(socket, options.mark, options.nodelay, options.keepalive)
        })?;
        socket.bind(&address.into()).at(Step::Bind)?;
        let backlog = i32::try_from(options.backlog).unwrap_or(i32::MAX);
        socket.listen(backlog).at(Step::Listen)?;
        if options.reuse_port {
            share(&socket);
        }
        TcpListener::from_std(socket.into()).at(Step::Register)
    };
    attempt().map_err(|(step, source)| SocketError {
        purpose: Purpose::Listen,
        address,
        netns: netns.clone(),
        step,
        source,
    })
}

/// Without it the kernel spreads what is new over both, which is no reason not to serve.
pub(crate) fn share(socket: &Socket) {
    if let Err(error) = crate::handover::prefer_newest(socket.as_fd()) {
        tracing::debug!(%error, "the newest socket of a shared port can't be preferred");
    }
}

/// Connects to `dst` from `netns`, and gives up after `timeout`. Must be called in a tokio runtime.
///
/// # Errors
/// Which step failed, and how.
pub async fn connect(
    netns: &Netns,
    options: &ConnectOptions,
    dst: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, SocketError> {
    let failed = |(step, source)| SocketError {
        purpose: Purpose::Connect,
        address: dst,
        netns: netns.clone(),
        step,
        source,
    };
    let target = canonical(dst);
    let socket = outgoing(netns, options, target).map_err(failed)?;
    let connected = begin(&socket, target).at(Step::Connect).map_err(failed)?;
    let stream = TcpStream::from_std(socket.into()).at(Step::Register).map_err(failed)?;
    if connected {
        return Ok(stream);
    }
    // Boxed: within a machine nobody gets here, and whoever connects need not have room for it.
    Box::pin(connected_within(stream, timeout)).await.at(Step::Connect).map_err(failed)
}

/// Waits until a connection that was begun is there.
async fn connected_within(stream: TcpStream, limit: Duration) -> io::Result<TcpStream> {
    match tokio::time::timeout(limit, stream.writable()).await {
        Ok(writable) => writable?,
        Err(_elapsed) => return Err(io::ErrorKind::TimedOut.into()),
    }
    stream.take_error()?.map_or(Ok(stream), Err)
}

/// Begins to connect. Whether that is all: within a machine the handshake is over by the time that the first call returns,
/// and to ask again spares the wait for an event, a timer, and the look for an error.
fn begin(socket: &Socket, target: SocketAddr) -> io::Result<bool> {
    let target = target.into();
    for _ in 0..2 {
        match socket.connect(&target) {
            Ok(()) => return Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EALREADY)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// A socket with all its options and its source, ready to connect to `target`.
fn outgoing(netns: &Netns, options: &ConnectOptions, target: SocketAddr) -> Result<Socket, Failure> {
    let socket = netns.tcp_socket(Domain::for_address(target)).at(Step::Enter)?.at(Step::Socket)?;
    set_common(&socket, options.mark, options.nodelay, options.keepalive)?;
    if options.unpaced {
        send_unpaced(&socket);
    }
    if let Some(source) = options.source.map(canonical) {
        if source.is_ipv4() != target.is_ipv4() {
            let message = format!("source {source} is of another family than the destination");
            return Err((Step::Bind, io::Error::new(io::ErrorKind::InvalidInput, message)));
        }
        set_transparent(&socket, source)?;
        if source.port() == 0 {
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)
                .at(Step::Option("IP_BIND_ADDRESS_NO_PORT"))?;
        } else {
            // Others may have the port towards other destinations; `connect` fails where the whole tuple is taken.
            socket.set_reuse_address(true).at(Step::Option("SO_REUSEADDR"))?;
        }
        socket.bind(&source.into()).at(Step::Bind)?;
    }
    Ok(socket)
}

/// A socket for `address` with the options that `configure` sets, and the address to bind it to.
pub(crate) fn new_bound(
    netns: &Netns,
    address: SocketAddr,
    kind: Type,
    configure: impl FnOnce(&Socket, SocketAddr) -> Result<(), Failure>,
) -> Result<(Socket, SocketAddr), Failure> {
    let (socket, address) = match new_socket(netns, address, kind) {
        // A kernel booted with `ipv6.disable=1` has no such family; the wildcard of both is then that of one.
        Err((Step::Socket, error))
            if error.raw_os_error() == Some(libc::EAFNOSUPPORT)
                && address.is_ipv6()
                && address.ip().is_unspecified() =>
        {
            let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
            (new_socket(netns, address, kind)?, address)
        }
        made => (made?, address),
    };
    configure(&socket, address)?;
    Ok((socket, address))
}

fn new_socket(netns: &Netns, address: SocketAddr, kind: Type) -> Result<Socket, Failure> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let made = netns.run(|| Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol)));
    made.at(Step::Enter)?.at(Step::Socket)
}

fn set_common(
    socket: &Socket,
    mark: Option<u32>,
    nodelay: bool,
    keepalive: Option<Keepalive>,
) -> Result<(), Failure> {
    if let Some(mark) = mark {
        socket.set_mark(mark).at(Step::Option("SO_MARK"))?;
    }
    if nodelay {
        socket.set_tcp_nodelay(true).at(Step::Option("TCP_NODELAY"))?;
    }
    if let Some(Keepalive { time, interval, retries }) = keepalive {
        let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
        socket.set_tcp_keepalive(&keepalive).at(Step::Option("SO_KEEPALIVE"))?;
    }
    Ok(())
}

/// Where the system's congestion control paces what is sent (BBR), takes another for this socket: on a short path a timer
/// for each segment costs much and brings nothing. Connections that a listener accepts get
/// its choice (kernel net/ipv4/tcp_minisocks.c, `tcp_ca_openreq_child`).
fn send_unpaced(socket: &Socket) {
    static PACES: LazyLock<bool> = LazyLock::new(|| {
        let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
        system.is_ok_and(|name| name.starts_with("bbr"))
    });
    if *PACES {
        // Without both it works as well, only slower; Reno is part of every kernel.
        let choose = |name: &str| setsockopt(socket, sockopt::TcpCongestion, &OsString::from(name));
        let _ = choose("cubic").or_else(|_| choose("reno"));
    }
}

/// Allows addresses that aren't the namespace's own. On an IPv6 socket the one option covers both families.
pub(crate) fn set_transparent(socket: &Socket, address: SocketAddr) -> Result<(), Failure> {
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true).at(Step::Option("IP_TRANSPARENT"))
    } else {
        socket.set_ip_transparent_v6(true).at(Step::Option("IPV6_TRANSPARENT"))
    }
}

/// How many bytes that were written to the connection its peer has not acknowledged yet. A reset now would take them
/// back. None when the connection is over.
///
/// # Errors
/// The descriptor is no TCP connection's.
pub fn unacknowledged(stream: &TcpStream) -> io::Result<usize> {
    const TCP_CLOSE: u8 = 7; // include/net/tcp_states.h
    // After a reset the kernel's count stays what it was (net/ipv4/tcp.c: tcp_write_queue_purge), so the state counts.
    if tcp_state(stream)? == TCP_CLOSE {
        return Ok(0);
    }
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for the duration of the borrow; SIOCOUTQ, which is TIOCOUTQ, writes one int to
    // the address given, which is that of an int of ours.
    #[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    nix::errno::Errno::result(result)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// The state of the connection, as `include/net/tcp_states.h` numbers it.
fn tcp_state(stream: &TcpStream) -> io::Result<u8> {
    let mut info = [0u8; 8];
    let mut length = libc::socklen_t::try_from(info.len()).unwrap_or(0);
    // SAFETY: the descriptor is open for the duration of the borrow; the kernel writes at most `length` bytes of its
    // struct tcp_info to the buffer, which has as many. The struct begins with the state.
    #[expect(unsafe_code, reason = "no safe wrapper of TCP_INFO takes less than all of it")]
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(info[0])
}

/// Closes the connection so that the peer gets a reset and not an orderly end: unread and unsent data are
/// dropped.
pub fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
    drop(stream);
}
