/* A VMM that a guest has taken over: started in QEMU's place, it tries what it must not.
 *
 * It prints "ATTEMPT: ok" or "ATTEMPT: ENAME" for each. What it was given stands on its command line,
 * as for QEMU; after "--" come pairs of what to do and with what. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void told(const char *what, const char *with, long result) {
    printf("%s%s%s: %s\n", what, *with ? " " : "", with,
           result < 0 ? strerrorname_np(errno) : "ok");
}

static int map(int fd, int kind, int rights) {
    char *at = mmap(0, 4096, rights, kind, fd, 0);
    if (at == MAP_FAILED) return -1;
    if (rights & PROT_WRITE) *at = 'X';
    return munmap(at, 4096);
}

static int made_writable(int fd) {
    void *at = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? -1 : mprotect(at, 4096, PROT_READ | PROT_WRITE);
}

/* All ways to change the file behind a descriptor. */
static void write_to(const char *name, int fd) {
    told("pwrite", name, pwrite(fd, "X", 1, 0));
    told("ftruncate", name, ftruncate(fd, 4096));
    told("fallocate", name, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096));
    told("mmap shared", name, map(fd, MAP_SHARED, PROT_READ | PROT_WRITE));
    told("mprotect", name, made_writable(fd));
    told("mmap private", name, map(fd, MAP_PRIVATE, PROT_READ | PROT_WRITE));
}

/* And to get another descriptor of it. */
static void open_again(const char *name) {
    told("open for writing", name, open(name, O_WRONLY));
    told("open for both", name, open(name, O_RDWR | O_CLOEXEC));
    told("open and cut off", name, open(name, O_RDONLY | O_TRUNC));
    told("truncate", name, truncate(name, 4096));
    told("open for reading", name, open(name, O_RDONLY));
}

static const char *unanswered;
static char answer[64] = "waits";

static void *open_it(void *unused) {
    int fd = open(unanswered, O_RDWR);
    snprintf(answer, sizeof answer, "%s", fd < 0 ? strerrorname_np(errno) : "ok");
    return unused;
}

/* What nobody answers waits for ever: in a thread of its own. */
static void open_unanswered(const char *name) {
    pthread_t thread;
    unanswered = name;
    if (pthread_create(&thread, 0, open_it, 0)) puts("thread: none");
    usleep(1000000);
    printf("open as QEMU does again: %s\n", answer);
}

static void given(const char *name, int is_ram) {
    if (is_ram) {
        int fd = open(name, O_RDWR);
        told("open as QEMU does", "", fd);
        if (fd >= 0) {
            printf("it is open for: %d\n", fcntl(fd, F_GETFL) & O_ACCMODE);
            write_to("what came", fd);
        }
        open_unanswered(name);
    }
    int fd = atoi(strrchr(name, '/') + 1);
    told("chmod", name, fchmod(fd, 0666));
    open_again(name);
    write_to(name, fd);
}

static void bind_to(const char *port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(port)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    told("bind", port, fd < 0 ? -1 : bind(fd, (struct sockaddr *)&at, sizeof at));
    if (fd >= 0) close(fd);
}

/* More than the host has room for, by a descriptor that does not append, too. */
static void flood(const char *name) {
    static char lines[1 << 20];
    long written = 0, n = 0;
    memset(lines, '\n', sizeof lines);
    int fd = *name ? open(name, O_WRONLY) : 1;
    if (!*name) fcntl(fd, F_SETFL, 0);
    for (int i = 0; i < 3 << 10 && (n = write(fd, lines, sizeof lines)) > 0; i++) written += n;
    if (*name) printf("flood %s: %ld %s\n", name, written, n < 0 ? strerrorname_np(errno) : "ok");
}

static void attempt(const char *what, const char *with) {
    int pid = atoi(with);
    if (!strcmp(what, "bind")) return bind_to(with);
    if (!strcmp(what, "flood")) return flood(with);
    if (!strcmp(what, "read")) told(what, with, open(with, O_RDONLY));
    else if (!strcmp(what, "write")) open_again(with);
    else if (!strcmp(what, "make")) told(what, with, open(with, O_WRONLY | O_CREAT, 0600));
    else if (!strcmp(what, "unlink")) told(what, with, unlink(with));
    else if (!strcmp(what, "list")) told(what, with, open(with, O_RDONLY | O_DIRECTORY));
    else if (!strcmp(what, "signal")) told(what, "", kill(pid, 0));
    else if (!strcmp(what, "ptrace")) told(what, "", ptrace(PTRACE_SEIZE, pid, 0, 0));
    else told(what, with, (errno = EINVAL, -1));
}

