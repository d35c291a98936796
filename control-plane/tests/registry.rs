//! What is read of a cluster, and what follows: lists, settings, revisions, selected namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod mesh;

use config::resource::Kind;
use control_plane::ca::Pods;
use control_plane::registry::Committed;
use control_plane::source::Change;
use mesh::{event, first_lists, gone, other_lists, pod, policy, registry, service, set, settings};
use model::Change as Step;
use serde_json::json;
use tokio::time::Instant;

/// What a commit sets and removes, as text.
fn steps(committed: &Committed) -> Vec<String> {
    let step = |change: &Step| match change {
        Step::SetWorkload(w) => format!("workload {}/{}", w.namespace, w.name()),
        Step::RemoveWorkload(uid) => format!("no {uid}"),
        Step::SetService(s) => format!("service {}/{}", s.namespace, s.name),
        Step::RemoveService(key) => format!("no service {key}"),
        Step::SetPolicy(p) => format!("policy {}", p.key),
        Step::RemovePolicy(key) => format!("no policy {key}"),
        Step::SetHttpService(s) => format!("requests of {}", s.service),
        Step::RemoveHttpService(key) => format!("no requests of {key}"),
        Step::SetHttpPolicy(p) => format!("policy over requests {}", p.key),
        Step::RemoveHttpPolicy(key) => format!("no policy over requests {key}"),
        Step::SetTraffic(t) => format!("traffic of {}", t.service),
        Step::RemoveTraffic(key) => format!("no traffic of {key}"),
        Step::SetAuthentication(a) => format!("authentication {}", a.key),
        Step::RemoveAuthentication(key) => format!("no authentication {key}"),
        Step::SetRateLimit(l) => format!("rate limit {}", l.key),
        Step::RemoveRateLimit(key) => format!("no rate limit {key}"),
        Step::SetAuthorizer(a) => format!("authorizer {}", a.name),
        Step::RemoveAuthorizer(name) => format!("no authorizer {name}"),
        Step::SetSettings(s) => format!("settings {} {}", s.trust_domains.own, s.root_namespace),
    };
    let mut steps: Vec<String> = committed.changes.iter().map(step).collect();
    steps.sort();
    steps
}

#[test]
fn nothing_is_given_out_before_everything_was_listed_once() {
    let (mut registry, _) = registry();
    registry.take(event(Kind::Pod, Change::Listing));
    registry.take(set(Kind::Pod, &pod("shop", "a", "10.0.0.1", "1")));
    assert!(registry.commit(Instant::now()).is_none());
    let pods = registry.pods();
    assert!(!pods.is_ready());
    first_lists(&mut registry, &[("shop", json!({}))], Some("trustDomain: example.org"));
    other_lists(&mut registry, vec![set(Kind::Pod, &pod("shop", "a", "10.0.0.1", "1"))]);
    let committed = registry.commit(Instant::now()).unwrap();
    assert!(committed.first);
    assert_eq!(steps(&committed), ["settings example.org culvert-system", "workload shop/a"]);
    assert!(pods.is_ready() && pods.runs_on("node1", "shop", "web"));
    // A CRD that is not there is no reason to wait.
    let (mut other, _) = mesh::registry();
    first_lists(&mut other, &[], None);
    other_lists(&mut other, Vec::new());
    other.take(event(Kind::ServiceEntry, Change::NotServed));
    assert!(other.commit(Instant::now()).is_some());
}

#[test]
fn what_a_new_list_lacks_is_gone_and_the_rest_costs_nothing() {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[], None);
    let both = || vec![pod("shop", "a", "10.0.0.1", "1"), pod("shop", "b", "10.0.0.2", "1")];
    other_lists(&mut registry, both().iter().map(|p| set(Kind::Pod, p)).collect());
    registry.commit(Instant::now()).unwrap();
    let before = registry.repository().steps();
    registry.take(event(Kind::Pod, Change::Listing));
    registry.take(set(Kind::Pod, &both()[0]));
    // Not complete yet: nothing is taken for gone.
    assert!(steps(&registry.commit(Instant::now()).unwrap()).is_empty());
    assert_eq!(registry.repository().steps(), before);
    registry.take(event(Kind::Pod, Change::Listed));
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["no Kubernetes//Pod/shop/b"]);
    registry.take(gone(Kind::Pod, "shop", "a"));
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["no Kubernetes//Pod/shop/a"]);
}

