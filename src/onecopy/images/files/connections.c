/*
 * Resets open TCP connections to other hosts in a clone: they belong to the original guest.
 *
 * Part of identity.c. Source: sock_diag(7); SOCK_DESTROY in include/uapi/linux/sock_diag.h.
 */

enum { AF_INET6 = 10, AF_NETLINK = 16, SOCK_RAW = 3, NETLINK_SOCK_DIAG = 4, IPPROTO_TCP = 6 };
enum { SOCK_DIAG_BY_FAMILY = 20, SOCK_DESTROY, NLMSG_ERROR = 2, NLMSG_DONE };
enum { NLM_F_REQUEST = 1, NLM_F_ACK = 4, NLM_F_DUMP = 0x300, ALL_BUT_LISTEN = 0xffff & ~(1 << 10) };
/* A dump may skip connections while others are destroyed, so several passes are needed. */
enum { PASSES = 16 };

struct nlmsghdr { unsigned int length; unsigned short type, flags; unsigned int sequence, port; };
struct inet_diag_sockid {
    unsigned short source_port, port;
    unsigned char source[16], peer[16];
    unsigned int interface, cookie[2];
};
struct inet_diag_req_v2 {
    struct nlmsghdr header;
    unsigned char family, protocol, extensions, pad;
    unsigned int states;
    struct inet_diag_sockid id;
};
struct inet_diag_msg {
    struct nlmsghdr header;
    unsigned char family, state, timer, retransmissions;
    struct inet_diag_sockid id;
    unsigned int rest[5];
};

/* Whether connections were open when the system was saved. */
static int connected;

static int to_itself(struct inet_diag_msg *found)
{
    unsigned char *peer = found->id.peer;
    int sum = 0;
    if (found->family == AF_INET)
        return peer[0] == 127;
    for (int i = 0; i < 10; i++)
        sum |= peer[i];
    if (!sum && peer[10] == 255 && peer[11] == 255)
        return peer[12] == 127;
    for (int i = 10; i < 15; i++)
        sum |= peer[i];
    return !sum && peer[15] == 1;
}

static long ask_kernel(int netlink, struct inet_diag_req_v2 *request)
{
    request->header.length = sizeof *request;
    request->header.flags |= NLM_F_REQUEST;
    request->protocol = IPPROTO_TCP;
    request->states = ALL_BUT_LISTEN;
    return call(SYS_write, netlink, request, sizeof *request);
}

/* Destroy a connection; return 1 on success. */
static int destroy(int netlink, struct inet_diag_msg *found)
{
    struct inet_diag_req_v2 request = {0};
    char answer[256];
    request.header.type = SOCK_DESTROY;
    request.header.flags = NLM_F_ACK;
    request.family = found->family;
    request.id = found->id;
    ask_kernel(netlink, &request);
    long count = call(SYS_read, netlink, answer, sizeof answer);
    /* struct nlmsgerr: the error number follows the header. */
    return count >= 20 && *(int *)(answer + 16) == 0;
}

/* Count the connections of a family, or destroy them; return how many were counted or destroyed, and
 * -1 if the kernel cannot list them. */
static int each_connection(int family, int destroyed)
{
    static char answer[16384];
    struct inet_diag_req_v2 request = {0};
    int dump = call(SYS_socket, AF_NETLINK, SOCK_RAW | O_CLOEXEC, NETLINK_SOCK_DIAG), count = 0;
    int other = destroyed ? call(SYS_socket, AF_NETLINK, SOCK_RAW | O_CLOEXEC, NETLINK_SOCK_DIAG) : -1;
    long size;
    request.header.type = SOCK_DIAG_BY_FAMILY;
    request.header.flags = NLM_F_DUMP;
    request.family = family;
    ask_kernel(dump, &request);
    for (int more_to_come = 1; more_to_come;) {
        size = call(SYS_read, dump, answer, sizeof answer);
        more_to_come = size > 0;
        for (char *at = answer; more_to_come && at < answer + size;) {
            struct inet_diag_msg *found = (struct inet_diag_msg *)at;
            at += (found->header.length + 3) & ~3;
            if (found->header.type == NLMSG_ERROR)
                count = -1;
            if (found->header.type == NLMSG_ERROR || found->header.type == NLMSG_DONE)
                more_to_come = 0;
            else if (!to_itself(found))
                count += destroyed ? destroy(other, found) : 1;
        }
    }
    call(SYS_close, dump);
    if (other >= 0)
        call(SYS_close, other);
    return count;
}

/* Reset all connections. Their address is gone already, so no packet reaches their peers. */
static void reset_connections(void)
{
    for (int pass = 0; pass < PASSES; pass++)
        if (each_connection(AF_INET, 1) <= 0 && each_connection(AF_INET6, 1) <= 0)
            return;
}

/* Find out whether connections are open; return 0 if the kernel cannot list them. This makes the
 * kernel load its modules for it. */
static int look_for_connections(void)
{
    int count = each_connection(AF_INET, 0), others = each_connection(AF_INET6, 0);
    connected = count > 0 || others > 0;
    return count >= 0;
}
