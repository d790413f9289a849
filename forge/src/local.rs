//! The forge on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use ports::{
    ChecksReport, Diff, FileChange, Forge, MergeOutcome, NewPullRequest, ProjectId, PullRequest,
    RebaseOutcome, Repository, Sha, Slug,
};
use sandbox::{Limits, Sandbox};
use tokio::sync::{OnceCell, Semaphore};
use tracing::Instrument as _;

use crate::checks::Checks;
use crate::git::Git;
use crate::lock::Lock;
use crate::repo::{NewCommit, RefChange, Repo, branch_ref};
use crate::trees::{Mode, Scratch};
use crate::{
    DEFAULT_BRANCH, Error, check_names, clone, commits, diff, export, merge, pulls, rebase,
};

/// How many files are listed at most.
pub const MAX_LISTED_FILES: usize = 10_000;
/// The largest file that is read, in bytes.
pub const MAX_READ_BYTES: u64 = 1 << 20;

/// What every repository says about itself, whoever works on it: nothing of a push is run or trusted, and what is only
/// ours (the default branch, pull requests, our records) cannot be pushed to.
const REPOSITORY_CONFIGURATION: &str = "\
[core]
\thooksPath = /dev/null
\tfsync = committed,reference
\tprotectHFS = true
\tprotectNTFS = true
[gc]
\tautoDetach = false
[receive]
\tfsckObjects = true
\tmaxInputSize = 536870912
\tdenyDeletes = true
\tautogc = false
\thideRefs = refs/heads/main
\thideRefs = refs/pull
\thideRefs = refs/artel
[uploadpack]
\thideRefs = refs/pull
\thideRefs = refs/artel
";

/// How a local forge is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the repositories are, `ARTEL_HOME/repos`.
    pub home: PathBuf,
    /// What checks run in; without one they are refused.
    pub sandbox: Option<Sandbox>,
    /// Bounds of one run of checks.
    pub check_limits: Limits,
    /// How many runs of checks go on at once; others wait for their turn.
    pub checks_at_once: usize,
    /// The `git` program: a name on `PATH`, or a path.
    pub git: PathBuf,
}

impl Options {
    /// The usual bounds: 300 s, 1 GiB of memory, 256 processes, 1 GiB on the disk; one run for each processor.
    pub fn new(home: PathBuf, sandbox: Option<Sandbox>) -> Self {
        Self {
            home,
            sandbox,
            check_limits: Limits {
                wall_s: Some(300),
                disk_mb: Some(1024),
                ..Limits::default()
            },
            checks_at_once: std::thread::available_parallelism().map_or(2, usize::from),
            git: "git".into(),
        }
    }
}

/// Bare repositories in a folder. Clones are cheap and are the same forge; any number of processes may work on one folder.
#[derive(Clone)]
pub struct LocalForge(Arc<Inner>);

struct Inner {
    options: Options,
    git: Arc<Path>,
    git_is_fit: OnceCell<()>,
    slots: Semaphore,
}

impl LocalForge {
    /// A forge whose repositories are in `home` (`ARTEL_HOME/repos`), with the usual bounds.
    pub fn new(home: PathBuf, sandbox: Option<Sandbox>) -> Self {
        Self::with(Options::new(home, sandbox))
    }

    /// A forge that is set up otherwise.
    pub fn with(options: Options) -> Self {
        Self(Arc::new(Inner {
            git: options.git.as_path().into(),
            git_is_fit: OnceCell::new(),
            slots: Semaphore::new(options.checks_at_once.max(1)),
            options,
        }))
    }

    /// Clones the project's default branch into `folder`, which must not exist or be empty.
    pub async fn clone_into(&self, project: &ProjectId, folder: &Path) -> Result<(), Error> {
        clone::clone(&self.repo(project).await?, folder).await
    }

    /// Writes the files of a commit into `folder`, which must exist and be empty: exactly as committed, no link leading
    /// out, submodules as empty folders.
    pub async fn export(&self, project: &ProjectId, sha: &Sha, folder: &Path) -> Result<(), Error> {
        export::export(&self.repo(project).await?, sha, folder).await
    }

    /// All pull requests of a project, by number.
    pub async fn pull_requests(&self, project: &ProjectId) -> Result<Vec<PullRequest>, Error> {
        let repo = self.repo(project).await?;
        let mut seen = Vec::new();
        for pull in pulls::all(&repo).await? {
            seen.push(pulls::seen(&repo, &pull.stored).await?);
        }
        Ok(seen)
    }

    fn home(&self) -> &Path {
        &self.0.options.home
    }

    fn path(&self, project: &ProjectId) -> PathBuf {
        self.home().join(format!("{project}.git"))
    }

    fn git(&self, repository: PathBuf) -> Git {
        Git::new(self.0.git.clone(), repository)
    }

    async fn fit(&self) -> Result<(), Error> {
        let check = || async { self.git(self.home().to_owned()).check_version().await };
        self.0.git_is_fit.get_or_try_init(check).await.map(drop)
    }

