//! Reading what is asked of requests beside policies: tokens, rate limits, external authorizers.

use std::sync::Arc;

use model::PolicyKey;
use model::http::{
    Authorizer, BodyCheck, Bucket, ClaimHeader, Count, GlobalLimit, HttpCheck, KeySource, Limit,
    LimitHeaders, LimitKey, LimitMatch, ProviderAddress, RateLimit, RequestAuthentication, TokenPlace,
    TokenRule,
};

use super::http::{duration, needed_duration};
use super::strict::{needed, strict};
use super::{DecodeError, Decoder, Fault, Problem, cut, each, port};
use crate::wire::waypoint as wire;

impl Decoder {
    /// Reads whose tokens are taken.
    ///
    /// # Errors
    /// As [`Decoder::http_policy`].
    pub fn authentication(&mut self, bytes: &[u8]) -> Result<RequestAuthentication, DecodeError> {
        let message: wire::Authentication =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("authentication", ""))?;
        self.read_authentication(&message).map_err(|fault| {
            let name = message.name.unwrap_or_default();
            fault.of("authentication", format_args!("{}/{}", cut(&name.namespace), name.name))
        })
    }

    fn read_authentication(&mut self, a: &wire::Authentication) -> Result<RequestAuthentication, Fault> {
        let (namespace, name) = self.name(a.name.as_ref(), "name")?;
        let rules = each(&a.rules, "rules", |rule| self.token_rule(rule).map(Arc::new))?;
        Ok(RequestAuthentication { key: PolicyKey { namespace, name }, rules })
    }

    fn token_rule(&mut self, r: &wire::TokenRule) -> Result<TokenRule, Fault> {
        use wire::token_rule::Keys;
        if r.places.is_empty() {
            return Err(Fault::new("places", Problem::Missing));
        }
        let payload_header = r.payload_header.as_ref().map(|name| self.header_key(name));
        Ok(TokenRule {
            issuer: self.optional(r.issuer.as_ref()),
            audiences: self.texts(&r.audiences),
            keys: match needed(r.keys.as_ref(), "keys")? {
                Keys::Inline(set) => KeySource::Inline(self.text(set)),
                Keys::Url(url) => KeySource::Url(self.text(url)),
                Keys::Discovered(issuer) => KeySource::Discovered(self.text(issuer)),
            },
            places: each(&r.places, "places", |place| self.token_place(place))?,
            forward: r.forward,
            payload_header: payload_header.transpose().map_err(|f| f.within("payload_header"))?,
            claim_headers: each(&r.claim_headers, "claim_headers", |c| {
                Ok(ClaimHeader { header: self.header_key(&c.header)?, claim: self.texts(&c.claim) })
            })?,
            space_delimited: r.space_delimited.iter().map(|name| name.as_str().into()).collect(),
            timeout: needed_duration(r.timeout.as_ref(), "timeout")?,
        })
    }

    fn token_place(&mut self, place: &wire::TokenPlace) -> Result<TokenPlace, Fault> {
        use wire::token_place::Kind;
        Ok(match needed(place.kind.as_ref(), "kind")? {
            Kind::Header(header) => {
                TokenPlace::Header { name: self.header_key(&header.name)?, prefix: self.text(&header.prefix) }
            }
            Kind::Parameter(name) => TokenPlace::Parameter(self.text(name)),
            Kind::Cookie(name) => TokenPlace::Cookie(self.text(name)),
        })
    }

    /// Reads rate limits.
    ///
    /// # Errors
    /// As [`Decoder::http_policy`].
    pub fn rate_limit(&mut self, bytes: &[u8]) -> Result<RateLimit, DecodeError> {
        let message: wire::RateLimit =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("rate limit", ""))?;
        self.read_rate_limit(&message).map_err(|fault| {
            let name = message.name.unwrap_or_default();
            fault.of("rate limit", format_args!("{}/{}", cut(&name.namespace), name.name))
        })
    }

    fn read_rate_limit(&mut self, r: &wire::RateLimit) -> Result<RateLimit, Fault> {
        use wire::rate_limit::Headers;
        let (namespace, name) = self.name(r.name.as_ref(), "name")?;
        Ok(RateLimit {
            key: PolicyKey { namespace, name },
            limits: each(&r.limits, "limits", |limit| self.limit(limit).map(Arc::new))?,
            headers: match Headers::try_from(r.headers) {
                Ok(Headers::Standard) => LimitHeaders::Standard,
                Ok(Headers::Legacy) => LimitHeaders::Legacy,
                Ok(Headers::None) => LimitHeaders::None,
                Err(_) => return Err(Fault::new("headers", Problem::Enum(r.headers))),
            },
        })
    }

    fn limit(&mut self, l: &wire::Limit) -> Result<Limit, Fault> {
        Ok(Limit {
            name: self.text(&l.name),
            on: LimitMatch {
                methods: self.texts(&l.methods),
                paths: each(&l.paths, "paths", |path| self.path_pattern(path))?,
                headers: each(&l.headers, "headers", |header| {
                    let value = needed(header.value.as_ref(), "value")?;
                    let value = self.string_match(value).map_err(|f| f.within("value"))?;
                    Ok((self.header_key(&header.name)?, value))
                })?,
            },
            by: each(&l.by, "by", |key| self.limit_key(key))?,
            count: match needed(l.count.as_ref(), "count")? {
                wire::limit::Count::Local(bucket) => {
                    Count::Local(local(bucket).map_err(|f| f.within("local"))?)
                }
                wire::limit::Count::Global(limit) => {
                    Count::Global(Arc::new(self.global(limit).map_err(|f| f.within("global"))?))
                }
            },
            dry_run: l.dry_run,
        })
    }

    fn limit_key(&mut self, key: &wire::LimitKey) -> Result<LimitKey, Fault> {
        use wire::limit_key::Kind;
        Ok(match needed(key.kind.as_ref(), "kind")? {
            Kind::Path(()) => LimitKey::Path,
            Kind::Method(()) => LimitKey::Method,
            Kind::Header(name) => LimitKey::Header(self.header_key(name)?),
            Kind::Claim(claim) => LimitKey::Claim(self.texts(&claim.path)),
            Kind::Identity(()) => LimitKey::Identity,
            Kind::Address(()) => LimitKey::Address,
            Kind::Constant(label) => {
                LimitKey::Constant { key: self.text(&label.key), value: self.text(&label.value) }
            }
        })
    }

    fn global(&mut self, limit: &wire::GlobalLimit) -> Result<GlobalLimit, Fault> {
        Ok(GlobalLimit {
            address: self.provider(limit.address.as_ref())?,
            domain: self.text(&limit.domain),
            timeout: needed_duration(limit.timeout.as_ref(), "timeout")?,
            fail_open: limit.fail_open,
            hits: limit.hits,
        })
    }

    fn provider(&mut self, address: Option<&wire::ProviderAddress>) -> Result<ProviderAddress, Fault> {
        let address = needed(address, "address")?;
        Ok(ProviderAddress {
            namespace: self.optional(address.namespace.as_ref()),
            host: self.text(&address.host),
            port: port(address.port, "address.port")?,
        })
    }

    /// Reads an external authorizer.
    ///
    /// # Errors
    /// As [`Decoder::http_policy`].
    pub fn authorizer(&mut self, bytes: &[u8]) -> Result<Authorizer, DecodeError> {
        let message: wire::Authorizer =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("authorizer", ""))?;
        self.read_authorizer(&message).map_err(|fault| fault.of("authorizer", &message.name))
    }

    fn read_authorizer(&mut self, a: &wire::Authorizer) -> Result<Authorizer, Fault> {
        if a.name.is_empty() {
            return Err(Fault::new("name", Problem::Missing));
        }
        let http = a.http.as_ref().map(|http| self.http_check(http));
        Ok(Authorizer {
            name: self.text(&a.name),
            address: self.provider(a.address.as_ref())?,
            http: http.transpose().map_err(|f| f.within("http"))?,
            timeout: duration(a.timeout.as_ref(), "timeout")?,
            fail_open: a.fail_open,
            clear_route_cache: a.clear_route_cache,
            status_on_error: a.status_on_error.map(|status| port(status, "status_on_error")).transpose()?,
            body: a.body.map(|body| BodyCheck {
                max_bytes: body.max_bytes,
                allow_partial: body.allow_partial,
                as_bytes: body.as_bytes,
            }),
        })
    }

    fn http_check(&mut self, check: &wire::authorizer::Http) -> Result<HttpCheck, Fault> {
        Ok(HttpCheck {
            path_prefix: self.optional(check.path_prefix.as_ref()),
            request_headers: self.patterns(&check.request_headers, "request_headers")?,
            additional_headers: self.labels(&check.additional_headers),
            to_upstream_on_allow: self.patterns(&check.to_upstream_on_allow, "to_upstream_on_allow")?,
            to_downstream_on_deny: self.patterns(&check.to_downstream_on_deny, "to_downstream_on_deny")?,
            to_downstream_on_allow: self.patterns(&check.to_downstream_on_allow, "to_downstream_on_allow")?,
        })
    }
}

fn local(bucket: &wire::Bucket) -> Result<Bucket, Fault> {
    let per = needed_duration(bucket.per.as_ref(), "per")?;
    if per.as_millis() == 0 {
        return Err(Fault::new("per", Problem::Duration));
    }
    for (count, field) in [(bucket.requests, "requests"), (bucket.burst, "burst")] {
        if count == 0 {
            return Err(Fault::new(field, Problem::Number(0)));
        }
    }
    Ok(Bucket { requests: bucket.requests, per, burst: bucket.burst, max_keys: bucket.max_keys })
}
