//! As much of the API server as the CA talks to, in memory: objects by path with resource versions, 404 and 409,
//! merge and apply patches, lists and watches by name, TokenReviews, and being away.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::needless_pass_by_value
)]

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::broadcast;

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

#[derive(Clone, Default)]
pub struct FakeApi(Arc<State>);

struct State {
    objects: Mutex<BTreeMap<String, Value>>,
    version: AtomicU64,
    down: AtomicBool,
    trust_bundles: AtomicBool,
    reviews: Mutex<HashMap<String, Value>>,
    review_count: AtomicU64,
    writes: Mutex<Vec<String>>,
    events: broadcast::Sender<(String, Value)>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            objects: Mutex::default(),
            version: AtomicU64::new(1),
            down: AtomicBool::new(false),
            trust_bundles: AtomicBool::new(false),
            reviews: Mutex::default(),
            review_count: AtomicU64::new(0),
            writes: Mutex::default(),
            events: broadcast::channel(1024).0,
        }
    }
}

impl FakeApi {
    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.serve(request).await }
        });
        kube::Client::new(service, "default")
    }

    pub fn set_down(&self, down: bool) {
        self.0.down.store(down, Ordering::SeqCst);
    }

    pub fn serve_trust_bundles(&self) {
        self.0.trust_bundles.store(true, Ordering::SeqCst);
    }

    /// What a review of the token answers: the `status` of a TokenReview.
    pub fn accept(&self, token: &str, status: Value) {
        self.0.reviews.lock().unwrap().insert(token.to_owned(), status);
    }

    pub fn review_count(&self) -> u64 {
        self.0.review_count.load(Ordering::SeqCst)
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.0.objects.lock().unwrap().get(path).cloned()
    }

    /// Writes as somebody else would.
    pub fn put(&self, path: &str, mut object: Value) {
        let version = self.0.version.fetch_add(1, Ordering::SeqCst).to_string();
        let mut objects = self.0.objects.lock().unwrap();
        object["metadata"]["resourceVersion"] = json!(version);
        let kind = if objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        objects.insert(path.to_owned(), object.clone());
        let _ = self.0.events.send((path.to_owned(), json!({"type": kind, "object": object})));
    }

    pub fn delete(&self, path: &str) {
        let gone = self.0.objects.lock().unwrap().remove(path);
        if let Some(object) = gone {
            let _ = self.0.events.send((path.to_owned(), json!({"type": "DELETED", "object": object})));
        }
    }

    /// Method and path of every write so far.
    pub fn writes(&self) -> Vec<String> {
        self.0.writes.lock().unwrap().clone()
    }

    async fn serve(self, request: Request<Body>) -> Result<Answer, std::io::Error> {
        if self.0.down.load(Ordering::SeqCst) {
            return Err(std::io::Error::other("connection refused"));
        }
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().trim_end_matches("/status").to_owned();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
        let value = || serde_json::from_slice::<Value>(&body).unwrap();
        Ok(match parts.method {
            Method::GET if path == "/apis" => self.groups(),
            Method::GET if path == "/apis/certificates.k8s.io/v1beta1" => reply(
                200,
                json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "certificates.k8s.io/v1beta1",
                    "resources": [{"name": "clustertrustbundles", "kind": "ClusterTrustBundle", "namespaced": false,
                        "singularName": "clustertrustbundle", "verbs": ["get"]}]}),
            ),
            Method::GET if query.contains("watch=true") => self.watch(&path, &query),
            Method::GET => match self.get(&path) {
                Some(object) => reply(200, object),
                None if is_collection(&path) => self.list(&path, &query),
                None => failure(404, "NotFound", &path),
            },
            Method::POST if path.ends_with("/tokenreviews") => self.review(value()),
            Method::POST => {
                let object = value();
                let path = format!("{path}/{}", object["metadata"]["name"].as_str().unwrap());
                self.note("POST", &path);
                if self.get(&path).is_some() {
                    failure(409, "AlreadyExists", &path)
                } else {
                    self.put(&path, object);
                    reply(201, self.get(&path).unwrap())
                }
            }
            Method::PUT => {
                self.note("PUT", &path);
                let object = value();
                match self.get(&path) {
                    None => failure(404, "NotFound", &path),
                    Some(old)
                        if old["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] =>
                    {
                        failure(409, "Conflict", &path)
                    }
                    Some(_) => {
                        self.put(&path, object);
                        reply(200, self.get(&path).unwrap())
                    }
                }
            }
            Method::PATCH => {
                self.note("PATCH", &path);
                let apply = parts.headers["content-type"].to_str().unwrap().contains("apply");
                match self.get(&path) {
                    None if !apply => failure(404, "NotFound", &path),
                    old => self.patch(&path, old.unwrap_or_else(|| json!({"metadata": {}})), &value()),
                }
            }
            _ => failure(405, "MethodNotAllowed", &path),
        })
    }

    fn note(&self, method: &str, path: &str) {
        self.0.writes.lock().unwrap().push(format!("{method} {path}"));
    }

    fn patch(&self, path: &str, mut object: Value, patch: &Value) -> Answer {
        let uid = &patch["metadata"]["uid"];
        if !uid.is_null() && object["metadata"]["uid"] != *uid {
            return failure(409, "Conflict", path);
        }
        merge(&mut object, patch);
        let parts: Vec<_> = path.split('/').collect();
        if let Some(at) =
            parts.iter().position(|part| *part == "namespaces").filter(|at| at + 2 < parts.len())
        {
            object["metadata"]["namespace"] = json!(parts[at + 1]);
        }
        object["metadata"]["name"] = json!(parts.last().unwrap());
        self.put(path, object);
        let mut written = self.get(path).unwrap();
        if written["kind"].is_null() {
            written["kind"] = json!("PartialObjectMetadata");
            written["apiVersion"] = json!("meta.k8s.io/v1");
        }
        reply(200, written)
    }

    fn groups(&self) -> Answer {
        let mut groups = Vec::new();
        if self.0.trust_bundles.load(Ordering::SeqCst) {
            let version =
                |name: &str| json!({"groupVersion": format!("certificates.k8s.io/{name}"), "version": name});
            groups.push(json!({"name": "certificates.k8s.io", "versions": [version("v1beta1")],
                "preferredVersion": version("v1beta1")}));
        }
        reply(200, json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
    }

    fn review(&self, review: Value) -> Answer {
        self.0.review_count.fetch_add(1, Ordering::SeqCst);
        let token = review["spec"]["token"].as_str().unwrap();
        let reviews = self.0.reviews.lock().unwrap();
        let status = reviews.get(token).cloned().unwrap_or_else(|| json!({"error": "unknown token"}));
        let mut review = review.clone();
        review["status"] = status;
        reply(201, review)
    }

    fn list(&self, path: &str, query: &str) -> Answer {
        let objects = self.0.objects.lock().unwrap();
        let items: Vec<_> = objects
            .iter()
            .filter(|(known, object)| selected(path, query, known, object))
            .map(|(_, object)| object.clone())
            .collect();
        let version = self.0.version.load(Ordering::SeqCst).to_string();
        reply(
            200,
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}),
        )
    }

    fn watch(&self, path: &str, query: &str) -> Answer {
        let from: u64 = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="))
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let events = self.0.events.subscribe();
        // What was written between the list and the watch.
        let missed: Vec<_> = self
            .0
            .objects
            .lock()
            .unwrap()
            .iter()
            .filter(|(known, object)| {
                let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
                version >= from && selected(path, query, known, object)
            })
            .map(|(_, object)| json!({"type": "MODIFIED", "object": object}))
            .collect();
        let (path, query) = (path.to_owned(), query.to_owned());
        let later = futures_util::stream::unfold(events, move |mut events| {
            let (path, query) = (path.clone(), query.clone());
            async move {
                loop {
                    let (known, event) = events.recv().await.ok()?;
                    if selected(&path, &query, &known, &event["object"]) {
                        return Some((event, events));
                    }
                }
            }
        });
        let frames = futures_util::stream::iter(missed)
            .chain(later)
            .map(|event| Ok(http_body::Frame::data(Bytes::from(format!("{event}\n")))));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }
}

fn is_collection(path: &str) -> bool {
    ["/configmaps", "/secrets", "/pods"].iter().any(|kind| path.ends_with(kind))
}

/// Whether an object is of the collection: `/api/v1/configmaps` holds those of all namespaces.
fn selected(collection: &str, query: &str, path: &str, object: &Value) -> bool {
    let kind = collection.rsplit('/').next().unwrap();
    let named = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"));
    path.split('/').rev().nth(1) == Some(kind)
        && named.is_none_or(|name| object["metadata"]["name"].as_str() == Some(name))
}

fn merge(target: &mut Value, patch: &Value) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = json!({});
            }
            for (name, value) in fields {
                merge(&mut target[name], value);
            }
        }
        other => *target = other.clone(),
    }
}

fn reply(code: u16, value: Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
}

fn failure(code: u16, reason: &str, path: &str) -> Answer {
    reply(
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code,
            "message": format!("{path}: {reason}")}),
    )
}