    /// A repository to read.
    async fn repo(&self, project: &ProjectId) -> Result<Repo, Error> {
        check_names::project(project)?;
        self.fit().await?;
        let path = self.path(project);
        if !path.is_dir() {
            return Err(Error::NoRepository(project.clone()));
        }
        Ok(Repo {
            git: self.git(path),
            project: project.clone(),
            scratch: self.home().join("scratch"),
            lock: None,
        })
    }

    /// A repository to change, alone.
    async fn locked(&self, project: &ProjectId) -> Result<Repo, Error> {
        let mut repo = self.repo(project).await?;
        repo.lock = Some(self.lock(project).await?);
        Ok(repo)
    }

    async fn lock(&self, project: &ProjectId) -> Result<Lock, Error> {
        let path = self.home().join("locks").join(format!("{project}.lock"));
        Lock::take(&path, project).await
    }

    fn described(&self, project: &ProjectId) -> Repository {
        let path = self.path(project);
        Repository {
            project: project.clone(),
            location: path.display().to_string(),
            path: Some(path),
            clone_url: None,
            default_branch: DEFAULT_BRANCH.to_owned(),
        }
    }

    async fn create(&self, project: &ProjectId, slug: &Slug) -> Result<Repository, Error> {
        check_names::project(project)?;
        self.fit().await?;
        let _lock = self.lock(project).await?;
        let path = self.path(project);
        if path.is_dir() {
            return Ok(self.described(project));
        }
        // Made elsewhere and moved at the end: a repository is there whole or not at all.
        let scratch = Scratch::new(&self.home().join("scratch"))?;
        let draft = scratch.path().join("draft.git");
        let repo = Repo {
            git: self.git(draft.clone()),
            project: project.clone(),
            scratch: scratch.path().to_owned(),
            lock: None,
        };
        repo.git
            .call([
                "init",
                "--quiet",
                "--bare",
                "--template=",
                "--object-format=sha1",
            ])
            .ok()
            .await?;
        let config = draft.join("config");
        let mut text = std::fs::read_to_string(&config).map_err(Error::io("reading", &config))?;
        text.push_str(REPOSITORY_CONFIGURATION);
        std::fs::write(&config, text).map_err(Error::io("writing", &config))?;
        let head = draft.join("HEAD");
        std::fs::write(&head, format!("ref: {}\n", branch_ref(DEFAULT_BRANCH)))
            .map_err(Error::io("writing", &head))?;
        let about = draft.join("description");
        std::fs::write(&about, format!("{slug}\n")).map_err(Error::io("writing", &about))?;
        let tree = repo.git.call(["mktree"]).line().await?;
        let first = repo
            .write_commit(&NewCommit {
                tree: &tree,
                parents: &[],
                message: &format!("Begin {slug}"),
            })
            .await?;
        repo.change_refs(&[RefChange::Move {
            name: branch_ref(DEFAULT_BRANCH),
            new: first.to_string(),
            old: None,
        }])
        .await?;
        std::fs::rename(&draft, &path).map_err(Error::io("moving a new repository to", &path))?;
        sync(self.home())?;
        tracing::info!(%project, repository = %path.display(), "a repository was created");
        Ok(self.described(project))
    }
}

fn sync(folder: &Path) -> Result<(), Error> {
    std::fs::File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("saving", folder))
}

/// Does something that changes a repository to its end, even when nobody waits for it any more: a Git that is killed in
/// the middle leaves locks behind.
async fn to_its_end<T, F>(work: F) -> ports::Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    let done = tokio::spawn(work.in_current_span()).await;
    Ok(done.unwrap_or(Err(Error::Interrupted))?)
}

#[async_trait]
impl Forge for LocalForge {
    #[tracing::instrument(skip_all, fields(%project))]
    async fn create_repository(
        &self,
        project: &ProjectId,
        slug: &Slug,
    ) -> ports::Result<Repository> {
        let (forge, project, slug) = (self.clone(), project.clone(), slug.clone());
        to_its_end(async move { forge.create(&project, &slug).await }).await
    }

