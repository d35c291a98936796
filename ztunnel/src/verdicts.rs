//! Verdicts in the kernel: connections within the node that pass without a proxy on their path (`nodeLocal: kernel`).
//!
//! ```text
//! first connection  carried here, as with `nodeLocal: direct` ─▶ offered ─▶ judged ─▶ both pods prepared, maps written
//! later ones        past this process; the kernel counts ─▶ records ─▶ registry, metrics, access log
//! any change        all that stands is judged again ─▶ of what is not allowed any more no packet passes, and its sockets end
//! ```
//!
//! There is no second evaluator: verdicts are written where a connection was permitted, for all the endpoints that it may have gone
//! to, each permitted in the same way, and asked for again by what asks for open connections ([`judge`]).
//!
//! Invariants:
//! * verdicts hold for a lease, which only the thread renews that takes them back ([`keep`]). What it can't take back ends with
//!   the lease;
//! * an earlier process's verdicts hold for nobody: they are revoked before the first is written;
//! * a verdict needs one answer: one address of the source, one decision whatever the source's port; and what is dialled leads to
//!   pods of this node that have one each, of which no more is done than to draw. All else stays on the path through this process.

mod judge;
mod keep;
pub mod kernel;
mod programs;
mod records;
mod table;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use model::{NodeLocal, SpiffeId};
use net::{Netns, NetnsId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

pub use self::judge::Ends;
pub use self::keep::keep;
use self::kernel::{Kernel, Pair, Way};
pub use self::programs::{of_agent, programs};
use self::records::{Records, Stories};
use self::table::{Crowded, Lead, Limits, NotWritten, Table};
use crate::connections::Story;
use crate::proxy::Proxy;

/// Ways, and pairs, at most.
const LIMITS: Limits = Limits { all: 4096, each: 512 };
/// So long a way is not asked for again that could not be written.
const PAUSE: Duration = Duration::from_secs(1);
/// Questions to the thread that wait.
const QUEUED: usize = 256;
/// How long an answer of the thread is waited for: verdicts end by themselves by then.
const ANSWERED: Duration = Duration::from_secs(4);
/// How long a pod that does not qualify is not asked for again.
const UNFIT_FOR: Duration = Duration::from_secs(10);

/// How long after it failed it is tried again to attach the programs.
const ATTACH_AGAIN: Duration = Duration::from_secs(30);

/// Makes the kernel's side, for pods in these namespaces.
type Make = fn(&[Netns]) -> Result<Box<dyn Kernel>, Later>;

/// How there comes to be a kernel's side.
pub struct Attach {
    attach: Make,
    /// Whether an earlier process may have left one.
    is_left: fn() -> bool,
}

/// Connections that pass, by the server's end and the client's.
pub type Passing = HashSet<(SocketAddr, SocketAddr)>;

/// Why there is no kernel's side yet.
pub struct Later {
    why: String,
    /// Whether another process has it, or may have: what passes by it is that one's.
    is_taken: bool,
    /// When it is tried again.
    after: Duration,
    /// Whether that is no failure: it is another's turn.
    is_turn: bool,
}

impl From<String> for Later {
    fn from(why: String) -> Self {
        Self { why, after: ATTACH_AGAIN, is_turn: false, is_taken: false }
    }
}

/// A pod's state.
enum Joined {
    /// It is being prepared.
    Asked,
    /// It may be an end, and the source too or not.
    Fit(Netns, bool),
    /// It may not.
    Unfit(Netns, String, Instant),
}

/// Whether a pod may be an end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fit {
    Yes,
    /// It is being found out.
    Asked,
    /// It may not, and is not asked for again for so long.
    NotFor(Duration),
}

/// What the thread is asked.
enum Ask {
    /// To prepare a pod.
    Join(Netns),
    /// To judge again what stands.
    Recheck(oneshot::Sender<()>),
    /// To look what is open.
    Look(oneshot::Sender<()>),
    /// To look, and say what.
    Passing(oneshot::Sender<Option<Passing>>),
    /// To take back everything.
    End(oneshot::Sender<()>),
}

