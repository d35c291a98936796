/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Marks the connections of a network namespace that are listed, so that they keep the routes they have. */
#include "kernel.h"
#include <linux/in6.h>

#define SOL_SOCKET 1
#define SO_MARK 36

/* What is read of the kernel's structs; where the fields are, the kernel's type information says (CO-RE). */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};
struct bpf_iter__tcp {
	void *meta;
	struct sock_common *sk_common;
};
#pragma clang attribute pop

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MARKS_LIMIT);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct Connection);
	__type(value, __u32);
} marks SEC(".maps");

SEC("iter/tcp")
int mark_connections(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	if (!sk)
		return 0;
	struct Connection key = {};
	if (sk->skc_family == 2) {
		((__u32 *)key.local)[2] = be32(0xffff);
		((__u32 *)key.peer)[2] = be32(0xffff);
		((__u32 *)key.local)[3] = sk->skc_rcv_saddr;
		((__u32 *)key.peer)[3] = sk->skc_daddr;
	} else {
		for (int i = 0; i < 16; i++) {
			key.local[i] = sk->skc_v6_rcv_saddr.in6_u.u6_addr8[i];
			key.peer[i] = sk->skc_v6_daddr.in6_u.u6_addr8[i];
		}
	}
	key.local_port = sk->skc_num;
	key.peer_port = be16(sk->skc_dport);
	__u32 *wanted = bpf_map_lookup_elem(&marks, &key);
	if (!wanted)
		return 0;
	__u32 mark = 0;
	if (bpf_getsockopt(sk, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return 0;
	mark = (mark & ~MARK_MASK) | *wanted;
	bpf_setsockopt(sk, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
	return 0;
}

char _license[] SEC("license") = "GPL";
