//! What passes, and as what.

use std::time::Duration;

use waypoint::http::decide::{Edit, Edits, Forwarding, Protocol, Timeouts, Value};
use waypoint::http::{ForwardedFor, Settings, Underscores};

use crate::lab::{self, Client, Proxy, get, in_turn, target, until};

/// What the server behind the proxy got.
async fn seen(proxy: &Proxy, request: &str) -> String {
    let response = proxy.connect().await.ask(request).await;
    assert_eq!(response.status(), 200, "{response:?}");
    String::from_utf8(response.body).unwrap()
}

fn field<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let fields = head.lines().filter_map(|line| line.split_once(": "));
    fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v).collect()
}

#[tokio::test]
async fn what_concerns_one_connection_stays_on_it() {
    let proxy = Proxy::to(lab::echo().await).await;
    let head = seen(
        &proxy,
        "GET /a?b HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Gone\r\nKeep-Alive: x\r\nX-Gone: 1\r\nX-Stays: 1\r\n\
         TE: trailers, deflate\r\nProxy-Connection: x\r\nUpgrade: h2c\r\nX-Forwarded-Client-Cert: forged\r\n\r\n",
    )
    .await;
    assert!(head.starts_with("GET /a?b HTTP/1.1\r\nhost: a\r\n"), "{head}");
    for gone in
        ["connection", "keep-alive", "x-gone", "proxy-connection", "upgrade", "x-forwarded-client-cert"]
    {
        assert!(field(&head, gone).is_empty(), "{gone}: {head}");
    }
    assert_eq!(field(&head, "x-stays"), ["1"]);
    assert_eq!(field(&head, "te"), ["trailers"]);
    assert_eq!(field(&head, "x-forwarded-proto"), ["http"]);
    assert_eq!(field(&head, "x-request-id")[0].len(), 36);
    let head = seen(&proxy, "GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\n\r\n").await;
    assert_eq!(field(&head, "x-request-id"), ["mine"]);
}

async fn with(settings: Settings) -> Proxy {
    let endpoints = in_turn(vec![target(lab::echo().await, Protocol::Http1)]);
    Proxy::start(Forwarding::default(), endpoints, settings).await
}

#[tokio::test]
async fn the_clients_address_is_kept_added_or_replaced() {
    let request = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n";
    for (rule, expected) in [
        (ForwardedFor::Keep, "1.2.3.4"),
        (ForwardedFor::Append, "1.2.3.4,127.0.0.1"),
        (ForwardedFor::Replace, "127.0.0.1"),
    ] {
        let proxy = with(Settings { forwarded_for: rule, ..Settings::default() }).await;
        assert_eq!(field(&seen(&proxy, request).await, "x-forwarded-for"), [expected]);
    }
}

#[tokio::test]
async fn names_with_underscores_are_allowed_dropped_or_refused() {
    let request = "GET / HTTP/1.1\r\nHost: a\r\nX_Y: 1\r\n\r\n";
    let proxy = with(Settings::default()).await;
    assert_eq!(field(&seen(&proxy, request).await, "x_y"), ["1"]);
    let proxy = with(Settings { underscores: Underscores::Drop, ..Settings::default() }).await;
    assert!(field(&seen(&proxy, request).await, "x_y").is_empty());
    let proxy = with(Settings { underscores: Underscores::Reject, ..Settings::default() }).await;
    assert_eq!(proxy.connect().await.ask(request).await.status(), 400);
}

#[tokio::test]
async fn bodies_of_either_kind_arrive_and_pipelined_requests_are_answered_in_order() {
    let proxy = Proxy::to(lab::echo().await).await;
    let mut client = proxy.connect().await;
    client.send("POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nfirst").await;
    client.send("POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nsec\r\n3\r\nond\r\n0\r\n\r\n").await;
    client.send(get("/3")).await;
    for (path, body) in [("/1", "first"), ("/2", "second"), ("/3", "")] {
        let response = client.message().await.unwrap();
        let text = String::from_utf8(response.body).unwrap();
        assert!(
            text.contains(&format!(" {path} HTTP/1.1")) && text.ends_with(&format!("\r\n{body}")),
            "{text}"
        );
    }
    // One connection was enough.
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
}

#[tokio::test]
async fn a_client_that_waits_is_told_to_go_on_and_the_server_is_not_asked() {
    let proxy = Proxy::to(lab::echo().await).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap(), "HTTP/1.1 100 Continue\r\n");
    client.send("ok").await;
    let response = client.message().await.unwrap();
    let text = String::from_utf8(response.body).unwrap();
    assert!(text.ends_with("ok") && field(&text, "expect").is_empty(), "{text}");
    // Refused without its body.
    let mut client = proxy.connect().await;
    client
        .send("POST /direct HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        .await;
    assert_eq!(client.message().await.unwrap().status(), 418);
    assert_eq!(client.rest().await, b"");
}

