//! What an image is made of: a bill of materials as SPDX 2.3 JSON, from cargo's metadata and dpkg's records.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::archive::rfc3339;
use super::{Platform, Rootfs, sha256};
use crate::process::{finish, output};

/// A part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// `cargo` or `deb/debian`, as package URLs (purl-spec) have it.
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

/// The crates that a package's programs are made of, itself among them: normal dependencies, of one platform.
///
/// # Errors
/// cargo fails.
pub fn crates(workspace: &Path, platform: Platform, packages: &[&str]) -> Result<BTreeSet<Part>> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace).args(["metadata", "--format-version", "1", "--locked"]);
    cargo.args(["--filter-platform", platform.target]);
    let metadata: Value = serde_json::from_str(&finish(&mut cargo)?).context("reading cargo's metadata")?;
    reached(&metadata, packages)
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

/// The Debian packages that files came from. A file of none is left out: it is ours.
///
/// # Errors
/// There is no dpkg.
pub fn debian(files: &[PathBuf]) -> Result<BTreeSet<Part>> {
    let mut parts = BTreeSet::new();
    for file in files {
        let path = file.display().to_string();
        // dpkg knows a file by the path that its package has, which is with or without /usr.
        let other = path.strip_prefix("/usr").map_or_else(|| format!("/usr{path}"), str::to_owned);
        let owner = output("dpkg-query", &["--search", &path])
            .or_else(|_| output("dpkg-query", &["--search", &other]));
        let Ok(owner) = owner else { continue };
        let Some((package, _)) = owner.split_once(": ") else { continue };
        let version = output("dpkg-query", &["--show", "--showformat=${Version}", package])?;
        let name = package.split(':').next().unwrap_or(package).to_owned();
        parts.insert(Part { kind: "deb/debian", name, version, licence: None });
    }
    Ok(parts)
}

/// The document for an image.
#[must_use]
pub fn document(image: &str, version: &str, seconds: u64, files: &Rootfs, parts: &BTreeSet<Part>) -> Value {
    let contents: String = files.files().map(|(path, sum)| format!("{sum}  /{path}\n")).collect();
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
        "relationships": std::iter::once(describes).chain(contains).collect::<Vec<_>>(),
    })
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
    fn libraries_are_traced_to_their_package() {
        let libc = Path::new("/bin/tar").canonicalize().unwrap();
        let parts = debian(&[libc, PathBuf::from("/nowhere/at/all")]).unwrap();
        assert_eq!(parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["tar"]);
    }

    #[test]
    fn a_document_names_every_part_once_and_by_a_valid_id() {
        let odd =
            Part { kind: "deb/debian", name: "libstdc++6".into(), version: "1:2~3".into(), licence: None };
        let parts: BTreeSet<Part> = [part("a_b"), odd].into();
        let document = document("culvert/x", "1", 0, &Rootfs::default(), &parts);
        let ids: Vec<&str> =
            document["packages"].as_array().unwrap().iter().map(|p| p["SPDXID"].as_str().unwrap()).collect();
        assert_eq!(ids, ["SPDXRef-image", "SPDXRef-cargo-a-b-1.0.0", "SPDXRef-deb-debian-libstdc--6-1-2-3"]);
        assert_eq!(document["relationships"].as_array().unwrap().len(), 3);
        assert_eq!(
            document["packages"][2]["externalRefs"][0]["referenceLocator"],
            "pkg:deb/debian/libstdc++6@1%3A2%7E3"
        );
    }
}
