//! The client side: one stream to one of several servers, and what was got by it, also on disk.
//!
//! ```text
//!   disk ─▶ Update ─▶ user: decode, swap in ─▶ ack or nack ─▶ what we hold ─▶ journal
//!   server ─▶ Update ─┘                                  └─▶ answer to the server
//! ```
//!
//! * An update is one response. The next is read only when the user has answered it: what the server is told is in
//!   force is in force.
//! * A long response comes as several updates ([`parts`]), and is answered when the last of them is: so a state of any length
//!   needs the memory of a part. Not so one of a type of which all [belongs together](proto::belongs_together): that is one
//!   update, of at most 64 MiB; a longer one is refused, and what was in force stays.
//! * A user that refuses some resources applies the others: those are held from then on, and of what was refused
//!   the last good version stays held. The server is told which were refused, and why. On disk are both: whoever
//!   starts from there refuses the same again, and puts the same in its place.
//! * What is held is named, with its versions, at each connect, so that nothing is sent twice; and it is on disk
//!   ([`journal`]), so that a restarted proxy has a state while no server is there.
//! * The stream ends, and another server is tried after a while, when the transport fails, when the server ends it,
//!   or when nothing answers the first requests in time. Waits grow exponentially, with full jitter.

mod backoff;
mod connect;
mod held;
mod journal;
mod parts;
mod stream;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prost_types::{Struct, Value, value::Kind};
use proto::wire::core::Node;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Uri;

use backoff::Backoff;
use held::Held;
use journal::Journal;

use crate::inventory::Version;

/// How the client behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The servers, `https://host:port` or `http://host:port`. The first to be tried is chosen at random.
    pub addresses: Vec<String>,
    /// Certificates that the server's must chain to, PEM; read at each connect. Needed for `https`.
    pub root_file: Option<PathBuf>,
    /// The name that the server's certificate must have, if it is not the address's host.
    pub server_name: Option<String>,
    /// A bearer token; read at each connect. Sent over TLS, and in plaintext to loopback addresses only.
    pub token_file: Option<PathBuf>,
    /// The cluster, sent as the metadata `clusterid`.
    pub cluster_id: String,
    /// Who this is; see [`NodeInfo`].
    pub node: Node,
    /// The types to follow, in the order in which they are asked for. Each is followed whole. Those of our own
    /// ([`crate::OWN_TYPES`]) are asked for only where the server knows them, after the first of the others.
    pub types: Vec<&'static str>,
    /// How long a message may be. Servers of another make send a whole state in one.
    pub message_bytes: usize,
    /// Where the last good state is kept; nowhere if there is none.
    pub state_dir: Option<PathBuf>,
    /// How long the file of the last good state may be. A state that needs more is not kept.
    pub state_bytes: u64,
    /// How long a connect may take.
    pub connect_timeout: Duration,
    /// How long the first answer may take, before another server is tried.
    pub answer_timeout: Duration,
    /// How often the connection is probed. istiod ends the connections of clients that do so more often than every 15 s (half
    /// of its `--keepaliveInterval`).
    pub keepalive: Duration,
    /// How long a probe may take.
    pub keepalive_timeout: Duration,
    /// The longest wait before the first attempt to connect again.
    pub backoff: Duration,
    /// The longest wait.
    pub backoff_max: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            root_file: None,
            server_name: None,
            token_file: None,
            cluster_id: "Kubernetes".to_owned(),
            node: Node::default(),
            types: Vec::new(),
            message_bytes: 200 << 20,
            state_dir: None,
            state_bytes: 512 << 20,
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(60),
            keepalive: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
            backoff: Duration::from_millis(500),
            backoff_max: Duration::from_secs(15),
        }
    }
}

/// What a proxy says of itself.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// Its address.
    pub ip: IpAddr,
    /// Its pod's name.
    pub name: String,
    /// Its pod's namespace.
    pub namespace: String,
    /// The node that it serves.
    pub node_name: String,
    /// The cluster that it is in.
    pub cluster_id: String,
    /// Its version.
    pub version: String,
}

impl NodeInfo {
    /// The node as a ztunnel that knows our extensions names itself: `ztunnel~IP~POD.NS~NS.svc.cluster.local`.
    #[must_use]
    pub fn node(&self) -> Node {
        self.node_of("ztunnel", None)
    }

