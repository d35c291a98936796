//! What a client holds of a resource, and what it needs while a server of another make sends it a whole state at once.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../../config/tests/heap/mod.rs"]
mod heap;

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use proto::wire::discovery::{DeltaDiscoveryResponse, Resource};
use tokio::net::TcpListener;
use xds::client::{Client, Settings};

const TYPE: &str = "type.googleapis.com/test.Address";
const RESOURCES: usize = 50_000;
const BODY: usize = 400;

/// A response with one resource, without what names the response: its fields are a part of a longer one.
fn resource(number: usize) -> Vec<u8> {
    let content = prost_types::Any { type_url: TYPE.into(), value: vec![7; BODY] };
    let resource = Resource {
        version: format!("{number:020x}"),
        name: format!("Kubernetes//Pod/team-{}/app-5f6d8c9b7-{number:05}", number / 5000),
        resource: Some(content),
        aliases: vec![],
    };
    DeltaDiscoveryResponse { resources: vec![resource], ..Default::default() }.encode_to_vec()
}

/// Sends, as there is room.
async fn send(stream: &mut h2::SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = std::future::poll_fn(|context| stream.poll_capacity(context)).await.unwrap().unwrap();
        let now = data.split_to(room.min(data.len()));
        stream.send_data(now, false).unwrap();
    }
}

/// A server that holds nothing: it makes the one response that it sends as it goes.
async fn serve(listener: TcpListener) {
    let tcp = listener.accept().await.unwrap().0;
    let mut connection = h2::server::handshake(tcp).await.unwrap();
    let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
    let answer = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let mut stream = respond.send_response(answer, false).unwrap();
    tokio::spawn(async move { while connection.accept().await.is_some() {} });
    let last = DeltaDiscoveryResponse { type_url: TYPE.into(), nonce: "n".into(), ..Default::default() };
    let length = (0..RESOURCES).map(|n| resource(n).len()).sum::<usize>() + last.encoded_len();
    let mut piece = BytesMut::new();
    piece.put_u8(0);
    piece.put_u32(u32::try_from(length).unwrap());
    for number in 0..RESOURCES {
        piece.put(resource(number).as_slice());
        if piece.len() > 16 << 10 {
            send(&mut stream, std::mem::take(&mut piece).freeze()).await;
        }
    }
    piece.put(last.encode_to_vec().as_slice());
    send(&mut stream, piece.freeze()).await;
    // Until the test is over.
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_whole_state_is_never_held_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let settings =
        Settings { addresses: vec![format!("http://{address}")], types: vec![TYPE], ..Settings::default() };
    let (client, mut updates) = Client::new(settings, Arc::new(())).unwrap();
    let before = heap::watch();
    tokio::spawn(serve(listener));
    tokio::spawn(client.run());
    let (mut came, mut is_complete) = (0, false);
    while !is_complete {
        let update = updates.next().await.unwrap();
        came += update.resources.len();
        is_complete = update.complete;
        assert!(update.resources.iter().all(|resource| resource.body.len() == BODY));
        update.ack();
    }
    assert_eq!(came, RESOURCES);
    let most = heap::most() - before;
    // What it holds when the last update was answered: names, versions, and a connection with a buffer as long as a part or two.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let held = heap::live() - before;
    let (names, buffers) = (held.saturating_sub(2 << 20) / RESOURCES, 9 << 20);
    assert!(names < 130, "{names} bytes a resource");
    assert!(most < held + buffers, "{held} bytes, {most} at most for {} of a state", RESOURCES * BODY);
}
