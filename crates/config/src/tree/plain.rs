//! The part of YAML that programs write: block mappings and lists of one-line scalars, and JSON.
//!
//! 100,000 pods are 50 MB of it, and reading them is most of a start. This reader takes a tenth of the time of a
//! full one. It knows little, and gives up (`None`) on everything else: anchors, tags, block scalars, comments
//! behind values, multi-line scalars, anything that is not ASCII, and every error. What it does read it reads to
//! exactly the tree that the full reader makes of it, positions included; a property test holds it to that.

use std::borrow::Cow;

use super::{Entry, Limits, Node, Position, Text, Value, refuse_duplicates, scalar};

/// Keys are cut off at 1024 characters (YAML 1.2.2 section 7.4.2); the full reader shall decide where exactly.
const LONGEST_KEY: usize = 500;

/// The tree of a document, if it is of the kind that is read here.
pub(super) fn parse<'s>(document: Text<'s>, limits: &Limits) -> Option<Node<'s>> {
    let bytes = document.text.as_bytes();
    // Without early exit, so that it is a few instructions for 32 bytes.
    let plain = bytes.iter().fold(true, |ok, b| ok & (matches!(b, b' '..=b'~') | (*b == b'\n')));
    if !plain {
        return None;
    }
    let mut reader = Reader {
        text: document.text,
        bytes,
        next: 0,
        number: document.lines_before,
        line: None,
        limits,
        nodes: 0,
    };
    reader.advance();
    if reader.line.is_some_and(|l| reader.content(l) == b"---") {
        reader.advance();
    }
    let line = reader.line?;
    let root = match bytes.get(line.start)? {
        b'{' => reader.flow_document(line)?,
        _ if line.indent() == 0 => reader.block(0)?,
        _ => return None,
    };
    (reader.line.is_none() && reader.nodes <= limits.nodes).then_some(root)
}

/// A line with content, or the rest of one behind a `- `.
#[derive(Clone, Copy)]
struct Line {
    /// Where the line begins.
    begin: usize,
    /// Where the content starts and ends.
    start: usize,
    end: usize,
    /// Whether blanks follow the content.
    trailing: bool,
    number: u32,
}

impl Line {
    fn indent(self) -> usize {
        self.start - self.begin
    }

    fn at(self, offset: usize) -> Position {
        let column = u32::try_from(offset - self.begin).unwrap_or(u32::MAX);
        Position { line: self.number, column: column.saturating_add(1) }
    }
}

struct Reader<'s, 'l> {
    text: &'s str,
    bytes: &'s [u8],
    /// Where the line after the current one begins.
    next: usize,
    number: u32,
    line: Option<Line>,
    limits: &'l Limits,
    nodes: usize,
}

