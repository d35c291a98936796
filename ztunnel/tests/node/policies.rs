//! Policies that change while connections live: what is no longer allowed is cut, the rest goes on.

use std::net::SocketAddr;

use harness::netns::root_or_skip;

use crate::lab::Mesh;
use crate::lab::manifests::{join, mtls, policy};
use crate::lab::traffic::{PORT, ask, serve, talk};

async fn mesh() -> Mesh {
    Mesh::start(&[("a", &["client", "other"]), ("b", &["web", "outside/old"])]).await
}

#[tokio::test]
async fn a_new_policy_cuts_what_it_refuses_in_tunnels_and_in_plaintext() {
    if !root_or_skip("policies") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let (client, other, old) = (mesh.pod("client"), mesh.pod("other"), mesh.pod("old"));
    for v6 in [false, true] {
        let to = SocketAddr::new(mesh.pod("web").ip(v6), PORT);
        let mut tunnelled = talk(client, to).await.unwrap();
        let mut allowed = talk(other, to).await.unwrap();
        let mut plain = talk(old, to).await.unwrap();

        let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
        mesh.apply("policy", &policy("deny", "DENY", "web", of_client)).await;
        tunnelled.end().await.unwrap_err();
        for talk in [&mut allowed, &mut plain] {
            talk.echo().await.unwrap();
        }
        let _ = ask(client, to).await.unwrap_err();
        let source = client.ip(v6).to_string();
        let refused = mesh
            .ztunnel("b")
            .last(|c| c["source"].as_str().unwrap().contains(&source) && c["bytes_sent"] == 0)
            .await;
        assert_eq!(refused["policy"], "shop/deny", "{refused}");
        assert_eq!(refused["source_identity"], "spiffe://cluster.local/ns/shop/sa/client");
        let refused = mesh.ztunnel("a").last(|c| c["error"].is_string()).await;
        assert!(refused["error"].as_str().unwrap().contains("401"), "{refused}");

        let of_address = format!("from: [{{source: {{ipBlocks: [\"{}\"]}}}}]", old.ip(v6));
        mesh.apply("policy", &policy("deny", "DENY", "web", &of_address)).await;
        plain.end().await.unwrap_err();
        allowed.echo().await.unwrap();
        let _ = ask(old, to).await.unwrap_err();
        ask(client, to).await.unwrap();

        // Nothing is allowed but what is named, which is not `other`.
        mesh.apply("policy", &policy("allow", "ALLOW", "web", of_client)).await;
        allowed.end().await.unwrap_err();
        let _ = ask(old, to).await.unwrap_err();
        ask(client, to).await.unwrap();

        mesh.remove("policy").await;
        ask(other, to).await.unwrap();
        ask(old, to).await.unwrap();
    }
}

#[tokio::test]
async fn strict_cuts_plaintext_and_disable_is_permissive() {
    if !root_or_skip("mTLS modes") {
        return;
    }
    let mesh = mesh().await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("web"), 9090)];
    let (client, old) = (mesh.pod("client"), mesh.pod("old"));
    let to = |port| SocketAddr::new(mesh.pod("web").ipv4.into(), port);
    let mut tunnelled = talk(client, to(PORT)).await.unwrap();

    mesh.apply("mtls", &mtls("DISABLE", Some("web"))).await;
    tunnelled.echo().await.unwrap();
    let mut plain = [talk(old, to(PORT)).await.unwrap(), talk(old, to(9090)).await.unwrap()];
    assert_ne!(ask(client, to(PORT)).await.unwrap().client.port(), 0);
    let last = mesh.ztunnel("a").last(|c| c["error"].is_null()).await;
    assert_eq!(last["carrier"], "hbone", "{last}");
    let dump = mesh.ztunnel("b").config_dump().await;
    let said = dump["diagnostics"].as_array().unwrap();
    let found = said.iter().any(|d| d["code"] == "acts-otherwise" && d.to_string().contains("DISABLE"));
    assert!(found, "{said:?}");

    // One port is left open.
    let open = format!("{}  portLevelMtls: {{9090: {{mode: PERMISSIVE}}}}\n", mtls("STRICT", Some("web")));
    mesh.apply("mtls", &open).await;
    plain[0].end().await.unwrap_err();
    plain[1].echo().await.unwrap();
    let _ = ask(old, to(PORT)).await.unwrap_err();
    ask(old, to(9090)).await.unwrap();

    mesh.apply("mtls", &mtls("STRICT", None)).await;
    plain[1].end().await.unwrap_err();
    let _ = ask(old, to(9090)).await.unwrap_err();
    tunnelled.echo().await.unwrap();
}

#[tokio::test]
async fn a_pod_that_changes_its_identity_loses_the_connections_of_the_old_one() {
    if !root_or_skip("identities") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let to = SocketAddr::new(mesh.pod("web").ipv4.into(), PORT);
    let allow = policy("allow", "ALLOW", "web", "from: [{source: {principals: [\"*/sa/second\"]}}]");
    let client = mesh.pod("client");
    let mut first = talk(client, to).await.unwrap();
    let mut manifest = mesh.manifest("client");
    manifest.service_account = "second".into();
    mesh.apply("pod-client", &manifest.to_string()).await;
    first.end().await.unwrap_err();
    mesh.apply("policy", &join([allow])).await;
    ask(client, to).await.unwrap();
    let _ = ask(mesh.pod("other"), to).await.unwrap_err();
}
