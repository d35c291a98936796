//! Services and pods: whatever a client dials, the right server sees the client's own address.

use std::net::SocketAddr;

use harness::netns::root_or_skip;

use crate::lab::Mesh;
use crate::lab::manifests::{ServiceManifest, join, vips};
use crate::lab::traffic::{PORT, ask, serve, talk};

#[tokio::test]
async fn a_server_is_reached_by_service_and_by_pod_and_sees_the_clients_address() {
    if !root_or_skip("services") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client", "near"]), ("b", &["web"])]).await;
    let services = [
        ServiceManifest::new("web", 1, 80, PORT),
        ServiceManifest::new("near", 2, 80, PORT),
        ServiceManifest::new("client", 3, 80, PORT),
    ];
    mesh.apply("services", &join(services.map(|s| s.to_string()))).await;
    let _servers = ["client", "near", "web"].map(|name| serve(mesh.pod(name), PORT));
    let client = mesh.pod("client");
    for (number, name) in [(1, "web"), (2, "near"), (3, "client")] {
        let pod = mesh.pod(name);
        for v6 in [false, true] {
            let by_service = SocketAddr::new(vips(number)[usize::from(v6)], 80);
            let by_pod = SocketAddr::new(pod.ip(v6), PORT);
            for to in [by_service, by_pod] {
                let mut talk = talk(client, to).await.unwrap_or_else(|e| panic!("{name} by {to}: {e}"));
                assert_eq!(talk.hello.server, name);
                assert_eq!(talk.hello.client.ip(), client.ip(v6), "{name} by {to}");
                assert_eq!(talk.hello.reached, by_pod, "{name} by {to}");
                talk.echo().await.unwrap();
            }
        }
    }
    let _ = ask(client, SocketAddr::new(vips(1)[0], 81)).await.unwrap_err();
}
