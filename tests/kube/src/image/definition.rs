//! The product's images, as `deploy/images/*.toml` define them, from programs that cargo builds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::{Archive, Platform, Rootfs, Settings, sbom};
use crate::process::{finish, output};
use crate::report::{Clock, say};

/// Users that are not root.
const NONROOT: &str = "65532:65532";

/// An image as its file defines it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Without the tag, which is the workspace's version.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// What is run.
    pub entrypoint: Vec<String>,
    /// `UID:GID`; a user that is not root, if none is given.
    #[serde(default)]
    pub user: Option<String>,
    /// What cargo builds.
    #[serde(default)]
    pub program: Vec<Program>,
    /// What the machine (or the sysroot) has.
    #[serde(default)]
    pub tool: Vec<Tool>,
    /// What the machine has, and is the same on all kinds of machines.
    #[serde(default)]
    pub file: Vec<Tool>,
}

/// A program of the workspace.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The cargo package.
    pub package: String,
    /// The program.
    pub name: String,
    /// Where it is in the image.
    pub to: String,
    /// Without libraries, so that it runs wherever it is copied to.
    #[serde(default)]
    pub r#static: bool,
}

/// A program, or a file, of Debian.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// Where it is, in Debian and in the image.
    pub path: String,
    /// The Debian package, for those who lack it.
    pub package: String,
}

/// How images are built.
#[derive(Clone, Debug)]
pub struct Build {
    /// The workspace.
    pub workspace: PathBuf,
    /// What for.
    pub platform: Platform,
    /// cargo's profile.
    pub profile: String,
    /// Takes the programs as they are, without asking cargo to build them.
    pub prebuilt: bool,
    /// More packages for the same call of cargo: built in calls of their own, what they share would be compiled again, since
    /// cargo joins the features of what one call names.
    pub beside: &'static [&'static str],
    /// The tree that Debian's programs and libraries are taken from.
    pub sysroot: PathBuf,
    /// Where the images go.
    pub out: PathBuf,
    /// Takes an archive that is there, where what it was made of has not changed since.
    pub reuse: bool,
}

impl Definition {
    /// All of them, by file name.
    ///
    /// # Errors
    /// One can't be read.
    pub fn all(workspace: &Path) -> Result<BTreeMap<String, Self>> {
        let directory = workspace.join("deploy/images");
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "toml")
                && let Some(stem) = path.file_stem()
            {
                let text = fs::read_to_string(&path)?;
                let definition =
                    toml::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
                all.insert(stem.to_string_lossy().into_owned(), definition);
            }
        }
        Ok(all)
    }
}

