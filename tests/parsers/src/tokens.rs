//! What clients send as tokens, and issuers as their keys.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::http::HttpService;
use model::{Mesh, ServiceKey};
use waypoint::filters::jwt::{Authenticator, Outcome, Patience};
use waypoint::http::head::{RequestHead, is_field_value};
use waypoint::providers::fetch::{Fetch, FetchError, Fetching};
use waypoint::providers::jwks::Jwks;
use waypoint::providers::keys::{Algorithm, KeySet};

use crate::seeds_of;

/// Of RFC 7515 appendix A.3 and RFC 8037 appendix A.2.
const KEYS: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
"y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},
{"kty":"OKP","crv":"Ed25519","kid":"a","use":"sig","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
/// Of RFC 7515 appendix A.3: good, and expired since 2011.
const TOKEN: &str = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";

struct Nowhere;

impl Fetch for Nowhere {
    fn fetch(&self, url: &str, _: Duration) -> Fetching {
        let error = FetchError::Url(url.to_owned());
        Box::pin(async move { Err(error) })
    }
}

struct Lab {
    mesh: Mesh,
    service: Arc<HttpService>,
    authenticator: Authenticator,
    _runtime: tokio::runtime::Runtime,
}

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let keys = serde_json::to_string(KEYS).expect("a text");
        let text = format!(
            "
{{apiVersion: v1, kind: Service, metadata: {{name: b, namespace: a, labels: {{istio.io/use-waypoint: w}}}},
  spec: {{clusterIP: 10.9.0.1, ports: [{{port: 80}}]}}}}
---
{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: w, namespace: a}},
  spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}}}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: r, namespace: a}}
spec:
  jwtRules:
  - {{issuer: joe, jwks: {keys}, fromHeaders: [{{name: authorization, prefix: \"Bearer \"}}], fromParams: [t], fromCookies: [t]}}
"
        );
        let mut repository = Repository::new(Options::default());
        repository.stage(&"lab.yaml".into(), Content::Bytes(text.as_bytes()));
        let mesh = Mesh::default().apply(repository.commit().changes);
        let key = ServiceKey { namespace: "a".into(), hostname: "b.a.svc.cluster.local".into() };
        let service = mesh.http_service(&key).expect("the service is bound").clone();
        assert_eq!(service.authentication.len(), 1);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let keys = Arc::new(Jwks::new(Arc::new(Nowhere), runtime.handle().clone()));
        keys.follow(&mesh);
        Lab { mesh, service, authenticator: Authenticator::new(keys, 64), _runtime: runtime }
    })
}

/// No bytes are a token that is taken: the only good one of these keys is expired. Wherever they stand, what only we say
/// is gone afterwards.
pub(crate) fn token(bytes: &[u8]) {
    let lab = lab();
    if !is_field_value(bytes) {
        return;
    }
    let text = String::from_utf8_lossy(bytes);
    let printable = text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    for place in 0..3 {
        let mut head = RequestHead::default();
        head.set_method("GET");
        head.set_authority("b");
        head.set_target("/");
        match place {
            0 => head.fields.push(b"authorization", &[b"Bearer ", bytes].concat()),
            1 => head.fields.push(b"cookie", &[b"t=", bytes].concat()),
            _ if printable => head.set_target(&format!("/?t={text}")),
            _ => continue,
        }
        match lab.authenticator.authenticate(&lab.mesh, &lab.service, &mut head, Patience::Spent) {
            Outcome::Passed(None) => {}
            Outcome::Passed(Some(claims)) => panic!("taken: {claims:?}"),
            Outcome::Refused(response, _) => assert!(matches!(response.status, 401 | 403)),
            Outcome::Wait(_) => panic!("the keys are here"),
        }
    }
}

pub(crate) fn tokens() -> Vec<Vec<u8>> {
    seeds_of(&[
        TOKEN,
        "eyJhbGciOiJub25lIn0.eyJpc3MiOiJqb2UifQ.",
        "eyJhbGciOiJIUzI1NiIsImtpZCI6ImEifQ.eyJpc3MiOiJqb2UiLCJhdWQiOlsiYSJdfQ.AAAA",
        "eyJhbGciOiJFZERTQSIsImtpZCI6ImEifQ.eyJpc3MiOiJqb2UiLCJuYmYiOjF9.AAAA",
    ])
}

/// Any bytes are keys, of which none vouches for what no one has signed, or are refused.
pub(crate) fn key_set(bytes: &[u8]) {
    let Ok(keys) = KeySet::parse(bytes) else { return };
    for algorithm in
        [Algorithm::Es256, Algorithm::Es512, Algorithm::EdDsa, Algorithm::Rs256, Algorithm::Ps512]
    {
        for kid in [None, Some("a")] {
            assert!(keys.verify(algorithm, kid, b"of nobody", &[1; 64]).is_err());
        }
    }
}

pub(crate) fn key_sets() -> Vec<Vec<u8>> {
    seeds_of(&[
        KEYS,
        r#"{"keys":[{"kty":"RSA","alg":"RS256","n":"AQAB","e":"AQAB"},{"kty":"oct","k":"AA"}]}"#,
        r#"{"keys":[{"kty":"EC","crv":"P-521","x":"AA","y":"AA","key_ops":["verify"]}]}"#,
    ])
}
