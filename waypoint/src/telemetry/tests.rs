//! What is told, from a request's end to the text of metrics, to lines, and to what a collector gets.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::http::{HttpService, Percent, WaypointKey};
use model::telemetry::{
    AccessLog, Collector, Exporter, Expression, LogEntries, LogFormat, LogService, LogSink, LogText,
    MetricName, MetricRule, SpanProtocol, SpanTag, Tag, Telemetry as Told, Tracing,
};
use model::{Mesh, ServiceKey};
use process::logs::{Format, LogWriter};
use process::metrics::{Format as TextFormat, Registry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::http::decide::{About, Carrier, Flag, Protocol, Target};
use crate::http::head::ResponseHead;

/// Keeps what is written.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Lab {
    registry: Registry,
    telemetry: Arc<Telemetry>,
    writer: LogWriter,
    kept: Kept,
    mesh: Mesh,
}

impl Lab {
    fn new(access_log: Option<Format>) -> Self {
        Self::with(access_log, Exporters::none())
    }

    fn with(access_log: Option<Format>, exporters: Arc<Exporters>) -> Self {
        let (registry, kept) = (Registry::new(), Kept::default());
        let writer =
            LogWriter::start_on(kept.clone(), 1 << 20, |lines| format!("{lines} dropped\n")).unwrap();
        let settings = Settings { access_log, ..Settings::default() };
        let telemetry = Telemetry::new(&registry, settings, writer.clone(), exporters);
        Self { registry, telemetry, writer, kept, mesh: Mesh::default() }
    }

    fn end(&self, told: &Told, change: impl FnOnce(&mut RequestHead, &mut Record, &mut Decided)) {
        self.end_of(&Arc::new(told.clone()), change);
    }

    fn end_of(&self, told: &Arc<Told>, change: impl FnOnce(&mut RequestHead, &mut Record, &mut Decided)) {
        let mut request = request();
        let mut decided = Decided {
            service: Some(Arc::new(HttpService { telemetry: Arc::clone(told), ..service() })),
            port: 80,
            ..Decided::default()
        };
        self.telemetry.request_started(&mut request, &mut decided);
        let mut record = record();
        change(&mut request, &mut record, &mut decided);
        let mut response = ResponseHead::default();
        response.fields.push(b"server", b"shelf");
        let heads = (&request, &response.fields);
        self.telemetry.request_ended(&self.mesh, heads, &connection(), &decided, &record);
    }

    fn metrics(&self) -> String {
        self.registry.encode(TextFormat::Prometheus)
    }

