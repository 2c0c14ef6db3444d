# Run in a guest: what the first start of a program costs it. Prints one line
# "bench: FAULTS FAULTS SECTORS SECTORS UPTIME UPTIME SELF": major page faults (/proc/vmstat
# pgmajfault), 512-byte sectors read (/proc/diskstats) and seconds, each before and after; SELF is
# the program's own count of major faults (getrusage(2)).
faults() {
    while read -r key value; do
        [ "$key" = pgmajfault ] && echo "$value"
    done </proc/vmstat
}
sectors() {
    sum=0
    while read -r _ _ name _ _ count _; do
        case $name in vd* | pmem*) sum=$((sum + count)) ;; esac
    done </proc/diskstats
    echo $sum
}
uptime() {
    read -r up _ </proc/uptime
    echo "$up"
}
# Until the rest of the guest has come to rest.
sleep 5
f=$(faults) s=$(sectors) u=$(uptime)
self=$(python3 -c 'import json, http.server, resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)')
echo "bench: $f $(faults) $s $(sectors) $u $(uptime) $self"
sleep 1000
