//! Pull requests, kept in the repository itself: `refs/artel/pulls/{n}` is a blob that says everything about one, and
//! `refs/pull/{n}/head` keeps its commits.

use jiff::Timestamp;
use ports::{PullRequest, PullRequestStatus, Sha};
use serde::{Deserialize, Serialize};

use crate::commits::line;
use crate::repo::{RefChange, Repo};
use crate::{DEFAULT_BRANCH, Error, check_names};

const PULLS: &str = "refs/artel/pulls/";
/// The longest body, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// How often an operation looks again after somebody moved a ref under its hands.
pub(crate) const ROUNDS: u32 = 5;

/// What is stored about a pull request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub version: u32,
    pub number: u64,
    pub branch: String,
    pub title: String,
    pub body: String,
    pub head: Sha,
    pub status: PullRequestStatus,
    pub merged: Option<Sha>,
    pub opened_at: Timestamp,
    pub changed_at: Timestamp,
}

/// A stored pull request with the blob that it was read from.
#[derive(Clone, Debug)]
pub(crate) struct Pull {
    pub stored: Stored,
    blob: String,
}

pub(crate) fn meta_ref(number: u64) -> String {
    format!("{PULLS}{number}")
}

fn head_ref(number: u64) -> String {
    format!("refs/pull/{number}/head")
}

impl Pull {
    /// The same with changes, as what is to be written. Returns the ref changes that make it so.
    pub(crate) async fn changed(&self, repo: &Repo, to: Stored) -> Result<Vec<RefChange>, Error> {
        let changed = Stored {
            changed_at: Timestamp::now(),
            ..to
        };
        changes(repo, &changed, Some(self.blob.clone())).await
    }
}

async fn changes(
    repo: &Repo,
    stored: &Stored,
    old: Option<String>,
) -> Result<Vec<RefChange>, Error> {
    let bytes = serde_json::to_vec_pretty(stored).map_err(|source| Error::Stored {
        name: meta_ref(stored.number),
        source,
    })?;
    let blob = repo.write_blob(bytes).await?;
    Ok(vec![
        RefChange::Set {
            name: head_ref(stored.number),
            new: stored.head.to_string(),
        },
        RefChange::Move {
            name: meta_ref(stored.number),
            new: blob,
            old,
        },
    ])
}

/// All pull requests, by number.
pub(crate) async fn all(repo: &Repo) -> Result<Vec<Pull>, Error> {
    let output = repo
        .git
        .call(["for-each-ref", "--format=%(objectname) %(refname)", PULLS])
        .ok()
        .await?;
    let output = String::from_utf8_lossy(&output).into_owned();
    let refs: Vec<(&str, &str)> = output
        .lines()
        .filter_map(|line| line.split_once(' '))
        .collect();
    let objects = repo.objects(refs.iter().map(|(blob, _)| *blob)).await?;
    let mut pulls = Vec::with_capacity(refs.len());
    for ((blob, name), bytes) in refs.into_iter().zip(objects) {
        pulls.push(parse(name, blob, &bytes.unwrap_or_default())?);
    }
    pulls.sort_by_key(|pull| pull.stored.number);
    Ok(pulls)
}

/// One pull request. Where a crash came between its merge and its record, the record is mended first.
pub(crate) async fn one(repo: &Repo, number: u64) -> Result<Pull, Error> {
    let name = meta_ref(number);
    let blob = repo
        .reference(&name)
        .await?
        .ok_or(Error::NoPullRequest(number))?
        .to_string();
    let bytes = repo.objects([blob.as_str()]).await?.pop().flatten();
    let pull = parse(&name, &blob, &bytes.unwrap_or_default())?;
    settle(repo, pull).await
}

fn parse(name: &str, blob: &str, bytes: &[u8]) -> Result<Pull, Error> {
    let stored: Stored = serde_json::from_slice(bytes).map_err(|source| Error::Stored {
        name: name.to_owned(),
        source,
    })?;
    Ok(Pull {
        stored,
        blob: blob.to_owned(),
    })
}

/// A pull request that counts as open although the default branch holds its merge is merged.
async fn settle(repo: &Repo, pull: Pull) -> Result<Pull, Error> {
    if pull.stored.status != PullRequestStatus::Open {
        return Ok(pull);
    }
    let Some(merge) = find_merge(repo, &pull.stored.head).await? else {
        return Ok(pull);
    };
    let merged = Stored {
        status: PullRequestStatus::Merged,
        merged: Some(merge),
        ..pull.stored.clone()
    };
    let changes = pull.changed(repo, merged.clone()).await?;
    // Whoever was faster has written the same.
    repo.change_refs(&changes).await?;
    Ok(Pull {
        stored: merged,
        ..pull
    })
}

