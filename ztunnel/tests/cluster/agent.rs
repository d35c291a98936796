//! Pods by ZDS: how they come and go, and what becomes of them when the agent does.

use std::net::SocketAddr;

use harness::netns::root_or_skip;
use proto::wire::zds::workload_request::Payload;
use proto::wire::zds::{AddWorkload, WorkloadInfo};

use crate::lab::agent::uid;
use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, eventually};

#[tokio::test]
async fn pods_of_two_nodes_talk_over_hbone_as_who_the_agent_says_they_are() {
    if !root_or_skip("pods by ZDS") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client"]), ("b", &["web", "outside"])]).await;
    let (client, web, old) = (cluster.pod("client"), cluster.pod("web"), cluster.pod("outside"));
    let _servers = [serve(web, PORT), serve(old, PORT)];
    for v6 in [false, true] {
        let to = SocketAddr::new(web.ip(v6), PORT);
        assert_eq!(ask(client, to).await.unwrap().client.ip(), client.ip(v6));
        let tunnel = cluster.ztunnel("b").last(|c| c["destination"] == to.to_string()).await;
        assert_eq!(tunnel["carrier"], "hbone", "{tunnel}");
        assert_eq!(tunnel["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{tunnel}");
        ask(old, to).await.unwrap();
        ask(web, SocketAddr::new(old.ip(v6), PORT)).await.unwrap();
    }
    let b = cluster.ztunnel("b");
    assert_eq!(b.metric("culvert_zds_pods").await, 1.0);
    assert_eq!(b.metric("culvert_zds_connected").await, 1.0);
    assert_eq!(b.capture("web").await["capture"], "node-agent");
    // Out of the mesh again, while a connection lives.
    let mut open = talk(old, SocketAddr::new(web.ipv4.into(), PORT)).await.unwrap();
    assert_ne!(open.hello.client, open.local);
    cluster.agents["b"].remove(web).await;
    let direct = talk(old, SocketAddr::new(web.ipv4.into(), PORT)).await.unwrap();
    assert_eq!(direct.hello.client, direct.local, "it is still captured");
    let _ = open.echo().await; // the agent took away what its replies came by
    assert_eq!(b.metric("istio_active_proxy_count").await, 0.0);
}

#[tokio::test]
async fn pods_stay_while_the_agent_is_away_and_those_go_that_it_no_longer_knows() {
    if !root_or_skip("the agent's restart") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["client", "near", "gone"])]).await;
    let near = cluster.pod("near").clone();
    let gone = cluster.pod("gone").clone();
    let client = cluster.pod("client").clone();
    let _servers = [serve(&near, PORT), serve(&gone, PORT)];
    let to = SocketAddr::new(near.ipv4.into(), PORT);
    let mut open = talk(&client, to).await.unwrap();

    cluster.agents.get_mut("a").unwrap().stop();
    cluster.ztunnel("a").says(&["the node agent has gone", "pods=3"]).await;
    ask(&client, to).await.unwrap();
    open.echo().await.unwrap();

    cluster.agents.get_mut("a").unwrap().restart().await;
    let agent = &cluster.agents["a"];
    // One with its descriptor, one without: both stay as they are.
    agent.add(&client).await;
    agent.keep(&near).await.unwrap();
    let error =
        agent.ask(Payload::Keep(proto::wire::zds::KeepWorkload { uid: "stranger".into() }), None).await;
    assert!(error.unwrap_err().contains("not served"));
    agent.snapshot_sent().await;
    eventually("the pod that was not mentioned is gone", async || {
        cluster.ztunnel("a").metric("istio_active_proxy_count").await == 2.0
    })
    .await;
    open.echo().await.unwrap();
    ask(&client, to).await.unwrap();
    assert_eq!(cluster.ztunnel("a").metric("istio_proxies_started_total").await, 3.0, "a pod began anew");
    // Its rules stand, and nobody listens: refused, not passed.
    assert!(ask(&gone, to).await.is_err());
    assert!(ask(&client, SocketAddr::new(gone.ipv4.into(), PORT)).await.is_err());
}

