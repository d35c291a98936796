//! Which of several control planes leads: it alone writes status, makes the CA's root and keeps the webhook's
//! configuration. The others serve proxies all the same.
//!
//! A Lease says who, as client-go's election has it: the holder renews it; whoever sees it unchanged for its duration,
//! by its own clock from when it saw it change, takes it. So clocks need not agree. A holder that could not renew it in
//! time stops to lead before another can begin.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use process::shutdown::{Phase, Shutdown};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::source::{chain, jittered};

/// The name of the Lease.
pub const LEASE: &str = "culvertd-leader";

/// For how long a lease holds that is not renewed.
const DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew it for this long is none any more.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between looks.
const RETRY: Duration = Duration::from_secs(2);

/// Takes part in the election.
pub struct Election {
    leases: Api<Lease>,
    identity: String,
    name: String,
    leads: watch::Sender<bool>,
    leader: watch::Sender<Option<String>>,
    /// The lease as it was when it last changed, and when that was seen.
    seen: Option<(LeaseSpec, Instant)>,
    renewed: Option<Instant>,
}

impl Election {
    /// An election among the control planes of a revision in a namespace, a view of whether this one leads, and one of
    /// who does. `identity` is this one's name, another for each process.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        revision: &str,
        identity: String,
    ) -> (Self, watch::Receiver<bool>, watch::Receiver<Option<String>>) {
        let ((leads, view), (leader, who)) = (watch::channel(false), watch::channel(None));
        let name = if revision == "default" { LEASE.to_owned() } else { format!("{LEASE}-{revision}") };
        let leases = Api::namespaced(client, namespace);
        (Self { leases, identity, name, leads, leader, seen: None, renewed: None }, view, who)
    }

    /// Takes part until the process ends; then gives the lease away at once.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut phase = shutdown.watch();
        loop {
            // A leader waits no longer for an answer than it may lead without one.
            let leads = *self.leads.borrow();
            let left =
                self.renewed.filter(|_| leads).map(|renewed| DEADLINE.saturating_sub(renewed.elapsed()));
            let round = tokio::time::timeout(left.unwrap_or(DEADLINE), self.round());
            let outcome = round.await.unwrap_or_else(|_| Err("the API server does not answer".to_owned()));
            match outcome {
                Ok(leads) => self.set(leads),
                Err(reason) => {
                    let lost = self.renewed.is_some_and(|renewed| renewed.elapsed() >= DEADLINE);
                    if lost && *self.leads.borrow() {
                        tracing::warn!(
                            reason,
                            "the lease could not be renewed: this control plane does not lead"
                        );
                        self.set(false);
                    } else {
                        tracing::debug!(reason, "the lease could not be looked at");
                    }
                }
            }
            let running = |phase: &Phase| *phase == Phase::Running;
            tokio::select! {
                () = tokio::time::sleep(jittered(RETRY)) => {}
                _ = phase.wait_for(|phase| !running(phase)) => break,
            }
        }
        let led = *self.leads.borrow();
        self.set(false);
        if led && let Err(reason) = self.release().await {
            tracing::info!(reason, "the lease could not be given away; another takes it when it is over");
        }
    }

    fn set(&self, leads: bool) {
        let changed = self.leads.send_if_modified(|old| std::mem::replace(old, leads) != leads);
        if changed && leads {
            tracing::info!(identity = self.identity, "this control plane leads");
        }
    }

    /// Looks at the lease, and takes or renews it if that is this one's to do. Whether this one holds it.
    async fn round(&mut self) -> Result<bool, String> {
        let started = Instant::now();
        let error = |error: kube::Error| chain(&error);
        let Some(lease) = self.leases.get_opt(&self.name).await.map_err(error)? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
                spec: Some(self.spec(None)),
            };
            let created = self.leases.create(&PostParams::default(), &lease).await.map_err(error)?;
            self.held(created.spec, started);
            return Ok(true);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().filter(|holder| !holder.is_empty());
        self.leader.send_if_modified(|old| std::mem::replace(old, holder.clone()) != holder);
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != spec) {
            self.seen = Some((spec.clone(), Instant::now()));
        }
        if !self.may_take(&spec) {
            return Ok(false);
        }
        let next = Lease { spec: Some(self.spec(Some(&spec))), ..lease };
        // Refused when somebody was faster: the resource version is that of the look.
        match self.leases.replace(&self.name, &PostParams::default(), &next).await {
            Ok(lease) => {
                self.held(lease.spec, started);
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(other) => Err(error(other)),
        }
    }

    fn held(&mut self, spec: Option<LeaseSpec>, started: Instant) {
        self.seen = Some((spec.unwrap_or_default(), Instant::now()));
        self.renewed = Some(started);
    }

    /// Whether the lease is this one's, nobody's, or over.
    fn may_take(&self, spec: &LeaseSpec) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        let duration = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
        let duration = duration.map_or(DURATION, Duration::from_secs);
        self.seen.as_ref().is_some_and(|(_, since)| since.elapsed() >= duration)
    }

    fn spec(&self, old: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(k8s_openapi::jiff::Timestamp::now());
        let mine = |old: &&LeaseSpec| old.holder_identity.as_deref() == Some(&self.identity);
        let transitions = old.and_then(|o| o.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: old.filter(mine).and_then(|o| o.acquire_time.clone()).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions + i32::from(old.is_some() && old.filter(mine).is_none())),
            ..LeaseSpec::default()
        }
    }

    async fn release(&mut self) -> Result<(), String> {
        let error = |error: kube::Error| chain(&error);
        let Some(mut lease) = self.leases.get_opt(&self.name).await.map_err(error)? else { return Ok(()) };
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Ok(());
        }
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        self.leases.replace(&self.name, &PostParams::default(), &lease).await.map_err(error)?;
        Ok(())
    }
}
