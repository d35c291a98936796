//! No crate escapes the workspace's lints.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use structure::{Parsed, Workspace};

/// The crates that talk to the kernel below safe wrappers.
const MAY_BE_UNSAFE: [&str; 2] = ["net", "ebpf"];

/// Names that say nothing of what is inside.
const EMPTY_NAMES: [&str; 7] = ["core", "common", "util", "utils", "helper", "helpers", "misc"];

#[test]
fn every_member_inherits_the_workspace_lints() {
    let workspace = Workspace::read().unwrap();
    let inherits = |m: &&structure::Member| {
        m.manifest.get("lints").and_then(|l| l.get("workspace")).and_then(toml::Value::as_bool) == Some(true)
    };
    let without: Vec<&str> =
        workspace.members.iter().filter(|m| !inherits(m)).map(structure::Member::name).collect();
    assert!(without.is_empty(), "without [lints] workspace = true: {without:?}");
}

#[test]
fn every_crate_root_forbids_unsafe_code() {
    let workspace = Workspace::read().unwrap();
    let mut without = Vec::new();
    for member in workspace.members.iter().filter(|m| !MAY_BE_UNSAFE.contains(&m.name())) {
        let roots = member.roots(&workspace).unwrap();
        assert!(!roots.is_empty(), "{} has no root", member.directory);
        for root in roots {
            if !Parsed::new(&workspace.text(&root).unwrap()).unwrap().forbids_unsafe {
                without.push(root);
            }
        }
    }
    assert!(without.is_empty(), "without #![forbid(unsafe_code)]: {without:#?}");
}

#[test]
fn no_module_switches_lints_off_without_a_reason() {
    let workspace = Workspace::read().unwrap();
    let mut silent = Vec::new();
    // Tests may: there, a panic is the way to fail.
    for path in
        workspace.sources().unwrap().iter().filter(|p| p.contains("/src/") && !p.starts_with("tests/"))
    {
        let parsed = Parsed::new(&workspace.text(path).unwrap()).unwrap();
        silent.extend(parsed.silent_allows.iter().map(|line| format!("{path}:{line}")));
    }
    assert!(silent.is_empty(), "#![allow(…)] without a reason: {silent:#?}");
}

#[test]
fn every_name_says_what_is_inside() {
    let workspace = Workspace::read().unwrap();
    let mut empty: Vec<String> = Vec::new();
    let says_nothing = |name: &str| EMPTY_NAMES.contains(&name);
    empty.extend(workspace.members.iter().filter(|m| says_nothing(m.name())).map(|m| m.directory.clone()));
    for path in workspace.sources().unwrap() {
        let parts = path.trim_end_matches(".rs").split('/');
        if parts.into_iter().any(says_nothing) {
            empty.push(path.clone());
        }
        let parsed = Parsed::new(&workspace.text(&path).unwrap()).unwrap();
        let modules = parsed.modules.iter().filter(|m| says_nothing(m));
        empty.extend(modules.map(|m| format!("{path}: mod {m}")));
    }
    assert!(empty.is_empty(), "{empty:#?}");
}

#[test]
fn attributes_are_read_as_the_compiler_reads_them() {
    let parsed = |text: &str| Parsed::new(text).unwrap();
    assert!(parsed("//! Docs.\n#![forbid(unsafe_code)]").forbids_unsafe);
    assert!(parsed("#![forbid(missing_docs, unsafe_code)]").forbids_unsafe);
    assert!(!parsed("#![deny(unsafe_code)]").forbids_unsafe);
    assert!(!parsed("// #![forbid(unsafe_code)]").forbids_unsafe);
    let text = "#![allow(clippy::panic)]\n#![allow(clippy::panic, reason = \"why\")]\n#![expect(dead_code)]";
    assert_eq!(parsed(text).silent_allows, [1, 3]);
}
