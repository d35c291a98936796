//! Watches the frames that a peer sends and says when it sends more of a kind than a working peer ever would.
//!
//! `h2` bounds what it stores: streams, header lists, continuations, small and empty DATA frames, stream errors.
//! It does not bound how many frames it answers or throws away: PING and SETTINGS (each is answered), PRIORITY and
//! unknown kinds, RST_STREAM and WINDOW_UPDATE for closed streams. Those cost memory nothing, but a core. Here they
//! draw on allowances that grow with time and with the work that justifies them.
//!
//! Of its own limits one is for a connection's whole life: how many streams it has reset because of errors. Tunnels
//! that are cut while their peer sends make such errors too (frames for streams that are forgotten), so a connection
//! that lives for weeks would be ended for nothing, with all its tunnels. That limit is off; instead the resets that
//! `h2` sends are followed here and may come at a rate.
//!
//! Nothing is stored of a frame but its nine-byte header (RFC 9113 section 4.1), and a reset's code.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

const HEADER: usize = 9;
/// A header and the code of a RST_STREAM.
const HEADER_AND_CODE: usize = 13;
/// The client's connection preface (RFC 9113 section 3.4) comes before the first frame.
const PREFACE: u32 = 24;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const REFUSED_STREAM: u32 = 7;

/// What a peer sent too much of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flood {
    /// SETTINGS, PING, PRIORITY, GOAWAY and unknown frames.
    Control,
    /// RST_STREAM beyond the streams that were opened.
    Resets,
    /// WINDOW_UPDATE beyond what was sent to the peer.
    WindowUpdates,
    /// Requests and frames that had to be answered with a reset.
    Errors,
    /// Streams opened and reset before they were answered (CVE-2023-44487).
    EarlyResets,
}

impl fmt::Display for Flood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "a flood of SETTINGS, PING or PRIORITY frames",
            Self::Resets => "a flood of RST_STREAM frames",
            Self::WindowUpdates => "a flood of WINDOW_UPDATE frames",
            Self::Errors => "a flood of frames that are stream errors",
            Self::EarlyResets => "a flood of streams that were reset before they were answered",
        })
    }
}

/// An allowance: `burst` at once, `per_second` in the long run. The clock is read only when it runs dry.
#[derive(Debug)]
pub(crate) struct Allowance {
    left: u32,
    burst: u32,
    per_second: u32,
    filled: Instant,
}

impl Allowance {
    pub(crate) fn new(burst: u32, per_second: u32) -> Self {
        Self { left: burst, burst, per_second, filled: Instant::now() }
    }

    /// Draws one; false if there is none left.
    pub(crate) fn draw(&mut self) -> bool {
        if self.left == 0 {
            let now = Instant::now();
            let elapsed = now.saturating_duration_since(self.filled).min(Duration::from_secs(3600));
            let earned =
                u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX) * u64::from(self.per_second) / 1000;
            if earned == 0 {
                return false;
            }
            self.left = u32::try_from(earned).unwrap_or(u32::MAX).min(self.burst);
            self.filled = now;
        }
        self.left -= 1;
        true
    }

    fn earn(&mut self, amount: u32) {
        self.left = self.left.saturating_add(amount).min(self.burst);
    }
}

/// Finds the frames in one direction of a connection.
#[derive(Debug)]
struct Frames {
    head: [u8; HEADER_AND_CODE],
    have: usize,
    /// Bytes of the current frame (or of the preface) still to come.
    skip: u32,
    /// Whether the current frame is DATA.
    in_data: bool,
}

enum Found {
    /// A frame has begun; of a RST_STREAM the code is there too.
    Frame { kind: u8, code: u32 },
    /// A frame is complete, or more of a DATA frame has come.
    Progress,
}

impl Frames {
    fn new(skip: u32) -> Self {
        Self { head: [0; HEADER_AND_CODE], have: 0, skip, in_data: false }
    }

