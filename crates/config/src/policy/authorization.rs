//! AuthorizationPolicy (`security.istio.io`): reading it with every upstream field, and checking it as Istio's
//! webhook does, and more strictly where Istio lets through what then matches something else than it says.

use model::http::HttpMatch;
use model::{Match, Str};

use super::pattern::{self, read_list};
use super::requests;
use super::selector::{SELECTOR, TARGET_REF, Target, non_empty, read_selector, read_targets};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, silent};
use crate::labels::Selector;
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// `AuthorizationPolicy.spec`.
pub static SPEC: Schema = Schema {
    name: "AuthorizationPolicy.spec",
    fields: &[
        nested("selector", &SELECTOR),
        enforced("action"),
        nested("rules", &RULE),
        nested("targetRefs", &TARGET_REF),
        nested("targetRef", &TARGET_REF),
        nested("provider", &PROVIDER),
    ],
};

static RULE: Schema = Schema {
    name: "AuthorizationPolicy.spec.rules[]",
    fields: &[nested("from", &FROM), nested("to", &TO), nested("when", &WHEN)],
};
static FROM: Schema =
    Schema { name: "AuthorizationPolicy.spec.rules[].from[]", fields: &[nested("source", &SOURCE)] };
static SOURCE: Schema = Schema {
    name: "AuthorizationPolicy.spec.rules[].from[].source",
    fields: &[
        enforced("principals"),
        enforced("notPrincipals"),
        enforced("namespaces"),
        enforced("notNamespaces"),
        enforced("serviceAccounts"),
        enforced("notServiceAccounts"),
        enforced("ipBlocks"),
        enforced("notIpBlocks"),
        enforced("trustDomains"),
        enforced("notTrustDomains"),
        enforced("requestPrincipals"),
        enforced("notRequestPrincipals"),
        enforced("remoteIpBlocks"),
        enforced("notRemoteIpBlocks"),
    ],
};
static TO: Schema =
    Schema { name: "AuthorizationPolicy.spec.rules[].to[]", fields: &[nested("operation", &OPERATION)] };
static OPERATION: Schema = Schema {
    name: "AuthorizationPolicy.spec.rules[].to[].operation",
    fields: &[
        enforced("ports"),
        enforced("notPorts"),
        enforced("methods"),
        enforced("notMethods"),
        enforced("paths"),
        enforced("notPaths"),
        enforced("hosts"),
        enforced("notHosts"),
    ],
};
static WHEN: Schema = Schema {
    name: "AuthorizationPolicy.spec.rules[].when[]",
    fields: &[enforced("key"), enforced("values"), enforced("notValues")],
};
static PROVIDER: Schema = Schema { name: "AuthorizationPolicy.spec.provider", fields: &[enforced("name")] };

/// The annotation that makes a policy a trial: evaluated and reported, not enforced.
pub const DRY_RUN: &str = "istio.io/dry-run";

/// What a policy says, checked and in the model's terms; trust domains are not yet spelled out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuthorizationPolicy {
    /// Which workloads it is for.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: RequestedAction,
    /// The rules, OR-ed.
    pub rules: Box<[PolicyRule]>,
    /// Whether it is only evaluated and reported.
    pub dry_run: bool,
    /// The provider that decides, for [`RequestedAction::Custom`].
    pub provider: Option<Str>,
}

impl AuthorizationPolicy {
    /// One that refuses every connection to what is in `scope`.
    pub(crate) fn denying(scope: PolicyScope) -> Self {
        let rules = [PolicyRule::default()].into();
        Self { scope, action: RequestedAction::Deny, rules, dry_run: false, provider: None }
    }

    /// Whether something of it can be told only from requests, or only of them somebody can be asked.
    #[must_use]
    pub fn needs_requests(&self) -> bool {
        self.action == RequestedAction::Custom || self.rules.iter().any(PolicyRule::needs_requests)
    }

    /// What refuses at least as much as this one, which has errors; `None` where it changes no decision.
    pub(crate) fn closed(self) -> Option<Self> {
        let decides = !self.dry_run && self.action != RequestedAction::Audit;
        decides.then(|| Self::denying(self.scope))
    }
}

