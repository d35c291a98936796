//! The roots and trust domains that peers are judged by.
//!
//! Invariants:
//! * a bundle always holds at least one root;
//! * a reader sees one whole [`TrustSnapshot`], never a mixture of two;
//! * whatever changes what is trusted raises the generation, which [`TrustBundle::subscribe`] tells, so that
//!   connections can be judged again with [`TrustBundle::still_trusts`].

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use model::{SpiffeId, TrustDomain, TrustDomains};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use tokio::sync::watch;

use crate::handshake::PeerInfo;
use crate::x509::{Facts, RootId};

/// A bundle holds no more roots than this: every handshake may try each.
pub const MAX_ROOTS: usize = 64;

/// Why a set of roots can't be a trust bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// There is no root.
    #[error("the trust bundle holds no certificate; nothing could be trusted")]
    Empty,
    /// There are more than [`MAX_ROOTS`].
    #[error("the trust bundle holds {0} certificates, at most {MAX_ROOTS} are allowed")]
    TooMany(usize),
    /// An entry is no X.509 certificate.
    #[error("certificate {position} of the trust bundle is not an X.509 certificate")]
    Malformed {
        /// Which one, counted from 1.
        position: usize,
    },
    /// An entry may not sign certificates.
    #[error("certificate {position} of the trust bundle ({subject}) is not a CA certificate")]
    NotCa {
        /// Which one, counted from 1.
        position: usize,
        /// Its subject.
        subject: String,
    },
}

/// A root certificate.
#[derive(Clone, Debug)]
pub struct Root {
    /// Its id.
    pub id: RootId,
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Its subject, for people.
    pub subject: String,
    /// When it begins to be valid.
    pub not_before: UnixTime,
    /// When it ceases to be valid.
    pub not_after: UnixTime,
}

/// What is trusted at one time.
#[derive(Debug)]
pub struct TrustSnapshot {
    generation: u64,
    roots: Vec<Root>,
    /// In step with `roots`.
    anchors: Vec<TrustAnchor<'static>>,
    domains: TrustDomains,
}

impl TrustSnapshot {
    /// Counts the changes of the bundle.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The roots, in the order of the bundle, each key once.
    #[must_use]
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// The trust domain and its aliases.
    #[must_use]
    pub fn trust_domains(&self) -> &TrustDomains {
        &self.domains
    }

    /// The root of an id.
    #[must_use]
    pub fn root(&self, id: &RootId) -> Option<&Root> {
        self.roots.iter().find(|root| root.id == *id)
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

/// Why a peer that was once accepted no longer is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// The root of its chain is no longer in the bundle.
    #[error("the root {root} that {id} was verified by is no longer trusted")]
    RootRemoved {
        /// The peer.
        id: SpiffeId,
        /// The root.
        root: RootId,
    },
    /// Its trust domain is no longer one of the mesh's.
    #[error("{id} is not of the trust domain {own} or one of its aliases")]
    TrustDomain {
        /// The peer.
        id: SpiffeId,
        /// The mesh's trust domain.
        own: TrustDomain,
    },
}

/// The roots and trust domains in force; clones share one state.
#[derive(Clone, Debug)]
pub struct TrustBundle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    current: ArcSwap<TrustSnapshot>,
    generation: watch::Sender<u64>,
    /// Held while the next snapshot is made, so that two edits don't undo each other.
    edit: Mutex<()>,
}

impl TrustBundle {
    /// A bundle of `roots`.
    ///
    /// # Errors
    /// There is no root, there are too many, or one is not a CA certificate.
    pub fn new(roots: &[CertificateDer<'_>], domains: TrustDomains) -> Result<Self, BundleError> {
        let (roots, anchors) = parse(roots)?;
        let snapshot = TrustSnapshot { generation: 0, roots, anchors, domains };
        Ok(Self(Arc::new(Shared {
            current: ArcSwap::from_pointee(snapshot),
            generation: watch::Sender::new(0),
            edit: Mutex::new(()),
        })))
    }

    /// What is trusted now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<TrustSnapshot> {
        self.0.current.load_full()
    }

