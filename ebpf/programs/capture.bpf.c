/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Capture of a pod's traffic without netfilter.
 *
 * sockets   chooses the socket of a new connection or a query: ztunnel's, whatever its headers look like, since the kernel
 *           has read them by then, and for the last packet of a handshake with a SYN cookie too
 * arriving  on devices: marks what comes from outside; looks for ztunnel's listeners; refuses what would reach another one
 * leaving   on devices: refuses what should have been captured
 * inside    on the loopback device: tells the two sides of ztunnel apart; answers for a ztunnel that isn't there
 *
 * Every program decides alone; none relies on another having run. What can't be decided is dropped.
 */
#include "verdicts.h"

#define LOOPBACK 1
#define NETNS BPF_F_CURRENT_NETNS
#define LISTENING 10 /* TCP_LISTEN */

/* Hashes, since their values are replaced as a whole. The lists are there twice: of both halves the settings name one. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct Settings);
	__uint(pinning, PIN_BY_NAME);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct PortSets);
	__uint(pinning, PIN_BY_NAME);
} ports SEC(".maps");

struct range_key {
	__u32 bits;
	struct Range range;
} __attribute__((packed));

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, RANGES_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range_key);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} ranges SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Interface);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} interfaces SEC(".maps");

/* The pod's own addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Address);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} own SEC(".maps");

/* Connections whose packets are answered with resets. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENTRIES_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Connection);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} refused SEC(".maps");

/* Connections that ztunnel makes to the pod, from the device that sees them to the choice of a socket. Each processor has its own
 * list of the least recently used: however few entries there are, none takes another's place that is on its way. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(map_flags, BPF_F_NO_COMMON_LRU);
	__uint(max_entries, DELIVERED_LIMIT);
	__type(key, struct Connection);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} delivered SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, LISTENERS);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, PIN_BY_NAME);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, PIN_BY_NAME);
} counters SEC(".maps");

INLINE void count(__u32 which)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &which);
	if (counter)
		*counter += 1;
}

INLINE const struct Settings *current(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&settings, &zero);
}

INLINE int is_v4(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;
	return words[0] == 0 && words[1] == 0 && words[2] == be32(0xffff);
}

INLINE int same(const __u8 *a, const __u8 *b)
{
	const __u32 *x = (const __u32 *)a, *y = (const __u32 *)b;
	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

INLINE int is_loopback(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;
	if (is_v4(address))
		return address[12] == 127;
	return words[0] == 0 && words[1] == 0 && words[2] == 0 && words[3] == be32(1);
}

/* Whether an address is the pod's. */
INLINE int is_own(const __u8 *address)
{
	return is_loopback(address) || bpf_map_lookup_elem(&own, address) != 0;
}

/* What is said of an interface. */
INLINE __u32 kind_of(const struct Settings *s, __u32 interface)
{
	struct Interface key = { .half = s->half, .index = interface };
	const __u32 *kind = bpf_map_lookup_elem(&interfaces, &key);
	return kind ? *kind : 0;
}

INLINE const struct PortSets *sets_of(const struct Settings *s)
{
	__u32 half = s->half;
	return bpf_map_lookup_elem(&ports, &half);
}

#define HAS(set, port) (set[((port) >> 5) & (PORT_WORDS - 1)] & (1u << ((port)&31)))

INLINE int in_range(const struct Settings *s, __u8 list, const __u8 *address)
{
	__u8 v6 = is_v4(address) ? 0 : RANGE_V6;
	struct range_key key = { .bits = 8 + 128, .range = { .list = list | (__u8)(s->half << 1) | v6 } };
	__builtin_memcpy(key.range.network, address, 16);
	return bpf_map_lookup_elem(&ranges, &key) != 0;
}

/* Whether ztunnel alone listens there, and which of its listeners. */
INLINE int own_port(const struct Settings *s, __u32 port, __u32 *listener)
{
	if (port == s->outbound)
		*listener = LISTENER_OUTBOUND;
	else if (port == s->plaintext)
		*listener = LISTENER_PLAINTEXT;
	else if (port == s->hbone)
		*listener = LISTENER_HBONE;
	else if (port == s->dns)
		*listener = LISTENER_DNS_TCP;
	else
		return 0;
	return 1;
}

