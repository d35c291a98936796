//! The root's life in its Secret: made once, followed, never replaced by something broken, exchanged in stages, told to
//! the cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod fake_api;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use control_plane::ca::record::{Record, SecretName};
use control_plane::ca::{
    ABANDON, ACCEPT, Ca, CaSettings, Current, Fleet, Keeper, KeeperSettings, Proxy, ROTATE, STATUS,
};
use fake_api::FakeApi;
use identity::{
    CertificateAuthority, Clock, MadeCa, RootId, TrustBundle, Validity, certificates_to_pem, key_to_pem,
};
use model::{TrustDomain, TrustDomains};
use rustls_pki_types::UnixTime;
use serde_json::{Value, json};
use tokio::sync::watch;

const OWN: &str = "/api/v1/namespaces/culvert-system/secrets/culvert-ca-secret";
const GIVEN: &str = "/api/v1/namespaces/culvert-system/secrets/cacerts";

/// A clock that tests move.
#[derive(Debug)]
struct Moved(Mutex<Duration>);

impl rustls::time_provider::TimeProvider for Moved {
    fn current_time(&self) -> Option<UnixTime> {
        let now = UnixTime::now().as_secs() + self.0.lock().unwrap().as_secs();
        Some(UnixTime::since_unix_epoch(Duration::from_secs(now)))
    }
}

#[derive(Default)]
struct Proxies(Mutex<Option<Vec<Proxy>>>);

impl Fleet for Proxies {
    fn proxies(&self) -> Option<Vec<Proxy>> {
        self.0.lock().unwrap().clone()
    }

    fn dead(&self) -> Vec<String> {
        vec!["n/gone (its node is not ready: n9)".to_owned()]
    }
}

struct Replica {
    keeper: Keeper,
    current: Current,
    fleet: Arc<Proxies>,
    clock: Arc<Moved>,
    _leads: watch::Sender<bool>,
}

impl Replica {
    fn new(api: &FakeApi, leads: bool) -> Self {
        let clock = Arc::new(Moved(Mutex::default()));
        let domains = TrustDomains::only(TrustDomain::cluster_local());
        let current = Current::new(domains, Clock::new(clock.clone()));
        let fleet = Arc::new(Proxies(Mutex::new(Some(Vec::new()))));
        let (sender, leads) = watch::channel(leads);
        let settings = KeeperSettings::new("culvert-system".into(), Duration::from_secs(24 * 3600));
        let keeper = Keeper::new(api.client(), settings, current.clone(), fleet.clone(), leads);
        Self { keeper, current, fleet, clock, _leads: sender }
    }

    fn advance(&self, by: Duration) {
        *self.clock.0.lock().unwrap() += by;
    }

    fn root(&self) -> RootId {
        self.current.get().expect("an authority").authority.root()
    }

    fn roots(&self) -> Vec<RootId> {
        self.current.get().expect("an authority").record.root_ids()
    }

    fn proxies(&self, proxies: &[(&str, &[RootId])]) {
        let proxy =
            |(name, trusts): &(&str, &[RootId])| Proxy { name: (*name).into(), trusts: trusts.to_vec() };
        *self.fleet.0.lock().unwrap() = Some(proxies.iter().map(proxy).collect());
    }

    fn error(&self) -> String {
        let status = self.current.status();
        status.error.or(status.given_error).unwrap_or_default()
    }
}

fn root() -> MadeCa {
    CertificateAuthority::make_root(&TrustDomain::cluster_local(), Validity::of_roots(), UnixTime::now())
        .unwrap()
}

fn authority(made: &MadeCa, root: &MadeCa) -> CertificateAuthority {
    let bundle = TrustBundle::new(&root.chain, TrustDomains::only(TrustDomain::cluster_local())).unwrap();
    CertificateAuthority::new(&made.chain, &made.key, &bundle, UnixTime::now()).unwrap()
}

fn intermediate(root: &MadeCa) -> MadeCa {
    let months = Validity { lifetime: Duration::from_secs(90 * 24 * 3600), backdate: Duration::ZERO };
    authority(root, root).make_intermediate(&TrustDomain::cluster_local(), months, UnixTime::now()).unwrap()
}

