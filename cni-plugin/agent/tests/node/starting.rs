//! Pods that start: ADD, CHECK, DEL and GC.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use capture::Rules;
use harness::netns::root_or_skip;
use node_agent::node::Answer;

use super::lab::{Agent, FakeZtunnel, World, application, who};

async fn world(mode: Option<&str>) -> (World, Agent) {
    let world = World::new();
    world.server.namespaces.lock().unwrap().insert("shop".to_owned(), mode.map(str::to_owned));
    let agent = world.agent().await;
    (world, agent)
}

#[tokio::test]
async fn a_pod_of_the_mesh_is_captured_before_add_returns() {
    if !root_or_skip("a pod of the mesh is captured before ADD returns") {
        return;
    }
    let (world, mut agent) = world(Some("ambient")).await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    let uid = world.uid("web");
    assert!(ztunnel.was_told(&format!("add {uid}")));
    application(world.host("web"));
    for v6 in [false, true] {
        assert_eq!(who(world.host("client"), world.address("web", v6)).await, "ztunnel");
        assert_eq!(who(world.host("web"), world.address("client", v6)).await, "ztunnel");
    }
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled), "twice is as good as once");
    agent.node.check(&world.request("web")).await.unwrap();
    let counts = agent.node.counts();
    assert_eq!((counts.enrolled, counts.not_captured), (1, 0));
    // Others are told.
    world.server.publish();
    agent.run();
    agent.until("annotated", || world.server.redirection("web").as_deref() == Some("enabled")).await;

    // Somebody changes the rules: CHECK says so, and they come back.
    world.host("web").shell("nft delete table inet culvert").unwrap();
    agent.until("restored", || !world.drift("web", &Rules::default())).await;
    agent.node.check(&world.request("web")).await.unwrap();

    agent.node.del(&world.request("web"));
    assert_eq!(agent.state(&uid), None);
    agent.until("ztunnel lets go", || ztunnel.was_told(&format!("del {uid}"))).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "nobody", "closed to the end");
    agent.node.del(&world.request("web"));
}

#[tokio::test]
async fn a_pod_that_no_ztunnel_serves_does_not_start() {
    if !root_or_skip("a pod that no ztunnel serves does not start") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let refusal = agent.add(world.request("web")).await.unwrap_err();
    assert_eq!(refusal.code, 11);
    assert!(refusal.message.contains("no ztunnel is connected"), "{}", refusal.message);
    let _refusing = FakeZtunnel::refusing(&world.socket(), Some("no room")).await;
    let refusal = agent.add(world.request("web")).await.unwrap_err();
    assert!(
        refusal.message.contains("shop/web") && refusal.message.contains("no room"),
        "{}",
        refusal.message
    );
    assert_eq!(world.rules_in("web"), "", "nothing is left in its namespace");
    assert_eq!(agent.state(&world.uid("web")), None);
    // One that comes a little later is waited for.
    let (adding, starting) = tokio::join!(agent.add(world.request("web")), async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        FakeZtunnel::start(&world.socket()).await
    });
    assert_eq!(adding, Ok(Answer::Enrolled));
    assert!(starting.was_told(&format!("add {}", world.uid("web"))));
}

#[tokio::test]
async fn who_is_not_in_the_mesh_starts_without_a_ztunnel() {
    if !root_or_skip("who is not in the mesh starts without a ztunnel") {
        return;
    }
    let (world, agent) = world(None).await;
    assert!(matches!(agent.add(world.request("web")).await, Ok(Answer::Outside(_))));
    assert_eq!(world.rules_in("web"), "");
    agent.node.check(&world.request("web")).await.unwrap();
    // What its own label says comes first.
    world.server.change("web", |pod| pod.mode = Some("ambient".to_owned()));
    assert_eq!(agent.add(world.request("web")).await.unwrap_err().code, 11);
    world.server.change("web", |pod| pod.host_network = true);
    assert!(
        matches!(agent.add(world.request("web")).await, Ok(Answer::Outside(why)) if why.contains("hostNetwork"))
    );
}