/* The listener for a new connection from outside; 0 if it is none of ztunnel's business. */
INLINE int for_arriving(const struct Settings *s, __u32 interface, const __u8 *from, __u32 port, __u32 *listener)
{
	__u32 kind = kind_of(s, interface);
	const struct PortSets *sets = sets_of(s);
	if (!sets) {
		*listener = LISTENER_PLAINTEXT;
		return 1;
	}
	if (kind & INTERFACE_VIRTUAL) {
		*listener = LISTENER_OUTBOUND;
		return 1;
	}
	if (kind & INTERFACE_EXCLUDED || s->flags & BYPASS_INBOUND || port == s->hbone ||
	    HAS(sets->inbound_excluded, port) ||
	    (s->flags & WITH_PROBES && (same(from, s->probe4) || same(from, s->probe6))) ||
	    (s->flags & ONLY_INBOUND_PORTS && !HAS(sets->inbound_included, port)))
		return own_port(s, port, listener);
	*listener = LISTENER_PLAINTEXT;
	return 1;
}

/* Whether a running pod is being enrolled, or leaves: what began before is not known yet. */
INLINE int is_changing(const struct Settings *s)
{
	return s->changing_until && bpf_ktime_get_ns() < s->changing_until;
}

/* Whether a new connection that leaves by a device should have been captured. */
INLINE int for_leaving(const struct Settings *s, __u32 interface, const __u8 *to, __u32 port)
{
	__u32 kind = kind_of(s, interface);
	const struct PortSets *sets = sets_of(s);
	if (!sets)
		return 1;
	if (kind & INTERFACE_EXCLUDED)
		return 0;
	if (s->flags & WITH_DNS && port == 53)
		return 1;
	if (HAS(sets->outbound_excluded, port))
		return 0;
	if (HAS(sets->outbound_included, port))
		return 1;
	if (in_range(s, RANGE_EXCLUDED, to))
		return 0;
	return !(s->flags & ONLY_OUTBOUND_RANGES) || in_range(s, RANGE_INCLUDED, to);
}

/* ---- the choice of a socket ---- */

/* Keeps clang from reading two fields of the context by one pointer, which the verifier doesn't allow. */
#define APART(value) __asm__ volatile("" : "+r"(value))

/* Counts nothing: the guards ask too. */
INLINE int choose(struct bpf_sk_lookup *ctx, __u32 listener)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &listener);
	if (!sk)
		return SK_DROP;
	long error = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE);
	bpf_sk_release(sk);
	return error ? SK_DROP : SK_PASS;
}

/* Whether it is the connection that inside() has just seen ztunnel make. It counts once. */
INLINE int is_delivered(struct bpf_sk_lookup *ctx, const __u8 *local, const __u8 *remote)
{
	struct Connection key = {};
	__builtin_memcpy(key.local, local, 16);
	__builtin_memcpy(key.peer, remote, 16);
	key.local_port = (__u16)ctx->local_port;
	key.peer_port = be16(ctx->remote_port);
	return bpf_map_delete_elem(&delivered, &key) == 0;
}

/* Whether a verdict gives the connection to the application: the device has let no packet of it by that was not let through. */
INLINE int is_granted(__u32 interface, const __u8 *local, __u16 port, const __u8 *remote)
{
	const struct Control *c = in_use();
	const struct VerdictEntry *v = c ? verdict(remote, local, port) : 0;
	return v && v->inside == interface && is_live(c, v);
}

