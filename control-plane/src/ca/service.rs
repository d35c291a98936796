//! `istio.v1.auth.IstioCertificateService/CreateCertificate` (facts 4.8): one request from its token to its answer.

use std::sync::Arc;
use std::time::Duration;

use identity::{
    IMPERSONATED_IDENTITY, RootId, SignedCertificate, SigningRequest, TRUSTED_ROOTS, Timestamp, Validity,
    certificates_to_pem,
};
use model::SpiffeId;
use prost_types::Struct;
use prost_types::value::Kind;
use proto::wire::auth::istio_certificate_service_server::IstioCertificateService;
use proto::wire::auth::{IstioCertificateRequest, IstioCertificateResponse};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::authenticate::{AuthenticationError, Authenticator, Caller};
use super::authorize::{Account, Denied, Pods, Rules, decide};
use super::current::{Current, InForce};
use super::limits::CallerLimits;
use super::metrics::{CaCounters, count};
use super::reports::Recorder;

/// A message with more is refused by the gRPC server: [`super::Ca::service`] says it so.
pub(super) const MAX_MESSAGE: usize = 128 * 1024;
/// More requests than these at once are refused.
const IN_FLIGHT: usize = 512;
/// So many of them may wait for the store of pods to hear of what they ask for.
const WAITING: usize = 128;
/// How long, and how often it is looked at.
const WAIT: Duration = Duration::from_millis(1500);
const LOOK: Duration = Duration::from_millis(50);
/// More ids of roots than a bundle can hold are no report.
const MAX_REPORTED: usize = identity::MAX_ROOTS;
/// Longer values of metadata are no identities.
const MAX_VALUE: usize = 2048;

/// Whom certificates are given to, and for how long.
#[derive(Clone, Debug)]
pub struct ServiceSettings {
    /// The cluster that tokens are of.
    pub cluster_id: String,
    /// The accounts of the proxies of nodes.
    pub trusted: Vec<Account>,
    /// How long a certificate is valid when nothing is asked for.
    pub default_lifetime: Duration,
    /// The longest that is given.
    pub max_lifetime: Duration,
}

/// The service.
#[derive(Clone)]
pub struct CaService(Arc<Inner>);

impl std::fmt::Debug for CaService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaService").field("settings", &self.0.settings).finish_non_exhaustive()
    }
}

struct Inner {
    settings: ServiceSettings,
    current: Current,
    authenticator: Authenticator,
    pods: Arc<dyn Pods>,
    recorder: Arc<dyn Recorder>,
    counters: Arc<CaCounters>,
    callers: CallerLimits,
    in_flight: Semaphore,
    waiting: Semaphore,
}

/// What a request says beside its CSR.
#[derive(Debug, Default, PartialEq)]
struct Asked {
    impersonated: Option<String>,
    trusted: Option<Vec<RootId>>,
}

impl CaService {
    /// Signs with what is in force in `current`.
    #[must_use]
    pub fn new(
        settings: ServiceSettings,
        current: Current,
        authenticator: Authenticator,
        pods: Arc<dyn Pods>,
        recorder: Arc<dyn Recorder>,
        counters: Arc<CaCounters>,
    ) -> Self {
        Self(Arc::new(Inner {
            settings,
            current,
            authenticator,
            pods,
            recorder,
            counters,
            callers: CallerLimits::default(),
            in_flight: Semaphore::new(IN_FLIGHT),
            waiting: Semaphore::new(WAITING),
        }))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let inner = &*self.0;
        count(&inner.counters.requests);
        let Ok(_permit) = inner.in_flight.try_acquire() else {
            count(&inner.counters.limited);
            return Err(Status::resource_exhausted("too many requests at once; try again"));
        };
        let caller = inner.authenticate(&request).await?;
        let request = request.into_inner();
        let asked = read_metadata(request.metadata.as_ref()).map_err(|reason| {
            count(&inner.counters.malformed);
            Status::invalid_argument(reason)
        })?;
        let id = inner.authorize(&caller, asked.impersonated.as_deref()).await?;
        let signing = SigningRequest::from_pem(request.csr.as_bytes()).map_err(|e| {
            count(&inner.counters.malformed);
            tracing::warn!(%caller, %id, "signing request refused: {e}");
            Status::invalid_argument(format!("the signing request is refused: {e}"))
        })?;
        let in_force = inner.current.signing().map_err(|reason| {
            count(&inner.counters.failed);
            Status::unavailable(reason)
        })?;
        inner.record(&caller, &asked).await?;
        let signed = inner.sign(&in_force, &signing, &id, request.validity_duration)?;
        tracing::info!(
            %caller,
            %id,
            serial = signed.serial,
            not_after = %Timestamp(signed.not_after),
            "certificate issued"
        );
        Ok(Response::new(answer(&in_force, &signed)))
    }
}

impl Inner {
    async fn authenticate(&self, request: &Request<IstioCertificateRequest>) -> Result<Caller, Status> {
        let header = |name| request.metadata().get(name).and_then(|value| value.to_str().ok());
        let refused = |reason: String| {
            count(&self.counters.unauthenticated);
            tracing::warn!(peer = ?request.remote_addr(), "signing request of nobody known: {reason}");
            Status::unauthenticated(reason)
        };
        if let Some(cluster) = header("clusterid").filter(|cluster| !cluster.is_empty())
            && cluster != self.settings.cluster_id
        {
            let cluster: String = cluster.escape_debug().take(100).collect();
            return Err(refused(format!(
                "the token is of cluster {cluster:?}, this control plane checks those of {:?}",
                self.settings.cluster_id
            )));
        }
        let caller = match self.authenticator.caller(header("authorization")).await {
            Ok(caller) => caller,
            Err(AuthenticationError::Rejected(reason)) => return Err(refused(reason)),
            Err(error @ AuthenticationError::Unavailable(_)) => {
                count(&self.counters.failed);
                tracing::warn!("signing request not served: {error}");
                return Err(Status::unavailable(error.to_string()));
            }
        };
        let key = caller.pod.as_ref().map_or_else(|| caller.to_string(), |pod| pod.uid.clone());
        if !self.callers.admit(&key) {
            count(&self.counters.limited);
            return Err(Status::resource_exhausted(format!("{caller} asks too often; try again later")));
        }
        Ok(caller)
    }

