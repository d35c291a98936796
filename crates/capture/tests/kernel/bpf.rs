//! What is particular to capture without netfilter: packets that are hard to read, handshakes without a state, own addresses,
//! and programs that outlive the processes that installed them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use capture::{Backend, Capture, Counter, Programs, Rules, Tools};
use ebpf::{Pins, Pod};
use harness::netns::{Host, Lab, root_or_skip};
use net::Netns;
use net::sock_diag::{self, Connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{
    Case, FakeZtunnel, block_on, dial, echo, greeting, in_time, plain, start_app, two_nodes, works,
};

const NAMESPACE: &str = "CULVERT_TEST_INSTALL_IN";

fn each_family(name: &str, test: impl AsyncFn(Case)) {
    if root_or_skip(name) && works(name, Backend::Ebpf) {
        for v6 in [false, true] {
            block_on(test(Case { backend: Backend::Ebpf, v6 }));
        }
    }
}

/// Pods that ended while nobody captured, and whoever captures then does it otherwise.
#[test]
fn other_back_ends_take_away_what_pods_that_are_gone_left() {
    const NAME: &str = "programs of pods that are gone, under another back-end";
    if !(root_or_skip(NAME) && works(NAME, Backend::Ebpf) && works(NAME, Backend::Nftables)) {
        return;
    }
    let probe = |backend| capture::probe(backend, &Tools::default()).unwrap();
    let (programs, rules) = (probe(Backend::Ebpf), probe(Backend::Nftables));
    let lab = Lab::builder().node("a", &["web"]).build().unwrap();
    let netns = lab.pod("web").netns.clone();
    programs.install(&netns, &Rules::default()).unwrap();
    let kept = Path::new("/sys/fs/bpf/culvert").join(netns.id().inode().to_string());
    rules.sweep();
    assert!(kept.exists(), "the pod lives");
    drop((netns, lab));
    // The kernel takes its time to end a namespace, and nothing is swept while somebody installs.
    for _ in 0..200 {
        if !kept.exists() {
            return;
        }
        rules.sweep();
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{} is still there", kept.display());
}

fn counted(netns: &Netns, counter: Counter) -> u64 {
    let all = capture::counters(netns).unwrap();
    all.into_iter().find(|(known, _)| *known == counter).unwrap().1
}

fn nothing_escaped(netns: &Netns) {
    for counter in [Counter::EscapedInbound, Counter::EscapedOutbound] {
        assert_eq!(counted(netns, counter), 0, "{counter:?}");
    }
}

/// Connects with four bytes of IP options, or an extension header with options for the destination.
async fn dial_with_options(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = netns.run(|| {
        let socket =
            if to.is_ipv6() { tokio::net::TcpSocket::new_v6() } else { tokio::net::TcpSocket::new_v4() }?;
        let (level, name, value): (_, _, &[u8]) = if to.is_ipv6() {
            // Next header and length are the kernel's; one option of padding, four bytes.
            (nix::libc::IPPROTO_IPV6, nix::libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0])
        } else {
            (nix::libc::IPPROTO_IP, nix::libc::IP_OPTIONS, &[1, 1, 1, 1])
        };
        set_option(socket.as_raw_fd(), level, name, value)?;
        io::Result::Ok(socket)
    });
    let connecting = socket??.connect(to);
    tokio::time::timeout(Duration::from_secs(3), connecting).await?
}

#[allow(unsafe_code, reason = "no safe wrapper sets these options")]
fn set_option(fd: i32, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = u32::try_from(value.len()).unwrap();
    // SAFETY: the descriptor is open, and the kernel reads as many bytes as there are.
    let result = unsafe { nix::libc::setsockopt(fd, level, name, value.as_ptr().cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn headers_with_options_make_no_difference() {
    each_family("headers_with_options_make_no_difference", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let programs = Programs::probe(&Tools::default()).unwrap();
        programs.install(&server.netns, &Rules::default()).unwrap();
        for (from, to) in [(client, case.addr(server, 8080)), (server, case.addr(client, 9090))] {
            let refused = dial_with_options(&from.netns, to).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{to}");
        }
        let ztunnel = FakeZtunnel::start(&server.netns);
        for (from, to) in [(client, case.addr(server, 8080)), (server, case.addr(client, 9090))] {
            let mut stream = dial_with_options(&from.netns, to).await.unwrap();
            greeting(&mut stream).await;
            assert_eq!(ztunnel.took().await.original_dst, to);
        }
        nothing_escaped(&server.netns);
    });
}

#[test]
fn handshakes_with_cookies_make_no_difference() {
    each_family("handshakes_with_cookies_make_no_difference", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        // For every handshake, not only when a queue is full.
        server.shell("echo 2 > /proc/sys/net/ipv4/tcp_syncookies").unwrap();
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        let programs = Programs::probe(&Tools::default()).unwrap();
        programs.install(&server.netns, &Rules::default()).unwrap();
        let ztunnel = FakeZtunnel::start(&server.netns);
        for (from, to) in [(client, case.addr(server, 8080)), (server, case.addr(client, 9090))] {
            for _ in 0..10 {
                let mut stream = dial(&from.netns, to).await.unwrap();
                assert_eq!(greeting(&mut stream).await, case.addr(from, 0).ip().to_string());
                echo(&mut stream, "there and back").await;
                assert_eq!(ztunnel.took().await.original_dst, to);
            }
        }
        nothing_escaped(&server.netns);
    });
}

/// A first version captured what ztunnel delivered to the pod's own address, and so on, until descriptors ran out.
#[test]
fn own_addresses_are_not_captured_over_and_over() {
    each_family("own_addresses_are_not_captured_over_and_over", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        let programs = Programs::probe(&Tools::default()).unwrap();
        programs.install(&server.netns, &Rules::default()).unwrap();
        let ztunnel = FakeZtunnel::start(&server.netns);
        // One that the maps don't know: at most one detour, and not one more.
        let late = if case.v6 { "fd77::7" } else { "203.0.113.7" };
        server.shell(&format!("ip addr add {late} dev eth0 {}", if case.v6 { "nodad" } else { "" })).unwrap();
        let late = SocketAddr::new(late.parse().unwrap(), 8080);
        for to in [case.addr(server, 8080), late] {
            for _ in 0..20 {
                let mut stream = dial(&server.netns, to).await.unwrap();
                greeting(&mut stream).await;
                assert!(ztunnel.taken().len() <= 1, "{to}");
            }
        }
        // What is delivered has the client's own address, and the same port if chance will have it.
        for _ in 0..20 {
            let mut stream = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
            greeting(&mut stream).await;
            assert_eq!(ztunnel.taken().len(), 1);
        }
        let connections = sock_diag::connections(&server.netns).unwrap();
        assert!(connections.len() < 300, "{}", connections.len());
    });
}

/// The application closes first, so that its ends linger; ztunnel comes again from the same port.
#[test]
fn a_delivery_from_a_lingering_port_is_not_captured() {
    each_family("a_delivery_from_a_lingering_port_is_not_captured", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let app = crate::fixture::app_listener(&server.netns, 8080);
        let programs = Programs::probe(&Tools::default()).unwrap();
        programs.install(&server.netns, &Rules::default()).unwrap();
        let ztunnel = FakeZtunnel::start(&server.netns);
        let source = Some(case.addr(client, 40_000));
        let options = net::ConnectOptions { source, mark: Some(net::ZTUNNEL_MARK), ..plain() };
        for _ in 0..3 {
            let dialled =
                net::connect(&server.netns, &options, case.addr(server, 8080), Duration::from_secs(3));
            let mut dialled = dialled.await.unwrap();
            let (accepted, peer) = in_time(app.accept()).await.unwrap();
            assert_eq!(peer.port(), 40_000);
            drop(accepted);
            assert_eq!(in_time(dialled.read(&mut [0])).await.unwrap(), 0);
            drop(dialled);
            // On a busy machine the last acknowledgement takes its time, and the port is not free before.
            let is_open = |c: &Connection| c.local.port() == 40_000;
            in_time(async {
                while sock_diag::connections(&server.netns).unwrap().iter().any(is_open) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
            .await;
        }
        assert_eq!(ztunnel.taken(), []);
    });
}

/// Not a test: the process that installs, and ends. It runs only when a test starts it.
#[test]
fn installing_process() {
    let Some(path) = std::env::var_os(NAMESPACE) else { return };
    let programs = Programs::probe(&Tools::default()).unwrap();
    programs.install(&Netns::open(path).unwrap(), &Rules::default()).unwrap();
}

fn install_and_end(pod: &Host) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "bpf::installing_process"]).env(NAMESPACE, pod.netns.name());
    let output = pod.output(&mut command).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn capture_outlives_who_installed_it() {
    each_family("capture_outlives_who_installed_it", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&server.netns, 8080);
        start_app(&client.netns, 9090);
        install_and_end(server);
        let both = [(client, case.addr(server, 8080)), (server, case.addr(client, 9090))];
        for (from, to) in both {
            assert_eq!(dial(&from.netns, to).await.map(drop), Err(io::ErrorKind::ConnectionRefused), "{to}");
        }
        // Another process finds all as it should be, and what was counted.
        let programs = Programs::probe(&Tools::default()).unwrap();
        assert!(!programs.install(&server.netns, &Rules::default()).unwrap().changed);
        assert!(counted(&server.netns, Counter::NoListener) >= 2);
        let ztunnel = FakeZtunnel::start(&server.netns);
        for (from, to) in both {
            let mut stream = dial(&from.netns, to).await.unwrap();
            greeting(&mut stream).await;
            assert_eq!(ztunnel.took().await.original_dst, to);
        }
        assert_eq!(counted(&server.netns, Counter::Inbound), 1);
        assert_eq!(counted(&server.netns, Counter::Outbound), 1);
        assert!(programs.remove(&server.netns).unwrap());
        assert_eq!(capture::counters(&server.netns).unwrap(), []);
    });
}

