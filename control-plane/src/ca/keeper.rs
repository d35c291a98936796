//! The root's life: follows the Secret in every replica, and writes it in the one that leads.
//!
//! Every replica reads the Secret [`SECRET`] every few seconds; that is a GET by name, which no lost watch history and
//! no long silence can spoil. The leader beside that
//! * makes the Secret when there is none: of what is in force, so that a deleted Secret comes back; else of `cacerts`;
//!   else of a new root. Whoever comes second (409) takes what the first wrote;
//! * takes `cacerts` over when it changes, in stages if its root is another one;
//! * takes the next stage of a rotation when its gate opens; begins one itself when a root that was made here has less
//!   than [`KeeperSettings::renew_before`] left.
//!
//! People steer a rotation by annotations of the Secret, which are removed when they were followed:
//!
//! | annotation                     | value | |
//! |--------------------------------|-------|-|
//! | `culvert.dev/rotate-root`      | any   | begin a rotation to a root that is made |
//! | `culvert.dev/accept-rotation`  | `sign` or `drop` | pass that gate although not all are ready; the log names who is not |
//! | `culvert.dev/abandon-rotation` | any   | take the first stage back |
//! | `culvert.dev/rotation`         | is written here | how far it is, and whom it waits for |
//!
//! A stage is one write with the resource version that was read, so that two leaders can't take two steps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use identity::rotation::Stage;
use identity::{CertificateAuthority, Validity};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::current::{Current, InForce, MAX_STALE};
use super::record::{Record, SecretData, SecretError, SecretName, Signer, TlsForm};
use super::rotation::{self, Gates, Ground, Proxy, Step, Target, Waiting};

/// The Secret of our own.
pub const SECRET: &str = "culvert-ca-secret";
/// The Secret of a given authority.
pub const GIVEN_SECRET: &str = "cacerts";
/// Begins a rotation.
pub const ROTATE: &str = "culvert.dev/rotate-root";
/// Passes a gate.
pub const ACCEPT: &str = "culvert.dev/accept-rotation";
/// Takes a rotation back.
pub const ABANDON: &str = "culvert.dev/abandon-rotation";
/// How far a rotation is.
pub const STATUS: &str = "culvert.dev/rotation";

/// A given authority that has less left is warned of; or less than a part of its life, where that is shorter: who renews it by
/// himself, as cert-manager does in its last third or so, is not late before.
const ENDS_SOON: Duration = Duration::from_secs(30 * 24 * 3600);
const LAST_PART: u32 = 6;
/// So long a replica may go on signing by what it read last; five minutes more for clocks that differ.
const STALE: Duration = Duration::from_secs(MAX_STALE.as_secs() + 300);

/// Who trusts the CA and must know of a new root before it signs: proxies, and what else judges certificates of it,
/// such as the webhooks' `caBundle`.
pub trait Fleet: Send + Sync + 'static {
    /// All that are live, each with the roots that it has said to trust ([`super::trusted_roots`]); `None` while that is
    /// not known, as before the pods were read.
    fn proxies(&self) -> Option<Vec<Proxy>>;

    /// Those that are taken for dead and not among them, each with the reason.
    fn dead(&self) -> Vec<String> {
        Vec::new()
    }

    /// These keep a rotation waiting, of those above: looks closer whether they live.
    fn doubt<'a>(&'a self, laggards: &'a [String]) -> BoxFuture<'a, ()> {
        let _ = laggards;
        Box::pin(std::future::ready(()))
    }
}

/// How the authority is kept.
#[derive(Clone, Debug)]
pub struct KeeperSettings {
    /// Where the Secrets are.
    pub namespace: String,
    /// How often they are read.
    pub poll: Duration,
    /// How long a root that is made here is valid.
    pub root_validity: Validity,
    /// A root that was made here is exchanged when it has less left.
    pub renew_before: Duration,
    /// So long before the signing certificate expires the new root signs, whoever does not trust it yet.
    pub deadline: Duration,
    /// The longest lifetime of a certificate that is given.
    pub max_lifetime: Duration,
}

impl KeeperSettings {
    /// The usual: roots of ten years, exchanged in the last.
    #[must_use]
    pub fn new(namespace: String, max_lifetime: Duration) -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            namespace,
            poll: Duration::from_secs(5),
            root_validity: Validity::of_roots(),
            renew_before: 365 * day,
            deadline: 7 * day,
            max_lifetime,
        }
    }
}

