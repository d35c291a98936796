//! Asking a service that counts for all waypoints: `envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit`.

use std::sync::Arc;
use std::time::Duration;

use model::Mesh;
use model::http::{GlobalLimit, Limit, LimitHeaders};
use proto::wire::rate_limit::rate_limit_descriptor::Entry;
use proto::wire::rate_limit::rate_limit_response::rate_limit::Unit;
use proto::wire::rate_limit::rate_limit_response::{Code, DescriptorStatus};
use proto::wire::rate_limit::{RateLimitDescriptor, RateLimitRequest, RateLimitResponse};

use super::{Checked, LimitStats, Told, edits, refused};
use crate::filters::{answer, ext_authz};
use crate::http::decide::{Connection, Edit, Endpoints, Flag, Value};
use crate::http::head::{Known, is_field_name, is_field_value, reads_as};
use crate::http::hygiene::CLIENT_CERT;
use crate::upstream::Clusters;
use crate::upstream::call::{CallError, call_grpc};

const METHOD: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";

/// A limit that a service counts, the values that it is asked for, and its resource's wish for headers.
pub(super) type Question<'l> = (&'l Arc<GlobalLimit>, &'l Arc<Limit>, Vec<String>, LimitHeaders);

/// What is to be asked, of whom.
pub struct Asking {
    calls: Vec<One>,
    told: Vec<Told>,
    connection: Connection,
    stats: Arc<LimitStats>,
}

/// One call: limits of one service.
struct One {
    global: Arc<GlobalLimit>,
    endpoints: Arc<dyn Endpoints>,
    limits: Vec<(Arc<Limit>, LimitHeaders)>,
    message: RateLimitRequest,
}

/// What was asked for has come.
pub struct Answered {
    /// Fields for the request.
    pub request: Vec<Edit>,
    /// What the limits say of the request; never [`Checked::Ask`].
    pub checked: Checked,
}

fn unanswered() -> Checked {
    Checked::Refused(answer(500, "rate limit service is away", Flag::Decided("RLSE")), "rate_limiter_error")
}

impl Asking {
    pub(super) fn new(
        mesh: &Arc<Mesh>,
        clusters: &Clusters,
        questions: Vec<Question<'_>>,
        told: Vec<Told>,
        connection: &Connection,
        stats: Arc<LimitStats>,
    ) -> Result<Self, Checked> {
        let mut calls: Vec<One> = Vec::new();
        for (global, limit, values, headers) in questions {
            let entries = limit.by.iter().zip(values);
            let entries = entries.map(|(key, value)| Entry { key: key.descriptor().to_owned(), value });
            let descriptor = RateLimitDescriptor { entries: entries.collect() };
            if let Some(call) = calls.iter_mut().find(|call| call.global == *global) {
                call.message.descriptors.push(descriptor);
                call.limits.push((Arc::clone(limit), headers));
                continue;
            }
            let endpoints = match ext_authz::endpoints(mesh, clusters, &global.address) {
                Ok(endpoints) => endpoints,
                Err(error) => {
                    tracing::warn!(limit = &*limit.name, error, "a rate-limit service can't be reached");
                    stats.failed.inc();
                    if global.fail_open || limit.dry_run {
                        stats.failed_open.inc();
                        continue;
                    }
                    return Err(unanswered());
                }
            };
            let message = RateLimitRequest {
                domain: global.domain.to_string(),
                descriptors: vec![descriptor],
                hits_addend: global.hits,
            };
            calls.push(One {
                global: Arc::clone(global),
                endpoints,
                limits: vec![(Arc::clone(limit), headers)],
                message,
            });
        }
        Ok(Self { calls, told, connection: connection.clone(), stats })
    }

    /// Asks the services, one after the other.
    pub async fn ask(mut self) -> Answered {
        let mut request = Vec::new();
        for one in std::mem::take(&mut self.calls) {
            let authority = format!("{}:{}", one.global.address.host, one.global.address.port);
            let result: Result<RateLimitResponse, CallError> = call_grpc(
                &*one.endpoints,
                &self.connection,
                (&authority, METHOD),
                &one.message,
                one.global.timeout,
            )
            .await;
            let checked = match result {
                Ok(answer) => self.judge(&one, answer, &mut request),
                Err(error) => self.failed(&one, &error.to_string()),
            };
            if let Err(checked) = checked {
                return Answered { request: Vec::new(), checked };
            }
        }
        self.stats.within.inc();
        Answered { request, checked: Checked::Passed(edits(&self.told)) }
    }