#[test]
fn settings_are_put_back_whatever_was_broken_meanwhile() {
    each_family("settings_are_put_back_whatever_was_broken_meanwhile", async |case| {
        let lab = Lab::builder().node("a", &["server"]).build().unwrap();
        let server = lab.pod("server");
        let settings = "cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv[46]/fwmark_reflect \
                        /proc/sys/net/ipv4/conf/all/src_valid_mark";
        let before = server.shell(settings).unwrap();
        let capture = case.capture();
        capture.install(&server.netns, &Rules::default()).unwrap();
        assert_eq!(server.shell(settings).unwrap(), "1\n1\n1\n1\n");
        let pins = format!("/sys/fs/bpf/culvert/{}", server.netns.id().inode());
        server.shell(&format!("rm {pins}/link-sockets")).unwrap();
        assert!(capture.install(&server.netns, &Rules::default()).unwrap().changed);
        assert!(capture.remove(&server.netns).unwrap());
        assert_eq!(server.shell(settings).unwrap(), before);
        assert!(!std::fs::exists(pins).unwrap());
    });
}

/// What a process leaves that is killed while it enrols a pod: programs that let new connections out, and no routes to ztunnel.
fn break_off(server: &Host) {
    let pins = Pins::of_others(ebpf::bpf_file_system());
    Pod::find(&pins, &server.netns).unwrap().let_out().unwrap();
    server.shell("for pref in 52 55 57; do ip rule del pref $pref; ip -6 rule del pref $pref; done").unwrap();
}