/// Why a round did nothing.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{what} Secret {name}: {source}")]
    Api {
        what: &'static str,
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error(transparent)]
    Ca(#[from] identity::CaError),
    #[error("the state of a rotation can't be written: {0}")]
    State(#[from] serde_json::Error),
}

/// Follows and writes the Secrets; see the module.
pub struct Keeper {
    api: Api<Secret>,
    own: SecretName,
    given: SecretName,
    settings: KeeperSettings,
    current: Current,
    fleet: Arc<dyn Fleet>,
    leads: watch::Receiver<bool>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Needs the permissions `get`, `create` and `update` on Secrets of the namespace.
    #[must_use]
    pub fn new(
        client: Client,
        settings: KeeperSettings,
        current: Current,
        fleet: Arc<dyn Fleet>,
        leads: watch::Receiver<bool>,
    ) -> Self {
        let named = |name: &str, remedy| SecretName {
            namespace: settings.namespace.clone(),
            name: name.to_owned(),
            remedy,
        };
        Self {
            api: Api::namespaced(client, &settings.namespace),
            own: named(
                SECRET,
                "The last good authority, if this control plane has one, goes on signing. Restore the Secret from a \
                 backup, or delete it: it is then written anew, from the last good authority, or else from cacerts, or \
                 else with a new root, which proxies that know the old one do not trust",
            ),
            given: named(
                GIVEN_SECRET,
                "The authority in force, if there is one, goes on signing. Correct the Secret: ca-cert.pem, ca-key.pem, root-cert.pem and \
                 cert-chain.pem must fit together (openssl verify -CAfile root-cert.pem -untrusted cert-chain.pem \
                 ca-cert.pem); or tls.crt, tls.key and ca.crt, where it has these",
            ),
            settings,
            current,
            fleet,
            leads,
        }
    }

    /// Runs until the process ends.
    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.settings.poll);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.round().await;
            tokio::select! {
                _ = ticks.tick() => {}
                Ok(()) = self.leads.changed() => {}
            }
        }
    }

    /// Reads the Secret once, and does what a leader does.
    pub async fn round(&self) {
        if let Err(error) = self.attempt().await {
            self.current.fail(&error.to_string());
        }
    }

    async fn attempt(&self) -> Result<(), RoundError> {
        let leads = *self.leads.borrow();
        let Some(secret) = self.get(SECRET).await? else {
            if leads {
                return self.create().await;
            }
            self.current.confirm();
            let error = format!(
                "Secret {}/{SECRET} is not there; the replica that leads makes it",
                self.own.namespace
            );
            self.current.fail(&error);
            return Ok(());
        };
        // Whatever it holds: this is the newest there is.
        self.current.confirm();
        let record = self.take(&secret)?;
        if leads { self.lead(secret, record).await } else { Ok(()) }
    }

    /// Checks what a Secret holds, and puts it in force.
    fn take(&self, secret: &Secret) -> Result<Record, SecretError> {
        let record = Record::read(&self.own, secret.data.as_ref().unwrap_or(&SecretData::new()))?;
        if self.current.get().is_some_and(|in_force| in_force.record == record) {
            let in_force = self.current.get();
            let now = self.current.clock().now().as_secs();
            // What was valid when it was read may have expired since: that is told, too.
            if in_force.is_some_and(|in_force| in_force.authority.not_after().as_secs() > now) {
                self.current.recovered();
                return Ok(record);
            }
        }
        let authority = record.authority(&self.own, &self.current.domains(), self.current.clock().now())?;
        self.current.put(InForce::new(record.clone(), authority));
        Ok(record)
    }

    /// Writes the Secret that is not there.
    async fn create(&self) -> Result<(), RoundError> {
        let longest = self.settings.max_lifetime.as_secs();
        let (record, how) = if let Some(in_force) = self.current.get() {
            (in_force.record.clone(), "it was deleted, and is written back as it was")
        } else if let Some(given) = self.given_target().await? {
            (Record::settled(given.signer, given.roots, longest, true), "the authority of cacerts")
        } else {
            let domain = &self.current.domains().own;
            let made = CertificateAuthority::make_root(
                domain,
                self.settings.root_validity,
                self.current.clock().now(),
            )?;
            let roots = made.chain.clone();
            (Record::settled(made.into(), roots, longest, false), "a new root")
        };
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(SECRET.to_owned()),
                namespace: Some(self.own.namespace.clone()),
                ..ObjectMeta::default()
            },
            type_: Some("istio.io/ca-root".to_owned()),
            data: Some(record.write()?),
            ..Secret::default()
        };
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(secret) => {
                tracing::warn!(secret = %self.own.name, "the Secret of the certificate authority was made: {how}");
                self.take(&secret)?;
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => {
                // Another replica was first: its authority is the one.
                let Some(secret) = self.get(SECRET).await? else { return Ok(()) };
                self.current.confirm();
                self.take(&secret)?;
                Ok(())
            }
            Err(source) => Err(self.api_error("create", SECRET, source)),
        }
    }

    /// What the leader changes in a Secret that is whole.
    async fn lead(&self, secret: Secret, record: Record) -> Result<(), RoundError> {
        let Some(in_force) = self.current.get() else { return Ok(()) };
        let mut annotations = secret.metadata.annotations.clone().unwrap_or_default();
        let mut next = record.clone();
        next.state.longest_lifetime_s =
            next.state.longest_lifetime_s.max(self.settings.max_lifetime.as_secs());
        let (given, broken) = match self.given_target().await {
            Ok(given) => (given, None),
            Err(RoundError::Secret(error)) => (None, Some(error.to_string())),
            Err(error) => return Err(error),
        };
        if annotations.remove(ABANDON).is_some() {
            next = rotation::abandon(&next);
        }
        let (waits, waiting);
        (next, waits) = self.follow_target(next, &in_force, given, &mut annotations)?;
        self.current.note_given(broken.or(waits).or_else(|| self.ends_soon(&next, &in_force)));
        (next, waiting) = self.advance(next, &in_force, &mut annotations);
        if let Some(Waiting::Proxies { laggards, .. }) = &waiting {
            // What is not looked at now is in the next round.
            let _ = tokio::time::timeout(self.settings.poll, self.fleet.doubt(laggards)).await;
        }
        let text = waiting.as_ref().map(|waiting| self.describe(waiting));
        self.current.note_rotation(text.clone());
        match text {
            Some(text) => annotations.insert(STATUS.to_owned(), text),
            None => annotations.remove(STATUS),
        };
        self.write(secret, &record, next, annotations).await
    }

    /// What to say of a given authority that is about to expire, which nobody but its giver can renew.
    fn ends_soon(&self, record: &Record, in_force: &InForce) -> Option<String> {
        let end = in_force.authority.not_after();
        let left = end.as_secs().saturating_sub(self.current.clock().now().as_secs());
        // Of one above the signing certificate, which others tend, the whole of the notice is given; also where the signing
        // certificate's end was cut to that one's.
        let signing = record.signer.chain.first();
        let above = record.signer.chain.iter().chain(&record.roots).filter(|other| Some(*other) != signing);
        let from_above = above.filter_map(validity).any(|(_, until)| until == end.as_secs());
        let life = signing.and_then(validity).filter(|_| !from_above).map(|(life, _)| life);
        let late = life.map_or(ENDS_SOON, |life| ENDS_SOON.min(life / LAST_PART));
        let soon = record.state.given && record.state.rotation.is_none() && left < late.as_secs();
        soon.then(|| {
            format!(
                "Secret {}/{GIVEN_SECRET}: the signing certificate, or one above it, expires at {}: put a new one there",
                self.given.namespace,
                identity::Timestamp(end)
            )
        })
    }

    /// Begins the rotation that is due: to what is given, or to a root that is made. The second is why what is given
    /// waits.
    fn follow_target(
        &self,
        record: Record,
        in_force: &InForce,
        given: Option<Target>,
        annotations: &mut BTreeMap<String, String>,
    ) -> Result<(Record, Option<String>), RoundError> {
        let now = self.current.clock().now();
        let stage = record.state.rotation.as_ref().map_or(Stage::Settled, |rotation| rotation.stage);
        let target = match given {
            Some(given) => {
                // A made root would be replaced at once by what is given.
                if annotations.remove(ROTATE).is_some() {
                    tracing::error!(
                        "{ROTATE} is not followed: the authority is given; put the new one into Secret {GIVEN_SECRET}"
                    );
                }
                if !differs(&record, &given) {
                    return Ok((record, None));
                }
                given
            }
            None => {
                let left = in_force.authority.not_after().as_secs().saturating_sub(now.as_secs());
                let expires = !record.state.given && left < self.settings.renew_before.as_secs();
                let asked = annotations.contains_key(ROTATE);
                if stage != Stage::Settled || !(asked || expires) {
                    return Ok((record, None));
                }
                annotations.remove(ROTATE);
                self.made_target()?
            }
        };
        let record = match stage {
            Stage::Settled => record,
            Stage::BothTrusted => rotation::abandon(&record),
            Stage::NewSigns => {
                let name = &self.given.namespace;
                let waits = format!("Secret {name}/{GIVEN_SECRET} waits: another rotation is under way");
                return Ok((record, Some(waits)));
            }
        };
        tracing::warn!(
            old = %in_force.authority.root(),
            new = %target.root,
            given = target.given,
            "the certificate authority is exchanged"
        );
        Ok((rotation::begin(&record, in_force.authority.root(), &target, STALE, now), None))
    }

    /// Takes the next stage if its gate is open.
    fn advance(
        &self,
        record: Record,
        in_force: &InForce,
        annotations: &mut BTreeMap<String, String>,
    ) -> (Record, Option<Waiting>) {
        let Some(rotation) = &record.state.rotation else {
            annotations.remove(ACCEPT);
            return (record, None);
        };
        // What began in this very round is written first, so that proxies can read it.
        if in_force.record.state.rotation.as_ref() != Some(rotation) {
            let proxies = self.fleet.proxies().unwrap_or_default();
            let names = proxies.into_iter().map(|proxy| proxy.name).collect::<Vec<_>>();
            let waiting = match (rotation.stage, rotation.drop_at) {
                (Stage::NewSigns, Some(at)) => Waiting::Until(unix(at)),
                _ => Waiting::Proxies { live: names.len(), laggards: names },
            };
            return (record, Some(waiting));
        }
        let proxies = self.fleet.proxies();
        let gate = if rotation.stage == Stage::BothTrusted { "sign" } else { "drop" };
        let gates = Gates {
            now: self.current.clock().now(),
            proxies: proxies.as_deref(),
            signer_expires: in_force.authority.not_after(),
            deadline: self.settings.deadline,
            accepted: annotations.get(ACCEPT).is_some_and(|accepted| accepted == gate),
        };
        let ground = match rotation::next(rotation, &gates) {
            Step::Wait(waiting) => return (record, Some(waiting)),
            Step::Sign(ground) | Step::Drop(ground) => ground,
        };
        if annotations.get(ACCEPT).is_some_and(|accepted| accepted == gate) {
            annotations.remove(ACCEPT);
        }
        log_step(gate, rotation, &ground);
        let dead = if gate == "sign" { self.fleet.dead() } else { Vec::new() };
        if !dead.is_empty() {
            tracing::warn!(
                not_counted = rotation::some_of(&dead),
                "root rotation: these are taken for dead; one that comes back trusts the new root when it has read it"
            );
        }
        let next = if gate == "sign" {
            rotation::sign(&record, STALE, gates.now)
        } else {
            rotation::drop_old(&record)
        };
        let waiting = next.state.rotation.as_ref().and_then(|rotation| rotation.drop_at);
        (next, waiting.map(|at| Waiting::Until(unix(at))))
    }

    /// How a rotation stands, for people.
    fn describe(&self, waiting: &Waiting) -> String {
        let text = rotation::describe(waiting);
        let dead = match waiting {
            Waiting::Proxies { .. } => self.fleet.dead(),
            Waiting::Unknown | Waiting::Until(_) => Vec::new(),
        };
        if dead.is_empty() { text } else { format!("{text}; not counted: {}", rotation::some_of(&dead)) }
    }

    async fn write(
        &self,
        mut secret: Secret,
        old: &Record,
        next: Record,
        annotations: BTreeMap<String, String>,
    ) -> Result<(), RoundError> {
        let unchanged = secret.metadata.annotations.clone().unwrap_or_default() == annotations;
        if unchanged && *old == next {
            return Ok(());
        }
        // Checked before it is written: nobody could take it over else.
        next.authority(&self.own, &self.current.domains(), self.current.clock().now())?;
        let mut data = secret.data.take().unwrap_or_default();
        for key in old.write()?.keys() {
            data.remove(key);
        }
        data.extend(next.write()?);
        secret.data = Some(data);
        secret.metadata.annotations = Some(annotations);
        match self.api.replace(SECRET, &PostParams::default(), &secret).await {
            Ok(secret) => {
                self.take(&secret)?;
                Ok(())
            }
            // Somebody else wrote it: the next round reads what.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(()),
            Err(source) => Err(self.api_error("update", SECRET, source)),
        }
    }

    /// A new root.
    fn made_target(&self) -> Result<Target, RoundError> {
        let domain = &self.current.domains().own;
        let made =
            CertificateAuthority::make_root(domain, self.settings.root_validity, self.current.clock().now())?;
        let roots = made.chain.clone();
        let signer = Signer::from(made);
        let root = self.check(&self.own, &Record::settled(signer.clone(), roots.clone(), 0, false))?;
        Ok(Target { signer, root, roots, given: false })
    }

    /// What `cacerts` holds; `None` if it is not there.
    async fn given_target(&self) -> Result<Option<Target>, RoundError> {
        let Some(secret) = self.get(GIVEN_SECRET).await? else { return Ok(None) };
        let data = secret.data.unwrap_or_default();
        let read = match TlsForm::of(&data) {
            Some(tls) => self.given(tls.data()).map_err(TlsForm::named),
            None => self.given(&data),
        };
        Ok(Some(read?))
    }

    fn given(&self, data: &SecretData) -> Result<Target, SecretError> {
        let record = Record::read(&self.given, data)?;
        let (signer, roots) = (record.signer.clone(), record.roots.clone());
        let root = self.check(&self.given, &Record { next: None, ..record })?;
        Ok(Target { signer, root, roots, given: true })
    }

    fn check(&self, name: &SecretName, record: &Record) -> Result<identity::RootId, SecretError> {
        let authority = record.authority(name, &self.current.domains(), self.current.clock().now())?;
        Ok(authority.root())
    }

    async fn get(&self, name: &'static str) -> Result<Option<Secret>, RoundError> {
        self.api.get_opt(name).await.map_err(|source| self.api_error("read", name, source))
    }

    fn api_error(&self, what: &'static str, name: &str, source: kube::Error) -> RoundError {
        let name = format!("{}/{name}", self.own.namespace);
        RoundError::Api { what, name, source: Box::new(source) }
    }
}

