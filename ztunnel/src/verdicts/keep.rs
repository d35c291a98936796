//! The thread that keeps verdicts: it renews their lease, judges them again, ends what is over, and hears what the kernel counted.
//!
//! It is a thread of its own, so that neither traffic nor a large configuration delays the lease; and the one that renews is the
//! one that takes back, so that no verdict outlives for long what can't be taken back.

use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::time::Duration;

use model::NodeLocal;
use net::{Netns, NetnsId};
use nix::time::{ClockId, clock_gettime};
use process::shutdown::{Hold, Phase};
use tokio::sync::mpsc::Receiver;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::judge::Ends;
use super::kernel::{Ending, Kernel, Pair, Passed, Side, Way};
use super::records::Stories;
use super::table::{Judge, Lead, Over};
use super::{Ask, Attach, Joined, Later, Passing, Verdicts, lock};
use crate::proxy::Proxy;

/// How long verdicts outlive this process, or this thread where it hangs.
const LEASE: Duration = Duration::from_secs(3);
const RENEWAL: Duration = Duration::from_millis(500);
/// How often it is asked again what nobody tells of: certificates that run out, addresses that a pod lost.
const RECHECK: Duration = Duration::from_secs(1);
/// How often open connections are looked at: their metrics move as often.
const LOOK: Duration = Duration::from_secs(5);
/// How soon it is asked again what has ended: where something had, and where nothing had.
const BUSY: Duration = Duration::from_millis(20);
const IDLE: Duration = Duration::from_millis(200);
/// How long ztunnel chooses endpoints, after one of them did not take a connection: it finds out which, and leaves it out.
const AVOIDED_FOR: Duration = Duration::from_secs(10);
/// What is taken in one go.
const BATCH: usize = 1024;
/// Batches before other work gets its turn.
const BATCHES: usize = 16;
/// How long pairs are ended at a time. No packet of the others passes meanwhile.
const TURN: Duration = Duration::from_secs(1);
/// Pods whose pairs are ended in one go, in which nothing else gets its turn: for each, the kernel walks the sockets of the machine.
const TOGETHER: usize = 16;
/// Pods that are looked at again at a time.
const AGAIN: usize = 8;
/// How often at least it is looked for what an earlier process left, where no namespace wants verdicts.
const LEFT_AGAIN: Duration = Duration::from_secs(30);
/// How long an earlier process's pairs wait for both of their pods. Afterwards they are ended where there is one.
const INHERITED_FOR: Duration = Duration::from_secs(120);

/// Starts the thread. `attached` is called when the programs that know verdicts have become part of capture.
///
/// # Errors
/// There is no thread to be had.
pub fn keep(proxy: &Arc<Proxy>, attached: impl Fn() + Send + 'static) -> io::Result<()> {
    let Some(asked) = lock(&proxy.verdicts.asked).take() else { return Ok(()) };
    if proxy.verdicts.attach.is_none() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let hold = proxy.shutdown.hold();
    let mut keeper = Keeper {
        proxy: proxy.clone(),
        attached: Box::new(attached),
        inherited: Vec::new(),
        inherited_at: Instant::now(),
        attach_at: Instant::now(),
        looked: false,
        look: Pause::default(),
        again: Vec::new(),
        renewed: Cell::new(Instant::now()),
        judged: Cell::new(Instant::now()),
    };
    keeper.attach();
    std::thread::Builder::new().name("verdicts".into()).spawn(move || {
        runtime.block_on(keeper.run(asked, hold));
    })?;
    Ok(())
}

/// Until something is tried again that nobody waits for: each time longer.
#[derive(Default)]
struct Pause {
    until: Option<Instant>,
    length: Duration,
}

impl Pause {
    fn is_over(&self) -> bool {
        self.until.is_none_or(|until| until <= Instant::now())
    }

    /// Begins the next, and says how long it is.
    fn again(&mut self) -> Duration {
        self.length = (self.length * 2).clamp(RECHECK, LEFT_AGAIN);
        self.until = Some(Instant::now() + self.length);
        self.length
    }
}

