//! What a request passes, in this order, one file each:
//!
//! ```text
//!   path        its path is brought into the form that all that follows compares
//!   jwt         its token is verified                                             ─▶ 401
//!   authorize   DENY and ALLOW policies, dry-run ones beside                      ─▶ 403
//!   ext_authz   whoever CUSTOM policies name is asked                             ─▶ 403
//!   rate_limit  buckets here, and a rate-limit service                            ─▶ 429
//!   route       the route that takes it                                           ─▶ 404
//!   cors        pages of other origins                                            ─▶ 200
//!   fault       what is made to fail: a delay, an abort                           ─▶ the status that is said
//!   redirect, respond                                                             ─▶ 3xx, what is said
//!   rewrite     its path, its host, its fields
//! ```
//!
//! A filter goes on or gives the response; which one comes after which is in [`crate::deciding`] and nowhere else.

pub mod authorize;
pub mod cors;
pub mod ext_authz;
pub mod fault;
pub mod jwt;
pub mod path;
pub mod rate_limit;
pub mod redirect;
pub mod respond;
pub mod rewrite;
pub mod route;

use std::sync::Arc;

use model::http::{Claims, Request};

use crate::http::decide::{Connection, Flag, Response};
use crate::http::head::RequestHead;

/// The response of a filter that does not let a request go on.
pub type Refusal = Arc<Response>;

/// An answer of our own with a text.
#[must_use]
pub fn answer(status: u16, text: &'static str, flag: Flag) -> Refusal {
    let body = bytes::Bytes::from_static(text.as_bytes());
    Arc::new(Response { status, fields: Box::default(), body, flag })
}

/// A request as decisions see it. One about the service as a whole has the path that is above all others: what takes that
/// answers for the service, and what is kept from all of it is kept from this, too.
#[must_use]
pub fn view<'a>(
    request: &'a RequestHead,
    connection: &'a Connection,
    claims: Option<&'a Claims>,
) -> Request<'a> {
    Request {
        method: request.method(),
        scheme: request.scheme(),
        authority: request.authority(),
        path: if request.is_server_wide() { "/" } else { request.path() },
        query: request.query(),
        headers: &request.fields,
        claims,
        sni: connection.server_name.as_deref(),
        remote_ip: connection.client.ip(),
    }
}