#[tokio::test]
async fn a_namespace_that_is_not_the_pods_is_refused() {
    if !root_or_skip("a namespace that is not the pod's is refused") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let with = |netns: &str| {
        let mut request = world.request("web");
        request.netns = netns.to_owned();
        agent.add(request)
    };
    let others = format!("/run/netns/{}", world.host("other").namespace);
    for (netns, said) in [
        (&*others, "has none of the pod's addresses"),
        ("/proc/self/ns/net", "the node's own"),
        ("/proc/self/ns/mnt", "not a network namespace"),
        ("/run/netns/no-such-namespace", "does not exist"),
        ("/etc/passwd", "not a namespace file"),
    ] {
        let refusal = with(netns).await.unwrap_err();
        assert!(refusal.message.contains(said), "{netns}: {}", refusal.message);
    }
    assert_eq!(world.rules_in("other"), "");
    // Two pods in one namespace: one of them is not where it seems to be.
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    let mut request = world.request("other");
    (request.netns, request.ips) = (world.request("web").netns, world.request("web").ips);
    let refusal = agent.add(request).await.unwrap_err();
    assert!(refusal.message.contains("is that of pod shop/web"), "{}", refusal.message);
}

#[tokio::test]
async fn what_is_not_known_is_asked_for_and_not_guessed() {
    if !root_or_skip("what is not known is asked for and not guessed") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.away.store(true, Ordering::Relaxed);
    let refusal = agent.add(world.request("web")).await.unwrap_err();
    assert!(refusal.code == 11 && refusal.message.contains("it is away"), "{refusal:?}");
    // Known from the watches: the API server is not needed.
    world.server.publish();
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    world.server.away.store(false, Ordering::Relaxed);
    let mut request = world.request("other");
    request.pod_uid = "of-an-earlier-pod".to_owned();
    let refusal = agent.add(request).await.unwrap_err();
    assert!(refusal.message.contains("not known"), "{refusal:?}");
    // A runtime that does not tell the uid.
    let mut request = world.request("other");
    request.pod_uid = String::new();
    assert_eq!(agent.add(request).await, Ok(Answer::Enrolled));
}

#[tokio::test]
async fn an_annotation_that_cannot_be_read_keeps_the_pod_from_starting() {
    if !root_or_skip("an annotation that cannot be read keeps the pod from starting") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let key = "traffic.sidecar.istio.io/excludeInboundPorts";
    world.server.change("web", |pod| drop(pod.annotations.insert(key.to_owned(), "http".to_owned())));
    let refusal = agent.add(world.request("web")).await.unwrap_err();
    assert!(refusal.code == 7 && refusal.message.contains("excludeInboundPorts"), "{refusal:?}");
    world.server.change("web", |pod| drop(pod.annotations.insert(key.to_owned(), "8080".to_owned())));
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    application(world.host("web"));
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "app", "it is excluded");
}

#[tokio::test]
async fn sandboxes_that_are_gone_are_let_go_of() {
    if !root_or_skip("sandboxes that are gone are let go of") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    for name in ["web", "other"] {
        assert_eq!(agent.add(world.request(name)).await, Ok(Answer::Enrolled));
    }
    // DEL of an earlier sandbox of the same pod.
    let mut earlier = world.request("web");
    earlier.container_id = "earlier".to_owned();
    agent.node.del(&earlier);
    assert!(agent.state(&world.uid("web")).is_some());
    let valid: HashSet<String> = ["web-sandbox".to_owned()].into();
    assert_eq!(agent.node.gc(&valid), 1);
    assert!(agent.state(&world.uid("web")).is_some() && agent.state(&world.uid("other")).is_none());
    agent.until("ztunnel lets go", || ztunnel.was_told(&format!("del {}", world.uid("other")))).await;
    let refusal = agent.node.check(&world.request("other")).await.unwrap_err();
    assert!(refusal.message.contains("not captured"), "{refusal:?}");
}

