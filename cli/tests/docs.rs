//! The documents for users say what the programs do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use config::diagnostic::Code;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn help(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{program:?} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The long flags that a help text lists.
fn flags(help: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in help.lines().map(str::trim).filter(|l| l.starts_with('-') && !l.starts_with("- ")) {
        let long = line.split([' ', ',', '[']).find(|w| w.starts_with("--")).unwrap();
        if !["--help", "--version"].contains(&long) {
            found.push(long.to_owned());
        }
    }
    found
}

/// `UPDATE_DOCS=1 cargo test -p cli --test docs` writes the file anew.
#[test]
fn every_diagnostic_is_explained() {
    let mut text = "# Diagnostics\n\nThe codes of `culvert analyze` and of ztunnel's log, from the code's own table.\n\n\
                    | code | severity | what it means |\n|---|---|---|\n"
        .to_owned();
    for code in Code::ALL {
        text.push_str(&format!("| `{code}` | {} | {} |\n", code.severity(), code.explanation()));
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(root().join("docs/diagnostics.md"), &text).unwrap();
    }
    assert!(
        read("docs/diagnostics.md") == text,
        "docs/diagnostics.md is not in step: UPDATE_DOCS=1 writes it anew"
    );
}

#[test]
fn every_command_and_flag_is_described() {
    let program = Path::new(env!("CARGO_BIN_EXE_culvert"));
    let text = read("docs/culvert.md");
    let commands = [
        "install",
        "upgrade",
        "verify-install",
        "uninstall",
        "status",
        "proxy-status",
        "version",
        "doctor",
        "authn",
        "bug-report",
        "tag",
        "schema",
        "analyze",
        "what-if",
        "why",
        "ztunnel-config",
        "proxy-config",
        "waypoint",
        "ca",
        "demo",
        "bench",
        "completion",
    ];
    let top = help(program, &[]);
    for command in commands {
        assert!(top.contains(&format!("\n  {command}")), "{command}");
        // Those with commands of their own have flags there.
        let below: &[&str] = match command {
            "authn" => &["tls-check"],
            "tag" => &["list", "set", "remove"],
            "proxy-config" => &["listener", "route", "cluster", "endpoint", "secret", "log"],
            "waypoint" => &["apply", "generate", "list", "status", "delete"],
            _ => &[],
        };
        let mut helps = vec![help(program, &[command])];
        helps.extend(below.iter().map(|sub| help(program, &[command, sub])));
        for flag in helps.iter().flat_map(|text| flags(text)) {
            let known = text.contains(&flag) || flag == "--output" && text.contains("-o text");
            assert!(known, "docs/culvert.md does not name {flag} of {command}");
        }
    }
    let listed = top.lines().filter(|l| l.starts_with("  ") && !l.trim_start().starts_with('-')).count();
    assert_eq!(listed, commands.len() + 1, "a command is not tested here: {top}");
}

#[test]
fn every_flag_of_ztunnel_is_described() {
    let program = Path::new(env!("CARGO_BIN_EXE_culvert")).with_file_name("ztunnel");
    if !program.is_file() {
        eprintln!("skipped: {} is not built (`make test` builds it)", program.display());
        return;
    }
    let text = read("docs/file-mode.md") + &read("docs/ztunnel.md");
    for flag in flags(&help(&program, &[])) {
        assert!(text.contains(&format!("`{flag}")), "neither docs/file-mode.md nor ztunnel.md names {flag}");
    }
}

#[test]
fn every_flag_of_the_waypoint_is_described() {
    let program = Path::new(env!("CARGO_BIN_EXE_culvert")).with_file_name("waypoint");
    if !program.is_file() {
        eprintln!("skipped: {} is not built (`make test` builds it)", program.display());
        return;
    }
    let text = read("docs/waypoint.md") + &read("docs/file-mode.md") + &read("docs/ztunnel.md");
    for flag in flags(&help(&program, &[])) {
        assert!(text.contains(&format!("`{flag}")), "neither docs/waypoint.md nor ztunnel.md names {flag}");
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut documents =
        vec!["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
            .into_iter()
            .map(PathBuf::from)
            .collect::<Vec<_>>();
    for dir in ["docs", "bench"] {
        for entry in fs::read_dir(root().join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "md") {
                documents.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    for document in documents {
        let text = read(&document.to_string_lossy());
        for part in text.split("](").skip(1) {
            let target = part.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = root().join(&document).parent().unwrap().join(target);
            assert!(path.exists(), "{}: {target}", document.display());
        }
    }
}
