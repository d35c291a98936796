//! Logs: `tracing` events and the access log, as text or JSON, to one bounded writer.
//!
//! * Logging never blocks: see [`LogWriter`].
//! * No value can forge a line: see [`Line`].
//! * The level can be changed while the process runs: see [`Logs::set_level`].

mod access;
mod layer;
mod line;
mod writer;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry as Spans, reload};

pub use access::{AccessLog, AccessLogLimits, AccessRecord, Direction, Refusal};
pub use line::{Format, Line, push_escaped, push_time};
pub use writer::{BUFFER_LIMIT_BYTES, LogWriter, Target};

use crate::metrics::{Description, Kind, Registry};

/// How long a process that ends waits for its last lines to be written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// No more text is taken as a filter.
const FILTER_LIMIT: usize = 4096;

/// What is logged, in which form, and where.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// Which events: `info`, or `warn,access=off,ztunnel::dns=debug` (the language of `RUST_LOG`).
    pub filter: String,
    /// In which form.
    pub format: Format,
    /// Where.
    pub target: Target,
    /// How much of the access log.
    pub access: AccessLogLimits,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: Format::Text,
            target: Target::Stdout,
            access: AccessLogLimits::default(),
        }
    }
}

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter can't be understood.
    #[error(
        "log filter {filter:?}: {reason}; write a level (off, error, warn, info, debug, trace) or scope=level, separated by commas"
    )]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The target can't be written.
    #[error("log target {target:?}: {source}")]
    Target {
        /// The target.
        target: Target,
        /// What failed.
        source: io::Error,
    },
    /// Another subscriber is in place.
    #[error("logging is already set up in this process")]
    AlreadySetUp,
}

/// The process's logs. Cloning shares them.
#[derive(Clone)]
pub struct Logs {
    writer: LogWriter,
    format: Format,
    filter: Arc<Mutex<String>>,
    reload: reload::Handle<EnvFilter, Spans>,
    access: Arc<AccessLog>,
}

impl std::fmt::Debug for Logs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logs")
            .field("format", &self.format)
            .field("level", &self.level())
            .finish_non_exhaustive()
    }
}

impl Logs {
    /// Sets up logging for the whole process, panics included.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn init(settings: &LogSettings) -> Result<Self, LogError> {
        let notice = match settings.format {
            Format::Text => |n| dropped_notice(Format::Text, n),
            Format::Json => |n| dropped_notice(Format::Json, n),
        };
        let writer = LogWriter::start(&settings.target, notice)
            .map_err(|source| LogError::Target { target: settings.target.clone(), source })?;
        let (logs, subscriber) = Self::on_writer(settings, writer)?;
        subscriber.try_init().map_err(|_| LogError::AlreadySetUp)?;
        log_panics();
        Ok(logs)
    }

    /// The parts of [`Logs::init`] without the process-wide effects: the subscriber is returned.
    ///
    /// # Errors
    /// The filter can't be understood.
    pub fn on_writer(
        settings: &LogSettings,
        writer: LogWriter,
    ) -> Result<(Self, impl tracing::Subscriber + Send + Sync + use<>), LogError> {
        let (filter, reload) = reload::Layer::new(parse_filter(&settings.filter)?);
        let layer = layer::LineLayer::new(writer.clone(), settings.format);
        let subscriber = Spans::default().with(filter).with(layer);
        let access = Arc::new(AccessLog::new(writer.clone(), settings.format, settings.access));
        let filter = Arc::new(Mutex::new(settings.filter.clone()));
        Ok((Self { writer, format: settings.format, filter, reload, access }, subscriber))
    }

    /// The access log.
    #[must_use]
    pub fn access(&self) -> &Arc<AccessLog> {
        &self.access
    }

    /// What all lines go through, for those who make lines of their own.
    #[must_use]
    pub fn writer(&self) -> &LogWriter {
        &self.writer
    }

    /// The filter in force.
    #[must_use]
    pub fn level(&self) -> String {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the filter in force: a bare level changes the level of all scopes that are not named, `scope=level`
    /// or `scope:level` that of one scope; what `change` does not name stays. Returns the new filter.
    ///
    /// # Errors
    /// The change can't be understood; nothing changes.
    pub fn set_level(&self, change: &str) -> Result<String, LogError> {
        let mut current = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        let merged = merge_filters(&current, change);
        parse_filter(change.trim())?;
        let filter = parse_filter(&merged)?;
        let failed = |e: reload::Error| LogError::Filter { filter: merged.clone(), reason: e.to_string() };
        self.reload.reload(filter).map_err(failed)?;
        current.clone_from(&merged);
        drop(current);
        tracing::info!(filter = merged, "log level changed");
        Ok(merged)
    }

    /// Opens the log file again at SIGHUP, which is what log rotation sends after it has renamed the file; with
    /// standard output as the target SIGHUP does nothing. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// The signal's handler can't be installed.
    pub fn on_hangup(&self) -> io::Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        let logs = self.clone();
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                logs.writer.reopen();
                // The line has the target opened, also where nothing else happens.
                tracing::info!(signal = "SIGHUP", "log file opened again");
            }
        });
        Ok(())
    }

    /// Registers the metrics of logging.
    pub fn register(&self, registry: &Registry) {
        let counter = |name, help, read: fn(&Self) -> u64| {
            let logs = self.clone();
            registry.collect(Description { name, help, kind: Kind::Counter }, move |out| {
                out.integer(&|_| {}, read(&logs));
            });
        };
        counter("culvert_log_lines_dropped", "Log lines that could not be written", |l| l.writer.dropped());
        counter("culvert_log_write_failures", "Writes of the log that failed", |l| l.writer.failures());
        counter(
            "culvert_access_log_suppressed",
            "Access log lines that sampling or the limit left out",
            |l| l.access.suppressed(),
        );
    }

    /// Waits, but not long, until everything is written. Blocks: for the end of the process.
    pub fn flush(&self) {
        let _ = self.writer.flush(FLUSH_LIMIT); // a blocked reader must not keep the process
    }
}