/// Which workloads a policy is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PolicyScope {
    /// Those of its namespace; in the root namespace, those of the mesh.
    Namespace,
    /// Of these, the ones with certain labels.
    Selector(Selector),
    /// What reaches these objects of its namespace. Only a waypoint can enforce it.
    Targets(Box<[Target]>),
}

impl PolicyScope {
    /// What is named by `targetRefs`.
    pub(super) fn targets(&self) -> Option<&[Target]> {
        match self {
            Self::Targets(targets) => Some(targets),
            Self::Namespace | Self::Selector(_) => None,
        }
    }
}

/// `spec.action`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum RequestedAction {
    /// What matches is let in.
    #[default]
    Allow,
    /// What matches is refused.
    Deny,
    /// What matches is logged by some other system. Never changes a decision.
    Audit,
    /// An external authorizer decides over what matches.
    Custom,
}

impl RequestedAction {
    /// The action as it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

/// A rule: the clauses are AND-ed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PolicyRule {
    /// The `from` part, the `to` part, and one for each condition, as far as they are there.
    pub clauses: Box<[PolicyClause]>,
}

impl PolicyRule {
    /// Whether some part of it can be told only from a request.
    #[must_use]
    pub fn needs_requests(&self) -> bool {
        self.clauses.iter().any(|c| c.matches.iter().any(|m| m.needs_requests))
    }
}

/// A part of a rule: the matches are OR-ed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PolicyClause {
    /// The sources, the operations, or the one condition.
    pub matches: Box<[PolicyMatch]>,
}

/// A source, an operation or a condition.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PolicyMatch {
    /// What of it a connection can be matched by. Empty when that is nothing.
    pub connection: Match,
    /// Whether it also, or only, has fields that need requests to be told.
    pub needs_requests: bool,
    /// What these are; `None` where there are none, or nothing here can tell them.
    pub http: Option<Box<HttpMatch>>,
}

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::AuthorizationPolicy,
    group: "security.istio.io",
    versions: &["v1", "v1beta1"],
    name: "AuthorizationPolicy",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "AuthorizationPolicy",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let dry_run = metadata.annotation(DRY_RUN).and_then(|annotation| {
        let value = parse_dry_run(annotation.value);
        if value.is_none() {
            annotation.invalid(fields, "neither \"true\" nor \"false\"", "");
        }
        value
    });
    let namespace = fields.context().pool.string(metadata.namespace);
    // An absent spec would be an empty one, which refuses everything: too much for half a file to do.
    let spec = fields.required("spec")?.fields()?.without_nulls();
    let policy = read(spec, &namespace, dry_run.unwrap_or(false));
    Some(Resource::AuthorizationPolicy(Box::new(policy)))
}

fn read(mut spec: Fields<'_, '_>, namespace: &Str, dry_run: bool) -> AuthorizationPolicy {
    let action = read_action(&mut spec);
    if dry_run && action == RequestedAction::Custom {
        let message =
            "a dry run of CUSTOM has no effect: the provider is not asked, and nothing is counted of it";
        spec.report(Code::WithoutEffect, message, "remove the annotation, and the provider decides");
    }
    let provider = read_provider(&mut spec, action);
    let scope = read_scope(&mut spec, action);
    let rules = read_rules(&mut spec, namespace, action);
    AuthorizationPolicy { scope, action, rules, dry_run, provider }
}

fn read_action(spec: &mut Fields<'_, '_>) -> RequestedAction {
    let Some(mut cursor) = spec.take("action") else { return RequestedAction::Allow };
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return RequestedAction::Allow;
    };
    match text {
        "ALLOW" => RequestedAction::Allow,
        "DENY" => RequestedAction::Deny,
        "AUDIT" => {
            let message =
                "AUDIT has no effect: no audit plug-in reads connections, and it never changes a decision";
            cursor.report(Code::WithoutEffect, message, "the access log has every connection");
            RequestedAction::Audit
        }
        "CUSTOM" => {
            let message = "CUSTOM needs a waypoint to ask the provider; until one is deployed, every connection that \
                           the rules could match is refused";
            cursor.report(Code::NeedsWaypoint, message, "deploy a waypoint for the workloads of this policy");
            RequestedAction::Custom
        }
        other => {
            cursor.invalid(format_args!("{other:?} is no action"), "write ALLOW, DENY, AUDIT or CUSTOM");
            RequestedAction::Allow
        }
    }
}

