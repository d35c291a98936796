//! The last good state on disk: a file to which what was accepted is appended.
//!
//! ```text
//!   frame   length (4 bytes, little endian) │ first 8 bytes of SHA-256 of the payload │ payload
//!   file    frame with magic and mesh, then frames with records, each a part of an update
//! ```
//!
//! * An update costs what it is long. When the file is more than twice as long as what it says, it is written anew,
//!   beside, and put in its place by a rename.
//! * A frame that was not written to its end (the process or the node died) is cut off, with those before it that belong to
//!   the same update: what stands before them was the state a moment earlier. A file that is damaged in another way, or of another mesh, is not used at all.
//! * An update may have to last: it is on the disk when [`Journal::append`] returns. Others are there soon, and
//!   before one that has to last.
//! * A write that fails takes the file away: an old state that looks new is worse than none.
//! * It is synchronous: to be called where blocking is fine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use bytes::Bytes;
use prost::Message;

use super::held::Held;

const NAME: &str = "xds.journal";
const MAGIC: &str = "culvert xds journal 1";
/// Records are filled up to this size.
const RECORD_BYTES: usize = 1 << 20;
/// A frame that says to be longer is damage. One resource may be long.
const FRAME_BYTES: u32 = 256 << 20;
const HEADER_BYTES: u64 = 12;
/// A file that is shorter is not written anew.
const SMALL: u64 = 4 << 20;

#[derive(Clone, PartialEq, Message)]
struct Heading {
    #[prost(string, tag = "1")]
    magic: String,
    #[prost(string, tag = "2")]
    mesh: String,
}

/// A resource as it is on disk.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Saved {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) version: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) aliases: Vec<String>,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) body: Bytes,
}

/// A part of an update, or a whole one.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) resources: Vec<Saved>,
    #[prost(string, repeated, tag = "3")]
    pub(super) removed: Vec<String>,
    /// From here on the state of the type is whole.
    #[prost(bool, tag = "4")]
    pub(super) complete: bool,
    /// The next one is of the same update: without that it says nothing.
    #[prost(bool, tag = "5")]
    pub(super) more: bool,
}

impl Record {
    fn new(type_url: &str) -> Self {
        Self { type_url: type_url.to_owned(), ..Self::default() }
    }
}

/// Why there is no state from before, or none to keep.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{path} is damaged at byte {at}; the state in it is not used")]
    Damaged { path: String, at: u64 },
    #[error("{path} is of another mesh or version ({found:?}); the state in it is not used")]
    Foreign { path: String, found: String },
    #[error("the state has {bytes} bytes, more than the {limit} that may be kept in {path}; it is not kept")]
    TooLong { path: String, bytes: u64, limit: u64 },
}

/// An open journal. What is in it is read first, by [`next`](Self::next).
#[derive(Debug)]
pub(super) struct Journal {
    directory: PathBuf,
    mesh: String,
    limit: u64,
    file: File,
    /// Where the next frame goes.
    end: u64,
    /// Where the next record is read.
    read: u64,
    live: u64,
    /// Whether the file's name is on the disk.
    is_named: bool,
}

fn checksum(payload: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.iter_mut().zip(digest::digest(&digest::SHA256, payload).as_ref()).for_each(|(s, d)| *s = *d);
    sum
}

fn frame(out: &mut impl Write, message: &impl Message) -> io::Result<u64> {
    let payload = message.encode_to_vec();
    let length = u32::try_from(payload.len()).ok().filter(|l| *l <= FRAME_BYTES);
    let length = length.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "a resource is too long"))?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&checksum(&payload))?;
    out.write_all(&payload)?;
    Ok(u64::from(length) + HEADER_BYTES)
}

/// The next frame's payload. `None`: what follows is no frame.
fn unframe(input: &mut impl Read, rest: u64) -> io::Result<Option<Vec<u8>>> {
    if rest < HEADER_BYTES {
        return Ok(None);
    }
    let (mut length, mut sum) = ([0; 4], [0; 8]);
    input.read_exact(&mut length)?;
    input.read_exact(&mut sum)?;
    let length = u32::from_le_bytes(length);
    if length == 0 || length > FRAME_BYTES || u64::from(length) > rest - HEADER_BYTES {
        return Ok(None);
    }
    let mut payload = vec![0; length as usize];
    input.read_exact(&mut payload)?;
    Ok((checksum(&payload) == sum).then_some(payload))
}

