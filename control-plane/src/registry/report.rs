//! What the registry reports of objects whose status is written.

use std::collections::HashSet;
use std::sync::Arc;

use config::compile::{Judgement, RouteStanding};
use config::diagnostic::Diagnostic;
use config::json::Decoded;
use config::repository::Repository;
use config::resource::{Kind, ObjectKey};
use config::routes::{ParentKind, ParentRef};
use config::tree::{Node, Value as Tree};
use serde_json::Value;

/// What there is to report of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Which.
    pub name: ObjectName,
    /// The object as it stands; `None` when it is gone.
    pub state: Option<ObjectState>,
}

/// An object's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind.name(), self.namespace, self.name)
    }
}

impl ObjectName {
    fn key(&self) -> ObjectKey {
        ObjectKey { kind: self.kind, namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

/// An object as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectState {
    /// Which version of it.
    pub version: ObjectVersion,
    /// What is said of it.
    pub findings: Vec<Diagnostic>,
    /// How it stands with what it names.
    pub standing: Standing,
}

/// How an object stands with what it names.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Standing {
    /// A route's parents, as it names them, those that are ours to speak of.
    pub parents: Vec<(Arc<Value>, RouteStanding)>,
    /// What is bound to a waypoint: whether it is reached through it.
    pub binding: Option<Judgement>,
    /// What has `targetRefs`: whether waypoints enforce it for all of them. A VirtualService: whether they do for its hosts.
    pub targets: Option<Judgement>,
    /// Whether `targets` was ever something since this process began.
    pub was_judged: bool,
}

/// A version of an object, and what decides who reports on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectVersion {
    /// Which object of this name.
    pub uid: Arc<str>,
    /// Which version of it.
    pub generation: i64,
    /// Its label gives it to this revision: the control planes of others do not read it.
    pub labelled: bool,
    /// It has a selector: proxies know from their workloads whether it is for them.
    pub selects: bool,
}

/// Whether the status of a kind's objects is written. Of a Gateway it is written by who deploys it.
pub(super) fn is_reported(kind: Kind) -> bool {
    match kind {
        Kind::Service => true,
        Kind::Gateway | Kind::ReferenceGrant | Kind::MeshConfig => false,
        _ => kind.spec().is_some_and(config::resource::KindSpec::is_custom),
    }
}

/// Whether a kind is of routes, which have a status for each of their parents.
pub(crate) fn is_route(kind: Kind) -> bool {
    kind.name().ends_with("Route")
}

pub(super) fn version(decoded: &Decoded) -> ObjectVersion {
    ObjectVersion {
        uid: decoded.bookkeeping.uid.as_str().into(),
        generation: decoded.bookkeeping.generation,
        labelled: decoded.label("istio.io/rev").is_some(),
        selects: decoded.node.get("spec").is_some_and(|spec| spec.get("selector").is_some()),
    }
}

/// How many parents of a route are looked at; the definitions allow 32.
const MOST_PARENTS: usize = 64;

/// The parents of a route as it names them.
pub(super) fn parents(kind: Kind, decoded: &Decoded) -> Box<[Arc<Value>]> {
    if !is_route(kind) {
        return Box::default();
    }
    let list = decoded.node.get("spec").and_then(|spec| spec.get("parentRefs")).map(|list| &list.value);
    let Some(Tree::Sequence(items)) = list else { return Box::default() };
    items.iter().take(MOST_PARENTS).map(|item| Arc::new(plain(item))).collect()
}

/// The texts and numbers of a flat mapping.
fn plain(node: &Node<'_>) -> Value {
    let text = |key: &str| Some((key.to_owned(), Value::from(node.get(key)?.as_str()?)));
    let mut all: serde_json::Map<String, Value> =
        ["group", "kind", "namespace", "name", "sectionName"].into_iter().filter_map(text).collect();
    if let Some(Tree::Int(port)) = node.get("port").map(|port| &port.value)
        && let Ok(port) = u16::try_from(*port)
    {
        all.insert("port".to_owned(), port.into());
    }
    Value::Object(all)
}

/// The parent that such a mapping names; `None` if it is no kind of ours.
fn parent(named: &Value, namespace: &Arc<str>) -> Option<ParentRef> {
    let text = |key: &str| named.get(key).and_then(Value::as_str);
    let group = text("group").unwrap_or("gateway.networking.k8s.io");
    let kind = match (group, text("kind").unwrap_or("Gateway")) {
        ("" | "core", "Service") => ParentKind::Service,
        ("networking.istio.io", "ServiceEntry") => ParentKind::ServiceEntry,
        ("gateway.networking.k8s.io", "Gateway") => ParentKind::Gateway,
        _ => return None,
    };
    Some(ParentRef {
        kind,
        namespace: text("namespace").map_or_else(|| namespace.clone(), Into::into),
        name: text("name")?.into(),
        section: text("sectionName").map(Into::into),
        port: named.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok()),
    })
}

/// How an object stands, as it was compiled.
pub(super) fn standing(name: &ObjectName, parents: &[Arc<Value>], repository: &Repository) -> Standing {
    let (key, compiler) = (name.key(), repository.standing());
    let judged = parents.iter().filter_map(|named| {
        let standing = compiler.route_standing(&key, &parent(named, &name.namespace)?)?;
        Some((named.clone(), standing))
    });
    let is_bound = matches!(name.kind, Kind::Service | Kind::ServiceEntry);
    Standing {
        parents: judged.collect(),
        binding: is_bound.then(|| compiler.binding_standing(&key)).flatten(),
        targets: compiler.target_standing(&key).or_else(|| compiler.host_standing(&key)),
        was_judged: false,
    }
}

/// The objects whose status said something of waypoints: no other Services are reported, and of no others a condition is
/// taken for one of ours.
#[derive(Debug, Default)]
pub(super) struct Bound(HashSet<ObjectName>);

impl Bound {
    /// Whether there is something to report of an object; notes in `standing` whether it was judged.
    pub(super) fn is_told(&mut self, name: &ObjectName, standing: &mut Standing) -> bool {
        if name.kind != Kind::Service {
            if standing.targets.is_some() {
                self.0.insert(name.clone());
            }
            standing.was_judged = self.0.contains(name);
            return true;
        }
        match &standing.binding {
            Some(_) => {
                self.0.insert(name.clone());
                true
            }
            None => self.0.remove(name),
        }
    }

    /// Whether the end of an object is to be reported.
    pub(super) fn ends(&mut self, name: &ObjectName) -> bool {
        self.0.remove(name) || name.kind != Kind::Service
    }
}
