//! Received data that waits for its reader.
//!
//! Invariant: what it holds costs about as much memory as it has bytes. A piece is part of the buffer that it was read
//! into, and keeps all of that; so small pieces are copied together once they have to wait.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// Pieces below this size are copied together.
const SMALL: usize = 4 * 1024;
/// And this much of them makes one piece.
const GATHERED: usize = 4 * SMALL;
/// Pieces of one vectored write.
pub(crate) const PIECES: usize = 16;

thread_local! {
    /// What was a queue, for the next one of the thread: most are empty again before another begins.
    static SPARE: Cell<VecDeque<Bytes>> = const { Cell::new(VecDeque::new()) };
}

/// A queue of received data. Empty, it holds no buffer.
#[derive(Default)]
pub(crate) struct Backlog {
    queue: VecDeque<Bytes>,
    /// Small pieces that follow the queue.
    tail: Option<Box<BytesMut>>,
    /// The reader did not take all that was there.
    waits: bool,
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.tail.is_none()
    }

    /// All bytes in it.
    pub(crate) fn len(&self) -> usize {
        self.queue.iter().map(Bytes::len).sum::<usize>() + self.tail.as_ref().map_or(0, |tail| tail.len())
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        if data.len() >= SMALL || !(self.waits || self.queue.len() >= PIECES) {
            self.push_tail();
            if self.queue.capacity() == 0 {
                self.queue = SPARE.try_with(Cell::take).unwrap_or_default();
            }
            self.queue.push_back(data);
            return;
        }
        let tail = self.tail.get_or_insert_default();
        tail.extend_from_slice(&data);
        if tail.len() >= GATHERED {
            self.push_tail();
        }
    }

    fn push_tail(&mut self) {
        if let Some(tail) = self.tail.take() {
            self.queue.push_back(tail.freeze());
        }
    }

    /// Notes that the reader takes no more for now. Small pieces no longer keep what they were read into.
    pub(crate) fn wait(&mut self) {
        if std::mem::replace(&mut self.waits, true) || self.queue.iter().all(|piece| piece.len() >= SMALL) {
            return;
        }
        let tail = self.tail.take();
        for piece in std::mem::take(&mut self.queue) {
            self.push(piece);
        }
        if let Some(tail) = tail {
            self.push(tail.freeze());
        }
    }

    /// What to write next: whole pieces, at most [`PIECES`]. None only if it is empty.
    pub(crate) fn slices<'a>(&'a mut self, slots: &mut [IoSlice<'a>; PIECES]) -> usize {
        if self.queue.is_empty() {
            self.push_tail();
        }
        let mut used = 0;
        for (slot, data) in slots.iter_mut().zip(&self.queue) {
            *slot = IoSlice::new(data);
            used += 1;
        }
        used
    }

    /// Drops what was written.
    pub(crate) fn advance(&mut self, mut written: usize) {
        while let Some(front) = self.queue.front_mut() {
            if front.len() > written {
                front.advance(written);
                break;
            }
            written -= front.len();
            self.queue.pop_front();
        }
        if self.is_empty() {
            let queue = std::mem::take(self).queue;
            if queue.capacity() <= PIECES {
                let _ = SPARE.try_with(|spare| spare.set(queue));
            }
        }
    }

    /// The first piece.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        if self.queue.is_empty() {
            self.push_tail();
        }
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(backlog: &mut Backlog) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(piece) = backlog.pop() {
            all.extend_from_slice(&piece);
        }
        all
    }

    #[test]
    fn what_waits_is_gathered_in_order() {
        let pieces: Vec<Bytes> =
            (0..200u8).map(|n| vec![n; if n % 7 == 0 { 5000 } else { usize::from(n) + 1 }].into()).collect();
        let expected = pieces.concat();
        for wait_at in [0, 1, 10, 30, 199, 200] {
            let mut backlog = Backlog::default();
            for (at, piece) in pieces.iter().enumerate() {
                if at == wait_at {
                    backlog.wait();
                }
                backlog.push(piece.clone());
            }
            assert_eq!(backlog.len(), expected.len());
            assert!(drain(&mut backlog) == expected, "waited at {wait_at}");
            assert!(backlog.is_empty());
        }
    }

    #[test]
    fn a_small_piece_that_waits_keeps_no_large_buffer() {
        let mut read = BytesMut::zeroed(64 * 1024);
        let mut backlog = Backlog::default();
        backlog.push(read.split_to(10).freeze());
        backlog.wait();
        backlog.push(read.split_to(20).freeze());
        // Nobody else has a part of the buffer.
        assert!(read.freeze().is_unique());
        assert_eq!(drain(&mut backlog), [0; 30]);
    }

    #[test]
    fn written_bytes_leave_across_pieces() {
        let mut backlog = Backlog::default();
        for n in 0..20u8 {
            backlog.push(vec![n; 100].into());
        }
        let mut slots = [IoSlice::new(&[]); PIECES];
        assert_eq!(backlog.slices(&mut slots), PIECES);
        assert!(slots.iter().all(|slot| slot.len() == 100));
        backlog.advance(1550);
        assert_eq!(backlog.len(), 450);
        let mut slots = [IoSlice::new(&[]); PIECES];
        let used = backlog.slices(&mut slots);
        assert_eq!(slots[..used].iter().map(|slot| slot[0]).collect::<Vec<_>>(), [15]);
        backlog.advance(50);
        let rest = drain(&mut backlog);
        assert_eq!((rest.len(), rest[0], rest[399]), (400, 16, 19));
    }

    #[test]
    fn an_empty_one_leaves_its_queue_to_the_next() {
        let spare = || {
            let spare = SPARE.take();
            let found = (spare.len(), spare.capacity());
            SPARE.set(spare);
            found
        };
        let mut backlog = Backlog::default();
        backlog.push(vec![0; 100].into());
        let kept = backlog.queue.capacity();
        backlog.advance(100);
        assert_eq!((backlog.queue.capacity(), spare()), (0, (0, kept)));
        let mut other = Backlog::default();
        other.push(vec![0; 100].into());
        assert_eq!((other.queue.capacity(), spare()), (kept, (0, 0)));
        // One that grew is freed.
        (0..20).for_each(|_| other.push(vec![0; 5000].into()));
        other.advance(100 + 20 * 5000);
        assert_eq!((other.queue.capacity(), spare()), (0, (0, 0)));
    }
}
