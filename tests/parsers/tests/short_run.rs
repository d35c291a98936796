//! A short run of every target: on its seeds, and on changed ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parsers::{Mutator, TARGETS, Target, target};

/// Runs a target, and shows the input that it fails on.
fn run(target: Target) {
    let seeds = (target.seeds)();
    let mut mutator = Mutator::new(seeds.clone(), 0x9e37_79b9_7f4a_7c15);
    let changed = std::iter::repeat_with(|| mutator.next_input()).take(target.cases);
    for input in seeds.iter().cloned().chain(changed) {
        let survived = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        assert!(survived.is_ok(), "{} fails on \"{}\"", target.name, input.escape_ascii());
    }
}

macro_rules! short_runs {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run(target(stringify!($name)));
            }
        )*

        #[test]
        fn every_target_has_a_short_run_and_a_binary() {
            let targets: BTreeSet<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(BTreeSet::from([$(stringify!($name)),*]), targets);
            let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/Cargo.toml");
            let manifest: toml::Table = std::fs::read_to_string(manifest).unwrap().parse().unwrap();
            let binaries = manifest["bin"].as_array().unwrap();
            let names: BTreeSet<&str> = binaries.iter().map(|binary| binary["name"].as_str().unwrap()).collect();
            assert_eq!(names, targets);
        }
    };
}

short_runs! {
    config_manifest config_object spiffe_id ca_pem certificate signing_request tls_server tls_client
    hbone_authority hbone_headers hbone_server hbone_client http_request http_response http_chunks
    http_connection http_decision http_matcher wds xds_requests dns_message token jwk_set
}
