//! What the machine may lack: descriptors, room for the log, ports, programs, privileges, a steady clock.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use harness::netns::root_or_skip;

use crate::lab::manifests::mtls;
use crate::lab::traffic::{PORT, ask, dial, listen, serve, talk};
use crate::lab::{Mesh, Options, eventually};

/// Where the programs that change the kernel's rules are.
const SBIN: &str = "/usr/sbin";

fn web(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.pod("web").ipv4.into(), PORT)
}

#[tokio::test]
async fn without_descriptors_it_lives_and_serves_again_when_there_are_some() {
    if !root_or_skip("out of descriptors") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web", "outside/old"])]);
    mesh.run("a", &Options::default()).await;
    mesh.run("b", &Options::default().wrapper(&["prlimit", "--nofile=150:150"])).await;
    let _server = serve(mesh.pod("web"), PORT);
    let (client, old, to) = (mesh.pod("client").clone(), mesh.pod("old").clone(), web(&mesh));
    let mut open = talk(&client, to).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..300 {
        // One that is over a limit is reset, now and then before it is seen to be connected.
        held.extend(dial(&old, to).await.ok());
    }
    mesh.ztunnel("b").says(&["cannot accept connections"]).await;
    open.echo().await.expect("an open connection suffers");
    // A change of the files is read, or what was in force stays.
    mesh.put("mtls", &mtls("PERMISSIVE", None));
    open.echo().await.unwrap();
    drop(held);
    assert!(mesh.ztunnel_mut("b").is_alive());
    eventually("it serves again", async || ask(&old, to).await.is_ok() && ask(&client, to).await.is_ok())
        .await;
    open.echo().await.unwrap();
    let b = mesh.ztunnel("b");
    b.says(&["accepting connections again"]).await;
    assert!(b.metric("culvert_accept_failures_total").await >= 1.0);
    mesh.apply("mtls", &mtls("STRICT", None)).await;
    let _ = ask(&old, to).await.unwrap_err();
    ask(&client, to).await.unwrap();
}

#[tokio::test]
async fn a_full_log_disk_stops_no_traffic() {
    if !root_or_skip("a full log disk") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "outside/old"])]);
    let logs = mesh.dir().join("logs");
    fs::create_dir(&logs).unwrap();
    // In a mount namespace of its own, so that it goes with the process.
    let mount = format!("mount -t tmpfs -o size=64k logs {} && exec \"$@\"", logs.display());
    let file = logs.join("ztunnel.log");
    let options = Options::default()
        .wrapper(&["unshare", "--mount", "sh", "-c", &mount, "sh"])
        .argument("--log-file")
        .argument(file.to_str().unwrap());
    mesh.run("a", &options).await;
    let _server = serve(mesh.pod("old"), PORT);
    let to = SocketAddr::new(mesh.pod("old").ipv4.into(), PORT);
    let ztunnel = mesh.ztunnel("a");
    let mut asked = 0;
    while ztunnel.metric("culvert_log_lines_dropped_total").await == 0.0 {
        for _ in 0..50 {
            ask(mesh.pod("client"), to).await.unwrap();
        }
        asked += 50;
        assert!(asked < 5000, "the disk is not full after {asked} connections");
    }
    assert!(ztunnel.metric("culvert_log_write_failures_total").await > 0.0);
    for _ in 0..50 {
        ask(mesh.pod("client"), to).await.unwrap();
    }
    // When there is room again, the log goes on and says what is missing.
    let seen =
        Path::new("/proc").join(ztunnel.pid().to_string()).join("root").join(file.strip_prefix("/").unwrap());
    fs::OpenOptions::new().write(true).truncate(true).open(&seen).unwrap();
    eventually("the log goes on", async || {
        ask(mesh.pod("client"), to).await.unwrap();
        fs::read_to_string(&seen).is_ok_and(|log| log.contains("log lines were dropped"))
    })
    .await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_the_way_out() {
    if !root_or_skip("taken ports") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"])]);
    for (port, flag) in
        [(15000, "--admin-address"), (15020, "--metrics-address"), (15021, "--readiness-address")]
    {
        let taken = listen(mesh.node("a"), port);
        mesh.spawn("a", &Options::default());
        let ztunnel = mesh.ztunnel_mut("a");
        assert_eq!(ztunnel.ended().await.code(), Some(1));
        ztunnel.says(&["ztunnel: ", &format!(":{port}"), flag, "in use"]).await;
        drop(taken);
    }
    // In a pod it concerns that pod alone, and only for as long as it lasts.
    let taken = listen(mesh.pod("client"), 15001);
    mesh.spawn("a", &Options::default());
    let ztunnel = mesh.ztunnel("a");
    ztunnel.says(&["error", "shop/client", "15001", "in use"]).await;
    drop(taken);
    eventually("the pod is enrolled", async || ztunnel.get(15021, "/healthz/ready").await.is_ok()).await;
}

/// Starts ztunnel with `change` made to its own view of the file system.
fn with_mounts(change: &str) -> Options {
    Options::default().wrapper(&["unshare", "--mount", "sh", "-c", &format!("{change} && exec \"$@\""), "sh"])
}

