/*
 * What QEMU does for its accelerator before it creates the machine. The server does it once. Part
 * of fork_server.c.
 *
 * QEMU writes the accelerator into the class of each CPU model. These classes are in a hundred
 * pages. All children of a server have one accelerator, so the server writes it, and they do not.
 * QEMU walks its classes by g_hash_table_foreach. A child's walk has the arguments of the server's.
 */

typedef void each_function(void *, void *, void *);

/* The arguments of a walk. The third one points to a struct of this size (qom/object.c). */
static struct walk {
    void *table;
    void *function;
    struct { uint64_t function, type, abstract, opaque; } data;
} walk;
/* Whether the server does it now, and how many walks that took. */
static int recording, walk_count;

static int is_walk(struct walk *found)
{
    return walk_count == 1 && found->table == walk.table && found->function == walk.function &&
           found->data.function == walk.data.function && found->data.type == walk.data.type &&
           /* It is a bool. */
           !((found->data.abstract ^ walk.data.abstract) & 0xff) &&
           found->data.opaque == walk.data.opaque;
}

void g_hash_table_foreach(void *table, void *function, void *data)
{
    static each_function *real;
    if (!real)
        real = (each_function *)dlsym(RTLD_NEXT, "g_hash_table_foreach");
    struct walk found = {.table = table, .function = function};
    if (recording || (walk_count == 1 && table == walk.table && function == walk.function))
        memcpy(&found.data, data, sizeof found.data);
    if (recording) {
        walk = found;
        walk_count++;
    } else if (is_walk(&found)) {
        /* The next one is for another purpose. */
        walk_count = 0;
        return;
    }
    real(table, function, data);
}

/* Have QEMU prepare for an accelerator. If it cannot do that here, each child does it. */
static void prepare_accelerator(const char *accelerator)
{
    typedef void *find_function(const char *);
    typedef void prepare_function(void *);
    find_function *find = (find_function *)dlsym(RTLD_DEFAULT, "accel_find");
    prepare_function *prepare = (prepare_function *)dlsym(RTLD_DEFAULT, "accel_init_interfaces");
    void *class = find && prepare && *accelerator ? find(accelerator) : 0;
    if (!class)
        return;
    recording = 1;
    pid_t rehearsal = fork();
    if (!rehearsal) {
        prepare(class);
        _exit(0);
    }
    int status = -1;
    if (rehearsal > 0 && waitpid(rehearsal, &status, 0) == rehearsal && !status)
        prepare(class);
    recording = 0;
}
