#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use model::Change;
use model::StringMatch;
use model::http::{Bucket, LimitMatch, PathPattern};
use serde_json::json;

use super::bucket::{Buckets, Taken};
use super::*;

const SECOND: u64 = 1_000_000_000;

fn bucket(requests: u32, per: Duration, burst: u32, max_keys: u32) -> Buckets {
    Buckets::new(Bucket { requests, per, burst, max_keys }, Arc::default())
}

fn passes(buckets: &Buckets, value: &str, now: u64) -> bool {
    matches!(buckets.take(&[value.to_owned()], now), Taken::Within { .. })
}

#[test]
fn a_bucket_holds_its_burst_and_fills_with_time() {
    let buckets = bucket(2, Duration::from_secs(1), 3, 10);
    let now = 5 * SECOND;
    let taken = |at| buckets.take(&[], at);
    let within = |left, millis| Taken::Within { left, reset: Duration::from_millis(millis) };
    assert_eq!(taken(now), within(2, 500));
    assert_eq!(taken(now), within(1, 1000));
    assert_eq!(taken(now), within(0, 1500));
    assert_eq!(taken(now), Taken::Over { after: Duration::from_millis(500) });
    assert_eq!(taken(now + SECOND / 4), Taken::Over { after: Duration::from_millis(250) });
    assert_eq!(taken(now + SECOND / 2), within(0, 1500));
    // However long it waited, it holds no more than its burst.
    let later = now + 3600 * SECOND;
    assert_eq!((0..10).filter(|_| matches!(taken(later), Taken::Within { .. })).count(), 3);
}

#[test]
fn over_any_time_no_more_pass_than_the_rate_and_the_burst_allow() {
    let (requests, burst) = (7, 4);
    let buckets = bucket(requests, Duration::from_secs(1), burst, 10);
    let (mut passed, mut now) = (Vec::new(), SECOND);
    // Requests at irregular times, three times as many as may pass.
    for n in 0..3000_u64 {
        now += (n * 48_271_003) % 95_000_000;
        if passes(&buckets, "a", now) {
            passed.push(now);
        }
    }
    for (begin, from) in passed.iter().enumerate() {
        for (end, to) in passed.iter().enumerate().skip(begin) {
            let count = u64::try_from(end - begin + 1).unwrap();
            let allowed = (to - from) * u64::from(requests) / SECOND + u64::from(burst) + 1;
            assert!(count <= allowed, "{count} in {} ns", to - from);
        }
    }
    let least = (now - SECOND) * u64::from(requests) / SECOND;
    assert!(u64::try_from(passed.len()).unwrap() >= least, "{} of {least}", passed.len());
}

#[test]
fn values_have_buckets_of_their_own_up_to_a_limit() {
    let stats = Arc::new(LimitStats::default());
    let settings = Bucket { requests: 1, per: Duration::from_secs(1), burst: 1, max_keys: 160 };
    let buckets = Buckets::new(settings, stats.clone());
    assert!(passes(&buckets, "a", SECOND) && passes(&buckets, "b", SECOND));
    assert!(!passes(&buckets, "a", SECOND) && !passes(&buckets, "b", SECOND));
    for n in 0..10_000 {
        passes(&buckets, &format!("v{n}"), SECOND);
    }
    assert!(stats.keys.get() <= 160, "{}", stats.keys.get());
    assert!(stats.shared.get() > 9000);
    assert!(!passes(&buckets, "a", SECOND), "it is not forgotten for others");
    // What is full again makes room.
    assert!(passes(&buckets, "late", 10 * SECOND) && passes(&buckets, "later", 10 * SECOND));
    drop(buckets);
    assert_eq!(stats.keys.get(), 0);
}

fn limit(name: &str, by: &[LimitKey], requests: u32) -> Limit {
    let bucket = Bucket { requests, per: Duration::from_secs(60), burst: requests, max_keys: 100 };
    Limit {
        name: name.into(),
        on: LimitMatch::default(),
        by: by.into(),
        count: Count::Local(bucket),
        dry_run: false,
    }
}

fn all(limits: Vec<Limit>, headers: LimitHeaders) -> (RateLimits, Arc<RateLimit>) {
    let key = PolicyKey { namespace: "a".into(), name: "limits".into() };
    let limits = RateLimit { key, limits: limits.into_iter().map(Arc::new).collect(), headers };
    let limits = Arc::new(limits);
    let counted = RateLimits::default();
    counted.follow(&Mesh::default().apply([Change::SetRateLimit(limits.clone())]));
    (counted, limits)
}

fn connection() -> Connection {
    Connection {
        client: "10.0.0.1:4000".parse().unwrap(),
        destination: "10.9.0.1:80".parse().unwrap(),
        identity: Some(Arc::new("spiffe://cluster.local/ns/a/sa/b".parse().unwrap())),
        server_name: None,
        secure: false,
        said: None,
    }
}

fn request(method: &str, target: &str, fields: &[(&str, &str)]) -> RequestHead {
    let mut head = RequestHead::default();
    head.set_method(method);
    head.set_target(target);
    for (name, value) in fields {
        head.fields.push(name.as_bytes(), value.as_bytes());
    }
    head
}

