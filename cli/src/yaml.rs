//! YAML to and from JSON's data model, by the reader that reads users' manifests.

use std::fmt::Write;

use anyhow::{Result, anyhow};
use config::tree::{Limits, Node, Value as Tree, documents, parse};
use serde_json::{Map, Number, Value};

/// The documents of a text that hold anything.
///
/// # Errors
/// One of them is not YAML; with the place.
pub fn read(text: &str) -> Result<Vec<Value>> {
    let limits = Limits::default();
    let mut found = Vec::new();
    for document in documents(text) {
        if let Some(node) = parse(document, &limits).map_err(|e| anyhow!("line {e}"))? {
            found.push(json(&node));
        }
    }
    found.retain(|value| !value.is_null());
    Ok(found)
}

fn json(node: &Node<'_>) -> Value {
    match &node.value {
        Tree::Null => Value::Null,
        Tree::Bool(value) => Value::Bool(*value),
        Tree::Int(value) => Value::from(*value),
        Tree::Float(value) => Number::from_f64(*value).map_or(Value::Null, Value::Number),
        Tree::String(text) => Value::String(text.to_string()),
        Tree::Sequence(items) => items.iter().map(json).collect(),
        Tree::Mapping(entries) => {
            entries.iter().map(|e| (e.key.to_string(), json(&e.value))).collect::<Map<_, _>>().into()
        }
    }
}

/// A document. What fits into so many columns is written on one line.
#[must_use]
pub fn write(value: &Value, columns: usize) -> String {
    let mut text = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(&mut text, map, 0, columns),
        Value::Array(items) if !items.is_empty() => sequence(&mut text, items, 0, columns),
        value => text = format!("{}\n", flow(value)),
    }
    text
}

fn mapping(text: &mut String, map: &Map<String, Value>, indent: usize, columns: usize) {
    for (index, (key, value)) in map.iter().enumerate() {
        if index > 0 || !text.ends_with("- ") {
            text.extend(std::iter::repeat_n(' ', indent));
        }
        text.push_str(&scalar(key));
        text.push(':');
        below(text, value, indent + 2, columns);
    }
}

fn sequence(text: &mut String, items: &[Value], indent: usize, columns: usize) {
    for item in items {
        text.extend(std::iter::repeat_n(' ', indent));
        match item {
            Value::Object(map) if !map.is_empty() && !fits(item, indent + 2, columns) => {
                text.push_str("- ");
                mapping(text, map, indent + 2, columns);
            }
            item => {
                text.push('-');
                below(text, item, indent + 2, columns);
            }
        }
    }
}

/// A value behind a key or a dash.
fn below(text: &mut String, value: &Value, indent: usize, columns: usize) {
    match value {
        value if fits(value, indent, columns) => {
            let _ = writeln!(text, " {}", flow(value));
        }
        Value::Object(map) => {
            text.push('\n');
            mapping(text, map, indent, columns);
        }
        Value::Array(items) => {
            text.push('\n');
            sequence(text, items, indent, columns);
        }
        value => {
            let _ = writeln!(text, " {}", flow(value));
        }
    }
}

/// Whether a value is to stand on one line: scalars, what is empty, and what is short.
fn fits(value: &Value, indent: usize, columns: usize) -> bool {
    let empty = match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => true,
    };
    // A key stands before it, which is seldom longer than this.
    empty || columns > 0 && indent + 16 + flow(value).len() <= columns
}

fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries: Vec<_> = map.iter().map(|(k, v)| format!("{}: {}", scalar(k), flow(v))).collect();
            format!("{{{}}}", entries.join(", "))
        }
        other => other.to_string(),
    }
}

/// A string, in quotes unless no reader could take it for anything else.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_./-".contains(&b));
    let words = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"];
    let word = words.iter().any(|w| w.eq_ignore_ascii_case(text));
    if plain && !word { text.to_owned() } else { Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_reads_back_as_it_was() {
        let value = json!({
            "a": {"b": [1, -2.5, true, null, "x", "yes", "1", "", "a: b", "#", "é\n\u{1b}"], "c": {}, "d": []},
            "list": [{"k": [[1, 2], []], "m": {"n": {"o": "p"}}}, "s", [{"q": 1}]],
            "~": "0x10", "n": "-", "istio.io/rev": "*",
        });
        for columns in [0, 40, 120] {
            let text = write(&value, columns);
            assert_eq!(read(&text).unwrap().first(), Some(&value), "{text}");
        }
        assert_eq!(write(&json!({"a": {"b": 1}}), 0), "a:\n  b: 1\n");
        assert_eq!(write(&json!({"a": {"b": 1}}), 60), "a: {b: 1}\n");
    }

    #[test]
    fn empty_documents_are_left_out_and_errors_have_their_line() {
        assert_eq!(read("# nothing\n---\na: 1\n---\n").unwrap(), [json!({"a": 1})]);
        assert!(read("a: 1\n---\nb: }\n").unwrap_err().to_string().contains("line 3"));
    }
}
