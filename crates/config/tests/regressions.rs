//! Faults that were found in review, each by its name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::net::IpAddr;

use config::compile::{EnrolmentChange, Options};
use config::diagnostic::Code;
use config::repository::{Content, Repository};
use model::{Connection, Mesh};

/// A repository and its mesh, changed file by file.
struct World {
    repository: Repository,
    mesh: Mesh,
}

impl World {
    fn new() -> Self {
        Self { repository: Repository::new(Options::default()), mesh: Mesh::default() }
    }

    fn of(text: &str) -> Self {
        let mut world = Self::new();
        world.set("all.yaml", text);
        world
    }

    fn set(&mut self, file: &str, text: &str) {
        self.change(&[(file, Some(text))]);
    }

    /// Several files in one batch.
    fn change(&mut self, files: &[(&str, Option<&str>)]) {
        for (file, text) in files {
            let content = text.map_or(Content::Gone, |text| Content::Bytes(text.as_bytes()));
            self.repository.stage(&(*file).into(), content);
        }
        self.mesh = self.mesh.apply(self.repository.commit().changes);
    }

    /// The codes of all that is said.
    fn said(&self) -> Vec<String> {
        let mut said: Vec<_> = self.repository.diagnostics().iter().map(|d| d.code.to_string()).collect();
        said.sort();
        said
    }

    /// Whether connections to a service are refused for want of a waypoint.
    fn is_closed(&self, host: &str) -> bool {
        self.mesh.services_named(host)[0].waypoint.is_some()
    }

    /// Whether a pod, `namespace/name`, lets in a connection from `namespace/account`.
    fn allows(&self, to: &str, port: u16, from: &str) -> bool {
        let (namespace, name) = to.split_once('/').unwrap();
        let named = |w: &&std::sync::Arc<model::Workload>| &*w.namespace == namespace && w.name() == name;
        let workload = self.mesh.workloads().find(named).unwrap_or_else(|| panic!("no workload {to}"));
        let (ns, account) = from.split_once('/').unwrap();
        let identity = format!("spiffe://cluster.local/ns/{ns}/sa/{account}").parse().unwrap();
        let peer: IpAddr = "10.9.9.9".parse().unwrap();
        let connection = Connection::new(Some(identity), peer, (workload.addresses[0], port).into());
        self.mesh.authorize(workload, &connection).outcome.is_ok()
    }
}

/// The objects as documents of one file.
fn file(objects: &[&str]) -> String {
    objects.join("---\n")
}

fn namespace(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/dataplane-mode: ambient}}}}\n"
    )
}

fn pod(namespace: &str, name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nstatus: \
         {{podIP: {ip}}}\n"
    )
}

fn policy(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: \
         {spec}\n"
    )
}

#[test]
fn a_null_in_a_policy_is_not_taken_for_a_field_that_is_absent() {
    for spec in [
        "{rules: [{from: , to: [{operation: {ports: ['8080']}}]}]}",
        "{rules: [{from: [{source: {namespaces: ['*'], principals: null}}]}]}",
        "{rules: [{to: [{operation: {ports: ['80'], methods: }}]}]}",
        "{rules: [{when: [{key: source.ip, values: [10.0.0.0/8], notValues: }]}]}",
        "{rules: [{when: , from: [{source: {namespaces: [a]}}]}]}",
        "{selector: {matchLabels: }, rules: [{}]}",
        "{selector: , rules: [{}]}",
        "{action: , rules: [{}]}",
        "{targetRefs: , rules: [{}]}",
        "{rules: }",
    ] {
        let mut world = World::of(&file(&[
            &namespace("shop"),
            &pod("shop", "cart", "10.0.0.1"),
            &policy("AuthorizationPolicy", "shop", "closed", "{}"),
        ]));
        world.set("new.yaml", &policy("AuthorizationPolicy", "shop", "new", spec));
        assert!(world.said().contains(&"invalid-value".to_owned()), "{spec}: {:?}", world.said());
        assert!(!world.allows("shop/cart", 8080, "evil/mal"), "{spec}");
    }
    let strict = "{mtls: {mode: STRICT}}";
    for spec in [
        "{mtls: }",
        "{mtls: {mode: }}",
        "{selector: , mtls: {mode: PERMISSIVE}}",
        "{selector: {matchLabels: }, mtls: {mode: PERMISSIVE}}",
        "{selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}, portLevelMtls: }",
    ] {
        let mut world = World::of(&policy("PeerAuthentication", "shop", "p", strict));
        world.set("all.yaml", &policy("PeerAuthentication", "shop", "p", spec));
        assert_eq!(world.said(), ["invalid-value", "last-good-version"], "{spec}");
    }
    let settings = "apiVersion: mesh.istio.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\nspec: ";
    let world = World::of(&format!("{settings}{{outboundTrafficPolicy: }}\n"));
    assert_eq!(world.said(), ["invalid-value"]);
}

