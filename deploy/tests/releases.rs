//! Releases that become live, and releases that do not.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ports::{CheckStatus, Deployer, DeploymentStatus, SecretHandle};
use world::{World, command, free_port, get, http, project, until};

#[tokio::test]
async fn a_commit_becomes_a_service_and_an_order_given_twice_is_one_deploy() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    let mut order = world.order("k1", &sha, port);
    order.acceptance = vec![
        http("says its version", "/", "one"),
        command(
            "answers a program",
            &[
                "python3",
                "-c",
                "import os, urllib.request as u; assert u.urlopen(os.environ['SERVICE_URL'] + '/').read() == b'one'",
            ],
        ),
    ];
    let deployment = world.deployer.deploy(&order).await.expect("deployed");
    assert_eq!(deployment.status, DeploymentStatus::Live, "{deployment:?}");
    assert_eq!(deployment.release, 1);
    assert_eq!(deployment.url, format!("http://127.0.0.1:{port}/"));
    let names: Vec<_> = deployment
        .checks
        .iter()
        .map(|check| check.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "GET /health answers",
            "says its version",
            "answers a program",
            "GET /health answers (live)",
            "says its version (live)",
        ]
    );
    assert_eq!(get(port, "/"), Ok("one".to_owned()));

    let again = world.deployer.deploy(&order).await.expect("known");
    assert_eq!(again, deployment);
    let releases = std::fs::read_dir(world.folder().join("releases"))
        .expect("listed")
        .count();
    assert_eq!(releases, 1);

    let state = world.deployer.state(&project("p1")).await.expect("state");
    assert!(state.running && state.healthy, "{state:?}");
    assert_eq!((state.release, state.sha), (Some(1), Some(sha)));
}

#[tokio::test]
async fn there_is_no_gap_between_two_releases() {
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
    let (stop, failures) = ask_all_the_time(port);
    // Begun at the old one, still open when it is replaced.
    let slow = std::thread::spawn(move || get(port, "/slow"));
    let second = world
        .deployer
        .deploy(&world.order("k2", &two, port))
        .await
        .expect("deployed");
    assert_eq!(second.status, DeploymentStatus::Live);
    assert_eq!(get(port, "/"), Ok("two".to_owned()));
    stop.store(true, Ordering::Relaxed);
    let (asked, failed) = failures.join().expect("asked");
    assert!(asked > 5, "{asked}");
    assert_eq!(failed, Vec::<String>::new());
    assert_eq!(slow.join().expect("asked"), Ok("one".to_owned()));
}

