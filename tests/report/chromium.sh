#!/bin/sh
# Print where a Chromium is; install Debian's where there is none and that is possible. Else say why not, and end with 1.
for name in "${CHROMIUM:-chromium}" chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" && exit 0
done
command -v apt-get >/dev/null || { echo "no Chromium here, and no apt-get to install one; set CHROMIUM"; exit 1; }
[ "$(id -u)" = 0 ] || { echo "no Chromium here; as root: apt-get install chromium"; exit 1; }
log=$(mktemp)
if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >"$log" 2>&1 \
    && command -v chromium; then
    rm -f "$log"
    exit 0
fi
echo "Chromium cannot be installed: $(tail -n 1 "$log")"
rm -f "$log"
exit 1
