//! The messages have the fields of Istio's wire: same package, message, number, type and name. The facts are in
//! `data/fields.txt`, one field a line, taken down from the definitions of Istio 1.32.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use prost_types::field_descriptor_proto::Label;
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto};

/// Fields from this number on are our own.
const OWN: i32 = 31_000;

fn field(message: &str, f: &FieldDescriptorProto) -> String {
    let kind = if f.type_name().is_empty() {
        format!("{:?}", f.r#type()).to_lowercase()
    } else {
        f.type_name().trim_start_matches('.').to_owned()
    };
    let repeated = if f.label() == Label::Repeated { "repeated " } else { "" };
    let optional = if f.proto3_optional() { "optional " } else { "" };
    format!("{message} {} {repeated}{optional}{kind} {}", f.number(), f.name())
}

fn of_message(path: &str, m: &DescriptorProto, out: &mut Vec<String>) {
    let path = format!("{path}.{}", m.name());
    out.extend(m.field.iter().filter(|f| f.number() < OWN).map(|f| field(&path, f)));
    // A map of our own has a message of its own for the entries.
    let own = |n: &DescriptorProto| {
        let entry = format!(".{path}.{}", n.name());
        m.field.iter().any(|f| f.number() >= OWN && f.type_name() == entry)
    };
    m.nested_type.iter().filter(|n| !own(n)).for_each(|n| of_message(&path, n, out));
    m.enum_type.iter().for_each(|e| of_enum(&path, e, out));
}

fn of_enum(path: &str, e: &EnumDescriptorProto, out: &mut Vec<String>) {
    out.extend(e.value.iter().map(|v| format!("{path}.{} = {} {}", e.name(), v.number(), v.name())));
}

/// `root` and `files` are those of `build.rs`; the same function wrote the facts, of Istio's own files.
fn described(root: &str, files: &[&str], package: &str) -> Vec<String> {
    let set = protox::compile(files, [root]).unwrap();
    let mut out = Vec::new();
    for file in set.file.iter().filter(|f| f.package().starts_with(package)) {
        file.message_type.iter().for_each(|m| of_message(file.package(), m, &mut out));
        file.enum_type.iter().for_each(|e| of_enum(file.package(), e, &mut out));
    }
    out.sort();
    out
}

#[test]
fn the_messages_have_the_fields_of_istio() {
    let ours = described(
        concat!(env!("CARGO_MANIFEST_DIR"), "/proto"),
        &["istio/workload.proto", "istio/authorization.proto", "istio/zds.proto", "istio/ca.proto"],
        "istio",
    );
    let facts: Vec<&str> = include_str!("data/fields.txt").lines().collect();
    let missing: Vec<_> = facts.iter().filter(|f| !ours.iter().any(|o| o == *f)).collect();
    let invented: Vec<_> = ours.iter().filter(|o| !facts.contains(&o.as_str())).collect();
    assert!(missing.is_empty() && invented.is_empty(), "missing: {missing:#?}\ninvented: {invented:#?}");
}

/// Of Envoy's messages only some fields are here. These are they, taken down from `api/envoy/service/discovery/v3` and
/// `api/envoy/config/core/v3` of Envoy and from `google/rpc`.
#[test]
fn the_messages_of_discovery_have_numbers_and_types_of_envoy() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
    let files = ["envoy/service/discovery/v3/discovery.proto", "google/rpc/status.proto"];
    let ours = [described(root, &files, "envoy"), described(root, &files, "google.rpc")].concat();
    let facts: Vec<&str> = include_str!("data/discovery.txt").lines().collect();
    assert_eq!(ours, facts);
}

/// Writes the facts anew: `UPSTREAM=<root>:<file>,<file> cargo test -p proto --test fields -- --ignored --nocapture`.
#[test]
#[ignore = "prints the facts of other definitions, for comparison"]
fn print_facts() {
    let upstream = std::env::var("UPSTREAM").unwrap();
    let (root, files) = upstream.split_once(':').unwrap();
    for line in described(root, &files.split(',').collect::<Vec<_>>(), "istio") {
        println!("{line}");
    }
}
