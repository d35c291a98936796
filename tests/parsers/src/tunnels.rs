//! What peers send over HBONE.

use std::sync::{Arc, Mutex};

use hbone::{
    Authority, Baggage, ConnectRequest, Connector, Control, Forwarded, Pool, PoolSettings, ServerSettings,
    TunnelHeaders, serve,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::{seeds_of, text};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Any text is a destination that reads back as it is written, or an error.
pub(crate) fn authority(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    if let Ok(authority) = Authority::parse(text) {
        assert_eq!(Authority::parse(&authority.to_string()), Ok(authority));
    }
}

pub(crate) fn authorities() -> Vec<Vec<u8>> {
    seeds_of(&["10.0.0.1:80", "[fd00::1]:8080", "cart.shop.svc.cluster.local:443", "[::ffff:10.0.0.1]:1"])
}

/// Any text is baggage and a forwarded header that read back as they are written, or none.
pub(crate) fn headers(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    if let Some(baggage) = Baggage::parse(text)
        && let Some(value) = baggage.encode()
    {
        assert_eq!(Baggage::parse(value.to_str().expect("encoded as text")), Some(baggage));
    }
    if let Some(forwarded) = Forwarded::parse(text) {
        // A host that a header can't hold is left out.
        if let Some(again) = forwarded.encode().and_then(|value| Forwarded::parse(value.to_str().ok()?)) {
            assert_eq!(again.client, forwarded.client);
        }
    }
}

pub(crate) fn header_values() -> Vec<Vec<u8>> {
    seeds_of(&[
        "k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,service.version=v1,cloud.region=r",
        "service.instance.id=a%20b;x=y, k8s.cluster.name=c",
        "for=10.0.0.7;by=\"[fd00::1]:15008\";host=cart.shop;proto=http",
        "for=\"[2001:db8::1]:4711\"",
    ])
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a seed is short");
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A header block without compression: literal fields, no index.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for part in [name, value] {
            bytes.push(u8::try_from(part.len()).expect("a seed is short"));
            bytes.extend_from_slice(part.as_bytes());
        }
    }
    bytes
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(future)
}

/// Any bytes after the preface end a server's connection with a reason.
pub(crate) fn server(bytes: &[u8]) {
    block_on(async {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let served = tokio::spawn(async move {
            let handler = |incoming: hbone::Incoming| drop(incoming.accept(&TunnelHeaders::default()));
            serve(server, &ServerSettings::default(), &Control::default(), &Arc::default(), handler).await
        });
        let _ = client.write_all(PREFACE).await;
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        served.await.expect("it panicked");
    });
}

pub(crate) fn client_frames() -> Vec<Vec<u8>> {
    let connect = block(&[
        (":method", "CONNECT"),
        (":authority", "10.0.0.1:80"),
        ("baggage", "k8s.namespace.name=shop"),
        ("forwarded", "for=10.0.0.7"),
    ]);
    let settings = frame(4, 0, 0, &[0, 3, 0, 0, 0, 100, 0, 4, 0, 1, 0, 0]);
    let open = frame(1, 4, 1, &connect);
    let data = frame(0, 0, 1, b"hello");
    let rest = [frame(8, 0, 0, &[0, 0, 16, 0]), frame(6, 0, 0, &[7; 8]), frame(0, 1, 1, b"")].concat();
    let split = [frame(1, 0, 1, &connect[..9]), frame(9, 4, 1, &connect[9..])].concat();
    vec![
        [settings.clone(), open.clone(), data, rest].concat(),
        [settings.clone(), open, frame(3, 0, 1, &[0, 0, 0, 8]), frame(7, 0, 0, &[0; 8])].concat(),
        [settings, split].concat(),
    ]
}

/// Hands out the one end of a pipe, once.
struct Once(Mutex<Option<DuplexStream>>);

impl Connector for Once {
    type Key = ();
    type Io = DuplexStream;
    type Peer = ();
    type Error = std::io::Error;

    async fn connect(&self, (): &()) -> std::io::Result<(DuplexStream, ())> {
        let taken = self.0.lock().ok().and_then(|mut io| io.take());
        taken.map(|io| (io, ())).ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into())
    }
}

/// Any bytes from a server are an answer or an error, and a tunnel over them ends.
pub(crate) fn client(bytes: &[u8]) {
    block_on(async {
        let (client, mut server) = tokio::io::duplex(1 << 20);
        let pool =
            Pool::new(Once(Mutex::new(Some(client))), PoolSettings { spread: 1, ..PoolSettings::default() });
        let _ = server.write_all(bytes).await;
        let _ = server.shutdown().await;
        let authority = Authority::parse("10.0.0.1:80").expect("it is one");
        let request = ConnectRequest { authority, headers: TunnelHeaders::default() };
        if let Ok(opened) = pool.open(&(), &request).await {
            let (mut read, mut write) = tokio::io::split(opened.tunnel);
            let _ = write.write_all(b"hello").await;
            let _ = write.shutdown().await;
            let mut got = Vec::new();
            let _ = read.read_to_end(&mut got).await;
        }
    });
}

pub(crate) fn server_frames() -> Vec<Vec<u8>> {
    let settings = [frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]), frame(4, 1, 0, &[])].concat();
    let ok = frame(1, 4, 1, &block(&[(":status", "200"), ("baggage", "service.name=cart")]));
    let refused = frame(1, 5, 1, &block(&[(":status", "403"), ("x", "y")]));
    let window = frame(8, 0, 1, &[0, 0, 16, 0]);
    vec![
        [settings.clone(), ok.clone(), window, frame(0, 1, 1, b"hello")].concat(),
        [settings.clone(), refused].concat(),
        [settings.clone(), frame(7, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0])].concat(),
        [settings, ok, frame(3, 0, 1, &[0, 0, 0, 2])].concat(),
    ]
}
