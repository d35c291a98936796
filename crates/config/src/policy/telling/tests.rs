//! What resources come to for a service, from their text to the model.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::sync::Arc;

use model::telemetry::{
    LogEntries, LogFormat, LogService, LogSink, LogText, MetricName, SpanProtocol, Telemetry,
};
use model::{Change, Mesh, Str};

use crate::compile::Options;
use crate::diagnostic::Severity;
use crate::repository::{Content, Repository};

const WORLD: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: waypoint, namespace: shop, labels: {istio.io/use-waypoint: none}}
spec: {clusterIP: 10.96.0.9, ports: [{port: 15008}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: shelf, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
";

const PROVIDERS: &str = r"
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  extensionProviders:
    - {name: otel, opentelemetry: {service: otel.obs.svc.cluster.local, port: 4317}}
    - {name: zipkin, zipkin: {service: obs/zipkin.obs.svc.cluster.local, port: 9411, path: /spans}}
    - {name: file, envoyFileAccessLog: {path: /var/log/a, logFormat: {labels: {code: '%RESPONSE_CODE%'}}}}
";

struct World {
    repository: Repository,
    mesh: Mesh,
}

impl World {
    fn new() -> Self {
        let mut world = Self { repository: Repository::new(Options::default()), mesh: Mesh::default() };
        world.set("world", WORLD);
        world
    }

    fn set(&mut self, file: &str, text: &str) {
        let file: Arc<str> = file.into();
        let outcome = self.repository.apply(&file, Content::Bytes(text.as_bytes()));
        let mut said = self.repository.diagnostics().into_iter();
        let error = said.find(|d| d.file == file && d.severity == Severity::Error);
        assert!(error.is_none(), "{error:?}");
        self.mesh = self.mesh.apply(outcome.changes);
    }

    fn telemetry(&mut self, name: &str, namespace: &str, spec: &str) {
        let text = format!(
            "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        );
        self.set(&format!("{namespace}-{name}"), &text);
    }

    fn told(&self, service: &str) -> Arc<Telemetry> {
        let host = format!("{service}.shop.svc.cluster.local");
        let found = self.mesh.http_services().find(|s| *s.service.hostname == *host);
        found.unwrap_or_else(|| panic!("no {host}")).telemetry.clone()
    }
}

#[test]
fn what_nobody_says_of_sampling_is_the_meshs() {
    let mut world = World::new();
    world.set("mesh", PROVIDERS);
    world.telemetry("mesh", "istio-system", "{tracing: [{providers: [{name: otel}]}]}");
    let sampled = |world: &World| world.told("cart").tracing.as_ref().unwrap().sampling.millionths();
    assert_eq!(sampled(&world), 10_000, "upstream's default is one in a hundred");
    for (says, share) in [
        ("{sampling: 25}", 250_000),
        ("{sampling: 0}", 10_000),
        ("{sampling: '0.5'}", 5_000),
        ("{sampling: null}", 10_000),
        ("{sampling: 150}", 10_000),
        ("null", 10_000),
    ] {
        let config = format!("{PROVIDERS}  defaultConfig: {{tracing: {says}}}\n");
        world.set("mesh", &config);
        assert_eq!(sampled(&world), share, "{config}");
    }
    world.telemetry("own", "shop", "{tracing: [{randomSamplingPercentage: 0}]}");
    assert_eq!(sampled(&world), 0);
}

#[test]
fn levels_go_over_each_other() {
    let mut world = World::new();
    assert_eq!(*world.told("cart"), Telemetry::default(), "nobody has said anything");
    world.set("mesh", PROVIDERS);
    world.telemetry(
        "mesh",
        "istio-system",
        "{tracing: [{providers: [{name: otel}], randomSamplingPercentage: 1.5}]}",
    );
    let tracing = world.told("cart").tracing.clone().unwrap();
    assert_eq!((tracing.sampling.millionths(), tracing.report), (15_000, true));
    assert_eq!(tracing.exporter.protocol, SpanProtocol::OtlpGrpc);
    assert_eq!((&*tracing.collector.host, tracing.collector.port), ("otel.obs.svc.cluster.local", 4317));
    // What a level does not say is as the one above has it.
    world.telemetry("own", "shop", "{tracing: [{disableSpanReporting: true}]}");
    let target = "targetRefs: [{group: '', kind: Service, name: cart}]";
    world.telemetry("cart", "shop", &format!("{{{target}, tracing: [{{providers: [{{name: zipkin}}]}}]}}"));
    let (cart, shelf) = (world.told("cart"), world.told("shelf"));
    let (cart, shelf) = (cart.tracing.as_ref().unwrap(), shelf.tracing.as_ref().unwrap());
    assert_eq!(cart.exporter.protocol, SpanProtocol::Zipkin { path: "/spans".into() });
    assert_eq!(shelf.exporter.protocol, SpanProtocol::OtlpGrpc);
    assert!(!cart.report && !shelf.report && cart.sampling == shelf.sampling);
    // Another namespace's is none of theirs.
    world.telemetry("other", "elsewhere", "{accessLogging: [{providers: [{name: envoy}]}]}");
    assert_eq!(world.told("cart").logs, None);
}

#[test]
fn services_of_which_the_same_is_told_share_it() {
    let mut world = World::new();
    world.telemetry("own", "shop", "{accessLogging: [{providers: [{name: envoy}]}]}");
    assert!(Arc::ptr_eq(&world.told("cart"), &world.told("shelf")));
}

#[test]
fn logs_are_where_and_what_is_said() {
    let mut world = World::new();
    world.set("mesh", PROVIDERS);
    world.telemetry("a", "istio-system", "{accessLogging: [{providers: [{name: file}, {name: envoy}]}]}");
    let paths = |world: &World| -> Vec<String> {
        let told = world.told("cart");
        let path = |log: &model::telemetry::AccessLog| {
            let LogSink::File { path, .. } = &log.sink else { panic!("{log:?}") };
            path.to_string()
        };
        told.logs.as_deref().unwrap().iter().map(path).collect()
    };
    assert_eq!(paths(&world), ["/dev/stdout", "/var/log/a"]);
    // One of them is for failures only, the other is turned off.
    world.telemetry(
        "b",
        "shop",
        "{accessLogging: [{providers: [{name: file}], filter: {expression: response.code >= 500}}]}",
    );
    assert_eq!(paths(&world), ["/var/log/a"]);
    let told = world.told("cart");
    let log = &told.logs.as_deref().unwrap()[0];
    assert_eq!(&**log.filter.as_ref().unwrap().source(), "response.code >= 500");
    let LogSink::File { format, .. } = &log.sink else { panic!("{log:?}") };
    assert!(matches!(format, LogFormat::JsonOf(fields) if fields.len() == 1 && &*fields[0].0 == "code"));
    world.telemetry("b", "shop", "{accessLogging: [{disabled: true}]}");
    assert!(world.told("cart").logs.as_deref().unwrap().is_empty());
}

#[test]
fn the_meshs_own_log_is_for_those_of_whom_nobody_says_anything() {
    let mut world = World::new();
    let config = |spec: &str| {
        format!(
            "apiVersion: mesh.istio.io/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec: {spec}\n"
        )
    };
    world.set("mesh", &config("{accessLogFile: /dev/stdout, accessLogEncoding: JSON}"));
    let told = world.told("cart");
    let LogSink::File { path, format } = &told.logs.as_deref().unwrap()[0].sink else { panic!("{told:?}") };
    assert_eq!(&**path, "/dev/stdout");
    assert!(
        matches!(format, LogFormat::JsonOf(fields) if fields.iter().any(|(name, _)| &**name == "response_flags"))
    );
    // Its format is that of the provider that there is without being defined, too.
    world.set(
        "mesh",
        &config("{accessLogFormat: '%RESPONSE_CODE%', defaultProviders: {accessLogging: [envoy]}}"),
    );
    let told = world.told("cart");
    let LogSink::File { format, .. } = &told.logs.as_deref().unwrap()[0].sink else { panic!("{told:?}") };
    assert!(matches!(format, LogFormat::TextOf(text) if &**text.source() == "%RESPONSE_CODE%"));
}

#[test]
fn metrics_are_changed_one_by_one() {
    let mut world = World::new();
    world.telemetry(
        "m",
        "istio-system",
        "{metrics: [{overrides: [
           {tagOverrides: {host: {value: request.host}}},
           {match: {metric: REQUEST_COUNT, mode: SERVER}, tagOverrides: {host: {operation: REMOVE}}},
           {match: {metric: REQUEST_SIZE, mode: CLIENT}, disabled: true},
           {match: {metric: RESPONSE_SIZE}, disabled: true}]}]}",
    );
    let told = world.told("cart");
    let rule = |metric| told.metrics.rules.iter().find(|rule| rule.metric == metric).unwrap();
    assert_eq!(told.metrics.rules.len(), MetricName::ALL.len());
    assert!(rule(MetricName::RequestCount).tags[0].value.is_none(), "the later one counts");
    assert!(rule(MetricName::RequestDuration).tags[0].value.is_some());
    assert!(!rule(MetricName::RequestSize).disabled, "a waypoint is on the server's side");
    assert!(rule(MetricName::ResponseSize).disabled && !told.metrics.disabled);
    // Given to another provider only.
    world.telemetry("m", "istio-system", "{metrics: [{providers: [{name: stackdriver}]}]}");
    assert!(world.told("cart").metrics.disabled);
}

