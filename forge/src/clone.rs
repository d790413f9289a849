//! A person's own clone.

use std::path::Path;

use crate::repo::Repo;
use crate::{DEFAULT_BRANCH, Error};

/// How long a clone may take.
const CLONE_S: u64 = 600;

/// Clones the default branch into `folder`, which must not exist or be empty. Other branches, pull requests and our own
/// records stay behind; `git fetch origin BRANCH` gets a branch.
pub(crate) async fn clone(repo: &Repo, folder: &Path) -> Result<(), Error> {
    let taken = || Error::CloneTarget(folder.to_owned());
    match std::fs::read_dir(folder) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(taken());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Err(taken()),
        Err(error) => return Err(Error::io("reading", folder)(error)),
    }
    let folder = std::path::absolute(folder).map_err(Error::io("finding", folder))?;
    let repository = std::path::absolute(repo.path()).map_err(Error::io("finding", repo.path()))?;
    repo.git
        .call([
            "clone".as_ref(),
            "--quiet".as_ref(),
            "--no-local".as_ref(),
            "--single-branch".as_ref(),
            "--no-tags".as_ref(),
            "--branch".as_ref(),
            DEFAULT_BRANCH.as_ref(),
            "--".as_ref(),
            repository.as_os_str(),
            folder.as_os_str(),
        ])
        .outside()
        .seconds(CLONE_S)
        .ok()
        .await?;
    Ok(())
}
