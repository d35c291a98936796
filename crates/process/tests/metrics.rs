//! Metrics: the text, the limit of series, scrapes under load.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use process::metrics::tcp::{
    ConnectionSecurity, FailureFlag, Party, Reporter, ServiceLabels, TcpLabels, TcpMetrics,
};
use process::metrics::{Counter, Description, Format, Kind, Registry};

type Pair = [(&'static str, Arc<str>); 1];

fn pair(value: &str) -> Pair {
    [("k", value.into())]
}

/// The samples of `text` by name and labels.
fn samples(text: &str) -> HashMap<String, f64> {
    let lines = text.lines().filter(|l| !l.starts_with('#'));
    lines
        .map(|l| {
            let (name, value) = l.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn sum(text: &str, name: &str) -> f64 {
    samples(text).iter().filter(|(k, _)| k.split('{').next() == Some(name)).map(|(_, v)| v).sum()
}

#[test]
fn the_text_is_what_prometheus_and_openmetrics_say() {
    let registry = Registry::new();
    let counters = registry.counters::<Pair>("culvert_things", "Things \\ with\nlines");
    counters.with(&pair("a \"b\" \\ \n")).add(3);
    registry.gauge("culvert_level", "A \"level\"").set(-4);
    let latencies = registry.family::<(), _>(
        &[Description { name: "culvert_wait_seconds", help: "Waits", kind: Kind::Histogram }],
        1,
        || process::metrics::Histogram::new(&[0.5, 1.0]),
    );
    let wait = latencies.with(&());
    for seconds in [0.25, 0.5, 0.75, 9.0, f64::NAN] {
        wait.observe(seconds);
    }
    let own = |text: String| -> String {
        text.split_inclusive('\n').filter(|l| !l.contains("culvert_metrics_")).collect()
    };
    assert_eq!(
        own(registry.encode(Format::Prometheus)),
        r#"# HELP culvert_things_total Things \\ with\nlines
# TYPE culvert_things_total counter
culvert_things_total{k="a \"b\" \\ \n"} 3
# HELP culvert_level A "level"
# TYPE culvert_level gauge
culvert_level -4
# HELP culvert_wait_seconds Waits
# TYPE culvert_wait_seconds histogram
culvert_wait_seconds_bucket{le="0.5"} 2
culvert_wait_seconds_bucket{le="1.0"} 3
culvert_wait_seconds_bucket{le="+Inf"} 4
culvert_wait_seconds_sum 10.5
culvert_wait_seconds_count 4
"#
    );
    assert_eq!(
        own(registry.encode(Format::OpenMetrics)),
        r#"# HELP culvert_things Things \\ with\nlines
# TYPE culvert_things counter
culvert_things_total{k="a \"b\" \\ \n"} 3
# HELP culvert_level A \"level\"
# TYPE culvert_level gauge
culvert_level -4
# HELP culvert_wait_seconds Waits
# TYPE culvert_wait_seconds histogram
culvert_wait_seconds_bucket{le="0.5"} 2
culvert_wait_seconds_bucket{le="1.0"} 3
culvert_wait_seconds_bucket{le="+Inf"} 4
culvert_wait_seconds_sum 10.5
culvert_wait_seconds_count 4
# EOF
"#
    );
}

#[test]
fn the_format_is_the_one_asked_for() {
    let prometheus =
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    for (accept, format) in [
        (None, Format::Prometheus),
        (Some(""), Format::Prometheus),
        (Some("*/*"), Format::Prometheus),
        (Some("text/html"), Format::Prometheus),
        (Some(prometheus), Format::OpenMetrics),
        (Some("text/plain;q=0.5, application/openmetrics-text;q=0.1"), Format::Prometheus),
        (Some("application/openmetrics-text;q=0"), Format::Prometheus),
        (Some("application/openmetrics-text"), Format::OpenMetrics),
        (Some("application/openmetrics-text;q=nonsense,,;;="), Format::OpenMetrics),
    ] {
        assert_eq!(Format::negotiate(accept), format, "{accept:?}");
    }
}

fn labels(reporter: Reporter) -> TcpLabels {
    let source = Party {
        workload: "cart".into(),
        canonical_service: "cart-app".into(),
        canonical_revision: "v2".into(),
        namespace: "shop".into(),
        principal: "spiffe://cluster.local/ns/shop/sa/cart".into(),
        cluster: "Kubernetes".into(),
        region: "r1".into(),
        zone: "z1".into(),
    };
    let service = ServiceLabels {
        hostname: "db.shop.svc.cluster.local".into(),
        name: "db".into(),
        namespace: "shop".into(),
    };
    TcpLabels {
        reporter,
        source: Arc::new(source),
        destination: Party::unknown(),
        service,
        security: ConnectionSecurity::MutualTls,
        custom: None,
    }
}

#[test]
fn connections_have_istios_names_and_labels() {
    let registry = Registry::new();
    let tcp = TcpMetrics::new(&registry, 100);
    let handle = tcp.connection(&labels(Reporter::Source));
    handle.opened();
    handle.from_client(100);
    handle.from_server(2000);
    tcp.failed(&labels(Reporter::Source), FailureFlag::Deny);
    let all = |flags: &str| {
        format!(
            concat!(
                r#"{{reporter="source","#,
                r#"source_workload="cart",source_canonical_service="cart-app",source_canonical_revision="v2","#,
                r#"source_workload_namespace="shop","#,
                r#"source_principal="spiffe://cluster.local/ns/shop/sa/cart","#,
                r#"source_app="cart-app",source_version="v2",source_cluster="Kubernetes","#,
                r#"destination_service="db.shop.svc.cluster.local",destination_service_namespace="shop","#,
                r#"destination_service_name="db","#,
                r#"destination_workload="unknown",destination_canonical_service="unknown","#,
                r#"destination_canonical_revision="unknown",destination_workload_namespace="unknown","#,
                r#"destination_principal="unknown",destination_app="unknown",destination_version="unknown","#,
                r#"destination_cluster="unknown","#,
                r#"request_protocol="tcp",response_flags="{}",connection_security_policy="mutual_tls","#,
                r#"source_region="r1",source_zone="z1",destination_region="unknown",destination_zone="unknown"}}"#,
            ),
            flags
        )
    };
    let text = registry.encode(Format::Prometheus);
    let samples = samples(&text);
    for (name, flags, value) in [
        ("istio_tcp_connections_opened_total", "-", 1.0),
        ("istio_tcp_connections_closed_total", "-", 0.0),
        // What the client sent was received by the proxy, whoever reports.
        ("istio_tcp_received_bytes_total", "-", 100.0),
        ("istio_tcp_sent_bytes_total", "-", 2000.0),
        ("istio_tcp_connections_failed_total", "DENY", 1.0),
    ] {
        assert_eq!(samples.get(&format!("{name}{}", all(flags))), Some(&value), "{name}\n{text}");
    }
    assert_eq!(handle.open(), 1);
    handle.closed();
    assert_eq!((handle.open(), tcp.series()), (0, 1));
}

#[test]
fn past_the_limit_series_overflow_and_the_sum_stays_right() {
    const LIMIT: usize = 500;
    const SETS: usize = 100_000;
    let registry = Registry::new();
    let family = registry.family::<Pair, Counter>(
        &[Description { name: "culvert_things", help: "Things", kind: Kind::Counter }],
        LIMIT,
        Counter::default,
    );
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let family = &family;
            scope.spawn(move || {
                for i in 0..SETS {
                    // All threads come by the same sets, in different orders.
                    family.with(&pair(&format!("{}", (i + thread * 25_000) % SETS))).add(2);
                }
            });
        }
    });
    assert_eq!(family.len(), LIMIT + 1);
    let text = registry.encode(Format::Prometheus);
    assert_eq!(sum(&text, "culvert_things_total"), (4 * SETS * 2) as f64);
    let samples = samples(&text);
    assert!(samples["culvert_things_total{k=\"overflow\"}"] > 0.0);
    assert_eq!(samples["culvert_metrics_series{family=\"culvert_things\"}"], LIMIT as f64);
    assert!(samples["culvert_metrics_overflows_total{family=\"culvert_things\"}"] > 0.0);
}

#[test]
fn all_labels_of_the_overflow_series_say_so() {
    let registry = Registry::new();
    let tcp = TcpMetrics::new(&registry, 1);
    tcp.connection(&labels(Reporter::Source)).opened();
    tcp.connection(&labels(Reporter::Destination)).opened();
    let text = registry.encode(Format::Prometheus);
    let line = text
        .lines()
        .find(|l| l.starts_with("istio_tcp_connections_opened_total{reporter=\"overflow\""))
        .unwrap();
    assert_eq!(line.matches("=\"overflow\"").count(), line.matches("=\"").count());
    assert_eq!(line.matches("=\"").count(), 27);
}

#[tokio::test(start_paused = true)]
async fn series_that_nothing_uses_make_room() {
    let registry = Registry::new();
    let family = registry.family::<Pair, Counter>(
        &[Description { name: "culvert_things", help: "Things", kind: Kind::Counter }],
        2,
        Counter::default,
    );
    let long = family.with(&pair("long connection"));
    family.with(&pair("gone")).inc();
    tokio::time::advance(Duration::from_secs(60)).await;
    family.with(&pair("early")).inc();
    assert!(registry.encode(Format::Prometheus).contains("culvert_things_total{k=\"overflow\"} 1"));
    tokio::time::advance(Duration::from_secs(3600)).await;
    family.with(&pair("late")).inc();
    long.inc();
    let text = registry.encode(Format::Prometheus);
    assert!(text.contains("culvert_things_total{k=\"late\"} 1"), "{text}");
    assert!(text.contains("culvert_things_total{k=\"long connection\"} 1"), "a used series was forgotten");
    assert!(!text.contains("{k=\"gone\"}"), "{text}");
    assert!(text.contains("culvert_metrics_evictions_total{family=\"culvert_things\"} 1"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_series_is_kept_for_a_last_scrape_after_its_connection() {
    let registry = Registry::new();
    let family = registry.family::<Pair, Counter>(
        &[Description { name: "culvert_things", help: "Things", kind: Kind::Counter }],
        1,
        Counter::default,
    );
    let long = family.with(&pair("long"));
    tokio::time::advance(Duration::from_secs(24 * 3600)).await;
    let _ = registry.encode(Format::Prometheus); // sees the handle
    long.add(7);
    drop(long);
    tokio::time::advance(Duration::from_secs(60)).await;
    family.with(&pair("new")).inc();
    assert!(registry.encode(Format::Prometheus).contains("culvert_things_total{k=\"long\"} 7"));
}

#[test]
fn scrapes_and_updates_go_on_beside_each_other() {
    const THREADS: u64 = 3;
    const EACH: u64 = 200_000;
    let registry = Registry::new();
    let counters = registry.counters::<Pair>("culvert_things", "Things");
    let waits = registry.latencies::<Pair>("culvert_wait_seconds", "Waits");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (counters, waits) = (&counters, &waits);
                scope.spawn(move || {
                    for i in 0..EACH {
                        let labels = pair(&format!("{}", (i + t) % 200));
                        counters.with(&labels).inc();
                        if i % 100 == 0 {
                            waits.with(&labels).observe(0.001);
                        }
                    }
                })
            })
            .collect();
        let scraper = scope.spawn(|| {
            let (mut last, mut scrapes) = (0.0, 0);
            while !done.load(Ordering::Relaxed) || scrapes == 0 {
                let text = registry.encode(Format::OpenMetrics);
                let all = samples(&text);
                let now = sum(&text, "culvert_things_total");
                assert!(now >= last, "a counter went back");
                last = now;
                for (name, count) in all.iter().filter(|(n, _)| n.starts_with("culvert_wait_seconds_count")) {
                    let labels = name.split_once('{').unwrap().1.trim_end_matches('}');
                    let bucket = format!("culvert_wait_seconds_bucket{{{labels},le=\"+Inf\"}}");
                    assert_eq!(all[&bucket], *count, "count and buckets disagree");
                }
                scrapes += 1;
            }
            scrapes
        });
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert!(scraper.join().unwrap() > 1);
    });
    let text = registry.encode(Format::Prometheus);
    assert_eq!(sum(&text, "culvert_things_total"), (THREADS * EACH) as f64);
    assert_eq!(sum(&text, "culvert_wait_seconds_count"), (THREADS * EACH / 100) as f64);
}

#[test]
fn the_process_reports_itself() {
    let registry = Registry::new();
    process::metrics::register_process(&registry);
    process::metrics::build_info(&registry, "ztunnel", "1.2.3");
    let all = samples(&registry.encode(Format::Prometheus));
    assert_eq!(all["istio_build{component=\"ztunnel\",tag=\"1.2.3\"}"], 1.0);
    let before = all["process_open_fds"];
    let files: Vec<_> = (0..10).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    let after = samples(&registry.encode(Format::Prometheus))["process_open_fds"];
    drop(files);
    assert!(after >= before + 5.0 && before > 2.0, "{before} {after}"); // other tests open and close some too
    assert!(all["process_max_fds"] >= before);
    assert!(all["process_resident_memory_bytes"] > 1e6);
    assert!(all["process_cpu_seconds_total"] > 0.0);
}
