//! What the rules of a pod exempt goes past ztunnel, and nothing else does.

use std::io;
use std::net::IpAddr;

use capture::{Include, InterfaceName, PortRange, ProbeSources, Rules};
use harness::netns::Lab;
use ipnet::IpNet;
use tokio::net::TcpStream;

use crate::fixture::{Case, FakeZtunnel, dial, each_case, greeting, start_app, two_nodes};

/// Connections in the order of their letters: into the pod at 8080 (a) and 8081 (b); out to `client` at 8080
/// (c) and 8081 (d), and to `third` at 8080 (e). Rules, and which of the connections they capture.
fn rows(client: &[IpNet], v6: bool) -> Vec<(Rules, &'static str)> {
    let ports = |list: &[(u16, u16)]| {
        list.iter().map(|(first, last)| PortRange::new(*first, *last).unwrap()).collect::<Vec<_>>()
    };
    let interfaces = |name| vec![InterfaceName::new(name).unwrap()];
    let (all, client) = (Rules::default, client.to_vec());
    // All of IPv6, and nothing of IPv4.
    let every = vec!["::/0".parse::<IpNet>().unwrap()];
    let (without, with) = if v6 { ("ab", "abcde") } else { ("abcde", "ab") };
    vec![
        (all(), "abcde"),
        (Rules { exclude_inbound_ports: ports(&[(8080, 8080)]), ..all() }, "bcde"),
        (Rules { exclude_inbound_ports: ports(&[(1, 1), (8000, 8080)]), ..all() }, "bcde"),
        (Rules { include_inbound_ports: Include::Only(ports(&[(8080, 8080)])), ..all() }, "acde"),
        (Rules { include_inbound_ports: Include::Only(Vec::new()), ..all() }, "cde"),
        (Rules { bypass_inbound: true, ..all() }, "cde"),
        (Rules { exclude_outbound_ports: ports(&[(8081, 8081), (53, 53)]), ..all() }, "abce"),
        (Rules { exclude_outbound_ranges: client.clone(), ..all() }, "abe"),
        (Rules { include_outbound_ranges: Include::Only(client), ..all() }, "abcd"),
        (Rules { include_outbound_ranges: Include::Only(Vec::new()), ..all() }, "ab"),
        (Rules { exclude_outbound_ranges: every.clone(), ..all() }, without),
        (Rules { include_outbound_ranges: Include::Only(every), ..all() }, with),
        (
            Rules {
                include_outbound_ranges: Include::Only(Vec::new()),
                include_outbound_ports: ports(&[(8081, 8081)]),
                ..all()
            },
            "abd",
        ),
        (Rules { exclude_interfaces: interfaces("eth0"), ..all() }, ""),
        // Without any redirection in the rules.
        (
            Rules {
                bypass_inbound: true,
                include_outbound_ranges: Include::Only(Vec::new()),
                dns: false,
                ..all()
            },
            "",
        ),
        (Rules { exclude_interfaces: interfaces("eth7"), ..all() }, "abcde"),
    ]
}

#[test]
fn rules_exempt_what_they_say() {
    each_case("rules_exempt_what_they_say", async |case: Case| {
        let lab = two_nodes();
        let capture = case.capture();
        for pod in ["server", "client", "third"] {
            start_app(&lab.pod(pod).netns, 8080);
            start_app(&lab.pod(pod).netns, 8081);
        }
        let ztunnel = FakeZtunnel::start(&lab.pod("server").netns);
        let client = [false, true].map(|v6| IpNet::from(lab.pod("client").ip(v6)));
        for (rules, expected) in rows(&client, case.v6) {
            capture.install(&lab.pod("server").netns, &rules).unwrap();
            assert_eq!(captured(case, &lab, &ztunnel).await, expected, "{case:?} {rules:?}");
            let drift = capture.verify(&lab.pod("server").netns, &rules).unwrap();
            assert!(drift.is_none(), "{drift}");
            let again = capture.install(&lab.pod("server").netns, &rules).unwrap();
            assert!(!again.changed, "{case:?} {rules:?}");
        }
    });
}

