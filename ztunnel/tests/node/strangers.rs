//! Whoever knocks on port 15008: what is no HBONE, and who is no member of the mesh. They are refused with a
//! reason in the log, and members are served all the while.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use harness::netns::{Host, root_or_skip};
use rcgen::{CertificateParams, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::lab::peer::{Certificate, Http2, authority, member, proper, secure, sign, stranger};
use crate::lab::traffic::{PORT, ask, dial, serve};
use crate::lab::{Mesh, PATIENCE};

const MEMBER: &str = "spiffe://cluster.local/ns/shop/sa/member";

async fn mesh() -> Mesh {
    Mesh::start(&[("a", &["client", "outside/old"]), ("b", &["web", "near"])]).await
}

fn hbone(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.pod("web").ipv4.into(), 15008)
}

async fn is_served(mesh: &Mesh) {
    let to = SocketAddr::new(mesh.pod("web").ipv4.into(), PORT);
    assert_eq!(ask(mesh.pod("client"), to).await.unwrap().server, "web");
}

/// Whatever comes from the peer until it ends the connection.
async fn rest(mut stream: impl tokio::io::AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await??;
    Ok(bytes)
}

#[tokio::test]
async fn what_is_no_tls_is_told_apart_and_refused() {
    if !root_or_skip("protocols on 15008") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let mut random = vec![0; 100_000];
    let mut state = 1_u64;
    for byte in &mut random {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    let endless = [&[22, 3, 1, 0x40, 0][..], &random[..60_000]].concat();
    for (bytes, reason) in [
        (&b"GET / HTTP/1.1\r\nhost: web\r\n\r\n"[..], "HTTP/1 in plaintext"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", "HTTP/2 in plaintext"),
        (b"CONNECT web:80 HTTP/1.1\r\n\r\n", "HTTP/1 in plaintext"),
        (&random, "TLS handshake"),
        (&endless, "TLS handshake"),
        (b"", "closed the connection during the handshake"),
        (b"\x16\x03\x01", "closed the connection during the handshake"),
    ] {
        let before = mesh.ztunnel("b").metric("culvert_tls_handshakes_failed_total").await;
        let mut stream = dial(mesh.pod("old"), hbone(&mesh)).await.unwrap();
        // The other side may hang up before all is sent.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let _ = rest(stream).await;
        crate::lab::eventually("the failure is counted", async || {
            mesh.ztunnel("b").metric("culvert_tls_handshakes_failed_total").await == before + 1.0
        })
        .await;
        mesh.ztunnel("b").says(&["error", "TLS handshake with", reason]).await;
        is_served(&mesh).await;
    }
}

/// Certificates that are not as they should be, and what the log says of each.
fn impostors(mesh: &Mesh) -> Vec<(&'static str, Option<Certificate>, &'static str)> {
    let own = authority(mesh);
    let changed = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = proper(MEMBER);
        change(&mut params);
        Some(sign(&params, &own))
    };
    let now = time::OffsetDateTime::now_utc();
    let hour = Duration::from_secs(3600);
    let dns = || SanType::DnsName("web.example".try_into().unwrap());
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    vec![
        ("none", None, "no certificate"),
        ("expired", changed(&|p| (p.not_before, p.not_after) = (now - 2 * hour, now - hour)), "expired"),
        ("not yet valid", changed(&|p| p.not_before = now + hour), "not valid before"),
        ("foreign CA", Some(sign(&proper(MEMBER), &stranger())), "no root of the trust bundle"),
        ("no name", changed(&|p| p.subject_alt_names.clear()), "SPIFFE"),
        ("a DNS name", changed(&|p| p.subject_alt_names = vec![dns()]), "SPIFFE"),
        (
            "two names",
            changed(&|p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/x/sa/y"))),
            "2 URIs",
        ),
        (
            "no SPIFFE ID",
            changed(&|p| p.subject_alt_names = vec![uri("https://cluster.local/ns/a/sa/b")]),
            "SPIFFE",
        ),
        (
            "wrong trust domain",
            changed(&|p| p.subject_alt_names = vec![uri("spiffe://elsewhere.example/ns/shop/sa/member")]),
            "trust domain",
        ),
        ("for servers only", changed(&|p| drop(p.extended_key_usages.pop())), "may not be used here"),
    ]
}

#[tokio::test]
async fn who_is_no_member_is_refused_with_the_reason() {
    if !root_or_skip("certificates on 15008") {
        return;
    }
    let mesh = mesh().await;
    let _server = serve(mesh.pod("web"), PORT);
    let own = member(&mesh, MEMBER);
    let impostors = impostors(&mesh);
    let mut cases: Vec<(&str, Option<&Certificate>, &[&str], &str)> =
        impostors.iter().map(|(name, c, reason)| (*name, c.as_ref(), &["h2"][..], *reason)).collect();
    cases.push(("no ALPN", Some(&own), &[], "did not agree on the protocol h2"));
    cases.push(("wrong ALPN", Some(&own), &["http/1.1", "h3"], "did not agree on the protocol h2"));
    let mut missing = Vec::new();
    for (name, certificate, alpn, reason) in cases {
        let shown = mesh.ztunnel("b").log().len();
        let refused = match secure(mesh.pod("old"), hbone(&mesh), certificate, alpn).await {
            Ok(stream) => rest(stream).await.map(drop),
            Err(error) => Err(error),
        };
        assert!(refused.is_err(), "{name}: not refused with an alert");
        let said = crate::lab::within(Duration::from_secs(5), async || {
            let log = mesh.ztunnel("b").log();
            log[shown..].lines().any(|line| line.contains("TLS handshake with") && line.contains(reason))
        });
        if !said.await {
            missing.push((name, mesh.ztunnel("b").log()[shown..].to_owned()));
        }
        is_served(&mesh).await;
    }
    assert!(missing.is_empty(), "the log does not say why: {missing:#?}");
    // The same with nothing wrong.
    secure(mesh.pod("old"), hbone(&mesh), Some(&own), &["http/1.1", "h2"]).await.unwrap();
}

#[tokio::test]
async fn a_tunnel_leads_to_its_own_pods_application_and_nowhere_else() {
    if !root_or_skip("CONNECT") {
        return;
    }
    let mesh = mesh().await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("near"), PORT)];
    let mut peer = Http2::begin(&mesh, mesh.pod("old"), hbone(&mesh), MEMBER).await.unwrap();
    let (web, near) = (mesh.pod("web").ipv4, mesh.pod("near").ipv4);
    let connect = |authority: &str| crate::lab::peer::connect(authority);
    let mut cases: Vec<(String, Vec<u8>)> = [
        format!("{near}:{PORT}"),
        format!("{}:{PORT}", mesh.node("b").ipv4),
        format!("127.0.0.1:{PORT}"),
        "198.51.100.7:80".to_owned(),
        format!("[{}]:{PORT}", mesh.pod("near").ipv6),
        format!("{web}:15001"),
        format!("{web}:15006"),
        format!("{web}:15008"),
        format!("{web}:15053"),
        format!("web.shop.svc.cluster.local:{PORT}"),
        format!("{web}"),
        format!("{web}:0"),
        format!("{web}:70000"),
        format!("user@{web}:{PORT}"),
    ]
    .map(|authority| (authority.clone(), connect(&authority)))
    .into();
    let get = [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "web")];
    cases.push(("GET".to_owned(), crate::lab::peer::block(&get)));
    let mut stream = 1;
    for (name, headers) in &cases {
        peer.send(crate::lab::peer::HEADERS, crate::lab::peer::END_HEADERS, stream, headers).await.unwrap();
        let answer = peer.answer_of(stream).await.unwrap();
        let refused = answer.status() == Some(0x8c) || answer.kind == crate::lab::peer::RST_STREAM;
        assert!(refused, "{name}: {answer:?}");
        stream += 2;
        // The connection goes on.
        let ours = connect(&format!("{web}:{PORT}"));
        peer.send(crate::lab::peer::HEADERS, crate::lab::peer::END_HEADERS, stream, &ours).await.unwrap();
        let answer = peer.answer_of(stream).await.unwrap();
        assert_eq!(answer.status(), Some(0x88), "after {name}: {answer:?}");
        stream += 2;
    }
    for reason in [format!("CONNECT to {near}:{PORT}, and this is {web}"), "CONNECT to port 15006".to_owned()]
    {
        mesh.ztunnel("b").says(&[&reason]).await;
    }
    is_served(&mesh).await;
}