impl Journal {
    /// Opens the journal of a mesh in this directory. One that can't be used is replaced by an empty one, and the
    /// reason is given, too.
    ///
    /// # Errors
    /// Nothing can be kept there.
    pub(super) fn open(
        directory: &Path,
        mesh: &str,
        limit: u64,
    ) -> Result<(Self, Option<JournalError>), JournalError> {
        let path = directory.join(NAME);
        let failed = |source| JournalError::Io { path: path.display().to_string(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let (directory, mesh) = (directory.to_owned(), mesh.to_owned());
        let mut journal = Self {
            directory,
            mesh,
            limit,
            file: file.map_err(failed)?,
            end: 0,
            read: 0,
            live: 0,
            is_named: false,
        };
        let problem = match journal.verify() {
            Ok(()) => return Ok((journal, None)),
            Err(problem) => problem,
        };
        journal.begin().map_err(failed)?;
        Ok((journal, Some(problem)))
    }

    fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    fn io(&self, source: io::Error) -> JournalError {
        JournalError::Io { path: self.path().display().to_string(), source }
    }

    /// Empties the file.
    fn begin(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        let heading = Heading { magic: MAGIC.to_owned(), mesh: self.mesh.clone() };
        self.end = frame(&mut self.file, &heading)?;
        self.read = self.end;
        Ok(())
    }

    /// Finds the end of what is good.
    fn verify(&mut self) -> Result<(), JournalError> {
        let length = self.file.metadata().map_err(|e| self.io(e))?.len();
        if length == 0 {
            return self.begin().map_err(|e| self.io(e));
        }
        let mut input = BufReader::with_capacity(RECORD_BYTES, &self.file);
        let path = self.path().display().to_string();
        let damaged = |at| JournalError::Damaged { path: path.clone(), at };
        let heading = unframe(&mut input, length).map_err(|e| self.io(e))?.ok_or_else(|| damaged(0))?;
        let at = heading.len() as u64 + HEADER_BYTES;
        let heading = Heading::decode(heading.as_slice()).map_err(|_| damaged(0))?;
        if heading.magic != MAGIC || heading.mesh != self.mesh {
            return Err(JournalError::Foreign {
                path,
                found: format!("{} of {}", heading.magic, heading.mesh),
            });
        }
        let (mut good, mut whole) = (at, at);
        while good < length {
            let Some(payload) = unframe(&mut input, length - good).map_err(|e| self.io(e))? else { break };
            let Ok(record) = Record::decode(payload.as_slice()) else { return Err(damaged(good)) };
            good += payload.len() as u64 + HEADER_BYTES;
            if !record.more {
                whole = good;
            }
        }
        if good < length && !self.torn(good, length).map_err(|e| self.io(e))? {
            return Err(damaged(good));
        }
        if whole < length {
            self.file.set_len(whole).map_err(|e| self.io(e))?;
        }
        (self.end, self.read) = (whole, at);
        Ok(())
    }

    /// Whether what stands at `good` is a frame that was not written to its end: it is longer than the file, or
    /// the file system gave its place zeros.
    fn torn(&self, good: u64, length: u64) -> io::Result<bool> {
        let mut input = BufReader::new(&self.file);
        input.seek(SeekFrom::Start(good))?;
        let mut header = [0; 4];
        if length - good < HEADER_BYTES {
            return Ok(true);
        }
        input.read_exact(&mut header)?;
        if u64::from(u32::from_le_bytes(header)) + HEADER_BYTES >= length - good {
            return Ok(true);
        }
        input.seek(SeekFrom::Start(good))?;
        Ok(input.bytes().all(|byte| byte.is_ok_and(|b| b == 0)))
    }

    /// The next record of what was there when the journal was opened.
    pub(super) fn next(&mut self) -> Result<Option<Record>, JournalError> {
        if self.read >= self.end {
            return Ok(None);
        }
        let rest = self.end - self.read;
        let payload = self.file.seek(SeekFrom::Start(self.read)).and_then(|_| unframe(&mut self.file, rest));
        let payload = payload.map_err(|e| self.io(e))?;
        let record = payload.as_deref().and_then(|p| Record::decode(p).ok());
        let (Some(payload), Some(record)) = (payload, record) else {
            return Err(JournalError::Damaged { path: self.path().display().to_string(), at: self.read });
        };
        self.read += payload.len() as u64 + HEADER_BYTES;
        Ok(Some(record))
    }

    /// Keeps what was answered for; on the disk itself if it has to last.
    ///
    /// # Errors
    /// It can't be kept: the file is gone, and so is the journal.
    pub(super) fn append(mut self, update: Record, live: u64, lasts: bool) -> Result<Self, JournalError> {
        self.live = live;
        match self.write(update).and_then(|()| if lasts { self.sync() } else { Ok(()) }) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.discard(error)),
        }
    }

