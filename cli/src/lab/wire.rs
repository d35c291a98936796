//! Watches the link between the nodes with tcpdump, and says what passed.

use std::io::{self, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Packets that are remembered; what is beyond is counted.
const MOST_PACKETS: usize = 2_000_000;
/// No packet of a veth is larger, segmentation offload included.
const LARGEST_PACKET: usize = 512 << 10;
/// How long tcpdump has to begin.
const START_LIMIT: Duration = Duration::from_secs(5);

/// tcpdump reads whole blocks of the kernel's ring, which are handed over a second after their first frame at
/// the latest; what is in the ring at SIGINT is lost. (Its immediate mode reads frame by frame, but has room for
/// 256 of them only and so misses some under load.)
const RING_DELAY: Duration = Duration::from_millis(1200);

/// The interface that the nodes are linked by.
pub const UPLINK: &str = "uplink";

/// A TCP or UDP packet that passed.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// When the kernel saw it.
    pub at: SystemTime,
    /// Sender.
    pub source: (IpAddr, u16),
    /// Receiver.
    pub destination: (IpAddr, u16),
    /// The TCP flags; `None` for UDP.
    pub tcp_flags: Option<u8>,
}

impl Packet {
    /// A connection's first packet.
    pub fn is_syn(&self) -> bool {
        self.tcp_flags.is_some_and(|f| f & 0x12 == 0x02)
    }

    /// The answer to it: somebody accepts.
    pub fn is_syn_ack(&self) -> bool {
        self.tcp_flags.is_some_and(|f| f & 0x12 == 0x12)
    }

    /// Whether it belongs to a tunnel.
    pub fn is_hbone(&self) -> bool {
        self.source.1 == 15008 || self.destination.1 == 15008
    }
}

/// What passed while the watch went on.
#[derive(Debug, Default)]
pub struct Seen {
    /// The TCP and UDP packets.
    pub packets: Vec<Packet>,
    /// All frames, of any kind.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that hold the text that was searched for.
    pub hits: u64,
    /// Frames that the kernel could not hand to tcpdump in time: when there are any, nothing is proven.
    pub dropped: u64,
}

/// A watch that goes on.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    reader: Option<JoinHandle<io::Result<Seen>>>,
    errors: Option<JoinHandle<String>>,
    line: String,
}

impl Watch {
    /// Starts to watch in the namespace `netns`, searching each frame for `needle`.
    pub fn start(netns: &str, needle: &str) -> Result<Self> {
        let argv = ["tcpdump", "-i", UPLINK, "-n", "-U", "-B", "65536", "-w", "-"];
        let mut child = Command::new("ip")
            .args(["netns", "exec", netns])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ip and tcpdump (Debian: apt-get install iproute2 tcpdump)")?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let needle = needle.as_bytes().to_vec();
        let reader = std::thread::spawn(move || {
            let stdout = stdout.ok_or_else(|| io::Error::other("no output"))?;
            read_capture(BufReader::with_capacity(1 << 20, stdout), &needle)
        });
        let (begun, wait) = std::sync::mpsc::channel();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let Some(stderr) = stderr else { return text };
            for line in io::BufRead::lines(BufReader::new(stderr)).map_while(Result::ok) {
                if line.contains("listening on") {
                    let _ = begun.send(());
                }
                text.push_str(&line);
                text.push('\n');
            }
            text
        });
        let watch = Self { child, reader: Some(reader), errors: Some(errors), line: argv.join(" ") };
        if wait.recv_timeout(START_LIMIT).is_err() {
            bail!("tcpdump did not begin to capture on {UPLINK} in {netns}");
        }
        Ok(watch)
    }

    /// The command, for people.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Ends the watch.
    pub fn finish(mut self) -> Result<Seen> {
        std::thread::sleep(RING_DELAY);
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        let gone = || io::Error::other("the reader of the capture is gone");
        let reader = self.reader.take().ok_or_else(gone)?;
        let mut seen = reader.join().unwrap_or_else(|_| Err(gone())).context("cannot read the capture")?;
        self.child.wait()?;
        let errors = self.errors.take().and_then(|e| e.join().ok()).unwrap_or_default();
        let dropped = errors.lines().filter_map(|l| l.strip_suffix(" packets dropped by kernel"));
        seen.dropped = match dropped.map(str::parse).next() {
            Some(Ok(count)) => count,
            _ => bail!("tcpdump did not say how many packets it missed: {}", errors.trim()),
        };
        Ok(seen)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a capture file in tcpdump's form: a header of 24 bytes, then for each frame one of 16 and its bytes.
fn read_capture(mut source: impl Read, needle: &[u8]) -> io::Result<Seen> {
    let mut seen = Seen::default();
    let mut header = [0; 24];
    source.read_exact(&mut header)?;
    let mut frame = Vec::new();
    let mut record = [0; 16];
    loop {
        match source.read_exact(&mut record) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(seen),
            Err(e) => return Err(e),
        }
        let [s0, s1, s2, s3, u0, u1, u2, u3, l0, l1, l2, l3, _, _, _, _] = record;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let seconds = u64::from(u32::from_ne_bytes([s0, s1, s2, s3]));
        let micros = u64::from(u32::from_ne_bytes([u0, u1, u2, u3]));
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(seconds * 1_000_000 + micros);
        if length > LARGEST_PACKET {
            return Err(io::Error::other(format!("a frame of {length} bytes")));
        }
        frame.resize(length, 0);
        source.read_exact(&mut frame)?;
        seen.frames += 1;
        seen.bytes += length as u64;
        seen.hits += u64::from(contains(&frame, needle));
        if let Some(packet) = parse(&frame, at)
            && seen.packets.len() < MOST_PACKETS
        {
            seen.packets.push(packet);
        }
    }
}

