//! What an image is made of: a bill of materials as SPDX 2.3 JSON, from cargo's metadata and dpkg's records.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::archive::rfc3339;
use super::{Platform, Rootfs, sha1, sha256};
use crate::process::{finish, output};

/// A part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// `cargo`, `deb/debian` or `generic`, as package URLs (purl-spec) have it.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SPDX's expression, if it is known.
    pub licence: Option<String>,
}

impl Part {
    fn id(&self) -> String {
        let text = format!("SPDXRef-{}-{}-{}", self.kind, self.name, self.version);
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
    }

    fn url(&self) -> String {
        // `+` and `~` of Debian's versions must be escaped.
        let version = self.version.replace('+', "%2B").replace('~', "%7E").replace(':', "%3A");
        format!("pkg:{}/{}@{version}", self.kind, self.name)
    }

    fn describe(&self) -> Value {
        json!({
            "SPDXID": self.id(),
            "name": self.name,
            "versionInfo": self.version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": self.licence.as_deref().unwrap_or("NOASSERTION"),
            "copyrightText": "NOASSERTION",
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": self.url(),
            }],
        })
    }
}

/// What cargo knows of the workspace: asked once for all images.
#[derive(Debug)]
pub struct Sources {
    metadata: Value,
    /// Name and version of the crates that are linked into programs.
    linked: BTreeSet<(String, String)>,
    rust: Part,
}

impl Sources {
    /// Of one platform. `built` are all packages that cargo builds at once, whose features it unites.
    ///
    /// # Errors
    /// cargo fails.
    pub fn read(workspace: &Path, platform: Platform, built: &[&str]) -> Result<Self> {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(workspace).args(["metadata", "--format-version", "1", "--locked"]);
        cargo.args(["--filter-platform", platform.target]);
        let metadata = serde_json::from_str(&finish(&mut cargo)?).context("reading cargo's metadata")?;
        // The metadata has the features of the whole workspace, tests too, and with them crates that are in no program.
        let mut cargo = Command::new("cargo");
        cargo.current_dir(workspace).args(["tree", "--locked", "--prefix", "none"]);
        cargo.args(["--edges", "normal,no-proc-macro", "--format", "{p}", "--target", platform.target]);
        for package in built {
            cargo.args(["--package", package]);
        }
        let linked = finish(&mut cargo)?.lines().filter_map(linked).collect();
        let rustc = output("rustc", &["--version"])?;
        let version = rustc.split_whitespace().nth(1).context("rustc says no version")?.to_owned();
        let licence = Some("MIT OR Apache-2.0".to_owned());
        let rust = Part { kind: "generic", name: "rust-std".into(), version, licence };
        Ok(Self { metadata, linked, rust })
    }

    /// The crates that these packages' programs are made of, themselves among them, and Rust's standard library: normal
    /// dependencies.
    ///
    /// # Errors
    /// The workspace has no such package.
    pub fn crates(&self, packages: &[&str]) -> Result<BTreeSet<Part>> {
        let mut parts = reached(&self.metadata, packages)?;
        parts.retain(|part| self.linked.contains(&(part.name.clone(), part.version.clone())));
        parts.insert(self.rust.clone());
        Ok(parts)
    }
}

/// Name and version of a line of `cargo tree`: `name v1.0.0 (where)`.
fn linked(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    Some((words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned()))
}

fn reached(metadata: &Value, packages: &[&str]) -> Result<BTreeSet<Part>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let all: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|p| (text(&p["id"]), p)).collect();
    let edges: BTreeMap<String, Vec<String>> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| {
            let normal = |d: &Value| list(&d["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            (
                text(&node["id"]),
                list(&node["deps"]).iter().filter(|d| normal(d)).map(|d| text(&d["pkg"])).collect(),
            )
        })
        .collect();
    let mut waiting = Vec::new();
    for name in packages {
        let id = all.iter().find(|(_, p)| p["name"] == **name && p["source"].is_null()).map(|(id, _)| id);
        waiting.push(id.with_context(|| format!("there is no package {name} in the workspace"))?.clone());
    }
    let mut seen = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if seen.insert(id.clone()) {
            waiting.extend(edges.get(&id).cloned().unwrap_or_default());
        }
    }
    Ok(seen
        .iter()
        .filter_map(|id| all.get(id))
        .map(|p| Part {
            kind: "cargo",
            name: text(&p["name"]),
            version: text(&p["version"]),
            licence: p["license"].as_str().map(|l| l.replace('/', " OR ")),
        })
        .collect())
}

