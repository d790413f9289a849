//! Docker inside a worker: Sysbox is asked for, and its absence is said. Sysbox itself is tried only where it is installed.

use crate::stage::{
    Cleanup, Stage, assert_succeeded, containers as containers_of, docker, kind, runtime, until,
    variable, worker_image,
};
use spawner::runtime::{Containers, DockerOptions, Runtime, Warm};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const COMMIT: &str = "id -u > user; git add user; git commit -q -m 'Add the user'";

#[tokio::test]
async fn a_worker_with_docker_inside_is_root_in_sysbox_whatever_runtime_others_have() {
    // The engine's runtime of this name is runc behind a script that writes its calls down and adds a user namespace; see
    // scripts/with-docker.
    let stage = Stage::new([]).await;
    let mut request = stage.script(
        "r1",
        1,
        &format!("touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {COMMIT}"),
    );
    request.docker = true;
    stage.submit(&request).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let label = stage.cleanup.0.clone().unwrap();
    let ids = containers_of(&label);
    assert_eq!(ids.len(), 1);
    let about = docker(&[
        "inspect",
        "-f",
        "{{.HostConfig.Runtime}} {{.Config.User}} {{.HostConfig.Privileged}} {{.HostConfig.NetworkMode}}",
        &ids[0],
    ]);
    assert_eq!(about.trim(), "sysbox-runc 0:0 false none");
    std::fs::write(stage.workspace().join("go"), "").unwrap();
    assert_succeeded(&stage.result("r1").await);
    assert_eq!(stage.show("user"), "0\n");
    let calls = std::fs::read_to_string(variable("ARTEL_TEST_RUNTIME_LOG")).unwrap();
    assert!(calls.contains(&ids[0]), "the runtime was called for it");
    // The next attempt takes over what root has left, and is not root.
    let second = stage.script("r2", 2, COMMIT);
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(stage.show("user"), "1000\n");
}

/// A stage whose workers run in containers of this image, and the label of these.
async fn stage_of(folder: tempfile::TempDir, runtime: &str, image: &str) -> (Stage, String) {
    let containers = Containers::connect(DockerOptions {
        host: Some(variable("ARTEL_TEST_DOCKER_HOST")),
        runtime: runtime.to_owned(),
        image: image.to_owned(),
        spawner: "local".to_owned(),
        home: folder.path().join("home"),
        warm: Warm::default(),
    })
    .await
    .unwrap();
    let label = containers.label().to_owned();
    let cleanup = Cleanup(Some(label.clone()));
    let stage = Stage::with(folder, Arc::new(containers), cleanup, []).await;
    (stage, label)
}

#[tokio::test]
async fn a_sysbox_that_is_none_runs_no_worker_and_who_can_mend_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    drop(runtime(&folder.path().join("home")).await);
    // What stands for Sysbox here hands containers of this image to runc as they are.
    let image = format!("artel-test-only-the-name:{}", std::process::id());
    let made = docker(&["create", &worker_image(), "true"]);
    let change = "ENV ARTEL_TEST_ONLY_THE_NAME=1";
    docker(&["commit", "--change", change, made.trim(), &image]);
    docker(&["rm", made.trim()]);
    let (stage, label) = stage_of(folder, "sysbox-runc", &image).await;
    for (n, docker) in [(1, false), (2, true)] {
        let mut request = stage.script(&format!("r{n}"), n, COMMIT);
        request.docker = docker;
        // The second one without the workspace of the first, which would be brought up to date in a worker.
        request.task_id = format!("task-{n}");
        let result = stage.run(&request).await;
        assert_eq!(kind(&result), spawner::kind::UNSUPPORTED, "{result:#?}");
        let said = result.failure.unwrap().message;
        for words in ["no more than the name", "an admin", "SPAWNER_RUNTIME"] {
            assert!(said.contains(words), "{said}");
        }
    }
    until(async || containers_of(&label).is_empty().then_some(())).await;
    drop(stage);
    docker(&["rmi", "-f", &image]);
}

