//! Delta xDS: the server of a control plane, and the client of a node proxy.
//!
//! Both speak `envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources` as Istio's do, so
//! that each may meet its counterpart of another make. Between ourselves there is more, all of it in fields that
//! others ignore:
//!
//! * A server of ours says so in the header `culvert-extensions: 1` of its response. Types of our own are asked for there
//!   only; so a client first asks for one that every server knows, and for the others once the header is there.
//! * A client whose node has the metadata `CULVERT_EXTENSIONS: "1"` gets the fields of our own
//!   ([`proto::Extensions::Culvert`]), and its acknowledgement means that it enforces what it acknowledges.
//! * A state that is longer than one message should be goes to such a client in parts, each acknowledged. The
//!   `system_version_info` of all but the last ends in ` more`; a client of another make gets one long message.
//! * A client that refuses some resources of a response applies the others, and says which it refused: its
//!   `error_detail` has a `google.rpc.BadRequest` with a violation for each, the resource's name in `field`.
//! * A client that comes back says what it holds by hashes ([`inventory`]).
//!
//! Resources are opaque here: names, versions and bytes.
#![forbid(unsafe_code)]

pub mod client;
mod inventory;
#[cfg(test)]
mod pieces;
pub mod server;

/// The key in a node's metadata by which it says which extensions it knows.
pub const EXTENSIONS_METADATA: &str = "CULVERT_EXTENSIONS";
/// The key in a node's metadata by which it says which fields it knows: [`proto::Features::text`].
pub const FEATURES_METADATA: &str = "CULVERT_FEATURES";
/// The key in a waypoint's metadata by which it says which Gateway it is, `NAMESPACE/NAME`. Its token proves it; what is
/// said here finds mistakes.
pub const GATEWAY_METADATA: &str = "CULVERT_GATEWAY";
/// The extensions of this version.
pub const EXTENSIONS_VERSION: &str = "1";
/// The header by which a server says which extensions it knows.
pub const EXTENSIONS_HEADER: &str = "culvert-extensions";
/// What the types of our own begin with.
pub const OWN_TYPES: &str = "type.googleapis.com/culvert.";
/// The type of the detail that names refused resources.
pub const BAD_REQUEST_TYPE_URL: &str = "type.googleapis.com/google.rpc.BadRequest";
