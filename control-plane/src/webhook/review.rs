//! The review of one object (`admission.k8s.io/v1 AdmissionReview`).

use std::sync::Arc;

use config::compile::{Options, Origin};
use config::diagnostic::{Code, Diagnostic, Severity};
use config::json::{Decoded, ObjectSeed};
use config::kinds::foreign::refused;
use config::policy::MeshConfig;
use config::repository::{ObjectContent, Repository};
use config::resource::{KINDS, KindSpec};
use config::tree::{Entry, Node, Position, Value as Tree};
use serde::Deserialize;
use serde::de::DeserializeSeed;
use serde_json::{Value, json};

/// As the API server cuts them (KEP-1693).
const MOST_WARNINGS: usize = 16;
const WARNING_CHARACTERS: usize = 250;
const MESSAGE_CHARACTERS: usize = 4000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    request: Option<Asked>,
}

/// What is asked.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Asked {
    pub(super) uid: String,
    pub(super) kind: Type,
    #[serde(default)]
    pub(super) operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    pub(super) object: Value,
    #[serde(default)]
    old_object: Value,
}

#[derive(Deserialize)]
pub(super) struct Type {
    #[serde(default)]
    pub(super) group: String,
    pub(super) kind: String,
}

/// Reads a request.
pub(super) fn read(body: &[u8]) -> Result<Asked, String> {
    let review: Review = serde_json::from_slice(body).map_err(|e| format!("no AdmissionReview: {e}"))?;
    if review.api_version != "admission.k8s.io/v1" {
        return Err(format!(
            "AdmissionReview is read in version admission.k8s.io/v1, not {}",
            review.api_version
        ));
    }
    review.request.ok_or_else(|| "an AdmissionReview without a request".to_owned())
}

/// An answer as it is sent.
pub(super) fn written(response: &serde_json::Map<String, Value>) -> Result<Vec<u8>, String> {
    let review =
        json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response });
    serde_json::to_vec(&review).map_err(|e| e.to_string())
}

/// An answer.
#[derive(Debug)]
pub struct Reviewed {
    /// The AdmissionReview.
    pub body: Vec<u8>,
    /// Whether the object is admitted.
    pub allowed: bool,
    /// Its kind, as far as it is one that is read.
    pub kind: &'static str,
}

/// What is said of an object.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdict {
    errors: Vec<String>,
    warnings: Vec<String>,
}

/// Answers a request, by the settings in force (`None`: the defaults).
///
/// # Errors
/// It is no AdmissionReview.
pub fn answer(body: &[u8], options: &Options, settings: Option<&MeshConfig>) -> Result<Reviewed, String> {
    let asked = read(body)?;
    let spec = KINDS.iter().copied().find(|s| s.group == asked.kind.group && s.name == asked.kind.kind);
    let mut verdict = match spec {
        // What is deleted, or about to be, was let in once; it must be able to go.
        _ if !matches!(asked.operation.as_str(), "CREATE" | "UPDATE") || is_going(&asked.object) => {
            Verdict::default()
        }
        Some(spec) => look(spec, &asked.object, &asked.namespace, options, settings)?,
        None => match refused(&asked.kind.group, &asked.kind.kind) {
            Some(remedy) => {
                Verdict { errors: vec![format!("{}: {remedy}", asked.kind.kind)], ..Verdict::default() }
            }
            None => Verdict {
                warnings: vec![format!("{} is not acted on by this version of the mesh", asked.kind.kind)],
                ..Verdict::default()
            },
        },
    };
    // An object that is no worse than it was may change in what has no errors, such as its labels.
    if let (Some(spec), false, "UPDATE") = (spec, verdict.errors.is_empty(), asked.operation.as_str())
        && let Ok(old) = look(spec, &asked.old_object, &asked.namespace, options, settings)
        && verdict.errors.iter().all(|error| old.errors.contains(error))
    {
        let still = verdict.errors.drain(..).map(|error| format!("as before the change: {error}"));
        verdict.warnings.splice(0..0, still.collect::<Vec<_>>());
    }
    let kind = spec.map_or("other", |spec| spec.name);
    let allowed = verdict.errors.is_empty();
    let mut response = serde_json::Map::new();
    response.insert("uid".to_owned(), json!(asked.uid));
    response.insert("allowed".to_owned(), json!(allowed));
    if !allowed {
        let message: String = verdict.errors.join("; ").chars().take(MESSAGE_CHARACTERS).collect();
        let status = json!({ "status": "Failure", "code": 422, "reason": "Invalid", "message": message });
        response.insert("status".to_owned(), status);
    }
    if !verdict.warnings.is_empty() {
        let warnings: Value =
            verdict.warnings.iter().flat_map(|text| lines(text)).take(MOST_WARNINGS).collect();
        response.insert("warnings".to_owned(), warnings);
    }
    Ok(Reviewed { body: written(&response)?, allowed, kind })
}