    /// The next thing to note in `bytes`, which are consumed up to there.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Found> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let step = bytes.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
                self.skip -= u32::try_from(step).unwrap_or(self.skip);
                *bytes = bytes.get(step..).unwrap_or_default();
                if self.in_data || self.skip == 0 {
                    return Some(Found::Progress);
                }
                continue;
            }
            let want = self.wanted();
            let (now, later) = bytes.split_at(bytes.len().min(want - self.have));
            if let Some(room) = self.head.get_mut(self.have..self.have + now.len()) {
                room.copy_from_slice(now);
            }
            self.have += now.len();
            *bytes = later;
            if self.have == self.wanted() {
                return Some(self.begin());
            }
        }
        None
    }

    /// How much of the frame has to be there before it is noted.
    fn wanted(&self) -> usize {
        let [a, b, c, kind, ..] = self.head;
        let with_code = self.have >= HEADER && kind == RST_STREAM && u32::from_be_bytes([0, a, b, c]) >= 4;
        if with_code { HEADER_AND_CODE } else { HEADER }
    }

    fn begin(&mut self) -> Found {
        let [a, b, c, kind, _, _, _, _, _, code @ ..] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]);
        let code_length = if self.have == HEADER_AND_CODE { 4 } else { 0 };
        self.have = 0;
        self.skip = length.saturating_sub(code_length);
        self.in_data = kind == DATA;
        Found::Frame { kind, code: u32::from_be_bytes(code) }
    }
}

/// Follows the frames of both directions of a connection.
#[derive(Debug)]
pub(crate) struct FrameWatch {
    read: Frames,
    written: Frames,
    progress: u64,
    goaway: bool,
    control: Allowance,
    resets: Allowance,
    window_updates: Allowance,
    errors: Allowance,
    late_frames: Allowance,
    unpaid_bytes: usize,
}

impl FrameWatch {
    /// Watches a client.
    pub(crate) fn of_client() -> Self {
        Self::new(PREFACE, 0)
    }

    /// Watches a server.
    pub(crate) fn of_server() -> Self {
        Self::new(0, PREFACE)
    }

    fn new(preface_of_peer: u32, own_preface: u32) -> Self {
        Self {
            read: Frames::new(preface_of_peer),
            written: Frames::new(own_preface),
            progress: 0,
            goaway: false,
            control: Allowance::new(1_000, 100),
            resets: Allowance::new(1_000, 100),
            window_updates: Allowance::new(20_000, 2_000),
            errors: Allowance::new(1_000, 20),
            late_frames: Allowance::new(10_000, 1_000),
            unpaid_bytes: 0,
        }
    }

    /// Counts whole frames and arrivals of data: as long as it changes, the peer is alive. Bytes of an unfinished
    /// header block don't count, or a peer could keep a connection by sending one a minute.
    pub(crate) fn progress(&self) -> u64 {
        self.progress
    }

    /// Whether the peer has announced that it takes no more streams.
    pub(crate) fn goaway(&self) -> bool {
        self.goaway
    }