#[tokio::test]
async fn a_server_may_answer_before_it_has_the_request() {
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        client.send("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig").await;
        client.rest().await;
    })
    .await;
    let proxy = Proxy::to(address).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome").await;
    let response = client.message().await.unwrap();
    assert_eq!((response.status(), &*response.body), (413, &b"big"[..]));
    assert_eq!(client.rest().await, b"");
}

/// A server that answers with these bytes, and ends the connection if `ends`.
async fn says(bytes: &'static str, ends: bool) -> Proxy {
    let address = lab::server(move |_, mut client: Client| async move {
        while client.head().await.is_some() {
            client.send(bytes).await;
            if ends {
                return;
            }
        }
    })
    .await;
    Proxy::to(address).await
}

#[tokio::test]
async fn responses_without_a_body_have_none() {
    let proxy = says("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", false).await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let head = client.head().await.unwrap();
        assert!(head.contains("Content-Length: 5\r\n"), "{head}");
    }
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
    for (bytes, status) in [
        ("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 x\r\n\r\n", 204),
    ] {
        let proxy = says(bytes, false).await;
        let mut client = proxy.connect().await;
        for _ in 0..2 {
            client.send(get("/")).await;
            let head = client.head().await.unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
            assert_eq!(head.to_lowercase().contains("content-length"), status == 304, "{head}");
        }
    }
}

#[tokio::test]
async fn answers_of_our_own_that_may_have_no_body_have_none() {
    let proxy = Proxy::to(lab::echo().await).await;
    for (path, status, length) in
        [("/nothing", 204, None), ("/empty", 205, Some("0")), ("/unchanged", 304, None)]
    {
        let mut client = proxy.connect().await;
        client.send([get(path), get("/direct")].concat()).await;
        let head = client.head().await.unwrap();
        let answer = client.body(head, true).await.unwrap();
        assert_eq!((answer.status(), answer.field("content-length")), (status, length));
        // What comes next is the next answer.
        let next = client.message().await.unwrap();
        assert_eq!((next.status(), &*next.body), (418, &b"direct"[..]));
    }
}

#[tokio::test]
async fn a_connection_goes_on_where_an_answer_of_our_own_needs_no_body_that_has_come() {
    let nobody = Proxy::start(Forwarding::default(), in_turn(Vec::new()), Settings::default()).await;
    for (proxy, path, status) in [(Proxy::to(lab::echo().await).await, "/direct", 418), (nobody, "/", 503)] {
        let ask = |body: &str| format!("POST {path} HTTP/1.1\r\nHost: a\r\n{body}");
        let chunks = "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
        let mut client = proxy.connect().await;
        for body in ["Content-Length: 2\r\n\r\nhi", chunks] {
            let answer = client.ask(ask(body)).await;
            assert_eq!((answer.status(), answer.field("connection")), (status, None), "{body}");
        }
        // What comes next is the next request, also where it has come with the body.
        client.send([ask(chunks), get("/direct")].concat()).await;
        assert_eq!(client.message().await.unwrap().status(), status);
        assert_eq!(client.message().await.unwrap().status(), 418);
        // What has not come is not waited for, what is wrong is not read on, and what is much is not read.
        let much = format!("Content-Length: 200000\r\n\r\n{}", "x".repeat(200_000));
        for body in
            ["Content-Length: 2\r\n\r\nh", "Transfer-Encoding: chunked\r\n\r\n2\r\nhi0\r\n\r\n", &much]
        {
            let mut client = proxy.connect().await;
            let answer = client.ask(ask(body)).await;
            let seen = (answer.status(), answer.field("connection"));
            assert_eq!(seen, (status, Some("close")), "{}", &body[..30]);
            assert_eq!(client.rest().await, b"");
        }
    }
}

