//! What Telemetry resources and the mesh's settings come to for a service of a waypoint.
//!
//! The levels, each of which goes over the one before: the root namespace, the waypoint's namespace, its GatewayClass,
//! its Gateway, the Service or ServiceEntry. Of several resources of one level the oldest counts, as in Istio. What an
//! entry says of a provider holds for that provider; without one, for those of the level above.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use model::Str;
use model::telemetry::{
    AccessLog, Collector, Expression, LogFormat, LogService, LogSink, MetricName, MetricRule, Metrics, Tag,
    Telemetry as Told, Tracing,
};

use super::authorization::PolicyScope;
use super::mesh_config::MeshConfig;
use super::providers::{Provider, ProviderKind};
use super::selector::{Target, TargetKind};
use super::telemetry::{LogDraft, Telemetry};
use super::waypoint::Waypoint;
use crate::compile::{Affected, Effects, Finding, Told as Services};
use crate::diagnostic::Code;
use crate::resource::ObjectKey;

/// The provider of logs that there is without being defined.
const FILE_LOG: &str = "envoy";
/// That of metrics.
const PROMETHEUS: &str = "prometheus";
/// The longest path that a span's attribute shows, unless the provider says it.
const TAG_LENGTH: u32 = 256;

/// All Telemetry resources.
#[derive(Debug, Default)]
pub(super) struct Telemetries {
    all: BTreeMap<ObjectKey, Telemetry>,
    /// What was made and is still in use, so that services share it.
    made: Mutex<Vec<Weak<Told>>>,
}

impl Telemetries {
    /// Sets a resource, or removes it.
    pub fn set(&mut self, key: &ObjectKey, telemetry: Option<Telemetry>, root: &str, effects: &mut Effects) {
        let old = match telemetry {
            Some(telemetry) => self.all.insert(key.clone(), telemetry),
            None => self.all.remove(key),
        };
        let new = self.all.get(key);
        if old.as_ref() == new {
            return;
        }
        for scope in old.iter().chain(new).map(|telemetry| &telemetry.scope) {
            effects.affected.extend(concerned(key, scope, root).into_iter().map(Affected::Told));
        }
    }

    /// Follows a change of the root namespace.
    pub fn set_root(&self, effects: &mut Effects) {
        if !self.all.is_empty() {
            effects.affected.push(Affected::Told(Services::All));
        }
    }

    /// What is told of the requests to what `object` defines, behind `waypoint`.
    pub fn of(
        &self,
        object: &ObjectKey,
        waypoint: &Waypoint,
        root: &str,
        config: Option<&MeshConfig>,
    ) -> Arc<Told> {
        let levels = self.levels(object, waypoint, root);
        let nothing = MeshConfig::default();
        let config = config.unwrap_or(&nothing);
        let told = Told {
            metrics: metrics(&levels, config),
            logs: logs(&levels, config),
            tracing: tracing(&levels, config).map(Box::new),
        };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.retain(|told| told.strong_count() > 0);
        if let Some(same) = made.iter().filter_map(Weak::upgrade).find(|other| **other == told) {
            return same;
        }
        let told = Arc::new(told);
        made.push(Arc::downgrade(&told));
        told
    }

    /// What a resource names by `targetRefs`.
    pub fn targets_of(&self, key: &ObjectKey) -> Option<&[Target]> {
        self.all.get(key)?.scope.targets()
    }

    /// The resources that name something of which this holds, with their namespace.
    pub fn naming(&self, is_meant: impl Fn(&Str, &Target) -> bool) -> impl Iterator<Item = ObjectKey> {
        let all = self.all.iter().filter(move |(key, telemetry)| {
            let targets = telemetry.scope.targets().unwrap_or_default();
            targets.iter().any(|target| is_meant(&key.namespace, target))
        });
        all.map(|(key, _)| key.clone())
    }

