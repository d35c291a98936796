//! What only an authenticated peer could send: any record, sealed with the right keys.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use model::{SpiffeId, TrustDomain, TrustDomains};
use proptest::prelude::*;
use rustls::ContentType;
use rustls_pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::record::{OVERHEAD, Plain};
use super::{TlsError, TlsStream};
use crate::{
    CaDirectory, CertificateSettings, Certificates, Clock, ExpectedPeers, HandshakeLimits, LocalIssuer,
    LocalIssuerSettings, Validity, accept, connect,
};

const PIPE: usize = 1 << 20;

struct Mesh {
    _dir: tempfile::TempDir,
    certificates: Certificates,
    id: SpiffeId,
}

impl Mesh {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
        let domain = TrustDomain::cluster_local();
        ca.make_if_missing(&domain, Validity::of_roots(), UnixTime::now()).unwrap();
        let (domains, clock) = (TrustDomains::only(domain), Clock::system());
        let issuer = LocalIssuer::start(ca, domains, LocalIssuerSettings::default(), clock.clone()).unwrap();
        let (bundle, settings) = (issuer.bundle().clone(), CertificateSettings::default());
        let certificates = Certificates::new(Arc::new(issuer), bundle, settings, None, clock);
        Self { _dir: dir, certificates, id: "spiffe://cluster.local/ns/a/sa/a".parse().unwrap() }
    }

    /// Client and server.
    async fn pair(&self) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
        let (a, b) = duplex(PIPE);
        let (limits, anyone) = (HandshakeLimits::default(), ExpectedPeers::AnyOfMesh);
        let (a, b) = tokio::join!(
            connect(a, &self.certificates, &self.id, anyone, limits),
            accept(b, &self.certificates, &self.id, limits)
        );
        (a.unwrap(), b.unwrap())
    }
}

/// Sends a record of any type and content.
async fn send(stream: &mut TlsStream<DuplexStream>, content: u8, payload: &[u8]) {
    let mut record = vec![0; payload.len() + OVERHEAD];
    let length =
        stream.tls.keys.seal(ContentType::from(content), Plain::new(&[payload]), &mut record).unwrap();
    assert_eq!(length, record.len());
    stream.io.write_all(&record).await.unwrap();
}

fn reason(error: &io::Error) -> String {
    error.get_ref().unwrap().downcast_ref::<TlsError>().unwrap().to_string()
}

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

#[tokio::test]
async fn a_sending_key_that_is_used_up_is_replaced() {
    const KEY_RECORDS: u64 = 7;
    const RECORDS: usize = 100;
    let mesh = Mesh::new();
    let (mut a, mut b) = mesh.pair().await;
    a.tls.keys.limit_sending_key(KEY_RECORDS);
    for n in 0..RECORDS {
        let text = format!("record {n:5}");
        a.write_all(text.as_bytes()).await.unwrap();
        a.flush().await.unwrap();
        let mut got = [0; 12];
        b.read_exact(&mut got).await.unwrap();
        assert_eq!(got, text.as_bytes());
        assert!(a.tls.keys.sent() < KEY_RECORDS, "the key of record {n} was used too often");
    }
    a.shutdown().await.unwrap();
    assert_eq!(b.read(&mut [0]).await.unwrap(), 0);
}

/// What is sent, as records of a type and a content, and the error that must come of it.
type Case = (&'static str, Vec<(u8, Vec<u8>)>, &'static str);

/// A sequence of records from the client, and what the server must make of it.
#[tokio::test]
async fn records_that_no_honest_peer_sends_end_the_connection() {
    let cases: Vec<Case> = vec![
        ("a ticket from a client", vec![(HANDSHAKE, vec![4, 0, 0, 1, 0])], "unexpected handshake"),
        ("a ClientHello", vec![(HANDSHAKE, vec![1, 0, 0, 1, 0])], "unexpected handshake"),
        (
            "a key update of another length",
            vec![(HANDSHAKE, vec![24, 0, 0, 2, 0, 0])],
            "unexpected handshake",
        ),
        ("a key update that asks for what is not", vec![(HANDSHAKE, vec![24, 0, 0, 1, 2])], "unexpected"),
        (
            "a key update that is not the end of its record",
            vec![(HANDSHAKE, vec![24, 0, 0, 1, 0, 24, 0, 0, 1, 0])],
            "unexpected handshake",
        ),
        (
            "data within a message",
            vec![(HANDSHAKE, vec![24, 0, 0]), (DATA, vec![1])],
            "another record within",
        ),
        ("an endless message", vec![(HANDSHAKE, vec![24, 1, 0, 1])], "too long"),
        ("an empty handshake record", vec![(HANDSHAKE, vec![])], "empty handshake"),
        ("a short alert", vec![(ALERT, vec![1])], "not two bytes"),
        ("an empty alert", vec![(ALERT, vec![])], "not two bytes"),
        ("an unknown type", vec![(99, vec![1, 2, 3])], "unknown content type"),
        ("a protected change_cipher_spec", vec![(20, vec![1])], "a record failed"),
        ("no type at all", vec![(0, vec![0; 8])], "a record failed"),
        ("nothing, again and again", vec![(DATA, vec![]); 40], "too many empty"),
        ("warnings, again and again", vec![(ALERT, vec![1, 90]); 40], "too many empty"),
        ("a fatal alert", vec![(ALERT, vec![2, 80])], "InternalError"),
    ];
    let mesh = Mesh::new();
    for (what, records, says) in cases {
        let (mut a, mut b) = mesh.pair().await;
        send(&mut a, DATA, b"before").await;
        for (content, payload) in records {
            send(&mut a, content, &payload).await;
        }
        let mut got = Vec::new();
        let error = b.read_to_end(&mut got).await.expect_err(what);
        assert_eq!(got, b"before", "{what}");
        assert!(reason(&error).contains(says), "{what}: {error}");
    }
}

