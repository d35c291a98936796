//! The pages of the admin port that are the waypoint's own: `/config_dump`, `/clusters`, `/requests`.

mod ports;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use model::Mesh;
use model::http::HttpService;
use process::http::{Request, Response, Routes};
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
    /// Where tunnels are taken.
    pub listen: Option<SocketAddr>,
}

/// Adds the pages to `routes`.
#[must_use]
pub fn routes(routes: Routes, front: &Arc<Front>, shown: &Shown) -> Routes {
    let places = Arc::new(Semaphore::new(LARGE_PAGES));
    let page = |make: Arc<dyn Fn() -> Value + Send + Sync>| {
        let places = places.clone();
        move |_: Request| {
            let (make, places) = (make.clone(), places.clone());
            async move {
                let place = places.acquire_owned().await;
                Response::stream("application/json", move |out| {
                    let _place = place;
                    serde_json::to_writer_pretty(&mut *out, &make())?;
                    writeln!(out)
                })
            }
        }
    };
    let (clusters, requests, all, shown) = (front.clone(), front.clone(), front.clone(), shown.clone());
    routes
        .get(
            "/clusters",
            "destinations that requests were sent to",
            page(Arc::new(move || crate::upstream::dump::dump(clusters.deciding.clusters()))),
        )
        .get(
            "/requests",
            "the last requests and connections, and why they went as they did",
            page(Arc::new(move || requests.deciding.telemetry().recent().dump())),
        )
        .get(
            "/config_dump",
            "what this waypoint does, and by which configuration",
            page(Arc::new(move || dump(&all, &shown))),
        )
}

fn dump(front: &Front, shown: &Shown) -> Value {
    let rules = front.deciding.rules();
    let mut services: Vec<&Arc<ServiceRules>> = rules.services().collect();
    services.sort_by(|a, b| a.http.service.cmp(&b.http.service));
    let diagnostics = shown.diagnostics.lock().map(|d| d.clone()).unwrap_or_default();
    json!({
        "gateway": front.deciding.own().to_string(),
        "generation": rules.mesh.generation(),
        "listen": shown.listen.map(|address| address.to_string()),
        "services": services.iter().map(|s| service(&rules.mesh, &s.http)).collect::<Vec<_>>(),
        "certificates": front.tls.dump(),
        "diagnostics": diagnostics,
        "controlPlane": shown.xds.as_ref().map(|xds| xds.dump()),
    })
}

fn service(mesh: &Mesh, service: &HttpService) -> Value {
    let of = mesh.service(&service.service);
    let vips = of.iter().flat_map(|of| &of.vips).map(|vip| vip.range.addr().to_string());
    let names = |keys: &[model::PolicyKey]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
    let selected: BTreeSet<String> = service.selected.iter().flatten().map(ToString::to_string).collect();
    let set = mesh.endpoints(&service.service);
    json!({
        "service": service.service.to_string(),
        "addresses": vips.collect::<Vec<_>>(),
        "ports": service.ports.iter().map(ports::port).collect::<Vec<_>>(),
        "policies": names(&service.policies),
        "selectedPolicies": selected,
        "authentication": names(&service.authentication),
        "rateLimits": names(&service.rate_limits),
        "endpoints": set.map_or(0, |set| set.as_slice().len()),
    })
}
