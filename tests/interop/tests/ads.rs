//! Envoy as a delta ADS client of our server: it subscribes to clusters, acknowledges, refuses, and comes back after a
//! restart of the server with the versions that it has. The clusters' bytes are put together here.
//!
//! Without a network to install Envoy from this test says so and passes, unless `CI_REQUIRE_INTEROP=1`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use interop::Envoy;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Status};
use xds::server::{Authorizer, Caller, Change, Config, Event, Holds, Observer, Resource, Server};

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const SOON: Duration = Duration::from_secs(30);

struct Anyone;

#[tonic::async_trait]
impl Authorizer for Anyone {
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status> {
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer envoy's");
        Ok(Caller { name: "envoy".into() })
    }
}

#[derive(Default)]
struct Pushed(AtomicUsize);

impl Observer for Pushed {
    fn observe(&self, event: Event<'_>) {
        if let Event::Pushed { resources, .. } = event {
            self.0.fetch_add(resources, Ordering::Relaxed);
        }
    }
}

struct Site {
    server: Server,
    address: SocketAddr,
    pushed: Arc<Pushed>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn site(address: &str) -> Site {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    };
    let address = listener.local_addr().unwrap();
    let pushed = Arc::new(Pushed::default());
    let config = Config { types: vec![CLUSTER], ..Config::default() };
    let server = Server::new(config, Arc::new(Anyone), Arc::clone(&pushed) as Arc<dyn Observer>);
    let router = tonic::transport::Server::builder().add_service(server.service());
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped).await.unwrap();
    });
    Site { server, address, pushed, stop, task }
}

/// envoy.config.cluster.v3.Cluster: name 1; type 2, of which 3 is EDS, which needs more than is here.
fn cluster(name: &str, good: bool, alternative_name: &str) -> Change {
    let mut body = vec![1 << 3 | 2, name.len() as u8];
    body.extend_from_slice(name.as_bytes());
    if !good {
        body.extend_from_slice(&[2 << 3, 3]);
    }
    // alt_stat_name 28, so that there is something to change.
    body.extend_from_slice(&[0xe2, 0x01, alternative_name.len() as u8]);
    body.extend_from_slice(alternative_name.as_bytes());
    let body = Some(Bytes::from(body));
    let name = name.into();
    Change::Set(Resource {
        type_url: CLUSTER,
        name,
        aliases: vec![],
        scope: None,
        plain: body.clone(),
        culvert: body,
        needs: proto::Features::NONE,
    })
}

fn configuration(xds: SocketAddr) -> String {
    format!(
        r#"
node: {{ id: envoy-1, cluster: test }}
dynamic_resources:
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    grpc_services:
    - envoy_grpc: {{ cluster_name: xds }}
      initial_metadata: [{{ key: authorization, value: "Bearer envoy's" }}]
  cds_config: {{ resource_api_version: V3, ads: {{}} }}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}
    load_assignment:
      cluster_name: xds
      endpoints:
      - lb_endpoints:
        - endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }}
"#,
        xds.port()
    )
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waited = timeout(SOON, async {
        while !holds() {
            sleep(Duration::from_millis(50)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_follows_clusters_of_ours() {
    let first = site("127.0.0.1:0").await;
    first.server.apply([cluster("one", true, "a"), cluster("two", true, "a")]);
    first.server.ready();
    let configuration = configuration(first.address);
    let started = tokio::task::spawn_blocking(move || Envoy::start(|_| configuration)).await.unwrap();
    let envoy = match started {
        Ok(envoy) => envoy,
        Err(error) => {
            assert!(std::env::var_os("CI_REQUIRE_INTEROP").is_none(), "{error}");
            println!("skipped: {error}");
            return;
        }
    };
    let stat = |name: &str| envoy.stat(name).unwrap_or_default();
    // Ours, and that of the server itself.
    until("two clusters", || stat("cluster_manager.active_clusters") == 3).await;
    let made = first.server.generation();
    let holds =
        |site: &Site, name: &str, made| site.server.clients().first().map(|c| c.holds(CLUSTER, name, made));
    until("an acknowledgement", || holds(&first, "two", made) == Some(Holds::Yes)).await;
    let client = first.server.clients().remove(0);
    assert_eq!((client.node.id.as_str(), client.audience), ("envoy-1", proto::Extensions::None));

    let made = first
        .server
        .apply([cluster("three", true, "a"), Change::Remove { type_url: CLUSTER, name: "one".into() }]);
    until("a removal", || holds(&first, "three", made) == Some(Holds::Yes)).await;
    assert_eq!(stat("cluster_manager.active_clusters"), 3);
    assert_eq!((stat("cluster_manager.cluster_added"), stat("cluster_manager.cluster_removed")), (4, 1));

    // Envoy takes what is good of a response, and refuses it as a whole, without names.
    let made = first.server.apply([cluster("bad", false, "a")]);
    until("a refusal", || matches!(holds(&first, "bad", made), Some(Holds::Rejected(_)))).await;
    assert_eq!(stat("cluster_manager.cds.update_rejected"), 1);
    let Some(Holds::Rejected(reason)) = holds(&first, "bad", made) else { panic!("it was refused") };
    assert!(reason.contains("bad"), "{reason}");
    let made = first.server.apply([cluster("bad", true, "a")]);
    until("a better one", || holds(&first, "bad", made) == Some(Holds::Yes)).await;
    assert_eq!(stat("cluster_manager.active_clusters"), 4);

    // After a restart of the server it says what it has, and gets what it lacks.
    let Site { server, address, stop, task, .. } = first;
    stop.send(()).unwrap();
    server.disconnect(|_| true);
    timeout(SOON, task).await.unwrap().unwrap();
    let second = site(&address.to_string()).await;
    second.server.apply([cluster("two", true, "a"), cluster("three", true, "b")]);
    second.server.ready();
    until("the state", || stat("cluster_manager.active_clusters") == 3).await;
    let made = second.server.generation();
    until("an acknowledgement", || holds(&second, "three", made) == Some(Holds::Yes)).await;
    assert_eq!(second.pushed.0.load(Ordering::Relaxed), 1, "only what changed is sent");
    drop(envoy);
    drop(second.stop);
    timeout(SOON, second.task).await.unwrap().unwrap();
}
