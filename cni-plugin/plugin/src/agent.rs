//! The client of the node agent: HTTP/1.1 over a Unix socket, one request a connection, just enough of it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::error::{CniError, Code};

/// What the agent may answer, bytes.
const ANSWER_LIMIT: u64 = 64 << 10;
/// Between attempts to reach it.
const PAUSE: Duration = Duration::from_millis(200);

/// How long to wait for the agent.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For it to be there: a new one is, a few seconds after the old one went.
    pub reach: Duration,
    /// For its answer.
    pub answer: Duration,
}

/// Why there is no good answer.
#[derive(Debug)]
pub enum Failure {
    /// There is none: the agent is away, or broke off.
    Away(String),
    /// The agent refuses, in CNI's words.
    Refused(CniError),
}

/// Asks the agent at `socket`; what it answers.
pub fn ask(socket: &str, path: &'static str, body: &Value, patience: Patience) -> Result<Value, Failure> {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.to_string().len()
    );
    let (socket, limit) = (socket.to_owned(), patience.reach + patience.answer);
    let (done, outcome) = mpsc::channel();
    // A socket whose owner accepts nothing blocks connect(2) without a limit: on a thread that may stay behind.
    std::thread::spawn(move || {
        let mut waited = Duration::ZERO;
        let result = loop {
            match exchange(Path::new(&socket), &request, patience.answer) {
                // What is done twice is done once: the agent looks the pod up.
                Err(error) if waited < patience.reach && is_away(&error) => {
                    std::thread::sleep(PAUSE);
                    waited += PAUSE;
                }
                result => break result.map_err(|error| format!("{socket}: {error}")),
            }
        };
        let _ = done.send(result);
    });
    let answer = match outcome.recv_timeout(limit) {
        Ok(result) => result.map_err(Failure::Away)?,
        Err(_) => return Err(Failure::Away(format!("no answer within {limit:?}"))),
    };
    read(&answer)
}

/// Whether another attempt may find an agent.
fn is_away(error: &io::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof, WouldBlock,
    };
    matches!(
        error.kind(),
        NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof | WouldBlock
    )
}

fn exchange(socket: &Path, request: &str, limit: Duration) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_LIMIT).read_to_end(&mut answer).map_err(|error| match error.kind() {
        // What SO_RCVTIMEO says.
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
        _ => error,
    })?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent broke off"));
    }
    Ok(answer)
}

/// The body of a good answer, or what a bad one says.
fn read(answer: &[u8]) -> Result<Value, Failure> {
    let away = |what: &str| Failure::Away(format!("the agent's answer {what}"));
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or_else(|| away("is no HTTP"))?;
    let (head, body) = answer.split_at_checked(end).ok_or_else(|| away("is no HTTP"))?;
    let body = body.get(4..).unwrap_or_default();
    let head = std::str::from_utf8(head).map_err(|_| away("is no HTTP"))?;
    let mut lines = head.split("\r\n");
    let mut status = lines.next().unwrap_or_default().split(' ');
    let (version, status) = (status.next(), status.next().and_then(|code| code.parse::<u16>().ok()));
    let (Some("HTTP/1.1" | "HTTP/1.0"), Some(status)) = (version, status) else {
        return Err(away("is no HTTP"));
    };
    let length = lines.filter_map(|line| line.split_once(':')).find_map(|(name, value)| {
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    if length.is_some_and(|length| length != body.len()) {
        return Err(away("was cut off"));
    }
    let value: Option<Value> = serde_json::from_slice(body).ok();
    if (200..300).contains(&status) {
        return value.ok_or_else(|| away("is no JSON"));
    }
    let field = |name: &str| value.as_ref().and_then(|v| v.get(name)?.as_str().map(str::to_owned));
    let code = value.as_ref().and_then(|v| u32::try_from(v.get("code")?.as_u64()?).ok());
    let message = field("msg").unwrap_or_else(|| {
        let said: String = String::from_utf8_lossy(body).trim().chars().take(500).collect();
        format!("the Culvert node agent answered {status}: {said}")
    });
    let error = CniError::new(code.map_or(Code::TryAgainLater, Code::Other), message);
    Err(Failure::Refused(match field("details") {
        Some(details) => error.details(details),
        None => error,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole_or_not_at_all() {
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"enrolled\":true}";
        assert_eq!(read(ok).unwrap()["enrolled"], true);
        for bad in [
            &b""[..],
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 18\r\n\r\n{\"enrolled\":true}",
            b"HTTP/1.1 200 OK\r\n\r\n{",
            b"HTTP/1.1 abc\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\n",
            b"\xff\r\n\r\n{}",
        ] {
            assert!(matches!(read(bad), Err(Failure::Away(_))), "{bad:?}");
        }
    }

    #[test]
    fn refusals_carry_their_code_and_words() {
        let said = b"HTTP/1.1 503 x\r\n\r\n{\"code\":11,\"msg\":\"no ztunnel\",\"details\":\"start it\"}";
        let Err(Failure::Refused(error)) = read(said) else { panic!() };
        let text = error.to_json(Some("1.0.0"));
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            serde_json::json!({ "cniVersion": "1.0.0", "code": 11, "msg": "no ztunnel", "details": "start it" })
        );
        let Err(Failure::Refused(error)) = read(b"HTTP/1.1 500 x\r\n\r\nnot JSON") else { panic!() };
        assert!(error.to_json(None).contains("500: not JSON"), "{error:?}");
    }
}
