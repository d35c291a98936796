//! The indexes of a snapshot through additions, replacements and removals.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::sync::Arc;

use model::{
    Action, Change, Destination, Health, Mesh, NetworkAddress, NetworkMode, OriginalDst, OutboundMode,
    Policy, PolicyKey, Scope, Service, ServiceKey, ServiceSource, Settings, Workload,
};

mod mesh_parts;
use mesh_parts::{member_of, service, workload, workload_at};

fn set(workload: Workload) -> Change {
    Change::SetWorkload(Arc::new(workload))
}

fn set_service(service: Service) -> Change {
    Change::SetService(Arc::new(service))
}

fn set_policy(namespace: &str, name: &str, scope: Scope) -> Change {
    Change::SetPolicy(Arc::new(Policy {
        key: key(namespace, name),
        scope,
        action: Action::Allow,
        rules: Box::new([]),
        dry_run: false,
    }))
}

fn key(namespace: &str, name: &str) -> PolicyKey {
    PolicyKey { namespace: namespace.into(), name: name.into() }
}

fn at(ip: &str) -> NetworkAddress {
    NetworkAddress::new("".into(), ip.parse().unwrap())
}

fn who(mesh: &Mesh, ip: &str) -> Option<String> {
    mesh.workload_at(&at(ip)).map(|w| w.uid.to_string())
}

fn what(mesh: &Mesh, dialled: &str) -> String {
    match mesh.destination(&"".into(), OriginalDst::new(dialled.parse::<SocketAddr>().unwrap())) {
        Destination::Service(s) => format!("service {}", s.key()),
        Destination::Workload(w) => format!("workload {}", w.uid),
        Destination::Unknown => "unknown".to_owned(),
    }
}

fn endpoints(mesh: &Mesh, service: &ServiceKey) -> Vec<String> {
    let mut list: Vec<_> = mesh
        .endpoints(service)
        .map(|set| set.as_slice().iter().map(|e| e.workload.uid.to_string()).collect())
        .unwrap_or_default();
    list.sort();
    list
}

#[test]
fn a_workload_that_moves_is_found_at_its_new_address_only() {
    let first = Mesh::default().apply([set(workload_at("a", &["10.0.0.1", "fd00::1"]))]);
    let next = first.apply([set(workload_at("a", &["10.0.0.2", "fd00::1"]))]);
    assert_eq!(who(&next, "10.0.0.1"), None);
    assert_eq!(who(&next, "10.0.0.2").as_deref(), Some("a"));
    assert_eq!(who(&next, "fd00::1").as_deref(), Some("a"));
    assert_eq!(who(&first, "10.0.0.1").as_deref(), Some("a"), "the snapshot before stays as it was");
    let gone = next.apply([Change::RemoveWorkload("a".into())]);
    assert_eq!((who(&gone, "10.0.0.2"), who(&gone, "fd00::1"), gone.workload_count()), (None, None, 0));
}

#[test]
fn of_several_workloads_at_one_address_the_first_by_uid_answers_whatever_came_first() {
    let mesh = Mesh::default().apply([
        set(workload_at("b", &["10.0.0.1"])),
        set(workload_at("c", &["10.0.0.1"])),
        set(workload_at("a", &["10.0.0.1"])),
        set(workload_at("a", &["10.0.0.1"]).with(|w| w.health = Health::Unhealthy)),
    ]);
    let found = mesh.workload_at(&at("10.0.0.1")).unwrap();
    assert_eq!((&*found.uid, found.health), ("a", Health::Unhealthy), "replaced in its place");
    let mesh = mesh.apply([Change::RemoveWorkload("a".into())]);
    assert_eq!(who(&mesh, "10.0.0.1").as_deref(), Some("b"));
    let mesh = mesh.apply([Change::RemoveWorkload("b".into())]);
    assert_eq!(who(&mesh, "10.0.0.1").as_deref(), Some("c"));
    let mesh = mesh.apply([Change::RemoveWorkload("c".into())]);
    assert_eq!(who(&mesh, "10.0.0.1"), None);
}

