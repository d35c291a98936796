//! The conditions of a policy: `ZtunnelAccepted` and `WaypointAccepted`, as Istio's tools know them, and `Enforced`, which
//! counts only proxies that said that they swapped it in. Those of a route, one set for each parent, as the Gateway API
//! has them. Of what is bound to a waypoint: `istio.io/WaypointBound`. The condition of the other objects that the mesh
//! reads: `Accepted`.

use std::sync::Arc;

use config::compile::Judgement;
use config::diagnostic::{Code, Diagnostic, Severity};
use config::resource::Kind;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::registry::{ObjectState, is_route};

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
    /// The parent of a route that it is about, as the route names it.
    pub parent: Option<Arc<Value>>,
}

impl Condition {
    /// What a judgement says.
    #[must_use]
    pub fn of(kind: &'static str, judgement: &Judgement) -> Self {
        let message = judgement.message.chars().take(MOST_CHARACTERS).collect();
        Self { kind, holds: Some(judgement.holds), reason: judgement.reason, message, parent: None }
    }

    /// That there is nothing to say any more: the condition is removed.
    #[must_use]
    pub fn none(kind: &'static str) -> Self {
        Self { kind, holds: None, reason: "", message: String::new(), parent: None }
    }

    /// The same where it may be another controller's: only one whose message begins so is removed.
    #[must_use]
    pub fn none_of(kind: &'static str, message: &str) -> Self {
        Self { message: message.to_owned(), ..Self::none(kind) }
    }

    /// Whether the condition is to be removed.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.reason.is_empty()
    }
}

/// Whether a policy is understood and can be enforced as it is written.
pub const POLICY_ACCEPTED: &str = "ZtunnelAccepted";
/// The same of an object that is no policy.
pub const ACCEPTED: &str = "Accepted";
/// Whether waypoints enforce what is attached by `targetRefs` for all that it names, or a VirtualService for its hosts.
pub const WAYPOINT_ACCEPTED: &str = "WaypointAccepted";
/// Whether what is bound to a waypoint is reached through it.
pub const WAYPOINT_BOUND: &str = "istio.io/WaypointBound";
/// Whether all that a route leads to is there.
pub const RESOLVED: &str = "ResolvedRefs";
/// That some rules of a route have errors, and the others are in force.
pub const PARTIALLY_INVALID: &str = "PartiallyInvalid";
/// Whether all proxies enforce it.
pub const ENFORCED: &str = "Enforced";

/// How proxies stand with a policy: all that a condition says of them, whatever their number.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Proxies that said that they enforce it.
    pub enforcing: usize,
    /// Proxies that have not said so yet.
    pub pending: usize,
    /// How many of these came, or went, only now.
    pub fresh: usize,
    /// The first of all that have not, by name.
    pub waiting_for: Vec<Arc<str>>,
    /// Proxies that refused it.
    pub rejected: usize,
    /// The first of these, by name, and its reason.
    pub refusal: Option<(Arc<str>, Arc<str>)>,
    /// Proxies of another make: they may have taken it, and don't say what they enforce.
    pub others: usize,
    /// Control planes that can't tell how their proxies stand.
    pub unasked: usize,
}

impl Tally {
    /// Adds a proxy that has not said yet that it enforces the policy.
    pub fn wait_for(&mut self, name: &Arc<str>, fresh: bool) {
        self.pending += 1;
        self.fresh += usize::from(fresh);
        self.name(name);
    }

    /// Adds a proxy that refused it.
    pub fn refuse(&mut self, name: &Arc<str>, reason: &Arc<str>) {
        self.rejected += 1;
        if self.refusal.as_ref().is_none_or(|(first, _)| name < first) {
            self.refusal = Some((name.clone(), reason.clone()));
        }
    }

