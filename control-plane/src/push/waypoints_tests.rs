use std::sync::Arc;
use std::time::Duration;

use model::http::{
    Backend, Forward, HttpPort, Protocol, Route, RouteMatch, RouteTable, StreamTable, Subset, TokenRule,
    TrafficPolicy, WaypointKey,
};
use model::telemetry::{AccessLog, Collector, LogEntries, LogService};
use model::{Action, Policy, Scope};

use super::*;

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "shop".into(), hostname: name.into() }
}

fn policy_key(name: &str) -> PolicyKey {
    PolicyKey { namespace: "shop".into(), name: name.into() }
}

fn policy(name: &str) -> Change {
    Change::SetHttpPolicy(Arc::new(Policy {
        key: policy_key(name),
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: Box::default(),
        dry_run: false,
    }))
}

fn traffic(name: &str, label: Option<&str>) -> Change {
    let subset = label.map(|label| Subset {
        name: "v1".into(),
        labels: [(label.into(), "v1".into())].into(),
        default: TrafficPolicy::default(),
        ports: Box::default(),
    });
    Change::SetTraffic(Arc::new(ServiceTraffic {
        service: key(name),
        default: TrafficPolicy::default(),
        ports: Box::default(),
        subsets: subset.into_iter().collect(),
    }))
}

/// A service of a waypoint with policies, whose routes lead to another one.
fn service(name: &str, waypoint: &str, policies: &[&str], to: &str) -> Change {
    let backend = Backend {
        to: BackendRef::Service { service: key(to), port: 80, subset: None },
        weight: 1,
        request_headers: Default::default(),
        response_headers: Default::default(),
    };
    let route = Arc::new(Route::new(RouteAction::Forward(Forward::new(vec![backend]))));
    Change::SetHttpService(Arc::new(HttpService {
        service: key(name),
        waypoint: WaypointKey { namespace: "shop".into(), name: waypoint.into() },
        ports: [HttpPort {
            number: 80,
            protocol: Protocol::Http,
            routes: Arc::new(RouteTable::new(vec![(RouteMatch::default(), route)])),
            streams: Arc::new(StreamTable::default()),
        }]
        .into(),
        policies: policies.iter().map(|name| policy_key(name)).collect(),
        selected: Box::default(),
        led_to: Box::default(),
        authentication: Box::default(),
        rate_limits: Box::default(),
        telemetry: Arc::default(),
    }))
}

struct Staged {
    waypoints: Waypoints,
    exceptions: Exceptions,
}

impl Staged {
    fn new(most_bytes: usize) -> Self {
        let waypoints = Waypoints::new(most_bytes, Enforcers::default());
        Self { waypoints, exceptions: Exceptions::default() }
    }

    /// What follows: `+` or `-`, the kind, and the name.
    fn take(&mut self, changes: &[Change]) -> Vec<String> {
        changes.iter().for_each(|change| assert!(self.waypoints.take(change)));
        let kind = |url: &str| url.rsplit('.').next().unwrap_or_default().to_owned();
        let mut said: Vec<String> = self
            .waypoints
            .updates(&self.exceptions)
            .iter()
            .map(|update| match update {
                Update::Set(resource) => {
                    assert!(resource.plain.is_none(), "a proxy of another make is sent it");
                    let scope = resource.scope.as_deref().unwrap_or_default();
                    assert!(resource.name.starts_with(&format!("{scope}/")));
                    format!("+{} {}", kind(resource.type_url), resource.name)
                }
                Update::Remove { type_url, name } => format!("-{} {name}", kind(type_url)),
            })
            .collect();
        said.sort();
        said
    }
}

#[test]
fn a_waypoint_gets_what_its_services_need_and_nothing_else() {
    let mut staged = Staged::new(MOST_BYTES);
    let there =
        [policy("p"), policy("q"), traffic("cart", None), traffic("other", None), traffic("pay", None)];
    assert_eq!(staged.take(&there), [""; 0], "nobody needs it yet");
    assert_eq!(
        staged.take(&[service("cart", "w", &["p"], "pay")]),
        [
            "+HttpPolicy shop/w/shop/p",
            "+HttpService shop/w/shop/cart",
            "+ServiceTraffic shop/w/shop/cart",
            "+ServiceTraffic shop/w/shop/pay",
        ]
    );
    assert_eq!(staged.waypoints.enforcers.of("shop/p").into_iter().collect::<Vec<_>>(), ["shop/w".into()]);
    assert_eq!(staged.take(&[service("pay", "x", &["p"], "pay")]).len(), 3, "one of its own");
    assert_eq!(
        staged.take(&[policy("p"), policy("q")]),
        ["+HttpPolicy shop/w/shop/p", "+HttpPolicy shop/x/shop/p"]
    );
    assert_eq!(
        staged.take(&[service("cart", "w", &["q"], "cart")]),
        [
            "+HttpPolicy shop/w/shop/q",
            "+HttpService shop/w/shop/cart",
            "-HttpPolicy shop/w/shop/p",
            "-ServiceTraffic shop/w/shop/pay",
        ]
    );
    assert_eq!(
        staged.take(&[service("cart", "x", &["q"], "cart")]),
        [
            "+HttpPolicy shop/x/shop/q",
            "+HttpService shop/x/shop/cart",
            "+ServiceTraffic shop/x/shop/cart",
            "-HttpPolicy shop/w/shop/q",
            "-HttpService shop/w/shop/cart",
            "-ServiceTraffic shop/w/shop/cart",
        ]
    );
    assert_eq!(staged.take(&[Change::RemoveHttpPolicy(policy_key("q"))]), ["-HttpPolicy shop/x/shop/q"]);
    assert_eq!(
        staged.take(&[Change::RemoveHttpService(key("cart")), Change::RemoveHttpService(key("pay"))]),
        [
            "-HttpPolicy shop/x/shop/p",
            "-HttpService shop/x/shop/cart",
            "-HttpService shop/x/shop/pay",
            "-ServiceTraffic shop/x/shop/cart",
            "-ServiceTraffic shop/x/shop/pay",
        ]
    );
    assert!(staged.waypoints.waypoints.is_empty() && staged.waypoints.enforcers.of("shop/p").is_empty());
}

