//! Input that no well-meaning peer sends: errors, never panics, and errors that say where.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod strategies;

use proptest::prelude::*;
use prost::Message;
use proto::wire::{culvert, security, workload};
use proto::{
    Decoder, Extensions, Problem, encode_authentication, encode_authorizer, encode_http_policy,
    encode_http_service, encode_policy, encode_rate_limit, encode_service, encode_traffic, encode_workload,
};

/// Reads `bytes` as everything that they could be.
fn read_all(bytes: &[u8]) {
    let mut decoder = Decoder::default();
    if let Ok(message) = workload::Workload::decode(bytes) {
        let _ = message.not_applied();
        let _ = decoder.workload(&message);
    }
    if let Ok(message) = workload::Service::decode(bytes) {
        let _ = message.not_applied();
        let _ = decoder.service(&message);
    }
    if let Ok(message) = workload::Address::decode(bytes) {
        let _ = decoder.address(&message);
    }
    if let Ok(message) = security::Authorization::decode(bytes) {
        let _ = message.not_applied();
        let _ = decoder.policy(&message);
    }
    let _ = decoder.http_service(bytes);
    let _ = decoder.http_policy(bytes);
    let _ = decoder.traffic(bytes);
    let _ = decoder.authentication(bytes);
    let _ = decoder.rate_limit(bytes);
    let _ = decoder.authorizer(bytes);
    let _ = proto::wire::zds::WorkloadRequest::decode(bytes);
    let _ = proto::wire::zds::WorkloadResponse::decode(bytes);
    let _ = proto::wire::zds::ZdsHello::decode(bytes);
    let _ = proto::wire::auth::IstioCertificateResponse::decode(bytes);
    decoder.sweep();
}

