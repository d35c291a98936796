//! Endpoints that are left out for a while because they fail: passive health checks, as Envoy does them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hashbrown::HashMap;
use model::Str;
use model::http::Outliers;

/// The longest ejection, unless the first is longer already (Envoy's `max_ejection_time`).
const MAX_EJECTION: Duration = Duration::from_secs(300);

/// How a request to an endpoint went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// It was answered with this status.
    Status(u16),
    /// No connection, or it ended before the response.
    Failed,
    /// It took too long.
    TimedOut,
}

/// Why an endpoint is to be left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// 5xx in a row.
    ServerErrors,
    /// 502, 503, 504 in a row.
    GatewayErrors,
    /// Failures of connections in a row.
    LocalOrigin,
}

/// The failures in a row of one endpoint.
#[derive(Debug, Default)]
pub struct Strikes {
    server: AtomicU32,
    gateway: AtomicU32,
    local: AtomicU32,
}

/// One more; whether it is the one that the limit names, which 0 does never.
fn strike(count: &AtomicU32, limit: u32) -> bool {
    count.fetch_add(1, Ordering::Relaxed).wrapping_add(1) == limit
}

fn forget(count: &AtomicU32) {
    // Read first: others write the same line only where there is something to forget.
    if count.load(Ordering::Relaxed) != 0 {
        count.store(0, Ordering::Relaxed);
    }
}

impl Strikes {
    /// Notes how a request went; why the endpoint is to be left out, if it has failed as often as that takes.
    pub fn note(&self, rules: &Outliers, event: Event) -> Option<Cause> {
        let status = match event {
            Event::Status(status) => {
                forget(&self.local);
                status
            }
            Event::Failed | Event::TimedOut if rules.split_local_origin => {
                return strike(&self.local, rules.consecutive_local_origin_failures)
                    .then_some(Cause::LocalOrigin);
            }
            Event::Failed => 503,
            Event::TimedOut => 504,
        };
        if status < 500 {
            forget(&self.server);
            forget(&self.gateway);
            return None;
        }
        let gateway = if matches!(status, 502..=504) {
            strike(&self.gateway, rules.consecutive_gateway_errors)
        } else {
            forget(&self.gateway);
            false
        };
        let server = strike(&self.server, rules.consecutive_5xx);
        if gateway { Some(Cause::GatewayErrors) } else { server.then_some(Cause::ServerErrors) }
    }

    /// Forgets all, when the endpoint is left out.
    pub fn clear(&self) {
        [&self.server, &self.gateway, &self.local].into_iter().for_each(forget);
    }
}

#[derive(Debug)]
struct Ejection {
    /// How often, less one for each interval without; the next one is so many times as long, and once more.
    times: u32,
    /// Since when it is left out, or back.
    since: Duration,
    out: bool,
}

/// The endpoints of a destination that are left out, by name. Times are those since any fixed moment.
#[derive(Debug)]
pub struct Ejections {
    rules: Outliers,
    of: HashMap<Str, Ejection>,
    out: usize,
    next: Duration,
    ejected: u64,
    over_limit: u64,
}

impl Ejections {
    /// None yet.
    #[must_use]
    pub fn new(rules: Outliers) -> Self {
        Self { rules, of: HashMap::new(), out: 0, next: Duration::ZERO, ejected: 0, over_limit: 0 }
    }

    /// Other rules from here on; what is left out stays so for its time.
    pub fn set_rules(&mut self, rules: Outliers) {
        self.rules = rules;
    }

    /// Leaves an endpoint out, one of `total`, unless it is or that would be more than may be.
    pub fn eject(&mut self, endpoint: &Str, total: usize, now: Duration) -> bool {
        if self.is_out(endpoint) {
            return false;
        }
        let share = (self.out as u64 + 1).saturating_mul(1_000_000) / (total as u64).max(1);
        if share > u64::from(self.rules.max_ejection.millionths()) {
            self.over_limit += 1;
            return false;
        }
        if self.of.is_empty() {
            self.next = now.saturating_add(self.interval());
        }
        let new = Ejection { times: 0, since: now, out: false };
        let ejection = self.of.entry(endpoint.clone()).or_insert(new);
        ejection.times = ejection.times.saturating_add(1);
        ejection.since = now;
        ejection.out = true;
        self.out += 1;
        self.ejected += 1;
        true
    }

    fn interval(&self) -> Duration {
        self.rules.interval.max(Duration::from_millis(1))
    }