    fn failed(&self, one: &One, error: &str) -> Result<(), Checked> {
        self.stats.failed.inc();
        // What is only tried refuses nobody.
        let fail_open = one.global.fail_open || one.limits.iter().all(|(limit, _)| limit.dry_run);
        let service = &*one.global.address.host;
        tracing::warn!(service, error, fail_open, "a rate-limit service has not answered");
        if fail_open {
            self.stats.failed_open.inc();
            return Ok(());
        }
        Err(unanswered())
    }

    fn judge(
        &mut self,
        one: &One,
        answer: RateLimitResponse,
        request: &mut Vec<Edit>,
    ) -> Result<(), Checked> {
        if answer.overall_code() == Code::Unknown {
            return self.failed(one, "its answer has no code");
        }
        let mut over = false;
        for (place, (limit, headers)) in one.limits.iter().enumerate() {
            let status = answer.statuses.get(place);
            // A service that says nothing of each means all of them.
            let code = status.map_or(answer.overall_code(), DescriptorStatus::code);
            if limit.dry_run {
                self.stats.would_refuse.add(u64::from(code == Code::OverLimit));
                continue;
            }
            over |= code == Code::OverLimit;
            let told = status.and_then(|status| told(limit, status, *headers));
            // The one that refuses is the last.
            if code == Code::OverLimit {
                self.told.extend(told);
            } else {
                let at = if over { self.told.len().saturating_sub(1) } else { self.told.len() };
                told.into_iter().for_each(|told| self.told.insert(at, told));
            }
        }
        if over {
            self.stats.over.inc();
            let more =
                answer.response_headers_to_add.iter().filter(|h| permitted(&h.key, h.value.as_bytes()));
            let more: Vec<_> =
                more.map(|h| (h.key.to_ascii_lowercase().into(), h.value.as_str().into())).collect();
            return Err(refused(&self.told, "request_rate_limited", &more));
        }
        for header in answer.request_headers_to_add {
            if permitted_in_request(&header.key, header.value.as_bytes()) {
                let (name, value) = (header.key.to_ascii_lowercase(), header.value.into_bytes());
                request.push(Edit::Add(name.into(), Value::Plain(value.into())));
            }
        }
        Ok(())
    }
}

/// Whether a field of a service's answer may be put: a valid one that says nothing of how a message is framed.
fn permitted(name: &str, value: &[u8]) -> bool {
    is_field_name(name.as_bytes()) && is_field_value(value) && !Known::of(name.as_bytes()).is_engines()
}

/// The same for a request: who the client is, is not the service's to say.
fn permitted_in_request(name: &str, value: &[u8]) -> bool {
    permitted(name, value) && !reads_as(name.as_bytes(), CLIENT_CERT)
}

/// What a service says of a limit; `None` where it has none of these values.
fn told(limit: &Limit, status: &DescriptorStatus, headers: LimitHeaders) -> Option<Told> {
    let current = status.current_limit.as_ref()?;
    let seconds = match current.unit() {
        Unit::Unknown => return None,
        Unit::Second => 1,
        Unit::Minute => 60,
        Unit::Hour => 3600,
        Unit::Day => 86_400,
        Unit::Week => 7 * 86_400,
        Unit::Month => 30 * 86_400,
        Unit::Year => 365 * 86_400,
    };
    let window = Duration::from_secs(seconds);
    let reset = status.duration_until_reset.and_then(|reset| Duration::try_from(reset).ok());
    Some(Told {
        name: Box::from(&*limit.name),
        quota: current.requests_per_unit,
        window,
        left: status.limit_remaining,
        reset: reset.unwrap_or(window),
        headers,
    })
}

#[cfg(test)]
mod tests {
    use super::{permitted, permitted_in_request};

    #[test]
    fn a_service_puts_no_field_that_frames_a_message() {
        assert!(permitted("X-Left", b"1"));
        for name in [
            "Content-Length",
            "transfer-encoding",
            "connection",
            "te",
            "upgrade",
            "expect",
            "host",
            ":path",
            "",
        ] {
            assert!(!permitted(name, b"1"), "{name}");
        }
        assert!(!permitted("x-a", b"1\r\n"));
    }

    #[test]
    fn a_service_does_not_say_who_the_client_is() {
        assert!(permitted_in_request("X-Left", b"1"));
        for name in ["x-forwarded-client-cert", "X-Forwarded-Client-Cert", "x_forwarded-client_cert", "host"]
        {
            assert!(!permitted_in_request(name, b"URI=spiffe://cluster.local/ns/web/sa/admin"), "{name}");
        }
    }
}
