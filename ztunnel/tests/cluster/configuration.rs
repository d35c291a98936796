//! Workloads, policies and settings by ADS: what holds from when on, and what can't be read.

use std::net::SocketAddr;
use std::time::Duration;

use harness::netns::root_or_skip;
use model::{Action, Clause, Match, Policy, PolicyKey, Rule, Scope, Settings, StringMatch};
use nix::sys::signal::Signal;
use proto::AUTHORIZATION_TYPE_URL;

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, MOMENT, eventually};

pub fn policy(name: &str, scope: Scope, action: Action, m: Match) -> Policy {
    let rule = Rule { clauses: [Clause { matches: [m].into() }].into() };
    let key = PolicyKey { namespace: "shop".into(), name: name.into() };
    Policy { key, scope, action, rules: [rule].into(), dry_run: false }
}

/// What a STRICT PeerAuthentication comes to: whoever has no identity is refused.
pub fn strict() -> Policy {
    let nobody = Match { not_principals: [StringMatch::Presence].into(), ..Match::default() };
    policy("converted_peer_authentication_strict", Scope::Namespace, Action::Deny, nobody)
}

pub fn principal(name: &str) -> Match {
    let who = StringMatch::Exact(format!("cluster.local/ns/shop/sa/{name}").into());
    Match { principals: [who].into(), ..Match::default() }
}

#[tokio::test]
async fn policies_hold_from_their_acknowledgement_on_for_new_and_open_connections() {
    if !root_or_skip("policies by ADS") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client", "other"]), ("b", &["web", "outside"])]).await;
    let [client, other, web, old] = ["client", "other", "web", "outside"].map(|n| cluster.pod(n));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut plain = talk(old, to).await.unwrap();
    let mut tunnelled = talk(client, to).await.unwrap();

    cluster.enforce(&strict()).await;
    plain.end().await.unwrap_err();
    tunnelled.echo().await.unwrap();
    ask(old, to).await.unwrap_err();
    ask(client, to).await.unwrap();

    let deny = policy("no-client", Scope::WorkloadSelector, Action::Deny, principal("client"));
    cluster.enforce(&deny).await;
    // Nobody lists it yet.
    tunnelled.echo().await.unwrap();
    let mut workload = cluster.workload("web");
    workload.policies = [deny.key.clone()].into();
    cluster.control_plane.workload(&workload);
    cluster.in_force().await;
    tunnelled.end().await.unwrap_err();
    ask(client, to).await.unwrap_err();
    ask(other, to).await.unwrap();
    let refused = cluster.ztunnel("b").last(|c| c["destination"] == to.to_string()).await;
    assert!(!refused.is_null());

    // One that is listed and unknown refuses everybody.
    cluster.control_plane.unset(AUTHORIZATION_TYPE_URL, "shop/no-client");
    cluster.in_force().await;
    ask(other, to).await.unwrap_err();
    cluster.control_plane.workload(&cluster.workload("web"));
    cluster.in_force().await;
    ask(other, to).await.unwrap();
    ask(client, to).await.unwrap();
}

#[tokio::test]
async fn no_pod_is_taken_before_the_policies_are_there() {
    if !root_or_skip("late policies") {
        return;
    }
    let mut cluster = Cluster::build(&[("a", &["client", "web", "outside"])]);
    cluster.launch("a");
    let [client, web, old] = ["client", "web", "outside"].map(|n| cluster.pod(n).clone());
    let _servers = [serve(&web, PORT), serve(&old, PORT)];
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    // Workloads alone are not enough: what denies may be missing.
    cluster.tell_all();
    let early = tokio::time::timeout(MOMENT, cluster.agents["a"].accept()).await;
    assert!(early.is_err(), "it takes pods, and decides by what it doesn't know");
    assert!(cluster.ztunnel("a").get(15021, "/healthz/ready").await.is_err());

    cluster.control_plane.policy(&strict());
    cluster.control_plane.server.ready();
    cluster.tell_pods("a").await;
    cluster.ztunnel_mut("a").ready().await;
    ask(&old, to).await.unwrap_err();
    ask(&client, to).await.unwrap();
    let tunnel = cluster.ztunnel("a").last(|c| c["carrier"] == "hbone").await;
    assert_eq!(tunnel["source_identity"], "spiffe://cluster.local/ns/shop/sa/client");
}