/// A ServiceEntry of the namespace `shop`, made in a year.
fn entry_of(name: &str, year: u16, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop, \
         creationTimestamp: '{year}-01-01T00:00:00Z'}}\nspec: {spec}\n"
    )
}

#[test]
fn policies_of_selected_pods_follow_who_owns_a_host() {
    let spec = "{hosts: [h.example.com], ports: [{number: 80, name: http}], resolution: STATIC, workloadSelector: \
                {labels: {app: cart}}}";
    let older = entry_of("a", 2020, spec);
    let deny = policy(
        "AuthorizationPolicy",
        "shop",
        "deny",
        "{action: DENY, rules: [{}], targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: a}]}",
    );
    let mut world = World::of(&file(&[
        &namespace("shop"),
        &pod("shop", "cart", "10.0.0.1"),
        &entry_of("b", 2021, spec),
        &deny,
    ]));
    assert!(world.allows("shop/cart", 80, "shop/web"), "the policy's target defines nothing yet");
    world.set("a.yaml", &older);
    assert!(!world.allows("shop/cart", 80, "shop/web"), "the older entry has the host now");
    world.change(&[("a.yaml", None)]);
    assert!(world.allows("shop/cart", 80, "shop/web"), "the younger one has it again");
}

#[test]
fn a_pod_without_its_address_stays_captured_and_gives_way_to_pods_in_force_only() {
    let options = Options { node: Some("node".into()), ..Options::default() };
    let mut repository = Repository::new(options);
    let pod = |name: &str, ips: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, annotations: {{culvert.dev/netns: \
             /run/netns/{name}}}}}\nspec: {{nodeName: node}}\nstatus: {{podIPs: [{ips}]}}\n"
        )
    };
    let text = file(&[
        &namespace("shop"),
        &pod("cart", "{ip: 10.0.0.1}"),
        &pod("partial", "{ip: 10.0.0.1}, {ip: 'fd00::7'}"),
        &pod("third", "{ip: 'fd00::7'}"),
    ]);
    let outcome = repository.apply(&"all.yaml".into(), Content::Bytes(text.as_bytes()));
    let mesh = Mesh::default().apply(outcome.changes);
    let mut names: Vec<_> = mesh.workloads().map(|w| w.name().to_owned()).collect();
    names.sort();
    assert_eq!(names, ["cart", "third"], "the one between them is not in force, so it takes no address");
    let captured = |changes: &[EnrolmentChange]| changes.iter().all(|c| matches!(c, EnrolmentChange::Set(_)));
    assert_eq!(outcome.enrolments.len(), 3, "nothing is left uncaptured");
    assert!(captured(&outcome.enrolments));
    // One that was captured stays so when another takes its address, whoever that is.
    let text = text.replace("third", "fourth");
    let outcome = repository.apply(&"more.yaml".into(), Content::Bytes(text.as_bytes()));
    assert!(captured(&outcome.enrolments), "{:?}", outcome.enrolments);
}

fn service(namespace: &str, name: &str, ip: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{clusterIP: {ip}, {more} \
         ports: [{{port: 80, name: http}}]}}\n"
    )
}

fn slice(namespace: &str, service: &str, ip: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}, namespace: {namespace}, labels: \
         {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{name: http, port: 80}}]\nendpoints: \
         [{{addresses: [{ip}]}}]\n"
    )
}

fn deny(namespace: &str, target: &str, name: &str) -> String {
    let group = match target {
        "Service" => "''",
        "ServiceEntry" => "networking.istio.io",
        _ => "gateway.networking.k8s.io",
    };
    let spec = format!(
        "{{action: DENY, rules: [{{}}], targetRefs: [{{group: {group}, kind: {target}, name: {name}}}]}}"
    );
    policy("AuthorizationPolicy", namespace, &format!("deny-{name}"), &spec)
}

fn entry(namespace: &str, name: &str, labels: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: {namespace}, labels: \
         {{{labels}}}}}\nspec: {{hosts: [{name}.example.com], location: MESH_INTERNAL, ports: [{{number: 80, name: \
         http}}], {spec}}}\n"
    )
}

