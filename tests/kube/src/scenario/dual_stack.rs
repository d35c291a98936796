//! Pods and services with addresses of both families.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::policy::{STRICT, enforced, peer_authentication};
use super::{App, Stage};
use crate::lab::{NODES, Node};

/// A Service with an address of each family, for the pods labelled `app=NAME`.
fn service(name: &str) -> Value {
    let mut service = super::apps::service(name);
    service["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
    service
}

/// See [`super::ALL`].
pub fn run(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let server = |name: &str, node: &Node| App::server(name).on(node);
    stage.label_in()?;
    stage.apply(&[service("server"), service("local")])?;
    stage.start(&[server("server", &far), server("local", &near), App::idle("client").on(&near)])?;
    let outside = stage.beside("outside")?;
    outside.start(&[App::idle("plain").on(&near)])?;
    stage.enrolled(true)?;
    let both = stage.kubectl().get(&["service", "-n", &stage.namespace, "server"])?;
    let of_service = both["spec"]["clusterIPs"][1].as_str().context("the service has one address only")?;
    let own = stage.address6("client")?;
    stage.nothing_in_plaintext(&far, || {
        for to in [of_service, &stage.address6("server")?] {
            let answer = stage.reaches("client", &format!("http://[{to}]:8080/"))?;
            ensure!(answer == format!("200 server {own}"), "{to} answered {answer:?} to {own}");
            stage.exec("client", &["app", "echo", &format!("[{to}]:9000")])?;
        }
        stage.ok("by IPv6, at a service's address and at a pod's, and the server sees the client's own");
        for family in ["-4", "-6"] {
            let curl = ["curl", family, "--silent", "--fail", "--max-time", "5", "http://server:8080/"];
            let answer = stage.exec("client", &curl)?;
            ensure!(answer.starts_with("server "), "curl {family} was answered {answer:?}");
        }
        stage.ok("by name, in either family");
        Ok(())
    })?;
    let local = stage.address6("local")?;
    let answer = stage.reaches("client", &format!("http://[{local}]:8080/"))?;
    ensure!(answer == format!("200 local {own}"), "{local} answered {answer:?}");
    stage.ok("on the same node");

    let url = format!("http://[{}]:8080/", stage.address6("server")?);
    outside.reaches("plain", &url)?;
    stage.apply(&[peer_authentication(STRICT)])?;
    outside.cannot_reach("plain", &url)?;
    outside.cannot_reach("plain", &format!("http://[{of_service}]:8080/"))?;
    stage.reaches("client", &url)?;
    enforced(stage, "peerauthentication", "default")?;
    stage.ok("STRICT refuses plaintext in IPv6 too, and lets the mesh in");

    let ranges = [format!("{own}/128")];
    stage.apply(&[json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "ranges"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}}, "action": "DENY",
            "rules": [{"from": [{"source": {"ipBlocks": ranges}}]}],
        },
    })])?;
    stage.cannot_reach("client", &url)?;
    stage.reaches("client", &format!("http://{}:8080/", stage.address("server")?))?;
    stage.ok("a policy on an IPv6 range decides over that, and over nothing else");
    Ok(())
}
