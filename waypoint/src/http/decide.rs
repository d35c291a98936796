//! The seam between the engine and what decides: for each request a [`Decide`] says what is done with it.

use std::fmt;
use std::future::Future;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::http::head::RequestHead;

/// What is known of the connection that a request came by.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The client's address: that of its connection, or what a tunnel says whom it is for.
    pub client: SocketAddr,
    /// Where the client meant to connect.
    pub destination: SocketAddr,
    /// The identity that the client has proved.
    pub identity: Option<Arc<model::SpiffeId>>,
    /// The server name of the client's TLS handshake with us.
    pub server_name: Option<Arc<str>>,
    /// Whether that handshake is there: the scheme is `https` then.
    pub secure: bool,
}

/// What decides. It is asked once for a request, and told how it ended.
pub trait Decide: Send + Sync + 'static {
    /// Says what is done with a request, and edits it: what stands in the head afterwards is what is sent.
    fn decide(&self, request: &mut RequestHead, connection: &Connection) -> Decision;

    /// A request has ended: for logs and metrics.
    fn ended(&self, request: &RequestHead, connection: &Connection, record: &Record) {
        let _ = (request, connection, record);
    }
}

/// What is done with a request.
#[derive(Clone)]
pub enum Decision {
    /// It is sent on.
    Forward {
        /// How.
        how: Arc<Forwarding>,
        /// Whereto.
        endpoints: Arc<dyn Endpoints>,
    },
    /// It is answered here.
    Respond(Arc<Response>),
}

/// An answer of our own.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code. A gRPC client gets the code of gRPC that goes with it instead.
    pub status: u16,
    /// Fields beside those of the body. Valid ones: see [`crate::http::head::is_field_value`].
    pub fields: Box<[(Box<str>, Box<str>)]>,
    /// The body, plain text unless a field says otherwise.
    pub body: bytes::Bytes,
    /// Why, for the log.
    pub flag: Flag,
}

/// Envoy's response flags, as far as the engine sets them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Flag {
    /// Nothing out of the ordinary.
    #[default]
    None,
    /// No endpoint to send to.
    NoHealthyUpstream,
    /// The upstream could not be connected to.
    UpstreamConnectionFailure,
    /// The upstream ended the connection before the response.
    UpstreamConnectionTermination,
    /// It reset the stream.
    UpstreamRemoteReset,
    /// A limit of connections or requests was reached.
    UpstreamOverflow,
    /// The response did not come in time.
    UpstreamRequestTimeout,
    /// What the upstream sent is no HTTP.
    UpstreamProtocolError,
    /// What the client sent is no HTTP.
    DownstreamProtocolError,
    /// The client has gone.
    DownstreamConnectionTermination,
    /// Nothing went on for too long.
    StreamIdleTimeout,
    /// No route.
    NoRoute,
    /// What was to be done is said by whoever decided.
    Decided(&'static str),
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "-",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectionFailure => "UF",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamRemoteReset => "UR",
            Self::UpstreamOverflow => "UO",
            Self::UpstreamRequestTimeout => "UT",
            Self::UpstreamProtocolError => "UPE",
            Self::DownstreamProtocolError => "DPE",
            Self::DownstreamConnectionTermination => "DC",
            Self::StreamIdleTimeout => "SI",
            Self::NoRoute => "NR",
            Self::Decided(flag) => flag,
        })
    }
}

/// How a request is sent on. Made once for a route.
#[derive(Clone, Debug, Default)]
pub struct Forwarding {
    /// Time limits.
    pub timeouts: Timeouts,
    /// When it is tried again.
    pub retries: Option<Retries>,
    /// What is changed of the response.
    pub response_edits: Edits,
    /// Who gets a copy.
    pub mirrors: Vec<Mirror>,
}

/// Time limits; `None` is without one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    /// From the request's head to the response's end, tries and pauses included.
    pub request: Option<Duration>,
    /// From the choice of an endpoint to its response's head.
    pub per_try: Option<Duration>,
    /// Without a byte in either direction. `None` is that of [`crate::http::Settings`].
    pub idle: Option<Duration>,
}