#[test]
fn policies_of_one_namespace_refuse_nothing_to_pods_of_another() {
    let shop = [namespace("shop"), namespace("evil"), pod("shop", "cart", "10.0.0.1")];
    let listed = "resolution: STATIC, endpoints: [{address: 10.0.0.1}]";
    let traps = [
        [entry("evil", "trap", "", listed), deny("evil", "ServiceEntry", "trap")].to_vec(),
        [
            service("evil", "trap", "10.1.0.1", ""),
            slice("evil", "trap", "10.0.0.1"),
            deny("evil", "Service", "trap"),
        ]
        .to_vec(),
        [entry("evil", "trap", "istio.io/use-waypoint: wp", listed), deny("evil", "Gateway", "wp")].to_vec(),
    ];
    for trap in traps {
        let all: Vec<&str> = shop.iter().chain(&trap).map(String::as_str).collect();
        let world = World::of(&file(&all));
        assert!(world.allows("shop/cart", 80, "shop/web"), "{trap:?}");
        let host = if trap.len() == 3 { "trap.evil.svc.cluster.local" } else { "trap.example.com" };
        assert!(world.is_closed(host), "the policy holds for what it is for: {trap:?}");
    }
}

#[test]
fn a_services_waypoint_is_that_of_its_own_namespace() {
    let bound = |name: &str, waypoint: &str| {
        namespace(name).replace("ambient}", &format!("ambient, istio.io/use-waypoint: {waypoint}}}"))
    };
    let world = World::of(&file(&[
        &bound("front", "gate"),
        &bound("shop", "inner"),
        &pod("shop", "cart", "10.0.0.1"),
        &entry("front", "door", "", "resolution: STATIC, endpoints: [{address: 10.0.0.1}]"),
        &entry(
            "front",
            "open",
            "istio.io/use-waypoint: none",
            "resolution: STATIC, endpoints: [{address: 10.0.0.1}]",
        ),
        &deny("front", "Gateway", "gate"),
        &deny("shop", "Gateway", "other"),
    ]));
    assert!(world.is_closed("door.example.com"), "nothing in shop enforces what front says of its waypoint");
    assert!(!world.is_closed("open.example.com"));
    assert!(world.allows("shop/cart", 80, "shop/web"));
}

#[test]
fn a_policy_for_a_service_with_endpoints_outside_the_mesh_closes_it() {
    let outside = "resolution: STATIC, endpoints: [{address: 192.0.2.10}]";
    let mut world = World::of(&file(&[
        &namespace("shop"),
        &entry("shop", "db", "", outside),
        &entry("shop", "range", "", "resolution: NONE, addresses: [192.0.2.0/24]"),
        &service("shop", "legacy", "10.1.0.1", ""),
        &slice("shop", "legacy", "192.0.2.77"),
        &service("shop", "cart", "10.1.0.2", "selector: {app: cart},"),
        &pod("shop", "cart", "10.0.0.1"),
        &deny("shop", "ServiceEntry", "db"),
        &deny("shop", "ServiceEntry", "range"),
        &deny("shop", "Service", "legacy"),
        &deny("shop", "Service", "cart"),
    ]));
    for host in ["db.example.com", "range.example.com", "legacy.shop.svc.cluster.local"] {
        assert!(world.is_closed(host), "{host}");
    }
    let cart = "cart.shop.svc.cluster.local";
    assert!(!world.is_closed(cart) && !world.allows("shop/cart", 80, "shop/web"), "its pod enforces it");
    let left =
        pod("shop", "cart2", "10.0.0.2").replace("app: cart2", "app: cart, istio.io/dataplane-mode: none");
    world.set("left.yaml", &left);
    assert!(world.is_closed(cart), "one of its pods is outside the mesh");
    let said: Vec<String> = world.repository.review().iter().map(|d| d.code.to_string()).collect();
    assert_eq!(said.iter().filter(|code| *code == "outside-the-mesh").count(), 4, "{said:?}");
    world.change(&[("left.yaml", None)]);
    assert!(!world.is_closed(cart));
}

#[test]
fn of_what_a_waypoint_stands_before_nothing_is_said_to_be_refused() {
    let policies = [deny("shop", "Service", "web"), deny("shop", "ServiceEntry", "outside")];
    let slice = slice("shop", "web", "192.0.2.77");
    let world = World::of(&file(&[TWO_BEHIND_A_WAYPOINT, &slice, &policies[0], &policies[1]]));
    let said: Vec<String> = world.repository.review().iter().map(ToString::to_string).collect();
    assert!(said.iter().all(|one| !one.contains("outside-the-mesh")), "{said:?}");
}

