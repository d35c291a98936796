//! What is known of the cluster, compiled: takes the source's events, decides which objects are read, and gives what
//! follows for the proxies to [`crate::push`].
//!
//! * Events are taken together until there are none for a moment, and at most for [`LONGEST`]: one commit each.
//! * Nothing is given out before the first complete lists of all kinds, and before the mesh's settings could be read:
//!   what a proxy is told is all that there is.
//! * Of the kinds of custom resources an object labelled `istio.io/rev` is read by the control plane of that revision only,
//!   or of the one that has the name as a tag.
//! * Where the settings have `discoverySelectors`, objects of other namespaces are as if they were not there. When a
//!   namespace becomes selected, the kinds are listed again: what is not read is not kept either. Nothing is given out
//!   until the policies are listed.

mod report;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use config::compile::Options;
use config::diagnostic::ResourceName;
use config::diagnostic::{Code, Diagnostic, Severity};
use config::json::Decoded;
use config::policy::NamespaceSelector;
use config::repository::{ObjectContent, Outcome, Repository};
use config::resource::Kind;
use config::tree::{self, Entry, Limits, Node, Position, Value};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

pub(crate) use self::report::is_route;
pub use self::report::{ObjectName, ObjectState, ObjectVersion, Report, Standing};
use self::report::{is_reported, version};
use crate::alive::Nodes;
use crate::gateways::Gateways;
use crate::in_force::InForce;
pub use crate::objects::OTHERS;
use crate::pods::PodTable;
use crate::source::{Change, Event, Feed};

/// How long there must be no event before a commit.
const SETTLE: Duration = Duration::from_millis(5);
/// How long a commit may be put off.
const LONGEST: Duration = Duration::from_millis(50);
/// How long the cluster's first lists are waited for before it is said which are missing.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a commit came to.
#[derive(Debug)]
pub struct Committed {
    /// Steps of the model.
    pub changes: Vec<model::Change>,
    /// When the first of the events came.
    pub since: Instant,
    /// Whether these are the first: from now on proxies may be told.
    pub first: bool,
    /// Objects of istio.io whose status may have to say something else.
    pub reports: Vec<Report>,
}

/// What the registry tells the rest of the process, beside what it commits.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Overview {
    /// How many objects of each kind are known.
    pub objects: BTreeMap<&'static str, usize>,
    /// Kinds whose first list is not there yet.
    pub missing: Vec<&'static str>,
    /// Why nothing is given out yet; empty when it is.
    pub waiting: String,
    /// Times that something was found to have errors.
    pub rejected: u64,
    /// Commits so far.
    pub commits: u64,
    /// Of these, how many had changes of a type: `endpoint`, `service`, `config` or `global`.
    pub triggers: BTreeMap<&'static str, u64>,
    /// Objects, instances and services looked at so far.
    pub steps: u64,
}

/// What the registry needs to be told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For the compiler.
    pub options: Options,
    /// Namespace and name of the ConfigMap with the mesh's settings.
    pub settings: (String, String),
    /// The revision that this control plane is.
    pub revision: String,
    /// Namespaces that are read whatever the settings select: of the mesh's own pods.
    pub own_namespaces: BTreeSet<String>,
    /// Whether the defaults hold where the ConfigMap is missing at the start; nothing is given out otherwise.
    pub settings_optional: bool,
}

/// An object that is read.
struct Known {
    origin: Arc<str>,
    /// The list that last had it.
    listed: u64,
    version: Option<ObjectVersion>,
    /// Of a route.
    parents: Box<[Arc<serde_json::Value>]>,
}

/// The key of the settings' ConfigMap that lists the tags of this revision, with commas; `culvert tag` writes it.
const TAGS: &str = "revisionTags";

/// The objects of a kind.
#[derive(Default)]
struct OfKind {
    known: HashMap<(Arc<str>, Arc<str>), Known>,
    /// Counts the lists.
    lists: u64,
    complete: bool,
    /// The server has the kind.
    served: bool,
    /// A list must begin before one can complete what was asked for anew.
    asked: bool,
}

/// Kinds that restrict: of what is read anew, nothing is given out before these.
const RESTRICTING: [Kind; 4] =
    [Kind::AuthorizationPolicy, Kind::PeerAuthentication, Kind::RequestAuthentication, Kind::RateLimit];

