//! What the client holds: the version of each name, by type.

use std::collections::BTreeMap;

/// The names of one type.
#[derive(Debug, Default)]
pub(super) struct HeldType {
    versions: BTreeMap<Box<str>, Version>,
    /// The state is whole, or was, and only changed since.
    pub(super) complete: bool,
    /// How many bytes the resources take in a journal.
    bytes: u64,
}

#[derive(Debug)]
struct Version {
    text: Box<str>,
    bytes: u32,
}

impl HeldType {
    /// Holds this version of a resource, which takes this many bytes in the journal.
    pub(super) fn set(&mut self, name: &str, version: &str, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let old = self.versions.insert(name.into(), Version { text: version.into(), bytes });
        self.bytes += u64::from(bytes);
        self.bytes -= old.map_or(0, |o| u64::from(o.bytes));
    }

    pub(super) fn remove(&mut self, name: &str) {
        let old = self.versions.remove(name);
        self.bytes -= old.map_or(0, |o| u64::from(o.bytes));
    }

    /// Whether this is the version that is held.
    pub(super) fn is(&self, name: &str, version: &str) -> bool {
        self.versions.get(name).is_some_and(|v| &*v.text == version)
    }

    /// For `initial_resource_versions`.
    pub(super) fn versions(&self) -> BTreeMap<String, String> {
        self.versions.iter().map(|(name, v)| (name.to_string(), v.text.to_string())).collect()
    }
}

/// All types.
#[derive(Debug)]
pub(super) struct Held(BTreeMap<&'static str, HeldType>);

impl Held {
    pub(super) fn new(types: &[&'static str]) -> Self {
        Self(types.iter().map(|t| (*t, HeldType::default())).collect())
    }

    /// One of the types that are followed.
    pub(super) fn of(&mut self, type_url: &str) -> Option<(&'static str, &mut HeldType)> {
        self.0.iter_mut().find(|(t, _)| **t == type_url).map(|(t, held)| (*t, held))
    }

    pub(super) fn get(&self, type_url: &str) -> Option<&HeldType> {
        self.0.get(type_url)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, &HeldType)> {
        self.0.iter().map(|(t, held)| (*t, held))
    }

    /// How many bytes all takes in a journal.
    pub(super) fn bytes(&self) -> u64 {
        self.0.values().map(|t| t.bytes).sum()
    }
}