#[test]
fn a_service_that_counts_and_is_not_there_is_said() {
    let limit = |service: &str, on_failure: &str, first: &str| {
        format!(
            "apiVersion: culvert.dev/v1alpha1
kind: RateLimit
metadata: {{name: limits, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  global: {{service: {service}, domain: shop, onFailure: {on_failure}}}
  limits: [{first}{{name: all, by: [{{type: Path}}], global: {{}}}}]
"
        )
    };
    let only_tried =
        |service: &str| limit(service, "Deny", "").replace("name: all,", "name: all, dryRun: true,");
    let tried_first = "{name: tried, by: [{type: Path}], dryRun: true, global: {}}, ";
    let said = |limit: &str| {
        let world = World::of(&file(&[TWO_BEHIND_A_WAYPOINT, limit]));
        let said = world.repository.review().into_iter().filter(|d| d.code == Code::NamesNothing);
        said.map(|d| d.message).collect::<Vec<_>>()
    };
    assert_eq!(said(&limit("web.shop.svc.cluster.local, port: 80", "Deny", "")), [""; 0]);
    let gone =
        "there is no service counts, which spec.global names: requests that are to be counted are refused";
    assert_eq!(said(&limit("counts, port: 80", "Deny", "")), [gone]);
    assert_eq!(said(&limit("counts, port: 80", "Deny", tried_first)), [gone]);
    assert_eq!(said(&only_tried("counts, port: 80")), [gone.replace("are refused", "pass uncounted")]);
    let port = "the service outside.example.com has no port 81, which spec.global names: requests that are to be counted pass uncounted";
    assert_eq!(said(&limit("outside.example.com, port: 81", "Allow", "")), [port]);
    // What is wrong with the service is said, and not that there is none.
    let mut repository = Repository::new(Options::default());
    let text = file(&[TWO_BEHIND_A_WAYPOINT, &limit("counts, port: 0", "Deny", "")]);
    repository.stage(&"all.yaml".into(), Content::Bytes(text.as_bytes()));
    repository.commit();
    let errors = repository.diagnostics().into_iter().filter(|d| d.code != Code::FailsClosed);
    let errors: Vec<_> = errors.map(|d| d.message).collect();
    assert!(matches!(&errors[..], [one] if one.contains("port")), "{errors:?}");
}

#[test]
fn an_external_endpoint_is_what_its_own_namespace_says() {
    let db = "resolution: STATIC, endpoints: [{address: 192.0.2.10}, {address: 192.0.2.11}]";
    let take =
        "address: 192.0.2.10, weight: 9, serviceAccount: mal, labels: {networking.istio.io/tunnel: http}";
    let machine = |namespace: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: \
             {namespace}}}\nspec: {{{spec}}}\n"
        )
    };
    for trap in [
        entry("evil", "trap", "", &format!("resolution: STATIC, endpoints: [{{{take}}}]")),
        machine("evil", "trap", take),
    ] {
        let mut world = World::of(&entry("shop", "db", "", db));
        let endpoints = |world: &World| {
            let service = world.mesh.services_named("db.example.com")[0].key();
            let set = world.mesh.endpoints(&service).unwrap();
            let mut list: Vec<_> = set.as_slice().iter().map(|e| format!("{:?}", e.workload)).collect();
            list.sort();
            list
        };
        let before = endpoints(&world);
        assert_eq!(before.len(), 2);
        world.set("trap.yaml", &trap);
        assert_eq!(endpoints(&world), before, "{trap}");
        // One of its own namespace is what is there.
        world.set("own.yaml", &machine("shop", "vm", "address: 192.0.2.10, weight: 3"));
        let now = endpoints(&world);
        assert!(now.len() == 2 && now.iter().any(|w| w.contains("capacity: 3")), "{now:?}");
    }
}

#[test]
fn a_time_with_a_huge_offset_is_no_time_and_no_overflow() {
    let made = |kind: &str, group: &str, spec: &str| {
        format!(
            "apiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: x, namespace: shop, creationTimestamp: \
             '2026-11-20T10:00:00+9223372036854775807:00'}}\nspec: {spec}\n"
        )
    };
    let strict = made("PeerAuthentication", "security", "{mtls: {mode: STRICT}}");
    let entry = made(
        "ServiceEntry",
        "networking",
        "{hosts: [a.b], ports: [{number: 80, name: http}], resolution: DNS}",
    );
    let world = World::of(&file(&[&namespace("shop"), &pod("shop", "cart", "10.0.0.1"), &strict, &entry]));
    assert_eq!(world.mesh.services().count(), 1);
    let anybody = Connection::new(
        None,
        "10.9.9.9".parse().unwrap(),
        ("10.0.0.1".parse::<IpAddr>().unwrap(), 80).into(),
    );
    let cart = world.mesh.workloads().find(|w| w.name() == "cart").unwrap();
    assert!(world.mesh.authorize(cart, &anybody).outcome.is_err(), "the policy is in force");
}

