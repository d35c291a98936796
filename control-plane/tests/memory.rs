//! What 100,000 pods cost in memory, with all that is kept of them: the compiler's tables, the CA's, the encoded
//! resources. A file, and so a process, of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]
#![allow(clippy::print_stderr, reason = "says the figure")]

mod mesh;

use std::sync::Arc;

use config::resource::Kind;
use control_plane::push::{Exceptions, Push, TYPES};
use control_plane::registry::OTHERS;
use control_plane::source::Change;
use mesh::{event, first_lists, pod, registry, service, set};
use serde_json::json;
use tokio::time::Instant;
use xds::server::{Authorizer, Caller, Config, Server};

const PODS: usize = 100_000;

struct Nobody;

#[tonic::async_trait]
impl Authorizer for Nobody {
    async fn authenticate(&self, _: &tonic::Request<()>) -> Result<Caller, tonic::Status> {
        Err(tonic::Status::unauthenticated("nobody"))
    }
}

fn resident_mib() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
}

#[tokio::test]
async fn a_hundred_thousand_pods_fit() {
    let config = Config { types: TYPES.to_vec(), ..Config::default() };
    let server = Server::new(config, Arc::new(Nobody), Arc::new(()));
    let mut push = Push::new(server.clone(), Exceptions::default());
    let (mut registry, _) = registry();
    let before = resident_mib();
    first_lists(&mut registry, &[("shop", json!({}))], None);
    for kind in OTHERS {
        registry.take(event(kind, Change::Listing));
        let objects: Box<dyn Iterator<Item = serde_json::Value>> = match kind {
            Kind::Pod => Box::new((0..PODS).map(|index| {
                let address = format!("10.{}.{}.{}", index >> 16, (index >> 8) & 255, index & 255);
                let mut pod =
                    pod("shop", &format!("web-{index}-5f6d8c9b7-x2x4z"), &address, &format!("{index}"));
                pod["metadata"]["labels"] = json!({ "app": format!("web-{}", index / 20), "version": "v1" });
                pod["metadata"]["uid"] = json!(format!("b0a6a0a8-1111-4222-8333-{index:012}"));
                pod["metadata"]["managedFields"] = json!([{ "manager": "kubelet", "x": "y".repeat(2000) }]);
                pod["spec"]["nodeName"] = json!(format!("node-{}", index / 50));
                pod
            })),
            Kind::Service => Box::new((0..PODS / 20).map(|index| {
                let ip = format!("10.96.{}.{}", index >> 8, index & 255);
                let mut service = service("shop", &format!("web-{index}"), &ip);
                service["spec"]["selector"] = json!({ "app": format!("web-{index}") });
                service
            })),
            _ => Box::new(std::iter::empty()),
        };
        // One at a time, as they come from pages of a list.
        objects.for_each(|object| registry.take(set(kind, &object)));
        registry.take(event(kind, Change::Listed));
    }
    let committed = registry.commit(Instant::now()).unwrap();
    push.push(&committed.changes);
    server.ready();
    drop(committed);
    let used = resident_mib() - before;
    assert_eq!(server.len(proto::ADDRESS_TYPE_URL, proto::Extensions::Culvert), PODS + PODS / 20);
    eprintln!("{used} MiB for {PODS} pods");
    assert!(used < 1024, "{used} MiB");
}
