//! What is no proper message: random bytes, and proper messages with bytes changed.

use proptest::prelude::*;

use super::*;

/// A proxy without sockets or upstreams.
fn bare() -> (Arc<DnsProxy>, Arc<Client>) {
    bare_with(Arc::new(Upstreams::new([])))
}

/// A proxy without sockets of its own.
pub(super) fn bare_with(upstreams: Arc<Upstreams>) -> (Arc<DnsProxy>, Arc<Client>) {
    let mesh = Arc::new(mesh());
    let proxy =
        DnsProxy::new(DnsSettings::default(), move || mesh.clone(), DnsMetrics::new(&Registry::new()));
    let client = proxy.client(ClientSettings {
        namespace: "shop".into(),
        network: "".into(),
        addresses: Box::default(),
        canonical_service: "".into(),
        canonical_revision: "".into(),
        upstreams,
        upstreams_from: None,
        ask_original: false,
    });
    (proxy, client)
}

/// Proper queries and responses, to be changed.
fn seeds() -> Vec<Vec<u8>> {
    let plain = query("cart.shop.svc.cluster.local.", RecordType::A);
    vec![
        plain.clone(),
        query("db.shop.", RecordType::ANY),
        query("_http._tcp.db.shop.", RecordType::SRV),
        query_with_edns("both.shop.", RecordType::AAAA, 1232, true),
        reply(&plain, "192.0.2.1", 60),
        reply(&query_with_edns("x.example.com.", RecordType::A, 512, false), "192.0.2.1", 60),
    ]
}

fn message_bytes() -> impl Strategy<Value = Vec<u8>> {
    let changed = (
        0..seeds().len(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        any::<u16>(),
    )
        .prop_map(|(seed, changes, cut)| {
            let mut bytes = seeds().swap_remove(seed);
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if cut % 4 == 0 {
                bytes.truncate(usize::from(cut / 4) % (bytes.len() + 1));
            }
            bytes
        });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..600), changed]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn no_message_does_harm(bytes in message_bytes(), tcp in any::<bool>()) {
        let (proxy, client) = thread_proxy();
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        if let Next::Reply(reply) = proxy.next(&bytes, transport, &client, || None) {
            // A reply is one: to this query, within its limits, and readable for others.
            prop_assert_eq!(&reply[..2], &bytes[..2]);
            prop_assert!(reply[2] & 0x80 != 0);
            let parsed = Message::from_vec(&reply);
            prop_assert!(parsed.is_ok(), "{:?} of {:?}: {:?}", reply, bytes, parsed);
            if !tcp {
                let limit = Query::parse(&bytes).map_or(512, |q| q.udp_size());
                prop_assert!(reply.len() <= limit);
            }
        }
    }

    #[test]
    fn queries_are_read_as_others_read_them(bytes in message_bytes()) {
        let theirs = Message::from_vec(&bytes);
        if let (Ok(ours), Ok(theirs)) = (Query::parse(&bytes), theirs) {
            prop_assert_eq!(theirs.queries.len(), 1);
            let question = &theirs.queries[0];
            prop_assert_eq!(u16::from(question.query_type()), ours.kind());
            prop_assert_eq!(u16::from(question.query_class()), ours.class());
            let mut name = Vec::new();
            for label in question.name() {
                name.push(u8::try_from(label.len()).unwrap());
                name.extend_from_slice(label);
            }
            name.push(0);
            prop_assert_eq!(name.as_slice(), ours.raw_name());
            prop_assert_eq!(theirs.edns.is_some(), ours.edns().is_some());
            if let (Some(theirs), Some(ours)) = (&theirs.edns, ours.edns()) {
                prop_assert_eq!(theirs.flags().dnssec_ok, ours.dnssec_ok);
                prop_assert_eq!(theirs.version(), ours.version);
                prop_assert_eq!(theirs.max_payload().max(512), ours.udp_size);
            }
        }
    }

    #[test]
    fn responses_are_read_as_others_read_them(bytes in message_bytes(), change in 0..10_000u32) {
        let Some(ours) = wire::Response::parse(&bytes) else { return Ok(()) };
        let mut changed = bytes.clone();
        wire::change_ttls(&mut changed, &ours.ttls_at, |_| change);
        if let (Ok(before), Ok(after)) = (Message::from_vec(&bytes), Message::from_vec(&changed)) {
            let records = |m: &Message| -> Vec<Record> { m.all_sections().cloned().collect() };
            let (mut before, after) = (records(&before), records(&after));
            prop_assert_eq!(ours.ttls_at.len(), before.len());
            for record in &mut before {
                record.ttl = change;
            }
            prop_assert_eq!(before, after, "only the times to live change");
        }
    }

    #[test]
    fn nothing_but_the_answer_is_taken_for_it(bytes in message_bytes(), id in any::<u16>()) {
        let query = Query::parse(&query("cart.shop.svc.cluster.local.", RecordType::A)).unwrap();
        if wire::answers(&bytes, &query, id) {
            prop_assert_eq!(&bytes[..2], &id.to_be_bytes());
            let mut readdressed = bytes.clone();
            wire::readdress(&mut readdressed, &query);
            prop_assert_eq!(&readdressed[..2], &query.id().to_be_bytes());
        }
    }
}