fn id(root: &MadeCa) -> RootId {
    RootId::of_certificate(&root.chain[0]).unwrap()
}

fn secret(data: &[(&str, &str)]) -> Value {
    let data: BTreeMap<_, _> = data.iter().map(|(key, text)| (*key, STANDARD.encode(text))).collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "data": data})
}

/// `cacerts` as Istio's documents make it.
fn given(signer: &MadeCa, root: &MadeCa) -> Value {
    let cert = certificates_to_pem(&signer.chain[..1]);
    let roots = certificates_to_pem(&root.chain);
    let chain = cert.clone() + &roots;
    secret(&[
        ("ca-cert.pem", &cert),
        ("ca-key.pem", &key_to_pem(&signer.key)),
        ("cert-chain.pem", &chain),
        ("root-cert.pem", &roots),
    ])
}

/// `cacerts` as cert-manager makes it: a Secret of the type `kubernetes.io/tls`.
fn given_as_tls(signer: &MadeCa, root: &MadeCa) -> Value {
    let mut secret = secret(&[
        ("tls.crt", &certificates_to_pem(&signer.chain)),
        ("tls.key", &key_to_pem(&signer.key)),
        ("ca.crt", &certificates_to_pem(&root.chain)),
    ]);
    secret["type"] = json!("kubernetes.io/tls");
    secret
}

fn text(object: &Value, key: &str) -> String {
    let data = object["data"][key].as_str().unwrap_or_else(|| panic!("{key}"));
    String::from_utf8(STANDARD.decode(data).unwrap()).unwrap()
}

fn annotate(api: &FakeApi, name: &str, value: &str) {
    let mut object = api.get(OWN).unwrap();
    object["metadata"]["annotations"][name] = json!(value);
    api.put(OWN, object);
}

fn annotation(api: &FakeApi, name: &str) -> Option<String> {
    api.get(OWN)?["metadata"]["annotations"][name].as_str().map(str::to_owned)
}

#[tokio::test]
async fn replicas_that_start_at_once_have_one_root_that_the_leader_made() {
    let api = FakeApi::default();
    let follower = Replica::new(&api, false);
    follower.keeper.round().await;
    assert!(follower.current.get().is_none() && api.get(OWN).is_none(), "who follows makes nothing");
    assert!(follower.error().contains("the replica that leads makes it"));
    follower.current.signing().unwrap_err();

    // Two that both think that they lead.
    let (one, two) = (Replica::new(&api, true), Replica::new(&api, true));
    tokio::join!(one.keeper.round(), two.keeper.round());
    follower.keeper.round().await;
    assert_eq!((one.root(), one.root()), (two.root(), follower.root()));
    let object = api.get(OWN).unwrap();
    assert_eq!(text(&object, "root-cert.pem"), text(&object, "ca-cert.pem"));
    assert!(text(&object, "ca-key.pem").contains("PRIVATE KEY"));
    follower.current.signing().unwrap();

    // A restart finds it, and writes nothing.
    let writes = api.writes().len();
    let again = Replica::new(&api, true);
    again.keeper.round().await;
    again.keeper.round().await;
    assert_eq!((again.root(), api.writes().len()), (one.root(), writes));
}

/// What, the changed keys, the key at fault, what the error says.
type Case = (&'static str, Vec<(&'static str, Option<String>)>, &'static str, &'static str);