#[test]
fn what_goes_is_not_told_any_more() {
    let mut world = World::new();
    world.telemetry("own", "shop", "{accessLogging: [{providers: [{name: envoy}]}]}");
    assert!(world.told("cart").logs.is_some());
    let outcome = world.repository.apply(&"shop-own".into(), Content::Gone);
    assert!(outcome.changes.iter().any(|change| matches!(change, Change::SetHttpService(_))));
    world.mesh = world.mesh.apply(outcome.changes);
    assert_eq!(world.told("cart").logs, None);
}

/// What a change costs: services compiled, and services of which something else is told.
fn cost(world: &mut World, file: &str, text: &str) -> (u64, usize) {
    let before = world.repository.steps();
    let content = if text.is_empty() { Content::Gone } else { Content::Bytes(text.as_bytes()) };
    let outcome = world.repository.apply(&file.into(), content);
    let told = outcome.changes.iter().filter(|change| matches!(change, Change::SetHttpService(_))).count();
    assert_eq!(told, outcome.changes.len(), "{:?}", outcome.changes);
    world.mesh = world.mesh.apply(outcome.changes);
    // One step is the resource itself, where there is one.
    ((world.repository.steps() - before).saturating_sub(1), told)
}

#[test]
fn a_telemetry_touches_the_services_that_it_is_for() {
    let mut world = World::new();
    let mut text = String::new();
    for number in 0..300 {
        let namespace = if number < 200 { "shop" } else { "elsewhere" };
        text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: {namespace}}}\n\
             spec: {{clusterIP: 10.97.{}.{}, ports: [{{port: 80}}]}}\n",
            number / 200,
            number % 200
        );
    }
    world.set("services", &text);
    let telemetry = |namespace: &str, target: &str, lines: &str| {
        format!(
            "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: t, namespace: {namespace}}}\n\
             spec: {{{target}accessLogging: [{lines}]}}\n"
        )
    };
    // `cart` and `shelf` beside the 200; the waypoint's own Service is bound to none.
    const SHOP: usize = 202;
    let one = "targetRefs: [{group: '', kind: Service, name: s7}], ";
    let on = "{providers: [{name: envoy}]}";
    assert_eq!(cost(&mut world, "t", &telemetry("shop", one, on)), (1, 1));
    assert_eq!(cost(&mut world, "t", &telemetry("shop", one, "{disabled: true}")), (1, 1));
    // From one service to another: both.
    assert_eq!(cost(&mut world, "t", &telemetry("shop", &one.replace("s7", "s8"), on)), (2, 2));
    assert_eq!(cost(&mut world, "t", &telemetry("shop", &one.replace("s7", "nobody"), on)), (1, 1));
    assert_eq!(cost(&mut world, "t", &telemetry("shop", "selector: {matchLabels: {a: b}}, ", on)), (0, 0));
    assert_eq!(cost(&mut world, "t", ""), (0, 0));
    assert_eq!(cost(&mut world, "t", &telemetry("elsewhere", "", on)), (0, 0), "no waypoint is there");
    assert_eq!(cost(&mut world, "t", &telemetry("elsewhere", one, on)), (0, 0), "nor a service of the name");
    assert_eq!(cost(&mut world, "t", ""), (0, 0));
    let gateway = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}], ";
    assert_eq!(cost(&mut world, "t", &telemetry("shop", gateway, on)), (SHOP as u64, SHOP));
    let class =
        "targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}], ";
    assert_eq!(
        cost(&mut world, "c", &telemetry("shop", class, "{disabled: true}")),
        (0, 0),
        "not in the root"
    );
    assert_eq!(cost(&mut world, "m", &telemetry("istio-system", "", on)), (SHOP as u64, 0), "no difference");
    assert_eq!(world.told("s7").logs.as_deref().map(<[_]>::len), Some(1));
}

