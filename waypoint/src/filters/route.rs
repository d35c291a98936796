//! The route that takes a request, and what is made of routes once, when they come: not for each request.

use std::sync::Arc;

use model::http::{
    Backend, BackendRef, HeaderEdits, HttpPort, Request, Retry, RetryOn, Route, RouteAction, RouteKind,
    RouteMatch, SourceFacts,
};

use super::{Refusal, respond, rewrite};
use crate::http::decide::{Edits, Forwarding, Measured, Retries, Timeouts};

/// A port's routes.
#[derive(Debug)]
pub struct PortRules {
    /// The port.
    pub port: HttpPort,
    /// What is done for each entry of the port's table; entries of one route share it.
    routes: Box<[Arc<RouteRules>]>,
    /// What is done where the port has no routes: requests go to the service itself.
    itself: Arc<RouteRules>,
}

/// What is done with the requests of a route.
#[derive(Debug)]
pub struct RouteRules {
    /// The route; `None` where the service has none.
    pub route: Option<Arc<Route>>,
    /// Changes of the request's fields.
    pub request_edits: Edits,
    /// What differs from back end to back end, in the order of the route's; the service itself where there is no route.
    pub backends: Box<[BackendRules]>,
    /// The route's own answer.
    pub respond: Option<Refusal>,
    /// Changes of the fields of what is answered here, by a redirect or that.
    pub answer_edits: Edits,
}

/// What is done with the requests that a back end gets.
#[derive(Debug)]
pub struct BackendRules {
    /// What it is.
    pub to: BackendRef,
    /// Changes of the request's fields, after those of the route.
    pub request_edits: Edits,
    /// How it is sent on.
    pub forwarding: Arc<Forwarding>,
}

/// The route of a request.
pub struct Found<'a> {
    /// What is done.
    pub rules: &'a Arc<RouteRules>,
    /// What of the route held.
    pub matched: Option<&'a RouteMatch>,
    /// Its place in the port's table.
    pub position: Option<usize>,
}

impl PortRules {
    /// What is made of `port` of `service`. What is the same of `before` is kept.
    #[must_use]
    pub fn new(service: &model::ServiceKey, port: &HttpPort, before: Option<&Self>) -> Self {
        let itself = BackendRef::Service { service: service.clone(), port: port.number, subset: None };
        let itself = Arc::new(RouteRules {
            route: None,
            request_edits: Edits::default(),
            backends: [BackendRules {
                to: itself,
                request_edits: Edits::default(),
                forwarding: Arc::new(forwarding(None, None)),
            }]
            .into(),
            respond: None,
            answer_edits: Edits::default(),
        });
        let mut routes: Vec<Arc<RouteRules>> = Vec::with_capacity(port.routes.entries().len());
        let known = |rules: &Arc<RouteRules>, route: &Arc<Route>| {
            rules.route.as_ref().is_some_and(|r| Arc::ptr_eq(r, route))
        };
        for (position, (_, route)) in port.routes.entries().iter().enumerate() {
            // Entries of one route follow each other, as a rule; and most of a table stays where it was.
            let last = routes.last().filter(|last| known(last, route)).cloned();
            let old = || before?.routes.get(position).filter(|old| known(old, route)).cloned();
            let rules = last.or_else(old).unwrap_or_else(|| Arc::new(RouteRules::new(route)));
            routes.push(rules);
        }
        Self { port: port.clone(), routes: routes.into(), itself }
    }

    /// The route that takes `request`; none where there are routes and none of them does.
    #[must_use]
    pub fn find(&self, request: &Request<'_>, source: &SourceFacts<'_>) -> Option<Found<'_>> {
        if self.routes.is_empty() {
            return Some(Found { rules: &self.itself, matched: None, position: None });
        }
        let selected = self.port.routes.select(request, source)?;
        let rules = self.routes.get(selected.position)?;
        Some(Found { rules, matched: Some(selected.matched), position: Some(selected.position) })
    }
}

impl RouteRules {
    fn new(route: &Arc<Route>) -> Self {
        let backends = match &route.action {
            RouteAction::Forward(forward) => forward.backends(),
            RouteAction::Redirect(_) | RouteAction::Respond(_) => &[],
        };
        let backend = |backend: &Backend| BackendRules {
            to: backend.to.clone(),
            request_edits: rewrite::edits(&backend.request_headers),
            forwarding: Arc::new(forwarding(Some(route), Some(&backend.response_headers))),
        };
        Self {
            route: Some(route.clone()),
            request_edits: rewrite::edits(&route.request_headers),
            backends: backends.iter().map(backend).collect(),
            respond: match &route.action {
                RouteAction::Respond(answer) => Some(respond::response(answer)),
                RouteAction::Forward(_) | RouteAction::Redirect(_) => None,
            },
            answer_edits: match &route.action {
                RouteAction::Redirect(_) | RouteAction::Respond(_) => rewrite::edits(&route.response_headers),
                RouteAction::Forward(_) => Edits::default(),
            },
        }
    }
}

