//! ZDS in raw bytes, as the facts of compatibility have it: what a ztunnel of any make sends and receives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use net::Netns;
use net::seqpacket::Seqpacket;
use node_agent::zds::{NotServed, PodIdentity, Ztunnels};

const LIMIT: Duration = Duration::from_secs(10);
const HELLO: &[u8] = &[0x08, 0x01];
const ACK: &[u8] = &[0x0a, 0x00];
const SNAPSHOT_SENT: &[u8] = &[0x1a, 0x00];

/// A length-delimited field.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    bytes.extend(content);
    bytes
}

fn add(uid: &str) -> Vec<u8> {
    let info = [field(1, b"web"), field(2, b"shop"), field(3, b"account")].concat();
    field(1, &[field(1, uid.as_bytes()), field(2, &info)].concat())
}

fn keep(uid: &str) -> Vec<u8> {
    field(5, &field(1, uid.as_bytes()))
}

fn del(uid: &str) -> Vec<u8> {
    field(2, &field(2, uid.as_bytes()))
}

fn refusal(why: &str) -> Vec<u8> {
    field(1, &field(1, why.as_bytes()))
}

fn pod(uid: &str) -> PodIdentity {
    PodIdentity {
        uid: uid.to_owned(),
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        service_account: "account".to_owned(),
    }
}

struct Server {
    ztunnels: Ztunnels,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ztunnel.sock");
        let ztunnels = Ztunnels::default();
        tokio::spawn(ztunnels.listen(&path).unwrap());
        Self { ztunnels, path, _directory: directory }
    }

    async fn until(&self, what: &str, mut done: impl FnMut(&Ztunnels) -> bool) {
        for _ in 0..1000 {
            if done(&self.ztunnels) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}");
    }
}

struct Ztunnel(Seqpacket);

impl Ztunnel {
    async fn connect(path: &Path) -> Self {
        let this = Self(Seqpacket::connect(path).unwrap());
        this.0.send(HELLO, None).await.unwrap();
        this
    }

    /// Connects, and takes an empty snapshot.
    async fn ready(path: &Path) -> Self {
        let this = Self::connect(path).await;
        this.expect(SNAPSHOT_SENT).await;
        this.answer(ACK).await;
        this
    }

    async fn receive(&self) -> (Vec<u8>, Option<OwnedFd>) {
        let packet = tokio::time::timeout(LIMIT, self.0.receive(4096)).await.expect("nothing came");
        let packet = packet.unwrap().expect("the agent closed the connection");
        assert!(packet.bytes.len() <= 1024);
        (packet.bytes, packet.descriptor)
    }

    async fn expect(&self, bytes: &[u8]) -> Option<OwnedFd> {
        let (received, descriptor) = self.receive().await;
        assert_eq!(received, bytes);
        descriptor
    }

    async fn answer(&self, bytes: &[u8]) {
        self.0.send(bytes, None).await.unwrap();
    }

