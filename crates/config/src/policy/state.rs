//! All policies and the settings of the mesh, and what follows for the model when one of them changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use model::{Change, NodeLocal, Policy, PolicyKey, Settings, Str};

use super::authorization::{AuthorizationPolicy, PolicyScope};
use super::discovery::{self, NamespaceSelector};
use super::guards::Guards;
use super::l4;
use super::l7;
use super::mesh_config::{CONFIG_MAP, MeshConfig};
use super::mode::Modes;
use super::providers::Providers;
use super::review::{self, World};
use super::selector::{Target, TargetKind};
use super::telemetry::Telemetry;
use super::telling::Telemetries;
use super::waypoint::Waypoint;
use crate::compile::{Affected, Effects, Finding, Origin};
use crate::diagnostic::Code;
use crate::labels::{Labels, Selector};
use crate::resource::{Kind, ObjectKey, Resource};

/// The namespace in which Istio keeps the ConfigMap with the mesh's settings. The root namespace, whose policies
/// hold for the whole mesh, is one of these settings.
pub const SYSTEM_NAMESPACE: &str = "istio-system";

/// Policies with a selector, found by the labels of a workload.
#[derive(Debug, Default)]
pub(super) struct BySelector {
    /// Each under one of its labels. The namespace is `None` for those of the root namespace.
    entries: HashMap<(Option<Str>, Str, Str), BTreeMap<PolicyKey, Selector>>,
}

impl BySelector {
    fn slot(namespace: Option<&Str>, selector: &Selector) -> Option<(Option<Str>, Str, Str)> {
        let (key, value) = selector.iter().next()?;
        Some((namespace.cloned(), key.clone(), value.clone()))
    }

    pub(super) fn insert(&mut self, namespace: Option<&Str>, selector: &Selector, key: &PolicyKey) {
        if let Some(slot) = Self::slot(namespace, selector) {
            self.entries.entry(slot).or_default().insert(key.clone(), selector.clone());
        }
    }

    pub(super) fn remove(&mut self, namespace: Option<&Str>, selector: &Selector, key: &PolicyKey) {
        let Some(slot) = Self::slot(namespace, selector) else { return };
        if let Some(list) = self.entries.get_mut(&slot) {
            list.remove(key);
            if list.is_empty() {
                self.entries.remove(&slot);
            }
        }
    }

    pub(super) fn attached<'a>(
        &'a self,
        namespace: Option<&'a Str>,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a PolicyKey> {
        let slots = labels.iter().map(move |(k, v)| (namespace.cloned(), k.clone(), v.clone()));
        let candidates = slots.filter_map(|slot| self.entries.get(&slot)).flatten();
        candidates.filter(|(_, selector)| selector.matches(labels)).map(|(key, _)| key)
    }
}

/// A policy and what it was compiled to.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) source: Box<AuthorizationPolicy>,
    pub(super) compiled: Option<Arc<Policy>>,
    /// What waypoints enforce of it.
    pub(super) http: Option<Arc<Policy>>,
}

/// What a workload is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its namespace.
    pub namespace: &'a Str,
    /// Its labels.
    pub labels: &'a Labels,
    /// The Services and ServiceEntries that it is an endpoint of.
    pub behind: &'a [ObjectKey],
    /// The waypoints that it, or a service that it is an endpoint of, is bound to.
    pub waypoints: &'a [&'a Waypoint],
}

/// All policies and the settings.
#[derive(Debug)]
pub struct Policies {
    /// The settings where no resource says others.
    defaults: Settings,
    settings: Settings,
    /// Where settings can come from, the one in force first.
    configs: BTreeMap<ConfigSource, Box<MeshConfig>>,
    /// What namespaces say of connections that stay on a node.
    node_local: Arc<BTreeMap<Str, NodeLocal>>,
    /// ConfigMaps with settings that are not read: another namespace's, or a revision's.
    unread: BTreeSet<ObjectKey>,
    pub(super) authorization: HashMap<PolicyKey, Entry>,
    pub(super) by_selector: BySelector,
    /// Policies for all workloads of a namespace; those of the root namespace, for the mesh, under `None`.
    pub(super) wide: HashMap<Option<Str>, BTreeSet<PolicyKey>>,
    /// Policies for what reaches an object.
    by_target: HashMap<(Str, Target), BTreeSet<PolicyKey>>,
    /// Policies for what passes a waypoint.
    for_waypoints: BTreeMap<PolicyKey, Box<[Target]>>,
    modes: Modes,
    telemetries: Telemetries,
    guards: Guards,
    origin: Origin,
}

