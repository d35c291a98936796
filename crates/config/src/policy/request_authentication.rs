//! RequestAuthentication (`security.istio.io`): whose tokens are taken in requests, and what is made of them.
//!
//! It refuses no one who leaves the token out, in Istio too: that is an AuthorizationPolicy's to say, and what such a
//! policy asks of a token holds for no request whose token nobody has looked at.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Uri};
use model::Str;
use model::http::{ClaimHeader, KeySource, TokenPlace, TokenRule};

use super::authorization::PolicyScope;
use super::selector::{SELECTOR, TARGET_REF, non_empty, read_selector, read_targets};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, silent};
use crate::headers::{is_of_connection, is_the_clients};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::RequestAuthentication,
    group: "security.istio.io",
    versions: &["v1", "v1beta1"],
    name: "RequestAuthentication",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "RequestAuthentication",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "RequestAuthentication.spec",
    fields: &[
        nested("selector", &SELECTOR),
        nested("targetRefs", &TARGET_REF),
        nested("targetRef", &TARGET_REF),
        nested("jwtRules", &RULE),
    ],
};

static RULE: Schema = Schema {
    name: "RequestAuthentication.spec.jwtRules[]",
    fields: &[
        enforced("issuer"),
        enforced("audiences"),
        enforced("jwksUri"),
        enforced("jwks_uri"),
        enforced("jwks"),
        nested("fromHeaders", &FROM_HEADER),
        enforced("fromParams"),
        enforced("fromCookies"),
        enforced("outputPayloadToHeader"),
        enforced("forwardOriginalToken"),
        nested("outputClaimToHeaders", &CLAIM_HEADER),
        enforced("timeout"),
        enforced("spaceDelimitedClaims"),
    ],
};

static FROM_HEADER: Schema = Schema {
    name: "RequestAuthentication.spec.jwtRules[].fromHeaders[]",
    fields: &[enforced("name"), enforced("prefix")],
};

static CLAIM_HEADER: Schema = Schema {
    name: "RequestAuthentication.spec.jwtRules[].outputClaimToHeaders[]",
    fields: &[enforced("header"), enforced("claim")],
};

/// How long keys are waited for, unless the rule says it (Istio's default).
const TIMEOUT: Duration = Duration::from_secs(5);
/// The most rules of a resource, those of Istio's CRD.
const MAX_RULES: usize = 4096;
/// The most bytes of a JWK set that is written in a rule.
const MAX_KEYS: usize = 256 * 1024;

/// What a RequestAuthentication says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestAuthentication {
    /// What it is for.
    pub scope: PolicyScope,
    /// Its rules; `None` if it has errors and nothing is known of it from before: no request passes.
    pub rules: Option<Box<[Arc<TokenRule>]>>,
}

impl RequestAuthentication {
    /// One that lets no request to what is in `scope` pass.
    pub(crate) fn closed(scope: PolicyScope) -> Self {
        Self { scope, rules: None }
    }
}

fn parse(fields: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    let mut spec = fields.required("spec")?.fields()?.without_nulls();
    let scope = read_scope(&mut spec);
    let mut rules = Vec::new();
    spec.each("jwtRules", |mut item| {
        if rules.len() == MAX_RULES {
            item.invalid(format_args!("is one of more than {MAX_RULES} rules"), "split the resource");
        } else {
            rules.extend(item.fields().and_then(|rule| read_rule(rule.without_nulls())).map(Arc::new));
        }
    });
    let rules = Some(rules.into());
    Some(Resource::RequestAuthentication(Box::new(RequestAuthentication { scope, rules })))
}

fn read_scope(spec: &mut Fields<'_, '_>) -> PolicyScope {
    let selector = read_selector(spec);
    if let (None, Some(mut cursor)) = (&selector, spec.take("selector")) {
        let message = "the selector names no labels: it selects all that is in the namespace";
        cursor.report(Code::WithoutEffect, message, "name labels, or remove it");
    }
    let targets = read_targets(spec);
    match (selector, targets.is_empty()) {
        (Some(_), false) => {
            spec.report(
                Code::InvalidValue,
                "spec.selector and spec.targetRefs are both set; only one may be",
                "split the resource",
            );
            PolicyScope::Namespace
        }
        (None, false) => PolicyScope::Targets(targets.into()),
        (Some(selector), true) => PolicyScope::Selector(selector),
        (None, true) => PolicyScope::Namespace,
    }
}

fn read_rule(mut rule: Fields<'_, '_>) -> Option<TokenRule> {
    let issuer = rule.take("issuer").and_then(non_empty).map(Str::from);
    let keys = read_keys(&mut rule, issuer.as_ref());
    let audiences = texts(&mut rule, "audiences").into_iter().map(Str::from).collect();
    let places = read_places(&mut rule);
    let payload_header = rule.take("outputPayloadToHeader").and_then(header);
    let mut claim_headers = Vec::new();
    rule.each("outputClaimToHeaders", |item| {
        let Some(mut fields) = item.fields().map(Fields::without_nulls) else { return };
        let name = fields.required("header").and_then(header);
        let claim = fields.required("claim").and_then(non_empty);
        if let (Some(header), Some(claim)) = (name, claim) {
            // As in Istio: a dot leads into a claim that is an object.
            claim_headers.push(ClaimHeader { header, claim: claim.split('.').map(Str::from).collect() });
        }
    });
    let space_delimited = texts(&mut rule, "spaceDelimitedClaims");
    if space_delimited.len() > 64 {
        rule.report(Code::InvalidValue, "spaceDelimitedClaims has more than 64 items", "");
    }
    Some(TokenRule {
        issuer,
        audiences,
        keys: keys?,
        places,
        forward: rule.boolean("forwardOriginalToken").unwrap_or(false),
        payload_header,
        claim_headers: claim_headers.into(),
        space_delimited: space_delimited.into_iter().map(Box::from).collect(),
        timeout: rule.take("timeout").and_then(super::providers::duration).unwrap_or(TIMEOUT),
    })
}

