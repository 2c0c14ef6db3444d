#!/bin/sh
# Runs in a root that has busybox, and perhaps musl's C library and a program that uses it, but no /etc.
set -eu
. /srv/workloads/tap.sh

linked() {
    echo 1 >one
    ln one two
    echo 2 >>one
    is "$(cat two)" "$(cat one)" && is "$(stat -c %i one)" "$(stat -c %i two)"
}

renamed() {
    mkdir -p a/b
    echo x >a/b/file
    mv a c
    is "$(cat c/b/file)" x
}

archived() {
    tar -C / -cf all.tar bin
    mkdir out
    tar -C out -xf all.tar
    is "$(md5sum <out/bin/busybox)" "$(md5sum </bin/busybox)"
}

served() {
    mkdir -p www
    head -c 300000 /bin/busybox >www/file
    httpd -p 127.0.0.1:8080 -h www
    within 30 wget -q -O got http://127.0.0.1:8080/file
    is "$(md5sum <got)" "$(md5sum <www/file)"
}

piped() {
    mkfifo pipe
    echo through >pipe &
    is "$(cat pipe)" through
}

rm -rf /tmp/work
mkdir -p /tmp/work
cd /tmp/work
check "a hard link is the same file" linked
check "a folder is renamed" renamed
check "an archive" archived
check "compression" sh -c 'gzip -c /bin/busybox | gunzip -c | cmp - /bin/busybox'
check "a server on loopback" served
check "a pipe with a name" piped
check "standard output by name" sh -c '[ "$(echo x >/dev/stdout)" = x ]'
check "a descriptor by name" sh -c '[ "$(echo x | cat /dev/fd/0)" = x ]'
check "shared memory" sh -c 'echo x >/dev/shm/x && rm /dev/shm/x'
check "a file of the root is written to" sh -c 'echo >>/bin/busybox.new && mv /bin/busybox.new /bin/new'
check "random numbers" sh -c '[ "$(head -c 16 /dev/urandom | md5sum)" != "$(head -c 16 /dev/urandom | md5sum)" ]'
own random "$(head -c 16 /dev/urandom | md5sum)"
if [ -x /bin/musl ]; then
    for name in localhost self threads files clock signals memory; do
        check "musl: $name" /bin/musl $name
    done
fi
plan
