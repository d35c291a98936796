//! AuthorizationPolicies. The evaluator is the one that nodes use; what it says is kept, for the log and for `why`.

use std::sync::Arc;

use model::http::Claims;
use model::{Held, Mesh, Policy, PolicyKey, RequestDecision, Workload, decide_request};

use super::{Refusal, answer, view};
use crate::http::decide::{Connection, Decided, Flag};
use crate::http::head::RequestHead;

/// The policies for what reaches a service: those of the service, and for each combination of selector policies that its
/// workloads have, these. A name is that of a policy that is listed and not known.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Policies(pub Vec<Vec<Result<Arc<Policy>, PolicyKey>>>);

impl Policies {
    /// Whether there are none: everything is let in then.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Vec::is_empty)
    }

    /// Decides over a request, or, without one, over a connection that shows none. Each set must let it in; what is
    /// returned is the decision of the first that does not, with what all of them ask for.
    #[must_use]
    pub fn decide(
        &self,
        connection: &model::Connection,
        request: Option<&model::http::Request<'_>>,
    ) -> RequestDecision {
        let sets = self.0.iter().filter(|set| !set.is_empty()).map(|set| {
            let held: Vec<Held<'_>> = set.iter().map(Result::as_ref).collect();
            decide_request(&held, connection, request)
        });
        sets.reduce(RequestDecision::and).unwrap_or_else(RequestDecision::let_in)
    }
}

/// How the names of the policies begin by which a workload lets in its waypoint alone.
const BINDING: &str = "culvert_waypoint_";

/// The policies of a workload that is reached by its own address. Those that let in nobody but the waypoint are for its node.
#[must_use]
pub fn of_workload(mesh: &Mesh, workload: &Workload) -> Policies {
    let held = mesh.policies_for(workload);
    let held = held.iter().map(|held| match held {
        Ok(policy) => Ok(Arc::clone(policy)),
        Err(key) => Err((*key).clone()),
    });
    let key = |held: &Result<Arc<Policy>, PolicyKey>| match held {
        Ok(policy) => policy.key.clone(),
        Err(key) => key.clone(),
    };
    Policies(vec![held.filter(|held| !key(held).name.starts_with(BINDING)).collect()])
}

/// The connection as policies see it.
#[must_use]
pub fn subject(connection: &Connection) -> model::Connection {
    let identity = connection.identity.as_deref().cloned();
    model::Connection::new(identity, connection.client.ip(), connection.destination)
}

/// The answer to what is refused, with Envoy's words.
#[must_use]
pub fn denied() -> Refusal {
    answer(403, "RBAC: access denied", Flag::None)
}

/// Asks the policies. The verdict is in `decided` afterwards; a refusal for want of an ALLOW policy stands only when those
/// who are to be asked have not refused before, which makes no difference to the client.
///
/// # Errors
/// 403 for what is not let in.
pub fn apply(
    policies: &Policies,
    request: &RequestHead,
    connection: &Connection,
    decided: &mut Decided,
) -> Result<(), Refusal> {
    if policies.is_empty() {
        return Ok(());
    }
    let claims: Option<Arc<Claims>> = decided.claims.clone();
    let decision = policies.decide(&subject(connection), Some(&view(request, connection, claims.as_deref())));
    let refused = decision.outcome.is_err();
    if refused {
        tracing::debug!(client = %connection.client, verdict = %Shown(&decision), "refused by policy");
    }
    decided.verdict = Some(Arc::new(decision));
    if refused { Err(denied()) } else { Ok(()) }
}

/// A decision in words.
pub struct Shown<'a>(pub &'a RequestDecision);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0.outcome {
            Ok(allow) => allow.fmt(f),
            Err(deny) => deny.fmt(f),
        }
    }
}
