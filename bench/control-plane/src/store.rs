//! What the API server of the benchmark has: made objects, those that the control plane wrote, and the log of changes.
//!
//! One lock, held for short: a change is put into the log of its kind at one time with its version, as in etcd.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::objects::{self, PODS_A_SERVICE, Pod, Size};

/// Changes that are remembered of each kind; a watch that was away for longer is told 410.
const REMEMBERED: usize = 10_000;

/// Real ztunnels at most.
pub const MOST_ZTUNNELS: u32 = 16;

/// Namespace and name.
pub type Name = (String, String);

/// An object.
#[derive(Clone, Debug)]
enum Object {
    /// What was written by the control plane, or is small.
    Written(Value),
    Pod(Pod),
    /// The slice of a service.
    Slice(u32),
}

#[derive(Debug, Default)]
struct Collection {
    objects: BTreeMap<Name, (Object, u64)>,
    log: VecDeque<(u64, Bytes, Name)>,
    /// The version until which the log was forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct State {
    size: Size,
    version: u64,
    /// Nobody is there yet to be told of changes.
    quiet: bool,
    /// Who is at each place.
    pods: Vec<Pod>,
    /// By the path without namespaces, such as `/api/v1/pods`.
    kinds: BTreeMap<String, Collection>,
}

/// The objects of a cluster.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

/// Path of pods.
pub const PODS: &str = "/api/v1/pods";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// A part of a list.
pub struct Page {
    /// The objects.
    pub items: Vec<Bytes>,
    /// The version of the list.
    pub version: u64,
    /// Where the next part begins, if there is one.
    pub next: Option<usize>,
}

/// Why a write is refused: the status code.
pub struct Refused(pub u16);

impl State {
    fn render(&self, object: &Object, version: u64) -> Bytes {
        match object {
            Object::Written(value) => value.to_string().into(),
            Object::Pod(pod) => pod.json(self.size, version).into(),
            Object::Slice(service) => {
                let from = (service * PODS_A_SERVICE) as usize;
                let to = (from + PODS_A_SERVICE as usize).min(self.pods.len());
                let pods = self.pods.get(from..to).unwrap_or_default();
                objects::slice(*service, pods, self.size, version).into()
            }
        }
    }

    fn put(&mut self, kind: &str, name: Name, mut object: Object) -> Value {
        self.version += 1;
        let version = self.version;
        if let Object::Written(value) = &mut object
            && let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut)
        {
            metadata.insert("resourceVersion".into(), version.to_string().into());
        }
        let known = self.kinds.get(kind).is_some_and(|c| c.objects.contains_key(&name));
        if self.quiet {
            self.kinds.entry(kind.to_owned()).or_default().objects.insert(name, (object, version));
            return Value::Null;
        }
        let text = self.render(&object, version);
        self.note(kind, version, if known { "MODIFIED" } else { "ADDED" }, &text, name.clone());
        let written = if let Object::Written(value) = &object { value.clone() } else { Value::Null };
        self.kinds.entry(kind.to_owned()).or_default().objects.insert(name, (object, version));
        written
    }

    fn delete(&mut self, kind: &str, name: &Name) {
        let gone = self.kinds.get_mut(kind).and_then(|c| c.objects.remove(name));
        let Some((object, _)) = gone else { return };
        self.version += 1;
        let version = self.version;
        let text = self.render(&object, version);
        self.note(kind, version, "DELETED", &text, name.clone());
    }

    fn note(&mut self, kind: &str, version: u64, what: &str, object: &Bytes, name: Name) {
        let object = std::str::from_utf8(object).unwrap_or_default();
        let line = format!("{{\"type\":\"{what}\",\"object\":{object}}}\n");
        let collection = self.kinds.entry(kind.to_owned()).or_default();
        collection.log.push_back((version, line.into(), name));
        if collection.log.len() > REMEMBERED
            && let Some((version, ..)) = collection.log.pop_front()
        {
            collection.forgotten = version;
        }
    }
}

