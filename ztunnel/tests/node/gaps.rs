//! Moments between two states: a pod that can't be enrolled, one that left while nobody looked, rules that somebody
//! removed. Nothing passes in them that a policy refuses, and nothing stays behind after them.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::time::Duration;

use harness::netns::{Host, Lab, root_or_skip};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use crate::lab::manifests::{join, mtls, namespace, policy};
use crate::lab::traffic::{PORT, ask, listen, serve, talk};
use crate::lab::{Mesh, Options, eventually, within};

fn address(host: &Host) -> SocketAddr {
    SocketAddr::new(host.ipv4.into(), PORT)
}

fn rules(host: &Host) -> String {
    host.shell("nft list ruleset; ip rule | grep -i 0x111; iptables-legacy-save | grep -i culvert; true")
        .unwrap()
}

async fn kill(mesh: &mut Mesh, node: &str) {
    mesh.ztunnel(node).signal(Signal::SIGKILL);
    mesh.ztunnel_mut(node).ended().await;
}

#[tokio::test]
async fn a_pod_whose_listeners_cannot_be_had_is_closed() {
    if !root_or_skip("taken ports in a pod") {
        return;
    }
    for port in [15001, 15006, 15008, 15053] {
        let mut mesh = Mesh::build(&[("b", &["web", "outside/old"])]);
        mesh.put("mtls", &mtls("STRICT", None));
        let (web, old) = (mesh.pod("web").clone(), mesh.pod("old").clone());
        let _servers = [serve(&web, PORT), serve(&old, PORT)];
        ask(&old, address(&web)).await.unwrap();
        let taken = listen(&web, port);
        mesh.spawn("b", &Options::default());
        mesh.ztunnel("b").says(&["error", "shop/web", &port.to_string(), "in use"]).await;
        eventually("the pod is closed", async || ask(&old, address(&web)).await.is_err()).await;
        let out = ask(&web, address(&old)).await;
        assert!(out.is_err(), "{port}: it gets out: {:?}", out.map(|hello| hello.client));

        drop(taken);
        mesh.ztunnel_mut("b").ready().await;
        ask(&web, address(&old)).await.unwrap();
        let _ = ask(&old, address(&web)).await.unwrap_err();
    }
}

#[tokio::test]
async fn a_pod_that_left_while_no_ztunnel_ran_is_let_go() {
    if !root_or_skip("pods that left meanwhile") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "gone"])]);
    let pods = ["client", "gone"].map(|name| mesh.pod(name).clone());
    let _server = serve(&pods[1], PORT);
    mesh.run("a", &Options::default()).await;
    kill(&mut mesh, "a").await;
    assert!(pods.iter().all(|pod| !rules(pod).is_empty()));
    // The one left the mesh, the other one's manifest is gone.
    mesh.put("namespaces", &join([namespace("shop", false), namespace("outside", false)]));
    std::fs::remove_file(mesh.manifests().join("pod-gone.yaml")).unwrap();
    mesh.run("a", &Options::default()).await;
    for pod in &pods {
        eventually("nothing of the redirection is left", async || rules(pod).is_empty()).await;
    }
    mesh.ztunnel("a").says(&["shop/gone", "left the mesh while no ztunnel ran"]).await;
    let direct = talk(&pods[0], address(&pods[1])).await.unwrap();
    assert_eq!(direct.hello.client, direct.local);
}

#[tokio::test]
async fn another_back_end_takes_over() {
    if !root_or_skip("a change of the back-end") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "web"])]);
    let pods = ["client", "web"].map(|name| mesh.pod(name).clone());
    let _server = serve(&pods[1], PORT);
    let with =
        |backend: &str| Options::default().argument("--capture").argument(backend).argument("--cleanup");
    for (backend, theirs) in [("nftables", ""), ("iptables-legacy", "nft list ruleset"), ("nftables", "")] {
        mesh.run("a", &with(backend)).await;
        let through = talk(&pods[0], address(&pods[1])).await.unwrap();
        assert_ne!(through.hello.client, through.local, "{backend}: it is not captured");
        for pod in &pods {
            let left = if theirs.is_empty() { String::new() } else { pod.shell(theirs).unwrap() };
            assert_eq!(left, "", "{backend}");
        }
        kill(&mut mesh, "a").await;
    }
    mesh.run("a", &with("nftables")).await;
    mesh.ztunnel("a").signal(Signal::SIGTERM);
    assert!(mesh.ztunnel_mut("a").ended().await.success());
    for pod in &pods {
        assert_eq!(rules(pod), "", "{}", pod.name);
    }
}

