//! The root exchanged in stages, with connections and handshakes under way at each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use identity::rotation::{self, Consent, NewSigner, Pace, RotationError, Stage};
use identity::{
    CaDirectory, Certificates, Distrust, HandshakeLimits, LocalIssuerSettings, RootId, TlsStream, Validity,
    accept, connect,
};
use mesh::*;
use rustls_pki_types::UnixTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

fn at(seconds_from_now: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + seconds_from_now))
}

fn new_root() -> NewSigner {
    NewSigner::Made(Validity::of_roots())
}

fn made_ca() -> (tempfile::TempDir, CaDirectory) {
    let dir = memory_dir();
    let ca = CaDirectory::open(dir.path()).unwrap();
    ca.make_if_missing(&domain(), Validity::of_roots(), at(0)).unwrap();
    (dir, ca)
}

fn trusted(ca: &CaDirectory) -> usize {
    ca.load(&domains(), at(0)).unwrap().roots.len()
}

fn signs(ca: &CaDirectory) -> String {
    ca.load(&domains(), at(0)).unwrap().authority.root().to_string()
}

#[test]
fn the_stages_go_in_order_and_each_can_be_run_again() {
    let (_dir, ca) = made_ca();
    let old = signs(&ca);
    let pace = Pace { settle: Duration::from_secs(300), lifetime: DAY };
    let too_soon = |result: Result<_, RotationError>| match result {
        Err(RotationError::TooEarly { .. }) => true,
        other => panic!("{other:?}"),
    };

    assert_eq!(rotation::status(&ca).unwrap().stage, Stage::Settled);
    let error = rotation::sign_with_new(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap_err();
    assert!(matches!(error, RotationError::OutOfOrder { .. }), "{error}");

    let first = rotation::trust_both(&ca, &new_root(), pace, &domains(), at(0)).unwrap();
    assert_eq!((first.stage, trusted(&ca), signs(&ca)), (Stage::BothTrusted, 2, old.clone()));
    let again = rotation::trust_both(&ca, &new_root(), pace, &domains(), at(60)).unwrap();
    assert_eq!((&again, trusted(&ca)), (&first, 2));

    let error = rotation::drop_old(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap_err();
    assert!(matches!(error, RotationError::OutOfOrder { .. }), "{error}");
    assert!(too_soon(rotation::sign_with_new(&ca, Consent::WhenDue, &domains(), at(299))));
    let second = rotation::sign_with_new(&ca, Consent::WhenDue, &domains(), at(301)).unwrap();
    let new = second.new_root.unwrap().to_string();
    assert_eq!((second.stage, trusted(&ca), signs(&ca)), (Stage::NewSigns, 2, new.clone()));
    assert_ne!(old, new);
    for _ in 0..2 {
        assert_eq!(rotation::sign_with_new(&ca, Consent::WhenDue, &domains(), at(400)).unwrap(), second);
        assert_eq!(rotation::trust_both(&ca, &new_root(), pace, &domains(), at(400)).unwrap(), second);
    }

    assert!(too_soon(rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(24 * 3600))));
    let third = rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(24 * 3600 + 302)).unwrap();
    assert_eq!((third.stage, trusted(&ca), signs(&ca)), (Stage::Settled, 1, new));
    assert_eq!(rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(0)).unwrap().stage, Stage::Settled);
    let mut files: Vec<_> = std::fs::read_dir(ca.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, [".lock", "ca.pem", "roots.pem"], "nothing is left of it, the old key least of all");
}

/// Each edit of each stage is cut short in turn, as by a crash, by putting the files back that it changed.
#[test]
fn a_stage_that_was_cut_short_is_completed_by_running_it_again() {
    let pace = Pace { settle: Duration::ZERO, lifetime: Duration::ZERO };
    for crash in ["roots.pem", "ca.pem", "roots.pem at the end"] {
        let (dir, ca) = made_ca();
        let file = |name: &str| dir.path().join(name);
        let old_roots = std::fs::read(file("roots.pem")).unwrap();
        rotation::trust_both(&ca, &new_root(), pace, &domains(), at(0)).unwrap();
        if crash == "roots.pem" {
            std::fs::write(file("roots.pem"), &old_roots).unwrap();
            let error = rotation::sign_with_new(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap_err();
            assert!(error.to_string().contains("does not vouch"), "{error}");
            rotation::trust_both(&ca, &new_root(), pace, &domains(), at(0)).unwrap();
            assert_eq!(trusted(&ca), 2);
        }
        let (next, old) = (std::fs::read(file("next.pem")).unwrap(), std::fs::read(file("ca.pem")).unwrap());
        rotation::sign_with_new(&ca, Consent::WhenDue, &domains(), at(0)).unwrap();
        if crash == "ca.pem" {
            std::fs::write(file("ca.pem"), old).unwrap();
            let error = rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(0)).unwrap_err();
            assert!(error.to_string().contains("the old root signs still"), "{error}");
            std::fs::write(file("next.pem"), next).unwrap();
            restrict(&file("next.pem"));
            rotation::sign_with_new(&ca, Consent::WhenDue, &domains(), at(0)).unwrap();
        }
        let plan = std::fs::read(file("rotation.json")).unwrap();
        rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(0)).unwrap();
        if crash.ends_with("end") {
            std::fs::write(file("rotation.json"), plan).unwrap();
            let done = rotation::drop_old(&ca, Consent::WhenDue, &domains(), at(0)).unwrap();
            assert_eq!(done.stage, Stage::Settled);
        }
        assert_eq!(trusted(&ca), 1, "{crash}");
    }
}

