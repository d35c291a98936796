//! What the cases share: a node with pods, an agent, a ztunnel that only listens, and a cluster that is a table.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capture::{Backend, Capture, Drift, Error, Installed, Rules, Tools};
use futures_util::future::BoxFuture;
use harness::netns::{Host, Lab, Process};
use net::seqpacket::Seqpacket;
use net::{ConnectOptions, ListenOptions, Netns, ZTUNNEL_MARK};
use node_agent::cluster::{Api, ApiError, Cluster, Mode, Notice};
use node_agent::metrics::Metrics;
use node_agent::node::{AddRequest, Answer, Node, Parts, Refusal, Times};
use node_agent::pod::{Places, Pod};
use node_agent::probes::KubeletProbes;
use node_agent::record::Record;
use node_agent::zds::{PodIdentity, Ztunnels};
use process::metrics::Registry;
use prost::Message;
use proto::wire::zds::workload_request::Payload;
use proto::wire::zds::{Ack, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

pub const PATIENCE: Duration = Duration::from_secs(15);
pub const PORT: u16 = 8080;
static COUNTER: AtomicUsize = AtomicUsize::new(1);

/// A uid that no other pod of this machine has.
pub fn new_uid() -> String {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id())
}

/// The API server: what it knows, and what it was told.
#[derive(Default)]
pub struct Server {
    pub pods: Mutex<HashMap<String, Pod>>,
    pub namespaces: Mutex<HashMap<String, Mode>>,
    pub away: AtomicBool,
    pub notices: Mutex<Vec<Notice>>,
    pub annotated: Mutex<Vec<(String, Option<&'static str>)>>,
    /// How often it was asked.
    pub asked: AtomicUsize,
    /// Whether pods are deleted, for the watch too, while they are asked for.
    pub deletes: AtomicBool,
    cluster: Arc<Cluster>,
}

impl Server {
    fn answer(&self) -> Result<(), ApiError> {
        if self.away.load(Ordering::Relaxed) { Err(ApiError("it is away".to_owned())) } else { Ok(()) }
    }

    /// The watch of namespaces is broken, or no longer.
    pub fn breaks(&self, broken: bool) {
        let since = broken.then(tokio::time::Instant::now);
        self.cluster.update(|view| view.namespaces_broken = since);
    }

    /// Whether the watches name a pod.
    pub fn names(&self, uid: &str) -> bool {
        self.cluster.pod(uid).is_some()
    }

    /// What the watches say now.
    pub fn publish(&self) {
        let pods = self.pods.lock().unwrap().values().map(|p| (p.identity.uid.clone(), p.clone())).collect();
        let namespaces = self.namespaces.lock().unwrap().clone();
        self.cluster.update(|view| {
            (view.pods, view.namespaces) = (pods, namespaces);
            (view.all_pods, view.all_namespaces) = (true, true);
        });
    }

    pub fn label(&self, namespace: &str, mode: Option<&str>) {
        self.namespaces.lock().unwrap().insert(namespace.to_owned(), mode.map(str::to_owned));
        self.publish();
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Pod)) {
        change(self.pods.lock().unwrap().get_mut(name).unwrap());
        self.publish();
    }

    pub fn redirection(&self, name: &str) -> Option<String> {
        self.pods.lock().unwrap()[name].redirection.clone()
    }
}

pub struct TheApi(pub Arc<Server>);

impl Api for TheApi {
    fn pod<'a>(&'a self, _: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Pod>, ApiError>> {
        self.0.asked.fetch_add(1, Ordering::Relaxed);
        let found = self.0.answer().map(|()| self.0.pods.lock().unwrap().get(name).cloned());
        if self.0.deletes.load(Ordering::Relaxed) {
            self.0.pods.lock().unwrap().remove(name);
            self.0.cluster.update(|view| view.removals += 1);
        }
        Box::pin(async { found })
    }

    fn namespace<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Mode>, ApiError>> {
        self.0.asked.fetch_add(1, Ordering::Relaxed);
        let found = self.0.answer().map(|()| self.0.namespaces.lock().unwrap().get(name).cloned());
        Box::pin(async { found })
    }

