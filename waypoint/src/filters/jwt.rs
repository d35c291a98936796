//! Whose token a request carries: RequestAuthentications, as Istio's waypoints enforce them with Envoy's `jwt_authn`.
//!
//! A rule looks for tokens where it says. The first rule that takes all it finds vouches for the request; a request of
//! which no rule finds any has no claims, and passes; any other is refused with 401 (403 where only the audience is
//! wrong). Pre-flight requests of CORS carry no token and pass.
//!
//! Invariants:
//! * headers that a rule gives to the service never come from the client;
//! * a verdict is kept by rule, keys and token: when the keys change, it holds no more; times are looked at each time.

mod cache;
mod token;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use model::http::{Claims, HttpService, TokenPlace, TokenRule};
use model::{Mesh, PolicyKey, Str};
use process::metrics::Counter;
use serde_json::Value;

use self::cache::{Cache, Kept};
use self::token::Token;
use super::{Refusal, answer};
use crate::http::decide::{Flag, Response};
use crate::http::head::{Fields, RequestHead, is_field_value};
use crate::providers::jwks::{Attempt, Found, Jwks};

/// Counts, for metrics.
#[derive(Debug, Default)]
pub struct TokenStats {
    /// Requests whose token was taken.
    pub taken: Counter,
    /// Of these, those of whose token it was known.
    pub known: Counter,
    /// Requests that were refused for their token.
    pub refused: Counter,
    /// Requests without a token.
    pub missing: Counter,
}

/// What is wrong with a token. The texts are Envoy's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Form,
    HeaderBase64,
    HeaderJson,
    Algorithm,
    Unsupported,
    Kid,
    Critical,
    PayloadBase64,
    PayloadJson,
    Claims,
    SignatureBase64,
    Issuer,
    NotYetValid,
    Expired,
    Audience,
    NoSuchKey,
    Signature,
    NoKeys,
    /// A RequestAuthentication that is listed for the service has not come.
    UnknownPolicy,
}

impl Fault {
    /// The text for the client, and the detail for the log.
    fn texts(self) -> (&'static str, &'static str) {
        macro_rules! texts {
            ($text:literal, $detail:literal) => {
                ($text, concat!("jwt_authn_access_denied{", $detail, "}"))
            };
        }
        match self {
            Self::Form => texts!(
                "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
                "Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections"
            ),
            Self::HeaderBase64 => {
                texts!(
                    "Jwt header is an invalid Base64url encoded",
                    "Jwt_header_is_an_invalid_Base64url_encoded"
                )
            }
            Self::HeaderJson => texts!("Jwt header is an invalid JSON", "Jwt_header_is_an_invalid_JSON"),
            Self::Algorithm => texts!(
                "Jwt header [alg] field is required and must be a string",
                "Jwt_header_[alg]_field_is_required_and_must_be_a_string"
            ),
            Self::Unsupported => {
                texts!("Jwt header [alg] is not supported", "Jwt_header_[alg]_is_not_supported")
            }
            Self::Kid => {
                texts!("Jwt header [kid] field is not a string", "Jwt_header_[kid]_field_is_not_a_string")
            }
            Self::Critical => {
                texts!("Jwt header [crit] is not supported", "Jwt_header_[crit]_is_not_supported")
            }
            Self::PayloadBase64 => texts!(
                "Jwt payload is an invalid Base64url encoded",
                "Jwt_payload_is_an_invalid_Base64url_encoded"
            ),
            Self::PayloadJson => texts!("Jwt payload is an invalid JSON", "Jwt_payload_is_an_invalid_JSON"),
            Self::Claims => texts!(
                "Jwt payload has a registered claim of the wrong type",
                "Jwt_payload_has_a_registered_claim_of_the_wrong_type"
            ),
            Self::SignatureBase64 => texts!(
                "Jwt signature is an invalid Base64url encoded",
                "Jwt_signature_is_an_invalid_Base64url_encoded"
            ),
            Self::Issuer => texts!("Jwt issuer is not configured", "Jwt_issuer_is_not_configured"),
            Self::NotYetValid => texts!("Jwt not yet valid", "Jwt_not_yet_valid"),
            Self::Expired => texts!("Jwt is expired", "Jwt_is_expired"),
            Self::Audience => texts!("Audiences in Jwt are not allowed", "Audiences_in_Jwt_are_not_allowed"),
            Self::NoSuchKey => texts!(
                "Jwks doesn't have key to match kid or alg from Jwt",
                "Jwks_doesn't_have_key_to_match_kid_or_alg_from_Jwt"
            ),
            Self::Signature => texts!("Jwt verification fails", "Jwt_verification_fails"),
            Self::NoKeys => texts!("Jwks remote fetch is failed", "Jwks_remote_fetch_is_failed"),
            Self::UnknownPolicy => texts!("Jwt policy is not known yet", "request_authentication_not_known"),
        }
    }

