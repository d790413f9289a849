//! Code hosting in memory: commits are trees, so that diffs, merges, rebases and conflicts are real.

use std::collections::BTreeMap;

use async_trait::async_trait;
use parking_lot::Mutex;
use ports::{
    ChecksReport, Diff, Failure, FileChange, Forge, MergeOutcome, NewPullRequest, ProjectId,
    PullRequest, PullRequestStatus, RebaseOutcome, Repository, Result, Sha, Slug,
};

type Tree = BTreeMap<String, String>;

#[derive(Clone)]
struct Commit {
    parent: Option<Sha>,
    tree: Tree,
}

#[derive(Default)]
struct State {
    repository: Option<Repository>,
    commits: BTreeMap<Sha, Commit>,
    branches: BTreeMap<String, Sha>,
    pulls: Vec<PullRequest>,
    keys: BTreeMap<String, Sha>,
    /// What happened, an entry for each change that was made.
    log: Vec<String>,
    /// Before this many merges somebody else pushes to the default branch.
    intruders: u32,
}

/// See the module.
#[derive(Default)]
pub struct MemoryForge(Mutex<State>);

impl State {
    fn add(&mut self, parent: Option<Sha>, tree: Tree) -> Sha {
        let sha = Sha::new(format!("{:040x}", self.commits.len() + 1));
        self.commits.insert(sha.clone(), Commit { parent, tree });
        sha
    }

    fn tree(&self, sha: &Sha) -> Tree {
        self.commits[sha].tree.clone()
    }

    fn ancestors(&self, sha: &Sha) -> Vec<Sha> {
        let mut line = vec![sha.clone()];
        while let Some(parent) = self.commits[&line[line.len() - 1]].parent.clone() {
            line.push(parent);
        }
        line
    }

    fn merge_base(&self, one: &Sha, other: &Sha) -> Sha {
        let others = self.ancestors(other);
        self.ancestors(one)
            .into_iter()
            .find(|sha| others.contains(sha))
            .expect("one root")
    }

    fn changed(&self, from: &Sha, to: &Sha) -> Tree {
        let before = self.tree(from);
        self.tree(to)
            .into_iter()
            .filter(|(path, text)| before.get(path) != Some(text))
            .collect()
    }

    fn commit(&mut self, branch: &str, base: &Sha, files: &Tree) -> Sha {
        let from = self.branches.get(branch).unwrap_or(base).clone();
        let mut tree = self.tree(&from);
        tree.extend(files.clone());
        let sha = self.add(Some(from), tree);
        self.branches.insert(branch.to_owned(), sha.clone());
        for pull in &mut self.pulls {
            if pull.branch == branch {
                pull.head = sha.clone();
            }
        }
        sha
    }

    fn pull(&mut self, number: u64) -> &mut PullRequest {
        let index = usize::try_from(number).expect("small") - 1;
        &mut self.pulls[index]
    }
}

impl MemoryForge {
    /// What a worker pushes.
    pub fn push(&self, branch: &str, base: &str, files: &[(String, String)]) -> Sha {
        self.0
            .lock()
            .commit(branch, &Sha::new(base), &files.iter().cloned().collect())
    }

    /// Lets somebody else push to the default branch before each of the next merges.
    pub fn intrude(&self, times: u32) {
        self.0.lock().intruders = times;
    }

    /// What was changed, in order.
    pub fn log(&self) -> Vec<String> {
        self.0.lock().log.clone()
    }

    /// A file of the default branch.
    pub fn main_file(&self, path: &str) -> Option<String> {
        let state = self.0.lock();
        state.tree(&state.branches["main"]).get(path).cloned()
    }

    pub fn pulls(&self) -> Vec<PullRequest> {
        self.0.lock().pulls.clone()
    }
}

#[async_trait]
impl Forge for MemoryForge {
    async fn create_repository(&self, project: &ProjectId, slug: &Slug) -> Result<Repository> {
        let mut state = self.0.lock();
        if let Some(known) = &state.repository {
            return Ok(known.clone());
        }
        let repository = Repository {
            project: project.clone(),
            location: format!("memory:{slug}"),
            path: Some(format!("/repositories/{slug}.git").into()),
            clone_url: None,
            default_branch: "main".into(),
        };
        let root = state.add(None, Tree::new());
        state.branches.insert("main".into(), root);
        state.repository = Some(repository.clone());
        state.log.push(format!("created {slug}"));
        Ok(repository)
    }

    async fn repository(&self, _: &ProjectId) -> Result<Option<Repository>> {
        Ok(self.0.lock().repository.clone())
    }

    async fn head(&self, _: &ProjectId, branch: &str) -> Result<Option<Sha>> {
        Ok(self.0.lock().branches.get(branch).cloned())
    }

