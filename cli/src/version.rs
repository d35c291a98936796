//! `culvert version`: of this program, and of what runs in the cluster.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::cluster::{Cluster, ClusterArgs};
use crate::table::{Output, print};

/// The version of this program, and of what runs in the cluster
#[derive(Args, Debug)]
pub struct VersionArgs {
    /// Only this program's
    #[arg(long)]
    client: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Of each part of the mesh, how many pods are of which version.
type Parts = Vec<(&'static str, BTreeMap<String, usize>)>;

/// Runs the command.
pub fn run(args: &VersionArgs) -> Result<ExitCode> {
    let client = env!("CARGO_PKG_VERSION");
    let asked = if !args.client && args.cluster.is_any() { running(&args.cluster) } else { Ok(Vec::new()) };
    let parts = match asked {
        Ok(parts) => parts,
        // This program's own is known without the cluster.
        Err(error) => {
            if matches!(args.output, Output::Text | Output::Wide) {
                print(&format!("culvert {client}\n"))?;
            }
            return Err(error.context("what runs in the cluster is not known (--client leaves it out)"));
        }
    };
    let by_name: BTreeMap<_, _> = parts.iter().cloned().collect();
    if let Some(document) = args.output.document(&json!({"client": client, "cluster": by_name}))? {
        print(&document)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("culvert {client}\n");
    for (what, versions) in parts {
        let shown: Vec<_> = versions
            .iter()
            .map(|(version, count)| {
                format!("{count} of {}", if version.is_empty() { "(unknown)" } else { version })
            })
            .collect();
        let shown = if shown.is_empty() { "none".to_owned() } else { shown.join(", ") };
        text.push_str(&format!("{what}: {shown}\n"));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn running(cluster: &ClusterArgs) -> Result<Parts> {
    let cluster = Cluster::connect(cluster)?;
    let mut parts = Vec::new();
    for (what, app) in
        [("control plane", "culvertd"), ("node agents", "culvert-node"), ("ztunnels", "ztunnel")]
    {
        let mut versions: BTreeMap<String, usize> = BTreeMap::new();
        for pod in cluster.pods(app)? {
            *versions.entry(pod.version).or_default() += 1;
        }
        parts.push((what, versions));
    }
    Ok(parts)
}
