//! One client's stream: a task between its requests, its session and the store.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::SystemTime;

use prost::Message;
use proto::Extensions;
use proto::wire::core::Node;
use proto::wire::discovery::DeltaDiscoveryRequest;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::Stream;
use tonic::{Request, Status};

use super::requests::Requests;
use super::response::Response;
use super::session::{Answer, Session, Violation, audience, features};
use super::status::ClientStatus;
use super::store::{ClientId, Generation, Store};
use super::{Caller, Event, Shared, locked, next_id};

/// A node that says more of itself is refused: it is kept as long as the stream lives.
const NODE_BYTES: usize = 64 << 10;
/// How many requests that are there already are heard before the next response.
const REQUESTS_AT_ONCE: usize = 32;

/// A connected client.
pub(super) struct Client {
    id: ClientId,
    node: Arc<Node>,
    caller: Caller,
    peer: Option<SocketAddr>,
    connected: SystemTime,
    session: Mutex<Session>,
    wake: Notify,
    end: watch::Sender<bool>,
}

impl Client {
    /// A name that it follows changed. Called while the store is locked, before anyone hears of the generation, so
    /// that it never seems to have answered for a change that it knows nothing of.
    pub(super) fn changed(&self, type_url: &str, name: &Arc<str>) {
        locked(&self.session).changed(type_url, name);
        self.wake.notify_one();
    }

    pub(super) fn end(&self) {
        self.end.send_replace(true);
    }

    pub(super) fn status(&self, store: &Store) -> ClientStatus {
        let session = locked(&self.session);
        ClientStatus {
            id: self.id,
            node: Arc::clone(&self.node),
            caller: self.caller.clone(),
            audience: session.audience(),
            peer: self.peer,
            connected: self.connected,
            types: session.status(store),
        }
    }
}

/// What tonic sends from. It holds the client's place, which is free again when the transport lets go of this: a
/// client that does not read keeps its place, and what lies in it, until its connection ends.
pub(super) struct Outgoing {
    responses: mpsc::Receiver<Result<Response, Status>>,
    _place: OwnedSemaphorePermit,
}

impl Stream for Outgoing {
    type Item = Result<Response, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().responses.poll_recv(context)
    }
}

/// Authenticates a client, and begins to serve it.
pub(super) async fn open(shared: &Arc<Shared>, request: Request<Requests>) -> Result<Outgoing, Status> {
    let limit = shared.config.start_timeout;
    let peer = request.remote_addr();
    let (metadata, extensions, requests) = request.into_parts();
    let bare = Request::from_parts(metadata, extensions, ());
    let caller = timeout(limit, async {
        let _permit = shared.authenticating.acquire().await;
        shared.authorizer.authenticate(&bare).await
    });
    let caller =
        caller.await.map_err(|_| Status::unavailable("authentication takes too long; try again"))??;
    let place = Arc::clone(&shared.places).try_acquire_owned();
    let place = place.map_err(|_| {
        let limit = shared.config.clients;
        Status::resource_exhausted(format!("this control plane serves {limit} clients already; try another"))
    })?;
    // One place for each type, since of each only one response is under way, and one for the reason of the end.
    let (sender, responses) = mpsc::channel(shared.config.limits.types + 1);
    let stream = ClientStream { shared: Arc::clone(shared), requests, sender };
    tokio::spawn(stream.run(caller, peer));
    Ok(Outgoing { responses, _place: place })
}

struct ClientStream {
    shared: Arc<Shared>,
    requests: Requests,
    sender: mpsc::Sender<Result<Response, Status>>,
}

/// A client that may have a state.
struct Begun {
    session: Session,
    node: Arc<Node>,
    first: DeltaDiscoveryRequest,
    /// Held until it has one.
    starting: OwnedSemaphorePermit,
}

async fn turn(semaphore: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Status> {
    let permit = Arc::clone(semaphore).acquire_owned().await;
    permit.map_err(|_| Status::unavailable("the server ends"))
}

/// Why a stream ended.
enum End {
    /// The client ended it.
    Client,
    /// The transport failed.
    Transport(Status),
    /// We did.
    Server(Status),
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        let text = violation.to_string();
        Self::Server(match violation {
            Violation::NoType | Violation::Inventory(_) => Status::invalid_argument(text),
            Violation::Types(_) | Violation::Names { .. } => Status::resource_exhausted(text),
            Violation::Behind => Status::aborted(text),
        })
    }
}

