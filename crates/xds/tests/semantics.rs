//! What a client is sent, by what it asks for. No streams, no time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use proto::{Extensions, Features};
use support::{ADDRESS, POLICY, World, bodies, gone, names, remove, resource, set, subscribe, unsubscribe};
use xds::server::session::Answer;
use xds::server::{Change, Generation, Interest, Limits, Store, Violation};

fn only(
    responses: Vec<proto::wire::discovery::DeltaDiscoveryResponse>,
) -> proto::wire::discovery::DeltaDiscoveryResponse {
    assert_eq!(responses.len(), 1, "{responses:#?}");
    responses.into_iter().next().unwrap()
}

#[test]
fn nothing_subscribed_first_is_everything() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "a", "1"), set(ADDRESS, "b", "1")]);
    for first in [subscribe(ADDRESS, &[]), subscribe(ADDRESS, &["*"])] {
        let id = world.connect(Extensions::None, None);
        world.request(id, first).unwrap();
        assert_eq!(names(&only(world.settle(id))), ["a", "b"]);
        world.apply([set(ADDRESS, "c", "1"), set(ADDRESS, "a", "2"), remove(ADDRESS, "b")]);
        let response = only(world.settle(id));
        assert_eq!((names(&response), gone(&response)), (vec!["c", "a"], vec!["b"]));
        assert_eq!(world.bodies(id, ADDRESS), bodies([("a", "2"), ("c", "1")]));
        world.apply([remove(ADDRESS, "c"), set(ADDRESS, "a", "1"), set(ADDRESS, "b", "1")]);
    }
}

#[test]
fn an_empty_state_is_answered_too() {
    let mut world = World::new();
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.request(id, subscribe("type.googleapis.com/of.Nobody", &[])).unwrap();
    world.request(id, subscribe("type.googleapis.com/of.Others", &["a"])).unwrap();
    let responses = world.settle(id);
    assert_eq!(responses.iter().map(|r| r.resources.len()).sum::<usize>(), 0);
    assert_eq!(responses.len(), 3);
    assert_eq!(responses[2].removed_resources, ["a"]);
    // And then silence.
    assert!(world.settle(id).is_empty());
}

#[test]
fn on_demand_gets_what_it_names_and_nothing_else() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "a", "1"), set(ADDRESS, "b", "1")]);
    let id = world.connect(Extensions::None, None);
    let mut first = subscribe(ADDRESS, &["*"]);
    first.resource_names_unsubscribe = vec!["*".into()];
    world.request(id, first).unwrap();
    let response = only(world.settle(id));
    assert!(response.resources.is_empty() && response.removed_resources.is_empty());

    world.request(id, subscribe(ADDRESS, &["a", "gone"])).unwrap();
    let response = only(world.settle(id));
    assert_eq!((names(&response), gone(&response)), (vec!["a"], vec!["gone"]));

    world.apply([set(ADDRESS, "b", "2"), set(ADDRESS, "c", "1")]);
    assert!(world.settle(id).is_empty(), "nobody asked for these");
    world.apply([set(ADDRESS, "a", "2"), set(ADDRESS, "gone", "1")]);
    assert_eq!(names(&only(world.settle(id))), ["a", "gone"]);
    world.apply([remove(ADDRESS, "a")]);
    assert_eq!(only(world.settle(id)).removed_resources, ["a"]);
    world.request(id, unsubscribe(ADDRESS, &["gone"])).unwrap();
    world.apply([set(ADDRESS, "gone", "2")]);
    assert!(world.settle(id).is_empty());
}

#[test]
fn a_name_that_is_asked_for_again_is_sent_again() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "a", "1")]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &["a"])).unwrap();
    assert_eq!(names(&only(world.settle(id))), ["a"]);
    world.request(id, subscribe(ADDRESS, &["a"])).unwrap();
    assert_eq!(names(&only(world.settle(id))), ["a"]);
}

