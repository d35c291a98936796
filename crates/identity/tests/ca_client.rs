//! The client of a CA, towards CAs that answer as they should not, and over a restart while the CA is away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod mesh;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use identity::{
    CaClient, CaClientError, CaClientSettings, CertificateAuthority, Clock, IssueError, Issuer, KeyStore,
    MadeCa, RootFile, RootId, ServingKey, SigningRequest, TrustBundle, Validity, certificates_to_pem,
};
use mesh::*;
use prost_types::value::Kind;
use proto::wire::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use proto::wire::auth::{IstioCertificateRequest, IstioCertificateResponse};
use rustls_pki_types::UnixTime;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

type Script = Arc<Mutex<Box<dyn Fn(&Seen, Vec<String>) -> Result<Vec<String>, Status> + Send>>>;

/// What a request said.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    token: String,
    cluster: String,
    impersonated: Option<String>,
    trusted: Option<Vec<String>>,
    lifetime: i64,
}

/// A CA whose answers are what the script makes of the right one.
struct ScriptedCa {
    authority: CertificateAuthority,
    seen: Arc<Mutex<Vec<Seen>>>,
    script: Script,
    roots: String,
}

#[tonic::async_trait]
impl IstioCertificateService for ScriptedCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| request.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        let (token, cluster) = (header("authorization"), header("clusterid"));
        let request = request.into_inner();
        let fields = request.metadata.unwrap().fields;
        let impersonated = fields.get("ImpersonatedIdentity").map(|value| match &value.kind {
            Some(Kind::StringValue(text)) => text.clone(),
            other => panic!("{other:?}"),
        });
        let text = |value: &prost_types::Value| match &value.kind {
            Some(Kind::StringValue(text)) => text.clone(),
            other => panic!("{other:?}"),
        };
        let trusted = fields.get("TrustedRoots").map(|value| match &value.kind {
            Some(Kind::ListValue(list)) => list.values.iter().map(text).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        });
        let seen = Seen { token, cluster, impersonated, trusted, lifetime: request.validity_duration };
        self.seen.lock().unwrap().push(seen.clone());
        let who = seen.impersonated.clone().unwrap_or(id("culvert-system/sa/ztunnel").to_string());
        let csr = SigningRequest::from_pem(request.csr.as_bytes()).unwrap();
        let signed = self
            .authority
            .sign(&csr, &who.parse().unwrap(), Validity::of_workloads(), UnixTime::now())
            .unwrap();
        let mut chain: Vec<_> = signed.chain.iter().map(|der| certificates_to_pem([der])).collect();
        chain.push(self.roots.clone());
        let cert_chain = (self.script.lock().unwrap())(&seen, chain)?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

struct Lab {
    root: MadeCa,
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    script: Script,
    dir: tempfile::TempDir,
}

fn root() -> MadeCa {
    CertificateAuthority::make_root(&domain(), Validity::of_roots(), UnixTime::now()).unwrap()
}

fn root_id(made: &MadeCa) -> RootId {
    RootId::of_certificate(&made.chain[0]).unwrap()
}

/// A root's id as it is sent.
fn shown(made: &MadeCa) -> String {
    root_id(made).to_string()
}

impl Lab {
    async fn start() -> Self {
        let root = root();
        let bundle = TrustBundle::new(&root.chain, domains()).unwrap();
        let authority = CertificateAuthority::new(&root.chain, &root.key, &bundle, UnixTime::now()).unwrap();
        let key = ServingKey::default();
        let names = ["localhost".to_owned()];
        key.set(authority.issue_server(&names, Validity::of_workloads(), UnixTime::now()).unwrap().0)
            .unwrap();
        let acceptor =
            tokio_rustls::TlsAcceptor::from(key.server_config(&[b"h2"], &Clock::system()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                if let Ok(tls) = acceptor.accept(tcp).await {
                    let _ = sender.send(Ok::<_, std::io::Error>(tls)).await;
                }
            }
        });
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script: Script = Arc::new(Mutex::new(Box::new(|_, chain| Ok(chain))));
        let roots = certificates_to_pem(&root.chain);
        let ca = ScriptedCa { authority, seen: seen.clone(), script: script.clone(), roots };
        let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let server = tonic::transport::Server::builder().add_service(IstioCertificateServiceServer::new(ca));
        tokio::spawn(server.serve_with_incoming(incoming));
        let dir = memory_dir();
        std::fs::write(dir.path().join("token"), "one\n").unwrap();
        let lab = Self { root, address, seen, script, dir };
        lab.write_roots(&[&lab.root]);
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_roots(&self, roots: &[&MadeCa]) {
        let text: String = roots.iter().map(|made| certificates_to_pem(&made.chain)).collect();
        std::fs::write(self.path("next"), text).unwrap();
        std::fs::rename(self.path("next"), self.path("roots")).unwrap();
    }

