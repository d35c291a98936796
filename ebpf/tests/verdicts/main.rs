//! Connections between two pods that no proxy carries, on real traffic: who gets one, and when it ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_types,
    reason = "a test, which waits for the kernel alone"
)]

mod ending;
mod lab;
mod node;
mod offers;
mod removal;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aya::maps::MapData;
use aya::programs::links::{FdLink, PinnedLink};
use ebpf::verdicts::{self, Carried, Offer, Pair, Side, Tally, Verdicts, Why};
use ebpf::{Pins, Pod, layout};
use harness::netns::Host;
use net::Netns;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};

use crate::lab::{
    CGROUPS, LEASE, Mesh, PORT, WAIT, accept, capture, contents, dial, generation, lab, listen, mark, passes,
    pins, service,
};

#[test]
fn a_verdict_lets_connections_by() {
    let Some(mesh) = Mesh::new("a verdict lets connections by") else { return };
    for v6 in [false, true] {
        let pair = mesh.pair(v6);
        let listener = mesh.listen(v6);
        assert!(mesh.connect(pair.destination).is_err(), "captured");
        mesh.open(v6);
        for dialled in [service(v6), pair.destination] {
            let mut client = mesh.connect(dialled).unwrap();
            let (mut server, peer) = accept(&listener).unwrap();
            assert_eq!((peer.ip(), client.peer_addr().unwrap()), (pair.source, dialled));
            assert_eq!(client.local_addr().unwrap(), peer);
            assert_eq!([mark(&client), mark(&server)], [layout::MARK_GRANTED; 2]);
            let listing = mesh.verdicts.connections().unwrap();
            let netns: BTreeSet<u64> = listing.open.iter().map(|end| end.netns).collect();
            assert_eq!(netns, BTreeSet::from([mesh.client.cookie, mesh.server.cookie]), "{listing:?}");

            client.write_all(&[1; 70_000]).unwrap();
            server.read_exact(&mut [0; 70_000]).unwrap();
            server.write_all(&[2; 300]).unwrap();
            client.read_exact(&mut [0; 300]).unwrap();
            drop(client);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            drop(server);
            let ends = mesh.closed(2);
            let [source, destination] = ends.as_slice() else { panic!("{ends:?}") };
            for (end, side, counts) in
                [(source, Side::Source, (70_000, 300)), (destination, Side::Destination, (300, 70_000))]
            {
                assert_eq!((end.side, end.sent, end.received), (side, counts.0, counts.1), "{end:?}");
                assert_eq!((end.source, end.destination), (peer, pair.destination));
                assert_eq!((end.id, end.established), (7000 + u64::from(v6), true));
                assert!(end.closed.unwrap() >= end.opened);
            }
            assert_eq!(source.dialled, (dialled != pair.destination).then_some(dialled));
        }
        // Nobody listens: the pod's own answer, and a connection that did not come about.
        drop(listener);
        assert_eq!(mesh.connect(service(v6)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(!mesh.closed(1)[0].established);
        // Without the offer it is captured again.
        assert!(mesh.verdicts.withdraw(mesh.client.cookie, pair.destination).unwrap());
        let listener = mesh.listen(v6);
        assert!(mesh.connect(pair.destination).is_err());
        assert!(accept(&listener).is_none());
    }
    assert_eq!(mesh.tally(Tally::Granted), 6);
    assert_eq!((mesh.unproven("client"), mesh.unproven("server")), (0, 0));
    assert!(mesh.verdicts.connections().unwrap().open.is_empty());
}

#[test]
fn an_address_of_another_pod_is_of_no_use() {
    let Some(mesh) = Mesh::new("an address of another pod is of no use") else { return };
    for v6 in [false, true] {
        mesh.open(v6);
        let listener = mesh.listen(v6);
        let pair = mesh.pair(v6);
        // From the same node, and from another one; without a mark, and with those that packets have there.
        for pod in ["evil", "far"] {
            for value in [0, layout::MARK_GRANTED, layout::MARK_ANSWERED] {
                let before = mesh.unproven("server");
                assert!(dial_as(mesh.lab.pod(pod), pair, value).is_err(), "{pod} {value:x}");
                assert!(accept(&listener).is_none());
                assert!(mesh.unproven("server") > before, "{pod} {value:x} {v6}");
            }
        }
        // The pod itself, which nobody hindered.
        assert!(mesh.connect(service(v6)).is_ok());
        // A pod that asks for what another one was offered.
        assert!(dial(&mesh.lab.pod("far").netns, service(v6)).is_err());
    }
    // Where its own device is looked at, it is stopped there.
    let evil = mesh.lab.pod("evil");
    capture(&mesh.pins, evil);
    mesh.verdicts.qualify(&mesh.lab.node("a").host.netns, &evil.netns).unwrap();
    for pair in [false, true].map(|v6| mesh.pair(v6)) {
        let before = (mesh.tally(Tally::Spoofed), mesh.unproven("server"));
        assert!(dial_as(evil, pair, layout::MARK_ZTUNNEL).is_err());
        assert!(mesh.tally(Tally::Spoofed) > before.0);
        assert_eq!(mesh.unproven("server"), before.1);
    }
}

/// Connects with the address of the pair's client, and a mark.
fn dial_as(host: &Host, pair: Pair, mark: u32) -> nix::Result<OwnedFd> {
    host.netns
        .run(|| {
            let family = if pair.source.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
            let made = socket(family, SockType::Stream, SockFlag::empty(), None)?;
            setsockopt(&made, sockopt::Mark, &mark)?;
            // It is of both families.
            setsockopt(&made, sockopt::IpTransparent, &true)?;
            setsockopt(&made, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(1, 0))?;
            bind(made.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(pair.source, 0)))?;
            connect(made.as_raw_fd(), &SockaddrStorage::from(pair.destination))?;
            Ok(made)
        })
        .unwrap()
}

#[test]
fn a_source_that_is_not_the_pods_address_goes_to_ztunnel() {
    let Some(mesh) = Mesh::new("a source that is not the pod's address goes to ztunnel") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let pair = mesh.pair(false);
    let before = mesh.tally(Tally::Declined);
    let other = Pair { source: "127.0.0.1".parse().unwrap(), ..pair };
    assert!(dial_as(mesh.lab.pod("client"), other, 0).is_err());
    assert_eq!(mesh.tally(Tally::Declined), before + 1);
    assert!(accept(&listener).is_none());
    assert!(dial_as(mesh.lab.pod("client"), pair, 0).is_ok());
    // A pod with several addresses is given the one of the verdict.
    mesh.lab.pod("client").shell("ip addr add 10.99.0.1/32 dev lo; ip route replace default via $(ip route | awk '/default/ {print $3}') src 10.99.0.1").unwrap();
    accept(&listener).unwrap();
    let bound = Offer { source: pair.source, endpoints: vec![(pair.destination, 1)], bind: true };
    mesh.verdicts.offer(&mesh.client, service(false), &bound).unwrap();
    let client = mesh.connect(service(false)).unwrap();
    assert_eq!(client.local_addr().unwrap().ip(), pair.source);
}

#[test]
fn nothing_passes_without_a_lease() {
    let Some(mesh) = Mesh::new("nothing passes without a lease") else { return };
    for v6 in [false, true] {
        mesh.open(v6);
        let listener = mesh.listen(v6);
        let mut client = mesh.connect(service(v6)).unwrap();
        let (mut server, _) = accept(&listener).unwrap();
        assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
        let before = mesh.tally(Tally::Lapsed);
        assert!(mesh.verdicts.stop().unwrap());
        assert!(!passes(&mut client, &mut server));
        assert!(!passes(&mut server, &mut client));
        assert!(mesh.tally(Tally::Lapsed) > before);
        let declined = mesh.tally(Tally::Declined);
        assert!(mesh.connect(service(v6)).is_err(), "ztunnel's, and there is none");
        assert_eq!(mesh.tally(Tally::Declined), declined + 1);
        // What was held up goes on, as TCP sends it again.
        assert!(mesh.verdicts.renew(LEASE).unwrap());
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(10 * WAIT)).unwrap();
        }
        server.read_exact(&mut [0]).unwrap();
        client.read_exact(&mut [0]).unwrap();
        mesh.connect(service(v6)).unwrap();
    }
}

