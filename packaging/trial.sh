#!/bin/sh
# What `cargo xtask deb --try` does on a clean Debian: installs the packages, and goes the way of docs/src/host.md to a guest that runs.
set -e
exec > /dev/console 2>&1
payload=$(dirname "$0")
run() { echo "# $*"; "$@"; }
trap 'echo "trial: it failed"; journalctl --no-pager -u smsvmm | tail -n 30' EXIT

modprobe kvm-amd || true
run dpkg -i "$payload"/smsvmm_*.deb "$payload"/sms-agent_*.deb
test -x /usr/bin/sms-agent
test "$(stat -c %a /etc/smsvmm)" = 700
cd /etc/smsvmm
run smsvmm pool create tank /dev/vdc /dev/vdd /dev/vde
cat >> host.toml <<END
[[pool]]
devices = ["/dev/vdc", "/dev/vdd", "/dev/vde"]
END
run smsvmm file format
run smsvmm volume create safe --size 256M --layout mirror
run systemctl start smsvmm
run smsvmm disk create /web1.dsk --size 64M
cat > web1.toml <<END
name = "web1"
memory = "256M"
[boot]
kernel = "$payload/guest-kernel"
initrd = "$payload/guest-initrd"
cmdline = "console=ttyS0 then=shell"
[[disk]]
file = "/web1.dsk"
[power]
shutdown-timeout = "5s"
END
run smsvmm vm define web1.toml --autostart
run smsvmm vm start web1
n=0
until smsvmm vm status web1 | grep -q active; do n=$((n + 1)); test $n -lt 60; sleep 1; done
run smsvmm vm list
run smsvmm vm status web1
process=$(smsvmm vm list | awk '/web1/ {print $3}')
# It is kept apart from the manager and from other machines.
apart() {
    grep -q "^Uid:[[:space:]]*19000" "/proc/$process/status"
    grep -q "/smsvmm.service/vm-web1$" "/proc/$process/cgroup"
    grep -q "/smsvmm.service/manager$" "/proc/$(systemctl show -P MainPID smsvmm)/cgroup"
}
run apart
# What it says is in the journal by its name.
journalctl --no-pager -u smsvmm SMSVMM_VM=web1 | tail -n 3
# An upgrade, and a manager that dies: the machine goes on.
run systemctl reload smsvmm
n=0
until smsvmm events 2> /dev/null | grep -q "runs already"; do n=$((n + 1)); test $n -lt 60; sleep 1; done
run systemctl kill --kill-whom=main -s KILL smsvmm
n=0
until smsvmm events 2> /dev/null | grep -c 'runs already' | grep -qx 2; do n=$((n + 1)); test $n -lt 60; sleep 1; done
test "$(smsvmm vm list | awk '/web1/ {print $3}')" = "$process"
n=0
until smsvmm vm status web1 | grep -q active; do n=$((n + 1)); test $n -lt 60; sleep 1; done
run apart
run smsvmm pool status
run systemctl stop smsvmm
test ! -d "/proc/$process"
run smsvmm file check
run dpkg -r smsvmm
trap - EXIT
echo "trial: all is well"
