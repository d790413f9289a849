//! Moves a branch onto the tip of the default branch, without a working tree.
//!
//! Commit by commit where the branch is a plain line; where it is not, or where single commits conflict although the whole
//! does not, by merging the tip into it. Either way the tip is an ancestor afterwards.

use std::collections::BTreeSet;

use ports::{PullRequestStatus, RebaseOutcome, Sha};

use crate::pulls::{Pull, ROUNDS, Stored, one};
use crate::repo::{NewCommit, RawCommit, RefChange, Repo, branch_ref};
use crate::{DEFAULT_BRANCH, Error};

/// Longer branches are merged instead of being replayed.
const MAX_REPLAYED: usize = 200;

/// A tree merged from two sides.
enum Merged {
    Clean(String),
    Conflict(Vec<String>),
}

pub(crate) async fn rebase(repo: &Repo, number: u64) -> Result<RebaseOutcome, Error> {
    for _ in 0..ROUNDS {
        let pull = one(repo, number).await?;
        if pull.stored.status == PullRequestStatus::Closed {
            return Err(Error::Closed(number));
        }
        if pull.stored.status == PullRequestStatus::Merged {
            let head = pull.stored.head;
            return Ok(RebaseOutcome::UpToDate { head });
        }
        let branch = &pull.stored.branch;
        let head = repo
            .branch(branch)
            .await?
            .ok_or_else(|| Error::NoBranch(branch.clone()))?;
        let tip = repo.tip().await?;
        if repo.is_ancestor(&tip, &head).await? {
            return Ok(RebaseOutcome::UpToDate { head });
        }
        let moved = match replay(repo, branch, &tip, &head).await? {
            Some(moved) => moved,
            None => match join(repo, branch, &tip, &head).await? {
                Ok(moved) => moved,
                Err(files) => return Ok(RebaseOutcome::Conflict { files }),
            },
        };
        if write(repo, &pull, &head, &moved).await? {
            return Ok(RebaseOutcome::Rebased { head: moved });
        }
    }
    Err(Error::Contended(repo.project.clone()))
}

/// Moves the branch and the pull request's record together.
async fn write(repo: &Repo, pull: &Pull, from: &Sha, to: &Sha) -> Result<bool, Error> {
    let stored = Stored {
        head: to.clone(),
        ..pull.stored.clone()
    };
    let mut changes = pull.changed(repo, stored).await?;
    changes.push(RefChange::Move {
        name: branch_ref(&pull.stored.branch),
        new: to.to_string(),
        old: Some(from.to_string()),
    });
    repo.change_refs(&changes).await
}

/// The branch's commits one by one on top of `tip`; `None` when they are no plain line or one of them conflicts.
async fn replay(repo: &Repo, branch: &str, tip: &Sha, head: &Sha) -> Result<Option<Sha>, Error> {
    let Some(base) = repo.merge_base(tip, head).await? else {
        return Err(Error::Unrelated {
            branch: branch.to_owned(),
        });
    };
    let list = repo
        .git
        .call([
            "rev-list",
            "--reverse",
            "--topo-order",
            &format!("--max-count={}", MAX_REPLAYED + 1),
            head.as_str(),
            &format!("^{base}"),
        ])
        .ok()
        .await?;
    let shas: Vec<Sha> = String::from_utf8_lossy(&list)
        .lines()
        .map(Sha::new)
        .collect();
    if shas.len() > MAX_REPLAYED {
        return Ok(None);
    }
    let commits = repo.commits(&shas).await?;
    let mut before = &base;
    for commit in &commits {
        if commit.parents.as_slice() != std::slice::from_ref(before) {
            return Ok(None);
        }
        before = &commit.sha;
    }
    let mut onto = tip.clone();
    let mut onto_tree = repo.tree(tip).await?;
    let mut parent_tree = repo.tree(&base).await?;
    for commit in &commits {
        let Merged::Clean(tree) = repeat(repo, commit, &onto_tree).await? else {
            return Ok(None);
        };
        // What the tip has already is left out; what was empty from the start stays.
        if tree != onto_tree || commit.tree == parent_tree {
            let Ok(copied) = repo.copy_commit(commit, &tree, &onto).await else {
                return Ok(None);
            };
            onto = copied;
        }
        onto_tree = tree;
        parent_tree.clone_from(&commit.tree);
    }
    Ok(Some(onto))
}

/// What a commit did to its parent, done to another tree: a merge of both whose base is that parent. Git takes the base
/// from the history, so the tree gets a commit with this very parent.
async fn repeat(repo: &Repo, commit: &RawCommit, onto_tree: &str) -> Result<Merged, Error> {
    let [parent] = commit.parents.as_slice() else {
        return Ok(Merged::Conflict(Vec::new()));
    };
    let stand_in = repo
        .write_commit(&NewCommit {
            tree: onto_tree,
            parents: &[parent],
            message: "Stands in for the tip while a commit is repeated on it",
        })
        .await?;
    merge_trees(repo, &stand_in, &commit.sha).await
}

/// The tip merged into the branch, or the files in conflict.
async fn join(
    repo: &Repo,
    branch: &str,
    tip: &Sha,
    head: &Sha,
) -> Result<Result<Sha, Vec<String>>, Error> {
    match merge_trees(repo, head, tip).await? {
        Merged::Conflict(files) => Ok(Err(files)),
        Merged::Clean(tree) => {
            let message = format!("Merge {DEFAULT_BRANCH} into {branch}");
            let commit = repo
                .write_commit(&NewCommit {
                    tree: &tree,
                    parents: &[head, tip],
                    message: &message,
                })
                .await?;
            Ok(Ok(commit))
        }
    }
}

async fn merge_trees(repo: &Repo, one: &Sha, two: &Sha) -> Result<Merged, Error> {
    let answer = repo
        .git
        .call([
            "merge-tree",
            "--write-tree",
            "--name-only",
            "--no-messages",
            "-z",
            one.as_str(),
            two.as_str(),
        ])
        .run()
        .await?;
    if !matches!(answer.code, 0 | 1) {
        return Err(answer.failed());
    }
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let mut fields = text
        .split('\0')
        .map(str::trim_end)
        .filter(|field| !field.is_empty());
    let tree = fields.next().ok_or(Error::Unexpected {
        command: "merge-tree",
        said: answer.said.clone(),
    })?;
    if answer.code == 0 {
        return Ok(Merged::Clean(tree.to_owned()));
    }
    let files: BTreeSet<String> = fields.map(str::to_owned).collect();
    Ok(Merged::Conflict(files.into_iter().collect()))
}
