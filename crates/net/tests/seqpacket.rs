//! Packets and descriptors between processes, as far as two ends in one process show it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use net::seqpacket::{Seqpacket, SeqpacketListener};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A directory of this test that goes with it.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("culvert-seqpacket-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How many descriptors of this process lead to what `name` calls.
fn descriptors_of(name: &str) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    links.filter(|l| fs::read_link(l.path()).is_ok_and(|to| to.to_string_lossy().contains(name))).count()
}

#[tokio::test]
async fn packets_keep_their_bounds_and_carry_descriptors() {
    let directory = Directory::new("bounds");
    let path = directory.0.join("a.sock");
    let listener = SeqpacketListener::bind(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let client = Seqpacket::connect(&path).unwrap();
    let server = listener.accept().await.unwrap();
    assert_eq!(server.peer().unwrap().1, i32::try_from(std::process::id()).unwrap());

    let (mut read, mut write) = std::io::pipe().unwrap();
    client.send(b"one", None).await.unwrap();
    client.send(b"two", Some(write.as_fd())).await.unwrap();
    let one = server.receive(1024).await.unwrap().unwrap();
    assert_eq!((&*one.bytes, one.descriptor.is_none()), (&b"one"[..], true));
    let two = server.receive(1024).await.unwrap().unwrap();
    assert_eq!(two.bytes, b"two");
    write.write_all(b"a").unwrap();
    drop(write);
    let mut sent = fs::File::from(two.descriptor.unwrap());
    sent.write_all(b"b").unwrap();
    drop(sent);
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ab", "the descriptor is the same pipe");

    assert_eq!(client.send(b"", None).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    drop(client);
    assert!(server.receive(1024).await.unwrap().is_none());
    assert_eq!(server.send(b"late", None).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_is_too_much_is_refused_and_its_descriptors_are_closed() {
    let directory = Directory::new("much");
    let path = directory.0.join("a.sock");
    let listener = SeqpacketListener::bind(&path).unwrap();
    let client = std::os::unix::net::UnixStream::connect(&path);
    assert!(client.is_err(), "a stream is no seqpacket");
    let client = Seqpacket::connect(&path).unwrap();
    let server = listener.accept().await.unwrap();

    let marker = directory.0.join("marker");
    let file = fs::File::create(&marker).unwrap();
    let name = marker.to_string_lossy().into_owned();
    client.send(&[7; 1025], Some(file.as_fd())).await.unwrap();
    let error = server.receive(1024).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    assert_eq!(descriptors_of(&name), 1, "only the sender's own");

    let raw = file.as_raw_fd();
    for count in [2, 3, 253] {
        let descriptors = vec![raw; count];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(client.as_fd().as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
            .unwrap();
        let error = server.receive(1024).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        assert_eq!(descriptors_of(&name), 1, "only the sender's own");
    }
    // The connection itself is sound.
    client.send(&[7; 1024], None).await.unwrap();
    assert_eq!(server.receive(1024).await.unwrap().unwrap().bytes.len(), 1024);
}

#[tokio::test]
async fn a_full_queue_waits_and_cancelling_loses_nothing() {
    let (a, b) = Seqpacket::pair().unwrap();
    let mut sent: u32 = 0;
    loop {
        let bytes = sent.to_be_bytes();
        match tokio::time::timeout(Duration::from_millis(200), a.send(&bytes, None)).await {
            Ok(result) => result.unwrap(),
            Err(_) => break,
        }
        sent += 1;
        assert!(sent < 1_000_000, "the queue has no end");
    }
    let nothing = tokio::time::timeout(Duration::from_millis(10), b.receive(0)).await;
    assert!(nothing.is_ok(), "there is something");
    // The one that was read with too little room is lost.
    for expected in 1..sent {
        let packet = b.receive(16).await.unwrap().unwrap();
        assert_eq!(packet.bytes, expected.to_be_bytes());
    }
    let nothing = tokio::time::timeout(Duration::from_millis(50), b.receive(16)).await;
    assert!(nothing.is_err(), "what was cancelled was not sent");
}

#[tokio::test]
async fn a_listener_takes_the_place_of_a_socket_and_of_nothing_else() {
    let directory = Directory::new("place");
    let path = directory.0.join("a.sock");
    let old = SeqpacketListener::bind(&path).unwrap();
    let before = Seqpacket::connect(&path).unwrap();
    let new = SeqpacketListener::bind(&path).unwrap();
    let after = Seqpacket::connect(&path).unwrap();
    let (to_old, to_new) = (old.accept().await.unwrap(), new.accept().await.unwrap());
    before.send(b"old", None).await.unwrap();
    after.send(b"new", None).await.unwrap();
    assert_eq!(to_old.receive(16).await.unwrap().unwrap().bytes, b"old");
    assert_eq!(to_new.receive(16).await.unwrap().unwrap().bytes, b"new");
    drop((old, new));
    // A socket that nobody listens at any more.
    assert_eq!(Seqpacket::connect(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    drop(SeqpacketListener::bind(&path).unwrap());
    fs::remove_file(&path).unwrap();
    assert_eq!(Seqpacket::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);
    fs::write(&path, "precious").unwrap();
    assert_eq!(SeqpacketListener::bind(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let missing = directory.0.join("none/a.sock");
    assert_eq!(SeqpacketListener::bind(&missing).unwrap_err().kind(), ErrorKind::NotFound);
}
