//! What the demo says: lines under a progress bar on a terminal, plain lines without one, one document for
//! machines.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::time::Instant;

use crate::lab::Ran;

/// More lines of a program's output than this are not shown.
const MOST_LINES: usize = 14;

/// How to say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// For people.
    Text,
    /// One JSON document at the end.
    Json,
}

/// Something that the demo says is so, and whether it was.
#[derive(Clone, Debug, Serialize)]
struct Claim {
    claim: String,
    holds: bool,
}

#[derive(Clone, Debug, Serialize)]
struct CommandRecord {
    place: String,
    command: String,
    output: String,
    took_ms: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Measured {
    what: String,
    unit: String,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct: Option<f64>,
}

#[derive(Clone, Debug, Default, Serialize)]
struct StepRecord {
    number: usize,
    title: String,
    took_ms: u64,
    commands: Vec<CommandRecord>,
    claims: Vec<Claim>,
    measured: Vec<Measured>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Document<'a> {
    ok: bool,
    took_ms: u64,
    steps: &'a [StepRecord],
}

/// The report. See the module.
pub struct Report {
    form: Form,
    color: bool,
    bar: ProgressBar,
    started: Instant,
    step_started: Instant,
    steps: Vec<StepRecord>,
}

impl Report {
    /// A report of `steps` steps.
    pub fn new(form: Form, steps: u64) -> Self {
        let terminal = form == Form::Text && io::stdout().is_terminal() && io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(steps) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{bar:24}] {pos}/{len} {msg} ({elapsed})")
        {
            bar.set_style(style.progress_chars("━╸─"));
        }
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        let color = terminal && std::env::var_os("NO_COLOR").is_none();
        let now = Instant::now();
        Self { form, color, bar, started: now, step_started: now, steps: Vec::new() }
    }

    fn line(&self, text: &str) {
        if self.form == Form::Json {
            return;
        }
        if self.bar.is_hidden() {
            // Nobody reads any more: the demo still ends as it should.
            let _ = writeln!(io::stdout().lock(), "{text}");
        } else {
            self.bar.println(text);
        }
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// What goes on, for those who watch.
    pub fn doing(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Begins a step.
    pub fn begin(&mut self, number: usize, of: usize, title: &str) {
        self.step_started = Instant::now();
        self.doing(title);
        let head = self.painted("1", &format!("{number}/{of}  {title}"));
        self.line(&format!("\n{head}"));
        self.steps.push(StepRecord { number, title: title.to_owned(), ..StepRecord::default() });
    }

    /// Ends it.
    pub fn end(&mut self) {
        let took = self.step_started.elapsed();
        if let Some(step) = self.steps.last_mut() {
            step.took_ms = took.as_millis().try_into().unwrap_or(u64::MAX);
        }
        let text = self.painted("2", &format!("  ({:.1} s)", took.as_secs_f64()));
        self.line(&text);
        self.bar.inc(1);
    }

    /// A line of explanation.
    pub fn say(&self, text: &str) {
        self.line(&format!("  {text}"));
    }

    /// A program that ran and what came back.
    pub fn ran(&mut self, ran: &Ran) {
        self.ran_showing(ran, ran.shown());
    }

    /// The same with a part of the output.
    pub fn ran_showing(&mut self, ran: &Ran, output: &str) {
        let prompt = self.painted("36", &format!("{}$", ran.place));
        let took = self.painted("2", &format!("({} ms)", ran.took.as_millis()));
        self.line(&format!("  {prompt} {}   {took}", ran.line));
        let lines: Vec<&str> = output.lines().collect();
        for line in lines.iter().take(MOST_LINES) {
            self.line(&format!("      {line}"));
        }
        if lines.len() > MOST_LINES {
            self.line(&format!("      … {} more lines", lines.len() - MOST_LINES));
        }
        if let Some(step) = self.steps.last_mut() {
            step.commands.push(CommandRecord {
                place: ran.place.clone(),
                command: ran.line.clone(),
                output: output.to_owned(),
                took_ms: ran.took.as_secs_f64() * 1000.0,
            });
        }
    }

    /// Something that must be so.
    pub fn claim(&mut self, holds: bool, claim: impl Into<String>) {
        let claim = claim.into();
        let mark = if holds { self.painted("32", "✓") } else { self.painted("1;31", "✗ NOT SO:") };
        self.line(&format!("  {mark} {claim}"));
        if let Some(step) = self.steps.last_mut() {
            step.claims.push(Claim { claim, holds });
        }
    }

    /// A figure, for the document.
    pub fn measured(&mut self, what: &str, unit: &str, value: f64, direct: Option<f64>) {
        if let Some(step) = self.steps.last_mut() {
            step.measured.push(Measured { what: what.to_owned(), unit: unit.to_owned(), value, direct });
        }
    }

    /// The step could not go on.
    pub fn failed(&mut self, error: &anyhow::Error) {
        let mut text = String::new();
        for (depth, cause) in error.chain().enumerate() {
            let _ = write!(text, "{}{cause}", if depth == 0 { "" } else { ": " });
        }
        let mark = self.painted("1;31", "✗");
        self.line(&format!("  {mark} {text}"));
        if let Some(step) = self.steps.last_mut() {
            step.error = Some(text);
        }
    }

    /// Whether every claim held, and how many there were.
    pub fn verdict(&self) -> (bool, usize) {
        let claims = self.steps.iter().flat_map(|s| &s.claims);
        let ok = self.steps.iter().all(|s| s.error.is_none()) && claims.clone().all(|c| c.holds);
        (ok, claims.count())
    }

    /// The end: the last line for people, the document for machines. `complete` says whether all steps ran.
    pub fn finish(&mut self, complete: bool) -> bool {
        let (held, claims) = self.verdict();
        let ok = held && complete;
        let took = self.started.elapsed();
        self.bar.finish_and_clear();
        if self.form == Form::Json {
            let took_ms = took.as_millis().try_into().unwrap_or(u64::MAX);
            let document = Document { ok, took_ms, steps: &self.steps };
            let text = serde_json::to_string_pretty(&document).unwrap_or_default();
            let _ = writeln!(io::stdout().lock(), "{text}");
        } else {
            let failed = self.steps.iter().flat_map(|s| &s.claims).filter(|c| !c.holds).count();
            let steps = self.steps.len();
            self.line(&match (ok, failed) {
                (true, _) => {
                    format!("\nAll {claims} claims of {steps} steps held, in {:.0} s.", took.as_secs_f64())
                }
                (false, 0) => format!("\nThe demo did not get to its end ({claims} claims held so far)."),
                (false, failed) => format!("\n{failed} of {claims} claims did not hold."),
            });
        }
        ok
    }
}
