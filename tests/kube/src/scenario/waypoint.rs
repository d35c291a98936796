//! Services behind a waypoint: deployed by the command line, routed by header, rewritten and redirected, with the routes'
//! status, guarded by method, not to be bypassed, replaced under load, and gone.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Stage, policy};
use crate::capture;
use crate::lab::NODES;
use crate::process::finish;
use crate::report::wait_for;
use crate::tools;

/// The Service that requests are for; those of `one` and `two` are behind it.
const SERVICE: &str = "web";

fn curl(stage: &Stage, pod: &str, words: &[&str]) -> Result<String> {
    curl_path(stage, pod, "/", words)
}

fn curl_path(stage: &Stage, pod: &str, path: &str, words: &[&str]) -> Result<String> {
    let url = format!("http://{SERVICE}:8080{path}");
    let marker = format!("X-Marker: {}", capture::marker(&stage.namespace));
    let fixed = ["curl", "--silent", "--show-error", "--max-time", "3", "--header", &marker];
    stage.exec(pod, &[&fixed[..], &["--write-out", "%{http_code}"], words, &[&url]].concat())
}

/// Waits until a request is answered by who should, or by a status.
fn answered(stage: &Stage, words: &[&str], wanted: &str) -> Result<()> {
    wait_for(&format!("{words:?} to be answered by {wanted}"), Duration::from_secs(30), || {
        Ok(match curl(stage, "client", words) {
            Ok(answer) if answer.contains(wanted) => Ok(()),
            Ok(answer) => Err(answer),
            Err(error) => Err(format!("{error:#}")),
        })
    })
}

fn waypoint(stage: &Stage, words: &[&str]) -> Result<String> {
    let words = [&["waypoint"], words, &["-n", &stage.namespace]].concat();
    finish(&mut stage.cluster.kubectl.culvert(&words)).with_context(|| format!("culvert {}", words.join(" ")))
}

/// A Service of HTTP for the pods with a label.
fn service(name: &str, selector: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": { "selector": selector, "ports": [{ "name": "http", "port": 8080 }] },
    })
}

fn route() -> Value {
    let backend = |name: &str| json!([{ "name": name, "port": 8080 }]);
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": { "name": SERVICE },
        "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": SERVICE, "port": 8080 }],
            "rules": [
                { "matches": [{ "headers": [{ "name": "version", "value": "two" }] }], "backendRefs": backend("two") },
                {
                    "matches": [{ "path": { "type": "PathPrefix", "value": "/old" } }],
                    "filters": [{ "type": "URLRewrite", "urlRewrite": {
                        "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/new" },
                    } }],
                    "backendRefs": backend("two"),
                },
                {
                    "matches": [{ "path": { "type": "PathPrefix", "value": "/moved" } }],
                    "filters": [{ "type": "RequestRedirect", "requestRedirect": {
                        "scheme": "https", "hostname": "elsewhere.example", "statusCode": 301,
                        "path": { "type": "ReplacePrefixMatch", "replacePrefixMatch": "/there" },
                    } }],
                },
                { "backendRefs": backend("one") },
            ],
        },
    })
}

/// See [`super::ALL`].
pub fn run(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.kubectl().apply_server_side(&tools::gateway_api(&stage.cluster.lab)?.display().to_string())?;
    stage.label_in()?;
    let all = json!({ "serves": SERVICE });
    stage.apply(&[
        service(SERVICE, &all),
        service("one", &json!({ "app": "one" })),
        service("two", &json!({ "app": "two" })),
    ])?;
    let server = |name: &str| App::server(name).label("serves", SERVICE).on(&far);
    stage.start(&[server("one"), server("two"), App::idle("client").on(&near)])?;
    answered(stage, &[], "200")?;
    stage.ok("without a waypoint the service answers");

    let said = waypoint(stage, &["apply", "--enroll-namespace", "--wait", "--timeout", "120s"])?;
    stage.ok(&format!("culvert waypoint apply: {}", said.lines().last().unwrap_or_default()));
    answered(stage, &[], "200")?;
    stage.apply(&[route()])?;
    answered(stage, &["-H", "version: two"], "two ")?;
    for _ in 0..20 {
        let (plain, two) = (curl(stage, "client", &[])?, curl(stage, "client", &["-H", "version: two"])?);
        ensure!(plain.starts_with("one ") && two.starts_with("two "), "{plain:?}, {two:?}");
    }
    stage.ok("an HTTPRoute sends requests by their header to one of two services, each time");
    stage.nothing_in_plaintext(&far, || paths(stage))?;
    statuses(stage)?;
    let found = stage.culvert(&["analyze", "-n", &stage.namespace, "-o", "json"])?.code(0)?;
    ensure!(!found.output.contains("waypoint-not-ready"), "analyze does not see the waypoint: {found:?}");
    stage.ok("analyze knows the waypoint that is there");

    stage.apply(&[json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "get-only" },
        "spec": {
            "targetRefs": [{ "group": "", "kind": "Service", "name": SERVICE }],
            "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }],
        },
    })])?;
    answered(stage, &["-X", "DELETE"], "403")?;
    answered(stage, &[], "one ")?;
    stage.ok("a policy on methods refuses with 403, and lets the others in");
    let client = format!("{}/client", stage.namespace);
    let refused = [
        "why",
        "--waypoint",
        &format!("{}/waypoint", stage.namespace),
        "--source",
        &client,
        "--status",
        "403",
    ];
    let why = stage.culvert(&refused)?.code(0)?.output;
    ensure!(
        why.contains(&format!("from  {client} ")) && why.contains("get-only"),
        "why of a waypoint: {why}"
    );
    stage.ok("why knows the request by its client's name, and by which policy it was refused");

    let address = format!("http://{}:8080/", stage.address("one")?);
    stage.cannot_reach("client", &address)?;
    stage.ok("the pod's own address is refused: nothing gets past the waypoint");
    policy::enforced(stage, "authorizationpolicy", "get-only")?;
    replaced_under_load(stage)?;
    gone(stage)
}

