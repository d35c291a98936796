//! Values that the route kinds share: durations, header names, path patterns.

use std::fmt;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use model::Str;
use model::http::{Authority, Format, InvalidPattern, Regex};

use crate::fields::{Cursor, Fields};
use crate::headers::is_of_connection;

/// A duration of the Gateway API (GEP-2257): up to four numbers of up to five digits with `h`, `m`, `s` or `ms`.
pub(super) fn duration(mut cursor: Cursor<'_, '_>) -> Option<Duration> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let read = parse_duration(text);
    if read.is_none() {
        cursor.invalid(format_args!("{text:?} is no duration"), "write one such as 10s, 500ms or 1m30s");
    }
    read
}

pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|n| (1..=5).contains(n))?;
        let (number, after) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let (unit, after) = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)]
            .iter()
            .find_map(|(name, millis)| Some((*millis, after.strip_prefix(name)?)))?;
        total += Duration::from_millis(number * unit);
        parts += 1;
        rest = after;
    }
    (1..=4).contains(&parts).then_some(total)
}

/// A duration as [`go_duration`] reads it, of a millisecond at least, as Istio has it: zero is no way to say "without" here.
pub(super) fn some_time(cursor: Cursor<'_, '_>) -> Option<Duration> {
    at_least(cursor, Duration::from_millis(1))
}

/// A duration as Go and protobuf write it: numbers, with fractions, and `h`, `m`, `s`, `ms`, `us` or `ns`.
pub(super) fn go_duration(cursor: Cursor<'_, '_>) -> Option<Duration> {
    at_least(cursor, Duration::ZERO)
}

fn at_least(mut cursor: Cursor<'_, '_>, least: Duration) -> Option<Duration> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let read = parse_go_duration(text);
    match read {
        None => {
            cursor.invalid(format_args!("{text:?} is no duration"), "write one such as 10s, 0.5s or 1m30s");
        }
        Some(read) if read < least => {
            cursor.invalid(format_args!("{text:?} is less than {least:?}"), "leave it out for the default");
        }
        Some(_) => {}
    }
    read.filter(|read| *read >= least)
}

/// Reads a duration as Go writes it, such as `1m30s` or `0.5s`; what is over ten years is ten years. `None` where it is written in
/// another way, also without a unit.
#[must_use]
pub fn parse_go_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 6] =
        [("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
    let mut rest = text;
    let mut seconds = 0.0;
    if text == "0" {
        return Some(Duration::ZERO);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|n| (1..=12).contains(n))?;
        let (number, after) = rest.split_at(digits);
        let number: f64 = number.parse().ok()?;
        let (unit, after) = UNITS.iter().find_map(|(name, unit)| Some((*unit, after.strip_prefix(name)?)))?;
        seconds += number * unit;
        rest = after;
    }
    // Ten years are as good as for ever, and fit in what is added to them.
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds.min(315_360_000.0)).ok()).flatten()
}

/// A number from `least` to `most`.
pub(super) fn number(mut cursor: Cursor<'_, '_>, least: f64, most: f64) -> Option<f64> {
    let node = cursor.node();
    #[expect(clippy::cast_precision_loss, reason = "what is out of range is refused")]
    let value = match node.value {
        crate::tree::Value::Int(n) => n as f64,
        crate::tree::Value::Float(n) => n,
        _ => f64::NAN,
    };
    let valid = (least..=most).contains(&value);
    if !valid {
        cursor.invalid(format_args!("is no number from {least} to {most}"), "");
    }
    valid.then_some(value)
}

/// Whether the key of a match is a field's name, or a pseudo-header's; says that it is not.
pub(super) fn is_field_name(key: &str, value: &mut Cursor<'_, '_>) -> bool {
    let is = key.starts_with(':') || HeaderName::from_bytes(key.as_bytes()).is_ok();
    if !is {
        let claim =
            "claims are matched by an AuthorizationPolicy, or as a header that outputClaimToHeaders sets";
        let remedy = if key.starts_with('@') { claim } else { "" };
        value.invalid(format_args!("{key:?} is no name of a header field"), remedy);
    }
    is
}

/// A header field's name, in lower case.
pub(super) fn header_name(mut cursor: Cursor<'_, '_>) -> Option<HeaderName> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let read = HeaderName::from_bytes(text.as_bytes()).ok();
    if read.is_none() {
        cursor.invalid(format_args!("{text:?} is no name of a header field"), "");
    }
    read
}

/// The name of a header field that is to be changed: none that says where a message ends, or what becomes of its connection.
pub(super) fn edited_name(mut cursor: Cursor<'_, '_>) -> Option<HeaderName> {
    if cursor.node().as_str().is_some_and(|name| is_unchangeable(&mut cursor, name)) {
        return None;
    }
    header_name(cursor)
}

/// Whether the field `name` is not to be changed, which is said at `cursor` then.
pub(super) fn is_unchangeable(cursor: &mut Cursor<'_, '_>, name: &str) -> bool {
    let taken = is_of_connection(name);
    if taken {
        cursor.invalid(
            format_args!("the header {name} is the connection's own, and is not to be changed"),
            "change another header",
        );
    }
    taken
}

