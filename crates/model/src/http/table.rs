//! Which route takes a request.
//!
//! The answer is that of a list in order of precedence: the first entry that holds. It is found without a walk over the
//! list: by the path, which is hashed whole and for each length that a prefix has, and by the value of one header
//! where many entries share their path. The cost grows with the lengths that there are and with what shares both,
//! not with the number of routes.

use std::collections::BTreeSet;
use std::sync::Arc;

use hashbrown::HashMap;

use super::matcher::SourceFacts;
use super::{PathMatch, Pattern, Request, Route, RouteMatch};

/// Routes in order of precedence, and where to look for which.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    entries: Box<[(RouteMatch, Arc<Route>)]>,
    exact: HashMap<Box<str>, Bucket>,
    prefixes: HashMap<Box<str>, Bucket>,
    /// The lengths of the keys of `prefixes`, ascending.
    lengths: Box<[usize]>,
    /// Entries of which the path says nothing that can be looked up.
    others: Bucket,
}

/// What [`RouteTable::select`] found.
#[derive(Clone, Copy, Debug)]
pub struct Selected<'t> {
    /// The route.
    pub route: &'t Arc<Route>,
    /// What of it held.
    pub matched: &'t RouteMatch,
    /// Its place in the order of precedence.
    pub position: usize,
}

/// Positions of entries that share a path, ascending.
#[derive(Clone, Debug, Default)]
struct Bucket {
    /// Those that [`Self::by_value`] does not hold.
    list: Box<[u32]>,
    /// Those that want one value of one header, where there are many.
    by_value: Option<Box<ByValue>>,
}

#[derive(Clone, Debug)]
struct ByValue {
    name: Box<str>,
    values: HashMap<Box<[u8]>, Box<[u32]>>,
}

/// Entries of one path from which on a header is looked up rather than tried.
const MANY: usize = 8;

impl PartialEq for RouteTable {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl RouteTable {
    /// A table of `entries`, the ones that win first. Each route's `matches` are entries of their own.
    #[must_use]
    pub fn new(entries: Vec<(RouteMatch, Arc<Route>)>) -> Self {
        let mut exact: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        let mut prefixes: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        let mut others = Vec::new();
        // More entries than a u32 counts fit in no memory; the rest would never be looked at.
        for (position, (when, _)) in (0..u32::MAX).zip(&entries) {
            match &when.path {
                Some(PathMatch::Exact(path)) => exact.entry(key(path)).or_default().push(position),
                Some(PathMatch::Segments(path) | PathMatch::Prefix(path)) if !path.is_empty() => {
                    prefixes.entry(key(path)).or_default().push(position);
                }
                _ => others.push(position),
            }
        }
        let bucket = |list: Vec<u32>| Bucket::new(list, &entries);
        let lengths: BTreeSet<usize> = prefixes.keys().map(|p| p.len()).collect();
        Self {
            exact: exact.into_iter().map(|(path, list)| (path, bucket(list))).collect(),
            prefixes: prefixes.into_iter().map(|(path, list)| (path, bucket(list))).collect(),
            lengths: lengths.into_iter().collect(),
            others: bucket(others),
            entries: entries.into(),
        }
    }

    /// The entries, in order of precedence.
    #[must_use]
    pub fn entries(&self) -> &[(RouteMatch, Arc<Route>)] {
        &self.entries
    }

    /// The route for `request` from `source`: that of the first entry that holds.
    #[must_use]
    pub fn select<'t>(&'t self, request: &Request<'_>, source: &SourceFacts<'_>) -> Option<Selected<'t>> {
        let mut best = None;
        self.scan(self.exact.get(request.path), request, source, &mut best);
        for length in &self.lengths {
            // A length that ends within a character is that of no prefix.
            let Some(prefix) = request.path.get(..*length) else {
                if *length > request.path.len() { break } else { continue }
            };
            self.scan(self.prefixes.get(prefix), request, source, &mut best);
        }
        self.scan(Some(&self.others), request, source, &mut best);
        let position = best? as usize;
        let (matched, route) = self.entries.get(position)?;
        Some(Selected { route, matched, position })
    }

    /// Sets `best` to the first of `bucket` that holds, if it comes before `best`.
    fn scan(
        &self,
        bucket: Option<&Bucket>,
        request: &Request<'_>,
        source: &SourceFacts<'_>,
        best: &mut Option<u32>,
    ) {
        let Some(bucket) = bucket else { return };
        let mut first_of = |list: &[u32]| {
            for position in list.iter().copied().take_while(|p| best.is_none_or(|b| *p < b)) {
                let holds =
                    self.entries.get(position as usize).is_some_and(|(when, _)| when.holds(request, source));
                if holds {
                    *best = Some(position);
                    return;
                }
            }
        };
        first_of(&bucket.list);
        if let Some(by_value) = &bucket.by_value
            && let Some(value) = request.headers.field(&by_value.name)
            && let Some(list) = by_value.values.get(&*value)
        {
            first_of(list);
        }
    }
}

