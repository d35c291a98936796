//! The agent's restart, ztunnel's, and what the record is for.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use capture::{Backend, Capture, Error, Rules, Tools};
use harness::netns::{Lab, root_or_skip};
use node_agent::node::{AddRequest, Answer};
use node_agent::record::Record;

use super::lab::{Agent, Around, Container, FakeZtunnel, World, application, ip, who};

#[tokio::test]
async fn rules_that_are_gone_come_back_before_anything_is_asked() {
    if !root_or_skip("rules that are gone come back before anything is asked") {
        return;
    }
    let world = World::labelled();
    let uid = world.uid("web");
    {
        let agent = world.agent().await;
        let ztunnel = FakeZtunnel::start(&world.socket()).await;
        agent.add(world.request("web")).await.unwrap();
        agent.add(world.request("other")).await.unwrap();
        assert!(ztunnel.was_told(&format!("add {uid}")));
    }
    application(world.host("web"));
    assert_eq!(
        who(world.host("client"), world.address("web", false)).await,
        "nobody",
        "no agent, no ztunnel"
    );
    world.host("web").shell("nft flush ruleset").unwrap();
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "app");

    // Nothing is known of the cluster, and nobody is connected.
    let mut agent = world.agent().await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "nobody");
    assert_eq!(agent.state(&uid).as_deref(), Some("enrolled"));
    assert!(agent.ztunnels.served(&uid).is_err());
    // While what is known is not all, nobody is let go.
    agent.run();
    tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    assert!(agent.state(&uid).is_some());

    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.until("handed over", || ztunnel.was_told("snapshot sent")).await;
    assert!(ztunnel.was_told(&format!("add {uid}")));
    assert_eq!(who(world.host("client"), world.address("web", true)).await, "ztunnel");
    drop(ztunnel);
    agent.until("none", || agent.ztunnels.connected() == 0).await;
    assert_eq!(who(world.host("client"), world.address("web", true)).await, "nobody");
    let _next = FakeZtunnel::start(&world.socket()).await;
    agent.until("served again", || agent.ztunnels.served(&uid).is_ok()).await;
    assert_eq!(who(world.host("client"), world.address("web", true)).await, "ztunnel");
    // DEL of a sandbox that an earlier agent added.
    agent.node.del(&world.request("web"));
    assert_eq!(agent.state(&uid), None);
}

#[tokio::test]
async fn an_add_that_comes_too_late_takes_nothing_from_the_next_one() {
    if !root_or_skip("an ADD that comes too late takes nothing from the next one") {
        return;
    }
    let world = World::labelled();
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        for name in ["web", "other"] {
            agent.add(world.request(name)).await.unwrap();
        }
    }
    application(world.host("web"));
    let agent = world.agent().await;
    let sandbox = |name, id: &str| AddRequest { container_id: id.to_owned(), ..world.request(name) };
    let of = |id| sandbox("web", id);
    let begin = |request| {
        let node = agent.node.clone();
        tokio::spawn(async move { node.add(request).await })
    };
    let a_moment = || tokio::time::sleep(Duration::from_millis(100));
    // Each waits for a ztunnel, and the sandbox before it ends meanwhile.
    let second = begin(of("second"));
    a_moment().await;
    agent.node.del(&world.request("web"));
    let third = begin(of("third"));
    a_moment().await;
    agent.node.del(&of("second"));
    let others = begin(sandbox("other", "second"));
    a_moment().await;
    agent.node.del(&world.request("other"));
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let refusal = second.await.unwrap().unwrap_err();
    assert!(refusal.message.contains("its sandbox ended while it was added"), "{}", refusal.message);
    for (name, adding) in [("web", third), ("other", others)] {
        assert_eq!(adding.await.unwrap(), Ok(Answer::Enrolled), "{name}");
        assert_eq!(agent.ztunnels.served(&world.uid(name)), Ok(()), "{name}");
        assert_eq!(agent.state(&world.uid(name)).as_deref(), Some("enrolled"), "{name}");
    }
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "ztunnel");
}

#[tokio::test]
async fn pods_that_ended_meanwhile_are_forgotten() {
    if !root_or_skip("pods that ended meanwhile are forgotten") {
        return;
    }
    let world = World::labelled();
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        for name in ["web", "other"] {
            agent.add(world.request(name)).await.unwrap();
        }
    }
    // The one lost its device, as when its sandbox was ended; the other's namespace is another one now.
    world.host("web").shell("ip link del eth0").unwrap();
    let state = world.directory.path().join("state");
    let path = state.join("pods.json");
    let inode = world.host("other").netns.id().inode().to_string();
    fs::write(&path, fs::read_to_string(&path).unwrap().replace(&inode, "1")).unwrap();
    let agent = world.agent().await;
    assert_eq!(agent.node.counts().enrolled, 0);
    assert_eq!(Record::open(&state).unwrap().entries().len(), 0);
}