    /// Adds the proxies of another control plane.
    pub fn add(&mut self, other: &Self) {
        self.enforcing += other.enforcing;
        self.pending += other.pending;
        self.fresh += other.fresh;
        other.waiting_for.iter().for_each(|name| self.name(name));
        self.rejected += other.rejected;
        if let Some((name, reason)) = &other.refusal
            && self.refusal.as_ref().is_none_or(|(first, _)| name < first)
        {
            self.refusal = Some((name.clone(), reason.clone()));
        }
        self.others += other.others;
        self.unasked += other.unasked;
    }

    /// Whether it stays as it is until somebody comes, goes or changes something.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.pending == 0 && self.unasked == 0
    }

    fn name(&mut self, name: &Arc<str>) {
        let at = self.waiting_for.partition_point(|known| known <= name);
        if at < MOST_NAMES {
            self.waiting_for.insert(at, name.clone());
            self.waiting_for.truncate(MOST_NAMES);
        }
    }
}

/// How many names a message has.
const MOST_NAMES: usize = 10;
/// As the API's conventions have it for messages.
const MOST_CHARACTERS: usize = 4096;

/// What is said of all policies alike.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Setting {
    /// Whose proxies are counted, as ` of the revision a`; empty where there is one revision.
    pub of: String,
    /// Who is not counted, and why; empty for nobody.
    pub apart: String,
}

/// The conditions of a policy. `exception` is what proxies of another make are told otherwise.
#[must_use]
pub fn of_policy(
    state: &ObjectState,
    tally: &Tally,
    exception: Option<&str>,
    setting: &Setting,
) -> Vec<Condition> {
    let accepted = accepted(POLICY_ACCEPTED, &state.findings, exception, "attached to ztunnel");
    vec![accepted, of_targets(state), enforced(&state.findings, tally, setting)]
}

/// The conditions of an object that is no policy.
#[must_use]
pub fn of_other(kind: Kind, state: &ObjectState) -> Vec<Condition> {
    if is_route(kind) {
        return of_route(state);
    }
    let accepted = || accepted(ACCEPTED, &state.findings, None, "it is read as it is written");
    let bound = || judged(WAYPOINT_BOUND, state.standing.binding.as_ref());
    match kind {
        Kind::Service => vec![bound()],
        Kind::ServiceEntry => vec![accepted(), bound()],
        Kind::VirtualService | Kind::RequestAuthentication | Kind::RateLimit | Kind::Telemetry => {
            vec![accepted(), of_targets(state)]
        }
        _ => vec![accepted()],
    }
}

/// Another control plane's of the same type stays where nothing was ever said here. What was said before this process began
/// is known by how it begins, so that none goes on to say what is not so any more.
fn of_targets(state: &ObjectState) -> Condition {
    match &state.standing.targets {
        Some(judgement) => Condition::of(WAYPOINT_ACCEPTED, judgement),
        None if state.standing.was_judged => Condition::none(WAYPOINT_ACCEPTED),
        None => Condition::none_of(WAYPOINT_ACCEPTED, Judgement::OF_WAYPOINTS),
    }
}

fn judged(kind: &'static str, judgement: Option<&Judgement>) -> Condition {
    judgement.map_or_else(|| Condition::none(kind), |judgement| Condition::of(kind, judgement))
}

fn of_route(state: &ObjectState) -> Vec<Condition> {
    // With errors its last good version is in force, or none; or all of its rules but those that have them.
    let read = accepted(ACCEPTED, &state.findings, None, "");
    let dropped = state.findings.iter().find(|finding| finding.code == Code::RuleDropped);
    let mut all = Vec::new();
    for (parent, standing) in &state.standing.parents {
        let accepted = match read.holds {
            Some(false) if standing.accepted.holds && dropped.is_none() => {
                Condition { reason: "UnsupportedValue", ..read.clone() }
            }
            _ => Condition::of(ACCEPTED, &standing.accepted),
        };
        let bound = standing.bound.as_ref().map(|bound| Condition::of(WAYPOINT_BOUND, bound));
        let partly = dropped.filter(|_| standing.accepted.holds).map(|dropped| Condition {
            kind: PARTIALLY_INVALID,
            holds: Some(true),
            reason: "UnsupportedValue",
            message: format!("{} ({})", dropped.message, read.message)
                .chars()
                .take(MOST_CHARACTERS)
                .collect(),
            parent: None,
        });
        let of_parent =
            [accepted, Condition::of(RESOLVED, &standing.resolved)].into_iter().chain(bound).chain(partly);
        all.extend(of_parent.map(|condition| Condition { parent: Some(parent.clone()), ..condition }));
    }
    all
}

