//! The users' files and annotations.

use std::sync::Arc;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::Mesh;

/// One object of every kind, with most of its fields.
const MANIFESTS: &str = include_str!("manifests.yaml");

fn describe(mesh: &Mesh) -> Vec<String> {
    let mut all: Vec<String> = mesh.workloads().map(|w| format!("{w:?}")).collect();
    all.extend(mesh.services().map(|s| format!("{s:?}")));
    all.extend(mesh.policies().map(|p| format!("{p:?}")));
    all.push(format!("{:?}", mesh.settings()));
    all.sort();
    all
}

/// Any bytes may be in a file: what was in force beside it stays, and when it is gone nothing of it is left.
pub(crate) fn manifest(bytes: &[u8]) {
    let mut repository = Repository::new(Options { node: Some("n1".into()), ..Options::default() });
    let (good, bad): (Arc<str>, Arc<str>) = ("good.yaml".into(), "worse.yaml".into());
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: good, labels: {app: a}}\nstatus: {podIP: 10.9.9.9}\n";
    let mut mesh = Mesh::default().apply(repository.apply(&good, Content::Bytes(pod.as_bytes())).changes);
    let before = describe(&mesh);
    mesh = mesh.apply(repository.apply(&bad, Content::Bytes(bytes)).changes);
    assert!(mesh.workload("Kubernetes//Pod/default/good").is_some(), "what was in force is gone");
    for diagnostic in repository.review() {
        assert!(diagnostic.to_string().len() < 20_000, "nobody reads so much");
    }
    mesh = mesh.apply(repository.apply(&bad, Content::Gone).changes);
    assert_eq!(describe(&mesh), before, "something of the file is left");
    assert_eq!(repository.diagnostics(), []);
}

pub(crate) fn manifests() -> Vec<Vec<u8>> {
    let mut seeds = vec![MANIFESTS.as_bytes().to_vec()];
    seeds.extend(MANIFESTS.split("---\n").map(|document| document.as_bytes().to_vec()));
    seeds
}

/// What the good manifests come to.
pub(crate) fn mesh() -> Mesh {
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"manifests.yaml".into(), Content::Bytes(MANIFESTS.as_bytes()));
    assert!(!repository.has_bad_files(), "{:?}", repository.diagnostics());
    Mesh::default().apply(outcome.changes)
}
