//! What an application says first is sent behind the CONNECT, before the peer answers. It gets to one application at the
//! most, whatever the peer does; and to none that hasn't answered, where that is set.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use harness::netns::{Host, root_or_skip};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use crate::lab::manifests::{ServiceManifest, vips};
use crate::lab::peer::{END_HEADERS, HEADERS, Http2, Identity, SETTINGS, block, secured};
use crate::lab::traffic::{PORT, Server, dial, listen, serve_with};
use crate::lab::{MOMENT, Mesh, Options, PATIENCE};

const DATA: u8 = 0;
const END_STREAM: u8 = 1;

/// What a peer does to a CONNECT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// Answers 503 once data has come.
    Refused,
    /// Breaks the connection once data has come.
    Broken,
    /// Breaks the connection at once.
    BrokenAtOnce,
    /// Waits for data for a moment, and then answers 200.
    Answered,
}

/// The ztunnel of a pod, played by hand: tells of what came before its answer for each CONNECT, and behind it.
struct Peer {
    task: AbortHandle,
    told: mpsc::UnboundedReceiver<(Vec<u8>, Vec<u8>)>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer {
    fn start(host: &Host, identity: &Arc<Identity>, fate: Fate) -> Self {
        let (listener, identity) = (listen(host, 15008), identity.clone());
        let (tell, told) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (identity, tell) = (identity.clone(), tell.clone());
                tokio::spawn(async move {
                    let Ok(io) = secured(stream, &identity).await else { return };
                    // An error is the client's, which is looked at there.
                    let _ = serve(io, fate, &tell).await;
                });
            }
        });
        Self { task: task.abort_handle(), told }
    }
}

type Tell = mpsc::UnboundedSender<(Vec<u8>, Vec<u8>)>;

async fn serve(mut io: TlsStream<TcpStream>, fate: Fate, tell: &Tell) -> io::Result<()> {
    io.read_exact(&mut [0; 24]).await?;
    let mut http2 = Http2 { io };
    http2.send(SETTINGS, 0, 0, &[]).await?;
    loop {
        let request = http2.answer().await?;
        if request.kind != HEADERS {
            continue;
        }
        let data = async |http2: &mut Http2<TlsStream<TcpStream>>| {
            loop {
                let frame = http2.answer_of(request.stream).await?;
                if frame.kind == DATA && !frame.payload.is_empty() {
                    return io::Result::Ok(frame.payload);
                }
            }
        };
        let (before, behind) = match fate {
            Fate::BrokenAtOnce => (Vec::new(), Vec::new()),
            Fate::Refused | Fate::Broken => (data(&mut http2).await?, Vec::new()),
            Fate::Answered => {
                let before = timeout(MOMENT, data(&mut http2)).await;
                http2.send(HEADERS, END_HEADERS, request.stream, &[0x88]).await?;
                match before {
                    Ok(before) => (before?, Vec::new()),
                    Err(_) => (Vec::new(), data(&mut http2).await?),
                }
            }
        };
        let _ = tell.send((before, behind));
        match fate {
            Fate::Broken | Fate::BrokenAtOnce => return Ok(()),
            Fate::Refused => {
                let status = block(&[(":status", "503")]);
                http2.send(HEADERS, END_HEADERS | END_STREAM, request.stream, &status).await?;
            }
            Fate::Answered => {}
        }
    }
}

/// How often each application got what.
type Got = Arc<Mutex<HashMap<String, usize>>>;

/// An application that speaks first, and notes the line that it gets.
fn application(host: &Host, got: &Got) -> Server {
    let got = got.clone();
    serve_with(host, PORT, move |mut stream: TcpStream, hello| {
        let got = got.clone();
        async move {
            stream.write_all(format!("{}\n", hello.server).as_bytes()).await?;
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await?;
            *got.lock().unwrap().entry(line.trim().to_owned()).or_default() += 1;
            Ok(())
        }
    })
}

/// Who answers a client that says `line` first.
async fn say(from: &Host, to: SocketAddr, line: &str) -> io::Result<String> {
    let mut stream = BufReader::new(dial(from, to).await?);
    stream.get_mut().write_all(line.as_bytes()).await?;
    let mut who = String::new();
    timeout(PATIENCE, stream.read_line(&mut who)).await??;
    if who.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(who.trim().to_owned()) }
}

