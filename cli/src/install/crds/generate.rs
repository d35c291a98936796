//! Makes the chart's CRDs from the structure of upstream's (names and types of fields, limits, versions), and checks
//! them against the tables of fields that the mesh reads.
//!
//! `UPDATE_CRDS=FILE cargo test -p cli crds` writes them anew, where FILE is upstream's
//! `customresourcedefinitions.gen.yaml` of the Go module istio.io/api. What then differs gets a new [`VERSION`]. Those of our own
//! kinds are made of the tables alone, with the words and limits that the parsers read by ([`Form`]).
//!
//! Upstream's texts stay behind; its rules (CEL) are kept, with words of our own ([`SAID`]). Of our own:
//! * nothing in `spec` is pruned: a field that these CRDs don't know reaches the admission and the control plane, which
//!   refuse it with a suggestion, where it would otherwise vanish, and a restriction with it;
//! * further rules that need no more than the object ([`rules`]).

use std::fs;
use std::path::{Path, PathBuf};

use config::fields::{Field, Schema};
use config::form::Form;
use config::resource::{KINDS, KindSpec};
use serde_json::{Map, Value, json};

use super::{VERSION_ANNOTATION, ours, version, versions};
use crate::yaml;

/// The version of these CRDs; it rises with every change of them.
const VERSION: u64 = 2;

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

/// What is said where one of upstream's rules, known by what upstream says, is broken.
const SAID: &[(&str, &str)] = &[
    ("only one of targetRefs or selector can be set", TARGETS),
    ("only one of targetRefs or workloadSelector can be set", TARGETS),
    ("exactly one of wasm or lua must be set", "set wasm or lua, and not both"),
    ("wildcard not allowed in label key match", "the name of a label is written out: * is no part of one"),
    ("key must not be empty", "a label has a name"),
    ("wildcard not allowed in label value match", LABEL_VALUE),
    ("wildcard is not supported in selector", LABEL_VALUE),
    (
        "cross namespace referencing is not currently supported",
        "what a policy is for is in its own namespace: leave the namespace out",
    ),
    ("url must have schema one of [http, https, file, oci]", URL),
    ("url must have schema one of [http, https, oci, file]", URL),
    ("url must have scheme http:// or https://", "write a URL that begins with http:// or https://"),
    (
        "value may only be set when valueFrom is INLINE",
        "a variable has a value, or the host's (valueFrom: HOST)",
    ),
    ("value must be set when operation is UPSERT", "UPSERT needs the value to set"),
    ("value must not be set when operation is REMOVE", "REMOVE takes no value"),
    ("must be a valid duration greater than 1ms", "write a time of at least 1ms, such as 1.5s"),
    (
        "only support waypointMatch when context is WAYPOINT",
        "match.waypoint goes with the context WAYPOINT only",
    ),
    ("port must be between 1-65535", "a port is a number from 1 to 65535"),
    ("only one of credentialNames or tlsCertificates can be set", CREDENTIALS),
    ("only one of credentialName or credentialNames can be set", CREDENTIALS),
    ("only one of credentialName or tlsCertificates can be set", CREDENTIALS),
    (
        "only one of WorkloadSelector or Endpoints can be set",
        "endpoints are either listed or selected: set only one of endpoints, workloadSelector",
    ),
    (
        "CIDR addresses are allowed only for NONE/STATIC resolution types",
        "a range of addresses goes with the resolutions NONE and STATIC only",
    ),
    (
        "NONE mode cannot set endpoints",
        "endpoints need a resolution: NONE, the default, goes to the address dialled",
    ),
    ("DNS_ROUND_ROBIN mode cannot have multiple endpoints", "DNS_ROUND_ROBIN takes one endpoint"),
    ("Address is required", "an endpoint has an address, or a network whose gateway is dialled"),
    ("UDS may not include ports", "a Unix socket has no ports"),
    ("UDS must be an absolute path or abstract socket", "a Unix socket is unix:///PATH or unix://@NAME"),
    ("UDS may not be a dir", "a Unix socket is no directory"),
    ("port name must be valid", "a port's name has letters, digits and -, and fewer than 63"),
    ("hostname cannot be wildcard", "a host has a name: * alone would be all there are"),
    ("port number cannot be duplicated", "each port is listed once"),
    ("scheme must be one of [HTTP, HTTPS]", "a probe's scheme is HTTP or HTTPS"),
    (
        "Cannot set serviceAccounts with namespaces or principals",
        "serviceAccounts say the namespace: set them without principals and namespaces",
    ),
    (
        "only one of jwks or jwksUri can be set",
        "keys are either written out or fetched: set only one of jwks, jwksUri",
    ),
    (
        "portLevelMtls requires selector",
        "portLevelMtls is for the ports of selected workloads: add a selector",
    ),
];

