/* SPDX-License-Identifier: Apache-2.0 */
/* load OBJECT CGROUP NETNS PINS IFINDEX...: attaches the programs, pins their maps, says so, and holds them. */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BPF_LINK_CREATE_COMMAND 28
#define TCX_INGRESS 46

static int program(struct bpf_object *object, const char *name)
{
	return bpf_program__fd(bpf_object__find_program_by_name(object, name));
}

int main(int argc, char **argv)
{
	struct bpf_object *object = bpf_object__open(argv[1]);
	if (argc < 6 || !object || bpf_object__load(object))
		err(1, "load");
	int cgroup = open(argv[2], O_RDONLY), netns = open(argv[3], O_RDONLY);
	const char *hooks[] = { "translate", "peer_name" };
	for (int i = 0; i < 2; i++)
		if (!bpf_program__attach_cgroup(bpf_object__find_program_by_name(object, hooks[i]), cgroup))
			err(1, "%s", hooks[i]);
	if (!bpf_program__attach(bpf_object__find_program_by_name(object, "states")))
		err(1, "states");
	if (setns(netns, CLONE_NEWNET))
		err(1, "setns");
	for (int i = 5; i < argc; i++)
		for (int out = 0; out < 2; out++) {
			struct {
				unsigned program, target, kind, flags;
				unsigned long long more[8];
			} link = { program(object, out ? "to_pod" : "from_pod"), atoi(argv[i]), TCX_INGRESS + out };
			if (syscall(SYS_bpf, BPF_LINK_CREATE_COMMAND, &link, sizeof(link)) < 0)
				err(1, "tcx %s", argv[i]);
		}
	struct bpf_map *map;
	bpf_object__for_each_map(map, object)
	{
		char path[256];
		snprintf(path, sizeof(path), "%s/%s", argv[4], bpf_map__name(map));
		if (bpf_map__pin(map, path))
			err(1, "%s", path);
	}
	puts("ready");
	fflush(stdout);
	pause();
}
