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
 *
 * The server receives nothing but connections, so no child has anything of another guest in its
 * memory. The child closes all descriptors of the server before it receives its own. A thread keeps
 * the confinement of its creator, so QEMU's RCU thread starts in the child only afterwards.
 *
 * ONECOPY_FORK_SERVER is "SOCKET IDLE LIFE": the descriptor of a bound socket, the seconds after
 * which a server without children ends, and those after which it accepts no more connections.
 *
 * Not here: what a VMM may (vmm/confine.py), and the client (vmm/fork_request.py).
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
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
       LANDLOCK, SECCOMP, THREADS };

/* Seconds that a child waits for its client. */
enum { PATIENCE = 10 };
enum { MOST_CLIENTS = 1024 };

#define VARIABLE "ONECOPY_FORK_SERVER"

typedef int main_function(int, char **, char **);
typedef void handler(void);

static main_function *real_main;
static char *words[MOST_WORDS + 1];
static char filler[] = "-nodefaults";
static int listening = -1, idle_limit, life_limit;
/* QEMU's handlers of pthread_atfork: they lock and restart its RCU thread. */
enum { MOST_HANDLERS = 4 };
static struct { handler *prepare, *parent, *child; } handlers[MOST_HANDLERS];
static int handler_count;
/* Clients that are connected, and their children. */
static struct { int connection; pid_t child; } clients[MOST_CLIENTS];
static int client_count, child_count;
static struct prctl_mm_map memory_map;
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

/* --- the child ------------------------------------------------------------------------------ */

static union {
    struct request request;
    char bytes[LARGEST];
} message;
static int received[MOST_FDS + 1];

static int report(int connection, int step, int listener)
{
    struct answer answer = {getpid(), step, step ? errno : 0, listener};
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {{0}};
    struct iovec part = {&answer, sizeof answer};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (listener >= 0) {
        header.msg_control = control.room;
        header.msg_controllen = sizeof control.room;
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(first), &listener, sizeof listener);
    }
    return sendmsg(connection, &header, MSG_NOSIGNAL) == sizeof answer;
}

/* Receive a request and its descriptors; return the number of bytes after it, or -1. */
static long receive(int connection)
{
    union { char room[CMSG_SPACE(sizeof(int) * MOST_FDS)]; struct cmsghdr align; } control;
    struct iovec part = {message.bytes, sizeof message.bytes};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room,
                            .msg_controllen = sizeof control.room};
    struct timeval patience = {PATIENCE, 0};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    long count = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
    if (count <= 0)
        _exit(0);
    unsigned fds = 0;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) {
        fds = (first->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(received, CMSG_DATA(first), fds * sizeof(int));
    }
    struct request *asked = &message.request;
    errno = EBADMSG;
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || count < (long)sizeof *asked)
        return -1;
    count -= sizeof *asked;
    if (asked->version != VERSION || asked->fd_count != fds || fds < 1 + !!(asked->flags & RULES) ||
        asked->group_count > MOST_GROUPS || asked->word_count > MOST_WORDS || !asked->word_count ||
        asked->filter_bytes % sizeof(struct sock_filter) || asked->text_bytes > count ||
        asked->filter_bytes != count - asked->text_bytes || message.bytes[sizeof *asked + count - 1])
        return -1;
    return count;
}

/* Open new descriptors in place of the server's, which all children would share. */
static int renew_early(void)
{
    for (int i = 0; i < early_count; i++) {
        int fd = early[i].is_epoll ? epoll_create1(early[i].flags)
                                   : eventfd(early[i].count, early[i].flags);
        if (fd < 0 || dup3(fd, early[i].number, early[i].flags & O_CLOEXEC) < 0 || close(fd))
            return -1;
    }
    return 0;
}

/* Give each descriptor its number, and close all others but the connection; return its number. */
static int place(int connection)
{
    struct request *asked = &message.request;
    int above = 3, count = asked->fd_count;
    for (int i = 0; i < count; i++)
        if (asked->targets[i] >= above)
            above = asked->targets[i] + 1;
    if (above + 2 * count + 2 > FIRST_EARLY) {
        errno = EMFILE;
        return -1;
    }
    received[count] = connection;
    for (int i = 0; i <= count; i++)
        if ((received[i] = fcntl(received[i], F_DUPFD_CLOEXEC, above + count + 1)) < 0)
            return -1;
    if (close_range(3, above + count, 0))
        return -1;
    for (int i = 1 + !!(asked->flags & RULES); i < count; i++)
        if (dup2(received[i], asked->targets[i]) < 0 || close(received[i]))
            return -1;
    return renew_early() ? -1 : received[count];
}

