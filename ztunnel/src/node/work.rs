//! What the task that looks after pods has still to do. It may be busy for seconds (programs run); policies don't wait
//! for it, and what waits for it is no more than the newest enrolment of each pod.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use config::compile::EnrolmentChange;
use model::Str;
use tokio::sync::Notify;

/// The work, given by any task and taken by one.
#[derive(Default)]
pub struct Work {
    pending: Mutex<Pending>,
    wake: Notify,
}

#[derive(Default)]
struct Pending {
    changes: HashMap<Str, EnrolmentChange>,
    recheck: bool,
    closed: bool,
}

/// What is done in one round.
pub struct Todo {
    /// The newest enrolment of each pod that changed.
    pub changes: Vec<EnrolmentChange>,
    /// Whether policies changed: connections of before the enrolment are looked at again.
    pub recheck: bool,
}

impl Work {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds changes of enrolments, in order.
    pub fn add(&self, changes: impl IntoIterator<Item = EnrolmentChange>) {
        let uid = |change: &EnrolmentChange| match change {
            EnrolmentChange::Set(enrolment) => enrolment.uid.clone(),
            EnrolmentChange::Remove(uid) => uid.clone(),
        };
        self.pending().changes.extend(changes.into_iter().map(|change| (uid(&change), change)));
        self.wake.notify_one();
    }

    /// Has the connections of before the enrolment looked at again.
    pub fn recheck(&self) {
        self.pending().recheck = true;
        self.wake.notify_one();
    }

    /// Ends the work: what was begun is finished, and no more is taken.
    pub fn close(&self) {
        self.pending().closed = true;
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
