//! Things that die, and things that must not.

mod world;

use deploy::Reconciled;
use ports::{Deployer, DeploymentStatus};
use rustix::process::{Pid, Signal, kill_process};
use world::{World, free_port, get, project, until};

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a pid");
    kill_process(pid, Signal::KILL).expect("killed");
}

#[tokio::test]
async fn a_killed_supervisor_is_found_and_started_again() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    let p1 = project("p1");
    assert_eq!(
        world.deployer.reconcile().await,
        [(p1.clone(), Reconciled::Running)]
    );
    let before = world.supervisor_pid();
    kill(before);
    // The service goes with its supervisor: nobody is left without one.
    let _ = until(5, || get(port, "/"), Result::is_err).await;
    let state = world.deployer.state(&p1).await.expect("state");
    assert!(!state.running && state.trouble.is_some(), "{state:?}");

    assert_eq!(
        world.deployer.reconcile().await,
        [(p1.clone(), Reconciled::Started)]
    );
    assert_ne!(world.supervisor_pid(), before);
    let _ = until(5, || get(port, "/"), |seen| seen.as_deref() == Ok("one")).await;
    assert_eq!(
        world.deployer.reconcile().await,
        [(p1, Reconciled::Running)]
    );
}

#[tokio::test]
async fn supervisors_killed_one_after_another_are_each_replaced_at_once() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    let order = world.order("k1", &sha, port);
    world.deployer.deploy(&order).await.expect("deployed");
    for _ in 0..4 {
        kill(world.supervisor_pid());
        // Not even waiting for its death.
        let found = until_started(&world).await;
        assert_eq!(found, [(project("p1"), Reconciled::Started)]);
        let _ = until(5, || get(port, "/"), |seen| seen.as_deref() == Ok("one")).await;
    }
}

/// What the first look finds that does not still see the old supervisor.
async fn until_started(world: &World) -> Vec<(ports::ProjectId, Reconciled)> {
    for _ in 0..100 {
        let found = world.deployer.reconcile().await;
        if found != [(project("p1"), Reconciled::Running)] {
            return found;
        }
    }
    panic!("it is still alive");
}

#[tokio::test]
async fn a_service_that_dies_is_started_again() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    assert!(get(port, "/crash").is_err());
    let _ = until(5, || get(port, "/"), |seen| seen.as_deref() == Ok("one")).await;
    let logs = world.deployer.logs(&project("p1"), 10).await.expect("logs");
    assert!(logs.contains(&"crashing as asked".to_owned()), "{logs:?}");
    assert_eq!(
        logs.iter()
            .filter(|line| line.starts_with("starting one"))
            .count(),
        2,
        "{logs:?}"
    );
    assert_eq!(
        world
            .deployer
            .logs(&project("p1"), 1)
            .await
            .expect("logs")
            .len(),
        1
    );
}