    async fn nothing_comes(&self) {
        let waited = tokio::time::timeout(Duration::from_millis(300), self.0.receive(4096)).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    async fn is_closed(&self) {
        let end = tokio::time::timeout(LIMIT, self.0.receive(4096)).await.expect("it stays open");
        assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
    }
}

#[tokio::test]
async fn a_snapshot_one_at_a_time_then_changes() {
    let server = Server::start();
    let here = Netns::current().unwrap();
    server.ztunnels.serve(pod("a"), Some(here.clone()));
    server.ztunnels.serve(pod("b"), None);
    assert_eq!(server.ztunnels.served("a"), Err(NotServed::NoZtunnel));

    let ztunnel = Ztunnel::connect(&server.path).await;
    let descriptor = ztunnel.expect(&add("a")).await.expect("the network namespace comes along");
    assert!(Netns::from_fd(descriptor, "received").unwrap().same(&here));
    // One at a time: the next comes after the acknowledgement.
    ztunnel.nothing_comes().await;
    ztunnel.answer(ACK).await;
    assert!(ztunnel.expect(&keep("b")).await.is_none(), "nothing to hand over");
    ztunnel.answer(&refusal("b is not known")).await;
    ztunnel.expect(SNAPSHOT_SENT).await;
    ztunnel.answer(ACK).await;
    server.until("a is served", |z| z.served("a").is_ok()).await;
    assert_eq!(server.ztunnels.served("b"), Err(NotServed::Refused("b is not known".to_owned())));

    server.ztunnels.serve(pod("c"), Some(here.clone()));
    assert!(ztunnel.expect(&add("c")).await.is_some());
    assert_eq!(server.ztunnels.served("c"), Err(NotServed::Waiting));
    ztunnel.answer(ACK).await;
    server.ztunnels.wait_served("c", LIMIT).await.unwrap();
    // The same again is nothing new.
    server.ztunnels.serve(pod("c"), Some(here));
    server.ztunnels.withdraw("a");
    ztunnel.expect(&del("a")).await;
    ztunnel.answer(ACK).await;
    assert!(server.ztunnels.wait_withdrawn("a", LIMIT).await);
    ztunnel.nothing_comes().await;
}

#[tokio::test]
async fn what_is_refused_is_sent_again_and_another_namespace_is_another_pod() {
    if !harness::netns::root_or_skip("another namespace is another pod") {
        return;
    }
    let server = Server::start();
    let ztunnel = Ztunnel::ready(&server.path).await;
    let (old, new) = (Netns::new_empty().unwrap(), Netns::new_empty().unwrap());
    server.ztunnels.serve(pod("a"), Some(old));
    ztunnel.expect(&add("a")).await;
    ztunnel.answer(&refusal("busy")).await;
    server.until("it is refused", |z| z.served("a") == Err(NotServed::Refused("busy".to_owned()))).await;
    ztunnel.expect(&add("a")).await;
    ztunnel.answer(ACK).await;
    server.ztunnels.wait_served("a", LIMIT).await.unwrap();
    server.ztunnels.serve(pod("a"), Some(new.clone()));
    assert_eq!(server.ztunnels.served("a"), Err(NotServed::Waiting), "it is served where it was");
    ztunnel.expect(&del("a")).await;
    ztunnel.answer(ACK).await;
    let descriptor = ztunnel.expect(&add("a")).await.unwrap();
    assert!(Netns::from_fd(descriptor, "received").unwrap().same(&new));
    ztunnel.answer(ACK).await;
    server.ztunnels.wait_served("a", LIMIT).await.unwrap();
}

#[tokio::test]
async fn what_was_refused_is_taken_back_when_its_pod_goes() {
    if !harness::netns::root_or_skip("what was refused is taken back") {
        return;
    }
    let server = Server::start();
    let ztunnel = Ztunnel::ready(&server.path).await;
    server.ztunnels.serve(pod("a"), Some(Netns::new_empty().unwrap()));
    ztunnel.expect(&add("a")).await;
    ztunnel.answer(&refusal("not done in time; it goes on")).await;
    server.until("it is refused", |z| matches!(z.served("a"), Err(NotServed::Refused(_)))).await;
    server.ztunnels.withdraw("a");
    ztunnel.expect(&del("a")).await;
    ztunnel.answer(ACK).await;
    ztunnel.nothing_comes().await;
}

#[tokio::test]
async fn annotations_may_take_what_culverts_ztunnel_takes() {
    if !harness::netns::root_or_skip("annotations in packets") {
        return;
    }
    use proto::wire::zds::{Version, WorkloadRequest, ZdsHello, workload_request::Payload};
    let server = Server::start();
    let ztunnel = Seqpacket::connect(&server.path).unwrap();
    let hello = ZdsHello { version: Version::V1.into(), culvert_capture: true };
    ztunnel.send(&prost::Message::encode_to_vec(&hello), None).await.unwrap();
    for (uid, bytes) in [("a", 3000), ("b", 5000)] {
        let key = "traffic.sidecar.istio.io/excludeOutboundIPRanges".to_owned();
        let annotations = std::collections::BTreeMap::from([(key, "x".repeat(bytes))]);
        server.ztunnels.serve_as(pod(uid), Some(Netns::new_empty().unwrap()), annotations);
    }
    let mut told = Vec::new();
    while told.len() < 2 {
        let packet = tokio::time::timeout(LIMIT, ztunnel.receive(4096)).await.unwrap().unwrap().unwrap();
        let request: WorkloadRequest = prost::Message::decode(&*packet.bytes).unwrap();
        if let Some(Payload::Add(add)) = request.payload {
            told.push((add.uid, add.culvert_capture.values().map(String::len).sum::<usize>()));
        }
        ztunnel.send(ACK, None).await.unwrap();
    }
    told.sort();
    assert_eq!(told, [("a".to_owned(), 3000), ("b".to_owned(), 0)], "too many are left out");
}

#[tokio::test]
async fn of_two_ztunnels_the_newest_is_added_to_and_all_are_taken_from() {
    let server = Server::start();
    let here = Some(Netns::current().unwrap());
    server.ztunnels.serve(pod("a"), here.clone());
    let old = Ztunnel::connect(&server.path).await;
    old.expect(&add("a")).await;
    old.answer(ACK).await;
    old.expect(SNAPSHOT_SENT).await;
    old.answer(ACK).await;
    server.ztunnels.wait_served("a", LIMIT).await.unwrap();

    let new = Ztunnel::connect(&server.path).await;
    new.expect(&add("a")).await;
    new.answer(ACK).await;
    new.expect(SNAPSHOT_SENT).await;
    new.answer(ACK).await;
    server.until("both", |z| z.connected() == 2).await;
    server.ztunnels.serve(pod("b"), here);
    new.expect(&add("b")).await;
    new.answer(ACK).await;
    server.ztunnels.wait_served("b", LIMIT).await.unwrap();
    old.nothing_comes().await;
    server.ztunnels.withdraw("a");
    for ztunnel in [&old, &new] {
        ztunnel.expect(&del("a")).await;
        ztunnel.answer(ACK).await;
    }
    assert!(server.ztunnels.wait_withdrawn("a", LIMIT).await);

    // The upgrade fails: the old one is the newest again, and gets what it missed.
    drop(new);
    old.expect(&add("b")).await;
    assert!(server.ztunnels.served("b").is_err());
    old.answer(ACK).await;
    server.ztunnels.wait_served("b", LIMIT).await.unwrap();
    drop(old);
    server.until("none", |z| z.served("b") == Err(NotServed::NoZtunnel)).await;
}

#[tokio::test]
async fn who_breaks_the_protocol_is_cut_off() {
    let server = Server::start();
    server.ztunnels.serve(pod("a"), Some(Netns::current().unwrap()));
    for first in [&b"\xff\xff\xff"[..], &[0x08, 0x02], b"GET / HTTP/1.1\r\n\r\n"] {
        let wrong = Ztunnel(Seqpacket::connect(&server.path).unwrap());
        wrong.answer(first).await;
        wrong.is_closed().await;
    }
    for answer in [&b"\xff\xff\xff"[..], b"\x10\x01", &[0; 2000]] {
        let wrong = Ztunnel::connect(&server.path).await;
        wrong.expect(&add("a")).await;
        wrong.answer(answer).await;
        wrong.is_closed().await;
    }
    let unasked = Ztunnel::connect(&server.path).await;
    unasked.expect(&add("a")).await;
    unasked.answer(ACK).await;
    unasked.expect(SNAPSHOT_SENT).await;
    unasked.answer(ACK).await;
    unasked.answer(ACK).await;
    unasked.is_closed().await;
    assert_eq!(server.ztunnels.connected(), 0);
    // And the next one is served as if nothing had been.
    let good = Ztunnel::connect(&server.path).await;
    good.expect(&add("a")).await;
    good.answer(ACK).await;
    server.ztunnels.wait_served("a", LIMIT).await.unwrap();
}

#[tokio::test]
async fn who_does_not_answer_within_five_seconds_is_cut_off() {
    let server = Server::start();
    server.ztunnels.serve(pod("a"), Some(Netns::current().unwrap()));
    let silent = Ztunnel(Seqpacket::connect(&server.path).unwrap());
    let mute = Ztunnel::connect(&server.path).await;
    mute.expect(&add("a")).await;
    let started = tokio::time::Instant::now();
    silent.is_closed().await;
    mute.is_closed().await;
    let waited = started.elapsed();
    assert!((Duration::from_secs(3)..Duration::from_secs(8)).contains(&waited), "{waited:?}");
    assert_eq!(server.ztunnels.served("a"), Err(NotServed::NoZtunnel));
}

#[tokio::test]
async fn connections_have_a_limit_and_a_socket_that_is_there_is_replaced() {
    let server = Server::start();
    let mut many = Vec::new();
    for _ in 0..8 {
        many.push(Ztunnel::ready(&server.path).await);
    }
    let one_more = Ztunnel(Seqpacket::connect(&server.path).unwrap());
    one_more.is_closed().await;
    assert_eq!(server.ztunnels.connected(), 8);
    drop(many);
    let other = Ztunnels::default();
    tokio::spawn(other.listen(&server.path).unwrap());
    let _ztunnel = Ztunnel::ready(&server.path).await;
    for _ in 0..500 {
        if other.connected() == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the new socket has no connection");
}

#[tokio::test]
async fn a_pod_kept_without_a_descriptor_is_not_taken_away_when_it_is_found() {
    let server = Server::start();
    server.ztunnels.serve(pod("a"), None);
    let ztunnel = Ztunnel::connect(&server.path).await;
    ztunnel.expect(&keep("a")).await;
    ztunnel.answer(ACK).await;
    ztunnel.expect(SNAPSHOT_SENT).await;
    ztunnel.answer(ACK).await;
    server.ztunnels.wait_served("a", LIMIT).await.unwrap();
    let here = Netns::current().unwrap();
    assert!(here.as_fd().try_clone_to_owned().is_ok());
    server.ztunnels.serve(pod("a"), Some(here));
    ztunnel.nothing_comes().await;
    server.ztunnels.served("a").unwrap();
}
