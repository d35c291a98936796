//! What the task that looks after pods has still to do. It may be busy for seconds (programs run); policies don't wait
//! for it, and what waits for it is no more than the newest enrolment of each pod.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::Str;
use tokio::sync::{Notify, oneshot};

use super::EnrolmentChange;

/// The work, given by any task and taken by one.
#[derive(Default)]
pub struct Work {
    pending: Mutex<Pending>,
    wake: Notify,
}

#[derive(Default)]
struct Pending {
    changes: HashMap<Str, Wanted>,
    recheck: bool,
    closed: bool,
}

/// A change, and who wants to know what comes of it.
pub(super) struct Wanted {
    pub(super) change: EnrolmentChange,
    pub(super) reply: Option<oneshot::Sender<Result<(), String>>>,
}

/// What is done in one round.
pub struct Todo {
    /// The newest enrolment of each pod that changed.
    pub(super) changes: Vec<Wanted>,
    /// Whether policies changed: connections of before the enrolment are looked at again.
    pub(super) recheck: bool,
}

impl Work {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds changes of enrolments, in order.
    pub fn add(&self, changes: impl IntoIterator<Item = EnrolmentChange>) {
        let wanted = |change: EnrolmentChange| (change.key().clone(), Wanted { change, reply: None });
        self.pending().changes.extend(changes.into_iter().map(wanted));
        self.wake.notify_one();
    }

    /// Adds a change, and waits for what comes of it.
    ///
    /// # Errors
    /// Why the pod is not enrolled (it is tried again), or that the process is ending.
    pub async fn done(&self, change: EnrolmentChange) -> Result<(), String> {
        let (reply, outcome) = oneshot::channel();
        self.pending().changes.insert(change.key().clone(), Wanted { change, reply: Some(reply) });
        self.wake.notify_one();
        outcome.await.unwrap_or_else(|_| Err("ztunnel is stopping, or was told otherwise meanwhile".into()))
    }

    /// Has the connections of before the enrolment looked at again.
    pub fn recheck(&self) {
        self.pending().recheck = true;
        self.wake.notify_one();
    }

    /// Ends the work: what was begun is finished, and no more is taken.
    pub fn close(&self) {
        let mut pending = self.pending();
        pending.closed = true;
        // Whoever waits for what comes of them waits no longer.
        pending.changes.clear();
        drop(pending);
        self.wake.notify_one();
    }

    /// The next round, when there is one; `None` when the work is closed. Loses nothing when it is dropped.
    pub(super) async fn next(&self) -> Option<Todo> {
        loop {
            {
                let mut pending = self.pending();
                if pending.closed {
                    return None;
                }
                if pending.recheck || !pending.changes.is_empty() {
                    let changes = std::mem::take(&mut pending.changes).into_values().collect();
                    return Some(Todo { changes, recheck: std::mem::take(&mut pending.recheck) });
                }
            }
            self.wake.notified().await;
        }
    }
}