fn read_provider(spec: &mut Fields<'_, '_>, action: RequestedAction) -> Option<Str> {
    let is_custom = action == RequestedAction::Custom;
    let mut name = None;
    if let Some(mut cursor) = spec.take("provider") {
        if !is_custom {
            let message = format!("a provider means nothing to the action {}", action.as_str());
            cursor.invalid(message, "remove it, or set the action to CUSTOM");
        }
        if let Some(mut provider) = cursor.fields() {
            name = provider.required("name").and_then(non_empty).map(Str::from);
        }
    } else if is_custom {
        spec.report(Code::MissingField, "spec.provider is missing", "name the provider that decides");
    }
    name
}

fn read_scope(spec: &mut Fields<'_, '_>, action: RequestedAction) -> PolicyScope {
    let selector = read_selector(spec);
    let targets = read_targets(spec);
    match (selector, targets.is_empty()) {
        (Some(_), false) => {
            spec.report(
                Code::InvalidValue,
                "spec.selector and spec.targetRefs are both set; only one may be",
                "split the policy",
            );
            PolicyScope::Namespace
        }
        (None, false) => {
            let message = "only a waypoint can enforce a policy for what reaches an object; until one is deployed, \
                           the workloads behind it refuse what the policy could refuse, and connections to it \
                           fail where one of these is outside the mesh or in another namespace";
            let remedy = "deploy a waypoint for the target, or select the workloads by labels";
            for name in ["targetRef", "targetRefs"] {
                if let (Some(mut cursor), true) = (spec.take(name), action != RequestedAction::Audit) {
                    cursor.report(Code::NeedsWaypoint, message, remedy);
                }
            }
            PolicyScope::Targets(targets.into())
        }
        (Some(selector), true) => PolicyScope::Selector(selector),
        (None, true) => PolicyScope::Namespace,
    }
}

fn read_rules(spec: &mut Fields<'_, '_>, namespace: &Str, action: RequestedAction) -> Box<[PolicyRule]> {
    let mut rules = Vec::new();
    let mut any = false;
    if let Some(mut cursor) = spec.take("rules") {
        any = true;
        if cursor.node().value == crate::tree::Value::Sequence(Vec::new()) && action != RequestedAction::Allow
        {
            cursor.invalid("without rules the policy never matches", "add the rule {} to match everything");
        }
        cursor.each(|item| rules.extend(read_rule(item, namespace, action)));
    }
    if !any && matches!(action, RequestedAction::Deny | RequestedAction::Custom) {
        let message =
            format!("spec.rules is missing: a {} policy without rules never matches", action.as_str());
        spec.report(Code::MissingField, message, "add the rule {} to match everything");
    }
    rules.into()
}

fn read_rule(cursor: Cursor<'_, '_>, namespace: &Str, action: RequestedAction) -> Option<PolicyRule> {
    let mut rule = cursor.fields()?.without_nulls();
    let mut clauses = Vec::new();
    let mut beyond = Vec::new();
    for (part, inner) in [("from", "source"), ("to", "operation")] {
        let Some(mut list) = rule.take(part) else { continue };
        if list.node().value == crate::tree::Value::Sequence(Vec::new()) {
            list.invalid("is an empty list", "remove it, or say what it is to match");
        }
        let mut matches = Vec::new();
        list.each(|item| {
            let Some(mut fields) = item.fields() else { return };
            let Some(fields) = fields.required(inner).and_then(Cursor::fields) else { return };
            let fields = fields.without_nulls();
            matches.push(match inner {
                "source" => read_source(fields, namespace, action, &mut beyond),
                _ => read_operation(fields, &mut beyond),
            });
        });
        clauses.push(PolicyClause { matches: matches.into() });
    }
    rule.each("when", |item| {
        let read =
            item.fields().and_then(|f| read_condition(f.without_nulls(), namespace, action, &mut beyond));
        clauses.extend(read.map(|m| PolicyClause { matches: [m].into() }));
    });
    let read = PolicyRule { clauses: clauses.into() };
    report_beyond(&mut rule, &read, &beyond, action);
    Some(read)
}

