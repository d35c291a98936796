//! `culvert schema`: JSON schemas of the kinds that the mesh reads, for editors and for kubeconform. The names of fields
//! and what the mesh does with each are `config`'s own tables; the types are those of the chart's definitions.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use config::fields::{Disposition, Field, Schema};
use config::resource::{KINDS, KindSpec};
use serde_json::{Map, Value, json};

use crate::install::crds;
use crate::table::print;

/// JSON schemas of the kinds that the mesh reads, for editors and kubeconform
#[derive(Args, Debug)]
pub struct SchemaArgs {
    /// The kind; without one, --out writes those of all kinds
    kind: Option<String>,
    /// Write files below this directory, as kubeconform looks for them:
    /// -schema-location 'DIR/{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json'
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &SchemaArgs) -> Result<ExitCode> {
    let wanted =
        |spec: &&&KindSpec| args.kind.as_ref().is_none_or(|kind| spec.name.eq_ignore_ascii_case(kind));
    let specs: Vec<_> = KINDS.iter().filter(wanted).collect();
    if specs.is_empty() {
        let names: Vec<_> = KINDS.iter().map(|spec| spec.name).collect();
        bail!("no such kind is read; there are {}", names.join(", "));
    }
    let definitions = crds::ours()?;
    let Some(directory) = &args.out else {
        let [spec] = specs.as_slice() else { bail!("name one kind, or a directory with --out for all") };
        print(&format!("{}\n", serde_json::to_string_pretty(&schema(spec, &definitions))?))?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut written = 0;
    for spec in specs {
        let text = serde_json::to_string_pretty(&schema(spec, &definitions))?;
        let group = directory.join(if spec.group.is_empty() { "core" } else { spec.group });
        for version in spec.versions {
            let file = group.join(format!("{}_{version}.json", spec.name.to_lowercase()));
            let write = || fs::create_dir_all(&group).and_then(|()| fs::write(&file, format!("{text}\n")));
            write().with_context(|| format!("cannot write {}", file.display()))?;
            written += 1;
        }
    }
    print(&format!("wrote {written} schemas below {}\n", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The schema of a kind, in JSON Schema draft 7.
fn schema(spec: &KindSpec, definitions: &[Value]) -> Value {
    let of_kind = |crd: &&Value| {
        crd.pointer("/spec/names/kind").and_then(Value::as_str) == Some(spec.name)
            && crd.pointer("/spec/group").and_then(Value::as_str) == Some(spec.group)
    };
    let types = definitions.iter().find(of_kind);
    let types = types.and_then(|crd| crd.pointer("/spec/versions/0/schema/openAPIV3Schema"));
    let mut root = object(spec.schema, types);
    if let Some(map) = root.as_object_mut() {
        let versions: Vec<_> = spec
            .versions
            .iter()
            .map(|v| if spec.group.is_empty() { (*v).to_owned() } else { format!("{}/{v}", spec.group) })
            .collect();
        map.insert("$schema".to_owned(), json!("http://json-schema.org/draft-07/schema#"));
        map.insert("title".to_owned(), json!(spec.name));
        map.insert("required".to_owned(), json!(["apiVersion", "kind", "metadata"]));
        if let Some(Value::Object(fields)) = map.get_mut("properties") {
            fields.insert("kind".to_owned(), json!({"const": spec.name}));
            fields.insert("apiVersion".to_owned(), json!({"enum": versions}));
            // The server's.
            fields.entry("status").or_insert_with(|| json!({"type": "object"}));
        }
    }
    root
}

/// A mapping by its table of fields, and the types of a definition where there is one.
fn object(table: &Schema, types: Option<&Value>) -> Value {
    let of = |name: &str| types.and_then(|t| t.get("properties")).and_then(|p| p.get(name));
    let fields: Map<String, Value> =
        table.fields.iter().map(|field| (field.name.to_owned(), value(field, of(field.name)))).collect();
    let mut schema = json!({"type": "object", "properties": fields, "additionalProperties": false});
    if let (Some(required), Some(map)) = (types.and_then(|t| t.get("required")), schema.as_object_mut()) {
        map.insert("required".to_owned(), required.clone());
    }
    schema
}

fn value(field: &Field, types: Option<&Value>) -> Value {
    let mut schema = match (field.nested, types) {
        (Some(nested), Some(types)) => match types.get("items") {
            Some(items) => json!({"type": "array", "items": object(nested, Some(items))}),
            None => match types.get("additionalProperties").filter(|t| t.is_object()) {
                Some(values) => {
                    json!({"type": "object", "additionalProperties": object(nested, Some(values))})
                }
                None => object(nested, Some(types)),
            },
        },
        // A table does not say whether it is of a mapping or of a list's items.
        (Some(nested), None) => {
            let one = object(nested, None);
            json!({"anyOf": [one, {"type": "array", "items": one}]})
        }
        (None, Some(types)) => draft7(types),
        (None, None) => json!({}),
    };
    let said = match field.disposition {
        Disposition::Enforced => None,
        Disposition::NotApplicable(reason) | Disposition::Silent(reason) => {
            Some(format!("No effect: {reason}."))
        }
        Disposition::Refused { reason, remedy } => Some(format!("Refused: {reason}; {remedy}.")),
    };
    if let (Some(said), Some(map)) = (said, schema.as_object_mut()) {
        map.insert("description".to_owned(), said.into());
    }
    if let (Disposition::Refused { .. }, Some(map)) = (field.disposition, schema.as_object_mut()) {
        map.insert("not".to_owned(), json!({}));
    }
    schema
}

/// A schema of Kubernetes in the words of draft 7.
fn draft7(types: &Value) -> Value {
    let Some(map) = types.as_object() else { return types.clone() };
    let mut out = Map::new();
    for (key, value) in map {
        match key.as_str() {
            "properties" => {
                let fields = value.as_object().into_iter().flatten();
                let fields: Map<_, _> = fields.map(|(name, field)| (name.clone(), draft7(field))).collect();
                out.insert(key.clone(), fields.into());
                out.insert("additionalProperties".to_owned(), json!(false));
            }
            "items" | "additionalProperties" => {
                out.insert(key.clone(), draft7(value));
            }
            "x-kubernetes-int-or-string" => {
                out.insert("type".to_owned(), json!(["integer", "string"]));
            }
            // Not a JSON schema's, or of no use without the server.
            "nullable" | "format" => {}
            key if key.starts_with("x-kubernetes-") => {}
            key => {
                out.insert(key.to_owned(), value.clone());
            }
        }
    }
    if let (Some(Value::Bool(true)), Some(kind)) = (map.get("nullable"), out.get("type").cloned()) {
        out.insert("type".to_owned(), json!([kind, "null"]));
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str) -> Value {
        let spec = KINDS.iter().find(|s| s.name == name).unwrap();
        schema(spec, &crds::ours().unwrap())
    }

    #[test]
    fn fields_have_names_types_and_what_is_done_with_them() {
        let policy = of("AuthorizationPolicy");
        assert_eq!(policy["properties"]["apiVersion"]["enum"][0], "security.istio.io/v1");
        let spec = &policy["properties"]["spec"];
        assert_eq!(spec["additionalProperties"], false);
        let source =
            &spec["properties"]["rules"]["items"]["properties"]["from"]["items"]["properties"]["source"];
        assert_eq!(source["properties"]["principals"]["items"]["type"], "string");
        let peers = of("PeerAuthentication");
        let modes = &peers["properties"]["spec"]["properties"]["portLevelMtls"]["additionalProperties"];
        assert!(modes["properties"]["mode"]["enum"].is_array(), "{modes}");
        let text = serde_json::to_string(&of("Pod")).unwrap();
        assert!(text.contains("No effect:"), "{text}");
    }

    #[test]
    fn every_kind_has_one() {
        for spec in KINDS {
            assert_eq!(of(spec.name)["title"], spec.name);
        }
    }
}
