//! The DNS proxy: answers pods' queries for names of the mesh, and forwards all others.
//!
//! * Names of the mesh are answered from the snapshot of the moment, without any upstream: see [`registry`].
//! * What is forwarded passes through byte for byte, but for its identifier: see [`wire`].
//! * Equal queries of all pods wait for one answer: see [`joined`].
//! * While upstream resolvers fail, expired responses serve (RFC 8767): see [`cache`].
//! * Only the pod itself is answered, so that the proxy can't be used to flood others.
//! * Everything is bounded: queries under way, in all and for each pod, connections, the cache, the time of each
//!   step, and the share of a thread that a pod's queries take.

mod answer;
mod budget;
mod cache;
mod joined;
mod metrics;
mod registry;
#[cfg(test)]
mod tests;
mod upstream;
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{Mesh, Str};
use net::{Conntrack, Netns, ProxyUdpSocket};
use rustls::crypto::SecureRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use budget::Budget;
use cache::{Cache, Cached};
use joined::Joined;
use metrics::{QueryLabels, Transport};
use upstream::Originals;
use wire::{Query, Rejection, kind, rcode};

pub use metrics::DnsMetrics;
pub use upstream::Upstreams;

/// No query is longer: names have 255 bytes, and options are short.
const QUERY_LIMIT: usize = 4096;

/// What fits into a datagram, less headers.
const DATAGRAM_LIMIT: usize = 65_000;

/// A connection over TCP is closed when nothing was asked for this long (RFC 7766, section 6.2.3: "a few seconds").
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where servers are asked.
const SERVER_PORT: u16 = 53;
/// The index of the loopback interface, in every network namespace.
const LOOPBACK: u32 = 1;

/// With a stale answer at hand, upstreams are waited for this long (RFC 8767, section 5).
const CLIENT_RESPONSE_TIMEOUT: Duration = Duration::from_millis(1800);

/// After upstreams failed, a stale answer serves without asking them for this long (RFC 8767, section 5).
const FAILURE_RECHECK: Duration = Duration::from_secs(30);

/// Whose end has come goes on for so long: queries are on their way, or wait for the thread. Who loses one asks again seconds later.
const LAST_QUERIES: Duration = Duration::from_millis(100);
/// And for so long at the most, while upstreams have not answered.
const LAST_ANSWERS: Duration = Duration::from_millis(700);

/// Limits of the proxy.
#[derive(Clone, Debug)]
pub struct DnsSettings {
    /// The namespace whose definition of a host counts where the client's own namespace has none.
    pub preferred_namespace: Option<Str>,
    /// Forwarded queries under way, of all pods; each takes a socket. Equal ones count once.
    pub in_flight: usize,
    /// Forwarded queries under way of one pod.
    pub in_flight_per_client: usize,
    /// Connections over TCP of one pod.
    pub connections_per_client: usize,
    /// How much of a thread's time answering one pod may take, from 0 to 1; without an upstream, that is: waiting for
    /// one takes none.
    pub share_per_client: f64,
    /// The size of the cache, in bytes.
    pub cache_bytes: usize,
    /// How long after its expiry a response may serve while upstreams fail.
    pub stale_limit: Duration,
}

impl Default for DnsSettings {
    fn default() -> Self {
        Self {
            preferred_namespace: None,
            in_flight: 4096,
            in_flight_per_client: 256,
            connections_per_client: 64,
            // Some 15,000 ordinary answers a second.
            share_per_client: 0.25,
            cache_bytes: 4 << 20,
            stale_limit: Duration::from_secs(86_400),
        }
    }
}

/// A pod whose queries are answered.
#[derive(Debug)]
pub struct Client {
    /// Its namespace.
    pub namespace: Str,
    /// Its network.
    pub network: Str,
    /// Its own addresses, as far as they are known: queries come from these, from loopback ones, or to one of those,
    /// which nobody else reaches.
    pub addresses: Box<[IpAddr]>,
    /// For metrics: the application that it is an instance of.
    pub canonical_service: Str,
    /// For metrics: the version of that application.
    pub canonical_revision: Str,
    /// Whom to ask for names that the mesh does not know.
    pub upstreams: Arc<Upstreams>,
    /// The namespace from which upstreams are asked; `None` for this process's own. Whoever else asks the same
    /// upstreams gets what they answered there, so it must not be one in which a pod can forge it.
    pub upstreams_from: Option<Netns>,
    /// What tells the server that a datagram was sent to; `None` where only [`Client::upstreams`] are asked.
    conntrack: Option<Mutex<Conntrack>>,
    limits: ClientLimits,
}

