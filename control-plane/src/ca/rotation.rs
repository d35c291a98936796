//! The exchange of the root in stages, as a pure state machine over a [`Record`]; who writes the record is
//! [`super::keeper`].
//!
//! ```text
//!             begin                 sign                      drop_old
//!   Settled ────────▶ BothTrusted ─────────▶ NewSigns ─────────────────▶ Settled
//!                │          gate: every live            gate: nothing that an old
//!                ◀─ abandon proxy trusts the new root   root signed is valid any more
//! ```
//!
//! Invariants, which a property test holds:
//! * who signs leads to a root that is trusted, at each stage;
//! * a new root signs only when every live proxy has said that it trusts it, or somebody has accepted those that have
//!   not, by name ([`Ground::Accepted`]), or the old one is about to expire ([`Ground::Deadline`]);
//! * an old root goes only when the last certificate that any replica can have signed with it has expired, or somebody
//!   has accepted what is left.
//!
//! A new signing certificate below a root that signs already needs no gate, and a given bundle that lost a root passes
//! the second gate only.

use std::time::Duration;

use identity::RootId;
use identity::rotation::Stage;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};

use super::record::{Record, Signer, ids};

/// How far a rotation is. Times in seconds since 1970.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rotation {
    /// [`Stage::BothTrusted`] or [`Stage::NewSigns`].
    pub stage: Stage,
    /// The root that is coming.
    #[serde(with = "hex_id")]
    pub new_root: RootId,
    /// Those that are going.
    #[serde(with = "hex_ids")]
    pub old_roots: Vec<RootId>,
    /// Those that were not trusted before.
    #[serde(with = "hex_ids")]
    pub new_roots: Vec<RootId>,
    /// When both were trusted.
    pub began_at: u64,
    /// When nothing that an old root signed is valid any more; known when the new one signs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_at: Option<u64>,
}

/// A proxy that is live: what it has said of the roots that it trusts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proxy {
    /// How people know it: namespace/pod, or what else trusts the CA.
    pub name: String,
    /// The roots that it has said to trust; empty if it has said nothing.
    pub trusts: Vec<RootId>,
}

/// What the gates look at.
#[derive(Clone, Debug)]
pub struct Gates<'a> {
    /// The time.
    pub now: UnixTime,
    /// All live proxies; `None` while they are not known, as after a start.
    pub proxies: Option<&'a [Proxy]>,
    /// When who signs now, or its root, expires.
    pub signer_expires: UnixTime,
    /// So long before that the new one signs, whoever does not trust it.
    pub deadline: Duration,
    /// Somebody has accepted what this stage waits for.
    pub accepted: bool,
}

/// Why a gate was passed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ground {
    /// As it should be.
    Ready,
    /// Somebody has accepted that these are not ready.
    Accepted(Vec<String>),
    /// The signing certificate is about to expire; these are not ready.
    Deadline(Vec<String>),
}

/// What a rotation waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Waiting {
    /// Which proxies are live is not known yet.
    Unknown,
    /// These have not said that they trust the new root, of so many.
    Proxies {
        /// Their names.
        laggards: Vec<String>,
        /// How many are live.
        live: usize,
    },
    /// What the old root signed is valid until then.
    Until(UnixTime),
}

/// What comes next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing yet.
    Wait(Waiting),
    /// [`sign`].
    Sign(Ground),
    /// [`drop_old`].
    Drop(Ground),
}

/// Says what comes next.
#[must_use]
pub fn next(rotation: &Rotation, gates: &Gates<'_>) -> Step {
    if rotation.stage == Stage::BothTrusted { sign_gate(rotation, gates) } else { drop_gate(rotation, gates) }
}

fn sign_gate(rotation: &Rotation, gates: &Gates<'_>) -> Step {
    let late = gates.now.as_secs().saturating_add(gates.deadline.as_secs()) >= gates.signer_expires.as_secs();
    let known = gates.proxies.unwrap_or_default();
    let laggards: Vec<String> = known
        .iter()
        .filter(|proxy| !proxy.trusts.contains(&rotation.new_root))
        .map(|proxy| proxy.name.clone())
        .collect();
    match gates.proxies {
        Some(_) if laggards.is_empty() => Step::Sign(Ground::Ready),
        _ if late => Step::Sign(Ground::Deadline(laggards)),
        None => Step::Wait(Waiting::Unknown),
        Some(_) if gates.accepted => Step::Sign(Ground::Accepted(laggards)),
        Some(live) => Step::Wait(Waiting::Proxies { laggards, live: live.len() }),
    }
}

fn drop_gate(rotation: &Rotation, gates: &Gates<'_>) -> Step {
    // A record without the time was written by hand: from now on nothing is known to be over.
    let at = rotation.drop_at.unwrap_or(u64::MAX);
    if gates.now.as_secs() >= at {
        Step::Drop(Ground::Ready)
    } else if gates.accepted {
        Step::Drop(Ground::Accepted(Vec::new()))
    } else {
        Step::Wait(Waiting::Until(UnixTime::since_unix_epoch(Duration::from_secs(at))))
    }
}

