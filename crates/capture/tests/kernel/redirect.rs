//! Captured connections: who meets whom, and which addresses they see.

use std::io::ErrorKind;

use capture::{Cut, Direction, Ports, Rules, live_connections};
use harness::netns::Host;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{
    Case, FakeZtunnel, app_listener, dial, each_case, echo, greeting, in_time, start_app, two_nodes,
    ztunnel_listener,
};

#[test]
fn connections_reach_ztunnel_with_both_addresses() {
    each_case("connections_reach_ztunnel_with_both_addresses", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        // The strictest setting that nodes have, for source addresses that come from "elsewhere".
        server.shell("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $f; done").unwrap();
        let capture = case.capture();
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let ztunnel = FakeZtunnel::start(&server.netns);
        assert!(capture.install(&server.netns, &Rules::default()).unwrap().changed);

        // In: ztunnel learns the client and the port; the application sees the client.
        let to = case.addr(server, 8080);
        let mut stream = dial(&client.netns, to).await.unwrap();
        assert_eq!(greeting(&mut stream).await, case.addr(client, 0).ip().to_string());
        echo(&mut stream, "in and back").await;
        let taken = ztunnel.took().await;
        assert!(taken.inbound);
        assert_eq!(taken.peer, stream.local_addr().unwrap());
        assert_eq!(taken.original_dst, to);

        // Out: ztunnel learns the destination; the other side sees the pod.
        let to = case.addr(client, 9090);
        let mut outgoing = dial(&server.netns, to).await.unwrap();
        assert_eq!(greeting(&mut outgoing).await, case.addr(server, 0).ip().to_string());
        echo(&mut outgoing, "out and back").await;
        let taken = ztunnel.took().await;
        assert!(!taken.inbound);
        assert_eq!(taken.original_dst, to);

        // Nothing of all that goes past ztunnel.
        assert_eq!(live_connections(&server.netns, &Ports::default()).unwrap(), []);

        // To an address where nobody is: ztunnel decides, not the routing table.
        let nowhere = std::net::SocketAddr::new(case.elsewhere(), 80);
        let _ = dial(&server.netns, nowhere).await;
        assert_eq!(ztunnel.took().await.original_dst, nowhere);
    });
}

#[test]
fn traffic_inside_the_pod_is_left_alone() {
    each_case("traffic_inside_the_pod_is_left_alone", async |case: Case| {
        let lab = two_nodes();
        let server = lab.pod("server");
        start_app(&server.netns, 8080);
        let ztunnel = FakeZtunnel::start(&server.netns);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let loopback = if case.v6 { "[::1]:8080" } else { "127.0.0.1:8080" }.parse().unwrap();
        for to in [loopback, case.addr(server, 8080)] {
            let mut stream = dial(&server.netns, to).await.unwrap();
            assert_eq!(greeting(&mut stream).await, to.ip().to_string());
            echo(&mut stream, "to myself").await;
        }
        assert_eq!(ztunnel.taken(), []);
    });
}

#[test]
fn a_tunnel_is_not_redirected() {
    each_case("a_tunnel_is_not_redirected", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let ztunnel = FakeZtunnel::start(&server.netns);
        let hbone = ztunnel_listener(&server.netns, Ports::default().inbound_hbone);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let stream = dial(&client.netns, case.addr(server, 15008)).await.unwrap();
        let (_, peer) = hbone.accept().await.unwrap();
        assert_eq!(net::canonical(peer), stream.local_addr().unwrap());
        assert_eq!(ztunnel.taken(), []);
    });
}

#[test]
fn the_redirect_targets_are_no_way_round() {
    each_case("the_redirect_targets_are_no_way_round", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let ztunnel = FakeZtunnel::start(&server.netns);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        // Dialled from outside, each of them is inbound traffic like any other, for ztunnel to refuse.
        for port in [15001, 15006, 15053] {
            let to = case.addr(server, port);
            let _stream = dial(&client.netns, to).await.unwrap();
            let taken = ztunnel.took().await;
            assert!(taken.inbound, "{port}");
            assert_eq!(taken.original_dst, to);
        }
    });
}

#[test]
fn what_goes_past_ztunnel_is_listed() {
    each_case("what_goes_past_ztunnel_is_listed", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let mut inbound = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        let mut outbound = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut inbound).await;
        greeting(&mut outbound).await;
        let _ztunnel = FakeZtunnel::start(&server.netns);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let mut captured = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut captured).await;

        let live = live_connections(&server.netns, &Ports::default()).unwrap();
        assert_eq!(live.len(), 2, "{live:?}");
        let find = |direction| live.iter().find(|live| live.direction == direction).unwrap();
        let (seen_in, seen_out) = (find(Direction::Inbound), find(Direction::Outbound));
        assert_eq!(seen_in.connection.peer, inbound.local_addr().unwrap());
        assert_eq!(seen_in.connection.local, case.addr(server, 8080));
        assert_eq!(seen_out.connection.local, outbound.local_addr().unwrap());

        // And can be cut, alone: the way of kernels that can end a connection, and the way of others.
        let (capture, mut rules) = (case.capture(), Rules::default());
        let cut = capture::cut(&*capture, &server.netns, &mut rules, &seen_in.connection).unwrap();
        assert_eq!(cut, Cut::Ended);
        let mut byte = [0];
        let end = in_time(inbound.read(&mut byte)).await;
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(
            capture::cut(&*capture, &server.netns, &mut rules, &seen_in.connection).unwrap(),
            Cut::Ended
        );
        echo(&mut outbound, "still here").await;

        let mut second = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut second).await;
        capture::refuse(&*capture, &server.netns, &mut rules, &seen_out.connection).unwrap();
        assert!(capture.verify(&server.netns, &rules).unwrap().is_none());
        outbound.write_all(b"?").await.unwrap();
        let end = in_time(outbound.read(&mut byte)).await;
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        echo(&mut captured, "here too").await;
        echo(&mut second, "and here").await;
    });
}

#[test]
fn a_connection_whose_listener_is_closed_is_still_incoming() {
    each_case("a_connection_whose_listener_is_closed_is_still_incoming", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let listener = app_listener(&server.netns, 8080);
        let _dialled = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        let _accepted = listener.accept().await.unwrap();
        drop(listener);
        let direction = |pod: &Host| {
            let live = live_connections(&pod.netns, &Ports::default()).unwrap();
            live.iter().map(|live| live.direction).collect::<Vec<_>>()
        };
        assert_eq!(direction(server), [Direction::Inbound]);
        assert_eq!(direction(client), [Direction::Outbound]);
    });
}

#[test]
fn a_new_namespace_is_captured_before_anybody_raised_its_loopback_device() {
    each_case("a_new_namespace_is_captured_before_anybody_raised_its_loopback_device", async |case| {
        let netns = net::Netns::new_empty().unwrap();
        let (capture, rules) = (case.capture(), Rules::default());
        capture.install(&netns, &rules).unwrap();
        assert!(capture.verify(&netns, &rules).unwrap().is_none());
    });
}
