//! `culvert ztunnel-config`: what a ztunnel knows and does, in tables.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::admin::Address;
use crate::connections::{Filter, Target, fetch};
use crate::table::{Output, Table, print};

/// What a ztunnel knows and does
#[derive(Args, Debug)]
pub struct ZtunnelConfigArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t, global = true)]
    output: Output,
}

#[derive(Subcommand, Debug)]
enum What {
    /// The workloads of the mesh
    #[command(visible_alias = "workloads")]
    Workload(InNamespace),
    /// The services
    #[command(visible_alias = "services")]
    Service(InNamespace),
    /// The authorization policies in force
    #[command(visible_alias = "policies")]
    Policy(InNamespace),
    /// The certificates of this node's workloads, and the roots that are trusted
    #[command(visible_alias = "certificates")]
    Certificate,
    /// How the pods of a node are captured, and what was counted of them
    #[command(visible_alias = "pods")]
    Capture(InNamespace),
    /// The connections that are open, and the last that ended or were refused
    #[command(visible_alias = "connection")]
    Connections {
        #[command(flatten)]
        filter: Filter,
        /// Only the newest N
        #[arg(long, value_name = "N")]
        last: Option<usize>,
    },
    /// Shows the log level, or changes it
    Log {
        /// A level, or directives such as `info,access=debug`
        #[arg(long)]
        level: Option<String>,
    },
}

#[derive(Args, Debug)]
struct InNamespace {
    /// Only this namespace
    #[arg(short, long)]
    namespace: Option<String>,
}

/// Runs the command.
pub fn run(args: &ZtunnelConfigArgs) -> Result<ExitCode> {
    let dump = || args.target.any()?.json("/config_dump");
    let text = match &args.what {
        What::Workload(only) => listed(&dump()?, "workloads", only, args.output, WORKLOAD, workload)?,
        What::Service(only) => listed(&dump()?, "services", only, args.output, SERVICE, service)?,
        What::Policy(only) => listed(&dump()?, "policies", only, args.output, POLICY, policy)?,
        What::Capture(only) => captures(args, only)?,
        What::Certificate => certificates(args)?,
        What::Connections { filter, last } => connections(args, filter, *last)?,
        What::Log { level } => log(&args.target.all()?, level.as_deref())?,
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

const CAPTURE: &[&str] =
    &["NODE", "NAMESPACE", "NAME", "STATE", "BY", "INBOUND", "OUTBOUND", "ESCAPED", "REFUSED", "DROPPED"];
const WORKLOAD: &[&str] = &["NAMESPACE", "NAME", "ADDRESSES", "NODE", "PROTOCOL", "STATUS", "IDENTITY"];
const SERVICE: &[&str] = &["NAMESPACE", "NAME", "HOSTNAME", "VIPS", "PORTS", "ENDPOINTS"];
const POLICY: &[&str] = &["NAMESPACE", "NAME", "ACTION", "SCOPE", "RULES", "DRY RUN"];

fn listed(
    dump: &Value,
    key: &str,
    only: &InNamespace,
    output: Output,
    heading: &[&str],
    row: fn(&Value) -> Vec<String>,
) -> Result<String> {
    let all = dump.get(key).and_then(Value::as_array).with_context(|| format!("the dump has no {key}"))?;
    let wanted = |v: &&Value| only.namespace.as_ref().is_none_or(|n| text(v, "namespace") == *n);
    let found: Vec<&Value> = all.iter().filter(wanted).collect();
    if let Some(document) = output.document(&found)? {
        return Ok(document);
    }
    let mut table = Table::new(heading);
    found.into_iter().for_each(|v| table.row(row(v)));
    Ok(if table.is_empty() { format!("no {key}\n") } else { table.to_string() })
}

/// A field as text: strings as they are, lists joined by commas, nothing for what is absent.
pub fn text(value: &Value, key: &str) -> String {
    match value.get(key) {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Array(list)) => {
            let items = list.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
            items.collect::<Vec<_>>().join(",")
        }
        None | Some(Value::Null) => String::new(),
        Some(other) => other.to_string(),
    }
}

fn count(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_array).map_or_else(String::new, |list| list.len().to_string())
}

