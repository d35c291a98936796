//! DNS queries go to the proxy, and its answers come from whom was asked.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use capture::{PortRange, Rules};
use net::{Conntrack, DatagramOptions, Netns, ProxyUdpSocket};
use tokio::net::UdpSocket;

use crate::fixture::{Case, dial, each_case, in_time, two_nodes, wildcard, ztunnel_listener};

/// A resolver's socket: connected, so that an answer from anyone else is no answer.
pub async fn resolver(netns: &Netns, to: SocketAddr, from_port: u16, mark: bool) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let bind = || {
        let socket = std::net::UdpSocket::bind((any, from_port))?;
        socket.set_nonblocking(true)?;
        if mark {
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &net::ZTUNNEL_MARK)?;
        }
        io::Result::Ok(socket)
    };
    // A program that another case is just starting holds the last socket of this port until it runs.
    let bound = in_time(async {
        loop {
            match netns.run(bind).unwrap() {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                bound => break bound.unwrap(),
            }
        }
    });
    let socket = UdpSocket::from_std(bound.await).unwrap();
    socket.connect(to).await.unwrap();
    socket
}

pub async fn ask(socket: &UdpSocket, question: &str) -> io::Result<String> {
    socket.send(question.as_bytes()).await?;
    let mut answer = [0; 512];
    let len = tokio::time::timeout(Duration::from_millis(500), socket.recv(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer[..len]).into_owned())
}

/// A server that answers with its name, the question, and where it was addressed as far as it can tell.
pub fn start_server(netns: &Netns, port: u16, name: &'static str) {
    let ours = port == 15053;
    let mark = ours.then_some(net::ZTUNNEL_MARK);
    let options = DatagramOptions { mark, transparent: ours, ..DatagramOptions::default() };
    let socket = ProxyUdpSocket::bind(netns, wildcard(port), &options).unwrap();
    let mut conntrack = Conntrack::open(netns).unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let query = socket.recv(&mut buffer).await.unwrap();
            let question = String::from_utf8_lossy(&buffer[..query.len]).into_owned();
            let local = SocketAddr::new(query.local, port);
            // Without netfilter the header tells.
            let header = query.header_dst.filter(|header| header.port() == 53);
            let asked =
                header.or_else(|| conntrack.original_udp_dst(query.peer, local).ok()).unwrap_or(local);
            let answer = format!("{name}: {question} to {asked}");
            socket.send(answer.as_bytes(), query.peer, query.local).await.unwrap();
        }
    });
}

#[test]
fn queries_go_to_the_proxy_and_answers_come_back() {
    each_case("queries_go_to_the_proxy_and_answers_come_back", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_server(&client.netns, 53, "upstream");
        start_server(&server.netns, 15053, "proxy");
        let over_tcp = ztunnel_listener(&server.netns, 15053);
        let upstream = case.addr(client, 53);
        let before = resolver(&server.netns, upstream, 0, false).await;
        assert_eq!(ask(&before, "1").await.unwrap(), format!("upstream: 1 to {upstream}"));
        case.capture().install(&server.netns, &Rules::default()).unwrap();

        // To a server that exists, and to one that doesn't.
        for to in [upstream, SocketAddr::new(case.elsewhere(), 53)] {
            let socket = resolver(&server.netns, to, 4000, false).await;
            for question in ["2", "3"] {
                assert_eq!(ask(&socket, question).await.unwrap(), format!("proxy: {question} to {to}"));
            }
        }
        let stream = dial(&server.netns, upstream).await.unwrap();
        let (accepted, peer) = in_time(over_tcp.accept()).await.unwrap();
        assert_eq!(net::original_dst(&accepted, peer).unwrap(), upstream);
        drop(stream);

        // The proxy's own query, from the port that an application's just came from.
        let own = resolver(&server.netns, upstream, 4000, true).await;
        assert_eq!(ask(&own, "4").await.unwrap(), format!("upstream: 4 to {upstream}"));
        drop(own);
        // And the other way about.
        let socket = resolver(&server.netns, upstream, 4000, false).await;
        assert_eq!(ask(&socket, "5").await.unwrap(), format!("proxy: 5 to {upstream}"));

        // Another port is none of the proxy's business, and the world has none with the proxy.
        start_server(&client.netns, 5353, "other");
        let other = case.addr(client, 5353);
        let socket = resolver(&server.netns, other, 0, false).await;
        assert_eq!(ask(&socket, "6").await.unwrap(), format!("other: 6 to {other}"));
        let world = resolver(&client.netns, case.addr(server, 15053), 0, false).await;
        assert_eq!(ask(&world, "7").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    });
}

#[test]
fn without_a_proxy_queries_are_refused_and_without_capture_they_pass() {
    each_case("without_a_proxy_queries_are_refused", async |case: Case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_server(&client.netns, 53, "upstream");
        let upstream = case.addr(client, 53);
        let capture = case.capture();
        capture.install(&server.netns, &Rules::default()).unwrap();
        let socket = resolver(&server.netns, upstream, 0, false).await;
        let error = ask(&socket, "1").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");

        let port_53 = PortRange::new(53, 53).into_iter().collect();
        for rules in [
            Rules { dns: false, ..Rules::default() },
            Rules { exclude_outbound_ports: port_53, ..Rules::default() },
        ] {
            capture.install(&server.netns, &rules).unwrap();
            let socket = resolver(&server.netns, upstream, 0, false).await;
            assert_eq!(ask(&socket, "2").await.unwrap(), format!("upstream: 2 to {upstream}"));
        }
    });
}
