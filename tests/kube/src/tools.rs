//! The cluster's programs, built from the Go module in `tools/` with its pinned versions.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::lab::Lab;
use crate::process::finish;
use crate::report::{Clock, say};

/// The names that the program of Kubernetes answers to.
pub const KUBERNETES: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];

/// Program, and the Go package that it is built from.
const PROGRAMS: [(&str, &str); 5] = [
    ("app", "./app"),
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("coredns", "./coredns"),
    ("kubernetes", "./kubernetes"),
    ("helm", "helm.sh/helm/v4/cmd/helm"),
];

/// Builds what is not there, or all of it if the module has changed. Cold it takes some twenty minutes of processor time.
///
/// # Errors
/// There is no Go, a module can't be fetched, or one does not compile.
pub fn build(lab: &Lab) -> Result<()> {
    let module = lab.workspace.join("tests/kube/tools");
    let stamp = lab.root.join("bin/.built");
    let wanted = fingerprint(lab)?;
    if fs::read_to_string(&stamp).is_ok_and(|built| built == wanted) {
        return Ok(());
    }
    let clock = Clock::start();
    fs::create_dir_all(lab.root.join("bin"))?;
    let flags = linker_flags(&wanted)?;
    for (program, package) in PROGRAMS {
        let since = Clock::start();
        let mut go = Command::new("go");
        go.current_dir(&module)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-buildvcs=false -mod=readonly")
            // What the linker would leave out again costs the compiler a tenth of its time.
            .args(["build", "-trimpath", "-gcflags=all=-dwarf=false", "-ldflags", &flags, "-o"])
            .arg(lab.bin(program))
            .arg(package);
        finish(&mut go).with_context(|| format!("building {program} (needs Go 1.26, https://go.dev/dl)"))?;
        say(&format!("   built {program}, {}", since.seconds()));
    }
    for name in KUBERNETES {
        let link = lab.bin(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink("kubernetes", &link).with_context(|| format!("linking {}", link.display()))?;
        }
    }
    gateway_api(lab)?;
    lab.write(&stamp, &wanted)?;
    say(&format!("   programs of the cluster, {}", clock.seconds()));
    Ok(())
}

/// The directory with the definitions of the Gateway API (its standard channel), as the module of its conformance suite
/// pins it.
///
/// # Errors
/// There is no Go, or the module can't be fetched.
pub fn gateway_api(lab: &Lab) -> Result<PathBuf> {
    let go = |arguments: &[&str]| {
        let mut go = Command::new("go");
        go.current_dir(lab.workspace.join("tests/kube/conformance"))
            .env("GOFLAGS", "-mod=readonly")
            .args(arguments);
        finish(&mut go).context("the Gateway API's module (needs Go 1.26, https://go.dev/dl)")
    };
    go(&["mod", "download", "sigs.k8s.io/gateway-api"])?;
    let module = go(&["list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api"])?;
    let from = PathBuf::from(module.trim()).join("config/crd/standard");
    let to = lab.root.join("crds");
    fs::create_dir_all(&to)?;
    for entry in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A policy on admission is beside them, which is for who has several channels.
        if name.starts_with("gateway.networking.k8s.io_") {
            lab.write(&to.join(name), &fs::read_to_string(&path)?)?;
        }
    }
    Ok(to)
}

/// All that the programs are made of and that is ours: the versions, and the sources.
fn fingerprint(lab: &Lab) -> Result<String> {
    let module = lab.workspace.join("tests/kube/tools");
    let mut text = String::new();
    for file in
        ["go.mod", "kubernetes/main.go", "coredns/main.go", "app/main.go", "app/serve.go", "app/client.go"]
    {
        let path = module.join(file);
        text.push_str(&fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?);
    }
    Ok(text)
}

/// Without symbols, and with the version that Kubernetes' programs are to give as theirs.
fn linker_flags(module: &str) -> Result<String> {
    let version =
        version_of(module, "k8s.io/kubernetes").context("tools/go.mod names no k8s.io/kubernetes")?;
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in
            [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor), ("gitTreeState", "clean")]
        {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    Ok(flags)
}

/// The version that a `go.mod` requires.
fn version_of<'a>(module: &'a str, path: &str) -> Option<&'a str> {
    module.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next() == Some(path)).then(|| words.next()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_give_the_version_that_the_module_pins() {
        let module =
            "module m\nrequire (\n\tk8s.io/kubernetes v1.37.1\n\tk8s.io/api v0.37.1 // indirect\n)\n";
        assert_eq!(version_of(module, "k8s.io/kubernetes"), Some("v1.37.1"));
        assert_eq!(version_of(module, "k8s.io/ap"), None);
        let flags = linker_flags(module).unwrap();
        assert!(flags.contains(" -X k8s.io/component-base/version.gitMinor=37 "), "{flags}");
        assert!(linker_flags("module m\n").is_err());
    }
}