#[tokio::test]
async fn messages_may_be_split_and_tickets_are_passed_over() {
    let mesh = Mesh::new();
    let (mut a, mut b) = mesh.pair().await;
    // Server to client: two tickets over three records.
    let tickets = [&[4, 0, 1, 0][..], &[7; 256], &[4, 0, 0, 2, 9, 9]].concat();
    for part in tickets.chunks(100) {
        send(&mut b, HANDSHAKE, part).await;
    }
    send(&mut b, DATA, b"after").await;
    let mut got = [0; 5];
    a.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"after");
    send(&mut b, ALERT, &[1, 90]).await;
    send(&mut b, ALERT, &[1, 0]).await;
    send(&mut b, DATA, b"ignored after the end").await;
    assert_eq!(a.read(&mut got).await.unwrap(), 0);
}

#[test]
fn any_sequence_of_authentic_records_is_survived() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mesh = runtime.block_on(async { Mesh::new() });
    let record = (
        prop_oneof![3 => Just(DATA), 2 => Just(HANDSHAKE), 1 => Just(ALERT), 1 => any::<u8>()],
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40),
            proptest::collection::vec(prop_oneof![Just(0_u8), Just(4), Just(24), Just(1)], 0..12),
            Just(vec![24, 0, 0, 1, 1]),
        ],
    );
    let sequence = (proptest::collection::vec(record, 0..12), 1..50_usize, any::<bool>());
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&sequence, |(records, step, to_client)| {
        runtime.block_on(async {
            let (a, b) = mesh.pair().await;
            let (mut from, mut to) = if to_client { (b, a) } else { (a, b) };
            let mut data = Vec::new();
            for (content, payload) in &records {
                send(&mut from, *content, payload).await;
                if *content == DATA {
                    data.extend_from_slice(payload);
                }
            }
            Pin::new(&mut from.io).shutdown().await.unwrap();
            let (mut got, mut part) = (Vec::new(), vec![0; step]);
            while let Ok(count @ 1..) = to.read(&mut part).await {
                got.extend_from_slice(&part[..count]);
            }
            assert!(data.starts_with(&got));
            // Writing must not panic either, whatever state the keys are in now.
            let _ = to.write_all(b"answer").await;
            let _ = to.flush().await;
            let _ = to.shutdown().await;
        });
        Ok(())
    });
    outcome.unwrap();
}

/// All records that are there, or come before the end of the transport's, opened one by one.
async fn records(stream: &mut TlsStream<DuplexStream>) -> Vec<(u8, Vec<u8>)> {
    let mut bytes = Vec::new();
    stream.io.read_to_end(&mut bytes).await.unwrap();
    let (mut rest, mut found) = (bytes.as_mut_slice(), Vec::new());
    while let [_, _, _, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (body, next) = after.split_at_mut(length);
        let (content, place) = stream.tls.keys.open(body).unwrap();
        found.push((u8::from(content), body[place].to_vec()));
        if content == ContentType::Handshake {
            stream.tls.keys.update_receiving().unwrap();
        }
        rest = next;
    }
    found
}

