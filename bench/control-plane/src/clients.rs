//! Simulated proxies: real gRPC over TLS, one connection each, which acknowledge what they get and don't decode it. One
//! of them, the scribe, does decode: it knows which generation brought which change, and what all hold.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes};
use prost::Message;
use proto::wire::discovery::{DeltaDiscoveryRequest, Resource};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, MESH_SETTINGS_TYPE_URL};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use xds::client::{NodeInfo, inventory};
use xds::server::Response;

use crate::api;
use crate::objects::node_name;

const TYPES: [&str; 3] = [MESH_SETTINGS_TYPE_URL, AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL];
const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// As ztunnel's.
const WINDOW: u32 = 4 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// What comes after the generation when a state goes on in the next response.
const MORE: &str = " more";

/// Requests are encoded before: thousands say that they hold the same.
#[derive(Clone, Copy, Default)]
struct Skim;

impl Codec for Skim {
    type Encode = Bytes;
    type Decode = Response;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Skim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Skim {
    type Item = Response;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Response>, Status> {
        // Its resources are bytes that are not looked at.
        Response::decode(from).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// What all clients together got.
#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    resources: AtomicU64,
    responses: AtomicU64,
    failures: AtomicU64,
    /// Clients that have all of the state in the present round.
    settled: AtomicUsize,
}

/// A reading of the counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Got {
    /// Of messages.
    pub bytes: u64,
    /// Resources and removals.
    pub resources: u64,
    /// Messages.
    pub responses: u64,
    /// Streams that ended unasked.
    pub failures: u64,
}

impl std::ops::Sub for Got {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            bytes: self.bytes - other.bytes,
            resources: self.resources - other.resources,
            responses: self.responses - other.responses,
            failures: self.failures - other.failures,
        }
    }
}

/// What the scribe knows.
#[derive(Debug, Default)]
struct Book {
    /// Versions by type and name.
    held: BTreeMap<&'static str, BTreeMap<String, String>>,
    /// The generation with which a pod first came, or went.
    came: HashMap<String, u64>,
    went: HashMap<String, u64>,
}

/// What the clients share.
struct Shared {
    endpoint: Endpoint,
    counters: Counters,
    book: Mutex<Book>,
    /// Each client's acknowledgements: the generation and when.
    acks: Vec<Mutex<Vec<(u64, Instant)>>>,
    /// The requests by which a client that comes back says what it holds, in the order of [`TYPES`].
    held: Mutex<Option<[Bytes; 3]>>,
    /// The round: the next one has all connect anew.
    round: watch::Sender<u64>,
}

/// All simulated proxies. They end with the runtime.
pub struct Clients(Arc<Shared>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A share of a duration, by chance.
fn by_chance(longest: Duration) -> Duration {
    let chance = RandomState::new().hash_one(0) % 1000;
    longest.mul_f64(f64::from(u32::try_from(chance).unwrap_or(0)) / 1000.0)
}

impl Clients {
    /// Starts so many, at a control plane on this port of loopback, whose certificate chains to this root.
    ///
    /// # Errors
    /// The root is none.
    pub fn start(count: u32, port: u16, root: &str) -> Result<Self> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(root))
            .domain_name("localhost")
            .timeout(Duration::from_secs(60));
        let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}"))?
            .connect_timeout(Duration::from_secs(60))
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .tls_config(tls)
            .context("the root of the control plane")?;
        let shared = Arc::new(Shared {
            endpoint,
            counters: Counters::default(),
            book: Mutex::default(),
            acks: (0..count).map(|_| Mutex::default()).collect(),
            held: Mutex::new(None),
            round: watch::Sender::new(0),
        });
        for index in 0..count {
            tokio::spawn(Proxy { index, shared: shared.clone() }.run());
        }
        Ok(Self(shared))
    }

    /// What was got until now.
    pub fn got(&self) -> Got {
        let c = &self.0.counters;
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Got {
            bytes: read(&c.bytes),
            resources: read(&c.resources),
            responses: read(&c.responses),
            failures: read(&c.failures),
        }
    }

    /// How many have all of the state, since they last began anew.
    pub fn settled(&self) -> usize {
        self.0.counters.settled.load(Ordering::Relaxed)
    }

    /// From now on, clients that connect say that they hold what the scribe does now: all got the same.
    pub fn remember(&self) {
        let book = locked(&self.0.book);
        let requests =
            TYPES.map(|type_url| request(type_url, book.held.get(type_url).unwrap_or(&BTreeMap::new())));
        drop(book);
        *locked(&self.0.held) = Some(requests.map(|request| request.encode_to_vec().into()));
        self.0.counters.settled.store(0, Ordering::Relaxed);
    }

    /// The bytes by which one client says what it holds.
    pub fn remembered_bytes(&self) -> usize {
        locked(&self.0.held).as_ref().map_or(0, |requests| requests.iter().map(Bytes::len).sum())
    }

    /// All end their connections and connect anew.
    pub fn reconnect(&self) {
        self.remember();
        self.0.round.send_modify(|round| *round += 1);
    }

    /// When the last client acknowledged that a pod came or went; `None` when some has not yet.
    pub fn acknowledged(&self, name: &str, came: bool) -> Option<Instant> {
        let book = locked(&self.0.book);
        let changes = if came { &book.came } else { &book.went };
        let generation = *changes.get(name)?;
        drop(book);
        let mut last = None;
        for acks in &self.0.acks {
            let acks = locked(acks);
            let at = acks.partition_point(|(g, _)| *g < generation);
            last = last.max(Some(acks.get(at)?.1));
        }
        last
    }
}

