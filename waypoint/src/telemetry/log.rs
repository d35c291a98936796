//! The access log: a line, or an entry for a service, of each request and each connection of bytes that passes the filter; lines
//! are in the program's own form or in a format of Envoy's.
//!
//! Nobody waits for a line or an entry: see [`process::logs::LogWriter`] and [`super::log_service`].
//!
//! Files are open while settings in force name them. Requests that began under other settings still have their lines: the
//! file is opened for as long as that takes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use model::http::{Command, FormatPart};
use model::telemetry::{AccessLog, Expression, LogFormat, LogSink, LogText};
use model::{RequestDecision, Str};
use process::logs::{Format, Line, LogWriter, push_escaped};
use tracing::Level;

use super::ended::{Ended, protocol};
use super::export::Exporters;
use super::log_service::Queue;
use super::named::Named;
use super::trace;
use crate::http::edits::{self, command_value};

const SCOPE: &str = "access";
/// The program's own output, as Istio's settings name it.
pub(super) const OUTPUT: &str = "/dev/stdout";
/// As many log files are written at most.
const FILES: usize = 16;

/// Where lines go.
#[derive(Debug)]
pub(super) struct Sinks {
    output: LogWriter,
    files: Mutex<Files>,
    /// Goes up with each change by which a log may be opened that was refused, or was closed.
    changes: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Files {
    writers: HashMap<Str, LogWriter>,
    /// What settings in force name; `None` where nobody says.
    named: Option<Named>,
    /// Lines that were dropped by writers that there are no more.
    dropped: u64,
    /// Those of writers that were closed, but that a thread may still have.
    closed: Vec<Arc<AtomicU64>>,
}

impl Files {
    fn rests(&self, path: &Str) -> bool {
        self.named.as_ref().is_some_and(|named| !named.files.contains(path))
    }

    /// Lets go of writers of files that nobody names any more. Says whether there were any.
    fn make_room(&mut self) -> bool {
        let before = self.closed.len();
        self.writers.retain(|_, writer| {
            let rests = writer.is_resting();
            if rests {
                self.closed.push(writer.drops());
                writer.close();
            }
            !rests
        });
        self.closed.len() > before
    }