#[tokio::test]
async fn what_the_agent_says_wrong_is_answered_with_why_and_ends_nothing() {
    if !root_or_skip("bad ZDS messages") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client", "near", "outside"])]).await;
    let (near, old) = (cluster.pod("near"), cluster.pod("outside"));
    let agent = &cluster.agents["a"];
    let info = |name: &str, namespace: &str| {
        Some(WorkloadInfo { name: name.into(), namespace: namespace.into(), service_account: String::new() })
    };
    let add = |uid: &str, info| {
        Payload::Add(AddWorkload { uid: uid.into(), workload_info: info, ..AddWorkload::default() })
    };
    let file = net::Netns::current().unwrap();
    for (payload, netns, words) in [
        (add("", info("x", "shop")), Some(&old.netns), "without a uid"),
        (add("u", None), Some(&old.netns), "without workload_info"),
        (add("u", info("", "shop")), Some(&old.netns), "without a name"),
        (add("u", info("x", "../etc")), Some(&old.netns), "../etc"),
        (add("u", info("x", "shop")), None, "no descriptor"),
        (add("u", info("x", "shop")), Some(&near.netns), "that of the pod shop/near"),
    ] {
        let error = agent.ask(payload, netns).await.unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    drop(file);
    let error = agent.ask_bytes(b"\xff\xff\xff", None).await.unwrap_err();
    assert!(error.contains("WorkloadRequest"), "{error}");
    let error = agent.ask_bytes(&[0x7a, 0x00], None).await.unwrap_err();
    assert!(error.contains("kind"), "{error}");
    // The node's own namespace, which ztunnel is in.
    let node = harness_node(&cluster);
    let error = agent.ask(add("v", info("y", "shop")), Some(&node)).await.unwrap_err();
    assert!(error.contains("own"), "{error}");
    assert!(cluster.ztunnel("a").metric("culvert_zds_messages_refused_total").await >= 9.0);
    let _server = serve(near, PORT);
    ask(cluster.pod("client"), SocketAddr::new(near.ipv4.into(), PORT)).await.unwrap();
}

fn harness_node(cluster: &Cluster) -> net::Netns {
    net::Netns::of_process(cluster.ztunnel("a").pid()).unwrap()
}

/// A pod of a StatefulSet is made anew under its name, with another uid, namespace and address.
#[tokio::test]
async fn a_pod_made_anew_under_its_name_is_not_served_by_what_was_known_of_the_old_one() {
    if !root_or_skip("a pod made anew") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["client", "web", "outside"])]).await;
    let (web, anew, client) = (cluster.pod("web"), cluster.pod("outside"), cluster.pod("client"));
    let agent = &cluster.agents["a"];
    agent.remove(web).await;
    let mut renamed = anew.clone();
    renamed.name = "web".into();
    agent.tell("another-uid", &renamed, "web").await.unwrap();
    agent.redirect(&renamed);
    let _server = serve(&renamed, PORT);
    let to = SocketAddr::new(renamed.ipv4.into(), PORT);
    // What the control plane knows is of another address: its policies may be others.
    assert!(ask(client, to).await.is_err());
    cluster.ztunnel("a").says(&["has not told of the pod", "Kubernetes//Pod/shop/web"]).await;
    let mut workload = cluster.workload("web");
    workload.addresses = [renamed.ipv4.into(), renamed.ipv6.into()].into();
    cluster.control_plane.unset(proto::ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/outside");
    cluster.control_plane.workload(&workload);
    cluster.in_force().await;
    let hello = ask(client, to).await.unwrap();
    assert_eq!(hello.client.ip(), client.ipv4);
    assert_ne!(uid(web), "another-uid");
}

/// What lived before, or came before the redirection stood, is decided by the policies; what the pod's annotations exempt is
/// not.
#[tokio::test]
async fn connections_from_before_the_redirection_are_decided_by_the_policies() {
    if !root_or_skip("connections from before the redirection") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["web", "outside"])]).await;
    let (web, old) = (cluster.pod("web").clone(), cluster.pod("outside").clone());
    let _servers = [serve(&web, PORT), serve(&web, 9090)];
    let (to, exempt) = (SocketAddr::new(web.ipv4.into(), PORT), SocketAddr::new(web.ipv4.into(), 9090));
    cluster.enforce(&crate::configuration::strict()).await;
    let agent = cluster.agents.get_mut("a").unwrap();
    agent.remove(&web).await;
    agent.annotations = vec![("traffic.sidecar.istio.io/excludeInboundPorts", "9090")];
    let mut before = talk(&old, to).await.unwrap();
    let mut before_exempt = talk(&old, exempt).await.unwrap();
    agent.tell("anew", &web, "web").await.unwrap();
    before.end().await.unwrap_err();
    // The listeners stand, the rules do not yet.
    let mut between = talk(&old, to).await.unwrap();
    assert_eq!(between.hello.client, between.local);
    agent.redirect(&web);
    between.end().await.unwrap_err();
    before_exempt.echo().await.unwrap();
    cluster.ztunnel("a").says(&["cut a connection of before the enrolment"]).await;
    eventually("what was cut is no longer listed", async || {
        cluster.ztunnel("a").metric("culvert_connections_before_enrolment").await == 0.0
    })
    .await;
}