    /// The resources that hold, the most general first.
    fn levels(&self, object: &ObjectKey, waypoint: &Waypoint, root: &str) -> Vec<&Telemetry> {
        let oldest = |holds: &dyn Fn(&ObjectKey, &Telemetry) -> bool| {
            let all = self.all.iter().filter(|(key, telemetry)| holds(key, telemetry));
            all.map(|(_, telemetry)| telemetry).min_by(|a, b| a.age.cmp(&b.age))
        };
        let whole = |namespace: &str| {
            oldest(&|key, telemetry| {
                *key.namespace == *namespace && telemetry.scope == PolicyScope::Namespace
            })
        };
        let targeted = |holds: &dyn Fn(&ObjectKey, &Target) -> bool| {
            oldest(&|key, telemetry| match &telemetry.scope {
                PolicyScope::Targets(targets) => targets.iter().any(|target| holds(key, target)),
                _ => false,
            })
        };
        let own = Target::of(object);
        [
            whole(root),
            (*waypoint.namespace != *root).then(|| whole(&waypoint.namespace)).flatten(),
            targeted(&|key, target| *key.namespace == *root && target.kind == TargetKind::GatewayClass),
            targeted(&|key, target| {
                target.kind == TargetKind::Gateway && waypoint.is_target(&key.namespace, target)
            }),
            targeted(&|key, target| key.namespace == object.namespace && Some(target) == own.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// What to say of all of them.
    pub fn about_all(&self, config: Option<&MeshConfig>) -> Vec<(ObjectKey, Vec<Finding>)> {
        self.all.keys().map(|key| (key.clone(), self.about(key, config))).collect()
    }

    /// What to say of a resource in the light of the settings.
    pub fn about(&self, key: &ObjectKey, config: Option<&MeshConfig>) -> Vec<Finding> {
        let Some(telemetry) = self.all.get(key) else { return Vec::new() };
        let nothing = MeshConfig::default();
        let providers = config.unwrap_or(&nothing).providers();
        let metrics = telemetry.metrics.iter().flat_map(|m| &m.providers).map(|name| (name, Use::Metrics));
        let logs = telemetry.logs.iter().flat_map(|l| &l.providers).map(|name| (name, Use::Logs));
        let traces = telemetry.tracing.iter().flat_map(|t| &t.providers).map(|name| (name, Use::Traces));
        let wrong = |(name, wanted): (&Str, Use)| {
            let good = match (providers.get(name).map(|provider| &provider.kind), wanted) {
                (Some(ProviderKind::Prometheus), Use::Metrics)
                | (Some(ProviderKind::FileLog { .. } | ProviderKind::LogService { .. }), Use::Logs)
                | (Some(ProviderKind::Spans { .. }), Use::Traces) => true,
                (None, Use::Metrics) => &**name == PROMETHEUS,
                (None, Use::Logs) => &**name == FILE_LOG,
                _ => false,
            };
            (!good).then(|| Finding {
                code: Code::NamesNothing,
                message: format!("the provider {name} takes no {} here", wanted.name()),
                remedy: wanted.remedy().to_owned(),
            })
        };
        metrics.chain(logs).chain(traces).filter_map(wrong).collect()
    }
}

/// The services of which a resource says something, see [`Telemetries::levels`].
fn concerned(key: &ObjectKey, scope: &PolicyScope, root: &str) -> Vec<Services> {
    let one = |target: &Target| match (target.kind, target.object(&key.namespace)) {
        (_, Some(object)) => Some(Services::Of(object)),
        (TargetKind::GatewayClass, None) => (*key.namespace == *root).then_some(Services::All),
        (_, None) => {
            let (namespace, name) = (key.namespace.clone(), target.name.clone());
            Some(Services::By(Waypoint { namespace, name }))
        }
    };
    match scope {
        PolicyScope::Namespace if *key.namespace == *root => vec![Services::All],
        PolicyScope::Namespace => vec![Services::In(key.namespace.clone())],
        PolicyScope::Targets(targets) => targets.iter().filter_map(one).collect(),
        // No waypoint is selected.
        PolicyScope::Selector(_) => Vec::new(),
    }
}

#[derive(Clone, Copy)]
enum Use {
    Metrics,
    Logs,
    Traces,
}

impl Use {
    fn name(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::Logs => "logs",
            Self::Traces => "traces",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Metrics => "prometheus is there without being defined",
            Self::Logs => {
                "envoy is there without being defined; or define one with envoyFileAccessLog, envoyHttpAls, envoyTcpAls or \
                 envoyOtelAls"
            }
            Self::Traces => "define one with opentelemetry or zipkin (extensionProviders)",
        }
    }
}

/// The providers that entries are for: each names its own, or has those of the one before.
fn with_providers<'a, T>(
    entries: impl Iterator<Item = (&'a [Str], T)>,
    defaults: &[Str],
) -> Vec<(Vec<Str>, T)> {
    let mut above = defaults.to_vec();
    let mut all = Vec::new();
    for (named, entry) in entries {
        if !named.is_empty() {
            above = named.to_vec();
        }
        all.push((above.clone(), entry));
    }
    all
}

fn metrics(levels: &[&Telemetry], config: &MeshConfig) -> Metrics {
    let defaults = &config.providers().defaults().metrics;
    // Where nobody names any, there is the one that needs nothing.
    let defaults = if defaults.is_empty() { vec![Str::from(PROMETHEUS)] } else { defaults.clone() };
    let is_ours = |name: &Str| match config.providers().get(name) {
        Some(provider) => provider.kind == ProviderKind::Prometheus,
        None => &**name == PROMETHEUS,
    };
    let entries = levels.iter().flat_map(|level| &level.metrics).map(|entry| (&*entry.providers, entry));
    let entries = with_providers(entries, &defaults);
    // What the last entry names is what metrics are given to.
    let last = entries.last().map_or(&defaults, |(providers, _)| providers);
    let disabled = !last.iter().any(is_ours);
    let mut rules: BTreeMap<MetricName, (bool, BTreeMap<Str, Option<Expression>>)> = BTreeMap::new();
    for (_, entry) in entries.iter().filter(|(providers, _)| providers.iter().any(is_ours)) {
        for change in &entry.overrides {
            for metric in &change.metrics {
                let (disabled, tags) = rules.entry(*metric).or_default();
                *disabled = change.disabled.unwrap_or(*disabled);
                tags.extend(change.tags.iter().map(|tag| (tag.name.clone(), tag.value.clone())));
            }
        }
    }
    let rules = rules.into_iter().map(|(metric, (disabled, tags))| MetricRule {
        metric,
        disabled,
        tags: tags.into_iter().map(|(name, value)| Tag { name, value }).collect(),
    });
    Metrics { disabled, rules: rules.filter(|rule| rule.disabled || !rule.tags.is_empty()).collect() }
}

/// A log of a provider; `None` for one that takes no logs here.
fn log_sink(name: &str, config: &MeshConfig) -> Option<LogSink> {
    let provider = config.providers().get(name);
    match provider.map(|provider| &provider.kind) {
        Some(ProviderKind::FileLog { path, format }) => {
            Some(LogSink::File { path: path.clone(), format: format.clone() })
        }
        Some(ProviderKind::LogService { name, entries }) => Some(LogSink::Service(Box::new(LogService {
            collector: collector(provider?)?,
            name: name.clone(),
            entries: entries.clone(),
        }))),
        None if name == FILE_LOG => {
            Some(LogSink::File { path: "/dev/stdout".into(), format: config.log_format() })
        }
        _ => None,
    }
}

fn logs(levels: &[&Telemetry], config: &MeshConfig) -> Option<Box<[AccessLog]>> {
    let defaults = &config.providers().defaults().access_logging;
    let entries: Vec<(&[Str], &LogDraft)> =
        levels.iter().flat_map(|level| &level.logs).map(|entry| (&*entry.providers, entry)).collect();
    if entries.is_empty() {
        if !defaults.is_empty() {
            let open = |name: &Str| Some(AccessLog { sink: log_sink(name, config)?, filter: None });
            return Some(defaults.iter().filter_map(open).collect());
        }
        // Nobody has said anything but, perhaps, the oldest of the settings.
        let sink = LogSink::File { path: config.log_file()?, format: config.log_format() };
        return Some(Box::new([AccessLog { sink, filter: None }]));
    }
    // An entry without providers, with none above it, is for the one that there is anyway.
    let fallback = [Str::from(FILE_LOG)];
    let above = if defaults.is_empty() { &fallback[..] } else { defaults };
    let entries = with_providers(entries.into_iter(), above);
    // What the most specific level names is what logs are given to.
    let last: Vec<Str> = levels
        .iter()
        .rev()
        .map(|level| level.logs.iter().flat_map(|log| log.providers.iter().cloned()).collect::<Vec<_>>())
        .find(|names| !names.is_empty())
        .unwrap_or_else(|| above.to_vec());
    let mut open: BTreeMap<Str, Option<Expression>> = BTreeMap::new();
    for (providers, entry) in entries {
        for name in providers.into_iter().filter(|name| last.contains(name)) {
            if entry.disabled {
                open.remove(&name);
            } else {
                open.insert(name, entry.filter.clone());
            }
        }
    }
    let opened = open.into_iter();
    Some(
        opened
            .filter_map(|(name, filter)| Some(AccessLog { sink: log_sink(&name, config)?, filter }))
            .collect(),
    )
}

/// Where a provider is.
fn collector(provider: &Provider) -> Option<Collector> {
    let at = provider.backend.as_ref()?;
    Some(Collector {
        provider: provider.name.clone(),
        namespace: at.namespace.clone(),
        host: at.host.clone(),
        port: at.port,
    })
}

fn tracing(levels: &[&Telemetry], config: &MeshConfig) -> Option<Tracing> {
    let mut provider = config.providers().defaults().tracing.first();
    let (mut sampling, mut report, mut propagate) = (config.sampling(), true, true);
    let mut tags = &Vec::new();
    let entries = levels.iter().flat_map(|level| &level.tracing);
    for entry in entries {
        provider = entry.providers.first().or(provider);
        sampling = entry.sampling.unwrap_or(sampling);
        report = entry.report.unwrap_or(report);
        propagate = entry.propagate.unwrap_or(propagate);
        tags = entry.tags.as_ref().unwrap_or(tags);
    }
    let provider = config.providers().get(provider?)?;
    let ProviderKind::Spans { exporter, max_tag_length } = &provider.kind else { return None };
    Some(Tracing {
        collector: collector(provider)?,
        exporter: (**exporter).clone(),
        sampling,
        report,
        propagate,
        tags: tags.clone().into(),
        max_tag_length: max_tag_length.unwrap_or(TAG_LENGTH),
    })
}

/// How long a collector's answer is waited for, unless its provider says it.
pub(super) const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Istio's formats of logs, which its users' tools read.
pub(super) fn istio_format(json: bool) -> LogFormat {
    use model::telemetry::LogText;
    if !json {
        return LogText::new(ISTIO_TEXT).map_or(LogFormat::Text, LogFormat::TextOf);
    }
    let read = ISTIO_JSON.iter().filter_map(|(name, text)| Some(((*name).into(), LogText::new(text).ok()?)));
    LogFormat::JsonOf(read.collect())
}

const ISTIO_TEXT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% ",
    "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% ",
    "\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% ",
    "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" ",
    "\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% ",
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% ",
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n",
);

const ISTIO_JSON: [(&str, &str); 23] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
];
