//! The end of pairs: of many at once, since for each look at a namespace the kernel walks the sockets of the whole machine.

use std::collections::HashMap;
use std::io;

use net::sock_diag::Connection;
use net::{Netns, NetnsId};

use super::{END_ATTEMPTS, Pair, Side, Verdicts, destroy, of_pair};
use crate::Error;

/// A pair that is to end.
#[derive(Clone, Copy, Debug)]
pub struct Ending<'n> {
    /// Which.
    pub pair: Pair,
    /// The source's namespace; `None` where it is gone.
    pub source: Option<&'n Netns>,
    /// The destination's.
    pub destination: Option<&'n Netns>,
}

/// What became of the sockets of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended {
    /// So many were ended.
    pub destroyed: usize,
    /// So many are still there. If none is, the pair is forgotten.
    pub left: usize,
}

/// What became of pairs.
#[derive(Debug)]
pub struct EndedPairs {
    /// Of each, in their order; an error where sockets can't be listed or ended: the pair stays revoked.
    pub pairs: Vec<Result<Ended, Error>>,
    /// Looks that this took.
    pub looks: usize,
}

impl Verdicts {
    /// Revokes a pair, ends its sockets at both ends, and forgets it if none is left. An end whose namespace is gone is `None`.
    ///
    /// # Errors
    /// Sockets can't be listed or ended. The pair stays revoked.
    pub fn end(
        &self,
        source: Option<&Netns>,
        destination: Option<&Netns>,
        pair: Pair,
    ) -> Result<Ended, Error> {
        let mut ended = self.end_all(&[Ending { pair, source, destination }], &mut || ());
        ended.pairs.pop().unwrap_or(Ok(Ended { destroyed: 0, left: 0 }))
    }

    /// The same of several pairs, none of them twice: with as many looks as for one, at each of their namespaces. `between` is
    /// called before each.
    pub fn end_all(&self, over: &[Ending<'_>], between: &mut dyn FnMut()) -> EndedPairs {
        let revoked = |ending: &Ending<'_>| self.revoke(ending.pair).map(|_| Ended { destroyed: 0, left: 0 });
        let (mut pairs, mut looks): (Vec<_>, _) = (over.iter().map(revoked).collect(), 0);
        let mut open: Vec<usize> = (0..over.len()).collect();
        for _ in 0..END_ATTEMPTS {
            open.retain(|index| pairs.get(*index).is_some_and(Result::is_ok));
            if open.is_empty() {
                break;
            }
            for ended in pairs.iter_mut().flatten() {
                ended.left = 0;
            }
            for place in places(over, &open) {
                between();
                looks += 1;
                place.end(&mut pairs);
            }
            open.retain(|index| self.is_open(over, &mut pairs, *index));
        }
        EndedPairs { pairs, looks }
    }

    /// Whether a pair has to be looked at again. Forgets it where the last look found nothing.
    fn is_open(&self, over: &[Ending<'_>], pairs: &mut [Result<Ended, Error>], index: usize) -> bool {
        let (Some(ending), Some(outcome)) = (over.get(index), pairs.get_mut(index)) else { return false };
        match outcome {
            Ok(ended) if ended.left > 0 => true,
            Ok(_) => {
                if let Err(error) = self.forget(ending.pair) {
                    *outcome = Err(error);
                }
                false
            }
            Err(_) => false,
        }
    }
}

/// A namespace, with the pairs that have an end in it, by their numbers.
struct Place<'n> {
    netns: &'n Netns,
    sources: HashMap<Pair, usize>,
    destinations: HashMap<Pair, usize>,
}

/// The namespaces of these pairs.
fn places<'n>(over: &[Ending<'n>], open: &[usize]) -> Vec<Place<'n>> {
    let mut places: Vec<Place<'n>> = Vec::new();
    let mut known: HashMap<NetnsId, usize> = HashMap::new();
    for (index, ending) in open.iter().filter_map(|index| Some((*index, over.get(*index)?))) {
        for (netns, side) in [(ending.source, Side::Source), (ending.destination, Side::Destination)] {
            let Some(netns) = netns else { continue };
            let place = *known.entry(netns.id()).or_insert_with(|| {
                places.push(Place { netns, sources: HashMap::new(), destinations: HashMap::new() });
                places.len() - 1
            });
            if let Some(place) = places.get_mut(place) {
                let ends = if side == Side::Source { &mut place.sources } else { &mut place.destinations };
                ends.insert(ending.pair, index);
            }
        }
    }
    places
}

impl Place<'_> {
    /// The pair that a socket belongs to, if it is one of these.
    fn of(&self, socket: &Connection) -> Option<usize> {
        let (local, peer) = (socket.local, socket.peer);
        let found = |side, pair, known: &HashMap<Pair, usize>| {
            known.get(&pair).copied().filter(|_| of_pair(socket, side, pair))
        };
        let source = Pair { source: local.ip(), destination: peer };
        let destination = Pair { source: peer.ip(), destination: local };
        found(Side::Source, source, &self.sources)
            .or_else(|| found(Side::Destination, destination, &self.destinations))
    }

    /// Ends their sockets here.
    fn end(&self, pairs: &mut [Result<Ended, Error>]) {
        let mut found = Vec::new();
        let outcome = destroy(self.netns, |socket| {
            let index = self.of(socket);
            found.extend(index);
            index.is_some()
        });
        for index in found {
            if let Some(Ok(ended)) = pairs.get_mut(index) {
                ended.destroyed += 1;
                ended.left += 1;
            }
        }
        let Err(error) = outcome else { return };
        for index in self.sources.values().chain(self.destinations.values()) {
            if let Some(outcome) = pairs.get_mut(*index) {
                *outcome =
                    Err(Error::io("end connections of", self.netns)(io::Error::other(error.to_string())));
            }
        }
    }
}
