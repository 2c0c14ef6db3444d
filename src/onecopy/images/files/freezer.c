/*
 * The freezer: all user space but ours stands still from right before the snapshot until a clone is
 * a machine of its own (Linux Documentation/admin-guide/cgroup-v2.rst, cgroup.freeze).
 *
 * A part of identity.c. Ours is in the group onecopy-guest/agent, which is never frozen.
 */

#define GROUPS "/run/onecopy/cgroup/"

enum { O_DIRECTORY = 0200000, DT_DIR = 4, SIGSTOP = 19, PID_DIGITS = 10 };
/* Top-level groups: systemd makes five at most, users some. */
enum { GROUPS_MOST = 64, CRONS_MOST = 8 };
/* Milliseconds that programs get to stand still: one that waits for a disk does so when it has it. */
enum { FREEZING = 10000 };

/* What is frozen: descriptors of cgroup.freeze; and of cgroup.events. */
static int freezers[GROUPS_MOST], events[GROUPS_MOST], groups;
/* Daemons that would make up for the time that a clone has missed (timers). */
static long crons[CRONS_MOST];
static int cron_count;

/* Read a file of the kernel's from its start; return its length, at most size - 1. */
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

/* Whether the events of a group have this line. */
static int tells(int events_fd, char *line)
{
    char text[64];
    contents(events_fd, text, sizeof text);
    for (char *at = text; *at; at++)
        if (starts(at, line))
            return 1;
    return 0;
}

/* Begin to freeze a group, unless nobody is in it or somebody else has frozen it; return 0 if it
 * cannot be done. */
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

/* Programs in the root group, which cannot be frozen, go into one that can. */
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
        /* The kernel's own threads have no program. */
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

/* Begin to freeze all groups that are there; return 0 if one cannot be. */
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

/* Daemons to be stopped in clones: their process ids, one a line (timers). */
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

/* Wait until those from the first on are frozen. */
static int wait_for(int first)
{
    for (int waited = 0; first < groups; first++)
        for (; !tells(events[first], "frozen 1"); doze(1))
            if (++waited > FREEZING)
                return 0;
    return 1;
}

/* Let all user space but ours stand still; if it does not, that has been said. */
static int freeze(void)
{
    int before;
    move_strays();
    do {
        /* A program may have made another group meanwhile. */
        before = groups;
        if (!freeze_all())
            return fail("freeze", "there are too many control groups");
        if (!wait_for(before))
            return fail("freeze", "a program does not stand still");
    } while (groups > before);
    return 1;
}
