//! What the cases share: the table of back-ends and families, a ztunnel that only passes traffic on, and
//! applications to talk to.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capture::{Backend, Capture, Ports, Tools};
use harness::netns::{Host, Lab, root_or_skip, skip_without_ebpf};
use net::{AcceptLoop, AcceptStats, ByteCounts, ConnectOptions, ListenOptions, Netns, original_dst};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// No step of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A back-end and a family.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub backend: Backend,
    pub v6: bool,
}

impl Case {
    pub fn capture(self) -> Arc<dyn Capture> {
        capture::probe(self.backend, &Tools::default()).unwrap()
    }

    /// An address that a lab has no use for, of the case's family.
    pub fn elsewhere(self) -> IpAddr {
        if self.v6 { "2001:db8::1".parse().unwrap() } else { "198.51.100.1".parse().unwrap() }
    }

    pub fn addr(self, host: &Host, port: u16) -> SocketAddr {
        SocketAddr::new(host.ip(self.v6), port)
    }
}

/// Runs `test` for every back-end and both families, each in a runtime of its own, at the same time.
pub fn each_case(name: &str, test: impl AsyncFn(Case) + Sync) {
    if !root_or_skip(name) {
        return;
    }
    let backends = Backend::ALL.into_iter().filter(|backend| works(name, *backend));
    let cases = backends.flat_map(|backend| [false, true].map(|v6| Case { backend, v6 }));
    std::thread::scope(|scope| {
        for case in cases {
            let test = &test;
            let thread = std::thread::Builder::new().name(format!("{name} {case:?}"));
            thread.spawn_scoped(scope, move || block_on(test(case))).unwrap();
        }
    });
}

/// Whether a back-end is tested here. Older kernels lack what eBPF needs; what the others need is a package.
pub fn works(name: &str, backend: Backend) -> bool {
    match capture::probe(backend, &Tools::default()) {
        Err(missing) if backend == Backend::Ebpf => {
            skip_without_ebpf(&format!("{name} with ebpf"), &missing);
            false
        }
        _ => true,
    }
}

pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

pub async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it took too long")
}

/// Two nodes with pods: `client` on the first, `server` and `other` on the second.
pub fn two_nodes() -> Lab {
    Lab::builder().node("a", &["client", "third"]).node("b", &["server", "other"]).build().unwrap()
}

pub fn wildcard(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
}

/// What an application does: no mark, no options.
pub fn plain() -> ConnectOptions {
    ConnectOptions { mark: None, keepalive: None, ..ConnectOptions::default() }
}

pub fn app_listener(netns: &Netns, port: u16) -> TcpListener {
    net::listen(netns, wildcard(port), &ListenOptions::default()).unwrap()
}

/// Listens as ztunnel does, with its mark.
pub fn ztunnel_listener(netns: &Netns, port: u16) -> TcpListener {
    let options =
        ListenOptions { mark: Some(net::ZTUNNEL_MARK), transparent: true, ..ListenOptions::default() };
    net::listen(netns, wildcard(port), &options).unwrap()
}

/// Connects as an application of `netns` does.
pub async fn dial(netns: &Netns, to: SocketAddr) -> Result<TcpStream, io::ErrorKind> {
    net::connect(netns, &plain(), to, Duration::from_secs(3)).await.map_err(|error| error.kind())
}

/// An application that answers every connection with whom it sees, and then echoes.
pub fn start_app(netns: &Netns, port: u16) {
    let listener = app_listener(netns, port);
    tokio::spawn(async move {
        loop {
            let (mut stream, peer) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let greeting = format!("{}\n", peer.ip().to_canonical());
                let _ = stream.write_all(greeting.as_bytes()).await;
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

/// Reads whom the application sees.
pub async fn greeting(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    in_time(async {
        loop {
            match stream.read_u8().await.unwrap() {
                b'\n' => break,
                byte => line.push(byte),
            }
        }
    })
    .await;
    String::from_utf8(line).unwrap()
}

/// Sends and receives `text`.
pub async fn echo(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    in_time(stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(back, text.as_bytes());
}

/// A connection that the fake ztunnel took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub inbound: bool,
    pub peer: SocketAddr,
    pub original_dst: SocketAddr,
}

/// Listens where ztunnel does, and passes every connection on to where it was going: in from the client's own
/// address.
#[derive(Clone, Debug, Default)]
pub struct FakeZtunnel {
    taken: Arc<Mutex<Vec<Taken>>>,
}

impl FakeZtunnel {
    pub fn start(netns: &Netns) -> Self {
        let this = Self::default();
        let ports = Ports::default();
        for (port, inbound) in [(ports.outbound, false), (ports.inbound_plaintext, true)] {
            let listener = ztunnel_listener(netns, port);
            let mut accepting = AcceptLoop::new(listener, Arc::new(AcceptStats::default()));
            let (this, netns) = (this.clone(), netns.clone());
            tokio::spawn(async move {
                loop {
                    let (client, peer) = accepting.next().await;
                    let original_dst = original_dst(&client, peer).unwrap();
                    this.taken.lock().unwrap().push(Taken {
                        inbound,
                        peer: net::canonical(peer),
                        original_dst,
                    });
                    tokio::spawn(pass_on(netns.clone(), client, net::canonical(peer), original_dst, inbound));
                }
            });
        }
        this
    }

    /// The one connection that it took since the last call, or takes now.
    pub async fn took(&self) -> Taken {
        in_time(async {
            while self.taken.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let taken = self.taken();
        assert_eq!(taken.len(), 1, "{taken:?}");
        taken[0]
    }

    /// A connection to `server`, which it serves, at 8080, and one from there to `client` at 9090: both taken by it, and greeted.
    pub async fn both_ways(&self, case: Case, server: &Host, client: &Host) -> (TcpStream, TcpStream) {
        let mut inbound = dial(&client.netns, case.addr(server, 8080)).await.unwrap();
        greeting(&mut inbound).await;
        assert!(self.took().await.inbound);
        let mut outbound = dial(&server.netns, case.addr(client, 9090)).await.unwrap();
        greeting(&mut outbound).await;
        assert!(!self.took().await.inbound);
        (inbound, outbound)
    }

    /// What it took since the last call.
    pub fn taken(&self) -> Vec<Taken> {
        std::mem::take(&mut self.taken.lock().unwrap())
    }
}

async fn pass_on(netns: Netns, client: TcpStream, peer: SocketAddr, to: SocketAddr, inbound: bool) {
    if [15001, 15006, 15053].contains(&to.port()) {
        return net::reset(client);
    }
    let connect = async |port: Option<u16>| {
        let source = port.map(|port| SocketAddr::new(peer.ip(), port));
        let options = ConnectOptions { source, ..ConnectOptions::default() };
        net::connect(&netns, &options, to, Duration::from_secs(3)).await
    };
    let taken = |kind| matches!(kind, io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable);
    // As ztunnel: with the port of another connection of the client's to the same address, which the kernel may well give,
    // this one would be taken for that.
    let connected = match connect(inbound.then(|| peer.port() ^ 1)).await {
        Err(error) if taken(error.kind()) => connect(Some(0)).await,
        other => other,
    };
    match connected {
        Ok(server) => drop(net::copy(client, server, &ByteCounts::default()).await),
        Err(_) => net::reset(client),
    }
}
