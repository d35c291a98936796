//! The cluster's own images: what holds a pod's place, DNS, and the applications of the scenarios.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::image::{Archive, Platform, Rootfs, Settings};
use crate::lab::Lab;
use crate::process::output;

/// The image of the applications.
pub const APPS: &str = "local/apps:1";

/// Real servers and clients that know nothing of a mesh: Debian's.
const REAL: [&str; 4] = ["/usr/sbin/nginx", "/usr/bin/redis-server", "/usr/bin/redis-cli", "/usr/bin/curl"];

const NGINX: &str = "user root;
daemon off;
worker_processes 1;
pid /tmp/nginx.pid;
error_log /dev/stderr;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server {
        listen 8080;
        location / { return 200 \"nginx on $hostname for $remote_addr\\n\"; }
    }
}
";

/// Writes them all to `target/kube/images`; they are the same each time.
///
/// # Errors
/// A program is missing.
pub fn build(lab: &Lab) -> Result<()> {
    let mut pause = Rootfs::default();
    pause.copy(&lab.bin("app"), "/pause")?;
    pack(lab, "local/pause:1", &pause, &["/pause"])?;

    let mut dns = Rootfs::default();
    dns.basics()?;
    dns.copy(&lab.bin("coredns"), "/coredns")?;
    pack(lab, "local/coredns:1", &dns, &["/coredns"])?;

    let mut apps = Rootfs::default();
    apps.basics()?;
    apps.copy(&lab.bin("app"), "/bin/app")?;
    busybox(&mut apps)?;
    let platform = Platform::here()?;
    for program in REAL {
        // Some are links: the content goes by the name that is used.
        let from = Path::new(program)
            .canonicalize()
            .with_context(|| format!("{program}: install what .ci/packages.txt lists for e2e"))?;
        apps.program(Path::new("/"), platform, &from, program)?;
    }
    apps.file("/etc/nginx/nginx.conf", NGINX.into(), 0o644)?;
    for directory in ["/var/log/nginx", "/var/lib/nginx", "/root", "/proc", "/sys", "/dev"] {
        apps.directory(directory, 0o755)?;
    }
    pack(lab, APPS, &apps, &[])
}

/// A shell and small tools, static: a program of this image must not need what it lacks.
fn busybox(files: &mut Rootfs) -> Result<()> {
    let busybox = Path::new("/bin/busybox");
    files.copy(busybox, "/bin/busybox").context("install busybox-static")?;
    for name in output(busybox, &["--list"])?.lines().filter(|name| *name != "busybox") {
        files.link(&format!("/bin/{name}"), "busybox")?;
    }
    Ok(())
}

fn pack(lab: &Lab, name: &str, files: &Rootfs, entrypoint: &[&str]) -> Result<()> {
    let settings = Settings {
        name: name.to_owned(),
        platform: Platform::here()?,
        entrypoint: entrypoint.iter().map(|word| (*word).to_owned()).collect(),
        user: "0:0".to_owned(),
        labels: Vec::new(),
        seconds: 0,
    };
    let file = name.replace(['/', ':'], "-");
    let path = lab.images().join(format!("{file}.tar"));
    let archive = Archive::pack(files, &settings)?;
    if fs::metadata(&path).is_ok_and(|m| m.len() == archive.bytes.len() as u64)
        && fs::read(&path).is_ok_and(|there| there == archive.bytes)
    {
        return Ok(());
    }
    archive.write(&path)
}
