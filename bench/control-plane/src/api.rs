//! The API server that feeds the control plane which is measured.
//!
//! This generates load, and stands for no API server in a test: those run a real one. It speaks lists in parts, watches,
//! TokenReviews and the few writes of a control plane, because a real API server with 100,000 pods and its etcd would
//! take both cores of a small machine, and its figures would be theirs.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::store::{Name, Refused, Store};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A watch ends after this, if it doesn't say itself.
const WATCH: u64 = 290;
/// What a control plane writes is small.
const LONGEST_WRITE: usize = 1 << 20;

/// Serves a store on loopback until the runtime ends; the address.
///
/// # Errors
/// No port is free.
pub async fn serve(store: Arc<Store>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true); // only a matter of speed
            let store = store.clone();
            let service = hyper::service::service_fn(move |request| {
                let store = store.clone();
                async move { Ok::<_, Infallible>(answer(&store, request).await) }
            });
            tokio::spawn(async move {
                // The control plane ends connections whenever it likes.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    Ok(address)
}

/// The token of a node's proxy: what is looked at of a token is its expiry, and what its TokenReview says.
pub fn token(pod: &str) -> String {
    let claims = json!({ "exp": 4_000_000_000_u64, "pod": pod });
    format!("bench.{}.none", URL_SAFE_NO_PAD.encode(claims.to_string()))
}

/// The kind that a path is about, without its namespace; the namespace, and the name.
struct Place {
    kind: String,
    namespace: String,
    name: Option<String>,
}

impl Place {
    fn of(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (prefix, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => (format!("/api/{version}"), rest),
            ["apis", group, version, rest @ ..] => (format!("/apis/{group}/{version}"), rest),
            _ => return None,
        };
        let (namespace, kind, name) = match rest {
            ["namespaces", namespace, kind, name @ ..] => (*namespace, *kind, name.first()),
            [kind, name @ ..] => ("", *kind, name.first()),
            [] => return None,
        };
        let name = name.map(|name| (*name).to_owned());
        Some(Self { kind: format!("{prefix}/{kind}"), namespace: namespace.to_owned(), name })
    }

    fn full(&self, name: &str) -> Name {
        (self.namespace.clone(), name.to_owned())
    }
}

/// What a list or a watch asks for.
struct Query {
    limit: usize,
    from: usize,
    at: Option<u64>,
    version: u64,
    timeout: Duration,
    watch: bool,
    only: Option<String>,
    labelled: bool,
}

impl Query {
    fn of(text: &str) -> Self {
        let get = |key: &str| {
            let mut pairs = text.split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(k, _)| *k == key).map(|(_, value)| value)
        };
        let number = |key: &str| get(key).and_then(|value| value.parse().ok());
        let (at, from) = get("continue").and_then(|c| c.split_once('.')).unzip();
        Self {
            limit: number("limit").map_or(usize::MAX, |n| n as usize),
            from: from.and_then(|from| from.parse().ok()).unwrap_or(0),
            at: at.and_then(|at| at.parse().ok()),
            version: number("resourceVersion").unwrap_or(0),
            timeout: Duration::from_secs(number("timeoutSeconds").unwrap_or(WATCH)),
            watch: matches!(get("watch"), Some("true" | "1")),
            only: get("fieldSelector")
                .and_then(|s| s.strip_prefix("metadata.name%3D").or(s.strip_prefix("metadata.name=")))
                .map(str::to_owned),
            // What the control plane looks for by label is never there.
            labelled: get("labelSelector").is_some(),
        }
    }

    fn matches(&self, namespace: &str) -> impl Fn(&Name) -> bool + Send + 'static {
        let (namespace, only, none) = (namespace.to_owned(), self.only.clone(), self.labelled);
        move |(ns, name)| {
            !none && (namespace.is_empty() || *ns == namespace) && only.as_ref().is_none_or(|o| o == name)
        }
    }
}

async fn answer(store: &Arc<Store>, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().trim_end_matches("/status");
    if parts.method == Method::GET {
        if let Some(found) = discovery(path) {
            return found;
        }
        let query = Query::of(parts.uri.query().unwrap_or_default());
        return match Place::of(path) {
            Some(Place { name: None, kind, namespace }) if query.watch => {
                watch(store.clone(), kind, &namespace, &query)
            }
            Some(Place { name: None, kind, namespace }) => list(store, &kind, &namespace, &query),
            Some(place) => {
                let name = place.name.clone().unwrap_or_default();
                match store.get(&place.kind, &place.full(&name)) {
                    Some(found) => text(200, found),
                    None => failure(404),
                }
            }
            None => failure(404),
        };
    }
    let Ok(body) = Limited::new(body, LONGEST_WRITE).collect().await else { return failure(413) };
    let Ok(value) = serde_json::from_slice::<Value>(&body.to_bytes()) else { return failure(400) };
    let Some(place) = Place::of(path) else { return failure(404) };
    write(store, &parts.method, &place, value)
}