#[test]
fn a_revoked_verdict_ends_its_connections() {
    let Some(mesh) = Mesh::new("a revoked verdict ends its connections") else { return };
    for v6 in [false, true] {
        mesh.open(v6);
        let pair = mesh.pair(v6);
        let listener = mesh.listen(v6);
        let mut client = mesh.connect(service(v6)).unwrap();
        let (mut server, _) = accept(&listener).unwrap();
        // An old generation.
        let before = mesh.tally(Tally::Stale);
        assert!(mesh.verdicts.commit(generation(2)).unwrap());
        assert!(!passes(&mut client, &mut server));
        assert!(mesh.tally(Tally::Stale) > before);
        mesh.allow(v6, 2);
        server.set_read_timeout(Some(10 * WAIT)).unwrap();
        server.read_exact(&mut [0]).unwrap();
        server.set_read_timeout(Some(WAIT)).unwrap();
        // A verdict that is taken back.
        assert!(mesh.verdicts.revoke(pair).unwrap());
        assert!(!passes(&mut server, &mut client));
        assert!(mesh.connect(service(v6)).is_err());
        let [source, destination] = ["client", "server"].map(|name| mesh.lab.pod(name).netns.clone());
        let ended = mesh.verdicts.end(Some(&source), Some(&destination), pair).unwrap();
        assert_eq!((ended.destroyed, ended.left), (2, 0));
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(mesh.verdicts.pairs().unwrap().iter().all(|(known, _)| *known != pair));
        assert_eq!(mesh.closed(2).iter().filter(|end| end.established).count(), 2);
        assert!(!mesh.verdicts.revoke(pair).unwrap(), "forgotten");
        assert!(mesh.connect(service(v6)).is_err());
        assert!(accept(&listener).is_none());
        mesh.verdicts.commit(generation(1)).unwrap();
    }
}