#[tokio::test]
async fn what_may_have_arrived_is_sent_to_no_other_endpoint() {
    if !root_or_skip("data ahead of an answer") {
        return;
    }
    // Each service has a pod whose ztunnel is real, and one whose ztunnel is played.
    let mut mesh = Mesh::build(&[
        ("a", &["client"]),
        ("b", &["refuse-1", "break-1", "mute-1"]),
        ("c", &["refuse-2", "break-2", "mute-2"]),
    ]);
    for (name, number) in [("refuse", 1), ("break", 2), ("mute", 3)] {
        mesh.put(&format!("service-{name}"), &ServiceManifest::new(name, number, 80, PORT).to_string());
    }
    for node in ["a", "b"] {
        mesh.run(node, &Options::default()).await;
    }
    let got = Got::default();
    let _applications = ["refuse-1", "break-1", "mute-1"].map(|name| application(mesh.pod(name), &got));
    for (name, number, fate, goes_on) in [
        ("refuse", 1, Fate::Refused, true),
        ("break", 2, Fate::Broken, false),
        // It has said nothing by then.
        ("mute", 3, Fate::BrokenAtOnce, true),
    ] {
        let pod = format!("{name}-2");
        let identity = Arc::new(Identity::of(&mesh, &format!("spiffe://cluster.local/ns/shop/sa/{pod}")));
        let mut peer = Peer::start(mesh.pod(&pod), &identity, fate);
        let to = SocketAddr::new(vips(number)[0], 80);
        let mut struck = None;
        for n in 0..100 {
            let line = if fate == Fate::BrokenAtOnce { String::new() } else { format!("{name} says {n}\n") };
            let who = say(mesh.pod("client"), to, &line).await;
            let Ok(told) = peer.told.try_recv() else {
                assert_eq!(who.unwrap(), format!("{name}-1"), "nobody else was asked");
                continue;
            };
            assert_eq!(told.0, line.as_bytes(), "{fate:?}: what came ahead");
            struck = Some((line, who));
            break;
        }
        let (line, who) = struck.expect("the endpoint was never chosen");
        assert_eq!(who.is_ok(), goes_on, "{fate:?}: {who:?}");
        if goes_on {
            assert_eq!(who.unwrap(), format!("{name}-1"));
        }
        if !line.is_empty() {
            let times = async || got.lock().unwrap().get(line.trim()).copied().unwrap_or(0);
            let wanted = usize::from(goes_on);
            crate::lab::eventually("the application has got it", async || times().await >= wanted).await;
            assert_eq!(times().await, wanted, "{fate:?}");
        }
    }
}

/// What comes ahead of the answer to a CONNECT for `to`, by a ztunnel with `--early-data` of `setting`.
async fn ahead(mesh: &mut Mesh, setting: &str, peer: &mut Peer, to: SocketAddr) -> bool {
    mesh.run("a", &Options::default().argument("--early-data").argument(setting)).await;
    let mut stream = dial(mesh.pod("client"), to).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let told = timeout(PATIENCE, peer.told.recv()).await.unwrap().unwrap();
    let (ahead, behind) = (told.0 == b"hello", told.1 == b"hello");
    assert!(ahead != behind, "{told:?}");
    ahead
}

#[tokio::test]
async fn nothing_is_sent_ahead_to_those_that_do_not_want_it() {
    if !root_or_skip("--early-data") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("c", &["pod", "web", "waypoint"])]);
    mesh.put_waypoint("waypoint", 9);
    // The first makes the CA.
    mesh.run("a", &Options::default()).await;
    let bound = ServiceManifest::new("web", 1, 80, PORT).to_string();
    mesh.put(
        "web",
        &bound.replace("namespace: shop}", "namespace: shop, labels: {istio.io/use-waypoint: waypoint}}"),
    );
    let of = |name: &str| Arc::new(Identity::of(&mesh, &format!("spiffe://cluster.local/ns/shop/sa/{name}")));
    let (pod, waypoint) = (of("pod"), of("waypoint"));
    let mut pod = Peer::start(mesh.pod("pod"), &pod, Fate::Answered);
    let mut waypoint = Peer::start(mesh.pod("waypoint"), &waypoint, Fate::Answered);
    let to_pod = SocketAddr::new(mesh.pod("pod").ipv4.into(), PORT);
    let to_waypoint = SocketAddr::new(vips(1)[0], 80);
    for (setting, early_to_pod, early_to_waypoint) in
        [("always", true, true), ("workloads", true, false), ("never", false, false)]
    {
        assert_eq!(ahead(&mut mesh, setting, &mut pod, to_pod).await, early_to_pod, "{setting}");
        let early = ahead(&mut mesh, setting, &mut waypoint, to_waypoint).await;
        assert_eq!(early, early_to_waypoint, "{setting}, to a waypoint");
    }
}