fn key(path: &str) -> Box<str> {
    path.into()
}

impl Bucket {
    fn new(list: Vec<u32>, entries: &[(RouteMatch, Arc<Route>)]) -> Self {
        let wanted = |position: u32| {
            entries.get(position as usize).into_iter().flat_map(|(when, _)| &when.headers).filter_map(|h| {
                match (&h.value, &*h.name) {
                    // These are not read from the fields.
                    (_, "host") => None,
                    (_, name) if name.starts_with(':') => None,
                    (Pattern::Exact(value), name) if !h.negated => Some((name, value)),
                    _ => None,
                }
            })
        };
        let mut names: HashMap<&str, usize> = HashMap::new();
        for name in list.iter().flat_map(|p| wanted(*p)).map(|(name, _)| name) {
            *names.entry(name).or_default() += 1;
        }
        // Of equally frequent ones the first by name, so that two tables of the same routes are the same.
        let common = names.into_iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(a.0)));
        let Some((name, _)) = common.filter(|(_, count)| *count >= MANY) else {
            return Self { list: list.into(), by_value: None };
        };
        let mut values: HashMap<Box<[u8]>, Vec<u32>> = HashMap::new();
        let mut rest = Vec::new();
        for position in list {
            match wanted(position).find(|(n, _)| *n == name) {
                Some((_, value)) => values.entry(value.as_bytes().into()).or_default().push(position),
                None => rest.push(position),
            }
        }
        let values = values.into_iter().map(|(value, list)| (value, list.into())).collect();
        Self { list: rest.into(), by_value: Some(Box::new(ByValue { name: name.into(), values })) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::super::{HeaderMatch, QueryMatch, Regex, SourceMatch};
    use super::*;
    use crate::http::RouteAction;

    fn path_text() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!["a", "ab", "b", "é", ""]), 0..4)
            .prop_map(|parts| format!("/{}", parts.join("/")))
    }

    fn path_match() -> impl Strategy<Value = PathMatch> {
        (0..6, path_text()).prop_map(|(kind, text)| match kind {
            0 => PathMatch::Exact(text.as_str().into()),
            1 => PathMatch::segments(&text),
            2 => PathMatch::Prefix(text.as_str().into()),
            3 => PathMatch::Regex(Regex::new(&format!("{text}.*")).unwrap()),
            4 => PathMatch::ExactIgnoringCase(text.as_str().into()),
            _ => PathMatch::PrefixIgnoringCase(text.as_str().into()),
        })
    }

    fn value() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["1", "2", "3"])
    }

    fn header_match() -> impl Strategy<Value = HeaderMatch> {
        (prop::sample::select(vec!["x", "y", "host"]), value(), any::<bool>(), 0..3).prop_map(
            |(name, value, negated, kind)| HeaderMatch {
                name: name.into(),
                value: match kind {
                    0 => Pattern::Present,
                    _ => Pattern::Exact(value.into()),
                },
                negated,
            },
        )
    }

    fn entry() -> impl Strategy<Value = RouteMatch> {
        (
            prop::option::of(path_match()),
            prop::option::of(prop::sample::select(vec!["GET", "POST"])),
            prop::collection::vec(header_match(), 0..3),
            prop::option::of(value()),
            prop::option::of(prop::sample::select(vec!["shop", "other"])),
        )
            .prop_map(|(path, method, headers, query, namespace)| RouteMatch {
                path,
                method: method.map(|m| Pattern::Exact(m.into())),
                headers: headers.into(),
                query: query
                    .map(|v| QueryMatch { name: "q".into(), value: Pattern::Exact(v.into()) })
                    .into_iter()
                    .collect(),
                source: namespace
                    .map(|n| Box::new(SourceMatch { namespace: Some(n.into()), labels: Box::default() })),
                ..RouteMatch::default()
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_table_selects_as_a_walk_over_its_entries_does(
            entries in prop::collection::vec(entry(), 0..40),
            path in path_text(),
            method in prop::sample::select(vec!["GET", "POST"]),
            fields in prop::collection::vec((prop::sample::select(vec!["x", "y"]), value()), 0..4),
            query in prop::sample::select(vec!["", "q=1", "q=%32&q=1", "p=1"]),
        ) {
            let route = Arc::new(Route::new(RouteAction::default()));
            let table = RouteTable::new(entries.iter().map(|e| (e.clone(), route.clone())).collect());
            let request = Request { query, ..Request::new(method, "1", &path, &fields) };
            let source = SourceFacts { namespace: Some("shop"), labels: &[] };
            let walked = entries.iter().position(|e| e.holds(&request, &source));
            prop_assert_eq!(table.select(&request, &source).map(|s| s.position), walked);
        }
    }
}
