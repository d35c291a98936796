//! Random tokens' rules, rate limits, authorizers, and what is told of requests.

use std::sync::Arc;
use std::time::Duration;

use model::http::{
    Authorizer, BodyCheck, Bucket, ClaimHeader, Count, GlobalLimit, HttpCheck, KeySource, Limit,
    LimitHeaders, LimitKey, LimitMatch, ProviderAddress, RateLimit, RequestAuthentication, TokenPlace,
    TokenRule,
};
use model::telemetry::{
    AccessLog, Collector, Exporter, Expression, LogEntries, LogFormat, LogService, LogSink, LogText,
    MetricName, MetricRule, Metrics, SpanProtocol, SpanTag, Tag, Telemetry, Tracing,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::http::{duration, header_key, path_pattern, percent, strs, words};
use super::{few, filled, list, policy_key, text};

fn labels() -> BoxedStrategy<Box<[(model::Str, model::Str)]>> {
    list((text(), text()))
}

pub fn authentication() -> BoxedStrategy<RequestAuthentication> {
    let place = prop_oneof![
        (header_key(), text()).prop_map(|(name, prefix)| TokenPlace::Header { name, prefix }),
        text().prop_map(TokenPlace::Parameter),
        text().prop_map(TokenPlace::Cookie),
    ];
    let keys = prop_oneof![
        text().prop_map(KeySource::Inline),
        text().prop_map(KeySource::Url),
        text().prop_map(KeySource::Discovered),
    ];
    let claim = (header_key(), list(text())).prop_map(|(header, claim)| ClaimHeader { header, claim });
    let delimited = vec(text(), 0..2).prop_map(|list| list.iter().map(|t| Box::from(&**t)).collect());
    let rule = (
        (option::of(text()), list(text()), keys, vec(place, 1..3)),
        (any::<bool>(), option::of(header_key()), list(claim), delimited, duration()),
    )
        .prop_map(|(of, then)| {
            Arc::new(TokenRule {
                issuer: of.0,
                audiences: of.1,
                keys: of.2,
                places: of.3.into(),
                forward: then.0,
                payload_header: then.1,
                claim_headers: then.2,
                space_delimited: then.3,
                timeout: then.4,
            })
        });
    (policy_key(), list(rule)).prop_map(|(key, rules)| RequestAuthentication { key, rules }).boxed()
}

fn address() -> BoxedStrategy<ProviderAddress> {
    (option::of(text()), text(), any::<u16>())
        .prop_map(|(namespace, host, port)| ProviderAddress { namespace, host, port })
        .boxed()
}

pub fn rate_limit() -> BoxedStrategy<RateLimit> {
    let key = prop_oneof![
        Just(LimitKey::Path),
        Just(LimitKey::Method),
        header_key().prop_map(LimitKey::Header),
        list(text()).prop_map(LimitKey::Claim),
        Just(LimitKey::Identity),
        Just(LimitKey::Address),
        (text(), text()).prop_map(|(key, value)| LimitKey::Constant { key, value }),
    ];
    let bucket = (1..u32::MAX, 1..u64::MAX, 1..u32::MAX, any::<u32>()).prop_map(
        |(requests, milliseconds, burst, max_keys)| Bucket {
            requests,
            per: Duration::from_millis(milliseconds),
            burst,
            max_keys,
        },
    );
    let global = (address(), text(), duration(), any::<bool>(), any::<u32>()).prop_map(
        |(address, domain, timeout, fail_open, hits)| {
            Arc::new(GlobalLimit { address, domain, timeout, fail_open, hits })
        },
    );
    let count = prop_oneof![bucket.prop_map(Count::Local), global.prop_map(Count::Global)];
    let on = (list(text()), few(path_pattern()), list((header_key(), words(&["1", "2"]))))
        .prop_map(|(methods, paths, headers)| LimitMatch { methods, paths, headers });
    let limit = (text(), on, list(key), count, any::<bool>())
        .prop_map(|(name, on, by, count, dry_run)| Arc::new(Limit { name, on, by, count, dry_run }));
    let headers = select(vec![LimitHeaders::Standard, LimitHeaders::Legacy, LimitHeaders::None]);
    (policy_key(), list(limit), headers)
        .prop_map(|(key, limits, headers)| RateLimit { key, limits, headers })
        .boxed()
}

pub fn authorizer() -> BoxedStrategy<Authorizer> {
    let names = || few(words(&["x-user", "cookie"]));
    let http = (option::of(text()), names(), labels(), names(), names(), names()).prop_map(
        |(path_prefix, request_headers, additional_headers, up, deny, down)| HttpCheck {
            path_prefix,
            request_headers,
            additional_headers,
            to_upstream_on_allow: up,
            to_downstream_on_deny: deny,
            to_downstream_on_allow: down,
        },
    );
    let body = (any::<u32>(), any::<bool>(), any::<bool>())
        .prop_map(|(max_bytes, allow_partial, as_bytes)| BodyCheck { max_bytes, allow_partial, as_bytes });
    let flags = (any::<bool>(), any::<bool>());
    let rest = (option::of(duration()), flags, option::of(any::<u16>()), option::of(body));
    (filled(), address(), option::of(http), rest)
        .prop_map(|(name, address, http, (timeout, flags, status_on_error, body))| Authorizer {
            name,
            address,
            http,
            timeout,
            fail_open: flags.0,
            clear_route_cache: flags.1,
            status_on_error,
            body,
        })
        .boxed()
}

fn expression() -> BoxedStrategy<Expression> {
    select(vec!["response.code >= 400", "request.headers['x'] == 'y'", "true"])
        .prop_map(|e| Expression::new(e).unwrap())
        .boxed()
}

fn log_text() -> BoxedStrategy<LogText> {
    select(vec!["", "%REQ(:METHOD)% %DURATION%", "100%%"]).prop_map(|t| LogText::new(t).unwrap()).boxed()
}

fn collector() -> BoxedStrategy<Collector> {
    (text(), option::of(text()), text(), any::<u16>())
        .prop_map(|(provider, namespace, host, port)| Collector { provider, namespace, host, port })
        .boxed()
}

fn tracing() -> BoxedStrategy<Tracing> {
    let protocol = prop_oneof![
        Just(SpanProtocol::OtlpGrpc),
        text().prop_map(|path| SpanProtocol::OtlpHttp { path }),
        text().prop_map(|path| SpanProtocol::Zipkin { path }),
    ];
    let exporter = (protocol, duration(), labels()).prop_map(|(protocol, timeout, headers)| Exporter {
        protocol,
        timeout,
        headers,
    });
    let tag = prop_oneof![
        text().prop_map(SpanTag::Literal),
        (text(), text()).prop_map(|(name, default)| SpanTag::Environment { name, default }),
        (header_key(), text()).prop_map(|(name, default)| SpanTag::Header { name, default }),
        log_text().prop_map(SpanTag::Format),
    ];
    let flags = (any::<bool>(), any::<bool>());
    (collector(), exporter, percent(), flags, list((text(), tag)), any::<u32>())
        .prop_map(|(collector, exporter, sampling, flags, tags, max_tag_length)| Tracing {
            collector,
            exporter,
            sampling,
            report: flags.0,
            propagate: flags.1,
            tags,
            max_tag_length,
        })
        .boxed()
}

pub fn telemetry() -> BoxedStrategy<Telemetry> {
    let tag = (text(), option::of(expression())).prop_map(|(name, value)| Tag { name, value });
    let metric = select(MetricName::ALL.to_vec()).prop_map(|(metric, _)| metric);
    let rule = (metric, any::<bool>(), list(tag)).prop_map(|(metric, disabled, tags)| MetricRule {
        metric,
        disabled,
        tags,
    });
    let format = prop_oneof![
        Just(LogFormat::Text),
        Just(LogFormat::Json),
        log_text().prop_map(LogFormat::TextOf),
        list((text(), log_text())).prop_map(LogFormat::JsonOf),
    ];
    let file = (strs(&["/dev/stdout", "/tmp/log"]), format)
        .prop_map(|(path, format)| LogSink::File { path, format });
    let names = || list(header_key());
    let entries = prop_oneof![
        Just(LogEntries::Connections),
        (names(), names()).prop_map(|(request_headers, response_headers)| LogEntries::Requests {
            request_headers,
            response_headers,
        }),
        (log_text(), list((text(), log_text())))
            .prop_map(|(body, attributes)| LogEntries::Otlp { body, attributes }),
    ];
    let service = (collector(), text(), entries).prop_map(|(collector, name, entries)| {
        LogSink::Service(Box::new(LogService { collector, name, entries }))
    });
    let log = (prop_oneof![file, service], option::of(expression()))
        .prop_map(|(sink, filter)| AccessLog { sink, filter });
    (any::<bool>(), list(rule), option::of(list(log)), option::of(tracing()))
        .prop_map(|(disabled, rules, logs, tracing)| Telemetry {
            metrics: Metrics { disabled, rules },
            logs,
            tracing: tracing.map(Box::new),
        })
        .boxed()
}