/// What the conformance suite does not look at: the path that the service gets, and where a redirect leads.
fn paths(stage: &Stage) -> Result<()> {
    for (asked, got) in [("/old/a%2Fb?c=d", "/new/a%2Fb?c=d"), ("/old", "/new"), ("/older", "/older")] {
        let answer = curl_path(stage, "client", asked, &["--include"])?;
        let path = format!("x-path: {got}\r\n");
        ensure!(answer.to_lowercase().contains(&path.to_lowercase()), "{asked} came as: {answer}");
        let by = if got == asked { "one " } else { "two " };
        ensure!(answer.contains(&format!("\r\n\r\n{by}")), "{asked} was not answered by {by}: {answer}");
    }
    stage.ok("a path is rewritten, its query stays, and a longer word is another path");
    let answer = curl_path(stage, "client", "/moved/a?b=c", &["--include"])?;
    let location = answer.lines().find(|l| l.to_lowercase().starts_with("location:")).unwrap_or_default();
    ensure!(answer.ends_with("301"), "a redirect is answered by {answer}");
    ensure!(
        location.split_once(' ').is_some_and(|(_, to)| to.trim() == "https://elsewhere.example/there/a?b=c"),
        "the redirect leads to {location:?}"
    );
    stage.ok("a redirect leads where it is said to, with the rest of the path and the query");
    Ok(())
}

/// What routes say of themselves: one that holds, one whose back end is missing, and one whose parent has no such port.
fn statuses(stage: &Stage) -> Result<()> {
    let mut dangling = route();
    dangling["metadata"]["name"] = json!("dangling");
    dangling["spec"]["rules"] = json!([{
        "matches": [{ "path": { "type": "Exact", "value": "/dangling" } }],
        "backendRefs": [{ "name": "nobody", "port": 8080 }],
    }]);
    let mut portless = route();
    portless["metadata"]["name"] = json!("portless");
    portless["spec"]["parentRefs"][0]["port"] = json!(8099);
    stage.apply(&[dangling, portless])?;
    for (name, condition, wanted) in [
        (SERVICE, "Accepted", ("True", "Accepted")),
        (SERVICE, "ResolvedRefs", ("True", "ResolvedRefs")),
        ("dangling", "Accepted", ("True", "Accepted")),
        ("dangling", "ResolvedRefs", ("False", "BackendNotFound")),
        ("portless", "Accepted", ("False", "NoMatchingParent")),
    ] {
        stage.kubectl().until(&["httproute", "-n", &stage.namespace, name], PATIENCE, |route| {
            let generation = &route["metadata"]["generation"];
            let parent = &route["status"]["parents"][0];
            let of = parent["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == condition);
            let so = parent["controllerName"] == "culvert.dev/mesh-controller"
                && of.is_some_and(|c| {
                    c["status"] == wanted.0
                        && c["reason"] == wanted.1
                        && c["observedGeneration"] == *generation
                });
            if so { Ok(()) } else { Err(route["status"].to_string()) }
        })?;
    }
    let answer = curl_path(stage, "client", "/dangling", &[])?;
    ensure!(answer.ends_with("500"), "a route without a back end that is there is answered by {answer}");
    stage.kubectl().run(&["delete", "httproute", "-n", &stage.namespace, "dangling", "portless"])?;
    stage
        .ok("routes say by their status whether they are accepted, and what they refer to that is not there");
    Ok(())
}

fn replaced_under_load(stage: &Stage) -> Result<()> {
    let [near, _] = NODES;
    let load = format!("40@http://{SERVICE}:8080/");
    stage.start(&[App::client("load", &["-load", &load]).on(&near)])?;
    let before = stage.talking("load")?;
    stage.kubectl().run(&["rollout", "restart", "-n", &stage.namespace, "deployment/waypoint"])?;
    stage.kubectl().rolled_out(&stage.namespace, "deployment/waypoint", PATIENCE * 2)?;
    // Until the old one is gone.
    wait_for("one pod of the waypoint", PATIENCE, || {
        let selector = "gateway.networking.k8s.io/gateway-name=waypoint";
        let names = ["get", "pods", "-n", &stage.namespace, "-l", selector, "-o", "name"];
        let names = stage.kubectl().run(&names)?;
        Ok(if names.lines().count() == 1 { Ok(()) } else { Err(names) })
    })?;
    stage.pass(Duration::from_secs(2));
    let after = stage.undisturbed("load", &before)?;
    ensure!(after.iter().all(|job| job.good > 100), "too few requests to say anything: {after:?}");
    stage.ok("the waypoint was replaced under load, and every request was answered");
    Ok(())
}

fn gone(stage: &Stage) -> Result<()> {
    waypoint(stage, &["delete", "waypoint"])?;
    let url = format!("http://{SERVICE}:8080/");
    stage.cannot_reach("client", &url)?;
    stage.ok("without its waypoint the service is refused");
    stage.label("namespace", &stage.namespace, "istio.io/use-waypoint-")?;
    stage.cannot_reach("client", &url)?;
    stage.ok("not bound any more it is refused, too: nobody enforces the policy on methods");
    stage.kubectl().run(&["delete", "authorizationpolicy", "-n", &stage.namespace, "get-only"])?;
    stage.reaches("client", &url)?;
    stage.ok("without that policy it answers");
    Ok(())
}
