//! Sockets made inside namespaces from outside: options, addresses, failures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use harness::netns::{Host, Lab, root_or_skip};
use net::sock_diag::{self, DestroyError, TcpState};
use net::{ConnectOptions, DatagramOptions, Keepalive, ListenOptions, Netns, ProxyUdpSocket, Purpose, Step};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PATIENCE: Duration = Duration::from_secs(5);

fn wildcard(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
}

fn unmarked() -> ConnectOptions {
    ConnectOptions { mark: None, ..ConnectOptions::default() }
}

fn pair() -> Lab {
    Lab::builder().node("a", &["one"]).node("b", &["two"]).build().unwrap()
}

async fn accepted(
    listener: &TcpListener,
    from: &Netns,
    options: &ConnectOptions,
    to: SocketAddr,
) -> (TcpStream, TcpStream, SocketAddr) {
    let (client, server) = tokio::join!(net::connect(from, options, to, PATIENCE), listener.accept());
    let (server, peer) = server.unwrap();
    (client.unwrap(), server, peer)
}

#[tokio::test]
async fn one_listener_serves_both_families() {
    if !root_or_skip("one_listener_serves_both_families") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let listener = net::listen(&one.netns, wildcard(80), &ListenOptions::default()).unwrap();
    for v6 in [false, true] {
        let to = SocketAddr::new(one.ip(v6), 80);
        let (client, _server, peer) = accepted(&listener, &two.netns, &unmarked(), to).await;
        assert_eq!(net::canonical(peer), client.local_addr().unwrap());
        assert!(peer.is_ipv6(), "a dual-stack listener speaks of mapped addresses");
    }
    let only = ListenOptions { only_v6: true, ..ListenOptions::default() };
    let _six = net::listen(&one.netns, wildcard(81), &only).unwrap();
    let four = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 81);
    let _four = net::listen(&one.netns, four, &ListenOptions::default()).unwrap();
}

#[tokio::test]
async fn accepted_connections_inherit_the_listeners_options() {
    if !root_or_skip("accepted_connections_inherit_the_listeners_options") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let options = ListenOptions { transparent: true, mark: Some(0x539), ..ListenOptions::default() };
    let listener = net::listen(&one.netns, wildcard(80), &options).unwrap();
    for v6 in [false, true] {
        let to = SocketAddr::new(one.ip(v6), 80);
        let (client, server, _) = accepted(&listener, &two.netns, &ConnectOptions::default(), to).await;
        for stream in [&client, &server] {
            let socket = SockRef::from(stream);
            let Keepalive { time, interval, retries } = Keepalive::default();
            assert_eq!(socket.mark().unwrap(), 0x539);
            assert!(socket.tcp_nodelay().unwrap());
            assert!(socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), time);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), interval);
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), retries);
        }
        assert!(SockRef::from(&server).ip_transparent_v6().unwrap());
    }
}

#[tokio::test]
async fn a_connection_comes_from_the_address_it_is_told() {
    if !root_or_skip("a_connection_comes_from_the_address_it_is_told") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let listener = net::listen(&one.netns, wildcard(80), &ListenOptions::default()).unwrap();
    // An address that the connecting pod doesn't have, but that is routed back to it.
    for (v6, source) in [(false, "192.0.2.7"), (true, "2001:db8::7")] {
        let source: IpAddr = source.parse().unwrap();
        let node = |name: &str| lab.node(name).host.ip(v6);
        lab.node("b").host.shell(&format!("ip route add {source} via {}", two.ip(v6))).unwrap();
        lab.node("a").host.shell(&format!("ip route add {source} via {}", node("b"))).unwrap();
        two.shell(&format!("ip route add local {source} dev lo")).unwrap();
        let to = SocketAddr::new(one.ip(v6), 80);
        let options = ConnectOptions { source: Some(SocketAddr::new(source, 0)), ..unmarked() };
        let (_, _, peer) = accepted(&listener, &two.netns, &options, to).await;
        assert_eq!(net::canonical(peer).ip(), source);
        let options = ConnectOptions { source: Some(SocketAddr::new(source, 4321)), ..unmarked() };
        let (_, _, peer) = accepted(&listener, &two.netns, &options, to).await;
        assert_eq!(net::canonical(peer), SocketAddr::new(source, 4321));
    }
}

