//! A response as the server has it: the resources are bytes that were encoded once, for everyone.

use bytes::Bytes;
use proto::Extensions;

use super::store::Generation;

/// What stands behind the generation in `system_version_info` of a response that others complete.
const MORE: &str = " more";

/// `envoy.service.discovery.v3.DeltaDiscoveryResponse`, of which the resources are encoded already: on the wire a
/// message and bytes are the same.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// The generation that the client has reached with this, and ` more` when others follow, which belong to it.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// `Resource` messages.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    /// Their type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// What the client answers with.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names that are gone, or not there.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// What `system_version_info` says. Only our own proxies are sent states in parts.
pub(crate) fn version_info(generation: Generation, more: bool) -> String {
    format!("{generation}{}", if more { MORE } else { "" })
}

/// Whether a response with this `system_version_info` is completed by others. That of other control planes never
/// is: they send a state whole.
pub(crate) fn has_more(system_version_info: &str) -> bool {
    let generation = system_version_info.strip_suffix(MORE);
    generation.is_some_and(|g| !g.is_empty() && g.bytes().all(|b| b.is_ascii_digit()))
}

/// Collects a response until it is full.
pub(super) struct Parts {
    pub(super) resources: Vec<Bytes>,
    pub(super) removed: Vec<String>,
    size: usize,
    limit: usize,
}

impl Parts {
    /// The response to one audience: at most `limit` bytes, if the audience understands parts.
    pub(super) fn new(audience: Extensions, limit: usize) -> Self {
        let limit = match audience {
            Extensions::Culvert => limit,
            Extensions::None => usize::MAX,
        };
        Self { resources: Vec::new(), removed: Vec::new(), size: 0, limit }
    }

    /// Whether nothing more goes in. An empty one always takes something.
    pub(super) fn full(&self, next: usize) -> bool {
        self.size > 0 && self.size.saturating_add(next) > self.limit
    }

    pub(super) fn set(&mut self, encoded: &Bytes) {
        // A tag, and a length of up to four bytes.
        self.size += encoded.len() + 5;
        self.resources.push(encoded.clone());
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.size += name.len() + 3;
        self.removed.push(name.to_owned());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.resources.is_empty() && self.removed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_mark_says_that_more_follows() {
        assert!(has_more(&version_info(Generation(7), true)));
        assert!(!has_more(&version_info(Generation(7), false)));
        for other in ["", " more", "v1 more", "2026-11-21T10:00:00Z/7", "7 more "] {
            assert!(!has_more(other), "{other:?}");
        }
    }
}