/// See the module's documentation.
pub struct Registry {
    settings: Settings,
    repository: Repository,
    kinds: HashMap<Kind, OfKind>,
    /// Labels of the namespaces.
    namespaces: HashMap<Arc<str>, Vec<(String, String)>>,
    /// Names that many objects have.
    names: HashSet<Arc<str>>,
    /// Which origins are of objects that are reported on.
    reported: HashMap<Arc<str>, ObjectName>,
    /// Names of revisions that mean this one at present (`istio.io/rev` of objects may say them).
    tags: BTreeSet<String>,
    relist: watch::Sender<u64>,
    /// Tells that namespaces and settings are known, so that the others may be watched.
    others: Option<Box<dyn FnOnce() + Send>>,
    overview: Arc<std::sync::Mutex<Overview>>,
    pods: PodTable,
    nodes: Nodes,
    gateways: Gateways,
    in_force: watch::Sender<InForce>,
    /// The namespaces that are read, and whether they may have changed.
    selected: watch::Sender<Arc<BTreeSet<String>>>,
    reselect: bool,
    /// Which namespaces were read until the last commit.
    selectors: Vec<NamespaceSelector>,
    rejected: u64,
    gone: Vec<ObjectName>,
    /// Services that are bound to waypoints.
    bound: report::Bound,
    /// What followed from the settings, before anything else was known.
    early: Vec<model::Change>,
    given_out: bool,
    /// The error in the settings that was said last.
    said: Option<String>,
    commits: u64,
    triggers: BTreeMap<&'static str, u64>,
}

impl Registry {
    /// A registry that knows nothing. `others` is called once, when the kinds of [`OTHERS`] may be watched.
    #[must_use]
    pub fn new(settings: Settings, relist: watch::Sender<u64>, others: Box<dyn FnOnce() + Send>) -> Self {
        let mut kinds: HashMap<Kind, OfKind> = OTHERS.into_iter().map(|k| (k, OfKind::default())).collect();
        kinds.extend([Kind::Namespace, Kind::ConfigMap].map(|kind| (kind, OfKind::default())));
        Self {
            repository: Repository::new(settings.options.clone()),
            settings,
            kinds,
            namespaces: HashMap::new(),
            names: HashSet::new(),
            reported: HashMap::new(),
            tags: BTreeSet::new(),
            relist,
            others: Some(others),
            overview: Arc::default(),
            pods: PodTable::default(),
            nodes: Nodes::default(),
            gateways: Gateways::default(),
            in_force: watch::Sender::default(),
            selected: watch::Sender::new(Arc::default()),
            reselect: false,
            selectors: Vec::new(),
            rejected: 0,
            gone: Vec::new(),
            bound: report::Bound::default(),
            early: Vec::new(),
            given_out: false,
            said: None,
            commits: 0,
            triggers: BTreeMap::new(),
        }
    }

    /// What is known, as a view that stays up to date.
    #[must_use]
    pub fn overview(&self) -> Arc<std::sync::Mutex<Overview>> {
        self.overview.clone()
    }

    /// The pods, as a view that stays up to date.
    #[must_use]
    pub fn pods(&self) -> PodTable {
        self.pods.clone()
    }

    /// The nodes, as a view that stays up to date.
    #[must_use]
    pub fn nodes(&self) -> Nodes {
        self.nodes.clone()
    }

    /// Fills `gateways` in from now on.
    #[must_use]
    pub fn telling(self, gateways: Gateways) -> Self {
        Self { gateways, ..self }
    }

    /// The namespaces that are read, as a view that stays up to date.
    #[must_use]
    pub fn namespaces(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.selected.subscribe()
    }