#[tokio::test]
async fn nothing_follows_a_fatal_alert() {
    let mesh = Mesh::new();
    let (mut a, mut b) = mesh.pair().await;
    a.write_all(b"waits for a flush").await.unwrap();
    send(&mut b, 99, b"of no known type").await;
    let error = a.read(&mut [0]).await.unwrap_err();
    assert!(reason(&error).contains("unknown content type"), "{error}");
    for _ in 0..2 {
        assert_eq!(a.flush().await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
    assert_eq!(a.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(a.shutdown().await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(records(&mut b).await, [(ALERT, vec![2, 10])], "an alert, and nothing else");
}

#[tokio::test]
async fn a_record_that_cannot_be_sealed_is_not_followed_by_a_clean_end() {
    let mesh = Mesh::new();
    for large in [false, true] {
        let (mut a, mut b) = mesh.pair().await;
        a.write_all(b"arrives").await.unwrap();
        a.flush().await.unwrap();
        let sent = a.tls.keys.sent();
        // Sealed at once, or with the flush.
        let data = vec![7; if large { 10_000 } else { 10 }];
        if !large {
            a.write_all(&data).await.unwrap();
        }
        // The sequence number is at its end, which no new key can follow.
        a.tls.keys.set_sent(u64::MAX);
        let failed = if large { a.write_all(&data).await } else { a.flush().await };
        assert!(reason(&failed.unwrap_err()).contains("a record failed"));
        // Even if it would work again.
        a.tls.keys.set_sent(sent);
        assert_eq!(a.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(a.flush().await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(a.shutdown().await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let mut got = Vec::new();
        let error = b.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(got, b"arrives");
        assert!(reason(&error).contains("without a close_notify"), "{error}");
    }
}

#[tokio::test]
async fn keys_that_the_peer_asks_for_come_before_the_next_data() {
    let mesh = Mesh::new();
    let key_update = (HANDSHAKE, vec![24, 0, 0, 1, 0]);
    // Data that waits for a flush when the peer asks, and data that is written then.
    for (before, after) in [("waits", ""), ("", "new"), ("waits, ", "and new")] {
        let (mut a, mut b) = mesh.pair().await;
        a.write_all(before.as_bytes()).await.unwrap();
        send(&mut b, HANDSHAKE, &[24, 0, 0, 1, 1]).await;
        Pin::new(&mut b.io).shutdown().await.unwrap();
        let error = a.read(&mut [0]).await.unwrap_err();
        assert!(reason(&error).contains("without a close_notify"), "{error}");
        a.write_all(after.as_bytes()).await.unwrap();
        a.flush().await.unwrap();
        a.shutdown().await.unwrap();
        let data = (DATA, [before, after].concat().into_bytes());
        assert_eq!(records(&mut b).await, [key_update.clone(), data, (ALERT, vec![1, 0])]);
    }
}

#[tokio::test]
async fn a_record_is_not_filled_up_with_what_lay_in_the_buffer() {
    let mesh = Mesh::new();
    let (mut a, _b) = mesh.pair().await;
    let mut out = [0x55; 100];
    for pieces in [&[&b"short"[..]][..], &[b"sh", b"ort"], &[]] {
        let sealed = a.tls.keys.seal(ContentType::ApplicationData, Plain::new(pieces).part(0..20), &mut out);
        assert!(sealed.is_err(), "{pieces:?}");
    }
}

#[tokio::test]
async fn no_sequence_number_protects_two_records() {
    let mesh = Mesh::new();
    let (mut a, _b) = mesh.pair().await;
    let mut out = [0; 100];
    for pieces in [&[&b"in one piece"[..]][..], &[b"in ", b"two"]] {
        let mut seal = || a.tls.keys.seal(ContentType::ApplicationData, Plain::new(pieces), &mut out);
        seal().unwrap();
        let next = a.tls.keys.sent();
        a.tls.keys.set_sent(next - 1);
        let again = a.tls.keys.seal(ContentType::ApplicationData, Plain::new(pieces), &mut out);
        assert!(again.is_err(), "the cipher believed a counter that went back");
        a.tls.keys.set_sent(next);
    }
}

#[tokio::test]
async fn a_writer_that_waits_is_woken_also_when_reading_failed_meanwhile() {
    let mesh = Mesh::new();
    let (a, mut b) = mesh.pair().await;
    // The clock stands from here on, and goes only when nobody has anything to do.
    tokio::time::pause();
    let (mut reader, mut writer) = tokio::io::split(a);
    let writing = tokio::spawn(async move { writer.write_all(&vec![7; 4 * PIPE]).await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!writing.is_finished(), "the pipe holds all of it");
    send(&mut b, 99, b"of no known type").await;
    let error = reader.read(&mut [0]).await.unwrap_err();
    assert!(reason(&error).contains("unknown content type"), "{error}");
    let taking = tokio::spawn(async move { b.io.read_to_end(&mut Vec::new()).await });
    let ended = tokio::time::timeout(Duration::from_secs(60), writing).await;
    let error = ended.expect("nobody woke the writer").unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    taking.abort();
}
