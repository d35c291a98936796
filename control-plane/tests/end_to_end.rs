//! From objects to a proxy and back: the registry, the encoding, the port with TLS and tokens, a real client, and what
//! `status` says of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod mesh;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use config::resource::Kind;
use control_plane::ca::{Account, AuthenticationError, Authenticator, BoundPod, Caller, Reviewer};
use control_plane::push::{Exceptions, Push, TYPES};
use control_plane::registry::{ObjectVersion, Registry};
use control_plane::serve::{Limits, NodeProxies, Port, Proving, connections};
use control_plane::status::Followers;
use control_plane::status::conditions::Tally;
use control_plane::status::exchange::{Exchange, Keys, Question};
use control_plane::status::peers::{Peer, Place, Stand, ask_one};
use futures_util::future::BoxFuture;
use identity::Clock;
use mesh::{Root, first_lists, other_lists, pod, policy, registry, service, set};
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Extensions, MESH_SETTINGS_TYPE_URL};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::Instant;
use xds::client::{Client, Link, NodeInfo, Settings, Update, Updates};
use xds::server::{Config, Server};

/// Knows the tokens of two pods.
struct Tokens;

impl Reviewer for Tokens {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        let account = match token {
            "of-ztunnel" => "ztunnel",
            "of-another" => "another",
            _ => return Box::pin(async { Err(AuthenticationError::Rejected("unknown".to_owned())) }),
        };
        Box::pin(async move {
            Ok(Caller {
                namespace: "culvert-system".to_owned(),
                service_account: account.to_owned(),
                pod: Some(BoundPod { name: "ztunnel-a".to_owned(), uid: "1".to_owned(), node: None }),
            })
        })
    }
}

struct Plane {
    registry: Registry,
    push: Push<Server>,
    server: Server,
    followers: Followers,
    address: SocketAddr,
    root: Root,
    files: TempDir,
}

impl Plane {
    async fn new() -> Self {
        let authenticator = Arc::new(Authenticator::new(Tokens, Clock::system()));
        let trusted = vec!["culvert-system/ztunnel".parse::<Account>().unwrap()];
        let proxies = NodeProxies::new(authenticator, "Kubernetes".to_owned(), trusted);
        let config = Config { types: TYPES.to_vec(), ..Config::default() };
        let server = Server::new(config, Arc::new(proxies), Arc::new(()));
        let root = Root::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let port = Port::new(Limits::default(), &process::metrics::Registry::new());
        let incoming = connections(listener, root.server_config(&[b"h2"]), port.clone());
        let served = tonic::transport::Server::builder().layer(Proving(port)).add_service(server.service());
        tokio::spawn(served.serve_with_incoming(incoming));
        let files = TempDir::new().unwrap();
        std::fs::write(files.path().join("root.pem"), &root.pem).unwrap();
        let push = Push::new(server.clone(), Exceptions::default());
        let (registry, _) = registry();
        Self { registry, push, server, followers: Followers::default(), address, root, files }
    }

    /// A cluster with a service, two pods and a policy for them.
    fn fill(&mut self) {
        first_lists(&mut self.registry, &[("shop", json!({}))], Some("trustDomain: example.org"));
        let allow = json!({
            "selector": { "matchLabels": { "app": "web" } },
            "action": "ALLOW", "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }],
        });
        other_lists(
            &mut self.registry,
            vec![
                set(Kind::Pod, &pod("shop", "a", "10.0.0.1", "1")),
                set(Kind::Pod, &pod("shop", "b", "10.0.0.2", "1")),
                set(Kind::Service, &service("shop", "web", "10.96.0.1")),
                set(Kind::AuthorizationPolicy, &policy("shop", "only-shop", &allow, 1)),
            ],
        );
        self.commit();
        self.server.ready();
    }

    fn commit(&mut self) {
        let committed = self.registry.commit(Instant::now()).unwrap();
        let generation = self.push.push(&committed.changes);
        self.followers.take(committed.reports, &committed.changes, generation);
    }

    fn client(&self, token: &str, pod: &str) -> (Client, Updates) {
        let token_file = self.files.path().join(token);
        std::fs::write(&token_file, token).unwrap();
        let node = NodeInfo {
            ip: "10.0.0.9".parse().unwrap(),
            name: pod.to_owned(),
            namespace: "culvert-system".to_owned(),
            node_name: "node1".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            version: "0.1.0".to_owned(),
        };
        let settings = Settings {
            addresses: vec![format!("https://{}", self.address)],
            root_file: Some(self.files.path().join("root.pem")),
            token_file: Some(token_file),
            node: node.node(),
            types: vec![MESH_SETTINGS_TYPE_URL, AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL],
            ..Settings::default()
        };
        Client::new(settings, Arc::new(())).unwrap()
    }

