//! Record protection with the keys that a handshake agreed on (RFC 8446, section 5). Records are opened by rustls, and
//! sealed by what it uses for that, since it would copy each into an allocation of its own. Sequence numbers and key
//! updates are kept here.

use std::ops::Range;

use aws_lc_rs::aead::{
    self, AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, TlsProtocolId, TlsRecordSealingKey,
    UnboundKey,
};
use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, Nonce};
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

/// The tag of each of TLS 1.3's ciphers.
const TAG: usize = 16;
/// What a record is longer than its plaintext: the header, the content's type, the tag.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;

/// KeyUpdate that asks for none in return (RFC 8446, section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
/// The length of the record that announces new keys.
pub(super) const KEY_UPDATE_RECORD: usize = KEY_UPDATE.len() + OVERHEAD;

/// Plaintext in pieces: a part of what they hold together.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a> {
    pieces: &'a [&'a [u8]],
    start: usize,
    end: usize,
}

impl<'a> Plain<'a> {
    /// All that `pieces` hold.
    pub(super) fn new(pieces: &'a [&'a [u8]]) -> Self {
        Self { pieces, start: 0, end: pieces.iter().map(|piece| piece.len()).sum() }
    }

    /// Another part of the same pieces.
    pub(super) fn part(self, place: Range<usize>) -> Self {
        Self { start: place.start, end: place.end, ..self }
    }

    pub(super) fn len(self) -> usize {
        self.end.saturating_sub(self.start)
    }

    pub(super) fn to_vec(self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        self.slices().for_each(|slice| all.extend_from_slice(slice));
        all
    }

    fn slices(self) -> impl Iterator<Item = &'a [u8]> {
        let (mut skip, mut left) = (self.start, self.len());
        self.pieces.iter().filter_map(move |piece| {
            let rest = piece.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(piece.len());
            let slice = rest.get(..left).unwrap_or(rest);
            left -= slice.len();
            (!slice.is_empty()).then_some(slice)
        })
    }
}

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
    sealer: Sealer,
    /// The sequence number of the next record sent.
    sent: u64,
    /// Records that may be sent under one key.
    sent_limit: u64,
    /// The peer wants new keys before the next data.
    update_asked: bool,
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
            sealer: Sealer::new(send)?,
            decrypter: decrypter(suite, receive)?,
            schedule,
            suite,
            sent,
            sent_limit: suite.common.confidentiality_limit,
            update_asked: false,
            received,
        })
    }

    /// Whether this is the side that accepted.
    pub(super) fn is_server(&self) -> bool {
        matches!(self.schedule, Schedule::Server(_))
    }

    /// Whether [`Keys::update_sending`] must come before a record of this kind: the key has protected as much as it may,
    /// or the peer asked for another before the next data (RFC 8446, section 4.6.3).
    pub(super) fn update_due(&self, content: ContentType) -> bool {
        // One is left for the KeyUpdate itself.
        let used_up = self.sent.saturating_add(1) >= self.sent_limit;
        used_up || (self.update_asked && content == ContentType::ApplicationData)
    }

    /// Notes that the peer asked for new sending keys.
    pub(super) fn ask_for_update(&mut self) {
        self.update_asked = true;
    }

    /// Protects `payload`, at most [`FRAGMENT`] bytes, as a record at the front of `out`; returns the record's length,
    /// which is [`OVERHEAD`] more.
    pub(super) fn seal(
        &mut self,
        content: ContentType,
        payload: Plain<'_>,
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let sequence = self.sent;
        // Counted whatever comes of it: no number is ever used twice. Cannot wrap: `update_due` comes first.
        self.sent = self.sent.checked_add(1).ok_or(Error::EncryptError)?;
        self.sealer.seal(content, payload, sequence, out)
    }

    /// Announces new sending keys, and switches to them; returns the length of the record that announces, at the front
    /// of `out`.
    pub(super) fn update_sending(&mut self, out: &mut [u8]) -> Result<usize, Error> {
        let record = self.seal(ContentType::Handshake, Plain::new(&[&KEY_UPDATE]), out)?;
        let (sequence, secrets) = match &mut self.schedule {
            Schedule::Client(kernel) => kernel.update_tx_secret()?,
            Schedule::Server(kernel) => kernel.update_tx_secret()?,
        };
        self.sealer = Sealer::new(secrets)?;
        self.sent = sequence;
        self.update_asked = false;
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
    pub(super) fn set_sent(&mut self, sequence: u64) {
        self.sent = sequence;
    }

    #[cfg(test)]
    pub(super) fn limit_sending_key(&mut self, records: u64) {
        self.sent_limit = records;
    }
}

