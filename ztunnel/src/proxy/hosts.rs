//! Addresses of endpoints that are known by a host name (ServiceEntry with resolution DNS).
//!
//! The system's resolver is asked, because it knows /etc/hosts and what else the node is set up with; it blocks, and an
//! unanswered question takes it half a minute. So that a name whose servers are dead harms nobody else:
//!
//! * there is one lookup of a name at a time, however many connections ask for it, on a thread of its own; threads,
//!   names that wait for one, and connections that wait for an answer are limited;
//! * a connection waits for seconds at most, and not at all once its name has been looked for that long;
//! * a failed name is not looked up again for a while, which grows with each failure;
//! * an old answer serves while a new one is looked for.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

use super::failure::Failure;

/// Times and limits.
#[derive(Clone, Copy, Debug)]
pub struct HostSettings {
    /// How long an answer serves without a new lookup. The system's resolver does not tell how long its answers hold;
    /// DNS of service meshes is asked again after seconds, not minutes, because endpoints move.
    pub fresh: Duration,
    /// How old an answer serves at once while a new one is looked for.
    pub recent: Duration,
    /// How old an answer serves when no new one comes (RFC 8767 allows days; an address that stopped answering is found
    /// out by connecting).
    pub stale: Duration,
    /// How long a new answer is waited for with an old one at hand that is not recent.
    pub patience: Duration,
    /// How long a new answer is waited for with none at hand.
    pub timeout: Duration,
    /// How long a name that failed is not looked up again; doubles with each failure in a row.
    pub pause: Duration,
    /// How far that goes.
    pub longest_pause: Duration,
    /// Names that are remembered.
    pub names: usize,
    /// Lookups under way, each on a thread.
    pub lookups: usize,
    /// Names that wait for one of these threads.
    pub queued: usize,
    /// Connections that wait for an answer.
    pub waiting: usize,
    /// Of them, those that wait for one name.
    pub waiting_per_name: usize,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self {
            fresh: Duration::from_secs(10),
            recent: Duration::from_secs(60),
            stale: Duration::from_secs(3600),
            patience: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            pause: Duration::from_secs(5),
            longest_pause: Duration::from_secs(30),
            names: 4096,
            lookups: 32,
            queued: 1024,
            waiting: 8192,
            waiting_per_name: 1024,
        }
    }
}

/// What a lookup brings: addresses, or why there are none.
type Outcome = Result<Arc<[IpAddr]>, Arc<str>>;

/// Looks a name up, for as long as it takes.
type Lookup = Box<dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync>;

/// What is known of a name.
#[derive(Debug, Default)]
struct Name {
    answer: Option<(Arc<[IpAddr]>, Instant)>,
    failure: Option<LookupFailure>,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct LookupFailure {
    reason: Arc<str>,
    in_a_row: u32,
    pause_ends: Instant,
}

#[derive(Debug)]
struct UnderWay {
    since: Instant,
    done: watch::Sender<Option<Outcome>>,
}

#[derive(Debug, Default)]
struct Names {
    known: HashMap<Arc<str>, Name>,
    /// Names that wait for a thread.
    queue: VecDeque<Arc<str>>,
    threads: usize,
}

/// Counts since the start, and lookups under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HostCounts {
    /// Lookups begun.
    pub lookups: u64,
    /// Lookups that brought nothing.
    pub failed: u64,
    /// Connections that got an answer which was no longer fresh.
    pub stale: u64,
    /// Connections that were refused by a limit: of lookups, of names that wait for one, or of connections that wait.
    pub refused: u64,
    /// Lookups under way.
    pub under_way: u64,
}

#[derive(Debug, Default)]
struct Counters {
    lookups: AtomicU64,
    failed: AtomicU64,
    stale: AtomicU64,
    refused: AtomicU64,
}

struct Shared {
    settings: HostSettings,
    lookup: Lookup,
    names: Mutex<Names>,
    waiting: Semaphore,
    counters: Counters,
}

/// Resolves host names. Clones share one memory.
#[derive(Clone)]
pub struct Hosts(Arc<Shared>);

impl std::fmt::Debug for Hosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hosts").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new(HostSettings::default(), |host| {
            Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
        })
    }
}