impl ClientStream {
    async fn run(mut self, caller: Caller, peer: Option<SocketAddr>) {
        let sender = self.sender.clone();
        let begun = tokio::select! {
            begun = self.begin(&caller) => begun,
            () = sender.closed() => return,
        };
        drop(sender);
        let Begun { session, node, first, starting } = match begun {
            Ok(begun) => begun,
            Err(status) => {
                self.shared.observer.observe(Event::Refused(&status));
                self.finish(status);
                return;
            }
        };
        let client = Arc::new(Client {
            id: next_id(&self.shared),
            node,
            caller,
            peer,
            connected: SystemTime::now(),
            session: Mutex::new(session),
            wake: Notify::new(),
            end: watch::Sender::new(false),
        });
        let registered = Registered::new(&self.shared, &client);
        let end = self.serve(&client, first, starting).await;
        let reason = match &end {
            End::Client => "the client ended the stream".to_owned(),
            End::Transport(status) => format!("the transport failed: {}", status.message()),
            End::Server(status) => status.message().to_owned(),
        };
        registered.end(reason);
        if let End::Server(status) = end {
            self.finish(status);
        }
    }

    fn finish(self, status: Status) {
        // When there is no room, the client does not read, and would not read this.
        let _ = self.sender.try_send(Err(status));
    }

    /// Hears the first request, when it is this client's turn to be given a state, and there is one.
    async fn begin(&mut self, caller: &Caller) -> Result<Begun, Status> {
        let mut ready = self.shared.ready.subscribe();
        ready.wait_for(|ready| *ready).await.map_err(|_| Status::unavailable("the server ends"))?;
        let mut starting = turn(&self.shared.starting).await?;
        let mut first = match timeout(self.shared.config.start_timeout, self.requests.message()).await {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) => return Err(Status::cancelled("ended before the first request")),
            Ok(Err(status)) => return Err(status),
            Err(_) => return Err(Status::deadline_exceeded("no request came in time")),
        };
        let node = first.node.take().filter(|n| !n.id.is_empty());
        let node =
            node.ok_or_else(|| Status::invalid_argument("the first request has no node with an id"))?;
        if node.encoded_len() > NODE_BYTES {
            return Err(Status::invalid_argument(format!("the node has more than {NODE_BYTES} bytes")));
        }
        let admission = self.shared.authorizer.admit(caller, &node)?;
        let audience = audience(&node);
        if audience == Extensions::None {
            // Not while it keeps one of ours from starting.
            drop(starting);
            starting = turn(&self.shared.starting_others).await?;
        }
        let session =
            Session::new(audience, admission.interest, self.shared.config.limits).that_knows(features(&node));
        Ok(Begun { session, node: Arc::new(node), first, starting })
    }

    async fn serve(
        &mut self,
        client: &Client,
        first: DeltaDiscoveryRequest,
        starting: OwnedSemaphorePermit,
    ) -> End {
        let mut published = self.shared.published.subscribe();
        let mut end = client.end.subscribe();
        let mut acked = self.shared.read().published();
        let mut sent = acked;
        let mut starting = Some(starting);
        let mut next = Some(first);
        loop {
            let sent = match self.hear(client, next.take()).await {
                Ok(()) => self.send(client, &mut sent),
                Err(end) => return end,
            };
            let waiting = match sent {
                Ok(waiting) => waiting,
                Err(end) => return end,
            };
            self.progress(client, &mut acked);
            if waiting.is_none() {
                // It has a state: the next may start.
                drop(starting.take());
            }
            tokio::select! {
                biased;
                _ = end.wait_for(|end| *end) => {
                    return End::Server(Status::unavailable(
                        "the control plane ended the stream, or there is a newer stream of this node; connect again",
                    ));
                }
                request = self.requests.message() => match request {
                    Ok(Some(request)) => next = Some(request),
                    Ok(None) => return End::Client,
                    Err(status) => return End::Transport(status),
                },
                _ = published.changed() => {}
                () = client.wake.notified() => {}
                () = async { sleep_until(waiting.unwrap_or_else(Instant::now)).await }, if waiting.is_some() => {
                    let limit = self.shared.config.answer_timeout;
                    let text = format!("a response was not answered in {} s", limit.as_secs_f32());
                    return End::Server(Status::deadline_exceeded(text));
                }
                () = self.sender.closed() => return End::Client,
            }
        }
    }

    /// Takes a request, and those that are there already: a client that asks for several types at once is to be
    /// answered in their order.
    async fn hear(&mut self, client: &Client, mut next: Option<DeltaDiscoveryRequest>) -> Result<(), End> {
        for _ in 0..REQUESTS_AT_ONCE {
            let Some(request) = next.take() else { return Ok(()) };
            self.take(client, request)?;
            next = tokio::select! {
                biased;
                request = self.requests.message() => match request {
                    Ok(Some(request)) => Some(request),
                    Ok(None) => return Err(End::Client),
                    Err(status) => return Err(End::Transport(status)),
                },
                () = std::future::ready(()) => None,
            };
        }
        match next {
            Some(request) => self.take(client, request),
            None => Ok(()),
        }
    }

    fn take(&self, client: &Client, request: DeltaDiscoveryRequest) -> Result<(), End> {
        let heard = {
            let store = self.shared.read();
            locked(&client.session).request(&store, request)?
        };
        if !heard.watch.is_empty() || !heard.unwatch.is_empty() {
            // What changes in between is seen all the same: names are looked up when the answer is made.
            let mut store = self.shared.write();
            heard.watch.iter().for_each(|name| store.watch(client.id, &heard.type_url, name));
            heard.unwatch.iter().for_each(|name| store.unwatch(client.id, &heard.type_url, name));
        }
        let Some(answer) = heard.answer else { return Ok(()) };
        if let Answer::Nack(message) = &answer {
            let type_url = &heard.type_url;
            tracing::warn!(node = %client.node.id, %type_url, %message, "a client refused resources");
            self.shared.observer.observe(Event::Rejected { node: &client.node, type_url, message });
        }
        self.shared.tick();
        Ok(())
    }

    /// Measures how long changes took, when the client has answered for more than before.
    fn progress(&self, client: &Client, before: &mut Generation) {
        let acked = {
            let store = self.shared.read();
            locked(&client.session).acked(&store)
        };
        if let Some(acked) = acked.filter(|acked| *acked > *before) {
            self.shared.converged(*before, acked);
            *before = acked;
            self.shared.tick();
        }
    }

    /// Sends what may be sent, remembers until which publication, and says until when what is under way must be answered.
    fn send(&self, client: &Client, sent: &mut Generation) -> Result<Option<Instant>, End> {
        let mut responses = Vec::new();
        let since = {
            let store = self.shared.read();
            let mut session = locked(&client.session);
            while let Some(response) = session.poll(&store, self.shared.now())? {
                responses.push(response);
            }
            if !responses.is_empty() {
                self.shared.queued(*sent);
                *sent = store.published();
            }
            session.waiting_since()
        };
        for response in responses {
            self.shared.observer.observe(Event::Pushed {
                type_url: &response.type_url,
                resources: response.resources.len(),
                removed: response.removed_resources.len(),
                bytes: response.resources.iter().map(bytes::Bytes::len).sum(),
            });
            if self.sender.try_send(Ok(response)).is_err() {
                return Err(End::Client);
            }
        }
        Ok(since.map(|since| self.shared.began + since + self.shared.config.answer_timeout))
    }
}