/// A warning in pieces that the API server passes on whole: it ends in the remedy, which nobody would see otherwise.
fn lines(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let word: String = word.chars().take(WARNING_CHARACTERS).collect();
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(&word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= WARNING_CHARACTERS => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

fn is_going(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null())
}

/// Reads an object as the registry would, if there were no other.
fn look(
    spec: &KindSpec,
    object: &Value,
    namespace: &str,
    options: &Options,
    settings: Option<&MeshConfig>,
) -> Result<Verdict, String> {
    let seed = ObjectSeed { kind: spec.kind, unknown: &|_, _| () };
    let mut decoded = seed.deserialize(object).map_err(|e| format!("the object can't be read: {e}"))?;
    name(&mut decoded, spec, namespace);
    let mut repository = Repository::new(Options { origin: Origin::Cluster, ..options.clone() });
    settings.into_iter().for_each(|settings| repository.stage_settings(settings));
    let origin: Arc<str> = "object".into();
    let content = ObjectContent::Node { node: &decoded.node, version: "1", text: "" };
    repository.stage_object(&origin, content);
    repository.commit();
    let mut verdict = Verdict::default();
    for diagnostic in repository.about(&origin) {
        // What follows from errors is not one more.
        if matches!(diagnostic.code, Code::FailsClosed | Code::LastGoodVersion) {
            continue;
        }
        match diagnostic.severity {
            Severity::Error => verdict.errors.push(text(&diagnostic)),
            Severity::Warning => verdict.warnings.push(text(&diagnostic)),
            Severity::Info => {}
        }
    }
    Ok(verdict)
}

/// What the server fills in only after it asked: a name by `generateName`, and the namespace.
fn name(decoded: &mut Decoded, spec: &KindSpec, namespace: &str) {
    let missing = |field: &str| decoded.metadata(field).is_empty();
    let (no_name, no_namespace) = (missing("name"), missing("namespace"));
    let Tree::Mapping(entries) = &mut decoded.node.value else { return };
    let Some(Tree::Mapping(metadata)) =
        entries.iter_mut().find(|e| e.key == "metadata").map(|e| &mut e.value.value)
    else {
        return;
    };
    let mut set = |key: &'static str, value: &str| {
        let position = Position { line: 0, column: 0 };
        metadata.retain(|entry| entry.key != key);
        let value = Node { value: Tree::String(value.to_owned().into()), position };
        metadata.push(Entry { key: key.into(), position, value });
    };
    if no_name {
        set("name", "generated");
    }
    if no_namespace && spec.namespaced && !namespace.is_empty() {
        set("namespace", namespace);
    }
}

fn text(diagnostic: &Diagnostic) -> String {
    let field = if diagnostic.field.is_empty() || diagnostic.message.contains(&diagnostic.field) {
        String::new()
    } else {
        format!("{}: ", diagnostic.field)
    };
    let remedy =
        if diagnostic.remedy.is_empty() { String::new() } else { format!(" ({})", diagnostic.remedy) };
    format!("{field}{}{remedy} [{}]", diagnostic.message, diagnostic.code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_of_a_warning_is_lost() {
        let text = format!("{} correct it [code] {}", "word ".repeat(120).trim_end(), "x".repeat(400));
        let lines = lines(&text);
        assert!(lines.iter().all(|line| line.chars().count() <= WARNING_CHARACTERS), "{lines:?}");
        assert!(lines.join(" ").starts_with(&text[..620]) && lines.len() == 4, "{lines:?}");
        assert_eq!(super::lines("short (do this) [code]"), ["short (do this) [code]"]);
    }
}
