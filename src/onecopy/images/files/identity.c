/*
 * identity PORT: gives a clone its identity, as requested by the host on the port. Requests:
 *
 * be NAME MACHINE-ID MILLISECONDS MAC NETWORK   set the identity, and answer "NAME MACHINE-ID MAC
 *     ADDRESS MILLISECONDS", all read back; then do the slower steps (renew), and answer "ready".
 *     MILLISECONDS is the time since 1970. NETWORK is "ADDRESS MASK GATEWAY NAME-SERVER" or "dhcp".
 *     "-" stands for a missing value. A failure is answered by "failed WHAT DETAILS", and nothing
 *     else. With "dhcp" the answer "apart" comes first: it says that the network card has no saved
 *     address left and may be connected. Any line from the host lets the request continue.
 * rehearse ...                                  the same, without waiting and without renew
 * prepare CARD                                  prepare for the next request; answer "prepared".
 *     CARD is 1 if a network card is required
 * calm                                          stop calendar timers; answer "calm"
 * freeze                                        the same, and freeze all other programs; answer
 *     "frozen" and what is missing: "nothing" if there are no control groups, "connections" if the
 *     kernel cannot reset connections
 * thaw                                          thaw the programs; answer "thawed"
 *
 * A clone thaws its programs once it has its identity. The saved guest thaws them after a time-out if
 * the host does not.
 *
 * The first touch of a page costs a clone time and memory, and under TCG so does the first run of each
 * piece of code. Therefore this is one process. It avoids starting others, opens its files in advance,
 * and has no C library: tcc alone builds it. Structures and numbers are those of Linux on x86-64.
 */

#include "linux.h"

#define TOOLS "/run/onecopy/tools"

enum { O_RDONLY, O_RDWR = 2, O_NONBLOCK = 04000, O_CLOEXEC = 02000000 };
enum { O_NOFOLLOW = 0400000 };
enum { SEEK_END = 2, CLOCK_REALTIME = 0 };
enum { AF_INET = 2, SOCK_DGRAM = 2 };
enum { ENOENT = 2, EEXIST = 17, ENOTDIR = 20, EISDIR, EPIPE = 32, ELOOP = 40, SIGHUP = 1 };
struct timespec { long seconds, nanoseconds; };
struct utsname { char sysname[65], nodename[65], rest[4][65]; };

static char reseeded[] = "crng reseeded due to virtual machine fork";
static int port, messages = -1;
/* Steps of renew in a clone: end the DHCP client, make SSH host keys, run clone hooks. */
static int leased, keyed, hooked;
/* Whether the kernel has logged that it re-seeded its random generator: then this is a clone. */
static int cloned;
/* Whether calendar timers are stopped; whether all other programs are frozen. */
static int calm, still;
/* Whether timers were stopped for the save; whether a clone must start them. */
static int timers, renewing;
/* Milliseconds until a clone starts its timers. It differs, so that clones do not start together. */
static int lull;
/* Milliseconds until frozen programs are thawed without a request; the shortest delay of a clone's
 * timers; the time for the kernel to notice that this is a clone. */
enum { DEADLINE = 20000, REST = 20000, NOTICING = 2000 };

/* tcc calls it to copy structures, which never overlap. */
void *memmove(void *to, void *from, unsigned long size)
{
    for (unsigned long i = 0; i < size; i++)
        ((char *)to)[i] = ((char *)from)[i];
    return to;
}

#include "text.c"

static void say(char *text)
{
    call(SYS_write, port, text, length(text));
}

static int fail(char *what, char *details)
{
    char text[256], *end = put(text, "failed ");
    end = put(end, what);
    end = put(end, " ");
    put(put(end, details), "\n");
    say(text);
    return 0;
}

/* Run renew; return its exit code. */
static int run(char *verb, char *argument)
{
    char *argv[] = {"sh", TOOLS "/renew", verb, argument, 0};
    char *env[] = {"PATH=" TOOLS "/applets", "HOME=/root", 0};
    int status = 0;
    long child = call(SYS_fork);
    if (!child) {
        call(SYS_dup2, port, 1);
        call(SYS_execve, TOOLS "/bin/busybox", argv, env);
        call(SYS_exit, 127);
    }
    call(SYS_wait4, child, &status, 0, 0);
    return child > 0 ? status >> 8 | status & 127 : 127;
}

/* Run a step of renew; report a failure to the host and return 0. */
static int renew(char *verb, char *argument)
{
    int code = run(verb, argument);
    return code > 1 ? fail("renew", verb) : !code;
}

#include "freezer.c"
#include "connections.c"
#include "machine_files.c"
#include "network.c"

/* Return whether a file exists and is not empty. */
static int holds(char *path)
{
    char first;
    int fd = call(SYS_open, path, O_RDONLY | O_CLOEXEC, 0), found = call(SYS_read, fd, &first, 1) == 1;
    call(SYS_close, fd);
    return found;
}

static void prepare(int card)
{
    struct ifreq eth0 = {"eth0"};
    if (card && call(SYS_ioctl, sock, SIOCGIFHWADDR, &eth0)) {
        fail("network", "there is no eth0");
        return;
    }
    if (!open_files())
        return;
    reopen(&messages, "/dev/kmsg", O_RDONLY | O_NONBLOCK);
    call(SYS_lseek, messages, 0, SEEK_END);
    if (!renew("prepare", ""))
        return;
    leased = holds("/run/onecopy/dhcp.pid");
    keyed = holds("/run/onecopy/keys");
    hooked = holds("/run/onecopy/hooked");
    read_readers();
    /* The result does not matter: this makes the kernel load its modules in time. */
    look_for_connections();
    say("prepared\n");
}