#[test]
fn settings_that_cannot_be_read_hold_the_start_and_later_change_nothing() {
    for bad in ["trustDomain: [", "trustDomian: x", "a: 1\n---\nb: 2"] {
        let (mut registry, _) = registry();
        first_lists(&mut registry, &[], Some(bad));
        other_lists(&mut registry, Vec::new());
        assert!(registry.commit(Instant::now()).is_none(), "{bad}");
        assert!(registry.overview().lock().unwrap().waiting.contains("settings"), "{bad}");
        registry.take(set(Kind::ConfigMap, &settings("trustDomain: good", "2")));
        let committed = registry.commit(Instant::now()).unwrap();
        assert_eq!(steps(&committed), ["settings good culvert-system"], "{bad}");
        registry.take(set(Kind::ConfigMap, &settings(bad, "3")));
        assert!(steps(&registry.commit(Instant::now()).unwrap()).is_empty(), "{bad}");
        registry.take(set(Kind::ConfigMap, &settings("trustDomain: better\nrootNamespace: root", "4")));
        assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["settings better root"]);
    }
}

#[test]
fn an_error_in_the_settings_has_its_line() {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[], Some("trustDomain: a\noutboundTrafficPolicy:\n  mode: SOMETIMES\n"));
    let said = registry.repository().review();
    assert_eq!((said[0].line, &*said[0].text), (3, "  mode: SOMETIMES"));
    assert!(said[0].to_string().starts_with("ConfigMap culvert-system/culvert, key mesh:3:"), "{}", said[0]);
}

#[test]
fn objects_of_another_revision_are_not_read() {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[], None);
    let rules = json!({ "action": "DENY", "rules": [{}] });
    let labelled = |name: &str, revision: &str| {
        let mut policy = policy("shop", name, &rules, 1);
        policy["metadata"]["labels"] = json!({ "istio.io/rev": revision });
        set(Kind::AuthorizationPolicy, &policy)
    };
    other_lists(&mut registry, vec![labelled("ours", "default"), labelled("theirs", "canary")]);
    assert!(steps(&registry.commit(Instant::now()).unwrap()).contains(&"policy shop/ours".to_owned()));
    assert!(registry.repository().about("AuthorizationPolicy shop/theirs").is_empty());
    registry.take(labelled("ours", "canary"));
    assert_eq!(
        steps(&registry.commit(Instant::now()).unwrap()),
        ["no policy over requests shop/ours", "no policy shop/ours"]
    );
}

#[test]
fn settings_that_go_away_stay_in_force() {
    let (mut registry, _) = registry();
    first_lists(
        &mut registry,
        &[],
        Some("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\ntrustDomain: shop.example"),
    );
    other_lists(&mut registry, Vec::new());
    registry.commit(Instant::now()).unwrap();
    let held = registry.repository().settings().clone();
    assert_eq!(held.trust_domains.own.to_string(), "shop.example");
    let mut without = settings("", "2");
    without["data"] = json!({ "mehs": "outboundTrafficPolicy: {mode: REGISTRY_ONLY}" });
    for change in [set(Kind::ConfigMap, &without), gone(Kind::ConfigMap, "culvert-system", "culvert")] {
        registry.take(change);
        registry.commit(Instant::now()).unwrap();
        assert_eq!(*registry.repository().settings(), held);
        let said = registry.repository().about("ConfigMap culvert-system/culvert, key mesh");
        assert!(said.iter().any(|d| d.severity == config::diagnostic::Severity::Error), "{said:?}");
    }
    registry.take(set(Kind::ConfigMap, &settings("trustDomain: other.example", "3")));
    registry.commit(Instant::now()).unwrap();
    assert_eq!(registry.repository().settings().trust_domains.own.to_string(), "other.example");
}

