//! The file of roots that a node gets with its volume (`culvert-ca-root-cert`, or Istio's `istio-ca-root-cert`, as
//! `/var/run/secrets/istio/root-cert.pem`):
//! what it trusts before it has talked to anybody, and how it knows the control plane. It is read again while it
//! changes; connections that are made afterwards are judged by what it holds then.
//!
//! Invariant: what is in force is the last content that could be used; a broken or missing file is an error that is
//! told, never a smaller or empty set of roots.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::ca::certificates_from_pem;
use crate::clock::Clock;
use crate::tls::{ALPN_H2, crypto_provider};
use crate::trust::{BundleError, MAX_ROOTS};
use crate::x509::{Facts, RootId};

/// A file that is larger is refused unread.
const MAX_FILE: u64 = 1024 * 1024;
/// How often the file is read. It is small; a volume's files are exchanged below the path, which events miss.
const LOOK: Duration = Duration::from_secs(1);

/// Why the file is not in force.
#[derive(Debug, thiserror::Error)]
pub enum RootFileError {
    /// It can't be read.
    #[error(
        "the root certificates in {path} can't be read: {source}. In a cluster they are the ConfigMap \
         culvert-ca-root-cert (istio-ca-root-cert of an istiod) of the pod's namespace, which the control plane makes: \
         look whether it is there and mounted"
    )]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It holds something else.
    #[error(
        "{path} does not hold root certificates that can be used: {reason}. Restore the ConfigMap \
         culvert-ca-root-cert (istio-ca-root-cert of an istiod; the control plane writes it anew when it is deleted)"
    )]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// What the file held.
#[derive(Debug)]
struct Content {
    roots: Vec<CertificateDer<'static>>,
    ids: Vec<RootId>,
    tls: Arc<ClientConfig>,
}

/// The roots in a file, followed. Clones share one state; when the last is dropped, following stops.
#[derive(Clone, Debug)]
pub struct RootFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    follower: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    clock: Clock,
    content: ArcSwap<Content>,
    generation: watch::Sender<u64>,
    error: Mutex<Option<String>>,
}

impl RootFile {
    /// Reads the file, and follows it on this runtime.
    ///
    /// # Errors
    /// It can't be used; there is no last good content yet.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(path: &Path, clock: Clock) -> Result<Self, RootFileError> {
        let content = read(path, &clock)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            clock,
            content: ArcSwap::from_pointee(content),
            generation: watch::Sender::new(0),
            error: Mutex::default(),
        });
        let follower = tokio::spawn(follow(shared.clone())).abort_handle();
        Ok(Self(Arc::new(Inner { shared, follower })))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.shared.path
    }

    /// The roots in force, in the file's order.
    #[must_use]
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.0.shared.content.load().roots.clone()
    }

    /// Their ids.
    #[must_use]
    pub fn root_ids(&self) -> Vec<RootId> {
        self.0.shared.content.load().ids.clone()
    }

    /// TLS 1.3 towards the control plane: its certificate must name the host that was dialled and lead to one of the
    /// roots; no certificate of one's own is shown, since a token says who one is; ALPN `h2`.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.0.shared.content.load().tls.clone()
    }

    /// Counts the changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.shared.generation.subscribe()
    }

    /// Why what the file holds now is not in force, if it is not.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.0.shared.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn follow(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let reader = shared.clone();
        let found = tokio::task::spawn_blocking(move || read(&reader.path, &reader.clock));
        // An error of the task means that the runtime is going down.
        let Ok(found) = found.await else { return };
        shared.take(found);
    }
}

impl Shared {
    fn take(&self, found: Result<Content, RootFileError>) {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        match found {
            Ok(content) => {
                *error = None;
                if content.roots != self.content.load().roots {
                    tracing::info!(
                        path = %self.path.display(),
                        roots = %shown(&content.ids),
                        "the file of root certificates has changed"
                    );
                    self.content.store(Arc::new(content));
                    self.generation.send_modify(|generation| *generation += 1);
                }
            }
            Err(found) => {
                let text = found.to_string();
                if error.as_ref() != Some(&text) {
                    tracing::error!("the last good root certificates stay in force: {text}");
                    *error = Some(text);
                }
            }
        }
    }
}

fn read(path: &Path, clock: &Clock) -> Result<Content, RootFileError> {
    let shown_path = || path.display().to_string();
    let unreadable = |source| RootFileError::Read { path: shown_path(), source };
    let content = |reason: String| RootFileError::Content { path: shown_path(), reason };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > MAX_FILE {
        return Err(content(format!("it has {size} bytes, at most {MAX_FILE} are read")));
    }
    let text = std::fs::read(path).map_err(unreadable)?;
    let roots = certificates_from_pem("the file", &text).map_err(|e| content(e.to_string()))?;
    if roots.len() > MAX_ROOTS {
        return Err(content(BundleError::TooMany(roots.len()).to_string()));
    }
    let mut store = RootCertStore::empty();
    let mut ids = Vec::new();
    for (index, root) in roots.iter().enumerate() {
        let position = index + 1;
        let facts =
            Facts::read(root).ok_or_else(|| content(BundleError::Malformed { position }.to_string()))?;
        if !facts.is_ca || !facts.may_sign {
            return Err(content(BundleError::NotCa { position, subject: facts.subject }.to_string()));
        }
        store.add(root.clone()).map_err(|e| content(format!("certificate {position}: {e}")))?;
        if let Some(id) = RootId::of_certificate(root).filter(|id| !ids.contains(id)) {
            ids.push(id);
        }
    }
    let mut tls = ClientConfig::builder_with_details(crypto_provider(), clock.provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| content(e.to_string()))?
        .with_root_certificates(store)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Content { roots, ids, tls: Arc::new(tls) })
}

/// Ids as a log line has them.
pub(crate) fn shown(ids: &[RootId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
