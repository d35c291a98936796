//! What is told of requests and connections, over real connections: response flags as Envoy has them, each provoked; entries
//! for a service that takes access logs (`checks/`, of Envoy's own messages); why each of them went as it did.

use std::net::SocketAddr;
use std::time::Duration;

use process::metrics::Format as TextFormat;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use waypoint::http::Settings;

use crate::lab::{LONG, Lab, VIP, checks, custom, echo, external, free, limits, mesh_config};

impl Lab {
    /// Sends these bytes on a connection of its own, and reads until it ends or has all of a response without a body; the
    /// status.
    async fn send(&self, text: &str) -> u16 {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await.expect("an answer").unwrap();
        let all = String::from_utf8_lossy(&all).into_owned();
        all.split(' ').nth(1).unwrap_or("0").parse().unwrap()
    }

    async fn get(&self, path: &str, id: &str) -> u16 {
        let text = format!(
            "GET {path} HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: {id}\r\nConnection: close\r\n\r\n"
        );
        self.send(&text).await
    }

    /// The log line of a request.
    async fn line(&self, id: &str) -> Value {
        let begin = tokio::time::Instant::now();
        loop {
            assert!(self.writer.flush(Duration::from_secs(10)));
            let text = String::from_utf8(self.kept.0.lock().unwrap().clone()).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            if let Some(line) = lines.into_iter().find(|line| line["request_id"] == id) {
                return line;
            }
            assert!(begin.elapsed() < LONG, "no line of {id} in\n{text}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The record of a request.
    fn why(&self, id: &str) -> Value {
        let all = self.deciding.telemetry().recent().dump();
        let mut found = all["requests"].as_array().unwrap().iter().filter(|r| r["request_id"] == id);
        found.next_back().unwrap_or_else(|| panic!("no record of {id} in {all:#}")).clone()
    }

    fn metrics(&self) -> String {
        self.registry.encode(TextFormat::Prometheus)
    }

    /// The value of the one sample whose name and labels hold all of `parts`.
    fn sample(&self, parts: &[&str]) -> Option<String> {
        let text = self.metrics();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let mut found = samples.filter(|line| parts.iter().all(|part| line.contains(part)));
        let value = found.next().and_then(|line| line.rsplit(' ').next()).map(str::to_owned);
        assert_eq!(found.next(), None, "{parts:?}");
        value
    }

    async fn until(&self, parts: &[&str], wanted: &str) {
        let begin = tokio::time::Instant::now();
        while self.sample(parts).as_deref() != Some(wanted) {
            assert!(begin.elapsed() < LONG, "{parts:?} is {:?}, not {wanted}", self.sample(parts));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A server that reads a request and then sends `answer`, and ends unless it is to hang.
async fn server(answer: &'static [u8], hang: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut seen = vec![0; 4096];
                let _ = stream.read(&mut seen).await;
                let _ = stream.write_all(answer).await;
                if hang {
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    address
}

fn hidden(name: &str, place: u8, to: SocketAddr) -> String {
    external(name, &format!("240.240.0.{place}"), "http", to)
        .replace("use-waypoint: waypoint", "use-waypoint: none")
}

/// Routes that end in all the ways that a request can.
const ENDINGS: &str = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
  - {name: ok, match: [{uri: {prefix: /ok}}], route: [{destination: {host: shop.example}}]}
  - {match: [{uri: {prefix: /limited}}], route: [{destination: {host: shop.example}}]}
  - {match: [{uri: {prefix: /ask}}], route: [{destination: {host: shop.example}}]}
  - match: [{uri: {prefix: /delay}}]
    fault: {delay: {fixedDelay: 1ms, percentage: {value: 100}}}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /abort}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /both}}]
    fault: {delay: {fixedDelay: 1ms, percentage: {value: 100}}, abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /slow}}]
    timeout: 50ms
    retries: {attempts: 0}
    route: [{destination: {host: slow.example}}]
  - match: [{uri: {prefix: /try}}]
    retries: {attempts: 1, perTryTimeout: 20ms, retryOn: 5xx}
    route: [{destination: {host: slow.example}}]
  - {match: [{uri: {prefix: /gone}}], retries: {attempts: 0}, route: [{destination: {host: gone.example}}]}
  - match: [{uri: {prefix: /again}}]
    retries: {attempts: 2, retryOn: connect-failure}
    route: [{destination: {host: gone.example}}]
  - {match: [{uri: {prefix: /empty}}], route: [{destination: {host: empty.example}}]}
  - {match: [{uri: {prefix: /subset}}], route: [{destination: {host: shop.example, subset: none}}]}
  - {match: [{uri: {prefix: /close}}], retries: {attempts: 0}, route: [{destination: {host: close.example}}]}
  - {match: [{uri: {prefix: /garbage}}], retries: {attempts: 0}, route: [{destination: {host: garbage.example}}]}
  - {match: [{uri: {prefix: /idle}}], retries: {attempts: 0}, route: [{destination: {host: slow.example}}]}
  - {match: [{uri: {prefix: /full}}], retries: {attempts: 0}, route: [{destination: {host: full.example}}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: full, namespace: shop}
spec: {host: full.example, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 1}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: empty, namespace: shop}
spec: {hosts: [empty.example], addresses: [240.240.0.20], location: MESH_EXTERNAL, resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}]}
";

