//! The pages of the admin port that are the waypoint's own: `/config_dump`, `/clusters`.

use std::sync::Arc;

use model::Mesh;
use model::http::{HttpPort, HttpService, Protocol};
use process::http::{Response, Routes};
use serde_json::{Value, json};
use source::XdsStatus;
use tokio::sync::Semaphore;

use crate::listen::Front;
use crate::rules::ServiceRules;

/// So many large pages are made at once.
const LARGE_PAGES: usize = 2;

/// What the pages show beside the snapshot.
#[derive(Clone, Default)]
pub struct Shown {
    /// All there is to say of the configuration.
    pub diagnostics: Arc<std::sync::Mutex<Value>>,
    /// How it goes with the control plane, where there is one.
    pub xds: Option<Arc<XdsStatus>>,
}

/// Adds the pages to `routes`.
#[must_use]
pub fn routes(routes: Routes, front: &Arc<Front>, shown: &Shown) -> Routes {
    let places = Arc::new(Semaphore::new(LARGE_PAGES));
    let (clusters, limit) = (front.clone(), places.clone());
    let routes = routes.get("/clusters", "destinations that requests were sent to", move |_| {
        let (front, places) = (clusters.clone(), limit.clone());
        async move {
            let place = places.acquire_owned().await;
            Response::stream("application/json", move |out| {
                let _place = place;
                let clusters = crate::upstream::dump::dump(front.deciding.clusters());
                serde_json::to_writer_pretty(&mut *out, &clusters)?;
                writeln!(out)
            })
        }
    });
    let (front, shown) = (front.clone(), shown.clone());
    routes.get("/config_dump", "what this waypoint does, and by which configuration", move |_| {
        let (front, shown, places) = (front.clone(), shown.clone(), places.clone());
        async move {
            let place = places.acquire_owned().await;
            Response::stream("application/json", move |out| {
                let _place = place;
                serde_json::to_writer_pretty(&mut *out, &dump(&front, &shown))?;
                writeln!(out)
            })
        }
    })
}

fn dump(front: &Front, shown: &Shown) -> Value {
    let rules = front.deciding.rules();
    let mut services: Vec<&Arc<ServiceRules>> = rules.services().collect();
    services.sort_by(|a, b| a.http.service.cmp(&b.http.service));
    let diagnostics = shown.diagnostics.lock().map(|d| d.clone()).unwrap_or_default();
    json!({
        "gateway": front.deciding.own().to_string(),
        "generation": rules.mesh.generation(),
        "services": services.iter().map(|s| service(&rules.mesh, &s.http)).collect::<Vec<_>>(),
        "certificates": front.tls.dump(),
        "diagnostics": diagnostics,
        "controlPlane": shown.xds.as_ref().map(|xds| xds.dump()),
    })
}

fn service(mesh: &Mesh, service: &HttpService) -> Value {
    let set = mesh.endpoints(&service.service);
    json!({
        "service": service.service.to_string(),
        "ports": service.ports.iter().map(port).collect::<Vec<_>>(),
        "policies": service.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "endpoints": set.map_or(0, |set| set.as_slice().len()),
    })
}

fn port(port: &HttpPort) -> Value {
    let routes = port.routes.entries().iter();
    let streams = port.streams.entries().iter();
    json!({
        "port": port.number,
        "protocol": match port.protocol {
            Protocol::Detect => "detect",
            Protocol::Http => "HTTP",
            Protocol::Http2 => "HTTP2",
            Protocol::Tcp => "TCP",
            Protocol::Tls => "TLS",
        },
        "routes": routes
            .map(|(when, route)| json!({ "route": route.id.to_string(), "match": when.to_string() }))
            .collect::<Vec<_>>(),
        "streams": streams
            .map(|(when, route)| json!({ "route": route.id.to_string(), "match": when.to_string() }))
            .collect::<Vec<_>>(),
    })
}
