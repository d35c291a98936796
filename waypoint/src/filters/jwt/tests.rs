#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests"
)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use model::http::{ClaimHeader, KeySource};
use serde_json::json;

use super::*;
use crate::http::head::{Fields, RequestHead};
use crate::providers::fetch::{Fetch, FetchError, Fetching};
use crate::providers::keys::KeySet;

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Private keys, and the set of their public ones.
struct Issuer {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    ed25519: Ed25519KeyPair,
}

impl Issuer {
    fn new() -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self {
            rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
            p256: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            ed25519: Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap(),
        }
    }

    fn set(&self) -> Value {
        let public = self.rsa.public_key();
        let (n, e) = (public.modulus(), public.exponent());
        let (n, e) = (n.big_endian_without_leading_zero(), e.big_endian_without_leading_zero());
        let point = self.p256.public_key().as_ref();
        json!({ "keys": [
            { "kty": "RSA", "kid": "r", "use": "sig", "n": b64(n), "e": b64(e) },
            { "kty": "EC", "kid": "e", "crv": "P-256", "x": b64(&point[1..33]), "y": b64(&point[33..]) },
            { "kty": "OKP", "kid": "o", "crv": "Ed25519", "x": b64(self.ed25519.public_key().as_ref()) },
            { "kty": "oct", "kid": "s", "k": b64("a secret of nobody") },
        ] })
    }

    fn sign(&self, header: &Value, payload: &Value) -> String {
        let message = format!("{}.{}", b64(header.to_string()), b64(payload.to_string()));
        let rsa = |padding: &'static dyn signature::RsaEncoding| {
            let mut out = vec![0; self.rsa.public_modulus_len()];
            self.rsa.sign(padding, &SystemRandom::new(), message.as_bytes(), &mut out).unwrap();
            out
        };
        let signature = match header["alg"].as_str().unwrap_or("none") {
            "RS256" => rsa(&signature::RSA_PKCS1_SHA256),
            "RS512" => rsa(&signature::RSA_PKCS1_SHA512),
            "PS256" => rsa(&signature::RSA_PSS_SHA256),
            "PS384" => rsa(&signature::RSA_PSS_SHA384),
            "ES256" => self.p256.sign(&SystemRandom::new(), message.as_bytes()).unwrap().as_ref().to_vec(),
            "EdDSA" => self.ed25519.sign(message.as_bytes()).as_ref().to_vec(),
            // What whoever confuses algorithms would sign with: the public key as a secret.
            "HS256" => {
                let key =
                    aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, self.rsa.public_key().as_ref());
                aws_lc_rs::hmac::sign(&key, message.as_bytes()).as_ref().to_vec()
            }
            _ => Vec::new(),
        };
        format!("{message}.{}", b64(signature))
    }

    fn token(&self, payload: &Value) -> String {
        self.sign(&json!({ "alg": "ES256", "kid": "e" }), payload)
    }
}

fn rule(keys: &Value) -> TokenRule {
    TokenRule {
        issuer: Some("i".into()),
        audiences: Box::default(),
        keys: KeySource::Inline(keys.to_string().as_str().into()),
        places: TokenPlace::defaults(),
        forward: false,
        payload_header: None,
        claim_headers: Box::default(),
        space_delimited: Box::default(),
        timeout: Duration::from_secs(5),
    }
}

/// Fetches nothing.
struct Nowhere;

impl Fetch for Nowhere {
    fn fetch(&self, url: &str, _: Duration) -> Fetching {
        let error = FetchError::Url(url.to_owned());
        Box::pin(async move { Err(error) })
    }
}