SEC("sk_lookup")
int sockets(struct bpf_sk_lookup *ctx)
{
	const struct Settings *s = current();
	if (!s || !(s->flags & CAPTURING))
		return SK_PASS;
	__u8 local[16], remote[16];
	if (ctx->family == 2) {
		__u32 local4 = ctx->local_ip4, remote4 = ctx->remote_ip4;
		APART(local4);
		APART(remote4);
		mapped(local, local4);
		mapped(remote, remote4);
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			__u32 local6 = ctx->local_ip6[i], remote6 = ctx->remote_ip6[i];
			APART(local6);
			APART(remote6);
			((__u32 *)local)[i] = local6;
			((__u32 *)remote)[i] = remote6;
		}
	}
	__u32 port = ctx->local_port, listener = 0, interface = ctx->ingress_ifindex;
	int to_own_port = own_port(s, port, &listener);
	/* Our own search for ztunnel's listeners, see find(). It reaches no other port. */
	if (to_own_port && !ctx->remote_port && is_loopback(local) && is_loopback(remote))
		return SK_PASS;
	if (ctx->protocol == IPPROTO_UDP) {
		if (!(s->flags & WITH_DNS))
			return SK_PASS;
		if (interface == LOOPBACK && port == 53 && !is_own(local))
			return choose(ctx, LISTENER_DNS_UDP);
		return interface != LOOPBACK && port == s->dns ? SK_DROP : SK_PASS;
	}
	/* Only what our rules send there comes to another's address on the loopback device. */
	if (interface == LOOPBACK && !is_own(local) && !same(local, remote)) {
		listener = s->flags & WITH_DNS && port == 53 ? LISTENER_DNS_TCP : LISTENER_OUTBOUND;
		return choose(ctx, listener);
	}
	/* To an own address, the kernel names the interface that has it, also for what never left the pod
	 * (net/ipv4/route.c, rt_iif; net/ipv6/ip6_input.c): who sends tells the two apart. */
	if (interface == LOOPBACK || is_own(remote) || same(local, remote) || is_delivered(ctx, local, remote))
		return to_own_port ? choose(ctx, listener) : SK_PASS;
	if (!to_own_port && is_granted(interface, local, (__u16)port, remote))
		return SK_PASS;
	if (!for_arriving(s, interface, remote, port, &listener)) {
		if (is_own(local))
			return SK_PASS;
		/* The guards don't ask for these. */
		count(COUNT_NOT_THE_PODS);
		return SK_DROP;
	}
	return choose(ctx, listener);
}

/* ---- what devices see ---- */

INLINE int is_known(__u32 listener)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &listener);
	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/* Puts a listener of ztunnel's into the map if it isn't there: the kernel takes it out when it closes. Whether it is there. */
INLINE int find(struct __sk_buff *skb, __u32 listener, __u16 port)
{
	int found = 0;
	struct bpf_sock *sk;
	if (is_known(listener))
		return 1;
	struct bpf_sock_tuple tuple = {};
	tuple.ipv4.saddr = be32(0x7f000001);
	tuple.ipv4.daddr = be32(0x7f000001);
	tuple.ipv4.dport = be16(port);
	int udp = listener == LISTENER_DNS_UDP;
	if (udp)
		sk = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), NETNS, 0);
	else
		sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), NETNS, 0);
	if (!sk)
		return 0;
	if ((sk->mark & MARK_MASK) == MARK_ZTUNNEL && (udp || sk->state == LISTENING))
		found = !bpf_map_update_elem(&listeners, &listener, sk, BPF_ANY);
	bpf_sk_release(sk);
	return found;
}

INLINE void find_all(struct __sk_buff *skb, const struct Settings *s)
{
	find(skb, LISTENER_OUTBOUND, s->outbound);
	find(skb, LISTENER_PLAINTEXT, s->plaintext);
	find(skb, LISTENER_HBONE, s->hbone);
	find(skb, LISTENER_DNS_TCP, s->dns);
}

/* The socket that a packet will meet; to be released. */
INLINE struct bpf_sock *find_socket(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size;
	if (p->v6) {
		__builtin_memcpy(tuple.ipv6.saddr, p->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, p->destination, 16);
		tuple.ipv6.sport = be16(p->source_port);
		tuple.ipv6.dport = be16(p->destination_port);
		size = sizeof(tuple.ipv6);
	} else {
		tuple.ipv4.saddr = *(__u32 *)(p->source + 12);
		tuple.ipv4.daddr = *(__u32 *)(p->destination + 12);
		tuple.ipv4.sport = be16(p->source_port);
		tuple.ipv4.dport = be16(p->destination_port);
		size = sizeof(tuple.ipv4);
	}
	return bpf_skc_lookup_tcp(skb, &tuple, size, NETNS, 0);
}

/* Whether a packet that opens a connection will meet another listener than ztunnel's: nobody is 1 too if `nobody` says so. */
INLINE int astray(struct __sk_buff *skb, struct packet *p, int nobody)
{
	struct bpf_sock *sk = find_socket(skb, p);
	if (!sk)
		return nobody;
	int wrong = 0;
	if (sk->state == LISTENING) {
		struct bpf_sock *full = bpf_sk_fullsock(sk);
		wrong = !full || (full->mark & MARK_MASK) != MARK_ZTUNNEL;
	}
	bpf_sk_release(sk);
	return wrong;
}

INLINE void connection(struct Connection *key, const struct packet *p, int leaving)
{
	__builtin_memcpy(key->local, leaving ? p->source : p->destination, 16);
	__builtin_memcpy(key->peer, leaving ? p->destination : p->source, 16);
	key->local_port = leaving ? p->source_port : p->destination_port;
	key->peer_port = leaving ? p->destination_port : p->source_port;
}