/// Peers that connect, and say nothing or half of it.
async fn silent(from: &Host, to: SocketAddr, number: usize) -> Vec<tokio::net::TcpStream> {
    let mut streams = Vec::new();
    for n in 0..number {
        let mut stream = dial(from, to).await.unwrap();
        if n % 4 == 0 {
            stream.write_all(b"\x16\x03\x01\x02\x00\x01").await.unwrap();
        }
        streams.push(stream);
    }
    streams
}

#[tokio::test]
async fn thousands_of_silent_peers_keep_nobody_waiting() {
    if !root_or_skip("slow handshakes") {
        return;
    }
    let mesh = mesh().await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("near"), PORT)];
    let silent = silent(mesh.pod("old"), hbone(&mesh), 4000).await;
    // A new connection, with a handshake of its own.
    is_served(&mesh).await;
    // And another pod of the node.
    let near = SocketAddr::new(mesh.pod("near").ipv4.into(), PORT);
    assert_eq!(ask(mesh.pod("client"), near).await.unwrap().server, "near");
    for mut stream in silent {
        let _ = timeout(PATIENCE, stream.read(&mut [0; 100])).await.expect("a silent peer is still there");
    }
    let kb = mesh.ztunnel("b").resident_kb();
    assert!(kb < 200_000, "{kb} kB are resident");
    is_served(&mesh).await;
}
