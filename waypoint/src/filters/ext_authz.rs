//! External authorizers: whoever CUSTOM policies name is asked, over HTTP or by gRPC (`envoy.service.auth.v3`), in the
//! way of Envoy's `ext_authz`.
//!
//! All that are named have to agree. One that does not answer refuses, unless its settings say otherwise (`failOpen`);
//! one that is named and not known refuses. Dynamic metadata of answers is passed over: nothing here reads it.
//!
//! Invariants:
//! * nothing that an authorizer says can change how a message is framed, or whose it is (`Host`);
//! * the body that it is given is what is sent on: it is kept, not read twice.

mod grpc;
mod http;
mod said;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::http::{Authorizer, BodyCheck, ProviderAddress};
use model::{Mesh, PolicyKey, Str, StringMatch};
use process::metrics::Counter;

use super::{Refusal, answer};
use crate::http::decide::{Connection, Edit, Edits, Endpoints, Flag, Response, Value};
use crate::http::head::{Known, RequestHead, is_field_name, is_field_value, reads_as};
use crate::http::hygiene::CLIENT_CERT;
use crate::upstream::call::CallError;
use crate::upstream::{Backend, Clusters};

pub use said::{Outcome, Said};

/// How long an answer is waited for, unless it is said (Istio's default).
const TIMEOUT: Duration = Duration::from_secs(600);

/// Counts, for metrics.
#[derive(Debug, Default)]
pub struct AuthorizerStats {
    /// Requests that were allowed.
    pub allowed: Counter,
    /// Requests that were refused.
    pub denied: Counter,
    /// Requests that no answer came for.
    pub failed: Counter,
    /// Of these, those that passed all the same.
    pub failed_open: Counter,
}

/// What is to be asked about a request, of whom.
pub struct Questions {
    all: Vec<Question>,
    /// Of those who can't be reached, and need not be.
    passed_over: Vec<Said>,
    request: RequestHead,
    connection: Connection,
}

struct Question {
    authorizer: Arc<Authorizer>,
    endpoints: Arc<dyn Endpoints>,
}

/// What of a request's body is there to be shown.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Its first bytes.
    pub bytes: Bytes,
    /// Whether these are all.
    pub whole: bool,
}

/// What the authorizers changed of a request that they allowed.
#[derive(Debug, Default)]
pub struct Changes {
    /// Of the request's fields, in order.
    pub request: Vec<Edit>,
    /// Parameters of the query that are set, after all of their name are removed.
    pub set_parameters: Vec<(String, String)>,
    /// Parameters of the query that are removed.
    pub remove_parameters: Vec<String>,
    /// Of the response's fields.
    pub response: Vec<Edit>,
}

/// What became of the questions.
pub enum Verdict {
    /// All agree.
    Allowed(Changes),
    /// The request is answered so; with the detail for the log.
    Refused(Refusal, &'static str),
}

/// One authorizer's answer.
enum Answer {
    Allowed(Changes),
    Denied(Response),
    /// Something that counts as none.
    Failed(String),
}

impl Questions {
    /// What is to be asked where these policies matched. An authorizer that several name is asked once.
    ///
    /// # Errors
    /// 403 where one of them is not known, or can't be reached and has to be; with that.
    pub fn new(
        mesh: &Arc<Mesh>,
        clusters: &Clusters,
        asked: &[(PolicyKey, Str)],
        request: &RequestHead,
        connection: &Connection,
    ) -> Result<Self, (Refusal, Said)> {
        let (mut all, mut passed_over) = (Vec::<Question>::new(), Vec::new());
        for (policy, name) in asked {
            if all.iter().any(|known| known.authorizer.name == *name) {
                continue;
            }
            let Some(authorizer) = mesh.authorizer(name) else {
                tracing::warn!(%policy, provider = &**name, "a policy names an authorizer that there is not");
                let said = Said::nothing(name, "there is no such provider", false);
                return Err((answer(403, "ext_authz_error", Flag::Decided("UAEX")), said));
            };
            match endpoints(mesh, clusters, &authorizer.address) {
                Ok(endpoints) => all.push(Question { authorizer: authorizer.clone(), endpoints }),
                Err(error) if authorizer.fail_open => {
                    tracing::warn!(%policy, provider = &**name, error, "an authorizer that can't be reached is passed over");
                    passed_over.push(Said::nothing(name, &error, true));
                }
                Err(error) => {
                    tracing::warn!(%policy, provider = &**name, error, "an authorizer can't be reached");
                    return Err((failure(authorizer), Said::nothing(name, &error, false)));
                }
            }
        }
        Ok(Self { all, passed_over, request: request.clone(), connection: connection.clone() })
    }

    /// How much of the body is to be read before, and whether a longer one is refused.
    #[must_use]
    pub fn body(&self) -> Option<BodyCheck> {
        let wanted = self.all.iter().filter_map(|question| question.authorizer.body);
        wanted.reduce(|a, b| BodyCheck {
            max_bytes: a.max_bytes.max(b.max_bytes),
            allow_partial: a.allow_partial && b.allow_partial,
            as_bytes: a.as_bytes,
        })
    }