    fn lines(&self) -> Vec<String> {
        assert!(self.writer.flush(Duration::from_secs(10)));
        let text = String::from_utf8(self.kept.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
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
}

fn service() -> HttpService {
    HttpService {
        service: ServiceKey { namespace: "shop".into(), hostname: "cart.shop.svc.cluster.local".into() },
        waypoint: WaypointKey { namespace: "shop".into(), name: "waypoint".into() },
        ports: Box::default(),
        policies: Box::default(),
        selected: Box::default(),
        led_to: Box::default(),
        authentication: Box::default(),
        rate_limits: Box::default(),
        telemetry: Arc::default(),
    }
}

fn request() -> RequestHead {
    let mut request = RequestHead::default();
    request.set_method("GET");
    request.set_authority("cart.shop");
    request.set_target("/items?id=7");
    request.fields.push(b"User-Agent", b"curl \"8\"");
    request.fields.push(b"x-request-id", b"0a1b");
    request
}

fn record() -> Record {
    let address: SocketAddr = "10.0.0.9:8080".parse().unwrap();
    let about =
        About { service: Some(service().service), port: 80, subset: None, workload: None, tunnelled: false };
    let target =
        Target { about: Some(Arc::new(about)), ..Target::new(address, Protocol::Http1, Carrier::Tcp) };
    let target = Some(Arc::new(target));
    let begun = Record::begun(tokio::time::Instant::now());
    Record { status: 200, tries: 1, target, received: 7, sent: 1000, ..begun }
}

fn connection() -> Connection {
    Connection {
        client: "10.0.0.5:40000".parse().unwrap(),
        destination: "10.1.0.1:80".parse().unwrap(),
        identity: Some(Arc::new("spiffe://cluster.local/ns/shop/sa/web".parse().unwrap())),
        server_name: None,
        secure: false,
        said: None,
    }
}

fn nothing(_: &mut RequestHead, _: &mut Record, _: &mut Decided) {}

fn log(format: LogFormat, filter: Option<&str>) -> Told {
    let filter = filter.map(|text| Expression::new(text).unwrap());
    let sink = LogSink::File { path: "/dev/stdout".into(), format };
    Told { logs: Some(Box::new([AccessLog { sink, filter }])), ..Told::default() }
}

#[test]
fn a_request_counts_once_in_each_metric() {
    let lab = Lab::new(None);
    let told = Told::default();
    lab.end(&told, nothing);
    lab.end(&told, nothing);
    lab.end(&told, |_, record, _| (record.status, record.flag) = (503, Flag::NoHealthyUpstream));
    let ok = [
        "istio_requests_total{reporter=\"waypoint\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\"",
        "request_protocol=\"http\",response_code=\"200\",response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    assert_eq!(lab.sample(&ok).as_deref(), Some("2"));
    let failed = ["istio_requests_total", "response_code=\"503\"", "response_flags=\"UH\""];
    assert_eq!(lab.sample(&failed).as_deref(), Some("1"));
    let bytes = |name| lab.sample(&[name, "response_code=\"200\""]);
    assert_eq!(bytes("istio_request_bytes_sum").as_deref(), Some("14.0"));
    assert_eq!(bytes("istio_response_bytes_sum").as_deref(), Some("2000.0"));
    assert_eq!(bytes("istio_request_duration_milliseconds_count").as_deref(), Some("2"));
    assert_eq!(bytes("istio_request_messages_total"), None, "it was not gRPC");
}

#[test]
fn messages_and_the_status_of_grpc_are_told() {
    let lab = Lab::new(None);
    lab.end(&Told::default(), |request, record, _| {
        request.fields.push(b"content-type", b"application/grpc+proto");
        (record.grpc_status, record.request_messages, record.response_messages) = (Some(14), 3, 5);
    });
    let labels = "request_protocol=\"grpc\",response_code=\"200\",grpc_response_status=\"14\"";
    assert_eq!(lab.sample(&["istio_request_messages_total{", labels]).as_deref(), Some("3"));
    assert_eq!(lab.sample(&["istio_response_messages_total{", labels]).as_deref(), Some("5"));
}

#[test]
fn labels_are_left_out_added_and_replaced() {
    let lab = Lab::new(None);
    let tag = |name: &str, value: Option<&str>| Tag {
        name: name.into(),
        value: value.map(|text| Expression::new(text).unwrap()),
    };
    let rules = [
        MetricRule { metric: MetricName::RequestDuration, disabled: true, tags: Box::default() },
        MetricRule {
            metric: MetricName::RequestCount,
            disabled: false,
            tags: Box::new([
                tag("response_flags", None),
                tag("source_principal", None),
                tag("response_code", Some("response.code >= 500 ? 'bad' : 'good'")),
                tag("host", Some("request.host")),
                tag("absent", Some("request.headers['x-nope']")),
            ]),
        },
    ];
    let told = Told {
        metrics: model::telemetry::Metrics { disabled: false, rules: rules.into() },
        ..Told::default()
    };
    lab.end(&told, nothing);
    lab.end(&told, |_, record, _| record.flag = Flag::StreamIdleTimeout);
    // What differs in a hidden label only is one series.
    let counted =
        ["istio_requests_total", "response_code=\"good\"", "host=\"cart.shop\"", "absent=\"unknown\""];
    assert_eq!(lab.sample(&counted).as_deref(), Some("2"));
    let text = lab.metrics();
    let line = text.lines().find(|line| line.starts_with("istio_requests_total")).unwrap();
    assert!(!line.contains("response_flags") && !line.contains("source_principal"), "{line}");
    assert!(!text.contains("istio_request_duration_milliseconds_count"), "disabled");
    assert!(text.contains("istio_response_bytes_sum{") && text.contains("response_flags=\"SI\""), "as ever");
}

#[test]
fn the_own_line_says_what_is_known() {
    let lab = Lab::new(Some(Format::Json));
    lab.end(&Told::default(), nothing);
    let line: serde_json::Value = serde_json::from_str(&lab.lines()[0]).unwrap();
    for (key, value) in [
        ("method", "GET"),
        ("path", "/items?id=7"),
        ("dst.service", "cart.shop.svc.cluster.local"),
        ("upstream", "10.0.0.9:8080"),
        ("flags", "-"),
        ("details", "via_upstream"),
        ("request_id", "0a1b"),
        ("user_agent", "curl \"8\""),
        ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
    ] {
        assert_eq!(line[key], value, "{key}");
    }
    assert_eq!((&line["status"], &line["bytes_sent"]), (&200.into(), &1000.into()));
}

#[test]
fn formats_and_filters_are_those_of_the_service() {
    let lab = Lab::new(Some(Format::Text));
    let text =
        LogText::new("%RESPONSE_CODE% %RESPONSE_FLAGS% \"%REQ(USER-AGENT)%\" %RESP(SERVER)% %REQ(X-NO)%")
            .unwrap();
    let told =
        log(LogFormat::TextOf(text), Some("response.code >= 400 || request.headers['x-debug'] == '1'"));
    lab.end(&told, nothing);
    lab.end(&told, |_, record, _| {
        record.status = 503;
        record.flag = Flag::UpstreamConnectionFailure;
        record.retries_exhausted = true;
    });
    assert_eq!(lab.lines(), [r#"503 URX,UF "curl \"8\"" shelf -"#]);
    let fields = [("code", "%RESPONSE_CODE%"), ("who", "%REQ(USER-AGENT)%"), ("none", "%REQ(X-NO)%")];
    let fields = fields.map(|(name, text)| (name.into(), LogText::new(text).unwrap()));
    lab.end(&log(LogFormat::JsonOf(Box::new(fields)), None), nothing);
    assert_eq!(lab.lines()[1], r#"{"code":200,"who":"curl \"8\"","none":null}"#);
    let trace = log(LogFormat::TextOf(LogText::new("trace %TRACE_ID%").unwrap()), None);
    lab.end(&trace, nothing);
    let told = Told { logs: trace.logs, ..tracing_to(SpanProtocol::OtlpGrpc, Percent::of(1, 1)) };
    let mut id = String::new();
    lab.end(&told, |_, _, decided| id = format!("trace {:032x}", decided.trace.as_ref().unwrap().trace));
    assert_eq!(lab.lines()[2..], ["trace -".to_owned(), id]);
    // Nobody wants a line.
    lab.end(&Told { logs: Some(Box::default()), ..Told::default() }, nothing);
    assert_eq!(lab.lines().len(), 4);
}

#[test]
fn what_can_not_be_read_has_a_line_and_a_count() {
    let lab = Lab::new(Some(Format::Text));
    lab.telemetry.request_refused(&lab.mesh, Some(Arc::new(service())), &connection(), 431);
    assert_eq!(lab.sample(&["culvert_requests_refused_total{", "status=\"431\""]).as_deref(), Some("1"));
    let line = &lab.lines()[0];
    assert!(line.contains("status=431 flags=\"DPE\" details=\"request_headers_too_large\""), "{line}");
    let counted = ["istio_requests_total", "response_code=\"431\"", "response_flags=\"DPE\""];
    assert_eq!(lab.sample(&counted).as_deref(), Some("1"));
}

fn tracing_to(protocol: SpanProtocol, sampling: Percent) -> Told {
    let collector =
        Collector { provider: "otel".into(), namespace: None, host: "otel.obs.svc".into(), port: 4317 };
    let exporter = Exporter { protocol, timeout: Duration::from_secs(10), headers: Box::default() };
    let tags = [("team".into(), SpanTag::Literal("shop".into()))];
    let tracing = Tracing {
        collector,
        exporter,
        sampling,
        report: true,
        propagate: true,
        tags: Box::new(tags),
        max_tag_length: 256,
    };
    Told { tracing: Some(Box::new(tracing)), ..Told::default() }
}

#[test]
fn contexts_of_traces_are_kept_and_passed_on() {
    let lab = Lab::new(None);
    let begin = |told: &Told, came: &[(&[u8], &[u8])]| {
        let mut request = request();
        for (name, value) in came {
            request.fields.push(name, value);
        }
        let http = HttpService { telemetry: Arc::new(told.clone()), ..service() };
        let mut decided = Decided { service: Some(Arc::new(http)), ..Decided::default() };
        lab.telemetry.request_started(&mut request, &mut decided);
        let value = |name: &'static [u8]| {
            request.fields.values(name).next().map(|v| String::from_utf8(v.to_vec()).unwrap())
        };
        (*decided.trace.unwrap(), value(b"traceparent"), value(b"b3"), value(b"x-b3-traceid"))
    };
    let (all, none) = (Percent::of(1, 1), Percent::default());
    let otlp = |sampling| tracing_to(SpanProtocol::OtlpGrpc, sampling);
    let parent: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    // Whoever was before us has decided, whatever the sampling.
    let (span, passed, ..) = begin(&otlp(none), &[(b"traceparent", parent)]);
    assert_eq!(span.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    assert_eq!((span.parent, span.sampled), (Some(0x00f0_67aa_0ba9_02b7), true));
    let expected = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{:016x}-01", span.id);
    assert_eq!(passed.as_deref(), Some(&*expected));
    // Nobody was: the sampling decides, and the form is that of who takes spans.
    let (span, passed, b3, _) = begin(&otlp(all), &[]);
    assert!(span.sampled && passed.is_some() && b3.is_none() && span.parent.is_none());
    assert!(!begin(&otlp(none), &[]).0.sampled);
    let zipkin = tracing_to(SpanProtocol::Zipkin { path: "/".into() }, all);
    let (_, w3c, _, multiple) = begin(&zipkin, &[]);
    assert!(w3c.is_none() && multiple.is_some());
    // B3 in one field, and its refusal.
    let single: &[u8] = b"4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0";
    let (span, _, b3, _) = begin(&otlp(all), &[(b"b3", single)]);
    assert!(!span.sampled && b3.unwrap().ends_with("-0-00f067aa0ba902b7"));
    // What is no context is none.
    for bad in [&b"00-0-0-01"[..], b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"\xff"] {
        assert_eq!(begin(&otlp(all), &[(b"traceparent", bad)]).0.parent, None);
    }
}

/// A collector at the other end of a pipe.
struct Piped(Mutex<Vec<tokio::io::DuplexStream>>);

impl Connect for Piped {
    fn connect(&self, _: &Collector) -> Connecting {
        let end = self.0.lock().unwrap().pop();
        Box::pin(async move {
            let end = end.ok_or_else(|| std::io::Error::other("no more"))?;
            Ok(Box::new(end) as Box<dyn net::Io>)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn spans_reach_a_collector_of_zipkin() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    let piped = Arc::new(Piped(Mutex::new(vec![ours])));
    let exporters = Exporters::new(tokio::runtime::Handle::current(), piped, "waypoint", "shop");
    let lab = Lab::with(None, exporters);
    let told = tracing_to(SpanProtocol::Zipkin { path: "/api/v2/spans".into() }, Percent::of(1, 1));
    lab.end(&told, nothing);
    lab.end(&told, |_, record, _| record.status = 500);
    let mut text = Vec::new();
    while !text.ends_with(b"}}]") {
        assert_ne!(theirs.read_buf(&mut text).await.unwrap(), 0);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("POST /api/v2/spans HTTP/1.1\r\nhost: otel.obs.svc:4317\r\n"), "{text}");
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let spans: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(spans.as_array().unwrap().len(), 2);
    assert_eq!(spans[0]["localEndpoint"]["serviceName"], "waypoint.shop");
    assert_eq!(spans[0]["name"], "cart.shop.svc.cluster.local:80/*");
    for (tag, value) in
        [("http.status_code", "200"), ("team", "shop"), ("http.url", "http://cart.shop/items?id=7")]
    {
        assert_eq!(spans[0]["tags"][tag], value);
    }
    assert_eq!(spans[1]["tags"]["error"], "true");
    theirs.write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    while lab.sample(&["culvert_spans_sent_total "]).as_deref() != Some("2") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The pipe is gone: what comes now is counted as not taken.
    lab.end(&told, nothing);
    while lab.sample(&["culvert_spans_failed_total "]).as_deref() != Some("1") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn spans_reach_a_collector_of_otlp_over_grpc() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let piped = Arc::new(Piped(Mutex::new(vec![ours])));
    let exporters = Exporters::new(tokio::runtime::Handle::current(), piped, "waypoint", "shop");
    let lab = Lab::with(None, exporters);
    lab.end(&tracing_to(SpanProtocol::OtlpGrpc, Percent::of(1, 1)), nothing);
    let mut server = h2::server::handshake(theirs).await.unwrap();
    let (call, mut respond) = server.accept().await.unwrap().unwrap();
    let driver = tokio::spawn(async move { while server.accept().await.is_some() {} });
    assert_eq!(call.uri().path(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let mut body = call.into_body();
    let mut message = Vec::new();
    while let Some(data) = body.data().await {
        message.extend_from_slice(&data.unwrap());
    }
    assert_eq!(message[..5], [&[0][..], &u32::to_be_bytes(message.len() as u32 - 5)].concat());
    let text = String::from_utf8_lossy(&message).into_owned();
    assert!(text.contains("waypoint.shop") && text.contains("cart.shop.svc.cluster.local:80/*"));
    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    send.send_trailers(trailers).unwrap();
    while lab.sample(&["culvert_spans_sent_total "]).as_deref() != Some("1") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    driver.abort();
}

/// A message of a call of gRPC.
async fn message_of(call: http::Request<h2::RecvStream>) -> String {
    let mut body = call.into_body();
    let mut message = Vec::new();
    while let Some(data) = body.data().await {
        message.extend_from_slice(&data.unwrap());
    }
    String::from_utf8_lossy(&message).into_owned()
}

fn answer(mut respond: h2::server::SendResponse<bytes::Bytes>, message: &'static [u8], status: &str) {
    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
    send.send_data(bytes::Bytes::from_static(message), false).unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", status.parse().unwrap());
    send.send_trailers(trailers).unwrap();
}

#[tokio::test(start_paused = true)]
async fn records_reach_a_collector_of_otlp_and_what_it_does_not_want_is_counted() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let piped = Arc::new(Piped(Mutex::new(vec![ours])));
    let exporters = Exporters::new(tokio::runtime::Handle::current(), piped, "waypoint", "shop");
    let lab = Lab::with(None, exporters);
    let text = |source: &str| LogText::new(source).unwrap();
    let told = entries_in(
        "otel.obs",
        LogEntries::Otlp {
            body: text("said %RESPONSE_CODE% to %REQ(USER-AGENT)%\n"),
            attributes: Box::new([("where".into(), text("%REQ(:PATH)%"))]),
        },
    );
    let counts = |sent: &str, failed: &str| {
        let count = |name: &str| lab.sample(&[name]).unwrap();
        count("culvert_access_log_entries_sent_total ") == sent
            && count("culvert_access_log_entries_failed_total ") == failed
    };
    let until = async |sent: &str, failed: &str| {
        while !counts(sent, failed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    lab.end(&told, nothing);
    carry(&lab, &told, |_| {});
    let mut server = h2::server::handshake(theirs).await.unwrap();
    let (calls, mut called) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(Ok(call)) = server.accept().await {
            let _ = calls.send(call).await;
        }
    });
    let (call, respond) = called.recv().await.unwrap();
    assert_eq!(call.uri().path(), "/opentelemetry.proto.collector.logs.v1.LogsService/Export");
    let message = message_of(call).await;
    for part in
        ["waypoint.shop", "log_name", "said 200 to curl \\\"8\\\"", "where", "/items?id=7", "said 0 to -"]
    {
        assert!(message.contains(part), "{part}: {message}");
    }
    // It has taken one of the two.
    answer(respond, &[0, 0, 0, 0, 4, 0x0a, 2, 8, 1], "0");
    until("1", "1").await;
    lab.end(&told, nothing);
    let (call, respond) = called.recv().await.unwrap();
    drop(message_of(call).await);
    assert_eq!(lab.sample(&["culvert_access_log_streams_total "]).as_deref(), Some("1"));
    // Whoever refuses a call is tried once more, on a connection of its own.
    answer(respond, &[], "8");
    until("1", "2").await;
}

fn entries_to(host: &str) -> Told {
    let entries = LogEntries::Requests { request_headers: Box::default(), response_headers: Box::default() };
    entries_in(host, entries)
}

fn entries_in(host: &str, entries: LogEntries) -> Told {
    let service = LogService {
        collector: Collector { provider: "als".into(), namespace: None, host: host.into(), port: 80 },
        name: "log".into(),
        entries,
    };
    let log = AccessLog { sink: LogSink::Service(Box::new(service)), filter: None };
    Told { logs: Some(Box::new([log])), ..Told::default() }
}

#[tokio::test]
async fn services_of_logs_make_room_for_others_when_no_settings_name_them() {
    let nobody = Arc::new(Piped(Mutex::default()));
    let exporters = Exporters::new(tokio::runtime::Handle::current(), nobody, "waypoint", "shop");
    let lab = Lab::with(None, exporters);
    lab.telemetry.in_force(&Named::default());
    let counts = || {
        let count = |name: &str| lab.sample(&[name]).unwrap();
        (count("culvert_access_log_entries_total "), count("culvert_access_logs_refused_total "))
    };
    std::thread::scope(|scope| {
        let ((seen, first), (done, last)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
        let lab = &lab;
        // A thread of the data plane has seen the first of them, and nothing since.
        scope.spawn(move || {
            for n in 0..16 {
                lab.end(&entries_to(&format!("old-{n}.test")), nothing);
            }
            seen.send(()).unwrap();
            let _ = last.recv();
        });
        first.recv().unwrap();
        for n in 0..40 {
            lab.end(&entries_to(&format!("next-{n}.test")), nothing);
        }
        assert_eq!(counts(), ("56".to_owned(), "0".to_owned()));
        drop(done);
    });
    // Those that are in force have their place; one that was refused has it once it is free, also where it is remembered.
    let now: Vec<_> = (0..17).map(|n| Arc::new(entries_to(&format!("now-{n}.test")))).collect();
    let mut named = Named::default();
    now.iter().for_each(|told| named.follow(None, Some(told)));
    lab.telemetry.in_force(&named);
    now.iter().for_each(|told| lab.end_of(told, nothing));
    assert_eq!(counts(), ("72".to_owned(), "1".to_owned()));
    named.follow(Some(&now[0]), None);
    lab.telemetry.in_force(&named);
    lab.end_of(&now[16], nothing);
    assert_eq!(counts(), ("73".to_owned(), "1".to_owned()));
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(tokio::time::Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_open(path: &std::path::Path) -> bool {
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|to| to == path)
}

fn to_file(path: &std::path::Path) -> (Told, Named) {
    let text = LogText::new("%REQ(:METHOD)%").unwrap();
    let sink = LogSink::File { path: path.to_str().unwrap().into(), format: LogFormat::TextOf(text) };
    let told = Told { logs: Some(Box::new([AccessLog { sink, filter: None }])), ..Told::default() };
    let mut files = Named::default();
    files.follow(None, Some(&told));
    (told, files)
}

#[test]
fn a_file_of_logs_is_open_while_settings_name_it_and_no_line_is_lost_after_that() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().canonicalize().unwrap();
    let (path, moved) = (directory.join("log"), directory.join("log.1"));
    let lines = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    let lab = Lab::new(None);
    let (told, mut files) = to_file(&path);
    let told = Arc::new(told);
    lab.telemetry.in_force(&files);
    lab.end_of(&told, nothing);
    until("a line", || lines(&path) == 1);
    assert!(is_open(&path));
    // Rotation.
    std::fs::rename(&path, &moved).unwrap();
    lab.telemetry.reopen_logs();
    lab.end_of(&told, nothing);
    until("the line is in the new file", || lines(&path) == 1);
    assert_eq!((lines(&moved), is_open(&moved)), (1, false));
    // Two services name it, then one, then none.
    files.follow(None, Some(&told));
    files.follow(Some(&told), None);
    lab.telemetry.in_force(&files);
    lab.end_of(&told, nothing);
    until("a second line", || lines(&path) == 2);
    assert!(is_open(&path));
    files.follow(Some(&told), None);
    assert_eq!(files, Named::default());
    lab.telemetry.in_force(&files);
    until("it is closed", || !is_open(&path));
    // A request that began before.
    lab.end_of(&told, nothing);
    until("its line", || lines(&path) == 3);
    until("it is closed again", || !is_open(&path));
    assert_eq!(lab.sample(&["culvert_access_log_lines_dropped_total "]).as_deref(), Some("0"));
}

#[test]
fn files_of_logs_make_room_for_others_and_one_that_can_not_be_opened_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let lab = Lab::new(None);
    for n in 0..40 {
        let path = directory.path().join(format!("log-{n}"));
        let (told, files) = to_file(&path);
        lab.telemetry.in_force(&files);
        lab.end(&told, nothing);
        until("a line", || std::fs::read(&path).is_ok_and(|text| text == b"GET\n"));
    }
    let count = |name: &str| lab.sample(&[name]).unwrap();
    assert_eq!(count("culvert_access_logs_refused_total "), "0");
    assert!(count("culvert_access_log_files ").parse::<usize>().is_ok_and(|files| files <= 16));
    let away = directory.path().join("away");
    let path = away.join("log");
    let (told, files) = to_file(&path);
    lab.telemetry.in_force(&files);
    lab.end(&told, nothing);
    until("it is counted", || count("culvert_access_log_lines_dropped_total ") == "1");
    std::fs::create_dir(&away).unwrap();
    until("it is opened", || {
        lab.end(&told, nothing);
        path.exists()
    });
    // Nobody reads: whoever writes there is not waited for.
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (told, files) = to_file(&pipe);
    lab.telemetry.in_force(&files);
    lab.end(&told, nothing);
    assert_eq!(count("culvert_access_logs_refused_total "), "0");
}

#[test]
fn a_file_that_was_let_go_of_or_refused_is_opened_once_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let at = |n: usize| directory.path().join(format!("log-{n}"));
    let lines = |n: usize| std::fs::read_to_string(at(n)).unwrap_or_default().lines().count();
    let lab = Lab::new(None);
    let refused = || lab.sample(&["culvert_access_logs_refused_total "]).unwrap();
    let (old, files) = to_file(&at(0));
    let old = Arc::new(old);
    lab.telemetry.in_force(&files);
    lab.end_of(&old, nothing);
    // As many others as there may be: it makes room.
    let told: Vec<_> = (1..=17).map(|n| Arc::new(to_file(&at(n)).0)).collect();
    let mut files = Named::default();
    told.iter().take(16).for_each(|told| files.follow(None, Some(told)));
    lab.telemetry.in_force(&files);
    told.iter().take(15).for_each(|told| lab.end_of(told, nothing));
    lab.end_of(&told[15], nothing);
    assert_eq!(lab.sample(&["culvert_access_log_files "]).as_deref(), Some("16"));
    // One too many, which is said once, and a request under the old settings that began before: there is no room.
    for _ in 0..3 {
        lab.end_of(&told[16], nothing);
    }
    assert_eq!((refused().as_str(), lines(17)), ("1", 0));
    lab.end_of(&old, nothing);
    assert_eq!(refused(), "2", "a line that is not written is counted");
    files.follow(Some(&told[0]), Some(&told[16]));
    lab.telemetry.in_force(&files);
    lab.end_of(&told[16], nothing);
    until("the one that was refused", || lines(17) == 1);
    lab.telemetry.in_force(&Named::default());
    lab.end_of(&old, nothing);
    until("the old one", || lines(0) == 2);
    assert_eq!(refused(), "2");
}

/// A connection of bytes, from its beginning to its end.
fn carry(lab: &Lab, told: &Told, change: impl FnOnce(&mut Record)) {
    let decided = Decided {
        service: Some(Arc::new(HttpService { telemetry: Arc::new(told.clone()), ..service() })),
        port: 80,
        ..Decided::default()
    };
    let connection = connection();
    let mut record = Record { status: 0, received: 0, sent: 0, tries: 0, ..record() };
    let carried = Carried { mesh: &lab.mesh, connection: &connection, decided: &decided, record: &record };
    let opened = lab.telemetry.connection_opened(&carried, (tokio::io::empty(), 7));
    assert_eq!(opened.bytes(), (7, 0));
    drop(opened);
    (record.received, record.sent) = (7, 9);
    change(&mut record);
    let carried = Carried { mesh: &lab.mesh, connection: &connection, decided: &decided, record: &record };
    lab.telemetry.connection_ended(&carried);
}

#[test]
fn metrics_of_connections_are_changed_as_those_of_requests() {
    let lab = Lab::new(None);
    carry(&lab, &Told::default(), |_| {});
    let opened = "istio_tcp_connections_opened_total{reporter=\"waypoint\"";
    assert_eq!(lab.sample(&[opened]).as_deref(), Some("1"));
    assert_eq!(lab.sample(&["istio_tcp_received_bytes_total{"]).as_deref(), Some("7"));
    let lab = Lab::new(None);
    let tag = |name: &str, value: Option<&str>| Tag {
        name: name.into(),
        value: value.map(|text| Expression::new(text).unwrap()),
    };
    let all = [
        (MetricName::TcpSent, true),
        (MetricName::TcpOpened, false),
        (MetricName::TcpClosed, false),
        (MetricName::RequestCount, false),
    ];
    let rules = all.map(|(metric, disabled)| MetricRule {
        metric,
        disabled,
        tags: [
            tag("source_principal", None),
            tag("port", Some("destination.port")),
            tag("path", Some("request.path")),
        ]
        .into(),
    });
    let metrics = model::telemetry::Metrics { disabled: false, rules: rules.into() };
    let told = Told { metrics, ..Told::default() };
    carry(&lab, &told, |_| {});
    let text = lab.metrics();
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    let opened = line("istio_tcp_connections_opened_total");
    assert!(opened.contains("port=\"80\"") && opened.contains("path=\"unknown\""), "{text}");
    assert!(!opened.contains("source_principal"), "{opened}");
    assert_eq!(line("istio_tcp_sent_bytes_total"), "", "disabled");
    let received = line("istio_tcp_received_bytes_total");
    assert!(received.contains("source_principal") && !received.contains("port="), "as ever: {received}");
    assert_eq!(lab.sample(&["istio_tcp_connections_closed_total{"]).as_deref(), Some("1"));
    // None at all, not even of failures.
    let lab = Lab::new(None);
    let metrics = model::telemetry::Metrics { disabled: true, rules: Box::default() };
    let told = Told { metrics, ..Told::default() };
    carry(&lab, &told, |_| {});
    let decided = Decided {
        service: Some(Arc::new(HttpService { telemetry: Arc::new(told), ..service() })),
        ..Decided::default()
    };
    let (connection, record) = (connection(), record());
    let carried = Carried { mesh: &lab.mesh, connection: &connection, decided: &decided, record: &record };
    lab.telemetry.connection_failed(&carried, process::metrics::tcp::FailureFlag::Deny);
    let text = lab.metrics();
    assert!(!text.lines().any(|line| line.starts_with("istio_tcp_")), "{text}");
}

#[test]
fn connections_have_lines_by_the_same_filters_and_formats() {
    let lab = Lab::new(Some(Format::Json));
    carry(&lab, &Told::default(), |record| record.flag = Flag::UpstreamConnectionTermination);
    let line: serde_json::Value = serde_json::from_str(&lab.lines()[0]).unwrap();
    for (key, value) in [
        ("message", "connection complete"),
        ("dst.service", "cart.shop.svc.cluster.local"),
        ("src.identity", "spiffe://cluster.local/ns/shop/sa/web"),
        ("upstream", "10.0.0.9:8080"),
        ("flags", "UC"),
        ("details", "-"),
    ] {
        assert_eq!(line[key], value, "{key} of {line}");
    }
    assert!(line["status"].is_null() && line["method"].is_null(), "{line}");
    assert_eq!((&line["bytes_recv"], &line["bytes_sent"]), (&7.into(), &9.into()));
    let lab = Lab::new(None);
    let format =
        LogText::new("%PROTOCOL% %RESPONSE_CODE% %BYTES_SENT% %UPSTREAM_CLUSTER% %REQ(:PATH)%").unwrap();
    // What asks for a request does not hold for what shows none.
    let of_requests = log(LogFormat::TextOf(format.clone()), Some("request.method != 'PUT'"));
    carry(&lab, &of_requests, |_| {});
    let of_both = log(LogFormat::TextOf(format), Some("connection.mtls && destination.port == 80"));
    carry(&lab, &of_both, |_| {});
    assert_eq!(lab.lines(), ["- 0 9 inbound-vip|80|tcp|cart.shop.svc.cluster.local -"]);
}
