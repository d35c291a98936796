//! What upstream resolvers are asked: byte for byte, over and over, and when they fail.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::SOA;

use super::*;

async fn lab_with(upstream: &Upstream) -> Lab {
    Lab::start(mesh(), [upstream.address], DnsSettings::default())
}

/// A query of type 65,400 with options nobody knows and a trailing record.
fn strange_query() -> Vec<u8> {
    let mut bytes = query("StRaNgE.example.com.", RecordType::Unknown(65_400));
    bytes[3] |= 0x30; // AD, CD
    bytes[11] = 2;
    // OPT, with an unknown option of four bytes; then a record of the root of type 65,401.
    bytes.extend_from_slice(&[0, 0, 41, 0x10, 0, 0, 0, 0x80, 0, 0, 8, 0xff, 0x01, 0, 4, 1, 2, 3, 4]);
    bytes.extend_from_slice(&[0, 0xff, 0x79, 0, 1, 0, 0, 0, 60, 0, 3, 7, 8, 9]);
    bytes
}

#[tokio::test]
async fn unknown_types_and_options_pass_byte_for_byte() {
    // The answer has a type, an option and a class that no library knows.
    let strange_answer = |query: &[u8]| {
        let mut reply = query[..38].to_vec();
        reply[2] |= 0x84;
        reply[7] = 1;
        reply[11] = 1;
        reply.extend_from_slice(&[0xc0, 12, 0xff, 0x78, 0, 77, 0, 0, 1, 0, 0, 5, 1, 2, 3, 4, 5]);
        reply.extend_from_slice(&[0, 0, 41, 4, 0xd0, 0, 0, 0x80, 0, 0, 5, 0xff, 0x02, 0, 1, 9]);
        reply
    };
    let upstream = Upstream::start(move |query, _| vec![strange_answer(query)]).await;
    let lab = lab_with(&upstream).await;
    let query = strange_query();
    for over_tcp in [false, true] {
        let response = if over_tcp { lab.tcp(&query).await } else { lab.udp(&query).await };
        let (_, seen) = upstream.seen.lock().unwrap().pop().unwrap();
        assert_eq!(seen[2..], query[2..], "the query was changed");
        let mut wanted = strange_answer(&seen);
        wanted[..2].copy_from_slice(&query[..2]);
        assert_eq!(response, wanted, "the answer was changed");
    }
    assert!(
        lab.metric("istio_dns_upstream_requests_total{request_query_type=\"other\",request_protocol=\"udp\"")
            == 1.0
    );
}

#[tokio::test]
async fn identifiers_and_ports_towards_upstreams_can_not_be_foreseen() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 0)]).await;
    let lab = lab_with(&upstream).await;
    for _ in 0..20 {
        lab.udp(&query("www.example.com.", RecordType::A)).await;
    }
    let seen = upstream.seen.lock().unwrap();
    let ids: std::collections::HashSet<&[u8]> = seen.iter().map(|(_, query)| &query[..2]).collect();
    assert!(ids.len() > 15, "{}", ids.len());
}

#[tokio::test]
async fn forged_and_late_answers_are_ignored() {
    let upstream = Upstream::start(|query, _| {
        let forged = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut forged = reply(query, "6.6.6.6", 60);
            change(&mut forged);
            forged
        };
        vec![
            forged(&|r| r[0] ^= 1),      // another identifier
            forged(&|r| r[13] = b'x'),   // another name
            forged(&|r| r[30] ^= 3),     // another type
            forged(&|r| r[2] &= 0x7f),   // a query
            forged(&|r| r[5] = 0),       // no question
            forged(&|r| r[5] = 2),       // two
            forged(&|r| r.truncate(11)), // no header
            Vec::new(),
            reply(query, "192.0.2.1", 60),
        ]
    })
    .await;
    let lab = lab_with(&upstream).await;
    let response = lab.ask("www.example.com.", RecordType::A).await;
    assert_eq!(addresses(&response), ["192.0.2.1"]);
    assert_eq!(lab.metric("culvert_dns_mismatched_responses_total"), 8.0);
}

