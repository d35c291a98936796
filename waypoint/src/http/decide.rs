//! The seam between the engine and what decides: for each request a [`Decide`] says what is done with it.

use std::fmt;
use std::future::Future;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::http::head::{Fields, RequestHead};
use crate::upstream::circuit::Circuit;

pub use crate::http::edits::{Edit, Edits, Facts, Value};

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
    /// Who the client is by what its node says of it, where the mesh does not tell: for telemetry only.
    pub said: Option<Arc<model::Workload>>,
}

/// What decides. It is asked once for a request, and told how it ended.
pub trait Decide: Send + Sync + 'static {
    /// Says what is done with a request, and edits it: what stands in the head afterwards is what is sent. What is to be
    /// known of it at its end goes into `decided`.
    fn decide(&self, request: &mut RequestHead, connection: &Connection, decided: &mut Decided) -> Decision;

    /// A request has ended: for logs and metrics. `response` are the fields of what the client was sent.
    fn ended(
        &self,
        request: &RequestHead,
        response: &Fields,
        connection: &Connection,
        decided: &Decided,
        record: &Record,
    ) {
        let _ = (request, response, connection, decided, record);
    }

    /// A request could not be read, and was answered with `status`.
    fn refused(&self, connection: &Connection, status: u16, why: &dyn fmt::Display) {
        let _ = (connection, status, why);
    }
}

/// What is done with a request.
pub enum Decision {
    /// It is sent on.
    Forward {
        /// How.
        how: Arc<Forwarding>,
        /// Whereto.
        endpoints: Arc<dyn Endpoints>,
        /// What is of this request alone, if there is anything.
        more: Option<Box<More>>,
    },
    /// It is answered here.
    Respond(Arc<Response>),
    /// Something has to be waited for first: an answer of somebody else, or a delay. Whoever makes it limits the time.
    Later(Waiting),
    /// The beginning of the request's body has to be seen first. It is sent on all the same.
    Read(Reading),
}

/// A decision for which the body is read.
pub struct Reading {
    /// So many bytes, or all if there are fewer.
    pub limit: usize,
    /// What comes of it.
    pub then: Seen,
}

/// The rest of a decision for which the body was read.
pub type Seen = Box<dyn FnOnce(Ahead, &mut RequestHead, &Connection, &mut Decided) -> Decision + Send>;

/// The beginning of a body.
#[derive(Clone, Debug, Default)]
pub struct Ahead {
    /// Its first bytes, as many as were asked for at most.
    pub bytes: bytes::Bytes,
    /// Whether these are all.
    pub whole: bool,
}

/// A decision that waits. What comes of it decides on, with the request at hand again.
pub type Waiting = Pin<Box<dyn Future<Output = Then> + Send>>;

/// The rest of a decision that had to wait.
pub type Then = Box<dyn FnOnce(&mut RequestHead, &Connection, &mut Decided) -> Decision + Send>;

/// What of a decision to send a request on is of that request alone.
#[derive(Default)]
pub struct More {
    /// Who gets a copy.
    pub mirrors: Vec<Mirror>,
    /// Changes of the response's fields, before those of the route.
    pub response_edits: Edits,
}

/// What was found out while a request was decided: for logs, metrics, and for edits of the response.
#[derive(Clone, Debug, Default)]
pub struct Decided {
    /// What is done for the service that the request is for.
    pub service: Option<Arc<model::http::HttpService>>,
    /// The service's port.
    pub port: u16,
    /// The route that took it.
    pub route: Option<Arc<model::http::Route>>,
    /// The place of what held of that route in the port's table.
    pub matched: Option<usize>,
    /// The route that took it, if it is a connection of bytes.
    pub stream: Option<Arc<model::http::StreamRoute>>,
    /// Where that route leads to.
    pub led_to: Option<model::http::BackendRef>,
    /// Whether it was made to wait, since its route says so.
    pub delayed: bool,
    /// The place of the back end among those of the route.
    pub backend: Option<usize>,
    /// What its token says, if it has one that was verified.
    pub claims: Option<Arc<model::http::Claims>>,
    /// Whether the policies let it in, and why; with what dry-run policies would have changed.
    pub verdict: Option<Arc<model::RequestDecision>>,
    /// What those said whom CUSTOM policies name, in the order in which they were asked.
    pub authorizers: Vec<crate::filters::ext_authz::Said>,
    /// The request's span, where somebody takes spans.
    pub trace: Option<Box<crate::telemetry::Span>>,
    /// Authority, path and query as they came, where they are sent in another form.
    pub original: Option<Box<Original>>,
    /// Whether a rate-limit service has changed it after the policies were asked.
    pub limited: bool,
    /// Fields that are ours to say, so that the request's trailers may not have them.
    pub own_fields: Vec<model::Str>,
    /// Why it is answered here, for the log.
    pub detail: &'static str,
}