static void *wait_for_ever(void *unused) {
    pause();
    return unused;
}

/* How many there can be of what the host has only so many. */
static void runaway(void) {
    pthread_t thread;
    pthread_attr_t small;
    int i, fd;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 16384);
    for (i = 0; i < 3000 && !pthread_create(&thread, &small, wait_for_ever, 0); i++) {}
    printf("threads: %d\n", i);
    for (i = 0; i < 1 << 16 && (fd = open("/dev/urandom", O_RDONLY)) >= 0; i++) {}
    printf("open files: %d\n", i);
    for (i = 0; i < 1 << 16 && mmap(0, 1 << 24, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED; i++) {}
    printf("private MiB: %d\n", i * 16);
    for (i = 0; i < 1 << 16 && mmap(0, 1 << 24, PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED; i++) {}
    printf("shared MiB: %d\n", i * 16);
}

static void numbered(const char *what, long number, long a, long b, long c, long d) {
    told(what, "", syscall(number, a, b, c, d));
}

static void system_calls(void) {
    char ring[256] = {0};
    int pair[2];
    struct rlimit more = {1 << 20, 1 << 20}, now;
    told("unix socket", "", socket(AF_UNIX, SOCK_STREAM, 0));
    told("netlink socket", "", socket(AF_NETLINK, SOCK_RAW, 0));
    told("socketpair", "", socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    told("tcp socket", "", socket(AF_INET, SOCK_STREAM, 0));
    told("udp socket", "", socket(AF_INET, SOCK_DGRAM, 0));
    told("io_uring", "", syscall(SYS_io_uring_setup, 4, ring));
    told("setuid", "", setuid(0));
    /* It is told that it was done: what counts is the limit. */
    setrlimit(RLIMIT_NOFILE, &more);
    getrlimit(RLIMIT_NOFILE, &now);
    errno = EPERM;
    told("setrlimit", "", now.rlim_cur == more.rlim_cur ? 0 : -1);
    numbered("setrlimit, the old", SYS_setrlimit, RLIMIT_NOFILE, (long)&more, 0, 0);
    pid_t child = fork();
    if (!child) _exit(0);
    told("fork", "", child);
    numbered("fork, the old", SYS_fork, 0, 0, 0, 0);
    numbered("clone", SYS_clone, SIGCHLD, 0, 0, 0);
    numbered("clone3", SYS_clone3, 0, 0, 0, 0);
    numbered("shmget", SYS_shmget, 0, 1 << 20, 0600, 0);
    numbered("semget", SYS_semget, 0, 1, 0600, 0);
    numbered("msgget", SYS_msgget, 0, 0600, 0, 0);
    numbered("mq_open", SYS_mq_open, (long)"rogue", O_CREAT | O_RDWR, 0600, 0);
    numbered("memfd_create", SYS_memfd_create, (long)"rogue", 0, 0, 0);
    numbered("userfaultfd", SYS_userfaultfd, 1, 0, 0, 0);
    numbered("perf_event_open", SYS_perf_event_open, (long)ring, 0, -1, -1);
    numbered("bpf", SYS_bpf, 0, (long)ring, 48, 0);
    numbered("keyctl", SYS_keyctl, 0, -3, 1, 0);
    numbered("unshare", SYS_unshare, 0x10000000, 0, 0, 0);
    numbered("mount", SYS_mount, (long)"none", (long)"/tmp", (long)"tmpfs", 0);
    numbered("kill", SYS_kill, getppid(), 0, 0, 0);
    numbered("process_vm_readv", SYS_process_vm_readv, getppid(), 0, 0, 0);
}

#ifdef FORKED
int gnutls_global_init(void);
#endif

int main(int argc, char **argv) {
#ifdef FORKED
    /* A fork server takes QEMU over here (vmm/files/fork_server.c). */
    gnutls_global_init();
#endif
    setvbuf(stdout, 0, _IONBF, 0);
    int i = 1;
    for (; i < argc && strcmp(argv[i], "--"); i++) {
        char *at = strstr(argv[i], "/proc/self/fd/");
        if (at) {
            int is_ram = strstr(argv[i], "id=ram") != 0;
            at[strcspn(at, ",")] = 0;
            given(at, is_ram);
        }
    }
    for (i++; i + 1 < argc; i += 2) attempt(argv[i], argv[i + 1]);
    system_calls();
    runaway();
    puts("done");
    flood("");
    /* Not exit(): there is no memory left. */
    _exit(0);
}