fn authenticator(rules: &[&Arc<TokenRule>], runtime: &tokio::runtime::Runtime) -> Authenticator {
    let keys = Jwks::new(Arc::new(Nowhere), runtime.handle().clone());
    keys.follow_rules(rules.iter().copied());
    Authenticator::new(Arc::new(keys), 64)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn request(method: &str, target: &str, fields: &[(&str, &str)]) -> RequestHead {
    let mut head = RequestHead { fields: Fields::default(), ..RequestHead::default() };
    head.set_method(method);
    head.set_target(target);
    head.set_authority("shop");
    for (name, value) in fields {
        head.fields.push(name.as_bytes(), value.as_bytes());
    }
    head
}

fn bearer(token: &str) -> RequestHead {
    request("GET", "/", &[("Authorization", &format!("Bearer {token}"))])
}

const NOW: u64 = 1_800_000_000;

/// The status (0 for what passes), and what is said.
fn verdict(outcome: &Outcome) -> (u16, String) {
    match outcome {
        Outcome::Passed(claims) => {
            (0, claims.as_ref().and_then(|c| c.principal().map(str::to_owned)).unwrap_or_default())
        }
        Outcome::Refused(response, _) => {
            (response.status, String::from_utf8_lossy(&response.body).into_owned())
        }
        Outcome::Wait(_) => (1, "waits".to_owned()),
    }
}

fn ask(rule: &Arc<TokenRule>, head: &mut RequestHead) -> (u16, String) {
    let runtime = runtime();
    verdict(&authenticator(&[rule], &runtime).by_rules(&[rule], head, Patience::Left, NOW))
}

#[test]
fn each_algorithm_is_verified_with_its_keys_and_no_other() {
    let issuer = Issuer::new();
    let rule = Arc::new(rule(&issuer.set()));
    let payload = json!({ "iss": "i", "sub": "s" });
    for (alg, kid) in
        [("RS256", "r"), ("RS512", "r"), ("PS256", "r"), ("PS384", "r"), ("ES256", "e"), ("EdDSA", "o")]
    {
        let token = issuer.sign(&json!({ "alg": alg, "kid": kid }), &payload);
        assert_eq!(ask(&rule, &mut bearer(&token)), (0, "i/s".to_owned()), "{alg}");
        // Without a name all keys are tried.
        let token = issuer.sign(&json!({ "alg": alg }), &payload);
        assert_eq!(ask(&rule, &mut bearer(&token)).0, 0, "{alg}");
    }
    let no_key = "Jwks doesn't have key to match kid or alg from Jwt";
    for (header, said) in [
        (json!({ "alg": "none" }), "Jwt header [alg] is not supported"),
        (json!({ "alg": "HS256", "kid": "r" }), "Jwt header [alg] is not supported"),
        (json!({ "alg": "HS256", "kid": "s" }), "Jwt header [alg] is not supported"),
        (json!({ "alg": "es256", "kid": "e" }), "Jwt header [alg] is not supported"),
        (json!({ "kid": "e" }), "Jwt header [alg] field is required and must be a string"),
        (json!({ "alg": 7 }), "Jwt header [alg] field is required and must be a string"),
        (json!({ "alg": "ES256", "kid": "r" }), no_key),
        (json!({ "alg": "ES256", "kid": "other" }), no_key),
        (json!({ "alg": "ES256", "kid": 1 }), "Jwt header [kid] field is not a string"),
        (json!({ "alg": "ES256", "crit": ["exp"] }), "Jwt header [crit] is not supported"),
    ] {
        let token = issuer.sign(&header, &payload);
        assert_eq!(ask(&rule, &mut bearer(&token)), (401, said.to_owned()), "{header}");
    }
    // An RSA signature under the name of another padding.
    let good = issuer.sign(&json!({ "alg": "RS256", "kid": "r" }), &payload);
    let signature = good.rsplit_once('.').unwrap().1;
    let forged = format!("{}.{}.{signature}", b64(r#"{"alg":"PS256","kid":"r"}"#), b64(payload.to_string()));
    assert_eq!(ask(&rule, &mut bearer(&forged)), (401, "Jwt verification fails".to_owned()));
    let changed = good.replace(&b64(payload.to_string()), &b64(r#"{"iss":"i","sub":"admin"}"#));
    assert_eq!(ask(&rule, &mut bearer(&changed)), (401, "Jwt verification fails".to_owned()));
}

#[test]
fn tokens_of_others_are_verified() {
    // RFC 7515 appendices A.2 (RS256) and A.3 (ES256), RFC 8037 appendix A.4 (Ed25519): their keys and signatures.
    let message = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let signature = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
    let keys = json!({ "keys": [
        { "kty": "EC", "crv": "P-256",
          "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
          "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0" },
        { "kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" },
    ] });
    let mut joe = rule(&keys);
    joe.issuer = Some("joe".into());
    let joe = Arc::new(joe);
    let runtime = runtime();
    let at = |seconds| {
        let mut head = bearer(&format!("{message}.{signature}"));
        verdict(&authenticator(&[&joe], &runtime).by_rules(&[&joe], &mut head, Patience::Left, seconds)).0
    };
    assert_eq!((at(1_300_819_380), at(1_300_819_440), at(1_300_819_441)), (0, 0, 401), "a minute of leeway");
    let set = KeySet::parse(keys.to_string().as_bytes()).unwrap();
    let signature = URL_SAFE_NO_PAD
        .decode("hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg")
        .unwrap();
    let message = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    assert_eq!(set.verify(crate::providers::keys::Algorithm::EdDsa, None, message, &signature), Ok(()));
}

#[test]
fn what_a_token_says_must_suit_the_rule() {
    let issuer = Issuer::new();
    let mut strict = rule(&issuer.set());
    strict.audiences = ["https://shop.example/".into(), "b".into()].into();
    let strict = Arc::new(strict);
    for (payload, status, said) in [
        (json!({ "iss": "i", "aud": "shop.example" }), 0, ""),
        (json!({ "iss": "i", "aud": ["x", "b"] }), 0, ""),
        (json!({ "iss": "i", "aud": ["x"] }), 403, "Audiences in Jwt are not allowed"),
        (json!({ "iss": "i" }), 403, "Audiences in Jwt are not allowed"),
        (json!({ "iss": "j", "aud": "b" }), 401, "Jwt issuer is not configured"),
        (json!({ "aud": "b" }), 401, "Jwt issuer is not configured"),
        (json!({ "iss": "i", "aud": "b", "exp": NOW - 60 }), 0, ""),
        (json!({ "iss": "i", "aud": "b", "exp": NOW - 61 }), 401, "Jwt is expired"),
        (json!({ "iss": "i", "aud": "b", "exp": 0 }), 401, "Jwt is expired"),
        (json!({ "iss": "i", "aud": "b", "nbf": NOW + 60 }), 0, ""),
        (json!({ "iss": "i", "aud": "b", "nbf": NOW + 61 }), 401, "Jwt not yet valid"),
    ] {
        let got = ask(&strict, &mut bearer(&issuer.token(&payload)));
        assert_eq!(got, (status, said.to_owned()), "{payload}");
    }
    let of_the_wrong_type = "Jwt payload has a registered claim of the wrong type";
    for payload in [
        json!({ "iss": 1 }),
        json!({ "iss": "i", "sub": {} }),
        json!({ "iss": "i", "aud": [1] }),
        json!({ "iss": "i", "exp": "tomorrow" }),
        json!({ "iss": "i", "exp": -1 }),
        json!({ "iss": "i", "nbf": 1e300 }),
    ] {
        assert_eq!(ask(&strict, &mut bearer(&issuer.token(&payload))), (401, of_the_wrong_type.to_owned()));
    }
}

#[test]
fn what_is_no_token_is_refused_and_none_passes() {
    let issuer = Issuer::new();
    let rule = Arc::new(rule(&issuer.set()));
    let form = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections";
    for (text, said) in [
        ("", form),
        ("a", form),
        ("a.b", form),
        ("a.b.c.d", form),
        ("!.b.c", "Jwt header is an invalid Base64url encoded"),
        ("e30.b.c", "Jwt header [alg] field is required and must be a string"),
        ("bm8.b.c", "Jwt header is an invalid JSON"),
        ("W10.b.c", "Jwt header is an invalid JSON"),
    ] {
        assert_eq!(ask(&rule, &mut bearer(text)), (401, said.to_owned()), "{text:?}");
    }
    let header = b64(r#"{"alg":"ES256"}"#);
    for (rest, said) in [
        ("=.c", "Jwt payload is an invalid Base64url encoded"),
        ("bm8.c", "Jwt payload is an invalid JSON"),
        ("e30.*", "Jwt signature is an invalid Base64url encoded"),
    ] {
        assert_eq!(ask(&rule, &mut bearer(&format!("{header}.{rest}"))), (401, said.to_owned()), "{rest}");
    }
    assert_eq!(ask(&rule, &mut bearer(&"a".repeat(100_000))).0, 401);
    assert_eq!(ask(&rule, &mut request("GET", "/", &[])), (0, String::new()));
    assert_eq!(ask(&rule, &mut request("GET", "/", &[("Authorization", "Basic eDp5")])), (0, String::new()));
    let preflight = |origin: &str| {
        let fields =
            [("Authorization", "Bearer x"), ("Origin", origin), ("Access-Control-Request-Method", "PUT")];
        ask(&rule, &mut request("OPTIONS", "/", &fields)).0
    };
    assert_eq!((preflight("https://a"), preflight("")), (0, 401));
}

#[test]
fn a_refusal_says_what_kind_of_token_is_wanted() {
    let issuer = Issuer::new();
    let rule = Arc::new(rule(&issuer.set()));
    let runtime = runtime();
    let mut head = request("GET", "/a%22b?secret=1", &[("Authorization", "Bearer x")]);
    let outcome = authenticator(&[&rule], &runtime).by_rules(&[&rule], &mut head, Patience::Left, NOW);
    let Outcome::Refused(response, detail) = outcome else { panic!("passed") };
    let fields: Vec<_> = response.fields.iter().map(|(n, v)| (&**n, &**v)).collect();
    assert_eq!(fields, [("www-authenticate", "Bearer realm=\"http://shop/a%22b\", error=\"invalid_token\"")]);
    assert!(detail.starts_with("jwt_authn_access_denied{Jwt_is_not_in_the_form"), "{detail}");
}

#[test]
fn tokens_are_found_where_the_rule_says_and_go_no_further_unless_it_does() {
    let issuer = Issuer::new();
    let token = issuer.token(&json!({ "iss": "i", "sub": "s" }));
    let mut elsewhere = rule(&issuer.set());
    elsewhere.places = Box::new([
        TokenPlace::Header { name: "x-token".into(), prefix: "Value ".into() },
        TokenPlace::Parameter("tök".into()),
        TokenPlace::Cookie("jwt".into()),
    ]);
    let mut kept = elsewhere.clone();
    kept.forward = true;
    let (elsewhere, kept) = (Arc::new(elsewhere), Arc::new(kept));
    let target = format!("/p?a=1&t%C3%B6k={token}&b=2");
    let cookie = format!("a=1; jwt={token}; b=2");
    let header = format!("Value {token}");
    let make = || {
        [
            request("GET", "/p?a=1", &[("X-Token", &header)]),
            request("GET", &target, &[]),
            request("GET", "/p", &[("Cookie", &cookie)]),
        ]
    };
    for mut head in make() {
        assert_eq!(ask(&elsewhere, &mut head), (0, "i/s".to_owned()));
        let rest: Vec<_> = head
            .fields
            .iter()
            .map(|(n, v)| String::from_utf8_lossy(&[n, b"=", v].concat()).into_owned())
            .collect();
        assert!(!format!("{} {rest:?}", head.target()).contains(&token), "{} {rest:?}", head.target());
    }
    let mut all = make();
    for head in &mut all {
        ask(&elsewhere, head);
    }
    assert_eq!(all[1].target(), "/p?a=1&b=2");
    assert_eq!(all[2].fields.values(b"cookie").collect::<Vec<_>>(), [b"a=1; b=2"]);
    for mut head in make() {
        let before = (head.target().to_owned(), head.fields.iter().count());
        assert_eq!(ask(&kept, &mut head), (0, "i/s".to_owned()));
        assert_eq!((head.target().to_owned(), head.fields.iter().count()), before);
    }
    // Elsewhere it is none of ours.
    assert_eq!(ask(&elsewhere, &mut bearer(&token)), (0, String::new()));
    assert_eq!(ask(&elsewhere, &mut request("GET", "/", &[("X-Token", &token)])), (0, String::new()));
    // The name of a scheme has no case.
    let defaults = Arc::new(rule(&issuer.set()));
    let mut head = request("GET", "/", &[("Authorization", &format!("bearer {token}"))]);
    assert_eq!(ask(&defaults, &mut head), (0, "i/s".to_owned()));
    let mut head = request("GET", &format!("/?access_token={token}"), &[]);
    assert_eq!(ask(&defaults, &mut head), (0, "i/s".to_owned()));
    assert_eq!(head.target(), "/");
    // Two of which one is wrong: a service could look at the other.
    let fields = [("Authorization", &*format!("Bearer {token}")), ("Authorization", "Bearer x")];
    assert_eq!(ask(&defaults, &mut request("GET", "/", &fields)).0, 401);
}

#[test]
fn the_service_gets_claims_from_us_alone() {
    let issuer = Issuer::new();
    let payload = json!({
        "iss": "i", "sub": "s", "n": 7, "b": true, "o": { "k": { "l": "deep" } }, "list": ["x"], "bad": "a\r\nb: c"
    });
    let token = issuer.token(&payload);
    let mut shown = rule(&issuer.set());
    shown.payload_header = Some("x-payload".into());
    let claim = |header: &str, claim: &str| ClaimHeader {
        header: header.into(),
        claim: claim.split('.').map(Into::into).collect(),
    };
    shown.claim_headers = [
        claim("x-n", "n"),
        claim("x-b", "b"),
        claim("x-deep", "o.k.l"),
        claim("x-list", "list"),
        claim("x-bad", "bad"),
        claim("x-none", "none"),
    ]
    .into();
    let shown = Arc::new(shown);
    let spoofed = [("X-Payload", "mine"), ("x-N", "8"), ("x-none", "mine"), ("X-Bad", "mine")];
    let mut head = bearer(&token);
    for (name, value) in spoofed {
        head.fields.push(name.as_bytes(), value.as_bytes());
    }
    assert_eq!(ask(&shown, &mut head), (0, "i/s".to_owned()));
    let all: Vec<_> = head
        .fields
        .iter()
        .map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), String::from_utf8_lossy(v).into_owned()))
        .collect();
    let wanted = [
        ("x-payload", b64(payload.to_string())),
        ("x-n", "7".to_owned()),
        ("x-b", "true".to_owned()),
        ("x-deep", "deep".to_owned()),
        ("x-list", STANDARD.encode(r#"["x"]"#)),
    ];
    assert_eq!(all, wanted.map(|(n, v)| (n.to_owned(), v)));
    // Without a token, too.
    let mut head = request("GET", "/", &spoofed);
    assert_eq!(ask(&shown, &mut head).0, 0);
    assert_eq!(head.fields.iter().count(), 0);
}

#[test]
fn the_first_rule_that_takes_a_token_vouches_for_the_request() {
    let (one, other) = (Issuer::new(), Issuer::new());
    let mut second = rule(&other.set());
    second.issuer = Some("j".into());
    let (first, second) = (Arc::new(rule(&one.set())), Arc::new(second));
    let runtime = runtime();
    let rules = [&first, &second];
    let both = authenticator(&rules, &runtime);
    let ask = |token: &str| verdict(&both.by_rules(&rules, &mut bearer(token), Patience::Left, NOW));
    assert_eq!(ask(&one.token(&json!({ "iss": "i", "sub": "1" }))), (0, "i/1".to_owned()));
    assert_eq!(ask(&other.token(&json!({ "iss": "j", "sub": "2" }))), (0, "j/2".to_owned()));
    assert_eq!(ask(&other.token(&json!({ "iss": "i" }))).1, "Jwt verification fails");
    assert_eq!(ask(&one.token(&json!({ "iss": "k" }))).1, "Jwt issuer is not configured");
}

#[test]
fn a_token_that_comes_again_is_looked_up_for_its_rule_keys_and_time() {
    let issuer = Issuer::new();
    let rule = Arc::new(rule(&issuer.set()));
    let runtime = runtime();
    let known = authenticator(&[&rule], &runtime);
    let ask =
        |token: &str, now| verdict(&known.by_rules(&[&rule], &mut bearer(token), Patience::Left, now)).0;
    let token = issuer.token(&json!({ "iss": "i", "exp": NOW }));
    assert_eq!((ask(&token, NOW), ask(&token, NOW)), (0, 0));
    assert_eq!((known.stats.taken.get(), known.stats.known.get()), (2, 1));
    assert_eq!(ask(&token, NOW + 61), 401, "what is kept expires, too");
    let another = Arc::new(super::tests::rule(&Issuer::new().set()));
    known.keys.follow_rules([&rule, &another].into_iter());
    let outcome = known.by_rules(&[&another], &mut bearer(&token), Patience::Left, NOW);
    assert_eq!(verdict(&outcome).0, 401, "another rule has not taken it");
    // However many there are, what is kept is limited.
    for n in 0..500 {
        assert_eq!(ask(&issuer.token(&json!({ "iss": "i", "n": n })), NOW), 0);
    }
    assert!((16..=96).contains(&known.remembered()), "{}", known.remembered());
}

/// Gives out documents that a test sets, and counts how often it was asked.
#[derive(Default)]
struct Documents {
    document: Mutex<Option<String>>,
    asked: AtomicU64,
}

impl Fetch for Arc<Documents> {
    fn fetch(&self, url: &str, limit: Duration) -> Fetching {
        assert!(limit > Duration::ZERO);
        self.asked.fetch_add(1, Relaxed);
        let document = self.document.lock().unwrap().clone();
        let document = if url.ends_with("/.well-known/openid-configuration") {
            Some(json!({ "issuer": "http://i/", "jwks_uri": "http://i/keys" }).to_string())
        } else {
            document
        };
        Box::pin(async move {
            tokio::task::yield_now().await;
            document.map(Bytes::from).ok_or(FetchError::Content("away".to_owned()))
        })
    }
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_kept_and_fetched_again_when_a_token_names_a_new_one() {
    let (old, new) = (Issuer::new(), Issuer::new());
    let documents = Arc::new(Documents::default());
    *documents.document.lock().unwrap() = Some(old.set().to_string());
    let mut fetched = rule(&json!({}));
    fetched.keys = KeySource::Discovered("http://i".into());
    let fetched = Arc::new(fetched);
    let keys = Arc::new(Jwks::new(Arc::new(documents.clone()), tokio::runtime::Handle::current()));
    keys.follow_rules([&fetched].into_iter());
    let authenticator = Authenticator::new(keys.clone(), 64);
    let ask = |token: &str, patience| authenticator.by_rules(&[&fetched], &mut bearer(token), patience, NOW);
    let token = old.token(&json!({ "iss": "i" }));
    // The first request waits for the first attempt.
    let Outcome::Wait(attempt) = ask(&token, Patience::Left) else { panic!("did not wait") };
    attempt.wait().await;
    assert_eq!(verdict(&ask(&token, Patience::Left)).0, 0);
    keys.tried().await;
    // The issuer rotates, under another name.
    let rotated = new.set().to_string().replace("\"e\"", "\"f\"").replace("\"y\":\"f\"", "\"y\":\"e\"");
    let rotated = rotated.replace("\"f\":\"AQAB\"", "\"e\":\"AQAB\"");
    *documents.document.lock().unwrap() = Some(rotated);
    let asked = documents.asked.load(Relaxed);
    let token = new.sign(&json!({ "alg": "ES256", "kid": "f" }), &json!({ "iss": "i" }));
    let Outcome::Wait(attempt) = ask(&token, Patience::Left) else { panic!("did not ask again") };
    attempt.wait().await;
    assert_eq!(verdict(&ask(&token, Patience::Spent)).0, 0);
    assert!(documents.asked.load(Relaxed) > asked);
    // Whoever makes names up does not make us ask more often.
    let asked = documents.asked.load(Relaxed);
    for n in 0..100 {
        let token = new.sign(&json!({ "alg": "ES256", "kid": format!("x{n}") }), &json!({ "iss": "i" }));
        assert_eq!(verdict(&ask(&token, Patience::Left)).0, 401);
    }
    assert_eq!(documents.asked.load(Relaxed), asked);
    // The issuer is away, or out of its mind: what there was stays.
    for document in [None, Some("{}".to_owned()), Some(json!({ "keys": [] }).to_string())] {
        *documents.document.lock().unwrap() = document;
        let failed = keys.stats().failed.get();
        while keys.stats().failed.get() == failed {
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        assert_eq!(verdict(&ask(&token, Patience::Left)).0, 0);
    }
    assert_eq!((keys.stats().issuers.get(), keys.stats().without_keys.get()), (1, 0));
    // An issuer that no rule names is forgotten, and asked no more.
    keys.follow_rules(std::iter::empty());
    while keys.stats().issuers.get() > 0 {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    let asked = documents.asked.load(Relaxed);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(documents.asked.load(Relaxed), asked);
}

#[tokio::test(start_paused = true)]
async fn without_keys_tokens_are_refused_and_requests_without_one_pass() {
    let issuer = Issuer::new();
    let documents = Arc::new(Documents::default());
    let mut fetched = rule(&json!({}));
    fetched.keys = KeySource::Url("http://i/keys".into());
    let fetched = Arc::new(fetched);
    let keys = Arc::new(Jwks::new(Arc::new(documents.clone()), tokio::runtime::Handle::current()));
    keys.follow_rules([&fetched].into_iter());
    let authenticator = Authenticator::new(keys.clone(), 64);
    keys.tried().await;
    let ask =
        |head: &mut RequestHead| verdict(&authenticator.by_rules(&[&fetched], head, Patience::Left, NOW));
    let token = issuer.token(&json!({ "iss": "i", "sub": "s" }));
    assert_eq!(ask(&mut bearer(&token)), (401, "Jwks remote fetch is failed".to_owned()));
    assert_eq!(ask(&mut bearer(&issuer.token(&json!({ "iss": "j" })))).1, "Jwt issuer is not configured");
    assert_eq!(ask(&mut request("GET", "/", &[])).0, 0);
    // It is asked again and again, and once it answers all is well.
    *documents.document.lock().unwrap() = Some(issuer.set().to_string());
    while keys.stats().fetched.get() == 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(ask(&mut bearer(&token)), (0, "i/s".to_owned()));
}

#[test]
#[ignore = "a measurement: run it alone, in a release build"]
fn time_of_a_token() {
    let issuer = Issuer::new();
    let rule = Arc::new(rule(&issuer.set()));
    let runtime = runtime();
    let known = authenticator(&[&rule], &runtime);
    let padding = "x".repeat(400);
    for (alg, kid) in [("ES256", "e"), ("RS256", "r"), ("EdDSA", "o")] {
        let token = |n: u32| {
            let payload = json!({ "iss": "i", "sub": "s", "n": n, "exp": NOW + 3600, "padding": padding });
            issuer.sign(&json!({ "alg": alg, "kid": kid }), &payload)
        };
        let unique: Vec<RequestHead> = (0..2000).map(|n| bearer(&token(n))).collect();
        let repeated = vec![bearer(&token(0)); 20_000];
        for (what, heads) in [("unique", unique), ("repeated", repeated)] {
            let count = heads.len();
            let begin = tokio::time::Instant::now();
            for mut head in heads {
                let outcome = known.by_rules(&[&rule], &mut head, Patience::Left, NOW);
                assert_eq!(verdict(&outcome).0, 0);
            }
            let each = begin.elapsed() / u32::try_from(count).unwrap();
            println!("{alg}, {what} tokens: {each:?} each");
        }
    }
}
