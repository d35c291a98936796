//! The local CA: what it issues, what it accepts as given, and its directory while it is changed under it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use identity::{
    CaDirectory, CaError, CaWarning, CertificateAuthority, Clock, Creation, Issuer as _, LocalIssuer,
    LocalIssuerSettings, MadeCa, TrustBundle, Validity,
};
use mesh::*;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

fn now() -> UnixTime {
    UnixTime::now()
}

fn authority_of(made: &MadeCa) -> CertificateAuthority {
    let bundle = TrustBundle::new(&made.chain[made.chain.len() - 1..], domains()).unwrap();
    CertificateAuthority::new(&made.chain, &made.key, &bundle, now()).unwrap()
}

fn root() -> MadeCa {
    CertificateAuthority::make_root(&domain(), Validity::of_roots(), now()).unwrap()
}

fn pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))).collect()
}

fn write(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_workload_certificate_is_an_svid() {
    let made = root();
    let authority = authority_of(&made);
    let cart = id("shop/sa/cart");
    let validity = Validity { lifetime: Duration::from_secs(600), backdate: Duration::from_secs(120) };
    let issued = authority.issue(&cart, validity, now()).unwrap();
    assert_eq!(issued.chain.len(), 1, "the root is not sent");
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical, "the subject is empty");
    assert!(matches!(&san.value.general_names[..], [GeneralName::URI(uri)] if *uri == cart.to_string()));
    assert_eq!(leaf.subject().iter().count(), 0);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature() && !usage.value.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert!(!leaf.is_ca());
    let before = now().as_secs() as i64 - leaf.validity().not_before.timestamp();
    let after = leaf.validity().not_after.timestamp() - now().as_secs() as i64;
    assert!((118..=125).contains(&before) && (595..=601).contains(&after), "{before} {after}");
    let other = authority.issue(&cart, validity, now()).unwrap();
    let (_, other) = X509Certificate::from_der(&other.chain[0]).unwrap();
    assert_ne!(leaf.raw_serial(), other.raw_serial());
    assert_eq!(leaf.raw_serial().len(), 16);
    assert_ne!(leaf.public_key().raw, other.public_key().raw, "each has a key of its own");
}

