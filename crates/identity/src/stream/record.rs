//! Record protection with the keys that a handshake agreed on (RFC 8446, section 5). The cryptography is rustls';
//! sequence numbers and key updates are kept here.

use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, ProtocolVersion, SupportedCipherSuite,
    Tls13CipherSuite,
};

/// Type, legacy version, length.
pub(super) const HEADER: usize = 5;
/// Most plaintext of a record (RFC 8446, section 5.1).
pub(super) const FRAGMENT: usize = 1 << 14;
/// Most ciphertext of a record (RFC 8446, section 5.2).
pub(super) const CIPHERTEXT: usize = FRAGMENT + 256;

/// KeyUpdate that asks for none in return (RFC 8446, section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Derives the next traffic keys.
pub(crate) enum Schedule {
    /// Of the side that connected.
    Client(KernelConnection<ClientConnectionData>),
    /// Of the side that accepted.
    Server(KernelConnection<ServerConnectionData>),
}

/// The keys of a connection, in both directions.
pub(crate) struct Keys {
    schedule: Schedule,
    suite: &'static Tls13CipherSuite,
    encrypter: Box<dyn MessageEncrypter>,
    /// The sequence number of the next record sent.
    sent: u64,
    /// Records that may be sent under one key.
    sent_limit: u64,
    decrypter: Box<dyn MessageDecrypter>,
    /// The sequence number of the next record received.
    received: u64,
}

impl Keys {
    /// Takes over after a handshake.
    pub(crate) fn new(
        secrets: ExtractedSecrets,
        suite: SupportedCipherSuite,
        schedule: Schedule,
    ) -> Result<Self, Error> {
        #[allow(irrefutable_let_patterns, reason = "other crates of a build may turn on rustls' TLS 1.2")]
        let SupportedCipherSuite::Tls13(suite) = suite else {
            return Err(Error::General("the handshake agreed on a suite that is not of TLS 1.3".to_owned()));
        };
        let (sent, send) = secrets.tx;
        let (received, receive) = secrets.rx;
        if sent != 0 || received != 0 {
            return Err(Error::General("records were exchanged before the handshake was over".to_owned()));
        }
        Ok(Self {
            encrypter: encrypter(suite, send)?,
            decrypter: decrypter(suite, receive)?,
            schedule,
            suite,
            sent,
            sent_limit: suite.common.confidentiality_limit,
            received,
        })
    }

    /// Whether this is the side that accepted.
    pub(super) fn is_server(&self) -> bool {
        matches!(self.schedule, Schedule::Server(_))
    }

    /// Whether the sending key has protected as much as it may, so that [`Keys::update_sending`] is due.
    pub(super) fn sending_key_used_up(&self) -> bool {
        // One is left for the KeyUpdate itself.
        self.sent.saturating_add(1) >= self.sent_limit
    }

    /// Protects `payload`, at most [`FRAGMENT`] bytes; returns the record with its header.
    pub(super) fn seal(
        &mut self,
        content: ContentType,
        payload: OutboundChunks<'_>,
    ) -> Result<Vec<u8>, Error> {
        let message = OutboundPlainMessage { typ: content, version: ProtocolVersion::TLSv1_2, payload };
        let record = self.encrypter.encrypt(message, self.sent)?.encode();
        // Cannot wrap: `sending_key_used_up` comes first.
        self.sent = self.sent.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(record)
    }

    /// Announces new sending keys, and switches to them; returns the record that announces.
    pub(super) fn update_sending(&mut self) -> Result<Vec<u8>, Error> {
        let record = self.seal(ContentType::Handshake, OutboundChunks::Single(&KEY_UPDATE))?;
        let (sequence, secrets) = match &mut self.schedule {
            Schedule::Client(kernel) => kernel.update_tx_secret()?,
            Schedule::Server(kernel) => kernel.update_tx_secret()?,
        };
        self.encrypter = encrypter(self.suite, secrets)?;
        self.sent = sequence;
        Ok(record)
    }

    /// Decrypts `body`, a record without its header, in place. The plaintext is at the returned place in it.
    pub(super) fn open(&mut self, body: &mut [u8]) -> Result<(ContentType, Range<usize>), Error> {
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
        let plain = self.decrypter.decrypt(message, self.received)?;
        self.received = self.received.checked_add(1).ok_or(Error::DecryptError)?;
        Ok((plain.typ, 0..plain.payload.len()))
    }

    /// Switches to the peer's new keys.
    pub(super) fn update_receiving(&mut self) -> Result<(), Error> {
        let (sequence, secrets) = match &mut self.schedule {
            Schedule::Client(kernel) => kernel.update_rx_secret()?,
            Schedule::Server(kernel) => kernel.update_rx_secret()?,
        };
        self.decrypter = decrypter(self.suite, secrets)?;
        self.received = sequence;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    #[cfg(test)]
    pub(super) fn limit_sending_key(&mut self, records: u64) {
        self.sent_limit = records;
    }
}

fn encrypter(
    suite: &Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageEncrypter>, Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok(suite.aead_alg.encrypter(key, iv)),
        _ => Err(Error::General("unknown kind of traffic secrets".to_owned())),
    }
}

fn decrypter(
    suite: &Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok(suite.aead_alg.decrypter(key, iv)),
        _ => Err(Error::General("unknown kind of traffic secrets".to_owned())),
    }
}