#[test]
fn an_address_is_a_namespaces_own_or_it_is_not() {
    if !root_or_skip("addresses of a namespace") {
        return;
    }
    let lab = pair();
    let [one, two] = ["one", "two"].map(|name| lab.pod(name));
    for v6 in [false, true] {
        assert!(net::has_address(&one.netns, one.ip(v6)));
        assert!(!net::has_address(&one.netns, two.ip(v6)));
    }
    for nobodys in ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
        assert!(!net::has_address(&one.netns, nobodys.parse().unwrap()), "{nobodys}");
    }
}

#[tokio::test]
async fn failures_say_what_was_attempted() {
    if !root_or_skip("failures_say_what_was_attempted") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let listen = |at| net::listen(&one.netns, at, &ListenOptions::default());
    let _first = listen(wildcard(80)).unwrap();
    let taken = listen(wildcard(80)).unwrap_err();
    assert_eq!((taken.purpose, taken.step), (Purpose::Listen, Step::Bind));
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    let said = taken.to_string();
    assert!(
        said.starts_with("cannot listen on [::]:80 in /run/netns/") && said.contains("binding"),
        "{said}"
    );
    let absent = listen("192.0.2.1:80".parse().unwrap()).unwrap_err();
    assert_eq!((absent.step, absent.kind()), (Step::Bind, io::ErrorKind::AddrNotAvailable));
    // Sharing has to be wanted by both.
    let shared = ListenOptions { reuse_port: true, ..ListenOptions::default() };
    let _one = net::listen(&one.netns, wildcard(81), &shared).unwrap();
    let _other = net::listen(&one.netns, wildcard(81), &shared).unwrap();

    let dial = async |to, timeout| net::connect(&two.netns, &unmarked(), to, timeout).await.unwrap_err();
    let refused = dial(SocketAddr::new(one.ip(false), 9), PATIENCE).await;
    assert_eq!((refused.step, refused.kind()), (Step::Connect, io::ErrorKind::ConnectionRefused));
    assert_eq!(refused.address.port(), 9);
    one.shell(
        "nft add table inet t; nft 'add chain inet t i { type filter hook input priority 0; policy drop; }'",
    )
    .unwrap();
    let start = tokio::time::Instant::now();
    let silent = dial(SocketAddr::new(one.ip(true), 80), Duration::from_millis(200)).await;
    assert_eq!((silent.step, silent.kind()), (Step::Connect, io::ErrorKind::TimedOut));
    assert!(start.elapsed() < Duration::from_secs(1));
    two.shell("ip route del default").unwrap();
    let nowhere = dial("192.0.2.1:80".parse().unwrap(), PATIENCE).await;
    assert_eq!(nowhere.kind(), io::ErrorKind::NetworkUnreachable);
    let mixed = ConnectOptions { source: Some("[::1]:0".parse().unwrap()), ..unmarked() };
    let mixed =
        net::connect(&two.netns, &mixed, "192.0.2.1:80".parse().unwrap(), PATIENCE).await.unwrap_err();
    assert_eq!(mixed.step, Step::Bind);
}

#[tokio::test]
async fn original_destinations_survive_redirection() {
    if !root_or_skip("original_destinations_survive_redirection") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let listener = net::listen(&one.netns, wildcard(15006), &ListenOptions::default()).unwrap();
    let only_four = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 15007);
    let only_four = net::listen(&one.netns, only_four, &ListenOptions::default()).unwrap();
    // Before there is any conntrack: the listener's own address, which is refused as a loop.
    let to = SocketAddr::new(one.ip(false), 15006);
    let (_client, server, peer) = accepted(&listener, &two.netns, &unmarked(), to).await;
    assert_eq!(net::original_dst(&server, peer).unwrap(), to);

    one.shell(
        "nft add table inet t; nft 'add chain inet t p { type nat hook prerouting priority -100; }'; \
         nft add rule inet t p tcp dport 8080 redirect to :15006; \
         nft add rule inet t p tcp dport 8081 redirect to :15007",
    )
    .unwrap();
    for (listener, port, v6) in [(&listener, 8080, false), (&listener, 8080, true), (&only_four, 8081, false)]
    {
        let to = SocketAddr::new(one.ip(v6), port);
        let (_client, server, peer) = accepted(listener, &two.netns, &unmarked(), to).await;
        assert_eq!(net::original_dst(&server, peer).unwrap(), to);
    }
    // Not redirected: the listener's own address.
    let to = SocketAddr::new(one.ip(true), 15006);
    let (_client, server, peer) = accepted(&listener, &two.netns, &unmarked(), to).await;
    assert_eq!(net::original_dst(&server, peer).unwrap(), to);
}

