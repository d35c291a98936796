//! The TLS handshake, as server ([`accept`]) and as client ([`connect`]).
//!
//! Invariants:
//! * nobody waits longer than [`HandshakeLimits::time`], whatever the peer does;
//! * a stream exists only for a peer whose certificate was verified and that agreed on `h2`;
//! * the peer is told by an alert why it was refused, where TLS has one for that.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use model::SpiffeId;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{AlertDescription, CipherSuite, CommonState, InvalidMessage, NamedGroup};
use rustls_pki_types::{IpAddr, Ipv4Addr, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::certificates::{CertificateError, Certificates};
use crate::stream::{Keys, Schedule, TlsStream};
use crate::tls::{ALPN_H2, client_config, crypto_provider, server_config};
use crate::verify::{ExpectedPeers, HandshakeVerifier, PeerError};
use crate::x509::RootId;

/// What is read at once during a handshake: a flight with a chain of certificates fits.
const READ: usize = 8 * 1024;
/// Unprocessed bytes of a handshake; rustls takes messages of up to 64 KiB.
const MAX_BUFFERED: usize = 96 * 1024;
/// How long the peer may take to receive the alert that says why it is refused.
const ALERT_TIME: Duration = Duration::from_secs(1);

/// The limits of a handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HandshakeLimits {
    /// From the first byte to the last, the wait for our own certificate included.
    pub time: Duration,
}

impl Default for HandshakeLimits {
    fn default() -> Self {
        Self { time: Duration::from_secs(10) }
    }
}

/// The other end of an established connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerInfo {
    /// Who it is.
    pub id: SpiffeId,
    /// From when on its chain, the root included, would no longer be accepted.
    pub not_after: UnixTime,
    /// The root that vouches for it.
    pub root: RootId,
    /// How the keys were agreed on.
    pub group: NamedGroup,
    /// How records are protected.
    pub suite: CipherSuite,
}

/// What a peer speaks that does not speak TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotTls {
    /// HTTP/2 without TLS.
    Http2,
    /// HTTP/1 without TLS.
    Http1,
    /// Something else.
    Unknown,
}

impl fmt::Display for NotTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http2 => "HTTP/2 in plaintext",
            Self::Http1 => "HTTP/1 in plaintext",
            Self::Unknown => "no protocol that is known here",
        })
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It took too long.
    #[error("the handshake was not over after {0:?}")]
    TimedOut(Duration),
    /// The transport failed.
    #[error("the connection failed during the handshake: {0}")]
    Transport(#[source] io::Error),
    /// The peer went away.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The peer does not speak TLS.
    #[error("the peer does not speak TLS but {0}")]
    NotTls(NotTls),
    /// We have no certificate to present.
    #[error("no certificate of our own: {0}")]
    OwnCertificate(#[from] CertificateError),
    /// The peer's certificate is not accepted.
    #[error("{0}")]
    Peer(#[from] PeerError),
    /// The peer offers or chose another protocol than `h2`, or none.
    #[error("the peer did not agree on the protocol h2 (ALPN)")]
    NoAlpn,
    /// The peer refuses us.
    #[error("the peer refused the handshake with the alert {0:?}")]
    RefusedByPeer(AlertDescription),
    /// The peer sent more than a handshake needs.
    #[error("the peer sent more than {MAX_BUFFERED} bytes that are part of no handshake")]
    TooLarge,
    /// Anything else that TLS finds wrong.
    #[error("TLS: {0}")]
    Tls(#[source] rustls::Error),
}

impl HandshakeError {
    /// A short constant for metrics and log fields.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TimedOut(_) => "timeout",
            Self::Transport(_) => "transport",
            Self::Closed => "closed",
            Self::NotTls(_) => "not_tls",
            Self::OwnCertificate(_) => "own_certificate",
            Self::Peer(error) => error.reason(),
            Self::NoAlpn => "no_alpn",
            Self::RefusedByPeer(_) => "refused_by_peer",
            Self::TooLarge => "too_large",
            Self::Tls(_) => "protocol",
        }
    }
}

/// Accepts a connection as `local`: whoever connects must be of the mesh and speak `h2`. Who may do what is for the
/// caller to decide, by [`TlsStream::peer`].
///
/// # Errors
/// The peer is not acceptable, does not speak the protocol, takes too long, or we have no certificate.
pub async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificates: &Certificates,
    local: &SpiffeId,
    limits: HandshakeLimits,
) -> Result<TlsStream<IO>, HandshakeError> {
    // Boxed: a handshake's state is large and short-lived, its caller's is neither.
    let attempt = Box::pin(async {
        let own = certificates.get(local).await?;
        let algorithms = crypto_provider().signature_verification_algorithms;
        let verifier = HandshakeVerifier::new(certificates.bundle(), algorithms, ExpectedPeers::AnyOfMesh);
        let config =
            server_config(own.key(), verifier.clone(), certificates.clock()).map_err(HandshakeError::Tls)?;
        let connection = UnbufferedServerConnection::new(config).map_err(HandshakeError::Tls)?;
        Handshake::new(connection, verifier, Last::Sent).run(io).await
    });
    within(limits, attempt).await
}

