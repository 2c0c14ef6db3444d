# Run in a guest: what the first start of a program costs it. Prints one line
# "bench: FAULTS FAULTS SECTORS SECTORS UPTIME UPTIME SELF": major page faults (/proc/vmstat
# pgmajfault), 512-byte sectors read (/proc/diskstats) and seconds, each before and after; SELF is
# the program's own count of major faults (proc_pid_stat(5)).
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
# By default the kernel does not count reads of memory devices.
for device in /sys/block/*; do
    echo 1 >"$device/queue/iostats"
done
# Wait until the guest is idle.
sleep 5
f=$(faults) s=$(sectors) u=$(uptime)
self=$(perl -MPOSIX -e 'open F, "/proc/self/stat"; print +(split " ", <F>)[11]')
echo "bench: $f $(faults) $s $(sectors) $u $(uptime) $self"
