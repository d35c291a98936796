//! One client's stream, without the stream: requests in, responses out.
//!
//! * For each type at most one response is under way; the next is made when it was answered, of all that has
//!   changed until then. A client that does not read or answer costs that response and nothing more.
//! * Types have an order. What is new of a type goes before what changes at the same time of the types behind it;
//!   what is removed of it goes after. So a policy is there before a workload lists it, and until none does.
//! * Nothing is sent that the client has, but what it asks for by name.
//!
//! No I/O; the time is passed in.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::wire::{discovery::DeltaDiscoveryRequest, rpc};
use proto::{Extensions, Features};

use super::response::{Response, version_info};
use super::store::{Generation, Interest, Store, Topic};
use super::subscription::{Behind, Context, Held, Refusal, Subscription, TypeStatus};
use crate::BAD_REQUEST_TYPE_URL;
use crate::inventory::Inventory;

/// What a client may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a response to our own proxies may be, in bytes; a longer one goes in parts, but for a single
    /// resource that is longer, and for what [belongs together](proto::belongs_together). Others don't know which part is the last, and get all at once.
    pub response_bytes: usize,
    /// How many single names a client may follow of a type.
    pub names: usize,
    /// How many types a client may ask for, of ours and of others, which are answered with nothing.
    pub types: usize,
    /// How many refused resources are remembered for each type of a client.
    pub rejections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // What a proxy reads at once it holds several times over meanwhile.
        Self { response_bytes: 1 << 20, names: 100_000, types: 16, rejections: 1000 }
    }
}

impl Limits {
    fn response_bytes(&self, type_url: &str) -> usize {
        if proto::belongs_together(type_url) { usize::MAX } else { self.response_bytes }
    }
}

/// Why a client can't go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// A request without a type.
    #[error("a request has no type_url")]
    NoType,
    /// What it says to hold can't be read.
    #[error("culvert_held of {0} is no inventory")]
    Inventory(Arc<str>),
    /// Too many types.
    #[error("asks for more than {0} types")]
    Types(usize),
    /// Too many names.
    #[error("follows more than {limit} names of {type_url}")]
    Names {
        /// The limit.
        limit: usize,
        /// The type.
        type_url: Arc<str>,
    },
    /// It was away for too many removals.
    #[error("is too far behind: the removals that it lacks are forgotten; connect again")]
    Behind,
}

impl From<Behind> for Violation {
    fn from(Behind: Behind) -> Self {
        Self::Behind
    }
}

/// What a client answered to a response.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It accepted it.
    Ack,
    /// It refused it, or parts of it.
    Nack(Arc<str>),
}

/// What a request changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Heard {
    /// The type.
    pub type_url: Arc<str>,
    /// Names that the client follows from now on: see [`Store::watch`].
    pub watch: Vec<Arc<str>>,
    /// Names that it no longer follows.
    pub unwatch: Vec<Arc<str>>,
    /// What it answered, if that was to the response under way.
    pub answer: Option<Answer>,
}

/// The state of one client. See the module.
pub struct Session {
    audience: Extensions,
    interest: Option<Interest>,
    features: Features,
    limits: Limits,
    /// In the order of types.
    subscriptions: Vec<Subscription>,
    nonce: u64,
    /// What an unknown type has.
    nothing: Topic,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("audience", &self.audience).finish_non_exhaustive()
    }
}

impl Session {
    /// A client that has said nothing yet. `interest` is asked for the scope of each resource that has one; it must
    /// always answer the same.
    #[must_use]
    pub fn new(audience: Extensions, interest: Option<Interest>, limits: Limits) -> Self {
        let features = Features::ALL;
        Self {
            audience,
            interest,
            features,
            limits,
            subscriptions: Vec::new(),
            nonce: 0,
            nothing: Topic::new(""),
        }
    }

    /// The same, of one of ours that knows no more than these.
    #[must_use]
    pub fn that_knows(self, features: Features) -> Self {
        Self { features, ..self }
    }

    /// Who it is, as far as extensions go.
    #[must_use]
    pub fn audience(&self) -> Extensions {
        self.audience
    }