#[test]
fn a_policy_that_moves_to_another_file_and_breaks_stays_in_force() {
    let deny = policy("AuthorizationPolicy", "shop", "deny", "{action: DENY, rules: [{}]}");
    let misspelt = deny.replace("rules", "rulez");
    let malformed = format!("{deny}  - oops: [\n");
    let nameless = deny.replace("name: deny", "nmae: deny");
    // By the order of the files the old one is read before or after the new one.
    for (old, new) in [("m.yaml", "z.yaml"), ("m.yaml", "a.yaml")] {
        for broken in [&misspelt, &malformed, &nameless] {
            for gone in [None, Some("# nothing left\n")] {
                let mut world = World::of(&file(&[&namespace("shop"), &pod("shop", "cart", "10.0.0.1")]));
                world.set(old, &deny);
                let mut batch = [(old, gone), (new, Some(broken.as_str()))];
                batch.sort_unstable();
                world.change(&batch);
                assert!(!world.allows("shop/cart", 80, "shop/web"), "{broken}");
                let said = world.said();
                assert!(said.contains(&"last-good-version".to_owned()), "{said:?}");
                // It stays so, whatever else changes, until it is corrected or removed.
                world.set("other.yaml", &pod("shop", "other", "10.0.0.2"));
                assert!(!world.allows("shop/cart", 80, "shop/web"));
                let mut corrected = world.mesh.policies().count();
                world.set(new, &deny);
                assert_eq!((world.said(), world.mesh.policies().count()), (vec![], 1));
                world.set(new, broken);
                corrected += world.mesh.policies().count();
                world.change(&[(new, None)]);
                assert!(world.allows("shop/cart", 80, "shop/web") && corrected == 2);
                assert_eq!(world.said(), [""; 0]);
            }
        }
    }
}

#[test]
fn what_stays_in_force_for_a_file_that_cannot_be_read_gives_way_to_the_object_itself() {
    let deny = policy("AuthorizationPolicy", "shop", "deny", "{action: DENY, rules: [{}]}");
    let mut world = World::of(&file(&[&namespace("shop"), &pod("shop", "cart", "10.0.0.1")]));
    world.set("a.yaml", &deny);
    world.change(&[("a.yaml", None), ("b.yaml", Some("x: [\n"))]);
    assert!(!world.allows("shop/cart", 80, "shop/web"));
    world.set("c.yaml", &deny.replace("DENY", "ALLOW"));
    assert!(world.allows("shop/cart", 80, "shop/web"), "the policy as it is now");
    assert_eq!(world.said(), ["malformed-yaml"]);
    world.change(&[("c.yaml", None)]);
    assert_eq!(world.mesh.policies().count(), 0);
    // One with errors that was beside it keeps it, too.
    let mut world = World::of(&file(&[&namespace("shop"), &pod("shop", "cart", "10.0.0.1")]));
    world.set("a.yaml", &deny);
    world.set("b.yaml", &deny.replace("rules", "rulez"));
    world.change(&[("a.yaml", None)]);
    assert!(!world.allows("shop/cart", 80, "shop/web"));
    assert_eq!(world.said(), ["last-good-version", "missing-field", "unknown-field"]);
}

#[test]
fn an_object_whose_group_is_misspelt_is_not_ignored() {
    let deny = policy("AuthorizationPolicy", "shop", "deny", "{action: DENY, rules: [{}]}");
    for group in ["securty.istio.io/v1", "Security.istio.io/v1", "istio.io/v1", "networking.istio.oi/v1"] {
        let mut world = World::of(&file(&[&namespace("shop"), &pod("shop", "cart", "10.0.0.1")]));
        world.set("deny.yaml", &deny);
        world.set("deny.yaml", &deny.replace("security.istio.io/v1", group));
        assert!(!world.allows("shop/cart", 80, "shop/web"), "{group}: the policy is not gone");
        assert_eq!(world.said(), ["last-good-version", "unknown-kind"], "{group}");
        let world = World::of(&deny.replace("security.istio.io/v1", group));
        assert!(world.repository.has_bad_files(), "{group}: nothing starts on it");
    }
    for (api_version, kind, code) in [
        ("serving.knative.dev/v1", "Service", "ignored-kind"),
        ("longhorn.io/v1", "Node", "ignored-kind"),
        ("networking.k8s.io/v1", "NetworkPolicy", "ignored-kind"),
        ("apps/v1", "Deployment", "ignored-kind"),
        ("core/v1", "Pod", "unknown-kind"),
        ("discovery.k8s.oi/v1", "EndpointSlice", "unknown-kind"),
        ("networking.itsio.io/v1", "VirtualService", "unknown-kind"),
    ] {
        let text = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x}}\n");
        assert_eq!(World::of(&text).said(), [code], "{api_version} {kind}");
    }
}

