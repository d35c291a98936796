//! Tar archives (POSIX ustar), always the same for the same entries.

use anyhow::{Result, bail};

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory with its mode.
    Directory(u32),
    /// A file with its mode.
    File(u32, Vec<u8>),
    /// A symbolic link, and what it points to.
    Link(String),
}

/// An archive that is being written; entries are dated `seconds` after 1970 and belong to root.
#[derive(Debug)]
pub struct Tar {
    seconds: u64,
    bytes: Vec<u8>,
}

impl Tar {
    /// An empty one.
    #[must_use]
    pub fn new(seconds: u64) -> Self {
        Self { seconds, bytes: Vec::new() }
    }

    /// Adds an entry; `path` is relative, without a slash at its end.
    ///
    /// # Errors
    /// A name is too long for the format.
    pub fn add(&mut self, path: &str, entry: &Entry) -> Result<()> {
        let (kind, mode, target, data) = match entry {
            Entry::Directory(mode) => (b'5', *mode, "", &[][..]),
            Entry::File(mode, data) => (b'0', *mode, "", data.as_slice()),
            Entry::Link(target) => (b'2', 0o777, target.as_str(), &[][..]),
        };
        let path = if kind == b'5' { format!("{path}/") } else { path.to_owned() };
        let (prefix, name) = split(&path)?;
        if target.len() > 100 {
            bail!("the link {path} points to a name of more than 100 bytes: {target}");
        }
        let mut header = Vec::with_capacity(BLOCK);
        text(&mut header, name, 100);
        octal(&mut header, u64::from(mode), 8);
        octal(&mut header, 0, 8);
        octal(&mut header, 0, 8);
        octal(&mut header, data.len() as u64, 12);
        octal(&mut header, self.seconds, 12);
        // The checksum is made with blanks in its place.
        header.extend_from_slice(b"        ");
        header.push(kind);
        text(&mut header, target, 100);
        header.extend_from_slice(b"ustar\x0000");
        text(&mut header, "root", 32);
        text(&mut header, "root", 32);
        octal(&mut header, 0, 8);
        octal(&mut header, 0, 8);
        text(&mut header, prefix, 155);
        header.resize(BLOCK, 0);
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header.splice(148..156, format!("{sum:06o}\0 ").into_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

/// Directory and name, at a slash at which both fit.
fn split(path: &str) -> Result<(&str, &str)> {
    if path.len() <= 100 {
        return Ok(("", path));
    }
    let fits = |at: &usize| *at <= 155 && path.len() - at - 1 <= 100 && path.len() > at + 1;
    match path.match_indices('/').map(|(at, _)| at).find(fits).and_then(|at| path.split_at_checked(at)) {
        Some((prefix, name)) => Ok((prefix, name.trim_start_matches('/'))),
        None => bail!("the path is too long for an archive: {path}"),
    }
}

fn text(header: &mut Vec<u8>, value: &str, length: usize) {
    let end = header.len() + length;
    header.extend(value.bytes().take(length));
    header.resize(end, 0);
}

fn octal(header: &mut Vec<u8>, value: u64, length: usize) {
    let digits = length - 1;
    header.extend_from_slice(format!("{value:0digits$o}\0").as_bytes());
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::process::output;

    #[test]
    fn tar_reads_what_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let long = format!("{}/{}", "directory/".repeat(14).trim_end_matches('/'), "n".repeat(60));
        let mut tar = Tar::new(1_000_000_000);
        tar.add("usr", &Entry::Directory(0o755)).unwrap();
        tar.add("usr/program", &Entry::File(0o755, vec![7; 700])).unwrap();
        tar.add("usr/alias", &Entry::Link("program".into())).unwrap();
        tar.add(&long, &Entry::File(0o600, b"deep".to_vec())).unwrap();
        let archive = directory.path().join("a.tar");
        fs::write(&archive, tar.finish()).unwrap();
        let at = directory.path().to_str().unwrap();
        output("tar", &["-C", at, "-xf", archive.to_str().unwrap()]).unwrap();
        let read = |path: &str| fs::read(directory.path().join(path)).unwrap();
        assert_eq!(read("usr/alias"), vec![7; 700]);
        assert_eq!(read(&long), b"deep");
        let meta = fs::metadata(directory.path().join("usr/program")).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.mtime()), (0o755, 1_000_000_000));
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let mut tar = Tar::new(0);
        let file = Entry::File(0o644, Vec::new());
        assert!(tar.add(&"n".repeat(101), &file).is_err());
        assert!(tar.add(&format!("d/{}", "n".repeat(101)), &file).is_err());
        assert!(tar.add("link", &Entry::Link("n".repeat(101))).is_err());
        assert!(tar.finish().iter().all(|b| *b == 0), "nothing of them is written");
    }
}
