//! The sending half: plaintext becomes records, and several records one write.
//!
//! ```text
//!          begin_close                  all written
//!  Open ───────────────▶ close_notify ──────────────▶ transport shut down
//!    │  fatal alert, or a record that can't be sealed    ▲
//!    └───────────────────────────────────────────────────┘
//! ```
//!
//! Nothing is ever sealed behind an alert, or behind a record that failed: the peer then sees an end without
//! close_notify. If accepted bytes were lost that way, every flush and shutdown says so.
//!
//! What is written is only sealed, into one of the thread's buffers ([`buffers`]); [`Outbound::poll_drain`] hands that
//! to the transport. Small writes wait in `staged` for more, up to a flush, so that they share a record. Both are
//! empty, and hold no memory, when all is written.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, ContentType};
use tokio::io::AsyncWrite;

use super::TlsError;
use super::buffers::{self, BUFFER, Store};
use super::record::{FRAGMENT, KEY_UPDATE_RECORD, Keys, OVERHEAD, Plain};

/// Less plaintext than this waits for more or for a flush; copying it once more is cheaper than a record.
const STAGED: usize = 4096;
/// So many sealed bytes are handed to the transport without waiting for a flush, and nothing more is accepted until
/// it has taken some. With less, the receiver is woken more often; with much more, the first record has left the
/// cache when it is written (examples/tls_stream.rs).
const BATCH: usize = 128 * 1024;
/// Less than this does not keep a buffer while the transport is full.
const SMALL: usize = 16 * 1024;
/// Slices accepted at once from a vectored write.
const INPUT_SLICES: usize = 64;

// What one call may accept and seal on top of a batch that is almost full: a record's worth, what was staged, and each of
// their records with a key update before it; an alert at the end.
const _: () = assert!(BATCH + FRAGMENT + STAGED + 16 * (OVERHEAD + KEY_UPDATE_RECORD) <= BUFFER);

pub(super) struct Outbound {
    /// Plaintext that waits for more.
    staged: Vec<u8>,
    /// Sealed records.
    store: Store,
    /// Where in the store those bytes are that are not written yet.
    sealed: Range<usize>,
    /// The last record is sealed, or none can be any more.
    closing: bool,
    /// Bytes that were accepted will never be sent.
    lost: bool,
}

impl Outbound {
    /// Starts with the records of a handshake that are to go first.
    pub(super) fn new(first: Vec<u8>) -> Self {
        let sealed = 0..first.len();
        let store = if first.is_empty() { Store::None } else { Store::Exact(first) };
        Self { staged: Vec::new(), store, sealed, closing: false, lost: false }
    }