/// Says what becomes of a rule that a connection cannot be matched by as it is written.
fn report_beyond(rule: &mut Fields<'_, '_>, read: &PolicyRule, beyond: &[String], action: RequestedAction) {
    if beyond.is_empty() {
        return;
    }
    let nothing_else =
        read.clauses.iter().all(|c| c.matches.iter().any(|m| m.connection == Match::default()));
    let effect = match action {
        RequestedAction::Allow => "until a waypoint is deployed, the rule lets nothing in",
        RequestedAction::Deny | RequestedAction::Custom if nothing_else => {
            "until a waypoint is deployed, the rule refuses every connection"
        }
        RequestedAction::Deny | RequestedAction::Custom => {
            "until a waypoint is deployed, the rule refuses every connection that its other fields match"
        }
        RequestedAction::Audit => return,
    };
    let message = format!("a connection does not show {}; {effect}", beyond.join(", "));
    rule.report(Code::NeedsWaypoint, message, "deploy a waypoint for the workloads of this policy");
}

fn read_source(
    mut source: Fields<'_, '_>,
    namespace: &Str,
    action: RequestedAction,
    beyond: &mut Vec<String>,
) -> PolicyMatch {
    let is_empty = source.is_empty();
    let connection = Match {
        principals: read_list(&mut source, "principals", pattern::principal),
        not_principals: read_list(&mut source, "notPrincipals", pattern::principal),
        namespaces: read_list(&mut source, "namespaces", pattern::text),
        not_namespaces: read_list(&mut source, "notNamespaces", pattern::text),
        service_accounts: read_accounts(&mut source, "serviceAccounts", namespace),
        not_service_accounts: read_accounts(&mut source, "notServiceAccounts", namespace),
        source_ips: read_list(&mut source, "ipBlocks", pattern::range),
        not_source_ips: read_list(&mut source, "notIpBlocks", pattern::range),
        trust_domains: read_list(&mut source, "trustDomains", pattern::text),
        not_trust_domains: read_list(&mut source, "notTrustDomains", pattern::text),
        ..Match::default()
    };
    let http = requests::source(&mut source, beyond);
    check_source(&mut source, &connection, is_empty, action);
    PolicyMatch { connection, needs_requests: http.is_some(), http }
}

fn check_source(source: &mut Fields<'_, '_>, m: &Match, is_empty: bool, action: RequestedAction) {
    let accounts = !(m.service_accounts.is_empty() && m.not_service_accounts.is_empty());
    let principals = !(m.principals.is_empty() && m.not_principals.is_empty());
    let namespaces = !(m.namespaces.is_empty() && m.not_namespaces.is_empty());
    if accounts && (principals || namespaces) {
        source.report(
            Code::InvalidValue,
            "serviceAccounts cannot be set beside namespaces or principals",
            "make two sources of it",
        );
    }
    if is_empty {
        source.report(Code::InvalidValue, "an empty source would match everything", "remove it, or fill it");
    }
    // As in Istio: the connection to the provider is made before the identity is known there.
    if action == RequestedAction::Custom && (accounts || principals || namespaces) {
        source.report(
            Code::InvalidValue,
            "a CUSTOM policy cannot match by identity",
            "match by ipBlocks or by the operation, and let the provider check the identity",
        );
    }
}

fn read_accounts(
    source: &mut Fields<'_, '_>,
    name: &'static str,
    namespace: &Str,
) -> Box<[model::ServiceAccountMatch]> {
    // The limits are those of Istio's CRD.
    let list = read_list(source, name, |mut item| {
        if item.node().as_str().is_some_and(|t| t.len() > 320) {
            item.invalid("has more than 320 characters", "");
            return None;
        }
        pattern::service_account(item, namespace)
    });
    if list.len() > 16 {
        let message = format!("{name} has {} items; at most 16", list.len());
        source.report(Code::InvalidValue, message, "split the source");
    }
    list
}

