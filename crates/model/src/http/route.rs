//! What is done with a request that a route takes. All of it is data; the waypoint does it.

use std::fmt;
use std::time::Duration;

use http::{HeaderName, HeaderValue};

use super::Regex;
use crate::{ServiceKey, Str};

/// A route: of a rule of an HTTPRoute or GRPCRoute, of an entry of a VirtualService's `http`, or the one that a service
/// without routes has.
#[derive(Clone, PartialEq, Debug)]
pub struct Route {
    /// Where it is written.
    pub id: RouteId,
    /// Where the request goes.
    pub action: RouteAction,
    /// Changes of the request's fields.
    pub request_headers: HeaderEdits,
    /// Changes of the response's fields.
    pub response_headers: HeaderEdits,
    /// What the path becomes.
    pub path: Option<PathRewrite>,
    /// What the authority becomes.
    pub host: Option<HostRewrite>,
    /// Who gets a copy. Their answers are not waited for.
    pub mirrors: Box<[Mirror]>,
    /// What is made to fail.
    pub fault: Fault,
    /// Which pages of other origins may call it.
    pub cors: Option<Box<Cors>>,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// When it is tried again.
    pub retry: Option<Retry>,
}

impl Route {
    /// One that does `action`, and nothing beside.
    #[must_use]
    pub fn new(action: RouteAction) -> Self {
        Self {
            id: RouteId::default(),
            action,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            path: None,
            host: None,
            mirrors: Box::default(),
            fault: Fault::default(),
            cors: None,
            timeouts: Timeouts::default(),
            retry: None,
        }
    }

    /// Whether it is no route that somebody wrote, but stands at a table's end for what none of them takes.
    #[must_use]
    pub fn is_for_the_rest(&self) -> bool {
        self.id.kind == RouteKind::Default && matches!(self.action, RouteAction::Respond(_))
    }
}

/// The place where a route is written: what logs, `why` and metrics name.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct RouteId {
    /// The kind of the resource.
    pub kind: RouteKind,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// The rule's place in it, from 0.
    pub rule: u32,
    /// The rule's name, where it has one.
    pub rule_name: Option<Str>,
}

impl fmt::Display for RouteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        if self.kind == RouteKind::Default {
            return f.write_str(kind);
        }
        write!(f, "{kind} {}/{} rule {}", self.namespace, self.name, self.rule)?;
        self.rule_name.as_ref().map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

/// The kind of resource that a route is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum RouteKind {
    /// None: the service has no routes.
    #[default]
    Default,
    /// `gateway.networking.k8s.io` HTTPRoute.
    HttpRoute,
    /// `gateway.networking.k8s.io` GRPCRoute.
    GrpcRoute,
    /// `networking.istio.io` VirtualService.
    VirtualService,
    /// `gateway.networking.k8s.io` TCPRoute.
    TcpRoute,
    /// `gateway.networking.k8s.io` TLSRoute.
    TlsRoute,
}

impl RouteKind {
    /// Its name as in `kind`; `default` where it is none.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::VirtualService => "VirtualService",
            Self::TcpRoute => "TCPRoute",
            Self::TlsRoute => "TLSRoute",
        }
    }
}

/// Where a request goes.
#[derive(Clone, PartialEq, Debug)]
pub enum RouteAction {
    /// To one of several back ends.
    Forward(Forward),
    /// Nowhere: the client is told another place.
    Redirect(Box<Redirect>),
    /// Nowhere: it is answered here.
    Respond(Box<Respond>),
}

impl Default for RouteAction {
    fn default() -> Self {
        Self::Forward(Forward::new(Vec::new()))
    }
}

/// Back ends with weights.
#[derive(Clone, PartialEq, Debug)]
pub struct Forward {
    backends: Box<[Backend]>,
    /// Sum of the weights up to and with the back end at this place.
    sums: Box<[u64]>,
}

impl Forward {
    /// `backends`, each chosen in proportion to its weight.
    #[must_use]
    pub fn new(backends: Vec<Backend>) -> Self {
        let sums = backends.iter().scan(0, |sum, b| {
            *sum += u64::from(b.weight);
            Some(*sum)
        });
        Self { sums: sums.collect(), backends: backends.into() }
    }