#[tokio::test]
async fn a_service_that_keeps_dying_is_given_up_with_its_evidence() {
    let world = World::new();
    // It survives its checks and half a second more, once; then never again.
    let code = format!(
        "import os, threading\n\
         ONCE = os.path.join(os.environ['DATA_DIR'], 'once')\n\
         if os.path.exists(ONCE):\n    print('worn out', flush=True)\n    os._exit(5)\n{}",
        world::SERVICE.replace("os._exit(3)", "open(ONCE, 'w').close(); os._exit(3)")
    );
    let sha = world.commit("weak", &[("service.py", &code)]);
    let (port, p1) = (free_port(), project("p1"));
    let deployment = world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    assert_eq!(deployment.status, DeploymentStatus::Live, "{deployment:?}");
    let _ = get(port, "/crash");
    let end = tokio::time::Instant::now() + std::time::Duration::from_secs(15);
    let trouble = loop {
        let state = world.deployer.state(&p1).await.expect("state");
        if let Some(trouble) = state.trouble
            && trouble.contains("started 5 times")
        {
            break trouble;
        }
        assert!(tokio::time::Instant::now() < end);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert!(
        trouble.contains("code 5") && trouble.contains("worn out"),
        "{trouble}"
    );
    let found = world.deployer.reconcile().await;
    assert!(
        matches!(&found[0].1, Reconciled::Failed(failure) if failure.kind == "service_failed" && failure.evidence.contains("worn out")),
        "{found:?}"
    );
    // A person may try again.
    std::fs::remove_file(world.folder().join("data/once")).expect("removed");
    let started = world.deployer.start(&p1).await.expect("started");
    assert_eq!(started.status, DeploymentStatus::Live, "{started:?}");
    assert_eq!(get(port, "/"), Ok("weak".to_owned()));
}

#[tokio::test]
async fn a_stopped_service_stays_stopped_until_it_is_started() {
    let world = World::new();
    let (sha, port, p1) = (world.commit("one", &[]), free_port(), project("p1"));
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    assert_eq!(get(port, "/count"), Ok("1".to_owned()));
    for _ in 0..2 {
        world.deployer.stop(&p1).await.expect("stopped");
    }
    until(5, || world.processes(), Vec::is_empty).await;
    assert!(get(port, "/").is_err());
    assert_eq!(
        world.deployer.reconcile().await,
        [(p1.clone(), Reconciled::Idle)]
    );
    assert!(!world.deployer.state(&p1).await.expect("state").running);
    for _ in 0..2 {
        let started = world.deployer.start(&p1).await.expect("started");
        assert_eq!(
            (started.release, started.status),
            (1, DeploymentStatus::Live)
        );
    }
    assert_eq!(get(port, "/count"), Ok("2".to_owned()));
}

#[tokio::test]
async fn a_removed_project_leaves_nothing_behind() {
    let world = World::new();
    let (sha, port, p1) = (world.commit("one", &[]), free_port(), project("p1"));
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    assert!(!world.processes().is_empty());
    for _ in 0..2 {
        world.deployer.remove(&p1).await.expect("removed");
    }
    until(5, || world.processes(), Vec::is_empty).await;
    assert!(!world.folder().exists());
    assert!(get(port, "/").is_err());
    assert_eq!(world.deployer.reconcile().await, []);
}

#[tokio::test]
async fn two_projects_never_share_a_port() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    let mut second = world.order("k2", &sha, port);
    second.project = project("p2");
    let failure = world.deployer.deploy(&second).await.expect_err("taken");
    assert_eq!(failure.kind, "port_taken");
    assert!(
        failure.retryable && failure.message.contains(&port.to_string()),
        "{failure}"
    );
    assert_eq!(get(port, "/"), Ok("one".to_owned()));
    // The same order with another port is carried out, as the first release.
    second.port = free_port();
    let deployment = world.deployer.deploy(&second).await.expect("deployed");
    assert_eq!(
        (deployment.release, deployment.status),
        (1, DeploymentStatus::Live)
    );
    assert_eq!(get(second.port, "/"), Ok("one".to_owned()));
}

#[tokio::test]
async fn a_project_can_move_to_another_port() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("deployed");
    // Somebody else's, and the old one goes on.
    let foreign = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
    let taken = foreign.local_addr().expect("address").port();
    let failure = world
        .deployer
        .deploy(&world.order("k2", &sha, taken))
        .await
        .expect_err("taken");
    assert_eq!(failure.kind, "port_taken");
    assert_eq!(get(port, "/"), Ok("one".to_owned()));
    let other = free_port();
    let deployment = world
        .deployer
        .deploy(&world.order("k2", &sha, other))
        .await
        .expect("deployed");
    assert_eq!(deployment.url, format!("http://127.0.0.1:{other}/"));
    assert_eq!(get(other, "/"), Ok("one".to_owned()));
    assert!(get(port, "/").is_err());
}

#[tokio::test]
async fn an_order_that_was_abandoned_at_any_point_is_carried_to_its_end() {
    let world = World::new();
    let (one, two, port) = (
        world.commit("one", &[]),
        world.commit("two", &[]),
        free_port(),
    );
    world
        .deployer
        .deploy(&world.order("k1", &one, port))
        .await
        .expect("deployed");
    let order = world.order("k2", &two, port);
    for after_ms in [1, 5, 15, 40, 80, 150, 250] {
        let bound = std::time::Duration::from_millis(after_ms);
        let _ = tokio::time::timeout(bound, world.deployer.deploy(&order)).await;
        let seen = get(port, "/").expect("one of them answers");
        assert!(seen == "one" || seen == "two", "{seen}");
    }
    let deployment = world.deployer.deploy(&order).await.expect("deployed");
    assert_eq!(
        (deployment.release, deployment.status),
        (2, DeploymentStatus::Live)
    );
    assert_eq!(get(port, "/"), Ok("two".to_owned()));
    let releases = std::fs::read_dir(world.folder().join("releases"))
        .expect("listed")
        .count();
    assert_eq!(releases, 2);
}

