//! Pools against servers on a network that delays, loses, and falls apart.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

use std::time::Duration;

use hbone::{PoolSettings, ServerSettings, Transport};
use simulation::{Client, Dice, Log, Scenario, Server, seeds, serve_host};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use turmoil::Sim;

const SERVERS: [&str; 3] = ["b", "c", "d"];

/// Small windows, so that flow control has work, and time limits short enough for many of them.
fn transport() -> Transport {
    Transport { stream_window: 65_535, connection_window: 128 * 1024, ..Transport::default() }
}

fn server_settings() -> ServerSettings {
    ServerSettings { transport: transport(), max_streams: 20, ..ServerSettings::default() }
}

fn pool_settings() -> PoolSettings {
    PoolSettings { transport: transport(), spread: 2, max_streams: 20, ..PoolSettings::default() }
}

fn host(sim: &mut Sim<'_>, server: &Server) {
    let server = server.clone();
    sim.host(server.name.clone(), move || {
        let server = server.clone();
        async move { Ok(serve_host(server).await?) }
    });
}

/// The longest that an exchange may take before it has succeeded or failed: connecting, waiting for a stream, the
/// response, and finding the peer dead while the data is under way.
const LONGEST: Duration = Duration::from_secs(10 + 20 + 15 + 60 + 60);

/// Many exchanges at random times to random servers.
async fn exchanges(client: &Client, seed: u64, count: u64, over: Duration) -> (usize, usize) {
    let mut dice = Dice::new(seed, &client.name);
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let to = *dice.pick(&SERVERS);
        let length = usize::try_from(dice.between(0, 100_000)).unwrap();
        let at = Duration::from_millis(dice.between(0, over.as_millis() as u64));
        let dice = Dice::new(seed, &format!("{} {number}", client.name));
        let client = client.clone();
        tasks.spawn(async move {
            sleep(at).await;
            timeout(LONGEST, client.exchange(to, length, dice))
                .await
                .expect("neither succeeded nor failed")
                .is_ok()
        });
    }
    let results = tasks.join_all().await;
    let succeeded = results.iter().filter(|ok| **ok).count();
    (succeeded, results.len() - succeeded)
}

fn calm(seed: u64) -> Log {
    Scenario::new(seed, Duration::from_millis(40)).run(|sim, log, seed| {
        for name in SERVERS {
            host(sim, &Server::new(name, server_settings(), log));
        }
        for name in ["x", "y"] {
            let client = Client::new(name, pool_settings(), log);
            sim.client(name, async move {
                let (succeeded, failed) = exchanges(&client, seed, 60, Duration::from_secs(5)).await;
                assert_eq!((succeeded, failed), (60, 0));
                client.check_at_rest();
                Ok(())
            });
        }
    })
}

#[test]
fn the_same_seed_makes_the_same_log() {
    let (first, again, other) = (calm(1), calm(1), calm(2));
    assert!(first.lines().len() > 120);
    assert_eq!(first.lines(), again.lines());
    assert_ne!(first.lines(), other.lines());
}

#[test]
fn delays_alone_fail_nothing() {
    for seed in seeds(4) {
        let log = calm(seed);
        assert_eq!(log.count("failed"), 0);
    }
}

fn lossy(seed: u64) -> Log {
    Scenario::new(seed, Duration::from_millis(100)).with_losses(0.002, 0.1).run(|sim, log, seed| {
        for name in SERVERS {
            host(sim, &Server::new(name, server_settings(), log));
        }
        for name in ["x", "y"] {
            let client = Client::new(name, pool_settings(), log);
            sim.client(name, async move {
                let (succeeded, failed) = exchanges(&client, seed, 80, Duration::from_secs(120)).await;
                assert!(succeeded >= failed / 4, "{succeeded} succeeded, {failed} failed");
                // Connections that fell silent are found dead, and all that belonged to them is gone.
                sleep(Duration::from_secs(120)).await;
                client.check_at_rest();
                Ok(())
            });
        }
    })
}

#[test]
fn losses_fail_exchanges_and_never_leave_anything_behind() {
    let mut found_dead = 0;
    for seed in seeds(4) {
        found_dead += lossy(seed).count("did not answer a ping");
    }
    assert!(found_dead > 0, "no connection fell silent: the losses did nothing");
}

