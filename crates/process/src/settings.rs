//! The settings that all binaries share, twice: [`RawSettings`] as flags and environment variables state them, and
//! [`Settings`], where nothing is left to check. A binary does the same for its own: a `clap` struct that flattens
//! [`RawSettings`], a `resolve` that reports all that is wrong at once, and a struct without options and texts.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::logs::{AccessLogLimits, Format, LogSettings, Target};
use crate::runtimes::{WORKER_THREADS_VARIABLE, WorkerThreads};

/// Flags and variables as they were given.
#[derive(Args, Clone, Debug, Default)]
pub struct RawSettings {
    /// What is logged: a level, or a list of scope=level
    #[arg(long = "log", env = "RUST_LOG", value_name = "FILTER")]
    pub log_filter: Option<String>,
    /// The form of log lines: text or json
    #[arg(long, env = "LOG_FORMAT", value_name = "FORM")]
    pub log_format: Option<String>,
    /// Where log lines are appended instead of standard output
    #[arg(long, env = "LOG_FILE", value_name = "PATH")]
    pub log_file: Option<PathBuf>,
    /// Log one in this many connections that went well
    #[arg(long, env = "ACCESS_LOG_ONE_IN", value_name = "N")]
    pub access_log_one_in: Option<String>,
    /// Log at most this many connections a second, of those that went well and of those that failed; 0: no limit
    #[arg(long, env = "ACCESS_LOG_LINES_PER_SECOND", value_name = "N")]
    pub access_log_lines_per_second: Option<String>,
    /// Where the admin pages are served; loopback only
    #[arg(long, env = "ADMIN_ADDR", value_name = "ADDR:PORT")]
    pub admin_address: Option<String>,
    /// Where readiness is served
    #[arg(long, env = "READINESS_ADDR", value_name = "ADDR:PORT")]
    pub readiness_address: Option<String>,
    /// Where metrics are served
    #[arg(long, env = "STATS_ADDR", value_name = "ADDR:PORT")]
    pub metrics_address: Option<String>,
    /// Threads that carry traffic: a number, or a share of the processors such as 25%
    #[arg(long, env = WORKER_THREADS_VARIABLE, value_name = "N|N%")]
    pub worker_threads: Option<String>,
    /// How long connections may go on after SIGTERM, such as 5s
    #[arg(long, env = "TERMINATION_GRACE_PERIOD", value_name = "TIME")]
    pub termination_grace_period: Option<String>,
    /// How many label sets of connections the metrics keep apart
    #[arg(long, env = "METRICS_SERIES_LIMIT", value_name = "N")]
    pub metrics_series_limit: Option<String>,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Logs.
    pub logs: LogSettings,
    /// The admin port; a loopback address.
    pub admin: SocketAddr,
    /// The readiness port.
    pub readiness: SocketAddr,
    /// The metrics port.
    pub metrics: SocketAddr,
    /// Threads that carry traffic.
    pub worker_threads: WorkerThreads,
    /// How long a drain lasts.
    pub grace: Duration,
    /// The limit of series of the L4 metrics.
    pub series_limit: usize,
}

/// What is wrong with one setting.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{flag} (or {variable}) is {value:?}: {reason}")]
pub struct InvalidSetting {
    /// The flag.
    pub flag: &'static str,
    /// The environment variable.
    pub variable: &'static str,
    /// What was given.
    pub value: String,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

/// All that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InvalidSettings(pub Vec<InvalidSetting>);

impl fmt::Display for InvalidSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, one) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            one.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidSettings {}

/// Collects what is wrong, so that one run shows all of it. For the settings of binaries too.
#[derive(Debug, Default)]
pub struct Checker(Vec<InvalidSetting>);

impl Checker {
    /// The value that `parse` makes of `given`; the default when nothing was given, or when it is wrong, which is
    /// remembered.
    pub fn parse<T, E: fmt::Display>(
        &mut self,
        (flag, variable): (&'static str, &'static str),
        given: Option<&str>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        // An empty variable is as good as none: charts often set one.
        let Some(given) = given.map(str::trim).filter(|g| !g.is_empty()) else { return default };
        match parse(given) {
            Ok(value) => value,
            Err(reason) => {
                let value = given.chars().take(100).collect();
                self.0.push(InvalidSetting { flag, variable, value, reason: reason.to_string() });
                default
            }
        }
    }

    /// `value`, unless something was wrong.
    ///
    /// # Errors
    /// All that was wrong.
    pub fn finish<T>(self, value: T) -> Result<T, InvalidSettings> {
        if self.0.is_empty() { Ok(value) } else { Err(InvalidSettings(self.0)) }
    }
}

