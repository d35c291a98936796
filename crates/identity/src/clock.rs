//! Wall-clock time, which certificates are bound to. It is passed in, because it jumps (NTP, suspend), differs
//! between nodes, and tests must be able to move it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls_pki_types::UnixTime;
use time::OffsetDateTime;

/// Where this crate reads the wall clock.
#[derive(Clone, Debug)]
pub struct Clock(Arc<dyn TimeProvider>);

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Arc::new(DefaultTimeProvider))
    }

    /// Another source of time.
    #[must_use]
    pub fn new(provider: Arc<dyn TimeProvider>) -> Self {
        Self(provider)
    }

    /// The time now, in whole seconds since 1970.
    #[must_use]
    pub fn now(&self) -> UnixTime {
        self.0.current_time().unwrap_or_else(UnixTime::now)
    }

    pub(crate) fn provider(&self) -> Arc<dyn TimeProvider> {
        self.0.clone()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

/// `time` later by `by`, at most the end of time.
pub(crate) fn later(time: UnixTime, by: Duration) -> UnixTime {
    at(time.as_secs().saturating_add(by.as_secs()))
}

/// `time` earlier by `by`, at least 1970.
pub(crate) fn earlier(time: UnixTime, by: Duration) -> UnixTime {
    at(time.as_secs().saturating_sub(by.as_secs()))
}

/// From `from` to `to`; zero if `to` is not later.
pub(crate) fn between(from: UnixTime, to: UnixTime) -> Duration {
    Duration::from_secs(to.as_secs().saturating_sub(from.as_secs()))
}

/// The time `seconds` after the start of 1970.
pub(crate) fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// A time as people and logs read it: `2026-11-03T14:05:09Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub UnixTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match i64::try_from(seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok()) {
            Some(t) => write!(
                f,
                "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
                t.year(),
                u8::from(t.month()),
                t.day(),
                t.hour(),
                t.minute(),
                t.second()
            ),
            None => write!(f, "{seconds} s after 1970"),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_reads_as_a_date() {
        assert_eq!(Timestamp(at(1_793_714_709)).to_string(), "2026-11-03T14:05:09Z");
        assert_eq!(Timestamp(at(u64::MAX)).to_string(), format!("{} s after 1970", u64::MAX));
    }
}