#[test]
fn objects_with_a_tag_are_read_by_the_revision_that_has_it() {
    let (mut registry, relists) = registry();
    first_lists(&mut registry, &[], None);
    let tagged = |tags: &str, version: &str| {
        let mut settings = settings("{}", version);
        settings["data"]["revisionTags"] = json!(tags);
        set(Kind::ConfigMap, &settings)
    };
    registry.take(tagged("prod, stable", "2"));
    let mut policy = policy("shop", "tagged", &json!({ "action": "DENY", "rules": [{}] }), 1);
    policy["metadata"]["labels"] = json!({ "istio.io/rev": "stable" });
    other_lists(&mut registry, vec![set(Kind::AuthorizationPolicy, &policy)]);
    assert!(steps(&registry.commit(Instant::now()).unwrap()).contains(&"policy shop/tagged".to_owned()));
    // The tag goes to another revision: all is listed again, and read by the new rule.
    let before = *relists.borrow();
    registry.take(tagged("prod", "3"));
    assert_eq!(*relists.borrow(), before + 1);
    registry.take(event(Kind::AuthorizationPolicy, Change::Listing));
    registry.take(set(Kind::AuthorizationPolicy, &policy));
    assert!(registry.commit(Instant::now()).is_none(), "half a list of policies");
    registry.take(event(Kind::AuthorizationPolicy, Change::Listed));
    for kind in [Kind::PeerAuthentication, Kind::RequestAuthentication, Kind::RateLimit] {
        assert!(registry.commit(Instant::now()).is_none(), "before {kind:?} is listed");
        registry.take(event(kind, Change::Listing));
        registry.take(event(kind, Change::Listed));
    }
    let gone = ["no policy over requests shop/tagged", "no policy shop/tagged"];
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), gone);
    registry.take(tagged("prod", "4"));
    assert_eq!(*relists.borrow(), before + 1);
}

#[test]
fn only_selected_namespaces_are_read_and_selecting_one_asks_for_its_objects() {
    let (mut registry, relists) = registry();
    let selectors = "discoverySelectors: [{matchLabels: {mesh: 'on'}}]";
    let on = json!({ "mesh": "on" });
    first_lists(&mut registry, &[("shop", on.clone()), ("other", json!({}))], Some(selectors));
    let pods = || {
        vec![
            set(Kind::Pod, &pod("shop", "a", "10.0.0.1", "1")),
            set(Kind::Pod, &pod("other", "b", "10.0.0.2", "1")),
            set(Kind::Pod, &pod("culvert-system", "c", "10.0.0.3", "1")),
            set(Kind::Pod, &pod("proxies", "d", "10.0.0.4", "1")),
        ]
    };
    other_lists(&mut registry, pods());
    let committed = registry.commit(Instant::now()).unwrap();
    let workloads = steps(&committed).into_iter().filter(|s| s.starts_with("workload")).collect::<Vec<_>>();
    assert_eq!(workloads, ["workload culvert-system/c", "workload proxies/d", "workload shop/a"]);
    assert_eq!(registry.namespaces().borrow().iter().collect::<Vec<_>>(), ["shop"]);
    let before = *relists.borrow();
    registry.take(set(Kind::Namespace, &mesh::namespace("other", &on, "2")));
    assert!(*relists.borrow() > before);
    // A list that began before does not count, nor do pods alone.
    registry.take(event(Kind::AuthorizationPolicy, Change::Listed));
    registry.take(event(Kind::PeerAuthentication, Change::Listed));
    pods().into_iter().for_each(|event| registry.take(event));
    assert!(registry.commit(Instant::now()).is_none(), "pods before their policies");
    other_lists(&mut registry, pods());
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["workload other/b"]);
    registry.take(set(Kind::Namespace, &mesh::namespace("shop", &json!({}), "2")));
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["no Kubernetes//Pod/shop/a"]);
    // Without selectors all are read again.
    let before = *relists.borrow();
    registry.take(set(Kind::ConfigMap, &settings("", "2")));
    registry.commit(Instant::now());
    assert!(*relists.borrow() > before);
    other_lists(&mut registry, pods());
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), ["workload shop/a"]);
}

