//! Feeds the parser that this binary is named after.
#![no_main]

use libfuzzer_sys::fuzz_target;
use parsers::{Target, target};

static TARGET: std::sync::LazyLock<Target> = std::sync::LazyLock::new(|| target(env!("CARGO_BIN_NAME")));

fuzz_target!(|bytes: &[u8]| (TARGET.run)(bytes));
