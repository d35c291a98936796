//! Step 2: a client outside the mesh, under PERMISSIVE and under STRICT.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use super::web_service;
use crate::demo::{Demo, programs};
use crate::lab::NodeId;
use crate::lab::wire::Watch;
use crate::load::{self, Shape};

/// Plaintext is refused in `shop`.
const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: shop
spec:
  mtls:
    mode: STRICT
";

/// A change of the directory must be in force by then.
const LIMIT: Duration = Duration::from_secs(5);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    permissive(demo)?;
    let web = demo.web_pod()?;
    let from_outside = |shape| demo.web_load("legacy", web, shape);
    // One client that connects again and again, and one connection that is there before.
    let connects = load::start(from_outside(Shape::Connects { parallel: 1 })?)?;
    let held = load::start(from_outside(Shape::Closed { connections: 1, reconnect: false })?)?;
    let under_way = || Ok(connects.live().answered() > 5 && held.live().answered() > 5);
    let running = demo.lab.stop().wait_until(LIMIT, under_way)?;
    demo.report.claim(running, "connections from outside are made and held all the time");

    let since = Instant::now();
    demo.manifests.put("strict", STRICT)?;
    demo.report.say("PeerAuthentication default in shop with mode STRICT is written into the directory");
    let failed = |live: &load::Live| live.failed.load(Ordering::Relaxed) > 0;
    let refused = demo.lab.stop().wait_until(LIMIT, || Ok(failed(connects.live())))?;
    let took = since.elapsed();
    demo.report.claim(
        refused,
        format!(
            "new plaintext connections are refused, {:.1} ms after the file was there",
            took.as_secs_f64() * 1000.0
        ),
    );
    demo.report.measured("strict_in_force_after", "ms", took.as_secs_f64() * 1000.0, None);
    let cut = demo.lab.stop().wait_until(LIMIT, || Ok(failed(held.live())))?;
    let cut_after = since.elapsed();
    demo.report.claim(
        cut,
        format!(
            "the plaintext connection that was open is cut, after {:.1} ms",
            cut_after.as_secs_f64() * 1000.0
        ),
    );
    let answered = connects.live().answered();
    demo.lab.stop().sleep(Duration::from_millis(300))?;
    let later = connects.live().answered();
    demo.report.claim(later == answered, "and none got through afterwards");
    drop((connects.finish()?, held.finish()?));
    afterwards(demo)
}

/// What is plain to read is found by the same search that found nothing before.
fn permissive(demo: &mut Demo) -> Result<()> {
    let url = format!("http://{}/", demo.web_pod()?);
    let watch = Watch::start(&demo.lab.node_netns(NodeId::One), programs::PAYLOAD)?;
    let page = demo.curl("legacy", &[], &url)?;
    let seen = watch.finish()?;
    demo.report.ran(&page);
    demo.report
        .claim(page.stdout.starts_with("200"), "PERMISSIVE: the client outside the mesh gets the page");
    demo.report
        .claim(seen.hits > 0, format!("its payload can be read on the link ({} packets hold it)", seen.hits));
    Ok(())
}

fn afterwards(demo: &mut Demo) -> Result<()> {
    let url = format!("http://{}/", demo.web_pod()?);
    let page = demo.curl("legacy", &[], &url)?;
    demo.report.ran(&page);
    demo.report.claim(!page.success, "STRICT: the client outside the mesh is refused");
    let source = demo.lab.pod("legacy")?.v4.to_string();
    let why = demo.culvert_on(NodeId::Two, &["why", "--source", &source, "--destination", "shop/web"])?;
    demo.report.ran(&why);
    demo.report.claim(
        why.success && why.stdout.contains("refused"),
        "culvert why says that it was refused, and by what",
    );
    let inside = demo.curl("frontend", &[], &format!("http://{}/", web_service()))?;
    demo.report.ran(&inside);
    demo.report.claim(inside.stdout.starts_with("200"), "the client in the mesh is served as before");
    Ok(())
}