/// The status, 0 where it may go on, and the fields that tell of the limits.
fn ask(
    counted: &RateLimits,
    limits: &Arc<RateLimit>,
    head: &RequestHead,
    claims: Option<&Claims>,
) -> (u16, Vec<String>) {
    let connection = connection();
    let shown = |name: &str, value: &str| format!("{name}: {value}");
    match counted.here(&[limits], &view(head, &connection, claims), &connection) {
        Ok((told, questions)) => {
            assert!(questions.is_empty());
            let fields = edits(&told).into_iter().map(|edit| match edit {
                Edit::Set(name, Value::Plain(value)) => shown(&name, &String::from_utf8_lossy(&value)),
                other => panic!("{other:?}"),
            });
            (0, fields.collect())
        }
        Err(Checked::Refused(response, _)) => {
            (response.status, response.fields.iter().map(|(n, v)| shown(n, v)).collect())
        }
        Err(_) => panic!("neither"),
    }
}

#[test]
fn clients_are_told_of_their_limits() {
    let (counted, limits) =
        all(vec![limit("per-minute", &[], 2), limit("more", &[], 100)], LimitHeaders::Standard);
    let head = request("GET", "/", &[]);
    let policy = "ratelimit-policy: \"per-minute\";q=2;w=60, \"more\";q=100;w=60";
    assert_eq!(
        ask(&counted, &limits, &head, None),
        (0, vec![policy.to_owned(), "ratelimit: \"per-minute\";r=1;t=30, \"more\";r=99;t=1".to_owned()])
    );
    ask(&counted, &limits, &head, None);
    let (status, fields) = ask(&counted, &limits, &head, None);
    assert_eq!(status, 429);
    assert!(fields.contains(&"ratelimit-policy: \"per-minute\";q=2;w=60".to_owned()), "{fields:?}");
    assert!(fields.contains(&"retry-after: 30".to_owned()), "{fields:?}");
    assert!(fields.contains(&"x-envoy-ratelimited: true".to_owned()), "{fields:?}");
    let (counted, limits) = all(vec![limit("one", &[], 5), limit("two", &[], 3)], LimitHeaders::Legacy);
    let wanted = [
        "x-ratelimit-limit: 3, 5;w=60;name=\"one\", 3;w=60;name=\"two\"",
        "x-ratelimit-remaining: 2",
        "x-ratelimit-reset: 20",
    ];
    assert_eq!(ask(&counted, &limits, &head, None), (0, wanted.map(str::to_owned).to_vec()));
    let (counted, limits) = all(vec![limit("one", &[], 5)], LimitHeaders::None);
    assert_eq!(ask(&counted, &limits, &head, None), (0, Vec::new()));
}

#[test]
fn requests_share_a_limit_by_what_they_have_in_common() {
    let claims = |sub: &str| Claims::new(json!({ "sub": sub, "o": { "k": 7 } }).as_object().unwrap().clone());
    let (anna, ben) = (claims("anna"), claims("ben"));
    let get = |path: &str, user: &str| request("GET", path, &[("X-User", user)]);
    let by = |keys: &[LimitKey]| all(vec![limit("l", keys, 1)], LimitHeaders::None);
    let claim = |path: &[&str]| LimitKey::Claim(path.iter().map(|key| (*key).into()).collect());
    // What the first two are, and whether the second is another.
    let cases: [(LimitKey, RequestHead, RequestHead, bool); 6] = [
        (LimitKey::Path, get("/a?1", "x"), get("/b?1", "x"), true),
        (LimitKey::Path, get("/a?1", "x"), get("/a?2", "y"), false),
        (LimitKey::Method, get("/", "x"), request("PUT", "/", &[]), true),
        (LimitKey::Header("x-user".into()), get("/", "x"), get("/", "y"), true),
        (LimitKey::Identity, get("/", "x"), get("/", "y"), false),
        (LimitKey::Address, get("/", "x"), get("/b", "y"), false),
    ];
    for (key, first, second, other) in cases {
        let (counted, limits) = by(std::slice::from_ref(&key));
        assert_eq!(ask(&counted, &limits, &first, None).0, 0, "{key:?}");
        assert_eq!(ask(&counted, &limits, &first, None).0, 429, "{key:?}");
        assert_eq!(ask(&counted, &limits, &second, None).0 == 0, other, "{key:?}");
    }
    let (counted, limits) = by(&[claim(&["sub"])]);
    let head = get("/", "x");
    let as_anna = |_| ask(&counted, &limits, &head, Some(&anna)).0;
    assert_eq!([0, 1].map(as_anna), [0, 429]);
    assert_eq!(ask(&counted, &limits, &head, Some(&ben)).0, 0);
    let (counted, limits) = by(&[claim(&["o", "k"]), LimitKey::Method]);
    assert_eq!(ask(&counted, &limits, &head, Some(&anna)).0, 0);
    assert_eq!(ask(&counted, &limits, &head, Some(&ben)).0, 429, "what they share is the same");
    // Who has none of it is not limited by it.
    assert_eq!([0, 1, 2].map(|_| ask(&counted, &limits, &head, None).0), [0, 0, 0]);
}