/// The Debian packages that files of a tree came from. A file of none is left out: it is ours.
///
/// # Errors
/// There is no dpkg.
pub fn debian(sysroot: &Path, files: &[PathBuf]) -> Result<BTreeSet<Part>> {
    let records = format!("--admindir={}", sysroot.join("var/lib/dpkg").display());
    let mut parts = BTreeSet::new();
    for file in files {
        let path = Path::new("/").join(file.strip_prefix(sysroot).unwrap_or(file)).display().to_string();
        // dpkg knows a file by the path that its package has, which is with or without /usr.
        let other = path.strip_prefix("/usr").map_or_else(|| format!("/usr{path}"), str::to_owned);
        let owner = output("dpkg-query", &[&records, "--search", &path])
            .or_else(|_| output("dpkg-query", &[&records, "--search", &other]));
        let Ok(owner) = owner else { continue };
        let Some((package, _)) = owner.split_once(": ") else { continue };
        let version = output("dpkg-query", &[&records, "--show", "--showformat=${Version}", package])?;
        let name = package.split(':').next().unwrap_or(package).to_owned();
        parts.insert(Part { kind: "deb/debian", name, version, licence: None });
    }
    Ok(parts)
}

/// The Debian package whose C library is linked into static programs.
///
/// # Errors
/// It is not there.
pub fn static_libc(sysroot: &Path, platform: Platform) -> Result<BTreeSet<Part>> {
    debian(sysroot, &[sysroot.join(format!("usr/lib/{}/libc.a", platform.multiarch))])
}

/// The document for an image.
#[must_use]
pub fn document(image: &str, version: &str, seconds: u64, files: &Rootfs, parts: &BTreeSet<Part>) -> Value {
    let contents: String = files.files().map(|(path, data)| format!("{}  /{path}\n", sha256(data))).collect();
    let (listed, holds): (Vec<Value>, Vec<Value>) =
        files.files().map(|(path, data)| file(path, data)).unzip();
    let whole = json!({
        "SPDXID": "SPDXRef-image",
        "name": image,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "Apache-2.0",
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": "CONTAINER",
        "externalRefs": [{
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": format!("pkg:docker/{image}@{version}"),
        }],
    });
    let packages: Vec<Value> = std::iter::once(whole).chain(parts.iter().map(Part::describe)).collect();
    let contains = parts.iter().map(|part| {
        json!({"spdxElementId": "SPDXRef-image", "relationshipType": "CONTAINS", "relatedSpdxElement": part.id()})
    });
    let describes = json!({
        "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": "SPDXRef-image",
    });
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": format!("{image}:{version}"),
        // Unique for the content, as it must be, and the same for the same content.
        "documentNamespace": format!("https://culvert.dev/spdx/{image}/{version}/{}", sha256(contents.as_bytes())),
        "creationInfo": {"created": rfc3339(seconds), "creators": ["Tool: culvert-images"]},
        "packages": packages,
        "files": listed,
        "relationships": std::iter::once(describes).chain(contains).chain(holds).collect::<Vec<_>>(),
    })
}

