//! What the CNI plugin asks, over HTTP on a Unix socket that only root may connect to.

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use process::http::{Limits, Request, Response, Routes, StatusCode};
use process::readiness::Readiness;
use serde::Deserialize;
use serde_json::json;
use tokio::net::UnixListener;

use crate::metrics::Metrics;
use crate::node::{AddRequest, Answer, Node, Refusal};

/// CNI: no pods can be added now.
const NOT_AVAILABLE: u32 = 50;
/// CNI: and those that are there may be cut off.
const NOT_AVAILABLE_LIMITED: u32 = 51;
const DECODE: u32 = 6;

/// For a request; the plugin waits a little longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(28);

fn limits() -> Limits {
    Limits {
        connections: 512,
        body_bytes: 4 << 20,
        head_time: Duration::from_secs(5),
        body_time: Duration::from_secs(5),
        handler_time: ANSWER_LIMIT,
        ..Limits::default()
    }
}

/// Listens at `path`, in the place of a socket that is there, and serves the plugin until the future is dropped.
///
/// # Errors
/// The socket can't be made.
pub fn listen(path: &Path, routes: Routes) -> io::Result<impl Future<Output = ()> + use<>> {
    use std::os::unix::fs::PermissionsExt;
    // Bound beside it and moved: a plugin finds the old one or the new one.
    let beside = path.with_extension("next");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    Ok(process::http::serve_unix(listener, routes, limits()))
}

/// The attachments that stay, as the runtime lists them.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GcRequest {
    valid_attachments: Vec<Attachment>,
}

#[derive(Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
}

/// The requests.
pub fn routes(node: &Arc<Node>, readiness: &Readiness, metrics: &Metrics) -> Routes {
    let (added, checked, deleted, collected) = (node.clone(), node.clone(), node.clone(), node.clone());
    let (on_add, on_check, on_del, on_gc, on_status) =
        (metrics.clone(), metrics.clone(), metrics.clone(), metrics.clone(), metrics.clone());
    let (readiness, stuck) = (readiness.clone(), node.clone());
    Routes::new("culvert-node, for the CNI plugin")
        .post("/cmdadd", "a pod starts", move |request| {
            let (node, metrics) = (added.clone(), on_add.clone());
            async move {
                let outcome = match read(&request) {
                    Ok(request) => node.add(request).await,
                    Err(refusal) => Err(refusal),
                };
                answer(
                    &metrics,
                    "ADD",
                    outcome.map(|answer| match answer {
                        Answer::Enrolled => json!({ "enrolled": true }),
                        Answer::Outside(why) => json!({ "enrolled": false, "because": why }),
                    }),
                )
            }
        })
        .post("/cmdcheck", "whether a pod is captured", move |request| {
            let (node, metrics) = (checked.clone(), on_check.clone());
            async move {
                let outcome = match read(&request) {
                    Ok(request) => node.check(&request).await,
                    Err(refusal) => Err(refusal),
                };
                answer(&metrics, "CHECK", outcome.map(|()| json!({})))
            }
        })
        .post("/cmddel", "a pod ends", move |request| {
            let (node, metrics) = (deleted.clone(), on_del.clone());
            async move {
                answer(
                    &metrics,
                    "DEL",
                    read(&request).map(|request: AddRequest| {
                        node.del(&request);
                        json!({})
                    }),
                )
            }
        })
        .post("/cmdgc", "which pods are left", move |request| {
            let (node, metrics) = (collected.clone(), on_gc.clone());
            async move {
                answer(
                    &metrics,
                    "GC",
                    read(&request).map(|request: GcRequest| {
                        let valid: HashSet<String> = request
                            .valid_attachments
                            .into_iter()
                            .map(|attachment| attachment.container)
                            .collect();
                        json!({ "released": node.gc(&valid) })
                    }),
                )
            }
        })
        .post("/status", "whether pods can be added", move |_| {
            let unmet = readiness.unmet();
            let code = if stuck.counts().not_captured > 0 { NOT_AVAILABLE_LIMITED } else { NOT_AVAILABLE };
            let outcome = if unmet.is_empty() {
                Ok(json!({}))
            } else {
                let reasons: Vec<String> = unmet.iter().map(|(name, why)| format!("{name}: {why}")).collect();
                let message = format!("the Culvert node agent is not ready: {}", reasons.join("; "));
                Err(Refusal { code, message })
            };
            let response = answer(&on_status, "STATUS", outcome);
            async { response }
        })
}

fn read<T: for<'de> Deserialize<'de>>(request: &Request) -> Result<T, Refusal> {
    serde_json::from_slice(request.body()).map_err(|error| Refusal {
        code: DECODE,
        message: format!(
            "the plugin's request can't be read: {error}; plugin and agent are of different versions"
        ),
    })
}

fn answer(metrics: &Metrics, command: &'static str, outcome: Result<serde_json::Value, Refusal>) -> Response {
    metrics.request(command, if outcome.is_ok() { "ok" } else { "refused" });
    match outcome {
        Ok(value) => Response::json(&value),
        Err(Refusal { code, message }) => {
            let body = json!({ "code": code, "msg": message }).to_string();
            Response::new(StatusCode::SERVICE_UNAVAILABLE, "application/json", body)
        }
    }
}
