//! The path, in the form that policies and routes compare, and that the service gets.

use std::borrow::Cow;

use model::http::{Normalization, normalize};

use super::{Refusal, answer};
use crate::http::decide::Flag;
use crate::http::head::RequestHead;

/// Normalises the path; the query stays.
///
/// # Errors
/// 400 for a path of which there is no safe reading.
pub fn apply(request: &mut RequestHead, how: Normalization) -> Result<(), Refusal> {
    let path = match normalize(request.path(), how) {
        Ok(Cow::Borrowed(_)) => return Ok(()),
        Ok(Cow::Owned(path)) => path,
        Err(error) => {
            tracing::debug!(%error, "refused a request");
            return Err(answer(400, "path_normalization_failed", Flag::DownstreamProtocolError));
        }
    };
    let target = with_query(path, request.query());
    request.set_target(&target);
    Ok(())
}

/// A path with a query, as a request's target.
pub(super) fn with_query(mut path: String, query: &str) -> String {
    if !query.is_empty() {
        path.push('?');
        path.push_str(query);
    }
    path
}
