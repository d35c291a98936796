//! The status of policies: whether they are accepted, and how many of the proxies enforce them.
//!
//! Every control plane knows which of the proxies that are connected to it hold which policy; the leader asks the others
//! ([`peers`]), puts that together and writes it. A condition is written when it changes, and not often: `n/N` of a
//! policy that is enforced everywhere follows proxies that come and go with leisure.

pub mod conditions;
pub mod peers;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::diagnostic::Diagnostic;
use config::resource::Kind;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Extensions};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use xds::server::{ClientStatus, Generation, Server};

use crate::alive::Ztunnels;
use crate::push::Exceptions;
use crate::registry::{ObjectName, ObjectState, Report};
use conditions::{Condition, Tally};
use peers::Peers;
pub use writer::Writer;

/// How often proxies are asked while something changes.
const ROUND: Duration = Duration::from_millis(500);
/// How often at least.
const LEISURE: Duration = Duration::from_secs(30);
/// How many policies are written in a round.
const WRITES: usize = 10;

/// Reports on policies, with the generation in which proxies are told.
pub type Reports = (Vec<Report>, Generation);

/// What was written last of a policy, of what, and when.
#[derive(Debug)]
struct Written {
    tally: Tally,
    exception: Option<String>,
    findings: Vec<Diagnostic>,
    conditions: Vec<Condition>,
    at: Instant,
}

/// A policy as it is followed.
#[derive(Debug)]
struct Followed {
    state: ObjectState,
    generation: Generation,
    written: Option<Written>,
    /// Not before this is it tried again.
    not_before: Option<Instant>,
}

/// The policies that are followed, for those who look.
#[derive(Clone, Default)]
pub struct Followers(Arc<Mutex<HashMap<ObjectName, Followed>>>);

impl std::fmt::Debug for Followers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followers").finish_non_exhaustive()
    }
}

/// What one control plane says of its proxies and one policy.
pub type Local = BTreeMap<String, peers::PolicyAnswer>;

impl Followers {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ObjectName, Followed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes reports.
    pub fn take(&self, (reports, generation): Reports) {
        let mut all = self.lock();
        let followed =
            |r: &Report| matches!(r.name.kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication);
        for Report { name: policy, state } in reports.into_iter().filter(followed) {
            match state {
                None => {
                    all.remove(&policy);
                }
                Some(state) => {
                    let old = all.remove(&policy);
                    // The same version, of which only what is said is new: proxies have it since then.
                    let same = old.filter(|old| {
                        old.state.version.uid == state.version.uid
                            && old.state.version.generation == state.version.generation
                    });
                    let (generation, written) =
                        same.map_or((generation, None), |old| (old.generation, old.written));
                    all.insert(policy, Followed { state, generation, written, not_before: None });
                }
            }
        }
    }

    /// What the proxies of `server` hold of each policy.
    #[must_use]
    pub fn local(&self, server: &Server) -> Local {
        let clients = Clients::of(server);
        let answer = |(policy, followed): (&ObjectName, &Followed)| {
            let answer = peers::PolicyAnswer {
                uid: followed.state.version.uid.to_string(),
                generation: followed.state.version.generation,
                tally: clients.tally(policy, followed.generation),
            };
            (label(policy), answer)
        };
        self.lock().iter().map(answer).collect()
    }
}

/// A policy's name as text.
#[must_use]
pub fn label(policy: &ObjectName) -> String {
    format!("{}/{}/{}", policy.kind.name(), policy.namespace, policy.name)
}

/// A client that says what it enforces.
struct Client {
    name: Arc<str>,
    /// Up to where it has answered for policies and workloads, which list the policies that select them.
    acked: Option<Generation>,
    rejected: Vec<(Arc<str>, Arc<str>)>,
    /// It refused more than it is known what, of what was made until then.
    blurred: Option<Generation>,
}

/// All clients, and what is the same for every policy.
struct Clients {
    server: Server,
    ours: Vec<Client>,
    others: usize,
    /// Up to where all of ours have answered.
    least: Option<Generation>,
    /// Whether none of ours refuses anything.
    clean: bool,
}