#[tokio::test]
async fn connections_that_nothing_is_told_of_wait_and_are_refused_in_the_end() {
    if !root_or_skip("a control plane that knows no pods") {
        return;
    }
    let mut cluster = Cluster::build(&[("a", &["client", "web"])]);
    cluster.control_plane.server.ready();
    cluster.run("a").await;
    let (client, web) = (cluster.pod("client").clone(), cluster.pod("web").clone());
    let _server = serve(&web, PORT);
    let started = tokio::time::Instant::now();
    let asking = tokio::spawn(async move { ask(&client, SocketAddr::new(web.ipv4.into(), PORT)).await });
    crate::lab::eventually("it waits", async || {
        cluster.ztunnel("a").metric("culvert_connections_waiting").await == 1.0
    })
    .await;
    asking.await.unwrap().unwrap_err();
    assert!(started.elapsed() > Duration::from_secs(9));
    assert_eq!(cluster.ztunnel("a").metric("culvert_connections_not_known_total").await, 1.0);
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_by_name_and_field_and_its_last_good_version_stays() {
    if !root_or_skip("NACK") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client"]), ("b", &["web"])]).await;
    let (client, web) = (cluster.pod("client"), cluster.pod("web"));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    cluster.enforce(&policy("closed", Scope::Namespace, Action::Deny, principal("client"))).await;
    ask(client, to).await.unwrap_err();

    // An address of three bytes.
    let broken = |name: &str, action: u8| {
        let m = [0x2a, 0x05, 0x0a, 0x03, 10, 0, 0]; // source_ips { address }
        hand::policy(name, 1, action, &m)
    };
    cluster.control_plane.set(AUTHORIZATION_TYPE_URL, "shop/closed", broken("closed", 1));
    cluster.in_force().await;
    let rejected = cluster.control_plane.counts.rejected.lock().unwrap().join("\n");
    assert!(rejected.contains("shop/closed") && rejected.contains("source_ips[0]"), "{rejected}");
    ask(client, to).await.unwrap_err();
    let dump = cluster.ztunnel("b").config_dump().await;
    let diagnostics = dump["diagnostics"].to_string();
    assert!(diagnostics.contains("shop/closed"), "{diagnostics}");

    // Removed, it is gone; and what never could be read refuses in its place.
    cluster.control_plane.unset(AUTHORIZATION_TYPE_URL, "shop/closed");
    cluster.in_force().await;
    ask(client, to).await.unwrap();
    for action in [0, 1] {
        cluster.control_plane.set(AUTHORIZATION_TYPE_URL, "shop/never", broken("never", action));
        cluster.in_force().await;
        ask(client, to).await.unwrap_err();
        cluster.control_plane.unset(AUTHORIZATION_TYPE_URL, "shop/never");
        cluster.in_force().await;
        ask(client, to).await.unwrap();
    }
    assert!(cluster.ztunnel("b").metric("culvert_xds_resources_refused_total").await >= 3.0);
    // The rest of an update holds all the same.
    cluster.control_plane.set(AUTHORIZATION_TYPE_URL, "shop/bad", b"\xff".to_vec());
    cluster.control_plane.unset(AUTHORIZATION_TYPE_URL, "shop/bad");
    cluster.enforce(&policy("good", Scope::Namespace, Action::Deny, principal("client"))).await;
    ask(client, to).await.unwrap_err();
}

#[tokio::test]
async fn what_could_not_be_read_refuses_in_a_successor_without_a_control_plane_too() {
    if !root_or_skip("an unreadable policy and a restart") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["client", "web"])]).await;
    let (client, web) = (cluster.pod("client").clone(), cluster.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    ask(&client, to).await.unwrap();
    let m = [0x2a, 0x05, 0x0a, 0x03, 10, 0, 0]; // an address of three bytes
    cluster.control_plane.set(AUTHORIZATION_TYPE_URL, "shop/never", hand::policy("never", 1, 1, &m));
    cluster.in_force().await;
    ask(&client, to).await.unwrap_err();

    // At once: it was kept before it was answered.
    cluster.kill_control_plane();
    cluster.ztunnel_mut("a").signal(Signal::SIGKILL);
    cluster.ztunnel_mut("a").ended().await;
    cluster.run("a").await;
    assert_eq!(cluster.ztunnel("a").metric("culvert_xds_kept_state").await, 1.0);
    ask(&client, to).await.unwrap_err();
}

