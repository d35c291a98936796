//! Members of the mesh that overdo it. Their connections end, memory stays bounded, and others are served all the
//! while.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use harness::netns::{Host, root_or_skip};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::lab::peer::{
    ACK, CONTINUATION, END_HEADERS, GOAWAY, HEADERS, Http2, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE, block,
    connect, frame,
};
use crate::lab::traffic::{PORT, ask, serve, serve_with, talk};
use crate::lab::{Mesh, Options, PATIENCE, eventually};

const MEMBER: &str = "spiffe://cluster.local/ns/shop/sa/member";
/// Resident memory may grow by so much under an attack, kB. A debug build's own needs are in it.
const GROWTH_KB: u64 = 100_000;

async fn mesh() -> Mesh {
    Mesh::start(&[("a", &["client", "other", "outside/old"]), ("b", &["web"])]).await
}

fn web(mesh: &Mesh, port: u16) -> SocketAddr {
    SocketAddr::new(mesh.pod("web").ipv4.into(), port)
}

/// A client that uses an open connection and makes new ones, without end.
struct Bystander {
    rounds: Arc<AtomicU32>,
    task: JoinHandle<io::Error>,
}

impl Bystander {
    /// Starts one that is served.
    async fn start(client: &Host, to: SocketAddr) -> Self {
        let rounds = Arc::new(AtomicU32::new(0));
        let (client, counted) = (client.clone(), rounds.clone());
        let endless = async move {
            let mut open = talk(&client, to).await?;
            loop {
                open.echo().await?;
                ask(&client, to).await?;
                counted.fetch_add(1, Ordering::SeqCst);
                sleep(Duration::from_millis(5)).await;
            }
        };
        let task = tokio::spawn(async move {
            let result: io::Result<Infallible> = endless.await;
            result.unwrap_err()
        });
        let started = Self { rounds, task };
        started.is_served().await;
        started
    }

