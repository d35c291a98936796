//! Path normalisation, as MeshConfig's `pathNormalization` names it. It is done once, before any policy or route looks,
//! and what was looked at is what the destination gets.

use std::borrow::Cow;

use super::request::hex;

/// How far a path is normalised.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Normalization {
    /// `NONE`: not at all.
    None,
    /// `BASE`, and `DEFAULT`: escapes of unreserved characters are decoded, `\` becomes `/`, and `.` and `..` are
    /// resolved (RFC 3986 section 6). Other escapes stay as they are, `%2F` among them.
    #[default]
    Base,
    /// `MERGE_SLASHES`: and then several slashes become one.
    MergeSlashes,
    /// `DECODE_AND_MERGE_SLASHES`: before all that, `%2F` and `%5C` are decoded too.
    DecodeAndMergeSlashes,
}

/// Why a path is refused, whatever the normalisation: there is no safe reading of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum InvalidPath {
    /// It neither starts with `/` nor is `*`.
    #[error("the path does not start with a slash")]
    NotAbsolute,
    /// A `#`: a fragment is never sent (RFC 9110 section 4.2.5), and servers disagree about it.
    #[error("the path has a fragment")]
    Fragment,
    /// `%00`, or a control character.
    #[error("the path has a NUL or another control character")]
    Control,
}

/// Normalises `path`, which is without its query.
///
/// # Errors
/// For what has no safe reading.
pub fn normalize(path: &str, how: Normalization) -> Result<Cow<'_, str>, InvalidPath> {
    if path == "*" {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with('/') {
        return Err(InvalidPath::NotAbsolute);
    }
    let (mut plain, mut previous) = (true, b' ');
    for byte in path.bytes() {
        match byte {
            b'#' => return Err(InvalidPath::Fragment),
            0..=0x1f | 0x7f => return Err(InvalidPath::Control),
            b'%' | b'\\' => plain = false,
            b'.' | b'/' if previous == b'/' => plain = false,
            _ => {}
        }
        previous = byte;
    }
    if plain {
        return Ok(Cow::Borrowed(path));
    }
    if path.contains("%00") {
        return Err(InvalidPath::Control);
    }
    if how == Normalization::None {
        return Ok(Cow::Borrowed(path));
    }
    let resolved = without_dots(&decoded(path, how == Normalization::DecodeAndMergeSlashes));
    Ok(Cow::Owned(match how {
        Normalization::None | Normalization::Base => resolved,
        Normalization::MergeSlashes | Normalization::DecodeAndMergeSlashes => merged(&resolved),
    }))
}

/// Escapes of unreserved characters decoded, `\` made `/`; with `slashes`, their escapes too. What is decoded never makes an
/// escape of a `%` that was none: that one is escaped itself then, so that nobody behind us reads more out of the path than was
/// compared here.
fn decoded(path: &str, slashes: bool) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    // Where a `%` stands that begins no escape.
    let mut bare = Vec::new();
    while let Some(next) = rest.chars().next() {
        let digits = rest.as_bytes().get(1..3).filter(|_| next == '%');
        let escaped = digits.and_then(|d| match d {
            [high, low] => hex(*high).zip(hex(*low)).map(|(h, l)| h << 4 | l),
            _ => None,
        });
        let (char, length) = match escaped {
            Some(b'/' | b'\\') if slashes => ('/', 3),
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => (char::from(byte), 3),
            _ if next == '\\' => ('/', 1),
            _ => (next, next.len_utf8()),
        };
        if char == '%' && escaped.is_none() {
            bare.push(out.len());
        }
        out.push(char);
        rest = rest.get(length..).unwrap_or_default();
    }
    for place in bare.into_iter().rev() {
        let digits = out.as_bytes().get(place + 1..place + 3);
        if digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            out.insert_str(place + 1, "25");
        }
    }
    out
}

/// RFC 3986 section 5.2.4.
fn without_dots(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            _ => {
                out.push('/');
                out.push_str(segment);
                continue;
            }
        }
        if last {
            out.push('/');
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

fn merged(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for char in path.chars() {
        if char != '/' || !out.ends_with('/') {
            out.push(char);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn any_mode() -> impl Strategy<Value = Normalization> {
        use Normalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
        prop::sample::select(vec![None, Base, MergeSlashes, DecodeAndMergeSlashes])
    }

    #[test]
    fn each_mode_does_what_it_says() {
        use Normalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
        for (how, path, wanted) in [
            (None, "/a/../b", "/a/../b"),
            (Base, "/a/../b", "/b"),
            (Base, "/a/%2e%2E/b", "/b"),
            (Base, "/a/..", "/"),
            (Base, "/a/b/.", "/a/b/"),
            (Base, "/../..", "/"),
            (Base, "/..a/b..", "/..a/b.."),
            (Base, "/a%2Fb\\c//d", "/a%2Fb/c//d"),
            (Base, "/%zz%2", "/%zz%2"),
            (Base, "/%%361dmin", "/%2561dmin"),
            (Base, "/public/%%32e%%32e/admin", "/public/%252e%252e/admin"),
            (Base, "/%3%30", "/%2530"),
            (Base, "/%%300", "/%2500"),
            (DecodeAndMergeSlashes, "/%%32Fadmin", "/%252Fadmin"),
            (MergeSlashes, "//a///b", "/a/b"),
            (DecodeAndMergeSlashes, "/a%2f%5C..%2Fb", "/a/b"),
            (Base, "*", "*"),
        ] {
            assert_eq!(normalize(path, how).unwrap(), wanted, "{path} by {how:?}");
        }
    }

    #[test]
    fn what_has_no_safe_reading_is_refused() {
        assert_eq!(normalize("/a#b", Normalization::None), Err(InvalidPath::Fragment));
        assert_eq!(normalize("/a%00", Normalization::None), Err(InvalidPath::Control));
        assert_eq!(normalize("/a\0", Normalization::Base), Err(InvalidPath::Control));
        assert_eq!(normalize("a", Normalization::Base), Err(InvalidPath::NotAbsolute));
    }

    proptest! {
        /// Normalising twice changes nothing, whatever stands beside a percent sign.
        #[test]
        fn what_is_normalised_stays(path in "/([a./\\\\%235]|%2[eEfF]|%5[cC]|%[346][0-9]){0,12}", how in any_mode()) {
            prop_assume!(!path.contains("%00"));
            let once = normalize(&path, how).unwrap().into_owned();
            prop_assert_eq!(normalize(&once, how).unwrap(), once.as_str());
            prop_assert!(once.starts_with('/'));
            if how != Normalization::None {
                prop_assert!(!once.split('/').any(|s| s == "." || s == ".."), "{}", once);
            }
        }
    }
}
