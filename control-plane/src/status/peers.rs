//! Asking the other control planes what their proxies hold: each proxy is connected to one of them only.
//!
//! They are found by the label of their Services ([`LABEL`]), those of other revisions, too: a policy without a revision's
//! label is read by all. They are asked over TLS under the mesh's own root, on the webhook's port. What one said is kept, and
//! only what changed is asked for; one that does not answer for [`FRESH`] leaves open whether a policy is enforced.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
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
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::FRESH;
use super::conditions::Tally;
use super::exchange::{Answer, Keys, Question};
use crate::registry::ObjectVersion;
use crate::source::chain;

/// The label of the Services of control planes, and so of their EndpointSlices.
pub const LABEL: &str = "app=culvertd";
/// The name of the port that answers, as the Service has it.
pub const PORT: &str = "https-webhook";
/// The label that says a control plane's revision.
const REVISION: &str = "istio.io/rev";
/// How often it is looked up who the others are.
const LOOK_UP: Duration = Duration::from_secs(10);
/// How long one is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// The size of an answer: some hundred bytes for each policy.
const MOST_BYTES: usize = 64 << 20;
/// Other control planes at most.
const MOST_PEERS: usize = 32;

/// How the others are reached.
pub struct Reach {
    /// For the look-up.
    pub client: Client,
    /// The namespace of the Services.
    pub namespace: String,
    /// This control plane's own pod.
    pub own_pod: String,
    /// This control plane's own revision.
    pub own_revision: String,
    /// What they are trusted by; looked at for each connection. `None` while the mesh's root is not known.
    pub tls: Arc<dyn Fn() -> Option<Arc<ClientConfig>> + Send + Sync>,
    /// By what this one proves that it may ask.
    pub keys: Keys,
}

/// Where another control plane is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// Its address.
    pub address: SocketAddr,
    /// The name that it proves.
    pub server_name: String,
    /// Its revision.
    pub revision: Arc<str>,
}

/// What another control plane knows of a version of a policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stand {
    /// How its proxies stand with it.
    Proxies(Tally),
    /// It knows another version, or none.
    Other {
        /// Whether it knows one.
        knows: bool,
    },
    /// It does not answer.
    Silent,
}

/// What one said, put together of its answers.
#[derive(Debug, Default)]
struct Said {
    question: Question,
    ours: usize,
    others: usize,
    names: Arc<[Arc<str>]>,
    versions: HashMap<String, (String, i64)>,
    exceptions: BTreeMap<String, Tally>,
}

/// Another control plane.
#[derive(Debug)]
pub struct Peer {
    /// Where it is.
    pub place: Place,
    said: Option<Said>,
    /// When it answered last; before that, when it was first heard of.
    since: Instant,
}

