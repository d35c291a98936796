//! Writing what is asked of requests beside policies: tokens, rate limits, external authorizers.

use model::http::{
    Authorizer, BodyCheck, Bucket, ClaimHeader, Count, GlobalLimit, HttpCheck, KeySource, Limit,
    LimitHeaders, LimitKey, LimitMatch, ProviderAddress, RateLimit, RequestAuthentication, TokenPlace,
    TokenRule,
};

use super::http::{duration, labels, policy_key, text};
use super::http_policy::path;
use super::policy::{pattern, patterns};
use super::texts;
use crate::wire::waypoint as wire;

/// Writes whose tokens are taken.
#[must_use]
pub fn encode_authentication(authentication: &RequestAuthentication) -> wire::Authentication {
    let RequestAuthentication { key, rules } = authentication;
    wire::Authentication {
        name: Some(policy_key(key)),
        rules: rules.iter().map(|rule| token_rule(rule)).collect(),
    }
}

fn token_rule(rule: &TokenRule) -> wire::TokenRule {
    use wire::token_place::{Header, Kind};
    use wire::token_rule::Keys;
    let TokenRule {
        issuer,
        audiences,
        keys,
        places,
        forward,
        payload_header,
        claim_headers,
        space_delimited,
        timeout,
    } = rule;
    let place = |place: &TokenPlace| wire::TokenPlace {
        kind: Some(match place {
            TokenPlace::Header { name, prefix } => {
                Kind::Header(Header { name: name.to_string(), prefix: prefix.to_string() })
            }
            TokenPlace::Parameter(name) => Kind::Parameter(name.to_string()),
            TokenPlace::Cookie(name) => Kind::Cookie(name.to_string()),
        }),
    };
    let claim_header = |ClaimHeader { header, claim }: &ClaimHeader| wire::ClaimHeader {
        header: header.to_string(),
        claim: texts(claim),
    };
    wire::TokenRule {
        issuer: text(issuer),
        audiences: texts(audiences),
        keys: Some(match keys {
            KeySource::Inline(set) => Keys::Inline(set.to_string()),
            KeySource::Url(url) => Keys::Url(url.to_string()),
            KeySource::Discovered(issuer) => Keys::Discovered(issuer.to_string()),
        }),
        places: places.iter().map(place).collect(),
        forward: *forward,
        payload_header: text(payload_header),
        claim_headers: claim_headers.iter().map(claim_header).collect(),
        space_delimited: space_delimited.iter().map(ToString::to_string).collect(),
        timeout: Some(duration(*timeout)),
    }
}

/// Writes rate limits.
#[must_use]
pub fn encode_rate_limit(limit: &RateLimit) -> wire::RateLimit {
    use wire::rate_limit::Headers;
    let RateLimit { key, limits, headers } = limit;
    let headers = match headers {
        LimitHeaders::Standard => Headers::Standard,
        LimitHeaders::Legacy => Headers::Legacy,
        LimitHeaders::None => Headers::None,
    };
    wire::RateLimit {
        name: Some(policy_key(key)),
        limits: limits.iter().map(|limit| one_limit(limit)).collect(),
        headers: headers.into(),
    }
}

fn one_limit(limit: &Limit) -> wire::Limit {
    let Limit { name, on: LimitMatch { methods, paths, headers }, by, count, dry_run } = limit;
    wire::Limit {
        name: name.to_string(),
        methods: texts(methods),
        paths: paths.iter().map(path).collect(),
        headers: headers
            .iter()
            .map(|(name, value)| wire::LimitHeader { name: name.to_string(), value: Some(pattern(value)) })
            .collect(),
        by: by.iter().map(limit_key).collect(),
        count: Some(match count {
            Count::Local(bucket) => wire::limit::Count::Local(local(bucket)),
            Count::Global(limit) => wire::limit::Count::Global(global(limit)),
        }),
        dry_run: *dry_run,
    }
}

fn limit_key(key: &LimitKey) -> wire::LimitKey {
    use wire::limit_key::{Claim, Kind};
    let kind = match key {
        LimitKey::Path => Kind::Path(()),
        LimitKey::Method => Kind::Method(()),
        LimitKey::Header(name) => Kind::Header(name.to_string()),
        LimitKey::Claim(path) => Kind::Claim(Claim { path: texts(path) }),
        LimitKey::Identity => Kind::Identity(()),
        LimitKey::Address => Kind::Address(()),
        LimitKey::Constant { key, value } => {
            Kind::Constant(wire::Label { key: key.to_string(), value: value.to_string() })
        }
    };
    wire::LimitKey { kind: Some(kind) }
}

fn local(bucket: &Bucket) -> wire::Bucket {
    let Bucket { requests, per, burst, max_keys } = bucket;
    wire::Bucket { requests: *requests, per: Some(duration(*per)), burst: *burst, max_keys: *max_keys }
}

fn global(limit: &GlobalLimit) -> wire::GlobalLimit {
    let GlobalLimit { address, domain, timeout, fail_open, hits } = limit;
    wire::GlobalLimit {
        address: Some(provider(address)),
        domain: domain.to_string(),
        timeout: Some(duration(*timeout)),
        fail_open: *fail_open,
        hits: *hits,
    }
}

fn provider(address: &ProviderAddress) -> wire::ProviderAddress {
    let ProviderAddress { namespace, host, port } = address;
    wire::ProviderAddress { namespace: text(namespace), host: host.to_string(), port: (*port).into() }
}

/// Writes an external authorizer.
#[must_use]
pub fn encode_authorizer(authorizer: &Authorizer) -> wire::Authorizer {
    let Authorizer { name, address, http, timeout, fail_open, clear_route_cache, status_on_error, body } =
        authorizer;
    wire::Authorizer {
        name: name.to_string(),
        address: Some(provider(address)),
        http: http.as_ref().map(http_check),
        timeout: timeout.map(duration),
        fail_open: *fail_open,
        clear_route_cache: *clear_route_cache,
        status_on_error: status_on_error.map(u32::from),
        body: body.map(|BodyCheck { max_bytes, allow_partial, as_bytes }| wire::authorizer::Body {
            max_bytes,
            allow_partial,
            as_bytes,
        }),
    }
}

fn http_check(check: &HttpCheck) -> wire::authorizer::Http {
    let HttpCheck {
        path_prefix,
        request_headers,
        additional_headers,
        to_upstream_on_allow,
        to_downstream_on_deny,
        to_downstream_on_allow,
    } = check;
    wire::authorizer::Http {
        path_prefix: text(path_prefix),
        request_headers: patterns(request_headers),
        additional_headers: labels(additional_headers),
        to_upstream_on_allow: patterns(to_upstream_on_allow),
        to_downstream_on_deny: patterns(to_downstream_on_deny),
        to_downstream_on_allow: patterns(to_downstream_on_allow),
    }
}
