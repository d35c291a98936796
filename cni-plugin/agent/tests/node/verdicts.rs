//! Pods that are prepared for connections that no proxy carries: noted while they qualify, for a ztunnel to find.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use capture::{Backend, Capture, Tools};
use harness::netns::{root_or_skip, skip_without_ebpf};
use net::Netns;

use super::lab::{Agent, Container, FakeZtunnel, World, application, who};

/// The agent's part, in the network namespace of its node.
fn prepared(node: &Netns) -> Result<Arc<dyn Capture>, capture::Missing> {
    node.run(|| {
        let capture = capture::probe(Backend::Ebpf, &Tools::default())?;
        assert!(capture.prepare_verdicts().unwrap());
        Ok(capture)
    })
    .unwrap()
}

/// Takes away what is kept on the machine.
struct CleanUp {
    node: Netns,
    pods: Vec<Netns>,
    capture: Arc<dyn Capture>,
}

impl Drop for CleanUp {
    fn drop(&mut self) {
        let _ = self.node.run(capture::remove_verdicts);
        for pod in &self.pods {
            let _ = self.capture.remove(pod);
        }
    }
}

fn directory(node: &Netns) -> PathBuf {
    Path::new("/sys/fs/bpf/culvert").join(format!("verdicts-{}", node.id().inode()))
}

/// How many pods are noted, and how many devices on the node have the program.
fn kept(node: &Netns) -> (usize, usize) {
    let names = std::fs::read_dir(directory(node)).into_iter().flatten();
    let names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    let of = |beginning: &str| names.iter().filter(|name| name.starts_with(beginning)).count();
    (of("pod-"), of("link-device-"))
}

/// What the agent says of a pod.
fn said(agent: &Agent, uid: &str) -> String {
    let dump = agent.node.dump();
    let pods = dump["pods"].as_array().unwrap();
    let pod = pods.iter().find(|pod| pod["uid"] == uid);
    pod.and_then(|pod| pod["kernelVerdicts"].as_str()).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn pods_are_noted_while_they_qualify_and_the_next_agent_finds_them() {
    const WHAT: &str = "pods that are prepared for verdicts";
    if !root_or_skip(WHAT) {
        return;
    }
    let mut world = World::new();
    let node = world.lab.node("a").host.netns.clone();
    world.capture = match prepared(&node) {
        Ok(capture) => capture,
        Err(missing) => return skip_without_ebpf(WHAT, &missing),
    };
    let pods = ["web", "client"].map(|name| world.host(name).netns.clone()).into();
    let _clean_up = CleanUp { node: node.clone(), pods, capture: world.capture.clone() };
    let mut agent = world.agent().await;
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    let [web, client] = ["web", "client"].map(|name| world.uid(name));
    let _container = Container::start(world.host("client"), &client);
    application(world.host("client"));
    world.server.label("shop", Some("ambient"));
    // One that starts, and one that runs already.
    agent.add(world.request("web")).await.unwrap();
    assert_eq!(kept(&node), (1, 1), "{}", said(&agent, &web));
    agent.run();
    agent.until("both are noted", || kept(&node) == (2, 2)).await;
    assert!(said(&agent, &web).starts_with("passes ztunnel by"), "{}", said(&agent, &web));

    // A second device is a way that the first one's program doesn't see.
    let shell = |line: &str| world.host("client").shell(line).unwrap();
    shell("ip link add extra type veth peer name other && ip link set extra up");
    agent.until("it is no longer noted", || kept(&node) == (1, 2)).await;
    agent.until("that is said", || said(&agent, &client).contains("2 devices")).await;
    shell("ip link del extra");
    agent.until("it is noted again", || kept(&node) == (2, 2)).await;

    // Another process, with programs of its own in the place of these.
    drop(agent);
    assert_eq!(kept(&node), (2, 2));
    world.capture = prepared(&node).unwrap();
    let mut agent = world.agent().await;
    agent.run();
    let _ztunnel = FakeZtunnel::start(&world.socket()).await;
    agent.until("the next agent says so too", || said(&agent, &web).starts_with("passes ztunnel by")).await;
    assert_eq!(kept(&node), (2, 2));

    // Somebody takes them away.
    assert!(node.run(capture::remove_verdicts).unwrap().unwrap());
    world.capture.sweep();
    agent.until("all is there again", || kept(&node) == (2, 2)).await;

    world.server.label("shop", None);
    agent.until("neither is noted", || kept(&node) == (0, 0)).await;
    agent.until("both are out", || agent.state(&web).is_none() && agent.state(&client).is_none()).await;
    assert_eq!(who(world.host("web"), world.address("client", false)).await, "app");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(kept(&node), (0, 0));
}

#[test]
fn what_could_not_be_prepared_is_tried_again_and_stays_while_nobody_uses_it() {
    const WHAT: &str = "programs of verdicts that are refused at first";
    if !root_or_skip(WHAT) {
        return;
    }
    let node = Netns::new_empty().unwrap();
    let directory = directory(&node);
    let capture = match node.run(|| capture::probe(Backend::Ebpf, &Tools::default())).unwrap() {
        Ok(capture) => capture,
        Err(missing) => return skip_without_ebpf(WHAT, &missing),
    };
    let _clean_up = CleanUp { node: node.clone(), pods: Vec::new(), capture: capture.clone() };
    // There is no directory where this leads.
    std::os::unix::fs::symlink("/sys/fs/bpf/none/at/all", &directory).unwrap();
    let prepared = node.run(|| capture.prepare_verdicts().is_ok());
    std::fs::remove_file(&directory).unwrap();
    assert!(!prepared.unwrap());
    capture.sweep();
    assert!(directory.exists(), "it is not tried again");

    let long_ago = std::time::SystemTime::now() - Duration::from_secs(700);
    std::fs::File::open(&directory).unwrap().set_modified(long_ago).unwrap();
    capture.sweep();
    let changed = std::fs::metadata(&directory).unwrap().modified().unwrap();
    assert_eq!(changed, long_ago, "it was made anew");
}
