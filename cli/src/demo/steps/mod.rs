//! The steps, one file each.

pub mod cost;
pub mod killed;
pub mod policy;
pub mod request;
pub mod rotation;
pub mod strict;
pub mod waypoint;

use std::net::SocketAddr;

use anyhow::Result;

use super::{Demo, programs};
use crate::connections::{Connection, fetch};
use crate::lab::{NodeId, manifests};

/// The address that the Service `web` is called by.
fn web_service() -> SocketAddr {
    let [v4, _] = manifests::service_ips(21);
    SocketAddr::new(v4, 80)
}

impl Demo {
    /// nginx's own address in its pod.
    fn web_pod(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.lab.pod("web")?.v4.into(), programs::WEB_PORT))
    }

    /// `curl` in a pod, with the status and time that it reports at the end.
    fn curl(&self, pod: &str, options: &[&str], url: &str) -> Result<crate::lab::Ran> {
        let mut argv =
            vec!["curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code} %{size_download} bytes"];
        argv.extend(options);
        argv.push(url);
        let mut ran = self.lab.run(pod, &argv)?;
        // What a reader would type; the rest only makes the answer short.
        let shown: Vec<&str> = std::iter::once("curl").chain(options.iter().copied()).chain([url]).collect();
        ran.line = shown.join(" ");
        if !ran.success {
            ran.stdout.clear();
        }
        Ok(ran)
    }

    /// The newest connection that the node's ztunnel knows from one pod to another, open or ended.
    fn last_connection(&self, node: NodeId, from: &str, to: &str) -> Result<Option<Connection>> {
        let (from, to) = (self.lab.pod(from)?.ips(), self.lab.pod(to)?.ips());
        let all = fetch(&[self.lab.ztunnel(node)?.admin()])?;
        Ok(all.into_iter().rev().find(|c| from.contains(&c.source.ip()) && to.contains(&c.destination.ip())))
    }
}
