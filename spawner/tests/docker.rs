//! Containers on a real engine (`scripts/with-docker` starts one): what they can and cannot do, and what is known of their ends.

use sandbox::Reason;
use spawner::docker::{Engine, Error, LABEL, Limits, Mount, Spec};
use std::collections::BTreeMap;
use std::time::Duration;

const SOON: Duration = Duration::from_mins(1);
const GRACE: Duration = Duration::from_millis(500);

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set; run the tests through scripts/test, which starts a Docker engine"
        )
    })
}

async fn engine() -> Engine {
    Engine::connect(Some(&variable("ARTEL_TEST_DOCKER_HOST")), "runc")
        .await
        .unwrap()
}

/// A container of its own test: named after it, with a label that tells it from those of other tests.
struct Stage {
    engine: Engine,
    spec: Spec,
    folder: tempfile::TempDir,
}

impl Stage {
    async fn new(script: &str) -> Self {
        let engine = engine().await;
        let image = engine.image(&variable("ARTEL_TEST_IMAGE")).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(folder.path(), Some(1000), Some(1000)).unwrap();
        let name = format!(
            "artel-test-{}",
            folder
                .path()
                .file_name()
                .unwrap()
                .display()
                .to_string()
                .trim_start_matches('.')
        );
        let spec = Spec {
            labels: BTreeMap::from([("spawner".to_owned(), name.clone())]),
            name,
            image,
            argv: ["sh", "-c", script].map(str::to_owned).into(),
            env: vec![("GIVEN".to_owned(), "yes".to_owned())],
            user: (1000, 1000),
            cwd: "/workspace".into(),
            mounts: vec![Mount {
                host: folder.path().to_owned(),
                guest: "/workspace".into(),
                writable: true,
            }],
            limits: Limits {
                cpu: 1.0,
                memory_mb: 128,
                pids: 64,
                tmp_mb: 16,
                wall_s: Some(60),
                disk: None,
                system_mb: None,
            },
            docker_inside: false,
        };
        Self {
            engine,
            spec,
            folder,
        }
    }

    async fn start(&self) -> spawner::docker::Running {
        let id = self.engine.create(&self.spec).await.unwrap();
        self.engine.start(&id, &self.spec.limits).await.unwrap()
    }

    /// Runs it to its end: why, and what it said.
    async fn run(&self) -> (spawner::docker::Ended, String) {
        let mut running = self.start().await;
        let ended = tokio::time::timeout(SOON, running.wait())
            .await
            .unwrap()
            .unwrap();
        let tail = running.tail();
        self.engine.remove(running.id()).await.unwrap();
        assert!(self.ours().await.is_empty(), "nothing is left over");
        (ended, tail)
    }

    async fn ours(&self) -> Vec<spawner::docker::Found> {
        self.engine.ours(&self.spec.name).await.unwrap()
    }
}

#[tokio::test]
async fn a_container_is_run_to_its_end_and_said_what_it_said() {
    let stage =
        Stage::new("echo one; echo two >&2; id -u; echo $GIVEN; echo x > file; exit 3").await;
    let mut running = stage.start().await;
    let mut lines = running.take_lines().unwrap();
    let ended = tokio::time::timeout(SOON, running.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.reason, Reason::Exited(3));
    assert!(!ended.out_of_memory);
    let mut said = Vec::new();
    while let Ok(line) = lines.try_recv() {
        said.push(line.text);
    }
    said.sort();
    assert_eq!(said, ["1000", "one", "two", "yes"]);
    assert!(running.tail().contains("two"));
    let written = std::fs::read_to_string(stage.folder.path().join("file")).unwrap();
    assert_eq!(written, "x\n");
    stage.engine.remove(running.id()).await.unwrap();
}

#[tokio::test]
async fn a_container_has_no_network_but_its_own_loopback() {
    let stage = Stage::new(
        "cat /proc/net/dev | tail -n +3 | wc -l; cat /proc/net/route | tail -n +2 | wc -l",
    )
    .await;
    let (ended, said) = stage.run().await;
    assert_eq!(ended.reason, Reason::Exited(0));
    assert_eq!(said, "1\n0\n");
}