    /// The same of a waypoint, by the Gateway that it is (`NAMESPACE/NAME`).
    #[must_use]
    pub fn waypoint(&self, gateway: &str) -> Node {
        self.node_of("waypoint", Some((crate::GATEWAY_METADATA, gateway)))
    }

    fn node_of(&self, kind: &str, more: Option<(&str, &str)>) -> Node {
        let Self { ip, name, namespace, node_name, cluster_id, version } = self;
        let fields = [
            ("NAME", name.as_str()),
            ("NAMESPACE", namespace.as_str()),
            ("NODE_NAME", node_name.as_str()),
            ("INSTANCE_IPS", &ip.to_string()),
            ("CLUSTER_ID", cluster_id.as_str()),
            ("CULVERT_VERSION", version.as_str()),
            (crate::EXTENSIONS_METADATA, crate::EXTENSIONS_VERSION),
            (crate::FEATURES_METADATA, &proto::Features::ALL.text()),
        ];
        let text = |t: &str| Value { kind: Some(Kind::StringValue(t.to_owned())) };
        Node {
            id: format!("{kind}~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct {
                fields: fields.iter().chain(&more).map(|(k, v)| ((*k).to_owned(), text(v))).collect(),
            }),
            ..Node::default()
        }
    }
}

/// A resource, as it arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resource {
    /// Its primary name; not empty, and once in an update. What is held shares it.
    pub name: Arc<str>,
    /// Its version.
    pub version: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// The encoded message, of the update's type.
    pub body: Bytes,
}

/// Where an update comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The last good state, before there is a server.
    Disk,
    /// A server.
    Server,
}

/// A change of what is held of one type. To be answered: [`ack`](Self::ack), [`nack`](Self::nack), or
/// [`reply`](Self::reply)'s when it is taken apart. One that is dropped is refused whole.
#[derive(Debug)]
pub struct Update {
    /// The type, one of [`Settings::types`].
    pub type_url: &'static str,
    /// New and changed resources.
    pub resources: Vec<Resource>,
    /// Names that are gone. May name what never was there.
    pub removed: Vec<String>,
    /// With this the state of the type is whole; otherwise others follow that belong to it.
    pub complete: bool,
    /// Where it comes from.
    pub origin: Origin,
    /// The answer.
    pub reply: Reply,
}

impl Update {
    /// It is in force.
    pub fn ack(self) {
        self.reply.ack();
    }

    /// What was answered to it is on disk, and not only on its way there, before the server is told: a node that
    /// crashes the moment after comes back with this or what is newer. Costs a write to the disk.
    pub fn must_last(&mut self) {
        self.reply.lasts = true;
    }

    /// It is in force but for these, of which the last good version still is. None is an [`ack`](Self::ack).
    pub fn nack(self, rejections: Vec<Rejection>) {
        self.reply.nack(rejections);
    }
}

/// The answer to an update.
#[derive(Debug)]
pub struct Reply {
    sender: oneshot::Sender<Answer>,
    lasts: bool,
}

/// What the user said of an update.
#[derive(Debug)]
struct Answer {
    rejections: Vec<Rejection>,
    lasts: bool,
}

impl Reply {
    /// See [`Update::ack`].
    pub fn ack(self) {
        self.nack(Vec::new());
    }

    /// See [`Update::nack`].
    pub fn nack(self, rejections: Vec<Rejection>) {
        let _ = self.sender.send(Answer { rejections, lasts: self.lasts });
    }
}

/// A resource that was not applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejection {
    /// Its primary name.
    pub name: Arc<str>,
    /// Why not.
    pub reason: String,
}

/// The updates of a [`Client`], in their order.
#[derive(Debug)]
pub struct Updates(mpsc::Receiver<Update>);

impl Updates {
    /// The next update, when the one before was answered; `None` when the client has ended.
    pub async fn next(&mut self) -> Option<Update> {
        self.0.recv().await
    }
}

/// The connection to a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Link {
    /// None was tried yet.
    Starting,
    /// It stands, and the server has answered.
    Connected {
        /// The server.
        address: Arc<str>,
        /// Since when.
        since: SystemTime,
    },
    /// There is none.
    Away {
        /// What the last attempt ended with.
        error: Arc<str>,
        /// Since when.
        since: SystemTime,
    },
}

