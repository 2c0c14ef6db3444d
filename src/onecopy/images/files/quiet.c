/*
 * Loaded into QEMU's guest agent alone: its log goes nowhere. It has a line for each call of the host,
 * which would wake and fill the guest's journal, and it cannot be told not to (slog() in QEMU's
 * qga/commands.c).
 */

void openlog(void) {}
void syslog(void) {}
void vsyslog(void) {}
void __syslog_chk(void) {}
void __vsyslog_chk(void) {}