const TARGETS: &str = "say in one way what it is for: set only one of its selector, targetRef and targetRefs";
const LABEL_VALUE: &str = "the value of a label is written out: * is no part of one";
const URL: &str = "write a URL that begins with http://, https://, file:// or oci://";
const CREDENTIALS: &str = "set only one of credentialName, credentialNames, tlsCertificates";

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
            "x-kubernetes-validations" => {
                let rules = value.as_array().unwrap().iter().map(in_our_words);
                out.insert(key.clone(), rules.collect());
            }
            key if KEPT.contains(&key) => {
                out.insert(key.to_owned(), value.clone());
            }
            _ => {}
        }
    }
    out.into()
}

fn in_our_words(rule: &Value) -> Value {
    let theirs = rule["message"].as_str().unwrap();
    let said = SAID.iter().find(|(known, _)| *known == theirs);
    let (_, ours) = said.unwrap_or_else(|| panic!("a new rule of upstream's: {rule}"));
    let expression = rule["rule"].as_str().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    json!({"rule": expression, "message": ours})
}

/// What else can be told of a kind's `spec` from the object alone. The rest is the admission's, which explains more.
fn rules(kind: &str) -> Vec<Value> {
    match kind {
        "AuthorizationPolicy" => vec![json!({
            "rule": "((has(self.action) ? self.action : 'ALLOW') == 'CUSTOM') == has(self.provider)",
            "message": "the action CUSTOM needs a provider that decides, and no other action has one",
        })],
        _ => Vec::new(),
    }
}

/// The text of one CRD, with the schema once: upstream's versions have the same.
fn crd(upstream: &Value) -> String {
    let spec = &upstream["spec"];
    let names = &spec["names"];
    let name = upstream["metadata"]["name"].as_str().unwrap();
    let all = spec["versions"].as_array().unwrap();
    let mut schema = structure(&all[0]["schema"]["openAPIV3Schema"], true);
    let full = structure(&all[0]["schema"]["openAPIV3Schema"]["properties"]["spec"], false);
    schema["properties"]["spec"] = full;
    let rules = rules(names["kind"].as_str().unwrap());
    if !rules.is_empty() {
        let all = &mut schema["properties"]["spec"]["x-kubernetes-validations"];
        all.as_array_mut().unwrap().extend(rules);
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

/// The rules that the objects of our own kinds keep, by the name of the mapping's table.
const OWN_RULES: &[(&str, &str, &str)] = &[
    (
        "RateLimit.spec",
        "say what it is for, in one way: set one of targetRef and targetRefs",
        "has(self.targetRef) != has(self.targetRefs)",
    ),
    (
        "RateLimit.spec.limits[]",
        "a limit is counted either by each waypoint or by a service: set one of local and global",
        "has(self.local) != has(self.global)",
    ),
];

/// What is said of a mapping, by its table.
fn of_table(table: &Schema) -> Value {
    let fields: Map<String, Value> =
        table.fields.iter().map(|field| (field.name.to_owned(), of_field(table, field))).collect();
    let mut schema = json!({
        "type": "object", "properties": fields, "x-kubernetes-preserve-unknown-fields": true,
    });
    let required: Vec<_> = table.fields.iter().filter(|f| f.is_required).map(|f| f.name).collect();
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    let rules = OWN_RULES.iter().filter(|(of, ..)| *of == table.name);
    let rules: Vec<_> = rules.map(|(_, message, rule)| json!({"message": message, "rule": rule})).collect();
    if !rules.is_empty() {
        schema["x-kubernetes-validations"] = rules.into();
    }
    schema
}

fn of_field(table: &Schema, field: &Field) -> Value {
    let text = |rule: &str, message: &str| json!({"type": "string", "x-kubernetes-validations": [{"message": message, "rule": rule}]});
    let one = match (field.nested, field.form) {
        (Some(nested), _) => of_table(nested),
        (None, Some(Form::Text)) => json!({"type": "string", "minLength": 1}),
        (None, Some(Form::UpTo(most))) => json!({"type": "string", "maxLength": most}),
        (None, Some(Form::Name(most))) => json!({"type": "string", "minLength": 1, "maxLength": most}),
        (None, Some(Form::Empty(message))) => text("self.size() == 0", message),
        (None, Some(Form::Words(words))) => json!({"type": "string", "enum": words}),
        (None, Some(Form::Count(most))) => json!({"type": "integer", "minimum": 1, "maximum": most}),
        (None, Some(Form::Flag)) => json!({"type": "boolean"}),
        (None, Some(Form::Time)) => {
            text("duration(self) >= duration('1ms')", "write a time of at least 1ms, such as 1.5s")
        }
        (None, None) => panic!("{}.{} has no form", table.name, field.name),
    };
    let Some((least, most)) = field.items else { return one };
    let mut list = json!({"type": "array", "items": one, "maxItems": most});
    if least > 0 {
        list["minItems"] = json!(least);
    }
    list
}

/// The text of the definition of a kind of our own.
fn own_crd(kind: &KindSpec) -> String {
    let table = kind.schema.fields.iter().find(|f| f.name == "spec").unwrap().nested.unwrap();
    let condition = json!({"type": "object", "properties": {
        "lastProbeTime": {"format": "date-time", "type": "string"},
        "lastTransitionTime": {"format": "date-time", "type": "string"},
        "message": {"type": "string"},
        "observedGeneration": {"x-kubernetes-int-or-string": true},
        "reason": {"type": "string"},
        "status": {"type": "string"},
        "type": {"type": "string"},
    }});
    let status = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
        "conditions": {"type": "array", "items": condition},
        "observedGeneration": {"x-kubernetes-int-or-string": true},
    }});
    let schema = json!({"type": "object", "properties": {"spec": of_table(table), "status": status}});
    let versions = kind.versions.iter().enumerate().map(|(index, version)| {
        json!({
            "name": version, "served": true, "storage": index == 0, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": schema},
        })
    });
    let singular = kind.name.to_lowercase();
    let plural = format!("{singular}s");
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{}", kind.group),
            "annotations": {VERSION_ANNOTATION: VERSION.to_string()},
            "labels": {"app.kubernetes.io/part-of": "culvert"},
        },
        "spec": {
            "group": kind.group,
            "names": {
                "categories": ["culvert"], "kind": kind.name, "listKind": format!("{}List", kind.name),
                "plural": plural, "singular": singular,
            },
            "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
            "versions": versions.collect::<Vec<_>>(),
        },
    });
    format!("# Made by cli/src/install/crds/generate.rs.\n{}", yaml::write(&crd, 118))
}