fn accepted(kind: &'static str, findings: &[Diagnostic], exception: Option<&str>, fine: &str) -> Condition {
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
        kind,
        holds: Some(holds),
        reason,
        message: message.chars().take(MOST_CHARACTERS).collect(),
        parent: None,
    };
    if !errors.is_empty() {
        return condition(false, "Invalid", join(&errors, &warnings));
    }
    if !warnings.is_empty() {
        return condition(true, "UnsupportedValue", warnings);
    }
    condition(true, "Accepted", fine.to_owned())
}

fn join(first: &str, second: &str) -> String {
    if second.is_empty() { first.to_owned() } else { format!("{first}; {second}") }
}

fn enforced(findings: &[Diagnostic], tally: &Tally, setting: &Setting) -> Condition {
    let all = tally.enforcing + tally.pending + tally.rejected;
    let mut message = format!("{}/{all} proxies{} enforce it", tally.enforcing, setting.of);
    if tally.pending > 0 {
        let shown = tally.waiting_for.join(", ");
        let left = tally.pending.saturating_sub(tally.waiting_for.len());
        let left = if left > 0 { format!(" and {left} more") } else { String::new() };
        message = format!("{message}; waiting for {shown}{left}");
    }
    if let Some((name, reason)) = &tally.refusal {
        message = format!("{message}; {} refused it, {name}: {reason}", tally.rejected);
    }
    if tally.others > 0 {
        message = format!("{message}; {} proxies of another make don't say what they enforce", tally.others);
    }
    if tally.unasked > 0 {
        message = format!("{message}; {} control planes can't tell yet", tally.unasked);
    }
    if !setting.apart.is_empty() {
        message = format!("{message}; {}", setting.apart);
    }
    let (holds, reason) = if findings.iter().any(|d| d.code == Code::FailsClosed) {
        (Some(false), "FailsClosed")
    } else if findings.iter().any(|d| d.severity == Severity::Error) {
        (Some(false), "Invalid")
    } else if tally.rejected > 0 {
        (Some(false), "Rejected")
    } else if tally.pending > 0 {
        (Some(false), "Pending")
    } else if tally.unasked > 0 {
        (None, "ControlPlanesUnreachable")
    } else if all == 0 {
        (None, "NoProxies")
    } else {
        (Some(true), "AllProxies")
    };
    let message = message.chars().take(MOST_CHARACTERS).collect();
    Condition { kind: ENFORCED, holds, reason, message, parent: None }
}

/// Whether two lists say the same, in other words perhaps.
#[must_use]
pub fn same_but_for_messages(a: &[Condition], b: &[Condition]) -> bool {
    let head = |c: &Condition| (c.kind, c.holds, c.reason, c.parent.clone());
    a.iter().map(head).eq(b.iter().map(head))
}

#[cfg(test)]
mod tests {
    use config::compile::RouteStanding;

    use super::*;
    use crate::registry::{ObjectVersion, Standing};

    fn state(findings: Vec<Diagnostic>) -> ObjectState {
        let version = ObjectVersion { uid: "u".into(), generation: 3, labelled: false, selects: false };
        ObjectState { version, findings, standing: Standing::default() }
    }