    /// Asks them, one after the other, until one refuses. What each of them said is added to `said`.
    pub async fn ask(mut self, body: Shown, stats: &AuthorizerStats, said: &mut Vec<Said>) -> Verdict {
        let mut changes = Changes::default();
        stats.failed.add(self.passed_over.len() as u64);
        stats.failed_open.add(self.passed_over.len() as u64);
        said.append(&mut self.passed_over);
        for question in &self.all {
            let authorizer = &question.authorizer;
            let shown = match authorizer.body {
                Some(check) => match part(check, &body) {
                    Some(shown) => Some((check, shown)),
                    None => {
                        stats.denied.inc();
                        said.push(Said::of(&authorizer.name, Outcome::TooLong));
                        let response = answer(413, "Payload Too Large", Flag::None);
                        return Verdict::Refused(response, "request_payload_too_large");
                    }
                },
                None => None,
            };
            match self.one(question, shown).await {
                Answer::Allowed(more) => {
                    said.push(Said::of(&authorizer.name, Outcome::Allowed));
                    changes.add(more);
                }
                Answer::Denied(response) => {
                    stats.denied.inc();
                    said.push(Said::of(&authorizer.name, Outcome::Denied(response.status)));
                    return Verdict::Refused(Arc::new(response), "ext_authz_denied");
                }
                Answer::Failed(error) => {
                    stats.failed.inc();
                    let (provider, fail_open) = (&*authorizer.name, authorizer.fail_open);
                    tracing::warn!(provider, error, fail_open, "an authorizer has not answered");
                    said.push(Said::nothing(&authorizer.name, &error, fail_open));
                    if !fail_open {
                        return Verdict::Refused(failure(authorizer), "ext_authz_error");
                    }
                    stats.failed_open.inc();
                }
            }
        }
        stats.allowed.inc();
        Verdict::Allowed(changes)
    }

    async fn one(&self, question: &Question, body: Option<(BodyCheck, Shown)>) -> Answer {
        let limit = question.authorizer.timeout.unwrap_or(TIMEOUT);
        let (endpoints, authorizer) = (&*question.endpoints, &*question.authorizer);
        let result = match &authorizer.http {
            Some(check) => http::ask(endpoints, check, &self.request, &self.connection, body, limit).await,
            None => {
                let authority = format!("{}:{}", authorizer.address.host, authorizer.address.port);
                grpc::ask(endpoints, &authority, &self.request, &self.connection, body, limit).await
            }
        };
        result.unwrap_or_else(|error: CallError| Answer::Failed(error.to_string()))
    }
}

/// What an authorizer is given of a body; `None` where it is longer than may be.
fn part(check: BodyCheck, body: &Shown) -> Option<Shown> {
    let most = usize::try_from(check.max_bytes).unwrap_or(usize::MAX);
    if body.bytes.len() <= most && body.whole {
        return Some(body.clone());
    }
    check.allow_partial.then(|| Shown { bytes: body.bytes.slice(..body.bytes.len().min(most)), whole: false })
}

/// The answer to a request that an authorizer has not answered for.
fn failure(authorizer: &Authorizer) -> Refusal {
    answer(authorizer.status_on_error.unwrap_or(403), "", Flag::Decided("UAEX"))
}

/// Where a provider is reached.
///
/// # Errors
/// There is no such service, in words.
pub(crate) fn endpoints(
    mesh: &Arc<Mesh>,
    clusters: &Clusters,
    address: &ProviderAddress,
) -> Result<Arc<dyn Endpoints>, String> {
    let mut named = mesh.services_named(&address.host).iter();
    let found = named.find(|service| address.namespace.as_ref().is_none_or(|n| *n == service.namespace));
    let service = found.ok_or_else(|| format!("there is no service {}", address.host))?;
    let backend = Backend { service: service.key(), port: address.port, subset: None };
    clusters.endpoints(mesh, &backend).map_err(|error| error.to_string())
}

impl Changes {
    fn add(&mut self, more: Self) {
        self.request.extend(more.request);
        self.set_parameters.extend(more.set_parameters);
        self.remove_parameters.extend(more.remove_parameters);
        self.response.extend(more.response);
    }

    /// Makes the changes of the request.
    pub fn apply(&self, request: &mut RequestHead) {
        for edit in &self.request {
            match edit {
                Edit::Remove(name) => request.fields.remove(name.as_bytes()),
                // Who the client is, is not the authorizer's to say.
                Edit::Set(name, _) | Edit::Add(name, _) if reads_as(name.as_bytes(), CLIENT_CERT) => {}
                Edit::Set(name, Value::Plain(value)) => request.fields.set(name.as_bytes(), value),
                Edit::Add(name, Value::Plain(value)) => request.fields.push(name.as_bytes(), value),
                Edit::Set(_, Value::Made(_)) | Edit::Add(_, Value::Made(_)) => {}
            }
        }
        if self.set_parameters.is_empty() && self.remove_parameters.is_empty() {
            return;
        }
        let name_of = |pair: &str| pair.split_once('=').map_or(pair, |(name, _)| name).to_owned();
        let gone = |pair: &&str| {
            let name = name_of(pair);
            self.remove_parameters.contains(&name) || self.set_parameters.iter().any(|(set, _)| *set == name)
        };
        let kept =
            request.query().split('&').filter(|pair| !pair.is_empty() && !gone(pair)).map(str::to_owned);
        let set = self.set_parameters.iter().map(|(name, value)| format!("{name}={value}"));
        let query: Vec<String> = kept.chain(set).collect();
        let path = request.path().to_owned();
        let target = if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) };
        request.set_target(&target);
    }

    /// The changes of the response.
    #[must_use]
    pub fn response_edits(self) -> Edits {
        Edits(self.response)
    }
}

/// A change that an authorizer may make: of a field that is one, and neither frames the message nor says whose it is.
fn permitted(name: &str, value: &[u8]) -> bool {
    let known = Known::of(name.as_bytes());
    let ours = known.is_hop_by_hop() || matches!(known, Known::Host | Known::ContentLength | Known::Expect);
    is_field_name(name.as_bytes()) && is_field_value(value) && !ours
}

/// Whether the name of a header is one of those that are listed, in lower case.
fn listed(list: &[StringMatch], name: &str) -> bool {
    list.iter().any(|pattern| pattern.matches(name))
}
