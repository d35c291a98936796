//! The Gateways that are waypoints, for those who let their proxies in.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use model::Str;

/// Namespaces and names. Cloning shares them. The registry fills them in with each commit.
#[derive(Clone, Debug, Default)]
pub struct Gateways(Arc<RwLock<BTreeSet<(Str, Str)>>>);

impl Gateways {
    /// These are all.
    pub fn set(&self, all: impl Iterator<Item = (Str, Str)>) {
        let all: BTreeSet<(Str, Str)> = all.collect();
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if *known != all {
            *known = all;
        }
    }

    /// Whether there is one of this name.
    #[must_use]
    pub fn has(&self, namespace: &str, name: &str) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.contains(&(namespace.into(), name.into()))
    }
}
