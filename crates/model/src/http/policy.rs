//! What a policy asks of a request, beside what it asks of the connection.

use std::borrow::Cow;
use std::fmt;

use super::Request;
use crate::{IpMatch, Str, StringMatch};

/// The part of a [`crate::Match`] that needs requests. All that is set must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HttpMatch {
    /// Authorities; case of letters is of no matter.
    pub hosts: Box<[StringMatch]>,
    /// The negation.
    pub not_hosts: Box<[StringMatch]>,
    /// Methods.
    pub methods: Box<[StringMatch]>,
    /// The negation.
    pub not_methods: Box<[StringMatch]>,
    /// Paths, without query.
    pub paths: Box<[PathPattern]>,
    /// The negation.
    pub not_paths: Box<[PathPattern]>,
    /// Addresses of the client as trusted proxies named it.
    pub remote_ips: Box<[IpMatch]>,
    /// The negation.
    pub not_remote_ips: Box<[IpMatch]>,
    /// `iss/sub` of the token.
    pub request_principals: Box<[StringMatch]>,
    /// The negation.
    pub not_request_principals: Box<[StringMatch]>,
    /// A condition on something else.
    pub attribute: Option<AttributeMatch>,
}

/// A `when` of a rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttributeMatch {
    /// Of what.
    pub attribute: Attribute,
    /// One of which has to match, if there are any.
    pub values: Box<[StringMatch]>,
    /// None of which may.
    pub not_values: Box<[StringMatch]>,
}

/// What a `when` is of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Attribute {
    /// `request.headers[NAME]`, in lower case.
    Header(Str),
    /// `request.auth.claims[A][B]`: a text, or one of a list of texts.
    Claim(Box<[Str]>),
    /// `connection.sni`.
    Sni,
}

/// How a value is read that servers read in different ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Readings {
    /// As it is: all lines of a field together, a host with its port.
    Whole,
    /// In each way: also the members of a list alone, since a server may take the first line or the last one, and a host
    /// without its port and the dot at its end.
    Any,
}

impl Readings {
    /// Whether a reading of a host is one that `holds`.
    pub(crate) fn any_host(self, authority: &str, holds: impl Fn(&str) -> bool) -> bool {
        if self == Self::Whole {
            return holds(authority);
        }
        let is_port = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        let name = authority.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(authority, |(n, _)| n);
        holds(authority) || holds(name) || holds(name.trim_end_matches('.'))
    }

    fn any_value(self, value: &str, holds: impl Fn(&str) -> bool) -> bool {
        holds(value) || (self == Self::Any && value.split(',').any(|member| holds(member.trim())))
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "request.headers[{name}]"),
            Self::Claim(path) => {
                f.write_str("request.auth.claims")?;
                path.iter().try_for_each(|key| write!(f, "[{key}]"))
            }
            Self::Sni => f.write_str("connection.sni"),
        }
    }
}

impl Attribute {
    /// Whether `name` is a header's that is no field: a part of the head, which HTTP/2 has as a pseudo-header.
    #[must_use]
    pub fn is_of_head(name: &str) -> bool {
        matches!(name, ":authority" | ":method" | ":path" | ":scheme" | "host")
    }

    /// Whether a value of it in `request` is one that `holds`.
    pub(crate) fn any(
        &self,
        request: &Request<'_>,
        readings: Readings,
        holds: impl Fn(&str) -> bool,
    ) -> bool {
        match self {
            // In whichever case it was sent, it is the same host.
            Self::Header(name) if matches!(&**name, ":authority" | "host") => {
                readings.any_host(request.authority, |host| holds(host) || holds(&host.to_ascii_lowercase()))
            }
            Self::Header(name) if Self::is_of_head(name) => holds(&of_head(name, request)),
            Self::Header(name) => request
                .headers
                .field(name)
                // What is no UTF-8 can be no value of a policy; shown with marks, it matches prefixes and `*` only.
                .is_some_and(|value| readings.any_value(&String::from_utf8_lossy(&value), &holds)),
            Self::Claim(path) => request.claims.is_some_and(|claims| claims.any(path, holds)),
            Self::Sni => request.sni.is_some_and(holds),
        }
    }