INLINE int is_refused(const struct Settings *s, const struct packet *p, int leaving)
{
	if (!(s->flags & WITH_REFUSED) || p->flags & TCP_RST)
		return 0;
	struct Connection key;
	connection(&key, p, leaving);
	return bpf_map_lookup_elem(&refused, &key) != 0;
}

INLINE void mark(struct __sk_buff *skb, __u32 value)
{
	skb->mark = (skb->mark & ~MARK_MASK) | value;
}

/* What a packet is to the verdicts. */
enum proof { NOT_THEIRS, PROVEN, UNPROVEN };

/* By the mark with which it came. The node's programs have read the same headers. */
INLINE enum proof proof_of(enum reading reading, const struct packet *p, __u32 came_with)
{
	if (is_odd(reading, p))
		return in_use() && are_neighbours(p) ? UNPROVEN : NOT_THEIRS;
	if (reading != READ || p->protocol != IPPROTO_TCP)
		return NOT_THEIRS;
	if (came_with == MARK_GRANTED || came_with == MARK_ANSWERED)
		return PROVEN;
	return in_use() && (asking(p) || answering(p)) ? UNPROVEN : NOT_THEIRS;
}

/* Whether a packet belongs to a connection that no verdict was asked for: one that was alive at enrolment, by a service's address
 * that the node turns into the pod's, or one of ztunnel's. */
INLINE int is_anothers(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_sock *sk = opens(p) ? 0 : find_socket(skb, p);
	if (!sk)
		return 0;
	struct bpf_sock *full = bpf_sk_fullsock(sk);
	int anothers = full && full->state != LISTENING && (full->mark & MARK_MASK) != MARK_GRANTED;
	bpf_sk_release(sk);
	return anothers;
}

/* Whether the settings are others by now: a socket that is astray by the old ones may be the right one. */
INLINE int replaced(const struct Settings *s)
{
	return current() != s;
}

SEC("classifier")
int arriving(struct __sk_buff *skb)
{
	const struct Settings *s = current();
	if (!s)
		return TC_ACT_SHOT;
	__u32 came_with = skb->mark & MARK_MASK;
	mark(skb, MARK_DIRECT);
	if (!(s->flags & (CAPTURING | WITH_REFUSED)))
		return TC_ACT_UNSPEC;
	if (s->flags & CAPTURING && is_tagged(skb) && in_use()) {
		count(COUNT_UNREADABLE);
		return TC_ACT_SHOT;
	}
	struct packet p;
	__u32 listener;
	enum reading reading = read_packet(skb, &p);
	enum proof proof = s->flags & CAPTURING ? proof_of(reading, &p, came_with) : NOT_THEIRS;
	if (proof == UNPROVEN && (is_odd(reading, &p) || !is_anothers(skb, &p))) {
		count(COUNT_UNPROVEN);
		return TC_ACT_SHOT;
	}
	switch (reading) {
	case OTHER:
		return TC_ACT_UNSPEC;
	case UNREADABLE:
		/* The kernel may read it: the choice of a socket doesn't depend on us. */
		if (s->flags & CAPTURING)
			find_all(skb, s);
		return TC_ACT_UNSPEC;
	case READ:
		break;
	}
	if (p.protocol == IPPROTO_UDP) {
		if (!(s->flags & WITH_DNS) || p.destination_port != s->dns)
			return TC_ACT_UNSPEC;
		/* The proxy answers the pod, not the world. */
		count(COUNT_DNS_OUTSIDE);
		return TC_ACT_SHOT;
	}
	if (is_refused(s, &p, 0)) {
		count(COUNT_REFUSED);
		return into_reset(skb, &p) ? TC_ACT_SHOT : bpf_redirect(skb->ifindex, 0);
	}
	if (proof == PROVEN && came_with == MARK_GRANTED)
		mark(skb, MARK_GRANTED);
	if (!(s->flags & CAPTURING) || !opens(&p))
		return TC_ACT_UNSPEC;
	/* The choice of a socket comes to the same, at once. If it doesn't, the listeners are looked for when it is sent again. */
	if (proof == PROVEN && is_granted(skb->ifindex, p.destination, p.destination_port, p.source)) {
		count(COUNT_GRANTED);
		return TC_ACT_UNSPEC;
	}
	find_all(skb, s);
	struct Connection key;
	connection(&key, &p, 0);
	bpf_map_delete_elem(&delivered, &key);
	if (!for_arriving(s, skb->ifindex, p.source, p.destination_port, &listener))
		return TC_ACT_UNSPEC;
	if (astray(skb, &p, 0)) {
		if (replaced(s)) {
			count(COUNT_UNDECIDED);
			return TC_ACT_SHOT;
		}
		count(COUNT_ESCAPED_INBOUND);
		return into_reset(skb, &p) ? TC_ACT_SHOT : bpf_redirect(skb->ifindex, 0);
	}
	if (!is_known(listener))
		count(COUNT_NO_LISTENER);
	else if (listener != LISTENER_HBONE)
		count(listener == LISTENER_OUTBOUND ? COUNT_OUTBOUND : COUNT_INBOUND);
	return TC_ACT_UNSPEC;
}