#[test]
fn an_address_that_is_the_nodes_identifies_no_workload() {
    let host = |mode| workload_at("a", &["10.0.0.1"]).with(|w| w.network_mode = mode);
    let mesh = Mesh::default().apply([set(host(NetworkMode::HostNetwork))]);
    assert_eq!(who(&mesh, "10.0.0.1"), None);
    let mesh = mesh.apply([set(host(NetworkMode::Standard))]);
    assert_eq!(who(&mesh, "10.0.0.1").as_deref(), Some("a"));
    let mesh = mesh.apply([set(host(NetworkMode::HostNetwork))]);
    assert_eq!(who(&mesh, "10.0.0.1"), None);
}

#[test]
fn networks_are_apart() {
    let other = workload_at("b", &["10.0.0.1"]).with(|w| w.network = "far".into());
    let mesh = Mesh::default().apply([set(workload_at("a", &["10.0.0.1"])), set(other)]);
    assert_eq!(who(&mesh, "10.0.0.1").as_deref(), Some("a"));
    let far = NetworkAddress::new("far".into(), "10.0.0.1".parse().unwrap());
    assert_eq!(&*mesh.workload_at(&far).unwrap().uid, "b");
}

#[test]
fn a_dialled_address_is_a_service_then_a_workload_then_a_range() {
    let mesh = Mesh::default().apply([
        set(workload_at("pod", &["10.1.0.5"])),
        set_service(service("a", "wide", &["10.1.0.0/16"])),
        set_service(service("a", "narrow", &["10.1.2.0/24"])),
        set_service(service("a", "exact", &["10.1.2.9/32", "fd00::9/128"])),
        set_service(service("a", "six", &["fd00::/64"])),
    ]);
    for (dialled, expected) in [
        ("10.1.2.9:80", "service a/exact"),
        ("[::ffff:10.1.2.9]:80", "service a/exact"),
        ("10.1.2.10:80", "service a/narrow"),
        ("10.1.9.9:80", "service a/wide"),
        ("10.1.0.5:80", "workload pod"),
        ("[::ffff:10.1.0.5]:80", "workload pod"),
        ("10.2.0.1:80", "unknown"),
        ("[fd00::9]:80", "service a/exact"),
        ("[fd00::10]:80", "service a/six"),
        ("[fd01::1]:80", "unknown"),
    ] {
        assert_eq!(what(&mesh, dialled), expected, "{dialled}");
    }
    let key = |hostname: &str| ServiceKey { namespace: "a".into(), hostname: hostname.into() };
    let mesh = mesh.apply([Change::RemoveService(key("narrow")), Change::RemoveService(key("exact"))]);
    assert_eq!(what(&mesh, "10.1.2.9:80"), "service a/wide");
    let mesh = mesh.apply([set_service(service("a", "wide", &["10.9.0.0/16"]))]);
    assert_eq!(
        (what(&mesh, "10.1.2.9:80"), what(&mesh, "10.9.0.1:80")),
        ("unknown".into(), "service a/wide".into())
    );
}

#[test]
fn which_of_several_services_answers_does_not_depend_on_their_order() {
    let entry = |namespace: &str| Service {
        source: ServiceSource::Static,
        ..service(namespace, "db.example", &["10.0.0.9/32", "10.3.0.0/16"])
    };
    let canonical = |namespace: &str| Service { canonical: true, ..entry(namespace) };
    let own = || service("z", "db.example", &["10.0.0.9/32"]);
    let (ab, ba) = (
        Mesh::default().apply([set_service(entry("a")), set_service(entry("b"))]),
        Mesh::default().apply([set_service(entry("b")), set_service(entry("a"))]),
    );
    for mesh in [&ab, &ba] {
        assert_eq!(what(mesh, "10.0.0.9:80"), "service a/db.example");
        assert_eq!(what(mesh, "10.3.0.9:80"), "service a/db.example");
        let names: Vec<_> = mesh.services_named("db.example").iter().map(|s| &*s.namespace).collect();
        assert_eq!(names, ["a", "b"]);
    }
    let replaced = ab.apply([set_service(entry("a"))]);
    assert_eq!(what(&replaced, "10.0.0.9:80"), "service a/db.example", "a replacement keeps its place");
    let mesh = ab.apply([set_service(canonical("b"))]);
    assert_eq!(what(&mesh, "10.0.0.9:80"), "service b/db.example");
    let mesh = mesh.apply([set_service(own())]);
    assert_eq!(what(&mesh, "10.0.0.9:80"), "service z/db.example", "no entry takes a Service's address");
    assert_eq!(mesh.service_at(&at("10.0.0.9")).unwrap().source, ServiceSource::Kubernetes);
    let mesh = mesh.apply([Change::RemoveService(own().key())]);
    assert_eq!(what(&mesh, "10.0.0.9:80"), "service b/db.example");
}

