//! A tree of a YAML document in which every node knows where it stands in its file.
//!
//! Documents are read as Kubernetes reads them (`sigs.k8s.io/yaml`, that is YAML 1.1's plain scalars and JSON's
//! data model): `yes`, `on` and `y` are booleans, `0o17` and `017` are numbers, keys are strings, `<<` merges. A
//! JSON file is a YAML file. Unlike there, a key that stands twice in one mapping is an error.
//!
//! A file is split into documents first (a line that starts with `---` can be nothing else, YAML 1.2.2 section
//! 9.1.2), so a broken document breaks no other, an unchanged one need not be parsed again, and no more than one
//! tree exists at a time. Everything is bounded by [`Limits`]; the tree borrows its strings from the text.

mod plain;
mod scalar;
mod surrogates;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span};

/// A place in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Position {
    /// The line, from 1.
    pub line: u32,
    /// The column, from 1, in characters.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value and where it starts.
#[derive(Clone, PartialEq, Debug)]
pub struct Node<'s> {
    /// The value.
    pub value: Value<'s>,
    /// Its first character. What an alias stands for is where the anchor is.
    pub position: Position,
}

/// A value of JSON's data model.
#[derive(Clone, PartialEq, Debug)]
pub enum Value<'s> {
    /// `null`, `~`, or nothing.
    Null,
    /// A boolean.
    Bool(bool),
    /// A whole number of 64 bits.
    Int(i64),
    /// Any other number; larger whole numbers too.
    Float(f64),
    /// A string.
    String(Cow<'s, str>),
    /// A sequence.
    Sequence(Vec<Node<'s>>),
    /// A mapping, in the order of the file; no key stands twice.
    Mapping(Vec<Entry<'s>>),
}

/// A key of a mapping and its value.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry<'s> {
    /// The key; numbers and booleans are keys in their written form.
    pub key: Cow<'s, str>,
    /// The key's first character.
    pub position: Position,
    /// The value.
    pub value: Node<'s>,
}

impl Value<'_> {
    /// What kind of value it is, in the words of an error message.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Int(_) => "an integer",
            Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::Sequence(_) => "a list",
            Self::Mapping(_) => "a mapping",
        }
    }
}

impl<'s> Node<'s> {
    /// The value of `key`, if this is a mapping that has it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Node<'s>> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.value),
            _ => None,
        }
    }

    /// The string, if this is one.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }
}

/// What a document may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The size of one document in bytes.
    pub document_bytes: usize,
    /// How deep values may nest.
    pub depth: usize,
    /// The number of values in one document.
    pub nodes: usize,
    /// How many of these aliases and merges may make. A copied string counts one more for each 64 bytes.
    pub alias_nodes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // A pod has some 300 values and nests 12 deep. A `kind: List` of a whole cluster is one document.
        Self { document_bytes: 64 << 20, depth: 100, nodes: 2_000_000, alias_nodes: 100_000 }
    }
}

/// Why a text is no document.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{position}: {problem}")]
pub struct SyntaxError {
    /// Where.
    pub position: Position,
    /// What.
    pub problem: Problem,
}

/// What is wrong with a document.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    /// Not YAML.
    #[error("{0}")]
    Malformed(String),
    /// A key that stands twice in one mapping.
    #[error("the key {key:?} is already set at {first}")]
    DuplicateKey {
        /// The key.
        key: String,
        /// Where it stood first.
        first: Position,
    },
    /// A limit is exceeded.
    #[error("{0}")]
    TooLarge(String),
}

impl SyntaxError {
    fn malformed(position: Position, message: impl Into<String>) -> Self {
        Self { position, problem: Problem::Malformed(message.into()) }
    }

    fn too_large(position: Position, message: impl Into<String>) -> Self {
        Self { position, problem: Problem::TooLarge(message.into()) }
    }
}

/// The text of one document of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Text<'s> {
    /// The text, with the `---` line that it starts with.
    pub text: &'s str,
    /// How many lines of the file stand before it.
    pub lines_before: u32,
}