impl Build {
    /// Builds images; returns their archives, in `out`, beside a bill of materials each.
    ///
    /// # Errors
    /// A program does not compile, or something is missing.
    pub fn run(&self, definitions: &BTreeMap<String, Definition>) -> Result<Vec<PathBuf>> {
        if !self.prebuilt {
            self.compile(definitions)?;
        }
        let seconds = self.source_date()?;
        let built: Vec<&str> =
            definitions.values().flat_map(|d| &d.program).map(|p| p.package.as_str()).collect();
        let sources = sbom::Sources::read(&self.workspace, self.platform, &built)?;
        thread::scope(|scope| {
            let images: Vec<_> = definitions
                .iter()
                .map(|(stem, definition)| scope.spawn(|| self.image(stem, definition, &sources, seconds)))
                .collect();
            let done = |image: thread::ScopedJoinHandle<'_, Result<PathBuf>>| {
                image.join().unwrap_or_else(|_| bail!("making an image panicked"))
            };
            images.into_iter().map(done).collect()
        })
    }

    fn image(
        &self,
        stem: &str,
        definition: &Definition,
        sources: &sbom::Sources,
        seconds: u64,
    ) -> Result<PathBuf> {
        let clock = Clock::start();
        let path = self.out.join(format!("{stem}-{}.tar", self.platform.architecture));
        let (made_of, stamp) = (self.made_of(stem, definition)?, path.with_extension("inputs"));
        if self.reuse && path.exists() && fs::read_to_string(&stamp).is_ok_and(|there| there == made_of) {
            return Ok(path);
        }
        let tag = env!("CARGO_PKG_VERSION");
        let mut files = self.files(stem, definition)?;
        let packages: Vec<&str> = definition.program.iter().map(|p| p.package.as_str()).collect();
        let mut parts = sources.crates(&packages)?;
        if definition.program.iter().any(|program| program.r#static) {
            parts.extend(sbom::static_libc(&self.sysroot, self.platform)?);
        }
        parts.extend(sbom::debian(&self.sysroot, &files.copied)?);
        let bill = sbom::document(&definition.name, tag, seconds, &files, &parts);
        let bill = format!("{bill:#}\n").into_bytes();
        files.file(&format!("/usr/share/spdx/{stem}.spdx.json"), bill.clone(), 0o644)?;
        let archive = Archive::pack(&files, &self.settings(definition, tag, seconds))?;
        archive.write(&path)?;
        fs::write(path.with_extension("spdx.json"), bill)?;
        fs::write(&stamp, made_of)?;
        say(&format!(
            "   {}:{tag} {} MiB, {} parts, {}, sha256:{}",
            definition.name,
            archive.bytes.len() >> 20,
            parts.len(),
            clock.seconds(),
            archive.digest
        ));
        Ok(path)
    }

    /// The files that an image is made of, with their sizes and times.
    fn made_of(&self, stem: &str, definition: &Definition) -> Result<String> {
        let mut paths = vec![
            std::env::current_exe().context("finding this program")?,
            self.workspace.join("Cargo.lock"),
            self.workspace.join("deploy/images").join(format!("{stem}.toml")),
        ];
        let built = |p: &Program| self.target_directory(p.r#static).join(&p.name);
        paths.extend(definition.program.iter().map(built));
        let of_system =
            definition.tool.iter().map(|t| &t.path).chain(definition.file.iter().map(|f| &f.path));
        paths.extend(of_system.map(|path| self.sysroot.join(path.trim_start_matches('/'))));
        let mut text = String::new();
        for path in paths {
            // What is missing is said by whoever needs it.
            let Ok(there) = fs::metadata(&path) else { continue };
            let _ = writeln!(text, "{} {} {:?}", path.display(), there.len(), there.modified()?);
        }
        Ok(text)
    }

    fn settings(&self, definition: &Definition, tag: &str, seconds: u64) -> Settings {
        let label = |key: &str, value: &str| (format!("org.opencontainers.image.{key}"), value.to_owned());
        Settings {
            name: format!("{}:{tag}", definition.name),
            platform: self.platform,
            entrypoint: definition.entrypoint.clone(),
            user: definition.user.clone().unwrap_or_else(|| NONROOT.to_owned()),
            labels: vec![
                label("title", &definition.name),
                label("description", &definition.description),
                label("version", tag),
                label("licenses", "Apache-2.0"),
            ],
            seconds,
        }
    }

    fn files(&self, stem: &str, definition: &Definition) -> Result<Rootfs> {
        let mut files = Rootfs::default();
        files.basics()?;
        let work = tempdir(&self.out, stem)?;
        for program in &definition.program {
            let built = self.target_directory(program.r#static).join(&program.name);
            let stripped = work.join(&program.name);
            self.strip(&built, &stripped)?;
            files.program(&self.sysroot, self.platform, &stripped, &program.to)?;
            if program.r#static && !super::elf::Elf::read(&stripped)?.needed.is_empty() {
                bail!("{} is to be static, and needs libraries", built.display());
            }
        }
        for tool in &definition.tool {
            let path = self.sysroot.join(tool.path.trim_start_matches('/'));
            files
                .program(&self.sysroot, self.platform, &path, &tool.path)
                .with_context(|| format!("install the package {}", tool.package))?;
        }
        for file in &definition.file {
            files
                .copy(Path::new(&file.path), &file.path)
                .with_context(|| format!("install the package {}", file.package))?;
        }
        fs::remove_dir_all(&work)?;
        // Its own programs are no package of Debian's.
        files.copied.retain(|path| !path.starts_with(&work));
        Ok(files)
    }

    /// Debugging information is of no use in an image, and most of a program of the profile `dev`.
    fn strip(&self, from: &Path, to: &Path) -> Result<()> {
        let tool = if self.platform == Platform::here()? {
            "strip".to_owned()
        } else {
            format!("{}-strip", self.platform.target.replace("-unknown", ""))
        };
        output(tool, &["--strip-debug", "-o", &to.display().to_string(), &from.display().to_string()])
            .map(drop)
    }

    fn target_directory(&self, named: bool) -> PathBuf {
        let profile = if self.profile == "dev" { "debug" } else { &self.profile };
        let target = self.workspace.join("target");
        if self.crosses() || named {
            target.join(self.platform.target).join(profile)
        } else {
            target.join(profile)
        }
    }

    fn crosses(&self) -> bool {
        Platform::here().ok() != Some(self.platform)
    }

    fn compile(&self, definitions: &BTreeMap<String, Definition>) -> Result<()> {
        for fixed in [false, true] {
            let programs: Vec<&Program> =
                definitions.values().flat_map(|d| &d.program).filter(|p| p.r#static == fixed).collect();
            if programs.is_empty() {
                continue;
            }
            let mut cargo = Command::new("cargo");
            cargo.current_dir(&self.workspace).args(["build", "--locked", "--profile", &self.profile]);
            for program in &programs {
                cargo.args(["-p", &program.package]);
            }
            if !fixed {
                cargo.args(self.beside.iter().flat_map(|package| ["-p", package]));
            }
            // With a target named, flags are for the program only, not for what runs while it is built.
            if fixed || self.crosses() {
                cargo.args(["--target", self.platform.target]);
            }
            if fixed {
                cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
            }
            let clock = Clock::start();
            finish(&mut cargo)?;
            let names: Vec<&str> = programs.iter().map(|p| p.name.as_str()).collect();
            say(&format!("   built {}, {}", names.join(", "), clock.seconds()));
        }
        Ok(())
    }

    /// `SOURCE_DATE_EPOCH`, or the time of the last commit.
    fn source_date(&self) -> Result<u64> {
        let text = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => text,
            Err(_) => {
                let at = self.workspace.display().to_string();
                output("git", &["-C", &at, "log", "-1", "--format=%ct"])
                    .context("set SOURCE_DATE_EPOCH where there is no git")?
            }
        };
        text.trim().parse().with_context(|| format!("reading a time in seconds: {text:?}"))
    }
}

fn tempdir(out: &Path, stem: &str) -> Result<PathBuf> {
    let path = out.join(format!(".stripped-{stem}"));
    fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Lab;

    #[test]
    fn the_definitions_are_readable_and_run_what_they_have() {
        let all = Definition::all(&Lab::find().unwrap().workspace).unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["culvertd", "node", "waypoint", "ztunnel"]);
        for (stem, definition) in all {
            let run = definition.entrypoint.first().unwrap();
            assert!(definition.program.iter().any(|p| p.to == *run), "{stem} does not have {run}");
        }
        assert!(
            toml::from_str::<Definition>("name = 'x'\ndescription = ''\nentrypoint = []\ntypo = 1").is_err()
        );
    }

    #[test]
    fn a_plugin_that_runs_on_every_machine_is_static() {
        let all = Definition::all(&Lab::find().unwrap().workspace).unwrap();
        let plugin = all["node"].program.iter().find(|p| p.name == "culvert-cni").unwrap();
        assert!(plugin.r#static);
    }
}
