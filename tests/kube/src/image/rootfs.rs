//! The files of an image.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Platform;
use super::elf::{Elf, find_library};
use super::tar::{Entry, Tar};

/// Files by their absolute path in the image.
#[derive(Clone, Debug, Default)]
pub struct Rootfs {
    entries: BTreeMap<String, Entry>,
    /// Files of the machine (or of the sysroot) that were copied, libraries too.
    pub copied: Vec<PathBuf>,
}

impl Rootfs {
    /// Adds a file, and the directories above it.
    ///
    /// # Errors
    /// The path is not absolute, or another file is there already.
    pub fn file(&mut self, path: &str, data: Vec<u8>, mode: u32) -> Result<()> {
        self.add(path, Entry::File(mode, data))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As for a file.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(path, Entry::Link(target.to_owned()))
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// As for a file.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.add(path, Entry::Directory(mode))
    }

    fn add(&mut self, path: &str, entry: Entry) -> Result<()> {
        let Some(relative) = path.strip_prefix('/').filter(|p| !p.is_empty()) else {
            bail!("{path:?} is no absolute path");
        };
        for (at, _) in relative.match_indices('/') {
            if let Some(parent) = relative.get(..at) {
                let parent = self.entries.entry(parent.to_owned()).or_insert(Entry::Directory(0o755));
                if !matches!(parent, Entry::Directory(_)) {
                    bail!("{path} is below something that is no directory");
                }
            }
        }
        match self.entries.get(relative) {
            Some(there) if *there != entry && !matches!(there, Entry::Directory(_)) => {
                bail!("{path} is in the image twice, with different content")
            }
            _ => {}
        }
        self.entries.insert(relative.to_owned(), entry);
        Ok(())
    }

    /// Copies a file of the machine.
    ///
    /// # Errors
    /// It can't be read.
    pub fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        let mode = if fs::metadata(from)?.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
        self.copied.push(from.to_owned());
        self.file(to, data, mode)
    }

    /// Copies a program or library, and every library that it needs, from the tree at `sysroot` (`/` for the machine).
    ///
    /// # Errors
    /// One is missing, or is for another platform.
    pub fn program(&mut self, sysroot: &Path, platform: Platform, from: &Path, to: &str) -> Result<()> {
        self.copy(from, to)?;
        let elf = Elf::read(from)?;
        if let Some(interpreter) = &elf.interpreter {
            let path = sysroot.join(interpreter.trim_start_matches('/'));
            self.copy(&path, interpreter)?;
        }
        for library in &elf.needed {
            let to = format!("/lib/{}/{library}", platform.multiarch);
            // The loader is found by its own path, and asked for by name too.
            if elf.interpreter.as_ref().is_some_and(|i| i.ends_with(&format!("/{library}")))
                || self.entries.contains_key(to.trim_start_matches('/'))
            {
                continue;
            }
            let path = find_library(sysroot, platform, library)
                .with_context(|| format!("{} needs {library}", from.display()))?;
            self.program(sysroot, platform, &path, &to)?;
        }
        Ok(())
    }

    /// What every image has: users, and how names are resolved.
    ///
    /// # Errors
    /// They are there already, and different.
    pub fn basics(&mut self) -> Result<()> {
        let passwd = "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n";
        self.file("/etc/passwd", passwd.into(), 0o644)?;
        self.file("/etc/group", "root:x:0:\nnonroot:x:65532:\n".into(), 0o644)?;
        self.file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n".into(), 0o644)?;
        self.directory("/tmp", 0o1777)
    }

    /// The layer.
    ///
    /// # Errors
    /// A name is too long.
    pub fn tar(&self, seconds: u64) -> Result<Vec<u8>> {
        let mut tar = Tar::new(seconds);
        for (path, entry) in &self.entries {
            tar.add(path, entry)?;
        }
        Ok(tar.finish())
    }

    /// Every file with its content.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.entries.iter().filter_map(|(path, entry)| match entry {
            Entry::File(_, data) => Some((path.as_str(), data.as_slice())),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_replaced_in_silence() {
        let mut files = Rootfs::default();
        files.file("/etc/a", b"1".to_vec(), 0o644).unwrap();
        files.file("/etc/a", b"1".to_vec(), 0o644).unwrap();
        assert!(files.file("/etc/a", b"2".to_vec(), 0o644).is_err());
        assert!(files.file("/etc/a/b", Vec::new(), 0o644).is_err());
        assert!(files.file("etc/b", Vec::new(), 0o644).is_err());
        assert!(files.link("/", "x").is_err());
    }

    #[test]
    fn a_program_comes_with_its_libraries() {
        let platform = Platform::here().unwrap();
        let mut files = Rootfs::default();
        let tar = Path::new("/usr/bin/tar").canonicalize().unwrap();
        files.program(Path::new("/"), platform, &tar, "/bin/tar").unwrap();
        let all: Vec<&str> = files.files().map(|(path, _)| path).collect();
        assert!(all.contains(&"bin/tar"), "{all:?}");
        assert!(all.contains(&format!("lib/{}/libc.so.6", platform.multiarch).as_str()), "{all:?}");
        assert!(all.iter().any(|path| path.contains("ld-linux")), "{all:?}");
        // What it needs, it has: it runs in there, and nothing else is in there.
        let directory = tempfile::tempdir().unwrap();
        let layer = directory.path().join("layer.tar");
        fs::write(&layer, files.tar(0).unwrap()).unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let (layer, root) = (layer.to_str().unwrap(), root.to_str().unwrap());
        crate::process::output("tar", &["-C", root, "-xf", layer]).unwrap();
        if nix::unistd::Uid::effective().is_root() {
            let version = crate::process::output("chroot", &[root, "/bin/tar", "--version"]).unwrap();
            assert!(version.starts_with("tar "), "{version}");
        }
    }
}
