//! The root's exchange: whatever happens, who signs is trusted, a new root signs only when everybody live trusts it,
//! and an old one goes only when nothing that it signed is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::LazyLock;
use std::time::Duration;

use control_plane::ca::Proxy;
use control_plane::ca::record::{Record, Signer, ids};
use control_plane::ca::rotation::{
    Gates, Ground, Step, Target, Waiting, abandon, begin, drop_old, next, sign,
};
use identity::rotation::Stage;
use identity::{CertificateAuthority, RootId, TrustBundle, Validity};
use model::{TrustDomain, TrustDomains};
use proptest::prelude::*;
use rustls_pki_types::{CertificateDer, UnixTime};

const DAY: u64 = 24 * 3600;
const LIFETIME: u64 = DAY;
const STALE: u64 = 600;
const DEADLINE: u64 = 7 * DAY;

/// Six roots, made once.
static ROOTS: LazyLock<Vec<(Signer, RootId, CertificateDer<'static>)>> = LazyLock::new(|| {
    (0..6)
        .map(|_| {
            let made = CertificateAuthority::make_root(
                &TrustDomain::cluster_local(),
                Validity::of_roots(),
                UnixTime::now(),
            )
            .unwrap();
            let root = made.chain[0].clone();
            let id = RootId::of_certificate(&root).unwrap();
            (Signer::from(made), id, root)
        })
        .collect()
});

fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

fn first() -> Record {
    let (signer, _, root) = &ROOTS[0];
    Record::settled(signer.clone(), vec![root.clone()], LIFETIME, false)
}

fn root_of(record: &Record) -> RootId {
    ROOTS.iter().find(|(signer, ..)| *signer == record.signer).unwrap().1
}

fn target(index: usize, others: &[usize]) -> Target {
    let (signer, root, der) = ROOTS[index].clone();
    let mut roots = vec![der];
    roots.extend(others.iter().map(|other| ROOTS[*other].2.clone()));
    Target { signer, root, roots, given: false }
}

fn gates<'a>(now: u64, proxies: Option<&'a [Proxy]>, expires: u64, accepted: bool) -> Gates<'a> {
    Gates {
        now: at(now),
        proxies,
        signer_expires: at(expires),
        deadline: Duration::from_secs(DEADLINE),
        accepted,
    }
}

fn proxy(name: &str, trusts: &[RootId]) -> Proxy {
    Proxy { name: name.to_owned(), trusts: trusts.to_vec() }
}

const STALE_FOR: Duration = Duration::from_secs(STALE);
const LATE: u64 = u64::MAX / 2;

#[test]
fn the_stages_follow_each_other_behind_their_gates() {
    let old = first();
    let (a, b) = (ROOTS[0].1, ROOTS[1].1);
    let both = begin(&old, a, &target(1, &[]), STALE_FOR, at(1000));
    let rotation = both.state.rotation.clone().unwrap();
    assert_eq!(
        (rotation.stage, rotation.new_root, &rotation.old_roots[..]),
        (Stage::BothTrusted, b, &[a][..])
    );
    assert_eq!((root_of(&both), both.root_ids()), (a, vec![a, b]), "the old one signs, both are trusted");

    let live = [proxy("n/ready", &[a, b]), proxy("n/late", &[a]), proxy("n/silent", &[])];
    let wait = next(&rotation, &gates(2000, Some(&live), LATE, false));
    let laggards = vec!["n/late".to_owned(), "n/silent".to_owned()];
    assert_eq!(wait, Step::Wait(Waiting::Proxies { laggards: laggards.clone(), live: 3 }));
    assert_eq!(next(&rotation, &gates(2000, None, LATE, false)), Step::Wait(Waiting::Unknown));
    assert_eq!(
        next(&rotation, &gates(2000, None, LATE, true)),
        Step::Wait(Waiting::Unknown),
        "nobody could be named"
    );
    let accepted = next(&rotation, &gates(2000, Some(&live), LATE, true));
    assert_eq!(accepted, Step::Sign(Ground::Accepted(laggards.clone())));
    let late = next(&rotation, &gates(2000, Some(&live), 2000 + DEADLINE, false));
    assert_eq!(late, Step::Sign(Ground::Deadline(laggards)));
    assert_eq!(next(&rotation, &gates(2000, Some(&live[..1]), LATE, false)), Step::Sign(Ground::Ready));

    let signs = sign(&both, STALE_FOR, at(5000));
    let rotation = signs.state.rotation.clone().unwrap();
    assert_eq!((root_of(&signs), signs.root_ids()), (b, vec![a, b]), "the new one signs, both are trusted");
    let end = 5000 + STALE + LIFETIME;
    assert_eq!(next(&rotation, &gates(end - 1, Some(&[]), LATE, false)), Step::Wait(Waiting::Until(at(end))));
    assert_eq!(next(&rotation, &gates(end, None, LATE, false)), Step::Drop(Ground::Ready));
    let done = drop_old(&signs);
    assert_eq!((done.state.rotation.clone(), done.root_ids(), root_of(&done)), (None, vec![b], b));
}

