//! What passes on a node's link, and whether any of it is plaintext.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};

use crate::lab::{Lab, Node};
use crate::process::{in_netns, pid_of};

/// What every message of the applications of a namespace carries (`tools/app`).
#[must_use]
pub fn marker(namespace: &str) -> String {
    format!("culvert-e2e-marker:{namespace}")
}

/// The tunnel's port.
const HBONE: u16 = 15008;

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    said: BufReader<ChildStderr>,
    path: PathBuf,
    marker: String,
}

/// What a capture saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// TCP and UDP packets.
    pub packets: usize,
    /// TCP packets of tunnels, by who sent them to whom.
    pub tunnels: BTreeMap<(String, String), usize>,
    /// The flows in which the messages with the marker could be read.
    pub plaintext: Vec<Flow>,
}

/// Who sent a packet to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    from: (String, u16),
    to: (String, u16),
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} -> {}:{}", self.from.0, self.from.1, self.to.0, self.to.1)
    }
}

impl Capture {
    /// Starts to write down what passes between a node and the others, to look for a marker in it.
    ///
    /// # Errors
    /// tcpdump can't be started.
    pub fn start(lab: &Lab, node: &Node, marker: String) -> Result<Self> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let path = lab.run(&format!("{}-{number}.pcap", node.name));
        let mut command: Command = in_netns(&lab.control_plane_netns(), "tcpdump");
        command.args([
            "-i",
            node.link,
            "-n",
            "-U",
            "--immediate-mode",
            "-B",
            "65536",
            "-s",
            "0",
            "-Z",
            "root",
            "-w",
        ]);
        command.arg(&path).arg("tcp or udp");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting tcpdump")?;
        let Some(said) = child.stderr.take() else { bail!("tcpdump has no standard error") };
        let mut this = Self { child, said: BufReader::new(said), path, marker };
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            if this.said.read_line(&mut line)? == 0 {
                bail!("tcpdump ended at once on {}", node.link);
            }
        }
        Ok(this)
    }

    /// Ends it and looks at what it has.
    ///
    /// # Errors
    /// It missed packets: then nothing can be said.
    pub fn finish(mut self) -> Result<Seen> {
        // What has just passed is still on its way to the file.
        thread::sleep(Duration::from_millis(300));
        kill(pid_of(self.child.id())?, Signal::SIGINT)?;
        let mut said = String::new();
        self.said.read_to_string(&mut said)?;
        self.child.wait()?;
        match said.lines().find_map(|line| line.strip_suffix(" packets dropped by kernel")) {
            Some("0") => {}
            Some(dropped) => bail!("the capture missed {dropped} packets"),
            None => bail!("tcpdump did not say what it has: {said}"),
        }
        let bytes = fs::read(&self.path)?;
        fs::remove_file(&self.path)?;
        Seen::read(&bytes, &self.marker)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Seen {
    /// Reads a capture file (pcap-savefile(5)) of Ethernet frames, in this machine's byte order.
    fn read(bytes: &[u8], marker: &str) -> Result<Self> {
        const HEADER: usize = 24;
        const MAGIC: u32 = 0xa1b2_c3d4;
        let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        if word(0) != Some(MAGIC) {
            bail!("not a capture file");
        }
        let mut seen = Self::default();
        let mut at = HEADER;
        // The last record may be cut off.
        while let Some(length) = word(at + 8)
            && let Some(frame) = bytes.get(at + 16..at + 16 + length as usize)
        {
            seen.frame(frame, marker.as_bytes());
            at += 16 + length as usize;
        }
        Ok(seen)
    }

    /// Packets of tunnels that one of these addresses sent or was sent.
    #[must_use]
    pub fn tunnel(&self, addresses: &[String]) -> usize {
        let ours = |(from, to): &(String, String)| addresses.contains(from) || addresses.contains(to);
        self.tunnels.iter().filter(|(ends, _)| ours(ends)).map(|(_, packets)| packets).sum()
    }

    fn frame(&mut self, frame: &[u8], marker: &[u8]) {
        let Some((flow, tcp)) = addresses(frame) else { return };
        self.packets += 1;
        if tcp && (flow.from.1 == HBONE || flow.to.1 == HBONE) {
            *self.tunnels.entry((flow.from.0.clone(), flow.to.0.clone())).or_default() += 1;
        }
        if frame.windows(marker.len()).any(|w| w == marker) && !self.plaintext.contains(&flow) {
            self.plaintext.push(flow);
        }
    }
}

/// The flow of a TCP or UDP packet, and whether it is TCP.
fn addresses(frame: &[u8]) -> Option<(Flow, bool)> {
    let packet = frame.get(14..)?;
    let (protocol, from, to, segment) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let length = usize::from(packet.first()? & 0x0f) * 4;
            let address =
                |at| packet.get(at..at + 4)?.try_into().ok().map(|b: [u8; 4]| Ipv4Addr::from(b).to_string());
            (*packet.get(9)?, address(12)?, address(16)?, packet.get(length..)?)
        }
        [0x86, 0xdd] => {
            let address = |at| {
                packet.get(at..at + 16)?.try_into().ok().map(|b: [u8; 16]| Ipv6Addr::from(b).to_string())
            };
            (*packet.get(6)?, address(8)?, address(24)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at| segment.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    let flow = Flow { from: (from, port(0)?), to: (to, port(2)?) };
    matches!(protocol, 6 | 17).then_some((flow, protocol == 6))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.extend([6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x9c, 0x40]);
        frame.extend(port.to_be_bytes());
        frame.extend([0; 16]);
        frame.extend(payload);
        frame
    }

    fn file(packets: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
        bytes.resize(24, 0);
        for packet in packets {
            let length = u32::try_from(packet.len()).unwrap().to_ne_bytes();
            bytes.extend([0; 8]);
            bytes.extend(length);
            bytes.extend(length);
            bytes.extend(packet);
        }
        bytes
    }

    #[test]
    fn plaintext_is_found_and_named() {
        let marker = marker("a");
        let (marked, other) = (format!("GET {marker} "), super::marker("b"));
        let mut bytes = file(&[
            packet(8080, marked.as_bytes()),
            packet(8081, other.as_bytes()),
            packet(8080, marked.as_bytes()),
            packet(HBONE, b"\x17\x03\x03"),
        ]);
        let seen = Seen::read(&bytes, &marker).unwrap();
        assert_eq!((seen.packets, seen.tunnel(&["10.0.0.2".into()])), (4, 1));
        assert_eq!(seen.tunnel(&["10.0.0.3".into()]), 0);
        assert_eq!(
            seen.plaintext.iter().map(Flow::to_string).collect::<Vec<_>>(),
            ["10.0.0.1:40000 -> 10.0.0.2:8080"]
        );
        // Cut off in the last packet.
        bytes.truncate(bytes.len() - 1);
        assert_eq!(Seen::read(&bytes, &marker).unwrap().packets, 3);
        assert!(Seen::read(b"nothing", &marker).is_err());
    }
}