fn write(store: &Store, method: &Method, place: &Place, mut value: Value) -> Answer {
    if place.kind.ends_with("/tokenreviews") {
        return review(value);
    }
    let named = value.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
    let Some(name) = place.name.clone().or(named) else { return failure(400) };
    if place.kind.ends_with("/events") {
        return text(201, value.to_string().into());
    }
    let full = place.full(&name);
    let result = match *method {
        Method::POST => store.write(&place.kind, full, value, true),
        Method::PUT => store.write(&place.kind, full, value, false),
        Method::PATCH => {
            let old = store.written(&place.kind, &place.namespace, &name);
            let new = old.is_none();
            let mut merged = old.unwrap_or_else(|| {
                json!({ "metadata": { "name": name, "namespace": place.namespace, "uid": format!("uid-{name}") } })
            });
            if let Some(metadata) = merged.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.remove("resourceVersion");
            }
            merge(&mut merged, value.take());
            store.write(&place.kind, full, merged, new)
        }
        _ => Err(Refused(405)),
    };
    match result {
        Ok(written) => text(if *method == Method::POST { 201 } else { 200 }, written.to_string().into()),
        Err(Refused(code)) => failure(code),
    }
}

/// RFC 7396, which also does for the server-side applies of a single writer.
fn merge(into: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *into = patch;
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let Some(into) = into.as_object_mut() else { return };
    for (key, value) in patch {
        if value.is_null() {
            into.remove(&key);
        } else {
            merge(into.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Whose token one is: it says so itself.
fn review(mut review: Value) -> Answer {
    let claims = review.pointer("/spec/token").and_then(Value::as_str).and_then(|token| {
        let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
        serde_json::from_slice::<Value>(&payload).ok()
    });
    let pod = claims.as_ref().and_then(|claims| claims.get("pod")).and_then(Value::as_str);
    let status = match pod {
        None => json!({ "authenticated": false, "error": "no token of the benchmark" }),
        Some(pod) => json!({
            "authenticated": true, "audiences": ["istio-ca"],
            "user": {
                "username": "system:serviceaccount:culvert-system:ztunnel",
                "extra": {
                    "authentication.kubernetes.io/pod-name": [pod],
                    "authentication.kubernetes.io/pod-uid": [format!("uid-{pod}")],
                },
            },
        }),
    };
    if let Some(object) = review.as_object_mut() {
        object.insert("status".to_owned(), status);
    }
    text(201, review.to_string().into())
}

const GROUPS: [(&str, &[(&str, &str)]); 2] = [
    (
        "security.istio.io",
        &[("AuthorizationPolicy", "authorizationpolicies"), ("PeerAuthentication", "peerauthentications")],
    ),
    (
        "networking.istio.io",
        &[
            ("ServiceEntry", "serviceentries"),
            ("WorkloadEntry", "workloadentries"),
            ("WorkloadGroup", "workloadgroups"),
        ],
    ),
];

/// What the API server has.
fn discovery(path: &str) -> Option<Answer> {
    if path == "/apis" {
        let groups: Vec<Value> = GROUPS
            .iter()
            .map(|(group, _)| {
                let version = json!({ "groupVersion": format!("{group}/v1"), "version": "v1" });
                json!({ "name": group, "versions": [version], "preferredVersion": version })
            })
            .collect();
        let list = json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups });
        return Some(text(200, list.to_string().into()));
    }
    let (_, kinds) = GROUPS.iter().find(|(group, _)| path == format!("/apis/{group}/v1"))?;
    let resources: Vec<Value> = kinds
        .iter()
        .map(|(kind, plural)| {
            json!({ "name": plural, "kind": kind, "namespaced": true, "singularName": "", "verbs": ["list", "watch"] })
        })
        .collect();
    let group_version = path.trim_start_matches("/apis/");
    let list = json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources,
    });
    Some(text(200, list.to_string().into()))
}

fn list(store: &Store, kind: &str, namespace: &str, query: &Query) -> Answer {
    let page = store.list(kind, query.matches(namespace), (query.from, query.limit), query.at);
    let next = page.next.map(|next| format!("{}.{next}", page.version)).unwrap_or_default();
    let head = format!(
        r#"{{"kind":"List","apiVersion":"v1","metadata":{{"resourceVersion":"{}","continue":"{next}"}},"items":["#,
        page.version
    );
    let mut body = Vec::with_capacity(head.len() + page.items.iter().map(|i| i.len() + 1).sum::<usize>() + 2);
    body.extend_from_slice(head.as_bytes());
    for (index, item) in page.items.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(item);
    }
    body.extend_from_slice(b"]}");
    text(200, body.into())
}

/// The changes from a version on, as they come.
fn watch(store: Arc<Store>, kind: String, namespace: &str, query: &Query) -> Answer {
    let matches = Arc::new(query.matches(namespace));
    if store.since(&kind, &*matches, query.version).is_none() {
        return failure(410);
    }
    let end = Instant::now() + query.timeout;
    let state = (store.changes(), query.version);
    let lines = stream::unfold(state, move |(mut changes, version)| {
        let (store, kind, matches) = (store.clone(), kind.clone(), matches.clone());
        async move {
            loop {
                changes.mark_unchanged();
                // One that is forgotten while it is watched is begun anew.
                let (lines, version) = store.since(&kind, &*matches, version)?;
                if !lines.is_empty() {
                    return Some((lines, (changes, version)));
                }
                tokio::time::timeout_at(end, changes.changed()).await.ok()?.ok()?;
            }
        }
    });
    let frames = lines.flat_map(|lines| stream::iter(lines.into_iter().map(|line| Ok(Frame::data(line)))));
    let body = StreamBody::new(frames).boxed_unsync();
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

fn text(code: u16, body: Bytes) -> Answer {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = http::StatusCode::from_u16(code).unwrap_or_default();
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

fn failure(code: u16) -> Answer {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        _ => "BadRequest",
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code,
    });
    text(code, status.to_string().into())
}
