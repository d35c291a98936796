//! The ends of connections that are noted: those that live, and those that are over.

use std::collections::BTreeMap;

use super::{Carried, Listing, Verdicts, held, is_absent, removed};
use crate::Error;
use crate::layout::{CONNECTIONS_LIMIT, Record};

impl Verdicts {
    /// The ends of connections that are noted. Takes a while where there are many.
    ///
    /// # Errors
    /// They can't be read.
    pub fn connections(&self) -> Result<Listing, Error> {
        let mut connections = held(&self.connections);
        let mut listing = Listing::default();
        // When one ends that was read last, the kernel begins again: none is twice in the list, and it has an end.
        let all = connections.iter().take(2 * CONNECTIONS_LIMIT as usize).flatten();
        let all: BTreeMap<u64, Record> = all.collect();
        for (socket, record) in all {
            if record.closed == 0 {
                listing.open.push(Carried::from(record));
            } else if removed(connections.remove(&socket), "connections")? {
                listing.closed.push(Carried::from(record));
            }
        }
        if !listing.closed.is_empty() {
            self.count_open(listing.open.len())?;
        }
        Ok(listing)
    }

    /// Puts the number right by which further connections are declined: what was listed as closed was still counted. Connections
    /// that begin or end meanwhile make it wrong by as many, until it is put right again.
    fn count_open(&self, count: usize) -> Result<(), Error> {
        held(&self.open).set(0, count as u64, 0).map_err(Error::map("write", "open"))
    }

    /// Ends of connections that are over, at most `limit`; each is given out once.
    ///
    /// # Errors
    /// They can't be read.
    pub fn closed(&self, limit: usize) -> Result<Vec<Carried>, Error> {
        let mut ended = held(&self.ended);
        let mut closed = Vec::new();
        while closed.len() < limit {
            match ended.pop(0) {
                Ok(record) => closed.push(Carried::from(record)),
                Err(error) if is_absent(&error) => break,
                Err(error) => return Err(Error::map("read", "ended")(error)),
            }
        }
        Ok(closed)
    }
}
