/*
 * Discards the log of QEMU's guest agent, into which alone it is loaded. The agent logs each request
 * of the host. This would wake and fill the guest's journal, and no option turns it off (slog() in
 * QEMU's qga/commands.c).
 */

void openlog(void) {}
void syslog(void) {}
void vsyslog(void) {}
void __syslog_chk(void) {}
void __vsyslog_chk(void) {}
