//! The receiving half: bytes from the transport become plaintext.
//!
//! ```text
//!        close_notify                      fatal alert, bad record, early end
//!  Open ──────────────▶ Finished     Open ────────────────────────────────────▶ Failed
//! ```
//!
//! The buffer holds, from front to back: plaintext that nobody has read yet, ciphertext, free space. It is one of
//! the thread's ([`buffers`]); what is left of a record while the transport has no more is kept in an allocation of
//! its own size, so that a connection that waits holds no more than it must.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, ContentType};
use tokio::io::{AsyncRead, ReadBuf};

use super::TlsError;
use super::buffers::{self, BUFFER, Store};
use super::record::{CIPHERTEXT, HEADER, Keys};

/// Records in a row that carry nothing (they cost the receiver work, not the sender).
const MAX_EMPTY_RECORDS: u8 = 32;
/// Key updates in a row without data in between.
const MAX_KEY_UPDATES: u8 = 32;
/// Bytes of an incomplete post-handshake message, which may be a session ticket with certificates in it.
const MAX_MESSAGE: usize = 64 * 1024;
/// Less free space than this at the end of the buffer, and its content is moved to the front.
const MIN_FREE: usize = 64 * 1024;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

#[derive(Clone)]
enum State {
    Open,
    /// The peer said that no more follows.
    Finished,
    Failed(TlsError),
}

/// What a record, or the lack of one, means.
enum Next {
    /// Plaintext may have come.
    Progress,
    /// The buffer holds no whole record.
    NeedMore,
    /// Nothing follows.
    Finished,
}

pub(super) struct Inbound {
    store: Store,
    /// Plaintext not read yet.
    plain: Range<usize>,
    /// Bytes not yet decrypted.
    cipher: Range<usize>,
    /// The beginning of a post-handshake message.
    message: Vec<u8>,
    state: State,
    empty_records: u8,
    key_updates: u8,
}

impl Inbound {
    /// Starts with what was read behind the handshake.
    pub(super) fn new(ahead: Vec<u8>) -> Self {
        let cipher = 0..ahead.len();
        let store = if ahead.is_empty() { Store::None } else { Store::Exact(ahead) };
        Self {
            store,
            plain: 0..0,
            cipher,
            message: Vec::new(),
            state: State::Open,
            empty_records: 0,
            key_updates: 0,
        }
    }

