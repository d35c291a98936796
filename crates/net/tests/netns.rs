//! Stepping into network namespaces and out again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use harness::netns::{Lab, root_or_skip};
use net::Netns;
use net::netns::OpenError;

/// What the kernel says, not what the library believes.
fn where_am_i() -> String {
    fs::read_link("/proc/thread-self/ns/net").unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_thread_goes_in_and_comes_back() {
    if !root_or_skip("a_thread_goes_in_and_comes_back") {
        return;
    }
    let lab = Lab::builder().node("a", &["one", "two"]).build().unwrap();
    let (one, two) = (&lab.pod("one").netns, &lab.pod("two").netns);
    let home = where_am_i();
    assert_eq!(one.run(where_am_i).unwrap(), one.id().to_string());
    assert_eq!(where_am_i(), home);

    // Nested, each way out leads to where the way in began.
    let (inner, outer) = one.run(|| (two.run(where_am_i).unwrap(), where_am_i())).unwrap();
    assert_eq!((inner, outer), (two.id().to_string(), one.id().to_string()));
    assert_eq!(where_am_i(), home);

    // Through a panic too.
    let panicked = catch_unwind(AssertUnwindSafe(|| one.run(|| panic!("on purpose"))));
    assert!(panicked.is_err());
    assert_eq!(where_am_i(), home);
    assert_eq!(two.run(where_am_i).unwrap(), two.id().to_string());

    // A child is born inside.
    let child = one.run(|| Command::new("readlink").arg("/proc/self/ns/net").output().unwrap()).unwrap();
    assert_eq!(String::from_utf8(child.stdout).unwrap().trim(), one.id().to_string());

    // The path of a namespace and that of a process in it are the same namespace.
    let sleeper = lab.pod("one").spawn(Command::new("sleep").arg("60")).unwrap();
    let by_process = Netns::of_process(sleeper.id()).unwrap();
    assert!(by_process.same(one));
    assert!(!by_process.same(two));
}

#[test]
fn entering_costs_microseconds() {
    if !root_or_skip("entering_costs_microseconds") {
        return;
    }
    let lab = Lab::builder().node("a", &["one"]).build().unwrap();
    let netns = &lab.pod("one").netns;
    let start = tokio::time::Instant::now();
    const TIMES: u32 = 20_000;
    for _ in 0..TIMES {
        netns.run(|| ()).unwrap();
    }
    let each = start.elapsed() / TIMES;
    println!("in and out: {each:?}");
    assert!(each.as_micros() < 200, "{each:?}");
}

#[test]
fn what_is_no_network_namespace_is_named_for_what_it_is() {
    let gone = Netns::open("/run/netns/there-is-no-such-namespace").unwrap_err();
    assert!(matches!(gone, OpenError::Vanished { .. }), "{gone}");
    let ended = Netns::of_process(4_000_000).unwrap_err();
    assert!(matches!(ended, OpenError::Vanished { .. }), "{ended}");
    let file = Netns::open("/etc/hostname").unwrap_err();
    assert!(matches!(file, OpenError::NotANamespace { .. }), "{file}");
    let mount = Netns::open("/proc/self/ns/mnt").unwrap_err();
    assert!(matches!(mount, OpenError::NotANetworkNamespace { .. }), "{mount}");
    assert!(mount.to_string().contains("/proc/self/ns/mnt"));
}

/// In a user namespace of its own a process may enter namespaces that it made, but never come back to the one
/// it was started in. Runs itself again under `unshare`.
#[test]
fn a_thread_that_may_not_return_is_not_sent() {
    const INSIDE: &str = "CULVERT_TEST_INSIDE_USER_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        let netns = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            Netns::current().unwrap()
        });
        let netns = netns.join().unwrap();
        let home = where_am_i();
        for _ in 0..3 {
            assert_eq!(netns.run(where_am_i).unwrap(), netns.id().to_string());
            assert_eq!(where_am_i(), home);
        }
        return;
    }
    if !root_or_skip("a_thread_that_may_not_return_is_not_sent") {
        return;
    }
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_thread_that_may_not_return_is_not_sent", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    if String::from_utf8_lossy(&output.stderr).contains("unshare failed") {
        println!("skipped: user namespaces are not allowed here");
        return;
    }
    assert!(output.status.success(), "{output:?}");
}
