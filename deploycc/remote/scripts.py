"""What runs on a device, for any POSIX shell (dash, bash, busybox, toybox with mksh), with arguments instead of text put together.

A bundle lies in BASE/NAME, NAME = 32 hex digits of its digest. While a run uses it there is BASE/NAME.lock, with the process and the boot
of its guard; the guard lives as long as its standard input, which is the connection, and hears from the run every BEAT_SECONDS. A lock is
stale when its guard is gone, the device was started again, or nothing was heard for SILENT_SECONDS: the next run ends what is left of it
and takes its place. A guard that hears nothing for so long ends what it guards by itself. Folders without a lock that `--keep` does not
hold are leftovers, and go too. A process is only ended when its working folder is ours, so a number that the kernel gave to another is
left alone.
"""

from __future__ import annotations

BEAT_SECONDS = 4
SILENT_SECONDS = 20
WRITING_FAILED = 71  # exit status: a folder or file of the device cannot be written
HELD = 75  # another run has the bundle's folder
DAMAGED = 65  # what arrived is not what was sent

# PYTHON → KEY VALUE lines, then "cpuinfo" and the kernel's text
PROBE = """
echo "system $(uname -s) $(uname -r)"
echo "arch $(uname -m)"
echo "boot $(cat /proc/sys/kernel/random/boot_id 2>/dev/null)"
echo "cores $(nproc 2>/dev/null)"
echo "governor $(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"
echo "limit $(cat /sys/fs/cgroup/cpu.max 2>/dev/null)"
echo "load $(cat /proc/loadavg 2>/dev/null)"
echo "board $(tr -d '\\000' </proc/device-tree/model 2>/dev/null)"
echo "home ${XDG_CACHE_HOME:-$HOME/.cache}"
python=$1
case $python in "~/"*) python=$HOME/${python#"~/"} ;; esac
if python=$(command -v "$python" 2>/dev/null); then
  echo "interpreter $python"
  echo "python $("$python" -c 'import sys; print(*sys.version_info[:3], sep=chr(46))' 2>&1 | tail -n 1)"
fi
echo cpuinfo
cat /proc/cpuinfo 2>/dev/null
"""

# BASE NAME OWNER → "ready", BASE, df's last line; or "held SECONDS OWNER". Then reads until the connection ends.
GUARD = f"""
umask 077
mkdir -p "$1" && cd "$1" || exit {WRITING_FAILED}
[ -O . ] || {{ echo "$1 belongs to another user" >&2; exit {WRITING_FAILED}; }}
base=$(pwd -P)
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
now() {{ if [ -r /proc/uptime ]; then read -r up rest </proc/uptime; echo "${{up%%.*}}"; else date +%s; fi; }}
ours() {{ [ -n "$1" ] && [ "$(readlink "/proc/$1/cwd" 2>/dev/null)" = "$2" ]; }}
end_job() {{ job=$(cat "$1/job" 2>/dev/null); ours "$job" "$base/${{1%.lock}}" && kill "$job" 2>/dev/null; }}
alive() {{
  [ -s "$1/beat" ] || sleep 1
  [ "$(cat "$1/boot" 2>/dev/null)" = "$boot" ] || return 1
  ours "$(cat "$1/pid" 2>/dev/null)" "$base" || return 1
  beat=$(cat "$1/beat" 2>/dev/null)
  age=$(($(now) - ${{beat:-0}}))
  [ "$age" -le {SILENT_SECONDS} ]
}}
bury() {{
  if [ "$(cat "$1/boot" 2>/dev/null)" = "$boot" ]; then
    end_job "$1"
    guard=$(cat "$1/pid" 2>/dev/null)
    ours "$guard" "$base" && kill "$guard" 2>/dev/null
  fi
  rm -rf "$1"
}}
for lock in *.lock; do
  [ -d "$lock" ] || continue
  if ! alive "$lock"; then bury "$lock"
  elif [ "$lock" = "$2.lock" ]; then echo "held $age $(cat "$lock/owner")"; exit {HELD}; fi
done
for folder in *; do
  case $folder in "$2"|*[!0-9a-f]*) continue ;; esac
  [ "${{#folder}}" -eq "${{#2}}" ] || continue
  [ -e "$folder.lock" ] || [ -e "$folder.keep" ] || rm -rf "$folder"
done
lock=$2.lock
if ! mkdir "$lock"; then
  [ -d "$lock" ] && {{ echo "held 0 another run"; exit {HELD}; }}
  exit {WRITING_FAILED}
fi
sign() {{ echo "$3" >"$lock/owner" && echo "$boot" >"$lock/boot" && echo $$ >"$lock/pid" && now >"$lock/beat"; }}
{{ sign "$@" && mkdir -p "$2" && chmod 700 "$2"; }} || {{
  rm -rf "$lock"
  exit {WRITING_FAILED}
}}
watch() {{
  trap 'kill "$nap"; exit' TERM
  while :; do
    sleep {SILENT_SECONDS} &
    nap=$!
    wait "$nap"
    [ "$(cat "$lock/pid" 2>/dev/null)" = $$ ] || exit
    beat=$(cat "$lock/beat")
    if [ $(($(now) - ${{beat:-0}})) -gt {SILENT_SECONDS} ]; then end_job "$lock"; rm -rf "$lock"; kill $$; exit; fi
  done
}}
watch </dev/null >/dev/null 2>&1 &
watcher=$!
echo ready
echo "$base"
df -Pk . | tail -n 1
while read -r word; do now >"$lock/beat"; done
kill "$watcher"
end_job "$lock"
rm -rf "$lock"
cd / && rmdir "$base" 2>/dev/null
exit 0
"""

