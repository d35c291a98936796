//! Step 4: a waypoint in front of a service. Requests are routed and policed by what they ask for; whoever goes around it
//! is refused by the destination's node.

use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use crate::admin;
use crate::demo::{Demo, programs};
use crate::lab::NodeId;
use crate::lab::manifests::WAYPOINT;

/// The Gateway that the waypoint is, and the label by which the Service `catalog` is bound to it. The first stands before the
/// waypoint; the second once it is ready.
const GATEWAY: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: waypoint
  namespace: shop
spec:
  gatewayClassName: culvert-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: catalog
  namespace: shop
spec:
  parentRefs:
  - group: \"\"
    kind: Service
    name: catalog
    port: 80
  rules:
  - matches:
    - headers:
      - name: x-preview
        value: \"yes\"
    backendRefs:
    - name: catalog-2
      port: 80
    filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier:
        add:
        - name: x-route
          value: preview
  - backendRefs:
    - name: catalog
      port: 80
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: catalog-is-read
  namespace: shop
spec:
  targetRefs:
  - group: \"\"
    kind: Service
    name: catalog
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/shop/sa/frontend]
    to:
    - operation:
        methods: [GET]
";

/// The Service `catalog` again, bound.
const BOUND: &str = "apiVersion: v1
kind: Service
metadata:
  name: catalog
  namespace: shop
  labels:
    istio.io/use-waypoint: waypoint
spec:
  clusterIP: 10.96.0.24
  clusterIPs: [10.96.0.24, \"fd00:10:96::18\"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector:
    app: catalog
  ports:
  - name: http
    port: 80
    targetPort: 8080
";

/// A change of the directory must be in force by then, and the waypoint ready.
const LIMIT: Duration = Duration::from_secs(15);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let before = demo.catalog("frontend", &[])?;
    demo.report.ran(&before);
    demo.report.claim(before.stdout.starts_with("catalog: GET"), "the Service catalog, without a waypoint");
    start(demo)?;
    let since = Instant::now();
    demo.manifests.put("service-catalog", BOUND)?;
    demo.report.say("HTTPRoute: x-preview goes to catalog-2; AuthorizationPolicy: frontend may GET");
    let stop = demo.lab.stop().clone();
    let passes = stop.wait_until(LIMIT, || {
        Ok(demo.catalog("frontend", &["-H", "x-preview: yes"])?.stdout.starts_with("catalog-2: GET"))
    })?;
    demo.report.claim(
        passes,
        format!("catalog is bound: requests pass the waypoint after {} ms", since.elapsed().as_millis()),
    );
    routed(demo)?;
    policed(demo)?;
    explained(demo)?;
    bypassed(demo)?;
    metrics(demo)
}

/// The waypoint, in its pod.
fn start(demo: &mut Demo) -> Result<()> {
    demo.manifests.put("catalog-routes", GATEWAY)?;
    let netns = demo.lab.pod(WAYPOINT)?.netns.clone();
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let (program, config) = (text(&demo.waypoint), text(&demo.options.config_dir));
    let (ca, state) = (text(&demo.options.ca_dir), text(&demo.lab.dir().join("state-waypoint")));
    let argv = [
        &*program,
        "--gateway",
        "shop/waypoint",
        "--config-dir",
        &*config,
        "--ca-dir",
        &*ca,
        "--state-dir",
        &*state,
        "--node",
        NodeId::Two.name(),
    ];
    demo.lab.spawn(&netns, WAYPOINT, &argv)?;
    let since = Instant::now();
    let ready = demo.waypoint_at(admin::READINESS)?;
    let stop = demo.lab.stop().clone();
    let is_ready = stop.wait_until(LIMIT, || Ok(ready.get("/healthz/ready").is_ok()))?;
    demo.report.claim(
        is_ready,
        format!(
            "a waypoint runs as the Gateway shop/waypoint, ready after {} ms",
            since.elapsed().as_millis()
        ),
    );
    Ok(())
}

fn routed(demo: &mut Demo) -> Result<()> {
    let plain = demo.catalog("frontend", &[])?;
    demo.report.ran(&plain);
    demo.report.claim(plain.stdout.starts_with("catalog: GET /"), "a request without the header: catalog");
    let preview = demo.catalog("frontend", &["-i", "-H", "x-preview: yes"])?;
    demo.report.ran(&preview);
    demo.report.claim(
        preview.stdout.contains("catalog-2: GET /") && preview.stdout.contains("x-route: preview"),
        "with the header: catalog-2, and the response has the field that the route adds",
    );
    Ok(())
}

