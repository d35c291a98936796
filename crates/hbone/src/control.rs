//! Tells a connection to end: in good order, or at once.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

/// What a connection was told. Later orders are stricter than earlier ones; none is taken back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    Run,
    Retire,
    Drain { deadline: Instant },
    Abort,
}

/// The handle by which one served connection is ended from elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Control(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    order: Mutex<Order>,
    waker: AtomicWaker,
}

impl Default for Shared {
    fn default() -> Self {
        Self { order: Mutex::new(Order::Run), waker: AtomicWaker::new() }
    }
}

impl Control {
    /// Ends the connection in good order: no new streams (GOAWAY), those that are open may finish within `patience`,
    /// and are reset then. A second call can only shorten the time.
    pub fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        self.update(|order| match *order {
            Order::Run | Order::Retire => *order = Order::Drain { deadline },
            Order::Drain { deadline: earlier } => *order = Order::Drain { deadline: earlier.min(deadline) },
            Order::Abort => {}
        });
    }

    /// Ends the connection in good order as soon as it has no streams: as it ends when it was idle for long. Meant for
    /// one that has none; a stream that is on its way may finish.
    pub fn retire(&self) {
        self.update(|order| {
            if *order == Order::Run {
                *order = Order::Retire;
            }
        });
    }

    /// Ends the connection and all its streams at once.
    pub fn abort(&self) {
        self.update(|order| *order = Order::Abort);
    }

    fn update(&self, change: impl FnOnce(&mut Order)) {
        change(&mut self.0.order.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.waker.wake();
    }

    /// Wakes the connection's task, to look at what has changed besides the order.
    pub(crate) fn wake(&self) {
        self.0.waker.wake();
    }

    /// The order now; wakes the task when it changes.
    pub(crate) fn poll_order(&self, cx: &mut Context<'_>) -> Order {
        self.0.waker.register(cx.waker());
        *self.0.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready when there is an order to end even a connection that has not begun.
    pub(crate) fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self.poll_order(cx) {
            Order::Run | Order::Retire => Poll::Pending,
            Order::Drain { .. } | Order::Abort => Poll::Ready(()),
        }
    }
}
