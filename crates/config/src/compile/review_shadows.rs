//! Rules that take nothing, since others before them take all that they ask for.

use hashbrown::HashMap;
use model::ServiceKey;
use model::http::{PathMatch, RouteId, RouteMatch};

use super::{Compiler, Finding};
use crate::diagnostic::Code;
use crate::resource::ObjectKey;

/// How often a rule stands in the tables, how often another takes what it asks for there, and the first that does.
#[derive(Default)]
struct Shadow {
    entries: usize,
    taken: usize,
    by: Option<RouteId>,
}

impl Compiler {
    /// The rules of a resource that take no request to any of these services: one before them has the same match, or takes
    /// every request.
    pub(super) fn shadowed(&self, key: &ObjectKey, services: &[ServiceKey]) -> Vec<Finding> {
        let mut rules: HashMap<u32, Shadow> = HashMap::new();
        let served = services.iter().filter_map(|service| self.http_services.get(service));
        for port in served.flat_map(|service| &service.ports) {
            let mut before: HashMap<String, &RouteId> = HashMap::new();
            let mut all: Option<&RouteId> = None;
            for (when, route) in port.routes.entries() {
                let asked = when.to_string();
                if is_of(&route.id, key) {
                    let shadow = rules.entry(route.id.rule).or_default();
                    shadow.entries += 1;
                    let by = all.or_else(|| before.get(&asked).copied());
                    if let Some(by) = by.filter(|by| **by != route.id) {
                        shadow.taken += 1;
                        shadow.by.get_or_insert_with(|| by.clone());
                    }
                }
                if all.is_none() && takes_all(when) {
                    all = Some(&route.id);
                }
                before.entry(asked).or_insert(&route.id);
            }
        }
        let mut shadowed: Vec<(u32, RouteId)> = rules
            .into_iter()
            .filter(|(_, shadow)| shadow.taken == shadow.entries)
            .filter_map(|(rule, shadow)| Some((rule, shadow.by?)))
            .collect();
        shadowed.sort_by_key(|(rule, _)| *rule);
        let finding = |(rule, by): (u32, RouteId)| Finding {
            code: Code::WithoutEffect,
            message: format!(
                "rule {rule} takes no request: {by} goes before it, and takes all that it asks for"
            ),
            remedy: "remove it, or let it ask for something else".to_owned(),
        };
        shadowed.into_iter().map(finding).collect()
    }
}

fn is_of(id: &RouteId, key: &ObjectKey) -> bool {
    id.namespace == key.namespace && id.name == key.name && id.kind.name() == key.kind.name()
}

/// Whether a match holds for every request: every path begins with a slash.
fn takes_all(when: &RouteMatch) -> bool {
    let rest = RouteMatch { path: None, ..when.clone() };
    let any_path = when.path.as_ref().is_none_or(|path| match path {
        PathMatch::Segments(prefix) | PathMatch::Prefix(prefix) | PathMatch::PrefixIgnoringCase(prefix) => {
            prefix.is_empty() || &**prefix == "/"
        }
        PathMatch::Exact(_) | PathMatch::ExactIgnoringCase(_) | PathMatch::Regex(_) => false,
    });
    any_path && rest == RouteMatch::default()
}
