//! The sending half: plaintext becomes records, and several records one write.
//!
//! ```text
//!          begin_close                  all written
//!  Open ───────────────▶ close_notify ──────────────▶ transport shut down
//! ```
//!
//! What is written is only sealed and queued; [`Outbound::poll_drain`] hands the queue to the transport. Small
//! writes wait in `staged` for more, up to a flush, so that they share a record. Both are empty, and hold no
//! memory, when all is written.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::crypto::cipher::OutboundChunks;
use rustls::{AlertDescription, ContentType};
use tokio::io::AsyncWrite;

use super::TlsError;
use super::record::{FRAGMENT, Keys};

/// Less plaintext than this waits for more or for a flush; copying it once more is cheaper than a record.
const STAGED: usize = 4096;
/// So many queued bytes are handed to the transport without waiting for a flush, and nothing more is accepted until
/// it has taken some. With less, the receiver is woken more often; with much more, the first record has left the
/// cache when it is written (examples/tls_stream.rs).
const BATCH: usize = 128 * 1024;
/// Records handed to the transport at once.
const SLICES: usize = 32;
/// Slices accepted at once from a vectored write.
const INPUT_SLICES: usize = 64;

pub(super) struct Outbound {
    /// Plaintext that waits for more.
    staged: Vec<u8>,
    /// Sealed records.
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the first record that are written.
    written: usize,
    /// Bytes in the queue that are not written.
    queued: usize,
    closing: bool,
}

impl Outbound {
    pub(super) fn new() -> Self {
        Self { staged: Vec::new(), queue: VecDeque::new(), written: 0, queued: 0, closing: false }
    }

    /// Takes what fits of `input`; waits while the queue is full.
    pub(super) fn poll_accept<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        key_update_due: &mut bool,
        cx: &mut Context<'_>,
        input: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        while self.queued >= BATCH {
            ready!(self.poll_drain(io, cx))?;
        }
        if std::mem::take(key_update_due) {
            self.seal_staged(keys)?;
            self.update_keys(keys)?;
        }
        let accepted = self.accept(keys, input)?;
        if self.queued >= BATCH {
            // The bytes are accepted whether the transport takes them now or not.
            let _ = self.poll_drain(io, cx)?;
        }
        Poll::Ready(Ok(accepted))
    }

    /// Writes all that was accepted.
    pub(super) fn poll_flush<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.seal_staged(keys)?;
        ready!(self.poll_drain(io, cx))?;
        Pin::new(io).poll_flush(cx)
    }

    /// Whether the last record of this side is sealed.
    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Says that nothing follows, once.
    pub(super) fn begin_close(&mut self, keys: &mut Keys) -> io::Result<()> {
        if self.closing {
            return Ok(());
        }
        self.seal_staged(keys)?;
        self.seal_alert(keys, AlertDescription::CloseNotify)
    }

    /// Says why the connection ends. Nothing follows.
    pub(super) fn seal_alert(&mut self, keys: &mut Keys, alert: AlertDescription) -> io::Result<()> {
        const WARNING: u8 = 1;
        const FATAL: u8 = 2;
        self.closing = true;
        let level = if alert == AlertDescription::CloseNotify { WARNING } else { FATAL };
        self.seal(keys, ContentType::Alert, OutboundChunks::Single(&[level, u8::from(alert)]))
    }

    /// Writes until the queue is empty or the transport is full.
    pub(super) fn poll_drain<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while let Some(first) = self.queue.front() {
            let first = first.get(self.written..).unwrap_or_default();
            let count = if io.is_write_vectored() {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let rest = self.queue.iter().skip(1).map(Vec::as_slice);
                let mut filled = 0;
                for (slot, record) in slices.iter_mut().zip(std::iter::once(first).chain(rest)) {
                    *slot = IoSlice::new(record);
                    filled += 1;
                }
                let slices = slices.get(..filled).unwrap_or_default();
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, slices))?
            } else {
                ready!(Pin::new(&mut *io).poll_write(cx, first))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(count);
        }
        // Not even the queue's own memory is held while nothing is sent.
        self.queue = VecDeque::new();
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, count: usize) {
        self.queued = self.queued.saturating_sub(count);
        self.written += count;
        while let Some(length) = self.queue.front().map(Vec::len)
            && self.written >= length
        {
            self.written -= length;
            self.queue.pop_front();
        }
    }

    /// Seals what makes whole records, or is large enough for one, and stages the rest.
    fn accept(&mut self, keys: &mut Keys, input: &[IoSlice<'_>]) -> io::Result<usize> {
        let room = BATCH.saturating_sub(self.queued).max(FRAGMENT);
        let offered: usize = input.iter().take(INPUT_SLICES).map(|slice| slice.len()).sum();
        let accepted = offered.min(room);
        let total = self.staged.len() + accepted;
        let staged = std::mem::take(&mut self.staged);
        let mut chunks: [&[u8]; INPUT_SLICES + 1] = [&[]; INPUT_SLICES + 1];
        let sources = std::iter::once(staged.as_slice()).chain(input.iter().map(|slice| &**slice));
        for (slot, source) in chunks.iter_mut().zip(sources) {
            *slot = source;
        }
        let mut start = 0;
        while total - start >= STAGED {
            let end = total.min(start + FRAGMENT);
            let payload = OutboundChunks::Multiple { chunks: &chunks, start, end };
            if let Err(error) = self.seal(keys, ContentType::ApplicationData, payload) {
                self.closing = true;
                return Err(error);
            }
            start = end;
        }
        if start == 0 {
            // Nothing was sealed: what was staged stays where it is.
            let mut staged = staged;
            let mut left = accepted;
            for slice in input.iter().take(INPUT_SLICES) {
                let part = slice.get(..left.min(slice.len())).unwrap_or_default();
                staged.extend_from_slice(part);
                left -= part.len();
            }
            self.staged = staged;
        } else if start < total {
            let rest = OutboundChunks::Multiple { chunks: &chunks, start, end: total };
            self.staged = rest.to_vec();
        }
        Ok(accepted)
    }

    fn seal_staged(&mut self, keys: &mut Keys) -> io::Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let staged = std::mem::take(&mut self.staged);
        self.seal(keys, ContentType::ApplicationData, OutboundChunks::Single(&staged))
    }

    fn seal(&mut self, keys: &mut Keys, content: ContentType, payload: OutboundChunks<'_>) -> io::Result<()> {
        if keys.sending_key_used_up() {
            self.update_keys(keys)?;
        }
        let record = keys.seal(content, payload).map_err(|e| TlsError::Record(e.to_string()))?;
        self.push(record);
        Ok(())
    }

    fn update_keys(&mut self, keys: &mut Keys) -> io::Result<()> {
        let record = keys.update_sending().map_err(|e| TlsError::Record(e.to_string()))?;
        self.push(record);
        Ok(())
    }

    fn push(&mut self, record: Vec<u8>) {
        self.queued += record.len();
        self.queue.push_back(record);
    }
}
