//! Signals, in a process of their own: they are the whole process's.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use process::logs::{LogSettings, LogWriter, Logs, Target};
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

/// What log rotation sends: the process lives, and the renamed file is left.
#[tokio::test]
async fn sighup_opens_the_log_file_again() {
    let dir = tempfile::tempdir().unwrap();
    let (path, renamed) = (dir.path().join("log"), dir.path().join("log.1"));
    let writer = LogWriter::start(&Target::File(path.clone()), |_| String::new()).unwrap();
    let (logs, _subscriber) = Logs::on_writer(&LogSettings::default(), writer.clone()).unwrap();
    logs.on_hangup().unwrap();
    let write = async |line: &[u8]| {
        assert!(writer.write_line(line) && writer.flush(Duration::from_secs(10)));
    };
    write(b"before\n").await;
    std::fs::rename(&path, &renamed).unwrap();
    write(b"still there\n").await;
    raise(Signal::SIGHUP).unwrap();
    timeout(Duration::from_secs(10), async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            write(b"after\n").await;
        }
    })
    .await
    .unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("after\n"));
    assert!(std::fs::read_to_string(&renamed).unwrap().starts_with("before\nstill there\n"));

    // Where it can't be opened, lines go on to the file that is open.
    let failures = writer.failures();
    std::fs::remove_dir_all(dir.path()).unwrap();
    raise(Signal::SIGHUP).unwrap();
    timeout(Duration::from_secs(10), async {
        while writer.failures() == failures {
            tokio::time::sleep(Duration::from_millis(5)).await;
            write(b"into what was removed\n").await;
        }
    })
    .await
    .unwrap();
    assert_eq!(writer.dropped(), 0);
}
