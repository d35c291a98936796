//! A hash that is the same in every process and version: all replicas of a waypoint send a key to the same endpoint.

use crate::partition::mixed;

/// The hash of a name or key. No secret: whoever chooses keys can choose ones that meet.
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    let mut state = bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        if let Some(word) = word.get_mut(..chunk.len()) {
            word.copy_from_slice(chunk);
        }
        state = mixed(state ^ u64::from_le_bytes(word));
    }
    mixed(state)
}

/// The hash of a hash and a number.
pub(crate) fn derived(hash: u64, number: u64) -> u64 {
    mixed(hash ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_what_it_is() {
        // Another value would send every client of every release before to another endpoint.
        assert_eq!(hash(b""), 0xe220_a839_7b1d_cdaf);
        assert_eq!(hash(b"10.0.0.1:8080"), 0x6430_3d62_1202_8b6e);
        assert_ne!(hash(b"a"), hash(b"a\0"));
    }
}
