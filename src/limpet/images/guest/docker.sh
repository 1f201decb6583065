# Run by mmdebstrap inside its namespace, after customize.sh; $1 is the new root directory. What makes an engine of it.
set -eu
root=$1

chroot "$root" usermod --append --groups docker user
# the agent starts the engine as soon as the data disk is there, and again after every boot, while this file is there
install -d -m 0700 "$root/var/lib/limpet/runtime"
: >"$root/var/lib/limpet/runtime/autostart"
# its data is on the data disk, which is mounted over these; what a package has put there would be hidden
rm -rf "$root/var/lib/docker" "$root/var/lib/containerd"
install -d -m 0710 "$root/var/lib/docker"
install -d -m 0711 "$root/var/lib/containerd"

# `docker compose`: the plugin is Debian's docker-compose, called without the word
plugins=$root/usr/libexec/docker/cli-plugins
install -d "$plugins"
cat >"$plugins/docker-compose" <<'SCRIPT'
#!/bin/sh
# A plugin of the docker command: it asks for the metadata, then passes on its whole command line.
if [ "${1-}" = docker-cli-plugin-metadata ]; then
	echo '{"SchemaVersion": "0.1.0", "Vendor": "Debian", "Version": "v1.29.2", "ShortDescription": "Docker Compose"}'
	exit
fi
dropped=
for word; do
	shift
	if [ "$word" = compose ] && [ -z "$dropped" ]; then
		dropped=yes
	else
		set -- "$@" "$word"
	fi
done
exec docker-compose "$@"
SCRIPT
chmod 0755 "$plugins/docker-compose"

rm -rf "$root"/etc/*- "$root/etc/.pwd.lock" "$root"/var/log/*
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' >"$root/etc/limpet/packages"
