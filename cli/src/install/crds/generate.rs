//! Makes the chart's CRDs from the structure of upstream's (names and types of fields, limits, versions), and checks
//! them against the tables of fields that the mesh reads.
//!
//! `UPDATE_CRDS=FILE cargo test -p cli crds` writes them anew, where FILE is upstream's
//! `customresourcedefinitions.gen.yaml` of the Go module istio.io/api. What then differs gets a new [`VERSION`].
//!
//! Upstream's texts and expressions stay behind. Of our own:
//! * nothing in `spec` is pruned: a field that these CRDs don't know reaches the admission and the control plane, which
//!   refuse it with a suggestion, where it would otherwise vanish, and a restriction with it;
//! * the rules that need no more than the object ([`rules`]).

use std::fs;
use std::path::{Path, PathBuf};

use config::fields::Schema;
use config::resource::KINDS;
use serde_json::{Map, Value, json};

use super::{VERSION_ANNOTATION, ours, version, versions};
use crate::yaml;

/// The version of these CRDs; it rises with every change of them.
const VERSION: u64 = 1;

/// Keywords of a schema that are kept: its structure and its limits.
const KEPT: &[&str] = &[
    "type",
    "format",
    "enum",
    "required",
    "nullable",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert/crds")
}

/// The structure of a schema.
fn structure(schema: &Value, prune: bool) -> Value {
    let mut out = Map::new();
    for (key, value) in schema.as_object().unwrap() {
        match key.as_str() {
            "properties" => {
                let fields = value.as_object().unwrap();
                let fields: Map<_, _> =
                    fields.iter().map(|(name, field)| (name.clone(), structure(field, prune))).collect();
                out.insert(key.clone(), fields.into());
                if !prune {
                    out.insert("x-kubernetes-preserve-unknown-fields".to_owned(), json!(true));
                }
            }
            "items" | "additionalProperties" if value.is_object() => {
                out.insert(key.clone(), structure(value, prune));
            }
            key if KEPT.contains(&key) => {
                out.insert(key.to_owned(), value.clone());
            }
            _ => {}
        }
    }
    out.into()
}

/// What can be told of a kind's `spec` from the object alone. The rest is the admission's, which explains more.
fn rules(kind: &str, spec: &Value) -> Vec<Value> {
    let has = |field: &str| spec.pointer(&format!("/properties/{field}")).is_some();
    let targets: Vec<_> = ["selector", "targetRef", "targetRefs"].into_iter().filter(|f| has(f)).collect();
    let mut rules = Vec::new();
    if targets.len() > 1 {
        let sum: Vec<_> = targets.iter().map(|f| format!("(has(self.{f}) ? 1 : 0)")).collect();
        rules.push(json!({
            "rule": format!("{} <= 1", sum.join(" + ")),
            "message": format!("set only one of {}: each says alone what the object is for", targets.join(", ")),
        }));
    }
    match kind {
        "PeerAuthentication" => rules.push(json!({
            "rule": "!has(self.portLevelMtls) || has(self.selector)",
            "message": "portLevelMtls is for the ports of selected workloads: add a selector",
        })),
        "ServiceEntry" => rules.push(json!({
            "rule": "!has(self.workloadSelector) || !has(self.endpoints)",
            "message": "endpoints are either listed or selected: set only one of endpoints, workloadSelector",
        })),
        _ => {}
    }
    rules
}

/// The text of one CRD, with the schema once: upstream's versions have the same.
fn crd(upstream: &Value) -> String {
    let spec = &upstream["spec"];
    let names = &spec["names"];
    let name = upstream["metadata"]["name"].as_str().unwrap();
    let all = spec["versions"].as_array().unwrap();
    let mut schema = structure(&all[0]["schema"]["openAPIV3Schema"], true);
    let full = structure(&all[0]["schema"]["openAPIV3Schema"]["properties"]["spec"], false);
    let rules = rules(names["kind"].as_str().unwrap(), &full);
    schema["properties"]["spec"] = full;
    if !rules.is_empty() {
        schema["properties"]["spec"]["x-kubernetes-validations"] = rules.into();
    }
    // Required of every object; the API server fills them in.
    let head = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": name,
            "annotations": {VERSION_ANNOTATION: VERSION.to_string()},
            "labels": {"app.kubernetes.io/part-of": "culvert"},
        },
        "spec": {"group": spec["group"], "names": names, "scope": spec["scope"]},
    });
    let mut text = "# Made by cli/src/install/crds/generate.rs.\n".to_owned();
    text.push_str(&yaml::write(&head, 118));
    text.push_str("  versions:\n");
    for (index, version) in all.iter().enumerate() {
        let columns: Vec<Value> =
            version["additionalPrinterColumns"].as_array().into_iter().flatten().map(column).collect();
        let mut head = json!({"name": version["name"], "served": true, "storage": version["storage"]});
        head["subresources"] = json!({"status": {}});
        if !columns.is_empty() {
            head["additionalPrinterColumns"] = columns.into();
        }
        for (number, line) in yaml::write(&head, 112).lines().enumerate() {
            text.push_str(&format!("    {} {line}\n", if number == 0 { '-' } else { ' ' }));
        }
        if index == 0 {
            text.push_str("      schema: &schema\n");
            for line in yaml::write(&json!({"openAPIV3Schema": schema}), 106).lines() {
                text.push_str(&format!("        {line}\n"));
            }
        } else {
            let same = structure(&version["schema"]["openAPIV3Schema"], true);
            assert_eq!(
                same,
                structure(&all[0]["schema"]["openAPIV3Schema"], true),
                "{name}: versions differ"
            );
            text.push_str("      schema: *schema\n");
        }
    }
    text
}