    fn status(self) -> u16 {
        match self {
            Self::Audience => 403,
            Self::UnknownPolicy => 503,
            _ => 401,
        }
    }

    /// The response, as RFC 6750 section 3 has it.
    fn refusal(self, request: &RequestHead) -> Refusal {
        let (text, _) = self.texts();
        let mut response = Response::clone(&answer(self.status(), text, Flag::None));
        let uri = format!("{}://{}{}", request.scheme(), request.authority(), request.path());
        let uri: String = uri.chars().filter(|c| !matches!(c, '"' | '\\')).take(256).collect();
        let challenge = format!("Bearer realm=\"{uri}\", error=\"invalid_token\"");
        response.fields = Box::new([("www-authenticate".into(), challenge.into())]);
        Arc::new(response)
    }
}

/// What became of a request's token.
pub enum Outcome {
    /// It may go on: with what its token says, if it has one.
    Passed(Option<Arc<Claims>>),
    /// It is answered so; with the detail for the log.
    Refused(Refusal, &'static str),
    /// Its token's keys are on their way: ask again afterwards, with [`Patience::Spent`].
    Wait(Attempt),
}

/// Whether a request may still wait for keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// It may.
    Left,
    /// It has waited.
    Spent,
}

/// Verifies tokens. One for the program.
pub struct Authenticator {
    keys: Arc<Jwks>,
    cache: Cache,
    stats: TokenStats,
}

/// Why a token is not taken now.
enum NotTaken {
    Fault(Fault),
    Wait(Attempt),
}

impl From<Fault> for NotTaken {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A token in a request.
struct Carried<'r> {
    place: &'r TokenPlace,
    text: Cow<'r, str>,
}

impl Authenticator {
    /// Takes keys from `keys`; keeps verdicts on `remembered` tokens at most.
    #[must_use]
    pub fn new(keys: Arc<Jwks>, remembered: usize) -> Self {
        Self { keys, cache: Cache::new(remembered), stats: TokenStats::default() }
    }

    /// Counts.
    #[must_use]
    pub fn stats(&self) -> &TokenStats {
        &self.stats
    }

