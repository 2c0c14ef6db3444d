#!/bin/sh
# Runs in a guest: commits numbers to PostgreSQL and tells each once its commit has returned.
# `commits.sh write FOLDER` goes on from the last one until the power goes; `commits.sh check FOLDER`
# prints the last number if all up to it are there, and whole.
set -eu

folder=$2
for bin in /usr/lib/postgresql/*/bin; do
    PATH=$bin:$PATH
done

as_postgres() {
    setpriv --reuid=postgres --regid=postgres --clear-groups \
        env "PATH=$PATH" HOME=/var/lib/postgresql PGHOST=/tmp "$@"
}

sql() {
    as_postgres psql -XAtq -v ON_ERROR_STOP=1 postgres "$@"
}

if ! [ -e "$folder/postgresql.conf" ]; then
    install -d -o postgres -m 0700 "$folder"
    as_postgres initdb -D "$folder" --auth=trust >&2
    echo "unix_socket_directories = '/tmp'" >>"$folder/postgresql.conf"
    echo "shared_buffers = 16MB" >>"$folder/postgresql.conf"
    sync
fi
as_postgres pg_ctl -D "$folder" -w -t 600 -l /tmp/postgresql.log start >&2
sql -c "create table if not exists commits (number int primary key, text text)" >&2
last=$(sql -c "select count(*) from commits
    having bool_and(text = repeat(md5(number::text), 1 + number % 7)) is not false
    and coalesce(max(number), 0) = count(*)")
[ -n "$last" ] || { echo "rows are missing or damaged" >&2; exit 1; }
echo "$last"
if [ "$1" = write ]; then
    # psql prints what \echo says at once, and only after the server's answer to the commit.
    awk -v n="$last" 'BEGIN { for (;;) {
        n++
        printf "begin; insert into commits values (%d, repeat(md5(%d::text), 1 + %d %% 7));\n", n, n, n
        printf "commit;\n\\echo %d\n", n
    } }' | as_postgres stdbuf -oL psql -XAtq -v ON_ERROR_STOP=1 -f - postgres
fi
