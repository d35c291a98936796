//! Diagnostics in the Static Analysis Results Interchange Format, 2.1.0 (OASIS): what code hosts show beside lines.

use config::diagnostic::{Code, Diagnostic, Severity};
use serde_json::{Value, json};

fn level(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Info => "note",
    }
}

/// The whole document. Every code is a rule, whether it was found or not.
pub fn document(found: &[Diagnostic]) -> Value {
    let rules: Vec<Value> = Code::ALL
        .iter()
        .map(|code| {
            json!({
                "id": code.as_str(),
                "shortDescription": { "text": code.explanation() },
                "defaultConfiguration": { "level": level(code.severity()) },
            })
        })
        .collect();
    json!({
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": { "name": "culvert", "version": env!("CARGO_PKG_VERSION"), "rules": rules } },
            "columnKind": "unicodeCodePoints",
            "results": found.iter().map(result).collect::<Vec<_>>(),
        }],
    })
}

fn result(diagnostic: &Diagnostic) -> Value {
    let mut text = diagnostic.message.clone();
    if !diagnostic.remedy.is_empty() {
        text = format!("{text}; {}", diagnostic.remedy);
    }
    if let Some(resource) = &diagnostic.resource {
        text = format!("{resource}: {text}");
    }
    let mut place = json!({ "artifactLocation": { "uri": uri(&diagnostic.file) } });
    // Lines and columns start at 1; a finding about a whole file has none.
    if let (1.., 1.., Value::Object(place)) = (diagnostic.line, diagnostic.column, &mut place) {
        let region = json!({
            "startLine": diagnostic.line,
            "startColumn": diagnostic.column,
            "snippet": { "text": diagnostic.text },
        });
        place.insert("region".to_owned(), region);
    }
    json!({
        "ruleId": diagnostic.code.as_str(),
        "level": level(diagnostic.severity),
        "message": { "text": text },
        "locations": [{ "physicalLocation": place }],
    })
}

/// RFC 3986: a relative path is a relative reference; what is not allowed in one is escaped.
fn uri(path: &str) -> String {
    let mut out = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/!$&'()*+,;=@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use config::tree::Position;

    use super::*;

    #[test]
    fn a_finding_has_its_rule_place_and_text() {
        let found =
            Diagnostic::about_file(Code::UnknownField, "my dir/a.yaml".into(), "no such field", "remove it")
                .at(Position { line: 3, column: 5 }, "    nodename: x");
        let whole = Diagnostic::about_file(Code::MalformedYaml, "b.yaml".into(), "not YAML", "");
        let document = document(&[found, whole]);
        let run = &document["runs"][0];
        let results = &run["results"];
        assert_eq!(results[0]["message"]["text"], "no such field; remove it");
        let place = &results[0]["locations"][0]["physicalLocation"];
        assert_eq!(place["artifactLocation"]["uri"], "my%20dir/a.yaml");
        assert_eq!((&place["region"]["startLine"], &place["region"]["startColumn"]), (&json!(3), &json!(5)));
        assert!(results[1]["locations"][0]["physicalLocation"].get("region").is_none());
        let rules = run["tool"]["driver"]["rules"].as_array().unwrap();
        assert!(rules.iter().any(|r| r["id"] == results[0]["ruleId"]));
    }
}
