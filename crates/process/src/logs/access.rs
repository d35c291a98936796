//! The access log: one line for each connection, with the fields and in the order of Istio's (facts 4.13), then
//! the policy that decided, the reason, and the connection's id.
//!
//! Levels, of the scope `access`: INFO for a connection that went well, ERROR for one that did not, DEBUG for its
//! opening, WARN for one that was refused before anything was known of it.

use std::cell::RefCell;
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::Level;

use super::line::{Format, Line};
use super::writer::LogWriter;

const SCOPE: &str = "access";

/// Which side of a connection this proxy is on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// The client's.
    Outbound,
    /// The server's.
    Inbound,
}

impl Direction {
    /// The field's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// How much is logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessLogLimits {
    /// Of connections that went well one in this many is logged; 0 and 1 mean all.
    pub one_in: u64,
    /// How many lines a second are logged of each level, so that failures are seen among successes; 0 means no
    /// limit.
    pub lines_per_second: u64,
}

impl Default for AccessLogLimits {
    fn default() -> Self {
        Self { one_in: 1, lines_per_second: 0 }
    }
}

/// A connection. Empty texts are left out, as are fields that are `None`.
#[derive(Clone, Copy)]
pub struct AccessRecord<'a> {
    /// The client's address.
    pub src_addr: SocketAddr,
    /// The client's pod.
    pub src_workload: &'a str,
    /// The client's namespace.
    pub src_namespace: &'a str,
    /// The client's identity; only when it was proved.
    pub src_identity: Option<&'a dyn Display>,
    /// The client's cluster.
    pub src_cluster: &'a str,
    /// Where the connection went: with a tunnel, the tunnel's end.
    pub dst_addr: SocketAddr,
    /// The address inside the tunnel.
    pub dst_hbone_addr: Option<SocketAddr>,
    /// The service's host name.
    pub dst_service: &'a str,
    /// The server's pod.
    pub dst_workload: &'a str,
    /// The server's namespace.
    pub dst_namespace: &'a str,
    /// The server's identity; only when it was proved.
    pub dst_identity: Option<&'a dyn Display>,
    /// The server's cluster.
    pub dst_cluster: &'a str,
    /// Which side this proxy is on.
    pub direction: Direction,
    /// How much the client sent. In the log it is `bytes_sent` of an outbound and `bytes_recv` of an inbound
    /// connection: the numbers are those of the workload on this proxy's side.
    pub bytes_from_client: u64,
    /// How much the server sent.
    pub bytes_from_server: u64,
    /// How long it lasted.
    pub duration: Duration,
    /// Why it failed.
    pub error: Option<&'a dyn Display>,
    /// The policy and rule that decided.
    pub policy: Option<&'a dyn Display>,
    /// The reason of the decision, or of the end of the connection.
    pub reason: Option<&'a dyn Display>,
    /// The connection's id, with which it can be asked about later.
    pub id: Option<&'a dyn Display>,
}

/// A connection that was refused before more than its addresses was known.
#[derive(Clone, Copy)]
pub struct Refusal<'a> {
    /// The client's address.
    pub src_addr: SocketAddr,
    /// The address that it connected to.
    pub dst_addr: SocketAddr,
    /// Which side this proxy is on.
    pub direction: Direction,
    /// Why.
    pub error: &'a dyn Display,
}

/// How many lines of one level were logged in a second.
#[derive(Debug)]
struct Rate {
    second: Instant,
    lines: u64,
}

/// Writes the access log.
#[derive(Debug)]
pub struct AccessLog {
    writer: LogWriter,
    format: Format,
    limits: AccessLogLimits,
    successes: AtomicU64,
    suppressed: AtomicU64,
    rates: [Mutex<Rate>; 2],
}

impl AccessLog {
    pub(super) fn new(writer: LogWriter, format: Format, limits: AccessLogLimits) -> Self {
        let rate = || Mutex::new(Rate { second: Instant::now(), lines: 0 });
        Self {
            writer,
            format,
            limits,
            successes: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            rates: [rate(), rate()],
        }
    }

