//! Our client at a server of another make, which does what is written here and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::wire::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use proto::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use proto::wire::rpc;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use xds::client::{Client, Link, Rejection, Settings, Update, Updates};

const A: &str = "type.googleapis.com/test.A";
const B: &str = "type.googleapis.com/test.B";
const OWN: &str = "type.googleapis.com/culvert.Test";
const SOON: Duration = Duration::from_secs(10);

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// A stream as the server sees it.
struct Stream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: Responses,
    cluster: String,
}

impl Stream {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        timeout(SOON, self.requests.message()).await.unwrap().unwrap().expect("the client goes on")
    }

    async fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.unwrap();
    }
}

/// What it sends its streams to, and the extensions that it says it knows.
struct Service(mpsc::Sender<Stream>, Option<&'static str>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let cluster = request.metadata().get("clusterid").unwrap().to_str().unwrap().to_owned();
        let (responses, receiver) = mpsc::channel(4);
        let stream = Stream { requests: request.into_inner(), responses, cluster };
        self.0.send(stream).await.map_err(|_| Status::unavailable("the test is over"))?;
        let mut response = Response::new(ReceiverStream::new(receiver));
        if let Some(known) = self.1 {
            response.metadata_mut().insert(xds::EXTENSIONS_HEADER, known.parse().unwrap());
        }
        Ok(response)
    }
}

/// The server's streams, the client's updates, and its link.
async fn start(
    change: impl FnOnce(&mut Settings),
) -> (mpsc::Receiver<Stream>, Updates, tokio::sync::watch::Receiver<Link>) {
    start_with(None, change).await
}

async fn start_with(
    extensions: Option<&'static str>,
    change: impl FnOnce(&mut Settings),
) -> (mpsc::Receiver<Stream>, Updates, tokio::sync::watch::Receiver<Link>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, streams) = mpsc::channel(4);
    let service = AggregatedDiscoveryServiceServer::new(Service(sender, extensions));
    let router = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let mut settings = Settings {
        addresses: vec![format!("http://{address}")],
        node: proto::wire::core::Node { id: "z".into(), ..Default::default() },
        types: vec![A, B],
        backoff: Duration::from_millis(20),
        ..Settings::default()
    };
    change(&mut settings);
    let (client, updates) = Client::new(settings, Arc::new(())).unwrap();
    let link = client.link();
    tokio::spawn(client.run());
    (streams, updates, link)
}

fn resource(name: &str, type_url: &str, body: &[u8]) -> Resource {
    let content = prost_types::Any { type_url: type_url.into(), value: body.to_vec() };
    Resource { version: format!("v-{name}"), name: name.into(), resource: Some(content), aliases: vec![] }
}

fn response(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        // As an istiod writes it.
        system_version_info: "2026-11-21T10:00:00Z/7".into(),
        resources,
        type_url: A.into(),
        nonce: nonce.into(),
        removed_resources: removed.iter().map(|n| (*n).to_owned()).collect(),
    }
}

async fn next(updates: &mut Updates) -> Update {
    timeout(SOON, updates.next()).await.unwrap().unwrap()
}

fn violations(request: &DeltaDiscoveryRequest) -> Vec<(String, String)> {
    let details = &request.error_detail.as_ref().unwrap().details;
    assert_eq!(details[0].type_url, "type.googleapis.com/google.rpc.BadRequest");
    let bad = rpc::BadRequest::decode(details[0].value.as_slice()).unwrap();
    bad.field_violations.into_iter().map(|v| (v.field, v.description)).collect()
}