#[test]
fn settings_that_are_not_read_are_said_to_be() {
    let settings = |namespace: &str, name: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\ndata: {{mesh: \
             'rootNamespace: {namespace}'}}\n"
        )
    };
    let mut world = World::of(&settings("mesh-system", "istio"));
    assert_eq!(world.said(), ["settings-unread"]);
    world.set("revision.yaml", &settings("istio-system", "istio-1-30"));
    assert_eq!(world.said(), ["settings-unread"; 2]);
    world.set("read.yaml", &settings("istio-system", "istio"));
    assert_eq!(world.said(), ["without-effect"; 2]);
    world.change(&[("read.yaml", None)]);
    assert_eq!(world.said(), ["settings-unread"; 2]);
    world.set("revision.yaml", &settings("istio-system", "istio-1-30").replace("mesh:", "values:"));
    assert_eq!(world.said(), ["settings-unread"]);
    world.set("all.yaml", &settings("mesh-system", "prometheus"));
    assert_eq!(world.said(), [""; 0]);
}

#[test]
fn a_weight_of_zero_is_a_weight_that_is_not_set() {
    let world = World::of(&entry(
        "shop",
        "db",
        "",
        "resolution: STATIC, endpoints: [{address: 192.0.2.1, weight: 0}]",
    ));
    assert_eq!(world.mesh.workloads().next().unwrap().capacity, 1);
}

#[test]
fn an_entry_does_not_take_the_address_of_another_namespaces_pod() {
    let dialled = |world: &World| {
        let at = model::OriginalDst::new("10.0.0.1:80".parse().unwrap());
        match world.mesh.destination(&"".into(), at) {
            model::Destination::Workload(workload) => workload.name().to_owned(),
            model::Destination::Service(service) => format!("{}/{}", service.namespace, service.name),
            model::Destination::Unknown => "nothing".to_owned(),
        }
    };
    let spec = "addresses: [10.0.0.1], resolution: STATIC, endpoints: [{address: 10.0.0.3}]";
    let mut world = World::of(&entry("evil", "trap", "", spec));
    assert_eq!(dialled(&world), "evil/trap");
    world.set("pod.yaml", &pod("shop", "cart", "10.0.0.1"));
    assert_eq!((dialled(&world), world.said()), ("cart".into(), vec!["address-conflict".to_owned()]));
    world.set("pod.yaml", &pod("shop", "cart", "10.0.0.2"));
    assert_eq!((dialled(&world), world.said()), ("evil/trap".into(), vec![]));
    // In its own namespace it may.
    world.set("pod.yaml", &pod("evil", "own", "10.0.0.1"));
    assert_eq!((dialled(&world), world.said()), ("evil/trap".into(), vec![]));
}

/// A Service and a ServiceEntry behind one waypoint.
const TWO_BEHIND_A_WAYPOINT: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gate, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec: {clusterIP: 10.1.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec:
  hosts: [outside.example.com]
  addresses: [10.2.0.1]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 10.3.0.1}]
";

#[test]
fn each_kind_of_resource_holds_for_each_kind_of_target() {
    let kinds = [
        ("security.istio.io/v1", "AuthorizationPolicy", "action: DENY, rules: [{}]"),
        (
            "security.istio.io/v1",
            "RequestAuthentication",
            "jwtRules: [{issuer: a, jwksUri: 'https://a.example.com/keys'}]",
        ),
        ("telemetry.istio.io/v1", "Telemetry", "accessLogging: [{providers: [{name: envoy}]}]"),
        ("culvert.dev/v1alpha1", "RateLimit", "limits: [{name: a, local: {requests: 1, per: 1s}}]"),
    ];
    let gateway = "gateway.networking.k8s.io";
    let targets = [
        ("shop", "", "Service", "web", (true, false)),
        ("shop", "networking.istio.io", "ServiceEntry", "outside", (false, true)),
        ("shop", gateway, "Gateway", "gate", (true, true)),
        ("istio-system", gateway, "GatewayClass", "istio-waypoint", (true, true)),
        // What is meant is in the resource's own namespace, and a class is for the whole mesh.
        ("other", "", "Service", "web", (false, false)),
        ("other", gateway, "Gateway", "gate", (false, false)),
        ("other", gateway, "GatewayClass", "istio-waypoint", (false, false)),
    ];
    let services = [("web.shop.svc.cluster.local", "shop"), ("outside.example.com", "shop")];
    for (version, kind, spec) in kinds {
        for (namespace, group, target, name, wanted) in targets {
            let mut world = World::of(TWO_BEHIND_A_WAYPOINT);
            let of = |world: &World| {
                services.map(|(host, namespace)| {
                    let key = model::ServiceKey { namespace: namespace.into(), hostname: host.into() };
                    world.mesh.http_service(&key).unwrap_or_else(|| panic!("{host} is not served")).clone()
                })
            };
            let before = of(&world);
            world.set(
                "policy.yaml",
                &format!(
                    "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {{targetRefs: \
                     [{{group: '{group}', kind: {target}, name: {name}}}], {spec}}}\n"
                ),
            );
            let said = world.repository.diagnostics();
            let errors: Vec<_> =
                said.iter().filter(|d| d.severity == config::diagnostic::Severity::Error).collect();
            assert!(errors.is_empty(), "{kind}: {errors:?}");
            let after = of(&world);
            let holds = (before[0] != after[0], before[1] != after[1]);
            assert_eq!(holds, wanted, "a {kind} of {namespace} for the {target} {name}");
        }
    }
}

