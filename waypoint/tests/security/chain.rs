//! A request's way through token, policies, external authorizers and rate limits, over real connections.

use crate::lab::{Lab, checks, custom, limits, mesh_config};

#[tokio::test]
async fn an_authorizer_of_others_is_asked_by_grpc() {
    let Some(checks) = checks().await else { return };
    let providers = "
  - name: opa
    envoyExtAuthzGrpc:
      service: authz.example
      port: 80
      timeout: 2s
      statusOnError: \"503\"
      includeRequestBodyInCheck: {maxRequestBytes: 4, allowPartialMessage: true}
";
    let lab = Lab::with(checks.grpc, checks.http, &[mesh_config(providers), custom("opa")].concat()).await;
    let (status, head, body) =
        lab.ask("POST", "/ask?a=1", &[("X-Secret", "s"), ("X-Told", "mine")], "abcdef").await;
    assert_eq!(status, 200, "{head} {body}");
    assert!(head.contains("x-decided: yes"), "{head}");
    let told = "x-told: POST shop.example/ask?a=1 from 127.0.0.1 body=\"abcd\" partial=true";
    assert!(body.contains(told), "{body}");
    assert!(!body.to_lowercase().contains("x-secret"), "{body}");
    assert!(!body.contains("evil") && !body.contains("mine"), "{body}");
    assert!(body.ends_with("abcdef"), "the whole body was sent on: {body}");
    let (status, head, body) = lab.ask("GET", "/ask", &[("x-ask", "deny=401")], "").await;
    assert_eq!((status, &*body), (401, "no, spiffe://cluster.local/ns/web/sa/front"), "{head}");
    assert!(head.contains("x-why: because"), "{head}");
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "fail")], "").await.0, 503);
    // No answer in time is none.
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "slow")], "").await.0, 503);
    // What no policy matches is not asked about.
    assert_eq!(lab.ask("GET", "/other", &[("x-ask", "deny=401")], "").await.0, 200);
    let stats = &lab.guards.authorizers;
    assert_eq!((stats.allowed.get(), stats.denied.get(), stats.failed.get()), (1, 1, 2));
}

#[tokio::test]
async fn an_authorizer_is_asked_over_http() {
    let Some(checks) = checks().await else { return };
    let providers = "
  - name: web
    envoyExtAuthzHttp:
      service: authz-http.example
      port: 80
      pathPrefix: /check
      includeRequestHeadersInCheck: [x-user, x-ask]
      includeRequestBodyInCheck: {maxRequestBytes: 16}
      headersToUpstreamOnAllow: [x-told]
      headersToDownstreamOnDeny: [x-told]
";
    let lab = Lab::with(checks.grpc, checks.http, &[mesh_config(providers), custom("web")].concat()).await;
    let (status, _, body) =
        lab.ask("PUT", "/ask?a=1", &[("X-User", "anna"), ("Cookie", "secret=1")], "abc").await;
    assert_eq!(status, 200, "{body}");
    let told = "x-told: PUT shop.example/check/ask?a=1 body=\"abc\" user=\"anna\" cookie=\"\"";
    assert!(body.contains(told), "{body}");
    assert!(body.contains("Cookie: secret=1") && body.ends_with("abc"), "{body}");
    let (status, head, body) = lab.ask("GET", "/ask", &[("x-ask", "302")], "").await;
    assert_eq!((status, &*body), (302, "not you"));
    assert!(head.contains("location: /login") && head.contains("x-told: "), "{head}");
    assert!(!head.contains("x-internal"), "{head}");
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "500")], "").await.0, 403);
    let long = "a".repeat(17);
    assert_eq!(lab.ask("POST", "/ask", &[], &long).await.0, 413);
}

#[tokio::test]
async fn who_can_t_be_asked_refuses_unless_it_is_said_otherwise() {
    let Some(checks) = checks().await else { return };
    for (open, wanted) in [("false", 403), ("true", 200)] {
        let providers = format!(
            "
  - name: gone
    envoyExtAuthzGrpc: {{service: away.example, port: 80, timeout: 2s, failOpen: {open}}}
"
        );
        let lab =
            Lab::with(checks.grpc, checks.http, &[mesh_config(&providers), custom("gone")].concat()).await;
        assert_eq!(lab.ask("GET", "/ask", &[], "").await.0, wanted, "failOpen: {open}");
    }
    // One that nobody defines refuses, whatever.
    let lab = Lab::with(checks.grpc, checks.http, &custom("nobody")).await;
    assert_eq!(lab.ask("GET", "/ask", &[], "").await.0, 403);
    assert_eq!(lab.ask("GET", "/other", &[], "").await.0, 200);
}

#[tokio::test]
async fn requests_are_counted_here_and_by_a_service_of_others() {
    let Some(checks) = checks().await else { return };
    let spec = "
  global: {service: authz.example, port: 80, domain: shop, timeout: 5s, onFailure: Deny}
  limits:
  - name: user
    match: {paths: [/global*]}
    by: [{type: Header, name: x-user}, {type: Identity}, {type: Constant, name: limit, value: \"2\"}]
    global: {}
  - name: here
    match: {paths: [/local*]}
    by: [{type: Header, name: x-user}]
    local: {requests: 1, per: 1h}
";
    let lab = Lab::with(checks.grpc, checks.http, &limits(spec)).await;
    for (path, most) in [("/global", 2), ("/local", 1)] {
        for user in ["anna", "ben"] {
            for n in 0..most {
                let (status, head, body) = lab.ask("GET", path, &[("x-user", user)], "").await;
                assert_eq!(status, 200, "{head} {body}");
                assert!(head.contains(&format!(";r={}", most - 1 - n)), "{head}");
            }
            let (status, head, _) = lab.ask("GET", path, &[("x-user", user)], "").await;
            assert_eq!(status, 429);
            assert!(head.contains("ratelimit-policy: \"") && head.contains("retry-after: "), "{head}");
            if path == "/global" {
                let key =
                    format!("x-counted: shop|x-user={user}|identity=cluster.local/ns/web/sa/front|limit=2");
                assert!(head.contains(&key), "{head}");
            }
        }
    }
    assert_eq!(lab.ask("GET", "/other", &[("x-user", "anna")], "").await.0, 200);
    assert_eq!(lab.guards.limits.stats().over.get(), 4);
}

#[tokio::test]
async fn a_service_that_is_away_does_as_the_resource_says() {
    let Some(checks) = checks().await else { return };
    // What is only tried refuses nobody, whatever it says; nor does it where no such service is defined.
    let cases = [("Deny", false, 500), ("Allow", false, 200), ("Deny", true, 200)];
    for (service, (on_failure, dry_run, wanted)) in
        ["away", "gone"].into_iter().flat_map(|service| cases.map(|case| (service, case)))
    {
        let spec = format!(
            "
  global: {{service: {service}.example, port: 80, domain: shop, onFailure: {on_failure}}}
  limits: [{{name: all, by: [{{type: Path}}], global: {{}}, dryRun: {dry_run}}}]
"
        );
        let lab = Lab::with(checks.grpc, checks.http, &limits(&spec)).await;
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, wanted, "{service} {on_failure} {dry_run}");
        assert_eq!(lab.guards.limits.stats().failed.get(), 1);
    }
}
