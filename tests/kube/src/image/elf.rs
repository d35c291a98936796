//! What a program needs to run, as `readelf` (package binutils) says: it reads those of other platforms as well.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Platform;
use crate::process::output;

/// The part of an ELF file that says what it needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elf {
    /// The loader's path; none for a static program and for a library.
    pub interpreter: Option<String>,
    /// Libraries by name.
    pub needed: Vec<String>,
}

impl Elf {
    /// Of a file.
    ///
    /// # Errors
    /// It can't be read, or is no ELF file.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            output("readelf", &["--wide", "--program-headers", "--dynamic", &path.display().to_string()])
                .with_context(|| format!("finding what {} needs", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut elf = Self::default();
        for line in text.lines() {
            if let Some((_, path)) = line.split_once("[Requesting program interpreter: ") {
                elf.interpreter = Some(path.trim_end().trim_end_matches(']').to_owned());
            } else if let Some((_, name)) = line.split_once("(NEEDED)")
                && let Some((_, name)) = name.split_once('[')
            {
                elf.needed.push(name.trim_end().trim_end_matches(']').to_owned());
            }
        }
        elf
    }
}

/// Where a library is.
///
/// # Errors
/// Nowhere: with the places that were tried.
pub fn find_library(sysroot: &Path, platform: Platform, name: &str) -> Result<PathBuf> {
    let multiarch = platform.multiarch;
    let places = [
        format!("lib/{multiarch}"),
        format!("usr/lib/{multiarch}"),
        "lib".into(),
        "usr/lib".into(),
        "lib64".into(),
    ];
    places
        .iter()
        .map(|place| sysroot.join(place).join(name))
        .find(|path| path.exists())
        .and_then(|path| path.canonicalize().ok())
        .with_context(|| format!("{name} is in none of {} below {}", places.join(", "), sysroot.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readelf_is_understood() {
        let text = "  INTERP 0x1 0x2\n      [Requesting program interpreter: /lib64/ld-linux-x86-64.so.2]\n \
                    0x01 (NEEDED)             Shared library: [libgcc_s.so.1]\n \
                    0x01 (NEEDED)             Shared library: [libc.so.6]\n";
        let elf = Elf::parse(text);
        assert_eq!(elf.interpreter.as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(elf.needed, ["libgcc_s.so.1", "libc.so.6"]);
        assert_eq!(Elf::parse("There is no dynamic section in this file.\n"), Elf::default());
    }
}