impl Peer {
    /// One that said nothing yet.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, said: None, since: Instant::now() }
    }

    /// Takes an answer; the policies about which it says something new.
    pub fn take(&mut self, answer: Answer) -> Vec<String> {
        self.since = Instant::now();
        if !answer.revision.is_empty() {
            self.place.revision = answer.revision.as_str().into();
        }
        let mut said = self.said.take().unwrap_or_default();
        let mut changed: Vec<String> = Vec::new();
        if answer.whole {
            changed.extend(said.versions.drain().map(|(policy, _)| policy));
        }
        for version in answer.versions {
            changed.push(version.policy.clone());
            if version.uid.is_empty() {
                said.versions.remove(&version.policy);
            } else {
                said.versions.insert(version.policy, (version.uid, version.generation));
            }
        }
        changed.extend(said.exceptions.keys().filter(|p| !answer.exceptions.contains_key(*p)).cloned());
        let other =
            answer.exceptions.iter().filter(|(policy, tally)| said.exceptions.get(*policy) != Some(tally));
        changed.extend(other.map(|(policy, _)| policy.clone()));
        if let Some(names) = answer.names {
            said.names = names;
        }
        (said.ours, said.others, said.exceptions) = (answer.ours, answer.others, answer.exceptions);
        said.question = Question { epoch: answer.epoch, number: answer.number, names: answer.names_id };
        self.said = Some(said);
        changed
    }

    /// Whether it said something at all.
    #[must_use]
    pub fn has_said(&self) -> bool {
        self.said.is_some()
    }

    /// Whether it has been silent only now.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.since.elapsed() < FRESH
    }

    /// How many of its proxies say what they enforce, and how many don't.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        self.said.as_ref().map_or((0, 0), |said| (said.ours, said.others))
    }

    /// The names of its proxies.
    #[must_use]
    pub fn names(&self) -> &[Arc<str>] {
        self.said.as_ref().map_or(&[], |said| &said.names)
    }

    /// Whether some policies are not enforced by all of its proxies.
    #[must_use]
    pub fn has_exceptions(&self) -> bool {
        self.said.as_ref().is_some_and(|said| !said.exceptions.is_empty())
    }

    /// How its proxies stand with a version of a policy.
    #[must_use]
    pub fn stand(&self, policy: &str, version: &ObjectVersion) -> Stand {
        let Some(said) = &self.said else { return Stand::Silent };
        match said.versions.get(policy) {
            Some((uid, generation)) if *uid == *version.uid && *generation == version.generation => {
                let all = || Tally { enforcing: said.ours, others: said.others, ..Tally::default() };
                Stand::Proxies(said.exceptions.get(policy).cloned().unwrap_or_else(all))
            }
            known => Stand::Other { knows: known.is_some() },
        }
    }

    /// What it said long ago says nothing of now.
    pub(super) fn forget(&mut self) {
        if !self.is_fresh() {
            self.said = None;
        }
    }
}

/// The other control planes.
pub struct Peers {
    reach: Option<Reach>,
    looked_up: Option<Instant>,
    peers: Vec<Peer>,
    /// Whether who they are could be looked up at all.
    known: bool,
}

impl Peers {
    /// The other control planes; none where there is no way to reach them.
    #[must_use]
    pub fn new(reach: Option<Reach>) -> Self {
        Self { known: reach.is_none(), reach, looked_up: None, peers: Vec::new() }
    }

    #[cfg(test)]
    pub(super) fn of(peers: Vec<Peer>) -> Self {
        Self { reach: None, looked_up: None, peers, known: true }
    }

    #[cfg(test)]
    pub(super) fn unknown() -> Self {
        Self { known: false, ..Self::of(Vec::new()) }
    }

    /// Each of them.
    #[must_use]
    pub fn all(&self) -> &[Peer] {
        &self.peers
    }

    /// Whether it is known who they are.
    #[must_use]
    pub fn are_known(&self) -> bool {
        self.known
    }

    /// Asks all of them; the policies about which one says something new.
    pub async fn ask(&mut self) -> Vec<String> {
        self.look_up().await;
        let Some(reach) = &self.reach else { return Vec::new() };
        let mut asked = JoinSet::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let question = peer.said.as_ref().map(|said| said.question).unwrap_or_default();
            let (place, tls, keys) = (peer.place.clone(), (reach.tls)(), reach.keys.clone());
            asked.spawn(async move {
                let answer = tokio::time::timeout(PATIENCE, ask_one(&place, tls, &keys, &question)).await;
                (index, answer.unwrap_or_else(|_| Err("no answer in time".to_owned())))
            });
        }
        let mut changed = Vec::new();
        while let Some(joined) = asked.join_next().await {
            let Ok((index, answer)) = joined else { continue };
            let Some(peer) = self.peers.get_mut(index) else { continue };
            match answer {
                Ok(answer) => changed.extend(peer.take(answer)),
                Err(reason) => {
                    let address = peer.place.address;
                    tracing::debug!(%address, reason, "another control plane can't tell what its proxies enforce");
                }
            }
        }
        self.peers.iter_mut().for_each(Peer::forget);
        changed
    }

    /// Finds who there is. Who is there still keeps what it said.
    async fn look_up(&mut self) {
        let Some(reach) = &self.reach else { return };
        if self.known && self.looked_up.is_some_and(|at| at.elapsed() < LOOK_UP) {
            return;
        }
        match places(reach).await {
            Ok(places) => {
                let mut old: HashMap<SocketAddr, Peer> =
                    self.peers.drain(..).map(|peer| (peer.place.address, peer)).collect();
                let peer = |place: Place| {
                    let known =
                        old.remove(&place.address).filter(|p| p.place.server_name == place.server_name);
                    known.unwrap_or_else(|| Peer::new(place))
                };
                self.peers = places.into_iter().map(peer).collect();
                (self.known, self.looked_up) = (true, Some(Instant::now()));
            }
            Err(reason) => tracing::debug!(reason, "the other control planes could not be looked up"),
        }
    }
}