#[tokio::test]
async fn informational_responses_are_passed_on_but_for_what_is_of_one_connection_or_changed() {
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-Gone: 1\r\nX-Set: theirs\r\n\r\n";
    let address = lab::server(move |_, mut client: Client| async move {
        while client.head().await.is_some() {
            client.send("HTTP/1.1 100 Continue\r\n\r\n").await;
            client.send(hints).await;
            // It is not waited for what comes after it.
            assert_eq!(client.exactly(1).await.unwrap(), b"x");
            client.send([hints, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"].concat()).await;
        }
    })
    .await;
    let edits = Edits(vec![
        Edit::Remove("x-gone".into()),
        Edit::Set("x-set".into(), Value::of(b"ours")),
        Edit::Add("x-added".into(), Value::of(b"1")),
    ]);
    let how = Forwarding { response_edits: edits, ..Forwarding::default() };
    let endpoints = in_turn(vec![target(address, Protocol::Http1)]);
    let proxy = Proxy::start(how, endpoints, Settings::default()).await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n").await;
        let passed = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n";
        assert_eq!(client.head().await.unwrap(), passed);
        client.send("x").await;
        assert_eq!(client.head().await.unwrap(), passed);
        let answer = client.message().await.unwrap();
        assert_eq!((answer.status(), &*answer.body), (200, &b"ok"[..]));
        assert_eq!((answer.field("x-set"), answer.field("x-added")), (Some("ours"), Some("1")));
    }
    assert_eq!(proxy.worker.stats.upstream_connections.get(), 1);
}

#[tokio::test]
async fn informational_responses_without_end_are_refused() {
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        while tokio::io::AsyncWriteExt::write_all(&mut client.stream, b"HTTP/1.1 102 Processing\r\n\r\n")
            .await
            .is_ok()
        {}
    })
    .await;
    let proxy = Proxy::to(address).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    for _ in 0..16 {
        assert!(client.head().await.unwrap().starts_with("HTTP/1.1 102 "));
    }
    assert_eq!(client.message().await.unwrap().status(), 502);
}

#[tokio::test]
async fn what_is_asked_of_the_server_as_a_whole_is_asked_so() {
    let proxy = Proxy::to(lab::echo().await).await;
    for target in ["*", "http://a"] {
        let request = format!("OPTIONS {target} HTTP/1.1\r\nHost: a\r\nMax-Forwards: 3\r\n\r\n");
        let got = seen(&proxy, &request).await;
        assert!(got.starts_with("OPTIONS * HTTP/1.1\r\nhost: a\r\n"), "{target}: {got}");
    }
    let got = seen(&proxy, "OPTIONS http://a/ HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(got.starts_with("OPTIONS / HTTP/1.1\r\n"), "{got}");
}

#[tokio::test]
async fn a_response_that_ends_with_its_connection_is_passed_on_in_chunks() {
    let proxy = says("HTTP/1.1 200 OK\r\n\r\nuntil the end", true).await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        let response = client.ask(get("/")).await;
        assert_eq!(response.field("transfer-encoding"), Some("chunked"));
        assert_eq!(response.body, b"until the end");
    }
}

#[tokio::test]
async fn a_response_that_is_cut_off_is_seen_as_such() {
    let proxy = says("HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", true).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    assert_eq!(client.message().await, None);
    assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), "UC");
    let proxy = says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n", true).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    assert_eq!(client.message().await, None);
}

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways_and_ends_on_each_side_alone() {
    let address = lab::server(|_, mut client: Client| async move {
        let head = client.head().await.unwrap().to_lowercase();
        assert!(
            head.contains("upgrade: websocket\r\n") && head.contains("connection: upgrade\r\n"),
            "{head}"
        );
        assert!(head.contains("sec-websocket-key: k\r\n"));
        client
            .send(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello",
            )
            .await;
        let all = client.rest().await;
        client.send([b"got ", &all[..]].concat()).await;
    })
    .await;
    let proxy = Proxy::to(address).await;
    let mut client = proxy.connect().await;
    client
        .send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nearly ")
        .await;
    let head = client.head().await.unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
    assert_eq!(client.exactly(5).await.unwrap(), b"hello");
    client.send("late").await;
    tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await.unwrap();
    assert_eq!(client.rest().await, b"got early late");
}