impl Clients {
    fn of(server: &Server) -> Self {
        let (mut ours, mut others) = (Vec::new(), 0);
        for client in server.clients() {
            if client.audience != Extensions::Culvert {
                others += 1;
                continue;
            }
            let of = |type_url: &str| client.types.iter().find(|t| &*t.type_url == type_url && t.wildcard);
            let (policies, workloads) = (of(AUTHORIZATION_TYPE_URL), of(ADDRESS_TYPE_URL));
            let rejected = policies.map_or(&[][..], |t| &t.rejected).iter();
            ours.push(Client {
                name: proxy_name(&client).into(),
                acked: policies.zip(workloads).map(|(p, w)| p.acked.min(w.acked)),
                rejected: rejected.map(|r| (r.name.clone(), r.reason.clone())).collect(),
                blurred: policies.and_then(|t| t.blurred),
            });
        }
        let least = ours.iter().map(|client| client.acked).min().flatten();
        let clean = ours.iter().all(|client| client.rejected.is_empty() && client.blurred.is_none());
        Self { server: server.clone(), ours, others, least, clean }
    }

    /// How they stand with a policy of this generation.
    fn tally(&self, policy: &ObjectName, generation: Generation) -> Tally {
        let mut tally = Tally { others: self.others, ..Tally::default() };
        let name = match policy.kind {
            Kind::PeerAuthentication => {
                format!("{}/{}{}", policy.namespace, config::policy::mode::CONVERTED, policy.name)
            }
            _ => format!("{}/{}", policy.namespace, policy.name),
        };
        // The same version may have come to mean something else since, by other objects or the mesh's settings.
        let changed = self.server.changed_at(AUTHORIZATION_TYPE_URL, &name, Extensions::Culvert);
        let generation = changed.map_or(generation, |changed| changed.max(generation));
        // Nearly always: then a policy costs the same for any number of proxies.
        if self.clean && self.least.is_some_and(|least| least >= generation) {
            tally.enforcing = self.ours.len();
            return tally;
        }
        for client in &self.ours {
            if let Some((_, reason)) = client.rejected.iter().find(|(rejected, _)| **rejected == *name) {
                tally.refuse(&client.name, reason);
            } else if client.acked.is_none_or(|acked| acked < generation) {
                tally.wait_for(&client.name);
            } else if client.blurred.is_some_and(|until| generation <= until) {
                let reason = "it refused more than is remembered, and this may be among it";
                tally.refuse(&client.name, &reason.into());
            } else {
                tally.enforcing += 1;
            }
        }
        tally
    }
}

/// The pod and node of a proxy.
#[must_use]
pub fn proxy_name(client: &ClientStatus) -> String {
    // `ztunnel~IP~POD.NAMESPACE~DOMAIN`; whatever else somebody calls itself is cut.
    let id = &client.node.id;
    id.split('~').nth(2).filter(|name| !name.is_empty()).unwrap_or(id).chars().take(128).collect()
}

/// A policy, and what is to be written of it.
type Due = (ObjectName, ObjectState, Written);

/// Writes the status of policies while this control plane leads.
pub struct Keeper {
    /// The policies.
    pub followers: Followers,
    /// Who tells what the proxies hold.
    pub server: Server,
    /// The other control planes.
    pub peers: Peers,
    /// Who writes.
    pub writer: Writer,
    /// What proxies of another make are told otherwise.
    pub exceptions: Exceptions,
    /// Which proxies are alive.
    pub ztunnels: Ztunnels,
    /// Whether this control plane leads.
    pub leads: watch::Receiver<bool>,
}