#[test]
fn what_a_waypoint_has_no_room_for_is_said_and_comes_when_there_is() {
    let one = service("a", "w", &[], "a");
    let mut length = 0;
    if let Change::SetHttpService(s) = &one {
        length = proto::encode_http_service(s).encode_to_vec().len() + "shop/w/shop/a".len();
    }
    let mut staged = Staged::new(2 * length);
    assert_eq!(staged.take(&[one, service("b", "w", &[], "b")]).len(), 2);
    assert_eq!(staged.take(&[service("c", "w", &[], "c")]), [""; 0]);
    let said = staged.exceptions.of("shop/w/shop/c").unwrap();
    assert!(said.contains("would have more than") && said.contains("bind fewer services"), "{said}");
    assert_eq!(
        staged.take(&[Change::RemoveHttpService(key("a"))]),
        ["+HttpService shop/w/shop/c", "-HttpService shop/w/shop/a"]
    );
    assert_eq!(staged.exceptions.of("shop/w/shop/c"), None);
}

#[test]
fn labels_are_asked_about_as_long_as_somebody_needs_them() {
    let mut staged = Staged::new(MOST_BYTES);
    let labels = |staged: &mut Staged| -> Option<Vec<String>> {
        let changed = staged.waypoints.new_labels()?;
        Some(changed.iter().map(ToString::to_string).collect())
    };
    staged.take(&[traffic("pay", Some("version"))]);
    assert_eq!(labels(&mut staged), None, "no waypoint speaks to it");
    staged.take(&[service("cart", "w", &[], "pay")]);
    assert_eq!(labels(&mut staged), Some(vec!["version".to_owned()]));
    assert!(staged.waypoints.asks_about("version") && !staged.waypoints.asks_about("app"));
    staged.take(&[traffic("pay", Some("release"))]);
    assert_eq!(labels(&mut staged), Some(vec!["release".to_owned(), "version".to_owned()]));
    staged.take(&[Change::RemoveHttpService(key("cart"))]);
    assert_eq!(labels(&mut staged), Some(vec!["release".to_owned()]));
}

#[test]
fn what_is_said_of_a_providers_host_goes_to_every_waypoint() {
    let authorizer = Change::SetAuthorizer(Arc::new(model::http::Authorizer {
        name: "opa".into(),
        address: model::http::ProviderAddress { namespace: None, host: "authz".into(), port: 9000 },
        http: None,
        timeout: None,
        fail_open: false,
        clear_route_cache: false,
        status_on_error: None,
        body: None,
    }));
    let mut staged = Staged::new(MOST_BYTES);
    staged.take(&[service("cart", "w", &[], "cart"), traffic("authz", None)]);
    assert_eq!(staged.take(&[authorizer]), ["+Authorizer shop/w/opa", "+ServiceTraffic shop/w/shop/authz"]);
    let another = staged.take(&[service("pay", "x", &[], "pay")]);
    assert_eq!(
        another,
        ["+Authorizer shop/x/opa", "+HttpService shop/x/shop/pay", "+ServiceTraffic shop/x/shop/authz"]
    );
    assert_eq!(
        staged.take(&[Change::RemoveAuthorizer("opa".into())]),
        [
            "-Authorizer shop/w/opa",
            "-Authorizer shop/x/opa",
            "-ServiceTraffic shop/w/shop/authz",
            "-ServiceTraffic shop/x/shop/authz",
        ]
    );
}

/// What is at these hosts is asked by the waypoint itself, so it has to know where they are.
#[test]
fn hosts_of_keys_spans_and_logs_are_known_to_waypoints() {
    let rule = |keys| {
        Arc::new(TokenRule {
            issuer: None,
            audiences: Box::default(),
            keys,
            places: Box::default(),
            forward: false,
            payload_header: None,
            claim_headers: Box::default(),
            space_delimited: Box::default(),
            timeout: Duration::from_secs(5),
        })
    };
    let keys = [
        KeySource::Url("http://Keys.shop.svc.cluster.local:8080/jwks".into()),
        KeySource::Discovered("https://issuer.example".into()),
        KeySource::Inline("{}".into()),
    ];
    let authentication = Change::SetAuthentication(Arc::new(RequestAuthentication {
        key: policy_key("tokens"),
        rules: keys.map(rule).into(),
    }));
    let collector =
        |host: &str| Collector { provider: "p".into(), namespace: None, host: host.into(), port: 4317 };
    let log =
        LogService { collector: collector("logs"), name: "log".into(), entries: LogEntries::Connections };
    let telemetry = Telemetry {
        logs: Some([AccessLog { sink: LogSink::Service(Box::new(log)), filter: None }].into()),
        ..Telemetry::default()
    };
    let Change::SetHttpService(cart) = service("cart", "w", &[], "cart") else { panic!("a service") };
    let cart = HttpService { telemetry: Arc::new(telemetry), ..(*cart).clone() };

    let mut staged = Staged::new(MOST_BYTES);
    staged.take(&[authentication, Change::SetHttpService(Arc::new(cart))]);
    let hosts: Vec<Str> = staged.waypoints.wishes().providers.into_iter().collect();
    assert_eq!(hosts, ["issuer.example".into(), "keys.shop.svc.cluster.local".into(), Str::from("logs")]);
}