fn workload(v: &Value) -> Vec<String> {
    ["namespace", "name", "addresses", "node", "protocol", "status", "identity"].map(|k| text(v, k)).into()
}

fn service(v: &Value) -> Vec<String> {
    let port = |p: &Value| format!("{}->{}", text(p, "port"), text(p, "targetPort"));
    let ports = v.get("ports").and_then(Value::as_array).into_iter().flatten().map(port);
    let mut row: Vec<String> = ["namespace", "name", "hostname"].map(|k| text(v, k)).into();
    row.push(text(v, "vips").split(',').map(vip).collect::<Vec<_>>().join(","));
    row.push(ports.collect::<Vec<_>>().join(","));
    row.push(count(v, "endpoints"));
    row
}

/// `network/address/length`, without the parts that say nothing: no network, and the length of a single address.
fn vip(text: &str) -> &str {
    let text = text.strip_prefix('/').unwrap_or(text);
    let single = if text.contains(':') { "/128" } else { "/32" };
    text.strip_suffix(single).unwrap_or(text)
}

fn policy(v: &Value) -> Vec<String> {
    let mut row: Vec<String> = ["namespace", "name", "action", "scope"].map(|k| text(v, k)).into();
    row.push(count(v, "rules"));
    row.push(text(v, "dryRun"));
    row
}

/// Of every ztunnel: each knows its own node's pods.
fn captures(args: &ZtunnelConfigArgs, only: &InNamespace) -> Result<String> {
    let (mut table, mut documents) = (Table::new(CAPTURE), Vec::new());
    for address in args.target.all()? {
        let dump = address.json("/config_dump")?;
        let all = dump.get("pods").and_then(Value::as_array).context("the dump has no pods")?;
        for pod in
            all.iter().filter(|pod| only.namespace.as_ref().is_none_or(|n| text(pod, "namespace") == *n))
        {
            let mut row = vec![address.node().to_owned()];
            row.extend(capture(pod));
            table.row(row);
            documents.push(pod.clone());
        }
    }
    if let Some(document) = args.output.document(&documents)? {
        return Ok(document);
    }
    Ok(if table.is_empty() { "no pods\n".to_owned() } else { table.to_string() })
}

/// Counters are eBPF's alone; `-` for what nobody counts.
fn capture(pod: &Value) -> Vec<String> {
    let mut row: Vec<String> = ["namespace", "name", "state", "capture"].map(|k| text(pod, k)).into();
    let counters = pod.get("captureCounters");
    let sum = |names: &[&str]| {
        let number = |name: &&str| counters?.get(*name)?.as_u64();
        counters.map_or_else(|| "-".to_owned(), |_| names.iter().filter_map(number).sum::<u64>().to_string())
    };
    row.push(sum(&["captured_inbound"]));
    row.push(sum(&["captured_outbound", "captured_dns"]));
    row.push(sum(&["escaped_inbound", "escaped_outbound"]));
    row.push(sum(&["no_listener", "refused"]));
    let dropped = [
        "unreadable",
        "astray",
        "unknown",
        "dns_outside",
        "undelivered",
        "not_the_pods",
        "unproven",
        "undecided",
    ];
    row.push(sum(&dropped));
    row
}

fn certificates(args: &ZtunnelConfigArgs) -> Result<String> {
    let mut text = String::new();
    let mut documents = Vec::new();
    for address in args.target.all()? {
        let dump = address.json("/config_dump")?;
        let all = dump.get("certificates").context("the dump has no certificates")?;
        if !address.node().is_empty() {
            text.push_str(&format!("node {}:\n", address.node()));
        }
        text.push_str(&certificate_table(all));
        let mut document = all.clone();
        if let (Some(map), false) = (document.as_object_mut(), address.node().is_empty()) {
            map.insert("node".to_owned(), address.node().into());
        }
        documents.push(document);
    }
    // One ztunnel's is the document itself.
    let document = if documents.len() == 1 { documents.remove(0) } else { documents.into() };
    Ok(args.output.document(&document)?.unwrap_or(text))
}

