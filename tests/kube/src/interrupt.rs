//! Ctrl-C, and what else asks the run to end: the clusters go first.

use std::process::exit;
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::cluster;
use crate::lab::Lab;
use crate::report::say;

/// Takes the clusters down when SIGINT, SIGTERM or SIGHUP comes, and ends with the code that shells give it. To be called
/// before there are other threads: they inherit that the signals wait for this one. Programs that are started don't, since
/// [`std::process::Command`] clears the mask.
///
/// # Errors
/// The kernel refuses.
pub fn take_down_after(lab: &Lab) -> Result<()> {
    let asked: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    asked.thread_block().context("holding back signals")?;
    let lab = lab.clone();
    thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            let Ok(signal) = asked.wait() else { return };
            say(&format!("{signal}: taking the clusters down"));
            if let Err(error) = cluster::down(&lab) {
                say(&format!("error: {error:#}; target/debug/kube-tests cluster down tries again"));
            }
            exit(128 + signal as i32);
        })
        .context("starting a thread")
        .map(drop)
}
