//! Applications in pods: servers that say who they are and whom they see, and clients that ask them.

use std::io;
use std::net::SocketAddr;

use harness::netns::Host;
use net::{ConnectOptions, ListenOptions};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::PATIENCE;

/// The port that servers have where it does not matter.
pub const PORT: u16 = 8080;

/// What a server says first of all: it speaks before the client does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The pod that answered.
    pub server: String,
    /// The client's address, as the server sees it.
    pub client: SocketAddr,
    /// The address that the client reached, as the server sees it.
    pub reached: SocketAddr,
}

/// A server of a pod. Dropping it closes its listener; its connections go on.
pub struct Server {
    task: JoinHandle<()>,
}

impl Server {
    /// Closes its listener. Dropping it does so too, but later.
    pub async fn close(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An application's listener, on both families.
pub fn listen(host: &Host, port: u16) -> TcpListener {
    let any = SocketAddr::from(([0_u16; 8], port));
    net::listen(&host.netns, any, &ListenOptions { keepalive: None, ..ListenOptions::default() }).unwrap()
}

/// Serves with what `handle` does for each connection.
pub fn serve_with<F>(
    host: &Host,
    port: u16,
    handle: impl Fn(TcpStream, Hello) -> F + Send + 'static,
) -> Server
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = listen(host, port);
    let name = host.name.clone();
    let task = tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let reached = stream.local_addr().map(net::canonical);
            let Ok(reached) = reached else { continue };
            let hello = Hello { server: name.clone(), client: net::canonical(peer), reached };
            tokio::spawn(handle(stream, hello));
        }
    });
    Server { task }
}

/// Serves with a [`Hello`], and then sends back what comes, to the end of it.
pub fn serve(host: &Host, port: u16) -> Server {
    serve_with(host, port, async |mut stream: TcpStream, hello: Hello| {
        stream.write_all(format!("{} {} {}\n", hello.server, hello.client, hello.reached).as_bytes()).await?;
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await?;
        write.shutdown().await
    })
}

/// Connects as an application of the pod does.
pub async fn dial(from: &Host, to: SocketAddr) -> io::Result<TcpStream> {
    let options = ConnectOptions { mark: None, keepalive: None, ..ConnectOptions::default() };
    net::connect(&from.netns, &options, to, PATIENCE).await.map_err(|e| e.source)
}

/// A connection to a server of [`serve`], after its [`Hello`].
pub struct Talk {
    pub stream: BufReader<TcpStream>,
    pub hello: Hello,
    /// The client's own address.
    pub local: SocketAddr,
}

impl Talk {
    /// Sends a line and waits until it comes back.
    pub async fn echo(&mut self) -> io::Result<()> {
        self.stream.write_all(b"are you there?\n").await?;
        let mut line = String::new();
        timeout(PATIENCE, self.stream.read_line(&mut line)).await??;
        if line == "are you there?\n" { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Waits for the end: its error, if it isn't an orderly one.
    pub async fn end(&mut self) -> io::Result<()> {
        timeout(PATIENCE, self.stream.read_to_end(&mut Vec::new())).await??;
        Ok(())
    }
}

/// Connects to a server of [`serve`] and reads its [`Hello`].
pub async fn talk(from: &Host, to: SocketAddr) -> io::Result<Talk> {
    let stream = dial(from, to).await?;
    let local = stream.local_addr()?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    timeout(PATIENCE, stream.read_line(&mut line)).await??;
    let mut words = line.split_whitespace();
    let mut word = || words.next().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof));
    let (server, client, reached) = (word()?.to_owned(), word()?, word()?);
    let address = |text: &str| text.parse().map_err(io::Error::other);
    let hello = Hello { server, client: address(client)?, reached: address(reached)? };
    Ok(Talk { stream, hello, local })
}

/// Asks a server of [`serve`] once.
pub async fn ask(from: &Host, to: SocketAddr) -> io::Result<Hello> {
    talk(from, to).await.map(|t| t.hello)
}

/// Sends `request` and reads to the end of the connection.
pub async fn exchange(stream: &mut TcpStream, request: &str) -> io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await??;
    Ok(answer)
}

/// Serves HTTP/1.1: each request is answered with the pod's name, and the request's head as the body.
pub fn serve_http(host: &Host, port: u16) -> Server {
    serve_with(host, port, async |stream: TcpStream, hello: Hello| {
        let mut stream = BufReader::new(stream);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).await? == 0 {
                    return Ok(());
                }
            }
            let length = head
                .lines()
                .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            stream.read_exact(&mut vec![0; length.unwrap_or(0)]).await?;
            let body = format!("{} {}\n{head}", hello.server, hello.client);
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await?;
        }
    })
}

/// A connection of HTTP/1.1.
pub struct Http(BufReader<TcpStream>);

impl Http {
    pub async fn dial(from: &Host, to: SocketAddr) -> io::Result<Self> {
        Ok(Self(BufReader::new(dial(from, to).await?)))
    }

    /// Sends a request, `METHOD TARGET` with further fields, each with its line's end; gives the status and the rest.
    pub async fn ask(&mut self, line: &str, fields: &str) -> io::Result<(u16, String)> {
        let request = format!("{line} HTTP/1.1\r\nhost: web\r\n{fields}\r\n");
        self.0.write_all(request.as_bytes()).await?;
        self.answer().await
    }

    pub async fn send(&mut self, text: &str) -> io::Result<()> {
        self.0.write_all(text.as_bytes()).await
    }

    /// The next response.
    pub async fn answer(&mut self) -> io::Result<(u16, String)> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if timeout(PATIENCE, self.0.read_line(&mut head)).await?? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let length =
            head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        timeout(PATIENCE, self.0.read_exact(&mut body)).await??;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Ok((status, head + &String::from_utf8_lossy(&body)))
    }
}

/// One request on a connection of its own.
pub async fn request(from: &Host, to: SocketAddr, line: &str, fields: &str) -> io::Result<(u16, String)> {
    Http::dial(from, to).await?.ask(line, fields).await
}
