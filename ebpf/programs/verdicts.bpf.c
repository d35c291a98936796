/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Connections between two pods of a node that no proxy carries, where ztunnel's verdicts allow it.
 *
 * connect4, connect6     at the root of the cgroups: what a pod asks for becomes the endpoint, and the socket passes capture
 * peer_name4, peer_name6 there too: the socket's owner sees what it has asked for
 * watch                  there too: notes both ends of such a connection, and what they carried
 * from_pod               on the node's end of a pod's device: lets packets of a pair through into the other pod's, if they come
 *                        from the right device, the verdict is in force and there is a lease; drops them otherwise
 *
 * The other pod's own programs (capture.bpf.c) drop what is between the two and did not come by from_pod. So nothing passes
 * where any of these is missing.
 */
#include "verdicts.h"

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOL_SOCKET 1
#define SO_MARK 36
#define ALLOW 1
#define REFUSE 0
#define HOST 0 /* PACKET_HOST */
#define ESTABLISHED 1
#define FIN_WAIT2 5
#define CLOSED 7
#define CLOSE_WAIT 8
#define LAST_ACK 9
#define CLOSING 11

/* Keeps clang from reading two fields of the context by one pointer, which the verifier doesn't allow. */
#define APART(value) __asm__ volatile("" : "+r"(value))

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, OFFERS_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Dialled);
	__type(value, struct OfferEntry);
	__uint(pinning, PIN_BY_NAME);
} offers SEC(".maps");

/* Ends of connections, by their sockets' cookies. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CONNECTIONS_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct Record);
	__uint(pinning, PIN_BY_NAME);
} connections SEC(".maps");

/* How many there are, about: less than none, when user space has put it right while some ended. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, PIN_BY_NAME);
} open SEC(".maps");

/* Those that are over. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, ENDED_LIMIT);
	__type(value, struct Record);
	__uint(pinning, PIN_BY_NAME);
} ended SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TALLIES);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, PIN_BY_NAME);
} tallies SEC(".maps");

/* Of a socket that was let past capture, what it asked for. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct Asked);
	__uint(pinning, PIN_BY_NAME);
} asked SEC(".maps");

INLINE void tally(__u32 which)
{
	__u64 *counter = bpf_map_lookup_elem(&tallies, &which);
	if (counter)
		*counter += 1;
}

INLINE int is_same(const __u8 *a, const __u8 *b)
{
	const __u32 *x = (const __u32 *)a, *y = (const __u32 *)b;
	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

INLINE int is_unset(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;
	return words[3] == 0 && words[0] == 0 && words[1] == 0 && (words[2] == 0 || words[2] == be32(0xffff));
}

/* ---- on the node's end of a device ---- */

enum standing { NO_PAIR, ELSEWHERE, OLD, IN_FORCE };

/* What a verdict says of a packet from `device`, if it is the one that should send it. One pointer at a time: clang would put two
 * of them together, which the verifier doesn't allow. */
INLINE enum standing standing(const struct Control *c, const struct VerdictEntry *v, __u32 device, int back, __u32 *to)
{
	if (!v)
		return NO_PAIR;
	if ((back ? v->destination_device : v->source_device) != device)
		return ELSEWHERE;
	*to = back ? v->source_device : v->destination_device;
	return is_current(c, v) ? IN_FORCE : OLD;
}

