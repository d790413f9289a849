//! A repository's own checks, in a real sandbox.

use std::path::Path;
use std::time::Duration;

use forge::{LocalForge, Options, suite};
use ports::{CheckStatus, ChecksReport, FileChange, Forge, ProjectId, Sha};
use sandbox::{Limits, Sandbox};

struct World {
    home: tempfile::TempDir,
    forge: LocalForge,
    project: ProjectId,
    base: Sha,
}

impl World {
    async fn new() -> Self {
        Self::with(Limits {
            wall_s: Some(60),
            ..Limits::default()
        })
        .await
    }

    async fn with(check_limits: Limits) -> Self {
        let home = tempfile::tempdir().unwrap();
        let sandbox = Sandbox::detect().expect("bubblewrap; `make test` installs it");
        let forge = LocalForge::with(Options {
            check_limits,
            ..Options::new(home.path().join("repos"), Some(sandbox))
        });
        let project = ProjectId::founded_by("checks");
        let base = suite::begin(&forge, &project).await;
        Self {
            home,
            forge,
            project,
            base,
        }
    }

    async fn commit(&self, files: &[FileChange]) -> Sha {
        let branch = "task/checked";
        let base = self.forge.head(&self.project, branch).await.unwrap();
        let base = base.unwrap_or_else(|| self.base.clone());
        self.forge
            .commit_files(&self.project, branch, &base, "Work", files, base.as_str())
            .await
            .unwrap()
    }

    async fn check(&self, command: &str) -> ChecksReport {
        let sha = self.commit(&[manifest(command)]).await;
        self.forge.run_checks(&self.project, &sha).await.unwrap()
    }

    fn scratch(&self) -> usize {
        std::fs::read_dir(self.home.path().join("repos/scratch")).map_or(0, Iterator::count)
    }
}

fn manifest(command: &str) -> FileChange {
    let checks = serde_json::to_string(command).unwrap();
    let text = format!("version: 1\nchecks: {checks}\nservice:\n  command: [python3, app.py]\n");
    suite::file("artel.yaml", &text)
}

#[tokio::test]
async fn checks_see_the_files_of_the_commit_and_pass() {
    let world = World::new().await;
    let files = [
        manifest(
            "./ok.sh && test \"$(cat 'дом/a b')\" = x && test ! -e .git && test \"$CI\" = true",
        ),
        suite::file("дом/a b", "x"),
        suite::file("ok.sh", "#!/bin/sh\nexit 0\n"),
        // Attributes that would empty or change an archive count for nothing.
        suite::file(".gitattributes", "* export-ignore filter=evil\n"),
    ];
    let sha = world.commit(&files).await;
    let report = world.forge.run_checks(&world.project, &sha).await.unwrap();
    assert_eq!(report.status, CheckStatus::Passed, "{report:?}");
    assert_eq!((report.sha, report.checks.len()), (sha, 1));
    assert_eq!(world.scratch(), 0, "a scratch folder was left");
}

#[tokio::test]
async fn a_failure_comes_with_the_end_of_its_log() {
    let world = World::new().await;
    let report = world.check("seq 100000; echo the reason >&2; exit 3").await;
    assert_eq!(report.status, CheckStatus::Failed);
    let detail = &report.checks[0].detail;
    assert!(
        detail.contains("code 3") && detail.trim_end().ends_with("the reason"),
        "{detail}"
    );
    assert!(detail.len() < 20_000);
}

#[tokio::test]
async fn what_a_check_says_has_nothing_that_a_terminal_obeys() {
    let world = World::new().await;
    let command = r"head -c 1000000 /dev/zero | tr '\0' x; printf '\033]0;title\007\033[2Jwhy \342\200\256it\000 failed\n'; exit 3";
    let report = world.check(command).await;
    assert_eq!(report.status, CheckStatus::Failed);
    let detail = &report.checks[0].detail;
    assert!(detail.trim_end().ends_with("xwhy it failed"), "{detail:?}");
    let obeyed = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
    assert!(!detail.contains(obeyed), "{detail:?}");
    assert!(detail.len() < 20_000, "{}", detail.len());
    // It is the same when it is read again.
    let again = world.forge.run_checks(&world.project, &report.sha).await;
    assert_eq!(again.unwrap(), report);
}

