//! A waypoint between two nodes' ztunnels: what is bound to it is reached through it and in no other way.

use std::net::SocketAddr;

use harness::netns::root_or_skip;
use nix::sys::signal::Signal;

use crate::lab::manifests::{node_local, vips};
use crate::lab::traffic::{Http, PORT, ask, request, serve, serve_http};
use crate::lab::waypoint::{Waypoint, program};
use crate::lab::{Mesh, eventually};

const WEB: u8 = 1;

fn web_v4() -> SocketAddr {
    SocketAddr::new(vips(WEB)[0], 80)
}

/// The Service `web`, bound or not: port 80 is HTTP, of port 81 nothing is said, port 82 is TCP.
fn web(bound: bool) -> String {
    let [v4, v6] = vips(WEB);
    let labels = if bound { ", labels: {istio.io/use-waypoint: waypoint}" } else { "" };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop{labels}}}
spec:
  clusterIP: {v4}
  clusterIPs: [{v4}, \"{v6}\"]
  ipFamilies: [IPv4, IPv6]
  selector: {{app: web}}
  ports:
  - {{name: http, port: 80, targetPort: {PORT}}}
  - {{name: any, port: 81, targetPort: {PORT}}}
  - {{name: tcp, port: 82, targetPort: 9000}}
"
    )
}

/// Requests with `x-to: other` go to the Service `other`; the path `/old` is called `/new` there.
const ROUTES: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules:
  - matches: [{headers: [{name: x-to, value: other}]}]
    filters:
    - type: URLRewrite
      urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
    - type: RequestHeaderModifier
      requestHeaderModifier: {add: [{name: x-added, value: by-route}]}
    backendRefs: [{name: other, port: 80}]
  - backendRefs: [{name: web, port: 80}]
";

const OTHER: &str = "apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
spec:
  clusterIP: 10.96.0.2
  clusterIPs: [10.96.0.2]
  selector: {app: other}
  ports: [{name: http, port: 80, targetPort: 8080}]
";

/// `client` may do all but DELETE.
const POLICIES: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: client, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
";

/// Two nodes, and a waypoint on the second; `web` is bound to it.
async fn bound(program: &std::path::Path, arguments: &[&str]) -> (Mesh, Waypoint) {
    let pods = [("a", &["client", "stranger", "outside/legacy"][..]), ("b", &["web", "other", "waypoint"])];
    let mut mesh = Mesh::build(&pods);
    mesh.put_waypoint("waypoint", 9);
    mesh.put("web", &web(true));
    mesh.put("other", OTHER);
    mesh.put("routes", ROUTES);
    mesh.put("policies", POLICIES);
    for (node, _) in &pods {
        mesh.run(node, &crate::lab::Options::default()).await;
    }
    let waypoint = mesh.run_waypoint(program, "waypoint", arguments).await;
    (mesh, waypoint)
}

#[tokio::test]
async fn requests_are_routed_and_policed_and_there_is_no_way_around() {
    let (true, Some(program)) = (root_or_skip("waypoint"), program()) else { return };
    let (mesh, waypoint) = bound(&program, &["--forwarded-for", "append"]).await;
    let _servers = ["web", "other"].map(|name| serve_http(mesh.pod(name), PORT));
    let (client, stranger) = (mesh.pod("client"), mesh.pod("stranger"));
    for v6 in [false, true] {
        let to = SocketAddr::new(vips(WEB)[usize::from(v6)], 80);
        let (status, text) = request(client, to, "GET /a?b=c", "").await.unwrap();
        assert_eq!(status, 200, "{text}");
        assert!(text.contains("\nweb ") || text.contains("\r\n\r\nweb "), "{text}");
        assert!(text.contains("GET /a?b=c HTTP/1.1\r\n"), "{text}");
        assert!(text.contains(&format!("x-forwarded-for: {}\r\n", client.ip(v6))), "{text}");
    }
    let (status, text) = request(client, web_v4(), "GET /old", "x-to: other\r\n").await.unwrap();
    assert_eq!(status, 200);
    assert!(text.contains("\r\n\r\nother ") && text.contains("x-added: by-route"), "{text}");
    assert!(text.contains("GET /new/old HTTP/1.1"), "{text}");

    // Policies, for the client and its request.
    let mut connection = Http::dial(client, web_v4()).await.unwrap();
    assert_eq!(connection.ask("GET /", "").await.unwrap().0, 200);
    let (status, text) = connection.ask("DELETE /", "").await.unwrap();
    assert_eq!((status, text.contains("RBAC: access denied")), (403, true), "{text}");
    assert_eq!(connection.ask("GET /", "").await.unwrap().0, 200);
    assert_eq!(request(stranger, web_v4(), "GET /", "").await.unwrap().0, 403);

    // Past the waypoint: by the pod's address, from within the mesh and from outside.
    let by_pod = SocketAddr::new(mesh.pod("web").ip(false), PORT);
    assert!(request(client, by_pod, "GET /", "").await.is_err());
    assert!(request(mesh.pod("legacy"), by_pod, "GET /", "").await.is_err());
    // What is not bound is as it was.
    let other = SocketAddr::new(mesh.pod("other").ip(false), PORT);
    assert_eq!(request(client, other, "GET /", "").await.unwrap().0, 200);

    // A change holds for the next request, also of a connection from before.
    mesh.put("policies", &POLICIES.replace("DELETE", "GET"));
    eventually("the change is in force", async || connection.ask("GET /", "").await.unwrap().0 == 403).await;
    assert_eq!(connection.ask("DELETE /", "").await.unwrap().0, 200);

    let metrics = waypoint.get(15020, "/metrics").await.unwrap();
    let counted = |l: &str| l.starts_with("istio_requests_total{") && l.contains("response_code=\"403\"");
    assert!(metrics.lines().any(counted), "{metrics}");
    assert!(waypoint.get(15000, "/config_dump").await.unwrap().contains("HTTPRoute shop/web rule 0"));
    println!("the waypoint has {} kB resident", waypoint.resident_kb());
}

