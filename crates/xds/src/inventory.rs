//! What a client holds, in 26 bytes a resource: in `initial_resource_versions` it is five times as long, and takes as
//! many allocations to read as there are resources.
//!
//! ```text
//!   entry       first 16 bytes of SHA-256 of the name │ the version, 10 bytes
//!   inventory   entries in the order of their bytes
//! ```
//!
//! Only a server of ours reads this. A name that is gone, and of which it has the hash only, it calls `#` and the hash in
//! hexadecimal digits. No resource has such a name: those of workloads, services and policies
//! have a slash.
//!
//! Names of pods are made by tenants: a hash of 16 bytes is long enough that nobody finds two names with the same.

use std::fmt;

use aws_lc_rs::digest;

const KEY_BYTES: usize = 16;
const VERSION_BYTES: usize = 10;
const ENTRY_BYTES: usize = KEY_BYTES + VERSION_BYTES;

/// A name's hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct NameKey([u8; KEY_BYTES]);

impl NameKey {
    pub(crate) fn of(name: &str) -> Self {
        let mut key = [0; KEY_BYTES];
        let hash = digest::digest(&digest::SHA256, name.as_bytes());
        key.iter_mut().zip(hash.as_ref()).for_each(|(k, h)| *k = *h);
        Self(key)
    }

    /// Reads what [`Display`](fmt::Display) wrote.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex(text.strip_prefix('#')?).map(Self)
    }
}

impl fmt::Display for NameKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("#")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Bytes that are written as so many pairs of lower-case digits.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |d: u8| match d {
        b'0'..=b'9' => Some(d - b'0'),
        b'a'..=b'f' => Some(d - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = *pair else { return None };
        *byte = digit(high)? << 4 | digit(low)?;
    }
    Some(bytes)
}

/// A version as our own servers make them: see `server::store`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Version(pub(crate) [u8; VERSION_BYTES]);

impl Version {
    /// Reads one; `None` for a version of another make.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex(text).map(Self)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Writes an inventory.
pub(crate) fn write<'a>(held: impl Iterator<Item = (&'a str, Version)>) -> Vec<u8> {
    let mut entries: Vec<(NameKey, Version)> = held.map(|(name, v)| (NameKey::of(name), v)).collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for (key, version) in entries {
        bytes.extend_from_slice(&key.0);
        bytes.extend_from_slice(&version.0);
    }
    bytes
}

/// An inventory that is compared with what there is.
pub(crate) struct Inventory<'a> {
    entries: &'a [[u8; ENTRY_BYTES]],
    /// Which entries were asked for.
    found: Vec<bool>,
}

impl<'a> Inventory<'a> {
    /// Reads one; `None` if it is none.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (entries, []) = bytes.as_chunks() else { return None };
        let sorted = entries.is_sorted_by(|a, b| key(a) < key(b));
        sorted.then(|| Self { entries, found: vec![false; entries.len()] })
    }

    /// The version of a name, if it is there. Asked for each resource of each client that comes back.
    pub(crate) fn take(&mut self, name: NameKey) -> Option<Version> {
        let place = self.find(name)?;
        *self.found.get_mut(place)? = true;
        let (_, version) = self.entries.get(place)?.split_last_chunk()?;
        Some(Version(*version))
    }

    /// Hashes are spread evenly: a name stands near its share of all, which saves most of the jumps through memory.
    fn find(&self, name: NameKey) -> Option<usize> {
        /// Further off stands hardly one in a million entries.
        const NEAR: usize = 2048;
        let (share, _) = name.0.split_first_chunk()?;
        let about = (u128::from(u64::from_be_bytes(*share)) * self.entries.len() as u128) >> 64;
        let first = usize::try_from(about).ok()?.saturating_sub(NEAR);
        let near = self.entries.get(first..self.entries.len().min(first + 2 * NEAR))?;
        let order = |entry: &[u8; ENTRY_BYTES]| key(entry).cmp(&name);
        let found = near.binary_search_by(order).map(|place| first + place);
        found.or_else(|_| self.entries.binary_search_by(order)).ok()
    }

    /// The names that were not asked for.
    pub(crate) fn rest(&self) -> impl Iterator<Item = NameKey> {
        let rest = self.entries.iter().zip(&self.found).filter(|(_, found)| !**found);
        rest.map(|(entry, _)| key(entry))
    }
}

fn key(entry: &[u8; ENTRY_BYTES]) -> NameKey {
    let mut key = [0; KEY_BYTES];
    key.iter_mut().zip(entry).for_each(|(k, e)| *k = *e);
    NameKey(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(n: u8) -> Version {
        Version([n; VERSION_BYTES])
    }

    #[test]
    fn what_was_written_is_found() {
        let names: Vec<String> = (0..200).map(|n| format!("Kubernetes//Pod/shop/cart-{n}")).collect();
        let bytes = write(names.iter().enumerate().map(|(n, name)| (name.as_str(), version(n as u8))));
        assert_eq!(bytes.len(), 200 * ENTRY_BYTES);
        let mut inventory = Inventory::parse(&bytes).unwrap();
        for (n, name) in names.iter().enumerate().skip(2) {
            assert_eq!(inventory.take(NameKey::of(name)), Some(version(n as u8)));
        }
        assert_eq!(inventory.take(NameKey::of("another")), None);
        let mut rest: Vec<_> = inventory.rest().collect();
        rest.sort_unstable();
        let mut wanted = [NameKey::of(&names[0]), NameKey::of(&names[1])];
        wanted.sort_unstable();
        assert_eq!(rest, wanted);
    }

    #[test]
    fn what_is_none_is_refused() {
        let bytes = write([("a", version(1)), ("b", version(2))].into_iter());
        assert!(Inventory::parse(&bytes).is_some() && Inventory::parse(&[]).is_some());
        assert!(Inventory::parse(&bytes[1..]).is_none(), "a part");
        let (first, second) = bytes.split_at(ENTRY_BYTES);
        assert!(Inventory::parse(&[second, first].concat()).is_none(), "not sorted");
        assert!(Inventory::parse(&[first, first].concat()).is_none(), "twice");
    }

    #[test]
    fn hashes_and_versions_are_read_as_they_are_written() {
        let key = NameKey::of("shop/only-cart");
        assert_eq!(NameKey::parse(&key.to_string()), Some(key));
        assert_eq!(Version::parse(&version(0xa7).to_string()), Some(version(0xa7)));
        for other in
            ["", "#", "shop/only-cart", "#00", &key.to_string()[1..], "#ABCDEF00000000000000000000000000"]
        {
            assert_eq!(NameKey::parse(other), None, "{other:?}");
        }
        for other in ["", "7", "2026-11-21T10:00:00Z", "ABCDEF0000ABCDEF0000", "00000000000000000000\u{e9}"] {
            assert_eq!(Version::parse(other), None, "{other:?}");
        }
    }
}