    fn annotate<'a>(
        &'a self,
        pod: &'a PodIdentity,
        value: Option<&'static str>,
    ) -> BoxFuture<'a, Result<(), ApiError>> {
        Box::pin(async move {
            self.0.answer()?;
            self.0.annotated.lock().unwrap().push((pod.name.clone(), value));
            if let Some(known) = self.0.pods.lock().unwrap().get_mut(&pod.name) {
                known.redirection = value.map(str::to_owned);
            }
            self.0.publish();
            Ok(())
        })
    }

    fn notify<'a>(&'a self, _: &'a PodIdentity, notice: Notice) -> BoxFuture<'a, ()> {
        self.0.notices.lock().unwrap().push(notice);
        Box::pin(async {})
    }
}

/// A pod that runs.
pub fn pod(name: &str, uid: &str, addresses: &[IpAddr]) -> Pod {
    let addresses: Vec<_> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    let object = json!({
        "metadata": { "uid": uid, "name": name, "namespace": "shop" },
        "spec": { "containers": [] },
        "status": { "phase": "Running", "podIPs": addresses },
    });
    Pod::of(&serde_json::from_value(object).unwrap()).unwrap()
}

/// A node with the pods `web`, `client` and `other`, and all that belongs to it.
pub struct World {
    pub lab: Lab,
    pub server: Arc<Server>,
    pub directory: tempfile::TempDir,
    pub capture: Arc<dyn Capture>,
    /// Those that cases choose: `fresh` and `trust`.
    pub times: Times,
    pub probes: Option<KubeletProbes>,
}

impl World {
    pub fn new() -> Self {
        let lab = Lab::builder().node("a", &["web", "client", "other"]).build().unwrap();
        let server = Arc::new(Server::default());
        for name in ["web", "client", "other"] {
            server.pods.lock().unwrap().insert(name.to_owned(), pod(name, &new_uid(), &ip(lab.pod(name))));
        }
        server.namespaces.lock().unwrap().insert("shop".to_owned(), None);
        let capture = capture::probe(Backend::Nftables, &Tools::default()).unwrap();
        let times = Times { fresh: Duration::ZERO, ..Times::default() };
        Self { lab, server, directory: tempfile::tempdir().unwrap(), capture, times, probes: None }
    }

    /// With pods that are to be in the mesh.
    pub fn labelled() -> Self {
        let world = Self::new();
        world.server.namespaces.lock().unwrap().insert("shop".to_owned(), Some("ambient".to_owned()));
        world
    }

    pub fn host(&self, name: &str) -> &Host {
        self.lab.pod(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("ztunnel.sock")
    }

    pub fn uid(&self, name: &str) -> String {
        self.server.pods.lock().unwrap()[name].identity.uid.clone()
    }

    pub fn address(&self, name: &str, v6: bool) -> SocketAddr {
        SocketAddr::new(self.host(name).ip(v6), PORT)
    }

    /// What the plugin would say of a pod that starts.
    pub fn request(&self, name: &str) -> AddRequest {
        let host = self.host(name);
        serde_json::from_value(json!({
            "Netns": format!("/run/netns/{}", host.namespace),
            "PodName": name, "PodNamespace": "shop", "PodUID": self.uid(name),
            "ContainerID": format!("{name}-sandbox"), "IfName": "eth0",
            "IPs": [{ "Interface": null, "Address": { "IP": host.ipv4, "Mask": "////AA==" } }],
        }))
        .unwrap()
    }

    /// Rules of ours in the pod.
    pub fn rules_in(&self, name: &str) -> String {
        self.host(name).shell("nft list ruleset").unwrap()
    }

    pub fn drift(&self, name: &str, rules: &Rules) -> bool {
        !self.capture.verify(&self.host(name).netns, rules).unwrap().is_none()
    }

    pub async fn agent(&self) -> Agent {
        let (server, capture) = (self.server.clone(), self.capture.clone());
        start(server, self.directory.path(), capture, self.probes.clone(), self.times).await
    }
}

type Install = dyn Fn(&dyn Fn() -> Result<Installed, Error>) -> Result<Installed, Error> + Send + Sync;

/// Writes rules as another does, with something around it.
pub struct Around {
    inner: Arc<dyn Capture>,
    install: Box<Install>,
}

impl Around {
    /// `install` is given what writes the rules.
    pub fn new(
        inner: Arc<dyn Capture>,
        install: impl Fn(&dyn Fn() -> Result<Installed, Error>) -> Result<Installed, Error>
        + Send
        + Sync
        + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { inner, install: Box::new(install) })
    }
}