/// Nobody asks for a while what has ended.
#[test]
fn no_end_is_lost() {
    let Some(mesh) = Mesh::new("no end is lost") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let many = layout::ENDED_LIMIT as usize / 2 + 100;
    for number in 0..many {
        let client = mesh.connect(service(false)).unwrap_or_else(|error| {
            let counters = ["client", "server"]
                .map(|name| Pod::find(&mesh.pins, &mesh.lab.pod(name).netns).unwrap().counters().unwrap());
            panic!("{number}: {error}: {:?}, {counters:?}", mesh.verdicts.tallies().unwrap())
        });
        let (mut server, _) = accept(&listener).unwrap();
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    }
    let client = mesh.connect(service(false)).unwrap();
    let _server = accept(&listener).unwrap();
    let mut sockets = BTreeSet::new();
    let ended = |sockets: &mut BTreeSet<u64>, ends: &[Carried]| {
        assert!(ends.iter().all(|end| end.closed.is_some() && sockets.insert(end.socket)), "each once");
    };
    for _ in 0..100 {
        let listing = mesh.verdicts.connections().unwrap();
        assert_eq!(listing.open.iter().filter(|end| end.source == client.local_addr().unwrap()).count(), 2);
        ended(&mut sockets, &listing.closed);
        ended(&mut sockets, &mesh.verdicts.closed(3000).unwrap());
        if sockets.len() == 2 * many {
            break;
        }
        std::thread::sleep(WAIT / 100);
    }
    assert_eq!(sockets.len(), 2 * many);
    assert!(mesh.connect(service(false)).is_ok());
    assert_eq!((mesh.tally(Tally::Unrecorded), mesh.tally(Tally::Declined)), (0, 0));
}

