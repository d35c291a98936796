//! Logs: what lines look like, and that nothing that happens to them reaches the process.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use process::logs::{
    AccessLogLimits, AccessRecord, Direction, Format, LogSettings, LogWriter, Logs, Refusal, Target,
};
use tokio::time::Instant;

/// Collects what is written.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<u8>>>);

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Collector {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

fn notice(lines: u64) -> String {
    format!("dropped {lines}\n")
}

/// Runs `body` under logs of this kind, and returns the lines.
fn logged(settings: &LogSettings, body: impl FnOnce(&Logs)) -> Vec<String> {
    let collector = Collector::default();
    let writer = LogWriter::start_on(collector.clone(), 1 << 20, notice).unwrap();
    let (logs, subscriber) = Logs::on_writer(settings, writer.clone()).unwrap();
    tracing::subscriber::with_default(subscriber, || body(&logs));
    assert!(writer.flush(Duration::from_secs(10)));
    collector.lines()
}

fn settings(filter: &str, format: Format) -> LogSettings {
    LogSettings { filter: filter.into(), format, ..LogSettings::default() }
}

fn record<'a>() -> AccessRecord<'a> {
    AccessRecord {
        src_addr: "10.0.0.1:34062".parse().unwrap(),
        src_workload: "cart-1",
        src_namespace: "shop",
        src_identity: Some(&"spiffe://cluster.local/ns/shop/sa/cart"),
        src_cluster: "Kubernetes",
        dst_addr: "10.0.0.2:15008".parse().unwrap(),
        dst_hbone_addr: Some("10.0.0.2:80".parse().unwrap()),
        dst_service: "db.shop.svc.cluster.local",
        dst_workload: "db-1",
        dst_namespace: "shop",
        dst_identity: Some(&"spiffe://cluster.local/ns/shop/sa/db"),
        dst_cluster: "Kubernetes",
        direction: Direction::Outbound,
        bytes_from_client: 84,
        bytes_from_server: 173,
        duration: Duration::from_millis(12),
        error: None,
        policy: Some(&"policy shop/allow rule 0 clause 0.1"),
        reason: None,
        id: None,
    }
}

/// A text line without its time.
fn timeless(line: &str) -> &str {
    let (time, rest) = line.split_once('\t').unwrap();
    assert!(time.len() == 27 && time.ends_with('Z'), "{time}");
    rest
}

#[test]
fn a_connection_is_one_line_with_istios_fields_in_order() {
    let lines = logged(&settings("info", Format::Text), |logs| {
        logs.access().opened(&record()); // DEBUG: not shown
        logs.access().complete(&record());
        let failed = AccessRecord {
            direction: Direction::Inbound,
            error: Some(&"connection refused"),
            src_identity: None,
            dst_identity: None,
            dst_hbone_addr: None,
            dst_service: "",
            policy: None,
            reason: Some(&"no endpoint took it"),
            id: Some(&7),
            ..record()
        };
        logs.access().complete(&failed);
        logs.access().refused(&Refusal {
            src_addr: "10.0.0.1:1".parse().unwrap(),
            dst_addr: "[fd00::2]:15008".parse().unwrap(),
            direction: Direction::Inbound,
            error: &"TLS handshake: no certificate",
        });
    });
    let lines: Vec<&str> = lines.iter().map(|l| timeless(l)).collect();
    assert_eq!(
        lines,
        [
            concat!(
                "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:34062 src.workload=\"cart-1\" ",
                "src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" ",
                "src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 ",
                "dst.service=\"db.shop.svc.cluster.local\" dst.workload=\"db-1\" dst.namespace=\"shop\" ",
                "dst.identity=\"spiffe://cluster.local/ns/shop/sa/db\" dst.cluster=\"Kubernetes\" ",
                "direction=\"outbound\" bytes_sent=84 bytes_recv=173 duration=\"12ms\" ",
                "policy=\"policy shop/allow rule 0 clause 0.1\"",
            ),
            // Seen from the server's side the server sent.
            concat!(
                "error\taccess\tconnection complete\tsrc.addr=10.0.0.1:34062 src.workload=\"cart-1\" ",
                "src.namespace=\"shop\" src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 ",
                "dst.workload=\"db-1\" dst.namespace=\"shop\" dst.cluster=\"Kubernetes\" ",
                "direction=\"inbound\" bytes_sent=173 bytes_recv=84 duration=\"12ms\" ",
                "error=\"connection refused\" reason=\"no endpoint took it\" id=\"7\"",
            ),
            concat!(
                "warn\taccess\tconnection failed\tsrc.addr=10.0.0.1:1 dst.addr=[fd00::2]:15008 ",
                "direction=\"inbound\" error=\"TLS handshake: no certificate\"",
            ),
        ]
    );
}

#[test]
fn json_lines_have_the_same_fields() {
    let lines = logged(&settings("debug", Format::Json), |logs| {
        logs.access().opened(&record());
        logs.access().complete(&record());
        tracing::info!(n = 3, flag = true, what = "a\"b\nc", "hello");
    });
    let keys: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            // serde_json sorts keys: the order is read from the text.
            let parsed: serde_json::Value = serde_json::from_str(line).unwrap();
            let mut keys: Vec<String> = parsed.as_object().unwrap().keys().cloned().collect();
            keys.sort_by_key(|k| line.find(&format!("\"{k}\":")).unwrap());
            keys
        })
        .collect();
    assert_eq!(
        keys[1],
        [
            "level",
            "time",
            "scope",
            "message",
            "src.addr",
            "src.workload",
            "src.namespace",
            "src.identity",
            "src.cluster",
            "dst.addr",
            "dst.hbone_addr",
            "dst.service",
            "dst.workload",
            "dst.namespace",
            "dst.identity",
            "dst.cluster",
            "direction",
            "bytes_sent",
            "bytes_recv",
            "duration",
            "policy"
        ]
    );
    let opened: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(
        (opened["level"].as_str(), opened["message"].as_str()),
        (Some("debug"), Some("connection opened"))
    );
    assert!(opened.get("bytes_sent").is_none());
    let event: serde_json::Value = serde_json::from_str(&lines[2]).unwrap();
    assert_eq!((event["n"].as_u64(), event["flag"].as_bool()), (Some(3), Some(true)));
    assert_eq!(event["what"].as_str(), Some("a\"b\nc"));
}

