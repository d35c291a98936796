//! The text formats: Prometheus 0.0.4 and OpenMetrics 1.0.0.

use std::fmt::{Display, Write};
use std::sync::Arc;

use super::{Description, Kind, Source};

/// A text format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Prometheus text format 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The format that a client asks for with its `Accept` header: OpenMetrics where it is named and ranks at
    /// least as high as plain text (RFC 9110, section 12.5.1), else Prometheus.
    #[must_use]
    pub fn negotiate(accept: Option<&str>) -> Self {
        let (mut open, mut plain) = (0u16, 0u16);
        for range in accept.unwrap_or_default().split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let quality = parts.find_map(|p| p.strip_prefix("q=")).and_then(|q| q.parse::<f32>().ok());
            let quality = (quality.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0) as u16;
            match media {
                "application/openmetrics-text" => open = open.max(quality),
                "text/plain" | "text/*" | "*/*" => plain = plain.max(quality),
                _ => {}
            }
        }
        if open > 0 && open >= plain { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// The value of `Content-Type`.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The series that a family has and has had, written behind all families.
struct SeriesNote {
    family: &'static str,
    series: usize,
    overflowed: u64,
    evicted: u64,
}

/// A text under construction.
pub(crate) struct Exposition<'a> {
    text: &'a mut String,
    format: Format,
    notes: Vec<SeriesNote>,
}

pub(super) fn encode(sources: &[Arc<dyn Source>], format: Format) -> String {
    let mut text = String::with_capacity(16 * 1024);
    let mut out = Exposition { text: &mut text, format, notes: Vec::new() };
    for source in sources {
        source.write(&mut out);
    }
    out.write_notes();
    if format == Format::OpenMetrics {
        text.push_str("# EOF\n");
    }
    text
}

impl Exposition<'_> {
    /// Starts a metric: writes its description, and returns what writes its samples.
    pub(super) fn metric(&mut self, description: &Description) -> SampleWriter<'_, '_> {
        let suffix = if description.kind == Kind::Counter { "_total" } else { "" };
        // In OpenMetrics the suffix belongs to the sample, in Prometheus to the metric.
        let named = if self.format == Format::Prometheus { suffix } else { "" };
        let kind = match description.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let Description { name, help, .. } = description;
        self.text.push_str("# HELP ");
        self.text.push_str(name);
        self.text.push_str(named);
        self.text.push(' ');
        escape(self.text, help, self.format == Format::OpenMetrics);
        append(self.text, format_args!("\n# TYPE {name}{named} {kind}\n"));
        SampleWriter { text: self.text, name: description.name, suffix }
    }

    pub(super) fn note_series(&mut self, family: &'static str, series: usize, overflowed: u64, evicted: u64) {
        self.notes.push(SeriesNote { family, series, overflowed, evicted });
    }

    /// The registry's own metrics: how far each family is from its limit.
    fn write_notes(&mut self) {
        const SERIES: Description = Description {
            name: "culvert_metrics_series",
            help: "Series of a metric family, the overflow series aside",
            kind: Kind::Gauge,
        };
        const OVERFLOWED: Description = Description {
            name: "culvert_metrics_overflows",
            help: "Label sets that were counted in a family's overflow series because its limit was reached",
            kind: Kind::Counter,
        };
        const EVICTED: Description = Description {
            name: "culvert_metrics_evictions",
            help: "Series that were forgotten because nothing used them and the limit was reached",
            kind: Kind::Counter,
        };
        let notes = std::mem::take(&mut self.notes);
        let write = |out: &mut SampleWriter<'_, '_>, value: &dyn Fn(&SeriesNote) -> u64| {
            for note in &notes {
                out.integer(&|pairs| pairs.pair("family", note.family), value(note));
            }
        };
        write(&mut self.metric(&SERIES), &|n| n.series as u64);
        write(&mut self.metric(&OVERFLOWED), &|n| n.overflowed);
        write(&mut self.metric(&EVICTED), &|n| n.evicted);
    }
}

/// Writes the samples of one metric.
pub struct SampleWriter<'a, 'b> {
    text: &'a mut String,
    name: &'b str,
    suffix: &'static str,
}

type WriteLabels<'a> = &'a dyn Fn(&mut LabelWriter<'_>);

impl SampleWriter<'_, '_> {
    /// Writes a whole number.
    pub fn integer(&mut self, labels: WriteLabels<'_>, value: impl Display) {
        self.sample(self.suffix, labels, None, format_args!("{value}"));
    }

    /// Writes a number with a fraction.
    pub fn float(&mut self, labels: WriteLabels<'_>, value: f64) {
        self.sample(self.suffix, labels, None, format_args!("{}", Float(value)));
    }

    pub(super) fn bucket(&mut self, labels: WriteLabels<'_>, bound: f64, cumulative: u64) {
        self.sample("_bucket", labels, Some(bound), format_args!("{cumulative}"));
    }

    pub(super) fn sum_and_count(&mut self, labels: WriteLabels<'_>, sum: f64, count: u64) {
        self.sample("_sum", labels, None, format_args!("{}", Float(sum)));
        self.sample("_count", labels, None, format_args!("{count}"));
    }

    fn sample(
        &mut self,
        suffix: &str,
        labels: WriteLabels<'_>,
        bound: Option<f64>,
        value: std::fmt::Arguments<'_>,
    ) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        let mut pairs = LabelWriter { text: self.text, any: false, overflow: false };
        labels(&mut pairs);
        if let Some(bound) = bound {
            pairs.pair("le", &Float(bound).to_string());
        }
        if pairs.any {
            self.text.push('}');
        }
        append(self.text, format_args!(" {value}\n"));
    }
}

/// A number as both formats want it.
struct Float(f64);

impl Display for Float {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == f64::INFINITY {
            f.write_str("+Inf")
        } else if self.0 == f64::NEG_INFINITY {
            f.write_str("-Inf")
        } else {
            write!(f, "{:?}", self.0) // `{:?}` keeps the point: 1.0, not 1
        }
    }
}

/// Writes the labels of one sample.
pub struct LabelWriter<'a> {
    text: &'a mut String,
    any: bool,
    overflow: bool,
}

impl LabelWriter<'_> {
    /// Writes one pair. `name` must be a valid label name; `value` may be any text.
    pub fn pair(&mut self, name: &str, value: &str) {
        self.text.push(if self.any { ',' } else { '{' });
        self.any = true;
        self.text.push_str(name);
        self.text.push_str("=\"");
        escape(self.text, if self.overflow { "overflow" } else { value }, true);
        self.text.push('"');
    }

    /// Writes the pairs that `write` writes, with `overflow` in place of every value.
    pub(super) fn overflowing(&mut self, write: impl Fn(&mut LabelWriter<'_>)) {
        self.overflow = true;
        write(self);
        self.overflow = false;
    }
}

fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = text.write_fmt(arguments); // writing to a String does not fail
}

fn escape(text: &mut String, value: &str, quotes: bool) {
    if !value.bytes().any(|b| matches!(b, b'\\' | b'\n' | b'"')) {
        text.push_str(value);
        return;
    }
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '"' if quotes => text.push_str("\\\""),
            c => text.push(c),
        }
    }
}
