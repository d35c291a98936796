/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* The experiment of docs/same-node.md: whether a connection may pass between two pods without a proxy. IPv4 only. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define SOL_SOCKET 1
#define SO_MARK 36
#define TCX_PASS 0
#define TCX_NEXT -1
#define TCX_DROP 2
#define PAST_CAPTURE 0x538 /* the pod's own routes are for this mark */
#define VERIFIED_SOURCE 0x77 /* on the host's end alone: it does not cross a veth */

struct pair {
	__u32 src, dst;
	__u16 port, zero;
};
struct address {
	__u32 ip;
	__u16 port, zero;
};
struct dialled {
	__u64 netns;
	struct address to;
};

#define MAP(name, kind, most, k, v)                                                                                    \
	struct {                                                                                                       \
		__uint(type, kind);                                                                                    \
		__uint(max_entries, most);                                                                             \
		__type(key, k);                                                                                        \
		__type(value, v);                                                                                      \
	} name SEC(".maps")
MAP(services, BPF_MAP_TYPE_HASH, 64, struct dialled, struct address);
MAP(verdicts, BPF_MAP_TYPE_HASH, 64, struct pair, __u32);
MAP(generation, BPF_MAP_TYPE_ARRAY, 1, __u32, __u32);
MAP(lease, BPF_MAP_TYPE_ARRAY, 1, __u32, __u64);
MAP(own, BPF_MAP_TYPE_HASH, 64, __u32, __u32); /* a pod's address, by the host's end of its device */
MAP(open, BPF_MAP_TYPE_LRU_HASH, 1024, __u64, __u64);
MAP(counts, BPF_MAP_TYPE_ARRAY, 16, __u32, __u64);
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct address);
} translated SEC(".maps");

/* In the order of run.py. */
enum { REWRITTEN, PEER_ASKED, SPOOFED, VERIFIED, STALE, EXPIRED, DELIVERED, UNVERIFIED, OPENED, CLOSED, BYTES };

static __always_inline void count(__u32 what, __u64 by)
{
	__u64 *number = bpf_map_lookup_elem(&counts, &what);
	if (number)
		__sync_fetch_and_add(number, by);
}

/* A service's address becomes the endpoint's, for the namespaces that have it; the socket may pass capture then. */
SEC("cgroup/connect4")
int translate(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk || ctx->protocol != 6)
		return 1;
	struct address was = { .ip = ctx->user_ip4, .port = (__u16)ctx->user_port };
	struct dialled key = { .netns = bpf_get_netns_cookie(ctx), .to = was };
	struct address *to = bpf_map_lookup_elem(&services, &key);
	__u32 mark = to ? PAST_CAPTURE : 0;
	/* A socket may connect again (AF_UNSPEC): what it was allowed is not for where it goes now. */
	if (!to && !bpf_sk_storage_get(&translated, sk, 0, 0))
		return 1;
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return 0;
	if (!to) {
		bpf_sk_storage_delete(&translated, sk);
		return 1;
	}
	struct address *kept = bpf_sk_storage_get(&translated, sk, &was, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return 0;
	*kept = was;
	ctx->user_ip4 = to->ip;
	ctx->user_port = to->port;
	count(REWRITTEN, 1);
	return 1;
}

SEC("cgroup/getpeername4")
int peer_name(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct address *was = sk ? bpf_sk_storage_get(&translated, sk, 0, 0) : 0;
	if (!was)
		return 1;
	ctx->user_ip4 = was->ip;
	ctx->user_port = was->port;
	count(PEER_ASKED, 1);
	return 1;
}

static __always_inline int read_pair(struct __sk_buff *skb, struct pair *pair)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct tcphdr *tcp = (void *)(ip + 1);
	if ((void *)(tcp + 1) > end || eth->h_proto != bpf_htons(0x0800) || ip->protocol != 6 || ip->ihl != 5)
		return 0;
	*pair = (struct pair){ .src = ip->saddr, .dst = ip->daddr, .port = tcp->dest };
	return 1;
}

/* On the host's end, where a pod's packets come from: whoever sends with another's address is stopped, and what goes to
 * a pair with a verdict of this generation, within the lease, is marked. */
SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	struct pair pair;
	__u32 device = skb->ifindex, zero = 0;
	if (!read_pair(skb, &pair))
		return TCX_NEXT;
	__u32 *ip = bpf_map_lookup_elem(&own, &device);
	if (!ip || *ip != pair.src) {
		count(SPOOFED, 1);
		return TCX_DROP;
	}
	__u32 *verdict = bpf_map_lookup_elem(&verdicts, &pair), *now = bpf_map_lookup_elem(&generation, &zero);
	__u64 *until = bpf_map_lookup_elem(&lease, &zero);
	if (!verdict || !now || !until)
		return TCX_NEXT;
	if (*verdict != *now) {
		count(STALE, 1);
		return TCX_DROP;
	}
	if (bpf_ktime_get_ns() > *until) {
		count(EXPIRED, 1);
		return TCX_DROP;
	}
	skb->mark = VERIFIED_SOURCE;
	count(VERIFIED, 1);
	return TCX_NEXT;
}

/* On the host's end, where packets go to a pod: what claims to be of a pair must have come from there. */
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	struct pair pair;
	if (!read_pair(skb, &pair) || !bpf_map_lookup_elem(&verdicts, &pair))
		return TCX_NEXT;
	if (skb->mark != VERIFIED_SOURCE) {
		count(UNVERIFIED, 1);
		return TCX_DROP;
	}
	count(DELIVERED, 1);
	return TCX_NEXT;
}

/* Which end it is that accepts (port 8080 of 10.77.0.3), and what it has received when it is over. */
SEC("raw_tp/inet_sock_set_state")
int states(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	__u64 key = (__u64)sk, one = 1;
	int state = (int)ctx->args[2];
	if (state == 1 && BPF_CORE_READ(sk, __sk_common.skc_num) == 8080 &&
	    BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr) == bpf_htonl(0x0a4d0003)) {
		bpf_map_update_elem(&open, &key, &one, 0);
		count(OPENED, 1);
	}
	/* The port is given back by then, so the socket itself is remembered. */
	if (state == 7 && bpf_map_lookup_elem(&open, &key)) {
		bpf_map_delete_elem(&open, &key);
		count(CLOSED, 1);
		count(BYTES, BPF_CORE_READ((struct tcp_sock *)sk, bytes_received));
	}
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
