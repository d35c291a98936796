//! `culvert tag`: names for revisions, such as `stable`, that objects can carry in `istio.io/rev` while the revision behind
//! the name changes.
//!
//! The tags of a revision are in the ConfigMap of its settings, which a control plane reads before all that can have one: a
//! tag is known, or nothing is given out yet. A tag that moves is for a moment two revisions', never none's.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterArgs};
use crate::table::{Output, Table, print};

/// How many times the admission is looked at after a change, five times a second.
const PATIENCE: u32 = 50;
/// The ConfigMap's key, with commas between tags.
const KEY: &str = "revisionTags";
/// The label that says which revision something is of.
pub const REVISION: &str = "istio.io/rev";

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
    /// Removes a tag: objects that carry it are then no control plane's
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

/// The revisions that are installed, each with its tags.
///
/// # Errors
/// The API server can't be asked.
pub fn revisions(cluster: &Cluster) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let path = format!("/api/v1/namespaces/{}/configmaps?labelSelector=app%3Dculvertd", cluster.system);
    let mut found = BTreeMap::new();
    for map in cluster.list(&path)? {
        let labels = map.pointer("/metadata/labels");
        let Some(revision) = labels.and_then(|l| l.get(REVISION)).and_then(Value::as_str) else { continue };
        let tags = map.pointer("/data").and_then(|d| d.get(KEY)).and_then(Value::as_str).unwrap_or_default();
        let tags = tags.split(',').map(str::trim).filter(|tag| !tag.is_empty()).map(str::to_owned).collect();
        found.insert(revision.to_owned(), tags);
    }
    Ok(found)
}

fn write(cluster: &Cluster, revision: &str, tags: &BTreeSet<String>) -> Result<()> {
    let name = if revision == "default" { "culvert".to_owned() } else { format!("culvert-{revision}") };
    let path = format!("/api/v1/namespaces/{}/configmaps/{name}", cluster.system);
    let tags = tags.iter().map(String::as_str).collect::<Vec<_>>().join(",");
    cluster.merge(&path, &json!({"data": {KEY: tags}}))
}

fn list(cluster: &Cluster, output: Output) -> Result<()> {
    let all = revisions(cluster)?;
    let of_revision = |(revision, tags): (&String, &BTreeSet<String>)| {
        tags.iter().map(|tag| json!({"tag": tag, "revision": revision})).collect::<Vec<_>>()
    };
    let found: Vec<Value> = all.iter().flat_map(of_revision).collect();
    if let Some(document) = output.document(&found)? {
        print(&document)?;
        return Ok(());
    }
    let mut table = Table::new(&["TAG", "REVISION"]);
    for (revision, tags) in &all {
        for tag in tags {
            table.row([tag.clone(), revision.clone()]);
        }
    }
    print(&if table.is_empty() { "no tags\n".to_owned() } else { table.to_string() })?;
    Ok(())
}

fn set(cluster: &Cluster, tag: &str, revision: &str, overwrite: bool) -> Result<()> {
    let mut all = revisions(cluster)?;
    if !config::metadata::is_label(tag) || all.contains_key(tag) {
        bail!("{tag:?} is no name for a tag: a-z, 0-9 and '-', and not the name of a revision");
    }
    let others: Vec<String> = all
        .iter()
        .filter(|(name, tags)| *name != revision && tags.contains(tag))
        .map(|(name, _)| name.clone())
        .collect();
    if let (Some(other), false) = (others.first(), overwrite) {
        bail!("tag {tag} points at revision {other}; --overwrite moves it");
    }
    if all.is_empty() {
        bail!("no control plane is installed in namespace {}: `culvert install` does that", cluster.system);
    }
    let known = all.keys().cloned().collect::<Vec<_>>().join(", ");
    let Some(tags) = all.get_mut(revision) else {
        bail!("revision {revision:?} is not installed in namespace {}; there are: {known}", cluster.system);
    };
    if tags.insert(tag.to_owned()) {
        write(cluster, revision, tags)?;
    }
    for other in &others {
        if let Some(tags) = all.get_mut(other)
            && tags.remove(tag)
        {
            write(cluster, other, tags)?;
        }
    }
    await_admission(cluster, revision, tag)?;
    print(&format!(
        "tag {tag} points at revision {revision}: it reads what has the label {REVISION}={tag}\n"
    ))?;
    Ok(())
}

/// Waits until objects with the tag are reviewed: the control plane keeps the tags in its webhooks' configuration.
fn await_admission(cluster: &Cluster, revision: &str, tag: &str) -> Result<()> {
    let part = if revision == "default" { "culvertd".to_owned() } else { format!("culvertd-{revision}") };
    let group = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations";
    let path = format!("{group}/{part}-{}", cluster.system);
    for _ in 0..PATIENCE {
        let Some(found) = cluster.find(&path)? else { return Ok(()) };
        if is_reviewed(&found, tag) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    print(&format!(
        "note: objects with the label {REVISION}={tag} are not reviewed when they are written, until a control plane of \
         revision {revision} runs\n"
    ))?;
    Ok(())
}

/// Whether the webhooks of a configuration that ask about revisions ask about this one.
fn is_reviewed(configuration: &Value, revision: &str) -> bool {
    let webhooks = configuration.get("webhooks").and_then(Value::as_array).into_iter().flatten();
    let expressions = webhooks.flat_map(|webhook| {
        let expressions = webhook.pointer("/objectSelector/matchExpressions").and_then(Value::as_array);
        expressions.into_iter().flatten()
    });
    let named = |expression: &&Value| {
        expression.get("key").is_some_and(|key| key == REVISION)
            && expression.get("operator").is_some_and(|o| o == "In")
    };
    let mut lists = expressions.filter(named).filter_map(|e| e.get("values")?.as_array());
    lists.all(|values| values.iter().any(|value| value == revision))
}

fn remove(cluster: &Cluster, tag: &str) -> Result<()> {
    let mut found = false;
    for (revision, mut tags) in revisions(cluster)? {
        if tags.remove(tag) {
            write(cluster, &revision, &tags)?;
            found = true;
        }
    }
    if !found {
        bail!("there is no tag {tag}; `culvert tag list` lists those that are there");
    }
    print(&format!("removed tag {tag}\n"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_reviewed_when_all_that_ask_about_revisions_ask_about_it() {
        let webhook = |operator: &str, values: Value| json!({"objectSelector": {"matchExpressions": [{"key": REVISION, "operator": operator, "values": values}]}});
        let of = |webhooks: Value| json!({"webhooks": webhooks});
        let (with, without) = (webhook("In", json!(["a", "b"])), webhook("In", json!(["a"])));
        let unlabelled = webhook("DoesNotExist", Value::Null);
        assert!(is_reviewed(&of(json!([with, unlabelled, {}])), "b"));
        assert!(!is_reviewed(&of(json!([with, without])), "b"));
    }
}
