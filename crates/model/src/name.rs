//! Shared strings.

use std::collections::HashSet;
use std::sync::Arc;

/// An immutable, shared string: cloning counts a reference. Equal strings of one source are usually one
/// allocation, see [`Interner`].
pub type Str = Arc<str>;

/// Makes equal strings share one allocation while a source is read. 100,000 workloads name a few hundred
/// namespaces, nodes and service accounts; without sharing each would carry its own copies.
///
/// The table holds references, so [`Interner::sweep`] must be called now and then (after a batch of changes) to
/// let strings go that nothing else uses.
#[derive(Debug, Default)]
pub struct Interner {
    strings: HashSet<Str>,
}

impl Interner {
    /// The shared form of `text`.
    pub fn intern(&mut self, text: &str) -> Str {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        let shared: Str = text.into();
        self.strings.insert(shared.clone());
        shared
    }

    /// Forgets the strings that only this table still holds.
    pub fn sweep(&mut self) {
        self.strings.retain(|s| Arc::strong_count(s) > 1);
    }

    /// How many distinct strings the table holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.strings.len()
    }

    /// Whether the table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.strings.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_one_allocation_until_nobody_uses_them() {
        let mut interner = Interner::default();
        let a = interner.intern("default");
        let b = interner.intern("default");
        assert!(Arc::ptr_eq(&a, &b));
        drop((a, b));
        interner.sweep();
        assert!(interner.is_empty());
    }
}
