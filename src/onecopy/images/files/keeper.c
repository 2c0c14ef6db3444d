/*
 * keeper AGENT-PORT IDENTITY-PORT: runs QEMU's guest agent and identity on these ports, and restarts
 * them when they end. When the keeper is killed, its twin takes its place.
 *
 * The agent has its own libraries, so the image needs none. Its port has a name of onecopy's, so that
 * an agent of the image does not open it.
 */

#include "linux.h"

#define TOOLS "/run/onecopy/tools"

enum { PR_SET_PDEATHSIG = 1, SIGKILL = 9 };

static char *agent[] = {
    TOOLS "/lib/ld.so", "--library-path", TOOLS "/lib", "--preload", TOOLS "/lib/quiet.so",
    TOOLS "/bin/qemu-ga", "--method", "virtio-serial", "--statedir", "/run/onecopy", "--path", 0, 0
};
static char *identity[] = {TOOLS "/bin/identity", 0, 0};
static char **environment;

/* Wait a second before a restart. A program that ends at once must not use up the processor. And a
 * signal to all processes, as in a shutdown, reaches the twin before it starts anything. */
static void pause(void)
{
    long second[] = {1, 0};
    call(SYS_nanosleep, second, 0);
}

static long start(char **argv)
{
    long keeper = call(SYS_getpid), child = call(SYS_fork);
    if (child)
        return child;
    /* The twin starts them again. */
    call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
    if (call(SYS_getppid) == keeper)
        call(SYS_execve, argv[0], argv, environment);
    call(SYS_exit, 127);
    return 0;
}

/* Fork a process that returns from here, with 0, when this one has ended. */
static long twin(void)
{
    long keeper = call(SYS_getpid), child = call(SYS_fork);
    if (child)
        return child;
    struct pollfd death = {call(SYS_pidfd_open, keeper, 0), POLLIN, 0};
    while (call(SYS_getppid) == keeper)
        call(SYS_poll, &death, 1, -1);
    call(SYS_close, death.fd);
    pause();
    return 0;
}

/* Keep all of them running; return in a twin whose time has come. */
static void keep(void)
{
    long twin_pid = twin();
    if (!twin_pid)
        return;
    long agent_pid = start(agent), identity_pid = start(identity);
    for (;;) {
        long ended = call(SYS_wait4, -1, 0, 0, 0);
        pause();
        if (ended == agent_pid)
            agent_pid = start(agent);
        else if (ended == identity_pid)
            identity_pid = start(identity);
        else if (ended == twin_pid && !(twin_pid = twin()))
            return;
    }
}

void begin(long *stack)
{
    char **argv = (char **)stack + 1;
    agent[11] = argv[1];
    identity[1] = argv[2];
    environment = argv + stack[0] + 1;
    for (;;)
        keep();
}