    fn tally(enforcing: usize, pending: usize) -> Tally {
        let mut tally = Tally { enforcing, ..Tally::default() };
        (0..pending)
            .for_each(|index| tally.wait_for(&format!("ztunnel-{index}.culvert-system").into(), false));
        tally
    }

    fn enforced_of(tally: &Tally) -> (Option<bool>, &'static str, String) {
        let found = of_policy(&state(Vec::new()), tally, None, &Setting::default());
        (found[2].holds, found[2].reason, found[2].message.clone())
    }

    #[test]
    fn it_is_enforced_when_every_proxy_says_so() {
        let (holds, reason, message) = enforced_of(&tally(2, 0));
        assert_eq!((holds, reason, &*message), (Some(true), "AllProxies", "2/2 proxies enforce it"));
        let (holds, reason, message) = enforced_of(&tally(1, 1));
        assert_eq!((holds, reason), (Some(false), "Pending"));
        assert_eq!(message, "1/2 proxies enforce it; waiting for ztunnel-0.culvert-system");
        let (holds, reason, _) = enforced_of(&tally(0, 0));
        assert_eq!((holds, reason), (None, "NoProxies"));
    }

    #[test]
    fn a_proxy_of_another_make_does_not_count() {
        let (holds, reason, message) = enforced_of(&Tally { others: 1, ..tally(0, 0) });
        assert_eq!((holds, reason), (None, "NoProxies"));
        assert!(message.contains("1 proxies of another make"), "{message}");
        assert_eq!(enforced_of(&Tally { others: 1, ..tally(1, 0) }).0, Some(true));
    }

    #[test]
    fn a_refusal_is_named_with_its_reason() {
        let mut all = tally(3, 0);
        all.refuse(&"z".into(), &"no room".into());
        all.refuse(&"a".into(), &"no such scope".into());
        let (holds, reason, message) = enforced_of(&all);
        assert_eq!((holds, reason), (Some(false), "Rejected"));
        assert!(message.contains("2 refused it, a: no such scope"), "{message}");
    }

    #[test]
    fn the_proxies_of_all_control_planes_count() {
        let mut all = tally(3, 1);
        let mut other = Tally { enforcing: 4, ..Tally::default() };
        other.wait_for(&"another".into(), true);
        all.add(&other);
        assert_eq!((all.pending, all.fresh), (2, 1));
        let (holds, _, message) = enforced_of(&all);
        assert_eq!(holds, Some(false));
        assert_eq!(message, "7/9 proxies enforce it; waiting for another, ztunnel-0.culvert-system");
        let mut all = tally(3, 0);
        all.add(&Tally { unasked: 1, ..Tally::default() });
        assert_eq!(enforced_of(&all).0, None, "one that cannot be asked leaves it open");
        assert!(!all.is_settled());
    }

    #[test]
    fn errors_and_warnings_are_told() {
        let finding = |code: Code, message: &str, remedy: &str| {
            Diagnostic::about_file(code, "AuthorizationPolicy a/b".into(), message, remedy)
        };
        let bad = of_policy(
            &state(vec![finding(Code::UnknownField, "there is no field spec.acton", "did you mean action?")]),
            &tally(1, 0),
            None,
            &Setting::default(),
        );
        assert_eq!((bad[0].holds, bad[0].reason), (Some(false), "Invalid"));
        assert!(bad[0].message.contains("did you mean action?"));
        assert_eq!((bad[2].holds, bad[2].reason), (Some(false), "Invalid"));
        let warned = of_policy(
            &state(vec![finding(Code::NeedsWaypoint, "needs a waypoint", "")]),
            &tally(1, 0),
            Some("everything is refused"),
            &Setting::default(),
        );
        assert_eq!((warned[0].holds, warned[0].reason), (Some(true), "UnsupportedValue"));
        assert!(warned[0].message.ends_with("for proxies of another make everything is refused"));
        assert_eq!(warned[2].holds, Some(true));
    }