#[test]
fn nothing_outlives_its_issuer() {
    let short = Validity { lifetime: Duration::from_secs(3600), backdate: Duration::ZERO };
    let made = CertificateAuthority::make_root(&domain(), short, now()).unwrap();
    let authority = authority_of(&made);
    let issued = authority.issue(&id("a/sa/a"), Validity::of_workloads(), now()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(leaf.validity().not_after.timestamp() as u64, authority.not_after().as_secs());
    let late = UnixTime::since_unix_epoch(Duration::from_secs(now().as_secs() + 7200));
    let error = authority.issue(&id("a/sa/a"), Validity::of_workloads(), late).unwrap_err();
    assert!(matches!(error, CaError::Expired { .. }), "{error}");
}

#[test]
fn an_intermediate_signs_and_is_sent_along() {
    let root = root();
    let made = authority_of(&root)
        .make_intermediate(&domain(), Validity { lifetime: DAY, backdate: Duration::ZERO }, now())
        .unwrap();
    let bundle = TrustBundle::new(&root.chain, domains()).unwrap();
    let authority = CertificateAuthority::new(&made.chain, &made.key, &bundle, now()).unwrap();
    let issued = authority.issue(&id("a/sa/a"), Validity::of_workloads(), now()).unwrap();
    assert_eq!(issued.chain.len(), 2);
    assert_eq!(authority.root(), bundle.snapshot().roots()[0].id);
    // It may sign workloads only.
    let below = authority.make_intermediate(&domain(), Validity::of_workloads(), now()).unwrap();
    let error = CertificateAuthority::new(&below.chain, &below.key, &bundle, now()).unwrap_err();
    assert!(matches!(error, CaError::PathLength { below: 1, .. }), "{error}");
}

/// A given CA with its parts spoiled: what, the spoiled parts, what the error must say.
#[test]
fn a_given_ca_that_is_not_right_is_refused_with_the_reason() {
    let refuse = |what: &str, spoil: fn(&mut CertificateParams), says: &str| {
        let mut params = ca_params("given");
        spoil(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
        let trusted = CertificateAuthority::make_root(&domain(), Validity::of_roots(), now()).unwrap();
        let bundle = TrustBundle::new(std::slice::from_ref(&certificate), domains())
            .or_else(|_| TrustBundle::new(&trusted.chain, domains()))
            .unwrap();
        let error = CertificateAuthority::new(&[certificate], &pkcs8(&key), &bundle, now()).expect_err(what);
        assert!(error.to_string().contains(says), "{what}: {error}");
    };
    refuse("a leaf", |p| p.is_ca = IsCa::ExplicitNoCa, "is not a CA certificate");
    refuse("no basic constraints", |p| p.is_ca = IsCa::NoCa, "is not a CA certificate");
    refuse(
        "key usage",
        |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature],
        "is not a CA certificate",
    );
    refuse("expired", |p| p.not_after = time::OffsetDateTime::now_utc() - DAY, "expired at");
    // Its first octets are read as arcs that can't be written: the library panics over them.
    refuse(
        "an attribute of an unknown arc",
        |p| p.distinguished_name.push(DnType::CustomDnType(vec![2, 999, 1]), "given"),
        "unknown attribute",
    );
    refuse("early", |p| p.not_before = time::OffsetDateTime::now_utc() + DAY / 2, "is not valid before");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (one, two) = (root(), root());
    let bundle = TrustBundle::new(&one.chain, domains()).unwrap();
    let error = CertificateAuthority::new(&one.chain, &two.key, &bundle, now()).unwrap_err();
    assert!(matches!(error, CaError::KeyMismatch { .. }), "{error}");
    let error = CertificateAuthority::new(&two.chain, &two.key, &bundle, now()).unwrap_err();
    assert!(matches!(error, CaError::Untrusted { .. }), "{error}");
    let error = CertificateAuthority::new(&[], &two.key, &bundle, now()).unwrap_err();
    assert!(matches!(error, CaError::NoCertificate), "{error}");
    let garbage = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
    let error = CertificateAuthority::new(&[garbage], &two.key, &bundle, now()).unwrap_err();
    assert!(matches!(error, CaError::Malformed { position: 1 }), "{error}");
}

#[test]
fn a_name_that_could_not_be_written_back_is_refused() {
    // openssl writes what rcgen can't: two domain components, as directories have them.
    let dir = memory_dir();
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-subj", "/DC=com/DC=example/CN=ca", "-days", "30", "-keyout", "k.pem", "-out", "c.pem"])
        .current_dir(dir.path())
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{made:?}");
    let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let error =
        ca.install_given(&read("c.pem"), &read("k.pem"), &read("c.pem"), &domain(), now()).unwrap_err();
    assert!(matches!(error, CaError::Subject { .. }), "{error}");
}

#[test]
fn given_keys_of_other_kinds_and_forms_work() {
    let dir = memory_dir();
    for (kind, arguments) in [
        ("rsa", "genrsa -traditional -out k.pem 2048"),
        ("rsa-pkcs8", "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out k.pem"),
        ("p384-sec1", "ecparam -genkey -name secp384r1 -noout -out k.pem"),
        ("ed25519", "genpkey -algorithm ed25519 -out k.pem"),
    ] {
        let openssl = |arguments: &str| {
            let out = std::process::Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(dir.path())
                .output()
                .expect("openssl is installed");
            assert!(out.status.success(), "{kind}: {out:?}");
        };
        openssl(arguments);
        openssl("req -x509 -new -key k.pem -subj /O=given/CN=ca -days 90 -out c.pem");
        let ca = CaDirectory::open_or_make(&dir.path().join(kind)).unwrap();
        let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        ca.install_given(&read("c.pem"), &read("k.pem"), &read("c.pem"), &domain(), now()).unwrap();
        let loaded = ca.load(&domains(), now()).unwrap();
        loaded.authority.issue(&id("a/sa/a"), Validity::of_workloads(), now()).unwrap();
    }
}

#[test]
fn a_request_gives_the_key_and_nothing_else() {
    let authority = authority_of(&root());
    let key = KeyPair::generate().unwrap();
    let mut params = leaf_params("spiffe://cluster.local/ns/evil/sa/admin");
    params.subject_alt_names.push(SanType::DnsName("kubernetes.default".try_into().unwrap()));
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let request = params.serialize_request(&key).unwrap();
    let cart = id("shop/sa/cart");
    let sign = |request: &[u8]| authority.sign_request(request, &cart, Validity::of_workloads(), now());
    let chain = sign(request.der()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(matches!(&san.value.general_names[..], [GeneralName::URI(uri)] if *uri == cart.to_string()));
    assert!(!leaf.is_ca() && leaf.subject().iter().count() == 0);
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.public_key_raw());

    let mut tampered = request.der().to_vec();
    let last = tampered.len() - 1;
    tampered[last] ^= 1;
    let mut trailing = request.der().to_vec();
    trailing.push(0);
    let weak = KeyPair::try_from(openssl_rsa_1024().as_slice());
    for (what, bytes, says) in [
        ("tampered", tampered.as_slice(), "signature"),
        ("trailing", &trailing, "follow"),
        ("garbage", b"hello", "PKCS #10"),
        ("huge", &[0x30; 70_000], "at most"),
    ] {
        let error = sign(bytes).expect_err(what);
        assert!(error.to_string().contains(says), "{what}: {error}");
    }
    if let Ok(weak) = weak {
        let request = CertificateParams::default().serialize_request(&weak).unwrap();
        let error = sign(request.der()).unwrap_err();
        assert!(
            error.to_string().contains("1024 bits") || error.to_string().contains("signature"),
            "{error}"
        );
    }
}

fn openssl_rsa_1024() -> Vec<u8> {
    let out = std::process::Command::new("openssl")
        .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-outform", "DER"])
        .output()
        .expect("openssl is installed");
    out.stdout
}

#[test]
fn a_directory_is_made_once_and_found_again() {
    let dir = memory_dir();
    let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
    let make = || ca.make_if_missing(&domain(), Validity::of_roots(), now()).unwrap();
    assert_eq!(make(), Creation::Made);
    let first = ca.load(&domains(), now()).unwrap();
    assert_eq!(make(), Creation::Existed);
    assert_eq!(ca.load(&domains(), now()).unwrap().roots, first.roots);
    assert!(first.warnings.is_empty(), "{:?}", first.warnings);
    for file in std::fs::read_dir(ca.path()).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o077, 0, "{file:?}");
    }
    assert_eq!(std::fs::metadata(ca.path()).unwrap().permissions().mode() & 0o777, 0o700);
}

