//! Ctrl-C, and what else asks the run to end: the clusters go first.

use std::process::exit;
use std::thread;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cluster;
use crate::lab::Lab;
use crate::report::say;

/// Takes the clusters down when SIGINT, SIGTERM or SIGHUP comes, and ends with the code that shells give it; the second
/// ends it at once. Signals are handled, not blocked: programs that are started would inherit that.
///
/// # Errors
/// The kernel refuses.
pub fn take_down_after(lab: &Lab) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _inside = runtime.enter();
        Signals::new().context("handling signals")?
    };
    let lab = lab.clone();
    thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            let code = runtime.block_on(signals.next());
            thread::spawn(move || exit(runtime.block_on(signals.next())));
            say("interrupted: taking the clusters down");
            if let Err(error) = cluster::down(&lab) {
                say(&format!("error: {error:#}; target/debug/kube-tests cluster down tries again"));
            }
            exit(code);
        })
        .context("starting a thread")
        .map(drop)
}

struct Signals([(Signal, i32); 3]);

impl Signals {
    fn new() -> Result<Self> {
        let of = |kind: SignalKind| anyhow::Ok((signal(kind)?, 128 + kind.as_raw_value()));
        Ok(Self([of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?]))
    }

    /// The code of the next that comes.
    async fn next(&mut self) -> i32 {
        let [(interrupt, int), (terminate, term), (hangup, hup)] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => *int,
            _ = terminate.recv() => *term,
            _ = hangup.recv() => *hup,
        }
    }
}
