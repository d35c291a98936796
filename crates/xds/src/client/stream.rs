//! One stream to one server, and the answers of the user.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use prost::Message;
use proto::wire::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use proto::wire::discovery::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use proto::wire::rpc;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Uri;
use tonic::{Code, Request, Status, Streaming};

use super::held::{Held, HeldType};
use super::journal::{Journal, JournalError, Record, Saved};
use super::parts::{InParts, is_part};
use super::{Answer, Client, Event, Link, Origin, Rejection, Reply, Resource, Termination, Update, connect};
use crate::BAD_REQUEST_TYPE_URL;
use crate::inventory::NameKey;

/// How many refused resources a server is told by name.
const NAMED: usize = 500;
/// How many of them also stand in the text.
const IN_TEXT: usize = 10;
/// So much of a response is held for its last part, where all of it is put in force at once; and what a resource takes
/// beside its bytes.
const TOGETHER_BYTES: usize = 64 << 20;
const RESOURCE_BYTES: usize = 200;

/// How a stream ended.
pub(super) struct Ended {
    pub(super) termination: Termination,
    pub(super) message: String,
    /// Whether the server had answered before.
    pub(super) answered: bool,
}

impl Ended {
    fn new(termination: Termination, message: impl Into<String>) -> Self {
        Self { termination, message: message.into(), answered: false }
    }

    fn of(status: &Status) -> Self {
        let termination = match status.code() {
            Code::Unavailable | Code::Aborted | Code::DeadlineExceeded => Termination::Reconnect,
            Code::Ok => Termination::Complete,
            _ => Termination::Error,
        };
        Self::new(termination, format!("{:?}: {}", status.code(), status.message()))
    }
}

/// What is known of a response of which parts came already.
#[derive(Default)]
struct Earlier {
    type_url: Option<&'static str>,
    bytes: usize,
    rejections: Vec<Rejection>,
    /// The names that were in what was handed out.
    seen: HashSet<Arc<str>>,
    /// What was not, since it [belongs together](proto::belongs_together): nothing, once it takes more than [`TOGETHER_BYTES`].
    held_back: Vec<discovery::Resource>,
    held_back_bytes: usize,
}

impl Earlier {
    fn hold_back(&mut self, resources: Vec<discovery::Resource>) {
        self.held_back_bytes += resources.iter().map(|r| r.encoded_len() + RESOURCE_BYTES).sum::<usize>();
        if self.is_too_long() {
            self.held_back = Vec::new();
        } else {
            self.held_back.extend(resources);
        }
    }

    fn is_too_long(&self) -> bool {
        self.held_back_bytes > TOGETHER_BYTES
    }
}

/// A batch for the user, and what has to be known of it when it is answered.
struct Batch {
    type_url: &'static str,
    resources: Vec<Resource>,
    removed: Vec<String>,
    complete: bool,
    origin: Origin,
    /// What no user needs to see to refuse it.
    malformed: Vec<Rejection>,
}

impl Client {
    /// Hands out what is on disk.
    pub(super) async fn restore(&mut self) {
        let Some(directory) = self.settings.state_dir.clone() else { return };
        let (mesh, limit) = (self.settings.cluster_id.clone(), self.settings.state_bytes);
        let opened = blocking(move || Journal::open(&directory, &mesh, limit)).await;
        let mut journal = match opened {
            Ok((journal, problem)) => {
                if let Some(problem) = problem {
                    self.state_lost(&problem);
                }
                journal
            }
            Err(error) => return self.state_lost(&error),
        };
        let mut complete = BTreeSet::new();
        loop {
            let (back, record) = blocking(move || {
                let record = journal.next();
                (journal, record)
            })
            .await;
            journal = back;
            match record {
                Ok(Some(record)) => self.restore_record(record, &mut complete).await,
                Ok(None) => break,
                Err(error) => return self.state_lost(&error),
            }
        }
        // Only now: in between the state is one that there was earlier.
        for type_url in complete {
            let batch = Batch {
                type_url,
                resources: Vec::new(),
                removed: Vec::new(),
                complete: true,
                origin: Origin::Disk,
                malformed: Vec::new(),
            };
            self.hand_out(batch).await;
        }
        self.journal = Some(journal);
    }

    async fn restore_record(&mut self, record: Record, complete: &mut BTreeSet<&'static str>) {
        let Some((type_url, _)) = self.held.of(&record.type_url) else { return };
        if record.complete {
            complete.insert(type_url);
        }
        let resources = record.resources.into_iter();
        let resources = resources.map(|Saved { name, version, aliases, body }| Resource {
            name: name.into(),
            version,
            aliases,
            body,
        });
        let batch = Batch {
            type_url,
            resources: resources.collect(),
            removed: record.removed,
            complete: false,
            origin: Origin::Disk,
            malformed: Vec::new(),
        };
        self.hand_out(batch).await;
    }