#[tokio::test]
async fn a_bad_release_is_rolled_back_while_the_old_one_keeps_answering() {
    let world = World::new();
    let port = free_port();
    let good = world.commit("good", &[]);
    world
        .deployer
        .deploy(&world.order("k0", &good, port))
        .await
        .expect("deployed");
    let (stop, failures) = ask_all_the_time(port);
    let impatient = world.with_ready_s(1);
    let cases = [
        (
            "ends",
            "print('no way'); raise SystemExit(7)",
            "exited with code 7",
            "no way",
        ),
        (
            "deaf",
            "print('waiting'); import time; time.sleep(600)",
            "not ready within 1 s",
            "waiting",
        ),
        (
            "sick",
            &world::SERVICE.replace("status, text = 200", "status, text = 500"),
            "status 500",
            "starting",
        ),
        (
            "lost",
            "import no_such_module",
            "exited with code 1",
            "no_such_module",
        ),
    ];
    for (name, code, says, shows) in cases {
        let sha = world.commit(name, &[("service.py", code)]);
        let deployment = impatient
            .deploy(&world.order(name, &sha, port))
            .await
            .expect("tried");
        assert_eq!(
            deployment.status,
            DeploymentStatus::RolledBack,
            "{deployment:?}"
        );
        assert_eq!(deployment.live_release, Some(1));
        let detail = &deployment.checks[0].detail;
        assert!(
            detail.contains(says) && detail.contains(shows),
            "{name}: {detail}"
        );
        assert_ne!(deployment.checks[0].status, CheckStatus::Passed);
    }
    let missing = world.commit(
        "gone",
        &[(
            "artel.yaml",
            "version: 1\nchecks: 'true'\nservice: {command: [no-such-program]}\n",
        )],
    );
    let deployment = impatient
        .deploy(&world.order("gone", &missing, port))
        .await
        .expect("tried");
    let detail = &deployment.checks[0].detail;
    assert!(
        detail.contains("not found") || detail.contains("127"),
        "{detail}"
    );

    let wrong = world.commit("wrong", &[]);
    let mut order = world.order("wrong", &wrong, port);
    order.acceptance = vec![
        http("greets", "/", "hello"),
        http("has a root", "/", "wrong"),
    ];
    let deployment = impatient.deploy(&order).await.expect("tried");
    assert_eq!(deployment.status, DeploymentStatus::RolledBack);
    let failed: Vec<_> = deployment
        .checks
        .iter()
        .filter(|check| check.status == CheckStatus::Failed)
        .collect();
    assert_eq!(failed[0].name, "greets");
    assert!(failed[0].detail.contains("lacks \"hello\""), "{failed:?}");

    stop.store(true, Ordering::Relaxed);
    let (asked, failures) = failures.join().expect("asked");
    assert!(asked > 5, "{asked}");
    assert_eq!(failures, Vec::<String>::new());
    assert_eq!(get(port, "/"), Ok("good".to_owned()));
    // Of the bad ones nothing runs.
    let services = world
        .processes()
        .iter()
        .filter(|line| line.contains("supervise"))
        .count();
    assert_eq!(services, 1);
}

#[tokio::test]
async fn what_a_service_says_has_nothing_that_a_terminal_obeys() {
    let world = World::new();
    let says = concat!(
        "import os, sys\n",
        "t = os.environ['TOKEN']\n",
        "print('x' * 1000000)\n",
        "print('\\x1b]0;title\\x07\\x1b[2Jwhy \\u202eit\\0 failed')\n",
        "print('hidden ' + t[:4] + '\\x1b[0m' + t[4:])\n",
        "raise SystemExit(7)\n",
    );
    let sha = world.commit("ends", &[("service.py", says)]);
    let mut order = world.order("k1", &sha, free_port());
    order.secrets = vec![SecretHandle {
        project: project("p1"),
        name: "TOKEN".into(),
    }];
    let deployment = world.deployer.deploy(&order).await.expect("tried");
    assert_eq!(deployment.status, DeploymentStatus::Failed);
    let lines = world
        .deployer
        .logs(&project("p1"), 1000)
        .await
        .expect("read");
    let detail = &deployment.checks[0].detail;
    for said in [detail, &lines.join("\n")] {
        assert!(said.contains("\nwhy it failed\n"), "{said:?}");
        assert!(
            said.contains("\nhidden ") && !said.contains("value-of"),
            "{said:?}"
        );
        let obeyed = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
        assert!(
            !said.contains(obeyed) && !said.contains("title"),
            "{said:?}"
        );
        let longest = said.lines().map(str::len).max();
        assert!(longest < Some(5_000), "{longest:?}");
    }
}

#[tokio::test]
async fn a_first_release_that_fails_leaves_nothing_running() {
    let world = World::new();
    let sha = world.commit("ends", &[("service.py", "raise SystemExit(1)")]);
    let port = free_port();
    let deployment = world
        .deployer
        .deploy(&world.order("k1", &sha, port))
        .await
        .expect("tried");
    assert_eq!(deployment.status, DeploymentStatus::Failed);
    assert_eq!(deployment.live_release, None);
    until(5, || world.processes(), Vec::is_empty).await;
    assert!(get(port, "/").is_err());
}

