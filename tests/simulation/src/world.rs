//! Running a scenario for a seed.

use std::time::Duration;

use turmoil::{Builder, Sim};

use crate::log::Log;

/// A network of a seed, and its log.
pub struct Scenario {
    /// What everything in the scenario is drawn from.
    pub seed: u64,
    /// What happens.
    pub log: Log,
    builder: Builder,
}

impl Scenario {
    /// A network with delays of 1 to `most_delay` a message, and no losses.
    #[must_use]
    pub fn new(seed: u64, most_delay: Duration) -> Self {
        let mut builder = Builder::new();
        builder
            .rng_seed(seed)
            .simulation_duration(Duration::from_secs(3600))
            .tick_duration(Duration::from_millis(1))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(most_delay)
            .tcp_capacity(256);
        Self { seed, log: Log::default(), builder }
    }

    /// Lets links fail for a while: what is under way on them is lost, and what is sent. A connection over such a
    /// link does not end, it falls silent for ever.
    #[must_use]
    pub fn with_losses(mut self, fail_rate: f64, repair_rate: f64) -> Self {
        self.builder.fail_rate(fail_rate).repair_rate(repair_rate);
        self
    }

    /// Builds the network with `build`, runs it to the end of all its clients, and returns the log.
    ///
    /// # Panics
    /// A client failed; the seed is printed with it.
    #[must_use]
    pub fn run<'a>(self, build: impl FnOnce(&mut Sim<'a>, &Log, u64)) -> Log {
        let _on_failure = ShowSeed { seed: self.seed, log: self.log.clone() };
        let mut sim = self.builder.build();
        build(&mut sim, &self.log, self.seed);
        let result = sim.run();
        assert!(result.is_ok(), "the simulation failed: {result:?}");
        self.log
    }
}

struct ShowSeed {
    seed: u64,
    log: Log,
}

impl Drop for ShowSeed {
    #[allow(clippy::print_stderr, reason = "a test that fails says how to run it again")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines = self.log.lines();
            let last = lines.iter().rev().take(30).rev().map(String::as_str).collect::<Vec<_>>().join("\n");
            eprintln!("seed {}; run this one again with SIMULATION_SEED={}\n{last}", self.seed, self.seed);
        }
    }
}

/// The seeds to run: a few, or the one of `SIMULATION_SEED`, or as many as `SIMULATION_SEEDS` says.
#[must_use]
pub fn seeds(few: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match (number("SIMULATION_SEED"), number("SIMULATION_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(many)) => (0..many).collect(),
        (None, None) => (0..few).collect(),
    }
}
