//! An image as one file: an OCI image layout (image-spec, image-layout.md) which is a `docker save` archive as well.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::tar::{Entry, Tar};
use super::{Platform, Rootfs, sha256};

/// What an image says of itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// With the tag: `culvert/ztunnel:0.1.0`.
    pub name: String,
    /// What it is for.
    pub platform: Platform,
    /// What is run; empty for an image whose pods say it.
    pub entrypoint: Vec<String>,
    /// `UID:GID`.
    pub user: String,
    /// Labels, as the image spec's annotations.md names them.
    pub labels: Vec<(String, String)>,
    /// When the source was made, in seconds after 1970.
    pub seconds: u64,
}

/// A finished image.
#[derive(Debug)]
pub struct Archive {
    /// The file.
    pub bytes: Vec<u8>,
    /// Of the manifest: what a registry would know it by.
    pub digest: String,
}

impl Archive {
    /// Packs files into an image of one layer.
    ///
    /// # Errors
    /// A name is too long.
    pub fn pack(files: &Rootfs, settings: &Settings) -> Result<Self> {
        let layer = files.tar(settings.seconds)?;
        let created = rfc3339(settings.seconds);
        let labels: serde_json::Map<String, Value> =
            settings.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let config = json!({
            "architecture": settings.platform.architecture,
            "os": "linux",
            "created": created,
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": settings.entrypoint,
                "User": settings.user,
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
            "history": [{"created": created, "created_by": "culvert images"}],
        })
        .to_string()
        .into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("application/vnd.oci.image.config.v1+json", &config),
            "layers": [blob("application/vnd.oci.image.layer.v1.tar", &layer)],
        })
        .to_string()
        .into_bytes();
        let digest = sha256(&manifest);
        let mut tar = Tar::new(settings.seconds);
        let mut file = |path: &str, data: Vec<u8>| tar.add(path, &Entry::File(0o644, data));
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())?;
        file("index.json", index(settings, &manifest).to_string().into_bytes())?;
        let path = |bytes: &[u8]| format!("blobs/sha256/{}", sha256(bytes));
        let docker = json!([{
            "Config": path(&config), "RepoTags": [settings.name], "Layers": [path(&layer)],
        }]);
        file("manifest.json", docker.to_string().into_bytes())?;
        for bytes in [config, manifest, layer] {
            file(&path(&bytes), bytes)?;
        }
        Ok(Self { bytes: tar.finish(), digest })
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// With the path.
    pub fn write(&self, path: &Path) -> Result<()> {
        let partial = path.with_extension("partial");
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&partial, &self.bytes).with_context(|| format!("writing {}", partial.display()))?;
        fs::rename(&partial, path).with_context(|| format!("writing {}", path.display()))
    }
}

fn blob(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len()})
}

fn index(settings: &Settings, manifest: &[u8]) -> Value {
    let mut entry = blob("application/vnd.oci.image.manifest.v1+json", manifest);
    entry["platform"] = json!({"architecture": settings.platform.architecture, "os": "linux"});
    let tag = settings.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    // containerd's name for it is always a full one: that of a registry comes first, and has a dot.
    let registry = settings.name.split('/').next().is_some_and(|first| first.contains('.'));
    let full = if registry { settings.name.clone() } else { format!("docker.io/{}", settings.name) };
    entry["annotations"] = json!({
        "io.containerd.image.name": full,
        "org.opencontainers.image.ref.name": tag,
    });
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    })
}

/// RFC 3339, in UTC.
#[must_use]
pub fn rfc3339(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let at = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, second) = at.to_hms();
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::PLATFORMS;

    fn image(order: &[&str]) -> Archive {
        let mut files = Rootfs::default();
        for name in order {
            files.file(name, name.as_bytes().to_vec(), 0o644).unwrap();
        }
        let settings = Settings {
            name: "culvert/test:1".into(),
            platform: PLATFORMS[0],
            entrypoint: vec!["/bin/test".into()],
            user: "65532:65532".into(),
            labels: Vec::new(),
            seconds: 1_700_000_000,
        };
        Archive::pack(&files, &settings).unwrap()
    }

    #[test]
    fn the_same_files_give_the_same_image() {
        let one = image(&["/bin/test", "/etc/a", "/etc/b"]);
        let other = image(&["/etc/b", "/bin/test", "/etc/a"]);
        assert!(one.bytes == other.bytes);
        assert_ne!(one.digest, image(&["/bin/test", "/etc/a"]).digest);
    }

    #[test]
    fn every_blob_is_where_its_digest_says() {
        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("image.tar");
        image(&["/bin/test"]).write(&archive).unwrap();
        let at = directory.path().to_str().unwrap();
        crate::process::output("tar", &["-C", at, "-xf", archive.to_str().unwrap()]).unwrap();
        let json = |path: &str| -> Value {
            serde_json::from_slice(&fs::read(directory.path().join(path)).unwrap()).unwrap()
        };
        let find = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let path = format!("blobs/sha256/{digest}");
            let bytes = fs::read(directory.path().join(&path)).unwrap();
            assert_eq!(sha256(&bytes), digest);
            assert_eq!(bytes.len() as u64, descriptor["size"].as_u64().unwrap());
            path
        };
        let manifest = json(&find(&json("index.json")["manifests"][0]));
        let config = find(&manifest["config"]);
        let layer = find(&manifest["layers"][0]);
        let docker = json("manifest.json");
        assert_eq!(docker[0]["Config"], config.as_str());
        assert_eq!(docker[0]["Layers"][0], layer.as_str());
        assert_eq!(json(&config)["created"], "2023-11-14T22:13:20Z");
    }
}