/// What a connection does about its name.
enum Next {
    /// It takes this.
    Take(Outcome),
    /// It waits until then, and takes the old answer if none comes.
    Wait(watch::Receiver<Option<Outcome>>, Instant, Option<Arc<[IpAddr]>>),
}

impl Hosts {
    /// Resolves by `lookup`, which may block.
    pub fn new(
        settings: HostSettings,
        lookup: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            waiting: Semaphore::new(settings.waiting),
            settings,
            lookup: Box::new(lookup),
            names: Mutex::default(),
            counters: Counters::default(),
        }))
    }

    /// An address of `host`, of the family of `client` where there is one; which of several is up to `random`.
    ///
    /// # Errors
    /// The name can't be resolved, and no old answer is left; or too much is under way.
    pub async fn resolve(
        &self,
        host: &str,
        port: u16,
        client: IpAddr,
        random: u64,
    ) -> Result<SocketAddr, Failure> {
        let failed = |reason: &str| Failure::Resolve(host.to_owned(), reason.to_owned());
        let addresses = self.addresses(host).await.map_err(|reason| failed(&reason))?;
        let of_family = |v4: bool| addresses.iter().filter(move |ip| ip.is_ipv4() == v4);
        let v4 = client.to_canonical().is_ipv4();
        let v4 = if of_family(v4).next().is_some() { v4 } else { !v4 };
        let count = of_family(v4).count().max(1) as u64;
        let index = usize::try_from(random % count).unwrap_or(0);
        let ip = of_family(v4).nth(index).ok_or_else(|| failed("no address"))?;
        Ok(SocketAddr::new(*ip, port))
    }

    /// Numbers for metrics.
    pub fn counts(&self) -> HostCounts {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        let Counters { lookups, failed, stale, refused } = &self.0.counters;
        HostCounts {
            lookups: read(lookups),
            failed: read(failed),
            stale: read(stale),
            refused: read(refused),
            under_way: self.0.names().threads as u64,
        }
    }

    async fn addresses(&self, host: &str) -> Outcome {
        let (mut done, deadline, old) = match self.0.next(host) {
            Next::Take(outcome) => return outcome,
            Next::Wait(done, deadline, old) => (done, deadline, old),
        };
        let outcome = match self.0.waiting.try_acquire() {
            Ok(_place) => match timeout_at(deadline, done.wait_for(Option::is_some)).await {
                Ok(Ok(outcome)) => outcome.clone().unwrap_or_else(|| Err("no answer".into())),
                Ok(Err(_)) => Err("the lookup was cut short".into()),
                Err(_) => Err(self.0.no_answer()),
            },
            Err(_) => Err(self.0.refuse("connections that wait for an answer")),
        };
        match (outcome, old) {
            (Err(_), Some(old)) => {
                self.0.counters.stale.fetch_add(1, Relaxed);
                Ok(old)
            }
            (outcome, _) => outcome,
        }
    }
}

impl Shared {
    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides without waiting, and begins a lookup where one is due.
    fn next(self: &Arc<Self>, host: &str) -> Next {
        let now = Instant::now();
        let settings = &self.settings;
        let mut names = self.names();
        let known = names.known.get(host);
        let old = known.and_then(|name| name.answer.clone()).filter(|(_, at)| now - *at < settings.stale);
        if let Some((addresses, at)) = &old
            && now - *at < settings.fresh
        {
            return Next::Take(Ok(addresses.clone()));
        }
        // The old answer, or why there is none.
        let instead = |reason: Arc<str>| {
            let old = old.as_ref().map(|(addresses, _)| addresses.clone());
            self.counters.stale.fetch_add(u64::from(old.is_some()), Relaxed);
            Next::Take(old.ok_or(reason))
        };
        let failure = known.and_then(|name| name.failure.as_ref());
        if let Some(failure) = failure.filter(|failure| now < failure.pause_ends) {
            return instead(failure.reason.clone());
        }
        if known.is_none_or(|name| name.under_way.is_none())
            && let Err(reason) = self.begin(&mut names, host, now)
        {
            return instead(reason);
        }
        let under_way = names.known.get(host).and_then(|name| name.under_way.as_ref());
        let Some(UnderWay { since, done }) = under_way else { return instead("it is not looked up".into()) };
        if old.as_ref().is_some_and(|(_, at)| now - *at < settings.recent) {
            return instead("".into());
        }
        let mut deadline = *since + settings.timeout;
        if old.is_some() {
            deadline = deadline.min(*since + settings.patience);
        }
        if now >= deadline {
            return instead(self.no_answer());
        }
        if done.receiver_count() >= settings.waiting_per_name {
            return instead(self.refuse("connections that wait for this name"));
        }
        Next::Wait(done.subscribe(), deadline, old.map(|(addresses, _)| addresses))
    }

