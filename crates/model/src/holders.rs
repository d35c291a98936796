//! The workloads that have one address, of any network: a list that takes no memory of its own for one, as nearly all have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::{CowMap, Workload};

/// Workloads by their addresses. Each family has a table of its own: in one, an address of IPv4 would take the room of one of
/// IPv6.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByAddress {
    v4: CowMap<Ipv4Addr, Holders>,
    v6: CowMap<Ipv6Addr, Holders>,
}

impl ByAddress {
    /// Those that have an address.
    pub(crate) fn get(&self, ip: &IpAddr) -> Option<&Holders> {
        match ip {
            IpAddr::V4(ip) => self.v4.get(ip),
            IpAddr::V6(ip) => self.v6.get(ip),
        }
    }

    /// Gives an address to a workload.
    pub(crate) fn put(&mut self, ip: &IpAddr, workload: &Arc<Workload>) {
        let holders = match ip {
            IpAddr::V4(ip) => self.v4.entry_or_default(ip),
            IpAddr::V6(ip) => self.v6.entry_or_default(ip),
        };
        if let Some(holders) = holders {
            holders.put(workload);
        }
    }

    /// Takes an address from the workload of `uid`.
    pub(crate) fn remove(&mut self, ip: &IpAddr, uid: &str) {
        match ip {
            IpAddr::V4(ip) if self.v4.get_mut(ip).is_some_and(|holders| holders.remove(uid)) => {
                self.v4.remove(ip);
            }
            IpAddr::V6(ip) if self.v6.get_mut(ip).is_some_and(|holders| holders.remove(uid)) => {
                self.v6.remove(ip);
            }
            _ => {}
        }
    }
}

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
