//! `/debug/pprof/profile`: where processor time goes, sampled by a timer of the process's own processor time.
//!
//! Stacks are followed by the program's unwind tables, from within the signal's handler. That is sound with glibc
//! 2.35 and libgcc 12 or later, where the unwinder finds the tables without a lock (`_dl_find_object`). Frame
//! pointers would need a special build, and leave out the innermost function, which here is as a rule the one
//! that makes a system call. Samples are kept in memory and, past a few thousand
//! different stacks, in a temporary file (`TMPDIR`), which a process with a read-only root needs to be given.

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message;

use crate::http::{Request, Response, StatusCode};

/// The longest profile.
pub(super) const LONGEST: Duration = Duration::from_secs(300);

const DEFAULT_SECONDS: u64 = 10;

/// Not a divisor of anything that happens at round intervals.
const DEFAULT_HERTZ: i32 = 99;
const MAX_HERTZ: i32 = 1000;

static RUNNING: AtomicBool = AtomicBool::new(false);

/// Makes sure that one profile runs at a time.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        RUNNING.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire).is_ok().then_some(Self)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::Release);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// profile.proto of pprof, gzipped: for `go tool pprof`.
    Protobuf,
    /// A flame graph for a browser.
    Svg,
}

struct Wanted {
    seconds: u64,
    hertz: i32,
    form: Form,
}

fn wanted(request: &Request) -> Result<Wanted, String> {
    fn number<T: std::str::FromStr + PartialOrd>(
        request: &Request,
        key: &str,
        default: T,
        range: std::ops::RangeInclusive<T>,
    ) -> Option<T> {
        match request.query(key) {
            None => Some(default),
            Some(text) => text.parse().ok().filter(|n| range.contains(n)),
        }
    }
    let longest = LONGEST.as_secs();
    let seconds = number(request, "seconds", DEFAULT_SECONDS, 1..=longest)
        .ok_or_else(|| format!("seconds must be a number from 1 to {longest}\n"))?;
    let hertz = number(request, "hertz", DEFAULT_HERTZ, 1..=MAX_HERTZ)
        .ok_or_else(|| format!("hertz must be a number from 1 to {MAX_HERTZ}\n"))?;
    let form = match request.query("format").as_deref() {
        None | Some("proto") => Form::Protobuf,
        Some("svg") => Form::Svg,
        Some(_) => return Err("format must be proto or svg\n".to_owned()),
    };
    Ok(Wanted { seconds, hertz, form })
}

pub(super) async fn answer(request: Request) -> Response {
    let wanted = match wanted(&request) {
        Ok(wanted) => wanted,
        Err(text) => return Response::text(StatusCode::BAD_REQUEST, text),
    };
    let Some(turn) = Turn::take() else {
        return Response::text(StatusCode::CONFLICT, "another profile is running\n");
    };
    match profile(wanted, turn).await {
        Ok(response) => response,
        Err(text) => Response::text(StatusCode::INTERNAL_SERVER_ERROR, text),
    }
}

async fn profile(wanted: Wanted, turn: Turn) -> Result<Response, String> {
    let Wanted { seconds, hertz, form } = wanted;
    // Starting reads the program's symbols, ending looks them up: neither belongs on the runtime's thread.
    let start = move || (turn, pprof::ProfilerGuardBuilder::default().frequency(hertz).build());
    let (turn, guard) = tokio::task::spawn_blocking(start).await.map_err(|e| format!("{e}\n"))?;
    let guard =
        guard.map_err(|e| format!("the profiler can't be started: {e}; it needs a writable TMPDIR\n"))?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let finish = move || {
        let report = guard.report().build().map_err(|e| format!("the samples can't be read: {e}\n"))?;
        drop(guard);
        drop(turn);
        match form {
            Form::Svg => flame_graph(&report),
            Form::Protobuf => protobuf(&report, seconds, hertz)
                .map_err(|e| format!("the profile can't be compressed: {e}\n"))
                .map(|content| Response::new(StatusCode::OK, "application/octet-stream", content)),
        }
    };
    tokio::task::spawn_blocking(finish).await.map_err(|e| format!("{e}\n"))?
}

