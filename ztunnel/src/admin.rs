//! The pages of the admin port that are ztunnel's own: `/config_dump` and `/connections`.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use process::http::{Request, Response, Routes, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::cluster::ClusterStatus;
use crate::connections::{Ended, Open};
use crate::dump::Dump;
use crate::node::Node;
use crate::proxy::Proxy;

/// As many connections are in one answer; with more, say which.
const LISTED: usize = 10_000;
/// So many large pages are made at once.
const LARGE_PAGES: usize = 2;

/// Adds the pages to `routes`.
pub fn routes(
    routes: Routes,
    proxy: &Arc<Proxy>,
    node: &Arc<Node>,
    cluster: Option<ClusterStatus>,
) -> Routes {
    // Each holds a thread for as long as its reader takes, and others have work on those threads.
    let few = Arc::new(Semaphore::new(LARGE_PAGES));
    let (dumped, dumped_node, places) = (proxy.clone(), node.clone(), few.clone());
    let routes = routes.get("/config_dump", "the mesh as this node knows it", move |_request| {
        let (proxy, node, places) = (dumped.clone(), dumped_node.clone(), places.clone());
        let cluster = cluster.clone();
        async move {
            let place = places.acquire_owned().await;
            Response::stream("application/json", move |out| {
                let _place = place;
                let mut more = vec![
                    ("certificates", proxy.tls.dump()),
                    ("pods", node.dump()),
                    ("leaving", node.dump_leaving()),
                    ("diagnostics", node.diagnostics()),
                    ("verdicts", proxy.verdicts.dump()),
                ];
                more.extend(cluster.map(|cluster| ("cluster", cluster.dump())));
                let dump = Dump { mesh: proxy.state.mesh_owned(), more };
                serde_json::to_writer_pretty(&mut *out, &dump)?;
                writeln!(out)
            })
        }
    });
    let listed = proxy.clone();
    routes.get(
        "/connections",
        "open connections and the last that ended; ?id=, ?address= (of either end)",
        move |request| {
            let (proxy, few) = (listed.clone(), few.clone());
            async move {
                let looked = proxy.clone();
                // Of those that pass by a verdict only the kernel knows.
                let look = async move { looked.verdicts.look().await };
                aside(few, look, move || connections(&proxy, &request)).await
            }
        },
    )
}

/// Makes a page while nothing waits for it: the thread of the control runtime takes policies meanwhile.
async fn aside(
    places: Arc<Semaphore>,
    first: impl Future<Output = ()>,
    make: impl FnOnce() -> Response + Send + 'static,
) -> Response {
    let _place = places.acquire().await;
    first.await;
    tokio::task::spawn_blocking(make)
        .await
        .unwrap_or_else(|error| Response::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// Which connections are asked for.
#[derive(Default)]
struct Filter {
    id: Option<u64>,
    address: Option<IpAddr>,
}

impl Filter {
    fn of(request: &Request) -> Result<Self, String> {
        let id = request.query("id").map(|t| t.parse().map_err(|_| format!("id={t}: a number is expected")));
        let address = request.query("address").map(|t| {
            let ip = t.parse::<IpAddr>().or_else(|_| t.parse::<SocketAddr>().map(|a| a.ip()));
            ip.map_err(|_| format!("address={t}: an IP address is expected"))
        });
        Ok(Self { id: id.transpose()?, address: address.transpose()? })
    }

    fn wants(&self, story: &crate::connections::Story) -> bool {
        let ends = [Some(story.source), Some(story.destination), story.upstream];
        self.id.is_none_or(|id| id == story.id)
            && self.address.is_none_or(|ip| ends.into_iter().flatten().any(|end| end.ip() == ip))
    }
}

fn connections(proxy: &Proxy, request: &Request) -> Response {
    let filter = match Filter::of(request) {
        Ok(filter) => filter,
        Err(reason) => return Response::text(StatusCode::BAD_REQUEST, reason),
    };
    let open: Vec<Arc<Open>> =
        proxy.registry.open().into_iter().filter(|o| filter.wants(&o.story)).take(LISTED).collect();
    let open: Vec<Value> = open
        .iter()
        .map(|o| {
            let (sent, received) = o.carried();
            let mut value = serde_json::to_value(&o.story).unwrap_or_default();
            if let Value::Object(fields) = &mut value {
                fields.insert("bytes_sent".to_owned(), sent.into());
                fields.insert("bytes_received".to_owned(), received.into());
            }
            value
        })
        .collect();
    let ended: VecDeque<Ended> =
        proxy.registry.ended().into_iter().filter(|e| filter.wants(&e.story)).collect();
    Response::json(&json!({ "open": open, "ended": ended }))
}
