/*
 * Sets the MAC and IP addresses of eth0.
 *
 * Part of identity.c. Source: netdevice(7).
 */

enum { ARPHRD_ETHER = 1, RTF_UP = 1, RTF_GATEWAY = 2 };
enum { SIOCADDRT = 0x890b, SIOCGIFADDR = 0x8915, SIOCSIFADDR, SIOCSIFNETMASK = 0x891c };
enum { SIOCSIFHWADDR = 0x8924, SIOCGIFHWADDR = 0x8927 };
struct sockaddr { unsigned short family; unsigned char data[14]; };
struct ifreq { char name[16]; struct sockaddr addr; char rest[8]; };
struct rtentry {
    unsigned long pad1;
    struct sockaddr dst, gateway, genmask;
    unsigned short flags;
    short pad2;
    unsigned long pad3[5];
    char *dev;
    unsigned long pad4[3];
};

static int sock;

static void set_address(struct sockaddr *addr, char *text)
{
    addr->family = AF_INET;
    for (int i = 0; i < 14; i++)
        addr->data[i] = 0;
    /* struct sockaddr_in has a port of two bytes in front of the address. */
    for (int i = 2; i < 6; i++, text++)
        addr->data[i] = number(&text, 10);
}

static int configure(struct ifreq *eth0, long what, char *address)
{
    set_address(&eth0->addr, address);
    return call(SYS_ioctl, sock, what, eth0) == 0;
}

static int route(char *gateway)
{
    struct rtentry entry = {0};
    set_address(&entry.dst, "0.0.0.0");
    set_address(&entry.genmask, "0.0.0.0");
    set_address(&entry.gateway, gateway);
    entry.flags = RTF_UP | RTF_GATEWAY;
    long error = call(SYS_ioctl, sock, SIOCADDRT, &entry);
    return error == 0 || error == -EEXIST;
}

/* Remove the saved address and connections, and tell the host that the card may be connected. */
static void part(struct ifreq *eth0, int wait)
{
    char line[8];
    configure(eth0, SIOCSIFADDR, "0.0.0.0");
    if (!wait)
        return;
    if (connected)
        reset_connections();
    say("apart\n");
    call(SYS_read, port, line, sizeof line);
}

/* Set the MAC and IP address of eth0, and append both, read back, to two texts. */
static int network(char *name, char *mac, char *settings, char *mac_end, char *address_end, int wait)
{
    struct ifreq eth0 = {"eth0"};
    char *byte = mac;
    eth0.addr.family = ARPHRD_ETHER;
    for (int i = 0; i < 6; i++, byte++)
        eth0.addr.data[i] = number(&byte, 16);
    if (call(SYS_ioctl, sock, SIOCSIFHWADDR, &eth0))
        return fail("network", "eth0 does not take its hardware address");
    if (starts(settings, "dhcp")) {
        part(&eth0, wait);
        if (!renew("dhcp", name))
            return 0;
    } else {
        char *address = word(&settings), *mask = word(&settings), *gateway = word(&settings);
        if (!configure(&eth0, SIOCSIFADDR, address) || !configure(&eth0, SIOCSIFNETMASK, mask))
            return fail("network", "eth0 does not take its IP address");
        if (wait && connected)
            reset_connections();
        if (!route(gateway))
            return fail("network", "it takes no route to its gateway");
        if (leased && !renew("address", word(&settings)))
            return 0;
    }
    if (call(SYS_ioctl, sock, SIOCGIFADDR, &eth0))
        return fail("network", "eth0 has no IP address");
    for (int i = 2; i < 6; i++)
        address_end = put_number(i > 2 ? put(address_end, ".") : address_end, eth0.addr.data[i], 10, 1);
    if (call(SYS_ioctl, sock, SIOCGIFHWADDR, &eth0))
        return fail("network", "eth0 has no hardware address");
    for (int i = 0; i < 6; i++)
        mac_end = put_number(i ? put(mac_end, ":") : mac_end, eth0.addr.data[i], 16, 2);
    return 1;
}
