/* Has another process make one system call: inject PID NUMBER ARGUMENT... prints what comes of it.
 * A process that waits stands right behind a "syscall" instruction, which it is made to do again.
 * With "write" in place of NUMBER: inject PID write ADDRESS TEXT. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

static void must(long done, const char *what) {
    if (done == -1) {
        perror(what);
        exit(1);
    }
}

int main(int argc, char **argv) {
    pid_t pid = atoi(argv[1]);
    struct user_regs_struct saved, regs;
    int status;

    must(ptrace(PTRACE_SEIZE, pid, 0, 0), "seize");
    must(ptrace(PTRACE_INTERRUPT, pid, 0, 0), "interrupt");
    must(waitpid(pid, &status, __WALL), "wait");
    if (!strcmp(argv[2], "write")) {
        unsigned long address = strtoul(argv[3], 0, 0);
        char text[4096] = {0};
        strncpy(text, argv[4], sizeof text - 9);
        for (size_t at = 0; at <= strlen(text); at += 8) {
            long word;
            memcpy(&word, text + at, 8);
            must(ptrace(PTRACE_POKEDATA, pid, address + at, word), "write");
        }
        must(ptrace(PTRACE_DETACH, pid, 0, 0), "detach");
        return 0;
    }
    must(ptrace(PTRACE_GETREGS, pid, 0, &saved), "read registers");
    regs = saved;
    unsigned long long *places[] = {&regs.rdi, &regs.rsi, &regs.rdx, &regs.r10, &regs.r8, &regs.r9};
    regs.rax = strtoul(argv[2], 0, 0);
    for (int i = 3; i < argc && i < 9; i++) *places[i - 3] = strtoul(argv[i], 0, 0);
    regs.rip -= 2;
    regs.orig_rax = -1;
    must(ptrace(PTRACE_SETREGS, pid, 0, &regs), "set registers");
    must(ptrace(PTRACE_SINGLESTEP, pid, 0, 0), "step");
    must(waitpid(pid, &status, __WALL), "wait");
    must(ptrace(PTRACE_GETREGS, pid, 0, &regs), "read registers");
    must(ptrace(PTRACE_SETREGS, pid, 0, &saved), "set registers");
    must(ptrace(PTRACE_DETACH, pid, 0, 0), "detach");
    printf("%lld\n", (long long)regs.rax);
    return 0;
}
