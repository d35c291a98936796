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
    let agent = Agent { node: node.clone(), readiness: readiness.clone(), metrics: metrics.clone() };
    let (add, check, del, gc, status) =
        (agent.clone(), agent.clone(), agent.clone(), agent.clone(), agent.clone());
    Routes::new("culvert-node, for the CNI plugin")
        .post("/cmdadd", "a pod starts", move |request| add.clone().add(request))
        .post("/cmdcheck", "whether a pod is captured", move |request| check.clone().check(request))
        .post("/cmddel", "a pod ends", move |request| {
            let done = read(&request).map(|request: AddRequest| del.node.del(&request));
            let response = del.answer("DEL", done.map(|()| json!({})));
            async { response }
        })
        .post("/cmdgc", "which pods are left", move |request| {
            let done = read(&request).map(|GcRequest { valid_attachments }| {
                let valid: HashSet<String> = valid_attachments.into_iter().map(|a| a.container).collect();
                json!({ "released": gc.node.gc(&valid) })
            });
            let response = gc.answer("GC", done);
            async { response }
        })
        .post("/status", "whether pods can be added", move |_| {
            let response = status.answer("STATUS", status.status());
            async { response }
        })
}

/// What requests are answered from.
#[derive(Clone)]
struct Agent {
    node: Arc<Node>,
    readiness: Readiness,
    metrics: Metrics,
}

impl Agent {
    async fn add(self, request: Request) -> Response {
        let outcome = match read(&request) {
            Ok(request) => self.node.add(request).await,
            Err(refusal) => Err(refusal),
        };
        let said = |answer| match answer {
            Answer::Enrolled => json!({ "enrolled": true }),
            Answer::Outside(why) => json!({ "enrolled": false, "because": why }),
        };
        self.answer("ADD", outcome.map(said))
    }

    async fn check(self, request: Request) -> Response {
        let outcome = match read(&request) {
            Ok(request) => self.node.check(&request).await,
            Err(refusal) => Err(refusal),
        };
        self.answer("CHECK", outcome.map(|()| json!({})))
    }

    /// Whether pods can be added. A no makes the whole node unready, and takes the pods that run there out of their
    /// services: so it is said on a node alone that has no pod of the mesh yet. ADD waits, and refuses, by itself. That a
    /// ztunnel is there is not asked: it starts in a pod of its own, which a node that is not ready does not start.
    fn status(&self) -> Result<serde_json::Value, Refusal> {
        let unmet = self.readiness.unmet();
        let counts = self.node.counts();
        if unmet.is_empty() || counts.enrolled + counts.closed > 0 {
            return Ok(json!({}));
        }
        let reasons: Vec<String> = unmet.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let message = format!("the Culvert node agent is not ready: {}", reasons.join("; "));
        Err(Refusal { code: NOT_AVAILABLE, message })
    }

    fn answer(&self, command: &'static str, outcome: Result<serde_json::Value, Refusal>) -> Response {
        self.metrics.request(command, if outcome.is_ok() { "ok" } else { "refused" });
        match outcome {
            Ok(value) => Response::json(&value),
            Err(Refusal { code, message }) => {
                let body = json!({ "code": code, "msg": message }).to_string();
                Response::new(StatusCode::SERVICE_UNAVAILABLE, "application/json", body)
            }
        }
    }
}

fn read<T: for<'de> Deserialize<'de>>(request: &Request) -> Result<T, Refusal> {
    serde_json::from_slice(request.body()).map_err(|error| Refusal {
        code: DECODE,
        message: format!(
            "the plugin's request can't be read: {error}; plugin and agent are of different versions"
        ),
    })
}
