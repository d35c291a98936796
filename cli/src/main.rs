//! `culvert`, the command line.
#![forbid(unsafe_code)]

mod admin;
mod analyze;
mod bench;
mod bug_report;
mod ca;
mod cluster;
mod connections;
mod demo;
mod doctor;
mod events;
mod files;
mod health;
mod install;
mod lab;
mod load;
mod netns;
mod proxy_config;
mod proxy_status;
mod schema;
mod status;
mod table;
mod tag;
mod tls_check;
mod version;
mod waypoint;
mod what_if;
mod why;
mod yaml;
mod ztunnel_config;

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};

/// A service mesh without sidecars: look at it, ask it why, and try it out.
#[derive(Parser, Debug)]
#[command(name = "culvert", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Install(install::InstallArgs),
    Upgrade(install::UpgradeArgs),
    VerifyInstall(install::VerifyArgs),
    Uninstall(install::UninstallArgs),
    Status(status::StatusArgs),
    ProxyStatus(proxy_status::ProxyStatusArgs),
    ProxyConfig(proxy_config::ProxyConfigArgs),
    Version(version::VersionArgs),
    Doctor(doctor::DoctorArgs),
    Authn(tls_check::AuthnArgs),
    BugReport(bug_report::BugReportArgs),
    Tag(tag::TagArgs),
    Schema(schema::SchemaArgs),
    Analyze(analyze::AnalyzeArgs),
    WhatIf(what_if::WhatIfArgs),
    Why(why::WhyArgs),
    Waypoint(waypoint::WaypointArgs),
    ZtunnelConfig(ztunnel_config::ZtunnelConfigArgs),
    Ca(ca::CaArgs),
    Demo(demo::DemoArgs),
    Bench(bench::BenchArgs),
    /// Writes a completion script for a shell to standard output
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Servers that the demo and the benchmark talk to
    #[command(hide = true, subcommand)]
    LabService(LabService),
}

#[derive(Subcommand, Debug)]
enum LabService {
    /// Greets every client before it has said anything
    Greeting { address: SocketAddr },
    /// Answers datagrams
    Datagrams { address: SocketAddr },
    /// What the load generator talks to
    Load { ip: IpAddr },
}

/// The command whose `--token` is another than the API server's, which is `--api-token` there.
const WITH_A_TOKEN: &str = "what-if";

/// The arguments with those that say which cluster behind the command, where they stand before it, as kubectl takes them.
fn in_order(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    // The namespace, too, where the command knows one.
    let namespace = clap::Arg::new("namespace").short('n').long("namespace").num_args(1);
    let known = cluster::ClusterArgs::augment_args(clap::Command::new("culvert")).arg(namespace);
    // Whether the argument has its value, or needs none.
    let is_of_cluster = |argument: &OsString| {
        let text = argument.to_str()?;
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        known.get_arguments().find_map(|flag| {
            let is_long =
                name.strip_prefix("--").is_some_and(|long| !long.is_empty() && flag.get_long() == Some(long));
            let short = text.strip_prefix('-').zip(flag.get_short());
            let behind = short.and_then(|(text, letter)| text.strip_prefix(letter));
            if is_long {
                Some(value.is_some() || flag.is_require_equals_set())
            } else {
                behind.map(|b| !b.is_empty())
            }
        })
    };
    let mut arguments = without_empty(arguments, &is_of_cluster).into_iter().peekable();
    let mut ordered: Vec<OsString> = arguments.next().into_iter().collect();
    let mut cluster = Vec::new();
    while let Some(with_value) = arguments.peek().and_then(is_of_cluster) {
        cluster.extend(arguments.by_ref().take(if with_value { 1 } else { 2 }));
    }
    let mut rest: Vec<OsString> = arguments.collect();
    if rest.first().is_some_and(|command| command == WITH_A_TOKEN) {
        for word in &mut cluster {
            let named = word.to_str().and_then(|text| text.strip_prefix("--token"));
            if let Some(value) = named.filter(|value| value.is_empty() || value.starts_with('=')) {
                *word = format!("--api-token{value}").into();
            }
        }
    }
    let end = rest.iter().position(|argument| argument == "--").unwrap_or(rest.len());
    // Without a command they are left where they were, for the error to name them.
    let at = if rest.is_empty() { 0 } else { end };
    rest.splice(at..at, cluster);
    ordered.extend(rest);
    ordered
}

