//! A copied request's body, on its way from the request to the copy. What the copy's destination does not take in time waits
//! here, as much as may; then the copy is given up.
//!
//! Invariants:
//! * the request waits for nothing here;
//! * what waits is limited, for each copy and for all of them;
//! * a copy gets all of the body and its end, or is told why it does not.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};

use crate::http::head::Fields;
use crate::http::held::Held;
use crate::http::pump::SMALL;

/// How far a body has come.
#[derive(Debug)]
enum End {
    /// More may come.
    Open,
    /// All of it has, with its trailers.
    Whole(Option<Box<Fields>>),
    /// No more of it is for the copy.
    Cut(Cut),
}

/// Why a copy does not get all of a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    /// More waits for the copy than may.
    Slow,
    /// The request itself was not whole.
    Unfinished,
    /// There is no copy any more.
    Gone,
}

#[derive(Debug)]
struct State {
    parts: VecDeque<Bytes>,
    /// What comes after these, in small pieces.
    small: BytesMut,
    size: usize,
    limit: usize,
    end: End,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    held: Arc<Held>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of what waits.
    fn cut(&self, state: &mut State, why: Cut) {
        self.held.give_back_of_copies(state.size);
        (state.size, state.small) = (0, BytesMut::new());
        state.parts.clear();
        state.end = End::Cut(why);
    }
}

/// The request's end of it.
#[derive(Debug)]
pub(crate) struct Feed(Arc<Shared>);

/// The copy's end of it.
#[derive(Debug)]
pub(crate) struct Fed(Arc<Shared>);

/// Both ends of a body of which `limit` bytes may wait.
pub(crate) fn body(limit: usize, held: &Arc<Held>) -> (Feed, Fed) {
    let (parts, small) = (VecDeque::new(), BytesMut::new());
    let state = State { parts, small, size: 0, limit, end: End::Open, waker: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), held: Arc::clone(held) });
    (Feed(Arc::clone(&shared)), Fed(shared))
}

impl Feed {
    /// What was read of the body before the copy began. It is here in any case, however much it is.
    pub(crate) fn begin<'a>(&self, parts: impl Iterator<Item = &'a Bytes> + Clone) {
        self.0.state().limit += parts.clone().map(Bytes::len).sum::<usize>();
        parts.for_each(|part| self.push(part));
    }

    /// The next part.
    pub(crate) fn push(&self, data: &Bytes) {
        let mut state = self.0.state();
        if !matches!(state.end, End::Open) {
            return;
        }
        let is_too_much = state.size + data.len() > state.limit;
        if is_too_much || self.0.held.take_for_copies(data.len()).is_err() {
            self.0.cut(&mut state, Cut::Slow);
            return wake(state);
        }
        state.size += data.len();
        if data.len() < SMALL {
            state.small.extend_from_slice(data);
        } else {
            if !state.small.is_empty() {
                let small = state.small.split().freeze();
                state.parts.push_back(small);
            }
            state.parts.push_back(data.clone());
        }
        wake(state);
    }

    /// That was all.
    pub(crate) fn end(&self, trailers: Option<&Fields>) {
        let mut state = self.0.state();
        if matches!(state.end, End::Open) {
            state.end = End::Whole(trailers.cloned().map(Box::new));
            wake(state);
        }
    }
}

fn wake(mut state: MutexGuard<'_, State>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if matches!(state.end, End::Open) {
            self.0.cut(&mut state, Cut::Unfinished);
            wake(state);
        }
    }
}

/// What comes next of a body.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Data; never empty.
    Data(Bytes),
    /// The end, with its trailers.
    End(Option<Box<Fields>>),
}

