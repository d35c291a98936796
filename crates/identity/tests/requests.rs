//! Signing requests by another encoder (`openssl req`), and what is signed for them checked by another verifier
//! (`openssl verify`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use identity::{
    CertificateAuthority, MAX_REQUEST, MadeCa, RequestError, SigningRequest, TrustBundle, Validity,
    certificates_to_pem,
};
use mesh::*;
use rustls_pki_types::UnixTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

fn now() -> UnixTime {
    UnixTime::now()
}

fn openssl(args: &[&str]) -> Vec<u8> {
    let out = Command::new("openssl").args(args).output().expect("openssl is installed");
    assert!(out.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// A request for a new key of this kind that asks for more than it gets.
fn request(dir: &Path, key: &[&str], digest: &str) -> Vec<u8> {
    let file = dir.join("key.pem");
    let file = file.to_str().unwrap();
    let mut generate = vec!["genpkey", "-out", file];
    generate.extend(key);
    openssl(&generate);
    let ask = [
        "req",
        "-new",
        "-key",
        file,
        digest,
        "-subj",
        "/CN=admin/O=system:masters",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-addext",
        "subjectAltName=DNS:kubernetes.default,URI:spiffe://a/ns/b/sa/c",
    ];
    let ask: Vec<_> = ask.into_iter().filter(|arg| !arg.is_empty()).collect();
    openssl(&ask)
}

const P256: &[&str] = &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
const P384: &[&str] = &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"];
const P521: &[&str] = &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"];
const RSA_2048: &[&str] = &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];
const RSA_1024: &[&str] = &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"];
const ED25519: &[&str] = &["-algorithm", "ED25519"];

fn authority() -> (CertificateAuthority, MadeCa) {
    let root = CertificateAuthority::make_root(&domain(), Validity::of_roots(), now()).unwrap();
    let bundle = TrustBundle::new(&root.chain, domains()).unwrap();
    let above = CertificateAuthority::new(&root.chain, &root.key, &bundle, now()).unwrap();
    let week = Validity { lifetime: 7 * DAY, backdate: Duration::ZERO };
    let made = above.make_intermediate(&domain(), week, now()).unwrap();
    (CertificateAuthority::new(&made.chain, &made.key, &bundle, now()).unwrap(), root)
}

#[test]
fn requests_of_openssl_are_signed_and_openssl_verifies_the_chain() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (authority, root) = authority();
    let cart = id("shop/sa/cart");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let root_file = write("root.pem", &certificates_to_pem(&root.chain));
    for (kind, digest) in
        [(P256, "-sha256"), (P256, "-sha384"), (P384, "-sha384"), (RSA_2048, "-sha256"), (ED25519, "")]
    {
        let pem = request(dir.path(), kind, digest);
        let request = SigningRequest::from_pem(&pem).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        let signed = authority.sign(&request, &cart, Validity::of_workloads(), now()).unwrap();
        let leaf_file = write("leaf.pem", &certificates_to_pem(&signed.chain[..1]));
        let chain_file = write("chain.pem", &certificates_to_pem(&signed.chain[1..]));
        for purpose in ["sslserver", "sslclient"] {
            let args = [
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                &root_file,
                "-untrusted",
                &chain_file,
            ];
            openssl(&[&args[..], &[&leaf_file]].concat());
        }
        // Its key, and nothing else that was asked for.
        let key = dir.path().join("key.pem");
        let asked = openssl(&["pkey", "-in", key.to_str().unwrap(), "-pubout"]);
        assert_eq!(asked, openssl(&["x509", "-in", &leaf_file, "-noout", "-pubkey"]));
        let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(
            matches!(&names.value.general_names[..], [GeneralName::URI(uri)] if *uri == cart.to_string())
        );
        assert!(!leaf.is_ca() && leaf.subject().iter().count() == 0);
        assert_eq!(leaf.validity().not_after.timestamp() as u64, signed.not_after.as_secs());
        let serial: String = leaf.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(serial, signed.serial);
    }
}

