//! Our client and our server over loopback: TLS, tokens, restarts, other servers, slow and silent clients.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod network;
mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use network::{Site, trust};
use proto::Extensions;
use proto::wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use support::{ADDRESS, POLICY, remove, set, subscribe};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};
use xds::client::{Client, Event, Link, NodeInfo, Origin, Rejection, Settings, Termination, Update};
use xds::server::{Config, Holds, Limits};

const SOON: Duration = Duration::from_secs(20);

fn config() -> Config {
    Config { types: vec![POLICY, ADDRESS], ..Config::default() }
}

fn settings(addresses: &[String]) -> Settings {
    let info = NodeInfo {
        ip: "10.0.0.1".parse().unwrap(),
        name: "ztunnel-1".into(),
        namespace: "mesh".into(),
        node_name: "node-1".into(),
        cluster_id: "Kubernetes".into(),
        version: "test".into(),
    };
    static TOKENS: AtomicUsize = AtomicUsize::new(0);
    let number = TOKENS.fetch_add(1, Ordering::Relaxed);
    let token = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("xds-token-{number}"));
    std::fs::write(&token, "good").unwrap();
    Settings {
        addresses: addresses.to_vec(),
        token_file: Some(token),
        node: info.node(),
        types: vec![POLICY, ADDRESS],
        backoff: Duration::from_millis(20),
        backoff_max: Duration::from_millis(100),
        ..Settings::default()
    }
}

#[derive(Default)]
struct Seen {
    terminations: Mutex<Vec<Termination>>,
    messages: Mutex<usize>,
    bytes: Mutex<usize>,
    lost: Mutex<Vec<String>>,
}

impl xds::client::Observer for Seen {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Terminated(why) => self.terminations.lock().unwrap().push(why),
            Event::Message { bytes, .. } => {
                *self.messages.lock().unwrap() += 1;
                *self.bytes.lock().unwrap() += bytes;
            }
            Event::StateLost(why) => self.lost.lock().unwrap().push(why.to_owned()),
            Event::Connected(_) | Event::Rejected { .. } => {}
        }
    }
}

#[derive(Clone, Default)]
struct State {
    held: BTreeMap<(&'static str, String), String>,
    complete: Vec<&'static str>,
    /// Resources that came from a server, and updates.
    resources: usize,
    updates: usize,
    from_disk: usize,
}

impl State {
    fn bodies(&self, type_url: &str) -> BTreeMap<String, String> {
        let held = self.held.iter().filter(|((t, _), _)| *t == type_url);
        held.map(|((_, name), body)| (name.clone(), body.clone())).collect()
    }
}

/// A node proxy that holds what it is sent, and refuses what has `bad` in it.
struct Proxy {
    state: watch::Receiver<State>,
    link: watch::Receiver<Link>,
    seen: Arc<Seen>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

fn apply(state: &mut State, update: &Update) -> Vec<Rejection> {
    let mut rejections = Vec::new();
    for name in &update.removed {
        state.held.remove(&(update.type_url, name.clone()));
    }
    for resource in &update.resources {
        let body = String::from_utf8(resource.body.to_vec()).unwrap();
        if body.contains("bad") {
            rejections.push(Rejection { name: resource.name.clone(), reason: "it is bad".into() });
            continue;
        }
        state.held.insert((update.type_url, resource.name.to_string()), body);
    }
    if update.complete && !state.complete.contains(&update.type_url) {
        state.complete.push(update.type_url);
    }
    match update.origin {
        Origin::Server => state.resources += update.resources.len(),
        Origin::Disk => state.from_disk += update.resources.len(),
    }
    state.updates += 1;
    rejections
}

impl Proxy {
    fn start(settings: Settings) -> Self {
        let seen = Arc::new(Seen::default());
        let (client, mut updates) =
            Client::new(settings, Arc::clone(&seen) as Arc<dyn xds::client::Observer>).unwrap();
        let link = client.link();
        let (sender, state) = watch::channel(State::default());
        let run = tokio::spawn(client.run());
        let read = tokio::spawn(async move {
            while let Some(update) = updates.next().await {
                let mut rejections = Vec::new();
                sender.send_modify(|state| rejections = apply(state, &update));
                update.nack(rejections);
            }
        });
        Self { state, link, seen, tasks: [run, read] }
    }

