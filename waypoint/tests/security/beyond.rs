//! Routes that lead from one service to another: what guards the other is asked, too.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::lab::{Lab, checks, custom, echo, external, free, limits, mesh_config};

/// A waypoint before `shop`, whose routes lead to `other`.
async fn lab(routes: &str, guards: &str) -> Lab {
    let other = external("other", "240.240.0.9", "http", echo().await);
    lab_to(&other, free(), routes, guards).await
}

/// The same, where the service that routes may lead to is `other`, and the authorizer over HTTP is at `http`.
async fn lab_to(other: &str, http: SocketAddr, routes: &str, guards: &str) -> Lab {
    let service = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
";
    Lab::with(free(), http, &[other, service, routes, guards].concat()).await
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

/// A policy for `target`.
fn of(target: &str, name: &str, rest: &str) -> String {
    let group = if target == "waypoint" { "gateway.networking.k8s.io" } else { "networking.istio.io" };
    let kind = if target == "waypoint" { "Gateway" } else { "ServiceEntry" };
    format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{{group: {group}, kind: {kind}, name: {target}}}]
{rest}
"
    )
}

fn allow(account: &str) -> String {
    let who = format!("{{principals: [cluster.local/ns/web/sa/{account}]}}");
    format!("  action: ALLOW\n  rules: [{{from: [{{source: {who}}}]}}]")
}

fn deny(operation: &str) -> String {
    format!("  action: DENY\n  rules: [{{to: [{{operation: {{{operation}}}}}]}}]")
}

#[tokio::test]
async fn policies_of_both_are_asked_again_about_what_the_other_gets() {
    let all = |rest: &str| of("waypoint", "all", rest);
    for (policies, path, status, what) in [
        // The client of the lab is `front`.
        (
            all(&allow("other")) + &of("shop", "own", &allow("front")),
            "/",
            403,
            "an ALLOW of the called one's",
        ),
        (all(&allow("other")) + &of("shop", "own", &allow("front")), "/own", 200, "and that is enough there"),
        (
            all(&allow("front")) + &of("other", "own", &allow("other")),
            "/",
            200,
            "either ALLOW of the other's",
        ),
        (all(&deny("paths: [/secret*]")), "/rewritten", 403, "a path that it is given"),
        (all(&deny("paths: [/secret*]")), "/open", 200, "another path"),
        (all(&deny("paths: [/rewritten]")), "/rewritten", 403, "the path that it had"),
        (all(&deny("hosts: [other.example]")), "/", 200, "the host as it is sent"),
    ] {
        let lab = lab(TO_OTHER, &policies).await;
        assert_eq!(lab.ask("GET", path, &[], "").await.0, status, "{what}");
    }
    for (port, status) in [(8080, 403), (81, 200)] {
        let other = external("other", "240.240.0.9", "http", echo().await);
        let other = other.replace("number: 80,", "number: 8080,");
        let lab = lab_to(&other, free(), TO_OTHER, &all(&deny(&format!("ports: [\"{port}\"]")))).await;
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, status, "the port that it is led to");
        assert_eq!(lab.ask("GET", "/own", &[], "").await.0, 200);
    }
}

/// A key, and the set that an issuer would publish.
fn signing_key() -> (EcdsaKeyPair, String) {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let point = key.public_key().as_ref();
    let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
    let jwks = json!({"keys": [{"kty": "EC", "crv": "P-256", "x": x, "y": y}]}).to_string();
    (key, jwks)
}

/// What `Authorization` has for `admin`, of the issuer `mine`.
fn token(key: &EcdsaKeyPair) -> String {
    let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let message = [json!({"alg": "ES256"}), json!({"iss": "mine", "sub": "admin", "exp": 4_102_444_800_u64})]
        .map(|part| b64(part.to_string().as_bytes()))
        .join(".");
    let signature = key.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
    format!("Bearer {message}.{}", b64(signature.as_ref()))
}