#[tokio::test]
async fn it_subscribes_acknowledges_and_comes_back_with_what_it_holds() {
    let (mut streams, mut updates, link) = start(|_| {}).await;
    let mut stream = streams.recv().await.unwrap();
    assert_eq!(stream.cluster, "Kubernetes");
    let (first, second) = (stream.request().await, stream.request().await);
    assert_eq!((first.type_url.as_str(), second.type_url.as_str()), (A, B));
    assert_eq!(first.node.as_ref().unwrap().id, "z");
    for request in [&first, &second] {
        assert!(request.resource_names_subscribe.is_empty() && request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty() && request.error_detail.is_none());
    }
    assert_eq!(*link.borrow(), Link::Starting);

    stream.send(response("n-1", vec![resource("one", A, b"1"), resource("two", A, b"1")], &[])).await;
    let update = next(&mut updates).await;
    assert!(matches!(*link.borrow(), Link::Connected { .. }));
    assert!(update.complete, "what others send is whole");
    assert_eq!((update.resources.len(), &update.resources[0].body[..]), (2, &b"1"[..]));
    // Nothing is acknowledged until it is in force.
    assert!(timeout(Duration::from_millis(200), stream.requests.message()).await.is_err());
    update.ack();
    let ack = stream.request().await;
    assert_eq!((ack.type_url.as_str(), ack.response_nonce.as_str()), (A, "n-1"));
    assert!(ack.error_detail.is_none() && ack.node.is_none() && ack.resource_names_subscribe.is_empty());

    stream.send(response("n-2", vec![resource("three", A, b"1")], &["one", "never"])).await;
    let update = next(&mut updates).await;
    assert_eq!(update.removed, ["one", "never"]);
    update.ack();
    assert_eq!(stream.request().await.response_nonce, "n-2");

    // The server ends the stream.
    drop(stream);
    let mut stream = streams.recv().await.unwrap();
    let first = stream.request().await;
    let held: Vec<_> =
        first.initial_resource_versions.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(held, [("three", "v-three"), ("two", "v-two")]);
    assert!(stream.request().await.initial_resource_versions.is_empty(), "the other type has nothing");
}

/// istiod warns of a type that it does not know, and answers for it with each of its pushes.
#[tokio::test]
async fn a_type_of_our_own_is_asked_for_only_where_it_is_known() {
    for (extensions, asked) in [(None, &[A, B][..]), (Some("2"), &[A, B]), (Some("1"), &[A, OWN, B])] {
        let types = vec![OWN, A, B];
        let (mut streams, mut updates, _) = start_with(extensions, |settings| settings.types = types).await;
        let mut stream = streams.recv().await.unwrap();
        for (place, type_url) in asked.iter().enumerate() {
            let request = stream.request().await;
            assert_eq!((request.type_url.as_str(), request.node.is_some()), (*type_url, place == 0));
        }
        // Nothing more: what comes next is the acknowledgement of what is sent now.
        stream.send(response("n1", vec![], &[])).await;
        next(&mut updates).await.ack();
        assert_eq!(stream.request().await.response_nonce, "n1");
    }
}

/// gRPC servers written in Go end a connection that is probed more often than they allow: istiod every 15 s, by default.
#[test]
fn the_connection_is_not_probed_more_often_than_an_istiod_allows() {
    assert!(Settings::default().keepalive > Duration::from_secs(15));
}

#[tokio::test]
async fn what_is_refused_is_named_and_not_held() {
    let (mut streams, mut updates, _) = start(|_| {}).await;
    let mut stream = streams.recv().await.unwrap();
    stream.request().await;
    stream.request().await;
    let nameless = resource("", A, b"");
    let empty = Resource { resource: None, ..resource("empty", A, b"") };
    let twice = [resource("twice", A, b"first"), resource("twice", A, b"second")];
    let resources =
        [vec![resource("good", A, b"1"), resource("bad", A, b"1"), resource("other", B, b"1")], twice.into()];
    let resources = [resources.concat(), vec![nameless, empty]].concat();
    stream.send(response("n-1", resources, &[])).await;
    let update = next(&mut updates).await;
    // What is malformed is not seen; the others are.
    let seen: Vec<_> = update.resources.iter().map(|r| (&*r.name, &r.body[..])).collect();
    assert_eq!(seen, [("good", &b"1"[..]), ("bad", b"1"), ("twice", b"first")]);
    update.nack(vec![Rejection { name: "bad".into(), reason: "it makes no sense".into() }]);
    let nack = stream.request().await;
    assert_eq!(nack.response_nonce, "n-1");
    let status = nack.error_detail.as_ref().unwrap();
    assert_eq!(status.code, 3);
    assert!(status.message.starts_with("5 refused; other: "), "{}", status.message);
    assert!(status.message.contains("bad: it makes no sense"), "{}", status.message);
    let named: Vec<_> = violations(&nack).into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, ["", "bad", "empty", "other", "twice"]);

    // A type that nobody asked for is refused, and harms nothing.
    stream.send(DeltaDiscoveryResponse { type_url: "x".into(), ..response("n-2", vec![], &[]) }).await;
    let nack = stream.request().await;
    assert_eq!((nack.type_url.as_str(), nack.response_nonce.as_str()), ("x", "n-2"));
    assert!(nack.error_detail.unwrap().message.contains("not asked for"));

    // An update that is dropped is refused whole.
    stream.send(response("n-3", vec![resource("dropped", A, b"1")], &[])).await;
    drop(next(&mut updates).await);
    assert_eq!(
        violations(&stream.request().await),
        [("dropped".to_owned(), "it was not applied".to_owned())]
    );

    drop(stream);
    let mut stream = streams.recv().await.unwrap();
    let held: Vec<_> = stream.request().await.initial_resource_versions.into_keys().collect();
    assert_eq!(held, ["good", "twice"], "what is in force, or a removal would be missed");
}

