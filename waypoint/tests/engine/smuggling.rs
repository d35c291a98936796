//! Requests within requests: whatever a client sends, two servers of different make behind the proxy see the same
//! requests, and only those that the proxy has seen.

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::bad_input::corpus;
use crate::lab::{self, Client, Message, Proxy, get};
use crate::peers::{Nginx, free_port};
use crate::raw_h2::{DATA, END_HEADERS, END_STREAM, End, HEADERS, Raw, block, frame, request};

/// A request as a server has understood it: method, target, `Host`, body.
type Reading = (String, String, String, Vec<u8>);

fn reading(message: &Message) -> Reading {
    let mut words = message.head.split(' ');
    let mut word = || words.next().unwrap_or_default().to_owned();
    (word(), word(), message.field("host").unwrap_or_default().to_owned(), message.body.clone())
}

/// A server that writes down what it is asked.
#[derive(Clone)]
struct Witness {
    address: std::net::SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    seen: Arc<Mutex<Vec<Reading>>>,
}

impl Witness {
    async fn start() -> Self {
        let (heads, seen) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<Vec<Reading>>>::default());
        let (writing, all) = (Arc::clone(&seen), Arc::clone(&heads));
        let address = lab::server(move |_, mut client: Client| {
            let (seen, heads) = (Arc::clone(&writing), Arc::clone(&all));
            async move {
                while let Some(request) = client.message().await {
                    seen.lock().unwrap().push(reading(&request));
                    let to_head = request.head.starts_with("HEAD ");
                    heads.lock().unwrap().push(request.head);
                    let body = if to_head { "" } else { "ok" };
                    client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}")).await;
                }
            }
        })
        .await;
        Self { address, heads, seen }
    }

    fn take(&self) -> Vec<Reading> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn heads(&self) -> String {
        std::mem::take(&mut *self.heads.lock().unwrap()).concat()
    }
}

/// HAProxy before a witness.
struct HaProxy {
    address: std::net::SocketAddr,
    child: Child,
    _directory: TempDir,
}