    /// When [`Ejections::sweep`] has something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        (!self.of.is_empty()).then_some(self.next)
    }

    /// Looks at the ejections, as is done once an interval; whether an endpoint is back.
    pub fn sweep(&mut self, now: Duration) -> bool {
        let Some(next) = self.next().filter(|next| *next <= now) else { return false };
        let interval = self.interval();
        let passed = (now - next).as_nanos() / interval.as_nanos();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        let at = next.saturating_add(interval.saturating_mul(passed));
        self.next = at.saturating_add(interval);
        let base = self.rules.base_ejection;
        let longest = MAX_EJECTION.max(base);
        let before = self.out;
        let out = &mut self.out;
        self.of.retain(|_, ejection| {
            if ejection.out {
                let length = base.saturating_mul(ejection.times).min(longest);
                if at >= ejection.since.saturating_add(length) {
                    ejection.out = false;
                    ejection.since = at;
                    *out -= 1;
                }
                return true;
            }
            let quiet = at.saturating_sub(ejection.since).as_nanos() / interval.as_nanos();
            let quiet = u32::try_from(quiet).unwrap_or(u32::MAX);
            ejection.times = ejection.times.saturating_sub(quiet);
            ejection.since = ejection.since.saturating_add(interval.saturating_mul(quiet));
            ejection.times > 0
        });
        self.out < before
    }

    /// Whether an endpoint is left out.
    #[must_use]
    pub fn is_out(&self, endpoint: &str) -> bool {
        self.out > 0 && self.of.get(endpoint).is_some_and(|ejection| ejection.out)
    }

    /// How many are left out.
    #[must_use]
    pub fn out(&self) -> usize {
        self.out
    }

    /// Forgets endpoints that are gone.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.of.retain(|endpoint, _| exists(endpoint));
        self.out = self.of.values().filter(|ejection| ejection.out).count();
    }

    /// How many ejections there were, and how many there were not because too many were left out.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.ejected, self.over_limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::http::Percent;

    fn rules() -> Outliers {
        Outliers {
            consecutive_5xx: 3,
            consecutive_gateway_errors: 0,
            split_local_origin: false,
            consecutive_local_origin_failures: 2,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Percent::of(50, 100),
            min_health: Percent::default(),
        }
    }

    fn causes(rules: &Outliers, events: &[Event]) -> Vec<Option<Cause>> {
        let strikes = Strikes::default();
        events.iter().map(|event| strikes.note(rules, *event)).collect()
    }

    #[test]
    fn errors_in_a_row_count_and_a_success_forgets_them() {
        use Event::{Failed, Status, TimedOut};
        let server = Some(Cause::ServerErrors);
        let events = [Status(500), Failed, Status(200), Status(503), TimedOut, Status(599), Status(500)];
        assert_eq!(causes(&rules(), &events), [None, None, None, None, None, server, None]);
        let gateway = Outliers { consecutive_5xx: 0, consecutive_gateway_errors: 2, ..rules() };
        let events = [Status(502), Status(500), Status(503), TimedOut];
        assert_eq!(causes(&gateway, &events), [None, None, None, Some(Cause::GatewayErrors)]);
        let split = Outliers { split_local_origin: true, ..rules() };
        let events = [Failed, Status(500), TimedOut, Failed, Status(404), Failed, Failed];
        let local = Some(Cause::LocalOrigin);
        assert_eq!(causes(&split, &events), [None, None, None, local, None, None, local]);
    }

    #[test]
    fn ejections_grow_end_at_a_sweep_and_are_forgotten_by_good_conduct() {
        let at = Duration::from_secs;
        let (a, b, c) = (Str::from("a"), Str::from("b"), Str::from("c"));
        let mut ejections = Ejections::new(rules());
        assert_eq!(ejections.next(), None);
        assert!(ejections.eject(&a, 4, at(5)) && !ejections.eject(&a, 4, at(6)));
        assert!(ejections.eject(&b, 4, at(6)));
        assert!(!ejections.eject(&c, 4, at(6)), "three of four are more than half");
        assert_eq!((ejections.out(), ejections.counts()), (2, (2, 1)));
        assert!(!ejections.sweep(at(14)));
        assert!(!ejections.sweep(at(34)), "30 s are over at 35");
        assert!(ejections.sweep(at(35)) && ejections.is_out("b"));
        // The second is twice as long.
        assert!(ejections.eject(&a, 4, at(36)));
        assert!(ejections.sweep(at(45)) && !ejections.is_out("b"));
        assert!(!ejections.sweep(at(94)) && ejections.sweep(at(105)) && !ejections.is_out("a"));
        // Two intervals without one, and it is the first again; a late sweep counts all it missed.
        assert!(!ejections.sweep(at(136)));
        assert_eq!(ejections.next(), None);
    }

    #[test]
    fn no_ejection_is_longer_than_the_longest() {
        let at = Duration::from_secs;
        let (name, mut now) = (Str::from("a"), Duration::ZERO);
        let mut ejections = Ejections::new(Outliers { max_ejection: Percent::ALL, ..rules() });
        for _ in 0..30 {
            assert!(ejections.eject(&name, 1, now));
            let out = now;
            while ejections.is_out("a") {
                now += at(1);
                ejections.sweep(now);
            }
            assert!(now - out <= at(310), "out for {:?}", now - out);
        }
    }
}