#[tokio::test]
async fn nothing_switches_before_all_of_the_request() {
    for (body, status) in [("", 101), ("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", 502)] {
        let address = lab::server(|_, mut client: Client| async move {
            client.head().await.unwrap();
            client.send("HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n").await;
            client.rest().await;
        })
        .await;
        let proxy = Proxy::to(address).await;
        let mut client = proxy.connect().await;
        let end = if body.is_empty() { "\r\n" } else { body };
        client
            .send(format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: other\r\n{end}"))
            .await;
        let head = client.head().await.unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{body}: {head}");
    }
}

#[tokio::test]
async fn a_switch_is_made_to_the_protocol_that_was_sent_on_only() {
    for (asked, sent, chosen, status) in [
        ("h2c, websocket, HTTP/2.0", Some("websocket"), "WebSocket", 101),
        ("websocket, h2c", Some("websocket"), "h2c", 502),
        ("websocket", Some("websocket"), "websocket, h2c", 502),
        ("h2c, TLS/1.0", None, "h2c", 502),
    ] {
        let address = lab::server(move |_, mut client: Client| async move {
            let head = client.head().await.unwrap().to_lowercase();
            let got = head.lines().find_map(|line| line.strip_prefix("upgrade: "));
            assert_eq!(got, sent, "{head}");
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {chosen}\r\n\r\n"
            );
            client.send(answer).await;
            client.rest().await;
        })
        .await;
        let proxy = Proxy::to(address).await;
        let mut client = proxy.connect().await;
        client
            .send(format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {asked}\r\n\r\n"))
            .await;
        let head = client.head().await.unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{asked} -> {chosen}: {head}");
    }
}

#[tokio::test]
async fn a_slow_client_holds_up_its_server() {
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n").await;
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..96 {
            if tokio::io::AsyncWriteExt::write_all(&mut client.stream, &chunk).await.is_err() {
                return;
            }
        }
        panic!("nothing held it up");
    })
    .await;
    let proxy = Proxy::to(address).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    client.head().await;
    // Time enough to take it all, if it were taken.
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(client);
    assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), "DC");
}

#[tokio::test]
async fn a_client_that_goes_ends_its_request() {
    let address = lab::server(|_, mut client: Client| async move {
        client.head().await;
        client.rest().await;
    })
    .await;
    let proxy = Proxy::to(address).await;
    let mut client = proxy.connect().await;
    client.send(get("/")).await;
    until(|| (proxy.worker.stats.requests.get() == 1).then_some(())).await;
    drop(client);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.flag.to_string().as_str(), record.status), ("DC", 0));
    until(|| (proxy.worker.stats.upstream_connections_now.get() == 0).then_some(())).await;
}

#[tokio::test]
async fn fields_of_a_response_are_edited() {
    let edits = Edits(vec![
        Edit::Remove("x-echo".into()),
        Edit::Set("content-type".into(), Value::of(b"a/b")),
        Edit::Add("x-more".into(), Value::of(b"%RESPONSE_CODE% %REQ(:method)% 100%%")),
        Edit::Add("x-none".into(), Value::of(b"%REQ(x-none)%")),
    ]);
    let how = Forwarding { response_edits: edits, ..Forwarding::default() };
    let endpoints = in_turn(vec![target(lab::echo().await, Protocol::Http1)]);
    let proxy = Proxy::start(how, endpoints, Settings::default()).await;
    let response = proxy.connect().await.ask(get("/")).await;
    assert_eq!(response.field("x-echo"), None);
    assert_eq!(
        (response.field("content-type"), response.field("x-more")),
        (Some("a/b"), Some("200 GET 100%"))
    );
    assert_eq!(response.field("x-none"), None);
}

#[tokio::test]
async fn a_drain_ends_connections_after_what_is_under_way() {
    let proxy = Proxy::to(lab::echo().await).await;
    let mut idle = proxy.connect().await;
    idle.ask(get("/")).await;
    let mut busy = proxy.connect().await;
    busy.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\no").await;
    until(|| (proxy.worker.stats.requests.get() == 2).then_some(())).await;
    proxy.worker.drain.cancel();
    assert_eq!(idle.rest().await, b"");
    busy.send("k").await;
    assert!(busy.message().await.unwrap().body.ends_with(b"ok"));
}

#[tokio::test]
async fn time_limits_are_kept() {
    let silent = lab::server(|_, mut client: Client| async move {
        client.rest().await;
    })
    .await;
    let ms = |n| Some(Duration::from_millis(n));
    for (timeouts, status, flag) in [
        (Timeouts { request: ms(50), ..Timeouts::default() }, 504, "UT"),
        (Timeouts { per_try: ms(50), ..Timeouts::default() }, 504, "UT"),
        (Timeouts { idle: ms(50), ..Timeouts::default() }, 504, "SI"),
    ] {
        let how = Forwarding { timeouts, ..Forwarding::default() };
        let endpoints = in_turn(vec![target(silent, Protocol::Http1)]);
        let proxy = Proxy::start(how, endpoints, Settings::default()).await;
        let mut client = proxy.connect().await;
        assert_eq!(client.ask(get("/")).await.status(), status);
        assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), flag);
        // The connection can be used again.
        assert_eq!(client.ask(get("/direct")).await.status(), 418);
    }
}
