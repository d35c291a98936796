//! What is written with our extensions reads back as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod strategies;

use proptest::prelude::*;
use prost::Message;
use proto::wire::{culvert, security, workload};
use proto::{
    Decoder, Extensions, encode_authentication, encode_authorizer, encode_http_policy, encode_http_service,
    encode_policy, encode_rate_limit, encode_service, encode_traffic, encode_workload,
};

/// Through bytes, not only through the message.
fn sent<M: Message + Default>(message: &M) -> M {
    M::decode(message.encode_to_vec().as_slice()).expect("what was encoded can be decoded")
}

proptest! {
    #[test]
    fn a_workload_reads_back_as_it_was(w in strategies::workload()) {
        let message: workload::Workload = sent(&encode_workload(&w).unwrap());
        prop_assert_eq!(Decoder::default().workload(&message).unwrap(), w);
    }

    #[test]
    fn of_a_workloads_labels_those_are_sent_that_are_asked_for(
        w in strategies::workload(),
        labels in prop::collection::btree_map("[a-c/.]{1,3}", "[a-z]{0,3}", 0..6),
        wanted in prop::collection::btree_set("[a-c/.]{1,3}", 0..6),
    ) {
        let labels = |all: bool| -> std::sync::Arc<[(model::Str, model::Str)]> {
            let those = labels.iter().filter(|(key, _)| all || wanted.contains(*key));
            those.map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect()
        };
        let message = encode_workload(&w).unwrap();
        let message = sent(&proto::with_labels(message, &labels(true), |key| wanted.contains(key)));
        let read = Decoder::default().workload(&message).unwrap();
        prop_assert_eq!(read, w.with(|w| w.labels = labels(false)));
    }

    #[test]
    fn a_service_reads_back_as_it_was(s in strategies::service()) {
        let message: workload::Service = sent(&encode_service(&s, Extensions::Culvert).unwrap());
        prop_assert_eq!(Decoder::default().service(&message).unwrap(), s);
    }

    #[test]
    fn a_policy_reads_back_as_it_was(p in strategies::policy()) {
        let message: security::Authorization = sent(&encode_policy(&p, Extensions::Culvert).unwrap());
        prop_assert_eq!(Decoder::default().policy(&message).unwrap(), p);
    }

    #[test]
    fn what_a_waypoint_does_for_a_service_reads_back_as_it_was(s in strategies::http::http_service()) {
        let bytes = encode_http_service(&s).encode_to_vec();
        let read = Decoder::default().http_service(&bytes).unwrap();
        // Entries that led to one route do so again.
        for (port, was) in read.ports.iter().zip(&s.ports) {
            let of = |port: &model::http::HttpPort| {
                let entries = port.routes.entries();
                let same = |i: usize, j: usize| std::sync::Arc::ptr_eq(&entries[i].1, &entries[j].1);
                (0..entries.len()).map(|i| (0..i).map(|j| same(i, j)).collect()).collect::<Vec<Vec<_>>>()
            };
            prop_assert_eq!(of(port), of(was));
        }
        prop_assert_eq!(read, s);
    }

    #[test]
    fn a_policy_over_requests_reads_back_as_it_was(p in strategies::http::http_policy()) {
        let bytes = encode_http_policy(&p).encode_to_vec();
        prop_assert_eq!(Decoder::default().http_policy(&bytes).unwrap(), p);
    }

    #[test]
    fn how_a_service_is_spoken_to_reads_back_as_it_was(t in strategies::http::traffic()) {
        let bytes = encode_traffic(&t).encode_to_vec();
        prop_assert_eq!(Decoder::default().traffic(&bytes).unwrap(), t);
    }

    #[test]
    fn what_else_is_asked_of_requests_reads_back_as_it_was(
        authentication in strategies::checks::authentication(),
        limit in strategies::checks::rate_limit(),
        authorizer in strategies::checks::authorizer(),
    ) {
        let mut decoder = Decoder::default();
        let bytes = encode_authentication(&authentication).encode_to_vec();
        prop_assert_eq!(decoder.authentication(&bytes).unwrap(), authentication);
        let bytes = encode_rate_limit(&limit).encode_to_vec();
        prop_assert_eq!(decoder.rate_limit(&bytes).unwrap(), limit);
        let bytes = encode_authorizer(&authorizer).encode_to_vec();
        prop_assert_eq!(decoder.authorizer(&bytes).unwrap(), authorizer);
    }

    /// The parts of a service that decide over connections survive Istio's wire; the rest is refused or only
    /// shown.
    #[test]
    fn a_service_without_extensions_keeps_what_decides(s in strategies::service()) {
        let Ok(message) = encode_service(&s, Extensions::None) else {
            prop_assert!(s.session_affinity.is_some());
            return Ok(());
        };
        prop_assert_eq!(&message.culvert, &None::<culvert::ServiceExtension>);
        prop_assert!(message.ports.iter().all(|p| p.culvert.is_none()));
        let read = Decoder::default().service(&sent(&message)).unwrap();
        let passthrough = |s: &model::Service| s.source == model::ServiceSource::Passthrough;
        prop_assert_eq!(passthrough(&read), passthrough(&s));
        prop_assert_eq!(&read.vips, &s.vips);
        prop_assert_eq!(&read.subject_alt_names, &s.subject_alt_names);
        prop_assert_eq!(&read.waypoint, &s.waypoint);
        let ports = |s: &model::Service| s.ports.iter().map(|p| (p.port, p.target.clone())).collect::<Vec<_>>();
        prop_assert_eq!(ports(&read), ports(&s));
        if !passthrough(&s) {
            prop_assert_eq!(&read.load_balancing, &s.load_balancing);
        }
    }
}

