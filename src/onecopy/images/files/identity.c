/*
 * identity PORT: waits on the port until the host tells this machine who it is.
 *
 * be NAME MACHINE-ID MILLISECONDS MAC NETWORK   become that, and answer "NAME MACHINE-ID MAC ADDRESS
 *     MILLISECONDS", all read back; then see to what takes longer (renew), and answer "ready".
 *     MILLISECONDS is the time since 1970; NETWORK is "ADDRESS MASK GATEWAY NAME-SERVER" or "dhcp";
 *     "-" stands for what there is not. What cannot be done is answered by "failed WHAT DETAILS", and
 *     nothing more. With "dhcp" the answer "apart" comes before: nothing of what was saved is left on
 *     the network card, which may be connected; any line lets it go on.
 * rehearse ...                                  the same, but nobody is waited for, no renew
 * prepare CARD                                  get ready for the next of these; answer "prepared".
 *     CARD is 1 if there must be a network card
 * calm                                          stop what begins by the calendar; answer "calm"
 * freeze                                        the same, and let all other programs stand still;
 *     answer "frozen", and what is lacking: "nothing" if there are no control groups, "connections" if
 *     the kernel cannot reset these
 * thaw                                          let them go on; answer "thawed"
 *
 * What was frozen is thawed in a clone when it is a machine of its own. Elsewhere it is thawed after
 * some time if nobody does it.
 *
 * Each page that a clone touches for the first time costs it time and memory of its own, and under
 * TCG each piece of code that it runs for the first time. So this is one process, which starts no
 * other where it need not, opens its files ahead, and has no C library: it is built with tcc alone.
 * Structures and numbers are those of Linux on x86-64.
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
/* What renew has to do in a clone: end the keeper of a DHCP lease, make SSH host keys, run clone hooks. */
static int leased, keyed, hooked;
/* Whether the kernel has said that it re-seeded its random numbers: this is a clone. */
static int cloned;
/* Whether nothing begins by the calendar; whether all others were told to stand still. */
static int calm, still;
/* Whether timers were stopped for the save; and whether they are to be started in a clone. */
static int timers, renewing;
/* Milliseconds that a clone is left alone before: not all of them begin at once. */
static int lull;
/* Milliseconds after which what is frozen is thawed if nobody says more; that a clone is left alone
 * at least; and that the kernel gets to notice that this is one. */
enum { DEADLINE = 20000, REST = 20000, NOTICING = 2000 };

/* The compiler calls it where a structure is copied: they are apart. */
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

/* The same, for what is to be done; if it was not, that has been said. */
static int renew(char *verb, char *argument)
{
    int code = run(verb, argument);
    return code > 1 ? fail("renew", verb) : !code;
}

#include "freezer.c"
#include "connections.c"
#include "machine_files.c"
#include "network.c"

/* Whether there is something in a file. */
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
    /* Not for its answer: the kernel loads modules for it, and has time to be done with that. */
    look_for_connections();
    say("prepared\n");
}

/* Wait until the kernel says that vmgenid had it re-seed its random numbers; return whether it did. */
static int random(int milliseconds)
{
    char record[2048];
    struct pollfd ready = {messages, POLLIN};
    while (!cloned) {
        /* One record each; EPIPE: some were lost. */
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

/* The rest of becoming a machine of its own. */
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

/* Have nothing begin by the calendar. */
static int stop_timers(void)
{
    int code = run("timers", "stop");
    timers = renewing || !code;
    if (code > 1)
        return fail("timers", "");
    read_crons();
    return calm = 1;
}

/* Have the system stand still as clones are to find it. */
static void stand_still(void)
{
    if (!still && ((!calm && !stop_timers()) || !freeze())) {
        go_on();
        return;
    }
    if (!still) {
        /* What the kernel says from now on it says to a clone. */
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

/* Nobody has said anything for some time. */
static void look_after(void)
{
    if (!still) {
        /* It is a clone, and what is not urgent comes now. */
        renewing = 0;
        run("timers", "renew");
    } else if (!random(NOTICING)) {
        go_on();
    }
}

/* Milliseconds that the host may say nothing; -1: as long as it likes. */
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
