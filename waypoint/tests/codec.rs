//! What HTTP/1.1 is read as, against naive readings of the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use bytes::{Buf, Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;
use waypoint::http::body::{BodyReader, Output, Part};
use waypoint::http::h1::{Framing, HeadParser, Refusal};
use waypoint::http::head::{Fields, Known, MAX_FIELDS, MAX_HEAD, RequestHead, ResponseHead};

type Read = Result<(RequestHead, usize, Framing), Refusal>;

/// Reads a request of which more comes at each of `cuts`; `None` if it is not whole.
fn read(input: &[u8], cuts: &[usize]) -> Option<Read> {
    let (mut parser, mut head) = (HeadParser::default(), RequestHead::default());
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    ends.push(input.len());
    ends.sort_unstable();
    for end in ends {
        match parser.request(&input[..end], &mut head) {
            Ok(None) => {}
            Ok(Some((length, framing))) => return Some(Ok((head, length, framing))),
            Err(refusal) => return Some(Err(refusal)),
        }
    }
    None
}

fn told(read: Option<Read>) -> String {
    match read {
        Some(Ok((head, length, framing))) => {
            let fields: Vec<_> = head.fields.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
            format!(
                "{} {} {} {length} {framing:?} {fields:?}",
                head.method(),
                head.authority(),
                head.target()
            )
        }
        Some(Err(refusal)) => format!("{refusal:?}"),
        None => "not whole".into(),
    }
}

fn token() -> impl Strategy<Value = String> {
    "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}"
}

/// Names that have no meaning to the engine, with valid values.
fn fields() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let value = vec(prop_oneof![8 => 0x21..=0x7eu8, 1 => 0x80..=0xffu8, 1 => Just(b' ')], 0..30)
        .prop_map(|v| v.trim_ascii().to_vec());
    let name = token().prop_filter("known", |name| Known::of(name.as_bytes()) == Known::Other);
    vec((name, value), 0..12)
}

/// Requests as text: good ones with things broken here and there.
fn nearly_requests() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just("GET / HTTP/1.1\r\n"),
        Just("POST /a?b HTTP/1.1\r\n"),
        Just("Host: a\r\n"),
        Just("Content-Length: 5\r\n"),
        Just("Transfer-Encoding: chunked\r\n"),
        Just("X: y\r\n"),
        Just("\r\n"),
        Just("\n"),
        Just("\r"),
        Just(" "),
        Just(":"),
        Just("\0"),
        Just("hello"),
    ];
    vec(piece, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
}