/// A sending key and its IV.
struct Sealer {
    key: SealingKey,
    iv: Iv,
}

enum SealingKey {
    /// AES-GCM, where a nonce that comes twice gives the key away. This one refuses each that is not above all before it:
    /// [`Keys::seal`] counts, and it need not be believed.
    Gcm(TlsRecordSealingKey),
    /// ChaCha20-Poly1305, for which there is no such key.
    Other(LessSafeKey),
}

impl Sealer {
    fn new(secrets: ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (algorithm, key, iv): (_, AeadKey, Iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("unknown kind of traffic secrets".to_owned())),
        };
        let key = key.as_ref().get(..algorithm.key_len()).unwrap_or_default();
        let made = if *algorithm == CHACHA20_POLY1305 {
            UnboundKey::new(algorithm, key).map(|key| SealingKey::Other(LessSafeKey::new(key)))
        } else {
            TlsRecordSealingKey::new(algorithm, TlsProtocolId::TLS13, key).map(SealingKey::Gcm)
        };
        let key =
            made.map_err(|_| Error::General("a sending key of another length than its cipher's".to_owned()))?;
        Ok(Self { key, iv })
    }

    /// Seals straight from where the plaintext lies, if it lies in one piece.
    fn seal(
        &mut self,
        content: ContentType,
        payload: Plain<'_>,
        sequence: u64,
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let length = payload.len() + OVERHEAD;
        let record = out.get_mut(..length).ok_or(Error::EncryptError)?;
        let [high, low] = u16::try_from(length - HEADER).map_err(|_| Error::EncryptError)?.to_be_bytes();
        // As if it were TLS 1.2 (RFC 8446, section 5.2).
        let header = [u8::from(ContentType::ApplicationData), 3, 3, high, low];
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let nonce = aead::Nonce::assume_unique_for_key(Nonce::new(&self.iv, sequence).0);
        let (aad, content) = (Aad::from(header), [u8::from(content)]);
        let mut slices = payload.slices();
        let first = slices.next().unwrap_or_default();
        let sealed = if first.len() == payload.len() {
            let (body, tail) = body.split_at_mut(payload.len());
            match &mut self.key {
                SealingKey::Gcm(key) => {
                    key.seal_out_of_place_scatter(nonce, aad, first, body, &content, tail)
                }
                SealingKey::Other(key) => {
                    key.seal_out_of_place_scatter(nonce, aad, first, body, &content, tail)
                }
            }
        } else {
            let mut rest = &mut *body;
            for slice in std::iter::once(first).chain(slices).chain([&content[..]]) {
                let (now, later) = rest.split_at_mut_checked(slice.len()).ok_or(Error::EncryptError)?;
                now.copy_from_slice(slice);
                rest = later;
            }
            // Whatever else lies there is left over from another record, maybe of another connection: never to be sent.
            if rest.len() != TAG {
                return Err(Error::EncryptError);
            }
            let (body, tag) = body.split_at_mut(length - HEADER - TAG);
            let made = match &mut self.key {
                SealingKey::Gcm(key) => key.seal_in_place_separate_tag(nonce, aad, body),
                SealingKey::Other(key) => key.seal_in_place_separate_tag(nonce, aad, body),
            };
            made.map(|made| tag.copy_from_slice(made.as_ref()))
        };
        sealed.map(|()| length).map_err(|_| Error::EncryptError)
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
