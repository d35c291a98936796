//! Whether a request may go on, before its route is chosen: token, policies, external authorizers, rate limits. Each
//! step may have to wait for somebody else; what comes after it then goes on by the same snapshot.

use std::net::SocketAddr;
use std::sync::Arc;

use model::{PolicyKey, RequestDecision, Str};

use crate::deciding::Deciding;
use crate::filters::ext_authz::{Questions, Shown, Verdict};
use crate::filters::jwt::{Outcome, Patience, fields_of};
use crate::filters::rate_limit::{Answered, Checked};
use crate::filters::{Refusal, authorize};
use crate::http::decide::{Connection, Decided, Decision, Edit, Edits, More, Reading, Response, Then, Value};
use crate::http::head::RequestHead;
use crate::rules::{Rules, ServiceRules};

/// A request's way from its token to its route; or, where its route leads to another service, to that, which is asked about
/// the request as it gets it.
pub(super) struct Admission {
    deciding: Deciding,
    rules: Arc<Rules>,
    service: Arc<ServiceRules>,
    beyond: Option<Beyond>,
}

/// Where a route leads to another service.
pub(super) struct Beyond {
    /// What is done with the request if it may.
    pub decision: Decision,
    /// The other's address, as far as policies ask for it.
    pub to: SocketAddr,
    /// Whether the other believes what the token says that was taken for the service that was called.
    pub believes: bool,
    /// Whom the service that was called had asked.
    pub asked: Option<Asked>,
}

/// The authorizers who have agreed to a request before its route was chosen.
pub(super) struct Asked {
    by: Vec<Str>,
    /// As they were shown it, with what they have changed themselves.
    request: RequestHead,
    to: SocketAddr,
}

impl Asked {
    /// Of a request that is at its route, which has not changed it yet; `None` where nobody was asked.
    pub(super) fn before_route(
        request: &RequestHead,
        connection: &Connection,
        decided: &Decided,
    ) -> Option<Self> {
        let verdict = decided.verdict.as_ref().filter(|verdict| !verdict.ask.is_empty())?;
        let by = verdict.ask.iter().map(|(_, provider)| provider.clone()).collect();
        Some(Self { by, request: request.clone(), to: connection.destination })
    }

    /// Whether `provider` has agreed to just this: to the request as it is now, and, if it is told of that (by gRPC), to
    /// where it goes.
    pub(super) fn agreed(
        &self,
        rules: &Rules,
        provider: &Str,
        request: &RequestHead,
        there: &Connection,
    ) -> bool {
        let is_told = || rules.mesh.authorizer(provider).is_none_or(|authorizer| authorizer.http.is_none());
        self.by.contains(provider)
            && (self.to == there.destination || !is_told())
            && self.request.method() == request.method()
            && self.request.authority() == request.authority()
            && self.request.target() == request.target()
            && self.request.fields.iter().eq(request.fields.iter())
    }
}

fn refused(refusal: Refusal, detail: &'static str, decided: &mut Decided) -> Decision {
    decided.detail = detail;
    Decision::Respond(refusal)
}

impl Admission {
    pub(super) fn new(deciding: &Deciding, rules: &Arc<Rules>, service: &Arc<ServiceRules>) -> Self {
        let (deciding, rules, service) = (deciding.clone(), Arc::clone(rules), Arc::clone(service));
        Self { deciding, rules, service, beyond: None }
    }

    /// The way of a request to another service, which asks for `service`.
    pub(super) fn beyond(self, to: Beyond) -> Self {
        Self { beyond: Some(to), ..self }
    }

    /// The connection as the service sees it.
    fn seen(&self, connection: &Connection) -> Connection {
        let destination = self.beyond.as_ref().map_or(connection.destination, |beyond| beyond.to);
        Connection { destination, ..connection.clone() }
    }