#[test]
fn host_names_follow_their_services() {
    let mesh =
        Mesh::default().apply([set_service(service("a", "x", &[])), set_service(service("b", "x", &[]))]);
    assert_eq!(mesh.services_named("x").len(), 2);
    let mesh = mesh.apply([set_service(service("a", "x", &["10.0.0.1/32"]))]);
    assert_eq!(mesh.services_named("x").len(), 2, "replaced, not doubled");
    let mesh = mesh.apply([Change::RemoveService(service("a", "x", &[]).key())]);
    assert_eq!(mesh.services_named("x").len(), 1);
    assert!(mesh.services_named("y").is_empty());
}

#[test]
fn endpoint_sets_follow_memberships() {
    let (x, y) = (service("a", "x", &[]).key(), service("a", "y", &[]).key());
    let member = |uid: &str, of: &[&ServiceKey]| {
        workload(uid).with(|w| w.services = of.iter().map(|s| member_of(s, 80, 8080)).collect())
    };
    let mesh = Mesh::default().apply([
        set(member("1", &[&x])),
        set(member("2", &[&x, &y])),
        set(member("3", &[&x])),
    ]);
    assert_eq!(
        (endpoints(&mesh, &x), endpoints(&mesh, &y)),
        (vec!["1".into(), "2".into(), "3".into()], vec!["2".to_string()])
    );

    // The first leaves: the last moves into its place and must still be found when it changes and leaves.
    let mesh = mesh.apply([set(member("1", &[&y]))]);
    let mesh = mesh.apply([set(member("3", &[&x]).with(|w| w.health = Health::Unhealthy))]);
    assert_eq!(
        (endpoints(&mesh, &x), endpoints(&mesh, &y)),
        (vec!["2".to_string(), "3".into()], vec!["1".into(), "2".into()])
    );
    let all = mesh.endpoints(&x).unwrap();
    let three = all.as_slice().iter().find(|e| &*e.workload.uid == "3").unwrap();
    assert_eq!(three.workload.health, Health::Unhealthy);
    assert_eq!((all.target_port(three, 80), all.target_port(three, 81)), (Some(8080), None));

    let before = mesh.endpoints(&y).unwrap().generation();
    let mesh = mesh.apply([Change::RemoveWorkload("3".into())]);
    assert_eq!(endpoints(&mesh, &x), ["2"]);
    assert_eq!(mesh.endpoints(&x).unwrap().generation(), mesh.generation());
    assert_eq!(mesh.endpoints(&y).unwrap().generation(), before, "the other set did not change");
    let mesh = mesh.apply([Change::RemoveWorkload("2".into())]);
    assert!(mesh.endpoints(&x).is_none());
}

#[test]
fn a_changed_port_mapping_replaces_the_endpoint() {
    let x = service("a", "x", &[]).key();
    let on = |port| workload("1").with(|w| w.services = [member_of(&x, 80, port)].into());
    let mesh = Mesh::default().apply([set(on(8080))]).apply([set(on(9090))]);
    let set = mesh.endpoints(&x).unwrap();
    assert_eq!((set.as_slice().len(), set.target_port(&set.as_slice()[0], 80)), (1, Some(9090)));
    assert_eq!(set.generation(), mesh.generation());
}