#[tokio::test]
async fn what_only_fails_on_the_live_url_is_taken_back() {
    let world = World::new();
    let port = free_port();
    let good = world.commit("good", &[]);
    world
        .deployer
        .deploy(&world.order("k0", &good, port))
        .await
        .expect("deployed");
    // Passes the first time that it is asked, and not the second time.
    let sha = world.commit("twice", &[]);
    let mut order = world.order("k1", &sha, port);
    order.acceptance = vec![http("counts", "/count", "1")];
    let deployment = world.deployer.deploy(&order).await.expect("tried");
    assert_eq!(
        deployment.status,
        DeploymentStatus::RolledBack,
        "{deployment:?}"
    );
    assert!(
        deployment
            .checks
            .iter()
            .any(|check| check.name == "counts (live)")
    );
    assert_eq!(get(port, "/"), Ok("good".to_owned()));
    let state = world.deployer.state(&project("p1")).await.expect("state");
    assert_eq!(state.release, Some(1));
}

#[tokio::test]
async fn going_back_makes_the_last_good_release_live_again() {
    let world = World::new();
    let port = free_port();
    let (one, two) = (world.commit("one", &[]), world.commit("two", &[]));
    let p1 = project("p1");
    let nothing = world
        .deployer
        .rollback(&p1, "r0")
        .await
        .expect_err("nothing there");
    assert_eq!(nothing.kind, "not_deployed");
    world
        .deployer
        .deploy(&world.order("k1", &one, port))
        .await
        .expect("deployed");
    let first = world
        .deployer
        .rollback(&p1, "r1")
        .await
        .expect_err("nothing before");
    assert_eq!(first.kind, "no_previous_release");
    assert_eq!(get(port, "/count"), Ok("1".to_owned()));
    world
        .deployer
        .deploy(&world.order("k2", &two, port))
        .await
        .expect("deployed");
    let back = world.deployer.rollback(&p1, "r2").await.expect("back");
    assert_eq!((back.release, back.status), (1, DeploymentStatus::Live));
    assert_eq!(back.sha, one);
    assert_eq!(get(port, "/"), Ok("one".to_owned()));
    // Data is the service's, not the release's.
    assert_eq!(get(port, "/count"), Ok("2".to_owned()));
    assert_eq!(
        world.deployer.rollback(&p1, "r2").await.expect("known"),
        back
    );
}

#[tokio::test]
async fn secrets_reach_the_service_and_nothing_else() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    let mut order = world.order("k1", &sha, port);
    order.secrets = vec![SecretHandle {
        project: project("p1"),
        name: "TOKEN".into(),
    }];
    world.deployer.deploy(&order).await.expect("deployed");
    let environment = get(port, "/env").expect("answered");
    assert!(
        environment.contains("TOKEN=value-of-TOKEN"),
        "{environment}"
    );
    let names: Vec<_> = environment
        .lines()
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    let expected = [
        "DATA_DIR",
        "HOME",
        "HOST",
        "LANG",
        "PATH",
        "PORT",
        "PWD",
        "PYTHONUNBUFFERED",
        "TMPDIR",
        "TOKEN",
        "USER",
    ];
    let unexpected: Vec<_> = names
        .iter()
        .filter(|name| !expected.contains(name))
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
    let log = until(
        5,
        || std::fs::read_to_string(world.folder().join("logs/service.log")).unwrap_or_default(),
        |log| log.contains("starting"),
    )
    .await;
    assert!(log.contains("[secret TOKEN]"), "{log}");
    for (path, content) in files(&world.folder()) {
        assert!(!content.contains("value-of-TOKEN"), "{}", path.display());
    }
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&line).contains("value-of-TOKEN"));
    }
}