#[tokio::test]
async fn thousands_of_refusals_are_cut() {
    let (mut streams, mut updates, _) = start(|_| {}).await;
    let mut stream = streams.recv().await.unwrap();
    stream.request().await;
    stream.request().await;
    let resources = (0..5000).map(|n| resource(&format!("name-{n}"), A, b"1")).collect();
    stream.send(response("n-1", resources, &[])).await;
    let update = next(&mut updates).await;
    let rejection = |r: &xds::client::Resource| Rejection { name: r.name.clone(), reason: "no".into() };
    let rejections = update.resources.iter().map(rejection).collect();
    update.nack(rejections);
    let nack = stream.request().await;
    assert!(nack.encoded_len() < 20_000, "{} bytes", nack.encoded_len());
    let named = violations(&nack);
    assert_eq!(named.last().unwrap(), &(String::new(), "and 4500 more".to_owned()));
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_left() {
    let (mut streams, mut updates, mut link) = start(|s| s.answer_timeout = Duration::from_millis(300)).await;
    let silent = streams.recv().await.unwrap();
    let left = |l: &Link| matches!(l, Link::Away { error, .. } if error.contains("did not answer"));
    timeout(SOON, link.wait_for(left)).await.unwrap().unwrap();
    let stream = streams.recv().await.unwrap();
    stream.send(response("n-1", vec![], &[])).await;
    let update = next(&mut updates).await;
    assert!(update.complete && update.resources.is_empty());
    drop(silent);
}

#[tokio::test]
async fn a_message_that_is_too_long_is_an_error_that_says_so() {
    let (mut streams, _updates, mut link) = start(|s| s.message_bytes = 1000).await;
    let stream = streams.recv().await.unwrap();
    stream.send(response("n-1", vec![resource("long", A, &[7; 2000])], &[])).await;
    let too_long = |l: &Link| matches!(l, Link::Away { error, .. } if error.contains("too large"));
    timeout(SOON, link.wait_for(too_long)).await.unwrap().unwrap();
}

/// An istiod sends a whole state in one response.
#[tokio::test]
async fn a_long_response_is_read_in_parts_and_answered_once() {
    let (mut streams, mut updates, _) = start(|_| {}).await;
    let mut stream = streams.recv().await.unwrap();
    stream.request().await;
    stream.request().await;
    stream.send(response("n-0", vec![resource("old", A, b"1"), resource("9", A, b"1")], &[])).await;
    next(&mut updates).await.ack();
    stream.request().await;

    let mut resources: Vec<_> = (0..20).map(|n| resource(&n.to_string(), A, &[n; 600_000])).collect();
    resources.push(resource("0", A, b"again"));
    resources.insert(7, resource("other", B, b"1"));
    // What is removed and set in one is there, wherever it is set.
    stream.send(response("n-1", resources, &["9", "old"])).await;
    let (mut seen, mut parts) = (Vec::new(), 0);
    loop {
        let update = next(&mut updates).await;
        parts += 1;
        let bytes: usize = update.resources.iter().map(|r| r.body.len()).sum();
        assert!(bytes < 2 << 20, "{bytes} bytes at once");
        seen.extend(update.resources.iter().map(|r| r.name.to_string()));
        let complete = update.complete;
        assert_eq!(update.removed, if complete { vec!["old"] } else { vec![] });
        // Nothing is answered before all of it was.
        assert!(timeout(Duration::from_millis(20), stream.requests.message()).await.is_err());
        let bad = update.resources.iter().filter(|r| ["3", "19"].contains(&&*r.name));
        let bad = bad.map(|r| Rejection { name: r.name.clone(), reason: "no".into() }).collect();
        update.nack(bad);
        if complete {
            break;
        }
    }
    assert!(parts > 5, "{parts}");
    assert_eq!(seen, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    let nack = stream.request().await;
    assert_eq!((nack.type_url.as_str(), nack.response_nonce.as_str()), (A, "n-1"));
    let named: Vec<_> = violations(&nack).into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, ["0", "19", "3", "other"]);

    drop(stream);
    let held = streams.recv().await.unwrap().request().await.initial_resource_versions;
    assert!(held.len() == 18 && held.contains_key("9") && !held.contains_key("old"), "{:?}", held.keys());
}

/// One that is of another type at the head of a part says nothing of those behind it.
#[tokio::test]
async fn a_foreign_resource_at_the_head_of_a_part_is_refused_alone() {
    let (mut streams, mut updates, _) = start(|_| {}).await;
    let mut stream = streams.recv().await.unwrap();
    stream.request().await;
    stream.request().await;
    // A part is full with three: each begins with one that is not of the response's type.
    let of = |n: usize| match n % 3 {
        0 if n.is_multiple_of(2) => B,
        0 => "type.googleapis.com/test.Unknown",
        _ => A,
    };
    let resources = (0..24).map(|n| resource(&format!("{n:02}"), of(n), &[7; 500_000])).collect();
    stream.send(response("n-1", resources, &[])).await;
    let (mut seen, mut parts) = (Vec::new(), 0);
    loop {
        let update = next(&mut updates).await;
        assert_eq!(update.type_url, A);
        seen.extend(update.resources.iter().map(|r| r.name.to_string()));
        parts += 1;
        let complete = update.complete;
        update.ack();
        if complete {
            break;
        }
    }
    let name = |n: usize| format!("{n:02}");
    assert_eq!(seen, (0..24).filter(|n| n % 3 > 0).map(name).collect::<Vec<_>>());
    assert!(parts > 5, "{parts}");
    let named: Vec<_> = violations(&stream.request().await).into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, (0..24).step_by(3).map(name).collect::<Vec<_>>());
}

