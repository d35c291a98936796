//! Metrics of the process itself, and of its build.

use std::io;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};

use super::{Description, Kind, Registry};

/// Registers `process_cpu_seconds_total`, `process_open_fds`, `process_max_fds`,
/// `process_resident_memory_bytes`, `process_virtual_memory_bytes` and `process_threads`. They are read at each scrape; one that
/// can't be read is left out of it.
pub fn register_process(registry: &Registry) {
    let gauge = |name, help, read: fn() -> Option<u64>| {
        registry.collect(Description { name, help, kind: Kind::Gauge }, move |out| {
            if let Some(value) = read() {
                out.integer(&|_| {}, value);
            }
        });
    };
    gauge("process_open_fds", "Open file descriptors", open_fds);
    gauge("process_max_fds", "How many file descriptors may be open", max_fds);
    gauge("process_resident_memory_bytes", "Resident memory", || Some(Status::read().ok()?.resident_bytes));
    gauge("process_virtual_memory_bytes", "Virtual memory", || Some(Status::read().ok()?.virtual_bytes));
    gauge("process_threads", "Threads", || Some(Status::read().ok()?.threads));
    let cpu = Description {
        name: "process_cpu_seconds",
        help: "Processor time that was used, by user and kernel together",
        kind: Kind::Counter,
    };
    registry.collect(cpu, |out| {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
            out.float(&|_| {}, seconds(usage.user_time()) + seconds(usage.system_time()));
        }
    });
}

/// Registers `istio_build`, always 1, with the component's name and version as labels.
pub fn build_info(registry: &Registry, component: &'static str, version: &'static str) {
    let build = Description { name: "istio_build", help: "Component and version", kind: Kind::Gauge };
    registry.collect(build, move |out| {
        let labels = |pairs: &mut super::LabelWriter<'_>| {
            pairs.pair("component", component);
            pairs.pair("tag", version);
        };
        out.integer(&labels, 1);
    });
}

fn open_fds() -> Option<u64> {
    // The directory's own descriptor is one of them.
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as u64)
}

fn max_fds() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft)
}

/// From proc(5), `/proc/pid/status`.
pub(crate) struct Status {
    pub(crate) resident_bytes: u64,
    pub(crate) peak_resident_bytes: u64,
    pub(crate) virtual_bytes: u64,
    pub(crate) threads: u64,
}

impl Status {
    pub(crate) fn read() -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/self/status")?;
        let number = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            let value = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            value.ok_or_else(|| io::Error::other(format!("no {key} in /proc/self/status")))
        };
        Ok(Self {
            resident_bytes: number("VmRSS:")? * 1024,
            peak_resident_bytes: number("VmHWM:")? * 1024,
            virtual_bytes: number("VmSize:")? * 1024,
            threads: number("Threads:")?,
        })
    }
}