SEC("classifier")
int from_pod(struct __sk_buff *skb)
{
	__u32 zero = 0, device = skb->ifindex, to = 0, mark = MARK_GRANTED;
	const struct Control *c = bpf_map_lookup_elem(&control, &zero);
	struct packet p;
	enum reading reading = read_packet(skb, &p);
	if (!c)
		return TC_ACT_SHOT;
	if (c->owner && is_tagged(skb)) {
		tally(TALLY_UNREADABLE);
		return TC_ACT_SHOT;
	}
	if (is_odd(reading, &p)) {
		if (!are_neighbours(&p))
			return TC_ACT_UNSPEC;
		tally(TALLY_UNREADABLE);
		return TC_ACT_SHOT;
	}
	if (reading != READ || p.protocol != IPPROTO_TCP)
		return TC_ACT_UNSPEC;
	enum standing found = standing(c, asking(&p), device, 0, &to);
	if (found != IN_FORCE) {
		enum standing back = standing(c, answering(&p), device, 1, &to);
		mark = MARK_ANSWERED;
		found = back > found ? back : found;
	}
	if (found == NO_PAIR)
		return TC_ACT_UNSPEC;
	if (found == ELSEWHERE) {
		tally(TALLY_SPOOFED);
		return TC_ACT_SHOT;
	}
	if (!is_leased(c)) {
		tally(TALLY_LAPSED);
		return TC_ACT_SHOT;
	}
	if (found == OLD) {
		tally(TALLY_STALE);
		return TC_ACT_SHOT;
	}
	/* Its address of Ethernet may be a gateway's. */
	bpf_skb_change_type(skb, HOST);
	skb->mark = mark;
	return bpf_redirect_peer(to, 0);
}

/* ---- at the root of the cgroups ---- */

struct way {
	__u8 address[16];
	__u16 port;
	__u16 binds;
};

/* Draws one of the endpoints by their weights. */
INLINE __u32 draw(const struct OfferEntry *offer, __u32 count)
{
	__u32 which = 0, last = count - 1;
	APART(last);
	__u64 point = ((__u64)bpf_get_prandom_u32() * offer->sums[last & (OFFER_ENDPOINTS - 1)]) >> 32;
#pragma unroll
	for (__u32 i = 0; i < OFFER_ENDPOINTS - 1; i++)
		if (i + 1 < count && point >= offer->sums[i])
			which = i + 1;
	return which;
}

/* One of the endpoints that are offered, if a verdict for it is in force. Another one is not taken in its place: what ztunnel does
 * with one that may not be connected to is for ztunnel to say. */
INLINE int choose(const struct OfferEntry *offer, const __u8 *bound, struct way *way)
{
	__u32 zero = 0, count = offer->count, which = 0;
	const struct Control *c = in_use();
	const __s64 *known = bpf_map_lookup_elem(&open, &zero);
	if (!c || !known || *known >= CONNECTIONS_ENOUGH || !count || count > OFFER_ENDPOINTS)
		return 0;
	if (!is_unset(bound) && !is_same(bound, offer->source))
		return 0;
	if (count > 1)
		which = draw(offer, count);
	/* clang knows that it is less; the verifier doesn't. */
	APART(which);
	which &= OFFER_ENDPOINTS - 1;
	__builtin_memcpy(way->address, offer->addresses[which], 16);
	way->port = offer->ports[which];
	way->binds = offer->flags & OFFER_BINDS && is_unset(bound);
	const struct VerdictEntry *v = verdict(offer->source, way->address, way->port);
	return v && is_live(c, v);
}

/* A socket may connect again (AF_UNSPEC): what it was granted is not for where it goes now. */
INLINE int take_back(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	if (!bpf_sk_storage_get(&asked, sk, 0, 0))
		return ALLOW;
	__u32 mark = sk->mark;
	if ((mark & MARK_MASK) == MARK_GRANTED) {
		mark &= ~MARK_MASK;
		if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
			return REFUSE;
	}
	bpf_sk_storage_delete(&asked, sk);
	return ALLOW;
}

