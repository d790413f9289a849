//! What a confined command sees, and what it does not.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use sandbox::{Job, Limits, Output, Reason, Sandbox, Stdin, relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn sandbox() -> Sandbox {
    Sandbox::detect().expect("bubblewrap works here")
}

fn shell(script: &str) -> Job {
    Job::new(["sh", "-c", script])
}

async fn run(job: Job) -> Output {
    sandbox().run(&job).await.expect("ran")
}

fn launcher() -> PathBuf {
    env!("CARGO_BIN_EXE_sandbox-launch").into()
}

#[tokio::test]
async fn the_environment_is_the_explicit_list() {
    let job = Job::new(["env"]).env("GIVEN", "a value with\nlines");
    let output = run(job).await;
    assert!(output.ended.success(), "{output:?}");
    let mut names: Vec<_> = output
        .tail
        .lines()
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["GIVEN", "HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER"]
    );
    assert!(output.tail.contains("a value with\nlines"));
    // The first process of the namespace has nothing of ours either.
    let first = run(shell(
        "tr '\\0' '\\n' </proc/1/environ; tr '\\0' ' ' </proc/1/cmdline",
    ))
    .await;
    assert!(
        first.tail.starts_with("PWD=/\nSHLVL=0\n/usr/bin/bwrap"),
        "{}",
        first.tail
    );
    assert!(!first.tail.contains("--setenv"), "{}", first.tail);
}

#[tokio::test]
async fn nothing_of_the_host_is_there_that_is_not_listed() {
    let script = r#"
        for path in /root /home/ubuntu /etc/shadow /etc/sudoers /sys /var/lib /work /opt /mnt /boot; do
            if [ -e "$path" ]; then echo "FOUND $path"; fi
        done
        ls /home /etc
        wc -l </etc/passwd
        cat /etc/shadow && echo READ
        for path in /x /dev/x /usr/x /etc/x /run/x; do
            if ( : >"$path" ) 2>/dev/null; then echo "WROTE $path"; fi
        done
        for path in /proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger; do
            if [ -e "$path" ] && ( : >>"$path" ) 2>/dev/null; then echo "OPENED $path"; fi
        done
        echo fine >/dev/null && echo ok >/dev/stdout
    "#;
    let output = run(shell(script)).await;
    for bad in ["FOUND", "READ", "WROTE", "OPENED"] {
        assert!(!output.tail.contains(bad), "{}", output.tail);
    }
    assert!(output.tail.contains("ok"), "{}", output.tail);
    assert!(output.tail.contains("artel"), "{}", output.tail);
}

#[tokio::test]
async fn it_is_nobody_with_no_rights_on_a_host_of_its_own() {
    let script = "id -u; hostname; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; \
                  ls /proc | grep -c '^[0-9]'; unshare -U true 2>&1 && echo NESTED";
    let output = run(shell(script)).await;
    let lines: Vec<_> = output.tail.lines().collect();
    assert_eq!(lines[..2], ["1000", "sandbox"], "{}", output.tail);
    assert_eq!(lines[2], "CapBnd:\t0000000000000000".replace("Bnd", "Eff"));
    assert_eq!(lines[3], "CapBnd:\t0000000000000000");
    assert_eq!(lines[4], "NoNewPrivs:\t1");
    let processes: u32 = lines[5].parse().expect("a number");
    assert!(processes < 8, "{}", output.tail);
    assert!(!output.tail.contains("NESTED"), "{}", output.tail);
}

#[tokio::test]
async fn there_is_no_network_but_its_own_loopback() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("listener");
    let port = listener.local_addr().expect("address").port();
    let script = format!(
        r#"
import socket, threading
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
    print("REACHED")
except ConnectionRefusedError:
    print("refused")
own = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: own.accept()[0].sendall(b"own")).start()
print(socket.create_connection(own.getsockname(), 2).recv(3))
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53))
    print("ROUTED")
except OSError as error:
    print("unreachable")
"#
    );
    let output = run(Job::new(["python3", "-c", &script])).await;
    assert_eq!(output.tail, "refused\nb'own'\nunreachable\n");
    drop(listener);
}

#[tokio::test]
async fn mounts_are_writable_or_not_and_files_belong_to_us() {
    let directory = tempfile::tempdir().expect("directory");
    let (ro, rw) = (directory.path().join("ro"), directory.path().join("rw"));
    std::fs::create_dir(&ro).expect("directory");
    std::fs::create_dir(&rw).expect("directory");
    std::fs::write(ro.join("given"), "given").expect("written");
    // Only we may enter: the sandbox must get in all the same.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700))
        .expect("mode");
    let script = "cat /in/given; echo no >/in/given; mkdir -m 700 d; echo made >d/f; ln -s /etc/shadow link; stat -c %u d/f";
    let job = shell(script)
        .mount_ro(&ro, "/in")
        .mount_rw(&rw, "/workspace")
        .cwd("/workspace");
    let output = run(job).await;
    assert!(output.tail.starts_with("given"), "{}", output.tail);
    assert!(output.tail.ends_with("1000\n"), "{}", output.tail);
    assert_eq!(
        std::fs::read_to_string(ro.join("given")).expect("read"),
        "given"
    );
    assert_eq!(
        std::fs::read_to_string(rw.join("d/f")).expect("read"),
        "made\n"
    );
    let uid = std::fs::metadata(rw.join("d/f")).expect("there").uid();
    assert_eq!(uid, rustix::process::geteuid().as_raw());
    directory.close().expect("removable");
}