/// A namespace behind a waypoint.
const BEHIND_A_WAYPOINT: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gate, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: gate}}
";

fn virtual_service(name: &str, hosts: &str, http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {name}, namespace: shop}}
spec: {{{hosts}http: {http}}}
"
    )
}

/// The routes of requests to the first port of a service of the namespace.
fn routes(world: &World, name: &str) -> Vec<(String, model::http::Route)> {
    let host = format!("{name}.shop.svc.cluster.local");
    let found = world.mesh.http_services().find(|s| *s.service.hostname == *host).unwrap();
    let entries = found.ports[0].routes.entries().iter();
    entries.map(|(when, route)| (when.to_string(), model::http::Route::clone(route))).collect()
}

/// What a VirtualService that delegates, and the one that it delegates to, come to: each entry of the table.
fn delegated(root: &str, entries: &str) -> Vec<(String, model::http::Route)> {
    let root = virtual_service("root", "hosts: [web], ", &format!("[{{delegate: {{name: part}}, {root}}}]"));
    let part = virtual_service("part", "", entries);
    let service = service("shop", "web", "10.1.0.1", "");
    routes(&World::of(&file(&[BEHIND_A_WAYPOINT, &service, &root, &part])), "web")
}

#[test]
fn what_a_delegate_writes_stands_whole_in_the_place_of_what_delegates() {
    let root = "timeout: 7s, retries: {attempts: 5, perTryTimeout: 2s}, fault: {delay: {fixedDelay: 1s, percentage: {value: 1}}}, \
                rewrite: {uri: /r, authority: r.example}, headers: {request: {set: {x-r: r}}}";
    let entries = "[{name: all, match: [{uri: {exact: /all}}], timeout: 0s, retries: {attempts: 1}, \
                   fault: {abort: {httpStatus: 500, percentage: {value: 1}}}, rewrite: {uri: /d}, \
                   headers: {response: {set: {x-d: d}}}, route: [{destination: {host: web}}]}, \
                   {name: none, route: [{destination: {host: web}}]}]";
    let found = delegated(root, entries);
    let [(_, own), (_, inherited)] = &found[..] else { panic!("{found:#?}") };
    assert_eq!((own.timeouts.request, own.timeouts.per_try), (None, None));
    assert_eq!(own.retry.as_ref().unwrap().attempts, 1);
    assert!(own.fault.delay.is_none() && own.fault.abort.is_some());
    assert!(own.path.is_some() && own.host.is_none());
    assert_eq!((own.request_headers.0.len(), own.response_headers.0.len()), (0, 1));

    let seconds = |s| Some(std::time::Duration::from_secs(s));
    assert_eq!((inherited.timeouts.request, inherited.timeouts.per_try), (seconds(7), seconds(2)));
    assert_eq!(inherited.retry.as_ref().unwrap().attempts, 5);
    assert!(inherited.fault.delay.is_some() && inherited.path.is_some() && inherited.host.is_some());
    assert_eq!((inherited.request_headers.0.len(), inherited.response_headers.0.len()), (1, 0));
}

#[test]
fn a_delegate_has_the_host_that_headers_set_where_it_writes_none_and_a_rewrite_goes_first() {
    let (by_headers, by_rewrite) =
        ("headers: {request: {set: {Host: h.NAME}}}", "rewrite: {authority: r.NAME}");
    let (path, field) = ("rewrite: {uri: /d}", "headers: {request: {set: {x-d: d}}}");
    let both = format!("{by_headers}, {by_rewrite}");
    for (root, part, wanted) in [
        // As each is written whole, or not at all.
        (by_headers, path, Some("h.root")),
        (by_headers, field, None),
        (by_headers, by_rewrite, Some("r.part")),
        (by_rewrite, by_headers, Some("r.root")),
        (by_rewrite, field, Some("r.root")),
        (by_rewrite, path, None),
        (&both, path, Some("h.root")),
        (&both, field, Some("r.root")),
        (&both, "timeout: 1s", Some("r.root")),
    ] {
        let (root, part) = (root.replace("NAME", "root"), part.replace("NAME", "part"));
        let found = delegated(&root, &format!("[{{{part}, route: [{{destination: {{host: web}}}}]}}]"));
        let [(_, route)] = &found[..] else { panic!("{found:#?}") };
        let wanted = wanted.and_then(model::http::Authority::new).map(model::http::HostRewrite::To);
        assert_eq!(route.host, wanted, "{part} of {root}");
    }
}