/// Files that are copied one by one, or a directory that was emptied in part: what is there is somebody's.
#[test]
fn an_authority_is_made_only_where_there_is_nothing_of_one() {
    for file in ["roots.pem", "ca.key", "next.pem", "rotation.json"] {
        let dir = memory_dir();
        let ca = CaDirectory::open(dir.path()).unwrap();
        write(&dir.path().join(file), "the operator's", 0o600);
        let error = ca.make_if_missing(&domain(), Validity::of_roots(), now()).unwrap_err();
        assert!(matches!(&error, CaError::Incomplete { file: named, .. } if *named == file), "{error}");
        assert!(error.to_string().contains("remove"), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join(file)).unwrap(), "the operator's");
        assert!(!dir.path().join("ca.pem").exists(), "{file}");
    }
    // Links that can't be followed now are no empty places.
    for target in ["/nowhere/ca.pem", "ca.pem"] {
        let dir = memory_dir();
        let ca = CaDirectory::open(dir.path()).unwrap();
        std::os::unix::fs::symlink(target, dir.path().join("ca.pem")).unwrap();
        assert_eq!(ca.make_if_missing(&domain(), Validity::of_roots(), now()).unwrap(), Creation::Existed);
        ca.load(&domains(), now()).unwrap_err();
        assert!(!dir.path().join("roots.pem").exists());
    }
}

