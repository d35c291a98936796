//! With a resolver that does as it is told.

use std::collections::HashMap;
use std::sync::Condvar;

use super::*;

/// What the resolver does about a name.
#[derive(Clone, Debug)]
enum Does {
    Finds(&'static str),
    FindsNothing,
    Fails,
    /// Until it is told otherwise.
    Hangs,
}

#[derive(Default)]
struct Script {
    does: Mutex<HashMap<String, Does>>,
    told: Condvar,
    asked: Mutex<Vec<String>>,
}

impl Script {
    fn tell(&self, name: &str, does: Does) {
        self.does.lock().unwrap().insert(name.to_owned(), does);
        self.told.notify_all();
    }

    fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
    }

    fn look_up(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        self.asked.lock().unwrap().push(name.to_owned());
        let mut does = self.does.lock().unwrap();
        loop {
            match does.get(name) {
                Some(Does::Finds(addresses)) => {
                    return Ok(addresses.split(' ').map(|ip| ip.parse().unwrap()).collect());
                }
                Some(Does::FindsNothing) => return Ok(Vec::new()),
                Some(Does::Fails) => return Err(io::Error::other("it does not exist")),
                Some(Does::Hangs) | None => does = self.told.wait(does).unwrap(),
            }
        }
    }
}

struct Lab {
    script: Arc<Script>,
    hosts: Hosts,
}

/// Lets all threads go.
impl Drop for Lab {
    fn drop(&mut self) {
        for does in self.script.does.lock().unwrap().values_mut() {
            *does = Does::Fails;
        }
        self.script.told.notify_all();
    }
}

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Times that a test can wait for, and that a busy machine does not upset.
fn quick() -> HostSettings {
    HostSettings {
        fresh: ms(100),
        timeout: ms(600),
        patience: ms(300),
        pause: ms(300),
        ..HostSettings::default()
    }
}

impl Lab {
    fn new(settings: HostSettings) -> Self {
        let script = Arc::new(Script::default());
        let looked_up = script.clone();
        Self { script, hosts: Hosts::new(settings, move |name| looked_up.look_up(name)) }
    }

    async fn ask(&self, name: &str) -> Result<String, String> {
        ask(self.hosts.clone(), name.to_owned()).await
    }

    fn spawn(&self, name: &str) -> tokio::task::JoinHandle<Result<String, String>> {
        tokio::spawn(ask(self.hosts.clone(), name.to_owned()))
    }
}

async fn ask(hosts: Hosts, name: String) -> Result<String, String> {
    let found = hosts.resolve(&name, 80, "10.0.0.1".parse().unwrap(), 0).await;
    found.map(|address| address.ip().to_string()).map_err(|error| error.to_string())
}

