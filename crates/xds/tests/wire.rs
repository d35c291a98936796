//! The protocol byte by byte, with messages that are put together by hand from the field numbers of
//! envoy/service/discovery/v3/discovery.proto, envoy/config/core/v3/base.proto and google/rpc/status.proto, over a
//! plain HTTP/2 stream: so that the server does not understand its own encoder only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod network;
mod support;

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use network::Site;
use support::{ADDRESS, resource, set};
use xds::server::{Change, Config, Resource};

/// A field of wire type 2: tag, length, bytes.
fn field(number: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    assert!(number < 16);
    let mut out = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        out.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(content);
    out
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes.get_u8();
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
    }
    unreachable!()
}

/// The fields of a message: number and content. All of them must be of wire type 2.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut out = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        assert_eq!(tag & 7, 2, "field {} has another wire type", tag >> 3);
        let length = varint(&mut message) as usize;
        out.push((tag >> 3, message[..length].to_vec()));
        message.advance(length);
    }
    out
}

fn texts(message: &[(u64, Vec<u8>)], number: u64) -> Vec<String> {
    let found = message.iter().filter(|(n, _)| *n == number);
    found.map(|(_, content)| String::from_utf8(content.clone()).unwrap()).collect()
}

/// google.protobuf.Struct with one text: `fields` (1) is a map, whose entries have key (1) and value (2), of which
/// `string_value` is 3.
fn metadata(key: &str, value: &str) -> Vec<u8> {
    field(1, [field(1, key), field(2, field(3, value))].concat())
}

struct Raw {
    send: h2::SendStream<Bytes>,
    receive: h2::RecvStream,
    buffer: BytesMut,
}

impl Raw {
    async fn open(site: &Site) -> Self {
        let tcp = tokio::net::TcpStream::connect(site.address).await.unwrap();
        let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let request = http::Request::post(format!(
            "http://{}/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            site.address
        ));
        let request = request.header("content-type", "application/grpc").header("te", "trailers");
        let request = request.header("authorization", "Bearer good").body(()).unwrap();
        let (response, send) = client.send_request(request, false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/grpc");
        Self { send, receive: response.into_body(), buffer: BytesMut::new() }
    }

    fn request(&mut self, message: &[u8]) {
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(message.len() as u32);
        frame.put_slice(message);
        self.send.send_data(frame.freeze(), false).unwrap();
    }

    async fn response(&mut self) -> Vec<(u64, Vec<u8>)> {
        loop {
            if self.buffer.len() >= 5 {
                assert_eq!(self.buffer[0], 0, "not compressed");
                let length = u32::from_be_bytes(self.buffer[1..5].try_into().unwrap()) as usize;
                if self.buffer.len() >= length + 5 {
                    self.buffer.advance(5);
                    return fields(&self.buffer.split_to(length));
                }
            }
            let data = self.receive.data().await.expect("the stream goes on").unwrap();
            self.receive.flow_control().release_capacity(data.len()).unwrap();
            self.buffer.extend_from_slice(&data);
        }
    }

    async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(400), self.response()).await.is_err()
    }
}

#[tokio::test]
async fn a_client_of_another_make_subscribes_acknowledges_and_refuses() {
    let site = Site::new(Config { types: vec![ADDRESS], ..Config::default() }).await;
    let aliases = vec!["net/10.0.0.1".into()];
    let both = Resource {
        aliases,
        culvert: Some(Bytes::from_static(b"ours")),
        ..resource(ADDRESS, "uid-1", "theirs")
    };
    site.server.apply([Change::Set(both)]);
    site.server.ready();
    let mut raw = Raw::open(&site).await;

    // DeltaDiscoveryRequest: node 1, type_url 2, resource_names_subscribe 3, initial_resource_versions 5,
    // response_nonce 6, error_detail 7. Node: id 1, cluster 2, metadata 3. With fields that nobody knows: 15.
    let node =
        [field(1, "ztunnel~10.0.0.9~z.ns~ns.svc"), field(3, metadata("NAME", "z")), field(15, "?")].concat();
    let held = field(5, [field(1, "gone"), field(2, "v1")].concat());
    raw.request(&[field(1, node), field(2, ADDRESS), held, field(15, "?")].concat());

    // DeltaDiscoveryResponse: system_version_info 1, resources 2, type_url 4, nonce 5, removed_resources 6.
    let response = raw.response().await;
    assert_eq!(texts(&response, 4), [ADDRESS]);
    assert_eq!(texts(&response, 6), ["gone"]);
    let nonce = texts(&response, 5).remove(0);
    // Resource: version 1, resource 2, name 3, aliases 4. Any: type_url 1, value 2.
    let resource = fields(&response.iter().find(|(n, _)| *n == 2).unwrap().1);
    assert_eq!(texts(&resource, 3), ["uid-1"]);
    assert_eq!(texts(&resource, 4), ["net/10.0.0.1"]);
    assert!(!texts(&resource, 1)[0].is_empty());
    let any = fields(&resource.iter().find(|(n, _)| *n == 2).unwrap().1);
    assert_eq!((texts(&any, 1), texts(&any, 2)), (vec![ADDRESS.to_owned()], vec!["theirs".to_owned()]));

    // Nothing goes before the answer, and the answer is by nonce.
    site.server.apply([set(ADDRESS, "uid-2", "2")]);
    raw.request(&[field(2, ADDRESS), field(6, "another")].concat());
    assert!(raw.is_silent().await);
    raw.request(&[field(2, ADDRESS), field(6, &nonce)].concat());
    let response = raw.response().await;
    assert_eq!(response.iter().filter(|(n, _)| *n == 2).count(), 1);

    // Status: code 1 (a varint), message 2.
    let status = [vec![1 << 3, 13], field(2, "can't read it")].concat();
    let nonce = texts(&response, 5).remove(0);
    raw.request(&[field(2, ADDRESS), field(6, nonce), field(7, status)].concat());
    site.until(|s| s.clients().iter().any(|c| c.types[0].last_nack.as_deref() == Some("can't read it")))
        .await;
    assert!(raw.is_silent().await, "what was refused is not sent again");
    let client = site.server.clients().remove(0);
    assert_eq!(client.node.id, "ztunnel~10.0.0.9~z.ns~ns.svc");
    assert_eq!(client.audience, proto::Extensions::None);
    assert_eq!(&*client.types[0].rejected[0].name, "uid-2");

    site.server.apply([support::remove(ADDRESS, "uid-1")]);
    assert_eq!(texts(&raw.response().await, 6), ["uid-1"]);
}