impl RawSettings {
    /// Checks the settings.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn resolve(&self) -> Result<Settings, InvalidSettings> {
        let mut check = Checker::default();
        let any = |port| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), crate::admin::PORT);
        let settings = Settings {
            logs: self.resolve_logs(&mut check),
            admin: check.parse(
                ("--admin-address", "ADMIN_ADDR"),
                self.admin_address.as_deref(),
                loopback,
                loopback_address,
            ),
            readiness: check.parse(
                ("--readiness-address", "READINESS_ADDR"),
                self.readiness_address.as_deref(),
                any(crate::readiness::PORT),
                address,
            ),
            metrics: check.parse(
                ("--metrics-address", "STATS_ADDR"),
                self.metrics_address.as_deref(),
                any(crate::admin::METRICS_PORT),
                address,
            ),
            worker_threads: check.parse(
                ("--worker-threads", WORKER_THREADS_VARIABLE),
                self.worker_threads.as_deref(),
                WorkerThreads::default(),
                str::parse,
            ),
            grace: check.parse(
                ("--termination-grace-period", "TERMINATION_GRACE_PERIOD"),
                self.termination_grace_period.as_deref(),
                Duration::from_secs(5),
                duration,
            ),
            series_limit: check.parse(
                ("--metrics-series-limit", "METRICS_SERIES_LIMIT"),
                self.metrics_series_limit.as_deref(),
                crate::metrics::DEFAULT_SERIES_LIMIT,
                |text| match text.parse() {
                    Ok(limit) if (1..=1_000_000).contains(&limit) => Ok(limit),
                    _ => Err("write a number from 1 to 1000000"),
                },
            ),
        };
        check.finish(settings)
    }

    fn resolve_logs(&self, check: &mut Checker) -> LogSettings {
        let format = |text: &str| match text {
            "text" | "plain" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => Err("write text or json"),
        };
        LogSettings {
            filter: check.parse(("--log", "RUST_LOG"), self.log_filter.as_deref(), "info".into(), |text| {
                crate::logs::check_filter(text).map(|()| text.to_owned())
            }),
            format: check.parse(
                ("--log-format", "LOG_FORMAT"),
                self.log_format.as_deref(),
                Format::Text,
                format,
            ),
            target: self.log_file.clone().map_or(Target::Stdout, Target::File),
            access: AccessLogLimits {
                one_in: check.parse(
                    ("--access-log-one-in", "ACCESS_LOG_ONE_IN"),
                    self.access_log_one_in.as_deref(),
                    1,
                    |text| text.parse().map_err(|_| "write a number, 1 for all"),
                ),
                lines_per_second: check.parse(
                    ("--access-log-lines-per-second", "ACCESS_LOG_LINES_PER_SECOND"),
                    self.access_log_lines_per_second.as_deref(),
                    0,
                    |text| text.parse().map_err(|_| "write a number, 0 for no limit"),
                ),
            },
        }
    }
}

fn address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "write an address and a port, such as 127.0.0.1:15000 or [::]:15021")
}

fn loopback_address(text: &str) -> Result<SocketAddr, &'static str> {
    // These pages change and end the process, and ask nobody who they are.
    let address = text
        .strip_prefix("localhost:")
        .map_or_else(|| address(text), |port| address(&format!("127.0.0.1:{port}")))?;
    if address.ip().is_loopback() { Ok(address) } else { Err("it must be a loopback address") }
}

/// Parses a time: a whole number and one of `ms`, `s`, `m`, `h`; several may follow each other (`1m30s`).
///
/// # Errors
/// It is written in another way, or is longer than a year.
pub fn duration(text: &str) -> Result<Duration, &'static str> {
    const WRONG: &str = "write a time such as 500ms, 5s or 1m30s";
    let mut left = text;
    let mut sum = Duration::ZERO;
    while !left.is_empty() {
        let digits = left.find(|c: char| !c.is_ascii_digit()).ok_or(WRONG)?;
        let (number, rest) = left.split_at(digits);
        let number: u64 = number.parse().map_err(|_| WRONG)?;
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(unit);
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(WRONG),
        };
        let part = number.checked_mul(millis).map(Duration::from_millis).ok_or(WRONG)?;
        sum = sum.checked_add(part).ok_or(WRONG)?;
        left = rest;
    }
    if text.is_empty() || sum > Duration::from_secs(366 * 86_400) { Err(WRONG) } else { Ok(sum) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_given_means_the_usual_ports() {
        let settings = RawSettings::default().resolve().unwrap();
        assert_eq!(settings.admin.to_string(), "127.0.0.1:15000");
        assert_eq!(settings.readiness.to_string(), "[::]:15021");
        assert_eq!(settings.metrics.to_string(), "[::]:15020");
        assert_eq!(settings.grace, Duration::from_secs(5));
        let empty = RawSettings { worker_threads: Some(String::new()), ..RawSettings::default() };
        assert!(empty.resolve().is_ok());
    }

    #[test]
    fn all_that_is_wrong_is_reported_at_once() {
        let raw = RawSettings {
            log_filter: Some("loud".into()),
            log_format: Some("xml".into()),
            admin_address: Some("0.0.0.0:15000".into()),
            worker_threads: Some("many".into()),
            ..RawSettings::default()
        };
        let errors = raw.resolve().unwrap_err();
        let flags: Vec<&str> = errors.0.iter().map(|e| e.flag).collect();
        assert_eq!(flags, ["--log", "--log-format", "--admin-address", "--worker-threads"]);
        assert!(errors.to_string().contains("ZTUNNEL_WORKER_THREADS"), "{errors}");
    }

    #[test]
    fn times_have_units() {
        for (text, millis) in [("5s", 5_000), ("500ms", 500), ("1m30s", 90_000), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "-5s", "5 s", "5x", "99999999999999999999s", "999999999h", "1.5s"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }
}