/// The verdicts of this node.
pub struct Verdicts {
    /// Absent where pods are not captured in a way that knows verdicts.
    attach: Option<Attach>,
    /// While they are wanted. It is taken away under the table's lock.
    kernel: RwLock<Option<Arc<dyn Kernel>>>,
    table: Mutex<Table<Ends, Stories>>,
    records: Mutex<Records>,
    pods: Mutex<HashMap<NetnsId, Joined>>,
    ask: mpsc::Sender<Ask>,
    asked: Mutex<Option<mpsc::Receiver<Ask>>>,
    /// Something could not be taken back: the lease is left to end.
    stuck: AtomicBool,
    /// The thread did not answer in time: it renews nothing before it has judged again what stands.
    late: AtomicBool,
    /// Another process has the kernel's side, or may have.
    elsewhere: AtomicBool,
    /// All is taken back, and nothing is written any more.
    over: AtomicBool,
    cut: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// What a connection that was carried here offers to later ones: one of the endpoints that they may be led to.
pub struct Offer {
    /// What was decided of.
    pub pair: Pair,
    /// How often it is taken beside the others.
    pub weight: u32,
    /// Both ends.
    pub ends: Ends,
    /// The source's view.
    pub outbound: Story,
    /// The destination's.
    pub inbound: Story,
}

/// How many there are of what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Addresses that lead past this process, and pairs that may pass.
    pub written: (u64, u64),
    /// As many of either there may be, and as many of one source.
    pub limits: (u64, u64),
    /// How often there was no place.
    pub crowded: Crowded,
    /// Sockets of connections that are open and known.
    pub open: u64,
    /// Sockets of connections that passed, and ended.
    pub passed: u64,
    /// Those of them of which too little was known to tell of them.
    pub untold: u64,
    /// Pods that may be ends, and that may not.
    pub pods: (u64, u64),
    /// Whether something could not be taken back.
    pub stuck: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded values are valid after any panic: see their own invariants.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Verdicts {
    /// With what makes the kernel's side, where there is one.
    pub fn new(attach: Option<Attach>) -> Self {
        let (ask, asked) = mpsc::channel(QUEUED);
        Self {
            attach,
            kernel: RwLock::default(),
            table: Mutex::new(Table::new(LIMITS)),
            records: Mutex::default(),
            pods: Mutex::default(),
            ask,
            asked: Mutex::new(Some(asked)),
            stuck: AtomicBool::new(false),
            late: AtomicBool::new(false),
            elsewhere: AtomicBool::new(false),
            over: AtomicBool::new(false),
            cut: AtomicU64::new(0),
            trouble: Mutex::default(),
        }
    }

    fn kernel(&self) -> Option<Arc<dyn Kernel>> {
        self.kernel.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_kernel(&self, kernel: Option<Arc<dyn Kernel>>) {
        *self.kernel.write().unwrap_or_else(PoisonError::into_inner) = kernel;
    }

    /// Whether a connection that was carried should be offered: it says nothing new otherwise.
    pub fn wants(&self, proxy: &Proxy, [source, destination]: [&SpiffeId; 2], way: &Way) -> bool {
        self.kernel().is_some()
            && !self.is_stuck()
            && !self.over.load(Relaxed)
            && proxy.state.mesh().settings().node_local.between(source.namespace(), destination.namespace()) == NodeLocal::Kernel
            // Whoever has the lock writes, or judges; the next connection offers the same.
            && self.table.try_lock().is_ok_and(|table| table.wants(way))
    }

    /// Writes what a connection offers to those that take the same way, if it may be: all that they may be led to. `None` is
    /// asked for again later.
    pub fn offer(&self, proxy: &Proxy, way: Way, offers: Option<Vec<Offer>>) {
        let Some(offers) = offers else {
            if let Ok(mut table) = self.table.try_lock() {
                table.put_off(way, PAUSE);
            }
            return;
        };
        let pods = offers.iter().flat_map(|offer| [&offer.ends.source, &offer.ends.destination]);
        if !self.are_fit(way, pods.map(|pod| &pod.netns)) {
            return;
        }
        let lead = |Offer { pair, weight, ends, outbound, inbound }| {
            let told = Arc::new(Stories::new(proxy, outbound, inbound));
            Lead { pair, weight, ends: Arc::new(ends), told }
        };
        let leads = offers.into_iter().map(lead).collect();
        let Ok(mut table) = self.table.try_lock() else { return };
        // Looked at under the lock: who takes all back has it.
        let Some(kernel) = self.kernel() else { return };
        if self.over.load(Relaxed) || self.is_stuck() {
            return;
        }
        match table.offer((&*kernel, proxy), way, leads) {
            Ok(()) => tracing::debug!(?way, "later connections pass by the kernel's verdict"),
            Err(NotWritten::Kernel(error)) => tracing::warn!(?way, %error, "no verdict is written"),
            Err(reason) => {
                table.put_off(way, PAUSE);
                tracing::debug!(?way, %reason, "no verdict is written");
            }
        }
    }

    /// Whether all of the pods may be ends of what the way leads to. While one may not, each connection is ztunnel's to lead, and
    /// the way is not asked for.
    fn are_fit<'a>(&self, way: Way, pods: impl Iterator<Item = &'a Netns>) -> bool {
        // All of them, so that all are prepared at once.
        let fits: Vec<Fit> = pods.map(|netns| self.is_fit(netns)).collect();
        let pauses = fits.iter().filter_map(|fit| match fit {
            Fit::NotFor(pause) => Some(*pause),
            Fit::Yes | Fit::Asked => None,
        });
        if let Some(pause) = pauses.max()
            && let Ok(mut table) = self.table.try_lock()
        {
            table.put_off(way, pause);
        }
        fits.iter().all(|fit| *fit == Fit::Yes)
    }

    /// Whether a pod may be an end. Has it prepared where that is not known.
    fn is_fit(&self, netns: &Netns) -> Fit {
        let mut pods = lock(&self.pods);
        match pods.get(&netns.id()) {
            Some(Joined::Fit(..)) => return Fit::Yes,
            Some(Joined::Asked) => return Fit::Asked,
            Some(Joined::Unfit(.., since)) => {
                let pause = UNFIT_FOR.saturating_sub(since.elapsed());
                if !pause.is_zero() {
                    return Fit::NotFor(pause);
                }
            }
            None => {}
        }
        // A queue that is full is a later connection's matter.
        if self.ask.try_send(Ask::Join(netns.clone())).is_ok() {
            pods.insert(netns.id(), Joined::Asked);
        }
        Fit::Asked
    }

    /// Whether a pod may be the source of a pair.
    fn may_begin(&self, netns: &Netns) -> bool {
        matches!(lock(&self.pods).get(&netns.id()), Some(Joined::Fit(_, true)))
    }

    /// Whether a pod may still be the destination of a pair.
    fn may_end(&self, netns: &Netns) -> bool {
        matches!(lock(&self.pods).get(&netns.id()), Some(Joined::Fit(..)))
    }

    /// Whether the lease is left to end.
    fn is_stuck(&self) -> bool {
        self.stuck.load(Relaxed) || self.late.load(Relaxed)
    }

    /// Judges again what stands. What is not allowed any more is over when this returns.
    pub async fn recheck(&self) {
        self.wait(Ask::Recheck).await;
    }

    /// Brings up to date what is known of open connections.
    pub async fn look(&self) {
        self.wait(Ask::Look).await;
    }

    /// The connections that pass now. `None` while another process may have the verdicts, whose connections pass.
    pub async fn passing(&self) -> Option<Passing> {
        self.wait(Ask::Passing).await.unwrap_or_else(|| Some(Passing::default()))
    }

    /// Takes back all verdicts, and ends what passes by them.
    pub async fn end(&self) {
        self.wait(Ask::End).await;
    }

    /// The thread's answer, where there is one.
    async fn wait<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        self.attach.as_ref()?;
        let (done, wait) = oneshot::channel();
        let answered = async {
            self.ask.send(ask(done)).await.ok()?;
            wait.await.ok()
        };
        let answered = tokio::time::timeout(ANSWERED, answered).await;
        if answered.is_err() {
            // A thread that hangs renews no lease; one that is late must not before it has judged again.
            self.late.store(true, Release);
        }
        answered.ok()?
    }

