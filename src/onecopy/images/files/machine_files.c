/*
 * Writes the files that name this machine, and signals the programs that read them.
 *
 * Part of identity.c.
 */

/* Start and end of onecopy's line in /etc/hosts (names). */
#define OURS_BEGIN "127.0.1.1\t"
#define OURS_END "\t# onecopy"

/* The files that name this machine; -1: the file is missing, or D-Bus's is a link to /etc's. */
enum { HOSTNAME, HOSTS, MACHINE_ID, BUS_ID, FILES };
static struct { char *path; int flags, fd; } files[FILES] = {
    {"/etc/hostname", 0, -1}, {"/etc/hosts", 0, -1}, {"/etc/machine-id", 0, -1},
    {"/var/lib/dbus/machine-id", O_NOFOLLOW, -1}
};
/* The last part of /etc/hosts; the offset of our line, or where to add one; the text behind it; and
 * the domain in it, from its dot on. */
static char hosts[16384], *behind, domain[256];
static long line_at, behind_length;
static int line_missing;
/* Processes that must read the hostname again. */
static int readers[16], reader_count;

static void reopen(int *fd, char *path, int flags)
{
    if (*fd >= 0)
        call(SYS_close, *fd);
    *fd = call(SYS_open, path, flags | O_CLOEXEC, 0);
}

static int ends(char *end, char *with)
{
    long count = length(with);
    return starts(end - count, with);
}

/* Find our line in the last part of /etc/hosts. */
static void read_hosts(int fd)
{
    long size = call(SYS_lseek, fd, 0, SEEK_END);
    long from = size > (long)sizeof hosts - 1 ? size - (long)sizeof hosts + 1 : 0;
    long count = call(SYS_pread, fd, hosts, sizeof hosts - 1, from);
    char *last = hosts + (count > 0 ? count : 0), *first = hosts, *end, *to = domain;
    *last = *domain = 0;
    line_at = size;
    behind = last;
    line_missing = last > hosts && last[-1] != '\n' ? 2 : 1;
    for (; *first; first = *end ? end + 1 : end) {
        for (end = first; *end && *end != '\n';)
            end++;
        if (!starts(first, OURS_BEGIN) || end - first < 20 || !ends(end, OURS_END))
            continue;
        line_at = from + (first - hosts);
        behind = *end ? end + 1 : end;
        line_missing = 0;
        for (first += sizeof OURS_BEGIN - 1; *first != '.' && *first > ' ';)
            first++;
        while (*first > ' ' && to < domain + sizeof domain - 1)
            *to++ = *first++;
        *to = 0;
    }
    behind_length = last - behind;
}

static void read_readers(void)
{
    char text[128], *at = text;
    int list = call(SYS_open, "/run/onecopy/hup", O_RDONLY | O_CLOEXEC, 0);
    long count = call(SYS_read, list, text, sizeof text - 1);
    call(SYS_close, list);
    text[count > 0 ? count : 0] = 0;
    for (reader_count = 0; digit(*at) < 10 && reader_count < 16; at += *at == ' ')
        readers[reader_count++] = number(&at, 10);
}

/* Open the files that name this machine. Opening for writing copies a file up into the overlay now,
 * not in the clone. */
static int open_files(void)
{
    char first;
    for (int i = 0; i < FILES; i++) {
        reopen(&files[i].fd, files[i].path, O_RDWR | files[i].flags);
        int error = -files[i].fd;
        int none = error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP;
        if (error > 0 && !none)
            return fail("files", files[i].path);
        if (i >= MACHINE_ID && error <= 0 && call(SYS_pread, files[i].fd, &first, 1, 0) != 1) {
            call(SYS_close, files[i].fd);
            files[i].fd = -1;
        }
    }
    if (files[HOSTS].fd >= 0)
        read_hosts(files[HOSTS].fd);
    return 1;
}

/* Write text at an offset, and truncate the file behind it. */
static int write_file(int file, char *text, long size, long at)
{
    int fd = files[file].fd;
    if (fd < 0 || (call(SYS_pwrite, fd, text, size, at) == size && !call(SYS_ftruncate, fd, at + size)))
        return 1;
    return fail("files", files[file].path);
}

/* Write name and machine-id into the files, and signal the programs that have read the hostname. */
static int write_files(char *name, char *id)
{
    char text[sizeof domain + 256], *end = put(put(text, name), "\n");
    if (!write_file(HOSTNAME, text, end - text, 0))
        return 0;
    end = put(put(text, line_missing > 1 ? "\n" : ""), OURS_BEGIN);
    end = put(put(end, name), domain);
    if (*domain)
        end = put(put(end, " "), name);
    end = put(end, OURS_END "\n");
    if (!write_file(HOSTS, text, end - text, line_at))
        return 0;
    if (behind_length && !write_file(HOSTS, behind, behind_length, line_at + (end - text)))
        return 0;
    end = put(put(text, id), "\n");
    if (*id != '-' && !(write_file(MACHINE_ID, text, end - text, 0) && write_file(BUS_ID, text, end - text, 0)))
        return 0;
    for (int i = 0; i < reader_count; i++)
        call(SYS_kill, readers[i], SIGHUP);
    return 1;
}
