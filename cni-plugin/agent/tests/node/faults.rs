//! What goes wrong on a node while pods start: sandboxes that end, disks that are full, processes that are killed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use harness::netns::root_or_skip;
use node_agent::node::Answer;
use node_agent::record::Record;

use super::lab::{Agent, FakeZtunnel, World, application, who};

async fn world() -> (World, Agent, FakeZtunnel) {
    let world = World::labelled();
    let agent = world.agent().await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    (world, agent, ztunnel)
}

/// Nothing is known of any pod.
async fn nothing_is_left(world: &World, agent: &Agent, ztunnel: &FakeZtunnel, uid: &str) {
    agent.until("nothing is known", || agent.state(uid).is_none()).await;
    let record = || Record::open(&world.directory.path().join("state")).unwrap().entries().len();
    agent.until("nothing is recorded", || record() == 0).await;
    let counts =
        |what: &str| ztunnel.told.lock().unwrap().iter().filter(|told| told.starts_with(what)).count();
    let is_balanced = || counts("add") == counts("del") && agent.ztunnels.served(uid).is_err();
    agent.until("ztunnel has let go", is_balanced).await;
}

#[tokio::test]
async fn a_sandbox_that_ends_while_it_is_added_leaves_nothing() {
    if !root_or_skip("a sandbox that ends while it is added leaves nothing") {
        return;
    }
    let (world, agent, ztunnel) = world().await;
    let uid = world.uid("web");
    let node = agent.node.clone();
    ztunnel.hold.store(true, Ordering::Relaxed);
    let adding = tokio::spawn({
        let (node, request) = (node.clone(), world.request("web"));
        async move { node.add(request).await }
    });
    agent.until("asked", || ztunnel.was_told(&format!("add {uid}"))).await;
    // The kubelet ends the sandbox, and its device is gone with it: nobody waits for the answer any more.
    world.host("web").shell("ip link del eth0").unwrap();
    node.del(&world.request("web"));
    node.del(&world.request("web"));
    ztunnel.hold.store(false, Ordering::Relaxed);
    let refusal = adding.await.unwrap().unwrap_err();
    assert!(refusal.message.contains("ended while it was added"), "{refusal:?}");
    nothing_is_left(&world, &agent, &ztunnel, &uid).await;
}

#[tokio::test]
async fn the_next_sandbox_of_a_pod_waits_for_the_one_before() {
    if !root_or_skip("the next sandbox of a pod waits for the one before") {
        return;
    }
    let (world, agent, ztunnel) = world().await;
    let uid = world.uid("web");
    ztunnel.hold.store(true, Ordering::Relaxed);
    let add = |container: &str, pod: &str| {
        let (node, mut request) = (agent.node.clone(), world.request("web"));
        request.container_id = container.to_owned();
        // The later sandbox is elsewhere.
        request.netns = world.request(pod).netns;
        request.ips = world.request(pod).ips;
        tokio::spawn(async move { node.add(request).await })
    };
    let earlier = add("earlier", "web");
    agent.until("asked", || ztunnel.was_told(&format!("add {uid}"))).await;
    // It fails when its time is up, and must not take the next one with it, which has begun before.
    let next = add("next", "other");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut request = world.request("web");
    request.container_id = "earlier".to_owned();
    agent.node.del(&request);
    earlier.await.unwrap().unwrap_err();
    ztunnel.hold.store(false, Ordering::Relaxed);
    assert_eq!(next.await.unwrap(), Ok(Answer::Enrolled));
    assert_eq!(agent.ztunnels.served(&uid), Ok(()));
    let inode = world.host("other").netns.id().inode().to_string();
    assert!(agent.node.dump()["pods"][0]["netns"].as_str().unwrap().contains(&inode));
    agent.node.del(&request);
    assert_eq!(agent.state(&uid).as_deref(), Some("enrolled"), "DEL of the earlier one is not of this one");
}

/// A file system without room, until it is dropped.
struct FullDisk(std::path::PathBuf);

impl FullDisk {
    fn mount(path: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=16k", "culvert-test"];
        let status = std::process::Command::new("mount").args(mount).arg(&path).status().unwrap();
        assert!(status.success());
        Self(path)
    }