    /// Decides; waits a moment where only our view of the pods may be late.
    async fn authorize(&self, caller: &Caller, impersonated: Option<&str>) -> Result<SpiffeId, Status> {
        let rules =
            Rules { domain: self.current.domains().own.clone(), trusted: self.settings.trusted.clone() };
        if !self.pods.is_ready() {
            count(&self.counters.failed);
            return Err(Status::unavailable("the pods of the cluster are not known yet; try again"));
        }
        let mut decision = decide(caller, impersonated, &rules, &*self.pods);
        if decision.as_ref().is_err_and(Denied::may_pass)
            && let Ok(_permit) = self.waiting.try_acquire()
        {
            let end = tokio::time::Instant::now() + WAIT;
            while decision.as_ref().is_err_and(Denied::may_pass) && tokio::time::Instant::now() < end {
                tokio::time::sleep(LOOK).await;
                decision = decide(caller, impersonated, &rules, &*self.pods);
            }
        }
        decision.map_err(|denied| {
            count(&self.counters.denied);
            tracing::warn!(%caller, reason = denied.reason(), "certificate not given: {denied}");
            Status::permission_denied(denied.to_string())
        })
    }

    /// Keeps what the caller trusts, if that is what it says. It says it again if it could not be kept.
    async fn record(&self, caller: &Caller, asked: &Asked) -> Result<(), Status> {
        // A rotation waits for proxies of nodes and waypoints only; nobody else has pods annotated.
        let is_proxy = |account: &Account| {
            account.namespace == caller.namespace && account.name == caller.service_account
        };
        let is_waypoint =
            || caller.pod.as_ref().is_some_and(|pod| self.pods.is_waypoint(&caller.namespace, &pod.name));
        let counts = |_: &&Vec<RootId>| self.settings.trusted.iter().any(is_proxy) || is_waypoint();
        let Some(trusted) = asked.trusted.as_ref().filter(counts) else { return Ok(()) };
        self.recorder.record(caller, trusted).await.map_err(|reason| {
            count(&self.counters.unrecorded);
            tracing::warn!(%caller, "which roots a proxy trusts is not kept: {reason}");
            Status::unavailable(reason)
        })
    }

    fn sign(
        &self,
        in_force: &InForce,
        request: &SigningRequest,
        id: &SpiffeId,
        asked_s: i64,
    ) -> Result<SignedCertificate, Status> {
        let longest = Duration::from_secs(in_force.record.state.longest_lifetime_s);
        let asked = u64::try_from(asked_s).unwrap_or(0);
        let wanted = if asked == 0 { self.settings.default_lifetime } else { Duration::from_secs(asked) };
        let lifetime = wanted.min(self.settings.max_lifetime).min(longest);
        let validity = Validity { lifetime, ..Validity::of_workloads() };
        let signed = in_force.authority.sign(request, id, validity, self.current.clock().now());
        match signed {
            Ok(signed) => {
                count(&self.counters.issued);
                Ok(signed)
            }
            Err(error) => {
                count(&self.counters.failed);
                tracing::error!(%id, "certificate not signed: {error}");
                Err(Status::internal(format!("the certificate could not be signed: {error}")))
            }
        }
    }
}

/// The leaf, then those above it, and all roots as the last part.
fn answer(in_force: &InForce, signed: &SignedCertificate) -> IstioCertificateResponse {
    let mut cert_chain: Vec<String> =
        signed.chain.iter().map(|certificate| certificates_to_pem([certificate])).collect();
    cert_chain.push(in_force.roots_pem.clone());
    IstioCertificateResponse { cert_chain }
}

/// Reads what is asked for beside the signature. What can't be done as asked is refused.
fn read_metadata(metadata: Option<&Struct>) -> Result<Asked, String> {
    let mut asked = Asked::default();
    let Some(metadata) = metadata else { return Ok(asked) };
    for (name, value) in &metadata.fields {
        match (name.as_str(), &value.kind) {
            (IMPERSONATED_IDENTITY, Some(Kind::StringValue(text))) if text.len() <= MAX_VALUE => {
                asked.impersonated = Some(text.clone()).filter(|text| !text.is_empty());
            }
            (IMPERSONATED_IDENTITY, _) => {
                return Err(format!("{name} is no text of at most {MAX_VALUE} bytes"));
            }
            (TRUSTED_ROOTS, Some(Kind::ListValue(list))) if list.values.len() <= MAX_REPORTED => {
                let id = |value: &prost_types::Value| match &value.kind {
                    Some(Kind::StringValue(text)) => RootId::from_hex(text),
                    _ => None,
                };
                let ids: Option<Vec<_>> = list.values.iter().map(id).collect();
                asked.trusted =
                    Some(ids.ok_or_else(|| format!("{name} holds something else than ids of roots"))?);
            }
            (TRUSTED_ROOTS, _) => {
                return Err(format!("{name} is no list of at most {MAX_REPORTED} ids of roots"));
            }
            ("CertSigner", Some(Kind::StringValue(signer))) if !signer.is_empty() => {
                return Err("CertSigner: this CA signs itself, and can't have others sign".to_owned());
            }
            _ => {}
        }
    }
    Ok(asked)
}
