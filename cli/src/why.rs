//! `culvert why`: what decided over a connection that was, from the ztunnel that decided, or over a request, from the
//! waypoint that did. It shows the evaluator's own words; nothing is worked out again.

mod requests;

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::connections::{Connection, Filter, State, Target, fetch};
use crate::table::{Output, print, printable};

/// Why a connection was let in or refused, or a request that passed a waypoint: policy, rule and clause, route, hop
#[derive(Args, Debug)]
pub struct WhyArgs {
    /// The connection's number, as in `ztunnel-config connections` and the access log
    id: Option<u64>,
    #[command(flatten)]
    request: requests::RequestFilter,
    #[command(flatten)]
    filter: Filter,
    /// How many of the newest that match
    #[arg(long, default_value_t = 1, value_name = "N")]
    last: usize,
    #[command(flatten)]
    target: Target,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Runs the command.
pub fn run(args: &WhyArgs) -> Result<ExitCode> {
    if let Some(who) = args.request.waypoints() {
        return requests::run(args, who);
    }
    if args.id.is_none() && args.filter.is_empty() {
        bail!(
            "which connection? Give its number, or --source and --destination; for a request that passed a waypoint give \
             --waypoint, --request-id, --path, --method or --status"
        );
    }
    let all = fetch(&args.target.all()?)?;
    let known = all.len();
    let meant = |c: &Connection| args.id.is_none_or(|id| c.id == id) && args.filter.matches(c);
    let found: Vec<Connection> = all.into_iter().rev().filter(meant).take(args.last).collect();
    if found.is_empty() {
        bail!(
            "none of the {known} connections that ztunnels know is meant. The server's node decides (its ztunnel \
             lists it as inbound); `culvert ztunnel-config connections` lists them all"
        );
    }
    let list: Vec<_> = found.iter().map(|c| &c.json).collect();
    match args.output.document(&list)? {
        Some(document) => print(&document)?,
        None => print(&found.iter().map(explain).collect::<Vec<_>>().join("\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn explain(c: &Connection) -> String {
    let mut text = String::new();
    let verdict = match c.state() {
        State::Refused => "refused",
        State::Open => "allowed, open",
        State::Closed => "allowed, closed",
        State::Failed if c.decision.starts_with("allowed") => "allowed, and failed",
        State::Failed => "failed",
    };
    let end = |workload: &Option<String>, address: String, identity: &Option<String>| {
        let name = workload.as_deref().unwrap_or("(unknown workload)");
        let identity = identity.as_deref().unwrap_or("no identity");
        format!("{name} {address}, {identity}")
    };
    let node = if c.node.is_empty() { String::new() } else { format!(" of {}", c.node) };
    let _ = writeln!(
        text,
        "{verdict}: connection {}{node}, {} over {}, {:.1} s ago",
        c.id,
        c.direction,
        c.carrier,
        c.age().as_secs_f64()
    );
    let _ = writeln!(text, "  from  {}", end(&c.source_workload, c.source.to_string(), &c.source_identity));
    let to = match &c.destination_service {
        Some(service) => format!("{} (service {service})", c.destination),
        None => c.destination.to_string(),
    };
    let _ = writeln!(text, "  to    {}", end(&c.destination_workload, to, &c.destination_identity));
    if let Some(upstream) = c.upstream {
        let _ = writeln!(text, "  via   {upstream}");
    }
    let _ = writeln!(text, "  why   {}", c.decision);
    for dry in &c.dry_run {
        let _ = writeln!(text, "  dry   {dry}");
    }
    // A refusal's error repeats the decision.
    if let Some(error) = c.error.as_ref().filter(|_| c.state() != State::Refused) {
        let _ = writeln!(text, "  end   {error}");
    }
    let _ = writeln!(text, "  bytes {} sent, {} received", c.bytes_sent, c.bytes_received);
    printable(&text)
}
