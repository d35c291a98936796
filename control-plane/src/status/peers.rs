//! Asking the other control planes what their proxies hold: each proxy is connected to one of them only.
//!
//! They are the endpoints of the control plane's Service. They are asked over TLS under the mesh's own root, on the
//! webhook's port; one that does not answer leaves open whether a policy is enforced.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, ListParams};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::Local;
use super::conditions::Tally;
use crate::source::chain;

/// The page that answers.
pub const PATH: &str = "/debug/enforcement";
/// How often it is looked up who the others are.
const LOOK_UP: Duration = Duration::from_secs(10);
/// How long one is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// The size of an answer: some hundred bytes for each policy.
const MOST_BYTES: usize = 64 << 20;
/// Other control planes at most.
const MOST_PEERS: usize = 16;

/// How the proxies of one control plane stand with a policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PolicyAnswer {
    /// The policy's uid.
    pub uid: String,
    /// Its version.
    pub generation: i64,
    /// The proxies.
    pub tally: Tally,
}

/// The answers of all other control planes.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// Of those that answered.
    pub answers: Vec<Local>,
    /// How many did not.
    pub unasked: usize,
}

/// How the others are reached.
pub struct Reach {
    /// For the look-up.
    pub client: Client,
    /// The namespace of the Service.
    pub namespace: String,
    /// The name of the Service.
    pub service: String,
    /// This control plane's own pod.
    pub own_pod: String,
    /// The port of the page.
    pub port: u16,
    /// The name that the others prove.
    pub server_name: ServerName<'static>,
    /// What they are trusted by; looked at for each connection. `None` while the mesh's root is not known.
    pub tls: Arc<dyn Fn() -> Option<Arc<ClientConfig>> + Send + Sync>,
}

/// The other control planes.
pub struct Peers {
    reach: Option<Reach>,
    known: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

impl Peers {
    /// The other control planes; none where there is no way to reach them.
    #[must_use]
    pub fn new(reach: Option<Reach>) -> Self {
        Self { reach, known: Mutex::default() }
    }

    /// Asks all of them.
    pub async fn ask(&self) -> Answers {
        let Some(reach) = &self.reach else { return Answers::default() };
        let addresses = match self.look_up(reach).await {
            Ok(addresses) => addresses,
            Err(reason) => {
                tracing::debug!(reason, "the other control planes could not be looked up");
                return Answers { answers: Vec::new(), unasked: 1 };
            }
        };
        let mut asked = tokio::task::JoinSet::new();
        for address in addresses {
            let (tls, name) = ((reach.tls)(), reach.server_name.clone());
            asked.spawn(async move {
                let answer = tokio::time::timeout(PATIENCE, ask_one(address, tls, name)).await;
                (address, answer.unwrap_or_else(|_| Err("no answer in time".to_owned())))
            });
        }
        let mut answers = Answers::default();
        while let Some(joined) = asked.join_next().await {
            match joined {
                Ok((_, Ok(answer))) => answers.answers.push(answer),
                Ok((address, Err(reason))) => {
                    tracing::debug!(%address, reason, "another control plane can't tell what its proxies enforce");
                    answers.unasked += 1;
                }
                Err(_) => answers.unasked += 1,
            }
        }
        answers
    }

    async fn look_up(&self, reach: &Reach) -> Result<Vec<SocketAddr>, String> {
        let mut known = self.known.lock().await;
        if let Some((at, addresses)) = &*known
            && at.elapsed() < LOOK_UP
        {
            return Ok(addresses.clone());
        }
        let api: Api<EndpointSlice> = Api::namespaced(reach.client.clone(), &reach.namespace);
        let params = ListParams::default().labels(&format!("kubernetes.io/service-name={}", reach.service));
        let slices = api.list(&params).await.map_err(|error| chain(&error))?;
        let mut found: Vec<SocketAddr> = Vec::new();
        for endpoint in slices.items.into_iter().flat_map(|slice| slice.endpoints) {
            let own = endpoint.target_ref.as_ref().and_then(|t| t.name.as_deref()) == Some(&reach.own_pod);
            // One that ends still has proxies, until they have gone to another.
            let serving = endpoint.conditions.as_ref().and_then(|c| c.serving).unwrap_or(true);
            let address = endpoint.addresses.first().and_then(|a| a.parse().ok());
            if let (Some(ip), false, true) = (address, own, serving) {
                found.push(SocketAddr::new(ip, reach.port));
            }
        }
        found.sort();
        found.dedup();
        found.truncate(MOST_PEERS);
        *known = Some((Instant::now(), found.clone()));
        Ok(found)
    }
}

/// Asks one.
///
/// # Errors
/// It does not answer as one of ours would.
pub async fn ask_one(
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
    name: ServerName<'static>,
) -> Result<Local, String> {
    let tls = tls.ok_or("the mesh's root is not known yet")?;
    let text = |error: &dyn std::error::Error| chain(error);
    let stream = TcpStream::connect(address).await.map_err(|e| text(&e))?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    let task = tokio::spawn(connection);
    let request = http::Request::get(PATH).header(http::header::HOST, "culvertd").body(Empty::<Bytes>::new());
    let request = request.map_err(|e| text(&e))?;
    let response = sender.send_request(request).await.map_err(|e| text(&e))?;
    if response.status() != http::StatusCode::OK {
        return Err(format!("it answers {}", response.status()));
    }
    let body = Limited::new(response.into_body(), MOST_BYTES).collect().await.map_err(|e| e.to_string())?;
    task.abort();
    serde_json::from_slice(&body.to_bytes()).map_err(|e| format!("its answer is not understood: {e}"))
}