/// A connection that is older than capture, by whichever way its packets come; and its server has other ones.
#[test]
fn what_was_alive_goes_on() {
    let Some(mesh) = Mesh::new("what was alive goes on") else { return };
    for v6 in [false, true] {
        for pod in ["client", "server"] {
            ebpf::remove(&mesh.pins, &mesh.lab.pod(pod).netns).unwrap();
        }
        let pair = mesh.pair(v6);
        let listener = mesh.listen(v6);
        let mut old = mesh.connect(pair.destination).unwrap();
        let (mut accepted, peer) = accept(&listener).unwrap();
        for (pod, ends) in [("client", (peer, pair.destination)), ("server", (pair.destination, peer))] {
            let host = mesh.lab.pod(pod);
            ebpf::mark(&host.netns, &[(ends.0, ends.1, layout::MARK_DIRECT)]).unwrap();
            capture(&mesh.pins, host);
        }
        mesh.open(v6);
        let mut client = mesh.connect(service(v6)).unwrap();
        let (mut server, _) = accept(&listener).unwrap();
        let alive =
            |old: &mut TcpStream, accepted: &mut TcpStream| passes(old, accepted) && passes(accepted, old);
        assert!(alive(&mut old, &mut accepted) && alive(&mut client, &mut server));
        // As if the node had turned a service's address into the server's: no proof.
        mesh.verdicts.release(&mesh.client).unwrap();
        assert!(alive(&mut old, &mut accepted));
        assert!(!passes(&mut client, &mut server));
        let [source, destination] = ["client", "server"].map(|name| mesh.lab.pod(name).netns.clone());
        let ended = mesh.verdicts.end(Some(&source), Some(&destination), pair).unwrap();
        assert_eq!((ended.destroyed, ended.left), (2, 0));
        assert!(alive(&mut old, &mut accepted));
        for pod in ["client", "server"] {
            let node = &mesh.lab.node("a").host.netns;
            let qualified = mesh.verdicts.qualify(node, &mesh.lab.pod(pod).netns).unwrap();
            assert!(!qualified.exempts);
        }
        assert!(alive(&mut old, &mut accepted));
    }
}

/// As fast as they can, generations follow each other while data goes back and forth.
#[test]
fn what_stays_allowed_is_not_held_up() {
    let Some(mesh) = Mesh::new("what stays allowed is not held up") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let mut client = mesh.connect(service(false)).unwrap();
    let (mut server, _) = accept(&listener).unwrap();
    let (is_over, changes) = (AtomicBool::new(false), AtomicU64::new(1));
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let number = changes.fetch_add(1, Ordering::Relaxed) + 1;
                mesh.allow(false, number);
                assert!(mesh.verdicts.commit(generation(number)).unwrap());
            }
        });
        let mut rounds = 0;
        while rounds < 100 || changes.load(Ordering::Relaxed) < 20 && !changing.is_finished() {
            let new = mesh.connect(service(false)).map(|_| accept(&listener).is_some());
            let alive = passes(&mut client, &mut server) && passes(&mut server, &mut client);
            if !alive || new.is_err() {
                is_over.store(true, Ordering::Relaxed);
            }
            assert!(alive && new.unwrap());
            rounds += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!((mesh.tally(Tally::Stale), mesh.tally(Tally::Declined)), (0, 0));
}

#[test]
fn a_socket_that_connects_again_is_captured() {
    let Some(mesh) = Mesh::new("a socket that connects again is captured") else { return };
    for v6 in [false, true] {
        mesh.open(v6);
        let listener = mesh.listen(v6);
        let other = listen(&mesh.lab.pod("far").netns, (mesh.lab.pod("far").ip(v6), PORT).into());
        let client = mesh.connect(service(v6)).unwrap();
        accept(&listener).unwrap();
        take_apart(&client);
        assert_eq!(mark(&client), layout::MARK_GRANTED, "nobody saw it");
        client.set_nonblocking(false).unwrap();
        let to = SockaddrStorage::from(other.local_addr().unwrap());
        setsockopt(&client, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(1, 0)).unwrap();
        assert!(connect(client.as_raw_fd(), &to).is_err(), "captured, and no ztunnel is there");
        assert_eq!(mark(&client), 0);
        assert!(accept(&other).is_none());
        // Past the program at connect: the mark alone leads nowhere.
        let forged = Pair { source: mesh.pair(v6).source, destination: other.local_addr().unwrap() };
        assert!(dial_as(mesh.lab.pod("client"), forged, layout::MARK_GRANTED).is_err());
        assert!(dial_as(mesh.lab.pod("client"), forged, layout::MARK_ANSWERED).is_err());
        assert!(accept(&other).is_none());
    }
}