#[tokio::test]
async fn git_and_python_work_inside() {
    let script = "git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m one && git log --format=%s && python3 -c 'import ssl, sqlite3, http.server; print(1)'";
    let output = run(shell(script)).await;
    assert_eq!(output.tail, "one\n1\n");
}

#[tokio::test]
async fn input_is_given_and_inherited_descriptors_are_not() {
    let job = shell("cat; ls /proc/self/fd").stdin(Stdin::Bytes(b"typed\n".to_vec()));
    // Left open on purpose, as a build tool leaves its job server open.
    let leaked = std::fs::File::open("/etc/hostname").expect("open");
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).expect("inheritable");
    let output = run(job).await;
    // 3 is the directory that `ls` reads.
    assert_eq!(output.tail, "typed\n0\n1\n2\n3\n");
}

#[tokio::test]
async fn ends_are_told_apart() {
    assert_eq!(run(shell("exit 7")).await.ended.reason, Reason::Exited(7));
    assert_eq!(
        run(shell("kill -9 $$")).await.ended.reason,
        Reason::Signalled(9)
    );
    let missing = run(Job::new(["no-such-program"])).await;
    assert!(missing.ended.reason == Reason::Exited(127), "{missing:?}");
    assert!(missing.tail.contains("no-such-program"), "{missing:?}");
    let nowhere = sandbox().run(&shell("true").cwd("/nowhere")).await;
    let message = nowhere.expect_err("no such directory").to_string();
    assert!(message.contains("/nowhere"), "{message}");
}

#[tokio::test]
async fn lines_come_while_it_runs_and_usage_is_measured() {
    let script = "import sys, time\nprint('first', flush=True)\nsys.stdin.read()\nx = bytearray(64 << 20)\nt = time.process_time()\nwhile time.process_time() - t < 0.4: pass\nprint('last')";
    let mut running = sandbox()
        .spawn(&Job::new(["python3", "-c", script]))
        .expect("started");
    assert_eq!(running.next_line().await.expect("a line").text, "first");
    assert_eq!(running.next_line().await.expect("a line").text, "last");
    assert!(running.next_line().await.is_none());
    let ended = running.wait().await.expect("ended");
    assert!(ended.success());
    assert!(ended.cpu_s >= 0.3 && ended.cpu_s < 5.0, "{ended:?}");
    assert!((64..400).contains(&ended.peak_memory_mb), "{ended:?}");
}

#[tokio::test]
async fn relays_lead_in_and_out() {
    let directory = tempfile::tempdir().expect("directory");
    let broker = relay::listen(&directory.path().join("broker.sock")).expect("listener");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = broker.accept().await {
            let mut asked = [0; 4];
            let _ = stream.read_exact(&mut asked).await;
            let _ = stream.write_all(b"outside heard ").await;
            let _ = stream.write_all(&asked).await;
        }
    });
    let script = r#"
import socket, sys
server = socket.create_server(("127.0.0.1", 8080))
print("listening", flush=True)
out = socket.create_connection(("127.0.0.1", 9000)); out.sendall(b"ping")
said = b""
while True:
    more = out.recv(100)
    if not more: break
    said += more
conn, _ = server.accept()
conn.sendall(b"inside says: " + said)
"#;
    let job = Job::new(["python3", "-c", script])
        .mount_rw(directory.path(), "/run/artel/io")
        .launcher(launcher(), Vec::new())
        .relay_out(
            "127.0.0.1:9000".parse().expect("address"),
            "/run/artel/io/broker.sock",
        )
        .relay_in(
            "/run/artel/io/in.sock",
            "127.0.0.1:8080".parse().expect("address"),
        );
    let mut running = sandbox().spawn(&job).expect("started");
    assert_eq!(running.next_line().await.expect("a line").text, "listening");
    let mut stream = relay::connect(&directory.path().join("in.sock"))
        .await
        .expect("connected");
    let mut said = String::new();
    stream.read_to_string(&mut said).await.expect("read");
    assert_eq!(said, "inside says: outside heard ping");
    assert!(running.wait().await.expect("ended").success());
}

#[tokio::test]
async fn the_launcher_hands_on_codes_and_signals() {
    let with = |script: &str| shell(script).launcher(launcher(), Vec::new());
    assert_eq!(run(with("exit 9")).await.ended.reason, Reason::Exited(9));
    assert_eq!(
        run(with("kill -6 $$")).await.ended.reason,
        Reason::Signalled(6)
    );
    let script = "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running = sandbox().spawn(&with(script)).expect("started");
    assert_eq!(running.next_line().await.expect("a line").text, "ready");
    let ended = running.stop(Duration::from_secs(40)).await.expect("ended");
    assert_eq!(ended.reason, Reason::Stopped);
    assert!(ended.wall_s < 30.0, "{ended:?}");
    assert!(running.tail().contains("asked"), "{}", running.tail());
}

#[tokio::test]
async fn private_directories_have_a_size() {
    let script = "for d in /tmp /dev/shm $HOME; do head -c 9000000 /dev/zero >$d/f && echo FILLED; done; echo end";
    let limits = Limits {
        tmp_mb: 4,
        ..Limits::default()
    };
    let output = run(shell(script).limits(limits)).await;
    assert!(
        !output.tail.contains("FILLED") && output.tail.ends_with("end\n"),
        "{}",
        output.tail
    );
}
