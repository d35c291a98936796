//! Names of the mesh.

use hickory_proto::op::ResponseCode;

use super::*;

/// What each name gives: addresses, or `forward` where upstream resolvers are asked.
const NAMES: &[(&str, &str)] = &[
    // The forms of a service's name.
    ("cart.shop.svc.cluster.local", "10.96.0.1"),
    ("cart.shop.svc", "10.96.0.1"),
    ("cart.shop", "10.96.0.1"),
    ("cart", "10.96.0.1"),
    ("cart.office", "10.96.0.5"),
    ("mail.office", "10.96.0.4"),
    ("mail", "forward"),
    ("both", "10.96.0.2 fd00:96::2"),
    ("six", "fd00:96::3"),
    // Search domains, which stand for what the resolver would ask next.
    ("mail.office.shop.svc.cluster.local", "10.96.0.4"),
    ("mail.office.svc.shop.svc.cluster.local", "10.96.0.4"),
    ("api.example.com.shop.svc.cluster.local", "240.240.0.1"),
    ("api.example.com.svc.cluster.local", "240.240.0.1"),
    ("api.example.com.cluster.local", "240.240.0.1"),
    ("x.wild.example.com.shop.svc.cluster.local", "240.240.0.2"),
    // Not a search domain of this pod's.
    ("api.example.com.office.svc.cluster.local", "forward"),
    // The whole name of something that is not there does not become something else.
    ("mail.svc.cluster.local", "forward"),
    ("cart.nowhere.svc.cluster.local", "forward"),
    // Headless: ready pods, or all where the service says so.
    ("db", "10.1.0.1 10.1.0.2 fd00::1"),
    ("db.shop.svc.cluster.local", "10.1.0.1 10.1.0.2 fd00::1"),
    ("queue.shop", "10.1.1.1"),
    ("old.shop", "10.1.2.1"),
    ("empty.shop.svc.cluster.local", ""),
    // Pods of a headless service.
    ("db-0.db.shop.svc.cluster.local", "10.1.0.1 fd00::1"),
    ("db-0.db.shop", "10.1.0.1 fd00::1"),
    ("db-0.db", "10.1.0.1 fd00::1"),
    ("db-2.db.shop.svc.cluster.local", "forward"),
    ("db-9.db.shop.svc.cluster.local", "forward"),
    ("10-1-0-2.db.shop.svc.cluster.local", "10.1.0.2"),
    ("fd00--1.db.shop.svc.cluster.local", "10.1.0.1 fd00::1"),
    // An address is an address in any of its forms, and nothing else is one.
    ("fd00-0-0-0-0-0-0-1.db.shop.svc.cluster.local", "10.1.0.1 fd00::1"),
    ("10-1-0-3.db.shop.svc.cluster.local", "forward"),
    ("10-1-0.db.shop.svc.cluster.local", "forward"),
    ("10-1-0-2-.db.shop.svc.cluster.local", "forward"),
    ("queue-0.queue.shop", "10.1.1.1"),
    ("pod.cart.shop.svc.cluster.local", "forward"),
    // Another network's address is of no use here, but the name exists.
    ("far.shop", ""),
    // External hosts.
    ("api.example.com", "240.240.0.1"),
    ("www.api.example.com", "forward"),
    ("x.wild.example.com", "240.240.0.2"),
    ("x.y.wild.example.com", "240.240.0.2"),
    ("x.deep.wild.example.com", "240.240.0.3"),
    ("wild.example.com", "forward"),
    ("plain.example.com", "forward"),
    ("range.example.com", "forward"),
    ("two.example.com", "240.240.0.11"),
    ("example.com", "forward"),
    ("cluster.local", "forward"),
    ("svc.cluster.local", "forward"),
    ("local", "forward"),
];

#[test]
fn names_stand_for_what_a_pod_means_by_them() {
    let mesh = mesh();
    let network: Str = "".into();
    let asker = registry::Asker { namespace: "shop", network: &network, preferred_namespace: Some("b") };
    for (name, wanted) in NAMES {
        let found = registry::find(&mesh, &asker, name);
        let mut found = found.and_then(|host| registry::addresses(&mesh, &asker, &host)).map(|ips| {
            let mut ips: Vec<String> = ips.iter().map(ToString::to_string).collect();
            ips.sort();
            ips.join(" ")
        });
        assert_eq!(found.get_or_insert_with(|| "forward".into()), wanted, "{name}");
    }
}

#[test]
fn a_host_is_the_clients_own_before_the_preferred_ones() {
    let mesh = mesh();
    let network: Str = "".into();
    for (namespace, preferred, wanted) in [
        ("a", Some("b"), "240.240.0.10"),
        ("b", None, "240.240.0.11"),
        ("c", None, "240.240.0.10"),
        ("c", Some("b"), "240.240.0.11"),
    ] {
        let asker = registry::Asker { namespace, network: &network, preferred_namespace: preferred };
        let host = registry::find(&mesh, &asker, "two.example.com").unwrap();
        let ips = registry::addresses(&mesh, &asker, &host).unwrap();
        assert_eq!(ips, [wanted.parse::<IpAddr>().unwrap()], "{namespace} {preferred:?}");
    }
}

