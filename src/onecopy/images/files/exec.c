/*
 * exec TAG INPUT PROGRAM ARGUMENT...: runs PROGRAM with pipes as its standard streams, and copies
 * data between the pipes and our own streams, which are virtio ports (INPUT is 1 if stdin is one).
 * A port can be opened only once, so with ports a program could not open its /dev/stdout.
 *
 * When PROGRAM has ended, exec writes TAG to both outputs. It exits with the program's exit code, or
 * with 128 + n if signal n ended the program.
 */

#include "linux.h"

#define GROUP "/run/onecopy/cgroup/onecopy-guest/exec/cgroup.procs"

enum { O_WRONLY = 1, O_NONBLOCK = 04000, O_CLOEXEC = 02000000, FIONREAD = 0x541b };
enum { F_SETFD = 2, FD_CLOEXEC = 1, F_SETFL = 4 };
enum { SIGPIPE = 13, ENOEXEC = 8, EAGAIN = 11, EACCES = 13, PIPE_BUF = 4096 };

/* A stream between two descriptors, with the data that was read and is not yet written. */
struct stream { int from, to; long size, room; char *data; };

/* A writable pipe accepts this much without blocking (pipe(7)), and so does a port
 * (virtio_console.c). */
static char input[PIPE_BUF], output[32768];
static struct stream in = {-1, -1, 0, sizeof input, input};
static struct stream out = {-1, -1, 0, sizeof output, output}, err = {-1, -1, 0, sizeof output, output};

static void set(char *path, char *text)
{
    long file = call(SYS_open, path, O_WRONLY | O_CLOEXEC, 0);
    call(SYS_write, file, text, length(text));
    call(SYS_close, file);
}

static void say(char *text)
{
    call(SYS_write, 2, text, length(text));
}

/* Execute the program outside the agent's control group and without its OOM protection. It joins its
 * group after the fork, because a full group would make the fork fail. */
static void become(char **argv, char **env)
{
    set(GROUP, "0");
    set("/proc/self/oom_score_adj", "0");
    long error = -call(SYS_execve, argv[0], argv, env);
    if (error == ENOEXEC) {
        /* A script without "#!". The arguments have room in front for the shell's name. */
        argv[-1] = "sh";
        error = -call(SYS_execve, "/run/onecopy/tools/bin/busybox", argv - 1, env);
    }
    say(argv[0]);
    say(error == EACCES ? ": cannot be run\n" : ": not found\n");
    call(SYS_exit, error == EACCES ? 126 : 127);
}

/* Connect our descriptor fd and the program's by a pipe; return the program's end. */
static int piped(struct stream *stream, int fd)
{
    int ends[2], reads = fd == 0;
    call(SYS_pipe, ends);
    call(SYS_fcntl, ends[reads], F_SETFD, FD_CLOEXEC);
    call(SYS_fcntl, ends[reads], F_SETFL, O_NONBLOCK);
    stream->from = reads ? fd : ends[0];
    stream->to = reads ? ends[1] : fd;
    return ends[!reads];
}

/* Close a stream at its end, or when its reader is gone. The tag of an output is still to come. */
static void stop(struct stream *stream)
{
    call(SYS_close, stream->from);
    if (stream == &in)
        call(SYS_close, stream->to);
    stream->from = -1;
    stream->size = 0;
}

/* Write all data that was read; close the stream if its reader is gone. */
static void pass(struct stream *stream)
{
    for (long done = 0, count; done < stream->size; done += count)
        if ((count = call(SYS_write, stream->to, stream->data + done, stream->size - done)) <= 0) {
            stop(stream);
            return;
        }
    stream->size = 0;
}

static void take(struct stream *stream)
{
    stream->size = call(SYS_read, stream->from, stream->data, stream->room);
    if (stream->size == -EAGAIN)
        stream->size = 0;
    else if (stream->size <= 0)
        stop(stream);
}

/* Write what is left in a pipe, then the tag. A child of the program may hold the pipe open and write
 * more; exec does not wait for that. */
static void finish(struct stream *stream, char *tag)
{
    int left = 0;
    for (call(SYS_ioctl, stream->from, FIONREAD, &left); left > 0 && stream->from >= 0; left -= stream->room) {
        take(stream);
        pass(stream);
    }
    call(SYS_write, stream->to, tag, length(tag));
}

static void move(long program)
{
    struct pollfd ready[4] = {{call(SYS_pidfd_open, program, 0), POLLIN, 0}};
    while (!ready[0].revents) {
        ready[1].fd = in.size ? in.to : in.from;
        ready[1].events = in.size ? POLLOUT : POLLIN;
        ready[2].fd = out.from;
        ready[3].fd = err.from;
        ready[2].events = ready[3].events = POLLIN;
        call(SYS_poll, ready, 4, -1);
        if (ready[1].revents)
            in.size ? pass(&in) : take(&in);
        if (ready[2].revents) {
            take(&out);
            pass(&out);
        }
        if (ready[3].revents) {
            take(&err);
            pass(&err);
        }
    }
}

void begin(long *stack)
{
    char **argv = (char **)stack + 1, **env = argv + stack[0] + 1, *tag = argv[1];
    long ignored[4] = {1};
    int theirs[3] = {0}, status = 0;
    if (argv[2][0] == '1')
        theirs[0] = piped(&in, 0);
    theirs[1] = piped(&out, 1);
    theirs[2] = piped(&err, 2);
    long program = call(SYS_fork);
    if (!program) {
        for (int i = 0; i < 3; i++)
            if (theirs[i]) {
                call(SYS_dup2, theirs[i], i);
                call(SYS_close, theirs[i]);
            }
        become(argv + 3, env);
    }
    for (int i = 0; i < 3; i++)
        if (theirs[i])
            call(SYS_close, theirs[i]);
    call(SYS_rt_sigaction, SIGPIPE, ignored, 0, 8);
    if (program > 0) {
        move(program);
        call(SYS_wait4, program, &status, 0, 0);
    } else {
        say("no process can be started: too many run in this guest\n");
        status = 126 << 8;
    }
    finish(&out, tag);
    finish(&err, tag);
    call(SYS_exit, status & 127 ? 128 + (status & 127) : status >> 8 & 255);
}
