/* musl TEST: exits with 0 if the C library and the kernel do what the test expects. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int count;
static volatile sig_atomic_t caught;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int resolves(const char *name)
{
    struct addrinfo *found;
    return getaddrinfo(name, "80", 0, &found) == 0 && found->ai_addr;
}

static void *work(void *unused)
{
    for (int n = 0; n < 10000; n++) {
        pthread_mutex_lock(&lock);
        count++;
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static int threads(void)
{
    pthread_t all[8];
    for (int n = 0; n < 8; n++)
        if (pthread_create(all + n, 0, work, 0))
            return 0;
    for (int n = 0; n < 8; n++)
        pthread_join(all[n], 0);
    return count == 80000;
}

static int files(void)
{
    char name[] = "/tmp/musl-XXXXXX", link_name[64];
    struct stat first, second;
    int fd = mkstemp(name);
    snprintf(link_name, sizeof link_name, "%s.link", name);
    return fd >= 0 && link(name, link_name) == 0 && write(fd, "text", 4) == 4 && fsync(fd) == 0
        && stat(link_name, &first) == 0 && fstat(fd, &second) == 0
        && first.st_ino == second.st_ino && first.st_dev == second.st_dev && first.st_size == 4
        && unlink(link_name) == 0 && unlink(name) == 0;
}

static int clocks(void)
{
    struct timespec before, after, pause = {0, 50000000};
    clock_gettime(CLOCK_MONOTONIC, &before);
    nanosleep(&pause, 0);
    clock_gettime(CLOCK_MONOTONIC, &after);
    long long passed = (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec;
    return passed >= 50000000 && time(0) > 1700000000;
}

static void handler(int number)
{
    caught = number;
}

static int signals(void)
{
    int status;
    signal(SIGUSR1, handler);
    pid_t child = fork();
    if (!child) {
        kill(getppid(), SIGUSR1);
        _exit(7);
    }
    while (waitpid(child, &status, 0) < 0)
        ;
    return caught == SIGUSR1 && WIFEXITED(status) && WEXITSTATUS(status) == 7;
}

static int memory(void)
{
    char random[32] = {0}, zero[32] = {0};
    char *map = mmap(0, 1 << 24, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || getrandom(random, sizeof random, 0) != sizeof random)
        return 0;
    pid_t child = fork();
    if (!child) {
        memset(map, 7, 1 << 24);
        _exit(0);
    }
    waitpid(child, 0, 0);
    return map[0] == 7 && map[(1 << 24) - 1] == 7 && memcmp(random, zero, sizeof zero);
}

int main(int argc, char **argv)
{
    char name[256], *test = argc > 1 ? argv[1] : "";
    gethostname(name, sizeof name);
    return !(!strcmp(test, "localhost") ? resolves("localhost")
        : !strcmp(test, "self") ? resolves(name)
        : !strcmp(test, "threads") ? threads()
        : !strcmp(test, "files") ? files()
        : !strcmp(test, "clock") ? clocks()
        : !strcmp(test, "signals") ? signals()
        : !strcmp(test, "memory") ? memory() : 0);
}
