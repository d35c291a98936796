//! Issue, renewal and loss of certificates, with an issuer that does as it is told and time that is moved by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use identity::{
    CertificateAuthority, CertificateError, CertificateSettings, Certificates, Clock, IssueError,
    IssueFuture, Issued, Issuer, KeyStore, MadeCa, StorageError, TrustBundle, Validity,
};
use mesh::*;
use model::SpiffeId;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;
use tokio::sync::watch;
use tokio::time::Instant;

/// Wall-clock time that goes with tokio's, and can be made to jump.
#[derive(Debug)]
struct MovedClock {
    start: Instant,
    jumped: AtomicI64,
}

const EPOCH: u64 = 1_800_000_000;

impl TimeProvider for MovedClock {
    fn current_time(&self) -> Option<UnixTime> {
        let now = EPOCH + self.start.elapsed().as_secs();
        Some(UnixTime::since_unix_epoch(Duration::from_secs(
            now.checked_add_signed(self.jumped.load(Ordering::Relaxed)).unwrap(),
        )))
    }
}

/// What the issuer does when it is asked.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mood {
    Issues,
    Fails,
    Hangs,
    IssuesForAnother,
    IssuesUntrusted,
    MixesUpKeys,
}

struct Scripted {
    bundle: TrustBundle,
    authority: Mutex<CertificateAuthority>,
    stranger: CertificateAuthority,
    clock: Clock,
    validity: Mutex<Validity>,
    mood: Mutex<Mood>,
    takes: Duration,
    asked: Mutex<Vec<(Instant, SpiffeId)>>,
    signer: watch::Sender<u64>,
}

fn authority(made: &MadeCa, clock: &Clock) -> (CertificateAuthority, TrustBundle) {
    let bundle = TrustBundle::new(&made.chain, domains()).unwrap();
    (CertificateAuthority::new(&made.chain, &made.key, &bundle, clock.now()).unwrap(), bundle)
}