#[tokio::test]
async fn tests_that_never_end_time_out_with_what_they_said() {
    let world = World::with(Limits {
        wall_s: Some(1),
        ..Limits::default()
    })
    .await;
    let report = world.check("echo begun; sleep 100").await;
    assert_eq!(report.status, CheckStatus::TimedOut);
    let detail = &report.checks[0].detail;
    assert!(
        detail.contains("within 1 s") && detail.contains("begun"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_missing_or_broken_manifest_is_a_failed_check_that_says_so() {
    let world = World::new().await;
    let report = world
        .forge
        .run_checks(&world.project, &world.base)
        .await
        .unwrap();
    assert_eq!(report.status, CheckStatus::Failed);
    assert!(
        report.checks[0].detail.contains("no artel.yaml"),
        "{report:?}"
    );
    for (text, says) in [
        ("version: [", "cannot be read"),
        (
            "version: 9\nchecks: x\nservice: {command: [x]}\n",
            "version 9",
        ),
        (
            "version: 1\nchecks: ''\nservice: {command: [x]}\n",
            "no command under checks",
        ),
    ] {
        let sha = world.commit(&[suite::file("artel.yaml", text)]).await;
        let report = world.forge.run_checks(&world.project, &sha).await.unwrap();
        assert_eq!(report.status, CheckStatus::Failed);
        assert!(report.checks[0].detail.contains(says), "{report:?}");
    }
}

#[tokio::test]
async fn a_commit_is_checked_once_even_by_another_process_at_once() {
    let world = World::new().await;
    // It answers otherwise every time, so that a second run would show.
    let sha = world
        .commit(&[manifest("cat /proc/sys/kernel/random/uuid; exit 1")])
        .await;
    let sandbox = Sandbox::detect().unwrap();
    let other = LocalForge::new(world.home.path().join("repos"), Some(sandbox));
    let (one, two) = tokio::join!(
        world.forge.run_checks(&world.project, &sha),
        other.run_checks(&world.project, &sha)
    );
    let one = one.unwrap();
    assert_eq!(one, two.unwrap());
    let restarted = LocalForge::new(world.home.path().join("repos"), None);
    assert_eq!(
        restarted.run_checks(&world.project, &sha).await.unwrap(),
        one
    );
}

#[tokio::test]
async fn checks_that_are_dropped_leave_nothing_and_can_run_again() {
    let world = World::new().await;
    let marker = "if [ -e go ]; then exit 0; fi; echo waiting; sleep 30";
    let sha = world.commit(&[manifest(marker)]).await;
    let running = world.forge.run_checks(&world.project, &sha);
    let dropped = tokio::time::timeout(Duration::from_millis(500), running).await;
    assert!(dropped.is_err());
    assert_eq!(world.scratch(), 0);
    let sha = world.commit(&[suite::file("go", "")]).await;
    let report = world.forge.run_checks(&world.project, &sha).await.unwrap();
    assert_eq!(report.status, CheckStatus::Passed, "{report:?}");
}

#[tokio::test]
async fn checks_see_nothing_of_this_machine_and_leave_nothing_on_it() {
    let world = World::new().await;
    let home = world.home.path().display().to_string();
    let report = world
        .check(&format!(
            "test ! -e {home} && test ! -e /root/.cargo && test \"$(id -u)\" != 0 && ! getent hosts example.com \
             && mkdir -p locked/inner && chmod 000 locked && ln -s / out"
        ))
        .await;
    assert_eq!(report.status, CheckStatus::Passed, "{report:?}");
    assert_eq!(world.scratch(), 0);
    assert!(Path::new("/etc/passwd").exists());
}

#[tokio::test]
async fn without_a_sandbox_nothing_runs() {
    let world = World::new().await;
    let sha = world.commit(&[manifest("true")]).await;
    let forge = LocalForge::new(world.home.path().join("repos"), None);
    let failure = forge.run_checks(&world.project, &sha).await.unwrap_err();
    assert_eq!(failure.kind, "no_sandbox");
}