    /// Tokens whose verdict is kept.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.cache.len()
    }

    /// Looks at the token of a request to `service`. Removes from the request what only we may say, and, unless a rule
    /// says otherwise, the token.
    #[must_use]
    pub fn authenticate(
        &self,
        mesh: &Mesh,
        service: &HttpService,
        request: &mut RequestHead,
        patience: Patience,
    ) -> Outcome {
        if service.authentication.is_empty() {
            return Outcome::Passed(None);
        }
        let mut rules = Vec::new();
        for key in &service.authentication {
            let Some(known) = mesh.authentication(key) else {
                return self.refused(Fault::UnknownPolicy, request);
            };
            rules.extend(known.rules.iter());
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.by_rules(&rules, request, patience, seconds)
    }

    fn refused(&self, fault: Fault, request: &RequestHead) -> Outcome {
        self.stats.refused.inc();
        Outcome::Refused(fault.refusal(request), fault.texts().1)
    }

    fn by_rules(
        &self,
        rules: &[&Arc<TokenRule>],
        request: &mut RequestHead,
        patience: Patience,
        now: u64,
    ) -> Outcome {
        for header in rules.iter().flat_map(|rule| own_fields(rule)) {
            request.fields.remove_all_like(header.as_bytes());
        }
        if is_preflight(request) {
            return Outcome::Passed(None);
        }
        let mut worst = None;
        for rule in rules {
            let tokens = tokens(rule, request);
            if tokens.is_empty() {
                continue;
            }
            match self.take(rule, &tokens, patience, now) {
                Ok(claims) => {
                    self.stats.taken.inc();
                    let edits = Edits::new(rule, &tokens, &claims);
                    edits.apply(rule, request);
                    return Outcome::Passed(Some(claims));
                }
                Err(NotTaken::Wait(attempt)) => return Outcome::Wait(attempt),
                // Of several, the one that says most.
                Err(NotTaken::Fault(fault)) => {
                    if worst.is_none_or(|worst| worst == Fault::Issuer) {
                        worst = Some(fault);
                    }
                }
            }
        }
        match worst {
            Some(fault) => self.refused(fault, request),
            None => {
                self.stats.missing.inc();
                Outcome::Passed(None)
            }
        }
    }

    /// What the last of the tokens says, if `rule` takes them all: a service might look at another one than we do.
    fn take(
        &self,
        rule: &Arc<TokenRule>,
        tokens: &[Carried<'_>],
        patience: Patience,
        now: u64,
    ) -> Result<Arc<Claims>, NotTaken> {
        let mut last = None;
        for token in tokens {
            last = Some(self.verify(rule, &token.text, patience, now)?);
        }
        last.ok_or(NotTaken::Fault(Fault::Form))
    }

    fn verify(
        &self,
        rule: &Arc<TokenRule>,
        text: &str,
        patience: Patience,
        now: u64,
    ) -> Result<Arc<Claims>, NotTaken> {
        let keys = match self.keys.keys(rule) {
            Found::Keys(keys) => keys,
            Found::Pending(attempt) if patience == Patience::Left => return Err(NotTaken::Wait(attempt)),
            Found::Pending(_) | Found::None => {
                // What is wrong with the token itself is said rather than that we have no keys.
                Token::parse(text)?.suits(rule, now)?;
                return Err(Fault::NoKeys.into());
            }
        };
        let digest = cache::digest(text);
        if let Some(kept) = self.cache.get(&digest, rule, &keys) {
            kept.validity.check(now)?;
            self.stats.known.inc();
            return Ok(kept.claims);
        }
        let token = Token::parse(text)?;
        token.suits(rule, now)?;
        match token.verify(&keys) {
            Ok(()) => {}
            Err(Fault::NoSuchKey) if patience == Patience::Left => {
                // Perhaps the issuer has new ones.
                return Err(self.keys.refresh(rule).map_or(Fault::NoSuchKey.into(), NotTaken::Wait));
            }
            Err(fault) => return Err(fault.into()),
        }
        let validity = token.validity;
        let claims = Arc::new(Claims::new(token.payload).with_delimited(&rule.space_delimited));
        let kept = Kept { rule: Arc::clone(rule), keys, claims: Arc::clone(&claims), validity };
        self.cache.put(digest, kept);
        Ok(claims)
    }
}

/// The fields in which a service is told what a token says.
fn own_fields(rule: &TokenRule) -> impl Iterator<Item = &Str> {
    rule.payload_header.iter().chain(rule.claim_headers.iter().map(|claim| &claim.header))
}

/// The fields in which `service` is told what tokens say: nobody else may, in trailers neither.
#[must_use]
pub fn fields_of(mesh: &Mesh, service: &HttpService) -> Vec<Str> {
    let known = service.authentication.iter().filter_map(|key| mesh.authentication(key));
    known.flat_map(|known| known.rules.iter()).flat_map(|rule| own_fields(rule)).cloned().collect()
}

/// Makes the fields in which services are told what tokens say by `authentications` what they were `before`.
pub fn put_back<'a>(
    mesh: &Mesh,
    authentications: impl Iterator<Item = &'a PolicyKey>,
    before: &Fields,
    fields: &mut Fields,
) {
    let rules =
        authentications.filter_map(|key| mesh.authentication(key)).flat_map(|known| known.rules.iter());
    for name in rules.flat_map(|rule| own_fields(rule)) {
        fields.remove_all_like(name.as_bytes());
        before.values(name.as_bytes()).for_each(|value| fields.push(name.as_bytes(), value));
    }
}

/// Whether it asks, for a page of another origin, what it may do: browsers send no token with it (Fetch, "CORS-preflight
/// request").
fn is_preflight(request: &RequestHead) -> bool {
    let has = |name: &[u8]| request.fields.values(name).any(|value| !value.is_empty());
    request.method() == "OPTIONS" && has(b"origin") && has(b"access-control-request-method")
}