impl<'s> Reader<'s, '_> {
    /// Goes to the next line that holds something.
    fn advance(&mut self) {
        loop {
            let begin = self.next;
            let rest = self.bytes.get(begin..).unwrap_or_default();
            if rest.is_empty() {
                self.line = None;
                return;
            }
            let length = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            self.next = begin + length + 1;
            self.number += 1;
            let content = rest.get(..length).unwrap_or_default();
            let indent = content.iter().position(|b| *b != b' ').unwrap_or(length);
            let end = content.iter().rposition(|b| *b != b' ').map_or(indent, |last| last + 1);
            if indent == length || content.get(indent) == Some(&b'#') {
                continue;
            }
            self.line = Some(Line {
                begin,
                start: begin + indent,
                end: begin + end,
                trailing: end < length,
                number: self.number,
            });
            return;
        }
    }

    fn content(&self, line: Line) -> &'s [u8] {
        self.bytes.get(line.start..line.end).unwrap_or_default()
    }

    fn slice(&self, start: usize, end: usize) -> &'s str {
        self.text.get(start..end).unwrap_or_default()
    }

    /// Counts a value, or a key.
    fn count(&mut self) -> Option<()> {
        self.nodes += 1;
        (self.nodes <= self.limits.nodes).then_some(())
    }

    /// The mapping or list that starts at the current line.
    fn block(&mut self, depth: usize) -> Option<Node<'s>> {
        if depth >= self.limits.depth {
            return None;
        }
        let line = self.line?;
        self.count()?;
        if is_item(self.content(line)) {
            self.sequence(line.indent(), depth)
        } else {
            self.mapping(line, depth)
        }
    }

    fn mapping(&mut self, first: Line, depth: usize) -> Option<Node<'s>> {
        let indent = first.indent();
        let mut entries = Vec::new();
        while let Some(line) = self.line.filter(|l| l.indent() >= indent) {
            if line.indent() > indent {
                return None;
            }
            let colon = self.key_end(line)?;
            let key = scalar::key(resolve(self.slice(line.start, colon))).ok()?;
            self.count()?;
            let value = self.value(line, colon + 1, indent, depth)?;
            entries.push(Entry { key, position: line.at(line.start), value });
        }
        refuse_duplicates(&entries).ok()?;
        Some(Node { value: Value::Mapping(entries), position: first.at(first.start) })
    }

    /// Where the key at the start of a line ends: at a colon with a blank or nothing behind it.
    fn key_end(&self, line: Line) -> Option<usize> {
        let content = self.content(line);
        let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'/' | b'-');
        let length = content.iter().position(|b| !inner(b))?;
        let starts = content.first().is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
        let ends = content.get(length) == Some(&b':') && matches!(content.get(length + 1), None | Some(b' '));
        (starts && ends && length <= LONGEST_KEY).then_some(line.start + length)
    }

    /// The value behind the colon before `offset`; goes to the line after it. Nothing is where the colon is.
    fn value(&mut self, line: Line, offset: usize, indent: usize, depth: usize) -> Option<Node<'s>> {
        let start = self.skip_blanks(offset, line.end);
        if start < line.end {
            let node = self.inline(Line { start, ..line }, depth + 1)?;
            self.advance();
            return self.ends_above(indent).then_some(node);
        }
        if line.trailing {
            return None;
        }
        self.advance();
        match self.line {
            Some(next) if next.indent() > indent => self.block(depth + 1),
            Some(next) if next.indent() == indent && is_item(self.content(next)) => self.block(depth + 1),
            _ => {
                self.count()?;
                Some(Node { value: Value::Null, position: line.at(offset - 1) })
            }
        }
    }

    /// Whether the current line belongs to no scalar that began before: then it is not indented more.
    fn ends_above(&self, indent: usize) -> bool {
        self.line.is_none_or(|next| next.indent() <= indent)
    }

    fn sequence(&mut self, indent: usize, depth: usize) -> Option<Node<'s>> {
        let mut items: Vec<Node<'s>> = Vec::new();
        while let Some(line) = self.line.filter(|l| l.indent() == indent && is_item(self.content(*l))) {
            let start = self.skip_blanks(line.start + 1, line.end);
            let rest = Line { start, ..line };
            let item = if start < line.end {
                if is_item(self.content(rest)) || self.key_end(rest).is_some() {
                    self.line = Some(rest);
                    self.block(depth + 1)?
                } else {
                    let node = self.inline(rest, depth + 1)?;
                    self.advance();
                    if !self.ends_above(indent) {
                        return None;
                    }
                    node
                }
            } else if line.trailing {
                return None;
            } else {
                self.advance();
                if self.line.is_some_and(|next| next.indent() > indent) {
                    self.block(depth + 1)?
                } else {
                    self.count()?;
                    Node { value: Value::Null, position: line.at(line.start + 1) }
                }
            };
            items.push(item);
        }
        let position = items.first()?.position;
        Some(Node { value: Value::Sequence(items), position })
    }

    fn skip_blanks(&self, offset: usize, end: usize) -> usize {
        let rest = self.bytes.get(offset..end).unwrap_or_default();
        offset + rest.iter().position(|b| *b != b' ').unwrap_or(rest.len())
    }

    /// The scalar, or the flow collection of one line, that `rest` is.
    fn inline(&mut self, rest: Line, depth: usize) -> Option<Node<'s>> {
        let content = self.content(rest);
        let position = rest.at(rest.start);
        let value = match content.first()? {
            b'"' | b'\'' => {
                let (text, end) = self.quoted(rest.start, rest.end)?;
                if end != rest.end {
                    return None;
                }
                Value::String(text)
            }
            b'{' | b'[' => {
                let mut flow = Flow { line: rest, at: rest.start, end: rest.end, lines: false };
                let node = self.flow(&mut flow, depth)?;
                return (flow.at == rest.end).then_some(node);
            }
            first if !starts_plain(*first, content.get(1).copied()) => return None,
            _ => {
                let mut previous = b' ';
                for (byte, next) in content.iter().zip(content.iter().skip(1).map(Some).chain([None])) {
                    let comment = *byte == b'#' && previous == b' ';
                    let colon = *byte == b':' && matches!(next, None | Some(b' '));
                    if comment || colon {
                        return None;
                    }
                    previous = *byte;
                }
                resolve(self.slice(rest.start, rest.end))
            }
        };
        self.count()?;
        Some(Node { value, position })
    }

    /// The text in the quotes that start at `start`, and where they end.
    fn quoted(&self, start: usize, end: usize) -> Option<(Cow<'s, str>, usize)> {
        let content = self.bytes.get(start + 1..end)?;
        let quote = *self.bytes.get(start)?;
        let special = |b: &u8| *b == quote || *b == b'\n' || (quote == b'"' && *b == b'\\');
        let length = content.iter().position(special)?;
        let close = start + 1 + length;
        match self.bytes.get(close)? {
            b'\\' => self.escaped(start + 1, end),
            b'\n' => None,
            _ if quote == b'\'' && self.bytes.get(close + 1) == Some(&b'\'') => None,
            _ => Some((Cow::Borrowed(self.slice(start + 1, close)), close + 1)),
        }
    }

    /// The same for text with backslashes; only the escapes that JSON writers use for ASCII text.
    fn escaped(&self, start: usize, end: usize) -> Option<(Cow<'s, str>, usize)> {
        let mut text = String::new();
        let mut at = start;
        loop {
            let rest = self.bytes.get(at..end)?;
            let length = rest.iter().position(|b| matches!(b, b'"' | b'\\' | b'\n'))?;
            text.push_str(self.slice(at, at + length));
            at += length;
            match (self.bytes.get(at)?, self.bytes.get(at + 1)) {
                (b'"', _) => return Some((Cow::Owned(text), at + 1)),
                (b'\\', Some(b'"')) => text.push('"'),
                (b'\\', Some(b'\\')) => text.push('\\'),
                (b'\\', Some(b'n')) => text.push('\n'),
                (b'\\', Some(b't')) => text.push('\t'),
                _ => return None,
            }
            at += 2;
        }
    }

    /// A document that is one flow mapping, over any number of lines: JSON.
    fn flow_document(&mut self, line: Line) -> Option<Node<'s>> {
        let begin = Line { end: self.bytes.len(), ..line };
        let mut flow = Flow { line: begin, at: line.start, end: self.bytes.len(), lines: true };
        let node = self.flow(&mut flow, 0)?;
        flow.skip(self.bytes);
        self.line = None;
        (flow.at == flow.end).then_some(node)
    }

    fn flow(&mut self, flow: &mut Flow, depth: usize) -> Option<Node<'s>> {
        self.count()?;
        let (start, position) = (flow.at, flow.line.at(flow.at));
        let value = match self.bytes.get(start).filter(|_| start < flow.end)? {
            b'{' if depth < self.limits.depth => Value::Mapping(self.flow_mapping(flow, depth)?),
            b'[' if depth < self.limits.depth => Value::Sequence(self.flow_sequence(flow, depth)?),
            b'"' | b'\'' => {
                let (text, end) = self.quoted(start, flow.end)?;
                flow.at = end;
                Value::String(text)
            }
            b'{' | b'[' => return None,
            _ => {
                flow.at = self.flow_plain(flow)?;
                resolve(self.slice(start, flow.at))
            }
        };
        Some(Node { value, position })
    }

    /// Where the plain scalar at `flow` ends. It is one word.
    fn flow_plain(&self, flow: &Flow) -> Option<usize> {
        let content = self.bytes.get(flow.at..flow.end)?;
        let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'/' | b'-' | b'+');
        let length = content.iter().position(|b| !inner(b))?;
        let starts = starts_plain(*content.first()?, content.get(1).copied());
        (starts && length > 0 && length <= LONGEST_KEY).then_some(flow.at + length)
    }

    fn flow_sequence(&mut self, flow: &mut Flow, depth: usize) -> Option<Vec<Node<'s>>> {
        let mut items = Vec::new();
        flow.at += 1;
        flow.skip(self.bytes);
        if flow.take(self.bytes, b']') {
            return Some(items);
        }
        loop {
            items.push(self.flow(flow, depth + 1)?);
            flow.skip(self.bytes);
            if flow.take(self.bytes, b']') {
                return Some(items);
            }
            if !flow.take(self.bytes, b',') {
                return None;
            }
            flow.skip(self.bytes);
        }
    }

    fn flow_mapping(&mut self, flow: &mut Flow, depth: usize) -> Option<Vec<Entry<'s>>> {
        let mut entries = Vec::new();
        flow.at += 1;
        flow.skip(self.bytes);
        if flow.take(self.bytes, b'}') {
            return Some(entries);
        }
        loop {
            let first = *self.bytes.get(flow.at)?;
            let start = flow.at;
            if matches!(first, b'{' | b'[') {
                return None;
            }
            let key = self.flow(flow, depth)?;
            let is_quoted = matches!(first, b'"' | b'\'');
            if flow.at - start > LONGEST_KEY || !flow.take(self.bytes, b':') {
                return None;
            }
            let before = flow.at;
            flow.skip(self.bytes);
            if before == flow.at && !is_quoted {
                return None;
            }
            let value = self.flow(flow, depth + 1)?;
            entries.push(Entry { key: scalar::key(key.value).ok()?, position: key.position, value });
            flow.skip(self.bytes);
            if flow.take(self.bytes, b'}') {
                refuse_duplicates(&entries).ok()?;
                return Some(entries);
            }
            if !flow.take(self.bytes, b',') {
                return None;
            }
            flow.skip(self.bytes);
        }
    }
}

