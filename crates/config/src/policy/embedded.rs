//! YAML inside a string of YAML, such as a ConfigMap's value, with positions in the outer file.

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema};
use crate::tree::{self, Limits, Node, Position, Problem, Text, Value};

/// Reads the document that the string at `cursor` holds by `schema`. Where the string is a literal block (`|`), as
/// such strings are, positions are exact; in other forms all is said of where the string starts.
pub fn read(cursor: Cursor<'_, '_>, schema: &'static Schema, read: impl FnOnce(Fields<'_, '_>)) {
    let node = cursor.node();
    let mut cursor = cursor;
    let Some(text) = node.as_str() else {
        cursor.string();
        return;
    };
    let start = cursor.position();
    let block = literal_block(&mut cursor, text);
    let place = |inner: Position| match block {
        Some(block) => Position {
            line: block.lines_before.saturating_add(inner.line),
            column: block.indent.saturating_add(inner.column),
        },
        None => start,
    };
    match tree::parse(Text { text, lines_before: 0 }, &Limits::default()) {
        Ok(None) => {}
        Ok(Some(mut inner)) => {
            move_positions(&mut inner, &place);
            cursor.read_embedded(&inner, schema, |inner| {
                if let Some(fields) = inner.fields() {
                    read(fields);
                }
            });
        }
        Err(error) => {
            let code = match error.problem {
                Problem::Malformed(_) => Code::MalformedYaml,
                Problem::DuplicateKey { .. } => Code::DuplicateKey,
                Problem::TooLarge(_) => Code::FileTooLarge,
            };
            cursor.report_at(code, place(error.position), error.problem.to_string());
        }
    }
}

/// Where the text of a block stands.
#[derive(Clone, Copy)]
struct Block {
    lines_before: u32,
    indent: u32,
}

/// Finds the lines of the file that `text` is made of.
fn literal_block(cursor: &mut Cursor<'_, '_>, text: &str) -> Option<Block> {
    let start = cursor.position().line;
    let (skipped, first) = text.lines().enumerate().find(|(_, line)| !line.trim().is_empty())?;
    let skipped = u32::try_from(skipped).ok()?;
    // The parser has a block start at its first line that is not blank; at its header would be as good.
    (start..=start.saturating_add(skipped).saturating_add(1)).find_map(|line| {
        let outer = cursor.context().line(line).trim_end_matches('\r');
        let indent = outer.len().checked_sub(first.len()).filter(|i| outer.get(*i..) == Some(first))?;
        let blank = outer.get(..indent)?.bytes().all(|b| b == b' ');
        let lines_before = line.checked_sub(skipped)?.checked_sub(1)?;
        blank.then_some(Block { lines_before, indent: u32::try_from(indent).ok()? })
    })
}

fn move_positions(node: &mut Node<'_>, place: &impl Fn(Position) -> Position) {
    node.position = place(node.position);
    match &mut node.value {
        Value::Sequence(items) => items.iter_mut().for_each(|item| move_positions(item, place)),
        Value::Mapping(entries) => {
            for entry in entries {
                entry.position = place(entry.position);
                move_positions(&mut entry.value, place);
            }
        }
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::String(_) => {}
    }
}
