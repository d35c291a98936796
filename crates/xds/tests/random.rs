//! Whatever happens in whatever order, each client comes to hold what there is for it; nothing that it has is sent
//! to it; and at no moment does a workload list a policy that is not there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use proto::Extensions;
use support::{ADDRESS, Held, POLICY, World, remove, set, subscribe, unsubscribe};
use xds::server::{Change, ClientId, Limits, Resource, Store};

#[derive(Clone, Copy, Debug)]
enum Step {
    /// New content, or once more what there is.
    Set {
        type_url: &'static str,
        name: u8,
        new: bool,
        withheld: bool,
    },
    Remove {
        type_url: &'static str,
        name: u8,
    },
    Publish,
    Poll(u8),
    Deliver {
        client: u8,
        refuse: Option<u8>,
    },
    Reconnect(u8),
    Ask {
        client: u8,
        name: u8,
    },
    Leave {
        client: u8,
        name: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let type_url = prop_oneof![Just(POLICY), Just(ADDRESS)];
    prop_oneof![
        6 => (type_url.clone(), 0..6_u8, prop::bool::weighted(0.8), prop::bool::weighted(0.1))
            .prop_map(|(type_url, name, new, withheld)| Step::Set { type_url, name, new, withheld }),
        3 => (type_url, 0..6_u8).prop_map(|(type_url, name)| Step::Remove { type_url, name }),
        3 => Just(Step::Publish),
        6 => (0..4_u8).prop_map(Step::Poll),
        6 => (0..4_u8, prop::option::weighted(0.4, 0..6_u8))
            .prop_map(|(client, refuse)| Step::Deliver { client, refuse }),
        1 => (0..4_u8).prop_map(Step::Reconnect),
        2 => (0..4_u8, 0..6_u8).prop_map(|(client, name)| Step::Ask { client, name }),
        1 => (0..4_u8, 0..6_u8).prop_map(|(client, name)| Step::Leave { client, name }),
    ]
}

fn name(n: u8) -> String {
    format!("name-{n}")
}

/// Who follows how: two follow all, one of them in parts and one of another make; two follow names.
struct Run {
    world: World,
    ids: [ClientId; 4],
    /// What there is: type and name to body, and whether it is withheld from others.
    truth: BTreeMap<(&'static str, String), (String, bool)>,
    asked: [BTreeSet<String>; 4],
    refused: [BTreeMap<(String, String), String>; 4],
    /// How many bodies there were.
    bodies: usize,
}

const NAMED: [bool; 4] = [false, false, true, true];
const AUDIENCE: [Extensions; 4] =
    [Extensions::Culvert, Extensions::None, Extensions::Culvert, Extensions::None];

impl Run {
    fn new(tombstones: usize, response_bytes: usize) -> Self {
        let mut world = World::with(Store::new(&[POLICY, ADDRESS], tombstones));
        world.limits = Limits { response_bytes, ..Limits::default() };
        let ids = AUDIENCE.map(|audience| world.connect(audience, None));
        let mut run = Self {
            world,
            ids,
            truth: BTreeMap::new(),
            asked: Default::default(),
            refused: Default::default(),
            bodies: 0,
        };
        for client in 0..4 {
            run.begin(client);
        }
        run
    }

    fn begin(&mut self, client: usize) {
        let addresses = if NAMED[client] {
            let mut request = subscribe(ADDRESS, &["*"]);
            request.resource_names_unsubscribe = vec!["*".into()];
            request.resource_names_subscribe.extend(self.asked[client].iter().cloned());
            request
        } else {
            subscribe(ADDRESS, &[])
        };
        self.world.reconnect(self.ids[client], vec![subscribe(POLICY, &[]), addresses]);
        // What it refused comes once more.
        self.refused[client].clear();
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Set { type_url, name: n, new, withheld } => {
                let there = self.truth.get(&(type_url, name(n)));
                let (body, withheld) = there.filter(|_| !new).cloned().unwrap_or_else(|| {
                    self.bodies += 1;
                    (format!("body-{}", self.bodies), withheld)
                });
                let resource = support::resource(type_url, &name(n), &body);
                let plain = resource.plain.clone().filter(|_| !withheld);
                // The alias of a name is its own number, and sometimes also that of the next.
                let mut aliases: Vec<Arc<str>> = vec![format!("net/{n}").into()];
                if body.ends_with('3') {
                    aliases.push(format!("net/{}", (n + 1) % 6).into());
                }
                self.truth.insert((type_url, name(n)), (body, withheld));
                self.world.stage([Change::Set(Resource { plain, aliases, ..resource })]);
            }
            Step::Remove { type_url, name: n } => {
                self.truth.remove(&(type_url, name(n)));
                self.world.stage([remove(type_url, &name(n))]);
            }
            Step::Publish => self.world.store.publish(),
            Step::Poll(client) => self.poll(usize::from(client)),
            Step::Deliver { client, refuse } => self.deliver(usize::from(client), refuse),
            Step::Reconnect(client) => self.begin(usize::from(client)),
            Step::Ask { client, name: n } => self.ask(usize::from(client), n),
            Step::Leave { client, name: n } => self.leave(usize::from(client), n),
        }
    }

