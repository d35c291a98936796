//! The name of an object in one block, as the store keeps it for each.

use model::Str;

use crate::resource::{KINDS, Kind, ObjectKey};

/// An [`ObjectKey`] as one text, `CLUSTER//KIND/NAMESPACE/NAME`: of a pod that is its workload's uid, and one block for both.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Packed(Str);

impl Packed {
    pub(super) fn new(cluster: &str, key: &ObjectKey) -> Self {
        Self(format!("{cluster}//{}/{}/{}", key.kind.name(), key.namespace, key.name).into())
    }

    /// The text.
    pub(super) fn text(&self) -> Str {
        self.0.clone()
    }

    /// The key.
    pub(super) fn key(&self) -> ObjectKey {
        let mut parts = self.0.rsplitn(4, '/');
        let mut next = || parts.next().unwrap_or_default();
        let (name, namespace, kind) = (next(), next(), next());
        // Every key has a kind.
        let kind = KINDS.iter().find(|spec| spec.name == kind).map_or(Kind::Namespace, |spec| spec.kind);
        ObjectKey { kind, namespace: namespace.into(), name: name.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = KINDS.iter().map(|spec| spec.name).collect();
        assert_eq!(names.len(), KINDS.len());
        assert!(KINDS.iter().all(|spec| spec.kind.name() == spec.name && !spec.name.contains('/')));
    }

    proptest! {
        #[test]
        fn a_key_reads_back_as_it_was(
            cluster in "[a-z/]{0,8}",
            kind in 0..KINDS.len(),
            namespace in "[a-z0-9-]{0,63}",
            name in "[a-z0-9.-]{1,253}",
        ) {
            let key = ObjectKey { kind: KINDS[kind].kind, namespace: namespace.into(), name: name.into() };
            let packed = Packed::new(&cluster, &key);
            prop_assert_eq!(packed.key(), key.clone());
            let other = ObjectKey { name: format!("{}a", key.name).into(), ..key };
            prop_assert_ne!(Packed::new(&cluster, &other), packed);
        }
    }
}
