/* A process that claims to be a QEMU. What it is called, and its arguments, are the caller's; what
 * it does stands in the environment, IMPOSTOR=MODE[:ARGUMENT]. It says "ready" and waits for its end.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void ready(void)
{
	if (write(1, "ready\n", 6) != 6)
		exit(1);
}

static char *map(size_t size, int protection)
{
	char *found = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (found == MAP_FAILED)
		fail("mmap");
	return found;
}

/* As many mappings as the kernel allows. */
static void fill_the_map(void)
{
	char *base = map(70000 * PAGE, PROT_NONE);
	for (size_t n = 1; n < 70000; n += 2)
		if (mprotect(base + n * PAGE, PAGE, PROT_READ | PROT_WRITE))
			break;
}

/* Change the arguments while they are read. */
static void rewrite(char **argv)
{
	unsigned int seed = 1;
	size_t size = strlen(argv[1]);
	ready();
	for (;;) {
		seed = seed * 1103515245 + 12345;
		argv[1][(seed >> 8) % size] = (char)(seed >> 16);
	}
}

/* Arguments that are as long as we like: prctl(2), PR_SET_MM_MAP, which needs no privilege. */
static void long_arguments(void)
{
	size_t size = 64UL << 30;
	struct prctl_mm_map all = {0};
	unsigned long field[60] = {0};
	char text[4096], *at;
	FILE *file = fopen("/proc/self/stat", "r");
	if (!file || !fgets(text, sizeof text, file))
		fail("stat");
	at = strrchr(text, ')') + 1;
	for (int n = 3; n <= 52 && at; n++) {
		at = strchr(at, ' ');
		if (at)
			field[n] = strtoul(++at, NULL, 10);
	}
	all.start_code = field[26], all.end_code = field[27], all.start_stack = field[28];
	all.start_data = field[45], all.end_data = field[46], all.start_brk = field[47];
	all.brk = (unsigned long)sbrk(0);
	all.env_start = field[50], all.env_end = field[51];
	all.arg_start = (unsigned long)map(size, PROT_READ);
	all.arg_end = all.arg_start + size - 1;
	all.exe_fd = -1;
	if (prctl(PR_SET_MM, PR_SET_MM_MAP, &all, sizeof all, 0))
		fail("PR_SET_MM_MAP");
}

/* RAM of which some is always gone, another half each time, until somebody wants to read what is
 * gone, and nobody ever brings it back: the reader waits for ever.
 */
static void trap(int fd, char *ram, size_t size)
{
	struct uffdio_register all = {{(unsigned long)ram, size}, UFFDIO_REGISTER_MODE_MISSING, 0};
	struct uffdio_copy copy = {0, (unsigned long)map(PAGE, PROT_READ | PROT_WRITE), PAGE, 0, 0};
	struct pollfd caught = {fd, POLLIN, 0};
	madvise(ram, size, MADV_NOHUGEPAGE);
	for (size_t n = 0; n < size; n += PAGE)
		ram[n] = (char)(n / PAGE) | 1;
	*(char *)copy.src = 1;
	if (ioctl(fd, UFFDIO_REGISTER, &all))
		fail("UFFDIO_REGISTER");
	ready();
	for (size_t half = 0;; half ^= 1) {
		size_t first = (half * 64 + 32) * PAGE;
		for (size_t n = first; n < size; n += 128 * PAGE)
			madvise(ram + n, PAGE, MADV_DONTNEED);
		if (poll(&caught, 1, 5) > 0)
			return;
		for (copy.dst = (unsigned long)ram + first; copy.dst < (unsigned long)ram + size;
		     copy.dst += 128 * PAGE)
			if (ioctl(fd, UFFDIO_COPY, &copy))
				fail("UFFDIO_COPY");
	}
}

static void drop(const char *uid)
{
	if (uid && (setgid(atoi(uid)) || setuid(atoi(uid))))
		fail("setuid");
	prctl(PR_SET_DUMPABLE, 1);
}

int main(int argc, char **argv)
{
	const char *mode = getenv("IMPOSTOR") ?: "", *argument = strchr(mode, ':');
	struct uffdio_api api = {UFFD_API, 0, 0};
	int fd = -1;
	argument = argument ? argument + 1 : "";
	if (!strncmp(mode, "trap", 4)) {
		/* Root may let others' page faults be served; it need not be root who does. */
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
			fail("userfaultfd");
	}
	drop(getenv("IMPOSTOR_UID"));
	if (!strcmp(mode, "mappings"))
		fill_the_map();
	else if (!strcmp(mode, "arguments"))
		long_arguments();
	else if (!strcmp(mode, "rewrite") && argc > 1)
		rewrite(argv);
	else if (!strncmp(mode, "path:", 5) && open(argument, O_PATH) < 0)
		fail("open");
	else if (!strncmp(mode, "open:", 5) && open(argument, O_RDWR) < 0)
		fail("open");
	else if (!strcmp(mode, "huge"))
		map(64UL << 40, PROT_READ | PROT_WRITE)[0] = 1;
	else if (!strcmp(mode, "trap"))
		trap(fd, map(64 * MIB, PROT_READ | PROT_WRITE), 64 * MIB);
	if (strcmp(mode, "trap"))
		ready();
	for (;;)
		pause();
}
