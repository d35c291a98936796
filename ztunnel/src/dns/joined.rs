//! Queries under way: equal ones wait for one answer.
//!
//! An answer that somebody wants to forge has to meet a query's port and identifier. With many queries for the same
//! thing under way at once, each of which will do, guessing gets easier by their number (RFC 5452, section 5), and the
//! answer is then in the cache of all pods. It also keeps an answer that expires from being asked for by all at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;
use tokio::sync::watch;

/// What comes of a query: `None` while it is under way, then the response, or nothing when no server answers.
type Outcome = Option<Option<Arc<[u8]>>>;

type Queries = HashMap<Box<[u8]>, watch::Receiver<Outcome>>;

/// The queries under way. There are no more than leaders, whose number is limited elsewhere.
#[derive(Clone, Debug, Default)]
pub(super) struct Joined(Arc<Mutex<Queries>>);

impl Joined {
    /// Waits with the one who asks already, if there is one.
    pub(super) fn follow(&self, key: &[u8]) -> Option<Waiting> {
        self.queries().get(key).cloned().map(Waiting)
    }

    /// Asks on behalf of all, unless somebody does already.
    pub(super) fn lead(&self, key: &[u8]) -> Result<(Leader, Waiting), Waiting> {
        let mut queries = self.queries();
        if let Some(waiting) = queries.get(key) {
            return Err(Waiting(waiting.clone()));
        }
        let (sender, waiting) = watch::channel(None);
        queries.insert(key.into(), waiting.clone());
        Ok((Leader { joined: self.clone(), key: key.into(), sender }, Waiting(waiting)))
    }

    fn queries(&self) -> MutexGuard<'_, Queries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who asks. When it is dropped, nobody follows it any more, and who does has no answer.
#[derive(Debug)]
pub(super) struct Leader {
    joined: Joined,
    key: Box<[u8]>,
    sender: watch::Sender<Outcome>,
}

impl Leader {
    /// Tells all what came of it.
    pub(super) fn finish(self, response: Option<Vec<u8>>) {
        self.sender.send_replace(Some(response.map(Into::into)));
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.joined.queries().remove(&self.key);
    }
}

/// Who waits for an answer.
#[derive(Debug)]
pub(super) struct Waiting(watch::Receiver<Outcome>);

impl Waiting {
    /// The response; `None` when no server answers.
    pub(super) async fn response(mut self) -> Option<Vec<u8>> {
        let outcome = self.0.wait_for(Option::is_some).await.ok()?;
        outcome.as_ref()?.as_deref().map(<[u8]>::to_vec)
    }
}
