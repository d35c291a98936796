//! Peers on port 15008 that no ztunnel speaks for: with certificates of any kind, and HTTP/2 by hand.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use harness::netns::Host;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::{Mesh, PATIENCE, traffic};

/// A certificate with its chain and key.
pub struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// The parameters of a proper workload certificate, to be spoiled.
pub fn proper(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = time::OffsetDateTime::now_utc();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - Duration::from_secs(60);
    params.not_after = now + Duration::from_secs(3600);
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// The mesh's own CA, as somebody has it who stole its key.
pub fn authority(mesh: &Mesh) -> Issuer<'static, KeyPair> {
    let text = fs::read_to_string(mesh.dir().join("ca/ca.pem")).unwrap();
    let key = KeyPair::from_pem(&text[text.find("-----BEGIN PRIVATE KEY").unwrap()..]).unwrap();
    Issuer::from_ca_cert_pem(&text, key).unwrap()
}

/// A CA that nobody knows.
pub fn stranger() -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "somebody");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Issuer::new(params, KeyPair::generate().unwrap())
}

pub fn sign(params: &CertificateParams, authority: &Issuer<'_, KeyPair>) -> Certificate {
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Certificate { chain: vec![certificate.into()], key }
}

/// A proper certificate of the mesh.
pub fn member(mesh: &Mesh, id: &str) -> Certificate {
    sign(&proper(id), &authority(mesh))
}

/// What a server proves itself with.
pub struct Identity(Arc<rustls::ServerConfig>);

impl Identity {
    /// A proper one of the mesh, that asks clients for nothing. The CA's files have to be there.
    pub fn of(mesh: &Mesh, id: &str) -> Self {
        let Certificate { chain, key } = member(mesh, id);
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self(Arc::new(config))
    }
}

/// Secures what was accepted.
pub async fn secured(
    stream: TcpStream,
    identity: &Identity,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    timeout(PATIENCE, tokio_rustls::TlsAcceptor::from(identity.0.clone()).accept(stream)).await?
}

/// Connects and offers `alpn`, with a certificate or without, accepting whoever answers. A server's refusal may
/// show only at the first read: in TLS 1.3 the client has finished by then.
pub async fn secure(
    from: &Host,
    to: SocketAddr,
    certificate: Option<&Certificate>,
    alpn: &[&str],
) -> io::Result<TlsStream<TcpStream>> {
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting));
    let mut config = match certificate {
        Some(c) => builder.with_client_auth_cert(c.chain.clone(), c.key.clone_key()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("ignored.example").unwrap();
    let stream = traffic::dial(from, to).await?;
    timeout(PATIENCE, connector.connect(name, stream)).await?
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("only TLS 1.3 is offered")
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A frame's bytes (RFC 9113 section 4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block of literals that are shorter than 127 bytes (RFC 7541 section 6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            bytes.push(text.len() as u8);
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// The headers of a CONNECT request.
pub fn connect(authority: &str) -> Vec<u8> {
    block(&[(":method", "CONNECT"), (":authority", authority)])
}

/// A frame that was received.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The first byte of a response's headers. Statuses of the static table are one byte (RFC 7541 appendix A):
    /// 0x88 is 200, 0x8c is 400. A change of the table's size may come first (section 6.3).
    pub fn status(&self) -> Option<u8> {
        let block = self.payload.strip_prefix(&[0x20]).unwrap_or(&self.payload);
        block.first().copied().filter(|_| self.kind == HEADERS)
    }
}

/// An HTTP/2 connection whose frames are made by hand.
pub struct Http2<Io> {
    pub io: Io,
}

impl Http2<TlsStream<TcpStream>> {
    /// A connection of a proper member of the mesh, begun.
    pub async fn begin(mesh: &Mesh, from: &Host, to: SocketAddr, id: &str) -> io::Result<Self> {
        let io = secure(from, to, Some(&member(mesh, id)), &["h2"]).await?;
        let mut http2 = Self { io };
        http2.io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        // No dynamic table for what is sent to us, so that the status can be seen.
        http2.send(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0]).await?;
        Ok(http2)
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Http2<Io> {
    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.io.write_all(&frame(kind, flags, stream, payload)).await?;
        self.io.flush().await
    }

    /// The next frame that is a response, data, or the end of a stream or of the connection.
    pub async fn answer(&mut self) -> io::Result<Frame> {
        timeout(PATIENCE, async {
            loop {
                let mut head = [0; 9];
                self.io.read_exact(&mut head).await?;
                let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
                self.io.read_exact(&mut payload).await?;
                match head[3] {
                    SETTINGS if head[4] & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]).await?,
                    PING if head[4] & ACK == 0 => self.send(PING, ACK, 0, &payload).await?,
                    SETTINGS | PING | WINDOW_UPDATE => {}
                    kind => {
                        let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
                        return Ok(Frame { kind, stream, payload });
                    }
                }
            }
        })
        .await?
    }
    /// The next frame of a stream, as [`Http2::answer`].
    pub async fn answer_of(&mut self, stream: u32) -> io::Result<Frame> {
        loop {
            let answer = self.answer().await?;
            if answer.stream == stream {
                return Ok(answer);
            }
        }
    }
}