#[tokio::test]
async fn a_token_that_the_called_service_alone_believes_satisfies_no_policy_of_both() {
    let (key, jwks) = signing_key();
    let bearer = token(&key);
    let tokens = |target: &str| {
        format!(
            "
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: shop}}
spec:
  targetRefs: [{target}]
  jwtRules: [{{issuer: mine, jwks: '{jwks}'}}]
"
        )
    };
    let known = of("waypoint", "known", "  rules: [{from: [{source: {requestPrincipals: [\"*\"]}}]}]");
    let other = external("other", "240.240.0.9", "http", echo().await).replace(
        "namespace: shop, labels: {",
        "namespace: b, labels: {istio.io/use-waypoint-namespace: shop, ",
    );
    for (target, status) in [
        ("{group: networking.istio.io, kind: ServiceEntry, name: shop}", 403),
        // Both believe it; it is gone from the request by then.
        ("{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}", 200),
    ] {
        let lab = lab_to(&other, free(), TO_OTHER, &[&*tokens(target), &known].concat()).await;
        assert_eq!(lab.ask("GET", "/own", &[("Authorization", &bearer)], "").await.0, 200, "{target}");
        assert_eq!(lab.ask("GET", "/", &[("Authorization", &bearer)], "").await.0, status, "{target}");
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, 403, "{target}");
    }
}

#[tokio::test]
async fn an_authorizer_of_both_is_asked_again_where_the_request_has_changed() {
    let providers = "
  - name: web
    envoyExtAuthzHttp: {service: authz-http.example, port: 80}
";
    let custom = of("waypoint", "web", "  action: CUSTOM\n  provider: {name: web}\n  rules: [{}]");
    let other = external("other", "240.240.0.9", "http", echo().await);
    let guards = [mesh_config(providers), custom].concat();
    let copying = "
  - match: [{uri: {prefix: /rewritten}}]
    rewrite: {uri: /secret}
    route: [{destination: {host: shop.example}}]
    mirrors: [{destination: {host: other.example}}]
  - route: [{destination: {host: shop.example}}]
    mirrors: [{destination: {host: other.example}}]
";
    for (routes, path, asked, copies) in [
        (TO_OTHER, "/own", 1, 0),
        (TO_OTHER, "/open", 1, 0),
        (TO_OTHER, "/rewritten", 2, 0),
        // Nobody is asked about a copy.
        (copying, "/open", 1, 1),
        (copying, "/rewritten", 1, 0),
    ] {
        let lab = lab_to(&other, echo().await, routes, &guards).await;
        assert_eq!(lab.ask("GET", path, &[], "").await.0, 200, "{path}");
        assert_eq!(lab.guards.authorizers.allowed.get(), asked, "{path}");
        assert_eq!(lab.worker.stats.mirrored.get(), copies, "{path}");
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
    // One that both have is taken from once.
    let (theirs, both) = (
        "{group: networking.istio.io, kind: ServiceEntry, name: other}",
        "{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}",
    );
    let lab = self::lab(TO_OTHER, &limit.replace(theirs, both)).await;
    for status in [200, 200, 429] {
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, status);
    }
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
    let policies = of("waypoint", "all", &allow("other")) + &of("shop", "own", &allow("front"));
    let lab = self::lab(routes, &policies).await;
    assert_eq!(lab.ask("GET", "/", &[], "").await.0, 200);
    assert_eq!(lab.worker.stats.mirrored.get(), 0, "one of the called one's own lets nobody in there");
}

/// A server that answers 200, with `fields`, and writes down what it was sent.
async fn recorder(at: &str, fields: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind(at).await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
    let written = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = Arc::clone(&written);
            tokio::spawn(async move {
                let mut text = Vec::new();
                while stream.read_buf(&mut text).await.unwrap_or(0) > 0 {
                    if text.ends_with(b"\r\n\r\n") {
                        let text = String::from_utf8(std::mem::take(&mut text)).unwrap();
                        seen.lock().unwrap().push(text.to_ascii_lowercase());
                        let head = format!("HTTP/1.1 200 OK\r\n{fields}content-length: 0\r\n\r\n");
                        stream.write_all(head.as_bytes()).await.unwrap();
                    }
                }
            });
        }
    });
    (address, seen)
}

#[tokio::test]
async fn tokens_and_limits_of_a_service_hold_for_copies_that_it_gets() {
    let routes = "
  - route: [{destination: {host: shop.example}}]
    mirrors: [{destination: {host: other.example}}]
";
    let (key, jwks) = signing_key();
    let bearer = token(&key);
    let guards = format!(
        "
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: other, namespace: shop}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: other}}]
  jwtRules: [{{issuer: mine, jwks: '{jwks}', outputClaimToHeaders: [{{header: x-sub, claim: sub}}]}}]