#[test]
fn losses_come_out_the_same_for_the_same_seed() {
    assert_eq!(lossy(7).lines(), lossy(7).lines());
}

#[test]
fn a_partition_concerns_only_those_it_divides() {
    for seed in seeds(3) {
        let log = Scenario::new(seed, Duration::from_millis(10)).run(|sim, log, seed| {
            for name in SERVERS {
                host(sim, &Server::new(name, server_settings(), log));
            }
            let client = Client::new("x", pool_settings(), log);
            let log = log.clone();
            sim.client("x", async move {
                let mut tunnels = Vec::new();
                for to in SERVERS {
                    client.exchange(to, 50_000, Dice::new(seed, to)).await?;
                    tunnels.push(client.open(to).await?);
                }
                let began = Instant::now();
                turmoil::partition("x", "b");
                log.note("b is away");
                // The open tunnel to the lost server is found dead; the others live.
                let mut lost = tunnels.remove(0).tunnel;
                let dead = tokio::io::AsyncReadExt::read_u8(&mut lost).await.unwrap_err();
                log.note(format_args!("the tunnel to b ended: {dead}"));
                assert!(began.elapsed() <= Duration::from_secs(31), "{:?}", began.elapsed());
                for to in ["c", "d"] {
                    client.exchange(to, 50_000, Dice::new(seed, to)).await?;
                }
                let began = Instant::now();
                client.exchange("b", 10, Dice::new(seed, "b")).await.unwrap_err();
                assert!(began.elapsed() <= Duration::from_secs(11), "{:?}", began.elapsed());
                turmoil::repair("x", "b");
                log.note("b is back");
                client.exchange("b", 50_000, Dice::new(seed, "b")).await?;
                drop((lost, tunnels));
                sleep(Duration::from_secs(1)).await;
                client.check_at_rest();
                Ok(())
            });
        });
        assert_eq!(log.count("failed"), 1);
    }
}

#[test]
fn a_stall_that_ends_in_time_costs_nothing() {
    // What TCP makes of lost packets: silence, and then everything at once.
    for seed in seeds(3) {
        let log = Scenario::new(seed, Duration::from_millis(10)).run(|sim, log, seed| {
            for name in SERVERS {
                host(sim, &Server::new(name, server_settings(), log));
            }
            let client = Client::new("x", pool_settings(), log);
            let weather = log.clone();
            sim.client("weather", async move {
                let mut dice = Dice::new(seed, "weather");
                for _ in 0..20 {
                    sleep(Duration::from_millis(dice.between(100, 3000))).await;
                    let to = *dice.pick(&SERVERS);
                    turmoil::hold("x", to);
                    sleep(Duration::from_millis(dice.between(10, 9_000))).await;
                    turmoil::release("x", to);
                    weather.note(format_args!("the stall of {to} is over"));
                }
                Ok(())
            });
            sim.client("x", async move {
                let (_, failed) = exchanges(&client, seed, 80, Duration::from_secs(60)).await;
                assert_eq!(failed, 0);
                client.check_at_rest();
                Ok(())
            });
        });
        assert_eq!(log.count("failed"), 0);
    }
}

#[test]
fn a_server_that_dies_and_comes_back_is_used_again() {
    let mut noticed = 0;
    for seed in seeds(3) {
        let scenario = Scenario::new(seed, Duration::from_millis(10));
        let log = scenario.run(|sim, log, seed| {
            for name in SERVERS {
                host(sim, &Server::new(name, server_settings(), log));
            }
            let client = Client::new("x", pool_settings(), log);
            sim.client("x", async move {
                let (first, _) = exchanges(&client, seed, 120, Duration::from_secs(20)).await;
                sleep(Duration::from_secs(60)).await;
                let (_, failed) = exchanges(&client, seed + 1, 40, Duration::from_secs(5)).await;
                assert!(first > 60);
                assert_eq!(failed, 0);
                client.check_at_rest();
                Ok(())
            });
            // Runs a part of the time, then crashes and starts a server.
            while sim.elapsed() < Duration::from_secs(8) {
                sim.step().unwrap();
            }
            sim.crash("b");
            while sim.elapsed() < Duration::from_secs(12) {
                sim.step().unwrap();
            }
            sim.bounce("b");
        });
        noticed += log.count("to b: failed");
    }
    assert!(noticed > 0, "the crash was not noticed");
}
