//! Buffers for the moment of moving bytes.
//!
//! Ten thousand idle connections must not hold ten thousand buffers. A buffer is taken when bytes are there
//! to move and given back when the socket has no more, so a thread needs one or two, whatever it serves.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// The size of a [`Scratch`] buffer, bytes.
pub const SCRATCH_SIZE: usize = 64 * 1024;

/// Buffers that a thread keeps for later; more are freed.
const KEPT_PER_THREAD: usize = 8;

thread_local! {
    static KEPT: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SCRATCH_SIZE`] bytes from the thread's pool. Dropping it gives it back, to the pool of the
/// thread that drops it. It may hold bytes of another connection: use only what was written to it.
///
/// Take one in a poll function once the source is readable, drop it before returning `Pending` unless it
/// holds bytes that the sink didn't take.
#[derive(Debug)]
pub struct Scratch {
    /// Empty only while being dropped.
    buffer: Box<[u8]>,
}

impl Scratch {
    /// A buffer with unspecified content.
    #[must_use]
    pub fn take() -> Self {
        let kept = KEPT.try_with(|kept| kept.borrow_mut().pop()).ok().flatten();
        Self { buffer: kept.unwrap_or_else(|| vec![0; SCRATCH_SIZE].into_boxed_slice()) }
    }
}

impl Deref for Scratch {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        // Without the pool, when the thread is ending, the buffer is just freed.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() < KEPT_PER_THREAD {
                kept.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again_and_the_pool_is_bounded() {
        std::thread::spawn(|| {
            let first = Scratch::take();
            let address = first.as_ptr();
            drop(first);
            assert_eq!(Scratch::take().as_ptr(), address);
            let many: Vec<_> = (0..3 * KEPT_PER_THREAD).map(|_| Scratch::take()).collect();
            assert!(many.iter().all(|buffer| buffer.len() == SCRATCH_SIZE));
            drop(many);
            assert_eq!(KEPT.with_borrow(Vec::len), KEPT_PER_THREAD);
        })
        .join()
        .unwrap();
    }
}