fn column(upstream: &Value) -> Value {
    let map = upstream.as_object().unwrap();
    map.iter()
        .filter(|(key, _)| *key != "description")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect::<Map<_, _>>()
        .into()
}

#[test]
fn crds_are_made_anew_when_asked_for() {
    let Some(file) = std::env::var_os("UPDATE_CRDS") else { return };
    for upstream in yaml::read(&fs::read_to_string(file).unwrap()).unwrap() {
        let name = upstream["metadata"]["name"].as_str().unwrap();
        fs::write(directory().join(format!("{name}.yaml")), crd(&upstream)).unwrap();
    }
}

/// The properties below a schema, of its items where it is a list.
fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    let schema = schema.get("items").or(schema.get("additionalProperties")).unwrap_or(schema);
    schema.get("properties")?.as_object()
}

fn compare(path: &str, table: &Schema, schema: &Value, missing: &mut Vec<String>) {
    let Some(fields) = properties(schema) else { return };
    for field in table.fields {
        let path = format!("{path}.{}", field.name);
        match (fields.get(field.name), field.nested) {
            (None, _) => missing.push(path),
            (Some(below), Some(nested)) => compare(&path, nested, below, missing),
            (Some(_), None) => {}
        }
    }
    for name in fields.keys().filter(|name| !table.fields.iter().any(|f| f.name == *name)) {
        missing.push(format!("{path}.{name} is not in the mesh's table"));
    }
}

#[test]
fn every_field_that_the_mesh_reads_is_in_its_crd_and_the_other_way_round() {
    let crds = ours().unwrap();
    let mut compared = 0;
    let mut differences = Vec::new();
    for kind in KINDS.iter().filter(|k| ["security.istio.io", "networking.istio.io"].contains(&k.group)) {
        let of_kind =
            |crd: &&Value| crd["spec"]["names"]["kind"] == kind.name && crd["spec"]["group"] == kind.group;
        let crd = crds.iter().find(of_kind).unwrap_or_else(|| panic!("no CRD of {}", kind.name));
        for wanted in kind.versions {
            assert!(versions(crd).iter().any(|v| v == wanted), "{} {wanted}", kind.name);
        }
        let table = kind.schema.fields.iter().find(|f| f.name == "spec").unwrap().nested.unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        compare(kind.name, table, schema, &mut differences);
        compared += 1;
    }
    assert_eq!(compared, 5);
    assert_eq!(differences, [""; 0]);
}

#[test]
fn crds_hold_no_texts_prune_nothing_and_are_of_one_version() {
    let all = ours().unwrap();
    assert_eq!(all.len(), 15);
    for crd in all {
        let name = crd["metadata"]["name"].as_str().unwrap();
        assert_eq!(version(&crd), Some(VERSION), "{name}");
        assert!(directory().join(format!("{name}.yaml")).is_file(), "{name}");
        let stored = crd["spec"]["versions"].as_array().unwrap().iter().filter(|v| v["storage"] == true);
        assert_eq!(stored.count(), 1, "{name}");
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        check(name, spec);
    }
}

fn check(path: &str, schema: &Value) {
    let Some(map) = schema.as_object() else { return };
    assert!(!map.contains_key("description"), "{path}");
    assert!(
        !map.contains_key("properties") || map["x-kubernetes-preserve-unknown-fields"] == true,
        "{path} is pruned"
    );
    for (name, below) in properties(schema).into_iter().flatten() {
        check(&format!("{path}.{name}"), below);
    }
}