/// A file, and that the image contains it. SPDX 2.3, 8.4, wants its SHA-1, beside what is of use.
fn file(path: &str, data: &[u8]) -> (Value, Value) {
    let text = format!("SPDXRef-file-{path}");
    let id: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let described = json!({
        "SPDXID": id,
        "fileName": format!("./{path}"),
        "checksums": [
            {"algorithm": "SHA1", "checksumValue": sha1(data)},
            {"algorithm": "SHA256", "checksumValue": sha256(data)},
        ],
        "licenseConcluded": "NOASSERTION",
        "copyrightText": "NOASSERTION",
    });
    let contained =
        json!({"spdxElementId": "SPDXRef-image", "relationshipType": "CONTAINS", "relatedSpdxElement": id});
    (described, contained)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str) -> Part {
        Part { kind: "cargo", name: name.into(), version: "1.0.0".into(), licence: Some("MIT".into()) }
    }

    #[test]
    fn only_what_is_linked_is_listed() {
        let package = |name: &str, own: bool| {
            json!({"id": format!("id-{name}"), "name": name, "version": "1.0.0", "license": "MIT",
                   "source": if own { Value::Null } else { json!("registry") }})
        };
        let dependency =
            |name: &str, kind: Value| json!({"pkg": format!("id-{name}"), "dep_kinds": [{"kind": kind}]});
        // Of the same name as ours, from elsewhere.
        let mut stranger = package("us", false);
        stranger["id"] = json!("id-stranger");
        let metadata = json!({
            "packages": [package("us", true), package("linked", false), package("deep", false),
                         package("tested", false), package("other", true), stranger],
            "resolve": {"nodes": [
                {"id": "id-us", "deps": [dependency("linked", Value::Null), dependency("tested", json!("dev"))]},
                {"id": "id-linked", "deps": [dependency("deep", Value::Null)]},
            ]},
        });
        let names: Vec<String> = reached(&metadata, &["us"]).unwrap().into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["deep", "linked", "us"]);
        assert!(reached(&metadata, &["absent"]).is_err());
    }

    #[test]
    fn what_only_tests_need_is_in_no_bill() {
        let workspace = crate::lab::Lab::find().unwrap().workspace;
        let here = Platform::here().unwrap();
        let sources = Sources::read(&workspace, here, &["ztunnel", "control-plane"]).unwrap();
        let parts = sources.crates(&["ztunnel"]).unwrap();
        let has = |name: &str| parts.iter().any(|part| part.name == name);
        assert!(has("ztunnel") && has("rustls") && has("aws-lc-sys") && has("rust-std"), "{parts:?}");
        // Named in the lock file for features that no program has; a macro that is expanded, and gone; a test's tool.
        assert!(!has("ring") && !has("serde_derive") && !has("proptest"), "{parts:?}");
        assert_eq!(linked("a v1.2.3 (*)"), Some(("a".to_owned(), "1.2.3".to_owned())));
    }

    #[test]
    fn libraries_are_traced_to_their_package() {
        let libc = Path::new("/bin/tar").canonicalize().unwrap();
        let parts = debian(Path::new("/"), &[libc, PathBuf::from("/nowhere/at/all")]).unwrap();
        assert_eq!(parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["tar"]);
    }

    #[test]
    fn a_document_names_every_part_once_and_by_a_valid_id() {
        let odd =
            Part { kind: "deb/debian", name: "libstdc++6".into(), version: "1:2~3".into(), licence: None };
        let parts: BTreeSet<Part> = [part("a_b"), odd].into();
        let mut files = Rootfs::default();
        files.file("/usr/local/bin/x", b"abc".to_vec(), 0o755).unwrap();
        let document = document("culvert/x", "1", 0, &files, &parts);
        let ids: Vec<&str> =
            document["packages"].as_array().unwrap().iter().map(|p| p["SPDXID"].as_str().unwrap()).collect();
        assert_eq!(ids, ["SPDXRef-image", "SPDXRef-cargo-a-b-1.0.0", "SPDXRef-deb-debian-libstdc--6-1-2-3"]);
        assert_eq!(document["relationships"].as_array().unwrap().len(), 4);
        let file = &document["files"][0];
        assert_eq!(file["SPDXID"], "SPDXRef-file-usr-local-bin-x");
        // FIPS 180-4's example.
        assert_eq!(file["checksums"][0]["checksumValue"], "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(
            document["packages"][2]["externalRefs"][0]["referenceLocator"],
            "pkg:deb/debian/libstdc++6@1%3A2%7E3"
        );
    }
}