#[derive(Debug)]
struct ClientLimits {
    queries: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    budget: Budget,
}

impl Client {
    /// Whether `address` is one of the pod's own.
    fn owns(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// The server that a datagram from `peer` to `local` was sent to, before it was redirected here.
    fn original_of_datagram(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
        header: Option<SocketAddr>,
    ) -> Option<SocketAddr> {
        let mut conntrack = self.conntrack.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(original) = header.filter(|original| original.port() == SERVER_PORT) {
            // Captured without netfilter: nothing was rewritten.
            return Some(original);
        }
        conntrack.original_udp_dst(peer, local).ok().filter(|original| *original != local)
    }

    /// The server that a connection was made to, before it was redirected here.
    fn original_of_stream(&self, stream: &TcpStream, peer: SocketAddr) -> Option<SocketAddr> {
        self.conntrack.as_ref()?;
        let local = net::canonical(stream.local_addr().ok()?);
        let rewritten = |original: &SocketAddr| *original != local || local.port() == SERVER_PORT;
        net::original_dst(stream, peer).ok().filter(rewritten)
    }
}

/// What a pod's [`Client`] is made of.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// See [`Client::namespace`].
    pub namespace: Str,
    /// See [`Client::network`].
    pub network: Str,
    /// See [`Client::addresses`].
    pub addresses: Box<[IpAddr]>,
    /// See [`Client::canonical_service`].
    pub canonical_service: Str,
    /// See [`Client::canonical_revision`].
    pub canonical_revision: Str,
    /// See [`Client::upstreams`].
    pub upstreams: Arc<Upstreams>,
    /// See [`Client::upstreams_from`].
    pub upstreams_from: Option<Netns>,
    /// Ask the server that the pod asked, and [`Client::upstreams`] only where that is not known. Needs
    /// `upstreams_from`, and conntrack in that namespace.
    pub ask_original: bool,
}

/// Gives the snapshot of the moment.
type MeshSource = Box<dyn Fn() -> Arc<Mesh> + Send + Sync>;

/// The proxy; one for all pods.
pub struct DnsProxy {
    settings: DnsSettings,
    mesh: MeshSource,
    metrics: DnsMetrics,
    cache: Mutex<Cache>,
    originals: Originals,
    under_way: Joined,
    in_flight: Arc<Semaphore>,
    random: &'static dyn SecureRandom,
    /// Counts answers, to rotate addresses.
    turn: AtomicUsize,
}

impl std::fmt::Debug for DnsProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DnsProxy").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What becomes of a message.
enum Next {
    /// Nothing is sent.
    Drop,
    /// This is sent.
    Reply(Vec<u8>),
    /// Upstreams are asked.
    Forward(Forward),
}

/// A query that upstreams are asked.
struct Forward {
    query: Query,
    transport: Transport,
    upstreams: Arc<Upstreams>,
    key: Option<Box<[u8]>>,
    /// An expired response, for when they do not answer.
    stale: Option<Vec<u8>>,
    labels: QueryLabels,
}