#[test]
fn weak_foreign_and_spoiled_requests_are_refused_with_the_reason() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let refused = |pem: &[u8]| SigningRequest::from_pem(pem).unwrap_err();
    assert_eq!(refused(&request(dir.path(), RSA_1024, "-sha256")), RequestError::RsaBits { bits: 1024 });
    assert!(matches!(refused(&request(dir.path(), P521, "-sha512")), RequestError::KeyKind(_)));
    assert_eq!(refused(&request(dir.path(), RSA_2048, "-sha1")), RequestError::Signature);
    for text in
        [&b""[..], b"hello", b"-----BEGIN CERTIFICATE REQUEST-----\n!\n-----END CERTIFICATE REQUEST-----\n"]
    {
        assert_eq!(refused(text), RequestError::NotPem);
    }
    assert_eq!(refused(&vec![b'A'; MAX_REQUEST + 1]), RequestError::TooLarge(MAX_REQUEST + 1));
    let certificate = certificates_to_pem(&authority().1.chain);
    assert_eq!(refused(certificate.as_bytes()), RequestError::NotPem);

    let good = request(dir.path(), P256, "-sha256");
    let mut der = pem::parse(&good).unwrap().into_contents();
    let refused = |der: &[u8]| SigningRequest::from_der(der).unwrap_err();
    let wrap = |der: &[u8]| pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
    SigningRequest::from_pem(wrap(&der).as_bytes()).unwrap();
    // Somebody else's key under this signature: the point's last byte is well before the end.
    let other = pem::parse(request(dir.path(), P256, "-sha256")).unwrap().into_contents();
    let point = |der: &[u8]| {
        let (_, csr) = x509_parser::certification_request::X509CertificationRequest::from_der(der).unwrap();
        csr.certification_request_info.subject_pki.subject_public_key.data.to_vec()
    };
    let (mine, theirs) = (point(&der), point(&other));
    let at = der.windows(mine.len()).position(|window| window == mine).unwrap();
    let mut stolen = der.clone();
    stolen[at..at + theirs.len()].copy_from_slice(&theirs);
    assert_eq!(refused(&stolen), RequestError::Signature);
    let last = der.len() - 1;
    der[last] ^= 1;
    assert_eq!(refused(&der), RequestError::Signature);
    der[last] ^= 1;
    der.push(0);
    assert_eq!(refused(&der), RequestError::TrailingBytes);
    assert_eq!(refused(&der[..40]), RequestError::Malformed);
}

#[test]
fn a_server_certificate_is_for_its_names_and_no_workload() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (authority, root) = authority();
    let names = ["culvertd.culvert-system.svc".to_owned(), "10.0.0.1".to_owned()];
    let (issued, not_after) = authority.issue_server(&names, Validity::of_workloads(), now()).unwrap();
    assert!(not_after.as_secs() > now().as_secs() + 80_000);
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let root_file = file("root.pem", certificates_to_pem(&root.chain));
    let chain_file = file("chain.pem", certificates_to_pem(&issued.chain[1..]));
    let leaf_file = file("leaf.pem", certificates_to_pem(&issued.chain[..1]));
    let verify = |args: &[&str]| {
        let mut all = vec!["verify", "-CAfile", &root_file, "-untrusted", &chain_file];
        all.extend(args);
        all.push(&leaf_file);
        Command::new("openssl").args(all).output().unwrap().status.success()
    };
    assert!(verify(&["-purpose", "sslserver", "-verify_hostname", &names[0]]));
    assert!(verify(&["-purpose", "sslserver", "-verify_ip", &names[1]]));
    assert!(!verify(&["-verify_hostname", "culvertd.other.svc"]));
    assert!(!verify(&["-purpose", "sslclient"]), "it identifies no client");
    assert!(authority.issue_server(&["\u{fc}".to_owned()], Validity::of_workloads(), now()).is_err());
}