    /// Fills `out` with what is there, or waits for the first byte. The error of a failed connection comes after
    /// all data before it, and then every time.
    pub(super) fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        keys: &mut Keys,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), TlsError>> {
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = out.filled().len();
        loop {
            self.deliver(out);
            if out.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let delivered = out.filled().len() > before;
            match self.next_record(keys) {
                Ok(Next::Progress) => {}
                Ok(Next::Finished) => return Poll::Ready(Ok(())),
                Ok(Next::NeedMore) if delivered => {
                    self.release_if_empty();
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::NeedMore) => match ready!(self.poll_fill(io, cx)) {
                    Ok(0) => self.fail(TlsError::Truncated),
                    Ok(_) => {}
                    Err(error) => self.fail(TlsError::Transport(error.into())),
                },
                // It comes again with the next read.
                Err(_) if delivered => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Gives up reading for a reason that [`Inbound::poll_read`] then reports.
    pub(super) fn fail(&mut self, error: TlsError) {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(error);
        }
        self.cipher = 0..0;
        self.message = Vec::new();
    }

    fn deliver(&mut self, out: &mut ReadBuf<'_>) {
        let count = self.plain.len().min(out.remaining());
        let end = self.plain.start + count;
        if let Some(bytes) = self.store.bytes().get(self.plain.start..end) {
            out.put_slice(bytes);
        }
        self.plain.start = end;
    }

    /// Decrypts one record, if a whole one is there.
    fn next_record(&mut self, keys: &mut Keys) -> Result<Next, TlsError> {
        match &self.state {
            State::Open => {}
            State::Finished => {
                self.release();
                return Ok(Next::Finished);
            }
            State::Failed(error) => {
                let error = error.clone();
                self.release();
                return Err(error);
            }
        }
        let found = self.open_record(keys);
        if let Err(error) = &found {
            self.fail(error.clone());
        }
        found
    }

    fn open_record(&mut self, keys: &mut Keys) -> Result<Next, TlsError> {
        let bytes = self.store.bytes().get_mut(self.cipher.clone()).unwrap_or_default();
        let Some((header, rest)) = bytes.split_at_mut_checked(HEADER) else { return Ok(Next::NeedMore) };
        let &mut [content, _, _, high, low] = header else { return Ok(Next::NeedMore) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        // Nothing unprotected may follow a handshake (RFC 8446, section 5).
        if content != u8::from(ContentType::ApplicationData) {
            return Err(TlsError::Protocol("an unprotected record after the handshake"));
        }
        if length > CIPHERTEXT {
            return Err(TlsError::Protocol("a record longer than TLS allows"));
        }
        let Some(body) = rest.get_mut(..length) else { return Ok(Next::NeedMore) };
        let (content, place) = keys.open(body).map_err(|e| TlsError::Record(e.to_string()))?;
        let body_start = self.cipher.start + HEADER;
        self.cipher.start = body_start + length;
        let plain = body_start + place.start..body_start + place.end;
        if !self.message.is_empty() && content != ContentType::Handshake {
            return Err(TlsError::Protocol("another record within a handshake message"));
        }
        match content {
            ContentType::ApplicationData => self.data(plain)?,
            ContentType::Alert => self.alert(plain)?,
            ContentType::Handshake => self.post_handshake(plain, keys)?,
            _ => return Err(TlsError::Protocol("a record of an unknown content type")),
        }
        Ok(Next::Progress)
    }

    fn data(&mut self, plain: Range<usize>) -> Result<(), TlsError> {
        if plain.is_empty() {
            self.empty_records += 1;
            if self.empty_records > MAX_EMPTY_RECORDS {
                return Err(TlsError::Protocol("too many empty records"));
            }
        } else {
            self.empty_records = 0;
            self.key_updates = 0;
        }
        self.plain = plain;
        Ok(())
    }

    fn alert(&mut self, plain: Range<usize>) -> Result<(), TlsError> {
        let &mut [_, description] = self.store.bytes().get_mut(plain).unwrap_or_default() else {
            return Err(TlsError::Protocol("an alert that is not two bytes long"));
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                // Whatever follows is to be ignored (RFC 8446, section 6.1).
                self.cipher = 0..0;
                self.state = State::Finished;
                Ok(())
            }
            // "I cancel for a reason of my own": a close_notify follows.
            AlertDescription::UserCanceled => self.data(0..0),
            other => Err(TlsError::Alert(other)),
        }
    }

    /// Session tickets, which are not used here, and key updates (RFC 8446, section 4.6).
    fn post_handshake(&mut self, plain: Range<usize>, keys: &mut Keys) -> Result<(), TlsError> {
        if plain.is_empty() {
            return Err(TlsError::Protocol("an empty handshake record"));
        }
        let mut message = std::mem::take(&mut self.message);
        message.extend_from_slice(self.store.bytes().get_mut(plain).unwrap_or_default());
        let mut rest = message.as_slice();
        while let [kind, a, b, c, after @ ..] = rest {
            let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap_or(usize::MAX);
            if length > MAX_MESSAGE {
                return Err(TlsError::Protocol("a handshake message that is too long"));
            }
            let Some((body, after)) = after.split_at_checked(length) else { break };
            match (*kind, body) {
                (NEW_SESSION_TICKET, _) if !keys.is_server() => {
                    self.data(0..0)?;
                }
                (KEY_UPDATE, [asks @ (0 | 1)]) if after.is_empty() => {
                    self.key_updates += 1;
                    if self.key_updates > MAX_KEY_UPDATES {
                        return Err(TlsError::Protocol("too many key updates"));
                    }
                    keys.update_receiving().map_err(|e| TlsError::Record(e.to_string()))?;
                    if *asks == 1 {
                        keys.ask_for_update();
                    }
                }
                _ => return Err(TlsError::Protocol("an unexpected handshake message")),
            }
            rest = after;
        }
        self.message = rest.to_vec();
        Ok(())
    }

    /// Reads behind what is there.
    fn poll_fill<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.make_room();
        let free = self.store.bytes().get_mut(self.cipher.end..).unwrap_or_default();
        let mut buffer = ReadBuf::new(free);
        match Pin::new(io).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) => {
                let count = buffer.filled().len();
                self.cipher.end += count;
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                self.shrink();
                Poll::Pending
            }
        }
    }

    /// Makes the store one of the thread's buffers with free space at its end. There is no plaintext left then.
    fn make_room(&mut self) {
        match &mut self.store {
            Store::None => {
                self.store = Store::Shared(buffers::take());
                self.cipher = 0..0;
            }
            Store::Shared(buffer) => {
                if buffer.len().saturating_sub(self.cipher.end) < MIN_FREE {
                    buffer.copy_within(self.cipher.clone(), 0);
                    self.cipher = 0..self.cipher.len();
                }
            }
            Store::Exact(bytes) => {
                // What came with a handshake may be larger than a buffer.
                let pending = bytes.get(self.cipher.clone()).unwrap_or_default();
                let mut buffer = buffers::take();
                match buffer.get_mut(..pending.len()) {
                    Some(front) if pending.len() + MIN_FREE <= BUFFER => {
                        front.copy_from_slice(pending);
                        self.cipher = 0..pending.len();
                        self.store = Store::Shared(buffer);
                    }
                    _ => {
                        let end = bytes.len() + MIN_FREE;
                        bytes.resize(end, 0);
                    }
                }
            }
        }
    }

    /// Keeps only what is needed while waiting.
    fn shrink(&mut self) {
        if self.cipher.is_empty() {
            self.release();
            return;
        }
        let kept = self.store.bytes().get(self.cipher.clone()).unwrap_or_default().to_vec();
        let kept_range = 0..kept.len();
        self.release();
        self.cipher = kept_range;
        self.store = Store::Exact(kept);
    }

    fn release_if_empty(&mut self) {
        if self.cipher.is_empty() && self.plain.is_empty() {
            self.release();
        }
    }

    fn release(&mut self) {
        self.store.release();
        self.cipher = 0..0;
        self.plain = 0..0;
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        self.release();
    }
}
