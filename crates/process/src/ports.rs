//! The ports for operators: admin, metrics, readiness.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;

use crate::admin;
use crate::http::{self, Limits, Routes};
use crate::settings::Settings;

/// The listeners. Bound before anything else is done, so that a port that is taken is told at once.
#[derive(Debug)]
pub struct Ports {
    admin: TcpListener,
    metrics: TcpListener,
    readiness: TcpListener,
}

/// A port that can't be listened on.
#[derive(Debug, thiserror::Error)]
pub struct TakenPort {
    what: &'static str,
    #[source]
    source: io::Error,
}

impl fmt::Display for TakenPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{0} port (--{0}-address chooses another)", self.what)
    }
}

impl Ports {
    /// Listens on all of them.
    ///
    /// # Errors
    /// Which one is taken, or can't be used.
    pub async fn bind(settings: &Settings) -> Result<Self, TakenPort> {
        async fn on(what: &'static str, address: SocketAddr) -> Result<TcpListener, TakenPort> {
            http::listen(address).await.map_err(|source| TakenPort { what, source })
        }
        Ok(Self {
            admin: on("admin", settings.admin).await?,
            metrics: on("metrics", settings.metrics).await?,
            readiness: on("readiness", settings.readiness).await?,
        })
    }

    /// Serves the pages, in tasks of the runtime that this is called on.
    pub fn serve(self, admin: Routes, metrics: Routes, readiness: Routes) {
        tokio::spawn(http::serve(self.admin, admin, admin::limits()));
        tokio::spawn(http::serve(self.metrics, metrics, Limits::default()));
        tokio::spawn(http::serve(self.readiness, readiness, Limits::default()));
    }
}