    async fn until(&self, holds: impl Fn(&State) -> bool) -> State {
        let mut state = self.state.clone();
        let waited = timeout(SOON, state.wait_for(|s| holds(s))).await;
        let waited = waited.unwrap_or_else(|_| {
            panic!("not in time; link {:?}, held {:?}", self.link.borrow(), self.state.borrow().held.len())
        });
        waited.unwrap().clone()
    }

    async fn until_has(&self, type_url: &'static str, name: &str, body: &str) -> State {
        self.until(|s| s.held.get(&(type_url, name.to_owned())).is_some_and(|b| b == body)).await
    }

    async fn stop(self) {
        for task in self.tasks {
            task.abort();
            let _ = task.await;
        }
    }
}

fn http(site: &Site) -> String {
    format!("http://{}", site.address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_arrives_over_tls_and_its_acknowledgement_comes_back() {
    let trust = trust();
    let site = Site::at("127.0.0.1:0".parse().unwrap(), config(), Some(&trust)).await;
    site.server.apply([set(POLICY, "p", "1"), set(ADDRESS, "a", "1")]);
    site.server.ready();
    let directory = tempfile::tempdir().unwrap();
    let root_file = directory.path().join("root.pem");
    // Another root stands in the file at first: it is read again at each connect.
    std::fs::write(&root_file, network::trust().root).unwrap();
    let mut settings = settings(&[format!("https://localhost:{}", site.address.port())]);
    settings.root_file = Some(root_file.clone());
    let proxy = Proxy::start(settings);
    let mut link = proxy.link.clone();
    let away =
        timeout(SOON, link.wait_for(|l| matches!(l, Link::Away { .. }))).await.unwrap().unwrap().clone();
    assert!(format!("{away:?}").contains("invalid peer certificate"), "{away:?}");
    std::fs::write(&root_file, &trust.root).unwrap();

    let state = proxy.until(|s| s.complete.len() == 2).await;
    assert_eq!(state.complete, [POLICY, ADDRESS]);
    assert_eq!(state.held.len(), 2);
    let before = site.server.progress();
    let made = site.server.apply([set(ADDRESS, "a", "2"), remove(POLICY, "p")]);
    let state = proxy.until_has(ADDRESS, "a", "2").await;
    assert_eq!(state.resources, 3);
    site.until(|s| s.clients()[0].holds(ADDRESS, "a", made) == Holds::Yes).await;
    site.until(|s| s.clients()[0].holds(POLICY, "p", made) == Holds::Yes).await;
    assert!(before.has_changed().unwrap());
    assert_eq!(proxy.state.borrow().bodies(POLICY), BTreeMap::new());

    let client = site.server.clients().remove(0);
    assert_eq!(client.audience, Extensions::Culvert);
    assert_eq!(client.node.id, "ztunnel~10.0.0.1~ztunnel-1.mesh~mesh.svc.cluster.local");
    assert_eq!(&*client.caller.name, "tester");
    assert!(client.peer.unwrap().ip().is_loopback());
    site.until(|_| !site.counts.converged.lock().unwrap().is_empty()).await;
    assert!(site.counts.queued.load(Ordering::Relaxed) > 0, "the change waited for its turn");
    let slowest = site.counts.converged.lock().unwrap().iter().max().copied().unwrap();
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    assert!(*proxy.seen.bytes.lock().unwrap() > 100);
    assert!(proxy.seen.terminations.lock().unwrap().contains(&Termination::ConnectionError));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_tokens_and_other_nodes_are_refused_and_a_new_token_is_read() {
    let site = Site::new(config()).await;
    site.server.apply([set(ADDRESS, "a", "1")]);
    site.server.ready();
    let settings = settings(&[http(&site)]);
    let token = settings.token_file.clone().unwrap();
    std::fs::write(&token, "expired").unwrap();
    let proxy = Proxy::start(settings.clone());
    let mut link = proxy.link.clone();
    let refused =
        |text: &'static str| move |l: &Link| matches!(l, Link::Away { error, .. } if error.contains(text));
    timeout(SOON, link.wait_for(refused("this token is not good"))).await.unwrap().unwrap();
    std::fs::remove_file(&token).unwrap();
    timeout(SOON, link.wait_for(refused("can't read"))).await.unwrap().unwrap();
    std::fs::write(&token, "good\n").unwrap();
    proxy.until_has(ADDRESS, "a", "1").await;
    assert!(site.counts.refused.load(Ordering::Relaxed) > 0);

    let mut liar = settings;
    liar.node.id = "liar".into();
    let liar = Proxy::start(liar);
    let mut link = liar.link.clone();
    timeout(SOON, link.wait_for(refused("the token is of another node"))).await.unwrap().unwrap();
    assert_eq!(site.server.clients().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_server_sends_nothing_again() {
    let site = Site::new(config()).await;
    let address = site.address;
    let all = || (0..500).map(|n| set(ADDRESS, &format!("name-{n}"), "1")).chain([set(POLICY, "p", "1")]);
    site.server.apply(all());
    site.server.ready();
    let proxy = Proxy::start(settings(&[http(&site)]));
    let state = proxy.until(|s| s.complete.len() == 2).await;
    assert_eq!((state.held.len(), state.resources), (501, 501));
    site.stop().await;

    // While it compiles, it must not say that all is gone.
    let site = Site::at(address, config(), None).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(proxy.state.borrow().held.len(), 501);
    site.server.apply(all());
    site.server.apply([set(ADDRESS, "name-7", "2"), remove(ADDRESS, "name-8"), remove(POLICY, "p")]);
    site.server.ready();
    let state = proxy.until_has(ADDRESS, "name-7", "2").await;
    assert_eq!(state.resources, 502);
    proxy.until(|s| s.held.len() == 499).await;
    assert_eq!(site.counts.resources.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_takes_over() {
    let (first, second) = (Site::new(config()).await, Site::new(config()).await);
    for site in [&first, &second] {
        site.server.apply([set(ADDRESS, "a", "1")]);
        site.server.ready();
    }
    let proxy = Proxy::start(settings(&[http(&first), http(&second)]));
    proxy.until_has(ADDRESS, "a", "1").await;
    let (there, other) = if first.server.clients().is_empty() { (second, first) } else { (first, second) };
    there.stop().await;
    other.until(|s| s.clients().len() == 1).await;
    other.server.apply([set(ADDRESS, "b", "1")]);
    let state = proxy.until_has(ADDRESS, "b", "1").await;
    assert_eq!(state.resources, 2, "the other has nothing to add to what was there");
    // It can also be sent away.
    let id = other.server.clients()[0].id;
    other.server.disconnect(|client| &*client.caller.name == "tester");
    other.until(|s| s.clients().first().is_some_and(|c| c.id != id)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_resource_costs_no_good_one() {
    let site = Site::new(config()).await;
    site.server.apply([set(POLICY, "p", "good 1"), set(POLICY, "q", "good 1")]);
    site.server.ready();
    let proxy = Proxy::start(settings(&[http(&site)]));
    proxy.until(|s| s.held.len() == 2).await;
    let made =
        site.server.apply([set(POLICY, "p", "bad"), set(POLICY, "q", "good 2"), set(POLICY, "r", "bad")]);
    let state = proxy.until_has(POLICY, "q", "good 2").await;
    assert_eq!(state.held[&(POLICY, "p".into())], "good 1", "the last good one stays");
    site.until(|s| s.clients()[0].holds(POLICY, "q", made) == Holds::Yes).await;
    let client = site.server.clients().remove(0);
    assert_eq!(client.holds(POLICY, "p", made), Holds::Rejected("it is bad".into()));
    assert_eq!(client.holds(POLICY, "r", made), Holds::Rejected("it is bad".into()));
    assert_eq!(client.types[0].last_nack.as_deref(), Some("2 refused; p: it is bad; r: it is bad"));
    assert_eq!(site.counts.rejected.load(Ordering::Relaxed), 1);

    let made = site.server.apply([set(POLICY, "p", "good 3")]);
    proxy.until_has(POLICY, "p", "good 3").await;
    site.until(|s| s.clients()[0].holds(POLICY, "p", made) == Holds::Yes).await;
    assert_eq!(site.server.clients()[0].types[0].rejected.len(), 1);
}

/// A stream of a client that sends these requests and then nothing.
async fn silent(
    site: &Site,
    requests: Vec<proto::wire::discovery::DeltaDiscoveryRequest>,
) -> tonic::Streaming<proto::wire::discovery::DeltaDiscoveryResponse> {
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    for request in requests {
        sender.send(request).await.unwrap();
    }
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("authorization", "Bearer good".parse().unwrap());
    let endpoint =
        tonic::transport::Endpoint::from_shared(http(site)).unwrap().initial_stream_window_size(65_535);
    let mut client = AggregatedDiscoveryServiceClient::new(endpoint.connect().await.unwrap());
    let stream = client.delta_aggregated_resources(request).await.unwrap().into_inner();
    // The requests' side stays open.
    std::mem::forget(sender);
    stream
}

async fn end(mut stream: tonic::Streaming<proto::wire::discovery::DeltaDiscoveryResponse>) -> Status {
    loop {
        match timeout(SOON, stream.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => return Status::ok(""),
            Err(status) => return status,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_answers_nothing_or_reads_nothing_is_ended() {
    let limits = Limits { response_bytes: 1 << 20, ..Limits::default() };
    let answer_timeout = Duration::from_millis(500);
    let start_timeout = Duration::from_millis(500);
    let site = Site::new(Config { limits, answer_timeout, start_timeout, ..config() }).await;
    site.server.apply((0..2000).map(|n| set(ADDRESS, &format!("name-{n}"), &"x".repeat(2000))));
    site.server.ready();
    let mut first = subscribe(ADDRESS, &[]);
    first.node = Some(proto::wire::core::Node { id: "slow".into(), ..Default::default() });

    let status = end(silent(&site, vec![]).await).await;
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "no request came in time"));
    let status = end(silent(&site, vec![first.clone()]).await).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("was not answered in 0.5 s"), "{status:?}");

    // One that does not read: its window fills, and the server lets go of it all the same.
    let stuck = silent(&site, vec![first]).await;
    site.until(|s| s.clients().len() == 1).await;
    site.server.apply((0..100).map(|n| set(ADDRESS, &format!("name-{n}"), "2")));
    site.until(|s| s.clients().is_empty()).await;
    let pushed = site.counts.pushed.load(Ordering::Relaxed);
    assert!(pushed <= 2, "one response was under way, not {pushed}");
    drop(stuck);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_of_a_node_ends_its_older_one() {
    let site = Site::new(config()).await;
    site.server.ready();
    let mut first = subscribe(ADDRESS, &[]);
    first.node = Some(settings(&[http(&site)]).node);
    let older = silent(&site, vec![first.clone()]).await;
    site.until(|s| s.clients().len() == 1).await;
    let newer = silent(&site, vec![first.clone()]).await;
    assert!(end(older).await.message().contains("a newer stream"));
    assert_eq!(site.server.clients().len(), 1);
    // Those of another make may share a name.
    first.node.as_mut().unwrap().metadata = None;
    let _foreign = [silent(&site, vec![first.clone()]).await, silent(&site, vec![first]).await];
    site.until(|s| s.clients().len() == 3).await;
    drop(newer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_start_in_turn_and_others_do_not_keep_ours_waiting() {
    let answer_timeout = Duration::from_secs(2);
    let site = Site::new(Config { starting: 1, starting_others: 1, answer_timeout, ..config() }).await;
    site.server.apply([set(ADDRESS, "a", "1")]);
    site.server.ready();
    let mut first = subscribe(ADDRESS, &[]);
    first.node = Some(proto::wire::core::Node { id: "slow".into(), ..Default::default() });
    // Neither answers: one is there, the other waits for its turn.
    let _slow = silent(&site, vec![first.clone()]).await;
    let _slower = silent(&site, vec![first]).await;
    let proxies = [Proxy::start(settings(&[http(&site)])), {
        let mut other = settings(&[http(&site)]);
        other.node.id = "another".into();
        Proxy::start(other)
    }];
    for proxy in &proxies {
        proxy.until_has(ADDRESS, "a", "1").await;
    }
    assert_eq!(site.server.clients().len(), 3);
    site.until(|s| s.clients().len() == 3 && s.clients().iter().all(|c| c.node.id != "slow" || c.id.0 > 2))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_floods_costs_others_nothing_and_is_ended_at_the_limit() {
    let limits = Limits { names: 1000, ..Limits::default() };
    let site = Site::new(Config { limits, ..config() }).await;
    site.server.apply([set(ADDRESS, "a", "1")]);
    site.server.ready();
    let proxy = Proxy::start(settings(&[http(&site)]));
    proxy.until_has(ADDRESS, "a", "1").await;
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("authorization", "Bearer good".parse().unwrap());
    let mut client = AggregatedDiscoveryServiceClient::connect(http(&site)).await.unwrap();
    let stream = client.delta_aggregated_resources(request).await.unwrap().into_inner();
    let flood = tokio::spawn(async move {
        let node = Some(proto::wire::core::Node { id: "flood".into(), ..Default::default() });
        // The same again and again, and then ever more names.
        for n in 0..20_000 {
            let name = format!("name-{}", if n < 15_000 { n % 100 } else { n });
            let request = subscribe(ADDRESS, &["*", "a", &name]);
            let node = node.clone().filter(|_| n == 0);
            let request =
                proto::wire::discovery::DeltaDiscoveryRequest { node, response_nonce: "?".into(), ..request };
            if sender.send(request).await.is_err() {
                return n;
            }
        }
        20_000
    });
    for n in 2..7 {
        site.server.apply([set(ADDRESS, "a", &n.to_string())]);
        let began = tokio::time::Instant::now();
        proxy.until_has(ADDRESS, "a", &n.to_string()).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    let status = end(stream).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("more than 1000 names"), "{status:?}");
    assert!(flood.await.unwrap() > 15_000);
    assert!(
        site.counts.pushed.load(Ordering::Relaxed) < 20,
        "it was sent one response, which it did not answer"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_are_limited_and_come_free() {
    let site = Site::new(Config { clients: 1, ..config() }).await;
    site.server.ready();
    let first = Proxy::start(settings(&[http(&site)]));
    first.until(|s| s.complete.len() == 2).await;
    let second = Proxy::start(settings(&[http(&site)]));
    let mut link = second.link.clone();
    let full = |l: &Link| matches!(l, Link::Away { error, .. } if error.contains("serves 1 clients already"));
    timeout(SOON, link.wait_for(full)).await.unwrap().unwrap();
    first.stop().await;
    second.until(|s| s.complete.len() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_resources_arrive_in_parts_and_whole() {
    let site = Site::new(config()).await;
    let body = "x".repeat(250);
    site.server
        .apply((0..100_000).map(|n| set(ADDRESS, &format!("Kubernetes//Pod/default/name-{n}"), &body)));
    site.server.ready();
    let proxy = Proxy::start(settings(&[http(&site)]));
    let state = proxy.until(|s| s.complete.contains(&ADDRESS)).await;
    assert_eq!((state.held.len(), state.resources), (100_000, 100_000));
    assert!(state.updates > 5, "{} updates", state.updates);
    let generation = site.server.generation();
    site.until(|s| s.clients()[0].types[1].acked == generation).await;
    // A client of another make gets it in one message.
    let mut first = subscribe(ADDRESS, &[]);
    first.node = Some(proto::wire::core::Node { id: "foreign".into(), ..Default::default() });
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    sender.send(first).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(receiver));
    request.metadata_mut().insert("authorization", "Bearer good".parse().unwrap());
    let client = AggregatedDiscoveryServiceClient::connect(http(&site)).await.unwrap();
    let mut client = client.max_decoding_message_size(1 << 30);
    let mut stream = client.delta_aggregated_resources(request).await.unwrap().into_inner();
    assert_eq!(timeout(SOON, stream.message()).await.unwrap().unwrap().unwrap().resources.len(), 100_000);
    // One change is one resource.
    site.server.apply([set(ADDRESS, "Kubernetes//Pod/default/name-5", "2")]);
    let state = proxy.until_has(ADDRESS, "Kubernetes//Pod/default/name-5", "2").await;
    assert_eq!(state.resources, 100_001);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_coalesced_and_a_lone_change_is_not_held_up() {
    let coalesce = Duration::from_secs(1);
    let site = Site::new(Config { coalesce, ..config() }).await;
    site.server.ready();
    let proxy = Proxy::start(settings(&[http(&site)]));
    let state = proxy.until(|s| s.complete.len() == 2).await;
    tokio::time::sleep(coalesce * 12 / 10).await;
    let began = tokio::time::Instant::now();
    site.server.apply([set(ADDRESS, "alone", "1")]);
    proxy.until_has(ADDRESS, "alone", "1").await;
    let alone = began.elapsed();
    assert!(alone < coalesce * 8 / 10, "{alone:?}");
    let began = tokio::time::Instant::now();
    for n in 0..300 {
        site.server.apply([set(ADDRESS, &format!("name-{n}"), "1")]);
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    let end = proxy.until_has(ADDRESS, "name-299", "1").await;
    let (updates, seconds) = (end.updates - state.updates - 1, began.elapsed().as_secs_f64());
    assert!(updates >= 2 && updates as f64 <= seconds + 2.0, "{updates} updates in {seconds} s");
}

fn state_settings(site: &Site, directory: &tempfile::TempDir) -> Settings {
    Settings { state_dir: Some(directory.path().to_owned()), ..settings(&[http(site)]) }
}

fn journal(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("xds.journal")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_good_state_is_there_before_any_server_and_is_not_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let site = Site::new(config()).await;
    site.server.apply((0..300).map(|n| set(ADDRESS, &format!("name-{n}"), "1")));
    site.server.apply([set(POLICY, "p", "1"), set(POLICY, "never", "bad")]);
    site.server.ready();
    let proxy = Proxy::start(state_settings(&site, &directory));
    proxy.until(|s| s.complete.len() == 2).await;
    site.server.apply([set(ADDRESS, "name-0", "2"), remove(ADDRESS, "name-1")]);
    proxy.until_has(ADDRESS, "name-0", "2").await;
    let made = site.server.generation();
    site.until(|s| s.clients()[0].types.iter().all(|t| t.acked == made)).await;
    let before = proxy.state.borrow().held.clone();
    proxy.stop().await;
    site.until(|s| s.clients().is_empty()).await;

    let address = site.address;
    site.stop().await;
    let mut away = settings(&[format!("http://{address}")]);
    away.state_dir = Some(directory.path().to_owned());
    let proxy = Proxy::start(away);
    let state = proxy.until(|s| s.complete.len() == 2).await;
    assert_eq!(state.held, before);
    assert_eq!((state.resources, state.held.len()), (0, 300));
    assert!(
        !state.held.contains_key(&(POLICY, "never".into())),
        "what was refused is not the last good state"
    );

    let site = Site::at(address, config(), None).await;
    site.server.apply(
        (0..300)
            .filter(|n| *n != 1)
            .map(|n| set(ADDRESS, &format!("name-{n}"), if n == 0 { "2" } else { "1" })),
    );
    site.server.apply([set(POLICY, "p", "2")]);
    site.server.ready();
    let state = proxy.until_has(POLICY, "p", "2").await;
    // What was refused is among it: another version of the proxy may know it, and this one refuses it again.
    assert_eq!((state.resources, state.from_disk), (1, 303));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_state_is_not_used_and_said() {
    let directory = tempfile::tempdir().unwrap();
    let site = Site::new(config()).await;
    site.server.apply((0..300).map(|n| set(ADDRESS, &format!("name-{n}"), "1")));
    site.server.ready();
    let proxy = Proxy::start(state_settings(&site, &directory));
    proxy.until(|s| s.complete.len() == 2).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    proxy.stop().await;
    let mut bytes = std::fs::read(journal(&directory)).unwrap();
    // In the first record; others follow.
    bytes[200] ^= 1;
    bytes.extend_from_slice(&[7; 5000]);
    std::fs::write(journal(&directory), bytes).unwrap();
    let proxy = Proxy::start(state_settings(&site, &directory));
    let state = proxy.until(|s| s.complete.len() == 2).await;
    assert_eq!((state.from_disk, state.resources), (0, 300));
    let lost = proxy.seen.lost.lock().unwrap().clone();
    assert!(lost.len() == 1 && lost[0].contains("is damaged at byte"), "{lost:?}");
}