    /// That it goes on, and never failed.
    async fn is_served(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        eventually("the bystander is served", async || {
            self.task.is_finished() || self.rounds.load(Ordering::SeqCst) > before + 2
        })
        .await;
        assert!(!self.task.is_finished(), "the bystander's connection, or a new one, failed");
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sends `bytes` again and again until the other side has enough: an error, or the end of the connection.
async fn overdo(
    mut peer: Http2<tokio_rustls::client::TlsStream<TcpStream>>,
    name: &str,
    mut next: impl FnMut() -> Vec<u8>,
) {
    let flood = async {
        loop {
            let bytes = next();
            if peer.io.write_all(&bytes).await.is_err() || peer.io.flush().await.is_err() {
                return;
            }
        }
    };
    timeout(PATIENCE, flood).await.unwrap_or_else(|_| panic!("nobody stops a flood of {name}"));
}

#[tokio::test]
async fn floods_of_frames_end_the_connection_and_disturb_nobody() {
    if !root_or_skip("floods") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let ztunnel = mesh.ztunnel("b");
    let bystander = Bystander::start(mesh.pod("client"), web(&mesh, PORT)).await;
    ask(mesh.pod("client"), web(&mesh, PORT)).await.unwrap();
    let before = ztunnel.resident_kb();
    let request = connect(&web(&mesh, PORT).to_string());
    let large = block(&[("x-large", &"x".repeat(120))]).repeat(130);
    let mut stream = 1_u32;
    let mut next_stream = || {
        stream += 2;
        stream - 2
    };
    type Next<'a> = Box<dyn FnMut() -> Vec<u8> + 'a>;
    let floods: [(&str, Next<'_>); 6] = [
        ("PING", Box::new(|| frame(PING, 0, 0, &[0; 8]).repeat(100))),
        ("SETTINGS", Box::new(|| frame(SETTINGS, 0, 0, &[]).repeat(100))),
        ("empty WINDOW_UPDATE", Box::new(|| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(100))),
        (
            "rapid resets",
            Box::new(|| {
                let stream = next_stream();
                let reset = frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]);
                [frame(HEADERS, END_HEADERS, stream, &request), reset].concat()
            }),
        ),
        ("CONTINUATION", {
            let mut first = true;
            let large = &large;
            Box::new(move || {
                let start = if std::mem::take(&mut first) { frame(HEADERS, 0, 1, large) } else { Vec::new() };
                [start, frame(CONTINUATION, 0, 1, large)].concat()
            })
        }),
        ("acknowledged SETTINGS", Box::new(|| frame(SETTINGS, ACK, 0, &[]).repeat(100))),
    ];
    for (name, next) in floods {
        let peer = Http2::begin(&mesh, mesh.pod("old"), web(&mesh, 15008), MEMBER).await.unwrap();
        overdo(peer, name, next).await;
        bystander.is_served().await;
    }
    eventually("the connections are counted as over", async || {
        ztunnel.metric("culvert_hbone_inbound_connections").await <= 2.0
    })
    .await;
    assert!(ztunnel.metric("culvert_hbone_inbound_floods_total").await >= 3.0);
    ztunnel.says(&["HBONE connection ended", "excessive load"]).await;
    bystander.is_served().await;
    let growth = ztunnel.resident_kb().saturating_sub(before);
    assert!(growth < GROWTH_KB, "{growth} kB more are resident");
}

#[tokio::test]
async fn a_member_that_takes_all_streams_leaves_others_theirs() {
    if !root_or_skip("many streams") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let ztunnel = mesh.ztunnel("b");
    ask(mesh.pod("client"), web(&mesh, PORT)).await.unwrap();
    let before = ztunnel.resident_kb();
    let bystander = Bystander::start(mesh.pod("client"), web(&mesh, PORT)).await;
    let mut peer = Http2::begin(&mesh, mesh.pod("old"), web(&mesh, 15008), MEMBER).await.unwrap();
    let request = connect(&web(&mesh, PORT).to_string());
    let mut all = Vec::new();
    for stream in 0..1500 {
        all.extend(frame(HEADERS, END_HEADERS, stream * 2 + 1, &request));
    }
    peer.io.write_all(&all).await.unwrap();
    peer.io.flush().await.unwrap();
    let (mut opened, mut refused) = (0, 0);
    while opened + refused < 1500 {
        let answer =
            peer.answer().await.unwrap_or_else(|e| panic!("{opened} opened, {refused} refused: {e}"));
        opened += u32::from(answer.status() == Some(0x88));
        refused += u32::from(answer.kind == RST_STREAM);
    }
    assert_eq!((opened, refused), (500, 1000), "the limit of streams");
    assert_eq!(ztunnel.metric("istio_tcp_sockets_open").await as u32 / 500, 1);
    bystander.is_served().await;
    let growth = ztunnel.resident_kb().saturating_sub(before);
    assert!(growth < GROWTH_KB, "{growth} kB more are resident");
    drop((peer, bystander));
    eventually("all are over", async || ztunnel.metric("istio_tcp_sockets_open").await == 0.0).await;
}

#[tokio::test]
async fn peers_that_do_not_read_cost_their_own_speed_and_not_our_memory() {
    if !root_or_skip("slow readers") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "other", "outside/old"]), ("b", &["web"])]);
    // Beside what the tunnels hold there are sockets, and what a debug build needs.
    let limit = |mib: &str| Options::default().argument("--tunnel-memory").argument(mib);
    mesh.run("a", &limit("24")).await;
    mesh.run("b", &limit("24")).await;
    let _server = serve(mesh.pod("web"), PORT);
    let _endless = serve_with(mesh.pod("web"), 9000, async |mut stream: TcpStream, _| {
        let data = vec![7; 1 << 20];
        loop {
            stream.write_all(&data).await?;
        }
    });
    ask(mesh.pod("client"), web(&mesh, PORT)).await.unwrap();
    let before = mesh.ztunnel("b").resident_kb() + mesh.ztunnel("a").resident_kb();
    let bystander = Bystander::start(mesh.pod("other"), web(&mesh, PORT)).await;
    // Through a ztunnel of their own, by hand with the largest windows, and in plaintext: nobody reads.
    let mut held = Vec::new();
    for _ in 0..32 {
        held.push(crate::lab::traffic::dial(mesh.pod("client"), web(&mesh, 9000)).await.unwrap());
        held.push(crate::lab::traffic::dial(mesh.pod("old"), web(&mesh, 9000)).await.unwrap());
    }
    let mut peer = Http2::begin(&mesh, mesh.pod("old"), web(&mesh, 15008), MEMBER).await.unwrap();
    let largest = [0, 4, 0x7f, 0xff, 0xff, 0xff];
    peer.send(SETTINGS, 0, 0, &largest).await.unwrap();
    peer.send(WINDOW_UPDATE, 0, 0, &(0x7fff_ffff_u32 - 65_535).to_be_bytes()).await.unwrap();
    let request = connect(&web(&mesh, 9000).to_string());
    for stream in 0..64 {
        peer.send(HEADERS, END_HEADERS, stream * 2 + 1, &request).await.unwrap();
    }
    sleep(Duration::from_secs(3)).await;
    let growth = (mesh.ztunnel("b").resident_kb() + mesh.ztunnel("a").resident_kb()).saturating_sub(before);
    assert!(growth < GROWTH_KB, "{growth} kB more are resident");
    bystander.is_served().await;
    // 32 tunnels with windows of 4 MiB each are more than may be held.
    for node in ["a", "b"] {
        let held = mesh.ztunnel(node).metric("culvert_hbone_held_bytes").await;
        assert!(held <= mesh.ztunnel(node).metric("culvert_hbone_held_limit_bytes").await, "{node}: {held}");
    }
    assert!(mesh.ztunnel("a").metric("culvert_hbone_tunnels_cut_total").await >= 1.0);
    mesh.ztunnel("a").says(&["bytes were not taken, and all tunnels together hold the limit"]).await;
}

