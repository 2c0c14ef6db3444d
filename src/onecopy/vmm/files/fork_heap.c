/*
 * Large zeroed blocks that take memory only where QEMU writes. Part of fork_server.c.
 *
 * Most are the elements of virtio queues that no guest uses. The C library would write a header
 * before each, and zeros where memory was in use before. Here they have pages of their own in one
 * mapping, and their sizes are elsewhere. All other blocks are the C library's.
 */

/* A mapping of 64 MiB, of which a VMM uses a few; a block lies there from SMALLEST bytes on. */
enum { BLOCK_PAGE = 4096, BLOCK_PAGES = 16384, SMALLEST = 4096, LARGEST_BLOCK = 1 << 20 };
/* Blocks from this size on may have pages of the template (fork_template.c). */
enum { LEAST_SHARED = 128 << 10 };

extern void *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

static char *blocks;
/* The pages of each block at its first page, negative when it is free; up to block_end. */
static int32_t block_sizes[BLOCK_PAGES];
static int block_end;
static pthread_mutex_t block_lock = PTHREAD_MUTEX_INITIALIZER;

/* Return the number of a block's first page, or -1 if this is no such block. */
static int find_block(void *memory)
{
    uintptr_t offset = (uintptr_t)memory - (uintptr_t)blocks;
    if (!blocks || blocks == MAP_FAILED || offset >= (uintptr_t)BLOCK_PAGES * BLOCK_PAGE)
        return -1;
    if (offset % BLOCK_PAGE || block_sizes[offset / BLOCK_PAGE] <= 0)
        abort();
    return offset / BLOCK_PAGE;
}

/* Return the number of the first free page of count, or -1. The caller has the lock. */
static int take_pages(int count)
{
    int at = 0, size;
    for (; at < block_end; at += abs(size)) {
        while ((size = block_sizes[at]) < 0 && at - size < block_end && block_sizes[at - size] < 0)
            block_sizes[at] += block_sizes[at - size];
        if (-size >= count)
            break;
    }
    if (at < block_end && -size > count)
        block_sizes[at + count] = size + count;
    else if (at == block_end && at + count > BLOCK_PAGES)
        return -1;
    block_sizes[at] = count;
    if (at == block_end)
        block_end += count;
    return at;
}

void *calloc(size_t count, size_t each)
{
    size_t size;
    int first = -1;
    if (__builtin_mul_overflow(count, each, &size) || size < SMALLEST || size > LARGEST_BLOCK)
        return __libc_calloc(count, each);
    pthread_mutex_lock(&block_lock);
    if (!blocks)
        blocks = mmap(0, (size_t)BLOCK_PAGES * BLOCK_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (blocks != MAP_FAILED)
        first = take_pages((size + BLOCK_PAGE - 1) / BLOCK_PAGE);
    pthread_mutex_unlock(&block_lock);
    return first < 0 ? __libc_calloc(count, each) : blocks + (size_t)first * BLOCK_PAGE;
}

/* Give a block's memory back, and have zeros there. It may have pages of the template. */
static void clear_block(void *memory, size_t size)
{
    if (size < LEAST_SHARED
            ? madvise(memory, size, MADV_DONTNEED)
            : mmap(memory, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        memset(memory, 0, size);
}

void free(void *memory)
{
    int first = find_block(memory);
    if (first < 0) {
        __libc_free(memory);
        return;
    }
    int kept = errno;
    pthread_mutex_lock(&block_lock);
    clear_block(memory, (size_t)block_sizes[first] * BLOCK_PAGE);
    block_sizes[first] = -block_sizes[first];
    pthread_mutex_unlock(&block_lock);
    errno = kept;
}

void *realloc(void *memory, size_t size)
{
    int first = find_block(memory);
    if (first < 0)
        return __libc_realloc(memory, size);
    size_t before = (size_t)block_sizes[first] * BLOCK_PAGE;
    void *moved = size ? malloc(size) : 0;
    if (moved)
        memcpy(moved, memory, size < before ? size : before);
    if (moved || !size)
        free(memory);
    return moved;
}

size_t malloc_usable_size(void *memory)
{
    int first = find_block(memory);
    if (first >= 0)
        return (size_t)block_sizes[first] * BLOCK_PAGE;
    typedef size_t size_function(void *);
    return ((size_function *)dlsym(RTLD_NEXT, "malloc_usable_size"))(memory);
}