const LIMITED: &str = "
  global: {service: away.example, port: 80, domain: shop, onFailure: Deny}
  limits:
  - {name: here, match: {paths: [/limited]}, by: [{type: Path}], local: {requests: 1, per: 1h}}
  - {name: away, match: {paths: [/limited/away]}, by: [{type: Path}], global: {}}
";

#[tokio::test]
async fn each_response_flag_is_provoked() {
    let authorizer = mesh_config(
        "\n  - name: away\n    envoyExtAuthzGrpc: {service: away.example, port: 80, timeout: 2s}\n",
    );
    let resources = [
        external("shop", VIP, "http", echo().await),
        hidden("slow", 21, server(b"", true).await),
        hidden("full", 22, server(b"", true).await),
        hidden("gone", 23, free()),
        hidden("close", 24, server(b"", false).await),
        hidden("garbage", 25, server(b"\x00\x01\x02\r\n\r\n", false).await),
        hidden("away", 26, free()),
        ENDINGS.to_owned(),
        limits(LIMITED),
        authorizer,
        custom("away"),
    ]
    .concat();
    let settings = Settings { stream_idle_timeout: Duration::from_millis(300), ..Settings::default() };
    let lab = Lab::new(&resources, settings).await;
    assert_eq!(lab.get("/limited", "first").await, 200);
    for (path, status, flags, details) in [
        ("/ok", 200, "-", "via_upstream"),
        ("/nowhere", 404, "NR", "route_not_found"),
        ("/delay", 200, "DI", "via_upstream"),
        ("/abort", 418, "FI", "fault_filter_abort"),
        ("/both", 418, "DI,FI", "fault_filter_abort"),
        ("/limited", 429, "RL", "local_rate_limited"),
        ("/limited/away", 500, "RLSE", "rate_limiter_error"),
        ("/ask", 403, "UAEX", "ext_authz_error"),
        ("/slow", 504, "UT", ""),
        ("/try", 504, "URX,UT", ""),
        ("/gone", 503, "UF", ""),
        ("/again", 503, "URX,UF", ""),
        ("/empty", 503, "UH", "no_healthy_upstream"),
        ("/subset", 503, "NC", "cluster_not_found"),
        ("/close", 503, "UC", ""),
        ("/garbage", 502, "UPE", ""),
        ("/idle", 504, "SI", ""),
    ] {
        let got = lab.get(path, path).await;
        let line = lab.line(path).await;
        assert_eq!((got, &line["flags"]), (status, &flags.into()), "{path}: {line}");
        assert_eq!(line["status"], status, "{line}");
        assert!(details.is_empty() || line["details"] == details, "{path}: {line}");
        // The same in what is counted, and in what is kept for `culvert why`.
        let why = lab.why(path);
        assert_eq!((&why["flags"], &why["status"]), (&line["flags"], &line["status"]), "{why}");
        let counted = [
            "istio_requests_total{reporter=\"waypoint\"",
            &format!("response_code=\"{status}\",response_flags=\"{flags}\""),
        ];
        assert!(lab.metrics().lines().any(|l| counted.iter().all(|part| l.contains(part))), "{counted:?}");
    }
    what_is_full_and_who_leaves(&lab).await;
    // What is no request has a flag, and no ID.
    let bad = "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(lab.send(bad).await, 400);
    lab.until(&["istio_requests_total{", "response_code=\"400\",response_flags=\"DPE\""], "1").await;
}