    fn poll(&mut self, client: usize) {
        if self.world.poll(self.ids[client]).is_err() {
            self.begin(client);
        }
    }

    fn ask(&mut self, client: usize, n: u8) {
        // By name, and sometimes by alias.
        let asked = if n.is_multiple_of(3) { format!("net/{n}") } else { name(n) };
        if NAMED[client] {
            self.world.request(self.ids[client], subscribe(ADDRESS, &[&asked])).unwrap();
            self.asked[client].insert(asked);
        }
    }

    fn leave(&mut self, client: usize, n: u8) {
        let asked = if n.is_multiple_of(3) { format!("net/{n}") } else { name(n) };
        if NAMED[client] && self.asked[client].remove(&asked) {
            self.world.request(self.ids[client], unsubscribe(ADDRESS, &[&asked])).unwrap();
        }
    }

    fn deliver(&mut self, client: usize, refuse: Option<u8>) {
        let id = self.ids[client];
        let before = self.world.peers[&id].held.clone();
        let refuse: BTreeSet<String> = refuse.map(name).into_iter().collect();
        let Some(response) = self.world.deliver(id, &refuse) else { return };
        let nothing = Held::new();
        let before = before.get(&response.type_url).unwrap_or(&nothing);
        for resource in &response.resources {
            let key = (response.type_url.clone(), resource.name.clone());
            // One who follows all is sent nothing that it has, and nothing that it refused.
            if !(NAMED[client] && response.type_url == ADDRESS) {
                let had = before.get(&resource.name).map(|(version, _)| version.as_str());
                assert_ne!(had, Some(resource.version.as_str()), "client {client} has {}", resource.name);
            }
            if refuse.contains(&resource.name) {
                self.refused[client].insert(key, resource.version.clone());
            } else {
                self.refused[client].remove(&key);
            }
        }
        for gone in &response.removed_resources {
            self.refused[client].remove(&(response.type_url.clone(), gone.clone()));
        }
    }

    /// Everything arrives.
    fn finish(&mut self) {
        self.world.store.publish();
        for client in 0..4 {
            let mut rounds = 0;
            loop {
                if self.world.poll(self.ids[client]).is_err() {
                    self.begin(client);
                    continue;
                }
                if self.world.peers[&self.ids[client]].inbox.is_empty() {
                    break;
                }
                self.deliver(client, None);
                rounds += 1;
                assert!(rounds < 1000, "client {client} never rests");
            }
        }
    }

