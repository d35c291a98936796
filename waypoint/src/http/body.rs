//! Bodies of HTTP/1.1: where they end, and chunks (RFC 9112 section 7.1), read as strictly as heads.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::http::h1::{Framing, HeadParser, Refusal};
use crate::http::head::Fields;

/// The longest line that announces a chunk, extensions included.
const MAX_CHUNK_LINE: usize = 4096;
/// What extensions of a body may come to. They mean nothing to us, and peers have been made to read them without end.
const MAX_EXTENSIONS: usize = 16 * 1024;
/// Data up to this size is copied behind the chunk's size rather than sent from where it is.
const COPIED: usize = 4096;

/// What comes next of a body.
#[derive(Debug)]
pub enum Part {
    /// Data; never empty.
    Data(Bytes),
    /// The end; with trailers, if [`BodyReader::next`]'s fields are not empty.
    End,
    /// More input is needed.
    More,
}

/// Reads one body.
#[derive(Clone, Copy, Debug)]
pub struct BodyReader {
    state: State,
    extensions: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Length(u64),
    UntilClose,
    ChunkSize,
    ChunkData(u64),
    /// After a chunk's data, which CR LF has to follow.
    ChunkEnd,
    Trailers(HeadParser),
    Done,
}

impl Default for BodyReader {
    /// One that is at its end.
    fn default() -> Self {
        Self::new(Framing::None)
    }
}

impl BodyReader {
    /// For a body that is framed so.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, extensions: 0 }
    }

    /// Whether all of it was read.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether the connection's end is the body's.
    #[must_use]
    pub fn ends_with_connection(&self) -> bool {
        matches!(self.state, State::UntilClose)
    }

    /// The next part of what has come.
    ///
    /// # Errors
    /// The body is malformed, and its end unknown.
    pub fn next(&mut self, input: &mut BytesMut, trailers: &mut Fields) -> Result<Part, Refusal> {
        loop {
            match &mut self.state {
                State::Done => return Ok(Part::End),
                _ if input.is_empty() => return Ok(Part::More),
                State::UntilClose => return Ok(Part::Data(input.split().freeze())),
                State::Length(left) => {
                    let data = take(input, left);
                    if *left == 0 {
                        self.state = State::Done;
                    }
                    return Ok(Part::Data(data));
                }
                State::ChunkData(left) => {
                    let data = take(input, left);
                    if *left == 0 {
                        self.state = State::ChunkEnd;
                    }
                    return Ok(Part::Data(data));
                }
                State::ChunkEnd => match **input {
                    [b'\r', b'\n', ..] => {
                        input.advance(2);
                        self.state = State::ChunkSize;
                    }
                    [b'\r'] => return Ok(Part::More),
                    _ => return Err(Refusal::Malformed("a chunk that is longer than its size")),
                },
                State::ChunkSize => {
                    let Some(size) = self.chunk_size(input)? else { return Ok(Part::More) };
                    self.state = if size == 0 {
                        State::Trailers(HeadParser::default())
                    } else {
                        State::ChunkData(size)
                    };
                }
                State::Trailers(parser) => {
                    let Some(end) = parser.trailers(input, trailers)? else { return Ok(Part::More) };
                    input.advance(end);
                    self.state = State::Done;
                }
            }
        }
    }

    /// `size [extensions] CR LF`
    fn chunk_size(&mut self, input: &mut BytesMut) -> Result<Option<u64>, Refusal> {
        let searched = input.get(..MAX_CHUNK_LINE.min(input.len())).unwrap_or_default();
        let Some(end) = memchr::memchr(b'\n', searched) else {
            return if searched.len() < MAX_CHUNK_LINE {
                Ok(None)
            } else {
                Err(Refusal::Malformed("a chunk's line is too long"))
            };
        };
        let Some(line) = searched.get(..end).and_then(|line| line.strip_suffix(b"\r")) else {
            return Err(Refusal::Malformed("a chunk's line that does not end with CR LF"));
        };
        let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let (size, extensions) = line.split_at(digits);
        if size.is_empty() || size.len() > 15 {
            return Err(Refusal::Malformed("a chunk's size that is none"));
        }
        // Blanks before the semicolon are allowed to be read; nothing else is (RFC 9112 section 7.1.1).
        let rest = extensions.trim_ascii_start();
        if !(extensions.is_empty() || rest.starts_with(b";"))
            || extensions.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f)
        {
            return Err(Refusal::Malformed("a chunk's size that something else follows"));
        }
        self.extensions += extensions.len();
        if self.extensions > MAX_EXTENSIONS {
            return Err(Refusal::Malformed("too many chunk extensions"));
        }
        let size = size.iter().fold(0u64, |size, digit| size << 4 | u64::from(hex(*digit)));
        input.advance(end + 1);
        Ok(Some(size))
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

