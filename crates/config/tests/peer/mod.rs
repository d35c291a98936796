//! The folder with cases from Istio's own tests, beside the checkout.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::path::PathBuf;

/// The document of a name; `None`, said aloud, when there is no such folder.
pub fn peer_cases(name: &str) -> Option<serde_json::Value> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/peer-cases");
    let folder = std::env::var_os("CULVERT_PEER_CASES").map_or(beside, PathBuf::from);
    if !folder.is_dir() {
        eprintln!("skipped: no peer cases (set CULVERT_PEER_CASES to their folder)");
        return None;
    }
    Some(serde_json::from_str(&std::fs::read_to_string(folder.join(name)).unwrap()).unwrap())
}