    async fn commit_files(
        &self,
        _: &ProjectId,
        branch: &str,
        base: &Sha,
        message: &str,
        files: &[FileChange],
        key: &str,
    ) -> Result<Sha> {
        let mut state = self.0.lock();
        if let Some(made) = state.keys.get(key) {
            return Ok(made.clone());
        }
        if state.branches.get(branch) != Some(base) {
            return Err(Failure::new("base_moved", format!("{branch} is elsewhere")));
        }
        let files = files
            .iter()
            .map(|file| (file.path.clone(), file.content.clone().unwrap_or_default()))
            .collect();
        let sha = state.commit(branch, base, &files);
        state.keys.insert(key.to_owned(), sha.clone());
        state.log.push(format!("committed {message}"));
        Ok(sha)
    }

    async fn list_files(&self, _: &ProjectId, sha: &Sha) -> Result<Vec<String>> {
        Ok(self.0.lock().tree(sha).into_keys().collect())
    }

    async fn read_file(&self, _: &ProjectId, sha: &Sha, path: &str) -> Result<Option<String>> {
        Ok(self.0.lock().tree(sha).get(path).cloned())
    }

    async fn open_pull_request(&self, new: &NewPullRequest) -> Result<PullRequest> {
        let mut state = self.0.lock();
        if let Some(known) = state
            .pulls
            .iter_mut()
            .find(|pull| pull.branch == new.branch)
        {
            known.head = new.head.clone();
            return Ok(known.clone());
        }
        let number = state.pulls.len() as u64 + 1;
        let pull = PullRequest {
            number,
            branch: new.branch.clone(),
            head: new.head.clone(),
            status: PullRequestStatus::Open,
            url: format!("memory:pull/{number}"),
            merged: None,
        };
        state.pulls.push(pull.clone());
        state.log.push(format!("opened {}", new.branch));
        Ok(pull)
    }

    async fn pull_request(&self, _: &ProjectId, number: u64) -> Result<PullRequest> {
        Ok(self.0.lock().pull(number).clone())
    }

    async fn diff(&self, _: &ProjectId, number: u64, _: usize) -> Result<Diff> {
        let mut state = self.0.lock();
        let head = state.pull(number).head.clone();
        let tip = state.branches["main"].clone();
        let base = state.merge_base(&head, &tip);
        let files = state.changed(&base, &head);
        Ok(Diff {
            base,
            head,
            files: files.keys().cloned().collect(),
            text: files
                .iter()
                .map(|(path, text)| format!("+++ {path}\n+{text}"))
                .collect::<Vec<_>>()
                .join("\n"),
            truncated: false,
        })
    }

    async fn run_checks(&self, _: &ProjectId, _: &Sha) -> Result<ChecksReport> {
        Err(Failure::new(
            "not_here",
            "checks are errands in these tests",
        ))
    }

    async fn rebase(&self, _: &ProjectId, number: u64) -> Result<RebaseOutcome> {
        let mut state = self.0.lock();
        let pull = state.pull(number).clone();
        let tip = state.branches["main"].clone();
        let base = state.merge_base(&pull.head, &tip);
        if base == tip {
            return Ok(RebaseOutcome::UpToDate { head: pull.head });
        }
        let ours = state.changed(&base, &pull.head);
        let theirs = state.changed(&base, &tip);
        let files: Vec<String> = ours
            .iter()
            .filter(|(path, text)| theirs.get(*path).is_some_and(|other| other != *text))
            .map(|(path, _)| path.clone())
            .collect();
        if !files.is_empty() {
            return Ok(RebaseOutcome::Conflict { files });
        }
        let mut tree = state.tree(&tip);
        tree.extend(ours);
        let head = state.add(Some(tip), tree);
        state.branches.insert(pull.branch.clone(), head.clone());
        state.pull(number).head = head.clone();
        state.log.push(format!("rebased {}", pull.branch));
        Ok(RebaseOutcome::Rebased { head })
    }

    async fn merge(&self, _: &ProjectId, number: u64, head: &Sha) -> Result<MergeOutcome> {
        let mut state = self.0.lock();
        let pull = state.pull(number).clone();
        if let Some(sha) = pull.merged {
            return Ok(MergeOutcome::Merged { sha });
        }
        if pull.head != *head {
            return Ok(MergeOutcome::HeadMoved { head: pull.head });
        }
        let tip = state.branches["main"].clone();
        if state.intruders > 0 {
            state.intruders -= 1;
            let other = Tree::from([(format!("other-{}", state.intruders), "x".to_owned())]);
            state.commit("main", &tip, &other);
            return Ok(MergeOutcome::BaseMoved);
        }
        if !state.ancestors(head).contains(&tip) {
            return Ok(MergeOutcome::BaseMoved);
        }
        state.branches.insert("main".into(), head.clone());
        let pull = state.pull(number);
        pull.status = PullRequestStatus::Merged;
        pull.merged = Some(head.clone());
        let branch = pull.branch.clone();
        state.log.push(format!("merged {branch}"));
        Ok(MergeOutcome::Merged { sha: head.clone() })
    }

    async fn close(&self, _: &ProjectId, number: u64) -> Result<()> {
        let mut state = self.0.lock();
        let pull = state.pull(number);
        if pull.status == PullRequestStatus::Open {
            pull.status = PullRequestStatus::Closed;
            let branch = pull.branch.clone();
            state.log.push(format!("closed {branch}"));
        }
        Ok(())
    }
}