#[test]
fn an_enrolment_that_breaks_off_lets_nothing_go_on_in_plaintext() {
    each_family("an_enrolment_that_breaks_off_lets_nothing_go_on_in_plaintext", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        let capture = case.capture();
        start_app(&client.netns, 9090);
        let ztunnel = FakeZtunnel::start(&server.netns);
        capture.install(&server.netns, &Rules::default()).unwrap();
        let to = case.addr(client, 9090);
        break_off(server);
        let mut begun = dial(&server.netns, to).await.unwrap();
        // Whoever goes on with it takes that for none of before the enrolment.
        assert!(capture.install(&server.netns, &Rules::default()).unwrap().changed);
        begun.write_all(b"in plaintext\n").await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(1), begun.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.contains("in plaintext"), "{answer}");
        assert_eq!(ztunnel.taken(), []);
        let mut captured = dial(&server.netns, to).await.unwrap();
        greeting(&mut captured).await;
        assert_eq!(ztunnel.took().await.original_dst, to);
        // Nobody goes on with it: it ends by itself.
        break_off(server);
        in_time(async {
            while dial(&server.netns, to).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await;
    });
}

/// Runs `work` in a thread whose `/proc/sys` is another one: with `tmpfs` an empty one, else read-only as in a container.
fn with_other_proc_sys(tmpfs: bool, work: impl FnOnce() + Send) {
    use nix::mount::{MsFlags, mount};
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let (none, sys) = (None::<&str>, Some("/proc/sys"));
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            if tmpfs {
                mount(Some("tmpfs"), "/proc/sys", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            } else {
                mount(sys, "/proc/sys", none, MsFlags::MS_BIND, none).unwrap();
                let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(none, "/proc/sys", none, again, none).unwrap();
            }
            work();
        });
    });
}

/// Where the settings can't be written at first, who comes later still knows them.
#[test]
fn settings_are_known_until_they_are_put_back() {
    each_family("settings_are_known_until_they_are_put_back", async |case| {
        let lab = Lab::builder().node("a", &["server"]).build().unwrap();
        let netns = &lab.pod("server").netns;
        let accept = || lab.pod("server").shell("cat /proc/sys/net/ipv4/tcp_fwmark_accept").unwrap();
        let before = accept();
        let capture = case.capture();
        capture.install(netns, &Rules::default()).unwrap();
        assert_ne!(accept(), before);
        with_other_proc_sys(true, || {
            capture.remove(netns).unwrap_err();
        });
        assert_ne!(accept(), before);
        capture.remove(netns).unwrap();
        assert_eq!(accept(), before);
    });
}