/// One proxy a thread: making one for each case is slow.
fn thread_proxy() -> (Arc<DnsProxy>, Arc<Client>) {
    thread_local! {
        static PROXY: (Arc<DnsProxy>, Arc<Client>) = bare();
    }
    PROXY.with(Clone::clone)
}

#[tokio::test]
async fn after_a_storm_of_random_bytes_it_still_answers() {
    let lab = Lab::alone();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(lab.address).await.unwrap();
    // A fixed sequence: xorshift (Marsaglia), so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..3000 {
        let len = (random() % 700) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        if round % 2 == 0 && len > 12 {
            bytes[2] &= 0x07; // a query, so that it is read further
            bytes[4..6].copy_from_slice(&[0, 1]);
        }
        let _ = socket.send(&bytes).await;
        if round % 50 == 0 {
            assert_eq!(addresses(&lab.ask("cart.", RecordType::A).await), ["10.96.0.1"]);
        }
    }
    for _ in 0..50 {
        let mut stream = TcpStream::connect(lab.address).await.unwrap();
        let bytes: Vec<u8> = (0..random() % 3000).map(|_| random() as u8).collect();
        let _ = stream.write_all(&bytes).await;
    }
    assert_eq!(addresses(&lab.ask("cart.", RecordType::A).await), ["10.96.0.1"]);
    assert!(!lab.tcp(&query("cart.", RecordType::A)).await.is_empty());
}

#[tokio::test]
async fn malformed_queries_are_told_or_dropped() {
    let lab = Lab::alone();
    let plain = query("cart.shop.", RecordType::A);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = plain.clone();
        change(&mut bytes);
        bytes
    };
    let rcodes = [
        (changed(&|b| b[5] = 0), Some(1)),
        (changed(&|b| b[5] = 2), Some(1)),
        (changed(&|b| b[2] |= 0x28), Some(4)), // an update
        (changed(&|b| b.truncate(20)), Some(1)),
        (changed(&|b| b[12] = 0xc0), Some(1)), // a pointer in the question
        (changed(&|b| b[12] = 0x40), Some(1)), // a label of a kind that nobody defined
        (changed(&|b| b[11] = 1), Some(1)),    // a record that is not there
        (changed(&|b| b[2] |= 0x80), None),    // a response
        (changed(&|b| b.truncate(11)), None),
        (Vec::new(), None),
        (vec![0; 5000], None),
    ];
    for (bytes, rcode) in rcodes {
        let response =
            lab.udp_within(&bytes, Duration::from_millis(if rcode.is_some() { 5000 } else { 300 })).await;
        assert_eq!(response.as_ref().map(|r| r[3] & 15), rcode, "{bytes:?} {response:?}");
    }
}