    /// Tells the generation, and when it changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// Puts other roots in force; says whether they differ from the old ones.
    ///
    /// # Errors
    /// As for [`TrustBundle::new`]; the old roots then stay in force.
    pub fn set_roots(&self, roots: &[CertificateDer<'_>]) -> Result<bool, BundleError> {
        let (roots, anchors) = parse(roots)?;
        Ok(self.edit(|old| {
            let same = old.roots.iter().map(|r| &r.der).eq(roots.iter().map(|r| &r.der));
            (!same).then(|| (roots, anchors, old.domains.clone()))
        }))
    }

    /// Puts other trust domains in force; says whether they differ from the old ones.
    pub fn set_trust_domains(&self, domains: TrustDomains) -> bool {
        self.edit(|old| (old.domains != domains).then(|| (old.roots.clone(), old.anchors.clone(), domains)))
    }

    /// Whether a peer that was verified earlier would still be trusted. Its certificate's end of validity is not
    /// looked at: whoever wants to cut connections by it has [`PeerInfo::not_after`].
    ///
    /// # Errors
    /// Its root or its trust domain went.
    pub fn still_trusts(&self, peer: &PeerInfo) -> Result<(), Distrust> {
        let snapshot = self.0.current.load();
        if snapshot.root(&peer.root).is_none() {
            return Err(Distrust::RootRemoved { id: peer.id.clone(), root: peer.root });
        }
        if !snapshot.domains.includes(peer.id.trust_domain()) {
            return Err(Distrust::TrustDomain { id: peer.id.clone(), own: snapshot.domains.own.clone() });
        }
        Ok(())
    }

    fn edit(
        &self,
        next: impl FnOnce(&TrustSnapshot) -> Option<(Vec<Root>, Vec<TrustAnchor<'static>>, TrustDomains)>,
    ) -> bool {
        let _one_at_a_time = self.0.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.0.current.load_full();
        let Some((roots, anchors, domains)) = next(&old) else { return false };
        let generation = old.generation + 1;
        self.0.current.store(Arc::new(TrustSnapshot { generation, roots, anchors, domains }));
        self.0.generation.send_replace(generation);
        true
    }
}

fn parse(certificates: &[CertificateDer<'_>]) -> Result<(Vec<Root>, Vec<TrustAnchor<'static>>), BundleError> {
    if certificates.len() > MAX_ROOTS {
        return Err(BundleError::TooMany(certificates.len()));
    }
    let mut roots: Vec<Root> = Vec::new();
    let mut anchors: Vec<TrustAnchor<'static>> = Vec::new();
    for (index, der) in certificates.iter().enumerate() {
        let malformed = || BundleError::Malformed { position: index + 1 };
        let facts = Facts::read(der).ok_or_else(malformed)?;
        if !facts.is_ca || !facts.may_sign {
            return Err(BundleError::NotCa { position: index + 1, subject: facts.subject });
        }
        let anchor = webpki::anchor_from_trusted_cert(der).map_err(|_| malformed())?.to_owned();
        let root = Root {
            id: RootId::of(&anchor),
            der: der.clone().into_owned(),
            subject: facts.subject,
            not_before: facts.not_before,
            not_after: facts.not_after,
        };
        // A root that was renewed with its old key stands for both: the longer-lived one is kept.
        match roots.iter().position(|known| known.id == root.id) {
            Some(known) => {
                if let (Some(kept), Some(kept_anchor)) = (roots.get_mut(known), anchors.get_mut(known))
                    && kept.not_after.as_secs() < root.not_after.as_secs()
                {
                    *kept = root;
                    *kept_anchor = anchor;
                }
            }
            None => {
                roots.push(root);
                anchors.push(anchor);
            }
        }
    }
    if roots.is_empty() {
        return Err(BundleError::Empty);
    }
    Ok((roots, anchors))
}
