//! What the client holds: the version of each name, by type.
//!
//! Compact, since a proxy holds a resource for each workload of the mesh: a name is shared with whoever got the resource,
//! and a version that looks like ours is ten bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::inventory::{self, NameKey, Version};

/// The names of one type.
#[derive(Debug, Default)]
pub(super) struct HeldType {
    versions: HashMap<Arc<str>, Kept>,
    /// Versions of another make.
    others: HashMap<Arc<str>, Box<str>>,
    /// Resources that were refused in their last version, with that version. Of one that was held before, what was held
    /// still is.
    refused: BTreeMap<Arc<str>, (Box<str>, u32)>,
    /// The state is whole, or was, and only changed since.
    pub(super) complete: bool,
    /// How many bytes the resources take in a journal.
    bytes: u64,
}

#[derive(Debug)]
struct Kept {
    /// How many bytes the resource takes in a journal.
    bytes: u32,
    /// All zeros: it is in `others`.
    version: Version,
}

const OTHER: Version = Version([0; 10]);

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl HeldType {
    /// Holds this version of a resource, which takes this many bytes in the journal.
    pub(super) fn set(&mut self, name: &Arc<str>, version: &str, bytes: usize) {
        self.forget_refusal(name);
        let bytes = length(bytes);
        let parsed = Version::parse(version).filter(|v| *v != OTHER);
        if parsed.is_none() {
            self.others.insert(name.clone(), version.into());
        } else if !self.others.is_empty() {
            self.others.remove(name);
        }
        let kept = Kept { bytes, version: parsed.unwrap_or(OTHER) };
        self.bytes += u64::from(bytes);
        // The name that is there stays: it is the one that is shared.
        if let Some(old) = self.versions.get_mut(name) {
            self.bytes -= u64::from(old.bytes);
            *old = kept;
        } else {
            self.versions.insert(name.clone(), kept);
        }
    }

    /// The last version of a resource was refused.
    pub(super) fn refuse(&mut self, name: &Arc<str>, version: &str, bytes: usize) {
        self.forget_refusal(name);
        self.bytes += u64::from(length(bytes));
        self.refused.insert(name.clone(), (version.into(), length(bytes)));
    }

    fn forget_refusal(&mut self, name: &str) {
        let old = if self.refused.is_empty() { None } else { self.refused.remove(name) };
        self.bytes -= old.map_or(0, |(_, bytes)| u64::from(bytes));
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.forget_refusal(name);
        self.others.remove(name);
        let old = self.versions.remove(name);
        self.bytes -= old.map_or(0, |old| u64::from(old.bytes));
    }

    /// Whether this is the version that is held, or the one that was refused.
    pub(super) fn is(&self, name: &str, version: &str) -> bool {
        let held = self.versions.get(name).is_some_and(|kept| match kept.version {
            OTHER => self.others.get(name).is_some_and(|v| **v == *version),
            own => Version::parse(version) == Some(own),
        });
        held || self.refused.get(name).is_some_and(|(v, _)| **v == *version)
    }

    /// For `culvert_held`; `None` where it can't be said so.
    pub(super) fn inventory(&self) -> Option<Vec<u8>> {
        let held = || self.versions.iter().map(|(name, kept)| (&**name, kept.version));
        self.others.is_empty().then(|| inventory::write(held()))
    }

    /// For `initial_resource_versions`.
    pub(super) fn versions(&self) -> BTreeMap<String, String> {
        let text = |name: &str, kept: &Kept| match self.others.get(name) {
            Some(other) => other.to_string(),
            None => kept.version.to_string(),
        };
        self.versions.iter().map(|(name, kept)| (name.to_string(), text(name, kept))).collect()
    }

    /// The name of a hash.
    pub(super) fn named(&self, keys: &[NameKey]) -> Vec<String> {
        let names = self.versions.keys().filter(|name| keys.contains(&NameKey::of(name)));
        names.map(ToString::to_string).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_any_make_are_held() {
        let mut held = HeldType::default();
        let (ours, theirs, zeros) =
            ("00112233445566778899", "2026-11-21T10:00:00Z/7", "00000000000000000000");
        let name = |n: &str| Arc::from(n);
        held.set(&name("a"), ours, 10);
        assert!(held.is("a", ours) && held.inventory().is_some());
        held.set(&name("b"), theirs, 20);
        held.set(&name("c"), zeros, 30);
        assert!(held.is("b", theirs) && !held.is("b", zeros) && held.is("c", zeros));
        assert_eq!((held.inventory(), held.bytes), (None, 60));
        let versions: Vec<_> = held.versions().into_iter().collect();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(versions, [pair("a", ours), pair("b", theirs), pair("c", zeros)]);
        held.set(&name("b"), ours, 5);
        held.remove("c");
        assert_eq!((held.bytes, held.inventory().map(|bytes| bytes.len())), (15, Some(52)));
        assert_eq!(held.named(&[NameKey::of("b"), NameKey::of("c")]), ["b"]);
    }

    #[test]
    fn what_was_refused_is_remembered_beside_what_is_held() {
        let mut held = HeldType::default();
        let name: Arc<str> = "a".into();
        held.set(&name, "1", 10);
        held.refuse(&name, "2", 7);
        assert!(held.is("a", "1") && held.is("a", "2") && !held.is("a", "3"));
        assert_eq!((held.bytes, held.versions()["a"].as_str()), (17, "1"));
        held.refuse(&name, "3", 8);
        assert!(!held.is("a", "2") && held.bytes == 18);
        held.set(&name, "4", 10);
        assert!(!held.is("a", "3") && held.is("a", "4") && held.bytes == 10);
        held.refuse(&name, "5", 1);
        held.remove("a");
        assert!(!held.is("a", "5") && held.bytes == 0);
    }
}
