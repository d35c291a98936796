//! The threads of the data plane: few connections of a pod are on one, many on all.

use std::net::SocketAddr;
use std::time::Duration;

use harness::netns::root_or_skip;
use tokio::time::sleep;

use crate::lab::traffic::{PORT, Talk, serve, talk};
use crate::lab::{Mesh, Options, Ztunnel, eventually};

/// How many connections each thread carries.
async fn carried(ztunnel: &Ztunnel) -> Vec<u64> {
    let page = ztunnel.get(15020, "/metrics").await.unwrap();
    let of = |line: &str| {
        line.strip_prefix("culvert_thread_connections{")?.rsplit(' ').next()?.parse::<f64>().ok()
    };
    page.lines().filter_map(of).map(|number| number as u64).collect()
}

#[tokio::test]
async fn few_connections_are_on_one_thread_and_many_on_all() {
    if !root_or_skip("threads") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web"])]);
    for node in ["a", "b"] {
        mesh.run(node, &Options::default().argument("--worker-threads=2")).await;
    }
    let _server = serve(mesh.pod("web"), PORT);
    let to = SocketAddr::new(mesh.pod("web").ipv4.into(), PORT);
    let mut open: Vec<Talk> = Vec::new();
    for _ in 0..6 {
        open.push(talk(mesh.pod("client"), to).await.unwrap());
        // Handshakes of a debug build would pass for a thread that is busy.
        sleep(Duration::from_millis(200)).await;
    }
    let few = carried(mesh.ztunnel("a")).await;
    assert!(few == [6, 0] || few == [0, 6], "{few:?}");
    for _ in 0..60 {
        open.push(talk(mesh.pod("client"), to).await.unwrap());
    }
    let many = carried(mesh.ztunnel("a")).await;
    assert!(many.iter().sum::<u64>() == 66 && many.iter().all(|number| *number > 0), "{many:?}");
    // As many connections of the two threads' pools come to the other node, on a thread each.
    eventually("both threads of the server's node have one", async || {
        carried(mesh.ztunnel("b")).await == [1, 1]
    })
    .await;
    for talk in &mut open {
        talk.echo().await.unwrap();
    }
    drop(open);
    eventually("nothing is carried", async || carried(mesh.ztunnel("a")).await == [0, 0]).await;
}
