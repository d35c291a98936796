//! Connections of TCP to endpoints, by address or by host name.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use model::Str;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::http::decide::{Dial, Dialing};
use crate::upstream::clusters::Shared;

/// When TCP probes a silent peer: after, every, how often (`tcpKeepalive`).
pub(crate) type Keepalive = Option<(Duration, Duration, u32)>;

/// What holds where nothing is said of it, as at nodes. Servers of HTTP/2 are not asked with PINGs: those of gRPC end
/// connections on which these come more often than every five minutes.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(180), Duration::from_secs(180), 9);

/// How long the addresses of a name are used. The resolver doesn't tell how long they hold.
const NAME_LIFE: Duration = Duration::from_secs(30);
/// For an answer of the resolver.
const NAME_TIMEOUT: Duration = Duration::from_secs(5);
/// Names that are remembered, and addresses of each.
const MAX_NAMES: usize = 4096;
const MAX_ADDRESSES: usize = 64;

/// Connects.
pub(crate) async fn tcp(address: SocketAddr, keepalive: Keepalive) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (time, interval, probes) = keepalive.unwrap_or(KEEPALIVE);
    // The kernel has whole seconds, from one on.
    let least = Duration::from_secs(1);
    let settings = TcpKeepalive::new().with_time(time.max(least)).with_interval(interval.max(least));
    SockRef::from(&stream).set_tcp_keepalive(&settings.with_retries(probes))?;
    Ok(stream)
}

/// The addresses of host names, as they were last found.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<HashMap<Str, Found>>);

#[derive(Debug)]
struct Found {
    addresses: Arc<[SocketAddr]>,
    at: Instant,
    /// Where the next connection begins.
    turn: usize,
}

impl Names {
    /// The addresses of a name, each time from another one on; those of before, where it can't be found any more.
    async fn find(&self, host: &Str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Some(found) = self.known(host, port, true) {
            return Ok(found);
        }
        let looked_up = timeout(NAME_TIMEOUT, tokio::net::lookup_host((&**host, port))).await;
        let looked_up = looked_up.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let addresses: Arc<[SocketAddr]> = match looked_up {
            Ok(addresses) => addresses.take(MAX_ADDRESSES).collect(),
            Err(error) => return self.known(host, port, false).ok_or(error),
        };
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address")));
        }
        {
            let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if names.len() >= MAX_NAMES && !names.contains_key(host) {
                names.clear();
            }
            names.insert(host.clone(), Found { addresses, at: Instant::now(), turn: 0 });
        }
        self.known(host, port, false).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn known(&self, host: &Str, port: u16, fresh: bool) -> Option<Vec<SocketAddr>> {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = names.get_mut(host).filter(|found| !fresh || found.at.elapsed() < NAME_LIFE)?;
        found.turn = found.turn.wrapping_add(1);
        let count = found.addresses.len();
        let from = found.turn % count.max(1);
        let round = found.addresses.iter().cycle().skip(from).take(count);
        Some(round.map(|address| SocketAddr::new(address.ip(), port)).collect())
    }
}

/// Connections to one of the addresses of a host name: the next one where one does not answer.
pub(crate) struct ToName {
    pub(crate) shared: Arc<Shared>,
    pub(crate) host: Str,
    pub(crate) keepalive: Keepalive,
}

impl Dial for ToName {
    fn dial(&self, address: SocketAddr) -> Dialing {
        let (shared, host, keepalive) = (Arc::clone(&self.shared), self.host.clone(), self.keepalive);
        Box::pin(async move {
            let found = shared.names.find(&host, address.port()).await;
            let addresses = found.inspect_err(|error| {
                shared.stats.names_failed.inc();
                tracing::debug!(%host, %error, "a host name was not found");
            })?;
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for address in addresses {
                match tcp(address, keepalive).await {
                    Ok(stream) => return Ok(Box::new(stream) as Box<dyn net::Io>),
                    Err(error) => last = error,
                }
            }
            Err(last)
        })
    }
}

/// Connections to an address, with settings of their own.
pub(crate) struct ToAddress {
    pub(crate) keepalive: Keepalive,
}

impl Dial for ToAddress {
    fn dial(&self, address: SocketAddr) -> Dialing {
        let keepalive = self.keepalive;
        Box::pin(async move { Ok(Box::new(tcp(address, keepalive).await?) as Box<dyn net::Io>) })
    }
}