fn aliased(name: &str, body: &str, aliases: &[&str]) -> Change {
    let aliases = aliases.iter().map(|a| Arc::from(*a)).collect();
    Change::Set(xds::server::Resource { aliases, ..resource(ADDRESS, name, body) })
}

#[test]
fn an_address_that_is_asked_for_comes_by_its_primary_name() {
    let mut world = World::new();
    world.apply([aliased("uid-1", "1", &["net/10.0.0.1", "net/fd00::1"])]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &["net/10.0.0.1"])).unwrap();
    let response = only(world.settle(id));
    assert_eq!(names(&response), ["uid-1"]);
    assert_eq!(response.resources[0].aliases, ["net/10.0.0.1", "net/fd00::1"]);

    // The address goes to another: the one that had it is gone for this client.
    world.apply([aliased("uid-1", "1", &[]), aliased("uid-2", "1", &["net/10.0.0.1"])]);
    let response = only(world.settle(id));
    assert_eq!((names(&response), gone(&response)), (vec!["uid-2"], vec!["uid-1"]));

    world.apply([remove(ADDRESS, "uid-2")]);
    assert_eq!(only(world.settle(id)).removed_resources, ["net/10.0.0.1", "uid-2"]);
    world.apply([aliased("uid-3", "1", &["net/10.0.0.1"])]);
    assert_eq!(names(&only(world.settle(id))), ["uid-3"]);
}

#[test]
fn one_who_follows_everything_may_ask_for_names_and_go_on_without_the_rest() {
    let mut world = World::new();
    world.apply([aliased("a", "1", &["net/1"]), set(ADDRESS, "b", "1")]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.settle(id);
    world.request(id, subscribe(ADDRESS, &["net/1"])).unwrap();
    assert_eq!(names(&only(world.settle(id))), ["a"]);
    world.apply([set(ADDRESS, "b", "2")]);
    assert_eq!(names(&only(world.settle(id))), ["b"]);
    world.request(id, unsubscribe(ADDRESS, &["*"])).unwrap();
    world.settle(id);
    world.apply([set(ADDRESS, "b", "3"), aliased("a", "2", &["net/1"])]);
    assert_eq!(names(&only(world.settle(id))), ["a"]);
    world.request(id, subscribe(ADDRESS, &["*"])).unwrap();
    world.settle(id);
    assert_eq!(world.bodies(id, ADDRESS), bodies([("a", "2"), ("b", "3")]));
}

#[test]
fn who_comes_back_is_sent_what_it_lacks() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "same", "1"), set(ADDRESS, "other", "1"), set(ADDRESS, "gone", "1")]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.settle(id);
    world.apply([set(ADDRESS, "other", "2"), remove(ADDRESS, "gone"), set(ADDRESS, "new", "1")]);
    world.reconnect(id, vec![subscribe(ADDRESS, &[])]);
    let response = only(world.settle(id));
    assert_eq!((names(&response), gone(&response)), (vec!["other", "new"], vec!["gone"]));
    // With all that there is, an answer without content says so.
    world.reconnect(id, vec![subscribe(ADDRESS, &[])]);
    let response = only(world.settle(id));
    assert!(response.resources.is_empty() && response.removed_resources.is_empty());
}

#[test]
fn one_of_ours_says_by_hashes_what_it_has() {
    let mut world = World::new();
    let id = world.follower();
    world.apply(["same", "other", "gone", "goes-later"].map(|name| set(ADDRESS, name, "1")));
    world.settle(id);
    world.apply([set(ADDRESS, "other", "2"), remove(ADDRESS, "gone"), set(ADDRESS, "new", "1")]);
    world.reconnect(id, vec![subscribe(POLICY, &[]), subscribe(ADDRESS, &[])]);
    // Between its coming and its first answer.
    world.apply([remove(ADDRESS, "goes-later")]);
    let responses = world.settle(id);
    let sent: Vec<_> = responses.iter().flat_map(|r| names(r)).collect();
    assert_eq!(sent, ["other", "new"]);
    assert_eq!(world.bodies(id, ADDRESS), bodies([("new", "1"), ("other", "2"), ("same", "1")]));

    let other = world.connect(Extensions::Culvert, None);
    let mut request = subscribe(ADDRESS, &[]);
    request.culvert_held = vec![7; 25];
    assert!(matches!(world.request(other, request), Err(Violation::Inventory(_))));
}

