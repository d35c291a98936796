//! Running out of descriptors. Alone in its process: the limit is the whole process's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use net::{AcceptLoop, AcceptStats, ConnectOptions, ListenOptions, Netns, Step};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};

#[tokio::test]
async fn accepting_goes_on_when_descriptors_return() {
    let netns = Netns::current().unwrap();
    // Unmarked and in its own namespace: this one runs without privileges too.
    let options = ListenOptions::default();
    let listener = net::listen(&netns, (Ipv4Addr::LOCALHOST, 0).into(), &options).unwrap();
    let to = listener.local_addr().unwrap();
    let stats = Arc::new(AcceptStats::default());
    let mut accepting = AcceptLoop::new(listener, stats.clone());
    let dialling = ConnectOptions { mark: None, ..ConnectOptions::default() };
    let dial = async || net::connect(&netns, &dialling, to, Duration::from_secs(5)).await;
    let waiting = [dial().await.unwrap(), dial().await.unwrap(), dial().await.unwrap()];

    // Every descriptor up to the limit is taken, and none is in stock.
    netns.clear_stock();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        hoard.push(file);
    }
    let refused = dial().await.unwrap_err();
    assert_eq!((refused.step, refused.source.raw_os_error()), (Step::Socket, Some(24)), "EMFILE");

    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        usage.user_time().tv_usec() + usage.system_time().tv_usec()
    };
    let before = cpu();
    let waited = tokio::time::timeout(Duration::from_millis(500), accepting.next()).await;
    assert!(waited.is_err(), "there is no descriptor to accept with");
    let spent = cpu() - before;
    let failed = stats.failed.load(Ordering::Relaxed);
    println!("{failed} attempts, {spent} µs of CPU in 500 ms");
    assert!((3..20).contains(&failed), "it neither gave up nor span: {failed} attempts");
    assert!(spent < 100_000, "{spent} µs of CPU in 500 ms");

    // Those that waited are served.
    drop(hoard);
    for _ in &waiting {
        tokio::time::timeout(Duration::from_secs(5), accepting.next()).await.unwrap();
    }
    assert_eq!(stats.accepted.load(Ordering::Relaxed), 3);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
}