/// Whether what is given is not what signs, or will sign, with its roots.
fn differs(record: &Record, given: &Target) -> bool {
    let coming = record.next.as_ref().unwrap_or(&record.signer);
    if *coming != given.signer {
        return true;
    }
    let kept = super::record::ids(&given.roots);
    record.state.rotation.is_none()
        && (given.roots.iter().any(|root| !record.roots.contains(root))
            || record.root_ids().iter().any(|id| !kept.contains(id)))
}

/// For how long a certificate is valid, all in all, and until when, in seconds since 1970.
fn validity(certificate: &CertificateDer<'_>) -> Option<(Duration, u64)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    let end = u64::try_from(validity.not_after.timestamp()).ok()?;
    let seconds = validity.not_after.timestamp().checked_sub(validity.not_before.timestamp())?;
    Some((Duration::from_secs(u64::try_from(seconds).ok()?), end))
}

fn unix(seconds: u64) -> rustls_pki_types::UnixTime {
    rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

fn log_step(gate: &str, rotation: &rotation::Rotation, ground: &Ground) {
    let new = rotation.new_root;
    match ground {
        Ground::Ready => tracing::warn!(%new, gate, "root rotation: the gate is open"),
        Ground::Accepted(laggards) => tracing::error!(
            %new,
            gate,
            laggards = laggards.join(", "),
            "root rotation: the gate is passed because {ACCEPT} says so; these were not ready, and may be cut off"
        ),
        Ground::Deadline(laggards) => tracing::error!(
            %new,
            gate,
            laggards = laggards.join(", "),
            "root rotation: the new root signs because the old one is about to expire; these do not trust it yet"
        ),
    }
}
