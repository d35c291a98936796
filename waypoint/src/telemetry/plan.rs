//! What is told of the requests of one service, with everything looked up.

use std::sync::Arc;

use model::telemetry::{Expression, MetricName, Metrics};
use process::metrics::http::Columns;

/// Metrics that have the same labels.
#[derive(Debug, PartialEq)]
pub(super) struct Group {
    pub columns: Columns,
    /// Standard labels that are left out.
    pub hidden: Box<[Arc<str>]>,
    /// Labels that are there besides.
    pub added: Box<[(Arc<str>, Expression)]>,
}

/// Which metrics are kept, with which labels.
#[derive(Debug)]
pub(super) struct Plan {
    /// Together they have each metric once at most.
    pub groups: Box<[Group]>,
    /// Whether labels depend on more of a request than its ends and its outcome.
    pub per_request: bool,
}

const COLUMNS: [(MetricName, Columns); 6] = [
    (MetricName::RequestCount, Columns::REQUESTS),
    (MetricName::RequestDuration, Columns::DURATION),
    (MetricName::RequestSize, Columns::REQUEST_BYTES),
    (MetricName::ResponseSize, Columns::RESPONSE_BYTES),
    (MetricName::GrpcRequestMessages, Columns::REQUEST_MESSAGES),
    (MetricName::GrpcResponseMessages, Columns::RESPONSE_MESSAGES),
];

impl Plan {
    pub fn of(metrics: &Metrics) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (name, columns) in COLUMNS {
            let rule = metrics.rules.iter().find(|rule| rule.metric == name);
            if metrics.disabled || rule.is_some_and(|rule| rule.disabled) {
                continue;
            }
            let tags = rule.map_or(&[][..], |rule| &rule.tags);
            let group = Group {
                columns,
                hidden: tags.iter().map(|tag| tag.name.clone()).collect(),
                added: tags.iter().filter_map(|t| Some((t.name.clone(), t.value.clone()?))).collect(),
            };
            match groups.iter_mut().find(|g| g.hidden == group.hidden && g.added == group.added) {
                Some(same) => same.columns = same.columns.with(columns),
                None => groups.push(group),
            }
        }
        let per_request = groups.iter().any(|group| !group.added.is_empty());
        Self { groups: groups.into(), per_request }
    }
}
