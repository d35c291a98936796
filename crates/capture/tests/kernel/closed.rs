//! Without a live ztunnel, and without the redirection, enrolled traffic is refused; it never passes.

use std::io;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use capture::{Backend, Include, PortRange, Ports, Rules};
use harness::netns::{Host, Lab, Process};
use net::{ConnectOptions, Netns};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{
    Case, FakeZtunnel, block_on, dial, each_case, echo, greeting, in_time, start_app, two_nodes, works,
    ztunnel_listener,
};

const NAMESPACE: &str = "CULVERT_TEST_ZTUNNEL_NAMESPACE";

/// Not a test: the process that the tests below kill. It runs only when one of them starts it.
#[test]
fn fake_ztunnel_process() {
    let Some(path) = std::env::var_os(NAMESPACE) else { return };
    block_on(async {
        let _ztunnel = FakeZtunnel::start(&Netns::open(path).unwrap());
        println!("listening");
        std::future::pending::<()>().await;
    });
}

fn start_ztunnel(pod: &Host) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "closed::fake_ztunnel_process", "--nocapture"]);
    command.env(NAMESPACE, pod.netns.name()).stdout(Stdio::piped());
    let mut process = pod.spawn(&mut command).unwrap();
    let mut printed = io::BufReader::new(process.child().stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        assert_ne!(io::BufRead::read_line(&mut printed, &mut line).unwrap(), 0, "ztunnel ended");
    }
    process
}

/// Dials for ever, and counts what came of it.
#[derive(Clone, Default)]
struct Load {
    served: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    other: Arc<AtomicU64>,
}