    /// The settings in force, as a view that stays up to date.
    #[must_use]
    pub fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force.subscribe()
    }

    /// What was read.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Takes events until there is no more source. `out` is called after each commit.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        asks: &mut mpsc::Receiver<Ask>,
        mut out: impl FnMut(Committed),
    ) {
        let mut patience = Instant::now() + PATIENCE;
        loop {
            let first = tokio::select! {
                event = events.recv() => event,
                Some(ask) = asks.recv() => {
                    ask(&self);
                    continue;
                }
                () = tokio::time::sleep_until(patience), if !self.given_out => {
                    patience = Instant::now() + PATIENCE;
                    tracing::warn!(waiting = self.waiting(), "the mesh is not served yet");
                    continue;
                }
            };
            let Some(first) = first else { return };
            let since = first.at;
            self.take(first);
            let latest = Instant::now() + LONGEST;
            while let Ok(Some(event)) = timeout_at((Instant::now() + SETTLE).min(latest), events.recv()).await
            {
                self.take(event);
                if Instant::now() >= latest {
                    break;
                }
            }
            if let Some(committed) = self.commit(since) {
                out(committed);
            }
        }
    }

    /// Takes an event.
    pub fn take(&mut self, event: Event) {
        let kind = event.kind;
        match event.change {
            Change::Set(decoded) => self.set(kind, &decoded),
            Change::Gone { namespace, name } => self.remove(kind, &namespace, &name),
            Change::Listing => {
                if let Some(of_kind) = self.kinds.get_mut(&kind) {
                    of_kind.lists += 1;
                    of_kind.served = true;
                    of_kind.asked = false;
                }
            }
            Change::Listed => self.listed(kind),
            Change::NotServed => {
                if let Some(of_kind) = self.kinds.get_mut(&kind) {
                    (of_kind.complete, of_kind.served, of_kind.asked) = (true, false, false);
                }
            }
            Change::KindDeleted => self.delete_kind(kind),
        }
    }

    /// Compiles what was taken. `None` while nothing may be given out.
    pub fn commit(&mut self, since: Instant) -> Option<Committed> {
        if !self.may_commit() {
            self.note();
            return None;
        }
        let outcome = self.compile();
        if self.selectors != self.repository.discovery() {
            self.select_anew();
        }
        if std::mem::take(&mut self.reselect) {
            self.tell_namespaces();
        }
        if self.names.len() > 2 * self.namespaces.len() + 4096 {
            self.names.retain(|name| Arc::strong_count(name) > 1);
        }
        let (gone, bound) = (std::mem::take(&mut self.gone), &mut self.bound);
        let gone = gone.into_iter().filter(|name| bound.ends(name));
        let mut reports: Vec<Report> = gone.map(|name| Report { name, state: None }).collect();
        reports.extend(outcome.touched.iter().filter_map(|origin| self.report(origin)));
        let first = !std::mem::replace(&mut self.given_out, true);
        if first {
            self.pods.set_ready();
        }
        self.commits += 1;
        let mut changes = std::mem::take(&mut self.early);
        changes.extend(outcome.changes);
        for trigger in changes.iter().map(trigger).collect::<BTreeSet<_>>() {
            *self.triggers.entry(trigger).or_default() += 1;
        }
        self.note();
        Some(Committed { changes, since, first, reports })
    }

    fn compile(&mut self) -> Outcome {
        let outcome = self.repository.commit();
        let waypoints = self.repository.standing().waypoints();
        self.gateways.set(waypoints.map(|w| (w.namespace.clone(), w.name.clone())));
        let settings = self.repository.mesh_config();
        self.in_force.send_if_modified(|in_force| in_force.update(settings, &self.tags));
        for diagnostic in &outcome.diagnostics {
            match diagnostic.severity {
                Severity::Error => {
                    self.rejected += 1;
                    tracing::error!("{diagnostic}");
                }
                Severity::Warning => tracing::warn!("{diagnostic}"),
                Severity::Info => tracing::debug!("{diagnostic}"),
            }
        }
        outcome
    }

    fn report(&mut self, origin: &Arc<str>) -> Option<Report> {
        let name = self.reported.get(origin)?;
        let known = self.kinds.get(&name.kind)?;
        let known = known.known.get(&(name.namespace.clone(), name.name.clone()))?;
        let (version, findings) = (known.version.clone()?, self.repository.about(origin));
        let mut standing = report::standing(name, &known.parents, &self.repository);
        let told = self.bound.is_told(name, &mut standing);
        let state = Some(ObjectState { version, findings, standing });
        told.then(|| Report { name: name.clone(), state })
    }

    /// Why nothing is given out yet.
    fn waiting(&self) -> String {
        let missing = self.missing();
        if !missing.is_empty() {
            return format!("the API server has not listed: {}", missing.join(", "));
        }
        match self.bad_settings() {
            Some(diagnostic) if !self.given_out => {
                format!("the mesh's settings have errors, and none are known from before: {diagnostic}")
            }
            _ => String::new(),
        }
    }

    fn missing(&self) -> Vec<&'static str> {
        let mut missing: Vec<_> =
            self.kinds.iter().filter(|(_, k)| !k.complete).map(|(kind, _)| kind.name()).collect();
        missing.sort_unstable();
        missing
    }

    fn bad_settings(&self) -> Option<Diagnostic> {
        let about = self.repository.about(&self.settings_origin());
        about.into_iter().find(|d| d.severity == Severity::Error)
    }

    fn settings_origin(&self) -> Arc<str> {
        let (namespace, name) = &self.settings.settings;
        format!("ConfigMap {namespace}/{name}, key mesh").into()
    }

    fn may_commit(&mut self) -> bool {
        if self.given_out {
            return self.kinds.values().all(|k| k.complete);
        }
        let complete = |kind: &Kind| self.kinds.get(kind).is_some_and(|k| k.complete);
        if self.others.is_some() && complete(&Kind::Namespace) && complete(&Kind::ConfigMap) {
            if self.bad_settings().is_some() {
                return false;
            }
            // What the settings say has to be in force before objects are looked at.
            self.early = self.compile().changes;
            self.selectors = self.repository.discovery().to_vec();
            if let Some(others) = self.others.take() {
                others();
            }
        }
        self.others.is_none() && self.kinds.values().all(|k| k.complete) && self.bad_settings().is_none()
    }

    fn note(&mut self) {
        let waiting = self.waiting();
        if let Some(bad) = self.bad_settings().filter(|_| !self.given_out) {
            let said = bad.to_string();
            if self.said.as_ref() != Some(&said) {
                tracing::error!("{said}\n    = the mesh is not served until its settings can be read");
                self.said = Some(said);
            }
        }
        let mut overview = self.overview.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        overview.objects = self.kinds.iter().map(|(kind, k)| (kind.name(), k.known.len())).collect();
        overview.missing = self.missing();
        overview.rejected = self.rejected;
        overview.waiting = waiting;
        overview.commits = self.commits;
        overview.triggers.clone_from(&self.triggers);
        overview.steps = self.repository.steps();
    }

    fn name(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.names.get(text) {
            return known.clone();
        }
        let name: Arc<str> = text.into();
        self.names.insert(name.clone());
        name
    }

    fn set(&mut self, kind: Kind, decoded: &Decoded) {
        let (namespace, name) = (decoded.metadata("namespace"), decoded.metadata("name"));
        if !self.is_read(kind, decoded) {
            self.remove(kind, namespace, name);
            return;
        }
        let namespace = self.name(namespace);
        let name: Arc<str> = name.into();
        match kind {
            Kind::Namespace => self.set_namespace(&name, decoded),
            Kind::Pod => self.pods.set(&namespace, &name, decoded),
            Kind::Node => self.nodes.set(&name, decoded),
            _ => {}
        }
        let version = is_reported(kind).then(|| version(decoded));
        let Some(of_kind) = self.kinds.get_mut(&kind) else { return };
        let listed = of_kind.lists;
        let known = of_kind.known.entry((namespace.clone(), name.clone())).or_insert_with(|| Known {
            origin: origin(kind, &namespace, &name),
            listed,
            version: None,
            parents: Box::default(),
        });
        known.listed = listed;
        known.version.clone_from(&version);
        known.parents = report::parents(kind, decoded);
        let origin = known.origin.clone();
        if version.is_some() {
            let name = ObjectName { kind, namespace, name };
            self.reported.entry(origin.clone()).or_insert(name);
        }
        if kind == Kind::ConfigMap {
            self.stage_settings(decoded);
            return;
        }
        let version = &decoded.bookkeeping.resource_version;
        self.repository.stage_object(&origin, ObjectContent::Node { node: &decoded.node, version, text: "" });
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        if kind == Kind::Namespace {
            self.namespaces.remove(name);
            self.reselect = true;
        }
        let key = (self.name(namespace), Arc::from(name));
        let Some(known) = self.kinds.get_mut(&kind).and_then(|k| k.known.remove(&key)) else { return };
        match kind {
            Kind::Namespace => self.pods.set_namespace(&key.1, false),
            Kind::Pod => self.pods.remove(&key.0, &key.1),
            Kind::Node => self.nodes.remove(name),
            _ => {}
        }
        if kind == Kind::ConfigMap {
            // The defaults could be weaker than what was asked for, and of another trust domain.
            let (namespace, name) = &self.settings.settings;
            let reason = format!(
                "the ConfigMap {namespace}/{name} is gone; the settings that it last had stay in force as long as this \
                 control plane runs: make it anew"
            );
            let refused = ObjectContent::Refused(Code::FileUnreadable, &reason);
            self.repository.stage_object(&self.settings_origin(), refused);
            return;
        }
        self.gone.extend(self.reported.remove(&known.origin));
        self.repository.stage_object(&known.origin, ObjectContent::Gone);
    }

    /// Removes what the complete list of a kind did not have.
    fn listed(&mut self, kind: Kind) {
        let Some(of_kind) = self.kinds.get_mut(&kind) else { return };
        of_kind.complete = !of_kind.asked;
        let lists = of_kind.lists;
        let stale = of_kind.known.iter().filter(|(_, known)| known.listed != lists);
        let stale: Vec<_> = stale.map(|(key, _)| key.clone()).collect();
        for (namespace, name) in stale {
            self.remove(kind, &namespace, &name);
        }
        if kind == Kind::ConfigMap && !self.given_out && !self.settings.settings_optional {
            self.want_settings();
        }
    }

    /// Removes all objects of a kind.
    fn delete_kind(&mut self, kind: Kind) {
        let known = self.kinds.get(&kind).into_iter().flat_map(|k| k.known.keys());
        for (namespace, name) in known.cloned().collect::<Vec<_>>() {
            self.remove(kind, &namespace, &name);
        }
    }

    /// Whether an object is for this control plane.
    fn is_read(&self, kind: Kind, decoded: &Decoded) -> bool {
        if kind == Kind::ConfigMap {
            let (namespace, name) = &self.settings.settings;
            return decoded.metadata("namespace") == namespace && decoded.metadata("name") == name;
        }
        let of_mesh = kind.spec().is_some_and(config::resource::KindSpec::is_custom);
        let revision = decoded.label("istio.io/rev").filter(|_| of_mesh);
        if revision.is_some_and(|r| r != self.settings.revision && !self.tags.contains(r)) {
            return false;
        }
        let namespaced = kind.spec().is_some_and(|spec| spec.namespaced);
        !namespaced || self.is_selected(decoded.metadata("namespace"))
    }

    /// Whether the objects of a namespace are read. Those of the root namespace always are: its policies hold for all.
    fn is_selected(&self, namespace: &str) -> bool {
        let selectors = self.repository.discovery();
        if selectors.is_empty()
            || namespace == &*self.repository.settings().root_namespace
            || self.settings.own_namespaces.contains(namespace)
        {
            return true;
        }
        let labels = self.namespaces.get(namespace).map_or(&[][..], Vec::as_slice);
        let label = |key: &str| labels.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str());
        selectors.iter().any(|selector| selector.matches(label))
    }

    fn set_namespace(&mut self, name: &Arc<str>, decoded: &Decoded) {
        self.pods.set_namespace(name, true);
        self.reselect = true;
        let labels = labels(&decoded.node);
        let was = self.is_selected(name);
        let known = self.namespaces.insert(name.clone(), labels).is_some();
        let is = self.is_selected(name);
        if was && !is {
            self.leave_out(|namespace| namespace == &**name);
        }
        // At first sight too: its objects may have come before it.
        if is && (!was || !known) && !self.repository.discovery().is_empty() && self.others.is_none() {
            self.list_anew();
        }
    }

    fn tell_namespaces(&self) {
        // Where sidecars are, the root's ConfigMap is of the mesh that they are of.
        let ours = |name: &&Arc<str>| self.is_selected(name) && !self.has_sidecars(name);
        let selected: BTreeSet<String> =
            self.namespaces.keys().filter(ours).map(ToString::to_string).collect();
        self.selected.send_if_modified(|old| {
            let changed = **old != selected;
            if changed {
                *old = Arc::new(selected);
            }
            changed
        });
    }

    /// Whether a namespace is set up for sidecars, of which this mesh has none.
    fn has_sidecars(&self, namespace: &str) -> bool {
        let other = |revision: &str| revision != self.settings.revision && !self.tags.contains(revision);
        self.namespaces.get(namespace).into_iter().flatten().any(|(key, value)| {
            key == "istio-injection" && value == "enabled" || key == "istio.io/rev" && other(value)
        })
    }

    /// Has all listed again. Until the restricting kinds are, nothing is given out: the pods of a namespace that was just
    /// selected must not come before its policies.
    fn list_anew(&mut self) {
        for kind in RESTRICTING {
            if let Some(of_kind) = self.kinds.get_mut(&kind).filter(|k| k.served) {
                (of_kind.complete, of_kind.asked) = (false, true);
            }
        }
        self.relist.send_modify(|count| *count += 1);
    }

    /// Follows new selectors.
    fn select_anew(&mut self) {
        self.selectors = self.repository.discovery().to_vec();
        self.reselect = true;
        let all = self.kinds.values().flat_map(|k| k.known.keys()).map(|(namespace, _)| namespace);
        let out: HashSet<Arc<str>> = all.filter(|n| !n.is_empty() && !self.is_selected(n)).cloned().collect();
        self.leave_out(|namespace| out.contains(namespace));
        if self.others.is_none() {
            self.list_anew();
        }
    }

    /// Takes what is in some namespaces for gone.
    fn leave_out(&mut self, which: impl Fn(&str) -> bool) {
        let kinds = self.kinds.iter().filter(|(kind, _)| **kind != Kind::ConfigMap);
        let keys = kinds.flat_map(|(kind, k)| {
            let keys = k.known.keys().filter(|(namespace, _)| !namespace.is_empty() && which(namespace));
            keys.map(|key| (*kind, key.clone()))
        });
        let keys: Vec<_> = keys.collect();
        for (kind, (namespace, name)) in keys {
            self.remove(kind, &namespace, &name);
        }
    }

    /// Settings that are not there at the start may have been deleted while nobody looked: the defaults could be weaker.
    fn want_settings(&mut self) {
        let (namespace, name) = &self.settings.settings;
        if self.kinds.get(&Kind::ConfigMap).is_some_and(|maps| maps.known.is_empty()) {
            let reason = format!(
                "there is no ConfigMap {namespace}/{name} with the mesh's settings: make it (an empty key mesh is the \
                 defaults), or start with --mesh-config-optional"
            );
            let refused = ObjectContent::Refused(Code::FileUnreadable, &reason);
            self.repository.stage_object(&self.settings_origin(), refused);
        }
    }

    /// Takes the ConfigMap's text as the settings of the mesh.
    fn stage_settings(&mut self, decoded: &Decoded) {
        let origin = self.settings_origin();
        let data = decoded.node.get("data");
        let text = |key| data.and_then(|d| d.get(key)).and_then(Node::as_str);
        let tags = text(TAGS).unwrap_or_default().split(',').map(str::trim).filter(|tag| !tag.is_empty());
        let tags: BTreeSet<String> = tags.map(str::to_owned).collect();
        if tags != self.tags {
            self.tags = tags;
            // The settings come before all that can have a tag; later, what is read may be other objects.
            if self.others.is_none() {
                self.list_anew();
            }
        }
        let version = &decoded.bookkeeping.resource_version;
        let Some(mesh) = text("mesh") else {
            let reason = "the ConfigMap has no key mesh: an empty one is the defaults, none at all a mistake";
            self.repository.stage_object(&origin, ObjectContent::Refused(Code::MissingField, reason));
            return;
        };
        let name = &self.settings.settings.1;
        match settings_object(mesh, text("clusterDomain"), name) {
            Ok(node) => {
                let content = ObjectContent::Node { node: &node, version, text: mesh };
                self.repository.stage_object(&origin, content);
            }
            Err((code, reason)) => {
                self.repository.stage_object(&origin, ObjectContent::Refused(code, &reason));
            }
        }
    }
}

