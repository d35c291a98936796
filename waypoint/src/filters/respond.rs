//! Answers that a route has itself.

use std::sync::Arc;

use bytes::Bytes;
use model::http::Respond;

use super::Refusal;
use crate::http::decide::{Flag, Response};

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
