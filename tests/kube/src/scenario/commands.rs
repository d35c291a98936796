//! The command line, on a cluster with a mesh in it: not that commands run, but that what they say is so.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::NODES;
use crate::report::wait_for;

/// What a command did.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code: 0 as asked, 1 a finding, 2 an error.
    pub code: i32,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub errors: String,
}

impl Said {
    /// The document that it printed.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.output).with_context(|| format!("not JSON: {self:?}"))
    }

    /// Its output, if its exit code is this.
    ///
    /// # Errors
    /// It is another.
    pub fn code(self, expected: i32) -> Result<Self> {
        ensure!(self.code == expected, "exit code {} in place of {expected}: {self:?}", self.code);
        Ok(self)
    }
}

impl Stage {
    /// Runs `culvert` as the cluster's administrator.
    ///
    /// # Errors
    /// It can't be started, or was killed.
    pub fn culvert(&self, words: &[&str]) -> Result<Said> {
        let mut command: Command = self.kubectl().culvert(words);
        let output = command.output().with_context(|| format!("starting culvert {}", words.join(" ")))?;
        Ok(Said {
            code: output.status.code().with_context(|| format!("culvert {} was killed", words.join(" ")))?,
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// See [`super::ALL`].
pub fn commands(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far).account("server")])?;
    let client = |name: &str| App::idle(name).account(name).on(&near);
    stage.start(&[client("friend"), client("stranger")])?;
    let outside = stage.beside("outside")?;
    outside.start(&[App::idle("plain").on(&near)])?;
    stage.enrolled(true)?;
    state(stage)?;
    before_strict(stage, &outside)?;
    decisions(stage)?;
    trouble(stage)?;
    tags(stage)?;
    report(stage)
}

/// What is installed, and who is in the mesh.
fn state(stage: &Stage) -> Result<()> {
    let status = stage.culvert(&["status", "-o", "json"])?.json()?;
    let ours = &status["namespaces"][&stage.namespace];
    ensure!(ours["wanted"] == 3 && ours["captured"] == 3, "3 pods are in the mesh, and status has {ours}");
    let checks = status["checks"].as_array().cloned().unwrap_or_default();
    for part in ["culvertd", "culvert-node", "ztunnel"] {
        let check = checks.iter().find(|c| c["what"] == part);
        ensure!(check.is_some_and(|c| c["state"] == "ready"), "{part} in {status}");
    }
    ensure!(stage.culvert(&["status"])?.output.contains(&stage.namespace), "status leaves the namespace out");
    let ready = stage.culvert(&["verify-install", "--timeout", "60s"])?.code(0)?;
    ensure!(ready.output.ends_with("the mesh is ready\n"), "{ready:?}");

    let version = stage.culvert(&["version", "-o", "json"])?.code(0)?.json()?;
    let own = version["client"].as_str().unwrap_or_default().to_owned();
    for (part, least) in [("control plane", 1), ("node agents", 2), ("ztunnels", 2)] {
        let count = version["cluster"][part][&own].as_u64();
        ensure!(count.is_some_and(|n| n >= least), "{part} of version {own}: {version}");
    }
    stage.ok("status, verify-install and version have all parts, and how many pods are in the mesh");

    wait_for("every proxy to be SYNCED in proxy-status", PATIENCE, || {
        let said = stage.culvert(&["proxy-status"])?;
        let row = |node: &str| said.output.lines().find(|line| line.starts_with(node)).unwrap_or_default();
        let synced = |line: &str| line.matches("SYNCED").count() == 2 && line.contains("culvertd-");
        let all = NODES.iter().all(|node| synced(row(node.name)));
        Ok(if all && said.code == 0 { Ok(()) } else { Err(format!("{said:?}")) })
    })?;
    stage.ok("proxy-status has both nodes' proxies, with all that they were sent acknowledged");

    let listed = ["ztunnel-config", "workload", "-n", &stage.namespace, "-o", "json"];
    let listed = stage.culvert(&listed)?.code(0)?.json()?;
    let server = listed.as_array().into_iter().flatten().find(|w| w["name"] == "server").cloned();
    let server = server.with_context(|| format!("no server among the workloads {listed}"))?;
    let identity = format!("spiffe://cluster.local/ns/{}/sa/server", stage.namespace);
    ensure!(server["identity"] == identity && server["protocol"] == "HBONE", "the server is {server}");
    let certificates = stage.culvert(&["ztunnel-config", "certificate"])?.code(0)?.output;
    ensure!(certificates.contains(&identity), "no certificate of {identity} in {certificates}");
    stage.ok("ztunnel-config has the workloads with their identities, and the certificates");
    Ok(())
}

/// Who would be refused by STRICT.
fn before_strict(stage: &Stage, outside: &Stage) -> Result<()> {
    let url = format!("http://server.{}:8080/", stage.namespace);
    outside.reaches("plain", &url)?;
    stage.reaches("friend", &url)?;
    let check = ["authn", "tls-check", "-n", &stage.namespace, "-o", "json", "--all"];
    let pairs = wait_for("tls-check to have both clients", PATIENCE, || {
        let pairs = stage.culvert(&check)?.code(1)?.json()?;
        let of =
            |source: &str| pairs.as_array().into_iter().flatten().find(|p| p["source"] == source).cloned();
        let friend = of(&format!("{}/friend", stage.namespace));
        let plain = of(&format!("{}/plain", outside.namespace));
        Ok(friend.zip(plain).ok_or_else(|| pairs.to_string()))
    })?;
    let (friend, plain) = pairs;
    ensure!(friend["plaintext"] == 0 && friend["mtls"].as_u64() > Some(0), "the friend: {friend}");
    ensure!(plain["plaintext"].as_u64() > Some(0) && plain["mtls"] == 0, "the one outside: {plain}");
    stage.ok("tls-check names the client that STRICT would refuse, and not the other");
    Ok(())
}

/// What was, and what would be, decided.
fn decisions(stage: &Stage) -> Result<()> {
    let server = format!("{}/server", stage.namespace);
    let ask = |command: &str, client: &str, more: &[&str]| {
        let source = format!("{}/{client}", stage.namespace);
        let words = [command, "--source", &source, "--destination", &server];
        stage.culvert(&[&words[..], more].concat())
    };
    let json = ["--port", "8080", "-o", "json"];
    let friend = format!("cluster.local/ns/{}/sa/friend", stage.namespace);
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "friends", "namespace": stage.namespace},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}}, "action": "ALLOW",
            "rules": [{"from": [{"source": {"principals": [friend]}}], "to": [{"operation": {"ports": ["8080"]}}]}],
        },
    });
    let file = scratch(stage)?.join("friends.json");
    fs::write(&file, policy.to_string())?;
    let file = file.display().to_string();
    let answers = ask("what-if", "stranger", &[&json[..], &["--with", &file]].concat())?.code(1)?.json()?;
    ensure!(
        answers[0]["allowed"] == true && answers[1]["allowed"] == false,
        "what-if says {answers} of the policy before it is there"
    );
    stage.apply(&[policy])?;
    super::policy::enforced(stage, "authorizationpolicy", "friends")?;
    let url = "http://server:8080/";
    stage.cannot_reach("stranger", url)?;
    stage.reaches("friend", url)?;
    for (client, code, name) in [("stranger", 1, "refused"), ("friend", 0, "allowed")] {
        let answer = ask("what-if", client, &json)?.code(code)?.json()?;
        ensure!(answer[0]["allowed"] == (code == 0), "what-if, {name}: {answer}");
        let past = ask("why", client, &["-o", "json"])?.code(0)?.json()?;
        let decision = past[0]["decision"].as_str().unwrap_or_default().to_owned();
        ensure!(decision.contains("friends") || client == "stranger", "why, {name}: {past}");
        let said = ask("why", client, &[])?.code(0)?.output;
        ensure!(said.starts_with(name) && said.contains(&server), "why, {name}: {said}");
    }
    stage.ok("what-if knew what the policy would decide, and why says what it decided");
    Ok(())
}

