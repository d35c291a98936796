//! The lab with real namespaces; needs root.

use std::net::SocketAddr;
use std::time::Duration;

use super::wire::Watch;
use super::*;
use crate::load::{self, EXCHANGE_PORT, Plan, Shape, Talk};

const PLANS: &[PodPlan] = &[
    PodPlan { name: "one", namespace: "a", node: NodeId::One },
    PodPlan { name: "two", namespace: "a", node: NodeId::Two },
];

fn name(suffix: &str) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    Some(format!("cvt-{}-{suffix}", std::process::id()))
}

fn leftovers(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["/run/netns", "/etc/netns", "/run"] {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file.starts_with(name) {
                found.push(format!("{dir}/{file}"));
            }
        }
    }
    found
}

#[test]
fn pods_on_two_nodes_reach_each_other_and_nothing_is_left_afterwards() {
    let Some(name) = name("reach") else { return };
    let stop = Stop::default();
    let mut lab = Lab::build(&name, PLANS, &stop).unwrap();
    let two = lab.pod("two").unwrap().clone();
    // Answers the requests of one client, then those of another.
    let listen = "import socket
s = socket.create_server(('::', 7001), family=socket.AF_INET6, dualstack_ipv6=True)
for _ in range(2):
    c = s.accept()[0]
    while d := c.recv(1024, socket.MSG_WAITALL): c.sendall(d)";
    lab.spawn(&two.netns, "echo", &["python3", "-c", listen]).unwrap();
    lab.wait_listening("two", EXCHANGE_PORT).unwrap();
    // What passes in plain sight is seen: the search of the demo can find.
    let watch = Watch::start(&lab.node_netns(NodeId::One), "qqqqqqqq").unwrap();
    for ip in two.ips() {
        let outcome = load::run(Plan {
            namespace: Some(lab.pod("one").unwrap().netns_path()),
            target: SocketAddr::new(ip, EXCHANGE_PORT),
            talk: Talk::Exchange,
            shape: Shape::Closed { connections: 1, reconnect: false },
            duration: Duration::from_millis(100),
            warm_up: Duration::ZERO,
        });
        assert_eq!(outcome.unwrap().connections, 1);
    }
    let seen = watch.finish().unwrap();
    assert!(seen.hits >= 2 && seen.dropped == 0, "{} hits, {} missed", seen.hits, seen.dropped);
    for ip in two.ips() {
        assert!(seen.packets.iter().any(|p| p.is_syn_ack() && p.source == (ip, EXCHANGE_PORT)), "{ip}");
    }
    assert!(Lab::build(&name, PLANS, &stop).is_err(), "a second lab of the name while the first lives");
    assert_eq!(lab.clear(), Vec::<String>::new());
    assert_eq!(leftovers(&name), Vec::<String>::new());
}

#[test]
fn what_a_killed_owner_left_is_cleared_by_the_next() {
    let Some(name) = name("left") else { return };
    let stop = Stop::default();
    let mut lab = Lab::build(&name, PLANS, &stop).unwrap();
    let netns = lab.pod("one").unwrap().netns.clone();
    lab.spawn(&netns, "sleep", &["sleep", "100"]).unwrap();
    let pid = lab.processes[0].pid();
    // As after a SIGKILL: no destructor runs, and the owner on record is gone.
    lab.state.record_owner_gone().unwrap();
    lab.keep = true;
    lab.processes[0].release();
    let mut again = Lab::build(&name, PLANS, &stop).unwrap();
    lab.processes[0].terminate();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(again.clear(), Vec::<String>::new());
    assert_eq!(leftovers(&name), Vec::<String>::new());
}