/// As in a container without all privileges.
#[test]
fn settings_are_changed_where_their_mount_is_read_only() {
    each_family("settings_are_changed_where_their_mount_is_read_only", async |case| {
        let lab = Lab::builder().node("a", &["server"]).build().unwrap();
        let netns = &lab.pod("server").netns;
        let accept = || lab.pod("server").shell("cat /proc/sys/net/ipv4/tcp_fwmark_accept").unwrap();
        let before = accept();
        let capture = case.capture();
        with_other_proc_sys(false, || {
            capture.install(netns, &Rules::default()).unwrap();
            assert_eq!(accept(), "1\n");
            assert!(capture.verify(netns, &Rules::default()).unwrap().is_none());
            assert!(capture.remove(netns).unwrap());
        });
        assert_eq!(accept(), before);
    });
}

/// Past the routes: by a socket that is bound to the device.
#[test]
fn a_socket_bound_to_a_device_is_refused() {
    each_family("a_socket_bound_to_a_device_is_refused", async |case| {
        let lab: Lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&client.netns, 9090);
        let programs = Programs::probe(&Tools::default()).unwrap();
        programs.install(&server.netns, &Rules::default()).unwrap();
        let _ztunnel = FakeZtunnel::start(&server.netns);
        let to = case.addr(client, 9090);
        let socket = server.netns.run(|| {
            let socket =
                if case.v6 { tokio::net::TcpSocket::new_v6() } else { tokio::net::TcpSocket::new_v4() }?;
            socket.bind_device(Some(b"eth0"))?;
            io::Result::Ok(socket)
        });
        let connected = in_time(socket.unwrap().unwrap().connect(to)).await;
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(counted(&server.netns, Counter::EscapedOutbound), 1);
    });
}

/// Takes a connection apart and uses its socket for another one.
#[allow(unsafe_code, reason = "no safe wrapper connects to nothing")]
fn use_again(stream: &TcpStream, to: SocketAddr) -> io::Result<()> {
    let to = match to.ip() {
        std::net::IpAddr::V4(ip) if stream.local_addr()?.is_ipv6() => (ip.to_ipv6_mapped(), to.port()).into(),
        _ => to,
    };
    let nothing =
        nix::libc::sockaddr { sa_family: u16::try_from(nix::libc::AF_UNSPEC).unwrap(), sa_data: [0; 14] };
    let length = u32::try_from(size_of_val(&nothing)).unwrap();
    // SAFETY: the descriptor is open, and the kernel reads as many bytes as there are.
    if unsafe { nix::libc::connect(stream.as_raw_fd(), &raw const nothing, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    match nix::sys::socket::connect(stream.as_raw_fd(), &nix::sys::socket::SockaddrStorage::from(to)) {
        Err(nix::Error::EINPROGRESS) => Ok(()),
        connected => Ok(connected?),
    }
}

/// Of what was accepted past ztunnel, and of what was alive at enrolment, the socket has the mark of the pod's own routes, and
/// the application may connect it again.
#[test]
fn a_socket_that_is_used_again_is_refused() {
    each_family("a_socket_that_is_used_again_is_refused", async |case| {
        let lab = two_nodes();
        let (server, client) = (lab.pod("server"), lab.pod("client"));
        start_app(&client.netns, 9090);
        let app = crate::fixture::app_listener(&server.netns, 8080);
        let mut alive = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut alive).await;
        let programs = Programs::probe(&Tools::default()).unwrap();
        let exempt = vec![capture::PortRange::new(8080, 8080).unwrap()];
        let rules = Rules { exclude_inbound_ports: exempt, ..Rules::default() };
        programs.install(&server.netns, &rules).unwrap();
        let ztunnel = FakeZtunnel::start(&server.netns);
        let _dialled = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        let (accepted, _) = in_time(app.accept()).await.unwrap();
        echo(&mut alive, "it goes on").await;
        for (before, stream) in [accepted, alive].into_iter().enumerate() {
            use_again(&stream, case.addr(client, 9090)).unwrap();
            let refused = in_time(async {
                loop {
                    if let Some(error) = stream.take_error().unwrap() {
                        return Some(error.kind());
                    }
                    if stream.peer_addr().is_ok() {
                        return None;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            assert_eq!(refused.await, Some(io::ErrorKind::ConnectionRefused));
            assert_eq!(counted(&server.netns, Counter::EscapedOutbound), before as u64 + 1);
        }
        assert_eq!(ztunnel.taken(), []);
        // ztunnel's own still leave.
        let mut stream = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut stream).await;
        assert!(!ztunnel.took().await.inbound);
    });
}
