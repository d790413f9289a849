//! The filter of system calls: what is refused inside, and that ordinary tools do not notice.

use std::path::PathBuf;
use std::process::Command;

use sandbox::{Job, Limits, Output, Sandbox};

async fn run(job: Job) -> Output {
    let sandbox = Sandbox::detect().expect("bubblewrap works here");
    sandbox.run(&job).await.expect("ran")
}

async fn python(script: &str) -> String {
    let output = run(Job::new(["python3", "-c", script])).await;
    assert!(output.ended.success(), "{output:?}");
    output.tail
}

/// System calls by name, and `call`, which gives the name of the error or the number that was answered.
const CALLS: &str = r#"
import ctypes, errno, os, platform
libc = ctypes.CDLL(None, use_errno=True)
old = {"x86_64": 0, "aarch64": 1}[platform.machine()]
number = {name: numbers if type(numbers) is int else numbers[old] for name, numbers in {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265), "setns": (308, 268),
    "unshare": (272, 97), "clone": (56, 220), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "kexec_load": (246, 104), "syslog": (103, 116), "getpid": (39, 172),
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "clone3": 435, "openat2": 437,
    "pidfd_getfd": 438, "mount_setattr": 442, "fchmodat2": 452}.items()}
def call(name, *words):
    ctypes.set_errno(0)
    words = [w if isinstance(w, (bytes, ctypes.Array)) else ctypes.c_long(w) for w in words]
    said = libc.syscall(ctypes.c_long(number[name]), *words)
    return errno.errorcode[ctypes.get_errno()] if said == -1 else said
"#;

#[tokio::test]
async fn what_nobody_inside_needs_of_the_kernel_is_refused() {
    let script = format!(
        r#"{CALLS}
assert call("getpid") == os.getpid()
NEWUSER, NEWNET, NEWNS = 0x10000000, 0x40000000, 0x20000
memory = ctypes.create_string_buffer(256)
for name, *words in [
    ("ptrace", 0, 0, 0, 0), ("ptrace", 16, 1, 0, 0),
    ("process_vm_readv", 1, memory, 0, memory, 0, 0), ("process_vm_writev", 1, memory, 0, memory, 0, 0),
    ("kcmp", 1, 1, 0, 0, 0), ("pidfd_getfd", 0, 0, 0),
    # The session's and the user's own keys.
    ("keyctl", 0, -3, 0), ("keyctl", 0, -4, 0), ("keyctl", 11, -3, memory, 256),
    ("add_key", b"user", b"n", b"v", 1, -3), ("request_key", b"user", b"n", 0, 0),
    ("bpf", 0, memory, 0), ("perf_event_open", memory, 0, -1, -1, 0), ("userfaultfd", 1), ("userfaultfd", 0),
    ("io_uring_setup", 1, memory), ("open_by_handle_at", 0, memory, 0),
    ("unshare", NEWUSER), ("unshare", NEWUSER | NEWNET), ("unshare", NEWNS), ("unshare", 0x80),
    ("clone", NEWUSER | 17, 0, 0, 0, 0), ("setns", 0, 0),
    ("mount", b"none", b"/tmp", b"tmpfs", 0, 0), ("umount2", b"/tmp", 2), ("chroot", b"/tmp"), ("pivot_root", b"/", b"/"),
    ("open_tree", -100, b"/", 1), ("move_mount", -1, b"", -1, b"", 0), ("fsopen", b"tmpfs", 0), ("mount_setattr", -100, b"/", 0, memory, 32),
    ("kexec_load", 0, 0, 0, 0), ("syslog", 3, memory, 256),
]:
    said = call(name, *words)
    if said == 0 and name == "clone":
        os._exit(0)
    assert said == "EPERM", (name, words, said)
# As if the kernel were older: what they say is in memory, where it cannot be looked at.
for name in ["clone3", "openat2"]:
    assert call(name, -100, b"/tmp", memory, 24) == "ENOSYS", name
print("refused")
"#
    );
    assert_eq!(python(&script).await, "refused\n");
}

#[tokio::test]
async fn nobody_types_on_a_terminal_for_others() {
    let script = r#"
import fcntl, os, termios
leader, follower = os.openpty()
for command in [termios.TIOCSTI, 0x541C]:
    try:
        fcntl.ioctl(follower, command, b"x")
        print("TYPED")
    except PermissionError:
        print("refused")
termios.tcgetattr(follower)
"#;
    assert_eq!(python(script).await, "refused\nrefused\n");
}

#[tokio::test]
async fn sockets_are_those_that_a_namespace_holds() {
    // Virtual sockets lead to the machine under this one, whatever the network is; the kernel's ciphers need no network at all.
    let script = r#"
import errno, socket
for family in [40, 38, 29, 31, 17]:
    for kind in [1, 2, 3, 5]:
        try:
            socket.socket(family, kind)
            print("OPENED", family)
        except OSError as error:
            assert error.errno == errno.EAFNOSUPPORT, (family, kind, error)
for family in [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6]:
    socket.socket(family, socket.SOCK_STREAM)
socket.socketpair()
# The host's abstract sockets are in its network, which is not ours.
print(open("/proc/net/unix").read().count("@"))
"#;
    let outside = "artel-test-abstract";
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
            format!("{outside}-{}", std::process::id()),
        );
    let listener =
        std::os::unix::net::UnixListener::bind_addr(&address.expect("address")).expect("listener");
    assert_eq!(python(script).await, "0\n");
    drop(listener);
}

