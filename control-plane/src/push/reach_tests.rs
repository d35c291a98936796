use model::{GatewayAddress, LoadBalancing, Locality, Profile, ServiceMembership, TunnelProtocol};

use super::*;

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "shop".into(), hostname: format!("{name}.shop.svc.cluster.local").into() }
}

fn workload(name: &str, address: &str, services: &[&str]) -> Workload {
    let member = |name: &&str| ServiceMembership { service: key(name), ports: [].into() };
    let profile = Profile {
        namespace: "shop".into(),
        tunnel: TunnelProtocol::Hbone,
        services: services.iter().map(member).collect(),
        ..Profile::default()
    };
    Workload {
        addresses: [address.parse().unwrap()].into(),
        locality: Arc::new(Locality { node: "n".into(), ..Locality::default() }),
        ..Workload::new(name.into(), name, Arc::new(profile))
    }
}

fn labelled(workload: Workload, label: &str, value: &str) -> Workload {
    workload.with(|w| w.labels = [(label.into(), value.into())].into())
}

fn service(name: &str, range: &str) -> Service {
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: key(name).hostname,
        vips: [Vip { network: "".into(), range: range.parse().unwrap() }].into(),
        ports: Box::default(),
        subject_alt_names: Box::default(),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        ip_families: Default::default(),
        session_affinity: None,
        source: Default::default(),
        canonical: true,
    }
}

fn wishes(labels: &[(&str, &[&str])], providers: &[&str]) -> Wishes {
    let of = |(waypoint, labels): &(&str, &[&str])| {
        (Arc::from(*waypoint), labels.iter().map(|label| Arc::from(*label)).collect())
    };
    let providers = providers.iter().map(|name| key(name).hostname).collect();
    Wishes { labels: labels.iter().map(of).collect(), providers }
}

/// What follows: `+` or `-`, and the name.
fn settled(reach: &mut Reach) -> Vec<String> {
    let mut updates = Vec::new();
    reach.settle(|workload| Some(Bytes::copy_from_slice(workload.name().as_bytes())), &mut updates);
    said(&updates)
}

fn said(updates: &[Update]) -> Vec<String> {
    let mut said: Vec<String> = updates
        .iter()
        .map(|update| match update {
            Update::Set(resource) => {
                let scope = resource.scope.as_deref().unwrap();
                assert!(resource.plain.is_none() && resource.name.starts_with(&format!("{scope}/")));
                format!("+{}", resource.name)
            }
            Update::Remove { name, .. } => format!("-{name}"),
        })
        .collect();
    said.sort();
    said
}

fn set(reach: &mut Reach, workload: Workload) {
    reach.set(&Arc::new(workload));
}

#[test]
fn a_waypoint_is_sent_the_endpoints_of_what_it_sends_to() {
    let mut reach = Reach::default();
    set(&mut reach, workload("a", "10.0.0.1", &["cart"]));
    set(&mut reach, workload("b", "10.0.0.2", &["cart", "pay"]));
    set(&mut reach, workload("c", "10.0.0.3", &["other"]));
    assert_eq!(settled(&mut reach), [""; 0], "there is no waypoint");
    reach.want(&"shop/w".into(), &key("cart"), true);
    assert_eq!(settled(&mut reach), ["+shop/w/a", "+shop/w/b"]);
    reach.want(&"shop/x".into(), &key("pay"), true);
    reach.want(&"shop/w".into(), &key("pay"), true);
    assert_eq!(settled(&mut reach), ["+shop/x/b"], "what one has is not sent again");
    reach.want(&"shop/w".into(), &key("cart"), false);
    assert_eq!(settled(&mut reach), ["-shop/w/a"], "the other is still behind pay");

    set(&mut reach, workload("c", "10.0.0.3", &["pay"]));
    assert_eq!(settled(&mut reach), ["+shop/w/c", "+shop/x/c"]);
    set(&mut reach, workload("b", "10.0.0.2", &[]));
    assert_eq!(settled(&mut reach), ["-shop/w/b", "-shop/x/b"]);
    let mut updates = Vec::new();
    reach.remove(&"c".into(), &mut updates);
    assert_eq!(said(&updates), ["-shop/w/c", "-shop/x/c"]);
    assert_eq!(settled(&mut reach), [""; 0]);
    assert!(reach.by_address.len() == 2 && reach.by_service.len() == 1, "nothing is left of what is gone");
}

