//! The chart, as this program carries it, so that program and chart are always of one version.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A file of the chart: its path in it, and its text.
type File = (&'static str, &'static str);

macro_rules! file {
    ($path:literal) => {
        ($path, include_str!(concat!("../../../deploy/charts/culvert/", $path)))
    };
}

/// All of them; a test holds that none is missing.
static FILES: &[File] = &[
    file!(".helmignore"),
    file!("Chart.yaml"),
    file!("README.md"),
    file!("crds/authorizationpolicies.security.istio.io.yaml"),
    file!("crds/destinationrules.networking.istio.io.yaml"),
    file!("crds/envoyfilters.networking.istio.io.yaml"),
    file!("crds/gateways.networking.istio.io.yaml"),
    file!("crds/peerauthentications.security.istio.io.yaml"),
    file!("crds/proxyconfigs.networking.istio.io.yaml"),
    file!("crds/ratelimits.culvert.dev.yaml"),
    file!("crds/requestauthentications.security.istio.io.yaml"),
    file!("crds/serviceentries.networking.istio.io.yaml"),
    file!("crds/sidecars.networking.istio.io.yaml"),
    file!("crds/telemetries.telemetry.istio.io.yaml"),
    file!("crds/trafficextensions.extensions.istio.io.yaml"),
    file!("crds/virtualservices.networking.istio.io.yaml"),
    file!("crds/wasmplugins.extensions.istio.io.yaml"),
    file!("crds/workloadentries.networking.istio.io.yaml"),
    file!("crds/workloadgroups.networking.istio.io.yaml"),
    file!("templates/NOTES.txt"),
    file!("templates/_helpers.tpl"),
    file!("templates/control-plane-rbac.yaml"),
    file!("templates/control-plane-waypoints.yaml"),
    file!("templates/control-plane.yaml"),
    file!("templates/network-policy.yaml"),
    file!("templates/node-admission.yaml"),
    file!("templates/node.yaml"),
    file!("templates/resource-quota.yaml"),
    file!("templates/webhook.yaml"),
    file!("templates/ztunnel.yaml"),
    file!("values.schema.json"),
    file!("values.yaml"),
];

/// The files with custom resource definitions.
pub fn crds() -> impl Iterator<Item = &'static File> {
    FILES.iter().filter(|(path, _)| path.starts_with("crds/"))
}

/// Writes the chart into a directory.
///
/// # Errors
/// A file can't be written.
pub fn write(directory: &Path) -> Result<()> {
    for (path, text) in FILES {
        let path = directory.join(path);
        let parent = path.parent().unwrap_or(directory);
        let write = || fs::create_dir_all(parent).and_then(|()| fs::write(&path, text));
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn below(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { below(&path, found) } else { found.push(path) }
        }
    }

    #[test]
    fn the_chart_is_carried_whole() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert");
        let mut found = Vec::new();
        below(&root, &mut found);
        let mut found: Vec<_> =
            found.iter().map(|p| p.strip_prefix(&root).unwrap().to_string_lossy().into_owned()).collect();
        found.sort();
        let mut carried: Vec<_> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        carried.sort();
        assert_eq!(carried, found);
        let copy = tempfile::tempdir().unwrap();
        write(copy.path()).unwrap();
        assert!(copy.path().join("templates/ztunnel.yaml").is_file());
    }
}