fn flame_graph(report: &pprof::Report) -> Result<Response, String> {
    let mut svg = Vec::new();
    report.flamegraph(&mut svg).map_err(|e| format!("the flame graph can't be drawn: {e}\n"))?;
    if svg.is_empty() {
        let text = "no samples: the process used no processor time\n";
        return Ok(Response::text(StatusCode::OK, text));
    }
    Ok(Response::new(StatusCode::OK, "image/svg+xml", svg))
}

/// The messages of pprof's profile.proto, as far as they are used.
mod profile_proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub sample: Vec<Sample>,
        #[prost(message, repeated, tag = "4")]
        pub location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub string_table: Vec<String>,
        #[prost(int64, tag = "10")]
        pub duration_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub period: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct ValueType {
        #[prost(int64, tag = "1")]
        pub r#type: i64,
        #[prost(int64, tag = "2")]
        pub unit: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub value: Vec<i64>,
        #[prost(message, repeated, tag = "3")]
        pub label: Vec<Label>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Label {
        #[prost(int64, tag = "1")]
        pub key: i64,
        #[prost(int64, tag = "2")]
        pub str: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Location {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(message, repeated, tag = "4")]
        pub line: Vec<Line>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Line {
        #[prost(uint64, tag = "1")]
        pub function_id: u64,
        #[prost(int64, tag = "2")]
        pub line: i64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct Function {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(int64, tag = "2")]
        pub name: i64,
        #[prost(int64, tag = "4")]
        pub filename: i64,
    }
}

use profile_proto::{Function, Label, Line, Location, Profile, Sample, ValueType};

/// Gives each text its place in the string table, whose first entry is empty.
#[derive(Default)]
struct Strings {
    places: HashMap<String, i64>,
    table: Vec<String>,
}

impl Strings {
    fn place(&mut self, text: &str) -> i64 {
        if self.table.is_empty() {
            self.table.push(String::new());
        }
        if let Some(place) = self.places.get(text) {
            return *place;
        }
        let place = self.table.len() as i64;
        self.table.push(text.to_owned());
        self.places.insert(text.to_owned(), place);
        place
    }
}

fn protobuf(report: &pprof::Report, seconds: u64, hertz: i32) -> io::Result<Vec<u8>> {
    let mut strings = Strings::default();
    let mut profile = Profile::default();
    let nanos_a_sample = 1_000_000_000 / i64::from(hertz.max(1));
    let cpu = ValueType { r#type: strings.place("cpu"), unit: strings.place("nanoseconds") };
    profile.sample_type =
        vec![ValueType { r#type: strings.place("samples"), unit: strings.place("count") }, cpu];
    profile.period_type = Some(cpu);
    profile.period = nanos_a_sample;
    profile.duration_nanos = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000_000);
    let thread = strings.place("thread");
    // A place in a function's source is a location; a function that was inlined is one of its own.
    let mut locations: HashMap<(String, u32), u64> = HashMap::new();
    for (stack, count) in &report.data {
        let mut ids = Vec::new();
        for symbol in stack.frames.iter().flatten() {
            let next = locations.len() as u64 + 1;
            let id = *locations.entry((symbol.name(), symbol.lineno())).or_insert(next);
            if id == next {
                let name = strings.place(&symbol.name());
                let filename = strings.place(&symbol.filename());
                profile.function.push(Function { id, name, filename });
                let line = Line { function_id: id, line: i64::from(symbol.lineno()) };
                profile.location.push(Location { id, line: vec![line] });
            }
            ids.push(id);
        }
        let label = Label { key: thread, str: strings.place(&stack.thread_name_or_id()) };
        let count = *count as i64;
        profile.sample.push(Sample {
            location_id: ids,
            value: vec![count, count * nanos_a_sample],
            label: vec![label],
        });
    }
    profile.string_table = strings.table;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&profile.encode_to_vec())?;
    gzip.finish()
}