#[tokio::test]
async fn on_demand_as_istio_asks_for_it() {
    let site = Site::new(Config { types: vec![ADDRESS], ..Config::default() }).await;
    site.server.apply([set(ADDRESS, "uid-1", "1"), set(ADDRESS, "uid-2", "1")]);
    site.server.ready();
    let mut raw = Raw::open(&site).await;
    // resource_names_subscribe 3 and resource_names_unsubscribe 4, both `*`.
    raw.request(&[field(1, field(1, "z")), field(2, ADDRESS), field(3, "*"), field(4, "*")].concat());
    let response = raw.response().await;
    assert!(response.iter().all(|(n, _)| ![2, 6].contains(n)));
    let ack = [field(2, ADDRESS), field(6, texts(&response, 5).remove(0))].concat();
    // An answer and a question in one.
    raw.request(&[ack, field(3, "uid-2"), field(3, "/10.0.0.7")].concat());
    let response = raw.response().await;
    assert_eq!(response.iter().filter(|(n, _)| *n == 2).count(), 1);
    assert_eq!(texts(&response, 6), ["/10.0.0.7"]);
}

#[tokio::test]
async fn one_that_knows_our_extensions_gets_them() {
    let site = Site::new(Config { types: vec![ADDRESS], ..Config::default() }).await;
    let both = Resource { culvert: Some(Bytes::from_static(b"ours")), ..resource(ADDRESS, "a", "theirs") };
    site.server.apply([Change::Set(both)]);
    site.server.ready();
    for (version, wanted) in [("1", "ours"), ("99", "theirs"), ("", "theirs")] {
        let mut raw = Raw::open(&site).await;
        let node = [field(1, "z"), field(3, metadata("CULVERT_EXTENSIONS", version))].concat();
        raw.request(&[field(1, node), field(2, ADDRESS)].concat());
        let response = raw.response().await;
        let resource = fields(&response.iter().find(|(n, _)| *n == 2).unwrap().1);
        let any = fields(&resource.iter().find(|(n, _)| *n == 2).unwrap().1);
        assert_eq!(texts(&any, 2), [wanted], "{version:?}");
    }
}

#[tokio::test]
async fn what_is_no_request_ends_its_stream_and_no_other() {
    let site = Site::new(Config { types: vec![ADDRESS], ..Config::default() }).await;
    site.server.ready();
    let mut good = Raw::open(&site).await;
    good.request(&[field(1, field(1, "good")), field(2, ADDRESS)].concat());
    good.response().await;
    for bad in [vec![0xff; 100], field(2, ADDRESS), field(1, ""), field(1, field(1, [0xff])), vec![]] {
        let mut raw = Raw::open(&site).await;
        raw.request(&bad);
        let mut end =
            tokio::time::timeout(Duration::from_secs(5), raw.receive.trailers()).await.unwrap().unwrap();
        let status = end.take().unwrap().get("grpc-status").unwrap().to_str().unwrap().to_owned();
        assert!(["3", "13"].contains(&status.as_str()), "{bad:?}: {status}");
    }
    assert_eq!(site.server.clients().len(), 1);
}