    fn sync(&mut self) -> Result<(), JournalError> {
        self.file.sync_data().map_err(|e| self.io(e))?;
        if !self.is_named {
            self.sync_directory()?;
            self.is_named = true;
        }
        Ok(())
    }

    fn sync_directory(&self) -> Result<(), JournalError> {
        File::open(&self.directory).and_then(|d| d.sync_all()).map_err(|e| self.io(e))
    }

    /// Takes the file away. It must not come back by a crash either.
    fn discard(self, why: JournalError) -> JournalError {
        let _ = self.file.set_len(0);
        let _ = fs::remove_file(self.path());
        let _ = self.sync_directory();
        why
    }

    fn write(&mut self, update: Record) -> Result<(), JournalError> {
        if self.live > self.limit {
            let (bytes, limit) = (self.live, self.limit);
            return Err(JournalError::TooLong { path: self.path().display().to_string(), bytes, limit });
        }
        let written = self.file.seek(SeekFrom::Start(self.end)).and_then(|_| {
            let mut out = BufWriter::with_capacity(RECORD_BYTES, &self.file);
            let mut end = 0;
            for record in parts(update) {
                end += frame(&mut out, &record)?;
            }
            out.flush().map(|()| end)
        });
        self.end += written.map_err(|e| self.io(e))?;
        self.read = self.end;
        Ok(())
    }

    /// Whether the file is much longer than what it says.
    pub(super) fn is_long(&self) -> bool {
        self.end > SMALL.max(2 * self.live) || self.end > self.limit
    }

    /// Writes the file anew with what is held, and nothing else.
    ///
    /// # Errors
    /// It can't be written: the file is gone, and so is the journal.
    pub(super) fn compact(mut self, held: &Held) -> Result<Self, JournalError> {
        match self.rewrite(held) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.discard(error)),
        }
    }

    fn rewrite(&mut self, held: &Held) -> Result<(), JournalError> {
        let beside = self.directory.join(format!("{NAME}.new"));
        let failed = |source| JournalError::Io { path: beside.display().to_string(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&beside);
        let mut new = Self {
            directory: self.directory.clone(),
            mesh: self.mesh.clone(),
            limit: self.limit,
            file: file.map_err(failed)?,
            end: 0,
            read: 0,
            live: self.live,
            is_named: true,
        };
        new.begin().map_err(failed)?;
        // From the front; what is read is what was current when it was written.
        self.file.rewind().map_err(|e| self.io(e))?;
        let heading = unframe(&mut self.file, self.end).map_err(|e| self.io(e))?.unwrap_or_default();
        self.read = heading.len() as u64 + HEADER_BYTES;
        while let Some(mut record) = self.next()? {
            let Some(held) = held.get(&record.type_url) else { continue };
            record.resources.retain(|r| held.is(&r.name, &r.version));
            record.removed.clear();
            record.complete = false;
            if !record.resources.is_empty() {
                new.write(record)?;
            }
        }
        for (type_url, _) in held.iter().filter(|(_, h)| h.complete) {
            new.write(Record { complete: true, ..Record::new(type_url) })?;
        }
        new.file.sync_all().and_then(|()| fs::rename(&beside, self.path())).map_err(failed)?;
        // So that the rename is there after a crash.
        self.sync_directory()?;
        *self = new;
        Ok(())
    }
}

