//! Answers to names that the mesh knows.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder};

use super::registry::Target;
use super::wire::{self, Query, flag, kind};

/// How long clients keep an answer, in seconds (as Istio's).
const TTL: u32 = 30;

/// Addresses of the kind that was asked for; none of that kind makes an answer without data (RFC 2308, section
/// 2.2), which says that the name exists. At most `limit` bytes, else cut off with the flag that says so.
pub(super) fn with_addresses(query: &Query, addresses: &[IpAddr], limit: usize) -> Vec<u8> {
    let (v4, v6) = match query.kind() {
        kind::A => (true, false),
        kind::AAAA => (false, true),
        _ => (true, true), // ANY (RFC 8482 allows less, and asks for nothing more)
    };
    let wanted = addresses.iter().filter(|ip| if ip.is_ipv4() { v4 } else { v6 });
    build(query, limit, |name, message| {
        for ip in wanted {
            message.add_answer(address_record(name.clone(), *ip));
        }
    })
}

/// Services and their ports; the addresses of the targets go with them where there is room.
pub(super) fn with_targets(query: &Query, targets: &[Target], limit: usize) -> Vec<u8> {
    build(query, limit, |name, message| {
        for target in targets {
            // All come from names of Kubernetes objects, which are valid.
            let Ok(host) = Name::from_ascii(format!("{}.", target.host)) else { continue };
            let data = RData::SRV(SRV::new(0, 100, target.port, host.clone()));
            message.add_answer(Record::from_rdata(name.clone(), TTL, data));
            for ip in &target.addresses {
                message.add_additional(address_record(host.clone(), *ip));
            }
        }
    })
}

fn address_record(name: Name, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name, TTL, data)
}

/// Room for EDNS without options.
const OPT_SIZE: usize = 11;

fn build(query: &Query, limit: usize, fill: impl FnOnce(&Name, &mut Message)) -> Vec<u8> {
    let encode = || {
        let name = Name::read(&mut BinDecoder::new(query.raw_name())).ok()?;
        let mut message = Message::new(query.id(), MessageType::Response, OpCode::Query);
        message.metadata.authoritative = true;
        message.metadata.recursion_available = true;
        message.metadata.recursion_desired = query.flags() & flag::RD != 0;
        message.metadata.checking_disabled = query.flags() & flag::CD != 0;
        let mut question = Question::query(name.clone(), RecordType::from(query.kind()));
        question.set_query_class(DNSClass::from(query.class()));
        message.add_query(question);
        let unknown_version = query.edns().is_some_and(|edns| edns.version != 0);
        if let Some(asked) = query.edns() {
            let mut edns = Edns::new();
            edns.set_max_payload(wire::OWN_UDP_SIZE).set_dnssec_ok(asked.dnssec_ok);
            message.set_edns(edns);
        }
        if unknown_version {
            message.metadata.response_code = ResponseCode::BADVERS;
        } else {
            fill(&name, &mut message);
        }
        encode_within(message, limit)
    };
    encode().unwrap_or_else(|| query.bare_response(wire::rcode::SERVER_FAILURE))
}

/// Leaves out what does not fit: the additional records, which nobody misses (RFC 2181, section 9), then answers,
/// of which as many stay as there is room for: some resolvers never come back over TCP.
fn encode_within(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    loop {
        let mut bytes = Vec::with_capacity(512);
        // Past 64 KiB the encoder itself cuts off, and says so with an error or the flag.
        #[cfg(test)]
        eprintln!("answers {} limit {limit}", message.answers.len());
        let encoded = message.emit(&mut BinEncoder::new(&mut bytes));
        #[cfg(test)]
        eprintln!("len {}", bytes.len());
        if encoded.is_ok() && bytes.len() <= limit {
            return Some(bytes);
        }
        if !message.additionals.is_empty() {
            message.additionals.clear();
            continue;
        }
        let answers = message.answers.len();
        if answers == 0 {
            return None;
        }
        message.metadata.truncation = true;
        // Answers are about alike in size.
        let room = limit.saturating_sub(OPT_SIZE) * answers / bytes.len().max(limit + 1);
        message.answers.truncate(room.min(answers - 1));
    }
}
