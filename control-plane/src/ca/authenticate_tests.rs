use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::*;

fn status(value: serde_json::Value) -> TokenReviewStatus {
    serde_json::from_value(value).unwrap()
}

fn ztunnel() -> serde_json::Value {
    json!({
        "authenticated": true,
        "audiences": ["istio-ca"],
        "user": {
            "username": "system:serviceaccount:culvert-system:ztunnel",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["ztunnel-abc"],
                "authentication.kubernetes.io/pod-uid": ["uid-1"],
                "authentication.kubernetes.io/node-name": ["node-1"],
            },
        },
    })
}

#[test]
fn a_review_says_account_pod_and_node() {
    let caller = read_status(status(ztunnel())).unwrap();
    let pod = BoundPod { name: "ztunnel-abc".into(), uid: "uid-1".into(), node: Some("node-1".into()) };
    assert_eq!(caller.pod, Some(pod));
    assert_eq!(caller.to_string(), "culvert-system/ztunnel (pod ztunnel-abc)");
}

#[test]
fn a_review_that_does_not_say_who_it_is_is_refused() {
    let table: [(&str, &str, serde_json::Value, &str); 8] = [
        ("not authenticated", "/authenticated", json!(false), "does not accept"),
        ("no audience", "/audiences", json!([]), "not meant for the audience istio-ca"),
        ("another audience", "/audiences", json!(["api"]), "not meant for the audience istio-ca"),
        ("a user", "/user/username", json!("alice"), "no service account"),
        ("a node", "/user/username", json!("system:node:a:b"), "no service account"),
        ("too many parts", "/user/username", json!("system:serviceaccount:a:b:c"), "no service account"),
        ("no name", "/user/username", json!("system:serviceaccount:a:"), "no service account"),
        ("no namespace", "/user/username", json!("system:serviceaccount::b"), "no service account"),
    ];
    for (what, at, value, says) in table {
        let mut review = ztunnel();
        *review.pointer_mut(at).unwrap() = value;
        let error = read_status(status(review)).expect_err(what).to_string();
        assert!(error.contains(says), "{what}: {error}");
    }
    // A binding that is not whole is none.
    let mut review = ztunnel();
    review["user"]["extra"]["authentication.kubernetes.io/pod-uid"] = json!(["a", "b"]);
    assert_eq!(read_status(status(review)).unwrap().pod, None);
    let error = read_status(status(json!({"error": "token has expired"}))).unwrap_err();
    assert!(error.to_string().contains("token has expired"));
}

struct Counting(Arc<AtomicU64>);

impl Reviewer for Counting {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let known = token.starts_with("a.");
        Box::pin(async move {
            if !known {
                return Err(AuthenticationError::Rejected("unknown".into()));
            }
            Ok(Caller { namespace: "ns".into(), service_account: "sa".into(), pod: None })
        })
    }
}

fn token(expires: u64) -> String {
    format!("a.{}.sig", URL_SAFE_NO_PAD.encode(json!({"exp": expires}).to_string()))
}

#[tokio::test(start_paused = true)]
async fn a_review_is_believed_no_longer_than_the_token_lives() {
    let reviews = Arc::new(AtomicU64::new(0));
    let clock = Clock::system();
    let authenticator = Authenticator::new(Counting(reviews.clone()), clock.clone());
    let ask = async |token: &str| authenticator.caller(Some(&format!("Bearer {token}"))).await;
    let now = clock.now().as_secs();
    let count = || reviews.swap(0, Ordering::SeqCst);

    let long = token(now + 3600);
    for _ in 0..5 {
        ask(&long).await.unwrap();
    }
    assert_eq!(count(), 1);
    tokio::time::advance(CACHE_TTL + Duration::from_secs(1)).await;
    ask(&long).await.unwrap();
    assert_eq!(count(), 1, "it is reviewed again after a minute");

    let short = token(now + 10);
    ask(&short).await.unwrap();
    ask(&short).await.unwrap();
    tokio::time::advance(Duration::from_secs(11)).await;
    ask(&short).await.unwrap();
    assert_eq!(count(), 2, "it outlives the token");

    for never in [token(now.saturating_sub(1)), "a.b.c".to_owned(), "a.".to_owned()] {
        ask(&never).await.unwrap();
        ask(&never).await.unwrap();
        assert_eq!(count(), 2, "what is about to end, or does not say when, is not remembered");
    }
    for _ in 0..2 {
        ask("forged").await.unwrap_err();
    }
    assert_eq!(count(), 2, "a refusal is not remembered");
}

