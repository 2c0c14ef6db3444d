/*
 * Freezes all processes but onecopy's own, from just before the snapshot until the clone has its
 * identity. onecopy's processes are in the group onecopy-guest/agent, which is never frozen.
 *
 * Part of identity.c. Source: Linux Documentation/admin-guide/cgroup-v2.rst, cgroup.freeze.
 */

#define GROUPS "/run/onecopy/cgroup/"

enum { O_DIRECTORY = 0200000, DT_DIR = 4, SIGSTOP = 19, PID_DIGITS = 10 };
/* The most top-level groups: systemd makes up to five, users a few. */
enum { GROUPS_MOST = 64, CRONS_MOST = 8 };
/* Milliseconds until all programs must be frozen. One that waits for a disk freezes after that. */
enum { FREEZING = 10000 };

/* Descriptors of cgroup.freeze and cgroup.events of each frozen group. */
static int freezers[GROUPS_MOST], events[GROUPS_MOST], groups;
/* Pids of cron daemons, which would run the jobs that a clone has missed (timers). */
static long crons[CRONS_MOST];
static int cron_count;

/* Read a kernel file from its start; return its length, at most size - 1. */
static long contents(int fd, char *text, long size)
{
    long count = call(SYS_pread, fd, text, size - 1, 0);
    text[count > 0 ? count : 0] = 0;
    return count;
}

static void thaw(void)
{
    while (groups) {
        groups--;
        call(SYS_pwrite, freezers[groups], "0", 1, 0);
        call(SYS_close, freezers[groups]);
        call(SYS_close, events[groups]);
    }
}

static int open_in(char *group, char *file, int flags)
{
    char path[400];
    put(put(put(put(path, GROUPS), group), "/"), file);
    return call(SYS_open, path, flags | O_CLOEXEC, 0);
}

/* Return whether a group's cgroup.events has this line. */
static int tells(int events_fd, char *line)
{
    char text[64];
    contents(events_fd, text, sizeof text);
    for (char *at = text; *at; at++)
        if (starts(at, line))
            return 1;
    return 0;
}

/* Start to freeze a group, unless it is empty or already frozen by another program; return 0 on
 * failure. */
static int freeze_group(char *group)
{
    char now[4];
    int fd = open_in(group, "cgroup.freeze", O_RDWR), tell = open_in(group, "cgroup.events", O_RDONLY);
    int done = 1;
    if (fd >= 0 && contents(fd, now, sizeof now) > 0 && *now == '0' && tells(tell, "populated 1")) {
        done = groups < GROUPS_MOST && call(SYS_pwrite, fd, "1", 1, 0) == 1;
        if (done) {
            freezers[groups] = fd;
            events[groups++] = tell;
            return 1;
        }
    }
    call(SYS_close, fd);
    call(SYS_close, tell);
    return done;
}

/* Move programs out of the root group, which cannot be frozen. */
static void move_strays(void)
{
    static char list[65536];
    char path[40], target[8];
    int from = call(SYS_open, GROUPS "cgroup.procs", O_RDONLY | O_CLOEXEC, 0), to = -1;
    long count = contents(from, list, sizeof list);
    call(SYS_close, from);
    for (char *pid = list, *end; pid < list + count; pid = end + 1) {
        for (end = pid; *end && *end != '\n'; end++)
            ;
        *end = 0;
        /* Kernel threads have no executable. */
        put(put(put(path, "/proc/"), pid), "/exe");
        if (end - pid > PID_DIGITS || call(SYS_readlink, path, target, sizeof target) < 0)
            continue;
        if (to < 0) {
            call(SYS_mkdir, GROUPS "guest", 0755);
            to = open_in("guest", "cgroup.procs", O_RDWR);
        }
        call(SYS_write, to, pid, end - pid);
    }
    if (to >= 0)
        call(SYS_close, to);
}

/* Start to freeze all existing groups; return 0 if one fails. */
static int freeze_all(void)
{
    static char entries[4096];
    int fd = call(SYS_open, GROUPS, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), done = 1;
    long count;
    while (done && (count = call(SYS_getdents64, fd, entries, sizeof entries)) > 0)
        for (char *at = entries; done && at < entries + count; at += *(unsigned short *)(at + 16)) {
            /* struct linux_dirent64: inode, offset, length, type, name. */
            char *name = at + 19;
            if (at[18] == DT_DIR && *name != '.' && !same(name, "onecopy-guest"))
                done = freeze_group(name);
        }
    call(SYS_close, fd);
    return done && freeze_group("onecopy-guest/exec");
}

static void doze(int milliseconds)
{
    call(SYS_poll, 0, 0, milliseconds);
}

/* Read the pids of the daemons to stop in clones, one a line (timers). */
static void read_crons(void)
{
    char list[128], *at = list;
    int fd = call(SYS_open, "/run/onecopy/crons", O_RDONLY | O_CLOEXEC, 0);
    cron_count = 0;
    if (fd < 0)
        return;
    contents(fd, list, sizeof list);
    call(SYS_close, fd);
    while (digit(*at) < 10 && cron_count < CRONS_MOST) {
        crons[cron_count++] = number(&at, 10);
        at += *at == '\n';
    }
}

/* Wait until all groups from index first on are frozen; return 0 on timeout. */
static int wait_for(int first)
{
    for (int waited = 0; first < groups; first++)
        for (; !tells(events[first], "frozen 1"); doze(1))
            if (++waited > FREEZING)
                return 0;
    return 1;
}

/* Freeze all processes but onecopy's own; report a failure to the host and return 0. */
static int freeze(void)
{
    int before;
    move_strays();
    do {
        /* A program may have made a group since the last pass. */
        before = groups;
        if (!freeze_all())
            return fail("freeze", "there are too many control groups");
        if (!wait_for(before))
            return fail("freeze", "a program does not stand still");
    } while (groups > before);
    return 1;
}