#[tokio::test]
async fn no_file_that_runs_as_its_owner_is_made_for_the_host() {
    let directory = tempfile::tempdir().expect("directory");
    let script = format!(
        r#"{CALLS}
os.chdir("/out")
open("plain", "w").close()
def refused(make):
    try:
        make()
        print("MADE", os.listdir("."))
    except PermissionError:
        pass
refused(lambda: os.chmod("plain", 0o4755))
refused(lambda: os.chmod("plain", 0o6711))
refused(lambda: os.fchmod(os.open("plain", os.O_RDONLY), 0o4755))
refused(lambda: os.open("made", os.O_CREAT | os.O_WRONLY, 0o4755))
refused(lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755))
refused(lambda: os.mknod("made", 0o104755))
assert call("fchmodat2", -100, b"plain", 0o4755, 0) == "EPERM"
# Folders may hand on their group, as everywhere.
os.mkdir("folder")
os.chmod("folder", 0o2775)
os.chmod("plain", 0o755)
os.close(os.open("own", os.O_CREAT | os.O_WRONLY, 0o700))
print(sorted(os.listdir(".")))
"#
    );
    let job = Job::new(["python3", "-c", &script]).mount_rw(directory.path(), "/out");
    let output = run(job).await;
    assert_eq!(
        output.tail, "['folder', 'own', 'plain']\n",
        "{:?}",
        output.ended
    );
}

fn toolchain() -> PathBuf {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .expect("rustc");
    String::from_utf8(output.stdout)
        .expect("text")
        .trim()
        .into()
}

fn roomy() -> Limits {
    Limits {
        tmp_mb: 512,
        wall_s: Some(120),
        ..Limits::default()
    }
}

#[tokio::test]
async fn git_gcc_and_python_work_as_ever() {
    let script = r#"set -eu; cd /tmp; mkdir p; cd p; git init -q; printf '#include <stdio.h>\n#include <pthread.h>\nstatic void *f(void *x) { return x; }\nint main(void) { pthread_t t; pthread_create(&t, 0, f, 0); pthread_join(t, 0); puts("built"); return 0; }\n' > a.c
printf 'a: a.c\n\tcc -O1 -pthread -o a a.c\n' > Makefile; make -s; ./a
git add a.c Makefile; git -c user.name=a -c user.email=a@b commit -qm One; git clone -q . ../c; git -C ../c log --format=%s; git gc -q; tar -cf - . | tar -xf - -C ../c
python3 - <<'EOF'
import asyncio, concurrent.futures, multiprocessing, os, sqlite3, subprocess, tempfile, threading
threading.Thread(target=print, args=("thread",)).start()
def work(n): return n * n
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool: print(pool.map(work, [1, 2, 3]))
async def main():
    process = await asyncio.create_subprocess_exec("echo", "child"); await process.wait()
asyncio.run(main())
sqlite3.connect("/tmp/db").execute("create table t (x)")
EOF"#;
    let output = run(Job::new(["sh", "-c", script]).limits(roomy())).await;
    let mut lines: Vec<&str> = output.tail.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["One", "[1, 4, 9]", "built", "child", "thread"],
        "{output:?}"
    );
}

#[tokio::test]
async fn node_and_npm_work_as_ever() {
    let script = r#"set -eu; export npm_config_update_notifier=false; cd /tmp; mkdir dep p; cd dep; npm init -y >/dev/null; echo 'module.exports = 42' > index.js
cd ../p; npm init -y >/dev/null; npm install --offline --no-audit --no-fund --silent ../dep
cat > a.js <<'EOF'
const { Worker } = require('worker_threads'), { execFileSync } = require('child_process'), fs = require('fs');
console.log('dep', require('dep'), execFileSync('echo', ['child']).toString().trim());
fs.promises.writeFile('/tmp/x', 'x').then(() => fs.promises.readFile('/tmp/x', 'utf8')).then(x => console.log('file', x));
new Worker('require("worker_threads").parentPort.postMessage("worker")', { eval: true }).on('message', m => console.log(m));
require('http').createServer((q, s) => s.end('served')).listen(0, '127.0.0.1', function () {
  fetch('http://127.0.0.1:' + this.address().port).then(r => r.text()).then(t => { console.log(t); this.close(); }); });
EOF
node a.js; npm pkg set scripts.test='echo tested' >/dev/null; npm test --silent"#;
    let output = run(Job::new(["sh", "-c", script]).limits(roomy())).await;
    let mut lines: Vec<&str> = output.tail.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["dep 42 child", "file x", "served", "tested", "worker"],
        "{output:?}"
    );
}

#[tokio::test]
async fn cargo_works_as_ever() {
    let script = r#"set -eu; export PATH=/toolchain/bin:$PATH CARGO_HOME=/tmp/cargo; cargo new -q --vcs none /tmp/p; cd /tmp/p
printf 'fn main() { println!("cargo:rustc-env=BUILT=by-a-script"); }\n' > build.rs
printf 'fn main() { std::thread::spawn(|| println!("{}", env!("BUILT"))).join().unwrap(); }\n' > src/main.rs
cargo run -q --offline"#;
    let job = Job::new(["sh", "-c", script])
        .mount_ro(toolchain(), "/toolchain")
        .limits(roomy());
    let output = run(job).await;
    assert_eq!(output.tail, "by-a-script\n", "{:?}", output.ended);
}
