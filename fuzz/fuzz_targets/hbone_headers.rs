//! Any text is baggage and a forwarded header that read back as they are written, or none.
#![no_main]

use hbone::{Baggage, Forwarded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some(baggage) = Baggage::parse(text)
        && let Some(value) = baggage.encode()
    {
        assert_eq!(Baggage::parse(value.to_str().expect("encoded as text")), Some(baggage));
    }
    if let Some(forwarded) = Forwarded::parse(text) {
        // A host that a header can't hold is left out.
        if let Some(again) = forwarded.encode().and_then(|value| Forwarded::parse(value.to_str().ok()?)) {
            assert_eq!(again.client, forwarded.client);
        }
    }
});