async fn captured(case: Case, lab: &Lab, ztunnel: &FakeZtunnel) -> String {
    let (server, client, third) = (lab.pod("server"), lab.pod("client"), lab.pod("third"));
    let table = [
        ('a', client, case.addr(server, 8080)),
        ('b', client, case.addr(server, 8081)),
        ('c', server, case.addr(client, 8080)),
        ('d', server, case.addr(client, 8081)),
        ('e', server, case.addr(third, 8080)),
    ];
    let mut captured = String::new();
    for (letter, from, to) in table {
        let mut stream = dial(&from.netns, to).await.unwrap();
        assert_eq!(greeting(&mut stream).await, case.addr(from, 0).ip().to_string());
        if !ztunnel.taken().is_empty() {
            captured.push(letter);
        }
    }
    captured
}

/// A route and an address by which `from` comes as someone else.
async fn dial_as(case: Case, lab: &Lab, from: &str, source: IpAddr) -> Result<TcpStream, io::ErrorKind> {
    let (server, client) = (lab.pod("server"), lab.pod(from));
    client.shell(&format!("ip addr replace {source} dev lo")).unwrap();
    for node in ["a", "b"] {
        let via = if node == "a" { client } else { &lab.node("a").host };
        lab.node(node).host.shell(&format!("ip route replace {source} via {}", via.ip(case.v6))).unwrap();
    }
    let options = net::ConnectOptions { source: Some((source, 0).into()), ..crate::fixture::plain() };
    let timeout = std::time::Duration::from_secs(3);
    net::connect(&client.netns, &options, case.addr(server, 8080), timeout)
        .await
        .map_err(|error| error.kind())
}

#[test]
fn probes_pass_only_where_that_is_asked_for() {
    each_case("probes_pass_only_where_that_is_asked_for", async |case: Case| {
        let lab = two_nodes();
        let capture = case.capture();
        let server = lab.pod("server");
        start_app(&server.netns, 8080);
        let ztunnel = FakeZtunnel::start(&server.netns);
        let probes = ProbeSources::default();
        let source = if case.v6 { IpAddr::V6(probes.ipv6) } else { IpAddr::V4(probes.ipv4) };
        for (exempt, probes) in [(false, None), (true, Some(probes))] {
            capture.install(&server.netns, &Rules { probes, ..Rules::default() }).unwrap();
            let mut probe = dial_as(case, &lab, "client", source).await.unwrap();
            assert_eq!(greeting(&mut probe).await, source.to_string());
            assert_eq!(ztunnel.taken().is_empty(), exempt);
        }
    });
}

/// A container inside the pod, behind a veth: what it sends out is the pod's outgoing traffic.
#[test]
fn virtual_interfaces_send_outgoing_traffic() {
    each_case("virtual_interfaces_send_outgoing_traffic", async |case: Case| {
        let lab = Lab::builder().node("a", &["server", "client", "inner"]).build().unwrap();
        let (server, client, inner) = (lab.pod("server"), lab.pod("client"), lab.pod("inner"));
        start_app(&client.netns, 9090);
        server
            .shell(&format!(
                "ip link add virt0 type veth peer name in0 netns {}; ip link set virt0 up; \
                 ip addr add 192.168.9.1/24 dev virt0; ip addr add fd99::1/64 dev virt0 nodad; \
                 echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
                inner.namespace
            ))
            .unwrap();
        inner
            .shell(
                "ip link set eth0 down; ip link set in0 up; ip addr add 192.168.9.2/24 dev in0; \
                 ip addr add fd99::2/64 dev in0 nodad; ip route replace default via 192.168.9.1; \
                 ip -6 route replace default via fd99::1",
            )
            .unwrap();
        let ztunnel = FakeZtunnel::start(&server.netns);
        let capture = case.capture();
        let to = case.addr(client, 9090);

        // By default it looks like incoming traffic, for an address that isn't the pod's: ztunnel refuses it.
        capture.install(&server.netns, &Rules::default()).unwrap();
        let _ = dial(&inner.netns, to).await;
        let taken = ztunnel.took().await;
        assert!(taken.inbound);
        assert_eq!(taken.original_dst, to);

        let rules =
            Rules { virtual_interfaces: vec![InterfaceName::new("virt0").unwrap()], ..Rules::default() };
        capture.install(&server.netns, &rules).unwrap();
        let mut stream = dial(&inner.netns, to).await.unwrap();
        greeting(&mut stream).await;
        let taken = ztunnel.took().await;
        assert!(!taken.inbound);
        assert_eq!(taken.original_dst, to);
    });
}
