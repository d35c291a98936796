//! No field of a kind is forgotten: each one that upstream has stands in its schema, once, and nothing else does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};

use config::fields::{Disposition, Schema};
use config::resource::KINDS;

fn collect(schema: &'static Schema, all: &mut BTreeMap<&'static str, &'static Schema>) {
    if all.insert(schema.name, schema).is_none() {
        schema.fields.iter().filter_map(|f| f.nested).for_each(|nested| collect(nested, all));
    }
}

fn schemas() -> BTreeMap<&'static str, &'static Schema> {
    let mut all = BTreeMap::new();
    KINDS.iter().for_each(|kind| collect(kind.schema, &mut all));
    all
}

#[test]
fn every_field_stands_in_one_class() {
    for (name, schema) in schemas() {
        let names: BTreeSet<&str> = schema.fields.iter().map(|f| f.name).collect();
        assert_eq!(names.len(), schema.fields.len(), "{name} has a field twice");
        assert!(schema.fields.len() < 63, "{name}: the reader has bits for 63 fields");
    }
}

#[test]
fn what_is_not_enforced_has_a_reason() {
    for (name, schema) in schemas() {
        for field in schema.fields {
            let reason = match field.disposition {
                Disposition::Enforced => continue,
                Disposition::NotApplicable(reason)
                | Disposition::Silent(reason)
                | Disposition::Refused { reason, .. } => reason,
            };
            assert!(reason.len() > 5, "{name}.{}", field.name);
        }
    }
}

#[test]
fn the_fields_are_those_of_upstream() {
    let mut upstream: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in include_str!("upstream_fields.txt").lines().filter(|l| !l.starts_with('#')) {
        let (name, fields) = line.split_once(": ").unwrap();
        upstream.entry(name).or_default().extend(fields.split(' '));
    }
    let schemas = schemas();
    for (name, fields) in upstream {
        let schema = schemas.get(name).unwrap_or_else(|| panic!("there is no schema {name}"));
        let known: BTreeSet<&str> = schema.fields.iter().map(|f| f.name).collect();
        assert_eq!(known, fields, "{name}");
    }
}