/// Connects as `local` to one of the `expected`, whose identity is checked before ours is shown.
///
/// # Errors
/// The peer is not one of the expected, does not speak the protocol, takes too long, or we have no certificate. That
/// the peer refuses *us* may only show when the stream is first read (TLS 1.3 has the client finish first).
pub async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificates: &Certificates,
    local: &SpiffeId,
    expected: ExpectedPeers,
    limits: HandshakeLimits,
) -> Result<TlsStream<IO>, HandshakeError> {
    within(limits, connecting(io, certificates, local, expected, Last::Sent)).await
}

/// As [`connect`], for a caller that speaks first: what ends the handshake is not sent by itself, but with the first bytes
/// that the caller writes and flushes. Until then the peer does not know that there is a connection.
///
/// # Errors
/// As [`connect`].
pub async fn connect_corked<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificates: &Certificates,
    local: &SpiffeId,
    expected: ExpectedPeers,
    limits: HandshakeLimits,
) -> Result<TlsStream<IO>, HandshakeError> {
    within(limits, connecting(io, certificates, local, expected, Last::Kept)).await
}

/// Boxed: a handshake's state is large and short-lived, its caller's is neither.
fn connecting<'a, IO: AsyncRead + AsyncWrite + Unpin + 'a>(
    io: IO,
    certificates: &'a Certificates,
    local: &'a SpiffeId,
    expected: ExpectedPeers,
    last: Last,
) -> Pin<Box<impl Future<Output = Result<TlsStream<IO>, HandshakeError>>>> {
    Box::pin(async move {
        let own = certificates.get(local).await?;
        let algorithms = crypto_provider().signature_verification_algorithms;
        let verifier = HandshakeVerifier::new(certificates.bundle(), algorithms, expected);
        let config =
            client_config(own.key(), verifier.clone(), certificates.clock()).map_err(HandshakeError::Tls)?;
        // Neither sent (no SNI) nor verified: the verifier goes by the SPIFFE ID.
        let nobody = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0; 4])));
        let connection = UnbufferedClientConnection::new(config, nobody).map_err(HandshakeError::Tls)?;
        Handshake::new(connection, verifier, last).run(io).await
    })
}

async fn within<T>(
    limits: HandshakeLimits,
    attempt: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    let timed = tokio::time::timeout(limits.time, attempt).await;
    timed.unwrap_or(Err(HandshakeError::TimedOut(limits.time)))
}

/// What client and server connections of rustls have in common, as far as a handshake needs it.
trait Side {
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>);
    fn common(&self) -> &CommonState;
    fn into_keys(self) -> Result<Keys, rustls::Error>;
}

/// What the connection wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Again,
    Read,
    Done,
}

impl Side for UnbufferedClientConnection {
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>) {
        step(self.process_tls_records(incoming), outgoing)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<Keys, rustls::Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Keys::new(secrets, kernel.negotiated_cipher_suite(), Schedule::Client(kernel))
    }
}

impl Side for UnbufferedServerConnection {
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, rustls::Error>) {
        step(self.process_tls_records(incoming), outgoing)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<Keys, rustls::Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Keys::new(secrets, kernel.negotiated_cipher_suite(), Schedule::Server(kernel))
    }
}

fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Step, rustls::Error>) {
    let unexpected = |what: &str| Err(rustls::Error::General(format!("{what} during the handshake")));
    let step = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => match data.encode(&mut []) {
            Err(EncodeError::InsufficientSize(needed)) => {
                let start = outgoing.len();
                outgoing.resize(start + needed.required_size, 0);
                match data.encode(outgoing.get_mut(start..).unwrap_or_default()) {
                    Ok(count) => {
                        outgoing.truncate(start + count);
                        Ok(Step::Again)
                    }
                    Err(error) => Err(rustls::Error::General(error.to_string())),
                }
            }
            Ok(_) => Ok(Step::Again),
            Err(error) => Err(rustls::Error::General(error.to_string())),
        },
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => unexpected("a close_notify"),
        Ok(_) => unexpected("application data"),
        Err(error) => Err(error),
    };
    (status.discard, step)
}

/// What becomes of the last that a handshake has to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Last {
    /// It is sent at once.
    Sent,
    /// It goes with what the stream sends first.
    Kept,
}

struct Handshake<C> {
    connection: C,
    last: Last,
    verifier: Arc<HandshakeVerifier>,
    /// Received and not processed.
    incoming: Vec<u8>,
    /// How much of it rustls was shown: one record at a time, so that it never touches what follows the handshake,
    /// which is ours to decrypt.
    shown: usize,
    /// The end of the last whole record that it was shown.
    boundary: usize,
    outgoing: Vec<u8>,
    write_error: Option<io::Error>,
    /// Whether anything was understood as TLS.
    spoke_tls: bool,
}

impl<C: Side> Handshake<C> {
    fn new(connection: C, verifier: Arc<HandshakeVerifier>, last: Last) -> Self {
        Self {
            connection,
            last,
            verifier,
            incoming: Vec::new(),
            shown: 0,
            boundary: 0,
            outgoing: Vec::new(),
            write_error: None,
            spoke_tls: false,
        }
    }

    async fn run<IO: AsyncRead + AsyncWrite + Unpin>(
        mut self,
        mut io: IO,
    ) -> Result<TlsStream<IO>, HandshakeError> {
        if let Err(error) = self.drive(&mut io).await {
            self.send_alert(&mut io).await;
            return Err(error);
        }
        self.finish(io).await
    }

    /// Until the handshake is over.
    async fn drive<IO: AsyncRead + AsyncWrite + Unpin>(&mut self, io: &mut IO) -> Result<(), HandshakeError> {
        loop {
            let step = self.step().map_err(|error| self.explain(error))?;
            match step {
                Step::Again => {}
                Step::Done if !self.connection.common().is_handshaking() => {
                    if self.last == Last::Sent {
                        self.write(io).await;
                    }
                    return self.write_error.take().map_or(Ok(()), |e| Err(HandshakeError::Transport(e)));
                }
                Step::Done | Step::Read => self.show_more(io).await?,
            }
        }
    }

    /// Has rustls work on what it was shown.
    fn step(&mut self) -> Result<Step, rustls::Error> {
        let shown = self.incoming.get_mut(..self.shown).unwrap_or_default();
        let (discard, step) = self.connection.step(shown, &mut self.outgoing);
        // Also after an error: rustls goes by places in these bytes, and panics where they don't match.
        self.spoke_tls |= discard > 0 && step.is_ok();
        self.incoming.drain(..discard.min(self.incoming.len()));
        self.shown = self.shown.saturating_sub(discard);
        self.boundary = self.boundary.saturating_sub(discard);
        step
    }

