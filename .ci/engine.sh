# Functions of .ci/run: what it needs of the machine beside Python, and a Docker engine.
# The folder $work is that of the run.
# shellcheck shell=bash disable=SC2154

readonly ENGINE_SECONDS=60

engine_pid=""
engine_socket=""

# Install what is missing, as root or with sudo, from Debian's packages.
install_programs() {
    local wanted=(mmdebstrap:mmdebstrap patchelf:patchelf pgbouncer:pgbouncer) missing=() pair
    PATH="$PATH:/usr/sbin:/sbin"
    engine_answers || wanted+=(dockerd:docker.io iptables:iptables)
    for pair in "${wanted[@]}"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    # PostgreSQL as Debian builds it reads its time zones from the machine.
    [[ -e /usr/share/zoneinfo/UTC ]] || missing+=(tzdata)
    printf 'missing: %s\n' "${missing[*]:-nothing}"
    # Without lists of packages the images cannot be made either, so their being there counts too.
    if ((${#missing[@]} == 0)) && [[ -n "$(apt-get indextargets 2>/dev/null)" ]]; then
        return 0
    fi
    command -v apt-get >/dev/null || {
        printf 'this machine has no apt-get: install them by hand\n'
        return 1
    }
    # A foreign source of packages that does not answer does not matter, if the rest is found.
    as_root apt-get update -qq || true
    ((${#missing[@]})) || return 0
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq --yes --no-install-recommends "${missing[@]}" >"$work/apt.log" 2>&1 || {
        tail -n 20 "$work/apt.log"
        return 1
    }
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo -n "$@"
    fi
}

# Use the engine that the machine has, or start one in the temporary folder. It is not exported:
# the commands of the README are judged as on a machine without one.
start_engine() {
    if engine_answers; then
        docker version --format 'found: {{.Server.Version}}'
        return 0
    fi
    if ((EUID != 0)); then
        printf 'no Docker engine answers, and only root can start one\n'
        return 1
    fi
    local folder="$work/docker" deadline=$((SECONDS + ENGINE_SECONDS))
    mkdir "$folder"
    engine_socket="unix://$folder/socket"
    dockerd --host "$engine_socket" --data-root "$folder/data" --exec-root "$folder/run" \
        --pidfile "$folder/pid" --bridge none --log-level warn </dev/null >"$folder/log" 2>&1 &
    engine_pid=$!
    until with_engine engine_answers; do
        if ! kill -0 "$engine_pid" 2>/dev/null || ((SECONDS > deadline)); then
            printf 'dockerd does not answer\n'
            tail -n 20 "$folder/log"
            return 1
        fi
        sleep 0.2
    done
    with_engine docker version --format 'started: {{.Server.Version}}'
}

engine_answers() {
    docker version >/dev/null 2>&1
}

# Run a command so that it finds the engine. Without a registry, testcontainers cannot have the
# image that clears up after a killed test process; here the engine goes with all that is in it.
with_engine() {
    TESTCONTAINERS_RYUK_DISABLED=true \
        DOCKER_HOST="${engine_socket:-${DOCKER_HOST:-unix:///var/run/docker.sock}}" "$@"
}

# End the engine if it is ours, with all containers, networks and mounts. Safe to call twice.
stop_engine() {
    [[ -n "$engine_pid" ]] || return 0
    local mounted containers
    containers="$(with_engine docker ps --all --quiet || true)"
    # shellcheck disable=SC2086
    [[ -z "$containers" ]] || with_engine docker rm --force $containers >/dev/null || true
    with_engine docker network prune --force >/dev/null || true
    kill "$engine_pid" 2>/dev/null || true
    wait "$engine_pid" || true
    engine_pid=""
    while read -r mounted; do
        umount --lazy -- "$mounted" || true
    done < <(awk -v folder="$work/docker/" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r)
}
