//! Any bytes after the preface end a server's connection with a reason.
#![no_main]

use std::sync::Arc;

use hbone::{Control, ServerSettings, TunnelHeaders, serve};
use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let served = tokio::spawn(async move {
            let handler = |incoming: hbone::Incoming| drop(incoming.accept(&TunnelHeaders::default()));
            serve(server, &ServerSettings::default(), &Control::default(), &Arc::default(), handler).await
        });
        let _ = client.write_all(PREFACE).await;
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        served.await.expect("it panicked");
    });
});
