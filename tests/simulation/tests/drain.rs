//! Servers that drain and credentials that rotate, under load.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

use std::time::Duration;

use hbone::{PoolSettings, ServerSettings};
use simulation::{Client, Dice, Log, Scenario, Server, seeds, serve_host};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::sleep;
use turmoil::Sim;

fn host(sim: &mut Sim<'_>, server: &Server) {
    let server = server.clone();
    sim.host(server.name.clone(), move || {
        let server = server.clone();
        async move { Ok(serve_host(server).await?) }
    });
}

fn server(log: &Log) -> Server {
    Server::new("b", ServerSettings { max_streams: 20, ..ServerSettings::default() }, log)
}

fn client(name: &str, log: &Log) -> Client {
    Client::new(name, PoolSettings { spread: 2, max_streams: 20, ..PoolSettings::default() }, log)
}

/// Exchanges one after another in several tasks, for a while; all must succeed.
async fn load(client: &Client, seed: u64, tasks: u64, lasting: Duration) {
    let mut set = JoinSet::new();
    let end = tokio::time::Instant::now() + lasting;
    for task in 0..tasks {
        let client = client.clone();
        set.spawn(async move {
            let mut dice = Dice::new(seed, &format!("{} {task}", client.name));
            while tokio::time::Instant::now() < end {
                let length = usize::try_from(dice.between(0, 60_000)).unwrap();
                let exchange = Dice::new(dice.between(0, u64::MAX), "exchange");
                client.exchange("b", length, exchange).await.expect("an exchange failed under load");
                sleep(Duration::from_millis(dice.between(0, 100))).await;
            }
        });
    }
    set.join_all().await;
}

#[test]
fn draining_over_and_over_fails_no_exchange() {
    for seed in seeds(4) {
        let log = Scenario::new(seed, Duration::from_millis(30)).run(|sim, log, seed| {
            let server = server(log);
            host(sim, &server);
            for name in ["x", "y"] {
                let client = client(name, log);
                sim.client(name, async move {
                    load(&client, seed, 10, Duration::from_secs(30)).await;
                    sleep(Duration::from_secs(1)).await;
                    client.check_at_rest();
                    assert!(client.pool.counters().going_away.get() > 0);
                    Ok(())
                });
            }
            sim.client("operator", async move {
                let mut dice = Dice::new(seed, "operator");
                for _ in 0..10 {
                    sleep(Duration::from_millis(dice.between(500, 4_000))).await;
                    server.drain(Duration::from_secs(20));
                    server.resume();
                }
                Ok(())
            });
        });
        assert_eq!(log.count("failed"), 0);
        assert!(log.count("b served") >= 10);
        assert_eq!(log.count("in time were reset"), 0, "all streams finished before the deadline");
    }
}

#[test]
fn a_drains_deadline_ends_what_does_not_end_by_itself() {
    for seed in seeds(2) {
        let log = Scenario::new(seed, Duration::from_millis(30)).run(|sim, log, _| {
            let server = server(log);
            host(sim, &server);
            let client = client("x", log);
            sim.client("x", async move {
                let mut old = client.open("b").await?;
                old.tunnel.write_all(b"a").await?;
                assert_eq!(old.tunnel.read_u8().await?, b'a');
                server.drain(Duration::from_secs(20));
                server.resume();
                sleep(Duration::from_secs(19)).await;
                old.tunnel.write_all(b"b").await?;
                assert_eq!(old.tunnel.read_u8().await?, b'b');
                old.tunnel.read_u8().await.unwrap_err();
                assert!(turmoil::sim_elapsed().unwrap() < Duration::from_secs(22));
                client.exchange("b", 10_000, Dice::new(1, "after")).await?;
                drop(old);
                sleep(Duration::from_secs(1)).await;
                client.check_at_rest();
                Ok(())
            });
        });
        assert_eq!(log.count("in time were reset"), 1);
    }
}

/// The exchange of a root in stages: trust both, sign with the new one, drop the old one. Old connections are retired
/// when a certificate changes, and cut when their root is dropped.
async fn exchange_root(server: &Server, clients: &[Client], log: &Log, dice: &mut Dice) {
    let pause = |dice: &mut Dice| sleep(Duration::from_millis(dice.between(2_000, 5_000)));
    log.note("trust both roots");
    server.credentials.trust(&[1, 2]);
    clients.iter().for_each(|client| client.credentials.trust(&[1, 2]));
    pause(dice).await;
    log.note("the server is signed by the new root");
    server.credentials.sign_by(2);
    server.drain(Duration::from_secs(30));
    server.resume();
    pause(dice).await;
    for client in clients {
        log.note(format_args!("{} is signed by the new root", client.name));
        client.credentials.sign_by(2);
        client.pool.retire(|_| true);
        pause(dice).await;
    }
    // Until the last exchange that was begun over the old root has ended.
    sleep(Duration::from_secs(15)).await;
    log.note("drop the old root");
    server.credentials.trust(&[2]);
    clients.iter().for_each(|client| client.credentials.trust(&[2]));
    // By now that concerns no connection that lives; the log says `aborted` otherwise.
    server.cut_untrusted();
}

#[test]
fn a_root_is_exchanged_under_load_and_no_exchange_fails() {
    for seed in seeds(4) {
        let log = Scenario::new(seed, Duration::from_millis(30)).run(|sim, log, seed| {
            let server = server(log);
            host(sim, &server);
            let clients: Vec<Client> = ["x", "y"].iter().map(|name| client(name, log)).collect();
            for client in clients.clone() {
                sim.client(client.name.clone(), async move {
                    load(&client, seed, 6, Duration::from_secs(60)).await;
                    sleep(Duration::from_secs(1)).await;
                    client.check_at_rest();
                    Ok(())
                });
            }
            let log = log.clone();
            sim.client("operator", async move {
                let mut dice = Dice::new(seed, "operator");
                exchange_root(&server, &clients, &log, &mut dice).await;
                Ok(())
            });
        });
        assert_eq!(log.count("failed"), 0);
        assert_eq!(log.count("aborted"), 0, "a connection of the old root lived on, and was cut");
        assert_eq!(log.count("refused a peer"), 0);
        let lines = log.lines();
        let dropped = lines.iter().position(|line| line.contains("drop the old root")).unwrap();
        assert!(lines[..dropped].iter().any(|line| line.contains("bytes over root 1")));
        assert!(lines[dropped..].iter().all(|line| !line.contains("bytes over root 1")));
        assert!(lines[dropped..].iter().any(|line| line.contains("bytes over root 2")));
    }
}

#[test]
fn a_root_that_is_dropped_too_early_cuts_and_refuses() {
    let log = Scenario::new(1, Duration::from_millis(30)).run(|sim, log, _| {
        let server = server(log);
        host(sim, &server);
        let client = client("x", log);
        sim.client("x", async move {
            let mut old = client.open("b").await?;
            server.credentials.trust(&[2]);
            assert_eq!(server.cut_untrusted(), 1);
            old.tunnel.read_u8().await.unwrap_err();
            drop(old);
            client.exchange("b", 100, Dice::new(1, "refused")).await.unwrap_err();
            // Trusted again, it works again.
            server.credentials.trust(&[1, 2]);
            client.exchange("b", 100, Dice::new(1, "trusted")).await?;
            client.check_at_rest();
            Ok(())
        });
    });
    assert_eq!(log.count("refused a peer"), 1);
}