/// Whether the request's field `name` says who the client is, which is not a route's to say: what it leads to may be another's.
pub(super) fn is_the_clients(cursor: &mut Cursor<'_, '_>, name: &str) -> bool {
    let taken = crate::headers::is_the_clients(name);
    if taken {
        let message = format_args!("the header {name} says who the client is, and is the waypoint's to set");
        cursor.invalid(message, "set another header, or remove this one");
    }
    taken
}

/// What a header field becomes: a value, in which Envoy's `%COMMANDS%` are such as are known. What is none would reach the
/// other side as it is written, and nobody would notice.
pub(super) fn edited_value(mut cursor: Cursor<'_, '_>) -> Option<HeaderValue> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    if let Err(error) = Format::parse(text) {
        cursor.invalid(format_args!("{text:?} is no value of a header field: {error}"), "");
        return None;
    }
    let read = HeaderValue::from_str(text).ok();
    if read.is_none() {
        cursor.invalid("has characters that no header field may have", "");
    }
    read
}

/// What a request's authority becomes. It stands in the head as it is, so nothing else may be in it.
pub(super) fn authority(mut cursor: Cursor<'_, '_>) -> Option<Authority> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let read = Authority::new(text);
    if read.is_none() {
        cursor.invalid(format_args!("{text:?} is no host"), "write a host, with a port or without");
    }
    read
}

/// Whether a port is written with a host.
pub(super) fn has_port(authority: &str) -> bool {
    authority.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && !port.contains(']'))
}

/// Whether it is a word as names of fields, methods and cookies are (RFC 9110 section 5.6.2).
pub(super) fn is_token(text: &str) -> bool {
    HeaderName::from_bytes(text.as_bytes()).is_ok()
}

/// Those of a list that can stand in the value of a header field; what others are is said.
pub(super) fn listed(fields: &mut Fields<'_, '_>, name: &'static str) -> Vec<Str> {
    let mut list = Vec::new();
    fields.each(name, |mut item| match item.node().as_str() {
        Some(text) if HeaderValue::from_str(text).is_err() => {
            item.invalid("has characters that no header field may have", "");
        }
        _ => list.extend(item.string().map(Str::from)),
    });
    list
}

/// A regular expression.
pub(super) fn regex(cursor: &mut Cursor<'_, '_>, text: &str) -> Option<Regex> {
    match Regex::new(text) {
        Ok(regex) => Some(regex),
        Err(InvalidPattern(_, why)) => {
            cursor.invalid(format_args!("is no regular expression that can be used: {why}"), "");
            None
        }
    }
}

/// One of a few words.
pub(super) fn word<T: Copy>(mut cursor: Cursor<'_, '_>, words: &[(&str, T)]) -> Option<T> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let found = words.iter().find(|(w, _)| *w == text).map(|(_, value)| *value);
    if found.is_none() {
        cursor.invalid(format_args!("{text:?} means nothing here"), format!("write {}", Words(words)));
    }
    found
}

struct Words<'w, T>(&'w [(&'w str, T)]);

impl<T> fmt::Display for Words<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (word, _)) in self.0.iter().enumerate() {
            let before = if i == 0 {
                ""
            } else if i + 1 == self.0.len() {
                " or "
            } else {
                ", "
            };
            write!(f, "{before}{word}")?;
        }
        Ok(())
    }
}

/// A path: it starts with a slash, has no query, no fragment, and nothing that normalisation would change, since it is
/// compared with a path that was normalised.
pub(super) fn path(mut cursor: Cursor<'_, '_>) -> Option<Str> {
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    let wrong = if !text.starts_with('/') {
        Some("does not start with a slash")
    } else if text.contains(['?', '#']) {
        Some("has a query or a fragment, and paths are matched without them")
    } else if text.contains("//") || text.split('/').any(|s| s == "." || s == "..") {
        Some("has empty segments, \".\" or \"..\", which no normalised path has")
    } else if text.to_ascii_lowercase().contains("%2f") {
        Some("has an escaped slash")
    } else {
        None
    };
    match wrong {
        Some(wrong) => {
            cursor.invalid(format_args!("{text:?} {wrong}"), "");
            None
        }
        None => Some(cursor.context().pool.string(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [("10s", 10_000), ("0.5s", 500), ("1m30.25s", 90_250), ("100ms", 100), ("0", 0)]
        {
            assert_eq!(parse_go_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "s", "1..5s", "-1s", "1d", " 1s"] {
            assert_eq!(parse_go_duration(text), None, "{text}");
        }
    }

    #[test]
    fn durations_are_those_of_the_gateway_api() {
        for (text, millis) in
            [("10s", 10_000), ("1m30s", 90_000), ("500ms", 500), ("1h2m3s4ms", 3_723_004), ("0s", 0)]
        {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "s", "1.5s", "-1s", "123456s", "1h1m1s1ms1s", "1d", " 1s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