fn dropped_notice(format: Format, lines: u64) -> String {
    let mut text = String::new();
    let mut line =
        Line::start(&mut text, format, SystemTime::now(), Level::WARN, "log", "log lines were dropped");
    line.bare("lines", &lines);
    line.finish();
    text
}

/// A panic ends its task, not the process; it must be seen where the other lines are.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let what = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("(not a text)");
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        let backtrace = std::backtrace::Backtrace::capture(); // empty unless RUST_BACKTRACE asks for it
        tracing::error!(place, thread, what, %backtrace, "a task panicked, which is a bug in this program");
    }));
}

/// Checks a filter.
///
/// # Errors
/// It can't be understood.
pub(crate) fn check_filter(filter: &str) -> Result<(), LogError> {
    parse_filter(filter).map(drop)
}

fn parse_filter(filter: &str) -> Result<EnvFilter, LogError> {
    let failed = |reason: String| LogError::Filter { filter: filter.chars().take(100).collect(), reason };
    if filter.trim().is_empty() {
        return Err(failed("it is empty".into()));
    }
    if filter.len() > FILTER_LIMIT {
        return Err(failed(format!("it is longer than {FILTER_LIMIT} bytes")));
    }
    if filter.chars().any(char::is_control) {
        return Err(failed("it holds a control character".into()));
    }
    let directives: Vec<String> = split(filter).map(|d| d.text()).collect();
    if let Some(bad) = split(filter).find(|d| d.scope.is_none() && !is_level(d.level)) {
        return Err(failed(format!("{:?} is no level", bad.level)));
    }
    EnvFilter::builder().parse(directives.join(",")).map_err(|e| failed(e.to_string()))
}

/// One part of a filter.
#[derive(Clone, Copy)]
struct Directive<'a> {
    /// `None` for all scopes that no other directive names.
    scope: Option<&'a str>,
    level: &'a str,
}

impl Directive<'_> {
    fn text(&self) -> String {
        self.scope.map_or_else(|| self.level.to_owned(), |scope| format!("{scope}={}", self.level))
    }
}

fn is_level(text: &str) -> bool {
    ["off", "error", "warn", "info", "debug", "trace"].iter().any(|l| l.eq_ignore_ascii_case(text))
}

fn split(filter: &str) -> impl Iterator<Item = Directive<'_>> {
    filter.split(',').map(str::trim).filter(|d| !d.is_empty()).map(|d| {
        let (scope, level) = match d.rsplit_once('=').or_else(|| d.rsplit_once(':')) {
            Some((scope, level)) if is_level(level) => (Some(scope), level),
            _ if is_level(d) => (None, d),
            _ => (None, d),
        };
        Directive { scope, level }
    })
}

fn merge_filters(current: &str, change: &str) -> String {
    let changed = |scope| split(change).any(|d| d.scope == scope);
    let kept = split(current).filter(|d| !changed(d.scope));
    kept.chain(split(change)).map(|d| d.text()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_level_keeps_what_it_does_not_name() {
        for (current, change, merged) in [
            ("info", "debug", "debug"),
            ("info,access=off", "warn", "access=off,warn"),
            ("info,access=off", "access:info", "info,access=info"),
            ("info", "ztunnel::dns:trace", "info,ztunnel::dns=trace"),
            ("info", "ztunnel::dns=trace, debug", "ztunnel::dns=trace,debug"),
        ] {
            assert_eq!(merge_filters(current, change), merged);
            assert!(parse_filter(merged).is_ok(), "{merged}");
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for filter in ["", " ", "loud", "info,loud", "access=loud", "a\nb=info", &"a".repeat(5000)] {
            assert!(parse_filter(filter).is_err(), "{filter:?}");
        }
    }
}
