//! `culvert tag`: names for revisions, such as `stable`, that namespaces can follow while the revision behind the name
//! changes. A tag is a Service with the labels `istio.io/tag` and `istio.io/rev`, as with Istio, in front of the
//! revision's control planes.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterArgs};
use crate::table::{Output, Table, print};

/// The label that makes a Service a tag.
const TAG: &str = "istio.io/tag";
/// The label that says which revision something is of.
const REVISION: &str = "istio.io/rev";

/// Names for revisions of the control plane, which can be moved from one to the next
#[derive(Args, Debug)]
pub struct TagArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    cluster: ClusterArgs,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Lists the tags
    List {
        /// The form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Points a tag at a revision
    Set {
        /// The tag
        tag: String,
        /// The revision
        #[arg(long, value_name = "NAME")]
        revision: String,
        /// Move it, if it points at another
        #[arg(long)]
        overwrite: bool,
    },
    /// Removes a tag
    Remove {
        /// The tag
        tag: String,
    },
}

/// Runs the command.
pub fn run(args: &TagArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.cluster)?;
    match &args.what {
        What::List { output } => list(&cluster, *output)?,
        What::Set { tag, revision, overwrite } => set(&cluster, tag, revision, *overwrite)?,
        What::Remove { tag } => remove(&cluster, tag)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn label<'v>(object: &'v Value, key: &str) -> &'v str {
    let labels = object.pointer("/metadata/labels");
    labels.and_then(|l| l.get(key)).and_then(Value::as_str).unwrap_or_default()
}

fn tags(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.list(&format!("/api/v1/namespaces/{}/services?labelSelector=istio.io%2Ftag", cluster.system))
}

/// Namespaces that follow a name.
fn followers(cluster: &Cluster, tag: &str) -> Result<Vec<String>> {
    let namespaces = cluster.list(&format!("/api/v1/namespaces?labelSelector=istio.io%2Frev%3D{tag}"))?;
    let name = |n: &Value| n.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
    Ok(namespaces.iter().filter_map(name).collect())
}

fn list(cluster: &Cluster, output: Output) -> Result<()> {
    let mut found = Vec::new();
    for service in tags(cluster)? {
        let (tag, revision) = (label(&service, TAG).to_owned(), label(&service, REVISION).to_owned());
        let namespaces = followers(cluster, &tag)?;
        found.push(json!({"tag": tag, "revision": revision, "namespaces": namespaces}));
    }
    if let Some(document) = output.document(&found)? {
        print(&document)?;
        return Ok(());
    }
    let mut table = Table::new(&["TAG", "REVISION", "NAMESPACES"]);
    for tag in &found {
        let text = |key: &str| tag.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let namespaces = tag.get("namespaces").and_then(Value::as_array).into_iter().flatten();
        let namespaces: Vec<_> = namespaces.filter_map(Value::as_str).collect();
        table.row([text("tag"), text("revision"), namespaces.join(",")]);
    }
    print(&if table.is_empty() { "no tags\n".to_owned() } else { table.to_string() })?;
    Ok(())
}

fn service(tag: &str) -> String {
    format!("culvertd-revision-tag-{tag}")
}

fn set(cluster: &Cluster, tag: &str, revision: &str, overwrite: bool) -> Result<()> {
    if !config::metadata::is_label(tag) || tag.len() > 40 {
        bail!("{tag:?} is no name for a tag: at most 40 of a-z, 0-9 and '-'");
    }
    let replicas = cluster.pods("culvertd")?;
    let of_revision: Vec<_> = replicas.iter().filter(|p| p.revision == revision).collect();
    if of_revision.is_empty() {
        let mut known: Vec<_> = replicas.iter().map(|p| p.revision.as_str()).collect();
        known.sort_unstable();
        known.dedup();
        bail!(
            "no culvertd of revision {revision:?} is in namespace {}; there are: {}",
            cluster.system,
            known.join(", ")
        );
    }
    let there = tags(cluster)?.into_iter().find(|s| label(s, TAG) == tag);
    if let Some(other) =
        there.as_ref().map(|s| label(s, REVISION)).filter(|other| *other != revision && !overwrite)
    {
        bail!("tag {tag} points at revision {other}; --overwrite moves it");
    }
    let ports: Vec<_> = [("grpc-xds", 15012, 15012), ("https-webhook", 443, 15017)]
        .map(|(name, port, target)| json!({"name": name, "port": port, "targetPort": target, "protocol": "TCP"}))
        .into();
    let object = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service(tag), "labels": {TAG: tag, REVISION: revision, "app": "culvertd"}},
        "spec": {"selector": {"app": "culvertd", REVISION: revision}, "ports": ports},
    });
    cluster.apply(&format!("/api/v1/namespaces/{}/services/{}", cluster.system, service(tag)), &object)?;
    print(&format!("tag {tag} points at revision {revision}; {REVISION}={tag} on a namespace follows it\n"))?;
    Ok(())
}

fn remove(cluster: &Cluster, tag: &str) -> Result<()> {
    let following = followers(cluster, tag)?;
    if !following.is_empty() {
        bail!(
            "these namespaces follow tag {tag}: {}. Give them another {REVISION} first",
            following.join(", ")
        );
    }
    if !cluster.delete(&format!("/api/v1/namespaces/{}/services/{}", cluster.system, service(tag)))? {
        bail!("there is no tag {tag}; `culvert tag list` lists those that are there");
    }
    print(&format!("removed tag {tag}\n"))?;
    Ok(())
}