impl Load {
    fn start(netns: &Netns, to: std::net::SocketAddr) -> Self {
        let this = Self::default();
        let (load, netns) = (this.clone(), netns.clone());
        tokio::spawn(async move {
            loop {
                let count = match dial(&netns, to).await {
                    Ok(mut stream) => {
                        let mut byte = [0];
                        let read = stream.read(&mut byte).await;
                        net::reset(stream);
                        if matches!(read, Ok(1)) { &load.served } else { &load.other }
                    }
                    Err(io::ErrorKind::ConnectionRefused) => &load.refused,
                    Err(_) => &load.other,
                };
                count.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
        });
        this
    }

    async fn until(&self, count: &AtomicU64, more: u64) {
        let goal = count.load(Ordering::Relaxed) + more;
        in_time(async {
            while count.load(Ordering::Relaxed) < goal {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

/// Counts the packets of a kind on the link between the nodes while `during` runs.
async fn on_the_link<T>(lab: &Lab, filter: &str, during: impl Future<Output = T>) -> usize {
    let mut command = Command::new("tcpdump");
    command.args(["-i", "br0", "-n", "-l", "--immediate-mode", filter]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tcpdump = lab.link().unwrap().spawn(&mut command).unwrap();
    let mut said = io::BufReader::new(tcpdump.child().stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening on") {
        line.clear();
        assert_ne!(io::BufRead::read_line(&mut said, &mut line).unwrap(), 0, "tcpdump ended");
    }
    during.await;
    // What passed by now is printed.
    tokio::time::sleep(Duration::from_millis(100)).await;
    tcpdump.signal(Signal::SIGINT).unwrap();
    let printed = io::read_to_string(tcpdump.child().stdout.take().unwrap()).unwrap();
    printed.lines().filter(|line| !line.is_empty()).count()
}

/// SYN-ACKs of the applications of the tests.
const SYN_ACKS: &str = "(tcp src port 8080 or tcp src port 9090) and \
    ((tcp[tcpflags] & (tcp-syn|tcp-ack) == (tcp-syn|tcp-ack)) or (ip6 and ip6[53] & 0x12 == 0x12))";

#[test]
fn a_killed_ztunnel_lets_nothing_pass() {
    each_case("a_killed_ztunnel_lets_nothing_pass", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let ztunnel = start_ztunnel(server);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let inbound = Load::start(&client.netns, case.addr(server, 8080));
        let outbound = Load::start(&server.netns, case.addr(client, 9090));

        // The capture would see them: this ztunnel passes connections on in plaintext.
        let seen = on_the_link(&lab, SYN_ACKS, async {
            inbound.until(&inbound.served, 20).await;
            outbound.until(&outbound.served, 20).await;
        });
        assert!(seen.await >= 40);

        ztunnel.signal(Signal::SIGKILL).unwrap();
        drop(ztunnel);
        let seen = on_the_link(&lab, SYN_ACKS, async {
            inbound.until(&inbound.refused, 100).await;
            outbound.until(&outbound.refused, 100).await;
        });
        assert_eq!(seen.await, 0, "SYN-ACKs passed");
        let served = [inbound.served.load(Ordering::Relaxed), outbound.served.load(Ordering::Relaxed)];
        inbound.until(&inbound.refused, 10).await;
        let after = [inbound.served.load(Ordering::Relaxed), outbound.served.load(Ordering::Relaxed)];
        assert_eq!(served, after);

        // Back again, with the rules as they were.
        let _ztunnel = start_ztunnel(server);
        inbound.until(&inbound.served, 20).await;
        outbound.until(&outbound.served, 20).await;
    });
}

#[test]
fn replies_never_leave_past_ztunnel() {
    each_case("replies_never_leave_past_ztunnel", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        let _ztunnel = FakeZtunnel::start(&server.netns);
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let mut stream = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut stream).await;
        let data = "a thousand bytes, or more, ".repeat(40);
        let large = "tcp src port 8080 and greater 1000";
        // With the policy route, ztunnel brings the reply.
        assert_ne!(on_the_link(&lab, large, echo(&mut stream, &data)).await, 0);
        // Without it, the application's reply goes nowhere; not to the client, on its own.
        let line = match case.backend {
            Backend::Ebpf => "for pref in 51 55; do ip rule del pref $pref; ip -6 rule del pref $pref; done",
            _ => "ip rule del pref 32764; ip -6 rule del pref 32764",
        };
        server.shell(line).unwrap();
        let seen = on_the_link(&lab, large, async {
            stream.write_all(data.as_bytes()).await.unwrap();
            let mut byte = [0];
            let read = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut byte)).await;
            assert!(read.is_err(), "{read:?}");
        });
        assert_eq!(seen.await, 0);
        // Repaired, the connection goes on where it stood.
        case.capture().install(&server.netns, &Rules::default()).unwrap();
        let mut back = vec![0; data.len()];
        in_time(stream.read_exact(&mut back)).await.unwrap();
        assert_eq!(back, data.as_bytes());
    });
}

/// Takes the redirection away and leaves the guard, as no installation of ours does.
fn break_redirection(case: Case, pod: &Host) {
    let family = if case.v6 { "ip6tables" } else { "iptables" };
    let line = match case.backend {
        Backend::Nftables => {
            "nft flush chain inet culvert nat_prerouting; nft flush chain inet culvert nat_output".to_owned()
        }
        Backend::IptablesNft => format!("{family}-nft -t nat -F PREROUTING; {family}-nft -t nat -F OUTPUT"),
        Backend::IptablesLegacy => {
            format!("{family}-legacy -w -t nat -F PREROUTING; {family}-legacy -w -t nat -F OUTPUT")
        }
        Backend::Ebpf => {
            let pins = format!("/sys/fs/bpf/culvert/{}", pod.netns.id().inode());
            let rules = "for pref in 52 55 57; do ip rule del pref $pref; ip -6 rule del pref $pref; done";
            format!("rm {pins}/link-sockets; {rules}")
        }
    };
    pod.shell(&line).unwrap();
}

#[test]
fn what_is_not_redirected_is_refused() {
    each_case("what_is_not_redirected_is_refused", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        start_app(&server.netns, 8081);
        start_app(&client.netns, 9090);
        start_app(&client.netns, 53);
        let _ztunnel = FakeZtunnel::start(&server.netns);
        let capture = case.capture();
        let range = |port| PortRange::new(port, port).unwrap();
        let rules = Rules { exclude_inbound_ports: vec![range(8081)], ..Rules::default() };
        capture.install(&server.netns, &rules).unwrap();
        break_redirection(case, server);
        assert!(!capture.verify(&server.netns, &rules).unwrap().is_none());

        let refused = Err(io::ErrorKind::ConnectionRefused);
        let outcome = async |from: &Host, to| dial(&from.netns, to).await.map(drop);
        // The kernel detaches a program in its own time.
        in_time(async {
            while outcome(client, case.addr(server, 8080)).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(outcome(client, case.addr(server, 8080)).await, refused);
        assert_eq!(outcome(server, case.addr(client, 9090)).await, refused);
        assert_eq!(outcome(server, case.addr(client, 53)).await, refused);
        // What is exempt isn't: that is the application's owner's word.
        let mut exempt = dial(&client.netns, case.addr(server, 8081)).await.unwrap();
        greeting(&mut exempt).await;

        // Installing repairs it, and the exempt connection lives on.
        assert!(capture.install(&server.netns, &rules).unwrap().changed);
        assert!(capture.verify(&server.netns, &rules).unwrap().is_none());
        let mut captured = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut captured).await;
        echo(&mut exempt, "still here").await;
    });
}

#[test]
fn rules_change_without_a_gap() {
    each_case("rules_change_without_a_gap", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        // No ztunnel: whoever is served got through a gap.
        let capture = case.capture();
        capture.install(&server.netns, &Rules::default()).unwrap();
        let load = Load::start(&client.netns, case.addr(server, 8080));
        load.until(&load.refused, 5).await;
        for round in 0..10_u16 {
            let only = PortRange::new(8080, 9000 + round).unwrap();
            let rules =
                Rules { include_inbound_ports: Include::Only(vec![only]), dns: false, ..Rules::default() };
            let (capture, netns) = (capture.clone(), server.netns.clone());
            let install = move || capture.install(&netns, &rules).unwrap().changed;
            assert!(tokio::task::spawn_blocking(install).await.unwrap());
        }
        load.until(&load.refused, 5).await;
        assert_eq!(load.served.load(Ordering::Relaxed), 0);
        assert_eq!(load.other.load(Ordering::Relaxed), 0);
    });
}

/// Unlike a pod that is enrolled, one that someone broke has no connections of before to be patient with.
#[test]
fn a_repair_lets_nothing_pass() {
    each_case("a_repair_lets_nothing_pass", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&client.netns, 9090);
        // No ztunnel: whoever is served got through a gap.
        let capture = case.capture();
        capture.install(&server.netns, &Rules::default()).unwrap();
        let load = Load::start(&server.netns, case.addr(client, 9090));
        for _ in 0..10 {
            load.until(&load.refused, 5).await;
            break_redirection(case, server);
            load.until(&load.refused, 5).await;
            let (capture, netns) = (capture.clone(), server.netns.clone());
            let install = move || capture.install(&netns, &Rules::default()).unwrap().changed;
            assert!(tokio::task::spawn_blocking(install).await.unwrap());
        }
        load.until(&load.refused, 5).await;
        assert_eq!(load.served.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn a_process_that_takes_the_ports_of_ztunnel_gets_nothing() {
    each_case("a_process_that_takes_the_ports_of_ztunnel_gets_nothing", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&client.netns, 9090);
        start_app(&server.netns, 8080);
        let ports = Ports::default();
        for port in [ports.outbound, ports.inbound_plaintext, ports.inbound_hbone] {
            start_app(&server.netns, port);
        }
        let capture = case.capture();
        assert!(capture.guards_ports(), "this kernel can't tell sockets apart");
        capture.install(&server.netns, &Rules::default()).unwrap();
        for (from, to) in [
            (client, case.addr(server, 8080)),
            (client, case.addr(server, ports.inbound_plaintext)),
            (client, case.addr(server, ports.inbound_hbone)),
            (server, case.addr(client, 9090)),
        ] {
            let dialled = dial(&from.netns, to).await.map(drop);
            assert_eq!(dialled, Err(io::ErrorKind::ConnectionRefused), "{to}");
        }
    });
}

/// What ztunnel carries must not go on past it when another back-end takes the place of the one that brought it there.
#[test]
fn a_change_of_the_back_end_lets_nothing_pass() {
    const NAME: &str = "a_change_of_the_back_end_lets_nothing_pass";
    each_case(NAME, async |case: Case| {
        for after in Backend::ALL.into_iter().filter(|after| *after != case.backend && works(NAME, *after)) {
            replaced(case, Case { backend: after, ..case }).await;
            delivered(case, Case { backend: after, ..case }).await;
        }
    });
}

/// What came by a tunnel goes on, and not past ztunnel where the client's address is one that the pod dials in plaintext.
async fn delivered(before: Case, after: Case) {
    let lab = two_nodes();
    let (server, client) = (lab.pod("server"), lab.pod("client"));
    start_app(&server.netns, 8080);
    let from = client.ip(before.v6);
    let rules = Rules {
        exclude_outbound_ranges: vec![ipnet::IpNet::new(from, 24).unwrap().trunc()],
        ..Rules::default()
    };
    before.capture().install(&server.netns, &rules).unwrap();
    let options =
        ConnectOptions { source: Some(std::net::SocketAddr::new(from, 0)), ..ConnectOptions::default() };
    let app = before.addr(server, 8080);
    let mut stream = net::connect(&server.netns, &options, app, Duration::from_secs(3)).await.unwrap();
    assert_eq!(greeting(&mut stream).await, from.to_string());
    let seen = on_the_link(&lab, "tcp src port 8080", async {
        capture::replace(&*after.capture(), before.backend, &server.netns, &rules).unwrap();
        stream.write_all(b"this goes on").await.unwrap();
        let mut back = [0; 12];
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut back)).await;
        assert!(matches!(read, Ok(Ok(12))), "{before:?} {after:?}: {read:?}");
    });
    assert_eq!(seen.await, 0, "{before:?} {after:?}");
}