/// Why a connection ended, in the words of Istio's metric.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Termination {
    /// It could not be made.
    ConnectionError,
    /// It broke, or the server ended it with an error.
    Error,
    /// The server ended it to be connected to again, or did not answer.
    Reconnect,
    /// The server ended it.
    Complete,
}

impl Termination {
    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// What is worth counting.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A server has answered.
    Connected(&'a str),
    /// A connection ended, or was not made (`istio_xds_connection_terminations_total`).
    Terminated(Termination),
    /// A response came (`istio_xds_message_total`, `istio_xds_message_bytes_total`).
    Message {
        /// Its type.
        type_url: &'a str,
        /// Its length.
        bytes: usize,
    },
    /// Resources were refused, this many.
    Rejected {
        /// Their type.
        type_url: &'a str,
        /// How many.
        resources: usize,
    },
    /// The last good state could not be read or kept.
    StateLost(&'a str),
}

/// Counts what happens.
pub trait Observer: Send + Sync + 'static {
    /// This happened.
    fn observe(&self, event: Event<'_>);
}

/// Counts nothing.
impl Observer for () {
    fn observe(&self, _: Event<'_>) {}
}

/// Settings that mean nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSettings {
    /// No server.
    #[error("no address of a control plane is given")]
    NoAddress,
    /// Not the address of a server.
    #[error("{0:?} is no address of a control plane: write https://host:port")]
    Address(String),
    /// How to trust the server is not said.
    #[error("{0} needs a file of root certificates")]
    NoRoot(String),
}

/// What [`Client`] says that it holds to a server of ours, in `culvert_held`, for those who speak to it by themselves:
/// versions by name. `None`: a version is not of ours.
#[must_use]
pub fn inventory(held: &BTreeMap<String, String>) -> Option<Vec<u8>> {
    let versions = held.iter().map(|(name, text)| Some((name.as_str(), Version::parse(text)?)));
    Some(crate::inventory::write(versions.collect::<Option<Vec<_>>>()?.into_iter()))
}

/// The client. [`run`](Self::run) has to run for anything to happen.
pub struct Client {
    settings: Settings,
    addresses: Vec<Uri>,
    observer: Arc<dyn Observer>,
    updates: mpsc::Sender<Update>,
    link: watch::Sender<Link>,
    held: Held,
    journal: Option<Journal>,
    backoff: Backoff,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl Client {
    /// A client, and its updates.
    ///
    /// # Errors
    /// The settings can't work.
    pub fn new(settings: Settings, observer: Arc<dyn Observer>) -> Result<(Self, Updates), InvalidSettings> {
        let addresses =
            settings.addresses.iter().map(|a| connect::address(a)).collect::<Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err(InvalidSettings::NoAddress);
        }
        let secure = addresses.iter().find(|a| a.scheme_str() == Some("https"));
        if let (Some(address), None) = (secure, &settings.root_file) {
            return Err(InvalidSettings::NoRoot(address.to_string()));
        }
        let (sender, receiver) = mpsc::channel(1);
        let client = Self {
            held: Held::new(&settings.types),
            backoff: Backoff::new(settings.backoff, settings.backoff_max),
            settings,
            addresses,
            observer,
            updates: sender,
            link: watch::Sender::new(Link::Starting),
            journal: None,
        };
        Ok((client, Updates(receiver)))
    }

    /// The state of the connection.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    /// Hands out the last good state, then connects, again and again. Ends when the [`Updates`] are dropped.
    pub async fn run(mut self) {
        self.restore().await;
        let mut place = self.backoff.below(self.addresses.len());
        while !self.updates.is_closed() {
            let Some(address) = self.addresses.get(place % self.addresses.len()).cloned() else { return };
            let ended = self.stream(&address).await;
            place = place.wrapping_add(1);
            if ended.answered {
                self.backoff.reset();
            }
            self.observer.observe(Event::Terminated(ended.termination));
            let wait = self.backoff.next();
            let error: Arc<str> = format!("{address}: {}", ended.message).into();
            tracing::warn!(%error, wait_ms = wait.as_millis(), "no connection to the control plane");
            self.link.send_replace(Link::Away { error, since: SystemTime::now() });
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.updates.closed() => return,
            }
        }
    }
}