#[test]
fn a_stage_out_of_turn_changes_nothing() {
    let old = first();
    assert_eq!(sign(&old, STALE_FOR, at(1)), old);
    assert_eq!(drop_old(&old), old);
    assert_eq!(abandon(&old), old);
    let both = begin(&old, ROOTS[0].1, &target(1, &[]), STALE_FOR, at(1));
    assert_eq!(drop_old(&both), both);
    let back = abandon(&both);
    assert_eq!((back.roots, back.signer, back.next), (old.roots, old.signer, None));
    let signs = sign(&both, STALE_FOR, at(1));
    assert_eq!(abandon(&signs), signs, "the new root signs already: the way out is forward");
    assert_eq!(sign(&signs, STALE_FOR, at(9)), signs, "it is not prolonged");
}

#[test]
fn what_needs_no_gate_is_done_at_once() {
    let bundle =
        TrustBundle::new(std::slice::from_ref(&ROOTS[0].2), TrustDomains::only(TrustDomain::cluster_local()))
            .unwrap();
    let root =
        CertificateAuthority::new(&ROOTS[0].0.chain, &ROOTS[0].0.key, &bundle, UnixTime::now()).unwrap();
    let made = root
        .make_intermediate(&TrustDomain::cluster_local(), Validity::of_workloads(), UnixTime::now())
        .unwrap();
    let below = Target { signer: Signer::from(made), given: true, ..target(0, &[]) };
    let renewed = begin(&first(), ROOTS[0].1, &below, STALE_FOR, at(1));
    assert_eq!((&renewed.signer, renewed.state.rotation.clone()), (&below.signer, None));
    assert!(renewed.state.given);

    // A bundle that gains a root: trusted at once. One that loses a root: after the last certificate.
    let more = begin(&first(), ROOTS[0].1, &target(0, &[1]), STALE_FOR, at(1));
    assert_eq!((more.root_ids(), more.state.rotation.clone()), (vec![ROOTS[0].1, ROOTS[1].1], None));
    let less = begin(&more, ROOTS[0].1, &target(0, &[]), STALE_FOR, at(1));
    let rotation = less.state.rotation.clone().unwrap();
    assert_eq!((rotation.stage, rotation.drop_at), (Stage::NewSigns, Some(1 + STALE + LIFETIME)));
    assert_eq!(drop_old(&less).root_ids(), [ROOTS[0].1]);
}

#[derive(Clone, Debug)]
enum Event {
    Wait(u64),
    /// The moment comes at which the old root may go.
    Due,
    /// A proxy comes, which trusts what is told then.
    Join,
    Leave(usize),
    /// A proxy reads what is told, and says so.
    Report(usize),
    /// A replica that read the record so long ago signs.
    Issue(u64),
    Begin(usize),
    Abandon,
    /// The leader looks; whether somebody accepts.
    Look(bool),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => prop_oneof![2 => 1..600_u64, 1 => 600..DAY, 1 => DAY..3 * DAY].prop_map(Event::Wait),
        2 => Just(Event::Due),
        2 => Just(Event::Join),
        1 => any::<usize>().prop_map(Event::Leave),
        4 => any::<usize>().prop_map(Event::Report),
        6 => (0..=STALE).prop_map(Event::Issue),
        3 => (0..6_usize).prop_map(Event::Begin),
        1 => Just(Event::Abandon),
        8 => prop_oneof![9 => Just(false), 1 => Just(true)].prop_map(Event::Look),
    ]
}

/// The cluster as the leader does not see it: who signed what, and who trusts what.
struct World {
    now: u64,
    /// All records so far, and from when on each was in force.
    history: Vec<(u64, Record)>,
    proxies: Vec<Proxy>,
    /// Root, and until when a certificate of it is valid.
    issued: Vec<(RootId, u64)>,
    joined: usize,
}