#[test]
fn the_root_is_not_written_where_another_meshs_sidecars_are() {
    let (mut registry, _) = registry();
    let namespaces = [
        ("injected", json!({ "istio-injection": "enabled" })),
        ("left", json!({ "istio-injection": "disabled" })),
        ("ours", json!({ "istio.io/rev": "default" })),
        ("theirs", json!({ "istio.io/rev": "1-30" })),
    ];
    first_lists(&mut registry, &namespaces, None);
    other_lists(&mut registry, Vec::new());
    registry.commit(Instant::now()).unwrap();
    let told = registry.namespaces();
    assert_eq!(told.borrow().iter().collect::<Vec<_>>(), ["left", "ours"]);
    registry.take(set(Kind::Namespace, &mesh::namespace("injected", &json!({}), "2")));
    registry.commit(Instant::now()).unwrap();
    assert_eq!(told.borrow().iter().collect::<Vec<_>>(), ["injected", "left", "ours"]);
}

#[test]
fn policies_are_reported_with_their_version_and_what_is_said_of_them() {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[], None);
    let http = json!({ "action": "DENY", "rules": [{ "to": [{ "operation": { "paths": ["/a"] } }] }] });
    other_lists(
        &mut registry,
        vec![
            set(Kind::AuthorizationPolicy, &policy("shop", "p", &http, 4)),
            set(Kind::Service, &service("shop", "web", "10.96.0.1")),
        ],
    );
    let committed = registry.commit(Instant::now()).unwrap();
    assert_eq!(committed.reports.len(), 1);
    let state = committed.reports[0].state.as_ref().unwrap();
    assert_eq!((&*state.version.uid, state.version.generation), ("uid-p", 4));
    assert_eq!(state.findings[0].code, config::diagnostic::Code::NeedsWaypoint);
    registry.take(gone(Kind::AuthorizationPolicy, "shop", "p"));
    let committed = registry.commit(Instant::now()).unwrap();
    assert!(committed.reports[0].state.is_none());
}

#[test]
fn settings_that_are_missing_at_the_start_are_waited_for() {
    let (mut registry, _) = mesh::registry_that(|settings| settings.settings_optional = false);
    let in_force = registry.in_force();
    first_lists(&mut registry, &[("shop", json!({}))], None);
    other_lists(&mut registry, vec![set(Kind::Pod, &pod("shop", "a", "10.0.0.1", "1"))]);
    assert!(registry.commit(Instant::now()).is_none());
    let waiting = registry.overview().lock().unwrap().waiting.clone();
    assert!(waiting.contains("there is no ConfigMap culvert-system/culvert"), "{waiting}");
    assert!(in_force.borrow().settings.is_none());
    registry.take(set(Kind::ConfigMap, &settings("trustDomain: found.example", "2")));
    let committed = registry.commit(Instant::now()).unwrap();
    assert_eq!(steps(&committed), ["settings found.example culvert-system", "workload shop/a"]);
    assert!(in_force.borrow().settings.is_some());
}

#[test]
fn a_kind_that_was_deleted_takes_its_objects_along_and_one_that_is_not_served_does_not() {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[("shop", json!({}))], Some(""));
    let deny = json!({ "action": "DENY", "rules": [{}] });
    let policies = || ["p", "q"].map(|name| set(Kind::AuthorizationPolicy, &policy("shop", name, &deny, 1)));
    other_lists(&mut registry, policies().into());
    registry.commit(Instant::now()).unwrap();
    registry.take(event(Kind::AuthorizationPolicy, Change::NotServed));
    assert_eq!(steps(&registry.commit(Instant::now()).unwrap()), Vec::<String>::new());
    registry.take(event(Kind::AuthorizationPolicy, Change::KindDeleted));
    assert_eq!(
        steps(&registry.commit(Instant::now()).unwrap()),
        [
            "no policy over requests shop/p",
            "no policy over requests shop/q",
            "no policy shop/p",
            "no policy shop/q",
        ]
    );
}