    /// Takes a request.
    ///
    /// # Errors
    /// The client broke a limit: its stream has to end.
    pub fn request(&mut self, store: &Store, request: DeltaDiscoveryRequest) -> Result<Heard, Violation> {
        let type_url: Arc<str> = request.type_url.as_str().into();
        let (place, first) = self.subscription(store, &type_url)?;
        // Taken out, so that it can be changed while the session is read.
        let mut subscription = self.subscriptions.remove(place);
        let context = self.context(store, &type_url);
        let mut heard = Heard { type_url: Arc::clone(&type_url), ..Heard::default() };
        let awaited = subscription.awaited().map(|n| n.to_string());
        if awaited.is_some_and(|n| n == request.response_nonce) {
            let refusal = request.error_detail.map(|status| refusal(&status, self.limits.rejections));
            heard.answer =
                Some(refusal.as_ref().map_or(Answer::Ack, |r| Answer::Nack(Arc::clone(&r.message))));
            subscription.settle(&context, refusal);
        }
        let everything = first && request.resource_names_subscribe.is_empty();
        let was = subscription.wildcard;
        let mut wildcard = was || everything;
        for name in request.resource_names_subscribe {
            match name.as_str() {
                "*" => wildcard = true,
                _ => {
                    let name: Arc<str> = name.into();
                    if subscription.follow(&name) {
                        heard.watch.push(name);
                    }
                }
            }
        }
        for name in request.resource_names_unsubscribe {
            match name.as_str() {
                "*" => wildcard = false,
                _ if subscription.leave(&context, &name) => heard.unwatch.push(name.into()),
                _ => {}
            }
        }
        match (was, wildcard) {
            (false, true) => subscription.follow_all(context.generation),
            (true, false) => subscription.follow_names(),
            _ => {}
        }
        if first {
            let held = match request.culvert_held.as_slice() {
                [] => Held::Named(request.initial_resource_versions),
                hashes => {
                    Held::Hashed(Inventory::parse(hashes).ok_or(Violation::Inventory(type_url.clone()))?)
                }
            };
            subscription.resume(&context, held);
        }
        let count = subscription.count();
        self.subscriptions.insert(place, subscription);
        if count > self.limits.names {
            return Err(Violation::Names { limit: self.limits.names, type_url });
        }
        Ok(heard)
    }

    /// The place of a type's subscription, which is made if there is none, and whether it is new.
    fn subscription(&mut self, store: &Store, type_url: &Arc<str>) -> Result<(usize, bool), Violation> {
        if type_url.is_empty() {
            return Err(Violation::NoType);
        }
        if let Some(place) = self.subscriptions.iter().position(|s| s.type_url == *type_url) {
            return Ok((place, false));
        }
        if self.subscriptions.len() >= self.limits.types {
            return Err(Violation::Types(self.limits.types));
        }
        let order = store.topic(type_url).map(|(order, _)| order);
        let key = order.unwrap_or(usize::MAX);
        let place = self.subscriptions.partition_point(|s| s.order.unwrap_or(usize::MAX) <= key);
        self.subscriptions.insert(place, Subscription::new(Arc::clone(type_url), order));
        Ok((place, true))
    }

    fn context<'a>(&'a self, store: &'a Store, type_url: &str) -> Context<'a> {
        Context {
            topic: store.topic(type_url).map_or(&self.nothing, |(_, topic)| topic),
            audience: self.audience,
            interest: self.interest.as_ref(),
            features: self.features,
            generation: store.generation().0,
            published: store.published().0,
            removals: u64::MAX,
            response_bytes: self.limits.response_bytes(type_url),
            remembered: self.limits.rejections,
        }
    }

    /// A name that the client follows changed.
    pub fn changed(&mut self, type_url: &str, name: &Arc<str>) {
        if let Some(subscription) = self.subscriptions.iter_mut().find(|s| *s.type_url == *type_url) {
            subscription.changed(name);
        }
    }

    /// The next response, if one may be sent now. To be called until there is none, with the same state of the
    /// store, after each request, each change of a followed name, and when the store is published.
    ///
    /// # Errors
    /// The client is too far behind: its stream has to end.
    pub fn poll(&mut self, store: &Store, now: Duration) -> Result<Option<Response>, Violation> {
        // Twice, since what is sent of a type may let those before it remove.
        for place in (0..self.subscriptions.len()).chain(0..self.subscriptions.len()) {
            if let Some(response) = self.poll_one(place, store, now)? {
                return Ok(Some(response));
            }
        }
        Ok(None)
    }

