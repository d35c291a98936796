/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* A packet's headers, and the reset that answers it. */
#pragma once
#include "kernel.h"

#define EXTENSIONS_LIMIT 8
#define IPV4_MORE 0x2000
#define IPV4_PIECES 0x3fff

enum reading { READ, OTHER, UNREADABLE };

struct packet {
	__u8 source[16];
	__u8 destination[16];
	__u32 seq;
	__u32 ack;
	__u32 transport; /* where its header begins, from the network header */
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 flags; /* of TCP: FIN 1, SYN 2, RST 4, ACK 16 */
	__u8 v6;
	__u8 plain; /* no options of IP, no extension headers, and not in pieces */
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

INLINE long net_bytes(struct __sk_buff *skb, __u32 offset, void *to, __u32 len)
{
	return bpf_skb_load_bytes_relative(skb, offset, to, len, BPF_HDR_START_NET);
}

INLINE void mapped(__u8 *to, __u32 v4)
{
	__u32 *words = (__u32 *)to;
	words[0] = 0;
	words[1] = 0;
	words[2] = be32(0xffff);
	words[3] = v4;
}

/* The packet's ports, and what TCP has beside them. */
INLINE void read_tcp(struct packet *p, const __u32 *words)
{
	p->source_port = be16((__u16)words[0]);
	p->destination_port = be16((__u16)(words[0] >> 16));
	p->seq = be32(words[1]);
	p->ack = be32(words[2]);
	p->flags = (__u8)(words[3] >> 8);
}

/* What nearly all packets are, TCP by IPv4 without options, in one go: each look at a packet costs. Zero if it is another. */
INLINE int read_plain(struct __sk_buff *skb, struct packet *p)
{
	struct {
		struct iphdr ip;
		__u32 tcp[4];
	} head;
	if (skb->protocol != be16(ETH_P_IP) || net_bytes(skb, 0, &head, sizeof(head)) || head.ip.version != 4 ||
	    head.ip.ihl != 5 || head.ip.protocol != IPPROTO_TCP || head.ip.frag_off & be16(IPV4_PIECES))
		return 0;
	mapped(p->source, head.ip.saddr);
	mapped(p->destination, head.ip.daddr);
	p->protocol = IPPROTO_TCP;
	p->transport = sizeof(head.ip);
	p->plain = 1;
	read_tcp(p, head.tcp);
	return 1;
}

INLINE enum reading read_ipv4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	if (net_bytes(skb, 0, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return UNREADABLE;
	if (ip.protocol != IPPROTO_TCP && ip.protocol != IPPROTO_UDP)
		return OTHER;
	mapped(p->source, ip.saddr);
	mapped(p->destination, ip.daddr);
	if (ip.frag_off & be16(0x1fff))
		/* Without its first piece it is nothing, and that one is looked at. */
		return ip.protocol == IPPROTO_TCP ? UNREADABLE : OTHER;
	p->protocol = ip.protocol;
	p->transport = ip.ihl * 4;
	p->plain = ip.ihl == 5 && !(ip.frag_off & be16(IPV4_MORE));
	return READ;
}

INLINE enum reading read_ipv6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	if (net_bytes(skb, 0, &ip, sizeof(ip)) || ip.version != 6)
		return UNREADABLE;
	__builtin_memcpy(p->source, &ip.saddr, 16);
	__builtin_memcpy(p->destination, &ip.daddr, 16);
	p->v6 = 1;
	__u32 offset = sizeof(ip);
	__u8 next = ip.nexthdr;
#pragma unroll
	for (int i = 0; i < EXTENSIONS_LIMIT; i++) {
		__u8 extension[4];
		if (next == IPPROTO_TCP || next == IPPROTO_UDP) {
			p->protocol = next;
			p->transport = offset;
			p->plain = offset == sizeof(ip);
			return READ;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return OTHER;
		if (net_bytes(skb, offset, extension, sizeof(extension)))
			return UNREADABLE;
		if (next == IPPROTO_FRAGMENT && (extension[2] || (extension[3] & 0xf8)))
			return extension[0] == IPPROTO_TCP ? UNREADABLE : OTHER;
		offset += next == IPPROTO_FRAGMENT ? 8 : next == IPPROTO_AH ? (extension[1] + 2) * 4 : (extension[1] + 1) * 8;
		next = extension[0];
	}
	return UNREADABLE;
}

/* Reads as far as the ports. UNREADABLE: it may be TCP, and can't be told. The addresses are there all the same, or zero. */
INLINE enum reading read_packet(struct __sk_buff *skb, struct packet *p)
{
	enum reading reading;
	__builtin_memset(p, 0, sizeof(*p));
	if (read_plain(skb, p))
		return READ;
	if (skb->protocol == be16(ETH_P_IP))
		reading = read_ipv4(skb, p);
	else if (skb->protocol == be16(ETH_P_IPV6))
		reading = read_ipv6(skb, p);
	else
		return OTHER;
	if (reading != READ)
		return reading;
	if (p->protocol == IPPROTO_UDP) {
		__u16 ports[2];
		if (net_bytes(skb, p->transport, ports, sizeof(ports)))
			return UNREADABLE;
		p->source_port = be16(ports[0]);
		p->destination_port = be16(ports[1]);
	} else {
		__u32 words[4];
		if (net_bytes(skb, p->transport, words, sizeof(words)))
			return UNREADABLE;
		read_tcp(p, words);
	}
	return READ;
}

/* Whether a tag of a VLAN is before what we read. The kernel has taken the outermost off before us. If that was one of priority alone
 * (802.1P), it takes off further ones after us, and then reads what we have not. */
INLINE int is_tagged(const struct __sk_buff *skb)
{
	return skb->protocol == be16(ETH_P_8021Q) || skb->protocol == be16(ETH_P_8021AD);
}

INLINE int opens(const struct packet *p)
{
	return (p->flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) == TCP_SYN;
}

INLINE __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)~sum;
}

