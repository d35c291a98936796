//! What is decided over a request, and by what texts of users.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use balance::Client;
use balance::requests::Origin;
use config::compile::Options;
use config::repository::{Content, Repository};
use model::http::{Format, Normalization, Regex, Substitution, Template, WaypointKey, normalize};
use model::telemetry::{Attribute, Expression, Facts, Headers, Missing, Type, Value};
use model::{Mesh, SpiffeId};
use process::logs::LogWriter;
use process::metrics::Registry;
use waypoint::deciding::Deciding;
use waypoint::guards::Guards;
use waypoint::http::decide::{Connection, Decide, Decided, Decision, Dial};
use waypoint::http::h1::HeadParser;
use waypoint::http::head::RequestHead;
use waypoint::providers::fetch::{Fetch, FetchError, Fetching};
use waypoint::telemetry::{Exporters, Settings, Telemetry};
use waypoint::upstream::{ClusterLimits, Clusters, Dialers};

use crate::{seeds_of, text};

const MANIFEST: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: a}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: b, namespace: a, labels: {istio.io/use-waypoint: w}}
spec:
  hosts: [b.example]
  addresses: [240.240.0.1]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 127.0.0.1}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: b, namespace: a}
spec:
  hosts: [b.example]
  http:
  - match:
    - {uri: {regex: "/r/[0-9]+(/.*)?"}, headers: {x-kind: {regex: "a+|b"}}, queryParams: {q: {exact: "1"}}}
    - {uri: {prefix: /Case}, ignoreUriCase: true, method: {exact: GET}, authority: {prefix: b}, withoutHeaders: {x-not: {}}}
    rewrite: {uriRegexRewrite: {match: "^/r/([0-9]+)", rewrite: "/n/\\1"}}
    corsPolicy: {allowOrigins: [{regex: "https://.*[.]example"}], allowMethods: [GET], allowCredentials: true}
    headers: {request: {set: {x-set: "%REQ(x-kind)%"}, remove: [x-gone]}}
    route: [{destination: {host: b.example}}]
  - match: [{uri: {prefix: /old}}]
    redirect: {uri: /new, redirectCode: 308}
  - match: [{uri: {prefix: /p/}}]
    rewrite: {uri: /q/}
    route: [{destination: {host: b.example}}]
  - route: [{destination: {host: b.example}}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: a}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: b}]
  jwtRules: [{issuer: joe, jwks: '{"keys":[]}', outputClaimToHeaders: [{header: x-sub, claim: sub}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: a}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: b}]
  action: DENY
  rules:
  - to: [{operation: {paths: [/admin*, "/x/{*}/y/{**}"]}}]
  - to: [{operation: {hosts: [admin.example], methods: [GET]}}]
  - when: [{key: 'request.headers[x-role]', values: [admin]}]
---
apiVersion: culvert.dev/v1alpha1
kind: RateLimit
metadata: {name: l, namespace: a}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: b}]
  limits:
  - {name: each, by: [{type: Header, name: x-user}, {type: Path}], local: {requests: 1000000, per: 1s}}
  - {name: all, match: {paths: [/l*]}, by: [{type: Address}], local: {requests: 1000000, per: 1s}}
"#;

struct Nothing;

impl Fetch for Nothing {
    fn fetch(&self, url: &str, _: Duration) -> Fetching {
        let error = FetchError::Url(url.to_owned());
        Box::pin(async move { Err(error) })
    }
}

impl Dialers for Nothing {
    fn tunnel(&self, to: model::HboneAddr, _: Arc<[SpiffeId]>) -> Arc<dyn Dial> {
        panic!("a tunnel to {to:?}")
    }
}

/// The decisions, of which no request is ever sent on.
fn deciding() -> &'static (Deciding, tokio::runtime::Runtime) {
    static DECIDING: OnceLock<(Deciding, tokio::runtime::Runtime)> = OnceLock::new();
    DECIDING.get_or_init(|| {
        let mut repository = Repository::new(Options::default());
        repository.stage(&"lab.yaml".into(), Content::Bytes(MANIFEST.as_bytes()));
        let outcome = repository.commit();
        let told = repository.diagnostics();
        assert!(told.iter().all(|d| d.severity != config::diagnostic::Severity::Error), "{told:?}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let client = Client {
            locality: Arc::default(),
            node: "".into(),
            cluster: "".into(),
            network: "".into(),
            address: std::net::Ipv4Addr::LOCALHOST.into(),
        };
        let origin = Origin { client, labels: Arc::default() };
        let writer = LogWriter::start_on(std::io::sink(), 1 << 20, |_| String::new()).expect("a writer");
        let told = Telemetry::new(&Registry::new(), Settings::default(), writer, Exporters::none());
        let guards = Arc::new(Guards::fetching(Arc::new(Nothing), runtime.handle().clone()));
        let clusters = Clusters::new(origin, ClusterLimits::default(), Arc::new(Nothing));
        let own = WaypointKey { namespace: "a".into(), name: "w".into() };
        let deciding = Deciding::new(own, "".into(), clusters, told, guards);
        deciding.update(Arc::new(Mesh::default().apply(outcome.changes)));
        (deciding, runtime)
    })
}