/// Cuts an update into records of a size that is read and written at once.
fn parts(update: Record) -> Vec<Record> {
    let Record { type_url, resources, removed, complete, .. } = update;
    // Removals come first, as in an update: a name may be removed and set in one.
    let mut parts = vec![Record { removed, ..Record::new(&type_url) }];
    let mut size = 0;
    for resource in resources {
        let bytes = resource.encoded_len();
        if size > 0 && size + bytes > RECORD_BYTES {
            parts.last_mut().into_iter().for_each(|part| part.more = true);
            parts.push(Record::new(&type_url));
            size = 0;
        }
        size += bytes;
        if let Some(part) = parts.last_mut() {
            part.resources.push(resource);
        }
    }
    if let Some(part) = parts.last_mut() {
        part.complete = complete;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "type/A";
    const B: &str = "type/B";

    fn saved(name: &str, body: &str) -> Saved {
        Saved {
            name: name.into(),
            version: format!("v-{body}"),
            aliases: vec![],
            body: body.to_owned().into(),
        }
    }

    fn update(type_url: &str, resources: &[(&str, &str)], removed: &[&str], complete: bool) -> Record {
        Record {
            type_url: type_url.into(),
            resources: resources.iter().map(|(n, b)| saved(n, b)).collect(),
            removed: removed.iter().map(|n| (*n).to_owned()).collect(),
            complete,
            more: false,
        }
    }

    /// What a journal says, and what is held of it.
    fn replay(journal: &mut Journal) -> (Vec<(String, String)>, Held, usize) {
        let mut held = Held::new(&[A, B]);
        let mut state = std::collections::BTreeMap::new();
        let mut records = 0;
        while let Some(record) = journal.next().unwrap() {
            records += 1;
            let (type_url, of) = held.of(&record.type_url).unwrap();
            for name in &record.removed {
                of.remove(name);
                state.remove(&(type_url, name.clone()));
            }
            for r in &record.resources {
                of.set(&r.name.as_str().into(), &r.version, r.encoded_len());
                state.insert((type_url, r.name.clone()), String::from_utf8(r.body.to_vec()).unwrap());
            }
            of.complete |= record.complete;
        }
        (state.into_iter().map(|((_, n), b)| (n, b)).collect(), held, records)
    }

    fn open(directory: &tempfile::TempDir) -> (Journal, Option<String>) {
        let (journal, problem) = Journal::open(directory.path(), "mesh", 1 << 30).unwrap();
        (journal, problem.map(|p| p.to_string()))
    }

    fn written(directory: &tempfile::TempDir) -> Journal {
        let (journal, problem) = open(directory);
        assert_eq!(problem, None);
        let journal = journal.append(update(A, &[("a", "1"), ("b", "1")], &[], true), 0, false).unwrap();
        let journal = journal.append(update(B, &[("c", "1")], &[], false), 0, false).unwrap();
        journal.append(update(A, &[("a", "2")], &["b", "never"], true), 0, false).unwrap()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(n, b)| ((*n).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn what_was_appended_is_read() {
        let directory = tempfile::tempdir().unwrap();
        drop(written(&directory));
        let (mut journal, problem) = open(&directory);
        assert_eq!(problem, None);
        let (state, held, records) = replay(&mut journal);
        assert_eq!((state, records), (pairs(&[("a", "2"), ("c", "1")]), 3));
        assert!(held.get(A).unwrap().complete && !held.get(B).unwrap().complete);
        assert!(held.get(A).unwrap().is("a", "v-2"));
        // And goes on where it ended.
        drop(journal.append(update(B, &[("d", "1")], &[], true), 0, false).unwrap());
        let (state, ..) = replay(&mut open(&directory).0);
        assert_eq!(state, pairs(&[("a", "2"), ("c", "1"), ("d", "1")]));
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(directory.path().join(NAME)).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn one_that_is_cut_off_anywhere_ends_with_its_last_whole_record() {
        let directory = tempfile::tempdir().unwrap();
        drop(written(&directory));
        let path = directory.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for length in 0..whole.len() {
            for tail in [0, 50] {
                let mut bytes = whole.get(..length).unwrap().to_vec();
                bytes.extend(vec![0; tail]);
                fs::write(&path, bytes).unwrap();
                let (mut journal, _) = open(&directory);
                let (state, _, records) = replay(&mut journal);
                seen.insert(records);
                if records == 1 {
                    assert_eq!(state, pairs(&[("a", "1"), ("b", "1")]));
                }
                // It can be used.
                drop(journal.append(update(B, &[("new", "1")], &[], false), 0, false).unwrap());
                let (_, held, after) = replay(&mut open(&directory).0);
                assert!(held.get(B).unwrap().is("new", "v-1"), "{length} and {tail} zeros");
                assert_eq!(after, records + 1);
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    /// Half of a change of policies may let in what neither the state before nor the one after does.
    #[test]
    fn of_an_update_of_several_records_all_are_read_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let before = written(&directory);
        let start = before.end;
        let long = "x".repeat(RECORD_BYTES / 2);
        let bodies: Vec<(String, String)> =
            (0..7).map(|n| (format!("name-{n}"), format!("{n}{long}"))).collect();
        let bodies: Vec<(&str, &str)> = bodies.iter().map(|(n, b)| (n.as_str(), b.as_str())).collect();
        drop(before.append(update(A, &bodies, &["a"], true), 0, false).unwrap());
        let path = directory.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        // Where each of its records ends.
        let (mut ends, mut rest) = (Vec::new(), &whole[usize::try_from(start).unwrap()..]);
        loop {
            let left = rest.len() as u64;
            let Some(payload) = unframe(&mut rest, left).unwrap() else { break };
            assert!(payload.len() < 2 * RECORD_BYTES);
            ends.push(whole.len() - rest.len());
        }
        assert!(ends.len() > 2 && rest.is_empty(), "{ends:?}");
        for end in &ends {
            for length in [end - 1, *end, end + 5] {
                fs::write(&path, whole.get(..length).unwrap_or(&whole)).unwrap();
                let (mut journal, problem) = open(&directory);
                let (state, ..) = replay(&mut journal);
                let is_whole = length >= whole.len();
                assert_eq!((problem, state.len()), (None, if is_whole { 8 } else { 2 }), "of {length} bytes");
                drop(journal.append(update(B, &[("new", "1")], &[], false), 0, false).unwrap());
                let (state, ..) = replay(&mut open(&directory).0);
                assert_eq!(state.len(), if is_whole { 9 } else { 3 }, "of {length} bytes, and more");
            }
        }
    }

    #[test]
    fn a_changed_bit_never_gives_other_content() {
        let directory = tempfile::tempdir().unwrap();
        drop(written(&directory));
        let path = directory.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        let states = [
            pairs(&[]),
            pairs(&[("a", "1"), ("b", "1")]),
            pairs(&[("a", "1"), ("b", "1"), ("c", "1")]),
            pairs(&[("a", "2"), ("c", "1")]),
        ];
        let mut refused = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            *bytes.get_mut(at).unwrap() ^= 0x10;
            fs::write(&path, bytes).unwrap();
            let (mut journal, problem) = open(&directory);
            let (state, ..) = replay(&mut journal);
            assert!(states.contains(&state), "byte {at}: {state:?}");
            refused += usize::from(problem.is_some_and(|p| p.contains("damaged") && state.is_empty()));
        }
        assert!(refused > whole.len() / 2, "{refused} of {}", whole.len());
    }

    #[test]
    fn one_of_another_mesh_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        drop(written(&directory));
        let (mut journal, problem) = Journal::open(directory.path(), "another", 1 << 30).unwrap();
        assert!(matches!(problem, Some(JournalError::Foreign { .. })), "{problem:?}");
        assert_eq!(replay(&mut journal).2, 0);
    }

    #[test]
    fn it_is_written_anew_when_it_is_long_for_what_it_says() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(&directory);
        let mut held = Held::new(&[A, B]);
        let long = "x".repeat(100_000);
        let mut compactions = 0;
        for n in 0..200 {
            let (name, body) = (format!("name-{}", n % 10), format!("{n}{long}"));
            let record = update(A, &[(&name, &body)], if n == 199 { &["name-3"] } else { &[] }, true);
            if n == 199 {
                held.of(A).unwrap().1.remove("name-3");
            }
            held.of(A).unwrap().1.set(
                &name.as_str().into(),
                &format!("v-{body}"),
                record.resources[0].encoded_len(),
            );
            held.of(A).unwrap().1.complete = true;
            journal = journal.append(record, held.bytes(), false).unwrap();
            if journal.is_long() {
                journal = journal.compact(&held).unwrap();
                compactions += 1;
            }
            assert!(fs::metadata(directory.path().join(NAME)).unwrap().len() < SMALL + 500_000);
        }
        assert!((3..20).contains(&compactions), "{compactions}");
        drop(journal);
        let (state, held, _) = replay(&mut open(&directory).0);
        assert_eq!(state.len(), 9);
        assert!(
            state.iter().all(|(name, body)| body == &format!("19{}{long}", name.trim_start_matches("name-")))
        );
        assert!(held.get(A).unwrap().complete);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside");
    }

    #[test]
    fn a_state_that_does_not_fit_is_not_kept_and_leaves_no_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(directory.path(), "mesh", 1000).unwrap();
        let error =
            journal.append(update(A, &[("a", &"x".repeat(2000))], &[], true), 2000, false).unwrap_err();
        assert!(error.to_string().contains("more than the 1000"), "{error}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_can_not_be_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Journal::open(&file.path().join("below"), "mesh", 1000).unwrap_err().to_string();
        assert!(error.contains("below"), "{error}");
    }
}