#[tokio::test]
async fn both_families_over_both_transports() {
    let lab = Lab::alone();
    for (name, kind, wanted) in [
        ("cart.shop.svc.cluster.local.", RecordType::A, &["10.96.0.1"][..]),
        ("both.shop.", RecordType::A, &["10.96.0.2"]),
        ("both.shop.", RecordType::AAAA, &["fd00:96::2"]),
        ("both.shop.", RecordType::ANY, &["10.96.0.2", "fd00:96::2"]),
        // There is such a name, but no address of this family: not an error (RFC 4074, section 4.2).
        ("cart.", RecordType::AAAA, &[]),
        ("six.", RecordType::A, &[]),
        ("empty.", RecordType::A, &[]),
        ("api.example.com.", RecordType::AAAA, &[]),
        ("db.", RecordType::A, &["10.1.0.1", "10.1.0.2"]),
        ("db.", RecordType::AAAA, &["fd00::1"]),
    ] {
        let bytes = query(name, kind);
        for response in [lab.udp(&bytes).await, lab.tcp(&bytes).await] {
            let response = Message::from_vec(&response).unwrap();
            assert_eq!(response.metadata.response_code, ResponseCode::NoError, "{name} {kind}");
            assert_eq!(addresses(&response), wanted, "{name} {kind}");
            let m = &response.metadata;
            assert!(m.id == 0x1234 && m.recursion_available && m.recursion_desired && !m.truncation, "{m:?}");
            assert_eq!(response.queries, Message::from_vec(&bytes).unwrap().queries);
            for record in &response.answers {
                assert_eq!((record.ttl, record.name.to_ascii()), (30, name.to_owned()));
            }
            assert!(response.edns.is_none());
        }
    }
    assert_eq!(
        lab.metric(concat!(
            "istio_dns_requests_total{request_query_type=\"aaaa\",request_protocol=\"tcp\",",
            "source_canonical_service=\"tester\",source_canonical_revision=\"v1\"}"
        )),
        4.0
    );
    assert_eq!(lab.metric("istio_dns_requests_total"), 20.0);
    assert_eq!(lab.metric("istio_dns_upstream_requests_total"), 0.0);
}

#[tokio::test]
async fn the_letter_case_of_the_question_comes_back() {
    let lab = Lab::alone();
    let bytes = query("CaRt.ShOp.sVc.ClUsTeR.LoCaL.", RecordType::A);
    let response = lab.udp(&bytes).await;
    assert_eq!(response[12..bytes.len()], bytes[12..], "0x20: the question is the client's, byte for byte");
    let response = Message::from_vec(&response).unwrap();
    assert_eq!(addresses(&response), ["10.96.0.1"]);
    assert_eq!(response.answers[0].name.to_ascii(), "CaRt.ShOp.sVc.ClUsTeR.LoCaL.");
}

