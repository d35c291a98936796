//! Who else is asked about requests: extension providers with the action CUSTOM.

use std::time::Duration;

use crate::{Str, StringMatch};

/// A service that something else is asked of: an external authorizer, a rate-limit service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ProviderAddress {
    /// The namespace of who defines it, where several define one host name.
    pub namespace: Option<Str>,
    /// Its host name, in lower case, such as `authz.shop.svc.cluster.local`.
    pub host: Str,
    /// Its port.
    pub port: u16,
}

/// An external authorizer (`envoyExtAuthzHttp`, `envoyExtAuthzGrpc`). Policies name it ([`crate::Action::Custom`]); one
/// that is named and not known refuses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authorizer {
    /// Its name, the only one of its kind.
    pub name: Str,
    /// Where it is.
    pub address: ProviderAddress,
    /// How requests are given to it over HTTP; `None` for gRPC.
    pub http: Option<HttpCheck>,
    /// How long its answer is waited for.
    pub timeout: Option<Duration>,
    /// Whether requests pass that it does not answer for.
    pub fail_open: bool,
    /// Whether the route is chosen again after it has answered. A waypoint chooses it afterwards in any case.
    pub clear_route_cache: bool,
    /// The status of requests that it does not answer for; 403 unless it is said.
    pub status_on_error: Option<u16>,
    /// How much of a request's body it is given; nothing if left out.
    pub body: Option<BodyCheck>,
}

/// What of a body an authorizer is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BodyCheck {
    /// At most so many bytes.
    pub max_bytes: u32,
    /// Whether it is given a part of a larger one, which is refused otherwise.
    pub allow_partial: bool,
    /// Whether it is given as bytes, not as text. Means something to gRPC only.
    pub as_bytes: bool,
}

/// What of a request an authorizer over HTTP is given, and what of its answer is kept. Names of headers are in lower
/// case.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HttpCheck {
    /// What its path begins with.
    pub path_prefix: Option<Str>,
    /// Headers of the request that it is given, beside `Host`, method, path, length and `Authorization`.
    pub request_headers: Box<[StringMatch]>,
    /// Headers that it is given besides.
    pub additional_headers: Box<[(Str, Str)]>,
    /// Headers of its answer that the service gets when it allows.
    pub to_upstream_on_allow: Box<[StringMatch]>,
    /// Headers of its answer that the client gets when it refuses; all of them if none is named.
    pub to_downstream_on_deny: Box<[StringMatch]>,
    /// Headers of its answer that the client gets when it allows.
    pub to_downstream_on_allow: Box<[StringMatch]>,
}