fn broken_secrets() -> Vec<Case> {
    let other = root();
    let short = Validity { lifetime: Duration::from_secs(1), backdate: Duration::from_secs(10) };
    let late = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() - 100));
    let expired = CertificateAuthority::make_root(&TrustDomain::cluster_local(), short, late).unwrap();
    let pem = |made: &MadeCa| certificates_to_pem(&made.chain);
    vec![
        ("no key", vec![("ca-key.pem", None)], "ca-key.pem", "missing"),
        ("an empty key", vec![("ca-key.pem", Some(String::new()))], "ca-key.pem", "empty"),
        (
            "a broken key",
            vec![("ca-key.pem", Some("-----BEGIN PRIVATE KEY-----\n?".into()))],
            "ca-key.pem",
            "PEM",
        ),
        ("a key that is none", vec![("ca-key.pem", Some("hello".into()))], "ca-key.pem", "no private key"),
        (
            "another's key",
            vec![("ca-key.pem", Some(key_to_pem(&other.key)))],
            "ca-key.pem",
            "is not the one of",
        ),
        ("no certificate", vec![("ca-cert.pem", None)], "ca-cert.pem", "missing"),
        ("garbage", vec![("ca-cert.pem", Some("\u{0}\u{1}".into()))], "ca-cert.pem", "no certificate"),
        ("another's root", vec![("root-cert.pem", Some(pem(&other)))], "root-cert.pem", "does not vouch"),
        ("no root", vec![("root-cert.pem", None)], "root-cert.pem", "missing"),
        ("a broken state", vec![("state.json", Some("{".into()))], "state.json", "EOF"),
        (
            "an expired one",
            vec![
                ("ca-cert.pem", Some(pem(&expired))),
                ("cert-chain.pem", Some(String::new())),
                ("root-cert.pem", Some(pem(&expired))),
                ("ca-key.pem", Some(key_to_pem(&expired.key))),
            ],
            "ca-cert.pem",
            "expired at",
        ),
    ]
}

