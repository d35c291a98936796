//! ztunnel ends, in good order and without; what its pods see meanwhile, and when it is back.

use std::net::SocketAddr;

use harness::netns::root_or_skip;
use nix::sys::signal::Signal;

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Mesh, Options};

#[tokio::test]
async fn a_killed_ztunnel_fails_closed_and_its_successor_takes_over() {
    if root_or_skip("restart") {
        fails_closed_when_killed(&Options::default()).await;
    }
}

#[tokio::test]
async fn captured_by_ebpf_it_fails_closed_and_its_successor_takes_over_too() {
    if !root_or_skip("restart with eBPF") {
        return;
    }
    if let Err(missing) = capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        println!("skipped: {missing}");
        return;
    }
    fails_closed_when_killed(&Options::default().argument("--capture").argument("ebpf")).await;
}

async fn fails_closed_when_killed(options: &Options) {
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web", "outside/old"])]);
    for node in ["a", "b"] {
        mesh.run(node, options).await;
    }
    let (client, web, old) = (mesh.pod("client").clone(), mesh.pod("web").clone(), mesh.pod("old").clone());
    let _servers = [serve(&web, PORT), serve(&old, PORT)];
    let to_web = SocketAddr::new(web.ipv4.into(), PORT);
    let to_old = SocketAddr::new(old.ipv4.into(), PORT);
    let roots = mesh.ztunnel("b").config_dump().await["certificates"]["roots"].clone();
    for node in ["b", "a"] {
        let mut open = talk(&client, to_web).await.unwrap();
        mesh.ztunnel_mut(node).signal(Signal::SIGKILL);
        assert!(!mesh.ztunnel_mut(node).ended().await.success());
        // Of the peer's death the client's ztunnel tells with a reset; of its own the kernel, with an end in order.
        assert!(open.end().await.is_err() || node == "a");
        let _ = ask(&client, to_web).await.unwrap_err();
        let (pod, other) = if node == "b" { (&old, to_web) } else { (&client, to_old) };
        let error = ask(pod, other).await.map(drop);
        assert!(error.is_err(), "plaintext passes while ztunnel of {node} is dead");

        mesh.run(node, options).await;
        assert_eq!(ask(&client, to_web).await.unwrap().client.ip(), client.ipv4, "{node}");
        ask(pod, other).await.unwrap();
        let ztunnel = mesh.ztunnel(node);
        assert_eq!(ztunnel.config_dump().await["certificates"]["roots"], roots);
        assert_eq!(
            ztunnel.metric("culvert_certificates_issued_total").await,
            0.0,
            "its certificates were kept"
        );
    }
}

/// As when the file system that the CA is on is not mounted when the machine's services start.
#[tokio::test]
async fn a_successor_serves_with_what_was_kept_while_the_ca_is_away() {
    if !root_or_skip("a restart without the CA") {
        return;
    }
    let mut mesh = Mesh::start(&[("a", &["client"]), ("b", &["web"])]).await;
    let (client, web) = (mesh.pod("client").clone(), mesh.pod("web").clone());
    let _server = serve(&web, PORT);
    let to_web = SocketAddr::new(web.ipv4.into(), PORT);
    ask(&client, to_web).await.unwrap();
    let dump = mesh.ztunnel("a").config_dump().await;
    let (ca, aside) = (mesh.dir().join("ca"), mesh.dir().join("ca-aside"));
    std::fs::rename(&ca, &aside).unwrap();
    for node in ["a", "b"] {
        mesh.ztunnel_mut(node).signal(Signal::SIGKILL);
        mesh.ztunnel_mut(node).ended().await;
        mesh.run(node, &Options::default()).await;
    }
    ask(&client, to_web).await.unwrap();
    let tunnel = mesh.ztunnel("a").last(|c| c["destination"] == to_web.to_string()).await;
    assert_eq!(tunnel["carrier"], "hbone", "{tunnel}");
    for node in ["a", "b"] {
        let ztunnel = mesh.ztunnel(node);
        assert_eq!(ztunnel.config_dump().await["certificates"]["roots"], dump["certificates"]["roots"]);
        assert_eq!(ztunnel.metric("culvert_certificates_issued_total").await, 0.0);
        ztunnel.says(&["certificate authority not loaded", "Bring the directory back"]).await;
    }
    assert!(!ca.exists(), "another CA was made");
    std::fs::rename(&aside, &ca).unwrap();
    for node in ["a", "b"] {
        // The one that was logged before is that of the first start.
        crate::lab::eventually("certificates are issued again", async || {
            mesh.ztunnel(node).metric("culvert_certificates_issued_total").await > 0.0
        })
        .await;
    }
    ask(&client, to_web).await.unwrap();
}
