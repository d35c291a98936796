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
use clap::{CommandFactory, Parser, Subcommand};

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

/// What says which cluster, each with a value.
const WHICH_CLUSTER: [&str; 3] = ["--kubeconfig", "--context", "--system-namespace"];

/// The arguments with those that say which cluster behind the command, where they stand before it, as kubectl takes them.
fn in_order(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments = arguments.into_iter().peekable();
    let mut ordered: Vec<OsString> = arguments.next().into_iter().collect();
    let mut cluster = Vec::new();
    let is_of_cluster = |argument: &OsString| {
        let (name, value) = argument.to_str().map(|text| text.split_once('=').unzip())?;
        let name = name.or(argument.to_str())?;
        WHICH_CLUSTER.contains(&name).then_some(value.is_some())
    };
    while let Some(with_value) = arguments.peek().and_then(is_of_cluster) {
        cluster.extend(arguments.by_ref().take(if with_value { 1 } else { 2 }));
    }
    let mut rest: Vec<OsString> = arguments.collect();
    let end = rest.iter().position(|argument| argument == "--").unwrap_or(rest.len());
    // Without a command they are left where they were, for the error to name them.
    let at = if rest.is_empty() { 0 } else { end };
    rest.splice(at..at, cluster);
    ordered.extend(rest);
    ordered
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(in_order(std::env::args_os()));
    match run(cli.command) {
        Ok(code) => code,
        Err(e) => {
            // Nothing is left to tell it to when that fails too.
            let _ = writeln!(io::stderr(), "culvert: {e:#}");
            ExitCode::from(2)
        }
    }
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
            ("culvert --help", "culvert --help"),
            ("culvert", "culvert"),
        ] {
            assert_eq!(ordered(given), wanted);
        }
        assert!(
            Cli::try_parse_from(in_order(["culvert", "--context", "a", "tag", "list"].map(OsString::from)))
                .is_ok()
        );
    }
}
