//! Ways past what is refused: the same thing written in another way, fields sent twice, requests behind others, switches of
//! protocols. Each is tried on a connection of its own, as it is, and the server says what has arrived.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::lab::{Lab, free, limits};

const DENY: &str = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: DENY
  rules:
  - to: [{operation: {paths: [/admin*]}}]
  - to: [{operation: {hosts: [admin.example]}}]
  - to: [{operation: {methods: [DELETE]}}]
  - when: [{key: 'request.headers[x-role]', values: [admin]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: ALLOW
  rules:
  - to: [{operation: {notPaths: [/members*]}}]
  - when: [{key: 'request.headers[x-member]', values: ['yes']}]
";

impl Lab {
    /// Sends bytes, and no more; all that comes until a second has passed without any, or the end.
    async fn tell(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut all = Vec::new();
        while let Ok(Ok(1..)) = tokio::time::timeout(Duration::from_secs(1), stream.read_buf(&mut all)).await
        {
        }
        String::from_utf8_lossy(&all).into_owned()
    }

    /// The status of a request that ends its connection.
    async fn status(&self, line: &str, host: &str, fields: &str) -> u16 {
        let text = format!("{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{fields}\r\n");
        let answer = self.tell(text.as_bytes()).await;
        answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("an answer")
    }
}

#[tokio::test]
async fn what_is_refused_is_refused_however_it_is_written() {
    let lab = Lab::with(free(), free(), DENY).await;
    for path in [
        "/admin",
        "/%61dmin",
        "/./admin",
        "/a/../admin",
        "/a/%2e%2e/admin",
        "/a\\..\\admin",
        "/%2E/admin",
        "/admin;x",
        "/admin%2f",
        "/admin?x",
        "http://shop.example/admin",
        "http://b/a/../admin?x",
    ] {
        assert_eq!(lab.status(&format!("GET {path}"), "shop.example", "").await, 403, "{path}");
    }
    for host in [
        "admin.example",
        "ADMIN.Example",
        "admin.example:80",
        "admin.example.",
        "admin.example.:443",
        "admin.example:",
    ] {
        assert_eq!(lab.status("GET /", host, "").await, 403, "{host}");
    }
    // The target's authority is the request's, whatever Host says.
    assert_eq!(lab.status("GET http://admin.example/", "shop.example", "").await, 403);
    assert_eq!(lab.status("GET http://shop.example/", "admin.example", "").await, 200);
    assert_eq!(lab.status("DELETE /", "shop.example", "").await, 403);
    for fields in [
        "x-role: admin\r\n",
        "X-ROLE:admin \r\n",
        "x-role: \tadmin\t\r\n",
        "x-role: admin\r\nx-role: user\r\n",
        "x-role: user\r\nx-role: admin\r\n",
        "x-role: user, admin\r\n",
        "x-role: admin,\r\n",
    ] {
        assert_eq!(lab.status("GET /", "shop.example", fields).await, 403, "{fields}");
    }
    for (fields, wanted) in [
        ("x-member: yes\r\n", 200),
        ("", 403),
        ("x-member: no\r\nx-member: yes\r\n", 403),
        ("x-member: yes\r\nx-member: no\r\n", 403),
        // What is of this connection only is neither seen nor sent on.
        ("x-member: yes\r\nconnection: x-member\r\n", 403),
    ] {
        assert_eq!(lab.status("GET /members", "shop.example", fields).await, wanted, "{fields}");
    }
    for (line, fields) in
        [("GET /", ""), ("GET /", "x-role: user\r\n"), ("GET /a", "x-role: administrator\r\n")]
    {
        assert_eq!(lab.status(line, "shop.example", fields).await, 200, "{line} {fields}");
    }
}

#[tokio::test]
async fn each_request_of_a_connection_is_decided_and_none_hides_in_another() {
    let lab = Lab::with(free(), free(), DENY).await;
    let host = "Host: shop.example\r\n";
    let statuses = |text: &str| text.matches("HTTP/1.1 403").count();
    // In a row: the second is let through, and the third is refused again.
    let row = format!(
        "GET /admin HTTP/1.1\r\n{host}\r\nGET /ok HTTP/1.1\r\n{host}\r\nGET /admin HTTP/1.1\r\n{host}\r\n"
    );
    let answer = lab.tell(row.as_bytes()).await;
    assert_eq!((statuses(&answer), answer.contains("GET /ok ")), (2, true), "{answer}");
    // In the body of one that is refused, or that waits to send it: dropped where all of it has come, else not read on.
    let hidden = format!("GET /ok HTTP/1.1\r\n{host}\r\n");
    let chunks = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    for (more, body, ends) in [
        (format!("Content-Length: {}\r\n", hidden.len()), &hidden, false),
        ("Transfer-Encoding: chunked\r\n".into(), &chunks, false),
        (format!("Expect: 100-continue\r\nContent-Length: {}\r\n", hidden.len()), &hidden, false),
        ("Expect: 100-continue\r\nContent-Length: 9999\r\n".into(), &hidden, true),
        // Of what is wrong nobody knows where it ends.
        ("Transfer-Encoding: chunked\r\n".into(), &hidden, true),
        (format!("Content-Length: 3\r\nContent-Length: {}\r\n", hidden.len()), &hidden, true),
    ] {
        let answer = lab.tell(format!("POST /admin HTTP/1.1\r\n{host}{more}\r\n{body}").as_bytes()).await;
        let answers = answer.matches("HTTP/1.1 ").count();
        assert!(answers == 1 && !answer.contains("GET /ok"), "{more}: {answer}");
        assert_eq!(answer.contains("connection: close"), ends, "{more}: {answer}");
        // And what comes after it is one of its own.
        let after = format!("GET /admin HTTP/1.1\r\n{host}\r\n");
        let answer =
            lab.tell(format!("POST /admin HTTP/1.1\r\n{host}{more}\r\n{body}{after}").as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), if ends { 1 } else { 2 }, "{more}: {answer}");
    }
    // Behind a switch that is none: to HTTP/2, and to one that the server does not make.
    for protocol in ["h2c", "websocket", "HTTP/1.1", "TLS/1.2"] {
        let switch = format!(
            "GET /ok HTTP/1.1\r\n{host}Connection: Upgrade\r\nUpgrade: {protocol}\r\n\r\nGET /admin HTTP/1.1\r\n{host}\r\n"
        );
        let answer = lab.tell(switch.as_bytes()).await;
        assert!(statuses(&answer) == 1 && answer.contains("GET /ok "), "{protocol}: {answer}");
        assert!(!answer.contains("GET /admin"), "{protocol}: {answer}");
    }
    // In a field of the end.
    let late =
        format!("POST /ok HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\r\nx-role: admin\r\n\r\n");
    let answer = lab.tell(late.as_bytes()).await;
    assert!(!answer.contains("x-role"), "{answer}");
}

/// Takes connections and says nothing.
async fn silent() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(connection) = listener.accept().await {
            held.push(connection);
        }
    });
    address
}