    fn script(&self, script: impl Fn(&Seen, Vec<String>) -> Result<Vec<String>, Status> + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    fn settings(&self) -> CaClientSettings {
        let address = format!("https://localhost:{}", self.address.port()).parse().unwrap();
        CaClientSettings {
            report_spread: Duration::ZERO,
            request_timeout: Duration::from_secs(3),
            ..CaClientSettings::new(vec![address], self.path("token"), "west".into())
        }
    }

    fn client(&self, store: Option<KeyStore>) -> CaClient {
        CaClient::start(self.settings(), &self.path("roots"), store, domains(), Clock::system()).unwrap()
    }
}

async fn until(mut condition: impl FnMut() -> bool) {
    let patience = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    patience.await.expect("it does not come");
}

fn roots_of(client: &CaClient) -> Vec<RootId> {
    client.bundle().snapshot().roots().iter().map(|root| root.id).collect()
}

#[tokio::test]
async fn a_request_says_who_asks_for_whom_and_whom_it_trusts() {
    let lab = Lab::start().await;
    let client = lab.client(None);
    let mut reported = client.reported();
    reported.wait_for(|roots| !roots.is_empty()).await.unwrap();
    let own = shown(&lab.root);
    let report = lab.seen.lock().unwrap()[0].clone();
    assert_eq!((report.impersonated, report.trusted), (None, Some(vec![own])));
    std::fs::write(lab.path("token"), " two ").unwrap();
    client.issue(&id("shop/sa/cart")).await.unwrap();
    let expected = Seen {
        token: "Bearer two".into(),
        cluster: "west".into(),
        impersonated: Some("spiffe://cluster.local/ns/shop/sa/cart".into()),
        trusted: None,
        lifetime: 24 * 3600,
    };
    assert_eq!(lab.seen.lock().unwrap().last(), Some(&expected));
}

#[tokio::test]
async fn a_report_is_repeated_until_it_is_answered() {
    let lab = Lab::start().await;
    let failures = Arc::new(Mutex::new(1));
    lab.script(move |seen, chain| {
        let mut left = failures.lock().unwrap();
        if seen.trusted.is_some() && *left > 0 {
            *left -= 1;
            return Err(Status::unavailable("not kept"));
        }
        Ok(chain)
    });
    let client = lab.client(None);
    client.issue(&id("shop/sa/cart")).await.unwrap();
    assert_eq!(*client.reported().borrow(), [], "another request is no report");
    until(|| *client.reported().borrow() == [root_id(&lab.root)]).await;
}

#[tokio::test]
async fn roots_come_from_the_file_and_from_the_answers_and_go_when_neither_has_them() {
    let lab = Lab::start().await;
    let (coming, other) = (root(), root());
    let client = lab.client(None);
    let cart = id("shop/sa/cart");
    client.issue(&cart).await.unwrap();
    assert_eq!(roots_of(&client), [root_id(&lab.root)]);

    let text = certificates_to_pem(&coming.chain);
    lab.script(move |_, mut chain| {
        chain.last_mut().unwrap().push_str(&text);
        Ok(chain)
    });
    client.issue(&cart).await.unwrap();
    assert_eq!(roots_of(&client), [root_id(&lab.root), root_id(&coming)]);
    let told = || lab.seen.lock().unwrap().iter().filter_map(|seen| seen.trusted.clone()).collect::<Vec<_>>();
    assert_eq!(told(), [[shown(&lab.root)]], "the file is what is promised");

    lab.write_roots(&[&lab.root, &other]);
    until(|| told().len() > 1).await;
    assert_eq!(told()[1], [shown(&lab.root), shown(&other)], "the CA is told at once");
    until(|| roots_of(&client).len() == 3).await;

    // The CA no longer says it, the file does; then the file no longer says the other.
    lab.script(|_, chain| Ok(chain));
    client.issue(&cart).await.unwrap();
    assert_eq!(roots_of(&client), [root_id(&lab.root), root_id(&other)]);
    lab.write_roots(&[&lab.root]);
    until(|| roots_of(&client) == [root_id(&lab.root)]).await;

    // A file that is no longer any good changes nothing, and is told.
    std::fs::write(lab.path("roots"), "gone").unwrap();
    until(|| client.root_file().error().is_some()).await;
    let error = client.root_file().error().unwrap();
    assert!(error.contains("istio-ca-root-cert") && error.contains("roots"), "{error}");
    client.issue(&cart).await.unwrap();
    assert_eq!(roots_of(&client), [root_id(&lab.root)]);
}

#[tokio::test]
async fn nonsense_is_an_error_and_changes_nothing() {
    let lab = Lab::start().await;
    let client = lab.client(None);
    let cart = id("shop/sa/cart");
    client.issue(&cart).await.unwrap();
    let before = roots_of(&client);
    let error = async |what: &str| client.issue(&cart).await.expect_err(what).to_string();
    let leaf_as_root = |chain: Vec<String>| vec![chain[0].clone(), chain[0].clone()];
    lab.script(|_, _| Ok(vec![]));
    assert!(error("nothing").await.contains("the chain is empty"));
    lab.script(|_, _| Ok(vec!["hello".into(), "you".into()]));
    assert!(error("garbage").await.contains("part 1 of the chain"));
    lab.script(|_, chain| Ok(vec![chain[0].clone(); 100]));
    assert!(error("endless").await.contains("at most 16"));
    lab.script(|_, chain| Ok(vec![chain[0].clone(), chain[1].repeat(2000)]));
    assert!(error("huge").await.contains("failed"));
    // Another's roots beside its own leaf: what leads nowhere is found by whoever puts it in force.
    lab.script(move |_, chain| Ok(leaf_as_root(chain)));
    let issued = client.issue(&cart).await.unwrap();
    assert_eq!(issued.chain.len(), 2, "a leaf is no root");
    assert_eq!(roots_of(&client), before);

    for (status, refused) in [
        (Status::permission_denied("no pod runs there"), true),
        (Status::unauthenticated("expired"), true),
        (Status::invalid_argument("weak"), true),
        (Status::unavailable("not loaded"), false),
        (Status::resource_exhausted("too often"), false),
        (Status::internal("x"), false),
    ] {
        let text = status.message().to_owned();
        lab.script(move |_, _| Err(status.clone()));
        let error = client.issue(&cart).await.unwrap_err();
        assert_eq!(matches!(error, IssueError::Refused(_)), refused, "{error}");
        let said = error.to_string();
        assert!(said.contains(&text) && said.contains("localhost") && !said.contains("Bearer"), "{said}");
    }
}

#[tokio::test]
async fn roots_that_were_kept_serve_while_the_ca_is_away() {
    let lab = Lab::start().await;
    let coming = root();
    let text = certificates_to_pem(&coming.chain);
    lab.script(move |_, mut chain| {
        chain.last_mut().unwrap().push_str(&text);
        Ok(chain)
    });
    let store = KeyStore::open(&lab.path("keys")).unwrap();
    let client = lab.client(Some(store.clone()));
    client.issue(&id("shop/sa/cart")).await.unwrap();
    assert_eq!(roots_of(&client).len(), 2);
    drop(client);
    lab.script(|_, _| Err(Status::unavailable("away")));
    let again = lab.client(Some(store));
    assert_eq!(roots_of(&again), [root_id(&lab.root), root_id(&coming)]);
    let error = again.issue(&id("shop/sa/cart")).await.unwrap_err();
    assert!(matches!(error, IssueError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn it_does_not_start_without_addresses_or_roots() {
    let lab = Lab::start().await;
    let start = |settings, roots: &Path| {
        CaClient::start(settings, roots, None, domains(), Clock::system()).map(drop).unwrap_err()
    };
    let nobody = CaClientSettings { addresses: vec![], ..lab.settings() };
    assert!(matches!(start(nobody, &lab.path("roots")), CaClientError::NoAddress));
    let error = start(lab.settings(), &lab.path("none")).to_string();
    assert!(error.contains("istio-ca-root-cert") && error.contains("none"), "{error}");
    for (what, text) in [("empty", String::new()), ("a leaf", leaf()), ("huge", "A".repeat(2_000_000))] {
        std::fs::write(lab.path("roots"), text).unwrap();
        let error = start(lab.settings(), &lab.path("roots")).to_string();
        assert!(error.contains("can be used"), "{what}: {error}");
        RootFile::start(&lab.path("roots"), Clock::system()).expect_err(what);
    }
}

fn leaf() -> String {
    let made = root();
    let bundle = TrustBundle::new(&made.chain, domains()).unwrap();
    let authority = CertificateAuthority::new(&made.chain, &made.key, &bundle, UnixTime::now()).unwrap();
    let issued = authority.issue(&id("a/sa/a"), Validity::of_workloads(), UnixTime::now()).unwrap();
    certificates_to_pem(&issued.chain[..1])
}