/// Messages with any value in any field: whatever number, text or bytes the type holds.
fn any_workload() -> impl Strategy<Value = workload::Workload> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..18);
    let port =
        (any::<u32>(), any::<u32>(), any::<i32>()).prop_map(|(service_port, target_port, app_protocol)| {
            workload::Port { service_port, target_port, app_protocol, culvert: None }
        });
    let ports = prop::collection::vec(port, 0..3).prop_map(|ports| workload::PortList { ports });
    let gateway =
        (bytes(), any::<Option<u32>>(), any::<u32>()).prop_map(|(address, length, hbone_mtls_port)| {
            use workload::gateway_address::Destination;
            let address = workload::NetworkAddress { network: String::new(), address, length };
            workload::GatewayAddress { destination: Some(Destination::Address(address)), hbone_mtls_port }
        });
    (
        (any::<String>(), any::<String>(), any::<[i32; 4]>()),
        prop::collection::vec(bytes(), 0..3),
        prop::collection::btree_map(any::<String>(), ports, 0..3),
        prop::collection::vec(any::<String>(), 0..3),
        prop::option::of(gateway),
    )
        .prop_map(|((uid, trust_domain, enums), addresses, services, policies, waypoint)| {
            workload::Workload {
                uid,
                trust_domain,
                tunnel_protocol: enums[0],
                status: enums[1],
                network_mode: enums[2],
                workload_type: enums[3],
                addresses,
                services,
                authorization_policies: policies,
                waypoint,
                ..Default::default()
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        read_all(&bytes);
    }

    #[test]
    fn any_field_values_are_read_or_refused(message in any_workload()) {
        if let Err(error) = Decoder::default().workload(&message) {
            prop_assert!(!error.field.is_empty() && error.to_string().len() < 3000);
        }
    }

    #[test]
    fn damaged_messages_are_read_or_refused(
        w in strategies::workload(),
        s in strategies::service(),
        p in strategies::policy(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        for mut bytes in [
            encode_workload(&w).unwrap().encode_to_vec(),
            encode_service(&s, Extensions::Culvert).unwrap().encode_to_vec(),
            encode_policy(&p, Extensions::Culvert).unwrap().encode_to_vec(),
        ] {
            if bytes.is_empty() { continue }
            read_all(&bytes[..cut.index(bytes.len())]);
            for (at, value) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            read_all(&bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_messages_of_waypoints_are_read_or_refused(
        (h, r, t) in (
            strategies::http::http_service(), strategies::http::http_policy(), strategies::http::traffic()
        ),
        (a, l, e) in (
            strategies::checks::authentication(),
            strategies::checks::rate_limit(),
            strategies::checks::authorizer(),
        ),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        for mut bytes in [
            encode_http_service(&h).encode_to_vec(),
            encode_http_policy(&r).encode_to_vec(),
            encode_traffic(&t).encode_to_vec(),
            encode_authentication(&a).encode_to_vec(),
            encode_rate_limit(&l).encode_to_vec(),
            encode_authorizer(&e).encode_to_vec(),
        ] {
            read_all(&bytes[..cut.index(bytes.len() + 1)]);
            for (at, value) in &damage {
                let at = at.index(bytes.len().max(1));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = *value;
                }
            }
            read_all(&bytes);
        }
    }
}

fn in_match(m: security::Match) -> security::Authorization {
    let rules = security::Rules { matches: vec![security::Match::default(), m] };
    security::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        groups: vec![security::Group { rules: vec![rules] }],
        ..Default::default()
    }
}

#[test]
fn errors_name_the_policy_and_the_field() {
    let address = |bytes: &[u8], length| security::Address { address: bytes.to_vec(), length };
    let cases: Vec<(security::Authorization, &str)> = vec![
        (
            in_match(security::Match {
                source_ips: vec![address(&[10, 0, 0, 0], 8), address(&[10, 0, 0], 8)],
                ..Default::default()
            }),
            "policy shop/p: groups[0].rules[0].matches[1].source_ips[1].address: \
             has 3 bytes, an address has 4 or 16",
        ),
        (
            in_match(security::Match {
                not_destination_ips: vec![address(&[10, 0, 0, 0], 33)],
                ..Default::default()
            }),
            "policy shop/p: groups[0].rules[0].matches[1].not_destination_ips[0].length: \
             is 33, a prefix of this address has at most 32 bits",
        ),
        (
            // 256 + 8 must not come out as 8.
            in_match(security::Match {
                source_ips: vec![address(&[10, 0, 0, 0], 264)],
                ..Default::default()
            }),
            "policy shop/p: groups[0].rules[0].matches[1].source_ips[0].length: \
             is 264, a prefix of this address has at most 32 bits",
        ),
        (
            // Nor port 65536 + 80 as 80.
            in_match(security::Match { destination_ports: vec![65616], ..Default::default() }),
            "policy shop/p: groups[0].rules[0].matches[1].destination_ports[0].value: \
             is 65616, ports go up to 65535",
        ),
        (
            // Left out, the match would hold of every principal.
            in_match(security::Match {
                principals: vec![security::StringMatch::default()],
                ..Default::default()
            }),
            "policy shop/p: groups[0].rules[0].matches[1].principals[0].match_type: is missing",
        ),
        (
            security::Authorization { action: 2, ..in_match(Default::default()) },
            "policy shop/p: action: has the value 2, which is not known",
        ),
        (
            security::Authorization { scope: -1, ..in_match(Default::default()) },
            "policy shop/p: scope: has the value -1, which is not known",
        ),
        (
            security::Authorization { name: String::new(), ..in_match(Default::default()) },
            "policy shop/: name: is missing",
        ),
    ];
    for (message, wanted) in cases {
        assert_eq!(Decoder::default().policy(&message).unwrap_err().to_string(), wanted);
    }
}

fn named() -> workload::Workload {
    workload::Workload { uid: "w".into(), ..Default::default() }
}

#[test]
fn errors_name_the_workload_and_the_field() {
    let port = workload::Port { service_port: 80, target_port: 70_000, ..Default::default() };
    let ports = workload::PortList { ports: vec![port] };
    let range =
        workload::NetworkAddress { address: vec![10, 0, 0, 0], length: Some(8), ..Default::default() };
    let to_range = workload::GatewayAddress {
        destination: Some(workload::gateway_address::Destination::Address(range)),
        ..Default::default()
    };
    let cases: Vec<(workload::Workload, &str)> = vec![
        (workload::Workload::default(), "workload : uid: is missing"),
        (
            workload::Workload { addresses: vec![vec![1; 5]], ..named() },
            "workload w: addresses[0].bytes: has 5 bytes, an address has 4 or 16",
        ),
        (
            workload::Workload { services: [("shop/cart".to_owned(), ports)].into(), ..named() },
            "workload w: services[\"shop/cart\"].ports[0].target_port: is 70000, ports go up to 65535",
        ),
        (
            workload::Workload { services: [("cart".to_owned(), Default::default())].into(), ..named() },
            "workload w: services[\"cart\"].key: is \"cart\", which is not of the form namespace/name",
        ),
        (
            workload::Workload { authorization_policies: vec!["p".into()], ..named() },
            "workload w: authorization_policies[0].name: is \"p\", which is not of the form namespace/name",
        ),
        (
            workload::Workload { waypoint: Some(Default::default()), ..named() },
            "workload w: waypoint.destination: is missing",
        ),
        (
            workload::Workload { network_gateway: Some(to_range), ..named() },
            "workload w: network_gateway.address.length: is a range where one address is wanted",
        ),
        (
            workload::Workload { tunnel_protocol: 9, ..named() },
            "workload w: tunnel_protocol: has the value 9, which is not known",
        ),
        (
            workload::Workload { trust_domain: "A B".into(), ..named() },
            "workload w: trust_domain: \"A B\" is not a trust domain: 1 to 255 of the characters a-z, 0-9, '.', '-' and '_'",
        ),
    ];
    for (message, wanted) in cases {
        assert_eq!(Decoder::default().workload(&message).unwrap_err().to_string(), wanted);
    }
}

#[test]
fn errors_name_the_service_and_the_field() {
    let named =
        || workload::Service { namespace: "shop".into(), hostname: "cart".into(), ..Default::default() };
    let lb =
        |mode, scope| workload::LoadBalancing { mode, routing_preference: vec![scope], health_policy: 0 };
    let negative = prost_types::Duration { seconds: -1, nanos: 0 };
    let affinity = culvert::ServiceExtension { session_affinity: Some(negative), source: 0 };
    let cases: Vec<(workload::Service, &str)> = vec![
        (workload::Service { hostname: String::new(), ..named() }, "service shop/: hostname: is missing"),
        (
            workload::Service { load_balancing: Some(lb(7, 1)), ..named() },
            "service shop/cart: load_balancing.mode: has the value 7, which is not known",
        ),
        (
            workload::Service { load_balancing: Some(lb(0, 0)), ..named() },
            "service shop/cart: load_balancing.routing_preference[0].value: has the value 0, which is not known",
        ),
        (
            workload::Service { culvert: Some(affinity), ..named() },
            "service shop/cart: culvert.session_affinity: is not a duration of 0 or more",
        ),
    ];
    for (message, wanted) in cases {
        assert_eq!(Decoder::default().service(&message).unwrap_err().to_string(), wanted);
    }
}

#[test]
fn what_is_only_shown_may_be_newer_than_we_are() {
    let message = workload::Workload { workload_type: 99, ..named() };
    assert_eq!(Decoder::default().workload(&message).unwrap().workload_kind, model::WorkloadKind::Pod);
    let port = workload::Port { service_port: 80, app_protocol: 99, ..Default::default() };
    let message = workload::Service { hostname: "cart".into(), ports: vec![port], ..Default::default() };
    assert_eq!(&*Decoder::default().service(&message).unwrap().ports[0].app_protocol, "");
}

#[test]
fn unknown_fields_are_skipped_and_known_ones_without_effect_are_named() {
    let mut bytes = named().encode_to_vec();
    bytes.extend([0xf8, 0x3f, 0x01]); // field 1023, a varint
    let read = workload::Workload::decode(bytes.as_slice()).unwrap();
    assert!(Decoder::default().workload(&read).is_ok());

    let message = workload::Service {
        weighted_waypoints: vec![Default::default()],
        visibility: 1,
        ..Default::default()
    };
    assert_eq!(message.not_applied(), ["weighted_waypoints", "visibility"]);
    let message = workload::Workload { native_tunnel: true, ..Default::default() };
    assert_eq!(message.not_applied(), ["native_tunnel"]);
    let extended = security::Match { extensions: vec![Default::default()], ..Default::default() };
    assert_eq!(in_match(extended).not_applied(), ["groups.rules.matches.extensions"]);
}

#[test]
fn what_is_left_out_has_the_meaning_that_the_source_gives_it() {
    let workload = Decoder::default().workload(&named()).unwrap();
    assert_eq!(workload.trust_domain.as_str(), "cluster.local");
    assert_eq!((&*workload.service_account, &*workload.cluster), ("default", "Kubernetes"));
    assert_eq!((workload.capacity, &*workload.network), (1, ""));

    let elided = proto::Elided { trust_domain: "corp".parse().unwrap(), cluster: "east".into() };
    let workload = Decoder::new(elided).workload(&named()).unwrap();
    assert_eq!((workload.trust_domain.as_str(), &*workload.cluster), ("corp", "east"));
    // And written for whoever reads it, with another default perhaps.
    assert_eq!(encode_workload(&workload).unwrap().trust_domain, "corp");
}

#[test]
fn an_ipv4_mapped_address_is_read_as_ipv4() {
    let mapped: std::net::Ipv6Addr = "::ffff:10.1.0.0".parse().unwrap();
    let address = security::Address { address: mapped.octets().to_vec(), length: 112 };
    let message = in_match(security::Match { source_ips: vec![address], ..Default::default() });
    let policy = Decoder::default().policy(&message).unwrap();
    assert_eq!(policy.rules[0].clauses[0].matches[1].source_ips[0].to_string(), "10.1.0.0/16");
    let message = workload::Workload { addresses: vec![mapped.octets().to_vec()], ..named() };
    assert_eq!(Decoder::default().workload(&message).unwrap().addresses[0].to_string(), "10.1.0.0");
}

#[test]
fn equal_parts_share_memory_and_are_let_go() {
    let locality = workload::Locality { region: "eu".into(), ..Default::default() };
    let message = workload::Workload { node: "n1".into(), locality: Some(locality), ..named() };
    let mut decoder = Decoder::default();
    let (a, b) = (decoder.workload(&message).unwrap(), decoder.workload(&message).unwrap());
    assert_eq!(&**a.node(), "n1");
    assert!(std::sync::Arc::ptr_eq(&a.locality, &b.locality));
    let watched = std::sync::Arc::downgrade(&a.locality);
    drop((a, b));
    decoder.sweep();
    assert!(watched.upgrade().is_none());
}

#[test]
fn what_the_wire_would_read_as_something_else_is_refused() {
    let workload = Decoder::default().workload(&named()).unwrap();
    let refused = |w: model::Workload| encode_workload(&w).unwrap_err().to_string();
    assert_eq!(
        refused(workload.clone().with(|w| w.service_account = "".into())),
        "workload w can't be sent: service_account: is empty"
    );
    let slash = model::PolicyKey { namespace: "a/b".into(), name: "p".into() };
    assert_eq!(
        refused(workload.clone().with(|w| w.policies = Box::new([slash]))),
        "workload w can't be sent: policies.namespace: \"a/b\" holds a slash, \
         which separates it from the rest of the name"
    );
    let tunnel = model::ApplicationTunnel { proxy_protocol: true, port: Some(0) };
    assert_eq!(
        refused(workload.with(|w| w.application_tunnel = Some(tunnel))),
        "workload w can't be sent: application_tunnel.port: is port 0"
    );
    let service =
        workload::Service { namespace: "shop".into(), hostname: "cart".into(), ..Default::default() };
    let mut service = Decoder::default().service(&service).unwrap();
    service.session_affinity = Some(std::time::Duration::from_secs(60));
    let error = encode_service(&service, Extensions::None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "service shop/cart can't be sent: session_affinity: session affinity is not known to the receiver"
    );
    service.session_affinity = Some(std::time::Duration::MAX);
    assert!(encode_service(&service, Extensions::Culvert).is_err());
}

#[test]
fn an_address_without_content_is_refused() {
    let error = Decoder::default().address(&workload::Address { r#type: None }).unwrap_err();
    assert_eq!(error.problem, Problem::Missing);
}

/// Of what a waypoint is told nothing is skipped, wherever it stands.
#[test]
fn a_field_of_tomorrow_is_refused_at_any_depth() {
    use proto::wire::waypoint as wire;
    let newer = [0xf8, 0x3f, 0x01]; // field 1023, a varint
    let hosts = vec![security::StringMatch {
        match_type: Some(security::string_match::MatchType::Exact("a".into())),
    }];
    let http = wire::HttpMatch { hosts, ..Default::default() };
    let policy = |http: &[u8]| {
        let matches = message(1, &security::Match::default().encode_to_vec(), &message(2, http, &[]));
        let name = wire::Name { namespace: "shop".into(), name: "p".into() }.encode_to_vec();
        let rules = message(1, &message(1, &matches, &[]), &[]);
        let rest = message(6, &rules, &[]);
        message(1, &name, &message(4, &[], &rest))
    };
    let known = http.encode_to_vec();
    assert!(Decoder::default().http_policy(&policy(&known)).is_ok());
    let error = Decoder::default().http_policy(&policy(&[&known[..], &newer].concat())).unwrap_err();
    assert_eq!(error.problem, Problem::Newer);
    assert!(error.to_string().contains("who sent it is newer"), "{error}");
    for empty in [&newer[..], &[0x08, 0x00]] {
        assert!(Decoder::default().http_service(empty).is_err());
        assert!(Decoder::default().traffic(empty).is_err());
    }
}

/// A field with bytes, and what comes after it.
fn message(number: u8, content: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    [&bytes[..], content, rest].concat()
}

#[test]
fn errors_name_the_service_the_route_and_the_field() {
    use proto::wire::waypoint as wire;
    let service = || wire::HttpService {
        service: Some(wire::ServiceKey { namespace: "shop".into(), hostname: "cart".into() }),
        waypoint: Some(wire::Name { namespace: "shop".into(), name: "w".into() }),
        telemetry: Some(Default::default()),
        ..Default::default()
    };
    let route = || wire::Route {
        id: Some(Default::default()),
        action: Some(wire::route::Action::Forward(Default::default())),
        ..Default::default()
    };
    let with = |port: wire::Port| wire::HttpService { ports: vec![port], ..service() };
    let of = |route: wire::Route| with(wire::Port { routes: vec![route], ..Default::default() });
    let entry = |when: wire::RouteMatch, route| {
        with(wire::Port { entries: vec![wire::Entry { when: Some(when), route }], ..Default::default() })
    };
    let path =
        |kind| wire::RouteMatch { path: Some(wire::PathMatch { kind: Some(kind) }), ..Default::default() };
    let regex = wire::path_match::Kind::Regex("(".into());
    let header = wire::HeaderMatch { name: "X-A".into(), ..Default::default() };
    let retry = wire::Retry { on: 1 << 14, ..Default::default() };
    let mirror = wire::Mirror {
        to: Some(wire::BackendRef { kind: Some(wire::backend_ref::Kind::Original(())) }),
        share: 1_000_001,
    };
    let cases = [
        (wire::HttpService { waypoint: None, ..service() }, "http service shop/cart: waypoint: is missing"),
        (
            with(wire::Port { protocol: 9, ..Default::default() }),
            "http service shop/cart: ports[0].protocol: has the value 9, which is not known",
        ),
        (
            entry(Default::default(), 3),
            "http service shop/cart: ports[0].entries[0].route: points to the route 3, which is not there",
        ),
        (
            entry(path(wire::path_match::Kind::Segments("/a/".into())), 0),
            "http service shop/cart: ports[0].entries[0].when.path.segments: is \"/a/\", which ends with a slash",
        ),
        (
            entry(wire::RouteMatch { headers: vec![header], ..Default::default() }, 0),
            "http service shop/cart: ports[0].entries[0].when.headers[0].name: is \"X-A\", which is no name of a \
             header field in lower case",
        ),
        (
            of(wire::Route { action: None, ..route() }),
            "http service shop/cart: ports[0].routes[0].action: is missing",
        ),
        (
            of(wire::Route { retry: Some(retry), ..route() }),
            "http service shop/cart: ports[0].routes[0].retry.on: is 16384, which means nothing there",
        ),
        (
            of(wire::Route { mirrors: vec![mirror], ..route() }),
            "http service shop/cart: ports[0].routes[0].mirrors[0].share: is 1000001 millionths, more than all",
        ),
    ];
    for (message, wanted) in cases {
        let error = Decoder::default().http_service(&message.encode_to_vec()).unwrap_err();
        assert_eq!(error.to_string(), wanted);
    }
    let error = Decoder::default().http_service(&entry(path(regex), 0).encode_to_vec()).unwrap_err();
    let wanted =
        "http service shop/cart: ports[0].entries[0].when.path.regex: \"(\" is no regular expression";
    assert!(error.to_string().starts_with(wanted), "{error}");
}

#[test]
fn a_host_that_would_be_more_than_one_is_none() {
    use proto::wire::waypoint as wire;
    let of = |host: &str| wire::HttpService {
        service: Some(wire::ServiceKey { namespace: "shop".into(), hostname: "cart".into() }),
        waypoint: Some(wire::Name { namespace: "shop".into(), name: "w".into() }),
        telemetry: Some(Default::default()),
        ports: vec![wire::Port {
            routes: vec![wire::Route {
                id: Some(Default::default()),
                action: Some(wire::route::Action::Forward(Default::default())),
                host: Some(wire::HostRewrite { kind: Some(wire::host_rewrite::Kind::To(host.into())) }),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    assert!(Decoder::default().http_service(&of("cart.shop:80").encode_to_vec()).is_ok());
    let error = Decoder::default().http_service(&of("a\r\nx: y").encode_to_vec()).unwrap_err();
    let wanted = "http service shop/cart: ports[0].routes[0].host.to: is \"a\\r\\nx: y\", which is no host";
    assert_eq!(error.to_string(), wanted);
}