fn restrict(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn stage_one_can_be_taken_back_and_stage_two_not() {
    let (_dir, ca) = made_ca();
    let (old, pace) = (signs(&ca), Pace::default());
    rotation::trust_both(&ca, &new_root(), pace, &domains(), at(0)).unwrap();
    rotation::abandon(&ca, &domains(), at(0)).unwrap();
    assert_eq!((trusted(&ca), signs(&ca)), (1, old));
    assert!(!ca.path().join("next.pem").exists());
    rotation::trust_both(&ca, &new_root(), pace, &domains(), at(0)).unwrap();
    rotation::sign_with_new(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    let error = rotation::abandon(&ca, &domains(), at(0)).unwrap_err();
    assert!(matches!(error, RotationError::OutOfOrder { .. }), "{error}");
}

#[test]
fn a_given_signer_takes_over_and_its_root_is_trusted() {
    let (_dir, ca) = made_ca();
    let (_other, given) = made_ca();
    let loaded = given.load(&domains(), at(0)).unwrap();
    let validity = Validity { lifetime: 90 * DAY, backdate: Duration::ZERO };
    let made = loaded.authority.make_intermediate(&domain(), validity, at(0)).unwrap();
    let text = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der)).into_bytes();
    let signer = NewSigner::Given {
        chain: text("CERTIFICATE", &made.chain[0]),
        key: text("PRIVATE KEY", made.key.secret_der()),
        root: text("CERTIFICATE", &loaded.roots[0]),
    };
    rotation::trust_both(&ca, &signer, Pace::default(), &domains(), at(0)).unwrap();
    rotation::sign_with_new(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    rotation::drop_old(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    let now = ca.load(&domains(), at(0)).unwrap();
    assert_eq!((now.authority.root(), now.roots.len()), (loaded.authority.root(), 1));
    let issued = now.authority.issue(&id("a/sa/a"), Validity::of_workloads(), at(0)).unwrap();
    assert_eq!(issued.chain.len(), 2, "the intermediate is sent, the root is not");

    let (_third, stranger) = made_ca();
    let unrelated = NewSigner::Given {
        chain: text("CERTIFICATE", &made.chain[0]),
        key: text("PRIVATE KEY", made.key.secret_der()),
        root: std::fs::read(stranger.path().join("roots.pem")).unwrap(),
    };
    rotation::trust_both(&ca, &unrelated, Pace::default(), &domains(), at(0)).unwrap_err();
    assert_eq!(rotation::status(&ca).unwrap().stage, Stage::Settled);
}

#[test]
fn a_new_signer_below_the_same_root_drops_nothing() {
    let (_dir, ca) = made_ca();
    let loaded = ca.load(&domains(), at(0)).unwrap();
    let validity = Validity { lifetime: 90 * DAY, backdate: Duration::ZERO };
    let made = loaded.authority.make_intermediate(&domain(), validity, at(0)).unwrap();
    let text = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der)).into_bytes();
    let signer = NewSigner::Given {
        chain: text("CERTIFICATE", &made.chain[0]),
        key: text("PRIVATE KEY", made.key.secret_der()),
        root: text("CERTIFICATE", &loaded.roots[0]),
    };
    rotation::trust_both(&ca, &signer, Pace::default(), &domains(), at(0)).unwrap();
    assert_eq!(trusted(&ca), 1);
    rotation::sign_with_new(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    rotation::drop_old(&ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    assert_eq!((trusted(&ca), signs(&ca)), (1, loaded.authority.root().to_string()));
}

#[test]
fn a_record_that_is_not_readable_is_said_so() {
    let (dir, ca) = made_ca();
    for text in ["", "{", "{\"stage\":\"flying\"}", "[]", "{\"stage\":\"settled\",\"more\":1}"] {
        std::fs::write(dir.path().join("rotation.json"), text).unwrap();
        let error = rotation::status(&ca).unwrap_err();
        assert!(matches!(error, RotationError::State(_)), "{error}");
    }
}

fn limits() -> HandshakeLimits {
    HandshakeLimits::default()
}

async fn open(client: &Certificates, server: &Certificates) -> Opened {
    let (a, b) = duplex(64 * 1024);
    let (web, db) = (id("shop/sa/web"), id("shop/sa/db"));
    let (a, b) =
        tokio::join!(connect(a, client, &web, db.clone().into(), limits()), accept(b, server, &db, limits()));
    (a.expect("connected"), b.expect("accepted"))
}

type Opened = (TlsStream<DuplexStream>, TlsStream<DuplexStream>);

async fn echo((client, server): &mut Opened) {
    say(client, server).await;
    say(server, client).await;
}

async fn say(from: &mut TlsStream<DuplexStream>, to: &mut TlsStream<DuplexStream>) {
    from.write_all(b"still here").await.unwrap();
    from.flush().await.unwrap();
    let mut got = [0; 10];
    to.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"still here");
}

/// Until every certificate of these is signed by this root.
async fn wait_for_issuer(nodes: &[&Certificates], root: RootId) {
    for certificates in nodes {
        for id in [id("shop/sa/web"), id("shop/sa/db")] {
            while certificates.get(&id).await.unwrap().root() != root {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Two nodes on one directory, new connections all the time in both directions, and long-lived ones; all three
/// stages under them. No handshake fails, and no connection is lost, but those that the last stage is meant to cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_under_traffic_loses_no_connection() {
    let settings = LocalIssuerSettings { poll: Duration::from_millis(20), ..LocalIssuerSettings::default() };
    let mesh = Mesh::start_with(settings);
    let (_issuer, other) = node(&mesh.ca, settings);
    let mine = mesh.certificates.clone();
    let (stop, handshakes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let traffic: Vec<_> = [(mine.clone(), other.clone()), (other.clone(), mine.clone())]
        .into_iter()
        .map(|(client, server)| {
            let (stop, handshakes) = (stop.clone(), handshakes.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    echo(&mut open(&client, &server).await).await;
                    handshakes.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let more = async || {
        let target = handshakes.load(Ordering::Relaxed) + 20;
        while handshakes.load(Ordering::Relaxed) < target {
            assert!(traffic.iter().all(|task| !task.is_finished()), "a connection was lost");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };

    let mut old = open(&mine, &other).await;
    let old_root = old.0.peer().root;
    more().await;
    let status = rotation::trust_both(&mesh.ca, &new_root(), Pace::default(), &domains(), at(0)).unwrap();
    let new_root = status.new_root.unwrap();
    for bundle in [mine.bundle(), other.bundle()] {
        bundle.subscribe().wait_for(|generation| *generation >= 1).await.unwrap();
        assert!(bundle.snapshot().root(&new_root).is_some());
    }
    more().await;
    let mut middle = open(&mine, &other).await;
    assert_eq!(middle.0.peer().root, old_root);

    rotation::sign_with_new(&mesh.ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    wait_for_issuer(&[&mine, &other], new_root).await;
    more().await;
    let mut fresh = open(&mine, &other).await;
    assert_eq!((fresh.0.peer().root, fresh.1.peer().root), (new_root, new_root));
    for connection in [&mut old, &mut middle, &mut fresh] {
        echo(connection).await;
        mine.bundle().still_trusts(connection.0.peer()).unwrap();
    }

    rotation::drop_old(&mesh.ca, Consent::Acknowledged, &domains(), at(0)).unwrap();
    for bundle in [mine.bundle(), other.bundle()] {
        bundle.subscribe().wait_for(|generation| *generation >= 2).await.unwrap();
    }
    more().await;
    stop.store(true, Ordering::Relaxed);
    for task in traffic {
        task.await.unwrap();
    }
    // Who is cut now is for the caller: it is told.
    for connection in [&old, &middle] {
        let distrust = mine.bundle().still_trusts(connection.0.peer()).unwrap_err();
        assert!(matches!(distrust, Distrust::RootRemoved { root, .. } if root == old_root));
    }
    mine.bundle().still_trusts(fresh.0.peer()).unwrap();
}

#[tokio::test]
async fn trust_domain_aliases_hold_while_they_are_in_force() {
    use model::{TrustDomain, TrustDomains};
    let mesh = Mesh::start();
    let renamed: TrustDomain = "renamed.example".parse().unwrap();
    let old_name = id("shop/sa/db");
    let new_name = "spiffe://renamed.example/ns/shop/sa/db".parse().unwrap();
    let bundle = mesh.certificates.bundle();
    assert!(bundle.set_trust_domains(TrustDomains { own: renamed.clone(), aliases: [domain()].into() }));
    assert!(!bundle.set_trust_domains(TrustDomains { own: renamed.clone(), aliases: [domain()].into() }));
    // The server still has its old name, and is expected by its new one.
    let (a, b) = duplex(64 * 1024);
    let web = id("shop/sa/web");
    let (a, b) = tokio::join!(
        connect(a, &mesh.certificates, &web, identity::ExpectedPeers::One(new_name), limits()),
        accept(b, &mesh.certificates, &old_name, limits())
    );
    let (a, _b) = (a.unwrap(), b.unwrap());
    bundle.still_trusts(a.peer()).unwrap();
    bundle.set_trust_domains(TrustDomains::only(renamed));
    assert!(matches!(bundle.still_trusts(a.peer()), Err(Distrust::TrustDomain { .. })));
}

#[test]
fn a_directory_s_authority_is_checked_before_a_rotation_begins() {
    let (dir, ca) = made_ca();
    std::fs::write(dir.path().join("ca.pem"), "broken").unwrap();
    let error = rotation::trust_both(&ca, &new_root(), Pace::default(), &domains(), at(0)).unwrap_err();
    assert!(matches!(error, RotationError::Ca(_)), "{error}");
}