/// What a request asked for before it was rewritten.
#[derive(Clone, Debug, Default)]
pub struct Original {
    /// `:authority` or `Host`.
    pub authority: Box<str>,
    /// Path and query.
    pub target: Box<str>,
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
}

/// Time limits; `None` is without one. What has switched protocols is under that of idleness only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    /// To the response's end, tries and pauses included.
    pub request: Option<Duration>,
    /// For a try.
    pub per_try: Option<Duration>,
    /// What these are measured from and to.
    pub measured: Measured,
    /// Without a byte in either direction. `None` is that of [`crate::http::Settings`].
    pub idle: Option<Duration>,
}

/// What time limits are measured from and to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Measured {
    /// As the Gateway API says: from the request's first byte, or the choice of a try's endpoint, to the response's last byte.
    #[default]
    Whole,
    /// As Envoy has it: both begin when all of the request has come, so that a client may stream for as long as it likes; a
    /// try's ends with the response's head.
    Response,
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
    /// The least pause before a further try. To it comes a random part, up to as long before the first of them and twice as long before
    /// each that follows, nine times at most. Without it a pause is random from nothing up to 25 ms, twice that and so on, 250 ms at
    /// most (Envoy's).
    pub backoff: Option<Duration>,
    /// Whether the answer says that a rate limit was reached (`x-envoy-ratelimited`).
    pub rate_limited: bool,
    /// Whether further tries go to another locality, where there is one.
    pub remote_localities: bool,
    /// Whether further tries may go to an endpoint that was tried, as if it had not been.
    pub same_hosts: bool,
}

/// Who gets a copy of requests. What becomes of it touches nobody.
#[derive(Clone)]
pub struct Mirror {
    /// Whereto.
    pub endpoints: Arc<dyn Endpoints>,
    /// What is copied, where that is not the request as it is sent on.
    pub request: Option<Box<RequestHead>>,
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror").finish_non_exhaustive()
    }
}

/// Where requests of a destination go.
pub trait Endpoints: Send + Sync + 'static {
    /// The endpoint for a try, not one of `tried` if there is another.
    ///
    /// # Errors
    /// There is none, or there are as many requests under way as may be.
    fn pick(&self, call: &Call<'_>) -> Result<Picked, NoEndpoint>;

    /// Whether one more try may be made now: asked before each but the first. What is returned is kept until that try
    /// has ended.
    fn may_retry(&self) -> Option<Retrying> {
        Some(Retrying::default())
    }
}

/// A try that an endpoint is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The request.
    pub request: &'a RequestHead,
    /// The connection that it came by.
    pub connection: &'a Connection,
    /// The endpoints of the tries before.
    pub tried: &'a [Arc<Target>],
    /// Whether it should go to another locality than those, see [`Retries::remote_localities`].
    pub elsewhere: bool,
}

/// Why there is no endpoint for a try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoEndpoint {
    /// For the log; the status is 503.
    pub flag: Flag,
    /// The same in words.
    pub detail: &'static str,
}

impl NoEndpoint {
    /// There is no endpoint that could take it.
    pub const NONE: Self = Self { flag: Flag::NoHealthyUpstream, detail: "no_healthy_upstream" };
    /// As many requests are under way as may be.
    pub const OVERFLOW: Self = Self { flag: Flag::UpstreamOverflow, detail: "overflow" };
}