/* Show the command line in /proc/PID/cmdline. */
static int set_title(char *text, unsigned long size)
{
    memory_map.arg_start = (uintptr_t)text;
    memory_map.arg_end = (uintptr_t)text + size;
    memory_map.brk = (uintptr_t)sbrk(0);
    return prctl(PR_SET_MM, PR_SET_MM_MAP, &memory_map, sizeof memory_map, 0);
}

static int set_capabilities(uint64_t mask)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    uint32_t low = mask, high = mask >> 32;
    struct __user_cap_data_struct data[2] = {{low, low, low}, {high, high, high}};
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) ||
           syscall(SYS_capset, &header, data);
}

/* Make the mounts of the request; return the text after them, or 0. */
static char *mount_all(char *text)
{
    unsigned count = message.request.mount_count;
    if (count && (unshare(CLONE_NEWNS) || mount(0, "/", 0, MS_REC | MS_SLAVE, 0)))
        return 0;
    for (; count; count--) {
        char *target = text + strlen(text) + 1;
        if (mount(text, target, 0, MS_BIND | MS_REC, 0))
            return 0;
        text = target + strlen(target) + 1;
    }
    return text;
}

static int become(struct request *asked)
{
    gid_t groups[MOST_GROUPS];
    for (unsigned i = 0; i < asked->group_count; i++)
        groups[i] = asked->groups[i];
    return prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) ||
           syscall(SYS_setgroups, asked->group_count, groups) ||
           syscall(SYS_setresgid, asked->uid, asked->uid, asked->uid) ||
           syscall(SYS_setresuid, asked->uid, asked->uid, asked->uid);
}

/* Confine this process for good; return the failed step or 0. */
static int confine(char *filter, char *mounts, char **command, int *listener)
{
    struct request *asked = &message.request;
    struct sock_fprog program = {asked->filter_bytes / sizeof(struct sock_filter), (void *)filter};
    if (!(*command = mount_all(mounts)))
        return MOUNT;
    if (fchdir(received[0]) || close(received[0]))
        return DIRECTORY;
    if (asked->flags & MERGE && prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0))
        return MERGING;
    if (asked->flags & SWITCH_USER && become(asked))
        return USER;
    if (set_capabilities(asked->capabilities) || prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0))
        return CAPABILITIES;
    /* As after execve(2): changing the user has cleared it. */
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return PRIVILEGES;
    if (asked->flags & RULES &&
        (syscall(SYS_landlock_restrict_self, received[1], 0) || close(received[1])))
        return LANDLOCK;
    int flags = asked->flags & LISTEN ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0;
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (result < 0)
        return SECCOMP;
    if (flags)
        *listener = result;
    return 0;
}

/* Become the VMM of the request at this connection. */
static void begin(int connection)
{
    struct request *asked = &message.request;
    int listener = -1, step;
    char go, *filter = message.bytes + sizeof *asked, *text;
    memset(clients, 0, sizeof clients);
    setsid();
    if (close_range(3, connection - 1, 0) && connection > 3)
        _exit(1);
    if (close_range(connection + 1, ~0U, 0))
        _exit(1);
    long rest = receive(connection);
    text = filter + asked->filter_bytes;
    if (rest < 0) {
        step = RECEIVE;
    } else if (unshare(CLONE_THREAD)) {
        /* EINVAL: there is another thread, which would stay unconfined. */
        step = THREADS;
    } else {
        char *end = filter + rest;
        int placed = place(connection);
        step = placed < 0 ? PLACE : confine(filter, text, &text, &listener);
        connection = placed < 0 ? connection : placed;
        if (!step && set_title(text, end - text))
            step = TITLE;
        for (unsigned i = 0; !step && i < asked->word_count && text < end; i++) {
            words[i] = text;
            text += strlen(text) + 1;
        }
    }
    if (!report(connection, step, listener) || step || recv(connection, &go, 1, 0) != 1)
        _exit(1);
    close(connection);
}

/* --- the server ----------------------------------------------------------------------------- */

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
    pid_t pid = fork();
    if (!pid)
        begin(connection);
    for (int i = 0; i < handler_count; i++) {
        handler *each = pid ? handlers[i].parent : handlers[i].child;
        if (each)
            each();
    }
    if (!pid) {
        sigprocmask(SIG_SETMASK, mask, 0);
        return 1;
    }
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

