//! The cluster's keys: two authorities, the programs' certificates and kubeconfigs. Made anew for each cluster.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::lab::{API_PORT, API_SERVICE_IP, CONTROL_PLANE_IP, Lab, NODES};

/// What a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Client,
    Server,
    Both,
}

/// Makes everything that the programs need, below `pki/`.
///
/// # Errors
/// A key can't be made or written.
pub fn make(lab: &Lab) -> Result<()> {
    let ca = authority(lab, "ca")?;
    let front = authority(lab, "front-proxy-ca")?;

    // Signs ServiceAccounts' tokens.
    let tokens = KeyPair::generate()?;
    secret(lab, "sa.key", &tokens.serialize_pem())?;
    lab.write(&lab.pki("sa.pub"), &tokens.public_key_pem())?;

    let api_names = [
        CONTROL_PLANE_IP,
        "127.0.0.1",
        API_SERVICE_IP,
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    certify(lab, &ca, "apiserver", "kube-apiserver", None, Use::Server, &api_names)?;
    certify(lab, &front, "front-proxy-client", "front-proxy-client", None, Use::Client, &[])?;
    let admins = Some("system:masters");
    certify(lab, &ca, "apiserver-kubelet-client", "apiserver-kubelet-client", admins, Use::Client, &[])?;
    for (file, user, group) in [
        ("admin", "admin", admins),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("proxy", "system:kube-proxy", None),
    ] {
        certify(lab, &ca, file, user, group, Use::Client, &[])?;
        kubeconfig(lab, file)?;
    }
    for node in &NODES {
        let user = format!("system:node:{}", node.name);
        let names = [node.ip, node.ip6, node.name];
        certify(lab, &ca, node.name, &user, Some("system:nodes"), Use::Both, &names)?;
        kubeconfig(lab, node.name)?;
    }
    Ok(())
}

fn parameters(common_name: &str, names: &[&str]) -> Result<CertificateParams> {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    // The clock of a test may be set back a little; a cluster lives for hours.
    parameters.not_before = OffsetDateTime::now_utc() - Duration::days(1);
    parameters.not_after = OffsetDateTime::now_utc() + Duration::days(30);
    Ok(parameters)
}

fn authority(lab: &Lab, name: &str) -> Result<Issuer<'static, KeyPair>> {
    let mut parameters = parameters(name, &[])?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let certificate = parameters.self_signed(&key).with_context(|| format!("making {name}"))?.pem();
    secret(lab, &format!("{name}.key"), &key.serialize_pem())?;
    lab.write(&lab.pki(&format!("{name}.crt")), &certificate)?;
    Ok(Issuer::new(parameters, key))
}

fn certify(
    lab: &Lab,
    issuer: &Issuer<'static, KeyPair>,
    file: &str,
    common_name: &str,
    organization: Option<&str>,
    purpose: Use,
    names: &[&str],
) -> Result<()> {
    let mut parameters = parameters(common_name, names)?;
    if let Some(organization) = organization {
        parameters.distinguished_name.push(DnType::OrganizationName, organization);
    }
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    if purpose != Use::Server {
        parameters.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    }
    if purpose != Use::Client {
        parameters.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    let key = KeyPair::generate()?;
    let certificate = parameters
        .signed_by(&key, issuer)
        .with_context(|| format!("making the certificate of {common_name}"))?
        .pem();
    lab.write(&lab.pki(&format!("{file}.crt")), &certificate)?;
    secret(lab, &format!("{file}.key"), &key.serialize_pem())
}

fn kubeconfig(lab: &Lab, name: &str) -> Result<()> {
    let file = |name: &str| lab.pki(name).display().to_string();
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "kube", "cluster": {
            "server": format!("https://{CONTROL_PLANE_IP}:{API_PORT}"),
            "certificate-authority": file("ca.crt"),
        }}],
        "users": [{"name": name, "user": {
            "client-certificate": file(&format!("{name}.crt")),
            "client-key": file(&format!("{name}.key")),
        }}],
        "contexts": [{"name": "kube", "context": {"cluster": "kube", "user": name}}],
        "current-context": "kube",
    });
    secret(lab, &format!("{name}.kubeconfig"), &config.to_string())
}

fn secret(lab: &Lab, file: &str, text: &str) -> Result<()> {
    let path = lab.pki(file);
    lab.write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_the_programs_are_given_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let lab = Lab { workspace: directory.path().into(), root: directory.path().into(), number: 1 };
        make(&lab).unwrap();
        for file in ["ca.crt", "ca.key", "sa.pub", "apiserver.key", "node2.kubeconfig", "admin.kubeconfig"] {
            assert!(lab.pki(file).exists(), "{file}");
        }
        let mode = fs::metadata(lab.pki("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
