//! Large read buffers, shared by the connections of a thread: a connection has one only while it holds bytes that
//! nobody has read yet.

use std::cell::RefCell;

/// Room for so much is offered to a read: four records and what is left of a fifth.
pub(super) const READ_BUFFER: usize = 96 * 1024;
/// Free buffers that a thread keeps.
const KEPT: usize = 4;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`READ_BUFFER`] bytes, with any content.
pub(super) fn take() -> Box<[u8]> {
    let free = FREE.with(|free| free.try_borrow_mut().ok().and_then(|mut list| list.pop()));
    free.unwrap_or_else(|| vec![0; READ_BUFFER].into_boxed_slice())
}

/// Gives a buffer back, to whichever thread this is.
pub(super) fn give(buffer: Box<[u8]>) {
    FREE.with(|free| {
        if let Ok(mut list) = free.try_borrow_mut()
            && list.len() < KEPT
        {
            list.push(buffer);
        }
    });
}
