//! Where connections go that a pod asks for.

use std::net::{IpAddr, SocketAddr};

use super::socket_address;
use crate::layout::{Address, OFFER_BINDS, OFFER_ENDPOINTS, OfferEntry};

/// Where a connection goes that a pod asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The pod's address, of the endpoints' family.
    pub source: IpAddr,
    /// Of these the kernel takes any, as often as its weight says: 1 to [`OFFER_ENDPOINTS`], and weights above 0.
    pub endpoints: Vec<(SocketAddr, u32)>,
    /// Binds the socket to the source first: for pods that have several addresses of the family.
    pub bind: bool,
}

impl OfferEntry {
    pub(super) fn new(offer: &Offer) -> Option<Self> {
        let count = u32::try_from(offer.endpoints.len()).ok()?;
        if offer.endpoints.is_empty() || offer.endpoints.len() > OFFER_ENDPOINTS {
            return None;
        }
        let mut entry = Self {
            source: Address::new(offer.source).octets,
            count,
            flags: if offer.bind { OFFER_BINDS } else { 0 },
            ..Self::default()
        };
        let total: u64 = offer.endpoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
        // So many bits are too many for the sum; a small weight stays one.
        let beyond = 64 - (total >> 32).leading_zeros();
        let beyond = if beyond == 0 { 0 } else { beyond + 1 };
        let places = entry.addresses.iter_mut().zip(&mut entry.ports).zip(&mut entry.sums);
        let mut sum: u32 = 0;
        for (((address, port), until), (endpoint, weight)) in places.zip(&offer.endpoints) {
            if *weight == 0 {
                return None;
            }
            *address = Address::new(endpoint.ip()).octets;
            *port = endpoint.port();
            sum = sum.checked_add((weight >> beyond).max(1))?;
            *until = sum;
        }
        Some(entry)
    }

    pub(super) fn read(&self) -> Offer {
        let count = usize::try_from(self.count).unwrap_or(OFFER_ENDPOINTS);
        let before = std::iter::once(&0).chain(&self.sums);
        let weights = self.sums.iter().zip(before).map(|(until, before)| until.saturating_sub(*before));
        let endpoints = self.addresses.iter().zip(&self.ports).zip(weights).take(count);
        Offer {
            source: IpAddr::from(self.source).to_canonical(),
            endpoints: endpoints
                .map(|((address, port), weight)| (socket_address(*address, *port), weight))
                .collect(),
            bind: self.flags & OFFER_BINDS != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(weights: &[u32]) -> Offer {
        let at = |(port, weight): (u16, &u32)| (SocketAddr::from(([10, 0, 0, 1], port)), *weight);
        let endpoints = (80..).zip(weights).map(at).collect();
        Offer { source: [10, 0, 0, 9].into(), endpoints, bind: true }
    }

    #[test]
    fn an_offer_is_read_as_it_was_written() {
        for weights in [&[1][..], &[3, 1], &[1, 2, 3, 4, 5, 6, 7, 1000]] {
            let offer = offer(weights);
            assert_eq!(OfferEntry::new(&offer).unwrap().read(), offer);
        }
        for weights in [&[][..], &[1, 0], &[1; 9]] {
            assert!(OfferEntry::new(&offer(weights)).is_none(), "{weights:?}");
        }
    }

    #[test]
    fn weights_of_any_size_keep_what_they_are_of_each_other() {
        let wanted = [u32::MAX, u32::MAX / 4, 1];
        let found = OfferEntry::new(&offer(&wanted)).unwrap().read();
        let [large, fourth, small] = found.endpoints.as_slice() else { panic!("{found:?}") };
        assert_eq!((large.1 / fourth.1, small.1), (4, 1));
        let most = OfferEntry::new(&offer(&[u32::MAX; 8])).unwrap();
        assert!(most.read().endpoints.iter().all(|(_, weight)| *weight == most.sums[0]));
    }
}
