//! What a process needs in memory for its start only, and letting go of it: code, and what the allocator keeps.

use std::io;

/// Lets go of the code that ran at the start only, once that has `settled`.
pub async fn release_code_after(settled: impl Future<Output = ()>) {
    settled.await;
    match release_code() {
        Ok(bytes) => tracing::debug!(bytes, "unmapped the code; what runs is mapped again"),
        Err(error) => tracing::debug!(%error, "the start's code stays mapped"),
    }
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

/// Unmaps the program's code and that of its libraries; what runs next is mapped again from the page cache, with a fault for
/// each 64 KiB. Two thirds of what is resident of it has run at the start only, or beside something that has: the kernel maps
/// what lies around each page that is used (mm/memory.c, do_fault_around). Returns how many bytes of address space it was told
/// of.
///
/// # Errors
/// `/proc/self/maps` can't be read, or the kernel refuses; nothing is changed then, or a part.
fn release_code() -> io::Result<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut released = 0;
    for (start, end) in maps.lines().filter_map(code) {
        release(start, end - start)?;
        released += end - start;
    }
    Ok(released)
}

/// The addresses of a line of `/proc/self/maps` (proc_pid_maps(5)), if it is a file's code: what can be run, not be written, and
/// is not the kernel's own.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if fields.next()? != "r-xp" || !fields.nth(3)?.starts_with('/') {
        return None;
    }
    let address = |text| usize::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    (start < end).then_some((start, end))
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper of madvise(2) exists, since on other memory it would lose what is there"
)]
fn release(start: usize, len: usize) -> io::Result<()> {
    // SAFETY: MADV_DONTNEED on a mapping of a file that nothing has written to: the pages are the file's, and are read from
    // it again on the next access. Code is not relocated on the platforms that this is built for, so it has no pages of its
    // own, and a mapping without the right to write can't get any.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn only_files_code_is_meant() {
        for (line, expected) in [
            (
                "5598a000-5598c000 r-xp 00002000 fe:00 123   /usr/bin/culvert",
                Some((0x5598_a000, 0x5598_c000)),
            ),
            ("5598a000-5598c000 r-xp 00002000 fe:00 123   /a b (deleted)", Some((0x5598_a000, 0x5598_c000))),
            ("5598a000-5598c000 r--p 00002000 fe:00 123   /usr/bin/culvert", None),
            ("5598a000-5598c000 rw-p 00002000 fe:00 123   /usr/bin/culvert", None),
            ("5598a000-5598c000 rwxp 00002000 fe:00 123   /usr/bin/culvert", None),
            ("7ffc80ed2000-7ffc80ed4000 r-xp 00000000 00:00 0   [vdso]", None),
            ("7ffc80ed2000-7ffc80ed4000 r-xp 00000000 00:00 0", None),
            ("", None),
        ] {
            assert_eq!(code(line), expected, "{line}");
        }
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
