//! The files, the objects that they hold, and which version of each object is in force.
//!
//! * A file is taken whole or not at all: while it is not YAML, or cannot be read, all that it last held stays in
//!   force. So a half-written file changes nothing.
//! * An object with errors keeps its last good version in force; a new one with errors is not in force.
//! * A policy with errors of which nothing is known is represented by one that fails closed for its scope. So is a
//!   namespace: its connections are encrypted, whatever the mesh says of those within a node.
//! * An object that is gone from its file is removed, unless something might be it: in the file a document whose name
//!   cannot be read; in any file an object of its name with errors; in the files that changed with it, one that cannot
//!   be taken, or that holds a document whose name cannot be read. So what moves to another file, and breaks on the
//!   way, stays in force as it would where it was.
//! * Of two objects with one kind, namespace and name the first stays in force until it is gone.
//!
//! Objects can also come one by one from a server ([`Store::set_object`]), which knows their names: then nothing else can
//! be one that is gone.
//!
//! A document whose text did not change is not parsed again. Positions are kept relative to the document, so one
//! that only moved is not either.

mod assigned;
mod file;
mod key;
mod paths;

use std::collections::{BTreeSet, HashSet};
use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashMap};
use model::Str;

use crate::compile::Options;
use crate::diagnostic::{Code, Diagnostic};
use crate::labels::Pool;
use crate::resource::{ObjectKey, Reading, Resource};
use crate::tree::{self, Limits, Position, Problem, SyntaxError};
use assigned::Assigned;
use file::{Document, File, Held, Room, State};
use key::Packed;
use paths::Paths;