#[tokio::test]
async fn a_container_cannot_write_to_its_system_nor_gain_privileges() {
    let script = "touch /bin/x /etc/x 2>&1; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; ls /run/docker.sock /var/run/docker.sock 2>&1 | grep -c 'No such'";
    let (_, said) = Stage::new(script).await.run().await;
    assert_eq!(said.matches("Read-only file system").count(), 2, "{said}");
    assert!(said.contains("CapEff:\t0000000000000000"), "{said}");
    assert!(said.contains("CapBnd:\t0000000000000000"), "{said}");
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    assert!(said.ends_with("2\n"), "{said}");
}

#[tokio::test]
async fn a_memory_bomb_ends_for_want_of_memory() {
    let stage =
        Stage::new("exec python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'").await;
    let (ended, _) = stage.run().await;
    assert_eq!(ended.reason, Reason::Memory, "{ended:?}");
    assert!(ended.out_of_memory);
}

#[tokio::test]
async fn a_fork_bomb_gets_no_further_than_its_limit() {
    let script = "python3 -c '
import os, sys, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    print(\"stopped\", made < 64)
    sys.stdout.flush()
    os.kill(-1, 9)
'";
    let (_, said) = Stage::new(script).await.run().await;
    assert!(said.contains("stopped True"), "{said}");
}

#[tokio::test]
async fn a_disk_bomb_is_ended_and_tmp_is_bounded_by_itself() {
    let mut stage = Stage::new("dd if=/dev/zero of=/tmp/x bs=1M count=64 2>&1 | tail -1; dd if=/dev/zero of=big bs=1M count=40 2>/dev/null; sleep 60").await;
    stage.spec.limits.disk = Some((stage.folder.path().to_owned(), 20));
    let (ended, said) = stage.run().await;
    assert_eq!(ended.reason, Reason::Disk, "{said}");
}

#[tokio::test]
async fn what_runs_too_long_is_ended() {
    let mut stage = Stage::new("trap '' TERM; while true; do sleep 1; done").await;
    stage.spec.limits.wall_s = Some(1);
    let (ended, _) = stage.run().await;
    assert_eq!(ended.reason, Reason::Wall);
}

#[tokio::test]
async fn a_stop_is_gentle_first_and_hard_after_its_grace() {
    let gentle =
        Stage::new("trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
            .await;
    let mut running = gentle.start().await;
    running.take_lines().unwrap().recv().await.unwrap();
    running.stopper().stop(SOON);
    let ended = tokio::time::timeout(SOON, running.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.reason, Reason::Stopped);
    assert_eq!(ended.exit_code, 0);
    assert!(running.tail().contains("bye"));
    gentle.engine.remove(running.id()).await.unwrap();
    let hard = Stage::new("trap '' TERM; echo ready; while true; do sleep 0.05; done").await;
    let mut running = hard.start().await;
    running.take_lines().unwrap().recv().await.unwrap();
    running.stopper().stop(GRACE);
    let ended = tokio::time::timeout(SOON, running.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((ended.reason, ended.exit_code), (Reason::Stopped, 137));
    hard.engine.remove(running.id()).await.unwrap();
}

#[tokio::test]
async fn a_container_outlives_its_watcher_and_is_adopted_by_the_next_one() {
    let stage =
        Stage::new("echo before; while [ ! -e go ]; do sleep 0.05; done; echo after; exit 7").await;
    let mut running = stage.start().await;
    running.take_lines().unwrap().recv().await.unwrap();
    drop(running);
    let found = stage.ours().await;
    assert_eq!(found.len(), 1);
    assert!(found[0].running);
    assert_eq!(
        found[0].labels[&format!("{LABEL}.spawner")],
        stage.spec.name
    );
    let mut adopted = stage.engine.adopt(&found[0].id, &stage.spec.limits);
    std::fs::write(stage.folder.path().join("go"), "").unwrap();
    let ended = tokio::time::timeout(SOON, adopted.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.reason, Reason::Exited(7));
    assert!(adopted.tail().contains("after"), "{}", adopted.tail());
    // One that ended while nobody watched still tells how.
    let mut late = stage.engine.adopt(&found[0].id, &stage.spec.limits);
    let ended = tokio::time::timeout(SOON, late.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.reason, Reason::Exited(7));
    stage.engine.remove(&found[0].id).await.unwrap();
    let gone = stage
        .engine
        .adopt(&found[0].id, &stage.spec.limits)
        .wait()
        .await;
    assert!(matches!(gone, Err(Error::Gone { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_name_that_is_taken_by_a_container_of_ours_is_given_to_the_next_one() {
    let stage = Stage::new("sleep 60").await;
    let first = stage.engine.create(&stage.spec).await.unwrap();
    let second = stage.engine.create(&stage.spec).await.unwrap();
    assert_ne!(first, second);
    stage.engine.remove(&second).await.unwrap();
    assert!(stage.ours().await.is_empty());
}

#[tokio::test]
async fn a_container_of_somebody_else_is_never_removed() {
    let stage = Stage::new("sleep 60").await;
    let docker = bollard::Docker::connect_with_host(&variable("ARTEL_TEST_DOCKER_HOST")).unwrap();
    let docker = docker.negotiate_version().await.unwrap();
    let body = bollard::models::ContainerCreateBody {
        image: Some(stage.spec.image.clone()),
        cmd: Some(vec!["true".to_owned()]),
        ..Default::default()
    };
    let theirs = docker.create_container(None, body).await.unwrap().id;
    let refused = stage.engine.remove(&theirs).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    docker.inspect_container(&theirs, None).await.unwrap();
    docker.remove_container(&theirs, None).await.unwrap();
}

#[tokio::test]
async fn sysbox_is_asked_for_by_its_name() {
    // The engine's runtime of this name is runc behind a script that writes its calls down and adds a user namespace; see
    // scripts/with-docker.
    let engine = Engine::connect(Some(&variable("ARTEL_TEST_DOCKER_HOST")), "sysbox-runc")
        .await
        .unwrap();
    assert!(engine.describe().ends_with("with sysbox-runc"));
    let mut stage = Stage::new("cat /proc/self/uid_map; sleep 600").await;
    stage.engine = engine;
    let id = stage.engine.create(&stage.spec).await.unwrap();
    let mut running = stage.engine.start(&id, &stage.spec.limits).await.unwrap();
    let mut lines = running.take_lines().unwrap();
    let first = tokio::time::timeout(SOON, lines.recv()).await.unwrap();
    let first = first.unwrap().text;
    assert!(!first.trim().starts_with("0          0"), "{first}");
    stage.engine.remove(&id).await.unwrap();
    let calls = std::fs::read_to_string(variable("ARTEL_TEST_RUNTIME_LOG")).unwrap();
    assert!(
        calls.contains(&id),
        "the runtime was called for this container"
    );
}

#[tokio::test]
async fn a_runtime_that_only_has_the_name_of_sysbox_is_refused_and_what_it_started_ended() {
    let engine = Engine::connect(Some(&variable("ARTEL_TEST_DOCKER_HOST")), "sysbox-runc")
        .await
        .unwrap();
    let mut stage = Stage::new("sleep 600").await;
    stage.engine = engine;
    // To the script that stands for Sysbox: hand this one to runc as it is.
    let name = ("ARTEL_TEST_ONLY_THE_NAME".to_owned(), "1".to_owned());
    stage.spec.env.push(name);
    let id = stage.engine.create(&stage.spec).await.unwrap();
    let refused = stage.engine.start(&id, &stage.spec.limits).await.err();
    let text = refused.unwrap().to_string();
    for words in [
        "root of this machine",
        "uid_map 0 0",
        "SPAWNER_RUNTIME",
        "docs/sysbox.md",
    ] {
        assert!(text.contains(words), "{text}");
    }
    let mut over = stage.engine.adopt(&id, &stage.spec.limits);
    let ended = tokio::time::timeout(SOON, over.wait()).await.unwrap();
    assert_eq!(ended.unwrap().exit_code, 137);
    stage.engine.remove(&id).await.unwrap();
}

/// The tests' image with a folder `/open` that everybody may write into.
struct Open(String);

impl Open {
    fn new(name: &str, change: &str) -> Self {
        let name = format!("artel-test-{name}-{}", std::process::id());
        let image = variable("ARTEL_TEST_IMAGE");
        let make = ["mkdir", "-m", "1777", "/open"];
        let run = ["run", "--name", &name, "--network", "none", "--user", "0:0"];
        docker(&[&run[..], &[&image], &make[..]].concat());
        docker(&["commit", "--change", change, &name, &name]);
        docker(&["rm", &name]);
        Self(name)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        docker(&["rmi", "-f", &self.0]);
    }
}

fn docker(args: &[&str]) {
    let done = std::process::Command::new("docker")
        .env("DOCKER_HOST", variable("ARTEL_TEST_DOCKER_HOST"))
        .args(args)
        .output()
        .unwrap();
    assert!(done.status.success(), "{args:?}: {done:?}");
}

/// A container, with Docker inside, that writes 32 MiB beside its workspace, and may write 16.
async fn writes_too_much(image: &Open) -> Stage {
    let mut stage = Stage::new("head -c 33554432 /dev/zero > /open/big; sleep 600").await;
    stage.spec.image = stage.engine.image(&image.0).await.unwrap();
    stage.spec.docker_inside = true;
    stage.spec.limits.system_mb = Some(16);
    stage
}

#[tokio::test]
async fn a_writable_system_that_grows_beyond_its_limit_ends_its_container() {
    let image = Open::new("system", "ENV OPEN=yes");
    // This engine's storage has no quotas, and says so.
    let (ended, _) = writes_too_much(&image).await.run().await;
    assert_eq!(ended.reason, Reason::Disk);
}

#[tokio::test]
async fn a_volume_of_the_image_that_grows_beyond_the_limit_ends_its_container() {
    let image = Open::new("volume", "VOLUME /open");
    // Whether the system beside it may be written to or not.
    for docker_inside in [true, false] {
        let mut stage = writes_too_much(&image).await;
        stage.spec.docker_inside = docker_inside;
        let (ended, _) = stage.run().await;
        assert_eq!(ended.reason, Reason::Disk, "{docker_inside}");
    }
}

#[tokio::test]
async fn a_writable_system_is_bounded_by_whoever_adopts_its_container_as_well() {
    let image = Open::new("adopted", "ENV OPEN=yes");
    let mut stage = writes_too_much(&image).await;
    let limits = stage.spec.limits.clone();
    stage.spec.limits.system_mb = None;
    let running = stage.start().await;
    let id = running.id().to_owned();
    // As when its spawner dies.
    drop(running);
    let mut adopted = stage.engine.adopt(&id, &limits);
    let ended = tokio::time::timeout(SOON, adopted.wait()).await.unwrap();
    assert_eq!(ended.unwrap().reason, Reason::Disk);
    stage.engine.remove(&id).await.unwrap();
}

#[tokio::test]
async fn a_runtime_that_the_engine_lacks_is_named_with_what_to_do() {
    let refused = Engine::connect(Some(&variable("ARTEL_TEST_DOCKER_HOST")), "kata").await;
    let text = refused.err().unwrap().to_string();
    assert!(
        text.contains("\"kata\"") && text.contains("SPAWNER_RUNTIME") && text.contains("runc"),
        "{text}"
    );
}

#[tokio::test]
async fn an_engine_that_is_not_there_or_no_address_is_named() {
    let refused = Engine::connect(Some("unix:///nonexistent/docker.sock"), "runc").await;
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("/nonexistent/docker.sock"), "{text}");
    let refused = Engine::connect(Some("nonsense"), "runc").await;
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("DOCKER_HOST"), "{text}");
}

#[tokio::test]
async fn an_image_that_is_missing_is_named_with_what_to_do() {
    let engine = engine().await;
    let text = engine
        .image("artel-no-such-image:dev")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("artel-no-such-image:dev") && text.contains("make image"),
        "{text}"
    );
    // Nobody listens there.
    let digest = "0".repeat(64);
    let name = format!("127.0.0.1:1/worker@sha256:{digest}");
    let text = engine.image(&name).await.unwrap_err().to_string();
    assert!(text.contains("cannot be pulled"), "{text}");
}

#[tokio::test]
async fn a_line_of_a_hundred_megabytes_is_cut_and_costs_no_memory() {
    let script = "python3 -c 'import sys\nfor _ in range(100): sys.stdout.write(\"x\" * (1 << 20))' ; echo; echo end";
    let (ended, said) = Stage::new(script).await.run().await;
    assert_eq!(ended.reason, Reason::Exited(0));
    assert!(said.len() <= 64 * 1024, "{}", said.len());
    assert!(said.ends_with("end\n"));
}
