//! Step 6: ztunnel killed under load. Capture stays in the pods, so their traffic has nowhere to go.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use tokio::time::Instant;

use super::web_service;
use crate::demo::{Demo, programs};
use crate::lab::wire::{Seen, Watch};
use crate::lab::{NodeId, Pod};
use crate::load::{self, Running, Shape};

/// How long the mesh stays dead.
const DEAD: Duration = Duration::from_millis(1500);
/// Traffic must flow again by then.
const LIMIT: Duration = Duration::from_secs(15);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let closed = Shape::Closed { connections: 8, reconnect: true };
    let inside = load::start(demo.web_load("frontend", web_service(), closed)?)?;
    let outside = load::start(demo.web_load("legacy", demo.web_pod()?, Shape::Connects { parallel: 2 })?)?;
    let stop = demo.lab.stop().clone();
    let flows = stop.wait_until(LIMIT, || Ok(inside.live().answered() > 500))?;
    demo.report
        .claim(flows, "load from frontend on web, through the mesh; legacy tries in plaintext without end");

    let watch = Watch::start(&demo.lab.node_netns(NodeId::One), programs::PAYLOAD)?;
    for node in NodeId::ALL {
        let pid = demo.lab.ztunnel(node)?.pid();
        demo.lab.ztunnel_mut(node)?.kill()?;
        demo.report.say(&format!("{}: kill -9 {pid} (ztunnel)", node.name()));
    }
    let dead_since = SystemTime::now();
    // Answers that were in the application's socket when ztunnel died.
    stop.sleep(Duration::from_millis(200))?;
    let at_death = inside.live().answered();
    stop.sleep(DEAD)?;
    let meanwhile = inside.live().answered() - at_death;
    let seen = watch.finish()?;
    demo.report.claim(
        meanwhile == 0,
        format!("{meanwhile} requests of enrolled pods were answered while it was dead"),
    );
    check_link(demo, &seen, dead_since)?;
    restart(demo, inside, outside)
}

/// No accepting answer outside the tunnel, and no attempt of an enrolled pod at one.
fn check_link(demo: &mut Demo, seen: &Seen, since: SystemTime) -> Result<()> {
    let plain = || seen.packets.iter().filter(|p| p.at >= since && !p.is_hbone());
    let accepted = plain().filter(|p| p.is_syn_ack()).count();
    let enrolled: Vec<_> =
        demo.lab.pods().iter().filter(|p| p.plan.namespace == "shop").flat_map(Pod::ips).collect();
    let leaked = plain().filter(|p| p.is_syn() && enrolled.contains(&p.source.0)).count();
    let knocked = plain().filter(|p| p.is_syn()).count();
    demo.report.claim(
        accepted == 0 && seen.dropped == 0,
        format!(
            "on the link since then ({} missed): {accepted} plaintext SYN-ACK, {knocked} plaintext SYN of legacy",
            seen.dropped
        ),
    );
    demo.report.claim(knocked > 0, "there were plaintext SYNs that could have been answered");
    demo.report.claim(leaked == 0, format!("plaintext SYN of enrolled pods: {leaked}"));
    demo.report.claim(seen.hits == 0, format!("packets with the payload: {}", seen.hits));
    Ok(())
}

fn restart(demo: &mut Demo, inside: Running, outside: Running) -> Result<()> {
    let answered = inside.live().answered();
    let since = Instant::now();
    demo.start_ztunnels()?;
    let stop = demo.lab.stop().clone();
    let back = stop.wait_until(LIMIT, || Ok(inside.live().answered() > answered))?;
    let took = since.elapsed();
    demo.report.claim(
        back,
        format!("both ztunnels started again: requests are answered after {} ms", took.as_millis()),
    );
    demo.report.measured("answered_after_restart", "ms", took.as_secs_f64() * 1000.0, None);
    stop.sleep(Duration::from_millis(200))?;
    let inside = inside.finish()?;
    let outside = outside.finish()?;
    demo.report.say(&format!("frontend: {} answers, failures: {}", inside.requests, inside.failures_shown()));
    demo.report.say(&format!("legacy: {} answers, failures: {}", outside.requests, outside.failures_shown()));
    demo.report.claim(outside.requests == 0, "legacy got no answer at any time");
    let page = demo.curl("frontend", &[], "http://web/")?;
    demo.report.ran(&page);
    demo.report.claim(page.stdout.starts_with("200"), "and it works again");
    Ok(())
}
