/*
 * Equal pages of large blocks: the VMMs of a fork server have one copy of them. Part of
 * fork_server.c.
 *
 * QEMU fills a table of 1,024 queues for each virtio device, and hardly any of it is ever changed.
 * The first VMM that waits for a saved state writes its large blocks to a file in memory, a
 * template, and seals it. It and later VMMs replace pages of theirs by equal pages of the file,
 * copy-on-write. A page has the same address in both, so it has the same pointers. Some VMMs have
 * other addresses, because QEMU's RCU thread frees memory at any time. So there are several
 * templates.
 *
 * A VMM has some ten such blocks. While QEMU waits for a saved state, only its main thread uses
 * them. That waits in ppoll, which is here.
 *
 * No VMM can change a sealed file, and none takes a page that is not equal. So it does not matter
 * which VMM has written it. A guest's state, which is loaded later, is never in it.
 */

enum { MOST_TEMPLATES = 4, FIRST_TEMPLATE = FIRST_EARLY + MOST_EARLY };
enum { TEMPLATE_SEALS = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL };
/* The tables of some twenty-five devices. A VMM may not write longer files (vmm/logs.py). */
enum { TEMPLATE_SIZE = 4 << 20 };
/* How often a VMM looks whether another one has written a template, and its pause (ns). */
enum { MOST_LOOKS = 10, LOOK_PAUSE = 1000000 };

/* The templates are the descriptors from FIRST_TEMPLATE on. */
static int template_count;
/* Whether this is a VMM that is to wait for a saved state. */
static int waits;

static void create_templates(void)
{
    for (; template_count < MOST_TEMPLATES; template_count++) {
        int fd = memfd_create("onecopy-template", MFD_CLOEXEC | MFD_ALLOW_SEALING), number = -1;
        if (fd >= 0 && !ftruncate(fd, TEMPLATE_SIZE))
            number = dup3(fd, FIRST_TEMPLATE + template_count, O_CLOEXEC);
        close(fd);
        if (number < 0)
            return;
    }
}

static void close_templates(void)
{
    if (template_count)
        close_range(FIRST_TEMPLATE, FIRST_TEMPLATE + template_count - 1, 0);
}

/* Keep the templates in a child that is to wait for a saved state. */
static void keep_templates(unsigned word_count)
{
    for (unsigned i = 0; i < word_count; i++)
        waits |= !strcmp(words[i], "-incoming");
    if (!waits)
        close_templates();
}

static int is_zero(const char *page)
{
    return !page[0] && !memcmp(page, page + 1, BLOCK_PAGE - 1);
}

/* Return whether this VMM is to write the template. Another one may be doing that. */
static int lock_template(int template)
{
    struct flock all = {.l_type = F_WRLCK};
    struct timespec pause = {0, LOOK_PAUSE};
    for (int i = 0; i < MOST_LOOKS && !fcntl(template, F_GET_SEALS); i++) {
        if (!fcntl(template, F_SETLK, &all))
            return !fcntl(template, F_GET_SEALS);
        nanosleep(&pause, 0);
    }
    return 0;
}

/* Return the next large block that the template has room for, or block_end. */
static int find_large(int at, off_t offset)
{
    while (at < block_end && (block_sizes[at] < LEAST_SHARED / BLOCK_PAGE ||
                              offset + (off_t)block_sizes[at] * BLOCK_PAGE > TEMPLATE_SIZE))
        at += abs(block_sizes[at]);
    return at;
}

/* Write large blocks to a template and seal it, unless it is. */
static void write_template(int template)
{
    off_t offset = 0;
    if (!lock_template(template))
        return;
    for (int at = 0; (at = find_large(at, offset)) < block_end; at += block_sizes[at]) {
        char *page = blocks + (size_t)at * BLOCK_PAGE;
        for (int i = 0; i < block_sizes[at]; i++, page += BLOCK_PAGE, offset += BLOCK_PAGE)
            if (!is_zero(page) && pwrite(template, page, BLOCK_PAGE, offset) != BLOCK_PAGE)
                return;
    }
    fcntl(template, F_ADD_SEALS, TEMPLATE_SEALS);
}

/* Replace pages of a block by those of a template at an offset where they are equal. Count the
 * pages that are not zero, less two for each that is equal. */
static int share_block(char *block, int count, int template, const char *same, off_t offset)
{
    int apart = 0;
    for (int first = 0, end; first < count; first = end + 1) {
        for (end = first; end < count; end++) {
            size_t place = (size_t)end * BLOCK_PAGE;
            if (is_zero(block + place))
                break;
            apart++;
            if (memcmp(block + place, same + offset + place, BLOCK_PAGE))
                break;
        }
        size_t place = (size_t)first * BLOCK_PAGE, size = (size_t)(end - first) * BLOCK_PAGE;
        apart -= 2 * (end - first);
        if (size && mmap(block + place, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                         template, offset + place) == MAP_FAILED)
            abort();
    }
    return apart;
}

/* Replace pages of large blocks by those of a template; return whether that were most of them. */
static int share_blocks(int template)
{
    struct stat found;
    if (fcntl(template, F_GET_SEALS) != TEMPLATE_SEALS || fstat(template, &found) ||
        found.st_size != TEMPLATE_SIZE)
        return 0;
    char *same = mmap(0, TEMPLATE_SIZE, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, template, 0);
    if (same == MAP_FAILED)
        return 0;
    off_t offset = 0;
    int apart = 0;
    for (int at = 0; (at = find_large(at, offset)) < block_end; at += block_sizes[at]) {
        int count = block_sizes[at];
        apart += share_block(blocks + (size_t)at * BLOCK_PAGE, count, template, same, offset);
        offset += (off_t)count * BLOCK_PAGE;
    }
    munmap(same, TEMPLATE_SIZE);
    return apart <= 0;
}

int ppoll(struct pollfd *files, nfds_t count, const struct timespec *limit, const sigset_t *mask)
{
    typedef int poll_function(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);
    static poll_function *real;
    if (!real)
        real = (poll_function *)dlsym(RTLD_NEXT, "ppoll");
    if (waits && syscall(SYS_gettid) == getpid()) {
        waits = 0;
        pthread_mutex_lock(&block_lock);
        for (int i = 0, most = 0; i < template_count && !most; i++) {
            write_template(FIRST_TEMPLATE + i);
            most = share_blocks(FIRST_TEMPLATE + i);
        }
        pthread_mutex_unlock(&block_lock);
        close_templates();
    }
    return real(files, count, limit, mask);
}
