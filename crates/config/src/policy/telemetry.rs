//! Telemetry (`telemetry.istio.io`): what waypoints tell of requests. What it comes to for a service is made in
//! [`super::telling`].

use model::Str;
use model::http::Percent;
use model::telemetry::{Expression, LogText, MetricName, SpanTag, Tag, Type};

use super::age::Age;
use super::authorization::PolicyScope;
use super::selector::{SELECTOR, TARGET_REF, non_empty, read_selector, read_targets};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, not_applicable, refused, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};
use crate::tree::{Node, Value};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Telemetry,
    group: "telemetry.istio.io",
    versions: &["v1", "v1alpha1"],
    name: "Telemetry",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "Telemetry",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "Telemetry.spec",
    fields: &[
        nested("selector", &SELECTOR),
        nested("targetRef", &TARGET_REF),
        nested("targetRefs", &TARGET_REF),
        nested("metrics", &METRICS),
        nested("accessLogging", &LOGGING),
        nested("tracing", &TRACING),
    ],
};

static METRICS: Schema = Schema {
    name: "Telemetry.spec.metrics[]",
    fields: &[
        nested("providers", &PROVIDER),
        nested("overrides", &OVERRIDE),
        not_applicable("reportingInterval", "counters move at once"),
    ],
};
static OVERRIDE: Schema = Schema {
    name: "Telemetry.spec.metrics[].overrides[]",
    fields: &[nested("match", &METRIC_MATCH), enforced("disabled"), nested("tagOverrides", &TAG_OVERRIDE)],
};
static METRIC_MATCH: Schema = Schema {
    name: "Telemetry.spec.metrics[].overrides[].match",
    fields: &[
        enforced("metric"),
        enforced("mode"),
        refused("customMetric", "there are no other metrics than the standard ones", "name a metric"),
    ],
};
static TAG_OVERRIDE: Schema = Schema {
    name: "Telemetry.spec.metrics[].overrides[].tagOverrides{}",
    fields: &[enforced("operation"), enforced("value")],
};
static LOGGING: Schema = Schema {
    name: "Telemetry.spec.accessLogging[]",
    fields: &[
        nested("providers", &PROVIDER),
        enforced("disabled"),
        nested("filter", &FILTER),
        nested("match", &MODE_MATCH),
    ],
};
static FILTER: Schema =
    Schema { name: "Telemetry.spec.accessLogging[].filter", fields: &[enforced("expression")] };
static MODE_MATCH: Schema = Schema { name: "Telemetry.match", fields: &[enforced("mode")] };
static PROVIDER: Schema = Schema { name: "Telemetry.providers[]", fields: &[enforced("name")] };
static TRACING: Schema = Schema {
    name: "Telemetry.spec.tracing[]",
    fields: &[
        nested("providers", &PROVIDER),
        nested("match", &MODE_MATCH),
        enforced("randomSamplingPercentage"),
        enforced("disableSpanReporting"),
        nested("customTags", &CUSTOM_TAG),
        enforced("disableContextPropagation"),
        not_applicable("enableIstioTags", "spans tell of both ends in any case"),
        not_applicable(
            "useRequestIdForTraceSampling",
            "the trace's own context decides, not the request's ID",
        ),
    ],
};
static CUSTOM_TAG: Schema = Schema {
    name: "Telemetry.spec.tracing[].customTags{}",
    fields: &[
        nested("literal", &LITERAL),
        nested("environment", &ENVIRONMENT),
        nested("header", &HEADER),
        nested("formatter", &LITERAL),
    ],
};
static LITERAL: Schema = Schema { name: "Telemetry.customTags.literal", fields: &[enforced("value")] };
static ENVIRONMENT: Schema = Schema {
    name: "Telemetry.customTags.environment",
    fields: &[enforced("name"), enforced("defaultValue")],
};
static HEADER: Schema =
    Schema { name: "Telemetry.customTags.header", fields: &[enforced("name"), enforced("defaultValue")] };

/// A Telemetry.
#[derive(Clone, PartialEq, Debug)]
pub struct Telemetry {
    /// What it is for.
    pub scope: PolicyScope,
    /// Its place among others for the same.
    pub age: Age,
    /// What it says of metrics, in order.
    pub metrics: Vec<MetricsDraft>,
    /// What it says of logs, in order.
    pub logs: Vec<LogDraft>,
    /// What it says of spans, in order.
    pub tracing: Vec<TraceDraft>,
}

/// An entry of `metrics`.
#[derive(Clone, PartialEq, Debug)]
pub struct MetricsDraft {
    /// The providers that it is for; without any, those of the level above.
    pub providers: Vec<Str>,
    /// What differs, in order.
    pub overrides: Vec<OverrideDraft>,
}

/// An entry of `overrides`.
#[derive(Clone, PartialEq, Debug)]
pub struct OverrideDraft {
    /// The metrics that it is for.
    pub metrics: Vec<MetricName>,
    /// Whether they are kept; `None` leaves that as it is.
    pub disabled: Option<bool>,
    /// Labels.
    pub tags: Vec<Tag>,
}