    fn state_lost(&self, error: &JournalError) {
        let error = error.to_string();
        tracing::warn!(%error, "the last good state");
        self.observer.observe(Event::StateLost(&error));
    }

    /// One connection, until it ends.
    pub(super) async fn stream(&mut self, address: &Uri) -> Ended {
        let mut answered = false;
        let ended = match self.open(address).await {
            Ok((mut responses, requests)) => {
                let ended = self.follow(address, &mut responses, &requests, &mut answered).await;
                // A stream of an old server must not go on beside the next.
                drop(responses);
                ended
            }
            Err(ended) => ended,
        };
        Ended { answered, ..ended }
    }

    async fn open(
        &self,
        address: &Uri,
    ) -> Result<(Streaming<DeltaDiscoveryResponse>, mpsc::Sender<DeltaDiscoveryRequest>), Ended> {
        let failed = |e: connect::ConnectError| Ended::new(Termination::ConnectionError, e.to_string());
        let token = connect::token(&self.settings, address).map_err(failed)?;
        let channel = connect::connect(&self.settings, address).await.map_err(failed)?;
        // The first that every server knows. A server of another make may send no headers before it is asked.
        let types = &self.settings.types;
        let is_own = |type_url: &&str| type_url.starts_with(crate::OWN_TYPES);
        let first = types.iter().position(|t| !is_own(t)).unwrap_or_default();
        let (sender, receiver) = mpsc::channel(types.len() + 1);
        let ask = |place: usize, type_url: &&str, hashed: bool| {
            let held = self.held.get(type_url);
            let inventory = held.filter(|_| hashed).and_then(HeldType::inventory);
            let versions = held.filter(|_| inventory.is_none()).map(HeldType::versions);
            let request = DeltaDiscoveryRequest {
                node: (place == first).then(|| self.settings.node.clone()),
                type_url: (*type_url).to_owned(),
                initial_resource_versions: versions.unwrap_or_default(),
                culvert_held: inventory.unwrap_or_default(),
                ..DeltaDiscoveryRequest::default()
            };
            // There is room for all.
            let _ = sender.try_send(request);
        };
        types.get(first).into_iter().for_each(|type_url| ask(first, type_url, false));
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        if let Ok(cluster) = self.settings.cluster_id.parse::<MetadataValue<_>>() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        let limit = self.settings.message_bytes;
        let channel = InParts::new(channel, limit);
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(limit);
        let opened = timeout(self.settings.answer_timeout, client.delta_aggregated_resources(request)).await;
        let opened = opened.map_err(|_| self.silent())?.map_err(|status| Ended::of(&status))?;
        let known = opened.metadata().get(crate::EXTENSIONS_HEADER);
        let is_ours = known.is_some_and(|version| version == crate::EXTENSIONS_VERSION);
        let others = types.iter().enumerate().filter(|(place, t)| *place != first && (is_ours || !is_own(t)));
        others.for_each(|(place, type_url)| ask(place, type_url, is_ours));
        Ok((opened.into_inner(), sender))
    }

    fn silent(&self) -> Ended {
        let limit = self.settings.answer_timeout.as_secs();
        Ended::new(Termination::Reconnect, format!("the server did not answer in {limit} s"))
    }

    async fn follow(
        &mut self,
        address: &Uri,
        responses: &mut Streaming<DeltaDiscoveryResponse>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
        answered: &mut bool,
    ) -> Ended {
        let (mut parts, mut connected) = (Earlier::default(), false);
        loop {
            let message = if connected {
                tokio::select! {
                    message = responses.message() => message,
                    () = self.updates.closed() => return Ended::new(Termination::Complete, "the client ends"),
                }
            } else {
                match timeout(self.settings.answer_timeout, responses.message()).await {
                    Ok(message) => message,
                    Err(_) => return self.silent(),
                }
            };
            let response = match message {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::new(Termination::Complete, "the server ended the stream"),
                Err(status) => return Ended::of(&status),
            };
            if !connected {
                connected = true;
                let address: Arc<str> = address.to_string().into();
                tracing::info!(%address, "connected to the control plane");
                self.observer.observe(Event::Connected(&address));
                self.link.send_replace(Link::Connected { address, since: SystemTime::now() });
            }
            if is_part(&response) {
                self.take_part(response, &mut parts).await;
                continue;
            }
            let parts = std::mem::take(&mut parts);
            let bytes = parts.bytes + response.encoded_len();
            self.observer.observe(Event::Message { type_url: &response.type_url, bytes });
            let answer = self.take(response, parts).await;
            // Not with a part: a server that breaks in the middle of its state each time is waited for longer and longer.
            *answered = true;
            if requests.send(answer).await.is_err() {
                // Why is what the next message says.
                continue;
            }
        }
    }