#[tokio::test]
async fn what_a_worker_with_docker_inside_writes_beside_its_workspace_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    drop(runtime(&folder.path().join("home")).await);
    // With a folder that everybody may write into.
    let image = format!("artel-test-open:{}", std::process::id());
    let name = format!("artel-test-open-{}", std::process::id());
    let (base, root) = (worker_image(), ["--network", "none", "--user", "0:0"]);
    let make = [base.as_str(), "mkdir", "-m", "1777", "/open"];
    docker(&[&["run", "--name", &name], &root[..], &make[..]].concat());
    docker(&["commit", &name, &image]);
    docker(&["rm", &name]);
    let (stage, label) = stage_of(folder, "runc", &image).await;
    let script = "head -c 67108864 /dev/zero > /open/big; touch here; sleep 600";
    let mut request = stage.script("r1", 1, script);
    request.docker = true;
    request.limits.disk_mb = 32;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_DISK, "{result:#?}");
    assert!(stage.workspace().join("here").exists(), "it was written");
    until(async || containers_of(&label).is_empty().then_some(())).await;
    // What is written within the limit harms nobody.
    let script = format!("rm here; head -c 1000000 /dev/zero > /open/small; {COMMIT}");
    let mut second = stage.script("r2", 2, &script);
    second.docker = true;
    second.limits.disk_mb = 32;
    assert_succeeded(&stage.run(&second).await);
    drop(stage);
    docker(&["rmi", "-f", &image]);
}

/// An engine that has runc alone and answers nothing but what it is.
fn engine_without_sysbox(socket: &std::path::Path) {
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut asked = Vec::new();
                let mut part = [0; 4096];
                while !asked.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut part).await {
                        Ok(n) if n > 0 => asked.extend_from_slice(&part[..n]),
                        _ => return,
                    }
                }
                let asked = String::from_utf8_lossy(&asked).into_owned();
                let path = asked.split(' ').nth(1).unwrap_or_default();
                let body = if path.ends_with("/version") {
                    r#"{"ApiVersion": "1.41", "Version": "1"}"#
                } else if path.ends_with("/info") {
                    r#"{"Runtimes": {"runc": {"path": "runc"}}, "NCPU": 1, "ServerVersion": "1"}"#
                } else if path.contains("/images/") {
                    r#"{"Id": "sha256:1"}"#
                } else {
                    "[]"
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
}

#[tokio::test]
async fn an_engine_without_sysbox_refuses_docker_inside_and_names_how_to_install_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("docker.sock");
    engine_without_sysbox(&socket);
    let home = folder.path().join("home");
    let options = |runtime: &str| DockerOptions {
        host: Some(format!("unix://{}", socket.display())),
        runtime: runtime.to_owned(),
        image: "worker:dev".to_owned(),
        spawner: "local".to_owned(),
        home: home.clone(),
        warm: Warm::default(),
    };
    let refused = Containers::connect(options("sysbox-runc")).await.err();
    let said = refused.unwrap().to_string();
    assert!(
        said.contains("docs/sysbox.md") && said.contains("it has runc"),
        "{said}"
    );

    let runtime: Arc<dyn Runtime> = Arc::new(Containers::connect(options("runc")).await.unwrap());
    let stage = Stage::with(folder, runtime, Cleanup(None), []).await;
    let mut request = stage.script("r1", 1, COMMIT);
    request.docker = true;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::UNSUPPORTED, "{result:#?}");
    let said = result.failure.unwrap().message;
    for words in [
        "Docker inside its worker",
        "sysbox-runc",
        "it has runc",
        "docs/sysbox.md",
    ] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
#[ignore = "needs Sysbox, and an engine and an image of its own: ARTEL_TEST_SYSBOX_HOST, ARTEL_TEST_SYSBOX_IMAGE; scripts/test says whether it runs"]
fn root_of_a_container_in_real_sysbox_is_nobody_outside() {
    let output = std::process::Command::new("docker")
        .env("DOCKER_HOST", variable("ARTEL_TEST_SYSBOX_HOST"))
        .args([
            "run",
            "--rm",
            "--runtime",
            "sysbox-runc",
            "--network",
            "none",
        ])
        .args(["--security-opt", "no-new-privileges:true"])
        .arg(variable("ARTEL_TEST_SYSBOX_IMAGE"))
        .args(["sh", "-c", "id -u; cat /proc/self/uid_map"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words[..2], ["0", "0"], "{said}");
    assert_ne!(words[2], "0", "root inside is root outside: {said}");
}
