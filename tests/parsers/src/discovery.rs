//! What clients of the control plane's discovery service send.

use std::time::Duration;

use prost::Message;
use proto::wire::discovery::DeltaDiscoveryRequest;
use proto::wire::rpc;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Extensions};
use xds::server::{Change, ClientId, Limits, Resource, Session, Store};

fn resource(type_url: &'static str, name: &str) -> Change {
    let body = Some(vec![7; 100].into());
    let (aliases, name) = (vec![format!("net/{name}").into()], name.into());
    Change::Set(Resource {
        type_url,
        name,
        aliases,
        scope: None,
        plain: body.clone(),
        culvert: body,
        needs: proto::Features::NONE,
    })
}

/// Requests, one after the other, each behind its length: whatever they are, the session stays within its limits,
/// and never has more than one response under way for a type.
pub(crate) fn requests(mut bytes: &[u8]) {
    let limits = Limits { response_bytes: 300, names: 8, types: 4, rejections: 3 };
    let mut store = Store::new(&[AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL], 2);
    for name in ["a", "b", "c", "d"] {
        store.change(&resource(ADDRESS_TYPE_URL, name));
        store.change(&resource(AUTHORIZATION_TYPE_URL, name));
    }
    store.publish();
    let (id, mut session) = (ClientId(1), Session::new(Extensions::Culvert, None, limits));
    let mut polled = 0;
    while let Ok(request) = DeltaDiscoveryRequest::decode_length_delimited(&mut bytes) {
        let Ok(heard) = session.request(&store, request) else { return };
        heard.watch.iter().for_each(|name| store.watch(id, &heard.type_url, name));
        heard.unwatch.iter().for_each(|name| store.unwatch(id, &heard.type_url, name));
        // Something happens in between.
        let name = ["a", "b", "c"][polled % 3];
        let change = match polled % 2 {
            0 => Change::Remove { type_url: ADDRESS_TYPE_URL, name: name.into() },
            _ => resource(ADDRESS_TYPE_URL, name),
        };
        for follower in store.change(&change) {
            session.changed(follower.type_url, &follower.name);
        }
        store.publish();
        let mut responses = 0;
        while let Ok(Some(response)) = session.poll(&store, Duration::ZERO) {
            responses += 1;
            assert!(responses <= limits.types, "more than one response for a type");
            assert!(response.encoded_len() < 1000, "a response of {} bytes", response.encoded_len());
        }
        polled += 1;
        for status in session.status(&store) {
            assert!(status.rejected.len() <= limits.rejections && status.names <= limits.names);
            assert!(status.acked <= store.generation());
        }
    }
}

/// Conversations as they are had.
pub(crate) fn conversations() -> Vec<Vec<u8>> {
    let subscribe = |type_url: &str, names: &[&str]| DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    };
    let answer = |nonce: &str, refused: &[&str]| DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE_URL.to_owned(),
        response_nonce: nonce.to_owned(),
        error_detail: (!refused.is_empty()).then(|| {
            let violation = |name: &&str| rpc::bad_request::FieldViolation {
                field: (*name).to_owned(),
                description: "no".to_owned(),
            };
            let details = rpc::BadRequest { field_violations: refused.iter().map(violation).collect() };
            rpc::Status {
                code: 3,
                message: "no".to_owned(),
                details: vec![prost_types::Any {
                    type_url: xds::BAD_REQUEST_TYPE_URL.to_owned(),
                    value: details.encode_to_vec(),
                }],
            }
        }),
        ..DeltaDiscoveryRequest::default()
    };
    let mut resumed = subscribe(ADDRESS_TYPE_URL, &[]);
    resumed.initial_resource_versions =
        [("a", "0123456789abcdef0123"), ("gone", "1")].map(|(n, v)| (n.to_owned(), v.to_owned())).into();
    let mut on_demand = subscribe(ADDRESS_TYPE_URL, &["*", "a", "net/b"]);
    on_demand.resource_names_unsubscribe = vec!["*".to_owned(), "a".to_owned()];
    let conversations = [
        vec![subscribe(ADDRESS_TYPE_URL, &[]), answer("1", &[]), answer("2", &[]), answer("3", &[])],
        vec![
            subscribe(AUTHORIZATION_TYPE_URL, &[]),
            subscribe(ADDRESS_TYPE_URL, &[]),
            answer("2", &["a", "b"]),
        ],
        vec![resumed, answer("1", &["a", "x", "y", "z"]), answer("2", &[])],
        vec![on_demand, answer("1", &[]), subscribe(ADDRESS_TYPE_URL, &["c", "net/d"]), answer("2", &["c"])],
    ];
    let written = |requests: Vec<DeltaDiscoveryRequest>| {
        requests.iter().flat_map(Message::encode_length_delimited_to_vec).collect()
    };
    conversations.into_iter().map(written).collect()
}