    /// How many sockets were ended because their connections were no longer allowed.
    pub fn cut(&self) -> u64 {
        self.cut.load(Relaxed)
    }

    /// How many sources have as many ways or pairs as one may have.
    pub fn full_sources(&self) -> u64 {
        lock(&self.table).full_sources() as u64
    }

    /// The numbers, for metrics.
    pub fn counts(&self) -> Counts {
        let ((ways, pairs), crowded) = {
            let table = lock(&self.table);
            (table.len(), table.crowded())
        };
        let (open, passed, untold) = lock(&self.records).counts();
        let pods = lock(&self.pods);
        let with = |is: fn(&Joined) -> bool| pods.values().filter(|joined| is(joined)).count() as u64;
        Counts {
            written: (ways as u64, pairs as u64),
            limits: (LIMITS.all as u64, LIMITS.each as u64),
            crowded,
            open,
            passed,
            untold,
            pods: (
                with(|joined| matches!(joined, Joined::Fit(..))),
                with(|j| matches!(j, Joined::Unfit(..))),
            ),
            stuck: self.is_stuck(),
        }
    }

    /// What the programs count, by its name.
    pub fn tallies(&self) -> Vec<(&'static str, u64)> {
        self.kernel().map(|kernel| kernel.tallies()).unwrap_or_default()
    }