/// `connect(AF_UNSPEC)`.
#[allow(unsafe_code, reason = "no safe wrapper takes an address without a family")]
fn take_apart(stream: &TcpStream) {
    let nowhere = [0_u8; 16];
    // SAFETY: the descriptor is open, and the kernel reads as many bytes as are said.
    let result = unsafe { libc::connect(stream.as_raw_fd(), nowhere.as_ptr().cast(), 16) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn packets_with_options_do_not_pass() {
    let Some(mesh) = Mesh::new("packets with options do not pass") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let pair = mesh.pair(false);
    let with_options = |host: &Host| {
        let made = host
            .netns
            .run(|| socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None))
            .unwrap()
            .unwrap();
        options(made.as_fd().as_raw_fd());
        setsockopt(&made, sockopt::SendTimeout, &nix::sys::time::TimeVal::new(1, 0)).unwrap();
        connect(made.as_raw_fd(), &SockaddrStorage::from(pair.destination))
    };
    let before = mesh.tally(Tally::Unreadable);
    assert!(with_options(mesh.lab.pod("client")).is_err());
    assert!(mesh.tally(Tally::Unreadable) > before);
    assert!(accept(&listener).is_none());
    // Those that have no verdict are captured, whatever they look like.
    let before = mesh.unproven("server");
    assert!(with_options(mesh.lab.pod("evil")).is_err());
    assert_eq!(mesh.unproven("server"), before);
}

/// Four bytes that mean nothing, `IP_OPTIONS`.
#[allow(unsafe_code, reason = "no safe wrapper has this option")]
fn options(fd: i32) {
    let nops = [1_u8; 4];
    // SAFETY: the descriptor is open, and the kernel reads as many bytes as are said.
    let result = unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, nops.as_ptr().cast(), 4) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// The numbers of a link and of its program.
fn numbers(link: &Path) -> (u32, u32) {
    let info = FdLink::from(PinnedLink::from_pin(link).unwrap()).info().unwrap();
    (info.id(), info.program_id())
}

#[test]
fn another_process_takes_over() {
    let Some(mesh) = Mesh::new("another process takes over") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let mut client = mesh.connect(service(false)).unwrap();
    let (mut server, _) = accept(&listener).unwrap();
    let links = || {
        let all = fs::read_dir(mesh.pins.verdicts()).unwrap().map(|entry| entry.unwrap().path());
        let links = all.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("link-"));
        links.map(|path| (path.clone(), numbers(&path))).collect::<BTreeMap<_, _>>()
    };
    let before = links();
    assert_eq!(before.len(), 7, "{before:?}");
    let next = Verdicts::attach(&mesh.pins, Path::new(CGROUPS)).unwrap();
    for (path, (link, program)) in links() {
        assert_eq!(link, before[&path].0, "{}", path.display());
        assert_ne!(program, before[&path].1, "{}", path.display());
    }
    assert!(passes(&mut client, &mut server) && passes(&mut server, &mut client));
    assert!(!mesh.verdicts.renew(LEASE).unwrap() && !mesh.verdicts.stop().unwrap());
    assert_eq!(next.pairs().unwrap().len(), 1);
    assert_eq!(next.offers().unwrap().len(), 2);
    assert!(next.renew(LEASE).unwrap());
    assert!(mesh.connect(service(false)).is_ok());
}

