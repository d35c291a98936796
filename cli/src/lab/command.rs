//! Programs that run to their end: with a time limit, a limit on what they print, and an eye on the stop flag.

use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::Instant;

/// No program that the lab waits for takes longer.
const LIMIT: Duration = Duration::from_secs(60);
/// More output than this is cut.
const MOST_OUTPUT: u64 = 64 << 20;

/// Set when the user wants to stop: every wait of the lab ends with [`Stop::check`]'s error.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ends all waiting.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// An error when it is set.
    pub fn check(&self) -> Result<()> {
        if self.is_set() {
            bail!(Interrupted);
        }
        Ok(())
    }

    /// Waits, but not longer than until the flag is set.
    pub fn sleep(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }

    /// Asks `done` every few milliseconds until it says so; `false` when it has not within `limit`.
    pub fn wait_until(&self, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
        let until = Instant::now() + limit;
        loop {
            if done()? {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            self.sleep(Duration::from_millis(5))?;
        }
    }
}

/// The user wanted to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Ctrl-C, SIGTERM and a closed terminal set the flag.
pub fn stop_on_signals() -> Result<Stop> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = Stop::default();
    let flag = stop.clone();
    let (ready, wait) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        crate::netns::block_on(async move {
            let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
            let [Ok(mut int), Ok(mut term), Ok(mut hup)] = kinds.map(signal) else { return };
            let _ = ready.send(());
            loop {
                tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
                flag.set();
            }
        })
    })?;
    wait.recv().context("cannot listen for signals")?;
    Ok(stop)
}

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Where it ran, for people.
    pub place: String,
    /// The command line, for people.
    pub line: String,
    /// Whether it ended with success.
    pub success: bool,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Ran {
    /// What it wrote, or where that is nothing, the last line of what it complained about.
    pub fn shown(&self) -> &str {
        let out = self.stdout.trim_end();
        if out.is_empty() { self.stderr.trim_end().lines().last().unwrap_or_default() } else { out }
    }
}

/// Runs `argv`, in the namespace `netns` if there is one.
pub fn run(netns: Option<&str>, place: &str, argv: &[&str], stop: &Stop) -> Result<Ran> {
    let (program, rest) = argv.split_first().context("an empty command")?;
    let mut command = match netns {
        Some(netns) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", netns, program]).args(rest);
            command
        }
        None => {
            let mut command = Command::new(program);
            command.args(rest);
            command
        }
    };
    let line = argv.iter().map(|a| quoted(a)).collect::<Vec<_>>().join(" ");
    let since = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}: is it installed?"))?;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let Err(e) = stop.check().and_then(|()| in_time(since, &line)) {
            // It is ours, and it may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
            return Err(e);
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let took = since.elapsed();
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    Ok(Ran {
        place: place.to_owned(),
        line,
        success: status.success(),
        stdout: text(out),
        stderr: text(err),
        took,
    })
}

fn in_time(since: Instant, line: &str) -> Result<()> {
    if since.elapsed() > LIMIT {
        bail!("{line} did not end within {} s", LIMIT.as_secs());
    }
    Ok(())
}

fn drain(source: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // What is beyond the limit is read and dropped, so that the program does not block on a full pipe.
            let _ = source.by_ref().take(MOST_OUTPUT).read_to_end(&mut bytes);
            let _ = io::copy(&mut source, &mut io::sink());
        }
        bytes
    })
}

/// As a shell would need it.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,%+[]".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

/// Feeds `input` to a program and expects success.
pub fn feed(argv: &[&str], input: &str) -> Result<()> {
    use std::io::Write;
    let (program, rest) = argv.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(rest)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}: is it installed?"))?;
    let errors = drain(child.stderr.take());
    let fed = child.stdin.take().map(|mut pipe| pipe.write_all(input.as_bytes()));
    let status = child.wait()?;
    let errors = errors.join().unwrap_or_default();
    if !status.success() {
        bail!("{} failed: {}", argv.join(" "), String::from_utf8_lossy(&errors).trim());
    }
    fed.unwrap_or(Ok(())).with_context(|| format!("cannot write to {program}"))
}

/// Which of `programs` are not in the PATH.
pub fn missing_programs<'a>(programs: &[&'a str]) -> Vec<&'a str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    programs.iter().copied().filter(|p| !found(p)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_ends_when_the_user_stops() {
        let stop = Stop::default();
        let later = stop.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            later.set();
        });
        let error = run(None, "here", &["sleep", "50"], &stop).unwrap_err();
        assert!(error.is::<Interrupted>());
    }

    #[test]
    fn arguments_are_shown_as_a_shell_needs_them() {
        assert_eq!(quoted("http://web.shop/"), "http://web.shop/");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