/// When a request is tried again. Never once the response has begun, and only while its body is still here.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Retries {
    /// How often, beside the first try.
    pub attempts: u32,
    /// No connection to the endpoint.
    pub connect_failure: bool,
    /// The connection, or the stream, ended before the response began; a try took too long.
    pub reset: bool,
    /// The endpoint says that it has not looked at the request (HTTP/2's REFUSED_STREAM).
    pub refused_stream: bool,
    /// Statuses from 500 on.
    pub server_errors: bool,
    /// 502, 503, 504.
    pub gateway_errors: bool,
    /// These statuses.
    pub statuses: Vec<u16>,
    /// These codes of gRPC, where the response has no body.
    pub grpc_codes: Vec<u8>,
    /// The first pause is random up to this; each further one up to twice as long, ten times at most.
    pub backoff: Duration,
}

/// Who gets a copy of requests. What becomes of it touches nobody.
#[derive(Clone)]
pub struct Mirror {
    /// Whereto.
    pub endpoints: Arc<dyn Endpoints>,
    /// Of how many requests in a million.
    pub share: u32,
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror").field("share", &self.share).finish_non_exhaustive()
    }
}

/// Changes of fields: removed first, then set, then added. Names and values are valid ones.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    /// Names.
    pub remove: Vec<Box<str>>,
    /// In the place of what is there.
    pub set: Vec<(Box<str>, Box<str>)>,
    /// Beside it.
    pub add: Vec<(Box<str>, Box<str>)>,
}

impl Edits {
    /// Makes the changes.
    pub fn apply(&self, fields: &mut crate::http::head::Fields) {
        for name in &self.remove {
            fields.remove(name.as_bytes());
        }
        for (name, value) in &self.set {
            fields.set(name.as_bytes(), value.as_bytes());
        }
        for (name, value) in &self.add {
            fields.push(name.as_bytes(), value.as_bytes());
        }
    }
}

/// Where requests of a destination go.
pub trait Endpoints: Send + Sync + 'static {
    /// The endpoint for a try, not one of `tried` if there is another. [`Endpoints::ended`] is called for each.
    fn pick(&self, request: &RequestHead, tried: &[Arc<Target>]) -> Option<Arc<Target>>;

    /// A try has ended, with its response's body if that was passed on: with a status, or without one if there was none. For outlier detection and for those
    /// that count requests under way.
    fn ended(&self, target: &Arc<Target>, status: Option<u16>) {
        let _ = (target, status);
    }
}

/// What an endpoint is spoken to by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2, by prior knowledge or because TLS said so.
    Http2,
}

/// An endpoint, with how it is reached. Requests share connections if their targets are equal.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its address.
    pub address: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// What carries it.
    pub carrier: Carrier,
}

/// What carries an upstream connection.
#[derive(Clone)]
pub enum Carrier {
    /// TCP, as it is.
    Tcp,
    /// What this makes: TLS, a tunnel.
    Via(Arc<dyn Dial>),
}

impl fmt::Debug for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "Tcp",
            Self::Via(_) => "Via",
        })
    }
}

impl Carrier {
    /// Two are equal if the same maker makes them.
    fn identity(&self) -> usize {
        match self {
            Self::Tcp => 0,
            Self::Via(dial) => Arc::as_ptr(dial).cast::<()>().addr(),
        }
    }
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
            && self.protocol == other.protocol
            && self.carrier.identity() == other.carrier.identity()
    }
}

impl Eq for Target {}

impl Hash for Target {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
        self.protocol.hash(state);
        self.carrier.identity().hash(state);
    }
}

/// A connection that is being made.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn net::Io>>> + Send>>;

/// Makes connections that are more than TCP.
pub trait Dial: Send + Sync + 'static {
    /// Connects to an endpoint. The pool limits the time.
    fn dial(&self, address: SocketAddr) -> Dialing;
}

/// How a request went.
#[derive(Clone, Debug)]
pub struct Record {
    /// When its head had come.
    pub started: tokio::time::Instant,
    /// The status that the client was sent; 0 if none was.
    pub status: u16,
    /// Why it is not as it should be.
    pub flag: Flag,
    /// More of that, in words.
    pub detail: &'static str,
    /// Whether retries were used up.
    pub retries_exhausted: bool,
    /// How often it was sent.
    pub tries: u32,
    /// The endpoint of the last try.
    pub target: Option<Arc<Target>>,
    /// Bytes of the request's body.
    pub received: u64,
    /// Bytes of the response's body.
    pub sent: u64,
    /// `grpc-status`, where the response had one.
    pub grpc_status: Option<u8>,
}