#[tokio::test]
async fn five_releases_are_kept() {
    let world = World::new();
    let (sha, port) = (world.commit("one", &[]), free_port());
    for number in 1..=7 {
        let order = world.order(&format!("k{number}"), &sha, port);
        let deployment = world.deployer.deploy(&order).await.expect("deployed");
        assert_eq!(deployment.release, number);
    }
    let mut kept: Vec<_> = std::fs::read_dir(world.folder().join("releases"))
        .expect("listed")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.split('-').next()?.parse::<u64>().ok())
        .collect();
    kept.sort_unstable();
    assert_eq!(kept, [3, 4, 5, 6, 7]);
}

#[tokio::test]
async fn what_cannot_be_deployed_says_why() {
    let world = World::new();
    let port = free_port();
    let kind = async |sha: &ports::Sha| {
        let order = world.order("k", sha, port);
        world
            .deployer
            .deploy(&order)
            .await
            .expect_err("refused")
            .kind
    };
    let plain = world.commit("plain", &[("artel.yaml", "version: 1\nchecks: x\n")]);
    assert_eq!(kind(&plain).await, "bad_manifest");
    assert_eq!(kind(&"0".repeat(40).as_str().into()).await, "no_manifest");
    assert_eq!(kind(&"main".into()).await, "bad_commit");
    let mut order = world.order("k", &plain, port);
    order.project = project("../up");
    let failure = world.deployer.deploy(&order).await.expect_err("refused");
    assert_eq!(failure.kind, "bad_project");
}

#[test]
fn a_full_disk_is_named() {
    let world = World::new();
    // Text that does not fit on a disk of two megabytes.
    let sha = world.commit("large", &[("large", &"0123456789abcdef".repeat(200_000))]);
    let order = serde_json::to_string(&world.order("k1", &sha, free_port())).expect("JSON");
    let small = tempfile::tempdir().expect("directory");
    let output = std::process::Command::new("bwrap")
        .args(["--dev-bind", "/", "/"])
        .args(["--size", "2000000", "--tmpfs"])
        .arg(small.path())
        .arg(env!("CARGO_BIN_EXE_deploy-process"))
        .arg("order")
        .arg(small.path())
        .arg(&order)
        .output()
        .expect("bubblewrap runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the disk is full"), "{said}");
}

#[tokio::test]
async fn without_confinement_it_works_too() {
    let world = World::unconfined();
    let (one, two, port) = (
        world.commit("one", &[]),
        world.commit("two", &[]),
        free_port(),
    );
    let mut order = world.order("k1", &one, port);
    order.acceptance = vec![command(
        "answers a program",
        &[
            "python3",
            "-c",
            "import os, urllib.request as u; assert u.urlopen(os.environ['SERVICE_URL'] + '/').read() == b'one'",
        ],
    )];
    let deployment = world.deployer.deploy(&order).await.expect("deployed");
    assert_eq!(deployment.status, DeploymentStatus::Live, "{deployment:?}");
    assert_eq!(get(port, "/count"), Ok("1".to_owned()));
    world
        .deployer
        .deploy(&world.order("k2", &two, port))
        .await
        .expect("deployed");
    assert_eq!(get(port, "/"), Ok("two".to_owned()));
    assert_eq!(get(port, "/count"), Ok("2".to_owned()));
}

type Asking = std::thread::JoinHandle<(usize, Vec<String>)>;

/// Asks without a pause until it is told to stop: how often, and what went wrong.
fn ask_all_the_time(port: u16) -> (Arc<AtomicBool>, Asking) {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let asking = std::thread::spawn(move || {
        let (mut asked, mut failed) = (0, Vec::new());
        while !told.load(Ordering::Relaxed) {
            asked += 1;
            failed.extend(get(port, "/").err());
            // A breath for a machine with few processors.
            std::thread::park_timeout(Duration::from_millis(5));
        }
        (asked, failed)
    });
    (stop, asking)
}

fn files(folder: &std::path::Path) -> Vec<(std::path::PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if let Ok(bytes) = std::fs::read(&path) {
            found.push((path, String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
    found
}
