//! Container images without a daemon or a registry: files, and the libraries that they need, as an archive that
//! containerd, Docker, Podman and skopeo read.
//!
//! The same files give the same bytes: entries are sorted, owned by root, and dated by the source.

pub mod archive;
pub mod definition;
pub mod elf;
pub mod rootfs;
pub mod sbom;
pub mod tar;

pub use archive::{Archive, Settings};
pub use definition::{Build, Definition};
pub use rootfs::Rootfs;

use anyhow::{Result, bail};

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Platform {
    /// As images call it.
    pub architecture: &'static str,
    /// As Rust calls it.
    pub target: &'static str,
    /// As Debian's library directories are called.
    pub multiarch: &'static str,
}

/// The platforms that images are defined for.
pub const PLATFORMS: [Platform; 2] = [
    Platform { architecture: "amd64", target: "x86_64-unknown-linux-gnu", multiarch: "x86_64-linux-gnu" },
    Platform { architecture: "arm64", target: "aarch64-unknown-linux-gnu", multiarch: "aarch64-linux-gnu" },
];

impl Platform {
    /// The platform of this name.
    ///
    /// # Errors
    /// Images are not defined for it.
    pub fn named(architecture: &str) -> Result<Self> {
        match PLATFORMS.iter().find(|p| p.architecture == architecture) {
            Some(platform) => Ok(*platform),
            None => bail!("images are defined for amd64 and arm64, not for {architecture:?}"),
        }
    }

    /// That of this machine.
    ///
    /// # Errors
    /// Images are not defined for it.
    pub fn here() -> Result<Self> {
        Self::named(match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        })
    }
}

/// SHA-256, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&aws_lc_rs::digest::SHA256, bytes)
}

/// SHA-1, in hexadecimal: no proof of anything, and asked for by SPDX.
#[must_use]
pub fn sha1(bytes: &[u8]) -> String {
    hexadecimal(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, bytes)
}

fn hexadecimal(algorithm: &'static aws_lc_rs::digest::Algorithm, bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(algorithm, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
