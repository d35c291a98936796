//! Providers that take what is told of requests: metrics, log lines, spans.

use http::{HeaderName, HeaderValue};
use model::Str;
use model::telemetry::{Exporter, LogEntries, LogFormat, LogText, SpanProtocol};

use super::super::telemetry::log_text;
use super::super::telling::{EXPORT_TIMEOUT, istio_format};
use super::{ProviderKind, check, choice, duration};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields};

/// The kinds, by their fields' names.
pub(super) const KINDS: [&str; 7] = [
    "prometheus",
    "envoyFileAccessLog",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "opentelemetry",
    "zipkin",
];

/// Reads a provider of the kind `name`; its service was read.
pub(super) fn read(name: &str, fields: &mut Fields<'_, '_>) -> ProviderKind {
    match name {
        "envoyFileAccessLog" => file_log(fields),
        "envoyHttpAls" => log_service(fields, false),
        "envoyTcpAls" => log_service(fields, true),
        "envoyOtelAls" => otlp_log(fields),
        "opentelemetry" => opentelemetry(fields),
        "zipkin" => zipkin(fields),
        _ => ProviderKind::Prometheus,
    }
}

/// Where log lines go: the program's own output, or a file.
pub(in super::super) fn log_path(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let good = cursor.node().as_str().is_none_or(|path| path.starts_with('/') && !path.contains('\0'));
    if !good {
        cursor.invalid("is no path", "such as /dev/stdout");
    }
    cursor.string().filter(|_| good).map(Str::from)
}

/// A format: a text, or, of JSON, an object of texts written as one.
pub(in super::super) fn log_format(mut cursor: Cursor<'_, '_>, json: bool) -> Option<LogFormat> {
    if !json {
        return log_text(cursor).map(LogFormat::TextOf);
    }
    let text = cursor.node().as_str()?;
    let read: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_str(text).ok();
    let fields = read.and_then(|map| {
        let field = |(name, value): (String, serde_json::Value)| {
            Some((Str::from(name.as_str()), LogText::new(value.as_str()?).ok()?))
        };
        map.into_iter().map(field).collect::<Option<Box<[_]>>>()
    });
    if fields.is_none() {
        cursor.invalid("is no JSON object of formats", "such as {\"code\": \"%RESPONSE_CODE%\"}");
    }
    cursor.string();
    fields.map(LogFormat::JsonOf)
}

fn file_log(fields: &mut Fields<'_, '_>) -> ProviderKind {
    let path = fields.take("path").filter(|cursor| cursor.node().as_str() != Some(""));
    let path = path.and_then(log_path).unwrap_or_else(|| "/dev/stdout".into());
    if fields.boolean("omitEmptyValues") == Some(true) {
        fields.report(
            Code::FieldNotApplicable,
            "omitEmptyValues has no effect: what there is not reads -",
            "",
        );
    }
    let mut format = istio_format(false);
    if let Some(mut of) = fields.object("logFormat") {
        if let Some(text) = of.take("text").and_then(log_text) {
            format = LogFormat::TextOf(text);
        }
        if let Some(texts) = of.take("labels").map(labels) {
            format = if texts.is_empty() { istio_format(true) } else { LogFormat::JsonOf(texts) };
        }
    }
    ProviderKind::FileLog { path, format }
}

/// Formats by name.
fn labels(cursor: Cursor<'_, '_>) -> Box<[(Str, LogText)]> {
    let mut texts: Vec<(Str, LogText)> = Vec::new();
    cursor.entries(|name, value| texts.extend(log_text(value).map(|text| (name.into(), text))));
    texts.into()
}

/// What Istio calls logs to which no name is given.
const OTLP_LOG: &str = "otel_envoy_accesslog";
const HTTP_LOG: &str = "http_envoy_accesslog";
const TCP_LOG: &str = "tcp_envoy_accesslog";

fn log_service(fields: &mut Fields<'_, '_>, connections: bool) -> ProviderKind {
    let name = fields.string("logName").filter(|name| !name.is_empty());
    for field in ["filterStateObjectsToLog", "additionalResponseTrailersToLog"] {
        let here = !connections || field == "filterStateObjectsToLog";
        if here && !fields.string_list(field).is_empty() {
            let message = format!("{field} has no effect: entries have no such part here");
            fields.report(Code::FieldNotApplicable, message, "");
        }
    }
    let mut names = |field| -> Box<[Str]> {
        let list = if connections { Vec::new() } else { fields.string_list(field) };
        let mut names: Vec<Str> = list.iter().map(|name| name.to_ascii_lowercase().as_str().into()).collect();
        let count = names.len();
        names.retain(|name| HeaderName::from_bytes(name.as_bytes()).is_ok());
        if names.len() < count {
            fields.report(Code::InvalidValue, format!("{field} has what is no name of a header field"), "");
        }
        names.into()
    };
    let request_headers = names("additionalRequestHeadersToLog");
    let response_headers = names("additionalResponseHeadersToLog");
    let entries = if connections {
        LogEntries::Connections
    } else {
        LogEntries::Requests { request_headers, response_headers }
    };
    let name = name.unwrap_or(if connections { TCP_LOG } else { HTTP_LOG }).into();
    ProviderKind::LogService { name, entries }
}

