//! Asking upstream resolvers.
//!
//! Each query goes out from a socket of its own, connected, with an identifier from the cryptographic generator, so
//! that whoever wants to forge an answer has to guess the port and the identifier (RFC 5452, section 9); what does
//! not answer the question is counted and ignored. A server that fails is asked last for a while.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use net::{ConnectOptions, Netns, Scratch, ZTUNNEL_MARK};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use rustls::crypto::SecureRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::metrics::{DnsMetrics, Transport};
use super::wire::{self, Query, flag, rcode};

/// Clients give up after five seconds (resolv.conf(5), `timeout`): an answer has to be there before.
const TOTAL_TIMEOUT: Duration = Duration::from_millis(4500);

/// How long one server is waited for, in the first round; twice as long in the second.
const TRY_TIMEOUT: Duration = Duration::from_millis(1200);

const ROUNDS: u32 = 2;

/// How long a server that failed is asked last.
const AVOIDED: Duration = Duration::from_secs(30);

/// As many servers are used; resolv.conf(5) has three.
const SERVERS: usize = 8;

/// Resolvers that are asked in this order.
#[derive(Debug)]
pub struct Upstreams {
    /// Tells sets of servers apart in the cache.
    id: u32,
    born: Instant,
    servers: Box<[Server]>,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    /// Until when it is asked last: milliseconds after `Upstreams::born`.
    avoid_until_ms: AtomicU64,
}

impl Upstreams {
    /// These servers, of which the first eight count.
    #[must_use]
    pub fn new(servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let server = |address| Server { address, avoid_until_ms: AtomicU64::new(0) };
        Self {
            id: NEXT.fetch_add(1, Relaxed),
            born: Instant::now(),
            servers: servers.into_iter().take(SERVERS).map(server).collect(),
        }
    }

    /// The servers of a file in the format of resolv.conf(5). Lines that can't be understood are passed over, as
    /// the C library does.
    #[must_use]
    pub fn from_resolv_conf(text: &str) -> Self {
        let servers = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = (words.next() == Some("nameserver")).then(|| words.next()).flatten()?;
            // A zone names an interface of the file's own host; such a server can't be reached from elsewhere.
            Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, 53))
        });
        Self::new(servers)
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// The servers, those that failed lately last.
    fn in_order(&self) -> Vec<&Server> {
        let now = self.now_ms();
        let mut servers: Vec<&Server> = self.servers.iter().collect();
        servers.sort_by_key(|server| server.avoid_until_ms.load(Relaxed) > now); // stable
        servers
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn failed(&self, server: &Server) {
        server.avoid_until_ms.store(self.now_ms() + AVOIDED.as_millis() as u64, Relaxed);
    }
}

impl fmt::Display for Upstreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.servers.iter().map(|server| server.address)).finish()
    }
}

/// The sets of one server each that clients asked for themselves. Bounded: past the limit all are forgotten, and
/// with them what the cache has of them, which can't be found any more.
#[derive(Debug, Default)]
pub(super) struct Originals(Mutex<HashMap<SocketAddr, Arc<Upstreams>>>);

/// A pod names a few servers; a program that names thousands is scanning.
const ORIGINALS: usize = 1024;

impl Originals {
    /// The set of this server alone.
    pub(super) fn of(&self, server: SocketAddr) -> Arc<Upstreams> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ORIGINALS && !known.contains_key(&server) {
            known.clear();
        }
        known.entry(server).or_insert_with(|| Arc::new(Upstreams::new([server]))).clone()
    }
}

/// Why no upstream answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// There is none.
    #[error("no upstream resolver is configured")]
    NoServers,
    /// All failed; of the last one:
    #[error("no upstream resolver answers, the last error is from {server}: {source}")]
    AllFailed {
        /// The server.
        server: SocketAddr,
        /// Its error.
        source: io::Error,
    },
}

/// Makes the sockets, in a pod's namespace or this process's own.
#[derive(Debug)]
pub(super) struct Dialer<'a> {
    pub(super) netns: Option<&'a Netns>,
    pub(super) random: &'static dyn SecureRandom,
    pub(super) metrics: &'a DnsMetrics,
}