    #[test]
    fn who_is_counted_and_who_is_not_is_said() {
        let setting = Setting {
            of: " of the revisions default and next".to_owned(),
            apart: "not counted: a (its node is not ready)".to_owned(),
        };
        let found = of_policy(&state(Vec::new()), &tally(2, 0), None, &setting);
        let message = "2/2 proxies of the revisions default and next enforce it; not counted: a (its node is not ready)";
        assert_eq!((found[2].holds, &*found[2].message), (Some(true), message));
    }

    #[test]
    fn what_is_no_policy_is_accepted_or_not() {
        let findings =
            vec![Diagnostic::about_file(Code::InvalidValue, "ServiceEntry a/b".into(), "no host", "")];
        let found = of_other(Kind::ServiceEntry, &state(findings));
        assert!(found.len() == 2 && found[1].is_none(), "bound to no waypoint: {found:?}");
        assert_eq!((found[0].kind, found[0].holds, found[0].reason), ("Accepted", Some(false), "Invalid"));
        assert!(found[0].message.contains("no host"));
        assert_eq!(of_other(Kind::WorkloadEntry, &state(Vec::new()))[0].holds, Some(true));
    }

    #[test]
    fn a_route_with_errors_is_accepted_by_none_of_its_parents() {
        let yes = |reason| Judgement { holds: true, reason, message: String::new() };
        let standing = RouteStanding {
            accepted: yes("Accepted"),
            resolved: yes("ResolvedRefs"),
            bound: Some(Judgement { holds: false, reason: "NoWaypoint", message: "none".to_owned() }),
        };
        let findings =
            vec![Diagnostic::about_file(Code::UnknownField, "HTTPRoute a/b".into(), "no such field", "")];
        for (findings, reason) in [(Vec::new(), "Accepted"), (findings, "UnsupportedValue")] {
            let mut state = state(findings);
            let parents =
                ["a", "b"].map(|name| (Arc::new(serde_json::json!({"name": name})), standing.clone()));
            state.standing.parents = parents.to_vec();
            let found = of_other(Kind::HttpRoute, &state);
            let heads: Vec<_> = found.iter().map(|c| (c.kind, c.reason)).collect();
            let one = [(ACCEPTED, reason), (RESOLVED, "ResolvedRefs"), (WAYPOINT_BOUND, "NoWaypoint")];
            assert_eq!(heads, [one, one].concat());
            assert_eq!(found[3].parent.as_ref().unwrap()["name"], "b");
        }
    }

    #[test]
    fn a_route_of_which_some_rules_have_errors_is_accepted_in_part() {
        let standing = RouteStanding {
            accepted: Judgement { holds: true, reason: "Accepted", message: String::new() },
            resolved: Judgement { holds: true, reason: "ResolvedRefs", message: String::new() },
            bound: None,
        };
        let about = |code, message: &str| Diagnostic::about_file(code, "HTTPRoute a/b".into(), message, "");
        let mut state = state(vec![
            about(Code::InvalidValue, "no expression"),
            about(Code::RuleDropped, "Dropped Rule 1"),
        ]);
        state.standing.parents = vec![(Arc::new(serde_json::json!({"name": "a"})), standing)];
        let found = of_other(Kind::HttpRoute, &state);
        let heads: Vec<_> = found.iter().map(|c| (c.kind, c.holds, c.reason)).collect();
        let partly = (PARTIALLY_INVALID, Some(true), "UnsupportedValue");
        assert_eq!(
            heads,
            [(ACCEPTED, Some(true), "Accepted"), (RESOLVED, Some(true), "ResolvedRefs"), partly]
        );
        assert!(found[2].message.starts_with("Dropped Rule 1") && found[2].message.contains("no expression"));
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        let (_, _, message) = enforced_of(&tally(0, 2000));
        assert!(message.ends_with("and 1990 more") && message.len() < 600, "{message}");
    }
}
