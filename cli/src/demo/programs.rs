//! The programs that run in the demo's pods: nginx, Redis, one that speaks first, one on UDP, and what the load
//! generator talks to.

use std::fs;

use anyhow::{Context, Result};

use crate::lab::manifests::{ServicePlan, WAYPOINT};
use crate::lab::{Lab, NodeId, PodPlan};

/// The pods.
pub const PODS: &[PodPlan] = &[
    PodPlan { name: "frontend", namespace: "shop", node: NodeId::One },
    PodPlan { name: "batch", namespace: "shop", node: NodeId::One },
    PodPlan { name: "legacy", namespace: "outside", node: NodeId::One },
    PodPlan { name: "web", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "redis", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "mail", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "catalog", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "catalog-2", namespace: "shop", node: NodeId::Two },
    PodPlan { name: WAYPOINT, namespace: "shop", node: NodeId::Two },
    PodPlan { name: "clock", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "target", namespace: "shop", node: NodeId::Two },
    PodPlan { name: "plain", namespace: "outside", node: NodeId::Two },
];

/// The Services.
pub const SERVICES: &[ServicePlan] = &[
    ServicePlan { name: "web", number: Some(21), protocol: "TCP", port: 80, target: WEB_PORT },
    ServicePlan { name: "redis", number: Some(22), protocol: "TCP", port: 6379, target: 6379 },
    ServicePlan { name: "mail", number: Some(23), protocol: "TCP", port: 25, target: 2525 },
    ServicePlan { name: "catalog", number: Some(24), protocol: "TCP", port: 80, target: WEB_PORT },
    ServicePlan { name: "catalog-2", number: Some(25), protocol: "TCP", port: 80, target: WEB_PORT },
    ServicePlan { name: WAYPOINT, number: Some(26), protocol: "TCP", port: 15008, target: 15008 },
    // UDP is not captured, so nothing turns a ClusterIP into a pod's address: a headless Service needs none.
    ServicePlan { name: "clock", number: None, protocol: "UDP", port: CLOCK_PORT, target: CLOCK_PORT },
];

/// What the page and the Redis value hold, and what the captures are searched for.
pub const PAYLOAD: &str = "the-payload-of-the-culvert-demo";
/// Where nginx listens.
pub const WEB_PORT: u16 = 8080;
/// Where the UDP service listens.
pub const CLOCK_PORT: u16 = 1123;

/// The programs that must be installed, and the Debian package of each.
pub const NEEDED: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("curl", "curl"),
    ("bash", "bash"),
];

/// Starts them all and waits until each answers in its own pod.
pub fn start(lab: &mut Lab, culvert: &str) -> Result<()> {
    let nginx = nginx_config(lab)?;
    lab.spawn(&netns(lab, "web")?, "nginx", &["nginx", "-e", "stderr", "-c", &nginx])?;
    let redis =
        ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", ""];
    lab.spawn(&netns(lab, "redis")?, "redis", &redis)?;
    lab.spawn(&netns(lab, "mail")?, "mail", &[culvert, "lab-service", "greeting", "[::]:2525"])?;
    let clock = format!("[::]:{CLOCK_PORT}");
    lab.spawn(&netns(lab, "clock")?, "clock", &[culvert, "lab-service", "datagrams", &clock])?;
    for name in ["target", "plain"] {
        lab.spawn(&netns(lab, name)?, name, &[culvert, "lab-service", "load", "::"])?;
    }
    for name in ["catalog", "catalog-2"] {
        let config = catalog_config(lab, name)?;
        lab.spawn(&netns(lab, name)?, name, &["nginx", "-e", "stderr", "-c", &config])?;
    }
    let listening = [
        ("web", WEB_PORT),
        ("catalog", WEB_PORT),
        ("catalog-2", WEB_PORT),
        ("redis", 6379),
        ("mail", 2525),
        ("target", 7002),
        ("plain", 7002),
    ];
    for (pod, port) in listening {
        lab.wait_listening(pod, port)?;
    }
    Ok(())
}

fn netns(lab: &Lab, pod: &str) -> Result<String> {
    Ok(lab.pod(pod)?.netns.clone())
}

/// nginx with a page of 1 KB, all of its files in the lab's folder.
fn nginx_config(lab: &Lab) -> Result<String> {
    let dir = lab.dir().join("nginx");
    let www = dir.join("www");
    fs::create_dir_all(&www).with_context(|| format!("cannot make {}", www.display()))?;
    let mut page = format!("{PAYLOAD}\n").repeat(1024 / PAYLOAD.len());
    page.truncate(1024);
    fs::write(www.join("index.html"), page)?;
    let dir = dir.display();
    let text = format!(
        "daemon off;
error_log stderr;
user root;
worker_processes 1;
pid {dir}/pid;
events {{ worker_connections 4096; }}
http {{
  access_log {dir}/access.log;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  keepalive_requests 100000000;
  server {{
    listen 0.0.0.0:{WEB_PORT} backlog=4096;
    listen [::]:{WEB_PORT} backlog=4096;
    root {dir}/www;
    location = /quiet {{ access_log off; alias {dir}/www/index.html; }}
  }}
}}
"
    );
    let path = lab.dir().join("nginx.conf");
    fs::write(&path, text)?;
    Ok(path.to_string_lossy().into_owned())
}

/// nginx that says which of the catalogs it is, and what it was asked.
fn catalog_config(lab: &Lab, name: &str) -> Result<String> {
    let dir = lab.dir().join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join("nginx.conf");
    let dir = dir.display();
    let text = format!(
        "daemon off;
error_log stderr;
user root;
worker_processes 1;
pid {dir}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  server {{
    listen 0.0.0.0:{WEB_PORT};
    listen [::]:{WEB_PORT};
    location / {{ return 200 \"{name}: $request_method $uri\\n\"; }}
  }}
}}
"
    );
    fs::write(&path, text)?;
    Ok(path.to_string_lossy().into_owned())
}
