//! Routes that lead from one service to another: what guards the other is asked, too.

use crate::chain::{Lab, echo, external, free};

/// A waypoint before `shop`, whose routes lead to `other`.
async fn lab(routes: &str, guards: &str) -> Lab {
    let other = external("other", "240.240.0.9", "http", echo().await);
    let service = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
";
    Lab::with(free(), free(), &[&other, service, routes, guards].concat()).await
}

const TO_OTHER: &str = "
  - match: [{uri: {prefix: /rewritten}}]
    rewrite: {uri: /secret}
    route: [{destination: {host: other.example}}]
  - match: [{uri: {prefix: /own}}]
    route: [{destination: {host: shop.example}}]
  - route: [{destination: {host: other.example}}]
";

fn policy(rest: &str) -> String {
    format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: other, namespace: shop}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: other}}]
{rest}
"
    )
}

#[tokio::test]
async fn a_route_gets_nobody_past_the_policies_of_the_service_that_it_leads_to() {
    let deny = policy("  action: DENY\n  rules: [{to: [{operation: {paths: [\"/secret*\"]}}]}]");
    let lab = lab(TO_OTHER, &deny).await;
    for (path, status) in [
        ("/secret", 403),
        ("/open", 200),
        // As the other gets it.
        ("/rewritten", 403),
        // What stays with the service that was called is none of the other's business.
        ("/own/secret", 200),
    ] {
        assert_eq!(lab.ask("GET", path, &[], "").await.0, status, "{path}");
    }
    let who = |account: &str| {
        policy(&format!(
            "  action: ALLOW\n  rules: [{{from: [{{source: {{principals: [cluster.local/ns/web/sa/{account}]}}}}]}}]"
        ))
    };
    for (account, status) in [("front", 200), ("somebody", 403)] {
        let lab = self::lab(TO_OTHER, &who(account)).await;
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, status, "it is the client who is asked about");
    }
}

#[tokio::test]
async fn its_tokens_and_limits_hold_too() {
    let tokens = "
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: other, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: other}]
  jwtRules: [{issuer: a, jwks: \"{\\\"keys\\\":[]}\", outputClaimToHeaders: [{header: x-sub, claim: sub}]}]
";
    let lab = lab(TO_OTHER, tokens).await;
    assert_eq!(lab.ask("GET", "/", &[("Authorization", "Bearer x.y.z")], "").await.0, 401);
    let (status, _, body) = lab.ask("GET", "/", &[("x-sub", "forged"), ("X_Sub", "forged")], "").await;
    assert_eq!((status, body.contains("forged")), (200, false), "{body}");
    assert_eq!(lab.ask("GET", "/own", &[("Authorization", "Bearer x.y.z")], "").await.0, 200);
    let limit = "
---
apiVersion: culvert.dev/v1alpha1
kind: RateLimit
metadata: {name: other, namespace: shop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: other}]
  limits: [{name: few, local: {requests: 2, per: 1h}}]
";
    let lab = self::lab(TO_OTHER, limit).await;
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(lab.ask("GET", "/", &[], "").await.0);
    }
    assert_eq!(statuses, [200, 200, 429]);
    assert_eq!(lab.ask("GET", "/own", &[], "").await.0, 200);
}

#[tokio::test]
async fn no_copy_reaches_a_service_that_would_refuse_it() {
    let routes = "
  - route: [{destination: {host: shop.example}}]
    mirrors: [{destination: {host: other.example}}]
";
    let deny = policy("  action: DENY\n  rules: [{to: [{operation: {paths: [\"/secret*\"]}}]}]");
    let lab = lab(routes, &deny).await;
    for path in ["/secret", "/open"] {
        assert_eq!(lab.ask("GET", path, &[], "").await.0, 200, "{path}");
    }
    let stats = &lab.worker.stats;
    assert_eq!(stats.mirrored.get(), 1);
}

#[tokio::test]
async fn answers_of_our_own_can_be_read_by_pages_of_other_origins() {
    let cors = "corsPolicy: {allowOrigins: [{exact: \"https://page.example\"}]}";
    let routes = format!(
        "
  - match: [{{uri: {{prefix: /moved}}}}]
    redirect: {{uri: /there}}
    {cors}
  - match: [{{uri: {{prefix: /broken}}}}]
    fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}
    route: [{{destination: {{host: shop.example}}}}]
    {cors}
  - route: [{{destination: {{host: shop.example}}}}]
    {cors}
"
    );
    let lab = lab(&routes, "").await;
    for (path, expected) in [("/moved", 301), ("/broken", 418), ("/", 200)] {
        let (status, head, _) = lab.ask("GET", path, &[("Origin", "https://page.example")], "").await;
        assert_eq!(status, expected);
        assert_eq!(head.matches("access-control-allow-origin: https://page.example").count(), 1, "{head}");
        let (_, head, _) = lab.ask("GET", path, &[("Origin", "https://other.example")], "").await;
        assert!(!head.contains("access-control-allow-origin"), "{head}");
    }
}