    /// Follows `bytes` that are sent to the peer. They earn it window updates: two for each KiB, so that a peer may
    /// update stream and connection for every smallest sensible frame.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Flood> {
        self.unpaid_bytes += bytes.len();
        let earned = self.unpaid_bytes / 512;
        self.unpaid_bytes %= 512;
        self.window_updates.earn(u32::try_from(earned).unwrap_or(u32::MAX));
        while let Some(found) = self.written.next(&mut bytes) {
            if let Found::Frame { kind: RST_STREAM, code } = found {
                let within = match code {
                    PROTOCOL_ERROR | FLOW_CONTROL_ERROR | REFUSED_STREAM => self.errors.draw(),
                    STREAM_CLOSED => self.late_frames.draw(),
                    // What we reset for reasons of our own.
                    _ => true,
                };
                within.then_some(()).ok_or(Flood::Errors)?;
            }
        }
        Ok(())
    }

    /// Follows `bytes` that were read from the peer.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> Result<(), Flood> {
        while let Some(found) = self.read.next(&mut bytes) {
            let Found::Frame { kind, .. } = found else {
                self.progress += 1;
                continue;
            };
            if self.read.skip == 0 {
                self.progress += 1;
            }
            self.goaway |= kind == GOAWAY;
            let within = match kind {
                DATA | CONTINUATION => Ok(()),
                HEADERS => {
                    self.resets.earn(1);
                    Ok(())
                }
                RST_STREAM => self.resets.draw().then_some(()).ok_or(Flood::Resets),
                WINDOW_UPDATE => self.window_updates.draw().then_some(()).ok_or(Flood::WindowUpdates),
                _ => self.control.draw().then_some(()).ok_or(Flood::Control),
            };
            within?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes = (length as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0, 0, 0, 0, 1]);
        bytes.resize(HEADER + length, 0xff);
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn control_frames_may_burst_and_then_trickle() {
        let mut watch = FrameWatch::of_server();
        for _ in 0..1_000 {
            watch.read(&frame(6, 8)).unwrap();
        }
        assert_eq!(watch.read(&frame(4, 0)), Err(Flood::Control));
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..100 {
            watch.read(&frame(6, 8)).unwrap();
        }
        assert_eq!(watch.read(&frame(0x77, 3)), Err(Flood::Control));
    }

    #[tokio::test(start_paused = true)]
    async fn each_opened_stream_may_be_reset_and_each_kilobyte_updated_twice() {
        let mut watch = FrameWatch::of_client();
        watch.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        for _ in 0..50_000 {
            watch.read(&frame(HEADERS, 30)).unwrap();
            watch.read(&frame(RST_STREAM, 4)).unwrap();
            watch.write(&frame(DATA, 1015)).unwrap();
            watch.read(&frame(WINDOW_UPDATE, 4)).unwrap();
            watch.read(&frame(WINDOW_UPDATE, 4)).unwrap();
        }
        let flood = (0..30_000).find_map(|_| watch.read(&frame(WINDOW_UPDATE, 4)).err());
        assert_eq!(flood, Some(Flood::WindowUpdates));
        let flood = (0..2_000).find_map(|_| watch.read(&frame(RST_STREAM, 4)).err());
        assert_eq!(flood, Some(Flood::Resets));
    }

    #[tokio::test(start_paused = true)]
    async fn errors_that_are_answered_may_burst_and_then_trickle() {
        let reset =
            |code: u32| [frame(RST_STREAM, 4)[..HEADER].to_vec(), code.to_be_bytes().to_vec()].concat();
        let mut watch = FrameWatch::of_server();
        watch.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        // Tunnels that are cut are no errors of the peer.
        for _ in 0..100_000 {
            watch.write(&reset(8)).unwrap();
        }
        for _ in 0..10_000 {
            watch.write(&reset(STREAM_CLOSED)).unwrap();
        }
        assert_eq!(watch.write(&reset(STREAM_CLOSED)), Err(Flood::Errors));
        for _ in 0..1_000 {
            watch.write(&reset(PROTOCOL_ERROR)).unwrap();
        }
        assert_eq!(watch.write(&reset(REFUSED_STREAM)), Err(Flood::Errors));
        tokio::time::advance(Duration::from_secs(10)).await;
        for _ in 0..200 {
            watch.write(&reset(REFUSED_STREAM)).unwrap();
        }
        assert_eq!(watch.write(&reset(REFUSED_STREAM)), Err(Flood::Errors));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unfinished_header_block_is_no_progress() {
        let mut watch = FrameWatch::of_server();
        let block = frame(HEADERS, 100);
        watch.read(&block[..50]).unwrap();
        let before = watch.progress();
        watch.read(&block[50..90]).unwrap();
        assert_eq!(watch.progress(), before);
        watch.read(&block[90..]).unwrap();
        assert_ne!(watch.progress(), before);
        let data = frame(DATA, 100);
        watch.read(&data[..20]).unwrap();
        let before = watch.progress();
        watch.read(&data[20..21]).unwrap();
        assert_ne!(watch.progress(), before);
    }

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            frames in proptest::collection::vec((0u8..12, 0usize..300), 0..50),
            cuts in proptest::collection::vec(1usize..400, 1..80),
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, length)| frame(*kind, *length)).collect();
            let mut whole = FrameWatch::of_server();
            whole.read(&bytes).unwrap();
            let mut cut = FrameWatch::of_server();
            let mut rest = &bytes[..];
            for length in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*length).min(rest.len()));
                cut.read(now).unwrap();
                rest = later;
            }
            prop_assert_eq!(whole.control.left, cut.control.left);
            prop_assert_eq!(whole.resets.left, cut.resets.left);
            prop_assert_eq!(whole.window_updates.left, cut.window_updates.left);
            prop_assert_eq!((cut.read.have, cut.read.skip), (0, 0));
            prop_assert_eq!((whole.read.have, whole.read.skip), (0, 0));
        }
    }
}
