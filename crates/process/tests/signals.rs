//! Signals, in a process of their own: they are the whole process's.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use process::shutdown::{Phase, Shutdown};
use tokio::time::timeout;

#[tokio::test]
async fn the_first_signal_drains_and_the_second_aborts() {
    const SOON: Duration = Duration::from_secs(10);
    let shutdown = Shutdown::new(Duration::from_secs(60));
    shutdown.on_signals().unwrap();
    let _under_way = shutdown.hold();
    assert_eq!(shutdown.phase(), Phase::Running);
    raise(Signal::SIGTERM).unwrap();
    timeout(SOON, shutdown.draining()).await.unwrap();
    assert!(matches!(shutdown.phase(), Phase::Draining { .. }));
    let finished = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.finished().await }
    });
    raise(Signal::SIGINT).unwrap();
    assert_eq!(timeout(SOON, finished).await.unwrap().unwrap(), 1);
    assert_eq!(shutdown.phase(), Phase::Aborting);
}
