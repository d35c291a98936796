//! What people read while it runs, and waiting with a limit.

use std::io::{self, Write as _};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

/// Prints a line. Nobody reading is no reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
    let _ = io::stdout().flush();
}

/// How long something has taken.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// From now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// So far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    /// So far, as people write it.
    #[must_use]
    pub fn seconds(&self) -> String {
        format!("{:.1} s", self.0.elapsed().as_secs_f64())
    }
}

/// Between two questions: a tenth of the time that has passed, within these.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
const MOST_PAUSE: Duration = Duration::from_millis(800);

/// Asks until there is an answer, for at most `limit`. `Ok(Err(why))` means not yet; an error ends it at once.
///
/// # Errors
/// The limit has passed: with what was waited for, and why it was not so in the end.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let clock = Clock::start();
    loop {
        let why = match ask()? {
            Ok(answer) => return Ok(answer),
            Err(why) => why,
        };
        if clock.elapsed() > limit {
            bail!("waited {} for {what}: {why}", clock.seconds());
        }
        // What is asked takes some of the processors that the answer needs.
        thread::sleep((clock.elapsed() / 10).clamp(LEAST_PAUSE, MOST_PAUSE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_answer_or_with_the_last_reason() {
        let mut asked = 0;
        let answer = wait_for("three", Duration::from_secs(5), || {
            asked += 1;
            Ok(if asked == 3 { Ok("three") } else { Err("fewer".into()) })
        });
        assert_eq!(answer.unwrap(), "three");
        let never = wait_for::<()>("it", Duration::ZERO, || Ok(Err("it is not there".into())));
        assert!(never.unwrap_err().to_string().ends_with("for it: it is not there"));
        let broken = wait_for::<()>("it", Duration::from_secs(9), || bail!("broken"));
        assert_eq!(broken.unwrap_err().to_string(), "broken");
    }
}
