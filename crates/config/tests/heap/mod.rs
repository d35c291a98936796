//! What a test program has on the heap, counted by its allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// What a block takes of glibc's heap.
fn taken(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: all calls go to the system's allocator as they come; only sizes are counted beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(taken(layout.size()), Ordering::Relaxed) + taken(layout.size());
        MOST.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that blocks take now.
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Has [`most`] begin anew, and returns what is taken now.
pub fn watch() -> usize {
    MOST.store(live(), Ordering::Relaxed);
    live()
}

/// The most that was taken at once.
pub fn most() -> usize {
    MOST.load(Ordering::Relaxed)
}
