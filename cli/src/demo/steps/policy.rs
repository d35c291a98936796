//! Step 3: an AuthorizationPolicy, and the explanation of what it decided.

use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use crate::demo::Demo;
use crate::lab::NodeId;

/// Only the frontend may talk to web.
const ALLOW_FRONTEND: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: web-for-frontend
  namespace: shop
spec:
  selector:
    matchLabels:
      app: web
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [cluster.local/ns/shop/sa/frontend]
    to:
    - operation:
        ports: [\"8080\"]
";

/// A change of the directory must be in force by then.
const LIMIT: Duration = Duration::from_secs(5);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let before = demo.curl("batch", &[], "http://web/")?;
    demo.report.ran(&before);
    demo.report.claim(before.stdout.starts_with("200"), "without a policy, batch may call web");
    let since = Instant::now();
    demo.manifests.put("web-for-frontend", ALLOW_FRONTEND)?;
    demo.report.say("AuthorizationPolicy shop/web-for-frontend: ALLOW principal …/sa/frontend to port 8080");
    let stop = demo.lab.stop().clone();
    let refused = stop.wait_until(LIMIT, || Ok(!demo.curl("batch", &[], "http://web/")?.success))?;
    demo.report.claim(
        refused,
        format!(
            "batch is refused, at the latest {} ms after the file was there",
            since.elapsed().as_millis()
        ),
    );
    let batch = demo.curl("batch", &[], "http://web/")?;
    demo.report.ran(&batch);
    demo.report.claim(!batch.success, "and stays refused");
    why(demo, "shop/batch", &["refused", "shop/web-for-frontend", "rule 0", "clause 0", "sa/batch"])?;
    let frontend = demo.curl("frontend", &[], "http://web/")?;
    demo.report.ran(&frontend);
    demo.report.claim(frontend.stdout.starts_with("200"), "frontend is let in");
    why(demo, "shop/frontend", &["allowed", "shop/web-for-frontend", "rule 0", "clause 0"])?;
    what_if(demo)
}

fn why(demo: &mut Demo, source: &str, wanted: &[&str]) -> Result<()> {
    let why = demo.culvert_on(NodeId::Two, &["why", "--source", source, "--destination", "shop/web"])?;
    demo.report.ran(&why);
    let missing: Vec<_> = wanted.iter().filter(|w| !why.stdout.contains(**w)).collect();
    let claim = if missing.is_empty() {
        format!("the explanation names policy, rule and clause for {source}")
    } else {
        format!("the explanation for {source} has: {}; missing: {missing:?}", wanted.join(", "))
    };
    demo.report.claim(missing.is_empty(), claim);
    Ok(())
}

/// The same question without a connection: of the files.
fn what_if(demo: &mut Demo) -> Result<()> {
    let dir = demo.manifests.dir().to_string_lossy().into_owned();
    let args = ["what-if", &dir, "--source", "shop/batch", "--destination", "shop/web", "--port", "80"];
    let answer = demo.culvert_on(NodeId::Two, &args)?;
    demo.report.ran(&answer);
    demo.report.claim(
        answer.stdout.contains("refused") && answer.stdout.contains("shop/web-for-frontend"),
        "culvert what-if decides the same from the files alone",
    );
    Ok(())
}
