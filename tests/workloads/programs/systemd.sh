#!/bin/sh
# A system with systemd is up: nothing failed, and its parts work.
set -eu
. "${0%/*}/tap.sh"

settled() {
    systemctl is-system-running | grep -qx running
}

transient() {
    systemd-run --quiet --wait --pipe -p DynamicUser=yes -p PrivateTmp=yes -p ProtectSystem=strict \
        sh -c 'id -u | grep -qx "6[1-5]..." && touch /tmp/mine && ! touch /usr/mine 2>/dev/null'
}

journal() {
    logger "workload of $(hostname)"
    journalctl --sync
    journalctl -b -o short | grep -F "$(hostname)" | grep -qF "workload of $(hostname)"
}

timer() {
    rm -f /run/fired
    systemd-run --quiet --on-active=1s --timer-property=AccuracySec=100ms touch /run/fired
    within 60 test -e /run/fired
}

restarts() {
    pid=$(systemctl show -P MainPID dbus)
    systemctl restart systemd-journald
    kill -9 "$(systemctl show -P MainPID systemd-logind)"
    within 120 systemctl is-active systemd-logind
    is "$(systemctl show -P MainPID dbus)" "$pid"
}

check "it is running" within 300 settled
same "no unit failed" "$(systemctl --failed --plain --no-legend)" ""
same "no job waits" "$(systemctl list-jobs --no-legend 2>&1 | grep -v 'No jobs')" ""
check "a unit with a user of its own" transient
check "the journal has lines with the name" journal
check "a timer fires" timer
check "journald and logind restart" restarts
same "hostnamectl's name" "$(hostnamectl hostname 2>/dev/null)" "$(hostname)"
check "localhost" sh -c 'getent hosts localhost | grep -qw localhost'
check "its own name" getent hosts "$(hostname)"
same "still no unit failed" "$(systemctl --failed --plain --no-legend)" ""
own machine-id "$(cat /etc/machine-id)"
own hostname "$(hostname)"
plan
