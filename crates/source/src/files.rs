//! The configuration of file mode: a directory of manifests.

use std::path::Path;

use config::compile;
use config::diagnostic::Severity;
use config::directory::{Directory, Options};
use config::repository::Outcome;
use serde_json::Value;

use crate::Update;

/// A directory that is followed.
pub struct Files {
    directory: Directory,
}

impl Files {
    /// Reads the directory; with `node`, as one that enrols its pods.
    ///
    /// # Errors
    /// It can't be read, or something in it has an error: nothing was in force before that could stay.
    pub fn open(directory: &Path, node: Option<&str>) -> anyhow::Result<(Self, Update)> {
        let compile = compile::Options { node: node.map(Into::into), ..compile::Options::default() };
        let (directory, first) = Directory::open(directory, Options { compile, ..Options::default() })?;
        say(&first);
        Ok((Self { directory }, first.into()))
    }

    /// The next change.
    pub async fn next(&mut self) -> Update {
        let outcome = self.directory.next().await;
        say(&outcome);
        outcome.into()
    }

    /// All there is to say of the directory as it is.
    #[must_use]
    pub fn diagnostics(&self) -> Value {
        serde_json::to_value(self.directory.diagnostics()).unwrap_or_default()
    }
}

impl From<Outcome> for Update {
    fn from(outcome: Outcome) -> Self {
        Self { changes: outcome.changes, enrolments: outcome.enrolments, complete: true }
    }
}

/// Logs what is new.
fn say(outcome: &Outcome) {
    for diagnostic in &outcome.diagnostics {
        match diagnostic.severity {
            Severity::Error => tracing::error!("{diagnostic}"),
            Severity::Warning => tracing::warn!("{diagnostic}"),
            Severity::Info => tracing::debug!("{diagnostic}"),
        }
    }
}