impl std::fmt::Debug for Around {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Around").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Capture for Around {
    fn backend(&self) -> Backend {
        self.inner.backend()
    }

    fn version(&self) -> &str {
        self.inner.version()
    }

    fn guards_ports(&self) -> bool {
        self.inner.guards_ports()
    }

    fn install(&self, netns: &Netns, rules: &Rules) -> Result<Installed, Error> {
        (self.install)(&|| self.inner.install(netns, rules))
    }

    fn verify(&self, netns: &Netns, rules: &Rules) -> Result<Drift, Error> {
        self.inner.verify(netns, rules)
    }

    fn remove(&self, netns: &Netns) -> Result<bool, Error> {
        self.inner.remove(netns)
    }
}

/// An agent in front of this server, whose files are in this directory.
pub async fn start(
    server: Arc<Server>,
    directory: &Path,
    capture: Arc<dyn Capture>,
    probes: Option<KubeletProbes>,
    times: Times,
) -> Agent {
    let ztunnels = Ztunnels::default();
    let node = Arc::new(Node::new(Parts {
        capture,
        ztunnels: ztunnels.clone(),
        record: Record::open(&directory.join("state")).unwrap(),
        cluster: server.cluster.clone(),
        api: Arc::new(TheApi(server)),
        places: Places { system: "culvert-system".to_owned(), excluded: vec!["kube-system".to_owned()] },
        probes,
        metrics: Metrics::new(&Registry::new()),
        proc: "/proc".into(),
        times: Times {
            served: Duration::from_millis(800),
            add: Duration::from_secs(5),
            tick: Duration::from_millis(50),
            verify: Duration::from_millis(300),
            leave: Duration::from_millis(100),
            absent: Duration::from_millis(500),
            ..times
        },
    }));
    node.restore().await;
    let tasks = vec![tokio::spawn(ztunnels.listen(&directory.join("ztunnel.sock")).unwrap())];
    Agent { node, ztunnels, tasks }
}

pub struct Agent {
    pub node: Arc<Node>,
    pub ztunnels: Ztunnels,
    tasks: Vec<JoinHandle<()>>,
}

impl Agent {
    pub fn run(&mut self) {
        self.tasks.push(tokio::spawn(self.node.clone().run(|_| ())));
    }

    pub async fn add(&self, request: AddRequest) -> Result<Answer, Refusal> {
        self.node.add(request).await
    }

    pub fn state(&self, uid: &str) -> Option<String> {
        let dump = self.node.dump();
        let pods = dump["pods"].as_array().unwrap();
        let pod = pods.iter().find(|pod| pod["uid"] == uid)?;
        Some(pod["state"].as_str().unwrap().to_owned())
    }

