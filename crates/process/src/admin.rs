//! The pages that every process has: on the admin port 15000, on loopback only, the level of the logs, profiles
//! and the end of the process; on the metrics port 15020 the metrics. A binary adds its own pages to the routes.

mod heap;
mod profile;

use std::time::Duration;

use crate::http::{Limits, Request, Response, Routes, StatusCode};
use crate::logs::Logs;
use crate::metrics::{Format, Registry};
use crate::shutdown::Shutdown;

/// The admin port.
pub const PORT: u16 = 15000;

/// The port of the metrics.
pub const METRICS_PORT: u16 = 15020;

/// The limits for the admin port: as the others', and no browser that was led astray.
#[must_use]
pub fn limits() -> Limits {
    Limits { connections: 32, local_host_only: true, ..Limits::default() }
}

/// The pages of the admin port.
#[must_use]
pub fn routes(title: &'static str, logs: &Logs, shutdown: &Shutdown) -> Routes {
    let (shown, changed, shutdown) = (logs.clone(), logs.clone(), shutdown.clone());
    let limit = profile::LONGEST + Duration::from_secs(60);
    Routes::new(title)
        .get("/logging", "the log level in force", move |_| {
            let text = format!("{}\n", shown.level());
            async { Response::text(StatusCode::OK, text) }
        })
        .post("/logging", "?level=debug or ?level=scope:debug,… changes the log level", move |request| {
            let response = change_level(&changed, &request);
            async { response }
        })
        .post("/quitquitquit", "drains and ends the process", move |_| {
            tracing::info!("draining, as the admin port was asked to");
            shutdown.drain();
            async { Response::text(StatusCode::OK, "shutdown now\n") }
        })
        .get_slow(
            "/debug/pprof/profile",
            "?seconds=10&format=proto|svg&hertz=99: where processor time goes",
            limit,
            profile::answer,
        )
        .get("/debug/pprof/heap", "memory by what allocated it, or by kind; ?format=kernel", heap::answer)
}

/// The pages that only show, for a port that others than the administrator reach: in a network namespace that is shared,
/// as the node's is, a loopback address is anybody's.
#[must_use]
pub fn shown(title: &'static str, logs: &Logs) -> Routes {
    let logs = logs.clone();
    Routes::new(title).get("/logging", "the log level in force", move |_| {
        let text = format!("{}\n", logs.level());
        async { Response::text(StatusCode::OK, text) }
    })
}

fn change_level(logs: &Logs, request: &Request) -> Response {
    let Some(change) = request.query("level") else {
        return Response::text(
            StatusCode::BAD_REQUEST,
            "say ?level=debug or ?level=scope:debug,scope:info\n",
        );
    };
    match logs.set_level(&change) {
        Ok(filter) => Response::text(StatusCode::OK, format!("{filter}\n")),
        Err(e) => Response::text(StatusCode::BAD_REQUEST, format!("{e}\n")),
    }
}

/// The pages of the metrics port.
#[must_use]
pub fn metrics_routes(registry: &Registry) -> Routes {
    let page = |registry: Registry| {
        move |request: Request| {
            let format = Format::negotiate(request.accept());
            let registry = registry.clone();
            async move {
                // Megabytes of text at the limits: not on the thread that also takes configuration.
                match tokio::task::spawn_blocking(move || registry.encode(format)).await {
                    Ok(text) => Response::new(StatusCode::OK, format.content_type(), text),
                    Err(_) => {
                        Response::text(StatusCode::INTERNAL_SERVER_ERROR, "collecting failed, see the log\n")
                    }
                }
            }
        }
    };
    Routes::new("metrics").get("/metrics", "the metrics", page(registry.clone())).get(
        "/stats/prometheus",
        "the same",
        page(registry.clone()),
    )
}