#[test]
fn who_comes_back_to_another_replica_is_sent_nothing_that_it_has() {
    let mut world = World::new();
    world.apply((0..50).map(|n| set(ADDRESS, &format!("name-{n}"), "1")));
    let id = world.connect(Extensions::Culvert, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.settle(id);
    // Another process has made the same in another order.
    world.store = Store::new(&[POLICY, ADDRESS], 10);
    world.apply((0..50).rev().map(|n| set(ADDRESS, &format!("name-{n}"), if n == 7 { "2" } else { "1" })));
    world.reconnect(id, vec![subscribe(ADDRESS, &[])]);
    assert_eq!(names(&only(world.settle(id))), ["name-7"]);
}

#[test]
fn names_that_come_back_are_sent_only_when_they_changed() {
    let mut world = World::new();
    world.apply([
        aliased("uid-1", "1", &["net/1"]),
        aliased("uid-2", "1", &["net/2"]),
        set(ADDRESS, "x", "1"),
    ]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &["net/1", "net/2", "x"])).unwrap();
    world.settle(id);
    world.apply([aliased("uid-2", "2", &["net/2"]), remove(ADDRESS, "x")]);
    world.reconnect(id, vec![subscribe(ADDRESS, &["net/1", "net/2", "x"])]);
    let response = only(world.settle(id));
    assert_eq!(names(&response), ["uid-2"]);
    assert_eq!(response.removed_resources, ["x"]);
}

#[test]
fn equal_content_is_no_change() {
    let mut world = World::new();
    let before = world.apply([set(ADDRESS, "a", "1")]);
    let id = world.follower();
    world.settle(id);
    assert_eq!(world.apply([set(ADDRESS, "a", "1"), remove(ADDRESS, "never")]), before);
    assert!(world.settle(id).is_empty());
}

#[test]
fn what_is_not_published_waits_and_only_its_last_state_is_sent() {
    let mut world = World::new();
    let id = world.follower();
    world.settle(id);
    for n in 0..100 {
        world.stage([set(ADDRESS, "a", &n.to_string())]);
        world.poll(id).unwrap();
        assert!(world.peer(id).inbox.is_empty());
    }
    world.store.publish();
    let response = only(world.settle(id));
    assert_eq!(names(&response), ["a"]);
    assert_eq!(world.bodies(id, ADDRESS), bodies([("a", "99")]));
}

#[test]
fn one_response_is_under_way_until_it_is_answered() {
    let mut world = World::new();
    let id = world.follower();
    world.settle(id);
    for n in 0..10 {
        world.apply([set(ADDRESS, &format!("name-{n}"), "1")]);
        world.poll(id).unwrap();
    }
    assert_eq!(world.peer(id).inbox.len(), 1);
    assert!(world.peer(id).session.waiting_since().is_some());
    world.deliver(id, &BTreeSet::new()).unwrap();
    world.poll(id).unwrap();
    assert_eq!(world.peer(id).inbox[0].resources.len(), 9);
}

#[test]
fn an_answer_to_another_response_is_none() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "a", "1")]);
    let id = world.connect(Extensions::None, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.poll(id).unwrap();
    let mut stale = subscribe(ADDRESS, &[]);
    stale.response_nonce = "7".into();
    assert_eq!(world.request(id, stale).unwrap().answer, None);
    assert!(world.peer(id).session.waiting_since().is_some());
    let mut right = subscribe(ADDRESS, &[]);
    right.response_nonce = world.peer(id).inbox[0].nonce.clone();
    assert_eq!(world.request(id, right.clone()).unwrap().answer, Some(Answer::Ack));
    assert_eq!(world.request(id, right).unwrap().answer, None);
}

