//! ztunnel ends under load: with SIGTERM it drains, with SIGKILL everything stops, and nothing leaks.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use harness::netns::{Host, Process, root_or_skip};
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{MOMENT, Mesh, Options, eventually};

/// Clients that connect again and again.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU32>,
    refused: Arc<AtomicU32>,
    tasks: JoinSet<()>,
}

impl Load {
    async fn start(clients: &[(&Host, SocketAddr)]) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            served: Arc::default(),
            refused: Arc::default(),
            tasks: JoinSet::new(),
        };
        for (client, to) in clients.iter().flat_map(|c| [c; 4]) {
            let (client, to) = ((*client).clone(), *to);
            let (stop, served, refused) = (load.stop.clone(), load.served.clone(), load.refused.clone());
            load.tasks.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let counter = if ask(&client, to).await.is_ok() { &served } else { &refused };
                    counter.fetch_add(1, Ordering::SeqCst);
                    sleep(Duration::from_millis(2)).await;
                }
            });
        }
        eventually("the load runs", async || load.counts().0 > 100).await;
        load
    }

    fn counts(&self) -> (u32, u32) {
        (self.served.load(Ordering::SeqCst), self.refused.load(Ordering::SeqCst))
    }

    async fn finish(mut self) -> (u32, u32) {
        self.stop.store(true, Ordering::SeqCst);
        while self.tasks.join_next().await.is_some() {}
        self.counts()
    }
}

#[tokio::test]
async fn a_drain_lets_open_connections_go_on_and_refuses_new_ones() {
    if !root_or_skip("SIGTERM under load") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web", "outside/old"])]);
    let options = Options::default().argument("--termination-grace-period").argument("4s");
    mesh.run("a", &Options::default()).await;
    mesh.run("b", &options).await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("old"), PORT)];
    let (client, web, old) = (mesh.pod("client").clone(), mesh.pod("web").clone(), mesh.pod("old").clone());
    let address = |host: &Host| SocketAddr::new(host.ipv4.into(), PORT);
    let (to_web, to_old) = (address(&web), address(&old));
    let mut open = [
        talk(&client, to_web).await.unwrap(),
        talk(&old, to_web).await.unwrap(),
        talk(&web, to_old).await.unwrap(),
    ];
    let load = Load::start(&[(&client, to_web), (&old, to_web), (&web, to_old)]).await;
    mesh.ztunnel("b").signal(Signal::SIGTERM);
    mesh.ztunnel("b").says(&["draining", "SIGTERM"]).await;
    eventually("new connections are refused", async || {
        ask(&old, to_web).await.is_err()
            && ask(&client, to_web).await.is_err()
            && ask(&web, to_old).await.is_err()
    })
    .await;
    assert!(mesh.ztunnel_mut("b").is_alive(), "it did not wait for the open connections");
    for talk in &mut open {
        talk.echo().await.unwrap_or_else(|e| panic!("{:?} is lost: {e}", talk.hello));
    }
    let ready = mesh.ztunnel("b").get(15021, "/healthz/ready").await;
    assert!(ready.is_err(), "it says that it is ready");
    // The grace period ends, and with it what is left.
    assert_eq!(mesh.ztunnel_mut("b").ended().await.code(), Some(0));
    for talk in &mut open {
        talk.end().await.unwrap_err();
    }
    let before = load.counts().0;
    sleep(MOMENT).await;
    let (served, refused) = load.finish().await;
    assert_eq!(served, before, "something got through without ztunnel");
    assert!(refused > 0);
    mesh.run("b", &options).await;
    ask(&client, to_web).await.unwrap();

    // With nothing open it does not wait.
    let started = tokio::time::Instant::now();
    let patient = Options::default().argument("--termination-grace-period").argument("1h");
    mesh.run("b", &patient).await;
    mesh.ztunnel("b").signal(Signal::SIGTERM);
    assert_eq!(mesh.ztunnel_mut("b").ended().await.code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(60));
}

/// Prints the TCP packets outside of tunnels that pass a node's link.
fn capture(node: &Host) -> Process {
    let mut command = Command::new("tcpdump");
    command.args(["-i", "eth0", "-n", "-l", "--immediate-mode", "tcp and not port 15008"]);
    node.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap()
}

/// The second packets of handshakes: somebody accepted a connection.
fn accepted(packets: &str) -> Vec<&str> {
    packets.lines().filter(|line| line.contains("Flags [S.]")).collect()
}

#[tokio::test]
async fn nothing_leaves_in_plaintext_when_ztunnel_is_killed_under_load() {
    if !root_or_skip("SIGKILL under load") {
        return;
    }
    let mut mesh = Mesh::start(&[("a", &["client", "outside/older"]), ("b", &["web", "outside/old"])]).await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("old"), PORT)];
    let client = mesh.pod("client").clone();
    let (older, old) = (mesh.pod("older").clone(), mesh.pod("old").clone());
    let mut tcpdump = capture(mesh.node("a"));
    let mut printed = tokio::process::ChildStdout::from_std(tcpdump.child().stdout.take().unwrap()).unwrap();
    let mut said = tokio::process::ChildStderr::from_std(tcpdump.child().stderr.take().unwrap()).unwrap();
    let mut begun = String::new();
    while !begun.contains("listening on") {
        begun.push(char::from(said.read_u8().await.unwrap()));
    }
    let mut clients = Vec::new();
    for v6 in [false, true] {
        clients.push((&client, SocketAddr::new(mesh.pod("web").ip(v6), PORT)));
    }
    let load = Load::start(&clients).await;
    for node in ["a", "b", "a"] {
        mesh.ztunnel_mut(node).signal(Signal::SIGKILL);
        let _ = mesh.ztunnel_mut(node).ended().await;
        let (_, before) = load.counts();
        eventually("the load is refused", async || load.counts().1 > before + 10).await;
        let (before, _) = load.counts();
        mesh.run(node, &Options::default()).await;
        eventually("the load is served again", async || load.counts().0 > before + 10).await;
    }
    let _ = load.finish().await;
    // What is plain to see is seen: the same capture finds a connection past the mesh.
    ask(&older, SocketAddr::new(old.ipv4.into(), PORT)).await.unwrap();
    ask(&older, SocketAddr::new(old.ipv6.into(), PORT)).await.unwrap();
    sleep(MOMENT).await;
    tcpdump.signal(Signal::SIGINT).unwrap();
    let mut packets = String::new();
    printed.read_to_string(&mut packets).await.unwrap();
    let seen = accepted(&packets);
    let expected =
        [format!("{}.{PORT} > {}", old.ipv4, older.ipv4), format!("{}.{PORT} > {}", old.ipv6, older.ipv6)];
    assert_eq!(seen.len(), 2, "{seen:#?}");
    for (seen, expected) in seen.iter().zip(&expected) {
        assert!(seen.contains(expected), "{seen}");
    }
}
