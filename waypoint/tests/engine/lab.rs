//! A proxy in the test's own process, with a server behind it that the test writes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use waypoint::http::decide::{
    Call, Carrier, Connection, Decide, Decided, Decision, Endpoints, Forwarding, Mirror, More, NoEndpoint,
    Outcome, Picked, Protocol, Record, Response, Target, Watch,
};
use waypoint::http::head::{Fields, RequestHead};
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};

/// Longer than anything takes, on the slowest machine.
pub const LONG: Duration = Duration::from_secs(60);

/// Endpoints in turn.
pub struct InTurn {
    pub targets: Vec<Arc<Target>>,
    pub ended: Arc<Mutex<Vec<Option<Outcome>>>>,
}

impl Endpoints for InTurn {
    fn pick(&self, call: &Call<'_>) -> Result<Picked, NoEndpoint> {
        if self.targets.is_empty() {
            return Err(NoEndpoint::NONE);
        }
        let target = Arc::clone(&self.targets[call.tried.len() % self.targets.len()]);
        let watch = Ends { ended: Arc::clone(&self.ended), outcome: Mutex::default() };
        Ok(Picked::watched(target, Arc::new(watch)))
    }
}

/// Writes down how a try went, when it has ended.
struct Ends {
    ended: Arc<Mutex<Vec<Option<Outcome>>>>,
    outcome: Mutex<Option<Outcome>>,
}

impl Watch for Ends {
    fn reported(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap() = Some(outcome);
    }

    fn ended(&self) {
        self.ended.lock().unwrap().push(*self.outcome.lock().unwrap());
    }
}

pub fn target(address: SocketAddr, protocol: Protocol) -> Arc<Target> {
    Arc::new(Target::new(address, protocol, Carrier::Tcp))
}

pub fn in_turn(targets: Vec<Arc<Target>>) -> Arc<InTurn> {
    Arc::new(InTurn { targets, ended: Arc::default() })
}

/// Paths that are answered here.
const DIRECT: [(&str, u16); 4] = [("/direct", 418), ("/nothing", 204), ("/empty", 205), ("/unchanged", 304)];

/// Sends all to the same endpoints, but for [`DIRECT`].
struct Fixed {
    how: Arc<Forwarding>,
    endpoints: Arc<dyn Endpoints>,
    mirrors: Vec<Mirror>,
    records: Mutex<Vec<Record>>,
}

impl Decide for Fixed {
    fn decide(&self, request: &mut RequestHead, _: &Connection, _: &mut Decided) -> Decision {
        if let Some((_, status)) = DIRECT.iter().find(|(path, _)| *path == request.path()) {
            let (status, body) = (*status, bytes::Bytes::from_static(b"direct"));
            let flag = waypoint::http::decide::Flag::Decided("DI");
            return Decision::Respond(Arc::new(Response { status, fields: Box::default(), body, flag }));
        }
        let more = More { mirrors: self.mirrors.clone(), ..More::default() };
        let more = (!self.mirrors.is_empty()).then(|| Box::new(more));
        let (how, endpoints) = (Arc::clone(&self.how), Arc::clone(&self.endpoints));
        Decision::Forward { how, endpoints, more }
    }

    fn ended(&self, _: &RequestHead, _: &Fields, _: &Connection, _: &Decided, record: &Record) {
        self.records.lock().unwrap().push(record.clone());
    }
}

pub struct Proxy {
    pub address: SocketAddr,
    pub worker: Arc<Worker>,
    decide: Arc<Fixed>,
}

impl Proxy {
    pub async fn start(how: Forwarding, endpoints: Arc<dyn Endpoints>, settings: Settings) -> Self {
        let (mirrors, records) = (Vec::new(), Mutex::default());
        Self::of(Fixed { how: Arc::new(how), endpoints, mirrors, records }, settings).await
    }

    /// With copies to `mirror`, a server of HTTP/1.1.
    pub async fn start_mirrored(
        mirror: SocketAddr,
        how: Forwarding,
        endpoints: Arc<dyn Endpoints>,
        settings: Settings,
    ) -> Self {
        let mirror = in_turn(vec![target(mirror, Protocol::Http1)]);
        let mirrors = vec![Mirror { endpoints: mirror, request: None }];
        let (how, records) = (Arc::new(how), Mutex::default());
        Self::of(Fixed { how, endpoints, mirrors, records }, settings).await
    }