#[tokio::test]
async fn an_upstream_that_folds_the_letter_case_does_not_break_0x20() {
    let upstream = Upstream::start(|query, _| {
        let mut reply = reply(query, "192.0.2.1", 60);
        reply[12..28].make_ascii_lowercase();
        vec![reply]
    })
    .await;
    let lab = lab_with(&upstream).await;
    for name in ["wWw.ExAmPlE.cOm.", "WWW.example.COM."] {
        let bytes = query(name, RecordType::A);
        let response = lab.udp(&bytes).await;
        assert_eq!(response[12..bytes.len()], bytes[12..]);
        assert_eq!(Message::from_vec(&response).unwrap().answers[0].name.to_ascii(), name);
    }
    assert_eq!(upstream.count(), 1, "the second came from the cache");
}

#[tokio::test]
async fn a_cached_answer_holds_as_long_as_it_says() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 3)]).await;
    let lab = lab_with(&upstream).await;
    let ask = async || lab.ask("www.example.com.", RecordType::A).await;
    assert_eq!(ask().await.answers[0].ttl, 3);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(ask().await.answers[0].ttl, 2, "the time that is left");
    assert_eq!((upstream.count(), lab.metric("culvert_dns_cache_hits_total")), (1, 1.0));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(ask().await.answers[0].ttl, 3);
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn answers_are_kept_apart_by_what_they_depend_on() {
    let count = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::start(move |query, _| {
        let n = count.fetch_add(1, Relaxed);
        vec![reply(query, &format!("192.0.2.{n}"), 60)]
    })
    .await;
    let lab = lab_with(&upstream).await;
    let name = "www.example.com.";
    let with_option = |code: u16, data: &[u8]| {
        let mut bytes = query_with_edns(name, RecordType::A, 1232, false);
        let end = bytes.len();
        bytes[end - 1] = u8::try_from(data.len() + 4).unwrap();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    };
    let mut checking_disabled = query(name, RecordType::A);
    checking_disabled[3] |= 0x10;
    let subnet = |last| with_option(8, &[0, 1, 24, 0, 10, 0, last]);
    let distinct = [
        query(name, RecordType::A),
        query(name, RecordType::TXT),
        query_with_edns(name, RecordType::A, 1232, false),
        query_with_edns(name, RecordType::A, 1232, true),
        checking_disabled,
        subnet(1),
        subnet(2),
    ];
    for _ in 0..2 {
        for (n, query) in distinct.iter().enumerate() {
            let response = Message::from_vec(&lab.udp(query).await).unwrap();
            assert_eq!(addresses(&response), [format!("192.0.2.{n}")]);
        }
    }
    assert_eq!(upstream.count(), distinct.len());
    // A cookie is this client's own.
    for _ in 0..2 {
        lab.udp(&with_option(10, &[1, 2, 3, 4, 5, 6, 7, 8])).await;
    }
    assert_eq!(upstream.count(), distinct.len() + 2);
}

/// A reply that says that the name does not exist, for `minimum` seconds.
fn no_such_name(query: &[u8], ttl: u32, minimum: u32) -> Vec<u8> {
    let mut message = Message::from_vec(query).unwrap().into_response();
    message.metadata.response_code = ResponseCode::NXDomain;
    let name = |n| Name::from_ascii(n).unwrap();
    let soa = SOA::new(name("ns.example.com."), name("me.example.com."), 1, 2, 3, 4, minimum);
    message.add_authority(Record::from_rdata(name("example.com."), ttl, RData::SOA(soa)));
    message.to_vec().unwrap()
}

#[tokio::test]
async fn what_does_not_exist_is_kept_too_and_failures_are_not() {
    let upstream = Upstream::start(|query, _| vec![no_such_name(query, 3600, 2)]).await;
    let lab = lab_with(&upstream).await;
    let code = async |name: &str| lab.ask(name, RecordType::A).await.metadata.response_code;
    for _ in 0..2 {
        assert_eq!(code("no.example.com.").await, ResponseCode::NXDomain);
    }
    assert_eq!(upstream.count(), 1);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(code("no.example.com.").await, ResponseCode::NXDomain);
    assert_eq!(upstream.count(), 2, "the SOA's minimum is over");
    for (rcode, expected) in [(2, ResponseCode::ServFail), (5, ResponseCode::Refused)] {
        upstream.behave(move |query, _| vec![reply_code(query, rcode)]);
        let before = upstream.count();
        for _ in 0..2 {
            assert_eq!(code("failing.example.com.").await, expected, "what the upstream says");
        }
        assert_eq!(upstream.count(), before + 2);
    }
    // Without an SOA nothing says how long it holds.
    upstream.behave(|query, _| vec![reply_code(query, 3)]);
    let before = upstream.count();
    for _ in 0..2 {
        assert_eq!(code("bare.example.com.").await, ResponseCode::NXDomain);
    }
    assert_eq!(upstream.count(), before + 2);
}