    pub async fn until(&self, what: &str, done: impl Fn() -> bool) {
        let started = tokio::time::Instant::now();
        while !done() {
            assert!(started.elapsed() < PATIENCE, "{what}: {:#}", self.node.dump());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Listens in pods where ztunnel does, and says `ztunnel` to everybody.
pub struct FakeZtunnel {
    pub told: Arc<Mutex<Vec<String>>>,
    /// While it is set, no pod is acknowledged.
    pub hold: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Drop for FakeZtunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeZtunnel {
    pub async fn start(socket: &Path) -> Self {
        Self::refusing(socket, None).await
    }

    /// One that refuses to serve, for this reason.
    pub async fn refusing(socket: &Path, reason: Option<&'static str>) -> Self {
        let connection = Seqpacket::connect(socket).unwrap();
        connection.send(&ZdsHello { version: 1, ..ZdsHello::default() }.encode_to_vec(), None).await.unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let hold = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(serve(connection, told.clone(), reason, hold.clone()));
        Self { told, hold, task }
    }

    pub fn was_told(&self, what: &str) -> bool {
        self.told.lock().unwrap().iter().any(|told| told == what)
    }
}

async fn serve(
    connection: Seqpacket,
    told: Arc<Mutex<Vec<String>>>,
    reason: Option<&'static str>,
    hold: Arc<AtomicBool>,
) {
    let mut pods: HashMap<String, Vec<Listening>> = HashMap::new();
    while let Ok(Some(packet)) = connection.receive(1024).await {
        let request = WorkloadRequest::decode(&*packet.bytes).unwrap();
        let mut error = String::new();
        let what = match request.payload.unwrap() {
            Payload::Add(add) if reason.is_some() => {
                error = reason.unwrap().to_owned();
                format!("refused {}", add.uid)
            }
            Payload::Add(add) => {
                pods.insert(add.uid.clone(), listen(packet.descriptor.unwrap()));
                format!("add {}", add.uid)
            }
            Payload::Keep(keep) => format!("keep {}", keep.uid),
            Payload::Del(del) => {
                // The ports are free when it says so.
                for mut listening in pods.remove(&del.uid).into_iter().flatten() {
                    listening.0.abort();
                    let _ = (&mut listening.0).await;
                }
                format!("del {}", del.uid)
            }
            Payload::SnapshotSent(_) => "snapshot sent".to_owned(),
        };
        let ack = workload_response::Payload::Ack(Ack { error });
        let answer = WorkloadResponse { payload: Some(ack) };
        let is_add = what.starts_with("add");
        told.lock().unwrap().push(what);
        while is_add && hold.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if connection.send(&answer.encode_to_vec(), None).await.is_err() {
            return;
        }
    }
}

struct Listening(JoinHandle<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn listen(netns: OwnedFd) -> Vec<Listening> {
    let netns = Netns::from_fd(netns, "received").unwrap();
    let options = ListenOptions { mark: Some(ZTUNNEL_MARK), ..ListenOptions::default() };
    [15001, 15006, 15008]
        .map(|port| {
            // A process that is being started has copies of our sockets until it runs its own program.
            let attempt = || net::listen(&netns, any(port), &options).ok();
            let listener = (0..500).find_map(|_| {
                attempt().or_else(|| {
                    std::thread::sleep(Duration::from_millis(10));
                    None
                })
            });
            let listener = listener.expect("a port of ztunnel's is taken");
            Listening(tokio::spawn(greet(listener, "ztunnel\n")))
        })
        .into()
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
}

/// Says who it is, and echoes.
async fn greet(listener: TcpListener, greeting: &'static str) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            let _ = stream.write_all(greeting.as_bytes()).await;
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
    }
}

/// The application of a pod.
pub fn application(host: &Host) {
    let listener = net::listen(&host.netns, any(PORT), &ListenOptions::default()).unwrap();
    tokio::spawn(greet(listener, "app\n"));
}

/// A connection, and who answered.
pub async fn dial(from: &Host, to: SocketAddr) -> Option<(TcpStream, String)> {
    let options = ConnectOptions { mark: None, ..ConnectOptions::default() };
    let mut stream = net::connect(&from.netns, &options, to, Duration::from_secs(5)).await.ok()?;
    let mut line = Vec::new();
    loop {
        match tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("no greeting") {
            Ok(b'\n') => return Some((stream, String::from_utf8(line).unwrap())),
            Ok(byte) => line.push(byte),
            Err(_) => return None,
        }
    }
}

/// Who answers a new connection: `app`, `ztunnel`, or nobody.
pub async fn who(from: &Host, to: SocketAddr) -> String {
    dial(from, to).await.map_or_else(|| "nobody".to_owned(), |(_, who)| who)
}

pub async fn echo(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut back)).await.expect("no echo").unwrap();
    assert_eq!(back, text.as_bytes());
}

/// A process of a pod: in its network namespace, and in a control group that carries its uid.
pub struct Container {
    _process: Process,
    group: PathBuf,
}

impl Container {
    pub fn start(host: &Host, uid: &str) -> Self {
        let hierarchies = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new);
        let root = hierarchies.into_iter().find(|path| path.join("cgroup.procs").exists()).unwrap();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let group = root.join(format!("culvert-test-{}-{number}/pod{uid}/sandbox", std::process::id()));
        fs::create_dir_all(&group).unwrap();
        let process = host.spawn(Command::new("sleep").arg("600")).unwrap();
        fs::write(group.join("cgroup.procs"), process.id().to_string()).unwrap();
        Self { _process: process, group }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Only empty groups can go: the process first. It is gone a moment after it was killed.
        let _ = self._process.signal(nix::sys::signal::Signal::SIGKILL);
        let _ = self._process.wait(Duration::from_secs(5));
        for group in self.group.ancestors().take(3) {
            let _ = fs::remove_dir(group);
        }
    }
}

pub fn ip(host: &Host) -> Vec<IpAddr> {
    vec![host.ipv4.into(), host.ipv6.into()]
}
