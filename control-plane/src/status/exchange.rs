//! What control planes tell each other of their proxies: the page that answers, and how who asks proves that it is one.
//!
//! An answer has how many proxies are connected, the policies that not all of them enforce, and which versions of which
//! policies it is about. Who asks again says what it has had: where nothing changed, the answer is a few hundred bytes,
//! whatever the number of policies.
//!
//! The page names policies and pods, so it is for control planes only. They have in common the key that signs
//! certificates; who asks sends a proof made with a key derived from it over the time and over what is asked
//! (HMAC-SHA256). The answer is as secret as the TLS below it, under the mesh's own root. What costs something is done
//! once in a while ([`KEPT`]), whoever asks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::hmac;
use identity::Clock;
use process::http::{Request, Response, Routes, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use xds::server::Server;

use super::conditions::Tally;
use super::followers::Followers;
use super::is_policy;
use super::proxies::Proxies;

/// The page.
pub const PATH: &str = "/debug/enforcement";
/// The scheme of the `authorization` header.
const SCHEME: &str = "Culvert";
/// How far the clocks of two control planes may be apart.
const SKEW: Duration = Duration::from_secs(120);
/// How long an answer is kept for others who ask.
const KEPT: Duration = Duration::from_millis(250);

/// What is asked: what came after this.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Question {
    /// The process whose numbers these are; 0 for who has had no answer.
    pub epoch: u64,
    /// The last number that was answered for.
    pub number: u64,
    /// The names of proxies that were in the last answer.
    pub names: u64,
}

impl Question {
    /// The target of a request.
    #[must_use]
    pub fn target(&self) -> String {
        format!("{PATH}?epoch={}&number={}&names={}", self.epoch, self.number, self.names)
    }

    fn of(request: &Request) -> Self {
        let number = |key| request.query(key).and_then(|text| text.parse().ok()).unwrap_or_default();
        Self { epoch: number("epoch"), number: number("number"), names: number("names") }
    }
}

/// A version of a policy that an answer is about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Version {
    /// The policy.
    pub policy: String,
    /// Its uid; empty when it is gone.
    pub uid: String,
    /// Which version.
    pub generation: i64,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The revision of who answers.
    pub revision: String,
    /// Which process this is.
    pub epoch: u64,
    /// The last change that the answer is about.
    pub number: u64,
    /// Whether `versions` has all policies, and not only those that changed since.
    pub whole: bool,
    /// The policies that it is about.
    pub versions: Vec<Version>,
    /// How many of its proxies say what they enforce.
    pub ours: usize,
    /// How many are of another make.
    pub others: usize,
    /// Which names of proxies these are.
    pub names_id: u64,
    /// The names of its proxies, unless who asks has them.
    pub names: Option<Arc<[Arc<str>]>>,
    /// The policies that not all of its proxies enforce.
    pub exceptions: BTreeMap<String, Tally>,
}

/// The state at one time, of which answers are made.
struct Snapshot {
    at: Instant,
    number: u64,
    ours: usize,
    others: usize,
    names_id: u64,
    names: Arc<[Arc<str>]>,
    exceptions: BTreeMap<String, Tally>,
}

/// Answers other control planes.
pub struct Exchange {
    /// The policies.
    pub followers: Followers,
    /// The proxies.
    pub server: Server,
    /// This control plane's revision.
    pub revision: String,
    /// Who may ask.
    pub keys: Keys,
    kept: Mutex<Option<Arc<Snapshot>>>,
}

impl Exchange {
    /// For these proxies and policies.
    #[must_use]
    pub fn new(followers: Followers, server: Server, revision: String, keys: Keys) -> Arc<Self> {
        Arc::new(Self { followers, server, revision, keys, kept: Mutex::default() })
    }

    /// Adds the page.
    #[must_use]
    pub fn routes(self: Arc<Self>, routes: Routes) -> Routes {
        routes.get(PATH, "what proxies enforce, for other control planes", move |request| {
            let response = self.respond(&request);
            async { response }
        })
    }

    fn respond(&self, request: &Request) -> Response {
        let question = Question::of(request);
        match self.keys.check(request.authorization(), &question.target()) {
            Ok(()) => Response::json(&self.answer(&question)),
            Err(reason) => Response::text(StatusCode::FORBIDDEN, format!("{reason}\n")),
        }
    }

    /// The answer to a question.
    #[must_use]
    pub fn answer(&self, question: &Question) -> Answer {
        let snapshot = self.snapshot();
        let table = self.followers.lock();
        let goes_on = question.epoch == self.followers.epoch()
            && question.number <= snapshot.number
            && table.reaches(question.number);
        let after = if goes_on { question.number } else { 0 };
        // Nothing later than the exceptions: of a newer version these don't say who does not have it yet.
        let changed = table.between(after, snapshot.number).filter(|(name, _)| is_policy(name.kind));
        let versions = changed
            .filter(|(_, followed)| goes_on || followed.is_some())
            .map(|(name, followed)| Version {
                policy: name.to_string(),
                uid: followed.map_or_else(String::new, |f| f.state.version.uid.to_string()),
                generation: followed.map_or(0, |f| f.state.version.generation),
            })
            .collect();
        Answer {
            revision: self.revision.clone(),
            epoch: self.followers.epoch(),
            number: snapshot.number,
            whole: !goes_on,
            versions,
            ours: snapshot.ours,
            others: snapshot.others,
            names_id: snapshot.names_id,
            names: (!goes_on || question.names != snapshot.names_id).then(|| snapshot.names.clone()),
            exceptions: snapshot.exceptions.clone(),
        }
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = kept.as_ref().filter(|snapshot| snapshot.at.elapsed() < KEPT) {
            return snapshot.clone();
        }
        let proxies = Proxies::of(&self.server);
        let table = self.followers.lock();
        let exceptions = proxies.exceptions(&table).into_iter();
        let snapshot = Arc::new(Snapshot {
            at: Instant::now(),
            number: table.last(),
            ours: proxies.ours(),
            others: proxies.others(),
            names_id: id_of(proxies.names()),
            names: proxies.names().clone(),
            exceptions: exceptions.map(|(name, tally)| (name.to_string(), tally)).collect(),
        });
        *kept = Some(snapshot.clone());
        snapshot
    }
}