    /// The back ends.
    #[must_use]
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// The one that `random` falls to, by weight. `None` where all weights are zero: such a route answers 500 (Gateway
    /// API, HTTPRoute `backendRefs`).
    #[must_use]
    pub fn choose(&self, random: u64) -> Option<&Backend> {
        let total = *self.sums.last()?;
        let point = random.checked_rem(total)?;
        self.backends.get(self.sums.partition_point(|sum| *sum <= point))
    }
}

/// A back end of a route.
#[derive(Clone, PartialEq, Debug)]
pub struct Backend {
    /// What it is.
    pub to: BackendRef,
    /// Its share of the requests.
    pub weight: u32,
    /// Changes of the fields of requests to it, after those of the route.
    pub request_headers: HeaderEdits,
    /// Changes of the fields of its responses, before those of the route.
    pub response_headers: HeaderEdits,
}

/// What a back end is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackendRef {
    /// A service's port.
    Service {
        /// The service.
        service: ServiceKey,
        /// The service's port.
        port: u16,
        /// A subset of it, by the name that a DestinationRule gives it.
        subset: Option<Str>,
    },
    /// The endpoint that the client dialled: a headless service's pod, or an external address.
    Original,
    /// Nothing that is there, or that may be referred to: requests that fall to it are answered 500 (Gateway API, HTTPRoute
    /// `backendRefs`).
    Unresolved {
        /// What is wrong, for logs and `why`.
        reason: Str,
    },
}

/// Changes of fields, in order: what is removed, what is set, what is added.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HeaderEdits(pub Box<[HeaderEdit]>);

/// One change. Values may have Envoy's `%COMMANDS%`; the ones that are not known were refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HeaderEdit {
    /// All fields of the name go.
    Remove(HeaderName),
    /// All fields of the name go, and this one comes.
    Set(HeaderName, HeaderValue),
    /// Comes beside those that are there.
    Add(HeaderName, HeaderValue),
}

/// What the path of a request becomes. The query stays.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathRewrite {
    /// All of it.
    Full(Str),
    /// What the route's path match matched. Between it and the rest there is one slash, if there is a rest.
    Segments(Str),
    /// What the route's path match matched, character by character (VirtualService).
    Prefix(Str),
    /// What the expression finds, each time (VirtualService `uriRegexRewrite`).
    Regex(Substitution),
}

/// A search and its replacement.
#[derive(Clone, Debug)]
pub struct Substitution {
    source: Str,
    regex: regex::Regex,
    /// As it was written.
    written: Str,
    /// In the syntax of the crate `regex`.
    replacement: Box<str>,
}

impl PartialEq for Substitution {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source && self.replacement == other.replacement
    }
}
impl Eq for Substitution {}

impl Substitution {
    /// Looks for `pattern`, and puts `replacement` in its place, in which `\1` is the first group (RE2's syntax).
    ///
    /// # Errors
    /// When the pattern is no expression, or the replacement names a group that is not there.
    pub fn new(pattern: &str, replacement: &str) -> Result<Self, super::InvalidPattern> {
        let invalid = |what: &str, why: String| super::InvalidPattern(what.to_owned(), why);
        // The limits are those of a whole match.
        Regex::new(pattern)?;
        let regex = regex::Regex::new(pattern).map_err(|e| invalid(pattern, e.to_string()))?;
        let mut out = String::new();
        let mut chars = replacement.chars();
        while let Some(char) = chars.next() {
            match char {
                '$' => out.push_str("$$"),
                '\\' => match chars.next() {
                    Some('\\') => out.push('\\'),
                    Some(digit) if digit.is_ascii_digit() => {
                        if digit.to_digit(10).is_none_or(|d| d as usize >= regex.captures_len()) {
                            return Err(invalid(replacement, format!("there is no group {digit}")));
                        }
                        out.push_str("${");
                        out.push(digit);
                        out.push('}');
                    }
                    _ => {
                        return Err(invalid(
                            replacement,
                            "a backslash stands before what is no digit".into(),
                        ));
                    }
                },
                other => out.push(other),
            }
        }
        Ok(Self { source: pattern.into(), regex, written: replacement.into(), replacement: out.into() })
    }