/// The arguments without flags of which the value is empty, as of a script's variable: kubectl takes these as not given.
fn without_empty(
    arguments: impl IntoIterator<Item = OsString>,
    is_of_cluster: &impl Fn(&OsString) -> Option<bool>,
) -> Vec<OsString> {
    let mut arguments = arguments.into_iter().peekable();
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            kept.push(argument);
            break;
        }
        let of_cluster = is_of_cluster(&argument);
        let is_empty = argument.to_str().is_some_and(|text| text.ends_with('='));
        match of_cluster {
            Some(true) if is_empty => {}
            Some(false) if arguments.next_if(|value| value.is_empty()).is_some() => {}
            _ => kept.push(argument),
        }
    }
    kept.extend(arguments);
    kept
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(in_order(std::env::args_os()));
    match run(cli.command) {
        Ok(code) => code,
        Err(e) => {
            // Nothing is left to tell it to when that fails too.
            let _ = writeln!(io::stderr(), "culvert: {}", said(&e));
            ExitCode::from(2)
        }
    }
}

/// An error with its causes, each once: some libraries have their cause in their own words, too.
fn said(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Install(args) => install::install(&args),
        Command::Upgrade(args) => install::upgrade(&args),
        Command::VerifyInstall(args) => install::verify(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Status(args) => status::run(&args),
        Command::ProxyStatus(args) => proxy_status::run(&args),
        Command::ProxyConfig(args) => proxy_config::run(&args),
        Command::Version(args) => version::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Authn(args) => tls_check::run(&args),
        Command::BugReport(args) => bug_report::run(&args),
        Command::Tag(args) => tag::run(&args),
        Command::Schema(args) => schema::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Ca(args) => ca::run(&args),
        Command::Analyze(args) => analyze::run(&args),
        Command::WhatIf(args) => what_if::run(&args),
        Command::Why(args) => why::run(&args),
        Command::Waypoint(args) => waypoint::run(&args),
        Command::ZtunnelConfig(args) => ztunnel_config::run(&args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "culvert", &mut script);
            table::print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::LabService(service) => {
            netns::block_on(async {
                match service {
                    LabService::Greeting { address } => load::serve_greeting(address).await,
                    LabService::Datagrams { address } => load::serve_datagrams(address).await,
                    LabService::Load { ip } => load::serve_load(ip).await,
                }
            })??;
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_cluster_may_be_said_before_the_command() {
        let ordered = |line: &str| {
            let all = in_order(line.split(' ').map(OsString::from));
            all.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        for (given, wanted) in [
            ("culvert status -o json", "culvert status -o json"),
            ("culvert --context one status -o json", "culvert status -o json --context one"),
            (
                "culvert --context=one --kubeconfig f tag list",
                "culvert tag list --context=one --kubeconfig f",
            ),
            ("culvert --context one why -- 1", "culvert why --context one -- 1"),
            ("culvert status --context one", "culvert status --context one"),
            ("culvert --context", "culvert --context"),
            ("culvert -s u --as=me status", "culvert status -s u --as=me"),
            (
                "culvert -shttp://u --as-group a --as-group b status",
                "culvert status -shttp://u --as-group a --as-group b",
            ),
            ("culvert --insecure-skip-tls-verify status", "culvert status --insecure-skip-tls-verify"),
            ("culvert --token t what-if --token jwt", "culvert what-if --token jwt --api-token t"),
            ("culvert -n shop --context one waypoint list", "culvert waypoint list -n shop --context one"),
            ("culvert --context= status --server= --as=", "culvert status"),
            ("culvert --server-name u status", "culvert --server-name u status"),
            ("culvert --help", "culvert --help"),
            ("culvert", "culvert"),
        ] {
            assert_eq!(ordered(given), wanted);
        }
        let empty = ["culvert", "status", "--context", "", "-s", "", "-o", "json", "--", "--as", ""];
        assert_eq!(in_order(empty.map(OsString::from)).len(), 7, "what follows -- is left alone");
        assert!(
            Cli::try_parse_from(in_order(["culvert", "--context", "a", "tag", "list"].map(OsString::from)))
                .is_ok()
        );
        // Flags of the same name would be found here.
        Cli::command().debug_assert();
    }

    #[test]
    fn each_cause_is_said_once() {
        let error = |words: &'static [&'static str]| {
            let (first, rest) = words.split_last().unwrap();
            rest.iter().rev().fold(anyhow::anyhow!(*first), |error, word| error.context(*word))
        };
        assert_eq!(said(&error(&["can't", "refused"])), "can't: refused");
        assert_eq!(said(&error(&["can't", "no file: none (2)", "none (2)"])), "can't: no file: none (2)");
        assert_eq!(
            said(&error(&["asked", "service: connect", "connect", "refused"])),
            "asked: service: connect: refused"
        );
    }
}