fn request(type_url: &str, held: &BTreeMap<String, String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        culvert_held: inventory(held).unwrap_or_default(),
        ..DeltaDiscoveryRequest::default()
    }
}

/// One of them.
struct Proxy {
    index: u32,
    shared: Arc<Shared>,
}

impl Proxy {
    async fn run(self) {
        let mut round = self.shared.round.subscribe();
        let mut pause = FIRST_PAUSE;
        loop {
            round.mark_unchanged();
            let mut has_settled = false;
            tokio::select! {
                _ = self.stream(&mut has_settled) => {
                    self.shared.counters.failures.fetch_add(1, Ordering::Relaxed);
                    pause = if has_settled { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
                }
                changed = round.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    pause = FIRST_PAUSE;
                }
            }
            tokio::time::sleep(by_chance(pause)).await;
        }
    }

    fn first_requests(&self) -> [Bytes; 3] {
        let node = NodeInfo {
            ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            name: format!("ztunnel-{}", self.index),
            namespace: "culvert-system".to_owned(),
            node_name: node_name(self.index),
            cluster_id: "Kubernetes".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let held = locked(&self.shared.held).clone();
        let mut requests =
            held.unwrap_or_else(|| TYPES.map(|t| request(t, &BTreeMap::new()).encode_to_vec().into()));
        // On the wire, messages after each other are one with the fields of both.
        let node = DeltaDiscoveryRequest { node: Some(node.node()), ..DeltaDiscoveryRequest::default() };
        let mut first = node.encode_to_vec();
        first.extend_from_slice(&requests[0]);
        requests[0] = first.into();
        requests
    }

    /// One stream, until it ends.
    async fn stream(&self, has_settled: &mut bool) -> Result<()> {
        let channel = self.shared.endpoint.connect().await?;
        let (sender, receiver) = mpsc::channel(8);
        for request in self.first_requests() {
            sender.send(request).await?;
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        let token = api::token(&format!("ztunnel-{}", self.index));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
        request.metadata_mut().insert("clusterid", MetadataValue::from_static("Kubernetes"));
        let mut grpc = Grpc::new(channel).max_decoding_message_size(256 << 20);
        grpc.ready().await?;
        let responses = grpc.streaming(request, METHOD.parse()?, Skim).await?;
        let mut responses = responses.into_inner();
        let mut whole = [false; 3];
        while let Some(response) = responses.message().await? {
            let counters = &self.shared.counters;
            counters.bytes.fetch_add(response.encoded_len() as u64, Ordering::Relaxed);
            let resources = response.resources.len() + response.removed_resources.len();
            counters.resources.fetch_add(resources as u64, Ordering::Relaxed);
            counters.responses.fetch_add(1, Ordering::Relaxed);
            if self.index == 0 {
                self.write_down(&response)?;
            }
            let answer = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce.clone(),
                ..DeltaDiscoveryRequest::default()
            };
            sender.send(answer.encode_to_vec().into()).await?;
            let (generation, more) = generation(&response.system_version_info);
            if more {
                continue;
            }
            if response.type_url == ADDRESS_TYPE_URL
                && let Some(acks) = self.shared.acks.get(self.index as usize)
            {
                locked(acks).push((generation, Instant::now()));
            }
            if let Some(place) = TYPES.iter().position(|t| *t == response.type_url)
                && let Some(type_whole) = whole.get_mut(place)
            {
                *type_whole = true;
            }
            if whole == [true; 3] && !*has_settled {
                *has_settled = true;
                counters.settled.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn write_down(&self, response: &Response) -> Result<()> {
        let Some(type_url) = TYPES.into_iter().find(|t| *t == response.type_url) else { return Ok(()) };
        let (generation, _) = generation(&response.system_version_info);
        let mut book = locked(&self.shared.book);
        for resource in &response.resources {
            let Resource { name, version, .. } = Resource::decode(resource.clone())?;
            book.came.entry(name.clone()).or_insert(generation);
            book.held.entry(type_url).or_default().insert(name, version);
        }
        for name in &response.removed_resources {
            book.went.entry(name.clone()).or_insert(generation);
            if let Some(held) = book.held.get_mut(type_url) {
                held.remove(name);
            }
        }
        Ok(())
    }
}

/// The generation that a response brings a client to, and whether others follow.
fn generation(system_version_info: &str) -> (u64, bool) {
    let (text, more) = match system_version_info.strip_suffix(MORE) {
        Some(text) => (text, true),
        None => (system_version_info, false),
    };
    (text.parse().unwrap_or(0), more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_are_read() {
        assert_eq!(
            (generation("17"), generation("17 more"), generation("")),
            ((17, false), (17, true), (0, false))
        );
    }
}