#[tokio::test]
async fn a_broken_secret_leaves_the_last_good_authority_in_force_and_says_what_is_wrong() {
    let api = FakeApi::default();
    let replica = Replica::new(&api, true);
    replica.keeper.round().await;
    let (good, root_id) = (api.get(OWN).unwrap(), replica.root());
    for (what, changes, key, says) in broken_secrets() {
        let mut broken = good.clone();
        for (at, value) in changes {
            broken["data"][at] = value.map_or(Value::Null, |text| json!(STANDARD.encode(text)));
        }
        broken["data"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
        api.put(OWN, broken.clone());
        let writes = api.writes().len();
        replica.keeper.round().await;
        let error = replica.error();
        for part in ["Secret culvert-system/culvert-ca-secret", &format!("key {key}:"), says, "delete it"] {
            assert!(error.contains(part), "{what}: {part}: {error}");
        }
        assert!(!error.contains("BEGIN"), "{what}: {error}");
        assert_eq!(replica.root(), root_id, "{what}");
        replica.current.signing().expect(what);
        assert_eq!(api.writes().len(), writes, "{what}: what is broken is not overwritten");
        // One that starts now has nothing to go on by, and makes nothing.
        let fresh = Replica::new(&api, true);
        fresh.keeper.round().await;
        assert!(fresh.current.signing().unwrap_err().contains(key), "{what}");
        assert_eq!(api.writes().len(), writes, "{what}");
        api.put(OWN, good.clone());
        replica.keeper.round().await;
        assert_eq!(replica.error(), "", "{what}");
    }
    // Deleted, it comes back as it was.
    api.delete(OWN);
    replica.keeper.round().await;
    assert_eq!(
        (replica.root(), text(&api.get(OWN).unwrap(), "ca-cert.pem")),
        (root_id, text(&good, "ca-cert.pem"))
    );
}

/// Whatever a key of the Secret holds, it is read or refused.
#[tokio::test]
async fn a_secret_with_spoiled_bytes_is_refused_or_still_signs() {
    let api = FakeApi::default();
    Replica::new(&api, true).keeper.round().await;
    let name = SecretName { namespace: "n".into(), name: "s".into(), remedy: "" };
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let object: k8s_openapi::api::core::v1::Secret = serde_json::from_value(api.get(OWN).unwrap()).unwrap();
    let good = object.data.unwrap();
    let mut refused = 0;
    for key in good.keys() {
        let length = good[key].0.len();
        for step in 0..200 {
            let (mut data, at) = (good.clone(), step * length / 200);
            let bytes = &mut data.get_mut(key).unwrap().0;
            match step % 4 {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << (step % 8),
                2 => bytes[at] = 0xff,
                _ => drop(bytes.splice(at..at, b"-----BEGIN CERTIFICATE-----\n".iter().copied())),
            }
            let read = Record::read(&name, &data)
                .and_then(|record| record.authority(&name, &domains, UnixTime::now()));
            match read {
                Ok(authority) => {
                    let id = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
                    authority.issue(&id, Validity::of_workloads(), UnixTime::now()).unwrap();
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.secret, "n/s");
                }
            }
        }
    }
    assert!(refused > 400, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_is_away_it_signs_for_five_minutes_and_no_longer() {
    let api = FakeApi::default();
    let replica = Replica::new(&api, true);
    replica.keeper.round().await;
    api.set_down(true);
    tokio::time::advance(Duration::from_secs(299)).await;
    replica.keeper.round().await;
    replica.current.signing().unwrap();
    tokio::time::advance(Duration::from_secs(2)).await;
    let error = replica.current.signing().unwrap_err();
    assert!(
        error.contains("could not be confirmed") && error.contains("read Secret culvert-system/"),
        "{error}"
    );
    api.set_down(false);
    replica.keeper.round().await;
    replica.current.signing().unwrap();
}

#[tokio::test]
async fn a_rotation_waits_for_those_who_do_not_trust_the_new_root_and_for_the_last_certificate() {
    let api = FakeApi::default();
    let (leader, follower) = (Replica::new(&api, true), Replica::new(&api, false));
    leader.keeper.round().await;
    let a = leader.root();
    annotate(&api, ROTATE, "now");
    leader.proxies(&[("culvert-system/ztunnel-1", &[a]), ("shop/waypoint", &[])]);
    leader.keeper.round().await;
    follower.keeper.round().await;
    assert_eq!(annotation(&api, ROTATE), None, "what was followed is removed");
    let b = *leader.roots().iter().find(|root| **root != a).expect("a second root");
    assert_eq!((leader.root(), leader.roots()), (a, vec![a, b]));
    assert_eq!((follower.root(), follower.roots()), (a, vec![a, b]));
    leader.keeper.round().await;
    let status = annotation(&api, STATUS).unwrap();
    assert!(
        status.contains("2 of 2") && status.contains("culvert-system/ztunnel-1, shop/waypoint"),
        "{status}"
    );
    assert_eq!(leader.current.status().rotation, Some(status));

    // After a restart of the leader nothing is known of proxies: nothing moves.
    let restarted = Replica::new(&api, true);
    *restarted.fleet.0.lock().unwrap() = None;
    restarted.keeper.round().await;
    restarted.keeper.round().await;
    assert_eq!(restarted.root(), a);

    leader.proxies(&[("culvert-system/ztunnel-1", &[a, b]), ("shop/waypoint", &[])]);
    leader.keeper.round().await;
    assert_eq!(leader.root(), a);
    let status = annotation(&api, STATUS).unwrap();
    assert!(status.contains("1 of 2") && status.contains("new one: shop/waypoint;"), "{status}");
    assert!(status.ends_with("not counted: n/gone (its node is not ready: n9)"), "{status}");
    let writes = api.writes().len();
    leader.keeper.round().await;
    assert_eq!(api.writes().len(), writes, "nothing new, nothing written");

    leader.proxies(&[("culvert-system/ztunnel-1", &[a, b]), ("shop/waypoint", &[b])]);
    leader.keeper.round().await;
    follower.keeper.round().await;
    assert_eq!((leader.root(), follower.root()), (b, b), "the new one signs");
    assert_eq!(leader.roots(), vec![a, b], "both are trusted");
    assert!(annotation(&api, STATUS).unwrap().contains("the new root signs"));

    leader.advance(Duration::from_secs(24 * 3600));
    leader.keeper.round().await;
    assert_eq!(leader.roots(), vec![a, b], "a replica may have signed a little later");
    leader.advance(Duration::from_secs(601));
    leader.keeper.round().await;
    follower.keeper.round().await;
    assert_eq!((leader.roots(), follower.roots()), (vec![b], vec![b]));
    assert_eq!((annotation(&api, STATUS), leader.current.status().rotation), (None, None));
}

#[tokio::test]
async fn laggards_can_be_accepted_for_one_stage_and_a_rotation_taken_back() {
    let api = FakeApi::default();
    let leader = Replica::new(&api, true);
    leader.keeper.round().await;
    let a = leader.root();
    leader.proxies(&[("n/never", &[a])]);
    annotate(&api, ROTATE, "1");
    leader.keeper.round().await;
    annotate(&api, ABANDON, "1");
    leader.keeper.round().await;
    assert_eq!((leader.roots(), annotation(&api, ABANDON)), (vec![a], None));

    annotate(&api, ROTATE, "2");
    leader.keeper.round().await;
    annotate(&api, ACCEPT, "drop");
    leader.keeper.round().await;
    assert_eq!(leader.root(), a, "that is the other gate");
    annotate(&api, ACCEPT, "sign");
    leader.keeper.round().await;
    assert_ne!(leader.root(), a);
    assert_eq!(annotation(&api, ACCEPT), None);
    leader.keeper.round().await;
    assert_eq!(leader.roots().len(), 2, "the other gate was not accepted");
    annotate(&api, ACCEPT, "drop");
    leader.keeper.round().await;
    assert_eq!(leader.roots(), vec![leader.root()]);
}

#[tokio::test]
async fn a_root_that_was_made_here_is_exchanged_before_it_expires_whoever_lags() {
    let api = FakeApi::default();
    let leader = Replica::new(&api, true);
    leader.keeper.round().await;
    let a = leader.root();
    leader.proxies(&[("n/never", &[])]);
    let day = Duration::from_secs(24 * 3600);
    leader.advance(3284 * day);
    leader.keeper.round().await;
    assert_eq!(leader.roots().len(), 1);
    leader.advance(2 * day);
    leader.keeper.round().await;
    assert_eq!((leader.roots().len(), leader.root()), (2, a), "a year before");
    leader.advance(350 * day);
    leader.keeper.round().await;
    assert_eq!(leader.root(), a);
    leader.advance(8 * day);
    leader.keeper.round().await;
    assert_ne!(leader.root(), a, "a week before the end the new one signs");
}

#[tokio::test]
async fn a_given_authority_is_taken_over_and_exchanged_in_stages() {
    let api = FakeApi::default();
    let (first, second) = (root(), root());
    let (signer, next) = (intermediate(&first), intermediate(&second));
    api.put(GIVEN, given(&signer, &first));
    let leader = Replica::new(&api, true);
    leader.keeper.round().await;
    assert_eq!((leader.root(), leader.roots()), (id(&first), vec![id(&first)]));
    assert_eq!(leader.current.get().unwrap().record.signer.chain[0], signer.chain[0]);
    let writes = api.writes().len();
    leader.keeper.round().await;
    assert_eq!(api.writes().len(), writes, "it is what is in force");

    // A new intermediate of the same root needs no gate.
    let renewed = intermediate(&first);
    api.put(GIVEN, given(&renewed, &first));
    leader.keeper.round().await;
    assert_eq!(leader.current.get().unwrap().record.signer.chain[0], renewed.chain[0]);
    assert!(leader.current.get().unwrap().record.state.rotation.is_none());

    // A broken one is not taken over, also not when this replica restarts.
    let mut broken = given(&next, &second);
    broken["data"]["ca-key.pem"] = given(&signer, &first)["data"]["ca-key.pem"].clone();
    api.put(GIVEN, broken);
    leader.keeper.round().await;
    let error = leader.error();
    for part in ["Secret culvert-system/cacerts, key ca-key.pem", "is not the one of", "openssl verify"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let restarted = Replica::new(&api, true);
    restarted.keeper.round().await;
    assert_eq!((leader.root(), restarted.root()), (id(&first), id(&first)));
    restarted.current.signing().unwrap();

    // Another root: staged, by the same gates.
    leader.proxies(&[("n/p", &[id(&first)])]);
    api.put(GIVEN, given(&next, &second));
    leader.keeper.round().await;
    leader.keeper.round().await;
    assert_eq!((leader.error(), leader.root()), (String::new(), id(&first)));
    assert_eq!(leader.roots(), vec![id(&first), id(&second)]);
    // One more in between takes its place.
    let third = root();
    api.put(GIVEN, given(&third, &third));
    leader.keeper.round().await;
    assert_eq!(leader.roots(), vec![id(&first), id(&third)]);
    leader.proxies(&[("n/p", &[id(&first), id(&third)])]);
    leader.keeper.round().await;
    assert_eq!((leader.root(), leader.roots()), (id(&third), vec![id(&first), id(&third)]));
    // Without the Secret what was taken over stays.
    api.delete(GIVEN);
    leader.keeper.round().await;
    leader.advance(Duration::from_secs(24 * 3600 + 601));
    leader.keeper.round().await;
    assert_eq!((leader.root(), leader.roots()), (id(&third), vec![id(&third)]));
}

#[tokio::test]
async fn a_given_authority_waits_for_the_rotation_before_and_is_warned_of_before_it_expires() {
    let api = FakeApi::default();
    let (first, second, third) = (root(), root(), root());
    api.put(GIVEN, given(&first, &first));
    let leader = Replica::new(&api, true);
    leader.keeper.round().await;
    api.put(GIVEN, given(&second, &second));
    leader.keeper.round().await;
    leader.keeper.round().await;
    assert_eq!(leader.root(), id(&second), "nobody is live who would have to trust it");
    api.put(GIVEN, given(&third, &third));
    let failures = leader.current.failures();
    for _ in 0..3 {
        leader.keeper.round().await;
        assert_eq!(leader.root(), id(&second));
        assert!(leader.error().contains("cacerts waits"), "{}", leader.error());
    }
    assert_eq!(leader.current.failures(), failures + 1, "it is told once");
    let day = Duration::from_secs(24 * 3600);
    leader.advance(day + Duration::from_secs(601));
    for _ in 0..3 {
        leader.keeper.round().await;
    }
    assert_eq!((leader.root(), leader.error()), (id(&third), String::new()));
    leader.advance(2 * day);
    api.put(GIVEN, given(&intermediate(&third), &third));
    leader.keeper.round().await;
    leader.keeper.round().await;
    assert_eq!(leader.error(), "");
    // A sixth of ninety days: who renews it by himself has done so by then.
    leader.advance(70 * day);
    leader.keeper.round().await;
    assert_eq!(leader.error(), "");
    leader.advance(5 * day);
    leader.keeper.round().await;
    assert!(leader.error().contains("put a new one there"), "{}", leader.error());
}

#[tokio::test]
async fn of_the_end_of_a_root_that_was_given_is_warned_a_month_before_whatever_the_signing_certificates_life()
{
    let day = Duration::from_secs(24 * 3600);
    let of_days = |days| Validity { lifetime: days * day, backdate: Duration::ZERO };
    let root =
        CertificateAuthority::make_root(&TrustDomain::cluster_local(), of_days(90), UnixTime::now()).unwrap();
    // Renewed by itself long before its own end; and then cut at the root's.
    for (signing_days, advanced, warned) in [(35, 20, false), (90, 55, false), (90, 65, true)] {
        let api = FakeApi::default();
        let signer = authority(&root, &root)
            .make_intermediate(&TrustDomain::cluster_local(), of_days(signing_days), UnixTime::now())
            .unwrap();
        api.put(GIVEN, given(&signer, &root));
        let leader = Replica::new(&api, true);
        leader.keeper.round().await;
        assert_eq!(leader.error(), "");
        leader.advance(advanced * day);
        leader.keeper.round().await;
        let error = leader.error();
        assert_eq!(error.contains("put a new one there"), warned, "{signing_days} {advanced}: {error}");
    }
}

#[tokio::test]
async fn an_authority_that_cert_manager_gives_is_taken_and_its_renewal_and_its_faults_are_seen() {
    let api = FakeApi::default();
    let (first, second) = (root(), root());
    let signer = intermediate(&first);
    api.put(GIVEN, given_as_tls(&signer, &first));
    let leader = Replica::new(&api, true);
    leader.keeper.round().await;
    let signing = || leader.current.get().unwrap().record.signer.chain[0].clone();
    assert_eq!(
        (leader.root(), leader.roots(), leader.error()),
        (id(&first), vec![id(&first)], String::new())
    );
    let object = api.get(OWN).unwrap();
    assert_eq!(text(&object, "ca-cert.pem"), certificates_to_pem(&signer.chain[..1]));
    // Of the same root: at once.
    let renewed = intermediate(&first);
    api.put(GIVEN, given_as_tls(&renewed, &first));
    leader.keeper.round().await;
    assert_eq!((signing(), leader.roots()), (renewed.chain[0].clone(), vec![id(&first)]));
    // What is wrong is said by the keys that the Secret has.
    for (key, value, says) in [
        ("tls.key", Some(key_to_pem(&second.key)), "is not the one of"),
        ("tls.key", None, "missing"),
        ("tls.crt", Some("hello".to_owned()), "no certificate"),
        ("ca.crt", None, "missing"),
        ("ca.crt", Some(certificates_to_pem(&second.chain)), "does not vouch"),
    ] {
        let mut broken = given_as_tls(&renewed, &first);
        match value {
            Some(text) => broken["data"][key] = json!(STANDARD.encode(text)),
            None => drop(broken["data"].as_object_mut().unwrap().remove(key)),
        }
        api.put(GIVEN, broken);
        leader.keeper.round().await;
        let error = leader.error();
        assert!(error.contains(&format!("cacerts, key {key}: ")) && error.contains(says), "{key}: {error}");
        assert_eq!(signing(), renewed.chain[0], "{key}");
    }
    // Of another root: in stages.
    api.put(GIVEN, given_as_tls(&intermediate(&second), &second));
    leader.proxies(&[("n/p", &[id(&first)])]);
    leader.keeper.round().await;
    assert_eq!((signing(), leader.roots()), (renewed.chain[0].clone(), vec![id(&first), id(&second)]));
}

#[tokio::test]
async fn a_leader_that_was_overtaken_writes_nothing_over_the_other() {
    let api = FakeApi::default();
    let (one, two) = (Replica::new(&api, true), Replica::new(&api, true));
    one.keeper.round().await;
    let a = one.root();
    annotate(&api, ROTATE, "1");
    tokio::join!(one.keeper.round(), two.keeper.round());
    one.keeper.round().await;
    two.keeper.round().await;
    assert_eq!(one.current.get().unwrap().record, two.current.get().unwrap().record);
    assert_eq!(one.roots().len(), 2);
    assert!(one.roots().contains(&a));
}

#[tokio::test]
async fn the_roots_are_told_to_the_namespaces_of_the_mesh_and_put_right() {
    let api = FakeApi::default();
    api.serve_trust_bundles();
    let path = |namespace: &str| format!("/api/v1/namespaces/{namespace}/configmaps/istio-ca-root-cert");
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"root-cert.pem": "theirs"},
        "metadata": {"name": "istio-ca-root-cert", "namespace": "elsewhere"}});
    api.put(&path("elsewhere"), theirs.clone());
    let registry = process::metrics::Registry::new();
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let ca = Ca::new(CaSettings::new("culvert-system", "Kubernetes"), domains, Clock::system(), &registry);
    let names =
        |names: &[&str]| Arc::new(names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>());
    let (namespaces, receiver) = watch::channel(names(&["shop"]));
    let (leads, leader) = watch::channel(false);
    let fleet = Arc::new(Proxies(Mutex::new(Some(Vec::new()))));
    let running = tokio::spawn(ca.clone().run(api.client(), fleet, receiver, leader));

    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(api.writes(), Vec::<String>::new(), "who does not lead writes nothing");
    leads.send(true).unwrap();
    tokio::time::timeout(Duration::from_secs(10), ca.wait_ready()).await.unwrap();
    let roots = ca.current().get().unwrap().roots_pem.clone();
    let held =
        |namespace: &str| Some(api.get(&path(namespace))?["data"]["root-cert.pem"].as_str()?.to_owned());
    until(|| held("shop").as_ref() == Some(&roots)).await;
    namespaces.send(names(&["shop", "bank"])).unwrap();
    until(|| held("bank").as_ref() == Some(&roots)).await;

    let mut edited = api.get(&path("shop")).unwrap();
    edited["data"]["root-cert.pem"] = json!("edited");
    api.put(&path("shop"), edited);
    until(|| held("shop").as_ref() == Some(&roots)).await;
    api.delete(&path("bank"));
    until(|| held("bank").as_ref() == Some(&roots)).await;
    assert_eq!(held("elsewhere").as_deref(), Some("theirs"));
    let bundle = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles/istio.io:istiod-ca:root-cert";
    until(|| api.get(bundle).is_some_and(|bundle| bundle["spec"]["trustBundle"] == json!(roots))).await;

    // A rotation reaches them all.
    annotate(&api, ROTATE, "1");
    until(|| held("shop").is_some_and(|text| text.matches("BEGIN CERTIFICATE").count() == 2)).await;
    until(|| held("bank") == held("shop")).await;
    until(|| {
        api.get(bundle)
            .is_some_and(|bundle| bundle["spec"]["trustBundle"].as_str() == held("shop").as_deref())
    })
    .await;
    let text = registry.encode(process::metrics::Format::Prometheus);
    for metric in ["citadel_server_root_cert_expiry_timestamp 2", "culvert_ca_rotation_under_way 1"] {
        assert!(text.contains(metric), "{metric}: {text}");
    }
    running.abort();
}