/// What a change is, in istiod's words.
fn trigger(change: &model::Change) -> &'static str {
    match change {
        model::Change::SetWorkload(_) | model::Change::RemoveWorkload(_) => "endpoint",
        model::Change::SetService(_) | model::Change::RemoveService(_) => "service",
        model::Change::SetPolicy(_)
        | model::Change::RemovePolicy(_)
        | model::Change::SetHttpService(_)
        | model::Change::RemoveHttpService(_)
        | model::Change::SetHttpPolicy(_)
        | model::Change::RemoveHttpPolicy(_)
        | model::Change::SetTraffic(_)
        | model::Change::RemoveTraffic(_)
        | model::Change::SetAuthentication(_)
        | model::Change::RemoveAuthentication(_)
        | model::Change::SetRateLimit(_)
        | model::Change::RemoveRateLimit(_)
        | model::Change::SetAuthorizer(_)
        | model::Change::RemoveAuthorizer(_) => "config",
        model::Change::SetSettings(_) => "global",
    }
}

/// A question to the registry, answered between two commits.
pub type Ask = Box<dyn FnOnce(&Registry) + Send>;

/// What an object is called in diagnostics.
fn origin(kind: Kind, namespace: &Arc<str>, name: &Arc<str>) -> Arc<str> {
    let name = ResourceName { kind: kind.name().into(), namespace: namespace.clone(), name: name.clone() };
    name.to_string().into()
}

