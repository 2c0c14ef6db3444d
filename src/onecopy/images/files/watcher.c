/*
 * watcher: prints on the console how this guest ends (power-off, reboot or halt), and ends QEMU.
 *
 * By default the kernel first shuts all devices down. In a clone this hangs: QEMU does not migrate the
 * queue of a virtio-pmem device, so the device never answers its last flush. And a halted kernel
 * leaves QEMU running. Therefore kprobes (tracefs, kprobetrace.rst) wake this process when the kernel
 * begins, and it resets the machine. QEMU exits on a reset (-no-reboot). The program that asked for
 * the shutdown has written back and unmounted file systems by then.
 *
 * Inits kill all processes at the end. systemd spares those whose name begins with @. With others the
 * kernel starts the watcher again (release_agent of a control group of version 1), and it then reads
 * the missed events. It mounts what it needs privately (fsmount(2)).
 *
 * On a kernel without kprobes it runs `unwatched`. It has no C library: see identity.c.
 */

#include "linux.h"

#define TOOLS "/run/onecopy/tools"

enum { O_RDONLY, O_WRONLY, O_APPEND = 02000, O_CLOEXEC = 02000000, AT_FDCWD = -100 };
enum { EEXIST = 17, SIGTERM = 15, SCHED_FIFO = 1, FSCONFIG_CMD_CREATE = 6 };
struct sigaction { void *handler; unsigned long flags; void *restorer; unsigned long mask; };

/* Kernel function -> message when it is called; kexec calls only kernel_restart_prepare. */
static char *const ends[][2] = {
    {"kernel_restart", "<0>onecopy: the guest was rebooted\n"},
    {"kernel_power_off", "<0>onecopy: the guest was powered off\n"},
    {"kernel_halt", "<0>onecopy: the guest was halted\n"},
};
static char *const probes[] = {
    "p:onecopy/restart kernel_restart", "p:onecopy/prepare kernel_restart_prepare",
    "p:onecopy/power_off kernel_power_off", "p:onecopy/halt kernel_halt",
};

static int has(char *text, char *part)
{
    for (; *text; text++) {
        long same = 0;
        while (part[same] && text[same] == part[same])
            same++;
        if (!part[same])
            return 1;
    }
    return 0;
}

static int put(int folder, char *path, int flags, char *text)
{
    int fd = call(SYS_openat, folder, path, flags | O_WRONLY | O_CLOEXEC, 0);
    long error = fd < 0 ? fd : call(SYS_write, fd, text, length(text));
    if (fd >= 0)
        call(SYS_close, fd);
    return error < 0 ? error : 0;
}

/* Mount a file system without a mount point; return its directory. A name selects the hierarchy of
 * control groups. */
static int mounted(char *type, char *name)
{
    int fs = call(SYS_fsopen, type, 1);
    if (name) {
        call(SYS_fsconfig, fs, 0, "none", 0, 0);
        call(SYS_fsconfig, fs, 1, "name", name, 0);
    }
    call(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, 0, 0, 0);
    int folder = call(SYS_fsmount, fs, 1, 0);
    call(SYS_close, fs);
    return folder;
}

/* Make the kernel start this program again after a kill. */
static void return_when_killed(void)
{
    int groups = mounted("cgroup", "onecopy");
    put(groups, "release_agent", 0, TOOLS "/bin/watcher");
    call(SYS_mkdirat, groups, "watcher", 0755);
    put(groups, "watcher/notify_on_release", 0, "1");
    put(groups, "watcher/cgroup.procs", 0, "0");
    call(SYS_close, groups);
}

/* Protect this process from SIGTERM and the OOM killer, and give it real-time priority. */
static void guard(void)
{
    struct sigaction ignored = {(void *)1, 0, 0, 0};
    int priority = 50;
    call(SYS_rt_sigaction, SIGTERM, &ignored, 0, 8);
    put(AT_FDCWD, "/run/onecopy/cgroup/onecopy-guest/agent/cgroup.procs", 0, "0");
    put(AT_FDCWD, "/proc/self/oom_score_adj", 0, "-1000");
    call(SYS_sched_setscheduler, 0, SCHED_FIFO, &priority);
}

/* Set up the kprobes; return the descriptor to read their events from, or -1. */
static int trace(void)
{
    int tracefs = mounted("tracefs", 0);
    for (int i = 0; i < sizeof probes / sizeof *probes; i++) {
        int error = put(tracefs, "kprobe_events", O_APPEND, probes[i]);
        if (error && error != -EEXIST)
            return -1;
    }
    long error = call(SYS_mkdirat, tracefs, "instances/onecopy", 0700);
    /* The buffer size of each processor; it must be set before the first event. */
    if (!error)
        put(tracefs, "instances/onecopy/buffer_size_kb", 0, "4");
    if (put(tracefs, "instances/onecopy/events/onecopy/enable", 0, "1"))
        return -1;
    int pipe = call(SYS_openat, tracefs, "instances/onecopy/trace_pipe", O_RDONLY | O_CLOEXEC, 0);
    call(SYS_close, tracefs);
    return pipe;
}

void begin(long *stack)
{
    char *name = (char *)stack[1], *argv[] = {"@onecopy-watcher", 0}, *env[] = {0};
    char *unwatched[] = {"sh", TOOLS "/unwatched", 0}, text[512];
    if (*name != '@')
        call(SYS_execve, TOOLS "/bin/watcher", argv, env);
    guard();
    int proc = mounted("proc", 0), pipe = trace();
    if (pipe < 0)
        call(SYS_execve, TOOLS "/bin/busybox", unwatched, env);
    return_when_killed();
    int console = call(SYS_openat, AT_FDCWD, "/dev/kmsg", O_WRONLY | O_CLOEXEC, 0);
    for (;;) {
        long count = call(SYS_read, pipe, text, sizeof text - 1);
        if (count <= 0)
            call(SYS_exit, 1);
        text[count] = 0;
        for (int i = 0; i < sizeof ends / sizeof *ends; i++)
            if (has(text, ends[i][0])) {
                call(SYS_write, console, ends[i][1], length(ends[i][1]));
                put(proc, "sysrq-trigger", 0, "b");
            }
    }
}