/// The ConfigMap goes before objects, and among these the names decide.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum ConfigSource {
    ConfigMap,
    Object(Str),
}

impl ConfigSource {
    /// The source that a key can be; `None` for a ConfigMap that is another.
    fn of(key: &ObjectKey) -> Option<Self> {
        match key.kind {
            Kind::ConfigMap if &*key.namespace == SYSTEM_NAMESPACE && &*key.name == CONFIG_MAP => {
                Some(Self::ConfigMap)
            }
            Kind::MeshConfig => Some(Self::Object(key.name.clone())),
            _ => None,
        }
    }

    fn key(&self) -> ObjectKey {
        match self {
            Self::ConfigMap => ObjectKey {
                kind: Kind::ConfigMap,
                namespace: SYSTEM_NAMESPACE.into(),
                name: CONFIG_MAP.into(),
            },
            Self::Object(name) => {
                ObjectKey { kind: Kind::MeshConfig, namespace: "".into(), name: name.clone() }
            }
        }
    }
}

impl Policies {
    /// No policies; `settings` are in force until a resource says others.
    #[must_use]
    pub fn new(settings: Settings, origin: Origin) -> Self {
        Self {
            modes: Modes::new(settings.root_namespace.clone()),
            defaults: settings.clone(),
            settings,
            configs: BTreeMap::new(),
            node_local: Arc::default(),
            unread: BTreeSet::new(),
            authorization: HashMap::new(),
            by_selector: BySelector::default(),
            wide: HashMap::new(),
            by_target: HashMap::new(),
            for_waypoints: BTreeMap::new(),
            telemetries: Telemetries::default(),
            guards: Guards::default(),
            origin,
        }
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Which namespaces are read; all where there are no selectors, and where [`Origin`] is a directory.
    #[must_use]
    pub fn discovery(&self) -> &[NamespaceSelector] {
        self.config().map_or(&[], MeshConfig::discovery)
    }

    /// The settings in force as they are written; `None` where there are none.
    #[must_use]
    pub fn config(&self) -> Option<&MeshConfig> {
        self.configs.values().next().map(|config| &**config)
    }

    /// Sets or replaces a resource. Resources of other kinds have no effect.
    pub fn set(&mut self, key: &ObjectKey, resource: Resource) -> Effects {
        let mut effects = Effects::default();
        match resource {
            Resource::AuthorizationPolicy(policy) => {
                self.set_authorization(&policy_key(key), Some(policy), &mut effects);
            }
            Resource::PeerAuthentication(policy) => {
                self.modes.set(key, Some(Arc::new(*policy)), &mut effects);
            }
            Resource::Telemetry(telemetry) => self.set_telemetry(key, Some(*telemetry), &mut effects),
            Resource::RequestAuthentication(new) => {
                let root = &self.settings.root_namespace;
                self.guards.set_authentication(&policy_key(key), Some(*new), root, &mut effects);
            }
            Resource::RateLimit(new) => {
                let root = &self.settings.root_namespace;
                self.guards.set_limit(&policy_key(key), Some(*new), root, &mut effects);
            }
            Resource::MeshConfig(config) => self.set_config(key, Some(config), &mut effects),
            Resource::ConfigMap(config) => self.set_config(key, config, &mut effects),
            _ => {}
        }
        effects
    }

    /// Removes a resource.
    pub fn remove(&mut self, key: &ObjectKey) -> Effects {
        let mut effects = Effects::default();
        match key.kind {
            Kind::AuthorizationPolicy => self.set_authorization(&policy_key(key), None, &mut effects),
            Kind::PeerAuthentication => self.modes.set(key, None, &mut effects),
            Kind::Telemetry => self.set_telemetry(key, None, &mut effects),
            Kind::RequestAuthentication => {
                let root = &self.settings.root_namespace;
                self.guards.set_authentication(&policy_key(key), None, root, &mut effects);
            }
            Kind::RateLimit => {
                let root = &self.settings.root_namespace;
                self.guards.set_limit(&policy_key(key), None, root, &mut effects);
            }
            Kind::MeshConfig | Kind::ConfigMap => self.set_config(key, None, &mut effects),
            _ => {}
        }
        effects
    }

    /// What is told of the requests to what an object defines, behind its waypoint.
    #[must_use]
    pub fn telemetry(&self, object: &ObjectKey, waypoint: &Waypoint) -> Arc<model::telemetry::Telemetry> {
        self.telemetries.of(object, waypoint, &self.settings.root_namespace, self.config())
    }

    fn set_telemetry(&mut self, key: &ObjectKey, telemetry: Option<Telemetry>, effects: &mut Effects) {
        self.telemetries.set(key, telemetry, &self.settings.root_namespace, effects);
        effects.findings.push((key.clone(), self.telemetries.about(key, self.config())));
    }

    /// The RequestAuthentications for what reaches an object through its waypoint, without those that select workloads
    /// behind it.
    #[must_use]
    pub fn authentications(&self, object: &ObjectKey, waypoint: &Waypoint) -> Vec<PolicyKey> {
        self.guards.authentications(object, waypoint, &self.settings.root_namespace)
    }

    /// The RequestAuthentications that select a workload by its labels, sorted.
    #[must_use]
    pub fn authenticating(&self, namespace: &Str, labels: &Labels) -> Vec<PolicyKey> {
        self.guards.authenticating(namespace, labels)
    }

    /// The RateLimits for what reaches an object through its waypoint, sorted.
    #[must_use]
    pub fn rate_limits(&self, object: &ObjectKey, waypoint: &Waypoint) -> Vec<PolicyKey> {
        self.guards.limits(object, waypoint, &self.settings.root_namespace)
    }

    /// The policies that a workload lists, sorted: those that select it, those for what it is behind, and the one
    /// that enforces its mode.
    #[must_use]
    pub fn attached(&self, subject: &Subject<'_>) -> Vec<PolicyKey> {
        let mut keys = self.listed(subject.namespace, subject.labels);
        keys.extend(self.targeting(subject.behind, subject.waypoints));
        keys.extend(self.modes.attached(subject.namespace, subject.labels));
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The AuthorizationPolicies for these Services and ServiceEntries, and for these waypoints, sorted.
    #[must_use]
    pub fn targeting(&self, behind: &[ObjectKey], waypoints: &[&Waypoint]) -> Vec<PolicyKey> {
        let mut keys = Vec::new();
        if !self.by_target.is_empty() {
            for object in behind {
                let target = Target::of(object).map(|t| (object.namespace.clone(), t));
                keys.extend(target.and_then(|t| self.by_target.get(&t)).into_iter().flatten().cloned());
            }
        }
        for (key, targets) in &self.for_waypoints {
            let meant = |w: &&Waypoint| targets.iter().any(|t| w.is_target(&key.namespace, t));
            keys.extend(waypoints.iter().any(meant).then(|| key.clone()));
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// The AuthorizationPolicies that a workload lists for its labels and its namespace: those that select it, and of
    /// those for all the ones that ask for requests, which are not the same for all.
    #[must_use]
    pub fn listed(&self, namespace: &Str, labels: &Labels) -> Vec<PolicyKey> {
        let own = self.by_selector.attached(Some(namespace), labels);
        let mut keys: Vec<PolicyKey> = own.chain(self.by_selector.attached(None, labels)).cloned().collect();
        for namespace in [Some(namespace.clone()), None] {
            let wide = self.wide.get(&namespace).into_iter().flatten();
            keys.extend(wide.filter(|key| self.is_halved(key)).cloned());
        }
        keys
    }

    /// Whether a policy in force is for what reaches an object, or passes its waypoint.
    #[must_use]
    pub fn guards(&self, object: &ObjectKey, waypoint: Option<&Waypoint>) -> bool {
        let enforced = |key: &PolicyKey| {
            let compiled = self.authorization.get(key).and_then(|e| e.compiled.as_ref());
            compiled.is_some_and(|policy| !policy.dry_run)
        };
        let target = Target::of(object).and_then(|t| self.by_target.get(&(object.namespace.clone(), t)));
        let meant = |key: &PolicyKey, targets: &[Target]| {
            waypoint.is_some_and(|w| targets.iter().any(|t| w.is_target(&key.namespace, t)))
        };
        let through = self.for_waypoints.iter().filter(|(key, targets)| meant(key, targets));
        target.into_iter().flatten().chain(through.map(|(key, _)| key)).any(enforced)
    }

    /// What a resource of the policies' kinds names by `targetRefs`; `None` if it names nothing so.
    pub(crate) fn targets_of(&self, key: &ObjectKey) -> Option<&[Target]> {
        match key.kind {
            Kind::AuthorizationPolicy => self.authorization.get(&policy_key(key))?.source.scope.targets(),
            Kind::Telemetry => self.telemetries.targets_of(key),
            kind => self.guards.targets_of(kind, &policy_key(key)),
        }
    }

    /// The policies, and what else is attached so, that name a Service or ServiceEntry.
    pub(crate) fn naming(&self, object: &ObjectKey) -> impl Iterator<Item = ObjectKey> {
        let own = Target::of(object);
        let target = own.clone().and_then(|t| self.by_target.get(&(object.namespace.clone(), t)));
        let namespace = object.namespace.clone();
        let told = move |by: &Str, target: &Target| *by == namespace && Some(target) == own.as_ref();
        let policies = target.into_iter().flatten().map(object_key);
        policies.chain(self.guards.naming(object)).chain(self.telemetries.naming(told))
    }

    /// The same that name a waypoint.
    pub(crate) fn for_waypoint(&self, waypoint: &Waypoint) -> impl Iterator<Item = ObjectKey> {
        let meant = move |key: &PolicyKey, targets: &[Target]| {
            targets.iter().any(|target| waypoint.is_target(&key.namespace, target))
        };
        let all = self.for_waypoints.iter().filter(move |(key, targets)| meant(key, targets));
        let told = |by: &Str, target: &Target| waypoint.is_target(by, target);
        let policies = all.map(|(key, _)| object_key(key));
        policies.chain(self.guards.for_waypoint(waypoint)).chain(self.telemetries.naming(told))
    }

    /// What to say of a policy in the light of all that there is.
    #[must_use]
    pub fn review(&self, key: &ObjectKey, world: &dyn World) -> Vec<Finding> {
        match key.kind {
            Kind::AuthorizationPolicy => {
                let policy = self.authorization.get(&policy_key(key)).map(|e| &*e.source);
                let root = self.is_root(&key.namespace);
                policy.map(|p| review::authorization(p, key, root, world)).unwrap_or_default()
            }
            Kind::PeerAuthentication => {
                // With a selector it is for its own namespace, even if that is the root namespace.
                let root = self.is_root(&key.namespace);
                let selector = self.modes.selector_of(key);
                selector.map(|s| review::selection(s, key, root && s.is_none(), world)).unwrap_or_default()
            }
            Kind::MeshConfig | Kind::ConfigMap => {
                let source =
                    ConfigSource::of(key).filter(|source| self.configs.keys().next() == Some(source));
                let config = source.and_then(|source| self.configs.get(&source));
                config.map(|config| config.providers().review(world)).unwrap_or_default()
            }
            Kind::RateLimit => {
                let limit = self.guards.limit(&policy_key(key));
                limit.map(|limit| limit.review(world)).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    fn is_root(&self, namespace: &str) -> bool {
        namespace == &*self.settings.root_namespace
    }

    fn set_authorization(
        &mut self,
        key: &PolicyKey,
        policy: Option<Box<AuthorizationPolicy>>,
        effects: &mut Effects,
    ) {
        let old = self.authorization.remove(key);
        let new = policy.map(|source| self.entry(key, source));
        let http = |entry: Option<&Entry>| entry.and_then(|e| e.http.clone());
        let before = old.as_ref().and_then(|e| e.compiled.as_ref());
        let after = new.as_ref().and_then(|e| e.compiled.as_ref());
        if before != after {
            effects.changes.extend(match after {
                Some(policy) => Some(Change::SetPolicy(policy.clone())),
                None => before.map(|_| Change::RemovePolicy(key.clone())),
            });
        }
        effects.changes.extend(http_change(key, http(old.as_ref()).as_ref(), http(new.as_ref())));
        // Who lists it: only changes of that touch workloads.
        let scope = |entry: Option<&Entry>| {
            // What is external is closed by policies in force only, and lists none.
            let trial = |e: &Entry| matches!(e.source.scope, PolicyScope::Targets(_)) && e.source.dry_run;
            entry.filter(|e| e.compiled.is_some()).map(|e| (e.source.scope.clone(), trial(e), e.is_halved()))
        };
        let kind = |entry: Option<&Entry>| entry.map(|e| (e.source.action, e.source.dry_run));
        let (before, after) = (scope(old.as_ref()), scope(new.as_ref()));
        if before != after {
            if let Some((scope, _, halved)) = &before {
                self.unindex(key, scope);
                self.affect(key, scope, *halved, effects);
            }
            if let Some((scope, _, halved)) = &after {
                self.index(key, scope);
                self.affect(key, scope, *halved, effects);
            }
        }
        if before != after || kind(old.as_ref()) != kind(new.as_ref()) {
            let namespace = (!self.is_root(&key.namespace)).then(|| key.namespace.clone());
            effects.affected.push(Affected::Covered(namespace));
        }
        if new.as_ref().is_some_and(Entry::has_halves) {
            effects.affected.push(Affected::Rewritten(key.clone()));
        }
        effects.findings.push((object_key(key), self.about(key, new.as_ref())));
        self.authorization.extend(new.map(|entry| (key.clone(), entry)));
    }

    /// What to say of a policy in the light of the settings.
    fn about(&self, key: &PolicyKey, entry: Option<&Entry>) -> Vec<Finding> {
        let provider = entry.and_then(|e| e.source.provider.as_deref());
        let nothing = Providers::default();
        let providers = self.config().map_or(&nothing, MeshConfig::providers);
        let mut findings = self.misplaced(key, entry);
        findings.extend(provider.and_then(|name| providers.for_custom(name)));
        findings
    }

    /// A policy for a GatewayClass is for the whole mesh, and holds in the root namespace only, as in Istio.
    fn misplaced(&self, key: &PolicyKey, entry: Option<&Entry>) -> Vec<Finding> {
        let scope = entry.filter(|e| e.compiled.is_some()).map(|e| &e.source.scope);
        let Some(PolicyScope::Targets(targets)) = scope else { return Vec::new() };
        if self.is_root(&key.namespace) || targets.iter().all(|t| t.kind != TargetKind::GatewayClass) {
            return Vec::new();
        }
        let root = &self.settings.root_namespace;
        vec![Finding {
            code: Code::WithoutEffect,
            message: format!("a policy for a GatewayClass has an effect in the namespace {root} only"),
            remedy: "move it there, or refer to a Gateway".to_owned(),
        }]
    }

    fn entry(&self, key: &PolicyKey, source: Box<AuthorizationPolicy>) -> Entry {
        let domains = &self.settings.trust_domains;
        let compiled = l4::compile(key.clone(), &source, self.is_root(&key.namespace), domains);
        let http = l7::compile(key.clone(), &source, domains);
        Entry { source, compiled, http }
    }

    /// The policies for what reaches an object through its waypoint, sorted.
    #[must_use]
    pub fn through(&self, object: &ObjectKey, waypoint: &Waypoint) -> Vec<PolicyKey> {
        let target = Target::of(object).map(|target| (object.namespace.clone(), target));
        let own = target.and_then(|target| self.by_target.get(&target)).into_iter().flatten();
        let meant = |key: &&PolicyKey, targets: &[Target]| {
            targets.iter().any(|target| waypoint.is_target(&key.namespace, target))
        };
        let all = self.for_waypoints.iter().filter(|(key, targets)| meant(key, targets)).map(|(key, _)| key);
        let mut keys: Vec<PolicyKey> = own.chain(all).cloned().collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    fn index(&mut self, key: &PolicyKey, scope: &PolicyScope) {
        match scope {
            PolicyScope::Namespace => {
                let namespace = (!self.is_root(&key.namespace)).then(|| key.namespace.clone());
                self.wide.entry(namespace).or_default().insert(key.clone());
            }
            PolicyScope::Selector(selector) => {
                let namespace = (!self.is_root(&key.namespace)).then_some(&key.namespace);
                self.by_selector.insert(namespace, selector, key);
            }
            PolicyScope::Targets(targets) => {
                for target in targets.iter().filter(|t| !t.is_gateway()) {
                    let slot = (key.namespace.clone(), target.clone());
                    self.by_target.entry(slot).or_default().insert(key.clone());
                }
                let root = self.is_root(&key.namespace);
                let counts = |t: &&Target| t.kind == TargetKind::Gateway || (root && t.is_gateway());
                let gateways: Box<[Target]> = targets.iter().filter(counts).cloned().collect();
                if !gateways.is_empty() {
                    self.for_waypoints.insert(key.clone(), gateways);
                }
            }
        }
    }

    fn unindex(&mut self, key: &PolicyKey, scope: &PolicyScope) {
        match scope {
            PolicyScope::Namespace => {
                let namespace = (!self.is_root(&key.namespace)).then(|| key.namespace.clone());
                if let Some(keys) = self.wide.get_mut(&namespace) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.wide.remove(&namespace);
                    }
                }
            }
            PolicyScope::Selector(selector) => {
                let namespace = (!self.is_root(&key.namespace)).then_some(&key.namespace);
                self.by_selector.remove(namespace, selector, key);
            }
            PolicyScope::Targets(targets) => {
                self.for_waypoints.remove(key);
                for target in targets {
                    let slot = (key.namespace.clone(), target.clone());
                    if let Some(keys) = self.by_target.get_mut(&slot) {
                        keys.remove(key);
                        if keys.is_empty() {
                            self.by_target.remove(&slot);
                        }
                    }
                }
            }
        }
    }

    fn affect(&self, key: &PolicyKey, scope: &PolicyScope, halved: bool, effects: &mut Effects) {
        match scope {
            // Found by its scope, not listed by workloads.
            PolicyScope::Namespace if !halved => {}
            PolicyScope::Namespace if self.is_root(&key.namespace) => effects.affected.push(Affected::Mesh),
            PolicyScope::Namespace => effects.affected.push(Affected::Namespace(key.namespace.clone())),
            PolicyScope::Selector(selector) if self.is_root(&key.namespace) => {
                effects.affected.push(Affected::SelectedAnywhere(selector.clone()));
            }
            PolicyScope::Selector(selector) => {
                effects.affected.push(Affected::Selected(key.namespace.clone(), selector.clone()));
            }
            PolicyScope::Targets(targets) => {
                effects.affected.extend(targets.iter().map(|target| match target.object(&key.namespace) {
                    Some(object) => Affected::Behind(object),
                    None => Affected::Bound(key.namespace.clone(), target.clone()),
                }));
            }
        }
    }

    fn set_config(&mut self, key: &ObjectKey, config: Option<Box<MeshConfig>>, effects: &mut Effects) {
        effects.findings.push((key.clone(), Vec::new()));
        let Some(source) = ConfigSource::of(key) else {
            match config {
                Some(_) => self.unread.insert(key.clone()),
                None => self.unread.remove(key),
            };
            self.say_unread(effects);
            return;
        };
        let providers = self.config().map(MeshConfig::providers).cloned();
        let told = self.config().cloned().unwrap_or_default();
        match config {
            Some(config) => self.configs.insert(source, config),
            None => self.configs.remove(&source),
        };
        if providers.as_ref() != self.config().map(MeshConfig::providers) {
            let nothing = Providers::default();
            let (old, new) =
                (providers.as_ref().unwrap_or(&nothing), self.config().map(MeshConfig::providers));
            effects.changes.extend(old.authorizer_changes(new.unwrap_or(&nothing)));
            let named = self.authorization.iter().filter(|(_, entry)| entry.source.provider.is_some());
            let said = named.map(|(key, entry)| (object_key(key), self.about(key, Some(entry))));
            effects.findings.extend(said.collect::<Vec<_>>());
        }
        if !self.config().unwrap_or(&MeshConfig::default()).tells_like(&told) {
            effects.affected.push(Affected::Services(None));
            effects.findings.extend(self.telemetries.about_all(self.config()));
        }
        if self.config().and_then(MeshConfig::retries) != told.retries() {
            effects.affected.push(Affected::Services(None));
        }
        let mut sources = self.configs.keys();
        if let Some(first) = sources.next() {
            let ignored = self.origin == Origin::Files && !self.discovery().is_empty();
            effects
                .findings
                .push((first.key(), ignored.then(discovery::without_effect).into_iter().collect()));
            for other in sources {
                effects.findings.push((other.key(), vec![overridden(first)]));
            }
        }
        self.say_unread(effects);
        self.follow_settings(effects);
    }

    /// Sets what a namespace says of connections that stay on a node.
    pub fn set_node_local(&mut self, namespace: &Str, mode: Option<NodeLocal>) -> Effects {
        let mut effects = Effects::default();
        if self.node_local.get(namespace).copied() != mode {
            let modes = Arc::make_mut(&mut self.node_local);
            match mode {
                Some(mode) => modes.insert(namespace.clone(), mode),
                None => modes.remove(namespace),
            };
            self.follow_settings(&mut effects);
        }
        effects
    }

    fn follow_settings(&mut self, effects: &mut Effects) {
        let config = self.configs.first_key_value().map(|(_, config)| config.settings(&self.defaults));
        let mut settings = config.unwrap_or_else(|| self.defaults.clone());
        settings.node_local.namespaces = self.node_local.clone();
        self.set_settings(settings, effects);
    }

    /// Says of settings that stand where they are not read what holds instead.
    fn say_unread(&self, effects: &mut Effects) {
        for key in &self.unread {
            let finding = match self.configs.keys().next() {
                Some(first) => overridden(first),
                None => Finding {
                    code: Code::SettingsUnread,
                    message: format!(
                        "these settings of the mesh are not read, and there are no others: the trust domain is {}, the \
                         root namespace {}, and what the mesh does not know is passed through",
                        self.defaults.trust_domains.own, self.defaults.root_namespace
                    ),
                    remedy: format!(
                        "name the ConfigMap {CONFIG_MAP} in the namespace {SYSTEM_NAMESPACE}, or make a MeshConfig of it"
                    ),
                },
            };
            effects.findings.push((key.clone(), vec![finding]));
        }
    }

    fn set_settings(&mut self, settings: Settings, effects: &mut Effects) {
        if self.settings == settings {
            return;
        }
        effects.changes.push(Change::SetSettings(settings.clone().into()));
        let domains_changed = self.settings.trust_domains != settings.trust_domains;
        let root_changed = self.settings.root_namespace != settings.root_namespace;
        if !domains_changed && !root_changed {
            self.settings = settings;
            return;
        }
        // Rare: everything is made again.
        let all: Vec<(PolicyKey, Entry)> = self.authorization.drain().collect();
        for (key, entry) in all.iter().filter(|(_, e)| e.compiled.is_some()) {
            self.unindex(key, &entry.source.scope);
        }
        self.settings = settings;
        for (key, entry) in all {
            let old = (entry.compiled, entry.http);
            let entry = self.entry(&key, entry.source);
            if entry.compiled != old.0 {
                effects.changes.extend(entry.compiled.clone().map(Change::SetPolicy));
            }
            effects.changes.extend(http_change(&key, old.1.as_ref(), entry.http.clone()));
            if entry.compiled.is_some() {
                self.index(&key, &entry.source.scope);
            }
            effects.findings.push((object_key(&key), self.about(&key, Some(&entry))));
            if matches!(entry.source.scope, PolicyScope::Targets(_)) {
                self.affect(&key, &entry.source.scope, false, effects);
            }
            effects.affected.push(Affected::Rewritten(key.clone()));
            self.authorization.insert(key, entry);
        }
        if root_changed {
            self.guards.set_root(&self.settings.root_namespace, effects);
            self.telemetries.set_root(effects);
            self.modes.set_root(self.settings.root_namespace.clone(), effects);
        }
        effects.affected.push(Affected::Mesh);
        effects.affected.push(Affected::Covered(None));
    }
}

/// The change from one form for waypoints to another.
fn http_change(key: &PolicyKey, old: Option<&Arc<Policy>>, new: Option<Arc<Policy>>) -> Option<Change> {
    match new {
        _ if old == new.as_ref() => None,
        Some(policy) => Some(Change::SetHttpPolicy(policy)),
        None => Some(Change::RemoveHttpPolicy(key.clone())),
    }
}

fn overridden(first: &ConfigSource) -> Finding {
    Finding {
        code: Code::WithoutEffect,
        message: format!("has no effect: the settings are those of {}", first.key().resource_name()),
        remedy: "keep one of them".to_owned(),
    }
}

fn object_key(key: &PolicyKey) -> ObjectKey {
    let (namespace, name) = (key.namespace.clone(), key.name.clone());
    ObjectKey { kind: Kind::AuthorizationPolicy, namespace, name }
}

fn policy_key(key: &ObjectKey) -> PolicyKey {
    PolicyKey { namespace: key.namespace.clone(), name: key.name.clone() }
}