#[tokio::test]
async fn an_expired_answer_serves_while_upstreams_fail() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 1)]).await;
    let lab = lab_with(&upstream).await;
    let ask = async || lab.ask("www.example.com.", RecordType::A).await;
    assert_eq!(ask().await.answers[0].ttl, 1);
    upstream.behave(|_, _| Vec::new());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let start = std::time::SystemTime::now();
    let stale = ask().await;
    let waited = start.elapsed().unwrap();
    assert_eq!((addresses(&stale), stale.answers[0].ttl), (vec!["192.0.2.1".to_owned()], 30));
    assert!((1500..2500).contains(&waited.as_millis()), "RFC 8767: after 1.8 s, not {waited:?}");
    // When asking has failed, the next ones do not wait for it again.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (start, asked) = (std::time::SystemTime::now(), upstream.count());
    assert_eq!(addresses(&ask().await), ["192.0.2.1"]);
    assert!(start.elapsed().unwrap() < Duration::from_millis(500));
    assert_eq!(upstream.count(), asked);
    assert_eq!(lab.metric("culvert_dns_stale_answers_total"), 2.0);
    assert_eq!(lab.metric("istio_dns_upstream_failures_total"), 1.0);
    // A name that was never asked for is an error, in time for the client.
    let start = std::time::SystemTime::now();
    let response = lab.ask("new.example.com.", RecordType::A).await;
    assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
    assert!(start.elapsed().unwrap() < Duration::from_millis(4900));
    // Names of the mesh are not concerned.
    assert_eq!(addresses(&lab.ask("cart.", RecordType::A).await), ["10.96.0.1"]);
}

#[tokio::test]
async fn an_expired_answer_serves_when_upstreams_only_err() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 1)]).await;
    let lab = lab_with(&upstream).await;
    let ask = async || lab.ask("www.example.com.", RecordType::A).await;
    ask().await;
    upstream.behave(|query, _| vec![reply_code(query, 2)]);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(addresses(&ask().await), ["192.0.2.1"]);
}

/// Queries for `name` that servers refuse for something beside the question.
fn ill_formed(name: &str) -> Vec<Vec<u8>> {
    let plain = query(name, RecordType::A);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = plain.clone();
        change(&mut bytes);
        bytes
    };
    let record = [0, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 6, 6, 6, 6];
    let with_record = |section: usize| {
        changed(&move |b| {
            b[section] = 1;
            b.extend_from_slice(&record);
        })
    };
    let with_opt = |opt: &[u8]| {
        changed(&|b| {
            b[11] = 1;
            b.extend_from_slice(opt);
        })
    };
    vec![
        with_record(7),
        with_record(9),
        with_record(11),
        // A signature by a key that nobody knows (TSIG, RFC 8945), as far as a server reads it.
        with_opt(&[1, b'k', 0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0]),
        with_opt(&[1, b'x', 0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0]), // OPT of another name than the root
        with_opt(&[0, 0, 41, 4, 0xd0, 0, 0, 0, 1, 0, 0]),          // a flag that nobody defined
        with_opt(&[0, 0, 41, 4, 0xd0, 1, 0, 0, 0, 0, 0]),          // an extended code
        changed(&|b| b.push(0)),                                   // a byte after the end
        changed(&|b| b[3] |= 0x40),                                // the header's reserved flag
        changed(&|b| b[2] |= 2),                                   // TC
    ]
}

