//! Who has an address: a workload, or several; the first by uid is the one that counts. Of nearly all only a pointer is kept: the
//! address is read in the workload.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
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

/// An address of one family.
trait Ip: Hash + Eq + Copy + 'static {
    /// What is looked for in a table where there is none.
    const NONE: &'static Self;

    fn of(ip: &IpAddr) -> Option<&Self>;
}

impl Ip for Ipv4Addr {
    const NONE: &'static Self = &Self::UNSPECIFIED;

    fn of(ip: &IpAddr) -> Option<&Self> {
        if let IpAddr::V4(ip) = ip { Some(ip) } else { None }
    }
}

impl Ip for Ipv6Addr {
    const NONE: &'static Self = &Self::UNSPECIFIED;

    fn of(ip: &IpAddr) -> Option<&Self> {
        if let IpAddr::V6(ip) = ip { Some(ip) } else { None }
    }
}

/// The only address that a workload has of a family, as nearly all have; `None` where it has none or several.
fn only<K: Ip>(workload: &Workload) -> Option<&K> {
    let mut all = workload.addresses.iter().filter_map(K::of);
    all.next().filter(|_| all.next().is_none())
}

/// A workload that is found by the only address that it has of a family.
#[derive(Debug)]
struct Holder<K>(Arc<Workload>, PhantomData<K>);

impl<K> Clone for Holder<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<K: Ip> Borrow<K> for Holder<K> {
    fn borrow(&self) -> &K {
        only(&self.0).unwrap_or(K::NONE)
    }
}

impl<K: Ip> PartialEq for Holder<K> {
    fn eq(&self, other: &Self) -> bool {
        only::<K>(&self.0) == only::<K>(&other.0)
    }
}

impl<K: Ip> Eq for Holder<K> {}

impl<K: Ip> Hash for Holder<K> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Borrow::<K>::borrow(self).hash(state);
    }
}

/// An address is in one of the tables at most.
#[derive(Clone, Debug)]
struct Family<K> {
    /// Of which one workload is the holder, that has no other address of the family.
    one: CowMap<Holder<K>, ()>,
    /// All others, each with its holders by uid.
    others: CowMap<K, Arc<[Arc<Workload>]>>,
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self { one: CowMap::default(), others: CowMap::default() }
    }
}

impl<K: Ip> Family<K> {
    fn holders(&self, ip: &K) -> &[Arc<Workload>] {
        match self.one.get_key(ip) {
            Some(Holder(one, _)) => std::slice::from_ref(one),
            None if self.others.is_empty() => &[],
            None => self.others.get(ip).map_or(&[], |list| list),
        }
    }

    fn put(&mut self, ip: K, workload: &Arc<Workload>) {
        let others = self.holders(&ip).iter().filter(|holder| holder.uid != workload.uid);
        let mut list: Vec<_> = others.cloned().collect();
        let at = list.partition_point(|holder| holder.uid < workload.uid);
        list.insert(at, workload.clone());
        self.set(ip, list);
    }

    fn remove(&mut self, ip: K, uid: &str) {
        let left = self.holders(&ip).iter().filter(|holder| *holder.uid != *uid).cloned().collect();
        self.set(ip, left);
    }

    fn set(&mut self, ip: K, mut list: Vec<Arc<Workload>>) {
        let one = if list.len() == 1 { list.pop_if(|one| only(one) == Some(&ip)) } else { None };
        match one {
            Some(one) => self.one.replace(Holder(one, PhantomData), ()),
            None => _ = self.one.remove(&ip),
        }
        if list.is_empty() {
            self.others.remove(&ip);
        } else {
            self.others.insert(ip, list.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::Profile;

    fn workload(uid: u8, network: u8, addresses: &[IpAddr]) -> Arc<Workload> {
        let profile = Profile { network: network.to_string().into(), ..Profile::default() };
        let workload = Workload::new(uid.to_string().into(), "", Arc::new(profile));
        Arc::new(workload.with(|w| w.addresses = addresses.into()))
    }

    fn ip((at, v6): (u8, bool)) -> IpAddr {
        match v6 {
            false => IpAddr::from([10, 0, 0, at]),
            true => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(at)]),
        }
    }

    proptest! {
        #[test]
        fn the_first_by_uid_of_a_network_has_an_address(
            steps in prop::collection::vec(
                (0..4u8, 0..2u8, prop::collection::btree_set((0..3u8, any::<bool>()), 0..4)), 0..60
            ),
        ) {
            let mut table = ByAddress::default();
            let mut naive: BTreeMap<u8, (u8, Vec<IpAddr>)> = BTreeMap::new();
            for (uid, network, addresses) in steps {
                let before = (table.clone(), naive.clone());
                let addresses: Vec<IpAddr> = addresses.into_iter().map(ip).collect();
                let old = naive.insert(uid, (network, addresses.clone())).unwrap_or_default().1;
                old.iter().filter(|ip| !addresses.contains(ip)).for_each(|ip| table.remove(ip, &uid.to_string()));
                let workload = workload(uid, network, &addresses);
                addresses.iter().for_each(|ip| table.put(ip, &workload));
                for (table, naive) in [&before, &(table.clone(), naive.clone())].map(|(t, n)| (t, n)) {
                    for ip in (0..3).flat_map(|at| [ip((at, false)), ip((at, true))]) {
                        for network in 0..2u8 {
                            let wanted = naive.iter().find(|(_, (of, has))| *of == network && has.contains(&ip));
                            let found = table.first(&ip, &network.to_string());
                            prop_assert_eq!(
                                found.map(|w| (w.uid.to_string(), w.addresses.to_vec())),
                                wanted.map(|(uid, (_, has))| (uid.to_string(), has.clone()))
                            );
                        }
                    }
                }
            }
        }
    }
}
