//! Where the configuration comes from: in file mode, a directory of manifests.

use config::compile;
use config::diagnostic::Severity;
use config::directory::{Directory, Options};
use config::repository::Outcome;
use serde_json::Value;

use crate::settings::Flags;

/// A directory that is followed.
pub struct Source {
    directory: Directory,
}

impl Source {
    /// Reads the directory.
    ///
    /// # Errors
    /// It can't be read, or something in it has an error: nothing was in force before that could stay.
    pub fn open(flags: &Flags) -> anyhow::Result<(Self, Outcome)> {
        let compile =
            compile::Options { node: Some(flags.node.as_str().into()), ..compile::Options::default() };
        let (directory, first) =
            Directory::open(&flags.config_dir, Options { compile, ..Options::default() })?;
        say(&first);
        Ok((Self { directory }, first))
    }

    /// The next change.
    pub async fn next(&mut self) -> Outcome {
        let outcome = self.directory.next().await;
        say(&outcome);
        outcome
    }

    /// All there is to say of the directory as it is.
    pub fn diagnostics(&self) -> Value {
        serde_json::to_value(self.directory.diagnostics()).unwrap_or_default()
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