    /// Looks `host` up on a thread, or has it wait for one.
    fn begin(self: &Arc<Self>, names: &mut Names, host: &str, now: Instant) -> Result<(), Arc<str>> {
        let settings = &self.settings;
        if names.threads >= settings.lookups && names.queue.len() >= settings.queued {
            return Err(self.refuse("names that wait to be looked up"));
        }
        let host: Arc<str> = host.into();
        if !names.known.contains_key(&host) && !names.make_room(settings, now) {
            return Err(self.refuse("names that are looked up"));
        }
        if names.threads < settings.lookups {
            let (shared, first) = (self.clone(), host.clone());
            std::thread::Builder::new()
                .name("host-lookup".to_owned())
                .spawn(move || shared.look_up(first))
                .map_err(|error| -> Arc<str> { format!("no thread for a lookup: {error}").into() })?;
            names.threads += 1;
        } else {
            names.queue.push_back(host.clone());
        }
        let (done, _) = watch::channel(None);
        names.known.entry(host).or_default().under_way = Some(UnderWay { since: now, done });
        Ok(())
    }

    /// A thread: looks up `host`, and then whatever waits.
    fn look_up(&self, mut host: Arc<str>) {
        loop {
            self.counters.lookups.fetch_add(1, Relaxed);
            let outcome = match (self.lookup)(&host) {
                Ok(found) => {
                    let mut addresses: Vec<IpAddr> = found.iter().map(IpAddr::to_canonical).collect();
                    addresses.sort();
                    addresses.dedup();
                    if addresses.is_empty() { Err("no address".into()) } else { Ok(addresses.into()) }
                }
                Err(error) => Err(error.to_string().into()),
            };
            self.counters.failed.fetch_add(u64::from(outcome.is_err()), Relaxed);
            let mut names = self.names();
            if let Some(name) = names.known.get_mut(&host) {
                name.learn(outcome, &self.settings);
            }
            match names.queue.pop_front() {
                Some(next) => host = next,
                None => {
                    names.threads -= 1;
                    return;
                }
            }
        }
    }

    fn refuse(&self, what: &str) -> Arc<str> {
        self.counters.refused.fetch_add(1, Relaxed);
        format!("the limit of {what} is reached").into()
    }

    fn no_answer(&self) -> Arc<str> {
        format!("no answer within {} s", self.settings.timeout.as_secs_f32()).into()
    }
}

impl Names {
    /// Makes room for one more name; what is neither fresh nor looked up goes first.
    fn make_room(&mut self, settings: &HostSettings, now: Instant) -> bool {
        if self.known.len() < settings.names {
            return true;
        }
        let is_fresh = |name: &Name| name.answer.as_ref().is_some_and(|(_, at)| now - *at < settings.fresh);
        self.known.retain(|_, name| name.under_way.is_some() || is_fresh(name));
        if self.known.len() >= settings.names {
            // Every name is fresh: start over rather than grow.
            self.known.retain(|_, name| name.under_way.is_some());
        }
        self.known.len() < settings.names
    }
}

impl Name {
    /// Takes what a lookup brought, and tells those who wait.
    fn learn(&mut self, outcome: Outcome, settings: &HostSettings) {
        let now = Instant::now();
        match &outcome {
            Ok(addresses) => {
                self.answer = Some((addresses.clone(), now));
                self.failure = None;
            }
            Err(reason) => {
                let in_a_row = self.failure.as_ref().map_or(0, |failure| failure.in_a_row).saturating_add(1);
                let pause = settings.pause.saturating_mul(1 << (in_a_row - 1).min(16));
                let pause_ends = now + pause.min(settings.longest_pause);
                self.failure = Some(LookupFailure { reason: reason.clone(), in_a_row, pause_ends });
            }
        }
        if let Some(under_way) = self.under_way.take() {
            under_way.done.send_replace(Some(outcome));
        }
    }
}

#[cfg(test)]
mod tests;