/// Splits a file into documents. Those without content (blank lines and comments) are left out.
pub fn documents(file: &str) -> impl Iterator<Item = Text<'_>> {
    let mut rest = file.strip_prefix('\u{feff}').unwrap_or(file);
    let mut lines_before = 0;
    std::iter::from_fn(move || {
        loop {
            if rest.is_empty() {
                return None;
            }
            let (end, lines, has_content) = document_end(rest);
            let (text, tail) = rest.split_at_checked(end).unwrap_or((rest, ""));
            let found = Text { text, lines_before };
            rest = tail;
            lines_before += lines;
            if has_content {
                return Some(found);
            }
        }
    })
}

/// Where the document at the start of `rest` ends, how many lines that is, and whether it holds anything.
fn document_end(rest: &str) -> (usize, u32, bool) {
    let (mut offset, mut lines, mut has_content, mut has_started) = (0, 0, false, false);
    for line in rest.split_inclusive('\n') {
        if is_marker(line, "---") {
            // Directives stand before the line that starts their document.
            if has_started || has_content {
                break;
            }
            has_started = true;
        }
        offset += line.len();
        lines += 1;
        if is_marker(line, "...") {
            break;
        }
        let body = line.strip_prefix("---").unwrap_or(line).trim_start();
        has_content |= !body.is_empty() && !body.starts_with('#') && !line.starts_with('%');
    }
    (offset, lines, has_content)
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Reads one document. `None` for one without content.
///
/// # Errors
/// The text is not YAML, has a key twice, or exceeds a limit.
pub fn parse<'s>(document: Text<'s>, limits: &Limits) -> Result<Option<Node<'s>>, SyntaxError> {
    let start = Position { line: document.lines_before + 1, column: 1 };
    if document.text.len() > limits.document_bytes {
        let message =
            format!("the document has {} bytes; at most {}", document.text.len(), limits.document_bytes);
        return Err(SyntaxError::too_large(start, message));
    }
    match plain::parse(document, limits) {
        Some(root) => Ok(Some(root)),
        None => parse_any(document, limits).or_else(|error| match surrogates::joined(document.text) {
            Some(text) => {
                let root = parse_any(Text { text: &text, ..document }, limits)?;
                Ok(root.map(Node::into_owned))
            }
            None => Err(error),
        }),
    }
}

/// Reads one document with the full parser.
fn parse_any<'s>(document: Text<'s>, limits: &Limits) -> Result<Option<Node<'s>>, SyntaxError> {
    refuse_control_characters(document)?;
    let mut builder = Builder::new(document.lines_before, limits);
    let mut parser = Parser::new_from_str(document.text);
    let mut root = None;
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|e| {
            SyntaxError::malformed(builder.position(*e.marker()), format!("not YAML: {}", e.info()))
        })?;
        if matches!(event, Event::DocumentStart(_)) && root.is_some() {
            let message = "a second document starts without a line '---' of its own";
            return Err(SyntaxError::malformed(builder.position(span.start), message));
        }
        if let Some(node) = builder.event(event, span)? {
            root = Some(node);
        }
    }
    Ok(root.filter(|node| node.value != Value::Null))
}

/// NUL ends the text for the scanner, so what follows would be dropped; YAML 1.2.2 section 5.1 allows none of
/// these.
fn refuse_control_characters(document: Text<'_>) -> Result<(), SyntaxError> {
    let refused = |b: &u8| (*b < 0x20 && !matches!(b, b'\t' | b'\n' | b'\r')) || *b == 0x7f;
    let Some(offset) = document.text.bytes().position(|b| refused(&b)) else { return Ok(()) };
    let before = document.text.get(..offset).unwrap_or_default();
    let line = before.rsplit('\n').next().unwrap_or_default();
    let position = Position {
        line: document.lines_before + 1 + count(before.matches('\n')),
        column: 1 + count(line.chars()),
    };
    Err(SyntaxError::malformed(position, "a control character, which YAML does not allow"))
}

fn count(items: impl Iterator) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

