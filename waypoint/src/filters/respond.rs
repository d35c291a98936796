//! Answers that a route has itself.

use std::sync::Arc;

use bytes::Bytes;
use model::http::Respond;

use super::Refusal;
use crate::http::decide::{Edits, Facts, Flag, Response};
use crate::http::head::Fields;

/// The answer. Made once for a route.
#[must_use]
pub fn response(respond: &Respond) -> Refusal {
    let kind = respond.content_type.as_ref().and_then(|kind| kind.to_str().ok());
    let fields = kind.into_iter().map(|kind| (Box::from("content-type"), Box::from(kind))).collect();
    Arc::new(Response {
        status: respond.status,
        fields,
        body: Bytes::copy_from_slice(&respond.body),
        flag: Flag::None,
    })
}

/// An answer of a route, with the changes that the route makes of responses.
#[must_use]
pub fn changed(answer: Refusal, edits: &Edits, facts: &Facts<'_>) -> Refusal {
    if edits.0.is_empty() {
        return answer;
    }
    let mut fields = Fields::default();
    for (name, value) in &answer.fields {
        fields.push(name.as_bytes(), value.as_bytes());
    }
    edits.apply(&mut fields, facts);
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(Box::from);
    let fields = fields.iter().filter_map(|(name, value)| text(name).zip(text(value))).collect();
    Arc::new(Response { fields, ..Response::clone(&answer) })
}
