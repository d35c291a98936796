//! A second ztunnel takes over from the first, with connections coming all the time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use harness::netns::{Host, root_or_skip};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, Options};

/// A connection that takes longer lost packets again and again.
const SLOW: Duration = Duration::from_secs(8);

/// New connections, one after the other, from several tasks, until told to end.
struct Load {
    end: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(tasks: usize, from: &Host, to: SocketAddr) -> Self {
        let (end, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..tasks).map(|_| {
            let (from, end, done) = (from.clone(), end.clone(), done.clone());
            tokio::spawn(async move {
                let mut failures = Vec::new();
                while !end.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    let asked = ask(&from, to).await;
                    if started.elapsed() > SLOW {
                        failures.push(format!("it took {:?}", started.elapsed()));
                    }
                    match asked {
                        Ok(_) => drop(done.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => failures.push(error.to_string()),
                    }
                }
                failures
            })
        });
        let tasks = tasks.collect();
        Self { end, done, tasks }
    }

    async fn more(&self, count: usize) {
        let wanted = self.done.load(Ordering::Relaxed) + count;
        crate::lab::eventually("connections are made", async || self.done.load(Ordering::Relaxed) >= wanted)
            .await;
    }

    async fn failures(self) -> Vec<String> {
        self.end.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.unwrap());
        }
        all
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_refused_while_one_ztunnel_takes_over_from_another() {
    if !root_or_skip("an upgrade") {
        return;
    }
    let mut cluster = Cluster::start(&[("a", &["client", "outside"]), ("b", &["web"])]).await;
    let [client, web, old] = ["client", "web", "outside"].map(|n| cluster.pod(n).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    for node in ["b", "a"] {
        let mut open = [talk(&client, to).await.unwrap(), talk(&old, to).await.unwrap()];
        let loads = [Load::start(8, &client, to), Load::start(1, &old, to)];
        loads[0].more(50).await;
        let ports = ["--admin-address", "--metrics-address", "--readiness-address"];
        let options = ports
            .into_iter()
            .zip(["127.0.0.1:16000", "0.0.0.0:16020", "0.0.0.0:16021"])
            .fold(Options::default(), |options, (flag, address)| options.argument(flag).argument(address));
        let second = cluster.another(node, &options);
        let agent = cluster.agents.get_mut(node).unwrap();
        let connected = agent.accept().await;
        let first = agent.turn_to(connected);
        let pods = if node == "a" { vec![&client] } else { vec![&web] };
        for pod in pods {
            agent.add(pod).await;
        }
        agent.snapshot_sent().await;
        crate::lab::eventually("the second is ready", async || {
            second.get(16021, "/healthz/ready").await.is_ok()
        })
        .await;
        loads[0].more(100).await;
        cluster.ztunnel_mut(node).signal(Signal::SIGTERM);
        loads[0].more(100).await;
        loads[1].more(20).await;
        // The old connections live in the first, which has time.
        for talk in &mut open {
            talk.echo().await.unwrap();
        }
        drop(first);
        for load in loads {
            let failures = load.failures().await;
            if !failures.is_empty() {
                let log = cluster.ztunnel(node).log();
                let wrong = log.lines().filter(|l| l.contains("error=") || l.contains("ztunnel::"));
                wrong.for_each(|line| println!("{line}"));
            }
            assert!(failures.is_empty(), "node {node}: {} failed, as {}", failures.len(), failures[0]);
        }
        drop(open);
        let ended = tokio::time::timeout(Duration::from_secs(15), cluster.ztunnel_mut(node).ended()).await;
        assert!(ended.expect("the first has nothing more to do").success());
        ask(&client, to).await.unwrap();
        drop(second);
        // For the second turn of this test.
        cluster.run(node).await;
    }
}

/// Those that are delivered have the client's address too: with the port of one of its own they would be taken for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_connections_of_one_client_don_t_disturb_each_other() {
    if !root_or_skip("many plaintext connections") {
        return;
    }
    let cluster = Cluster::start(&[("a", &["outside"]), ("b", &["web"])]).await;
    let [web, old] = ["web", "outside"].map(|n| cluster.pod(n).clone());
    let _server = serve(&web, PORT);
    let load = Load::start(8, &old, SocketAddr::new(web.ipv4.into(), PORT));
    load.more(4000).await;
    let failures = load.failures().await;
    assert!(failures.is_empty(), "{} failed, as {}", failures.len(), failures[0]);
}
