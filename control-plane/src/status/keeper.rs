//! Writes the status of objects while this control plane leads.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use process::metrics::{Counter, Gauge, Handle, Registry};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use xds::server::Server;

use super::followers::Followers;
use super::ledger::{Due, Ledger, World};
use super::peers::Peers;
use super::proxies::Proxies;
use super::writer::Writer;
use crate::alive::Ztunnels;
use crate::push::Exceptions;

/// How often it is looked while something changes.
const ROUND: Duration = Duration::from_millis(500);
/// How often while nothing does, for what nobody tells: proxies of other control planes, and those of none.
const IDLE: Duration = Duration::from_secs(5);
/// Rounds without anything to write after which they come less often.
const QUIET: u32 = 20;
/// How many objects are written at a time.
const AT_A_TIME: usize = 8;
/// How long Leases are waited for in a round.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is counted.
struct Counts {
    waiting: Handle<(), Gauge>,
    written: Handle<(), Counter>,
    failed: Handle<(), Counter>,
}

/// See the module's documentation.
pub struct Keeper {
    /// The objects.
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
    /// This control plane's revision.
    pub revision: String,
    /// Whether this control plane leads.
    pub leads: watch::Receiver<bool>,
}

impl Keeper {
    /// Runs until the process ends.
    pub async fn run(mut self, metrics: Registry) {
        let counts = Counts {
            waiting: metrics.gauge("culvertd_status_waiting", "Objects whose status is to be looked at"),
            written: metrics.counter("culvertd_status_writes", "Objects whose status was written"),
            failed: metrics
                .counter("culvertd_status_write_errors", "Objects whose status could not be written"),
        };
        let mut ledger = Ledger::new(&self.revision);
        let (mut progress, mut changed) = (self.server.progress(), self.followers.changed());
        let mut leads = self.leads.clone();
        let mut next = Instant::now();
        let mut quiet = 0;
        loop {
            let leading = *leads.borrow_and_update();
            tokio::select! {
                Ok(()) = progress.changed(), if leading => {
                    (next, quiet) = (next.min(Instant::now() + ROUND), 0);
                }
                Ok(()) = changed.changed(), if leading => {
                    (next, quiet) = (next.min(Instant::now() + ROUND), 0);
                }
                turned = leads.changed() => {
                    if turned.is_err() {
                        return;
                    }
                    ledger.begin();
                    (next, quiet) = (Instant::now(), 0);
                }
                () = tokio::time::sleep_until(next), if leading => {
                    let wrote = self.round(&mut ledger, &counts).await;
                    quiet = if wrote { 0 } else { quiet + 1 };
                    let pause = if ledger.is_settled() { IDLE } else { ROUND * (1 << (quiet / QUIET).min(3)) };
                    let latest = Instant::now() + pause;
                    next = ledger.next().map_or(latest, |at| at.max(Instant::now() + ROUND).min(latest));
                }
            }
        }
    }

    /// Writes what is due; whether there was something.
    async fn round(&mut self, ledger: &mut Ledger, counts: &Counts) -> bool {
        let told = self.peers.ask().await;
        if let (Some(mut all), Some(waypoints)) = (self.ztunnels.list(), self.ztunnels.waypoints()) {
            all.extend(waypoints);
            // What was not read in time is asked for again.
            let _ = timeout(PATIENCE, self.ztunnels.look(ledger.doubted(&all))).await;
        }
        let (ztunnels, waypoints) = (self.ztunnels.list(), self.ztunnels.waypoints());
        let proxies = Proxies::of(&self.server);
        let due = ledger.due(&World {
            followers: &self.followers,
            proxies: &proxies,
            peers: &self.peers,
            told,
            ztunnels: ztunnels.as_deref(),
            waypoints: waypoints.as_deref(),
            exceptions: &self.exceptions,
        });
        counts.waiting.set(i64::try_from(ledger.waiting()).unwrap_or(i64::MAX));
        let any = !due.is_empty();
        let mut outcomes =
            stream::iter(due.into_iter().map(|due| self.write(due))).buffer_unordered(AT_A_TIME);
        while let Some((due, outcome)) = outcomes.next().await {
            if let Err(reason) = &outcome {
                counts.failed.inc();
                tracing::warn!(object = %due.name, reason, "its status could not be written");
            } else {
                counts.written.inc();
            }
            ledger.wrote(due, outcome.map_err(drop));
        }
        any
    }

    async fn write(&self, due: Due) -> (Due, Result<(), String>) {
        let outcome = self.writer.write(&due.name, &due.state, &due.conditions).await;
        (due, outcome)
    }
}