SHA = "sha() { if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi; }\n"

# FOLDER NAME… → one line each: "whole|part SIZE SHA256 -" or "none"
LIST = f"""
{SHA}
cd "$1" || exit {WRITING_FAILED}
shift
for name in "$@"; do
  if [ -f "$name" ]; then echo whole $(wc -c <"$name") $(sha <"$name")
  elif [ -f "$name.part" ]; then echo part $(wc -c <"$name.part") $(sha <"$name.part")
  else echo none; fi
done
"""

# FOLDER NAME SHA256 OFFSET MODE, the bytes from OFFSET on: standard input
PUSH = f"""
{SHA}
umask 077
cd "$1" && mkdir -p "$(dirname "$2")" || exit {WRITING_FAILED}
if [ "$4" -eq 0 ]; then : >"$2.part" || exit {WRITING_FAILED}; fi
exec 3<&0  # what runs in the background would read nothing
cat <&3 >>"$2.part" &
echo $! >"$1.lock/job"  # the guard can end it: one that was cut off must not hold the file
wait $! || exit {WRITING_FAILED}
rm -f "$1.lock/job"
set -- "$1" "$2" "$3" "$5" $(sha <"$2.part")
if [ "$3" != "$5" ]; then rm -f "$2.part"; exit {DAMAGED}; fi
chmod "$4" "$2.part" && mv -f "$2.part" "$2" || exit {WRITING_FAILED}
"""

# FOLDER COMMAND…: runs it there; the guard can end it
JOB = """
cd "$1" || exit 71
lock=$1.lock
shift
"$@" </dev/null &
job=$!
echo "$job" >"$lock/job"
wait "$job"
status=$?
rm -f "$lock/job"
exit "$status"
"""

# FOLDER: ends what JOB left running there
END_JOB = """
job=$(cat "$1.lock/job" 2>/dev/null)
[ -n "$job" ] && [ "$(readlink "/proc/$job/cwd" 2>/dev/null)" = "$1" ] && kill "$job"
exit 0
"""

# FOLDER: nothing of it stays
REMOVE = 'rm -rf "$1" "$1.keep"\n[ ! -e "$1" ]\n'

# FOLDER: the next run finds it, and no other run removes it
KEEP = ': >"$1.keep"\n'

# Python on the device, in the bundle's folder: LIBRARY… → {"what", "fix"} when the bundle cannot run there, else {"libraries": …}
PREFLIGHT = """
import importlib.metadata, importlib.util, json, sys

def preflight():
    if importlib.util.find_spec("numpy") is None:
        return {"what": "python3 has no numpy", "fix": "install it there: pip install numpy, or apt install python3-numpy"}
    sys.path.insert(0, "runner.pyz")
    from deploycc.errors import DeployError
    from deploycc.runtime.host import check_host
    with open("manifest.json", encoding="utf-8") as file:
        manifest = json.load(file)
    try:
        check_host(manifest)
    except DeployError as error:
        return {"what": error.what, "fix": error.fix}
    found = {}
    for name in sys.argv[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"libraries": found}

print(json.dumps(preflight()))
"""
