//! Where the configuration comes from: in file mode, a directory of manifests.

use std::sync::Arc;
use std::time::Duration;

use config::compile::{EnrolmentChange, Options};
use config::repository::{Content, Repository};
use serde_json::Value;

use crate::settings::Flags;

/// What changed.
pub struct Batch {
    /// For the snapshot.
    pub changes: Vec<model::Change>,
    /// For this node's pods.
    pub enrolments: Vec<EnrolmentChange>,
    /// All diagnostics of now.
    pub diagnostics: Value,
}

/// A directory.
pub struct Source {
    dir: std::path::PathBuf,
    repository: Repository,
    seen: std::collections::HashMap<std::path::PathBuf, Vec<u8>>,
    first: Option<Batch>,
}

impl Source {
    pub fn open(flags: &Flags) -> anyhow::Result<Self> {
        let options = Options { node: Some(flags.node.as_str().into()), ..Options::default() };
        let mut source = Self {
            dir: flags.config_dir.clone(),
            repository: Repository::new(options),
            seen: std::collections::HashMap::default(),
            first: None,
        };
        source.first = source.poll();
        Ok(source)
    }

    pub fn first(&mut self) -> Batch {
        self.first.take().unwrap_or(Batch { changes: vec![], enrolments: vec![], diagnostics: Value::Null })
    }

    fn poll(&mut self) -> Option<Batch> {
        let mut now = std::collections::HashMap::default();
        for entry in std::fs::read_dir(&self.dir).ok()?.flatten() {
            if let Ok(bytes) = std::fs::read(entry.path()) {
                now.insert(entry.path(), bytes);
            }
        }
        if now == self.seen {
            return None;
        }
        for (path, bytes) in &now {
            if self.seen.get(path) != Some(bytes) {
                let name: Arc<str> = path.to_string_lossy().into();
                self.repository.stage(&name, Content::Bytes(bytes));
            }
        }
        for path in self.seen.keys().filter(|p| !now.contains_key(*p)) {
            let name: Arc<str> = path.to_string_lossy().into();
            self.repository.stage(&name, Content::Gone);
        }
        self.seen = now;
        let outcome = self.repository.commit();
        for d in &outcome.diagnostics {
            tracing::warn!("{d}");
        }
        let diagnostics = serde_json::to_value(self.repository.diagnostics()).unwrap_or_default();
        Some(Batch { changes: outcome.changes, enrolments: outcome.enrolments, diagnostics })
    }

    pub async fn next(&mut self) -> Batch {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if let Some(batch) = self.poll() {
                return batch;
            }
        }
    }
}