#[tokio::test]
async fn what_pods_that_are_gone_left_of_programs_goes_under_another_back_end() {
    if !root_or_skip("programs of pods that are gone") {
        return;
    }
    let programs = match capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        Ok(programs) => programs,
        Err(missing) => return println!("skipped: {missing}"),
    };
    let mut mesh = Mesh::build(&[("a", &["client"])]);
    // It ends while no ztunnel runs.
    let lab = Lab::builder().node("z", &["gone"]).build().unwrap();
    let netns = lab.pod("gone").netns.clone();
    programs.install(&netns, &capture::Rules::default()).unwrap();
    let kept = std::path::Path::new("/sys/fs/bpf/culvert").join(netns.id().inode().to_string());
    assert!(kept.exists());
    drop((programs, netns, lab));
    let options = Options::default().argument("--capture").argument("nftables").argument("--cleanup");
    // The kernel takes its time to end a namespace.
    for _ in 0..10 {
        mesh.run("a", &options).await;
        mesh.ztunnel("a").signal(Signal::SIGTERM);
        mesh.ztunnel_mut("a").ended().await;
        if !kept.exists() {
            return;
        }
    }
    panic!("{} is still there", kept.display());
}

#[tokio::test]
async fn a_device_that_is_added_is_guarded_before_the_regular_look() {
    if !root_or_skip("a device that is added") {
        return;
    }
    if let Err(missing) = capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        println!("skipped: {missing}");
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"])]);
    let pod = mesh.pod("client").clone();
    mesh.run("a", &Options::default().argument("--capture").argument("ebpf")).await;
    let listed = pod.shell("ip link add extra type veth peer name other && ip -o link show extra").unwrap();
    let (index, _) = listed.split_once(':').unwrap();
    let link = format!("/sys/fs/bpf/culvert/{}/link-leaving-{index}", pod.netns.id().inode());
    // The regular look comes after 30 seconds.
    assert!(within(Duration::from_secs(15), async || std::fs::exists(&link).unwrap()).await, "{link}");
}

#[tokio::test]
async fn a_stop_in_the_middle_of_an_enrolment_leaves_nothing_behind() {
    if !root_or_skip("a stop during enrolment") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "web"])]);
    for wait in [20, 40, 60, 80, 100, 140] {
        mesh.spawn("a", &Options::default().argument("--cleanup"));
        sleep(Duration::from_millis(wait)).await;
        mesh.ztunnel("a").signal(Signal::SIGTERM);
        mesh.ztunnel_mut("a").ended().await;
        for pod in ["client", "web"] {
            assert_eq!(rules(mesh.pod(pod)), "", "{pod} after {wait} ms");
        }
    }
}

#[tokio::test]
async fn connections_that_passed_in_a_gap_are_judged_when_it_closes() {
    if !root_or_skip("connections made in a gap") {
        return;
    }
    let mut mesh = Mesh::build(&[("b", &["web", "outside/old"])]);
    mesh.put("mtls", &mtls("STRICT", None));
    let (web, old) = (mesh.pod("web").clone(), mesh.pod("old").clone());
    let _server = serve(&web, PORT);
    // Its namespace comes late: the first attempt to enrol it fails.
    let late = mesh.dir().join("late");
    let mut manifest = mesh.manifest("web");
    let real = std::mem::replace(&mut manifest.netns, late.clone());
    mesh.put("pod-web", &manifest.to_string());
    let mut before = talk(&old, address(&web)).await.unwrap();
    mesh.spawn("b", &Options::default());
    mesh.ztunnel("b").says(&["shop/web", "does not exist"]).await;
    before.echo().await.unwrap();
    symlink(real, &late).unwrap();
    before.end().await.unwrap_err();
    mesh.ztunnel_mut("b").ready().await;

    // Somebody removes the rules; a connection passes until they are restored.
    web.shell("nft flush ruleset").unwrap();
    let mut meanwhile = talk(&old, address(&web)).await.unwrap();
    assert_eq!(meanwhile.hello.client, meanwhile.local);
    // Other rules are looked at at once, not after half a minute.
    let annotated = manifest.annotation("traffic.sidecar.istio.io/excludeInboundPorts", "7");
    mesh.apply("pod-web", &annotated.to_string()).await;
    meanwhile.end().await.unwrap_err();
}

#[tokio::test]
async fn a_pod_that_returns_is_judged_by_the_policies_of_now() {
    if !root_or_skip("a pod that returns") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web"])]).await;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _server = serve(web, PORT);
    let mut open = talk(client, address(web)).await.unwrap();
    let manifest = mesh.manifest("web").to_string();
    mesh.remove("pod-web").await;
    open.echo().await.unwrap();
    let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
    mesh.apply("policy", &policy("deny", "DENY", "web", of_client)).await;
    open.echo().await.unwrap();
    mesh.apply("pod-web", &manifest).await;
    open.end().await.unwrap_err();
}
