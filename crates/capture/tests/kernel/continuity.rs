//! Connections that are alive when capture comes and goes.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use capture::{Ports, Rules};
use net::sock_diag::{self, TcpState};
use net::{ConnectOptions, Netns};
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;

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

#[test]
fn connections_made_while_their_pod_comes_and_leaves_are_not_lost() {
    each_case("connections_made_while_their_pod_comes_and_leaves_are_not_lost", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let _ztunnel = FakeZtunnel::start(&server.netns);
        let change = async |leaving| {
            let (capture, netns) = (capture.clone(), server.netns.clone());
            let rules = Rules { leaving, ..Rules::default() };
            tokio::task::spawn_blocking(move || capture.install(&netns, &rules)).await.unwrap().unwrap();
        };
        for _ in 0..5 {
            let ends = [(&server.netns, case.addr(client, 9090)), (&client.netns, case.addr(server, 8080))];
            let talkers = Talkers::start(ends.repeat(4));
            talkers.go_on().await;
            change(false).await;
            talkers.go_on().await;
            change(true).await;
            talkers.go_on().await;
            talkers.end().await;
        }
    });
}

/// A machine so busy that the handshake with ztunnel takes longer than the change of routes: here packets wait on the loopback device.
#[test]
fn a_connection_that_is_being_made_while_its_pod_leaves_is_not_lost() {
    each_case("a_connection_that_is_being_made_while_its_pod_leaves_is_not_lost", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&client.netns, 9090);
        let ztunnel = FakeZtunnel::start(&server.netns);
        let leaving = Rules { leaving: true, ..Rules::default() };
        let tbf = |action: &str, rate: &str| {
            server
                .shell(&format!("tc qdisc {action} dev lo root tbf rate {rate} burst 1600 latency 5s"))
                .unwrap();
        };
        let (mut carried, to) = (0, case.addr(client, 9090));
        for _ in 0..12 {
            capture.install(&server.netns, &Rules::default()).unwrap();
            // Two milliseconds for a byte, once a long packet has taken what may pass at once: the first packet of the handshake passes,
            // and the second, of 74 or 94 bytes, waits.
            tbf("add", "4kbit");
            let long = || {
                let socket = UdpSocket::bind("127.0.0.1:0")?;
                socket.send_to(&[0; 1540], socket.local_addr()?)
            };
            server.netns.run(long).unwrap().unwrap();
            tokio::time::sleep(Duration::from_millis(if case.v6 { 190 } else { 150 })).await;
            let netns = server.netns.clone();
            let dialled = tokio::spawn(async move { dial(&netns, to).await });
            tokio::time::sleep(Duration::from_millis(2)).await;
            let all = sock_diag::connections(&server.netns).unwrap();
            let is_begun = all.iter().any(|socket| socket.peer == to && socket.state == TcpState::SynSent);
            capture.install(&server.netns, &leaving).unwrap();
            let mut stream = dialled.await.unwrap().unwrap();
            tbf("change", "100mbit");
            greeting(&mut stream).await;
            echo(&mut stream, "made meanwhile").await;
            server.shell("tc qdisc del dev lo root").unwrap();
            let port = stream.local_addr().unwrap().port();
            let is_carried = ztunnel.taken().iter().any(|taken| taken.peer.port() == port);
            carried += u32::from(is_begun && is_carried);
            if carried == 2 {
                return;
            }
        }
        panic!("no connection was being made with ztunnel: {carried}");
    });
}

/// Some who connect again and again, and say something each time.
struct Talkers {
    over: Arc<AtomicBool>,
    made: Vec<Arc<AtomicUsize>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Talkers {
    /// One for each: from where to where.
    fn start(ends: Vec<(&Netns, SocketAddr)>) -> Self {
        let mut this = Self { over: Arc::default(), made: Vec::new(), tasks: Vec::new() };
        for (from, to) in ends {
            let (from, over, made) = (from.clone(), this.over.clone(), Arc::<AtomicUsize>::default());
            this.made.push(made.clone());
            this.tasks.push(tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let dialled = dial(&from, to).await;
                    let mut stream = dialled.unwrap_or_else(|error| panic!("to {to}: {error}"));
                    greeting(&mut stream).await;
                    echo(&mut stream, "meanwhile").await;
                    made.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        this
    }

    /// Until each has made some more connections, or one has failed.
    async fn go_on(&self) {
        let made = || self.made.iter().map(|made| made.load(Ordering::Relaxed));
        let enough: Vec<_> = made().map(|made| made + 5).collect();
        let failed = || self.tasks.iter().any(JoinHandle::is_finished);
        while !failed() && made().zip(&enough).any(|(made, enough)| made < *enough) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Fails if one of them has lost a connection.
    async fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
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