#[test]
fn a_limit_is_of_the_requests_that_it_names() {
    let mut one = limit("l", &[], 1);
    one.on = LimitMatch {
        methods: ["POST".into()].into(),
        paths: [PathPattern::Text(StringMatch::parse("/api/*"))].into(),
        headers: [("x-tier".into(), StringMatch::Exact("free".into()))].into(),
    };
    let (counted, limits) = all(vec![one.clone()], LimitHeaders::None);
    let post = |path, tier| ask(&counted, &limits, &request("POST", path, &[("X-Tier", tier)]), None).0;
    assert_eq!((post("/api/a", "free"), post("/api/b", "free")), (0, 429));
    assert_eq!((post("/other", "free"), post("/api/a", "paid")), (0, 0));
    let get = request("GET", "/api/a", &[("x-tier", "free")]);
    assert_eq!(ask(&counted, &limits, &get, None).0, 0);
    one.on = LimitMatch::default();
    one.dry_run = true;
    // Nobody is told of a dry run.
    let (counted, limits) = all(vec![one], LimitHeaders::Standard);
    assert_eq!([0, 1, 2].map(|_| ask(&counted, &limits, &get, None)), [(); 3].map(|()| (0, Vec::new())));
    assert_eq!(counted.stats().would_refuse.get(), 2);
}

#[test]
fn a_limit_that_stays_as_it_was_counts_on() {
    let (counted, limits) = all(vec![limit("l", &[], 1)], LimitHeaders::None);
    let head = request("GET", "/", &[]);
    assert_eq!(ask(&counted, &limits, &head, None).0, 0);
    let again = Arc::new(RateLimit { limits: [Arc::new(limit("l", &[], 1))].into(), ..(*limits).clone() });
    counted.follow(&Mesh::default().apply([Change::SetRateLimit(again.clone())]));
    assert_eq!(ask(&counted, &again, &head, None).0, 429);
    let other = Arc::new(RateLimit { limits: [Arc::new(limit("l", &[], 2))].into(), ..(*limits).clone() });
    counted.follow(&Mesh::default().apply([Change::SetRateLimit(other.clone())]));
    assert_eq!(ask(&counted, &other, &head, None).0, 0);
}

#[test]
fn networks_of_ipv6_share_an_address() {
    let of = |text: &str| address(text.parse().unwrap());
    assert_eq!(of("10.0.0.1"), "10.0.0.1");
    assert_eq!(of("::ffff:10.0.0.1"), "10.0.0.1");
    assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
}

#[test]
fn connections_take_from_what_asks_nothing_of_requests() {
    let mut posts = limit("posts", &[LimitKey::Identity], 1);
    posts.on.methods = ["POST".into()].into();
    let of_paths = limit("paths", &[LimitKey::Path], 1);
    let (counted, limits) =
        all(vec![posts, of_paths, limit("all", &[LimitKey::Identity], 2)], LimitHeaders::None);
    let mesh = Mesh::default().apply([Change::SetRateLimit(limits.clone())]);
    let service = HttpService {
        service: model::ServiceKey { namespace: "a".into(), hostname: "b".into() },
        waypoint: model::http::WaypointKey { namespace: "a".into(), name: "w".into() },
        ports: Box::default(),
        policies: Box::default(),
        selected: Box::default(),
        led_to: Box::default(),
        authentication: Box::default(),
        rate_limits: [limits.key.clone()].into(),
        telemetry: Arc::default(),
    };
    let admit = || counted.admit(&mesh, &service, &connection()).is_ok();
    assert_eq!([admit(), admit(), admit()], [true, true, false]);
    // One that is listed and not known refuses.
    assert!(counted.admit(&Mesh::default(), &service, &connection()).is_err());
}

#[test]
fn a_limit_counts_for_as_long_as_somebody_goes_by_it() {
    let (counted, limits) = all(vec![limit("l", &[], 2)], LimitHeaders::None);
    let head = request("GET", "/", &[]);
    // Another snapshot has other limits; a request that waited still goes by these.
    counted.follow(&Mesh::default());
    let answers = [0, 1, 2].map(|_| ask(&counted, &limits, &head, None).0);
    assert_eq!(answers, [0, 0, 429]);
    // What is listed and not counted is not let through.
    let fresh = RateLimits::default();
    assert_eq!(ask(&fresh, &limits, &head, None).0, 503);
    let service = HttpService {
        service: model::ServiceKey { namespace: "a".into(), hostname: "b".into() },
        waypoint: model::http::WaypointKey { namespace: "a".into(), name: "w".into() },
        ports: Box::default(),
        policies: Box::default(),
        selected: Box::default(),
        led_to: Box::default(),
        authentication: Box::default(),
        rate_limits: [limits.key.clone()].into(),
        telemetry: Arc::default(),
    };
    let mesh = Mesh::default().apply([Change::SetRateLimit(limits.clone())]);
    assert!(fresh.admit(&mesh, &service, &connection()).is_err());
    drop((limits, mesh));
    counted.follow(&Mesh::default());
    assert!(counted.buckets.load().is_empty());
}
