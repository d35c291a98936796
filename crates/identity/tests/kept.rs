//! A node that starts while the CA's directory is away: with what it kept, or not at all, and never with another CA.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use identity::{
    CaDirectory, CaError, CertificateSettings, Certificates, Clock, KeyStore, LocalIssuer,
    LocalIssuerSettings, Validity, rotation,
};
use mesh::*;
use rustls_pki_types::UnixTime;

/// A start of the process.
struct Run {
    issuer: Arc<LocalIssuer>,
    certificates: Certificates,
}

fn start(ca: &Path, keys: Option<&Path>) -> Result<Run, CaError> {
    let store = keys.map(|keys| KeyStore::open(keys).unwrap());
    let poll = Duration::from_millis(20);
    let settings = LocalIssuerSettings { poll, ..LocalIssuerSettings::default() };
    let clock = Clock::system();
    let issuer =
        LocalIssuer::start_kept(CaDirectory::named(ca), store.clone(), domains(), settings, clock.clone())?;
    let issuer = Arc::new(issuer);
    let settings = CertificateSettings::default();
    let certificates = Certificates::new(issuer.clone(), issuer.bundle().clone(), settings, store, clock);
    Ok(Run { issuer, certificates })
}

fn roots(run: &Run) -> Vec<String> {
    run.issuer.bundle().snapshot().roots().iter().map(|root| root.id.to_string()).collect()
}

async fn until(mut condition: impl FnMut() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reached).await.expect("in time");
}

/// Files of certificates in a directory of keys: all but the roots, and what is being written.
fn kept(keys: &Path) -> usize {
    let names = std::fs::read_dir(keys).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name != "roots.pem" && !name.as_encoded_bytes().starts_with(b".")).count()
}

#[tokio::test]
async fn a_restarted_node_serves_while_the_directory_is_away_and_goes_on_when_it_is_back() {
    // Away, or as an empty directory is on which nothing is mounted.
    for place in [None, Some(0o700), Some(0o755)] {
        restart_without_the_directory(place).await;
    }
}

/// `place` is the mode of what stands at the directory's place.
async fn restart_without_the_directory(place: Option<u32>) {
    let dir = memory_dir();
    let (ca, keys, aside) = (dir.path().join("ca"), dir.path().join("keys"), dir.path().join("aside"));
    let (cart, web) = (id("shop/sa/cart"), id("shop/sa/web"));
    let before = start(&ca, Some(&keys)).unwrap();
    let serial = before.certificates.get(&cart).await.unwrap().serial().to_owned();
    until(|| kept(&keys) == 1).await;
    let trusted = roots(&before);
    drop(before);

    std::fs::rename(&ca, &aside).unwrap();
    if let Some(mode) = place {
        std::fs::DirBuilder::new().mode(mode).create(&ca).unwrap();
    }
    let after = start(&ca, Some(&keys)).unwrap_or_else(|e| panic!("{place:?}: {e}"));
    assert_eq!(roots(&after), trusted);
    assert_eq!(after.certificates.get(&cart).await.unwrap().serial(), serial);
    let error = after.certificates.get(&web).await.unwrap_err().to_string();
    assert!(error.contains("the CA is not available") && error.contains("ca"), "{place:?}: {error}");
    let status = after.issuer.status();
    assert!(status.signer.is_none() && status.error.is_some(), "{place:?}: {status:?}");
    assert!(!ca.join("ca.pem").exists() && !ca.join("roots.pem").exists(), "{place:?}: nothing is made");

    if place.is_some() {
        std::fs::remove_dir_all(&ca).unwrap();
    }
    std::fs::rename(&aside, &ca).unwrap();
    until(|| after.issuer.status().signer.is_some()).await;
    assert_eq!(roots(&after), trusted);
    let issued = async {
        while after.certificates.get(&web).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), issued).await.expect("it is issued now");
}

#[tokio::test]
async fn the_roots_that_are_kept_are_those_in_force() {
    let dir = memory_dir();
    let (ca, keys) = (dir.path().join("ca"), dir.path().join("keys"));
    let run = start(&ca, Some(&keys)).unwrap();
    let directory = CaDirectory::open(&ca).unwrap();
    let new = rotation::NewSigner::Made(Validity::of_roots());
    rotation::trust_both(&directory, &new, rotation::Pace::default(), &domains(), UnixTime::now()).unwrap();
    // They are in force a moment before they are kept.
    let kept = || std::fs::read_to_string(keys.join("roots.pem")).unwrap_or_default();
    until(|| roots(&run).len() == 2 && kept().matches("BEGIN CERTIFICATE").count() == 2).await;
    let trusted = roots(&run);
    drop(run);
    std::fs::remove_dir_all(&ca).unwrap();
    assert_eq!(roots(&start(&ca, Some(&keys)).unwrap()), trusted);
}

#[tokio::test]
async fn no_other_authority_is_made_where_certificates_of_one_are_kept() {
    let dir = memory_dir();
    let (ca, keys) = (dir.path().join("ca"), dir.path().join("keys"));
    let run = start(&ca, Some(&keys)).unwrap();
    run.certificates.get(&id("shop/sa/cart")).await.unwrap();
    until(|| kept(&keys) == 1).await;
    drop(run);
    std::fs::remove_dir_all(&ca).unwrap();
    std::fs::remove_file(keys.join("roots.pem")).unwrap();
    let error = start(&ca, Some(&keys)).err().expect("it does not start");
    assert!(matches!(error, CaError::Away { .. }), "{error}");
    let (text, reason) = (error.to_string(), std::error::Error::source(&error).unwrap().to_string());
    assert!(text.contains("empty") && reason.contains(ca.to_str().unwrap()), "{text}: {reason}");
    assert!(!ca.exists());
    // The remedy.
    std::fs::remove_dir_all(&keys).unwrap();
    start(&ca, Some(&keys)).unwrap();
    assert!(ca.join("ca.pem").exists());
}

#[tokio::test]
async fn without_kept_keys_a_directory_is_made_once() {
    let dir = memory_dir();
    let ca = dir.path().join("ca");
    let first = roots(&start(&ca, None).unwrap());
    assert_eq!(roots(&start(&ca, None).unwrap()), first);
    std::fs::remove_file(ca.join("ca.pem")).unwrap();
    let error = start(&ca, None).err().expect("it does not start");
    assert!(matches!(error, CaError::Incomplete { file: "roots.pem", .. }), "{error}");
}
