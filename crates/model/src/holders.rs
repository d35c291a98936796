//! The workloads that have one address, of any network: a list that takes no memory of its own for one, as nearly all have.

use std::sync::Arc;

use crate::Workload;

/// One workload or several, by their uids. Never empty but for a moment inside [`crate::CowMap::entry_or_default`].
#[derive(Clone, Debug, Default)]
#[allow(clippy::box_collection, reason = "two words an address instead of three; lists are rare")]
pub(crate) enum Holders {
    #[default]
    None,
    One(Arc<Workload>),
    More(Box<Vec<Arc<Workload>>>),
}

impl Holders {
    /// The one whose address it is on a network.
    pub(crate) fn first(&self, network: &str) -> Option<&Arc<Workload>> {
        let list = match self {
            Self::None => &[],
            Self::One(workload) => std::slice::from_ref(workload),
            Self::More(list) => list.as_slice(),
        };
        list.iter().find(|workload| *workload.network == *network)
    }

    /// Puts a workload in, in the place of the one of its uid.
    pub(crate) fn put(&mut self, workload: &Arc<Workload>) {
        let mut list = match std::mem::take(self) {
            Self::None => Vec::new(),
            Self::One(only) => vec![only],
            Self::More(list) => *list,
        };
        let at = list.partition_point(|w| w.uid < workload.uid);
        match list.get_mut(at).filter(|w| w.uid == workload.uid) {
            Some(slot) => *slot = workload.clone(),
            None => list.insert(at, workload.clone()),
        }
        *self = Self::of(list);
    }

    /// Takes the workload of `uid` out. Whether none is left.
    pub(crate) fn remove(&mut self, uid: &str) -> bool {
        let mut list = match std::mem::take(self) {
            Self::None => Vec::new(),
            Self::One(only) => vec![only],
            Self::More(list) => *list,
        };
        list.retain(|w| *w.uid != *uid);
        *self = Self::of(list);
        matches!(self, Self::None)
    }

    fn of(mut list: Vec<Arc<Workload>>) -> Self {
        match (list.pop(), list.is_empty()) {
            (None, _) => Self::None,
            (Some(only), true) => Self::One(only),
            (Some(last), false) => {
                list.push(last);
                list.shrink_to_fit();
                Self::More(Box::new(list))
            }
        }
    }
}