---
apiVersion: culvert.dev/v1alpha1
kind: RateLimit
metadata: {{name: other, namespace: shop}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: other}}]
  limits: [{{name: few, local: {{requests: 2, per: 1h}}}}]
"
    );
    let (to, seen) = recorder("127.0.0.1:0", "").await;
    let lab = lab_to(&external("other", "240.240.0.9", "http", to), free(), routes, &guards).await;
    let asks: [(&[(&str, &str)], u64); 4] = [
        // It would be answered 401.
        (&[("Authorization", "Bearer x.y.z")], 0),
        (&[("x-sub", "forged"), ("X_Sub", "forged")], 1),
        (&[("Authorization", &bearer), ("x-sub", "forged")], 2),
        // There is room for two.
        (&[], 2),
    ];
    for (fields, copies) in asks {
        let (status, _, body) = lab.ask("GET", "/", fields, "").await;
        let untouched = fields.iter().all(|(_, value)| body.contains(value));
        assert_eq!((status, untouched), (200, true), "the called service gets it as it came: {body}");
        assert_eq!(lab.worker.stats.mirrored.get(), copies, "{fields:?}");
    }
    assert_eq!(lab.guards.copies_refused.get(), 2);
    let seen = written(&seen, 2).await;
    assert!(seen.iter().all(|copy| !copy.contains("forged") && !copy.contains("bearer")), "{seen:?}");
    assert_eq!(seen.iter().filter(|copy| copy.contains("x-sub: admin")).count(), 1, "{seen:?}");
}

#[tokio::test]
async fn workloads_that_no_waypoint_stands_before_are_asked_about_what_they_get() {
    // What is at one address is one workload.
    let (to, _) = recorder("127.0.0.2:0", "").await;
    let other = external("other", "240.240.0.9", "http", to).replace("use-waypoint", "none");
    let other = other.replace("number: 80,", "number: 8080,");
    let other = other.replace("address: 127.0.0.2", "address: 127.0.0.2, labels: {app: other}");
    let selecting = |rest: &str| {
        format!(
            "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: other, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: other}}}}
{rest}
"
        )
    };
    for (rest, path, status, what) in [
        (deny("paths: [/secret*]"), "/rewritten", 403, "a path that it is given"),
        (deny("paths: [/secret*]"), "/open", 200, "another path"),
        (deny("paths: [/rewritten]"), "/rewritten", 403, "the path that it had"),
        (deny("ports: [\"8080\"]"), "/open", 403, "the port that it is led to"),
        (deny("ports: [\"8080\"]"), "/own", 200, "where it is not led"),
    ] {
        let lab = lab_to(&other, free(), TO_OTHER, &selecting(&rest)).await;
        assert_eq!(lab.ask("GET", path, &[], "").await.0, status, "{what}");
    }
}

/// What is written at `seen`, as soon as that are `count`.
async fn written(seen: &Mutex<Vec<String>>, count: usize) -> Vec<String> {
    let begun = tokio::time::Instant::now();
    while seen.lock().unwrap().len() < count {
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "it does not come");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    seen.lock().unwrap().clone()
}

#[tokio::test]
async fn a_path_that_a_route_makes_is_in_the_form_that_policies_compare() {
    let routes = "
  - match: [{uri: {prefix: /open}}]
    rewrite: {uri: /}
    route: [{destination: {host: other.example}}]
";
    let deny = policy("  action: DENY\n  rules: [{to: [{operation: {paths: [\"/secret*\"]}}]}]");
    let merging = "
---
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {pathNormalization: {normalization: MERGE_SLASHES}}
";
    let plain = lab(routes, &deny).await;
    let merging = lab(routes, &[merging, &deny].concat()).await;
    for (lab, path, status) in [
        (&plain, "/open../secret", 403),
        (&plain, "/open%2e%2e/secret", 403),
        (&plain, "/open../fine", 200),
        (&merging, "/open/secret", 403),
        (&merging, "/open/fine", 200),
    ] {
        assert_eq!(lab.ask("GET", path, &[], "").await.0, status, "{path}");
    }
}