/// An entry of `accessLogging`.
#[derive(Clone, PartialEq, Debug)]
pub struct LogDraft {
    /// The providers that it is for; without any, those of the level above.
    pub providers: Vec<Str>,
    /// Whether nothing is logged.
    pub disabled: bool,
    /// Which requests are logged.
    pub filter: Option<Expression>,
}

/// An entry of `tracing`. What is `None` is as the level above has it.
#[derive(Clone, PartialEq, Debug)]
pub struct TraceDraft {
    /// The providers, of which the first counts.
    pub providers: Vec<Str>,
    /// Of how many requests spans are made.
    pub sampling: Option<Percent>,
    /// Whether spans are sent.
    pub report: Option<bool>,
    /// Whether contexts are passed on.
    pub propagate: Option<bool>,
    /// Attributes.
    pub tags: Option<Vec<(Str, SpanTag)>>,
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let namespace = fields.context().pool.string(metadata.namespace);
    let age = Age::new(metadata.created, namespace, metadata.name.into());
    let mut spec = fields.required("spec")?.fields()?.without_nulls();
    let selector = read_selector(&mut spec);
    // A selector of nothing selects all, as upstream.
    let _ = spec.take("selector");
    let targets = read_targets(&mut spec);
    let scope = match (selector, targets.is_empty()) {
        (Some(_), false) => {
            spec.report(
                Code::InvalidValue,
                "spec.selector and spec.targetRefs are both set; only one may be",
                "split the resource",
            );
            PolicyScope::Namespace
        }
        (None, false) => PolicyScope::Targets(targets.into()),
        (Some(selector), true) => {
            spec.report(
                Code::WithoutEffect,
                "a Telemetry with a selector is for sidecars: no waypoint is selected by it",
                "use targetRefs",
            );
            PolicyScope::Selector(selector)
        }
        (None, true) => PolicyScope::Namespace,
    };
    let (mut metrics, mut logs, mut tracing) = (Vec::new(), Vec::new(), Vec::new());
    spec.each("metrics", |item| metrics.extend(item.fields().map(|f| read_metrics(f.without_nulls()))));
    spec.each("accessLogging", |item| logs.extend(item.fields().and_then(|f| read_log(f.without_nulls()))));
    spec.each("tracing", |item| tracing.extend(item.fields().and_then(|f| read_trace(f.without_nulls()))));
    Some(Resource::Telemetry(Box::new(Telemetry { scope, age, metrics, logs, tracing })))
}

fn read_providers(fields: &mut Fields<'_, '_>) -> Vec<Str> {
    let mut names = Vec::new();
    fields.each("providers", |item| {
        let name = item.fields().and_then(|mut fields| fields.required("name").and_then(non_empty));
        names.extend(name.map(Str::from));
    });
    names
}

/// Whether what is for this mode is for waypoints: these are on the server's side.
fn for_servers(cursor: Option<Cursor<'_, '_>>) -> bool {
    let modes = [("CLIENT_AND_SERVER", true), ("SERVER", true), ("CLIENT", false)];
    cursor.and_then(|cursor| word(cursor, &modes)).unwrap_or(true)
}

fn word<T: Copy>(mut cursor: Cursor<'_, '_>, words: &[(&'static str, T)]) -> Option<T> {
    let text = cursor.node().as_str();
    let found = words.iter().find(|(word, _)| Some(*word) == text).map(|(_, means)| *means);
    if found.is_none() && text.is_some() {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        cursor.invalid("is none of the values", format!("write one of {}", known.join(", ")));
    }
    cursor.string()?;
    found
}

fn read_metrics(mut fields: Fields<'_, '_>) -> MetricsDraft {
    let providers = read_providers(&mut fields);
    let mut overrides = Vec::new();
    fields.each("overrides", |item| {
        let Some(mut fields) = item.fields().map(Fields::without_nulls) else { return };
        let mut metrics: Vec<MetricName> = MetricName::ALL.iter().map(|(metric, _)| *metric).collect();
        let mut applies = true;
        if let Some(mut when) = fields.object("match") {
            applies = for_servers(when.take("mode"));
            if let Some(cursor) = when.take("metric")
                && cursor.node().as_str() != Some("ALL_METRICS")
            {
                let names = MetricName::ALL.map(|(metric, name)| (name, metric));
                metrics = word(cursor, &names).into_iter().collect();
            }
        }
        let disabled = fields.boolean("disabled");
        let mut tags = Vec::new();
        if let Some(cursor) = fields.take("tagOverrides") {
            cursor.entries(|name, value| tags.extend(read_tag(name, value)));
        }
        if applies {
            overrides.push(OverrideDraft { metrics, disabled, tags });
        }
    });
    MetricsDraft { providers, overrides }
}

fn read_tag(name: &str, mut cursor: Cursor<'_, '_>) -> Option<Tag> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        cursor.invalid(format_args!("{name:?} is no name of a label"), "letters, digits and underscores");
        return None;
    }
    let mut fields = cursor.fields()?.without_nulls();
    let removed = fields.take("operation").and_then(|c| word(c, &[("UPSERT", false), ("REMOVE", true)]));
    let removed = removed.unwrap_or(false);
    let value = fields.take("value").filter(|cursor| cursor.node().as_str() != Some(""));
    match (removed, value) {
        (true, None) => Some(Tag { name: name.into(), value: None }),
        (true, Some(mut value)) => {
            value.invalid("a label that is removed has no value", "");
            None
        }
        (false, Some(value)) => {
            let value = expression(value, None)?;
            Some(Tag { name: name.into(), value: Some(value) })
        }
        (false, None) => {
            fields.report(Code::MissingField, "a label that is set needs a value", "an expression in CEL");
            None
        }
    }
}

