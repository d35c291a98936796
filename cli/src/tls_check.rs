//! `culvert authn tls-check`: who still talks plaintext to what, before STRICT refuses it. The ztunnels have counted it:
//! nothing is guessed from the configuration.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use http::Method;
use serde::Serialize;

use crate::admin;
use crate::cluster::{Cluster, ClusterArgs};
use crate::table::{Output, Table, print};

/// The value of labels of which nothing is known.
const UNKNOWN: &str = "unknown";

/// How workloads prove who they are
#[derive(Args, Debug)]
pub struct AuthnArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    TlsCheck(TlsCheckArgs),
}

/// Who connects to what without mTLS: what would be refused by a PeerAuthentication with mode STRICT; the exit code
/// is 1 where there is anybody
#[derive(Args, Debug)]
pub struct TlsCheckArgs {
    /// Only destinations in this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Pairs that use mTLS only, too
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// A client and a server, and how many connections the server's ztunnel has seen since it started.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pair {
    destination: String,
    source: String,
    #[serde(flatten)]
    counts: Counts,
}

/// Connections by what secured them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Counts {
    plaintext: u64,
    mtls: u64,
    /// Within a node, without TLS and with an identity (`nodeLocal`): what `STRICT` lets in.
    node_local: u64,
}

/// Runs the command.
pub fn run(args: &AuthnArgs) -> Result<ExitCode> {
    let What::TlsCheck(args) = &args.what;
    let cluster = Cluster::connect(&args.cluster)?;
    // What the ztunnels know nothing of is called unknown.
    if let Some(namespace) = args.namespace.as_deref().filter(|namespace| *namespace != UNKNOWN) {
        cluster.has_namespace(namespace)?;
    }
    let mut counts = BTreeMap::new();
    let (mut asked, mut silent) = (0, Vec::new());
    for pod in cluster.pods("ztunnel")? {
        match cluster.ask_pod(&pod, admin::METRICS.port(), Method::GET, "/metrics") {
            Ok((http::StatusCode::OK, bytes)) => {
                count(&String::from_utf8_lossy(&bytes), &mut counts);
                asked += 1;
            }
            Ok((status, _)) => silent.push(format!("{} ({status})", pod.node)),
            Err(error) => silent.push(format!("{} ({error:#})", pod.node)),
        }
    }
    if asked == 0 {
        let system = &cluster.system;
        if silent.is_empty() {
            bail!("no ztunnel is in namespace {system}: `culvert status` says why");
        }
        bail!("no ztunnel in namespace {system} tells its metrics: {}", silent.join(", "));
    }
    let in_namespace = |pair: &Pair| {
        args.namespace.as_ref().is_none_or(|n| pair.destination.split('/').next() == Some(n.as_str()))
    };
    let mut pairs: Vec<Pair> = counts
        .into_iter()
        .map(|((destination, source), counts)| Pair { destination, source, counts })
        .filter(in_namespace)
        .collect();
    let plaintext = pairs.iter().filter(|p| p.counts.plaintext > 0).count();
    let total = pairs.len();
    pairs.retain(|p| args.all || p.counts.plaintext > 0);
    match args.output.document(&pairs)? {
        Some(document) => print(&document)?,
        None => print(&text(&pairs, plaintext, total, asked, &silent)?)?,
    }
    // A node that was not asked may have seen plaintext.
    Ok(if plaintext == 0 && silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(pairs: &[Pair], plaintext: usize, total: usize, asked: usize, silent: &[String]) -> Result<String> {
    let mut table = Table::new(&["DESTINATION", "SOURCE", "PLAINTEXT", "MTLS", "NODE-LOCAL"]);
    for Pair { destination, source, counts } in pairs {
        let [plaintext, mtls, local] =
            [counts.plaintext, counts.mtls, counts.node_local].map(|count| count.to_string());
        table.row([destination.clone(), source.clone(), plaintext, mtls, local]);
    }
    let mut text = if table.is_empty() { String::new() } else { format!("{table}\n") };
    writeln!(
        text,
        "{plaintext} of {total} pairs used plaintext, as {asked} ztunnels have counted since they started"
    )?;
    if plaintext > 0 {
        writeln!(
            text,
            "STRICT would refuse these: put the clients into the mesh first (label istio.io/dataplane-mode=ambient), \
             or leave their ports out with portLevelMtls"
        )?;
    }
    if !silent.is_empty() {
        writeln!(text, "not asked, so that there may be more: {}", silent.join(", "))?;
    }
    Ok(text)
}

/// Adds the connections of one scrape, as the destination's ztunnel reported them.
fn count(metrics: &str, counts: &mut BTreeMap<(String, String), Counts>) {
    for line in metrics.lines() {
        let Some((labels, value)) = sample(line, "istio_tcp_connections_opened_total") else { continue };
        let label = |name: &str| labels.get(name).map_or(UNKNOWN, String::as_str);
        if label("reporter") != "destination" {
            continue;
        }
        let end = |side: &str| {
            format!("{}/{}", label(&format!("{side}_workload_namespace")), label(&format!("{side}_workload")))
        };
        let of = counts.entry((end("destination"), end("source"))).or_default();
        match label("connection_security_policy") {
            "mutual_tls" => of.mtls += value,
            "node_local" => of.node_local += value,
            _ => of.plaintext += value,
        }
    }
}

/// The labels and the value of a line of the Prometheus text format, if it is of this metric.
fn sample(line: &str, name: &str) -> Option<(BTreeMap<String, String>, u64)> {
    let mut rest = line.strip_prefix(name)?.strip_prefix('{')?;
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(value) = rest.strip_prefix('}') {
            let value: f64 = value.split_whitespace().next()?.parse().ok()?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a count of connections"
            )]
            return Some((labels, value as u64));
        }
        let (key, after) = rest.split_once("=\"")?;
        let (mut text, mut end) = (String::new(), None);
        let mut characters = after.char_indices();
        while let Some((index, c)) = characters.next() {
            match c {
                '"' => {
                    end = Some(index + 1);
                    break;
                }
                '\\' => match characters.next()?.1 {
                    'n' => text.push('\n'),
                    other => text.push(other),
                },
                c => text.push(c),
            }
        }
        labels.insert(key.to_owned(), text);
        rest = after.get(end?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_is_what_the_destination_saw_without_an_identity() {
        let line = |reporter: &str, security: &str, source: &str, n: u64| {
            format!(
                "istio_tcp_connections_opened_total{{reporter=\"{reporter}\",source_workload=\"{source}\",\
                 source_workload_namespace=\"a\",destination_workload=\"web\",\
                 destination_workload_namespace=\"shop\",connection_security_policy=\"{security}\"}} {n}"
            )
        };
        let metrics = [
            "# TYPE istio_tcp_connections_opened counter".to_owned(),
            line("destination", "unknown", "old", 3),
            line("destination", "mutual_tls", "new", 5),
            line("destination", "node_local", "near", 7),
            line("source", "unknown", "old", 100),
            "istio_tcp_connections_opened_total{broken".to_owned(),
        ];
        let mut counts = BTreeMap::new();
        count(&metrics.join("\n"), &mut counts);
        count(&line("destination", "unknown", "new", 1), &mut counts);
        let found: Vec<_> = counts
            .iter()
            .map(|((to, from), n)| format!("{from} {to} {} {} {}", n.plaintext, n.mtls, n.node_local))
            .collect();
        assert_eq!(found, ["a/near shop/web 0 0 7", "a/new shop/web 1 5 0", "a/old shop/web 3 0 0"]);
    }

    /// What goes within a node without TLS has an identity, and `STRICT` lets it in.
    #[test]
    fn a_pair_within_a_node_is_not_told_to_join_the_mesh() {
        let of = |plaintext, node_local| Pair {
            destination: "shop/web".to_owned(),
            source: "shop/near".to_owned(),
            counts: Counts { plaintext, node_local, mtls: 0 },
        };
        let said = text(&[of(0, 7)], 0, 1, 1, &[]).unwrap();
        assert!(!said.contains("STRICT") && said.contains("NODE-LOCAL"), "{said}");
        assert!(text(&[of(2, 7)], 1, 1, 1, &[]).unwrap().contains("STRICT would refuse"));
        let json = serde_json::to_value(of(2, 7)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"destination": "shop/web", "source": "shop/near",
                                            "plaintext": 2, "mtls": 0, "nodeLocal": 7})
        );
    }

    #[test]
    fn labels_may_hold_what_ends_others() {
        let (labels, value) = sample(r#"m{a="x\"},=",b="y\\"} 7 123"#, "m").unwrap();
        assert_eq!((labels["a"].as_str(), labels["b"].as_str(), value), ("x\"},=", "y\\", 7));
        assert!(sample("mm{a=\"\"} 1", "m").is_none() && sample("m{a=\"", "m").is_none());
    }
}
