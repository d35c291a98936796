//! What is outside the mesh: ServiceEntries of every kind, and addresses that nothing is known of.

use std::fs;
use std::net::SocketAddr;

use harness::netns::root_or_skip;

use crate::lab::manifests::{join, outbound};
use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Mesh, Options, eventually};

/// A ServiceEntry for port 80 with these lines in its spec.
fn entry(name: &str, port: u16, lines: &[&str]) -> String {
    let spec: String = lines.iter().map(|line| format!("  {line}\n")).collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  hosts: [{name}.example]\n  location: MESH_EXTERNAL\n  ports: [{{number: {port}, name: tcp, \
         protocol: TCP, targetPort: {PORT}}}]\n{spec}"
    )
}

#[tokio::test]
async fn service_entries_of_every_kind_lead_where_they_say() {
    if !root_or_skip("service entries") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["outside/old", "outside/older"])]);
    let (old, older) = (mesh.pod("old").clone(), mesh.pod("older").clone());
    let entries = [
        entry(
            "static",
            80,
            &[
                "resolution: STATIC",
                "addresses: [198.51.100.1, \"2001:db8::1\"]",
                &format!("endpoints: [{{address: {}}}]", mesh.node("b").ipv4),
            ],
        ),
        entry("named", 80, &["resolution: DNS", "addresses: [198.51.100.2]"]),
        entry("none", PORT, &["resolution: NONE", &format!("addresses: [{}/31]", older.ipv4)]),
    ];
    mesh.put("entries", &join(entries));
    let hosts = mesh.dir().join("hosts");
    fs::write(&hosts, format!("{} named.example\n", older.ipv4)).unwrap();
    let mount = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
    let options = Options::default().wrapper(&["unshare", "--mount", "sh", "-c", &mount, "sh"]);
    mesh.run("a", &options).await;
    let _servers = [serve(&old, PORT), serve(&older, PORT), serve(mesh.node("b"), PORT)];
    let client = mesh.pod("client");

    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    for (to, server) in [
        (address("198.51.100.1:80"), "b"),
        // Its only endpoint is of the other family, whose source can't be the client's.
        (address("[2001:db8::1]:80"), "b"),
        (address("198.51.100.2:80"), "older"),
        (SocketAddr::new(old.ipv4.into(), PORT), "old"),
        (SocketAddr::new(older.ipv4.into(), PORT), "older"),
    ] {
        let hello = ask(client, to).await.unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!((hello.server.as_str(), hello.client.ip()), (server, client.ipv4.into()), "{to}");
        let entered = mesh.ztunnel("a").last(|c| c["destination"] == to.to_string()).await;
        assert_eq!(entered["carrier"], "plaintext");
    }
    for to in ["198.51.100.1:81", "198.51.100.2:8080"] {
        let _ = ask(client, address(to)).await.unwrap_err();
        let refused = mesh.ztunnel("a").last(|c| c["destination"] == to).await;
        assert!(refused["error"].as_str().unwrap().contains("has no port"), "{refused}");
    }
}

#[tokio::test]
async fn unknown_addresses_pass_until_the_settings_forbid_it() {
    if !root_or_skip("unknown addresses") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web", "outside/old"])]).await;
    let (client, node) = (mesh.pod("client"), mesh.node("b").clone());
    let _servers = [serve(&node, PORT), serve(mesh.pod("web"), PORT), serve(mesh.pod("old"), PORT)];
    for v6 in [false, true] {
        let to = SocketAddr::new(node.ip(v6), PORT);
        let mut unknown = talk(client, to).await.unwrap();
        assert_eq!((unknown.hello.client.ip(), unknown.hello.reached), (client.ip(v6), to));
        let mut known = talk(client, SocketAddr::new(mesh.pod("old").ip(v6), PORT)).await.unwrap();
        let mut tunnelled = talk(client, SocketAddr::new(mesh.pod("web").ip(v6), PORT)).await.unwrap();

        mesh.apply("settings", &outbound("REGISTRY_ONLY")).await;
        unknown.end().await.unwrap_err();
        let _ = ask(client, to).await.unwrap_err();
        let refused = mesh.ztunnel("a").last(|c| c["destination"] == to.to_string()).await;
        assert!(refused["error"].as_str().unwrap().contains("REGISTRY_ONLY"), "{refused}");
        for talk in [&mut known, &mut tunnelled] {
            talk.echo().await.unwrap();
        }

        mesh.apply("settings", &outbound("ALLOW_ANY")).await;
        ask(client, to).await.unwrap();
        for talk in [&mut known, &mut tunnelled] {
            talk.echo().await.unwrap();
        }
    }
    let ztunnel = mesh.ztunnel("a");
    eventually("both cuts are counted", async || {
        ztunnel.metric("culvert_connections_cut_total").await == 2.0
    })
    .await;
}

#[tokio::test]
async fn names_are_answered_by_the_mesh() {
    if !root_or_skip("names") {
        return;
    }
    use crate::lab::manifests::{ServiceManifest, vips};
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web-1", "web-2", "outside/old"])]).await;
    let headless = ServiceManifest { name: "web".into(), ..ServiceManifest::new("web", None, 80, PORT) };
    let endpoints = format!("endpoints: [{{address: {}}}]", mesh.pod("old").ipv4);
    let documents = [
        headless.to_string(),
        ServiceManifest::new("client", 7, 80, PORT).to_string(),
        entry("static", 80, &["resolution: STATIC", &endpoints]),
    ];
    mesh.apply("services", &join(documents)).await;
    let client = mesh.pod("client");
    let dig = |arguments: &str| {
        // Nothing has the resolver's address.
        let line = format!("dig +short +time=10 +tries=1 @192.0.2.53 {arguments}");
        let mut found: Vec<String> = client.shell(&line).unwrap().lines().map(str::to_owned).collect();
        found.sort();
        found
    };
    let pods = ["web-1", "web-2"].map(|p| mesh.pod(p).ipv4.to_string());
    assert_eq!(dig("client.shop.svc.cluster.local A"), [vips(7)[0].to_string()]);
    assert_eq!(dig("+tcp client.shop.svc.cluster.local AAAA"), [vips(7)[1].to_string()]);
    assert_eq!(dig("web.shop.svc.cluster.local A"), pods);
    // The address of a host that has none of its own: made by the mesh, and served.
    let _server = serve(mesh.pod("old"), PORT);
    let made = dig("static.example A");
    let to = SocketAddr::new(made[0].parse().unwrap(), 80);
    assert_eq!(ask(client, to).await.unwrap().server, "old");
}