    fn poll_one(
        &mut self,
        place: usize,
        store: &Store,
        now: Duration,
    ) -> Result<Option<Response>, Violation> {
        let (before, rest) = self.subscriptions.split_at_mut(place);
        let Some((subscription, behind)) = rest.split_first_mut() else { return Ok(None) };
        let ordered = subscription.order.is_some();
        let log = |s: &Subscription| store.topic(&s.type_url).map(|(_, topic)| topic.log(self.audience));
        if ordered && !before.iter().all(|s| log(s).is_none_or(|log| s.lets_go(log))) {
            return Ok(None);
        }
        let ordered_behind = behind.iter().filter(|s| ordered && s.order.is_some());
        let context = Context {
            topic: store.topic(&subscription.type_url).map_or(&self.nothing, |(_, topic)| topic),
            audience: self.audience,
            interest: self.interest.as_ref(),
            features: self.features,
            generation: store.generation().0,
            published: store.published().0,
            removals: ordered_behind.map(Subscription::lets_remove).min().unwrap_or(u64::MAX),
            response_bytes: self.limits.response_bytes(&subscription.type_url),
            remembered: self.limits.rejections,
        };
        let nonce = self.nonce + 1;
        let Some((parts, more)) = subscription.next(&context, now, nonce)? else { return Ok(None) };
        self.nonce = nonce;
        Ok(Some(Response {
            system_version_info: version_info(store.generation(), more),
            resources: parts.resources,
            type_url: subscription.type_url.as_ref().to_owned(),
            nonce: nonce.to_string(),
            removed_resources: parts.removed,
        }))
    }

    /// Since when the longest unanswered response is under way.
    #[must_use]
    pub fn waiting_since(&self) -> Option<Duration> {
        self.subscriptions.iter().filter_map(Subscription::waiting_since).min()
    }

    /// The names that the client follows, for [`Store::unwatch`] at its end.
    pub fn watched(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.subscriptions.iter().flat_map(|s| s.names().map(move |n| (&s.type_url, n)))
    }

    /// What the client has, by type, in the order of types.
    #[must_use]
    pub fn status(&self, store: &Store) -> Vec<TypeStatus> {
        self.subscriptions.iter().map(|s| s.status(&self.context(store, &s.type_url))).collect()
    }

    /// What the client has answered for, over all types that it follows. `None` while it follows none.
    #[must_use]
    pub fn acked(&self, store: &Store) -> Option<Generation> {
        let acked = self.subscriptions.iter().map(|s| s.acked(&self.context(store, &s.type_url)));
        acked.min().map(Generation)
    }

    /// How many entries of logs were looked at for this client: the work that it has cost.
    #[must_use]
    pub fn visited(&self) -> u64 {
        self.subscriptions.iter().map(|s| s.visited).sum()
    }
}

/// Reads a refusal; at most `limit` names.
fn refusal(status: &rpc::Status, limit: usize) -> Refusal {
    /// Longer messages are cut.
    const MESSAGE: usize = 4096;
    let cut = |text: &str| -> Arc<str> {
        let end = text.char_indices().nth(MESSAGE).map_or(text.len(), |(i, _)| i);
        text.get(..end).unwrap_or_default().into()
    };
    let mut refusal = Refusal { message: cut(&status.message), ..Refusal::default() };
    let details = status.details.iter().filter(|d| d.type_url == BAD_REQUEST_TYPE_URL);
    let violations = details.filter_map(|d| rpc::BadRequest::decode(d.value.as_slice()).ok());
    for violation in violations.flat_map(|b| b.field_violations) {
        if violation.field.is_empty() || refusal.named.len() >= limit {
            refusal.others = true;
            continue;
        }
        refusal.named.push((violation.field.into(), cut(&violation.description)));
    }
    refusal
}

/// What a node says of itself decides what it understands.
#[must_use]
pub fn audience(node: &proto::wire::core::Node) -> Extensions {
    match metadata(node, crate::EXTENSIONS_METADATA) {
        Some(crate::EXTENSIONS_VERSION) => Extensions::Culvert,
        _ => Extensions::None,
    }
}

/// The Gateway that a waypoint says to be.
#[must_use]
pub fn gateway(node: &proto::wire::core::Node) -> Option<&str> {
    metadata(node, crate::GATEWAY_METADATA)
}

/// The fields that a node says to know.
#[must_use]
pub fn features(node: &proto::wire::core::Node) -> Features {
    metadata(node, crate::FEATURES_METADATA).map_or(Features::NONE, Features::parse)
}

fn metadata<'a>(node: &'a proto::wire::core::Node, key: &str) -> Option<&'a str> {
    use prost_types::value::Kind;
    match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}
