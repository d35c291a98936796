//! What a waypoint tells of the requests it sees: which metrics with which labels, which log lines, which spans (the
//! resource Telemetry, and the mesh's settings behind it).
//!
//! All of it is data, resolved for one service of one waypoint: whoever tells looks nothing up by name.

mod expression;
mod facts;
mod parse;

use std::time::Duration;

pub use expression::Expression;
pub use facts::{Attribute, Facts, Headers, Missing, Type, Value};
pub use parse::InvalidExpression;

use crate::Str;
use crate::http::{Format, InvalidFormat, Percent};

/// What is told of the requests to one service.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Telemetry {
    /// Metrics.
    pub metrics: Metrics,
    /// Log lines: each request is written to each of them whose filter it passes. `None` where nobody has said
    /// anything of logs, so that the program's own setting holds.
    pub logs: Option<Box<[AccessLog]>>,
    /// Spans; `None` where nobody takes any. Contexts of traces are passed on all the same.
    pub tracing: Option<Box<Tracing>>,
}

/// How metrics differ from the standard ones.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Metrics {
    /// None are kept.
    pub disabled: bool,
    /// Those that differ; a metric is in it once at most.
    pub rules: Box<[MetricRule]>,
}

/// How one metric differs.
#[derive(Clone, PartialEq, Debug)]
pub struct MetricRule {
    /// Which one.
    pub metric: MetricName,
    /// It is not kept.
    pub disabled: bool,
    /// Labels that are added, replaced or left out; a label is in it once at most.
    pub tags: Box<[Tag]>,
}

/// A label that is not the standard one.
#[derive(Clone, PartialEq, Debug)]
pub struct Tag {
    /// Its name.
    pub name: Str,
    /// What its value is; `None` leaves the label out.
    pub value: Option<Expression>,
}

/// The metrics, as Telemetry names them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum MetricName {
    /// `REQUEST_COUNT`: `istio_requests_total`
    RequestCount,
    /// `REQUEST_DURATION`: `istio_request_duration_milliseconds`
    RequestDuration,
    /// `REQUEST_SIZE`: `istio_request_bytes`
    RequestSize,
    /// `RESPONSE_SIZE`: `istio_response_bytes`
    ResponseSize,
    /// `GRPC_REQUEST_MESSAGES`: `istio_request_messages_total`
    GrpcRequestMessages,
    /// `GRPC_RESPONSE_MESSAGES`: `istio_response_messages_total`
    GrpcResponseMessages,
    /// `TCP_OPENED_CONNECTIONS`: `istio_tcp_connections_opened_total`
    TcpOpened,
    /// `TCP_CLOSED_CONNECTIONS`: `istio_tcp_connections_closed_total`
    TcpClosed,
    /// `TCP_RECEIVED_BYTES`: `istio_tcp_received_bytes_total`
    TcpReceived,
    /// `TCP_SENT_BYTES`: `istio_tcp_sent_bytes_total`
    TcpSent,
}

impl MetricName {
    /// Each with the name that Telemetry has for it.
    pub const ALL: [(Self, &'static str); 10] = [
        (Self::RequestCount, "REQUEST_COUNT"),
        (Self::RequestDuration, "REQUEST_DURATION"),
        (Self::RequestSize, "REQUEST_SIZE"),
        (Self::ResponseSize, "RESPONSE_SIZE"),
        (Self::GrpcRequestMessages, "GRPC_REQUEST_MESSAGES"),
        (Self::GrpcResponseMessages, "GRPC_RESPONSE_MESSAGES"),
        (Self::TcpOpened, "TCP_OPENED_CONNECTIONS"),
        (Self::TcpClosed, "TCP_CLOSED_CONNECTIONS"),
        (Self::TcpReceived, "TCP_RECEIVED_BYTES"),
        (Self::TcpSent, "TCP_SENT_BYTES"),
    ];
}

/// One log of requests.
#[derive(Clone, PartialEq, Debug)]
pub struct AccessLog {
    /// Where lines go.
    pub sink: LogSink,
    /// Which requests are logged; a request for which it can't be told is not. Without one, all are.
    pub filter: Option<Expression>,
}

/// Where log lines go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogSink {
    /// To a file, or to the program's own output.
    File {
        /// `/dev/stdout`, or the file's path.
        path: Str,
        /// What a line looks like.
        format: LogFormat,
    },
    /// To a service that takes entries over gRPC.
    Service(Box<LogService>),
}