/// What is wrong, or in the way.
fn trouble(stage: &Stage) -> Result<()> {
    let analyze = ["analyze", "-n", &stage.namespace, "-o", "json"];
    let clean = stage.culvert(&analyze)?.code(0)?.json()?;
    ensure!(clean["failed"] == false && clean["objects"].as_u64() > Some(10), "analyze: {clean}");
    let file = scratch(stage)?.join("typo.yaml");
    let typo = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: typo, namespace: {}}}\n\
         spec:\n  rules:\n  - from:\n    - source: {{principal: [a]}}\n",
        stage.namespace
    );
    fs::write(&file, typo)?;
    let file = file.display().to_string();
    let found = stage.culvert(&["analyze", &file, "--with-cluster", "-o", "json"])?.code(1)?;
    ensure!(found.output.contains("unknown-field") && found.output.contains("principals"), "{found:?}");
    let refused = stage.kubectl().run(&["apply", "-f", &file]);
    let refused = refused.err().context("the API server took a policy with a typo")?.to_string();
    ensure!(refused.contains("validation.culvert.dev") && refused.contains("principal"), "{refused}");
    stage.ok("analyze finds a typo in a file, and admission refuses it");

    let doctor = || stage.culvert(&["doctor", "-o", "json"]);
    let mine = |found: &Value| {
        let all = found.as_array().cloned().unwrap_or_default();
        let mine =
            |f: &&Value| f["detail"].as_str().is_some_and(|d| d.contains(&format!("{}/", stage.namespace)));
        all.iter().filter(mine).filter(|f| f["grade"] == "problem").cloned().collect::<Vec<_>>()
    };
    let found = doctor()?.json()?;
    for topic in ["clock", "node", "installation", "certificates", "capture"] {
        let of = found.as_array().into_iter().flatten().find(|f| f["topic"] == topic);
        ensure!(of.is_some_and(|f| f["grade"] == "ok"), "doctor has of {topic}: {of:?}");
    }
    ensure!(mine(&found).is_empty(), "doctor finds {:?}", mine(&found));
    // Selects nobody, so that no engine would do anything about it.
    stage.apply(&[json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "closed"},
        "spec": {"podSelector": {"matchLabels": {"app": "nobody"}}, "ingress": [{"ports": [{"port": 8080}]}]},
    })])?;
    let found = doctor()?.code(1)?.json()?;
    let closed = mine(&found)
        .iter()
        .any(|f| f["topic"] == "networkpolicy" && f["remedy"].as_str().is_some_and(|r| r.contains("15008")));
    ensure!(closed, "doctor does not find the NetworkPolicy: {found}");
    stage.ok("doctor finds the NetworkPolicy that keeps the tunnel's port closed, and nothing else of ours");
    Ok(())
}

