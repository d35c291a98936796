//! What a process needs in memory for its start only, and letting go of it: code, and what the allocator keeps.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// How often a process is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// A process that took less of a processor's time than this between two looks is at rest.
const AT_REST: Duration = Duration::from_millis(50);
/// Less than this is left alone: what comes back costs a fault for each 64 KiB.
const WORTH: u64 = 1 << 20;

/// Lets go of the program's code once that has `settled` which runs at the start only; then whenever the process is at rest and has
/// more of it mapped than rest needs. Never ends.
pub async fn release_code_at_rest(settled: impl Future<Output = ()>) {
    settled.await;
    let mut rest = Rest { busy: processor_time(), ..Rest::default() };
    let mut is_due = true;
    loop {
        if is_due {
            match release_code() {
                Ok(bytes) => tracing::debug!(bytes, "unmapped the code; what runs is mapped again"),
                Err(error) => {
                    tracing::debug!(%error, "the code stays mapped");
                    return;
                }
            }
        }
        tokio::time::sleep(LOOK).await;
        is_due = rest.look(processor_time(), file_resident());
    }
}

/// What is known of a process at rest.
#[derive(Default)]
struct Rest {
    /// The processor time that it had taken at the last look.
    busy: Duration,
    /// What came back after code was let go of at rest, in bytes: what rest needs. None until that was seen.
    needs: Option<u64>,
    /// Whether it was let go of at the last look.
    is_released: bool,
}

impl Rest {
    /// Whether to let go now, with `busy` and `mapped` of this look.
    fn look(&mut self, busy: Duration, mapped: u64) -> bool {
        let is_at_rest = busy.saturating_sub(self.busy) < AT_REST;
        self.busy = busy;
        if self.is_released && is_at_rest {
            self.needs = Some(mapped);
        }
        self.is_released = is_at_rest && self.needs.is_none_or(|needs| mapped > needs + WORTH);
        self.is_released
    }
}

/// The processor time that all threads have taken since the start; nothing where the kernel does not say.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What is resident of files, in bytes (proc_pid_status(5)); nothing where it can't be read.
fn file_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("RssFile:")?.trim().strip_suffix(" kB"));
    kilobytes.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Gives back to the kernel what the allocator keeps for later, of all threads: for after work that takes tens of megabytes for a
/// moment. glibc does so by itself at the heap's end only: what lies free between what stays, it keeps. Takes a millisecond or so, for
/// tens of megabytes a few, in which no other thread gets memory of the arena that is looked through. Does nothing where the allocator is not glibc's.
pub fn release_free() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no safe wrapper of malloc_trim(3) exists")]
    // SAFETY: it takes the locks of the allocator itself, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps the program's code and that of its libraries, with their constants; what is used next is mapped again from the page cache, with
/// a fault for each 64 KiB. Two thirds of what is resident of it has run at the start only, or lies beside something that has: the
/// kernel maps what is around each page that is used (mm/memory.c, do_fault_around). Returns how many bytes of address space it
/// was told of.
///
/// # Errors
/// `/proc/self/smaps` can't be read, or the kernel refuses; nothing is changed then, or a part.
fn release_code() -> io::Result<usize> {
    let mut released = 0;
    for range in images(&std::fs::read_to_string("/proc/self/smaps")?) {
        released += range.len();
        release(range)?;
    }
    Ok(released)
}

/// The addresses of all that is a program's or a library's and is as its file has it (proc_pid_smaps(5)): its code, and what else
/// of a file with code can't be written and has no page of its own, in memory or swapped out, which what the loader relocates has.
fn images(smaps: &str) -> Vec<Range<usize>> {
    let mut programs = HashSet::new();
    let mut mappings = Vec::new();
    for line in smaps.lines() {
        if let Some((range, permissions, path)) = mapping(line) {
            if permissions == "r-xp" && !path.is_empty() {
                programs.insert(path);
            }
            mappings.push((range, permissions, path, Vec::new()));
        } else if let Some(size) = line.strip_prefix("Anonymous:").or_else(|| line.strip_prefix("Swap:"))
            && let Some((.., own)) = mappings.last_mut()
        {
            own.push(size.trim());
        }
    }
    let is_image = |permissions, path| matches!(permissions, "r-xp" | "r--p") && programs.contains(path);
    let image = |(range, permissions, path, own): (_, _, _, Vec<&str>)| {
        let is_the_files = own == ["0 kB", "0 kB"];
        (is_the_files && is_image(permissions, path)).then_some(range)
    };
    mappings.into_iter().filter_map(image).collect()
}

