# Run by mmdebstrap inside its namespace when the packages are installed; $1 is the new root directory.
set -eu
root=$1

chroot "$root" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
install -d -m 0755 "$root/etc/limpet" "$root/workspace"
chown 1000:1000 "$root/workspace"
echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/limpet"
chmod 0440 "$root/etc/sudoers.d/limpet"
echo '{"user": "user", "uid": 1000, "home": "/home/user"}' >"$root/etc/limpet/image.json"

# git: fsync everything it calls written, and do not believe device numbers and change times that a restore renews
cat >"$root/etc/gitconfig" <<'EOF'
[core]
	fsync = all
	checkStat = minimal
	trustctime = false
[safe]
	directory = *
EOF

echo limpet >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
rm -f "$root/etc/resolv.conf"
: >"$root/etc/resolv.conf"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_*
printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"
printf 'LANG=C.UTF-8\n' >>"$root/etc/environment"

# Modules come from the agent disk, so that they always fit the kernel.
ln -s /run/limpet/agent/lib/modules "$root/usr/lib/modules"

rm -rf "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/log/* "$root"/etc/*- "$root/etc/.pwd.lock"
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' >"$root/etc/limpet/packages"