#[tokio::test]
async fn missing_programs_are_named_with_their_packages() {
    if !root_or_skip("missing programs") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client", "near"])]);
    let empty = mesh.dir().join("empty");
    fs::create_dir(&empty).unwrap();
    // Nor is there a file system for what eBPF leaves in the kernel, and none is mounted that ends with the process.
    let hide = format!("mount --bind {0} {SBIN} && mount --bind {0} /sys/fs/bpf", empty.display());
    mesh.spawn("a", &with_mounts(&hide).environment("PATH", "/usr/bin"));
    let ztunnel = mesh.ztunnel_mut("a");
    assert_eq!(ztunnel.ended().await.code(), Some(1));
    ztunnel.says(&["ztunnel: ", "can't be captured", "nft", "iptables", "package"]).await;

    // Only one of them: the next best is taken, and works.
    mesh.run(
        "a",
        &with_mounts(&format!("mount --bind /dev/null {SBIN}/nft")).environment("PATH", "/usr/bin"),
    )
    .await;
    mesh.ztunnel("a").says(&["capture", "iptables-nft", "nftables:", "nft"]).await;
    let _server = serve(mesh.pod("near"), PORT);
    let to = SocketAddr::new(mesh.pod("near").ipv4.into(), PORT);
    let through = talk(mesh.pod("client"), to).await.unwrap();
    assert_ne!(through.hello.client, through.local);
}

#[tokio::test]
async fn missing_privileges_are_named() {
    if !root_or_skip("missing privileges") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"])]);
    for (drop, capability) in [("-net_admin", "CAP_NET_ADMIN"), ("-sys_admin", "CAP_SYS_ADMIN")] {
        mesh.spawn(
            "a",
            &Options::default().wrapper(&["setpriv", "--bounding-set", drop, "--inh-caps", drop]),
        );
        let ztunnel = mesh.ztunnel_mut("a");
        assert_eq!(ztunnel.ended().await.code(), Some(1));
        ztunnel.says(&["ztunnel: ", capability]).await;
    }
    // Nobody can't even read what is root's alone.
    mesh.spawn(
        "a",
        &Options::default().wrapper(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]),
    );
    let ztunnel = mesh.ztunnel_mut("a");
    assert_eq!(ztunnel.ended().await.code(), Some(1));
    ztunnel.says(&["ztunnel: ", "Permission denied"]).await;
}

/// The library that gives a program another time (Debian package `faketime`).
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// What the library leaves in shared memory for each process that does not end by itself.
struct FaketimeFiles([u32; 2]);

impl Drop for FaketimeFiles {
    fn drop(&mut self) {
        for pid in self.0 {
            for name in [format!("faketime_shm_{pid}"), format!("sem.faketime_sem_{pid}")] {
                let _ = fs::remove_file(Path::new("/dev/shm").join(name));
            }
        }
    }
}

#[tokio::test]
async fn clocks_that_jump_cost_no_open_connection_and_new_ones_work_again() {
    if !root_or_skip("clock jumps") {
        return;
    }
    if !Path::new(FAKETIME).exists() {
        println!("skipped: clock jumps: needs {FAKETIME} (Debian: apt-get install faketime)");
        return;
    }
    let mut mesh =
        Mesh::build(&[("a", &["client-0", "client-1", "client-2", "client-3", "client-4"]), ("b", &["web"])]);
    let offset = mesh.dir().join("offset");
    let set = |text: &str| {
        let next = offset.with_extension("next");
        fs::write(&next, text).unwrap();
        fs::rename(&next, &offset).unwrap();
    };
    set("+0");
    let options = Options::default()
        .environment("LD_PRELOAD", FAKETIME)
        .environment("FAKETIME_TIMESTAMP_FILE", offset.to_str().unwrap())
        .environment("FAKETIME_NO_CACHE", "1")
        // Waits are not the wall clock's business.
        .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    mesh.spawn("a", &options);
    mesh.spawn("b", &options);
    let _shared = FaketimeFiles(["a", "b"].map(|node| mesh.ztunnel(node).pid()));
    for node in ["a", "b"] {
        mesh.ztunnel_mut(node).ready().await;
    }
    let _server = serve(mesh.pod("web"), PORT);
    let to = web(&mesh);
    let mut open = talk(mesh.pod("client-0"), to).await.unwrap();
    // Past the end of all certificates, back to before those of then began, and so on. Each time a pod that has no
    // connection to the other node yet has to make one. Before the root began nobody can.
    for (jump, client, possible) in [
        ("+30h", "client-1", true),
        ("+0", "client-2", true),
        ("-3d", "client-3", false),
        ("+0", "client-3", true),
        ("+60h", "client-4", true),
    ] {
        set(jump);
        if possible {
            eventually(&format!("new connections work after the jump to {jump}"), async || {
                ask(mesh.pod(client), to).await.is_ok()
            })
            .await;
        } else {
            eventually(&format!("new connections are refused after the jump to {jump}"), async || {
                ask(mesh.pod(client), to).await.is_err()
                    && mesh.ztunnel("a").log().contains("compare the clocks")
            })
            .await;
            open.echo().await.unwrap_or_else(|e| panic!("{jump}: the open connection is lost: {e}"));
            continue;
        }
        open.echo().await.unwrap_or_else(|e| panic!("{jump}: the open connection is lost: {e}"));
        // Its pooled connection may have to be replaced first, since the certificate under it expired.
        eventually(&format!("{jump}: new connections beside the open one"), async || {
            ask(mesh.pod("client-0"), to).await.is_ok()
        })
        .await;
        let dump = mesh.ztunnel("b").config_dump().await;
        let own = &dump["certificates"]["workloads"][0];
        assert_eq!(own["valid"], true, "{jump}: {own}");
    }
}
