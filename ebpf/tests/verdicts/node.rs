//! One process captures the node's pods, and another one writes verdicts.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::Command;

use ebpf::Pins;
use ebpf::verdicts::{self, Node, Verdicts, Why};
use harness::netns::Lab;
use net::Netns;

use crate::lab::{CGROUPS, LEASE, Mesh, WAIT, accept, capture, dial, lab, listen, passes, pins};

fn pods(lab: &Lab) -> Vec<Netns> {
    ["client", "server"].map(|name| lab.pod(name).netns.clone()).into()
}

/// A node whose pods are captured and noted.
fn noted(test: &str) -> Option<(Node, Lab, Pins)> {
    let lab = lab(test)?;
    let pins = pins(test, &lab)?;
    let node = Node::attach(&pins, Path::new(CGROUPS), lab.node("a").host.netns.clone()).unwrap();
    for name in ["client", "server"] {
        capture(&pins, lab.pod(name));
        node.join(&lab.pod(name).netns).unwrap();
    }
    Some((node, lab, pins))
}

fn taken(lab: Lab, pins: Pins) -> Mesh {
    let verdicts = Verdicts::take(&pins, &pods(&lab)).unwrap().expect("both are noted");
    // Whoever takes them need not be in the node's namespace.
    let elsewhere = Netns::current().unwrap();
    let [client, server] = ["client", "server"].map(|name| &lab.pod(name).netns);
    let (client, server) =
        (verdicts.qualify(&elsewhere, client).unwrap(), verdicts.qualify(&elsewhere, server).unwrap());
    Mesh { lab, pins, verdicts, client, server }
}

fn mesh(test: &str) -> Option<(Node, Mesh)> {
    noted(test).map(|(node, lab, pins)| (node, taken(lab, pins)))
}

fn entries(mesh: &Mesh, beginning: &str) -> Vec<String> {
    let names = fs::read_dir(mesh.pins.verdicts()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(beginning)).collect()
}

#[test]
fn who_takes_the_notes_lets_connections_pass_and_the_next_agent_changes_nothing() {
    let Some((node, mesh)) = mesh("verdicts by two processes") else { return };
    let found = node.join(&mesh.lab.pod("client").netns).unwrap();
    assert_eq!(
        (found.cookie, found.device, found.inside, found.exempts),
        (mesh.client.cookie, mesh.client.device, mesh.client.inside, false)
    );
    assert_eq!((entries(&mesh, "pod-").len(), entries(&mesh, "link-device-").len()), (2, 2));
    for v6 in [false, true] {
        let listener = mesh.listen(v6);
        mesh.open(v6);
        let mut client = mesh.connect(mesh.pair(v6).destination).unwrap();
        let (mut server, _) = accept(&listener).expect("it passes");
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        // As an agent that starts anew.
        let host = mesh.lab.node("a").host.netns.clone();
        let again = Node::attach(&mesh.pins, Path::new(CGROUPS), host).unwrap();
        assert!(again.stands());
        for pod in pods(&mesh.lab) {
            again.join(&pod).unwrap();
        }
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        assert!(mesh.verdicts.renew(LEASE).unwrap(), "it is no longer the owner");
        let _next = mesh.connect(mesh.pair(v6).destination).unwrap();
        accept(&listener).expect("it passes");
    }
    assert_eq!((entries(&mesh, "pod-").len(), entries(&mesh, "link-device-").len()), (2, 2));
}

#[test]
fn one_process_at_a_time_takes_them() {
    let Some((_node, lab, pins)) = noted("taking verdicts") else { return };
    let pods = pods(&lab);
    let strangers = [lab.pod("evil").netns.clone(), lab.pod("far").netns.clone()];
    assert!(Verdicts::take(&pins, &strangers).unwrap().is_none());
    assert!(Verdicts::take(&pins, &[]).unwrap().is_none());
    // Who is killed gives it on, without a word.
    let mut other = Command::new("flock");
    let mut other =
        other.args(["--no-fork", "--exclusive"]).arg(pins.verdicts()).args(["sleep", "60"]).spawn().unwrap();
    let mut refused = None;
    for _ in 0..500 {
        refused = Verdicts::take(&pins, &pods).err();
        if refused.is_some() {
            break;
        }
        std::thread::sleep(WAIT / 100);
    }
    let refused = refused.expect("it was taken twice");
    assert!(refused.is_taken(), "{refused}");
    other.kill().unwrap();
    other.wait().unwrap();
    let first = Verdicts::take(&pins, &pods).unwrap().expect("both are noted");
    assert!(Verdicts::take(&pins, &pods).unwrap_err().is_taken());
    assert!(first.renew(LEASE).unwrap());
    drop(first);
    let mesh = taken(lab, pins);
    assert!(mesh.verdicts.renew(LEASE).unwrap());
}