/// Where all other control planes are.
async fn places(reach: &Reach) -> Result<Vec<Place>, String> {
    let api: Api<EndpointSlice> = Api::namespaced(reach.client.clone(), &reach.namespace);
    let slices = api.list(&ListParams::default().labels(LABEL)).await.map_err(|error| chain(&error))?;
    let mut found: Vec<Place> = slices.items.iter().flat_map(|slice| places_in(reach, slice)).collect();
    found.sort();
    found.dedup_by_key(|place| place.address);
    found.truncate(MOST_PEERS);
    Ok(found)
}

fn places_in(reach: &Reach, slice: &EndpointSlice) -> Vec<Place> {
    let label =
        |key: &str| slice.metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    let Some(service) = label("kubernetes.io/service-name") else { return Vec::new() };
    let ports = slice.ports.iter().flatten();
    let port = ports.filter(|port| port.name.as_deref() == Some(PORT)).find_map(|port| port.port);
    let Some(port) = port.and_then(|port| u16::try_from(port).ok()) else { return Vec::new() };
    let server_name = format!("{service}.{}.svc", reach.namespace);
    let revision: Arc<str> = label(REVISION).unwrap_or(&reach.own_revision).into();
    let place = |endpoint: &k8s_openapi::api::discovery::v1::Endpoint| {
        let own = endpoint.target_ref.as_ref().and_then(|t| t.name.as_deref()) == Some(&reach.own_pod);
        // One that ends still has proxies, until they have gone to another.
        let serving = endpoint.conditions.as_ref().and_then(|c| c.serving).unwrap_or(true);
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let (address, server_name) = (SocketAddr::new(ip, port), server_name.clone());
        (!own && serving).then(|| Place { address, server_name, revision: revision.clone() })
    };
    slice.endpoints.iter().filter_map(place).collect()
}

/// Asks one.
///
/// # Errors
/// It does not answer as one of ours would.
pub async fn ask_one(
    place: &Place,
    tls: Option<Arc<ClientConfig>>,
    keys: &Keys,
    question: &Question,
) -> Result<Answer, String> {
    let tls = tls.ok_or("the mesh's root is not known yet")?;
    let target = question.target();
    let proof = keys.prove(&target).ok_or("the mesh's key is not known yet")?;
    let text = |error: &dyn std::error::Error| chain(error);
    let name = ServerName::try_from(place.server_name.clone()).map_err(|e| text(&e))?;
    let stream = TcpStream::connect(place.address).await.map_err(|e| text(&e))?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    let task = tokio::spawn(connection);
    let request = http::Request::get(target)
        .header(http::header::HOST, "culvertd")
        .header(http::header::AUTHORIZATION, proof)
        .body(Empty::<Bytes>::new());
    let response = sender.send_request(request.map_err(|e| text(&e))?).await.map_err(|e| text(&e))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST_BYTES).collect().await.map_err(|e| e.to_string())?;
    task.abort();
    let body = body.to_bytes();
    if status != http::StatusCode::OK {
        let reason: String = String::from_utf8_lossy(&body).trim().chars().take(200).collect();
        return Err(format!("it answers {status}: {reason}"));
    }
    serde_json::from_slice(&body).map_err(|e| format!("its answer is not understood: {e}"))
}