/// As a newer build does that declares a map otherwise: nothing of the old maps is in force, and nobody renews them.
#[test]
fn verdicts_of_another_build_end() {
    let Some(mut mesh) = Mesh::new("verdicts of another build end") else { return };
    mesh.open(false);
    let listener = mesh.listen(false);
    let mut client = mesh.connect(service(false)).unwrap();
    let (mut server, _) = accept(&listener).unwrap();
    let directory = mesh.pins.verdicts();
    fs::remove_file(directory.join("offers")).unwrap();
    MapData::from_pin(directory.join("connections")).unwrap().pin(directory.join("offers")).unwrap();
    mesh.verdicts = Verdicts::attach(&mesh.pins, Path::new(CGROUPS)).unwrap();
    assert!(mesh.verdicts.pairs().unwrap().is_empty());
    assert!(!passes(&mut client, &mut server) && !passes(&mut server, &mut client));
    let node = &mesh.lab.node("a").host.netns;
    let over = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset];
    for (pod, end) in [(mesh.lab.pod("client"), &mut client), (mesh.lab.pod("server"), &mut server)] {
        let ask = || mesh.verdicts.qualify(node, &pod.netns);
        assert!(matches!(ask(), Err(Why::NotCaptured)));
        capture(&mesh.pins, pod);
        assert!(over.contains(&end.read(&mut [0]).unwrap_err().kind()), "also if it doesn't qualify");
        ask().unwrap();
    }
    mesh.open(false);
    assert!(mesh.connect(service(false)).is_ok());
}

#[test]
fn two_nodes_of_one_machine_leave_each_other_alone() {
    let Some(mesh) = Mesh::new("two nodes of one machine leave each other alone") else { return };
    let other = mesh.pins.clone().of_node(&mesh.lab.node("b").host.netns);
    // What a node left whose namespace had the same number.
    verdicts::remove(&other).unwrap();
    let others = Verdicts::attach(&other, Path::new(CGROUPS)).unwrap();
    others.renew(LEASE).unwrap();
    mesh.open(false);
    let listener = mesh.listen(false);
    let mut client = mesh.connect(service(false)).unwrap();
    let (mut server, _) = accept(&listener).unwrap();
    assert!(passes(&mut client, &mut server));
    assert_eq!(others.connections().unwrap(), verdicts::Listing::default());
    assert_eq!(others.tallies().unwrap().map(|(_, count)| count), [0; layout::TALLIES as usize]);
    let far = &mesh.lab.pod("far").netns;
    assert!(matches!(others.qualify(&mesh.lab.node("b").host.netns, far), Err(Why::NotCaptured)));
    assert!(verdicts::remove(&other).unwrap());
    assert!(!verdicts::remove(&other).unwrap());
    assert!(passes(&mut server, &mut client));
}

/// A node that is gone leaves no programs at the root of the cgroups.
#[test]
fn verdicts_that_nobody_uses_are_removed() {
    let Some(lab) = lab("verdicts that nobody uses are removed") else { return };
    let Some(pins) = pins("verdicts that nobody uses are removed", &lab) else { return };
    let verdicts = Verdicts::attach(&pins, Path::new(CGROUPS)).unwrap();
    let directory = pins.verdicts();
    let sweep = || {
        let then = std::time::SystemTime::now() - Duration::from_secs(3600);
        fs::File::open(&directory).unwrap().set_modified(then).unwrap();
        Pins::open(ebpf::bpf_file_system()).unwrap();
        directory.exists()
    };
    assert!(verdicts.renew(LEASE).unwrap());
    assert!(sweep(), "somebody renews the lease");
    assert!(verdicts.stop().unwrap());
    let pod = lab.pod("client");
    capture(&pins, pod);
    assert!(sweep(), "a pod's programs use them");
    let qualified = verdicts.qualify(&lab.node("a").host.netns, &pod.netns).unwrap();
    ebpf::remove(&pins, &pod.netns).unwrap();
    assert!(sweep(), "a device has the program");
    verdicts.release(&qualified).unwrap();
    assert!(!sweep());
    // A pod that comes later has maps of its own, which let nothing by.
    capture(&pins, pod);
    ebpf::remove(&pins, &pod.netns).unwrap();
}