#[tokio::test]
async fn a_sandbox_that_the_runtimes_list_is_older_than_is_kept() {
    if !root_or_skip("a sandbox that the runtime's list is older than is kept") {
        return;
    }
    let (mut world, _) = world(Some("ambient")).await;
    world.times.fresh = std::time::Duration::from_secs(60);
    let agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    assert_eq!(agent.node.gc(&HashSet::new()), 0, "it was added after the list was made");
    assert!(agent.state(&world.uid("web")).is_some());
    // One that an earlier agent added is older than any list.
    drop(agent);
    let agent = world.agent().await;
    assert_eq!(agent.node.gc(&HashSet::new()), 1);
}

#[tokio::test]
async fn a_namespace_that_was_just_labelled_is_asked_for() {
    if !root_or_skip("a namespace that was just labelled is asked for") {
        return;
    }
    let (mut world, agent) = world(None).await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.publish();
    // The label is there, and the pod; the watch of namespaces has not said so.
    let label = |mode: Option<&str>| {
        world.server.namespaces.lock().unwrap().insert("shop".to_owned(), mode.map(str::to_owned))
    };
    label(Some("ambient"));
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    assert!(ztunnel.was_told(&format!("add {}", world.uid("web"))));
    // It stays: what was asked for counts until the watch says more.
    agent.node.reconcile().await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(agent.state(&world.uid("web")).as_deref(), Some("enrolled"));
    drop(agent);

    label(None);
    world.server.publish();
    let agent = world.agent().await;
    world.server.away.store(true, Ordering::Relaxed);
    let refusal = agent.add(world.request("other")).await.unwrap_err();
    assert!(refusal.code == 11 && refusal.message.contains("can't be found out"), "{refusal:?}");
    // What does not hang on the namespace is not asked for.
    world.server.change("other", |pod| pod.mode = Some("none".to_owned()));
    assert!(matches!(agent.add(world.request("other")).await, Ok(Answer::Outside(_))));
    drop(agent);

    // A pod that is known for long, whose sandbox is made anew: whatever was said of its namespace before it, is known.
    world.server.change("other", |pod| pod.mode = None);
    world.times.trust = std::time::Duration::from_millis(50);
    let agent = world.agent().await;
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    world.server.breaks(true);
    assert!(matches!(agent.add(world.request("other")).await, Ok(Answer::Outside(_))));
    // One that came while the watch was broken is none of these.
    world.server.breaks(false);
    world.times.trust = std::time::Duration::from_secs(60);
    let agent = world.agent().await;
    world.server.breaks(true);
    assert_eq!(agent.add(world.request("other")).await.unwrap_err().code, 11);
}

#[tokio::test]
async fn a_pod_that_is_deleted_while_it_is_asked_for_is_no_ghost() {
    if !root_or_skip("a pod that is deleted while it is asked for is no ghost") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let (uid, request) = (world.uid("web"), world.request("web"));
    world.server.deletes.store(true, Ordering::Relaxed);
    let refusal = agent.add(request).await.unwrap_err();
    assert!(refusal.message.contains("not known to the API server"), "{refusal:?}");
    assert!(!world.server.names(&uid));
}

