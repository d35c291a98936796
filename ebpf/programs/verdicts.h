/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Verdicts: who may connect to what without a proxy, and when. The maps are one node's; the programs of its pods share them.
 * Only ztunnel writes them. What it says holds for as long as it renews the lease.
 */
#pragma once
#include "packet.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct Control);
	__uint(pinning, PIN_BY_NAME);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, VERDICTS_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct PairKey);
	__type(value, struct VerdictEntry);
	__uint(pinning, PIN_BY_NAME);
} verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, VERDICTS_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Neighbours);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} neighbours SEC(".maps");

/* None where nobody ever wrote a verdict. */
INLINE const struct Control *in_use(void)
{
	__u32 zero = 0;
	const struct Control *c = bpf_map_lookup_elem(&control, &zero);
	return c && c->owner ? c : 0;
}

INLINE int is_current(const struct Control *c, const struct VerdictEntry *v)
{
	return v->generation && v->generation >= c->oldest;
}

INLINE int is_leased(const struct Control *c)
{
	return bpf_ktime_get_coarse_ns() < c->until;
}

INLINE int is_live(const struct Control *c, const struct VerdictEntry *v)
{
	return is_current(c, v) && is_leased(c);
}

INLINE const struct VerdictEntry *verdict(const __u8 *source, const __u8 *destination, __u16 port)
{
	struct PairKey key = { .port = port };
	__builtin_memcpy(key.source, source, 16);
	__builtin_memcpy(key.destination, destination, 16);
	return bpf_map_lookup_elem(&verdicts, &key);
}

/* The verdict for a packet from a client. */
INLINE const struct VerdictEntry *asking(const struct packet *p)
{
	return verdict(p->source, p->destination, p->destination_port);
}

/* The verdict for a packet to one. */
INLINE const struct VerdictEntry *answering(const struct packet *p)
{
	return verdict(p->destination, p->source, p->source_port);
}

/* Whether there is a verdict between the two, for whichever port. */
INLINE int are_neighbours(const struct packet *p)
{
	struct Neighbours key;
	__builtin_memcpy(key.source, p->source, 16);
	__builtin_memcpy(key.destination, p->destination, 16);
	if (bpf_map_lookup_elem(&neighbours, &key))
		return 1;
	__builtin_memcpy(key.source, p->destination, 16);
	__builtin_memcpy(key.destination, p->source, 16);
	return bpf_map_lookup_elem(&neighbours, &key) != 0;
}

/* Whether it may be TCP that somebody reads otherwise than we do. */
INLINE int is_odd(enum reading reading, const struct packet *p)
{
	return reading == UNREADABLE || (reading == READ && p->protocol == IPPROTO_TCP && !p->plain);
}
