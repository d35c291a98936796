//! Watches of an API server that refuses (429), forgets (410), breaks off and comes back. A real one does so seldom, so
//! here a script answers; on a real one it all goes well in `cluster.rs`.
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
}

fn pod(name: &str, version: u32) -> Value {
    let metadata = json!({ "name": name, "namespace": "shop", "resourceVersion": version.to_string() });
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata })
}

fn status(code: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code,
        "reason": if code == 410 { "Expired" } else { "TooManyRequests" }, "message": "as the script says",
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

/// Answers for pods by the script, and for all else that there is nothing.
fn answer(request: &Request<Body>, script: &Mutex<VecDeque<Script>>, asked: &Mutex<Vec<String>>) -> Answer {
    let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    if request.uri().path() != "/api/v1/pods" {
        return match request.uri().path() {
            "/apis" => whole(200, &json!({ "kind": "APIGroupList", "groups": [] })),
            path if path.starts_with("/apis/security") || path.starts_with("/apis/networking") => {
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
        let response = answer(&request, &script, &log);
        async move { Ok::<_, Infallible>(response) }
    });
    let watches = Watches::new(&process::metrics::Registry::new());
    let settings = ("culvert-system".to_owned(), "culvert".to_owned());
    let (source, feed) = Source::new(Client::new(service, "default"), settings, watches.clone());
    (source, feed, watches, asked)
}

/// The events of pods, as text, until there are so many.
async fn pods(feed: &mut control_plane::source::Feed, count: usize) -> Vec<String> {
    let text = |event: Event| match event.change {
        Change::Set(decoded) => {
            format!("{} {}", decoded.metadata("name"), decoded.bookkeeping.resource_version)
        }
        Change::Gone { name, .. } => format!("no {name}"),
        Change::Listing => "listing".to_owned(),
        Change::Listed => "listed".to_owned(),
        Change::NotServed => "not served".to_owned(),
    };
    let mut found = Vec::new();
    while found.len() < count {
        let event = tokio::time::timeout(Duration::from_secs(60), feed.events.recv()).await;
        let event = event.unwrap_or_else(|_| panic!("no more than {found:?}")).unwrap();
        if event.kind == Kind::Pod {
            found.push(text(event));
        }
    }
    found
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