/* Remove the socket's name, so that clients start another server. */
static void withdraw(void)
{
    struct sockaddr_un name = {0};
    socklen_t size = sizeof name;
    if (!getsockname(listening, (struct sockaddr *)&name, &size) && name.sun_path[0])
        unlink(name.sun_path);
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

/* Serve until a child is to go on as QEMU. */
static void serve(void)
{
    static struct pollfd ready[MOST_CLIENTS + 2];
    sigset_t children, mask;
    require_early();
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, &mask);
    int ended = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (ended < 0 || listen(listening, 128) || fcntl(listening, F_SETFL, O_NONBLOCK))
        fail("cannot listen");
    for (long began = now(), last = began, open = 1;;) {
        struct signalfd_siginfo information;
        if (open && (now() - began >= life_limit || (!child_count && now() - last >= idle_limit))) {
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
        int count = poll(ready, client_count + 2, open ? 1000 : client_count ? 1000 : 0);
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
            int connection = accept4(listening, 0, 0, SOCK_CLOEXEC);
            last = now();
            if (connection >= 0 && serve_one(connection, &mask))
                return;
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
        stopped = 1;
        serve();
    }
    return real();
}

/* --- taking over ---------------------------------------------------------------------------- */


static int is_early(void)
{
    return !stopped && (listening >= 0 || getenv(VARIABLE));
}

/* Move a descriptor of QEMU's to a number that no request uses. */
static int keep(int fd, int is_epoll, int flags)
{
    if (fd < 0 || !is_early() || early_count == MOST_EARLY)
        return fd;
    int number = fcntl(fd, flags & O_CLOEXEC ? F_DUPFD_CLOEXEC : F_DUPFD, FIRST_EARLY);
    if (number < 0)
        return fd;
    close(fd);
    early[early_count].number = number;
    early[early_count].is_epoll = is_epoll;
    early[early_count++].flags = flags;
    return number;
}

int eventfd(unsigned int count, int flags)
{
    return keep(syscall(SYS_eventfd2, count, flags), 0, flags);
}

int epoll_create1(int flags)
{
    return keep(syscall(SYS_epoll_create1, flags), 1, flags);
}

/* No VMM may use io_uring, and QEMU asks for it early. */
int io_uring_queue_init(unsigned entries, void *ring, unsigned flags)
{
    return -ENOSYS;
}

/* Return whether code belongs to the program, and not to a library. */
static int is_program(void *code)
{
    Dl_info program, place;
    return code && dladdr((void *)getauxval(AT_ENTRY), &program) && dladdr(code, &place) &&
           program.dli_fbase == place.dli_fbase;
}

/* pthread_atfork(3) calls this. QEMU's handlers run from here, because one of them starts a thread
 * in the child, which must not exist before the child is confined. */
int __register_atfork(handler *prepare, handler *parent, handler *child, void *object)
{
    typedef int register_function(handler *, handler *, handler *, void *);
    register_function *real = (register_function *)dlsym(RTLD_NEXT, "__register_atfork");
    if (!getenv(VARIABLE) || handler_count == MOST_HANDLERS || !is_program((void *)child))
        return real(prepare, parent, child, object);
    handlers[handler_count].prepare = prepare;
    handlers[handler_count].parent = parent;
    handlers[handler_count++].child = child;
    return 0;
}

/* Read what PR_SET_MM_MAP needs besides the command line (proc_pid_stat(5)). */
static void read_memory_map(void)
{
    static char text[4096];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    long count = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    close(fd);
    char *at = count > 0 ? strrchr(text, ')') : 0;
    uint64_t values[53] = {0};
    for (int field = 3; at && field < 53; field++)
        if ((at = strchr(at + 1, ' ')))
            values[field] = strtoull(at, 0, 10);
    memory_map = (struct prctl_mm_map){
        .start_code = values[26], .end_code = values[27], .start_stack = values[28],
        .start_data = values[45], .end_data = values[46], .start_brk = values[47],
        .env_start = values[50], .env_end = values[51], .exe_fd = -1};
}

/* Let early descriptors have their numbers. A child's limits are set while it waits. */
__attribute__((constructor)) static void raise_limit(void)
{
    struct rlimit files;
    if (getenv(VARIABLE) && !getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

static int run_main(int count, char **arguments, char **environment)
{
    char *settings = getenv(VARIABLE);
    if (!settings || sscanf(settings, "%d %d %d", &listening, &idle_limit, &life_limit) != 3)
        return real_main(count, arguments, environment);
    unsetenv(VARIABLE);
    unsetenv("LD_PRELOAD");
    read_memory_map();
    words[0] = arguments[0];
    for (int i = 1; i < MOST_WORDS; i++)
        words[i] = filler;
    return real_main(MOST_WORDS, words, environ);
}

int __libc_start_main(main_function *main, int count, char **arguments, void (*start)(void),
                      void (*end)(void), void (*unload)(void), void *stack)
{
    typedef int start_function(main_function *, int, char **, void (*)(void), void (*)(void),
                               void (*)(void), void *);
    real_main = main;
    start_function *real = (start_function *)dlsym(RTLD_NEXT, "__libc_start_main");
    return real(run_main, count, arguments, start, end, unload, stack);
}
