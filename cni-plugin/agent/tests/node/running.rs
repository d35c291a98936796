//! Pods that run already: they join and leave the mesh without losing a connection.

use std::time::Duration;

use harness::netns::root_or_skip;

use super::lab::{Container, FakeZtunnel, World, application, dial, echo, who};

#[tokio::test]
async fn a_label_puts_running_pods_into_the_mesh_and_takes_them_out() {
    if !root_or_skip("a label puts running pods into the mesh and takes them out") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    let uid = world.uid("web");
    let _container = Container::start(world.host("web"), &uid);
    application(world.host("web"));
    application(world.host("client"));
    world.server.publish();
    agent.run();
    let (mut inbound, by) = dial(world.host("client"), world.address("web", false)).await.unwrap();
    assert_eq!(by, "app");
    let (mut outbound, _) = dial(world.host("web"), world.address("client", true)).await.unwrap();

    world.server.change("web", |pod| pod.mode = Some("ambient".to_owned()));
    agent.until("enrolled", || agent.state(&uid).as_deref() == Some("enrolled")).await;
    agent.until("annotated", || world.server.redirection("web").as_deref() == Some("enabled")).await;
    // DEL of an earlier sandbox, whose namespace is gone, is not of this one.
    let (mut earlier, netns) = (world.request("web"), String::new());
    (earlier.container_id, earlier.netns) = ("earlier".to_owned(), netns);
    agent.node.del(&earlier);
    assert_eq!(agent.state(&uid).as_deref(), Some("enrolled"));
    echo(&mut inbound, "goes on").await;
    echo(&mut outbound, "goes on").await;
    for v6 in [false, true] {
        assert_eq!(who(world.host("client"), world.address("web", v6)).await, "ztunnel");
    }
    let (mut carried, by) = dial(world.host("client"), world.address("web", true)).await.unwrap();
    assert_eq!(by, "ztunnel");

    world.server.change("web", |pod| pod.mode = None);
    agent.until("ztunnel lets go", || ztunnel.was_told(&format!("del {uid}"))).await;
    assert_eq!(world.server.redirection("web"), None);
    agent.until("leaving", || agent.state(&uid).as_deref() == Some("leaving")).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "app");
    echo(&mut carried, "goes on").await;
    echo(&mut inbound, "goes on").await;
    // What is carried keeps the last rules; with its end they go.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(agent.state(&uid).as_deref(), Some("leaving"));
    echo(&mut carried, "goes on").await;
    drop(carried);
    agent.until("gone", || agent.state(&uid).is_none()).await;
    assert_eq!(world.rules_in("web"), "");
    echo(&mut outbound, "goes on").await;
}

#[tokio::test]
async fn a_running_pod_that_no_ztunnel_serves_is_closed_and_users_are_told() {
    if !root_or_skip("a running pod that no ztunnel serves is closed and users are told") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let uid = world.uid("web");
    let _container = Container::start(world.host("web"), &uid);
    application(world.host("web"));
    world.server.publish();
    agent.run();
    world.server.label("shop", Some("ambient"));
    agent.until("closed", || agent.state(&uid).as_deref() == Some("closed")).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "nobody");
    agent.until("said", || world.server.redirection("web").as_deref() == Some("pending")).await;
    let told =
        |text: &str| world.server.notices.lock().unwrap().iter().any(|notice| notice.note.contains(text));
    agent.until("told", || told("no ztunnel is connected")).await;
    // The other pods of the namespace have no processes here: they are said to be not captured.
    agent.until("not captured", || agent.node.counts().not_captured == 2).await;
    agent.until("told", || told("culvert-node needs hostPID")).await;

    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.until("enrolled", || agent.state(&uid).as_deref() == Some("enrolled")).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "ztunnel");
    agent.until("said", || world.server.redirection("web").as_deref() == Some("enabled")).await;
}

#[tokio::test]
async fn annotations_are_followed_and_broken_ones_change_nothing() {
    if !root_or_skip("annotations are followed and broken ones change nothing") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.namespaces.lock().unwrap().insert("shop".to_owned(), Some("ambient".to_owned()));
    agent.add(world.request("web")).await.unwrap();
    application(world.host("web"));
    world.server.publish();
    agent.run();
    let annotate = |value: &str| {
        let key = "traffic.sidecar.istio.io/excludeInboundPorts".to_owned();
        world.server.change("web", |pod| drop(pod.annotations.insert(key, value.to_owned())));
    };
    let answers = async |expected: &str| {
        for _ in 0..300 {
            if who(world.host("client"), world.address("web", false)).await == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{expected} does not answer: {:#}", agent.node.dump());
    };
    answers("ztunnel").await;
    annotate("8080");
    answers("app").await;
    annotate("nonsense");
    // The other pods of the namespace, which have no processes, are told of too.
    let told = || world.server.notices.lock().unwrap().iter().any(|n| n.note.contains("excludeInboundPorts"));
    agent.until("told", told).await;
    answers("app").await;
    annotate("9999");
    answers("ztunnel").await;
}

#[tokio::test]
async fn a_namespace_without_the_pods_address_is_not_taken_for_the_pods() {
    if !root_or_skip("a namespace without the pod's address is not taken for the pod's") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let uid = world.uid("web");
    // A process of web that went to another pod's namespace; later one where web is.
    let _astray = Container::start(world.host("other"), &uid);
    world.server.change("web", |pod| pod.mode = Some("ambient".to_owned()));
    agent.run();
    agent.until("waiting", || agent.state(&uid).as_deref() == Some("waiting")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.rules_in("other"), "");
    let _there = Container::start(world.host("web"), &uid);
    agent.until("enrolled", || agent.state(&uid).as_deref() == Some("enrolled")).await;
    assert_eq!(world.rules_in("other"), "");
    assert_ne!(world.rules_in("web"), "");
}

#[tokio::test]
async fn pods_that_end_are_let_go_of() {
    if !root_or_skip("pods that end are let go of") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.namespaces.lock().unwrap().insert("shop".to_owned(), Some("ambient".to_owned()));
    for name in ["web", "other"] {
        agent.add(world.request(name)).await.unwrap();
    }
    world.server.publish();
    agent.run();
    world.server.change("web", |pod| pod.finished = true);
    agent.until("ended", || agent.state(&world.uid("web")).is_none()).await;
    let uid = world.uid("other");
    world.server.pods.lock().unwrap().remove("other");
    world.server.publish();
    agent.until("absent", || ztunnel.was_told(&format!("del {uid}"))).await;
    assert_eq!(agent.state(&uid), None);
    assert_ne!(world.rules_in("other"), "", "closed to the end");
}

#[tokio::test]
async fn a_namespace_that_is_not_known_yet_lets_nobody_go() {
    if !root_or_skip("a namespace that is not known yet lets nobody go") {
        return;
    }
    let world = World::new();
    let mut agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    world.server.namespaces.lock().unwrap().insert("shop".to_owned(), Some("ambient".to_owned()));
    agent.add(world.request("web")).await.unwrap();
    // The watch of namespaces is behind that of pods.
    world.server.namespaces.lock().unwrap().clear();
    world.server.publish();
    agent.run();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(agent.state(&world.uid("web")).as_deref(), Some("enrolled"));
    assert_ne!(world.rules_in("web"), "");
    world.server.label("shop", Some("none"));
    agent.until("it leaves", || agent.state(&world.uid("web")).is_none()).await;
    assert_eq!(world.rules_in("web"), "");
}