#[tokio::test]
async fn messages_of_istio_made_by_hand_are_enforced() {
    if !root_or_skip("messages of Istio") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client", "other"]), ("b", &["web", "outside"])]).await;
    let [client, other, web, old] = ["client", "other", "web", "outside"].map(|n| cluster.pod(n));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    // The pod as Istio's control plane tells of it: what is by default is left out, and it lists a policy.
    let body = hand::workload("Kubernetes//Pod/shop/web", "web", web.ipv4.octets(), "shop/only-other");
    cluster.control_plane.set(proto::ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/web", body);
    cluster.in_force().await;
    ask(other, to).await.expect_err("a policy that is not known");
    // principals { exact: cluster.local/ns/shop/sa/other }
    let who = b"cluster.local/ns/shop/sa/other";
    let m = hand::field(3, &hand::field(1, who));
    let allow = hand::policy("only-other", 2, 0, &m);
    cluster.control_plane.set(AUTHORIZATION_TYPE_URL, "shop/only-other", allow);
    cluster.in_force().await;
    ask(other, to).await.unwrap();
    ask(client, to).await.unwrap_err();
    ask(old, to).await.unwrap_err();
}

#[tokio::test]
async fn settings_of_the_mesh_come_with_the_rest() {
    if !root_or_skip("settings by ADS") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client", "near", "outside"])]).await;
    let client = cluster.pod("client");
    let _server = serve(cluster.pod("outside"), PORT);
    let known = SocketAddr::new(cluster.pod("outside").ipv4.into(), PORT);
    ask(client, known).await.unwrap();
    // Nobody tells of it any more.
    cluster.control_plane.unset(proto::ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/outside");
    cluster.in_force().await;
    ask(client, known).await.unwrap();
    let outbound = model::OutboundMode::RegistryOnly;
    let namespaces = std::sync::Arc::new([("shop".into(), model::NodeLocal::Direct)].into());
    let node_local = model::NodeLocalModes { namespaces, ..model::NodeLocalModes::default() };
    cluster.control_plane.settings(&Settings { outbound, node_local, ..Settings::default() });
    cluster.in_force().await;
    ask(client, known).await.unwrap_err();
    let near = cluster.pod("near");
    let _near = serve(near, PORT);
    ask(client, SocketAddr::new(near.ipv4.into(), PORT)).await.unwrap();
    cluster.ztunnel("a").last(|c| c["carrier"] == "node-local" && c["direction"] == "inbound").await;
    eventually("the settings are shown", async || {
        cluster.ztunnel("a").config_dump().await["settings"].to_string().to_lowercase().contains("registry")
    })
    .await;
}

/// Messages as bytes, by the field numbers of Istio's protocol (facts: WDS).
mod hand {
    /// A field with a length.
    pub fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![(number << 3) | 2];
        out.push(u8::try_from(content.len()).unwrap());
        assert!(content.len() < 128, "a varint of one byte");
        out.extend(content);
        out
    }

    /// `Authorization` in the namespace `shop` with one rule, one clause, one match.
    pub fn policy(name: &str, scope: u8, action: u8, m: &[u8]) -> Vec<u8> {
        let mut out = field(1, name.as_bytes());
        out.extend(field(2, b"shop"));
        out.extend([3 << 3, scope, 4 << 3, action]);
        out.extend(field(5, &field(1, &field(2, m))));
        out
    }

    /// `Address { workload }` in the namespace `shop` that speaks HBONE, as its own service account.
    pub fn workload(uid: &str, name: &str, ip: [u8; 4], policy: &str) -> Vec<u8> {
        let mut w = field(1, name.as_bytes());
        w.extend(field(2, b"shop"));
        w.extend(field(3, &ip));
        w.extend([5 << 3, 1]); // tunnel_protocol: HBONE
        w.extend(field(7, name.as_bytes()));
        w.extend([0x82, 0x01]); // 16: authorization_policies
        w.push(u8::try_from(policy.len()).unwrap());
        w.extend(policy.as_bytes());
        w.extend([0xa2, 0x01]); // 20: uid
        w.push(u8::try_from(uid.len()).unwrap());
        w.extend(uid.as_bytes());
        field(1, &w)
    }
}
