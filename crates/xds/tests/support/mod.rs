//! A store, its clients without streams between, and clients that check what they are sent.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use proto::Extensions;
use proto::wire::{discovery, rpc};
use xds::server::session::Heard;
use xds::server::{
    Change, ClientId, Generation, Interest, Limits, Resource, Response, Session, Store, Violation,
};

pub const POLICY: &str = "type.googleapis.com/test.Policy";
pub const ADDRESS: &str = "type.googleapis.com/test.Address";

/// A resource whose two bodies are the same.
pub fn resource(type_url: &'static str, name: &str, body: &str) -> Resource {
    let body = Bytes::copy_from_slice(body.as_bytes());
    Resource {
        type_url,
        name: name.into(),
        aliases: Vec::new(),
        scope: None,
        plain: Some(body.clone()),
        culvert: Some(body),
        needs: proto::Features::NONE,
    }
}

pub fn set(type_url: &'static str, name: &str, body: &str) -> Change {
    Change::Set(resource(type_url, name, body))
}

pub fn remove(type_url: &'static str, name: &str) -> Change {
    Change::Remove { type_url, name: name.into() }
}

/// What a client holds of one type: name to version and body.
pub type Held = BTreeMap<String, (String, String)>;

/// A client, on its side of the wire.
pub struct Peer {
    pub id: ClientId,
    pub session: Session,
    pub held: BTreeMap<String, Held>,
    pub inbox: VecDeque<discovery::DeltaDiscoveryResponse>,
    /// Responses so far.
    pub responses: usize,
    /// Resources so far.
    pub resources: usize,
}

pub struct World {
    pub store: Store,
    pub peers: BTreeMap<ClientId, Peer>,
    next: u64,
    pub limits: Limits,
}

/// What names are called in inventories.
fn hash(name: &str) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes()).as_ref()[..16].to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What our own clients say that they hold.
fn inventory(versions: impl Iterator<Item = (String, String)>) -> Vec<u8> {
    let digits = |text: &str, at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
    let bytes = |version: &str| (0..version.len() / 2).map(|at| digits(version, at)).collect::<Vec<_>>();
    let mut entries: Vec<_> = versions.map(|(name, v)| [hash(&name), bytes(&v)].concat()).collect();
    entries.sort();
    entries.concat()
}

/// As the wire would give it.
pub fn sent(response: &Response) -> discovery::DeltaDiscoveryResponse {
    discovery::DeltaDiscoveryResponse::decode(response.encode_to_vec().as_slice()).unwrap()
}

pub fn subscribe(type_url: &str, names: &[&str]) -> discovery::DeltaDiscoveryRequest {
    discovery::DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    }
}

pub fn unsubscribe(type_url: &str, names: &[&str]) -> discovery::DeltaDiscoveryRequest {
    discovery::DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_unsubscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    }
}

impl World {
    pub fn new() -> Self {
        Self::with(Store::new(&[POLICY, ADDRESS], 100))
    }

    pub fn with(store: Store) -> Self {
        Self { store, peers: BTreeMap::new(), next: 0, limits: Limits::default() }
    }

    /// Makes changes without letting anyone hear of them.
    pub fn stage(&mut self, changes: impl IntoIterator<Item = Change>) -> Generation {
        for change in changes {
            for follower in self.store.change(&change) {
                let peer = self.peers.get_mut(&follower.client).expect("only those who are there are named");
                peer.session.changed(follower.type_url, &follower.name);
            }
        }
        self.store.generation()
    }

    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Generation {
        let generation = self.stage(changes);
        self.store.publish();
        generation
    }

    pub fn connect(&mut self, audience: Extensions, interest: Option<Interest>) -> ClientId {
        let id = ClientId(self.next);
        self.next += 1;
        let session = Session::new(audience, interest, self.limits);
        let (held, inbox) = (BTreeMap::new(), VecDeque::new());
        self.peers.insert(id, Peer { id, session, held, inbox, responses: 0, resources: 0 });
        id
    }

    /// A client of ours that follows both types whole.
    pub fn follower(&mut self) -> ClientId {
        let id = self.connect(Extensions::Culvert, None);
        self.request(id, subscribe(POLICY, &[])).unwrap();
        self.request(id, subscribe(ADDRESS, &[])).unwrap();
        id
    }

    pub fn peer(&mut self, id: ClientId) -> &mut Peer {
        self.peers.get_mut(&id).unwrap()
    }

    pub fn request(
        &mut self,
        id: ClientId,
        request: discovery::DeltaDiscoveryRequest,
    ) -> Result<Heard, Violation> {
        let peer = self.peers.get_mut(&id).unwrap();
        let heard = peer.session.request(&self.store, request)?;
        heard.watch.iter().for_each(|n| self.store.watch(id, &heard.type_url, n));
        heard.unwatch.iter().for_each(|n| self.store.unwatch(id, &heard.type_url, n));
        Ok(heard)
    }

