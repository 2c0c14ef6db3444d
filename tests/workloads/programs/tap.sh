# Sourced by the workloads' programs: TAP in shell.

count=0

# check NAME COMMAND...: a test that passes if the command does. What it prints goes to stderr.
check() {
    count=$((count + 1))
    name=$1
    shift
    if ("$@") >&2; then
        echo "ok $count - $name"
    else
        echo "not ok $count - $name"
    fi
}

# same NAME VALUE WANTED
same() {
    check "$1" is "$2" "$3"
}

is() {
    [ "$1" = "$2" ] || { echo "is $1, not $2"; return 1; }
}

# own NAME VALUE: what no two clones may have alike.
own() {
    echo "# own $1 $2"
}

# within SECONDS COMMAND...: try until it succeeds.
within() {
    tries=$(($1 * 5))
    shift
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "in vain: $*" >&2; return 1; }
        sleep 0.2
    done
}

plan() {
    echo "1..$count"
}
