/*
 * fork_server: a library for LD_PRELOAD that makes an unmodified QEMU a server of forks.
 *
 * QEMU runs until it has registered its types and is about to read its options. There it stops and
 * initialises all classes. Then it accepts connections and forks a child for each. The child
 * receives one request, confines itself, reports, and goes on as QEMU with the request's command
 * line once it is told to.
 *
 * A connection is of SOCK_SEQPACKET. The client sends a struct request, the child answers with a
 * struct answer, the client sends one byte, and the child runs. If the client closes the connection
 * before that, the child ends. When the child has ended, the server sends its wait status, an int.
 * If the server cannot fork, it sends the answer. If it cannot accept, it serves no more.
 *
 * The server receives nothing but connections, so no child has anything of another guest in its
 * memory. The child closes all descriptors of the server before it receives its own. A thread keeps
 * the confinement of its creator, so QEMU's RCU thread starts in the child only afterwards.
 *
 * ONECOPY_FORK_SERVER is "SOCKET LIBRARY IDLE LIFE ACCELERATOR": the descriptors of a bound socket
 * and of this library, the seconds after which a server without children ends, those after which it
 * accepts no more connections, and the accelerator of all its children, if that is known. It does
 * not accept any either once its socket has lost its name.
 *
 * Not here: what a VMM may (vmm/confine.py), and the client (vmm/fork_request.py).
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif
#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446
#endif

/* The protocol (vmm/fork_request.py). */
enum { VERSION = 1, MOST_FDS = 64, MOST_GROUPS = 8, MOST_WORDS = 256, LARGEST = 160 << 10 };
enum { SWITCH_USER = 1, MERGE = 2, LISTEN = 4, RULES = 8 };

struct request {
    uint32_t version, flags, uid, group_count;
    uint32_t groups[MOST_GROUPS];
    uint64_t capabilities;
    /* Where the descriptors go. The first one is the working directory, which does not stay open;
     * with RULES the second one is the Landlock ruleset, which does not either. */
    uint32_t fd_count;
    int32_t targets[MOST_FDS];
    /* Bytes that follow: the seccomp filter; pairs of paths to mount, then words of the command
     * line, each with its NUL. */
    uint32_t filter_bytes, mount_count, word_count, text_bytes;
};

struct answer {
    int32_t pid;
    /* The step that failed, and errno; 0 if none did. */
    int32_t step, error;
    /* The number of the seccomp listener, which comes along; -1 for none. */
    int32_t listener;
};

/* The steps of a child that can fail (vmm/fork_request.py). */
enum { RECEIVE = 1, PLACE, TITLE, MOUNT, DIRECTORY, MERGING, USER, CAPABILITIES, PRIVILEGES,
       LANDLOCK, SECCOMP, THREADS, FORK };

enum { MOST_CLIENTS = 1024 };

#define VARIABLE "ONECOPY_FORK_SERVER"

typedef int main_function(int, char **, char **);
typedef void handler(void);

static main_function *real_main;
static char *words[MOST_WORDS + 1];
static char filler[] = "-nodefaults";
static int listening = -1, idle_limit, life_limit;
/* The name of the socket, and its file. */
static struct sockaddr_un name;
static struct stat named;
/* QEMU's handlers of pthread_atfork: they lock and restart its RCU thread. */
enum { MOST_HANDLERS = 4 };
static struct { handler *prepare, *parent, *child; } handlers[MOST_HANDLERS];
static int handler_count;
/* Clients that are connected, and their children. */
static struct { int connection; pid_t child; } clients[MOST_CLIENTS];
static int client_count, child_count;
static struct prctl_mm_map memory_map;
static const char *accelerator = "";
/* Whether QEMU has reached the point at which it is forked. */
static int stopped;
/* Descriptors that QEMU opens before, from FIRST_EARLY on. Each child gets new ones. */
enum { FIRST_EARLY = 4000, MOST_EARLY = 16 };
static struct { int number, is_epoll, flags; uint64_t count; } early[MOST_EARLY];
static int early_count;

static void fail(const char *what)
{
    dprintf(2, "fork server: %s: %s\n", what, strerror(errno));
    _exit(1);
}

#include "fork_heap.c"
#include "fork_template.c"
#include "fork_child.c"
#include "fork_accel.c"

static void forget_client(int index)
{
    close(clients[index].connection);
    clients[index] = clients[--client_count];
}

static void reap(void)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        child_count--;
        for (int i = 0; i < client_count; i++)
            if (clients[i].child == pid) {
                send(clients[i].connection, &status, sizeof status, MSG_NOSIGNAL | MSG_DONTWAIT);
                forget_client(i);
                break;
            }
    }
}