    /// Puts what the server sends into the inbox.
    pub fn poll(&mut self, id: ClientId) -> Result<(), Violation> {
        let peer = self.peers.get_mut(&id).unwrap();
        while let Some(response) = peer.session.poll(&self.store, Duration::ZERO)? {
            peer.inbox.push_back(sent(&response));
        }
        Ok(())
    }

    /// Takes a response out of the inbox and answers it.
    pub fn deliver(
        &mut self,
        id: ClientId,
        refuse: &BTreeSet<String>,
    ) -> Option<discovery::DeltaDiscoveryResponse> {
        let peer = self.peers.get_mut(&id).unwrap();
        let mut response = peer.inbox.pop_front()?;
        peer.responses += 1;
        peer.resources += response.resources.len();
        let held = peer.held.entry(response.type_url.clone()).or_default();
        for name in response.removed_resources.iter_mut().filter(|name| name.starts_with('#')) {
            let found = held.keys().find(|held| format!("#{}", hex(&hash(held))) == *name);
            *name = found.expect("a hash of nothing that is held").clone();
        }
        let named: BTreeSet<_> = response.resources.iter().map(|r| r.name.clone()).collect();
        assert_eq!(named.len(), response.resources.len(), "a name twice in one response");
        assert!(
            response.removed_resources.iter().all(|n| !named.contains(n)),
            "set and removed in one response"
        );
        let gone: BTreeSet<_> = response.removed_resources.iter().collect();
        assert_eq!(gone.len(), response.removed_resources.len(), "removed twice in one response");
        let mut violations = Vec::new();
        for resource in &response.resources {
            let any = resource.resource.as_ref().unwrap();
            assert_eq!(any.type_url, response.type_url);
            if refuse.contains(&resource.name) {
                violations.push(rpc::bad_request::FieldViolation {
                    field: resource.name.clone(),
                    description: "no".into(),
                });
                continue;
            }
            let body = String::from_utf8(any.value.clone()).unwrap();
            held.insert(resource.name.clone(), (resource.version.clone(), body));
        }
        response.removed_resources.iter().for_each(|n| {
            held.remove(n);
        });
        let error_detail = (!violations.is_empty()).then(|| rpc::Status {
            code: 3,
            message: format!("{} refused", violations.len()),
            details: vec![prost_types::Any {
                type_url: xds::BAD_REQUEST_TYPE_URL.into(),
                value: rpc::BadRequest { field_violations: violations }.encode_to_vec(),
            }],
        });
        let answer = discovery::DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..Default::default()
        };
        self.request(id, answer).unwrap();
        Some(response)
    }

    /// Lets a client have everything that it is to have now, and returns the responses.
    pub fn settle(&mut self, id: ClientId) -> Vec<discovery::DeltaDiscoveryResponse> {
        self.settle_refusing(id, &BTreeSet::new())
    }

    pub fn settle_refusing(
        &mut self,
        id: ClientId,
        refuse: &BTreeSet<String>,
    ) -> Vec<discovery::DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        loop {
            self.poll(id).unwrap();
            match self.deliver(id, refuse) {
                Some(response) => responses.push(response),
                None => return responses,
            }
            assert!(responses.len() < 10_000, "it goes on for ever");
        }
    }

    /// The stream ends, and what was on its way is lost; the client comes back with what it holds.
    pub fn reconnect(&mut self, id: ClientId, first: Vec<discovery::DeltaDiscoveryRequest>) {
        let peer = self.peers.get_mut(&id).unwrap();
        let watched: Vec<_> = peer.session.watched().map(|(t, n)| (Arc::clone(t), Arc::clone(n))).collect();
        watched.iter().for_each(|(t, n)| self.store.unwatch(id, t, n));
        peer.inbox.clear();
        let audience = peer.session.audience();
        peer.session = Session::new(audience, None, self.limits);
        for mut request in first {
            let held = self.peers[&id].held.get(&request.type_url);
            let versions = held.into_iter().flatten().map(|(n, (v, _))| (n.clone(), v.clone()));
            if audience == Extensions::Culvert && request.resource_names_subscribe.is_empty() {
                request.culvert_held = inventory(versions);
            } else {
                request.initial_resource_versions = versions.collect();
            }
            self.request(id, request).unwrap();
        }
    }

    pub fn bodies(&self, id: ClientId, type_url: &str) -> BTreeMap<String, String> {
        let held = self.peers[&id].held.get(type_url);
        held.into_iter().flatten().map(|(n, (_, body))| (n.clone(), body.clone())).collect()
    }
}

pub fn names(response: &discovery::DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

pub fn bodies<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub fn gone(response: &discovery::DeltaDiscoveryResponse) -> Vec<&str> {
    response.removed_resources.iter().map(String::as_str).collect()
}