/// A collection whose end has not come yet.
enum Open<'s> {
    Sequence {
        /// `None` for a block list: it starts with its first item.
        position: Option<Position>,
        anchor: usize,
        items: Vec<Node<'s>>,
    },
    Mapping {
        position: Position,
        anchor: usize,
        entries: Vec<Entry<'s>>,
        key: Option<(Cow<'s, str>, Position, bool)>,
        merges: Vec<Node<'s>>,
    },
}

/// Builds the tree from events.
struct Builder<'s, 'l> {
    lines_before: u32,
    limits: &'l Limits,
    open: Vec<Open<'s>>,
    anchors: HashMap<usize, Node<'s>>,
    nodes: usize,
    alias_nodes: usize,
}

impl<'s, 'l> Builder<'s, 'l> {
    fn new(lines_before: u32, limits: &'l Limits) -> Self {
        Self { lines_before, limits, open: Vec::new(), anchors: HashMap::new(), nodes: 0, alias_nodes: 0 }
    }

    fn position(&self, marker: Marker) -> Position {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Position {
            line: self.lines_before.saturating_add(number(marker.line())),
            column: number(marker.col()).saturating_add(1),
        }
    }

    /// Takes an event; returns the root when it is complete.
    fn event(&mut self, event: Event<'s>, span: Span) -> Result<Option<Node<'s>>, SyntaxError> {
        let position = self.position(span.start);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.as_deref().map(|t| (t.handle.as_str(), t.suffix.as_str()));
                // A plain `<<` is the merge key; a quoted one is a key like any other.
                let merge = style == ScalarStyle::Plain && tag.is_none() && text == "<<";
                let value = scalar::resolve(text, style == ScalarStyle::Plain, tag)
                    .map_err(|message| SyntaxError::malformed(position, message))?;
                self.complete(Node { value, position }, anchor, merge)
            }
            Event::SequenceStart(anchor, tag) => {
                self.enter(position, tag.as_deref(), "seq")?;
                // Where the parser says that a block list starts depends on what it stands in.
                let position = (!span.is_empty()).then_some(position);
                self.open.push(Open::Sequence { position, anchor, items: Vec::new() });
                Ok(None)
            }
            Event::MappingStart(anchor, tag) => {
                self.enter(position, tag.as_deref(), "map")?;
                self.open.push(Open::Mapping {
                    position,
                    anchor,
                    entries: Vec::new(),
                    key: None,
                    merges: Vec::new(),
                });
                Ok(None)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::Sequence { position: start, anchor, items }) => {
                    let position = start.or(items.first().map(|i| i.position)).unwrap_or(position);
                    self.complete(Node { value: Value::Sequence(items), position }, anchor, false)
                }
                Some(Open::Mapping { position, anchor, entries, merges, .. }) => {
                    let entries = self.finish_mapping(entries, merges)?;
                    self.complete(Node { value: Value::Mapping(entries), position }, anchor, false)
                }
                None => Ok(None),
            },
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    let message = "an alias to an anchor that is not complete, or of another document";
                    return Err(SyntaxError::malformed(position, message));
                };
                let cost = cost(node);
                let node = node.clone();
                self.charge_alias(cost, position)?;
                self.complete(node, 0, false)
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => Ok(None),
        }
    }

    /// Checks what a collection that starts here must keep to.
    fn enter(
        &mut self,
        position: Position,
        tag: Option<&saphyr_parser::Tag>,
        own: &str,
    ) -> Result<(), SyntaxError> {
        if let Some(tag) = tag
            && !(tag.is_yaml_core_schema() && tag.suffix == own)
        {
            let message = format!("the tag {tag} is not used in manifests");
            return Err(SyntaxError::malformed(position, message));
        }
        if self.open.len() >= self.limits.depth {
            let message = format!("values nest deeper than {}", self.limits.depth);
            return Err(SyntaxError::too_large(position, message));
        }
        if let Some(Open::Mapping { key: None, .. }) = self.open.last() {
            return Err(SyntaxError::malformed(position, "a key must be a string, not a list or mapping"));
        }
        Ok(())
    }

    /// Puts a complete node where it belongs.
    fn complete(
        &mut self,
        node: Node<'s>,
        anchor: usize,
        merge_key: bool,
    ) -> Result<Option<Node<'s>>, SyntaxError> {
        self.nodes += 1;
        if self.nodes > self.limits.nodes {
            let message = format!("the document has more than {} values", self.limits.nodes);
            return Err(SyntaxError::too_large(node.position, message));
        }
        if anchor != 0 {
            self.charge_alias(cost(&node), node.position)?;
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            None => return Ok(Some(node)),
            Some(Open::Sequence { items, .. }) => items.push(node),
            Some(Open::Mapping { entries, key, merges, .. }) => match key.take() {
                None => {
                    let position = node.position;
                    let text = scalar::key(node.value)
                        .map_err(|message| SyntaxError::malformed(position, message))?;
                    *key = Some((text, position, merge_key));
                }
                Some((_, _, true)) => merges.push(node),
                Some((text, position, false)) => entries.push(Entry { key: text, position, value: node }),
            },
        }
        Ok(None)
    }

    fn charge_alias(&mut self, cost: usize, position: Position) -> Result<(), SyntaxError> {
        self.alias_nodes = self.alias_nodes.saturating_add(cost);
        self.nodes = self.nodes.saturating_add(cost);
        if self.alias_nodes > self.limits.alias_nodes {
            let message = format!("aliases make more than {} values", self.limits.alias_nodes);
            return Err(SyntaxError::too_large(position, message));
        }
        Ok(())
    }

    /// Refuses duplicate keys and adds what `<<` brings: keys that are not there, the first source first.
    fn finish_mapping(
        &mut self,
        mut entries: Vec<Entry<'s>>,
        merges: Vec<Node<'s>>,
    ) -> Result<Vec<Entry<'s>>, SyntaxError> {
        refuse_duplicates(&entries)?;
        for merge in merges {
            let position = merge.position;
            let sources = match merge.value {
                Value::Sequence(items) => items,
                value => vec![Node { value, position }],
            };
            for source in sources {
                let Value::Mapping(new) = source.value else {
                    let message = "'<<' takes a mapping or a list of mappings";
                    return Err(SyntaxError::malformed(source.position, message));
                };
                // Each is compared with all that is there: bounded like the copies that aliases make.
                self.charge_alias(new.len().saturating_mul(entries.len() / 64), position)?;
                for entry in new {
                    if !entries.iter().any(|e| e.key == entry.key) {
                        entries.push(entry);
                    }
                }
            }
        }
        Ok(entries)
    }
}