#[test]
fn who_shares_an_address_with_an_endpoint_comes_and_goes_with_it() {
    let mut reach = Reach::default();
    set(&mut reach, workload("a", "10.0.0.1", &["cart"]));
    set(&mut reach, workload("shares", "10.0.0.1", &[]));
    assert_eq!(settled(&mut reach), [""; 0]);
    reach.want(&"shop/w".into(), &key("cart"), true);
    assert_eq!(settled(&mut reach), ["+shop/w/a", "+shop/w/shares"]);
    reach.want(&"shop/w".into(), &key("cart"), false);
    assert_eq!(settled(&mut reach), ["-shop/w/a", "-shop/w/shares"]);
}

#[test]
fn what_a_decision_may_ask_for_is_sent() {
    let mut reach = Reach::default();
    let target = GatewayTarget::Service(key("w"));
    let bound = GatewayAddress { target, hbone_mtls_port: 15008 };
    set(&mut reach, workload("bound", "10.0.0.1", &[]).with(|w| w.waypoint = Some(Box::new(bound))));
    set(&mut reach, labelled(workload("own", "10.0.0.2", &[]), GATEWAY, "w"));
    set(&mut reach, labelled(workload("client", "10.0.0.3", &[]), "app", "shop"));
    set(&mut reach, workload("decider", "10.0.0.4", &["authz"]));
    set(&mut reach, workload("near", "10.1.0.5", &[]));
    set(&mut reach, workload("shared", "10.0.0.1", &[]));
    set(&mut reach, workload("nobody", "10.0.0.9", &[]));
    assert_eq!(settled(&mut reach), ["+shop/w/bound", "+shop/w/own", "+shop/w/shared"]);
    reach.wish(wishes(&[("shop/w", &["app"]), ("shop/x", &[])], &["authz"]));
    assert_eq!(settled(&mut reach), ["+shop/w/client", "+shop/w/decider", "+shop/x/decider"]);

    let outside = service("outside", "10.1.0.0/16");
    reach.want(&"shop/w".into(), &outside.key(), true);
    assert_eq!(settled(&mut reach), [""; 0]);
    reach.service(&outside.key(), Some(&outside));
    assert_eq!(settled(&mut reach), ["+shop/w/near"], "its address is its own, and not one of the range");
    reach.service(&outside.key(), None);
    assert_eq!(settled(&mut reach), ["-shop/w/near"]);

    // Whose an address is, is decided among all that have it.
    set(&mut reach, workload("bound", "10.0.0.1", &[]));
    assert_eq!(settled(&mut reach), ["-shop/w/bound", "-shop/w/shared"]);
    reach.wish(wishes(&[("shop/w", &[])], &[]));
    assert_eq!(settled(&mut reach), ["-shop/w/client", "-shop/w/decider", "-shop/x/decider"]);
}

#[test]
fn one_pods_change_costs_a_look_and_what_it_concerns() {
    let mut reach = Reach::default();
    for waypoint in 0..50 {
        reach.want(&format!("shop/w{waypoint}").into(), &key(&format!("s{waypoint}")), true);
    }
    let of = |index: u32, service: u32| {
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + index);
        workload(&format!("p{index}"), &address.to_string(), &[&format!("s{service}")])
    };
    (0..10_000).for_each(|index| set(&mut reach, of(index, index % 100)));
    assert_eq!(settled(&mut reach).len(), 5_000, "half of them are behind no waypoint");
    for (change, told) in [(of(7, 7), &["+shop/w7/p7"][..]), (of(77, 77), &[])] {
        let looks = reach.looks();
        set(&mut reach, change);
        assert_eq!(settled(&mut reach), told);
        assert_eq!(reach.looks() - looks, 1);
    }
}

#[test]
fn a_workload_that_cant_be_told_is_taken_back() {
    let mut reach = Reach::default();
    reach.want(&"shop/w".into(), &key("cart"), true);
    set(&mut reach, workload("a", "10.0.0.1", &["cart"]));
    assert_eq!(settled(&mut reach), ["+shop/w/a"]);
    set(&mut reach, workload("a", "10.0.0.1", &["cart"]));
    let mut updates = Vec::new();
    reach.settle(|_| None, &mut updates);
    assert_eq!(said(&updates), ["-shop/w/a"]);
}
