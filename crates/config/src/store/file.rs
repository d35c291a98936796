//! A file: its documents, and what there is to say about them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::diagnostic::{Code, Diagnostic, Severity};
use crate::fields::{Context, Cursor};
use crate::labels::Pool;
use crate::resource::{self, Kind, LIST, ObjectKey, Reading};
use crate::store::More;
use crate::store::key::Packed;
use crate::tree::{Node, Position, Text};

/// How many errors are kept of a file, and how many of what is less.
pub(super) const MOST_DIAGNOSTICS: usize = 200;

/// How many more diagnostics a file may have. Errors are counted apart: no number of lesser findings hides that
/// there are any.
pub(super) struct Room {
    errors: usize,
    others: usize,
}

impl Room {
    pub(super) fn new() -> Self {
        Self { errors: MOST_DIAGNOSTICS, others: MOST_DIAGNOSTICS }
    }

    fn take(&mut self, severity: Severity) -> bool {
        let left = if severity == Severity::Error { &mut self.errors } else { &mut self.others };
        let taken = *left > 0;
        *left -= usize::from(taken);
        taken
    }
}

/// In which file an object is in force, and where there.
pub(super) type Elsewhere<'e> = dyn Fn(&ObjectKey) -> Option<(Arc<str>, Option<Position>)> + 'e;

/// A file.
#[derive(Debug, Default)]
pub(super) struct File {
    /// What it is called by its objects.
    pub(super) number: u32,
    pub(super) documents: Vec<Document>,
    /// Objects that stay in force though they are in no document, see the module above.
    pub(super) orphans: BTreeSet<ObjectKey>,
    /// Why the file's content was not taken.
    pub(super) problems: Vec<Diagnostic>,
    /// What was said last, by hashes.
    pub(super) said: Vec<u64>,
}

/// A document that was read: small, since there is one for each object.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) hash: u64,
    pub(super) length: u32,
    pub(super) lines_before: u32,
    content: Content,
}

/// What is in a document: nearly always one object of which nothing is to be said.
#[derive(Debug)]
enum Content {
    One(Held),
    Other(Box<Other>),
}

#[derive(Debug)]
struct Other {
    held: Box<[Held]>,
    unidentified: bool,
    said: Said,
}

#[derive(Debug, Default)]
struct Said {
    /// With lines relative to the document.
    diagnostics: Vec<Diagnostic>,
    suppressed: u32,
}

/// An object in a document.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) key: Packed,
    line: u32,
    /// Of a column beyond, which a file of one line may have, this is said instead: 2^24 - 1.
    column: [u8; 3],
    pub(super) state: State,
}

impl Held {
    /// An object at a position relative to the document.
    pub(super) fn new(key: Packed, position: Position, state: State) -> Self {
        let [_, column @ ..] = position.column.min(0x00ff_ffff).to_be_bytes();
        Self { key, line: position.line, column, state }
    }

    fn position(&self) -> Position {
        let [a, b, c] = self.column;
        Position { line: self.line, column: u32::from_be_bytes([0, a, b, c]) }
    }
}

/// What is in force of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The object as it stands here.
    InForce,
    /// It has errors, and what it was before is in force.
    LastGood,
    /// It has errors, and something that fails closed in its place.
    StandIn,
    /// Another object of its name.
    Shadowed,
    /// It has errors, and nothing of it is in force.
    Nothing,
}