    fn fill(&self) {
        // It fails at the end of the room.
        let _ = std::fs::write(self.0.join("filling"), vec![0; 64 << 10]);
        assert!(std::fs::write(self.0.join("more"), "x").is_err());
        let _ = std::fs::remove_file(self.0.join("more"));
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.join("filling")).unwrap();
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_keeps_no_pod_from_being_captured() {
    if !root_or_skip("a full disk keeps no pod from being captured") {
        return;
    }
    let world = World::labelled();
    let state = world.directory.path().join("state");
    let disk = FullDisk::mount(state.clone());
    let (web, other) = (world.uid("web"), world.uid("other"));
    let recorded = || Record::open(&state).unwrap().get(&web).is_some();
    {
        let agent = world.agent().await;
        let _ztunnel = FakeZtunnel::start(&world.socket()).await;
        agent.add(world.request("other")).await.unwrap();
        disk.fill();
        assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
        agent.node.check(&world.request("web")).await.unwrap();
        assert!(!recorded());
        application(world.host("web"));
        assert_eq!(who(world.host("client"), world.address("web", false)).await, "ztunnel");
    }
    // The next agent knows the pod from nothing but its label and its processes; until then its rules refuse.
    let _container = super::lab::Container::start(world.host("web"), &web);
    let mut agent = world.agent().await;
    assert_eq!((agent.state(&web), agent.state(&other).as_deref()), (None, Some("enrolled")));
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "nobody");
    world.server.publish();
    agent.run();
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.until("found", || agent.state(&web).as_deref() == Some("enrolled")).await;
    assert_eq!(who(world.host("client"), world.address("web", false)).await, "ztunnel");
    // What is not written is tried again.
    assert!(!recorded());
    disk.empty();
    agent.until("recorded", recorded).await;
}

/// As runtimes do after their own restart, and with less each time: without a namespace, and of a sandbox that nobody knows.
#[tokio::test]
async fn del_twice_is_as_good_as_once() {
    if !root_or_skip("DEL twice is as good as once") {
        return;
    }
    let (world, agent, ztunnel) = world().await;
    let (uid, other) = (world.uid("web"), world.uid("other"));
    for name in ["web", "other"] {
        assert_eq!(agent.add(world.request(name)).await, Ok(Answer::Enrolled));
    }
    agent.node.del(&world.request("web"));
    agent.node.del(&world.request("web"));
    agent.until("ztunnel lets go", || ztunnel.was_told(&format!("del {uid}"))).await;
    let mut bare = world.request("web");
    bare.netns = String::new();
    agent.node.del(&bare);
    bare.container_id = "nobodys".to_owned();
    agent.node.del(&bare);
    bare.netns = "/run/netns/there-is-none".to_owned();
    agent.node.del(&bare);
    assert!(agent.state(&uid).is_none() && agent.state(&other).is_some(), "another pod's is none of it");
    let record = Record::open(&world.directory.path().join("state")).unwrap();
    assert_eq!(record.entries().into_iter().map(|entry| entry.uid).collect::<Vec<_>>(), [other]);
    // And the pod may have another sandbox, which ends the same way.
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
    agent.node.del(&world.request("web"));
    agent.until("it is let go of", || agent.state(&uid).is_none()).await;
    let told = |what: &str| ztunnel.told.lock().unwrap().iter().filter(|told| **told == what).count();
    let del = format!("del {uid}");
    agent.until("ztunnel lets go again", || told(&del) == 2).await;
}

/// The path is there when the runtime calls, and is gone when the agent looks; or leads to what is no namespace.
#[tokio::test]
async fn a_namespace_that_vanishes_before_add_looks_keeps_the_pod_waiting() {
    if !root_or_skip("a namespace that vanishes before ADD looks keeps the pod waiting") {
        return;
    }
    let (world, agent, ztunnel) = world().await;
    let left = world.directory.path().join("left");
    for (path, said) in
        [("/run/netns/there-is-none", "does not exist"), (left.to_str().unwrap(), "namespace")]
    {
        // What an unmounted namespace leaves behind.
        std::fs::write(&left, "").unwrap();
        let mut request = world.request("web");
        request.netns = path.to_owned();
        let refusal = agent.add(request).await.unwrap_err();
        assert!(refusal.message.contains("waits") && refusal.message.contains(said), "{refusal:?}");
    }
    nothing_is_left(&world, &agent, &ztunnel, &world.uid("web")).await;
    assert_eq!(agent.add(world.request("web")).await, Ok(Answer::Enrolled));
}
