//! What a route asks of a request.

use std::fmt;

use super::Request;
use crate::Str;

/// A regular expression that matches whole texts, in time linear to their length (RE2's syntax, as far as the crate
/// `regex` has it). Equal ones have the same source.
#[derive(Clone)]
pub struct Regex {
    source: Str,
    whole: regex::bytes::Regex,
}

/// Bytes that one compiled expression may take. Envoy's limit of 100 program instructions is of the same kind.
const SIZE_LIMIT: usize = 1 << 20;

/// Why a pattern was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no regular expression that can be used: {1}")]
pub struct InvalidPattern(pub String, pub String);

impl Regex {
    /// Compiles `source`.
    ///
    /// # Errors
    /// When it is none, or needs more than 1 MiB.
    pub fn new(source: &str) -> Result<Self, InvalidPattern> {
        let build = |text: &str| regex::bytes::RegexBuilder::new(text).size_limit(SIZE_LIMIT).build();
        // Alone first: within the group, `a)|(b` would pass.
        build(source)
            .and_then(|_| build(&format!("^(?:{source})$")))
            .map(|whole| Self { source: source.into(), whole })
            .map_err(|e| InvalidPattern(source.to_owned(), e.to_string().replace('\n', " ")))
    }

    /// As it was written.
    #[must_use]
    pub fn source(&self) -> &Str {
        &self.source
    }

    /// Whether all of `text` matches.
    #[must_use]
    pub fn matches(&self, text: &[u8]) -> bool {
        self.whole.is_match(text)
    }
}

impl PartialEq for Regex {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}
impl Eq for Regex {}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}

/// A pattern for a text, as VirtualService's `StringMatch` and the Gateway API's match types have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// The same bytes.
    Exact(Str),
    /// The same, whatever the case of ASCII letters.
    ExactIgnoringCase(Str),
    /// Starts with them.
    Prefix(Str),
    /// All of it matches.
    Regex(Regex),
    /// Anything, as long as it is there.
    Present,
}

impl Pattern {
    /// Whether `text` matches.
    #[must_use]
    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => wanted.as_bytes() == text,
            Self::ExactIgnoringCase(wanted) => wanted.as_bytes().eq_ignore_ascii_case(text),
            Self::Prefix(wanted) => text.starts_with(wanted.as_bytes()),
            Self::Regex(wanted) => wanted.matches(text),
            Self::Present => true,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(t) | Self::ExactIgnoringCase(t) => f.write_str(t),
            Self::Prefix(t) => write!(f, "{t}*"),
            Self::Regex(r) => write!(f, "~{}", r.source()),
            Self::Present => f.write_str("*"),
        }
    }
}

/// What a route asks of the path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathMatch {
    /// This path.
    Exact(Str),
    /// This one, and those below it: `/a` holds for `/a` and `/a/b`, not for `/ab` (Gateway API `PathPrefix`).
    /// Without a slash at its end; the root is empty.
    Segments(Str),
    /// A path that starts with these characters (VirtualService `prefix`).
    Prefix(Str),
    /// All of the path matches.
    Regex(Regex),
    /// [`Self::Exact`], whatever the case (VirtualService `ignoreUriCase`). In lower case.
    ExactIgnoringCase(Str),
    /// [`Self::Prefix`], whatever the case. In lower case.
    PrefixIgnoringCase(Str),
}

impl PathMatch {
    /// The Gateway API's `PathPrefix`: a slash at the end means nothing.
    #[must_use]
    pub fn segments(prefix: &str) -> Self {
        Self::Segments(prefix.trim_end_matches('/').into())
    }

    /// Whether `path` matches.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(wanted) => **wanted == *path,
            Self::Segments(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Prefix(prefix) => path.starts_with(&**prefix),
            Self::Regex(regex) => regex.matches(path.as_bytes()),
            Self::ExactIgnoringCase(wanted) => wanted.eq_ignore_ascii_case(path),
            Self::PrefixIgnoringCase(prefix) => path
                .as_bytes()
                .get(..prefix.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes())),
        }
    }

    /// How many bytes of a path that matches are the match itself: what a prefix rewrite replaces.
    #[must_use]
    pub fn matched_len(&self, path: &str) -> usize {
        match self {
            Self::Segments(prefix) | Self::Prefix(prefix) | Self::PrefixIgnoringCase(prefix) => prefix.len(),
            Self::Exact(_) | Self::ExactIgnoringCase(_) | Self::Regex(_) => path.len(),
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(t) | Self::ExactIgnoringCase(t) => f.write_str(t),
            Self::Segments(t) => write!(f, "{t}/*"),
            Self::Prefix(t) | Self::PrefixIgnoringCase(t) => write!(f, "{t}*"),
            Self::Regex(r) => write!(f, "~{}", r.source()),
        }
    }
}

