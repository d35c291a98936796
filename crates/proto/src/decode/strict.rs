//! Messages of which nothing may be skipped.

use prost::Message;

use super::{Fault, Problem};

/// Reads a message of a type of our own, and refuses one that would be written otherwise: it has a field, or a value,
/// that this version does not know. Those who write it write it as this crate does.
pub(super) fn strict<M: Message + Default>(bytes: &[u8]) -> Result<M, Problem> {
    let message = M::decode(bytes).map_err(|error| Problem::Bytes(error.to_string()))?;
    // The lengths differ nearly always when anything does.
    if message.encoded_len() != bytes.len() || message.encode_to_vec() != bytes {
        return Err(Problem::Newer);
    }
    Ok(message)
}

/// What must be there.
pub(super) fn needed<'a, T>(part: Option<&'a T>, field: &str) -> Result<&'a T, Fault> {
    part.ok_or_else(|| Fault::new(field, Problem::Missing))
}