    /// The pattern, as it was written.
    #[must_use]
    pub fn pattern(&self) -> &Str {
        &self.source
    }

    /// The replacement, as it was written.
    #[must_use]
    pub fn replacement(&self) -> &Str {
        &self.written
    }

    /// `text`, with all that is found replaced.
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        self.regex.replace_all(text, &*self.replacement).into_owned()
    }
}

/// Whom a request is for: a host, with a port or without, and without user information (RFC 9110 section 4.2.4). Only what
/// all programs read alike: it stands in a head as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authority(Str);

impl Authority {
    /// `None` where `text` can be none.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        is_authority(text.as_bytes()).then(|| Self(text.into()))
    }
}

impl std::ops::Deref for Authority {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// Whether it can be an [`Authority`].
#[must_use]
pub fn is_authority(text: &[u8]) -> bool {
    let may = |b: &u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:[]%".contains(b);
    !text.is_empty() && text.iter().all(may)
}

/// What the authority of a request becomes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HostRewrite {
    /// This.
    To(Authority),
    /// The name of the back end.
    Backend,
}

/// A share of requests, in millionths.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Percent(u32);

impl Percent {
    /// All of them.
    pub const ALL: Self = Self(1_000_000);

    /// `parts` of `whole`, at most all; of a whole of nothing, none.
    #[must_use]
    pub fn of(parts: u32, whole: u32) -> Self {
        let share = (u64::from(parts) * 1_000_000).checked_div(u64::from(whole)).unwrap_or(0);
        Self(u32::try_from(share.min(1_000_000)).unwrap_or(1_000_000))
    }

    /// In millionths.
    #[must_use]
    pub fn millionths(self) -> u32 {
        self.0
    }

    /// Whether `random` falls within the share.
    #[must_use]
    pub fn takes(self, random: u64) -> bool {
        random % 1_000_000 < u64::from(self.0)
    }
}

/// Who gets copies, and of how many.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mirror {
    /// Who.
    pub to: BackendRef,
    /// Of how many.
    pub share: Percent,
}

/// What is made to fail.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fault {
    /// How long which share waits.
    pub delay: Option<(Duration, Percent)>,
    /// Which share is answered instead of forwarded.
    pub abort: Option<(Abort, Percent)>,
}

/// What an aborted request is answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Abort {
    /// An HTTP status.
    Http(u16),
    /// A gRPC status.
    Grpc(u8),
}

/// A redirect. What is not set stays as the request had it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// The scheme.
    pub scheme: Option<Str>,
    /// The host.
    pub host: Option<Str>,
    /// The port; 0 is the one that the scheme implies.
    pub port: Option<u16>,
    /// The path.
    pub path: Option<PathRewrite>,
}

/// A response that is made here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Respond {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: Box<[u8]>,
    /// What kind it is.
    pub content_type: Option<HeaderValue>,
}

/// Which pages of other origins may call (Fetch standard, section 3.2).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Cors {
    /// Origins that may.
    pub origins: Box<[Origin]>,
    /// Methods that they may use.
    pub methods: Box<[Str]>,
    /// Request fields that they may send; `*` is all.
    pub headers: Box<[Str]>,
    /// Response fields that they may read.
    pub expose: Box<[Str]>,
    /// How long they may rely on the answer.
    pub max_age: Option<Duration>,
    /// Whether with cookies and the like.
    pub credentials: bool,
    /// Whether a preflight of an origin that may not is passed on rather than answered without the fields that would let
    /// it (VirtualService `unmatchedPreflights`).
    pub forward_unmatched: bool,
}

/// An origin that may call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// By a pattern of VirtualService.
    Text(super::Pattern),
    /// By the Gateway API's form: a scheme, and a host of which the first label may be `*`, and a port.
    Wildcard {
        /// What comes before the asterisk: `https://`.
        before: Str,
        /// What comes after it: `.example.com:8443`.
        after: Str,
    },
}

impl Origin {
    /// Whether `origin` is one of them.
    #[must_use]
    pub fn matches(&self, origin: &str) -> bool {
        match self {
            Self::Text(pattern) => pattern.matches(origin.as_bytes()),
            Self::Wildcard { before, after } => origin
                .strip_prefix(&**before)
                .and_then(|rest| rest.strip_suffix(&**after))
                .is_some_and(|middle| !middle.is_empty() && !middle.contains(['/', ':'])),
        }
    }
}