    fn dropped(&mut self) -> u64 {
        self.closed.retain(|drops| {
            let is_last = Arc::strong_count(drops) == 1;
            if is_last {
                self.dropped += drops.load(Relaxed);
            }
            !is_last
        });
        let closed = self.closed.iter().map(|drops| drops.load(Relaxed));
        let open = self.writers.values().map(LogWriter::dropped);
        self.dropped + closed.chain(open).sum::<u64>()
    }
}

/// A log, with its sink opened.
#[derive(Debug)]
pub(super) struct Log {
    to: To,
    filter: Option<Expression>,
}

#[derive(Debug)]
enum To {
    Lines(LogWriter, LogFormat),
    Service(Queue),
}

impl Sinks {
    pub fn new(output: LogWriter) -> Self {
        Self { output, files: Mutex::default(), changes: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }

    /// The log that goes to the program's own output.
    pub fn own(&self, format: Format) -> Log {
        let format = match format {
            Format::Text => LogFormat::Text,
            Format::Json => LogFormat::Json,
        };
        Log { to: To::Lines(self.output.clone(), format), filter: None }
    }

    /// Opens a log. One that can't be opened is left out, and said so.
    pub fn open(&self, log: &AccessLog, exporters: &Exporters) -> Option<Log> {
        let to = match &log.sink {
            LogSink::File { path, format } => To::Lines(self.writer(path)?, format.clone()),
            LogSink::Service(service) => match exporters.log_service(service) {
                Some(queue) => To::Service(queue),
                None => {
                    self.refused.fetch_add(1, Relaxed);
                    return None;
                }
            },
        };
        Some(Log { to, filter: log.filter.clone() })
    }

    fn writer(&self, path: &Str) -> Option<LogWriter> {
        if &**path == OUTPUT {
            return Some(self.output.clone());
        }
        let mut files = self.files();
        if let Some(known) = files.writers.get(path) {
            return Some(known.clone());
        }
        if files.writers.len() >= FILES && files.make_room() {
            self.changes.fetch_add(1, Relaxed);
        }
        if files.writers.len() >= FILES {
            self.refused.fetch_add(1, Relaxed);
            tracing::error!(path = &**path, FILES, "an access log is not written: there are too many files");
            return None;
        }
        let path_of_it = PathBuf::from(&**path);
        let started = LogWriter::start_later(path_of_it, |lines| format!("{lines} lines were dropped\n"));
        let writer = started.inspect_err(|error| {
            self.refused.fetch_add(1, Relaxed);
            tracing::error!(path = &**path, %error, "an access log is not written: it has no thread");
        });
        let writer = writer.ok()?;
        writer.rest(files.rests(path));
        files.writers.insert(path.clone(), writer.clone());
        Some(writer)
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what settings in force name: other files are closed, and what was refused may be opened now.
    pub fn in_force(&self, named: &Named) {
        let mut files = self.files();
        if files.named.as_ref() == Some(named) {
            return;
        }
        files.named = Some(named.clone());
        files.writers.iter().for_each(|(path, writer)| writer.rest(files.rests(path)));
        self.changes.fetch_add(1, Relaxed);
    }

    /// What was opened before this was another number is to be opened again: it may be closed, or was refused then.
    pub fn changes(&self) -> u64 {
        self.changes.load(Relaxed)
    }

    /// Has all files opened again: they were renamed.
    pub fn reopen(&self) {
        self.files().writers.values().for_each(LogWriter::reopen);
    }

    /// How many files have a writer.
    pub fn count(&self) -> usize {
        self.files().writers.len()
    }

    /// Logs that are not written.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Lines of files that were dropped; those of the program's own output are counted there.
    pub fn dropped(&self) -> u64 {
        self.files().dropped()
    }
}

fn with_text(write: impl FnOnce(&mut String)) {
    thread_local! {
        static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
    }
    let mut text = TEXT.take(); // taken, not borrowed: a value's `Display` might log
    write(&mut text);
    TEXT.set(text);
}

impl Log {
    /// Writes the line, or the entry, of what has ended, unless the filter leaves it out.
    pub fn write(&self, ended: &Ended<'_>) {
        if self.filter.as_ref().is_some_and(|filter| !filter.holds(ended)) {
            return;
        }
        let (writer, format) = match &self.to {
            To::Lines(writer, format) => (writer, format),
            To::Service(queue) => return queue.put(ended),
        };
        with_text(|text| {
            text.clear();
            match format {
                LogFormat::Text => own_line(text, Format::Text, ended),
                LogFormat::Json => own_line(text, Format::Json, ended),
                LogFormat::TextOf(format) => {
                    of_format(text, format, ended);
                    if !text.ends_with('\n') {
                        text.push('\n');
                    }
                }
                LogFormat::JsonOf(fields) => json_line(text, fields, ended),
            }
            writer.write_line(text.as_bytes());
        });
    }
}

/// Everything that is known, by name.
fn own_line(text: &mut String, format: Format, ended: &Ended<'_>) {
    let (request, record, connection) = (ended.request, ended.record, ended.connection);
    let message = if ended.is_connection { "connection complete" } else { "request complete" };
    let mut line = Line::start(text, format, SystemTime::now(), Level::INFO, SCOPE, message);
    line.plain("src.addr", &connection.client);
    if let Some(source) = ended.source() {
        line.text("src.workload", source.name());
        line.text("src.namespace", &source.namespace);
    }
    if let Some(identity) = &connection.identity {
        line.display("src.identity", identity);
    }
    line.plain("dst.addr", &connection.destination);
    let about = ended.about();
    if let Some(service) = ended.service() {
        line.text("dst.service", &service.hostname);
    }
    if let Some(target) = &record.target {
        line.plain("upstream", &target.address);
    }
    if let Some(workload) = about.and_then(|about| about.workload.as_ref()) {
        line.text("dst.workload", workload.name());
        line.text("dst.namespace", &workload.namespace);
    }
    if !request.is_empty() {
        line.text("method", request.method());
        line.text("authority", request.authority());
        line.text("path", request.target());
        line.text("protocol", protocol(request.version));
    }
    if let Some(name) = &connection.server_name {
        line.text("sni", name);
    }
    if !ended.is_connection {
        line.bare("status", &record.status);
    }
    if let Some(status) = record.grpc_status {
        line.bare("grpc_status", &status);
    }
    line.text("flags", &ended.flags());
    line.text("details", ended.details());
    if let Some(why) = &record.unconnected {
        line.text("upstream_error", why);
    }
    if let Some(route) = ended.route() {
        line.text("route", &route);
    }
    if let Some(verdict) = &ended.decided.verdict {
        of_verdict(&mut line, verdict);
    }
    line.bare("bytes_recv", &record.received);
    line.bare("bytes_sent", &record.sent);
    line.text("duration", &format!("{}ms", ended.duration.as_millis()));
    if record.tries > 1 {
        line.bare("attempts", &record.tries);
    }
    for (key, name) in [("request_id", "x-request-id"), ("user_agent", "user-agent")] {
        if let Ok(value) = model::telemetry::Facts::header(ended, model::telemetry::Headers::Request, name) {
            line.text(key, &value);
        }
    }
    if let Some(trace) = &ended.decided.trace {
        line.display("trace", &trace::Id(trace.trace));
    }
    line.finish();
}

/// What policies said that made, or would have made, a difference.
fn of_verdict(line: &mut Line<'_>, verdict: &RequestDecision) {
    match &verdict.outcome {
        Ok(model::Allow::NoAllowPolicies) => {}
        Ok(allow) => line.display("policy", allow),
        Err(deny) => line.display("policy", deny),
    }
    if let Some(dry_run) = verdict.dry_run.first() {
        let would = match &dry_run.would {
            Ok(allow) => format!("{}: would be {allow}", dry_run.policy),
            Err(deny) => format!("{}: would be {deny}", dry_run.policy),
        };
        line.text("dry_run", &would);
    }
}

fn facts<'a>(ended: &Ended<'a>) -> edits::Facts<'a> {
    edits::Facts {
        request: ended.request,
        connection: ended.connection,
        decided: ended.decided,
        record: Some(ended.record),
    }
}

fn value(command: &Command, ended: &Ended<'_>) -> String {
    let mut value = Vec::new();
    command_value(command, &facts(ended), Some(ended.response), &mut value);
    match (command, value.is_empty()) {
        (Command::StatusDetails, true) => ended.details().to_owned(),
        (Command::Flags, _) => ended.flags().into_owned(),
        (Command::Protocol, _) if ended.is_connection => "-".to_owned(),
        (Command::Route, true) => ended.route().unwrap_or_else(|| "-".to_owned()),
        (Command::Backend, true) => ended.cluster().unwrap_or_else(|| "-".to_owned()),
        (_, true) => "-".to_owned(),
        (_, false) => String::from_utf8_lossy(&value).into_owned(),
    }
}

/// What a format comes to. A quote in a value is escaped, so that none ends the text that it stands in.
pub(super) fn of_format(out: &mut String, format: &LogText, ended: &Ended<'_>) {
    for part in format.format().parts() {
        match part {
            FormatPart::Text(text) => out.push_str(text),
            FormatPart::Command(command) => push_escaped(out, &value(command, ended)),
        }
    }
}

fn json_line(out: &mut String, fields: &[(Str, LogText)], ended: &Ended<'_>) {
    out.push('{');
    for (place, (name, format)) in fields.iter().enumerate() {
        out.push_str(if place == 0 { "\"" } else { ",\"" });
        push_escaped(out, name);
        out.push_str("\":");
        match format.format().parts() {
            // As Envoy has it: what is a number stays one.
            [FormatPart::Command(command)] if is_number(command) => match value(command, ended) {
                none if none == "-" => out.push_str("null"),
                number => out.push_str(&number),
            },
            [FormatPart::Command(command)] if value(command, ended) == "-" => out.push_str("null"),
            _ => {
                out.push('"');
                of_format(out, format, ended);
                out.push('"');
            }
        }
    }
    out.push_str("}\n");
}

fn is_number(command: &Command) -> bool {
    matches!(
        command,
        Command::Status
            | Command::Duration
            | Command::BytesReceived
            | Command::BytesSent
            | Command::GrpcStatus
            | Command::Attempts
            | Command::ClientPort
            | Command::DestinationPort
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn lines_for_writers_that_were_closed_are_counted_as_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let sinks = Sinks::new(LogWriter::start_on(std::io::sink(), 1 << 10, |_| String::new()).unwrap());
        let open = |n: usize| {
            let path = directory.path().join(n.to_string());
            sinks.writer(&path.to_str().unwrap().into()).unwrap()
        };
        sinks.in_force(&Named::default());
        let held = open(0);
        assert!(held.write_line(b"first\n"));
        for n in 1..=FILES {
            open(n);
        }
        assert_eq!((sinks.count(), sinks.changes(), sinks.dropped()), (1, 2, 0));
        assert!(!held.write_line(b"second\n"));
        assert_eq!(sinks.dropped(), 1);
        drop(held);
        assert_eq!((sinks.dropped(), sinks.dropped()), (1, 1));
    }
}