#[tokio::test]
async fn addresses_that_are_not_told_are_those_of_the_namespace() {
    if !root_or_skip("addresses that are not told are those of the namespace") {
        return;
    }
    let (world, agent) = world(Some("ambient")).await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.change("web", |pod| pod.addresses.clear());
    let mut request = world.request("web");
    request.ips.clear();
    assert_eq!(agent.add(request).await, Ok(Answer::Enrolled));
    let record = node_agent::record::Record::open(&world.directory.path().join("state")).unwrap();
    let mut recorded = record.entries()[0].addresses.clone();
    recorded.sort_unstable();
    assert_eq!(recorded, super::lab::ip(world.host("web")), "and nothing that each namespace has");
    // A namespace without any can't be told from another.
    world.server.change("other", |pod| pod.addresses.clear());
    world.host("other").shell("ip addr flush dev eth0 scope global").unwrap();
    let mut request = world.request("other");
    request.ips.clear();
    let refusal = agent.add(request).await.unwrap_err();
    assert!(refusal.message.contains("none of the pod's addresses is known"), "{refusal:?}");
}

#[tokio::test]
async fn a_pod_with_ipv6_alone_is_captured_and_probed() {
    if !root_or_skip("a pod with IPv6 alone is captured and probed") {
        return;
    }
    use capture::{NodeProbes, Tools};
    let (mut world, _) = world(Some("ambient")).await;
    // A node without groups of version 2: its root is the kubelet.
    let files = world.directory.path().join("none");
    std::fs::create_dir(&files).unwrap();
    let finder = node_agent::probes::Finder { proc: files.clone(), cgroups: files, given: None };
    let nat = NodeProbes::find(&Tools::default()).unwrap();
    let node = world.lab.node("a").host.netns.clone();
    world.probes = Some(node_agent::probes::KubeletProbes::new(nat, node, finder));
    let agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;

    world.host("web").shell("ip -4 addr flush dev eth0").unwrap();
    let v6 = world.host("web").ip(true);
    world.server.change("web", |pod| {
        (pod.addresses, pod.probe_ports) = (vec![v6], vec![super::lab::PORT]);
    });
    let mut request = world.request("web");
    request.ips = serde_json::from_value(serde_json::json!([
        { "Address": { "IP": v6 } }, { "Address": { "IP": "fe80::1" } },
    ]))
    .unwrap();
    assert_eq!(agent.add(request).await, Ok(Answer::Enrolled));
    application(world.host("web"));
    let address = world.address("web", true);
    assert_eq!(who(world.host("client"), address).await, "ztunnel");
    assert_eq!(who(&world.lab.node("a").host, address).await, "app", "a probe reaches the application");
    // Both families.
    world.server.change("other", |pod| pod.probe_ports = vec![super::lab::PORT]);
    assert_eq!(agent.add(world.request("other")).await, Ok(Answer::Enrolled));
    application(world.host("other"));
    for v6 in [false, true] {
        let address = world.address("other", v6);
        assert_eq!(who(&world.lab.node("a").host, address).await, "app", "{address}");
        assert_eq!(who(world.host("client"), address).await, "ztunnel", "{address}");
    }
}

#[tokio::test]
async fn static_pods_are_known_by_the_kubelets_uid_and_labels_of_excluded_namespaces_are_reported() {
    if !root_or_skip(
        "static pods are known by the kubelet's uid and labels of excluded namespaces are reported",
    ) {
        return;
    }
    let (world, mut agent) = world(Some("ambient")).await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    let hash = "0123456789abcdef0123456789abcdef";
    world.server.change("web", |pod| pod.static_uid = Some(hash.to_owned()));
    let mut request = world.request("web");
    request.pod_uid = hash.to_owned();
    assert_eq!(agent.add(request.clone()).await, Ok(Answer::Enrolled));
    assert!(ztunnel.was_told(&format!("add {}", world.uid("web"))), "ztunnel is told the object's uid");
    agent.node.check(&request).await.unwrap();

    world.server.change("other", |pod| pod.identity.namespace = "kube-system".to_owned());
    world.server.label("kube-system", Some("ambient"));
    agent.run();
    let told =
        || world.server.notices.lock().unwrap().iter().filter(|n| n.reason == "NamespaceExcluded").count();
    agent.until("told", || told() == 1).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(told(), 1, "once");
    agent.node.del(&request);
    assert_eq!(agent.state(&world.uid("web")), None);
}
