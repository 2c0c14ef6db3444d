/*
 * How fork_server.c takes a QEMU over: the functions of the C library and of others that it replaces
 * by LD_PRELOAD. Part of fork_server.c.
 */

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

/* Read a number after spaces. (The C library's functions for that would need the C library with
 * which this is compiled, and not an older one.) */
static unsigned long read_number(char **at)
{
    unsigned long value = 0;
    while (**at == ' ')
        ++*at;
    while (**at >= '0' && **at <= '9')
        value = value * 10 + *(*at)++ - '0';
    return value;
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
        if ((at = strchr(at + 1, ' '))) {
            char *number = at;
            values[field] = read_number(&number);
        }
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
    if (!settings)
        return real_main(count, arguments, environment);
    listening = read_number(&settings);
    close(read_number(&settings));
    idle_limit = read_number(&settings);
    life_limit = read_number(&settings);
    if (*settings)
        accelerator = strdup(settings + 1);
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
