#!/bin/sh
# postgresql.sh setup: a server that runs, with pgbench's tables and one run. postgresql.sh check:
# pgbench's own invariants, after another run; data of this machine that no other one has.
set -eu
. "${0%/*}/tap.sh"

for bin in /usr/lib/postgresql/*/bin; do
    PATH=$bin:$PATH
done
data=/var/lib/postgresql/workload
clients=3 transactions=40

as_postgres() {
    setpriv --reuid=postgres --regid=postgres --clear-groups \
        env "PATH=$PATH" HOME=/var/lib/postgresql PGHOST=/tmp "$@"
}

sql() {
    as_postgres psql -XAtq -d "${2-postgres}" -c "$1"
}

bench() {
    as_postgres pgbench -n -c $clients -t $transactions "$@" postgres >&2
}

setup() {
    as_postgres initdb -D $data --auth=trust >&2
    cat >>$data/postgresql.conf <<EOF
unix_socket_directories = '/tmp'
shared_buffers = 32MB
max_connections = 20
EOF
    as_postgres pg_ctl -D $data -w -t 600 -l /tmp/postgresql.log start >&2
    as_postgres pgbench -q -i -s 1 postgres >&2
    bench
    sql "create table machines (name text primary key, secret uuid, drawn float8)"
}

# Sums of all tables, which pgbench's transactions keep equal.
sums() {
    sql "select (select sum(delta) from pgbench_history) = all (array[
        (select sum(abalance) from pgbench_accounts),
        (select sum(tbalance) from pgbench_tellers),
        (select sum(bbalance) from pgbench_branches)])"
}

rows() {
    sql "select count(*) from pgbench_history"
}

pages_hold() {
    sql "create extension if not exists amcheck"
    sql "select count(bt_index_check(c.oid, true)) > 2 from pg_class c join pg_index i
        on i.indexrelid = c.oid join pg_am a on a.oid = c.relam
        where a.amname = 'btree' and c.relname like 'pgbench%'"
}

# What was committed is there after the server was killed.
recovers() {
    sql "insert into machines values ('killed', gen_random_uuid(), random())"
    pid=$(head -n 1 $data/postmaster.pid)
    kill -9 "$pid"
    # Its children end by themselves; until then none may start.
    within 60 sh -c "! pgrep -f '[p]ostgres: ' >/dev/null"
    as_postgres pg_ctl -D $data -w -t 600 -l /tmp/postgresql.log start >&2
    is "$(sql "select count(*) from machines where name = 'killed'")" 1
}

check_all() {
    same "the server answers" "$(sql 'select 1')" 1
    before=$(rows)
    same "history of the setup" "$before" $((clients * transactions))
    same "sums of the setup agree" "$(sums)" t
    check "pgbench, simple protocol" bench
    check "pgbench, prepared statements" bench -M prepared
    check "pgbench, select only" bench -S
    same "each transaction left its row" "$(rows)" $((before + 2 * clients * transactions))
    same "sums agree" "$(sums)" t
    same "nobody else wrote here" "$(sql 'select count(*) from machines')" 0
    sql "insert into machines values ('$(hostname)', gen_random_uuid(), random())"
    same "the row is this machine's" "$(sql 'select name from machines')" "$(hostname)"
    own uuid "$(sql 'select secret from machines')"
    own random "$(sql 'select drawn from machines')"
    same "indexes agree with tables" "$(pages_hold)" t
    check "a killed server recovers" recovers
    same "sums agree after recovery" "$(sums)" t
    check "it dumps" sh -c "setpriv --reuid=postgres --regid=postgres --clear-groups \
        pg_dump -h /tmp postgres | grep -c pgbench_history"
    check "it stops" as_postgres pg_ctl -D $data -w -t 300 -m fast stop
    plan
}

case $1 in
    setup) setup ;;
    check) check_all ;;
esac
