//! JSON's way to write characters beyond the first 65,536: as two halves, `\ud83d\ude00`. YAML has one escape for
//! them, `\U0001F600`, and takes no halves.

use std::borrow::Cow;

use super::{Entry, Node, Value};

/// The text of a JSON document with such pairs in YAML's form; `None` where there are none. It is two columns shorter
/// for each pair, its lines are the same.
pub(super) fn joined(text: &str) -> Option<String> {
    let start = text.strip_prefix("---").unwrap_or(text).trim_start();
    if !start.starts_with(['{', '[']) {
        return None;
    }
    let (mut joined, mut rest, mut any) = (String::new(), text, false);
    while let Some((before, after)) = rest.find('\\').and_then(|at| rest.split_at_checked(at)) {
        joined.push_str(before);
        let (escape, length) = match pair(after) {
            Some(character) => (format!("\\U{:08X}", u32::from(character)), 12),
            // With what it escapes, which may be another backslash.
            None => {
                let length = after.char_indices().nth(2).map_or(after.len(), |(at, _)| at);
                (after.get(..length)?.to_owned(), length)
            }
        };
        any |= length == 12;
        joined.push_str(&escape);
        rest = after.get(length..)?;
    }
    joined.push_str(rest);
    any.then_some(joined)
}

/// The character whose two halves stand at the start of `text`.
fn pair(text: &str) -> Option<char> {
    let half = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let (high, low) = (half(0)?, half(6)?);
    // One half alone is none, and so are two that are not.
    char::decode_utf16([high, low]).next()?.ok().filter(|c| c.len_utf16() == 2)
}

impl Node<'_> {
    /// The same without the text that it was read from.
    pub(super) fn into_owned(self) -> Node<'static> {
        let value = match self.value {
            Value::Null => Value::Null,
            Value::Bool(value) => Value::Bool(value),
            Value::Int(value) => Value::Int(value),
            Value::Float(value) => Value::Float(value),
            Value::String(text) => Value::String(Cow::Owned(text.into_owned())),
            Value::Sequence(items) => Value::Sequence(items.into_iter().map(Node::into_owned).collect()),
            Value::Mapping(entries) => Value::Mapping(entries.into_iter().map(Entry::into_owned).collect()),
        };
        Node { value, position: self.position }
    }
}

impl Entry<'_> {
    fn into_owned(self) -> Entry<'static> {
        Entry {
            key: Cow::Owned(self.key.into_owned()),
            value: self.value.into_owned(),
            position: self.position,
        }
    }
}
