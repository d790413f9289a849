# What the kernel answers to calls that no worker needs; run inside.
import ctypes, errno, json, os, platform

libc = ctypes.CDLL(None, use_errno=True)
old = {"x86_64": 0, "aarch64": 1}[platform.machine()]
memory = ctypes.create_string_buffer(256)
calls = {
    "add_key": ((248, 217), b"user", b"name", b"value", 5, -3),
    "keyctl": ((250, 219), 0, -3, 0),
    "request_key": ((249, 218), b"user", b"name", 0, 0),
    "bpf": ((321, 280), 0, memory, 0),
    "perf_event_open": ((298, 241), memory, 0, -1, -1, 0),
    "open_by_handle_at": ((304, 265), 0, memory, 0),
    "setns": ((308, 268), 0, 0),
    "unshare a user namespace": ((272, 97), 0x10000000),
    "unshare a mount namespace": ((272, 97), 0x20000),
    "clone a user namespace": ((56, 220), 0x10000011, 0, 0, 0, 0),
    "mount": ((165, 40), b"none", b"/tmp", b"tmpfs", 0, 0),
    "kexec_load": ((246, 104), 0, 0, 0, 0),
}
answers = {}
for name, (number, *words) in calls.items():
    ctypes.set_errno(0)
    words = [word if isinstance(word, (bytes, ctypes.Array)) else ctypes.c_long(word) for word in words]
    said = libc.syscall(ctypes.c_long(number[old]), *words)
    if said == 0 and name.startswith("clone"):
        os._exit(0)
    answers[name] = errno.errorcode[ctypes.get_errno()] if said == -1 else said
with open("/proc/self/status") as status:
    for line in status:
        name, _, value = line.partition(":")
        if name in ("Seccomp", "NoNewPrivs", "CapEff", "CapBnd", "CapAmb"):
            answers[name] = value.strip()
# Nothing of the first process leads to the host.
for name in ("environ", "mem", "cwd", "root", "fd"):
    path = f"/proc/1/{name}"
    try:
        if name in ("cwd", "root"):
            answers[path] = os.readlink(path)
        elif name == "fd":
            answers[path] = sorted(os.readlink(f"{path}/{fd}") for fd in os.listdir(path))
        elif name == "environ":
            answers[path] = open(path).read()
    except OSError as error:
        answers[path] = errno.errorcode[error.errno]
json.dump(answers, open("answers.json", "w"))