impl Fed {
    /// The next part, as far as it has come.
    ///
    /// # Errors
    /// It does not come.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Cut>> {
        let mut state = self.0.state();
        let data = match state.parts.pop_front() {
            Some(data) => data,
            None => state.small.split().freeze(),
        };
        if !data.is_empty() {
            state.size -= data.len();
            self.0.held.give_back_of_copies(data.len());
            return Poll::Ready(Ok(Piece::Data(data)));
        }
        match &mut state.end {
            End::Whole(trailers) => Poll::Ready(Ok(Piece::End(trailers.take()))),
            End::Cut(why) => Poll::Ready(Err(*why)),
            End::Open => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Ready when it is known how it ends: all of it has come, or no more will.
    ///
    /// # Errors
    /// No more will.
    pub(crate) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        let mut state = self.0.state();
        match &state.end {
            End::Whole(_) => Poll::Ready(Ok(())),
            End::Cut(why) => Poll::Ready(Err(*why)),
            End::Open => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        self.0.cut(&mut self.0.state(), Cut::Gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::held::HeldLimits;

    fn next(fed: &mut Fed) -> Poll<Result<Piece, Cut>> {
        fed.poll_next(&mut Context::from_waker(Waker::noop()))
    }

    fn taken(fed: &mut Fed) -> Vec<u8> {
        let mut all = Vec::new();
        while let Poll::Ready(Ok(Piece::Data(data))) = next(fed) {
            all.extend_from_slice(&data);
        }
        all
    }

    #[test]
    fn parts_large_and_small_come_in_order_and_then_the_end() {
        let held = Held::new(HeldLimits::of(1 << 20));
        let (feed, mut fed) = body(1 << 20, &held);
        let mut all = Vec::new();
        for size in [1, SMALL, 3, 2, 3 * SMALL, SMALL - 1] {
            let part = Bytes::from(vec![u8::try_from(size % 251).unwrap_or_default(); size]);
            feed.push(&part);
            all.extend_from_slice(&part);
        }
        assert_eq!(held.bytes_of_copies(), all.len());
        assert_eq!(taken(&mut fed), all);
        assert!(next(&mut fed).is_pending());
        assert_eq!(held.bytes_of_copies(), 0);
        let mut trailers = Fields::default();
        trailers.push(b"a", b"b");
        feed.end(Some(&trailers));
        drop(feed);
        assert!(matches!(next(&mut fed), Poll::Ready(Ok(Piece::End(Some(_))))));
    }

    #[test]
    fn what_waits_is_limited_for_each_copy_and_for_all() {
        let held = Held::new(HeldLimits::of(80 * 1024));
        let part = Bytes::from(vec![0; 4096]);
        // One that has as much as it may.
        let (feed, mut fed) = body(5000, &held);
        feed.push(&part);
        feed.push(&part);
        assert!(matches!(next(&mut fed), Poll::Ready(Err(Cut::Slow))));
        assert_eq!(held.bytes_of_copies(), 0, "what was waiting is let go of");
        // What was here before it began is not among that.
        let (feed, fed) = body(100, &held);
        feed.begin([part.clone(), part.clone()].iter());
        assert!(matches!(feed.0.state().end, End::Open));
        drop((feed, fed));
        // All of them: an eighth of what requests may hold.
        let (first, second) = (body(1 << 20, &held), body(1 << 20, &held));
        first.0.push(&part);
        second.0.push(&part);
        first.0.push(&part);
        assert!(matches!(first.0.0.state().end, End::Cut(Cut::Slow)));
        assert!(matches!(second.0.0.state().end, End::Open));
        drop(second.1);
        assert_eq!(held.bytes_of_copies(), 0);
        second.0.push(&part);
        assert_eq!(held.bytes_of_copies(), 0, "nobody is there to take it");
    }

    #[test]
    fn a_body_that_is_not_whole_is_told_as_such() {
        let held = Held::new(HeldLimits::of(1 << 20));
        let (feed, mut fed) = body(5000, &held);
        feed.push(&Bytes::from_static(b"some"));
        drop(feed);
        let end = fed.poll_end(&mut Context::from_waker(Waker::noop()));
        assert_eq!(end, Poll::Ready(Err(Cut::Unfinished)));
        assert!(matches!(next(&mut fed), Poll::Ready(Err(Cut::Unfinished))));
        assert_eq!(held.bytes_of_copies(), 0);
    }
}