/// Nobody may pass.
struct Nobody(&'static str);

impl Judge<Ends, Stories> for Nobody {
    fn against(&self, _: &Pair, _: &Ends) -> Option<String> {
        Some(self.0.to_owned())
    }

    fn leads(&self, _: &Way, _: &[Lead<&Ends, &Stories>]) -> bool {
        false
    }
}

struct Keeper {
    proxy: Arc<Proxy>,
    attached: Box<dyn Fn() + Send>,
    /// An earlier process's pairs, which are revoked and may have sockets.
    inherited: Vec<Pair>,
    inherited_at: Instant,
    attach_at: Instant,
    /// Whether nothing is left of an earlier process that has not been taken over.
    looked: bool,
    /// Until it is looked again where no namespace wants verdicts.
    look: Pause,
    /// Pods that are yet to be looked at again.
    again: Vec<NetnsId>,
    renewed: Cell<Instant>,
    /// When all that stands was judged last.
    judged: Cell<Instant>,
}

/// The time, by the clock that the kernel's records are of.
fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

fn tick(period: Duration) -> tokio::time::Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Keeper {
    async fn run(mut self, mut asked: Receiver<Ask>, hold: Hold) {
        let mut hold = Some(hold);
        let shutdown = self.proxy.shutdown.clone();
        let (mut renewal, mut recheck, mut look) = (tick(RENEWAL), tick(RECHECK), tick(LOOK));
        let mut pause = IDLE;
        loop {
            tokio::select! {
                biased;
                _ = renewal.tick() => {
                    if self.has_lapsed() {
                        self.recheck();
                    }
                    self.renew();
                }
                ask = asked.recv() => match ask {
                    Some(ask) => self.answer(ask),
                    None => return,
                },
                () = shutdown.draining(), if hold.is_some() => {
                    // New connections are for this process to refuse, or a successor's. What is open has the grace period.
                    self.recheck();
                    self.look();
                    hold = None;
                }
                _ = recheck.tick() => {
                    self.attach();
                    self.join_again();
                    self.recheck();
                    self.end_inherited();
                    self.detach();
                }
                _ = look.tick() => self.look(),
                () = sleep(pause) => pause = if self.hear() { BUSY } else { IDLE },
            }
        }
    }

    fn verdicts(&self) -> &Verdicts {
        &self.proxy.verdicts
    }

    fn kernel(&self) -> Option<Arc<dyn Kernel>> {
        self.verdicts().kernel()
    }

    fn answer(&mut self, ask: Ask) {
        let done = |done: oneshot::Sender<()>| {
            // Whoever asked may no longer wait.
            let _ = done.send(());
        };
        match ask {
            Ask::Join(netns) => self.join(&netns),
            Ask::Recheck(reply) => {
                self.attach();
                self.recheck();
                done(reply);
            }
            Ask::Look(reply) => {
                self.look();
                done(reply);
            }
            Ask::Passing(reply) => {
                // Whoever asked may no longer wait.
                let _ = reply.send(self.passing());
            }
            Ask::End(reply) => {
                self.end();
                done(reply);
            }
        }
    }

    /// Whether some namespace wants them.
    fn is_wanted(&self) -> bool {
        let mesh = self.proxy.state.mesh();
        let settings = &mesh.settings().node_local;
        settings.mesh == NodeLocal::Kernel
            || settings.namespaces.values().any(|mode| *mode == NodeLocal::Kernel)
    }

    /// Takes the programs away, once no namespace wants them and nothing is left of what passed by them.
    fn detach(&mut self) {
        let verdicts = self.verdicts();
        let Some(kernel) = self.kernel().filter(|_| !self.is_wanted() && self.inherited.is_empty()) else {
            return;
        };
        self.hear();
        if lock(&verdicts.records).counts().0 > 0 {
            return;
        }
        // Whoever writes has it, and looks under it whether there is a kernel's side.
        let table = lock(&verdicts.table);
        if table.len() != (0, 0) {
            return;
        }
        let removed = kernel.remove();
        if matches!(removed, Ok(false)) {
            // Somebody installs, or goes by it.
            return;
        }
        verdicts.set_kernel(None);
        lock(&verdicts.pods).clear();
        drop(table);
        match removed {
            Ok(_) => tracing::info!("no connections pass by verdicts any more: no namespace wants it"),
            // There is no pair and no lease. Whoever wants verdicts attaches anew.
            Err(error) => {
                tracing::warn!(%error, "the programs of verdicts can't be taken away; what is left of them lets nothing by");
                // It is tried again, as with what an earlier process left.
                self.looked = false;
                self.look.again();
            }
        }
    }

    /// Whether an earlier process may have left what nobody ended yet: it drops what has the addresses of its pairs, also where no
    /// namespace wants verdicts any more.
    fn is_left(&mut self, attach: &Attach) -> bool {
        // Before, namespaces that want them may be yet to come.
        if self.looked || !self.look.is_over() || !self.proxy.state.is_complete() {
            return false;
        }
        self.looked = !(attach.is_left)();
        !self.looked
    }

    /// Attaches the programs, once some namespace wants them, or to end what an earlier process left.
    fn attach(&mut self) {
        let proxy = self.proxy.clone();
        let verdicts = &proxy.verdicts;
        // One that stops writes nothing more.
        let is_over = verdicts.over.load(Relaxed) || self.proxy.shutdown.phase() != Phase::Running;
        if is_over || verdicts.kernel().is_some() || Instant::now() < self.attach_at {
            return;
        }
        let Some(attach) = &verdicts.attach else { return };
        let is_wanted = self.is_wanted();
        if !is_wanted && !self.is_left(attach) {
            return;
        }
        let made = (attach.attach)(&self.proxy.locals.namespaces());
        verdicts.elsewhere.store(made.as_ref().is_err_and(|later| later.is_taken), Relaxed);
        let made = made.and_then(|kernel| {
            // Nothing passes by what an earlier process knew.
            let inherited = kernel.stop().and_then(|()| kernel.inherit()).map_err(|e| e.to_string())?;
            // All that it wrote is revoked by now, of whatever generation: the table counts from the first.
            kernel.commit(NonZeroU64::MIN).map_err(|e| e.to_string())?;
            Ok((kernel, inherited))
        });
        match made {
            Ok((kernel, inherited)) => {
                let inherited_pairs = inherited.len();
                if is_wanted {
                    tracing::info!(inherited_pairs, "connections within the node may pass by verdicts");
                } else {
                    tracing::debug!(inherited_pairs, "ends what is left of an earlier process's verdicts");
                }
                self.looked = true;
                (self.inherited, self.inherited_at) = (inherited, Instant::now());
                verdicts.set_kernel(Some(kernel.into()));
                *lock(&verdicts.trouble) = None;
                // Nothing stands.
                self.judged.set(Instant::now());
                self.renew();
                (self.attached)();
            }
            Err(Later { why, .. }) if !is_wanted => {
                let again = self.look.again();
                tracing::debug!(
                    why,
                    ?again,
                    "what may be left of an earlier process's verdicts can't be taken over yet"
                );
            }
            Err(Later { why, after, is_turn, .. }) => {
                let mut trouble = lock(&verdicts.trouble);
                if trouble.as_ref() != Some(&why) {
                    if is_turn {
                        tracing::info!(why, "no connection passes by a verdict yet (nodeLocal: kernel)");
                    } else {
                        tracing::warn!(why, "no connection passes by a verdict (nodeLocal: kernel)");
                    }
                }
                *trouble = Some(why);
                self.attach_at = Instant::now() + after;
            }
        }
    }

    /// Whether the lease ran out, and nothing was judged since: this thread hung, or the machine slept.
    fn has_lapsed(&self) -> bool {
        self.renewed.get().elapsed() > LEASE && self.judged.get().elapsed() > LEASE
    }

    /// Lets what stands go on for a while, unless something could not be taken back or is to be judged first.
    fn renew(&self) {
        let verdicts = self.verdicts();
        if verdicts.is_stuck() || verdicts.over.load(Relaxed) || self.has_lapsed() {
            return;
        }
        let Some(kernel) = self.kernel() else { return };
        match kernel.renew(LEASE) {
            Ok(()) => self.renewed.set(Instant::now()),
            Err(error) => {
                tracing::error!(%error, "the lease of verdicts is not renewed: connections that pass by them stall");
            }
        }
    }

    fn join(&self, netns: &Netns) {
        let Some(kernel) = self.kernel() else {
            lock(&self.verdicts().pods).remove(&netns.id());
            return;
        };
        let joined = match kernel.join(netns) {
            Ok(may_begin) => Joined::Fit(netns.clone(), may_begin),
            Err(why) => {
                tracing::info!(%netns, why, "connections of the pod take the way through ztunnel");
                Joined::Unfit(netns.clone(), why, Instant::now())
            }
        };
        lock(&self.verdicts().pods).insert(netns.id(), joined);
    }

    /// Looks again at some of the pods that joined, in turns: what of their traffic is captured may have changed.
    fn join_again(&mut self) {
        if self.again.is_empty() {
            self.again = lock(&self.proxy.verdicts.pods).keys().copied().collect();
        }
        for _ in 0..AGAIN {
            let Some(id) = self.again.pop() else { return };
            let netns = match lock(&self.verdicts().pods).get(&id) {
                Some(Joined::Fit(netns, _)) => netns.clone(),
                _ => continue,
            };
            self.join(&netns);
            self.renew();
        }
    }

    /// Judges again what stands, and ends what is not allowed any more.
    fn recheck(&self) {
        let Some(kernel) = self.kernel() else { return };
        let began = Instant::now();
        // Before anything is judged: whoever is told late from here on asks for more than this may see.
        self.verdicts().late.swap(false, AcqRel);
        let (over, outcome) = lock(&self.verdicts().table).recheck(&*kernel, &*self.proxy);
        self.judged.set(began);
        self.note(outcome);
        self.finish(&*kernel, &over);
        self.release(&*kernel);
    }

    /// Whether something could not be taken back.
    fn note(&self, outcome: io::Result<()>) {
        let was = self.verdicts().stuck.swap(outcome.is_err(), Relaxed);
        match outcome {
            Err(error) if !was => {
                tracing::error!(%error, "verdicts can't be taken back; their lease is left to end");
            }
            Ok(()) if was => tracing::info!("verdicts could be taken back; their lease is renewed again"),
            _ => {}
        }
    }

    /// Ends pairs that are revoked. What can't be ended now is when it is asked again; no packet of it passes.
    fn finish(&self, kernel: &dyn Kernel, over: &[Over<Ends>]) {
        if over.is_empty() {
            return;
        }
        self.renew();
        self.enter();
        let reasons = over.iter().filter_map(|over| Some((over.pair, over.reason.as_deref()?))).collect();
        let cut = lock(&self.verdicts().records).cut(&reasons);
        let (mut ended, began) = (Vec::new(), Instant::now());
        for group in groups(over.iter().map(Over::ending).collect()) {
            // The next round has what is left of them; the last one has to end all.
            if began.elapsed() > TURN && !self.verdicts().over.load(Relaxed) {
                break;
            }
            let outcomes = kernel.end(&group, &mut || self.renew());
            for (Ending { pair, .. }, outcome) in group.iter().zip(outcomes) {
                match outcome {
                    Ok(true) => ended.push(*pair),
                    Ok(false) => tracing::debug!(?pair, "sockets of a revoked pair are still there"),
                    Err(error) => tracing::warn!(?pair, %error, "sockets of a revoked pair can't be ended"),
                }
            }
        }
        self.verdicts().cut.fetch_add(cut, Relaxed);
        if cut > 0 {
            tracing::info!(sockets = cut, "cut connections past ztunnel that are no longer allowed");
        }
        self.hear();
        let mut table = lock(&self.verdicts().table);
        ended.iter().for_each(|pair| table.ended(pair));
    }

    /// Lets go of pods that have left the mesh.
    fn release(&self, kernel: &dyn Kernel) {
        let verdicts = self.verdicts();
        let used = lock(&verdicts.table).namespaces();
        let is_left = |id: &NetnsId, joined: &mut Joined| {
            !matches!(joined, Joined::Asked) && !self.proxy.locals.serves_in(*id) && !used.contains(id)
        };
        let left: Vec<_> = lock(&verdicts.pods).extract_if(is_left).collect();
        // Not under the lock, which connections take. Whoever asks for one of them meanwhile is heard after this.
        for (_, joined) in left {
            // One that does not qualify any more may have done so, and has the program still.
            if let Joined::Fit(netns, _) | Joined::Unfit(netns, ..) = joined {
                kernel.leave(&netns);
            }
        }
    }

    /// Enters what is open, and forgets pairs that nothing leads to.
    fn look(&self) {
        let (Some(kernel), Some(listed)) = (self.kernel(), self.enter()) else { return };
        let mut open = lock(&self.verdicts().records).pairs();
        open.extend(listed.iter().map(|passed| passed.pair));
        let idle = {
            let mut table = lock(&self.verdicts().table);
            if let Err(error) = table.relieve(&*kernel) {
                tracing::warn!(%error, "no room can be made for verdicts");
            }
            table.idle(&open)
        };
        self.finish(&*kernel, &idle);
    }

    /// What passes now, unless that is another process's to say.
    fn passing(&mut self) -> Option<Passing> {
        self.attach();
        if self.kernel().is_none() && self.is_wanted() && self.verdicts().elsewhere.load(Relaxed) {
            return None;
        }
        let open = self.enter().unwrap_or_default();
        let ends =
            |passed: &Passed| (passed.pair.to, SocketAddr::new(passed.pair.source, passed.source_port));
        Some(open.iter().map(ends).collect())
    }

    /// Enters what is open, which it returns.
    fn enter(&self) -> Option<Vec<Passed>> {
        let listing = match self.kernel()?.listing() {
            Ok(listing) => listing,
            Err(error) => {
                tracing::warn!(%error, "connections past ztunnel can't be listed");
                return None;
            }
        };
        let now = monotonic();
        let mut records = lock(&self.verdicts().records);
        records.ended(&self.proxy, now, &listing.ended, &mut |passed| self.told(passed));
        records.found(&self.proxy, now, &listing.open, &mut |passed| self.told(passed));
        Some(listing.open)
    }

    fn told(&self, passed: &Passed) -> Option<Arc<Stories>> {
        let dialled = match passed.side {
            Side::Source(service) => Some(service.unwrap_or(passed.pair.to)),
            Side::Destination => None,
        };
        lock(&self.verdicts().table).told(dialled, &passed.pair)
    }

    /// Leaves to ztunnel, for a while, what leads to endpoints that did not take a connection: it may choose others.
    fn avoid(&self, kernel: &dyn Kernel, ended: &[Passed]) {
        for passed in ended.iter().filter(|passed| !passed.established) {
            let Side::Source(Some(dialled)) = passed.side else { continue };
            let taken = lock(&self.verdicts().table).failed(kernel, dialled, &passed.pair, AVOIDED_FOR);
            if let Err(error) = taken {
                tracing::warn!(%dialled, %error, "what leads to an endpoint that fails can't be taken back");
            }
        }
    }

    /// Takes what has ended. Whether anything had.
    fn hear(&self) -> bool {
        let Some(kernel) = self.kernel() else { return false };
        let mut any = false;
        for _ in 0..BATCHES {
            let ended = match kernel.ended(BATCH) {
                Ok(ended) => ended,
                Err(error) => {
                    tracing::warn!(%error, "ends of connections past ztunnel can't be read");
                    return false;
                }
            };
            any |= !ended.is_empty();
            self.avoid(&*kernel, &ended);
            let mut records = lock(&self.verdicts().records);
            records.ended(&self.proxy, monotonic(), &ended, &mut |passed| self.told(passed));
            if ended.len() < BATCH {
                break;
            }
        }
        any
    }

    /// Ends what an earlier process has left, as the pods come that it is of.
    fn end_inherited(&mut self) {
        let Some(kernel) = self.kernel() else { return };
        if self.inherited.is_empty() {
            return;
        }
        // Until then their pods may be yet to come.
        let is_overdue = self.inherited_at.elapsed() > INHERITED_FOR && self.proxy.state.is_complete();
        let (mesh, began) = (self.proxy.state.mesh_owned(), Instant::now());
        let inherited = std::mem::take(&mut self.inherited);
        let with_ends = inherited.into_iter().map(|pair| {
            let ends = [pair.source, pair.to.ip()].map(|ip| self.proxy.locals.at(&mesh, ip));
            (pair, ends.map(|pod| pod.map(|pod| pod.netns.clone())))
        });
        let (ready, waiting): (Vec<_>, Vec<_>) =
            with_ends.partition(|(_, ends)| is_overdue || ends.iter().all(Option::is_some));
        let mut kept: Vec<Pair> = waiting.into_iter().map(|(pair, _)| pair).collect();
        let endings = ready
            .iter()
            .map(|(pair, ends)| Ending { pair: *pair, netns: ends.each_ref().map(Option::as_ref) });
        for group in groups(endings.collect()) {
            if began.elapsed() > TURN {
                // In turns.
                kept.extend(group.iter().map(|ending| ending.pair));
            } else {
                kept.extend(self.left_of(&*kernel, group));
            }
        }
        self.inherited = kept;
    }

    /// Ends an earlier process's pairs. Those of which something is left, but for what is this process's by now.
    fn left_of(&self, kernel: &dyn Kernel, mut group: Vec<Ending<'_>>) -> Vec<Pair> {
        // Under the lock nothing is written: what is allowed again stays, with the sockets that it has.
        let table = lock(&self.verdicts().table);
        group.retain(|ending| !table.holds(&ending.pair));
        let outcomes = kernel.end(&group, &mut || self.renew());
        let is_left = |(ending, outcome): (&Ending<'_>, io::Result<bool>)| {
            if let Err(error) = &outcome {
                tracing::debug!(pair = ?ending.pair, %error, "a pair of an earlier process can't be ended");
            }
            (!outcome.unwrap_or(false)).then_some(ending.pair)
        };
        group.iter().zip(outcomes).filter_map(is_left).collect()
    }

    /// Takes back all, and ends what passes.
    fn end(&self) {
        let verdicts = self.verdicts();
        verdicts.over.store(true, Relaxed);
        let Some(kernel) = self.kernel() else { return };
        let judge =
            Nobody(if self.proxy.shutdown.phase() == Phase::Running { "over" } else { "ztunnel stops" });
        let (over, outcome) = lock(&verdicts.table).recheck(&*kernel, &judge);
        self.note(outcome);
        self.finish(&*kernel, &over);
        if let Err(error) = kernel.stop() {
            tracing::warn!(%error, "the lease of verdicts ends by itself");
        }
    }
}

/// Pairs that are ended in one go, those of the same pods together as far as that goes.
fn groups(mut over: Vec<Ending<'_>>) -> Vec<Vec<Ending<'_>>> {
    over.sort_by_key(|ending| ending.netns.map(|netns| netns.map(Netns::id)));
    let (mut groups, mut pods): (Vec<Vec<Ending<'_>>>, _) = (Vec::new(), HashSet::new());
    for ending in over {
        pods.extend(ending.netns.iter().flatten().map(|netns| netns.id()));
        match groups.last_mut() {
            Some(group) if pods.len() <= TOGETHER => group.push(ending),
            _ => {
                pods = ending.netns.iter().flatten().map(|netns| netns.id()).collect();
                groups.push(vec![ending]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_waits_for_is_tried_less_and_less_often() {
        let mut pause = Pause::default();
        assert!(pause.is_over(), "the first time at once");
        let seconds: Vec<u64> = (0..8).map(|_| pause.again().as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert!(!pause.is_over());
    }
}