async fn what_is_full_and_who_leaves(lab: &Lab) {
    // A limit of requests: one is under way.
    let first = TcpStream::connect(lab.address).await.unwrap();
    let (mut reading, mut writing) = first.into_split();
    writing
        .write_all(b"GET /full HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: held\r\n\r\n")
        .await
        .unwrap();
    let begin = tokio::time::Instant::now();
    loop {
        let got = lab.get("/full", "full").await;
        let line = lab.line("full").await;
        if line["flags"] == "UO" {
            assert_eq!(got, 503);
            break;
        }
        assert!(begin.elapsed() < LONG, "{line}");
    }
    // The client of the other goes.
    let _ = reading.read(&mut [0; 1]).await;
    drop((reading, writing));
    let text = "GET /slow-forever HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: left\r\n\r\n";
    let mut client = TcpStream::connect(lab.address).await.unwrap();
    client.write_all(text.replace("/slow-forever", "/idle").as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(client);
    let line = lab.line("left").await;
    assert_eq!((&line["flags"], &line["status"]), (&"DC".into(), &0.into()), "{line}");
}

#[tokio::test]
async fn a_record_names_policy_clause_route_and_hop() {
    let shop = echo().await;
    let policy = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: guard, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: ALLOW
  rules:
  - {to: [{operation: {methods: [GET], paths: [/items/*]}}], when: [{key: 'request.headers[x-tenant]', values: [blue]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
  - {match: [{uri: {prefix: /items}}], route: [{destination: {host: shop.example}}]}
";
    let resources = [external("shop", VIP, "http", shop), policy.to_owned()].concat();
    let lab = Lab::new(&resources, Settings::default()).await;
    assert_eq!(lab.get("/items/7?a=b", "denied").await, 403);
    let text = "GET /items/7 HTTP/1.1\r\nHost: shop.example\r\nX-Tenant: blue\r\nX-Request-Id: let-in\r\nConnection: close\r\n\r\n";
    assert_eq!(lab.send(text).await, 200);
    lab.line("let-in").await;
    let denied = lab.why("denied");
    assert_eq!(denied["policy"], "shop/guard", "{denied:#}");
    let said = denied["decision"].as_str().unwrap();
    assert!(said.starts_with("denied: no ALLOW policy matched (shop/guard)"), "{said}");
    assert!(said.contains("closest: policy shop/guard rule 0 clause") && said.contains("blue"), "{said}");
    assert_eq!((&denied["path"], &denied["method"]), (&"/items/7?a=b".into(), &"GET".into()));
    assert_eq!(denied["source_identity"], "spiffe://cluster.local/ns/web/sa/front");
    assert_eq!((&denied["route"], &denied["endpoint"]), (&Value::Null, &Value::Null), "it went nowhere");
    let let_in = lab.why("let-in");
    assert!(
        let_in["decision"].as_str().unwrap().starts_with("allowed by policy shop/guard rule 0"),
        "{let_in:#}"
    );
    assert_eq!(let_in["route"], "VirtualService shop/shop rule 0", "{let_in:#}");
    assert!(let_in["match"].as_str().unwrap().contains("/items*"), "{let_in:#}");
    assert_eq!(let_in["endpoint"], shop.to_string());
    assert_eq!((&let_in["hop"], &let_in["backend"]), (&"TCP".into(), &"shop/shop.example:80".into()));
}

#[tokio::test]
async fn what_each_authorizer_said_is_remembered() {
    const YES: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const NO: &[u8] = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let ends = [("agrees", server(YES, false).await), ("refuses", server(NO, false).await), ("away", free())];
    let provider = |(name, host, more): (&str, &str, &str)| {
        format!("\n  - name: {name}\n    envoyExtAuthzHttp: {{service: {host}.example, port: 80{more}}}\n")
    };
    let providers = [
        ("a-yes", "agrees", ""),
        ("b-open", "away", ", failOpen: true"),
        ("c-no", "refuses", ""),
        ("d-away", "away", ""),
        ("e-yes", "agrees", ", includeRequestBodyInCheck: {maxRequestBytes: 4}"),
        ("f-nowhere", "nowhere", ""),
    ];
    let paths = ["/ask*", "/ask*", "/ask/no", "/ask/away", "/ask/no, /ask/long", "/ask/nowhere"];
    let policies =
        providers.iter().zip(paths).map(|((name, ..), path)| custom(name).replace("\"/ask*\"", path));
    let mut resources = vec![external("shop", VIP, "http", echo().await)];
    resources.extend(ends.iter().zip(30_u8..).map(|((name, to), place)| hidden(name, place, *to)));
    resources.push(mesh_config(&providers.map(provider).concat()));
    resources.extend(policies);
    let lab = Lab::new(&resources.concat(), Settings::default()).await;

    let (yes, open) = (("a-yes", "allowed"), ("b-open", "no answer, passed over (failOpen): "));
    for (path, status, answers) in [
        ("/ask", 200, vec![yes, open]),
        ("/ask/no", 401, vec![yes, open, ("c-no", "denied with 401"), ("e-yes", "not asked")]),
        ("/ask/away", 403, vec![yes, open, ("d-away", "no answer, so denied: ")]),
        (
            "/ask/nowhere",
            403,
            vec![("f-nowhere", "no answer, so denied: there is no service nowhere.example")],
        ),
    ] {
        assert_eq!(lab.get(path, path).await, status, "{path}");
        lab.line(path).await;
        let why = lab.why(path);
        let asked = why["asked"].as_array().unwrap();
        for (provider, answer) in answers {
            let one = asked.iter().find(|one| one["provider"] == provider).unwrap();
            assert_eq!(one["policy"], format!("shop/{provider}"), "{why:#}");
            let said = one["answer"].as_str().unwrap();
            assert!(
                said == answer || (answer.len() > 9 && said.starts_with(answer)),
                "{path} {provider}: {said}"
            );
        }
    }
    let text = "POST /ask/long HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: long\r\nContent-Length: 5\r\nConnection: close\r\n\r\nabcde";
    assert_eq!(lab.send(text).await, 413);
    lab.line("long").await;
    let why = lab.why("long");
    let last = &why["asked"].as_array().unwrap().last().unwrap()["answer"];
    assert_eq!(*last, "not asked: the request's body is longer than it may be shown", "{why:#}");
}

#[tokio::test]
async fn refused_requests_are_remembered_when_many_others_came_after_them() {
    let shop = echo().await;
    let lab = Lab::new(&external("shop", VIP, "http", shop), Settings::default()).await;
    let bad = "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(lab.send(bad).await, 400);
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let mut answer = vec![0; 1 << 16];
    for _ in 0..600 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n").await.unwrap();
        assert!(stream.read(&mut answer).await.unwrap() > 0);
    }
    let all = lab.deciding.telemetry().recent().dump();
    let all = all["requests"].as_array().unwrap();
    assert!(all.len() <= 2 * 256 * 8, "{}", all.len());
    assert_eq!(all.iter().filter(|r| r["status"] == 400).count(), 1);
    let kept: u64 = lab.sample(&["culvert_decisions_kept "]).unwrap().parse().unwrap();
    let over: u64 = lab.sample(&["culvert_decisions_passed_over_total "]).unwrap().parse().unwrap();
    assert_eq!(kept as usize, all.len());
    assert!(kept + over <= 601 && kept >= 257, "{kept} {over}");
}

const LOGS: &str = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http: [{headers: {response: {set: {x-served: 'yes'}}}, route: [{destination: {host: shop.example}}]}]
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: logs, namespace: shop}
spec: {accessLogging: [{providers: [{name: als}], filter: {expression: \"!request.url_path.startsWith('/quiet')\"}}]}
";

/// What the service of logs has got: the number of streams, and the messages.
async fn got(http: SocketAddr, method: &str) -> (u64, Vec<Value>) {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let text = format!("{method} /logs HTTP/1.0\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    let lines =
        all.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap());
    let streams = all.lines().find_map(|line| line.strip_prefix("streams ")?.trim().parse().ok());
    (streams.unwrap_or(0), lines.collect())
}

fn entries(messages: &[Value]) -> Vec<Value> {
    let lists = messages.iter().filter_map(|message| message["httpLogs"]["logEntry"].as_array());
    lists.flatten().cloned().collect()
}

#[tokio::test]
async fn entries_reach_a_service_of_others_and_a_new_stream_of_it() {
    let Some(checks) = checks().await else { return };
    let providers = "
  - name: als
    envoyHttpAls:
      service: als.example
      port: 80
      logName: shop
      additionalRequestHeadersToLog: [X-Tenant]
      additionalResponseHeadersToLog: [X-Served]
";
    let shop = echo().await;
    let resources = [
        external("shop", VIP, "http", shop),
        external("als", "240.240.0.2", "grpc", checks.grpc)
            .replace("use-waypoint: waypoint", "use-waypoint: none"),
        mesh_config(providers),
        LOGS.to_owned(),
    ]
    .concat();
    let lab = Lab::new(&resources, Settings::default()).await;
    let text = "PUT /a?b=c HTTP/1.1\r\nHost: shop.example\r\nX-Tenant: blue\r\nX-Request-Id: one\r\nUser-Agent: me\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
    assert_eq!(lab.send(text).await, 200);
    assert_eq!(lab.get("/quiet", "quiet").await, 200);
    lab.until(&["culvert_access_log_entries_sent_total "], "1").await;
    let begin = tokio::time::Instant::now();
    let messages = loop {
        let (streams, messages) = got(checks.http, "GET").await;
        if !entries(&messages).is_empty() {
            assert_eq!(streams, 1);
            break messages;
        }
        assert!(begin.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(messages[0]["identifier"]["logName"], "shop");
    assert_eq!(messages[0]["identifier"]["node"]["id"], "waypoint.shop");
    is_told(&entries(&messages), shop);
    // The service ends the stream: what comes then goes by another.
    got(checks.http, "POST").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(lab.get("/second", "two").await, 200);
    let begin = tokio::time::Instant::now();
    loop {
        let (streams, messages) = got(checks.http, "GET").await;
        let all = entries(&messages);
        if all.len() == 2 {
            assert_eq!((streams, &all[1]["request"]["path"]), (2, &"/second".into()));
            break;
        }
        assert!(begin.elapsed() < LONG, "{messages:#?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(lab.sample(&["culvert_access_log_entries_waiting "]).as_deref(), Some("0"));
}

/// The entry of the first request is all that there is, and says what it was.
fn is_told(all: &[Value], shop: SocketAddr) {
    assert_eq!(all.len(), 1, "the filter leaves the other out: {all:#?}");
    let (entry, common) = (&all[0], &all[0]["commonProperties"]);
    assert_eq!(entry["protocolVersion"], "HTTP11", "{entry:#}");
    assert_eq!(entry["request"]["requestMethod"], "PUT");
    for (key, value) in
        [("authority", "shop.example"), ("path", "/a?b=c"), ("userAgent", "me"), ("requestId", "one")]
    {
        assert_eq!(entry["request"][key], value, "{entry:#}");
    }
    assert_eq!(entry["request"]["requestBodyBytes"], "3");
    assert_eq!(entry["request"]["requestHeaders"]["x-tenant"], "blue");
    assert_eq!(entry["response"]["responseCode"], 200);
    assert_eq!(entry["response"]["responseHeaders"]["x-served"], "yes", "{entry:#}");
    assert_eq!(entry["response"]["responseCodeDetails"], "via_upstream");
    let san = &common["tlsProperties"]["peerCertificateProperties"]["subjectAltName"][0]["uri"];
    assert_eq!(san, "spiffe://cluster.local/ns/web/sa/front", "{entry:#}");
    let port = &common["upstreamRemoteAddress"]["socketAddress"]["portValue"];
    assert_eq!(port, shop.port(), "{entry:#}");
    assert_eq!(common["upstreamCluster"], "inbound-vip|80|http|shop.example");
    assert!(
        common["responseFlags"].is_null()
            && common["startTime"].is_string()
            && common["duration"].is_string()
    );
}

#[tokio::test]
async fn a_service_that_takes_nothing_delays_no_request_and_what_is_dropped_is_counted() {
    // It takes connections, and reads nothing.
    let away = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let providers = "\n  - {name: als, envoyHttpAls: {service: als.example, port: 80}}\n";
    let resources = [
        external("shop", VIP, "http", echo().await),
        external("als", "240.240.0.2", "grpc", away.local_addr().unwrap())
            .replace("use-waypoint: waypoint", "use-waypoint: none"),
        mesh_config(providers),
        LOGS.to_owned(),
    ]
    .concat();
    let lab = Lab::new(&resources, Settings::default()).await;
    let mut stream = TcpStream::connect(lab.address).await.unwrap();
    let mut answer = vec![0; 1 << 16];
    // More than the queue has room for, and the batch that is on its way.
    for _ in 0..6000 {
        stream.write_all(b"GET /a HTTP/1.1\r\nHost: shop.example\r\n\r\n").await.unwrap();
        assert!(stream.read(&mut answer).await.unwrap() > 0);
    }
    let number = |name: &str| lab.sample(&[name]).unwrap().parse::<u64>().unwrap();
    let (taken, dropped) =
        (number("culvert_access_log_entries_total "), number("culvert_access_log_entries_dropped_total "));
    assert_eq!(taken + dropped, 6000);
    assert!(dropped > 0 && taken >= 4096, "{taken} {dropped}");
    assert!(number("culvert_access_log_entries_waiting ") <= 4096);
    assert_eq!(number("culvert_access_log_entries_sent_total "), 0);
}