async fn until(mut condition: impl FnMut() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(ms(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reached).await.expect("in time");
}

async fn within<T>(time: Duration, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(time, future).await.expect("at once")
}

#[tokio::test]
async fn a_name_is_looked_up_once_for_all_who_ask() {
    let lab = Lab::new(HostSettings::default());
    lab.script.tell("a", Does::Hangs);
    let asking: Vec<_> = (0..500).map(|_| lab.spawn("a")).collect();
    until(|| lab.script.asked("a") == 1).await;
    tokio::time::sleep(ms(50)).await;
    lab.script.tell("a", Does::Finds("192.0.2.1"));
    for asking in asking {
        assert_eq!(asking.await.unwrap().unwrap(), "192.0.2.1");
    }
    lab.ask("a").await.unwrap();
    assert_eq!(lab.script.asked("a"), 1, "it is fresh");
    until(|| lab.hosts.counts().under_way == 0).await;
    assert_eq!(lab.hosts.counts(), HostCounts { lookups: 1, ..HostCounts::default() });
}

#[tokio::test]
async fn names_whose_servers_are_dead_hold_up_nobody_else() {
    let lab = Lab::new(HostSettings { lookups: 3, ..quick() });
    lab.script.tell("good", Does::Finds("192.0.2.1"));
    let dead: Vec<_> = (0..200).map(|i| lab.spawn(if i % 2 == 0 { "dead" } else { "gone" })).collect();
    until(|| lab.script.asked("dead") + lab.script.asked("gone") == 2).await;
    assert_eq!(within(ms(300), lab.ask("good")).await.unwrap(), "192.0.2.1");
    for asking in dead {
        let error = asking.await.unwrap().unwrap_err();
        assert!(error.contains("no answer within 0.6 s"), "{error}");
    }
    // Their lookups go on, and nobody waits for them any more.
    for name in ["dead", "gone"] {
        for _ in 0..50 {
            within(ms(300), lab.ask(name)).await.unwrap_err();
        }
        assert_eq!(lab.script.asked(name), 1);
    }
    // What they bring in the end serves.
    lab.script.tell("dead", Does::Finds("192.0.2.9"));
    until(|| lab.hosts.counts().under_way == 1).await;
    assert_eq!(lab.ask("dead").await.unwrap(), "192.0.2.9");
}

#[tokio::test]
async fn a_failure_is_remembered_for_a_while_that_grows() {
    for (does, says) in [(Does::Fails, "it does not exist"), (Does::FindsNothing, "no address")] {
        let lab = Lab::new(quick());
        lab.script.tell("a", does);
        for round in 1..=3_usize {
            let error = lab.ask("a").await.unwrap_err();
            assert!(error.contains(says), "{error}");
            let failed = Instant::now();
            assert_eq!(lab.script.asked("a"), round);
            // 300, 600 and 1200 ms.
            let pause = ms(300 << (round - 1));
            while failed.elapsed() < pause - ms(100) {
                within(ms(90), lab.ask("a")).await.unwrap_err();
                assert_eq!(lab.script.asked("a"), round);
                tokio::time::sleep(ms(5)).await;
            }
            tokio::time::sleep_until(failed + pause + ms(10)).await;
        }
        lab.script.tell("a", Does::Finds("192.0.2.1"));
        assert_eq!(lab.ask("a").await.unwrap(), "192.0.2.1");
        assert_eq!(lab.hosts.counts().failed, 3);
    }
}

#[tokio::test]
async fn an_answer_of_a_moment_ago_serves_while_a_new_one_is_looked_for() {
    let lab = Lab::new(quick());
    lab.script.tell("a", Does::Finds("192.0.2.1"));
    lab.ask("a").await.unwrap();
    tokio::time::sleep(ms(150)).await;
    lab.script.tell("a", Does::Hangs);
    for _ in 0..50 {
        assert_eq!(within(ms(200), lab.ask("a")).await.unwrap(), "192.0.2.1");
    }
    until(|| lab.script.asked("a") == 2).await;
    assert_eq!(lab.hosts.counts().stale, 50);
    lab.script.tell("a", Does::Finds("192.0.2.2"));
    until(|| lab.hosts.counts().under_way == 0).await;
    assert_eq!(lab.ask("a").await.unwrap(), "192.0.2.2");
    // And when none is found.
    lab.script.tell("a", Does::Fails);
    tokio::time::sleep(ms(150)).await;
    for _ in 0..2 {
        assert_eq!(lab.ask("a").await.unwrap(), "192.0.2.2");
        until(|| lab.hosts.counts().under_way == 0).await;
    }
    assert_eq!(lab.script.asked("a"), 3, "it failed a moment ago");
}

#[tokio::test]
async fn an_older_answer_serves_when_no_new_one_comes_soon() {
    let lab = Lab::new(HostSettings {
        recent: ms(100),
        stale: ms(3000),
        pause: ms(1),
        longest_pause: ms(1),
        ..quick()
    });
    lab.script.tell("a", Does::Finds("192.0.2.1"));
    lab.ask("a").await.unwrap();
    tokio::time::sleep(ms(150)).await;
    lab.script.tell("a", Does::Finds("192.0.2.2"));
    assert_eq!(lab.ask("a").await.unwrap(), "192.0.2.2", "it is waited for");
    tokio::time::sleep(ms(150)).await;
    lab.script.tell("a", Does::Hangs);
    let started = Instant::now();
    assert_eq!(lab.ask("a").await.unwrap(), "192.0.2.2");
    assert!((200..590).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    assert_eq!(within(ms(200), lab.ask("a")).await.unwrap(), "192.0.2.2", "not a second time");
    lab.script.tell("a", Does::Fails);
    tokio::time::sleep(ms(3100)).await;
    lab.ask("a").await.unwrap_err();
}

#[tokio::test]
async fn everything_is_limited_and_refusals_are_counted() {
    let lab = Lab::new(HostSettings { lookups: 2, queued: 1, waiting: 10, waiting_per_name: 4, ..quick() });
    let mut waiting: Vec<_> = ["a", "b", "c"].map(|name| lab.spawn(name)).into();
    until(|| lab.hosts.0.waiting.available_permits() == 7).await;
    assert_eq!((lab.hosts.counts().under_way, lab.script.asked("c")), (2, 0), "it waits for a thread");
    let error = within(ms(200), lab.ask("d")).await.unwrap_err();
    assert!(error.contains("names that wait to be looked up"), "{error}");
    waiting.extend((0..3).map(|_| lab.spawn("a")));
    until(|| lab.hosts.0.waiting.available_permits() == 4).await;
    let error = within(ms(200), lab.ask("a")).await.unwrap_err();
    assert!(error.contains("wait for this name"), "{error}");
    waiting.extend((0..4).map(|i| lab.spawn(if i < 3 { "b" } else { "c" })));
    until(|| lab.hosts.0.waiting.available_permits() == 0).await;
    let error = within(ms(200), lab.ask("c")).await.unwrap_err();
    assert!(error.contains("connections that wait for an answer"), "{error}");
    assert_eq!(lab.hosts.counts().refused, 3);
    for (name, ip) in [("a", "192.0.2.1"), ("b", "192.0.2.2"), ("c", "192.0.2.3")] {
        lab.script.tell(name, Does::Finds(ip));
    }
    for waiting in waiting {
        waiting.await.unwrap().unwrap();
    }
    until(|| lab.hosts.counts().under_way == 0).await;
    assert_eq!(lab.hosts.0.waiting.available_permits(), 10);
    lab.script.tell("d", Does::Finds("192.0.2.4"));
    lab.ask("d").await.unwrap();
}

#[tokio::test]
async fn names_are_remembered_up_to_a_limit() {
    let lab = Lab::new(HostSettings { names: 10, ..HostSettings::default() });
    for i in 0..100 {
        let name = format!("n{i}");
        lab.script.tell(&name, if i % 3 == 0 { Does::Fails } else { Does::Finds("192.0.2.1") });
        let _ = lab.ask(&name).await;
        assert!(lab.hosts.0.names().known.len() <= 10);
    }
    // Those that are looked up stay, and leave no room for more.
    let asking: Vec<_> = (0..10).map(|i| lab.spawn(&format!("dead{i}"))).collect();
    until(|| lab.hosts.counts().under_way == 10).await;
    let error = within(ms(300), lab.ask("one more")).await.unwrap_err();
    assert!(error.contains("the limit of names"), "{error}");
    for i in 0..10 {
        lab.script.tell(&format!("dead{i}"), Does::Finds("192.0.2.1"));
    }
    for asking in asking {
        asking.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn the_clients_family_is_preferred_and_all_of_its_addresses_serve() {
    let lab = Lab::new(HostSettings::default());
    lab.script.tell("both", Does::Finds("192.0.2.2 2001:db8::1 192.0.2.1 ::ffff:192.0.2.1"));
    lab.script.tell("six", Does::Finds("2001:db8::1"));
    let mut found = Vec::new();
    for random in 0..4 {
        for client in ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1"] {
            let address = lab.hosts.resolve("both", 80, client.parse().unwrap(), random).await.unwrap();
            found.push(address.ip().to_string());
        }
    }
    let expected = ["192.0.2.1", "192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.2", "2001:db8::1"];
    assert_eq!(found, [expected, expected].concat());
    assert_eq!(lab.ask("six").await.unwrap(), "2001:db8::1");
}
