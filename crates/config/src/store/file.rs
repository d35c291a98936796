//! A file: its documents, and what there is to say about them.

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
    pub(super) documents: Vec<Document>,
    /// Objects that stay in force though they are in no document, see the module above.
    pub(super) orphans: Vec<ObjectKey>,
    /// Why the file's content was not taken.
    pub(super) problems: Vec<Diagnostic>,
    /// What was said last, by hashes.
    pub(super) said: Vec<u64>,
}

/// A document that was read.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) hash: u64,
    pub(super) held: Objects,
    pub(super) length: u32,
    pub(super) lines_before: u32,
    pub(super) unidentified: bool,
    /// What there is to say, of most documents nothing.
    said: Option<Box<Said>>,
}

#[derive(Debug)]
struct Said {
    /// With lines relative to the document.
    diagnostics: Vec<Diagnostic>,
    suppressed: u32,
}

/// The objects in a document; nearly always one.
#[derive(Debug)]
pub(super) enum Objects {
    One(Held),
    Some(Box<[Held]>),
}

impl From<Vec<Held>> for Objects {
    fn from(mut list: Vec<Held>) -> Self {
        match list.pop() {
            Some(one) if list.is_empty() => Self::One(one),
            last => {
                list.extend(last);
                Self::Some(list.into())
            }
        }
    }
}

impl Objects {
    pub(super) fn as_slice(&self) -> &[Held] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Some(list) => list,
        }
    }

    fn as_mut_slice(&mut self) -> &mut [Held] {
        match self {
            Self::One(one) => std::slice::from_mut(one),
            Self::Some(list) => list,
        }
    }
}

/// An object in a document.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) key: Packed,
    /// Relative to the document.
    pub(super) position: Position,
    pub(super) state: State,
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
        let document = Self {
            hash,
            length: u32::try_from(text.text.len()).unwrap_or(u32::MAX),
            lines_before: text.lines_before,
            unidentified: readings.iter().any(|(r, _)| matches!(r, Reading::Unidentified)),
            held: Objects::Some(Box::new([])),
            said: (suppressed > 0 || !diagnostics.is_empty())
                .then(|| Box::new(Said { diagnostics, suppressed })),
        };
        (document, readings)
    }
}

impl File {
    /// The object of a document, in a state.
    pub(super) fn held_mut(&mut self, hash: u64, key: &Packed, state: State) -> Option<&mut Held> {
        let documents = self.documents.iter_mut().filter(|d| d.hash == hash);
        documents.flat_map(|d| d.held.as_mut_slice()).find(|h| h.key == *key && h.state == state)
    }

    /// An object with errors, of which nothing is in force.
    pub(super) fn broken_mut(&mut self, key: &Packed) -> Option<&mut Held> {
        let mut held = self.documents.iter_mut().flat_map(|d| d.held.as_mut_slice());
        held.find(|h| h.key == *key && h.state == State::Nothing)
    }

    /// Where an object in force stands.
    pub(super) fn position_of(&self, key: &Packed) -> Option<Position> {
        self.documents.iter().find_map(|document| {
            let mut held = document.held.as_slice().iter();
            let held = held.find(|h| {
                h.key == *key && matches!(h.state, State::InForce | State::LastGood | State::StandIn)
            })?;
            Some(document.absolute(held.position))
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
            suppressed += document.said.as_ref().map_or(0, |said| said.suppressed);
            let start = all.len();
            let has_waypoint = |d: &&Diagnostic| {
                let mut keys = document.held.as_slice().iter().map(|held| held.key.key());
                let about = |key: &ObjectKey| d.resource.as_ref() == Some(&key.resource_name());
                d.code == Code::NeedsWaypoint && keys.find(about).is_some_and(|key| more.has_waypoint(&key))
            };
            let said = document.said.iter().flat_map(|said| &said.diagnostics);
            let said = said.filter(|d| !has_waypoint(d)).cloned();
            all.extend(said.map(|mut diagnostic| {
                diagnostic.line += document.lines_before;
                diagnostic
            }));
            for held in document.held.as_slice() {
                let key = held.key.key();
                let about = |code, message: String, remedy: String| {
                    Diagnostic::about_file(code, path.clone(), message, remedy)
                        .at(document.absolute(held.position), "")
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
    fn positions_are_relative_to_the_document() {
        let file = "---\na: 1\n---\nx\n";
        let text = tree::documents(file).nth(1).unwrap();
        let root = tree::parse(text, &tree::Limits::default()).unwrap().unwrap();
        let (mut pool, mut room) = (Pool::default(), Room::new());
        let (document, readings) = Document::read(&"f".into(), text, &root, 1, &mut pool, &mut room);
        assert!(document.unidentified && readings.len() == 1);
        assert_eq!((document.said.as_ref().unwrap().diagnostics[0].line, document.lines_before), (2, 2));
        assert_eq!(document.absolute(readings[0].1), Position { line: 4, column: 1 });
    }
}