    /// Takes what fits of `input`; waits while there is a whole batch that the transport has not taken.
    pub(super) fn poll_accept<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        cx: &mut Context<'_>,
        input: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        while self.sealed.len() >= BATCH {
            ready!(self.poll_drain(io, cx))?;
        }
        let accepted = self.accept(keys, input)?;
        if self.sealed.len() >= BATCH {
            // The bytes are accepted whether the transport takes them now or not.
            let _ = self.poll_drain(io, cx)?;
        }
        Poll::Ready(Ok(accepted))
    }

    /// Writes all that was accepted; an error if some of it never will be.
    pub(super) fn poll_flush<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.seal_staged(keys)?;
        ready!(self.poll_drain(io, cx))?;
        ready!(Pin::new(io).poll_flush(cx))?;
        Poll::Ready(self.nothing_lost())
    }

    /// Writes what is sealed and shuts the transport's sending side; an error if accepted bytes are not among it.
    pub(super) fn poll_shutdown<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.begin_close(keys)?;
        ready!(self.poll_drain(io, cx))?;
        ready!(Pin::new(io).poll_shutdown(cx))?;
        Poll::Ready(self.nothing_lost())
    }

    fn nothing_lost(&self) -> io::Result<()> {
        if self.lost {
            const WHY: &str = "the encrypted connection failed before all that was written could be sent";
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, WHY));
        }
        Ok(())
    }

    /// Whether no more records of this side follow.
    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Says that nothing follows, once.
    fn begin_close(&mut self, keys: &mut Keys) -> io::Result<()> {
        if self.closing {
            return Ok(());
        }
        self.seal_staged(keys)?;
        self.seal_alert(keys, AlertDescription::CloseNotify)
    }

    /// Says why the connection ends. Nothing follows, not even what waits for a flush.
    pub(super) fn seal_alert(&mut self, keys: &mut Keys, alert: AlertDescription) -> io::Result<()> {
        const WARNING: u8 = 1;
        const FATAL: u8 = 2;
        if self.closing {
            return Ok(());
        }
        self.closing = true;
        self.lost |= !std::mem::take(&mut self.staged).is_empty();
        let level = if alert == AlertDescription::CloseNotify { WARNING } else { FATAL };
        self.seal(keys, ContentType::Alert, Plain::new(&[&[level, u8::from(alert)]]))
    }

    /// Writes until nothing is left or the transport is full.
    pub(super) fn poll_drain<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.sealed.is_empty() {
            let rest = self.store.bytes().get(self.sealed.clone()).unwrap_or_default();
            let Poll::Ready(written) = Pin::new(&mut *io).poll_write(cx, rest) else {
                self.shrink();
                return Poll::Pending;
            };
            let written = written?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sealed.start += written;
        }
        self.release();
        Poll::Ready(Ok(()))
    }

    /// Keeps no more than is needed while the transport is full.
    fn shrink(&mut self) {
        if self.sealed.len() < SMALL && matches!(self.store, Store::Shared(_)) {
            let rest = self.store.bytes().get(self.sealed.clone()).unwrap_or_default().to_vec();
            self.release();
            self.sealed = 0..rest.len();
            self.store = Store::Exact(rest);
        }
    }

    fn release(&mut self) {
        self.store.release();
        self.sealed = 0..0;
    }

    /// Seals what makes whole records, or is large enough for one, and stages the rest.
    fn accept(&mut self, keys: &mut Keys, input: &[IoSlice<'_>]) -> io::Result<usize> {
        let room = BATCH.saturating_sub(self.sealed.len()).max(FRAGMENT);
        let offered: usize = input.iter().take(INPUT_SLICES).map(|slice| slice.len()).sum();
        let accepted = offered.min(room);
        let mut staged = std::mem::take(&mut self.staged);
        let total = staged.len() + accepted;
        let mut pieces: [&[u8]; INPUT_SLICES + 1] = [&[]; INPUT_SLICES + 1];
        let sources = std::iter::once(staged.as_slice()).chain(input.iter().map(|slice| &**slice));
        for (slot, source) in pieces.iter_mut().zip(sources) {
            *slot = source;
        }
        let all = Plain::new(&pieces);
        let mut start = 0;
        while total - start >= STAGED {
            let end = total.min(start + FRAGMENT);
            self.seal(keys, ContentType::ApplicationData, all.part(start..end))?;
            start = end;
        }
        if start > 0 {
            self.staged = all.part(start..total).to_vec();
            return Ok(accepted);
        }
        // Nothing was sealed: what was staged stays where it is.
        if staged.capacity() == 0 && accepted > 0 {
            staged = buffers::take_little();
        }
        let mut left = accepted;
        for slice in input.iter().take(INPUT_SLICES) {
            let part = slice.get(..left.min(slice.len())).unwrap_or_default();
            staged.extend_from_slice(part);
            left -= part.len();
        }
        self.staged = staged;
        Ok(accepted)
    }

    fn seal_staged(&mut self, keys: &mut Keys) -> io::Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let staged = std::mem::take(&mut self.staged);
        let sealed = self.seal(keys, ContentType::ApplicationData, Plain::new(&[&staged]));
        buffers::give_little(staged);
        sealed
    }

    /// Seals a record, behind one that announces new keys if that is due. If it fails, it was the last.
    fn seal(&mut self, keys: &mut Keys, content: ContentType, payload: Plain<'_>) -> io::Result<()> {
        let sealed = self.try_seal(keys, content, payload);
        if sealed.is_err() {
            self.closing = true;
            self.lost |= content == ContentType::ApplicationData;
        }
        sealed.map_err(|e| TlsError::Record(e.to_string()).into())
    }

    fn try_seal(
        &mut self,
        keys: &mut Keys,
        content: ContentType,
        payload: Plain<'_>,
    ) -> Result<(), rustls::Error> {
        if keys.update_due(content) {
            self.sealed.end += keys.update_sending(self.room(KEY_UPDATE_RECORD))?;
        }
        self.sealed.end += keys.seal(content, payload, self.room(payload.len() + OVERHEAD))?;
        Ok(())
    }

    /// Free space behind what is sealed, of so many bytes.
    fn room(&mut self, needed: usize) -> &mut [u8] {
        let is_shared = matches!(self.store, Store::Shared(_));
        let bytes = self.store.bytes();
        if !is_shared {
            let mut buffer = buffers::take();
            let rest = bytes.get(self.sealed.clone()).unwrap_or_default();
            if let Some(front) = buffer.get_mut(..rest.len()) {
                front.copy_from_slice(rest);
            }
            self.store = Store::Shared(buffer);
            self.sealed = 0..self.sealed.len();
        } else if bytes.len().saturating_sub(self.sealed.end) < needed {
            bytes.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        let end = self.sealed.end;
        self.store.bytes().get_mut(end..).unwrap_or_default()
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.release();
    }
}