#[tokio::test]
async fn edns_is_answered_with_edns() {
    let lab = Lab::alone();
    let response = lab.udp(&query_with_edns("cart.shop.", RecordType::A, 4096, true)).await;
    let response = Message::from_vec(&response).unwrap();
    let edns = response.edns.as_ref().unwrap();
    assert!(edns.flags().dnssec_ok && edns.version() == 0);
    assert_eq!(addresses(&response), ["10.96.0.1"]);
    let mut unknown = message("cart.shop.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(7);
    unknown.set_edns(edns);
    let response = Message::from_vec(&lab.udp(&unknown.to_vec().unwrap()).await).unwrap();
    // 16 has two names (RFC 6895, section 2.3).
    assert_eq!(u16::from(response.metadata.response_code), u16::from(ResponseCode::BADVERS));
    assert!(response.answers.is_empty());
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_cut_off_and_comes_whole_over_tcp() {
    let large = kubernetes("large", "shop", &[]);
    let pods = (0..200u32).map(|i| {
        let ip = IpAddr::from(std::net::Ipv4Addr::from(0x0a02_0000 + i)).to_string();
        Change::SetWorkload(Arc::new(endpoint(
            &format!("large-{i}"),
            &large,
            &[ip.as_str()],
            Health::Healthy,
        )))
    });
    let changes: Vec<Change> = pods.chain([Change::SetService(Arc::new(large.clone()))]).collect();
    let lab = Lab::start(mesh().apply(changes), [], DnsSettings::default());
    for (bytes, limit) in [
        (query("large.shop.svc.cluster.local.", RecordType::A), 512),
        (query_with_edns("large.shop.svc.cluster.local.", RecordType::A, 1232, false), 1232),
        (query_with_edns("large.shop.svc.cluster.local.", RecordType::A, 100, false), 512),
    ] {
        let response = lab.udp(&bytes).await;
        assert!(response.len() <= limit && response.len() > limit - 16 - 11, "{} of {limit}", response.len());
        let parsed = Message::from_vec(&response).unwrap();
        assert!(parsed.metadata.truncation);
        assert!(parsed.answers.len() > 20, "resolvers that never use TCP live on the part that fits");
        assert_eq!(parsed.edns.is_some(), limit == 1232 || bytes.len() > 50);
    }
    let bytes = query("large.shop.svc.cluster.local.", RecordType::A);
    let whole = Message::from_vec(&lab.tcp(&bytes).await).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(addresses(&whole).len(), 200);
    let roomy = query_with_edns("large.shop.svc.cluster.local.", RecordType::A, 4096, false);
    let whole = Message::from_vec(&lab.udp(&roomy).await).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(addresses(&whole).len(), 200);
}

#[tokio::test]
async fn answers_take_turns() {
    let lab = Lab::alone();
    let mut first = std::collections::HashSet::new();
    for _ in 0..10 {
        let response = lab.ask("db.shop.", RecordType::A).await;
        let RData::A(ip) = &response.answers[0].data else { panic!("{response:?}") };
        first.insert(ip.0);
    }
    assert_eq!(first.len(), 2);
}

#[tokio::test]
async fn services_are_found_by_port() {
    let lab = Lab::alone();
    let response = lab.ask("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV).await;
    let mut targets: Vec<(String, u16)> = response
        .answers
        .iter()
        .map(|record| {
            let RData::SRV(srv) = &record.data else { panic!("{record:?}") };
            (srv.target.to_ascii(), srv.port)
        })
        .collect();
    targets.sort();
    assert_eq!(
        targets,
        [("db-0.db.shop.svc.cluster.local.".into(), 8080), ("db-1.db.shop.svc.cluster.local.".into(), 8080)]
    );
    assert_eq!(response.additionals.len(), 3, "the addresses come with it");
    for (name, _) in targets {
        assert!(!addresses(&lab.ask(&name, RecordType::A).await).is_empty(), "{name} leads nowhere");
    }
    let response = lab.ask("_http._tcp.cart.shop.", RecordType::SRV).await;
    let RData::SRV(srv) = &response.answers[0].data else { panic!("{response:?}") };
    assert_eq!((srv.target.to_ascii().as_str(), srv.port), ("cart.shop.svc.cluster.local.", 80));
}

#[tokio::test]
async fn what_nobody_knows_and_no_upstream_can_say_is_an_error() {
    let lab = Lab::alone();
    for name in ["nowhere.example.com.", "_x._tcp.cart.shop.", "_http._udp.cart.shop.", "."] {
        let kind = if name.starts_with('_') { RecordType::SRV } else { RecordType::A };
        assert_eq!(lab.ask(name, kind).await.metadata.response_code, ResponseCode::ServFail, "{name}");
    }
    assert_eq!(lab.ask("cart.shop.", RecordType::AXFR).await.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn dig_agrees() {
    let lab = Lab::alone();
    let dig = async |arguments: &[&str]| {
        let mut command = tokio::process::Command::new("dig");
        command.arg(format!("-p{}", lab.address.port())).arg("@127.0.0.1").args(arguments);
        Some(String::from_utf8(command.output().await.ok()?.stdout).unwrap())
    };
    let Some(short) =
        dig(&["+short", "both.shop.svc.cluster.local", "A", "both.shop.svc.cluster.local", "AAAA"]).await
    else {
        println!("skipped: there is no dig");
        return;
    };
    assert_eq!(short, "10.96.0.2\nfd00:96::2\n");
    let whole = dig(&["+tcp", "+dnssec", "_http._tcp.db.shop.svc.cluster.local", "SRV"]).await.unwrap();
    assert!(
        whole.contains("status: NOERROR") && whole.contains("ANSWER: 2") && !whole.contains("malformed"),
        "{whole}"
    );
    let nodata = dig(&["cart.shop.svc.cluster.local", "AAAA"]).await.unwrap();
    assert!(nodata.contains("status: NOERROR") && nodata.contains("ANSWER: 0"), "{nodata}");
}

#[tokio::test]
async fn queries_on_one_connection_are_all_answered() {
    let lab = Lab::alone();
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let mut ids = std::collections::HashSet::new();
    for id in 0..50u16 {
        let mut bytes = query("cart.shop.", RecordType::A);
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        write_framed(&mut stream, &bytes).await;
    }
    for _ in 0..50 {
        let response = timeout(SOON, read_framed(&mut stream)).await.unwrap().unwrap();
        assert_eq!(addresses(&Message::from_vec(&response).unwrap()), ["10.96.0.1"]);
        ids.insert(u16::from_be_bytes([response[0], response[1]]));
    }
    assert_eq!(ids.len(), 50);
}
