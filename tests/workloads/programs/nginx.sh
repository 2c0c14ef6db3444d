#!/bin/sh
# nginx.sh setup: a server that runs. nginx.sh check: files of the root by sendfile, before and after
# they were written to; reload; logs to /dev/stdout. curl is not in the root: nginx is asked by perl.
set -eu
. "${0%/*}/tap.sh"

etc=/tmp/nginx

get() {
    perl -MIO::Socket::INET -e '
        my $s = IO::Socket::INET->new(PeerAddr => "127.0.0.1:8080", Timeout => 60) or die "$!";
        print $s "GET $ARGV[0] HTTP/1.0\r\nHost: x\r\n$ARGV[1]\r\n";
        local $/; my $a = <$s>; $a =~ s/^(.*?)\r\n\r\n//s or die "no header";
        my $head = $1; die $head unless $head =~ m{^HTTP/1.1 20[06]};
        print $a;' "$1" "${2-}"
}

digest() {
    md5sum | cut -d ' ' -f 1
}

configure() {
    cat >$etc/nginx.conf <<EOF
worker_processes 2;
pid $etc/pid;
error_log /dev/stderr;
events {}
http {
    sendfile on;
    access_log /dev/stdout;
    types { text/plain txt; }
    server {
        listen 127.0.0.1:8080;
        location /root/ { alias /; }
        location /version { return 200 $1; }
        location /name { return 200 \$hostname; }
    }
}
EOF
}

nginx_() {
    nginx -c $etc/nginx.conf "$@"
}

setup() {
    mkdir -p $etc
    configure 1
    # Its standard output is a file of ours: /dev/stdout leads there. A daemon would have none.
    setsid nginx -c $etc/nginx.conf -g 'daemon off;' >$etc/out 2>$etc/err </dev/null &
    within 120 get /version
}

served() {
    is "$(get "/root/$1" | digest)" "$(digest <"/$1")"
}

copied_up() {
    before=$(digest <"/$1")
    echo more >>"/$1"
    served "$1" && [ "$(digest <"/$1")" != "$before" ]
}

replaced() {
    cp "/$1" "/$1.new"
    echo again >>"/$1.new"
    mv "/$1.new" "/$1"
    served "$1"
}

reloaded() {
    configure 2
    nginx_ -s reload
    within 120 sh -c "[ \"\$(sh $0 get /version)\" = 2 ]"
}

reopened() {
    mv $etc/out $etc/out.1
    nginx_ -s reopen
    get "/version?reopened" >/dev/null
    # By its own descriptor it finds the file that was renamed (proc_pid_fd(5)).
    within 30 grep -q 'GET /version?reopened' $etc/out.1
}

stopped() {
    pid=$(cat $etc/pid)
    nginx_ -s quit
    within 60 sh -c "! kill -0 $pid"
}

check_all() {
    same "it answers" "$(get /version)" 1
    check "a file of the root" served usr/bin/perl
    check "a small file" served etc/passwd
    same "a range" "$(get /root/usr/bin/perl 'Range: bytes=5000-104999
' | digest)" "$(tail -c +5001 /usr/bin/perl | head -c 100000 | digest)"
    check "a file that was written to" copied_up usr/bin/perlbug
    check "a large file that was written to" copied_up usr/lib/x86_64-linux-gnu/libc.so.6
    check "a file that was replaced" replaced etc/debian_version
    check "its log is on standard output" grep -q "GET /root/etc/passwd" $etc/out
    check "configuration is right" nginx_ -t
    check "it reloads" reloaded
    check "it reopens its logs" reopened
    check "many at once" sh -c "for n in 1 2 3 4 5 6 7 8; do
        sh $0 get /root/usr/bin/perl | md5sum & done | sort -u | wc -l | grep -qx 1"
    check "it stops" stopped
    plan
}

case $1 in
    setup) setup ;;
    check) check_all ;;
    get) get "$2" ;;
esac
