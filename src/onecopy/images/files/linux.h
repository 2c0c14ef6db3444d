/*
 * Shared by programs without a C library: system calls, and _start, which calls begin() with the
 * address of argc and argv on the stack. For tcc and Linux on x86-64 (syscalls(2)).
 */

enum {
    SYS_read, SYS_write, SYS_open, SYS_close, SYS_poll = 7, SYS_lseek, SYS_rt_sigaction = 13,
    SYS_ioctl = 16, SYS_pread, SYS_pwrite, SYS_pipe = 22, SYS_dup2 = 33, SYS_nanosleep = 35,
    SYS_getpid = 39, SYS_socket = 41, SYS_fork = 57, SYS_execve = 59, SYS_exit, SYS_wait4, SYS_kill,
    SYS_uname, SYS_fcntl = 72, SYS_ftruncate = 77, SYS_mkdir = 83, SYS_readlink = 89,
    SYS_getppid = 110, SYS_sched_setscheduler = 144, SYS_prctl = 157, SYS_sethostname = 170,
    SYS_getdents64 = 217, SYS_clock_settime = 227, SYS_clock_gettime, SYS_openat = 257, SYS_mkdirat,
    SYS_fsopen = 430, SYS_fsconfig, SYS_fsmount, SYS_pidfd_open = 434
};

struct pollfd { int fd; short events, revents; };
enum { POLLIN = 1, POLLOUT = 4 };

long call(long number, ...);
asm(".globl _start\n"
    "_start: mov %rsp, %rdi\n and $-16, %rsp\n call begin\n"
    ".globl call\n"
    "call: mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n mov %r8, %r10\n"
    "mov %r9, %r8\n syscall\n ret\n");

/* tcc calls it to initialise structures. */
void *memset(void *at, int value, unsigned long size)
{
    for (char *byte = at; size; size--)
        *byte++ = value;
    return at;
}

static long length(char *text)
{
    long count = 0;
    while (text[count])
        count++;
    return count;
}