#[tokio::test]
async fn connections_without_end_are_limited_and_leave_others_theirs() {
    if !root_or_skip("many connections") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "outside/old"]), ("b", &["web"])]);
    // One thread, one connection of the bystander: it needs no other one when there is no room.
    mesh.run("a", &Options::default().argument("--worker-threads").argument("1")).await;
    // A twelfth of these is for the HBONE connections of peers to one pod: 166.
    mesh.run("b", &Options::default().wrapper(&["prlimit", "--nofile=2000:2000"])).await;
    let _server = serve(mesh.pod("web"), PORT);
    let ztunnel = mesh.ztunnel("b");
    let bystander = Bystander::start(mesh.pod("client"), web(&mesh, PORT)).await;
    let request = connect(&web(&mesh, PORT).to_string());
    let begin = async || Http2::begin(&mesh, mesh.pod("old"), web(&mesh, 15008), MEMBER).await;
    // Idle ones are told to go, and new ones served.
    let mut idle = Vec::new();
    for _ in 0..170 {
        idle.push(begin().await.unwrap());
    }
    let first = timeout(PATIENCE, idle[0].answer()).await.unwrap().unwrap();
    assert_eq!(first.kind, GOAWAY);
    assert!(ztunnel.metric("culvert_hbone_inbound_made_room_total").await >= 1.0);
    bystander.is_served().await;
    drop(idle);
    eventually("they are gone", async || ztunnel.metric("culvert_hbone_inbound_connections").await <= 2.0)
        .await;
    // While all are in use, new ones are refused.
    let mut busy = Vec::new();
    let mut refused = 0;
    for _ in 0..180 {
        let opened = async {
            let mut peer = begin().await?;
            peer.send(HEADERS, END_HEADERS, 1, &request).await?;
            peer.answer().await.map(|answer| (peer, answer))
        };
        match opened.await {
            Ok((peer, answer)) => {
                assert_eq!(answer.status(), Some(0x88));
                busy.push(peer);
            }
            Err(_) => refused += 1,
        }
    }
    assert!((160..=166).contains(&busy.len()), "{} and {refused} refused", busy.len());
    assert!(ztunnel.metric("culvert_hbone_inbound_without_room_total").await >= 10.0);
    ztunnel.says(&["HBONE connections, the limit, and none may be closed for this one"]).await;
    bystander.is_served().await;
}