async fn until(mut condition: impl FnMut() -> bool) {
    let patience = tokio::time::timeout(Duration::from_secs(30), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    patience.await.expect("it does not come");
}

#[tokio::test]
async fn beside_an_istiod_our_own_pods_have_a_root_of_their_own_and_its_config_maps_are_left_alone() {
    let api = FakeApi::default();
    api.serve_trust_bundles();
    let path = |namespace: &str, name: &str| {
        format!("/api/v1/namespaces/{namespace}/configmaps/{name}-ca-root-cert")
    };
    let istiods = |what: &str, fields: Value| json!([{"manager": "pilot-discovery", "operation": what, "fieldsType": "FieldsV1", "fieldsV1": fields}]);
    let fields = istiods("Update", json!({"f:data": {"f:root-cert.pem": {}}}));
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"root-cert.pem": "theirs"},
        "metadata": {"name": "istio-ca-root-cert", "namespace": "culvert-system", "managedFields": fields}});
    api.put(&path("culvert-system", "istio"), theirs);
    let bundle = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles/istio.io:istiod-ca:root-cert";
    let fields = istiods("Update", json!({"f:spec": {"f:trustBundle": {}}}));
    api.put(
        bundle,
        json!({"apiVersion": "certificates.k8s.io/v1beta1", "kind": "ClusterTrustBundle",
            "metadata": {"name": "istio.io:istiod-ca:root-cert", "managedFields": fields},
            "spec": {"trustBundle": "theirs"}}),
    );
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let settings = CaSettings {
        own_namespaces: ["culvert-system", "proxies"].map(str::to_owned).into(),
        ..CaSettings::new("culvert-system", "Kubernetes")
    };
    let registry = process::metrics::Registry::new();
    let ca = Ca::new(settings, domains, Clock::system(), &registry);
    let names = BTreeSet::from(["shop".to_owned(), "culvert-system".to_owned()]);
    let (_namespaces, receiver) = watch::channel(Arc::new(names));
    let (_leads, leader) = watch::channel(true);
    let fleet = Arc::new(Proxies(Mutex::new(Some(Vec::new()))));
    tokio::spawn(ca.clone().run(api.client(), fleet, receiver, leader));
    tokio::time::timeout(Duration::from_secs(10), ca.wait_ready()).await.unwrap();
    let roots = ca.current().get().unwrap().roots_pem.clone();
    let held = |namespace: &str, name: &str| {
        Some(api.get(&path(namespace, name))?["data"]["root-cert.pem"].as_str()?.to_owned())
    };
    for (namespace, name) in [("culvert-system", "culvert"), ("proxies", "culvert"), ("shop", "istio")] {
        until(|| held(namespace, name).as_ref() == Some(&roots)).await;
    }
    until(|| ca.current().status().of_others == BTreeMap::from([("pilot-discovery".to_owned(), 1)])).await;
    let text = registry.encode(process::metrics::Format::Prometheus);
    assert!(text.contains("culvert_ca_config_maps_of_others 1"), "{text}");
    // Its own is put right, whoever writes it; what is another's is not written, however long it lasts.
    api.delete(&path("culvert-system", "culvert"));
    until(|| held("culvert-system", "culvert").as_ref() == Some(&roots)).await;
    assert_eq!(held("culvert-system", "istio").as_deref(), Some("theirs"));
    assert_eq!(api.get(bundle).unwrap()["spec"]["trustBundle"], "theirs");
    // The istiod is gone, and somebody deletes what it left.
    api.delete(&path("culvert-system", "istio"));
    until(|| held("culvert-system", "istio").as_ref() == Some(&roots)).await;
    until(|| ca.current().status().of_others.is_empty()).await;
}