fn refuse_duplicates(entries: &[Entry<'_>]) -> Result<(), SyntaxError> {
    let duplicate = |second: &Entry<'_>, first: Position| SyntaxError {
        position: second.position,
        problem: Problem::DuplicateKey { key: second.key.chars().take(100).collect(), first },
    };
    if entries.len() <= 16 {
        for (i, second) in entries.iter().enumerate() {
            if let Some(first) = entries.iter().take(i).find(|e| e.key == second.key) {
                return Err(duplicate(second, first.position));
            }
        }
        return Ok(());
    }
    let mut seen: HashMap<&str, Position> = HashMap::with_capacity(entries.len());
    for entry in entries {
        if let Some(first) = seen.insert(&entry.key, entry.position) {
            return Err(duplicate(entry, first));
        }
    }
    Ok(())
}

/// What a copy of `node` costs, see [`Limits::alias_nodes`].
fn cost(node: &Node<'_>) -> usize {
    let text = |t: &Cow<'_, str>| match t {
        Cow::Borrowed(_) => 0,
        Cow::Owned(t) => t.len() / 64,
    };
    1 + match &node.value {
        Value::Sequence(items) => items.iter().map(cost).sum(),
        Value::Mapping(entries) => entries.iter().map(|e| 1 + text(&e.key) + cost(&e.value)).sum(),
        Value::String(t) => text(t),
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) => 0,
    }
}

#[cfg(test)]
mod tests;