/* Wait until the kernel logs that vmgenid re-seeded its random generator; return 0 on timeout. */
static int random(int milliseconds)
{
    char record[2048];
    struct pollfd ready = {messages, POLLIN};
    while (!cloned) {
        /* Each read returns one record. EPIPE means that records were lost. */
        long count = call(SYS_read, messages, record, sizeof record - 1);
        if (count > 0) {
            record[count] = 0;
            for (char *at = record; *at; at++)
                cloned |= starts(at, reseeded);
        } else if (count != -EPIPE && call(SYS_poll, &ready, 1, milliseconds) <= 0) {
            return 0;
        }
    }
    return 1;
}

static int become(char *rest, int wait)
{
    char *name = word(&rest), *id = word(&rest), *now = word(&rest), *mac = word(&rest);
    char id_now[80] = "-", mac_now[24] = "-", address[24] = "-", answer[400], *end;
    unsigned long milliseconds = number(&now, 10);
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    struct utsname names;

    call(SYS_sethostname, name, length(name));
    if (wait && !write_files(name, id))
        return 0;
    lull = REST + milliseconds % 10000;
    if (*id != '-') {
        int file = files[MACHINE_ID].fd >= 0 ? MACHINE_ID : BUS_ID;
        long count = call(SYS_pread, files[file].fd, id_now, sizeof id_now - 1, 0);
        id_now[count > 0 ? count - 1 : 0] = 0;
    }
    if (call(SYS_clock_settime, CLOCK_REALTIME, &time))
        return fail("clock", "");
    if (*mac != '-' && !network(name, mac, rest, mac_now, address, wait))
        return 0;
    if (wait && !random(10000))
        return fail("random", "");
    call(SYS_uname, &names);
    call(SYS_clock_gettime, CLOCK_REALTIME, &time);
    end = put(put(answer, names.nodename), " ");
    end = put(put(end, id_now), " ");
    end = put(put(end, mac_now), " ");
    end = put(put(end, address), " ");
    put(put_number(end, time.seconds * 1000 + time.nanoseconds / 1000000, 10, 1), "\n");
    say(answer);
    return 1;
}

/* Do the slower steps of a clone's new identity. */
static int finish(void)
{
    if (keyed && !renew("keys", ""))
        return 0;
    for (int i = 0; i < cron_count; i++)
        call(SYS_kill, crons[i], SIGSTOP);
    thaw();
    still = calm = 0;
    renewing = timers;
    return !hooked || renew("hook", "");
}

static void go_on(void)
{
    thaw();
    still = calm = 0;
    if (timers && !renewing)
        run("timers", "start");
}

/* Stop all calendar timers. */
static int stop_timers(void)
{
    int code = run("timers", "stop");
    timers = renewing || !code;
    if (code > 1)
        return fail("timers", "");
    read_crons();
    return calm = 1;
}

/* Freeze the system in the state that clones start from. */
static void stand_still(void)
{
    if (!still && ((!calm && !stop_timers()) || !freeze())) {
        go_on();
        return;
    }
    if (!still) {
        /* Only later kernel messages can concern a clone. */
        call(SYS_lseek, messages, 0, SEEK_END);
        cloned = 0;
        still = 1;
    }
    say(groups ? "frozen" : "frozen nothing");
    say(look_for_connections() ? "\n" : " connections\n");
}

static void obey(char *rest)
{
    char *verb = word(&rest);
    if (same(verb, "prepare")) {
        prepare(*rest == '1');
    } else if (same(verb, "rehearse")) {
        become(rest, 0);
    } else if (same(verb, "be")) {
        if (become(rest, 1) && finish())
            say("ready\n");
    } else if (same(verb, "calm")) {
        if (stop_timers())
            say("calm\n");
    } else if (same(verb, "freeze")) {
        stand_still();
    } else if (same(verb, "thaw")) {
        go_on();
        say("thawed\n");
    }
}

/* Act on a time-out of the port. */
static void look_after(void)
{
    if (!still) {
        /* In a clone: the delay of its timers is over. */
        renewing = 0;
        run("timers", "renew");
    } else if (!random(NOTICING)) {
        go_on();
    }
}

/* Return the time-out of the port in milliseconds; -1 for none. */
static int patience(void)
{
    if (still)
        return cloned ? -1 : DEADLINE;
    return renewing ? lull : -1;
}

void begin(long *stack)
{
    static char line[1024];
    char *end = line;
    struct pollfd ready = {0, POLLIN};
    ready.fd = port = call(SYS_open, (char *)stack[2], O_RDWR | O_CLOEXEC, 0);
    sock = call(SYS_socket, AF_INET, SOCK_DGRAM | O_CLOEXEC, 0);
    while (end < line + sizeof line) {
        if (call(SYS_poll, &ready, 1, patience()) == 0) {
            look_after();
            continue;
        }
        if (call(SYS_read, port, end, 1) != 1)
            break;
        if (*end == '\n') {
            *end = 0;
            obey(line);
            end = line;
        } else {
            end++;
        }
    }
    call(SYS_exit, 1);
}
