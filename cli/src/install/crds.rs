//! The CRDs that the chart brings, and when one takes the place of one that is installed.
//!
//! The rule: what is newer, or not ours, is never replaced. A CRD of ours says in an annotation which version it is. One
//! without it is Istio's (or another mesh's): it stays, if it serves the versions that we read, and has all the fields
//! that its makers know.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::yaml;

/// Says which version of our CRDs one is: a whole number.
pub const VERSION_ANNOTATION: &str = "culvert.dev/crd-version";

/// Where the API server has them.
pub const PATH: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// What is to be done about one CRD.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// It is not there.
    Create,
    /// An older one of ours is there.
    Update {
        /// Its version.
        from: u64,
    },
    /// It stays; with the reason.
    Keep(String),
    /// What is there does not serve what the mesh reads, and is not ours to replace; with what is missing.
    Blocked(String),
}

/// Our CRDs.
///
/// # Errors
/// Not in a program that passed its tests.
pub fn ours() -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for (name, text) in super::chart::crds() {
        all.extend(yaml::read(text).with_context(|| format!("the chart's {name}"))?);
    }
    Ok(all)
}

/// What to do with `ours`, where `installed` is there.
#[must_use]
pub fn decide(ours: &Value, installed: Option<&Value>) -> Action {
    let Some(installed) = installed else { return Action::Create };
    match (version(ours), version(installed)) {
        (Some(new), Some(old)) if old < new => Action::Update { from: old },
        (Some(new), Some(old)) if old > new => {
            Action::Keep(format!("newer: version {old}, and this is {new}"))
        }
        (_, Some(_)) => Action::Keep("it is this one".to_owned()),
        (_, None) => {
            let served = versions(installed);
            let missing: Vec<_> = versions(ours).into_iter().filter(|v| !served.contains(v)).collect();
            if missing.is_empty() {
                Action::Keep("it is another mesh's, and serves the versions that are read".to_owned())
            } else {
                Action::Blocked(format!("it is another mesh's, and does not serve {}", missing.join(", ")))
            }
        }
    }
}

fn version(crd: &Value) -> Option<u64> {
    crd.get("metadata")?.get("annotations")?.get(VERSION_ANNOTATION)?.as_str()?.parse().ok()
}

/// The versions in which a CRD's objects are served.
fn versions(crd: &Value) -> Vec<String> {
    let all = crd.pointer("/spec/versions").and_then(Value::as_array).into_iter().flatten();
    let served = all.filter(|v| v.get("served").and_then(Value::as_bool) == Some(true));
    served.filter_map(|v| v.get("name")?.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod generate;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn crd(version: Option<&str>, served: &[&str]) -> Value {
        let annotations = version.map_or(json!({}), |v| json!({VERSION_ANNOTATION: v}));
        let versions: Vec<_> = served.iter().map(|name| json!({"name": name, "served": true})).collect();
        json!({"metadata": {"annotations": annotations}, "spec": {"versions": versions}})
    }

    #[test]
    fn nothing_newer_and_nothing_of_others_is_replaced() {
        let ours = crd(Some("3"), &["v1", "v1beta1"]);
        assert_eq!(decide(&ours, None), Action::Create);
        assert_eq!(decide(&ours, Some(&crd(Some("2"), &[]))), Action::Update { from: 2 });
        for kept in [crd(Some("3"), &["v1"]), crd(Some("4"), &[]), crd(None, &["v2", "v1", "v1beta1"])] {
            assert!(matches!(decide(&ours, Some(&kept)), Action::Keep(_)), "{kept}");
        }
        let old = crd(None, &["v1beta1"]);
        assert!(matches!(decide(&ours, Some(&old)), Action::Blocked(why) if why.contains("serve v1")));
        // What can't be read is not ours.
        assert!(matches!(decide(&ours, Some(&crd(Some("x"), &["v1"]))), Action::Blocked(_)));
    }
}
