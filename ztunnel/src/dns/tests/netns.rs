//! In a namespace of its own, as in a pod: queries to any server end up here, the proxy's own reach their server, and
//! nobody else is answered. Needs root.

use std::process::Command;

use super::*;

/// A namespace that stands for a pod, joined by a veth to one that stands for the rest of the world.
struct World {
    pod: String,
    outside: String,
}

fn run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let output =
        Command::new(words.next().unwrap()).args(words).output().map_err(|e| format!("{line}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{line}: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }
}

impl World {
    fn new() -> Result<Self, String> {
        let world = Self {
            pod: format!("culdnsp{}", std::process::id()),
            outside: format!("culdnso{}", std::process::id()),
        };
        let (pod, outside) = (&world.pod, &world.outside);
        run(&format!("ip netns add {pod}"))?;
        run(&format!("ip netns add {outside}"))?;
        run(&format!("ip -n {pod} link add eth0 type veth peer name eth0 netns {outside}"))?;
        for (netns, v4, v6) in [(pod, "10.77.0.2/24", "fd77::2/64"), (outside, "10.77.0.1/24", "fd77::1/64")]
        {
            run(&format!("ip -n {netns} address add {v4} dev eth0"))?;
            run(&format!("ip -n {netns} address add {v6} dev eth0 nodad"))?;
            run(&format!("ip -n {netns} link set eth0 up"))?;
            run(&format!("ip -n {netns} link set lo up"))?;
        }
        run(&format!("ip -n {outside} address add 10.77.0.3/24 dev eth0"))?;
        for rule in [
            "add table inet t",
            "add chain inet t o { type nat hook output priority -100 ; }",
            "add rule inet t o meta mark & 0xfff == 0x539 return",
            "add rule inet t o udp dport 53 redirect to :15053",
            "add rule inet t o tcp dport 53 redirect to :15053",
        ] {
            run(&format!("ip netns exec {pod} nft {rule}"))?;
        }
        Ok(world)
    }

    fn netns(name: &str) -> Netns {
        Netns::open(format!("/run/netns/{name}")).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = run(&format!("ip netns delete {}", self.pod));
        let _ = run(&format!("ip netns delete {}", self.outside));
    }
}

/// A server at `ip`, port 53, for both transports, which says `says` of every name.
fn serve_outside(outside: &Netns, ip: &str, says: &'static str) {
    let address = SocketAddr::new(ip.parse().unwrap(), 53);
    let socket = ProxyUdpSocket::bind(outside, address, &DatagramOptions::default()).unwrap();
    let listener = net::listen(outside, address, &ListenOptions::default()).unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            let query = socket.recv(&mut buffer).await.unwrap();
            socket.send(&reply(&buffer[..query.len], says, 60), query.peer, query.local).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            while let Ok(query) = read_framed(&mut stream).await {
                write_framed(&mut stream, &reply(&query, says, 60)).await;
            }
        }
    });
}

/// The proxy in the pod, until the tasks are ended.
fn serve_inside(pod: &Netns, ask_original: bool) -> (Registry, [tokio::task::JoinHandle<()>; 2]) {
    let registry = Registry::new();
    let snapshot = Arc::new(mesh());
    let proxy = DnsProxy::new(DnsSettings::default(), move || snapshot.clone(), DnsMetrics::new(&registry));
    let client = proxy.client(ClientSettings {
        namespace: "shop".into(),
        network: "".into(),
        addresses: Box::new(["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()]),
        canonical_service: "".into(),
        canonical_revision: "".into(),
        upstreams: Arc::new(Upstreams::new(["10.77.0.1:53".parse().unwrap()])),
        upstreams_from: Some(pod.clone()),
        ask_original,
    });
    let address = "[::]:15053".parse().unwrap();
    let socket = ProxyUdpSocket::bind(pod, address, &DatagramOptions::default()).unwrap();
    let listener = net::listen(pod, address, &ListenOptions::default()).unwrap();
    let udp = tokio::spawn(proxy.clone().serve_udp(socket, client.clone(), std::future::pending()));
    (registry, [udp, tokio::spawn(proxy.serve_tcp(listener, client))])
}

async fn dig(netns: &str, arguments: &str) -> String {
    let line = format!("ip netns exec {netns} dig +short +time=2 +tries=1 {arguments}");
    tokio::task::spawn_blocking(move || run(&line).unwrap_or_default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_queries_come_here_and_nobody_elses() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: making namespaces needs root");
        return;
    }
    let world = World::new().unwrap();
    let (pod, outside) = (World::netns(&world.pod), World::netns(&world.outside));
    for (ip, says) in [("10.77.0.1", "192.0.2.1"), ("10.77.0.3", "192.0.2.3"), ("fd77::1", "192.0.2.6")] {
        serve_outside(&outside, ip, says);
    }
    for ask_original in [false, true] {
        let (registry, tasks) = serve_inside(&pod, ask_original);
        for transport in ["+notcp", "+tcp"] {
            // Names of the mesh, whichever server is asked, on both families.
            for server in ["10.77.0.1", "10.77.0.2", "127.0.0.1", "fd77::1", "::1", "10.77.0.99"] {
                let found =
                    dig(&world.pod, &format!("@{server} {transport} cart.shop.svc.cluster.local")).await;
                assert_eq!(found, "10.96.0.1\n", "{server} {transport}");
            }
            // Other names: the configured server's answer, or that of the one that was asked.
            for (server, own) in
                [("10.77.0.1", "192.0.2.1"), ("10.77.0.3", "192.0.2.3"), ("fd77::1", "192.0.2.6")]
            {
                let wanted = if ask_original { own } else { "192.0.2.1" };
                for _ in 0..2 {
                    // The second time from the cache.
                    let found = dig(&world.pod, &format!("@{server} {transport} www.example.com")).await;
                    assert_eq!(found, format!("{wanted}\n"), "{server} {transport} original {ask_original}");
                }
            }
            // From outside, to the proxy's port.
            for server in ["10.77.0.2", "fd77::2"] {
                let line = format!("@{server} -p 15053 {transport} cart.shop.svc.cluster.local");
                let found = dig(&world.outside, &line).await;
                assert!(!found.contains("10.96.0.1"), "{line}: a stranger was answered: {found}");
            }
        }
        let text = registry.encode(Format::Prometheus);
        assert!(text.contains("culvert_dns_dropped_total{reason=\"stranger\"} "), "{text}");
        let asked = text.lines().filter(|l| l.starts_with("istio_dns_upstream_requests_total")).count();
        assert!(asked > 0 && text.contains("culvert_dns_cache_hits_total "), "{text}");
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
    }
}
