//! The tables and chains behind iptables-nft, which it makes and never removes: seen and deleted over netlink.
//!
//! Numbers are those of kernel include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h.

use std::io;

use net::Netns;
use net::netlink::{Message, Netlink, attributes};
use nix::sys::socket::SockProtocol;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u8 = 10;
const DELETE_TABLE: u8 = 2;
const GET_CHAIN: u8 = 4;
const DELETE_CHAIN: u8 = 5;
const NFGENMSG: usize = 4;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;

/// A chain and the table that it is in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Chain {
    pub(crate) table: String,
    pub(crate) name: String,
}

/// All chains of the family.
pub(crate) fn chains(netns: &Netns, v6: bool) -> io::Result<Vec<Chain>> {
    let mut found = Vec::new();
    let mut netlink = Netlink::open(netns, SockProtocol::NetlinkNetFilter)?;
    netlink.dump(message(GET_CHAIN, v6), |_, payload| {
        let all: Vec<_> = attributes(payload.get(NFGENMSG..).unwrap_or_default()).collect();
        let text = |wanted| {
            let value = all.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value)?;
            Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned())
        };
        found.extend(text(CHAIN_TABLE).zip(text(CHAIN_NAME)).map(|(table, name)| Chain { table, name }));
    })?;
    Ok(found)
}

/// Deletes `chains`, and then `tables`; nothing at all if one of the chains has a rule.
pub(crate) fn delete(netns: &Netns, v6: bool, chains: &[Chain], tables: &[String]) -> io::Result<()> {
    let text = |name: &str| [name.as_bytes(), &[0]].concat();
    let mut messages: Vec<_> = chains
        .iter()
        .map(|Chain { table, name }| {
            message(DELETE_CHAIN, v6).attribute(CHAIN_TABLE, &text(table)).attribute(CHAIN_NAME, &text(name))
        })
        .collect();
    messages.extend(tables.iter().map(|name| message(DELETE_TABLE, v6).attribute(TABLE_NAME, &text(name))));
    if messages.is_empty() {
        return Ok(());
    }
    // An `nfgenmsg` with the subsystem in network order.
    let envelope = |kind| Message::new(kind, 0).body(&[0, 0, 0, SUBSYSTEM]);
    let mut netlink = Netlink::open(netns, SockProtocol::NetlinkNetFilter)?;
    netlink.transaction(envelope(BATCH_BEGIN), messages, envelope(BATCH_END))
}

fn message(kind: u8, v6: bool) -> Message {
    let kind = u16::from_be_bytes([SUBSYSTEM, kind]);
    // An `nfgenmsg`: family (AF_INET or AF_INET6), version, resource.
    Message::new(kind, 0).body(&[if v6 { 10 } else { 2 }, 0, 0, 0])
}