/// An expression; of `kind` if that is said.
fn expression(mut cursor: Cursor<'_, '_>, kind: Option<Type>) -> Option<Expression> {
    let Some(text) = cursor.node().as_str() else {
        cursor.string();
        return None;
    };
    match Expression::new(text) {
        Ok(read) if kind.is_none_or(|kind| kind == read.kind()) => Some(read),
        Ok(_) => {
            cursor.invalid("is no condition: it says neither true nor false", "");
            None
        }
        Err(error) => {
            cursor.invalid(format_args!("can't be evaluated: {error}"), "");
            None
        }
    }
}

fn read_log(mut fields: Fields<'_, '_>) -> Option<LogDraft> {
    let providers = read_providers(&mut fields);
    let disabled = fields.boolean("disabled").unwrap_or(false);
    let filter = fields.object("filter").and_then(|mut filter| {
        let cursor = filter.take("expression").filter(|cursor| cursor.node().as_str() != Some(""))?;
        expression(cursor, Some(Type::Bool))
    });
    let applies = fields.object("match").is_none_or(|mut when| for_servers(when.take("mode")));
    applies.then_some(LogDraft { providers, disabled, filter })
}

fn read_trace(mut fields: Fields<'_, '_>) -> Option<TraceDraft> {
    let providers = read_providers(&mut fields);
    if providers.len() > 1 {
        fields.report(Code::WithoutEffect, "of several providers of traces the first counts", "name one");
    }
    let applies = fields.object("match").is_none_or(|mut when| for_servers(when.take("mode")));
    let sampling = fields.take("randomSamplingPercentage").and_then(percentage);
    let report = fields.boolean("disableSpanReporting").map(|disabled| !disabled);
    let propagate = fields.boolean("disableContextPropagation").map(|disabled| !disabled);
    let tags = fields.take("customTags").map(|cursor| {
        let mut tags = Vec::new();
        cursor.entries(|name, value| tags.extend(read_span_tag(value).map(|tag| (name.into(), tag))));
        tags
    });
    applies.then_some(TraceDraft { providers, sampling, report, propagate, tags })
}

/// A number, also one in quotes, as JSON has those of protobuf. What is none is not a number.
pub(super) fn number(node: &Node<'_>) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "what is out of range is refused")]
    match &node.value {
        Value::Int(number) => *number as f64,
        Value::Float(number) => *number,
        Value::String(text) => text.parse().unwrap_or(f64::NAN),
        _ => f64::NAN,
    }
}

/// A share of requests, from 0 to 100.
pub(super) fn percentage(mut cursor: Cursor<'_, '_>) -> Option<Percent> {
    let value = number(cursor.node());
    if !(0.0..=100.0).contains(&value) {
        cursor.invalid("is no percentage from 0 to 100", "");
        return None;
    }
    // From 0 to a million.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range")]
    Some(Percent::of((value * 10_000.0).round() as u32, 1_000_000))
}

fn read_span_tag(cursor: Cursor<'_, '_>) -> Option<SpanTag> {
    let mut fields = cursor.fields()?.without_nulls();
    let mut tags = Vec::new();
    if let Some(mut literal) = fields.object("literal") {
        tags.extend(literal.required("value").and_then(non_empty).map(|v| SpanTag::Literal(v.into())));
    }
    if let Some(mut of) = fields.object("environment") {
        let name = of.required("name").and_then(non_empty).map(Str::from);
        let default = of.string("defaultValue").unwrap_or_default().into();
        tags.extend(name.map(|name| SpanTag::Environment { name, default }));
    }
    if let Some(mut of) = fields.object("header") {
        let name =
            of.required("name").and_then(non_empty).map(|n| Str::from(n.to_ascii_lowercase().as_str()));
        let default = of.string("defaultValue").unwrap_or_default().into();
        tags.extend(name.map(|name| SpanTag::Header { name, default }));
    }
    if let Some(mut of) = fields.object("formatter") {
        tags.extend(of.required("value").and_then(log_text).map(SpanTag::Format));
    }
    if tags.len() > 1 {
        fields.report(Code::InvalidValue, "a tag has one source, and this one several", "split it");
        return None;
    }
    tags.pop()
}

/// A text with Envoy's commands.
pub(super) fn log_text(mut cursor: Cursor<'_, '_>) -> Option<LogText> {
    let Some(text) = cursor.node().as_str() else {
        cursor.string();
        return None;
    };
    match LogText::new(text) {
        Ok(read) => Some(read),
        Err(error) => {
            cursor.invalid(format_args!("is no format: {error}"), "");
            None
        }
    }
}