/// As much of `left` as there is.
fn take(input: &mut BytesMut, left: &mut u64) -> Bytes {
    let length = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
    *left -= length as u64;
    input.split_to(length).freeze()
}

/// What is to be written, in order: short things together, long ones as they are.
#[derive(Debug, Default)]
pub struct Output {
    /// Comes first.
    pub(crate) front: BytesMut,
    queue: std::collections::VecDeque<Bytes>,
    queued: usize,
}

impl Output {
    /// Bytes that are not written yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.front.len() + self.queued
    }

    /// Whether it is in one piece.
    pub(crate) fn is_one_piece(&self) -> bool {
        self.queue.is_empty() || (self.front.is_empty() && self.queue.len() == 1)
    }

    /// Whether all is written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds data at the end.
    pub fn push(&mut self, data: Bytes) {
        if self.queue.is_empty() && data.len() <= COPIED {
            self.front.extend_from_slice(&data);
        } else if !data.is_empty() {
            self.queued += data.len();
            self.queue.push_back(data);
        }
    }

    fn push_small(&mut self, data: &[u8]) {
        if self.queue.is_empty() {
            self.front.extend_from_slice(data);
        } else {
            self.push_queue(Bytes::copy_from_slice(data));
        }
    }

    fn push_queue(&mut self, data: Bytes) {
        self.queued += data.len();
        self.queue.push_back(data);
    }

    /// Adds a chunk.
    pub fn push_chunk(&mut self, data: Bytes) {
        let mut line = [0; 18];
        let mut size = &mut line[..];
        let capacity = size.len();
        // Sixteen digits and two bytes are the most there can be.
        let _ = std::io::Write::write_fmt(&mut size, format_args!("{:x}\r\n", data.len()));
        let used = capacity - size.len();
        self.push_small(line.get(..used).unwrap_or_default());
        self.push(data);
        self.push_small(b"\r\n");
    }

    /// Adds the end of a chunked body, with its trailers.
    pub fn push_last_chunk(&mut self, trailers: Option<&Fields>) {
        let Some(trailers) = trailers else { return self.push_small(b"0\r\n\r\n") };
        let mut end = BytesMut::from(&b"0\r\n"[..]);
        trailers.write(&mut end);
        end.put_slice(b"\r\n");
        self.push_small(&end);
    }

    /// Gives up what is not written.
    pub fn clear(&mut self) {
        self.front.clear();
        self.queue.clear();
        self.queued = 0;
    }
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn chunk(&self) -> &[u8] {
        if self.front.is_empty() { self.queue.front().map_or(&[], |data| data) } else { &self.front }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [std::io::IoSlice<'a>]) -> usize {
        let front = (!self.front.is_empty()).then_some(&self.front[..]);
        let parts = front.into_iter().chain(self.queue.iter().map(|data| &data[..]));
        slices.iter_mut().zip(parts).map(|(slice, part)| *slice = std::io::IoSlice::new(part)).count()
    }

    fn advance(&mut self, mut written: usize) {
        let front = written.min(self.front.len());
        self.front.advance(front);
        written -= front;
        while let Some(data) = self.queue.front_mut()
            && written > 0
        {
            let part = written.min(data.len());
            data.advance(part);
            self.queued -= part;
            written -= part;
            if data.is_empty() {
                self.queue.pop_front();
            }
        }
    }
}
