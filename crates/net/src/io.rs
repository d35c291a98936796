//! What a byte stream has to be for the crates above: a TCP stream, a TLS session, an end of a tunnel, or a
//! simulated stream in tests.

use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream in both directions. Everything that can be one is one.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + ?Sized> Io for T {}
