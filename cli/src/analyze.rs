//! `culvert analyze`: what is wrong, doubtful or without effect in manifests, found by the code that enforces them.

mod sarif;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use config::diagnostic::{Diagnostic, Severity};
use serde_json::json;

use crate::files::Files;
use crate::table::{print, printable};

/// Checks manifests: every field is enforced, refused or has no effect, and this says which
#[derive(Args, Debug)]
pub struct AnalyzeArgs {
    /// Directories and files of Kubernetes and istio.io YAML or JSON
    #[arg(required = true, value_name = "DIR|FILE")]
    paths: Vec<PathBuf>,
    /// The exit code is 1 from this severity on
    #[arg(long, value_enum, default_value_t = Threshold::Error, value_name = "SEVERITY")]
    failure_threshold: Threshold,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Form,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Threshold {
    Info,
    Warning,
    Error,
}

impl Threshold {
    fn severity(self) -> Severity {
        match self {
            Self::Info => Severity::Info,
            Self::Warning => Severity::Warning,
            Self::Error => Severity::Error,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Form {
    /// For people
    #[default]
    Text,
    /// One document with everything
    Json,
    /// For code hosts and editors (SARIF 2.1.0)
    Sarif,
}

/// Runs the command.
pub fn run(args: &AnalyzeArgs) -> Result<ExitCode> {
    let files = Files::read(&args.paths)?;
    let compiled = files.compile();
    let found = &compiled.diagnostics;
    let threshold = args.failure_threshold.severity();
    let failed = found.iter().any(|d| d.severity >= threshold);
    let text = match args.output {
        Form::Text => text(found, files.count(), compiled.objects)?,
        Form::Json => {
            let document = json!({
                "files": files.count(),
                "objects": compiled.objects,
                "failed": failed,
                "diagnostics": found,
            });
            format!("{}\n", serde_json::to_string_pretty(&document)?)
        }
        Form::Sarif => format!("{}\n", serde_json::to_string_pretty(&sarif::document(found))?),
    };
    print(&text)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(found: &[Diagnostic], files: usize, objects: usize) -> Result<String> {
    let mut text = String::new();
    for diagnostic in found {
        writeln!(text, "{}", printable(&diagnostic.to_string()))?;
    }
    let count = |severity| found.iter().filter(|d| d.severity == severity).count();
    let (errors, warnings, notes) = (count(Severity::Error), count(Severity::Warning), count(Severity::Info));
    writeln!(
        text,
        "{files} files, {objects} objects in force: {errors} errors, {warnings} warnings, {notes} notes"
    )?;
    if errors > 0 {
        writeln!(
            text,
            "an object with errors is not in force as it stands; docs/diagnostics.md explains the codes"
        )?;
    }
    Ok(text)
}
