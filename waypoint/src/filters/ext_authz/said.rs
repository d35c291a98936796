//! What external authorizers said of a request, as `culvert why` tells it.

use std::fmt;

use model::Str;

/// The longest error that is kept, in bytes.
const LONGEST: usize = 256;

/// One authorizer's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    /// The name of its provider.
    pub provider: Str,
    /// What it was.
    pub outcome: Outcome,
}

/// What an answer was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The request may go on.
    Allowed,
    /// It may not, and is answered with this status.
    Denied(u16),
    /// It was not asked, for the request's body is longer than it may be shown.
    TooLong,
    /// None, and why.
    None {
        /// In words, cut to 256 bytes.
        error: Box<str>,
        /// Whether the request went on all the same (`failOpen`).
        passed: bool,
    },
}

impl Said {
    pub(super) fn of(provider: &Str, outcome: Outcome) -> Self {
        Self { provider: provider.clone(), outcome }
    }

    /// Of one that has not answered.
    pub(super) fn nothing(provider: &Str, error: &str, passed: bool) -> Self {
        let error = error.get(..error.floor_char_boundary(LONGEST)).unwrap_or_default().into();
        Self::of(provider, Outcome::None { error, passed })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Denied(status) => write!(f, "denied with {status}"),
            Self::TooLong => f.write_str("not asked: the request's body is longer than it may be shown"),
            Self::None { error, passed: true } => write!(f, "no answer, passed over (failOpen): {error}"),
            Self::None { error, passed: false } => write!(f, "no answer, so denied: {error}"),
        }
    }
}
