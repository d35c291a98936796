//! What routes say is done with requests and answers.

use waypoint::http::Settings;

use crate::lab::{Lab, VIP, echo, external};

const ROUTES: &str = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example]
  http:
  - match: [{uri: {prefix: /away}}]
    redirect: {uri: /new, authority: other.example}
    headers: {response: {set: {cache-control: no-store, x-was: \"%REQ(:PATH)%\"}, remove: [location]}}
  - match: [{uri: {prefix: /query}}]
    redirect: {uri: /new?from=old}
    headers: {response: {add: {x-a: b}}}
  - match: [{uri: {prefix: /says}}]
    directResponse: {status: 418, body: {string: '{}'}}
    headers: {response: {set: {content-type: application/json}, add: {x-a: b}}}
    corsPolicy: {allowOrigins: [{exact: 'https://a.example'}]}
  - match: [{uri: {prefix: /open}}]
    directResponse: {status: 200}
    corsPolicy: {allowOrigins: [{exact: '*'}], allowMethods: [GET]}
  - match: [{uri: {prefix: /aborts}}]
    fault: {abort: {httpStatus: 503, percentage: {value: 100}}}
    headers: {response: {add: {x-a: b}}}
    route: [{destination: {host: shop.example}}]
  - match: [{uri: {prefix: /spared}}]
    fault: {abort: {httpStatus: 503}, delay: {fixedDelay: 1h}}
    route: [{destination: {host: shop.example}}]
";

#[tokio::test]
async fn what_is_asked_of_the_server_as_a_whole_goes_where_its_root_does() {
    let shop = external("shop", VIP, "http", echo().await);
    let route = |http: &str| {
        let head = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: shop, namespace: shop}\n";
        format!("\n---\n{head}spec:\n  hosts: [shop.example]\n  http:\n  - {http}\n")
    };
    let to = "route: [{destination: {host: shop.example}}]";
    for (routes, status, wanted) in [
        (String::new(), 200, "options * http/1.1"),
        (route(to), 200, "options * http/1.1"),
        (
            route(&format!("match: [{{uri: {{prefix: /}}, method: {{exact: OPTIONS}}}}]\n    {to}")),
            200,
            "options * http/1.1",
        ),
        // It is no path that could be another.
        (route(&format!("rewrite: {{uri: /new}}\n    {to}")), 200, "options * http/1.1"),
        (route(&format!("match: [{{uri: {{prefix: /api}}}}]\n    {to}")), 404, ""),
        (route("redirect: {authority: b.example}"), 301, "location: http://b.example/\r\n"),
        (route("redirect: {uri: /new}"), 301, "location: http://shop.example/new\r\n"),
        (route("directResponse: {status: 204}"), 204, ""),
    ] {
        let lab = Lab::new(&[shop.clone(), routes.clone()].concat(), Settings::default()).await;
        let (got, head, body) = lab.ask("OPTIONS", "*", &[], "").await;
        let all = format!("{head}\r\n\r\n{}", body.to_ascii_lowercase());
        assert!(got == status && all.contains(wanted), "{routes}: {all}");
    }
}

#[tokio::test]
async fn what_is_kept_from_all_paths_is_kept_from_the_server_as_a_whole() {
    let deny = |path: &str| {
        let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: shut, namespace: shop}";
        let to = "targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]";
        format!(
            "\n---\n{head}\nspec:\n  {to}\n  action: DENY\n  rules: [{{to: [{{operation: {{paths: ['{path}']}}}}]}}]\n"
        )
    };
    let shop = external("shop", VIP, "http", echo().await);
    for (path, status) in [("/*", 403), ("/", 403), ("*", 403), ("/admin*", 200)] {
        let lab = Lab::new(&[shop.clone(), deny(path)].concat(), Settings::default()).await;
        assert_eq!(lab.ask("OPTIONS", "*", &[], "").await.0, status, "{path}");
    }
}

#[tokio::test]
async fn routes_change_the_answers_that_are_their_own() {
    let resources = [external("shop", VIP, "http", echo().await), ROUTES.to_owned()].concat();
    let lab = Lab::new(&resources, Settings::default()).await;
    let get = async |path: &str| lab.ask("GET", path, &[("origin", "https://a.example")], "").await;

    let (status, head, _) = get("/away?a=1").await;
    assert_eq!(status, 301);
    assert!(head.contains("cache-control: no-store") && head.contains("x-was: /away?a=1"), "{head}");
    assert!(!head.contains("location:"), "{head}");

    // A query that the redirect has takes the place of the request's.
    for path in ["/query", "/query?a=1"] {
        let (status, head, _) = get(path).await;
        assert_eq!(status, 301);
        assert!(head.contains("location: http://shop.example/new?from=old\r\n"), "{head}");
        assert!(head.contains("x-a: b"), "{head}");
    }

    let (status, head, body) = get("/says").await;
    assert_eq!((status, &*body), (418, "{}"));
    assert_eq!(head.matches("content-type: ").count(), 1, "{head}");
    assert!(head.contains("content-type: application/json") && head.contains("x-a: b"), "{head}");
    assert!(head.contains("access-control-allow-origin: https://a.example"), "{head}");

    // An asterisk is every origin, as in Envoy.
    let (_, head, _) = get("/open").await;
    assert!(head.contains("access-control-allow-origin: https://a.example"), "{head}");

    // What is made to fail is no answer of the route's.
    let (status, head, _) = get("/aborts").await;
    assert!(status == 503 && !head.contains("x-a: b"), "{head}");
    // A fault is that of no request where it says no share of them.
    assert_eq!(get("/spared").await.0, 200);
}

#[tokio::test]
async fn what_a_consumers_route_leaves_is_told_as_having_no_route() {
    let route = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: mine, namespace: web}
spec:
  parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop, namespace: shop}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /mine}}]
    backendRefs: [{group: networking.istio.io, kind: Hostname, name: shop.example, port: 80}]
";
    let shop = external("shop", VIP, "http", echo().await);
    let lab = Lab::new(&[&shop, route].concat(), Settings::default()).await;
    assert_eq!(lab.ask("GET", "/mine", &[], "").await.0, 200);
    assert_eq!(lab.ask("GET", "/other", &[], "").await.0, 404);
    let lines = || String::from_utf8(lab.kept.0.lock().unwrap().clone()).unwrap();
    let begin = tokio::time::Instant::now();
    while lines().lines().count() < 2 {
        assert!(begin.elapsed() < crate::lab::LONG, "{}", lines());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let line = lines().lines().find(|line| line.contains("/other")).unwrap().to_owned();
    assert!(line.contains(r#""flags":"NR""#) && line.contains(r#""details":"route_not_found""#), "{line}");
    assert!(!line.contains(r#""route":"#), "{line}");
}
