//! The CRDs that the chart brings, and when one takes the place of one that is installed.
//!
//! The rule: what is newer, or not ours, is never replaced. A CRD of ours says in an annotation which version it is. One
//! without it is Istio's (or another mesh's): it stays, and the installation stops, if it does not serve the versions
//! that we read, or if it is of security.istio.io and too old for a field that is enforced: the API server drops what is
//! written in fields that its CRD does not have, and a restriction with it.

use anyhow::{Context, Result};
use config::fields::{Disposition, Schema};
use config::resource::KINDS;
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
            if !missing.is_empty() {
                let missing = missing.join(", ");
                return Action::Blocked(format!("it is another mesh's, and does not serve {missing}"));
            }
            let dropped = dropped(ours, installed);
            if dropped.is_empty() {
                return Action::Keep(
                    "it is another mesh's, and serves the versions that are read".to_owned(),
                );
            }
            let why = format!(
                "it is another mesh's, and too old: the API server drops what is written in {}",
                dropped.join(", ")
            );
            if text(ours, "/spec/group") == "security.istio.io" {
                Action::Blocked(why)
            } else {
                Action::Keep(why)
            }
        }
    }
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The fields that the mesh acts on, or refuses, and that an API server with the CRD `installed` would drop.
fn dropped(ours: &Value, installed: &Value) -> Vec<String> {
    let (group, kind) = (text(ours, "/spec/group"), text(ours, "/spec/names/kind"));
    let Some(table) = KINDS.iter().find(|k| k.group == group && k.name == kind) else { return Vec::new() };
    let spec = table.schema.fields.iter().find(|f| f.name == "spec").and_then(|f| f.nested);
    let mut found = Vec::new();
    let wanted = versions(ours);
    for version in installed.pointer("/spec/versions").and_then(Value::as_array).into_iter().flatten() {
        let schema = version.pointer("/schema/openAPIV3Schema/properties/spec");
        if let (Some(spec), Some(schema), true) =
            (spec, schema, wanted.iter().any(|name| name == text(version, "/name")))
        {
            without(spec, schema, "spec", &mut found);
        }
    }
    found.sort();
    found.dedup();
    found
}

fn without(table: &Schema, schema: &Value, path: &str, found: &mut Vec<String>) {
    let below = |name| schema.get(name).filter(|below: &&Value| below.is_object());
    let schema = below("items").or(below("additionalProperties")).unwrap_or(schema);
    if schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true)) {
        return;
    }
    let matters = |d: Disposition| matches!(d, Disposition::Enforced | Disposition::Refused { .. });
    for field in table.fields.iter().filter(|field| matters(field.disposition)) {
        let path = format!("{path}.{}", field.name);
        match (schema.get("properties").and_then(|fields| fields.get(field.name)), field.nested) {
            (None, _) => found.push(path),
            (Some(below), Some(nested)) => without(nested, below, &path, found),
            (Some(_), None) => {}
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

    /// The definition of a plural name, as another mesh has it that does not know one field.
    fn foreign(plural: &str, unknown: &str) -> (Value, Value) {
        let all = super::ours().unwrap();
        let ours = all.into_iter().find(|crd| crd["spec"]["names"]["plural"] == plural).unwrap();
        let mut theirs = ours.clone();
        theirs["metadata"]["annotations"] = json!({});
        fn prune(schema: &mut Value, unknown: &str) {
            match schema {
                Value::Object(map) => {
                    map.remove("x-kubernetes-preserve-unknown-fields");
                    map.remove(unknown);
                    map.values_mut().for_each(|below| prune(below, unknown));
                }
                Value::Array(all) => all.iter_mut().for_each(|below| prune(below, unknown)),
                _ => {}
            }
        }
        prune(&mut theirs["spec"]["versions"], unknown);
        (ours, theirs)
    }

    #[test]
    fn a_definition_that_is_too_old_for_a_restriction_stops_the_installation() {
        let (ours, theirs) = foreign("authorizationpolicies", "serviceAccounts");
        let Action::Blocked(why) = decide(&ours, Some(&theirs)) else { panic!("it is taken") };
        assert!(why.contains("drops what is written in spec.rules.from.source.serviceAccounts"), "{why}");
        let (ours, theirs) = foreign("authorizationpolicies", "nothing");
        assert!(matches!(decide(&ours, Some(&theirs)), Action::Keep(_)), "complete, and pruned");
        let (ours, theirs) = foreign("serviceentries", "exportTo");
        assert!(
            !matches!(decide(&ours, Some(&theirs)), Action::Blocked(_)),
            "what is lost there restricts nobody's rights"
        );
    }
}