#[test]
fn policies_are_found_by_their_scope() {
    let pod = workload("1").with(|w| {
        w.namespace = "a".into();
        w.policies = [key("a", "one"), key("a", "two")].into();
    });
    let mesh = Mesh::default().apply([
        set_policy("root", "all", Scope::Global),
        set_policy("a", "ns", Scope::Namespace),
        set_policy("b", "ns", Scope::Namespace),
        set_policy("a", "one", Scope::WorkloadSelector),
        set_policy("a", "three", Scope::WorkloadSelector),
    ]);
    let names = |mesh: &Mesh| -> Vec<String> {
        mesh.policies_for(&pod)
            .into_iter()
            .map(|p| p.map_or_else(|k| format!("unknown {k}"), |p| p.key.to_string()))
            .collect()
    };
    assert_eq!(names(&mesh), ["root/all", "a/ns", "a/one", "unknown a/two"]);
    let mesh = mesh.apply([
        set_policy("a", "two", Scope::WorkloadSelector),
        set_policy("root", "all", Scope::WorkloadSelector),
        Change::RemovePolicy(key("a", "ns")),
        Change::RemovePolicy(key("a", "one")),
    ]);
    assert_eq!(names(&mesh), ["unknown a/one", "a/two"], "a policy whose scope changes leaves the old one");
    assert_eq!(mesh.policies().count(), 4);
}

/// Connections that live are decided again when this moves, so it must move for all that decides and, because it
/// costs a look at every connection, for nothing else.
#[test]
fn the_policy_generation_moves_with_what_decides_and_with_nothing_else() {
    let pod = || workload_at("1", &["10.0.0.1"]);
    let start = Mesh::default().apply([
        set(pod()),
        set_policy("a", "p", Scope::Namespace),
        set_service(service("a", "x", &["10.0.0.9/32"])),
    ]);
    let moves = |change: Change| {
        let next = start.apply([change]);
        assert!(next.generation() == start.generation() + 1);
        next.policy_generation() == next.generation()
    };
    assert!(moves(set_policy("a", "p", Scope::Namespace)));
    assert!(moves(set_policy("b", "new", Scope::WorkloadSelector)));
    assert!(moves(Change::RemovePolicy(key("a", "p"))));
    assert!(moves(Change::RemoveWorkload("1".into())));
    assert!(moves(Change::SetSettings(
        Settings { outbound: OutboundMode::RegistryOnly, ..Settings::default() }.into()
    )));
    assert!(moves(set(pod().with(|w| w.service_account = "other".into()))));
    assert!(moves(set(pod().with(|w| w.namespace = "other".into()))));
    assert!(moves(set(pod().with(|w| w.trust_domain = "other".parse().unwrap()))));
    assert!(moves(set(pod().with(|w| w.policies = [key("a", "p")].into()))));
    assert!(moves(set(workload_at("1", &["10.0.0.2"]))));
    assert!(moves(set(pod().with(|w| w.network = "far".into()))));
    assert!(moves(set(pod().with(|w| w.network_mode = NetworkMode::HostNetwork))));
    assert!(moves(set(pod().with(|w| w.tunnel = model::TunnelProtocol::None))));

    assert!(!moves(set(pod())));
    assert!(!moves(set(pod().with(|w| w.health = Health::Unhealthy))));
    assert!(!moves(set(
        pod().with(|w| w.services = [member_of(&service("a", "x", &[]).key(), 80, 80)].into())
    )));
    assert!(!moves(set(workload_at("2", &["10.0.0.2"]))));
    assert!(!moves(set_service(service("b", "y", &[]))));
    assert!(!moves(Change::RemovePolicy(key("a", "never there"))));
    assert!(!moves(Change::RemoveWorkload("never there".into())));
    let later = start.apply([set_policy("a", "p", Scope::Namespace)]).apply([set(pod())]);
    assert_eq!(later.policy_generation() + 1, later.generation());
}

#[test]
fn a_snapshot_shares_what_did_not_change() {
    let many =
        (0..2000).map(|i| set(workload_at(&format!("w{i}"), &[&format!("10.0.{}.{}", i / 250, i % 250)])));
    let mesh = Mesh::default().apply(many);
    let next = mesh.apply([Change::RemoveWorkload("w7".into())]);
    assert_eq!((mesh.workload_count(), next.workload_count()), (2000, 1999));
    for i in (0..2000).filter(|i| *i != 7) {
        let uid = format!("w{i}");
        assert!(Arc::ptr_eq(mesh.workload(&uid).unwrap(), next.workload(&uid).unwrap()));
    }
}