    /// A connection ended.
    pub fn complete(&self, record: &AccessRecord<'_>) {
        let failed = record.error.is_some();
        let (level, enabled) = if failed {
            (Level::ERROR, tracing::enabled!(target: SCOPE, Level::ERROR))
        } else {
            (Level::INFO, tracing::enabled!(target: SCOPE, Level::INFO))
        };
        if enabled && self.admit(failed) {
            self.write(level, "connection complete", |line| write_record(line, record, true));
        }
    }

    /// A connection was opened. The record's byte counts, duration and error are not logged.
    pub fn opened(&self, record: &AccessRecord<'_>) {
        if tracing::enabled!(target: SCOPE, Level::DEBUG) && self.admit(false) {
            self.write(Level::DEBUG, "connection opened", |line| write_record(line, record, false));
        }
    }

    /// A connection was refused early.
    pub fn refused(&self, refusal: &Refusal<'_>) {
        if tracing::enabled!(target: SCOPE, Level::WARN) && self.admit(true) {
            self.write(Level::WARN, "connection failed", |line| {
                line.plain("src.addr", &refusal.src_addr);
                line.plain("dst.addr", &refusal.dst_addr);
                line.text("direction", refusal.direction.as_str());
                line.display("error", refusal.error);
            });
        }
    }

    /// How many lines sampling or the limit left out.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.suppressed.load(Relaxed)
    }

    /// Whether one more line may be written.
    fn admit(&self, failed: bool) -> bool {
        let sampled = failed
            || self.limits.one_in <= 1
            || self.successes.fetch_add(1, Relaxed).is_multiple_of(self.limits.one_in);
        let admitted = sampled && self.within_rate(failed);
        if !admitted {
            self.suppressed.fetch_add(1, Relaxed);
        }
        admitted
    }

    fn within_rate(&self, failed: bool) -> bool {
        let [successes, failures] = &self.rates;
        if self.limits.lines_per_second == 0 {
            return true;
        }
        let rate = if failed { failures } else { successes };
        let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
        if rate.second.elapsed() >= Duration::from_secs(1) {
            *rate = Rate { second: Instant::now(), lines: 0 };
        }
        rate.lines += 1;
        rate.lines <= self.limits.lines_per_second
    }

    fn write(&self, level: Level, message: &str, fields: impl FnOnce(&mut Line<'_>)) {
        thread_local! {
            static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
        }
        let mut text = TEXT.take(); // taken, not borrowed: a value's `Display` might log
        let mut line = Line::start(&mut text, self.format, SystemTime::now(), level, SCOPE, message);
        fields(&mut line);
        line.finish();
        self.writer.write_line(text.as_bytes());
        TEXT.set(text);
    }
}

fn write_record(line: &mut Line<'_>, r: &AccessRecord<'_>, complete: bool) {
    line.plain("src.addr", &r.src_addr);
    text(line, "src.workload", r.src_workload);
    text(line, "src.namespace", r.src_namespace);
    display(line, "src.identity", r.src_identity);
    text(line, "src.cluster", r.src_cluster);
    line.plain("dst.addr", &r.dst_addr);
    if let Some(address) = r.dst_hbone_addr {
        line.plain("dst.hbone_addr", &address);
    }
    text(line, "dst.service", r.dst_service);
    text(line, "dst.workload", r.dst_workload);
    text(line, "dst.namespace", r.dst_namespace);
    display(line, "dst.identity", r.dst_identity);
    text(line, "dst.cluster", r.dst_cluster);
    line.text("direction", r.direction.as_str());
    if complete {
        let (sent, received) = match r.direction {
            Direction::Outbound => (r.bytes_from_client, r.bytes_from_server),
            Direction::Inbound => (r.bytes_from_server, r.bytes_from_client),
        };
        line.bare("bytes_sent", &sent);
        line.bare("bytes_recv", &received);
        line.display("duration", &format_args!("{}ms", r.duration.as_millis()));
        display(line, "error", r.error);
    }
    display(line, "policy", r.policy);
    display(line, "reason", r.reason);
    display(line, "id", r.id);
}

fn text(line: &mut Line<'_>, key: &str, value: &str) {
    if !value.is_empty() {
        line.text(key, value);
    }
}

fn display(line: &mut Line<'_>, key: &str, value: Option<&dyn Display>) {
    if let Some(value) = value {
        line.display(key, value);
    }
}
