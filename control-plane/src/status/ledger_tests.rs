//! Tests of the ledger.

use std::sync::Arc;

use config::resource::Kind;
use xds::server::Generation;

use super::super::exchange::{Answer, Version};
use super::super::peers::{Peer, Peers, Place};
use super::*;
use crate::registry::{Report, Standing};

struct Bench {
    followers: Followers,
    proxies: Proxies,
    peers: Peers,
    ztunnels: Vec<Ztunnel>,
    waypoints: Vec<Ztunnel>,
    exceptions: Exceptions,
    ledger: Ledger,
    told: Vec<String>,
}

fn named(name: &str) -> ObjectName {
    ObjectName { kind: Kind::AuthorizationPolicy, namespace: "shop".into(), name: name.into() }
}

fn version(name: &str, generation: i64) -> ObjectVersion {
    ObjectVersion { uid: format!("uid-{name}").into(), generation, labelled: false, selects: true }
}

fn ztunnel(name: &str, life: Life) -> Ztunnel {
    let (pod, namespace) = name.split_once('.').unwrap();
    Ztunnel {
        namespace: namespace.into(),
        pod: pod.into(),
        node: format!("node-of-{pod}").into(),
        gateway: None,
        revision: None,
        roots: None,
        life,
    }
}

/// A control plane of a revision whose proxies are the ones of these names, with the answer that all enforce all.
fn peer(revision: &str, proxies: &[&str], policies: &[(&str, i64)]) -> Peer {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let mut peer = Peer::new(Place { address, server_name: "peer".to_owned(), revision: revision.into() });
    let versions = policies.iter().map(|(name, generation)| Version {
        policy: named(name).to_string(),
        uid: format!("uid-{name}"),
        generation: *generation,
    });
    peer.take(Answer {
        revision: revision.to_owned(),
        epoch: 1,
        number: 1,
        whole: true,
        versions: versions.collect(),
        ours: proxies.len(),
        others: 0,
        names_id: 1,
        names: Some(proxies.iter().map(|name| Arc::from(*name)).collect()),
        exceptions: BTreeMap::new(),
    });
    peer
}

impl Bench {
    fn new(revision: &str) -> Self {
        Self {
            followers: Followers::default(),
            proxies: Proxies::made(&[("a.mesh", 10)]),
            peers: Peers::of(Vec::new()),
            ztunnels: vec![ztunnel("a.mesh", Life::Running)],
            waypoints: Vec::new(),
            exceptions: Exceptions::default(),
            ledger: Ledger::new(revision),
            told: Vec::new(),
        }
    }

    fn report(&self, version: ObjectVersion, name: &str, generation: u64) {
        let state = Some(ObjectState { version, findings: Vec::new(), standing: Standing::default() });
        self.followers.take(vec![Report { name: named(name), state }], &[], Generation(generation));
    }

    fn due(&mut self) -> Vec<Due> {
        let told = std::mem::take(&mut self.told);
        self.ledger.due(&World {
            followers: &self.followers,
            proxies: &self.proxies,
            peers: &self.peers,
            told,
            ztunnels: Some(&self.ztunnels),
            waypoints: Some(&self.waypoints),
            exceptions: &self.exceptions,
        })
    }

    /// Writes what is due; the names.
    fn round(&mut self) -> Vec<String> {
        let due = self.due();
        let names = due.iter().map(|due| due.name.name.to_string()).collect();
        due.into_iter().for_each(|due| self.ledger.wrote(due, Ok(())));
        names
    }

    /// Status and message of `Enforced` that is to be written of the only policy; `None` when nothing is.
    fn enforced(&mut self) -> Option<(Option<bool>, String)> {
        let due = self.due().pop()?;
        let found = due.conditions.iter().find(|c| c.kind == ENFORCED).cloned().unwrap();
        self.ledger.wrote(due, Ok(()));
        Some((found.holds, found.message))
    }
}

#[tokio::test(start_paused = true)]
async fn a_live_proxy_that_is_connected_to_none_does_not_enforce() {
    let mut bench = Bench::new("default");
    bench.ztunnels.push(ztunnel("b.mesh", Life::Running));
    bench.report(version("p", 1), "p", 3);
    tokio::time::advance(FRESH).await;
    let message = "1/2 proxies enforce it; waiting for b.mesh (not connected)";
    // It has only begun to lead: the proxy may be on its way.
    bench.ledger.begin();
    assert_eq!(bench.enforced(), None);
    tokio::time::advance(FRESH).await;
    assert_eq!(bench.enforced(), Some((Some(false), message.to_owned())));
    assert_eq!(bench.ledger.doubted(&bench.ztunnels).into_iter().collect::<Vec<_>>(), ["node-of-b".into()]);
    // It is connected to another control plane.
    bench.peers = Peers::of(vec![peer("default", &["b.mesh"], &[("p", 1)])]);
    tokio::time::advance(ALL).await;
    assert_eq!(bench.enforced(), Some((Some(true), "2/2 proxies enforce it".to_owned())));
    assert!(bench.ledger.doubted(&bench.ztunnels).is_empty());

    // It goes, and comes again at once: nothing is written. It goes for good.
    bench.peers = Peers::of(vec![peer("default", &[], &[("p", 1)])]);
    tokio::time::advance(ALL).await;
    assert_eq!(bench.enforced(), None);
    tokio::time::advance(FRESH).await;
    assert_eq!(bench.enforced(), Some((Some(false), message.to_owned())));
    // A new version counts at once.
    bench.peers = Peers::of(vec![peer("default", &["b.mesh"], &[("p", 1)])]);
    tokio::time::advance(ALL).await;
    assert_eq!(bench.enforced().unwrap().0, Some(true));
    bench.peers = Peers::of(vec![peer("default", &[], &[("p", 2)])]);
    bench.report(version("p", 2), "p", 3);
    assert_eq!(bench.enforced(), Some((Some(false), message.to_owned())));
}