fn texts<'n>(rule: &mut Fields<'_, 'n>, name: &'static str) -> Vec<&'n str> {
    let mut list = Vec::new();
    rule.each(name, |item| list.extend(non_empty(item)));
    list
}

/// Where the keys come from: exactly as the resource says, or from where the issuer says.
fn read_keys(rule: &mut Fields<'_, '_>, issuer: Option<&Str>) -> Option<KeySource> {
    let uri = rule.take("jwksUri").and_then(url);
    let older = rule.take("jwks_uri").and_then(url);
    let inline = rule.take("jwks").and_then(key_set);
    let given = ["jwksUri", "jwks_uri", "jwks"].into_iter().filter(|name| rule.take(name).is_some()).count();
    if given > 1 {
        let message = "keys are either written out or fetched: jwks, jwksUri and jwks_uri exclude each other";
        rule.report(Code::InvalidValue, message, "keep one of them");
    }
    let fetched = uri.or(older).map(KeySource::Url);
    let found = fetched.or(inline.map(KeySource::Inline));
    if issuer.is_none() && !matches!(found, Some(KeySource::Url(_))) {
        let message = "a rule needs the issuer, or the URL of its keys";
        rule.report(Code::MissingField, message, "set issuer, or jwksUri");
        return None;
    }
    if given > 0 {
        return found;
    }
    let issuer = issuer?;
    if !is_url(issuer) {
        let message = format!(
            "{issuer} is no URL at which its keys could be looked up, and none are given: its tokens are refused"
        );
        rule.report(Code::WithoutEffect, message, "set jwksUri or jwks");
    }
    Some(KeySource::Discovered(issuer.clone()))
}

fn is_url(text: &str) -> bool {
    let uri: Option<Uri> = text.parse().ok();
    uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    })
}

fn url(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let text = cursor.node().as_str();
    if text.is_some_and(|text| text.len() > 2048 || !is_url(text)) {
        cursor.invalid("is no URL of http or https", "such as https://issuer.example/.well-known/jwks.json");
        return None;
    }
    cursor.string().map(Str::from)
}

/// Checks a JWK set as far as it can be without its keys being used (RFC 7517 section 5).
fn key_set(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let Some(text) = cursor.node().as_str() else {
        cursor.string();
        return None;
    };
    if text.len() > MAX_KEYS {
        cursor.invalid(format_args!("has more than {MAX_KEYS} bytes"), "set jwksUri");
        return None;
    }
    let set: serde_json::Value = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(error) => {
            cursor.invalid(format_args!("is no JSON: {error}"), "write a JWK set: {\"keys\": [...]}");
            return None;
        }
    };
    let Some(keys) = set.get("keys").and_then(serde_json::Value::as_array) else {
        cursor.invalid("has no list of keys", "write a JWK set: {\"keys\": [...]}");
        return None;
    };
    let usable = |key: &serde_json::Value| matches!(key["kty"].as_str(), Some("RSA" | "EC" | "OKP"));
    if !keys.iter().any(usable) {
        let message = "none of the keys is an RSA, EC or OKP key: every token of the issuer is refused";
        cursor.report(Code::WithoutEffect, message, "write the issuer's public keys");
    }
    Some(text.into())
}

fn read_places(rule: &mut Fields<'_, '_>) -> Box<[TokenPlace]> {
    let mut places = Vec::new();
    rule.each("fromHeaders", |item| {
        let Some(mut fields) = item.fields().map(Fields::without_nulls) else { return };
        let name = fields.required("name").and_then(header_name);
        let prefix = fields.string("prefix").unwrap_or_default().into();
        places.extend(name.map(|name| TokenPlace::Header { name, prefix }));
    });
    places.extend(texts(rule, "fromParams").into_iter().map(|name| TokenPlace::Parameter(name.into())));
    places.extend(texts(rule, "fromCookies").into_iter().map(|name| TokenPlace::Cookie(name.into())));
    if places.is_empty() { TokenPlace::defaults() } else { places.into() }
}

fn header_name(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let text = cursor.node().as_str();
    let name = text.and_then(|text| HeaderName::from_bytes(text.as_bytes()).ok());
    if name.is_none() && text.is_some() {
        cursor.invalid("is no name of a header field", "");
    }
    cursor.string()?;
    name.map(|name| name.as_str().into())
}

/// A header that the service is given. Those that say where the message ends, or whose it is, are not for this.
fn header(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let is_taken =
        |name: &str| is_of_connection(name) || is_the_clients(name) || name.eq_ignore_ascii_case("host");
    if cursor.node().as_str().is_some_and(is_taken) {
        cursor.invalid("has a meaning of its own for the connection", "use another header");
    }
    header_name(cursor)
}