#[test]
fn a_given_authority_replaces_no_roots() {
    let (dir, made) = (memory_dir(), root());
    let ca = CaDirectory::open(dir.path()).unwrap();
    let (chain, other) = (pem(&made.chain), pem(&root().chain));
    let key = pem::encode(&pem::Pem::new("PRIVATE KEY", made.key.secret_der()));
    let install = || {
        let chain = chain.as_bytes();
        ca.install_given(chain, key.as_bytes(), chain, &domain(), now())
    };
    write(&dir.path().join("roots.pem"), &other, 0o600);
    let error = install().unwrap_err().to_string();
    assert!(error.contains("roots.pem") && error.contains("rotate"), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join("roots.pem")).unwrap(), other);
    // It was cut short between the two files, and is run again.
    std::fs::remove_file(dir.path().join("roots.pem")).unwrap();
    install().unwrap();
    std::fs::remove_file(dir.path().join("ca.pem")).unwrap();
    install().unwrap();
    ca.load(&domains(), now()).unwrap();
    install().unwrap_err();
}

#[test]
fn a_crash_between_the_two_files_leaves_a_whole_authority() {
    let dir = memory_dir();
    let ca = CaDirectory::open(dir.path()).unwrap();
    ca.make_if_missing(&domain(), Validity::of_roots(), now()).unwrap();
    let whole = ca.load(&domains(), now()).unwrap();
    std::fs::remove_file(dir.path().join("roots.pem")).unwrap();
    assert_eq!(ca.load(&domains(), now()).unwrap().roots, whole.roots);
}

/// Not a test of its own: what the processes of the next one run.
#[test]
fn child_that_makes_the_authority() {
    let Ok(path) = std::env::var("IDENTITY_TEST_CA_DIR") else { return };
    let ca = CaDirectory::open_or_make(Path::new(&path)).unwrap();
    ca.make_if_missing(&domain(), Validity::of_roots(), now()).unwrap();
    let loaded = ca.load(&domains(), now()).unwrap();
    println!("ROOT {}", loaded.authority.root());
}

#[test]
fn processes_that_start_at_once_find_the_same_authority() {
    let dir = memory_dir();
    for round in 0..5 {
        let path = dir.path().join(format!("ca-{round}"));
        let children: Vec<_> = (0..4)
            .map(|_| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "child_that_makes_the_authority", "--nocapture"])
                    .env("IDENTITY_TEST_CA_DIR", &path)
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let mut roots = std::collections::HashSet::new();
        for child in children {
            let out = child.wait_with_output().unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            assert!(out.status.success(), "{text}");
            let at = text.find("ROOT ").unwrap() + 5;
            roots.insert(text[at..at + 64].to_owned());
        }
        assert_eq!(roots.len(), 1);
    }
}

#[test]
fn a_disk_and_an_end_that_is_near_are_warned_of() {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let ca = CaDirectory::open_or_make(&disk.path().join("ca")).unwrap();
    let week = Validity { lifetime: 7 * DAY, backdate: Duration::ZERO };
    ca.make_if_missing(&domain(), week, now()).unwrap();
    let warnings = ca.load(&domains(), now()).unwrap().warnings;
    assert!(
        matches!(&warnings[..], [CaWarning::NotInMemory { .. }, CaWarning::ExpiresSoon { .. }]),
        "{warnings:?}"
    );
    assert!(warnings[0].to_string().contains("tmpfs"));
}