impl DnsProxy {
    /// A proxy that answers from the snapshots that `mesh` gives.
    #[must_use]
    pub fn new(
        settings: DnsSettings,
        mesh: impl Fn() -> Arc<Mesh> + Send + Sync + 'static,
        metrics: DnsMetrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            cache: Mutex::new(Cache::new(settings.cache_bytes, settings.stale_limit)),
            originals: Originals::default(),
            under_way: Joined::default(),
            in_flight: Arc::new(Semaphore::new(settings.in_flight)),
            random: rustls::crypto::aws_lc_rs::default_provider().secure_random,
            settings,
            mesh: Box::new(mesh),
            metrics,
            turn: AtomicUsize::new(0),
        })
    }

    /// A pod with its share of the limits.
    #[must_use]
    pub fn client(&self, settings: ClientSettings) -> Arc<Client> {
        let ClientSettings {
            namespace,
            network,
            addresses,
            canonical_service,
            canonical_revision,
            upstreams,
            upstreams_from,
            ask_original,
        } = settings;
        let conntrack = upstreams_from.as_ref().filter(|_| ask_original).and_then(|netns| {
            let opened = Conntrack::open(netns);
            if let Err(error) = &opened {
                let error = error as &dyn std::error::Error;
                tracing::warn!(error, %netns, "the configured resolvers are asked: conntrack is not there");
            }
            opened.ok().map(Mutex::new)
        });
        Arc::new(Client {
            namespace,
            network,
            addresses,
            canonical_service,
            canonical_revision,
            upstreams,
            upstreams_from,
            conntrack,
            limits: ClientLimits {
                queries: Arc::new(Semaphore::new(self.settings.in_flight_per_client)),
                connections: Arc::new(Semaphore::new(self.settings.connections_per_client)),
                budget: Budget::new(self.settings.share_per_client),
            },
        })
    }

    /// Answers the datagrams that come to `socket`, until shortly after `ending`, or the future is dropped.
    pub async fn serve_udp(
        self: Arc<Self>,
        socket: ProxyUdpSocket,
        client: Arc<Client>,
        ending: impl Future<Output = ()>,
    ) {
        let mut ending = std::pin::pin!(ending);
        let mut ended: Option<Instant> = None;
        let socket = Arc::new(socket);
        // Ended with this future: each holds the socket, whose port the pod's next proxy wants.
        let mut forwarding = JoinSet::new();
        let mut buffer = vec![0; QUERY_LIMIT].into_boxed_slice();
        loop {
            while forwarding.try_join_next().is_some() {}
            let since = ended.map_or(Duration::ZERO, |at| at.elapsed());
            if since >= LAST_ANSWERS || (since >= LAST_QUERIES && forwarding.is_empty()) {
                return;
            }
            let received = tokio::select! {
                biased;
                () = &mut ending, if ended.is_none() => {
                    ended = Some(Instant::now());
                    continue;
                }
                received = socket.recv(&mut buffer) => received,
                () = tokio::time::sleep(LAST_QUERIES / 4), if ended.is_some() => continue,
            };
            match received {
                Ok(datagram) => {
                    let message = buffer.get(..datagram.len).unwrap_or_default();
                    self.take(message, &datagram, &socket, &client, &mut forwarding).await;
                }
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "receiving DNS queries failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Answers one datagram; what has to be forwarded, in a task of its own.
    async fn take(
        self: &Arc<Self>,
        message: &[u8],
        datagram: &net::Datagram,
        socket: &Arc<ProxyUdpSocket>,
        client: &Arc<Client>,
        forwarding: &mut JoinSet<()>,
    ) {
        if datagram.interface != LOOPBACK && !client.owns(datagram.peer.ip()) {
            self.metrics.dropped("stranger");
            return;
        }
        if datagram.truncated {
            self.metrics.dropped("too_long");
            return;
        }
        let (peer, local) = (datagram.peer, datagram.local);
        let original = || {
            let port = socket.local_addr().map_or(0, |address| address.port());
            client.original_of_datagram(peer, SocketAddr::new(local, port), datagram.header_dst)
        };
        let started = Instant::now();
        let next = self.next(message, Transport::Udp, client, original);
        let spent = started.elapsed();
        match next {
            Next::Drop => {}
            Next::Reply(reply) => send(socket, &reply, peer, local).await,
            Next::Forward(forward) => match client.limits.queries.clone().try_acquire_owned() {
                Ok(place) => {
                    let (proxy, client, socket) = (self.clone(), client.clone(), socket.clone());
                    forwarding.spawn(async move {
                        let reply = proxy.forward(forward, &client, place).await;
                        send(&socket, &reply, peer, local).await;
                    });
                }
                Err(_) => {
                    self.metrics.dropped("too_many");
                    send(socket, &overloaded(&forward), peer, local).await;
                }
            },
        }
        self.pace(client, spent).await;
    }

    /// Answers the connections that come to `listener`, until the future is dropped.
    pub async fn serve_tcp(self: Arc<Self>, listener: TcpListener, client: Arc<Client>) {
        let mut accepting = net::AcceptLoop::new(listener, Arc::default());
        let mut connections = JoinSet::new();
        loop {
            let (stream, peer) = accepting.next().await;
            // A redirected connection of the pod's own arrives at a loopback address.
            let local = || stream.local_addr().is_ok_and(|local| local.ip().to_canonical().is_loopback());
            if !client.owns(peer.ip()) && !local() {
                self.metrics.dropped("stranger");
                continue;
            }
            let Ok(place) = client.limits.connections.clone().try_acquire_owned() else {
                self.metrics.dropped("too_many");
                continue;
            };
            while connections.try_join_next().is_some() {}
            let (proxy, client) = (self.clone(), client.clone());
            connections.spawn(async move {
                let original = client.original_of_stream(&stream, peer);
                proxy.serve_connection(stream, original, &client).await;
                drop(place);
            });
        }
    }

    /// Answers the queries of one connection, each when its answer is there (RFC 7766, section 6.2.1.1).
    async fn serve_connection(
        self: Arc<Self>,
        stream: TcpStream,
        original: Option<SocketAddr>,
        client: &Arc<Client>,
    ) {
        let (mut reader, writer) = stream.into_split();
        let writer = Arc::new(tokio::sync::Mutex::new(writer));
        let mut forwarding = JoinSet::new();
        let mut message = Vec::new();
        loop {
            let read = async {
                let len = usize::from(reader.read_u16().await.ok()?);
                message.resize(len.min(QUERY_LIMIT), 0);
                reader.read_exact(&mut message).await.ok()?;
                (len <= QUERY_LIMIT).then_some(())
            };
            if !matches!(timeout(IDLE_TIMEOUT, read).await, Ok(Some(()))) {
                break;
            }
            let started = Instant::now();
            let next = self.next(&message, Transport::Tcp, client, || original);
            let spent = started.elapsed();
            match next {
                Next::Drop => break,
                Next::Reply(reply) => {
                    if !write_message(&writer, &reply).await {
                        break;
                    }
                }
                Next::Forward(forward) => {
                    // A connection waits for its turn: unlike a datagram it can.
                    let Ok(place) = client.limits.queries.clone().acquire_owned().await else { break };
                    while forwarding.try_join_next().is_some() {}
                    let (proxy, client, writer) = (self.clone(), client.clone(), writer.clone());
                    forwarding.spawn(async move {
                        let reply = proxy.forward(forward, &client, place).await;
                        write_message(&writer, &reply).await;
                    });
                }
            }
            self.pace(client, spent).await;
        }
        // What is under way is still answered: a client may have closed its side only.
        while forwarding.join_next().await.is_some() {}
    }

    /// Waits when the pod has used up its share of the thread; `spent` is what the last message took.
    async fn pace(&self, client: &Client, spent: Duration) {
        if let Some(wait) = client.limits.budget.spend(spent) {
            self.metrics.paused.inc();
            tokio::time::sleep(wait).await;
        }
    }

    /// Decides about a message without waiting for anything. `original` finds the server that it was sent to.
    fn next(
        &self,
        message: &[u8],
        transport: Transport,
        client: &Client,
        original: impl FnOnce() -> Option<SocketAddr>,
    ) -> Next {
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Rejection::Drop) => {
                self.metrics.dropped("no_query");
                return Next::Drop;
            }
            Err(Rejection::Answer(code)) => {
                self.metrics.dropped("malformed");
                return Next::Reply(wire::rejection(message, code));
            }
        };
        let (service, revision) = (&client.canonical_service, &client.canonical_revision);
        let labels = QueryLabels::new(query.kind(), transport, service, revision);
        self.metrics.requests.with(&labels).inc();
        if let Some(reply) = self.answer(&query, transport, client) {
            return Next::Reply(reply);
        }
        if matches!(query.kind(), kind::AXFR | kind::IXFR) {
            // Zones come in many messages, and are none of a pod's business.
            return Next::Reply(query.bare_response(rcode::REFUSED));
        }
        let upstreams =
            original().map_or_else(|| client.upstreams.clone(), |server| self.originals.of(server));
        let key = query.cache_key(upstreams.id());
        let cached = key.as_deref().map_or(Cached::No, |key| self.cache().get(key));
        let stale = match cached {
            Cached::Fresh(response) => {
                self.metrics.from_cache.inc();
                return Next::Reply(finish(response, &query, transport));
            }
            Cached::Stale { response, ask: false } => {
                self.metrics.stale.inc();
                return Next::Reply(finish(response, &query, transport));
            }
            Cached::Stale { response, ask: true } => Some(response),
            Cached::No => None,
        };
        Next::Forward(Forward { query, transport, upstreams, key, stale, labels })
    }

    /// The answer of the mesh, if it has one.
    fn answer(&self, query: &Query, transport: Transport, client: &Client) -> Option<Vec<u8>> {
        let is_ours = matches!(query.kind(), kind::A | kind::AAAA | kind::ANY | kind::SRV);
        if query.class() != wire::CLASS_IN || !is_ours {
            return None;
        }
        let name = query.host_name()?;
        let mesh = (self.mesh)();
        let asker = registry::Asker {
            namespace: &client.namespace,
            network: &client.network,
            preferred_namespace: self.settings.preferred_namespace.as_deref(),
        };
        if query.kind() == kind::SRV {
            let targets = registry::targets(&mesh, &asker, &name)?;
            return Some(answer::with_targets(query, &targets, limit(query, transport)));
        }
        let host = registry::find(&mesh, &asker, &name)?;
        let mut addresses = registry::addresses(&mesh, &asker, &host)?;
        registry::rotate(&mut addresses, self.turn.fetch_add(1, Relaxed));
        Some(answer::with_addresses(query, &addresses, limit(query, transport)))
    }

    /// The answer of an upstream, a stale one, or an error. `place` is the query's share of the client's limit.
    async fn forward(
        self: &Arc<Self>,
        forward: Forward,
        client: &Arc<Client>,
        place: OwnedSemaphorePermit,
    ) -> Vec<u8> {
        let forward = Arc::new(forward);
        let (query, transport) = (&forward.query, forward.transport);
        let asking = self.ask_once(&forward, client, place);
        let Some(stale) = &forward.stale else {
            return match asking.await {
                Some(response) => finish(response, query, transport),
                None => query.bare_response(rcode::SERVER_FAILURE),
            };
        };
        let response = match timeout(CLIENT_RESPONSE_TIMEOUT, asking).await {
            Ok(Some(response)) if !is_failure(&response) => response,
            _ => {
                self.metrics.stale.inc();
                stale.clone()
            }
        };
        finish(response, query, transport)
    }

    /// The answer of an upstream, which all that ask the same wait for. Asking goes on, and fills the cache, when
    /// nobody waits any more.
    async fn ask_once(
        self: &Arc<Self>,
        forward: &Arc<Forward>,
        client: &Arc<Client>,
        place: OwnedSemaphorePermit,
    ) -> Option<Vec<u8>> {
        let Some(key) = forward.key.as_deref() else {
            let _socket = self.socket_place(forward.transport).await?;
            return self.ask(forward, client).await;
        };
        // Over TCP an upstream is asked for what does not fit into a datagram.
        let query = [key, &[u8::from(forward.transport == Transport::Tcp)]].concat();
        if let Some(waiting) = self.under_way.follow(&query) {
            self.metrics.joined.inc();
            return waiting.response().await;
        }
        let socket = self.socket_place(forward.transport).await?;
        let (leader, waiting) = match self.under_way.lead(&query) {
            Ok(leading) => leading,
            Err(waiting) => {
                drop(socket);
                self.metrics.joined.inc();
                return waiting.response().await;
            }
        };
        // The answer may have come since the cache was looked into.
        if let Cached::Fresh(response) = self.cache().get(key) {
            leader.finish(Some(response.clone()));
            return Some(response);
        }
        let (proxy, client, forward) = (self.clone(), client.clone(), forward.clone());
        tokio::spawn(async move {
            let response = proxy.ask(&forward, &client).await;
            leader.finish(response);
            drop((place, socket));
        });
        waiting.response().await
    }

    /// A place for one more socket.
    async fn socket_place(&self, transport: Transport) -> Option<OwnedSemaphorePermit> {
        let places = self.in_flight.clone();
        match transport {
            Transport::Udp => {
                let place = places.try_acquire_owned().ok();
                if place.is_none() {
                    self.metrics.dropped("too_many");
                }
                place
            }
            // A connection waits for its turn: unlike a datagram it can.
            Transport::Tcp => places.acquire_owned().await.ok(),
        }
    }

    /// The answer of an upstream, which the cache keeps.
    async fn ask(&self, forward: &Forward, client: &Client) -> Option<Vec<u8>> {
        let Forward { query, transport, upstreams, key, labels, .. } = forward;
        let started = Instant::now();
        self.metrics.upstream_requests.with(labels).inc();
        let dialer = upstream::Dialer {
            netns: client.upstreams_from.as_ref(),
            random: self.random,
            metrics: &self.metrics,
        };
        let result = dialer.ask(upstreams, query, *transport).await;
        self.metrics.upstream_duration.with(labels).observe(started.elapsed().as_secs_f64());
        if let Err(error) = &result {
            self.metrics.upstream_failures.with(labels).inc();
            tracing::debug!(error = error as &dyn std::error::Error, %upstreams, "DNS query not answered");
        }
        let response = result.ok();
        if let Some(key) = key {
            self.keep(key, response.as_deref());
        }
        response
    }

    /// Keeps a response, or remembers that there was none.
    fn keep(&self, key: &[u8], response: Option<&[u8]>) {
        let mut cache = self.cache();
        match response.and_then(|response| Some((response, wire::Response::parse(response)?))) {
            Some((response, parsed)) if !is_failure(response) => cache.put(key.into(), response, &parsed),
            // What a server says of the query, not of itself (FORMERR and the like), does not mean that it fails.
            Some((response, _)) if upstream::is_proper(response) => {}
            Some(_) | None => cache.failed(key, FAILURE_RECHECK),
        }
        self.metrics.cache_entries.set(i64::try_from(cache.len()).unwrap_or(i64::MAX));
        self.metrics.cache_bytes.set(i64::try_from(cache.bytes()).unwrap_or(i64::MAX));
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How large a response to `query` may be.
fn limit(query: &Query, transport: Transport) -> usize {
    match transport {
        Transport::Udp => query.udp_size().min(DATAGRAM_LIMIT),
        Transport::Tcp => usize::from(u16::MAX),
    }
}

/// An upstream's response as this client gets it.
fn finish(mut response: Vec<u8>, query: &Query, transport: Transport) -> Vec<u8> {
    if response.len() > limit(query, transport) {
        return query.bare_response(wire::flag::TC);
    }
    wire::readdress(&mut response, query);
    response
}

/// Whether a response says only that the server could not answer.
fn is_failure(response: &[u8]) -> bool {
    let code = wire::Response::parse(response).map(|r| r.flags & wire::flag::RCODE);
    !matches!(code, Some(rcode::NO_ERROR | rcode::NAME_ERROR))
}

/// What is said to a client that has too many queries under way: the stale answer, if there is one.
fn overloaded(forward: &Forward) -> Vec<u8> {
    match &forward.stale {
        Some(stale) => finish(stale.clone(), &forward.query, forward.transport),
        None => forward.query.bare_response(rcode::SERVER_FAILURE),
    }
}

async fn send(socket: &ProxyUdpSocket, reply: &[u8], peer: SocketAddr, from: IpAddr) {
    if let Err(error) = socket.send(reply, peer, from).await {
        tracing::debug!(error = &error as &dyn std::error::Error, %peer, "DNS answer not sent");
    }
}

/// Writes a message with its length before it. `false` when the client is gone or takes nothing.
async fn write_message(writer: &tokio::sync::Mutex<OwnedWriteHalf>, message: &[u8]) -> bool {
    let Ok(len) = u16::try_from(message.len()) else { return false };
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&len.to_be_bytes());
    framed.extend_from_slice(message);
    let write = async { writer.lock().await.write_all(&framed).await };
    matches!(timeout(IDLE_TIMEOUT, write).await, Ok(Ok(())))
}
