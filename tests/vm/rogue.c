/* A VMM that a guest has taken over: started in QEMU's place, it tries what it must not.
 *
 * It prints "ATTEMPT: ok" or "ATTEMPT: ENAME" for each. What it was given stands on its command line,
 * as for QEMU; after "--" come pairs of what to do and with what. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
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

/* What nobody answers waits for ever: in a process that can be ended. */
static void open_unanswered(const char *name) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        told("open as QEMU does again", "", open(name, O_RDWR));
        fflush(stdout);
        _exit(0);
    }
    for (int tries = 0; tries < 100; tries++) {
        if (waitpid(child, &status, WNOHANG) == child) return;
        usleep(20000);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    printf("open as QEMU does again: waits\n");
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

static void attempt(const char *what, const char *with) {
    int pid = atoi(with);
    if (!strcmp(what, "read")) told(what, with, open(with, O_RDONLY));
    else if (!strcmp(what, "write")) open_again(with);
    else if (!strcmp(what, "make")) told(what, with, open(with, O_WRONLY | O_CREAT, 0600));
    else if (!strcmp(what, "unlink")) told(what, with, unlink(with));
    else if (!strcmp(what, "list")) told(what, with, open(with, O_RDONLY | O_DIRECTORY));
    else if (!strcmp(what, "signal")) told(what, "", kill(pid, 0));
    else if (!strcmp(what, "ptrace")) told(what, "", ptrace(PTRACE_SEIZE, pid, 0, 0));
    else told(what, with, (errno = EINVAL, -1));
}

static void system_calls(void) {
    char ring[256] = {0};
    int pair[2];
    told("unix socket", "", socket(AF_UNIX, SOCK_STREAM, 0));
    told("netlink socket", "", socket(AF_NETLINK, SOCK_RAW, 0));
    told("socketpair", "", socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
    told("tcp socket", "", socket(AF_INET, SOCK_STREAM, 0));
    told("io_uring", "", syscall(SYS_io_uring_setup, 4, ring));
    told("setuid", "", setuid(0));
}

int main(int argc, char **argv) {
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
    puts("done");
    return 0;
}
