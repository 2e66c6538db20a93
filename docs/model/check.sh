#!/usr/bin/env bash
#
# Checks queue.pml: the configurations that must hold, and the variants that must
# fail because a rule was left out. It needs spin and a C compiler, one core, 2 GB of memory, and a
# minute and a half of CPU time.
# It exits with 1 if any verdict is not the expected one.
set -euo pipefail

model=$(cd "$(dirname "$0")" && pwd)/queue.pml

command -v spin >/dev/null ||
	{ echo "spin is not in PATH; install it: apt-get install spin, brew install spin, or https://spinroot.com" >&2; exit 1; }
cc=${CC:-cc}
command -v "$cc" >/dev/null ||
	{ echo "$cc is not in PATH; install a C compiler: apt-get install gcc, or xcode-select --install" >&2; exit 1; }

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

failed=0

# check holds|fails flags... searches one configuration and prints a line.
check() {
	local expected=$1 order='' verdict states mark=ok start=$SECONDS
	shift
	rm -f pan* ./*.trail
	# Backwards, the search happens to come upon the errors sooner.
	[ "$expected" = holds ] || order=-DREVERSE
	if ! { spin "$@" -a "$model" && "$cc" -w -O1 $order -DSAFETY -DCOLLAPSE -DMEMLIM=3500 -DVECTORSZ=2048 -o pan pan.c; } >log 2>&1; then
		cat log >&2
		echo "the model cannot be built with $*" >&2
		exit 1
	fi
	./pan -m20000 >out 2>&1 || true

	# A search that ran out of memory or depth, or did not end, has found nothing and proved nothing.
	if grep -q 'errors: [1-9]' out && grep -q 'assertion violated' out; then
		verdict=fails
	elif grep -q 'errors: 0' out && ! grep -qE 'max search depth too small|out of memory|Search not completed' out; then
		verdict=holds
	else
		verdict=incomplete
	fi
	states=$(awk '/states, stored/ { print $1 }' out)
	if [ "$verdict" != "$expected" ]; then
		mark="WRONG: expected $expected"
		failed=1
	fi
	printf '%-58s %9s states %4d s  %-10s %s\n' "${*//-D/}" "${states:-?}" $((SECONDS - start)) "$verdict" "$mark"
}

# What must hold.
check holds -DW=2
check holds -DW=2 -DLAZY
check holds -DW=2 -DCANCEL=1
check holds -DW=2 -DLAST=1 -DCANCEL=1 -DDROP=1
check holds -DW=2 -DLAST=1 -DDROP=1 -DLOST=1 -DLAZY
check holds -DW=2 -DLAST=1 -DCANCEL=1 -DZOMB=1
check holds -DW=1 -DDROP=2 -DCANCEL=1 -DLOST=1
check holds -DW=1 -DNPM=1 -DCANCEL=1 -DDROP=1
check holds -DW=1 -DNPM=1 -DCANCEL=1 -DLOST=1 -DZOMB=1
check holds -DW=2 -DLAST=1 -DNPM=1 -DHOPS=1 -DBOUND=0
check holds -DW=2 -DLAST=1 -DNPM=1 -DHOPS=2 -DBOUND=2
check holds -DW=1 -DCANCEL=1 -DLATE=1 -DTIMERS=1
check holds -DW=1 -DDL=1 -DDROP=1 -DLOST=1 -DCRASH=1 -DTIMERS=9
check holds -DM=3 -DW=1
check holds -DM=3 -DW=1 -DCRASH=2 -DTIMERS=1

# What must fail.
check fails -DV_GC -DW=2
check fails -DV_STALE -DW=2
check fails -DV_YOURS -DW=2 -DLAST=1 -DDROP=1
check fails -DV_NOWAKE -DW=2 -DLAZY
check fails -DV_EVENT -DW=1 -DNPM=1
check fails -DV_NOREL -DW=1 -DNPM=1
check fails -DV_ABANDON -DW=2 -DCANCEL=1
check fails -DV_PSUB -DW=1 -DCRASH=1
check fails -DV_NOPURGE -DM=3 -DW=1 -DCRASH=2 -DTIMERS=1
check fails -DV_NOLOOK -DW=1 -DDROP=1
check fails -DV_NOLEAVE -DW=2 -DLAST=1 -DCANCEL=1 -DDROP=1
check fails -DV_LEAVEKEEPS -DW=2 -DLAST=1 -DCANCEL=1 -DDROP=1
check fails -DV_NONONCE -DW=2 -DLAST=1 -DCANCEL=1 -DZOMB=1
check fails -DV_NOPAUSE -DW=2 -DLAST=1 -DNPM=1 -DHOPS=1 -DBOUND=0
check fails -DV_NOCENSUS -DW=2 -DHOPS=1
check fails -DV_AGAIN -DW=2 -DLAST=1 -DDROP=1 -DLOST=1 -DLAZY
check fails -DV_SILENT -DW=1 -DNPM=1

exit $failed
