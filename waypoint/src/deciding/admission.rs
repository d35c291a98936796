//! Whether a request may go on, before its route is chosen: token, policies, external authorizers, rate limits. Each
//! step may have to wait for somebody else; what comes after it then goes on by the same snapshot.

use std::sync::Arc;

use crate::deciding::Deciding;
use crate::filters::ext_authz::{Questions, Shown, Verdict};
use crate::filters::jwt::{Outcome, Patience};
use crate::filters::rate_limit::{Answered, Checked};
use crate::filters::{Refusal, authorize};
use crate::http::decide::{Connection, Decided, Decision, Edit, Edits, More, Reading, Then, Value};
use crate::http::head::RequestHead;
use crate::rules::{Rules, ServiceRules};

/// A request's way from its token to its route.
#[derive(Clone)]
pub(super) struct Admission {
    deciding: Deciding,
    rules: Arc<Rules>,
    service: Arc<ServiceRules>,
}

fn refused(refusal: Refusal, detail: &'static str, decided: &mut Decided) -> Decision {
    decided.detail = detail;
    Decision::Respond(refusal)
}

impl Admission {
    pub(super) fn new(deciding: &Deciding, rules: &Arc<Rules>, service: &Arc<ServiceRules>) -> Self {
        Self { deciding: deciding.clone(), rules: Arc::clone(rules), service: Arc::clone(service) }
    }

    /// Looks at the token, and goes on.
    pub(super) fn run(
        self,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
        patience: Patience,
    ) -> Decision {
        let guards = &self.deciding.0.guards;
        match guards.authenticator.authenticate(&self.rules.mesh, &self.service.http, request, patience) {
            Outcome::Passed(claims) => decided.claims = claims,
            Outcome::Refused(refusal, detail) => return refused(refusal, detail, decided),
            Outcome::Wait(attempt) => {
                return Decision::Later(Box::pin(async move {
                    attempt.wait().await;
                    let then: Then = Box::new(move |request, connection, decided| {
                        self.run(request, connection, decided, Patience::Spent)
                    });
                    then
                }));
            }
        }
        if let Err(refusal) = authorize::apply(&self.service.policies, request, connection, decided) {
            return refused(refusal, "rbac_access_denied", decided);
        }
        self.ask(request, connection, decided)
    }

    /// Asks those whom CUSTOM policies name.
    fn ask(self, request: &mut RequestHead, connection: &Connection, decided: &mut Decided) -> Decision {
        let asked = decided.verdict.as_ref().map(|verdict| verdict.ask.clone()).unwrap_or_default();
        if asked.is_empty() {
            return self.limit(request, connection, decided, Vec::new());
        }
        let clusters = &self.deciding.0.clusters;
        let questions = match Questions::new(&self.rules.mesh, clusters, &asked, request, connection) {
            Ok(questions) => questions,
            Err(refusal) => return refused(refusal, "ext_authz_error", decided),
        };
        match questions.body() {
            None => self.wait_for(questions, Shown::default()),
            Some(check) => Decision::Read(Reading {
                limit: usize::try_from(check.max_bytes).unwrap_or(usize::MAX),
                then: Box::new(move |ahead, _, _, _| {
                    self.wait_for(questions, Shown { bytes: ahead.bytes, whole: ahead.whole })
                }),
            }),
        }
    }

    fn wait_for(self, questions: Questions, body: Shown) -> Decision {
        Decision::Later(Box::pin(async move {
            let verdict = questions.ask(body, &self.deciding.0.guards.authorizers).await;
            let then: Then = Box::new(move |request, connection, decided| match verdict {
                Verdict::Refused(refusal, detail) => refused(refusal, detail, decided),
                Verdict::Allowed(changes) => {
                    changes.apply(request);
                    self.limit(request, connection, decided, changes.response_edits().0)
                }
            });
            then
        }))
    }

    /// Looks at the rate limits. `edits` are what the response gets so far.
    fn limit(
        self,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
        mut edits: Vec<Edit>,
    ) -> Decision {
        let inner = &self.deciding.0;
        let (mesh, http) = (&self.rules.mesh, &self.service.http);
        let claims = decided.claims.clone();
        match inner.guards.limits.check(mesh, &inner.clusters, http, request, connection, claims.as_deref()) {
            Checked::Passed(more) => {
                edits.extend(more);
                self.go_on(request, connection, decided, edits)
            }
            Checked::Refused(refusal, detail) => refused(refusal, detail, decided),
            Checked::Ask(asking) => Decision::Later(Box::pin(async move {
                let Answered { request: changes, checked } = asking.ask().await;
                let then: Then = Box::new(move |request, connection, decided| match checked {
                    Checked::Refused(refusal, detail) => refused(refusal, detail, decided),
                    Checked::Passed(more) => {
                        edits.extend(more);
                        for change in changes {
                            if let Edit::Add(name, Value::Plain(value)) = change {
                                request.fields.push(name.as_bytes(), &value);
                            }
                        }
                        self.go_on(request, connection, decided, edits)
                    }
                    // It is not asked again.
                    Checked::Ask(_) => Decision::Respond(authorize::denied()),
                });
                then
            })),
        }
    }

    fn go_on(
        self,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
        edits: Vec<Edit>,
    ) -> Decision {
        let routed = self.deciding.routed(&self.rules, &self.service, request, connection, decided);
        with_edits(routed.unwrap_or_else(Decision::Respond), edits)
    }
}

/// A decision after which the response gets `edits`, before those of the route.
fn with_edits(decision: Decision, edits: Vec<Edit>) -> Decision {
    if edits.is_empty() {
        return decision;
    }
    match decision {
        Decision::Forward { how, endpoints, more } => {
            let mut more = more.unwrap_or_else(|| Box::new(More::default()));
            let after = std::mem::replace(&mut more.response_edits, Edits(edits));
            more.response_edits.0.extend(after.0);
            Decision::Forward { how, endpoints, more: Some(more) }
        }
        Decision::Later(waiting) => Decision::Later(Box::pin(async move {
            let rest = waiting.await;
            let then: Then = Box::new(move |request, connection, decided| {
                with_edits(rest(request, connection, decided), edits)
            });
            then
        })),
        // A route's own answer, and what reads a body, have no response of a service.
        other => other,
    }
}