    /// Shows rustls the next record, or all there is of it, reading more if it was shown everything. What is to be sent is sent
    /// before that, and not earlier: for a record of six bytes (a client's ChangeCipherSpec) nobody is to be woken.
    async fn show_more<IO: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
    ) -> Result<(), HandshakeError> {
        loop {
            let next = self.incoming.get(self.boundary..).unwrap_or_default();
            if let [_, _, _, high, low, ..] = next {
                let end = self.boundary + 5 + usize::from(u16::from_be_bytes([*high, *low]));
                if end <= self.incoming.len() {
                    self.boundary = end;
                    self.shown = end;
                    return Ok(());
                }
            }
            if self.shown < self.incoming.len() {
                // Not a whole record: rustls may already tell that it will never be one.
                self.shown = self.incoming.len();
                return Ok(());
            }
            self.write(io).await;
            self.read(io).await?;
        }
    }

    async fn read<IO: AsyncRead + Unpin>(&mut self, io: &mut IO) -> Result<(), HandshakeError> {
        if self.incoming.len() >= MAX_BUFFERED {
            return Err(HandshakeError::TooLarge);
        }
        self.incoming.reserve(READ);
        let count = io.read_buf(&mut self.incoming).await;
        match (count, self.write_error.take()) {
            (Ok(0) | Err(_), Some(error)) => Err(HandshakeError::Transport(error)),
            (Ok(0), None) => Err(HandshakeError::Closed),
            (Err(error), None) => Err(HandshakeError::Transport(error)),
            (Ok(_), error) => {
                self.write_error = error;
                Ok(())
            }
        }
    }

    /// Sends all that there is. An error is kept until all is read: a peer that hung up may have said why.
    async fn write<IO: AsyncWrite + Unpin>(&mut self, io: &mut IO) {
        if self.outgoing.is_empty() {
            return;
        }
        let flight = std::mem::take(&mut self.outgoing);
        let written = async {
            io.write_all(&flight).await?;
            io.flush().await
        };
        if let Err(error) = written.await {
            self.write_error = Some(error);
        }
    }

    /// After an error, rustls may have an alert for the peer.
    async fn send_alert<IO: AsyncWrite + Unpin>(&mut self, io: &mut IO) {
        // Only while there is something to send: rustls must not look at the faulty bytes once more.
        while self.connection.common().wants_write() && matches!(self.step(), Ok(Step::Again)) {}
        let sending = async {
            io.write_all(&self.outgoing).await?;
            io.shutdown().await
        };
        // Best effort: the peer may be gone, or not reading.
        let _ = tokio::time::timeout(ALERT_TIME, sending).await;
    }

    /// What rustls' error means, with what the verifier knows of it.
    fn explain(&self, error: rustls::Error) -> HandshakeError {
        use rustls::Error as E;
        match error {
            E::NoCertificatesPresented => PeerError::NoCertificate.into(),
            E::NoApplicationProtocol => HandshakeError::NoAlpn,
            E::AlertReceived(AlertDescription::NoApplicationProtocol) => HandshakeError::NoAlpn,
            E::AlertReceived(alert) => HandshakeError::RefusedByPeer(alert),
            E::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload,
            ) if !self.spoke_tls => HandshakeError::NotTls(self.guess()),
            E::InvalidCertificate(_) => match self.verifier.outcome() {
                Some(Err(reason)) => reason.clone().into(),
                _ => HandshakeError::Tls(error),
            },
            error => HandshakeError::Tls(error),
        }
    }

    fn guess(&self) -> NotTls {
        const METHODS: [&[u8]; 9] = [
            b"GET ",
            b"POST ",
            b"PUT ",
            b"HEAD ",
            b"DELETE ",
            b"PATCH ",
            b"OPTIONS ",
            b"CONNECT ",
            b"TRACE ",
        ];
        let starts = |with: &[u8]| {
            let length = with.len().min(self.incoming.len());
            self.incoming.get(..length) == with.get(..length)
        };
        if starts(b"PRI * HTTP/2.0\r\n") {
            NotTls::Http2
        } else if METHODS.into_iter().any(starts) || starts(b"HTTP/1.") {
            NotTls::Http1
        } else {
            NotTls::Unknown
        }
    }

    /// From a handshake that is over to a stream.
    async fn finish<IO: AsyncWrite + Unpin>(self, io: IO) -> Result<TlsStream<IO>, HandshakeError> {
        let missing = |what: &str| HandshakeError::Tls(rustls::Error::General(format!("no {what} is known")));
        let common = self.connection.common();
        let agreed = common.alpn_protocol() == Some(ALPN_H2);
        let group =
            common.negotiated_key_exchange_group().ok_or_else(|| missing("key exchange group"))?.name();
        let suite = common.negotiated_cipher_suite().ok_or_else(|| missing("cipher suite"))?.suite();
        let peer = match self.verifier.outcome() {
            Some(Ok(peer)) => peer.clone(),
            Some(Err(reason)) => return Err(reason.clone().into()),
            None => return Err(PeerError::NoCertificate.into()),
        };
        let info = PeerInfo { id: peer.id, not_after: peer.not_after, root: peer.root, group, suite };
        let keys = self.connection.into_keys().map_err(HandshakeError::Tls)?;
        let mut stream = TlsStream::new(io, keys, self.incoming, self.outgoing, info);
        if !agreed {
            let alert = stream.abort(AlertDescription::NoApplicationProtocol);
            // Best effort, as above.
            let _ = tokio::time::timeout(ALERT_TIME, alert).await;
            return Err(HandshakeError::NoAlpn);
        }
        Ok(stream)
    }
}