proptest! {
    #[test]
    fn how_a_head_is_cut_into_pieces_makes_no_difference(
        input in prop_oneof![nearly_requests(), vec(any::<u8>(), 0..200)],
        cuts in vec(any::<usize>(), 0..8),
    ) {
        prop_assert_eq!(told(read(&input, &cuts)), told(read(&input, &[])));
    }

    #[test]
    fn a_head_that_is_written_and_read_again_is_the_same(
        method in "[A-Z]{1,10}",
        target in "/[!-\"$&-~]{0,40}",
        authority in "[a-z0-9.-]{1,20}(:[0-9]{1,5})?",
        fields in fields(),
        cuts in vec(any::<usize>(), 0..4),
    ) {
        let mut head = RequestHead::default();
        head.set_method(&method);
        head.set_target(&target);
        head.set_authority(&authority);
        for (name, value) in &fields {
            head.fields.push(name.as_bytes(), value);
        }
        let mut out = BytesMut::new();
        head.write(&mut out);
        out.extend_from_slice(b"\r\n");
        let (again, length, framing) = read(&out, &cuts).unwrap().unwrap();
        prop_assert_eq!(length, out.len());
        prop_assert_eq!(framing, Framing::None);
        prop_assert_eq!((again.method(), again.target(), again.authority()), (&*method, &*target, &*authority));
        let read: Vec<_> = again.fields.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        let meant: Vec<_> = fields.iter().map(|(n, v)| (n.clone().into_bytes(), v.clone())).collect();
        prop_assert_eq!(read, meant);
    }

    #[test]
    fn edits_do_what_the_same_edits_of_a_list_do(
        fields in fields(),
        edits in vec((0..3u8, any::<prop::sample::Index>(), "[a-z]{1,4}"), 0..6),
    ) {
        let mut head = Fields::default();
        let mut list: Vec<(String, Vec<u8>)> = fields.clone();
        for (name, value) in &fields {
            head.push(name.as_bytes(), value);
        }
        for (kind, index, value) in edits {
            let name = if list.is_empty() { "x".to_owned() } else { index.get(&list).0.clone() };
            if kind < 2 {
                list.retain(|(n, _)| !n.eq_ignore_ascii_case(&name));
            }
            if kind > 0 {
                list.push((name.clone(), value.clone().into_bytes()));
            }
            match kind {
                0 => head.remove(name.as_bytes()),
                1 => head.set(name.as_bytes(), value.as_bytes()),
                _ => head.push(name.as_bytes(), value.as_bytes()),
            }
        }
        let now: Vec<_> = head.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        let meant: Vec<_> = list.into_iter().map(|(n, v)| (n.into_bytes(), v)).collect();
        prop_assert_eq!(now, meant);
    }

    #[test]
    fn chunks_read_as_they_were_written_however_they_come(
        parts in vec(vec(any::<u8>(), 1..9000), 0..6),
        cuts in vec(any::<usize>(), 0..10),
        rest in vec(any::<u8>(), 0..20),
    ) {
        let mut output = Output::default();
        for part in &parts {
            output.push_chunk(Bytes::from(part.clone()));
        }
        output.push_last_chunk(None);
        let mut wire = output.copy_to_bytes(output.remaining()).to_vec();
        prop_assert_eq!(naive_chunks(&wire), Some((parts.concat(), wire.len())));
        wire.extend_from_slice(&rest);
        let (data, left) = read_body(Framing::Chunked, &wire, &cuts).unwrap();
        prop_assert_eq!(data, parts.concat());
        prop_assert_eq!(left, rest);
    }

    #[test]
    fn whatever_the_chunks_are_the_naive_reader_agrees(
        pieces in vec(prop_oneof![
            Just("3\r\nabc\r\n"), Just("0\r\n"), Just("\r\n"), Just("A\r\n"), Just("0123456789\r\n"),
            Just("3;e=f\r\nabc\r\n"), Just("\n"), Just("x"), Just("T: v\r\n"), Just("0\r\n\r\n"),
        ], 0..8),
        cuts in vec(any::<usize>(), 0..6),
    ) {
        let wire = pieces.concat().into_bytes();
        let ours = read_body(Framing::Chunked, &wire, &cuts).ok();
        let naive = naive_chunks(&wire);
        prop_assert_eq!(ours.map(|(data, left)| (data, wire.len() - left.len())), naive);
    }
}

/// Reads a body of which more comes at each of `cuts`: its data, and what is left behind it.
fn read_body(framing: Framing, wire: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, Vec<u8>), String> {
    let (mut reader, mut trailers) = (BodyReader::new(framing), Fields::default());
    let (mut input, mut data, mut fed) = (BytesMut::new(), Vec::new(), 0);
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (wire.len() + 1)).collect();
    ends.push(wire.len());
    ends.sort_unstable();
    for end in ends {
        input.extend_from_slice(&wire[fed..end]);
        fed = end;
        loop {
            match reader.next(&mut input, &mut trailers).map_err(|e| e.to_string())? {
                Part::Data(part) => data.extend_from_slice(&part),
                Part::End => return Ok((data, [&input[..], &wire[fed..]].concat())),
                Part::More => break,
            }
        }
    }
    Err("not whole".into())
}

/// Reads chunks line by line; the data and how long it all was, or nothing if it is wrong or not whole.
fn naive_chunks(wire: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut at, mut data) = (0, Vec::new());
    let line = |at: &mut usize| -> Option<String> {
        let end = (*at..wire.len()).find(|i| wire[*i] == b'\n')?;
        let line = String::from_utf8_lossy(&wire[*at..end]).into_owned();
        *at = end + 1;
        line.strip_suffix('\r').map(str::to_owned)
    };
    loop {
        let announced = line(&mut at)?;
        let size = announced.split(';').next().unwrap();
        if size.is_empty() || !size.chars().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            break;
        }
        data.extend_from_slice(wire.get(at..at.checked_add(size)?)?);
        at += size;
        if wire.get(at..at + 2)? != b"\r\n" {
            return None;
        }
        at += 2;
    }
    loop {
        let trailer = line(&mut at)?;
        if trailer.is_empty() {
            return Some((data, at));
        }
        let (name, _) = trailer.split_once(':')?;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
            return None;
        }
    }
}

