//! What is known of a request that has ended, by the names that expressions have for it.

use std::borrow::Cow;

/// A value while an expression is worked out.
#[derive(Clone, PartialEq, Debug)]
pub enum Value<'a> {
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction; of durations, seconds.
    Float(f64),
    /// A text.
    Text(Cow<'a, str>),
}

/// The type of a value, known before there is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    /// A truth value.
    Bool,
    /// A whole number.
    Int,
    /// A number with a fraction.
    Float,
    /// A text.
    Text,
}

/// A value that is asked for and not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missing;

/// Whose fields.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Headers {
    /// The request's.
    Request,
    /// The response's.
    Response,
}

/// What is known of a request that has ended.
pub trait Facts {
    /// The value of an attribute, of the attribute's type.
    ///
    /// # Errors
    /// This request has none.
    fn attribute(&self, attribute: Attribute) -> Result<Value<'_>, Missing>;

    /// The value of a field, by its name in lower case; several are joined by commas.
    ///
    /// # Errors
    /// There is none, or it is no text.
    fn header(&self, of: Headers, name: &str) -> Result<Cow<'_, str>, Missing>;
}

macro_rules! attributes {
    ($($name:literal $variant:ident $kind:ident $doc:literal,)*) => {
        /// What expressions can ask for beside header fields. The names are those of Envoy's attributes.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Attribute {
            $(#[doc = $doc] $variant,)*
        }

        impl Attribute {
            /// All of them, by name.
            pub const ALL: &'static [(&'static str, Self, Type)] = &[$(($name, Self::$variant, Type::$kind),)*];
        }
    };
}

attributes! {
    "request.path" RequestPath Text "The path with its query, as it was sent on.",
    "request.url_path" RequestUrlPath Text "The path without its query.",
    "request.query" RequestQuery Text "The query, without its question mark.",
    "request.host" RequestHost Text "The authority.",
    "request.scheme" RequestScheme Text "`http` or `https`.",
    "request.method" RequestMethod Text "The method.",
    "request.referer" RequestReferer Text "The field `Referer`.",
    "request.useragent" RequestUserAgent Text "The field `User-Agent`.",
    "request.id" RequestId Text "The field `X-Request-Id`.",
    "request.protocol" RequestProtocol Text "`HTTP/1.1` or `HTTP/2`.",
    "request.size" RequestSize Int "The bytes of its body.",
    "request.total_size" RequestTotalSize Int "The bytes of its head and body.",
    "request.duration" RequestDuration Float "How long it took, in seconds.",
    "response.code" ResponseCode Int "The status; 0 if none was sent.",
    "response.code_details" ResponseCodeDetails Text "Why it is as it is, in a word.",
    "response.flags" ResponseFlags Int "Envoy's response flags, as the bits of a number.",
    "response.grpc_status" ResponseGrpcStatus Int "The status of gRPC.",
    "response.size" ResponseSize Int "The bytes of its body.",
    "response.total_size" ResponseTotalSize Int "The bytes of its head and body.",
    "connection.mtls" ConnectionMtls Bool "Whether both ends of the client's connection proved who they are.",
    "connection.requested_server_name" ConnectionServerName Text "The server name of the client's TLS handshake.",
    "connection.uri_san_peer_certificate" ConnectionPeer Text "The client's identity.",
    "source.address" SourceAddress Text "The client's address and port.",
    "source.port" SourcePort Int "The client's port.",
    "source.workload" SourceWorkload Text "The client's workload. Ours.",
    "source.namespace" SourceNamespace Text "The client's namespace. Ours.",
    "destination.address" DestinationAddress Text "Where the client meant to connect.",
    "destination.port" DestinationPort Int "The port of that.",
    "upstream.address" UpstreamAddress Text "The endpoint's address and port.",
    "upstream.port" UpstreamPort Int "The endpoint's port.",
    "upstream.request_attempt_count" UpstreamAttempts Int "How often it was sent.",
    "xds.route_name" RouteName Text "The route.",
    "xds.cluster_name" ClusterName Text "The service and port that it was sent to, as Istio names clusters.",
}

impl Attribute {
    /// The attribute of a name, and its type.
    #[must_use]
    pub fn named(name: &str) -> Option<(Self, Type)> {
        Self::ALL.iter().find(|(n, ..)| *n == name).map(|(_, attribute, kind)| (*attribute, *kind))
    }
}