/// Names for revisions.
fn tags(stage: &Stage) -> Result<()> {
    const TAG: &str = "e2e-stable";
    stage.culvert(&["tag", "set", TAG, "--revision", "default"])?.code(0)?;
    let listed = stage.culvert(&["tag", "list", "-o", "json"])?.code(0)?.json()?;
    let there = |listed: &Value| listed.as_array().into_iter().flatten().any(|t| t["tag"] == TAG);
    let read = (|| {
        ensure!(there(&listed), "the tag is not listed: {listed}");
        let unknown = stage.culvert(&["tag", "set", TAG, "--revision", "nowhere", "--overwrite"])?.code(2)?;
        ensure!(unknown.errors.contains("not installed"), "{unknown:?}");
        stage.apply(&[json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "tagged", "labels": {"istio.io/rev": TAG}},
            "spec": {"selector": {"matchLabels": {"app": "nobody"}}, "rules": [{}]},
        })])?;
        super::policy::enforced(stage, "authorizationpolicy", "tagged")
    })();
    stage.culvert(&["tag", "remove", TAG])?.code(0)?;
    read?;
    let listed = stage.culvert(&["tag", "list", "-o", "json"])?.code(0)?.json()?;
    ensure!(!there(&listed), "the tag is still listed: {listed}");
    stage.ok("a tag comes and goes, and what carries it is enforced by its revision");
    Ok(())
}

/// What is collected for a report.
fn report(stage: &Stage) -> Result<()> {
    let directory = scratch(stage)?.join("report");
    let said = stage.culvert(&["bug-report", "--out", &directory.display().to_string()])?.code(0)?;
    ensure!(said.output.starts_with("wrote "), "{said:?}");
    let mut files = Vec::new();
    below(&directory, &mut files)?;
    let has = |end: &str| files.iter().filter(|(name, text)| name.ends_with(end) && !text.is_empty()).count();
    let logs = files.iter().filter(|(name, text)| name.ends_with("/log") && text.contains("culvert")).count();
    ensure!(logs >= 5, "the logs of {logs} pods in {:?}", files.iter().map(|f| &f.0).collect::<Vec<_>>());
    for (end, least) in [("status.json", 1), ("config_dump", 2), ("debug-syncz", 1), ("metrics", 5)] {
        ensure!(has(end) >= least, "{} of {end} in the report, of {least}", has(end));
    }
    let keys: Vec<&String> =
        files.iter().filter(|(_, text)| text.contains("PRIVATE KEY-----")).map(|(name, _)| name).collect();
    ensure!(keys.is_empty(), "private keys in {keys:?}");
    stage.ok(&format!("bug-report has {} files, with all pods' logs and dumps, and no key", files.len()));
    Ok(())
}

fn below(directory: &Path, found: &mut Vec<(String, String)>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            below(&path, found)?;
        } else {
            found.push((path.display().to_string(), String::from_utf8_lossy(&fs::read(&path)?).into_owned()));
        }
    }
    Ok(())
}

/// A directory of the scenario's own, that goes with the cluster.
fn scratch(stage: &Stage) -> Result<std::path::PathBuf> {
    let directory = stage.cluster.lab.run("scratch").join(&stage.namespace);
    fs::create_dir_all(&directory)?;
    Ok(directory)
}