/// The merge commit on the default branch that brought exactly `head`.
async fn find_merge(repo: &Repo, head: &Sha) -> Result<Option<Sha>, Error> {
    let output = repo
        .git
        .call([
            "rev-list",
            "--first-parent",
            "--merges",
            "--parents",
            &crate::repo::branch_ref(DEFAULT_BRANCH),
            &format!("^{head}"),
        ])
        .ok()
        .await?;
    let output = String::from_utf8_lossy(&output);
    Ok(output.lines().find_map(|line| {
        let mut shas = line.split(' ');
        let merge = shas.next()?;
        (shas.nth(1)? == head.as_str()).then(|| Sha::new(merge))
    }))
}

/// As others see it. The head of an open one follows its branch.
pub(crate) async fn seen(repo: &Repo, stored: &Stored) -> Result<PullRequest, Error> {
    let head = if stored.status == PullRequestStatus::Open {
        repo.branch(&stored.branch).await?
    } else {
        None
    };
    Ok(PullRequest {
        number: stored.number,
        branch: stored.branch.clone(),
        head: head.unwrap_or_else(|| stored.head.clone()),
        status: stored.status,
        url: format!("{}#{}", repo.path().display(), stored.number),
        merged: stored.merged.clone(),
    })
}

pub(crate) async fn open(
    repo: &Repo,
    branch: &str,
    head: &Sha,
    title: &str,
    body: &str,
) -> Result<PullRequest, Error> {
    check_names::branch(branch)?;
    check_names::sha(head)?;
    if branch == DEFAULT_BRANCH {
        return Err(Error::NoCommits {
            branch: branch.to_owned(),
        });
    }
    for _ in 0..ROUNDS {
        let pulls = all(repo).await?;
        let latest = pulls.iter().rev().find(|pull| pull.stored.branch == branch);
        let latest = match latest {
            Some(pull) => Some(settle(repo, pull.clone()).await?),
            None => None,
        };
        if let Some(pull) = &latest
            && pull.stored.status == PullRequestStatus::Merged
            && pull.stored.head == *head
        {
            return seen(repo, &pull.stored).await;
        }
        let now = repo
            .branch(branch)
            .await?
            .ok_or_else(|| Error::NoBranch(branch.to_owned()))?;
        if now != *head {
            return Err(Error::HeadMoved {
                branch: branch.to_owned(),
                expected: head.clone(),
                now,
            });
        }
        let tip = repo.tip().await?;
        if repo.is_ancestor(head, &tip).await? {
            return Err(Error::NoCommits {
                branch: branch.to_owned(),
            });
        }
        if repo.merge_base(head, &tip).await?.is_none() {
            return Err(Error::Unrelated {
                branch: branch.to_owned(),
            });
        }
        let wanted = Stored {
            version: 1,
            number: pulls.last().map_or(1, |pull| pull.stored.number + 1),
            branch: branch.to_owned(),
            title: line(title),
            body: body.chars().take(MAX_BODY_BYTES / 4).collect(),
            head: head.clone(),
            status: PullRequestStatus::Open,
            merged: None,
            opened_at: Timestamp::now(),
            changed_at: Timestamp::now(),
        };
        let (stored, changes) = match latest {
            Some(pull) if pull.stored.status != PullRequestStatus::Merged => {
                let same =
                    pull.stored.status == PullRequestStatus::Open && pull.stored.head == *head;
                if same {
                    return seen(repo, &pull.stored).await;
                }
                let stored = Stored {
                    number: pull.stored.number,
                    opened_at: pull.stored.opened_at,
                    ..wanted
                };
                let changes = pull.changed(repo, stored.clone()).await?;
                (stored, changes)
            }
            _ => {
                let changes = changes(repo, &wanted, None).await?;
                (wanted, changes)
            }
        };
        if repo.change_refs(&changes).await? {
            return seen(repo, &stored).await;
        }
    }
    Err(Error::Contended(repo.project.clone()))
}

pub(crate) async fn close(repo: &Repo, number: u64) -> Result<(), Error> {
    for _ in 0..ROUNDS {
        let pull = one(repo, number).await?;
        if pull.stored.status != PullRequestStatus::Open {
            return Ok(());
        }
        let head = repo.branch(&pull.stored.branch).await?;
        let closed = Stored {
            status: PullRequestStatus::Closed,
            head: head.unwrap_or_else(|| pull.stored.head.clone()),
            ..pull.stored.clone()
        };
        let changes = pull.changed(repo, closed).await?;
        if repo.change_refs(&changes).await? {
            return Ok(());
        }
    }
    Err(Error::Contended(repo.project.clone()))
}
