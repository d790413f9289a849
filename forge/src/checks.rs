//! A repository's own checks, run in a sandbox, once per commit.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ports::{CheckResult, CheckStatus, ChecksReport, MANIFEST_FILE, Manifest, Sha};
use sandbox::{Job, Limits, Reason, Sandbox};

use crate::lock::Lock;
use crate::repo::Repo;
use crate::trees::{Mode, Scratch};
use crate::{Error, export};

/// Where the files are, as the checks see it.
const GUEST: &str = "/workspace";
/// How much of a log's end is kept, in bytes.
const TAIL_BYTES: usize = 16 * 1024;
/// How many reports of a project are kept.
const MAX_REPORTS: usize = 500;
/// Scratch folders that are older belong to nobody.
const SCRATCH_AGE: Duration = Duration::from_hours(24);

pub(crate) struct Checks<'a> {
    pub repo: &'a Repo,
    pub sandbox: Option<&'a Sandbox>,
    pub limits: &'a Limits,
    /// Where the project's reports are.
    pub reports: PathBuf,
}

impl Checks<'_> {
    /// The report on a commit: the one that is there, or else a new one. Whoever asks for the same commit meanwhile waits.
    pub(crate) async fn report(&self, sha: &Sha) -> Result<ChecksReport, Error> {
        self.repo.need_commit(sha).await?;
        let path = self.reports.join(format!("{sha}.json"));
        if let Some(report) = stored(&path, sha) {
            return Ok(report);
        }
        let lock = self.reports.join(format!("{sha}.lock"));
        let wait_s = self.limits.wall_s.unwrap_or(3600) + 60;
        let held = Lock::take_within(&lock, &self.repo.project, wait_s).await?;
        if let Some(report) = stored(&path, sha) {
            return Ok(report);
        }
        let report = self.run(sha).await?;
        store(&path, &report)?;
        let _ = std::fs::remove_file(&lock);
        drop(held);
        prune(&self.reports);
        Ok(report)
    }

    async fn run(&self, sha: &Sha) -> Result<ChecksReport, Error> {
        let failed = |detail: String| Ok(report(sha, MANIFEST_FILE, CheckStatus::Failed, detail));
        let manifest = match self.repo.entry(sha, MANIFEST_FILE).await? {
            Some(entry) if entry.mode != Mode::Submodule && entry.mode != Mode::Symlink => entry,
            _ => {
                return failed(format!(
                    "there is no {MANIFEST_FILE} in the root of the repository; add one with version, checks and service"
                ));
            }
        };
        if manifest.size > 64 * 1024 {
            return failed(format!("{MANIFEST_FILE} is longer than 64 KiB"));
        }
        let text = self
            .repo
            .objects([manifest.object.as_str()])
            .await?
            .pop()
            .flatten();
        let manifest = match Manifest::parse(&String::from_utf8_lossy(&text.unwrap_or_default())) {
            Ok(manifest) => manifest,
            Err(error) => return failed(error.to_string()),
        };
        if manifest.checks.trim().is_empty() || manifest.checks.contains('\0') {
            return failed(format!("{MANIFEST_FILE} names no command under checks"));
        }
        let sandbox = self.sandbox.ok_or(Error::NoSandbox)?;
        sweep(&self.repo.scratch);
        let scratch = Scratch::new(&self.repo.scratch)?;
        let tree = scratch.path().join("tree");
        std::fs::create_dir(&tree).map_err(Error::io("making", &tree))?;
        match export::export(self.repo, sha, &tree).await {
            Ok(()) => {}
            Err(error @ (Error::Hostile { .. } | Error::TooLarge { .. })) => {
                return Ok(report(sha, "files", CheckStatus::Failed, error.to_string()));
            }
            Err(error) => return Err(error),
        }
        let job = Job::new(["sh", "-c", manifest.checks.as_str()])
            .mount_rw(&tree, GUEST)
            .cwd(GUEST)
            .env("CI", "true")
            .limits(self.limits.clone());
        let output = sandbox.run(&job).await?;
        let status = match output.ended.reason {
            Reason::Exited(0) => CheckStatus::Passed,
            Reason::Wall | Reason::Idle => CheckStatus::TimedOut,
            // Not the checks' doing: nothing is reported about them.
            Reason::Stopped => return Err(Error::Interrupted),
            _ => CheckStatus::Failed,
        };
        tracing::info!(%sha, reason = %output.ended.reason, wall_s = output.ended.wall_s, "checks ended");
        let detail = if status == CheckStatus::Passed {
            String::new()
        } else {
            let reason = match (status, self.limits.wall_s) {
                (CheckStatus::TimedOut, Some(seconds)) => {
                    format!("did not end within {seconds} s and was killed")
                }
                _ => output.ended.reason.to_string(),
            };
            format!(
                "`{}` {reason}\n{}",
                ports::plain(&first_line(&manifest.checks)),
                tail(&ports::plain(&output.tail))
            )
        };
        Ok(report(sha, "checks", status, detail))
    }
}

fn report(sha: &Sha, name: &str, status: CheckStatus, detail: String) -> ChecksReport {
    ChecksReport {
        sha: sha.clone(),
        status,
        checks: vec![CheckResult {
            name: name.to_owned(),
            status,
            detail,
        }],
    }
}

fn first_line(command: &str) -> String {
    command
        .trim()
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(200)
        .collect()
}

fn tail(log: &str) -> &str {
    let mut start = log.len().saturating_sub(TAIL_BYTES);
    while !log.is_char_boundary(start) {
        start += 1;
    }
    &log[start..]
}

/// What an earlier run found; whatever cannot be read counts as nothing.
fn stored(path: &Path, sha: &Sha) -> Option<ChecksReport> {
    let bytes = std::fs::read(path).ok()?;
    let report: ChecksReport = serde_json::from_slice(&bytes).ok()?;
    (report.sha == *sha).then_some(report)
}

fn store(path: &Path, report: &ChecksReport) -> Result<(), Error> {
    use std::io::Write as _;
    let draft = path.with_extension(format!("{}.draft", uuid::Uuid::new_v4().simple()));
    let bytes = serde_json::to_vec_pretty(report).map_err(|source| Error::Stored {
        name: path.display().to_string(),
        source,
    })?;
    std::fs::File::create(&draft)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&draft, path))
        .map_err(Error::io("writing", path))
}

/// Deletes the oldest reports beyond what is kept.
fn prune(reports: &Path) {
    let Ok(entries) = std::fs::read_dir(reports) else {
        return;
    };
    let mut dated: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| {
            entry
                .path()
                .extension()
                .is_some_and(|end| end == "json" || end == "draft")
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    if dated.len() > MAX_REPORTS {
        dated.sort();
        for (_, path) in &dated[..dated.len() - MAX_REPORTS] {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes what processes that were killed have left.
fn sweep(scratch: &Path) {
    let Ok(entries) = std::fs::read_dir(scratch) else {
        return;
    };
    for entry in entries.flatten() {
        let modified = entry.metadata().and_then(|meta| meta.modified());
        let age = modified
            .ok()
            .and_then(|at| SystemTime::now().duration_since(at).ok());
        if age.is_some_and(|age| age > SCRATCH_AGE) {
            let _ = crate::trees::remove_all(&entry.path());
        }
    }
}