#[tokio::test]
async fn a_supervisor_killed_in_the_middle_of_a_deploy_is_replaced() {
    let world = World::new();
    let (one, two, port) = (
        world.commit("one", &[]),
        world.commit("two", &[]),
        free_port(),
    );
    world
        .deployer
        .deploy(&world.order("k1", &one, port))
        .await
        .expect("deployed");
    let order = world.order("k2", &two, port);
    let deployer = world.deployer.clone();
    let (again, same) = (order.clone(), deployer.clone());
    let deploying = tokio::spawn(async move { deployer.deploy(&again).await });
    let door = world.folder().join("run/2/in.sock");
    until(10, || door.exists(), |there| *there).await;
    kill(world.supervisor_pid());
    // It may end in a failure that says so, or find its way; the same order again certainly does.
    let _ = deploying.await.expect("no panic");
    let deployment = same.deploy(&order).await.expect("deployed");
    assert_eq!(deployment.release, 2);
    let expected = match deployment.status {
        DeploymentStatus::Live => "two",
        _ => "one",
    };
    let _ = until(5, || get(port, "/"), |seen| seen.as_deref() == Ok(expected)).await;
}

#[tokio::test]
async fn a_deployer_killed_at_any_point_leaves_an_order_that_can_be_finished() {
    let world = World::new();
    let (one, two, port) = (
        world.commit("one", &[]),
        world.commit("two", &[]),
        free_port(),
    );
    let first = world.order("k1", &one, port);
    world.deployer.deploy(&first).await.expect("deployed");
    let order = world.order("k2", &two, port);
    let text = serde_json::to_string(&order).expect("JSON");
    for after_ms in [5, 20, 40, 60, 80, 110, 150, 200] {
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_deploy-process"))
            .arg("order")
            .arg(world.home.path())
            .arg(&text)
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("started");
        tokio::time::sleep(std::time::Duration::from_millis(after_ms)).await;
        process.kill().expect("killed");
        process.wait().expect("collected");
        let seen = get(port, "/").expect("one of them answers");
        assert!(seen == "one" || seen == "two", "{seen}");
    }
    let deployment = world.deployer.deploy(&order).await.expect("deployed");
    assert_eq!(
        (deployment.release, deployment.status),
        (2, DeploymentStatus::Live)
    );
    assert_eq!(get(port, "/"), Ok("two".to_owned()));
    let releases = std::fs::read_dir(world.folder().join("releases"));
    assert_eq!(releases.expect("listed").count(), 2);
}

#[tokio::test]
async fn without_confinement_the_service_dies_with_its_supervisor_too() {
    let world = World::unconfined();
    let (sha, port) = (world.commit("one", &[]), free_port());
    let order = world.order("k1", &sha, port);
    world.deployer.deploy(&order).await.expect("deployed");
    let python = service_process(&world);
    kill(world.supervisor_pid());
    let process = std::path::PathBuf::from(format!("/proc/{python}/exe"));
    until(5, || process.read_link().is_ok(), |there| !there).await;
    let found = world.deployer.reconcile().await;
    assert_eq!(found, [(project("p1"), Reconciled::Started)]);
    let _ = until(5, || get(port, "/"), |seen| seen.as_deref() == Ok("one")).await;
}

/// The process whose working directory is the release.
fn service_process(world: &World) -> u32 {
    let releases = world.folder().join("releases");
    std::fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let there = std::fs::read_link(format!("/proc/{pid}/cwd"))
                .is_ok_and(|cwd| cwd.starts_with(&releases));
            let line = String::from_utf8_lossy(&line);
            there && line.contains("service.py") && !line.contains("launch")
        })
        .expect("the service runs")
}