/// How long things may take; `None` is without limit. Neither holds for what has switched protocols (WebSocket).
///
/// Of routes of the Gateway API the times are whole: from the request's first byte, or the choice of a try's back end, to
/// the response's last byte. Of a VirtualService they are what Envoy makes of them: they begin when all of the request has
/// come, and a try's ends with the response's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    /// All tries, with the pauses between them (Gateway API `request`, VirtualService `timeout`).
    pub request: Option<Duration>,
    /// One try (Gateway API `backendRequest`, VirtualService `perTryTimeout`).
    pub per_try: Option<Duration>,
}

/// When a request is tried again. Never after the response began.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retry {
    /// Tries after the first.
    pub attempts: u32,
    /// What is worth another try.
    pub on: RetryOn,
    /// Statuses that are.
    pub statuses: Box<[u16]>,
    /// The shortest wait before each further try; beyond it the wait is random, and grows with each. Without it a wait is random
    /// from nothing on.
    pub backoff: Option<Duration>,
    /// Whether tries may go to another locality than the first.
    pub remote_localities: bool,
    /// Whether a try goes to a host that was not tried before, where there is one.
    pub other_hosts: bool,
}

/// What is worth another try, as Envoy's `retry_on` names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RetryOn(pub u16);

impl RetryOn {
    /// Every 5xx, and no answer at all.
    pub const SERVER_ERROR: Self = Self(1);
    /// 502, 503 and 504.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// The connection broke, or the stream was reset, before an answer.
    pub const RESET: Self = Self(1 << 2);
    /// The same, before anything of the request was sent.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 3);
    /// No connection was had.
    pub const CONNECT_FAILURE: Self = Self(1 << 4);
    /// HTTP/2 `REFUSED_STREAM`.
    pub const REFUSED_STREAM: Self = Self(1 << 5);
    /// 409.
    pub const RETRIABLE_4XX: Self = Self(1 << 6);
    /// The statuses of [`Retry::statuses`].
    pub const STATUSES: Self = Self(1 << 7);
    /// `x-envoy-ratelimited` is in the answer.
    pub const ENVOY_RATELIMITED: Self = Self(1 << 8);
    /// gRPC status 1.
    pub const CANCELLED: Self = Self(1 << 9);
    /// gRPC status 4.
    pub const DEADLINE_EXCEEDED: Self = Self(1 << 10);
    /// gRPC status 13.
    pub const INTERNAL: Self = Self(1 << 11);
    /// gRPC status 8.
    pub const RESOURCE_EXHAUSTED: Self = Self(1 << 12);
    /// gRPC status 14.
    pub const UNAVAILABLE: Self = Self(1 << 13);

    /// The word that Envoy has for each.
    const WORDS: [(&'static str, Self); 14] = [
        ("5xx", Self::SERVER_ERROR),
        ("gateway-error", Self::GATEWAY_ERROR),
        ("reset", Self::RESET),
        ("reset-before-request", Self::RESET_BEFORE_REQUEST),
        ("connect-failure", Self::CONNECT_FAILURE),
        ("refused-stream", Self::REFUSED_STREAM),
        ("retriable-4xx", Self::RETRIABLE_4XX),
        ("retriable-status-codes", Self::STATUSES),
        ("envoy-ratelimited", Self::ENVOY_RATELIMITED),
        ("cancelled", Self::CANCELLED),
        ("deadline-exceeded", Self::DEADLINE_EXCEEDED),
        ("internal", Self::INTERNAL),
        ("resource-exhausted", Self::RESOURCE_EXHAUSTED),
        ("unavailable", Self::UNAVAILABLE),
    ];

    /// All of Envoy's words that are known.
    pub fn words() -> impl Iterator<Item = &'static str> {
        Self::WORDS.iter().map(|(word, _)| *word)
    }

    /// The one that Envoy calls `word`.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(w, _)| *w == word).map(|(_, on)| *on)
    }

    /// These and those.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether `other` is among these.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}