/* Fork a child for a connection; return 1 in the child, which is to go on as QEMU. */
static int serve_one(int connection, const sigset_t *mask)
{
    for (int i = handler_count - 1; i >= 0; i--)
        if (handlers[i].prepare)
            handlers[i].prepare();
    pthread_mutex_lock(&block_lock);
    pid_t pid = fork();
    pthread_mutex_unlock(&block_lock);
    if (!pid) {
        begin(connection);
        /* QEMU's RCU thread inherits the mask. */
        sigprocmask(SIG_SETMASK, mask, 0);
    }
    if (pid < 0)
        report(connection, FORK, -1);
    for (int i = 0; i < handler_count; i++) {
        handler *each = pid ? handlers[i].parent : handlers[i].child;
        if (each)
            each();
    }
    if (!pid)
        return 1;
    if (pid < 0) {
        close(connection);
    } else {
        child_count++;
        clients[client_count].connection = connection;
        clients[client_count++].child = pid;
    }
    return 0;
}

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_BOOTTIME, &time);
    return time.tv_sec;
}

static int has_name(void)
{
    struct stat found;
    return !lstat(name.sun_path, &found) && found.st_dev == named.st_dev &&
           found.st_ino == named.st_ino;
}

/* Remove the socket's name, so that clients start another server. */
static void withdraw(void)
{
    if (has_name())
        unlink(name.sun_path);
}

/* End if QEMU has other threads than that of its handlers, which children would not have. */
static void require_threads(void)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *each; tasks && (each = readdir(tasks));)
        count += each->d_name[0] != '.';
    if (!tasks || closedir(tasks))
        fail("cannot count threads");
    if (count > 1 + !!handler_count) {
        errno = EAGAIN;
        fail("this QEMU starts other threads early");
    }
}

/* End if QEMU has opened descriptors that children cannot have anew. */
static void require_early(void)
{
    for (int fd = 3, i = 0; fd < FIRST_EARLY + MOST_EARLY; fd++) {
        for (i = 0; i < early_count && early[i].number != fd; i++)
            ;
        if (i == early_count && fd != listening && fcntl(fd, F_GETFD) >= 0) {
            errno = EMFILE;
            fail("this QEMU opens other files early");
        }
    }
    for (int i = 0; i < early_count; i++)
        if (!early[i].is_epoll && read(early[i].number, &early[i].count, sizeof(uint64_t)) < 0)
            early[i].count = 0;
}

static void begin_listening(void)
{
    socklen_t size = sizeof name;
    if (getsockname(listening, (struct sockaddr *)&name, &size) || lstat(name.sun_path, &named) ||
        listen(listening, SOMAXCONN) || fcntl(listening, F_SETFL, O_NONBLOCK))
        fail("cannot listen");
}

/* Accept a client; return 1 in its child, and -1 if that is not possible any more. */
static int accept_one(const sigset_t *mask)
{
    int connection = accept4(listening, 0, 0, SOCK_CLOEXEC);
    if (connection >= 0)
        return serve_one(connection, mask);
    return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : -1;
}

/* Serve until a child is to go on as QEMU. */
static void serve(void)
{
    static struct pollfd ready[MOST_CLIENTS + 2];
    sigset_t children, mask;
    require_early();
    require_threads();
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, &mask);
    int ended = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (ended < 0)
        fail("cannot watch children");
    begin_listening();
    for (long began = now(), last = began, open = 1;;) {
        struct signalfd_siginfo information;
        if (open && (now() - began >= life_limit || !has_name() ||
                     (!child_count && now() - last >= idle_limit))) {
            /* Once more, because a client may just have connected. */
            withdraw();
            open = 0;
        } else if (!open && !client_count) {
            _exit(0);
        }
        ready[0] = (struct pollfd){ended, POLLIN, 0};
        ready[1] = (struct pollfd){client_count < MOST_CLIENTS ? listening : -1, POLLIN, 0};
        for (int i = 0; i < client_count; i++)
            ready[i + 2] = (struct pollfd){clients[i].connection, 0, 0};
        int count = poll(ready, client_count + 2, open || client_count ? 1000 : 0);
        if (count < 0 && errno != EINTR)
            fail("cannot wait for clients");
        for (int i = client_count - 1; count > 0 && i >= 0; i--)
            if (ready[i + 2].revents)
                forget_client(i);
        if (count > 0 && ready[0].revents) {
            while (read(ended, &information, sizeof information) > 0)
                ;
            reap();
            last = now();
        }
        if (count > 0 && ready[1].revents) {
            int accepted = accept_one(&mask);
            last = now();
            if (accepted > 0)
                return;
            if (accepted < 0) {
                /* Clients that wait are refused, and start another server. */
                withdraw();
                close(listening);
                listening = -1;
                open = 0;
            }
        }
    }
}

static void ignore_class(void *class, void *opaque)
{
}

/* QEMU calls this after it has registered its types and before it reads its options. */
int gnutls_global_init(void)
{
    int (*real)(void) = (int (*)(void))dlsym(RTLD_NEXT, "gnutls_global_init");
    if (listening >= 0 && !stopped) {
        typedef void each_class(void (*)(void *, void *), const char *, int, void *);
        each_class *classes = (each_class *)dlsym(RTLD_DEFAULT, "object_class_foreach");
        if (classes)
            classes(ignore_class, 0, 1, 0);
        prepare_accelerator(accelerator);
        create_templates();
        stopped = 1;
        serve();
    }
    return real();
}

#include "fork_preload.c"