#[test]
fn logs_go_to_services_that_take_them() {
    let mut world = World::new();
    let providers = r"
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  extensionProviders:
    - name: als
      envoyHttpAls:
        service: obs/als.obs.svc.cluster.local
        port: 9000
        additionalRequestHeadersToLog: [X-User]
    - {name: tcp, envoyTcpAls: {service: als.obs.svc.cluster.local, port: 9000, logName: bytes}}
    - {name: otlp, envoyOtelAls: {service: otel.obs.svc.cluster.local, port: 4317}}
    - name: texts
      envoyOtelAls:
        service: otel.obs.svc.cluster.local
        port: 4317
        logName: mine
        logFormat: {text: '%RESPONSE_CODE%', labels: {path: '%REQ(:PATH)%'}}
";
    world.set("mesh", providers);
    world.telemetry("t", "shop", "{accessLogging: [{providers: [{name: als}, {name: tcp}]}]}");
    let told = world.told("cart");
    let services: Vec<_> = told.logs.as_deref().unwrap().iter().map(|log| &log.sink).collect();
    let [LogSink::Service(http), LogSink::Service(tcp)] = services[..] else { panic!("{services:?}") };
    let LogEntries::Requests { request_headers, .. } = &http.entries else { panic!("{http:?}") };
    assert_eq!(tcp.entries, LogEntries::Connections);
    assert_eq!((&*http.name, &*tcp.name), ("http_envoy_accesslog", "bytes"));
    assert_eq!((&*http.collector.host, http.collector.port), ("als.obs.svc.cluster.local", 9000));
    assert_eq!(http.collector.namespace.as_deref(), Some("obs"));
    assert_eq!(request_headers.iter().map(|name| &**name).collect::<Vec<_>>(), ["x-user"]);
    world.telemetry("t", "shop", "{accessLogging: [{providers: [{name: otlp}, {name: texts}]}]}");
    let told = world.told("cart");
    let services: Vec<_> = told.logs.as_deref().unwrap().iter().map(|log| &log.sink).collect();
    let [LogSink::Service(plain), LogSink::Service(texts)] = services[..] else { panic!("{services:?}") };
    let parts = |service: &LogService| {
        let LogEntries::Otlp { body, attributes } = &service.entries else { panic!("{service:?}") };
        let one = |(name, text): &(Str, LogText)| format!("{name}={}", text.source());
        (service.name.to_string(), body.source().to_string(), attributes.iter().map(one).collect::<Vec<_>>())
    };
    let (name, body, attributes) = parts(plain);
    assert!(name == "otel_envoy_accesslog" && attributes.is_empty());
    assert!(body.starts_with("[%START_TIME%] \"%REQ(:METHOD)%"), "{body}");
    let mine = ("mine".to_owned(), "%RESPONSE_CODE%".to_owned(), vec!["path=%REQ(:PATH)%".to_owned()]);
    assert_eq!(parts(texts), mine);
}
