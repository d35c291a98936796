//! What a control plane sends.

use model::Mesh;
use prost::Message;
use proto::wire::{auth, security, workload, zds};
use proto::{Decoder, Extensions, encode_policy, encode_service, encode_workload};

use crate::config_files;

/// Bytes as everything that they could be: an error, or what is written and read back is the same.
pub(crate) fn any(bytes: &[u8]) {
    let mut decoder = Decoder::default();
    if let Ok(message) = workload::Workload::decode(bytes) {
        let _ = message.not_applied();
        if let Ok(read) = decoder.workload(&message)
            && let Ok(written) = encode_workload(&read)
        {
            assert_eq!(Decoder::default().workload(&written).expect("it was written here"), read);
        }
    }
    if let Ok(message) = workload::Service::decode(bytes) {
        let _ = message.not_applied();
        if let Ok(read) = decoder.service(&message)
            && let Ok(written) = encode_service(&read, Extensions::Culvert)
        {
            assert_eq!(Decoder::default().service(&written).expect("it was written here"), read);
        }
    }
    if let Ok(message) = workload::Address::decode(bytes) {
        let _ = decoder.address(&message);
    }
    if let Ok(message) = security::Authorization::decode(bytes) {
        let _ = message.not_applied();
        if let Ok(read) = decoder.policy(&message)
            && let Ok(written) = encode_policy(&read, Extensions::Culvert)
        {
            assert_eq!(Decoder::default().policy(&written).expect("it was written here"), read);
        }
    }
    let _ = zds::WorkloadRequest::decode(bytes);
    let _ = zds::WorkloadResponse::decode(bytes);
    let _ = zds::ZdsHello::decode(bytes);
    let _ = auth::IstioCertificateResponse::decode(bytes);
    decoder.sweep();
}

/// What the good manifests come to.
pub(crate) fn messages() -> Vec<Vec<u8>> {
    let mesh: Mesh = config_files::mesh();
    let mut all = Vec::new();
    for workload in mesh.workloads() {
        all.push(encode_workload(workload).expect("it can be written").encode_to_vec());
    }
    for service in mesh.services() {
        all.push(encode_service(service, Extensions::Culvert).expect("it can be written").encode_to_vec());
    }
    for policy in mesh.policies() {
        all.push(encode_policy(policy, Extensions::Culvert).expect("it can be written").encode_to_vec());
    }
    all
}
