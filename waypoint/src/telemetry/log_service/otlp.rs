//! Log records as OTLP has them (opentelemetry-proto 1.x, `ExportLogsServiceRequest`): one connection, and a call on it for
//! each batch.

use std::time::SystemTime;

use bytes::Bytes;
use model::Str;
use model::telemetry::{LogService, LogText};
use prost::Message;
use tokio::task::JoinHandle;

use super::Origin;
use super::entry::cut;
use crate::telemetry::ended::Ended;
use crate::telemetry::export::nanos;
use crate::telemetry::export::otlp::{AnyValue, KeyValue, Resource, Scope, resource, scope, text_value};
use crate::telemetry::export::send::{SendError, Target, call};
use crate::telemetry::log::of_format;

/// The method of gRPC that takes them.
const METHOD: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// The records are encoded already: a message within another has the form of bytes.
#[derive(Clone, PartialEq, Message)]
struct ScopeLogs {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    records: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceLogs {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_logs: Vec<ScopeLogs>,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, repeated, tag = "1")]
    resource_logs: Vec<ResourceLogs>,
}

#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(fixed64, tag = "1")]
    time_unix_nano: u64,
    #[prost(message, optional, tag = "5")]
    body: Option<AnyValue>,
    #[prost(message, repeated, tag = "6")]
    attributes: Vec<KeyValue>,
    /// The lowest byte are the flags of the trace's context.
    #[prost(fixed32, tag = "8")]
    flags: u32,
    #[prost(bytes = "vec", tag = "9")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "10")]
    span_id: Vec<u8>,
    #[prost(fixed64, tag = "11")]
    observed_time_unix_nano: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_log_records: i64,
}

/// The record of what has ended.
pub(super) fn record(body: &LogText, attributes: &[(Str, LogText)], ended: &Ended<'_>) -> Vec<u8> {
    let text = |format: &LogText| {
        let mut text = String::new();
        of_format(&mut text, format, ended);
        cut(text.trim_end_matches('\n'))
    };
    let now = SystemTime::now();
    let began = now.checked_sub(ended.duration).unwrap_or(SystemTime::UNIX_EPOCH);
    let span = ended.decided.trace.as_deref();
    Record {
        time_unix_nano: nanos(began),
        body: Some(AnyValue::text(text(body))),
        attributes: attributes.iter().map(|(name, format)| text_value(name, text(format))).collect(),
        flags: span.map_or(0, |span| u32::from(span.sampled)),
        trace_id: span.map(|span| span.trace.to_be_bytes().to_vec()).unwrap_or_default(),
        span_id: span.map(|span| span.id.to_be_bytes().to_vec()).unwrap_or_default(),
        observed_time_unix_nano: nanos(now),
    }
    .encode_to_vec()
}

/// A connection that calls are made on.
pub(super) struct Calls {
    client: h2::client::SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Calls {
    /// Begins to speak over `io`.
    pub async fn open(io: Box<dyn net::Io>) -> Result<Self, SendError> {
        let (client, connection) = h2::client::handshake(io).await?;
        let driver = tokio::spawn(async move {
            // Whoever calls is told by the call.
            let _ = connection.await;
        });
        Ok(Self { client, driver })
    }

    /// Sends a batch. Says how many of it the collector did not want.
    pub async fn send(
        &self,
        service: &LogService,
        origin: &Origin,
        batch: &[Vec<u8>],
    ) -> Result<u64, SendError> {
        let mut from = resource(origin);
        from.attributes.push(text_value("log_name", service.name.to_string()));
        let scope_logs = vec![ScopeLogs { scope: Some(scope()), records: batch.to_vec() }];
        let message = Request { resource_logs: vec![ResourceLogs { resource: Some(from), scope_logs }] };
        let authority = format!("{}:{}", service.collector.host, service.collector.port);
        let target = Target { authority, headers: &[] };
        let answer = call(self.client.clone(), (&target, METHOD), message.encode_to_vec()).await?;
        // What can't be read says nothing of a refusal.
        let refused = Response::decode(&*answer).ok().and_then(|answer| answer.partial_success);
        Ok(refused.and_then(|part| u64::try_from(part.rejected_log_records).ok()).unwrap_or_default())
    }
}