#[tokio::test]
async fn what_is_no_bearer_token_is_not_even_reviewed() {
    let reviews = Arc::new(AtomicU64::new(0));
    let authenticator = Authenticator::new(Counting(reviews.clone()), Clock::system());
    let huge = format!("Bearer {}", "a".repeat(MAX_TOKEN + 1));
    for header in
        [None, Some(""), Some("Bearer"), Some("Bearer "), Some("Basic a.b"), Some("a.b"), Some(&huge)]
    {
        authenticator.caller(header).await.unwrap_err();
    }
    assert_eq!(reviews.load(Ordering::SeqCst), 0);
    authenticator.caller(Some("bearer a.b")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_cache_is_bounded() {
    let reviews = Arc::new(AtomicU64::new(0));
    let authenticator = Authenticator::new(Counting(reviews), Clock::system());
    let expires = Clock::system().now().as_secs() + 3600;
    for index in 0..CACHE_SIZE + 50 {
        let token = format!("{}{index}", token(expires));
        authenticator.caller(Some(&format!("Bearer {token}"))).await.unwrap();
    }
    assert_eq!(authenticator.cache.lock().unwrap().len(), CACHE_SIZE);
}

/// Says of each token what an API server would whose clock is another.
struct OtherClock(&'static str);

impl Reviewer for OtherClock {
    fn review<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        Box::pin(async { Err(AuthenticationError::Rejected(self.0.to_owned())) })
    }
}

#[tokio::test]
async fn a_refusal_for_its_time_says_whether_clocks_differ() {
    let now = Clock::system().now().as_secs();
    let (expired, young) = ("service account token has expired", "service account token is not valid yet");
    for (reason, nbf, exp, says) in [
        (expired, now - 100, now + 500, Some("differs by 500 s or more")),
        (expired, now - 500, now - 100, Some("renews the token's file")),
        (young, now - 40, now + 500, Some("differs by 40 s or more")),
        (young, now + 300, now + 500, Some("who issued it is ahead")),
        ("signature is wrong", now - 100, now + 500, None),
    ] {
        let authenticator = Authenticator::new(OtherClock(reason), Clock::system());
        let token = format!("a.{}.sig", URL_SAFE_NO_PAD.encode(json!({"exp": exp, "nbf": nbf}).to_string()));
        let error = authenticator.caller(Some(&format!("Bearer {token}"))).await.unwrap_err().to_string();
        assert!(error.starts_with(reason), "{error}");
        match says {
            // A second may pass.
            Some(says) => assert!(
                error.contains(says) || error.contains("differs by 499 s") || error.contains("by 41 s"),
                "{error}"
            ),
            None => assert_eq!(error, reason),
        }
        assert!(!error.contains(&token), "{error}");
    }
}

#[tokio::test]
async fn the_token_of_a_pod_that_is_gone_is_reviewed_again() {
    let reviews = Arc::new(AtomicU64::new(0));
    let authenticator = Authenticator::new(Bound(reviews.clone()), Clock::system());
    let token = format!("Bearer {}", token(Clock::system().now().as_secs() + 3600));
    let count = async || {
        authenticator.caller(Some(&token)).await.unwrap();
        reviews.load(Ordering::SeqCst)
    };
    assert_eq!((count().await, count().await), (1, 1));
    authenticator.forget("another");
    assert_eq!(count().await, 1);
    authenticator.forget("1");
    assert_eq!(count().await, 2);
}

/// All tokens are of one pod.
struct Bound(Arc<AtomicU64>);

impl Reviewer for Bound {
    fn review<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            let pod = BoundPod { name: "p".into(), uid: "1".into(), node: None };
            Ok(Caller { namespace: "ns".into(), service_account: "sa".into(), pod: Some(pod) })
        })
    }
}
