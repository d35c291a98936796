//! A token: its parts, what it says, and whether it holds (RFC 7515 section 3.1, RFC 7519).

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use model::http::TokenRule;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Fault;
use crate::providers::keys::{Algorithm, KeySet, Rejected};

/// How far the issuer's clock may be off, in seconds (Envoy's default).
pub(super) const LEEWAY: u64 = 60;
/// The longest token that is looked at.
const MAX_TOKEN: usize = 32 * 1024;

#[derive(Deserialize)]
struct Header<'t> {
    #[serde(borrow, default)]
    alg: Option<Cow<'t, str>>,
    #[serde(borrow, default)]
    kid: Option<Cow<'t, str>>,
    #[serde(default)]
    crit: Option<Value>,
}

/// When a token holds, in seconds since 1970.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Validity {
    pub from: u64,
    pub until: u64,
}

impl Validity {
    pub(super) fn check(self, now: u64) -> Result<(), Fault> {
        if self.from > now.saturating_add(LEEWAY) {
            return Err(Fault::NotYetValid);
        }
        if now > self.until.saturating_add(LEEWAY) {
            return Err(Fault::Expired);
        }
        Ok(())
    }
}

/// A token whose form is right. Nothing vouches for what it says until [`Token::verify`].
#[derive(Debug)]
pub(super) struct Token<'t> {
    /// Header and payload, which are signed.
    message: &'t str,
    pub payload: Map<String, Value>,
    algorithm: Algorithm,
    kid: Option<String>,
    signature: Vec<u8>,
    pub validity: Validity,
}

impl<'t> Token<'t> {
    pub(super) fn parse(text: &'t str) -> Result<Self, Fault> {
        if text.len() > MAX_TOKEN {
            return Err(Fault::Form);
        }
        let (message, signature) = text.rsplit_once('.').ok_or(Fault::Form)?;
        let (header_text, payload_text) = message.split_once('.').ok_or(Fault::Form)?;
        if payload_text.contains('.') {
            return Err(Fault::Form);
        }
        let header = URL_SAFE_NO_PAD.decode(header_text).map_err(|_| Fault::HeaderBase64)?;
        let fields: Value = serde_json::from_slice(&header).map_err(|_| Fault::HeaderJson)?;
        if !fields.is_object() {
            return Err(Fault::HeaderJson);
        }
        if fields.get("kid").is_some_and(|kid| !kid.is_string()) {
            return Err(Fault::Kid);
        }
        let header: Header<'_> = serde_json::from_slice(&header).map_err(|_| Fault::Algorithm)?;
        // What has to be understood and is not: RFC 7515 section 4.1.11.
        if header.crit.is_some() {
            return Err(Fault::Critical);
        }
        let algorithm = Algorithm::named(&header.alg.ok_or(Fault::Algorithm)?).ok_or(Fault::Unsupported)?;
        let payload = URL_SAFE_NO_PAD.decode(payload_text).map_err(|_| Fault::PayloadBase64)?;
        let payload: Value = serde_json::from_slice(&payload).map_err(|_| Fault::PayloadJson)?;
        let Value::Object(payload) = payload else { return Err(Fault::PayloadJson) };
        let validity = check_claims(&payload)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| Fault::SignatureBase64)?;
        let kid = header.kid.map(Cow::into_owned);
        Ok(Self { message, payload, algorithm, kid, signature, validity })
    }

    /// Whether it is one that `rule` takes, but for its signature.
    pub(super) fn suits(&self, rule: &TokenRule, now: u64) -> Result<(), Fault> {
        let issuer = self.payload.get("iss").and_then(Value::as_str);
        if rule.issuer.as_deref().is_some_and(|wanted| issuer != Some(wanted)) {
            return Err(Fault::Issuer);
        }
        self.validity.check(now)?;
        let suits = |audience: &str| rule.audiences.iter().any(|wanted| bare(wanted) == bare(audience));
        let suited = match self.payload.get("aud") {
            Some(Value::String(audience)) => suits(audience),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(suits),
            _ => false,
        };
        if rule.audiences.is_empty() || suited { Ok(()) } else { Err(Fault::Audience) }
    }

    pub(super) fn verify(&self, keys: &KeySet) -> Result<(), Fault> {
        let verified =
            keys.verify(self.algorithm, self.kid.as_deref(), self.message.as_bytes(), &self.signature);
        verified.map_err(|rejected| match rejected {
            Rejected::NoSuchKey => Fault::NoSuchKey,
            Rejected::Signature => Fault::Signature,
        })
    }
}

/// An audience without scheme and slash at its end, as Envoy compares them: issuers differ in these.
fn bare(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://"));
    let rest = rest.unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// Checks the types of the claims that RFC 7519 section 4.1 gives one, and reads when the token holds.
fn check_claims(payload: &Map<String, Value>) -> Result<Validity, Fault> {
    if ["iss", "sub", "jti"].iter().any(|name| payload.get(*name).is_some_and(|value| !value.is_string())) {
        return Err(Fault::Claims);
    }
    let is_list = |list: &Vec<Value>| list.iter().all(Value::is_string);
    let good = match payload.get("aud") {
        None | Some(Value::String(_)) => true,
        Some(Value::Array(list)) => is_list(list),
        Some(_) => false,
    };
    if !good {
        return Err(Fault::Claims);
    }
    let time = |name: &str, absent: u64| match payload.get(name) {
        None => Ok(absent),
        Some(value) => seconds(value).ok_or(Fault::Claims),
    };
    time("iat", 0)?;
    Ok(Validity { from: time("nbf", 0)?, until: time("exp", u64::MAX)? })
}

/// A NumericDate (RFC 7519 section 2), which may have a fraction.
fn seconds(value: &Value) -> Option<u64> {
    if let Some(whole) = value.as_u64() {
        return Some(whole);
    }
    let number = value.as_f64().filter(|n| (0.0..=9e15).contains(n))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is in the range")]
    Some(number as u64)
}