/// `UPDATE_CRDS=own cargo test -p cli crds` writes them anew.
#[test]
fn the_definitions_of_our_own_kinds_are_made_of_their_tables() {
    let own: Vec<_> = KINDS.iter().filter(|kind| kind.group == "culvert.dev").collect();
    assert!(!own.is_empty());
    for kind in own {
        let file = directory().join(format!("{}s.{}.yaml", kind.name.to_lowercase(), kind.group));
        let text = own_crd(kind);
        if std::env::var_os("UPDATE_CRDS").is_some_and(|what| what == "own") {
            fs::write(&file, &text).unwrap();
        }
        let there = fs::read_to_string(&file).unwrap_or_default();
        assert!(there == text, "{} is not in step: UPDATE_CRDS=own writes it anew", file.display());
    }
}

#[test]
fn crds_are_made_anew_when_asked_for() {
    let Some(file) = std::env::var_os("UPDATE_CRDS").filter(|file| file != "own") else { return };
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
    let groups = ["security.istio.io", "networking.istio.io", "telemetry.istio.io", "culvert.dev"];
    for kind in KINDS.iter().filter(|k| groups.contains(&k.group)) {
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
    assert_eq!(compared, 10);
    assert_eq!(differences, [""; 0]);
}

#[test]
fn crds_hold_no_texts_prune_nothing_and_are_of_one_version() {
    let all = ours().unwrap();
    assert_eq!(all.len(), 16);
    for crd in all {
        let name = crd["metadata"]["name"].as_str().unwrap();
        assert_eq!(version(&crd), Some(VERSION), "{name}");
        assert!(directory().join(format!("{name}.yaml")).is_file(), "{name}");
        let stored = crd["spec"]["versions"].as_array().unwrap().iter().filter(|v| v["storage"] == true);
        assert_eq!(stored.count(), 1, "{name}");
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        check(name, spec);
        assert!(spec.to_string().contains("x-kubernetes-validations"), "{name} has no rules");
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