#[tokio::test]
async fn a_path_that_a_route_makes_and_that_has_no_safe_reading_goes_nowhere() {
    let routes = "
  - match: [{uri: {prefix: /open}}]
    rewrite: {uri: '/a%0'}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /regex}}]
    rewrite: {uriRegexRewrite: {match: '^/regex(.*)$', rewrite: '/a%\\1'}}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /none}}]
    rewrite: {uriRegexRewrite: {match: '^/none/(.*)$', rewrite: '\\1'}}
    route: [{destination: {host: shop.example}}]
";
    let lab = lab(routes, "").await;
    for (path, status, what) in [
        ("/open0", 400, "a NUL that nobody wrote"),
        ("/open1", 200, "another character"),
        ("/regex00", 400, "the same by an expression"),
        ("/regex2fb", 200, "a slash"),
        ("/none/a", 500, "no path"),
        ("/none//a", 200, "a path"),
    ] {
        let (got, _, body) = lab.ask("GET", path, &[], "").await;
        assert_eq!(got, status, "{what}: {body}");
    }
}

/// An authorizer over HTTP that gives what it lets pass an `x-credential`.
const INJECTING: &str = "
  - name: web
    envoyExtAuthzHttp: {service: authz-http.example, port: 80, headersToUpstreamOnAllow: [x-credential]}
";

#[tokio::test]
async fn what_guards_the_back_end_says_to_it_is_in_no_copy() {
    let routes = "
  - route: [{destination: {host: other.example}}]
    mirrors: [{destination: {host: third.example}}]
";
    let (authorizer, _) = recorder("127.0.0.1:0", "x-credential: secret\r\n").await;
    let (to, seen) = recorder("127.0.0.1:0", "").await;
    let (copied_to, copies) = recorder("127.0.0.1:0", "").await;
    let other = external("other", "240.240.0.9", "http", to);
    let third = external("third", "240.240.0.10", "http", copied_to);
    let custom = of("other", "web", "  action: CUSTOM\n  provider: {name: web}\n  rules: [{}]");
    let guards = [mesh_config(INJECTING), custom].concat();
    let lab = lab_to(&[other, third].concat(), authorizer, routes, &guards).await;
    assert_eq!(lab.ask("GET", "/", &[], "").await.0, 200);
    let (seen, copies) = (written(&seen, 1).await, written(&copies, 1).await);
    assert!(seen[0].contains("x-credential: secret"), "{seen:?}");
    assert!(!copies[0].contains("x-credential"), "{copies:?}");
}

#[tokio::test]
async fn a_route_has_no_say_in_what_tokens_say_to_another_service() {
    let (key, jwks) = signing_key();
    let bearer = token(&key);
    let shared = format!(
        "
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: shared, namespace: shop}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}}]
  jwtRules: [{{issuer: mine, jwks: '{jwks}', outputClaimToHeaders: [{{header: x-sub, claim: sub}}]}}]
"
    );
    let set = "headers: {request: {set: {x-sub: forged, x_sub: forged, x-more: set}}}";
    let routes = format!(
        "
  - match: [{{uri: {{prefix: /copied}}}}]
    route: [{{destination: {{host: shop.example}}}}]
    mirrors: [{{destination: {{host: other.example}}}}]
    {set}
  - route: [{{destination: {{host: other.example}}}}]
    {set}
"
    );
    for path in ["/", "/copied"] {
        let (to, seen) = recorder("127.0.0.1:0", "").await;
        let lab = lab_to(&external("other", "240.240.0.9", "http", to), free(), &routes, &shared).await;
        for (count, fields) in [(1, &[][..]), (2, &[("Authorization", &*bearer)][..])] {
            assert_eq!(lab.ask("GET", path, fields, "").await.0, 200, "{path}");
            let seen = written(&seen, count).await;
            let last = &seen[count - 1];
            assert!(!last.contains("forged") && last.contains("x-more: set"), "{path}: {last}");
            assert_eq!(last.contains("x-sub: admin"), count == 2, "{path}: {last}");
        }
    }
}