impl Document {
    /// Reads the objects of a document.
    pub(super) fn read(
        path: &Arc<str>,
        text: Text<'_>,
        root: &Node<'_>,
        hash: u64,
        pool: &mut Pool,
        room: &mut Room,
    ) -> (Self, Vec<(Reading, Position)>) {
        let (mut readings, mut diagnostics, mut suppressed) = (Vec::new(), Vec::new(), 0);
        let mut keep = |new: Vec<Diagnostic>| {
            for mut diagnostic in new {
                if !room.take(diagnostic.severity) {
                    suppressed += 1;
                    continue;
                }
                diagnostic.line = diagnostic.line.saturating_sub(text.lines_before);
                diagnostics.push(diagnostic);
            }
        };
        let items = resource::list_items(root);
        if items.is_some() {
            let mut context = Context::new(path, text, pool);
            if let Some(mut list) = Cursor::root(root, &LIST, &mut context).fields() {
                list.take("items");
            }
            keep(context.take_diagnostics());
        }
        for node in items.unwrap_or(std::slice::from_ref(root)) {
            let mut context = Context::new(path, text, pool);
            let reading = resource::read(node, &mut context);
            keep(context.take_diagnostics());
            let position =
                Position { line: node.position.line.saturating_sub(text.lines_before), ..node.position };
            readings.push((reading, position));
        }
        let other = Other {
            held: Box::default(),
            unidentified: readings.iter().any(|(r, _)| matches!(r, Reading::Unidentified)),
            said: Said { diagnostics, suppressed },
        };
        let document = Self {
            hash,
            length: u32::try_from(text.text.len()).unwrap_or(u32::MAX),
            lines_before: text.lines_before,
            content: Content::Other(Box::new(other)),
        };
        (document, readings)
    }

    /// Puts what became of its objects into a document that was read.
    pub(super) fn hold(&mut self, mut list: Vec<Held>) {
        let Content::Other(other) = &mut self.content else { return };
        let is_plain = !other.unidentified && other.said.suppressed == 0 && other.said.diagnostics.is_empty();
        match list.pop() {
            Some(one) if is_plain && list.is_empty() => self.content = Content::One(one),
            last => {
                list.extend(last);
                other.held = list.into();
            }
        }
    }

    /// Its objects.
    pub(super) fn held(&self) -> &[Held] {
        match &self.content {
            Content::One(one) => std::slice::from_ref(one),
            Content::Other(other) => &other.held,
        }
    }

    fn held_mut(&mut self) -> &mut [Held] {
        match &mut self.content {
            Content::One(one) => std::slice::from_mut(one),
            Content::Other(other) => &mut other.held,
        }
    }

    /// Whether there is something in it that could be any object.
    pub(super) fn is_unidentified(&self) -> bool {
        matches!(&self.content, Content::Other(other) if other.unidentified)
    }

    fn said(&self) -> Option<&Said> {
        if let Content::Other(other) = &self.content { Some(&other.said) } else { None }
    }
}

impl File {
    /// The object of a document, in a state.
    pub(super) fn held_mut(&mut self, hash: u64, key: &Packed, state: State) -> Option<&mut Held> {
        let documents = self.documents.iter_mut().filter(|d| d.hash == hash);
        documents.flat_map(Document::held_mut).find(|h| h.key == *key && h.state == state)
    }

    /// An object with errors, of which nothing is in force.
    pub(super) fn broken_mut(&mut self, key: &Packed) -> Option<&mut Held> {
        let mut held = self.documents.iter_mut().flat_map(Document::held_mut);
        held.find(|h| h.key == *key && h.state == State::Nothing)
    }

    /// Where an object in force stands.
    pub(super) fn position_of(&self, key: &Packed) -> Option<Position> {
        self.documents.iter().find_map(|document| {
            let mut held = document.held().iter();
            let held = held.find(|h| {
                h.key == *key && matches!(h.state, State::InForce | State::LastGood | State::StandIn)
            })?;
            Some(document.absolute(held.position()))
        })
    }

    /// What is said of the objects that may be gone.
    fn about_orphans(&self, path: &Arc<str>) -> Option<Diagnostic> {
        if self.orphans.is_empty() {
            return None;
        }
        let names: Vec<String> = self.orphans.iter().take(5).map(|k| k.resource_name().to_string()).collect();
        let message = format!(
            "{} objects are gone, and what cannot be read or identified here may be they; they stay in force: {}",
            self.orphans.len(),
            names.join(", ")
        );
        Some(Diagnostic::about_file(Code::LastGoodVersion, path.clone(), message, ""))
    }