/// A place in a flow collection.
struct Flow {
    /// The line that `at` is in; only its beginning and number count.
    line: Line,
    at: usize,
    end: usize,
    /// Whether it may go over several lines.
    lines: bool,
}

impl Flow {
    fn skip(&mut self, bytes: &[u8]) {
        while self.at < self.end {
            match bytes.get(self.at) {
                Some(b' ') => self.at += 1,
                Some(b'\n') if self.lines => {
                    self.at += 1;
                    self.line.begin = self.at;
                    self.line.number += 1;
                }
                _ => return,
            }
        }
    }

    fn take(&mut self, bytes: &[u8], wanted: u8) -> bool {
        let found = self.at < self.end && bytes.get(self.at) == Some(&wanted);
        self.at += usize::from(found);
        found
    }
}

fn is_item(content: &[u8]) -> bool {
    matches!(content, [b'-'] | [b'-', b' ', ..])
}

/// Whether a plain scalar that is read here may start so.
fn starts_plain(first: u8, second: Option<u8>) -> bool {
    match first {
        b'-' | b'.' | b'+' => second.is_some_and(|b| b.is_ascii_alphanumeric()),
        _ => first.is_ascii_alphanumeric() || matches!(first, b'_' | b'/' | b'(' | b'~' | b'$' | b'='),
    }
}

fn resolve(text: &str) -> Value<'_> {
    scalar::resolve_plain(Cow::Borrowed(text))
}