/* Turns the packet into the reset that answers it. Non-zero if that is not possible: it is to be dropped then. */
INLINE long into_reset(struct __sk_buff *skb, struct packet *p)
{
	__u8 ethernet[14], swapped[14];
	__u32 network = sizeof(ethernet), transport = network + p->transport;
	if (p->flags & TCP_RST)
		return -1;
	if (p->transport < 20 || p->transport > 1024)
		return -1;
	if (bpf_skb_change_tail(skb, transport + 20, 0) || bpf_skb_load_bytes(skb, 0, ethernet, sizeof(ethernet)))
		return -1;
	if (*(__u16 *)(ethernet + 12) != (__u16)skb->protocol)
		return -1; /* a device without Ethernet */
	__builtin_memcpy(swapped, ethernet + 6, 6);
	__builtin_memcpy(swapped + 6, ethernet, 6);
	__builtin_memcpy(swapped + 12, ethernet + 12, 2);
	if (bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0))
		return -1;

	__u32 tcp[5];
	__u8 flags = p->flags & TCP_ACK ? TCP_RST : TCP_RST | TCP_ACK;
	tcp[0] = be16(p->destination_port) | (__u32)be16(p->source_port) << 16;
	tcp[1] = p->flags & TCP_ACK ? be32(p->ack) : 0;
	tcp[2] = p->flags & TCP_ACK ? 0 : be32(p->seq + 1);
	tcp[3] = 0x50 | (__u32)flags << 8;
	tcp[4] = 0;
	__s64 sum = bpf_csum_diff(0, 0, tcp, sizeof(tcp), be32(IPPROTO_TCP + 20));
	sum = bpf_csum_diff(0, 0, p->v6 ? (void *)p->source : (void *)(p->source + 12), p->v6 ? 16 : 4, (__u32)sum);
	sum = bpf_csum_diff(0, 0, p->v6 ? (void *)p->destination : (void *)(p->destination + 12), p->v6 ? 16 : 4, (__u32)sum);
	tcp[4] = fold(sum);
	if (bpf_skb_store_bytes(skb, transport, tcp, sizeof(tcp), 0))
		return -1;

	if (p->v6) {
		__u16 length = be16(p->transport - sizeof(struct ipv6hdr) + 20);
		return bpf_skb_store_bytes(skb, network + 4, &length, 2, 0) ||
		       bpf_skb_store_bytes(skb, network + 8, p->destination, 16, 0) ||
		       bpf_skb_store_bytes(skb, network + 24, p->source, 16, 0);
	}
	__u16 before, length = be16(p->transport + 20);
	return bpf_skb_load_bytes(skb, network + 2, &before, 2) || bpf_skb_store_bytes(skb, network + 2, &length, 2, 0) ||
	       bpf_l3_csum_replace(skb, network + 10, before, length, 2) ||
	       bpf_skb_store_bytes(skb, network + 12, p->destination + 12, 4, 0) ||
	       bpf_skb_store_bytes(skb, network + 16, p->source + 12, 4, 0);
}

#define ICMP_UNREACHABLE 3
#define ICMP_NO_PORT 3
/* What an error quotes: a header without options, and the first eight bytes of what it carries. */
#define QUOTED 28

/* Turns a datagram of IPv4 into the answer that nobody listens there. Non-zero if that is not possible: it is to be dropped. */
INLINE long into_unreachable(struct __sk_buff *skb, struct packet *p)
{
	struct {
		__u16 version_and_service, length, id, fragment;
		__u16 ttl_and_protocol, sum;
		__u32 source, destination;
		__u8 type, code;
		__u16 icmp_sum;
		__u32 unused;
	} head = {};
	__u32 quoted[QUOTED / 4];
	if (p->v6 || p->transport != 20 || bpf_skb_change_tail(skb, ETH_HLEN + QUOTED, 0) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, quoted, sizeof(quoted)) ||
	    bpf_skb_adjust_room(skb, sizeof(head), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	head.version_and_service = 0x45;
	head.length = be16(sizeof(head) + QUOTED);
	head.ttl_and_protocol = 64 | IPPROTO_ICMP << 8;
	head.source = *(__u32 *)(p->destination + 12);
	head.destination = *(__u32 *)(p->source + 12);
	head.sum = fold(bpf_csum_diff(0, 0, &head, 20, 0));
	head.type = ICMP_UNREACHABLE;
	head.code = ICMP_NO_PORT;
	__s64 sum = bpf_csum_diff(0, 0, quoted, sizeof(quoted), 0);
	head.icmp_sum = fold(bpf_csum_diff(0, 0, &head.type, 8, (__u32)sum));
	return bpf_skb_store_bytes(skb, ETH_HLEN, &head, sizeof(head), 0);
}