impl World {
    fn record(&self) -> &Record {
        &self.history.last().unwrap().1
    }

    fn write(&mut self, record: Record) {
        assert!(record.root_ids().contains(&root_of(&record)), "who signs is not trusted");
        if let Some(next) = &record.next {
            let (_, id, _) = ROOTS.iter().find(|(signer, ..)| signer == next).unwrap();
            assert!(record.root_ids().contains(id), "who will sign is not trusted");
        }
        let read = Record::read(&name(), &record.write().unwrap()).unwrap();
        assert_eq!(read, record, "what is written is read back");
        self.history.push((self.now, record));
    }

    fn look(&mut self, accepted: bool) {
        let record = self.record().clone();
        let Some(rotation) = &record.state.rotation else { return };
        match next(rotation, &gates(self.now, Some(&self.proxies), LATE, accepted)) {
            Step::Wait(_) => {}
            Step::Sign(ground) => {
                let laggards: Vec<_> = self
                    .proxies
                    .iter()
                    .filter(|proxy| !proxy.trusts.contains(&rotation.new_root))
                    .map(|proxy| proxy.name.clone())
                    .collect();
                match ground {
                    Ground::Ready => assert!(laggards.is_empty(), "{laggards:?} don't trust what now signs"),
                    Ground::Accepted(named) => assert_eq!(named, laggards),
                    Ground::Deadline(_) => panic!("nothing expires here"),
                }
                self.write(sign(&record, STALE_FOR, at(self.now)));
            }
            Step::Drop(ground) => {
                let after = drop_old(&record);
                if ground == Ground::Ready {
                    let left: Vec<_> = self
                        .issued
                        .iter()
                        .filter(|(root, until)| *until > self.now && !after.root_ids().contains(root))
                        .collect();
                    assert!(left.is_empty(), "certificates of a dropped root are valid: {left:?}");
                }
                self.write(after);
            }
        }
    }
}

fn name() -> control_plane::ca::record::SecretName {
    control_plane::ca::record::SecretName { namespace: "n".into(), name: "s".into(), remedy: "" }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_root_signs_untrusted_and_none_in_use_goes(
        events in proptest::collection::vec(event(), 1..120),
    ) {
        let mut world =
            World { now: 1_000_000, history: vec![(0, first())], proxies: vec![], issued: vec![], joined: 0 };
        for event in events {
            match event {
                Event::Wait(seconds) => world.now += seconds,
                Event::Due => {
                    let rotation = world.record().state.rotation.clone();
                    let due = rotation.and_then(|rotation| rotation.drop_at).unwrap_or(0);
                    world.now = world.now.max(due);
                }
                Event::Join => {
                    let name = format!("proxy-{}", world.joined);
                    world.joined += 1;
                    let trusts = world.record().root_ids();
                    world.proxies.push(Proxy { name, trusts });
                }
                Event::Leave(which) if !world.proxies.is_empty() => {
                    let which = which % world.proxies.len();
                    world.proxies.remove(which);
                }
                Event::Report(which) if !world.proxies.is_empty() => {
                    let (which, trusts) = (which % world.proxies.len(), world.record().root_ids());
                    world.proxies[which].trusts = trusts;
                }
                Event::Issue(ago) => {
                    let seen = world.now - ago;
                    let (_, record) = world.history.iter().rev().find(|(since, _)| *since <= seen).unwrap();
                    let until = world.now + record.state.longest_lifetime_s;
                    world.issued.push((root_of(record), until));
                }
                Event::Begin(index) => {
                    let record = world.record().clone();
                    let root = root_of(&record);
                    if record.state.rotation.is_none() && root != ROOTS[index].1 {
                        world.write(begin(&record, root, &target(index, &[]), STALE_FOR, at(world.now)));
                    }
                }
                Event::Abandon => {
                    let record = abandon(world.record());
                    world.write(record);
                }
                Event::Look(accepted) => world.look(accepted),
                Event::Leave(_) | Event::Report(_) => {}
            }
        }
        // And it comes to an end when all that is needed for it happens.
        for _ in 0..2 {
            let trusts = world.record().root_ids();
            world.proxies.iter_mut().for_each(|proxy| proxy.trusts.clone_from(&trusts));
            world.look(false);
            world.now += STALE + LIFETIME;
        }
        prop_assert_eq!(&world.record().state.rotation, &None);
        prop_assert_eq!(ids(&world.record().roots), vec![root_of(world.record())]);
    }
}