/// As Istio: the text is a record's body, the labels are its attributes.
fn otlp_log(fields: &mut Fields<'_, '_>) -> ProviderKind {
    let name = fields.string("logName").filter(|name| !name.is_empty()).unwrap_or(OTLP_LOG).into();
    let mut of = fields.object("logFormat");
    let text = of.as_mut().and_then(|of| of.take("text")).filter(|text| text.node().as_str() != Some(""));
    let text = text.and_then(log_text);
    let attributes = of.as_mut().and_then(|of| of.take("labels")).map(labels).unwrap_or_default();
    match text.map_or_else(|| istio_format(false), LogFormat::TextOf) {
        LogFormat::TextOf(body) => {
            ProviderKind::LogService { name, entries: LogEntries::Otlp { body, attributes } }
        }
        _ => ProviderKind::Other("envoyOtelAls"),
    }
}

/// Fields of a head that a collector wants.
fn headers(fields: &mut Fields<'_, '_>, name: &'static str) -> Box<[(Str, Str)]> {
    let mut all: Vec<(Str, Str)> = Vec::new();
    fields.each(name, |item| {
        let Some(mut header) = item.fields().map(Fields::without_nulls) else { return };
        let name = header.required("name").and_then(|mut cursor| {
            let text = cursor.node().as_str();
            if text.is_some_and(|name| HeaderName::from_bytes(name.as_bytes()).is_err()) {
                cursor.invalid("is no name of a header field", "");
                return None;
            }
            cursor.string()
        });
        if header.string("envName").is_some() {
            let message = "envName has no effect: the waypoint's environment is not the control plane's";
            header.report(Code::FieldNotApplicable, message, "write the value");
        }
        let value = header.take("value").and_then(|mut cursor| {
            let text = cursor.node().as_str();
            if text.is_some_and(|value| HeaderValue::from_str(value).is_err()) {
                cursor.invalid("has characters that no header field may have", "");
                return None;
            }
            cursor.string()
        });
        if let (Some(name), Some(value)) = (name, value) {
            all.push((name.to_ascii_lowercase().as_str().into(), value.into()));
        }
    });
    all.into()
}

fn path(fields: &mut Fields<'_, '_>, default: &str) -> Str {
    let path =
        fields.take("path").filter(|cursor| cursor.node().as_str() != Some("")).and_then(|mut cursor| {
            if cursor.node().as_str().is_some_and(|path| path.parse::<http::uri::PathAndQuery>().is_err()) {
                cursor.invalid("is no path", "such as /v1/traces");
                return None;
            }
            cursor.string()
        });
    path.unwrap_or(default).into()
}

fn opentelemetry(fields: &mut Fields<'_, '_>) -> ProviderKind {
    let max_tag_length = fields.integer("maxTagLength", 0..=u32::MAX);
    let mut exporter =
        Exporter { protocol: SpanProtocol::OtlpGrpc, timeout: EXPORT_TIMEOUT, headers: Box::default() };
    if let Some(mut grpc) = fields.object("grpc") {
        exporter.timeout = grpc.take("timeout").and_then(duration).unwrap_or(exporter.timeout);
        exporter.headers = headers(&mut grpc, "initialMetadata");
    }
    if let Some(mut http) = fields.object("http") {
        exporter.timeout = http.take("timeout").and_then(duration).unwrap_or(exporter.timeout);
        exporter.headers = headers(&mut http, "headers");
        exporter.protocol = SpanProtocol::OtlpHttp { path: path(&mut http, "/v1/traces") };
    }
    for name in ["resourceDetectors", "serviceAttributeEnrichment", "dynatraceSampler"] {
        let schema = super::OPENTELEMETRY.fields.iter().find(|field| field.name == name);
        if let Some(field) = schema {
            check(fields, field.name, field.nested);
        }
    }
    ProviderKind::Spans { exporter: Box::new(exporter), max_tag_length }
}

fn zipkin(fields: &mut Fields<'_, '_>) -> ProviderKind {
    let max_tag_length = fields.integer("maxTagLength", 0..=u32::MAX);
    if fields.boolean("enable64bitTraceId").is_some() {
        let message = "enable64bitTraceId has no effect: traces that begin here have IDs of 128 bits";
        fields.report(Code::FieldNotApplicable, message, "");
    }
    choice(fields.take("traceContextOption"), &["USE_B3", "USE_B3_WITH_W3C_PROPAGATION"]);
    let exporter = Exporter {
        protocol: SpanProtocol::Zipkin { path: path(fields, "/api/v2/spans") },
        timeout: fields.take("timeout").and_then(duration).unwrap_or(EXPORT_TIMEOUT),
        headers: headers(fields, "headers"),
    };
    ProviderKind::Spans { exporter: Box::new(exporter), max_tag_length }
}
