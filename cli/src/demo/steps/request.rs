//! Step 1: requests across nodes, the identity that the server's side saw, and what the link carried.

use anyhow::Result;

use crate::demo::{Demo, programs};
use crate::lab::NodeId;
use crate::lab::wire::Watch;

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let watch = Watch::start(&demo.lab.node_netns(NodeId::One), programs::PAYLOAD)?;
    demo.report.say(&format!("node-1's end of the link is being captured: {}", watch.line()));
    web(demo)?;
    redis_and_mail(demo)?;
    let seen = watch.finish()?;
    identity(demo)?;
    let tunnelled = seen.packets.iter().filter(|p| p.is_hbone()).count();
    let plain = seen.packets.iter().filter(|p| p.tcp_flags.is_some() && !p.is_hbone()).count();
    demo.report.claim(
        seen.hits == 0 && seen.dropped == 0 && tunnelled > 0,
        format!(
            "the capture has {} packets ({:.1} kB, {} missed), and \"{}\" is in {} of them",
            seen.frames,
            seen.bytes as f64 / 1000.0,
            seen.dropped,
            programs::PAYLOAD,
            seen.hits
        ),
    );
    demo.report.claim(
        plain == 0,
        format!("TCP outside the tunnel (port 15008): {plain} packets, inside: {tunnelled}"),
    );
    datagrams(demo)
}

/// HTTP by name, over both families.
fn web(demo: &mut Demo) -> Result<()> {
    let names = demo.lab.run("frontend", &["getent", "ahosts", "web"])?;
    demo.report.ran_showing(
        &names,
        &names.stdout.lines().filter(|l| l.contains("STREAM")).collect::<Vec<_>>().join("\n"),
    );
    demo.report.claim(
        names.stdout.contains("10.96.0.21"),
        "the pod's resolver knows the Service (ztunnel's DNS proxy answers)",
    );
    let page = demo.lab.run("frontend", &["curl", "-4", "-sS", "-m", "5", "http://web/"])?;
    let first = page.stdout.lines().next().unwrap_or_default().to_owned();
    demo.report.ran_showing(
        &page,
        &if page.success {
            format!("{first} … ({} bytes)", page.stdout.len())
        } else {
            page.stderr.clone()
        },
    );
    demo.report
        .claim(page.success && page.stdout.contains(programs::PAYLOAD), "nginx on node-2 answered over IPv4");
    let v6 = demo.curl("frontend", &["-6"], "http://web/")?;
    demo.report.ran(&v6);
    demo.report.claim(v6.stdout.starts_with("200"), "and over IPv6");
    let log = std::fs::read_to_string(demo.lab.dir().join("nginx/access.log")).unwrap_or_default();
    let client = log.lines().next().and_then(|l| l.split(' ').next()).unwrap_or_default().to_owned();
    let frontend = demo.lab.pod("frontend")?.v4.to_string();
    demo.report
        .claim(client == frontend, format!("nginx's access log has the client's own address: {client}"));
    Ok(())
}

/// Two protocols that are not HTTP, one of them with the server speaking first.
fn redis_and_mail(demo: &mut Demo) -> Result<()> {
    let set = demo.lab.run("frontend", &["redis-cli", "-h", "redis", "set", "page", programs::PAYLOAD])?;
    demo.report.ran(&set);
    let get = demo.lab.run("frontend", &["redis-cli", "-h", "redis", "get", "page"])?;
    demo.report.ran(&get);
    demo.report.claim(get.stdout.contains(programs::PAYLOAD), "Redis keeps and returns the value");
    let mail = ["bash", "-c", "exec 3<>/dev/tcp/mail/25 && read -r -t 5 line <&3 && echo \"$line\""];
    let greeting = demo.lab.run("frontend", &mail)?;
    demo.report.ran(&greeting);
    demo.report
        .claim(greeting.stdout.starts_with("220 "), "a protocol in which the server speaks first works");
    Ok(())
}

/// What node-2's ztunnel knows of the request.
fn identity(demo: &mut Demo) -> Result<()> {
    let shown =
        demo.culvert_on(NodeId::Two, &["ztunnel-config", "connections", "--destination", "shop/web"])?;
    demo.report.ran(&shown);
    let connection = demo.last_connection(NodeId::Two, "frontend", "web")?;
    let seen = connection.and_then(|c| c.source_identity);
    let seen = seen.as_deref();
    demo.report.claim(
        seen == Some("spiffe://cluster.local/ns/shop/sa/frontend"),
        format!("the server's side saw the identity {}", seen.unwrap_or("none")),
    );
    Ok(())
}

/// UDP is not the mesh's, and must go on.
fn datagrams(demo: &mut Demo) -> Result<()> {
    let line = format!(
        "exec 3<>/dev/udp/clock/{}; echo tick >&3; timeout 3 dd bs=2k count=1 status=none <&3",
        programs::CLOCK_PORT
    );
    let answer = demo.lab.run("frontend", &["bash", "-c", &line])?;
    demo.report.ran(&answer);
    demo.report.claim(
        answer.stdout.starts_with("pong tick"),
        "UDP goes by unharmed (it is not tunnelled: HBONE carries TCP)",
    );
    Ok(())
}