#[tokio::test(start_paused = true)]
async fn a_waypoints_pod_that_is_connected_to_none_does_not_enforce() {
    let mut bench = Bench::new("default");
    let enforcers = crate::push::Enforcers::default();
    enforcers.change(&"shop/p".into(), &"shop/w".into(), true);
    bench.followers = Followers::default().enforced_by(&enforcers);
    let of =
        |name: &str, gateway: &str, life| Ztunnel { gateway: Some(gateway.into()), ..ztunnel(name, life) };
    bench.waypoints = vec![
        of("w-1.shop", "shop/w", Life::Running),
        of("w-2.shop", "shop/w", Life::Starting),
        of("x-1.shop", "shop/x", Life::Running),
    ];
    bench.report(version("p", 1), "p", 3);
    let policy = std::sync::Arc::new(model::Policy {
        key: model::PolicyKey { namespace: "shop".into(), name: "p".into() },
        scope: model::Scope::WorkloadSelector,
        action: model::Action::Deny,
        rules: Box::default(),
        dry_run: false,
    });
    bench.followers.take(Vec::new(), &[model::Change::SetHttpPolicy(policy)], Generation(3));
    bench.due();
    tokio::time::advance(FRESH + ALL).await;
    let message = "0/1 proxies enforce it; waiting for w-1.shop (not connected)";
    assert_eq!(bench.enforced(), Some((Some(false), message.to_owned())));
    let doubted = bench.ledger.doubted(&bench.waypoints);
    assert!(doubted.contains("node-of-w-1"), "its node's Lease is looked at: {doubted:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dead_nodes_proxy_is_not_counted_and_is_named() {
    let mut bench = Bench::new("default");
    bench.ztunnels.push(ztunnel("b.mesh", Life::Dead("its node is not ready")));
    bench.ztunnels.push(ztunnel("c.mesh", Life::Starting));
    bench.report(version("p", 1), "p", 3);
    let message = "1/1 proxies enforce it; not counted: b.mesh on node-of-b (its node is not ready)";
    assert_eq!(bench.enforced(), Some((Some(true), message.to_owned())));
}

#[tokio::test(start_paused = true)]
async fn of_two_revisions_one_writes_and_counts_the_proxies_of_both() {
    let mut next = Bench::new("next");
    next.report(version("p", 1), "p", 3);
    next.peers = Peers::of(vec![peer("default", &["b.mesh"], &[("p", 1)])]);
    assert_eq!(next.enforced(), None, "the default revision writes what has no label");
    let labelled = ObjectVersion { labelled: true, ..version("q", 1) };
    next.report(labelled, "q", 3);
    let message = "1/1 proxies of the revision next enforce it";
    assert_eq!(next.enforced(), Some((Some(true), message.to_owned())));

    let mut default = Bench::new("default");
    default.report(version("p", 1), "p", 3);
    default.peers = Peers::of(vec![peer("next", &["b.mesh"], &[("p", 1)])]);
    let message = "2/2 proxies of the revisions default, next enforce it";
    assert_eq!(default.enforced(), Some((Some(true), message.to_owned())));
    // It does not read the namespace: its proxies have nothing to enforce. Known only after a while.
    default.report(version("r", 1), "r", 3);
    assert_eq!(default.enforced(), None);
    tokio::time::advance(FRESH).await;
    assert_eq!(default.enforced().unwrap().1, "1/1 proxies of the revisions default, next enforce it");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_know_who_else_there_is_leaves_the_default_revision_alone() {
    let mut bench = Bench::new("next");
    bench.peers = Peers::of(Vec::new());
    bench.report(version("p", 1), "p", 3);
    assert!(bench.enforced().is_some(), "it is the only one");
    let mut bench = Bench::new("next");
    bench.peers = Peers::unknown();
    bench.report(version("p", 1), "p", 3);
    tokio::time::advance(FRESH * 2).await;
    assert_eq!(bench.enforced(), None);
}

#[tokio::test(start_paused = true)]
async fn another_control_plane_that_is_silent_or_behind_leaves_it_open() {
    let mut bench = Bench::new("default");
    bench.report(version("p", 2), "p", 3);
    bench.peers = Peers::of(vec![peer("default", &["b.mesh"], &[("p", 1)])]);
    assert_eq!(bench.enforced(), None, "it will know soon");
    tokio::time::advance(FRESH).await;
    assert_eq!(bench.enforced().unwrap().0, None);
    bench.peers = Peers::of(vec![peer("default", &["b.mesh"], &[("p", 2)])]);
    bench.told = vec![named("p").to_string()];
    assert_eq!(bench.enforced().unwrap().0, Some(true));
    // What it said once says nothing of later.
    let mut silent = peer("default", &["b.mesh"], &[("p", 2)]);
    silent.forget();
    assert!(silent.has_said());
    tokio::time::advance(FRESH).await;
    silent.forget();
    bench.peers = Peers::of(vec![silent]);
    let (holds, message) = bench.enforced().unwrap();
    assert_eq!(holds, None);
    assert!(message.ends_with("1 control planes can't tell yet"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_round_in_which_nothing_changed_looks_at_nothing() {
    let mut bench = Bench::new("default");
    for index in 0..1000 {
        let name = format!("p{index:04}");
        bench.report(version(&name, 1), &name, 3);
    }
    let mut written = 0;
    while bench.ledger.waiting() > 0 || written == 0 {
        let names = bench.round();
        assert!(names.len() <= WRITES);
        written += names.len();
    }
    assert_eq!(written, 1000);
    let looks = bench.ledger.looks();
    assert!(bench.round().is_empty() && bench.ledger.is_settled());
    assert_eq!(bench.ledger.looks(), looks);
    // One changes: one is looked at.
    bench.report(version("p0500", 2), "p0500", 4);
    assert_eq!(bench.round(), ["p0500"]);
    assert_eq!(bench.ledger.looks(), looks + 1);
    // A proxy falls behind for one: one is.
    bench.report(version("p0007", 2), "p0007", 11);
    assert_eq!(bench.round(), ["p0007"]);
    bench.proxies = Proxies::made(&[("a.mesh", 11)]);
    assert_eq!(bench.round(), ["p0007"]);
    assert!(bench.ledger.is_settled());
}

#[tokio::test(start_paused = true)]
async fn what_changes_comes_first_and_what_flaps_keeps_nothing_waiting() {
    let mut bench = Bench::new("default");
    for index in 0..500 {
        let name = format!("p{index:04}");
        bench.report(version(&name, 1), &name, 3);
    }
    // It leads, and looks at all of them: a change comes before the rest.
    bench.round();
    bench.report(version("z", 1), "z", 3);
    assert!(bench.round().contains(&"z".to_owned()));
    // A hundred early ones change all the time; the others are written all the same.
    let mut written = BTreeSet::new();
    for round in 0..500 {
        for index in 0..100 {
            let name = format!("p{index:04}");
            bench.report(version(&name, round + 2), &name, 3);
        }
        tokio::time::advance(Duration::from_millis(500)).await;
        written.extend(bench.round());
    }
    assert_eq!(written.len(), 500);
}

#[tokio::test(start_paused = true)]
async fn what_says_the_same_in_other_words_waits_for_its_turn() {
    let mut bench = Bench::new("default");
    for index in 0..100 {
        let name = format!("p{index:04}");
        bench.report(version(&name, 1), &name, 3);
    }
    while !bench.round().is_empty() {}
    bench.proxies = Proxies::made(&[("a.mesh", 10), ("b.mesh", 10)]);
    tokio::time::advance(ALL).await;
    assert!(bench.round().is_empty(), "all were written just now");
    tokio::time::advance(LEISURE).await;
    assert_eq!(bench.round().len(), FOR_OTHERS);
    let mut written = FOR_OTHERS;
    while bench.ledger.waiting() > 0 {
        written += bench.round().len();
    }
    assert_eq!(written, 100);
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_written_is_tried_again_later() {
    let mut bench = Bench::new("default");
    bench.report(version("p", 1), "p", 3);
    let due = bench.due().pop().unwrap();
    bench.ledger.wrote(due, Err(()));
    assert!(bench.round().is_empty());
    assert!(bench.ledger.next().is_some());
    tokio::time::advance(AFTER_ERROR).await;
    assert_eq!(bench.round(), ["p"]);
}

#[tokio::test(start_paused = true)]
async fn an_object_that_is_no_policy_is_accepted_whatever_proxies_do() {
    let mut bench = Bench::new("default");
    bench.proxies = Proxies::made(&[]);
    let name = ObjectName { kind: Kind::ServiceEntry, ..named("e") };
    let state =
        Some(ObjectState { version: version("e", 1), findings: Vec::new(), standing: Standing::default() });
    bench.followers.take(vec![Report { name, state }], &[], Generation(3));
    let due = bench.due().pop().unwrap();
    assert!(due.conditions.len() == 2 && due.conditions[1].is_none(), "it is bound to no waypoint");
    assert_eq!((due.conditions[0].kind, due.conditions[0].holds), ("Accepted", Some(true)));
}