    /// For explanations.
    pub(crate) fn shown(&self, request: &Request<'_>) -> String {
        match self {
            Self::Header(name) if Self::is_of_head(name) => of_head(name, request).into_owned(),
            Self::Header(name) => request
                .headers
                .field(name)
                .map(|v| String::from_utf8_lossy(&v).into_owned())
                .unwrap_or_default(),
            Self::Claim(path) => request
                .claims
                .and_then(|claims| claims.at(path))
                .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
                .unwrap_or_default(),
            Self::Sni => request.sni.unwrap_or_default().to_owned(),
        }
    }
}

/// What a part of the head is in a request: of the path, as it was normalised, with the query.
fn of_head<'r>(name: &str, request: &Request<'r>) -> Cow<'r, str> {
    match name {
        ":method" => request.method.into(),
        ":scheme" => request.scheme.into(),
        ":path" if request.query.is_empty() => request.path.into(),
        ":path" => format!("{}?{}", request.path, request.query).into(),
        _ => request.authority.into(),
    }
}

/// A pattern for a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathPattern {
    /// As for other texts.
    Text(StringMatch),
    /// With `{*}` for one segment and `{**}` for any rest (Istio, "URI templates").
    Template(Template),
}

/// A path with wildcards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Template {
    source: Str,
    parts: Box<[Part]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Part {
    Literal(Str),
    /// `{*}`: one segment, not empty.
    One,
    /// `{**}`: any number of characters, none included.
    Any,
}

/// Why a template was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidTemplate {
    /// `{**}` is not the last wildcard.
    #[error("after {{**}} there may be only text")]
    AfterAny,
    /// A wildcard is not a whole segment.
    #[error("a wildcard has to be a whole segment: /a/{{*}}/b")]
    PartOfSegment,
    /// `*`, `{` or `}` elsewhere.
    #[error("{{, }} and * stand only in the wildcards {{*}} and {{**}}")]
    Character,
    /// It does not start with a slash.
    #[error("a path starts with a slash")]
    NotAbsolute,
}

impl Template {
    /// Reads a template. `None` when `text` has no wildcards of this kind: it is a pattern like others.
    ///
    /// # Errors
    /// When what stands there is no template.
    pub fn parse(text: &str) -> Result<Option<Self>, InvalidTemplate> {
        if !text.contains("{*}") && !text.contains("{**}") {
            return Ok(None);
        }
        let rest = text.strip_prefix('/').ok_or(InvalidTemplate::NotAbsolute)?;
        let mut parts = Vec::new();
        let mut literal = String::from("/");
        let mut any = false;
        for (place, segment) in rest.split('/').enumerate() {
            if place > 0 {
                literal.push('/');
            }
            let wildcard = match segment {
                "{*}" => Part::One,
                "{**}" => Part::Any,
                _ if segment.contains("{*}") || segment.contains("{**}") => {
                    return Err(InvalidTemplate::PartOfSegment);
                }
                _ if segment.contains(['{', '}', '*']) => return Err(InvalidTemplate::Character),
                _ => {
                    literal.push_str(segment);
                    continue;
                }
            };
            if any {
                return Err(InvalidTemplate::AfterAny);
            }
            any = wildcard == Part::Any;
            parts.push(Part::Literal(std::mem::take(&mut literal).as_str().into()));
            parts.push(wildcard);
        }
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.as_str().into()));
        }
        Ok(Some(Self { source: text.into(), parts: parts.into() }))
    }

    /// As it was written.
    #[must_use]
    pub fn source(&self) -> &Str {
        &self.source
    }

    fn matches(&self, path: &str) -> bool {
        let mut rest = path;
        for (place, part) in self.parts.iter().enumerate() {
            match part {
                Part::Literal(text) => match rest.strip_prefix(&**text) {
                    Some(after) => rest = after,
                    None => return false,
                },
                Part::One => {
                    let end = rest.find('/').unwrap_or(rest.len());
                    if end == 0 {
                        return false;
                    }
                    rest = rest.get(end..).unwrap_or_default();
                }
                // The last wildcard: what comes after it is one text, and is the end.
                Part::Any => {
                    return match self.parts.get(place + 1) {
                        Some(Part::Literal(end)) => rest.ends_with(&**end),
                        _ => true,
                    };
                }
            }
        }
        rest.is_empty()
    }
}

