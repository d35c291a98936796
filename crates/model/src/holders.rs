//! Who has an address: a workload, or several; the first by uid is the one that counts. Only a pointer is kept for one, as nearly
//! all have.

use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::{CowMap, Workload};

/// Workloads by their addresses. Each family has a table of its own: in one, an address of IPv4 would take the room of one of
/// IPv6.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByAddress {
    v4: Family<Ipv4Addr>,
    v6: Family<Ipv6Addr>,
}

impl ByAddress {
    /// The one whose address it is on a network.
    pub(crate) fn first(&self, ip: &IpAddr, network: &str) -> Option<&Arc<Workload>> {
        let holders = match ip {
            IpAddr::V4(ip) => self.v4.holders(ip),
            IpAddr::V6(ip) => self.v6.holders(ip),
        };
        holders.iter().find(|workload| *workload.network == *network)
    }

    /// Gives an address to a workload, in the place of the one of its uid.
    pub(crate) fn put(&mut self, ip: &IpAddr, workload: &Arc<Workload>) {
        match ip {
            IpAddr::V4(ip) => self.v4.put(*ip, workload),
            IpAddr::V6(ip) => self.v6.put(*ip, workload),
        }
    }

    /// Takes an address from the workload of `uid`.
    pub(crate) fn remove(&mut self, ip: &IpAddr, uid: &str) {
        match ip {
            IpAddr::V4(ip) => self.v4.remove(*ip, uid),
            IpAddr::V6(ip) => self.v6.remove(*ip, uid),
        }
    }
}

/// An address is in one of the tables at most.
#[derive(Clone, Debug)]
struct Family<K> {
    one: CowMap<K, Arc<Workload>>,
    /// Two or more, by uid.
    several: CowMap<K, Arc<[Arc<Workload>]>>,
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self { one: CowMap::default(), several: CowMap::default() }
    }
}

impl<K: Hash + Eq + Copy> Family<K> {
    fn holders(&self, ip: &K) -> &[Arc<Workload>] {
        match self.one.get(ip) {
            Some(one) => std::slice::from_ref(one),
            None if self.several.is_empty() => &[],
            None => self.several.get(ip).map_or(&[], |list| list),
        }
    }

    fn put(&mut self, ip: K, workload: &Arc<Workload>) {
        let holders = self.holders(&ip);
        if holders.iter().all(|holder| holder.uid == workload.uid) {
            self.one.insert(ip, workload.clone());
            return;
        }
        let mut list: Vec<_> = holders.iter().filter(|holder| holder.uid != workload.uid).cloned().collect();
        let at = list.partition_point(|holder| holder.uid < workload.uid);
        list.insert(at, workload.clone());
        self.set(ip, list);
    }

    fn remove(&mut self, ip: K, uid: &str) {
        let left = self.holders(&ip).iter().filter(|holder| *holder.uid != *uid).cloned().collect();
        self.set(ip, left);
    }

    fn set(&mut self, ip: K, mut list: Vec<Arc<Workload>>) {
        if list.len() > 1 {
            self.one.remove(&ip);
            self.several.insert(ip, list.into());
            return;
        }
        self.several.remove(&ip);
        match list.pop() {
            Some(one) => _ = self.one.insert(ip, one),
            None => _ = self.one.remove(&ip),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::Profile;

    fn workload(uid: u8, network: u8) -> Arc<Workload> {
        let profile = Profile { network: network.to_string().into(), ..Profile::default() };
        Arc::new(Workload::new(uid.to_string().into(), "", Arc::new(profile)))
    }

    proptest! {
        #[test]
        fn the_first_by_uid_of_a_network_has_an_address(
            steps in prop::collection::vec((any::<bool>(), 0..4u8, 0..3u8, 0..2u8, any::<bool>()), 0..60),
        ) {
            let ip = |at: u8, v6: bool| match v6 {
                false => IpAddr::from([10, 0, 0, at]),
                true => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(at)]),
            };
            let mut table = ByAddress::default();
            let mut naive: BTreeMap<IpAddr, BTreeMap<u8, u8>> = BTreeMap::new();
            for (put, uid, at, network, v6) in steps {
                let ip = ip(at, v6);
                let before = (table.clone(), naive.clone());
                if put {
                    table.put(&ip, &workload(uid, network));
                    naive.entry(ip).or_default().insert(uid, network);
                } else {
                    table.remove(&ip, &uid.to_string());
                    naive.entry(ip).or_default().remove(&uid);
                }
                for (table, naive) in [&before, &(table.clone(), naive.clone())].map(|(t, n)| (t, n)) {
                    for (ip, holders) in naive {
                        for network in 0..2u8 {
                            let wanted = holders.iter().find(|(_, of)| **of == network).map(|(uid, _)| uid.to_string());
                            let found = table.first(ip, &network.to_string()).map(|w| w.uid.to_string());
                            prop_assert_eq!(found, wanted);
                        }
                    }
                }
            }
        }
    }
}
