//! Netfilter remembers a redirected connection as long as the application may write to it. eBPF has nothing to forget.

use std::io::ErrorKind;
use std::time::Duration;

use capture::{Backend, Ports, Rules};
use harness::netns::{Host, Lab};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{Case, dial, each_case, in_time, two_nodes, ztunnel_listener};

const PREFIX: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_";
const STATES: [&str; 5] = ["close_wait", "fin_wait", "last_ack", "unacknowledged", "max_retrans"];

fn each_case_of_netfilter(name: &str, test: impl AsyncFn(Case) + Sync) {
    each_case(name, async |case: Case| {
        if case.backend != Backend::Ebpf {
            test(case).await;
        }
    });
}

fn timeout(pod: &Host, state: &str) -> u32 {
    pod.shell(&format!("cat {PREFIX}{state}")).unwrap().trim().parse().unwrap()
}

fn timeouts(pod: &Host) -> [u32; 5] {
    STATES.map(|state| timeout(pod, state))
}

/// The seconds for which the kernel remembers the one redirected connection to `port` more, once it is in `state`.
async fn remaining(pod: &Host, port: u16, state: &str) -> u32 {
    in_time(async {
        loop {
            let all = pod.shell("cat /proc/net/nf_conntrack").unwrap();
            let found = all.lines().find(|line| line.contains(&format!("dport={port} ")));
            // ipv4 2 tcp 6 432060 CLOSE_WAIT src=...
            let fields: Vec<_> = found.unwrap_or_default().split_whitespace().collect();
            if fields.get(5) == Some(&state) {
                return fields[4].parse().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

#[test]
fn a_connection_that_ztunnel_closed_stays_redirected() {
    each_case_of_netfilter("a_connection_that_ztunnel_closed_stays_redirected", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let ztunnel = ztunnel_listener(&server.netns, Ports::default().outbound);
        case.capture().install(&server.netns, &Rules::default()).unwrap();

        let mut closed = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        drop(in_time(ztunnel.accept()).await.unwrap());
        assert_eq!(in_time(closed.read(&mut [0])).await.unwrap(), 0);
        let left = remaining(server, 9090, "CLOSE_WAIT").await;
        assert!(left > 3600, "{left} s");
        // Late, the application writes: ztunnel's port resets.
        let end = in_time(async {
            loop {
                if let Err(error) = closed.write_all(b"secret").await {
                    return error.kind();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert_eq!(end.await, ErrorKind::BrokenPipe);

        // The application ends what it says, and waits for the answer.
        let mut half = dial(&server.netns, case.addr(client, 9091)).await.unwrap();
        let (mut accepted, _) = in_time(ztunnel.accept()).await.unwrap();
        half.shutdown().await.unwrap();
        assert_eq!(in_time(accepted.read(&mut [0])).await.unwrap(), 0);
        let left = remaining(server, 9091, "CLOSE_WAIT").await;
        assert!(left > 3600, "{left} s");
    });
}

#[test]
fn timeouts_are_raised_watched_and_put_back() {
    each_case_of_netfilter("timeouts_are_raised_watched_and_put_back", async |case: Case| {
        let lab = Lab::builder().node("a", &["server"]).build().unwrap();
        let server = lab.pod("server");
        let (capture, rules) = (case.capture(), Rules::default());
        let established = timeout(server, "established");
        // Of someone's choice: a short one, and one that is long enough.
        let chosen = established + 1000;
        server.shell(&format!("echo 75 >{PREFIX}close_wait")).unwrap();
        let before = timeouts(server);
        assert!(before.iter().all(|value| *value < established), "{before:?}");

        assert!(capture.install(&server.netns, &rules).unwrap().changed);
        let raised = timeouts(server);
        assert!(raised.iter().all(|value| *value >= established), "{raised:?}");
        assert!(!capture.install(&server.netns, &rules).unwrap().changed);
        assert_eq!(timeouts(server), raised);

        server.shell(&format!("echo 30 >{PREFIX}last_ack; echo {chosen} >{PREFIX}fin_wait")).unwrap();
        let drift = capture.verify(&server.netns, &rules).unwrap();
        assert!(drift.missing.len() == 1 && drift.missing[0].ends_with("last_ack"), "{drift}");
        assert!(capture.install(&server.netns, &rules).unwrap().changed);
        assert!(capture.verify(&server.netns, &rules).unwrap().is_none());
        assert_eq!(timeout(server, "fin_wait"), chosen, "it is long enough");
        server.shell(&format!("echo {} >{PREFIX}fin_wait", raised[1])).unwrap();

        assert!(capture.remove(&server.netns).unwrap());
        assert_eq!(timeouts(server), before);
        server.shell(&format!("echo {chosen} >{PREFIX}fin_wait")).unwrap();
        assert!(!capture.remove(&server.netns).unwrap());
        assert_eq!(timeout(server, "fin_wait"), chosen, "without our rules it is not ours");
    });
}
