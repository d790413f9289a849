//! Merges by commit: exactly what was reviewed, onto exactly the tip that it stands on.

use ports::{MergeOutcome, PullRequestStatus, Sha};

use crate::pulls::{ROUNDS, Stored, one};
use crate::repo::{NewCommit, RefChange, Repo, branch_ref};
use crate::{DEFAULT_BRANCH, Error, check_names, commits};

pub(crate) async fn merge(repo: &Repo, number: u64, head: &Sha) -> Result<MergeOutcome, Error> {
    check_names::sha(head)?;
    for _ in 0..ROUNDS {
        let pull = one(repo, number).await?;
        let stored = &pull.stored;
        match (stored.status, &stored.merged) {
            (PullRequestStatus::Merged, Some(sha)) => {
                return Ok(MergeOutcome::Merged { sha: sha.clone() });
            }
            (PullRequestStatus::Open, _) => {}
            _ => return Err(Error::Closed(number)),
        }
        let now = repo
            .branch(&stored.branch)
            .await?
            .ok_or_else(|| Error::NoBranch(stored.branch.clone()))?;
        if now != *head {
            return Ok(MergeOutcome::HeadMoved { head: now });
        }
        let tip = repo.tip().await?;
        if tip == *head {
            return Err(Error::NoCommits {
                branch: stored.branch.clone(),
            });
        }
        if !repo.is_ancestor(&tip, head).await? {
            return Ok(MergeOutcome::BaseMoved);
        }
        let mut message = format!(
            "Merge pull request #{number} from {}: {}",
            stored.branch, stored.title
        );
        if !stored.body.trim().is_empty() {
            message.push_str("\n\n");
            message.push_str(&stored.body);
        }
        let merge = repo
            .write_commit(&NewCommit {
                tree: &repo.tree(head).await?,
                parents: &[&tip, head],
                message: &commits::text(&message),
            })
            .await?;
        let merged = Stored {
            head: head.clone(),
            status: PullRequestStatus::Merged,
            merged: Some(merge.clone()),
            ..stored.clone()
        };
        let mut changes = pull.changed(repo, merged).await?;
        changes.push(RefChange::Verify {
            name: branch_ref(&stored.branch),
            at: head.to_string(),
        });
        changes.push(RefChange::Move {
            name: branch_ref(DEFAULT_BRANCH),
            new: merge.to_string(),
            old: Some(tip.to_string()),
        });
        if repo.change_refs(&changes).await? {
            return Ok(MergeOutcome::Merged { sha: merge });
        }
    }
    Err(Error::Contended(repo.project.clone()))
}