#[tokio::test]
async fn workloads_are_asked_about_what_an_authorizer_has_added() {
    let (authorizer, _) = recorder("127.0.0.1:0", "x-credential: secret\r\n").await;
    // What is at one address is one workload.
    let (to, _) = recorder("127.0.0.2:0", "").await;
    let other = external("other", "240.240.0.9", "http", to).replace("use-waypoint", "none");
    let other = other.replace("address: 127.0.0.2", "address: 127.0.0.2, labels: {app: other}");
    let custom = of("shop", "web", "  action: CUSTOM\n  provider: {name: web}\n  rules: [{}]");
    let deny = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: other, namespace: shop}
spec:
  selector: {matchLabels: {app: other}}
  action: DENY
  rules: [{when: [{key: \"request.headers[x-credential]\", values: [secret]}]}]
";
    let routes = "
  - match: [{uri: {prefix: /own}}]
    route: [{destination: {host: shop.example}}]
  - route: [{destination: {host: other.example}}]
";
    let guards = [&mesh_config(INJECTING), &*custom, deny].concat();
    let lab = lab_to(&other, authorizer, routes, &guards).await;
    assert_eq!(lab.ask("GET", "/own", &[], "").await.0, 200);
    assert_eq!(lab.ask("GET", "/", &[], "").await.0, 403);
}

#[tokio::test]
async fn workloads_are_asked_about_what_a_rate_limit_service_has_added() {
    let Some(checks) = checks().await else { return };
    // What is at one address is one workload.
    let (to, _) = recorder("127.0.0.2:0", "").await;
    let other = external("other", "240.240.0.9", "http", to).replace("use-waypoint", "none");
    let other = other.replace("address: 127.0.0.2", "address: 127.0.0.2, labels: {app: other}");
    let rest = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: other, namespace: shop}
spec:
  selector: {matchLabels: {app: other}}
  action: DENY
  rules: [{when: [{key: \"request.headers[x-credential]\", values: [secret]}]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
  - match: [{uri: {prefix: /own}}]
    route: [{destination: {host: shop.example}}]
  - route: [{destination: {host: other.example}}]
";
    for (added, status) in [("secret", 403), ("nothing", 200)] {
        let limit = limits(&format!(
            "
  global: {{service: authz.example, port: 80, domain: shop, timeout: 5s, onFailure: Deny}}
  limits:
  - name: all
    by: [{{type: Constant, name: add, value: {added}}}, {{type: Constant, name: limit, value: \"9\"}}]
    global: {{}}
"
        ));
        let lab = Lab::with(checks.grpc, free(), &[&*other, rest, &limit].concat()).await;
        let (own, _, body) = lab.ask("GET", "/own", &[], "").await;
        assert_eq!((own, body.contains(&format!("x-credential: {added}"))), (200, true), "{body}");
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, status, "{added}");
    }
}

#[tokio::test]
async fn nobody_who_guards_a_service_says_who_the_client_is() {
    const FORGING: &str = "x-credential: secret\r\nX-Forwarded-Client-Cert: forged\r\n";
    let (authorizer, _) = recorder("127.0.0.1:0", FORGING).await;
    let providers = INJECTING.replace("[x-credential]", "[x-credential, x-forwarded-client-cert]");
    let lab = Lab::with(free(), authorizer, &[mesh_config(&providers), custom("web")].concat()).await;
    let (status, _, body) = lab.ask("GET", "/ask", &[], "").await;
    assert_eq!((status, body.contains("x-credential: secret")), (200, true), "{body}");
    assert!(!body.contains("forged"), "{body}");

    let Some(checks) = checks().await else { return };
    let limit = limits(
        "
  global: {service: authz.example, port: 80, domain: shop, timeout: 5s, onFailure: Deny}
  limits:
  - name: all
    by: [{type: Constant, name: add, value: secret}, {type: Constant, name: limit, value: \"9\"}]
    global: {}
",
    );
    let calling = "
  - name: grpc
    envoyExtAuthzGrpc: {service: authz.example, port: 80}
";
    let asking = mesh_config(calling) + &custom("grpc");
    for (guard, added) in [(&limit, "x-credential: secret"), (&asking, "x-told: ")] {
        let lab = Lab::with(checks.grpc, free(), guard).await;
        let (status, _, body) = lab.ask("GET", "/ask", &[], "").await;
        assert_eq!((status, body.contains(added)), (200, true), "{body}");
        assert!(!body.contains("forged"), "{body}");
    }
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
