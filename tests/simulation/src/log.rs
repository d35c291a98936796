//! What happened, with the simulation's time.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

/// Lines in the order of events. Clones write to the same log.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Adds a line. Inside the simulation it begins with the milliseconds since its start.
    pub fn note(&self, what: impl Display) {
        let millis = turmoil::sim_elapsed().unwrap_or_default().as_millis();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{millis:>7} {what}"));
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many lines hold `text`.
    #[must_use]
    pub fn count(&self, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(text)).count()
    }
}