/// An application may hold its end of a connection for long after ztunnel has closed the other: it is not to be taken for one of
/// before the enrolment.
#[test]
fn what_ztunnel_has_closed_is_not_sent_past_it_after_a_change() {
    const NAME: &str = "what_ztunnel_has_closed_is_not_sent_past_it_after_a_change";
    each_case(NAME, async |case: Case| {
        if case.backend == Backend::Ebpf || !works(NAME, Backend::Ebpf) {
            return;
        }
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&client.netns, 9090);
        start_app(&client.netns, 9091);
        server.shell("sysctl -qw net.ipv4.tcp_fin_timeout=1").unwrap();
        let listener = ztunnel_listener(&server.netns, Ports::default().outbound);
        let range = PortRange::new(9091, 9091).unwrap();
        let rules = Rules { exclude_outbound_ports: vec![range], ..Rules::default() };
        case.capture().install(&server.netns, &rules).unwrap();
        let mut exempt = dial(&server.netns, case.addr(client, 9091)).await.unwrap();
        greeting(&mut exempt).await;
        let mut stream = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        drop(in_time(listener.accept()).await.unwrap());
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        let own = stream.local_addr().unwrap();
        in_time(async {
            let of_ztunnel = |end: &net::sock_diag::Connection| end.peer.port() == own.port();
            while net::sock_diag::connections(&server.netns).unwrap().iter().any(of_ztunnel) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;

        let after = Case { backend: Backend::Ebpf, ..case };
        let packets = format!("tcp port {}", own.port());
        let seen = on_the_link(&lab, &packets, async {
            capture::replace(&*after.capture(), case.backend, &server.netns, &rules).unwrap();
            stream.write_all(b"this must not pass").await.unwrap_err();
            echo(&mut exempt, "this goes on").await;
        });
        assert_eq!(seen.await, 0, "{case:?}");
    });
}

async fn replaced(before: Case, after: Case) {
    let lab = two_nodes();
    let (server, client) = (lab.pod("server"), lab.pod("client"));
    start_app(&server.netns, 8080);
    start_app(&client.netns, 9090);
    let ztunnel = FakeZtunnel::start(&server.netns);
    let (rules, capture) = (Rules::default(), after.capture());
    before.capture().install(&server.netns, &rules).unwrap();
    let (mut inbound, mut outbound) = ztunnel.both_ways(before, server, client).await;

    // The application's own connection has this port; ztunnel's beyond it has another.
    let own = format!("tcp port {}", outbound.local_addr().unwrap().port());
    let goes_on = before.backend == Backend::Ebpf || after.backend != Backend::Ebpf;
    let seen = on_the_link(&lab, &own, async {
        capture::replace(&*capture, before.backend, &server.netns, &rules).unwrap();
        for stream in [&mut inbound, &mut outbound] {
            if goes_on {
                echo(stream, "this goes on").await;
            } else {
                let _ = stream.write_all(b"this must not go on").await;
                in_time(stream.read_u8()).await.unwrap_err();
            }
        }
    });
    assert_eq!(seen.await, 0, "{before:?} {after:?}");

    assert!(capture.verify(&server.netns, &rules).unwrap().is_none());
    ztunnel.both_ways(before, server, client).await;
}