impl Scripted {
    fn new(clock: Clock) -> Self {
        let root = || CertificateAuthority::make_root(&domain(), Validity::of_roots(), clock.now()).unwrap();
        let (own, bundle) = authority(&root(), &clock);
        Self {
            bundle,
            authority: Mutex::new(own),
            stranger: authority(&root(), &clock).0,
            clock,
            validity: Mutex::new(Validity { lifetime: HOUR, backdate: Duration::from_secs(60) }),
            mood: Mutex::new(Mood::Issues),
            takes: Duration::from_millis(100),
            asked: Mutex::default(),
            signer: watch::Sender::new(0),
        }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

impl Issuer for Scripted {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> IssueFuture<'a> {
        Box::pin(async move {
            self.asked.lock().unwrap().push((Instant::now(), id.clone()));
            tokio::time::sleep(self.takes).await;
            let (now, validity) = (self.clock.now(), *self.validity.lock().unwrap());
            let issue = |who: &SpiffeId| self.authority.lock().unwrap().issue(who, validity, now);
            let mood = *self.mood.lock().unwrap();
            Ok(match mood {
                Mood::Issues => issue(id)?,
                Mood::Fails => return Err(IssueError::Unavailable("it is away".to_owned())),
                Mood::Hangs => std::future::pending().await,
                Mood::IssuesForAnother => issue(&mesh::id("evil/sa/evil"))?,
                Mood::IssuesUntrusted => self.stranger.issue(id, validity, now)?,
                Mood::MixesUpKeys => Issued { key: issue(id)?.key, ..issue(id)? },
            })
        })
    }

    fn signer(&self) -> watch::Receiver<u64> {
        self.signer.subscribe()
    }
}

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

struct Node {
    moved: Arc<MovedClock>,
    issuer: Arc<Scripted>,
    certificates: Certificates,
}

fn settings() -> CertificateSettings {
    CertificateSettings { jitter_seed: 7, ..CertificateSettings::default() }
}

fn node_with(settings: CertificateSettings, store: Option<KeyStore>) -> Node {
    let moved = Arc::new(MovedClock { start: Instant::now(), jumped: AtomicI64::new(0) });
    let clock = Clock::new(moved.clone());
    let issuer = Arc::new(Scripted::new(clock.clone()));
    let certificates = Certificates::new(issuer.clone(), issuer.bundle.clone(), settings, store, clock);
    Node { moved, issuer, certificates }
}

fn node() -> Node {
    node_with(settings(), None)
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn concurrent_first_needs_share_one_issue() {
    let node = node();
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let certificates = node.certificates.clone();
            tokio::spawn(async move { certificates.get(&id("shop/sa/cart")).await.unwrap() })
        })
        .collect();
    let mut serials = std::collections::HashSet::new();
    for task in tasks {
        serials.insert(task.await.unwrap().serial().to_owned());
    }
    assert_eq!((serials.len(), node.issuer.asked()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_about_half_way() {
    let node = node();
    let cart = id("shop/sa/cart");
    let first = node.certificates.get(&cart).await.unwrap();
    pass(HOUR.mul_f64(0.44)).await;
    assert_eq!(node.issuer.asked(), 1);
    pass(HOUR.mul_f64(0.12)).await;
    assert_eq!(node.issuer.asked(), 2);
    let second = node.certificates.get(&cart).await.unwrap();
    assert_ne!(first.serial(), second.serial());
    assert_eq!(second.id(), &cart);
    pass(10 * HOUR).await;
    let asked = node.issuer.asked();
    assert!((19..=25).contains(&asked), "{asked}");
    let counts = node.certificates.counts();
    assert_eq!((counts.issued_total, counts.renewed_total), (asked as u64, asked as u64 - 1));
    assert_eq!((counts.identities, counts.valid, counts.failing), (1, 1, 0));
    assert!(counts.first_expiry_s.unwrap() > 1500);
}

#[tokio::test(start_paused = true)]
async fn identities_renew_spread_in_time() {
    let node = node();
    for n in 0..40 {
        node.certificates.get(&id(&format!("shop/sa/cart-{n}"))).await.unwrap();
    }
    let times: std::collections::HashSet<_> = node
        .certificates
        .status()
        .iter()
        .map(|s| s.certificate.as_ref().unwrap().renew_at.0.as_secs() / 10)
        .collect();
    assert!(times.len() > 15, "{}", times.len());
}

#[tokio::test(start_paused = true)]
async fn while_the_ca_is_away_the_old_certificate_serves_and_attempts_get_rarer() {
    let node = node();
    let cart = id("shop/sa/cart");
    let first = node.certificates.get(&cart).await.unwrap();
    node.issuer.set(Mood::Fails);
    pass(HOUR.mul_f64(0.9)).await;
    assert_eq!(node.certificates.get(&cart).await.unwrap().serial(), first.serial());
    assert_eq!(node.certificates.counts().failing, 1);
    let status = &node.certificates.status()[0];
    assert!(status.valid && status.failure.as_ref().unwrap().contains("it is away"));

    let times: Vec<_> = node.issuer.asked.lock().unwrap().iter().map(|(at, _)| *at).collect();
    let gaps: Vec<_> = times[1..].windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.len() >= 10, "{gaps:?}");
    assert!(gaps[0] < Duration::from_secs(3), "{gaps:?}");
    assert!(gaps.iter().all(|gap| *gap <= Duration::from_secs(152)), "{gaps:?}");
    assert!(gaps.last().unwrap() > &Duration::from_secs(110), "{gaps:?}");

    // Past its end: an error with the reason, at each try of a second.
    pass(HOUR.mul_f64(0.2)).await;
    let error = node.certificates.get(&cart).await.unwrap_err();
    assert!(error.to_string().contains("it is away"), "{error}");

    node.issuer.set(Mood::Issues);
    let begin = Instant::now();
    let fresh = node.certificates.get(&cart).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(2), "asking cuts the back-off short");
    assert_ne!(fresh.serial(), first.serial());
    assert_eq!(node.certificates.counts().failing, 0);
}

#[tokio::test(start_paused = true)]
async fn asking_for_what_is_not_issued_does_not_storm_the_ca() {
    let node = node();
    node.issuer.set(Mood::Fails);
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let certificates = node.certificates.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    let error = certificates.get(&id("shop/sa/cart")).await.unwrap_err();
                    assert!(matches!(error, CertificateError::NotIssued { .. }));
                }
            })
        })
        .collect();
    let begin = Instant::now();
    for task in tasks {
        task.await.unwrap();
    }
    let seconds = begin.elapsed().as_secs() as usize;
    assert!(node.issuer.asked() <= seconds + 2, "{} attempts in {seconds} s", node.issuer.asked());
}