/// What the engine is told.
fn forwarding(route: Option<&Route>, backend: Option<&HeaderEdits>) -> Forwarding {
    let mut response_edits = backend.map(rewrite::edits).unwrap_or_default();
    let mut timeouts = Timeouts::default();
    if let Some(route) = route {
        response_edits.0.extend(rewrite::edits(&route.response_headers).0);
        let measured = match route.id.kind {
            // Of a service without routes the limit is that of the mesh's settings, which are Istio's, too.
            RouteKind::VirtualService | RouteKind::Default => Measured::Response,
            _ => Measured::Whole,
        };
        let model::http::Timeouts { request, per_try } = route.timeouts;
        timeouts = Timeouts { request, per_try, measured, idle: None };
    }
    let retries = match route.and_then(|route| route.retry.as_ref()) {
        Some(retry) => (retry.attempts > 0).then(|| retries(retry)),
        // Where nothing is said: what has not reached an endpoint goes to another.
        None => {
            Some(Retries { attempts: 2, connect_failure: true, refused_stream: true, ..Retries::default() })
        }
    };
    Forwarding { timeouts, retries, response_edits }
}

fn retries(retry: &Retry) -> Retries {
    let on = |what: RetryOn| retry.on.has(what);
    let mut statuses = if on(RetryOn::STATUSES) { retry.statuses.to_vec() } else { Vec::new() };
    if on(RetryOn::RETRIABLE_4XX) {
        statuses.push(409);
    }
    let codes = [
        (RetryOn::CANCELLED, 1),
        (RetryOn::DEADLINE_EXCEEDED, 4),
        (RetryOn::RESOURCE_EXHAUSTED, 8),
        (RetryOn::INTERNAL, 13),
        (RetryOn::UNAVAILABLE, 14),
    ];
    let every = on(RetryOn::SERVER_ERROR);
    Retries {
        attempts: retry.attempts,
        // Envoy's 5xx and gateway-error hold where there is no answer at all, too.
        connect_failure: every
            || on(RetryOn::GATEWAY_ERROR)
            || on(RetryOn::CONNECT_FAILURE)
            || on(RetryOn::RESET_BEFORE_REQUEST),
        reset: every || on(RetryOn::GATEWAY_ERROR) || on(RetryOn::RESET),
        refused_stream: every || on(RetryOn::REFUSED_STREAM),
        server_errors: every,
        gateway_errors: on(RetryOn::GATEWAY_ERROR),
        statuses,
        grpc_codes: codes.into_iter().filter(|(what, _)| on(*what)).map(|(_, code)| code).collect(),
        backoff: retry.backoff,
        rate_limited: on(RetryOn::ENVOY_RATELIMITED),
        remote_localities: retry.remote_localities,
        same_hosts: !retry.other_hosts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_by_the_meshs_settings_ends_with_the_responses_head() {
        let measured = |kind| {
            let mut route = Route::new(RouteAction::default());
            route.id.kind = kind;
            forwarding(Some(&route), None).timeouts.measured
        };
        assert_eq!(measured(RouteKind::Default), Measured::Response);
        assert_eq!(measured(RouteKind::VirtualService), Measured::Response);
        assert_eq!(measured(RouteKind::HttpRoute), Measured::Whole);
    }

    #[test]
    fn each_word_of_retry_on_has_something_tried_again() {
        let of = |on| {
            retries(&Retry {
                attempts: 1,
                on,
                statuses: [418].into(),
                backoff: None,
                remote_localities: true,
                other_hosts: true,
            })
        };
        let nothing = of(RetryOn::default());
        let mut seen = vec![nothing];
        for word in RetryOn::words() {
            let Some(on) = RetryOn::parse(word) else { panic!("{word} is listed, and not known") };
            let asked = of(on);
            // What was reset before anything was sent is a connection that was not had, to the engine.
            let is_new = !seen.contains(&asked) || word == "connect-failure";
            assert!(is_new, "{word} asks for nothing, or for what another word does");
            seen.push(asked);
        }
    }
}