/// One pod could else keep all others on old addresses while the upstreams work.
#[tokio::test]
async fn a_query_that_is_refused_for_its_form_does_not_hold_up_others() {
    let (first, ill_formed) = (query("www.example.com.", RecordType::A), ill_formed("www.example.com."));
    for ill_formed in ill_formed {
        let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 1)]).await;
        let lab = lab_with(&upstream).await;
        assert_eq!(addresses(&Message::from_vec(&lab.udp(&first).await).unwrap()), ["192.0.2.1"]);
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let header = first.len();
        upstream.behave(move |query, _| {
            let mut refused = query[..header].to_vec();
            refused[2] |= 0x80;
            refused[3] = 2;
            refused[6..12].fill(0);
            vec![refused]
        });
        assert_eq!(lab.udp(&ill_formed).await[3] & 15, 2);
        upstream.behave(|query, _| vec![reply(query, "192.0.2.2", 60)]);
        let after = Message::from_vec(&lab.udp(&first).await).unwrap();
        assert_eq!(addresses(&after), ["192.0.2.2"], "after {ill_formed:?}");
        // It is passed on, and its answer is nobody else's.
        let asked = upstream.count();
        lab.udp(&ill_formed).await;
        assert_eq!(upstream.count(), asked + 1);
    }
}

#[tokio::test]
async fn a_server_that_finds_fault_with_a_query_counts_as_working() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 1)]).await;
    let lab = lab_with(&upstream).await;
    let ask = async || lab.ask("www.example.com.", RecordType::A).await;
    ask().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    upstream.behave(|query, _| vec![reply_code(query, 1)]);
    assert_eq!(addresses(&ask().await), ["192.0.2.1"], "better than an error");
    upstream.behave(|query, _| vec![reply(query, "192.0.2.2", 60)]);
    assert_eq!(addresses(&ask().await), ["192.0.2.2"]);
}

#[tokio::test]
async fn an_expired_answer_yields_to_a_new_one() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 1)]).await;
    let lab = lab_with(&upstream).await;
    let ask = async || lab.ask("www.example.com.", RecordType::A).await;
    ask().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    upstream.behave(|query, _| vec![reply(query, "192.0.2.2", 60)]);
    assert_eq!(addresses(&ask().await), ["192.0.2.2"]);
    upstream.behave(|query, _| vec![no_such_name(query, 60, 60)]);
    assert_eq!(addresses(&ask().await), ["192.0.2.2"], "it holds for a minute");
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_fails() {
    let good = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 0)]).await;
    let silent = Upstream::start(|_, _| Vec::new()).await;
    let refusing = Upstream::start(|query, _| vec![reply_code(query, 5)]).await;
    // A socket that is connected elsewhere: its port is taken, and refuses everybody else.
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    closed.connect("127.0.0.1:9").await.unwrap();
    let closed = (closed.local_addr().unwrap(), closed);
    for (first, least, most) in [(closed.0, 0, 500), (refusing.address, 0, 500), (silent.address, 1000, 2000)]
    {
        let lab = Lab::start(mesh(), [first, good.address], DnsSettings::default());
        let start = std::time::SystemTime::now();
        assert_eq!(addresses(&lab.ask("a.example.com.", RecordType::A).await), ["192.0.2.1"]);
        let waited = start.elapsed().unwrap().as_millis();
        assert!((least..most).contains(&waited), "{waited} ms for {first}");
        // From then on the good one is asked first.
        let start = std::time::SystemTime::now();
        assert_eq!(addresses(&lab.ask("b.example.com.", RecordType::A).await), ["192.0.2.1"]);
        assert!(start.elapsed().unwrap() < Duration::from_millis(500));
    }
    assert_eq!(silent.count(), 1);
}

/// A reply with as many addresses as it says, cut off over UDP.
fn large_reply(query: &[u8], transport: Transport, records: u8) -> Vec<u8> {
    let mut message = Message::from_vec(query).unwrap().into_response();
    let name = message.queries[0].name().clone();
    let kept = if transport == Transport::Udp { 2 } else { records };
    message.metadata.truncation = transport == Transport::Udp;
    for i in 0..kept {
        let ip = std::net::Ipv4Addr::new(192, 0, 2, i);
        message.add_answer(Record::from_rdata(name.clone(), 60, RData::A(A(ip))));
    }
    message.to_vec().unwrap()
}