#[test]
fn what_a_peer_chose_can_not_forge_a_line() {
    let evil = "x\" dst.addr=1.2.3.4:5\n2026-01-01T00:00:00.000000Z\tinfo\taccess\tconnection complete";
    for format in [Format::Text, Format::Json] {
        let lines = logged(&settings("info", format), |logs| {
            logs.access().complete(&AccessRecord {
                src_workload: evil,
                error: Some(&evil),
                dst_identity: Some(&evil),
                ..record()
            });
            tracing::warn!(evil, "{evil}");
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
        if format == Format::Text {
            assert_eq!(
                lines[0].matches(" dst.addr=").count(),
                lines[0].matches("\\\" dst.addr=").count() + 1
            );
        }
    }
}

#[test]
fn the_level_changes_at_run_time() {
    let lines = logged(&settings("info", Format::Text), |logs| {
        tracing::debug!("one");
        assert_eq!(logs.set_level("debug").unwrap(), "debug");
        tracing::debug!("two");
        logs.access().opened(&record());
        assert_eq!(logs.set_level("access:off").unwrap(), "debug,access=off");
        logs.access().complete(&record());
        assert!(logs.set_level("nonsense").is_err());
        assert_eq!(logs.level(), "debug,access=off");
        tracing::debug!("three");
    });
    let messages: Vec<&str> = lines.iter().map(|l| l.split('\t').nth(3).unwrap()).collect();
    assert_eq!(messages, ["log level changed", "two", "connection opened", "log level changed", "three"]);
}

#[test]
fn an_event_names_its_spans_and_their_fields() {
    let lines = logged(&settings("info", Format::Text), |_| {
        let span = tracing::info_span!("connection", id = 7, peer = tracing::field::Empty);
        let _in_span = span.enter();
        span.record("peer", "p");
        tracing::info!(n = 1, "inside");
    });
    assert_eq!(timeless(&lines[0]), "info\tlogs:connection\tinside\tid=7 peer=\"p\" n=1");
}

#[test]
fn sampling_leaves_out_successes_and_no_failure() {
    let mut sampled = settings("info", Format::Text);
    sampled.access = AccessLogLimits { one_in: 10, lines_per_second: 0 };
    let lines = logged(&sampled, |logs| {
        for _ in 0..100 {
            logs.access().complete(&record());
            logs.access().complete(&AccessRecord { error: Some(&"no"), ..record() });
        }
        assert_eq!(logs.access().suppressed(), 90);
    });
    let count = |level: &str| lines.iter().filter(|l| timeless(l).starts_with(level)).count();
    assert_eq!((count("info"), count("error")), (10, 100));
}

#[tokio::test(start_paused = true)]
async fn the_limit_holds_each_second_and_apart_for_failures() {
    let mut limited = settings("info", Format::Text);
    limited.access = AccessLogLimits { one_in: 1, lines_per_second: 5 };
    let collector = Collector::default();
    let writer = LogWriter::start_on(collector.clone(), 1 << 20, notice).unwrap();
    let (logs, subscriber) = Logs::on_writer(&limited, writer.clone()).unwrap();
    let _default = tracing::subscriber::set_default(subscriber);
    for _ in 0..2 {
        for _ in 0..50 {
            logs.access().complete(&record());
        }
        logs.access().complete(&AccessRecord { error: Some(&"no"), ..record() });
        tokio::time::advance(Duration::from_millis(1001)).await;
    }
    assert!(writer.flush(Duration::from_secs(10)));
    assert_eq!(collector.lines().len(), 12);
    assert_eq!(logs.access().suppressed(), 90);
}

/// A file system of 64 KiB.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let none: Option<&Path> = None;
        let flags = nix::mount::MsFlags::empty();
        match nix::mount::mount(none, directory.path(), Some("tmpfs"), flags, Some("size=64k")) {
            Ok(()) => Some(Self(directory)),
            Err(e) => {
                println!("skipped: mounting a tmpfs needs root: {e}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (log, ballast) = (disk.0.path().join("log"), disk.0.path().join("ballast"));
    File::create(&ballast).unwrap().write_all(&[0; 40 << 10]).unwrap();
    let writer = LogWriter::start(&Target::File(log.clone()), notice).unwrap();
    let (logs, subscriber) = Logs::on_writer(&settings("info", Format::Text), writer.clone()).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        let start = Instant::now();
        for _ in 0..2000 {
            logs.access().complete(&record());
        }
        assert!(writer.flush(Duration::from_secs(10)));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(writer.dropped() > 0 && writer.failures() > 0);
        std::fs::remove_file(&ballast).unwrap();
        let (dropped, mut expected) = (writer.dropped(), writer.dropped());
        logs.access().complete(&record());
        assert!(writer.flush(Duration::from_secs(10)));
        assert_eq!(writer.dropped(), dropped, "there is room again");
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.lines().any(|l| l == format!("dropped {dropped}")), "no notice of {dropped}");
        // Every line is whole, or one that the full disk cut, which the next one did not continue.
        let cut = text.lines().filter(|l| !l.starts_with("dropped") && !l.ends_with("0.1\"")).count();
        assert!(cut <= 1, "{cut} lines are cut");
        expected += text.lines().filter(|l| l.ends_with("0.1\"")).count() as u64;
        assert_eq!(expected, 2001, "every line is written or counted");
    });
}

#[test]
fn a_reader_that_stands_still_does_not_stop_the_writer() {
    let (mut reader, sink) = std::io::pipe().unwrap();
    let writer = LogWriter::start_on(sink, 256 << 10, notice).unwrap();
    let line = format!("{}\n", "x".repeat(999));
    let start = Instant::now();
    let taken = (0..2000).filter(|_| writer.write_line(line.as_bytes())).count();
    assert!(start.elapsed() < Duration::from_secs(2), "a write waited for the reader");
    // The buffer and what the pipe (64 KiB) took, with the batch that was being written.
    assert!((256..=800).contains(&taken), "{taken}");
    assert_eq!(writer.dropped(), 2000 - taken as u64);
    assert!(!writer.flush(Duration::from_millis(50)), "nobody reads");
    let dropped = writer.dropped();
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    assert!(writer.flush(Duration::from_secs(10)));
    assert!(writer.write_line(b"after\n"));
    writer.close();
    drop(writer);
    let text = reading.join().unwrap();
    assert_eq!(text.lines().filter(|l| l.len() == 999).count(), taken);
    assert!(text.contains(&format!("dropped {dropped}\n")), "{dropped}");
    assert!(text.ends_with("after\n"));
}

#[test]
fn a_reader_that_is_gone_costs_lines_only() {
    let (reader, sink) = std::io::pipe().unwrap();
    drop(reader);
    let writer = LogWriter::start_on(sink, 1 << 20, notice).unwrap();
    for _ in 0..10 {
        assert!(writer.write_line(b"line\n"));
        assert!(writer.flush(Duration::from_secs(10)));
    }
    assert_eq!(writer.dropped(), 10);
}

#[test]
fn a_resting_file_that_can_not_be_opened_is_left_alone_for_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let away = directory.path().join("away");
    let path = away.join("log");
    let writer = LogWriter::start_later(path.clone(), notice).unwrap();
    writer.rest(true);
    let begun = Instant::now();
    let put = |line: &[u8]| {
        assert!(writer.write_line(line));
        assert!(writer.flush(Duration::from_secs(10)));
        // What rests is let go of after that.
        std::thread::sleep(Duration::from_millis(20));
    };
    put(b"first\n");
    std::fs::create_dir(&away).unwrap();
    put(b"second\n");
    // Else the machine was too slow to see it.
    if begun.elapsed() < Duration::from_secs(1) {
        assert_eq!((writer.dropped(), path.exists()), (2, false));
        writer.reopen();
    }
    put(b"third\n");
    assert!(
        std::fs::read_to_string(&path).unwrap().ends_with("third\n"),
        "it is tried at once when that is asked for"
    );
}