fn read_operation(mut operation: Fields<'_, '_>, beyond: &mut Vec<String>) -> PolicyMatch {
    let is_empty = operation.is_empty();
    let connection = Match {
        destination_ports: read_list(&mut operation, "ports", pattern::port),
        not_destination_ports: read_list(&mut operation, "notPorts", pattern::port),
        ..Match::default()
    };
    let http = requests::operation(&mut operation, beyond);
    if is_empty {
        operation.report(
            Code::InvalidValue,
            "an empty operation would match everything",
            "remove it, or fill it",
        );
    }
    PolicyMatch { connection, needs_requests: http.is_some(), http }
}

fn read_condition(
    mut when: Fields<'_, '_>,
    namespace: &Str,
    action: RequestedAction,
    beyond: &mut Vec<String>,
) -> Option<PolicyMatch> {
    let mut key = when.required("key")?;
    let Some(name) = key.node().as_str() else {
        key.string();
        return None;
    };
    let by_identity = matches!(
        name,
        "source.namespace" | "source.principal" | "source.serviceAccount" | "source.trustDomain"
    );
    if action == RequestedAction::Custom && (by_identity || name.starts_with("request.auth.")) {
        key.invalid(
            format_args!("a CUSTOM policy cannot match by {name}"),
            "let the provider check the identity",
        );
    }
    let of_requests = requests::key(name);
    of_requests.iter().for_each(|of| requests::check_shown(of, &mut key));
    let needs_requests = of_requests.is_some();
    let (mut m, mut http) = (Match::default(), None);
    match name {
        "source.ip" => both(&mut when, &mut m.source_ips, &mut m.not_source_ips, pattern::range),
        "source.namespace" => both(&mut when, &mut m.namespaces, &mut m.not_namespaces, pattern::text),
        "source.principal" => both(&mut when, &mut m.principals, &mut m.not_principals, pattern::principal),
        "source.serviceAccount" => {
            let account = |c: Cursor<'_, '_>| pattern::service_account(c, namespace);
            both(&mut when, &mut m.service_accounts, &mut m.not_service_accounts, account);
        }
        "source.trustDomain" => {
            both(&mut when, &mut m.trust_domains, &mut m.not_trust_domains, pattern::text);
        }
        "destination.ip" => {
            both(&mut when, &mut m.destination_ips, &mut m.not_destination_ips, pattern::range);
        }
        "destination.port" => {
            both(&mut when, &mut m.destination_ports, &mut m.not_destination_ports, pattern::port);
        }
        _ => match of_requests {
            Some(key) => http = requests::condition(key, &mut when),
            None => {
                when.take("values");
                when.take("notValues");
                unknown_key(when.take("key")?, name);
                return None;
            }
        },
    }
    let given = |w: &mut Fields<'_, '_>, f| w.take(f).is_some();
    if !given(&mut when, "values") && !given(&mut when, "notValues") {
        let message = format!("the condition on {name} has neither values nor notValues");
        when.report(Code::MissingField, message, "add the values to compare with");
    }
    if needs_requests && !beyond.iter().any(|b| b == name) {
        beyond.push(name.to_owned());
    }
    Some(PolicyMatch { connection: m, needs_requests, http })
}

fn both<'n, T>(
    when: &mut Fields<'_, 'n>,
    values: &mut Box<[T]>,
    not_values: &mut Box<[T]>,
    read: impl Fn(Cursor<'_, 'n>) -> Option<T>,
) {
    *values = read_list(when, "values", &read);
    *not_values = read_list(when, "notValues", &read);
}

fn unknown_key(mut cursor: Cursor<'_, '_>, key: &str) {
    cursor.invalid(
        format_args!("{key:?} is no attribute"),
        "write source.ip, source.namespace, source.principal, source.serviceAccount, source.trustDomain, \
         destination.ip, destination.port, remote.ip, connection.sni, request.headers[NAME], \
         request.auth.principal, request.auth.audiences, request.auth.presenter or request.auth.claims[NAME]",
    );
}

/// The value of the annotation [`DRY_RUN`], in the forms that Istio takes. `None` for any other text: what is
/// meant as a trial must not be enforced, and the reverse, so the policy is refused.
#[must_use]
pub fn parse_dry_run(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
