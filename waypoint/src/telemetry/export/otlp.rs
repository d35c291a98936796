//! Spans as OTLP has them (opentelemetry-proto 1.x, `ExportTraceServiceRequest`): the few messages and fields that we
//! write, with their numbers.

use prost::Message;

use super::{Attribute, Finished, Origin, nanos};

/// The method of gRPC that takes them.
pub(super) const METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
pub(in crate::telemetry) struct Resource {
    #[prost(message, repeated, tag = "1")]
    pub attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
pub(in crate::telemetry) struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    /// 2 is a server's.
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    /// The lowest byte are the flags of the trace's context.
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    /// 2 is an error.
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(in crate::telemetry) struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(in crate::telemetry) struct AnyValue {
    #[prost(oneof = "any_value::Value", tags = "1, 3")]
    value: Option<any_value::Value>,
}

mod any_value {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(in crate::telemetry) enum Value {
        #[prost(string, tag = "1")]
        Text(String),
        #[prost(int64, tag = "3")]
        Int(i64),
    }
}

const SERVER: i32 = 2;
const ERROR: i32 = 2;
const SAMPLED: u32 = 1;

fn key_value(key: &str, value: &Attribute) -> KeyValue {
    let value = match value {
        Attribute::Text(text) => return text_value(key, text.clone()),
        Attribute::Int(number) => any_value::Value::Int(*number),
    };
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

/// A text by its name.
pub(in crate::telemetry) fn text_value(key: &str, text: String) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue::text(text)) }
}

impl AnyValue {
    /// A text.
    pub(in crate::telemetry) fn text(text: String) -> Self {
        Self { value: Some(any_value::Value::Text(text)) }
    }
}

/// Who tells. As Istio names them: `NAME.NAMESPACE`.
pub(in crate::telemetry) fn resource(origin: &Origin) -> Resource {
    Resource {
        attributes: vec![
            text_value("service.name", format!("{}.{}", origin.name, origin.namespace)),
            text_value("service.namespace", origin.namespace.clone()),
        ],
    }
}

/// What tells.
pub(in crate::telemetry) fn scope() -> Scope {
    Scope { name: "culvert".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
}

fn span(finished: &Finished) -> Span {
    let began = nanos(finished.span.started);
    Span {
        trace_id: finished.span.trace.to_be_bytes().to_vec(),
        span_id: finished.span.id.to_be_bytes().to_vec(),
        parent_span_id: finished.span.parent.map(|id| id.to_be_bytes().to_vec()).unwrap_or_default(),
        name: finished.name.clone(),
        kind: SERVER,
        start_time_unix_nano: began,
        end_time_unix_nano: nanos(finished.span.started + finished.duration),
        attributes: finished.attributes.iter().map(|(key, value)| key_value(key, value)).collect(),
        status: finished.failed.then_some(Status { code: ERROR }),
        flags: SAMPLED,
    }
}

/// A batch as one request.
pub(super) fn encode(batch: &[Finished], origin: &Origin) -> Vec<u8> {
    let scope_spans = vec![ScopeSpans { scope: Some(scope()), spans: batch.iter().map(span).collect() }];
    Request { resource_spans: vec![ResourceSpans { resource: Some(resource(origin)), scope_spans }] }
        .encode_to_vec()
}
