//! One line of a log, as text or JSON.
//!
//! Text: `time TAB level TAB scope TAB message TAB key=value …`, the form of Istio's logs. Whatever a peer can
//! have chosen is written quoted and escaped, so that no value can end a line, begin a field, or make a terminal
//! do something.

use std::fmt::{Display, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::Level;

/// What lines look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A line that is longer than this is cut.
const LINE_LIMIT: usize = 16 << 10;

/// A line under construction.
#[derive(Debug)]
pub struct Line<'a> {
    text: &'a mut String,
    format: Format,
    any_field: bool,
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

impl<'a> Line<'a> {
    /// Starts a line in `text`, which is emptied first.
    pub fn start(
        text: &'a mut String,
        format: Format,
        time: SystemTime,
        level: Level,
        scope: &str,
        message: &str,
    ) -> Self {
        text.clear();
        let mut line = Self { text, format, any_field: false };
        match format {
            Format::Text => {
                push_time(line.text, time);
                line.text.push('\t');
                line.text.push_str(level_name(level));
                line.text.push('\t');
                line.escaped(scope);
                line.text.push('\t');
                line.escaped(message);
            }
            Format::Json => {
                line.text.push_str("{\"level\":\"");
                line.text.push_str(level_name(level));
                line.text.push_str("\",\"time\":\"");
                push_time(line.text, time);
                line.text.push_str("\",\"scope\":\"");
                line.escaped(scope);
                line.text.push_str("\",\"message\":\"");
                line.escaped(message);
                line.text.push('"');
            }
        }
        line
    }

    /// A text, quoted.
    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        self.text.push('"');
        self.escaped(value);
        self.text.push('"');
    }

    /// Something that is written out as text and may hold anything.
    pub fn display(&mut self, key: &str, value: &dyn Display) {
        self.key(key);
        self.text.push('"');
        self.escaped_display(value);
        self.text.push('"');
    }

    /// A value whose text form never holds a character that needs quotes, such as an address: bare in text,
    /// quoted in JSON.
    pub fn plain(&mut self, key: &str, value: &dyn Display) {
        self.key(key);
        let quote = if self.format == Format::Json { "\"" } else { "" };
        let _ = write!(self.text, "{quote}{value}{quote}"); // writing to a String does not fail
    }

    /// A number or truth value.
    pub fn bare(&mut self, key: &str, value: &dyn Display) {
        self.key(key);
        let _ = write!(self.text, "{value}"); // writing to a String does not fail
    }

    /// Ends the line.
    pub fn finish(self) {
        if self.text.len() > LINE_LIMIT {
            // A cut JSON line is no JSON any more, but what is in it can still be read.
            self.text.truncate(self.text.floor_char_boundary(LINE_LIMIT));
            self.text.push_str("…[cut]");
        } else if self.format == Format::Json {
            self.text.push('}');
        }
        self.text.push('\n');
    }

    fn key(&mut self, key: &str) {
        match self.format {
            Format::Text => {
                self.text.push(if self.any_field { ' ' } else { '\t' });
                self.text.push_str(key);
                self.text.push('=');
            }
            Format::Json => {
                self.text.push_str(",\"");
                self.escaped(key);
                self.text.push_str("\":");
            }
        }
        self.any_field = true;
    }

    fn escaped(&mut self, value: &str) {
        push_escaped(self.text, value);
    }

    fn escaped_display(&mut self, value: &dyn Display) {
        struct Escaper<'a>(&'a mut String);
        impl Write for Escaper<'_> {
            fn write_str(&mut self, s: &str) -> std::fmt::Result {
                if self.0.len() > LINE_LIMIT {
                    return Err(std::fmt::Error); // it will be cut: spare the rest
                }
                push_escaped(self.0, s);
                Ok(())
            }
        }
        let _ = write!(Escaper(self.text), "{value}");
    }
}

/// Whether a character could be taken for the line's own structure, or changes how a terminal shows what follows:
/// control characters, line and paragraph separators, and marks that turn the direction of writing.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '"' | '\\' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Appends `value` escaped as JSON does (RFC 8259, section 7), which reads well in text lines too; the first 16 KiB of
/// it.
pub fn push_escaped(text: &mut String, value: &str) {
    let value = value.get(..value.floor_char_boundary(LINE_LIMIT)).unwrap_or_default();
    if value.bytes().all(|b| matches!(b, 0x20..0x7f) && b != b'"' && b != b'\\') {
        text.push_str(value);
        return;
    }
    for c in value.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            c if is_unsafe(c) => {
                let _ = write!(text, "\\u{:04x}", u32::from(c)); // all of them are below U+10000
            }
            c => text.push(c),
        }
    }
}

/// Appends a time in UTC as RFC 3339 has it, with microseconds: `2026-11-20T23:54:02.021465Z`.
pub fn push_time(text: &mut String, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    // Writing to a String does not fail.
    let _ = write!(text, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z");
}

/// The Gregorian date `days` after 1970-01-01. Counts in eras of 400 years (146,097 days) that begin on 1 March,
/// so that the leap day is a year's last.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01 to 1970-01-01
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // 0 is March
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_read_as_rfc_3339() {
        // Each pair is what `date -u -d @N` says.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            let mut out = String::new();
            push_time(&mut out, UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(out, text);
        }
    }

    #[test]
    fn no_value_can_end_a_line_or_begin_a_field() {
        let evil = "a\nb\" x=\"1\u{1b}[31m\u{202e}\u{2028}\\";
        for format in [Format::Text, Format::Json] {
            let mut text = String::new();
            let mut line = Line::start(&mut text, format, UNIX_EPOCH, Level::INFO, "s", evil);
            line.text("k", evil);
            line.display("d", &evil);
            line.finish();
            assert_eq!(text.matches('\n').count(), 1);
            assert!(!text.contains(['\u{1b}', '\u{202e}', '\u{2028}']), "{text:?}");
            if format == Format::Json {
                let value: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert_eq!(
                    (&value["k"], &value["d"], &value["message"]),
                    (&evil.into(), &evil.into(), &evil.into())
                );
            } else {
                assert!(text.contains(r#"k="a\nb\" x=\"1\u001b[31m\u202e\u2028\\" "#), "{text}");
            }
        }
    }

    #[test]
    fn a_long_line_is_cut() {
        let mut text = String::new();
        let mut line = Line::start(&mut text, Format::Text, UNIX_EPOCH, Level::INFO, "s", "m");
        line.display("d", &"ä".repeat(100_000));
        line.finish();
        assert!(text.len() < LINE_LIMIT + 32 && text.ends_with("…[cut]\n"), "{}", text.len());
    }
}