#[test]
fn files_that_are_not_right_are_named() {
    let dir = memory_dir();
    let ca = CaDirectory::open(dir.path()).unwrap();
    let load = || ca.load(&domains(), now()).unwrap_err().to_string();
    assert!(load().starts_with("ca.pem is missing"), "{}", load());
    let made = root();
    let key = pem::encode(&pem::Pem::new("PRIVATE KEY", made.key.secret_der()));
    write(&dir.path().join("ca.pem"), &pem(&made.chain), 0o644);
    assert!(load().starts_with("ca.key is missing"), "{}", load());
    write(&dir.path().join("ca.key"), &key, 0o644);
    assert!(load().contains("chmod it to 0600"), "{}", load());
    write(&dir.path().join("ca.key"), "no key", 0o600);
    assert!(load().contains("ca.key: it holds no private key"), "{}", load());
    write(&dir.path().join("ca.key"), &key, 0o600);
    ca.load(&domains(), now()).unwrap();
    write(&dir.path().join("roots.pem"), "", 0o644);
    assert!(load().contains("roots.pem: it holds no certificate"), "{}", load());
    write(&dir.path().join("roots.pem"), &pem(&root().chain), 0o644);
    assert!(load().contains("the trust bundle does not vouch for"), "{}", load());
    std::fs::remove_file(dir.path().join("roots.pem")).unwrap();
    // A key in ca.pem is a secret there too, and goes before ca.key.
    write(&dir.path().join("ca.pem"), &(pem(&made.chain) + &key), 0o644);
    assert!(load().contains("chmod"), "{}", load());
    std::fs::remove_file(dir.path().join("ca.key")).unwrap();
    write(&dir.path().join("ca.pem"), &(pem(&made.chain) + &key), 0o600);
    ca.load(&domains(), now()).unwrap();
}

#[tokio::test]
async fn a_changed_directory_is_followed_and_a_broken_one_is_not() {
    let mesh = Mesh::start();
    let generation = mesh.issuer.bundle().subscribe();
    let signer = mesh.issuer.signer();
    let good = std::fs::read_to_string(mesh.path("ca.pem")).unwrap();
    let before = mesh.issuer.status().signer.unwrap();
    for broken in [&good[..good.len() / 2], "", "\0\u{fffd}garbage", "-----BEGIN CERTIFICATE-----\n"] {
        write(&mesh.path("ca.pem"), broken, 0o600);
        until(|| mesh.issuer.status().error.is_some()).await;
        mesh.issuer.issue(&id("a/sa/a")).await.unwrap();
        write(&mesh.path("ca.pem"), &good, 0o600);
        until(|| mesh.issuer.status().error.is_none()).await;
    }
    assert_eq!(mesh.issuer.status().signer.unwrap(), before);
    assert!(!generation.has_changed().unwrap() && !signer.has_changed().unwrap(), "nothing really changed");
    assert!(mesh.issuer.status().failures >= 4);

    std::fs::remove_file(mesh.path("ca.pem")).unwrap();
    until(|| mesh.issuer.status().error.is_some()).await;
    mesh.issuer.issue(&id("a/sa/a")).await.unwrap();

    // Another authority altogether, its root first.
    let made = root();
    let key = pem::encode(&pem::Pem::new("PRIVATE KEY", made.key.secret_der()));
    write(&mesh.path("roots.pem"), &pem(&made.chain), 0o600);
    write(&mesh.path("ca.pem"), &(pem(&made.chain) + &key), 0o600);
    until(|| mesh.issuer.status().error.is_none()).await;
    assert_ne!(mesh.issuer.status().signer.unwrap().root, before.root);
    assert!(generation.has_changed().unwrap() && signer.has_changed().unwrap());
}

#[tokio::test]
async fn a_directory_that_vanishes_leaves_the_last_state_in_force() {
    let mesh = Mesh::start();
    std::fs::rename(mesh.dir.path(), mesh.dir.path().with_extension("gone")).unwrap();
    until(|| mesh.issuer.status().error.is_some()).await;
    mesh.certificates.get(&id("a/sa/a")).await.unwrap();
    std::fs::rename(mesh.dir.path().with_extension("gone"), mesh.dir.path()).unwrap();
    until(|| mesh.issuer.status().error.is_none()).await;
}

#[tokio::test]
async fn an_issuer_does_not_start_without_a_whole_directory() {
    let dir = memory_dir();
    let ca = CaDirectory::open(dir.path()).unwrap();
    let started = LocalIssuer::start(ca, domains(), LocalIssuerSettings::default(), Clock::system());
    assert!(matches!(started.unwrap_err(), CaError::Missing { file: "ca.pem", .. }));
}

async fn until(mut condition: impl FnMut() -> bool) {
    let patience = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    patience.await.expect("it does not come");
}

#[test]
fn an_issuer_s_name_is_its_own() {
    let names: std::collections::HashSet<_> =
        (0..8).map(|_| authority_of(&root()).subject().to_owned()).collect();
    assert_eq!(names.len(), 8);
}
