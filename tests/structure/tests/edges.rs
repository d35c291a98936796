//! Which crate may depend on which. A new edge is a decision: it is made here, and in ARCHITECTURE.md.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};

use structure::{Member, Workspace};

/// A library, and the libraries that it may depend on.
const LIBRARIES: [(&str, &[&str]); 13] = [
    ("model", &[]),
    ("config", &["model"]),
    ("balance", &["model"]),
    ("proto", &["model"]),
    ("xds", &["proto"]),
    ("identity", &["model", "proto"]),
    ("net", &[]),
    ("hbone", &["net", "model"]),
    ("ebpf", &["net"]),
    ("capture", &["net", "ebpf"]),
    ("process", &[]),
    ("telemetry", &["model", "process"]),
    // What both proxies begin with: neither may depend on the other, and both follow files or a control plane.
    ("source", &["model", "config", "proto", "xds", "identity", "process"]),
];

/// What a library's tests may depend on beside that.
const IN_TESTS: [(&str, &[&str]); 3] =
    [("net", &["harness"]), ("ebpf", &["harness"]), ("capture", &["harness"])];

/// May depend on all libraries, and not on each other.
const BINARIES: [&str; 6] = ["ztunnel", "waypoint", "control-plane", "cni-plugin", "node-agent", "cli"];

/// Directories whose members only test or measure, and may depend on whatever they like.
const FREE: [&str; 2] = ["tests/", "bench"];

fn wrong_edges(workspace: &Workspace) -> Vec<String> {
    let own: BTreeSet<&str> = workspace.members.iter().map(Member::name).collect();
    let allowed: BTreeMap<&str, &[&str]> = LIBRARIES.into();
    let in_tests: BTreeMap<&str, &[&str]> = IN_TESTS.into();
    let libraries: BTreeSet<&str> = allowed.keys().copied().collect();
    let mut wrong = Vec::new();
    for member in &workspace.members {
        let name = member.name();
        let binary = BINARIES.contains(&name);
        let may: BTreeSet<&str> = match allowed.get(name) {
            Some(edges) => edges.iter().copied().collect(),
            None if binary => libraries.clone(),
            None if FREE.iter().any(|f| member.directory.starts_with(f)) => continue,
            None => {
                wrong.push(format!("{name} ({}) is in no list of this test", member.directory));
                continue;
            }
        };
        for kind in ["dependencies", "build-dependencies", "dev-dependencies"] {
            for dependency in member.dependencies(kind).iter().filter(|d| own.contains(d.as_str())) {
                let test_edge = kind == "dev-dependencies"
                    && (in_tests.get(name).is_some_and(|list| list.contains(&dependency.as_str()))
                        || (binary && dependency == "harness"));
                if !may.contains(dependency.as_str()) && !test_edge {
                    wrong.push(format!("{name} must not depend on {dependency} ({kind})"));
                }
            }
        }
    }
    wrong
}

#[test]
fn crates_depend_on_each_other_only_along_the_allowed_edges() {
    let wrong = wrong_edges(&Workspace::read().unwrap());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_edge_that_is_not_allowed_is_found_in_every_table() {
    let mut workspace = Workspace::read().unwrap();
    let mut add = |directory: &str, manifest: &str| {
        let manifest = manifest.parse().unwrap();
        workspace.members.push(Member { directory: directory.into(), manifest });
    };
    add("crates/model", "package.name = 'model'\n[target.'cfg(unix)'.dependencies]\nnet.workspace = true");
    add(
        "crates/net",
        "package.name = 'net'\n[dev-dependencies]\nharness.workspace = true\nproto.workspace = true",
    );
    add("crates/hbone", "package.name = 'hbone'\n[build-dependencies]\nidentity.workspace = true");
    add("cli", "package.name = 'cli'\n[dependencies]\nmodel.workspace = true\nztunnel.workspace = true");
    add("crates/new", "package.name = 'new'");
    add("tests/new", "package.name = 'tests'\n[dependencies]\nztunnel.workspace = true");
    assert_eq!(
        wrong_edges(&workspace),
        [
            "model must not depend on net (dependencies)",
            "net must not depend on proto (dev-dependencies)",
            "hbone must not depend on identity (build-dependencies)",
            "cli must not depend on ztunnel (dependencies)",
            "new (crates/new) is in no list of this test",
        ]
    );
}

#[test]
fn the_table_has_no_cycles_and_names_no_ghosts() {
    let workspace = Workspace::read().unwrap();
    let own: BTreeSet<&str> = workspace.members.iter().map(Member::name).collect();
    // In an order in which each stands after all that it depends on, if there is one.
    let mut placed: BTreeSet<&str> = BTreeSet::new();
    while let Some((name, _)) =
        LIBRARIES.iter().find(|(n, edges)| !placed.contains(n) && edges.iter().all(|e| placed.contains(e)))
    {
        placed.insert(name);
    }
    assert_eq!(placed.len(), LIBRARIES.len(), "a cycle among those that are not in {placed:?}");
    let named = LIBRARIES.iter().map(|(n, _)| *n).chain(BINARIES);
    let ghosts: Vec<&str> = named.filter(|n| !own.contains(n)).collect();
    assert!(ghosts.is_empty(), "in the table, but not in the workspace: {ghosts:?}");
}

#[test]
fn every_version_is_stated_once_in_the_root() {
    let workspace = Workspace::read().unwrap();
    let mut wrong = Vec::new();
    for member in &workspace.members {
        for kind in ["dependencies", "build-dependencies", "dev-dependencies"] {
            let Some(table) = member.manifest.get(kind).and_then(toml::Value::as_table) else { continue };
            for (name, value) in table {
                if value.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                    wrong.push(format!("{}: {name} should be `workspace = true`", member.directory));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