fn contains(text: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return false };
    let mut rest = text;
    while let Some(at) = rest.iter().position(|b| b == first) {
        rest = rest.get(at..).unwrap_or_default();
        if rest.starts_with(needle) {
            return true;
        }
        rest = rest.get(1..).unwrap_or_default();
    }
    false
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let [a, b] = *bytes.get(at..at + 2)?.first_chunk()?;
    Some(u16::from_be_bytes([a, b]))
}

/// Ethernet, IPv4 (RFC 791) or IPv6 (RFC 8200) without extension headers, TCP (RFC 9293) or UDP.
fn parse(frame: &[u8], at: SystemTime) -> Option<Packet> {
    let ip = frame.get(14..)?;
    let (protocol, from, to, rest): (u8, IpAddr, IpAddr, &[u8]) = match be16(frame, 12)? {
        0x0800 => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let v4 = |at: usize| Some(Ipv4Addr::from(*ip.get(at..at + 4)?.first_chunk::<4>()?));
            (*ip.get(9)?, v4(12)?.into(), v4(16)?.into(), ip.get(header..)?)
        }
        0x86dd => {
            let v6 = |at: usize| Some(Ipv6Addr::from(*ip.get(at..at + 16)?.first_chunk::<16>()?));
            (*ip.get(6)?, v6(8)?.into(), v6(24)?.into(), ip.get(40..)?)
        }
        _ => return None,
    };
    let tcp_flags = match protocol {
        6 => Some(*rest.get(13)?),
        17 => None,
        _ => return None,
    };
    Some(Packet { at, source: (from, be16(rest, 0)?), destination: (to, be16(rest, 2)?), tcp_flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4, TCP 4000 -> 80 with SYN and ACK, and four bytes of data.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x0f, 0xa0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0]);
        frame.extend(b"here");
        frame
    }

    #[test]
    fn a_capture_is_read_and_searched() {
        let mut file = vec![0; 24];
        for frame in [frame(), vec![1, 2, 3]] {
            file.extend([0; 8]);
            file.extend(u32::try_from(frame.len()).unwrap().to_ne_bytes());
            file.extend(u32::try_from(frame.len()).unwrap().to_ne_bytes());
            file.extend(frame);
        }
        let seen = read_capture(&file[..], b"here").unwrap();
        assert_eq!((seen.frames, seen.hits, seen.packets.len()), (2, 1, 1));
        let packet = seen.packets[0];
        assert_eq!(packet.source, ("10.0.0.1".parse().unwrap(), 4000));
        assert!(packet.is_syn_ack() && !packet.is_syn() && !packet.is_hbone());
        assert_eq!(read_capture(&file[..], b"not here").unwrap().hits, 0);
        // Half a frame at the end, as when tcpdump is killed, is an error and no panic.
        file.truncate(file.len() - 2);
        assert!(read_capture(&file[..], b"here").is_err());
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let whole = frame();
        for length in 0..whole.len() {
            let _ = parse(&whole[..length], SystemTime::UNIX_EPOCH);
        }
        let mut v6 = whole;
        v6[12..14].copy_from_slice(&[0x86, 0xdd]);
        for length in 0..v6.len() {
            let _ = parse(&v6[..length], SystemTime::UNIX_EPOCH);
        }
    }
}