#[test]
fn what_cannot_be_looked_at_does_not_qualify() {
    let Some(mesh) = Mesh::new("what cannot be looked at does not qualify") else { return };
    let [node, other] = ["a", "b"].map(|name| &mesh.lab.node(name).host.netns);
    let evil = mesh.lab.pod("evil");
    let ask = |node| mesh.verdicts.qualify(node, &evil.netns);
    assert!(matches!(ask(node), Err(Why::NotCaptured)));
    capture(&mesh.pins, evil);
    assert!(matches!(ask(other), Err(Why::NotOnNode)));
    let host = &mesh.lab.node("a").host;
    host.shell("tc qdisc add dev p2 clsact").unwrap();
    assert!(matches!(ask(node), Err(Why::OthersPrograms)));
    host.shell("tc qdisc del dev p2 clsact").unwrap();
    let mut exempt = contents(evil);
    exempt.excluded.push("10.96.0.0/12".parse().unwrap());
    Pod::install(&mesh.pins, &evil.netns, &exempt).unwrap();
    assert!(ask(node).unwrap().exempts);
    capture(&mesh.pins, evil);
    let qualified = ask(node).unwrap();
    assert!(!qualified.exempts);
    assert_eq!(ask(node).unwrap().device, qualified.device, "again");
    evil.shell("ip link add more type bridge; ip link set more up").unwrap();
    assert!(matches!(ask(node), Err(Why::Devices(2))));
    evil.shell("ip link set eth0 down").unwrap();
    let why = ask(node).unwrap_err();
    assert!(matches!(&why, Why::NotVeth(kind) if kind == "bridge"), "{why}");
    evil.shell("ip link set more down").unwrap();
    assert!(matches!(ask(node), Err(Why::Devices(0))));
    mesh.verdicts.release(&qualified).unwrap();
    mesh.verdicts.release(&qualified).unwrap();
}

/// The process that `nothing_passes_when_ztunnel_is_killed` kills.
#[test]
#[ignore = "a part of another test"]
fn renews_until_it_is_killed() {
    let node = Netns::open(std::env::var("NODE").unwrap()).unwrap();
    let pins = Pins::open(ebpf::bpf_file_system()).unwrap().of_node(&node);
    let verdicts = Verdicts::attach(&pins, Path::new(CGROUPS)).unwrap();
    loop {
        assert!(verdicts.renew(WAIT).unwrap());
        println!("renewed");
        std::thread::sleep(WAIT / 10);
    }
}

#[test]
fn nothing_passes_when_ztunnel_is_killed() {
    let Some(mesh) = Mesh::new("nothing passes when ztunnel is killed") else { return };
    mesh.open(false);
    let node = format!("/run/netns/{}", mesh.lab.node("a").host.namespace);
    let mut ztunnel = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "renews_until_it_is_killed", "--ignored", "--nocapture"])
        .env("NODE", node)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(ztunnel.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("renewed")));
    let listener = mesh.listen(false);
    let mut client = mesh.connect(service(false)).unwrap();
    let (mut server, _) = accept(&listener).unwrap();
    assert!(passes(&mut client, &mut server));
    ztunnel.kill().unwrap();
    ztunnel.wait().unwrap();
    std::thread::sleep(WAIT + WAIT / 10);
    assert!(!passes(&mut client, &mut server));
    assert!(!passes(&mut server, &mut client));
    assert!(mesh.connect(service(false)).is_err());
    // Whoever comes next ends what is left of them, where it doesn't know the pair.
    let pair = mesh.pair(false);
    mesh.verdicts.forget(pair).unwrap();
    for pod in ["client", "server"] {
        mesh.verdicts.qualify(&mesh.lab.node("a").host.netns, &mesh.lab.pod(pod).netns).unwrap();
    }
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    // Its own end, or the reset of the other.
    let ended = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset];
    assert!(ended.contains(&server.read(&mut [0]).unwrap_err().kind()));
}
