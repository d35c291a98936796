//! Watches of an API server that refuses (429), forgets (410), breaks off, is slow, says nothing, loses a kind, and comes
//! back. A real one does so seldom, so here a script answers; `api_server.rs` has what can be tried on a real one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use config::resource::Kind;
use control_plane::source::{Change, Event, Source, Watches};
use futures_util::{StreamExt, stream};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// What the server answers to the next request for pods.
#[derive(Clone)]
enum Script {
    /// A list: names, and the list's version.
    List(&'static [&'static str], u32),
    /// An error.
    Status(u16),
    /// A watch that says this, and then ends or goes on.
    Watch(Vec<Value>, bool),
    /// Nothing, ever.
    Silence,
    /// The next one, after so many seconds.
    After(u64),
}

fn pod(name: &str, version: u32) -> Value {
    let metadata = json!({ "name": name, "namespace": "shop", "resourceVersion": version.to_string() });
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata })
}

fn status(code: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code,
        "reason": match code { 404 => "NotFound", 410 => "Expired", _ => "TooManyRequests" },
        "message": "as the script says",
    })
}

fn whole(code: u16, body: &Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string()));
    Response::builder().status(StatusCode::from_u16(code).unwrap()).body(body.boxed_unsync()).unwrap()
}

fn list(items: &[Value], version: u32) -> Answer {
    let metadata = json!({ "resourceVersion": version.to_string() });
    whole(200, &json!({ "apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items }))
}

fn watch(events: Vec<Value>, goes_on: bool) -> Answer {
    let lines = events.into_iter().map(|event| Ok(Frame::data(Bytes::from(format!("{event}\n")))));
    let lines = stream::iter(lines.collect::<Vec<_>>());
    let body = if goes_on {
        StreamBody::new(lines.chain(stream::pending())).boxed_unsync()
    } else {
        StreamBody::new(lines).boxed_unsync()
    };
    Response::new(body)
}

/// The groups of kinds that need definitions, which are not there.
const CUSTOM: [&str; 5] = [
    "security.istio.io",
    "networking.istio.io",
    "telemetry.istio.io",
    "gateway.networking.k8s.io",
    "culvert.dev",
];

/// Answers for pods by the script, and for all else that there is nothing.
fn answer(request: &Request<Body>, script: &Mutex<VecDeque<Script>>, asked: &Mutex<Vec<String>>) -> Answer {
    let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    if request.uri().path() != "/api/v1/pods" {
        return match request.uri().path() {
            "/apis" => whole(200, &json!({ "kind": "APIGroupList", "groups": [] })),
            path if CUSTOM.iter().any(|group| path.starts_with(&format!("/apis/{group}/"))) => {
                whole(404, &status(404))
            }
            _ if watches => watch(Vec::new(), true),
            _ => list(&[], 1),
        };
    }
    let next = script.lock().unwrap().pop_front();
    asked.lock().unwrap().push(if watches { "watch" } else { "list" }.to_owned());
    match next {
        Some(Script::List(names, version)) if !watches => {
            list(&names.iter().map(|name| pod(name, version)).collect::<Vec<_>>(), version)
        }
        Some(Script::Watch(events, goes_on)) if watches => watch(events, goes_on),
        Some(Script::Status(code)) => whole(code, &status(code)),
        None if watches => watch(Vec::new(), true),
        other => panic!("watch {watches}: the script is {}", other.is_some()),
    }
}

fn source(
    script: Vec<Script>,
) -> (Source, control_plane::source::Feed, Arc<Watches>, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let (script, log) = (Arc::new(Mutex::new(VecDeque::from(script))), asked.clone());
    let service = tower::service_fn(move |request: Request<Body>| {
        let (script, log) = (script.clone(), log.clone());
        async move {
            if request.uri().path() == "/api/v1/pods" {
                let first = script.lock().unwrap().front().cloned();
                match first {
                    Some(Script::Silence) => {
                        script.lock().unwrap().pop_front();
                        log.lock().unwrap().push("silence".to_owned());
                        std::future::pending::<()>().await;
                    }
                    Some(Script::After(seconds)) => {
                        script.lock().unwrap().pop_front();
                        tokio::time::sleep(Duration::from_secs(seconds)).await;
                    }
                    _ => {}
                }
            }
            Ok::<_, Infallible>(answer(&request, &script, &log))
        }
    });
    let watches = Watches::new(&process::metrics::Registry::new());
    let settings = ("culvert-system".to_owned(), "culvert".to_owned());
    let (source, feed) = Source::new(Client::new(service, "default"), settings, watches.clone());
    (source, feed, watches, asked)
}

/// The next event of a kind, as text.
async fn next_change(feed: &mut control_plane::source::Feed, kind: Kind) -> String {
    let text = |event: Event| match event.change {
        Change::Set(decoded) => {
            format!("{} {}", decoded.metadata("name"), decoded.bookkeeping.resource_version)
        }
        Change::Gone { name, .. } => format!("no {name}"),
        Change::Listing => "listing".to_owned(),
        Change::Listed => "listed".to_owned(),
        Change::NotServed => "not served".to_owned(),
        Change::KindDeleted => "kind deleted".to_owned(),
    };
    loop {
        let event = feed.events.recv().await.unwrap();
        if event.kind == kind {
            return text(event);
        }
    }
}

/// So many events of a kind.
async fn changes(
    feed: &mut control_plane::source::Feed,
    kind: Kind,
    count: usize,
    limit: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    while found.len() < count {
        let next = tokio::time::timeout(limit, next_change(feed, kind)).await;
        found.push(next.unwrap_or_else(|_| panic!("no more than {found:?}")));
    }
    found
}

async fn pods_within(feed: &mut control_plane::source::Feed, count: usize, limit: Duration) -> Vec<String> {
    changes(feed, Kind::Pod, count, limit).await
}

async fn pods(feed: &mut control_plane::source::Feed, count: usize) -> Vec<String> {
    pods_within(feed, count, Duration::from_secs(60)).await
}

fn changed(kind: &str, object: &Value) -> Value {
    json!({ "type": kind, "object": object })
}

#[tokio::test]
async fn a_server_that_refuses_forgets_and_breaks_off_is_followed_to_the_same_end() {
    let (source, mut feed, watches, asked) = source(vec![
        Script::Status(429),
        Script::Status(503),
        Script::List(&["a", "b"], 10),
        // It breaks off: the watch goes on where it was.
        Script::Watch(vec![changed("MODIFIED", &pod("a", 11))], false),
        // It has forgotten (an event of the watch): everything is listed again.
        Script::Watch(vec![changed("DELETED", &pod("b", 12)), changed("ERROR", &status(410))], true),
        Script::List(&["a", "c"], 20),
        // It has forgotten (the answer to the watch): likewise.
        Script::Status(410),
        Script::List(&["c"], 30),
        Script::Watch(vec![changed("ADDED", &pod("d", 31))], true),
    ]);
    source.start_others();
    let found = pods(&mut feed, 16).await;
    assert_eq!(
        found.join(", "),
        "listing, listing, listing, a 10, b 10, listed, a 11, no b, listing, a 20, c 20, listed, listing, c 30, listed, d 31"
    );
    assert_eq!(watches.failing(), 0);
    let asked = asked.lock().unwrap().join(" ");
    assert!(asked.starts_with("list list list watch watch list watch list watch"), "{asked}");
}

#[tokio::test]
async fn listing_again_is_asked_for_by_the_registry() {
    let (source, mut feed, _, _) = source(vec![
        Script::List(&["a"], 10),
        Script::Watch(Vec::new(), true),
        Script::List(&["a", "b"], 20),
    ]);
    source.start_others();
    assert_eq!(pods(&mut feed, 3).await, ["listing", "a 10", "listed"]);
    // The watch may only just have begun.
    tokio::time::sleep(Duration::from_millis(200)).await;
    feed.relist.send_modify(|count| *count += 1);
    assert_eq!(pods(&mut feed, 4).await, ["listing", "a 20", "b 20", "listed"]);
}

/// Waits until so many watches fail.
async fn until_failing(watches: &Watches, count: u64) {
    let wait = async {
        while watches.failing() != count {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(600), wait).await.expect("it does not come to that");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_answered_again_is_not_said_to_fail_although_nothing_happens() {
    let (source, mut feed, watches, _) = source(vec![
        Script::List(&["a"], 10),
        Script::Watch(vec![changed("ERROR", &status(500))], true),
        Script::Status(503),
        Script::Status(503),
        // From here on there is nothing to be told.
        Script::Watch(Vec::new(), true),
    ]);
    source.start_others();
    assert_eq!(pods(&mut feed, 3).await, ["listing", "a 10", "listed"]);
    until_failing(&watches, 1).await;
    until_failing(&watches, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_asked_again() {
    let (source, mut feed, watches, asked) = source(vec![
        Script::Silence,
        Script::List(&["a"], 10),
        // It answers, and is never heard of again: no event, no bookmark, no end.
        Script::Watch(Vec::new(), true),
        Script::Silence,
        Script::Watch(vec![changed("MODIFIED", &pod("a", 11))], true),
    ]);
    source.start_others();
    tokio::time::sleep(Duration::from_secs(130)).await;
    assert!(asked.lock().unwrap().starts_with(&["silence".to_owned()]));
    let found = pods_within(&mut feed, 5, Duration::from_secs(600)).await;
    assert_eq!(found, ["listing", "listing", "a 10", "listed", "a 11"], "resumed where it was");
    assert_eq!(*asked.lock().unwrap(), ["silence", "list", "watch", "silence", "watch"]);
    until_failing(&watches, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_server_is_waited_for() {
    let (source, mut feed, watches, asked) = source(vec![
        Script::After(30),
        Script::List(&["a", "b"], 10),
        Script::After(60),
        Script::Watch(vec![changed("MODIFIED", &pod("a", 11))], false),
        Script::After(90),
        Script::Watch(vec![changed("DELETED", &pod("b", 12))], true),
    ]);
    source.start_others();
    let found = pods_within(&mut feed, 6, Duration::from_secs(600)).await;
    assert_eq!(found, ["listing", "a 10", "b 10", "listed", "a 11", "no b"]);
    assert_eq!((watches.failing(), asked.lock().unwrap().join(" ")), (0, "list watch watch".to_owned()));
}

/// What becomes of the kind AuthorizationPolicy and its definition.
#[derive(Clone, Copy, PartialEq)]
enum Crd {
    Served,
    /// Not served; asked for the definition itself, the server answers with this status.
    Away(u16),
}

fn answer_kind(request: &Request<Body>, crd: &tokio::sync::watch::Receiver<Crd>) -> Answer {
    const GROUP: &str = "security.istio.io";
    let group =
        json!({ "name": GROUP, "versions": [{ "groupVersion": "security.istio.io/v1", "version": "v1" }] });
    let resources = json!([{ "name": "authorizationpolicies", "singularName": "", "namespaced": true,
        "kind": "AuthorizationPolicy", "verbs": ["list"] }]);
    let state = *crd.borrow();
    let served = state == Crd::Served;
    let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    match (request.uri().path(), state) {
        ("/apis", _) => {
            let groups = if served { json!([group]) } else { json!([]) };
            whole(200, &json!({ "kind": "APIGroupList", "groups": groups }))
        }
        ("/apis/security.istio.io/v1", Crd::Served) => whole(
            200,
            &json!({ "kind": "APIResourceList", "groupVersion": "security.istio.io/v1", "resources": resources }),
        ),
        ("/apis/security.istio.io/v1/authorizationpolicies", Crd::Served) if watches => {
            // It ends when the kind goes.
            let mut gone = crd.clone();
            let end = stream::once(async move {
                let _ = gone.wait_for(|crd| *crd != Crd::Served).await;
            });
            let frames = end.filter_map(|()| async { None::<Result<Frame<Bytes>, Infallible>> });
            Response::new(StreamBody::new(frames).boxed_unsync())
        }
        ("/apis/security.istio.io/v1/authorizationpolicies", Crd::Served) => {
            let metadata = json!({ "name": "p", "namespace": "shop", "resourceVersion": "1" });
            let policy = json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": metadata, "spec": {} });
            list(&[policy], 1)
        }
        (path, Crd::Away(200)) if path.contains("customresourcedefinitions") => whole(
            200,
            &json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": { "name": "x" } }),
        ),
        (path, Crd::Away(code)) if path.contains("customresourcedefinitions") => {
            assert!(path.ends_with("/authorizationpolicies.security.istio.io"), "{path}");
            whole(code, &status(code))
        }
        (path, _) if path.starts_with("/apis/security") || path.starts_with("/apis/networking") => {
            whole(404, &status(404))
        }
        _ if watches => watch(Vec::new(), true),
        _ => list(&[], 1),
    }
}

/// A source on a server with the kind, listed; and what became of it.
async fn with_kind()
-> (tokio::sync::watch::Sender<Crd>, control_plane::source::Feed, process::metrics::Registry) {
    let (crd, state) = tokio::sync::watch::channel(Crd::Served);
    let service = tower::service_fn(move |request: Request<Body>| {
        let answer = answer_kind(&request, &state);
        async move { Ok::<_, Infallible>(answer) }
    });
    let metrics = process::metrics::Registry::new();
    let settings = ("culvert-system".to_owned(), "culvert".to_owned());
    let (source, mut feed) = Source::new(Client::new(service, "default"), settings, Watches::new(&metrics));
    source.start_others();
    let listed = changes(&mut feed, Kind::AuthorizationPolicy, 3, Duration::from_secs(60)).await;
    assert_eq!(listed, ["listing", "p 1", "listed"]);
    (crd, feed, metrics)
}

fn kinds_away(metrics: &process::metrics::Registry) -> bool {
    metrics.encode(process::metrics::Format::Prometheus).contains("culvertd_kinds_not_served 1")
}

#[tokio::test(start_paused = true)]
async fn the_objects_of_a_kind_that_was_deleted_go_and_those_of_one_that_is_away_stay() {
    let policies = Kind::AuthorizationPolicy;
    // The definition is there; or nobody may look. They stay however long it lasts.
    for code in [200, 403, 503] {
        let (crd, mut feed, metrics) = with_kind().await;
        crd.send_replace(Crd::Away(code));
        assert_eq!(changes(&mut feed, policies, 1, Duration::from_secs(60)).await, ["not served"], "{code}");
        let more = tokio::time::timeout(Duration::from_secs(3600), next_change(&mut feed, policies)).await;
        assert!(more.is_err(), "{code}: {more:?}");
        assert!(kinds_away(&metrics), "{code}");
        // It comes back, and what the new list lacks is gone.
        crd.send_replace(Crd::Served);
        let back = changes(&mut feed, policies, 3, Duration::from_secs(60)).await;
        assert_eq!(back, ["listing", "p 1", "listed"], "{code}");
        assert!(!kinds_away(&metrics), "{code}");
    }
    let (crd, mut feed, metrics) = with_kind().await;
    crd.send_replace(Crd::Away(404));
    assert_eq!(changes(&mut feed, policies, 1, Duration::from_secs(60)).await, ["not served"]);
    let soon = tokio::time::timeout(Duration::from_secs(50), next_change(&mut feed, policies)).await;
    assert!(soon.is_err(), "not at once: {soon:?}");
    assert_eq!(changes(&mut feed, policies, 1, Duration::from_secs(60)).await, ["kind deleted"]);
    assert!(!kinds_away(&metrics));
    crd.send_replace(Crd::Served);
    let back = changes(&mut feed, policies, 3, Duration::from_secs(60)).await;
    assert_eq!(back, ["listing", "p 1", "listed"]);
}
