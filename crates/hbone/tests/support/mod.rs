//! A network of in-memory streams: a connector whose connections are served by this crate's own server.
#![allow(dead_code)]

pub mod handed;
pub mod raw;

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hbone::{
    Closed, ConnectRequest, Connector, Control, Incoming, Pool, PoolSettings, PumpLimits, ServerCounters,
    ServerSettings, Traffic, Tunnel, TunnelHeaders, pump, serve,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// What the server does with each request.
pub type Handler = Arc<dyn Fn(Incoming) + Send + Sync>;

/// Connects keys to servers made on the spot.
pub struct Net {
    pub settings: ServerSettings,
    pub server: Arc<ServerCounters>,
    pub handler: Handler,
    /// Connections made so far.
    pub made: AtomicUsize,
    /// The controls of the connections made so far.
    pub controls: Mutex<Vec<Control>>,
    /// How the connections that have ended did.
    pub ended: Arc<Mutex<Vec<Closed>>>,
    /// Time that connecting takes.
    pub delay: Duration,
    /// Time that the server takes before it says anything.
    pub server_delay: Duration,
    /// The capacity of each connection's pipe.
    pub pipe: usize,
}

impl Net {
    pub fn new(handler: Handler) -> Self {
        Self {
            settings: ServerSettings::default(),
            server: Arc::default(),
            handler,
            made: AtomicUsize::new(0),
            controls: Mutex::default(),
            ended: Arc::default(),
            delay: Duration::ZERO,
            server_delay: Duration::ZERO,
            pipe: 64 * 1024,
        }
    }

    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }
}

/// Keys above this one are never answered.
pub const SILENT: u32 = 1000;

impl Connector for Net {
    type Key = u32;
    type Io = DuplexStream;
    type Peer = u32;
    type Error = io::Error;

    async fn connect(&self, key: &u32) -> Result<(DuplexStream, u32), io::Error> {
        if *key >= SILENT {
            std::future::pending::<Infallible>().await;
        }
        tokio::time::sleep(self.delay).await;
        if *key == 666 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.made.fetch_add(1, Ordering::SeqCst);
        let (client, server) = tokio::io::duplex(self.pipe);
        let control = Control::default();
        self.controls.lock().unwrap().push(control.clone());
        let (settings, counters, handler) =
            (self.settings, Arc::clone(&self.server), Arc::clone(&self.handler));
        let (ended, server_delay) = (Arc::clone(&self.ended), self.server_delay);
        tokio::spawn(async move {
            tokio::time::sleep(server_delay).await;
            let closed = serve(server, &settings, &control, &counters, |incoming| handler(incoming)).await;
            ended.lock().unwrap().push(closed);
        });
        Ok((client, *key))
    }
}

/// Accepts each tunnel and sends back what comes.
pub fn echo() -> Handler {
    Arc::new(|incoming| {
        tokio::spawn(async move {
            let Ok(tunnel) = incoming.accept(&TunnelHeaders::default()) else { return };
            let (mut read, mut write) = tokio::io::split(tunnel);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
    })
}

/// Connects each tunnel to an application of its own, over a pipe.
pub fn to_app<F>(app: impl Fn(DuplexStream) -> F + Send + Sync + 'static) -> Handler
where
    F: Future<Output = ()> + Send + 'static,
{
    Arc::new(move |incoming| {
        let (proxy, side) = tokio::io::duplex(8 * 1024);
        tokio::spawn(app(side));
        tokio::spawn(async move {
            let Ok(tunnel) = incoming.accept(&TunnelHeaders::default()) else { return };
            pump(tunnel, proxy, &Traffic::default(), PumpLimits::default()).await;
        });
    })
}

pub fn pool(net: Net) -> Pool<Net> {
    Pool::new(net, PoolSettings::default())
}

pub fn request() -> ConnectRequest {
    ConnectRequest { authority: "10.0.0.1:80".parse().unwrap(), headers: TunnelHeaders::default() }
}

/// Sends `data` through an echoing tunnel and checks that it comes back.
pub async fn check_echo(tunnel: Tunnel, data: &[u8]) {
    let (mut read, mut write) = tokio::io::split(tunnel);
    let send = async {
        write.write_all(data).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let receive = async {
        let mut got = Vec::new();
        read.read_to_end(&mut got).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(send, receive);
    assert!(got == data, "{} bytes sent, {} came back", data.len(), got.len());
}

/// A server whose client is made by hand.
pub fn hostile(settings: ServerSettings, handler: Handler) -> (raw::Raw, Served) {
    hostile_over(64 * 1024, settings, handler)
}

/// As [`hostile`], with the capacity of the pipe.
pub fn hostile_over(pipe: usize, settings: ServerSettings, handler: Handler) -> (raw::Raw, Served) {
    let (client, server) = tokio::io::duplex(pipe);
    let counters = Arc::<ServerCounters>::default();
    let control = Control::default();
    let (counted, controlled) = (Arc::clone(&counters), control.clone());
    let task = tokio::spawn(async move {
        serve(server, &settings, &controlled, &counted, |incoming| handler(incoming)).await
    });
    (raw::Raw { io: client }, Served { counters, control, task })
}

/// A connection being served.
pub struct Served {
    pub counters: Arc<ServerCounters>,
    pub control: Control,
    pub task: tokio::task::JoinHandle<Closed>,
}

/// Resident memory of this process, in bytes.
pub fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
