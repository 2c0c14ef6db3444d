#!/bin/sh
# podman: an image of busybox, imported and built here, runs. Which storage driver it has is told on
# standard error.
set -eu
. "${0%/*}/tap.sh"

image=localhost/tiny

imported() {
    mkdir -p /tmp/tree/bin /tmp/tree/tmp
    cp /bin/busybox /tmp/tree/bin/
    for name in sh cat echo hostname id ls wc touch; do
        ln -sf busybox /tmp/tree/bin/$name
    done
    tar -C /tmp/tree -c . | podman import - $image
}

run() {
    podman run --rm --network=none "$@"
}

built() {
    mkdir -p /tmp/build
    printf 'FROM %s\nRUN echo built >/made\nCMD ["cat", "/made"]\n' $image >/tmp/build/Containerfile
    podman build --network=none -q -t localhost/made /tmp/build
    is "$(run localhost/made)" built
}

detached() {
    podman run -d --name long --network=none $image sh -c 'trap "exit 3" TERM; while :; do echo x; sleep 1; done'
    within 60 sh -c 'podman logs long | grep -q x'
    is "$(podman exec long hostname)" "$(podman inspect -f '{{slice .Id 0 12}}' long)"
    podman stop -t 30 long
    is "$(podman inspect -f '{{.State.ExitCode}}' long)" 3
    podman rm long
}

check "an image is imported" imported
podman info -f 'storage: {{.Store.GraphDriverName}}' >&2
same "it runs" "$(run $image echo hello)" hello
same "its exit code" "$(run $image sh -c 'exit 7' || echo $?)" 7
same "its process is number 1" "$(run $image sh -c 'echo $$')" 1
check "a volume" sh -c "mkdir -p /tmp/volume && podman run --rm --network=none -v /tmp/volume:/v $image touch /v/here && test -e /tmp/volume/here"
check "a build" built
check "a container in the background" detached
check "an image is saved and loaded" sh -c "podman save -q -o /tmp/image.tar $image && podman rmi -f $image localhost/made && podman load -q -i /tmp/image.tar"
same "it runs again" "$(run $image echo hello)" hello
plan
