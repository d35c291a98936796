//! A certificate authority for tests, and its certificates in the forms that both sides want.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use identity::{
    CaDirectory, CertificateAuthority, CertificateSettings, Certificates, Clock, Issued, Issuer, TrustBundle,
    Validity,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// One trust domain, `cluster.local`, with one root.
pub struct Mesh {
    authority: Arc<CertificateAuthority>,
    root: CertificateDer<'static>,
    bundle: TrustBundle,
}

impl Mesh {
    /// Makes the root.
    ///
    /// # Errors
    /// It could not be made.
    pub fn new() -> Result<Self, AnyError> {
        let now = Clock::system().now();
        let domain = TrustDomain::cluster_local();
        let made = CertificateAuthority::make_root(&domain, Validity::of_roots(), now)?;
        let root = made.chain.first().ok_or("a root without a certificate")?.clone();
        let bundle = TrustBundle::new(&made.chain, TrustDomains::only(domain))?;
        let authority = Arc::new(CertificateAuthority::new(&made.chain, &made.key, &bundle, now)?);
        Ok(Self { authority, root, bundle })
    }

    /// Makes the root in a directory, as programs of ours read it (`--ca-dir`).
    ///
    /// # Errors
    /// It could not be made.
    pub fn in_directory(path: &Path) -> Result<Self, AnyError> {
        let (now, domain) = (Clock::system().now(), TrustDomain::cluster_local());
        let directory = CaDirectory::open_or_make(path)?;
        directory.make_if_missing(&domain, Validity::of_roots(), now)?;
        let domains = TrustDomains::only(domain);
        let loaded = directory.load(&domains, now)?;
        let bundle = TrustBundle::new(&loaded.roots, domains)?;
        let root = loaded.roots.first().ok_or("a directory without a root")?.clone();
        Ok(Self { authority: Arc::new(loaded.authority), root, bundle })
    }

    /// The identity of a service account in the namespace `interop`.
    ///
    /// # Errors
    /// The name is no part of an identity.
    pub fn id(account: &str) -> Result<SpiffeId, AnyError> {
        Ok(SpiffeId::new(TrustDomain::cluster_local(), "interop".into(), account.into())?)
    }

    /// Certificates of this mesh for our side, issued when they are needed.
    #[must_use]
    pub fn certificates(&self) -> Certificates {
        let issuer = Arc::new(Signer(Arc::clone(&self.authority)));
        let settings = CertificateSettings::default();
        Certificates::new(issuer, self.bundle.clone(), settings, None, Clock::system())
    }

    /// Writes `chain.pem`, `key.pem` and `root.pem` for `account` into a directory, for Envoy.
    ///
    /// # Errors
    /// They could not be issued or written.
    pub fn write_pem(&self, account: &str, directory: &Path) -> Result<PemFiles, AnyError> {
        let issued =
            self.authority.issue(&Self::id(account)?, Validity::of_workloads(), Clock::system().now())?;
        let files = PemFiles {
            chain: directory.join("chain.pem"),
            key: directory.join("key.pem"),
            root: directory.join("root.pem"),
        };
        let chain: String = issued.chain.iter().map(|der| pem("CERTIFICATE", der)).collect();
        let PrivateKeyDer::Pkcs8(key) = &issued.key else { return Err("a key that is not PKCS #8".into()) };
        std::fs::write(&files.chain, chain)?;
        std::fs::write(&files.key, pem("PRIVATE KEY", key.secret_pkcs8_der()))?;
        std::fs::write(&files.root, pem("CERTIFICATE", &self.root))?;
        Ok(files)
    }
}

/// Where Envoy finds its certificate, its key, and the root that it trusts.
pub struct PemFiles {
    /// The certificate and what is between it and the root.
    pub chain: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The root.
    pub root: PathBuf,
}

struct Signer(Arc<CertificateAuthority>);

impl Issuer for Signer {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> identity::IssueFuture<'a> {
        let issued: Result<Issued, _> =
            self.0.issue(id, Validity::of_workloads(), Clock::system().now()).map_err(Into::into);
        Box::pin(std::future::ready(issued))
    }

    fn signer(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }
}

/// RFC 7468: base 64 in lines of 64 characters.
fn pem(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
            let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
            for digit in 0..4 {
                let value = usize::try_from(bits >> (18 - 6 * digit) & 63).unwrap_or(0);
                let known = digit <= three.len();
                text.push(if known { DIGITS.get(value).map_or('=', |b| char::from(*b)) } else { '=' });
            }
        }
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}
