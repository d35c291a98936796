//! Writes `tracing` events as lines. The spans that an event is in are named with the scope, and their fields come
//! before the event's own.

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, Scope};

use super::line::{Format, Line};
use super::writer::LogWriter;

/// Fields of a span that `log` records carry through `tracing-log`.
const LOG_PREFIX: &str = "log.";

pub(super) struct LineLayer {
    writer: LogWriter,
    format: Format,
}

impl LineLayer {
    pub(super) fn new(writer: LogWriter, format: Format) -> Self {
        Self { writer, format }
    }
}

/// A value of a field, kept as its type asks to be written.
enum Value {
    Text(String),
    /// A number or truth value.
    Bare(String),
}

/// The fields of an event or span.
#[derive(Default)]
struct Fields {
    message: String,
    /// The scope of a record that came from the `log` crate.
    scope: Option<String>,
    list: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        let name = field.name();
        match value {
            Value::Text(text) | Value::Bare(text) if name == "message" => self.message = text,
            Value::Text(text) if name == "log.target" => self.scope = Some(text),
            _ if name.starts_with(LOG_PREFIX) => {}
            value => {
                self.list.retain(|(known, _)| *known != name); // a field of a span that is recorded again
                self.list.push((name, value));
            }
        }
    }

    fn write(&self, line: &mut Line<'_>) {
        for (name, value) in &self.list {
            let name = name.strip_prefix("r#").unwrap_or(name);
            match value {
                Value::Text(text) => line.text(name, text),
                Value::Bare(text) => line.bare(name, text),
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}"); // writing to a String does not fail
        self.put(field, Value::Text(text));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::Text(value.to_owned()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        // With what caused it: the outermost text alone seldom says what to do.
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(inner) = cause {
            let inner_text = inner.to_string();
            if !text.ends_with(&inner_text) {
                text.push_str(": ");
                text.push_str(&inner_text);
            }
            cause = inner.source();
        }
        self.put(field, Value::Text(text));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LineLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        thread_local! {
            static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut scope = fields.scope.take().unwrap_or_else(|| event.metadata().target().to_owned());
        for span in context.event_scope(event).into_iter().flat_map(Scope::from_root) {
            scope.push(':');
            scope.push_str(span.name());
        }
        let level = *event.metadata().level();
        let write = |text: &mut String| {
            let now = SystemTime::now();
            let mut line = Line::start(text, self.format, now, level, &scope, &fields.message);
            for span in context.event_scope(event).into_iter().flat_map(Scope::from_root) {
                if let Some(of_span) = span.extensions().get::<Fields>() {
                    of_span.write(&mut line);
                }
            }
            fields.write(&mut line);
            line.finish();
            self.writer.write_line(text.as_bytes());
        };
        // A value's `Debug` may itself log, while the thread's buffer is taken.
        TEXT.with(|text| match text.try_borrow_mut() {
            Ok(mut text) => write(&mut text),
            Err(_) => write(&mut String::new()),
        });
    }
}
