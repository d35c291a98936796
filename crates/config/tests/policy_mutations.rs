//! Resources with mistakes: every case of `tests/cases/policy-*.yaml`, changed at random. Whatever stands in a file,
//! reading it ends, says something of every field that it does not act on, and never brings half an object in force.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;

use config::compile::Options;
use config::diagnostic::Severity;
use config::repository::{Content, Repository};
use model::Mesh;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn cases() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let policies = files.filter(|f| f.file_name().unwrap().to_str().unwrap().starts_with("policy-"));
    let mut texts: Vec<String> = policies.map(|f| std::fs::read_to_string(f).unwrap()).collect();
    texts.sort();
    // Without the first document, which says what is expected.
    texts.iter().map(|t| t.split_once("\n---\n").unwrap().1.to_owned()).collect()
}

const VALUES: [&str; 22] = [
    "null",
    "[]",
    "{}",
    "0",
    "-1",
    "65536",
    "99999999999999999999",
    "1.5",
    "true",
    "\"\"",
    "\"*\"",
    "\"a*b\"",
    "x",
    "[x, 1]",
    "[null]",
    "{a: b}",
    "[{}]",
    "\"spiffe://\"",
    "\"/\"",
    "::/0",
    "\"\\u00e9\\U0001F600\"",
    "'a/b/c/d'",
];

#[derive(Clone, Debug)]
enum Mutation {
    /// Puts a value in the place of one of the words.
    Word(Index, &'static str),
    /// Removes a line.
    Remove(Index),
    /// Writes a line twice.
    Repeat(Index),
    /// Cuts the text.
    Cut(Index),
    /// Changes one character.
    Character(Index, char),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        6 => (any::<Index>(), select(&VALUES[..])).prop_map(|(i, v)| Mutation::Word(i, v)),
        2 => any::<Index>().prop_map(Mutation::Remove),
        1 => any::<Index>().prop_map(Mutation::Repeat),
        1 => any::<Index>().prop_map(Mutation::Cut),
        2 => (any::<Index>(), any::<char>()).prop_map(|(i, c)| Mutation::Character(i, c)),
    ]
}

fn mutate(text: &str, mutation: &Mutation) -> String {
    // One before it may have left nothing.
    if !text.contains(char::is_alphanumeric) {
        return text.to_owned();
    }
    let mut lines: Vec<&str> = text.lines().collect();
    match mutation {
        Mutation::Word(index, value) => {
            let separators = |c: char| " \n[]{},".contains(c);
            let starts: Vec<usize> = text
                .char_indices()
                .filter(|(i, c)| !separators(*c) && (*i == 0 || text[..*i].ends_with(separators)))
                .map(|(i, _)| i)
                .collect();
            let start = *index.get(&starts);
            let end = text[start..].find(separators).map_or(text.len(), |n| start + n);
            format!("{}{value}{}", &text[..start], &text[end..])
        }
        Mutation::Remove(index) => {
            lines.remove(index.index(lines.len()));
            lines.join("\n") + "\n"
        }
        Mutation::Repeat(index) => {
            let at = index.index(lines.len());
            lines.insert(at, lines[at]);
            lines.join("\n") + "\n"
        }
        Mutation::Cut(index) => {
            let at = index.index(text.len());
            text.chars().take(at).collect()
        }
        Mutation::Character(index, c) => {
            let at = index.index(text.chars().count());
            text.chars().enumerate().map(|(i, old)| if i == at { *c } else { old }).collect()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mistakes_are_said_and_bring_nothing_half_in_force(
        case in any::<Index>(), mutations in proptest::collection::vec(mutation(), 1..4),
    ) {
        let cases = cases();
        let original = case.get(&cases);
        let mut text = original.clone();
        for mutation in &mutations {
            if text.trim().is_empty() {
                break;
            }
            text = mutate(&text, mutation);
        }
        let mut repository = Repository::new(Options::default());
        let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
        let mesh = Mesh::default().apply(outcome.changes);
        let said = repository.diagnostics();
        prop_assert!(said.iter().all(|d| d.code.as_str() != "unread-field"), "{:?}", said);
        prop_assert!(!repository.review().iter().any(|d| d.message.is_empty()));
        // What is reported with an error of its own is not there, but for what refuses everything in its place.
        let own = |code: &str| !matches!(code, "host-conflict" | "address-conflict" | "duplicate-object");
        for d in said.iter().filter(|d| d.severity == Severity::Error && own(d.code.as_str())) {
            let Some(resource) = &d.resource else { continue };
            let closed = |p: &model::Policy| {
                matches!(p.action, model::Action::Deny) && p.rules.iter().all(|r| r.clauses.is_empty())
            };
            let is_it = |p: &&std::sync::Arc<model::Policy>| {
                p.key.namespace == resource.namespace && p.key.name == resource.name && !closed(p)
            };
            let twice = text.matches(&*resource.name).count() > 1;
            if &*resource.kind == "AuthorizationPolicy" && !twice {
                prop_assert!(mesh.policies().find(is_it).is_none(), "{} is in force", resource);
            }
        }
        // And the original, read afterwards, is as if nothing had been. Of one with errors the last good version, if a
        // mutation happened to be one, would rightly stay.
        let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(original.as_bytes()));
        let after = mesh.apply(outcome.changes);
        let mut fresh = Repository::new(Options::default());
        let at_once = Mesh::default().apply(fresh.apply(&"case.yaml".into(), Content::Bytes(original.as_bytes())).changes);
        if fresh.has_bad_files() {
            return Ok(());
        }
        let dump = |m: &Mesh| {
            let mut all: Vec<String> = m.policies().map(|p| format!("{p:?}")).collect();
            all.extend(m.workloads().map(|w| format!("{w:?}")));
            all.extend(m.services().map(|s| format!("{s:?}")));
            all.push(format!("{:?}", m.settings()));
            all.sort();
            all
        };
        prop_assert_eq!(dump(&at_once), dump(&after));
    }
}