/// A client in the list of those that are there, until this is dropped.
struct Registered {
    shared: Arc<Shared>,
    client: Arc<Client>,
    reason: Option<String>,
}

impl Registered {
    fn new(shared: &Arc<Shared>, client: &Arc<Client>) -> Self {
        let mut clients = locked(&shared.clients);
        // One of ours has one stream. An older one is of a connection that broke without a word, and would be taken
        // for a proxy that lags behind.
        let older = clients.values().filter(|c| c.node.id == client.node.id && c.caller == client.caller);
        if audience(&client.node) == Extensions::Culvert {
            older.for_each(|c| c.end());
        }
        clients.insert(client.id, Arc::clone(client));
        drop(clients);
        shared.observer.observe(Event::Connected(&client.node));
        tracing::info!(node = %client.node.id, caller = %client.caller.name, "a client connected");
        shared.tick();
        Self { shared: Arc::clone(shared), client: Arc::clone(client), reason: None }
    }

    fn end(mut self, reason: String) {
        self.reason = Some(reason);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let reason = self.reason.as_deref().unwrap_or("the server ends");
        {
            let mut store = self.shared.write();
            let session = locked(&self.client.session);
            session.watched().for_each(|(type_url, name)| store.unwatch(self.client.id, type_url, name));
        }
        locked(&self.shared.clients).remove(&self.client.id);
        self.shared.observer.observe(Event::Disconnected(&self.client.node, reason));
        tracing::info!(node = %self.client.node.id, reason, "a client is gone");
        self.shared.tick();
    }
}