    fn tally(&self) -> Tally {
        self.followers.local(&self.server)["AuthorizationPolicy/shop/only-shop"].tally.clone()
    }

    /// Waits until the one proxy stands so.
    async fn until(&self, what: &str, holds: impl Fn(&Tally) -> bool) {
        for _ in 0..200 {
            if holds(&self.tally()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{what}: {:?}", self.tally());
    }

    async fn until_enforced(&self) {
        self.until("enforced", |tally| *tally == Tally { enforcing: 1, ..Tally::default() }).await;
    }
}

async fn next(updates: &mut Updates) -> Update {
    tokio::time::timeout(Duration::from_secs(10), updates.next()).await.expect("no update").unwrap()
}

fn names(update: &Update) -> Vec<&str> {
    let mut names: Vec<&str> = update.resources.iter().map(|r| &*r.name).collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn a_proxy_gets_everything_once_and_then_only_what_changes() {
    let mut plane = Plane::new().await;
    plane.fill();
    let (client, mut updates) = plane.client("of-ztunnel", "ztunnel-a");
    tokio::spawn(client.run());
    let mut first = BTreeMap::new();
    let mut order = Vec::new();
    for _ in 0..3 {
        let update = next(&mut updates).await;
        order.push(update.type_url);
        first.insert(update.type_url, names(&update).iter().map(ToString::to_string).collect::<Vec<_>>());
        update.ack();
    }
    // A type of our own is asked for once it is known whose server it is: before the workloads at any rate.
    assert_eq!(order, [AUTHORIZATION_TYPE_URL, MESH_SETTINGS_TYPE_URL, ADDRESS_TYPE_URL]);
    assert_eq!(first[MESH_SETTINGS_TYPE_URL], ["mesh"]);
    assert_eq!(first[AUTHORIZATION_TYPE_URL], ["shop/only-shop"]);
    assert_eq!(
        first[ADDRESS_TYPE_URL],
        ["Kubernetes//Pod/shop/a", "Kubernetes//Pod/shop/b", "shop/web.shop.svc.cluster.local"]
    );
    plane.until_enforced().await;

    // A pod's change sends that pod, encoded once.
    let encoded = plane.push.encoded();
    let mut changed = pod("shop", "b", "10.0.0.2", "2");
    changed["status"]["conditions"][0]["status"] = json!("False");
    plane.registry.take(set(Kind::Pod, &changed));
    plane.commit();
    assert_eq!(plane.push.encoded(), encoded + 1);
    let update = next(&mut updates).await;
    assert_eq!((update.type_url, names(&update)), (ADDRESS_TYPE_URL, vec!["Kubernetes//Pod/shop/b"]));
    update.ack();

    // A change of what nobody reads sends nothing: what comes next is the pod's removal.
    let mut changed = pod("shop", "a", "10.0.0.1", "3");
    changed["spec"]["priority"] = json!(7);
    plane.registry.take(set(Kind::Pod, &changed));
    plane.commit();
    plane.registry.take(mesh::gone(Kind::Pod, "shop", "b"));
    plane.commit();
    let update = next(&mut updates).await;
    assert!(update.resources.is_empty());
    assert_eq!(update.removed, ["Kubernetes//Pod/shop/b"]);
    update.ack();
}

#[tokio::test]
async fn a_policy_is_enforced_when_the_proxy_has_said_so() {
    let mut plane = Plane::new().await;
    plane.fill();
    let (client, mut updates) = plane.client("of-ztunnel", "ztunnel-a");
    tokio::spawn(client.run());
    for _ in 0..3 {
        next(&mut updates).await.ack();
    }
    plane.until_enforced().await;
    let deny = json!({ "selector": { "matchLabels": { "app": "web" } }, "action": "DENY", "rules": [{}] });
    plane.registry.take(set(Kind::AuthorizationPolicy, &policy("shop", "only-shop", &deny, 2)));
    plane.commit();
    let update = next(&mut updates).await;
    assert_eq!(update.type_url, AUTHORIZATION_TYPE_URL);
    // It has it, and has not said so.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((plane.tally().pending, &*plane.tally().waiting_for[0]), (1, "ztunnel-a.culvert-system"));
    update.ack();
    plane.until_enforced().await;
    // One that the proxy refuses is named with the reason.
    plane
        .registry
        .take(set(Kind::AuthorizationPolicy, &policy("shop", "only-shop", &json!({ "rules": [{}] }), 3)));
    plane.commit();
    loop {
        let update = next(&mut updates).await;
        if update.type_url == AUTHORIZATION_TYPE_URL {
            update.nack(vec![xds::client::Rejection {
                name: "shop/only-shop".into(),
                reason: "no room".to_owned(),
            }]);
            break;
        }
        update.ack();
    }
    // Its workloads don't list it any more, which comes with the other type.
    while let Ok(Some(update)) = tokio::time::timeout(Duration::from_millis(500), updates.next()).await {
        update.ack();
    }
    let refused = |tally: &Tally| tally.refusal.as_ref().is_some_and(|(_, reason)| &**reason == "no room");
    plane.until("refused", refused).await;
}

fn keys(secret: &'static [u8]) -> Keys {
    Keys::new(Arc::new(move |take: &mut dyn FnMut(&[u8])| take(secret)), Clock::system())
}

#[tokio::test]
async fn another_control_plane_tells_how_its_proxies_stand_and_then_only_what_changes() {
    let mut plane = Plane::new().await;
    plane.fill();
    let (client, mut updates) = plane.client("of-ztunnel", "ztunnel-a");
    tokio::spawn(client.run());
    next(&mut updates).await.ack();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let exchange =
        Exchange::new(plane.followers.clone(), plane.server.clone(), "next".to_owned(), keys(b"key"));
    let routes = exchange.routes(process::http::Routes::new("test"));
    let acceptor = tokio_rustls::TlsAcceptor::from(plane.root.server_config(&[b"http/1.1"]));
    let secure = move |stream| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(stream).await }
    };
    tokio::spawn(process::http::serve_secured(listener, secure, routes, process::http::Limits::default()));
    let place = Place { address, server_name: "localhost".to_owned(), revision: "default".into() };
    let config = plane.root.client_config();
    let tls = || Some(config.clone());
    let ask = async |question: &Question| ask_one(&place, tls(), &keys(b"key"), question).await.unwrap();

    let mut peer = Peer::new(place.clone());
    let first = ask(&Question::default()).await;
    assert!(first.whole && first.versions.len() == 1 && first.ours == 1);
    let mut question = Question { epoch: first.epoch, number: first.number, names: first.names_id };
    assert_eq!(peer.take(first), ["AuthorizationPolicy/shop/only-shop"; 2].map(str::to_owned));
    assert_eq!((peer.names(), &*peer.place.revision), (&["ztunnel-a.culvert-system".into()][..], "next"));
    let version = |generation| ObjectVersion {
        uid: "uid-only-shop".into(),
        generation,
        labelled: false,
        selects: true,
    };
    let label = "AuthorizationPolicy/shop/only-shop";
    let Stand::Proxies(tally) = peer.stand(label, &version(1)) else { panic!("it knows the version") };
    assert_eq!((tally.enforcing, tally.pending), (0, 1));
    assert_eq!(peer.stand(label, &version(2)), Stand::Other { knows: true });

    for _ in 0..2 {
        next(&mut updates).await.ack();
    }
    plane.until_enforced().await;
    tokio::time::sleep(Duration::from_millis(300)).await; // answers are kept for a moment
    let settled = ask(&question).await;
    assert!(!settled.whole && settled.exceptions.is_empty() && settled.names.is_none());
    assert!(settled.versions.is_empty(), "no policy changed: {settled:?}");
    question.number = settled.number;
    assert_eq!(peer.take(settled), [label]);
    let all = Tally { enforcing: 1, ..Tally::default() };
    assert_eq!(peer.stand(label, &version(1)), Stand::Proxies(all));

    plane.registry.take(mesh::gone(Kind::AuthorizationPolicy, "shop", "only-shop"));
    plane.commit();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let gone = ask(&question).await;
    assert_eq!((gone.versions.len(), &*gone.versions[0].uid), (1, ""));
    peer.take(gone);
    assert_eq!(peer.stand(label, &version(1)), Stand::Other { knows: false });

    // One that proves another root, or none that is known, is not asked; who has another key is not answered.
    let other = Root::new();
    let refused = ask_one(&place, tls(), &keys(b"other"), &question).await.unwrap_err();
    assert!(refused.contains("403"), "{refused}");
    assert!(ask_one(&place, Some(other.client_config()), &keys(b"key"), &question).await.is_err());
    assert!(ask_one(&place, None, &keys(b"key"), &question).await.is_err());
}

#[tokio::test]
async fn a_proxy_that_refused_a_workload_does_not_enforce_what_is_for_it() {
    let mut plane = Plane::new().await;
    plane.fill();
    let wide = json!({ "action": "DENY", "rules": [{ "from": [{ "source": { "namespaces": ["bad"] } }] }] });
    let own = json!({ "selector": { "matchLabels": { "app": "web" } }, "rules": [] });
    plane.registry.take(set(Kind::AuthorizationPolicy, &policy("shop", "wide", &wide, 1)));
    plane.registry.take(set(Kind::AuthorizationPolicy, &policy("other", "own", &own, 1)));
    plane.registry.take(set(Kind::AuthorizationPolicy, &policy("culvert-system", "root", &own, 1)));
    plane.commit();
    let (client, mut updates) = plane.client("of-ztunnel", "ztunnel-a");
    tokio::spawn(client.run());
    loop {
        let update = next(&mut updates).await;
        if update.type_url == ADDRESS_TYPE_URL {
            let reason = "no room".to_owned();
            update.nack(vec![xds::client::Rejection { name: "Kubernetes//Pod/shop/a".into(), reason }]);
            break;
        }
        update.ack();
    }
    let answered = |tally: &Tally| tally.pending == 0 && tally.rejected + tally.enforcing == 1;
    plane.until("answered", answered).await;
    let local = plane.followers.local(&plane.server);
    let refusal = |policy: &str| local[policy].tally.refusal.as_ref().map(|(_, reason)| reason.to_string());
    let reason = "it refused the workload Kubernetes//Pod/shop/a: no room";
    assert_eq!(refusal("AuthorizationPolicy/shop/only-shop").as_deref(), Some(reason));
    assert_eq!(refusal("AuthorizationPolicy/culvert-system/root").as_deref(), Some(reason));
    assert_eq!(refusal("AuthorizationPolicy/shop/wide"), None, "no workload has to name it");
    assert_eq!(refusal("AuthorizationPolicy/other/own"), None, "its workloads are others");
}

#[tokio::test]
async fn who_is_no_node_proxy_gets_nothing() {
    let mut plane = Plane::new().await;
    plane.fill();
    for (token, pod, reason) in [
        ("of-nobody", "ztunnel-a", "unknown"),
        ("of-another", "ztunnel-a", "no node proxy"),
        ("of-ztunnel", "ztunnel-b", "not of the pod ztunnel-b.culvert-system"),
    ] {
        let (client, mut updates) = plane.client(token, pod);
        let mut link = client.link();
        let task = tokio::spawn(client.run());
        let away = link.wait_for(|link| matches!(link, Link::Away { .. }));
        let away = tokio::time::timeout(Duration::from_secs(10), away).await.unwrap().unwrap().clone();
        let Link::Away { error, .. } = away else { panic!("{away:?}") };
        assert!(error.contains(reason), "{token}: {error}");
        let got = tokio::time::timeout(Duration::from_millis(100), updates.next()).await;
        assert!(got.is_err(), "{token} was told {got:?}");
        task.abort();
    }
    assert!(plane.server.clients().is_empty());
}

#[tokio::test]
async fn proxies_of_another_make_never_get_what_they_would_enforce_wrongly() {
    let mut plane = Plane::new().await;
    plane.fill();
    let domains = json!({ "rules": [{ "from": [{ "source": { "trustDomains": ["*.example.org"] } }] }] });
    let mut tried = policy("shop", "tried", &json!({ "action": "DENY", "rules": [{}] }), 1);
    tried["metadata"]["annotations"] = json!({ "istio.io/dry-run": "true" });
    plane.registry.take(set(Kind::AuthorizationPolicy, &policy("shop", "domains", &domains, 1)));
    plane.registry.take(set(Kind::AuthorizationPolicy, &tried));
    plane.commit();
    let exceptions = plane.push.exceptions().list();
    assert!(exceptions["shop/domains"].contains("refused"), "{exceptions:?}");
    assert!(exceptions["shop/tried"].contains("not sent"), "{exceptions:?}");
    let (ours, theirs) = (Extensions::Culvert, Extensions::None);
    assert_eq!(plane.server.len(AUTHORIZATION_TYPE_URL, ours), 3);
    assert_eq!(plane.server.len(AUTHORIZATION_TYPE_URL, theirs), 2);
    assert_eq!(plane.server.len(MESH_SETTINGS_TYPE_URL, theirs), 0);
    assert_eq!(plane.server.len(ADDRESS_TYPE_URL, theirs), 3);
    // However many there are: the condition of a policy is made of it.
    for index in 0..1200 {
        let mut another = tried.clone();
        another["metadata"]["name"] = json!(format!("tried-{index}"));
        plane.registry.take(set(Kind::AuthorizationPolicy, &another));
    }
    plane.commit();
    assert_eq!(plane.push.exceptions().list().len(), 1202);
    plane.registry.take(mesh::gone(Kind::AuthorizationPolicy, "shop", "domains"));
    plane.commit();
    assert!(!plane.push.exceptions().list().contains_key("shop/domains"));
}
