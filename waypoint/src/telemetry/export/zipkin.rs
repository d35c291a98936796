//! Spans as Zipkin's API version 2 has them, in JSON.

use std::fmt::Write;

use process::logs::push_escaped;

use super::{Attribute, Finished, Origin, nanos};

/// A batch as one document.
pub(super) fn encode(batch: &[Finished], origin: &Origin) -> Vec<u8> {
    let mut out = String::from("[");
    for (place, finished) in batch.iter().enumerate() {
        if place > 0 {
            out.push(',');
        }
        span(&mut out, finished, origin);
    }
    out.push(']');
    out.into_bytes()
}

fn span(out: &mut String, finished: &Finished, origin: &Origin) {
    let span = &finished.span;
    // Writing to a String does not fail.
    let _ = write!(out, r#"{{"traceId":"{:032x}","id":"{:016x}""#, span.trace, span.id);
    if let Some(parent) = span.parent {
        let _ = write!(out, r#","parentId":"{parent:016x}""#);
    }
    out.push_str(r#","kind":"SERVER","name":""#);
    push_escaped(out, &finished.name);
    // At least one: zero would be a span without an end.
    let duration = finished.duration.as_micros().max(1);
    let _ = write!(out, r#"","timestamp":{},"duration":{duration}"#, nanos(span.started) / 1000);
    out.push_str(r#","localEndpoint":{"serviceName":""#);
    push_escaped(out, &format!("{}.{}", origin.name, origin.namespace));
    out.push_str(r#""},"tags":{"#);
    let failed = finished.failed.then(|| ("error".to_owned(), Attribute::Text("true".to_owned())));
    for (place, (name, value)) in finished.attributes.iter().chain(failed.iter()).enumerate() {
        out.push_str(if place == 0 { "\"" } else { ",\"" });
        push_escaped(out, name);
        out.push_str("\":\"");
        match value {
            Attribute::Text(text) => push_escaped(out, text),
            Attribute::Int(number) => {
                let _ = write!(out, "{number}");
            }
        }
        out.push('"');
    }
    out.push_str("}}");
}
