//! A pod's share of the thread that answers its queries.
//!
//! Answers cost very different times: a headless service with thousands of endpoints takes hundreds of times what a
//! virtual address takes. So the time is what is limited, not the number. A pod that has used up its share is not
//! refused: its next query is read later, and what its socket can't hold is lost, as with any server that is too slow.
//! No other pod's queries wait for it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Receiving and sending, which is not measured, takes about so long; more when it has to wait, so a measure would
/// charge a pod with what is not its doing.
const MESSAGE: Duration = Duration::from_micros(10);

/// No single answer takes longer; the rest is the machine being busy with something else.
const LONGEST: Duration = Duration::from_millis(10);

/// A share that was not used can be used within this time.
const BURST: Duration = Duration::from_secs(1);

/// The share, of one pod.
#[derive(Debug)]
pub(super) struct Budget {
    /// How much time passes for each that may be used: one by the share.
    stretch: f64,
    /// Until when all that was used is paid for.
    paid_at: Mutex<Instant>,
}

impl Budget {
    /// `share` of a thread, from 0 to 1.
    pub(super) fn new(share: f64) -> Self {
        Self { stretch: share.clamp(1e-6, 1.0).recip(), paid_at: Mutex::new(Instant::now()) }
    }

    /// Takes account of a message that took `spent` to answer. How long to wait before the next one, if at all.
    pub(super) fn spend(&self, spent: Duration) -> Option<Duration> {
        let now = Instant::now();
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        *paid_at = (*paid_at).max(now) + (spent.min(LONGEST) + MESSAGE).mul_f64(self.stretch);
        let ahead = paid_at.duration_since(now);
        ahead.checked_sub(BURST).filter(|wait| !wait.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_share_is_had_at_once_and_then_as_time_passes() {
        let budget = Budget::new(0.25);
        let cost = Duration::from_millis(1);
        let run = async |time: Duration| {
            let (end, mut answered) = (Instant::now() + time, 0);
            while Instant::now() < end {
                answered += 1;
                if let Some(wait) = budget.spend(cost) {
                    tokio::time::sleep(wait).await;
                }
            }
            answered
        };
        // A second's share is at hand, and nine more are earned: 2.5 s of the thread, at 1.01 ms each.
        let answered = run(Duration::from_secs(9)).await;
        assert!((2400..2560).contains(&answered), "{answered}");
        // What was not used does not add up.
        tokio::time::advance(Duration::from_secs(3600)).await;
        let answered = run(Duration::from_secs(1)).await;
        assert!((480..520).contains(&answered), "{answered}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thread_that_was_stopped_is_not_the_pods_doing() {
        let budget = Budget::new(0.25);
        assert_eq!(budget.spend(Duration::from_secs(60)), None);
    }
}
