//! The conditions of a policy: `ZtunnelAccepted`, as Istio's tools know it, and `Enforced`, which counts only proxies
//! that said that they swapped it in.

use std::sync::Arc;

use config::diagnostic::{Code, Diagnostic, Severity};
use serde::{Deserialize, Serialize};

use crate::registry::PolicyState;

/// A condition, but for its time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Condition {
    /// `type`.
    pub kind: &'static str,
    /// `status`: `None` for `Unknown`.
    pub holds: Option<bool>,
    /// `reason`, one word.
    pub reason: &'static str,
    /// `message`, for people.
    pub message: String,
}

/// Whether a policy is understood and can be enforced as it is written.
pub const ACCEPTED: &str = "ZtunnelAccepted";
/// Whether all proxies enforce it.
pub const ENFORCED: &str = "Enforced";

/// A proxy and a policy.
#[derive(Clone, PartialEq, Eq, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Proxy {
    /// The proxy's pod and namespace.
    pub name: Arc<str>,
    /// How it stands with the policy.
    pub standing: Standing,
}

/// How a proxy stands with a policy.
#[derive(Clone, PartialEq, Eq, Debug, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    /// It said that it enforces it.
    Enforces,
    /// It has not said so yet.
    Pending,
    /// It refused it, with this reason.
    Rejected(String),
    /// It is of another make: it may have taken it, and does not say what it enforces.
    OtherMake,
}

/// All proxies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Proxies {
    /// They.
    pub proxies: Vec<Proxy>,
    /// How many control planes could not be asked for theirs.
    pub unasked: usize,
}

/// How many names a message has.
const MOST_NAMES: usize = 10;
/// As the API's conventions have it for messages.
const MOST_CHARACTERS: usize = 4096;

/// The conditions of a policy. `exception` is what proxies of another make are told otherwise.
#[must_use]
pub fn of(state: &PolicyState, proxies: &Proxies, exception: Option<&str>) -> Vec<Condition> {
    vec![accepted(&state.findings, exception), enforced(&state.findings, proxies)]
}

fn accepted(findings: &[Diagnostic], exception: Option<&str>) -> Condition {
    let text = |severity: Severity| {
        let lines = findings.iter().filter(|d| d.severity == severity).map(|d| {
            let remedy = if d.remedy.is_empty() { String::new() } else { format!(" ({})", d.remedy) };
            format!("{}: {}{remedy}", d.code, d.message)
        });
        lines.collect::<Vec<_>>().join("; ")
    };
    let (errors, mut warnings) = (text(Severity::Error), text(Severity::Warning));
    if let Some(exception) = exception {
        let separator = if warnings.is_empty() { "" } else { "; " };
        warnings = format!("{warnings}{separator}for proxies of another make {exception}");
    }
    let condition = |holds, reason, message: String| Condition {
        kind: ACCEPTED,
        holds: Some(holds),
        reason,
        message: message.chars().take(MOST_CHARACTERS).collect(),
    };
    if !errors.is_empty() {
        return condition(false, "Invalid", join(&errors, &warnings));
    }
    if !warnings.is_empty() {
        return condition(true, "UnsupportedValue", warnings);
    }
    condition(true, "Accepted", "attached to ztunnel".to_owned())
}

fn join(first: &str, second: &str) -> String {
    if second.is_empty() { first.to_owned() } else { format!("{first}; {second}") }
}

fn enforced(findings: &[Diagnostic], proxies: &Proxies) -> Condition {
    let of = |wanted: fn(&Standing) -> bool| {
        let names = proxies.proxies.iter().filter(move |p| wanted(&p.standing)).map(|p| &*p.name);
        names.collect::<Vec<_>>()
    };
    let enforcing = of(|s| *s == Standing::Enforces);
    let pending = of(|s| *s == Standing::Pending);
    let others = of(|s| *s == Standing::OtherMake);
    let rejected: Vec<(&str, &str)> = proxies
        .proxies
        .iter()
        .filter_map(|p| match &p.standing {
            Standing::Rejected(reason) => Some((&*p.name, reason.as_str())),
            _ => None,
        })
        .collect();
    let all = enforcing.len() + pending.len() + rejected.len();
    let mut message = format!("{}/{all} proxies enforce it", enforcing.len());
    if !pending.is_empty() {
        message = format!("{message}; waiting for {}", names(&pending));
    }
    if let Some((name, reason)) = rejected.first() {
        message = format!("{message}; {} refused it, {name}: {reason}", rejected.len());
    }
    if !others.is_empty() {
        message = format!("{message}; {} proxies of another make don't say what they enforce", others.len());
    }
    if proxies.unasked > 0 {
        message = format!("{message}; {} control planes can't tell yet", proxies.unasked);
    }
    let (holds, reason) = if findings.iter().any(|d| d.code == Code::FailsClosed) {
        (Some(false), "FailsClosed")
    } else if findings.iter().any(|d| d.severity == Severity::Error) {
        (Some(false), "Invalid")
    } else if !rejected.is_empty() {
        (Some(false), "Rejected")
    } else if !pending.is_empty() {
        (Some(false), "Pending")
    } else if proxies.unasked > 0 {
        (None, "ControlPlanesUnreachable")
    } else if all == 0 {
        (None, "NoProxies")
    } else {
        (Some(true), "AllProxies")
    };
    Condition { kind: ENFORCED, holds, reason, message: message.chars().take(MOST_CHARACTERS).collect() }
}

