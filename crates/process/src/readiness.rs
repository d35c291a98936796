//! Readiness: conditions with names, all of which must hold. `/healthz/ready` on port 15021 says which doesn't.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::http::{Response, Routes, StatusCode};
use crate::shutdown::{Phase, Shutdown};

/// The port of `/healthz/ready`.
pub const PORT: u16 = 15021;

/// How often [`Readiness::settled`] looks.
const LOOK: Duration = Duration::from_secs(1);
/// How long it waits when all conditions hold.
const SETTLE: Duration = Duration::from_secs(5);

/// Why a condition does not hold; `None` when it does.
type Conditions = BTreeMap<&'static str, Option<String>>;

/// The conditions of a process. Cloning shares them. Without any condition it is ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Conditions>>);

/// One condition. It never holds again when this is dropped without having been met: the part that would have met
/// it is gone.
#[derive(Debug)]
pub struct Condition {
    readiness: Readiness,
    name: &'static str,
}

impl Readiness {
    /// Adds a condition that does not hold yet.
    #[must_use]
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { readiness: self.clone(), name };
        condition.fails("not yet");
        condition
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Conditions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The conditions that don't hold, each with the reason.
    #[must_use]
    pub fn unmet(&self) -> Vec<(&'static str, String)> {
        self.lock().iter().filter_map(|(name, why)| Some((*name, why.clone()?))).collect()
    }

    /// Whether all conditions hold.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.lock().values().all(Option::is_none)
    }

    /// Waits until the process is ready, and a little for what comes behind.
    pub async fn settled(&self) {
        while !self.is_ready() {
            tokio::time::sleep(LOOK).await;
        }
        tokio::time::sleep(SETTLE).await;
    }

    /// `GET /healthz/ready`: 200 when all conditions hold and the process is not ending, else 503 and what is
    /// missing.
    #[must_use]
    pub fn routes(&self, shutdown: &Shutdown) -> Routes {
        let (readiness, shutdown) = (self.clone(), shutdown.clone());
        Routes::new("readiness").get("/healthz/ready", "whether traffic is served", move |_| {
            let mut unmet = readiness.unmet();
            if shutdown.phase() != Phase::Running {
                unmet.push(("running", "the process is ending".to_owned()));
            }
            let response = if unmet.is_empty() {
                Response::text(StatusCode::OK, "ready\n")
            } else {
                let lines: String = unmet.iter().map(|(name, why)| format!("{name}: {why}\n")).collect();
                Response::text(StatusCode::SERVICE_UNAVAILABLE, lines)
            };
            async { response }
        })
    }
}

impl Condition {
    /// From now on it holds.
    pub fn holds(&self) {
        if self.readiness.lock().insert(self.name, None).flatten().is_some() {
            tracing::info!(condition = self.name, "ready");
        }
    }

    /// From now on it does not hold, for this reason.
    pub fn fails(&self, reason: impl Into<String>) {
        self.readiness.lock().insert(self.name, Some(reason.into()));
    }
}