/// The addresses, permissions and file of a line that begins a mapping; the path is empty for what is no file's.
fn mapping(line: &str) -> Option<(Range<usize>, &str, &str)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let range = address(start)?..address(end)?;
    let permissions = fields.next()?;
    // The offset in the file, its device and its inode.
    let path = fields.nth(3).filter(|path| path.starts_with('/'));
    (range.start < range.end).then_some((range, permissions, path.unwrap_or_default()))
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper of madvise(2) exists, since on other memory it would lose what is there"
)]
fn release(range: Range<usize>) -> io::Result<()> {
    // SAFETY: MADV_DONTNEED on a mapping of a program or library, none of which is ever unloaded, that can't be written and has no
    // page of its own, be it in swap: the pages are the file's, and are read from it again on the next access.
    let result = unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_is_as_its_file_has_it_is_let_go_of() {
        let of = |header: &str, (anonymous, swapped): (&str, &str)| {
            format!(
                "{header}\nSize: 8 kB\nAnonymous:      {anonymous}\nSwap:       {swapped}\nSwapPss:  0 kB\nVmFlags: rd\n"
            )
        };
        let program = of("1000-3000 r-xp 00002000 fe:00 123   /usr/bin/culvert", ("0 kB", "0 kB"));
        for (header, own, is_meant) in [
            ("5000-6000 r--p 00000000 fe:00 123   /usr/bin/culvert", ("0 kB", "0 kB"), true),
            ("5000-6000 r-xp 00000000 fe:00 123   /a b (deleted)", ("0 kB", "0 kB"), true),
            ("5000-6000 r-xp 00000000 fe:00 123   /usr/bin/culvert", ("4 kB", "0 kB"), false),
            ("5000-6000 r--p 00000000 fe:00 123   /usr/bin/culvert", ("4 kB", "0 kB"), false),
            ("5000-6000 r--p 00000000 fe:00 123   /usr/bin/culvert", ("0 kB", "4 kB"), false),
            ("5000-6000 r--p 00000000 fe:00 124   /var/lib/a-file", ("0 kB", "0 kB"), false),
            ("5000-6000 rw-p 00000000 fe:00 123   /usr/bin/culvert", ("0 kB", "0 kB"), false),
            ("5000-6000 rwxp 00000000 fe:00 123   /usr/bin/culvert", ("0 kB", "0 kB"), false),
            ("5000-6000 r--s 00000000 fe:00 123   /usr/bin/culvert", ("0 kB", "0 kB"), false),
            ("5000-6000 r-xp 00000000 00:00 0     [vdso]", ("0 kB", "0 kB"), false),
            ("5000-6000 r--p 00000000 00:00 0", ("0 kB", "0 kB"), false),
        ] {
            let expected: Vec<_> =
                [Some(0x1000..0x3000), is_meant.then_some(0x5000..0x6000)].into_iter().flatten().collect();
            assert_eq!(images(&(program.clone() + &of(header, own))), expected, "{header}");
        }
    }

    #[test]
    fn code_is_let_go_of_at_rest_when_more_is_mapped_than_rest_needs() {
        let (second, mib) = (Duration::from_secs(1), 1 << 20);
        let mut rest = Rest::default();
        let mut busy = Duration::ZERO;
        let mut look = |took: Duration, mapped| {
            busy += took;
            rest.look(busy, mapped)
        };
        assert!(!look(second, 9 * mib), "it is at work");
        assert!(look(Duration::ZERO, 9 * mib), "what rest needs isn't known yet");
        assert!(!look(Duration::ZERO, 5 * mib), "that is what it needs");
        assert!(!look(Duration::ZERO, 5 * mib + WORTH), "not worth it");
        assert!(!look(second, 12 * mib), "it is at work");
        assert!(look(AT_REST / 2, 12 * mib), "it was at work");
        assert!(!look(second, 7 * mib), "it is at work again, which says nothing of rest");
        assert!(look(Duration::ZERO, 7 * mib), "more than the 5 that it needs");
    }

    #[cfg(target_env = "gnu")]
    #[test]
    fn what_lies_free_between_what_is_used_is_given_back() {
        let resident_pages = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
        };
        // 64 MB of blocks of 16 kB, of which every 64th stays.
        let blocks: Vec<Vec<u8>> = (0..4096).map(|n| vec![n as u8; 16 << 10]).collect();
        let kept: Vec<Vec<u8>> =
            blocks.into_iter().enumerate().filter(|(n, _)| n % 64 == 0).map(|(_, block)| block).collect();
        let before = resident_pages();
        release_free();
        let given_back = before.saturating_sub(resident_pages());
        assert!(given_back > 8192, "{given_back} pages of 16384");
        assert!(kept.iter().enumerate().all(|(n, block)| block.iter().all(|b| *b == (n * 64) as u8)));
    }

    #[test]
    fn what_was_released_runs_on() {
        assert!(release_code().unwrap() > 0);
        let resident = std::fs::read_to_string("/proc/self/statm").unwrap();
        assert!(resident.split(' ').nth(1).unwrap().parse::<u64>().unwrap() > 0);
    }
}