/// What a file holds now.
#[derive(Clone, Copy, Debug)]
pub enum Content<'c> {
    /// These bytes.
    Bytes(&'c [u8]),
    /// It cannot be read; with the reason.
    Unreadable(&'c str),
    /// It is too large to be read; with its size and the limit.
    TooLarge(u64, u64),
    /// It stands for something else that cannot be read, such as a directory; with what to report.
    Refused(Code, &'c str),
    /// It is gone.
    Gone,
}

/// What a server holds of an object now.
#[derive(Clone, Copy, Debug)]
pub enum ObjectContent<'c> {
    /// It is this.
    Node {
        /// The object, with `apiVersion` and `kind`.
        node: &'c tree::Node<'c>,
        /// Its version: while that is the same, so is the object.
        version: &'c str,
        /// The text that the node's positions are in; empty where there is none.
        text: &'c str,
    },
    /// It cannot be taken; with what to report.
    Refused(Code, &'c str),
    /// It is gone.
    Gone,
}

/// What becomes of an object; with the text that it is known by, which has the form of a pod's uid.
pub(crate) type Sink<'s> = dyn FnMut(&ObjectKey, Option<(Str, Resource)>, &mut Pool) + 's;

/// An object that is not in force because another of its name is.
#[derive(Debug)]
struct Shadow {
    file: Arc<str>,
    hash: u64,
    resource: Resource,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Store {
    /// With which the texts begin that objects are known by.
    cluster: Str,
    files: HashMap<Arc<str>, File>,
    paths: Paths,
    /// Which file an object in force stands in, by its number.
    objects: HashMap<Packed, u32>,
    shadows: HashMap<ObjectKey, Vec<Shadow>>,
    /// Those of them that represent an object with errors, of which there was no good version.
    stand_ins: HashSet<ObjectKey>,
    /// Objects to be removed unless they turn up in another file of the same batch.
    pending: HashSet<ObjectKey>,
    /// In which files there are objects with errors, of which nothing is in force there ([`State::Nothing`]).
    broken: HashMap<ObjectKey, Vec<Arc<str>>>,
    /// Files of the batch that may hold any object.
    suspects: BTreeSet<Arc<str>>,
    /// Files about which something may have changed.
    touched: BTreeSet<Arc<str>>,
    /// Files about which there is something to say.
    diagnosed: BTreeSet<Arc<str>>,
    /// What a server has given to objects that files may hold.
    assigned: Assigned,
    limits: Limits,
    hasher: DefaultHashBuilder,
}

/// Where an object is read.
#[derive(Clone, Copy)]
struct Spot<'s> {
    path: &'s Arc<str>,
    /// The file's number.
    number: u32,
    /// The document's hash.
    hash: u64,
}

/// A document of the new content of a file.
enum New {
    /// The same text as an old one's.
    Same(Document, u32),
    /// Parsed.
    Parsed(Document, Vec<(Reading, Position)>),
}

impl Store {
    /// A store without objects.
    pub(crate) fn new(options: &Options) -> Self {
        Self { cluster: options.cluster.clone(), ..Self::default() }
    }

    /// Takes what a server has given to this object for what a file that is read from now on leaves out of it.
    pub(crate) fn assign(&mut self, object: tree::Node<'static>) {
        self.assigned.add(object);
    }

    fn pack(&self, key: &ObjectKey) -> Packed {
        Packed::new(&self.cluster, key)
    }

    /// The file that an object in force stands in.
    fn path_of(&self, key: &Packed) -> Option<&Arc<str>> {
        self.paths.get(*self.objects.get(key)?)
    }

    /// A file that is to be changed, and put back.
    fn take_file(&mut self, path: &Arc<str>) -> File {
        let known = self.files.remove(path);
        known.unwrap_or_else(|| File { number: self.paths.add(path), ..File::default() })
    }

    fn put_file(&mut self, path: &Arc<str>, file: File, is_there: bool) {
        if is_there {
            self.files.insert(path.clone(), file);
        } else {
            self.paths.remove(file.number);
        }
    }

    /// How many objects are in force.
    pub(crate) fn len(&self) -> usize {
        self.objects.len()
    }

    /// Takes what a file holds now. Objects that are new or changed go to `sink`; those that are gone do with
    /// [`Store::settle`].
    pub(crate) fn set_file(
        &mut self,
        path: &Arc<str>,
        content: Content<'_>,
        pool: &mut Pool,
        sink: &mut Sink<'_>,
    ) {
        self.touched.insert(path.clone());
        let mut file = self.take_file(path);
        match self.read(path, content, &mut file, pool) {
            Ok(documents) => {
                file.problems.clear();
                self.replace(path, &mut file, documents, pool, sink);
                if file.documents.iter().any(Document::is_unidentified) {
                    self.suspects.insert(path.clone());
                } else {
                    self.suspects.remove(path);
                }
                let is_there = !matches!(content, Content::Gone) || !file.orphans.is_empty();
                self.put_file(path, file, is_there);
            }
            Err(mut problems) => {
                let held = file.documents.iter().map(|d| d.held().len()).sum::<usize>();
                if held > 0 {
                    let message = format!("the {held} objects that the file last held stay in force");
                    problems.push(Diagnostic::about_file(Code::LastGoodVersion, path.clone(), message, ""));
                }
                file.problems = problems;
                self.suspects.insert(path.clone());
                self.put_file(path, file, true);
            }
        }
    }

    /// Takes what a server holds of an object now. `origin` is what the object is called in diagnostics, in the place
    /// of a file. Nothing is done for a version that was taken already.
    pub(crate) fn set_object(
        &mut self,
        origin: &Arc<str>,
        content: ObjectContent<'_>,
        pool: &mut Pool,
        sink: &mut Sink<'_>,
    ) {
        let mut file = self.take_file(origin);
        let documents = match content {
            ObjectContent::Node { node, version, text } => {
                let hash = self.hasher.hash_one(version);
                if file.problems.is_empty() && file.documents.first().is_some_and(|d| d.hash == hash) {
                    self.put_file(origin, file, true);
                    return;
                }
                let text = tree::Text { text, lines_before: 0 };
                let (document, readings) = Document::read(origin, text, node, hash, pool, &mut Room::new());
                Some(vec![New::Parsed(document, readings)])
            }
            ObjectContent::Refused(code, reason) => {
                file.problems = vec![Diagnostic::about_file(code, origin.clone(), reason, "")];
                None
            }
            ObjectContent::Gone => Some(Vec::new()),
        };
        self.touched.insert(origin.clone());
        if let Some(documents) = documents {
            file.problems.clear();
            self.replace(origin, &mut file, documents, pool, sink);
        }
        let is_there = !matches!(content, ObjectContent::Gone) || !file.orphans.is_empty();
        self.put_file(origin, file, is_there);
    }

    /// Gives the objects that are gone to `sink`, at the end of a batch.
    pub(crate) fn settle(&mut self, pool: &mut Pool, sink: &mut Sink<'_>) {
        let mut gone: Vec<ObjectKey> = std::mem::take(&mut self.pending).into_iter().collect();
        gone.sort_unstable();
        for key in gone {
            if !self.keep_broken(&key) && !self.keep_orphan(&key) {
                self.stand_ins.remove(&key);
                sink(&key, None, pool);
            }
        }
        self.suspects.clear();
    }

    /// Keeps an object in force that is gone from its file, where another file has it with errors.
    fn keep_broken(&mut self, key: &ObjectKey) -> bool {
        let Some(path) = self.broken.get(key).and_then(|paths| paths.first()).cloned() else { return false };
        self.mend(key, &path);
        let state = if self.stand_ins.contains(key) { State::StandIn } else { State::LastGood };
        let packed = self.pack(key);
        let Some(file) = self.files.get_mut(&path) else { return false };
        let number = file.number;
        let Some(held) = file.broken_mut(&packed) else { return false };
        held.state = state;
        self.touched.insert(path);
        self.objects.insert(packed, number);
        true
    }

    /// Keeps an object in force that is gone from its file, where another file of the batch may hold it.
    fn keep_orphan(&mut self, key: &ObjectKey) -> bool {
        let Some(path) = self.suspects.first().cloned() else { return false };
        let Some(file) = self.files.get_mut(&path) else { return false };
        file.orphans.insert(key.clone());
        let number = file.number;
        self.touched.insert(path);
        self.objects.insert(self.pack(key), number);
        true
    }

    /// Notes that an object with errors is gone from a file, or that it is more than that.
    fn mend(&mut self, key: &ObjectKey, path: &Arc<str>) {
        let Some(paths) = self.broken.get_mut(key) else { return };
        if let Some(index) = paths.iter().position(|p| p == path) {
            paths.remove(index);
        }
        if paths.is_empty() {
            self.broken.remove(key);
        }
    }

    /// Gives up an object that stays in force only because a file might hold it. Whether it was one.
    fn adopt(&mut self, key: &ObjectKey) -> bool {
        let Some(path) = self.path_of(&self.pack(key)).cloned() else { return false };
        let Some(file) = self.files.get_mut(&path) else { return false };
        let is_one = file.orphans.remove(key);
        if is_one {
            self.touched.insert(path);
        }
        is_one
    }

    fn read(
        &self,
        path: &Arc<str>,
        content: Content<'_>,
        old: &mut File,
        pool: &mut Pool,
    ) -> Result<Vec<New>, Vec<Diagnostic>> {
        let problem = |code, message: String, remedy: &str| {
            Err(vec![Diagnostic::about_file(code, path.clone(), message, remedy)])
        };
        let bytes = match content {
            Content::Bytes(bytes) => bytes,
            Content::Gone => return Ok(Vec::new()),
            Content::Unreadable(reason) => {
                return problem(Code::FileUnreadable, format!("the file cannot be read: {reason}"), "");
            }
            Content::Refused(code, reason) => {
                return problem(code, format!("{reason}; what it last held stays in force"), "");
            }
            Content::TooLarge(size, limit) => {
                let message = format!("the file has {size} bytes, and at most {limit} are read");
                return problem(Code::FileTooLarge, message, "split it into several files");
            }
        };
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                let message = format!("the file is not UTF-8: byte {}", e.valid_up_to() + 1);
                return problem(Code::MalformedYaml, message, "");
            }
        };
        self.read_documents(path, text, old, pool)
    }

    fn read_documents(
        &self,
        path: &Arc<str>,
        text: &str,
        old: &mut File,
        pool: &mut Pool,
    ) -> Result<Vec<New>, Vec<Diagnostic>> {
        let mut known: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, document) in old.documents.iter().enumerate().rev() {
            known.entry(document.hash).or_default().push(index);
        }
        let (mut plan, mut problems, mut room) = (Vec::new(), Vec::new(), Room::new());
        for text in tree::documents(text) {
            let hash = self.hasher.hash_one(text.text);
            let same = known.get_mut(&hash).and_then(Vec::pop);
            if let Some(index) = same
                && old.documents.get(index).is_some_and(|d| d.length as usize == text.text.len())
            {
                plan.push((Some(index), text.lines_before, None));
                continue;
            }
            match tree::parse(text, &self.limits) {
                Ok(None) => {}
                Ok(Some(mut node)) => {
                    self.assigned.complete(&mut node);
                    let parsed = Document::read(path, text, &node, hash, pool, &mut room);
                    plan.push((None, text.lines_before, Some(parsed)));
                }
                Err(error) if problems.len() < file::MOST_DIAGNOSTICS => {
                    problems.push(syntax(path, text, &error));
                }
                Err(_) => {}
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        // Only now, so that a file with an error keeps its old documents.
        let mut documents: Vec<Option<Document>> = old.documents.drain(..).map(Some).collect();
        let new = plan.into_iter().filter_map(|(index, lines_before, parsed)| match (index, parsed) {
            (Some(index), _) => Some(New::Same(documents.get_mut(index)?.take()?, lines_before)),
            (None, Some((document, readings))) => Some(New::Parsed(document, readings)),
            (None, None) => None,
        });
        let new = new.collect();
        old.documents = documents.into_iter().flatten().collect();
        Ok(new)
    }

    /// Puts new documents in the place of those that are left in `file`.
    fn replace(
        &mut self,
        path: &Arc<str>,
        file: &mut File,
        new: Vec<New>,
        pool: &mut Pool,
        sink: &mut Sink<'_>,
    ) {
        // What stood in the documents that are gone.
        let mut gone: HashSet<ObjectKey> = std::mem::take(&mut file.orphans).into_iter().collect();
        for document in std::mem::take(&mut file.documents) {
            for held in document.held() {
                match held.state {
                    State::InForce | State::LastGood | State::StandIn => {
                        gone.insert(held.key.key());
                    }
                    State::Shadowed => self.drop_shadow(path, document.hash, &held.key.key()),
                    State::Nothing => self.mend(&held.key.key(), path),
                }
            }
        }
        file.documents.reserve_exact(new.len());
        let mut unidentified = false;
        for new in new {
            let document = match new {
                New::Same(mut document, lines_before) => {
                    document.lines_before = lines_before;
                    document
                }
                New::Parsed(mut document, readings) => {
                    let spot = Spot { path, number: file.number, hash: document.hash };
                    let held = readings.into_iter().filter_map(|(reading, position)| {
                        self.hold(spot, reading, position, &mut gone, pool, sink)
                    });
                    document.hold(held.collect());
                    document
                }
            };
            unidentified |= document.is_unidentified();
            file.documents.push(document);
        }
        if unidentified {
            file.orphans = gone.into_iter().collect();
            return;
        }
        for key in gone {
            self.objects.remove(&self.pack(&key));
            if self.promote(&key, path, file, pool, sink) {
                self.stand_ins.remove(&key);
            } else {
                self.pending.insert(key);
            }
        }
    }

    /// Decides what becomes of an object that was read. `gone` has the objects of this file that have not turned
    /// up again.
    fn hold(
        &mut self,
        spot: Spot<'_>,
        reading: Reading,
        position: Position,
        gone: &mut HashSet<ObjectKey>,
        pool: &mut Pool,
        sink: &mut Sink<'_>,
    ) -> Option<Held> {
        let (packed, state) = match reading {
            Reading::Ignored | Reading::Unidentified => return None,
            Reading::Invalid(key, stand_in) => {
                let packed = self.pack(&key);
                let known = self.objects.contains_key(&packed) || self.pending.contains(&key);
                let state = match stand_in.filter(|_| !known) {
                    Some(stand_in) => {
                        self.objects.insert(packed.clone(), spot.number);
                        self.stand_ins.insert(key.clone());
                        sink(&key, Some((packed.text(), stand_in)), pool);
                        State::StandIn
                    }
                    None if gone.remove(&key) || self.pending.remove(&key) => {
                        self.objects.insert(packed.clone(), spot.number);
                        if self.stand_ins.contains(&key) { State::StandIn } else { State::LastGood }
                    }
                    None => {
                        self.broken.entry(key.clone()).or_default().push(spot.path.clone());
                        State::Nothing
                    }
                };
                (packed, state)
            }
            Reading::Object(key, resource) => {
                let packed = self.pack(&key);
                if gone.remove(&key) || !self.objects.contains_key(&packed) || self.adopt(&key) {
                    self.stand_ins.remove(&key);
                    self.objects.insert(packed.clone(), spot.number);
                    self.pending.remove(&key);
                    sink(&key, Some((packed.text(), resource)), pool);
                    (packed, State::InForce)
                } else {
                    let shadow = Shadow { file: spot.path.clone(), hash: spot.hash, resource };
                    self.shadows.entry(key.clone()).or_default().push(shadow);
                    (packed, State::Shadowed)
                }
            }
        };
        Some(Held::new(packed, position, state))
    }

    fn drop_shadow(&mut self, path: &str, hash: u64, key: &ObjectKey) {
        let Some(list) = self.shadows.get_mut(key) else { return };
        if let Some(index) = list.iter().position(|s| *s.file == *path && s.hash == hash) {
            list.remove(index);
        }
        if list.is_empty() {
            self.shadows.remove(key);
        }
    }

    /// Puts the next object of a name that became free in force. `file` is the one of `path`, which is being
    /// changed.
    fn promote(
        &mut self,
        key: &ObjectKey,
        path: &Arc<str>,
        file: &mut File,
        pool: &mut Pool,
        sink: &mut Sink<'_>,
    ) -> bool {
        let Some(list) = self.shadows.get_mut(key) else { return false };
        if list.is_empty() {
            return false;
        }
        let shadow = list.remove(0);
        if list.is_empty() {
            self.shadows.remove(key);
        }
        let packed = self.pack(key);
        let file = if shadow.file == *path { Some(file) } else { self.files.get_mut(&shadow.file) };
        let Some(file) = file else { return false };
        let number = file.number;
        let Some(held) = file.held_mut(shadow.hash, &packed, State::Shadowed) else { return false };
        held.state = State::InForce;
        self.touched.insert(shadow.file);
        self.objects.insert(packed.clone(), number);
        self.pending.remove(key);
        sink(key, Some((packed.text(), shadow.resource)), pool);
        true
    }
}

/// Saying what there is to say.
impl Store {
    /// Notes that something may have changed about an object's file.
    pub(crate) fn touch(&mut self, key: &ObjectKey) {
        if let Some(path) = self.path_of(&self.pack(key)).cloned() {
            self.touched.insert(path);
        }
    }

    /// The diagnostics that there were not at the last call, and the files about which something may have changed
    /// since. `more` knows what was found about an object in force.
    pub(crate) fn news(&mut self, more: &dyn More) -> (Vec<Diagnostic>, BTreeSet<Arc<str>>) {
        let mut news = Vec::new();
        let touched = std::mem::take(&mut self.touched);
        for path in &touched {
            let all = self.of_file(path, more);
            if all.is_empty() {
                self.diagnosed.remove(path);
            } else {
                self.diagnosed.insert(path.clone());
            }
            let Some(file) = self.files.get_mut(path) else { continue };
            let before: HashSet<u64> = std::mem::take(&mut file.said).into_iter().collect();
            for diagnostic in all {
                let hash = self.hasher.hash_one((
                    diagnostic.code,
                    &diagnostic.resource,
                    &diagnostic.field,
                    &diagnostic.message,
                ));
                file.said.push(hash);
                if !before.contains(&hash) {
                    news.push(diagnostic);
                }
            }
        }
        (news, touched)
    }

    /// All there is to say of one file, or of one object of a server.
    pub(crate) fn about(&self, path: &str, more: &dyn More) -> Vec<Diagnostic> {
        self.files.get_key_value(path).map_or_else(Vec::new, |(path, _)| self.of_file(path, more))
    }

    /// All diagnostics, by file and place.
    pub(crate) fn diagnostics(&self, more: &dyn More) -> Vec<Diagnostic> {
        self.diagnosed.iter().flat_map(|path| self.of_file(path, more)).collect()
    }

    /// The same, where `more` may have something to say about any object, not only of what was found before.
    pub(crate) fn review(&self, more: &dyn More) -> Vec<Diagnostic> {
        let paths: BTreeSet<&Arc<str>> = self.files.keys().collect();
        paths.into_iter().flat_map(|path| self.of_file(path, more)).collect()
    }

    fn of_file(&self, path: &Arc<str>, more: &dyn More) -> Vec<Diagnostic> {
        let Some(file) = self.files.get(path) else { return Vec::new() };
        let elsewhere = |key: &ObjectKey| {
            let packed = self.pack(key);
            let path = self.path_of(&packed)?;
            let position = self.files.get(path).and_then(|f| f.position_of(&packed));
            Some((path.clone(), position))
        };
        file.diagnostics(path, &elsewhere, more)
    }
}

/// What is known of objects in the light of others.
pub(crate) trait More {
    /// What was found about one: code, message and remedy.
    fn found(&self, key: &ObjectKey) -> Vec<(Code, String, String)>;

    /// Whether a policy that needs a waypoint has one, so that nothing is to be said of that.
    fn has_waypoint(&self, key: &ObjectKey) -> bool;
}

fn syntax(path: &Arc<str>, text: tree::Text<'_>, error: &SyntaxError) -> Diagnostic {
    let (code, remedy) = match &error.problem {
        Problem::Malformed(_) => (Code::MalformedYaml, ""),
        Problem::DuplicateKey { .. } => (Code::DuplicateKey, "remove one of them"),
        Problem::TooLarge(_) => (Code::FileTooLarge, "split it into several documents"),
    };
    let index = error.position.line.saturating_sub(text.lines_before + 1);
    let line = text.text.lines().nth(index as usize).unwrap_or_default();
    Diagnostic::about_file(code, path.clone(), error.problem.to_string(), remedy).at(error.position, line)
}