/* Lets the socket past capture; ALLOW if it was. */
INLINE int grant(struct bpf_sock_addr *ctx, struct bpf_sock *sk, const struct Dialled *dialled)
{
	struct Asked was = { .port = dialled->port };
	__builtin_memcpy(was.address, dialled->address, 16);
	struct Asked *kept = bpf_sk_storage_get(&asked, sk, &was, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return REFUSE;
	*kept = was;
	__u32 mark = (sk->mark & ~MARK_MASK) | MARK_GRANTED;
	if (!bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return ALLOW;
	bpf_sk_storage_delete(&asked, sk);
	return REFUSE;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk || ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return ALLOW;
	struct Dialled dialled = { .netns = bpf_get_netns_cookie(ctx), .port = be16((__u16)ctx->user_port) };
	mapped(dialled.address, ctx->user_ip4);
	const struct OfferEntry *offer = bpf_map_lookup_elem(&offers, &dialled);
	if (!offer)
		return take_back(ctx, sk);
	__u8 bound[16];
	struct way way;
	mapped(bound, sk->src_ip4);
	if (sk->bound_dev_if || !choose(offer, bound, &way)) {
		tally(TALLY_DECLINED);
		return take_back(ctx, sk);
	}
	if (way.binds) {
		struct sockaddr_in {
			__u16 family, port;
			__u32 address;
			__u64 zero;
		} source = { .family = AF_INET, .address = ((const __u32 *)offer->source)[3] };
		if (bpf_bind(ctx, &source, sizeof(source)))
			return take_back(ctx, sk);
	}
	if (grant(ctx, sk, &dialled) != ALLOW)
		return take_back(ctx, sk);
	ctx->user_ip4 = ((const __u32 *)way.address)[3];
	ctx->user_port = be16(way.port);
	tally(TALLY_GRANTED);
	return ALLOW;
}

INLINE void asked6(__u8 *address, struct bpf_sock_addr *ctx)
{
	__u32 *words = (__u32 *)address;
	__u32 a = ctx->user_ip6[0], b = ctx->user_ip6[1], c = ctx->user_ip6[2], d = ctx->user_ip6[3];
	APART(a);
	APART(b);
	APART(c);
	APART(d);
	words[0] = a;
	words[1] = b;
	words[2] = c;
	words[3] = d;
}

INLINE void ask6(struct bpf_sock_addr *ctx, const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;
	ctx->user_ip6[0] = words[0];
	ctx->user_ip6[1] = words[1];
	ctx->user_ip6[2] = words[2];
	ctx->user_ip6[3] = words[3];
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk || ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return ALLOW;
	struct Dialled dialled = { .netns = bpf_get_netns_cookie(ctx), .port = be16((__u16)ctx->user_port) };
	asked6(dialled.address, ctx);
	const struct OfferEntry *offer = bpf_map_lookup_elem(&offers, &dialled);
	if (!offer)
		return take_back(ctx, sk);
	__u32 bound[4];
	struct way way;
	bound[0] = sk->src_ip6[0];
	bound[1] = sk->src_ip6[1];
	bound[2] = sk->src_ip6[2];
	bound[3] = sk->src_ip6[3];
	if (sk->bound_dev_if || !choose(offer, (const __u8 *)bound, &way)) {
		tally(TALLY_DECLINED);
		return take_back(ctx, sk);
	}
	if (way.binds) {
		struct sockaddr_in6 {
			__u16 family, port;
			__u32 flow;
			__u8 address[16];
			__u32 scope;
		} source = { .family = AF_INET6 };
		__builtin_memcpy(source.address, offer->source, 16);
		if (bpf_bind(ctx, &source, sizeof(source)))
			return take_back(ctx, sk);
	}
	if (grant(ctx, sk, &dialled) != ALLOW)
		return take_back(ctx, sk);
	ask6(ctx, way.address);
	ctx->user_port = be16(way.port);
	tally(TALLY_GRANTED);
	return ALLOW;
}

SEC("cgroup/getpeername4")
int peer_name4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct Asked *was = sk ? bpf_sk_storage_get(&asked, sk, 0, 0) : 0;
	if (was) {
		ctx->user_ip4 = ((const __u32 *)was->address)[3];
		ctx->user_port = be16(was->port);
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int peer_name6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct Asked *was = sk ? bpf_sk_storage_get(&asked, sk, 0, 0) : 0;
	if (was) {
		ask6(ctx, was->address);
		ctx->user_port = be16(was->port);
	}
	return ALLOW;
}

/* ---- what becomes of them ---- */

INLINE void ends_of(struct bpf_sock_ops *ctx, __u8 *local, __u8 *peer)
{
	if (ctx->family == AF_INET) {
		__u32 local4 = ctx->local_ip4, peer4 = ctx->remote_ip4;
		APART(local4);
		APART(peer4);
		mapped(local, local4);
		mapped(peer, peer4);
		return;
	}
#pragma unroll
	for (int i = 0; i < 4; i++) {
		__u32 local6 = ctx->local_ip6[i], peer6 = ctx->remote_ip6[i];
		APART(local6);
		APART(peer6);
		((__u32 *)local)[i] = local6;
		((__u32 *)peer)[i] = peer6;
	}
}

INLINE void begins(struct bpf_sock_ops *ctx, struct bpf_sock *sk, int side)
{
	__u32 zero = 0;
	__u64 one = 1, socket = bpf_get_socket_cookie(ctx);
	struct Record r = { .socket = socket, .side = side, .netns = bpf_get_netns_cookie(ctx) };
	__u16 local_port = (__u16)ctx->local_port, peer_port = (__u16)be32(ctx->remote_port);
	if (side == SIDE_SOURCE) {
		struct Asked *was = bpf_sk_storage_get(&asked, sk, 0, 0);
		if (!was)
			return;
		ends_of(ctx, r.source, r.destination);
		r.source_port = local_port;
		r.destination_port = peer_port;
		if (was->port != peer_port || !is_same(was->address, r.destination)) {
			__builtin_memcpy(r.asked, was->address, 16);
			r.asked_port = was->port;
		}
	} else {
		ends_of(ctx, r.destination, r.source);
		r.destination_port = local_port;
		r.source_port = peer_port;
		r.established = 1;
		r.before = ctx->bytes_acked;
	}
	const struct VerdictEntry *v = verdict(r.source, r.destination, r.destination_port);
	if (!v || (side == SIDE_DESTINATION && v->destination_netns != r.netns))
		return;
	r.id = v->id;
	r.opened = bpf_ktime_get_ns();
	bpf_sock_ops_cb_flags_set(ctx, (int)ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (bpf_map_update_elem(&connections, &socket, &r, BPF_NOEXIST)) {
		tally(TALLY_UNRECORDED);
		return;
	}
	__u64 *known = bpf_map_lookup_elem(&open, &zero);
	if (known)
		__sync_fetch_and_add(known, one);
}

INLINE void changes(struct bpf_sock_ops *ctx)
{
	__u32 zero = 0, from = ctx->args[0], to = ctx->args[1];
	__u64 socket = bpf_get_socket_cookie(ctx);
	struct Record *r = bpf_map_lookup_elem(&connections, &socket);
	if (!r)
		return;
	if (to == FIN_WAIT2)
		r->half = ctx->bytes_received;
	if (to != CLOSED)
		return;
	__u64 sent = ctx->bytes_acked, received = ctx->bytes_received;
	/* The kernel counts the first and the last packet of each direction as a byte. */
	int acknowledged = ctx->snd_una == ctx->snd_nxt;
	__u64 finished = r->before + (from == FIN_WAIT2 || ((from == LAST_ACK || from == CLOSING) && acknowledged));
	__u64 heard = from == CLOSE_WAIT || from == LAST_ACK || from == CLOSING || (from == FIN_WAIT2 && received > r->half);
	r->sent = sent > finished ? sent - finished : 0;
	r->received = received > heard ? received - heard : 0;
	r->closed = bpf_ktime_get_ns();
	/* Without room among those it stays here. */
	if (bpf_map_push_elem(&ended, r, 0) || bpf_map_delete_elem(&connections, &socket))
		return;
	__u64 *known = bpf_map_lookup_elem(&open, &zero);
	if (known)
		__sync_fetch_and_sub(known, 1);
}

SEC("sockops")
int watch(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u32 what = ctx->op;
	if (!sk || !ctx->is_fullsock)
		return ALLOW;
	if (what == BPF_SOCK_OPS_STATE_CB) {
		changes(ctx);
		return ALLOW;
	}
	if (what != BPF_SOCK_OPS_TCP_CONNECT_CB && what != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    what != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return ALLOW;
	if ((sk->mark & MARK_MASK) != MARK_GRANTED)
		return ALLOW;
	if (what == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
		__u64 socket = bpf_get_socket_cookie(ctx);
		struct Record *r = bpf_map_lookup_elem(&connections, &socket);
		if (r) {
			r->established = 1;
			r->before = ctx->bytes_acked;
		}
		return ALLOW;
	}
	begins(ctx, sk, what == BPF_SOCK_OPS_TCP_CONNECT_CB ? SIDE_SOURCE : SIDE_DESTINATION);
	return ALLOW;
}

char _license[] SEC("license") = "GPL";