#[tokio::test(start_paused = true)]
async fn what_the_ca_must_not_send_is_not_used() {
    for (mood, reason) in [
        (Mood::IssuesForAnother, "the CA sent a certificate for spiffe://cluster.local/ns/evil/sa/evil"),
        (Mood::IssuesUntrusted, "no root of the trust bundle vouches for"),
        (Mood::MixesUpKeys, "key and certificate from the CA don't fit"),
    ] {
        let node = node();
        node.issuer.set(mood);
        let error = node.certificates.get(&id("shop/sa/cart")).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{mood:?}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_hangs_is_given_up_and_holds_up_nobody_else() {
    let node = node();
    node.issuer.set(Mood::Hangs);
    let hanging = node.certificates.clone();
    let hanging = tokio::spawn(async move { hanging.get(&id("shop/sa/cart")).await });
    pass(Duration::from_secs(1)).await;
    node.issuer.set(Mood::Issues);
    let begin = Instant::now();
    node.certificates.get(&id("shop/sa/web")).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1));
    let error = hanging.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("did not answer in 30s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_new_signer_has_all_certificates_issued_anew_at_once() {
    let node = node();
    let ids: Vec<_> = (0..20).map(|n| id(&format!("shop/sa/cart-{n}"))).collect();
    let mut before = Vec::new();
    for id in &ids {
        before.push(node.certificates.get(id).await.unwrap().serial().to_owned());
    }
    pass(MINUTE).await;
    node.issuer.signer.send_modify(|generation| *generation += 1);
    pass(Duration::from_millis(600)).await;
    for (id, before) in ids.iter().zip(&before) {
        assert_ne!(node.certificates.get(id).await.unwrap().serial(), before);
    }
    assert_eq!(node.issuer.asked(), 40);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_whose_root_is_dropped_is_replaced() {
    let node = node();
    let cart = id("shop/sa/cart");
    node.certificates.get(&cart).await.unwrap();
    pass(MINUTE).await;
    let clock = Clock::new(node.moved.clone());
    let made = CertificateAuthority::make_root(&domain(), Validity::of_roots(), clock.now()).unwrap();
    *node.issuer.authority.lock().unwrap() = authority(&made, &clock).0;
    assert!(node.issuer.bundle.set_roots(&made.chain).unwrap());
    pass(Duration::from_secs(1)).await;
    let after = node.certificates.get(&cart).await.unwrap();
    assert_eq!(after.root(), node.issuer.bundle.snapshot().roots()[0].id);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_is_followed() {
    let node = node();
    let cart = id("shop/sa/cart");
    let first = node.certificates.get(&cart).await.unwrap();
    node.moved.jumped.store(2 * 3600, Ordering::Relaxed);
    pass(MINUTE).await;
    let second = node.certificates.get(&cart).await.unwrap();
    assert_ne!(first.serial(), second.serial(), "expired by the jump");

    node.moved.jumped.store(-1800, Ordering::Relaxed);
    pass(MINUTE).await;
    let third = node.certificates.get(&cart).await.unwrap();
    assert_ne!(second.serial(), third.serial(), "not yet valid by the jump");
    assert_eq!(node.issuer.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_of_seconds_does_not_make_a_busy_loop() {
    let node = node();
    *node.issuer.validity.lock().unwrap() = Validity { lifetime: Duration::from_secs(2), backdate: MINUTE };
    node.certificates.get(&id("shop/sa/cart")).await.unwrap();
    pass(MINUTE).await;
    assert!((20..=61).contains(&node.issuer.asked()), "{}", node.issuer.asked());
}

#[tokio::test(start_paused = true)]
async fn identities_are_limited_and_idle_ones_make_place() {
    let node = node_with(CertificateSettings { max_identities: 3, ..settings() }, None);
    for name in ["a/sa/a", "b/sa/b", "c/sa/c"] {
        node.certificates.get(&id(name)).await.unwrap();
    }
    let error = node.certificates.get(&id("d/sa/d")).await.unwrap_err();
    assert!(matches!(error, CertificateError::TooMany { max: 3, .. }), "{error}");
    pass(2 * MINUTE).await;
    node.certificates.get(&id("a/sa/a")).await.unwrap();
    node.certificates.get(&id("d/sa/d")).await.unwrap();
    let ids: Vec<_> = node.certificates.status().into_iter().map(|s| s.id).collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.contains(&id("a/sa/a")) && ids.contains(&id("d/sa/d")));
    let counts = node.certificates.counts();
    assert_eq!((counts.evicted_total, counts.refused_total), (1, 1));
}

/// Pods that left while no ztunnel ran, or was not told: their keys end with their certificates.
#[tokio::test]
async fn keys_whose_certificates_have_expired_are_removed_at_the_start() {
    let dir = memory_dir();
    let path = dir.path().join("keys");
    let store = KeyStore::open(&path).unwrap();
    let before = node_with(settings(), Some(store.clone()));
    before.certificates.get(&id("a/sa/a")).await.unwrap();
    let file = kept_file(&path).await;
    let roots: Vec<_> = before.issuer.bundle.snapshot().roots().iter().map(|root| root.der.clone()).collect();
    store.keep_roots(&roots).unwrap();
    std::fs::write(path.join("notes.pem"), "not a certificate").unwrap();
    let (moved, issuer) = (before.moved.clone(), before.issuer.clone());
    let start_again = || {
        let (clock, bundle) = (Clock::new(moved.clone()), issuer.bundle.clone());
        Certificates::new(issuer.clone(), bundle, settings(), Some(store.clone()), clock)
    };
    let now = start_again();
    now.get(&id("a/sa/a")).await.unwrap();
    assert_eq!(now.counts().restored_total, 1);
    drop((now, before.certificates));
    moved.jumped.store(2 * 3600, Ordering::Relaxed);
    let _later = start_again();
    while file.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(path.join("roots.pem").exists() && path.join("notes.pem").exists());
}

#[tokio::test]
async fn who_makes_place_leaves_no_key_behind() {
    let dir = memory_dir();
    let path = dir.path().join("keys");
    let settings = CertificateSettings { max_identities: 1, idle: Duration::ZERO, ..settings() };
    let node = node_with(settings, Some(KeyStore::open(&path).unwrap()));
    node.certificates.get(&id("a/sa/a")).await.unwrap();
    let first = kept_file(&path).await;
    node.certificates.get(&id("b/sa/b")).await.unwrap();
    while first.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_ne!(kept_file(&path).await, first);
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_identity_is_no_longer_renewed() {
    let node = node();
    for name in ["a/sa/a", "b/sa/b"] {
        node.certificates.get(&id(name)).await.unwrap();
    }
    node.certificates.retain(|known| *known == id("a/sa/a"));
    assert_eq!(node.certificates.counts().identities, 1);
    pass(HOUR).await;
    let asked: Vec<_> = node.issuer.asked.lock().unwrap()[2..].iter().map(|(_, id)| id.clone()).collect();
    assert_eq!(asked, [id("a/sa/a")]);
    drop(node.certificates);
    pass(HOUR).await;
    assert_eq!(node.issuer.asked(), 3, "nothing is renewed once the last handle is gone");
}

#[tokio::test]
async fn a_restarted_node_serves_what_it_kept_while_the_ca_is_away() {
    let dir = memory_dir();
    let path = dir.path().join("keys");
    let (cart, web) = (id("shop/sa/cart"), id("shop/sa/web"));
    let before = node_with(settings(), Some(KeyStore::open(&path).unwrap()));
    let kept = before.certificates.get(&cart).await.unwrap();
    let file = kept_file(&path).await;
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    let bundle = before.issuer.bundle.clone();
    drop(before.certificates);

    let clock = Clock::new(before.moved.clone());
    let away = Arc::new(Scripted::new(clock.clone()));
    away.set(Mood::Fails);
    let store = KeyStore::open(&path).unwrap();
    let after = Certificates::new(away.clone(), bundle, settings(), Some(store.clone()), clock.clone());
    let restored = after.get(&cart).await.unwrap();
    assert_eq!((restored.serial(), away.asked()), (kept.serial(), 0));
    assert_eq!(after.counts().restored_total, 1);
    after.get(&web).await.unwrap_err();

    // A root that is gone takes what it vouched for with it.
    let other = Certificates::new(away.clone(), away.bundle.clone(), settings(), Some(store), clock);
    other.get(&cart).await.unwrap_err();

    after.forget(&cart);
    while std::fs::read_dir(&path).unwrap().count() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_kept_file_that_is_damaged_or_open_to_others_is_not_used() {
    let dir = memory_dir();
    let path = dir.path().join("keys");
    let cart = id("shop/sa/cart");
    let first = node_with(settings(), Some(KeyStore::open(&path).unwrap()));
    first.certificates.get(&cart).await.unwrap();
    let file = kept_file(&path).await;
    let good = std::fs::read(&file).unwrap();
    let use_it = async |expect_restored: u64| {
        let before = std::fs::read(&file).unwrap();
        let store = Some(KeyStore::open(&path).unwrap());
        let clock = Clock::new(first.moved.clone());
        let bundle = first.issuer.bundle.clone();
        let again = Certificates::new(first.issuer.clone(), bundle, settings(), store, clock);
        again.get(&cart).await.unwrap();
        assert_eq!(again.counts().restored_total, expect_restored);
        // What was issued instead is kept a moment after it is in use.
        while expect_restored == 0 && std::fs::read(&file).unwrap() == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    use_it(1).await;
    for damage in
        [&good[..good.len() / 2], b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    {
        std::fs::write(&file, damage).unwrap();
        use_it(0).await;
    }
    std::fs::write(&file, &good).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    use_it(0).await;
}

/// The one file that is kept, once it is there: it is written after the certificate is in use.
async fn kept_file(path: &std::path::Path) -> std::path::PathBuf {
    loop {
        let whole =
            |file: &std::path::PathBuf| !file.file_name().unwrap().as_encoded_bytes().starts_with(b".");
        let files = std::fs::read_dir(path).unwrap().map(|file| file.unwrap().path());
        if let Some(file) = files.into_iter().find(whole) {
            return file;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn keys_are_not_kept_on_a_disk() {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let error = KeyStore::open(&disk.path().join("keys")).unwrap_err();
    assert!(matches!(error, StorageError::NotInMemory { .. }), "{error}");
}

#[test]
fn the_roots_are_kept_too() {
    let dir = memory_dir();
    let store = KeyStore::open(&dir.path().join("keys")).unwrap();
    assert!(store.roots().unwrap().is_none());
    let now = UnixTime::now();
    let made = CertificateAuthority::make_root(&domain(), Validity::of_roots(), now).unwrap();
    store.keep_roots(&made.chain).unwrap();
    assert_eq!(store.roots().unwrap().unwrap(), made.chain);
}