/// What a route asks of a header field.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeaderMatch {
    /// The field's name, in lower case.
    pub name: Str,
    /// What its value, joined where it is there more than once, must be.
    pub value: Pattern,
    /// Whether the route wants the opposite (VirtualService `withoutHeaders`).
    pub negated: bool,
}

impl HeaderMatch {
    fn holds(&self, request: &Request<'_>) -> bool {
        let value = match &*self.name {
            // Fields of the head that are none in HTTP/2.
            ":authority" | "host" => Some(request.authority.as_bytes().into()),
            ":method" => Some(request.method.as_bytes().into()),
            ":scheme" => Some(request.scheme.as_bytes().into()),
            ":path" => Some(request.path.as_bytes().into()),
            name => request.headers.field(name),
        };
        value.is_some_and(|v| self.value.matches(&v)) != self.negated
    }
}

/// What a route asks of a query parameter; the first one of its name counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QueryMatch {
    /// The parameter's name.
    pub name: Str,
    /// What its value must be.
    pub value: Pattern,
}

impl QueryMatch {
    fn holds(&self, request: &Request<'_>) -> bool {
        request.query_values(&self.name).next().is_some_and(|v| self.value.matches(&v))
    }
}

/// What a route asks of the client.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SourceMatch {
    /// Its namespace (VirtualService `sourceNamespace`).
    pub namespace: Option<Str>,
    /// Labels that its pod must have (VirtualService `sourceLabels`).
    pub labels: Box<[(Str, Str)]>,
}

impl SourceMatch {
    pub(super) fn holds(&self, source: &SourceFacts<'_>) -> bool {
        self.namespace.as_ref().is_none_or(|wanted| Some(&**wanted) == source.namespace)
            && self
                .labels
                .iter()
                .all(|(key, value)| source.labels.iter().any(|(k, v)| k == key && v == value))
    }
}

impl fmt::Display for SourceMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(namespace) = &self.namespace {
            write!(f, "from namespace {namespace}")?;
            separator = ", ";
        }
        for (key, value) in &self.labels {
            write!(f, "{}from label {key}={value}", std::mem::replace(&mut separator, ", "))?;
        }
        Ok(())
    }
}

/// What is known of the client, for [`SourceMatch`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceFacts<'a> {
    /// Its namespace.
    pub namespace: Option<&'a str>,
    /// Its pod's labels.
    pub labels: &'a [(Str, Str)],
}

/// What a route asks of a request; all of it must hold. Nothing at all holds for every request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RouteMatch {
    /// The path.
    pub path: Option<PathMatch>,
    /// The method.
    pub method: Option<Pattern>,
    /// The scheme.
    pub scheme: Option<Pattern>,
    /// The authority.
    pub authority: Option<Pattern>,
    /// Header fields, of which all must hold.
    pub headers: Box<[HeaderMatch]>,
    /// Query parameters, of which all must hold.
    pub query: Box<[QueryMatch]>,
    /// The client; boxed, because few ask.
    pub source: Option<Box<SourceMatch>>,
}

impl RouteMatch {
    /// Whether `request`, from `source`, is one that the route takes.
    #[must_use]
    pub fn holds(&self, request: &Request<'_>, source: &SourceFacts<'_>) -> bool {
        self.path.as_ref().is_none_or(|p| p.matches(request.path)) && self.rest_holds(request, source)
    }

    fn rest_holds(&self, request: &Request<'_>, source: &SourceFacts<'_>) -> bool {
        let text = |pattern: &Option<Pattern>, text: &str| {
            pattern.as_ref().is_none_or(|p| p.matches(text.as_bytes()))
        };
        text(&self.method, request.method)
            && text(&self.scheme, request.scheme)
            && text(&self.authority, request.authority)
            && self.headers.iter().all(|h| h.holds(request))
            && self.query.iter().all(|q| q.holds(request))
            && self.source.as_ref().is_none_or(|s| s.holds(source))
    }
}

impl fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let mut part = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            let separator = if std::mem::take(&mut first) { "" } else { ", " };
            write!(f, "{separator}{text}")
        };
        if let Some(path) = &self.path {
            part(f, format_args!("path {path}"))?;
        }
        for (name, pattern) in
            [("method", &self.method), ("scheme", &self.scheme), ("authority", &self.authority)]
        {
            if let Some(pattern) = pattern {
                part(f, format_args!("{name} {pattern}"))?;
            }
        }
        for header in &self.headers {
            let not = if header.negated { "not " } else { "" };
            part(f, format_args!("{not}header {}: {}", header.name, header.value))?;
        }
        for query in &self.query {
            part(f, format_args!("query {}={}", query.name, query.value))?;
        }
        if let Some(source) = &self.source {
            part(f, format_args!("{source}"))?;
        }
        if first { f.write_str("every request") } else { Ok(()) }
    }
}