impl Keeper {
    /// Runs until the reports end.
    pub async fn run(mut self, mut reports: mpsc::UnboundedReceiver<Reports>) {
        let mut progress = self.server.progress();
        let mut next = Instant::now();
        loop {
            tokio::select! {
                report = reports.recv() => match report {
                    Some(report) => {
                        self.followers.take(report);
                        next = next.min(Instant::now() + ROUND);
                        continue;
                    }
                    None => return,
                },
                Ok(()) = progress.changed() => {
                    next = next.min(Instant::now() + ROUND);
                    continue;
                }
                Ok(()) = self.leads.changed() => {
                    self.forget();
                    next = Instant::now();
                    continue;
                }
                () = tokio::time::sleep_until(next) => {}
            }
            next = Instant::now() + if *self.leads.borrow() && self.round().await { ROUND } else { LEISURE };
        }
    }

    /// Another may have written meanwhile.
    fn forget(&self) {
        for followed in self.followers.lock().values_mut() {
            (followed.written, followed.not_before) = (None, None);
        }
    }

    /// Writes what changed. Whether something is left to do soon.
    async fn round(&self) -> bool {
        let peers = self.peers.ask().await;
        let (due, unsettled) = self.due(&peers);
        let more = due.len() > WRITES;
        for (policy, state, wanted) in due.into_iter().take(WRITES) {
            let outcome = self.writer.write(&policy, &state, &wanted.conditions).await;
            let mut all = self.followers.lock();
            let Some(followed) = all.get_mut(&policy).filter(|f| f.state == state) else { continue };
            match outcome {
                Ok(()) => followed.written = Some(wanted),
                Err(reason) => {
                    tracing::warn!(
                        policy = label(&policy),
                        reason,
                        "the policy's status could not be written"
                    );
                    followed.not_before = Some(Instant::now() + LEISURE);
                }
            }
        }
        more || unsettled
    }

    /// How the proxies of all control planes stand with a policy.
    fn tally(clients: &Clients, policy: &ObjectName, followed: &Followed, peers: &peers::Answers) -> Tally {
        let mut tally = clients.tally(policy, followed.generation);
        tally.unasked = peers.unasked;
        if peers.answers.is_empty() {
            return tally;
        }
        let (label, state) = (label(policy), &followed.state);
        for peer in &peers.answers {
            let same = |a: &&peers::PolicyAnswer| {
                *a.uid == *state.version.uid && a.generation == state.version.generation
            };
            match peer.get(&label).filter(same) {
                Some(answer) => tally.add(&answer.tally),
                // It does not know this version yet.
                None => tally.unasked += 1,
            }
        }
        tally
    }

    /// The policies whose status has to be written, with what is to be written; and whether that of any will change
    /// soon.
    fn due(&self, peers: &peers::Answers) -> (Vec<Due>, bool) {
        let (clients, exceptions) = (Clients::of(&self.server), self.exceptions.list());
        let now = Instant::now();
        let mut unsettled = false;
        let mut due = Vec::new();
        for (policy, followed) in &*self.followers.lock() {
            let tally = Self::tally(&clients, policy, followed, peers);
            let settled = tally.is_settled();
            unsettled |= !settled;
            if followed.not_before.is_some_and(|at| at > now) {
                continue;
            }
            let exception = (!exceptions.is_empty() && policy.kind == Kind::AuthorizationPolicy)
                .then(|| exceptions.get(&*format!("{}/{}", policy.namespace, policy.name)).cloned())
                .flatten();
            let findings = &followed.state.findings;
            let written = followed.written.as_ref();
            if written
                .is_some_and(|w| w.tally == tally && w.exception == exception && w.findings == *findings)
            {
                continue;
            }
            let conditions = conditions::of(&followed.state, &tally, exception.as_deref());
            // Only the counts differ, as when a node comes or goes.
            let leisure = written.is_some_and(|written| {
                settled
                    && written.at.elapsed() < LEISURE
                    && conditions::same_but_for_messages(&written.conditions, &conditions)
            });
            if !leisure {
                let findings = findings.clone();
                let wanted = Written { tally, exception, findings, conditions, at: now };
                due.push((policy.clone(), followed.state.clone(), wanted));
            }
        }
        due.sort_by(|a, b| a.0.cmp(&b.0));
        (due, unsettled)
    }
}