#[tokio::test]
async fn datagrams_are_answered_from_where_they_came_to() {
    if !root_or_skip("datagrams_are_answered_from_where_they_came_to") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    one.shell("ip addr add 192.0.2.9/32 dev lo; ip addr add 2001:db8::9/128 dev lo").unwrap();
    for node in ["a", "b"] {
        let via = |v6| if node == "a" { one.ip(v6) } else { lab.node("a").host.ip(v6) };
        let host = &lab.node(node).host;
        host.shell(&format!("ip route add 192.0.2.9 via {}", via(false))).unwrap();
        host.shell(&format!("ip route add 2001:db8::9 via {}", via(true))).unwrap();
    }
    let bind = |port| ProxyUdpSocket::bind(&one.netns, wildcard(port), &DatagramOptions::default()).unwrap();
    let (server, client) =
        (bind(53), ProxyUdpSocket::bind(&two.netns, wildcard(0), &DatagramOptions::default()));
    let client = client.unwrap();
    // Both the pod's first address and a second one, which the routing table would not choose.
    for address in [one.ip(false), one.ip(true), "192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap()]
    {
        let to = SocketAddr::new(address, 53);
        let own = two.ip(address.is_ipv6());
        client.send(b"question", to, own).await.unwrap();
        let mut buffer = [0; 4];
        let query = tokio::time::timeout(PATIENCE, server.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!((query.len, query.truncated, &buffer), (4, true, b"ques"));
        assert_eq!(query.local, address);
        assert_eq!(query.peer.ip(), own);
        assert_eq!(query.header_dst, Some(to));
        assert_ne!(query.interface, 0);
        server.send(b"answer", query.peer, query.local).await.unwrap();
        let mut buffer = [0; 64];
        let answer = tokio::time::timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(&buffer[..answer.len], b"answer");
        assert_eq!(answer.peer, to);
    }
    let taken = ProxyUdpSocket::bind(&one.netns, wildcard(53), &DatagramOptions::default()).unwrap_err();
    assert_eq!((taken.purpose, taken.step), (Purpose::Datagrams, Step::Bind));
}

fn connection(host: &Host, stream: &TcpStream) -> Option<sock_diag::Connection> {
    let local = net::canonical(stream.local_addr().unwrap());
    sock_diag::connections(&host.netns).unwrap().into_iter().find(|connection| connection.local == local)
}

#[tokio::test]
async fn connections_are_listed_and_ended() {
    if !root_or_skip("connections_are_listed_and_ended") {
        return;
    }
    let lab = pair();
    let (one, two) = (lab.pod("one"), lab.pod("two"));
    let options = ListenOptions { mark: Some(7), ..ListenOptions::default() };
    let listener = net::listen(&one.netns, wildcard(80), &options).unwrap();
    assert_eq!(sock_diag::listeners(&one.netns).unwrap(), [wildcard(80)]);
    sock_diag::probe_destroy(&one.netns).unwrap();
    for v6 in [false, true] {
        let to = SocketAddr::new(one.ip(v6), 80);
        let (mut client, mut server, _) = accepted(&listener, &two.netns, &unmarked(), to).await;
        let (mut other_client, mut other_server, _) = accepted(&listener, &two.netns, &unmarked(), to).await;
        client.write_all(b"unread").await.unwrap();
        server.readable().await.unwrap();

        let here = connection(two, &client).unwrap();
        assert_eq!((here.peer, here.state, here.mark), (to, TcpState::Established, None));
        let there = sock_diag::connections(&one.netns).unwrap();
        assert_eq!(there.len(), 2);
        let there = there.into_iter().find(|there| there.peer == here.local).unwrap();
        assert_eq!((there.local, there.mark, there.receive_queue), (to, Some(7), 6));
        assert_ne!((there.inode, here.inode), (0, 0));

        sock_diag::destroy(&one.netns, &there).unwrap();
        let mut buffer = [0; 16];
        let read = tokio::time::timeout(PATIENCE, client.read(&mut buffer)).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // What had arrived is still read; then it is over.
        server.read_exact(&mut buffer[..6]).await.unwrap();
        let read = tokio::time::timeout(PATIENCE, server.read(&mut buffer)).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        // It alone, and once.
        other_client.write_all(b"hello").await.unwrap();
        other_server.read_exact(&mut buffer[..5]).await.unwrap();
        assert!(matches!(sock_diag::destroy(&one.netns, &there), Err(DestroyError::Gone)));
        assert_eq!(sock_diag::connections(&one.netns).unwrap().len(), 1);
        drop((other_client, other_server));
        while !sock_diag::connections(&one.netns).unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