fn acked(world: &World, id: xds::server::ClientId, type_url: &str) -> Generation {
    let types = world.peers[&id].session.status(&world.store);
    types.iter().find(|t| &*t.type_url == type_url).unwrap().acked
}

#[test]
fn what_is_refused_is_remembered_and_sent_again_only_when_it_changes() {
    let mut world = World::new();
    let id = world.follower();
    world.settle(id);
    let made = world.apply([set(POLICY, "good", "1"), set(POLICY, "bad", "1")]);
    world.settle_refusing(id, &["bad".to_owned()].into());
    let status = |world: &World| world.peers[&id].session.status(&world.store)[0].clone();
    let now = status(&world);
    assert_eq!(now.acked, made);
    assert_eq!(now.rejected.len(), 1);
    assert_eq!((&*now.rejected[0].name, &*now.rejected[0].reason), ("bad", "no"));
    assert_eq!(now.last_nack.as_deref(), Some("1 refused"));
    assert_eq!(world.bodies(id, POLICY), bodies([("good", "1")]));

    // Other changes come, the refused one does not, and stays refused.
    world.apply([set(POLICY, "good", "2")]);
    assert_eq!(names(&only(world.settle(id))), ["good"]);
    assert_eq!(status(&world).rejected.len(), 1);
    // Sent is not yet accepted.
    world.apply([set(POLICY, "bad", "2")]);
    world.poll(id).unwrap();
    assert_eq!(status(&world).rejected.len(), 1);
    world.settle(id);
    assert_eq!(status(&world).rejected, []);
    assert_eq!(status(&world).acked, world.store.generation());
}

#[test]
fn a_refusal_without_names_is_of_all_that_was_sent() {
    let mut world = World::new();
    let id = world.follower();
    world.settle(id);
    world.apply([set(ADDRESS, "a", "1"), set(ADDRESS, "b", "1")]);
    world.poll(id).unwrap();
    let response = world.peer(id).inbox.pop_front().unwrap();
    let refusal = proto::wire::discovery::DeltaDiscoveryRequest {
        type_url: ADDRESS.into(),
        response_nonce: response.nonce,
        error_detail: Some(proto::wire::rpc::Status { code: 13, message: "bad day".into(), details: vec![] }),
        ..Default::default()
    };
    assert_eq!(world.request(id, refusal).unwrap().answer, Some(Answer::Nack("bad day".into())));
    let status = world.peers[&id].session.status(&world.store)[1].clone();
    let refused: Vec<_> = status.rejected.iter().map(|r| (&*r.name, &*r.reason)).collect();
    assert_eq!(refused, [("a", "bad day"), ("b", "bad day")]);
    assert!(world.settle(id).is_empty(), "it is not resent");
}

#[test]
fn our_own_get_a_long_state_in_parts_and_others_at_once() {
    let mut world = World::new();
    world.limits = Limits { response_bytes: 1000, ..Limits::default() };
    world.apply((0..100).map(|n| set(ADDRESS, &format!("name-{n}"), &"x".repeat(50))));
    let foreign = world.connect(Extensions::None, None);
    world.request(foreign, subscribe(ADDRESS, &[])).unwrap();
    assert_eq!(only(world.settle(foreign)).resources.len(), 100);

    let own = world.connect(Extensions::Culvert, None);
    world.request(own, subscribe(ADDRESS, &[])).unwrap();
    let responses = world.settle(own);
    assert!(responses.len() > 10);
    let (last, parts) = responses.split_last().unwrap();
    assert!(parts.iter().all(|r| r.system_version_info.ends_with(" more")));
    assert_eq!(last.system_version_info, "100");
    assert!(responses.iter().all(|r| prost::Message::encoded_len(r) < 1200));
    assert_eq!(world.bodies(own, ADDRESS).len(), 100);
    assert_eq!(world.peer(own).resources, 100);
}