/// Leave for one more try; given back when this is dropped.
#[derive(Debug, Default)]
pub struct Retrying(pub Option<crate::upstream::circuit::Retry>);

/// How a try went, as far as that says something of its endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The endpoint has answered with this status; that of gRPC counts as the status of HTTP that goes with it.
    Status(u16),
    /// No connection could be made, or it ended before the response.
    Failed,
    /// It took too long to connect, or to answer.
    TimedOut,
}

/// Who wants to know of tries, for outlier detection and for those that count what is under way.
pub trait Watch: Send + Sync + 'static {
    /// It is known how a try went. Not called where that says nothing of the endpoint.
    fn reported(&self, outcome: Outcome);

    /// A try has ended, with its response's body if that was passed on. Called once for each.
    fn ended(&self);
}

/// A try's endpoint, which has one more under way for as long as this lives.
pub struct Picked {
    /// The endpoint.
    pub target: Arc<Target>,
    /// A `Set-Cookie` that the response gets, so that the client comes back to this endpoint.
    pub cookie: Option<Box<str>>,
    watch: Option<Arc<dyn Watch>>,
}

impl Picked {
    /// One that nobody watches.
    #[must_use]
    pub fn new(target: Arc<Target>) -> Self {
        Self { target, cookie: None, watch: None }
    }

    /// One that `watch` is told of.
    #[must_use]
    pub fn watched(target: Arc<Target>, watch: Arc<dyn Watch>) -> Self {
        Self { target, cookie: None, watch: Some(watch) }
    }

    /// Says how the try went.
    pub fn report(&self, outcome: Outcome) {
        if let Some(watch) = &self.watch {
            watch.reported(outcome);
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.ended();
        }
    }
}

impl fmt::Debug for Picked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Picked").field("target", &self.target).finish_non_exhaustive()
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
    /// What holds for connections to its destination; `None` is what holds for all.
    pub circuit: Option<Arc<Circuit>>,
    /// What it is, for logs and metrics.
    pub about: Option<Arc<About>>,
}

/// What an endpoint is, for logs and metrics.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// The service that it is an endpoint of, unless the client dialled it itself.
    pub service: Option<model::ServiceKey>,
    /// The service's port, or the one that was dialled.
    pub port: u16,
    /// The subset of the service.
    pub subset: Option<model::Str>,
    /// What runs there; `None` for an address that the mesh knows nothing of.
    pub workload: Option<Arc<model::Workload>>,
    /// Whether it is reached by a tunnel, so that both ends have proved who they are.
    pub tunnelled: bool,
}

impl Target {
    /// One of which nothing more is known.
    #[must_use]
    pub fn new(address: SocketAddr, protocol: Protocol, carrier: Carrier) -> Self {
        Self { address, protocol, carrier, circuit: None, about: None }
    }

    fn circuit_identity(&self) -> usize {
        self.circuit.as_ref().map_or(0, |circuit| Arc::as_ptr(circuit).addr())
    }
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
            && self.circuit_identity() == other.circuit_identity()
    }
}

impl Eq for Target {}

impl Hash for Target {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
        self.protocol.hash(state);
        self.carrier.identity().hash(state);
        self.circuit_identity().hash(state);
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
    /// Messages of gRPC in the request.
    pub request_messages: u64,
    /// Messages of gRPC in the response.
    pub response_messages: u64,
    /// Why the last try got no connection to its endpoint, for instance what was wrong with the server's certificate.
    pub unconnected: Option<Box<str>>,
}

impl Record {
    /// Of a request or connection that began at `started`, and of which nothing has happened yet.
    #[must_use]
    pub fn begun(started: tokio::time::Instant) -> Self {
        Self {
            started,
            status: 0,
            flag: Flag::None,
            detail: "",
            retries_exhausted: false,
            tries: 0,
            target: None,
            received: 0,
            sent: 0,
            grpc_status: None,
            request_messages: 0,
            response_messages: 0,
            unconnected: None,
        }
    }
}