#[tokio::test]
async fn another_backend_takes_over_what_the_earlier_one_left() {
    if !root_or_skip("another backend takes over what the earlier one left") {
        return;
    }
    let Ok(iptables) = capture::probe(Backend::IptablesNft, &Tools::default()) else { return };
    let mut world = World::labelled();
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        agent.add(world.request("web")).await.unwrap();
    }
    world.capture = iptables;
    let agent = world.agent().await;
    assert_eq!(agent.node.counts().enrolled, 1);
    assert!(!world.drift("web", &Rules::default()));
    assert!(!world.rules_in("web").contains("table inet culvert"), "{}", world.rules_in("web"));
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.until("served", || agent.ztunnels.served(&world.uid("web")).is_ok()).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "ztunnel");
}

/// Fails as often as it is to, and works then.
fn fails(inner: Arc<dyn Capture>, times: usize) -> Arc<dyn Capture> {
    let left = AtomicUsize::new(times);
    Around::new(inner, move |install| {
        if left.try_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            let source = std::io::Error::other("a test");
            return Err(Error::Enter { netns: "a pod".to_owned(), source });
        }
        install()
    })
}

/// A pod that nftables captured, and an agent with another back-end, which could not do anything with it yet.
async fn left_by_another_backend() -> Option<(World, Agent, Container, String)> {
    let iptables = capture::probe(Backend::IptablesNft, &Tools::default()).ok()?;
    let mut world = World::labelled();
    let uid = world.uid("web");
    let container = Container::start(world.host("web"), &uid);
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        agent.add(world.request("web")).await.unwrap();
    }
    world.capture = fails(iptables, 2);
    world.server.publish();
    let agent = world.agent().await;
    assert_eq!(agent.state(&uid).as_deref(), Some("waiting"));
    assert!(world.rules_in("web").contains("table inet culvert"));
    Some((world, agent, container, uid))
}

#[tokio::test]
async fn what_another_backend_left_is_removed_though_not_at_the_first_attempt() {
    if !root_or_skip("what another backend left is removed, though not at the first attempt") {
        return;
    }
    let Some((world, mut agent, _container, uid)) = left_by_another_backend().await else { return };
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.run();
    agent.until("enrolled", || agent.state(&uid).as_deref() == Some("enrolled")).await;
    assert!(!world.rules_in("web").contains("table inet culvert"), "{}", world.rules_in("web"));
    assert!(!world.drift("web", &Rules::default()));
    let record = Record::open(&world.directory.path().join("state")).unwrap();
    assert_eq!(record.get(&uid).unwrap().backend, "iptables-nft");
}

#[tokio::test]
async fn a_pod_that_is_not_wanted_any_more_is_let_out_by_what_is_recorded() {
    if !root_or_skip("a pod that is not wanted any more is let out by what is recorded") {
        return;
    }
    let Some((world, mut agent, _container, uid)) = left_by_another_backend().await else { return };
    world.server.label("shop", None);
    agent.run();
    agent.until("forgotten", || agent.state(&uid).is_none()).await;
    assert_eq!(world.rules_in("web"), "");
}

#[tokio::test]
async fn cleaning_up_leaves_nothing_behind() {
    if !root_or_skip("cleaning up leaves nothing behind") {
        return;
    }
    let world = World::labelled();
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        for name in ["web", "other"] {
            agent.add(world.request(name)).await.unwrap();
        }
    }
    assert_eq!(ip(world.host("web")).len(), 2);
    let record = Record::open(&world.directory.path().join("state")).unwrap();
    let api = super::lab::TheApi(world.server.clone());
    let of_dead = programs_of_a_pod_that_is_gone();
    assert_eq!(node_agent::node::clean_up(&record, world.capture.clone(), Some(&api)).await, 0);
    for name in ["web", "other"] {
        assert_eq!(world.rules_in(name), "");
        assert_eq!(world.host(name).shell("ip rule | grep 0x111 || true").unwrap(), "");
    }
    assert_eq!(world.server.annotated.lock().unwrap().len(), 2);
    application(world.host("web"));
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "app");
    // The kernel takes its time to end a namespace.
    for _ in 0..200 {
        if !of_dead.as_ref().is_some_and(|kept| kept.exists()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(node_agent::node::clean_up(&record, world.capture.clone(), Some(&api)).await, 0);
    }
    panic!("{of_dead:?} is still there");
}

/// Where the programs are that a pod had which ended while no agent ran; `None` where there is no capture by eBPF.
fn programs_of_a_pod_that_is_gone() -> Option<PathBuf> {
    let programs = capture::probe(Backend::Ebpf, &Tools::default()).ok()?;
    let lab = Lab::builder().node("z", &["gone"]).build().unwrap();
    let netns = lab.pod("gone").netns.clone();
    programs.install(&netns, &Rules::default()).unwrap();
    let kept = Path::new("/sys/fs/bpf/culvert").join(netns.id().inode().to_string());
    assert!(kept.exists());
    Some(kept)
}
