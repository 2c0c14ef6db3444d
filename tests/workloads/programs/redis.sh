#!/bin/sh
# redis.sh setup: a server with an append-only file, with data. redis.sh check: its digest, its own
# benchmark, both kinds of persistence, data of this machine alone.
set -eu
. "${0%/*}/tap.sh"

folder=/var/lib/redis-workload

cli() {
    redis-cli --no-auth-warning "$@"
}

start() {
    mkdir -p $folder
    redis-server --daemonize yes --dir $folder --appendonly yes --appendfsync everysec \
        --enable-debug-command yes --logfile $folder/log >&2
    within 120 ready
}

ready() {
    [ "$(cli ping)" = PONG ]
}

stop() {
    cli shutdown save >&2 || true
    within 120 sh -c "! redis-cli ping"
}

digest() {
    cli debug digest
}

setup() {
    start
    cli eval 'for n = 1, 2000 do
        redis.call("set", "string:" .. n, string.rep(n, 5))
        redis.call("hset", "hash:" .. n % 20, n, n * n)
        redis.call("zadd", "sorted", n * 7 % 1000, n)
        redis.call("rpush", "list", n)
        redis.call("sadd", "set", n % 300)
    end' 0 >&2
    digest >$folder/digest
}

restarted() {
    before=$(digest)
    stop
    start
    is "$(digest)" "$before"
}

killed() {
    cli set precious 1 >&2
    cli waitaof 1 0 60000 >&2
    before=$(digest)
    kill -9 "$(pidof redis-server)"
    within 60 sh -c "! pidof redis-server"
    start
    is "$(digest)" "$before"
}

rewritten() {
    before=$(digest)
    cli bgrewriteaof >&2
    within 300 sh -c 'redis-cli info persistence | grep aof_rewrite_in_progress:0 &&
        redis-cli info persistence | grep aof_rewrite_scheduled:0'
    is "$(cli info persistence | tr -d '\r' | sed -n 's/^aof_last_bgrewrite_status://p')" ok
    cli debug loadaof >&2
    is "$(digest)" "$before"
}

saved() {
    before=$(digest)
    is "$(cli save)" OK
    cli debug reload >&2
    is "$(digest)" "$before"
}

published() {
    cli --raw subscribe channel >/tmp/heard &
    listener=$!
    within 60 sh -c '[ "$(redis-cli publish channel hello)" = 1 ]'
    within 60 grep -q hello /tmp/heard
    kill $listener
}

check_all() {
    same "it answers" "$(cli ping)" PONG
    same "the data of the setup" "$(digest)" "$(cat $folder/digest)"
    same "nobody else wrote here" "$(cli exists machine)" 0
    cli set machine "$(hostname)" >&2
    same "the key is this machine's" "$(cli get machine)" "$(hostname)"
    check "redis-benchmark" redis-benchmark -q -n 2000 -c 10 -t set,get,incr,lpush,rpop,sadd,hset,zadd,mset
    same "a transaction" "$(printf 'multi\nincr t\nincr t\nexec\n' | cli | tail -n 1)" 2
    same "a key expires" "$(cli set short 1 px 100 >&2; sleep 1; cli exists short)" 0
    check "subscribers hear" published
    check "the snapshot is the data" saved
    check "the rewritten append-only file is the data" rewritten
    check "a restart keeps the data" restarted
    check "a kill keeps what was synced" killed
    check "redis-check-aof" sh -c "redis-check-aof $folder/appendonlydir/*.manifest"
    check "it stops" stop
    plan
}

case $1 in
    setup) setup ;;
    check) check_all ;;
esac