/// Policies in parts would let in, for a moment, what neither the state before nor the one after does.
#[tokio::test]
async fn what_belongs_together_is_handed_out_at_once() {
    const POLICY: &str = proto::AUTHORIZATION_TYPE_URL;
    let (mut streams, mut updates, _) = start(|settings| settings.types = vec![POLICY, A]).await;
    let mut stream = streams.recv().await.unwrap();
    stream.request().await;
    stream.request().await;
    let policies = |nonce: &str, resources, removed: &[&str]| DeltaDiscoveryResponse {
        type_url: POLICY.into(),
        ..response(nonce, resources, removed)
    };
    stream.send(policies("n-0", vec![resource("old", POLICY, b"1")], &[])).await;
    next(&mut updates).await.ack();
    stream.request().await;
    let mut resources: Vec<_> = (0..20).map(|n| resource(&n.to_string(), POLICY, &[n; 600_000])).collect();
    resources.insert(0, resource("other", A, b"1"));
    stream.send(policies("n-1", resources.clone(), &["old"])).await;
    let update = next(&mut updates).await;
    let seen: Vec<_> = update.resources.iter().map(|r| r.name.to_string()).collect();
    assert_eq!(seen, (0..20).map(|n: u8| n.to_string()).collect::<Vec<_>>());
    assert_eq!((update.complete, update.removed.clone()), (true, vec!["old".to_owned()]));
    update.ack();
    let named: Vec<_> = violations(&stream.request().await).into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, ["other"]);

    // More than may be held for it is refused, and nothing of it is in force.
    let resources = (0..8).map(|n| resource(&format!("long-{n}"), POLICY, &vec![n; 9 << 20])).collect();
    stream.send(policies("n-2", resources, &["0"])).await;
    let nack = stream.request().await;
    assert_eq!(nack.response_nonce, "n-2");
    assert!(nack.error_detail.as_ref().unwrap().message.contains("64 MiB"), "{:?}", nack.error_detail);
    // It goes on.
    stream.send(policies("n-3", vec![resource("new", POLICY, b"1")], &[])).await;
    let update = next(&mut updates).await;
    assert_eq!((update.resources.len(), update.removed.len()), (1, 0));
    update.ack();
    assert!(stream.request().await.error_detail.is_none());
    drop(stream);
    let held = streams.recv().await.unwrap().request().await.initial_resource_versions;
    assert!(held.len() == 21 && held.contains_key("0") && held.contains_key("new"), "{:?}", held.keys());
}