/// A service that takes log entries.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct LogService {
    /// Where it is.
    pub collector: Collector,
    /// What the log is called.
    pub name: Str,
    /// What it takes.
    pub entries: LogEntries,
}

/// Of what a service takes entries, and in which form.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum LogEntries {
    /// Of requests, as Envoy has them (ALS, version 3).
    Requests {
        /// Fields of requests that entries show beside those that they have anyway; in lower case.
        request_headers: Box<[Str]>,
        /// Fields of responses that entries show; in lower case.
        response_headers: Box<[Str]>,
    },
    /// Of connections of bytes, as Envoy has them.
    Connections,
    /// Of both, as OTLP has them.
    Otlp {
        /// A record's text.
        body: LogText,
        /// Its attributes.
        attributes: Box<[(Str, LogText)]>,
    },
}

/// How spans are made, and who takes them.
#[derive(Clone, PartialEq, Debug)]
pub struct Tracing {
    /// Who takes them.
    pub collector: Collector,
    /// How they are sent.
    pub exporter: Exporter,
    /// Of how many requests for which nobody has decided yet.
    pub sampling: Percent,
    /// Spans are sent. Without it, contexts are passed on and decided over as ever.
    pub report: bool,
    /// The context of the trace is passed on to the service.
    pub propagate: bool,
    /// Attributes beside the standard ones.
    pub tags: Box<[(Str, SpanTag)]>,
    /// The longest path that an attribute shows, in bytes.
    pub max_tag_length: u32,
}

/// What a span's attribute shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SpanTag {
    /// This text.
    Literal(Str),
    /// A variable of the program's environment.
    Environment {
        /// Its name.
        name: Str,
        /// In its place where there is none.
        default: Str,
    },
    /// A field of the request.
    Header {
        /// Its name, in lower case.
        name: Str,
        /// In its place where there is none.
        default: Str,
    },
    /// What a format of log lines makes.
    Format(LogText),
}

/// A service that takes what is told.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Collector {
    /// The name of the provider in the mesh's settings.
    pub provider: Str,
    /// The namespace of who defines the host, where that is said.
    pub namespace: Option<Str>,
    /// The host name.
    pub host: Str,
    /// The port of the service.
    pub port: u16,
}

/// How spans are sent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Exporter {
    /// The protocol.
    pub protocol: SpanProtocol,
    /// How long an answer is waited for.
    pub timeout: Duration,
    /// Fields of the head beside those of the protocol; names are in lower case.
    pub headers: Box<[(Str, Str)]>,
}

/// What spans are sent by.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SpanProtocol {
    /// OTLP over gRPC.
    OtlpGrpc,
    /// OTLP over HTTP, in protobuf, to this path.
    OtlpHttp {
        /// The path.
        path: Str,
    },
    /// Zipkin's JSON (version 2), to this path.
    Zipkin {
        /// The path.
        path: Str,
    },
}

/// What a log line looks like.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    /// The program's own text: everything that is known, by name.
    #[default]
    Text,
    /// The same as JSON.
    Json,
    /// This.
    TextOf(LogText),
    /// A JSON object of these.
    JsonOf(Box<[(Str, LogText)]>),
}

/// A text with Envoy's commands in it. Equal ones have the same source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogText {
    source: Str,
    format: Format,
}

impl std::hash::Hash for LogText {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.source.hash(state);
    }
}

impl LogText {
    /// Reads a text.
    ///
    /// # Errors
    /// See [`InvalidFormat`].
    pub fn new(source: &str) -> Result<Self, InvalidFormat> {
        Ok(Self { source: source.into(), format: Format::parse(source)? })
    }

    /// As it was written.
    #[must_use]
    pub fn source(&self) -> &Str {
        &self.source
    }

    /// What it asks for.
    #[must_use]
    pub fn format(&self) -> &Format {
        &self.format
    }
}