fn labels(node: &Node<'_>) -> Vec<(String, String)> {
    let Some(Value::Mapping(entries)) =
        node.get("metadata").and_then(|m| m.get("labels")).map(|labels| &labels.value)
    else {
        return Vec::new();
    };
    let text = |entry: &Entry<'_>| Some((entry.key.to_string(), entry.value.as_str()?.to_owned()));
    entries.iter().filter_map(text).collect()
}

/// The settings as an object of their own, with the places of the text's fields.
fn settings_object<'t>(
    mesh: &'t str,
    cluster_domain: Option<&'t str>,
    name: &'t str,
) -> Result<Node<'t>, (Code, String)> {
    let mut documents = tree::documents(mesh);
    let first = documents.next();
    if documents.next().is_some() {
        return Err((Code::MalformedYaml, "the settings of the mesh are one document".to_owned()));
    }
    let parsed = match first.map(|text| tree::parse(text, &Limits::default())) {
        None | Some(Ok(None)) => None,
        Some(Ok(node)) => node,
        Some(Err(error)) => return Err((Code::MalformedYaml, error.to_string())),
    };
    let start = Position { line: 1, column: 1 };
    let node = |value| Node { value, position: start };
    let mut spec = parsed.unwrap_or_else(|| node(Value::Mapping(Vec::new())));
    let entry = |key: &'static str, value| Entry { key: key.into(), position: start, value };
    let text = |text: &'t str| node(Value::String(Cow::Borrowed(text)));
    if let (Value::Mapping(entries), Some(domain)) = (&mut spec.value, cluster_domain)
        && !entries.iter().any(|e| e.key == "clusterDomain")
    {
        entries.push(entry("clusterDomain", text(domain)));
    }
    let metadata = node(Value::Mapping(vec![entry("name", text(name))]));
    Ok(node(Value::Mapping(vec![
        entry("apiVersion", text("mesh.istio.io/v1alpha1")),
        entry("kind", text("MeshConfig")),
        entry("metadata", metadata),
        entry("spec", spec),
    ])))
}

/// Starts the registry on a thread of its own: compiling many objects must not keep streams and probes waiting.
///
/// # Errors
/// The thread can't be started.
pub fn spawn(
    registry: Registry,
    feed: Feed,
    mut asks: mpsc::Receiver<Ask>,
    out: impl FnMut(Committed) + Send + 'static,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    std::thread::Builder::new().name("registry".to_owned()).spawn(move || {
        runtime.block_on(registry.run(feed.events, &mut asks, out));
    })?;
    Ok(())
}