#[tokio::test]
async fn a_rate_limit_service_that_is_slow_does_as_the_resource_says() {
    for (on_failure, wanted) in [("Deny", 500), ("Allow", 200)] {
        let spec = format!(
            "
  global: {{service: authz.example, port: 80, domain: shop, timeout: 100ms, onFailure: {on_failure}}}
  limits: [{{name: all, by: [{{type: Path}}], global: {{}}}}]
"
        );
        let lab = Lab::with(silent().await, free(), &limits(&spec)).await;
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, wanted, "{on_failure}");
        assert_eq!(lab.guards.limits.stats().failed.get(), 1);
    }
}

/// A VirtualService of so many routes, of which the last one names the version.
fn routes(count: usize, version: u32) -> String {
    let mut text = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
"
    .to_owned();
    for n in 0..count {
        let version = if n + 1 == count { version } else { 0 };
        text.push_str(&format!(
            "  - match: [{{uri: {{exact: /r/{n}}}}}]
    headers: {{response: {{set: {{x-version: v{version}}}}}}}
    route: [{{destination: {{host: shop.example}}}}]
"
        ));
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_routes_are_exchanged_under_load_and_no_request_fails() {
    let lab = std::sync::Arc::new(Lab::with(free(), free(), "").await);
    lab.put("routes.yaml", &routes(10_000, 1));
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let asking: Vec<_> = (0..4)
        .map(|_| {
            let (lab, done) = (lab.clone(), done.clone());
            tokio::spawn(async move {
                let (mut asked, mut last) = (0, 1);
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    let (status, head, body) = lab.ask("GET", "/r/9999", &[], "").await;
                    assert_eq!(status, 200, "{head} {body}");
                    let version = head.split("x-version: v").nth(1).expect("a version");
                    let version: u32 = version.lines().next().unwrap().parse().unwrap();
                    assert!(version >= last, "{version} after {last}");
                    (asked, last) = (asked + 1, version);
                }
                asked
            })
        })
        .collect();
    for version in 2..=4 {
        let (changing, text) = (lab.clone(), routes(10_000, version));
        tokio::task::spawn_blocking(move || changing.put("routes.yaml", &text)).await.unwrap();
    }
    let (_, head, _) = lab.ask("GET", "/r/9999", &[], "").await;
    assert!(head.contains("x-version: v4"), "{head}");
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    for asking in asking {
        assert!(asking.await.unwrap() > 0);
    }
}