impl Store {
    /// A cluster of this size.
    ///
    /// # Errors
    /// The objects are no JSON.
    pub fn new(size: Size, root_namespace: &str) -> anyhow::Result<Self> {
        let pods = (0..size.pods).map(|place| Pod { place, incarnation: 0, running: true }).collect();
        let mut state = State { size, version: 1, quiet: true, pods, kinds: BTreeMap::new() };
        let mut write = |kind: &str, namespace: &str, name: String, text: String| {
            let value: Value = serde_json::from_str(&text)?;
            state.put(kind, (namespace.to_owned(), name), Object::Written(value));
            anyhow::Ok(())
        };
        for node in 0..size.nodes {
            write("/api/v1/nodes", "", objects::node_name(node), objects::node(node, 1))?;
        }
        // The pods of the proxies: a stream ends where there is none.
        let simulated = (0..size.nodes).map(|node| (format!("ztunnel-{node}"), node));
        let real = (0..MOST_ZTUNNELS).map(|number| (format!("ztunnel-real-{number}"), number % size.nodes));
        for (name, node) in simulated.chain(real) {
            write(PODS, root_namespace, name.clone(), objects::proxy(&name, root_namespace, node))?;
        }
        write("/api/v1/namespaces", "", root_namespace.to_owned(), objects::namespace(root_namespace, 1))?;
        write("/api/v1/configmaps", root_namespace, "culvert".to_owned(), objects::settings(root_namespace))?;
        for number in 0..size.namespaces() {
            let name = format!("team-{number}");
            write("/api/v1/namespaces", "", name.clone(), objects::namespace(&name, 1))?;
            let kind = "/apis/security.istio.io/v1/authorizationpolicies";
            write(kind, &name, "only-teams".to_owned(), objects::policy(number, 1))?;
        }
        for number in 0..size.services() {
            let (namespace, name) = (objects::namespace_of(number), format!("app-{number}"));
            write("/api/v1/services", &namespace, name.clone(), objects::service(number, 1))?;
            write("/api/v1/serviceaccounts", &namespace, name, objects::account(number, 1))?;
        }
        for number in 0..size.services() {
            let name = (objects::namespace_of(number), format!("app-{number}-x2x4z"));
            state.put(SLICES, name, Object::Slice(number));
        }
        for pod in state.pods.clone() {
            state.put(PODS, (pod.namespace(), pod.name()), Object::Pod(pod));
        }
        state.quiet = false;
        for collection in state.kinds.values_mut() {
            collection.forgotten = state.version;
        }
        Ok(Self { changed: watch::Sender::new(state.version), state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn said(&self, state: MutexGuard<'_, State>) {
        let version = state.version;
        drop(state);
        self.changed.send_replace(version);
    }

    /// What tells that there is something new.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A part of a list that began at a version, if this is not the first.
    pub fn list(
        &self,
        kind: &str,
        matches: impl Fn(&Name) -> bool,
        (from, limit): (usize, usize),
        version: Option<u64>,
    ) -> Page {
        let state = self.lock();
        let version = version.unwrap_or(state.version);
        let Some(collection) = state.kinds.get(kind) else {
            return Page { items: Vec::new(), version, next: None };
        };
        let chosen = collection.objects.iter().filter(|(name, _)| matches(name)).skip(from).take(limit);
        let items: Vec<Bytes> = chosen.map(|(_, (object, at))| state.render(object, *at)).collect();
        let next = (items.len() == limit).then_some(from + limit);
        Page { items, version, next }
    }

    /// The changes after a version, and the version until which these go; `None` when they are forgotten.
    pub fn since(
        &self,
        kind: &str,
        matches: impl Fn(&Name) -> bool,
        version: u64,
    ) -> Option<(Vec<Bytes>, u64)> {
        let state = self.lock();
        let Some(collection) = state.kinds.get(kind) else { return Some((Vec::new(), state.version)) };
        if version < collection.forgotten {
            return None;
        }
        let from = collection.log.partition_point(|(at, ..)| *at <= version);
        let new = collection.log.range(from..).filter(|(.., name)| matches(name));
        Some((new.map(|(_, line, _)| line.clone()).collect(), state.version))
    }

    /// An object.
    pub fn get(&self, kind: &str, name: &Name) -> Option<Bytes> {
        let state = self.lock();
        let (object, version) = state.kinds.get(kind)?.objects.get(name)?;
        Some(state.render(object, *version))
    }

    /// A value that was written.
    pub fn written(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let state = self.lock();
        let found = state.kinds.get(kind)?.objects.get(&(namespace.to_owned(), name.to_owned()))?;
        if let (Object::Written(value), _) = found { Some(value.clone()) } else { None }
    }

    /// Writes an object that the control plane keeps.
    ///
    /// # Errors
    /// It is there (`new`), or is not of the version that is there.
    pub fn write(&self, kind: &str, name: Name, value: Value, new: bool) -> Result<Value, Refused> {
        let mut state = self.lock();
        let old = state.kinds.get(kind).and_then(|c| c.objects.get(&name)).map(|(_, version)| *version);
        let given = value.pointer("/metadata/resourceVersion").and_then(Value::as_str);
        match (old, new) {
            (Some(_), true) => return Err(Refused(409)),
            (None, false) => return Err(Refused(404)),
            (Some(old), false) if given.is_some_and(|given| given != old.to_string()) => {
                return Err(Refused(409));
            }
            _ => {}
        }
        let written = state.put(kind, name, Object::Written(value));
        self.said(state);
        Ok(written)
    }

    /// A pod is replaced by another at its place: one goes and one comes. Returns both, and when the API server said the
    /// last of it.
    ///
    /// As in a cluster, that is several events: the old pod's end, the new one without an address, running, and twice
    /// the slice of its service.
    pub fn replace(&self, place: u32) -> Option<(Pod, Pod, Instant)> {
        let mut state = self.lock();
        let old = *state.pods.get(place as usize)?;
        let new = Pod { incarnation: old.incarnation + 1, ..old };
        let slice = || (objects::namespace_of(old.service()), format!("app-{}-x2x4z", old.service()));
        let name = || (new.namespace(), new.name());
        let pending = Pod { running: false, ..new };
        state.delete(PODS, &(old.namespace(), old.name()));
        if let Some(at) = state.pods.get_mut(place as usize) {
            *at = pending;
        }
        state.put(SLICES, slice(), Object::Slice(old.service()));
        state.put(PODS, name(), Object::Pod(pending));
        state.put(PODS, name(), Object::Pod(new));
        if let Some(at) = state.pods.get_mut(place as usize) {
            *at = new;
        }
        state.put(SLICES, slice(), Object::Slice(old.service()));
        let now = Instant::now();
        self.said(state);
        Some((old, new, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_go_in_parts_and_watches_go_on_from_there() {
        let store = Store::new(Size { pods: 250, nodes: 5 }, "culvert-system").unwrap();
        let pods = |name: &Name| name.0 != "culvert-system";
        let first = store.list(PODS, pods, (0, 200), None);
        assert_eq!((first.items.len(), first.next), (200, Some(200)));
        let (old, new, _) = store.replace(7).unwrap();
        let rest = store.list(PODS, pods, (200, 200), Some(first.version));
        assert_eq!((rest.items.len(), rest.next, rest.version), (50, None, first.version));
        let (events, _) = store.since(PODS, |_| true, first.version).unwrap();
        let texts: Vec<_> = events.iter().map(|e| serde_json::from_slice::<Value>(e).unwrap()).collect();
        let seen: Vec<_> = texts.iter().map(|t| (t["type"].as_str().unwrap(), &t["object"])).collect();
        assert_eq!(seen.len(), 3);
        assert_eq!((seen[0].0, seen[1].0, seen[2].0), ("DELETED", "ADDED", "MODIFIED"));
        assert_eq!(seen[0].1["metadata"]["name"], old.name());
        assert_eq!(seen[2].1["status"]["podIP"], new.address());
        assert_ne!(old.address(), new.address());
        assert!(store.since(PODS, |_| true, 0).is_none());
    }

    #[test]
    fn writes_need_the_version_that_is_there() {
        let store = Store::new(Size { pods: 1, nodes: 1 }, "culvert-system").unwrap();
        let kind = "/apis/coordination.k8s.io/v1/leases";
        let name = || ("a".to_owned(), "b".to_owned());
        let one = serde_json::json!({ "metadata": { "name": "b" } });
        let made = store.write(kind, name(), one.clone(), true).ok().unwrap();
        assert!(store.write(kind, name(), one, true).is_err());
        let again = store.write(kind, name(), made.clone(), false).ok().unwrap();
        assert_ne!(made, again);
        assert_eq!(store.write(kind, name(), made, false).err().unwrap().0, 409);
    }
}
