/*
 * The child of a fork server: receives its request, confines itself as vmm/confine.py says, and
 * becomes the VMM. Part of fork_server.c.
 */

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
        asked->filter_bytes != count - asked->text_bytes)
        return -1;
    unsigned strings = 0;
    for (long i = asked->filter_bytes; i < count; i++)
        strings += !message.bytes[sizeof *asked + i];
    if (strings != asked->word_count + 2L * asked->mount_count ||
        message.bytes[sizeof *asked + count - 1])
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
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) ||
        syscall(SYS_capset, &header, data))
        return -1;
    /* As after execve(2), which keeps only ambient ones. */
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0))
            return -1;
    return 0;
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
    if (close_range(connection + 1, FIRST_TEMPLATE - 1, 0) ||
        close_range(FIRST_TEMPLATE + template_count, ~0U, 0))
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
        keep_templates(asked->word_count);
    }
    if (!report(connection, step, listener) || step || recv(connection, &go, 1, 0) != 1)
        _exit(1);
    close(connection);
}