    /// Hands a part of a response out, of which only the last one says what type it is of; or holds it for that.
    async fn take_part(&mut self, response: DeltaDiscoveryResponse, earlier: &mut Earlier) {
        earlier.bytes += response.encoded_len();
        earlier.type_url = earlier.type_url.or_else(|| self.type_of(&response));
        let Some(type_url) = earlier.type_url else {
            let refused = |resource: discovery::Resource| {
                let of = resource.resource.map(|any| any.type_url).unwrap_or_default();
                Rejection { name: resource.name.into(), reason: not_of_it(&of) }
            };
            return earlier.rejections.extend(response.resources.into_iter().map(refused));
        };
        if proto::belongs_together(type_url) {
            return earlier.hold_back(response.resources);
        }
        let rejections = self.hand_out(batch(type_url, response, &mut earlier.seen)).await;
        earlier.rejections.extend(rejections);
    }

    /// What most resources are of, among the types that are followed: single ones may be of another.
    fn type_of(&self, response: &DeltaDiscoveryResponse) -> Option<&'static str> {
        let contents = || response.resources.iter().filter_map(|r| r.resource.as_ref());
        let count = |type_url: &&str| contents().filter(|any| any.type_url == **type_url).count();
        let counted = self.settings.types.iter().map(|type_url| (count(type_url), *type_url));
        counted.filter(|(count, _)| *count > 0).max().map(|(_, type_url)| type_url)
    }

    /// Hands a response out, or the last part of one, and makes the answer to it.
    async fn take(
        &mut self,
        mut response: DeltaDiscoveryResponse,
        mut earlier: Earlier,
    ) -> DeltaDiscoveryRequest {
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let mut rejections = std::mem::take(&mut earlier.rejections);
        match self.held.of(&response.type_url) {
            Some(_) if earlier.is_too_long() => {
                let (limit, bytes) = (TOGETHER_BYTES >> 20, earlier.bytes >> 20);
                let reason = format!(
                    "it belongs together, and with {bytes} MiB takes more than the {limit} MiB that may be put in force at once"
                );
                rejections.push(Rejection { name: "".into(), reason });
            }
            Some((type_url, held)) if earlier.type_url.is_none_or(|earlier| earlier == type_url) => {
                name(&mut response.removed_resources, held);
                // Removals come first: what is in another part as well is there.
                response.removed_resources.retain(|name| !earlier.seen.contains(name.as_str()));
                drop(response.resources.splice(..0, std::mem::take(&mut earlier.held_back)));
                rejections.extend(self.hand_out(batch(type_url, response, &mut earlier.seen)).await);
            }
            Some(_) => {
                let reason = not_of_it(earlier.type_url.unwrap_or_default());
                rejections.push(Rejection { name: "".into(), reason });
            }
            None => {
                let reason = "this type was not asked for".to_owned();
                rejections.push(Rejection { name: "".into(), reason });
            }
        }
        if !rejections.is_empty() {
            let type_url = &answer.type_url;
            self.observer.observe(Event::Rejected { type_url, resources: rejections.len() });
            let status = refusal(&rejections);
            tracing::warn!(%type_url, message = %status.message, "resources are refused");
            answer.error_detail = Some(status);
        }
        answer
    }

    /// Gives the user a batch, waits for what it says, and remembers what is in force. Returns what is not.
    async fn hand_out(&mut self, batch: Batch) -> Vec<Rejection> {
        let Batch { type_url, resources, removed, complete, origin, malformed: mut rejections } = batch;
        let (kept, gone) = (resources.clone(), removed.clone());
        let (sender, answer) = oneshot::channel();
        let reply = Reply { sender, lasts: false };
        let update = Update { type_url, resources, removed, complete, origin, reply };
        let answered = match self.updates.send(update).await {
            Ok(()) => answer.await.ok(),
            Err(_) => None,
        };
        let Some(Answer { rejections: more, lasts }) = answered else {
            let reason = || "it was not applied".to_owned();
            rejections.extend(kept.into_iter().map(|r| Rejection { name: r.name, reason: reason() }));
            if rejections.is_empty() {
                let reason = "the response was not applied".to_owned();
                rejections.push(Rejection { name: "".into(), reason });
            }
            return rejections;
        };
        // Not what is malformed: of a name that is there twice, the first is in force.
        let refused: BTreeSet<Arc<str>> = more.iter().map(|r| r.name.clone()).collect();
        rejections.extend(more);
        let saved = |r: &Resource| Saved {
            name: r.name.to_string(),
            version: r.version.clone(),
            aliases: r.aliases.clone(),
            body: r.body.clone(),
        };
        let saved: Vec<Saved> = kept.iter().map(saved).collect();
        if let Some((_, held)) = self.held.of(type_url) {
            gone.iter().for_each(|name| held.remove(name));
            for (Resource { name, version, .. }, saved) in kept.into_iter().zip(&saved) {
                match refused.contains(&name) {
                    true => held.refuse(&name, &version, saved.encoded_len()),
                    false => held.set(&name, &version, saved.encoded_len()),
                }
            }
            held.complete |= complete;
        }
        if origin == Origin::Server {
            let type_url = type_url.to_owned();
            let record = Record { type_url, resources: saved, removed: gone, complete, more: false };
            self.keep(record, lasts).await;
        }
        rejections
    }

    /// Appends to the journal.
    async fn keep(&mut self, record: Record, lasts: bool) {
        let Some(journal) = self.journal.take() else { return };
        let live = self.held.bytes();
        let appended = blocking(move || journal.append(record, live, lasts)).await;
        let compacted = match appended {
            Ok(journal) if journal.is_long() => {
                let held = std::mem::replace(&mut self.held, Held::new(&[]));
                let (held, compacted) = blocking(move || {
                    let compacted = journal.compact(&held);
                    (held, compacted)
                })
                .await;
                self.held = held;
                compacted
            }
            other => other,
        };
        match compacted {
            Ok(journal) => self.journal = Some(journal),
            Err(error) => self.state_lost(&error),
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // It neither is cancelled nor panics, but for what ends the process anyway.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Puts names in the place of the hashes that a server had.
fn name(removed: &mut Vec<String>, held: &HeldType) {
    let keys: Vec<NameKey> = removed.iter().filter_map(|name| NameKey::parse(name)).collect();
    if !keys.is_empty() {
        removed.retain(|name| NameKey::parse(name).is_none());
        removed.extend(held.named(&keys));
    }
}

fn not_of_it(type_url: &str) -> String {
    format!("its content is a {type_url}")
}

/// Sorts out what needs no user. `seen` are the names that were there before.
fn batch(type_url: &'static str, response: DeltaDiscoveryResponse, seen: &mut HashSet<Arc<str>>) -> Batch {
    let mut resources = Vec::with_capacity(response.resources.len());
    let mut malformed = Vec::new();
    let complete = !is_part(&response) && !crate::server::has_more(&response.system_version_info);
    for resource in response.resources {
        let name: Arc<str> = resource.name.into();
        let reason = match &resource.resource {
            _ if name.is_empty() => Some("it has no name".to_owned()),
            None => Some("it has no content".to_owned()),
            Some(any) if any.type_url != type_url => Some(not_of_it(&any.type_url)),
            _ if !seen.insert(name.clone()) => Some("it is there twice".to_owned()),
            Some(_) => None,
        };
        match (reason, resource.resource) {
            (None, Some(any)) => resources.push(Resource {
                name,
                version: resource.version,
                aliases: resource.aliases,
                body: Bytes::from(any.value),
            }),
            (reason, _) => {
                malformed.push(Rejection { name, reason: reason.unwrap_or_default() });
            }
        }
    }
    Batch {
        type_url,
        resources,
        removed: response.removed_resources,
        complete,
        origin: Origin::Server,
        malformed,
    }
}

/// What the server is told of resources that were refused.
fn refusal(rejections: &[Rejection]) -> rpc::Status {
    let mut text = format!("{} refused", rejections.len());
    for Rejection { name, reason } in rejections.iter().take(IN_TEXT) {
        text.push_str(&format!("; {name}: {reason}"));
    }
    let mut named: BTreeMap<&str, &str> = BTreeMap::new();
    rejections.iter().take(NAMED).for_each(|r| {
        named.insert(&r.name, &r.reason);
    });
    let mut violations: Vec<_> = named
        .into_iter()
        .map(|(name, reason)| rpc::bad_request::FieldViolation {
            field: name.into(),
            description: reason.into(),
        })
        .collect();
    if rejections.len() > NAMED {
        let description = format!("and {} more", rejections.len() - NAMED);
        violations.push(rpc::bad_request::FieldViolation { field: String::new(), description });
    }
    let details = rpc::BadRequest { field_violations: violations };
    rpc::Status {
        code: Code::InvalidArgument.into(),
        message: text,
        details: vec![prost_types::Any {
            type_url: BAD_REQUEST_TYPE_URL.to_owned(),
            value: details.encode_to_vec(),
        }],
    }
}