/// Tells lists of names apart.
fn id_of(names: &[Arc<str>]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    hasher.finish()
}

/// Gives each of the secrets that control planes have in common to a function: first the one to prove with.
pub type Secrets = Arc<dyn Fn(&mut dyn FnMut(&[u8])) + Send + Sync>;

/// The keys that control planes have in common: of who signs, and, while the root is exchanged, of who will.
#[derive(Clone)]
pub struct Keys {
    secrets: Secrets,
    clock: Clock,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    /// Keys that are derived from these secrets.
    #[must_use]
    pub fn new(secrets: Secrets, clock: Clock) -> Self {
        Self { secrets, clock }
    }

    fn all(&self) -> Vec<hmac::Key> {
        let mut keys = Vec::new();
        (self.secrets)(&mut |secret| keys.push(derive(secret)));
        keys
    }

    /// A proof for a request of this target; `None` while there is no key.
    #[must_use]
    pub fn prove(&self, target: &str) -> Option<String> {
        let key = self.all().into_iter().next()?;
        let time = self.clock.now().as_secs();
        let tag = hmac::sign(&key, signed(time, target).as_bytes());
        Some(format!("{SCHEME} {time}:{}", hex(tag.as_ref())))
    }

    /// Checks a proof.
    ///
    /// # Errors
    /// Why it is none.
    pub fn check(&self, proof: Option<&str>, target: &str) -> Result<(), &'static str> {
        const WANTED: &str = "this page is for the control planes of this mesh";
        let proof = proof.and_then(|p| p.strip_prefix(SCHEME)).and_then(|p| p.strip_prefix(' '));
        let (time, tag) = proof.and_then(|p| p.split_once(':')).ok_or(WANTED)?;
        let (time, tag) = (time.parse::<u64>().map_err(|_| WANTED)?, unhex(tag).ok_or(WANTED)?);
        let signed = signed(time, target);
        if !self.all().iter().any(|key| hmac::verify(key, signed.as_bytes(), &tag).is_ok()) {
            return Err(WANTED);
        }
        if self.clock.now().as_secs().abs_diff(time) > SKEW.as_secs() {
            return Err("the proof is of another time: the clocks of two control planes are too far apart");
        }
        Ok(())
    }
}

/// What a proof is made over.
fn signed(time: u64, target: &str) -> String {
    format!("GET {target}\n{time}")
}

/// A key for this purpose only.
fn derive(secret: &[u8]) -> hmac::Key {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let derived = hmac::sign(&key, b"culvert: what proxies enforce, between control planes, 1");
    hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    let digits = digits.filter(|digits| digits.len() == 64)?;
    digits.chunks(2).map(|pair| pair.first().zip(pair.get(1)).map(|(a, b)| a << 4 | b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct At(u64);

    impl rustls::time_provider::TimeProvider for At {
        fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
            Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(self.0)))
        }
    }

    fn keys(secrets: &'static [&'static str], second: u64) -> Keys {
        let all =
            move |take: &mut dyn FnMut(&[u8])| secrets.iter().for_each(|secret| take(secret.as_bytes()));
        Keys::new(Arc::new(all), Clock::new(Arc::new(At(second))))
    }

    #[test]
    fn only_who_has_the_key_may_ask_at_this_time_for_this() {
        let target = Question { epoch: 1, number: 2, names: 3 }.target();
        let proof = keys(&["a"], 10_000).prove(&target).unwrap();
        let check = |keys: &Keys, proof: &str, target: &str| keys.check(Some(proof), target);
        assert_eq!(check(&keys(&["a"], 10_000), &proof, &target), Ok(()));
        assert_eq!(check(&keys(&["a"], 10_100), &proof, &target), Ok(()), "clocks differ");
        assert_eq!(check(&keys(&["b", "a"], 10_000), &proof, &target), Ok(()), "the root is being exchanged");
        assert!(check(&keys(&["b"], 10_000), &proof, &target).is_err());
        assert!(check(&keys(&[], 10_000), &proof, &target).is_err());
        assert!(check(&keys(&["a"], 10_121), &proof, &target).unwrap_err().contains("clocks"));
        assert!(check(&keys(&["a"], 10_000), &proof, PATH).is_err(), "another question");
        assert!(keys(&["a"], 10_000).check(None, &target).is_err());
        for bad in [
            "",
            "Culvert",
            "Culvert 10000",
            "Culvert 10000:",
            "Culvert x:00",
            "Bearer 1:2",
            "Culvert 10000:ä",
        ] {
            assert!(check(&keys(&["a"], 10_000), bad, &target).is_err(), "{bad}");
        }
        let other_time = proof.replacen("10000", "10001", 1);
        assert!(check(&keys(&["a"], 10_000), &other_time, &target).is_err());
        assert_eq!(keys(&[], 0).prove(&target), None);
    }
}
