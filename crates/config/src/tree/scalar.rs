//! What a scalar's text stands for (`sigs.k8s.io/yaml/goyaml.v2`, resolve.go).

use std::borrow::Cow;

use super::Value;

/// The value of a scalar. `tag` is its handle and suffix.
///
/// # Errors
/// The tag is not one of JSON's types, or the text is no value of it; the message says so.
pub(super) fn resolve<'s>(
    text: Cow<'s, str>,
    plain: bool,
    tag: Option<(&str, &str)>,
) -> Result<Value<'s>, String> {
    let Some((handle, suffix)) = tag else {
        return Ok(if plain { resolve_plain(text) } else { Value::String(text) });
    };
    if (handle, suffix) == ("", "!") || (handle == "!" && suffix.is_empty()) {
        return Ok(Value::String(text));
    }
    if handle != "tag:yaml.org,2002:" {
        return Err(format!("the tag {handle}{suffix} is not used in manifests"));
    }
    if suffix == "str" {
        return Ok(Value::String(text));
    }
    let value = resolve_plain(text);
    match (suffix, value) {
        ("null", v @ Value::Null)
        | ("bool", v @ Value::Bool(_))
        | ("int", v @ Value::Int(_))
        | ("float", v @ Value::Float(_)) => Ok(v),
        #[expect(clippy::cast_precision_loss, reason = "what !!float asks for")]
        ("float", Value::Int(n)) => Ok(Value::Float(n as f64)),
        ("null" | "bool" | "int" | "float", v) => Err(format!("{} is no value of !!{suffix}", v.kind())),
        _ => Err(format!("the tag !!{suffix} is not used in manifests")),
    }
}

/// A key's text. JSON's keys are strings, so others are keys in their canonical form.
///
/// # Errors
/// The key is null or a collection.
pub(super) fn key(value: Value<'_>) -> Result<Cow<'_, str>, String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Bool(b) => Ok(if b { "true" } else { "false" }.into()),
        Value::Int(n) => Ok(n.to_string().into()),
        Value::Float(n) => Ok(n.to_string().into()),
        v @ (Value::Null | Value::Sequence(_) | Value::Mapping(_)) => {
            Err(format!("a key must be a string, not {}", v.kind()))
        }
    }
}

/// The value of a plain scalar.
pub(super) fn resolve_plain(text: Cow<'_, str>) -> Value<'_> {
    let Some(first) = text.bytes().next() else { return Value::Null };
    match first {
        b'y' | b'Y' | b'n' | b'N' | b't' | b'T' | b'f' | b'F' | b'o' | b'O' | b'~' => match &*text {
            "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
                Value::Bool(true)
            }
            "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
                Value::Bool(false)
            }
            "~" | "null" | "Null" | "NULL" => Value::Null,
            _ => Value::String(text),
        },
        b'0'..=b'9' | b'+' | b'-' | b'.' => number(&text).unwrap_or(Value::String(text)),
        _ => Value::String(text),
    }
}

/// The number that `text` is, if it is one.
fn number<'s>(text: &str) -> Option<Value<'s>> {
    match text {
        ".nan" | ".NaN" | ".NAN" => return Some(Value::Float(f64::NAN)),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => return Some(Value::Float(f64::INFINITY)),
        "-.inf" | "-.Inf" | "-.INF" => return Some(Value::Float(f64::NEG_INFINITY)),
        _ => {}
    }
    // Most that starts with a digit is an address, a time or a version.
    let digits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
    if !text.bytes().all(digits) {
        return None;
    }
    let plain: Cow<'_, str> =
        if text.contains('_') && !text.starts_with('.') { text.replace('_', "").into() } else { text.into() };
    if let Some(n) = integer(&plain) {
        return Some(Value::Int(n));
    }
    is_float(&plain).then(|| plain.parse().ok().map(Value::Float)).flatten()
}

/// Go's `strconv.ParseInt(text, 0, 64)`: a sign, a base prefix (`0` alone means octal), digits.
fn integer(text: &str) -> Option<i64> {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefixed = |a, b| rest.strip_prefix(a).or_else(|| rest.strip_prefix(b));
    let (digits, radix) = if let Some(d) = prefixed("0x", "0X") {
        (d, 16)
    } else if let Some(d) = prefixed("0b", "0B") {
        (d, 2)
    } else if let Some(d) = prefixed("0o", "0O") {
        (d, 8)
    } else if rest.len() > 1 && rest.starts_with('0') {
        (rest, 8)
    } else {
        (rest, 10)
    };
    // `from_str_radix` takes a sign of its own.
    if !digits.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let magnitude = i128::from_str_radix(digits, radix).ok()?;
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((m, e)) => (m, Some(e.strip_prefix(['-', '+']).unwrap_or(e))),
        None => (unsigned, None),
    };
    let all_digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mantissa_ok = all_digits(whole)
        && all_digits(fraction)
        && (!whole.is_empty() || (mantissa.starts_with('.') && !fraction.is_empty()));
    mantissa_ok && exponent.is_none_or(|e| !e.is_empty() && all_digits(e))
}