/// The tokens where `rule` looks for them.
fn tokens<'r>(rule: &'r TokenRule, request: &'r RequestHead) -> Vec<Carried<'r>> {
    let mut found = Vec::new();
    for place in &rule.places {
        match place {
            TokenPlace::Header { name, prefix } => {
                let values =
                    request.fields.values(name.as_bytes()).filter_map(|v| std::str::from_utf8(v).ok());
                let texts = values.filter_map(|value| after(value, prefix));
                found.extend(texts.map(|text| Carried { place, text: text.into() }));
            }
            TokenPlace::Parameter(name) => {
                let pairs = request.query().split('&').filter_map(|pair| pair.split_once('='));
                let values = pairs.filter(|(key, _)| decoded(key) == **name).map(|(_, value)| decoded(value));
                found.extend(values.map(|text| Carried { place, text }));
            }
            TokenPlace::Cookie(name) => {
                let cookies = request.fields.values(b"cookie").filter_map(|v| std::str::from_utf8(v).ok());
                let pairs =
                    cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
                let values =
                    pairs.filter(|(key, _)| *key == &**name).map(|(_, value)| value.trim_matches('"'));
                found.extend(values.map(|text| Carried { place, text: text.into() }));
            }
        }
    }
    found
}

/// What stands after `prefix`. The name of a scheme has no case (RFC 9110 section 11.1).
fn after<'v>(value: &'v str, prefix: &str) -> Option<&'v str> {
    let begin = value.get(..prefix.len())?;
    let same = begin == prefix || (prefix == "Bearer " && begin.eq_ignore_ascii_case(prefix));
    same.then(|| value.get(prefix.len()..).unwrap_or_default().trim())
}

/// Percent-decoding; a token has no character that needs it, so what is no text is no token.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let mut ahead = bytes.clone();
        let pair = ahead.next().and_then(digit).zip(ahead.next().and_then(digit));
        match pair {
            Some((high, low)) if byte == b'%' => {
                out.push(high << 4 | low);
                bytes = ahead;
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned().into()
}

/// What is changed of a request whose token was taken.
struct Edits {
    payload: Option<String>,
    claims: Vec<(usize, String)>,
    remove: Vec<TokenPlace>,
}

impl Edits {
    fn new(rule: &TokenRule, tokens: &[Carried<'_>], claims: &Claims) -> Self {
        let payload_of = |token: &Carried<'_>| token.text.split('.').nth(1).map(str::to_owned);
        let payload = rule.payload_header.as_ref().and_then(|_| tokens.last().and_then(payload_of));
        let shown = rule.claim_headers.iter().enumerate().filter_map(|(place, wanted)| {
            let text = claims.at(&wanted.claim).and_then(text_of)?;
            is_field_value(text.as_bytes()).then_some((place, text))
        });
        let remove = if rule.forward { Vec::new() } else { tokens.iter().map(|t| t.place.clone()).collect() };
        Self { payload, claims: shown.collect(), remove }
    }

    fn apply(&self, rule: &TokenRule, request: &mut RequestHead) {
        for place in &self.remove {
            match place {
                TokenPlace::Header { name, .. } => request.fields.remove(name.as_bytes()),
                TokenPlace::Parameter(name) => without_parameter(request, name),
                TokenPlace::Cookie(name) => without_cookie(&mut request.fields, name),
            }
        }
        if let (Some(header), Some(payload)) = (&rule.payload_header, &self.payload) {
            request.fields.push(header.as_bytes(), payload.as_bytes());
        }
        for (place, text) in &self.claims {
            if let Some(wanted) = rule.claim_headers.get(*place) {
                request.fields.push(wanted.header.as_bytes(), text.as_bytes());
            }
        }
    }
}

/// A claim as a header has it: texts, numbers and truth values as they are, the rest as JSON in Base64.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => (!text.is_empty()).then(|| text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Null => None,
        Value::Array(_) | Value::Object(_) => Some(STANDARD.encode(value.to_string())),
    }
}

fn without_parameter(request: &mut RequestHead, name: &str) {
    let Some((path, query)) = request.target().split_once('?') else { return };
    let is_other = |pair: &&str| decoded(pair.split_once('=').map_or(*pair, |(key, _)| key)) != *name;
    let rest: Vec<&str> = query.split('&').filter(is_other).collect();
    let target = if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) };
    request.set_target(&target);
}

fn without_cookie(fields: &mut Fields, name: &str) {
    let mut lines = Vec::new();
    for value in fields.values(b"cookie") {
        let line = String::from_utf8_lossy(value);
        let is_other = |pair: &&str| pair.trim().split_once('=').is_none_or(|(key, _)| key != name);
        let rest: Vec<&str> = line.split(';').filter(is_other).map(str::trim).collect();
        if !rest.is_empty() {
            lines.push(rest.join("; "));
        }
    }
    fields.remove(b"cookie");
    for line in lines {
        fields.push(b"cookie", line.as_bytes());
    }
}

#[cfg(test)]
mod tests;