impl HaProxy {
    async fn start(witness: &Witness) -> Option<Self> {
        let (address, directory) = (free_port(), tempfile::tempdir().unwrap());
        let file = directory.path().join("haproxy.cfg");
        let text = format!(
            "defaults\n mode http\n timeout connect 9s\n timeout client 60s\n timeout server 60s\n\
             listen all\n bind {address}\n http-reuse always\n server witness {}\n",
            witness.address
        );
        std::fs::write(&file, text).unwrap();
        let child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            assert!(std::env::var_os("CI_REQUIRE_INTEROP").is_none(), "there is no haproxy");
            return None;
        };
        let haproxy = Self { address, child, _directory: directory };
        for _ in 0..2000 {
            if TcpStream::connect(address).await.is_ok() {
                return Some(haproxy);
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("HAProxy does not listen");
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn nginx(witness: &Witness) -> Nginx {
    let onward = format!(
        "location / {{ proxy_pass http://{}; proxy_http_version 1.1; proxy_set_header Host $http_host; }}",
        witness.address
    );
    Nginx::start(&onward).await
}

/// Sends one request and then a second one on the same connection; what the witness behind it saw.
async fn seen(proxy: &Proxy, witness: &Witness, request: &[u8]) -> Vec<Reading> {
    let mut client = proxy.connect().await;
    let shown = request.escape_ascii();
    for (request, to_head) in [(request, request.starts_with(b"HEAD ")), (get("/marker").as_bytes(), false)] {
        client.send(request).await;
        let head = client.head().await.unwrap_or_else(|| panic!("no response to {shown}"));
        client.body(head, to_head).await.unwrap_or_else(|| panic!("half a response to {shown}"));
    }
    witness.take()
}

#[tokio::test]
async fn two_servers_read_what_is_passed_on_as_the_proxy_does() {
    let witness = Witness::start().await;
    let nginx = nginx(&witness).await;
    let Some(haproxy) = HaProxy::start(&witness).await else {
        eprintln!("skipped: there is no haproxy");
        return;
    };
    let direct = Proxy::to(witness.address).await;
    let (by_nginx, by_haproxy) = (Proxy::to(nginx.address).await, Proxy::to(haproxy.address).await);
    let (mut tried, mut read_by_both) = (0, 0);
    for (_, request, line) in corpus().into_iter().filter(|(status, ..)| *status == 200) {
        let meant = seen(&direct, &witness, &request).await;
        assert_eq!(meant.len(), 2, "{line}: {meant:?}");
        assert_eq!(meant[1].1, "/marker", "{line}");
        let mut both = true;
        for (name, proxy) in [("nginx", &by_nginx), ("HAProxy", &by_haproxy)] {
            let read = seen(proxy, &witness, &request).await;
            // A server may refuse what it doesn't like. It never sees anything else.
            assert!(read == meant || read == meant[1..], "{line}: {name} read {read:?}, not {meant:?}");
            both &= read == meant;
        }
        tried += 1;
        read_by_both += usize::from(both);
    }
    assert!(tried >= 30 && read_by_both * 10 >= tried * 8, "{read_by_both} of {tried} were read by both");
}

const INJECTED: (&[u8], &[u8]) = (b"x-injected", b"1");

/// What a client of HTTP/2 may try to say in fields on a connection of HTTP/1.1. None of it is passed on.
fn odd_fields() -> Vec<Vec<u8>> {
    let more: [&[(&[u8], &[u8])]; 22] = [
        &[(b"x", b"y\r\nx-injected: 1")],
        &[(b"x", b"y\nx-injected: 1")],
        &[(b"x", b"y\rx-injected: 1")],
        &[(b"x", b"y\0x-injected: 1")],
        &[(b"x", b"y\r\n\r\nGET /injected HTTP/1.1\r\nhost: a\r\n\r\n")],
        &[(b"x: y\r\nx-injected", b"1")],
        &[(b"x-injected ", b"1")],
        &[(b"x-injected:", b"1")],
        &[(b"", b"x-injected")],
        &[(b"X-Injected", b"1")],
        &[(b"transfer-encoding", b"chunked"), (b"x-injected", b"1")],
        &[(b"transfer-encoding", b"identity"), (b"x-injected", b"1")],
        &[(b"connection", b"content-length"), (b"x-injected", b"1")],
        &[(b"keep-alive", b"x"), (b"x-injected", b"1")],
        &[(b"upgrade", b"websocket"), (b"x-injected", b"1")],
        &[(b"te", b"chunked"), (b"x-injected", b"1")],
        &[(b"content-length", b"1"), (b"content-length", b"2"), (b"x-injected", b"1")],
        &[(b"content-length", b"+1"), (b"x-injected", b"1")],
        &[(b"host", b"b"), (b"x-injected", b"1")],
        &[(b":path", b"/second"), (b"x-injected", b"1")],
        &[(b":unknown", b"1"), (b"x-injected", b"1")],
        &[(b"cookie", b"a=b\r\nx-injected: 1"), (b"cookie", b"c=d")],
    ];
    let blocks = more.iter().map(|more| request("POST", "/", more));
    // Pseudo fields after others, and none at all.
    let late: [(&[u8], &[u8]); 5] =
        [INJECTED, (b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")];
    blocks.chain([block(&late), block(&[INJECTED])]).collect()
}

/// The same in the request line.
fn odd_targets() -> Vec<Vec<u8>> {
    let mut blocks = Vec::new();
    for (method, scheme, authority, path) in [
        ("GET / HTTP/1.1\r\nx-injected: 1\r\n\r\n", "http", "a", "/"),
        ("GET /injected HTTP/1.1\r\n", "http", "a", "/"),
        ("G T", "http", "a", "/"),
        ("", "http", "a", "/"),
        ("GET", "http", "a", "/ HTTP/1.1\r\nx-injected: 1"),
        ("GET", "http", "a", "/a b"),
        ("GET", "http", "a", "/a\tb"),
        ("GET", "http", "a", "/a\0"),
        ("GET", "http", "a", "/#injected"),
        ("GET", "http", "a", ""),
        ("GET", "http", "a", "injected"),
        ("GET", "http", "a", "http://b/injected"),
        ("GET", "http", "a", "*"),
        ("GET", "http", "a", "?injected"),
        ("GET", "http", "a\r\nx-injected: 1", "/"),
        ("GET", "http", "a b", "/"),
        ("GET", "http", "u@a", "/"),
        ("GET", "http", "a/injected", "/"),
        ("GET", "http", "", "/"),
        ("GET", "http://b/injected?", "a", "/"),
        ("CONNECT", "http", "a", "/"),
    ] {
        let pseudo: [(&[u8], &[u8]); 4] = [
            (b":method", method.as_bytes()),
            (b":scheme", scheme.as_bytes()),
            (b":authority", authority.as_bytes()),
            (b":path", path.as_bytes()),
        ];
        // A fragment is no part of what is sent: without it that is a request.
        let more = if path.contains('#') { None } else { Some(INJECTED) };
        blocks.push(block(&pseudo.into_iter().chain(more).collect::<Vec<_>>()));
    }
    blocks
}

#[tokio::test]
async fn nothing_that_http1_could_misread_comes_from_http2() {
    let witness = Witness::start().await;
    let proxy = Proxy::to(witness.address).await;
    for fields in odd_fields().into_iter().chain(odd_targets()) {
        let shown = fields.escape_ascii();
        let mut client = Raw::connect(&proxy, &[]).await;
        client.send(&frame(HEADERS, END_HEADERS, 1, &fields)).await;
        client.send(&frame(DATA, END_STREAM, 1, b"x")).await;
        client.end_of(1).await;
        let heads = witness.heads();
        assert!(!heads.to_ascii_lowercase().contains("injected"), "{shown} became {heads}");
        witness.take();
        // The connection to the server, if there is one, is where it should be.
        assert_eq!(
            Raw::connect(&proxy, &[]).await.ask(1, &request("GET", "/marker", &[])).await,
            End::Answered
        );
        let read = witness.take();
        assert_eq!(read, [("GET".into(), "/marker".into(), "a".into(), vec![])], "after {shown}");
        witness.heads();
    }
}

#[tokio::test]
async fn the_length_of_a_stream_is_what_it_says_or_it_is_none() {
    let witness = Witness::start().await;
    let proxy = Proxy::to(witness.address).await;
    // Longer, shorter, without a body, and a trailer that says another length.
    let length: &[(&[u8], &[u8])] = &[(b"content-length", b"5")];
    let said = |stream| frame(HEADERS, END_HEADERS, stream, &request("POST", "/bad", length));
    let trailers =
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[(b"content-length", b"9"), (b"x-late", b"1")]));
    for (frames, whole) in [
        (
            [said(1), frame(DATA, END_STREAM, 1, b"12345GET /injected HTTP/1.1\r\nHost: a\r\n\r\n")].concat(),
            false,
        ),
        ([said(1), frame(DATA, END_STREAM, 1, b"123")].concat(), false),
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, &request("POST", "/bad", length)), false),
        ([said(1), frame(DATA, 0, 1, b"12345"), trailers].concat(), true),
    ] {
        let mut client = Raw::connect(&proxy, &[]).await;
        client.send(&frames).await;
        let end = client.end_of(1).await;
        let read = witness.take();
        if whole {
            assert_eq!(
                (end, &read[..]),
                (End::Answered, &[("POST".into(), "/bad".into(), "a".into(), b"12345".to_vec())][..])
            );
        } else {
            assert!(read.is_empty(), "{end:?} {read:?}");
        }
        assert!(!witness.heads().contains("x-late"), "trailers are no fields of a request of HTTP/1.1");
        assert_eq!(proxy.connect().await.ask(get("/marker")).await.status(), 200);
        assert_eq!(witness.take().len(), 1);
    }
}

/// An endpoint may answer before it has read the request. As long as any of that waits to be sent, the next request is not to be sent
/// on its connection: its head would get into the body, and what of the body is left would be read as a request.
#[tokio::test]
async fn no_request_is_sent_into_the_body_of_one_that_was_answered_early() {
    const STEP: usize = 48 << 10;
    // Of some length the last part waits in the proxy, whatever the system takes on the way.
    let lengths = (1..96).map(|steps| steps * STEP);
    let checks: Vec<_> = lengths.map(|length| tokio::spawn(answered_early(length))).collect();
    for check in checks {
        check.await.unwrap();
    }
}

async fn answered_early(length: usize) {
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&heads);
    let server = lab::server(move |_, mut end: Client| {
        let seen = Arc::clone(&seen);
        async move {
            while let Some(head) = end.head().await {
                let is_early = head.starts_with("POST /early ");
                seen.lock().unwrap().push(head);
                if is_early {
                    // All that the proxy can send is on its way by then.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                end.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
                if is_early {
                    // The next request has come to the proxy by then.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    if end.exactly(length).await.is_none() {
                        return;
                    }
                }
            }
        }
    })
    .await;
    let proxy = Proxy::to(server).await;
    let head = format!("POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    let request = [head.into_bytes(), vec![b'x'; length]].concat();
    let stream = TcpStream::connect(proxy.address).await.unwrap().into_std().unwrap();
    let mut writing = TcpStream::from_std(stream.try_clone().unwrap()).unwrap();
    // Of a long one the proxy does not take all.
    let sending = tokio::spawn(async move { writing.write_all(&request).await });
    let mut early = Client::new(TcpStream::from_std(stream).unwrap());
    assert_eq!(early.message().await.unwrap().status(), 200);
    let next = proxy.connect().await.ask(get("/next")).await;
    assert_eq!(next.status(), 200, "{length}");
    sending.abort();
    for head in heads.lock().unwrap().iter() {
        assert!(
            ["POST /early ", "GET /next "].iter().any(|start| head.starts_with(start)),
            "{length}: {head}"
        );
    }
}