/// Whatever a request is, something is decided over it; and what a policy refuses is never sent on.
pub(crate) fn request(bytes: &[u8]) {
    let (deciding, runtime) = deciding();
    let mut head = RequestHead::default();
    let Ok(Some(_)) = HeadParser::default().request(bytes, &mut head) else { return };
    let connection = Connection {
        client: "10.0.0.8:4000".parse().expect("an address"),
        destination: "240.240.0.1:80".parse().expect("an address"),
        identity: None,
        server_name: None,
        secure: false,
        said: None,
    };
    let _entered = runtime.enter();
    let role = head.fields.joined(b"x-role").map(Cow::into_owned).unwrap_or_default();
    let mut decided = Decided::default();
    if let Decision::Forward { .. } = deciding.decide(&mut head, &connection, &mut decided) {
        let is_path = |start: &str| head.path().starts_with(start);
        assert!(is_path("/") || head.target() == "*", "{:?} is sent on", head.target());
        assert!(!is_path("/admin"), "{:?} is sent on", head.target());
        let mut roles = role.split(|b| *b == b',').map(<[u8]>::trim_ascii);
        assert!(roles.all(|role| role != b"admin"), "a role of {:?} is sent on", role.escape_ascii());
    }
}

pub(crate) fn requests() -> Vec<Vec<u8>> {
    seeds_of(&[
        "GET /r/12/x?q=1 HTTP/1.1\r\nHost: b.example\r\nx-kind: aa\r\nx-gone: 1\r\nOrigin: https://a.example\r\n\r\n",
        "OPTIONS /case HTTP/1.1\r\nHost: b\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: GET\r\n\r\n",
        "GET /a/../admin;x?y HTTP/1.1\r\nHost: admin.example:80\r\nx-role: admin\r\nx-role: user\r\n\r\n",
        "GET /x/a/y/b HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer a.b.c\r\nCookie: a=b\r\n\r\n",
        "POST /p/%2e%2E/%61dmin HTTP/1.1\r\nHost: b\r\nx-user: u\r\nX-Forwarded-For: 1.2.3.4, 5.6.7.8\r\nforwarded: for=x\r\n\r\n",
        "GET /l/old HTTP/1.1\r\nHost: b\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nb3: 0\r\n\r\n",
    ])
}

/// Of each attribute something, or nothing.
struct Known<'a>(&'a str);

impl Facts for Known<'_> {
    fn attribute(&self, attribute: Attribute) -> Result<Value<'_>, Missing> {
        if self.0.is_empty() {
            return Err(Missing);
        }
        let kind = Attribute::ALL.iter().find(|(_, a, _)| *a == attribute).map(|(.., kind)| *kind);
        Ok(match kind {
            Some(Type::Bool) => Value::Bool(true),
            Some(Type::Int) => Value::Int(i64::MAX),
            Some(Type::Float) => Value::Float(0.5),
            _ => Value::Text(Cow::Borrowed(self.0)),
        })
    }

    fn header(&self, _: Headers, name: &str) -> Result<Cow<'_, str>, Missing> {
        if name.len().is_multiple_of(2) { Ok(Cow::Borrowed(self.0)) } else { Err(Missing) }
    }
}

/// Any first line is a pattern, template, format or expression, or refused; the second is what it is held against.
pub(crate) fn matcher(bytes: &[u8]) {
    let Some(text) = text(bytes) else { return };
    let (pattern, subject) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(regex) = Regex::new(pattern) {
        let again = Regex::new(regex.source()).expect("what was taken is taken");
        assert_eq!(regex.matches(subject.as_bytes()), again.matches(subject.as_bytes()));
    }
    if let Ok(substitution) = Substitution::new(pattern, "<\\0\\1>") {
        let _ = substitution.apply(subject);
    }
    if let Ok(Some(template)) = Template::parse(pattern) {
        assert_eq!(
            Template::parse(template.source()).expect("what was taken is taken").as_ref(),
            Some(&template)
        );
    }
    if let Ok(format) = Format::parse(pattern) {
        assert!(format.plain().is_none() || format.parts().len() <= 1);
    }
    if let Ok(expression) = Expression::new(pattern) {
        for facts in [Known(subject), Known("")] {
            let _ = (expression.holds(&facts), expression.text(&facts));
        }
    }
    for how in [
        Normalization::None,
        Normalization::Base,
        Normalization::MergeSlashes,
        Normalization::DecodeAndMergeSlashes,
    ] {
        let Ok(once) = normalize(pattern, how) else { continue };
        assert!(once.starts_with('/') || once == "*", "{pattern:?} became {once:?}");
        if how != Normalization::None {
            assert!(
                !once.split('/').any(|segment| matches!(segment, "." | "..")),
                "{pattern:?} became {once:?}"
            );
            let twice = normalize(&once, how).expect("what is normal is good");
            assert_eq!(once, twice, "{pattern:?} is not normal at once");
        }
    }
}

pub(crate) fn matchers() -> Vec<Vec<u8>> {
    seeds_of(&[
        "(a+|b)[0-9]{1,3}\\.x$\naab12.x",
        "/a/{*}/b/{**}/c\n/a/x/b/y/z/c",
        "%REQ(X-A?:path):12% %START_TIME(%Y-%m)% %% %RESPONSE_CODE%\n",
        "response.code >= 400 && (request.headers['x-a'] == \"b\" || request.path.startsWith('/a'))\n/a/b",
        "has(request.headers['x']) ? size(request.path) + 1 : -request.size % 3\nx",
        "/a/./b/../%2e%2E/c%2Fd\\e//f;g\n",
    ])
}