#[tokio::test]
async fn what_is_cut_off_is_fetched_over_tcp() {
    let upstream = Upstream::start(|query, transport| vec![large_reply(query, transport, 100)]).await;
    let lab = lab_with(&upstream).await;
    let bytes = query("large.example.com.", RecordType::A);
    let part = Message::from_vec(&lab.udp(&bytes).await).unwrap();
    assert!(part.metadata.truncation && part.answers.len() == 2, "the upstream's own part");
    let whole = Message::from_vec(&lab.tcp(&bytes).await).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 100);
    // The whole is in the cache now, and too large for this client over UDP.
    let before = upstream.count();
    let cut = lab.udp(&bytes).await;
    assert!(cut.len() <= 512);
    assert!(Message::from_vec(&cut).unwrap().metadata.truncation);
    let whole = Message::from_vec(&lab.tcp(&bytes).await).unwrap();
    assert_eq!((whole.answers.len(), upstream.count()), (100, before));
}

#[tokio::test]
async fn one_client_can_not_take_all_places() {
    let upstream = Upstream::start(|_, _| Vec::new()).await;
    let settings =
        DnsSettings { in_flight_per_client: 10, connections_per_client: 3, ..DnsSettings::default() };
    let lab = Lab::start(mesh(), [upstream.address], settings);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(lab.address).await.unwrap();
    for i in 0..100 {
        socket.send(&query(&format!("n{i}.example.com."), RecordType::A)).await.unwrap();
    }
    let mut buffer = [0; 512];
    for _ in 0..90 {
        let len = timeout(Duration::from_secs(1), socket.recv(&mut buffer)).await.unwrap().unwrap();
        let response = Message::from_vec(&buffer[..len]).unwrap();
        assert_eq!(response.metadata.response_code, ResponseCode::ServFail, "refused at once");
    }
    assert_eq!(lab.metric("culvert_dns_dropped_total{reason=\"too_many\"}"), 90.0);
    assert!(upstream.count() <= 10);
    // The mesh's names are answered all the while.
    assert_eq!(addresses(&lab.ask("cart.", RecordType::A).await), ["10.96.0.1"]);
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(lab.address).await.unwrap();
        write_framed(&mut stream, &query("cart.", RecordType::A)).await;
        read_framed(&mut stream).await.unwrap();
        open.push(stream);
    }
    let mut fourth = TcpStream::connect(lab.address).await.unwrap();
    assert_eq!(timeout(SOON, fourth.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
    drop(open.pop());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!lab.tcp(&query("cart.", RecordType::A)).await.is_empty());
}