impl Dialer<'_> {
    /// The first proper answer that one of the servers gives; an improper one (`SERVFAIL` and the like) when none
    /// gives better.
    pub(super) async fn ask(
        &self,
        upstreams: &Upstreams,
        query: &Query,
        transport: Transport,
    ) -> Result<Vec<u8>, UpstreamError> {
        let end = Instant::now() + TOTAL_TIMEOUT;
        let (mut improper, mut failure) = (None, None);
        for round in 1..=ROUNDS {
            for server in upstreams.in_order() {
                if Instant::now() >= end {
                    break;
                }
                let deadline = end.min(Instant::now() + TRY_TIMEOUT * round);
                match self.ask_one(server.address, query, transport, deadline).await {
                    Ok(response) if is_proper(&response) => return Ok(response),
                    Ok(response) => improper = Some(response),
                    Err(source) => {
                        upstreams.failed(server);
                        failure = Some(UpstreamError::AllFailed { server: server.address, source });
                    }
                }
            }
            if improper.is_some() {
                break; // a server that answers would say the same again
            }
        }
        improper.ok_or(failure.unwrap_or(UpstreamError::NoServers))
    }

    async fn ask_one(
        &self,
        server: SocketAddr,
        query: &Query,
        transport: Transport,
        deadline: Instant,
    ) -> io::Result<Vec<u8>> {
        let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
        let response = timeout_at(deadline, self.over_udp(server, query)).await.map_err(timed_out)??;
        let cut_off = wire::Response::parse(&response).is_none_or(|r| r.flags & flag::TC != 0);
        if transport == Transport::Udp || !cut_off {
            // A client over UDP gets the part that its own limit allows, and comes again over TCP.
            return Ok(response);
        }
        match timeout_at(deadline, self.over_tcp(server, query)).await.map_err(timed_out) {
            Ok(Ok(whole)) => Ok(whole),
            // A part says more than an error.
            Ok(Err(_)) | Err(_) => Ok(response),
        }
    }

    fn random_id(&self) -> io::Result<u16> {
        let mut id = [0; 2];
        self.random.fill(&mut id).map_err(|_| io::Error::other("no randomness"))?;
        Ok(u16::from_ne_bytes(id))
    }

    async fn over_udp(&self, server: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
        let socket = self.udp_socket(server)?;
        let id = self.random_id()?;
        socket.send(&query.with_id(id)).await?;
        // An ICMP error comes as readiness of its own: without it a closed port would look like a silent one.
        let interest = Interest::READABLE | Interest::ERROR;
        loop {
            let receive = || {
                let mut buffer = Scratch::take();
                let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
                Ok(buffer.get(..len).unwrap_or_default().to_vec())
            };
            let response = socket.async_io(interest, receive).await?;
            if wire::answers(&response, query, id) {
                return Ok(response);
            }
            self.metrics.mismatched.inc();
        }
    }

    fn udp_socket(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        let any = match server {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let bind = || StdUdpSocket::bind((any, 0));
        let socket = match self.netns {
            // Marked, so that capture does not send it back here.
            Some(netns) => {
                let socket = netns.run(bind)??;
                setsockopt(&socket, sockopt::Mark, &ZTUNNEL_MARK)?;
                socket
            }
            None => bind()?,
        };
        socket.set_nonblocking(true)?;
        socket.connect(server)?;
        UdpSocket::from_std(socket)
    }

    async fn over_tcp(&self, server: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
        let mut stream = match self.netns {
            Some(netns) => net::connect(netns, &ConnectOptions::default(), server, TOTAL_TIMEOUT)
                .await
                .map_err(io::Error::other)?,
            None => tokio::net::TcpStream::connect(server).await?,
        };
        let id = self.random_id()?;
        let message = query.with_id(id);
        let mut framed = Vec::with_capacity(message.len() + 2);
        framed.extend_from_slice(&u16::try_from(message.len()).map_err(io::Error::other)?.to_be_bytes());
        framed.extend_from_slice(&message);
        stream.write_all(&framed).await?;
        let len = stream.read_u16().await?;
        let mut response = vec![0; usize::from(len)];
        stream.read_exact(&mut response).await?;
        if wire::answers(&response, query, id) {
            Ok(response)
        } else {
            self.metrics.mismatched.inc();
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

/// Whether another server need not be asked: the code says something of the name, not of the server.
pub(super) fn is_proper(response: &[u8]) -> bool {
    let code = wire::Response::parse(response).map(|r| r.flags & flag::RCODE);
    !matches!(code, None | Some(rcode::SERVER_FAILURE | rcode::NOT_IMPLEMENTED | rcode::REFUSED))
}