    /// All there is to say, in the order of the file.
    pub(super) fn diagnostics(
        &self,
        path: &Arc<str>,
        elsewhere: &Elsewhere<'_>,
        more: &dyn More,
    ) -> Vec<Diagnostic> {
        let mut all = self.problems.clone();
        all.extend(self.about_orphans(path));
        let mut suppressed = 0;
        for document in &self.documents {
            suppressed += document.said().map_or(0, |said| said.suppressed);
            let start = all.len();
            let has_waypoint = |d: &&Diagnostic| {
                let mut keys = document.held().iter().map(|held| held.key.key());
                let about = |key: &ObjectKey| d.resource.as_ref() == Some(&key.resource_name());
                d.code == Code::NeedsWaypoint && keys.find(about).is_some_and(|key| more.has_waypoint(&key))
            };
            let said = document.said().into_iter().flat_map(|said| &said.diagnostics);
            let said = said.filter(|d| !has_waypoint(d)).cloned();
            all.extend(said.map(|mut diagnostic| {
                diagnostic.line += document.lines_before;
                diagnostic
            }));
            for held in document.held() {
                let key = held.key.key();
                let about = |code, message: String, remedy: String| {
                    Diagnostic::about_file(code, path.clone(), message, remedy)
                        .at(document.absolute(held.position()), "")
                        .about(Some(key.resource_name()))
                };
                match held.state {
                    State::LastGood => {
                        let message = "the object has errors; what it was before stays in force".to_owned();
                        all.push(about(Code::LastGoodVersion, message, String::new()));
                    }
                    State::StandIn => {
                        let (message, remedy) = closed(key.kind);
                        all.push(about(Code::FailsClosed, message, remedy.to_owned()));
                    }
                    State::Shadowed => {
                        let place = match elsewhere(&key) {
                            Some((path, Some(position))) => format!("{path}:{position}"),
                            Some((path, None)) => path.to_string(),
                            None => "another file".to_owned(),
                        };
                        let message = format!("the same object is at {place}, and stays in force");
                        all.push(about(Code::DuplicateObject, message, "remove one of them".to_owned()));
                    }
                    State::InForce | State::Nothing => {}
                }
                if held.state != State::Nothing && held.state != State::Shadowed {
                    all.extend(more.found(&key).into_iter().map(|(code, m, remedy)| about(code, m, remedy)));
                }
            }
            if let Some(new) = all.get_mut(start..) {
                new.sort_by_key(|d| (d.line, d.column));
            }
        }
        if suppressed > 0 {
            let message = format!("{suppressed} more findings are not shown");
            all.push(Diagnostic::about_file(Code::TooManyDiagnostics, path.clone(), message, ""));
        }
        all
    }
}

/// What holds in the place of an object of this kind that has errors, and what to do.
fn closed(kind: Kind) -> (String, &'static str) {
    let effect = match kind {
        Kind::Namespace => {
            let message = "the namespace has errors; until it is corrected, its labels hold, and its connections are encrypted \
                           within a node too";
            return (message.to_owned(), "correct the namespace");
        }
        Kind::PeerAuthentication => "only connections with an identity are let in",
        _ => "every connection is refused",
    };
    let message = format!("the policy has errors; until it is corrected, {effect} where it is for");
    (message, "correct the policy, or remove it")
}

impl Document {
    fn absolute(&self, position: Position) -> Position {
        Position { line: position.line + self.lines_before, ..position }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree;

    #[test]
    fn a_document_takes_little() {
        assert!(size_of::<Document>() <= 40, "{}", size_of::<Document>());
    }

    #[test]
    fn an_object_stands_where_it_stood() {
        let position = |column| Position { line: 7, column };
        let at = |column| {
            let key = ObjectKey { kind: Kind::Pod, namespace: "a".into(), name: "b".into() };
            Held::new(Packed::new("c", &key), position(column), State::InForce).position()
        };
        assert_eq!([at(1), at(0x0012_3456)], [position(1), position(0x0012_3456)]);
        assert_eq!(at(u32::MAX), position(0x00ff_ffff));
    }

    #[test]
    fn positions_are_relative_to_the_document() {
        let file = "---\na: 1\n---\nx\n";
        let text = tree::documents(file).nth(1).unwrap();
        let root = tree::parse(text, &tree::Limits::default()).unwrap().unwrap();
        let (mut pool, mut room) = (Pool::default(), Room::new());
        let (document, readings) = Document::read(&"f".into(), text, &root, 1, &mut pool, &mut room);
        assert!(document.is_unidentified() && readings.len() == 1);
        assert_eq!((document.said().unwrap().diagnostics[0].line, document.lines_before), (2, 2));
        assert_eq!(document.absolute(readings[0].1), Position { line: 4, column: 1 });
    }
}
