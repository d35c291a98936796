//! The control plane goes and comes back; ztunnel goes while it is away.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use harness::netns::root_or_skip;
use model::{Locality, Profile, Str, Workload};
use nix::sys::signal::Signal;

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, eventually};

#[tokio::test]
async fn without_a_control_plane_all_goes_on_and_when_it_is_back_nothing_is_sent_twice() {
    if !root_or_skip("the control plane's restart") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["client"]), ("b", &["web"])]).await;
    let (client, web) = (cluster.pod("client").clone(), cluster.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = talk(&client, to).await.unwrap();
    let before = [resources(&cluster, "a").await, resources(&cluster, "b").await];

    cluster.kill_control_plane();
    for node in ["a", "b"] {
        eventually("the control plane is missed", async || {
            cluster.ztunnel(node).metric("culvert_xds_connected").await == 0.0
        })
        .await;
    }
    open.echo().await.unwrap();
    ask(&client, to).await.unwrap();

    cluster.tell_all();
    cluster.control_plane.server.ready();
    cluster.listen();
    cluster.in_force().await;
    open.echo().await.unwrap();
    ask(&client, to).await.unwrap();
    assert_eq!([resources(&cluster, "a").await, resources(&cluster, "b").await], before);
    assert_eq!(cluster.control_plane.counts.resources.load(Ordering::Relaxed), 0);
}

async fn resources(cluster: &Cluster, node: &str) -> f64 {
    cluster.ztunnel(node).metric("culvert_xds_resources_total").await
}

#[tokio::test]
async fn a_successor_works_by_what_was_kept_until_the_control_plane_is_back() {
    if !root_or_skip("kept state") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["client", "outside"]), ("b", &["web"])]).await;
    let [client, web, old] = ["client", "web", "outside"].map(|n| cluster.pod(n).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let strict = crate::configuration::strict();
    cluster.enforce(&strict).await;
    ask(&client, to).await.unwrap();
    ask(&old, to).await.unwrap_err();

    cluster.kill_control_plane();
    for node in ["a", "b"] {
        // In good order, and without.
        let signal = if node == "a" { Signal::SIGTERM } else { Signal::SIGKILL };
        // What it has is written within a moment of its coming.
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        cluster.ztunnel_mut(node).signal(signal);
        cluster.ztunnel_mut(node).ended().await;
        cluster.run(node).await;
        assert_eq!(cluster.ztunnel(node).metric("culvert_xds_kept_state").await, 1.0);
        cluster.ztunnel(node).says(&["an earlier process kept"]).await;
    }
    ask(&client, to).await.unwrap();
    ask(&old, to).await.unwrap_err();

    cluster.tell_all();
    cluster.control_plane.server.ready();
    cluster.listen();
    cluster.in_force().await;
    for node in ["a", "b"] {
        assert_eq!(cluster.ztunnel(node).metric("culvert_xds_kept_state").await, 0.0);
    }
    // The policy went while the control plane was away.
    eventually("what is gone is no longer enforced", async || ask(&old, to).await.is_ok()).await;
}

/// A file system without room in the place of a directory, until it is dropped.
struct FullDisk(std::path::PathBuf);

impl FullDisk {
    fn mount(path: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=16k,mode=700", "culvert-test"];
        let status = std::process::Command::new("mount").args(options).arg(&path).status().unwrap();
        assert!(status.success());
        let disk = Self(path);
        let _ = std::fs::write(disk.0.join("filling"), vec![0; 64 << 10]);
        disk
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_nothing_and_keeps_no_old_state() {
    if !root_or_skip("a full state disk") {
        return;
    }
    let mut cluster = Cluster::build(&[("a", &["client", "web", "outside"])]);
    let disk = FullDisk::mount(cluster.dir().join("state-a"));
    cluster.tell_all();
    cluster.control_plane.server.ready();
    cluster.run("a").await;
    let [client, web, old] = ["client", "web", "outside"].map(|n| cluster.pod(n).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    ask(&client, to).await.unwrap();
    ask(&old, to).await.unwrap();
    cluster.enforce(&crate::configuration::strict()).await;
    ask(&client, to).await.unwrap();
    ask(&old, to).await.unwrap_err();
    cluster.ztunnel("a").says(&["No space left on device"]).await;
    // What is half there would be taken for the last good state.
    assert!(!disk.names().iter().any(|name| name.contains("journal")), "{:?}", disk.names());

    // Its successor knows nothing while the control plane is away, and takes no pod.
    cluster.kill_control_plane();
    cluster.ztunnel_mut("a").signal(Signal::SIGKILL);
    cluster.ztunnel_mut("a").ended().await;
    cluster.launch("a");
    let early = tokio::time::timeout(std::time::Duration::from_secs(2), cluster.agents["a"].accept()).await;
    assert!(early.is_err(), "it takes pods without a configuration");
    ask(&old, to).await.unwrap_err();
}

#[tokio::test]
#[ignore = "takes long: what 100,000 workloads take of a ztunnel"]
async fn a_hundred_thousand_workloads() {
    if !root_or_skip("100,000 workloads") {
        return;
    }
    let mut cluster = Cluster::build(&[("a", &["client", "web"])]);
    cluster.tell_all();
    let one = cluster.workload("web");
    for index in 0..100_000_u32 {
        let [_, b, c, d] = index.to_be_bytes();
        let name = format!("app-{}-{index}", index / 20);
        let (namespace, app) = (format!("ns-{}", index / 500), Str::from(format!("app-{}", index / 20)));
        let profile = Profile {
            namespace: namespace.as_str().into(),
            service_account: app.clone(),
            canonical_name: Some(app.clone()),
            workload_name: Some(app),
            ..(*one.profile).clone()
        };
        let node = format!("node-{}", index % 2000).into();
        let workload = Workload {
            addresses: [std::net::IpAddr::from([11, b, c, d])].into(),
            locality: Arc::new(Locality { node, ..Locality::default() }),
            ..Workload::new(format!("Kubernetes//Pod/{namespace}/{name}").into(), &name, Arc::new(profile))
        };
        cluster.control_plane.workload(&workload);
    }
    cluster.control_plane.server.ready();
    let started = tokio::time::Instant::now();
    cluster.run("a").await;
    let resident = cluster.ztunnel("a").resident_kb();
    println!("ready after {:?}, {resident} kB", started.elapsed());
    assert!(resident < 160_000, "{resident} kB");
    let started = tokio::time::Instant::now();
    cluster.control_plane.workload(&one.with(|w| w.set_canonical_name("other".into())));
    cluster.in_force().await;
    println!("one change after {:?}", started.elapsed());
    cluster.ztunnel_mut("a").signal(Signal::SIGKILL);
    cluster.ztunnel_mut("a").ended().await;
    cluster.kill_control_plane();
    let started = tokio::time::Instant::now();
    cluster.run("a").await;
    println!("from kept state after {:?}, {} kB", started.elapsed(), cluster.ztunnel("a").resident_kb());
}
