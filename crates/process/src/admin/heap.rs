//! `/debug/pprof/heap`: where the process's memory is.
//!
//! Built with the feature `heap-profile`, the allocator samples, and the page is a profile of what is allocated and by
//! which code, for `go tool pprof`; sampling is switched on by `MALLOC_CONF=prof:true` in the environment.
//!
//! Without the feature nobody knows which code allocated what, and the page does not pretend to. It then has the kernel's
//! account: how much memory is resident, how much of that is the heap (anonymous memory), threads' stacks, program
//! text or mapped files, how much is shared, and what the peak was: enough to tell a leak from a cache of pages. With
//! `?format=kernel` it is that in every build.

use std::collections::BTreeMap;

use crate::http::{Request, Response, StatusCode};

const NOTE: &str = if cfg!(feature = "heap-profile") {
    "from /proc/self/smaps; start with MALLOC_CONF=prof:true for a profile of what code allocated"
} else {
    "from /proc/self/smaps; a build with the feature heap-profile also knows what code allocated"
};

/// Kinds of mappings, by what proc(5) says is behind them.
fn kind(path: &str) -> &'static str {
    match path {
        "" => "anonymous (heap, stacks of threads)",
        "[heap]" => "heap of the C library",
        "[stack]" => "stack of the main thread",
        _ if path.starts_with("[anon:") => "anonymous, named by its allocator",
        _ if path.starts_with('[') => "kernel's (vdso, vvar)",
        _ if path.starts_with('/') => "files (program, libraries)",
        _ => "other",
    }
}

/// One kind's sums, in KiB.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, serde::Serialize)]
struct Sum {
    mappings: u64,
    size_kib: u64,
    resident_kib: u64,
    /// Resident and of this process alone.
    private_kib: u64,
    swap_kib: u64,
}

#[derive(serde::Serialize)]
struct Page {
    resident_bytes: u64,
    peak_resident_bytes: u64,
    virtual_bytes: u64,
    threads: u64,
    mappings: BTreeMap<&'static str, Sum>,
    note: &'static str,
}

pub(super) async fn answer(request: Request) -> Response {
    if request.query("format").as_deref() != Some("kernel")
        && let Some(response) = profile().await
    {
        return response;
    }
    // Reading smaps walks the page tables under a lock of the process's memory: a few milliseconds.
    match tokio::task::spawn_blocking(collect).await {
        Ok(Ok(page)) => Response::json(&page),
        Ok(Err(e)) => {
            Response::text(StatusCode::INTERNAL_SERVER_ERROR, format!("/proc/self can't be read: {e}\n"))
        }
        Err(_) => Response::text(StatusCode::INTERNAL_SERVER_ERROR, "collecting failed, see the log\n"),
    }
}

/// The allocator's profile, gzipped (pprof's profile.proto); `None` where the allocator has none.
#[cfg(feature = "heap-profile")]
async fn profile() -> Option<Response> {
    let mut control = jemalloc_pprof::PROF_CTL.as_ref()?.lock().await;
    if !control.activated() {
        return None;
    }
    Some(match control.dump_pprof() {
        Ok(profile) => Response::new(StatusCode::OK, "application/octet-stream", profile),
        Err(e) => {
            Response::text(StatusCode::INTERNAL_SERVER_ERROR, format!("the heap can't be dumped: {e:#}\n"))
        }
    })
}

#[cfg(not(feature = "heap-profile"))]
async fn profile() -> Option<Response> {
    None
}

fn collect() -> std::io::Result<Page> {
    let mappings = sums(&std::fs::read_to_string("/proc/self/smaps")?);
    let status = crate::metrics::Status::read()?;
    Ok(Page {
        resident_bytes: status.resident_bytes,
        peak_resident_bytes: status.peak_resident_bytes,
        virtual_bytes: status.virtual_bytes,
        threads: status.threads,
        mappings,
        note: NOTE,
    })
}

/// Reads proc(5), `/proc/pid/smaps`: a header for each mapping (`from-to perms offset dev inode path`), then lines
/// `Key: value kB`.
fn sums(smaps: &str) -> BTreeMap<&'static str, Sum> {
    let mut all: BTreeMap<&'static str, Sum> = BTreeMap::new();
    let mut current = kind("");
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let Some(key) = first.strip_suffix(':') else {
            current = kind(words.nth(4).unwrap_or_default());
            all.entry(current).or_default().mappings += 1;
            continue;
        };
        let Some(value) = words.next().and_then(|v| v.parse::<u64>().ok()) else { continue };
        let sum = all.entry(current).or_default();
        match key {
            "Size" => sum.size_kib += value,
            "Rss" => sum.resident_kib += value,
            "Private_Clean" | "Private_Dirty" => sum.private_kib += value,
            "Swap" => sum.swap_kib += value,
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_summed_by_kind() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0 
Size:                 64 kB
Rss:                  12 kB
Private_Clean:         0 kB
Private_Dirty:        12 kB
Swap:                  4 kB
VmFlags: rd wr mr mw me ac sd
7f01-7f02 rw-p 00000000 00:00 0 
Size:                 36 kB
Rss:                   8 kB
5500-5501 r-xp 00000000 08:01 123                        /usr/bin/a program (deleted)
Size:                100 kB
Rss:                 100 kB
";
        let all = sums(smaps);
        let anonymous = all[kind("")];
        assert_eq!(
            anonymous,
            Sum { mappings: 2, size_kib: 100, resident_kib: 20, private_kib: 12, swap_kib: 4 }
        );
        assert_eq!(all[kind("/x")].resident_kib, 100);
    }

    #[test]
    fn the_sums_of_this_process_add_up() {
        let page = collect().unwrap();
        let resident: u64 = page.mappings.values().map(|s| s.resident_kib * 1024).sum();
        // Other tests allocate in between.
        assert!(resident.abs_diff(page.resident_bytes) < 16 << 20, "{resident} {}", page.resident_bytes);
        assert!(page.peak_resident_bytes >= page.resident_bytes / 2);
    }
}