#[tokio::test]
async fn what_is_bound_goes_through_its_waypoint_also_where_connections_stay_on_the_node() {
    let (true, Some(program)) = (root_or_skip("waypoint and nodeLocal: direct"), program()) else { return };
    let mut mesh = Mesh::build(&[("a", &["client", "web", "other", "waypoint"])]);
    mesh.put_waypoint("waypoint", 9);
    for (name, text) in [
        ("web", web(true)),
        ("other", OTHER.to_owned()),
        ("routes", ROUTES.to_owned()),
        ("mesh", node_local("direct")),
    ] {
        mesh.put(name, &text);
    }
    mesh.put("policies", POLICIES);
    mesh.run("a", &crate::lab::Options::default()).await;
    let _waypoint = mesh.run_waypoint(&program, "waypoint", &[]).await;
    let _servers = ["web", "other"].map(|name| serve_http(mesh.pod(name), PORT));
    let client = mesh.pod("client");
    assert_eq!(request(client, web_v4(), "GET /", "").await.unwrap().0, 200);
    assert_eq!(request(client, web_v4(), "DELETE /", "").await.unwrap().0, 403);
    let by_pod = |name: &str| SocketAddr::new(mesh.pod(name).ip(false), PORT);
    assert!(request(client, by_pod("web"), "GET /", "").await.is_err());
    assert_eq!(request(client, by_pod("other"), "GET /", "").await.unwrap().0, 200);
    let a = mesh.ztunnel("a");
    let to = |address: SocketAddr, direction: &'static str| {
        let address = address.to_string();
        move |c: &serde_json::Value| c["destination"] == address && c["direction"] == direction
    };
    assert_eq!(a.last(to(web_v4(), "outbound")).await["carrier"], "hbone");
    assert_eq!(a.last(to(by_pod("other"), "outbound")).await["carrier"], "node-local");
    // The way around is refused by the policy that lets in only the waypoint.
    let refused = a.last(to(by_pod("web"), "outbound")).await;
    assert!(refused["error"].as_str().unwrap().contains("denied"), "{refused}");
}

#[tokio::test]
async fn other_protocols_pass_and_servers_may_speak_first() {
    let (true, Some(program)) = (root_or_skip("waypoint"), program()) else { return };
    let (mesh, _waypoint) = bound(&program, &["--detect-timeout", "300ms"]).await;
    let (client, stranger) = (mesh.pod("client"), mesh.pod("stranger"));
    let _bytes = [serve(mesh.pod("web"), 9000), serve(mesh.pod("web"), PORT)];
    let to = |port| SocketAddr::new(vips(WEB)[0], port);
    // A DENY policy that asks for a method refuses what shows none.
    assert!(ask(client, to(82)).await.is_err());
    mesh.put("policies", POLICIES.split("---").next().unwrap());
    eventually("the change is in force", async || ask(client, to(82)).await.is_ok()).await;
    // It speaks first, at a port of which TCP is said. Where nothing is said and there are HTTP routes, bytes would pass them by.
    assert_eq!(ask(client, to(82)).await.unwrap().server, "web");
    assert!(ask(stranger, to(82)).await.is_err());
    assert!(ask(client, to(81)).await.is_err());
}

#[tokio::test]
async fn what_is_bound_is_refused_without_its_waypoint_and_a_drain_loses_no_request() {
    let (true, Some(program)) = (root_or_skip("waypoint"), program()) else { return };
    let (mesh, mut waypoint) = bound(&program, &["--drain-delay", "200ms"]).await;
    let _server = serve_http(mesh.pod("web"), PORT);
    let client = mesh.pod("client");
    let mut idle = Http::dial(client, web_v4()).await.unwrap();
    assert_eq!(idle.ask("GET /", "").await.unwrap().0, 200);
    let mut busy = Http::dial(client, web_v4()).await.unwrap();
    busy.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\no").await.unwrap();
    waypoint.signal(Signal::SIGTERM);
    eventually("it is not ready", async || waypoint.get(15021, "/healthz/ready").await.is_none()).await;
    // Idle connections are closed in good order; what is under way is finished.
    assert!(idle.answer().await.is_err());
    busy.send("k").await.unwrap();
    assert_eq!(busy.answer().await.unwrap().0, 200);
    assert!(waypoint.ended().await.success());
    assert!(request(client, web_v4(), "GET /", "").await.is_err());
    let _again = mesh.run_waypoint(&program, "waypoint", &[]).await;
    eventually("it is served again", async || request(client, web_v4(), "GET /", "").await.is_ok()).await;
}
