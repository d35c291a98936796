//! A client: a pool, and exchanges over it whose every byte is checked.

use std::time::Duration;

use hbone::{ConnectRequest, Connector, OpenError, Opened, Pool, PoolSettings, TunnelHeaders};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use turmoil::net::TcpStream;

use crate::channel::{Credentials, Peer, Untrusted};
use crate::dice::Dice;
use crate::log::Log;
use crate::server::PORT;

/// Who connects, and to which host.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// The source's name.
    pub from: String,
    /// The destination's host, which is its name too.
    pub to: String,
}

/// Makes secured connections over the simulated network.
pub struct Dialer {
    credentials: Credentials,
}

impl Connector for Dialer {
    type Key = Key;
    type Io = TcpStream;
    type Peer = Peer;
    type Error = Untrusted;

    async fn connect(&self, key: &Key) -> Result<(TcpStream, Peer), Untrusted> {
        let mut io = TcpStream::connect((key.to.as_str(), PORT)).await?;
        let peer = self.credentials.connect(&mut io, &key.to).await?;
        Ok((io, peer))
    }
}

/// A client of the simulated network. Clones share the pool.
#[derive(Clone)]
pub struct Client {
    /// Its name.
    pub name: String,
    /// Who it is and whom it trusts.
    pub credentials: Credentials,
    /// Its connections.
    pub pool: Pool<Dialer>,
    log: Log,
}

/// How an exchange went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No tunnel was opened.
    #[error("not opened: {0}")]
    Open(#[from] OpenError<Untrusted>),
    /// The tunnel ended early.
    #[error("ended after {0} bytes: {1}")]
    Ended(usize, std::io::Error),
}

impl Client {
    /// A client `name`, vouched for by root 1.
    #[must_use]
    pub fn new(name: &str, settings: PoolSettings, log: &Log) -> Self {
        let credentials = Credentials::new(name, 1);
        let pool = Pool::new(Dialer { credentials: credentials.clone() }, settings);
        Self { name: name.into(), credentials, pool, log: log.clone() }
    }

    /// Opens a tunnel to `to`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(&self, to: &str) -> Result<Opened<Peer>, OpenError<Untrusted>> {
        let request = ConnectRequest {
            authority: hbone::Authority::from_addr(([10, 0, 0, 1], 80).into())
                .unwrap_or_else(|| unreachable!()),
            headers: TunnelHeaders::default(),
        };
        self.pool.open(&Key { from: self.name.clone(), to: to.into() }, &request).await
    }

    /// Opens a tunnel, sends `length` bytes in pieces with pauses, and checks that they come back. Notes how it went.
    ///
    /// # Errors
    /// See [`Failure`].
    ///
    /// # Panics
    /// A byte that came back is another one than was sent, or one too many came.
    pub async fn exchange(&self, to: &str, length: usize, mut dice: Dice) -> Result<(), Failure> {
        let began = tokio::time::Instant::now();
        let result = self.try_exchange(to, length, &mut dice).await;
        let took = began.elapsed().as_millis();
        match &result {
            Ok(root) => self
                .log
                .note(format_args!("{} to {to}: {length} bytes over root {root}, {took} ms", self.name)),
            Err(failure) => {
                self.log.note(format_args!("{} to {to}: failed, {failure}, {took} ms", self.name));
            }
        }
        result.map(drop)
    }

    async fn try_exchange(&self, to: &str, length: usize, dice: &mut Dice) -> Result<u32, Failure> {
        let Opened { tunnel, peer, .. } = self.open(to).await?;
        let (mut read, mut write) = split(tunnel);
        let byte = |at: usize| u8::try_from(at.wrapping_mul(131) % 251).unwrap_or_default();
        let send = async {
            let mut sent = 0;
            while sent < length {
                let piece = usize::try_from(dice.between(1, 20_000)).unwrap_or(1).min(length - sent);
                let data: Vec<u8> = (sent..sent + piece).map(byte).collect();
                write.write_all(&data).await?;
                sent += piece;
                tokio::time::sleep(Duration::from_millis(dice.between(0, 40))).await;
            }
            write.shutdown().await
        };
        let mut got = 0;
        let receive = async {
            let mut buffer = vec![0; 16 * 1024];
            loop {
                let n = read.read(&mut buffer).await?;
                for (at, found) in buffer.iter().take(n).enumerate() {
                    assert_eq!(*found, byte(got + at), "byte {} of {length}", got + at);
                }
                got += n;
                assert!(got <= length, "{got} bytes came back of {length}");
                if n == 0 && got < length {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                if n == 0 {
                    return Ok(());
                }
            }
        };
        let result = tokio::try_join!(send, receive);
        result.map_err(|error| Failure::Ended(got, error))?;
        Ok(peer.root)
    }

    /// Notes what the pool holds, and checks that nothing is under way any more.
    ///
    /// # Panics
    /// Something is.
    pub fn check_at_rest(&self) {
        let counters = self.pool.counters();
        let now =
            [&counters.streams_now, &counters.connecting_now, &counters.waiting_now].map(hbone::Counter::get);
        assert_eq!(now, [0, 0, 0], "streams, attempts and waiting callers of {}", self.name);
        self.log.note(format_args!(
            "{} made {} connections, {} streams, {} again",
            self.name,
            counters.connections.get(),
            counters.streams.get(),
            counters.retried.get()
        ));
    }
}