    /// What there is, as JSON.
    pub fn dump(&self) -> serde_json::Value {
        let counts = self.counts();
        let pods = lock(&self.pods);
        let unfit = pods.values().filter_map(|joined| match joined {
            Joined::Unfit(_, why, _) => Some(why.as_str()),
            Joined::Fit(_, false) => Some("some of what it sends is not captured: it is no source"),
            Joined::Asked | Joined::Fit(..) => None,
        });
        serde_json::json!({
            "attached": self.kernel().is_some(),
            "trouble": *lock(&self.trouble),
            "ways": counts.written.0,
            "pairs": counts.written.1,
            "pods": counts.pods.0,
            "unfitPods": unfit.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_to_a_pod_that_does_not_qualify_is_not_asked_for_until_the_pod_is() {
        let verdicts = Verdicts::new(None);
        let netns = Netns::current().unwrap();
        let way = Way { netns: netns.id(), dialled: "10.0.0.1:80".parse().unwrap() };
        let ask = || verdicts.are_fit(way, [&netns, &netns].into_iter());
        let wants = || lock(&verdicts.table).wants(&way);
        let is = |joined| drop(lock(&verdicts.pods).insert(netns.id(), joined));
        // Whoever is being prepared is so in a moment.
        assert!(!ask() && wants());
        assert!(matches!(lock(&verdicts.pods)[&netns.id()], Joined::Asked));
        assert!(!ask() && wants());
        is(Joined::Fit(netns.clone(), true));
        assert!(ask() && wants());
        is(Joined::Unfit(netns.clone(), "it has two devices".into(), Instant::now()));
        assert!(!ask() && !wants());
        let other = Way { dialled: "10.0.0.2:80".parse().unwrap(), ..way };
        assert!(lock(&verdicts.table).wants(&other));
        // After a while it may have changed.
        let long_ago = Instant::now() - UNFIT_FOR;
        is(Joined::Unfit(netns.clone(), "it has two devices".into(), long_ago));
        assert_eq!(verdicts.is_fit(&netns), Fit::Asked);
    }
}