    async fn repository(&self, project: &ProjectId) -> ports::Result<Option<Repository>> {
        match self.repo(project).await {
            Ok(_) => Ok(Some(self.described(project))),
            Err(Error::NoRepository(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn head(&self, project: &ProjectId, branch: &str) -> ports::Result<Option<Sha>> {
        check_names::branch(branch)?;
        Ok(self.repo(project).await?.branch(branch).await?)
    }

    #[tracing::instrument(skip_all, fields(%project, branch, key))]
    async fn commit_files(
        &self,
        project: &ProjectId,
        branch: &str,
        base: &Sha,
        message: &str,
        files: &[FileChange],
        key: &str,
    ) -> ports::Result<Sha> {
        let (forge, project, base, files) =
            (self.clone(), project.clone(), base.clone(), files.to_vec());
        let (branch, message, key) = (branch.to_owned(), message.to_owned(), key.to_owned());
        to_its_end(async move {
            let repo = forge.locked(&project).await?;
            commits::commit_files(&repo, &branch, &base, &message, &files, &key).await
        })
        .await
    }

    async fn list_files(&self, project: &ProjectId, sha: &Sha) -> ports::Result<Vec<String>> {
        let repo = self.repo(project).await?;
        repo.need_commit(sha).await?;
        let entries = repo.entries(sha.as_str()).await?;
        Ok(entries
            .into_iter()
            .filter(|entry| entry.mode != Mode::Submodule)
            .take(MAX_LISTED_FILES)
            .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
            .collect())
    }

    async fn read_file(
        &self,
        project: &ProjectId,
        sha: &Sha,
        path: &str,
    ) -> ports::Result<Option<String>> {
        Ok(self.read(project, sha, path).await?)
    }

    #[tracing::instrument(skip_all, fields(project = %new.project, branch = new.branch))]
    async fn open_pull_request(&self, new: &NewPullRequest) -> ports::Result<PullRequest> {
        let (forge, new) = (self.clone(), new.clone());
        to_its_end(async move {
            let repo = forge.locked(&new.project).await?;
            pulls::open(&repo, &new.branch, &new.head, &new.title, &new.body).await
        })
        .await
    }

    async fn pull_request(&self, project: &ProjectId, number: u64) -> ports::Result<PullRequest> {
        let repo = self.repo(project).await?;
        let pull = pulls::one(&repo, number).await?;
        Ok(pulls::seen(&repo, &pull.stored).await?)
    }

    async fn diff(
        &self,
        project: &ProjectId,
        number: u64,
        max_bytes: usize,
    ) -> ports::Result<Diff> {
        Ok(diff::diff(&self.repo(project).await?, number, max_bytes).await?)
    }

    #[tracing::instrument(skip_all, fields(%project, %sha))]
    async fn run_checks(&self, project: &ProjectId, sha: &Sha) -> ports::Result<ChecksReport> {
        let repo = self.repo(project).await?;
        let _slot = self
            .0
            .slots
            .acquire()
            .await
            .map_err(|_| Error::Interrupted)?;
        let checks = Checks {
            repo: &repo,
            sandbox: self.0.options.sandbox.as_ref(),
            limits: &self.0.options.check_limits,
            reports: self.home().join("checks").join(project.as_str()),
        };
        Ok(checks.report(sha).await?)
    }

    #[tracing::instrument(skip_all, fields(%project, number))]
    async fn rebase(&self, project: &ProjectId, number: u64) -> ports::Result<RebaseOutcome> {
        let (forge, project) = (self.clone(), project.clone());
        to_its_end(async move { rebase::rebase(&forge.locked(&project).await?, number).await })
            .await
    }

    #[tracing::instrument(skip_all, fields(%project, number, %head))]
    async fn merge(
        &self,
        project: &ProjectId,
        number: u64,
        head: &Sha,
    ) -> ports::Result<MergeOutcome> {
        let (forge, project, head) = (self.clone(), project.clone(), head.clone());
        to_its_end(async move {
            let repo = forge.locked(&project).await?;
            let outcome = merge::merge(&repo, number, &head).await?;
            tidy(&repo).await;
            Ok(outcome)
        })
        .await
    }

    #[tracing::instrument(skip_all, fields(%project, number))]
    async fn close(&self, project: &ProjectId, number: u64) -> ports::Result<()> {
        let (forge, project) = (self.clone(), project.clone());
        to_its_end(async move { pulls::close(&forge.locked(&project).await?, number).await }).await
    }
}

impl LocalForge {
    async fn read(
        &self,
        project: &ProjectId,
        sha: &Sha,
        path: &str,
    ) -> Result<Option<String>, Error> {
        check_names::path(path)?;
        let repo = self.repo(project).await?;
        repo.need_commit(sha).await?;
        let Some(entry) = repo.entry(sha, path).await? else {
            return Ok(None);
        };
        if !matches!(entry.mode, Mode::File | Mode::Executable) {
            return Ok(None);
        }
        if entry.size > MAX_READ_BYTES {
            return Err(Error::TooLarge {
                what: path.to_owned(),
                size: format!("{} bytes", entry.size),
                limit: format!("{MAX_READ_BYTES} bytes"),
            });
        }
        let bytes = repo.objects([entry.object.as_str()]).await?.pop().flatten();
        let text = String::from_utf8(bytes.unwrap_or_default()).map_err(|_| Error::NotText {
            path: path.to_owned(),
        })?;
        Ok(Some(text))
    }
}

/// Packs what has piled up, as Git sees fit; nothing depends on it.
async fn tidy(repo: &Repo) {
    let tidied = repo.git.call(["gc", "--auto", "--quiet"]).ok().await;
    if let Err(error) = tidied {
        tracing::warn!(%error, "a repository could not be packed");
    }
}