    fn check(&self) {
        for client in 0..4 {
            for type_url in [POLICY, ADDRESS] {
                let named = NAMED[client] && type_url == ADDRESS;
                let held = self.world.bodies(self.ids[client], type_url);
                let status = self.world.peers[&self.ids[client]].session.status(&self.world.store);
                let status = status.iter().find(|s| &*s.type_url == type_url).unwrap();
                assert_eq!(status.acked, self.world.store.generation(), "client {client}: {status:#?}");
                let refused =
                    |n: &str| self.refused[client].contains_key(&(type_url.to_owned(), n.to_owned()));
                for ((_, name), (body, withheld)) in self.truth.iter().filter(|((t, _), _)| *t == type_url) {
                    let there = !*withheld || AUDIENCE[client] == Extensions::Culvert;
                    // Who left a name does not hold it, and what was refused of it counts no longer.
                    let followed = !named || self.asked[client].contains(name);
                    if refused(name) && followed {
                        let listed = status.rejected.iter().any(|r| &*r.name == name.as_str());
                        assert!(listed || !there, "client {client} refused {name}, and it is not known");
                        continue;
                    }
                    if named {
                        // Aliases are checked elsewhere; a name that was asked for is there.
                        if self.asked[client].contains(name) {
                            let wanted = there.then_some(body.as_str());
                            assert_eq!(held.get(name).map(String::as_str), wanted, "client {client}: {name}");
                        }
                        continue;
                    }
                    assert_eq!(
                        held.get(name).map(String::as_str),
                        there.then_some(body.as_str()),
                        "client {client}: {name}"
                    );
                }
                if !named {
                    let gone = held.keys().find(|n| !self.truth.contains_key(&(type_url, (*n).clone())));
                    assert_eq!(gone, None, "client {client} holds what is gone");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_client_comes_to_hold_what_there_is(
        steps in prop::collection::vec(step(), 1..120),
        tombstones in 1..40_usize,
        response_bytes in 100..2000_usize,
    ) {
        let mut run = Run::new(tombstones, response_bytes);
        for step in steps {
            run.take(step);
        }
        run.finish();
        run.check();
    }
}

/// A mesh of policies and workloads that list them.
#[derive(Clone, Debug)]
enum Edit {
    /// A workload lists just these policies, which are made if they are not there.
    List {
        workload: u8,
        policies: Vec<u8>,
        publish: bool,
    },
    /// Policies that nobody lists are removed.
    Clean,
    Poll(u8),
    Deliver(u8),
    Reconnect(u8),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        4 => (0..6_u8, prop::collection::vec(0..6_u8, 0..3), any::<bool>())
            .prop_map(|(workload, policies, publish)| Edit::List { workload, policies, publish }),
        2 => Just(Edit::Clean),
        4 => (0..2_u8).prop_map(Edit::Poll),
        6 => (0..2_u8).prop_map(Edit::Deliver),
        1 => (0..2_u8).prop_map(Edit::Reconnect),
    ]
}

/// No workload that a client holds lists a policy that it does not hold.
fn nothing_dangles(world: &World, id: ClientId) {
    let policies = world.bodies(id, POLICY);
    for (workload, listed) in world.bodies(id, ADDRESS) {
        for policy in listed.split(',').filter(|p| !p.is_empty()) {
            assert!(policies.contains_key(policy), "{workload} lists {policy}; there: {policies:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_workload_lists_a_policy_that_is_not_there(
        edits in prop::collection::vec(edit(), 1..150),
        response_bytes in 60..600_usize,
    ) {
        let mut world = World::new();
        world.limits = Limits { response_bytes, ..Limits::default() };
        let ids = [world.follower(), world.follower()];
        let mut listed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut policies: BTreeSet<String> = BTreeSet::new();
        for edit in edits {
            match edit {
                Edit::List { workload, policies: lists, publish } => {
                    let lists: BTreeSet<String> = lists.into_iter().map(name).collect();
                    let body = lists.iter().cloned().collect::<Vec<_>>().join(",");
                    world.stage(lists.iter().map(|p| set(POLICY, p, "")));
                    policies.extend(lists.iter().cloned());
                    world.stage([set(ADDRESS, &format!("w-{workload}"), &body)]);
                    listed.insert(format!("w-{workload}"), lists);
                    if publish {
                        world.store.publish();
                    }
                }
                Edit::Clean => {
                    let used: BTreeSet<_> = listed.values().flatten().cloned().collect();
                    world.apply(policies.difference(&used).map(|p| remove(POLICY, p)).collect::<Vec<_>>());
                    policies = used;
                }
                Edit::Poll(client) => world.poll(ids[usize::from(client)]).unwrap(),
                Edit::Deliver(client) => {
                    let id = ids[usize::from(client)];
                    world.deliver(id, &BTreeSet::new());
                    nothing_dangles(&world, id);
                }
                Edit::Reconnect(client) => {
                    let first = vec![subscribe(POLICY, &[]), subscribe(ADDRESS, &[])];
                    world.reconnect(ids[usize::from(client)], first);
                }
            }
        }
        world.store.publish();
        for id in ids {
            loop {
                world.poll(id).unwrap();
                if world.deliver(id, &BTreeSet::new()).is_none() {
                    break;
                }
                nothing_dangles(&world, id);
            }
            prop_assert_eq!(world.bodies(id, POLICY).into_keys().collect::<BTreeSet<_>>(), policies.clone());
            prop_assert_eq!(world.bodies(id, ADDRESS).len(), listed.len());
        }
    }
}

/// Bytes that no one may take for others.
#[test]
fn versions_are_of_the_content() {
    let mut world = World::new();
    let id = world.follower();
    let mut seen = BTreeSet::new();
    for (aliases, body) in
        [(vec![], "ab"), (vec!["a"], "b"), (vec!["a", "b"], ""), (vec!["ab"], ""), (vec![], "")]
    {
        let resource = Resource {
            aliases: aliases.iter().map(|a| Arc::from(*a)).collect(),
            ..support::resource(ADDRESS, "x", body)
        };
        world.apply([Change::Set(Resource {
            culvert: Some(Bytes::copy_from_slice(body.as_bytes())),
            ..resource
        })]);
        let responses = world.settle(id);
        let version = responses.last().unwrap().resources[0].version.clone();
        assert!(seen.insert(version), "{aliases:?} {body:?}");
    }
}
