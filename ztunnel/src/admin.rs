//! The pages of the admin port that are ztunnel's own: `/config_dump` and `/connections`.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use process::http::{Request, Response, Routes, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::connections::{Ended, Open};
use crate::dump;
use crate::node::Node;
use crate::proxy::Proxy;

/// As many connections are in one answer; with more, say which.
const LISTED: usize = 10_000;

/// Adds the pages to `routes`.
pub fn routes(routes: Routes, proxy: &Arc<Proxy>, node: &Arc<Node>) -> Routes {
    // A page of a large mesh is many times its text while it is made.
    let large = Arc::new(Semaphore::new(1));
    let (dumped, dumped_node, one) = (proxy.clone(), node.clone(), large.clone());
    let routes = routes.get("/config_dump", "the mesh as this node knows it", move |_request| {
        let (proxy, node) = (dumped.clone(), dumped_node.clone());
        aside(one.clone(), move || {
            let mut dump = dump::config(&proxy.state.mesh_owned(), &proxy.tls.dump());
            if let Value::Object(fields) = &mut dump {
                fields.insert("pods".to_owned(), node.dump());
                fields.insert("leaving".to_owned(), node.dump_leaving());
                fields.insert("diagnostics".to_owned(), node.diagnostics());
            }
            Response::json(&dump)
        })
    });
    let listed = proxy.clone();
    routes.get(
        "/connections",
        "open connections and the last that ended; ?id=, ?address= (of either end)",
        move |request| {
            let proxy = listed.clone();
            aside(large.clone(), move || connections(&proxy, &request))
        },
    )
}

/// Makes a page while nothing waits for it: the thread of the control runtime takes policies meanwhile.
async fn aside(one: Arc<Semaphore>, make: impl FnOnce() -> Response + Send + 'static) -> Response {
    let _place = one.acquire().await;
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
