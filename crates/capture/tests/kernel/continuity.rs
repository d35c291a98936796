//! Connections that are alive when capture comes and goes.

use std::time::Duration;

use capture::{Ports, Rules};
use net::ConnectOptions;
use tokio::io::AsyncReadExt;

use crate::fixture::{
    Case, FakeZtunnel, dial, each_case, echo, greeting, in_time, plain, start_app, two_nodes,
    ztunnel_listener,
};

#[test]
fn connections_alive_at_enrolment_go_on() {
    each_case("connections_alive_at_enrolment_go_on", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let mut inbound = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        let mut outbound = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut inbound).await;
        greeting(&mut outbound).await;

        let ztunnel = FakeZtunnel::start(&server.netns);
        capture.install(&server.netns, &Rules::default()).unwrap();
        for round in 0..200 {
            echo(&mut inbound, &format!("in {round}")).await;
            echo(&mut outbound, &format!("out {round}")).await;
        }
        assert_eq!(ztunnel.taken(), [], "the old connections go past ztunnel");

        // New ones from the same ends don't.
        let mut captured = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut captured).await;
        assert!(ztunnel.took().await.inbound);

        // The old ones outlive the end of capture too.
        capture.remove(&server.netns).unwrap();
        for round in 0..100 {
            echo(&mut inbound, &format!("in again {round}")).await;
            echo(&mut outbound, &format!("out again {round}")).await;
        }
        let mut direct = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut direct).await;
        assert_eq!(ztunnel.taken(), []);
    });
}

#[test]
fn captured_connections_outlive_a_change_of_rules() {
    each_case("captured_connections_outlive_a_change_of_rules", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&server.netns, 8080);
        let ztunnel = FakeZtunnel::start(&server.netns);
        capture.install(&server.netns, &Rules::default()).unwrap();
        let mut stream = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut stream).await;
        assert!(ztunnel.took().await.inbound);
        for dns in [false, true, false] {
            let rules = Rules { dns, ..Rules::default() };
            assert!(capture.install(&server.netns, &rules).unwrap().changed);
            assert!(!capture.install(&server.netns, &rules).unwrap().changed);
            for round in 0..50 {
                echo(&mut stream, &format!("round {round}")).await;
            }
        }
    });
}

#[test]
fn captured_connections_go_on_while_their_pod_leaves() {
    each_case("captured_connections_go_on_while_their_pod_leaves", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let ztunnel = FakeZtunnel::start(&server.netns);
        capture.install(&server.netns, &Rules::default()).unwrap();
        let (mut inbound, mut outbound) = ztunnel.both_ways(case, server, client).await;

        let leaving = Rules { leaving: true, ..Rules::default() };
        assert!(capture.install(&server.netns, &leaving).unwrap().changed);
        assert!(capture.verify(&server.netns, &leaving).unwrap().is_none());
        for round in 0..50 {
            echo(&mut inbound, &format!("in {round}")).await;
            echo(&mut outbound, &format!("out {round}")).await;
        }
        // New ones go past ztunnel, and need none.
        let mut direct = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut direct).await;
        let mut direct = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut direct).await;
        assert_eq!(ztunnel.taken(), []);

        // And back into the mesh.
        capture.install(&server.netns, &Rules::default()).unwrap();
        for round in 0..50 {
            echo(&mut inbound, &format!("in again {round}")).await;
            echo(&mut outbound, &format!("out again {round}")).await;
        }
        let mut captured = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut captured).await;
        assert!(ztunnel.took().await.inbound);
    });
}

/// ztunnel often closes first: the connection then lingers on its side for a minute, while the client's port is free.
#[test]
fn a_port_is_used_again_while_its_last_connection_lingers() {
    each_case("a_port_is_used_again_while_its_last_connection_lingers", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let ztunnel = ztunnel_listener(&server.netns, Ports::default().inbound_plaintext);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let options = ConnectOptions { source: Some(case.addr(client, 40_000)), ..plain() };
        let to = case.addr(server, 8080);
        for attempt in 1..=3 {
            let dialled = net::connect(&client.netns, &options, to, Duration::from_secs(3)).await;
            let mut dialled = dialled.unwrap_or_else(|error| panic!("attempt {attempt}: {error}"));
            let (accepted, peer) = in_time(ztunnel.accept()).await.unwrap();
            assert_eq!(peer.port(), 40_000);
            drop(accepted);
            assert_eq!(in_time(dialled.read(&mut [0])).await.unwrap(), 0);
            drop(dialled);
            let lingering = || server.shell("ss -Htan state time-wait").unwrap();
            in_time(async {
                while lingering().is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    });
}
