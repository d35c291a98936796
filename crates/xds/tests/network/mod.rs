//! Servers on loopback, with and without TLS, and what they counted.
#![allow(dead_code, reason = "each test uses a part")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::wire::core::Node;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, ServerTlsConfig};
use tonic::{Request, Status};
use xds::server::{Admission, Authorizer, Caller, Config, Event, Observer, Server};

/// Takes the token `good`; nodes must not call themselves `liar`.
pub struct Tokens;

#[tonic::async_trait]
impl Authorizer for Tokens {
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status> {
        assert!(request.remote_addr().is_some());
        match request.metadata().get("authorization").and_then(|v| v.to_str().ok()) {
            Some("Bearer good") => Ok(Caller { name: "tester".into() }),
            Some(_) => Err(Status::unauthenticated("this token is not good")),
            None => Err(Status::unauthenticated("no token")),
        }
    }

    fn admit(&self, _: &Caller, node: &Node) -> Result<Admission, Status> {
        match node.id.as_str() {
            "liar" => Err(Status::permission_denied("the token is of another node")),
            _ => Ok(Admission::default()),
        }
    }
}

#[derive(Default)]
pub struct Counts {
    pub connected: AtomicUsize,
    pub disconnected: Mutex<Vec<String>>,
    pub refused: AtomicUsize,
    pub pushed: AtomicUsize,
    pub resources: AtomicUsize,
    pub rejected: AtomicUsize,
    pub queued: AtomicUsize,
    pub converged: Mutex<Vec<Duration>>,
}

impl Observer for Counts {
    fn observe(&self, event: Event<'_>) {
        let one = |counter: &AtomicUsize| counter.fetch_add(1, Ordering::Relaxed);
        match event {
            Event::Connected(_) => {
                one(&self.connected);
            }
            Event::Disconnected(_, why) => self.disconnected.lock().unwrap().push(why.to_owned()),
            Event::Refused(_) => {
                one(&self.refused);
            }
            Event::Pushed { resources, .. } => {
                one(&self.pushed);
                self.resources.fetch_add(resources, Ordering::Relaxed);
            }
            Event::Rejected { .. } => {
                one(&self.rejected);
            }
            Event::Queued(_) => {
                one(&self.queued);
            }
            Event::Converged(after) => self.converged.lock().unwrap().push(after),
        }
    }
}

/// A server at an address. Dropped, it is gone with all its connections.
pub struct Site {
    pub server: Server,
    pub address: SocketAddr,
    pub counts: Arc<Counts>,
    task: tokio::task::JoinHandle<()>,
    _stop: oneshot::Sender<()>,
}

/// A root, and what it signed for `localhost`.
pub struct Trust {
    pub root: String,
    pub certificate: String,
    pub key: String,
}

pub fn trust() -> Trust {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(vec![]).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, key);
    let own = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let certificate = certificate.signed_by(&own, &issuer).unwrap();
    Trust { root: root.pem(), certificate: certificate.pem(), key: own.serialize_pem() }
}

impl Site {
    pub async fn new(config: Config) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), config, None).await
    }

    pub async fn at(address: SocketAddr, config: Config, trust: Option<&Trust>) -> Self {
        // The address of one that was there a moment ago may be free a moment later.
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let server = Server::new(config, Arc::new(Tokens), Arc::clone(&counts) as Arc<dyn Observer>);
        let mut builder =
            tonic::transport::Server::builder().http2_keepalive_interval(Some(Duration::from_secs(10)));
        if let Some(trust) = trust {
            let identity = Identity::from_pem(&trust.certificate, &trust.key);
            builder = builder.tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
        }
        let router = builder.add_service(server.service());
        let (stop, _stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { server, address, counts, task, _stop: stop }
    }

    /// Waits until something holds of the server.
    pub async fn until(&self, holds: impl Fn(&Server) -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !holds(&self.server) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited.await.expect("it comes to hold in time");
    }

    /// Ends the server with its connections.
    pub async fn stop(self) {
        self.task.abort();
        self.server.disconnect(|_| true);
        let _ = self.task.await;
    }
}
