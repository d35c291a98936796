//! Which of several routes that hold for a request takes it (Gateway API, HTTPRouteRule.matches): the one whose path is
//! matched exactly; then that with the longest prefix; then the one that asks for a method; then for more headers;
//! then for more query parameters; then the older resource, then the first by name, then its first rule. A regular
//! expression comes between an exact path and a prefix, as in Istio.

use std::cmp::Reverse;

use model::Str;
use model::http::{PathMatch, RouteMatch};

/// Where an entry of a resource stands; the least comes first.
#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Precedence {
    path: (u8, Reverse<usize>),
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
        namespace: &Str,
        name: &Str,
        (rule, entry): (usize, usize),
    ) -> Self {
        let path = match &when.path {
            Some(PathMatch::Exact(_) | PathMatch::ExactIgnoringCase(_)) => (0, Reverse(0)),
            Some(PathMatch::Regex(regex)) => (1, Reverse(regex.source().len())),
            Some(PathMatch::Segments(p) | PathMatch::Prefix(p) | PathMatch::PrefixIgnoringCase(p)) => {
                (2, Reverse(p.len()))
            }
            None => (2, Reverse(0)),
        };
        Self {
            path,
            without_method: when.method.is_none(),
            headers: Reverse(when.headers.len()),
            query: Reverse(when.query.len()),
            created: (created.is_empty(), created.clone()),
            namespace: namespace.clone(),
            name: name.clone(),
            rule,
            entry,
        }
    }
}