    /// Looks at the token, and goes on.
    pub(super) fn run(
        mut self,
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
        patience: Patience,
    ) -> Decision {
        let guards = &self.deciding.0.guards;
        match guards.authenticator.authenticate(&self.rules.mesh, &self.service.http, request, patience) {
            Outcome::Passed(None) if self.beyond.is_some() => {}
            Outcome::Passed(claims) => {
                decided.claims = claims;
                self.beyond.iter_mut().for_each(|beyond| beyond.believes = true);
            }
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
        decided.own_fields.extend(fields_of(&self.rules.mesh, &self.service.http));
        let before = decided.verdict.take();
        let authorized = match &self.beyond {
            None => authorize::apply(&self.service.policies, request, connection, decided),
            Some(beyond) => {
                let own = decided.claims.clone();
                decided.claims = own.clone().filter(|_| beyond.believes);
                let there = self.seen(connection);
                let authorized = authorize::apply(&self.service.policies, request, &there, decided);
                decided.claims = own;
                authorized
            }
        };
        let asked = decided.verdict.as_ref().map(|verdict| verdict.ask.clone()).unwrap_or_default();
        if let Some(before) = before {
            let mut all = RequestDecision::clone(&before);
            if let Some(now) = &decided.verdict {
                all = all.and(RequestDecision::clone(now));
            }
            decided.verdict = Some(all.into());
        }
        match authorized {
            Ok(()) => self.ask(&asked, request, connection, decided),
            Err(refusal) => refused(refusal, "rbac_access_denied", decided),
        }
    }

    /// Asks those whom CUSTOM policies name, unless they have agreed to just this already.
    fn ask(
        self,
        named: &[(PolicyKey, Str)],
        request: &mut RequestHead,
        connection: &Connection,
        decided: &mut Decided,
    ) -> Decision {
        if named.is_empty() {
            return self.limit(request, connection, decided, Vec::new());
        }
        let there = self.seen(connection);
        let before = self.beyond.as_ref().and_then(|beyond| beyond.asked.as_ref());
        let agreed = |provider| before.is_some_and(|b| b.agreed(&self.rules, provider, request, &there));
        let asked: Vec<_> = named.iter().filter(|(_, provider)| !agreed(provider)).cloned().collect();
        if asked.is_empty() {
            return self.limit(request, connection, decided, Vec::new());
        }
        let clusters = &self.deciding.0.clusters;
        let questions = match Questions::new(&self.rules.mesh, clusters, &asked, request, &there) {
            Ok(questions) => questions,
            Err((refusal, said)) => {
                decided.authorizers.push(said);
                return refused(refusal, "ext_authz_error", decided);
            }
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
            let mut said = Vec::new();
            let verdict = questions.ask(body, &self.deciding.0.guards.authorizers, &mut said).await;
            let then: Then = Box::new(move |request, connection, decided| {
                decided.authorizers.append(&mut said);
                match verdict {
                    Verdict::Refused(refusal, detail) => refused(refusal, detail, decided),
                    Verdict::Allowed(changes) => {
                        changes.apply(request);
                        self.limit(request, connection, decided, changes.response_edits().0)
                    }
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
        let believed = self.beyond.as_ref().is_none_or(|beyond| beyond.believes);
        let claims = decided.claims.clone().filter(|_| believed);
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
                        decided.limited |= !changes.is_empty();
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
        let decision = match self.beyond {
            Some(beyond) => beyond.decision,
            None => {
                let routed = self.deciding.routed(&self.rules, &self.service, request, connection, decided);
                routed.unwrap_or_else(Decision::Respond)
            }
        };
        with_edits(decision, edits)
    }
}

/// A decision after which the response gets `edits`, before those of the route.
pub(super) fn with_edits(decision: Decision, edits: Vec<Edit>) -> Decision {
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
        Decision::Respond(response) => Decision::Respond(edited(&response, edits)),
        Decision::Read(Reading { limit, then }) => Decision::Read(Reading {
            limit,
            then: Box::new(move |ahead, request, connection, decided| {
                with_edits(then(ahead, request, connection, decided), edits)
            }),
        }),
    }
}

/// An answer of our own with `edits`: pages of other origins can read no answer without the fields that let them, and
/// clients have to know of their limits whoever answers. What the answer says itself stands.
fn edited(response: &Response, edits: Vec<Edit>) -> Refusal {
    let mut response = response.clone();
    let mut fields = response.fields.into_vec();
    for (name, value) in Edits(edits).plain_fields() {
        if !fields.iter().any(|(known, _)| known.eq_ignore_ascii_case(&name)) {
            fields.push((name, value));
        }
    }
    response.fields = fields.into();
    Arc::new(response)
}