/// Names of the mesh take no place and no upstream, but time of a thread that other pods' connections need.
#[tokio::test]
async fn one_client_can_not_take_all_of_a_thread() {
    // A hundredth of a percent: at least 100 ms for each answer, after a second's worth at once.
    let settings = DnsSettings { share_per_client: 0.000_1, ..DnsSettings::default() };
    let lab = Lab::start(mesh(), [], settings);
    let bytes = query("cart.", RecordType::A);
    let (started, mut answered) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_secs(2) {
        let reply = if answered % 2 == 0 { lab.udp(&bytes).await } else { lab.tcp(&bytes).await };
        assert_eq!(addresses(&Message::from_vec(&reply).unwrap()), ["10.96.0.1"], "late, not refused");
        answered += 1;
    }
    assert!((2..40).contains(&answered), "{answered}");
    assert!(lab.metric("culvert_dns_paused_total") > 0.0);
    // Others are not held up.
    let other = Lab::alone();
    let started = Instant::now();
    for _ in 0..100 {
        other.udp(&bytes).await;
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(other.metric("culvert_dns_paused_total"), 0.0);
}

/// Each outstanding query is one more that a forged answer may fit.
#[tokio::test]
async fn equal_queries_are_asked_once_and_all_answered() {
    let upstream = Upstream::start(|_, _| Vec::new()).await;
    let lab = lab_with(&upstream).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(lab.address).await.unwrap();
    let name = |id: u8| if id < 50 { "www.example.com." } else { "WWW.Example.com." };
    for id in 0..100_u8 {
        let mut bytes = query(name(id), RecordType::A);
        bytes[..2].copy_from_slice(&[7, id]);
        socket.send(&bytes).await.unwrap();
    }
    while upstream.count() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The first round has no answer, the second one has.
    upstream.behave(|query, _| vec![reply(query, "192.0.2.1", 60)]);
    let mut answered = std::collections::BTreeSet::new();
    let mut buffer = [0; 512];
    while answered.len() < 100 {
        let len = timeout(SOON, socket.recv(&mut buffer)).await.unwrap().unwrap();
        let response = Message::from_vec(&buffer[..len]).unwrap();
        assert_eq!(addresses(&response), ["192.0.2.1"]);
        let id = response.metadata.id.to_be_bytes()[1];
        assert_eq!(response.queries[0].name().to_ascii(), name(id), "as it was asked");
        answered.insert(id);
    }
    assert_eq!(upstream.count(), 2);
    assert_eq!(lab.metric("culvert_dns_joined_total"), 99.0);
    // Another type is another question.
    lab.ask("www.example.com.", RecordType::AAAA).await;
    assert_eq!(upstream.count(), 3);
}

#[tokio::test]
async fn who_waits_with_others_is_told_of_a_failure_and_loses_nothing_when_they_leave() {
    let upstream = Upstream::start(|_, _| Vec::new()).await;
    let servers = Arc::new(Upstreams::new([upstream.address]));
    let (proxy, client) = fuzz::bare_with(servers);
    let places = Arc::new(Semaphore::new(3));
    let ask = || {
        let message = query("www.example.com.", RecordType::A);
        let Next::Forward(forward) = proxy.next(&message, Transport::Udp, &client, || None) else {
            panic!("it is not forwarded");
        };
        let (proxy, client) = (proxy.clone(), client.clone());
        let place = places.clone().try_acquire_owned().unwrap();
        tokio::spawn(async move { proxy.forward(forward, &client, place).await })
    };
    let (first, second, third) = (ask(), ask(), ask());
    while upstream.count() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    first.abort();
    upstream.behave(|query, _| vec![reply(query, "192.0.2.1", 0)]);
    for waiting in [second, third] {
        assert_eq!(addresses(&Message::from_vec(&waiting.await.unwrap()).unwrap()), ["192.0.2.1"]);
    }
    assert_eq!(upstream.count(), 2);
    // All places are free again, and nothing is left of the query.
    upstream.behave(|query, _| vec![reply_code(query, 2)]);
    let (first, second) = (ask(), ask());
    for waiting in [first, second] {
        assert_eq!(waiting.await.unwrap()[3] & 15, 2);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((upstream.count(), places.available_permits()), (3, 3));
}

#[tokio::test]
async fn a_half_closed_connection_still_gets_its_answer() {
    let upstream = Upstream::start(|query, _| vec![reply(query, "192.0.2.1", 60)]).await;
    let lab = lab_with(&upstream).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    write_framed(&mut stream, &query("www.example.com.", RecordType::A)).await;
    stream.shutdown().await.unwrap();
    let response = timeout(SOON, read_framed(&mut stream)).await.unwrap().unwrap();
    assert_eq!(addresses(&Message::from_vec(&response).unwrap()), ["192.0.2.1"]);
}

#[tokio::test]
async fn a_proxy_that_ends_gives_its_port_back_at_once() {
    let upstream = Upstream::start(|_, _| Vec::new()).await;
    let lab = lab_with(&upstream).await;
    let bytes = query("www.example.com.", RecordType::A);
    assert!(lab.udp_within(&bytes, Duration::from_millis(100)).await.is_none());
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    write_framed(&mut stream, &bytes).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(upstream.count(), 2, "both are under way");
    for task in lab.serving {
        task.abort();
        let _ = task.await;
    }
    assert_eq!(timeout(SOON, stream.read(&mut [0])).await.unwrap().unwrap_or(0), 0);
    UdpSocket::bind(lab.address).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_cache_is_bounded_and_keeps_what_is_used() {
    const LIMIT: usize = 100_000;
    let mut cache = Cache::new(LIMIT, Duration::from_secs(60));
    let response = |i: u32| reply(&query(&format!("n{i}.example.com."), RecordType::A), "192.0.2.1", 300);
    let key = |i: u32| -> Box<[u8]> { format!("key {i}").into_bytes().into() };
    for i in 0..10_000 {
        let bytes = response(i);
        cache.put(key(i), &bytes, &wire::Response::parse(&bytes).unwrap());
        assert!(cache.bytes() <= LIMIT, "{}", cache.bytes());
        assert!(matches!(cache.get(&key(0)), Cached::Fresh(_)), "it is used all the time, at {i}");
    }
    assert!(cache.len() > 100 && cache.len() < 1000, "{}", cache.len());
    assert_eq!(cache.get(&key(5)), Cached::No);
    // The same again and again does not count twice.
    let before = cache.bytes();
    for _ in 0..100 {
        let bytes = response(0);
        cache.put(key(0), &bytes, &wire::Response::parse(&bytes).unwrap());
    }
    assert!(cache.bytes().abs_diff(before) <= LIMIT / 2 && cache.bytes() <= LIMIT);
}

#[tokio::test(start_paused = true)]
async fn an_entry_is_fresh_then_stale_then_gone() {
    let mut cache = Cache::new(100_000, Duration::from_secs(3600));
    let bytes = reply(&query("www.example.com.", RecordType::A), "192.0.2.1", 300);
    let key: Box<[u8]> = b"key".to_vec().into();
    cache.put(key.clone(), &bytes, &wire::Response::parse(&bytes).unwrap());
    let ttl = |response: &[u8]| Message::from_vec(response).unwrap().answers[0].ttl;
    tokio::time::advance(Duration::from_secs(299)).await;
    let Cached::Fresh(response) = cache.get(&key) else { panic!("not fresh") };
    assert_eq!(ttl(&response), 1);
    tokio::time::advance(Duration::from_secs(2)).await;
    let Cached::Stale { response, ask } = cache.get(&key) else { panic!("not stale") };
    assert_eq!((ttl(&response), ask), (30, true));
    cache.failed(&key, Duration::from_secs(30));
    assert!(matches!(cache.get(&key), Cached::Stale { ask: false, .. }));
    tokio::time::advance(Duration::from_secs(31)).await;
    assert!(matches!(cache.get(&key), Cached::Stale { ask: true, .. }));
    tokio::time::advance(Duration::from_secs(3600)).await;
    assert_eq!(cache.get(&key), Cached::No);
    assert_eq!((cache.len(), cache.bytes()), (0, 0));
}

#[test]
fn resolv_conf_is_read_as_the_c_library_does() {
    let text = "# nameserver 1.1.1.1\nnameserver 10.0.0.10\nnameserver\t fd00::10 \nnameserver nonsense\n\
                nameserver fe80::1%eth0\n;nameserver 2.2.2.2\nsearch a b\nnameserver\nnameserverx 3.3.3.3\n";
    let servers = Upstreams::from_resolv_conf(text).to_string();
    assert_eq!(servers, "[10.0.0.10:53, [fd00::10]:53]");
    let many = "nameserver 10.0.0.1\n".repeat(100);
    assert_eq!(Upstreams::from_resolv_conf(&many).to_string().matches("10.0.0.1:53").count(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_end_loses_no_query() {
    let upstream = Upstream::start(|query, _| {
        std::thread::sleep(Duration::from_millis(300));
        vec![reply(query, "192.0.2.1", 60)]
    })
    .await;
    let mut lab = Lab::start(mesh(), [upstream.address], DnsSettings::default());
    let (slow, ours) =
        (query("slow.example.com", RecordType::A), query("cart.shop.svc.cluster.local", RecordType::A));
    let told = lab.told.take();
    let (waited, late) = tokio::join!(lab.udp_within(&slow, SOON), async {
        while upstream.count() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(told);
        lab.udp_within(&ours, SOON).await
    });
    assert_eq!(addresses(&Message::from_vec(&waited.unwrap()).unwrap()), ["192.0.2.1"]);
    assert_eq!(addresses(&Message::from_vec(&late.unwrap()).unwrap()), ["10.96.0.1"]);
    // Then it is over.
    timeout(SOON, &mut lab.serving[0]).await.unwrap().unwrap();
}
