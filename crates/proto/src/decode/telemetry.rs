//! Reading what is told of requests.

use std::sync::Arc;

use model::Str;
use model::telemetry::{
    AccessLog, Collector, Exporter, Expression, LogEntries, LogFormat, LogService, LogSink, LogText,
    MetricName, MetricRule, Metrics, SpanProtocol, SpanTag, Tag, Telemetry, Tracing,
};

use super::http::{needed_duration, share};
use super::strict::needed;
use super::{Decoder, Fault, Problem, cut, each, port};
use crate::wire::waypoint as wire;

impl Decoder {
    /// Services of which the same is told share it, when they come one after the other.
    pub(super) fn telemetry(&mut self, message: &wire::Telemetry) -> Result<Arc<Telemetry>, Fault> {
        if let Some((read, shared)) = &self.telemetry
            && **read == *message
        {
            return Ok(shared.clone());
        }
        let shared = Arc::new(self.read_telemetry(message)?);
        self.telemetry = Some((Box::new(message.clone()), shared.clone()));
        Ok(shared)
    }

    fn read_telemetry(&mut self, t: &wire::Telemetry) -> Result<Telemetry, Fault> {
        let logs = t.logs.as_ref().map(|logs| each(&logs.logs, "logs", |log| self.access_log(log)));
        let tracing = t.tracing.as_ref().map(|tracing| self.tracing(tracing).map(Box::new));
        Ok(Telemetry {
            metrics: Metrics {
                disabled: t.metrics_disabled,
                rules: each(&t.metrics, "metrics", |rule| self.metric(rule))?,
            },
            logs: logs.transpose()?,
            tracing: tracing.transpose().map_err(|f| f.within("tracing"))?,
        })
    }

    fn metric(&mut self, rule: &wire::MetricRule) -> Result<MetricRule, Fault> {
        let known = MetricName::ALL.iter().find(|(_, text)| *text == rule.metric);
        let (metric, _) = known.ok_or_else(|| Fault::new("metric", Problem::NotKnown(cut(&rule.metric))))?;
        Ok(MetricRule {
            metric: *metric,
            disabled: rule.disabled,
            tags: each(&rule.tags, "tags", |tag| {
                let value = tag.value.as_deref().map(|source| expression(source, "value"));
                Ok(Tag { name: self.text(&tag.name), value: value.transpose()? })
            })?,
        })
    }

    fn access_log(&mut self, log: &wire::AccessLog) -> Result<AccessLog, Fault> {
        use wire::access_log::Sink;
        let sink = match needed(log.sink.as_ref(), "sink")? {
            Sink::File(file) => {
                let format = needed(file.format.as_ref(), "file.format")?;
                let format = self.log_format(format).map_err(|f| f.within("file.format"))?;
                LogSink::File { path: self.text(&file.path), format }
            }
            Sink::Service(service) => LogSink::Service(Box::new(LogService {
                collector: self.collector(service.collector.as_ref()).map_err(|f| f.within("service"))?,
                name: self.text(&service.name),
                entries: self.log_entries(service).map_err(|f| f.within("service"))?,
            })),
        };
        let filter = log.filter.as_deref().map(|source| expression(source, "filter"));
        Ok(AccessLog { sink, filter: filter.transpose()? })
    }

    fn log_entries(&mut self, service: &wire::access_log::Service) -> Result<LogEntries, Fault> {
        let wire::access_log::Service { connections, request_headers, response_headers, otlp, .. } = service;
        Ok(match otlp {
            Some(otlp) => LogEntries::Otlp {
                body: log_text(&otlp.body)?,
                attributes: self.log_fields(&otlp.attributes, "otlp.attributes")?,
            },
            None if *connections => LogEntries::Connections,
            None => LogEntries::Requests {
                request_headers: each(request_headers, "request_headers", |name| self.header_key(name))?,
                response_headers: each(response_headers, "response_headers", |name| self.header_key(name))?,
            },
        })
    }

    fn log_fields(&mut self, fields: &[wire::Label], name: &str) -> Result<Box<[(Str, LogText)]>, Fault> {
        each(fields, name, |field| Ok((self.text(&field.key), log_text(&field.value)?)))
    }

    fn log_format(&mut self, format: &wire::LogFormat) -> Result<LogFormat, Fault> {
        use wire::log_format::Kind;
        Ok(match needed(format.kind.as_ref(), "kind")? {
            Kind::Text(()) => LogFormat::Text,
            Kind::Json(()) => LogFormat::Json,
            Kind::TextOf(source) => LogFormat::TextOf(log_text(source)?),
            Kind::JsonOf(fields) => LogFormat::JsonOf(self.log_fields(&fields.fields, "fields")?),
        })
    }

    fn tracing(&mut self, t: &wire::Tracing) -> Result<Tracing, Fault> {
        use wire::tracing::exporter::Protocol;
        let exporter = needed(t.exporter.as_ref(), "exporter")?;
        Ok(Tracing {
            collector: self.collector(t.collector.as_ref())?,
            exporter: Exporter {
                protocol: match needed(exporter.protocol.as_ref(), "exporter.protocol")? {
                    Protocol::OtlpGrpc(()) => SpanProtocol::OtlpGrpc,
                    Protocol::OtlpHttp(path) => SpanProtocol::OtlpHttp { path: self.text(path) },
                    Protocol::Zipkin(path) => SpanProtocol::Zipkin { path: self.text(path) },
                },
                timeout: needed_duration(exporter.timeout.as_ref(), "exporter.timeout")?,
                headers: self.labels(&exporter.headers),
            },
            sampling: share(t.sampling, "sampling")?,
            report: t.report,
            propagate: t.propagate,
            tags: each(&t.tags, "tags", |tag| Ok((self.text(&tag.name), self.span_tag(tag)?)))?,
            max_tag_length: t.max_tag_length,
        })
    }

    fn collector(&mut self, message: Option<&wire::tracing::Collector>) -> Result<Collector, Fault> {
        let collector = needed(message, "collector")?;
        Ok(Collector {
            provider: self.text(&collector.provider),
            namespace: self.optional(collector.namespace.as_ref()),
            host: self.text(&collector.host),
            port: port(collector.port, "collector.port")?,
        })
    }

    fn span_tag(&mut self, tag: &wire::SpanTag) -> Result<SpanTag, Fault> {
        use wire::span_tag::Value;
        Ok(match needed(tag.value.as_ref(), "value")? {
            Value::Literal(text) => SpanTag::Literal(self.text(text)),
            Value::Environment(of) => {
                SpanTag::Environment { name: self.text(&of.name), default: self.text(&of.default) }
            }
            Value::Header(of) => {
                SpanTag::Header { name: self.header_key(&of.name)?, default: self.text(&of.default) }
            }
            Value::Format(source) => SpanTag::Format(log_text(source)?),
        })
    }
}

fn expression(source: &str, field: &str) -> Result<Expression, Fault> {
    Expression::new(source).map_err(|invalid| Fault::new(field, Problem::Text(invalid.to_string())))
}

fn log_text(source: &str) -> Result<LogText, Fault> {
    LogText::new(source).map_err(|invalid| Fault::new("format", Problem::Text(invalid.to_string())))
}