    async fn of(decide: Fixed, settings: Settings) -> Self {
        let decide = Arc::new(decide);
        let worker = Worker::new(Arc::clone(&decide) as Arc<dyn Decide>, settings, CancellationToken::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&worker);
        tokio::spawn(async move {
            while let Ok((stream, client)) = listener.accept().await {
                let facts = Connection {
                    client,
                    destination: address,
                    identity: None,
                    server_name: None,
                    secure: false,
                    said: None,
                };
                tokio::spawn(serve(Arc::clone(&serving), Io::Tcp(stream), facts));
            }
        });
        Self { address, worker, decide }
    }

    /// To one server of HTTP/1.1.
    pub async fn to(address: SocketAddr) -> Self {
        let endpoints = in_turn(vec![target(address, Protocol::Http1)]);
        Self::start(Forwarding::default(), endpoints, Settings::default()).await
    }

    pub fn records(&self) -> Vec<Record> {
        self.decide.records.lock().unwrap().clone()
    }

    /// The records, once there are so many.
    pub async fn wait_records(&self, count: usize) -> Vec<Record> {
        until(|| (self.records().len() >= count).then(|| self.records())).await
    }

    pub async fn connect(&self) -> Client {
        Client { stream: TcpStream::connect(self.address).await.unwrap(), input: Vec::new() }
    }
}

/// Waits for something.
pub async fn until<T>(mut condition: impl FnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + LONG;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(tokio::time::Instant::now() < end, "waited for too long");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An end of a raw connection.
pub struct Client {
    pub stream: TcpStream,
    input: Vec<u8>,
}

/// A message as it came: its head, and its body as the head frames it (chunks put together).
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub head: String,
    pub body: Vec<u8>,
}

impl Message {
    pub fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    pub fn field(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        fields.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

impl Client {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, input: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// More input; false at the end.
    async fn more(&mut self) -> bool {
        let read = tokio::time::timeout(LONG, self.stream.read_buf(&mut self.input)).await.expect("in time");
        matches!(read, Ok(count) if count > 0)
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.input.windows(2).position(|w| w == b"\r\n") {
                let line = self.input.drain(..end + 2).collect::<Vec<_>>();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    pub async fn exactly(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.input.len() < count {
            if !self.more().await {
                return None;
            }
        }
        Some(self.input.drain(..count).collect())
    }

    /// All until the end.
    pub async fn rest(&mut self) -> Vec<u8> {
        while self.more().await {}
        std::mem::take(&mut self.input)
    }

    pub async fn head(&mut self) -> Option<String> {
        let mut head = String::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Some(head);
            }
            head.push_str(&line);
            head.push_str("\r\n");
        }
    }

    /// A whole message; `None` if the connection ended before.
    pub async fn message(&mut self) -> Option<Message> {
        let head = self.head().await?;
        self.body(head, false).await
    }

    /// The same of the response itself, without the informational ones before it.
    pub async fn answer(&mut self) -> Option<Message> {
        loop {
            let head = self.head().await?;
            if !head.starts_with("HTTP/1.1 1") {
                return self.body(head, false).await;
            }
        }
    }

    pub async fn body(&mut self, head: String, no_body: bool) -> Option<Message> {
        let mut message = Message { head, body: Vec::new() };
        if no_body {
            return Some(message);
        }
        if message.field("transfer-encoding").is_some() {
            loop {
                let line = self.line().await?;
                let size = usize::from_str_radix(line.split(';').next()?, 16).unwrap();
                if size == 0 {
                    while !self.line().await?.is_empty() {}
                    break;
                }
                message.body.extend(self.exactly(size).await?);
                assert_eq!(self.line().await?, "");
            }
        } else if let Some(length) = message.field("content-length") {
            message.body = self.exactly(length.parse().unwrap()).await?;
        }
        Some(message)
    }

    /// Sends a request and reads its response.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> Message {
        self.send(request).await;
        self.message().await.expect("a response")
    }
}

/// A server that does with each connection what `each` does; the address, and a count of connections.
pub async fn server<F, Fut>(each: F) -> SocketAddr
where
    F: Fn(usize, Client) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut count = 0;
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(each(count, Client::new(stream)));
            count += 1;
        }
    });
    address
}

/// A server that answers each request with its head and body as the body.
pub async fn echo() -> SocketAddr {
    server(|_, mut client| async move {
        while let Some(request) = client.message().await {
            let body = [request.head.as_bytes(), b"\r\n", &request.body].concat();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Echo: 1\r\n\r\n", body.len());
            client.send([head.as_bytes(), &body].concat()).await;
        }
    })
    .await
}

pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")
}
