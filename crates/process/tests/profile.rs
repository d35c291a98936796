//! The processor profile, in a process of its own: a timer's signals reach all threads.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::io;
use std::time::Duration;

use process::admin;
use process::http::{listen, serve};
use process::logs::{LogSettings, LogWriter, Logs};
use process::shutdown::Shutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Uses processor time until told to stop.
fn spin(stop: &std::sync::atomic::AtomicBool) -> u64 {
    let mut x = 1u64;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        for _ in 0..10_000 {
            x = std::hint::black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    }
    x
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_shows_where_the_time_goes() {
    let writer = LogWriter::start_on(io::sink(), 1 << 20, |_| String::new()).unwrap();
    let (logs, _subscriber) = Logs::on_writer(&LogSettings::default(), writer).unwrap();
    let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let routes = admin::routes("culvert", &logs, &Shutdown::new(Duration::from_secs(1)));
    tokio::spawn(serve(listener, routes, admin::limits()));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let spinner = std::thread::spawn({
        let stop = stop.clone();
        move || spin(&stop)
    });
    let fetch = |path: String| async move {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        timeout(Duration::from_secs(120), stream.read_to_end(&mut all)).await.unwrap().unwrap();
        let end = all.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        (String::from_utf8(all[..end].to_vec()).unwrap(), all[end + 4..].to_vec())
    };
    let profile = |query: &str| fetch(format!("/debug/pprof/profile{query}"));
    for wrong in ["?seconds=0", "?seconds=1000", "?seconds=x", "?hertz=0", "?hertz=100000", "?format=pdf"] {
        assert!(profile(wrong).await.0.contains(" 400 "), "{wrong}");
    }
    let first = tokio::spawn(profile("?seconds=1&hertz=250&format=svg"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(profile("?seconds=1").await.0.contains(" 409 "), "one at a time");
    let (head, svg) = first.await.unwrap();
    let svg = String::from_utf8(svg).unwrap();
    assert!(head.contains("200") && svg.contains("<svg") && svg.contains("spin"), "{head} {svg:.2000}");
    let (head, gzip) = profile("?seconds=1&hertz=250").await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    spinner.join().unwrap();
    assert!(head.contains("200"), "{head}");
    let mut profile = Vec::new();
    io::Read::read_to_end(&mut flate2::read::GzDecoder::new(gzip.as_slice()), &mut profile).unwrap();
    let text = String::from_utf8_lossy(&profile);
    assert!(text.contains("nanoseconds") && text.contains("spin"), "{} bytes", profile.len());
    // Whether pprof itself can read it.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &gzip).unwrap();
    let go = std::process::Command::new("go").args(["tool", "pprof", "-top"]).arg(file.path()).output();
    if let Ok(output) = go
        && !String::from_utf8_lossy(&output.stderr).contains("no such tool")
    {
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.contains("spin"), "{shown}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
