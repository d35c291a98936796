//! Which of several routes that hold for a request takes it (Gateway API, HTTPRouteRule.matches): the one whose path is
//! matched exactly; then that with the longest prefix; then the one that asks for a method; then for more headers;
//! then for more query parameters; then the older resource, then the first by name, then its first rule. A regular
//! expression comes between an exact path and a prefix, as in Istio. Of GRPCRoutes those that name a service come first, then
//! those that name a method (GRPCRouteRule.matches).

use std::cmp::Reverse;

use model::Str;
use model::http::{PathMatch, RouteMatch};

use crate::resource::{Kind, ObjectKey};

/// Where an entry of a resource stands; the least comes first.
#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Precedence {
    path: (u8, Reverse<usize>, Reverse<usize>),
    without_method: bool,
    headers: Reverse<usize>,
    query: Reverse<usize>,
    /// An unknown age is younger than any: only objects of files have none.
    created: (bool, Str),
    namespace: Str,
    name: Str,
    rule: usize,
    entry: usize,
}

impl Precedence {
    pub(super) fn of(
        when: &RouteMatch,
        created: &Str,
        key: &ObjectKey,
        (rule, entry): (usize, usize),
    ) -> Self {
        let rank = |rank: u8, length: usize| (rank, Reverse(length), Reverse(0));
        let path = match &when.path {
            path if key.kind == Kind::GrpcRoute => {
                let (service, method) = path.as_ref().map(called).unwrap_or_default();
                (0, Reverse(service), Reverse(method))
            }
            Some(PathMatch::Exact(_) | PathMatch::ExactIgnoringCase(_)) => rank(0, 0),
            Some(PathMatch::Regex(regex)) => rank(1, regex.source().len()),
            Some(PathMatch::Segments(p) | PathMatch::Prefix(p) | PathMatch::PrefixIgnoringCase(p)) => {
                rank(2, p.len())
            }
            None => rank(2, 0),
        };
        Self {
            path,
            without_method: when.method.is_none(),
            headers: Reverse(when.headers.len()),
            query: Reverse(when.query.len()),
            created: (created.is_empty(), created.clone()),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            rule,
            entry,
        }
    }
}

/// How a GRPCRoute's match asks for a service and for a method: 2 for a name, 1 for an expression, 0 for any. What holds for one
/// request names the same service, so that the characters of it are as many in all matches.
fn called(path: &PathMatch) -> (usize, usize) {
    /// What stands for any name, see [`super::grpc_route`].
    const ANY: &str = "[^/]+";
    let asked = |text: &str, by: usize| if text.is_empty() || text == ANY { 0 } else { by };
    let split = |path: &str| {
        let (service, method) =
            path.strip_prefix('/').and_then(|rest| rest.rsplit_once('/')).unwrap_or_default();
        (asked(service, 2), asked(method, 2))
    };
    match path {
        PathMatch::Regex(regex) => {
            let source: &str = regex.source();
            let groups = source.strip_prefix("/(?:").and_then(|rest| rest.strip_suffix(')'));
            let groups = groups.and_then(|rest| rest.rsplit_once(")/(?:"));
            groups.map_or_else(|| split(source), |(service, method)| (asked(service, 1), asked(method, 1)))
        }
        PathMatch::Exact(path) | PathMatch::Prefix(path) => split(path),
        _ => (0, 0),
    }
}