#[test]
fn settings_read_back_as_they_were_and_what_is_left_out_is_the_default() {
    let settings = model::Settings {
        trust_domains: model::TrustDomains {
            own: "example.org".parse().unwrap(),
            aliases: ["old.example.org".parse().unwrap()].into(),
        },
        root_namespace: "culvert-system".into(),
        cluster_domain: "k8s.example.org".into(),
        outbound: model::OutboundMode::RegistryOnly,
        mesh_id: Some("mesh-1".into()),
        path_normalization: model::http::Normalization::MergeSlashes,
        node_local: model::NodeLocalModes {
            mesh: model::NodeLocal::Direct,
            namespaces: std::sync::Arc::new(
                [("bank".into(), model::NodeLocal::Encrypted), ("shop".into(), model::NodeLocal::Kernel)]
                    .into(),
            ),
        },
        tls_minimum: model::TlsVersion::V1_3,
    };
    let message: culvert::MeshSettings = sent(&proto::encode_settings(&settings));
    assert_eq!(Decoder::default().settings(&message).unwrap(), settings);
    let nothing = culvert::MeshSettings::default();
    assert_eq!(Decoder::default().settings(&nothing).unwrap(), model::Settings::default());
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let with = |change: fn(&mut culvert::MeshSettings)| {
        let mut message = culvert::MeshSettings::default();
        change(&mut message);
        Decoder::default().settings(&message).unwrap_err().to_string()
    };
    for (error, words) in [
        (with(|m| m.outbound = 7), ["outbound", "7"]),
        (with(|m| m.trust_domain = "Not One".into()), ["trust_domain", "Not One"]),
        (
            with(|m| m.trust_domain_aliases.push(String::new())),
            ["trust_domain_aliases[0]", "mesh settings mesh"],
        ),
    ] {
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

/// What is asked of a snapshot about one request: whether it may pass, and which route takes it.
fn decided(
    mesh: &model::Mesh,
    key: &model::ServiceKey,
    connection: &model::Connection,
    request: &model::http::Request<'_>,
    source: &model::http::SourceFacts<'_>,
) -> (model::RequestDecision, Vec<Option<usize>>) {
    let service = mesh.http_service(key).unwrap();
    let decision = model::decide_request(&mesh.policies_of(service), connection, Some(request));
    let select = |port: &model::http::HttpPort| port.routes.select(request, source).map(|s| s.position);
    (decision, service.ports.iter().map(select).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// A snapshot of files, and the same as a waypoint gets it over the wire, decide requests alike.
    #[test]
    fn what_was_sent_decides_requests_as_what_was_not(
        (service, policies) in strategies::http::http_service().prop_flat_map(|service| {
            let keys = service.policies.to_vec();
            (Just(service), strategies::http::http_policies(keys))
        }),
        lost in any::<bool>(),
        connection in strategies::connection(),
        requests in prop::collection::vec(strategies::http::request(), 1..8),
        label in prop::sample::select(vec!["v1", "v2"]),
    ) {
        use model::Change;
        let key = service.service.clone();
        // One that is listed and not there refuses in both.
        let policies: Vec<_> = policies.into_iter().skip(usize::from(lost)).collect();
        let mut decoder = Decoder::default();
        let bytes = encode_http_service(&service).encode_to_vec();
        let mut received = vec![Change::SetHttpService(decoder.http_service(&bytes).unwrap().into())];
        received.extend(policies.iter().map(|p| {
            let bytes = encode_http_policy(p).encode_to_vec();
            Change::SetHttpPolicy(decoder.http_policy(&bytes).unwrap().into())
        }));
        let kept = policies.into_iter().map(|p| Change::SetHttpPolicy(p.into()));
        let here = model::Mesh::default().apply(kept.chain([Change::SetHttpService(service.into())]));
        let there = model::Mesh::default().apply(received);
        let labels = [("version".into(), label.into())];
        let source = model::http::SourceFacts { namespace: Some("shop"), labels: &labels };
        for (method, path, host, fields) in &requests {
            let request = model::http::Request::new(method, host, path, fields);
            prop_assert_eq!(
                decided(&here, &key, &connection, &request, &source),
                decided(&there, &key, &connection, &request, &source)
            );
        }
    }
}
