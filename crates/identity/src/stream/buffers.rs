//! Large buffers, shared by the connections of a thread: a connection has one only while it holds bytes that nobody has
//! taken yet.

use std::cell::{Cell, RefCell};

/// The size of a thread's buffers. Reads are offered what is free of it, and what is sealed for a write fits it.
pub(super) const BUFFER: usize = 160 * 1024;
/// Free buffers that a thread keeps.
const KEPT: usize = 4;
/// The most that a buffer for little may have grown to and is kept.
const LITTLE: usize = 16 * 1024;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
    static FREE_LITTLE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Where bytes of a connection are.
#[derive(Default)]
pub(super) enum Store {
    #[default]
    None,
    /// One of the thread's buffers.
    Shared(Box<[u8]>),
    /// An allocation of the content's size.
    Exact(Vec<u8>),
}

impl Store {
    /// All of it, with any content where nothing was written.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::None => &mut [],
            Self::Shared(buffer) => buffer,
            Self::Exact(bytes) => bytes,
        }
    }

    /// Lets go of it, to whichever thread this is.
    pub(super) fn release(&mut self) {
        if let Self::Shared(buffer) = std::mem::take(self) {
            give(buffer);
        }
    }
}

/// A buffer of [`BUFFER`] bytes, with any content.
pub(super) fn take() -> Box<[u8]> {
    let free = FREE.try_with(|free| free.try_borrow_mut().ok().and_then(|mut list| list.pop()));
    free.ok().flatten().unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
}

fn give(buffer: Box<[u8]>) {
    // Without the pool, when the thread is ending, the buffer is just freed.
    let _ = FREE.try_with(|free| {
        if let Ok(mut list) = free.try_borrow_mut()
            && list.len() < KEPT
        {
            list.push(buffer);
        }
    });
}

/// The thread's buffer for little, which is empty.
pub(super) fn take_little() -> Vec<u8> {
    FREE_LITTLE.try_with(Cell::take).unwrap_or_default()
}

/// Leaves it to the next connection of the thread.
pub(super) fn give_little(mut buffer: Vec<u8>) {
    if buffer.capacity() <= LITTLE {
        buffer.clear();
        let _ = FREE_LITTLE.try_with(|free| free.set(buffer));
    }
}