fn with_fields(count: usize, length: usize) -> Vec<u8> {
    let mut text = "GET / HTTP/1.1\r\nHost: a\r\n".to_owned();
    for index in 1..count {
        text.push_str(&format!("x{index}: {}\r\n", "v".repeat(length)));
    }
    (text + "\r\n").into_bytes()
}

#[test]
fn a_head_may_have_so_many_fields_and_bytes_and_no_more() {
    assert!(read(&with_fields(MAX_FIELDS, 1), &[]).unwrap().is_ok());
    assert_eq!(read(&with_fields(MAX_FIELDS + 1, 1), &[]).unwrap().unwrap_err(), Refusal::HeadTooLarge);
    assert!(read(&with_fields(2, MAX_HEAD - 100), &[]).unwrap().is_ok());
    assert_eq!(read(&with_fields(2, MAX_HEAD), &[]).unwrap().unwrap_err(), Refusal::HeadTooLarge);
    // Also one that never ends.
    assert_eq!(read(&vec![b'x'; MAX_HEAD + 1], &[]).unwrap().unwrap_err(), Refusal::HeadTooLarge);
}

#[test]
fn chunk_extensions_without_end_are_refused() {
    let long = format!("3;{}\r\nabc\r\n", "x".repeat(5000));
    assert!(read_body(Framing::Chunked, long.as_bytes(), &[]).is_err());
    let many = "1;xxxxxxxxxxxxxxxxxxxx\r\na\r\n".repeat(1000) + "0\r\n\r\n";
    assert!(read_body(Framing::Chunked, many.as_bytes(), &[]).unwrap_err().contains("extensions"));
}

fn response(text: &str, to_head: bool) -> Result<Option<(u16, Framing)>, Refusal> {
    let (mut parser, mut head) = (HeadParser::default(), ResponseHead::default());
    let read = parser.response(text.as_bytes(), &mut head, to_head)?;
    Ok(read.map(|(_, framing)| (head.status, framing)))
}

#[test]
fn where_a_response_ends_is_known_from_status_and_fields() {
    let read = |text: &str| response(text, false);
    assert_eq!(read("HTTP/1.1 200 OK\r\n\r\n"), Ok(Some((200, Framing::UntilClose))));
    assert_eq!(read("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"), Ok(Some((200, Framing::None))));
    assert_eq!(read("HTTP/1.1 200 \r\nContent-Length: 7\r\n\r\n"), Ok(Some((200, Framing::Length(7)))));
    assert_eq!(
        read("HTTP/1.0 404 x\r\nTransfer-Encoding: chunked\r\n\r\n"),
        Ok(Some((404, Framing::Chunked)))
    );
    assert_eq!(read("HTTP/1.1 204 x\r\nContent-Length: 7\r\n\r\n"), Ok(Some((204, Framing::None))));
    assert_eq!(read("HTTP/1.1 304 x\r\nContent-Length: 7\r\n\r\n"), Ok(Some((304, Framing::None))));
    assert_eq!(response("HTTP/1.1 200 x\r\nContent-Length: 7\r\n\r\n", true), Ok(Some((200, Framing::None))));
    assert_eq!(read("HTTP/1.1 200 OK\r\n"), Ok(None));
    for wrong in [
        "HTTP/2 200\r\n\r\n",
        "HTTP/1.1 20\r\n\r\n",
        "HTTP/1.1  200\r\n\r\n",
        "HTTP/1.1 099 x\r\n\r\n",
        "HTTP/1.1 200x\r\n\r\n",
    ] {
        assert!(read(wrong).is_err(), "{wrong:?}");
    }
    let both = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert!(read(both).is_err());
}
