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
use tokio::net::{UnixListener, UnixSocket};

use crate::metrics::Metrics;
use crate::node::{AddRequest, Answer, Node, Refusal};

/// CNI: no pods can be added now.
const NOT_AVAILABLE: u32 = 50;
const DECODE: u32 = 6;
const TRY_AGAIN_LATER: u32 = 11;

/// For a request; the plugin waits a little longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(28);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 512;

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
    Ok(process::http::serve_unix(bind(path)?, routes, limits()))
}

/// A listener at `path`, in the place of a socket that is there, which nobody but root can connect to at any time. Must be
/// called in a tokio runtime.
///
/// # Errors
/// The socket can't be made.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    // Bound beside it and moved: a plugin finds the old one or the new one.
    let beside = path.with_extension("next");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixSocket::new_stream()?;
    socket.bind(&beside)?;
    // Before it listens: until then nobody connects, whatever the process's mask leaves.
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    let listener = socket.listen(BACKLOG)?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
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
        .post("/cmddel", "a pod ends", move |request| del.clone().del(request))
        .post("/cmdgc", "which pods are left", move |request| gc.clone().gc(request))
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

    async fn del(self, request: Request) -> Response {
        let node = self.node.clone();
        let done = self.aside(request, move |request: AddRequest| node.del(&request)).await;
        self.answer("DEL", done.map(|()| json!({})))
    }

    async fn gc(self, request: Request) -> Response {
        let node = self.node.clone();
        let released = self.aside(request, move |GcRequest { valid_attachments }| {
            let valid: HashSet<String> = valid_attachments.into_iter().map(|a| a.container).collect();
            node.gc(&valid)
        });
        let released = released.await;
        self.answer("GC", released.map(|number| json!({ "released": number })))
    }

    /// Does what opens and writes files where it keeps nobody waiting.
    async fn aside<A, R>(
        &self,
        request: Request,
        work: impl FnOnce(A) -> R + Send + 'static,
    ) -> Result<R, Refusal>
    where
        A: for<'de> Deserialize<'de> + Send + 'static,
        R: Send + 'static,
    {
        let asked: A = read(&request)?;
        tokio::task::spawn_blocking(move || work(asked))
            .await
            .map_err(|error| Refusal { code: TRY_AGAIN_LATER, message: error.to_string() })
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};

    use super::*;

    #[tokio::test]
    async fn a_socket_takes_the_place_of_a_stale_one_and_is_roots() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugin.sock");
        // As a process leaves it that was killed, in the middle of the same too.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(std::os::unix::net::UnixListener::bind(path.with_extension("next")).unwrap());
        let listener = bind(&path).unwrap();
        let there = std::fs::metadata(&path).unwrap();
        assert!(there.file_type().is_socket() && there.permissions().mode() & 0o777 == 0o600);
        assert!(!path.with_extension("next").exists());
        let (accepted, connected) = tokio::join!(listener.accept(), tokio::net::UnixStream::connect(&path));
        assert!(accepted.is_ok() && connected.is_ok());
        assert!(bind(Path::new("/no/such/directory/plugin.sock")).is_err());
    }
}
