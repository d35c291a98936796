//! Writing what is told of requests.

use model::Str;
use model::telemetry::{
    AccessLog, Collector, Exporter, LogEntries, LogFormat, LogService, LogSink, LogText, MetricName,
    MetricRule, Metrics, SpanProtocol, SpanTag, Tag, Telemetry, Tracing,
};

use super::http::{duration, labels, text};
use crate::wire::waypoint as wire;

pub(super) fn telemetry(telemetry: &Telemetry) -> wire::Telemetry {
    let Telemetry { metrics: Metrics { disabled, rules }, logs, tracing: spans } = telemetry;
    wire::Telemetry {
        metrics_disabled: *disabled,
        metrics: rules.iter().map(metric).collect(),
        logs: logs.as_ref().map(|logs| wire::telemetry::Logs { logs: logs.iter().map(access_log).collect() }),
        tracing: spans.as_deref().map(tracing),
    }
}

/// The name that Telemetry has for a metric.
pub(crate) fn metric_text(metric: MetricName) -> &'static str {
    MetricName::ALL.iter().find(|(known, _)| *known == metric).map_or("", |(_, text)| text)
}

fn metric(rule: &MetricRule) -> wire::MetricRule {
    let MetricRule { metric, disabled, tags } = rule;
    let tag = |Tag { name, value }: &Tag| wire::metric_rule::Tag {
        name: name.to_string(),
        value: value.as_ref().map(|value| value.source().to_string()),
    };
    wire::MetricRule {
        metric: metric_text(*metric).to_owned(),
        disabled: *disabled,
        tags: tags.iter().map(tag).collect(),
    }
}

fn access_log(log: &AccessLog) -> wire::AccessLog {
    use wire::access_log::{File, Sink};
    let AccessLog { sink, filter } = log;
    wire::AccessLog {
        sink: Some(match sink {
            LogSink::File { path, format } => {
                Sink::File(File { path: path.to_string(), format: Some(log_format(format)) })
            }
            LogSink::Service(service) => Sink::Service(log_service(service)),
        }),
        filter: filter.as_ref().map(|filter| filter.source().to_string()),
    }
}

fn log_service(service: &LogService) -> wire::access_log::Service {
    let texts = |list: &[Str]| list.iter().map(ToString::to_string).collect();
    let LogService { collector: to, name, entries } = service;
    let mut written = wire::access_log::Service {
        collector: Some(collector(to)),
        name: name.to_string(),
        ..Default::default()
    };
    match entries {
        LogEntries::Requests { request_headers, response_headers } => {
            written.request_headers = texts(request_headers);
            written.response_headers = texts(response_headers);
        }
        LogEntries::Connections => written.connections = true,
        LogEntries::Otlp { body, attributes } => {
            let attributes = attributes.iter().map(field).collect();
            written.otlp = Some(wire::access_log::Otlp { body: body.source().to_string(), attributes });
        }
    }
    written
}

fn field((name, text): &(Str, LogText)) -> wire::Label {
    wire::Label { key: name.to_string(), value: text.source().to_string() }
}

fn log_format(format: &LogFormat) -> wire::LogFormat {
    use wire::log_format::{Fields, Kind};
    let kind = match format {
        LogFormat::Text => Kind::Text(()),
        LogFormat::Json => Kind::Json(()),
        LogFormat::TextOf(text) => Kind::TextOf(text.source().to_string()),
        LogFormat::JsonOf(fields) => Kind::JsonOf(Fields { fields: fields.iter().map(field).collect() }),
    };
    wire::LogFormat { kind: Some(kind) }
}

fn collector(collector: &Collector) -> wire::tracing::Collector {
    let Collector { provider, namespace, host, port } = collector;
    wire::tracing::Collector {
        provider: provider.to_string(),
        namespace: text(namespace),
        host: host.to_string(),
        port: (*port).into(),
    }
}

fn tracing(tracing: &Tracing) -> wire::Tracing {
    use wire::tracing::exporter::Protocol;
    let Tracing { collector: to, exporter, sampling, report, propagate, tags, max_tag_length } = tracing;
    let Exporter { protocol, timeout, headers } = exporter;
    wire::Tracing {
        collector: Some(collector(to)),
        exporter: Some(wire::tracing::Exporter {
            protocol: Some(match protocol {
                SpanProtocol::OtlpGrpc => Protocol::OtlpGrpc(()),
                SpanProtocol::OtlpHttp { path } => Protocol::OtlpHttp(path.to_string()),
                SpanProtocol::Zipkin { path } => Protocol::Zipkin(path.to_string()),
            }),
            timeout: Some(duration(*timeout)),
            headers: labels(headers),
        }),
        sampling: sampling.millionths(),
        report: *report,
        propagate: *propagate,
        tags: tags.iter().map(|(name, tag)| span_tag(name, tag)).collect(),
        max_tag_length: *max_tag_length,
    }
}

fn span_tag(name: &Str, tag: &SpanTag) -> wire::SpanTag {
    use wire::span_tag::{Named, Value};
    let named = |name: &Str, default: &Str| Named { name: name.to_string(), default: default.to_string() };
    let value = match tag {
        SpanTag::Literal(text) => Value::Literal(text.to_string()),
        SpanTag::Environment { name, default } => Value::Environment(named(name, default)),
        SpanTag::Header { name, default } => Value::Header(named(name, default)),
        SpanTag::Format(text) => Value::Format(text.source().to_string()),
    };
    wire::SpanTag { name: name.to_string(), value: Some(value) }
}