#[test]
fn what_belongs_together_comes_at_once() {
    let mut world = World::with(Store::new(&[proto::AUTHORIZATION_TYPE_URL], 100));
    world.limits = Limits { response_bytes: 1000, ..Limits::default() };
    let long = "x".repeat(50);
    world.apply((0..100).map(|n| set(proto::AUTHORIZATION_TYPE_URL, &format!("name-{n}"), &long)));
    let own = world.connect(Extensions::Culvert, None);
    world.request(own, subscribe(proto::AUTHORIZATION_TYPE_URL, &[])).unwrap();
    let state = only(world.settle(own));
    assert_eq!((state.resources.len(), state.system_version_info.as_str()), (100, "100"));
}

#[test]
fn what_changes_while_a_state_goes_out_is_in_it() {
    let mut world = World::new();
    world.limits = Limits { response_bytes: 300, ..Limits::default() };
    world.apply((0..20).map(|n| set(ADDRESS, &format!("name-{n}"), "1")));
    let id = world.connect(Extensions::Culvert, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.poll(id).unwrap();
    world.deliver(id, &BTreeSet::new()).unwrap();
    // Not even published: a state without what moved would not be whole.
    world.stage([set(ADDRESS, "name-19", "2"), set(ADDRESS, "name-0", "2"), remove(ADDRESS, "name-18")]);
    assert!(acked(&world, id, ADDRESS) == Generation(0), "in the middle nothing is held for sure");
    let last = world.settle(id).pop().unwrap();
    assert_eq!(last.system_version_info, "23");
    let held = world.bodies(id, ADDRESS);
    assert_eq!((held.len(), held["name-19"].as_str(), held["name-0"].as_str()), (19, "2", "2"));
    assert_eq!(acked(&world, id, ADDRESS), world.store.generation());
}

#[test]
fn one_that_is_away_too_long_has_to_begin_anew() {
    let mut world = World::with(Store::new(&[ADDRESS], 10));
    world.apply((0..50).map(|n| set(ADDRESS, &format!("name-{n}"), "1")));
    let id = world.connect(Extensions::Culvert, None);
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    world.settle(id);
    world.apply([set(ADDRESS, "name-49", "2")]);
    world.poll(id).unwrap();
    world.apply((0..20).map(|n| remove(ADDRESS, &format!("name-{n}"))));
    world.deliver(id, &BTreeSet::new()).unwrap();
    assert_eq!(world.poll(id), Err(Violation::Behind));
    world.reconnect(id, vec![subscribe(ADDRESS, &[])]);
    world.settle(id);
    assert_eq!(world.bodies(id, ADDRESS).len(), 30);
    assert_eq!(world.store.len(ADDRESS, Extensions::Culvert), 30);
}

#[test]
fn what_is_withheld_is_absent_and_no_more_than_that() {
    let mut world = World::new();
    let withheld =
        |body: &str| Change::Set(xds::server::Resource { plain: None, ..resource(POLICY, "dry", body) });
    world.apply([withheld("1"), set(POLICY, "a", "1")]);
    let foreign = world.connect(Extensions::None, None);
    let own = world.connect(Extensions::Culvert, None);
    for id in [foreign, own] {
        world.request(id, subscribe(POLICY, &[])).unwrap();
        world.settle(id);
    }
    assert_eq!(world.bodies(foreign, POLICY), bodies([("a", "1")]));
    assert_eq!(world.bodies(own, POLICY), bodies([("a", "1"), ("dry", "1")]));
    // A change of what it does not see is none for it.
    let made = world.apply([withheld("2")]);
    assert!(world.settle(foreign).is_empty());
    assert_eq!(acked(&world, foreign, POLICY), made);
    // It becomes a real one, and then none again.
    world.apply([set(POLICY, "dry", "3")]);
    assert_eq!(names(&only(world.settle(foreign))), ["dry"]);
    world.apply([withheld("4")]);
    assert_eq!(only(world.settle(foreign)).removed_resources, ["dry"]);
    assert_eq!(only(world.settle(own)).resources.len(), 1);
}

#[test]
fn each_audience_gets_its_own_body() {
    let mut world = World::new();
    let both = xds::server::Resource {
        culvert: Some(Bytes::from_static(b"with extensions")),
        ..resource(ADDRESS, "a", "plain")
    };
    world.apply([Change::Set(both)]);
    for (audience, body) in [(Extensions::None, "plain"), (Extensions::Culvert, "with extensions")] {
        let id = world.connect(audience, None);
        world.request(id, subscribe(ADDRESS, &[])).unwrap();
        world.settle(id);
        assert_eq!(world.bodies(id, ADDRESS), bodies([("a", body)]));
    }
}

#[test]
fn a_client_gets_the_scopes_that_it_is_interested_in() {
    let mut world = World::new();
    let scoped = |name: &str, scope: &str, body: &str| {
        let scope = Some(scope.into());
        Change::Set(xds::server::Resource { scope, ..resource(ADDRESS, name, body) })
    };
    world.apply([scoped("a", "east", "1"), scoped("b", "west", "1"), set(ADDRESS, "c", "1")]);
    let east: Interest = Arc::new(|scope| scope == "east");
    let id = world.connect(Extensions::Culvert, Some(east));
    world.request(id, subscribe(ADDRESS, &[])).unwrap();
    assert_eq!(names(&only(world.settle(id))), ["a", "c"]);
    // Others' changes and removals are none of its business, but it has answered for them.
    let made = world.apply([scoped("b", "west", "2"), scoped("d", "west", "1"), remove(ADDRESS, "d")]);
    assert!(world.settle(id).is_empty());
    assert_eq!(acked(&world, id, ADDRESS), made);
    world.apply([scoped("a", "west", "1"), scoped("b", "east", "2")]);
    let response = only(world.settle(id));
    assert_eq!((names(&response), gone(&response)), (vec!["b"], vec!["a"]));
}

#[test]
fn a_policy_is_there_before_a_workload_lists_it_and_until_none_does() {
    let mut world = World::new();
    world.apply([set(ADDRESS, "w", "")]);
    let id = world.follower();
    world.settle(id);
    world.apply([set(ADDRESS, "w", "p"), set(POLICY, "p", "1")]);
    let order: Vec<_> = world.settle(id).iter().map(|r| r.type_url.clone()).collect();
    assert_eq!(order, [POLICY, ADDRESS]);
    world.apply([remove(POLICY, "p"), set(ADDRESS, "w", "")]);
    let order: Vec<_> = world.settle(id).iter().map(|r| r.type_url.clone()).collect();
    assert_eq!(order, [ADDRESS, POLICY]);
    // While an answer for policies is owed, workloads wait.
    world.apply([set(POLICY, "p", "1")]);
    world.poll(id).unwrap();
    world.apply([set(POLICY, "q", "1"), set(ADDRESS, "w", "q")]);
    world.poll(id).unwrap();
    assert_eq!(world.peer(id).inbox.len(), 1);
}

#[test]
fn limits_end_a_client_that_breaks_them() {
    let mut world = World::new();
    world.limits = Limits { names: 3, types: 2, ..Limits::default() };
    let id = world.connect(Extensions::None, None);
    assert_eq!(world.request(id, subscribe("", &[])).unwrap_err(), Violation::NoType);
    world.request(id, subscribe(ADDRESS, &["a", "b", "c"])).unwrap();
    let error = world.request(id, subscribe(ADDRESS, &["d"])).unwrap_err();
    assert_eq!(error, Violation::Names { limit: 3, type_url: ADDRESS.into() });
    world.request(id, subscribe(POLICY, &[])).unwrap();
    assert_eq!(world.request(id, subscribe("x", &[])).unwrap_err(), Violation::Types(2));
}

/// The work for one change, among many resources: the entries of the log that each client looks at.
#[test]
fn a_change_costs_one_look_for_each_client_that_gets_it() {
    let mut world = World::new();
    world.apply((0..20_000).map(|n| aliased(&format!("uid-{n}"), "1", &[&format!("net/{n}")])));
    let followers: Vec<_> = (0..10).map(|_| world.follower()).collect();
    let asking = world.connect(Extensions::Culvert, None);
    world.request(asking, subscribe(ADDRESS, &["net/17"])).unwrap();
    for id in followers.iter().copied().chain([asking]) {
        world.settle(id);
    }
    let visited = |world: &World| -> Vec<u64> { world.peers.values().map(|p| p.session.visited()).collect() };
    let before = visited(&world);
    for n in 0..100 {
        world.apply([aliased(&format!("uid-{n}"), "2", &[&format!("net/{n}")])]);
        for id in followers.iter().copied().chain([asking]) {
            world.settle(id);
        }
    }
    let work: Vec<_> = visited(&world).iter().zip(before).map(|(now, before)| now - before).collect();
    assert_eq!(work, [100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 0]);
    assert_eq!(world.peers[&asking].resources, 2);
}

#[test]
fn one_of_ours_that_is_too_old_gets_what_it_can_enforce() {
    let mut world = World::new();
    let policy = |name: &str, plain: Option<&'static str>, body: &'static str, needs| {
        Change::Set(xds::server::Resource {
            plain: plain.map(|plain| Bytes::from_static(plain.as_bytes())),
            needs,
            ..resource(POLICY, name, body)
        })
    };
    let (domains, dry_run) = (Features::TRUST_DOMAINS, Features::DRY_RUN);
    world.apply([
        policy("both", Some("refuse all"), "exact", domains.and(dry_run)),
        policy("tried", None, "tried", dry_run),
        policy("old", Some("for others"), "for ours", Features::NONE),
    ]);
    let follow = |world: &mut World, features: Features| {
        let id = world.connect(Extensions::Culvert, None);
        let peer = world.peer(id);
        let fresh = xds::server::Session::new(Extensions::Culvert, None, Limits::default());
        peer.session = fresh.that_knows(features);
        world.request(id, subscribe(POLICY, &[])).unwrap();
        world.settle(id);
        id
    };
    let new = follow(&mut world, Features::ALL);
    let old = follow(&mut world, domains);
    let (exact, closed) = (("both", "exact"), ("both", "refuse all"));
    assert_eq!(world.bodies(new, POLICY), bodies([exact, ("tried", "tried"), ("old", "for ours")]));
    assert_eq!(world.bodies(old, POLICY), bodies([closed, ("old", "for ours")]));
    let rejected = |world: &World, id| world.peers[&id].session.status(&world.store)[0].rejected.clone();
    assert!(rejected(&world, new).is_empty());
    let said: Vec<_> = rejected(&world, old).into_iter().map(|r| (r.name, r.reason)).collect();
    assert_eq!(said.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["both", "tried"]);
    assert!(said.iter().all(|(_, reason)| reason.contains("too old for this (dry-run)")), "{said:?}");

    // As soon as it needs less, the old one has it as it is; and is told when one begins to need more.
    world.apply([
        policy("both", Some("refuse all"), "exact", domains),
        policy("old", Some("for others"), "for ours", dry_run),
    ]);
    world.settle(old);
    assert_eq!(world.bodies(old, POLICY), bodies([exact, ("old", "for others")]));
    world.apply([remove(POLICY, "tried"), remove(POLICY, "old")]);
    world.settle(old);
    assert_eq!(world.bodies(old, POLICY), bodies([exact]));
    assert!(rejected(&world, old).is_empty());
}
