//! What is told of the requests of one service, with everything looked up.

use std::sync::Arc;

use model::telemetry::{Expression, MetricName, MetricRule, Metrics};
use process::metrics::http::Columns;
use process::metrics::tcp::{CustomLabels, TcpColumns};

use super::ended::Ended;

/// Metrics that have the same labels.
#[derive(Debug, PartialEq)]
pub(super) struct Group {
    pub columns: Columns,
    pub labels: Differing,
}

/// Metrics of connections that have the same labels.
#[derive(Debug, PartialEq)]
pub(super) struct StreamGroup {
    pub columns: TcpColumns,
    pub labels: Differing,
}

/// Labels that are not the standard ones.
#[derive(Debug, PartialEq)]
pub(super) struct Differing {
    /// Standard labels that are left out.
    pub hidden: Box<[Arc<str>]>,
    /// Labels that are there besides.
    pub added: Box<[(Arc<str>, Expression)]>,
}

impl Differing {
    fn of(rule: Option<&MetricRule>) -> Self {
        let tags = rule.map_or(&[][..], |rule| &rule.tags);
        Self {
            hidden: tags.iter().map(|tag| tag.name.clone()).collect(),
            added: tags.iter().filter_map(|t| Some((t.name.clone(), t.value.clone()?))).collect(),
        }
    }

    /// What they come to; `None` where all are the standard ones.
    pub fn custom(&self, ended: &Ended<'_>) -> Option<Arc<CustomLabels>> {
        if self.hidden.is_empty() && self.added.is_empty() {
            return None;
        }
        let added = self.added.iter().map(|(name, value)| {
            (name.clone(), value.text(ended).map_or_else(|| "unknown".into(), |text| text.as_ref().into()))
        });
        Some(Arc::new(CustomLabels { hidden: self.hidden.clone(), added: added.collect() }))
    }
}

/// Which metrics are kept, with which labels.
#[derive(Debug)]
pub(super) struct Plan {
    /// Together they have each metric once at most.
    pub groups: Box<[Group]>,
    /// Whether labels depend on more of a request than its ends and its outcome.
    pub per_request: bool,
    /// The same of connections that show no requests.
    pub streams: Box<[StreamGroup]>,
    /// Whether connections that fail are counted.
    pub failures: bool,
}

const COLUMNS: [(MetricName, Columns); 6] = [
    (MetricName::RequestCount, Columns::REQUESTS),
    (MetricName::RequestDuration, Columns::DURATION),
    (MetricName::RequestSize, Columns::REQUEST_BYTES),
    (MetricName::ResponseSize, Columns::RESPONSE_BYTES),
    (MetricName::GrpcRequestMessages, Columns::REQUEST_MESSAGES),
    (MetricName::GrpcResponseMessages, Columns::RESPONSE_MESSAGES),
];

const STREAM_COLUMNS: [(MetricName, TcpColumns); 4] = [
    (MetricName::TcpOpened, TcpColumns::OPENED),
    (MetricName::TcpClosed, TcpColumns::CLOSED),
    (MetricName::TcpReceived, TcpColumns::RECEIVED),
    (MetricName::TcpSent, TcpColumns::SENT),
];

impl Plan {
    pub fn of(metrics: &Metrics) -> Self {
        let rule = |name: MetricName| metrics.rules.iter().find(|rule| rule.metric == name);
        let kept = |name: MetricName| !metrics.disabled && !rule(name).is_some_and(|rule| rule.disabled);
        let mut groups: Vec<Group> = Vec::new();
        for (name, columns) in COLUMNS.into_iter().filter(|(name, _)| kept(*name)) {
            let labels = Differing::of(rule(name));
            match groups.iter_mut().find(|group| group.labels == labels) {
                Some(same) => same.columns = same.columns.with(columns),
                None => groups.push(Group { columns, labels }),
            }
        }
        let mut streams: Vec<StreamGroup> = Vec::new();
        for (name, columns) in STREAM_COLUMNS.into_iter().filter(|(name, _)| kept(*name)) {
            let labels = Differing::of(rule(name));
            match streams.iter_mut().find(|group| group.labels == labels) {
                Some(same) => same.columns = same.columns.with(columns),
                None => streams.push(StreamGroup { columns, labels }),
            }
        }
        let per_request = groups.iter().any(|group| !group.labels.added.is_empty());
        Self { groups: groups.into(), per_request, streams: streams.into(), failures: !metrics.disabled }
    }
}