fn names(list: &[&str]) -> String {
    let shown = list.iter().take(MOST_NAMES).copied().collect::<Vec<_>>().join(", ");
    let left = list.len().saturating_sub(MOST_NAMES);
    if left > 0 { format!("{shown} and {left} more") } else { shown }
}

/// Whether two lists say the same, in other words perhaps.
#[must_use]
pub fn same_but_for_messages(a: &[Condition], b: &[Condition]) -> bool {
    let heads = |list: &[Condition]| list.iter().map(|c| (c.kind, c.holds, c.reason)).collect::<Vec<_>>();
    heads(a) == heads(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(findings: Vec<Diagnostic>) -> PolicyState {
        PolicyState { uid: "u".into(), generation: 3, findings }
    }

    fn proxies(standings: &[Standing]) -> Proxies {
        let name = |(index, standing): (usize, &Standing)| Proxy {
            name: format!("ztunnel-{index}.culvert-system").into(),
            standing: standing.clone(),
        };
        Proxies { proxies: standings.iter().enumerate().map(name).collect(), unasked: 0 }
    }

    fn enforced_of(standings: &[Standing]) -> (Option<bool>, &'static str, String) {
        let found = of(&state(Vec::new()), &proxies(standings), None);
        (found[1].holds, found[1].reason, found[1].message.clone())
    }

    #[test]
    fn it_is_enforced_when_every_proxy_says_so() {
        let (holds, reason, message) = enforced_of(&[Standing::Enforces, Standing::Enforces]);
        assert_eq!((holds, reason, &*message), (Some(true), "AllProxies", "2/2 proxies enforce it"));
        let (holds, reason, message) = enforced_of(&[Standing::Enforces, Standing::Pending]);
        assert_eq!((holds, reason), (Some(false), "Pending"));
        assert_eq!(message, "1/2 proxies enforce it; waiting for ztunnel-1.culvert-system");
        let (holds, reason, _) = enforced_of(&[]);
        assert_eq!((holds, reason), (None, "NoProxies"));
    }

    #[test]
    fn a_proxy_of_another_make_does_not_count() {
        let (holds, reason, message) = enforced_of(&[Standing::OtherMake]);
        assert_eq!((holds, reason), (None, "NoProxies"));
        assert!(message.contains("1 proxies of another make"), "{message}");
        assert_eq!(enforced_of(&[Standing::OtherMake, Standing::Enforces]).0, Some(true));
    }

    #[test]
    fn a_refusal_is_named_with_its_reason() {
        let (holds, reason, message) = enforced_of(&[Standing::Rejected("no such scope".into())]);
        assert_eq!((holds, reason), (Some(false), "Rejected"));
        assert!(message.contains("no such scope"), "{message}");
    }

    #[test]
    fn a_control_plane_that_cannot_be_asked_leaves_it_open() {
        let mut all = proxies(&[Standing::Enforces]);
        all.unasked = 1;
        assert_eq!(of(&state(Vec::new()), &all, None)[1].holds, None);
    }

    #[test]
    fn errors_and_warnings_are_told() {
        let finding = |code: Code, message: &str, remedy: &str| {
            Diagnostic::about_file(code, "AuthorizationPolicy a/b".into(), message, remedy)
        };
        let bad = of(
            &state(vec![finding(Code::UnknownField, "there is no field spec.acton", "did you mean action?")]),
            &proxies(&[Standing::Enforces]),
            None,
        );
        assert_eq!((bad[0].holds, bad[0].reason), (Some(false), "Invalid"));
        assert!(bad[0].message.contains("did you mean action?"));
        assert_eq!((bad[1].holds, bad[1].reason), (Some(false), "Invalid"));
        let warned = of(
            &state(vec![finding(Code::NeedsWaypoint, "needs a waypoint", "")]),
            &proxies(&[Standing::Enforces]),
            Some("everything is refused"),
        );
        assert_eq!((warned[0].holds, warned[0].reason), (Some(true), "UnsupportedValue"));
        assert!(warned[0].message.ends_with("for proxies of another make everything is refused"));
        assert_eq!(warned[1].holds, Some(true));
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        let many = vec![Standing::Pending; 2000];
        let (_, _, message) = enforced_of(&many);
        assert!(message.ends_with("and 1990 more") && message.len() < 600, "{message}");
    }
}