fn policed(demo: &mut Demo) -> Result<()> {
    let code = ["-o", "/dev/null", "-w", "%{http_code}"];
    let post = demo.catalog("frontend", &[&["-X", "POST"], &code[..]].concat())?;
    demo.report.ran(&post);
    demo.report.claim(post.stdout == "403", "a POST of frontend is refused with 403: it may GET");
    let batch = demo.catalog("batch", &code)?;
    demo.report.ran(&batch);
    demo.report.claim(
        batch.stdout == "403",
        "batch is refused: the waypoint knows who it is, by the identity that its node has proved",
    );
    Ok(())
}

/// What the waypoint decided over the requests just now, from where it runs.
fn explained(demo: &mut Demo) -> Result<()> {
    let asked: [(&[&str], &[&str]); 3] = [
        (&["--method", "POST"], &["403", "shop/frontend", "denied", "policy shop/", "clause"]),
        (
            &["--path", "/", "--status", "200"],
            &["allowed by policy shop/", "route HTTPRoute shop/", "over HBONE"],
        ),
        (&["--source", "shop/batch"], &["403", "sa/batch"]),
    ];
    for (flags, wanted) in asked {
        let why = demo.culvert_in(WAYPOINT, &[&["why", "--waypoint"], flags].concat())?;
        demo.report.ran(&why);
        let missing: Vec<_> = wanted.iter().filter(|w| !why.stdout.contains(**w)).collect();
        let claim = if missing.is_empty() {
            "the waypoint says why, by policy and clause, route and hop".to_owned()
        } else {
            format!("the waypoint's explanation has: {}; missing: {missing:?}", wanted.join(", "))
        };
        demo.report.claim(missing.is_empty(), claim);
    }
    let routes = demo.culvert_in(WAYPOINT, &["proxy-config", "route"])?;
    demo.report.ran(&routes);
    let shows = routes.stdout.contains("HTTPRoute shop/") && routes.stdout.contains("catalog-2");
    demo.report.claim(shows, "culvert proxy-config shows its routes");
    Ok(())
}

/// The pod's own address, past the waypoint.
fn bypassed(demo: &mut Demo) -> Result<()> {
    let url = format!("http://{}:{}/", demo.lab.pod("catalog")?.v4, programs::WEB_PORT);
    let direct = demo.curl("frontend", &[], &url)?;
    demo.report.ran(&direct);
    demo.report.claim(!direct.success, "frontend on the pod's own address: refused by the pod's node");
    let plain = demo.curl("legacy", &[], &url)?;
    demo.report.ran(&plain);
    demo.report.claim(!plain.success, "and a client outside the mesh in plaintext: refused too");
    Ok(())
}

fn metrics(demo: &mut Demo) -> Result<()> {
    let at = demo.waypoint_at(admin::METRICS)?;
    let text = String::from_utf8_lossy(&at.get("/metrics")?).into_owned();
    let line = text.lines().find(|line| {
        line.starts_with("istio_requests_total{")
            && line.contains("response_code=\"403\"")
            && line.contains("reporter=\"waypoint\"")
    });
    if let Some(line) = line {
        demo.report.say(&format!("    {}", super::cost::shortened(line)));
    }
    demo.report.claim(line.is_some(), "its metrics have the refused requests under Istio's names");
    Ok(())
}

impl Demo {
    /// `curl` on the Service catalog, with its answer as the output.
    fn catalog(&self, pod: &str, options: &[&str]) -> Result<crate::lab::Ran> {
        let mut argv = vec!["curl", "-sS", "-m", "5"];
        argv.extend(options);
        argv.push("http://catalog/");
        let mut ran = self.lab.run(pod, &argv)?;
        ran.line =
            argv.iter().filter(|a| !matches!(**a, "-sS" | "-m" | "5")).copied().collect::<Vec<_>>().join(" ");
        Ok(ran)
    }

    fn waypoint_at(&self, at: std::net::SocketAddr) -> Result<admin::Address> {
        Ok(admin::Address::Here { namespace: Some(self.lab.pod(WAYPOINT)?.netns_path()), at })
    }
}