/* Whether a verdict lets a connection that leaves by. */
INLINE int is_promised(const struct packet *p)
{
	const struct Control *c = in_use();
	const struct VerdictEntry *v = c ? asking(p) : 0;
	return v && is_live(c, v);
}

/* Answers the pod with a reset, which comes in by the device that the packet would have left by: it is ours, not another pod's. */
INLINE int refuse(struct __sk_buff *skb, struct packet *p)
{
	if (into_reset(skb, p))
		return TC_ACT_SHOT;
	mark(skb, MARK_ANSWERED);
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

SEC("classifier")
int leaving(struct __sk_buff *skb)
{
	const struct Settings *s = current();
	if (!s)
		return TC_ACT_SHOT;
	int direct = (skb->mark & MARK_DIRECT_MASK) == MARK_DIRECT;
	/* Nothing of ours opens a connection with the mark of what came from outside or was alive at enrolment: a socket that
	 * has it was taken apart, connect(AF_UNSPEC), and used again. With that of a verdict there has to be one. */
	int used_again = direct && (skb->mark & MARK_MASK) != MARK_ZTUNNEL && s->flags & CAPTURING;
	if (direct && !used_again && !(s->flags & WITH_REFUSED))
		return TC_ACT_UNSPEC;
	struct packet p;
	switch (read_packet(skb, &p)) {
	case OTHER:
		if (!(s->flags & CAPTURING) || (skb->mark & MARK_MASK) == MARK_ZTUNNEL || !is_tagged(skb) || !in_use())
			return TC_ACT_UNSPEC;
		count(COUNT_UNREADABLE);
		return TC_ACT_SHOT;
	case UNREADABLE:
		if (direct || !(s->flags & CAPTURING))
			return TC_ACT_UNSPEC;
		count(COUNT_UNREADABLE);
		return TC_ACT_SHOT;
	case READ:
		break;
	}
	if (p.protocol == IPPROTO_TCP && is_refused(s, &p, 1)) {
		count(COUNT_REFUSED);
		return refuse(skb, &p);
	}
	if (direct && !(used_again && p.protocol == IPPROTO_TCP && opens(&p)))
		return TC_ACT_UNSPEC;
	if (direct && (skb->mark & MARK_MASK) == MARK_GRANTED && is_promised(&p))
		return TC_ACT_UNSPEC;
	if (p.protocol == IPPROTO_TCP && (skb->mark & MARK_MASK) == MARK_REPLY) {
		count(COUNT_ASTRAY);
		return TC_ACT_SHOT;
	}
	if (!(s->flags & CAPTURING))
		return TC_ACT_UNSPEC;
	if (p.protocol == IPPROTO_UDP) {
		if (!(s->flags & WITH_DNS) || p.destination_port != 53 || !for_leaving(s, skb->ifindex, p.destination, 53))
			return TC_ACT_UNSPEC;
		/* Nobody sends a query again soon. */
		if (is_changing(s))
			return TC_ACT_UNSPEC;
		count(COUNT_ESCAPED_OUTBOUND);
		return TC_ACT_SHOT;
	}
	if (!for_leaving(s, skb->ifindex, p.destination, p.destination_port))
		return TC_ACT_UNSPEC;
	if (!opens(&p)) {
		/* While the pod comes or leaves also of one that has no mark yet: it is sent again. */
		count(COUNT_UNKNOWN);
		return TC_ACT_SHOT;
	}
	if (is_changing(s))
		return TC_ACT_UNSPEC;
	count(COUNT_ESCAPED_OUTBOUND);
	return refuse(skb, &p);
}

/* Whether a packet that opens nothing meets no socket but a listener. */
INLINE int meets_nobody(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_sock *sk = find_socket(skb, p);
	if (!sk)
		return 1;
	int listening = sk->state == LISTENING;
	bpf_sk_release(sk);
	return listening;
}

/* Whether a packet without data meets no socket but a listener. */
INLINE int ends_handshake(struct __sk_buff *skb, struct packet *p)
{
	if ((p->flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK || skb->len > ETH_HLEN + p->transport + 60)
		return 0;
	return meets_nobody(skb, p);
}

/* From ztunnel to the pod: a connection to the application, or an answer of the DNS proxy, which leaves from the port that was
 * asked. Zero if it may go on. */
INLINE int from_ztunnel(struct __sk_buff *skb, const struct Settings *s)
{
	struct packet p;
	if (read_packet(skb, &p) != READ)
		return 0;
	if (p.protocol == IPPROTO_TCP) {
		__u32 one = 1;
		struct Connection key;
		/* The kernel asks for the socket again by the last packet of a handshake that had a cookie. */
		if (!opens(&p) && !ends_handshake(skb, &p))
			return 0;
		/* It is here for one reason: the address is the pod's. */
		if (!is_own(p.destination))
			bpf_map_update_elem(&own, p.destination, &one, BPF_ANY);
		connection(&key, &p, 0);
		/* Unknown, it would be captured again, and again. */
		return bpf_map_update_elem(&delivered, &key, &one, BPF_ANY) != 0;
	}
	if (!(s->flags & WITH_DNS) || p.source_port != s->dns || is_own(p.source))
		return 0;
	__u32 transport = ETH_HLEN + p.transport;
	__u16 from = be16(s->dns), to = be16(53), sum = 0;
	if (bpf_skb_load_bytes(skb, transport + 6, &sum, 2))
		return -1;
	if (sum)
		bpf_l4_csum_replace(skb, transport + 6, from, to, 2 | BPF_F_MARK_MANGLED_0);
	return bpf_skb_store_bytes(skb, transport, &to, 2, 0) != 0;
}

SEC("classifier")
int inside(struct __sk_buff *skb)
{
	const struct Settings *s = current();
	if (!s)
		return TC_ACT_SHOT;
	if ((skb->mark & MARK_MASK) == MARK_ZTUNNEL) {
		if (s->flags & CAPTURING && from_ztunnel(skb, s)) {
			count(COUNT_UNDELIVERED);
			return TC_ACT_SHOT;
		}
		/* What the application makes of it is not to carry ztunnel's mark. */
		mark(skb, MARK_REPLY);
		return TC_ACT_UNSPEC;
	}
	if (!(s->flags & CAPTURING))
		return TC_ACT_UNSPEC;
	struct packet p;
	switch (read_packet(skb, &p)) {
	case OTHER:
		return TC_ACT_UNSPEC;
	case UNREADABLE:
		find_all(skb, s);
		return TC_ACT_UNSPEC;
	case READ:
		break;
	}
	if (p.protocol == IPPROTO_UDP) {
		if (!(s->flags & WITH_DNS) || p.destination_port != 53 || is_own(p.destination))
			return TC_ACT_UNSPEC;
		/* For IPv4 the kernel makes no error that comes from an address which isn't the pod's. */
		if (find(skb, LISTENER_DNS_UDP, s->dns)) {
			count(COUNT_DNS);
			return TC_ACT_UNSPEC;
		}
		count(COUNT_NO_LISTENER);
		if (p.v6)
			return TC_ACT_UNSPEC;
		return into_unreachable(skb, &p) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	}
	if (!opens(&p)) {
		/* Of a connection that goes past ztunnel and has no mark yet: it is sent again, where a listener would end it. */
		if (is_changing(s) && !is_own(p.destination) && meets_nobody(skb, &p)) {
			count(COUNT_UNKNOWN);
			return TC_ACT_SHOT;
		}
		return TC_ACT_UNSPEC;
	}
	find_all(skb, s);
	if (is_own(p.destination) || same(p.source, p.destination))
		return TC_ACT_UNSPEC;
	/* The kernel sends no reset from an address that isn't the pod's. */
	if (astray(skb, &p, 1)) {
		if (replaced(s)) {
			count(COUNT_UNDECIDED);
			return TC_ACT_SHOT;
		}
		count(COUNT_NO_LISTENER);
		return into_reset(skb, &p) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	}
	count(COUNT_OUTBOUND);
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "GPL";