#[test]
fn a_pod_that_no_longer_qualifies_or_has_left_is_not_noted() {
    let Some((node, mesh)) = mesh("pods that leave verdicts") else { return };
    let here = Netns::current().unwrap();
    let [client, server, evil] = ["client", "server", "evil"].map(|name| mesh.lab.pod(name));
    assert!(matches!(node.join(&evil.netns), Err(Why::NotCaptured)));
    assert!(matches!(mesh.verdicts.qualify(&here, &evil.netns), Err(Why::NotNoted)));
    // A second device.
    client
        .shell("ip link add extra type veth peer name other && ip link set extra up && ip link set other up")
        .unwrap();
    assert!(matches!(node.join(&client.netns), Err(Why::Devices(3))));
    assert!(matches!(mesh.verdicts.qualify(&here, &client.netns), Err(Why::NotNoted)));
    client.shell("ip link del extra").unwrap();
    node.join(&client.netns).unwrap();
    mesh.verdicts.qualify(&here, &client.netns).unwrap();
    // Two notes say two things.
    let [name] = entries(&mesh, &format!("pod-{}-", mesh.client.cookie)).try_into().unwrap();
    let name: String = name;
    let other = mesh.pins.verdicts().join(format!("{}1", &name[..name.len() - 1]));
    fs::create_dir(&other).unwrap();
    assert!(matches!(mesh.verdicts.qualify(&here, &client.netns), Err(Why::NotNoted)));
    node.join(&client.netns).unwrap();
    assert!(!other.exists());
    mesh.verdicts.qualify(&here, &client.netns).unwrap();

    // What passes ends at both ends where either pod leaves.
    let listener = listen(&server.netns, mesh.pair(false).destination);
    for left in [&server.netns, &client.netns] {
        node.join(&server.netns).unwrap();
        mesh.open(false);
        let mut open = dial(&client.netns, mesh.pair(false).destination).unwrap();
        let (mut accepted, _) = accept(&listener).expect("it passes");
        assert!(passes(&mut open, &mut accepted));
        node.leave(left).unwrap();
        let other = if left == &client.netns { &mut accepted } else { &mut open };
        assert_eq!(other.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(!passes(&mut open, &mut accepted));
    }
    node.join(&server.netns).unwrap();
    assert_eq!((entries(&mesh, "pod-").len(), entries(&mesh, "link-device-").len()), (1, 1));
    assert!(matches!(mesh.verdicts.qualify(&here, &client.netns), Err(Why::NotNoted)));
}

#[test]
fn what_is_made_anew_is_not_what_was_taken_and_what_is_gone_is_swept() {
    let Some((node, mesh)) = mesh("verdicts that are made anew") else { return };
    let here = Netns::current().unwrap();
    let server = mesh.lab.pod("server");
    server.shell("ip link del eth0").unwrap();
    assert!(matches!(mesh.verdicts.qualify(&here, &server.netns), Err(Why::NotNoted)));
    assert_eq!(node.sweep(), 1);
    assert_eq!((entries(&mesh, "pod-").len(), entries(&mesh, "link-device-").len()), (1, 1));
    assert!(node.stands());
    verdicts::remove(&mesh.pins).unwrap();
    assert!(!node.stands());
    let host = mesh.lab.node("a").host.netns.clone();
    let again = Node::attach(&mesh.pins, Path::new(CGROUPS), host).unwrap();
    let client = mesh.lab.pod("client");
    assert!(matches!(again.join(&client.netns), Err(Why::NotCaptured)), "its programs have the old maps");
    capture(&mesh.pins, client);
    again.join(&client.netns).unwrap();
    assert!(matches!(mesh.verdicts.qualify(&here, &client.netns), Err(Why::OtherMaps)));
    // They are another process's now, or another value's.
    let taken = Verdicts::take(&mesh.pins, &pods(&mesh.lab)).unwrap().expect("the client is noted");
    taken.qualify(&here, &client.netns).unwrap();
}
