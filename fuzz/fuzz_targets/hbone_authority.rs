//! Any text is a destination that reads back as it is written, or an error.
#![no_main]

use hbone::Authority;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(authority) = Authority::parse(text) {
        assert_eq!(Authority::parse(&authority.to_string()), Ok(authority));
    }
});