#[test]
fn a_delegate_takes_what_both_matches_hold_for() {
    let entry = |when: &str| format!("[{{match: [{{{when}}}], route: [{{destination: {{host: web}}}}]}}]");
    let root = "match: [{authority: {prefix: web}, sourceNamespace: web, sourceLabels: {app: front}}]";
    for (inner, wanted) in [
        ("authority: {exact: web.shop}", "authority web.shop, from namespace web, from label app=front"),
        ("authority: {exact: api}", ""),
        (
            "sourceLabels: {v: two}",
            "authority web*, from namespace web, from label app=front, from label v=two",
        ),
        ("sourceLabels: {app: front}", "authority web*, from namespace web, from label app=front"),
        ("sourceLabels: {app: back}", ""),
        ("sourceNamespace: other", ""),
    ] {
        let found: Vec<String> = delegated(root, &entry(inner)).into_iter().map(|(when, _)| when).collect();
        assert_eq!(found.join("; "), wanted, "{inner}");
    }
}

#[test]
fn an_answer_is_not_asked_for_again_unasked_and_a_claim_is_no_header() {
    let web = service("shop", "web", "10.1.0.1", "");
    let of = |entry: &str| {
        let entry = format!("[{{{entry}, route: [{{destination: {{host: web}}}}]}}]");
        World::of(&file(&[BEHIND_A_WAYPOINT, &web, &virtual_service("web", "hosts: [web], ", &entry)]))
    };
    let retry = routes(&of("retries: {attempts: 2}"), "web")[0].1.retry.clone().unwrap();
    assert_eq!((retry.attempts, retry.statuses.len()), (2, 0));
    let claim = "match: [{headers: {\"@request.auth.claims.sub\": {exact: me}}}]";
    assert_eq!(of(claim).said(), ["invalid-value"]);
}

#[test]
fn the_meshs_retries_are_those_of_routes_that_say_nothing_of_them() {
    let [web, api] =
        [("web", "10.1.0.1"), ("api", "10.1.0.2")].map(|(name, ip)| service("shop", name, ip, ""));
    let own = "[{match: [{uri: {exact: /own}}, {uri: {exact: /more}}], retries: {attempts: 1}, route: [{destination: {host: web}}]}, \
               {timeout: 3s, route: [{destination: {host: web}}]}]";
    let own = virtual_service("web", "hosts: [web], ", own);
    let mut world = World::of(&file(&[BEHIND_A_WAYPOINT, &web, &api, &own]));
    let said = |world: &World, name: &str| -> Vec<_> {
        let of = |(_, route): (_, model::http::Route)| {
            (route.retry.map(|retry| retry.attempts), route.timeouts.per_try.map(|limit| limit.as_secs()))
        };
        routes(world, name).into_iter().map(of).collect()
    };
    let without = [(Some(1), None), (Some(1), None), (None, None)];
    assert_eq!(said(&world, "web"), without);
    assert_eq!(said(&world, "api"), []);
    world.set(
        "mesh.yaml",
        "apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {defaultHttpRetryPolicy: {attempts: 4, perTryTimeout: 2s, retryOn: \"5xx\"}}
",
    );
    assert_eq!(world.said(), [""; 0]);
    assert_eq!(said(&world, "web"), [(Some(1), None), (Some(1), None), (Some(4), Some(2))]);
    assert_eq!(said(&world, "api"), [(Some(4), Some(2))]);
    assert_eq!(routes(&world, "web")[2].1.timeouts.request.map(|limit| limit.as_secs()), Some(3));
    // A route of the Gateway API has limits for all of a response, and this is none.
    world.set(
        "route.yaml",
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: api, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: api}], rules: [{backendRefs: [{name: api, port: 80}]}]}
",
    );
    assert_eq!(said(&world, "api"), [(Some(4), None)]);
    world.change(&[("mesh.yaml", None), ("route.yaml", None)]);
    assert_eq!(said(&world, "web"), without);
    assert_eq!(said(&world, "api"), []);
}

#[test]
fn a_dry_run_of_custom_is_said_to_have_no_effect() {
    let custom = "{action: CUSTOM, provider: {name: p}, rules: [{}]}";
    let custom = policy("AuthorizationPolicy", "shop", "ask", custom);
    let dry = custom.replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}");
    assert_ne!(custom, dry);
    let said = |text: &str| World::of(text).said().contains(&"without-effect".to_owned());
    assert_eq!((said(&custom), said(&dry)), (false, true));
}
