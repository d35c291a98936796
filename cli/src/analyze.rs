//! `culvert analyze`: what is wrong, doubtful or without effect in manifests and in a cluster,
//! found by the code that enforces them.

mod sarif;

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use config::diagnostic::{Diagnostic, Severity};
use serde_json::json;

use crate::files::{Compiled, Files, Sources};
use crate::table::{Output, print, printable};

/// Checks manifests, a cluster, or both: every field is enforced, refused or has no effect, and this says which
#[derive(Args, Debug)]
pub struct AnalyzeArgs {
    #[command(flatten)]
    sources: Sources,
    /// Only what concerns this namespace
    #[arg(short, long)]
    namespace: Option<String>,
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
    #[value(alias = "wide")]
    Text,
    /// One document with everything
    Json,
    /// The same as YAML
    Yaml,
    /// For code hosts and editors (SARIF 2.1.0)
    Sarif,
}

/// Runs the command.
pub fn run(args: &AnalyzeArgs) -> Result<ExitCode> {
    let files = args.sources.read()?;
    if let Some(namespace) = &args.namespace {
        files.has_namespace(namespace)?;
    }
    let compiled = files.compile()?;
    let elsewhere = |d: &Diagnostic| match (&args.namespace, &d.resource) {
        (Some(wanted), Some(resource)) => {
            let of = if &*resource.kind == "Namespace" { &resource.name } else { &resource.namespace };
            &**of != wanted.as_str()
        }
        _ => false,
    };
    let found: Vec<_> = compiled.diagnostics.iter().filter(|d| !elsewhere(d)).cloned().collect();
    let found = &found;
    let threshold = args.failure_threshold.severity();
    let failed = found.iter().any(|d| d.severity >= threshold);
    let text = match args.output {
        Form::Text => text(found, &files, &compiled)?,
        Form::Json | Form::Yaml => {
            let mut document = json!({
                "files": files.count(),
                "objects": compiled.objects,
                "failed": failed,
                "diagnostics": found,
            });
            if let (true, Some(map)) = (files.is_cluster(), document.as_object_mut()) {
                map.insert("clusterObjects".to_owned(), files.cluster_count().into());
                map.insert("leftOut".to_owned(), serde_json::to_value(&compiled.left_out)?);
            }
            let form = if args.output == Form::Yaml { Output::Yaml } else { Output::Json };
            form.document(&document)?.unwrap_or_default()
        }
        Form::Sarif => format!("{}\n", serde_json::to_string_pretty(&sarif::document(found))?),
    };
    print(&text)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(found: &[Diagnostic], files: &Files, compiled: &Compiled) -> Result<String> {
    let mut text = String::new();
    for diagnostic in found {
        let mut shown = diagnostic.clone();
        // An object of the cluster is its own place.
        shown.resource = shown.resource.filter(|r| r.to_string() != *diagnostic.file);
        writeln!(text, "{}", printable(&shown.to_string()))?;
    }
    let count = |severity| found.iter().filter(|d| d.severity == severity).count();
    let (errors, warnings, notes) = (count(Severity::Error), count(Severity::Warning), count(Severity::Info));
    if files.is_cluster() {
        write!(text, "{} objects of the cluster, ", files.cluster_count())?;
    }
    writeln!(
        text,
        "{} files, {} objects in force: {errors} errors, {warnings} warnings, {notes} notes",
        files.count(),
        compiled.objects
    )?;
    let note = compiled.left_out.note();
    if !note.is_empty() {
        writeln!(text, "{}", printable(&note))?;
    }
    if errors > 0 {
        writeln!(
            text,
            "an object with errors is not in force as it stands; docs/diagnostics.md explains the codes"
        )?;
    }
    Ok(text)
}