/// Who should sign and be trusted.
#[derive(Clone, Debug)]
pub struct Target {
    /// Who should sign.
    pub signer: Signer,
    /// The root that it leads to, one of `roots`.
    pub root: RootId,
    /// Who should be trusted.
    pub roots: Vec<CertificateDer<'static>>,
    /// Whether it was given, and not made here.
    pub given: bool,
}

/// The record with the first stage towards `target` done: everything old and new is trusted. What needs no gate is
/// done at once. `root` is the root that signs now. A rotation under way is replaced: [`abandon`] it first.
#[must_use]
pub fn begin(record: &Record, root: RootId, target: &Target, stale: Duration, now: UnixTime) -> Record {
    let (old, new) = (record.root_ids(), ids(&target.roots));
    let without = |ids: &[RootId], others: &[RootId]| -> Vec<RootId> {
        ids.iter().filter(|id| !others.contains(id)).copied().collect()
    };
    let mut next = record.clone();
    // A root that was renewed with its key takes the place of its older self.
    next.roots.retain(|root| {
        target.roots.contains(root) || RootId::of_certificate(root).is_none_or(|id| !new.contains(&id))
    });
    for root in &target.roots {
        if !next.roots.contains(root) {
            next.roots.push(root.clone());
        }
    }
    next.state.given = target.given;
    next.state.rotation = Some(Rotation {
        stage: Stage::BothTrusted,
        new_root: target.root,
        old_roots: without(&old, &new),
        new_roots: without(&new, &old),
        began_at: now.as_secs(),
        drop_at: None,
    });
    next.next = Some(target.signer.clone());
    // Whoever accepts what the present signer signs trusts that root already.
    if root == target.root { sign(&next, stale, now) } else { next }
}

/// The record with the second stage done: the new one signs. Without a rotation at its first stage, nothing changes.
#[must_use]
pub fn sign(record: &Record, stale: Duration, now: UnixTime) -> Record {
    let mut next = record.clone();
    let longest = next.state.longest_lifetime_s;
    if let (Some(signer), Some(rotation)) = (next.next.take(), &mut next.state.rotation) {
        next.signer = signer;
        rotation.stage = Stage::NewSigns;
        rotation.drop_at = Some(now.as_secs().saturating_add(stale.as_secs()).saturating_add(longest));
        if rotation.old_roots.is_empty() {
            next.state.rotation = None;
        }
    }
    next
}

/// The record with the last stage done: the old roots are no longer trusted. Before the new one signs, nothing changes.
#[must_use]
pub fn drop_old(record: &Record) -> Record {
    let mut next = record.clone();
    match next.state.rotation.take() {
        Some(rotation) if rotation.stage == Stage::NewSigns => {
            next.roots.retain(|root| {
                RootId::of_certificate(root).is_none_or(|id| !rotation.old_roots.contains(&id))
            });
        }
        rotation => next.state.rotation = rotation,
    }
    next
}

/// The record with the first stage taken back, or as it is if the new one signs already.
#[must_use]
pub fn abandon(record: &Record) -> Record {
    let mut next = record.clone();
    match next.state.rotation.take() {
        Some(rotation) if rotation.stage == Stage::BothTrusted => {
            next.next = None;
            next.roots.retain(|root| {
                RootId::of_certificate(root).is_none_or(|id| !rotation.new_roots.contains(&id))
            });
        }
        rotation => next.state.rotation = rotation,
    }
    next
}

/// How a rotation stands, for people.
#[must_use]
pub fn describe(waiting: &Waiting) -> String {
    match waiting {
        Waiting::Unknown => "both roots are trusted; waits until the live proxies are known".to_owned(),
        Waiting::Proxies { laggards, live } => {
            format!(
                "both roots are trusted; waits for {} of {live} proxies to trust the new one: {}",
                laggards.len(),
                some_of(laggards)
            )
        }
        Waiting::Until(time) => format!(
            "the new root signs; the old one goes when the last that it signed has expired, at {}",
            identity::Timestamp(*time)
        ),
    }
}

/// The first of many names, and how many more there are.
#[must_use]
pub fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown: Vec<_> = names.iter().take(SHOWN).map(String::as_str).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

mod hex_id {
    use identity::RootId;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &RootId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RootId, D::Error> {
        let text = String::deserialize(deserializer)?;
        RootId::from_hex(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no root's id")))
    }
}

mod hex_ids {
    use identity::RootId;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(ids: &[RootId], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(ids.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RootId>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        let id = |text: &String| {
            RootId::from_hex(text).ok_or_else(|| D::Error::custom(format!("{text:?} is no root's id")))
        };
        texts.iter().map(id).collect()
    }
}
