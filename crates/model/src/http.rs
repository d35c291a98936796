//! HTTP: what decisions read of a request, and the pure decisions over it. Which route takes it ([`RouteTable`]),
//! what is done with it ([`Route`]), how the destination is spoken to ([`TrafficPolicy`]), and what a policy asks of
//! it ([`HttpMatch`], evaluated by the same code as connections are).
//!
//! Invariants of the module:
//! * a regular expression exists only compiled, within a size limit, and matches in linear time;
//! * a decision allocates nothing unless a header is there more than once;
//! * nothing here knows a wire format: header names are lower-case, a path has no query.

mod authentication;
mod authorizer;
mod format;
mod matcher;
mod path;
mod policy;
mod rate_limit;
mod request;
mod route;
mod service;
mod stream;
mod table;
mod traffic;

pub use authentication::{ClaimHeader, KeySource, RequestAuthentication, TokenPlace, TokenRule};
pub use authorizer::{Authorizer, BodyCheck, HttpCheck, ProviderAddress};
pub use format::{Command, FieldText, Format, FormatPart, InvalidFormat};
pub use matcher::{
    HeaderMatch, InvalidPattern, PathMatch, Pattern, QueryMatch, Regex, RouteMatch, SourceFacts, SourceMatch,
};
pub use path::{InvalidPath, Normalization, normalize};
pub use policy::{Attribute, AttributeMatch, HttpMatch, InvalidTemplate, PathPattern, Template};
pub(crate) use policy::{Readings, matches_host};
pub use rate_limit::{Bucket, Count, GlobalLimit, Limit, LimitHeaders, LimitKey, LimitMatch, RateLimit};
pub use request::{Claims, Headers, Request};
pub use route::{
    Abort, Authority, Backend, BackendRef, Cors, Fault, Forward, HeaderEdit, HeaderEdits, HostRewrite,
    Mirror, Origin, PathRewrite, Percent, Redirect, Respond, Retry, RetryOn, Route, RouteAction, RouteId,
    RouteKind, Substitution, Timeouts, is_authority,
};
pub use service::{HttpPort, HttpService, LedTo, Protocol, WaypointKey};
pub use stream::{SelectedStream, ServerName, Stream, StreamMatch, StreamRoute, StreamTable};
pub use table::{RouteTable, Selected};
pub use traffic::{
    ConnectionPool, Distribution, HashKey, HashTable, LoadBalancer, LocalitySetting, Outliers, RetryBudget,
    ServiceTraffic, Subset, TlsOrigination, TrafficPolicy, Warmup,
};