/// The certificates of a dump, and the roots that are trusted.
pub fn certificate_table(all: &Value) -> String {
    let mut table =
        Table::new(&["IDENTITY", "VALID", "SERIAL", "NOT AFTER", "RENEWED AT", "ROOT", "FAILURE"]);
    let rows = |key: &str| all.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    for v in rows("workloads") {
        let mut row =
            ["identity", "valid", "serial", "notAfter", "renewAt", "root", "failure"].map(|k| text(&v, k));
        for cell in row.iter_mut().filter(|c| c.len() >= 32 && c.bytes().all(|b| b.is_ascii_hexdigit())) {
            // Enough to tell two apart; the whole of it is in the JSON.
            cell.truncate(12);
        }
        table.row(row);
    }
    let roots: Vec<_> =
        rows("roots").iter().map(|r| text(r, "id").chars().take(12).collect::<String>()).collect();
    format!("{table}\ntrusted roots: {}\n", roots.join(", "))
}

fn connections(args: &ZtunnelConfigArgs, filter: &Filter, last: Option<usize>) -> Result<String> {
    let addresses = args.target.all()?;
    let mut found = fetch(&addresses)?;
    found.retain(|c| filter.matches(c));
    if let Some(last) = last {
        found.drain(..found.len().saturating_sub(last));
    }
    if let Some(document) = args.output.document(&found.iter().map(|c| &c.json).collect::<Vec<_>>())? {
        return Ok(document);
    }
    let nodes = addresses.iter().any(|a| !a.node().is_empty());
    let mut table = Table::new(&[
        if nodes { "NODE/ID" } else { "ID" },
        "STATE",
        "DIRECTION",
        "CARRIER",
        "SOURCE",
        "IDENTITY",
        "DESTINATION",
        "SENT",
        "RECEIVED",
        "POLICY",
    ]);
    for c in found {
        let end = |workload: &Option<String>, address: std::net::SocketAddr| match workload {
            Some(name) => format!("{name} {address}"),
            None => address.to_string(),
        };
        table.row([
            if nodes { format!("{}/{}", c.node, c.id) } else { c.id.to_string() },
            c.state().as_str().to_owned(),
            c.direction.clone(),
            c.carrier.clone(),
            end(&c.source_workload, c.source),
            c.source_identity.clone().unwrap_or_default(),
            end(&c.destination_workload, c.destination),
            c.bytes_sent.to_string(),
            c.bytes_received.to_string(),
            c.policy.clone().unwrap_or_default(),
        ]);
    }
    Ok(if table.is_empty() { "no connections\n".to_owned() } else { table.to_string() })
}

/// Shows the log levels of proxies, or changes them.
///
/// # Errors
/// One of them can't be asked, or refuses the level.
pub fn log(addresses: &[Address], level: Option<&str>) -> Result<String> {
    let mut text = String::new();
    for address in addresses {
        let answer = match level {
            Some(level) => address.post(&format!("/logging?level={}", escaped(level)))?,
            None => address.get("/logging")?,
        };
        if let Address::Pod { pod, .. } = address {
            text.push_str(&format!("{} {}: ", pod.node, pod.name));
        }
        text.push_str(&String::from_utf8_lossy(&answer));
    }
    Ok(text)
}

/// RFC 3986 section 2.1, for a query's value.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~:,=".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vip_is_shown_without_what_says_nothing() {
        let shown = ["/10.96.0.1/32", "/fd00::1/128", "/10.0.0.0/8", "east/10.96.0.1/32", ""].map(vip);
        assert_eq!(shown, ["10.96.0.1", "fd00::1", "10.0.0.0/8", "east/10.96.0.1", ""]);
    }

    #[test]
    fn directives_survive_the_way_into_a_query() {
        assert_eq!(escaped("info,access=debug"), "info,access=debug");
        assert_eq!(escaped("a&b c%"), "a%26b%20c%25");
    }
}