impl PathPattern {
    /// Whether `path` matches.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(pattern) => pattern.matches(path),
            Self::Template(template) => template.matches(path),
        }
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(pattern) => pattern.fmt(f),
            Self::Template(template) => f.write_str(&template.source),
        }
    }
}

/// [`StringMatch::matches`], whatever the case of ASCII letters.
pub(crate) fn matches_host(pattern: &StringMatch, host: &str) -> bool {
    let text = host.as_bytes();
    match pattern {
        StringMatch::Exact(wanted) => wanted.as_bytes().eq_ignore_ascii_case(text),
        StringMatch::Prefix(wanted) => {
            text.get(..wanted.len()).is_some_and(|start| start.eq_ignore_ascii_case(wanted.as_bytes()))
        }
        StringMatch::Suffix(wanted) => text
            .len()
            .checked_sub(wanted.len())
            .and_then(|at| text.get(at..))
            .is_some_and(|end| end.eq_ignore_ascii_case(wanted.as_bytes())),
        StringMatch::Presence => !text.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn templates_match_segments_and_rests() {
        for (template, path, wanted) in [
            ("/a/{*}", "/a/b", true),
            ("/a/{*}", "/a/", false),
            ("/a/{*}", "/a/b/c", false),
            ("/a/{*}/c", "/a/b/c", true),
            ("/{*}/c/{**}", "/b/c/d/e", true),
            ("/{**}/c", "/a/b/c", true),
            ("/{**}/c", "/c", false),
            ("/{**}", "/", true),
            ("/a/{**}", "/a/", true),
            ("/a/{**}", "/ab", false),
        ] {
            let parsed = Template::parse(template).unwrap().unwrap();
            assert_eq!(parsed.matches(path), wanted, "{template} for {path}");
        }
    }

    #[test]
    fn parts_of_the_head_are_headers_to_conditions() {
        let headers = vec![("host", "forged")];
        let request = Request {
            method: "GET",
            scheme: "http",
            authority: "Admin.shop:80",
            path: "/a",
            query: "b=c",
            headers: &headers,
            claims: None,
            sni: None,
            remote_ip: [10, 0, 0, 1].into(),
        };
        for (name, value) in [
            ("host", "Admin.shop:80"),
            (":authority", "admin.shop:80"),
            (":method", "GET"),
            (":path", "/a?b=c"),
            (":scheme", "http"),
        ] {
            let attribute = Attribute::Header(name.into());
            assert!(attribute.any(&request, Readings::Whole, |text| text == value), "{name}");
            assert!(!attribute.any(&request, Readings::Whole, |text| text == "forged"), "{name}");
            assert!(attribute.shown(&request).eq_ignore_ascii_case(value), "{name}");
        }
    }

    #[test]
    fn what_is_no_template_is_refused() {
        assert_eq!(Template::parse("/a*"), Ok(None));
        assert_eq!(Template::parse("/{**}/{*}"), Err(InvalidTemplate::AfterAny));
        assert_eq!(Template::parse("/a{*}"), Err(InvalidTemplate::PartOfSegment));
        assert_eq!(Template::parse("/{*}/*"), Err(InvalidTemplate::Character));
        assert_eq!(Template::parse("a/{*}"), Err(InvalidTemplate::NotAbsolute));
    }
}
